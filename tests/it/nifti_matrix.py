"""Scans of every voxel type, byte order and kind of geometry, made with nibabel, and a check that
the results lie on the same grid. The same brain is in all of them, at the same place in the world:
so the maps must agree there too.

    nifti_matrix.py make SCANS
    nifti_matrix.py check SCANS RESULTS AFFINES

AFFINES holds the affine of each scan as oddscan reads it: file name -> three rows.
"""

import itertools
import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np

TYPES = ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"]
SHAPE = (24, 28, 22)
SPACING = 6.5


def rotation(degrees):
    a, b, c = np.deg2rad(degrees)
    x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return x @ y @ z


def affine(linear):
    """Puts the middle of the grid at (3, -12, 9) mm."""
    result = np.eye(4)
    result[:3, :3] = linear
    result[:3, 3] = np.array([3, -12, 9]) - linear @ ((np.array(SHAPE) - 1) / 2)
    return result


GEOMETRIES = {
    "ras": affine(np.diag([SPACING] * 3)),
    "las": affine(np.diag([-SPACING, SPACING, SPACING])),
    "lpi": affine(np.diag([-SPACING, -SPACING, -SPACING])),
    "permuted": affine(SPACING * np.array([[0, 0, 1], [-1, 0, 0], [0, 1, 0]])),
    "oblique": affine(rotation([12, -9, 20]) * SPACING),
    "oblique-left": affine(rotation([-8, 5, 10]) @ np.diag([-SPACING, SPACING, SPACING])),
    "anisotropic": affine(rotation([5, 0, 0]) @ np.diag([6.0, 6.0, 7.5])),
}


def brain(grid, seed):
    """The signal at the world points of a grid: an ellipsoid with smooth structure."""
    index = np.indices(SHAPE).reshape(3, -1)
    x, y, z = grid[:3, :3] @ index + grid[:3, 3:] - np.array([[3], [-12], [9]])
    inside = (x / 60) ** 2 + (y / 72) ** 2 + (z / 55) ** 2 < 1
    signal = 60 + 20 * np.sin(x / 9) + 15 * np.cos(y / 11 + z / 13)
    signal += np.random.default_rng(seed).normal(0, 1, signal.shape)
    return np.where(inside, np.clip(signal, 1, 120), 0).reshape(SHAPE)


def cases():
    """Name, affine, data type, qform code, sform code, slope, header fields that are set last."""
    for case in careful_cases():
        yield *case, {}
    for name, grid, qform, fields in odd_cases():
        yield name, grid, "<f4", qform, 0, None, fields


def careful_cases():
    for number, (code, order) in enumerate(itertools.product(TYPES, "<>")):
        slope = None if number % 3 else 0.5
        yield f"type-{code}-{'le' if order == '<' else 'be'}", GEOMETRIES["ras"], order + code, 1, 1, slope
    for name, grid in GEOMETRIES.items():
        yield f"{name}-sform", grid, "<f4", 0, 2, None
        yield f"{name}-qform", grid, ">i2", 1, 0, None
    yield "both", GEOMETRIES["oblique"], "<i2", 1, 4, None
    yield "neither", GEOMETRIES["las"], "<i2", 0, 0, None


def odd_cases():
    """Headers that no careful program writes, and that nibabel reads."""
    for number, signs in enumerate([(-1, 1, 1), (1, -1, 1), (-1, -1, -1)]):
        fields = {"pixdim": [1, *(SPACING * np.array(signs)), 0, 0, 0, 0]}
        yield f"negative-{number}-qform", GEOMETRIES["ras"], 1, fields
        yield f"negative-{number}-neither", GEOMETRIES["las"], 0, fields
    # Turns by 180 degrees, where rounding leaves a quaternion a little longer or shorter than 1.
    for number, axis in enumerate([(0.6, 0.8, 0), (0, 0, 1), (-0.36, 0.48, 0.8)]):
        axis = np.array(axis)
        turn = 2 * np.outer(axis, axis) - np.eye(3)
        for length, excess in (("short", -2e-7), ("unit", 0), ("long", 2e-7)):
            parts = axis * np.sqrt(1 + excess)
            fields = dict(zip(("quatern_b", "quatern_c", "quatern_d"), parts))
            yield f"turn-{number}-{length}-qform", affine(turn * SPACING), 1, fields


