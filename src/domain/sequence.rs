//! Which BIDS suffix a series gets. Its header's description of the sequence decides.
//!
//! The rules are cautious on purpose. A scan in the wrong cohort is compared with the wrong kind of
//! image and spoils the scores there. A scan called `unknown` only waits in a cohort of its own. So
//! the timing of the sequence and the words of its name must agree, else the suffix is `unknown`.
//! Limits in ms are those of textbooks, widened for 1.5 and 3 T; docs/preprocessing.md lists them.

use super::cohort::UNKNOWN;

/// What a header says of the sequence. Lists and words as in DICOM, upper case; times in ms.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Acquisition {
    /// `SE`, `IR`, `GR`, `EP`, `RM` (0018,0020).
    pub scanning_sequence: Vec<String>,
    /// `MP` is magnetisation prepared, `TOF` time of flight (0018,0021).
    pub sequence_variant: Vec<String>,
    /// `2D` or `3D` (0018,0023).
    pub acquisition_type: Option<String>,
    /// Vendor's name of the sequence (0018,0024).
    pub sequence_name: Option<String>,
    /// Echo time.
    pub echo_time_ms: Option<f64>,
    /// Repetition time.
    pub repetition_time_ms: Option<f64>,
    /// Inversion time.
    pub inversion_time_ms: Option<f64>,
    /// What a technician called the series (0008,103E).
    pub description: Option<String>,
    /// Name of the protocol (0018,1030).
    pub protocol: Option<String>,
    /// Whether a contrast agent is named (0018,0010).
    pub has_agent: bool,
}

/// Words of series that are no structural image, or of a kind without a rule.
const OTHER: [&str; 27] = [
    "dwi",
    "dti",
    "diff",
    "diffusion",
    "adc",
    "trace",
    "tracew",
    "asl",
    "perf",
    "perfusion",
    "bold",
    "fmri",
    "epi",
    "fieldmap",
    "mip",
    "minip",
    "mpr",
    "phase",
    "stir",
    "psir",
    "dir",
    "mp2rage",
    "inv1",
    "inv2",
    "uni",
    "ciss",
    "fiesta",
];

const ANGIOGRAPHY: [&str; 4] = ["tof", "mra", "angio", "angiography"];
const SUSCEPTIBILITY: [&str; 4] = ["swi", "swan", "swip", "venobold"];
const T2_STAR: [&str; 5] = ["t2star", "t2s", "hemo", "haemo", "medic"];
const T1: [&str; 14] = [
    "t1", "t1w", "mprage", "mpr1", "tfl", "tfl3d1", "spgr", "fspgr", "bravo", "mprg", "t1tfe",
    "flash", "t1ffe", "ffe3d",
];
const T2: [&str; 4] = ["t2", "t2w", "t2tse", "t2fse"];
const PROTON: [&str; 3] = ["pd", "pdw", "proton"];
const AFTER_CONTRAST: [&str; 10] =
    ["gd", "gad", "gado", "post", "contrast", "ce", "km", "postgd", "cont", "enhanced"];

/// Words that reverse the ones above: "T1 without contrast", "pre gd".
const BEFORE_CONTRAST: [&str; 5] = ["without", "wo", "pre", "non", "native"];

/// What a name or a timing suggests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hint {
    /// The suffix of one kind of image.
    Kind(&'static str),
    /// A kind without a rule.
    Other,
    /// It does not decide.
    Open,
}

/// The BIDS suffix (`T1w`, `T2w`, `FLAIR`, ...), or [`UNKNOWN`].
pub fn bids_suffix(acquisition: &Acquisition) -> &'static str {
    let words = words(acquisition);
    let named = by_name(&words);
    let kind = match (by_timing(acquisition), named) {
        (Hint::Other, _) | (_, Hint::Other) => UNKNOWN,
        (Hint::Kind(timed), Hint::Kind(named)) if timed != named => UNKNOWN,
        (Hint::Kind(kind), _) | (Hint::Open, Hint::Kind(kind)) => kind,
        (Hint::Open, Hint::Open) => UNKNOWN,
    };

    let is_after_contrast = acquisition.has_agent
        || (has_any(&words, &AFTER_CONTRAST) && !has_any(&words, &BEFORE_CONTRAST));

    match (kind, is_after_contrast) {
        ("T1w", true) => "T1ce",
        (kind, _) => kind,
    }
}

