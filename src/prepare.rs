//! From a file to a scan that can be encoded: reads it, aligns it, finds its brain, chooses its
//! cohort.
//!
//! The daemon and the commands share this code. The daemon's own tasks (copies, crashes, memory,
//! times) are in `pipeline/intake`.

pub mod acquisition;
mod encodable;
mod source;

use std::{io, path::Path};

use crate::{
    companions,
    config::{AlignmentChoice, Config},
    domain::{
        error::{Refusal, ScanError},
        head::{HeadBrain, brain_of_head, brain_of_session},
        scan::{AlignmentFacts, BrainFacts, BrainSource, PreprocessFacts, ScanId, ScanRecord},
    },
    engine::{BrainNetworkInUse, Method},
    nifti::{self, Grid, Limits},
    numeric::{
        background, labels,
        preprocess::{self, PreprocessError},
        registration::{self, Template},
        volume::{RawMask, RawVolume},
    },
    process::hook::{Hook, HookOutput},
    refusals,
};
use acquisition::{Acquisition, acquisition};
use source::{brain_from, read_brain};

pub use encodable::{Encodable, canonical};
pub use source::{Source, id_of, read_again, read_source};

/// A scan as it arrived, with its brain if that is known.
pub struct Incoming {
    /// Voxels as scanned.
    pub raw: RawVolume,
    /// Hash of the scan as it arrived. Later changes of the voxels do not change it.
    pub id: ScanId,
    grid: Grid,
    brain: Result<RawMask, PreprocessError>,
    brain_from: BrainSource,
    /// A T1 of the same session, whose brain this scan may use.
    session_t1: Option<RawVolume>,
}

impl Incoming {
    /// Refuses a scan or a mask of more bytes than [`Incoming::read`] would read.
    pub fn check_sizes(scan: u64, mask: Option<u64>, limits: &Limits) -> Result<(), Refusal> {
        nifti::check_size(scan, limits)?;
        let of_mask = mask.map_or(Ok(()), |n_bytes| nifti::check_size(n_bytes, limits));
        of_mask.map_err(refusals::of_mask)
    }

    /// Reads a scan and the mask beside it without changing them.
    pub fn read(scan: &Path, mask: Option<&Path>, limits: &Limits) -> Result<Self, ScanError> {
        let nifti::Scan { volume: raw, grid } = nifti::read_scan(scan, limits)?;
        if let Some(n_values) = labels::n_values_of_labels(&raw) {
            return Err(refusals::label_map(n_values).into());
        }
        let brain = read_brain(&raw, mask, limits)?;
        let (id, brain_from) = (ScanId::of(&raw), brain_from(mask));
        Ok(Self { id, raw, grid, brain, brain_from, session_t1: None })
    }

    /// Adds the T1 of the same session. An unreadable T1 is left out; intake refuses it when it
    /// reads it as a scan of its own.
    pub fn beside_t1(mut self, t1: Option<&Path>, limits: &Limits) -> Self {
        let t1 = t1.filter(|_| self.is_head());
        self.session_t1 = t1.and_then(|path| Some(nifti::read_scan(path, limits).ok()?.volume));
        self
    }

    /// Whether the scan shows the head, or a part of it, and not only the brain.
    pub fn is_head(&self) -> bool {
        let shows_head = match &self.brain {
            Ok(tissue) => preprocess::shows_head(tissue),
            Err(error) => !matches!(error, PreprocessError::BelowZero { .. }),
        };
        shows_head && !self.has_mask()
    }

    /// The scan without alignment, with the brain that is known.
    ///
    /// # Errors
    /// If the brain is not known. All tissue of a head that its grid cuts can be as large as a
    /// brain.
    fn without_alignment(self) -> Result<Source, ScanError> {
        let has_mask = self.has_mask();
        let brain = self.brain.map_err(refusals::of_preprocessing)?;
        let found_cm2 = preprocess::widest_cut_cm2(&brain);
        if !has_mask && found_cm2 > preprocess::MAX_STRIPPED_CUT_CM2 {
            return Err(refusals::of_preprocessing(PreprocessError::MeetsEdge { found_cm2 }).into());
        }
        Ok(Source::unaligned(self.raw, self.grid, brain, self.brain_from))
    }

    /// The site's own preprocessing, if it takes this scan.
    pub(crate) fn hook<'m>(&self, method: &'m Method) -> Option<&'m Hook> {
        method.hook.as_deref().filter(|hook| hook.takes(self.is_head()))
    }

    fn has_mask(&self) -> bool {
        self.brain_from != BrainSource::AboveZero
    }

    /// Applies the output of the site's preprocessing. A mask that arrived with the scan stays.
    fn take_over(&mut self, hook_output: HookOutput) -> PreprocessFacts {
        let HookOutput { voxels, mask, mut facts } = hook_output;
        if let Some(voxels) = voxels {
            self.raw.voxels = voxels;
            if !self.has_mask() {
                self.brain = preprocess::brain_mask(&self.raw, None);
            }
        }
        facts.mask_made &= !self.has_mask();
        if let (Some(inside), true) = (mask, facts.mask_made) {
            self.brain = Ok(RawMask { shape: self.raw.shape, inside, affine: self.raw.affine });
            self.brain_from = BrainSource::Program;
        }
        facts
    }
}

/// A scan ready for the encoder, with everything that the ledger stores about it.
pub struct Prepared {
    /// Hash of the scan as it arrived.
    pub id: ScanId,
    /// Input of the encoder.
    pub encodable: Encodable,
    /// How the scan was acquired, and its cohort.
    pub acquisition: Acquisition,
    brain: BrainFacts,
    alignment: Option<AlignmentFacts>,
    preprocess: Option<PreprocessFacts>,
}

