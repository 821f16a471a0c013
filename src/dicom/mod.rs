//! Converts DICOM series to volumes. Only this module knows dicom-rs.
//!
//! Files arrive in any order and under any name; their headers say which belong together
//! ([`series()`]). A series may hold several images (echoes, magnitude and phase, directions). Each
//! of them is a separate [`Stack`].
//!
//! A hostile file can make a codec panic or ask for all memory. So the daemon calls this module in
//! a separate process (`cli::dicom`, `process::convert`).

mod codestream;
mod elements;
#[cfg(test)]
mod encodings;
mod faults;
mod header;
mod open;
mod pixels;
mod series;
pub mod unzip;
mod values;

use std::{
    collections::BTreeMap,
    io::{self, Read},
};

use serde_json::{Map, Value, json};

use crate::{
    domain::{
        error::{
            QuarantineReason::{self, BadHeader, Io, NonFinite, TooLarge, Unsupported},
            Refusal,
        },
        left_alone::LeftAlone,
        sequence::bids_suffix,
    },
    numeric::{
        geometry::Shape3,
        stack::{StackError, stack},
        volume::RawVolume,
    },
};
pub use header::{Component, Frame, Head, read_head};
pub use pixels::Pixels;
pub use series::{ENOUGH, Series, Stack, series};

/// Why a stack makes no volume.
#[derive(Debug, Clone, PartialEq)]
pub enum NoVolume {
    /// The stack is sound, but oddscan does not use such images.
    Unwanted {
        /// The cause.
        reason: LeftAlone,
        /// The cause in words, with what was found.
        why: String,
    },
    /// The stack has a fault.
    Refused {
        /// The fault, and what to do.
        refusal: Refusal,
        /// Whether slices that may still arrive could remove the fault.
        may_grow: bool,
    },
}

impl From<LeftAlone> for NoVolume {
    fn from(reason: LeftAlone) -> Self {
        Self::Unwanted { reason, why: reason.to_string() }
    }
}

impl From<Refusal> for NoVolume {
    fn from(refusal: Refusal) -> Self {
        Self::Refused { refusal, may_grow: false }
    }
}

/// The volume of a stack, with the facts of its header.
#[derive(Debug)]
pub struct Converted {
    /// Voxels and affine.
    pub volume: RawVolume,
    /// Content of the JSON file beside the volume, by the names that dcm2niix and BIDS use.
    pub facts: Map<String, Value>,
}

/// Splits the files of one series into stacks, one for each image. `open` opens an input.
///
/// # Errors
/// If the pixels of two slices at one place cannot be read. Whether they are copies decides what
/// the stacks are.
pub fn stacks<'a, R: Read>(
    series: &Series<'a>,
    mut open: impl FnMut(usize) -> io::Result<R>,
) -> Result<Vec<Stack<'a>>, Refusal> {
    // The two last files: slices of two enhanced images are compared in turns.
    let mut recent: Vec<(usize, Pixels)> = Vec::new();
    let mut read = |input: usize, index: usize, rescale: [f64; 2]| {
        if !recent.iter().any(|(have, _)| *have == input) {
            recent.truncate(1);
            recent.insert(0, (input, Pixels::read(opened(&mut open, input)?)?));
        }
        let (_, pixels) = recent.iter().find(|(have, _)| *have == input).expect("it was read");
        let mut values = Vec::new();
        pixels.frames(&[(index, rescale)], |_, frame| values = frame)?;
        Ok(values)
    };
    series::stacks(series, &mut read)
}

fn opened<R: Read>(
    open: &mut impl FnMut(usize) -> io::Result<R>,
    input: usize,
) -> Result<R, Refusal> {
    open(input).map_err(|error| {
        let found = format!("a file that cannot be opened ({error})");
        let action = "check the file's owner and permissions";
        Refusal::new(Io, found, "a file that can be opened", action)
    })
}

impl Head {
    /// `<series number>_<description>_<BIDS suffix>`: letters, digits, `-` and `_` only.
    pub fn name(&self, suffix: &str) -> String {
        let acquisition = &self.acquisition;
        let text = acquisition.description.as_deref().or(acquisition.protocol.as_deref());
        let safe = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' };
        let text: String = text.unwrap_or("series").chars().take(40).map(safe).collect();
        let words: Vec<&str> = text.split('_').filter(|word| !word.is_empty()).collect();
        let number = self.series_number.unwrap_or(0);
        format!("{number}_{}_{suffix}", words.join("_"))
    }
}

