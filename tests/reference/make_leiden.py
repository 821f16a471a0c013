"""Seeded random graphs with the best CPM quality that leidenalg finds: tests/fixtures/leiden.json.

    pip install leidenalg igraph numpy
    make_leiden.py

The versions that wrote the file are stated in it. `numeric::leiden` must reach these qualities.
"""

import json
from pathlib import Path

import igraph
import leidenalg
import numpy as np

FIXTURE = Path(__file__).resolve().parent.parent / "fixtures" / "leiden.json"
SEED = 20261125
N_RUNS = 20


def planted(random, sizes, inside, outside):
    """Poisson link counts, `inside` per pair within a group, `outside` between groups."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    random.shuffle(labels)
    mean = np.where(labels[:, None] == labels[None, :], inside, outside)
    return labels, np.triu(random.poisson(mean), 1)


def noise(random, n_nodes, mean):
    return np.triu(random.poisson(mean, (n_nodes, n_nodes)), 1)


def ring_of_cliques(n_cliques, size):
    n_nodes = n_cliques * size
    weights = np.zeros((n_nodes, n_nodes), int)
    for clique in range(n_cliques):
        first = clique * size
        weights[first : first + size, first : first + size] = 1
        weights[first, (first + size) % n_nodes] = weights[(first + size) % n_nodes, first] = 1
    return np.repeat(np.arange(n_cliques), size), np.triu(weights, 1)


def cpm(weights, labels, resolution):
    """Written out: leidenalg counts every undirected edge twice."""
    same = np.triu(labels[:, None] == labels[None, :], 1)
    return float((weights[same] - resolution).sum())


def best_partition(weights, resolution):
    """Labels of the best of many runs, its quality, and that of the worst run."""
    graph = igraph.Graph(len(weights), list(zip(*map(list, np.nonzero(weights)))))
    graph.es["weight"] = weights[np.nonzero(weights)].tolist()
    runs = []
    for seed in range(N_RUNS):
        found = leidenalg.find_partition(
            graph,
            leidenalg.CPMVertexPartition,
            weights="weight",
            resolution_parameter=resolution,
            n_iterations=-1,
            seed=seed,
        )
        labels = np.array(found.membership)
        runs.append((cpm(weights, labels, resolution), labels))
    qualities = [quality for quality, _ in runs]
    return runs[np.argmax(qualities)][1], max(qualities), min(qualities)


def cases():
    random = np.random.default_rng(SEED)
    # Well separated groups: every group is found by name.
    yield "three groups", *planted(random, [12, 8, 5], 9.0, 0.2), 2.0
    yield "a group among singletons", *planted(random, [9] + [1] * 21, 10.0, 0.2), 3.5
    yield "six groups", *planted(random, [14, 11, 9, 7, 5, 4], 12.0, 0.5), 4.0
    yield "ring of cliques", *ring_of_cliques(8, 5), 0.4
    # No clear answer: only the quality counts.
    for n_nodes, mean, resolution in [(30, 0.3, 0.5), (40, 1.0, 1.5), (60, 0.8, 1.0), (60, 3.0, 3.5)]:
        yield f"noise {n_nodes} {mean}", None, noise(random, n_nodes, mean), resolution
    for sizes, inside, outside, resolution in [([10, 10, 10], 1.5, 0.5, 1.0), ([20, 15, 10, 5], 2.0, 1.0, 1.5)]:
        _, weights = planted(random, sizes, inside, outside)
        yield f"blurred groups {sum(sizes)}", None, weights, resolution


def main():
    graphs = []
    for name, labels, weights, resolution in cases():
        _, best, worst = best_partition(weights, resolution)
        print(f"{name}: best {best:.3f}, worst {worst:.3f} of {N_RUNS}")
        graph = {
            "name": name,
            "n_nodes": len(weights),
            "resolution": resolution,
            "best_quality": best,
            "planted": None if labels is None else labels.tolist(),
            "edges": [[int(a), int(b), int(weights[a, b])] for a, b in zip(*np.nonzero(weights))],
        }
        graphs.append(graph)
    versions = {"leidenalg": leidenalg.version, "igraph": igraph.__version__, "numpy": np.__version__}
    head = {"script": "tests/reference/make_leiden.py", "seed": SEED, "runs": N_RUNS, "versions": versions}
    lines = ",\n".join(json.dumps(graph, separators=(",", ":")) for graph in graphs)
    FIXTURE.write_text(json.dumps(head)[:-1] + ', "graphs": [\n' + lines + "\n]}\n")


if __name__ == "__main__":
    main()
