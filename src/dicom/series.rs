//! Which files make a scan: files -> series -> stacks.
//!
//! UIDs say what belongs together, but anonymisers and archives repeat them and make them up. So
//! the places of the slices, and their pixels where two lie at one place, have the last word. Every
//! file is in a stack, or is left out of one and named in its notes.
//!
//! Numbers of headers are rounded. They are compared with a tolerance, and never rounded again,
//! because two equal values could then lie on both sides of an edge. docs/preprocessing.md has the
//! table.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

use super::header::{Component, Frame, Head};
use crate::{
    domain::{error::Refusal, left_alone::LeftAlone, patient::Patient},
    numeric::stack::{self, Plane, off_grid, places},
};

/// A series in several directions is a localiser if no direction has this many slices. The slices
/// of a localiser are few, 3 to about 15 in each direction. Clinical scans in thick slices have 18
/// or more.
pub const ENOUGH: usize = 16;

/// Fewer slices make no volume.
const MIN_SLICES: usize = 3;

/// Files that belong together.
#[derive(Debug)]
pub struct Series<'a> {
    /// Input and header of each file. Never empty.
    pub files: Vec<(usize, &'a Head)>,
    /// Why oddscan does not use the files.
    pub unwanted: Option<LeftAlone>,
    /// SeriesInstanceUIDs of the files. More than one were joined.
    pub n_joined: usize,
}

/// Parallel frames that belong to one image.
#[derive(Debug)]
pub struct Stack<'a> {
    /// Header of the first file. It holds what all files of the stack have in common.
    pub head: &'a Head,
    /// Each frame once.
    pub(super) slices: Vec<Slice<'a>>,
    /// Whether its series has slices in several directions, and not enough in any.
    pub(super) is_localiser: bool,
    /// SeriesInstanceUIDs that were joined.
    pub(super) n_joined: usize,
    /// All inputs of the stack, including copies.
    pub inputs: BTreeSet<usize>,
    /// Inputs of the series that belong to no stack. They share the fate of the largest one if that
    /// makes no volume.
    pub left_out: BTreeSet<usize>,
    /// What was joined and left out, a sentence each, for readers of the results.
    pub(super) notes: Vec<String>,
}

/// One frame.
#[derive(Debug, Clone, Copy)]
pub(super) struct Slice<'a> {
    pub(super) input: usize,
    /// Index of the frame in its file.
    pub(super) index: usize,
    pub(super) head: &'a Head,
    pub(super) frame: &'a Frame,
}

/// Reads the intensities of a frame: input, index in the file, slope and intercept.
type ReadFrame<'r> = dyn FnMut(usize, usize, [f64; 2]) -> Result<Vec<f32>, Refusal> + 'r;

/// Groups files by person and SeriesInstanceUID. Files that oddscan does not want are separated
/// from the others, also within one series.
///
/// Series of one or two files that are alike in all but their UID are joined: some anonymisers give
/// each slice a UID of its own.
pub fn series<'a>(files: &[(usize, &'a Head)]) -> Vec<Series<'a>> {
    let mut by_uid: BTreeMap<_, Vec<(usize, &'a Head)>> = BTreeMap::new();
    for &(input, head) in files {
        let key = (head.series_uid.as_str(), head.unwanted);
        by_uid.entry(key).or_default().push((input, head));
    }
    let of_uid = |((_, unwanted), files)| {
        let of_person = move |files| Series { files, unwanted, n_joined: 1 };
        of_each_person(files).into_iter().map(of_person)
    };
    join_small(by_uid.into_iter().flat_map(of_uid).collect())
}

/// Files without a name belong to the only person of their series. So do the slices of a few files
/// with another number or name, if they complete the stack of the others: somebody has corrected
/// or mistyped it in a part of the files. A second person would have a stack of their own.
fn of_each_person<'a>(files: Vec<(usize, &'a Head)>) -> Vec<Vec<(usize, &'a Head)>> {
    let mut of: BTreeMap<Option<&'a Patient>, Vec<(usize, &'a Head)>> = BTreeMap::new();
    for &(input, head) in &files {
        of.entry(head.person.as_ref()).or_default().push((input, head));
    }
    let largest = of.values().map(Vec::len).max().unwrap_or(0);
    let is_only = of.keys().flatten().count() < 2;
    let n_others = files.len() - largest;
    let are_few = n_others < ENOUGH && 4 * n_others <= files.len();
    if is_only || (are_few && is_one_stack(&files)) {
        return vec![files];
    }
    of.into_values().collect()
}

