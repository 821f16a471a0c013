//! Measures how long each stage takes for one scan.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use crate::metrics::{Metrics, Stage};

/// Wall time of one scan by stage.
#[derive(Debug, Clone)]
pub(super) struct Timings {
    stage: Stage,
    since: Instant,
    laps: Vec<(Stage, Duration)>,
}

impl Timings {
    /// Starts the clock in this stage.
    pub(super) fn start(stage: Stage) -> Self {
        Self { stage, since: Instant::now(), laps: Vec::new() }
    }

    /// The scan moves to another stage.
    pub(super) fn switch(&mut self, stage: Stage) {
        self.pause();
        self.stage = stage;
    }

    /// Like [`Timings::pause`], and records one observation for each of the `passed` stages.
    pub(super) fn stop(&mut self, passed: &[Stage], metrics: &Metrics) {
        self.pause();
        for &(stage, took) in self.laps.iter().filter(|(stage, _)| passed.contains(stage)) {
            metrics.stage_finished(stage, took);
        }
    }

    /// Stops the clock while the scan waits.
    pub(super) fn pause(&mut self) {
        let took = self.since.elapsed();
        match self.laps.iter_mut().find(|(stage, _)| *stage == self.stage) {
            Some((_, sum)) => *sum += took,
            None => self.laps.push((self.stage, took)),
        }
        self.since = Instant::now();
    }

    /// Starts the clock again, in this stage.
    pub(super) fn resume(&mut self, stage: Stage) {
        (self.stage, self.since) = (stage, Instant::now());
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
        let metrics = Metrics::new();
        let mut timings = Timings::start(Stage::Decode);
        let pass = |timings: &mut Timings, secs| timings.since -= Duration::from_secs(secs);
        pass(&mut timings, 5);
        timings.switch(Stage::Preprocess);
        timings.switch(Stage::Decode);
        pass(&mut timings, 7);
        timings.stop(&[], &metrics);
        pass(&mut timings, 1000);
        timings.resume(Stage::Encode);
        timings.stop(&[], &metrics);
        let secs = timings.secs();
        assert_eq!(secs.keys().collect::<Vec<_>>(), ["decode", "encode", "preprocess"]);
        assert!(secs["decode"] >= 12.0);
        assert!(secs["encode"] < 1000.0);
    }
}
