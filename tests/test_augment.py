"Augmentations by name: same ground for all sensors, chance from the given generator alone, views, and old results unchanged."
from functools import partial

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from rsir_nb.core import InputError, UnknownNameError, content_hash
from rsir_nb.data import augment as a
from rsir_nb.data.base import TensorArchive
from rsir_nb.data.batches import collate
from rsir_nb.data.module import ArchiveData
from rsir_nb.data.transforms import AUGMENTATIONS, random_resized_crop

pytestmark = pytest.mark.filterwarnings("ignore")
GEOMETRIC = ["flips", "rotate90", "crop", "window", "erase", "blur_and_turn"]
VALUES = ["jitter", "noise", "blur", "drop_bands"]


def rng(seed=0): return np.random.default_rng(seed)


def make(n=6, size=16):
    x = torch.from_numpy(rng(1).normal(size=(n, 1, size, size)).astype("f4"))
    scale = torch.arange(1, 11.)[:, None, None]
    return dict(id=[str(i) for i in range(n)], s1=(x - 12) * torch.ones(2, 1, 1), s2=300 * x * scale + 2000, row=torch.arange(n), labels=torch.eye(n))


def test_all_are_tested(): assert sorted(AUGMENTATIONS.list()) == sorted(GEOMETRIC + VALUES)


@pytest.mark.parametrize("name", GEOMETRIC + VALUES)
def test_chance_comes_from_the_generator_alone(name):
    batch, func = make(), partial(AUGMENTATIONS.get(name))
    out = func(batch, rng(0))
    assert out["id"] == batch["id"] and out["labels"] is batch["labels"] and torch.equal(out["row"], batch["row"])
    for m in "s1", "s2":
        assert torch.equal(batch[m], make()[m]), "nothing is changed in place"
        assert out[m].shape[:2] == batch[m].shape[:2] and out[m].shape[2:] == ((12, 12) if name == "window" else (16, 16)) and out[m].dtype == torch.float32 and out[m].isfinite().all()
    torch.manual_seed(1)
    np.random.seed(1)
    state = torch.get_rng_state()
    again = func(batch, rng(0))
    assert all(torch.equal(again[m], out[m]) for m in ("s1", "s2")) and torch.equal(torch.get_rng_state(), state)
    assert any(not torch.equal(func(batch, rng(7))[m], out[m]) for m in ("s1", "s2"))
    assert out["s2"].shape != batch["s2"].shape or not torch.equal(out["s2"], batch["s2"])


