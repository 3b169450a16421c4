"Partner recall against NumPy and torchmetrics, for codes and embeddings, with ties; medians with intervals; evaluation without labels."
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rsir_nb.core import InputError, UnknownNameError
from rsir_nb.metrics.intervals import median_ci
from rsir_nb.metrics.partners import partner_ranks, partner_recall, score_partners
from rsir_nb.metrics.scores import get_metric
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
