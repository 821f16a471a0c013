//! The figures as the tables of `study.md`.

use std::collections::BTreeMap;

use oddscan::numeric::evaluation::{
    froc::FrocCounts,
    froc_curve::{CountedScan, FrocCurve},
    mean,
    sizes::{SIZES, by_size},
    sources::by_source,
};

use crate::{
    figures::{Figures, Outcome, RegionFigures, SHARES, means},
    left_out::{LeftOut, left_out},
    page::Page,
    variants::{DEFAULT, DEFAULT_MAP},
};

/// False regions per scan at which the tables of maps have a column.
const RATES: [f64; 4] = [2.0, 4.0, 8.0, 16.0];

/// The page with the sections that were measured.
pub(crate) fn page(outcomes: &[Outcome]) -> Page {
    let (maps, tokens): (Vec<&Outcome>, Vec<&Outcome>) =
        outcomes.iter().partition(|outcome| outcome.variant.map.is_some());
    let mut sections: Vec<String> = by_window(&tokens).into_iter().map(of_tokens).collect();
    sections.extend(tokens_left_out(&tokens));

    if !maps.is_empty() {
        sections.push(MAPS.to_owned());
        sections.extend(by_window(&maps).into_iter().map(of_maps));
        sections.extend(maps_left_out(outcomes, &maps));
    }
    Page { head: HEAD.to_owned(), sections }
}

/// One line about an outcome.
pub(crate) fn line(outcome: &Outcome) -> String {
    let Outcome { variant, window, scans, .. } = outcome;
    let found = match variant.map {
        None => format!("pooled {}   masks {}", three(pooled(outcome)), masks(outcome)),
        Some(_) => {
            let all = Group { scans: scans.values().collect(), thresholds: &outcome.thresholds };
            format!("lesions and false regions {}", all.found().join(" | "))
        }
    };
    format!("{window:<24} {:<46} {}   {found}", variant.name, three(means(scans.values())))
}

fn by_window<'a>(outcomes: &[&'a Outcome]) -> BTreeMap<&'a str, Vec<&'a Outcome>> {
    let mut windows: BTreeMap<&str, Vec<&Outcome>> = BTreeMap::new();
    for outcome in outcomes {
        windows.entry(&outcome.window).or_default().push(outcome);
    }
    windows
}

fn row(cells: impl IntoIterator<Item = String>) -> String {
    let cells: Vec<String> = cells.into_iter().collect();
    format!("| {} |\n", cells.join(" | "))
}

fn head(cells: &[&str]) -> String {
    row(cells.iter().map(|cell| (*cell).to_owned())) + &format!("|{}\n", "---|".repeat(cells.len()))
}

fn three([auroc, precision, dice]: [f64; 3]) -> String {
    format!("{auroc:.3} / {precision:.3} / {dice:.3}")
}

fn pooled(outcome: &Outcome) -> [f64; 3] {
    let (auroc, precision, dice) = outcome.pooled.unwrap_or((f64::NAN, f64::NAN, f64::NAN));
    [auroc, precision, dice]
}

/// The table of the settings of tokens in one window.
fn of_tokens((window, outcomes): (&str, Vec<&Outcome>)) -> String {
    let mut text = format!("## {window}\n") + &head(&["setting", "mean", "pooled", "masks"]);
    for outcome in outcomes {
        text += &row([
            outcome.variant.name.clone(),
            three(means(outcome.scans.values())),
            three(pooled(outcome)),
            masks(outcome),
        ]);
    }
    text
}

/// Mean Dice over scans with lesions and mean false-positive share over all, at each of [`SHARES`].
fn masks(outcome: &Outcome) -> String {
    let at = |index: usize| {
        let ill = outcome.scans.values().filter(|f| f.curve.is_some());
        let dice = mean(ill.map(|f| f.masks[index].0)).unwrap_or(f64::NAN);
        let measured = mean(outcome.scans.values().map(|f| f.masks[index].1)).unwrap_or(f64::NAN);
        format!("{dice:.3} ({:.2} %)", 100.0 * measured)
    };
    (0..SHARES.len()).map(at).collect::<Vec<_>>().join(", ")
}

fn tokens_left_out(outcomes: &[&Outcome]) -> Option<String> {
    let rows = left_out(outcomes, DEFAULT);
    let rows: String = rows.iter().map(|own| row(left_out_cells(own))).collect();
    (!rows.is_empty()).then(|| TOKENS_LEFT_OUT.to_owned() + &rows)
}