@pytest.mark.parametrize("name", GEOMETRIC)
def test_all_sensors_are_moved_alike(name):
    batch = make()
    both = AUGMENTATIONS.get(name)(dict(a=batch["s2"], b=batch["s2"][:, :2].clone()), rng(3))
    torch.testing.assert_close(both["a"][:, :2], both["b"], rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("name", VALUES)
def test_how_often_and_for_whom(name):
    batch, func = make(400, 6), AUGMENTATIONS.get(name)
    sure = dict(rate=0.9) if name == "drop_bands" else {}
    changed = lambda out, m: (out[m] != batch[m]).flatten(1).any(1)
    out = func(batch, rng(), p=0.3, **sure)
    shares = [changed(out, m).float().mean().item() for m in ("s1", "s2")]
    assert all(0.2 < o < 0.4 for o in shares) and not torch.equal(changed(out, "s1"), changed(out, "s2"))
    out = func(batch, rng(), p=1, only=["s2"], **sure)
    assert torch.equal(out["s1"], batch["s1"]) and changed(out, "s2").all()
    with pytest.raises(UnknownNameError, match="did you mean s2"): func(batch, rng(), only=["s22"])
    with pytest.raises(InputError, match="rgb is not in its unit yet; found torch.uint8; call to_units first"):
        func(dict(rgb=torch.zeros(2, 3, 4, 4, dtype=torch.uint8)), rng())


@pytest.mark.parametrize("name", ["jitter", "noise", "blur", "drop_bands", "erase"])
def test_any_unit(name):
    "The same in decibels, reflectance and bytes, but for the unit."
    batch, func = dict(s2=make()["s2"]), AUGMENTATIONS.get(name)
    out = func(batch, rng(4))["s2"]
    torch.testing.assert_close(func(dict(s2=batch["s2"] / 40 - 30), rng(4))["s2"], out / 40 - 30, rtol=1e-4, atol=1e-2)


def test_quarter_turns():
    batch = make(400, 4)
    out = a.random_quarter_turns(batch, rng())["s2"]
    counts = [int(sum(torch.equal(x, y) for x, y in zip(out, batch["s2"].rot90(k, (2, 3)), strict=True))) for k in range(4)]
    assert sum(counts) == 400 and min(counts) > 70
    with pytest.raises(InputError, match="only square images"): a.random_quarter_turns(dict(x=torch.zeros(2, 1, 4, 6)), rng())


def test_crop_against_interpolation_of_each_window():
    batch, size = make(8, 60), 60
    out = random_resized_crop(batch, rng(5), (0.2, 0.9))["s2"]
    again = rng(5)
    sides = np.rint(size * np.sqrt(again.uniform(0.2, 0.9, 8))).astype(int)
    tops, lefts = again.integers(0, size - sides + 1), again.integers(0, size - sides + 1)
    for x, got, t, l, s in zip(batch["s2"], out, tops, lefts, sides, strict=True):
        want = F.interpolate(x[None, :, t:t + s, l:l + s], size=(size, size), mode="bicubic", align_corners=True)[0]
        edge = size // s + 2   # beyond the window the batch has the image's own pixels
        torch.testing.assert_close(got[:, edge:-edge, edge:-edge], want[:, edge:-edge, edge:-edge], rtol=1e-4, atol=0.5)


def test_jitter_keeps_to_its_limits():
    x = make(300)["s2"]
    y = a.random_jitter(dict(x=x), rng(), 0.5, 0.3, p=1)["x"]
    mean, std = x.mean((2, 3)), x.std((2, 3), correction=0)
    shift, gain = (y.mean((2, 3)) - mean) / std, y.std((2, 3), correction=0) / std
    assert shift.abs().max() <= 0.501 and shift.min() < -0.45 and shift.max() > 0.45
    assert 0.699 <= gain.min() < 0.73 and 1.27 < gain.max() <= 1.301
    assert shift.std(1).max() < 1e-3, "all bands alike"
    y = a.random_jitter(dict(x=x), rng(), 0.5, 0.3, each_band=True, p=1)["x"]
    assert ((y.mean((2, 3)) - mean) / std).std(1).min() > 0.05
    flat = torch.full((2, 3, 1, 1), 7.)
    assert torch.equal(a.random_jitter(dict(x=flat), rng(), p=1)["x"], flat), "one pixel has no deviation"


def test_noise_is_normal_and_as_strong_as_said():
    x = make(200, 30)["s2"]
    noise = a.random_noise(dict(x=x), rng(), amount=0.5, p=1)["x"] - x
    share = noise.std((2, 3)) / x.std((2, 3), correction=0)
    assert share.max() < 0.54 and 0.2 < share.mean() < 0.3 and share.min() < 0.05
    z = noise / noise.std((2, 3), keepdim=True)
    assert abs(z.mean()) < 0.01 and abs((z ** 4).mean() - 3) < 0.05


def test_blur_against_scipy():
    x = make(3, 20)["s2"]
    out = a.random_blur(dict(x=x), rng(), sigma=(1.3, 1.3), p=1)["x"]
    want = gaussian_filter(x.double().numpy(), 1.3, mode="nearest", axes=(2, 3), radius=int(np.ceil(3 * 1.3)))
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-2)
    weak, strong = (a.random_blur(dict(x=x), rng(), sigma=(s, s), p=1)["x"].std() for s in (0.3, 2))
    assert strong < weak < x.std()


