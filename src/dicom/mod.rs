//! Converts DICOM series to volumes. Only this module knows dicom-rs.
//!
//! Files arrive in any order and under any name; their headers say which belong together. A series
//! may hold several images (echoes, magnitude and phase, directions). Each of them is a separate
//! [`Stack`].
//!
//! A hostile file can make a codec panic or ask for all memory. So the daemon calls this module in
//! a separate process (`cli::dicom`, `process::convert`).

mod elements;
#[cfg(test)]
mod encodings;
mod faults;
mod header;
mod open;
mod pixels;
pub mod unzip;
mod values;

use std::{
    collections::{BTreeMap, BTreeSet},
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
        stack::{Plane, StackError, stack},
        volume::RawVolume,
    },
};
pub use header::{Component, Frame, Head, read_head};
pub use pixels::Pixels;

/// Parallel frames that belong to one image.
#[derive(Debug)]
pub struct Stack<'a> {
    /// Header of the first file. It holds what all files of the stack have in common.
    pub head: &'a Head,
    /// Input, index of the frame in its file, and the frame; each frame once.
    frames: Vec<(usize, usize, &'a Frame)>,
    /// Whether its series also has slices in another direction.
    is_one_of_several: bool,
    /// All inputs of the stack, including copies.
    pub inputs: BTreeSet<usize>,
}

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

