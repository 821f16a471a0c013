//! The header of one file: where its frames are, how they are scaled, and what the sequence was.
//!
//! Reading stops before the pixels, because a flat dump has thousands of files, and most of them
//! are never converted.

use std::io::Read;

use dicom_core::Tag;
use dicom_dictionary_std::tags;
use dicom_object::InMemDicomObject;
use serde_json::{Map, Value, json};

use super::{elements::Part, faults::EXPORT_AGAIN, open::open, values};
use crate::{
    domain::{
        error::{
            QuarantineReason::{BadHeader, TooLarge, Unsupported},
            Refusal,
        },
        left_alone::LeftAlone,
        patient::Patient,
        scan::DicomFacts,
        sequence::{Acquisition, AgentFields, is_no_magnitude},
    },
    numeric::stack::{Plane, directions},
};

/// One frame of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Frame {
    /// Place of the frame in the patient.
    pub plane: Plane,
    /// Echo time, ms, if the header states it.
    pub echo_time_ms: Option<f64>,
    /// Part of the complex signal.
    pub component: Component,
    /// Stored value -> intensity: slope and intercept.
    pub rescale: [f64; 2],
}

/// Part of the complex signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Component {
    /// Magnitude, or not stated.
    Magnitude,
    /// Phase, real or imaginary part.
    Other,
}

/// The content of one file's header.
#[derive(Debug, Clone, PartialEq)]
pub struct Head {
    /// SeriesInstanceUID: the series that the file belongs to.
    pub series_uid: String,
    /// SOPInstanceUID: the identity of the file's image.
    pub instance_uid: String,
    /// Number of the series within the examination, if stated.
    pub series_number: Option<i64>,
    /// Why oddscan does not use the file, although the file is sound.
    pub unwanted: Option<LeftAlone>,
    /// Why the file makes no volume. Its series makes none without it, either.
    pub fault: Option<Refusal>,
    /// Columns and rows.
    pub extents: [usize; 2],
    /// The patient, by a hash, if the header names one.
    pub patient: Option<Patient>,
    /// UIDs of study and space, and the time of the acquisition.
    pub identifiers: DicomFacts,
    /// Who the image is of: the patient or else, where all numbers are removed, the name. It tells
    /// people apart whose series have the same UID.
    pub person: Option<Patient>,
    /// Frames of the file. Most files have one.
    pub frames: Vec<Frame>,
    /// The sequence, as far as the header states it.
    pub acquisition: Acquisition,
    /// Content of the JSON file beside the volume, by the names that dcm2niix and BIDS use.
    pub facts: Map<String, Value>,
}

/// Limit on the frames of one file.
const MAX_FRAMES: usize = 20_000;

/// Reads the header of a file.
///
/// # Errors
/// If it is no DICOM file, or does not name its series. [`Head::fault`] holds other faults.
pub fn read_head(reader: impl Read) -> Result<Head, Refusal> {
    let file = open(reader, Part::Header)?;
    let image = Dataset(&file.object);

    let series_uid = image.text(tags::SERIES_INSTANCE_UID);
    let Some(series_uid) = series_uid.or_else(|| file.is_directory.then(String::new)) else {
        return refuse("no SeriesInstanceUID", "a SeriesInstanceUID", EXPORT_AGAIN);
    };

    let image_type = image.texts(tags::IMAGE_TYPE);
    // Archives change the case of numbers and names. The patient of the ledger keeps its own.
    let person = |tag| Patient::of_header(&image.text(tag)?.to_lowercase());
    let mut head = Head {
        series_uid,
        instance_uid: image.text(tags::SOP_INSTANCE_UID).unwrap_or_default(),
        series_number: image.number(tags::SERIES_NUMBER).map(|number| number as i64),
        unwanted: None,
        fault: None,
        extents: [tags::COLUMNS, tags::ROWS].map(|tag| image.whole(tag).unwrap_or(0)),
        person: person(tags::PATIENT_ID).or_else(|| person(tags::PATIENT_NAME)),
        patient: image.text(tags::PATIENT_ID).as_deref().and_then(Patient::of_header),
        identifiers: image.identifiers(),
        frames: Vec::new(),
        acquisition: image.acquisition(),
        facts: image.facts(&image_type),
    };

    if head.unwanted_by(&image, &image_type) {
        return Ok(head);
    }
    match image.frames(head.extents, &image_type) {
        Ok(frames) => head.frames = frames,
        Err(fault) => head.fault = Some(fault),
    }
    Ok(head)
}

