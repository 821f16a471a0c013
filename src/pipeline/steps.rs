//! The steps of one scan's journey that the daemon and the one-shot command share.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::{alignment::pictured, hook::Handed};
use crate::{
    config::{AlignmentChoice, Scoring},
    domain::{
        cohort::CohortKey,
        error::{QuarantineReason, Refusal, ScanError},
        finding::{Cluster, Finding, SharedAnomaly},
        head::{HeadBrain, HeadError, brain_of_head, brain_of_session},
        patient::Patient,
        scan::{AlignmentFacts, BrainFacts, BrainSource, EncodedFacts, PreprocessFacts, ScanId},
    },
    engine::{BrainNetworkInUse, Method},
    nifti::{self, Grid, Limits},
    numeric::{
        community,
        geometry::{Affine, VoxelPoint},
        mask::{GridPlacement, Region, ScoreGrid, joined_scores, regions_above, score_map},
        preprocess::{self, Canonical, MAX_BRAIN_ML, MIN_SHARE_IN_CUBE, PreprocessError},
        quality,
        registration::{self, Alignment, MIN_COVERAGE, MIN_EXTENT_MM, RegistrationError, Template},
        scoring::{self, Fraction, MapProfile, NearestDistances, ScanScores},
        token::{Foreground, TokenGrid, foreground_cells},
        volume::{RawMask, RawVolume},
    },
};

/// A scan read from its file, with the brain on its own grid.
pub struct Source {
    /// Voxels as scanned.
    pub raw: RawVolume,
    /// The header geometry that results copy.
    pub grid: Grid,
    /// The brain on the scan's grid.
    pub brain: RawMask,
    /// Where the template lies in the scan, if it was looked for.
    pub alignment: Option<Alignment>,
    /// Where the brain is known from; of a scan that is read again, what it was read from.
    pub brain_from: BrainSource,
    /// Dice of the two ways to find the brain of a head, where both were taken.
    pub agreement: Option<f64>,
    /// The T1 of the session that the brain comes from, if it does.
    pub session_t1: Option<ScanId>,
    /// What the site's preprocessing did, if it did anything.
    pub preprocess: Option<PreprocessFacts>,
}

/// A scan as it came, with its brain as far as it is known.
pub struct Incoming {
    /// Voxels as scanned.
    pub raw: RawVolume,
    /// Identity: of the scan as it came, whatever is made of it.
    pub id: ScanId,
    grid: Grid,
    brain: Result<RawMask, PreprocessError>,
    brain_from: BrainSource,
    /// A T1 of the same session, whose brain may be carried over.
    session_t1: Option<RawVolume>,
}

impl Incoming {
    /// Reads a scan, and the mask beside it, as they come from a scanner.
    pub fn read(scan: &Path, mask: Option<&Path>, limits: &Limits) -> Result<Self, ScanError> {
        let nifti::Scan { volume: raw, grid } = nifti::read_scan(scan, limits)?;
        let brain = read_brain(&raw, mask, limits)?;
        let (id, brain_from) = (ScanId::of(&raw), brain_from(mask));
        Ok(Self { id, raw, grid, brain, brain_from, session_t1: None })
    }

    /// Adds the T1 of the same session. One that cannot be read is left out: it is refused when its
    /// own turn comes.
    pub fn beside_t1(mut self, t1: Option<&Path>, limits: &Limits) -> Self {
        let t1 = t1.filter(|_| self.is_head());
        self.session_t1 = t1.and_then(|path| Some(nifti::read_scan(path, limits).ok()?.volume));
        self
    }

    /// Whether there still is a head around the brain.
    pub fn is_head(&self) -> bool {
        !self.has_mask() && self.brain.as_ref().map_or(true, is_larger_than_a_brain)
    }

    fn has_mask(&self) -> bool {
        self.brain_from != BrainSource::AboveZero
    }

