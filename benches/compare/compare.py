"""The same work in oddscan and in PyTorch, on the same machine, in one run: prints the ratios.

    python3 benches/compare/compare.py ODDSCAN [--device cuda|cpu] [--networks ...] [--slices N] [--json FILE]

ODDSCAN is the built binary. PyTorch runs the network eagerly with scaled_dot_product_attention, in the
precision named. On both sides grey slices go to the device in f32 and the features, averaged over each
seven slices, come back in f32. Medians. To mask instructions of the CPU for both sides, give
--instructions avx2 and set ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

SHAPES = {  # channels, blocks
    "dinov2_vits14": (384, 12),
    "dinov2_vitb14": (768, 12),
    "dinov2_vitl14": (1024, 24),
}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
MEAN = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)
GROUP = 7


class Block(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.heads = channels // 64
        self.norm1 = torch.nn.LayerNorm(channels, eps=1e-6)
        self.qkv = torch.nn.Linear(channels, 3 * channels)
        self.proj = torch.nn.Linear(channels, channels)
        self.ls1 = torch.nn.Parameter(torch.full((channels,), 0.1))
        self.norm2 = torch.nn.LayerNorm(channels, eps=1e-6)
        self.fc1 = torch.nn.Linear(channels, 4 * channels)
        self.fc2 = torch.nn.Linear(4 * channels, channels)
        self.ls2 = torch.nn.Parameter(torch.full((channels,), 0.1))

    def forward(self, x):
        n, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, t, 3, self.heads, 64).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c)
        x = x + self.ls1 * self.proj(a)
        return x + self.ls2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Network(torch.nn.Module):
    """DINOv2's shape with random weights."""

    def __init__(self, channels, depth, side):
        super().__init__()
        self.embed = torch.nn.Conv2d(3, channels, 14, 14)
        self.cls = torch.nn.Parameter(torch.randn(1, 1, channels))
        self.position = torch.nn.Parameter(torch.randn(1, 1 + (side // 14) ** 2, channels) * 0.1)
        self.blocks = torch.nn.Sequential(*(Block(channels) for _ in range(depth)))
        self.norm = torch.nn.LayerNorm(channels, eps=1e-6)

    def forward(self, images):
        patches = self.embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(images), -1, -1), patches], 1) + self.position
        return self.norm(self.blocks(x))[:, 1:]


def median(work, repeats):
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def torch_encode(network, precision, device, batch, slices, side, repeats):
    torch.manual_seed(0)
    dtype = DTYPES[precision]
    model = Network(*SHAPES[network], side).to(device, dtype).eval()
    batch, slices = -(-batch // GROUP) * GROUP, -(-slices // GROUP) * GROUP
    images = torch.rand(batch, 1, side, side)
    if device == "cuda":
        images = images.pin_memory()

    def work():
        with torch.inference_mode():
            for start in range(0, slices, batch):
                part = images[: min(batch, slices - start)].to(device, non_blocking=True)
                found = model(((part - MEAN.to(device)) / STD.to(device)).to(dtype)).float()
                found.unflatten(0, (-1, GROUP)).mean(1).cpu()

    return median(work, repeats)


def ceiling(precision, device, repeats):
    """GFLOP/s of a large product: what this machine can do, near enough."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, dtype=DTYPES[precision], device=device) for _ in range(2))
    return 2 * n**3 / median(lambda: a @ b, repeats) / 1e9


def oddscan(binary, *arguments):
    command = [binary, "bench", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(" ".join(command), "\n", done.stderr[-2000:], file=sys.stderr)
        return None
    return json.loads(done.stdout)


def torch_score(form, tokens, channels, device, window, repeats):
    """Both minima of all pairs. form: addmm, cdist (f32) or bf16 (products rounded to bf16, not refined)."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if form == "bf16" else torch.float32
    new = torch.randn(tokens, channels, dtype=dtype, device=device)
    others = [torch.randn(tokens, channels, dtype=dtype, device=device) for _ in range(min(window, 16))]
    new_norm = (new.float() ** 2).sum(1, keepdim=True)
    norms = [(o.float() ** 2).sum(1)[None] for o in others]

    def squared_distances(other, norm):
        if form == "cdist":
            return torch.cdist(new[None], other[None])[0]
        if form == "addmm":
            return torch.addmm(norm.expand(tokens, -1), new, other.T, alpha=-2).add_(new_norm)
        return (new @ other.T).float().mul_(-2).add_(norm).add_(new_norm)

    def work():
        with torch.inference_mode():
            found = []
            for i in range(window):
                squared = squared_distances(others[i % 16], norms[i % 16])
                found += [squared.min(1).values, squared.min(0).values]
            torch.stack(found).sqrt().cpu()

    return median(work, repeats)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("oddscan")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--networks", nargs="+", default=["dinov2_vits14", "dinov2_vitl14"])
    parser.add_argument("--precisions", nargs="+", default=["f32", "bf16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[56])
    parser.add_argument("--slices", type=int, default=672)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--window", type=int, default=200)
    parser.add_argument("--tokens", nargs="+", type=int, default=[2300, 4096])
    parser.add_argument("--instructions", help="at most these of the CPU, for oddscan; see its help")
    parser.add_argument("--no-score", action="store_true")
    parser.add_argument("--json", help="write all figures here")
    options = parser.parse_args()
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{name}, PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
    limits = ["--instructions", options.instructions] if options.instructions else []
    rows = []

    ceilings = {p: ceiling(p, options.device, options.repeats) for p in options.precisions}
    print("products of large matrices:", ", ".join(f"{p} {c:.0f} GFLOP/s" for p, c in ceilings.items()))

    def row(what, precision, ours, theirs):
        seconds = ours["seconds"] if ours else float("nan")
        share = ours["gflops"] / ceilings[precision] if ours and precision in ceilings else None
        rows.append({"what": what, "oddscan_s": seconds, "torch_s": theirs, "share": share, "ours": ours})
        of_ceiling = f", {share:.0%} of the ceiling" if share else ""
        ratio = f"ratio {theirs / seconds:.2f}"
        print(f"{what}: oddscan {seconds:.4f} s{of_ceiling}, PyTorch {theirs:.4f} s, {ratio}", flush=True)

    for network in options.networks:
        for precision in options.precisions:
            for batch in options.batches:
                theirs = torch_encode(
                    network, precision, options.device, batch, options.slices, 224, options.repeats
                )
                if options.device == "cuda":
                    torch.cuda.empty_cache()
                ours = oddscan(
                    options.oddscan, "encode", "--network", network, "--precision", precision,
                    "--batch", batch, "--slices", options.slices, "--device", options.device,
                    "--repeats", options.repeats, *limits,
                )
                what = f"encode {network} {precision} {options.slices} slices, batch {batch}"
                row(what, precision, ours, theirs)
    for tokens in [] if options.no_score else options.tokens:
        theirs = {
            form: torch_score(form, tokens, 384, options.device, options.window, options.repeats)
            for form in ("addmm", "cdist", *set(options.precisions) & {"bf16"})
        }
        for precision in options.precisions if options.device == "cpu" else ("bf16",):
            ours = oddscan(
                options.oddscan, "score", "--reach", 0, "--tokens", tokens, "--window", options.window,
                "--device", options.device, "--precision", precision, "--repeats", options.repeats,
                *limits,
            )
            for form, seconds in theirs.items():
                what = f"1 scan against {options.window}, {tokens} tokens: {precision} and {form}"
                row(what, precision, ours, seconds)
    if options.json:
        with open(options.json, "w") as file:
            found = {"device": name, "torch": torch.__version__, "ceilings": ceilings, "rows": rows}
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
