//! Which BIDS suffix a series gets. Physics first, words second.
//!
//! Where technique and times leave one kind of image, they decide, and a word that says nothing
//! does not matter. Where they leave several, the words of the names decide among them. Where both
//! speak and disagree, the suffix is `unknown`.
//!
//! The rules are cautious on purpose. A scan in the wrong cohort is compared with the wrong kind of
//! image and spoils the scores there. A scan called `unknown` only waits in a cohort of its own.
//! Limits in ms are those of textbooks, widened for 0.3 to 7 T; docs/preprocessing.md lists them.
//! `tests/fixtures/sequences.tsv` has two hundred series with the right answers.

mod agent;
mod timing;
mod values;
mod words;

use super::acquisition::UNKNOWN;
use agent::{Agent, agent};
use timing::{LONG_GRADIENT_ECHO, by_timing};
use values::Hint;
pub use values::{Acquisition, AgentFields, is_no_magnitude};
use words::{by_name, words};

/// Suffixes that a sequence can be judged to have.
pub const KINDS: [&str; 8] = ["T1w", "T1ce", "T2w", "FLAIR", "PDw", "T2star", "swi", "angio"];

/// What is thought of a sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judgement {
    /// The BIDS suffix (`T1w`, `T2w`, `FLAIR`, ...), or [`UNKNOWN`].
    pub suffix: &'static str,
    /// Why the suffix is [`UNKNOWN`]. Quotes no text of the header, which may name a patient.
    pub doubt: Option<String>,
}

/// The BIDS suffix of a sequence, or [`UNKNOWN`].
pub fn bids_suffix(acquisition: &Acquisition) -> &'static str {
    judge(acquisition).suffix
}

/// Decides which suffix a sequence gets, and says why where it gets none.
pub fn judge(acquisition: &Acquisition) -> Judgement {
    let kind = match kind(acquisition) {
        Ok(kind) => kind,
        Err(doubt) => return Judgement { suffix: UNKNOWN, doubt: Some(doubt) },
    };
    if kind != "T1w" {
        return Judgement { suffix: kind, doubt: None };
    }

    let Acquisition { description, protocol, agent: fields, .. } = acquisition;
    let (description, protocol) = (description.as_deref(), protocol.as_deref());
    let is_of_series = protocol.is_some_and(|name| by_name(&words(name), false) != Hint::Open);
    match agent(fields, description, protocol, is_of_series) {
        Agent::Given => Judgement { suffix: "T1ce", doubt: None },
        Agent::Silent | Agent::Withheld => Judgement { suffix: kind, doubt: None },
        Agent::Contradicted => Judgement {
            suffix: UNKNOWN,
            doubt: Some(
                "it is a T1, but header, description and protocol contradict one another about a \
                 contrast agent"
                    .to_owned(),
            ),
        },
    }
}

/// The kind of image, whatever was injected; or why it stays open.
fn kind(acquisition: &Acquisition) -> Result<&'static str, String> {
    let timing = by_timing(acquisition);
    let named = named(acquisition, timing);
    let one_of = |kinds: &[&str]| kinds.join(", ");

    match (timing, named) {
        (Hint::Other(cause), _) | (_, Hint::Other(cause)) => Err(cause.to_owned()),

        // A FLAIR is T2-weighted, and "t2_tirm" is one by its inversion time.
        (Hint::Kind("FLAIR"), Hint::Kind("T2w")) => Ok("FLAIR"),
        (Hint::OneOf(kinds), Hint::Kind("T2w")) if kinds == LONG_GRADIENT_ECHO => Ok("T2star"),

        (Hint::Kind(timed), Hint::Kind(named)) if timed != named => {
            Err(format!("its times are those of {timed}, and its name says {named}"))
        }
        (Hint::OneOf(kinds), Hint::Kind(named)) if !kinds.contains(&named) => {
            Err(format!("its times fit {}, and its name says {named}", one_of(kinds)))
        }
        (Hint::Kind(kind), _) | (Hint::OneOf(_) | Hint::Open, Hint::Kind(kind)) => Ok(kind),
        (Hint::OneOf(kinds), _) => {
            Err(format!("its times fit {}, and its name does not say which", one_of(kinds)))
        }
        (Hint::Open, _) => Err("neither its times nor its name say".to_owned()),
    }
}

