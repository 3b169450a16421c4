"""Claim: exact Hamming search is several times faster than faiss `IndexBinaryFlat`, with identical distances.

All search the same codes with the same number of threads. They take turns of several calls each, so that
whatever else the machine does meets all of them, and each finds the caches as it left them; the first call
of a turn does not count. Printed are medians over all calls. NumPy answers two queries a call and is scaled
up. The limit is what the machine allows: the lower of the path's own loop on codes in the nearest cache, with
nothing done with its answers, times the threads, and, for single queries, of reading as many bytes as the
codes have (batches read them once a group).

`--path` chooses the loop (see page retrieval.paths); by default it is the best of this processor. faiss uses
its own kernels for the same instructions, or those of `--faiss`. `--clock cpu`, for one thread on a machine
that is shared, counts the processor's seconds instead of those on the wall.

    python benchmarks/hamming.py      # the whole table: about a quarter of an hour
    python benchmarks/hamming.py --n 1000000 --bits 128 --k 100 --threads 1,2
    python benchmarks/hamming.py --n 1000000 --k 100 --path avx2
"""
import argparse
import itertools
import os
import platform
import time
from functools import partial

import numpy as np

COLUMNS = ("codes", "bits", "k", "batch", "threads", "ours, ms", "faiss, ms", "x faiss", "x usearch",
           "x NumPy", "10⁹ comparisons/s", "of the limit", "same distances")


def whole_numbers(text): return [int(o) for o in text.split(",")]


def parse():
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep_lines)
    parser.add_argument("--n", type=whole_numbers, default=[200_000, 1_000_000, 10_000_000], help="codes")
    parser.add_argument("--bits", type=whole_numbers, default=[64, 128, 256], help="bits of a code")
    parser.add_argument("--k", type=whole_numbers, default=[10, 100, 1000], help="results a query")
    parser.add_argument("--batch", type=whole_numbers, default=[128, 1], help="queries a call")
    parser.add_argument("--threads", type=whole_numbers, default=[min(2, os.cpu_count())])
    parser.add_argument("--turns", type=int, default=5, help="turns of each")
    parser.add_argument("--peers", default="faiss,usearch,numpy", help="faiss is always there")
    parser.add_argument("--path", help="loop of our side, e.g. avx2; the best of this processor by default")
    parser.add_argument("--faiss", help="faiss' level, e.g. AVX2; by default that of the path")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--clustered", action="store_true", help="codes in 1000 groups, with many ties")
    return parser.parse_args()


