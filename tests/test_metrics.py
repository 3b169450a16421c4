"Metrics against torchmetrics, sklearn, their definitions pair by pair, and the values of published systems."
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rsir_nb.core import InputError, UnknownNameError
from rsir_nb.metrics.intervals import Interval, bootstrap_ci, paired_difference_ci
from rsir_nb.metrics.labels import label_overlap, label_sizes, overlap_histogram, relevance
from rsir_nb.metrics.measures import (acg_at_k, ap_at_k, f1_at_k, hit_at_k, label_set_scores,
                                       map_first_relevant, mmp_at_k, ndcg_at_k, precision_at_k, recall_at_k,
                                       tie_aware_ap, union_counts, union_scores, wap_at_k)
from rsir_nb.metrics.named import make_metric, score_embeddings
from rsir_nb.metrics.scores import METRICS, drop_own, get_metric, score_rankings, summarise
from sklearn.metrics import average_precision_score, ndcg_score


def world(n_queries=17, n_items=60, n_labels=9, seed=0, unlabelled=0.1):
    "Random labels and complete rankings; some queries and items have no labels."
    rng = np.random.default_rng(seed)
    draw = lambda n: ((rng.random((n, n_labels)) < 0.2) & (rng.random((n, 1)) > unlabelled)).astype(np.uint8)
    query, archive = draw(n_queries), draw(n_items)
    dists = rng.integers(0, 8, (n_queries, n_items)).astype(np.float64)
    ids = np.argsort(dists, axis=1, kind="stable")
    return query, archive, ids, np.take_along_axis(dists, ids, 1)


def sets(labels): return [set(np.flatnonzero(x)) for x in labels]


def ratio(a, b): return a / b if b else 0.


