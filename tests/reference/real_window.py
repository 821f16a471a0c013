"""A window of real scans from end to end in numpy, against the results of `oddscan score`.

    oddscan score --config CONFIG --out RESULTS SCANS
    real_window.py --weights WEIGHTS --stride N RESULTS SCANS

CONFIG holds `tokens.slice_stride = N` and `encoder.precision = "f32"`; everything else is default. SCANS is a folder with
`<subject>_<modality>.nii.gz` and `<subject>_brain.nii.gz` beside each. Maps must correlate by more than
0.9999 in the brain, and agree to 1e-3 of their value. Needs numpy, scipy and nibabel; at a stride of 7
about half a minute per scan.
"""

import argparse
import json
import sys
from pathlib import Path

import nibabel
import numpy as np

import make_goldens as reference

NETWORK = {"channels": 384, "depth": 12, "heads": 6, "hidden": 1536, "patch": 14, "position_side": 37}


def settings(stride):
    reference.SETTINGS |= {
        "network": NETWORK,
        "cube": {"side": 224, "field_of_view_mm": 176.0},
        "layers": [9],
        "slice_stride": stride,
    }
    return reference.METHODS["default"] | {"slices_per_token": 7}


def load_weights(path):
    """Tensors under the original's names, from half or single precision."""
    raw = path.read_bytes()
    n_header = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + n_header]), raw[8 + n_header :]
    types = {"F16": "<f2", "F32": "<f4"}
    return {
        name: np.frombuffer(data[slice(*entry["data_offsets"])], types[entry["dtype"]])
        .reshape(entry["shape"])
        .astype(np.float32)
        for name, entry in header.items()
        if name != "__metadata__"
    }


def load_scan(path):
    image = nibabel.load(path)
    brain = nibabel.load(path.parent / f"{path.name.rsplit('_', 1)[0]}_brain.nii.gz")
    voxels = np.asarray(image.dataobj, dtype=np.float32)
    return voxels, np.asarray(brain.dataobj) > 0, image.affine.astype(np.float64)


def compare(path, brain, own_map):
    """Correlation, and the largest difference as a share of the map's median."""
    found = np.asarray(nibabel.load(path).dataobj, dtype=np.float64)[brain]
    own = own_map[brain]
    return np.corrcoef(found, own)[0, 1], np.abs(found - own).max() / np.median(own)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--stride", type=int, default=7)
    parser.add_argument("results", type=Path)
    parser.add_argument("scans", type=Path)
    arguments = parser.parse_args()
    method, tensors = settings(arguments.stride), load_weights(arguments.weights)
    results = sorted(arguments.results.glob("*_anomaly-map.nii.gz"))
    stems = [path.name.removesuffix("_anomaly-map.nii.gz") for path in results]
    scans, parts = [], []
    for stem in stems:
        voxels, brain, affine = load_scan(arguments.scans / f"{stem}.nii.gz")
        cube, inside = reference.canonical(voxels, brain, affine)
        parts.append(reference.tokens(tensors, cube, inside, method))
        scans.append((brain, affine))
        print(f"{stem} encoded", flush=True)
    is_good = True
    for stem, path, (brain, affine), scored in zip(
        stems, results, scans, reference.score_window(parts, method)
    ):
        shape, cells, scores = scored
        own = reference.score_map(brain, affine, shape, cells, scores)
        correlation, worst = compare(path, brain, own)
        sidecar = json.loads((arguments.results / f"{stem}_anomaly.json").read_text())
        top = np.sort(scores)[::-1][: reference.share_of(0.01, len(scores))].mean()
        apart = abs(sidecar["scores"]["top1_mean"] / top - 1)
        print(f"{stem}: correlation {correlation:.7f}, worst {worst:.1e}, score {apart:.1e}")
        is_good &= correlation > 0.9999 and worst < 1e-3 and apart < 1e-3
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