def test_lost_bands():
    x = make(500, 4)["s2"]
    out = a.drop_bands(dict(x=x), rng(), rate=0.3, p=1)["x"]
    flat = (out - out[:, :, :1, :1]).abs().amax((2, 3)) < 1e-2
    torch.testing.assert_close(out.mean((2, 3)), x.mean((2, 3)), rtol=1e-4, atol=1e-2)
    assert 0.22 < flat.float().mean() < 0.3 and flat.sum(1).max() < 10
    assert (out[~flat] == x[~flat]).all()
    one = make(20)["s2"][:, :1]
    assert torch.equal(a.drop_bands(dict(x=one), rng(), rate=1, p=1)["x"], one)


def test_erased_squares():
    x = make(300, 20)["s2"]
    out = a.random_erase(dict(x=x), rng(), scale=(0.1, 0.3), p=0.5)["x"]
    hidden = (out != x).all(1)
    share = hidden.float().mean((1, 2))
    assert 0.4 < (share > 0).float().mean() < 0.6 and 0.05 < share[share > 0].min() and share.max() < 0.37
    for h in hidden[share > 0][:20]:
        rows, cols = h.any(1).nonzero(), h.any(0).nonzero()
        assert h.sum() == len(rows) * len(cols) and abs(len(rows) - len(cols)) <= 1


def test_by_name():
    batch = make()
    for nothing in None, False, []: assert a.make_augment(nothing) is None
    own = lambda batch, rng: batch
    assert a.make_augment(own) is own
    flips = AUGMENTATIONS.get("flips")(batch, rng(1))["s1"]
    for spec in True, "flips", ["flips"], dict(name="flips"): assert torch.equal(a.make_augment(spec)(batch, rng(1))["s1"], flips)
    two = a.make_augment([dict(name="flips", vertical=0.0), dict(name="noise", amount=0.1, only=["s1"])])
    chance = rng(1)
    want = AUGMENTATIONS.get("noise")(AUGMENTATIONS.get("flips")(batch, chance, vertical=0.0), chance, amount=0.1, only=["s1"])
    assert torch.equal(two(batch, rng(1))["s1"], want["s1"])


@pytest.mark.parametrize("spec, told", [
    ("flip", "did you mean flips"), (["flips", "croop"], "did you mean crop"), (dict(name="jitter", brightnes=1), "did you mean brightness"),
    (dict(name="noise", amount="much"), "noise.amount has a value of another kind"), ([dict(amount=1)], "a augmentation is not named|is not named"),
    (dict(name="flips", rng=3), "rng of the augmentation 'flips' is not set by hand")])
def test_what_cannot_be_is_one_line(spec, told):
    archive = TensorArchive(dict(s1=np.zeros((4, 2, 4, 4), "f4")))
    with pytest.raises((InputError, UnknownNameError), match=told) as e: ArchiveData(archive, augment=spec)
    assert "\n" not in str(e.value)
    with pytest.raises(InputError, match="a batch needs a view"): ArchiveData(archive, views=0)


def patches(**more):
    r = rng(11)
    return TensorArchive(dict(s1=r.normal(-14, 4, (20, 2, 8, 8)).astype("f4"), s2=r.gamma(4, 400, (20, 10, 8, 8)).astype("f4"),
                              rgb=r.integers(0, 256, (20, 3, 8, 8)).astype("uint8"), **more), dict(s1="s1", s2="s2", rgb="rgb", **dict.fromkeys(more, "s1")),
                         ids=[f"p{i}" for i in range(20)])


def test_flips_are_those_of_earlier_versions():
    "What `augment: true` gave before there were other augmentations, number by number."
    for archive, want in ((patches(), ["ae2342f54eb5c709", "b9b922fb1bfc36fc"]), (patches().subset(range(3, 19)), ["b11562ed376921ed", "ad5e4a8c088770e4"])):
        data = ArchiveData(archive, batch_size=6, seed=5)
        assert [content_hash(*[x for o in data.batches(e) for x in (o["id"], o["s1"], o["s2"], o["rgb"])]) for e in (0, 3)] == want


