"""Claim: tables of substrings answer small radii, and few neighbours of clustered codes, faster than a scan.

Every row compares the results of `HammingIndex` (scan), `MultiIndex(tables=True)` (tables) and
`MultiIndex(tables='auto')`, which must be equal, ties included. The three take turns, after one call each
(in which `auto` learns how far the k nearest are); printed are medians in ms a query, and how many queries
of the last call `auto` left to the tables, scanned, or gave up on the way.
Rows in which the tables alone would take minutes are cut off by `--patience` and say so. Then the
near-duplicates of a whole archive, against faiss `IndexBinaryFlat.range_search` in blocks.

    python benchmarks/multi.py                                  # 200,000 and a million codes
    python benchmarks/multi.py --n 200000 --bits 128 --k 10 --radius 0,4,16
    python benchmarks/multi.py --codes codes.npy                # packed codes of your own, (N, n_bits/8)
"""
import argparse
import os
import platform
import time

import numpy as np


def whole_numbers(text): return [int(o) for o in text.split(",") if o]


def parse():
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep_lines)
    parser.add_argument("--n", type=whole_numbers, default=[200_000, 1_000_000], help="codes in the archive")
    parser.add_argument("--bits", type=whole_numbers, default=[64, 128, 256], help="bits of a code")
    parser.add_argument("--radius", type=whole_numbers, default=[0, 2, 4, 8, 16], help="radii, bits")
    parser.add_argument("--k", type=whole_numbers, default=[1, 10, 100], help="results of searches")
    parser.add_argument("--kind", default="even,clustered", help="spread evenly, or in groups of 200")
    parser.add_argument("--flips", type=float, default=0.06, help="share of bits that differ from the centre")
    parser.add_argument("--codes", help="an .npy file of packed codes to measure instead")
    parser.add_argument("--batch", type=int, default=64, help="queries a call")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="calls of each")
    parser.add_argument("--patience", type=float, default=50., help="times the scan that tables may take")
    parser.add_argument("--join", type=int, default=200_000, help="codes in the self-join; 0 leaves it out")
    parser.add_argument("--join-radius", type=whole_numbers, default=[0, 2, 4, 8])
    return parser.parse_args()


