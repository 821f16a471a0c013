"""Every stage of the method for a tiny seeded network and three tiny scans, in plain numpy.

Written from the method (Le-Gia and Ahn, MIDL 2026, and what oddscan settles where the paper is
open), not from the Rust code, so that the two check each other. Slow and simple on purpose.

    make_goldens.py            writes tests/fixtures/reference/
    make_goldens.py --check    computes everything again and compares with what is there
"""

import json
import platform
import struct
import sys
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "reference"

SETTINGS = {
    "seed": 7,
    "network": {
        "channels": 32,
        "depth": 4,
        "heads": 2,
        "hidden": 128,
        "patch": 7,
        "position_side": 5,
    },
    "cube": {"side": 28, "field_of_view_mm": 150.3},
    "layers": [2, 3],
    "projection": {"seed": 20260211, "channels": 8},
    "min_brain_fraction": 0.3,
    "slice_stride": 1,
    "smoothing_cells": 0.4,
    "keep_fraction": 0.4,
    "reach_cells": 1,
    "place_share": 0.3,
    "false_positive_fraction": 0.01,
    "clean_scan_fraction": 0.25,
}
AXIAL, CORONAL, SAGITTAL = 2, 1, 0
VIEWS = [AXIAL, CORONAL, SAGITTAL]
MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])


# --- the tiny network -----------------------------------------------------------------------------


def network(rng):
    """Tensors under the original's names, f32."""
    n = SETTINGS["network"]
    d, h, p = n["channels"], n["hidden"], n["patch"]

    def normal(*shape, scale=1.0, mean=0.0):
        return (mean + scale * rng.standard_normal(shape)).astype(np.float32)

    tensors = {
        "cls_token": normal(1, 1, d),
        "pos_embed": normal(1, 1 + n["position_side"] ** 2, d),
        "patch_embed.proj.weight": normal(d, 3, p, p, scale=(3 * p * p) ** -0.5),
        "patch_embed.proj.bias": normal(d, scale=0.5),
        "norm.weight": normal(d, mean=1, scale=0.3),
        "norm.bias": normal(d, scale=0.3),
    }
    for block in range(n["depth"]):
        shapes = {
            "attn.qkv": (3 * d, d),
            "attn.proj": (d, d),
            "mlp.fc1": (h, d),
            "mlp.fc2": (d, h),
        }
        for name, (out, into) in shapes.items():
            tensors[f"blocks.{block}.{name}.weight"] = normal(out, into, scale=into**-0.5)
            tensors[f"blocks.{block}.{name}.bias"] = normal(out, scale=0.5)
        for norm in ("norm1", "norm2"):
            tensors[f"blocks.{block}.{norm}.weight"] = normal(d, mean=1, scale=0.3)
            tensors[f"blocks.{block}.{norm}.bias"] = normal(d, scale=0.3)
        for scale in ("ls1", "ls2"):
            tensors[f"blocks.{block}.{scale}.gamma"] = normal(d, mean=0.7, scale=0.3)
    return tensors


def cubic(t):
    """Keys' kernel with a = -0.75, PyTorch's choice."""
    a, t = -0.75, np.abs(t)
    near = (a + 2) * t**3 - (a + 3) * t**2 + 1
    far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
    return np.where(t <= 1, near, np.where(t < 2, far, 0))


def resize_matrix(trained, side, mode):
    """`[side, trained]`: bicubic, half-pixel centres, border repeated, no antialias."""
    scale = (side + 0.1) / trained if mode == "offset" else side / trained
    matrix = np.zeros((side, trained))
    for index in range(side):
        source = (index + 0.5) / scale - 0.5
        for tap in range(int(np.floor(source)) - 1, int(np.floor(source)) + 3):
            matrix[index, min(max(tap, 0), trained - 1)] += cubic(source - tap)
    return matrix


def position_embedding(tensors, side, mode):
    trained = SETTINGS["network"]["position_side"]
    embedding = tensors["pos_embed"][0].astype(np.float64)
    grid = embedding[1:].reshape(trained, trained, -1)
    matrix = resize_matrix(trained, side, mode)
    resized = np.einsum("it,ju,tuc->ijc", matrix, matrix, grid)
    return np.concatenate([embedding[:1], resized.reshape(side * side, -1)])


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * weight + bias


def erf(x):
    from math import erf as scalar

    return np.vectorize(scalar)(x)


