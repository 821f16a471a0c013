//! The JSON that dcm2niix or a BIDS data set puts beside a scan. It says how the scan was acquired.
//!
//! Only the keys named here are read; patient, operator, station and dates are never read. Values
//! are not trusted: texts are shortened and lose control characters, and numbers must be finite and
//! above 0. A value that does not fit is left out, and its key is reported.

use serde_json::{Map, Value};

use crate::domain::{
    acquisition::AcquisitionFacts,
    sequence::{Acquisition, AgentFields},
};

/// Size of the largest JSON that is read, bytes. dcm2niix writes 2 to 50 KB.
pub const MAX_BYTES: u64 = 1 << 20;

/// Length of the longest text that is kept, characters: that of a DICOM long string.
const MAX_CHARS: usize = 64;

/// Longest list that is kept, words.
const MAX_WORDS: usize = 32;

/// The content of a JSON beside the facts that are kept.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Read {
    /// Keys whose values cannot be used.
    pub unusable: Vec<&'static str>,
    /// What the JSON says of the sequence.
    pub sequence: Acquisition,
    /// What the conversion from DICOM says, a sentence each.
    pub notes: Vec<String>,
}

/// Adds the values of a JSON to the facts. Returns what else it says.
///
/// # Errors
/// If it is no JSON object. The text gives the cause without quoting the JSON. The facts are
/// unchanged then.
pub fn read_facts(bytes: &[u8], facts: &mut AcquisitionFacts) -> Result<Read, String> {
    if bytes.len() as u64 > MAX_BYTES {
        return Err(format!("it is larger than {MAX_BYTES} bytes"));
    }

    // dcm2niix copies texts of DICOM headers unchanged, whatever their encoding.
    let text = String::from_utf8_lossy(bytes);
    let text = text.trim_start_matches('\u{feff}');
    let value: Value = serde_json::from_str(text).map_err(|error| {
        format!("it is no valid JSON (line {}, column {})", error.line(), error.column())
    })?;

    let Value::Object(entries) = value else { return Err("it is no JSON object".to_owned()) };
    let notes = notes(&entries);
    let mut fields = Fields { entries, unusable: Vec::new() };
    const MS_PER_SECOND: f64 = 1000.0;

    *facts = AcquisitionFacts {
        has_json: true,
        field_strength_t: fields.number("MagneticFieldStrength", 1.0),
        manufacturer: fields.text("Manufacturer"),
        model: fields.text("ManufacturersModelName"),
        series: fields.text("SeriesDescription"),
        protocol: fields.text("ProtocolName"),
        dimensions: fields.text("MRAcquisitionType"),
        echo_time_ms: fields.number("EchoTime", MS_PER_SECOND),
        repetition_time_ms: fields.number("RepetitionTime", MS_PER_SECOND),
        inversion_time_ms: fields.number("InversionTime", MS_PER_SECOND),
        slice_thickness_mm: fields.number("SliceThickness", 1.0),
        ..std::mem::take(facts)
    };

    let sequence = Acquisition {
        scanning_sequence: fields.list("ScanningSequence"),
        sequence_variant: fields.list("SequenceVariant"),
        image_type: fields.list("ImageType"),
        acquisition_type: facts.dimensions.clone(),
        sequence_name: fields.text("SequenceName").or_else(|| fields.text("PulseSequenceName")),
        echo_time_ms: facts.echo_time_ms,
        repetition_time_ms: facts.repetition_time_ms,
        inversion_time_ms: facts.inversion_time_ms,
        echo_train: fields.number("EchoTrainLength", 1.0),
        description: facts.series.clone(),
        protocol: facts.protocol.clone(),
        agent: AgentFields {
            name: fields.text("ContrastBolusIngredient"),
            volume_ml: fields.number("ContrastBolusVolume", 1.0),
        },
    };
    Ok(Read { unusable: fields.unusable, sequence, notes })
}

/// Most notes that are read, and the length of the longest one, characters.
const MAX_NOTES: usize = 8;
const MAX_NOTE_CHARS: usize = 300;

