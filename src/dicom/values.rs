//! Numbers of a header, in whatever form they are stored.
//!
//! Exports through other systems store decimal texts as texts of other kinds, as binary numbers, or
//! with decimal commas. What is unambiguous is read. What is not is quoted in the refusal.

use dicom_core::{
    PrimitiveValue, Tag,
    dictionary::{DataDictionary, DataDictionaryEntry},
};
use dicom_dictionary_std::StandardDataDictionary;
use dicom_object::{InMemDicomObject, mem::InMemElement};

/// Longer quotes are cut, characters.
const MAX_QUOTE: usize = 40;

/// The numbers of an element. `None` if it is absent or empty.
///
/// # Errors
/// The value, quoted, if it is not a list of finite numbers.
pub(super) fn numbers(object: &InMemDicomObject, tag: Tag) -> Result<Option<Vec<f64>>, String> {
    let Some(element) = object.get(tag) else { return Ok(None) };
    let Some(value) = element.value().primitive() else { return Err(quote(element)) };
    let numbers = match text(value) {
        Some(text) => {
            let text = trim_end(&text);
            if trim(text).is_empty() {
                return Ok(None);
            }
            text.split('\\').map(number).collect()
        }
        None => value.to_multi_float64().ok(),
    };
    let numbers: Option<Vec<f64>> =
        numbers.filter(|numbers: &Vec<f64>| numbers.iter().all(|number| number.is_finite()));
    match numbers {
        Some(numbers) if numbers.is_empty() => Ok(None),
        Some(numbers) => Ok(Some(numbers)),
        None => Err(quote(element)),
    }
}

/// The first number of an element. `None` if there is none.
pub(super) fn first(object: &InMemDicomObject, tag: Tag) -> Option<f64> {
    numbers(object, tag).ok()??.first().copied()
}

/// The first number of an element as a count. `None` if it is no whole number from 0.
pub(super) fn whole(object: &InMemDicomObject, tag: Tag) -> Option<u32> {
    let number = first(object, tag)?;
    (number.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(&number))
        .then_some(number as u32)
}

/// The numbers of an element that has `N` of them. `None` if it is absent or empty.
///
/// # Errors
/// The value, quoted, if it is anything else.
pub(super) fn exactly<const N: usize>(
    object: &InMemDicomObject,
    tag: Tag,
) -> Result<Option<[f64; N]>, String> {
    let Some(found) = numbers(object, tag)? else { return Ok(None) };
    let quoted = || object.get(tag).map(quote).unwrap_or_default();
    found.try_into().map(Some).map_err(|_| quoted())
}

/// The name of an element in the standard, or its tag.
pub(super) fn name(tag: Tag) -> String {
    let entry = StandardDataDictionary.by_tag(tag);
    entry.map_or_else(|| tag.to_string(), |entry| entry.alias().to_owned())
}

/// The value as found, shortened, without control characters.
fn quote(element: &InMemElement) -> String {
    let value = element.value().primitive();
    let whole = match value {
        Some(value) => text(value).unwrap_or_else(|| value.to_str().into_owned()),
        None => "a sequence".to_owned(),
    };
    let quoted: String = trim(&whole).chars().filter(|c| !c.is_control()).take(MAX_QUOTE).collect();
    format!("\"{quoted}\"")
}

/// The text of a value, if it is no list of binary numbers.
fn text(value: &PrimitiveValue) -> Option<String> {
    match value {
        PrimitiveValue::Empty => Some(String::new()),
        PrimitiveValue::Str(text) => Some(text.clone()),
        PrimitiveValue::Strs(texts) => Some(texts.join("\\")),
        // Bytes of an unknown kind.
        PrimitiveValue::U8(bytes) => Some(String::from_utf8_lossy(bytes).into_owned()),
        _ => None,
    }
}

fn is_padding(c: char) -> bool {
    c.is_whitespace() || c == '\0'
}

fn trim(text: &str) -> &str {
    text.trim_matches(is_padding)
}

/// Without padding and without empty values at the end.
fn trim_end(text: &str) -> &str {
    text.trim_end_matches(|c| is_padding(c) || c == '\\')
}

/// A number of decimal text. One comma without a point is a decimal comma: decimal texts have no
/// other separators.
fn number(text: &str) -> Option<f64> {
    let text = trim(text);
    let is_decimal = |c: char| c.is_ascii_digit() || "+-.,eE".contains(c);
    if !text.chars().all(is_decimal) {
        return None;
    }
    match text.matches(',').count() {
        0 => text.parse().ok(),
        1 if !text.contains('.') => text.replace(',', ".").parse().ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use dicom_core::{DataElement, VR, dicom_value};
    use dicom_dictionary_std::tags::PIXEL_SPACING;

    use super::*;

    fn read(vr: VR, value: PrimitiveValue) -> Result<Option<Vec<f64>>, String> {
        let element = DataElement::new(PIXEL_SPACING, vr, value);
        numbers(&InMemDicomObject::from_element_iter([element]), PIXEL_SPACING)
    }

    fn of_text(text: &str) -> Result<Option<Vec<f64>>, String> {
        read(VR::UT, PrimitiveValue::Str(text.to_owned()))
    }

    #[test]
    fn numbers_are_read_from_texts_and_from_binary_values_of_every_kind() {
        let wanted = Ok(Some(vec![0.5, 1.0]));
        for text in [
            "0.5\\1",
            "0,5\\1,0",
            " 0.5 \\ 1 ",
            "5.0E-01\\+1.0E+00",
            ".5\\1.\0",
            "0.5\\1\\",
            "5e-1\\01",
        ] {
            assert_eq!(of_text(text), wanted, "{text}");
            let bytes = PrimitiveValue::from(text.as_bytes());
            assert_eq!(read(VR::UN, bytes), wanted, "{text}");
        }
        assert_eq!(read(VR::DS, dicom_value!(Strs, ["0.5 ", "1"])), wanted);
        assert_eq!(read(VR::FD, dicom_value!(F64, [0.5, 1.0])), wanted);
        assert_eq!(read(VR::FL, dicom_value!(F32, [0.5, 1.0])), wanted);
        assert_eq!(read(VR::US, dicom_value!(U16, [3])), Ok(Some(vec![3.0])));
    }

    #[test]
    fn an_empty_value_is_absent_and_what_is_no_number_is_quoted() {
        for text in ["", "  ", "\0\0", "\\"] {
            assert_eq!(of_text(text), Ok(None), "{text:?}");
        }
        let long = "x".repeat(99);
        for (text, quoted) in [
            ("0.5,1.0", "\"0.5,1.0\""),
            ("0,5,1", "\"0,5,1\""),
            ("0.5 mm", "\"0.5 mm\""),
            ("0.5\\\\1", "\"0.5\\\\1\""),
            ("NaN\\inf", "\"NaN\\inf\""),
            ("1e999", "\"1e999\""),
            ("a\n\x1bb", "\"ab\""),
            (&long, &format!("\"{}\"", "x".repeat(40))),
        ] {
            assert_eq!(of_text(text).unwrap_err(), quoted, "{text:?}");
        }
        assert!(read(VR::FD, dicom_value!(F64, [f64::NAN])).is_err());
    }
}
