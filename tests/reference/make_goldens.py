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
        "patch": 6,
        "position_side": 5,
    },
    "cube": {"side": 24, "field_of_view_mm": 150.3},
    "layers": [2, 3],
    "min_brain_fraction": 0.3,
    "slice_stride": 1,
    "false_positive_fraction": 0.01,
    "clean_scan_fraction": 0.25,
}
# What the preset "paper" and the defaults differ in.
METHODS = {
    "paper": {
        "projection": {"seed": 20260211, "channels": 8},
        "join_views": True,
        "slices_per_token": 6,
        "skip_background": False,
        "smoothing_patches": 0.0,
        "reach_patches": None,
        "keep_fraction": 0.3,
        "positional_correction": 0.0,
    },
    "default": {
        "projection": None,
        "join_views": False,
        "slices_per_token": 3,
        "skip_background": True,
        "smoothing_patches": 0.4,
        "reach_patches": 1,
        "keep_fraction": 0.4,
        "positional_correction": 0.3,
    },
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


try:
    from scipy.special import erf
except ImportError:
    from math import erf as scalar_erf

    erf = np.vectorize(scalar_erf)


def encode(tensors, images, mode, depth=None, seen=None):
    """`[n, 3, s, s]` -> after each of `depth` blocks (all by default) `[n, patches, channels]`, plain
    and with final norm. The network sees these patches only, all by default."""
    n = SETTINGS["network"]
    d, heads, patch = n["channels"], n["heads"], n["patch"]
    t = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    side = images.shape[-1] // patch
    tiles = images.reshape(len(images), 3, side, patch, side, patch).transpose(0, 2, 4, 1, 3, 5)
    kernel = t["patch_embed.proj.weight"].reshape(d, -1)
    x = tiles.reshape(len(images), side * side, -1) @ kernel.T + t["patch_embed.proj.bias"]
    x = np.concatenate([np.broadcast_to(t["cls_token"], (len(images), 1, d)), x], axis=1)
    x = x + position_embedding(tensors, side, mode)
    if seen is not None:
        x = x[:, np.concatenate([[0], 1 + seen])]
    plain, normed = [], []
    for b in range(depth or n["depth"]):

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


def cube_affine(brain, affine):
    """Cube voxel -> world: centred on the box around the brain, along the world's axes."""
    points = np.argwhere(brain) @ affine[:3, :3].T + affine[:3, 3]
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


def canonical(voxels, inside, affine):
    """The cube in [0, 1] and its brain mask, `[x, y, z]`."""
    side = SETTINGS["cube"]["side"]
    white = np.percentile(voxels[inside].astype(np.float64), 99.8)
    to_voxel = np.linalg.inv(affine) @ cube_affine(inside, affine)
    index = np.indices((side,) * 3).reshape(3, -1).T
    places = index @ to_voxel[:3, :3].T + to_voxel[:3, 3]
    nearest = np.floor(places + 0.5).astype(int)
    on_grid = ((nearest >= 0) & (nearest < voxels.shape)).all(1)
    nearest = np.clip(nearest, 0, np.array(voxels.shape) - 1)
    brain = on_grid & inside[tuple(nearest.T)]
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


def projection(method):
    """`[channels, projected]`; the identity where nothing is projected."""
    inputs = SETTINGS["network"]["channels"]
    if method["projection"] is None:
        return np.eye(inputs)
    outputs = method["projection"]["channels"]
    stream = normal_stream(method["projection"]["seed"])
    entries = [next(stream) for _ in range(inputs * outputs)]
    return np.array(entries).reshape(inputs, outputs) / np.sqrt(outputs)


def slices_of(cube, axis):
    """All slices along an axis as normalised images `[n, 3, s, s]`; rows are the lower axis."""
    grey = np.moveaxis(cube, axis, 0)[:, None]
    return (grey - MEAN[:, None, None]) / STD[:, None, None]


def place_of(cells, shape):
    """`[n, 3]` from positions `x + nx * (y + ny * z)`."""
    return np.stack(np.unravel_index(cells, shape, order="F"), 1)


def smooth(cells, rows, shape, sigma):
    """Gaussian mean over the cells that are there, at most three standard deviations away."""
    if sigma == 0:
        return rows
    sigmas = sigma * np.array(shape) / min(shape)
    place = place_of(cells, shape)
    apart = np.abs(place[:, None] - place[None])
    weights = np.exp(-((apart / sigmas) ** 2).sum(-1) / 2)
    weights[(apart > np.ceil(3 * sigmas)).any(-1)] = 0
    return (weights / weights.sum(1, keepdims=True)) @ rows


def foreground(brain, edges):
    """Grid of cells with these edges, and positions of those that hold enough brain."""
    shape = tuple(n // edge for n, edge in zip(brain.shape, edges))
    split = [part for n, edge in zip(shape, edges) for part in (n, edge)]
    counts = brain.reshape(split).sum((1, 3, 5))
    needed = max(SETTINGS["min_brain_fraction"] * np.prod(edges), 1)
    return shape, np.flatnonzero(counts.ravel(order="F") >= needed)


def tokens(tensors, cube, brain, method):
    """Parts, each one view or all joined: shape, foreground cells, tokens per layer, as in f16."""
    patch, depth = SETTINGS["network"]["patch"], method["slices_per_token"]
    side, stride = cube.shape[0] // patch, SETTINGS["slice_stride"]
    matrix = projection(method)
    views = []
    for axis in VIEWS:
        groups = slices_of(cube, axis).reshape(-1, depth, 3, *cube.shape[1:])
        brains = np.moveaxis(brain, axis, 0).reshape(-1, depth, side, patch, side, patch)
        shape = (len(groups), side * side, SETTINGS["network"]["channels"])
        pooled = {layer: np.zeros(shape) for layer in SETTINGS["layers"]}
        for index, (group, inside) in enumerate(zip(groups, brains)):
            seen = np.arange(side * side)
            if method["skip_background"]:
                seen = np.flatnonzero(inside.any((0, 2, 4)))
                if len(seen) == 0:
                    continue
            images = group[(stride - 1) // 2 :: stride]
            _, normed = encode(tensors, images, "offset", max(SETTINGS["layers"]), seen)
            for layer in SETTINGS["layers"]:
                pooled[layer][index, seen] = normed[layer - 1].mean(0)
        grids = {}
        for layer, features in pooled.items():
            features = features.reshape(len(groups), side, side, -1)
            features /= np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-6)
            grids[layer] = np.moveaxis(features @ matrix, 0, axis)
        edges = [depth if other == axis else patch for other in range(3)]
        views.append((*foreground(brain, edges), grids))
    if method["join_views"]:
        shape, cells, _ = views[0]
        joined = {
            layer: np.concatenate([grids[layer] for _, _, grids in views], axis=-1)
            for layer in SETTINGS["layers"]
        }
        views = [(shape, cells, joined)]
    parts = []
    for shape, cells, grids in views:
        rows = {}
        for layer, grid in grids.items():
            own = grid[tuple(place_of(cells, shape).T)]
            own = smooth(cells, own, shape, method["smoothing_patches"])
            rows[layer] = own.astype(np.float16).astype(np.float64)
        parts.append((shape, cells, rows))
    return parts


# --- scores ---------------------------------------------------------------------------------------


def distances(own, other, layer, reach):
    """For each own token the distance to the nearest token of the other scan."""
    (shape, own_cells, own_rows), (_, other_cells, other_rows) = own, other
    reach = np.array(shape) if reach is None else reach * np.array(shape) // min(shape)
    other_places = place_of(other_cells, shape)
    nearest = []
    for place, row in zip(place_of(own_cells, shape), own_rows[layer]):
        near = (np.abs(other_places - place) <= reach).all(1)
        apart = np.linalg.norm(other_rows[layer][near] - row, axis=1)
        nearest.append(apart.min(initial=np.inf))
    return np.array(nearest)


def share_of(fraction, n):
    return max(1, int(np.ceil(fraction * n - 1e-9)))


def token_scores(columns, fraction):
    """Mean of the smallest share (rounded up) of the finite distances; nan without any."""
    keep = share_of(fraction, len(columns))
    result = []
    for row in np.array(columns).T:
        smallest = np.sort(row[np.isfinite(row)])[:keep]
        result.append(smallest.mean() if len(smallest) else np.nan)
    return np.array(result)


def correct_positions(cells, scores, share):
    """Takes a share of what the cell scores in the other scans above the average; nan stays."""
    at = [dict(zip(own, score)) for own, score in zip(cells, scores)]
    others = []
    for own, mine in enumerate(cells):
        rest = at[:own] + at[own + 1 :]
        found = [[o[cell] for o in rest if not np.isnan(o.get(cell, np.nan))] for cell in mine]
        others.append(np.array([np.mean(f) if f else np.nan for f in found]))
    others = [np.where(np.isnan(score), np.nan, other) for score, other in zip(scores, others)]
    average = np.nanmean(np.concatenate(others))
    taken = [share * (other - average) for other in others]
    return [np.maximum(s - np.where(np.isnan(t), 0, t), 0) for s, t in zip(scores, taken)]


def dense(shape, cells, scores):
    grid = np.zeros(np.prod(shape))
    grid[cells] = np.nan_to_num(scores)
    return grid.reshape(shape, order="F")


def between_centres(grid, places):
    """Trilinear between cell centres at places from 0 to 1, held constant beyond them."""
    shape = np.array(grid.shape)
    return interpolate(grid, np.clip(places * shape - 0.5, 0, shape - 1))


def joined_scores(views):
    """Mean of the views where all have a cell, on a grid of at least two cells per patch."""
    shapes = np.array([shape for shape, _, _ in views])
    shape = tuple(np.clip(shapes.max(0), 2 * shapes.min(), 4 * shapes.min()))
    places = (place_of(np.arange(np.prod(shape)), shape) + 0.5) / shape
    inside, total, n_matched = True, 0, 0
    for own_shape, cells, scores in views:
        cell = np.ravel_multi_index(tuple((places * own_shape).astype(int).T), own_shape, order="F")
        inside = inside & np.isin(cell, cells)
        matched = np.isin(cell, cells[~np.isnan(scores)])
        n_matched = n_matched + matched
        values = between_centres(dense(own_shape, cells, scores), places)
        total = total + np.where(matched, values, 0)
    scores = np.where(n_matched > 0, total / np.maximum(n_matched, 1), np.nan)
    return shape, np.flatnonzero(inside), scores[inside]


def score_map(brain, affine, shape, cells, scores):
    """Scores at the scan's own voxels: trilinear between cell centres, 0 outside the brain."""
    to_cube = np.linalg.inv(cube_affine(brain, affine)) @ affine
    index = np.indices(brain.shape).reshape(3, -1).T
    places = index @ to_cube[:3, :3].T + to_cube[:3, 3] + 0.5
    values = between_centres(dense(shape, cells, scores), places / SETTINGS["cube"]["side"])
    return np.where(brain, values.reshape(brain.shape), 0)


def profile(scores):
    """Median, spread between the quartiles, and reach of the tail."""
    top = 1 - SETTINGS["false_positive_fraction"]
    low, median, high, tail = np.quantile(scores, [0.25, 0.5, 0.75, top])
    return median, high - low, (tail - median) / (high - low)


def threshold(profiles, own):
    """Level and spread of the scan itself, reach of the tail in the cleaner ones of the others."""
    median, spread, _ = profiles[own]
    tails = [tail for number, (_, _, tail) in enumerate(profiles) if number != own]
    return median + spread * np.quantile(tails, SETTINGS["clean_scan_fraction"])


def score_window(scans, method, keep_column=lambda *_: None):
    """Scores of every scan, whose parts `scans` holds, on its joined grid: shape, cells, scores."""
    views = [[] for _ in scans]
    for part in range(len(scans[0])):
        scores = []
        for own, parts in enumerate(scans):
            layers = []
            for layer in SETTINGS["layers"]:
                columns = []
                for other in range(len(scans)):
                    if other != own:
                        column = distances(
                            parts[part], scans[other][part], layer, method["reach_patches"]
                        )
                        keep_column(layer, part, own, other, column)
                        columns.append(column)
                layers.append(token_scores(columns, method["keep_fraction"]))
            scores.append(np.mean(layers, axis=0))
        cells = [parts[part][1] for parts in scans]
        if method["positional_correction"] > 0:
            scores = correct_positions(cells, scores, method["positional_correction"])
        for view, parts, score in zip(views, scans, scores):
            view.append((*parts[part][:2], score))
    return [joined_scores(view) for view in views]


# --- all of it ------------------------------------------------------------------------------------


def x_fastest(volume):
    return np.asarray(volume).ravel(order="F")


def compute():
    rng = np.random.default_rng(SETTINGS["seed"])
    tensors = network(rng)
    goldens = {"projection": projection(METHODS["paper"])}
    for mode in ("offset", "size"):
        goldens[f"position.{mode}"] = position_embedding(tensors, 4, mode)
    made = scans(rng)
    found = [(voxels, affine, *canonical(voxels, voxels > 0, affine)) for voxels, affine in made]
    for number, (voxels, affine, cube, brain) in enumerate(found):
        goldens |= {
            f"scan{number}.voxels": x_fastest(voxels),
            f"scan{number}.affine": affine,
            f"scan{number}.cube": x_fastest(cube),
            f"scan{number}.brain": x_fastest(brain),
        }

    images = np.stack([slices_of(found[1][2], axis)[13] for axis in VIEWS])
    goldens["images"] = images
    for mode in ("offset", "size"):
        for name, layers in zip(("plain", "normed"), encode(tensors, images, mode)):
            for layer, values in enumerate(layers, 1):
                goldens[f"features.{mode}.{name}.{layer}"] = values

    for name, method in METHODS.items():
        of_scan = [tokens(tensors, cube, brain, method) for _, _, cube, brain in found]
        for number, parts in enumerate(of_scan):
            for part, (_, cells, rows) in enumerate(parts):
                goldens[f"{name}.scan{number}.cells.{part}"] = cells
                for layer, values in rows.items():
                    goldens[f"{name}.scan{number}.tokens.{layer}.{part}"] = values

        def keep_column(layer, part, own, other, column):
            goldens[f"{name}.distances.{layer}.{part}.{own}.{other}"] = column

        scores = score_window(of_scan, method, keep_column)
        scores = [(shape, cells, np.nan_to_num(score)) for shape, cells, score in scores]
        profiles = [profile(score) for _, _, score in scores]
        for own, (shape, cells, score) in enumerate(scores):
            top = np.sort(score)[::-1][: share_of(0.01, len(score))]
            voxels, affine, _, _ = found[own]
            prefix = f"{name}.scan{own}"
            goldens |= {
                f"{prefix}.scores": score,
                f"{prefix}.max": [score.max()],
                f"{prefix}.top1_mean": [top.mean()],
                f"{prefix}.threshold": [threshold(profiles, own)],
                f"{prefix}.map": x_fastest(score_map(voxels > 0, affine, shape, cells, score)),
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
    assert settings["settings"] == SETTINGS | {"methods": METHODS}, "the settings have changed; write the goldens anew"
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
        text = json.dumps({"settings": SETTINGS | {"methods": METHODS}, "made_with": versions}, indent=2)
        (FIXTURES / "settings.json").write_text(text + "\n")
