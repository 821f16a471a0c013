#!/usr/bin/env python3
"""The baseline of docs/quality/brightness.md: each scan's own brightness as its anomaly map.

    brightness.py SCANS OUT             SCANS holds <subject>_<modality>.nii.gz and <subject>_brain.nii.gz
    oddscan eval --maps OUT --truth SCANS

`oddscan eval` computes this baseline for each map, too, and prints its voxel figures. These maps are for the other
figures: lesions and regions of the masks.

The map is the scan, smoothed by 1 mm inside the brain. The mask holds the brightest 1 % of the brain; `oddscan
eval` needs one. Needs nibabel and scipy.
"""

import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter

SIGMA_MM = 1.0

scans, out = map(Path, sys.argv[1:])
out.mkdir(parents=True, exist_ok=True)
for path in sorted(scans.glob("*.nii.gz")):
    stem = path.name.removesuffix(".nii.gz")
    subject, modality = stem.rsplit("_", 1)
    if modality in ("brain", "lesion"):
        continue

    image = nib.load(path)
    inside = np.asarray(nib.load(scans / f"{subject}_brain.nii.gz").dataobj) > 0
    voxels = np.where(inside, np.asarray(image.dataobj, float), 0)

    # Dividing by the smoothed brain keeps the background from darkening the brain's rim.
    sigma = SIGMA_MM / np.asarray(image.header.get_zooms()[:3])
    smoothed = gaussian_filter(voxels, sigma) / np.maximum(gaussian_filter(inside.astype(float), sigma), 1e-6)
    brightness = np.where(inside, smoothed, 0).astype(np.float32)
    brightest = brightness > np.percentile(brightness[inside], 99)

    for values, what in ((brightness, "map"), ((brightest & inside).astype(np.uint8), "mask")):
        nib.save(nib.Nifti1Image(values, image.affine), out / f"{stem}_anomaly-{what}.nii.gz")