fn is_one_stack(files: &[(usize, &Head)]) -> bool {
    let frames = files.iter().flat_map(|(_, head)| &head.frames);
    let planes: Vec<Plane> = frames.map(|frame| frame.plane).collect();
    is_even(&planes, files[0].1)
}

/// Whether slices with such a header make one even stack.
fn is_even(planes: &[Plane], head: &Head) -> bool {
    stack::stack(planes, head.extents[1], &nominal_mm(head)).is_ok()
}

fn join_small(series: Vec<Series<'_>>) -> Vec<Series<'_>> {
    let (small, mut found): (Vec<_>, Vec<_>) = series.into_iter().partition(Series::is_small);

    let mut same: BTreeMap<_, Vec<Vec<Series<'_>>>> = BTreeMap::new();
    for one in small {
        let groups = same.entry(one.identity()).or_default();
        match groups.iter_mut().find(|group| group[0].resembles(&one)) {
            Some(group) => group.push(one),
            None => groups.push(vec![one]),
        }
    }

    for group in same.into_values().flatten() {
        let n_files: usize = group.iter().map(|one| one.files.len()).sum();
        if group.len() < 2 || n_files < MIN_SLICES {
            found.extend(group);
            continue;
        }
        let (unwanted, n_joined) = (group[0].unwanted, group.len());
        let files = group.into_iter().flat_map(|one| one.files).collect();
        found.push(Series { files, unwanted, n_joined });
    }
    found
}

impl<'a> Series<'a> {
    fn frames(&self) -> impl Iterator<Item = &'a Frame> {
        self.files.iter().flat_map(|(_, head)| &head.frames)
    }

    /// Whether the series has too few slices for a volume. The headers of unwanted and of faulty
    /// files have no frames.
    fn is_small(&self) -> bool {
        let planes: Vec<Plane> = self.frames().map(|frame| frame.plane).collect();
        if planes.is_empty() {
            return self.files.len() < MIN_SLICES;
        }
        places(&planes).len() < MIN_SLICES
    }

    /// What slices of one image have in common to the letter.
    fn identity(&self) -> impl Ord + use<'a> {
        let head = self.files[0].1;
        let acquisition = &head.acquisition;
        (
            (head.person.as_ref(), head.study_uid(), head.series_number),
            (acquisition.description.as_deref(), acquisition.protocol.as_deref()),
            (head.extents, self.unwanted),
        )
    }

    /// Whether timing, direction and size of pixels agree.
    fn resembles(&self, other: &Self) -> bool {
        let [a, b] = [self, other].map(|series| &series.files[0].1.acquisition);
        let agree = |a: Option<f64>, b: Option<f64>| match (a, b) {
            (Some(a), Some(b)) => is_same_time(a, b),
            (a, b) => a.is_none() && b.is_none(),
        };
        let is_parallel = match (self.frames().next(), other.frames().next()) {
            (Some(a), Some(b)) => a.plane.is_parallel_to(&b.plane),
            _ => true,
        };
        is_parallel
            && agree(a.echo_time_ms, b.echo_time_ms)
            && agree(a.repetition_time_ms, b.repetition_time_ms)
            && agree(a.inversion_time_ms, b.inversion_time_ms)
    }

    /// Slices that state nobody are of the others' person.
    fn n_people(&self) -> usize {
        let people = self.files.iter().filter_map(|(_, head)| head.person.as_ref());
        people.collect::<BTreeSet<_>>().len()
    }

    fn slices(&self) -> Vec<Slice<'a>> {
        let of_file = |&(input, head): &(usize, &'a Head)| {
            let frames = head.frames.iter().enumerate();
            frames.map(move |(index, frame)| Slice { input, index, head, frame })
        };
        self.files.iter().flat_map(of_file).collect()
    }
}

/// Whether two times of a sequence are the same, ms. Echoes of one sequence differ by 0.3 ms and
/// more; headers state 2.976 as 2.98.
fn is_same_time(a: f64, b: f64) -> bool {
    (a - b).abs() <= 0.02 + 1e-3 * a.abs().min(b.abs())
}