fn refuse<T>(
    found: impl Into<String>,
    needed: impl Into<String>,
    action: &str,
) -> Result<T, Refusal> {
    Err(Refusal::new(BadHeader, found, needed, action))
}

impl Head {
    /// StudyInstanceUID; empty if it is absent.
    pub fn study_uid(&self) -> &str {
        self.identifiers.study_instance_uid.as_deref().unwrap_or_default()
    }

    /// FrameOfReferenceUID; empty if it is absent.
    pub(super) fn frame_of_reference_uid(&self) -> &str {
        self.identifiers.frame_of_reference_uid.as_deref().unwrap_or_default()
    }

    /// Number, description, protocol and day: what tells series apart if their UIDs do not.
    pub(super) fn told_series(&self) -> impl Ord + use<'_> {
        let Acquisition { description, protocol, .. } = &self.acquisition;
        let time = self.identifiers.acquisition_datetime.as_deref();
        let day = time.and_then(|time| time.get(..10));
        (self.series_number, description.as_deref(), protocol.as_deref(), day)
    }

    /// Notes why oddscan does not use a file, and returns whether there is such a cause.
    fn unwanted_by(&mut self, image: &Dataset<'_>, image_type: &[String]) -> bool {
        let is = |word: &str| image_type.iter().any(|have| have == word);
        let name = self.acquisition.description.as_deref().unwrap_or_default().to_lowercase();
        let is_localiser =
            ["localizer", "localiser", "scout", "survey"].iter().any(|word| name.contains(word))
                || name.split(|c: char| !c.is_ascii_alphanumeric()).any(|word| word == "loc");

        let class = image.text(tags::SOP_CLASS_UID).unwrap_or_default();
        let is_captured = class.starts_with("1.2.840.10008.5.1.4.1.1.7");
        let is_derived = image_type.first().is_some_and(|word| word == "DERIVED")
            && (is("SECONDARY") || DERIVED.iter().any(|word| is(word)));

        self.unwanted = if image.texts(tags::MODALITY) != ["MR"] {
            Some(LeftAlone::NotMr)
        } else if self.extents.contains(&0) {
            Some(LeftAlone::NoImage)
        } else if is_captured {
            Some(LeftAlone::Capture)
        } else if is("LOCALIZER") || is_localiser {
            Some(LeftAlone::Localiser)
        } else if is_derived {
            Some(LeftAlone::Derived)
        } else if image.whole(tags::SAMPLES_PER_PIXEL).unwrap_or(1) != 1 {
            Some(LeftAlone::Colour)
        } else if image.number(tags::DIFFUSION_B_VALUE).is_some_and(|b| b > 0.0) {
            Some(LeftAlone::Diffusion)
        } else {
            None
        };
        self.unwanted.is_some()
    }
}

/// Third and later values of the image type of images that were computed from another series. That
/// series is usually sent, too.
const DERIVED: [&str; 10] = [
    "MPR",
    "MIP",
    "MINIP",
    "MIN IP",
    "PROJECTION IMAGE",
    "ADC",
    "TRACEW",
    "FA",
    "CPR",
    "SUBTRACTION",
];

/// A data set, read by tag. A value that is missing, empty or of another type is `None`.
pub(super) struct Dataset<'a>(pub(super) &'a InMemDicomObject);

/// Longer texts are cut, characters.
const MAX_TEXT: usize = 256;

