"Scores by name: what names mean, the same numbers as the evaluation gives, what an archive cannot give; clusters against scikit-learn."
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rsir_nb.core import InputError, UnknownNameError
from rsir_nb.data.base import TensorArchive
from rsir_nb.engine.evaluate import evaluate_store
from rsir_nb.metrics.clusters import cluster_agreement, find_clusters, mutual_information
from rsir_nb.metrics.named import check_metrics, is_metric, make_metric, score_embeddings
from rsir_nb.metrics.scores import METRICS
from rsir_nb.retrieval.codes import CodeStore
from sklearn.metrics import normalized_mutual_info_score

NAMES = ["map@10", "p@1", "ndcg@5", "f1@10", "r@3", "map", "m3_map@4", "map_tie_aware@5", "mmp@5"]


def world(n=120, dim=12, kinds=6, seed=0):
    "Embeddings of two sensors, one class per patch and several labels per patch."
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, kinds, n)
    truth = rng.normal(size=(kinds, dim))[classes] + 0.7*rng.normal(size=(n, dim))
    z = {m: (truth + rng.normal(size=truth.shape)).astype(np.float16).astype(np.float32) for m in ("s1", "s2")}
    labels = (rng.random((n, kinds)) < 0.15).astype(np.uint8)
    labels[np.arange(n), classes] = 1
    return z, classes, labels


def store_of(z, labels, path, present=None, **columns):
    names = [[f"class {i}" for i in (np.flatnonzero(o) if np.ndim(o) else [o])] for o in labels]
    n = len(labels)
    table = pd.DataFrame(dict(id=[f"p{i}" for i in range(n)], labels=names, **columns))
    classes = [f"class {i}" for i in range(np.shape(labels)[1] if np.ndim(labels) == 2 else max(labels) + 1)]
    return CodeStore.write(path, {}, table, "w", embeddings=z, present=present, provenance=dict(classes=classes))


@pytest.mark.parametrize("form", ["classes", "labels"])
def test_the_same_numbers_as_the_evaluation(tmp_path, form):
    z, classes, labels = world()
    labels = classes if form == "classes" else labels
    present = {"s1": np.arange(120) % 7 > 0, "s2": np.arange(120) % 11 > 0}
    found = score_embeddings(z, labels, [*NAMES, "partner_r@5", "partner_rank"], present=present)
    evaluation = evaluate_store(store_of(z, labels, tmp_path/"store", present), "leave_one_out", drawings=10, table_ks=(1, 3, 4, 5, 10))
    for way in "s1->s1", "s1->s2", "s2->s1", "s2->s2":
        rows = evaluation.table[evaluation.table.direction == way].set_index(["metric", "k"])["value"]
        for name in NAMES:
            o = make_metric(name)
            k = o.k or rows[o.metric.name].index.max()
            assert found[f"{name}/{way}"] == pytest.approx(rows[o.metric.name, k], abs=1e-12), (name, way)
    for name in NAMES: assert found[name] == pytest.approx(np.mean([v for k, v in found.items() if k.startswith(name + "/")]))
    partners = evaluation.partners[evaluation.partners.kind == "float"].set_index(["direction", "metric", "k"])["value"]
    for way in "s1->s2", "s2->s1":
        assert found[f"partner_r@5/{way}"] == partners[way, "partner_r", 5]
        assert found[f"partner_rank/{way}"] == partners[way]["partner_rank"].item()