def make_codes(n, n_bits, clustered, rng):
    "An archive and 128 queries from the same distribution."
    codes = rng.integers(0, 256, (n + 128, n_bits//8), dtype=np.uint8)
    if clustered:
        centres = codes[rng.integers(0, 1000, n + 128)]
        for i in range(0, n + 128, 100_000):
            codes[i:i+100_000] = centres[i:i+100_000] ^ np.packbits(
                rng.random((len(codes[i:i+100_000]), n_bits)) < 0.1, axis=1)
    return codes[:n], codes[n:]


CLOCKS = dict(wall=time.perf_counter, cpu=time.process_time)
LEVELS = dict(avx512="AVX512_VPOPCNT", avx2="AVX2", neon="ARM_NEON", portable="NONE")
clock = CLOCKS["wall"]


def seconds(call):
    start = clock()
    found = call()
    return clock() - start, found


def numpy_search(codes, xq, k):
    "Two of the queries by the definition, as one would write it; the time of all of them is scaled."
    for q in xq[:2]:
        d = np.bitwise_count(codes ^ q).sum(1)
        near = np.argpartition(d, k)[:k]
        near[np.argsort(d[near], kind="stable")]


def usearch_search(codes, xq, k, threads):
    from usearch.index import MetricKind, search
    return search(codes, xq, k, MetricKind.Hamming, exact=True, threads=threads).distances


def make_limits(path):
    "(bare comparisons of `n_words` words a second and core, bytes read a second)."
    import numba
    from rsir_nb.retrieval import paths

    @numba.njit(nogil=True)
    def read(words):
        total = np.uint64(0)
        for i in range(len(words)): total ^= words[i]
        return total

    def compare(n_words, by_byte):
        "The best of some tries: a limit is what is possible."
        answer, target = paths.make_answer(n_words, path, by_byte), paths.make_target(path)
        together, n_bytes = (2, paths.PLANES[path]*n_words) if by_byte else (1, 1)
        n = max(1, 1024//n_words//paths.GROUP)*paths.GROUP

        @numba.njit(nogil=True)
        def bare(words, planes, asked, repeats, near, masks):
            target()
            some = np.uint64(0)
            for r in range(repeats):
                for p in range(0, n, paths.GROUP):
                    some += answer(words, p*n_bytes, planes, asked, r & 31, near, near, masks, p//paths.GROUP)
            return some
        rng = np.random.default_rng(0)
        words = rng.integers(0, 2**63, paths.BLOCK*n_words).astype(np.uint64)
        asked = paths.to_asked(rng.integers(0, 2**63, (64, n_words)).astype(np.uint64), path, by_byte)
        planes = rng.integers(0, 16, n*n_bytes + 64).astype(np.uint8)
        planes = planes[-planes.ctypes.data % 64:]
        args = words, planes, asked, 10_000, np.uint64(1), np.zeros(2*paths.SECOND, np.uint64)
        return n*together*10_000/min([seconds(lambda: bare(*args))[0] for _ in range(8)][1:])

    def reading(n_bytes, threads):
        from concurrent.futures import ThreadPoolExecutor
        parts = np.array_split(np.ones(n_bytes//8, np.uint64), threads)
        with ThreadPoolExecutor(threads) as pool:
            return n_bytes/min(seconds(lambda: list(pool.map(read, parts)))[0] for _ in range(12))
    return compare, reading


def take_turns(calls, turns, n_calls):
    "Median seconds of each, and what each found last."
    times, found = {o: [] for o in calls}, {}
    for _ in range(turns):
        for name, call in calls.items():
            for i in range(n_calls):
                t, found[name] = seconds(call)
                if i or n_calls == 1: times[name].append(t)
    return {o: np.median(t) for o, t in times.items()}, found


def measure(args, codes, xq, ours, peer, k, batch, threads):
    "Medians of all searchers for one setting."
    import faiss
    faiss.omp_set_num_threads(threads)
    ours.threads, x = threads, xq[:batch]
    ours.search(x, k)
    n_calls = 2 if batch > 1 and len(codes) > 2e6 else 4 if batch > 1 else 9
    calls = dict(ours=partial(ours.search, x, k), faiss=partial(peer.search, x, k))
    t, found = take_turns(calls, args.turns, n_calls)
    same = np.array_equal(found["ours"][0], found["faiss"][0])
    slow, few = {}, x[:4] if len(codes)*batch > 2e7 else x
    if "usearch" in args.peers: slow["usearch"] = partial(usearch_search, codes, few, k, threads)
    if "numpy" in args.peers: slow["numpy"] = partial(numpy_search, codes, x, k)
    if slow:
        more, answers = take_turns(slow, 1, 2)
        if "numpy" in more: more["numpy"] *= batch/len(x[:2])
        if "usearch" in answers:
            more["usearch"] *= batch/len(few)
            same &= np.array_equal(np.reshape(answers["usearch"], (len(few), k)), found["ours"][0][:len(few)])
        t |= more
    return t, same


def main():
    args = parse()
    os.environ["OMP_WAIT_POLICY"] = "passive"   # before faiss is loaded: its threads do not spin in our turns
    import faiss
    import numba
    import usearch
    from rsir_nb.core import InputError
    from rsir_nb.machine import cpu_features
    from rsir_nb.retrieval.hamming import HammingIndex
    from rsir_nb.retrieval.kernels import goes_by_byte
    global clock
    clock = CLOCKS[args.clock]
    try: path = HammingIndex(scan=args.path or "compiled").path
    except (InputError, KeyError) as e: raise SystemExit(str(e)) from None
    level = args.faiss or LEVELS[path]
    if hasattr(faiss, "SIMDConfig"): faiss.SIMDConfig.set_level(faiss.to_simd_level(level))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
          f"numpy {np.__version__}, numba {numba.__version__}, faiss {faiss.__version__}, "
          f"usearch {usearch.__version__}")
    print(f"features: {' '.join(cpu_features()) or 'none'}; path: {path}; faiss: "
          + (faiss.SIMDConfig.get_level_name() if hasattr(faiss, "SIMDConfig") else "its own choice"))
    compare, reading = make_limits(path)
    def by_byte(bits, batch): return goes_by_byte(-(-bits//64), path, batch)
    bare = {(bits, way): compare(-(-bits//64), way)
            for bits in args.bits for way in sorted({by_byte(bits, o) for o in args.batch})}
    print("bare loop, 10⁹ comparisons a second and core: "
          + ", ".join(f"{bits} bits{' by byte' if way else ''} {o/1e9:.1f}"
                      for (bits, way), o in bare.items()))
    print()
    print(f"| {' | '.join(COLUMNS)} |\n{'|---'*len(COLUMNS)}|")
    rng = np.random.default_rng(0)
    for n, n_bits in itertools.product(args.n, args.bits):
        codes, xq = make_codes(n, n_bits, args.clustered, rng)
        peer, ours = faiss.IndexBinaryFlat(n_bits), HammingIndex(n_bits=n_bits, scan=path)
        peer.add(codes)
        ours.add(codes)
        for threads in args.threads:
            bandwidth = reading(codes.nbytes, threads)
            for k, batch in itertools.product(args.k, args.batch):
                t, same = measure(args, codes, xq, ours, peer, k, batch, threads)
                speed = n*batch/t["ours"]
                limit = bare[n_bits, by_byte(n_bits, batch)]*threads
                if batch == 1: limit = min(limit, bandwidth/(n_bits/8))
                times = [f"{t[o]/t['ours']:.1f}" if o in t else "" for o in ("usearch", "numpy")]
                cells = (f"{n:,}", n_bits, k, batch, threads, f"{t['ours']*1e3:.2f}", f"{t['faiss']*1e3:.2f}",
                         f"{t['faiss']/t['ours']:.2f}", *times, f"{speed/1e9:.2f}", f"{speed/limit:.2f}",
                         "yes" if same else "NO")
                print(f"| {' | '.join(map(str, cells))} |", flush=True)
                if not same: raise SystemExit("the distances differ")


if __name__ == "__main__":
    main()
