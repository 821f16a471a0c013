//! The figures over all scans.

use std::path::Path;

use super::{
    baselines::baselines,
    case::Case,
    figures::{
        Estimate, Evaluation, Means, Patients, Pooled, RankingMeans, Scan, SizeClass, Source,
        VoxelFigures,
    },
    froc::froc,
};
use crate::numeric::evaluation::{
    Curve, Overlap, Ranking, bootstrap, ranks,
    sizes::{SIZES, by_size},
    sources,
};

/// All figures, and notes about baselines that are missing. `folder` holds the scans themselves.
pub(super) fn summarise(cases: Vec<Case>, folder: &Path) -> (Evaluation, Vec<String>) {
    let (baselines, notes) = baselines(folder, &cases);
    let ranking = Ranking::new(cases.iter().map(|case| case.scored_by(&case.values)));
    let global = ranking.global_oracle();
    let pooled = pooled(&cases, &ranking);
    let froc = froc(&cases, &ranking);

    let scans: Vec<Scan> = cases.into_iter().map(|case| case.scan).collect();
    let ill: Vec<VoxelFigures> = scans.iter().filter_map(|scan| scan.voxels).collect();
    let per_scan =
        |of: fn(&Scan) -> usize| scans.iter().map(of).sum::<usize>() as f64 / scans.len() as f64;
    let evaluation = Evaluation {
        mean: Means::of(&ill),
        baselines,
        sources: by_source(&scans),
        pooled,
        global_oracle_dice: global.map(|global| global.mean_dice),
        global_oracle_threshold: global.map(|global| global.threshold),
        lesions: size_classes(&scans),
        froc,
        false_regions_per_scan: per_scan(|scan| scan.n_false_regions),
        regions_on_normal_per_scan: per_scan(|scan| scan.n_regions_on_normal),
        patients: patients(&scans),
        scans,
    };
    (evaluation, notes)
}

fn pooled(cases: &[Case], ranking: &Ranking) -> Option<Pooled> {
    let curve = ranking.curve()?;
    let n_voxels: usize = cases.iter().map(|case| case.voxels.len()).sum();
    let n_true: usize = cases.iter().map(|case| case.scan.n_lesion_voxels).sum();
    let overlap = cases.iter().map(|case| case.scan.overlap).sum::<Overlap>();
    Some(Pooled {
        auroc: curve.auroc,
        average_precision: curve.average_precision,
        oracle_dice: curve.oracle_dice,
        oracle_threshold: curve.oracle_threshold,
        prevalence: n_true as f64 / n_voxels as f64,
        dice: overlap.dice().unwrap_or(0.0),
    })
}

fn size_classes(scans: &[Scan]) -> Vec<SizeClass> {
    let lesions = || scans.iter().flat_map(|scan| &scan.lesions);
    let n_lesions = by_size(lesions().map(|lesion| lesion.volume_mm3));
    let found = lesions().filter(|lesion| lesion.found);
    let n_found = by_size(found.map(|lesion| lesion.volume_mm3));

    let class = |class: usize| SizeClass {
        size: SIZES[class].0,
        n_lesions: n_lesions[class],
        n_found: n_found[class],
    };
    (0..SIZES.len()).map(class).collect()
}

/// The scans with lesions by source; empty if their names do not tell several.
fn by_source(scans: &[Scan]) -> Vec<Source> {
    let ill = scans.iter().filter_map(|scan| {
        let voxels = scan.voxels.as_ref()?;
        Some((scan.stem.as_str(), (scan, voxels)))
    });
    let source = |(source, scans): (&str, Vec<(&Scan, &VoxelFigures)>)| {
        let lesions = || scans.iter().flat_map(|(scan, _)| &scan.lesions);
        Some(Source {
            source: source.to_owned(),
            means: RankingMeans::of_maps(scans.iter().map(|(_, voxels)| *voxels))?,
            n_lesions: lesions().count(),
            n_found: lesions().filter(|lesion| lesion.found).count(),
        })
    };
    sources::by_source(ill).into_iter().filter_map(source).collect()
}