impl Prepared {
    /// Chooses the cohort of a scan and makes its cube. `json` is the content of the JSON beside
    /// the file. It is `None` without such a file.
    ///
    /// # Errors
    /// If the scan cannot be encoded.
    pub fn new(
        id: ScanId,
        source: &Source,
        path: &Path,
        json: Option<io::Result<Vec<u8>>>,
        config: &Config,
        method: &Method,
    ) -> Result<Self, ScanError> {
        let spacing_mm = source.raw.affine.spacing_mm();
        let acquisition = acquisition(path, json, spacing_mm, config, method);
        Ok(Self {
            id,
            encodable: Encodable::new(source, method, &acquisition.cohort)?,
            acquisition,
            brain: source.brain_facts(),
            alignment: source.alignment_facts(),
            preprocess: source.preprocess.clone(),
        })
    }

    /// The scan's record, named after the file, and the input of the encoder.
    pub fn into_record(self, path: &Path) -> (ScanRecord, Encodable) {
        let name = path.file_name().unwrap_or_default();
        let record = ScanRecord {
            source_name: name.to_string_lossy().into_owned(),
            acquisition: self.acquisition.facts,
            notes: self.acquisition.notes,
            brain: Some(self.brain),
            alignment: self.alignment,
            preprocess: self.preprocess,
            ..ScanRecord::new(self.id, self.acquisition.cohort)
        };
        (record, self.encodable)
    }
}

/// Aligns a scan and finds its brain, if the settings ask for it and nobody has done it before.
/// `hook_output` is the output of the site's preprocessing.
pub fn find_brain(
    mut scan: Incoming,
    hook_output: Option<HookOutput>,
    method: &Method,
) -> Result<Source, ScanError> {
    let was_head = scan.is_head();
    let preprocess = hook_output.map(|hook_output| scan.take_over(hook_output));
    let is_head = scan.is_head();

    // The site's preprocessing may have stripped the skull. The scan still needs its alignment.
    let is_aligned = match method.alignment {
        AlignmentChoice::Never => false,
        AlignmentChoice::Heads => was_head && method.template.is_some(),
        AlignmentChoice::Always => true,
    };
    let source = match method.template.as_ref().filter(|_| is_aligned) {
        None => scan.without_alignment()?,
        Some(template) if is_head => extracted(scan, template, method)?,
        Some(template) => aligned(scan, template)?,
    };
    Ok(Source { preprocess, ..source })
}

/// Aligns a skull-stripped scan to the template.
fn aligned(scan: Incoming, template: &Template) -> Result<Source, ScanError> {
    let source = scan.without_alignment()?;
    let Source { raw, brain, .. } = &source;
    let alignment = registration::register(&raw.within(brain), template, false)
        .map_err(|error| refusals::misaligned(error, raw, Some(brain), template))?;
    Ok(Source { alignment: Some(alignment), ..source })
}

/// Aligns a head to the template and extracts its brain.
fn extracted(scan: Incoming, template: &Template, method: &Method) -> Result<Source, ScanError> {
    let Incoming { raw, grid, session_t1, .. } = scan;
    let shifted = background::above_background(&raw);
    let shown = shifted.as_ref().unwrap_or(&raw);
    let found = head_brain(shown, session_t1.as_ref(), template, method)?;
    let HeadBrain { brain, alignment, from, agreement } = found;
    if let Some(below) = background::share_unexplained(&raw, Some(&brain)) {
        return Err(refusals::of_preprocessing(PreprocessError::BelowZero { below }).into());
    }

    let t1 = session_t1.filter(|_| from == BrainSource::SessionT1);
    let session_t1 = t1.as_ref().map(ScanId::of);
    let source = Source::unaligned(raw, grid, brain, from);
    Ok(Source { alignment: Some(alignment), agreement, session_t1, ..source })
}

/// Finds the brain of a head. A T1 of its session helps if there is one.
fn head_brain(
    scan: &RawVolume,
    session_t1: Option<&RawVolume>,
    template: &Template,
    method: &Method,
) -> Result<HeadBrain, ScanError> {
    let network = method.brain_network.as_ref().map(BrainNetworkInUse::network);
    let own = brain_of_head(scan, template, network);
    if let Some(t1) = session_t1 {
        let carried = brain_of_session(scan, t1, own.as_ref().ok(), template, network)?;
        if let Some(carried) = carried {
            return Ok(carried);
        }
    }
    own.map_err(|error| refusals::no_head(error, scan, template))
}

/// Reads a scan and the mask beside it, and finds its brain. If the settings ask for it, the site's
/// own preprocessing runs before that, in the folder `work`.
pub fn read_and_find_brain(
    path: &Path,
    mask: Option<&Path>,
    limits: &Limits,
    method: &Method,
    work: &Path,
    mut alive: impl FnMut(),
) -> Result<(ScanId, Source), ScanError> {
    let t1 = companions::session_t1(path).filter(|_| method.uses_session_t1);
    let scan = Incoming::read(path, mask, limits)?.beside_t1(t1.as_deref(), limits);
    let id = scan.id;

    let always = || {
        alive();
        true
    };
    let hook_output = match scan.hook(method) {
        None => None,
        Some(hook) => hook.run(path, &scan.raw, work, limits, always)?,
    };
    Ok((id, find_brain(scan, hook_output, method)?))
}