class ByDefinition:
    "Every metric for one query at one depth, written as in the reference: loops, sets, and nothing shared."

    def __init__(self, wanted, ranked, archive, dists, n_labels=9):
        self.wanted, self.ranked, self.archive, self.dists = wanted, ranked, archive, dists
        self.n_labels = n_labels
        self.shared = [len(wanted & o) for o in ranked]
        self.rel = [s > 0 for s in self.shared]
        self.subset = [bool(o) and o <= wanted for o in ranked]
        self.n_relevant = sum(bool(wanted & o) for o in archive)

    def p(self, k, rel=None): return sum((rel or self.rel)[:k]) / k
    def precision_sum(self, k, rel=None):
        rel = rel or self.rel
        return sum(self.p(i, rel) for i in range(1, k + 1) if rel[i - 1])

    def precision(self, k): return self.p(k)
    def recall(self, k): return ratio(sum(self.rel[:k]), self.n_relevant)
    def hit(self, k): return float(any(self.rel[:k]))
    def pr_f1(self, k): return ratio(2*self.precision(k)*self.recall(k), self.precision(k) + self.recall(k))
    def map(self, k): return ratio(self.precision_sum(k), min(k, self.n_relevant))
    def map_found(self, k): return ratio(self.precision_sum(k), sum(self.rel[:k]))
    def map_first_relevant(self, k):
        ranks = [i for i in range(1, len(self.rel) + 1) if self.rel[i - 1]][:k]
        return ratio(sum((j + 1) / t for j, t in enumerate(ranks)), len(ranks))

    def dcg(self, shared): return sum((2**s - 1) / np.log2(2 + i) for i, s in enumerate(shared))
    def ndcg(self, k):
        best = sorted((len(self.wanted & o) for o in self.archive), reverse=True)
        return ratio(self.dcg(self.shared[:k]), self.dcg(best[:k]))

    def ndcg_retrieved(self, k):
        return ratio(self.dcg(self.shared[:k]), self.dcg(sorted(self.shared, reverse=True)[:k]))

    def acg(self, k): return sum(self.shared[:k]) / k
    def wap(self, k): return ratio(sum(self.acg(i + 1) for i in range(k) if self.rel[i]), sum(self.rel[:k]))
    def m2_wap(self, k):
        return ratio(sum(self.acg(i + 1)/(i + 1) for i in range(k) if self.rel[i]), sum(self.rel[:k]))

    def pair(self, i):
        s, o = self.shared[i], self.ranked[i]
        return ratio(s, len(o)), s / len(self.wanted), 2*s / (len(self.wanted) + len(o))

    def m1_precision(self, k): return np.mean([self.pair(i)[0] for i in range(k)])
    def m1_recall(self, k): return np.mean([self.pair(i)[1] for i in range(k)])
    def m1_pairwise_f1(self, k): return np.mean([self.pair(i)[2] for i in range(k)])
    def m2_precision_at_rank(self, k): return self.pair(k - 1)[0]
    def m2_recall_at_rank(self, k): return self.pair(k - 1)[1]
    def m2_f1_at_rank(self, k):
        p, r = self.pair(k - 1)[:2]
        return ratio(2*p*r, p + r)

    def union(self, k): return set().union(*self.ranked[:k])
    def m3_label_coverage(self, k): return len(self.wanted & self.union(k)) / len(self.wanted)
    def m3_precision(self, k): return ratio(len(self.wanted & self.union(k)), len(self.union(k)))
    def m3_accuracy(self, k): return len(self.wanted & self.union(k)) / len(self.wanted | self.union(k))
    def m3_hamming_loss(self, k): return len(self.wanted ^ self.union(k)) / self.n_labels
    def m3_subset_accuracy(self, k): return float(self.wanted == self.union(k))
    def m3_r_precision(self, k): return self.p(k, self.subset)
    def m3_map(self, k): return self.precision_sum(k, self.subset) / k
    def m5_mmp(self, k): return self.p(depth) if (depth := min(k, self.n_relevant)) else 0.
    def map_tie_aware(self, k):
        "Each place's chance of being relevant, and the relevant ones expected before it, counted out."
        total = 0.
        for i in range(k):
            tie = [j for j, d in enumerate(self.dists) if d == self.dists[i]]
            n, r, before = len(tie), sum(self.rel[j] for j in tie), sum(self.rel[:tie[0]])
            among = (i - tie[0])*(r - 1)/(n - 1) if n > 1 else 0
            total += r/n*(before + 1 + among)/(i + 1)
        return ratio(total, min(k, self.n_relevant))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("own", [False, True])
def test_every_metric_is_its_definition(seed, own):
    query, archive, ids, dists = world(seed=seed, n_items=45)
    owned = None
    if own:                                                  # the queries are the first items of the archive
        owned = np.arange(len(query))
        archive = np.concatenate([query, archive])
        rng = np.random.default_rng(seed)
        dists = rng.integers(0, 8, (len(query), len(archive))).astype(float)
        ids = np.argsort(dists, axis=1, kind="stable")
        ids, dists = drop_own(ids, owned, np.take_along_axis(dists, ids, 1))
    ks = [1, 2, 3, 10, 45]
    known = [m for m in map(get_metric, METRICS.entries) if m.of == "rankings" and not m.parts]
    found = score_rankings(ids, query, archive, ks, dists=dists, own=owned, block=5)
    assert set(found) == {m.name for m in known if m.default}
    found |= score_rankings(ids, query, archive, ks, [m.name for m in known if not m.default], own=owned)
    assert set(found) == {m.name for m in known}
    items = sets(archive)
    for q, wanted in enumerate(sets(query)):
        if not wanted:
            assert all(np.isnan(x[q]).all() for x in found.values())
            continue
        others = [o for i, o in enumerate(items) if not own or i != q]
        truth = ByDefinition(wanted, [items[i] for i in ids[q]], others, dists[q])
        for name, x in found.items():
            np.testing.assert_allclose(x[q], [getattr(truth, name)(k) for k in ks], atol=1e-12, err_msg=name)


