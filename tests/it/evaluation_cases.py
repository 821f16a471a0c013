"""Random maps, masks and truths, and their figures by scikit-learn, MedPy and SciPy.

    evaluation_cases.py RESULTS TRUTH EXPECTED.json

The scan number `n` has the score `n / 10` as a whole; the even ones have no lesion.
"""

import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from medpy.metric.binary import dc, jc
from scipy.ndimage import label
from sklearn.metrics import average_precision_score, roc_auc_score

SHAPE = (9, 11, 7)
N_SCANS = 8
TOUCHING = np.ones((3, 3, 3))


def save(values, path, affine):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine), path)


def blobs(random, share):
    """A mask of a few connected regions."""
    smooth = random.normal(size=SHAPE)
    for axis in range(3):
        smooth = smooth + np.roll(smooth, 1, axis) + np.roll(smooth, -1, axis)
    return smooth > np.quantile(smooth, 1 - share)


def best_dice(scores, truth):
    return max(dc(scores >= threshold, truth) for threshold in np.unique(scores))


def case(number, results, truths):
    random = np.random.default_rng(number)
    affine = np.diag([-2.0, 3.0, 2.5, 1.0])
    brain = blobs(random, 0.7)
    lesion = blobs(random, 0.06) if number % 2 else np.zeros(SHAPE, bool)
    # One decimal: many ties, which count half.
    scores = np.round(random.gamma(2.0, size=SHAPE) + 1.5 * lesion, 1).astype("float32") + 0.1
    mask = blobs(random, 0.04) | (lesion & (random.random(SHAPE) < 0.5))
    stem = f"sub-{number}_T1w"
    save(np.where(brain, scores, 0).astype("float32"), results / f"{stem}_anomaly-map.nii.gz", affine)
    save(mask.astype("uint8"), results / f"{stem}_anomaly-mask.nii.gz", affine)
    save(brain.astype("uint8"), truths / f"sub-{number}_brain.nii.gz", affine)
    if number % 2:
        save(lesion.astype("uint8"), truths / f"sub-{number}_lesion.nii.gz", affine)
    return scores, brain, lesion & brain, mask & brain


def voxel_figures(scores, lesion):
    return {
        "auroc": roc_auc_score(lesion, scores),
        "average_precision": average_precision_score(lesion, scores),
        "oracle_dice": best_dice(scores, lesion),
    }


def main(results, truths, expected):
    cases = [case(number, results, truths) for number in range(N_SCANS)]
    scans = []
    for scores, brain, lesion, mask in cases:
        lesions, n_lesions = label(lesion, TOUCHING)
        marked, n_marked = label(mask, TOUCHING)
        scan = {
            "n_found": sum(bool(mask[lesions == n + 1].any()) for n in range(n_lesions)),
            "n_lesions": n_lesions,
            "n_false_regions": sum(not lesion[marked == n + 1].any() for n in range(n_marked)),
        }
        if lesion.any():
            scan |= voxel_figures(scores[brain], lesion[brain])
            scan |= {"dice": dc(mask, lesion), "iou": jc(mask, lesion)}
        scans.append(scan)
    pool = lambda part: np.concatenate([case[part][case[1]] for case in cases])
    thresholds = np.unique(pool(0))
    ill = [case for case in cases if case[2].any()]
    mean_dice = [
        np.mean([dc((scores >= t) & brain, lesion) for scores, brain, lesion, _ in ill])
        for t in thresholds
    ]
    ill = [bool(lesion.any()) for _, _, lesion, _ in cases]
    whole = np.arange(N_SCANS) / 10
    figures = {
        "scans": scans,
        "pooled": voxel_figures(pool(0), pool(2)) | {"dice": dc(pool(3), pool(2))},
        "global_oracle_dice": max(mean_dice),
        "patients": {
            "auroc": roc_auc_score(ill, whole),
            "average_precision": average_precision_score(ill, whole),
        },
    }
    expected.write_text(json.dumps(figures, default=float))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
