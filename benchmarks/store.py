"""Claim: reading a patch from the store is 20 times as fast as decoding a published BigEarthNet v1 record.

Three ways to the same patch take turns on one thread, each from an open LMDB to two float32 tensors (ten
bands of Sentinel-2 and two of Sentinel-1 on a grid of 120 x 120):

- the published recipe, written out below: unpickle the record (with pickle's own C machinery, and a
  find_class that allows only the ten known names), make each band float32, resample it to 120 x 120 (bicubic,
  corners aligned), stack them, swap height and width as the published loaders do;
- the package's own reader of these records, which takes no pickle at its word and runs none of it;
- the package's store, which was converted from the records once.

That all three give the same patch is checked first.

    python benchmarks/store.py ../shared/data/configilm_ben_lmdb/BENv1/BigEarthNetEncoded.lmdb
"""
import argparse
import io
import os
import pickle
import platform
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F
from rsir_nb.core import DATASETS
from rsir_nb.data.lmdb import LmdbReader
from rsir_nb.data.records import BAND_CLASSES, NUMPY_NAMES, PATCH_CLASSES
from rsir_nb.data.store import PatchStore, write_store

S1, S2 = ["VH", "VV"], ["02", "03", "04", "08", "05", "06", "07", "11", "12", "8A"]


def parse():
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep_lines)
    parser.add_argument("path", help="a BigEarthNet v1 LMDB")
    parser.add_argument("--patches", type=int, default=200, help="patches read in a round")
    parser.add_argument("--repeats", type=int, default=9, help="rounds")
    return parser.parse_args()


class Stub:
    "An object of the publisher's: its attributes, without its package. A band keeps them one level deeper."
    def __setstate__(self, state): self.__dict__.update(state.get("__dict__", state))


class Unpickler(pickle.Unpickler):
    "Pickle's own machinery, allowed the ten names that a record needs."
    def find_class(self, module, name):
        full = f"{module}.{name}"
        if full in PATCH_CLASSES | BAND_CLASSES: return Stub
        if full in NUMPY_NAMES: return super().find_class(module, name)
        raise pickle.UnpicklingError(full)


class PublishedRecipe:
    "What the published loaders do for a patch, up to the augmentation."
    def __init__(self, path):
        self.reader = LmdbReader(path)
        self.ids = sorted(o.decode() for o in self.reader.keys())

    def __getitem__(self, i):
        record = self.reader.get(self.ids[i].encode())
        patch = Unpickler(io.BytesIO(record)).load()
        bands = [getattr(part, f"band{o}")
                 for part, names in ((patch.s2_patch, S2), (patch.s1_patch, S1)) for o in names]
        grids = [F.interpolate(torch.tensor(np.float32(o.data))[None, None], (120, 120), mode="bicubic",
                               align_corners=True)[0, 0] for o in bands]
        x = torch.stack(grids).transpose(1, 2).contiguous()
        return dict(s2=x[:len(S2)], s1=x[len(S2):])


def seconds_a_patch(archive, order):
    start = time.perf_counter()
    for i in order: archive[i]
    return (time.perf_counter() - start)/len(order)


def check_same(recipe, records, store):
    "All three give one patch, up to the rounding of floats and, for the store, of its compact numbers."
    for i, name in enumerate(recipe.ids):
        for m in "s1", "s2":
            bands = [o if o.isalpha() else f"B{o}" for o in (S1 if m == "s1" else S2)]
            x = recipe[i][m].transpose(1, 2)[[bands.index(o) for o in records.sensors[m].bands]]
            for other, slack in (records, 1e-3), (store, 1.0 if m == "s2" else 0.05):
                gap = (other[name][m] - x).abs().max().item()
                if gap > slack: raise SystemExit(f"{name} {m}: the ways differ by {gap}")


def main():
    args = parse()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        recipe, records = PublishedRecipe(args.path), DATASETS.create("ben_v1_lmdb", path=args.path)
        write_store(records, f"{folder}/patches.store", progress=False)
        store = PatchStore(f"{folder}/patches.store")
        check_same(recipe, records, store)
        ways = {"published recipe": recipe, "our reader of records": records, "our store": store}
        orders = {k: [i % len(o.ids) for i in range(args.patches)] for k, o in ways.items()}
        turns = [[seconds_a_patch(o, orders[k]) for k, o in ways.items()] for _ in range(args.repeats)]
    times = np.array(turns)*1e3
    print(f"{len(store)} patches, {args.patches} reads in each of {args.repeats} rounds; one thread of "
          f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}\n")
    print("| way to a patch | ms | the store is faster by |\n|---|---|---|")
    for k, t in zip(ways, times.T, strict=True):
        print(f"| {k} | {np.median(t):.3f} | {np.median(t/times[:, -1]):.1f} |")


if __name__ == "__main__":
    main()
