use std::collections::BTreeSet;

use super::*;
use crate::numeric::{projection::Normal, scoring::mutual_scores};

const N_SCANS: usize = 30;
const N_TOKENS: usize = 120;
const WIDTH: usize = 12;
const LESION_TOKENS: usize = 5;
const SEEDS: std::ops::Range<u64> = 0..6;

fn keep() -> Fraction {
    Fraction::new(0.3).unwrap()
}

fn find(window: &[NearestDistances]) -> CommunityFinding {
    find_communities(window, keep(), &CommunitySettings::default())
}

/// Scans with one vector per cell, the same in all scans, plus noise for each scan and token.
struct Lab {
    random: Normal,
    /// `[n_scans][n_tokens][WIDTH]`
    scans: Vec<Vec<Vec<f64>>>,
    /// (scan, token) of the lesion.
    lesion: BTreeSet<(usize, usize)>,
}

impl Lab {
    fn new(seed: u64) -> Self {
        let mut random = Normal::new(seed);
        let cells: Vec<Vec<f64>> = (0..N_TOKENS).map(|_| vector(&mut random, 1.0)).collect();
        let mut scans = Vec::new();
        for _ in 0..N_SCANS {
            let shift = vector(&mut random, 0.2);
            let noisy = |cell: &Vec<f64>| sum(&sum(cell, &shift), &vector(&mut random, 0.5));
            scans.push(cells.iter().map(noisy).collect());
        }
        Self { random, scans, lesion: BTreeSet::new() }
    }

    /// Some scans of the window, ascending.
    fn draw(&mut self, share: f64) -> Vec<usize> {
        let n = (share * N_SCANS as f64).round() as usize;
        let drawn = distinct(&mut self.random, n, N_SCANS);
        drawn.into_iter().collect()
    }

    /// The same few vectors, far from all others, at random cells of each of the `carriers`.
    fn with_lesion(mut self, carriers: &[usize]) -> Self {
        let vectors: Vec<_> = (0..LESION_TOKENS).map(|_| far_vector(&mut self.random)).collect();
        for &scan in carriers {
            let cells = distinct(&mut self.random, LESION_TOKENS, N_TOKENS);
            for (token, lesion) in cells.into_iter().zip(&vectors) {
                self.scans[scan][token] = sum(lesion, &vector(&mut self.random, 0.2));
                self.lesion.insert((scan, token));
            }
        }
        self
    }

    /// A shift, and a change of each cell, that all tokens of `scans` share.
    fn with_scanner(mut self, scans: &[usize]) -> Self {
        let shift = vector(&mut self.random, 0.6);
        for token in 0..N_TOKENS {
            let change = sum(&shift, &vector(&mut self.random, 0.4));
            for &scan in scans {
                self.scans[scan][token] = sum(&self.scans[scan][token], &change);
            }
        }
        self
    }

    fn window(&self) -> Vec<NearestDistances> {
        self.window_without(&vec![Vec::new(); self.scans.len()])
    }

    /// Distances to the tokens that are not excluded.
    fn window_without(&self, excluded: &[Vec<usize>]) -> Vec<NearestDistances> {
        let n_scans = self.scans.len();
        let columns = |scan: usize| {
            let to = |other: usize| {
                column_by_hand(&self.scans[scan], &self.scans[other], &excluded[other])
            };
            others(scan, n_scans).map(to).collect()
        };
        (0..n_scans).map(|s| NearestDistances::new(self.scans[s].len(), columns(s))).collect()
    }

    /// Scores of the lesion's tokens, and of all others in ascending order.
    fn scores(&self, window: &[NearestDistances]) -> (Vec<f32>, Vec<f32>) {
        let (mut sick, mut healthy) = (Vec::new(), Vec::new());
        for (scan, nearest) in window.iter().enumerate() {
            for (token, score) in mutual_scores(nearest, keep()).into_iter().enumerate() {
                let is_lesion = self.lesion.contains(&(scan, token));
                if is_lesion { &mut sick } else { &mut healthy }.push(score.unwrap());
            }
        }
        healthy.sort_unstable_by(f32::total_cmp);
        (sick, healthy)
    }
}