def test_archives_say_their_labels_and_what_sensors_have_seen():
    z, classes, _ = world(30)
    x = {m: np.zeros((30, c, 4, 4), np.float32) for m, c in dict(s1=2, s2=10).items()}
    single = TensorArchive(x, labels=[[f"class {o}"] for o in classes])
    by_archive = score_embeddings(z, single, ["map@5", "partner_r@1"])
    assert by_archive == score_embeddings(z, classes, ["map@5", "partner_r@1"])
    seen = [["s1"] if i % 3 == 0 else ["s1", "s2"] for i in range(30)]
    fewer = TensorArchive(x, labels=[[f"class {o}"] for o in classes], modalities=seen)
    present = dict(s1=np.ones(30, bool), s2=np.arange(30) % 3 > 0)
    assert score_embeddings(z, fewer, ["map@5", "partner_rank"]) == score_embeddings(z, classes, ["map@5", "partner_rank"], present=present)
    garbage = {m: np.where(present[m][:, None], o, np.nan) for m, o in z.items()}
    assert score_embeddings(garbage, fewer, ["map@5"]) == score_embeddings(z, fewer, ["map@5"])
    bare = TensorArchive(x)
    assert set(score_embeddings(z, bare, ["partner_r@5"])) == {"partner_r@5", "partner_r@5/s1->s2", "partner_r@5/s2->s1"}
    assert check_metrics(["partner_r@5"], bare)[0].mode == "max"
    with pytest.raises(InputError, match="map@5 needs labels; found sensors s1, s2, 30 patches seen by two.*no labels.*partner_r@10"):
        check_metrics(["map@5"], bare)
    one = TensorArchive({"s2": x["s2"]}, labels=[["a"]]*30)
    with pytest.raises(InputError, match="two sensors.*found sensors s2.*such as map@10"): check_metrics(["partner_r@5"], one)
    with pytest.raises(InputError, match="two sensors"): score_embeddings({"s2": z["s2"]}, one, ["partner_rank"])


def test_unlabelled_patches_do_not_ask_and_count_as_wrong():
    z, classes, _ = world(40)
    classes = np.where(np.arange(40) % 4 == 0, -1, classes)
    found = score_embeddings(z, classes, ["p@5"], directions=["s1->s2"])
    unit = {m: x/np.linalg.norm(x, axis=1, keepdims=True) for m, x in z.items()}
    d = np.where(np.eye(40) > 0, np.inf, 1 - unit["s1"] @ unit["s2"].T)
    first = np.argsort(d, axis=1)[:, :5]
    wanted = ((classes[first] == classes[:, None]) & (classes[:, None] >= 0)).mean(1)[classes >= 0].mean()
    assert found["p@5"] == pytest.approx(wanted)


@pytest.mark.parametrize("distance", ["cosine", "l2", "ip", "chi2"])
def test_by_any_distance(distance):
    z, classes, _ = world(50)
    z = {m: np.abs(x) for m, x in z.items()}
    scores = [score_embeddings(z, classes, ["map@10", "partner_r@5"], o)["map@10"] for o in (distance, "cosine")]
    assert (scores[0] != scores[1]) == (distance != "cosine")


def test_fused_embeddings_are_no_partners_of_their_own_parts():
    z, classes, _ = world(30)
    z = {**z, "s1+s2": z["s1"] + z["s2"]}
    found = score_embeddings(z, classes, ["partner_r@1", "p@1"])
    assert {k for k in found if k.startswith("partner")} == {"partner_r@1", "partner_r@1/s1->s2", "partner_r@1/s2->s1"}
    assert len([k for k in found if k.startswith("p@1/")]) == 9
    x = {m: np.zeros((30, c, 4, 4), np.float32) for m, c in dict(s1=2, s2=10).items()}
    seen = [["s1"] if i % 3 == 0 else ["s1", "s2"] for i in range(30)]
    archive = TensorArchive(x, labels=[[f"class {o}"] for o in classes], modalities=seen)
    z = {"s1": z["s1"], "s2": z["s2"], "both": z["s1+s2"]}   # a name that says nothing: made of all sensors
    by_archive = score_embeddings(z, archive, ["partner_r@1", "p@1"])
    present = dict(s1=np.ones(30, bool), s2=np.arange(30) % 3 > 0, both=np.ones(30, bool))
    assert {k for k in by_archive if k.startswith("partner")} == {"partner_r@1", "partner_r@1/s1->s2", "partner_r@1/s2->s1"}
    wanted = score_embeddings(z, classes, ["p@1"], present=present)
    assert {k: v for k, v in by_archive.items() if k.startswith("p@1")} == wanted


