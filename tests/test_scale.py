"Evaluation at scale: memory that a setting bounds, blocks that change nothing, one index a sensor, pictures of one direction."
import re
import subprocess
import sys
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from rsir_nb.core import InputError, MissingFileError, UnknownNameError
from rsir_nb.data.classes import Vocab
from rsir_nb.engine import evaluate as page
from rsir_nb.engine.evaluate import EvaluateConfig, evaluate_store
from rsir_nb.engine.evaluation import load_evaluation
from rsir_nb.engine.protocols import Protocol, System, directions, rank_direction, store_labels
from rsir_nb.engine.scoring import score_direction
from rsir_nb.retrieval.codes import CodeStore

CLASSES = list("ABCDEFG")


def make_store(folder, n_queries, n_items, sensors=("s1", "s2"), n_bits=64, places=None):
    "Codes that know something of the labels; the last sensor has not seen every tenth patch."
    rng, n = np.random.default_rng(0), n_queries + n_items
    labels = (rng.random((n, 7)) < 0.25).astype(np.uint8)
    mixing = rng.normal(size=(7, n_bits))
    codes = {m: np.packbits(labels @ mixing + 1.5*rng.normal(size=(n, n_bits)) > 0, axis=1) for m in sensors}
    table = pd.DataFrame(dict(id=[f"p{i}" for i in range(n)], labels=[[CLASSES[j] for j in np.flatnonzero(x)] for x in labels],
                              split=np.repeat(["val", "test"], [n_queries, n_items])))
    if places: table["place"] = [f"place {i % places}" for i in range(n)]
    seen = {m: np.ones(n, bool) for m in sensors}
    if len(sensors) > 1: seen[sensors[-1]] = np.arange(n) % 10 > 0
    return CodeStore.write(folder, codes, table, "made up", present=seen, provenance=dict(classes=CLASSES))


@pytest.fixture(scope="module")
def store(tmp_path_factory): return make_store(tmp_path_factory.mktemp("scale")/"codes", 300, 240, places=30)


PROTOCOLS = dict(splits="csmae", leave_one_out=Protocol("test", "test", (5,), "here", leave_out=True),
                 leave_group_out=Protocol("test", "test", (5,), "here", leave_out=True, exclude_group="place"))


@pytest.mark.parametrize("kind", ["binary", "random"])
@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_blocks_change_nothing(store, kind, protocol, monkeypatch):
    system = System("ours", store, kind)
    for d in directions(store, protocol):
        whole = score_direction(system, d, (5,), 60)
        with monkeypatch.context() as m:
            m.setattr("rsir_nb.engine.scoring._block", lambda depth, memory_mb: 7)
            blocks = score_direction(system, d, (5,), 60)
        assert whole.ks == blocks.ks and set(whole.scores) == set(blocks.scores)
        for name, x in whole.scores.items(): np.testing.assert_array_equal(x, blocks.scores[name])


def test_an_index_is_built_once_for_all_that_ends_there(store, monkeypatch):
    made, call = [], page.make_index
    monkeypatch.setattr(page, "make_index", lambda system, d: made.append((system.name, d.target)) or call(system, d))
    monkeypatch.setattr("rsir_nb.engine.protocols.make_index", lambda *args: pytest.fail("a second index"))
    found = evaluate_store(store, "csmae", "ours", drawings=10)
    assert made == [("ours", "s1"), ("ours", "s2")]
    assert list(found.table.direction.unique()) == ["s1->s1", "s1->s2", "s2->s1", "s2->s2"]
    monkeypatch.undo()
    for d in directions(store, "csmae"):
        alone = score_direction(System("ours", store, "binary"), d, (10,))
        rows = found.table[(found.table.direction == d.name) & (found.table.metric == "map")]
        np.testing.assert_allclose(rows["value"], np.nanmean(alone.scores["map"], axis=0), rtol=1e-12)


