"Samplers: by seed, epoch and clusters alone; whole batches on every device; what each promises about its batches."
import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from rsir_nb.core import InputError, UnknownNameError, make_rng
from rsir_nb.data.base import TensorArchive
from rsir_nb.data.module import ArchiveData
from rsir_nb.data.samplers import SAMPLERS, EpochSampler, RowSampler, make_sampler

pytestmark = pytest.mark.filterwarnings("ignore")


def make(labels=None, n=None):
    n = n or len(labels)
    return TensorArchive(dict(s1=np.arange(2 * n, dtype="f4").reshape(n, 2, 1, 1) - 50), ids=[f"p{i}" for i in range(n)], labels=labels)


def uneven(): return make([["a"]] * 100 + [["b"]] * 30 + [["c"]] * 10 + [["d"]] * 4)


def several(n=240, seed=0):
    y = np.random.default_rng(seed).random((n, 9)) < np.linspace(0.05, 0.6, 9)
    return make([[f"c{j}" for j in np.flatnonzero(row)] for row in y]), y


def batches(sampler, epoch=0):
    sampler.set_epoch(epoch)
    rows = list(sampler)
    assert len(rows) == len(sampler)
    return np.reshape(rows, (-1, sampler.batch_size))


SPECS = ["epoch", "balanced", dict(name="m_per_class", m=4), dict(name="clusters", within="balanced"), "clusters"]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_seed_and_epoch_decide(spec):
    archive = uneven()
    one, two = (make_sampler(spec, archive, 8, seed=5) for _ in range(2))
    clusters = np.arange(len(archive)) % 3
    if hasattr(one, "set_clusters"): one.set_clusters(clusters)
    two.load_state_dict(one.state_dict())
    batches(one, 0), batches(one, 1)
    state = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert np.array_equal(batches(one, 7), batches(two, 7)), "what came before does not matter"
    assert not np.array_equal(batches(one, 7), batches(one, 8))
    other = make_sampler(spec, archive, 8, seed=6)
    other.load_state_dict(one.state_dict())
    assert not np.array_equal(batches(one, 7), batches(other, 7))
    assert state == (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()), "global chance is left alone"


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("world", [2, 3])
def test_devices_have_equally_many_whole_batches(spec, world):
    archive = uneven()
    shares = [batches(make_sampler(spec, archive, 8, seed=5, num_replicas=world, rank=r), 3) for r in range(world)]
    assert {o.shape for o in shares} == {(144 // (8 * world), 8)}
    rows = np.concatenate(shares).ravel()
    if spec == "epoch": assert len(set(rows)) == len(rows)
    assert len({tuple(o) for s in shares for o in s}) == sum(map(len, shares)), "no batch is given to two"


@pytest.mark.parametrize("n,world", [(20, 2), (7, 2), (5, 3), (1, 2)])
def test_devices_share_one_order(n, world):
    archive = make(n=n)
    want = np.resize(make_rng(4, "order", 2).permutation(n), -(-n // world) * world)
    shares = [EpochSampler(archive, 100, seed=4, num_replicas=world, rank=r) for r in range(world)]
    for o in shares: o.set_epoch(2)
    assert [i for group in zip(*shares, strict=True) for i in group] == want.tolist()
    assert {len(o) for o in shares} == {-(-n // world)}, "there is no whole batch to be kept"


def test_every_patch_once_and_whole_batches():
    archive = make(n=21)
    rows = batches(EpochSampler(archive, 4, seed=1))
    assert rows.shape == (5, 4) and len(np.unique(rows)) == 20
    assert list(EpochSampler(archive, 4, shuffle=False)) == list(range(21))
    assert list(EpochSampler(archive, 4, shuffle=False, num_replicas=2, rank=1)) == [*range(1, 21, 2), 0]


def test_balanced_draws_all_classes_alike():
    archive = uneven()
    rows = batches(make_sampler("balanced", archive, 12))
    assert np.bincount(archive.targets[rows].ravel()).tolist() == [36] * 4
    assert all(np.bincount(archive.targets[row], minlength=4).tolist() == [3] * 4 for row in rows)
    assert all(len(set(row)) == 12 for row in rows), "none twice in a batch, as long as there are enough"
    seen = [set(rows[archive.targets[rows] == c]) for c in range(4)]
    assert [len(o) for o in seen] == [36, 30, 10, 4], "each patch of a class before any comes again"


def test_balanced_with_several_labels():
    archive, y = several()
    rows = batches(make_sampler("balanced", archive, 16))
    assert all(len(set(row)) == 16 for row in rows)
    plain, even = y.sum(0) / y.sum(), y[rows.ravel()].sum(0) / y[rows.ravel()].sum()
    assert even.min() > 1.5 * plain.min() and even.max() < plain.max(), (plain.round(3), even.round(3))
    assert y[rows.ravel()].sum(0).min() >= rows.size // 9 - 1


@pytest.mark.parametrize("m, size", [(2, 16), (4, 16), (1, 8), (3, 27)])
def test_m_of_each_class(m, size):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(40), np.random.default_rng(1).integers(4, 30, 40)))
    archive = make([[f"class {i:02}"] for i in labels])
    rows = batches(make_sampler(dict(name="m_per_class", m=m), archive, size), 2)
    for row in rows:
        classes, counts = np.unique(labels[row], return_counts=True)
        assert len(classes) == size // m and set(counts) == {m} and len(set(row)) == size
    turns = np.bincount(labels[rows].ravel(), minlength=40) // m
    assert turns.max() - turns.min() <= 1, "classes take turns"


@pytest.mark.parametrize("m, size", [(2, 18), (3, 18), (6, 54), (2, 8)])
def test_m_of_each_class_with_several_labels(m, size):
    archive, y = several()
    for epoch in range(3):
        for row in batches(make_sampler(dict(name="m_per_class", m=m), archive, size), epoch):
            assert len(set(row)) == size and (y[row].sum(0) >= m).sum() >= size // m


def test_a_tight_batch_is_filled_without_repeats():
    archive = make([["a", "b"]] * 6 + [["a"]] * 2 + [["b"]] * 2)
    for epoch in range(20):
        for row in batches(make_sampler(dict(name="m_per_class", m=5), archive, 10), epoch): assert sorted(row) == list(range(10))


def test_rare_classes(caplog):
    archive = make([["oak"]] * 5 + [["elm"]] * 4 + [["ash"]])
    with pytest.raises(InputError, match=r"1 of 3 classes have fewer than 2 patches; found 'ash' with 1; rare=skip"):
        make_sampler("m_per_class", archive, 4)
    rows = batches(make_sampler(dict(name="m_per_class", rare="skip"), archive, 4))
    assert 9 not in rows and "1 of 3 classes have fewer than 2 patches and are not drawn: 'ash' with 1" in caplog.text
    assert 9 in batches(make_sampler("balanced", archive, 6)), "drawn again and again"


def test_patches_without_a_label_are_counted(caplog):
    archive = make([["a"], ["b"], [], ["a"], ["b"], []] * 4)
    rows = batches(make_sampler("balanced", archive, 4))
    assert not set(rows.ravel()) & set(range(2, 24, 3)) and "8 of 24 patches have no label and are not drawn" in caplog.text


def test_clusters():
    archive, clusters = make(n=200), np.repeat([3, 7, 9], [120, 70, 10])
    sampler = make_sampler("clusters", archive, 10, seed=1)
    assert len(np.unique(batches(sampler))) == 200, "at first the archive is one cluster"
    sampler.set_clusters(clusters)
    total = np.zeros(10, int)
    for epoch in range(40):
        rows = batches(sampler, epoch)
        assert rows.shape == (20, 10) and all(len(set(clusters[row])) == 1 and len(set(row)) == 10 for row in rows)
        total += np.bincount(clusters[rows[:, 0]], minlength=10)
    assert total[[3, 7, 9]].tolist() == [480, 280, 40], "in proportion to their size"
    assert len(set(clusters[rows[:10, 0]])) > 1, "mixed"
    sampler.set_clusters(torch.from_numpy(clusters[::-1].copy()))
    assert np.array_equal(sampler.clusters, clusters[::-1])
    for bad in clusters[:5], clusters * 0.5, clusters[:, None]:
        with pytest.raises(InputError, match="a whole number for each patch, .200,."): sampler.set_clusters(bad)


def test_small_clusters_have_their_turn():
    archive, clusters = make(n=100), np.repeat([0, 1], [97, 3])
    sampler = make_sampler("clusters", archive, 10)
    sampler.set_clusters(clusters)
    epochs = [batches(sampler, e) for e in range(100)]
    turns = sum((clusters[o] == 1).all(1).sum() for o in epochs)
    assert {len(o) for o in epochs} == {10} and 20 <= turns <= 40, turns


def test_within_a_cluster():
    archive = uneven()
    sampler = make_sampler(dict(name="clusters", within=dict(name="m_per_class", m=2)), archive, 8)
    sampler.set_clusters(np.arange(144) % 2)
    for row in batches(sampler):
        assert len(set(row % 2)) == 1 and np.bincount(archive.targets[row]).tolist() == [2] * 4


@pytest.mark.parametrize("spec, told", [
    ("balance", "did you mean balanced"), (dict(name="m_per_class", n=3), "no argument of sampler 'm_per_class' is called 'n'"),
    (dict(name="m_per_class", rare="repeat"), "'error' or 'skip'"), (dict(name="m_per_class", m=5), "a multiple of m"),
    (dict(name="m_per_class", m=1), "too few classes for such a batch; found 4 with 1 patches or more; wanted 8"),
    (dict(name="epoch", rank=1), "rank of the sampler 'epoch' is not set by hand"), (dict(m=3), "is not named"),
    (dict(name="clusters", within="balancd"), "did you mean balanced")])
def test_what_cannot_be_is_one_line(spec, told):
    with pytest.raises((InputError, UnknownNameError), match=told) as e: list(make_sampler(spec, uneven(), 8))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("spec", ["balanced", "m_per_class"])
def test_labels_are_needed(spec):
    for archive in make(n=9), make([[]] * 9):
        with pytest.raises(InputError, match="cannot be drawn by class; found an archive without labels.*choose the sampler 'epoch'"):
            ArchiveData(archive, batch_size=4, sampler=spec)


class Eyes(pl.LightningModule):
    "Notes the rows it is shown."
    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.ones(1)), []
    def training_step(self, batch, i):
        self.seen.append((self.current_epoch, tuple(batch["row"].tolist())))
        return (self.weight * batch["s1"].mean()).sum()
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), 0.0)


def trainer(epochs):
    return pl.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_draws_the_same(tmp_path, workers):
    archive = make(n=60)

    def data():
        "Clusters that are made every second epoch and are known to the checkpoint alone in between."
        found = ArchiveData(archive, batch_size=4, seed=3, sampler="clusters", num_workers=workers)
        def renew(epoch, sampler):
            if epoch % 2 == 0: sampler.set_clusters((np.arange(60) + epoch) // 2 % (3 + epoch))
        found.before_epoch = renew
        return found

    whole, first, second = Eyes(), Eyes(), Eyes()
    trainer(4).fit(whole, datamodule=data())
    t = trainer(3)
    t.fit(first, datamodule=data())
    t.save_checkpoint(tmp_path / "a.ckpt")
    trainer(4).fit(second, datamodule=data(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert whole.seen == first.seen + second.seen and len(second.seen) == 15
    clusters = (np.arange(60) + 2) // 2 % 5
    assert all(len(set(clusters[list(rows)])) == 1 for epoch, rows in whole.seen if epoch >= 2)


def test_a_resumed_run_with_workers_has_the_epoch_s_order(tmp_path):
    make_data = lambda: ArchiveData(make(n=14), batch_size=4, seed=3, num_workers=2)
    first, second = Eyes(), Eyes()
    t = trainer(2)
    t.fit(first, datamodule=make_data())
    t.save_checkpoint(tmp_path / "a.ckpt")
    trainer(3).fit(second, datamodule=make_data(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert [list(rows) for _, rows in second.seen] == [o["row"].tolist() for o in make_data().batches(2)]


def test_a_sampler_of_one_s_own():
    @SAMPLERS.register("by_hand_in_a_test")
    class Backwards(RowSampler):
        "From the last to the first."
        def __init__(self, archive, batch_size, *, skip:int=0, **place):
            super().__init__(archive, batch_size, **place)
            self.skip = skip
        def draw(self, rng, n): return np.arange(len(self.archive))[::-1][self.skip:][:n * self.batch_size].reshape(n, -1)
    try:
        data = ArchiveData(make(n=9), batch_size=4, sampler=dict(name="by_hand_in_a_test", skip=1))
        assert [o["row"].tolist() for o in data.batches(5)] == [[7, 6, 5, 4], [3, 2, 1, 0]]
    finally: del SAMPLERS.entries["by_hand_in_a_test"]
