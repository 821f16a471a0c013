//! `[scoring]`: how distances become scores and masks.

use std::num::NonZeroUsize;

use toml::{Table, Value};

use super::{
    check::{Checker, Fault},
    community,
};
pub use crate::domain::window_scores::{MaskPolicy, Scoring};
use crate::numeric::{community::CommunitySettings, scoring::SearchReach};

const OLD_NAME: &str = "place_share";
const NEW_NAME: &str = "positional_correction";

/// Both `[scoring]` and `[community]`.
pub(super) fn read(check: &mut Checker) -> Scoring {
    let cells = check.whole("scoring.reach_patches", 0..=64);
    let scoring = Scoring {
        reach: NonZeroUsize::new(cells).map_or(SearchReach::WholeVolume, SearchReach::Patches),
        keep: check.share("scoring.keep_fraction", 1.0),
        positional_correction: check.number("scoring.positional_correction", 0.0..=1.0),
        // Above a quarter a mask would show nothing useful.
        false_positives: check.share("scoring.false_positive_fraction", 0.25),
        clean_scans: check.share("scoring.clean_scan_fraction", 1.0),
        min_cluster_mm3: check.number("scoring.min_cluster_mm3", 0.0..=1e6),
        min_bright_cluster_mm3: check.number("scoring.min_bright_cluster_mm3", 0.0..=1e6),
        alarm_probability: check.number("scoring.alarm_probability", 0.0..=1.0),
        mask: check.word(
            "scoring.mask",
            &[("standing_out", MaskPolicy::StandingOut), ("always", MaskPolicy::Always)],
        ),
        follow_up_ratio: check.number("scoring.follow_up_ratio", 0.0..=1.0),
        filter_shared: false,
        community: CommunitySettings::default(),
    };
    let (filter_shared, community) = community::read(check);
    Scoring { filter_shared, community, ..scoring }
}

/// Renames the old key of the positional correction.
pub(super) fn rename_old(site: &mut Table, faults: &mut Vec<Fault>) {
    let Some(Value::Table(scoring)) = site.get_mut("scoring") else { return };
    let Some(value) = scoring.remove(OLD_NAME) else { return };
    if scoring.contains_key(NEW_NAME) {
        faults.push(Fault {
            key: format!("scoring.{OLD_NAME}"),
            found: value.to_string(),
            needed: format!("this is the old name of scoring.{NEW_NAME}; remove one of the two"),
        });
    } else {
        scoring.insert(NEW_NAME.to_owned(), value);
    }
}

#[cfg(test)]
mod tests {
    use crate::config::{Config, check::faults};

    #[test]
    fn the_old_name_of_the_positional_correction_still_counts() {
        let named = |name: &str| Config::parse(&format!("scoring.{name} = 0.5")).unwrap();
        let (old, new) = (named("place_share"), named("positional_correction"));
        assert_eq!(old.scoring.positional_correction, 0.5);
        assert_eq!(old.tree, new.tree);
        let found = faults("[scoring]\nplace_share = 0.5\npositional_correction = 0.5");
        let needed = "this is the old name of scoring.positional_correction; remove one of the two";
        assert_eq!(found, [format!("scoring.place_share = 0.5: {needed}")]);
    }

    #[test]
    fn follow_ups_are_not_looked_for_where_scans_of_a_patient_are_compared_on_purpose() {
        let ratio = |text: &str| Config::parse(text).unwrap().scoring.follow_up_ratio;
        assert_eq!(ratio("scoring.follow_up_ratio = 0.5"), 0.5);
        assert_eq!(ratio("window.compare_same_patient = true"), 0.0);
        let found = faults("scoring.follow_up_ratio = 1.5");
        assert!(found[0].starts_with("scoring.follow_up_ratio = 1.5: "), "{found:?}");
    }
}
