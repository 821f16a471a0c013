//! Whole heads: the daemon aligns them to a template, extracts the brain and scores them.

use std::{
    fs,
    path::PathBuf,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

use oddscan::{
    domain::{
        BrainNetwork, BrainPart,
        error::DeviceError,
        head::{HeadError, brain_of_head, brain_of_session},
        scan::{BrainSource, ScanId},
    },
    nifti::{self, Limits},
    numeric::{
        brain,
        evaluation::Overlap,
        geometry::{Affine, Shape3, WorldPoint},
        projection::Normal,
        registration::{RegistrationError, Template, register},
        volume::RawVolume,
    },
    report::Standing,
};

use crate::{
    goldens::shared,
    support::{Site, oddscan},
};

/// A template of real heads. It is among the scans that this repository does not contain.
const TEMPLATE: &str = "data/templates/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz";

/// The tissue of a made-up head at a place, mm from the middle of its brain.
#[derive(Clone, Copy, PartialEq)]
pub enum Tissue {
    Air,
    Scalp,
    Skull,
    Fluid,
    Grey,
    White,
}

fn tissue([x, y, z]: [f64; 3]) -> Tissue {
    let ball = |centre: [f64; 3], radii: [f64; 3]| -> f64 {
        let square = |d: f64, r: f64| (d / r).powi(2);
        (square(x - centre[0], radii[0])
            + square(y - centre[1], radii[1])
            + square(z - centre[2], radii[2]))
        .sqrt()
    };
    let folds = 0.05 * ((x / 7.0).sin() + (y / 8.0).cos() + (z / 6.0).sin());
    let cerebrum = ball([0.0; 3], [66.0, 82.0, 58.0]);
    let cerebellum = ball([0.0, -48.0, -46.0], [46.0, 30.0, 24.0]);
    let ventricle =
        ball([14.0, 4.0, 8.0], [7.0, 30.0, 12.0]).min(ball([-14.0, 4.0, 8.0], [7.0, 30.0, 12.0]));
    let nucleus =
        ball([22.0, 8.0, -6.0], [9.0, 16.0, 9.0]).min(ball([-22.0, 8.0, -6.0], [9.0, 16.0, 9.0]));
    let brain = cerebrum.min(cerebellum);
    if ventricle < 1.0 {
        return Tissue::Fluid;
    }
    match brain {
        _ if nucleus < 1.0 => Tissue::Grey,
        r if r < 0.8 + folds => Tissue::White,
        r if r < 1.0 => Tissue::Grey,
        r if r < 1.03 => Tissue::Fluid,
        r if r < 1.12 => Tissue::Skull,
        r if r < 1.22 => Tissue::Scalp,
        _ if z < -40.0 && (x.powi(2) + (y + 15.0).powi(2)).sqrt() < 55.0 => Tissue::Scalp,
        _ => Tissue::Air,
    }
}

/// Intensities of cerebrospinal fluid, grey and white matter, scalp.
type Contrast = [f64; 4];
pub const T1: Contrast = [30.0, 110.0, 170.0, 230.0];
/// Grey is brighter than white.
const FLAIR: Contrast = [25.0, 190.0, 140.0, 210.0];
/// Cerebrospinal fluid is brightest.
const T2: Contrast = [240.0, 150.0, 100.0, 180.0];

/// A head. `to_scan` moves the middle of its brain from the origin to the scan.
pub fn head(seed: u64, to_scan: &Affine, contrast: Contrast, is_stripped: bool) -> RawVolume {
    let mut random = Normal::new(seed);
    let shape = Shape3([84, 92, 76]);
    let affine = Affine::scaling(2.8, WorldPoint([-116.0, -127.0, -120.0])).unwrap();
    let to_head = to_scan.inverse().after(&affine);
    let voxel = |offset: usize| {
        let tissue = tissue(to_head.apply(shape.voxel(offset).map(|v| v as f64)));
        let [fluid, grey, white, scalp] = contrast;
        let is_brain = matches!(tissue, Tissue::Fluid | Tissue::Grey | Tissue::White);
        if is_stripped && !is_brain {
            return 0.0;
        }
        let value = match tissue {
            Tissue::Air => 1.0,
            Tissue::Skull => 12.0,
            Tissue::Scalp => scalp,
            Tissue::Fluid => fluid,
            Tissue::Grey => grey,
            Tissue::White => white,
        };
        (value + 4.0 * random.next()).max(1.0) as f32
    };
    let voxels = (0..shape.n_voxels()).map(voxel).collect();
    RawVolume { shape, voxels, affine }
}

/// A turn about x, another scale along each axis, a shift.
pub fn placed(degrees: f64, scales: [f64; 3], shift: [f64; 3]) -> Affine {
    let (sin, cos) = degrees.to_radians().sin_cos();
    let [a, b, c] = scales;
    Affine::new([
        [a, 0.02, 0.0, shift[0]],
        [0.0, b * cos, -c * sin, shift[1]],
        [0.0, b * sin, c * cos, shift[2]],
    ])
    .unwrap()
}

fn unmoved() -> Affine {
    placed(0.0, [1.0; 3], [0.0; 3])
}

fn template() -> Template {
    Template::new(head(0, &unmoved(), T1, true))
}

/// Largest distance between the mapped landmarks in the brain and their true places.
pub fn landmark_error_mm(found: &Affine, truth: &Affine) -> f64 {
    let landmarks = [
        [0.0, 70.0, 0.0],
        [0.0, -70.0, 0.0],
        [55.0, 0.0, 0.0],
        [-55.0, 0.0, 0.0],
        [0.0, 0.0, 48.0],
        [0.0, -45.0, -50.0],
    ];
    let apart = |landmark: [f64; 3]| {
        let (a, b) = (found.apply(landmark), truth.apply(landmark));
        (0..3).map(|axis| (a[axis] - b[axis]).powi(2)).sum::<f64>().sqrt()
    };
    landmarks.map(apart).into_iter().fold(0.0, f64::max)
}

#[test]
fn heads_are_aligned_whatever_their_pose_and_contrast_and_their_brains_found() {
    let template = template();
    let poses = [
        placed(16.0, [0.9, 0.95, 0.88], [12.0, -20.0, 14.0]),
        placed(-14.0, [1.06, 1.0, 0.97], [-15.0, 9.0, -12.0]),
    ];
    for (seed, truth) in (1..).zip(poses) {
        for contrast in [T1, FLAIR] {
            let scan = head(seed, &truth, contrast, false);
            let found = register(&scan, &template, true).unwrap();
            let error = landmark_error_mm(&found.to_scan, &truth);
            assert!(error < 2.5, "{error} mm, distinctness {}", found.distinctness);
            assert_eq!(register(&scan, &template, true), Ok(found), "to the last bit");
            let brain = brain::extract(&scan, &template, &found).unwrap();
            let truly = head(seed, &truth, contrast, true);
            let pairs = brain.inside.iter().zip(&truly.voxels).map(|(found, v)| (*found, *v > 0.0));
            let dice = Overlap::of(pairs).dice().unwrap();
            assert!(dice > 0.95, "{dice}");
        }
    }
}

#[test]
fn what_is_no_whole_brain_is_not_aligned() {
    let template = template();
    let mut noise = head(1, &unmoved(), T1, false);
    let mut random = Normal::new(5);
    noise.voxels.fill_with(|| (100.0 + 20.0 * random.next()) as f32);
    let error = register(&noise, &template, true).unwrap_err();
    assert!(matches!(error, RegistrationError::Unlike { .. }), "{error}");
    noise.voxels.fill(7.0);
    assert_eq!(register(&noise, &template, true), Err(RegistrationError::NoContrast));

    let whole = head(1, &unmoved(), T1, false);
    let n_kept = |n_planes: usize| {
        let shape = Shape3([84, 92, n_planes]);
        let from = whole.shape.offset([0, 0, whole.shape.0[2] - n_planes]);
        let voxels = whole.voxels[from..].to_vec();
        RawVolume { shape, voxels, affine: whole.affine }
    };
    // The lower 56 mm alone; then a slab.
    let slab = register(&n_kept(15), &template, true).unwrap_err();
    assert!(matches!(slab, RegistrationError::TooSmall(_)), "{slab}");
    let cut = register(&n_kept(22), &template, true);
    assert!(cut.is_err(), "{cut:?}");
}

/// Slices of three planes each: 2.8 x 2.8 x 8.4 mm, as clinics export them.
fn thick(scan: &RawVolume) -> RawVolume {
    let [nx, ny, nz] = scan.shape.0;
    let shape = Shape3([nx, ny, nz / 3]);
    let mean = |offset: usize| {
        let [x, y, z] = shape.voxel(offset);
        (0..3).map(|k| scan.voxels[scan.shape.offset([x, y, 3 * z + k])]).sum::<f32>() / 3.0
    };
    let rows = scan.affine.rows().map(|r| [r[0], r[1], 3.0 * r[2], r[3] + r[2]]);
    let voxels = (0..shape.n_voxels()).map(mean).collect();
    RawVolume { shape, voxels, affine: Affine::new(rows).unwrap() }
}

#[test]
fn heads_in_thick_slices_are_aligned_in_every_sequence() {
    let template = template();
    let truth = placed(12.0, [0.93, 0.95, 0.9], [9.0, -14.0, 8.0]);
    for contrast in [T1, FLAIR, T2] {
        let scan = thick(&head(4, &truth, contrast, false));
        let found = register(&scan, &template, true).unwrap();
        let error = landmark_error_mm(&found.to_scan, &truth);
        // A little more than half a slice.
        assert!(error < 5.0, "{contrast:?}: {error} mm, distinctness {}", found.distinctness);
        let brain = brain::extract(&scan, &template, &found).unwrap();
        let truly = thick(&head(4, &truth, contrast, true));
        let pairs = brain.inside.iter().zip(&truly.voxels).map(|(found, v)| (*found, *v > 15.0));
        let dice = Overlap::of(pairs).dice().unwrap();
        assert!(dice > 0.9, "{contrast:?}: {dice}");
    }
}

#[test]
fn heads_whose_header_is_wrong_and_phantoms_are_told_from_heads() {
    let template = template();
    let upright = head(1, &unmoved(), T1, false);
    // Upside down and back to front; on the left side; back to front.
    for signs in [[1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]] {
        let mut turned = upright.clone();
        let rows = turned.affine.rows();
        turned.affine =
            Affine::new([0, 1, 2].map(|axis| rows[axis].map(|v| signs[axis] * v))).unwrap();
        let error = register(&turned, &template, true).unwrap_err();
        let best = error.best().unwrap_or_else(|| panic!("{signs:?}: {error}"));
        assert!(best.distinctness < 0.1, "{signs:?}: {}", best.distinctness);
    }

    let mut random = Normal::new(6);
    let mut ball = upright.clone();
    for (offset, voxel) in ball.voxels.iter_mut().enumerate() {
        let place = ball.affine.apply(ball.shape.voxel(offset).map(|v| v as f64));
        let radius = place.iter().map(|v| v * v).sum::<f64>().sqrt();
        let value = if radius < 75.0 { 200.0 } else { 0.0 };
        *voxel = (value + 4.0 * random.next()).abs() as f32;
    }
    let error = register(&ball, &template, true).unwrap_err();
    let RegistrationError::Unlike { best, is_head: true } = &error else { panic!("{error}") };
    assert!(best.distinctness < 0.1, "{}", best.distinctness);
    let said = error.to_string();
    assert!(said.starts_with("a distinctness of "), "{said}");
}

/// Takes the middle of any image for brain.
struct Middle {
    /// Radius of the brain, as a share of the edges of the image.
    radius: f64,
    n_calls: AtomicUsize,
}

impl Middle {
    fn new(radius: f64) -> Self {
        Self { radius, n_calls: AtomicUsize::new(0) }
    }
}

impl BrainNetwork for Middle {
    fn forward(&self, part: BrainPart, _: &[f32], side: usize) -> Result<Vec<f32>, DeviceError> {
        self.n_calls.fetch_add(1, Relaxed);
        // The box around the located brain has a margin of 10 % on each side.
        let radius = if part == BrainPart::Locate { self.radius } else { 0.5 / 1.2 };
        let radius = side as f64 * radius;
        let shape = Shape3::cube(side);
        let is_inside = |offset: usize| {
            let place = shape.voxel(offset).map(|v| v as f64 - side as f64 / 2.0);
            place.iter().map(|v| v * v).sum::<f64>() < radius * radius
        };
        Ok((0..shape.n_voxels()).map(|offset| f32::from(u8::from(is_inside(offset)))).collect())
    }
}

#[test]
fn the_brain_of_the_networks_is_taken_and_held_against_that_of_the_template() {
    let template = template();
    let scan = head(1, &unmoved(), T1, false);
    let by_template = brain_of_head(&scan, &template, None).unwrap();
    assert_eq!((by_template.from, by_template.agreement), (BrainSource::Template, None));

    let network = Middle::new(0.31);
    let found = brain_of_head(&scan, &template, Some(&network)).unwrap();
    assert_eq!((found.from, found.alignment), (BrainSource::Network, by_template.alignment));
    assert_ne!(found.brain, by_template.brain);
    let pairs = found.brain.inside.iter().zip(&by_template.brain.inside);
    assert_eq!(found.agreement, Overlap::of(pairs.map(|(a, b)| (*a, *b))).dice());
    assert_eq!(network.n_calls.into_inner(), 2, "one to locate, one to outline");

    // A small part of the brain is none.
    let found = brain_of_head(&scan, &template, Some(&Middle::new(0.18))).unwrap();
    assert_eq!((found.from, &found.brain), (BrainSource::Template, &by_template.brain));
    assert!(found.agreement.unwrap() < 0.7);
}

#[test]
fn what_the_networks_take_for_a_brain_must_be_aligned_too() {
    let mut noise = head(1, &unmoved(), T1, false);
    let mut random = Normal::new(5);
    noise.voxels.fill_with(|| (100.0 + 20.0 * random.next()) as f32);
    let network = Middle::new(0.25);
    let error = brain_of_head(&noise, &template(), Some(&network)).unwrap_err();
    assert!(matches!(error, HeadError::Misaligned(RegistrationError::Unlike { .. })), "{error}");
    assert!(network.n_calls.into_inner() >= 2, "they were asked");
}

#[test]
fn the_brain_of_a_t1_is_carried_over_to_its_session() {
    let template = template();
    let truth = placed(6.0, [0.95, 0.97, 0.92], [4.0, -6.0, 5.0]);
    let t1 = head(1, &truth, T1, false);
    // The patient has moved a little between the two.
    let moved = placed(2.0, [1.0; 3], [1.5, 2.0, -1.0]);
    let flair = thick(&head(2, &moved.after(&truth), FLAIR, false));
    let truly = thick(&head(2, &moved.after(&truth), FLAIR, true));
    let own = brain_of_head(&flair, &template, None).unwrap();
    let carried = brain_of_session(&flair, &t1, Some(&own), &template, None).unwrap().unwrap();
    assert_eq!(carried.from, BrainSource::SessionT1);
    assert!(carried.agreement.unwrap() > 0.9);
    let pairs = carried.brain.inside.iter().zip(&truly.voxels).map(|(f, v)| (*f, *v > 15.0));
    let dice = Overlap::of(pairs).dice().unwrap();
    assert!(dice > 0.93, "{dice}");

    // A T1 whose header does not use the other scan's frame.
    let rows = t1.affine.rows().map(|r| [r[0], r[1], r[2], r[3] + 150.0]);
    let elsewhere = RawVolume { affine: Affine::new(rows).unwrap(), ..t1 };
    let carried = brain_of_session(&flair, &elsewhere, Some(&own), &template, None).unwrap();
    assert_eq!(carried, None);
}

#[test]
fn a_session_s_t1_gives_the_brain_of_its_flair_where_the_settings_ask_for_it() {
    let site = Site::new(2, &[]);
    let path = site.path("template.nii.gz");
    fs::write(&path, nifti::encode_volume(template_image())).unwrap();
    let template = format!("alignment.template = \"{}\"", path.display());
    site.configure(2, &["alignment.use_session_t1 = true", "window.thick_slice_mm = 0", &template]);
    let pose = placed(6.0, [0.95, 0.97, 0.92], [4.0, -6.0, 5.0]);
    let write = |name: &str, volume: &RawVolume| {
        let path = site.path("incoming").join(name);
        fs::write(&path, nifti::encode_volume(volume)).unwrap();
        nifti::read_scan(&path, &Limits::NONE).unwrap().volume
    };
    let t1 = write("sub-1_T1w.nii.gz", &head(1, &pose, T1, false));
    write("sub-1_FLAIR.nii.gz", &thick(&head(2, &pose, FLAIR, false)));
    write("sub-2_FLAIR.nii.gz", &thick(&head(3, &pose, FLAIR, false)));

    let mut score = oddscan();
    score.args(["score", "--config"]).arg(site.path("config.toml"));
    let output = score.arg("--out").arg(site.path("results")).arg(site.path("incoming")).output();
    let said = String::from_utf8_lossy(&output.unwrap().stderr).into_owned();
    let brain = |stem: &str| site.sidecar(stem).unwrap_or_else(|| panic!("{said}")).brain_mask;
    let helped = brain("sub-1_FLAIR").unwrap();
    assert_eq!((helped.from, helped.session_t1), (BrainSource::SessionT1, Some(ScanId::of(&t1))));
    assert!(helped.agreement.unwrap() > 0.9);
    let alone = brain("sub-2_FLAIR").unwrap();
    assert_eq!((alone.from, alone.session_t1), (BrainSource::Template, None));
}

#[test]
fn real_heads_in_thick_slices_are_scored_in_every_sequence() {
    let Some(folder) = shared("data/wholehead_ms_clinical") else { return };
    let Some(template) = shared(TEMPLATE) else { return };
    let template = Template::new(nifti::read_scan(&template, &Limits::NONE).unwrap().volume);
    // Refused before alignments were judged by wrong poses.
    for name in ["ms-104252_FLAIR", "ms-111008_T1w", "ms-110218_T2w"] {
        let read = |name: &str| folder.join(format!("{name}.nii.gz"));
        let scan = nifti::read_scan(&read(name), &Limits::NONE).unwrap().volume;
        let found = brain_of_head(&scan, &template, None).unwrap();
        let reference = format!("{}_refbrain", name.split_once('_').unwrap().0);
        let reference = nifti::read_mask(&read(&reference), &Limits::NONE).unwrap();
        let unmoved = Affine::scaling(1.0, WorldPoint([0.0; 3])).unwrap();
        let truth = brain::carried(&reference, &unmoved, scan.shape, &scan.affine);
        let dice = Overlap::of(found.brain.inside.iter().copied().zip(truth)).dice().unwrap();
        // 0.950 to 0.958.
        assert!(dice > 0.94, "{name}: {dice}");
    }
}

/// A site that aligns heads.
pub fn site_with_template() -> Site {
    let site = Site::new(3, &[]);
    let path = site.path("template.nii.gz");
    fs::write(&path, nifti::encode_volume(template_image())).unwrap();
    site.configure(3, &[&format!("alignment.template = \"{}\"", path.display())]);
    site
}

/// Where the template lies in the heads of [`drop_three_heads`].
fn three_poses() -> [Affine; 3] {
    [
        placed(8.0, [0.92, 0.95, 0.9], [8.0, -10.0, 4.0]),
        placed(-10.0, [1.0, 0.98, 0.95], [-5.0, 9.0, -8.0]),
        placed(3.0, [0.95, 1.02, 0.93], [0.0, 4.0, 6.0]),
    ]
}

/// Drops the whole heads sub-1 to sub-3 into the incoming folder.
pub fn drop_three_heads(site: &Site) {
    for (seed, pose) in (1..).zip(three_poses()) {
        let bytes = nifti::encode_volume(&head(seed, &pose, T1, false));
        site.drop_in(&format!("sub-{seed}_T1w.nii.gz"), &bytes);
    }
}

#[test]
fn the_daemon_takes_whole_heads_and_refuses_what_it_cannot_align() {
    let mut site = site_with_template();
    site.start();
    drop_three_heads(&site);
    let mut noise = head(9, &unmoved(), T1, false);
    let mut random = Normal::new(5);
    noise.voxels.fill_with(|| (100.0 + 20.0 * random.next()) as f32);
    site.drop_in("sub-9_T1w.nii.gz", &nifti::encode_volume(&noise));
    site.wait_scored(&["sub-1_T1w", "sub-2_T1w", "sub-3_T1w"]);
    for (seed, pose) in (1..).zip(three_poses()) {
        let stem = format!("sub-{seed}_T1w");
        let sidecar = site.sidecar(&stem).unwrap();
        assert_eq!(sidecar.standing, Standing::Scored);
        let found = sidecar.alignment.unwrap();
        assert!(found.brain_extracted);
        assert_eq!(sidecar.brain_mask.unwrap().from, BrainSource::Template);
        assert!(landmark_error_mm(&Affine::new(found.template_to_scan).unwrap(), &pose) < 2.5);
        // The map lies on the head's own grid, inside its brain.
        let map = site.path("results").join(format!("{stem}_anomaly-map.nii.gz"));
        let map = nifti::read_map(&map, &Limits::NONE).unwrap();
        let truly = head(seed, &pose, T1, true);
        assert_eq!(map.shape, truly.shape);
        let pairs = map.voxels.iter().zip(&truly.voxels).map(|(m, v)| (*m != 0.0, *v > 0.0));
        assert!(Overlap::of(pairs).dice().unwrap() > 0.9);
    }
    let reason = site.path("quarantine/registration_failed/sub-9_T1w.nii.gz");
    site.wait("refused", |_| reason.exists());
    assert_eq!(site.stop(), Some(0));
    site.encode_again();
}

pub fn template_image() -> &'static RawVolume {
    static IMAGE: std::sync::OnceLock<RawVolume> = std::sync::OnceLock::new();
    IMAGE.get_or_init(|| head(0, &unmoved(), T1, true))
}

