"Evaluation: protocols and directions against plain loops, baselines, margins, the run's own config."
import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score

from engine_run import tiny_config
from rsir_nb.cli import main
from rsir_nb.core import InputError, UnknownNameError
from rsir_nb.engine.encode import encode, encode_run
from rsir_nb.engine.evaluate import BASELINES, evaluate, evaluate_store, make_baseline
from rsir_nb.engine.evaluation import load_evaluation
from rsir_nb.engine.hash import train_hash
from rsir_nb.engine.protocols import (PROTOCOLS, Protocol, System, directions, get_protocol, rank_direction,
                                      store_labels)
from rsir_nb.engine.scoring import compare, score_direction, tabulate
from rsir_nb.engine.parts import build_archive, build_method, load_method
from rsir_nb.engine.train import pretrain
from rsir_nb.retrieval.codes import CodeStore


KEPT = {"scores.csv", "margins.csv", "partners.csv", "speed.csv", "queries.parquet", "ranks.parquet", "evaluation.json"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A trained run with hash heads."
    cfg = tiny_config(tmp_path_factory.mktemp("evaluate")/"run", "optim.epochs=1")
    pretrain(cfg, progress=False)
    train_hash(cfg.out, progress=False)
    return cfg


@pytest.fixture(scope="module")
def archive(run): return build_archive(run.data)


@pytest.fixture(scope="module")
def store(run): return encode_run(run.out, progress=False)


@pytest.fixture(scope="module")
def found(run): return evaluate(run.out, progress=False)


def by_hand(store, protocol, s, t, k, depth=None):
    "M1 precision and recall, and mAP over the whole ranking or to a depth, by the loops of a textbook."
    o, table = PROTOCOLS[protocol], store.table
    labels = [set(x) for x in table["labels"]]
    precision, recall, ap = [], [], []
    for q in np.flatnonzero(table["split"] == o.query):
        items = [i for i in np.flatnonzero(table["split"] == o.archive) if not (o.leave_out and i == q)]
        if o.exclude_group: items = [i for i in items if table[o.exclude_group][i] != table[o.exclude_group][q]]
        d = [bin(int.from_bytes(store.codes[s][q].tobytes(), "big") ^
                 int.from_bytes(store.codes[t][i].tobytes(), "big")).count("1") for i in items]
        order = [items[i] for i in np.argsort(d, kind="stable")]
        precision.append(np.mean([len(labels[q] & labels[i])/len(labels[i]) for i in order[:k]]))
        recall.append(np.mean([len(labels[q] & labels[i])/len(labels[q]) for i in order[:k]]))
        rel = [bool(labels[q] & labels[i]) for i in order]
        if depth is None: ap.append(average_precision_score(rel, -np.arange(len(rel))) if any(rel) else 0)
        else: ap.append(sum(np.mean(rel[:i + 1]) for i in range(depth) if rel[i])/max(1, min(depth, sum(rel))))
    p, r = np.mean(precision), np.mean(recall)
    return dict(m1_precision=p, m1_recall=r, m1_f1=2*p*r/(p + r), map=np.mean(ap))


@pytest.mark.parametrize("protocol", list(PROTOCOLS))
def test_scores_of_binary_codes_against_plain_loops(store, protocol, monkeypatch):
    o = PROTOCOLS[protocol]
    if o.query == "query":   # the splits that vessel archives have
        named = store.table["split"].replace(dict(val=o.query, test=o.archive))
        monkeypatch.setitem(store.table, "split", named)
    found = evaluate_store(store, protocol, "ours", drawings=20)
    assert set(found.table.direction) == {"s1->s1", "s1->s2", "s2->s1", "s2->s2"}
    k = min(min(PROTOCOLS[protocol].ks), found.table.k.max())
    for name in set(found.table.direction):
        rows = found.table[(found.table.kind == "binary") & (found.table.direction == name)]
        whole = rows[rows.k == rows.k.max()].set_index("metric")["value"]
        at_k = rows[rows.k == k].set_index("metric")["value"]
        depth = rows.k.max() if o.exclude_group else None   # groups of several sizes: as deep as all can look
        wanted = by_hand(store, protocol, *name.split("->"), k, depth)
        assert np.isclose(whole["map"], wanted.pop("map"))
        for metric, value in wanted.items(): assert np.isclose(at_k[metric], value), (name, metric)


def test_tidy_table(found, store):
    t = found.table
    assert list(t.columns[:5]) == ["system", "kind", "n_bits", "direction", "metric"]
    assert {"k", "value", "ci_low", "ci_high", "n_queries", "n_places", "n_items"} <= set(t.columns)
    assert set(map(tuple, t[["system", "kind", "n_bits"]].drop_duplicates().values.tolist())) == {
        ("csmae", "binary", 16), ("csmae", "float", 0), ("band_statistics", "float", 0), ("band_cca", "float", 0),
        ("untrained", "float", 0), ("chance", "random", 0)}
    assert ((t.ci_low <= t.value + 1e-9) & (t.value <= t.ci_high + 1e-9)).all()
    assert not t.duplicated(["system", "kind", "direction", "metric", "k"]).any()
    within = t[t.system == "band_statistics"].direction.unique()
    assert sorted(within) == ["s1->s1", "s2->s2"]   # its embeddings of two sensors cannot be compared
    val = store.table[store.table.split == "val"]
    assert t.n_queries.eq(len(val)).all() and t.n_places.eq(val.place.nunique()).all()


def test_margins_are_paired_differences(found, store, run, archive):
    m = found.margins.set_index(["system", "kind", "direction"])
    wide = found.pivot("map")
    for (system, kind, name), row in m.iterrows():
        assert np.isclose(row.difference, wide.loc["csmae, binary", name] - wide.loc[f"{system}, {kind}", name])
        assert row.ci_low <= row.difference <= row.ci_high
    same = compare([score_direction(System(o, store, "binary"), directions(store, "csmae")[0], (10,))
                    for o in ("a", "b")], ("a", "binary"))
    assert same[["difference", "ci_low", "ci_high"]].eq(0).all(axis=None)


def test_leave_one_out_removes_by_id_and_not_by_rank(tmp_path, store, run):
    rows = np.flatnonzero(store.table["split"] == "test")
    twins = {m: np.repeat(np.asarray(x[rows[:1]]), len(rows), axis=0) for m, x in store.codes.items()}
    table = store.table.iloc[rows].drop(columns=["has_s1", "has_s2"])
    flat = CodeStore.write(tmp_path/"twins", twins, table, store.weights_hash, provenance=dict(classes=store.provenance["classes"]))
    d = directions(flat, "leave_one_out")[1]
    dists, ids = rank_direction(System("twins", flat, "binary"), d, 1000)
    n = len(rows)
    assert ids.tolist() == [[j for j in range(n) if j != i] for i in range(n)] and np.ptp(dists) == 0


def test_float_embeddings_across_sensors(store):
    d = directions(store, "csmae")[1]
    z = {m: np.float64(np.float32(store.embeddings[m])) for m in ("s1", "s2")}
    z = {m: x/np.linalg.norm(x, axis=1, keepdims=True) for m, x in z.items()}
    _, ids = rank_direction(System("ours", store, "float"), d, 7)
    assert np.array_equal(ids, np.argsort(-(z["s1"][d.queries] @ z["s2"][d.items].T), axis=1, kind="stable")[:, :7])


def test_chance_is_the_share_of_relevant_patches(found, store):
    labels, table = store_labels(store), store.table
    rel = labels[table.split == "val"].astype(int) @ labels[table.split == "test"].T > 0
    got = found.table.query("kind == 'random' and metric == 'precision' and direction == 's1->s2'")
    assert np.isclose(got[got.k == got.k.max()]["value"].item(), rel.mean())


def test_depth_and_metrics_can_be_chosen(store):
    found = evaluate_store(store, "csmae", depth=5, metrics=["map", "m1_f1"], drawings=20)
    assert found.depth == "the first 5 of 16 hits" and found.table.k.max() == 5 and set(found.table.metric) == {"map", "m1_precision", "m1_recall", "m1_f1"}
    own = evaluate_store(store, Protocol("test", "train", (3,), "mine"), drawings=20)
    assert 3 in set(own.table.k)


def test_only_what_was_measured_is_drawn(store, tmp_path):
    few = evaluate_store(store, "csmae", metrics=["ndcg"], drawings=20)
    assert set(few.table.metric) == {"map", "ndcg"} and set(few.margins.metric) == {"map"} and few.curves == []
    few.save(tmp_path/"few")
    assert {o.name for o in (tmp_path/"few").iterdir()} == KEPT
    with pytest.raises(InputError, match="no curve of precision"): few.show_curves()


def test_it_is_read_again_and_made_again_when_asked_otherwise(run, found):
    folder = f"{run.out}/evaluation/csmae"
    names = {*KEPT, "precision.png", "recall.png"}
    import os
    assert set(os.listdir(folder)) == names
    before = os.stat(f"{folder}/scores.csv").st_mtime_ns
    again = evaluate(run.out, progress=False)
    assert os.stat(f"{folder}/scores.csv").st_mtime_ns == before
    pd.testing.assert_frame_equal(again.table, found.table, check_dtype=False)
    pd.testing.assert_frame_equal(load_evaluation(folder).margins, found.margins, check_dtype=False)
    evaluate(run.out, progress=False, protocol="da4dte", baselines=[])
    assert os.path.isdir(f"{run.out}/evaluation/da4dte")


def test_the_runs_own_config_decides(tmp_path):
    cfg = tiny_config(tmp_path/"run", "optim.epochs=1", "evaluate.protocol=leave_one_out", "evaluate.baselines=[random]",
                      "evaluate.depth=6")
    pretrain(cfg, progress=False)
    found = evaluate(tmp_path/"run", progress=False)   # without hash heads: embeddings alone
    assert found.about["protocol"] == "leave_one_out" and set(found.table.kind) == {"float", "random"}
    assert found.table.k.max() == 6 and found.about["ours"] == ["csmae", "float"]


def test_mistakes_are_named(run, store, tmp_path):
    with pytest.raises(UnknownNameError, match="did you mean csmae"): get_protocol("csma")
    with pytest.raises(UnknownNameError, match="did you mean csmae"): evaluate(run.out, protocol="csmea", progress=False)
    with pytest.raises(UnknownNameError, match="drawings"): evaluate(run.out, drawing=3)
    bare = store.table.drop(columns=["labels", "has_s1", "has_s2"])
    bare = CodeStore.write(tmp_path/"bare", dict(store.codes), bare, store.weights_hash)
    with pytest.raises(InputError, match="have no labels"): store_labels(bare)
    one = CodeStore.write(tmp_path/"one", dict(s2=store.codes["s2"]), bare.table.drop(columns=["has_s1", "has_s2"]), "w")
    with pytest.raises(InputError, match="have no labels, and no two sensors.*found sensors s2"): evaluate_store(one)
    only = store.table.drop(columns=["has_s1", "has_s2"]).assign(split="test")
    only = CodeStore.write(tmp_path/"only", dict(store.codes), only, store.weights_hash)
    with pytest.raises(UnknownNameError, match="split"): evaluate_store(only, "csmae")
    with pytest.raises(UnknownNameError, match="metric"): evaluate_store(store, metrics=["mapp"])


def test_archives_without_splits_are_one(tmp_path, store):
    whole = store.table.drop(columns=["has_s1", "has_s2", "split"])
    whole = CodeStore.write(tmp_path/"whole", dict(store.codes), whole, store.weights_hash)
    found = evaluate_store(whole, "leave_one_out", drawings=20)
    assert found.table.n_queries.eq(48).all() and found.table.k.max() == 47 and found.depth == "the whole ranking"


def test_baselines_see_the_training_split_only(run, archive):
    fitted = make_baseline("band_statistics", run, archive)
    alone = make_baseline("band_statistics", run, archive.split("train"))
    assert fitted.weights_hash == alone.weights_hash
    assert make_baseline("untrained", run, archive).weights_hash == build_method(run, archive).weights_hash
    assert list(BASELINES) == ["band_statistics", "band_cca", "untrained", "random"]


def test_a_baseline_that_cannot_be_had_is_told(tmp_path, run, archive, caplog):
    from rsir_nb.data.base import TensorArchive
    import torch
    x = torch.stack([archive[i]["s2"] for i in range(len(archive))])
    one = TensorArchive({"s2": x}, labels=archive.table["labels"], split=archive.table["split"].tolist())
    cfg = tiny_config(tmp_path/"run", "method=band_statistics", "evaluate.baselines=[band_cca,band_statistics,random]")
    cfg.out = str(tmp_path/"run")
    pretrain(cfg, progress=False)
    method = load_method(cfg.out)
    assert encode(method, one, tmp_path/"codes", progress=False).modalities == ["s2"]
    with caplog.at_level(logging.INFO): found = evaluate(cfg.out, one, progress=False, drawings=20) \
        if not (tmp_path/"run"/"codes").exists() else None
    assert "band_cca is left out" in caplog.text and "is the baseline band_statistics itself" in caplog.text
    assert set(found.table.system) == {"band_statistics", "chance"}


def test_tabulate_keeps_every_query(store):
    r = score_direction(System("ours", store, "binary"), directions(store, "csmae")[2], (10,))
    t = tabulate([r], drawings=20)
    assert np.isclose(t[(t.metric == "map") & (t.k == 10)]["value"].item(), r.scores["map"][:, r.ks.index(10)].mean())
    assert len(json.loads(t.to_json())) == len(t.columns)


def test_nobody_is_its_own_answer_in_an_archive_without_splits(store, monkeypatch):
    monkeypatch.setattr("rsir_nb.engine.protocols._in_split", lambda store, name: np.ones(len(store), bool))
    for d in directions(store, "csmae"): assert np.array_equal(d.items[d.own], d.queries)


def test_the_summary_has_scores_latency_and_size(run, found, store):
    table = found.summary()
    assert list(table.columns[:4]) == ["system", "direction", "P@1", "P@10"] and table.columns[-3:].tolist() == ["ms median", "ms p95", "bytes"]
    pairs = found.table[["system", "kind", "direction"]].drop_duplicates()
    assert len(table) == len(pairs)
    for o, (system, kind, direction) in zip(table.itertuples(index=False), pairs.itertuples(index=False), strict=True):
        mine = found.table[(found.table.system == system) & (found.table.kind == kind) & (found.table.direction == direction)]
        scores = {(r.metric, r.k): r for r in mine.itertuples()}
        deepest = mine.k.max()
        for text, metric, k in (o[2], "precision", 1), (o[3], "precision", min(10, deepest)), (o[4], "map", deepest), (o[5], "m1_f1", min(10, deepest)):
            r = scores[metric, k]
            assert text == f"{r.value:.3f} [{r.ci_low:.3f}, {r.ci_high:.3f}]"
        source, target = direction.split("->")
        within = source == target or (system, kind) == ("band_statistics", "float")
        assert (o[6] == "-") == within and (within or 0 <= float(o[6].split()[0]) <= 1)   # partner R@10
        if kind == "random": assert o[7:] == ("-", "-", "-")
        else: assert 0 < float(o[7]) + 0.005 and float(o[7]) <= float(o[8])
    speed = found.speed.set_index(["system", "kind"])
    assert set(speed.loc[("csmae", "binary"), "bytes"]) == {store.n_bits//8}
    assert set(speed.loc[("csmae", "float"), "bytes"]) == {4*next(iter(store.embeddings.values())).shape[1]}
    again = load_evaluation(Path(run.out)/"evaluation"/found.about["protocol"])
    pd.testing.assert_frame_equal(again.summary(), table)


def test_an_evaluation_without_measured_times_shows_dashes(found):
    assert set(replace(found, speed=None).summary()["ms median"]) == {"-"}


def test_depths_of_the_summary_are_chosen_and_checked(run, capsys):
    assert main(["evaluate", str(run.out), "evaluate.ks=[5,2]", "evaluate.baselines=[random]", "evaluate.drawings=20"]) == 0
    out = capsys.readouterr().out
    assert "P@2" in out and "P@5" in out and "P@10" not in out
    assert out.index("P@2") < out.index("difference"), "scores come before margins"
    for bad in "[0]", "[]", "[true]", "[1.5]":
        assert main(["evaluate", str(run.out), f"evaluate.ks={bad}"]) == 2
        assert "evaluate.ks" in capsys.readouterr().err
    evaluate(run.out, progress=False)


def test_an_evaluation_in_which_nothing_was_timed_is_read_again(store, tmp_path):
    protocol = Protocol("test", "test", (2,), "test", leave_out=True, exclude_group="place")
    found = evaluate_store(store, protocol, metrics=["precision"], drawings=20)
    assert len(found.speed) == 0 and set(found.summary()["bytes"]) == {"-"}
    found.save(tmp_path/"few")
    pd.testing.assert_frame_equal(load_evaluation(tmp_path/"few").summary(), found.summary())