def test_views_are_independent_and_repeatable():
    args = dict(batch_size=10, seed=2, augment=["flips", "jitter"], views=3)
    one, two = (list(ArchiveData(patches(), **args).batches(4)) for _ in range(2))
    plain = list(ArchiveData(patches(), **{**args, "views": 1}).batches(4))
    for a_, b_, p in zip(one, two, plain, strict=True):
        assert set(a_) == {"id", "row", *(m + v for m in ("s1", "s2", "rgb") for v in ("", "_view", "_view2"))}
        for m in a_: assert a_[m] == b_[m] if m == "id" else torch.equal(a_[m], b_[m])
        for m in "s1", "s2", "rgb":
            assert torch.equal(a_[m], p[m]), "the first view does not depend on the others"
            assert not torch.equal(a_[m], a_[m + "_view"]) and not torch.equal(a_[m + "_view"], a_[m + "_view2"])
    gain = (one[0]["s2_view"].std((2, 3)) / one[0]["s1_view"].std((2, 3))[:, :1]).std(1)
    assert gain.isfinite().all()


def test_an_archive_s_own_views_stay():
    own = np.arange(20 * 2 * 64, dtype="f4").reshape(20, 2, 8, 8)
    data = ArchiveData(patches(s1_view=own), patches(s1_view=own), batch_size=10, modalities=["s1", "s2"], views=2, augment=False)
    assert data.modalities == ["s1", "s2", "s1_view"]
    batch = next(data.batches())
    assert torch.equal(batch["s1_view"], torch.from_numpy(own)[batch["row"]]) and torch.equal(batch["s2_view"], batch["s2"])
    flipped = next(ArchiveData(patches(s1_view=own), batch_size=10, modalities=["s1"], views=2).batches())
    assert set(flipped) == {"id", "row", "s1", "s1_view"} and not torch.equal(flipped["s1_view"], torch.from_numpy(own)[flipped["row"]])


class Eyes(pl.LightningModule):
    "Notes what it is shown."
    def __init__(self):
        super().__init__()
        self.weight, self.seen, self.checked = torch.nn.Parameter(torch.ones(1)), [], []
    def note(self, batch): return content_hash(*[batch[m] for m in ("s1", "s1_view", "rgb", "rgb_view")])
    def training_step(self, batch, i):
        assert batch["rgb"].dtype == torch.float32
        self.seen.append(self.note(batch))
        return (self.weight * batch["s1_view"].mean()).sum()
    def validation_step(self, batch, i):
        archive = patches()
        assert torch.equal(batch["rgb"], torch.stack([archive[o]["rgb"] for o in batch["id"]])), "as it is"
        self.checked.append((self.note(batch), torch.equal(batch["s1"], batch["s1_view"])))
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), 0.0)


def test_the_trainer_sees_views():
    eyes, make_data = Eyes(), lambda: ArchiveData(patches().subset(range(12)), patches().subset(range(12, 20)), batch_size=4, views=2, seed=3)
    pl.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, num_sanity_val_steps=0,
               enable_model_summary=False).fit(eyes, datamodule=make_data())
    assert eyes.seen == [eyes.note(o) for e in (0, 1) for o in make_data().batches(e)] and len(set(eyes.seen)) == 6
    assert eyes.checked[:2] == eyes.checked[2:] and not all(same for _, same in eyes.checked), "validation has the same views in every epoch"


def test_batches_of_a_class_sampler_are_augmented_apart():
    archive = patches()
    archive.table["labels"] = [["a"]] + [["b"]] * 19
    archive.vocab = a_vocab()
    data = ArchiveData(archive, batch_size=4, sampler="balanced", augment=["noise"])
    calls = []
    data.augment = lambda batch, rng: calls.append(rng.random()) or batch
    for epoch in range(20): list(data.batches(epoch))
    assert len(set(calls)) == len(calls) == 100


def a_vocab():
    from rsir_nb.data.classes import Vocab
    return Vocab("ab")


def test_an_augmentation_of_one_s_own():
    @AUGMENTATIONS.register("darker_in_a_test")
    def darker(batch, rng, by:float=1.0): return {**batch, "s1": batch["s1"] - by}
    try:
        batch = next(ArchiveData(patches(), batch_size=4, augment=dict(name="darker_in_a_test", by=3)).batches())
        torch.testing.assert_close(batch["s1"], collate([patches()[o] for o in batch["id"]])["s1"] - 3)
    finally: del AUGMENTATIONS.entries["darker_in_a_test"]