    /// Takes over what the site's preprocessing gave. A mask that came with the scan stays.
    fn take_over(&mut self, handed: Handed) -> PreprocessFacts {
        let Handed { voxels, mask, mut facts } = handed;
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

impl Source {
    /// A scan that lies as its header says, with a brain that is known.
    fn unaligned(raw: RawVolume, grid: Grid, brain: RawMask, brain_from: BrainSource) -> Self {
        let (alignment, agreement, session_t1, preprocess) = (None, None, None, None);
        Self { raw, grid, brain, alignment, brain_from, agreement, session_t1, preprocess }
    }

    /// The scan's canonical cube: cube voxel -> scan world, mm.
    ///
    /// # Errors
    /// If the brain is empty, or the scan was aligned to a template that is no longer there.
    pub fn cube(&self, method: &Method) -> Result<Affine, ScanError> {
        let cube = match &self.alignment {
            None => preprocess::cube_affine(&self.brain, &method.cube),
            Some(Alignment { to_scan, .. }) => {
                let template = method.template.as_ref().ok_or_else(template_gone)?;
                preprocess::aligned_cube_affine(template.brain(), to_scan, &method.cube)
            }
        };
        Ok(cube.map_err(|error| refusal(error.into()))?)
    }
}

fn template_gone() -> ScanError {
    let action = "the template is gone; run `oddscan model fetch` and restart";
    ScanError::Own {
        doing: "placing a scan that was aligned",
        source: io::Error::new(io::ErrorKind::NotFound, action),
    }
}

/// Aligns a scan and finds its brain where the settings ask for it and nobody has done it before;
/// `handed` is what the site's preprocessing made of it.
pub fn prepare(
    mut scan: Incoming,
    handed: Option<Handed>,
    method: &Method,
) -> Result<Source, ScanError> {
    let was_head = scan.is_head();
    let preprocess = handed.map(|handed| scan.take_over(handed));
    // One that was stripped on the way here lies where the scanner put it all the same.
    let is_aligned = match method.alignment {
        AlignmentChoice::Never => false,
        AlignmentChoice::Heads => was_head && method.template.is_some(),
        AlignmentChoice::Always => true,
    };
    let is_head = scan.is_head();
    let Incoming { raw, grid, brain, brain_from, session_t1, .. } = scan;
    let template = method.template.as_ref().filter(|_| is_aligned);
    let Some(template) = template else {
        let brain = brain.map_err(refusal)?;
        return Ok(Source { preprocess, ..Source::unaligned(raw, grid, brain, brain_from) });
    };
    if !is_head {
        let brain = brain.map_err(refusal)?;
        let alignment = registration::register(&raw.within(&brain), template, false)
            .map_err(|error| misaligned(error, &raw, Some(&brain), template))?;
        let source = Source::unaligned(raw, grid, brain, brain_from);
        return Ok(Source { alignment: Some(alignment), preprocess, ..source });
    }
    let found = head_brain(&raw, session_t1.as_ref(), template, method)?;
    let HeadBrain { brain, alignment, from, agreement } = found;
    let t1 = session_t1.filter(|_| from == BrainSource::SessionT1);
    let session_t1 = t1.as_ref().map(ScanId::of);
    let source = Source::unaligned(raw, grid, brain, from);
    Ok(Source { alignment: Some(alignment), agreement, session_t1, preprocess, ..source })
}

/// The brain of a head, with the help of a T1 of its session if there is one.
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
    own.map_err(|error| no_head(error, scan, template))
}

/// Reads a scan, and the mask beside it, and prepares it, through the site's own preprocessing (in
/// the folder `work`) where the settings ask for it. The identity is that of the scan as it came.
pub fn read_and_prepare(
    path: &Path,
    mask: Option<&Path>,
    limits: &Limits,
    method: &Method,
    work: &Path,
    mut alive: impl FnMut(),
) -> Result<(ScanId, Source), ScanError> {
    let t1 = session_t1(path).filter(|_| method.uses_session_t1);
    let scan = Incoming::read(path, mask, limits)?.beside_t1(t1.as_deref(), limits);
    let id = scan.id;
    let always = || {
        alive();
        true
    };
    let handed = match method.hook.as_ref().filter(|hook| hook.takes(scan.is_head())) {
        None => None,
        Some(hook) => hook.run(path, &scan.raw, work, limits, always)?,
    };
    Ok((id, prepare(scan, handed, method)?))
}

/// What the journal keeps of an alignment.
pub fn alignment_facts(source: &Source) -> Option<AlignmentFacts> {
    source.alignment.map(|alignment| AlignmentFacts {
        template_to_scan: alignment.to_scan.rows(),
        explained: alignment.explained,
        distinctness: Some(alignment.distinctness),
        coverage: alignment.coverage,
        brain_extracted: source.brain_from.is_extracted(),
    })
}

/// What the journal keeps of the brain.
pub fn brain_facts(source: &Source) -> BrainFacts {
    let bytes = bytemuck::cast_slice::<bool, u8>(&source.brain.inside);
    BrainFacts {
        from: source.brain_from,
        agreement: source.agreement,
        session_t1: source.session_t1,
        sha256: hex::encode(Sha256::digest(bytes)),
    }
}

/// The alignment that the journal keeps.
pub fn alignment(facts: Option<AlignmentFacts>) -> Result<Option<Alignment>, ScanError> {
    let alignment = |facts: AlignmentFacts| {
        let to_scan = Affine::new(facts.template_to_scan).map_err(|error| refusal(error.into()))?;
        let AlignmentFacts { explained, distinctness, coverage, .. } = facts;
        // What was not measured plays no part in what is made of it.
        let distinctness = distinctness.unwrap_or(f64::NAN);
        Ok(Alignment { to_scan, explained, distinctness, coverage })
    };
    facts.map(alignment).transpose()
}

/// Whether what is above zero is more than any brain: a head before a background that was set to 0.
fn is_larger_than_a_brain(brain: &RawMask) -> bool {
    let n_inside = brain.inside.iter().filter(|&&inside| inside).count();
    n_inside as f64 * brain.affine.voxel_volume_mm3() / 1000.0 > MAX_BRAIN_ML
}

fn misaligned(
    error: RegistrationError,
    scan: &RawVolume,
    brain: Option<&RawMask>,
    template: &Template,
) -> Refusal {
    let best = error.best().map(|best| best.to_scan);
    let found = error.to_string();
    let (needed, action) = match error {
        RegistrationError::NoContrast => {
            ("intensities that vary".to_owned(), "check the export: the image may be blank")
        }
        RegistrationError::TooSmall(_) => (
            format!("at least {MIN_EXTENT_MM} mm along each axis"),
            "localisers and slabs are no scans of a brain; export the whole series",
        ),
        RegistrationError::Cut { .. } => (
            format!("at least {:.0} %", 100.0 * MIN_COVERAGE),
            "the field of view cuts the brain; export the whole series",
        ),
        RegistrationError::Unlike { is_head, .. } => (
            format!("a distinctness of at least {}", registration::min_distinctness(is_head)),
            "check that this is a brain and that the header's orientation is right; or strip the skull \
             with another tool and put <subject>_brain.nii.gz beside the scan",
        ),
        RegistrationError::Geometry(_) => {
            ("an affine that can be inverted".to_owned(), "check the header's sform and qform")
        }
    };
    let refusal = Refusal::new(QuarantineReason::RegistrationFailed, found, needed, action);
    pictured(refusal, scan, brain, template, best)
}

fn no_head(error: HeadError, scan: &RawVolume, template: &Template) -> ScanError {
    match error {
        HeadError::Misaligned(error) => misaligned(error, scan, None, template).into(),
        HeadError::NoBrain { best } => {
            pictured(no_brain_found(), scan, None, template, Some(best.to_scan)).into()
        }
        HeadError::Device(error) => error.into(),
    }
}

fn no_brain_found() -> Refusal {
    Refusal::new(
        QuarantineReason::NoBrain,
        "nothing bright where the brain should be",
        "tissue that is brighter than the skull around it",
        "check the export; or strip the skull with another tool and put <subject>_brain.nii.gz beside \
         the scan",
    )
}

/// Reads a scan that has been prepared before, with the brain and the alignment that were found
/// then.
pub fn read_source(
    scan: &Path,
    mask: Option<&Path>,
    alignment: Option<Alignment>,
    limits: &Limits,
) -> Result<Source, ScanError> {
    let nifti::Scan { volume: raw, grid } = nifti::read_scan(scan, limits)?;
    let brain = read_brain(&raw, mask, limits)?.map_err(refusal)?;
    Ok(Source { alignment, ..Source::unaligned(raw, grid, brain, brain_from(mask)) })
}

fn brain_from(mask: Option<&Path>) -> BrainSource {
    if mask.is_some() { BrainSource::MaskFile } else { BrainSource::AboveZero }
}

/// The brain by a mask, or by what is above zero.
fn read_brain(
    raw: &RawVolume,
    mask: Option<&Path>,
    limits: &Limits,
) -> Result<Result<RawMask, PreprocessError>, ScanError> {
    let mask = mask.map(|path| nifti::read_mask(path, limits)).transpose();
    let mask = mask.map_err(|error| match error {
        ScanError::Refused(refusal) => ScanError::Refused(Refusal {
            found: format!("its brain mask unusable: {}", refusal.found),
            ..refusal
        }),
        other => other,
    })?;
    Ok(preprocess::brain_mask(raw, mask.as_ref()))
}

/// One in so many patch-sized cells must be foreground; the finer cells of single views then are,
/// too. A brain fills about every second one; the smallest that is taken for one, 200 ml, still one
/// in 27. With none at all, as in speckle, a scan would have no tokens and be reported as normal.
const CELLS_PER_FOREGROUND: usize = 64;

/// A scan as the encoder takes it.
pub struct Encodable {
    /// The cube.
    pub canonical: Canonical,
    /// Noise as a share of the brain's contrast.
    pub noise: Option<f64>,
}

impl Encodable {
    /// The canonical cube of a source, and what can be said of the scan on its own grid.
    ///
    /// # Errors
    /// As [`canonical`].
    pub fn new(source: &Source, method: &Method, cohort: &CohortKey) -> Result<Self, ScanError> {
        let canonical = canonical(source, method, Some(cohort))?;
        Ok(Self { canonical, noise: quality::noise(&source.raw, &source.brain) })
    }