def test_sensors_of_different_width_are_compared_with_themselves_alone():
    z, classes, _ = world(30)
    z["s2"] = z["s2"][:, :7]
    assert set(score_embeddings(z, classes, ["p@1"])) == {"p@1", "p@1/s1->s1", "p@1/s2->s2"}
    with pytest.raises(InputError, match="one width"): score_embeddings(z, classes, ["partner_r@1"])


def test_names():
    for name, label in {"mAP@10": "map@10", " p@1 ": "precision@1", "R@8": "hit@8", "f1@10": "m1_f1@10", "mMP@5": "m5_mmp@5",
                        "map": "map", "partner_rank": "partner_rank", "nmi": "nmi"}.items():
        assert make_metric(name).label == label and is_metric(name)
    lower = {o for o in METRICS.list() if make_metric(o + ("@1" if o == "partner_r" else "")).mode == "min"}
    assert lower == {"partner_rank", "m3_hamming_loss", *(f"class_{o}" for o in
                     ("hamming_loss", "one_error", "coverage_error", "ranking_loss"))}
    for bad in "loss", "val/map", "": assert not is_metric(bad)
    for bad, told in {"ndgc@10": "did you mean ndcg", "partner_rr@1": "did you mean partner_r"}.items():
        with pytest.raises(UnknownNameError, match=told): make_metric(bad)
    for bad, told in {"map@0": "from 1", "map@": "from 1", "p@x": "such as p@10", "partner_r": "needs a depth",
                      "partner_rank@5": "takes no depth", "nmi@3": "takes no depth"}.items():
        with pytest.raises((InputError, UnknownNameError), match=told): make_metric(bad)


def test_a_metric_of_ones_own(monkeypatch):
    def last(judged, ks):
        "whether the item at rank k shares a label"
        return judged.rel[:, np.array(ks) - 1]

    def far(ranks, ks):
        "whether the partner is not among the first k"
        return np.asarray(ranks)[:, None] > np.asarray(ks)
    for name, f, facts in ("last", last, {}), ("far", far, dict(of="partners", better="lower", depth="required")):
        monkeypatch.setitem(METRICS.entries, name, f)
        monkeypatch.setitem(METRICS.meta, name, facts)
    z, classes, _ = world(60)
    found = score_embeddings(z, classes, ["last@1", "p@1", "far@5", "partner_r@5"])
    assert found["last@1"] == found["p@1"] and found["far@5"] == pytest.approx(1 - found["partner_r@5"])
    assert make_metric("far@5").mode == "min"


# Clusters.

@settings(max_examples=80, deadline=None)
@given(n=st.integers(1, 40), a=st.integers(1, 6), b=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_mutual_information_is_that_of_scikit_learn(n, a, b, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, a, n)*3 - 1, rng.integers(0, b, n)
    assert mutual_information(x, y) == pytest.approx(normalized_mutual_info_score(x, y), abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_clusters_that_are_there_are_found(seed):
    rng = np.random.default_rng(seed)
    classes = np.repeat(np.arange(7), 30)
    z = 9*rng.normal(size=(7, 9))[classes] + rng.normal(size=(210, 9))
    clusters = find_clusters(z, 7)
    assert normalized_mutual_info_score(clusters, classes) == pytest.approx(1) == cluster_agreement(z, classes)
    np.testing.assert_array_equal(clusters, find_clusters(z, 7))
    known = np.where(np.arange(210) % 5 == 0, -1, classes)
    assert cluster_agreement(z, known) == pytest.approx(1)
    assert score_embeddings({"s2": z}, known, ["nmi"])["nmi"] == pytest.approx(1)
    with pytest.raises(InputError, match="one class per image"): score_embeddings({"s2": z}, np.eye(7, dtype=int)[classes], ["nmi"])
    assert sorted(np.bincount(find_clusters(np.zeros((6, 3)), 3), minlength=3))[-1] == 6   # nothing to tell apart
    with pytest.raises(InputError, match="1 to 210"): find_clusters(z, 211)
