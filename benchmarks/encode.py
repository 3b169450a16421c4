"""Claim: an archive is encoded in batches faster than patch by patch, from patch store to codes on disk.

The peer is the plain loop that anybody would write first: read a patch from the same store, embed it, hash
it, pack it, for each sensor, and save the arrays at the end. Both use the same weights, store and threads
and take turns; the codes are compared. A patch is a Sentinel-1 and a Sentinel-2 image; both are encoded.

    python benchmarks/encode.py                                  # demo-sized network on the simulated archive
    python benchmarks/encode.py --sizes demo,vitb --patches 96 --workers 0,2 --precision 32,bf16-mixed
    python benchmarks/encode.py --sizes vitb --device cuda --patches 4096 --batch 256 --workers 0,8
"""
import argparse
import itertools
import os
import platform
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rsir_nb.config import load_config, to_dict
from rsir_nb.core import METHODS
from rsir_nb.data.store import PatchStore, write_store
from rsir_nb.simulate.synthetic import SyntheticArchive
from rsir_nb.engine.encode import encode
from rsir_nb.methods.hashing import HashHeads
from rsir_nb.retrieval.codes import binarise, pack_bits

CONFIGS = dict(demo="demo", vitb="csmae_sesd")


def parse():
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep_lines)
    words = lambda text: text.split(",")
    parser.add_argument("--sizes", type=words, default=["demo"], help=f"of {', '.join(CONFIGS)}")
    parser.add_argument("--patches", type=int, default=256, help="in the archive, a multiple of 8")
    parser.add_argument("--workers", type=words, default=["0", "2"], help="processes that read patches")
    parser.add_argument("--precision", type=words, default=["32", "bf16-mixed"])
    parser.add_argument("--batch", type=int, default=64, help="patches at once")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def make_method(size, sensors):
    "A network of the published shape with hash heads; speed does not ask for trained weights."
    settings = to_dict(load_config(CONFIGS[size], ["data=synthetic"]).method)
    settings.update(decoder=None)
    method = METHODS.create(settings.pop("name"), sensors=sensors, img_size=120, **settings)
    method.heads = HashHeads({m: method.embed_dim for m in sensors}, n_bits=128)
    return method.eval()


def plain_loop(method, archive, path, device):
    "Patch by patch; returns the codes by sensor."
    method.to(device)
    codes, embeddings = ({m: [] for m in archive.sensors} for _ in range(2))
    with torch.no_grad():
        for i in range(len(archive)):
            patch = archive[i]
            for m in archive.sensors:
                z = method.embed(patch[m][None], m)
                embeddings[m].append(z.cpu().numpy().astype(np.float16))
                codes[m].append(pack_bits(binarise(method.hash(z, m))))
    for name, parts in dict(codes=codes, embeddings=embeddings).items():
        np.savez(f"{path}_{name}.npz", **{m: np.concatenate(o) for m, o in parts.items()})
    return {m: np.concatenate(o) for m, o in codes.items()}


def rate(n, call):
    "Patches a second, and what `call` returned."
    start = time.perf_counter()
    found = call()
    return n/(time.perf_counter() - start), found


def equal_bits(a, b): return 1 - np.mean([np.bitwise_count(a[m] ^ b[m]).mean()/8 for m in a])


def compare(args, size, store, folder):
    "One row a setting, each beside a plain loop in the same turn."
    method, n = make_method(size, store.sensors), len(store)
    for workers, precision in itertools.product(map(int, args.workers), args.precision):
        rates = []
        for turn in range(args.repeats):
            plain, loop_codes = rate(n, partial(plain_loop, method, store, folder/"plain", args.device))
            path = folder/f"{size}_{workers}_{precision}_{turn}"
            ours, found = rate(n, partial(encode, method, store, path, args.batch, workers, precision,
                                          device=args.device, progress=False))
            rates.append((plain, ours))
        mine, theirs = np.median([o[1] for o in rates]), np.median([o[0] for o in rates])
        ratio, same = np.median([b/a for a, b in rates]), equal_bits(found.codes, loop_codes)
        cells = size, workers, precision, f"{theirs:.1f}", f"{mine:.1f}", f"{ratio:.2f}", f"{100*same:.2f} %"
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


def main():
    args = parse()
    archive = SyntheticArchive(n_places=args.patches//8, patches_per_place=8)
    with tempfile.TemporaryDirectory() as folder:
        write_store(archive, f"{folder}/patches.store", progress=False)
        store = PatchStore(f"{folder}/patches.store")
        threads = f"{torch.get_num_threads()} threads"
        where = torch.cuda.get_device_name() if args.device == "cuda" else threads
        print(f"{len(store)} patches of {' and '.join(store.sensors)}, batches of {args.batch}; {where}; "
              f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}\n")
        columns = "network", "workers", "precision", "loop, a second", "ours, a second", "ratio", "same bits"
        print(f"| {' | '.join(columns)} |\n{'|---'*len(columns)}|")
        for size in args.sizes: compare(args, size, store, Path(folder))


if __name__ == "__main__":
    main()
