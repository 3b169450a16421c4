"""Claim: reading a patch from the store is 20 times as fast as decoding a published BigEarthNet v1 record.

The peer is the package's own reader of v1 records (restricted unpickling, ten bands brought to one grid with
the published bicubic resampling), on one thread like the store. The published decoder makes a valid object
of every band as well; 2.1 ms a patch were measured for it on one core elsewhere, and it is not run here.

    python benchmarks/store.py ../shared/data/configilm_ben_lmdb/BENv1/BigEarthNetEncoded.lmdb
"""
import argparse
import os
import platform
import tempfile
import time

import numpy as np
import torch
from rsir_nb.core import DATASETS
from rsir_nb.data.store import PatchStore, write_store


def parse():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="a BigEarthNet v1 LMDB")
    parser.add_argument("--patches", type=int, default=200, help="patches read in a round")
    parser.add_argument("--repeats", type=int, default=9, help="rounds")
    return parser.parse_args()


def seconds_a_patch(archive, n):
    start = time.perf_counter()
    for i in range(n): archive[i % len(archive)]
    return (time.perf_counter() - start)/n


def main():
    args = parse()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        records = DATASETS.create("ben_v1_lmdb", path=args.path)
        write_store(records, f"{folder}/patches.store", progress=False)
        store = PatchStore(f"{folder}/patches.store")
        both = lambda: [seconds_a_patch(o, args.patches) for o in (records, store)]
        times = np.array([both() for _ in range(args.repeats)])
    slow, fast = np.median(times, axis=0)*1e3
    print(f"{len(store)} patches of {', '.join(store.sensors)}; one thread of {os.cpu_count()} cores, "
          f"{platform.machine()}, torch {torch.__version__}\n")
    print("| v1 record, ms | store, ms | ratio |\n|---|---|---|")
    print(f"| {slow:.2f} | {fast:.3f} | {np.median(times[:, 0]/times[:, 1]):.1f} |")


if __name__ == "__main__":
    main()
