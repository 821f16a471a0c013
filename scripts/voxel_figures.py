#!/usr/bin/env python3
"""How well maps find known lesions, voxel by voxel inside the brain.

    voxel_figures.py RESULTS SCANS

RESULTS holds `<subject>_<modality>_anomaly-map.nii.gz` and the masks beside them, SCANS holds
`<subject>_brain.nii.gz` and, for patients, `<subject>_lesion.nii.gz`. Prints AUROC, average
precision and the best Dice that any threshold reaches (oracle), per scan, their mean over scans
with lesions, and over all voxels of the window pooled; and the Dice of the mask that was written,
whose threshold knows no labels. Needs numpy and nibabel.
"""

import sys
from pathlib import Path

import nibabel as nib
import numpy as np


def figures(scores, truth):
    """AUROC, average precision, oracle Dice; equal scores are one step of the threshold."""
    order = np.argsort(-scores, kind="stable")
    scores, truth = scores[order], truth[order]
    steps = np.flatnonzero(np.r_[np.diff(scores) != 0, True])
    hits, marked = np.cumsum(truth)[steps].astype(float), steps + 1.0
    n_lesion, false = hits[-1], marked - hits
    precision, recall = hits / marked, hits / n_lesion
    steps_up, ends = np.diff(np.r_[0, false / false[-1]]), np.r_[0, recall]
    auroc = np.sum(steps_up * (ends[1:] + ends[:-1]) / 2)
    average_precision = np.sum(np.diff(np.r_[0, recall]) * precision)
    return auroc, average_precision, np.max(2 * hits / (marked + n_lesion))


def load(path):
    return np.asarray(nib.load(path).dataobj)


def show(name, values):
    print(f"{name:<28}" + " / ".join(f"{value:.3f}" for value in values))


def main(results, scans):
    all_scores, all_truth, rows = [], [], []
    print(f"{'scan':<28}AUROC / AP / oracle Dice / Dice of the mask")
    for path in sorted(results.glob("*_anomaly-map.nii.gz")):
        stem = path.name.removesuffix("_anomaly-map.nii.gz")
        subject = stem.rpartition("_")[0]
        brain = load(scans / f"{subject}_brain.nii.gz") > 0
        lesion = scans / f"{subject}_lesion.nii.gz"
        truth = load(lesion) > 0 if lesion.exists() else np.zeros_like(brain)
        scores = load(path)[brain]
        all_scores.append(scores)
        all_truth.append(truth[brain])
        if not truth.any():
            print(f"{stem:<28}no known lesion")
            continue
        mask = load(results / f"{stem}_anomaly-mask.nii.gz") > 0
        dice = 2 * (mask & truth).sum() / (mask.sum() + truth.sum())
        rows.append((*figures(scores, truth[brain]), dice))
        show(stem, rows[-1])
    show("mean", np.mean(rows, axis=0))
    show("pooled", figures(np.concatenate(all_scores), np.concatenate(all_truth)))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*map(Path, sys.argv[1:]))
