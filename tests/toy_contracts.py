"Parts that nobody wrote for this package, all in one file: `plugins=[toy_contracts]`. See test_contracts.py."
import os
import signal

import numpy as np
import torch
from torch import nn

from rsir_nb.core import BACKBONES, DATASETS, LOSSES, METHODS, make_rng
from rsir_nb.data.base import TensorArchive
from rsir_nb.data.samplers import SAMPLERS, RowSampler
from rsir_nb.data.transforms import AUGMENTATIONS, image_size
from rsir_nb.losses.pairs import MINERS, make_loss, make_miner
from rsir_nb.methods.base import Method
from rsir_nb.metrics.scores import METRICS
from rsir_nb.models.backbones import make_backbone
from rsir_nb.retrieval.distances import DISTANCES, Distance
from rsir_nb.sensors import Sensor

KINDS = "field", "forest", "lake", "town"
SENSORS = dict(a=Sensor("toy radar", ["R"], "brightness", 10), b=Sensor("toy camera", ["Red", "Green", "Blue"], "brightness", 10))
seen = {}   # what the parts have noticed, for the tests


@DATASETS.register("toy_bytes")
def toy_bytes(n:int=72, side:int=12):
    "Bytes of one class each, seen by a one-band and by a three-band sensor; the last ones of each kind lack a sensor."
    rng, kind = make_rng(0, "toy bytes"), np.arange(n) % len(KINDS)
    base = 40 + 50*kind[:, None, None, None]
    arrays = {m: torch.tensor((base + 9*rng.normal(size=(n, s.in_chans, side, side))).clip(0, 255).astype(np.uint8))
              for m, s in SENSORS.items()}
    place = np.arange(n)//4
    split = np.array(["train", "train", "val", "test"])[place % 4]
    return TensorArchive(arrays, SENSORS, ids=[f"toy{i:02}" for i in range(n)], labels=[[KINDS[k]] for k in kind],
                         split=split, place=[f"p{o}" for o in place])


@BACKBONES.register("toy_means")
class ToyMeans(nn.Module):
    "Mean and spread of each band through a linear layer."
    def __init__(self, in_chans:int, img_size:int, width:int=8):
        super().__init__()
        self.embed_dim, self.linear = width, nn.Linear(2*in_chans, width)

    def forward(self, x): return self.linear(torch.cat([x.mean((2, 3)), x.std((2, 3))], 1))


@LOSSES.register("toy_pull")
class ToyPull(nn.Module):
    "Squared distances of positive pairs, and a hinge on those of negative ones."
    def __init__(self, margin:float=1.):
        super().__init__()
        self.margin = margin

    def forward(self, z, labels, pairs=None):
        a, p, b, n = pairs
        return (z[a] - z[p]).square().sum(1).mean() + (self.margin - (z[b] - z[n]).square().sum(1)).clamp(min=0).mean()


@MINERS.register("toy_neighbours")
class ToyNeighbours:
    "All pairs, as pytorch-metric-learning writes them."
    def __call__(self, z, labels, generator=None):
        same = labels[:, None] == labels
        off = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
        return (*torch.nonzero(same & off, as_tuple=True), *torch.nonzero(~same, as_tuple=True))


@SAMPLERS.register("toy_kinds")
class ToyKinds(RowSampler):
    "Each batch begins with one patch of every class."
    def draw(self, rng, n):
        first = [rng.choice(np.flatnonzero(self.archive.targets == k), n) for k in range(len(self.archive.vocab))]
        rest = rng.integers(len(self.archive), size=(n, self.batch_size - len(first)))
        return np.column_stack([*first, rest])


@AUGMENTATIONS.register("toy_dim")
def toy_dim(batch, rng, least:float=0.9):
    "Darken each patch, all its sensors alike."
    factor = torch.tensor(rng.uniform(least, 1, (image_size(batch)[0], 1, 1, 1)), dtype=torch.float32)
    seen["dtype"] = {m: batch[m].dtype for m in SENSORS if m in batch}
    return {k: x*factor if k.removesuffix("_view") in SENSORS else x for k, x in batch.items()}


@DISTANCES.register("toy_l1")
class ToyL1(Distance):
    "Sum of absolute differences."
    def pairwise(self, xq, x): return np.abs(xq[:, None] - x[None]).sum(-1).astype(np.float32)


@METRICS.register("toy_first", source="toy")
def toy_first(judged, ks):
    "whether the first hit shares a label, whatever k"
    return np.repeat(judged.rel[:, :1].astype(float), len(ks), 1)


class ToyBank(nn.Module):
    "The last embedding of every training patch."
    def __init__(self, n, width):
        super().__init__()
        self.register_buffer("rows", torch.zeros(n, width))


@METHODS.register("toy_everything")
class ToyEverything(Method):
    "Uses every contract."
    training_only = ("bank",)
    distance, sampler = "toy_l1", "toy_kinds"

    def __init__(self, sensors, img_size:int=12, width:int=6, backbone:str|dict="toy_means", loss:str|dict="toy_pull",
                 miner:str|dict="toy_neighbours", vocab:list|None=None, class_counts:list|None=None, **kwargs):
        super().__init__(sensors, img_size=img_size, **kwargs)
        self.backbones = nn.ModuleDict({m: make_backbone(backbone, s.in_chans, img_size) for m, s in self.sensors.items()})
        self.layers = nn.ModuleDict({m: nn.Linear(o.embed_dim, width) for m, o in self.backbones.items()})
        self.loss, self.miner, self.embed_dim, self.bank = make_loss(loss), make_miner(miner), width, None
        self.joint = {"a+b": ("a", "b")}
        self.vocab, self.class_counts = vocab, class_counts

    def encode(self, x, modality): return self.layers[modality](self.backbones[modality](x))
    def fuse(self, parts, name): return torch.stack(list(parts.values())).mean(0)
    def start_training(self, train):
        self.bank = ToyBank(len(train), self.embed_dim)
        seen["train"] = train
    def start_epoch(self, epoch): seen.setdefault("epochs", []).append(epoch)
    def optimisers(self):
        slow = dict(params=self.backbones.parameters(), lr_scale=0.1)
        return dict(main=([slow, dict(params=self.layers.parameters())], self.optim))

    def losses(self, batch, generator=None):
        count_steps()
        z = {m: self.encode(self.prepare(batch[m], m), m) for m in self.sensors}
        other = {m: self.encode(self.prepare(batch[f"{m}_view"], m), m) for m in self.sensors if f"{m}_view" in batch}
        y = batch["target"].repeat(len(z))
        rows = torch.cat(list(z.values()))
        terms = dict(pull=self.loss(rows, y, self.miner(rows, y, generator)))
        if other: terms["views"] = (rows - torch.cat(list(other.values()))).square().mean()
        if self.training:
            past = self.bank.rows[batch["row"]].clone()
            terms["drift"] = 1e-3*(z["a"] - past).square().mean()
            self.latest = z["a"].detach()
        return dict(loss=sum(terms.values()), **terms)

    def after_step(self, batch): self.bank.rows[batch["row"]] = self.latest


steps = 0

def count_steps():
    "With RSIR_TOY_KILL_AT=n in the environment the process kills itself in its n-th step."
    global steps
    steps += 1
    if steps == int(os.environ.get("RSIR_TOY_KILL_AT", -1)): os.kill(os.getpid(), signal.SIGKILL)