def make_codes(n, n_bits, kind, flips, rng):
    codes = rng.integers(0, 256, (n, n_bits//8), dtype=np.uint8)
    if kind == "clustered":
        centres, groups = codes[:max(1, n//200)].copy(), rng.integers(0, max(1, n//200), n)
        for i in range(0, n, 100_000):
            part = slice(i, min(i + 100_000, n))
            noise = rng.random((part.stop - i, n_bits), dtype=np.float32) < flips
            codes[part] = centres[groups[part]] ^ np.packbits(noise, axis=1)
    return codes


def archives(args):
    "Name, codes, queries. Queries are of the archive's kind but not in it."
    rng = np.random.default_rng(0)
    if args.codes:
        codes = np.load(args.codes, mmap_mode="r")
        out = np.zeros(len(codes), dtype=bool)
        out[rng.choice(len(codes), args.batch, replace=False)] = True
        yield os.path.basename(args.codes), codes[~out], codes[out]
        return
    for kind in args.kind.split(","):
        for n in args.n:
            for n_bits in args.bits:
                codes = make_codes(n + args.batch, n_bits, kind, args.flips, rng)
                yield kind, codes[:n], codes[n:]


def timed(call):
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def patient_tables(tables, call, patience, scan_seconds, n_queries):
    "Whether the tables alone answer within the patience; asked with one query."
    seconds, _ = timed(lambda: call(tables, 1))
    return seconds*n_queries < patience*max(scan_seconds, 1e-3)


def row(name, ask, indexes, xq, args):
    plain, tables, auto = indexes
    call = lambda ix, n=None: ask(ix, xq[:n])
    scan_seconds, wanted = timed(lambda: call(plain))
    ways = dict(scan=plain, auto=auto)
    call(auto)
    if patient_tables(tables, call, args.patience, scan_seconds, len(xq)): ways["tables"] = tables
    times = {way: [] for way in ways}
    for i in range(args.repeats):
        for way, ix in list(ways.items())[::(-1)**i]:
            seconds, found = timed(lambda ix=ix: call(ix))
            times[way].append(seconds*1e3/len(xq))
            if not all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True)):
                raise SystemExit(f"{way} differs from the scan: {name}")
    ms = {way: np.median(t) for way, t in times.items()}
    plan = auto.last_plan
    took = "/".join(str(plan[o]) for o in ("tables", "scan", "given_up"))
    shown = (f"{ms['tables']:.4f}", f"{ms['scan']/ms['tables']:.2f}") if "tables" in ms else ("over", "below")
    return (*name, f"{ms['scan']:.4f}", *shown, f"{ms['auto']:.4f}", f"{ms['scan']/ms['auto']:.2f}", took)


def print_row(cells): print(f"| {' | '.join(map(str, cells))} |", flush=True)


def head(*columns): print(f"\n| {' | '.join(columns)} |\n{'|---'*len(columns)}|", flush=True)


def searches(args):
    from rsir_nb.retrieval.hamming import HammingIndex
    from rsir_nb.retrieval.multi import MultiIndex
    head("codes", "n", "bits", "question", "scan, ms", "tables, ms", "scan/tables", "auto, ms", "scan/auto",
         "auto: tables/scan/given up")
    built = []
    for kind, codes, xq in archives(args):
        n_bits = codes.shape[1]*8
        indexes = (HammingIndex(n_bits, args.threads, "compiled"),
                   MultiIndex(n_bits, args.threads, True, memory=1e12),
                   MultiIndex(n_bits, args.threads, memory=1e12))
        for ix in indexes: ix.add(codes)
        indexes[1].range_search(xq[:1], 0)                                  # the kernels are compiled once
        seconds, _ = timed(indexes[1].build)
        indexes[2]._buckets = indexes[1]._buckets
        built.append((kind, f"{len(codes):,}", n_bits, f"{seconds:.2f}", f"{codes.nbytes/1e6:.0f}",
                      f"{indexes[1]._buckets.nbytes/1e6:.0f}"))
        questions = {f"radius {r}": lambda ix, x, r=r: ix.range_search(x, r) for r in args.radius}
        questions |= {f"k {k}": lambda ix, x, k=k: ix.search(x, k) for k in args.k}
        for name, ask in questions.items():
            print_row(row((kind, f"{len(codes):,}", n_bits, name), ask, indexes, xq, args))
    head("codes", "n", "bits", "build, s", "codes, MB", "tables, MB")
    for cells in built: print_row(cells)


def faiss_join(codes, radius, block=2048):
    "Pairs by faiss, a block of queries at a time; ids below the query's own are dropped."
    import faiss
    flat, parts = faiss.IndexBinaryFlat(codes.shape[1]*8), []
    flat.add(codes)
    for lo in range(0, len(codes), block):
        lims, dists, at = flat.range_search(codes[lo:lo + block], radius + 1)   # in faiss the edge is outside
        own = lo + np.repeat(np.arange(len(lims) - 1), np.diff(lims).astype(int))
        keep = at > own
        parts.append((own[keep], at[keep], dists[keep].astype(np.int32)))
    first, second, dists = (np.concatenate(o) for o in zip(*parts, strict=True))
    order = np.lexsort((second, first))
    return first[order], second[order], dists[order]


def joins(args):
    import faiss
    from rsir_nb.retrieval.duplicates import near_duplicates
    faiss.omp_set_num_threads(args.threads)
    head("codes", "n", "bits", "radius", "pairs", "faiss, s", "compare all, s", "auto, s", "faiss/auto")
    rng = np.random.default_rng(0)
    for tables in True, False: near_duplicates(make_codes(1000, 128, "even", 0, rng), 1, tables=tables)
    for kind in [os.path.basename(args.codes)] if args.codes else args.kind.split(","):
        if args.codes: codes = np.load(args.codes)[:args.join]
        else: codes = make_codes(args.join, 128, kind, args.flips, rng)
        for radius in args.join_radius:
            options = dict(threads=args.threads, progress=False, limit=10**9)
            auto, pairs = timed(lambda: near_duplicates(codes, radius, **options))       # noqa: B023
            scan, all_pairs = timed(lambda: near_duplicates(codes, radius, tables=False, **options))  # noqa: B023
            peer, theirs = timed(lambda: faiss_join(codes, radius))                      # noqa: B023
            for found in all_pairs, theirs:
                if not all(np.array_equal(a, b) for a, b in zip(pairs, found, strict=True)):
                    raise SystemExit(f"the pairs differ: {kind}, radius {radius}")
            print_row((kind, f"{len(codes):,}", codes.shape[1]*8, radius, f"{len(pairs.first):,}",
                       f"{peer:.2f}", f"{scan:.2f}", f"{auto:.2f}", f"{peer/auto:.1f}"))


def main():
    args = parse()
    os.environ["OMP_WAIT_POLICY"] = "passive"   # before faiss is loaded: its threads do not spin in our turns
    import numba
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
          f"numpy {np.__version__}, numba {numba.__version__}, {args.threads} threads, "
          f"{args.batch} queries a call")
    searches(args)
    if args.join: joins(args)


if __name__ == "__main__":
    main()
