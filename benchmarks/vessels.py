"""Claim: on real vessel patches, trained codes find more of the query's kind than hand-made features do.

The ports in the archive make three groups; each asks in turn, and what was learned was learned from the other
two. Everything answers but the query's own port, since patches of one scene look alike whatever they show.
P@10 is counted for the four kinds of patch (vessel, water, coast, land) and for vessel or none.

    python benchmarks/vessels.py                                # ../shared/data/vessels, three seeds
    python benchmarks/vessels.py --seeds 0 1 2 3 4 --keep DIR   # scores of seeds that are done are kept there
"""
import argparse
import logging
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rsir_nb.config import load_config, to_dict
from rsir_nb.data.base import TensorArchive
from rsir_nb.data.module import ArchiveData
from rsir_nb.data.splits import group_split
from rsir_nb.data.transforms import random_flips
from rsir_nb.data.vessels import VesselArchive
from rsir_nb.engine.encode import encode
from rsir_nb.engine.protocols import Direction, System, rank_direction
from rsir_nb.engine.loop import Training
from rsir_nb.engine.parts import build_method
from rsir_nb.methods.baselines import BandQuantiles, BandStatistics
from rsir_nb.engine.hash import train_heads
from rsir_nb.metrics.intervals import paired_difference_ci

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
import pytorch_lightning as pl

DECILES = "deciles of each band"
HEADS = {"codes, no labels": ("heads", None),
         "codes, zero-one (vessel)": ("zero_one", "vessel"),
         "codes, supervised (vessel)": ("supervised", "vessel"),
         "codes, supervised (kind)": ("supervised", "kind")}
K = 10


def parse():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[2]/"shared"/"data"/"vessels"
    parser.add_argument("--root", type=Path, default=default, help="folder in the layout of the VDD")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="of the autoencoder; those of the config by default")
    parser.add_argument("--keep", type=Path, help="folder for the scores of each seed")
    return parser.parse_args()


def flips_and_turns(batch, rng):
    "Each image flipped as it may, and the batch turned by a multiple of 90 degrees."
    turns = int(rng.integers(4))
    return {k: torch.rot90(x, turns, (2, 3)) if k == "s2" else x for k, x in random_flips(batch, rng).items()}


def pretrain(cfg, archive, seed):
    "The method of the config, trained on all of `archive`."
    method = build_method(cfg, archive)
    data = ArchiveData(archive, batch_size=cfg.trainer.batch_size, seed=seed, augment=flips_and_turns)
    pl.Trainer(max_epochs=cfg.optim.epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
               enable_progress_bar=False, enable_model_summary=False).fit(Training(method), data)
    return method.eval()


class Judge:
    "P@10 of a store's rankings for the queries `rows`, by kind and by vessel or none, without the own port."
    def __init__(self, table, rows):
        self.rows, self.place = rows, table.place.to_numpy()
        self.truth = dict(kind=table.scene_class.to_numpy(), vessel=(table.n_vessels > 0).to_numpy())

    def __call__(self, store, kind="float"):
        found = {o: np.zeros(len(self.rows)) for o in self.truth}
        for port in set(self.place[self.rows]):
            mine, items = self.place[self.rows] == port, np.flatnonzero(self.place != port)
            d = Direction("s2", "s2", self.rows[mine], items, None)
            _, ids = rank_direction(System("", store, kind), d, K)
            for o, truth in self.truth.items():
                found[o][mine] = (truth[items[ids]] == truth[self.rows[mine], None]).mean(1)
        return found

    def chance(self):
        return {o: np.array([(t[self.place != self.place[i]] == t[i]).mean() for i in self.rows])
                for o, t in self.truth.items()}


def heads_for(method, store, rows, labels, name, seed):
    "Hash heads by the packaged config `name`, trained on the embeddings of `rows`."
    settings = to_dict(load_config("base", [f"hash={name}"]).hash)
    y = None if labels is None else labels[rows]
    features = {"s2": np.asarray(store.embeddings["s2"][rows], np.float32)}
    method.heads = train_heads(features, y, seed=seed, progress=False, **settings).heads
    return method