/// Splits the files of one series into stacks by echo, part of the complex signal, number and size
/// of pixels, direction, and place.
///
/// A slice at the place of another one with the same pixels is a copy and adds nothing. `read`
/// gets the pixels of such slices, two at a time.
///
/// Parts with fewer than half of the slices of the largest one are left out.
///
/// # Errors
/// If the pixels of two slices at one place cannot be read.
pub(super) fn stacks<'a>(
    series: &Series<'a>,
    read: &mut ReadFrame<'_>,
) -> Result<Vec<Stack<'a>>, Refusal> {
    let (mut parts, mut others) = (Vec::new(), Vec::new());
    for part in alike(series.slices()) {
        if part[0].frame.component == Component::Other {
            // No scan, so that copies do not matter.
            let (copies, notes) = (BTreeSet::new(), Vec::new());
            others.push(Part { slices: part, copies, n_places: 0, notes });
        } else {
            parts.extend(sort_out(part, read)?);
        }
    }

    let mut stacks = choose(parts);
    stacks.extend(others.into_iter().map(Part::stack));
    let used: BTreeSet<usize> = stacks.iter().flat_map(|stack| &stack.inputs).copied().collect();
    for stack in &mut stacks {
        stack.left_out.retain(|input| !used.contains(input));
        stack.n_joined = series.n_joined;
        if series.n_people() > 1 {
            stack.notes.push(
                "some slices state another patient than the others; they were kept together because \
                 they complete one stack. Check whose scan it is"
                    .to_owned(),
            );
        }
        if series.n_joined > 1 {
            stack.notes.push(format!(
                "the slices had {} SeriesInstanceUIDs; they were joined because all else agrees and \
                 they make one even stack",
                series.n_joined
            ));
        }
    }
    Ok(stacks)
}

/// Slices of one echo, part of the complex signal, number and size of pixels, and direction.
fn alike(slices: Vec<Slice<'_>>) -> Vec<Vec<Slice<'_>>> {
    let echoes = echoes(&slices);
    let mut found: BTreeMap<_, Vec<Vec<Slice<'_>>>> = BTreeMap::new();
    for (slice, echo) in slices.into_iter().zip(echoes) {
        let key = (echo, slice.frame.component, slice.head.extents);
        let parts = found.entry(key).or_default();
        let is_same =
            |part: &&mut Vec<Slice<'_>>| part[0].frame.plane.is_parallel_to(&slice.frame.plane);
        match parts.iter_mut().find(is_same) {
            Some(part) => part.push(slice),
            None => parts.push(vec![slice]),
        }
    }
    found.into_values().flatten().collect()
}

/// The number of each slice's echo, from 1. Slices that do not state their echo time belong to the
/// only echo of the series; if there are several, they are number 0.
fn echoes(slices: &[Slice<'_>]) -> Vec<usize> {
    let time = |slice: &Slice<'_>| slice.frame.echo_time_ms.filter(|time| time.is_finite());
    let mut times: Vec<f64> = slices.iter().filter_map(time).collect();
    times.sort_by(f64::total_cmp);
    let echoes: Vec<f64> =
        times.chunk_by(|a, b| is_same_time(*a, *b)).map(|echo| echo[echo.len() - 1]).collect();
    let number = |slice: &Slice<'_>| match time(slice) {
        Some(time) => 1 + echoes.partition_point(|&last| last < time),
        None => usize::from(echoes.len() == 1),
    };
    slices.iter().map(number).collect()
}

/// Slices that could make one volume.
struct Part<'a> {
    slices: Vec<Slice<'a>>,
    /// Inputs with copies of the slices.
    copies: BTreeSet<usize>,
    n_places: usize,
    notes: Vec<String>,
}

impl<'a> Part<'a> {
    fn plane(&self) -> &'a Plane {
        &self.slices[0].frame.plane
    }

    fn inputs(&self) -> BTreeSet<usize> {
        self.slices.iter().map(|slice| slice.input).chain(self.copies.iter().copied()).collect()
    }

    fn is_sound(&self) -> bool {
        is_even(&planes(&self.slices), self.slices[0].head)
    }

    fn stack(self) -> Stack<'a> {
        Stack {
            head: self.slices[0].head,
            is_localiser: false,
            n_joined: 1,
            inputs: self.inputs(),
            left_out: BTreeSet::new(),
            notes: self.notes,
            slices: self.slices,
        }
    }
}

