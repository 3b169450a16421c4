"""Claim: whether mining by the overlap of several labels finds more than mining by shared labels or random.

Each seed makes another simulated archive and another training. The three trainings of a seed differ in the
miner alone: random, semi-hard or multi-label semi-hard triplets, three per anchor in each. Every test patch
is a query to the others. Relevance is a shared label in mAP and the number of shared labels in nDCG.

    python benchmarks/multi_label.py --keep DIR                # three seeds
    python benchmarks/multi_label.py --keep DIR --seeds 0 --epochs 5
"""
import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rsir_nb.config import load_config
from rsir_nb.data.store import write_store
from rsir_nb.engine.parts import build_archive, build_method, load_method
from rsir_nb.engine.train import pretrain
from rsir_nb.metrics.named import score_embeddings
from rsir_nb.simulate.synthetic import SyntheticArchive

MINERS = dict(random="{name: random, per_anchor: 3}", semi_hard="{name: semi_hard, per_anchor: 3}",
              multi_label_semi_hard="{name: multi_label_semi_hard, per_anchor: 3}")
METRICS = "map", "ndcg@10", "acg@10", "precision@10"


def parse():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, required=True, help="folder for archives, runs and scores")
    parser.add_argument("--set", nargs="+", default=[], help="changes of the config, key=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    for name, default in dict(places=400, patches=4, side=32, epochs=20).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def scores_of(method, archive):
    rows = np.array_split(np.arange(len(archive)), 20)
    z = [method.embed(torch.stack([archive[i]["s2"] for i in block]), "s2").numpy() for block in rows]
    found = score_embeddings(dict(s2=np.concatenate(z)), archive, METRICS, method.distance)
    return {k: v for k, v in found.items() if "/" not in k}


def run_seed(seed, args):
    "Rows of scores: one per miner, and one of the untrained network."
    path = args.keep/f"archive_{seed}"
    if not path.is_dir():
        world = SyntheticArchive(args.places, args.patches, seed=seed, img_size=args.side, sensors=["s2"])
        write_store(world, path, size=args.side, progress=False)
    rows = []
    for name, miner in dict(untrained=MINERS["random"], **MINERS).items():
        home = args.keep/f"{name}_{seed}_{args.epochs}"
        changes = [f"data.path={path}", f"seed={seed}", f"out={home}", f"method.miner={miner}"]
        changes += [f"optim.epochs={args.epochs}", *args.set]
        cfg = load_config("margin", ["data=store", *changes])
        archive = build_archive(cfg.data)
        if not (home/"scores.json").is_file():
            if name == "untrained": method = build_method(cfg, archive).eval()
            else: method = load_method(pretrain(cfg, progress=False))
            home.mkdir(parents=True, exist_ok=True)
            (home/"scores.json").write_text(json.dumps(scores_of(method, archive.split("test"))))
        rows.append(dict(miner=name, seed=seed, **json.loads((home/"scores.json").read_text())))
        print(rows[-1], flush=True)
    return rows


def mean_interval(values):
    "Mean and half width of the 95 % interval of Student's t, as text."
    if len(values) < 2: return f"{np.mean(values):.3f}"
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(values), np.nan)
    return f"{np.mean(values):.3f} ± {t*np.std(values, ddof=1)/np.sqrt(len(values)):.3f}"


def main():
    args = parse()
    args.keep.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame([row for seed in args.seeds for row in run_seed(seed, args)])
    table.to_csv(args.keep/"multi_label.csv", index=False)
    print("\n| miner | " + " | ".join(METRICS) + " |\n|" + "---|"*(1 + len(METRICS)))
    for name in table.miner.unique():
        mine = table[table.miner == name].set_index("seed")[list(METRICS)]
        print(f"| {name} | " + " | ".join(mean_interval(mine[o]) for o in METRICS) + " |")
    graded = table[table.miner == "multi_label_semi_hard"].set_index("seed")[list(METRICS)]
    for other in "semi_hard", "random":
        gain = graded - table[table.miner == other].set_index("seed")[list(METRICS)]
        print(f"| graded minus {other} | " + " | ".join(mean_interval(gain[o]) for o in METRICS) + " |")


if __name__ == "__main__": main()