fn vector(random: &mut Normal, size: f64) -> Vec<f64> {
    (0..WIDTH).map(|_| size * random.next()).collect()
}

/// Three times as long as a cell's vector on average, in a random direction.
fn far_vector(random: &mut Normal) -> Vec<f64> {
    let direction = vector(random, 1.0);
    let length = direction.iter().map(|x| x * x).sum::<f64>().sqrt();
    direction.iter().map(|x| x / length * 3.0 * (WIDTH as f64).sqrt()).collect()
}

fn sum(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

fn distinct(random: &mut Normal, n: usize, below: usize) -> BTreeSet<usize> {
    let mut drawn = BTreeSet::new();
    while drawn.len() < n {
        drawn.insert((random.uniform() * below as f64) as usize);
    }
    drawn
}

fn column_by_hand(from: &[Vec<f64>], to: &[Vec<f64>], excluded: &[usize]) -> Vec<f32> {
    let candidates: Vec<&Vec<f64>> =
        to.iter().enumerate().filter(|(t, _)| !excluded.contains(t)).map(|(_, v)| v).collect();
    let distance = |a: &[f64], b: &[f64]| -> f64 {
        a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>()
    };
    let nearest = |a: &Vec<f64>| {
        candidates.iter().map(|b| distance(a, b)).fold(f64::INFINITY, f64::min).sqrt() as f32
    };
    from.iter().map(nearest).collect()
}

/// Share of all tokens of the window.
fn excluded_share(finding: &CommunityFinding) -> f64 {
    let excluded: usize = finding.excluded_tokens(N_SCANS).iter().map(Vec::len).sum();
    excluded as f64 / (N_SCANS * N_TOKENS) as f64
}

fn assert_recovers(lab: &Lab, carriers: &[usize], what: &str) {
    let window = lab.window();
    let (sick, healthy) = lab.scores(&window);
    let mean = sick.iter().sum::<f32>() / sick.len() as f32;
    let middle = healthy[healthy.len() / 2];
    assert!(mean < middle, "{what}: the lesion must be hidden at first: {mean} >= {middle}");

    let finding = find(&window);
    let suspects: Vec<_> = finding.suspects.iter().map(|s| &s.members[..]).collect();
    assert_eq!(suspects, [carriers], "{what}");
    let excluded = finding.excluded_tokens(N_SCANS);
    let missed = lab.lesion.iter().filter(|(s, t)| !excluded[*s].contains(t)).count();
    assert_eq!(missed, 0, "{what}: lesion tokens that stay candidates");
    let n_excluded: usize = excluded.iter().map(Vec::len).sum();
    // A quantile of 0.99 also excludes about 1 % of the healthy tokens of the carriers.
    let n_healthy = n_excluded - lab.lesion.len();
    assert!(n_healthy <= carriers.len() * N_TOKENS * 2 / 100, "{what}: {n_healthy} healthy tokens");

    let (sick, healthy) = lab.scores(&lab.window_without(&excluded));
    let limit = healthy[healthy.len() * 99 / 100];
    let lowest = sick.iter().copied().fold(f32::INFINITY, f32::min);
    assert!(lowest > limit, "{what}: {lowest} <= {limit}");
}

#[test]
fn a_lesion_in_three_of_ten_scans_is_found_and_scores_again() {
    for seed in SEEDS {
        let mut lab = Lab::new(seed);
        let carriers = lab.draw(0.3);
        assert_recovers(&lab.with_lesion(&carriers), &carriers, &format!("seed {seed}"));
    }
}

#[test]
fn a_scanner_group_does_not_hide_the_lesion() {
    for seed in SEEDS {
        let mut lab = Lab::new(seed);
        let (group, carriers) = (lab.draw(0.2), lab.draw(0.3));
        let lab = lab.with_scanner(&group).with_lesion(&carriers);
        assert_recovers(&lab, &carriers, &format!("seed {seed}"));
    }
}

#[test]
fn a_patient_seen_twice_does_not_hide_the_lesion() {
    let mut lab = Lab::new(1);
    let carriers: Vec<usize> = lab.draw(0.3);
    let mut lab = lab.with_lesion(&carriers);
    // Two healthy scans with the same anatomy, one of them with a little noise.
    let mut healthy = (0..N_SCANS).filter(|scan| !carriers.contains(scan));
    let (twin, other) = (healthy.next().unwrap(), healthy.next().unwrap());
    lab.scans[other] = lab.scans[twin].clone();
    for token in &mut lab.scans[other] {
        token[0] += 0.01;
    }
    assert_recovers(&lab, &carriers, "near twins");
    lab.scans[other] = lab.scans[twin].clone();
    assert_recovers(&lab, &carriers, "a copy");
}

#[test]
fn a_clean_window_is_left_alone() {
    for seed in SEEDS {
        let finding = find(&Lab::new(seed).window());
        assert_eq!(finding.suspects, [], "seed {seed}");
        assert!(finding.n_links > 0, "seed {seed}: there must be links to judge");
        assert_eq!(finding.excluded_tokens(N_SCANS), vec![Vec::<usize>::new(); N_SCANS]);
    }
}

#[test]
fn a_scanner_group_loses_no_tokens() {
    for (seed, share) in SEEDS.flat_map(|seed| [0.15, 0.2, 0.3, 0.4].map(|share| (seed, share))) {
        let mut lab = Lab::new(seed);
        let group = lab.draw(share);
        let finding = find(&lab.with_scanner(&group).window());
        assert!(excluded_share(&finding) < 0.002, "seed {seed}, {share}: {:?}", finding.suspects);
    }
}

#[test]
fn a_community_that_differs_everywhere_is_reported_and_not_filtered() {
    let settings = CommunitySettings { level_pairs: false, ..CommunitySettings::default() };
    let mut n_reported = 0;
    for seed in SEEDS {
        let mut lab = Lab::new(seed);
        let group = lab.draw(0.2);
        let window = lab.with_scanner(&group).window();
        let finding = find_communities(&window, keep(), &settings);
        n_reported += finding.suspects.iter().filter(|s| s.over_share > 0.5).count();
        assert_eq!(excluded_share(&finding), 0.0, "seed {seed}");
    }
    assert!(n_reported >= 3, "{n_reported}");
}

#[test]
fn the_order_of_the_scans_does_not_matter() {
    let mut lab = Lab::new(3);
    let carriers = lab.draw(0.3);
    let mut lab = lab.with_lesion(&carriers);
    let forward = find(&lab.window());
    lab.scans.reverse();
    let mut mirrored = find(&lab.window()).excluded_tokens(N_SCANS);
    mirrored.reverse();
    assert_eq!(mirrored, forward.excluded_tokens(N_SCANS));
    assert!(!forward.suspects.is_empty());
}

#[test]
fn columns_that_are_not_due_do_not_change() {
    let mut lab = Lab::new(2);
    let carriers = lab.draw(0.3);
    let lab = lab.with_lesion(&carriers);
    let window = lab.window();
    let excluded = find(&window).excluded_tokens(N_SCANS);
    let masked = lab.window_without(&excluded);
    let due = due_columns(&window, &excluded);
    assert!(due.is_sorted());
    let (mut n_changed, mut n_columns) = (0, 0);
    for scan in 0..N_SCANS {
        for other in others(scan, N_SCANS) {
            let changed = column(&window, scan, other) != column(&masked, scan, other);
            assert!(!changed || due.contains(&(scan, other)), "{scan} to {other}");
            n_changed += usize::from(changed);
            n_columns += usize::from(!excluded[other].is_empty());
        }
    }
    assert!(n_changed > 0 && due.len() < n_columns, "{n_changed} {} {n_columns}", due.len());
    assert!(due.iter().all(|(_, other)| carriers.contains(other)));
    assert_eq!(due_columns(&window, &vec![Vec::new(); N_SCANS]), []);
}

#[test]
fn due_columns_worked_by_hand() {
    // Scan 1 loses its token 1, which lies 3 from scan 0 and 5 from scan 2. Only scan 0 has a token
    // as far from scan 1 as that. The token without candidates in reach cannot lose one.
    let window = [
        NearestDistances::new(2, vec![vec![1.0, 3.0], vec![9.0, 9.0]]),
        NearestDistances::new(2, vec![vec![1.0, 3.0], vec![4.0, 5.0]]),
        NearestDistances::new(3, vec![vec![9.0; 3], vec![4.0, 4.9, f32::INFINITY]]),
    ];
    assert_eq!(due_columns(&window, &[vec![], vec![1], vec![]]), [(0, 1)]);
    assert_eq!(due_columns(&window, &[vec![], vec![0, 1], vec![]]), [(0, 1), (2, 1)]);
}

/// Five scans; only the first has tokens that matter, with these distances to the others.
fn first_scan(rows: &[[f32; 4]]) -> Vec<NearestDistances> {
    let columns = (0..4).map(|column| rows.iter().map(|row| row[column]).collect()).collect();
    let mut window = vec![NearestDistances::new(rows.len(), columns)];
    window.extend((0..4).map(|_| NearestDistances::new(0, vec![Vec::new(); 4])));
    window
}

#[test]
fn endurance_ratios_worked_by_hand() {
    let rows = [
        [8.0, 2.0, 6.0, 4.0],
        // Its reference is below the median.
        [1.0, 1.0, 2.0, 5.0],
        // Only two matches, less than the rank.
        [9.0, f32::INFINITY, 9.0, f32::INFINITY],
        [2.0, 3.0, 4.0, 3.0],
    ];
    let window = first_scan(&rows);
    let half = Fraction::new(0.5).unwrap();
    let levelled = Levelled::new(&window, false);
    let mut links = scan_links(&levelled, 0, 3, half);
    links.sort_unstable_by(Link::order);
    // Third smallest of the first token: 6; references 6, 2, none, 3: the median is 3.
    let link = |ratio, near| Link { ratio, scan: 0, token: 0, near };
    assert_eq!(links, [link(2.0 / 6.0, 2), link(4.0 / 6.0, 4)]);
}

#[test]
fn a_pair_that_lies_near_everywhere_has_high_endurance_ratios() {
    // The first other scan is at a tenth of the distance of the rest, like a follow-up scan.
    let rows = [[0.1, 1.0, 1.0, 1.0], [0.2, 2.0, 2.0, 2.0], [0.3, 3.0, 3.0, 3.0]];
    let window = first_scan(&rows);
    let third = Fraction::new(0.1).unwrap();
    let lowest = |level| {
        let links = scan_links(&Levelled::new(&window, level), 0, 3, third);
        links.iter().map(|link| link.ratio).fold(f64::INFINITY, f64::min)
    };
    assert!((lowest(false) - 0.1).abs() < 1e-6, "{}", lowest(false));
    assert!((lowest(true) - 1.0).abs() < 1e-6, "{}", lowest(true));
}

#[test]
fn a_copy_levels_nothing() {
    assert_eq!(positive_median(&[0.0, 0.0, 0.0, 5.0]), None);
    assert_eq!(positive_median(&[f32::INFINITY, 3.0, 0.0, 2.0]), Some(2.0));
    assert_eq!(positive_median(&[f32::INFINITY]), None);
}

#[test]
fn the_reference_lies_beyond_the_distances_that_are_averaged() {
    let settings = CommunitySettings::default();
    let rank = |n_others, share| reference_rank(n_others, Fraction::new(share).unwrap(), &settings);
    assert_eq!([rank(29, 0.1), rank(29, 0.3), rank(29, 0.5), rank(29, 1.0)], [9, 10, 16, 29]);
}

#[test]
fn links_end_when_enough_scans_have_sent_one() {
    let link = |scan| Link { ratio: 0.0, scan, token: 0, near: 9 };
    let links = [0, 0, 3, 0, 1, 2].map(link);
    let of = |share| n_until_covered(&links, 4, Fraction::new(share).unwrap());
    assert_eq!([of(0.25), of(0.5), of(0.75), of(1.0)], [1, 3, 5, 6]);
    assert_eq!(n_until_covered(&links, 5, Fraction::new(1.0).unwrap()), 6);
}

#[test]
fn an_outlier_is_measured_against_the_others_only() {
    let settings = CommunitySettings { iqr_factor: 2.0, min_iqr: 1.0, ..Default::default() };
    // Quartiles of 1, 2, 3, 4, 5: 2 and 4, fence 8.
    let with = |own: f64| [1.0, 2.0, own, 3.0, 4.0, 5.0];
    assert!(!stands_out(&with(8.0), 2, &settings));
    assert!(stands_out(&with(8.1), 2, &settings));
    // All others equal: the range counts as one link.
    assert!(!stands_out(&[0.0, 0.0, 2.0], 2, &settings));
    assert!(stands_out(&[0.0, 0.0, 2.1], 2, &settings));
    // Three dense communities are three kinds of scan.
    assert!(!(0..3).any(|index| stands_out(&[9.0, 10.0, 8.0], index, &settings)));
    assert!(!stands_out(&[9.0], 0, &settings));
}

#[test]
fn the_resolution_is_what_links_of_usual_scans_weigh() {
    let settings = CommunitySettings::default();
    let mut weights = Weights::new(5);
    // Three of five scans share a lesion: all weights above 0 but one are theirs.
    for (a, b, weight) in [(0, 1, 10.0), (0, 2, 10.0), (1, 2, 10.0), (3, 4, 2.0)] {
        weights.add(a, b, weight);
    }
    assert_eq!(resolution(&weights, &settings), 2.0);
    assert_eq!(leiden::communities(&weights, 2.0)[0], [0, 1, 2]);
    assert_eq!(resolution(&Weights::new(5), &settings), 1.0);
}

#[test]
fn a_scan_alone_weighs_its_strongest_link() {
    let mut weights = Weights::new(4);
    weights.add(0, 1, 3.0);
    weights.add(0, 2, 2.0);
    assert_eq!(density(&weights, &[2]), 2.0);
    assert_eq!(density(&weights, &[3]), 0.0);
    assert_eq!(density(&weights, &[0, 1, 2]), 5.0 / 3.0);
}

#[test]
fn quantiles_are_interpolated() {
    let at = |share| quantile(&mut [4.0, 1.0, 3.0, 2.0], Fraction::new(share).unwrap());
    assert_eq!([at(0.25), at(0.5), at(1.0)], [Some(1.75), Some(2.5), Some(4.0)]);
    assert_eq!(quantile(&mut [], Fraction::new(0.5).unwrap()), None);
}

#[test]
fn means_of_the_smallest_worked_by_hand() {
    let mean = |values: &[f64], n| mean_of_smallest(&mut values.to_vec(), n);
    assert_eq!(mean(&[5.0, 1.0, 3.0], 2), Some(2.0));
    assert_eq!(mean(&[5.0, 1.0], 4), Some(3.0));
    assert_eq!(mean(&[], 4), None);
}

#[test]
fn small_and_empty_windows_have_nothing_to_find() {
    for n_scans in 0..7_usize {
        let columns = vec![vec![1.0, 2.0]; n_scans.saturating_sub(1)];
        let window = vec![NearestDistances::new(2, columns); n_scans];
        let finding = find(&window);
        assert_eq!(finding.suspects, [], "{n_scans}");
        assert_eq!(finding.communities.concat().len(), n_scans);
        assert_eq!(due_columns(&window, &vec![Vec::new(); n_scans]), []);
    }
}

#[test]
fn tokens_without_any_match_say_nothing() {
    let columns = vec![vec![f32::INFINITY; 3]; 9];
    let finding = find(&vec![NearestDistances::new(3, columns); 10]);
    assert_eq!((finding.n_links, finding.suspects.len()), (0, 0));
    assert_eq!(finding.communities.len(), 10);
}

#[test]
fn a_lesion_in_two_scans_is_no_community() {
    let lab = Lab::new(5).with_lesion(&[3, 17]);
    let window = lab.window();
    assert_eq!(find(&window).suspects, []);
    let settings = CommunitySettings { min_scans: 2, ..Default::default() };
    assert_eq!(find_communities(&window, keep(), &settings).suspects[0].members, [3, 17]);
}

#[test]
fn half_of_the_window_is_no_anomaly() {
    let mut lab = Lab::new(4);
    // Rank 20 of 29, so that a lesion in 15 of 30 scans burns out at all.
    let settings =
        CommunitySettings { reference_rank: Fraction::new(0.68).unwrap(), ..Default::default() };
    let carriers = lab.draw(0.5);
    let window = lab.with_lesion(&carriers).window();
    let finding = find_communities(&window, keep(), &settings);
    assert!(finding.communities.contains(&carriers), "{:?}", finding.communities);
    assert_eq!(finding.suspects, []);
    let settings = CommunitySettings { max_scan_share: Fraction::new(0.6).unwrap(), ..settings };
    assert_eq!(find_communities(&window, keep(), &settings).suspects[0].members, carriers);
}

/// Windows and what the reference in Python finds in them (`tests/reference/make_community.py`).
mod reference {
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct Fixture {
        windows: Vec<Case>,
    }

    #[derive(Deserialize)]
    struct Case {
        name: String,
        /// `[scan][token][width]`
        tokens: Vec<Vec<Vec<f64>>>,
        n_links: usize,
        suspects: Vec<Expected>,
        /// `[scan][token]`, with what is shared left out of the candidates.
        scores: Vec<Vec<f32>>,
    }

    #[derive(Deserialize)]
    struct Expected {
        members: Vec<usize>,
        mean_inner_weight: f64,
        over_share: f64,
        excluded: Vec<Vec<usize>>,
    }

    #[test]
    fn finds_what_the_reference_finds() {
        let text = include_str!("../../../tests/fixtures/community.json");
        let Fixture { windows } = serde_json::from_str(text).unwrap();
        assert_eq!(windows.iter().filter(|case| case.suspects.is_empty()).count(), 2);
        for Case { name, tokens, n_links, suspects, scores } in windows {
            let n_scans = tokens.len();
            let lab = Lab { random: Normal::new(0), scans: tokens, lesion: BTreeSet::new() };
            let found = find(&lab.window());
            assert_eq!(found.n_links, n_links, "{name}");
            assert_eq!(found.suspects.len(), suspects.len(), "{name}");
            for (suspect, expected) in found.suspects.iter().zip(&suspects) {
                assert_eq!(suspect.members, expected.members, "{name}");
                assert_eq!(suspect.excluded, expected.excluded, "{name}");
                assert!((suspect.mean_inner_weight - expected.mean_inner_weight).abs() < 1e-9);
                assert!((suspect.over_share - expected.over_share).abs() < 1e-9, "{name}");
            }
            let window = lab.window_without(&found.excluded_tokens(n_scans));
            for (nearest, expected) in window.iter().zip(&scores) {
                for (score, expected) in mutual_scores(nearest, keep()).iter().zip(expected) {
                    assert!((score.unwrap() - expected).abs() < 2e-3, "{name}");
                }
            }
        }
    }
}