def test_against_torchmetrics():
    from torchmetrics.functional import retrieval as tm
    query, archive, ids, _ = world(unlabelled=0)
    overlap, histogram = label_overlap(query, archive, ids), overlap_histogram(query, archive)
    rel, n_relevant, ks = overlap > 0, histogram[:, 1:].sum(1), [1, 5, 20, 60]
    scores = torch.arange(60, 0, -1).float()
    gains = torch.from_numpy(2**overlap.astype(np.int64) - 1)
    for ours, theirs, target in (
            (precision_at_k(rel, ks), tm.retrieval_precision, torch.from_numpy(rel)),
            (recall_at_k(rel, n_relevant, ks), tm.retrieval_recall, torch.from_numpy(rel)),
            (ap_at_k(rel, ks, denominator="found"), tm.retrieval_average_precision, torch.from_numpy(rel)),
            (ndcg_at_k(overlap, ks, histogram), tm.retrieval_normalized_dcg, gains)):
        wanted = [[float(theirs(scores, t, top_k=k)) for k in ks] for t in target]
        np.testing.assert_allclose(ours, wanted, rtol=1e-6)


def test_against_sklearn():
    query, archive, ids, _ = world(unlabelled=0)
    overlap, histogram = label_overlap(query, archive, ids), overlap_histogram(query, archive)
    rel, n = overlap > 0, ids.shape[1]
    falling = np.arange(n, 0, -1)
    ap = ap_at_k(rel, n_relevant=rel.sum(1))
    for q in np.flatnonzero(rel.any(1)):
        assert ap[q] == pytest.approx(average_precision_score(rel[q], falling))
        for k in 1, 7, n:
            wanted = ndcg_score(2.**overlap[[q]] - 1, falling[None], k=k)
            assert ndcg_at_k(overlap, [k], histogram)[q, 0] == pytest.approx(wanted)


@settings(max_examples=60, deadline=None)
@given(dists=st.lists(st.integers(0, 3), min_size=1, max_size=7), bits=st.integers(0, 127),
       extra=st.integers(0, 3))
def test_tie_aware_ap_is_the_mean_over_all_orders(dists, bits, extra):
    n, dists = len(dists), np.sort(dists)
    rel = np.array([bits >> i & 1 for i in range(n)], dtype=bool)
    total = rel.sum() + extra
    orders = [o for o in itertools.permutations(range(n)) if (dists[list(o)] == dists).all()]
    for k in range(1, n + 1):
        for denominator in "possible", "k":
            mean = np.mean([ap_at_k(rel[None, list(o)], [k], [total], denominator) for o in orders])
            found = tie_aware_ap(rel[None], dists[None], [k], [total], denominator=denominator)
            assert found[0, 0] == pytest.approx(mean, abs=1e-12)


def test_tie_aware_ap_does_not_see_the_order_and_lies_between_the_extremes():
    rng = np.random.default_rng(0)
    dists, ks = np.sort(rng.integers(0, 10, (30, 200)), axis=1), [1, 10, 100, 200]
    rel = rng.random((30, 200)) < 0.2
    expected = tie_aware_ap(rel, dists, ks, rel.sum(1))
    extremes = []
    for luck in -1, 1, None:
        key = rng.random(rel.shape) if luck is None else luck*rel
        moved = np.take_along_axis(rel, np.lexsort((key, dists), axis=1), 1)
        np.testing.assert_allclose(tie_aware_ap(moved, dists, ks, rel.sum(1)), expected, atol=1e-12)
        extremes.append(ap_at_k(moved, ks, rel.sum(1)))
    assert (extremes[1] <= expected + 1e-12).all() and (expected <= extremes[0] + 1e-12).all()
    distinct = np.arange(200) + np.zeros((30, 1))
    np.testing.assert_allclose(tie_aware_ap(rel, distinct, ks, rel.sum(1)), ap_at_k(rel, ks, rel.sum(1)))


