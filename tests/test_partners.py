"Partner recall against NumPy and torchmetrics, for codes and embeddings, with ties; medians with intervals; evaluation without labels."
import re

import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
from engine_run import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.transform import from_origin
from rsir_nb.cli import main
from rsir_nb.core import InputError, UnknownNameError, read_json
from rsir_nb.engine.compare import compare_runs
from rsir_nb.engine.evaluate import evaluate, evaluate_store
from rsir_nb.engine.evaluation import load_evaluation
from rsir_nb.engine.protocols import partner_directions
from rsir_nb.engine.report import write_report
from rsir_nb.engine.train import pretrain
from rsir_nb.metrics.intervals import median_ci
from rsir_nb.metrics.partners import partner_ranks, partner_recall, score_partners
from rsir_nb.metrics.scores import get_metric
from rsir_nb.retrieval.codes import CodeStore
from rsir_nb.retrieval.hamming import HammingIndex
from rsir_nb.retrieval.vectors import VectorIndex
from scipy.spatial.distance import cdist


def place_in(d, own):
    "The place of each query's partner in a stable sort of all distances."
    order = np.argsort(d, axis=1, kind="stable")
    return 1 + (order == np.asarray(own)[:, None]).argmax(1)


def bits(x): return np.unpackbits(x, axis=1).astype(int)


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 120), n_queries=st.integers(1, 40), n_bytes=st.sampled_from([1, 2, 8, 9, 16]),
       values=st.sampled_from([2, 4, 256]), seed=st.integers(0, 10**6))
def test_ranks_of_codes(n, n_queries, n_bytes, values, seed):
    rng = np.random.default_rng(seed)
    xq, x = (rng.integers(0, values, (m, n_bytes)).astype(np.uint8) for m in (n_queries, n))
    own = rng.integers(0, n, n_queries)
    d = (bits(xq)[:, None] != bits(x)[None]).sum(-1)
    np.testing.assert_array_equal(partner_ranks(xq, x, own), place_in(d, own))


@pytest.mark.parametrize("name,oracle", [("cosine", "cosine"), ("l2", "sqeuclidean")])
def test_ranks_of_embeddings(name, oracle):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 24)).astype(np.float32)
    xq = x + rng.normal(size=x.shape).astype(np.float32)*0.8
    own = rng.permutation(500)
    d = cdist(xq.astype(np.float64), x.astype(np.float64), oracle)
    np.testing.assert_array_equal(partner_ranks(xq, x, own, name), place_in(d, own))
    half = partner_ranks(xq.astype(np.float16), torch.from_numpy(x).half(), own, name)
    assert np.abs(np.log(half/place_in(d, own))).max() < 0.2


@pytest.mark.parametrize("kind", ["codes", "cosine", "l2", "ip", "chi2"])
def test_the_rank_is_the_place_in_the_index_also_among_ties(kind):
    rng = np.random.default_rng(1)
    few = rng.integers(0, 256, (9, 4)).astype(np.uint8) if kind == "codes" else np.abs(rng.normal(size=(9, 33)))
    x, xq = few[rng.integers(0, 9, 400)], few[rng.integers(0, 9, 60)]
    ix = HammingIndex(32) if kind == "codes" else VectorIndex(33, distance=kind)
    ix.add(x)
    own = rng.integers(0, 400, 60)
    _, ids = ix.search(xq, 400)
    found = partner_ranks(xq, x, own, *([] if kind == "codes" else [kind]))
    np.testing.assert_array_equal(found, 1 + (ids == own[:, None]).argmax(1))


def test_recall_against_torchmetrics():
    from torchmetrics.functional import retrieval as tm
    rng = np.random.default_rng(2)
    z = rng.normal(size=(80, 16))
    a, b = (z + rng.normal(size=z.shape) for _ in range(2))
    scores = torch.from_numpy(1 - cdist(a, b, "cosine"))
    found = partner_recall(partner_ranks(a, b, np.arange(80)), [1, 5, 10])
    for i, target in enumerate(torch.eye(80, dtype=torch.bool)):
        wanted = [float(tm.retrieval_hit_rate(scores[i], target, top_k=k)) for k in (1, 5, 10)]
        recall = [float(tm.retrieval_recall(scores[i], target, top_k=k)) for k in (1, 5, 10)]
        assert found[i].tolist() == wanted == recall
    table = score_partners(partner_ranks(a, b, np.arange(80)), 80).set_index(["metric", "k"])
    assert table.value["partner_r", 5] == pytest.approx(found[:, 1].mean())
    assert table.chance["partner_r", 5] == 5/80 and table.chance["partner_rank", 80] == 40.5


