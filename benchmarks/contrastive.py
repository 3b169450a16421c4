"""Partner recall across sensors on places never trained on: contrastive pairs beside CSMAE, no training and chance.

    python benchmarks/contrastive.py --out runs/contrastive                # the comparison, three seeds
    python benchmarks/contrastive.py --out runs/contrastive --recipe      # what the recipe was chosen from
    python benchmarks/contrastive.py --out runs/contrastive --types       # encoders x fusions x losses, one seed

Everything is trained and encoded by the config and the verbs' own functions. The recipe is chosen on validation
places alone; the comparison and the types are scored on test places. A finished training is not made again.
"""
import argparse
import logging
import time
from pathlib import Path

import numpy as np
import pandas as pd

from rsir_nb.config import load_config
from rsir_nb.core import read_json
from rsir_nb.data.store import write_store
from rsir_nb.engine.parts import build_archive, build_method, load_method
from rsir_nb.engine.train import pretrain
from rsir_nb.methods.embedding import embed_batch, fused_rows
from rsir_nb.metrics.named import score_embeddings
from rsir_nb.metrics.partners import partner_ranks, score_partners
from rsir_nb.simulate.synthetic import SyntheticArchive

CSMAE = ["method=csmae", "method.patch_size=10", "method.embed_dim=128", "method.num_heads=4", "method.specific_depth=1",
         "method.shared_depth=1", "method.decoder_embed_dim=64", "method.decoder_depth=1", "method.decoder_num_heads=4",
         "method.mask_ratio=0.75", "method.temperature=0.2", "method.norm_pix=true", "method.embed_norm=batch",
         "method.decode_ratio=0.125", "optim.lr=1e-3", "trainer.augment=[flips,rotate90]"]
RECIPES = {
    "as it stands": [],
    "no augmentation": ["trainer.augment=false"],
    "brightness and noise too": ["trainer.augment=[flips,rotate90,jitter,noise]"],
    "temperature 0.05": ["method.temperature=0.05"],
    "temperature 0.2": ["method.temperature=0.2"],
    "temperature 0.5": ["method.temperature=0.5"],
    "batch 32": ["trainer.batch_size=32"],
    "batch 128": ["trainer.batch_size=128"],
    "published head": ["method.projection={name: relu, embed_dim: 128}"],
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
    "modality -> embeddings of all patches of `archive`."
    rows, images = list(range(len(archive))), {m: [archive[i][m] for i in range(len(archive))] for m in method.sensors}
    z = {m: embed_batch(method, x, m) for m, x in images.items()}
    fused = {}
    for name in method.joint:
        at, x = fused_rows(method, dict.fromkeys(z, rows), z, name, images)
        fused[name] = x[np.argsort(at)]
    return {m: x.cpu().numpy() for m, x in (z | fused).items()}


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
        for name, changes in dict(contrastive=[], csmae=CSMAE).items():
            cfg, run = train(o, f"{name}_{seed}", "contrastive", changes, seed)
            told = read_json(run/"finished.json")
            rows.append(recall(load_method(run), archive).assign(system=name, seed=seed, seconds=told["seconds"]))
            if name == "contrastive":
                fresh = build_method(cfg, build_archive(cfg.data)).eval()
                rows.append(recall(fresh, archive).assign(system="untrained", seed=seed, seconds=0.))
    table = pd.concat(rows)
    table.to_csv(o.out/"compare.csv", index=False)
    print(f"{archive.table['place'].nunique()} test places, {len(archive)} patches, {o.epochs} epochs\n")
    print("| system | direction | R@1 | R@10 | R@10 of each seed (95 % over places) | chance R@10 | seconds |\n|" + "---|"*7)
    for (system, way), part in table.groupby(["system", "direction"], sort=False):
        at = {k: part[(part.metric == "partner_r") & (part.k == k)] for k in (1, 10)}
        low = "; ".join(f"{r.value:.3f} ({r.low:.3f} to {r.high:.3f})" for r in at[10].itertuples())
        half = 4.303*at[10].value.std()/np.sqrt(3) if o.seeds == 3 else np.nan
        print(f"| {system} | {way} | {at[1].value.mean():.3f} | {at[10].value.mean():.3f} ± {half:.3f} | {low} | "
              f"{at[10].chance.iloc[0]:.3f} | {part.seconds.mean():.0f} |")


def recipe(o):
    print("| change | best epoch | val partner R@10, both directions |\n|---|---|---|")
    for name, changes in RECIPES.items():
        _, run = train(o, "recipe_" + name.replace(" ", "_"), "contrastive", changes, 0)
        told = read_json(run/"finished.json")
        print(f"| {name} | {told['best_epoch'] + 1} | {told['value']:.3f} |", flush=True)


def types(o):
    rows, archive = [], build_archive(dict(name="store", path=str(o.out/"store"))).split("test")
    for encoder in "separate", "joint", "early":
        for loss in "contrastive", "both":
            _, run = train(o, f"{encoder}_{loss}", "contrastive", [f"method.encoder={encoder}", f"method.loss={loss}"], 0)
            method = load_method(run)
            for fusion in ("avg", "concat", "max", "sum") if encoder != "early" else ("none",):
                if fusion != "none": method.fusion, method.embed_dim = fusion, None
                z = embed(method, archive)
                whole = dict(both=z["s1+s2"])
                label = score_embeddings(whole, archive.labels, ["map", "f1@10"], method.distance)
                pair = score_embeddings({m: z[m] for m in ("s1", "s2")}, archive, ["partner_r@1", "partner_r@10"])
                rows.append([encoder, fusion, loss, *(label[k] for k in ("map", "f1@10")), *(pair[f"partner_r@{k}"] for k in (1, 10))])
    print("| encoder | fusion | loss | mAP, fused | F1 at 10 (M1), fused | partner R@1 | partner R@10 |\n|" + "---|"*7)
    for row in rows: print("| " + " | ".join(o if isinstance(o, str) else f"{o:.3f}" for o in row) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    for name, default in dict(places=640, patches=2, side=40, world=0, epochs=20, seeds=3).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in "recipe", "types": parser.add_argument(f"--{name}", action="store_true")
    o = parser.parse_args()
    logging.getLogger("rsir_nb").setLevel(logging.ERROR)
    o.out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    make_store(o.out/"store", o)
    (recipe if o.recipe else types if o.types else compare)(o)
    print(f"\n{time.time() - start:.0f} s in all")


if __name__ == "__main__": main()