/// Ranks scans by `1 - tail_probability`, and among equal ones by score. Without a tail probability
/// for each, by score alone.
fn patients(scans: &[Scan]) -> Option<Patients> {
    let scored: Vec<(&Scan, f32)> =
        scans.iter().filter_map(|scan| Some((scan, scan.score?))).collect();
    let ill: Vec<bool> = scored.iter().map(|(scan, _)| scan.n_lesion_voxels > 0).collect();
    let by_score: Vec<f32> = scored.iter().map(|(_, score)| *score).collect();
    let keys: Option<Vec<(f64, f32)>> =
        scored.iter().map(|(scan, score)| Some((1.0 - scan.tail_probability?, *score))).collect();
    let by_tail = keys.map(|keys| ranks(&keys));

    let curve = |ranked: &[f32], draw: &[usize]| {
        Ranking::new([draw.iter().map(|&i| (ranked[i], ill[i]))]).curve()
    };
    let all: Vec<usize> = (0..scored.len()).collect();
    let ranked = by_tail.as_deref().unwrap_or(&by_score);
    let whole = curve(ranked, &all)?;
    let interval =
        |of: fn(&Curve) -> f64| bootstrap(all.len(), |draw| curve(ranked, draw).as_ref().map(of));
    let n_with_lesions = ill.iter().filter(|ill| **ill).count();
    Some(Patients {
        n_with_lesions,
        n_healthy: ill.len() - n_with_lesions,
        ranked_by: if by_tail.is_some() { "tail_probability" } else { "top1_mean" },
        auroc: Estimate { value: whole.auroc, interval: interval(|curve| curve.auroc) },
        average_precision: Estimate {
            value: whole.average_precision,
            interval: interval(|curve| curve.average_precision),
        },
        auroc_by_tail_probability: by_tail.as_ref().map(|_| whole.auroc),
        auroc_by_top1_mean: curve(&by_score, &all)?.auroc,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::eval::figures::Lesion;

    fn scan(stem: &str, score: f32, tail_probability: Option<f64>, auroc: Option<f64>) -> Scan {
        let voxels = auroc.map(|auroc| VoxelFigures {
            auroc,
            average_precision: 0.5,
            oracle_dice: 0.25,
            oracle_threshold: 1.0,
            dice: 0.0,
            iou: 0.0,
        });
        let lesion = auroc.map(|auroc| Lesion { volume_mm3: 50.0, found: auroc > 0.7 });
        Scan {
            stem: stem.to_owned(),
            score: Some(score),
            tail_probability,
            n_lesion_voxels: usize::from(auroc.is_some()),
            overlap: Overlap::default(),
            voxels,
            lesions: lesion.into_iter().collect(),
            n_false_regions: 0,
            n_regions_on_normal: 0,
            n_normal: 0,
            n_normal_met: 0,
            mask_ml: 0.0,
        }
    }

    #[test]
    fn figures_by_source_are_means_over_its_scans_with_lesions() {
        let scans = [
            scan("ms-1_FLAIR", 0.0, None, Some(0.6)),
            scan("ms-2_FLAIR", 0.0, None, Some(0.8)),
            scan("ms-3_FLAIR", 0.0, None, None),
            scan("tcga-1_FLAIR", 0.0, None, Some(0.5)),
        ];
        let sources = by_source(&scans);
        let facts: Vec<_> = sources
            .iter()
            .map(|s| (s.source.as_str(), s.means.n_scans, s.n_lesions, s.n_found))
            .collect();
        assert_eq!(facts, [("ms", 2, 2, 1), ("tcga", 1, 1, 0)]);
        // 0.6 and 0.8 in binary.
        assert!((sources[0].means.auroc - 0.7).abs() < 1e-12);
        // One source, or only sources of one scan.
        assert!(by_source(&scans[..3]).is_empty());
        assert!(by_source(&scans[1..]).is_empty());
    }

    #[test]
    fn scans_rank_by_tail_probability_and_then_by_score() {
        let scans = [
            scan("a", 1.0, Some(0.01), Some(0.9)),
            scan("b", 5.0, Some(0.2), None),
            scan("c", 4.0, Some(0.2), Some(0.9)),
            scan("d", 0.5, Some(0.9), None),
        ];
        let of = patients(&scans).unwrap();
        // By tail probability: a, b, c, d, of which b alone is healthy before an ill one.
        assert_eq!((of.auroc.value, of.auroc_by_tail_probability), (0.75, Some(0.75)));
        // By score: b, c, a, d.
        assert_eq!((of.auroc_by_top1_mean, of.ranked_by), (0.5, "tail_probability"));

        let without = scan("d", 0.5, None, None);
        let [a, b, c, _] = scans;
        let of = patients(&[a, b, c, without]).unwrap();
        assert_eq!((of.auroc.value, of.auroc_by_tail_probability), (0.5, None));
        assert_eq!(of.ranked_by, "top1_mean");
    }
}
