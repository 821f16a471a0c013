//! `[alignment]`: which scans are aligned to the template, and what finds their brain.

use std::path::PathBuf;

use super::check::Checker;

/// `alignment.mode`: which scans are aligned to the template.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AlignmentChoice {
    /// Scans that show more of the head than the brain. Their brain is extracted, too.
    Heads,
    /// All scans.
    Always,
    /// No scan. Scans that show the head are refused.
    Never,
}

/// `alignment.brain`: what finds the brain of a scan that shows the head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BrainChoice {
    /// The networks if their weights exist, else the template.
    Auto,
    /// The aligned template and the scan's intensities.
    Template,
    /// The networks for brain extraction.
    Network,
}

/// `[alignment]` after its check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AlignmentSettings {
    /// Which scans are aligned.
    pub mode: AlignmentChoice,
    /// File of the template. `None` means the fetched one.
    pub template: Option<PathBuf>,
    /// What finds the brain of a scan that shows the head.
    pub brain: BrainChoice,
    /// File with the weights of the networks for brain extraction. `None` means the fetched ones.
    pub brain_weights: Option<PathBuf>,
    /// Whether other scans of a session use the brain found in its T1.
    pub uses_session_t1: bool,
}

pub(super) fn read(check: &mut Checker) -> AlignmentSettings {
    let modes = [
        ("heads", AlignmentChoice::Heads),
        ("always", AlignmentChoice::Always),
        ("never", AlignmentChoice::Never),
    ];
    let brains = [
        ("auto", BrainChoice::Auto),
        ("template", BrainChoice::Template),
        ("network", BrainChoice::Network),
    ];
    AlignmentSettings {
        mode: check.word("alignment.mode", &modes),
        template: check.named_path("alignment.template"),
        brain: check.word("alignment.brain", &brains),
        brain_weights: check.named_path("alignment.brain_weights"),
        uses_session_t1: check.flag("alignment.use_session_t1"),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::{Config, check::faults};

    #[test]
    fn a_site_chooses_what_finds_brains() {
        assert_eq!(Config::parse("").unwrap().alignment.brain, BrainChoice::Auto);
        let site = "[alignment]\nbrain = \"network\"\nbrain_weights = \"/w\"";
        let found = Config::parse(site).unwrap().alignment;
        assert_eq!(found.brain, BrainChoice::Network);
        assert_eq!(found.brain_weights.as_deref(), Some(Path::new("/w")));
        let found = faults("alignment.brain = \"bet\"");
        let needed = "\"auto\", \"template\" or \"network\" is needed";
        assert_eq!(found, [format!("alignment.brain = \"bet\": {needed}")]);
    }
}
