"""Claim: metric learning finds more images of the query's class than hand-made features, on unseen images.

A seed splits every class into images to learn from and images to search. Each method trains from scratch by
its own config, and every image of the second part is a query to the others of that part. The floor is the
deciles of each band. Recipes are chosen with --tune: the images to learn from are split once more, and the
images of the test are not looked at.

    python benchmarks/metric_learning.py --keep DIR                       # all methods, three seeds
    python benchmarks/metric_learning.py --methods margin --tune --set optim.lr=1e-3 --keep DIR
    python benchmarks/metric_learning.py --methods sndl --seeds 0 --bits 64 128 --keep DIR       # codes, too
    python benchmarks/metric_learning.py --unseen --keep DIR \
        --set method.backbone=shipped method.freeze=true trainer.augment=null   # on the network that ships

`--unseen` takes the split of `adapt_weights.py` for every seed: the images that the network that ships has
never seen are the test, those that it was adapted on are learned from.
"""
import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from adapt_weights import SETTINGS, splits
from rsir_nb.config import load_config, to_dict
from rsir_nb.core import content_hash, make_rng, read_json
from rsir_nb.data.folders import ClassFolders
from rsir_nb.data.store import write_store
from rsir_nb.engine.encode import encode_run
from rsir_nb.engine.evaluate import EvaluateConfig
from rsir_nb.engine.hash import train_hash
from rsir_nb.engine.parts import build_archive, load_method
from rsir_nb.engine.sweep import fork_run, score_rows
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
    parser.add_argument("--unseen", action="store_true",
                        help="test on images that the shipped network has not seen")
    parser.add_argument("--bits", type=int, nargs="+", default=[], help="lengths of codes to score as well")
    parser.add_argument("--hash", nargs="+", default=["hash=heads"],
                        help="settings of the hash heads, key=value")
    parser.add_argument("--keep", type=Path, required=True, help="folder for stores, runs and scores")
    return parser.parse_args()


def split_store(args, seed):
    "The images in a store, split by class with `seed`; `tune` does not touch the images of the test."
    path = args.keep/f"store_{args.size}_{'unseen' if args.unseen else seed}{'_tune'*args.tune}"
    if (path/"data.mdb").exists(): return path
    archive = ClassFolders(args.root)
    split = np.full(len(archive), "unused" if args.tune else "test", object)
    if args.unseen:
        test, val, known = splits(len(archive), SETTINGS)
        split[:] = "unused"
        split[(val if args.tune else test).numpy()], split[known.numpy()] = "test", "train"
    for c in [] if args.unseen else np.unique(archive.targets):
        rows = make_rng(seed, "split", int(c)).permutation(np.flatnonzero(archive.targets == c))
        known = rows[:round(args.part*len(rows))]
        split[known] = "train"
        if args.tune: split[known[:len(known)//5]] = "test"
    archive.table["split"] = split
    write_store(archive, path, size=args.size, progress=False)
    return path


def run_folder(name, seed, args):
    changed = "_".join(["", *args.set]).replace("/", "-")
    return args.keep/f"{name}_{args.size}_{seed}{'_tune'*args.tune}{'_unseen'*args.unseen}{changed}"


def train(cfg, home, features):
    "Train; a frozen network's features are taken from an earlier run, and `encode` checks that they fit."
    frozen = cfg.method.get("freeze") or cfg.method.name == "universal"
    if frozen and features.is_dir():
        shutil.copytree(features, home/"features", dirs_exist_ok=True)
    run = pretrain(cfg, progress=False)
    if (home/"features").is_dir() and not features.is_dir(): shutil.copytree(home/"features", features)
    return run


def run_one(name, seed, args):
    "Train one method and score it on the images that it has not seen."
    home = run_folder(name, seed, args)
    if (home/"scores.json").is_file(): return json.loads((home/"scores.json").read_text())
    store, trained = split_store(args, seed), name != "band_quantiles"
    changes = args.set if trained else [f"method={name}"]
    cfg = load_config(name if trained else "base",
                      ["data=store", f"data.path={store}", f"seed={seed}", f"out={home}", *changes])
    run = train(cfg, home, args.keep/f"features_{store.name}_{name}")
    method, test = load_method(run), build_archive(cfg.data).split("test")
    rows = np.array_split(np.arange(len(test)), 50)
    z = [method.embed(torch.stack([test[i]["rgb"] for i in block]), "rgb").numpy() for block in rows]
    found = score_embeddings(dict(rgb=np.concatenate(z)), test, METRICS, method.distance)
    scores = {k: v for k, v in found.items() if "/" not in k}
    scores |= dict(seconds=read_json(run/"finished.json")["seconds"], n_test=len(test))
    (home/"scores.json").write_text(json.dumps(scores))
    return scores


def score_codes(name, seed, args):
    "mAP of the test images by floats and by codes of each length."
    run, told = run_folder(name, seed, args), content_hash(args.hash)[:6]
    settings, rows = to_dict(load_config("base", args.hash).hash), []
    for bits in 0, *args.bits:
        fork = fork_run(run, run/f"codes_{bits}_{told}")
        if bits: train_hash(fork, progress=False, **{**settings, "n_bits": bits})
        store = encode_run(fork, progress=False)
        o = EvaluateConfig(protocol="leave_one_out", depth=len(store), drawings=1)
        rows.append(score_rows(name, {bits: store}, o)[["vectors", "mAP", "P@10"]])
    return pd.concat(rows)


def summary(table):
    "Mean and half width of the 95 % interval of Student's t over the seeds, as a table in Markdown."
    columns = [*METRICS, "seconds"]
    print("\n| method | " + " | ".join(columns) + " |\n|" + "---|"*(1 + len(columns)))
    for name, part in table.groupby("method", sort=False):
        n, mean, std = len(part), part[columns].mean(), part[columns].std()
        half = {2: 12.706, 3: 4.303}.get(n, np.nan)*std/np.sqrt(n)
        cells = [f"{mean[o]:.3f}" + f" ± {half[o]:.3f}"*(n > 1) for o in METRICS]
        print(f"| {name} | " + " | ".join([*cells, f"{mean['seconds']:.0f}"]) + " |")


def main():
    args = parse()
    args.keep.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in args.seeds:
        for name in args.methods:
            rows.append(dict(method=name, seed=seed, **run_one(name, seed, args)))
            print(rows[-1], flush=True)
            if args.bits and name != "band_quantiles": print(score_codes(name, seed, args), flush=True)
    summary(pd.DataFrame(rows))


if __name__ == "__main__": main()
