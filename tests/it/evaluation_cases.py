"""Random maps, masks and truths, and their figures by scikit-learn, MedPy and SciPy.

    evaluation_cases.py RESULTS TRUTH EXPECTED.json

The scan number `n` has the score `n / 10` as a whole; the even ones have no lesion. Every fourth has normal
hyperintensities. The first four are from the source a, the others from b.
"""

import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from medpy.metric.binary import dc, jc
from scipy.ndimage import gaussian_filter, label
from sklearn.metrics import average_precision_score, roc_auc_score

SHAPE = (9, 11, 7)
SPACING_MM = (2.0, 3.0, 2.5)
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


def stem_of(number):
    return f"sub-{'ab'[number // 4]}-{number}_T1w"


def case(number, results, truths):
    random = np.random.default_rng(number)
    affine = np.diag([-SPACING_MM[0], *SPACING_MM[1:], 1.0])
    brain = blobs(random, 0.7)
    lesion = blobs(random, 0.06) if number % 2 else np.zeros(SHAPE, bool)
    # One decimal: many ties, which count half.
    scores = np.round(random.gamma(2.0, size=SHAPE) + 1.5 * lesion, 1).astype("float32") + 0.1
    mask = blobs(random, 0.04) | (lesion & (random.random(SHAPE) < 0.5))
    scan = (100 + 10 * random.normal(size=SHAPE) + 15 * lesion).astype("float32")
    normal = blobs(random, 0.1) if number % 4 == 1 else np.zeros(SHAPE, bool)

    stem = stem_of(number)
    subject = stem.removesuffix("_T1w")
    save(np.where(brain, scores, 0).astype("float32"), results / f"{stem}_anomaly-map.nii.gz", affine)
    save(mask.astype("uint8"), results / f"{stem}_anomaly-mask.nii.gz", affine)
    save(brain.astype("uint8"), truths / f"{subject}_brain.nii.gz", affine)
    save(scan, truths / f"{stem}.nii.gz", affine)
    if lesion.any():
        save(lesion.astype("uint8"), truths / f"{subject}_lesion.nii.gz", affine)
    if normal.any():
        save(normal.astype("uint8"), truths / f"{subject}_normalWMH.nii.gz", affine)
    lesion &= brain
    return {
        "scores": scores,
        "brain": brain,
        "lesion": lesion,
        "mask": mask & brain,
        "normal": normal & brain & ~lesion,
        "brightness": brightness(scan, brain),
    }


def brightness(scan, brain):
    """The mean of the brain's voxels with the weights of a Gaussian of 1 mm."""
    sigma = 1 / np.array(SPACING_MM)
    smooth = lambda values: gaussian_filter(values, sigma, mode="constant")
    sums, weights = smooth(np.where(brain, scan, 0).astype(float)), smooth(brain.astype(float))
    return np.divide(sums, weights, out=np.zeros(SHAPE), where=brain).astype("float32")


def regions(mask):
    labels, n = label(mask, TOUCHING)
    return [labels == index + 1 for index in range(n)]


def scan_figures(case):
    scores, brain, lesion, mask, normal = (
        case[part] for part in ("scores", "brain", "lesion", "mask", "normal")
    )
    lesions = regions(lesion)
    off_lesions = [region for region in regions(mask) if not lesion[region].any()]
    n_on_normal = sum(bool(normal[region].any()) for region in off_lesions)
    scan = {
        "n_found": sum(bool(mask[region].any()) for region in lesions),
        "n_lesions": len(lesions),
        "n_false_regions": len(off_lesions) - n_on_normal,
        "n_regions_on_normal": n_on_normal,
        "n_normal": len(regions(normal)),
        "n_normal_met": sum(bool(mask[region].any()) for region in regions(normal)),
    }
    if lesion.any():
        scan |= voxel_figures(scores[brain], lesion[brain])
        scan |= {"dice": dc(mask, lesion), "iou": jc(mask, lesion)}
    return scan


def voxel_figures(scores, lesion):
    return {
        "auroc": roc_auc_score(lesion, scores),
        "average_precision": average_precision_score(lesion, scores),
        "oracle_dice": best_dice(scores, lesion),
    }


def mean_figures(figures):
    names = ["auroc", "average_precision", "oracle_dice"]
    return {"n_scans": len(figures)} | {name: np.mean([of[name] for of in figures]) for name in names}


def baseline(cases, sign):
    inside = [(sign * case["brightness"][case["brain"]], case["lesion"][case["brain"]]) for case in cases]
    return mean_figures([voxel_figures(scores, lesion) for scores, lesion in inside])


def by_source(scans):
    sources = {}
    for number, scan in enumerate(scans):
        if "auroc" in scan:
            sources.setdefault("ab"[number // 4], []).append(scan)
    total = lambda scans, name: sum(scan[name] for scan in scans)
    return [
        {"source": source, "n_lesions": total(scans, "n_lesions"), "n_found": total(scans, "n_found")}
        | mean_figures(scans)
        for source, scans in sorted(sources.items())
    ]


def main(results, truths, expected):
    cases = [case(number, results, truths) for number in range(N_SCANS)]
    scans = [scan_figures(case) for case in cases]
    pool = lambda part: np.concatenate([case[part][case["brain"]] for case in cases])
    thresholds = np.unique(pool("scores"))
    ill = [case for case in cases if case["lesion"].any()]
    mean_dice = [
        np.mean([dc((case["scores"] >= t) & case["brain"], case["lesion"]) for case in ill])
        for t in thresholds
    ]
    is_ill = [bool(case["lesion"].any()) for case in cases]
    whole = np.arange(N_SCANS) / 10
    figures = {
        "scans": scans,
        "baselines": {"brightness": baseline(ill, 1), "darkness": baseline(ill, -1)},
        "sources": by_source(scans),
        "pooled": voxel_figures(pool("scores"), pool("lesion")) | {"dice": dc(pool("mask"), pool("lesion"))},
        "global_oracle_dice": max(mean_dice),
        "patients": {
            "auroc": roc_auc_score(is_ill, whole),
            "average_precision": average_precision_score(is_ill, whole),
        },
    }
    expected.write_text(json.dumps(figures, default=float))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