    /// What the journal keeps of the scan, but for its tokens and the times that it took.
    pub fn facts(&self) -> EncodedFacts {
        EncodedFacts {
            brain_ml: self.canonical.brain_ml,
            cut_fraction: self.canonical.cut_fraction,
            noise: self.noise,
            is_standardised: self.canonical.is_standardised,
            ..EncodedFacts::default()
        }
    }
}

/// The canonical cube of a source, with enough foreground to be scored.
///
/// Without a cohort intensities are not standardised; whether a scan is refused does not depend on
/// that.
pub fn canonical(
    source: &Source,
    method: &Method,
    cohort: Option<&CohortKey>,
) -> Result<Canonical, ScanError> {
    let aligned = source.alignment.map(|_| source.cube(method)).transpose()?;
    let Source { raw, brain, .. } = source;
    let landmarks = cohort.and_then(|cohort| method.landmarks.as_ref()?.landmarks(&cohort.name));
    let canonical = preprocess::canonicalise(raw, brain, &method.cube, aligned.as_ref(), landmarks)
        .map_err(refusal)?;
    let n_cells = (method.cube.side / method.patch).pow(3);
    let needed = (n_cells / CELLS_PER_FOREGROUND).max(1);
    let found = foreground_cells(&canonical.volume, [method.patch; 3], method.min_brain_fraction);
    let found = found.cells.len();
    if found < needed {
        return Err(Refusal::new(
            QuarantineReason::NoBrain,
            format!(
                "{found} of {n_cells} cells with enough brain in them (tokens.min_brain_fraction)"
            ),
            format!("at least {needed}; a brain fills about half of them"),
            "check the export and the brain mask: speckle and scattered objects are no brain",
        )
        .into());
    }
    Ok(canonical)
}

pub(crate) fn refusal(error: PreprocessError) -> Refusal {
    let found = error.to_string();
    let (reason, needed, action) = match error {
        PreprocessError::NoBackground { .. } => (
            QuarantineReason::NoBrain,
            "a skull-stripped scan with zero background, or a brain mask beside it".to_owned(),
            "get the template for whole heads (oddscan model fetch) and restart, or strip the skull \
             first, or put <subject>_brain.nii.gz beside the scan",
        ),
        PreprocessError::TooSmall { needed_ml, .. } => (
            QuarantineReason::NoBrain,
            format!("at least {needed_ml} ml (volume.min_brain_ml)"),
            "check the export and the brain mask; phantoms and localisers are no scans",
        ),
        PreprocessError::TooLarge { .. } => (
            QuarantineReason::NoBrain,
            format!("at most {MAX_BRAIN_ML} ml"),
            "strip the skull first, or check the header's unit of length and the brain mask",
        ),
        PreprocessError::Scattered { .. } => (
            QuarantineReason::NoBrain,
            format!("at least {:.0} % (volume.field_of_view_mm)", 100.0 * MIN_SHARE_IN_CUBE),
            "check the export and the brain mask: scattered objects are no brain",
        ),
        PreprocessError::Constant { .. } => (
            QuarantineReason::NoBrain,
            "intensities above zero that vary over the brain".to_owned(),
            "check the export: the image may be blank",
        ),
        PreprocessError::Geometry(_) => (
            QuarantineReason::BadHeader,
            "an affine that spans space".to_owned(),
            "check the header's sform and qform",
        ),
    };
    Refusal::new(reason, found, needed, action)
}

/// The brain mask beside a scan, if there is one.
pub fn companion_mask(scan: &Path) -> Option<PathBuf> {
    companion(scan, "brain")
}

/// The T1 of the same session beside a scan that is none itself, `<subject>_T1w.nii.gz`.
pub fn session_t1(scan: &Path) -> Option<PathBuf> {
    companion(scan, "T1w").filter(|t1| t1 != scan)
}

/// A file that belongs to a scan and lies beside it: `<stem>_<what>` or, for
/// `<subject>_<modality>`, `<subject>_<what>`, with `.nii.gz` or `.nii`. Names need not be UTF-8.
///
/// A link is none: in the incoming folder it may lead to anything. Beside a scan that is a link
/// itself, which only a person can have named, links are followed: whole data sets consist of them.
pub fn companion(scan: &Path, what: &str) -> Option<PathBuf> {
    let stem = stem_bytes(scan)?;
    let subject = stem.iter().rposition(|&byte| byte == b'_').map(|end| &stem[..end]);
    let path = |name: &[u8], ending: &str| {
        let name = [name, b"_", what.as_bytes(), ending.as_bytes()].concat();
        scan.with_file_name(OsStr::from_bytes(&name))
    };
    [Some(stem), subject]
        .into_iter()
        .flatten()
        .flat_map(|name| [path(name, ".nii.gz"), path(name, ".nii")])
        .find(|path| lies_beside(scan, path))
}

/// The JSON beside a scan that says how it was acquired: `<stem>.json`, by the same rule about
/// links. What this program writes beside maps is none.
pub fn companion_json(scan: &Path) -> Option<PathBuf> {
    let name = [stem_bytes(scan)?, b".json"].concat();
    let path = scan.with_file_name(OsStr::from_bytes(&name));
    (!name.ends_with(b"_anomaly.json") && lies_beside(scan, &path)).then_some(path)
}

fn lies_beside(scan: &Path, path: &Path) -> bool {
    path.is_file() && (scan.is_symlink() || !path.is_symlink())
}

/// The bytes of a file name without `.nii` or `.nii.gz`.
fn stem_bytes(scan: &Path) -> Option<&[u8]> {
    let name = scan.file_name()?.as_bytes();
    let stem = name.strip_suffix(b".gz").unwrap_or(name);
    Some(stem.strip_suffix(b".nii").unwrap_or(stem))
}

/// File name without folder and without `.nii` or `.nii.gz`.
pub fn stem_of(path: &Path) -> String {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let stem = name.strip_suffix(".gz").unwrap_or(&name);
    stem.strip_suffix(".nii").unwrap_or(stem).to_owned()
}

/// A stem for result files: letters, digits, `.`, `-` and `_` stay, everything else becomes `_`,
/// so that no file name can lead out of the results folder or break a shell line.
pub fn output_stem(stem: &str) -> String {
    let safe = |c: char| if c.is_ascii_alphanumeric() || ".-_".contains(c) { c } else { '_' };
    let stem: String = stem.chars().take(120).map(safe).collect();
    let stem = stem.trim_start_matches('.');
    if stem.is_empty() { "scan".to_owned() } else { stem.to_owned() }
}

/// Where the distances between the members of a window come from.
pub trait Distances {
    /// The distances from one grid of tokens of a scan to that of another scan.
    fn column(&mut self, of: ScanId, other: ScanId, grid: usize) -> Result<Vec<f32>, ScanError>;