/// The tables of the maps in one window: over all scans, and by source.
fn of_maps((window, outcomes): (&str, Vec<&Outcome>)) -> String {
    let all = |outcome: &&Outcome| {
        let scans = outcome.scans.values().collect();
        let group = Group { scans, thresholds: &outcome.thresholds };
        row([outcome.variant.name.clone()].into_iter().chain(group.cells()))
    };
    let scans = &outcomes[0].scans;
    let n_ill = scans.values().filter(|scan| scan.curve.is_some()).count();
    let mut text = format!("## Maps: {window}\n{} scans, {n_ill} with lesions:\n\n", scans.len());
    text += &head(&[&["map"], &COLUMNS[..]].concat());
    text.extend(outcomes.iter().map(all));

    let sources: Vec<String> = outcomes.iter().flat_map(|outcome| source_rows(outcome)).collect();
    if sources.is_empty() {
        text += "\nAll scans with lesions are of one source.\n";
    } else {
        text += "\nBy source, over its scans with lesions:\n\n";
        text += &head(&[&["map", "source"], &COLUMNS[..]].concat());
        text.extend(sources);
    }
    text
}

fn source_rows(outcome: &Outcome) -> Vec<String> {
    let ill = outcome.scans.iter().filter(|(_, own)| own.curve.is_some());
    let sources = by_source(ill.map(|(stem, own)| (stem.as_str(), own)));
    let source = |(source, scans): (&str, Vec<&Figures>)| {
        let name = format!("{source} ({})", scans.len());
        let group = Group { scans, thresholds: &outcome.thresholds };
        row([outcome.variant.name.clone(), name].into_iter().chain(group.cells()))
    };
    sources.into_iter().map(source).collect()
}

/// What [`Group::cells`] holds.
const COLUMNS: [&str; 9] = [
    "AUROC / AP / oracle Dice",
    "below 100 mm³",
    "100 to 1000 mm³",
    "above 1000 mm³",
    "false regions",
    "at 2",
    "at 4",
    "at 8",
    "at 16",
];

/// Some scans of a window under one variant.
struct Group<'a> {
    scans: Vec<&'a Figures>,
    /// Those at which the regions of the scans were counted.
    thresholds: &'a [f32],
}

impl Group<'_> {
    fn cells(&self) -> Vec<String> {
        let mut cells = vec![three(means(self.scans.iter().copied()))];
        cells.extend(self.found());
        cells.extend(self.froc());
        cells
    }

    fn regions(&self) -> impl Iterator<Item = &RegionFigures> {
        self.scans.iter().filter_map(|scan| scan.regions.as_ref())
    }

    /// Lesions that the mask finds, by size, and its false regions per scan.
    fn found(&self) -> Vec<String> {
        let lesions = lesions(&self.scans);
        let all = by_size(lesions.iter().map(|(volume, _)| *volume));
        let found = lesions.iter().filter(|(_, found)| *found);
        let found = by_size(found.map(|(volume, _)| *volume));
        let of = |(found, all): (usize, usize)| format!("{found} of {all}");
        let mut cells: Vec<String> = found.into_iter().zip(all).map(of).collect();

        let n_false: usize = self.regions().map(|own| own.n_false).sum();
        cells.push(format!("{:.1}", n_false as f64 / self.scans.len() as f64));
        cells
    }

    /// Share of the lesions of each size that regions find, at each of [`RATES`].
    fn froc(&self) -> Vec<String> {
        let volumes = |own: &RegionFigures| own.lesions.iter().map(|lesion| lesion.0).collect();
        let volumes: Vec<Vec<f64>> = self.regions().map(volumes).collect();
        let counts: Vec<FrocCounts> = self.regions().map(RegionFigures::counts).collect();
        let counted: Vec<CountedScan<'_>> = volumes
            .iter()
            .zip(&counts)
            .map(|(volumes_mm3, counts)| CountedScan { volumes_mm3, counts })
            .collect();

        let curve = FrocCurve::of(&counted, self.thresholds);
        let share = |curve: &FrocCurve, class: usize, rate| {
            let n_found = curve.best(class, rate)?;
            let n_lesions = curve.n_lesions[class];
            (n_lesions > 0).then(|| format!("{:.2}", n_found as f64 / n_lesions as f64))
        };
        let cell = |&rate: &f64| {
            let share = |class| share(curve.as_ref()?, class, rate);
            let shares = (0..SIZES.len()).map(|class| share(class).unwrap_or("-".to_owned()));
            shares.collect::<Vec<_>>().join(" / ")
        };
        RATES.iter().map(cell).collect()
    }
}

