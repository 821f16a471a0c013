//! Scores a window under one variant with the code of the daemon.

use std::collections::BTreeMap;

use half::f16;
use oddscan::{
    compute::cpu::CpuDistances,
    config::{Config, EvidenceSettings},
    domain::{
        PairDistances,
        acquisition::AcquisitionFacts,
        error::ScanError,
        evidence::FineVolumes,
        scan::ScanId,
        window::Membership,
        window_scores::{
            ScoredMember, Scoring, WindowDistances, WindowScores, parts_of, score_members,
        },
    },
    numeric::{
        evaluation::{baseline::deviations, mean},
        fine::FineVolume,
        fusion::{FusedMap, Parts, Weights},
        projection::Projection,
        scoring::{MapProfile, ScanScores, SearchReach},
        token::{Foreground, TokenGrid, smooth},
    },
};

use crate::{
    Result,
    figures::{FoundWindow, Outcome, of_maps, of_tokens},
    scans::{Part, Scan},
    variants::{Map, Variant},
};

/// The parts of a scan that a variant scores; of joined views some channels.
fn chosen_parts(scan: &Scan, variant: &Variant) -> Vec<usize> {
    if scan.parts.len() == 1 { vec![0] } else { variant.views.clone() }
}

/// Tokens of one part of a scan at one layer under a variant.
fn tokens(part: &Part, layer: usize, is_joined: bool, variant: &Variant) -> Result<TokenGrid> {
    let Part { foreground, fractions, layers } = part;
    let kept: Vec<usize> = (0..fractions.len())
        .filter(|&token| f64::from(fractions[token]) >= variant.min_fraction)
        .collect();
    let cells: Vec<u32> = kept.iter().map(|&token| foreground.cells[token]).collect();
    let features = &layers[&layer];
    let channels = features.len() / fractions.len();
    let (views, width) =
        if is_joined { (variant.views.as_slice(), channels / 3) } else { (&[0][..], channels) };
    let projection =
        (variant.projection > 0).then(|| Projection::new(variant.seed, width, variant.projection));
    let mut rows = Vec::new();
    for &token in &kept {
        for &view in views {
            let start = token * channels + view * width;
            let own: Vec<f32> = features[start..start + width].iter().map(|f| f.to_f32()).collect();
            match &projection {
                Some(projection) => {
                    let from = rows.len();
                    rows.resize(from + variant.projection, 0.0);
                    projection.apply(&own, &mut rows[from..]);
                }
                None => rows.extend(own),
            }
        }
    }
    let foreground = Foreground { shape: foreground.shape, cells };
    if variant.smoothing > 0.0 {
        rows = smooth(&foreground, &rows, variant.smoothing);
    }
    let channels = rows.len() / foreground.cells.len();
    let features = rows.into_iter().map(f16::from_f32).collect();
    Ok(TokenGrid::new(foreground.shape, channels, foreground.cells, features)?)
}

/// How much each kind of evidence weighs in the map of a scan.
fn weights(scan: &Scan, variant: &Variant, evidence: &EvidenceSettings) -> Weights {
    let facts = AcquisitionFacts::of(&scan.stem, scan.raw.affine.spacing_mm());
    variant.map.map_or(Weights::OF_TOKENS_ALONE, |map| map.weights(evidence.weights(&facts)))
}

/// The token grids of a window: `[scan][grid]`.
struct Grids {
    scans: Vec<Vec<TokenGrid>>,
    reach: SearchReach,
    columns: BTreeMap<(ScanId, ScanId, usize), Vec<f32>>,
}

/// A made-up id: the position of the scan in the window.
fn id(index: usize) -> ScanId {
    let mut id = [0; 32];
    id[0] = index as u8;
    ScanId(id)
}

impl Grids {
    fn grid(&self, scan: ScanId, grid: usize) -> &TokenGrid {
        &self.scans[usize::from(scan.0[0])][grid]
    }
}

impl WindowDistances for Grids {
    fn column(
        &mut self,
        of: ScanId,
        other: ScanId,
        layer: usize,
    ) -> std::result::Result<Vec<f32>, ScanError> {
        if let Some(column) = self.columns.remove(&(of, other, layer)) {
            return Ok(column);
        }
        let (a, b) = (self.grid(of, layer), self.grid(other, layer));
        let pair = CpuDistances::new().nearest(a, b, self.reach)?;
        self.columns.insert((other, of, layer), pair.second_to_first);
        Ok(pair.first_to_second)
    }

    fn column_without(
        &mut self,
        of: ScanId,
        other: ScanId,
        layer: usize,
        excluded: &[usize],
    ) -> std::result::Result<Vec<f32>, ScanError> {
        let theirs = self.grid(other, layer).without(excluded);
        Ok(CpuDistances::new().nearest(self.grid(of, layer), &theirs, self.reach)?.first_to_second)
    }
}