    /// The distances to several other scans, in their order.
    fn columns(
        &mut self,
        of: ScanId,
        others: &[ScanId],
        grid: usize,
    ) -> Result<Vec<Vec<f32>>, ScanError> {
        others.iter().map(|&other| self.column(of, other, grid)).collect()
    }

    /// As [`Distances::column`], as if the other scan did not have the tokens `excluded`.
    fn column_without(
        &mut self,
        of: ScanId,
        other: ScanId,
        grid: usize,
        excluded: &[usize],
    ) -> Result<Vec<f32>, ScanError>;
}

/// A scan of a window, as the scoring sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// The scan.
    pub id: ScanId,
    /// The cells of its tokens, for each part of a layer: view by view, or of all views joined.
    pub parts: Vec<Foreground>,
    /// Whether others are compared with it.
    pub is_reference: bool,
    /// Whose scan it is, where that is known: it is not compared with others of theirs.
    pub patient: Option<Patient>,
}

impl Member {
    fn is_of_same_patient(&self, other: &Self) -> bool {
        self.patient.is_some() && self.patient == other.patient
    }
}

/// The parts of a layer's tokens.
pub fn parts_of(grids: &[TokenGrid], n_parts: usize) -> Vec<Foreground> {
    grids[..n_parts].iter().map(|grid| grid.foreground().clone()).collect()
}

/// Tokens of all parts of one layer.
pub fn tokens_per_layer(grids: &[TokenGrid], n_parts: usize) -> usize {
    grids.iter().take(n_parts).map(TokenGrid::n_tokens).sum()
}

/// The scores of a window.
#[derive(Debug, Clone, Default)]
pub struct WindowScores {
    /// In the order of the members; empty before the window was scored.
    pub scans: Vec<ScanScores>,
    /// What their maps hold, in the same order.
    pub profiles: Vec<MapProfile>,
    /// Whether others were compared with them, in the same order.
    pub are_references: Vec<bool>,
    /// Numbers of their patients, in the same order.
    patients: Vec<usize>,
    /// Anomalies that several members share.
    pub shared: Vec<SharedAnomaly>,
}

