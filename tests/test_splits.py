"""Splits: shares, strata, groups that stay together, balanced subsets and lists for others."""
import itertools
import json
import logging

import numpy as np
import pandas as pd
import pytest

from rsir_nb.core import InputError, UnknownNameError
from rsir_nb.data.splits import (balanced_subset, group_split, split_report, strata_of, stratified_split,
                                 write_split_lists)
from rsir_nb.data.vessels import read_split_lists


def make_table(n=400, seed=0, scenes=12):
    rng = np.random.default_rng(seed)
    count = rng.choice([0, 0, 0, 1, 2, 5, 14, 15, 40], n)
    return pd.DataFrame(dict(id=[f"p{i}" for i in range(n)], n_vessels=count, scene=rng.integers(scenes, size=n),
                             labels=[["vessel"] if o else ["no vessel"] for o in count]))


TABLE = make_table()


def test_published_strata():
    counts = pd.DataFrame(dict(n_vessels=[0, 1, 14, 15, 141]))
    assert strata_of(counts).tolist() == [0, 1, 1, 2, 2]
    assert strata_of(counts, edges=(1, 6)).tolist() == [0, 1, 2, 2, 2]
    assert strata_of(counts, edges=None).tolist() == [0, 1, 14, 15, 141]
    words = pd.DataFrame(dict(kind=["a", "b"], labels=[["y", "x"], ["x", "y"]]))
    assert strata_of(words, "kind").tolist() == ["a", "b"]
    assert len(set(strata_of(words, "labels"))) == 1
    with pytest.raises(InputError, match="have to rise"): strata_of(counts, edges=(3, 3))
    with pytest.raises(InputError, match="have to rise"): strata_of(counts, edges=())
    with pytest.raises(UnknownNameError): strata_of(counts, "n_vessel")
    with pytest.raises(InputError, match="2 of 3"): strata_of(pd.DataFrame(dict(n_vessels=[1, None, None])))


@pytest.mark.parametrize("fractions", [None, dict(a=1, b=1, c=2), dict(only=1)])
def test_every_stratum_is_shared_out(fractions):
    split, strata = stratified_split(TABLE, fractions=fractions, seed=3), strata_of(TABLE)
    want = fractions or dict(query=0.67, archive=0.33)
    for value in set(strata):
        here = split[strata == value]
        for name, part in want.items():
            assert abs((here == name).sum() - len(here)*part/sum(want.values())) < 1
    assert np.array_equal(split, stratified_split(TABLE, fractions=fractions, seed=3))
    if len(want) > 1: assert not np.array_equal(split, stratified_split(TABLE, fractions=fractions, seed=4))


def test_strata_do_not_disturb_each_other():
    grown = pd.concat([TABLE, pd.DataFrame(dict(n_vessels=[99]*7))], ignore_index=True)
    few = TABLE.n_vessels.to_numpy() < 15
    assert np.array_equal(stratified_split(TABLE)[few], stratified_split(grown)[:len(TABLE)][few])


@pytest.mark.parametrize("bad", [dict(a=0, b=1), dict(a=-1), dict(a=float("nan"))])
def test_bad_fractions(bad):
    for func in stratified_split, group_split:
        with pytest.raises(InputError, match="no fractions"): func(TABLE, fractions=bad)
    with pytest.raises(InputError, match="nothing to split"): stratified_split(TABLE[:0])


def test_groups_stay_together():
    split = group_split(TABLE, seed=0)
    assert TABLE.assign(s=split).groupby("scene").s.nunique().max() == 1
    assert np.array_equal(split, group_split(TABLE, seed=0))
    assert split_report(TABLE, split).with_sibling_elsewhere.tolist() == [0, 0]
    assert split_report(TABLE, stratified_split(TABLE)).with_sibling_elsewhere.min() == 1


