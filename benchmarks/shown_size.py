"""At which size the network that ships should see images: chosen on EuroSAT's validation images and on ports.

    python benchmarks/shown_size.py                          # validation images and ports, five sizes
    python benchmarks/shown_size.py --test --sizes 128 160   # scores on the images that nothing saw

EuroSAT's images have 64 pixels, the vessel patches of ports 128 and four bands. P@10 by floats and codes; a
query's own port does not answer. Images a second are those of the threads at hand. The parts of EuroSAT are
those of `adapt_weights.py`, and its test is not looked at when the size is chosen.
"""
import argparse
import time
from pathlib import Path

import pandas as pd
import torch
from adapt_weights import SETTINGS, score, splits
from rsir_nb.core import DATASETS, METHODS
from rsir_nb.data.folders import ClassFolders
from torch.nn import functional as F


def embed(archive, x, size, bits=128):
    "Floats (N,D), codes as -1 and 1 (N,bits), seconds for the floats."
    method = METHODS.create("pretrained", sensors=archive.sensors, size=size, bits=bits).fit(archive).eval()
    m, start = next(iter(archive.sensors)), time.perf_counter()
    z = method.embed(x, m)
    took = time.perf_counter() - start
    return z, {b: signs(archive, size, b, z, m) for b in (64, 128)}, took


def signs(archive, size, bits, z, m):
    head = METHODS.create("pretrained", sensors=archive.sensors, size=size, bits=bits).fit(archive).eval()
    return (head.hash(z, m) > 0).float()*2 - 1


def precision(z, right, shut=None, k=10):
    "P@k of every row of `z` (N,D) among the others; `right` and `shut` are (N,N)."
    near = F.normalize(z) @ F.normalize(z).T
    near.fill_diagonal_(-9)
    found = (near if shut is None else near.masked_fill(shut, -9)).topk(k).indices
    return right.gather(1, found).float().mean().item()


def header(*names): print("| " + " | ".join(names) + " |\n|" + "---|"*len(names))


def eurosat(root, test):
    "The archive, images (N,3,64,64) of one part of it, their classes."
    archive = ClassFolders(root)
    held, val, _ = splits(len(archive), SETTINGS)
    rows = held if test else val
    images = torch.stack([archive[int(i)]["rgb"] for i in rows])
    return archive, images, torch.as_tensor(archive.targets)[rows]


def choose(o):
    archive, x, kinds = eurosat(o.data/"eurosat_rgb", False)
    ports = DATASETS.create("vessels", root=o.data/"vessels", labels="scene_class")
    y = torch.stack([ports[i]["s2"] for i in range(len(ports))])
    shapes, place = torch.as_tensor(ports.targets), torch.as_tensor(pd.factorize(ports.table["place"])[0])
    print(f"{len(x)} images of EuroSAT, {len(y)} patches of ports, {torch.get_num_threads()} threads\n")
    header("seen at", "EuroSAT, floats", "64 bits", "128 bits", "ports, floats", "images/s")
    for size in o.sizes:
        z, codes, took = embed(archive, x, size)
        w, _, _ = embed(ports, y, size)
        right = kinds[:, None] == kinds
        cells = [precision(v, right) for v in (z, codes[64], codes[128])]
        cells += [precision(w, shapes[:, None] == shapes, place[:, None] == place)]
        print(f"| {size} | " + " | ".join(f"{v:.3f}" for v in cells) + f" | {len(x)/took:.0f} |", flush=True)


def test(o):
    archive, x, kinds = eurosat(o.data/"eurosat_rgb", True)
    print(f"{len(x)} images that nothing saw\n")
    header("seen at", "vectors", "P@1", "P@10", "mAP")
    for size in o.sizes:
        z, codes, _ = embed(archive, x, size)
        rows = {f"{b} bits": score(c, kinds, centred=False) for b, c in codes.items()}
        rows = {"floats": score(z, kinds), **rows}
        for name, found in rows.items():
            print(f"| {size} | {name} | " + " | ".join(f"{v:.3f}" for v in found) + " |", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2]/"shared"/"data")
    p.add_argument("--sizes", type=int, nargs="+", default=[96, 128, 160, 192, 224])
    p.add_argument("--test", action="store_true", help="score the images of the test")
    o = p.parse_args()
    (test if o.test else choose)(o)


if __name__ == "__main__": main()
