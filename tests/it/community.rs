//! The filter of shared anomalies, run in the steps that the daemon and `oddscan score` share.

use std::collections::BTreeSet;

use half::f16;
use oddscan::{
    compute::cpu::CpuDistances,
    config::Config,
    domain::{
        PairDistances,
        error::ScanError,
        evidence::NoFineVolumes,
        scan::ScanId,
        window::Membership,
        window_scores::{ScoredMember, Scoring, WindowDistances, WindowScores, score_members},
    },
    numeric::{
        fusion::Weights, geometry::Shape3, projection::Normal, scoring::SearchReach,
        token::TokenGrid,
    },
};

const N_SCANS: usize = 30;
const SIDE: usize = 5;
const WIDTH: usize = 12;

struct Grids(Vec<TokenGrid>);

fn id(scan: usize) -> ScanId {
    ScanId([scan as u8; 32])
}

impl Grids {
    fn grid(&self, scan: ScanId) -> &TokenGrid {
        &self.0[usize::from(scan.0[0])]
    }
}

impl WindowDistances for Grids {
    fn column(&mut self, of: ScanId, other: ScanId, layer: usize) -> Result<Vec<f32>, ScanError> {
        self.column_without(of, other, layer, &[])
    }

    fn column_without(
        &mut self,
        of: ScanId,
        other: ScanId,
        _: usize,
        excluded: &[usize],
    ) -> Result<Vec<f32>, ScanError> {
        let theirs = self.grid(other).without(excluded);
        let reach = SearchReach::WholeVolume;
        Ok(CpuDistances::new().nearest(self.grid(of), &theirs, reach)?.first_to_second)
    }
}

/// Scans that differ by noise only. Those of `ill` have the same lesion in cells 60 to 64.
fn window(ill: &BTreeSet<usize>) -> Grids {
    let mut random = Normal::new(1);
    let cells: Vec<u32> = (0..SIDE.pow(3) as u32).collect();
    let mut vectors = |n: usize, scale: f64| -> Vec<f64> {
        (0..n * WIDTH).map(|_| scale * random.next()).collect()
    };
    let (anatomy, lesion) = (vectors(cells.len(), 1.0), vectors(5, 3.0));
    let grids = (0..N_SCANS).map(|scan| {
        let noise = vectors(cells.len(), 0.3);
        let mut tokens: Vec<f64> = anatomy.iter().zip(&noise).map(|(a, b)| a + b).collect();
        if ill.contains(&scan) {
            let place = &mut tokens[60 * WIDTH..65 * WIDTH];
            place.iter_mut().zip(&lesion).zip(&noise).for_each(|((t, l), n)| *t = l + 0.3 * n);
        }
        let features = tokens.into_iter().map(f16::from_f64).collect();
        TokenGrid::new(Shape3::cube(SIDE), WIDTH, cells.clone(), features).unwrap()
    });
    Grids(grids.collect())
}

fn scores(grids: &mut Grids, enabled: bool) -> WindowScores {
    let settings = Config::parse(&format!(
        "community.enabled = {enabled}\n[scoring]\nkeep_fraction = 0.3\npositional_correction = 0.0"
    ))
    .unwrap();
    let settings: Scoring = settings.scoring;
    let member = |(scan, grid): (usize, &TokenGrid)| ScoredMember {
        id: id(scan),
        parts: vec![grid.foreground().clone()],
        membership: Membership::REFERENCE,
        weights: Weights::OF_TOKENS_ALONE,
    };
    let members: Vec<ScoredMember> = grids.0.iter().enumerate().map(member).collect();
    score_members(&members, &[9], &settings, grids, &NoFineVolumes).unwrap()
}

/// Mean score in the lesion, and the 99th percentile of all scores away from it.
fn lesion_and_rest(scores: &WindowScores, ill: &BTreeSet<usize>) -> (f32, f32) {
    let (mut lesion, mut rest) = (Vec::new(), Vec::new());
    for (scan, scores) in scores.scans.iter().enumerate() {
        let shape = scores.foreground.shape;
        for (&cell, &score) in scores.foreground.cells.iter().zip(&scores.cells) {
            // Tokens 60 to 64 are the row in the middle; there are two cells along each of theirs.
            let [_, y, z] = shape.voxel(cell as usize);
            if [y, z].iter().all(|at| (4..=5).contains(at)) && ill.contains(&scan) {
                lesion.push(score);
            } else if [y, z].iter().any(|at| !(3..=6).contains(at)) {
                rest.push(score);
            }
        }
    }
    rest.sort_unstable_by(f32::total_cmp);
    (lesion.iter().sum::<f32>() / lesion.len() as f32, rest[rest.len() * 99 / 100])
}

#[test]
fn a_lesion_that_three_of_ten_scans_share_hides_without_the_filter_and_scores_with_it() {
    let ill: BTreeSet<usize> = (0..N_SCANS).step_by(3).take(9).collect();
    let mut grids = window(&ill);
    let plain = scores(&mut grids, false);
    let (hidden, rest) = lesion_and_rest(&plain, &ill);
    assert!(hidden < rest, "{hidden} {rest}");
    assert!(plain.shared.is_empty());
    let filtered = scores(&mut grids, true);
    let (found, rest) = lesion_and_rest(&filtered, &ill);
    assert!(found > rest, "{found} {rest}");
    let shared = &filtered.shared[0];
    assert_eq!(shared.members, ill.iter().map(|&scan| id(scan)).collect::<Vec<_>>());
    assert_eq!((filtered.shared.len(), shared.layer), (1, 9));
    assert!(shared.n_excluded >= 5 * ill.len());
}

#[test]
fn a_window_without_a_shared_lesion_keeps_its_scores_to_the_last_bit() {
    let mut grids = window(&BTreeSet::from([4]));
    let (plain, filtered) = (scores(&mut grids, false), scores(&mut grids, true));
    assert_eq!(plain.scans, filtered.scans);
    assert!(filtered.shared.is_empty());
}