pub(crate) fn score(scans: &[Scan], variant: &Variant, window: &str) -> Result<Outcome> {
    let Config { scoring: settings, evidence, .. } = Config::parse(&format!(
        "[scoring]\nreach_patches = {}\nkeep_fraction = {:?}\npositional_correction = {:?}\n\
         [community]\nenabled = {}\n",
        variant.reach, variant.keep, variant.positional_correction, variant.filter
    ))?;
    let grids = |scan: &Scan| -> Result<Vec<TokenGrid>> {
        let mut grids = Vec::new();
        for &layer in &variant.layers {
            for part in chosen_parts(scan, variant) {
                let is_joined = scan.parts.len() == 1;
                let pooled = variant.pooled_top.map(|top| scan.parts[part].pooled(top));
                let part = pooled.as_ref().unwrap_or(&scan.parts[part]);
                grids.push(tokens(part, layer, is_joined, variant)?);
            }
        }
        Ok(grids)
    };
    let grids: Vec<Vec<TokenGrid>> = scans.iter().map(grids).collect::<Result<_>>()?;
    let member = |(index, grids): (usize, &Vec<TokenGrid>)| {
        let n_parts = grids.len() / variant.layers.len();
        ScoredMember {
            weights: weights(&scans[index], variant, &evidence),
            id: id(index),
            parts: parts_of(grids, n_parts),
            membership: Membership::REFERENCE,
        }
    };
    let members: Vec<ScoredMember> = grids.iter().enumerate().map(member).collect();
    let mut grids = Grids { scans: grids, reach: settings.reach, columns: BTreeMap::new() };
    let fines = Fines::of(scans, variant)?;
    let mut found = score_members(&members, &variant.layers, &settings, &mut grids, &fines)?;
    if variant.z_score {
        z_scores(&mut found.scans);
    }
    for shared in &found.shared {
        let stems = shared.members.iter().map(|id| scans[usize::from(id.0[0])].stem.as_str());
        println!("shared: {:?}, {} tokens", stems.collect::<Vec<_>>(), shared.n_excluded);
    }

    Ok(match variant.map {
        None => of_tokens(scans, &found.scans, settings.clean_scans, variant, window),
        Some(map) => {
            let maps = maps(map, scans, &mut found, &settings, &fines)?;
            let found = FoundWindow { scores: &found, maps: &maps, settings: &settings };
            of_maps(scans, &found, variant, window)
        }
    })
}

/// The intensities of a window; empty for variants of tokens alone.
struct Fines(Vec<FineVolume>);

impl Fines {
    fn of(scans: &[Scan], variant: &Variant) -> Result<Self> {
        if variant.map.is_none() {
            return Ok(Self(Vec::new()));
        }
        let fine = |scan: &Scan| {
            let kept = scan.fine.clone();
            kept.ok_or_else(|| {
                format!("{}: {:?} keeps no intensities", scan.stem, variant.encoding)
            })
        };
        Ok(Self(scans.iter().map(fine).collect::<std::result::Result<_, _>>()?))
    }
}

impl FineVolumes for Fines {
    fn fine(&self, scan: ScanId) -> std::result::Result<FineVolume, ScanError> {
        Ok(self.0[usize::from(scan.0[0])].clone())
    }
}

/// The map of each scan beside that of its tokens. `None` if the map is that of its tokens.
fn maps(
    map: Map,
    scans: &[Scan],
    found: &mut WindowScores,
    settings: &Scoring,
    fines: &Fines,
) -> Result<Vec<Option<FusedMap>>> {
    if map == Map::Deviation {
        let maps: Vec<FusedMap> =
            deviations(&fines.0).into_iter().zip(&fines.0).map(deviation_map).collect();
        let profile =
            |map: &FusedMap| MapProfile::new(map.values.clone(), settings.false_positives);
        found.profiles = maps.iter().map(profile).collect();
        return Ok(maps.into_iter().map(Some).collect());
    }
    let Some(evidence) = &found.evidence else { return Ok(vec![None; scans.len()]) };
    let map = |index: usize| Ok(Some(evidence.map(index, &found.scans[index], fines)?));
    (0..scans.len()).map(map).collect()
}

fn deviation_map((values, fine): (Vec<f32>, &FineVolume)) -> FusedMap {
    let none = vec![0.0; values.len()];
    FusedMap {
        foreground: fine.foreground.clone(),
        values,
        parts: Parts { tokens: none.clone(), brightness: none.clone(), range: none },
        depths_mm: fine.depths_mm().collect(),
        few_have: vec![false; fine.values.len()],
    }
}

/// Scores as z-scores against those of the same cell in the other scans, moved above 0.
fn z_scores(scans: &mut [ScanScores]) {
    let mut places: BTreeMap<u32, Vec<f64>> = BTreeMap::new();
    for scan in scans.iter() {
        for (&cell, &score) in scan.foreground.cells.iter().zip(&scan.cells) {
            places.entry(cell).or_default().push(f64::from(score));
        }
    }
    for scan in scans {
        for (cell, score) in scan.foreground.cells.iter().zip(&mut scan.cells) {
            let mut others = places[cell].clone();
            let own = others.iter().position(|other| *other == f64::from(*score));
            others.swap_remove(own.expect("it was put there"));
            let level = mean(others.iter().copied()).unwrap_or(0.0);
            let spread = mean(others.iter().map(|other| (other - level).powi(2))).unwrap_or(0.0);
            let z =
                if others.len() < 3 { 0.0 } else { (f64::from(*score) - level) / spread.sqrt() };
            *score = (z.clamp(-9.0, 90.0) + 9.0) as f32;
        }
    }
}
