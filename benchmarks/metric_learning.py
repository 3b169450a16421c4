"""Claim: metric learning finds more images of the query's class than hand-made features, on unseen images.

A seed splits every class into images to learn from and images to search. Each method trains from scratch by
its own config, and every image of the second part is a query to the others of that part. The floor is the
deciles of each band.

    python benchmarks/metric_learning.py --keep DIR                       # all methods, one seed
    python benchmarks/metric_learning.py --methods margin diva --seeds 0 1 2 --epochs 20 --keep DIR
"""
import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from rsir_nb.config import load_config
from rsir_nb.core import make_rng
from rsir_nb.data.folders import ClassFolders
from rsir_nb.data.store import write_store
from rsir_nb.engine.parts import build_archive, load_method
from rsir_nb.engine.train import pretrain
from rsir_nb.metrics.named import score_embeddings

METHODS = "band_quantiles", "margin", "diva", "divide_conquer", "bier", "sndl"
METRICS = "precision@1", "precision@10", "map", "nmi"


def parse():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[2]/"shared"/"data"/"eurosat_rgb"
    parser.add_argument("--root", type=Path, default=default, help="a folder per class")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    parser.add_argument("--part", type=float, default=0.6, help="part of each class to learn from")
    parser.add_argument("--keep", type=Path, required=True, help="folder for stores, runs and scores")
    return parser.parse_args()


def split_store(root, part, size, seed, path):
    "The images of `root` in a store, split by class with `seed`."
    if (path/"data.mdb").exists(): return path
    archive = ClassFolders(root)
    split = np.full(len(archive), "test", object)
    for c in np.unique(archive.targets):
        rows = make_rng(seed, "split", int(c)).permutation(np.flatnonzero(archive.targets == c))
        split[rows[:round(part*len(rows))]] = "train"
    archive.table["split"] = split
    write_store(archive, path, size=size, progress=False)
    return path


def run_one(name, seed, args):
    "Train one method and score it on the images that it has not seen."
    home = args.keep/f"{name}_{args.size}_{args.epochs}_{seed}"
    if (home/"scores.json").is_file(): return json.loads((home/"scores.json").read_text())
    store = split_store(args.root, args.part, args.size, seed, args.keep/f"store_{args.size}_{seed}")
    trained = name != "band_quantiles"
    changes = [f"optim.epochs={args.epochs}"] if trained else [f"method={name}"]
    changes += ["data=store", f"data.path={store}", f"seed={seed}", f"out={home}"]
    cfg = load_config(name if trained else "base", changes)
    start = time.process_time()
    method = load_method(pretrain(cfg, progress=False))
    seconds, test = time.process_time() - start, build_archive(cfg.data).split("test")
    blocks = np.array_split(np.arange(len(test)), 50)
    embed = lambda rows: method.embed(torch.stack([test[i]["rgb"] for i in rows]), "rgb").numpy()
    z = np.concatenate([embed(rows) for rows in blocks])
    found = score_embeddings(dict(rgb=z), test, METRICS, method.distance)
    scores = {k: v for k, v in found.items() if "/" not in k}
    scores |= dict(seconds=round(seconds), n_test=len(test))
    (home/"scores.json").write_text(json.dumps(scores))
    return scores


def main():
    args = parse()
    args.keep.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for name in args.methods: print(name, seed, run_one(name, seed, args), flush=True)


if __name__ == "__main__": main()