def test_rankings_that_are_cut_off():
    rel, dists = np.ones((2, 4), bool), np.array([[1, 2, 3, 3], [1, 1, 2, 5]])
    tie_aware_ap(rel, dists, [2], [9, 9], n_items=100)
    for k in 3, 4:
        with pytest.raises(InputError, match="end within the ties"):
            tie_aware_ap(rel, dists, [k], [9, 9], n_items=100)
    with pytest.raises(InputError, match="do not rise"): tie_aware_ap(rel, -dists, [2], [9, 9])
    with pytest.raises(InputError, match="closed form"): tie_aware_ap(rel, dists, [2], denominator="found")
    with pytest.raises(InputError, match="whole archive"): map_first_relevant(rel, 5, [9, 9])


@pytest.mark.parametrize("n_labels", [1, 19, 64, 65, 130])
def test_many_labels(n_labels):
    query, archive, ids, _ = world(n_labels=n_labels)
    wanted = np.einsum("ql,qkl->qk", query.astype(int), archive[ids].astype(int))
    np.testing.assert_array_equal(label_overlap(query, archive, ids), wanted)
    for q, row in enumerate(overlap_histogram(query, archive)):
        shared = archive.astype(int) @ query[q]
        np.testing.assert_array_equal(row, np.bincount(shared, minlength=n_labels + 1))
    empty = query.sum(1) == 0
    coverage = union_scores(*union_counts(query, archive, ids), label_sizes(query), n_labels, [1, 5])["recall"]
    assert (coverage[empty] == 0).all() and (np.diff(coverage) >= 0).all()


def test_bool_float_and_integer_labels_are_the_same():
    query, archive, ids, _ = world()
    for kind in bool, np.float32, np.int64:
        for name, x in score_rankings(ids, query.astype(kind), archive.astype(kind), [7]).items():
            np.testing.assert_array_equal(x, score_rankings(ids, query, archive, [7])[name])


def test_conventions_for_what_has_no_labels():
    query, archive = np.array([[1, 0], [0, 0], [0, 1]]), np.array([[0, 0], [1, 0]])
    scores = score_rankings([[0, 1], [0, 1], [1, 0]], query, archive, [1, 2])
    assert all(np.isnan(x[1]).all() for x in scores.values())
    assert scores["precision"][[0, 2]].tolist() == [[0, .5], [0, 0]]   # the item without labels is counted
    assert scores["m1_precision"][0].tolist() == [0, .5]
    assert all((x[2] == 0).all() for x in scores.values())       # nothing relevant exists: 0, not nan
    table = summarise(scores, [1, 2], n=10)
    assert (table.n_queries == 2).all() and (table.n_unlabelled == 1).all()
    value = table.set_index(["metric", "k"]).value
    assert value["precision", 2] == .25 and value["m1_recall", 2] == .25


def test_m1_f1_is_that_of_the_averages():
    query, archive, ids, _ = world()
    scores = score_rankings(ids, query, archive, [10], metrics=["m1_f1", "m1_pairwise_f1"])
    assert set(scores) == {"m1_precision", "m1_recall", "m1_pairwise_f1"}
    table = summarise(scores, [10]).set_index("metric")
    p, r = (np.nanmean(scores[o]) for o in ("m1_precision", "m1_recall"))
    assert table.value["m1_f1"] == pytest.approx(2*p*r/(p + r))
    assert table.low["m1_f1"] < table.value["m1_f1"] < table.high["m1_f1"]
    assert table.value["m1_f1"] != pytest.approx(table.value["m1_pairwise_f1"], abs=1e-3)


# What published systems computed, where their definition is one of ours; the others are divergent by name.