/// What the conversion of a DICOM series says about it (`OddscanNotes`). Only texts of our own go
/// into results: others might name somebody.
fn notes(entries: &Map<String, Value>) -> Vec<String> {
    if entries.get("ConversionSoftware").and_then(Value::as_str) != Some("oddscan") {
        return Vec::new();
    }
    let notes = entries.get("OddscanNotes").and_then(Value::as_array);
    let plain = |note: &Value| -> String {
        let note = note.as_str().unwrap_or_default();
        note.chars().filter(|c| !c.is_control()).take(MAX_NOTE_CHARS).collect()
    };
    let notes = notes.into_iter().flatten().take(MAX_NOTES);
    notes.map(plain).filter(|note| !note.is_empty()).collect()
}

/// The entries of a JSON, and the keys that were asked for but have values that cannot be used.
struct Fields {
    entries: Map<String, Value>,
    unusable: Vec<&'static str>,
}

impl Fields {
    fn number(&mut self, key: &'static str, factor: f64) -> Option<f64> {
        self.read(key, |value| {
            let number = value.as_f64()?;
            // Rounded to a nanosecond, because 0.00298 s times 1000 gives 2.9800000000000004.
            let scaled = (number * factor * 1e6).round() / 1e6;
            (scaled.is_finite() && scaled > 0.0).then_some(scaled)
        })
    }

    fn text(&mut self, key: &'static str) -> Option<String> {
        self.read(key, |value| {
            let is_harmless = |c: &char| !c.is_control();
            let text: String = value.as_str()?.trim().chars().filter(is_harmless).collect();
            let text: String = text.chars().take(MAX_CHARS).collect();
            (!text.is_empty()).then_some(text)
        })
    }

    /// Words in upper case, of a list or of one text: `GR\IR`, in older versions `GR_IR`.
    fn list(&mut self, key: &'static str) -> Vec<String> {
        let word = |text: &str| {
            let text: String = text.trim().chars().filter(|c| !c.is_control()).collect();
            text.chars().take(MAX_CHARS).collect::<String>().to_uppercase()
        };
        let found = self.read(key, |value| match value {
            Value::String(text) => Some(text.split(['\\', '_', '/']).map(word).collect()),
            Value::Array(texts) => texts.iter().map(|text| Some(word(text.as_str()?))).collect(),
            _ => None,
        });
        let words: Vec<String> = found.unwrap_or_default();
        words.into_iter().filter(|word| !word.is_empty()).take(MAX_WORDS).collect()
    }

    fn read<T>(&mut self, key: &'static str, usable: impl Fn(&Value) -> Option<T>) -> Option<T> {
        // Empty texts and nulls carry no value, and are no fault.
        let says = |value: &&Value| !value.is_null() && value.as_str() != Some("");
        let value = self.entries.get(key).filter(says)?;
        let found = usable(value);
        if found.is_none() {
            self.unusable.push(key);
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> (AcquisitionFacts, Result<Vec<&'static str>, String>) {
        let mut facts = AcquisitionFacts::of("a_T1w", [1.0; 3]);
        let said = read_facts(text.as_bytes(), &mut facts).map(|read| read.unusable);
        (facts, said)
    }

    #[test]
    fn what_dcm2niix_writes_is_read_in_our_units_and_the_patient_is_not() {
        let (facts, said) = read(
            r#"{"Modality": "MR", "MagneticFieldStrength": 3, "Manufacturer": "Siemens",
            "ManufacturersModelName": "Prisma", "StationName": "MRC1", "PatientName": "Doe^John",
            "SeriesDescription": "t1_mprage_sag", "ProtocolName": "t1_mprage_sag_p2",
            "MRAcquisitionType": "3D", "SliceThickness": 0.9, "EchoTime": 0.00298,
            "RepetitionTime": 2.3, "InversionTime": 0.9, "ImageType": ["ORIGINAL"]}"#,
        );
        assert_eq!(said, Ok(vec![]));
        let expected = AcquisitionFacts {
            has_json: true,
            field_strength_t: Some(3.0),
            manufacturer: Some("Siemens".into()),
            model: Some("Prisma".into()),
            series: Some("t1_mprage_sag".into()),
            protocol: Some("t1_mprage_sag_p2".into()),
            dimensions: Some("3D".into()),
            echo_time_ms: Some(2.98),
            repetition_time_ms: Some(2300.0),
            inversion_time_ms: Some(900.0),
            slice_thickness_mm: Some(0.9),
            ..AcquisitionFacts::of("a_T1w", [1.0; 3])
        };
        assert_eq!(facts, expected);
        let kept = serde_json::to_string(&facts).unwrap();
        assert!(!kept.contains("Doe") && !kept.contains("MRC1"), "{kept}");
    }

    #[test]
    fn a_sequence_is_read_as_the_converters_write_it() {
        let sequence = |text: &str| {
            read_facts(text.as_bytes(), &mut AcquisitionFacts::default()).unwrap().sequence
        };
        let found = sequence(
            r#"{"ScanningSequence": "GR\\IR", "SequenceVariant": "SK_SP_MP",
            "ImageType": ["ORIGINAL", "PRIMARY", "p"], "InversionTime": 0.9,
            "ContrastBolusIngredient": "GADOLINIUM", "PulseSequenceName": "tfl"}"#,
        );
        assert_eq!(found.scanning_sequence, ["GR", "IR"]);
        assert_eq!(found.sequence_variant, ["SK", "SP", "MP"]);
        assert_eq!(found.image_type, ["ORIGINAL", "PRIMARY", "P"]);
        assert_eq!(
            (found.inversion_time_ms, found.sequence_name.as_deref()),
            (Some(900.0), Some("tfl"))
        );
        assert_eq!(found.agent.name.as_deref(), Some("GADOLINIUM"));

        let (_, said) = read(r#"{"ImageType": 3, "ScanningSequence": ["GR", 4]}"#);
        assert_eq!(said, Ok(vec!["ScanningSequence", "ImageType"]));
    }

    #[test]
    fn a_value_of_no_use_is_named_and_the_others_are_kept() {
        let (facts, said) = read(
            r#"{"MagneticFieldStrength": "3T", "EchoTime": -1, "Manufacturer": ["GE"],
            "RepetitionTime": 1e308, "ProtocolName": null, "SeriesDescription": "FLAIR"}"#,
        );
        let unusable =
            ["MagneticFieldStrength", "Manufacturer", "EchoTime", "RepetitionTime"].to_vec();
        assert_eq!(said, Ok(unusable));
        assert_eq!((facts.series.as_deref(), facts.field_strength_t), (Some("FLAIR"), None));
    }

