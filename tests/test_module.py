"The data module's batches depend on the seed and the epoch, and on nothing else."
import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from rsir_nb.core import InputError
from rsir_nb.data.base import TensorArchive, concat_archives
from rsir_nb.data.batches import collate
from rsir_nb.data.module import ArchiveData
from rsir_nb.data.transforms import random_crop

pytestmark = pytest.mark.filterwarnings("ignore")


def make(n=20, prefix="p"):
    rng = np.random.default_rng(0)
    return TensorArchive(dict(s1=rng.normal(-14, 4, (n, 2, 8, 8)).astype("f4"), s2=rng.gamma(4, 400, (n, 10, 8, 8)).astype("f4")),
                         ids=[f"{prefix}{i}" for i in range(n)], labels=[["a"], ["b"]] * (n // 2))


class Eyes(pl.LightningModule):
    "A model that notes what it is shown, and whose loss depends on all of it."
    def __init__(self):
        super().__init__()
        self.weight, self.seen, self.validated = torch.nn.Parameter(torch.ones(1)), [], []
    def training_step(self, batch, i):
        loss = (self.weight * batch["s1"][:, :, 0].mean() / 14) ** 2
        self.seen.append((self.current_epoch, tuple(batch["id"]), float(batch["s2"][0, 0, 0, 0]), float(loss.detach())))
        return loss
    def validation_step(self, batch, i): self.validated.append((tuple(batch["id"]), float(batch["s2"][0, 0, 0, 0])))
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), 0.01)


def trainer(epochs, **kwargs):
    return pl.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False, **kwargs)


def test_a_resumed_run_sees_the_same(tmp_path):
    archive = make()
    make_data = lambda: ArchiveData(archive.subset(range(14)), archive.subset(range(14, 20)), batch_size=4, seed=3)
    whole = Eyes()
    trainer(4).fit(whole, datamodule=make_data())
    first = Eyes()
    t = trainer(2)
    t.fit(first, datamodule=make_data())
    t.save_checkpoint(tmp_path / "a.ckpt")
    torch.manual_seed(99)
    np.random.seed(99)
    second = Eyes()
    trainer(4).fit(second, datamodule=make_data(), ckpt_path=tmp_path / "a.ckpt", weights_only=False)
    assert whole.seen == first.seen + second.seen and len(whole.seen) == 12
    assert {o[1] for o in whole.seen if o[0] == 0} != {o[1] for o in whole.seen if o[0] == 1}
    want = [f"p{i}" for i in range(14, 20)]
    assert [id for ids, _ in whole.validated[-2:] for id in ids] == want
    assert whole.validated[-2][1] == float(archive["p14"]["s2"][0, 0, 0]), "validation is not augmented"


def test_batches_are_what_the_trainer_sees():
    data = ArchiveData(make(), batch_size=8, seed=1)
    eyes = Eyes()
    trainer(2).fit(eyes, datamodule=data)
    alone = ArchiveData(make(), batch_size=8, seed=1)
    assert [(e, i, x) for e, i, x, _ in eyes.seen] == [
        (e, tuple(o["id"]), float(o["s2"][0, 0, 0, 0])) for e in (0, 1) for o in alone.batches(e)]


@pytest.mark.slow
def test_workers_change_nothing():
    few, many = (list(ArchiveData(make(), batch_size=6, num_workers=n, seed=1).batches(2)) for n in (0, 2))
    assert [o["id"] for o in few] == [o["id"] for o in many]
    for a, b in zip(few, many, strict=True): torch.testing.assert_close(a["s2"], b["s2"], rtol=0, atol=0)


def test_chance_comes_from_the_seed_alone():
    def run(seed, epoch):
        torch.manual_seed(int(torch.randint(1000, (1,))))
        return [(o["id"], float(o["s1"][0, 0, 0, 0])) for o in ArchiveData(make(), batch_size=5, seed=seed).batches(epoch)]
    assert run(0, 0) == run(0, 0) and run(0, 0) != run(0, 1) and run(0, 1) != run(1, 0)
    state = torch.get_rng_state()
    list(ArchiveData(make(), batch_size=5).batches())
    assert torch.equal(state, torch.get_rng_state()), "global chance is left alone"