def golden(shared, case_id):
    "Inputs, outputs and constants of a case of the reference set."
    cases = json.loads((shared/"golden/MANIFEST.json").read_text())["cases"]
    entry = next(o for o in cases if o["id"] == case_id)
    arrays = dict(np.load(shared/"golden"/entry["inputs"][0]["file"]))
    part = lambda prefix: {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    return part("in."), part("out."), entry["constants"]


def test_the_contrastive_cbir_system(shared):
    x, out, constants = golden(shared, "cbir.retrieval")
    top, ranks = constants["max_topk"], constants["ranks"]
    ids = out["order"][:, :top].astype(int)
    query, archive = x["query_labels"], x["archive_labels"]
    scores = score_rankings(ids, query, archive, range(1, top + 1))
    for ours, theirs in dict(ndcg_retrieved="ndcg", acg="acg", map_found="average_precision",
                             m2_wap="weighted_average_precision", m2_precision_at_rank="precision_at_rank",
                             m2_recall_at_rank="recall_at_rank", m2_f1_at_rank="f1_at_rank").items():
        near = dict(rtol=1e-6, atol=1e-9, err_msg=ours)
        np.testing.assert_allclose(scores[ours].mean(0), out[f"mean.{theirs}"], **near)
        np.testing.assert_allclose(scores[ours][:, np.array(ranks) - 1], out[f"per_query.{theirs}"], **near)
    assert (scores["wap"] >= scores["m2_wap"] - 1e-12).all()


def test_the_multi_label_metric_learning_system(shared):
    x, out, constants = golden(shared, "cv4rs.retrieval_metrics")
    labels, ids, ks = x["labels"], out["standard.neighbours"], constants["K"]
    own = np.arange(len(labels))
    names = {"m3_label_coverage": "recall", "m3_map": "map", "m3_r_precision": "r_precision",
             "m3_precision": "precision", "m3_accuracy": "accuracy"}
    scores = score_rankings(ids, labels, labels, ks, list(names), own=own)
    for ours, theirs in names.items():
        for i, k in enumerate(ks):
            if f"standard.{theirs}@{k}" not in out: continue
            found = np.nansum(scores[ours][:, i]) / len(labels)   # there a query without labels counts as 0
            assert found == pytest.approx(float(out[f"standard.{theirs}@{k}"]), rel=1e-9), (ours, k)
    assert any(o.startswith("standard.map@") for o in out)


def test_the_universal_embeddings_challenge(shared):
    x, out, _ = golden(shared, "unifex.mmp5")
    rel = x["index_labels"][out["top5"]] == x["query_labels"][:, None]
    np.testing.assert_array_equal(rel, out["relevance"])
    found = mmp_at_k(rel, out["n_q"])
    np.testing.assert_allclose(found, out["per_query"], rtol=1e-9)
    assert found.mean() == pytest.approx(float(out["mmp5"]), rel=1e-9)
    by_name = score_rankings(out["top5"], x["query_labels"], x["index_labels"], [5], "m5_mmp")["m5_mmp"]
    np.testing.assert_allclose(by_name[:, 0], out["per_query"], rtol=1e-9)


# Intervals.

def test_interval_of_a_mean_is_the_textbook_one():
    x = np.random.default_rng(0).normal(3, 2, 2000)
    ci = bootstrap_ci(x, n=4000)
    half = 1.96*x.std()/np.sqrt(len(x))
    assert isinstance(ci, Interval) and ci.value == pytest.approx(x.mean())
    assert ci.low == pytest.approx(x.mean() - half, abs=0.15*half)
    assert ci.high == pytest.approx(x.mean() + half, abs=0.15*half)
    assert bootstrap_ci(x, n=50, seed=1) == bootstrap_ci(x, n=50, seed=1) != bootstrap_ci(x, n=50, seed=2)


def test_places_make_it_wider_where_queries_of_a_place_are_alike():
    rng = np.random.default_rng(0)
    place = np.repeat(np.arange(40), 25)
    x = rng.normal(size=40)[place] + 0.1*rng.normal(size=1000)
    alone, together = bootstrap_ci(x), bootstrap_ci(x, groups=[f"place {o}" for o in place])
    assert together.high - together.low > 3*(alone.high - alone.low)
    means = x.reshape(40, 25).mean(1)
    assert together.high - together.low == pytest.approx(2*1.96*means.std()/np.sqrt(40), rel=0.15)


def test_paired_differences():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=500)
    a, b = hard + 0.05 + 0.1*rng.normal(size=500), hard + 0.1*rng.normal(size=500)
    a[3], b[7] = np.nan, np.nan
    ci = paired_difference_ci(a, b)
    assert ci.value == pytest.approx(np.nanmean(a - b)) and ci.low > 0 and ci.high < 0.1
    assert bootstrap_ci(a).low < bootstrap_ci(b).value      # while the two intervals overlap
    two = paired_difference_ci(np.stack([a, a], 1), np.stack([b, b], 1), combine=lambda m: m.sum(-1))
    assert two.value == pytest.approx(2*ci.value)