/// Lower-case words of the names. Signs separate words, except in `+c`, `w/o` and `t2*`, where they
/// have a meaning.
fn words(acquisition: &Acquisition) -> Vec<String> {
    let names = [&acquisition.description, &acquisition.protocol, &acquisition.sequence_name];
    let text: Vec<String> = names.into_iter().flatten().map(|name| name.to_lowercase()).collect();
    let text = text.join(" ").replace("t2*", "t2star").replace("w/o", " without ");
    let pieces = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '+');
    // "+c" means contrast, but "sag+cor" does not.
    let of_sum = |(index, part)| if index > 0 && part == "c" { "contrast" } else { part };
    let parts = pieces.flat_map(|piece| piece.split('+').enumerate().map(of_sum));
    parts.filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

fn has_any(words: &[String], wanted: &[&str]) -> bool {
    words.iter().any(|word| wanted.contains(&word.as_str()))
}

fn by_name(words: &[String]) -> Hint {
    let is_flair = words.iter().any(|word| word.contains("flair"));
    let is_t1 = has_any(words, &T1);
    let is_t2 = has_any(words, &T2);

    if has_any(words, &OTHER) {
        return Hint::Other;
    }

    // The rarer kinds first: a "t2 swi" is a swi, and a "t1 flair" a T1 image.
    let kinds = [
        (has_any(words, &ANGIOGRAPHY), "angio"),
        (has_any(words, &SUSCEPTIBILITY), "swi"),
        (has_any(words, &T2_STAR), "T2star"),
        (is_flair && !is_t1, "FLAIR"),
        (is_t1 && !is_t2, "T1w"),
        (is_t2 && !is_t1 && !has_any(words, &PROTON), "T2w"),
        (has_any(words, &PROTON) && !is_t1 && !is_t2, "PDw"),
    ];
    kinds.into_iter().find(|(is_so, _)| *is_so).map_or(Hint::Open, |(_, kind)| Hint::Kind(kind))
}