def test_augmentation_of_ones_own():
    data = ArchiveData(make(), batch_size=4, augment=lambda batch, rng: random_crop(batch, 5, rng))
    assert next(data.batches())["s2"].shape == (4, 10, 5, 5)
    plain = next(ArchiveData(make(), batch_size=4, augment=False).batches())
    torch.testing.assert_close(plain["s1"][2], make()[plain["id"][2]]["s1"])


def test_only_patches_with_all_sensors():
    radar = TensorArchive(dict(s1=make(4).arrays["s1"]), ids=list("wxyz"))
    both = concat_archives([make(), radar])
    assert len(ArchiveData(both).train) == 20 and len(ArchiveData(both, modalities=["s1"]).train) == 24
    batch = next(ArchiveData(both, batch_size=24, modalities=["s1"]).batches())
    assert set(batch) == {"id", "s1", "labels", "labelled", "target", "row"}, "labels of the others are kept"
    assert (batch["labelled"] == (batch["row"] < 20)).all() and (batch["labels"].sum(1) == batch["labelled"]).all()
    assert sorted(zip(batch["row"].tolist(), batch["id"], strict=True)) == list(enumerate(both.ids))
    assert all(batch["target"][batch["row"] >= 20] == -1) and all(batch["target"][batch["row"] < 20] >= 0)
    with pytest.raises(InputError, match="nothing to learn"): ArchiveData(both.subset(list("xyz")))
    assert [len(o["id"]) for o in ArchiveData(make(), batch_size=8).batches()] == [8, 8]
    assert [len(o["id"]) for o in ArchiveData(make(4), batch_size=8).batches()] == [4]
    assert ArchiveData(make()).val_dataloader() == []


def test_collate():
    a, b = make()[0], make()[1]
    assert collate([a, b])["labels"].tolist() == [[1, 0], [0, 1]]
    del b["s2"], a["s1"]
    with pytest.raises(InputError, match="no sensor in common"): collate([a, b])


def test_one_patch_without_labels_takes_them_from_no_other():
    samples = [make()[i] for i in range(3)]
    del samples[1]["labels"], samples[1]["target"]
    batch = collate(samples)
    assert batch["labels"].tolist() == [[1, 0], [0, 0], [1, 0]] and batch["labelled"].tolist() == [True, False, True]
    assert batch["target"].tolist() == [0, -1, 0] and "labelled" not in collate(samples[::2])
    assert "labels" not in collate(samples[1:2]) and collate(samples[1:2], n_classes=2)["labels"].tolist() == [[0, 0]]
    x = dict(s1=np.zeros((6, 2, 8, 8), "float32") - 15)
    known = TensorArchive(x, labels=[["a", "b"], ["b"], [], ["a"], [], []])
    known.table["labels"] = [["a", "b"], ["b"], None, None, None, None]   # ambiguous for targets: labels alone
    for archive in known, known.subset(range(6)):   # read at once, and patch by patch
        batches = list(ArchiveData(archive, batch_size=2, sampler=dict(name="epoch", shuffle=False), augment=False).batches())
        assert [o["labels"].shape for o in batches] == [(2, 2)]*3, "also where a whole batch has none"
        assert ["labelled" in o for o in batches] == [False, True, True] and not batches[2]["labelled"].any()


def test_patches_without_a_sensor_are_counted_in_the_log(caplog):
    x = np.random.default_rng(0).normal(size=(6, 2, 8, 8)).astype("float32") - 15
    s1, s2 = dict(s1=x), dict(s2=np.full((6, 10, 8, 8), 1000, "float32"))
    archive = concat_archives([TensorArchive({**s1, **s2}, ids=list("abcdef")), TensorArchive(s2, ids=list("ghijkl"))])
    data = ArchiveData(archive)
    assert len(data.train) == 6 and "6 of 12 patches are used, those with s1 and s2" in caplog.text
    caplog.clear()
    assert len(ArchiveData(archive, modalities=["s2"]).train) == 12 and not caplog.text