def test_interval_of_little():
    assert np.isnan(bootstrap_ci([np.nan, np.nan])).all()
    assert tuple(bootstrap_ci([0.5])) == (0.5, 0.5, 0.5)
    many = bootstrap_ci(np.ones((10, 3)))
    assert many.value.tolist() == many.low.tolist() == [1, 1, 1]
    with pytest.raises(InputError, match="differ in number"): bootstrap_ci(np.ones(4), groups=[1, 2])
    with pytest.raises(InputError, match="other queries"): paired_difference_ci(np.ones(4), np.ones(5))


def test_drop_own():
    ids, own = np.array([[4, 2, 9], [1, 2, 3], [7, 7, 0]]), [9, 8, 0]
    assert drop_own(ids, own).tolist() == [[4, 2], [1, 2], [7, 7]]
    found, dists = drop_own(ids, own, ids*10)
    np.testing.assert_array_equal(dists, found*10)
    with pytest.raises(InputError): drop_own(ids, [1])


BAD = {
    "ids outside": lambda q, a, i: label_overlap(q, a, i + 1),
    "ids of floats": lambda q, a, i: label_overlap(q, a, i*1.),
    "labels are counts": lambda q, a, i: label_overlap(q*2, a, i),
    "rankings of other queries": lambda q, a, i: label_overlap(q, a, i[:3]),
    "depth 0": lambda q, a, i: precision_at_k(i > 3, [0]),
    "depth beyond": lambda q, a, i: precision_at_k(i > 3, [61]),
    "depth not whole": lambda q, a, i: precision_at_k(i > 3, [1.5]),
    "no results": lambda q, a, i: precision_at_k(i[:, :0] > 3),
    "R not given": lambda q, a, i: ap_at_k(i > 3, [5]),
    "nothing to break ties by": lambda q, a, i: score_rankings(i, q, a, metrics=["map_tie_aware"]),
    "too short": lambda q, a, i: score_rankings(i[:, :20], q, a, metrics=["map_first_relevant"]),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what):
    query, archive, ids, _ = world()
    with pytest.raises(InputError): BAD[what](query, archive, ids)


def test_unknown_names():
    query, archive, ids, _ = world()
    for call in (lambda: relevance(query, archive, ids, "some"), lambda: ap_at_k(ids > 3, denominator="R"),
                 lambda: score_rankings(ids, query, archive, metrics=["map", "nope"])):
        with pytest.raises(UnknownNameError): call()