def make(folder):
    folder.mkdir(parents=True)
    for seed, (name, grid, code, qform, sform, slope, fields) in enumerate(cases()):
        data = brain(grid, seed)
        header = nib.Nifti1Header(endianness=code[0])
        header.set_data_dtype(np.dtype(code))
        values = data if slope is None else data / slope
        image = nib.Nifti1Image(values.astype(code), None, header)
        image.header.set_qform(grid if qform else None, qform)
        image.header.set_sform(grid if sform else None, sform)
        image.header["pixdim"][1:4] = nib.affines.voxel_sizes(grid)
        image.header.set_xyzt_units("mm", "sec")
        image.header["descrip"] = b"SECRET^NAME"
        if slope is not None:
            image.header["scl_slope"], image.header["scl_inter"] = slope, 0
        for field, value in fields.items():
            image.header[field] = value
        ending = ".nii" if seed % 4 == 0 else ".nii.gz"
        write(image.header, values.astype(code), folder / f"{name}_T1w{ending}", slope)


def write(header, values, path, slope):
    """As nibabel does, but with the slope as it stands in the header."""
    header = header.copy()
    header.set_data_shape(values.shape)
    header["vox_offset"] = 352
    header["magic"] = b"n+1"
    header["scl_slope"] = 1 if slope is None else slope
    header["scl_inter"] = 0
    with nib.openers.Opener(str(path), "wb") as file:
        file.write(header.binaryblock + b"\0" * 4)
        file.write(values.tobytes(order="F"))
    if path.name.startswith("type-f"):
        pad(path)


def pad(path):
    """To whole blocks of 512 bytes, as a tape does. After plain voxels there must be nothing."""
    if path.suffix == ".gz":
        with open(path, "ab") as file:
            file.write(b"\0" * (512 - path.stat().st_size % 512))


def check(folder, results, affines):
    affines = json.loads(affines.read_text())
    maps = {}
    for path in sorted(folder.iterdir()):
        stem = path.name.removesuffix(".gz").removesuffix(".nii")
        scan = nib.load(path)
        # The header's numbers have 24 bits: a few nanometres at the rim of the grid.
        ours = np.array(affines[path.name])
        assert np.allclose(ours, scan.affine[:3], rtol=0, atol=1e-5), (stem, ours, scan.affine)
        for what, dtype in (("map", "float32"), ("mask", "uint8")):
            result = nib.load(results / f"{stem}_anomaly-{what}.nii.gz")
            assert result.shape == scan.shape, (stem, result.shape)
            assert result.get_data_dtype() == np.dtype(dtype), (stem, result.get_data_dtype())
            assert np.array_equal(result.affine, scan.affine), (stem, result.affine, scan.affine)
            for field in ("qform_code", "sform_code", "pixdim", "xyzt_units"):
                ours, theirs = result.header[field], scan.header[field]
                assert np.array_equal(ours, theirs), (stem, field, ours, theirs)
            assert np.array_equal(result.get_qform(), scan.get_qform()), stem
            assert b"SECRET" not in result.header.binaryblock, stem
            values = np.asarray(result.dataobj)
            assert np.isfinite(values).all(), stem
            if what == "map":
                outside = np.asarray(scan.dataobj) == 0
                assert (values[outside] == 0).all() and values[~outside].any(), stem
                maps[stem] = values
            else:
                assert set(np.unique(values)) <= {0, 1}, stem
    # Same geometry, same brain, other voxel type: the same map but for noise.
    same = [values for stem, values in maps.items() if stem.startswith("type-")]
    for other in same[1:]:
        inside = (same[0] != 0) & (other != 0)
        # Far above what a mirrored or shifted brain would have.
        assert np.corrcoef(same[0][inside], other[inside])[0, 1] > 0.2
    print(f"{len(maps)} maps and masks lie on the grids of their scans")


if __name__ == "__main__":
    command, *folders = sys.argv[1:]
    {"make": make, "check": check}[command](*map(Path, folders))
