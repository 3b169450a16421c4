"""Chi-square top-k search against pairwise distances by a Python callable: same numbers, how much faster?

    python benchmarks/chi_square.py                      # 10,000 x 10,000 x 128, top 100
    OMP_NUM_THREADS=1 python benchmarks/chi_square.py    # one thread

The search is timed whole. The callable is timed on `--sample` queries against all of the archive, bare and
through scikit-learn's `pairwise_distances`, as the published system calls it; its time for all queries is in
proportion.
Distances of the sample must agree to 1e-6, and so must the distances of the rows that were found.
"""
import argparse
import os
import time

import numpy as np


def chi_square(u, v): return 0.5*np.sum((u - v)**2/(u + v + 1e-10))


def timed(call):
    start = time.perf_counter()
    found = call()
    return found, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(queries=10_000, items=10_000, width=128, k=100, sample=10, rounds=3).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    o = parser.parse_args()
    from sklearn.metrics import pairwise_distances
    from rsir_nb.retrieval.distances import make_distance
    rng, chi = np.random.default_rng(0), make_distance("chi2")
    xq, x = (chi.prepare(np.maximum(rng.normal(size=(n, o.width)), 0)) for n in (o.queries, o.items))
    _, compiled = timed(lambda: chi.nearest(xq[:1], x, o.k))
    times = []
    for _ in range(o.rounds):
        (dists, rows), seconds = timed(lambda: chi.nearest(xq, x, o.k))
        times.append(seconds)
    search, few = min(times), xq[:o.sample].astype(np.float64)
    table, slow = timed(lambda: pairwise_distances(few, x.astype(np.float64), metric=chi_square))
    _, bare = timed(lambda: [[chi_square(u, v) for v in x] for u in few])
    slow, bare = (s*o.queries/o.sample for s in (slow, bare))
    found = np.stack([np.sort(table, 1)[:, :o.k], np.take_along_axis(table, rows[:o.sample], 1)])
    apart = np.abs(dists[:o.sample]/found - 1).max()
    assert apart < 1e-6, apart
    threads = os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))
    print(f"top {o.k} of {o.queries:,} queries among {o.items:,} features of width {o.width}, {threads} "
          f"threads; compiling, once: {compiled:.1f} s\n")
    print("| way | seconds | times as long |\n|---|---|---|")
    for name, seconds in {"ours, distances and order": search, "a callable, distances alone": bare,
                          "a callable through scikit-learn, distances alone": slow}.items():
        print(f"| {name} | {seconds:,.2f} | {seconds/search:,.0f} |")
    print(f"\nlargest relative difference of {o.sample*o.k:,} distances: {apart:.1e}")


if __name__ == "__main__": main()