def test_single_depths_and_lists_agree():
    query, archive, ids, dists = world()
    overlap, histogram = label_overlap(query, archive, ids), overlap_histogram(query, archive)
    rel, n_relevant, sizes = overlap > 0, histogram[:, 1:].sum(1), archive.sum(1)[ids]
    for f in (lambda ks: precision_at_k(rel, ks), lambda ks: recall_at_k(rel, n_relevant, ks),
              lambda ks: f1_at_k(rel, n_relevant, ks), lambda ks: ap_at_k(rel, ks, n_relevant),
              lambda ks: ap_at_k(rel, ks, denominator="found"), lambda ks: ap_at_k(rel, ks, denominator="k"),
              lambda ks: mmp_at_k(rel, n_relevant, ks), lambda ks: acg_at_k(overlap, ks),
              lambda ks: wap_at_k(overlap, ks), lambda ks: ndcg_at_k(overlap, ks, histogram),
              lambda ks: ndcg_at_k(overlap, ks), lambda ks: tie_aware_ap(rel, dists, ks, n_relevant),
              lambda ks: label_set_scores(overlap, query.sum(1), sizes, ks)["precision"],
              lambda ks: hit_at_k(rel, ks), lambda ks: wap_at_k(overlap, ks, by_rank=True),
              lambda ks: union_scores(*union_counts(query, archive, ids), query.sum(1), 9, ks)["accuracy"]):
        assert f(None).shape == (17,)
        np.testing.assert_array_equal(f(None), f([60])[:, 0])


# Predicted classes.

def test_scores_of_a_classifier_against_torchmetrics(monkeypatch):
    from torchmetrics.functional import classification as tm
    from rsir_nb.metrics import classification as page
    rng = np.random.default_rng(0)
    y, p = (rng.random((80, 7)) < 0.3).astype(int), rng.random((80, 7)).astype(np.float32)
    found = page.classification_scores(y, p >= 0.5) | page.class_ranking_scores(y, p)
    target, preds = torch.from_numpy(y), torch.from_numpy(p)
    for average in "macro", "micro":
        for ours, theirs in dict(precision=tm.multilabel_precision, recall=tm.multilabel_recall, f1=tm.multilabel_f1_score).items():
            assert found[f"{ours}.{average}"] == pytest.approx(float(theirs(preds, target, 7, average=average)), rel=1e-5)
        assert found[f"f2.{average}"] == pytest.approx(float(tm.multilabel_fbeta_score(preds, target, 2., 7, average=average)), rel=1e-5)
    assert found["hamming_loss"] == pytest.approx(float(tm.multilabel_hamming_distance(preds, target, 7)), rel=1e-5)
    assert found["subset_accuracy"] == pytest.approx(float(tm.multilabel_exact_match(preds, target, 7)), rel=1e-5)
    assert found["coverage_error"] == pytest.approx(float(tm.multilabel_coverage_error(preds, target, 7)), rel=1e-5)
    assert found["ranking_loss"] == pytest.approx(float(tm.multilabel_ranking_loss(preds, target, 7)), rel=1e-5)
    assert found["label_ranking_average_precision"] == pytest.approx(
        float(tm.multilabel_ranking_average_precision(preds, target, 7)), rel=1e-5)
    labelled = y.any(1)   # by name, images without labels do not count
    part = page.classification_scores(y[labelled], p[labelled] >= 0.5) | page.class_ranking_scores(y[labelled], p[labelled])
    for name, value in part.items():
        named = make_metric(f"class_{name.replace('.', '_')}").metric
        assert named.compute(y, p) == value and named.of == "classes"
        assert (named.better == "lower") == (name in ("hamming_loss", "one_error", "coverage_error", "ranking_loss"))
    assert score_embeddings(dict(s1=p), y, ["class_f2_micro"], probabilities=p) == {"class_f2_micro": part["f2.micro"]}
    with pytest.raises(InputError, match="score of a classifier"): score_embeddings(dict(s1=p), y, ["class_f2_micro"])
    with pytest.raises(InputError, match="no image with labels"): page.class_scores_of(0*y, p)
    with pytest.raises(InputError, match="do not fit; found"): page.class_scores_of(y, p[:, :3])
    with pytest.raises(InputError, match="zeros and ones"): page.classification_scores(y*2, y)
    with pytest.raises(InputError, match="do not fit"): page.class_ranking_scores(y, p[:, :3])
    def missing(name): raise ModuleNotFoundError(name)
    monkeypatch.setattr(page.importlib, "import_module", missing)
    with pytest.raises(InputError, match=r"rsir_nb\[metric\]"): page.classification_scores(y, y)