def test_when_nothing_can_be_told_apart_recall_is_chance():
    for x in np.zeros((200, 16), np.uint8), np.ones((200, 7)):
        table = score_partners(partner_ranks(x, x, np.arange(200)), 200)
        np.testing.assert_allclose(table.value, table.chance)


def test_threads_change_nothing(monkeypatch):
    rng = np.random.default_rng(3)
    xq, x = (rng.integers(0, 256, (333, 16)).astype(np.uint8) for _ in range(2))
    found = []
    for threads in "1", "3":
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        found.append(partner_ranks(xq, x, np.arange(333)))
    np.testing.assert_array_equal(*found)


def test_the_table_has_what_fits():
    table = score_partners(np.array([1, 2, 3]), 3)
    assert table.k.tolist() == [1, 3] and table.metric.tolist() == ["partner_r", "partner_rank"]   # no 5 among 3
    assert table.value.tolist() == [pytest.approx(1/3), 2]
    assert (get_metric("partner_rank").better, get_metric("partner_rank").over) == ("lower", "median")
    assert get_metric("partner_r").of == "partners"


def test_mistakes_are_named():
    x = np.zeros((3, 8), np.uint8)
    with pytest.raises(InputError, match="one row number"): partner_ranks(x, x, [0, 1])
    with pytest.raises(InputError, match="not in the archive"): partner_ranks(x, x, [0, 1, 3])
    with pytest.raises(InputError, match="another length"): partner_ranks(x[:, :4], x, [0, 1, 2])
    with pytest.raises(InputError): partner_ranks(np.ones((3, 4)), np.ones((3, 5)), [0, 1, 2])
    with pytest.raises(UnknownNameError, match="did you mean"): partner_ranks(np.ones((3, 4)), np.ones((3, 4)), [0, 1, 2], "cosin")


# The median's interval.

@pytest.mark.parametrize("n", [1, 2, 7, 200])
def test_median_and_its_interval(n):
    x = np.random.default_rng(n).integers(1, 50, n).astype(float)
    found = median_ci(x, n=400)
    assert found.value == np.median(x) and found.low <= found.value <= found.high
    rng = np.random.default_rng(5)
    drawn = [np.median(rng.choice(x, n)) for _ in range(4000)]
    assert found.low == pytest.approx(np.quantile(drawn, 0.025), abs=max(1, 0.1*x.std()))
    assert found.high == pytest.approx(np.quantile(drawn, 0.975), abs=max(1, 0.1*x.std()))


def test_median_over_groups_counts_each_value_as_often_as_its_group():
    x, groups = np.array([1., 9, 9, 2, 2, 2, np.nan]), np.array(["a", "b", "b", "c", "c", "c", "a"])
    drawn = {np.median(np.concatenate([[[1.], [9, 9], [2, 2, 2]][i] for i in o]))
             for o in np.ndindex(3, 3, 3)}
    found = median_ci(x, n=2000, groups=groups, level=1.)
    assert (found.value, found.low, found.high) == (2, min(drawn), max(drawn))
    assert np.isnan(median_ci([np.nan]).value)
    with pytest.raises(InputError, match="differ in number"): median_ci(x, groups=groups[1:])


# Evaluations.

@pytest.fixture(scope="module")
def store(tmp_path_factory):
    "Codes and embeddings of 60 patches; the second sensor has missed every seventh, and one split has the pairs that count."
    rng, folder = np.random.default_rng(7), tmp_path_factory.mktemp("pairs")
    z = rng.normal(size=(60, 16))
    z = {m: z + rng.normal(size=z.shape) for m in ("s1", "s2")}
    codes = {m: np.packbits(o > 0, axis=1, bitorder="little") for m, o in z.items()}
    table = pd.DataFrame(dict(id=[f"p{i}" for i in range(60)], place=[f"place {i//4}" for i in range(60)],
                              split=np.repeat(["train", "val", "test"], 20)))
    present = dict(s1=np.ones(60, bool), s2=np.arange(60) % 7 > 0)
    return CodeStore.write(folder/"store", codes, table, "w", embeddings=z, present=present)


