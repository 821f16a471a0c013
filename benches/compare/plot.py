"""The figures of docs/performance.md from raw results.

    python3 benches/compare/plot.py --compare COMPARE.json --window WINDOW.jsonl --out docs/performance

COMPARE is written by `compare.py --json`, WINDOW by `oddscan bench window --json`. Needs matplotlib.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "oddscan", "svg.fonttype": "none", "font.size": 9})
import matplotlib.pyplot as plt

OURS, GREY = "#1f6f8b", "#b0b0b0"


def save(figure, path):
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def bars(path, labels, values, line, title, text):
    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.32 * len(labels)))
    axes.barh(labels, values, color=OURS)
    for index, value in enumerate(values):
        axes.text(value, index, f" {text(value)}", va="center")
    axes.axvline(line, color=GREY, linestyle="--")
    axes.invert_yaxis()
    axes.set_xlim(0, max([line, *values]) * 1.15)
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def growth(path, costs):
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8))
    scans = [cost["scans"] for cost in costs]
    left.plot(scans, [cost["join_seconds"] for cost in costs], "o-", color=OURS, label="a new scan joins")
    left.plot(scans, [cost["rescore_seconds"] for cost in costs], "s--", color="#c05020", label="all are scored again")
    left.set_ylabel("seconds")
    left.legend(frameon=False)
    right.plot(scans, [cost["peak_bytes"] / 2**20 for cost in costs], "o-", color=OURS)
    right.set_ylabel("peak memory, MiB")
    for axes in (left, right):
        axes.set_xlabel("scans in the window")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--compare", type=Path)
    parser.add_argument("--window", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.compare:
        found = json.loads(options.compare.read_text())
        rows = [row for row in found["rows"] if row["ours"]]
        ratios = [row["torch_s"] / row["oddscan_s"] for row in rows]
        title = f"times as fast as PyTorch, {found['device']}"
        bars(options.out / "ratios.svg", [row["what"] for row in rows], ratios, 1, title, "{:.2f}".format)
        # One bar for each thing that was done, not for each that it was held against.
        shares = {row["what"].split(" and ")[0]: row["share"] for row in rows if row["share"]}
        title = "share of what a large product reaches on this machine"
        bars(options.out / "roofline.svg", [*shares], [*shares.values()], 1, title, "{:.0%}".format)
    if options.window:
        growth(options.out / "window.svg", [json.loads(line) for line in options.window.read_text().splitlines()])


if __name__ == "__main__":
    main()
