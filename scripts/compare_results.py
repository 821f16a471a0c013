"""Do two result folders hold the same scores and maps, up to rounding? compare_results.py ONE OTHER"""

import gzip
import json
import pathlib
import sys

import numpy as np


def voxels(path):
    """The voxels of a compressed f32 NIfTI-1 file that oddscan wrote."""
    data = gzip.decompress(path.read_bytes())
    return np.frombuffer(data, "<f4", offset=int(np.frombuffer(data, "<f4", 1, 108)[0]))


def main(one, other):
    names = sorted(path.name for path in one.glob("*_anomaly-map.nii.gz"))
    if not names or names != sorted(path.name for path in other.glob("*_anomaly-map.nii.gz")):
        sys.exit("not the same scans")
    worst_score, worst_correlation, worst_map = 0.0, 1.0, 0.0
    for name in names:
        scores = []
        for folder in (one, other):
            sidecar = json.loads((folder / name.replace("-map.nii.gz", ".json")).read_text())
            scores.append(sidecar["scores"]["top1_mean"])
        worst_score = max(worst_score, abs(scores[0] / scores[1] - 1))
        a, b = voxels(one / name), voxels(other / name)
        inside = (a > 0) | (b > 0)
        a, b = a[inside], b[inside]
        worst_correlation = min(worst_correlation, np.corrcoef(a, b)[0, 1])
        worst_map = max(worst_map, np.abs(a - b).max() / np.median(b))
    print(
        f"{len(names)} scans: scores differ by at most {worst_score:.2e}, maps correlate by at least "
        f"{worst_correlation:.7f} and differ by at most {worst_map:.2e} of their median"
    )
    sys.exit(int(worst_correlation < 0.999))


main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