impl WindowScores {
    /// The scans that others were compared with.
    pub fn references(&self) -> Vec<&ScanScores> {
        let references = self.scans.iter().zip(&self.are_references);
        references.filter(|(_, is)| **is).map(|(scan, _)| scan).collect()
    }

    /// The scans that member `index` was compared with.
    pub fn others(&self, index: usize) -> Vec<&ScanScores> {
        self.compared_with(index).map(|other| &self.scans[other]).collect()
    }

    /// How far member `index` lies from the scans that it was compared with: [`scoring::shift`].
    pub fn shift(&self, index: usize) -> Option<f64> {
        scoring::shift(&self.scans[index], &self.others(index))
    }

    /// Threshold of the map of member `index`: [`scoring::label_free_threshold`].
    fn threshold(&self, index: usize, clean: Fraction) -> f32 {
        let others = self.compared_with(index).map(|other| self.profiles[other]);
        let profiles: Vec<MapProfile> = [self.profiles[index]].into_iter().chain(others).collect();
        scoring::label_free_threshold(&profiles, 0, clean)
    }

    /// Positions of the references of other patients.
    fn compared_with(&self, index: usize) -> impl Iterator<Item = usize> {
        let is_other = move |&other: &usize| self.patients[other] != self.patients[index];
        (0..self.scans.len()).filter(|&other| self.are_references[other]).filter(is_other)
    }
}

/// The scores of every member of a window, in the order of `members`.
///
/// Members that are no references (guests) are compared with those that are, and change nothing for
/// them: what references score, how their places are levelled, and what they share is the same
/// without the others. Scans of one patient are not compared with each other.
pub fn score_members(
    members: &[Member],
    layers: &[usize],
    settings: &Scoring,
    distances: &mut dyn Distances,
) -> Result<WindowScores, ScanError> {
    let n_parts = members.first().map_or(0, |member| member.parts.len());
    let (references, guests): (Vec<&Member>, Vec<&Member>) =
        members.iter().partition(|member| member.is_reference);
    let token_sets = (0..n_parts).flat_map(|part| {
        let set = move |(index, &layer): (usize, &usize)| Tokens {
            grid: index * n_parts + part,
            part,
            layer,
        };
        layers.iter().enumerate().map(set)
    });
    let token_sets: Vec<Tokens> = token_sets.collect();
    let mut scores = TokenScores::default();
    let mut shared = Vec::new();
    if settings.filter_shared {
        for &tokens in &token_sets {
            shared.extend(score_filtered(
                &references,
                &guests,
                tokens,
                settings,
                distances,
                &mut scores,
            )?);
        }
    } else {
        // Scan by scan: the columns of a large window need not be in memory together. In the order
        // of their ids, in which columns towards one scan lie in the store: what is read with one
        // of them is still there for the next.
        let none = vec![Vec::new(); references.len()];
        let mut members: Vec<&Member> = members.iter().collect();
        members.sort_by_key(|member| member.id);
        for member in members {
            for &tokens in &token_sets {
                let nearest = nearest(member, &references, &none, tokens, distances)?;
                scores.add(member, tokens, &nearest, settings.keep);
            }
        }
    }
    // The position of the first scan of theirs.
    let patient = |member: &Member| {
        let is_own = |other: &Member| other.id == member.id || other.is_of_same_patient(member);
        members.iter().position(is_own).unwrap_or_default()
    };
    let patients: Vec<usize> = references.iter().map(|member| patient(member)).collect();
    let mut views: BTreeMap<ScanId, Vec<ScoreGrid>> = BTreeMap::new();
    for part in 0..n_parts {
        let grid = |member: &&Member| ScoreGrid {
            foreground: member.parts[part].clone(),
            scores: scores.mean_over_layers(member, part),
        };
        let mut grids: Vec<ScoreGrid> = references.iter().map(grid).collect();
        let mut guest_grids: Vec<ScoreGrid> = guests.iter().map(grid).collect();
        if settings.positional_correction > 0.0 {
            for (grid, guest) in guest_grids.iter_mut().zip(&guests) {
                level_guest(
                    grid,
                    patient(guest),
                    &grids,
                    &patients,
                    settings.positional_correction,
                );
            }
            scoring::correct_positions(&mut grids, &patients, settings.positional_correction);
        }
        for (member, grid) in references.iter().zip(grids).chain(guests.iter().zip(guest_grids)) {
            views.entry(member.id).or_default().push(grid);
        }
    }
    let scans: Vec<ScanScores> = members
        .par_iter()
        .map(|member| ScanScores::new(joined_scores(&views[&member.id])))
        .collect();
    let profile = |scan: &ScanScores| MapProfile::new(scan.cells.clone(), settings.false_positives);
    let profiles = scans.par_iter().map(profile).collect();
    let are_references = members.iter().map(|member| member.is_reference).collect();
    let patients = members.iter().map(patient).collect();
    Ok(WindowScores { scans, profiles, are_references, patients, shared })
}

/// Levels the scores of a scan that is no reference by the places of those that are.
fn level_guest(
    guest: &mut ScoreGrid,
    patient: usize,
    references: &[ScoreGrid],
    patients: &[usize],
    share: f64,
) {
    let grids = references.iter().chain([&*guest]);
    let mut grids: Vec<ScoreGrid> = grids.cloned().collect();
    let patients = [patients, &[patient]].concat();
    scoring::correct_positions(&mut grids, &patients, share);
    *guest = grids.pop().expect("it was put there");
}

/// The scores of each member's tokens, part by part, in each layer by layer.
#[derive(Default)]
struct TokenScores(BTreeMap<(ScanId, usize), Vec<Vec<Option<f32>>>>);

