//! Parts of heads, tissue below zero, and files that are no scans.

use std::fs;

use oddscan::{
    domain::scan::BrainSource,
    nifti,
    numeric::{
        geometry::{Affine, Shape3, VoxelPoint, WorldPoint},
        volume::RawVolume,
    },
};

use crate::{
    alignment::{T1, drop_three_heads, head, placed, site_with_template},
    support::{Site, brain},
};

/// The lower part of a head, up to 28 mm above the middle of its brain. All that is dark is 0, as
/// defacing and masking programs leave it, so that as little is above 0 as in a stripped brain.
fn lower_part(seed: u64) -> RawVolume {
    let whole = head(seed, &placed(0.0, [1.0; 3], [0.0; 3]), T1, false);
    let Shape3([nx, ny, nz]) = whole.shape;
    let height = |z: usize| whole.affine.to_world(VoxelPoint([0.0, 0.0, z as f64])).0[2];
    let n_kept = (0..nz).filter(|&z| height(z) < 28.0).count();
    let kept = whole.voxels[..nx * ny * n_kept].iter();
    let voxels = kept.map(|&voxel| if voxel < 20.0 { 0.0 } else { voxel }).collect();
    RawVolume { shape: Shape3([nx, ny, n_kept]), voxels, affine: whole.affine }
}

#[test]
fn a_part_of_a_head_is_aligned_and_warned_of_and_no_reference() {
    let mut site = site_with_template();
    site.start();
    drop_three_heads(&site);
    site.drop_in("sub-4_T1w.nii.gz", &nifti::encode_volume(&lower_part(4)));
    site.wait_scored(&["sub-1_T1w", "sub-2_T1w", "sub-3_T1w", "sub-4_T1w"]);

    let part = site.sidecar("sub-4_T1w").unwrap();
    assert_eq!(part.brain_mask.unwrap().from, BrainSource::Template, "it is no stripped scan");
    let coverage = part.alignment.unwrap().coverage;
    assert!((0.7..0.9).contains(&coverage), "{coverage}");
    assert!(!part.quality.unwrap().is_reference);
    let says = |words: &str| part.warnings.iter().any(|warning| warning.contains(words));
    assert!(says("quality.min_coverage") && says("are not scored"), "{:?}", part.warnings);
    let whole = site.sidecar("sub-1_T1w").unwrap();
    assert_eq!(whole.alignment.unwrap().coverage, 1.0);
    assert!(whole.quality.unwrap().is_reference);
    assert_eq!(whole.window.set_aside, [part.scan_id]);
    assert_eq!(site.status().cohorts["t1w"].n_parts_of_heads, 1);
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn scans_of_mean_0_keep_their_whole_brain() {
    let mut site = Site::new(3, &[]);
    site.start();
    let mut plain_ml = Vec::new();
    for seed in 1..=3 {
        let mut scan = brain(seed);
        let inside: Vec<f64> =
            scan.voxels.iter().filter(|&&v| v > 0.0).map(|&v| f64::from(v)).collect();
        let mean = (inside.iter().sum::<f64>() / inside.len() as f64) as f32;
        scan.voxels.iter_mut().filter(|v| **v > 0.0).for_each(|v| *v = (*v - mean) / 10.0);
        plain_ml.push(inside.len() as f64 * scan.affine.voxel_volume_mm3() / 1000.0);
        site.drop_in(&format!("sub-{seed}_T1w.nii.gz"), &nifti::encode_volume(&scan));
    }
    site.wait_scored(&["sub-1_T1w", "sub-2_T1w", "sub-3_T1w"]);
    for (seed, plain_ml) in (1..).zip(plain_ml) {
        let found = site.sidecar(&format!("sub-{seed}_T1w")).unwrap().brain_ml;
        assert!((found / plain_ml - 1.0).abs() < 0.001, "{found} of {plain_ml} ml");
    }
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn masks_maps_of_labels_and_tissue_that_meets_the_grid_s_end_are_refused_as_such() {
    let mut site = Site::new(3, &["alignment.mode = \"never\""]);
    site.start();
    let shape = Shape3([40, 42, 44]);
    let affine = Affine::scaling(4.0, WorldPoint([0.0; 3])).unwrap();
    let image = |value: &dyn Fn([usize; 3]) -> f32| {
        let voxel = |offset: usize| {
            let voxel @ [x, y, z] = shape.voxel(offset);
            let is_inside = x.clamp(8, 29) == x && y.clamp(9, 30) == y && z.clamp(10, 31) == z;
            if is_inside { value(voxel) } else { 0.0 }
        };
        let voxels = (0..shape.n_voxels()).map(voxel).collect();
        nifti::encode_volume(&RawVolume { shape, voxels, affine })
    };
    let labels = |[x, y, z]: [usize; 3]| (1 + x / 6 + 7 * (y / 6) + 49 * (z / 6)) as f32;
    site.drop_in("sub-1_labels.nii.gz", &image(&labels));
    site.drop_in("sub-2_seg.nii.gz", &image(&|_| 1.0));
    // A slab of a head before a background of 0. It has less tissue than a brain.
    let whole = lower_part(3);
    let Shape3([nx, ny, nz]) = whole.shape;
    let voxels = whole.voxels[nx * ny * (nz - 25)..].to_vec();
    let slab = RawVolume { shape: Shape3([nx, ny, 25]), voxels, affine: whole.affine };
    site.drop_in("sub-3_T1w.nii.gz", &nifti::encode_volume(&slab));

    for (path, words) in [
        ("unsupported/sub-1_labels.nii.gz", "distinct values"),
        ("unsupported/sub-2_seg.nii.gz", "a binary mask"),
        ("no_brain/sub-3_T1w.nii.gz", "meets the end of its grid"),
    ] {
        let reason = site.path("quarantine").join(path).join("reason.json");
        site.wait("refused", |_| reason.exists());
        let text = fs::read_to_string(reason).unwrap();
        assert!(text.contains(words) && text.contains("_brain.nii.gz"), "{text}");
    }
    assert_eq!(site.stop(), Some(0));
}