/// Volume of each lesion of some scans, mm^3, and whether the mask meets it.
fn lesions(scans: &[&Figures]) -> Vec<(f64, bool)> {
    let regions = scans.iter().filter_map(|scan| scan.regions.as_ref());
    regions.flat_map(|own| own.lesions.iter().copied()).collect()
}

/// One table for all windows. The other sources of the same window choose, among all variants.
/// `None` if the default map was not measured.
fn maps_left_out(outcomes: &[Outcome], maps: &[&Outcome]) -> Option<String> {
    let mut rows = String::new();
    for window in by_window(maps).into_keys() {
        let own: Vec<&Outcome> = outcomes.iter().filter(|own| own.window == window).collect();
        for source in left_out(&own, DEFAULT_MAP) {
            rows += &row([window.to_owned()].into_iter().chain(left_out_cells(&source)));
        }
    }
    (!rows.is_empty()).then(|| MAPS_LEFT_OUT.to_owned() + &rows)
}

fn left_out_cells(LeftOut { source, best, default_here }: &LeftOut<'_>) -> [String; 5] {
    let figure = |value: f64| format!("{value:.3}");
    let [name, elsewhere, here] = match best {
        Some(best) => [best.name.to_owned(), figure(best.elsewhere), figure(best.here)],
        None => ["no other source".to_owned(), "-".to_owned(), "-".to_owned()],
    };
    [(*source).to_owned(), name, elsewhere, here, figure(*default_here)]
}

const TOKENS_LEFT_OUT: &str = "## One source left out
Each source of scans with lesions is left out in turn. *Best elsewhere* is the setting with the highest mean
average precision on the other sources, where each window counts alike. The other columns give average
precision: of that setting on the others, of that setting on the source left out, and of the default there.\n
| left out | best elsewhere | there | on the source left out | default on it |
|---|---|---|---|---|
";

const MAPS: &str = "## Maps
What does each kind of evidence add? [Intensities beside tokens](evidence.md) says how a map joins them. All maps
here are of tokens of the shipped encoding: every second slice, without patches that hold no brain.\n
- *default*: tokens, brightness and range with the default weights, faded towards the rim of the brain.
- *without ...*, *not faded*: the default with one part switched off. Where its weight is 0 anyway, such as that of
  brightness in T1w, the row repeats the default.
- *tokens alone*: `[evidence]` all 0. *Brightness alone*: the intensities in cells of 1.6 mm, not faded.
- *deviation*: the distance of these intensities from the median of the other scans at the same place.
- *AUROC / AP / oracle Dice*: the mean over scans with lesions. AP is average precision.
- The columns of sizes count the lesions that the mask finds: it covers at least one of their voxels. *False regions*
  are regions of the mask that touch no lesion, per scan. The mask is that of the product: its threshold, its smallest
  region, and no mask where nothing stands out. With tokens alone, and with the deviation, every scan has a mask. Where
  brightness counts, the mask has smaller regions.
- *at 2* to *at 16*: share of the lesions of the three sizes that regions of at least 30 mm³ find, with at most so
  many false regions per scan, by one height of the map for all scans of the row (free-response ROC). At low heights
  regions merge, and one that covers much of the brain finds all that it touches. So a map that finds more at 4 than
  it should, like *brightness alone* on T1, only has large regions.
";

const MAPS_LEFT_OUT: &str = "## Maps: one source left out
Each source of scans with lesions is left out in turn. *Best elsewhere* is, among all variants of the run, the one
with the highest mean average precision on the other sources of the same window. The weights belong to a sequence, so
that other windows do not count. The other columns give average precision, as under *One source left out*.\n
| window | left out | best elsewhere | there | on the source left out | default map on it |
|---|---|---|---|---|---|
";

const HEAD: &str = "# Every setting that was tried\n
[How the defaults were chosen](defaults.md) explains what these tables show. The first tables are of tokens alone, and
the first row of each is the default. Every other row changes in it what its name says. The rows called *plain* follow
the paper with block 9: views joined, 14 slices per token, projected to 128 channels, not smoothed, K = 30 %, no
positional correction, whole volume searched. The tables of *maps* add intensities.\n
- *mean*: AUROC / average precision / oracle Dice, the mean over scans with lesions.
- *pooled*: the same over all voxels of the window.
- *masks*: Dice of the mask (measured false-positive rate) at stated rates of 0.5, 1, 2 and 3 %.
- *place share*: strength of the positional correction; *not levelled*: without it.
";