impl TokenScores {
    /// Scores one grid of tokens of a member; the layers of a part must come in order.
    fn add(&mut self, of: &Member, tokens: Tokens, nearest: &NearestDistances, keep: Fraction) {
        let scores = scoring::mutual_scores(nearest, keep);
        self.0.entry((of.id, tokens.part)).or_default().push(scores);
    }

    fn mean_over_layers(&self, of: &Member, part: usize) -> Vec<Option<f32>> {
        scoring::mean_over_layers(&self.0[&(of.id, part)])
    }
}

/// Which tokens of the members are scored.
#[derive(Clone, Copy)]
struct Tokens {
    /// Position among all grids of a scan.
    grid: usize,
    /// Position among the grids of a layer.
    part: usize,
    /// Encoder block.
    layer: usize,
}

/// Scores one grid of tokens of every member; what references share is left out of the candidates.
fn score_filtered(
    references: &[&Member],
    guests: &[&Member],
    tokens: Tokens,
    settings: &Scoring,
    distances: &mut dyn Distances,
    scores: &mut TokenScores,
) -> Result<Vec<SharedAnomaly>, ScanError> {
    let none = vec![Vec::new(); references.len()];
    let mut window: Vec<NearestDistances> = references
        .iter()
        .map(|member| nearest(member, references, &none, tokens, distances))
        .collect::<Result<_, _>>()?;
    let found = leave_out_shared(&mut window, references, tokens, settings, distances)?;
    for (member, nearest) in references.iter().zip(&window) {
        scores.add(member, tokens, nearest, settings.keep);
    }
    for guest in guests {
        let nearest = nearest(guest, references, &found.excluded, tokens, distances)?;
        scores.add(guest, tokens, &nearest, settings.keep);
    }
    Ok(found.anomalies)
}

/// Distances of a member to all references but itself, as if these had no `excluded` tokens;
/// infinite to scans of the same patient.
fn nearest(
    member: &Member,
    references: &[&Member],
    excluded: &[Vec<usize>],
    tokens: Tokens,
    distances: &mut dyn Distances,
) -> Result<NearestDistances, ScanError> {
    let n_tokens = member.parts[tokens.part].cells.len();
    let others = references.iter().zip(excluded).filter(|(other, _)| other.id != member.id);
    let compared = others.clone().filter(|(other, _)| !other.is_of_same_patient(member));
    let ids: Vec<ScanId> = compared.map(|(other, _)| other.id).collect();
    let mut found = distances.columns(member.id, &ids, tokens.grid)?.into_iter();
    let columns = others.map(|(other, excluded)| {
        if other.is_of_same_patient(member) {
            return Ok(vec![f32::INFINITY; n_tokens]);
        }
        let column = found.next().expect("a column per scan that was asked for");
        if excluded.is_empty() {
            return Ok(column);
        }
        distances.column_without(member.id, other.id, tokens.grid, excluded)
    });
    Ok(NearestDistances::new(n_tokens, columns.collect::<Result<_, ScanError>>()?))
}

/// What several references share, and the tokens of each that no longer count as candidates.
struct Shared {
    anomalies: Vec<SharedAnomaly>,
    excluded: Vec<Vec<usize>>,
}

/// Looks for anomalies that several members share, and takes their tokens out of the candidates.
fn leave_out_shared(
    window: &mut [NearestDistances],
    members: &[&Member],
    tokens: Tokens,
    settings: &Scoring,
    distances: &mut dyn Distances,
) -> Result<Shared, ScanError> {
    let found = community::find_communities(window, settings.keep, &settings.community);
    let excluded = found.excluded_tokens(members.len());
    for (scan, other) in community::due_columns(window, &excluded) {
        let (of, from) = (members[scan].id, members[other].id);
        let column = distances.column_without(of, from, tokens.grid, &excluded[other])?;
        // The scan itself has no column.
        window[scan].replace(other - usize::from(other > scan), column);
    }
    let anomalies = found.suspects.into_iter().map(|suspect| SharedAnomaly {
        layer: tokens.layer,
        members: suspect.members.iter().map(|&member| members[member].id).collect(),
        n_excluded: suspect.excluded.iter().map(Vec::len).sum(),
    });
    Ok(Shared { anomalies: anomalies.collect(), excluded })
}

/// What is said about member `index` of a scored window.
pub fn finding(
    source: &Source,
    scores: &WindowScores,
    index: usize,
    method: &Method,
    settings: &Scoring,
) -> Result<Finding, ScanError> {
    let own = &scores.scans[index];
    let other_tops: Vec<f32> = scores.others(index).iter().map(|other| other.top1_mean).collect();
    let cube = source.cube(method)?;
    let placement = GridPlacement { cube_side: method.cube.side, cube };
    let map = score_map(&own.foreground, &own.cells, &placement, &source.brain);
    let threshold = scores.threshold(index, settings.clean_scans);
    let voxel_mm3 = source.raw.affine.voxel_volume_mm3();
    let min_voxels = (settings.min_cluster_mm3 / voxel_mm3).ceil() as usize;
    let regions = regions_above(&map, source.raw.shape, threshold, min_voxels.max(1));
    let mut mask = vec![false; map.len()];
    for &voxel in regions.iter().flatten() {
        mask[voxel] = true;
    }
    Ok(Finding {
        score_max: own.max,
        score_top1_mean: own.top1_mean,
        percentile: scoring::percentile(own.top1_mean, &other_tops),
        shift: scores.shift(index),
        threshold,
        n_cells: own.cells.len(),
        n_unmatched_cells: own.n_unmatched,
        clusters: regions.iter().map(|region| cluster(region, &map, &source.raw)).collect(),
        map,
        mask,
    })
}