impl<'a> Dataset<'a> {
    fn text(&self, tag: Tag) -> Option<String> {
        let text = self.0.get(tag)?.to_str().ok()?;
        let text = text.trim_matches(|c: char| c.is_whitespace() || c == '\0');
        (!text.is_empty()).then(|| text.chars().take(MAX_TEXT).collect())
    }

    fn texts(&self, tag: Tag) -> Vec<String> {
        let texts = self.text(tag).unwrap_or_default();
        let parts = texts.split('\\').map(|part| part.trim().to_uppercase());
        parts.filter(|part| !part.is_empty()).collect()
    }

    fn number(&self, tag: Tag) -> Option<f64> {
        values::first(self.0, tag)
    }

    fn whole(&self, tag: Tag) -> Option<usize> {
        values::whole(self.0, tag).map(|number| number as usize)
    }

    fn items(&self, tag: Tag) -> &'a [InMemDicomObject] {
        self.0.get(tag).and_then(|element| element.items()).unwrap_or_default()
    }

    fn acquisition(&self) -> Acquisition {
        let groups = self.items(tags::SHARED_FUNCTIONAL_GROUPS_SEQUENCE).first();
        let group = |sequence: Tag, tag: Tag| {
            Dataset(Dataset(groups?).items(sequence).first()?).number(tag)
        };
        let loose = |tag: Tag| self.loose()?.number(tag);
        let timing = tags::MR_TIMING_AND_RELATED_PARAMETERS_SEQUENCE;
        let time = |tag: Tag, sequence: Tag, within: Tag| {
            self.number(tag).or_else(|| group(sequence, within)).or_else(|| loose(tag))
        };
        let (echo, inversion) = (tags::MR_ECHO_SEQUENCE, tags::MR_MODIFIER_SEQUENCE);

        Acquisition {
            scanning_sequence: self.scanning_sequence(),
            sequence_variant: self.words(tags::SEQUENCE_VARIANT),
            acquisition_type: self.text(tags::MR_ACQUISITION_TYPE),
            sequence_name: self
                .text(tags::SEQUENCE_NAME)
                .or_else(|| self.text(tags::PULSE_SEQUENCE_NAME)),
            echo_time_ms: time(tags::ECHO_TIME, echo, tags::EFFECTIVE_ECHO_TIME),
            repetition_time_ms: time(tags::REPETITION_TIME, timing, tags::REPETITION_TIME),
            inversion_time_ms: time(tags::INVERSION_TIME, inversion, tags::INVERSION_TIMES),
            description: self.text(tags::SERIES_DESCRIPTION),
            protocol: self.text(tags::PROTOCOL_NAME),
            image_type: self.texts(tags::IMAGE_TYPE),
            echo_train: self.number(tags::ECHO_TRAIN_LENGTH),
            agent: self.agent(),
        }
    }

    /// The fields on a contrast agent. The code of an agent counts like its name.
    fn agent(&self) -> AgentFields {
        let coded = || {
            let item = Dataset(self.items(tags::CONTRAST_BOLUS_AGENT_SEQUENCE).first()?);
            Some(item.text(tags::CODE_MEANING).unwrap_or_else(|| "agent".to_owned()))
        };
        let name = self.text(tags::CONTRAST_BOLUS_AGENT).or_else(coded);
        AgentFields {
            name: name.or_else(|| self.text(tags::CONTRAST_BOLUS_INGREDIENT)),
            volume_ml: self.number(tags::CONTRAST_BOLUS_VOLUME).filter(|&volume| volume > 0.0),
        }
    }

    /// Values for which a converter to enhanced images found no other place.
    fn loose(&self) -> Option<Dataset<'a>> {
        let groups = Dataset(self.items(tags::SHARED_FUNCTIONAL_GROUPS_SEQUENCE).first()?);
        groups.items(tags::UNASSIGNED_SHARED_CONVERTED_ATTRIBUTES_SEQUENCE).first().map(Dataset)
    }

    fn words(&self, tag: Tag) -> Vec<String> {
        let words = self.texts(tag);
        let loose = || self.loose().map(|loose| loose.texts(tag));
        if words.is_empty() { loose().unwrap_or_default() } else { words }
    }

    /// The scanning sequence in the words of single-frame images. Enhanced images use other words
    /// (PS3.3, C.8.13.4).
    fn scanning_sequence(&self) -> Vec<String> {
        let words = self.words(tags::SCANNING_SEQUENCE);
        if !words.is_empty() {
            return words;
        }

        let is = |tag: Tag, word: &str| self.text(tag).is_some_and(|text| text == word);
        let echo = self.text(tags::ECHO_PULSE_SEQUENCE).unwrap_or_default();
        let mut words = Vec::new();
        for (is_so, word) in [
            (echo == "SPIN" || echo == "BOTH", "SE"),
            (echo == "GRADIENT" || echo == "BOTH", "GR"),
            (is(tags::INVERSION_RECOVERY, "YES"), "IR"),
            (is(tags::ECHO_PLANAR_PULSE_SEQUENCE, "YES"), "EP"),
        ] {
            words.extend(is_so.then(|| word.to_owned()));
        }
        words
    }

    fn identifiers(&self) -> DicomFacts {
        let plain = |text: String| text.chars().filter(|c| !c.is_control()).take(64).collect();
        let uid = |tag| self.text(tag).map(plain);
        let both = |day: Tag, time: Tag| {
            Some(format!("{}{}", self.text(day)?, self.text(time).unwrap_or_default()))
        };
        let stated = self
            .text(tags::ACQUISITION_DATE_TIME)
            .or_else(|| both(tags::ACQUISITION_DATE, tags::ACQUISITION_TIME))
            .or_else(|| both(tags::SERIES_DATE, tags::SERIES_TIME));
        DicomFacts {
            study_instance_uid: uid(tags::STUDY_INSTANCE_UID),
            series_instance_uid: uid(tags::SERIES_INSTANCE_UID),
            frame_of_reference_uid: uid(tags::FRAME_OF_REFERENCE_UID),
            acquisition_datetime: stated.as_deref().and_then(iso_8601),
        }
    }

    /// Facts that do not identify a patient: no name, number, date, institution or device number.
    fn facts(&self, image_type: &[String]) -> Map<String, Value> {
        let mut facts = Map::new();
        let mut put = |key: &str, value: Option<Value>| {
            facts.extend(value.map(|value| (key.to_owned(), value)));
        };
        let acquisition = self.acquisition();
        let list = |words: Vec<String>| (!words.is_empty()).then(|| json!(words.join("\\")));
        let text = |tag| self.text(tag).map(Value::from);
        let number = |tag| self.number(tag).map(Value::from);
        // BIDS uses seconds.
        let seconds = |ms: Option<f64>| ms.map(|ms| json!(ms / 1000.0));

        put("Modality", text(tags::MODALITY));
        put("MagneticFieldStrength", number(tags::MAGNETIC_FIELD_STRENGTH));
        put("ImagingFrequency", number(tags::IMAGING_FREQUENCY));
        put("Manufacturer", self.text(tags::MANUFACTURER).map(|name| json!(vendor(&name))));
        put("ManufacturersModelName", text(tags::MANUFACTURER_MODEL_NAME));
        put("SoftwareVersions", text(tags::SOFTWARE_VERSIONS));
        put("BodyPartExamined", text(tags::BODY_PART_EXAMINED));
        put("PatientPosition", text(tags::PATIENT_POSITION));
        put("MRAcquisitionType", acquisition.acquisition_type.map(Value::from));
        put("SeriesDescription", acquisition.description.map(Value::from));
        put("ProtocolName", acquisition.protocol.map(Value::from));
        put("ScanningSequence", list(acquisition.scanning_sequence));
        put("SequenceVariant", list(acquisition.sequence_variant));
        put("ScanOptions", list(self.texts(tags::SCAN_OPTIONS)));
        put("SequenceName", acquisition.sequence_name.map(Value::from));
        put("ImageType", (!image_type.is_empty()).then(|| json!(image_type)));
        put("SeriesNumber", self.number(tags::SERIES_NUMBER).map(|n| json!(n as i64)));
        put("ContrastBolusIngredient", acquisition.agent.name.map(Value::from));
        put("ContrastBolusVolume", acquisition.agent.volume_ml.map(Value::from));
        put("SliceThickness", number(tags::SLICE_THICKNESS));
        put("SpacingBetweenSlices", number(tags::SPACING_BETWEEN_SLICES));
        put("EchoTime", seconds(acquisition.echo_time_ms));
        put("RepetitionTime", seconds(acquisition.repetition_time_ms));
        put("InversionTime", seconds(acquisition.inversion_time_ms.filter(|&ms| ms > 0.0)));
        put("FlipAngle", number(tags::FLIP_ANGLE));
        put("EchoTrainLength", number(tags::ECHO_TRAIN_LENGTH).filter(|n| n != 1.0));
        put("PixelBandwidth", number(tags::PIXEL_BANDWIDTH));
        facts
    }

    /// Refuses pixels that cannot be decoded, before anything is allocated.
    pub(super) fn check_pixels(&self, [columns, rows]: [usize; 2]) -> Result<(), Refusal> {
        let bits = self.whole(tags::BITS_ALLOCATED).unwrap_or(0);
        if !matches!(bits, 8 | 16 | 32) {
            let found = format!("{bits} bits per pixel");
            return refuse(found, "8, 16 or 32", EXPORT_AGAIN);
        }

        let photometric = self.text(tags::PHOTOMETRIC_INTERPRETATION).unwrap_or_default();
        if photometric != "MONOCHROME2" {
            let found = format!("the photometric interpretation {photometric:?}");
            let action = "export the image without changes";
            return Err(Refusal::new(Unsupported, found, "MONOCHROME2", action));
        }

        if columns > 4096 || rows > 4096 {
            let found = format!("{columns} x {rows} pixels");
            return Err(Refusal::new(TooLarge, found, "at most 4096 x 4096", EXPORT_AGAIN));
        }
        Ok(())
    }

    fn frames(&self, extents: [usize; 2], image_type: &[String]) -> Result<Vec<Frame>, Refusal> {
        self.check_pixels(extents)?;
        if image_type.iter().any(|word| word == "MOSAIC") {
            let action = "export the series as single slices, or convert it with dcm2niix";
            let found = "a mosaic: many slices side by side in one image";
            return Err(Refusal::new(Unsupported, found, "one slice per frame", action));
        }

        let shared = self.items(tags::SHARED_FUNCTIONAL_GROUPS_SEQUENCE).first();
        let each = self.items(tags::PER_FRAME_FUNCTIONAL_GROUPS_SEQUENCE);
        let [n_frames] = numbers(&[self.0], tags::NUMBER_OF_FRAMES, tags::NUMBER_OF_FRAMES)?
            .unwrap_or([1.0_f64]);
        // A number that is negative or too large saturates.
        let n_frames = (n_frames as usize).max(1);
        if n_frames > MAX_FRAMES {
            let found = format!("{n_frames} frames");
            let needed = format!("at most {MAX_FRAMES}");
            return Err(Refusal::new(TooLarge, found, needed, EXPORT_AGAIN));
        }

        if each.is_empty() && n_frames == 1 {
            return Ok(vec![self.frame(&[self.0], image_type)?]);
        }
        if each.len() != n_frames {
            return refuse(
                format!("{n_frames} frames, but positions for {}", each.len()),
                "a position for every frame (per-frame functional groups)",
                "export single slices, or the enhanced image without changes",
            );
        }

        let frame = |own| {
            let groups: Vec<&InMemDicomObject> =
                [Some(own), shared].into_iter().flatten().collect();
            self.frame(&groups, image_type)
        };
        each.iter().map(frame).collect()
    }

    /// One frame. A simple image has the values in the data set itself. An enhanced image has them
    /// in the frame's own functional groups or in the shared ones.
    fn frame(&self, groups: &[&InMemDicomObject], image_type: &[String]) -> Result<Frame, Refusal> {
        let needed = "the position of every slice";
        let origin = numbers(groups, tags::PLANE_POSITION_SEQUENCE, tags::IMAGE_POSITION_PATIENT)?
            .ok_or_else(|| missing("ImagePositionPatient", needed))?;
        let needed = "the direction of every slice";
        let stated: [f64; 6] =
            numbers(groups, tags::PLANE_ORIENTATION_SEQUENCE, tags::IMAGE_ORIENTATION_PATIENT)?
                .ok_or_else(|| missing("ImageOrientationPatient", needed))?;
        let [between_rows, between_columns] =
            numbers(groups, tags::PIXEL_MEASURES_SEQUENCE, tags::PIXEL_SPACING)?
                .ok_or_else(|| missing("PixelSpacing", "the size of a pixel"))?;

        // A factor that cannot be read must not count as 1.
        let transform = tags::PIXEL_VALUE_TRANSFORMATION_SEQUENCE;
        let [slope] = numbers(groups, transform, tags::RESCALE_SLOPE)?.unwrap_or([1.0]);
        let [intercept] = numbers(groups, transform, tags::RESCALE_INTERCEPT)?.unwrap_or([0.0]);
        let rescale = [slope, intercept];
        if rescale[0] == 0.0 || !rescale.iter().all(|number| number.is_finite()) {
            let found =
                format!("a rescale slope of {} and intercept of {}", rescale[0], rescale[1]);
            return refuse(found, "finite numbers, the slope not 0", EXPORT_AGAIN);
        }

        let echo: Option<[f64; 1]> =
            numbers(groups, tags::MR_ECHO_SEQUENCE, tags::EFFECTIVE_ECHO_TIME).ok().flatten();
        let echo_time_ms = echo.map(|[time]| time).or_else(|| self.number(tags::ECHO_TIME));

        let component = component(groups, image_type);
        let [along_row, along_column] = at_right_angles(stated)?;
        let plane =
            Plane { origin, along_row, along_column, spacing_mm: [between_columns, between_rows] };
        Ok(Frame { plane, echo_time_ms, component, rescale })
    }
}

