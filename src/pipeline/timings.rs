//! Where the time of one scan goes.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use crate::metrics::{Metrics, Stage};

/// Wall time of one scan by stage, counted from where it was last asked.
#[derive(Debug, Clone)]
pub(super) struct Timings {
    since: Instant,
    laps: Vec<(Stage, Duration)>,
}

impl Timings {
    /// Counts from now.
    pub(super) fn start() -> Self {
        Self { since: Instant::now(), laps: Vec::new() }
    }

    /// The time since the last lap was spent in `stage`.
    pub(super) fn lap(&mut self, stage: Stage) {
        let now = Instant::now();
        let took = now - self.since;
        self.since = now;
        match self.laps.iter_mut().find(|(of, _)| *of == stage) {
            Some((_, sum)) => *sum += took,
            None => self.laps.push((stage, took)),
        }
    }

    /// Counts on from now: the scan has waited meanwhile.
    pub(super) fn resume(&mut self) {
        self.since = Instant::now();
    }

    /// One observation for each of these stages that the scan has passed.
    pub(super) fn report(&self, stages: &[Stage], metrics: &Metrics) {
        for &(stage, took) in self.laps.iter().filter(|(stage, _)| stages.contains(stage)) {
            metrics.stage_finished(stage, took);
        }
    }

    /// Seconds by the name of the stage.
    pub(super) fn secs(&self) -> BTreeMap<String, f64> {
        self.laps
            .iter()
            .map(|(stage, took)| (stage.name().to_owned(), took.as_secs_f64()))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn laps_of_one_stage_add_up_and_waiting_counts_for_none() {
        let mut timings = Timings::start();
        let pass = |timings: &mut Timings, secs| timings.since -= Duration::from_secs(secs);
        pass(&mut timings, 5);
        timings.lap(Stage::Decode);
        timings.lap(Stage::Preprocess);
        pass(&mut timings, 7);
        timings.lap(Stage::Decode);
        pass(&mut timings, 1000);
        timings.resume();
        timings.lap(Stage::Encode);
        let secs = timings.secs();
        assert_eq!(secs.keys().collect::<Vec<_>>(), ["decode", "encode", "preprocess"]);
        assert!(secs["decode"] >= 12.0);
        assert!(secs["encode"] < 1000.0);
    }
}