def test_labels_are_read_as_a_vocabulary_reads_them(store, tmp_path):
    wanted = np.stack([Vocab(CLASSES).encode(o).numpy() for o in store.table["labels"]])
    np.testing.assert_array_equal(store_labels(store), wanted)
    table = store.table.drop(columns=["has_s1", "has_s2"])
    lower = table.assign(labels=[[x.lower() for x in o] if i % 3 else None for i, o in enumerate(table["labels"])])
    lower = CodeStore.write(tmp_path/"lower", dict(store.codes), lower, "w", provenance=dict(classes=CLASSES))
    np.testing.assert_array_equal(store_labels(lower), wanted*(np.arange(len(wanted)) % 3 > 0)[:, None])
    wrong = CodeStore.write(tmp_path/"wrong", dict(store.codes), table.assign(labels=[["Z"]]*len(table)), "w",
                            provenance=dict(classes=CLASSES))
    with pytest.raises(UnknownNameError, match="Z"): store_labels(wrong)


def test_random_order_is_a_shuffle(store):
    d = directions(store, "csmae")[0]
    dists, ids = rank_direction(System("chance", store, "random"), d, 40, seed=1)
    assert all(len(set(row)) == 40 for row in ids) and (np.diff(dists, axis=1) > 0).all()
    again, other = (rank_direction(System("chance", store, "random"), d, 40, seed=s)[1] for s in (1, 2))
    assert np.array_equal(ids, again) and not np.array_equal(ids, other)
    hits = np.bincount(ids.ravel(), minlength=len(d.items))
    expected = ids.size/len(d.items)                               # 50 each, with a standard deviation of 6.5
    assert abs(hits - expected).max() < 6*np.sqrt(expected) and hits.std() < 1.5*np.sqrt(expected)
    first = np.bincount(ids[:, 0], minlength=len(d.items))
    assert first.max() < 10                                        # no item stands first for many queries


def test_a_progress_bar_over_all_queries(store, capfd):
    evaluate_store(store, "csmae", "ours", [System("chance", store, "random")], drawings=10, progress=True)
    text = capfd.readouterr().err
    assert "ours, binary, S1 → S2" in text and "chance, random, S2 → S2" in text
    total = 2*sum(len(d.queries) for d in directions(store, "csmae"))
    assert re.search(rf"{total}/{total}", text)


def test_what_is_kept_of_every_query(store, tmp_path):
    chance = System("chance", store, "random")
    found = evaluate_store(store, "csmae", "ours", [chance], depth=100, drawings=10)
    q = found.queries
    assert list(q.columns[:5]) == ["system", "kind", "direction", "id", "place"]
    assert {c.split("@")[1] for c in q.columns[5:]} == {"10", "100"}   # what is reported, and the deepest
    assert (q.dtypes.iloc[5:] == np.float32).all()
    for (system, kind, name), rows in q.groupby(["system", "kind", "direction"], observed=True):
        t = found.table
        t = t[(t.system == system) & (t.kind == kind) & (t.direction == name) & (t.k == 100)]
        for metric, value in t.set_index("metric")["value"].items():
            if metric != "m1_f1": assert rows[f"{metric}@100"].mean() == pytest.approx(value, abs=1e-6)
    found.save(tmp_path/"kept")
    again = load_evaluation(tmp_path/"kept")
    assert not isinstance(again.source, pd.DataFrame)                # nothing is read before it is asked for
    pd.testing.assert_frame_equal(again.queries, q)
    again.save(tmp_path/"kept")                                      # over the file that it was read from
    pd.testing.assert_frame_equal(load_evaluation(tmp_path/"kept").queries, q)
    (tmp_path/"kept/queries.parquet").unlink()
    with pytest.raises(MissingFileError, match="no scores of single queries"):
        assert len(load_evaluation(tmp_path/"kept").queries)