    #[test]
    fn notes_of_the_conversion_are_few_and_short() {
        let of = |text: &str| {
            let read = read_facts(text.as_bytes(), &mut AcquisitionFacts::default());
            read.map(|read| read.notes).unwrap_or_default()
        };
        assert_eq!(
            of(
                r#"{"ConversionSoftware": "oddscan", "OddscanNotes": ["1 slice\u001b was left out", ""]}"#
            ),
            ["1 slice was left out"]
        );
        for nothing in ["", "[]", "{}", r#"{"OddscanNotes": "x"}"#, r#"{"OddscanNotes": ["ROE"]}"#]
        {
            assert_eq!(of(nothing), Vec::<String>::new());
        }
        let many = serde_json::json!({
            "ConversionSoftware": "oddscan", "OddscanNotes": vec!["ä".repeat(999); 99]
        })
        .to_string();
        assert_eq!(of(&many), vec!["ä".repeat(MAX_NOTE_CHARS); MAX_NOTES]);
    }

    #[test]
    fn what_is_no_json_object_changes_nothing() {
        let deep = "[".repeat(100_000);
        let long = format!("{{\"a\": \"{}\"}}", "x".repeat(1 << 20));
        for text in ["", "{", "[1]", "3", "{\"EchoTime\": NaN}", "{\"a\": 1e999}", &deep, &long] {
            let (facts, said) = read(text);
            assert!(said.is_err(), "{}", &text[..text.len().min(20)]);
            assert_eq!(facts, AcquisitionFacts::of("a_T1w", [1.0; 3]));
        }
    }

    #[test]
    fn texts_are_shortened_and_lose_control_characters() {
        let mut facts = AcquisitionFacts::default();
        let latin_1 = b"{\"SeriesDescription\": \"M\xfcller\"}";
        read_facts(latin_1, &mut facts).unwrap();
        assert_eq!(facts.series.as_deref(), Some("M\u{fffd}ller"));
        let (facts, _) = read(&format!("{{\"Manufacturer\": \" a\\u001b[2J{}\"}}", "ä".repeat(99)));
        let text = facts.manufacturer.unwrap();
        assert!(text.starts_with("a[2Jää") && text.chars().count() == MAX_CHARS, "{text}");
    }
}
