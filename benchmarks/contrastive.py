"""Partner recall across sensors on places never trained on: contrastive pairs, CSMAE, and floors.

    python benchmarks/contrastive.py --out runs/contrastive             # the comparison, three seeds
    python benchmarks/contrastive.py --out runs/contrastive --recipe    # what the recipe was chosen from

Everything is trained by the config `contrastive` and what this file changes in it. The recipe is chosen on
validation places, the comparison is scored on test places. A finished training is not made again, one that
was stopped goes on, and `--only` makes some of the trainings alone.
"""
import argparse
import logging
import time
from pathlib import Path

import numpy as np
import pandas as pd

from rsir_nb.config import load_config
from rsir_nb.core import METHODS, read_json
from rsir_nb.data.store import write_store
from rsir_nb.engine.parts import build_archive, build_method, load_method
from rsir_nb.engine.train import pretrain
from rsir_nb.methods.embedding import embed_batch
from rsir_nb.metrics.partners import partner_ranks, score_partners
from rsir_nb.simulate.synthetic import SyntheticArchive

CSMAE = ["method=csmae", "method.patch_size=8", "method.embed_dim=128", "method.num_heads=4",
         "method.specific_depth=1", "method.shared_depth=1", "method.decoder_embed_dim=64",
         "method.decoder_depth=1", "method.decoder_num_heads=4", "method.mask_ratio=0.75",
         "method.temperature=0.2", "method.norm_pix=true", "method.embed_norm=batch",
         "method.decode_ratio=0.125",
         "optim.lr=1e-3", "trainer.batch_size=64", "trainer.augment=[flips,rotate90]"]
SMALL_VIT = ["method.backbone={name: vit, patch_size: 8, embed_dim: 128, depth: 2, num_heads: 4}",
             "optim.lr=3e-3"]
SYSTEMS = {"contrastive, ResNet-18": [], "contrastive, small ViT": SMALL_VIT, "CSMAE": CSMAE}
RECIPES = {
    "as it stands": [],
    "no augmentation": ["trainer.augment=false"],
    "no crop": ["trainer.augment=[flips,rotate90]"],
    "temperature 0.1": ["method.temperature=0.1"],
    "temperature 0.5": ["method.temperature=0.5"],
    "learning rate 3e-3": ["optim.lr=3e-3"],
    "learning rate 1e-3": ["optim.lr=1e-3"],
    "hidden layer in the head": ["method.projection.layers=2"],
    "head without normalisation": ["method.projection.norm=false"],
    "published head": ["method.projection=relu"],
}


def make_store(path, o):
    if path.is_dir(): return
    world = SyntheticArchive(n_places=o.places, patches_per_place=o.patches, img_size=o.side, seed=o.world)
    write_store(world, path, size=o.side, progress=False)


def train(o, name, config, changes, seed):
    "The run `name`, trained unless it is there."
    base = [f"data={{name: store, path: {o.out/'store'}}}", f"seed={seed}", f"optim.epochs={o.epochs}",
            f"out={o.out/name}"]
    cfg = load_config(config, [*base, *changes])
    return cfg, pretrain(cfg, progress=False)


def embed(method, archive):
    "sensor -> embeddings of all patches of `archive`."
    patches = [archive[i] for i in range(len(archive))]
    return {m: embed_batch(method, [o[m] for o in patches], m).cpu().numpy() for m in method.sensors}


def recall(method, archive):
    "Partner recall in both directions, intervals over places."
    z, own, found = embed(method, archive), np.arange(len(archive)), []
    for s, t in ("s1", "s2"), ("s2", "s1"):
        ranks = partner_ranks(z[s], z[t], own, method.distance)
        table = score_partners(ranks, len(own), (1, 10), archive.table["place"].to_numpy())
        found.append(table.assign(direction=f"{s}->{t}"))
    return pd.concat(found)


def compare(o):
    rows, archive = [], build_archive(dict(name="store", path=str(o.out/"store"))).split("test")
    for seed in range(o.seeds):
        for name, changes in SYSTEMS.items():
            if o.only and o.only not in f"{name} {seed}": continue
            folder = f"{name}_{seed}".replace(" ", "_").replace(",", "")
            cfg, run = train(o, folder, "contrastive", changes, seed)
            told = read_json(run/"finished.json")
            found = recall(load_method(run), archive)
            rows.append(found.assign(system=name, seed=seed, seconds=told["seconds"]))
            if changes: continue
            fresh = build_method(cfg, build_archive(cfg.data)).eval()
            rows.append(recall(fresh, archive).assign(system="ResNet-18, untrained", seed=seed, seconds=0.))
    whole = build_archive(dict(name="store", path=str(o.out/"store")))
    cca = METHODS.create("band_cca", sensors=whole.sensors, img_size=o.side).fit(whole.split("train"))
    rows.append(recall(cca, archive).assign(system="band statistics, correlated", seed=0, seconds=0.))
    table = pd.concat(rows)
    table.to_csv(o.out/"compare.csv", index=False)
    print(f"{archive.table['place'].nunique()} test places, {len(archive)} patches, {o.epochs} epochs\n")
    columns = "system", "direction", "R@1", "R@10", "R@10 of each seed (95 % over places)", \
        "chance R@10", "seconds"
    print("| " + " | ".join(columns) + " |\n|" + "---|"*len(columns))
    for (system, way), part in table.groupby(["system", "direction"], sort=False):
        at = {k: part[(part.metric == "partner_r") & (part.k == k)] for k in (1, 10)}
        low = "; ".join(f"{r.value:.3f} ({r.low:.3f} to {r.high:.3f})" for r in at[10].itertuples())
        half = 4.303*at[10].value.std()/np.sqrt(3) if len(at[10]) == 3 else np.nan
        means, chance = [at[k].value.mean() for k in (1, 10)], at[10].chance.iloc[0]
        spread = "" if np.isnan(half) else f" ± {half:.3f}"
        row = system, way, f"{means[0]:.3f}", f"{means[1]:.3f}{spread}", low, f"{chance:.3f}", \
            f"{part.seconds.mean():.0f}"
        print("| " + " | ".join(row) + " |")


def recipe(o):
    print("| change | best epoch | val partner R@10, both directions |\n|---|---|---|")
    for name, changes in RECIPES.items():
        if o.only and o.only not in name: continue
        _, run = train(o, "recipe_" + name.replace(" ", "_"), "contrastive", changes, 0)
        told = read_json(run/"finished.json")
        print(f"| {name} | {told['best_epoch'] + 1} | {told['value']:.3f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    for name, default in dict(places=640, patches=4, side=32, world=0, epochs=12, seeds=3).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--recipe", action="store_true")
    parser.add_argument("--only", help="only trainings with this in their name, e.g. 'small ViT 0'")
    o = parser.parse_args()
    logging.getLogger("rsir_nb").setLevel(logging.ERROR)
    o.out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    make_store(o.out/"store", o)
    (recipe if o.recipe else compare)(o)
    print(f"\n{time.time() - start:.0f} s in all")


if __name__ == "__main__": main()
