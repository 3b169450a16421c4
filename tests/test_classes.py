"Labels as pairs of row and class: targets, counts, and no matrix of rows x classes anywhere on the data's side."
import tracemalloc

import numpy as np
import pandas as pd
import pytest
import torch

from rsir_nb.core import InputError
from rsir_nb.data.base import Archive, TensorArchive, concat_archives
from rsir_nb.data.classes import DENSE_CLASSES, Labels, Vocab
from rsir_nb.data.module import ArchiveData
from rsir_nb.data.samplers import make_sampler
from rsir_nb.data.splits import balanced_subset, group_split, stratified_split
from rsir_nb.data.store import PatchStore, write_store


def make(labels, prefix="p", **kw):
    n = len(labels)
    s1 = np.random.default_rng(0).normal(-14, 3, (n, 2, 4, 4)).astype("f4")
    return TensorArchive(dict(s1=s1), ids=[f"{prefix}{i}" for i in range(n)], labels=labels, **kw)


def test_pairs_against_a_matrix_made_by_hand():
    rng = np.random.default_rng(3)
    vocab = Vocab([f"c{i}" for i in range(30)])
    want = rng.random((200, 30)) < 0.1
    lists = [[f"C{j}" for j in rng.permutation(np.flatnonzero(row))] * int(rng.integers(1, 3)) or None for row in want]
    labels = Labels(lists, vocab)
    assert np.array_equal(labels.dense(), want) and labels.dense().dtype == np.uint8
    assert np.array_equal(labels.counts(), want.sum(0)) and labels.counts().dtype == np.int64
    assert list(zip(labels.rows, labels.classes, strict=True)) == list(zip(*np.nonzero(want), strict=True))
    assert labels.targets() is None
    assert Labels([], vocab).targets() is None and Labels([None, []], vocab).targets() is None


def test_targets_are_class_numbers_where_each_patch_has_one():
    archive = make([["b"], ["a"], [], ["b"]])
    assert archive.targets.dtype == np.int64 and archive.targets.tolist() == [1, 0, -1, 1]
    assert archive.class_counts().tolist() == [1, 2]
    assert [int(archive[i]["target"]) for i in range(4)] == [1, 0, -1, 1] and archive[0]["target"].dtype == torch.int64
    assert archive[0]["labels"].tolist() == [0, 1]
    several = make([["b"], ["a", "b"], ["a"], ["b"]])
    assert several.targets is None and "target" not in several[0]
    plain = TensorArchive(dict(s1=archive.arrays["s1"]))
    assert plain.targets is None and plain.labels is None and plain.known_labels is None and "target" not in plain[0]
    with pytest.raises(InputError, match="no labels"): plain.class_counts()


def test_parts_and_sums_keep_to_the_whole():
    several = make([["b"], ["a", "b"], ["a"], ["b"]])
    part = several.subset([0, 2])
    assert part.targets is None, "a part of an archive with several labels has no targets, even if its own patches could"
    single = make([["b"], ["a"], [], ["b"]], "q")
    part = single.subset([3, 2, 1])
    assert part.targets.tolist() == [1, -1, 0] and part.subset([2, 0]).targets.tolist() == [0, 1]
    assert part.class_counts().tolist() == [1, 1] and int(part[0]["target"]) == 1
    both = concat_archives([single, make([["a"]], "r", vocab=Vocab("ab"))])
    assert both.targets.tolist() == [1, 0, -1, 1, 0]
    assert concat_archives([single, several]).targets is None


def test_a_store_keeps_targets(tmp_path):
    archive = make([["b"], ["a"], [], ["b"]])
    write_store(archive, tmp_path / "store", size=4, progress=False)
    back = PatchStore(tmp_path / "store")
    assert back.targets.tolist() == archive.targets.tolist() and int(back[3]["target"]) == 1


class Blank(Archive):
    "An archive whose pixels cost nothing."
    def read(self, i): return dict(rgb=np.full((3, 2, 2), i % 251, np.uint8))


def test_thirty_five_thousand_classes_are_never_a_matrix():
    n, n_classes = 330_000, 35_000
    vocab = Vocab(f"class {i}" for i in range(n_classes))
    want = np.random.default_rng(0).integers(n_classes, size=n)
    table = pd.DataFrame(dict(id=np.arange(n).astype(str), split=np.where(np.arange(n) % 10 == 0, "val", "train")))
    table["labels"] = pd.Series([[vocab.names[i]] for i in want], dtype=object)
    tracemalloc.start()
    try:
        archive = Blank(table, dict(rgb="rgb"), vocab)
        assert np.array_equal(archive.targets, want)
        assert np.array_equal(archive.class_counts(), np.bincount(want, minlength=n_classes))
        train = archive.split("train")
        assert np.array_equal(train.targets, want[np.arange(n) % 10 != 0])
        data = ArchiveData(train, batch_size=256)
        batch = next(data.batches())
        assert torch.equal(batch["target"], torch.as_tensor(train.targets)[batch["row"]]) and "labels" not in batch
        for spec in "balanced", dict(name="m_per_class", m=4, rare="skip"), dict(name="clusters", within="balanced"):
            assert len(list(make_sampler(spec, train, 256))) == len(train) // 256 * 256
        with pytest.raises(InputError, match="330,000 patches x 35,000 classes.*use targets"): len(archive.labels)
        peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert peak < n * n_classes / 100, f"{peak/1e6:.0f} MB at the most; the matrix has {n*n_classes/1e6:.0f}"


def test_splits_of_many_classes():
    want = np.random.default_rng(0).integers(5_000, size=20_000)
    table = pd.DataFrame(dict(id=np.arange(20_000).astype(str), labels=pd.Series([[f"class {i}"] for i in want], dtype=object)))
    chosen = balanced_subset(table, n=1)
    assert len(chosen) == len(np.unique(want)) == len(np.unique(want[chosen]))
    halves = stratified_split(table, "labels", fractions=dict(a=1, b=1)) == "a"
    counts = np.bincount(want)
    assert (abs(2 * np.bincount(want[halves], minlength=5_000) - counts) <= 1).all()
    with pytest.raises(InputError, match="found 4,.* in 20,000 groups.*by=None"): group_split(table, group="id", tries=1)


def test_the_limit_of_dense_labels():
    for k in DENSE_CLASSES, DENSE_CLASSES + 1:
        archive = make([["x1"], ["x0"]], vocab=Vocab(f"x{i}" for i in range(k)))
        assert ("labels" in archive[0]) == (k == DENSE_CLASSES) and int(archive[0]["target"]) == 1
        if k == DENSE_CLASSES: assert archive.labels.shape == (2, k)
        else:
            with pytest.raises(InputError, match="use targets"): len(archive.labels)