pub(super) fn planes(slices: &[Slice<'_>]) -> Vec<Plane> {
    slices.iter().map(|slice| slice.frame.plane).collect()
}

/// Distances of slices that a header states, mm.
pub(super) fn nominal_mm(head: &Head) -> Vec<f64> {
    let stated = ["SpacingBetweenSlices", "SliceThickness"];
    stated.iter().filter_map(|key| head.facts.get(*key)?.as_f64()).collect()
}

/// The distance of slices that a header states beyond doubt, mm. The thickness of a slice is the
/// distance only in 3D, where slices have no gaps between them.
pub(super) fn stated_mm(head: &Head) -> Option<f64> {
    let number = |key: &str| head.facts.get(key)?.as_f64().filter(|&mm| mm > 0.0);
    let is_3d = head.acquisition.acquisition_type.as_deref() == Some("3D");
    let thickness = || number("SliceThickness").filter(|_| is_3d);
    number("SpacingBetweenSlices").or_else(thickness)
}

/// Drops slices that have place and pixels of another one. If a slice has other pixels, all stay,
/// because the part makes no volume then: empty images at the ends of a time series are equal, too.
/// The middle of the stack comes first, because a time series shows its differences there.
fn without_copies<'a>(
    slices: Vec<Slice<'a>>,
    read: &mut ReadFrame<'_>,
) -> Result<Part<'a>, Refusal> {
    let places = places(&planes(&slices));
    let n_places = places.len();
    let mut doubled: Vec<(usize, Vec<usize>)> =
        places.into_iter().enumerate().filter(|(_, at)| at.len() > 1).collect();
    doubled.sort_by_key(|(place, _)| place.abs_diff(n_places / 2));

    let mut pixels = |position: usize| {
        let Slice { input, index, frame, .. } = slices[position];
        read(input, index, frame.rescale)
    };
    let mut is_copy = vec![false; slices.len()];
    'all: for (_, at) in doubled {
        let first = pixels(at[0])?;
        for &other in &at[1..] {
            if pixels(other)? != first {
                is_copy.fill(false);
                break 'all;
            }
            is_copy[other] = true;
        }
    }

    let (copies, slices): (Vec<_>, Vec<_>) =
        slices.into_iter().zip(is_copy).partition(|(_, is_copy)| *is_copy);
    let copies = copies.into_iter().map(|(slice, _)| slice.input).collect();
    let slices = slices.into_iter().map(|(slice, _)| slice).collect();
    Ok(Part { slices, copies, n_places, notes: Vec::new() })
}

/// Splits alike slices into those that could make a volume each. One even stack is never split.
fn sort_out<'a>(
    slices: Vec<Slice<'a>>,
    read: &mut ReadFrame<'_>,
) -> Result<Vec<Part<'a>>, Refusal> {
    let mut of_space: BTreeMap<_, Vec<Slice<'a>>> = BTreeMap::new();
    for slice in &slices {
        let key = (slice.head.study_uid(), slice.head.frame_of_reference_uid());
        of_space.entry(key).or_default().push(*slice);
    }

    let mut of_series: BTreeMap<_, Vec<Slice<'a>>> = BTreeMap::new();
    for slice in &slices {
        of_series.entry(slice.head.told_series()).or_default().push(*slice);
    }

    let mut whole = without_copies(slices, read)?;
    if of_series.len() > 1 && whole.slices.len() > whole.n_places {
        // Other images at the same places, under other numbers or descriptions: an anonymiser has
        // given several series one UID.
        let parts: Result<Vec<Part<'a>>, Refusal> =
            of_series.into_values().map(|slices| without_copies(slices, read)).collect();
        let parts = parts?;
        if parts.iter().all(Part::is_sound) {
            return Ok(parts);
        }
    }
    if of_space.len() < 2 {
        return Ok(by_grid(whole));
    }
    if whole.is_sound() {
        whole.notes.push(format!(
            "the slices name {} studies or frames of reference; they were joined because they make \
             one even stack",
            of_space.len()
        ));
        return Ok(vec![whole]);
    }

    // A frame of reference that changes from slice to slice says nothing. Only stacks by themselves
    // are a reason to believe it.
    let parts: Result<Vec<Part<'a>>, Refusal> =
        of_space.into_values().map(|slices| without_copies(slices, read)).collect();
    let parts = parts?;
    let largest = parts.iter().max_by_key(|part| part.n_places);
    if largest.is_some_and(Part::is_sound) {
        return Ok(parts.into_iter().flat_map(by_grid).collect());
    }
    Ok(by_grid(whole))
}

