//! `[alignment]`: which scans are aligned to the template, and what finds their brain.

use std::path::PathBuf;

use super::check::Checker;

/// Which scans are aligned to the template.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AlignmentChoice {
    /// Those that still have a head around the brain; its brain is extracted then.
    Heads,
    /// All.
    Always,
    /// None: heads are refused.
    Never,
}

/// What finds the brain of a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BrainChoice {
    /// The networks where their weights are there, else the template.
    Auto,
    /// The aligned template and the scan's intensities.
    Template,
    /// The networks.
    Network,
}

/// Alignment to a template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AlignmentSettings {
    /// Which scans.
    pub mode: AlignmentChoice,
    /// The template; the fetched one if not named.
    pub template: Option<PathBuf>,
    /// What finds the brain of a head.
    pub brain: BrainChoice,
    /// Weights of the networks for brain extraction; the fetched ones if not named.
    pub brain_weights: Option<PathBuf>,
    /// Whether the brain of a T1 is carried over to other scans of its session.
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