/// The directions of rows and columns as unit vectors at right angles.
fn at_right_angles([a, b, c, d, e, f]: [f64; 6]) -> Result<[[f64; 3]; 2], Refusal> {
    directions([a, b, c], [d, e, f]).ok_or_else(|| {
        let found = format!("an ImageOrientationPatient of {a}\\{b}\\{c}\\{d}\\{e}\\{f}");
        Refusal::new(BadHeader, found, "two directions of length 1 at right angles", EXPORT_AGAIN)
    })
}

/// Numbers in a functional group, or in the data set itself. `None` if they are stated nowhere.
///
/// # Errors
/// If they are stated, but not as `N` numbers.
fn numbers<const N: usize>(
    groups: &[&InMemDicomObject],
    sequence: Tag,
    tag: Tag,
) -> Result<Option<[f64; N]>, Refusal> {
    let mut fault = None;
    for group in groups {
        let item = Dataset(group).items(sequence).first();
        for place in item.into_iter().chain([*group]) {
            match values::exactly(place, tag) {
                Ok(None) => {}
                Ok(found) => return Ok(found),
                Err(quoted) => fault = fault.or(Some(quoted)),
            }
        }
    }

    let Some(quoted) = fault else { return Ok(None) };
    let needed =
        if N == 1 { "a decimal number".to_owned() } else { format!("{N} decimal numbers") };
    let action = "correct this element of the header, or export the series with another program";
    refuse(format!("{} {quoted}", values::name(tag)), needed, action)
}