/// Separates slices beside the even grid of the others.
fn by_grid(whole: Part<'_>) -> Vec<Part<'_>> {
    let head = whole.slices[0].head;
    let split = if whole.is_sound() {
        None
    } else {
        off_grid(&planes(&whole.slices), head.extents[1], &nominal_mm(head))
    };
    let Some((on, off)) = split else { return vec![whole] };

    let part = |positions: &[usize], copies, notes| {
        let slices: Vec<_> = positions.iter().map(|&position| whole.slices[position]).collect();
        Part { n_places: places(&planes(&slices)).len(), slices, copies, notes }
    };
    let rest = part(&off, BTreeSet::new(), Vec::new());
    // Half of a head beside other slices is not taken for the scan.
    if 2 * off.len() >= on.len() && !(rest.n_places >= ENOUGH && rest.is_sound()) {
        return vec![whole];
    }
    vec![part(&on, whole.copies.clone(), whole.notes.clone()), rest]
}

/// Decides which parts of a series are scans. The largest is one. Another part is one if it has at
/// least half as many slices, and [`ENOUGH`] if its direction is another one.
fn choose<'a>(parts: Vec<Part<'a>>) -> Vec<Stack<'a>> {
    let largest = parts.iter().enumerate().max_by_key(|(at, part)| (part.n_places, Reverse(*at)));
    let Some((main, largest)) = largest else { return Vec::new() };
    let (n_most, plane) = (largest.n_places, *largest.plane());
    let has_direction = |part: &Part<'_>| part.plane().has_directions_of(&plane);
    // A single reference slice beside a stack makes no localiser of it.
    let counts = |part: &&Part<'_>| n_most < MIN_SLICES || part.n_places >= MIN_SLICES;
    if n_most < ENOUGH && !parts.iter().filter(counts).all(has_direction) {
        let localiser = |part: Part<'a>| Stack { is_localiser: true, ..part.stack() };
        return parts.into_iter().map(localiser).collect();
    }

    let difference = |part: &Part<'_>| difference(part, largest);
    let (mut left_out, mut counts) = (BTreeSet::new(), BTreeMap::new());
    let mut is_scan = Vec::new();
    for (at, part) in parts.iter().enumerate() {
        let is_large = 2 * part.n_places >= n_most;
        is_scan.push(at == main || is_large && (has_direction(part) || part.n_places >= ENOUGH));
        if !is_scan[at] {
            left_out.extend(part.inputs());
            *counts.entry(difference(part)).or_insert(0) += part.slices.len();
        }
    }

    let note = |(what, n): (&str, usize)| {
        let slices = if n == 1 { "slice" } else { "slices" };
        let were = if n == 1 { "was" } else { "were" };
        format!("{n} {slices} {what} {were} left out of the scan, which has {n_most} slices")
    };
    let notes: Vec<String> = counts.into_iter().map(note).collect();
    let mut found = Vec::new();
    for (at, part) in parts.into_iter().enumerate().filter(|(at, _)| is_scan[*at]) {
        let mut stack = part.stack();
        if at == main {
            stack.left_out = std::mem::take(&mut left_out);
            stack.notes.extend(notes.iter().cloned());
        }
        found.push(stack);
    }
    found
}

/// What distinguishes the slices of a part from those of the largest one.
fn difference(part: &Part<'_>, largest: &Part<'_>) -> &'static str {
    let [one, other] = [part, largest].map(|part| part.slices[0]);
    let [echo, other_echo] = [one, other].map(|slice| slice.frame.echo_time_ms);
    let has_echo = echo.zip(other_echo).is_none_or(|(a, b)| is_same_time(a, b));
    let same_space = one.head.study_uid() == other.head.study_uid()
        && one.head.frame_of_reference_uid() == other.head.frame_of_reference_uid();
    if !one.frame.plane.has_directions_of(&other.frame.plane) {
        "of another direction"
    } else if one.head.extents != other.head.extents {
        "with another number of pixels"
    } else if !one.frame.plane.is_parallel_to(&other.frame.plane) {
        "with another size of pixels"
    } else if !has_echo {
        "of another echo time"
    } else if !same_space {
        "of another study or frame of reference"
    } else {
        "beside the even distances of the others"
    }
}
