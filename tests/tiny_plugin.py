"""Archives for tests of the engine, named in configs as `plugins=[tiny_plugin]` and `data=tiny_pairs` or `tiny_rgb`.

Four kinds of texture seen by two sensors, a few places of each; nothing to download, nothing slow. With
RSIR_TEST_KILL_AT=n in the environment the process kills itself (SIGKILL) when it reads its n-th patch, and with
RSIR_TEST_FAIL_AT=n the n-th read raises.
"""
import os
import signal

import numpy as np
import pandas as pd
import torch

from rsir_nb.core import DATASETS, make_rng
from rsir_nb.data.base import Archive, TensorArchive
from rsir_nb.data.classes import Vocab
from rsir_nb.geo import wkb_box

KINDS = "field", "forest", "lake", "town"
reads = 0


@DATASETS.register("tiny_pairs")
class TinyPairs(Archive):
    "Four kinds of texture, seen by radar and by an optical sensor."
    def __init__(self, n_places:int=12, patches_per_place:int=4, seed:int=0, img_size:int=30):
        place = np.repeat(np.arange(n_places), patches_per_place)
        self.kind, self.size, self.seed = place % len(KINDS), img_size, seed
        split = np.array(["train", "train", "val", "test"])[place // len(KINDS) % 4] if n_places >= 16 else \
            np.array(["train", "val", "test"])[place // len(KINDS) % 3]
        table = pd.DataFrame(dict(
            id=[f"tiny_{i:03}" for i in range(len(place))], place=[f"place_{p}" for p in place], split=split,
            geometry=[wkb_box(11 + i/100, 48, 11.01 + i/100, 48.01) for i in range(len(place))]))
        table["labels"] = pd.Series([[KINDS[k]] + ([KINDS[(k + 1) % 4]] if i % 4 == 3 else [])
                                     for i, k in enumerate(self.kind)], dtype=object)
        super().__init__(table, dict(s1="s1", s2="s2"), Vocab(KINDS))

    def read(self, i):
        count_read()
        rng, kind = make_rng(self.seed, "patch", i), int(self.kind[i])
        coarse = torch.tensor(rng.normal(size=(1, 1, 3 + 4*kind, 3 + 4*kind)))
        shape = torch.nn.functional.interpolate(coarse, size=(self.size,)*2, mode="bicubic")[0].numpy()
        spectrum = make_rng(0, "spectrum", kind).uniform(600, 3000, (10, 1, 1)) + 300*rng.normal()
        s2 = np.clip(spectrum + 200*shape + 30*rng.normal(size=(10, self.size, self.size)), 1, None)
        s1 = -14 + 2*shape - kind + 2*rng.normal(size=(2, self.size, self.size))
        return {m: torch.tensor(x, dtype=torch.float32) for m, x in dict(s1=s1, s2=s2).items()}


@DATASETS.register("tiny_rgb")
def tiny_rgb(n:int=24):
    "Pictures of three kinds seen by one sensor, in no splits and at no known place."
    rng, kind = make_rng(0, "rgb"), np.arange(n) % 3
    x = 60 + 60*kind[:, None, None, None] + 20*rng.normal(size=(n, 3, 30, 30))*(1 + kind[:, None, None, None])
    return TensorArchive({"rgb": torch.tensor(x.clip(1, 255), dtype=torch.float32)}, ids=[f"rgb_{i}" for i in range(n)],
                         labels=[[KINDS[k]] for k in kind])


def count_read():
    "Count the reads of this process, and end it, or fail, where a test wants that."
    global reads
    reads += 1
    if reads == int(os.environ.get("RSIR_TEST_KILL_AT", -1)): os.kill(os.getpid(), signal.SIGKILL)
    if reads == int(os.environ.get("RSIR_TEST_FAIL_AT", -1)): raise RuntimeError("stopped by the test")
