//! What the physics of the sequence suggest: technique, times, image type.

use super::values::{Acquisition, Hint};

/// Gradient echoes without preparation have the same timing in T1 images, angiographies and
/// susceptibility images, so that the name decides among those that the echo time allows.
const SHORT_GRADIENT_ECHO: [&str; 3] = ["T1w", "angio", "PDw"];
const MIDDLE_GRADIENT_ECHO: [&str; 5] = ["T1w", "angio", "PDw", "T2star", "swi"];
/// The name may also say T2: technicians call these images "T2 GRE".
pub(super) const LONG_GRADIENT_ECHO: [&str; 2] = ["T2star", "swi"];

/// What a short or a long echo allows where the header does not say how the echo is made.
const SHORT_ECHO: [&str; 5] = ["T1w", "PDw", "angio", "T2star", "swi"];
const LONG_ECHO: [&str; 3] = ["T2w", "FLAIR", "T2star"];

/// Echoes after one excitation in 2D from which a sequence is single-shot, such as HASTE. Its
/// contrast is not that of other T2 images.
const SINGLE_SHOT: f64 = 100.0;

/// Words of the image type of maps, projections, and of kinds without a rule.
const OTHER_IMAGES: [&str; 29] = [
    "MAP",
    "T1 MAP",
    "T2 MAP",
    "T2_STAR MAP",
    "T2 STAR MAP",
    "B0 MAP",
    "FIELD MAP",
    "FIELDMAP",
    "MPR",
    "MIP",
    "MNIP",
    "MINIP",
    "MIN IP",
    "PROJECTION IMAGE",
    "ADC",
    "FA",
    "TRACEW",
    "DIFFUSION",
    "ASL",
    "PERFUSION",
    "FMRI",
    "CBF",
    "UNI",
    "SUBTRACTION",
    "FAT",
    "F",
    "OPP_PHASE",
    "OUT_PHASE",
    "FAT_FRACTION",
];

/// What technique, times and image type suggest.
pub(super) fn by_timing(acquisition: &Acquisition) -> Hint {
    let is_image = |wanted: &str| acquisition.image_type.iter().skip(2).any(|word| word == wanted);
    let is = |code: &str| acquisition.scanning_sequence.iter().any(|have| have == code);

    if OTHER_IMAGES.iter().any(|word| is_image(word)) {
        return Hint::Other("the image type says a map, a projection or another part");
    }
    if is("EP") {
        return Hint::Other("it is echo-planar");
    }
    if is_image("SWI") {
        return Hint::Kind("swi");
    }

    let (Some(echo), Some(repetition)) = (acquisition.echo_time_ms, acquisition.repetition_time_ms)
    else {
        return Hint::Open;
    };
    let inversion = acquisition.inversion_time_ms.filter(|&time| time > 0.0);

    if is("GR") && !is("SE") {
        return gradient_echo(acquisition, echo, repetition, inversion);
    }
    if is("SE") || is("IR") {
        let is_2d = acquisition.acquisition_type.as_deref() == Some("2D");
        if is_2d && acquisition.echo_train.is_some_and(|n_echoes| n_echoes >= SINGLE_SHOT) {
            return Hint::Other("it is a single-shot sequence");
        }
        return spin_echo(is("IR"), echo, repetition, inversion);
    }

    match (inversion, echo, repetition) {
        (Some(1500.0..=3000.0), 60.0.., 4000.0..) => Hint::Kind("FLAIR"),
        (_, ..=40.0, _) => Hint::OneOf(&SHORT_ECHO),
        _ => Hint::OneOf(&LONG_ECHO),
    }
}

fn gradient_echo(
    acquisition: &Acquisition,
    echo: f64,
    repetition: f64,
    inversion: Option<f64>,
) -> Hint {
    let has = |list: &[String], code: &str| list.iter().any(|have| have == code);
    let is_variant = |code: &str| has(&acquisition.sequence_variant, code);
    let is_prepared =
        has(&acquisition.scanning_sequence, "IR") || is_variant("MP") || inversion.is_some();

    if is_prepared && !is_variant("TOF") && echo <= 10.0 {
        return match inversion {
            // MP2RAGE repeats after 5 s and more.
            _ if repetition > 4000.0 => Hint::Other("its times are those of no MPRAGE"),
            None | Some(300.0..=1400.0) => Hint::Kind("T1w"),
            // The time of a fat suppression, or counted in another way.
            Some(..300.0) => Hint::OneOf(&["T1w"]),
            Some(_) => Hint::Other("its times are those of no MPRAGE"),
        };
    }

    match echo {
        ..7.0 => Hint::OneOf(&SHORT_GRADIENT_ECHO),
        ..=15.0 => Hint::OneOf(&MIDDLE_GRADIENT_ECHO),
        _ => Hint::OneOf(&LONG_GRADIENT_ECHO),
    }
}

fn spin_echo(is_inverted: bool, echo: f64, repetition: f64, inversion: Option<f64>) -> Hint {
    match (inversion, echo, repetition) {
        (Some(1500.0..=3000.0), 60.0.., 4000.0..) => Hint::Kind("FLAIR"),
        (Some(500.0..=1400.0), ..=40.0, ..=3500.0) => Hint::Kind("T1w"),
        (Some(..300.0), ..) => Hint::Other("its inversion time is that of a STIR"),
        (Some(_), ..) => Hint::Other("its inversion time is that of no T1 and of no FLAIR"),

        // The inversion time is missing: the name must say whether it is a FLAIR.
        (None, 60.0.., 4000.0..) if is_inverted => Hint::OneOf(&["FLAIR"]),
        (None, ..=40.0, ..=3500.0) if is_inverted => Hint::OneOf(&["T1w"]),
        (None, ..) if is_inverted => Hint::Other("its inversion time is missing"),

        (None, ..=40.0, ..=1200.0) => Hint::Kind("T1w"),
        (None, ..=25.0, ..1800.0) => Hint::OneOf(&["T1w"]),
        // A FLAIR whose header omits the inversion looks the same; its name contradicts.
        (None, 60.0.., 2000.0..) => Hint::Kind("T2w"),
        (None, ..=40.0, 1800.0..) => Hint::Kind("PDw"),
        (None, _, 2000.0..) => Hint::OneOf(&["T2w", "PDw"]),
        _ => Hint::Other("its echo and repetition times lie between those of the kinds"),
    }
}