fn missing(name: &str, needed: &str) -> Refusal {
    Refusal::new(BadHeader, format!("no {name}"), needed, EXPORT_AGAIN)
}

fn component(groups: &[&InMemDicomObject], image_type: &[String]) -> Component {
    let of_frame = groups.iter().find_map(|group| {
        let item = Dataset(group).items(tags::MR_IMAGE_FRAME_TYPE_SEQUENCE).first()?;
        Dataset(item).text(tags::COMPLEX_IMAGE_COMPONENT)
    });
    let of_frame = of_frame.unwrap_or_default();
    let is_other =
        ["PHASE", "REAL", "IMAGINARY"].contains(&of_frame.as_str()) || is_no_magnitude(image_type);
    if is_other { Component::Other } else { Component::Magnitude }
}

/// A DICOM date and time (`YYYYMMDDHHMMSS.FFFFFF&ZZXX`, the parts of VR DA and TM joined) as
/// `YYYY-MM-DDTHH:MM:SS`, with the zone if it is stated. Without a time the date alone. Old files
/// have `.` and `:` between the numbers. `None` if it is no date.
fn iso_8601(text: &str) -> Option<String> {
    let text = text.split('\\').next().unwrap_or_default();
    let (clock, zone) = text.split_at(text.find(['+', '-']).unwrap_or(text.len()));
    let digits = |text: &str| text.chars().filter(char::is_ascii_digit).collect::<String>();
    let (clock, offset) = (digits(clock), digits(zone));

    let (year, month, day) = (clock.get(..4)?, clock.get(4..6)?, clock.get(6..8)?);
    let is_within = |part: &str, most: u32| part.parse().is_ok_and(|n| (1..=most).contains(&n));
    if !is_within(month, 12) || !is_within(day, 31) {
        return None;
    }

    let date = format!("{year}-{month}-{day}");
    let Some(time) = clock.get(8..14) else { return Some(date) };
    let time = format!("{}:{}:{}", &time[..2], &time[2..4], &time[4..]);
    let offset = match (zone.get(..1), offset.get(..2), offset.get(2..4)) {
        (Some(sign), Some(hours), Some(minutes)) => format!("{sign}{hours}:{minutes}"),
        _ => String::new(),
    };
    Some(format!("{date}T{time}{offset}"))
}

