"""A transform that oddscan has written, as ITK reads it through SimpleITK.

itk_transform.py SIDECAR TRANSFORM SCAN TEMPLATE: both images are T1 of the same head in different places.
"""

import json
import sys

import numpy as np
import SimpleITK as sitk

TO_LPS = np.diag([-1.0, -1.0, 1.0])


def main(sidecar, transform, scan, template):
    matrix = np.array(json.load(open(sidecar))["alignment"]["template_to_scan"])
    transform = sitk.ReadTransform(transform)
    rng = np.random.default_rng(0)
    for place in rng.uniform(-90, 90, (50, 3)):
        ours = TO_LPS @ (matrix[:, :3] @ place + matrix[:, 3])
        theirs = transform.TransformPoint((TO_LPS @ place).tolist())
        # Doubles that were written in full.
        assert np.allclose(ours, theirs, rtol=0, atol=1e-9), (place, ours, theirs)
    scan, template = (sitk.ReadImage(path, sitk.sitkFloat32) for path in (scan, template))
    brain = sitk.GetArrayFromImage(template) > 0

    def likeness(transform):
        moved = sitk.GetArrayFromImage(sitk.Resample(scan, template, transform, sitk.sitkLinear))
        return np.corrcoef(moved[brain], sitk.GetArrayFromImage(template)[brain])[0, 1]

    aligned, as_it_lies = likeness(transform), likeness(sitk.Transform())
    # Noise and the width of voxels take some; one in the wrong direction would be worse than none.
    assert aligned > 0.8 and aligned > as_it_lies + 0.2, (aligned, as_it_lies)
    print(f"correlation with the template {aligned:.2f}, as it lies {as_it_lies:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