def test_directions_between_sensors(store):
    found = partner_directions(store, "csmae")
    assert [o.name for o in found] == ["s1->s2", "s2->s1"]
    both = [i for i in range(40, 60) if i % 7]
    assert found[0].queries.tolist() == found[1].queries.tolist() == both
    assert found[0].items.tolist() == both and found[1].items.tolist() == list(range(40, 60))
    for d in found: np.testing.assert_array_equal(d.items[d.own], d.queries)


def test_fused_embeddings_are_no_partners_of_their_sensors(store, tmp_path):
    z = {m: np.asarray(x) for m, x in store.embeddings.items()}
    table = store.table.drop(columns=["has_s1", "has_s2"])
    fused = CodeStore.write(tmp_path/"fused", {}, table, "w", embeddings={**z, "both": z["s1"] + z["s2"]}, provenance=dict(joint=dict(both=["s1", "s2"])))
    assert [o.name for o in partner_directions(fused, "csmae")] == ["s1->s2", "s2->s1"]


def test_an_archive_without_labels_is_evaluated_by_its_pairs(store, tmp_path):
    found = evaluate_store(store, "csmae", "ours", drawings=50)
    assert (found.headline, len(found.table), found.curves) == ("partner_r", 0, [])
    p = found.partners
    assert set(map(tuple, p[["system", "kind", "n_bits"]].drop_duplicates().values.tolist())) == {
        ("ours", "binary", 16), ("ours", "float", 0), ("chance", "random", 0)}
    for s, t, n_items in ("s1", "s2", 17), ("s2", "s1", 20):
        queries = np.array([i for i in range(40, 60) if i % 7])
        items = queries if t == "s2" else np.arange(40, 60)
        for kind in "binary", "float":
            if kind == "binary": d = (bits(store.codes[s][queries])[:, None] != bits(store.codes[t][items])[None]).sum(-1)
            else: d = cdist(store.embeddings[s][queries], store.embeddings[t][items], "cosine")
            ranks = place_in(d, np.searchsorted(items, queries))
            rows = p[(p.direction == f"{s}->{t}") & (p.kind == kind)].set_index(["metric", "k"])
            for k in 1, 5, 10: assert rows.value["partner_r", k] == pytest.approx((ranks <= k).mean())
            assert rows.value["partner_rank", n_items] == np.median(ranks)
            kept = found.ranks[(found.ranks.direction == f"{s}->{t}") & (found.ranks.kind == kind)]
            assert kept["rank"].tolist() == ranks.tolist() and kept.id.tolist() == [f"p{i}" for i in queries]
            assert (rows.n_queries == 17).all() and (rows.n_items == n_items).all() and (rows.n_places == 5).all()
        chance = p[(p.direction == f"{s}->{t}") & (p.kind == "random")].set_index("metric")["value"]
        assert chance["partner_rank"] == (n_items + 1)/2 and chance["partner_r"].tolist() == pytest.approx([k/n_items for k in (1, 5, 10)])
    m = found.margins
    assert set(m.metric) == {"partner_r"} and set(m.k) == {10} and set(m.system) == {"ours", "chance"}
    wide = found.pivot()
    for row in m.itertuples(): assert row.difference == pytest.approx(
        wide.loc["ours, binary", row.direction] - wide.loc[f"{row.system}, {row.kind}", row.direction])
    told = found.about["partners"]["s1->s2"]
    assert set(told) == {"partner_r@1", "partner_r@5", "partner_r@10", "partner_rank", "among"} and told["among"] == 17
    found.save(tmp_path/"found")
    assert {o.name for o in (tmp_path/"found").iterdir()} == {"margins.csv", "partners.csv", "speed.csv", "ranks.parquet", "evaluation.json"}
    again = load_evaluation(tmp_path/"found")
    pd.testing.assert_frame_equal(again.summary(), found.summary())
    assert again._repr_markdown_() == found._repr_markdown_() and "among 20" in again.told
    assert list(found.summary()) == ["system", "direction", "R@1", "R@5", "R@10", "median rank", "among", "ms median", "ms p95", "bytes"]
    assert again.ranks["rank"].tolist() == found.ranks["rank"].tolist()
    with pytest.raises(UnknownNameError, match="measured"): found.pivot("map")


