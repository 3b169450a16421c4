"""Claim: exact Hamming search is faster than faiss `IndexBinaryFlat`, with identical distances.

Both search the same codes with the same number of threads, taking turns, so that whatever else the machine
does meets both. Printed are the medians and the median of the ratios, one row a setting; the distances are
compared in every call.

    python benchmarks/hamming.py      # 1M codes of 128 bits, k 100, batches of 128 and single queries
    python benchmarks/hamming.py --n 200000 --bits 64,128,256 --k 10,100,1000 --threads 1,2
"""
import argparse
import itertools
import os
import platform
import time

import numpy as np


def whole_numbers(text): return [int(o) for o in text.split(",")]


def parse():
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep_lines)
    parser.add_argument("--n", type=whole_numbers, default=[1_000_000], help="codes in the archive")
    parser.add_argument("--bits", type=whole_numbers, default=[128], help="bits of a code")
    parser.add_argument("--k", type=whole_numbers, default=[100], help="results a query")
    parser.add_argument("--batch", type=whole_numbers, default=[128, 1], help="queries a call")
    parser.add_argument("--threads", type=whole_numbers, default=[min(2, os.cpu_count())])
    parser.add_argument("--repeats", type=int, default=9, help="calls with a batch; tenfold for one")
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


def timed(call):
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def compare(ours, peer, xq, batch, k, repeats):
    "Seconds a call of both, in turns, and whether the distances are equal."
    times, equal = [], True
    ours.search(xq[:batch], k)
    for i in range(repeats if batch > 1 else 10*repeats):
        x = xq[[i % len(xq)]] if batch == 1 else xq[:batch]
        t_peer, (d_peer, _) = timed(lambda x=x: peer.search(x, k))
        t_ours, (d_ours, _) = timed(lambda x=x: ours.search(x, k))
        equal &= np.array_equal(d_peer, d_ours)
        times.append((t_ours, t_peer))
    return np.array(times), equal


def main():
    args = parse()
    os.environ["OMP_WAIT_POLICY"] = "passive"   # before faiss is loaded: its threads do not spin in our turns
    import faiss
    import numba
    from rsir_nb.retrieval.hamming import HammingIndex
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
          f"numpy {np.__version__}, numba {numba.__version__}, faiss {faiss.__version__}\n")
    columns = "codes bits k batch threads ours,_ms faiss,_ms ratio comparisons/s same_distances".split()
    print(f"| {' | '.join(columns).replace('_', ' ')} |\n{'|---'*len(columns)}|")
    rng = np.random.default_rng(0)
    for n, n_bits in itertools.product(args.n, args.bits):
        codes, xq = make_codes(n, n_bits, args.clustered, rng)
        peer, ours = faiss.IndexBinaryFlat(n_bits), HammingIndex(n_bits=n_bits)
        peer.add(codes)
        ours.add(codes)
        for threads, k, batch in itertools.product(args.threads, args.k, args.batch):
            faiss.omp_set_num_threads(threads)
            ours.threads = threads
            times, equal = compare(ours, peer, xq, batch, k, args.repeats)
            mine, theirs = np.median(times, axis=0)
            cells = (f"{n:,}", n_bits, k, batch, threads, f"{mine*1e3:.2f}", f"{theirs*1e3:.2f}",
                     f"{np.median(times[:, 1]/times[:, 0]):.2f}", f"{n*batch/mine/1e9:.2f} G", "yes")
            if not equal: raise SystemExit(f"the distances differ: {cells[:5]}")
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
