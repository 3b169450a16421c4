"""Claim: metric learning finds more images of the query's class than hand-made features, on unseen images.

A seed splits every class into images to learn from and images to search. Each method trains from scratch by
its own config, and every image of the second part is a query to the others of that part. The floor is the
deciles of each band. Recipes are chosen with --tune: the images to learn from are split once more, and the
images of the test are not looked at.

    python benchmarks/metric_learning.py --keep DIR                       # all methods, three seeds
    python benchmarks/metric_learning.py --methods margin --tune --set optim.lr=1e-3 --keep DIR
"""
import argparse
import json
from pathlib import Path

import numpy as np
import torch
from rsir_nb.config import load_config
from rsir_nb.core import make_rng, read_json
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
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    parser.add_argument("--part", type=float, default=0.75, help="part of each class to learn from")
    parser.add_argument("--set", nargs="+", default=[], help="changes of the config, key=value")
    parser.add_argument("--tune", action="store_true", help="score on a fifth of the images to learn from")
    parser.add_argument("--keep", type=Path, required=True, help="folder for stores, runs and scores")
    return parser.parse_args()


def split_store(args, seed):
    "The images in a store, split by class with `seed`; `tune` does not touch the images of the test."
    path = args.keep/f"store_{args.size}_{seed}{'_tune'*args.tune}"
    if (path/"data.mdb").exists(): return path
    archive = ClassFolders(args.root)
    split = np.full(len(archive), "unused" if args.tune else "test", object)
    for c in np.unique(archive.targets):
        rows = make_rng(seed, "split", int(c)).permutation(np.flatnonzero(archive.targets == c))
        known = rows[:round(args.part*len(rows))]
        split[known] = "train"
        if args.tune: split[known[:len(known)//5]] = "test"
    archive.table["split"] = split
    write_store(archive, path, size=args.size, progress=False)
    return path


def run_one(name, seed, args):
    "Train one method and score it on the images that it has not seen."
    changed = "_".join(["", *args.set]).replace("/", "-")
    home = args.keep/f"{name}_{args.size}_{seed}{'_tune'*args.tune}{changed}"
    if (home/"scores.json").is_file(): return json.loads((home/"scores.json").read_text())
    store, trained = split_store(args, seed), name != "band_quantiles"
    changes = args.set if trained else [f"method={name}"]
    cfg = load_config(name if trained else "base",
                      ["data=store", f"data.path={store}", f"seed={seed}", f"out={home}", *changes])
    run = pretrain(cfg, progress=False)
    method, test = load_method(run), build_archive(cfg.data).split("test")
    rows = np.array_split(np.arange(len(test)), 50)
    z = [method.embed(torch.stack([test[i]["rgb"] for i in block]), "rgb").numpy() for block in rows]
    found = score_embeddings(dict(rgb=np.concatenate(z)), test, METRICS, method.distance)
    scores = {k: v for k, v in found.items() if "/" not in k}
    scores |= dict(seconds=read_json(run/"finished.json")["seconds"], n_test=len(test))
    (home/"scores.json").write_text(json.dumps(scores))
    return scores


def main():
    args = parse()
    args.keep.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for name in args.methods: print(name, seed, run_one(name, seed, args), flush=True)


if __name__ == "__main__": main()
