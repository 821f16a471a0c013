#!/usr/bin/env python3
"""Draws the pictures of docs/ from the tables of its pages: python3 docs/pictures.py

The tables hold the figures, so that a picture and the text beside it always agree. Needs matplotlib.
"""

import csv
import re
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update(
    {
        "svg.hashsalt": "oddscan",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
)
import matplotlib.pyplot as plt

DOCS = Path(__file__).resolve().parent
BLUE, ORANGE, PURPLE, GREY = "#0072b2", "#d07a00", "#a04a8a", "#a0a0a0"


def table(page, first):
    """The rows of the table whose header begins with `first`, as lists of texts."""
    return tables(page, first)[0]


def tables(page, first):
    lines = (DOCS / page).read_text().splitlines()
    found = []
    for start, line in enumerate(lines):
        if cells(line)[:1] == [first]:
            rows = []
            for row in lines[start + 2 :]:
                if not row.startswith("|"):
                    break
                rows.append(cells(row))
            found.append(rows)
    if not found:
        raise SystemExit(f"{page} has no table whose header begins with {first!r}")
    return found


def cells(line):
    if not line.startswith("|"):
        return []
    return [cell.strip().replace("*", "").replace("`", "") for cell in line.strip().strip("|").split("|")]


def number(text):
    """The first number of a cell: 1,234 and -25 % are numbers, too."""
    return float(re.search(r"-?[\d.]+", text.replace(",", "")).group())


def begin(width, height, n_axes=1, title="", note=""):
    """A figure with a title, and below it what is shown and what is good."""
    figure, axes = plt.subplots(1, n_axes, figsize=(width, height), squeeze=False)
    figure.text(0.02, 1 - 0.08 / height, title, ha="left", va="top", fontsize=12, fontweight="bold")
    figure.text(0.02, 1 - 0.34 / height, note, ha="left", va="top", color="#404040", linespacing=1.4)
    return figure, list(axes[0])


def save(figure, name, note_lines):
    height = figure.get_size_inches()[1]
    figure.tight_layout(rect=(0, 0, 1, 1 - (0.42 + 0.19 * note_lines) / height))
    figure.savefig(DOCS / name, metadata={"Date": None})
    plt.close(figure)


def bars(axes, labels, values, colours, text):
    axes.barh(labels, values, color=colours)
    for row, value in enumerate(values):
        axes.text(value, row, f" {text(value)}", va="center")
    axes.margins(y=0.02)
    axes.invert_yaxis()


def summary():
    """Average precision of the map beside that of simple maps, window by window."""
    windows = []
    for window, *row in table("quality.md", "window"):
        if window:
            windows.append((window, []))
        windows[-1][1].append(row)
    windows = [(window, rows) for window, rows in windows if "--force" not in window]
    figure, all_axes = begin(
        11, 2.6, len(windows), "How well is lesion tissue found?",
        "Average precision, voxel by voxel; 1 is best. Mean over the scans with lesions.\n"
        "The T1 lesions are real tissue in scans of healthy people.",
    )
    for axes, (window, rows) in zip(all_axes, windows):
        labels = [row[0].replace("preset = ", "").replace('"paper"', "as in the paper").replace(", ", ",\n") for row in rows]
        colours = [BLUE if "oddscan" in label else GREY for label in labels]
        bars(axes, labels, [number(row[2]) for row in rows], colours, "{:.3f}".format)
        axes.set_xlim(0, 1.1)
        axes.set_xlabel("average precision")
        axes.set_title(window, loc="left", fontsize=9)
    save(figure, "quality/summary.svg", 2)


def planted():
    """Planted lesions found, by diameter and contrast."""
    rows = table("quality/planted.md", "diameter")
    figure, all_axes = begin(
        8, 3.9, 2, "From which size are planted lesions found?",
        "Darker balls in the white matter of healthy T1 scans. Each point: 5 lesions, one in each of 5 scans.\n"
        "Window of 10 healthy scans of one scanner, default settings. Higher is better.",
    )
    diameters = [number(row[0]) for row in rows]
    panels = (("On the map: a voxel above the threshold", 1), ("In the final mask: regions from 500 mm³", 0))
    contrasts = (("25 % darker", ORANGE, "o-"), ("50 % darker", BLUE, "s--"), ("75 % darker", PURPLE, "^:"))
    for axes, (title, which) in zip(all_axes, panels):
        for column, (label, colour, style) in enumerate(contrasts, start=2):
            found = [int(re.findall(r"\d+", row[column])[which]) for row in rows]
            axes.plot(diameters, found, style, color=colour, label=label)
        axes.set(xlabel="diameter of the lesion, mm", xticks=diameters, yticks=range(6), ylim=(-0.2, 5.3))
        axes.set_title(title, loc="left", fontsize=10)
    all_axes[0].set_ylabel("lesions found, of 5")
    all_axes[1].legend(loc="upper left")
    save(figure, "quality/planted.svg", 2)


def calibration():
    """Measured against stated false-positive rate in healthy scans."""
    rows = table("quality/planted.md", "stated")
    stated = [number(row[0]) for row in rows]
    measured = [[float(text) for text in re.findall(r"[\d.]+", row[1])] for row in rows]
    # A logarithmic axis has no 0: what lies below its end is drawn there.
    least = 0.05
    figure, (axes,) = begin(
        6, 4.6, 1, "Is the false-positive rate as stated?",
        "Share of healthy brain voxels above the threshold of the mask. Good: the dots lie on the line.\n"
        "10 healthy T1 scans of one scanner, default settings.\n"
        "Bars: from the lowest to the highest scan. The axis ends at 0.05 %.",
    )
    axes.plot([least, 10], [least, 10], color=GREY, label="measured = stated")
    for rate, (_, low, high) in zip(stated, measured):
        axes.plot([rate, rate], [max(low, least), high], color=BLUE, alpha=0.35, linewidth=5, solid_capstyle="butt")
    axes.plot(stated, [mean for mean, *_ in measured], "o-", color=BLUE, label="mean of the ten scans")
    axes.axvline(1, color="black", linestyle=":", linewidth=1)
    axes.text(1.05, 0.06, "default")
    ticks = [0.1, 0.2, 0.5, 1, 2, 5, 10]
    axes.set(xscale="log", yscale="log", xlim=(0.07, 8), ylim=(least, 10))
    axes.set(xlabel="stated false-positive rate (scoring.false_positive_fraction)", ylabel="measured false-positive rate")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(matplotlib.ticker.FixedLocator(ticks))
        axis.set_minor_locator(matplotlib.ticker.NullLocator())
        axis.set_major_formatter(lambda value, _: f"{value:g} %")
    axes.legend(loc="upper left")
    save(figure, "quality/calibration.svg", 3)


def study():
    """Average precision of every setting on both windows."""
    flair, t1 = ({row[0]: number(row[1].split("/")[1]) for row in rows} for rows in tables("quality/study.md", "setting"))
    names = [*flair]
    figure, (axes,) = begin(
        8, 0.165 * len(names) + 1.6, 1, "What does each setting gain or lose?",
        "Mean average precision over scans with lesions; further right is better. Each row changes the default in what\n"
        "it names. Vertical lines: the default. Differences below 0.02 are noise. Views: 0 axial, 1 coronal, 2 sagittal.\n"
        "Plain: the method of the paper with block 9. Stride 7: one slice in seven is encoded.",
    )
    windows = ((flair, BLUE, "o", "FLAIR, 11 scans"), (t1, ORANGE, "s", "T1, 10 scans, 6 with lesions"))
    for figures, colour, marker, label in windows:
        axes.axvline(figures["default"], color=colour, linewidth=1, alpha=0.6)
        axes.plot([figures[name] for name in names], range(len(names)), marker, color=colour, markersize=4, label=label)
    axes.set_yticks(range(len(names)), names, fontsize=7.5)
    axes.set(ylim=(len(names) - 0.3, -0.7), xlim=(0, 0.8), xlabel="mean average precision")
    axes.grid(axis="y", color="#e8e8e8")
    axes.set_axisbelow(True)
    axes.legend(loc="center left")
    save(figure, "quality/study.svg", 3)


def ratios():
    """Speed beside PyTorch on one machine."""
    encoding, distances = table("performance/cpu.md", "network"), table("performance/cpu.md", "tokens")
    gpu = table("performance/gpu.md", "network")
    labels = [f"encode {row[0]}" for row in encoding]
    values = [number(row[3]) for row in encoding]
    labels += [f"distances, {row[0]} tokens, {row[1]}, against PyTorch's {row[3]}" for row in distances]
    values += [number(row[5]) for row in distances]
    n_cpu = len(values)
    for gpu_name, column in (("H200", 3), ("H100", 6)):
        rows = [row for row in gpu if row[column]]
        labels += [f"encode {row[0]}, bf16, {gpu_name}" for row in rows]
        values += [number(row[column]) for row in rows]
    figure, (axes,) = begin(
        8, 0.24 * len(labels) + 1.5, 1, "How fast is oddscan beside PyTorch?",
        "Time of PyTorch over time of oddscan for the same work, on the same machine, in one run.\n"
        "Right of the dashed line oddscan is faster. Blue: two CPU cores (EPYC, Zen 4). Orange: one NVIDIA GPU.",
    )
    colours = [BLUE] * n_cpu + [ORANGE] * (len(values) - n_cpu)
    bars(axes, labels, values, colours, "{:.2f}".format)
    axes.axvline(1, color="black", linestyle="--", linewidth=1)
    axes.set(xlim=(0, 4.5), xlabel="times as fast as PyTorch")
    save(figure, "performance/ratios.svg", 2)


def roofline():
    """Share of what a large matrix product reaches."""
    shares = {f"encode {row[0]}": number(row[4]) for row in table("performance/cpu.md", "network")}
    for row in table("performance/cpu.md", "tokens"):
        shares[f"distances, {row[0]} tokens, {row[1]}"] = number(row[6])
    figure, (axes,) = begin(
        8, 0.26 * len(shares) + 1.6, 1, "How much of the processor does oddscan use?",
        "Arithmetic per second, as a share of PyTorch's product of two 2,048 x 2,048 matrices in the same format\n"
        "(dashed), on the same two CPU cores (EPYC, Zen 4), in one run. Further right is better; 100 % is no limit.",
    )
    bars(axes, [*shares], [*shares.values()], BLUE, "{:.0f} %".format)
    axes.axvline(100, color="black", linestyle="--", linewidth=1)
    axes.set(xlim=(0, 140), xlabel="share of a large matrix product, %")
    save(figure, "performance/roofline.svg", 2)


def window():
    """Cost of a scan that joins a window."""
    rows = table("performance/window.md", "scans")
    scans, join, rescore, disk, memory = ([number(row[column]) for row in rows] for column in range(5))
    figure, (left, middle, right) = begin(
        9, 3.6, 3, "What does a larger window cost?",
        "A scan that joins a window of random tokens (1,800 in each of three grids, 384 channels, one patch around).\n"
        "Two CPU cores, window.memory_mib = 256; one run for each size. Lower is better.",
    )
    left.plot(scans, join, "o-", color=BLUE, label="a new scan joins")
    left.plot(scans, rescore, "s--", color=ORANGE, label="all are scored again")
    left.set_ylabel("time, s")
    left.legend(loc="upper left")
    middle.plot(scans, [size / 1024 for size in disk], "o-", color=BLUE)
    middle.set_ylabel("store on disk, GiB")
    right.plot(scans, memory, "o-", color=BLUE)
    right.set_ylabel("peak memory of the process, MiB")
    for axes in (left, middle, right):
        axes.set_xlabel("scans in the window")
        axes.set_ylim(bottom=0)
    save(figure, "performance/window.svg", 2)


def day():
    """Memory, handles and disk during a day in an hour."""
    path = DOCS / "reliability/day.csv"
    if not path.exists():
        return
    with path.open() as file:
        rows = list(csv.DictReader(file))
    arrived = [int(row["arrived"]) for row in rows]
    column = lambda name: [float(row[name]) for row in rows]
    figure, (memory, handles, disk, work) = begin(
        10, 3.4, 4, "Does the daemon stay small?",
        f"{arrived[-1]:,} tiny scans in a window of 100, with {rows[-1]['kills']} kills and "
        f"{rows[-1]['quarantined']} refused files. Two CPU cores.\n"
        "Level lines are good: nothing grows with the number of scans.",
    )
    memory.plot(arrived, column("peak_mib"), color=GREY, label="peak of the process")
    memory.plot(arrived, column("rss_mib"), color=BLUE, label="now")
    memory.set_ylabel("resident memory, MiB")
    memory.legend(loc="lower right")
    handles.plot(arrived, column("handles"), color=BLUE)
    handles.set_ylabel("open files")
    disk.plot(arrived, column("state_mib"), color=GREY, label="state")
    disk.plot(arrived, column("store_mib"), color=BLUE, label="store alone")
    disk.set_ylabel("on disk, MiB")
    disk.legend(loc="lower right")
    work.plot(arrived, column("results"), color=BLUE)
    work.set_ylabel("scans with a result or notice")
    for axes in (memory, handles, disk, work):
        axes.set_xlabel("scans that arrived")
        axes.set_ylim(bottom=0)
    save(figure, "reliability/day.svg", 2)


for draw in (summary, planted, calibration, study, ratios, roofline, window, day):
    draw()
