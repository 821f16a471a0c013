//! From members with tokens to the results of a window, which has all scans of a cohort.

use std::{collections::BTreeMap, path::Path};

use super::encode::{Again, EncodedScan};
use crate::{
    cli::{Failure, INTERNAL, IO},
    config::Config,
    domain::{
        GridName, PairDistances,
        cohort::CohortKey,
        error::ScanError,
        evidence::FineVolumes,
        finding::Finding,
        identity::Pseudonyms,
        scan::ScanId,
        window::Window,
        window_scores::{ScoredMember, WindowDistances, parts_of, score_members},
    },
    engine::Engine,
    numeric::{
        fine::FineVolume,
        scoring::{PairColumns, SearchReach},
        token::TokenGrid,
    },
    pipeline::{log_nearest_pair, nearest_of_each, now_secs},
    prepare::read_again,
    report,
    results::{ResultInput, build_results},
};

/// Distances from one grid of tokens of a scan to that of another.
type Columns = BTreeMap<(ScanId, ScanId, usize), Vec<f32>>;

/// Scores windows one after another.
pub(super) struct Scoring<'a> {
    pub(super) config: &'a Config,
    pub(super) engine: &'a mut Engine,
    /// What results say instead of names.
    pub(super) pseudonyms: &'a Pseudonyms,
    /// Warnings for readers of the results, with the stems of their scans.
    pub(super) warnings: BTreeMap<String, Vec<String>>,
}

impl Scoring<'_> {
    /// Makes one window of a whole cohort.
    pub(super) fn window(&self, key: CohortKey, members: &[EncodedScan]) -> Window {
        let capacity = self.config.window.max_scans.max(members.len().try_into().expect("not 0"));
        let mut window = Window::new(key, capacity);
        for member in members {
            window.admit(member.record.id, self.config.membership(&member.record));
        }
        window
    }

    /// Scores a window and writes its results.
    pub(super) fn score(
        &mut self,
        window: &Window,
        members: Vec<EncodedScan>,
        out: &Path,
    ) -> Result<Vec<(EncodedScan, Finding)>, Failure> {
        let internal = |error: ScanError| Failure::new(INTERNAL, error);
        let columns = self.columns(&members).map_err(internal)?;

        let n_parts = self.engine.method.n_parts;
        let scored_member = |member: &EncodedScan| ScoredMember {
            id: member.record.id,
            parts: parts_of(&member.tokens, n_parts),
            membership: window.membership(member.record.id).clone(),
            weights: self.config.evidence.weights(&member.record.acquisition),
        };
        let scored_members: Vec<ScoredMember> = members.iter().map(scored_member).collect();

        let mut computed = Computed {
            columns: &columns,
            members: &members,
            distances: self.engine.distances.as_mut(),
            reach: self.config.scoring.reach,
        };
        let fines = Fines(&members);
        let method = &self.engine.method;
        let scores = score_members(
            &scored_members,
            &method.layers,
            &self.config.scoring,
            &mut computed,
            &fines,
        )
        .map_err(internal)?;
        log_nearest_pair(&scores.follow_ups);

        let identity = window.identity();
        let mut findings = Vec::new();
        for (index, member) in members.iter().enumerate() {
            let Again { scan, mask } = &member.again;
            let limits = &self.config.intake.limits;
            let source =
                read_again(&member.record, scan, mask.as_deref(), limits).map_err(internal)?;
            let (results, finding) = build_results(&ResultInput {
                record: &member.record,
                source: &source,
                scores: &scores,
                index,
                window: &identity,
                method: &self.engine.method,
                config: self.config,
                fines: &fines,
                pseudonyms: self.pseudonyms,
                now_secs: now_secs(),
            })
            .map_err(internal)?;

            let stem = &member.stem;
            for warning in &results.sidecar.warnings {
                self.warnings.entry(warning.clone()).or_default().push(stem.clone());
            }
            report::write_results(out, stem, &results).map_err(|error| Failure::new(IO, error))?;
            findings.push(finding);
        }
        Ok(members.into_iter().zip(findings).collect())
    }

    /// Computes all columns of a window.
    fn columns(&mut self, members: &[EncodedScan]) -> Result<Columns, ScanError> {
        let (reach, distances) = (self.config.scoring.reach, self.engine.distances.as_mut());
        let mut columns = BTreeMap::new();
        let n_grids = members.first().map_or(0, |member| member.tokens.len());
        for grid in 0..n_grids {
            let grids: Vec<(GridName, &TokenGrid)> = members
                .iter()
                .map(|member| (GridName { scan: member.record.id, grid }, &member.tokens[grid]))
                .collect();
            for (index, &one) in grids.iter().enumerate() {
                let others = &grids[..index];
                let found = nearest_of_each(distances, reach, one, others)?;
                for ((other, _), of_pair) in others.iter().zip(found) {
                    let PairColumns { first_to_second, second_to_first } = of_pair;
                    columns.insert((one.0.scan, other.scan, grid), first_to_second);
                    columns.insert((other.scan, one.0.scan, grid), second_to_first);
                }
            }
        }
        Ok(columns)
    }
}

/// The intensities of all members of a window, in memory.
struct Fines<'a>(&'a [EncodedScan]);

impl FineVolumes for Fines<'_> {
    fn fine(&self, scan: ScanId) -> Result<FineVolume, ScanError> {
        Ok(member(self.0, scan).fine.clone())
    }
}

fn member(members: &[EncodedScan], scan: ScanId) -> &EncodedScan {
    let member = members.iter().find(|member| member.record.id == scan);
    member.expect("only members are asked for")
}

/// The columns of a window in memory.
struct Computed<'a> {
    columns: &'a Columns,
    members: &'a [EncodedScan],
    distances: &'a mut dyn PairDistances,
    reach: SearchReach,
}

impl WindowDistances for Computed<'_> {
    fn column(&mut self, of: ScanId, other: ScanId, grid: usize) -> Result<Vec<f32>, ScanError> {
        Ok(self.columns[&(of, other, grid)].clone())
    }

    fn column_without(
        &mut self,
        of: ScanId,
        other: ScanId,
        grid: usize,
        excluded: &[usize],
    ) -> Result<Vec<f32>, ScanError> {
        let tokens = |id: ScanId| &member(self.members, id).tokens[grid];
        let theirs = tokens(other).without(excluded);
        Ok(self.distances.nearest(tokens(of), &theirs, self.reach)?.first_to_second)
    }
}