def encode(tensors, images, mode):
    """`[n, 3, s, s]` -> after every block `[n, patches, channels]`, plain and with final norm."""
    n = SETTINGS["network"]
    d, heads, patch = n["channels"], n["heads"], n["patch"]
    t = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    side = images.shape[-1] // patch
    tiles = images.reshape(len(images), 3, side, patch, side, patch).transpose(0, 2, 4, 1, 3, 5)
    kernel = t["patch_embed.proj.weight"].reshape(d, -1)
    x = tiles.reshape(len(images), side * side, -1) @ kernel.T + t["patch_embed.proj.bias"]
    x = np.concatenate([np.broadcast_to(t["cls_token"], (len(images), 1, d)), x], axis=1)
    x = x + position_embedding(tensors, side, mode)
    plain, normed = [], []
    for b in range(n["depth"]):

        def linear(name, value):
            return value @ t[f"blocks.{b}.{name}.weight"].T + t[f"blocks.{b}.{name}.bias"]

        def norm(name, value):
            return layer_norm(value, t[f"blocks.{b}.{name}.weight"], t[f"blocks.{b}.{name}.bias"])

        qkv = linear("attn.qkv", norm("norm1", x))
        q, k, v = qkv.reshape(len(x), -1, 3, heads, d // heads).transpose(2, 0, 3, 1, 4)
        logits = q @ k.swapaxes(-1, -2) / np.sqrt(d // heads)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        joined = (weights @ v).transpose(0, 2, 1, 3).reshape(x.shape)
        x = x + t[f"blocks.{b}.ls1.gamma"] * linear("attn.proj", joined)
        hidden = linear("mlp.fc1", norm("norm2", x))
        hidden = hidden * 0.5 * (1 + erf(hidden / np.sqrt(2)))
        x = x + t[f"blocks.{b}.ls2.gamma"] * linear("mlp.fc2", hidden)
        plain.append(x[:, 1:])
        normed.append(layer_norm(x, t["norm.weight"], t["norm.bias"])[:, 1:])
    return plain, normed


# --- scans and the canonical cube -----------------------------------------------------------------


def scans(rng):
    """Three brains on three grids: plain, left-handed, oblique. Voxels `[x, y, z]`, affine 4x4."""
    shape = (22, 26, 20)
    angle = np.deg2rad(14)
    turn = np.array(
        [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    )
    linear = [np.diag([7.0, 7.0, 7.0]), np.diag([-7.0, 7.0, 7.0]), turn @ np.diag([7.0, 7.0, 8.0])]
    result = []
    for number, matrix in enumerate(linear):
        affine = np.eye(4)
        affine[:3, :3] = matrix
        affine[:3, 3] = rng.uniform(-8, 8, 3) - matrix @ ((np.array(shape) - 1) / 2)
        affine = affine.astype(np.float32).astype(np.float64)
        index = np.indices(shape).reshape(3, -1).T
        world = index @ affine[:3, :3].T + affine[:3, 3]
        centre = world.mean(0)
        x, y, z = (world - centre).T
        inside = (x / 62) ** 2 + (y / 74) ** 2 + (z / 58) ** 2 < 1
        signal = 100 + 20 * np.sin(x / 14) + 15 * np.cos(y / 17) + 10 * np.sin(z / 12 + number)
        signal += rng.normal(0, 2, len(signal))
        if number == 1:
            signal += 120 * (((x - 25) ** 2 + (y + 20) ** 2 + (z - 10) ** 2) < 18**2)
        voxels = np.where(inside, signal, 0).astype(np.float32).reshape(shape)
        result.append((voxels, affine))
    return result


def cube_affine(voxels, affine):
    """Cube voxel -> world: centred on the box around the brain, along the world's axes."""
    points = np.argwhere(voxels > 0) @ affine[:3, :3].T + affine[:3, 3]
    centre = (points.min(0) + points.max(0)) / 2
    side = SETTINGS["cube"]["side"]
    spacing = SETTINGS["cube"]["field_of_view_mm"] / side
    cube = np.diag([spacing] * 3 + [1.0])
    cube[:3, 3] = centre - spacing * (side - 1) / 2
    return cube


def interpolate(values, places):
    """Trilinear at `places` `[n, 3]`; 0 beyond the grid."""
    floor = np.floor(places).astype(int)
    result = np.zeros(len(places))
    for corner in np.ndindex(2, 2, 2):
        index = floor + corner
        weight = np.prod(np.where(corner, places - floor, 1 - (places - floor)), axis=1)
        on_grid = ((index >= 0) & (index < values.shape)).all(1)
        index = np.clip(index, 0, np.array(values.shape) - 1)
        result += np.where(on_grid, weight * values[tuple(index.T)], 0)
    return result


def canonical(voxels, affine):
    """The cube in [0, 1] and its brain mask, `[x, y, z]`."""
    side = SETTINGS["cube"]["side"]
    white = np.percentile(voxels[voxels > 0].astype(np.float64), 99.8)
    to_voxel = np.linalg.inv(affine) @ cube_affine(voxels, affine)
    index = np.indices((side,) * 3).reshape(3, -1).T
    places = index @ to_voxel[:3, :3].T + to_voxel[:3, 3]
    nearest = np.floor(places + 0.5).astype(int)
    on_grid = ((nearest >= 0) & (nearest < voxels.shape)).all(1)
    nearest = np.clip(nearest, 0, np.array(voxels.shape) - 1)
    brain = on_grid & (voxels[tuple(nearest.T)] > 0)
    values = np.where(brain, np.clip(interpolate(voxels, places) / white, 0, 1), 0)
    return values.reshape((side,) * 3), brain.reshape((side,) * 3)


# --- tokens ---------------------------------------------------------------------------------------


def normal_stream(seed):
    """SplitMix64 to uniform numbers of 53 bits, Box-Muller to normal ones."""
    mask, state = (1 << 64) - 1, seed

    def uniform():
        nonlocal state
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return ((z ^ (z >> 31)) >> 11) / 2.0**53

    while True:
        radius = np.sqrt(-2 * np.log(1 - uniform()))
        angle = 2 * np.pi * uniform()
        yield radius * np.cos(angle)
        yield radius * np.sin(angle)


def projection():
    inputs, outputs = SETTINGS["network"]["channels"], SETTINGS["projection"]["channels"]
    stream = normal_stream(SETTINGS["projection"]["seed"])
    entries = [next(stream) for _ in range(inputs * outputs)]
    return np.array(entries).reshape(inputs, outputs) / np.sqrt(outputs)


def slices_of(cube, axis):
    """All slices along an axis as normalised images `[n, 3, s, s]`; rows are the lower axis."""
    grey = np.moveaxis(cube, axis, 0)[:, None]
    return (grey - MEAN[:, None, None]) / STD[:, None, None]


def smooth(cells, rows, side):
    """Gaussian mean over the cells that are there, at most three standard deviations away."""
    sigma = SETTINGS["smoothing_cells"]
    if sigma == 0:
        return rows
    place = np.stack([cells % side, cells // side % side, cells // side**2], 1)
    apart = place[:, None] - place[None]
    weights = np.exp(-(apart**2).sum(-1) / (2 * sigma**2))
    weights[np.abs(apart).max(-1) > np.ceil(3 * sigma)] = 0
    return (weights / weights.sum(1, keepdims=True)) @ rows


def tokens(tensors, cube, brain, matrix):
    """Foreground cells `x + side * (y + side * z)` and per layer their tokens, rounded to f16."""
    patch = SETTINGS["network"]["patch"]
    side = cube.shape[0] // patch
    counts = brain.reshape(side, patch, side, patch, side, patch).sum((1, 3, 5))
    cells = [
        (x, y, z)
        for z in range(side)
        for y in range(side)
        for x in range(side)
        if counts[x, y, z] >= max(SETTINGS["min_brain_fraction"] * patch**3, 1)
    ]
    layers = {layer: [] for layer in SETTINGS["layers"]}
    for axis in VIEWS:
        stride = SETTINGS["slice_stride"]
        images = slices_of(cube, axis).reshape(side, patch, 3, *cube.shape[1:])
        images = images[:, (stride - 1) // 2 :: stride]
        _, normed = encode(tensors, images.reshape(-1, 3, *cube.shape[1:]), "offset")
        for layer in layers:
            features = normed[layer - 1].reshape(side, -1, side, side, matrix.shape[0]).mean(1)
            features /= np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-6)
            layers[layer].append(np.moveaxis(features @ matrix, 0, axis))
    numbers = np.array([x + side * (y + side * z) for x, y, z in cells])
    joined = {layer: np.concatenate(views, axis=-1) for layer, views in layers.items()}
    rows = {
        layer: smooth(numbers, np.array([grid[cell] for cell in cells]), side)
        for layer, grid in joined.items()
    }
    return numbers, {k: v.astype(np.float16).astype(np.float64) for k, v in rows.items()}


# --- scores ---------------------------------------------------------------------------------------


def distances(own, other, own_cells, other_cells, reach):
    """For each own token the distance to the nearest token of the other scan."""
    side = SETTINGS["cube"]["side"] // SETTINGS["network"]["patch"]
    all_pairs = np.linalg.norm(own[:, None] - other[None], axis=-1)
    if reach is not None:
        place = lambda cells: np.stack([cells % side, cells // side % side, cells // side**2], 1)
        apart = np.abs(place(own_cells)[:, None] - place(other_cells)[None]).max(-1)
        all_pairs = np.where(apart <= reach, all_pairs, np.inf)
    return all_pairs.min(1)


def share_of(fraction, n):
    return max(1, int(np.ceil(fraction * n - 1e-9)))


def token_scores(columns):
    """Mean of the smallest share (rounded up) of the finite distances; nan without any."""
    keep = share_of(SETTINGS["keep_fraction"], len(columns))
    result = []
    for row in np.array(columns).T:
        smallest = np.sort(row[np.isfinite(row)])[:keep]
        result.append(smallest.mean() if len(smallest) else np.nan)
    return np.array(result)


def level_places(cells, scores):
    """Takes a share of what the cell scores in the other scans above the average; nan stays."""
    at = [dict(zip(own, score)) for own, score in zip(cells, scores)]
    others = []
    for own, mine in enumerate(cells):
        rest = at[:own] + at[own + 1 :]
        found = [[o[cell] for o in rest if not np.isnan(o.get(cell, np.nan))] for cell in mine]
        others.append(np.array([np.mean(f) if f else np.nan for f in found]))
    others = [np.where(np.isnan(score), np.nan, other) for score, other in zip(scores, others)]
    average = np.nanmean(np.concatenate(others))
    taken = [SETTINGS["place_share"] * (other - average) for other in others]
    return [np.maximum(s - np.where(np.isnan(t), 0, t), 0) for s, t in zip(scores, taken)]


def score_grid(cells, scores):
    side = SETTINGS["cube"]["side"] // SETTINGS["network"]["patch"]
    grid = np.zeros((side,) * 3)
    grid[cells % side, cells // side % side, cells // side**2] = scores
    return grid


def score_map(voxels, affine, cells, scores):
    """Scores at the scan's own voxels: trilinear between cell centres, 0 outside the brain."""
    patch = SETTINGS["network"]["patch"]
    side = SETTINGS["cube"]["side"] // patch
    grid = score_grid(cells, scores)
    to_cube = np.linalg.inv(cube_affine(voxels, affine)) @ affine
    index = np.indices(voxels.shape).reshape(3, -1).T
    places = (index @ to_cube[:3, :3].T + to_cube[:3, 3] + 0.5) / patch - 0.5
    values = interpolate(grid, np.clip(places, 0, side - 1))
    return np.where(voxels > 0, values.reshape(voxels.shape), 0)


def profile(cells, scores):
    """Median, spread between the quartiles, and reach of the tail of what a map would hold."""
    side = SETTINGS["cube"]["side"] // SETTINGS["network"]["patch"]
    place = np.stack([cells % side, cells // side % side, cells // side**2], 1)
    thirds = np.stack(np.meshgrid(*[[-1 / 3, 0, 1 / 3]] * 3, indexing="ij"), -1).reshape(-1, 3)
    places = np.clip(place[:, None] + thirds[None], 0, side - 1).reshape(-1, 3)
    values = interpolate(score_grid(cells, scores), places)
    top = 1 - SETTINGS["false_positive_fraction"]
    low, median, high, tail = np.quantile(values, [0.25, 0.5, 0.75, top])
    return median, high - low, (tail - median) / (high - low)


def threshold(profiles, own):
    """Level and spread of the scan itself, reach of the tail in the cleaner ones of the others."""
    median, spread, _ = profiles[own]
    tails = [tail for number, (_, _, tail) in enumerate(profiles) if number != own]
    return median + spread * np.quantile(tails, SETTINGS["clean_scan_fraction"])


# --- all of it ------------------------------------------------------------------------------------


def x_fastest(volume):
    return np.asarray(volume).ravel(order="F")


def compute():
    rng = np.random.default_rng(SETTINGS["seed"])
    tensors = network(rng)
    matrix = projection()
    goldens = {"projection": matrix}
    for mode in ("offset", "size"):
        goldens[f"position.{mode}"] = position_embedding(tensors, 4, mode)
    found = []
    for number, (voxels, affine) in enumerate(scans(rng)):
        cube, brain = canonical(voxels, affine)
        cells, rows = tokens(tensors, cube, brain, matrix)
        goldens |= {
            f"scan{number}.voxels": x_fastest(voxels),
            f"scan{number}.affine": affine,
            f"scan{number}.cube": x_fastest(cube),
            f"scan{number}.brain": x_fastest(brain),
            f"scan{number}.cells": cells,
        }
        for layer, values in rows.items():
            goldens[f"scan{number}.tokens.{layer}"] = values
        found.append((voxels, affine, cube, cells, rows))

    images = np.stack([slices_of(found[1][2], axis)[13] for axis in VIEWS])
    goldens["images"] = images
    for mode in ("offset", "size"):
        for name, layers in zip(("plain", "normed"), encode(tensors, images, mode)):
            for layer, values in enumerate(layers, 1):
                goldens[f"features.{mode}.{name}.{layer}"] = values

    for reach_name, reach in (("whole", None), ("cells", SETTINGS["reach_cells"])):
        scores = []
        for own, (_, _, _, cells, rows) in enumerate(found):
            layers = []
            for layer in SETTINGS["layers"]:
                columns = []
                for other, (_, _, _, other_cells, other_rows) in enumerate(found):
                    if other != own:
                        column = distances(
                            rows[layer], other_rows[layer], cells, other_cells, reach
                        )
                        goldens[f"{reach_name}.distances.{layer}.{own}.{other}"] = column
                        columns.append(column)
                layers.append(token_scores(columns))
            scores.append(np.mean(layers, axis=0))
        all_cells = [cells for _, _, _, cells, _ in found]
        scores = [np.nan_to_num(s, nan=0.0) for s in level_places(all_cells, scores)]
        profiles = [profile(cells, s) for cells, s in zip(all_cells, scores)]
        for own, score in enumerate(scores):
            top = np.sort(score)[::-1][: share_of(0.01, len(score))]
            prefix = f"{reach_name}.scan{own}"
            voxels, affine, _, cells, _ = found[own]
            scored = score_map(voxels, affine, cells, score)
            goldens |= {
                f"{prefix}.scores": score,
                f"{prefix}.max": [score.max()],
                f"{prefix}.top1_mean": [top.mean()],
                f"{prefix}.threshold": [threshold(profiles, own)],
                f"{prefix}.map": x_fastest(scored),
            }
    return tensors, {name: np.asarray(value, dtype=np.float32) for name, value in goldens.items()}


# --- safetensors: eight bytes of length, JSON, data -----------------------------------------------


def write_safetensors(path, tensors):
    header, data = {}, b""
    for name, tensor in sorted(tensors.items()):
        raw = np.ascontiguousarray(tensor, dtype="<f4").tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_safetensors(path):
    raw = path.read_bytes()
    (n_header,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + n_header]), raw[8 + n_header :]
    return {
        name: np.frombuffer(data[slice(*entry["data_offsets"])], "<f4").reshape(entry["shape"])
        for name, entry in header.items()
    }


def check(tensors, goldens):
    for name, computed in (("weights", tensors), ("goldens", goldens)):
        committed = read_safetensors(FIXTURES / f"{name}.safetensors")
        assert committed.keys() == computed.keys(), committed.keys() ^ computed.keys()
        for key, values in computed.items():
            # Half-precision tokens may round the other way where libraries differ in the last bit.
            tolerance = 1e-3 if ".tokens." in key else 2e-4 if "." in key else 1e-6
            close = np.isclose(committed[key], values, rtol=tolerance, atol=tolerance)
            assert close.all(), (key, np.abs(committed[key] - values).max())
    settings = json.loads((FIXTURES / "settings.json").read_text())
    assert settings["settings"] == SETTINGS, "the settings have changed; write the goldens anew"
    print(f"{len(goldens)} golden tensors are what this program computes")


if __name__ == "__main__":
    tensors, goldens = compute()
    if "--check" in sys.argv:
        check(tensors, goldens)
    else:
        FIXTURES.mkdir(parents=True, exist_ok=True)
        write_safetensors(FIXTURES / "weights.safetensors", tensors)
        write_safetensors(FIXTURES / "goldens.safetensors", goldens)
        versions = {"python": platform.python_version(), "numpy": np.__version__}
        text = json.dumps({"settings": SETTINGS, "made_with": versions}, indent=2)
        (FIXTURES / "settings.json").write_text(text + "\n")
