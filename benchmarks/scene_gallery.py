"""Hits in a scene that no training has seen: the network that ships beside band statistics, as one picture.

    python benchmarks/scene_gallery.py --out nbs/images/valencia.png

The queries are drawn at random among the patches of land (mean B08 above 0.14); nobody chose them.
"""
import argparse
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from rsir_nb.charts import new_figure
from rsir_nb.core import METHODS, make_rng
from rsir_nb.data.scenes import SceneArchive
from rsir_nb.show import to_rgb


def nearest(name, archive, x, rows, k):
    "Rows of the k nearest patches of each query, without the query, (Q,k)."
    method = METHODS.create(name, sensors=archive.sensors, img_size=x.shape[-1]).fit(archive).eval()
    z = F.normalize(torch.cat([method.embed(part, archive.modality) for part in x.split(64)]))
    near = z[rows] @ z.T
    near[torch.arange(len(rows)), rows] = -9
    return near.topk(k).indices


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scene = Path(__file__).resolve().parents[2]/"shared"/"data"/"scenes"/"S2_L2A_valencia_2023-08-23.tif"
    p.add_argument("--scene", type=Path, default=scene)
    p.add_argument("--out", type=Path, required=True)
    for name, default in dict(size=64, queries=8, k=5, seed=0).items():
        p.add_argument(f"--{name}", type=int, default=default)
    o = p.parse_args()
    archive = SceneArchive(o.scene, img_size=o.size)
    sensor = archive.sensors[archive.modality]
    x = torch.stack([archive[i][archive.modality] for i in range(len(archive))]).float()
    land = np.flatnonzero(x[:, sensor.index("B08")].mean((1, 2)).numpy() > 1400)
    rows = torch.as_tensor(make_rng(o.seed, "queries").choice(land, o.queries, replace=False))
    seen = [to_rgb(patch.numpy(), sensor, "true") for patch in x]
    figure = new_figure(7, 0.56*o.queries + 0.4)
    axes = figure.subplots(o.queries, 2*o.k + 1, gridspec_kw=dict(wspace=.06, hspace=.06))
    found = [nearest(name, archive, x, rows, o.k) for name in ("band_statistics", "pretrained")]
    for row, query, *hits in zip(axes, rows, *found, strict=True):
        pictures = [*hits[0], query, *hits[1]]
        for ax, i in zip(row, pictures, strict=True):
            ax.imshow(seen[int(i)])
            ax.set(xticks=[], yticks=[])
    titles = (o.k//2, "band statistics"), (o.k, "query"), (o.k + 1 + o.k//2, "the network that ships")
    for at, title in titles:
        axes[0, at].set_title(title, fontsize=8)
    figure.savefig(o.out, dpi=110, bbox_inches="tight")
    print(f"{len(archive)} patches of {o.size} pixels, {len(land)} of land")


if __name__ == "__main__": main()
