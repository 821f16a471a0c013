"""The brain extraction network in plain PyTorch, for two tiny seeded sets of weights.

Written from the layers of deepbet 1.0.2 (a LinkNet over volumes), not from the Rust code and without
deepbet, so that the two check each other. It computes in double precision.

    make_linknet.py            writes tests/fixtures/linknet/
    make_linknet.py --check    computes everything again and compares with what is there

It needs PyTorch, so it runs by hand.
"""

import json
import platform
import struct
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "linknet"
SEED = 5
# Channels of the encoder's four stages; deepbet's are 16, 32, 64 and 128.
WIDTHS = {"locate": [4, 8, 4, 8], "outline": [8, 4, 4, 4]}
# The coarsest stage has 3 voxels along each edge. No smaller side makes extents odd.
SIDE = 96
# Every so many voxels of the result are kept.
STEP = 211


# --- the network ----------------------------------------------------------------------------------


def normed(x):
    """Each channel to mean 0 and variance 1 over this image."""
    mean = x.mean((2, 3, 4), keepdim=True)
    variance = ((x - mean) ** 2).mean((2, 3, 4), keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5)


def block(t, name, x, stride):
    branch = F.conv3d(x, t[f"{name}.double_conv.0.weight"], stride=stride, padding=1)
    branch = F.conv3d(normed(branch).relu(), t[f"{name}.double_conv.3.weight"], padding=1)
    if stride == 2:
        x = normed(F.conv3d(x, t[f"{name}.downsample.0.weight"], stride=2))
    return (normed(branch) + x).relu()


def down(t, stage, x):
    x = block(t, f"down{stage}.block1", x, 1 if stage == 0 else 2)
    return block(t, f"down{stage}.block2", x, 1)


def up(t, stage, x):
    stride = 1 if stage == 3 else 2
    x = normed(F.conv3d(x, t[f"up{stage}.conv1.0.weight"])).relu()
    weight = t[f"up{stage}.tp_conv.0.weight"]
    x = F.conv_transpose3d(x, weight, stride=stride, padding=1, output_padding=stride - 1)
    return normed(F.conv3d(normed(x).relu(), t[f"up{stage}.conv2.0.weight"])).relu()


def probability(t, image):
    """`[x, y, z]` -> the probability of brain in each voxel."""
    x = F.conv3d(image[None, None], t["init.0.weight"], stride=2, padding=3)
    stages = [F.max_pool3d(normed(x).relu(), 3, stride=2, padding=1)]
    for stage in range(4):
        stages.append(down(t, stage, stages[-1]))
    x = stages.pop()
    for stage in range(4):
        x = up(t, stage, x) + stages.pop()
    weight, bias = t["tp_conv1.0.weight"], t["tp_conv1.0.bias"]
    x = F.conv_transpose3d(x, weight, bias, stride=2, padding=1, output_padding=1)
    x = F.conv3d(normed(x).relu(), t["conv.0.weight"], t["conv.0.bias"], padding=1)
    x = F.conv_transpose3d(normed(x).relu(), t["tp_conv2.weight"], t["tp_conv2.bias"], stride=2)
    return torch.softmax(x, 1)[0, 1]


# --- weights and image ----------------------------------------------------------------------------


def shapes(widths):
    w, half = widths, widths[0] // 2
    found = {"init.0.weight": (w[0], 1, 7, 7, 7)}
    for stage in range(4):
        into = w[max(stage - 1, 0)]
        for number, first in ((1, into), (2, w[stage])):
            name = f"down{stage}.block{number}.double_conv"
            found[f"{name}.0.weight"] = (w[stage], first, 3, 3, 3)
            found[f"{name}.3.weight"] = (w[stage], w[stage], 3, 3, 3)
        if stage > 0:
            found[f"down{stage}.block1.downsample.0.weight"] = (w[stage], into, 1, 1, 1)
    for stage in range(4):
        into, out = w[3 - stage], w[max(2 - stage, 0)]
        found[f"up{stage}.conv1.0.weight"] = (into // 4, into, 1, 1, 1)
        found[f"up{stage}.tp_conv.0.weight"] = (into // 4, into // 4, 3, 3, 3)
        found[f"up{stage}.conv2.0.weight"] = (out, into // 4, 1, 1, 1)
    found["tp_conv1.0.weight"], found["tp_conv1.0.bias"] = (w[0], half, 3, 3, 3), (half,)
    found["conv.0.weight"], found["conv.0.bias"] = (half, half, 3, 3, 3), (half,)
    found["tp_conv2.weight"], found["tp_conv2.bias"] = (half, 2, 2, 2, 2), (2,)
    return found


def weights(rng, widths):
    """f16, so that the file is small. Kernels have no symmetry, so that swapped axes show."""
    made = {}
    for name, shape in shapes(widths).items():
        scale = np.prod(shape[1:]) ** -0.5 if len(shape) == 5 else 0.5
        made[name] = (scale * rng.standard_normal(shape)).astype(np.float16)
    return made


def uniform_image():
    """SplitMix64 to uniform numbers of 53 bits, as in `numeric::projection::Normal`; x fastest."""
    mask, state, values = (1 << 64) - 1, SEED, []
    for _ in range(SIDE**3):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        values.append(((z ^ (z >> 31)) >> 11) / 2.0**53)
    return np.array(values, dtype=np.float32).reshape((SIDE,) * 3, order="F")


def compute():
    rng, image = np.random.default_rng(SEED), uniform_image()
    tensors, goldens = {}, {}
    for part, widths in WIDTHS.items():
        own = weights(rng, widths)
        t = {name: torch.from_numpy(tensor.astype(np.float64)) for name, tensor in own.items()}
        found = probability(t, torch.from_numpy(image.astype(np.float64))).numpy()
        tensors |= {f"{part}.{name}": tensor for name, tensor in own.items()}
        goldens[part] = found.ravel(order="F")[::STEP].astype(np.float32)
    return tensors, goldens


# --- files ----------------------------------------------------------------------------------------


def write_safetensors(path, tensors, metadata):
    header, data = {"__metadata__": metadata}, b""
    for name, tensor in sorted(tensors.items()):
        raw, dtype = tensor.tobytes(), {"float16": "F16", "float32": "F32"}[tensor.dtype.name]
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def check(goldens):
    raw = (FIXTURES / "goldens.safetensors").read_bytes()
    (n_header,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + n_header]), raw[8 + n_header :]
    for part, values in goldens.items():
        committed = np.frombuffer(data[slice(*header[part]["data_offsets"])], "<f4")
        assert np.abs(committed - values).max() < 1e-6, part
    print("the goldens are what this program computes")


if __name__ == "__main__":
    tensors, goldens = compute()
    for part, values in goldens.items():
        print(part, "probabilities", np.quantile(values, [0, 0.1, 0.5, 0.9, 1]).round(3))
    if "--check" in sys.argv:
        check(goldens)
    else:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        FIXTURES.mkdir(parents=True, exist_ok=True)
        write_safetensors(FIXTURES / "weights.safetensors", tensors, versions)
        write_safetensors(FIXTURES / "goldens.safetensors", goldens, versions)