#[test]
fn stripped_scans_and_heads_with_a_mask_are_aligned_where_all_are() {
    let site = Site::new(2, &[]);
    let path = site.path("template.nii.gz");
    fs::write(&path, nifti::encode_volume(template_image())).unwrap();
    let template = format!("alignment.template = \"{}\"", path.display());
    site.configure(2, &["alignment.mode = \"always\"", &template]);
    let poses = [
        placed(9.0, [0.93, 0.96, 0.9], [8.0, -10.0, 4.0]),
        placed(-8.0, [1.0, 0.98, 0.95], [-5.0, 9.0, -8.0]),
    ];
    let write = |name: &str, volume: &RawVolume| {
        fs::write(site.path("incoming").join(name), nifti::encode_volume(volume)).unwrap();
    };
    write("sub-1_T1w.nii.gz", &head(1, &poses[0], T1, true));
    write("sub-2_T1w.nii.gz", &head(2, &poses[1], T1, false));
    write("sub-2_brain.nii.gz", &head(2, &poses[1], T1, true));
    let mut score = oddscan();
    score.args(["score", "--config"]).arg(site.path("config.toml"));
    let out = site.path("results");
    let output = score.arg("--out").arg(&out).arg(site.path("incoming")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for (stem, pose) in ["sub-1_T1w", "sub-2_T1w"].into_iter().zip(poses) {
        let found = site.sidecar(stem).unwrap().alignment.unwrap();
        assert!(!found.brain_extracted);
        let error = landmark_error_mm(&Affine::new(found.template_to_scan).unwrap(), &pose);
        assert!(error < 3.0, "{stem}: {error} mm");
    }
}

#[test]
fn a_template_that_is_asked_for_and_missing_is_said_at_the_start() {
    let site = Site::new(3, &["alignment.template = \"/nowhere/template.nii.gz\""]);
    let mut run = oddscan();
    let output = run.arg("run").arg("--config").arg(site.path("config.toml")).output().unwrap();
    assert_eq!(output.status.code(), Some(78));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("alignment.template"), "{said}");
}

