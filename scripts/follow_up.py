#!/usr/bin/env python3
"""Makes a follow-up scan of a stripped scan, for docs/quality/scans.md.

    follow_up.py SCAN BRAIN OUT     moved by 0.4, -0.3 and 0.2 voxels, 7 % brighter, Rician noise of 3 %

Needs nibabel and scipy.
"""

import sys

import nibabel as nib
import numpy as np
from scipy.ndimage import shift

scan, brain, out = sys.argv[1:]
image = nib.load(scan)
voxels = np.asarray(image.dataobj, float)
inside = np.asarray(nib.load(brain).dataobj) > 0
noise = np.random.default_rng(0).normal(0, 0.03 * np.percentile(voxels[inside], 90), (2, *voxels.shape))
moved = 1.07 * shift(voxels, [0.4, -0.3, 0.2], order=3)
voxels = np.where(inside, np.hypot(moved + noise[0], noise[1]), 0)
nib.save(nib.Nifti1Image(voxels.astype(np.float32), image.affine), out)
