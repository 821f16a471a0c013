//! The figures as text.

use std::fmt::Write as _;

use super::figures::{
    Baseline, Estimate, Evaluation, Means, Patients, Pooled, RankingMeans, Scan, SizeClass, Source,
};
use crate::numeric::evaluation::{froc::MIN_REGION_MM3, froc_curve::FrocCurve, sizes::SIZES};

/// False regions per scan at which the table of lesions has a column.
const RATES: [f64; 6] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0];

pub(super) fn tables(evaluation: &Evaluation) -> String {
    let mut text = String::new();
    of_scans(&mut text, &evaluation.scans);
    if let Some(mean) = &evaluation.mean {
        of_means(&mut text, mean);
    }
    of_baselines(&mut text, evaluation);
    of_sources(&mut text, &evaluation.sources);
    of_voxels(&mut text, evaluation);
    of_lesions(&mut text, evaluation);
    if let Some(froc) = &evaluation.froc {
        of_froc(&mut text, froc);
    }
    if let Some(patients) = &evaluation.patients {
        of_patients(&mut text, patients);
    }
    text
}

fn of_scans(text: &mut String, scans: &[Scan]) {
    *text += &format!(
        "{:<28} {:>6} {:>6} {:>11} {:>6} {:>6}  {:>13} {:>6}\n",
        "scan", "AUROC", "AP", "oracle Dice", "Dice", "IoU", "lesions found", "false"
    );
    for scan in scans {
        let n_found = scan.lesions.iter().filter(|lesion| lesion.found).count();
        let found = format!("{n_found} of {}", scan.lesions.len());
        *text += &match scan.voxels {
            Some(v) => format!(
                "{:<28} {:>6.3} {:>6.3} {:>11.3} {:>6.3} {:>6.3}  {found:>13} {:>6}\n",
                scan.stem,
                v.auroc,
                v.average_precision,
                v.oracle_dice,
                v.dice,
                v.iou,
                scan.n_false_regions
            ),
            None => format!(
                "{:<28} no known lesion; {:.1} ml marked {:>31}\n",
                scan.stem, scan.mask_ml, scan.n_false_regions
            ),
        };
    }
}

fn of_means(text: &mut String, mean: &Means) {
    *text += "\nmean over scans with lesions [95 % interval over scans]\n";
    for (name, estimate) in [
        ("AUROC", &mean.auroc),
        ("average precision", &mean.average_precision),
        ("oracle Dice", &mean.oracle_dice),
        ("Dice of the mask", &mean.dice),
        ("IoU of the mask", &mean.iou),
    ] {
        row(text, name, estimate);
    }
}

fn of_baselines(text: &mut String, evaluation: &Evaluation) {
    let maps = RankingMeans::of_maps(evaluation.scans.iter().filter_map(|s| s.voxels.as_ref()));
    let Some(maps) = maps.filter(|_| !evaluation.baselines.is_empty()) else { return };

    ranking_head(text, "the map and simple maps");
    ranking_row(text, "map", &maps);
    for Baseline { name, means, .. } in &evaluation.baselines {
        ranking_row(text, name, means);
    }
    for baseline in evaluation.baselines.iter().filter(|baseline| baseline.beats_the_map()) {
        let Baseline { name, means, map_average_precision } = baseline;
        _ = writeln!(
            text,
            "The {name} finds lesions better than the map: average precision {:.3} against \
             {map_average_precision:.3}.",
            means.average_precision
        );
    }
}

fn of_sources(text: &mut String, sources: &[Source]) {
    if sources.is_empty() {
        return;
    }
    ranking_head(text, "by source");
    for Source { source, means, n_lesions, n_found } in sources {
        ranking_row(text, source, means);
        text.pop();
        let found = format!("{n_found} of {n_lesions}");
        _ = writeln!(text, "  {found:>13} lesions found");
    }
}

fn ranking_head(text: &mut String, name: &str) {
    _ = writeln!(
        text,
        "\n{name:<28} {:>6} {:>6} {:>6} {:>11}",
        "scans", "AUROC", "AP", "oracle Dice"
    );
}

