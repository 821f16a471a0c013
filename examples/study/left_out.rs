//! Each source of scans with lesions is left out in turn: which variant is best on the others, and
//! what does it reach on this one?

use std::collections::{BTreeMap, BTreeSet};

use oddscan::numeric::evaluation::{mean, sources::source_of};

use crate::figures::Outcome;

/// What the other sources would have chosen for one source, by mean average precision.
pub(crate) struct LeftOut<'a> {
    pub(crate) source: &'a str,
    /// `None` if there is no other source.
    pub(crate) best: Option<Best<'a>>,
    /// What the default reaches on the source.
    pub(crate) default_here: f64,
}

/// The variant that is best on the other sources.
pub(crate) struct Best<'a> {
    pub(crate) name: &'a str,
    /// What it reaches on the others.
    pub(crate) elsewhere: f64,
    /// What it reaches on the source left out.
    pub(crate) here: f64,
}

/// Leaves out each source of the outcomes. Each window counts alike. Variants that a window was not
/// scored with are no candidates. Of equal variants the default is the best, or else the first by
/// name. Empty if the default was not scored.
pub(crate) fn left_out<'a>(outcomes: &[&'a Outcome], default: &str) -> Vec<LeftOut<'a>> {
    let mut by_name: BTreeMap<&str, Vec<&Outcome>> = BTreeMap::new();
    for outcome in outcomes {
        by_name.entry(&outcome.variant.name).or_default().push(outcome);
    }
    let n_windows = by_name.values().map(Vec::len).max().unwrap_or(0);
    by_name.retain(|_, windows| windows.len() == n_windows);
    let Some((default, windows)) = by_name.get_key_value(default) else { return Vec::new() };

    let row = |source: &'a str| {
        let others = |name: &str| precision(&by_name[name], |other| other != source);
        let mut best = others(default).map(|elsewhere| (*default, elsewhere));
        for &name in by_name.keys() {
            let elsewhere = others(name);
            if elsewhere > best.map(|(_, elsewhere)| elsewhere) {
                best = elsewhere.map(|elsewhere| (name, elsewhere));
            }
        }

        let here = |name| precision(&by_name[name], |own| own == source).unwrap_or(f64::NAN);
        let best = best.map(|(name, elsewhere)| Best { name, elsewhere, here: here(name) });
        LeftOut { source, best, default_here: here(default) }
    };
    sources(windows).into_iter().map(row).collect()
}

/// The sources of scans with lesions.
fn sources<'a>(windows: &[&'a Outcome]) -> BTreeSet<&'a str> {
    let scans = windows.iter().flat_map(|outcome| &outcome.scans);
    scans.filter(|(_, own)| own.curve.is_some()).map(|(stem, _)| source_of(stem)).collect()
}

/// Mean average precision over the wanted sources; `None` if no window has any.
fn precision(windows: &[&Outcome], is_wanted: impl Fn(&str) -> bool) -> Option<f64> {
    let of_window = |outcome: &&Outcome| {
        let wanted = outcome.scans.iter().filter(|(stem, _)| is_wanted(source_of(stem)));
        mean(wanted.filter_map(|(_, own)| own.curve.map(|curve| curve.1)))
    };
    mean(windows.iter().filter_map(of_window))
}