/// One spelling per vendor, as dcm2niix writes it.
fn vendor(name: &str) -> String {
    let lower = name.to_lowercase();
    let known = [
        ("siemens", "Siemens"),
        ("philips", "Philips"),
        ("ge medical", "GE"),
        ("toshiba", "Toshiba"),
        ("canon", "Canon"),
        ("hitachi", "Hitachi"),
        ("uih", "UIH"),
    ];
    let found = known.into_iter().find(|(start, _)| lower.starts_with(start));
    found.map_or_else(|| name.to_owned(), |(_, name)| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounded_directions_become_unit_vectors_at_right_angles_and_others_are_quoted() {
        let [row, column] = at_right_angles([0.707, 0.707, 0.0, -0.5, 0.5, 0.708]).unwrap();
        let dot = |v: [f64; 3], w: [f64; 3]| v[0] * w[0] + v[1] * w[1] + v[2] * w[2];
        assert!((dot(row, row) - 1.0).abs() < 1e-12 && (dot(column, column) - 1.0).abs() < 1e-12);
        assert!(dot(row, column).abs() < 1e-12);
        for wrong in [[0.0; 6], [1.0, 0.0, 0.0, 1.0, 0.0, 0.0], [1.1, 0.0, 0.0, 0.0, 1.0, 0.0]] {
            let found = at_right_angles(wrong).unwrap_err().found;
            assert!(found.starts_with("an ImageOrientationPatient of "), "{found}");
        }
    }

    #[test]
    fn times_of_headers_are_read_in_each_of_their_spellings() {
        for (text, time) in [
            ("20240102030405.123456", Some("2024-01-02T03:04:05")),
            ("20240102030405+0130", Some("2024-01-02T03:04:05+01:30")),
            ("2024.01.0203:04:05", Some("2024-01-02T03:04:05")),
            ("20240102", Some("2024-01-02")),
            ("202401020304", Some("2024-01-02")),
            ("20241302", None),
            ("ROE^RITA", None),
            ("2024", None),
            ("", None),
        ] {
            assert_eq!(iso_8601(text).as_deref(), time, "{text}");
        }
    }
}