/// What the timing suggests. Gradient echoes without preparation have the same timing in T1 images,
/// angiographies and susceptibility images, so that the name decides.
fn by_timing(acquisition: &Acquisition) -> Hint {
    let is = |code: &str| acquisition.scanning_sequence.iter().any(|have| have == code);
    let is_variant = |code: &str| acquisition.sequence_variant.iter().any(|have| have == code);

    let (Some(echo), Some(repetition)) = (acquisition.echo_time_ms, acquisition.repetition_time_ms)
    else {
        return Hint::Open;
    };
    let inversion = acquisition.inversion_time_ms.filter(|&time| time > 0.0);

    if is("EP") {
        return Hint::Other;
    }

    if is("GR") {
        let is_prepared = is("IR") || is_variant("MP") || inversion.is_some();
        return match is_prepared && !is_variant("TOF") && echo <= 10.0 {
            true if inversion.is_none_or(|time| (300.0..=1400.0).contains(&time)) => {
                Hint::Kind("T1w")
            }
            true => Hint::Other,
            false => Hint::Open,
        };
    }

    if !is("SE") && !is("IR") {
        return Hint::Open;
    }

    match (inversion, echo, repetition) {
        (Some(1500.0..), 60.0.., 4000.0..) => Hint::Kind("FLAIR"),
        (Some(500.0..=1400.0), ..=40.0, ..=3500.0) => Hint::Kind("T1w"),
        (Some(_), ..) => Hint::Other,
        // The inversion time is missing: the name must say whether it is a FLAIR.
        (None, ..) if is("IR") => Hint::Open,
        (None, ..=40.0, ..=1200.0) => Hint::Kind("T1w"),
        // A FLAIR whose header omits the inversion looks the same; its name decides.
        (None, 60.0.., 2000.0..) => Hint::Kind("T2w"),
        (None, ..=40.0, 1800.0..) => Hint::Kind("PDw"),
        _ => Hint::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sequence, variant, name, TE, TR, TI.
    fn suffix(
        sequence: &str,
        variant: &str,
        name: &str,
        times: (f64, f64, Option<f64>),
    ) -> &'static str {
        let list = |codes: &str| codes.split('\\').map(str::to_owned).collect();
        bids_suffix(&Acquisition {
            scanning_sequence: list(sequence),
            sequence_variant: list(variant),
            description: Some(name.to_owned()),
            echo_time_ms: Some(times.0),
            repetition_time_ms: Some(times.1),
            inversion_time_ms: times.2,
            ..Acquisition::default()
        })
    }

    #[test]
    fn usual_protocols_get_their_suffix() {
        for (sequence, variant, name, times, wanted) in [
            ("GR\\IR", "SK\\SP\\MP", "SAG MPRAGE 220 FOV", (2.52, 2000.0, Some(900.0)), "T1w"),
            ("GR\\IR", "SK\\SP\\MP", "series 5", (2.52, 2000.0, Some(900.0)), "T1w"),
            ("GR", "SS\\SP", "Ax 3D BRAVO", (3.2, 8.2, Some(450.0)), "T1w"),
            ("GR", "SP", "t1_fl3d_tra", (4.8, 11.0, None), "T1w"),
            ("SE", "SP\\OSP", "t1_se_tra", (12.0, 550.0, None), "T1w"),
            ("SE\\IR", "SK", "Ax T1 FLAIR", (24.0, 2200.0, Some(860.0)), "T1w"),
            (
                "SE\\IR",
                "SK\\SP\\MP",
                "t2_space_dark-fluid flair",
                (388.0, 5000.0, Some(1800.0)),
                "FLAIR",
            ),
            ("SE\\IR", "SK", "eD_TIRM dark fluid", (90.0, 9000.0, Some(2500.0)), "FLAIR"),
            ("IR", "SK", "FLAIR", (120.0, 9000.0, None), "FLAIR"),
            ("SE", "SK\\SP", "t2_tse_tra", (100.0, 5000.0, None), "T2w"),
            ("SE", "SK", "axial", (90.0, 4500.0, None), "T2w"),
            ("SE", "SK", "PD tse", (15.0, 3000.0, None), "PDw"),
            ("GR", "SP", "Mag SWI Images", (20.0, 28.0, None), "swi"),
            ("GR", "SP", "t2*_fl2d_hemo", (20.0, 700.0, None), "T2star"),
            ("GR", "SP", "TOF_3D_multi-slab", (3.7, 22.0, None), "angio"),
            ("SE", "SP", "T1 SE post Gd", (12.0, 550.0, None), "T1ce"),
        ] {
            assert_eq!(suffix(sequence, variant, name, times), wanted, "{name}");
        }
    }

    #[test]
    fn what_contradicts_itself_or_fits_no_rule_is_unknown() {
        for (sequence, variant, name, times) in [
            // The name says FLAIR, nothing in the timing inverts.
            ("SE", "SK", "FLAIR", (100.0, 5000.0, None)),
            ("SE", "SP", "t2_tse", (12.0, 550.0, None)),
            ("SE\\IR", "SK", "stir cor", (60.0, 4000.0, Some(180.0))),
            ("GR", "SP", "3d volume", (4.0, 20.0, None)),
            ("EP", "SK", "ep2d_diff", (90.0, 5000.0, None)),
            ("GR\\IR", "SP\\MP", "mp2rage INV2", (2.9, 5000.0, Some(2500.0))),
            ("SE", "SK", "t1 and t2", (50.0, 1500.0, None)),
        ] {
            assert_eq!(suffix(sequence, variant, name, times), UNKNOWN, "{name}");
        }
        assert_eq!(bids_suffix(&Acquisition::default()), UNKNOWN);
    }

    #[test]
    fn a_contrast_agent_makes_a_cohort_of_its_own() {
        let plain = Acquisition {
            scanning_sequence: vec!["SE".to_owned()],
            echo_time_ms: Some(12.0),
            repetition_time_ms: Some(500.0),
            ..Acquisition::default()
        };
        assert_eq!(bids_suffix(&plain), "T1w");
        let named = |name: &str| {
            bids_suffix(&Acquisition { description: Some(name.to_owned()), ..plain.clone() })
        };
        assert_eq!(named("AX T1 +C"), "T1ce");
        assert_eq!(named("T1+C_fs"), "T1ce");
        assert_eq!(named("T1 sag+cor"), "T1w");
        assert_eq!(named("AX T1 W/O CONTRAST"), "T1w");
        assert_eq!(bids_suffix(&Acquisition { has_agent: true, ..plain }), "T1ce");
    }

    #[test]
    fn without_timing_the_name_alone_decides() {
        let named = |name: &str| {
            bids_suffix(&Acquisition { protocol: Some(name.to_owned()), ..Acquisition::default() })
        };
        assert_eq!(named("T2_FLAIR"), "FLAIR");
        assert_eq!(named("t1 mprage"), "T1w");
        assert_eq!(named("brain"), UNKNOWN);
    }
}