/// What the names suggest: the description first, then protocol and vendor's name. A word for
/// another kind in the protocol counts, too, unless times and description agree.
fn named(acquisition: &Acquisition, timing: Hint) -> Hint {
    let Acquisition { description, protocol, sequence_name, image_type, .. } = acquisition;
    let mpr_is_reformat = match image_type.first().map(String::as_str) {
        Some("ORIGINAL") => false,
        Some("DERIVED") => true,
        _ => timing != Hint::Kind("T1w"),
    };
    let description = words(description.as_deref().unwrap_or_default());
    let others: Vec<String> =
        [protocol, sequence_name].into_iter().flatten().flat_map(|name| words(name)).collect();
    let rest = by_name(&others, mpr_is_reformat);

    // The images that a susceptibility image was computed from. They lack the weight of the phase.
    let is_magnitude = timing != Hint::Kind("swi")
        && description.iter().any(|word| ["mag", "magnitude"].contains(&word.as_str()));

    match (by_name(&description, mpr_is_reformat), rest) {
        (Hint::Kind(kind), Hint::Other(cause)) if timing != Hint::Kind(kind) => Hint::Other(cause),
        (Hint::Open, Hint::Kind("swi")) | (Hint::Kind("swi"), _) if is_magnitude => {
            Hint::Other("it is the magnitude image of a susceptibility sequence")
        }
        (Hint::Open, rest) => rest,
        (described, _) => described,
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
            ("GR", "SP", "SWI Images", (20.0, 28.0, None), "swi"),
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
            ("GR", "SP", "Mag SWI Images", (20.0, 28.0, None)),
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
        let agent = AgentFields { name: Some("Dotarem".to_owned()), volume_ml: None };
        assert_eq!(bids_suffix(&Acquisition { agent, ..plain }), "T1ce");
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

    /// A row of the table: the right suffix, and the series.
    fn series(row: &str) -> (&str, Acquisition) {
        let fields: Vec<&str> = row.split('\t').collect();
        let [suffix, _, sequence, variant, tr, te, ti, dims, train, image, agent, series, protocol] =
            fields[..]
        else {
            panic!("13 columns are needed: {row}")
        };
        let text = |field: &str| (field != "-").then(|| field.to_owned());
        let number = |field: &str| text(field).map(|number| number.parse().unwrap());
        let list = |field: &str| {
            let words = text(field).unwrap_or_default();
            let words = words.split('\\').filter(|word| !word.is_empty());
            words.map(str::to_owned).collect()
        };
        let acquisition = Acquisition {
            scanning_sequence: list(sequence),
            sequence_variant: list(variant),
            image_type: list(image),
            acquisition_type: text(dims),
            sequence_name: None,
            echo_time_ms: number(te),
            repetition_time_ms: number(tr),
            inversion_time_ms: number(ti),
            echo_train: number(train),
            description: text(series),
            protocol: text(protocol),
            agent: AgentFields { name: text(agent), volume_ml: None },
        };
        (suffix, acquisition)
    }

    #[test]
    fn two_hundred_series_of_the_world_get_the_suffix_that_a_technologist_would_give() {
        let table = include_str!("../../tests/fixtures/sequences.tsv");
        let rows: Vec<&str> = table.lines().filter(|row| !row.starts_with('#')).collect();
        let wrong = |row: &&str| {
            let (suffix, acquisition) = series(row);
            let Judgement { suffix: found, doubt } = judge(&acquisition);
            assert_eq!(found == UNKNOWN, doubt.is_some(), "a doubt has a cause: {row}");
            (found != suffix).then(|| format!("{found} ({}): {row}", doubt.unwrap_or_default()))
        };
        let wrong: Vec<String> = rows.iter().filter_map(wrong).collect();
        assert!(rows.len() >= 200, "{} rows", rows.len());
        assert!(wrong.is_empty(), "{} of {} rows:\n{}", wrong.len(), rows.len(), wrong.join("\n"));
    }
}