def one_fold(cfg, archive, labels, rows, seed, folder):
    "P@10 of every system for the queries `rows`; it learns from all other rows."
    judge, rest = Judge(archive.table, rows), np.setdiff1d(np.arange(len(archive)), rows)
    store_of = lambda m, name: encode(m, archive, folder/name, progress=False)
    common = dict(sensors=dict(archive.sensors), img_size=archive[0]["s2"].shape[-1])
    more = tuple(i/10 for i in range(11))
    found = {"chance": judge.chance(),
             DECILES: judge(store_of(BandQuantiles(**common), "q"))}
    extremes = BandQuantiles(**common, quantiles=more)
    found["deciles and extremes"] = judge(store_of(extremes, "e"))
    fitted = BandStatistics(**common).fit(archive.subset(rest))
    found["band statistics"] = judge(store_of(fitted, "b"))
    untrained = build_method(cfg, archive)
    store = store_of(untrained, "u")
    found["untrained network"] = judge(store)
    untrained = heads_for(untrained, store, rest, labels["kind"], "supervised", seed)
    found["untrained, codes, supervised (kind)"] = judge(store_of(untrained, "uh"), "binary")
    method = pretrain(cfg, archive.subset(rest), seed)
    store = store_of(method, "m")
    found["autoencoder"] = judge(store)
    for i, (name, (settings, which)) in enumerate(HEADS.items()):
        heads_for(method, store, rest, labels.get(which), settings, seed)
        found[f"autoencoder, {name}"] = judge(store_of(method, f"h{i}"), "binary")
    return found


def one_seed(archive, labels, seed, epochs):
    "system -> {kind, vessel} -> P@10 of all queries, in the archive's order."
    cfg = load_config("vessels", [f"seed={seed}", *([f"optim.epochs={epochs}"] if epochs else [])])
    folds = group_split(archive.table, "place", dict(a=1, b=1, c=1), by="scene_class", seed=0)
    out = {}
    for fold in sorted(set(folds)):
        rows, start = np.flatnonzero(folds == fold), time.time()
        with tempfile.TemporaryDirectory() as d:
            for name, both in one_fold(cfg, archive, labels, rows, seed, Path(d)).items():
                for which, x in both.items():
                    out.setdefault(f"{name}|{which}", np.zeros(len(archive)))[rows] = x
        ports = ", ".join(sorted(set(archive.table.place[rows])))
        print(f"seed {seed}, {ports}: {time.time() - start:.0f} s", flush=True)
    return out


def table_of(scores, places):
    "Means with 95 % intervals over seeds, and margins over two baselines with intervals over ports."
    from scipy.stats import t
    rows = []
    for key in scores[0]:
        name, which = key.split("|")
        means = np.array([o[key].mean() for o in scores])
        n = len(means)
        half = t.ppf(0.975, n - 1)*means.std(ddof=1)/np.sqrt(n) if n > 1 else np.nan
        rows.append({"system": name, "P@10 of": which, "mean": f"{means.mean():.3f}",
                     "+- over seeds": f"{half:.3f}", "lowest": f"{means.min():.3f}"})
        for title, base in {"over deciles": DECILES, "over untrained": "untrained network"}.items():
            mine, theirs = (np.mean([o[k] for o in scores], 0) for k in (key, f"{base}|{which}"))
            rows[-1][title] = "{:+.3f} ({:+.3f}..{:+.3f})".format(
                *map(float, paired_difference_ci(mine, theirs, groups=places)))
    return pd.DataFrame(rows).sort_values("P@10 of", kind="stable").reset_index(drop=True)


def main():
    args = parse()
    torch.set_num_threads(1)
    files = VesselArchive(args.root)
    table = files.table
    archive = TensorArchive(dict(s2=torch.stack([o["s2"] for o in files])), dict(files.sensors), files.ids,
                            labels=files.class_names, **{k: table[k].tolist() for k in
                                                         ("place", "scene_class", "n_vessels")})
    kinds = sorted(set(table.scene_class))
    labels = dict(vessel=files.labels,
                  kind=np.array([[k == o for o in kinds] for k in table.scene_class], float))
    scores = []
    for seed in args.seeds:
        path = args.keep and args.keep/f"seed_{seed}.npz"
        if path and path.is_file():
            with np.load(path) as f: scores.append(dict(f))
            continue
        scores.append(one_seed(archive, labels, seed, args.epochs))
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, **scores[-1])
    print(f"\n{len(archive)} patches of {table.place.nunique()} ports; seeds {args.seeds}; Python "
          f"{platform.python_version()}, torch {torch.__version__}, {platform.machine()}\n")
    with pd.option_context("display.width", 200, "display.max_rows", 99, "display.max_columns", 99):
        print(table_of(scores, table.place.to_numpy()).to_string(index=False))


if __name__ == "__main__": main()