/// Splits the files of one series into stacks by echo, part of the complex signal, number of
/// pixels, and direction.
///
/// A second copy of a file (the same SOPInstanceUID) adds no frame.
pub fn stacks<'a>(series: &[(usize, &'a Head)]) -> Vec<Stack<'a>> {
    type Key = (i64, Component, [usize; 2]);
    let mut found: BTreeMap<Key, Vec<Stack<'a>>> = BTreeMap::new();
    let mut instances: BTreeMap<&str, usize> = BTreeMap::new();
    let mut copies = Vec::new();

    for &(input, head) in series {
        if let Some(&first) = instances.get(head.instance_uid.as_str()) {
            copies.push((input, first));
            continue;
        }
        if !head.instance_uid.is_empty() {
            instances.insert(&head.instance_uid, input);
        }

        for (index, frame) in head.frames.iter().enumerate() {
            let echo = (1000.0 * frame.echo_time_ms.unwrap_or(0.0)).round() as i64;
            let alike = found.entry((echo, frame.component, head.extents)).or_default();
            let is_same =
                |stack: &&mut Stack<'a>| stack.frames[0].2.plane.is_parallel_to(&frame.plane);
            match alike.iter_mut().find(is_same) {
                Some(stack) => {
                    stack.frames.push((input, index, frame));
                    stack.inputs.insert(input);
                }
                None => alike.push(Stack {
                    head,
                    frames: vec![(input, index, frame)],
                    is_one_of_several: false,
                    inputs: [input].into(),
                }),
            }
        }
    }

    for alike in found.values_mut().filter(|alike| alike.len() > 1) {
        alike.iter_mut().for_each(|stack| stack.is_one_of_several = true);
    }

    let mut found: Vec<Stack<'a>> = found.into_values().flatten().collect();
    for (copy, first) in copies {
        for stack in found.iter_mut().filter(|stack| stack.inputs.contains(&first)) {
            stack.inputs.insert(copy);
        }
    }
    found
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
        acquisition.echo_time_ms = self.frames[0].2.echo_time_ms.or(acquisition.echo_time_ms);
        bids_suffix(&acquisition)
    }

    /// Reads, decodes and orders all frames. `open` opens an input.
    ///
    /// # Errors
    /// If the frames make no volume.
    pub fn convert<R: Read>(
        &self,
        max_voxels: u64,
        mut open: impl FnMut(usize) -> io::Result<R>,
    ) -> Result<Converted, NoVolume> {
        if self.frames[0].2.component == Component::Other {
            return Err(LeftAlone::Phase.into());
        }
        if self.is_one_of_several {
            let why = "slices in several directions: a localiser".to_owned();
            return Err(NoVolume::Unwanted { reason: LeftAlone::Localiser, why });
        }

        let [n_columns, n_rows] = self.head.extents;
        let planes: Vec<Plane> = self.frames.iter().map(|(_, _, frame)| frame.plane).collect();
        let placed = stack(&planes, n_rows).map_err(|error| no_volume(error, planes.len()))?;
        let shape = Shape3([n_columns, n_rows, placed.order.len()]);
        if shape.n_voxels() as u64 > max_voxels {
            let found = format!("{} voxels ({:?})", shape.n_voxels(), shape.0);
            let needed = format!("at most {max_voxels} (intake.max_megavoxels)");
            let action = "raise intake.max_megavoxels if you expect scans of this size";
            return Err(Refusal::new(TooLarge, found, needed, action).into());
        }

        let mut slice_of = vec![0; planes.len()];
        for (slice, &position) in placed.order.iter().enumerate() {
            slice_of[position] = slice;
        }
        let mut voxels = vec![0.0; shape.n_voxels()];

        let mut by_input: BTreeMap<usize, Vec<(usize, usize)>> = BTreeMap::new();
        for (position, &(input, index, _)) in self.frames.iter().enumerate() {
            by_input.entry(input).or_default().push((position, index));
        }
        for (input, wanted) in by_input {
            let file = open(input).map_err(|error| {
                let action = "check the file's owner and permissions";
                Refusal::new(
                    Io,
                    format!("a file that cannot be opened ({error})"),
                    "a file that can be opened",
                    action,
                )
            })?;
            let pixels = Pixels::read(file)?;
            let frames: Vec<(usize, [f64; 2])> = wanted
                .iter()
                .map(|&(position, index)| (index, self.frames[position].2.rescale))
                .collect();
            pixels.frames(&frames, |position, values| {
                let slice = slice_of[wanted[position].0];
                // The volume counts rows from the bottom.
                for (row, values) in values.chunks_exact(n_columns).enumerate() {
                    let start = shape.offset([0, n_rows - 1 - row, slice]);
                    voxels[start..start + n_columns].copy_from_slice(values);
                }
            })?;
        }

        let facts = self.facts(&placed.affine.spacing_mm());
        Ok(Converted { volume: RawVolume { shape, voxels, affine: placed.affine }, facts })
    }

    fn facts(&self, spacing_mm: &[f64; 3]) -> Map<String, Value> {
        let mut facts = self.head.facts.clone();
        let mut put = |key: &str, value: Value| drop(facts.insert(key.to_owned(), value));
        if let Some(echo) = self.frames[0].2.echo_time_ms {
            put("EchoTime", json!(echo / 1000.0));
        }
        put("SpacingBetweenSlices", json!(spacing_mm[2]));
        put("PixelSpacing", json!([spacing_mm[1], spacing_mm[0]]));
        put("ConversionSoftware", json!("oddscan"));
        put("ConversionSoftwareVersion", json!(env!("CARGO_PKG_VERSION")));
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
            "one slice at each place",
            "two series may have been stored under one SeriesInstanceUID; export each on its own",
            true,
        ),
        StackError::Uneven { .. } => {
            refused(BadHeader, "equal distances: slices are missing", again, true)
        }
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
    use crate::domain::{scan::DicomFacts, sequence::Acquisition};

    fn head(instance: &str, height: f64, echo_time_ms: f64) -> Head {
        let plane = Plane {
            origin: [0.0, 0.0, height],
            along_row: [1.0, 0.0, 0.0],
            along_column: [0.0, 1.0, 0.0],
            spacing_mm: [1.0, 1.0],
        };
        let component = Component::Magnitude;
        Head {
            study_uid: "1.1".to_owned(),
            series_uid: "1.2".to_owned(),
            instance_uid: instance.to_owned(),
            series_number: Some(7),
            unwanted: None,
            fault: None,
            extents: [5, 7],
            patient: None,
            identifiers: DicomFacts::default(),
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

    #[test]
    fn echoes_part_and_copies_of_a_file_do_not_count_twice() {
        let heads = [
            head("a", 0.0, 15.0),
            head("b", 1.0, 15.0),
            head("c", 0.0, 100.0),
            head("a", 0.0, 15.0),
        ];
        let series: Vec<(usize, &Head)> = heads.iter().enumerate().collect();
        let stacks = stacks(&series);
        let inputs: Vec<Vec<usize>> =
            stacks.iter().map(|stack| stack.inputs.iter().copied().collect()).collect();
        assert_eq!(inputs, [vec![0, 1, 3], vec![2]]);
        assert_eq!(stacks[0].frames.len(), 2);
    }

    #[test]
    fn a_name_holds_nothing_that_a_path_or_a_shell_could_take_amiss() {
        let heads = [head("a", 0.0, 15.0), head("b", 0.0, 100.0)];
        let series: Vec<(usize, &Head)> = heads.iter().enumerate().collect();
        let names: Vec<String> = stacks(&series).iter().map(Stack::name).collect();
        // Each echo has the suffix of its own timing.
        assert_eq!(names, ["7_PD_T2_Dual_Echo_PDw", "7_PD_T2_Dual_Echo_T2w"]);
    }
}
