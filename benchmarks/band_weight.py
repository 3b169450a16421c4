"""Which weight the statistics of all bands get beside the network that ships, on patches of four bands.

    python benchmarks/band_weight.py                            # ../shared/data/vessels

P@10 of the four kinds of patch (vessel, water, coast, land); a query's own port does not answer. The weight
is chosen on the queries of every second port and told beside the others' scores.
"""
import argparse
from pathlib import Path

import pandas as pd
import torch
from torch.nn import functional as F

from rsir_nb.core import DATASETS, METHODS


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path(__file__).resolve().parents[2]/"shared"/"data"/"vessels"
    p.add_argument("--root", type=Path, default=default)
    o = p.parse_args()
    archive = DATASETS.create("vessels", root=o.root, labels="scene_class")
    method = METHODS.create("pretrained", sensors=archive.sensors, statistics=.5).fit(archive).eval()
    z = method.embed(torch.stack([archive[i]["s2"] for i in range(len(archive))]), "s2")
    width = method.net.embed_dim
    parts = [F.normalize(z[:, :width]), F.normalize(z[:, width:])]
    kind, port = torch.as_tensor(archive.targets), torch.as_tensor(pd.factorize(archive.table["place"])[0])
    rows = {}
    for w in (0, .05, .1, .2, .3, .4, .5, .7, .9, 1):
        near = sum(v*(x @ x.T) for v, x in zip((1 - w, w), parts, strict=True))
        found = near.masked_fill(port[:, None] == port, -9).topk(10).indices
        right = (kind[found] == kind[:, None]).float().mean(1)
        rows[w] = {k: right[port % 2 == i].mean().item() for i, k in enumerate(("chosen_on", "others"))}
    table = pd.DataFrame(rows).T.rename_axis("weight")
    print(table.round(3).to_string())
    print("best on the ports that choose:", table["chosen_on"].idxmax())


if __name__ == "__main__":
    main()