def test_the_best_division_is_found():
    "Against all divisions of eight groups, by the largest distance of a class from its share."
    table = make_table(120, seed=1, scenes=8)
    def worst(at):
        query = np.isin(table.scene, [g for g in range(8) if at[g]])
        vessel = table.n_vessels > 0
        return max(abs(query[m].mean() - 0.67) for m in (vessel == vessel, vessel, ~vessel))
    best = min(worst(o) for o in itertools.product([0, 1], repeat=8) if 0 < sum(o) < 8)
    split = group_split(table, fractions=dict(query=0.67, archive=0.33))
    mine = worst([(split[table.scene == g] == "query").all() for g in range(8)])
    assert mine < best + 0.05


def test_impossible_groups(caplog):
    with pytest.raises(InputError, match="too few groups.*found 1"): group_split(TABLE.assign(scene="one"))
    with pytest.raises(InputError, match="too few groups"): group_split(TABLE, fractions={str(i): 1 for i in range(13)})
    with pytest.raises(InputError, match="not known for every patch"):
        group_split(TABLE.assign(scene=[None, *TABLE.scene[1:]]))
    with pytest.raises(UnknownNameError): group_split(TABLE, "port")
    with caplog.at_level(logging.WARNING):
        lonely = TABLE.assign(labels=[["rare"] if s == 0 else o for s, o in zip(TABLE.scene, TABLE.labels, strict=True)])
        group_split(lonely)
    assert "rare" in caplog.text and "no vessel" not in caplog.text
    split = group_split(TABLE, fractions={str(i): 1 for i in range(12)})
    assert TABLE.assign(s=split).groupby("s").scene.nunique().eq(1).all()


def test_multi_label_groups_and_unlabelled_rows():
    table = TABLE.assign(labels=[["a", "b"], None, ["b"], []]*100)
    split = group_split(table, by="labels", fractions=dict(x=1, y=1))
    both = [pd.Series(o).isin(["a"]).any() if o else False for o in table.labels]
    assert abs(np.mean(split[np.array(both)] == "x") - 0.5) < 0.2
    assert set(group_split(TABLE, by="n_vessels")) == set(group_split(TABLE, by=None)) == {"query", "archive"}


def test_balanced_subset():
    rows = balanced_subset(TABLE, seed=1)
    classes = TABLE.labels.iloc[rows].str[0].value_counts()
    rarest = TABLE.labels.str[0].value_counts().min()
    assert classes.eq(rarest).all() and (np.diff(rows) > 0).all()
    assert np.array_equal(rows, balanced_subset(TABLE, seed=1)) and not np.array_equal(rows, balanced_subset(TABLE))
    assert len(balanced_subset(TABLE, "n_vessels", n=5)) == 15
    with pytest.raises(InputError, match="nothing to balance"): balanced_subset(TABLE[TABLE.n_vessels > 0])
    for n in (0, rarest + 1):
        with pytest.raises(InputError, match="not every class"): balanced_subset(TABLE, n=n)


def test_report():
    report = split_report(TABLE, [*["q"]*100, *[None]*200, *["a"]*100])
    assert report.patches.tolist() == [100, 100] and report.index.tolist() == ["q", "a"]
    assert report.loc["q", "vessel"] == (TABLE.n_vessels[:100] > 0).sum()
    other = set(TABLE.scene[300:])
    assert report.loc["q", "with_sibling_elsewhere"] == TABLE.scene[:100].isin(other).mean()
    with pytest.raises(InputError, match="no patch is in a split"): split_report(TABLE, [None]*400)


def test_lists(tmp_path):
    split = stratified_split(TABLE)
    split[:3] = None
    paths = write_split_lists(TABLE.id, split, tmp_path/"deep"/"er")
    assert json.loads(paths["query"].read_text()) == TABLE.id[split == "query"].tolist()
    assert {k: len(v) for k, v in read_split_lists(paths).items()} == pd.Series(split).value_counts().to_dict()
    with pytest.raises(InputError, match="do not belong together"): write_split_lists(["a"], ["x", "y"], tmp_path)
    with pytest.raises(InputError, match="comes twice"): write_split_lists(["a", "a"], ["x", "y"], tmp_path)
    with pytest.raises(InputError, match="no patch is in a split"): write_split_lists(["a"], [None], tmp_path)