def test_partners_beside_labels_and_left_out(store, tmp_path):
    labels = [[["a"], ["b"], ["a", "c"]][i % 3] for i in range(60)]
    table = store.table.drop(columns=["has_s1", "has_s2"]).assign(labels=labels)
    labelled = CodeStore.write(tmp_path/"labelled", dict(store.codes), table, "w", present={m: store.present(m) for m in ("s1", "s2")},
                               embeddings={m: np.asarray(x) for m, x in store.embeddings.items()})
    found, bare = evaluate_store(labelled, "csmae", "ours", drawings=50), evaluate_store(store, "csmae", "ours", drawings=50)
    pd.testing.assert_frame_equal(found.partners, bare.partners)
    assert found.headline == "map" and set(found.margins.metric) == {"map"}
    assert found.summary()["partner R@10"].tolist()[1] == bare.summary()["R@10"].tolist()[0]
    pd.testing.assert_frame_equal(found.partner_summary(), bare.partner_summary())
    without = evaluate_store(labelled, "csmae", "ours", drawings=50, partners=False)
    assert without.partners is None and without.about["partners"] is None and "partner R@10" not in without.summary()
    pd.testing.assert_frame_equal(without.table, found.table)


def write_pairs(folder, n=24):
    "A folder of unlabelled pairs: radar and optical GeoTIFFs of the same names."
    from tiny_plugin import TinyPairs
    archive = TinyPairs(n_places=n//2, patches_per_place=2)
    for i in range(n):
        for m in "s1", "s2":
            x = archive[i][m].numpy()
            (folder/m).mkdir(parents=True, exist_ok=True)
            with rasterio.open(folder/m/f"p{i:02}.tif", "w", driver="GTiff", count=len(x), height=30, width=30, dtype="float32",
                               crs="EPSG:32632", transform=from_origin(690000 + 400*i, 5340000, 10, 10)) as ds:
                ds.write(x)
                ds.descriptions = archive.sensors[m].bands


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Two runs on a folder of unlabelled pairs."
    folder = tmp_path_factory.mktemp("folder")
    found = []
    for seed in 0, 1:
        cfg = tiny_config(folder/f"run{seed}", "optim.epochs=1", f"seed={seed}", "evaluate.baselines=[band_cca,random]",
                          "report.queries=1")
        if not (folder/"pairs").exists(): write_pairs(folder/"pairs")
        cfg.data = dict(name="paired_folders", root=str(folder/"pairs"))
        pretrain(cfg, progress=False)
        found.append(folder/f"run{seed}")
    return found


def test_a_folder_of_unlabelled_pairs_from_the_command_line(runs, capsys):
    assert main(["evaluate", str(runs[0]), "evaluate.drawings=20"]) == 0
    out = capsys.readouterr().out
    assert "R@1 " in out and "median rank" in out and "among 24" in out and "band_cca" in out and "partner_r" in out and "mAP" not in out
    told = read_json(runs[0]/"evaluation/csmae/evaluation.json")["partners"]
    table = pd.read_csv(runs[0]/"evaluation/csmae/partners.csv")
    assert set(told) == {"s1->s2", "s2->s1"} and set(table.system) == {"csmae", "band_cca", "chance"}
    assert main(["report", str(runs[0]), "evaluate.drawings=20"]) == 0
    page = re.sub(r"data:image/[^\"]+", "", (runs[0]/"report.html").read_text())
    assert "asks for its own image by the other one" in page and "Margins in R@10" in page
    assert "All scores" not in page and "mAP" not in page and "no labels" in page


def test_runs_without_labels_are_compared(runs, capsys):
    for run in runs: evaluate(run, progress=False, drawings=20)
    table = compare_runs(*runs, drawings=50)
    assert table.direction.tolist() == ["s1->s2", "s2->s1"] and set(table.metric) == {"partner_r"} and set(table.k) == {10}
    a, b = (load_evaluation(o/"evaluation/csmae").pivot() for o in runs)
    np.testing.assert_allclose(table.difference, (a - b).loc["csmae, float"])
    ranks = compare_runs(*runs, metric="partner_rank", drawings=50)
    assert (ranks.mean_a > 1).all()
    assert main(["compare", str(runs[0]), str(runs[1]), "--metric", "partner_r", "-k", "1"]) == 0
    with pytest.raises(InputError, match="no scores of rankings"): compare_runs(*runs, metric="map")


def test_a_method_whose_sensors_cannot_be_compared(runs, tmp_path):
    cfg = tiny_config(tmp_path/"run", "method=band_statistics", "evaluate.baselines=[random]")
    cfg.data = dict(name="paired_folders", root=str(runs[0].parent/"pairs"))
    pretrain(cfg, progress=False)
    with pytest.raises(InputError, match="no labels, and no two sensors that can be compared"): write_report(cfg.out, progress=False)