def test_one_direction_has_curves_too(tmp_path):
    one = evaluate_store(make_store(tmp_path/"one", 50, 80, ("s2",)), "csmae", "ours", drawings=10)
    for of in one.curves:
        axes = one.show_curves(of)
        assert len(axes) == 1 and axes[0].get_title("left") == "S2 → S2" and len(axes[0].lines) == 1
    one.save(tmp_path/"kept")
    assert len(load_evaluation(tmp_path/"kept").margins) == 0        # nothing to be better than
    assert {"precision.png", "recall.png"} <= {o.name for o in (tmp_path/"kept").iterdir()}


def test_settings_that_cannot_be():
    for bad in dict(memory_mb=0), dict(depth=0), dict(drawings=0):
        with pytest.raises(InputError, match="nothing can be evaluated"): EvaluateConfig(**bad)


MEASURE = """
import re, sys
from pathlib import Path
from rsir_nb.engine.evaluate import evaluate_store
from rsir_nb.retrieval import hamming
hamming._COMPILE_S = -1      # the small evaluation compiles the scan, so that its memory does not count in the large one
from rsir_nb.retrieval.codes import CodeStore
status = Path("/proc/self/status")   # ru_maxrss of a new process begins with its parent's
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", status.read_text())[1])*1024
evaluate_store(CodeStore(sys.argv[1]), "csmae", drawings=10)
before = peak()
evaluate_store(CodeStore(sys.argv[2]), "csmae", drawings=10, metrics=["map"], memory_mb=int(sys.argv[3]))
print(peak() - before)
"""


def test_memory_is_bounded_by_the_setting(tmp_path):
    make_store(tmp_path/"small", 100, 200, ("s2",))
    n = 40_000
    make_store(tmp_path/"large", n, 1500, ("s2",))
    def grown(memory_mb):
        args = [sys.executable, "-c", MEASURE, tmp_path/"small", tmp_path/"large", memory_mb]
        done = subprocess.run(list(map(str, args)), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        return int(done.stdout)
    rankings = n*1000*(8 + 4)                                        # ids and distances of all queries
    scores, table = n*11*8*4, 40*2**20                               # what is wanted, some copies, and the store's table
    bounded, unbounded = grown(16), grown(1024)
    assert bounded < 16*2**20 + scores + table < rankings/3
    assert unbounded > 2*bounded                                     # the setting is what makes the difference


def test_thirty_five_thousand_classes_are_no_matrix(tmp_path):
    rng, n, n_classes = np.random.default_rng(11), 20_000, 35_000
    classes = rng.integers(0, n_classes, n)
    classes[:500] = classes[500:1000]                                     # every query has an answer
    codes = np.packbits(rng.random((n, 64)) < 0.5, axis=1)
    codes[:500] = codes[500:1000]
    names = [f"class {i}" for i in range(n_classes)]
    table = pd.DataFrame(dict(id=[f"p{i}" for i in range(n)], labels=[[names[i]] for i in classes],
                              split=np.where(np.arange(n) < 500, "ask", "answer")))
    store = CodeStore.write(tmp_path/"many", dict(s2=codes), table, "w", provenance=dict(classes=names))
    evaluate_store(store, Protocol("ask", "answer", (10,), "mine"), depth=20, drawings=5)   # compiled
    tracemalloc.start()
    found = evaluate_store(store, Protocol("ask", "answer", (10,), "mine"), depth=20, drawings=5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150e6, f"{peak/1e6:.0f} MB; a matrix of classes and patches takes 700"
    value = found.table.set_index(["metric", "k"])["value"]
    assert value["precision", 1] == 1 and store_labels(store).dtype == np.int64
    np.testing.assert_array_equal(store_labels(store), classes)
    bits = np.unpackbits(codes, axis=1).astype(np.float32)
    d = bits[:500].sum(1)[:, None] + bits[500:].sum(1) - 2*bits[:500] @ bits[500:].T
    first = 500 + np.argsort(d, axis=1, kind="stable")[:, :10]
    hits, there = classes[first] == classes[:500, None], (classes[500:] == classes[:500, None]).sum(1)
    assert value["precision", 10] == pytest.approx(hits.mean())
    assert value["recall", 10] == pytest.approx((hits.sum(1)/there).mean())