fn cluster(region: &Region, map: &[f32], raw: &RawVolume) -> Cluster {
    // The first of equal peaks, so that the result does not depend on the search.
    let peak = region
        .iter()
        .copied()
        .fold(region[0], |best, voxel| if map[voxel] > map[best] { voxel } else { best });
    let peak_voxel = raw.shape.voxel(peak);
    Cluster {
        n_voxels: region.len(),
        volume_mm3: region.len() as f64 * raw.affine.voxel_volume_mm3(),
        peak_score: map[peak],
        peak_voxel,
        peak_world_mm: raw.affine.to_world(VoxelPoint(peak_voxel.map(|v| v as f64))).0,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::numeric::{
        geometry::{Affine, Shape3, WorldPoint},
        preprocess::CubeSettings,
    };

    /// A grid of 4 mm voxels, 160 x 168 x 176 mm, whose brain are the voxels that are `inside`.
    fn source(inside: impl Fn([usize; 3]) -> bool) -> Source {
        let shape = Shape3([40, 42, 44]);
        let affine = Affine::scaling(4.0, WorldPoint([0.0; 3])).unwrap();
        let voxel = |o: usize| if inside(shape.voxel(o)) { 1.0 + (o % 7) as f32 } else { 0.0 };
        let raw = RawVolume { shape, voxels: (0..shape.n_voxels()).map(voxel).collect(), affine };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("scan.nii.gz");
        std::fs::write(&path, nifti::encode_volume(&raw)).unwrap();
        let limits = Limits { max_file_bytes: 1 << 24, max_voxels: 1 << 24 };
        read_source(&path, None, None, &limits).unwrap()
    }

    /// 512 cells of 22 mm.
    pub(in crate::pipeline) fn method() -> Method {
        Method {
            fingerprint: String::new(),
            model: String::new(),
            weights_sha256: String::new(),
            layers: vec![1],
            device: String::new(),
            precision: String::new(),
            cube: CubeSettings { side: 112, field_of_view_mm: 176.0, min_brain_ml: 200.0 },
            n_parts: 1,
            patch: 14,
            min_brain_fraction: 0.3,
            alignment: AlignmentChoice::Never,
            hook: None,
            template: None,
            template_sha256: None,
            brain_network: None,
            uses_session_t1: false,
            landmarks: None,
        }
    }

    /// Distances that any change of a scan, its tokens or its other scan changes.
    struct MadeUp;

    impl Distances for MadeUp {
        fn column(&mut self, of: ScanId, other: ScanId, _: usize) -> Result<Vec<f32>, ScanError> {
            let [a, b] = [of, other].map(|id| f64::from(id.0[0]));
            let distance = |token: usize| 2.0 + (a + 1.7 * b + 0.3 * a * b + token as f64).sin();
            Ok((0..50).map(|token| distance(token) as f32).collect())
        }

        fn column_without(
            &mut self,
            of: ScanId,
            other: ScanId,
            grid: usize,
            _: &[usize],
        ) -> Result<Vec<f32>, ScanError> {
            self.column(of, other, grid)
        }
    }

    #[test]
    fn a_scan_that_is_no_reference_is_compared_with_those_that_are_and_changes_none() {
        let settings = crate::config::Config::parse("").unwrap().scoring;
        let not_levelled = Scoring { positional_correction: 0.0, ..settings };
        let member = |n: u8, is_reference| Member {
            id: ScanId([n; 32]),
            parts: vec![Foreground { shape: Shape3([5, 5, 2]), cells: (0..50).collect() }; 3],
            is_reference,
            patient: None,
        };
        let score_by = |settings: &Scoring, members: &[Member]| {
            score_members(members, &[9], settings, &mut MadeUp).unwrap()
        };
        let score = |members: &[Member]| score_by(&settings, members);
        let references = [1, 3, 4, 5].map(|n| member(n, true));
        let alone = score(&references);
        let [one, rest @ ..] = references;
        let with = |is_reference| [&[one.clone(), member(2, is_reference)], &rest[..]].concat();
        let (aside, joined) = (score(&with(false)), score(&with(true)));
        assert_eq!(aside.are_references, [true, false, true, true, true]);
        assert_ne!(aside.scans[2], joined.scans[2]);
        // Its own distances are the same whether it is a reference or not.
        let [aside_alone, joined_alone] =
            [false, true].map(|joins| score_by(&not_levelled, &with(joins)).scans[1].clone());
        assert_eq!(aside_alone, joined_alone);
        let unchanged = [0, 2, 3, 4].map(|index| aside.scans[index].clone());
        assert_eq!(unchanged.to_vec(), alone.scans);
        for (index, own) in [(0, 0), (2, 1), (4, 3)] {
            assert_eq!(aside.shift(index), alone.shift(own));
            let clean = settings.clean_scans;
            assert_eq!(aside.threshold(index, clean), alone.threshold(own, clean));
        }
        assert_eq!(aside.others(1).len(), 4);
        assert_eq!((aside.others(0).len(), aside.references().len()), (3, 4));
    }

    #[test]
    fn scans_of_one_patient_say_nothing_of_each_other() {
        let settings = crate::config::Config::parse("").unwrap().scoring;
        let member = |n: u8, patient: Option<&str>| Member {
            id: ScanId([n; 32]),
            parts: vec![Foreground { shape: Shape3([5, 5, 2]), cells: (0..50).collect() }; 3],
            is_reference: n != 6,
            patient: patient.and_then(Patient::of_header),
        };
        let all = [
            member(1, Some("a")),
            member(2, None),
            member(3, Some("a")),
            member(4, Some("b")),
            member(5, None),
            // A guest whose other scans are references.
            member(6, Some("a")),
        ];
        for (positional_correction, filter_shared) in [(0.0, false), (0.0, true), (0.3, false)] {
            let settings = Scoring { positional_correction, filter_shared, ..settings };
            let score =
                |members: &[Member]| score_members(members, &[9], &settings, &mut MadeUp).unwrap();
            let scores = score(&all);
            for index in [0, 2, 5] {
                assert_eq!(scores.others(index).len(), 3);
                if positional_correction == 0.0 {
                    let others = [1, 3, 4].map(|other| all[other].clone());
                    let alone = score(&[&[all[index].clone()][..], &others].concat());
                    assert_eq!(scores.scans[index], alone.scans[0]);
                }
            }
            assert_eq!([1, 3].map(|index| scores.others(index).len()), [4, 4]);
            assert_eq!(scores.references().len(), 5);
            let strangers = all.clone().map(|scan| Member { patient: None, ..scan });
            assert_ne!(score(&strangers).scans[0], scores.scans[0]);
            assert_eq!(score(&strangers).others(0).len(), 4);
        }
    }

    #[test]
    fn speckle_of_the_volume_of_a_brain_is_no_brain() {
        // One voxel in eight, in no pattern that the cells share: 590 ml, all within the cube.
        let speckle = source(|[x, y, z]| (3 * x + 5 * y + 6 * z) % 8 == 0);
        let error = canonical(&speckle, &method(), None).unwrap_err();
        let ScanError::Refused(refusal) = error else { panic!("{error}") };
        assert_eq!(refusal.reason, QuarantineReason::NoBrain);
        assert!(refusal.found.starts_with("0 of 512 cells"), "{refusal}");
        assert!(refusal.needed.starts_with("at least 8;"), "{refusal}");
    }

    #[test]
    fn the_smallest_brain_has_foreground_enough() {
        // 15 x 15 x 14 voxels of 64 mm^3: 201.6 ml.
        let small = source(|[x, y, z]| x.max(y) < 15 && z < 14);
        let canonical = canonical(&small, &method(), None).unwrap();
        assert!(canonical.brain_ml < 202.0);
    }

    #[test]
    fn a_mask_is_found_by_stem_and_by_subject() {
        let folder = tempfile::tempdir().unwrap();
        let scan = folder.path().join("sub-1_FLAIR.nii.gz");
        assert_eq!(companion_mask(&scan), None);
        let subject = folder.path().join("sub-1_brain.nii.gz");
        std::fs::write(&subject, "").unwrap();
        assert_eq!(companion_mask(&scan), Some(subject));
        let stem = folder.path().join("sub-1_FLAIR_brain.nii");
        std::fs::write(&stem, "").unwrap();
        assert_eq!(companion_mask(&scan), Some(stem));
    }

    #[test]
    fn a_name_that_is_not_utf_8_finds_its_mask_and_a_link_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &[u8]| folder.path().join(OsStr::from_bytes(name));
        let (scan, mask) = (path(b"M\xfcller_T1w.nii.gz"), path(b"M\xfcller_brain.nii.gz"));
        std::fs::write(&mask, "").unwrap();
        assert_eq!(companion_mask(&scan), Some(mask.clone()));
        std::fs::rename(&mask, path(b"elsewhere")).unwrap();
        std::os::unix::fs::symlink(path(b"elsewhere"), &mask).unwrap();
        assert_eq!(companion_mask(&scan), None);
    }

    #[test]
    fn a_link_is_a_mask_beside_a_scan_that_is_one() {
        use std::os::unix::fs::symlink;
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["elsewhere", "sub-1_T1w.nii"] {
            std::fs::write(at(name), "").unwrap();
        }
        symlink(at("elsewhere"), at("sub-1_brain.nii")).unwrap();
        symlink(at("elsewhere"), at("sub-1_FLAIR.nii")).unwrap();
        assert_eq!(companion_mask(&at("sub-1_FLAIR.nii")), Some(at("sub-1_brain.nii")));
        assert_eq!(companion_mask(&at("sub-1_T1w.nii")), None);
        // A file is a mask whatever the scan is.
        std::fs::write(at("sub-1_FLAIR_brain.nii"), "").unwrap();
        assert_eq!(companion_mask(&at("sub-1_FLAIR.nii")), Some(at("sub-1_FLAIR_brain.nii")));
    }

    #[test]
    fn a_json_is_found_by_stem_and_neither_a_link_nor_a_result_is_one() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["sub-1.json", "a_anomaly.json", "elsewhere"] {
            std::fs::write(at(name), "{}").unwrap();
        }
        assert_eq!(companion_json(&at("a_anomaly.nii.gz")), None);
        assert_eq!(companion_json(&at("sub-1_T1w.nii.gz")), None, "not of the whole subject");
        std::os::unix::fs::symlink(at("elsewhere"), at("sub-1_T1w.json")).unwrap();
        assert_eq!(companion_json(&at("sub-1_T1w.nii.gz")), None);
        std::os::unix::fs::symlink(at("elsewhere"), at("sub-1_T1w.nii")).unwrap();
        assert_eq!(companion_json(&at("sub-1_T1w.nii")), Some(at("sub-1_T1w.json")));
        std::fs::write(at("sub-2_T1w.json"), "{}").unwrap();
        assert_eq!(companion_json(&at("sub-2_T1w.nii.gz")), Some(at("sub-2_T1w.json")));
    }

    #[test]
    fn hostile_names_become_harmless_stems() {
        assert_eq!(output_stem("sub-01_T1w"), "sub-01_T1w");
        assert_eq!(output_stem("../../etc/passwd"), "_.._etc_passwd");
        assert_eq!(output_stem("a b\n;rm"), "a_b__rm");
        assert_eq!(output_stem(""), "scan");
        assert_eq!(output_stem(&"x".repeat(400)).len(), 120);
    }

    #[test]
    fn the_stem_loses_only_the_nifti_ending() {
        assert_eq!(stem_of(Path::new("/in/a.b.nii.gz")), "a.b");
        assert_eq!(stem_of(Path::new("a.nii")), "a");
    }
}