fn ranking_row(text: &mut String, name: &str, means: &RankingMeans) {
    let RankingMeans { n_scans, auroc, average_precision, oracle_dice } = means;
    _ = writeln!(
        text,
        "  {name:<26} {n_scans:>6} {auroc:>6.3} {average_precision:>6.3} {oracle_dice:>11.3}"
    );
}

fn of_voxels(text: &mut String, evaluation: &Evaluation) {
    if let Some(pooled) = &evaluation.pooled {
        let Pooled { auroc, average_precision, oracle_dice, dice, prevalence, .. } = pooled;
        _ = writeln!(
            text,
            "\nall voxels pooled: AUROC {auroc:.3}, AP {average_precision:.3}, oracle Dice \
             {oracle_dice:.3}, Dice of the masks {dice:.3}; lesions are {:.1} % of the brain",
            100.0 * prevalence
        );
    }
    if let Some(dice) = evaluation.global_oracle_dice {
        _ = writeln!(text, "mean Dice at the best single threshold: {dice:.3}");
    }
}

fn of_lesions(text: &mut String, evaluation: &Evaluation) {
    for class in evaluation.lesions.iter().filter(|class| class.n_lesions > 0) {
        let SizeClass { size, n_lesions, n_found } = class;
        _ = writeln!(text, "lesions {size}: {n_found} of {n_lesions} found");
    }
    _ = writeln!(text, "false regions per scan: {:.2}", evaluation.false_regions_per_scan);

    let sum = |of: fn(&Scan) -> usize| evaluation.scans.iter().map(of).sum::<usize>();
    let (n_normal, n_met) = (sum(|scan| scan.n_normal), sum(|scan| scan.n_normal_met));
    if n_normal > 0 {
        _ = writeln!(
            text,
            "normal hyperintensities: {n_met} of {n_normal} marked; regions on normal \
             hyperintensities per scan: {:.2}",
            evaluation.regions_on_normal_per_scan
        );
    }
}

fn of_froc(text: &mut String, froc: &FrocCurve) {
    _ = writeln!(
        text,
        "\nshare of lesions that regions of the map find, by false regions per scan\n\
         (regions of at least {MIN_REGION_MM3} mm3, at the best threshold that all scans share)"
    );
    let head: String = RATES.iter().map(|rate| format!("{rate:>7}")).collect();
    _ = writeln!(text, "  {:<26}{head}", "false regions, at most");

    for (class, ((size, ..), &n_lesions)) in SIZES.iter().zip(&froc.n_lesions).enumerate() {
        if n_lesions == 0 {
            continue;
        }
        let cell = |&rate: &f64| match froc.best(class, rate) {
            Some(n_found) => format!("{:>7.2}", n_found as f64 / n_lesions as f64),
            None => format!("{:>7}", "-"),
        };
        let cells: String = RATES.iter().map(cell).collect();
        _ = writeln!(text, "  {:<26}{cells}", format!("{size} ({n_lesions})"));
    }
}

fn of_patients(text: &mut String, patients: &Patients) {
    let ranking = match patients.ranked_by {
        "tail_probability" => "tail probability",
        _ => "score",
    };
    _ = writeln!(
        text,
        "\n{} scans with lesions against {} without, by {ranking}",
        patients.n_with_lesions, patients.n_healthy
    );
    row(text, "AUROC", &patients.auroc);
    row(text, "average precision", &patients.average_precision);
    if patients.auroc_by_tail_probability.is_some() {
        _ = writeln!(text, "  {:<20} {:.3}", "AUROC by score", patients.auroc_by_top1_mean);
    }
}

fn row(text: &mut String, name: &str, estimate: &Estimate) {
    let interval =
        estimate.interval.map_or(String::new(), |(low, high)| format!(" [{low:.3}, {high:.3}]"));
    _ = writeln!(text, "  {name:<20} {:.3}{interval}", estimate.value);
}