impl Stack<'_> {
    /// The name of the stack's volume: [`Head::name`] with the BIDS suffix.
    pub fn name(&self) -> String {
        self.head.name(self.suffix())
    }

    /// The BIDS suffix, by this stack's own echo time.
    fn suffix(&self) -> &'static str {
        let mut acquisition = self.head.acquisition.clone();
        acquisition.echo_time_ms = self.slices[0].frame.echo_time_ms.or(acquisition.echo_time_ms);
        bids_suffix(&acquisition)
    }

    /// Reads, decodes and orders all frames. `open` opens an input.
    ///
    /// # Errors
    /// If the frames make no volume.
    pub fn convert<R: Read>(
        &self,
        max_voxels: u64,
        open: impl FnMut(usize) -> io::Result<R>,
    ) -> Result<Converted, NoVolume> {
        self.volume(max_voxels, open).map_err(|fault| self.of_joined(fault))
    }

    fn volume<R: Read>(
        &self,
        max_voxels: u64,
        open: impl FnMut(usize) -> io::Result<R>,
    ) -> Result<Converted, NoVolume> {
        if self.slices[0].frame.component == Component::Other {
            return Err(LeftAlone::Phase.into());
        }
        if self.is_localiser {
            let why =
                format!("slices in several directions, fewer than {ENOUGH} in each: a localiser");
            return Err(NoVolume::Unwanted { reason: LeftAlone::Localiser, why });
        }

        let [n_columns, n_rows] = self.head.extents;
        let planes = series::planes(&self.slices);
        let placed = stack(&planes, n_rows, &series::nominal_mm(self.head))
            .map_err(|error| no_volume(error, planes.len()))?;
        self.check_distance(placed.affine.spacing_mm()[2])?;
        let shape = Shape3([n_columns, n_rows, placed.order.len()]);
        if shape.n_voxels() as u64 > max_voxels {
            let found = format!("{} voxels ({:?})", shape.n_voxels(), shape.0);
            let needed = format!("at most {max_voxels} (intake.max_megavoxels)");
            let action = "raise intake.max_megavoxels if you expect scans of this size";
            return Err(Refusal::new(TooLarge, found, needed, action).into());
        }

        let slices = self.slices_of(open)?;
        // Only now is the memory of the volume reserved: a header may announce any number of
        // pixels, and these are there.
        let mut voxels = Vec::with_capacity(shape.n_voxels());
        for &position in &placed.order {
            // The volume counts rows from the bottom.
            slices[position].chunks_exact(n_columns).rev().for_each(|row| voxels.extend(row));
        }

        let facts = self.facts(&placed.affine.spacing_mm());
        Ok(Converted { volume: RawVolume { shape, voxels, affine: placed.affine }, facts })
    }

    /// The intensities of each slice, row by row from the top.
    fn slices_of<R: Read>(
        &self,
        mut open: impl FnMut(usize) -> io::Result<R>,
    ) -> Result<Vec<Vec<f32>>, Refusal> {
        let mut by_input: BTreeMap<usize, Vec<(usize, &series::Slice<'_>)>> = BTreeMap::new();
        for (position, slice) in self.slices.iter().enumerate() {
            by_input.entry(slice.input).or_default().push((position, slice));
        }

        let mut slices = vec![Vec::new(); self.slices.len()];
        for (input, wanted) in by_input {
            let pixels = Pixels::read(opened(&mut open, input)?)?;
            let frames: Vec<(usize, [f64; 2])> =
                wanted.iter().map(|(_, slice)| (slice.index, slice.frame.rescale)).collect();
            pixels.frames(&frames, |index, values| slices[wanted[index].0] = values)?;
        }
        Ok(slices)
    }

    /// Refuses an even stack that has only every second, third or fourth slice, by what the header
    /// states: its own distances are even.
    fn check_distance(&self, found_mm: f64) -> Result<(), NoVolume> {
        let Some(stated_mm) = series::stated_mm(self.head) else { return Ok(()) };
        let times = (found_mm / stated_mm).round();
        let is_multiple = (found_mm - times * stated_mm).abs() <= 0.02 * found_mm;
        if !(2.0..=4.0).contains(&times) || !is_multiple {
            return Ok(());
        }

        let n = self.slices.len();
        let n_all = (n - 1) * times as usize + 1;
        let found = format!(
            "{n} slices {found_mm:.3} mm apart, where the header states {stated_mm:.3} mm: {} of \
             {n_all} slices are missing",
            n_all - n
        );
        let refusal =
            Refusal::new(BadHeader, found, "every slice", "export the whole series again");
        Err(NoVolume::Refused { refusal, may_grow: true })
    }

    /// The fault of slices that had a SeriesInstanceUID each. That fault must not hide behind the
    /// other one, and no head may be taken for a localiser because of it.
    fn of_joined(&self, fault: NoVolume) -> NoVolume {
        let is_localiser = self.slices.len() < ENOUGH;
        let (found, may_grow) = match fault {
            _ if self.n_joined == 1 => return fault,
            NoVolume::Unwanted { .. } if is_localiser => return fault,
            NoVolume::Unwanted { why, .. } => (why, false),
            NoVolume::Refused { refusal, may_grow } => (refusal.found, may_grow),
        };
        let found = format!(
            "slices with {} SeriesInstanceUIDs that agree in all else, and joined have a fault: \
             {found}",
            self.n_joined
        );
        let needed = "one SeriesInstanceUID for all slices of a series";
        let action = "export the series again; if an anonymiser replaces UIDs, it must replace the \
                      same one in the same way in all files";
        let refusal = Refusal::new(BadHeader, found, needed, action);
        NoVolume::Refused { refusal, may_grow }
    }

    fn facts(&self, spacing_mm: &[f64; 3]) -> Map<String, Value> {
        let mut facts = self.head.facts.clone();
        let mut put = |key: &str, value: Value| drop(facts.insert(key.to_owned(), value));
        if let Some(echo) = self.slices[0].frame.echo_time_ms {
            put("EchoTime", json!(echo / 1000.0));
        }
        put("SpacingBetweenSlices", json!(spacing_mm[2]));
        put("PixelSpacing", json!([spacing_mm[1], spacing_mm[0]]));
        put("ConversionSoftware", json!("oddscan"));
        put("ConversionSoftwareVersion", json!(env!("CARGO_PKG_VERSION")));
        if !self.notes.is_empty() {
            put("OddscanNotes", json!(self.notes));
        }
        facts
    }
}