#[test]
fn the_labelled_tissue_of_real_heads_lies_in_the_brains_that_are_found() {
    let Some(folder) = shared("data/wholehead_t1_2mm") else { return };
    let Some(template) = shared(TEMPLATE) else { return };
    let template = Template::new(nifti::read_scan(&template, &Limits::NONE).unwrap().volume);
    for name in ["IXI013-HH-1212-T1_ds", "IXI039-HH-1261-T1_ds"] {
        let at = |ending: &str| -> PathBuf { folder.join(format!("{name}{ending}.nii.gz")) };
        let scan = nifti::read_scan(&at(""), &Limits::NONE).unwrap().volume;
        let labels = nifti::read_mask(&at("_DLMUSE"), &Limits::NONE).unwrap().inside;
        let found = register(&scan, &template, true).unwrap();
        let brain = brain::extract(&scan, &template, &found).unwrap().inside;
        let overlap = Overlap::of(brain.iter().zip(&labels).map(|(a, b)| (*a, *b)));
        let n_labelled = (overlap.both + overlap.truth_only) as f64;
        let share = overlap.both as f64 / n_labelled;
        let surplus = overlap.mask_only as f64 / n_labelled;
        // The labels leave out the cerebrospinal fluid between the folds, which is a fifth of their
        // volume.
        assert!(share > 0.97 && surplus < 0.35, "{name}: {share} {surplus}");
    }
}
