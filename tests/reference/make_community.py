"""The filter of shared anomalies in numpy: tests/fixtures/community.json.

    pip install leidenalg igraph numpy
    make_community.py

Seeded windows of tokens, what the filter finds in them, and the scores with and without it. Written from the
description in `numeric::community`; its communities are leidenalg's. The versions that wrote the file are
stated in it.
"""

import json
from pathlib import Path

import igraph
import leidenalg
import numpy as np

from make_goldens import share_of, token_scores
from make_leiden import best_partition

FIXTURE = Path(__file__).resolve().parent.parent / "fixtures" / "community.json"
SEED = 20261126
KEEP = 0.3
SETTINGS = {
    "reference_rank": 0.3,
    "rare_quantile": 0.5,
    "link_coverage": 0.9,
    "max_pair_share": 0.005,
    "resolution_quantile": 0.25,
    "min_resolution": 1.0,
    "min_scans": 3,
    "max_scan_share": 0.5,
    "iqr_factor": 3.0,
    "min_iqr": 1.0,
    "exclusion_quantile": 0.99,
    "max_excluded_share": 0.25,
}


# --- windows --------------------------------------------------------------------------------------


def made_window(random, n_scans, n_tokens, width=8):
    """Whole numbers `[scan, token, width]`: one anatomy, a shift per scan, noise per token."""
    cells = random.normal(0, 100, (n_tokens, width))
    shift = random.normal(0, 20, (n_scans, 1, width))
    return np.rint(cells + shift + random.normal(0, 50, (n_scans, n_tokens, width))).astype(int)


def with_lesion(random, scans, carriers, n_tokens):
    """The same few vectors, far from all others, somewhere in each carrier."""
    vectors = random.normal(0, 1, (n_tokens, scans.shape[2]))
    vectors *= 300 * np.sqrt(scans.shape[2]) / np.linalg.norm(vectors, axis=1, keepdims=True)
    for scan in carriers:
        where = random.choice(scans.shape[1], n_tokens, replace=False)
        scans[scan, where] = np.rint(vectors + random.normal(0, 20, vectors.shape))
    return scans


def cases():
    random = np.random.default_rng(SEED)
    yield "clean", made_window(random, 16, 40)
    scans = made_window(random, 16, 40)
    yield "a lesion in four of 16", with_lesion(random, scans, [1, 5, 6, 12], 4)
    scans = made_window(random, 20, 40)
    scans = with_lesion(random, scans, [0, 3, 4, 9, 15], 4)
    yield "two lesions", with_lesion(random, scans, [2, 7, 11, 16], 5)
    scans = made_window(random, 16, 40)
    scans[[2, 3, 8, 9]] += np.rint(random.normal(0, 60, (40, 8))).astype(int)
    yield "a scanner in four of 16", scans


# --- the filter -----------------------------------------------------------------------------------


def distances(scans, excluded):
    """`[own scan][own token, other scan]`, nan to itself; each the smallest to a token that is left."""
    result = []
    for own, tokens in enumerate(scans):
        columns = []
        for other, theirs in enumerate(scans):
            left = np.delete(theirs, excluded[other], axis=0)
            apart = np.sqrt(((tokens[:, None] - left[None]) ** 2).sum(-1).astype(float)).min(1)
            columns.append(np.full(len(tokens), np.nan) if other == own else apart)
        result.append(np.stack(columns, 1).astype(np.float32).astype(float))
    return result