fn no_volume(error: StackError, n_slices: usize) -> NoVolume {
    let found = format!("{error}, of {n_slices} slices");
    let again = "export the whole series again";
    let refused = |reason: QuarantineReason, needed: &str, action: &str, may_grow| {
        let refusal = Refusal::new(reason, found.clone(), needed, action);
        NoVolume::Refused { refusal, may_grow }
    };

    let unwanted =
        |reason, what: &str| NoVolume::Unwanted { reason, why: format!("{error}: {what}") };

    match error {
        StackError::TooFew { .. } => {
            unwanted(LeftAlone::TooFewSlices, "a localiser, or a series that has hardly begun")
        }
        StackError::Repeated { .. } => {
            unwanted(LeftAlone::TimeSeries, "a time series or a diffusion series")
        }
        StackError::Doubled { .. } => refused(
            BadHeader,
            "one slice at each place, or copies with the same pixels",
            "two series may have been stored under one SeriesInstanceUID; export each on its own",
            true,
        ),
        StackError::Missing { .. } => {
            refused(BadHeader, "a slice at every place of an even grid", again, true)
        }
        StackError::Uneven { .. } => refused(
            BadHeader,
            "slices at equal distances",
            "export the series without changes; two series may have been mixed",
            true,
        ),
        StackError::Sheared { .. } => refused(
            Unsupported,
            "slices that lie straight above each other",
            "tilted stacks are not supported; convert the series with another tool",
            false,
        ),
        StackError::NoNumber => refused(NonFinite, "finite numbers", again, false),
        StackError::Askew | StackError::Mixed | StackError::Grid(_) => {
            refused(BadHeader, "parallel slices with right angles", again, false)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        domain::{patient::Patient, scan::DicomFacts, sequence::Acquisition},
        numeric::stack::Plane,
    };

    fn head(instance: &str, height: f64, echo_time_ms: f64) -> Head {
        let plane = Plane {
            origin: [0.0, 0.0, height],
            along_row: [1.0, 0.0, 0.0],
            along_column: [0.0, 1.0, 0.0],
            spacing_mm: [1.0, 1.0],
        };
        let component = Component::Magnitude;
        Head {
            series_uid: "1.2".to_owned(),
            instance_uid: instance.to_owned(),
            series_number: Some(7),
            unwanted: None,
            fault: None,
            extents: [5, 7],
            patient: None,
            identifiers: DicomFacts {
                study_instance_uid: Some("1.1".to_owned()),
                frame_of_reference_uid: Some("1.3".to_owned()),
                ..DicomFacts::default()
            },
            person: None,
            frames: vec![Frame {
                plane,
                echo_time_ms: Some(echo_time_ms),
                component,
                rescale: [1.0, 0.0],
            }],
            acquisition: Acquisition {
                scanning_sequence: vec!["SE".to_owned()],
                repetition_time_ms: Some(3000.0),
                description: Some("PD/T2 Dual^Echo ../\n".to_owned()),
                ..Acquisition::default()
            },
            facts: Map::new(),
        }
    }

    /// A head of this patient.
    fn of_person(id: &str, mut head: Head) -> Head {
        head.person = Patient::of_header(id);
        head
    }

    /// Axial slices from height 0 on, 1 mm apart.
    fn axial(n: usize) -> Vec<Head> {
        (0..n).map(|k| head("same", k as f64, 15.0)).collect()
    }

    fn with(mut head: Head, change: impl FnOnce(&mut Head)) -> Head {
        change(&mut head);
        head
    }

    /// A slice in another direction.
    fn sagittal(place: f64) -> Head {
        with(head("s", 0.0, 15.0), |head| {
            let plane = &mut head.frames[0].plane;
            plane.origin = [place, 0.0, 0.0];
            (plane.along_row, plane.along_column) = ([0.0, 1.0, 0.0], [0.0, 0.0, -1.0]);
        })
    }

    /// All series of the heads.
    fn series_of(heads: &[Head]) -> Vec<Series<'_>> {
        series(&heads.iter().enumerate().collect::<Vec<_>>())
    }

    /// The stacks of the only series. The pixels of each input are its value.
    fn stacks_of<'a>(heads: &'a [Head], pixels: &[f32]) -> Vec<Stack<'a>> {
        let found = series_of(heads);
        let [series] = &found[..] else { panic!("{found:?}") };
        let mut read = |input: usize, _, _| Ok(vec![pixels[input]]);
        series::stacks(series, &mut read).unwrap()
    }

    fn sizes(stacks: &[Stack<'_>]) -> Vec<(usize, usize, usize)> {
        let size =
            |stack: &Stack<'_>| (stack.slices.len(), stack.inputs.len(), stack.left_out.len());
        stacks.iter().map(size).collect()
    }

    fn fault(stack: &Stack<'_>) -> String {
        let never = |_| -> io::Result<&[u8]> { panic!("no file is read") };
        match stack.convert(1000, never).unwrap_err() {
            NoVolume::Unwanted { reason, why } => format!("{}: {why}", reason.name()),
            NoVolume::Refused { refusal, .. } => refusal.found,
        }
    }

    #[test]
    fn echoes_part_and_copies_of_a_file_do_not_count_twice() {
        let heads = [
            head("a", 0.0, 15.0),
            head("b", 1.0, 15.004),
            head("c", 0.0, 100.0),
            head("a", 0.0, 14.9996),
        ];
        let stacks = stacks_of(&heads, &[1.0, 2.0, 3.0, 1.0]);
        let inputs: Vec<Vec<usize>> =
            stacks.iter().map(|stack| stack.inputs.iter().copied().collect()).collect();
        assert_eq!(inputs, [vec![0, 1, 3], vec![2]]);
        assert_eq!(stacks[0].slices.len(), 2);
    }

    #[test]
    fn copies_are_what_has_one_place_and_the_same_pixels_whatever_the_uids() {
        // All instances have the same UID in `axial`.
        let twice = [axial(5), axial(5)].concat();
        let pixels = |other: f32| {
            let value = |k: usize| if k < 5 { k as f32 } else { (k - 5) as f32 + other };
            (0..10).map(value).collect::<Vec<_>>()
        };
        assert_eq!(sizes(&stacks_of(&twice, &pixels(0.0))), [(5, 10, 0)]);
        let times = stacks_of(&twice, &pixels(9.0));
        assert!(fault(&times[0]).starts_with("time_series: 2 images at each of 5 places"));
        // The first and the middle slice of the time series show the same.
        let mut partly = pixels(9.0);
        (partly[5], partly[7]) = (partly[0], partly[2]);
        assert_eq!(fault(&stacks_of(&twice, &partly)[0]), fault(&times[0]));
        // Two slices came again, one of them with other pixels.
        let some = [axial(5), axial(2)].concat();
        assert_eq!(sizes(&stacks_of(&some, &pixels(0.0))), [(5, 7, 0)]);
        let mut one_differs = pixels(0.0);
        one_differs[6] = 77.0;
        assert!(fault(&stacks_of(&some, &one_differs)[0]).contains("at a place where another"));
    }

    #[test]
    fn two_people_under_one_uid_are_two_series_and_files_without_a_name_belong_to_the_only_one() {
        let heads: Vec<Head> = axial(4)
            .into_iter()
            .zip(["A1", "B2", "A1", "B2"])
            .map(|(h, id)| of_person(id, h))
            .collect();
        let people: Vec<usize> = series_of(&heads).iter().map(|one| one.files.len()).collect();
        assert_eq!(people, [2, 2]);
        let heads: Vec<Head> = axial(4)
            .into_iter()
            .zip(["A1", "", "A1", ""])
            .map(|(h, id)| of_person(id, h))
            .collect();
        assert_eq!(series_of(&heads).len(), 1);
    }

    #[test]
    fn a_few_slices_with_another_patient_stay_if_they_complete_the_stack() {
        let mut heads: Vec<Head> = axial(20).into_iter().map(|h| of_person("A1", h)).collect();
        heads[19] = of_person("A2", heads[19].clone());
        let pixels: Vec<f32> = (0..40).map(|k| k as f32).collect();
        let stacks = stacks_of(&heads, &pixels);
        assert_eq!(sizes(&stacks), [(20, 20, 0)]);
        assert!(stacks[0].notes[0].starts_with("some slices state another patient"));

        // A slice of somebody else at a place of the stack.
        heads.push(of_person("B2", axial(1).remove(0)));
        let people: Vec<usize> = series_of(&heads).iter().map(|one| one.files.len()).collect();
        assert_eq!(people, [19, 1, 1]);
    }

    #[test]
    fn several_series_under_one_uid_are_told_apart_by_number_and_description() {
        let second = axial(5).into_iter().map(|h| with(h, |h| h.series_number = Some(9)));
        let heads: Vec<Head> = axial(5).into_iter().chain(second).collect();
        let pixels: Vec<f32> = (0..10).map(|k| k as f32).collect();
        assert_eq!(sizes(&stacks_of(&heads, &pixels)), [(5, 5, 0), (5, 5, 0)]);
        // A copy that an archive has numbered anew is still a copy.
        let pixels: Vec<f32> = (0..10).map(|k| (k % 5) as f32).collect();
        assert_eq!(sizes(&stacks_of(&heads, &pixels)), [(5, 10, 0)]);
    }

    #[test]
    fn every_second_slice_is_no_scan_where_the_header_states_the_distance() {
        let every_second = |key: &str, mm: f64, is_3d: bool| -> Option<String> {
            let change = |head: &mut Head| {
                head.facts.insert(key.to_owned(), json!(mm));
                head.acquisition.acquisition_type = is_3d.then(|| "3D".to_owned());
            };
            let heads: Vec<Head> =
                axial(19).into_iter().step_by(2).map(|h| with(h, change)).collect();
            let pixels = [0.0; 10];
            let stacks = stacks_of(&heads, &pixels);
            let found = stacks[0].check_distance(2.0);
            found.err().map(|fault| match fault {
                NoVolume::Refused { refusal, .. } => refusal.found,
                NoVolume::Unwanted { why, .. } => why,
            })
        };
        let missing = every_second("SpacingBetweenSlices", 1.0, false).unwrap();
        assert!(missing.ends_with("1.000 mm: 9 of 19 slices are missing"), "{missing}");
        assert!(every_second("SliceThickness", 1.0, true).is_some());
        assert_eq!(every_second("SliceThickness", 1.0, false), None, "2D slices may have gaps");
        assert_eq!(every_second("SpacingBetweenSlices", 2.0, true), None);
        assert_eq!(every_second("SpacingBetweenSlices", 4.0, true), None, "overlapping slices");
    }

    #[test]
    fn a_reference_slice_makes_no_localiser_of_a_thick_stack() {
        let heads = [axial(14), vec![sagittal(3.0)]].concat();
        let pixels: Vec<f32> = (0..15).map(|k| k as f32).collect();
        assert_eq!(sizes(&stacks_of(&heads, &pixels)), [(14, 14, 1)]);
    }

    #[test]
    fn slices_with_a_uid_each_are_joined_if_all_else_agrees() {
        let each = |heads: Vec<Head>| -> Vec<Head> {
            let own = |(k, head)| with(head, |head: &mut Head| head.series_uid = format!("9.{k}"));
            heads.into_iter().enumerate().map(own).collect()
        };
        let heads = each(axial(20));
        let found = series_of(&heads);
        assert_eq!((found.len(), found[0].n_joined), (1, 20));
        let pixels = vec![0.0; 99];
        let stacks = stacks_of(&heads, &pixels);
        assert!(stacks[0].notes[0].contains("20 SeriesInstanceUIDs"), "{:?}", stacks[0].notes);

        // One refusal for all, also where it would be left alone as a time series.
        let gap = each([axial(20), vec![head("x", 30.0, 15.0)]].concat());
        let fault_of_gap = fault(&stacks_of(&gap, &pixels)[0]);
        assert!(fault_of_gap.contains("21 SeriesInstanceUIDs"), "{fault_of_gap}");
        assert!(fault_of_gap.contains("10 of 31 are missing"), "{fault_of_gap}");

        let mut other = each(axial(3));
        other[1].series_number = Some(8);
        assert_eq!(series_of(&other).len(), 3, "three localisers");
        assert_eq!(series_of(&each(axial(2))).len(), 2);
    }

    #[test]
    fn stray_slices_are_left_out_and_named_and_two_full_stacks_are_two_scans() {
        let small_pixels = |n| -> Vec<Head> {
            let change = |head: &mut Head| head.frames[0].plane.spacing_mm = [0.5, 0.5];
            axial(n).into_iter().map(|head| with(head, change)).collect()
        };
        let notes = |heads: &[Head]| {
            let stacks = stacks_of(heads, &vec![0.0; 999]);
            (sizes(&stacks), stacks[0].notes.join("; "))
        };
        let reference = [vec![sagittal(3.0)], axial(20)].concat();
        let said = "1 slice of another direction was left out of the scan, which has 20 slices";
        assert_eq!(notes(&reference), (vec![(20, 20, 1)], said.to_owned()));

        let (found, said) = notes(&[axial(30), small_pixels(10)].concat());
        assert_eq!(found, [(30, 30, 10)]);
        assert!(said.starts_with("10 slices with another size of pixels were left out"), "{said}");
        assert_eq!(notes(&[axial(30), small_pixels(15)].concat()).0, [(30, 30, 0), (15, 15, 0)]);

        let (found, said) = notes(&[axial(20), vec![head("r", -20.37, 15.0)]].concat());
        assert_eq!(found, [(20, 20, 1)]);
        assert!(said.starts_with("1 slice beside the even distances"), "{said}");

        let side: Vec<Head> = (0..16).map(|k| sagittal(f64::from(k))).collect();
        assert_eq!(notes(&[axial(20), side.clone()].concat()).0, [(20, 20, 0), (16, 16, 0)]);
        let localiser = [axial(15), side[..9].to_vec()].concat();
        let stacks = stacks_of(&localiser, &[0.0; 99]);
        assert_eq!(sizes(&stacks), [(15, 15, 0), (9, 9, 0)]);
        assert!(stacks.iter().all(|stack| fault(stack).starts_with("localiser: ")));
    }

    #[test]
    fn a_frame_of_reference_parts_only_what_are_stacks_by_themselves() {
        let in_space = |heads: Vec<Head>, name: fn(usize) -> String| -> Vec<Head> {
            let put = |(k, head)| {
                with(head, |h: &mut Head| h.identifiers.frame_of_reference_uid = Some(name(k)))
            };
            heads.into_iter().enumerate().map(put).collect()
        };
        let pixels: Vec<f32> = (0..99_u16).map(f32::from).collect();
        let each = in_space(axial(20), |k| format!("5.{k}"));
        assert_eq!(sizes(&stacks_of(&each, &pixels)), [(20, 20, 0)]);
        let two = [in_space(axial(20), |_| "5".into()), in_space(axial(18), |_| "6".into())];
        assert_eq!(sizes(&stacks_of(&two.concat(), &pixels)), [(20, 20, 0), (18, 18, 0)]);
    }

    #[test]
    fn a_name_holds_nothing_that_a_path_or_a_shell_could_take_amiss() {
        let heads = [head("a", 0.0, 15.0), head("b", 0.0, 100.0)];
        let stacks = stacks_of(&heads, &[1.0, 2.0]);
        let names: Vec<String> = stacks.iter().map(Stack::name).collect();
        // Each echo has the suffix of its own timing.
        assert_eq!(names, ["7_PD_T2_Dual_Echo_PDw", "7_PD_T2_Dual_Echo_T2w"]);
    }
}