def upper_median(values):
    return np.sort(values)[len(values) // 2]


def levelled(window):
    """Each ordered pair of scans by its median."""
    result = []
    for own, columns in enumerate(window):
        columns = columns.copy()
        for other in range(columns.shape[1]):
            if other != own:
                columns[:, other] /= upper_median(columns[:, other])
        result.append(columns)
    return result


def suspicious_links(window):
    """(ratio, scan, token, near), lowest ratio first, until enough scans have sent one."""
    n_others = len(window) - 1
    rank = max(share_of(SETTINGS["reference_rank"], n_others), share_of(KEEP, n_others) + 1)
    links = []
    for scan, columns in enumerate(window):
        others = [other for other in range(len(window)) if other != scan]
        ordered = [sorted((row[other], other) for other in others) for row in columns]
        references = np.array([row[rank - 1][0] for row in ordered])
        usual = np.quantile(references, SETTINGS["rare_quantile"])
        for token, row in enumerate(ordered):
            if references[token] > usual:
                near = row[: rank - 1]
                links += [(apart / references[token], scan, token, other) for apart, other in near]
    n_pairs = sum(len(columns) for columns in window) * n_others
    links = sorted(links)[: share_of(SETTINGS["max_pair_share"], n_pairs)]
    sent = set()
    for number, (_, scan, _, _) in enumerate(links, 1):
        sent.add(scan)
        if len(sent) == share_of(SETTINGS["link_coverage"], len(window)):
            return links[:number]
    return links


def resolution(weights):
    means = [row[row > 0].mean() if (row > 0).any() else 0.0 for row in weights]
    return max(np.quantile(means, SETTINGS["resolution_quantile"]), SETTINGS["min_resolution"])


def density(weights, members):
    inner = weights[np.ix_(members, members)]
    n = len(members)
    return weights[members[0]].max() if n == 1 else inner.sum() / (n * (n - 1))


def stands_out(densities, index):
    rest = np.delete(densities, index)
    if len(rest) == 0:
        return False
    low, high = np.quantile(rest, [0.25, 0.75])
    return densities[index] > high + SETTINGS["iqr_factor"] * max(high - low, SETTINGS["min_iqr"])


def score_ratios(window, scan, members):
    """Score against the scans outside a community over the score against all."""
    outside = [other for other in range(len(window)) if other != scan and other not in members]
    everyone = [other for other in range(len(window)) if other != scan]
    columns = window[scan].T
    return token_scores(columns[outside], KEEP) / token_scores(columns[everyone], KEEP)


def find(window):
    """How many links, and the suspects with the tokens that they lose."""
    window = levelled(window)
    links = suspicious_links(window)
    weights = np.zeros((len(window), len(window)))
    for _, scan, _, near in links:
        weights[scan, near] += 1
        weights[near, scan] += 1
    labels, _, _ = best_partition(np.triu(weights), resolution(weights))
    groups = [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]
    groups.sort()
    densities = np.array([density(weights, members) for members in groups])
    suspects = []
    for index, members in enumerate(groups):
        fits = SETTINGS["min_scans"] <= len(members) < SETTINGS["max_scan_share"] * len(window)
        if not fits or not stands_out(densities, index):
            continue
        outside = [scan for scan in range(len(window)) if scan not in members]
        usual = np.concatenate([score_ratios(window, scan, members) for scan in outside])
        limit = np.quantile(usual, SETTINGS["exclusion_quantile"])
        over = [np.flatnonzero(score_ratios(window, m, members) > limit) for m in members]
        share = sum(map(len, over)) / sum(len(window[m]) for m in members)
        is_group = share > SETTINGS["max_excluded_share"]
        excluded = [[] if is_group else tokens.tolist() for tokens in over]
        suspect = {"members": members, "mean_inner_weight": densities[index], "over_share": share}
        suspects.append(suspect | {"excluded": excluded})
    return {"n_links": len(links), "suspects": suspects}


def scores(window):
    columns = [np.delete(columns, own, axis=1).T for own, columns in enumerate(window)]
    return [np.round(token_scores(column, KEEP), 3).tolist() for column in columns]


def main():
    windows = []
    for name, scans in cases():
        nothing = [[] for _ in scans]
        before = distances(scans, nothing)
        found = find(before)
        excluded = nothing
        for suspect in found["suspects"]:
            for member, tokens in zip(suspect["members"], suspect["excluded"]):
                excluded[member] = tokens
        suspects = [(s["members"], round(s["over_share"], 3)) for s in found["suspects"]]
        print(f"{name}: {found['n_links']} links, suspects {suspects}")
        after = scores(distances(scans, excluded))
        windows.append({"name": name, "tokens": scans.tolist(), **found, "scores": after})
    versions = {"leidenalg": leidenalg.version, "igraph": igraph.__version__, "numpy": np.__version__}
    head = {"script": "tests/reference/make_community.py", "seed": SEED, "versions": versions}
    lines = ",\n".join(json.dumps(window, separators=(",", ":")) for window in windows)
    FIXTURE.write_text(json.dumps(head)[:-1] + ', "windows": [\n' + lines + "\n]}\n")


if __name__ == "__main__":
    main()
