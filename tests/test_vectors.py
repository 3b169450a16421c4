"The float index against scipy, faiss and sklearn, and its ties where vectors are equal."
import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rsir_nb.core import INDEXES, CorruptError, InputError, UnknownNameError
from rsir_nb.retrieval.vectors import VectorIndex
from scipy.spatial.distance import cdist

SCIPY = {"cosine": "cosine", "l2": "sqeuclidean"}


def filled(x, metric, ids=None):
    ix = VectorIndex(dim=x.shape[1], distance=metric)
    ix.add(x, ids)
    return ix


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("k", [1, 10, 997, 5000])
def test_against_scipy_in_float64(metric, k):
    rng = np.random.default_rng(0)
    x, xq = rng.normal(size=(2000, 48)).astype(np.float32), rng.normal(size=(20, 48)).astype(np.float32)
    d = cdist(xq.astype(np.float64), x.astype(np.float64), SCIPY[metric])
    dists, ids = filled(x, metric).search(xq, k)
    assert dists.shape == (20, min(k, 2000)) and dists.dtype == np.float32 and ids.dtype == np.int64
    np.testing.assert_allclose(dists, np.sort(d, 1)[:, :k], rtol=2e-6, atol=3e-7)
    np.testing.assert_allclose(np.take_along_axis(d, ids, 1), np.sort(d, 1)[:, :k], rtol=2e-6, atol=3e-7)


def test_against_faiss():
    rng = np.random.default_rng(0)
    x, xq = rng.normal(size=(5000, 64)).astype(np.float32), rng.normal(size=(50, 64)).astype(np.float32)
    peer = faiss.IndexFlatL2(64)
    peer.add(x)
    peer_dists, peer_ids = peer.search(xq, 20)
    dists, ids = filled(x, "l2").search(xq, 20)
    np.testing.assert_allclose(dists, peer_dists, rtol=1e-5)
    assert (ids == peer_ids).mean() > 0.999


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("dim", [3, 32, 769])
def test_equal_vectors_have_equal_distances_in_order_of_insertion(metric, dim):
    rng = np.random.default_rng(1)
    few = rng.normal(size=(7, dim)).astype(np.float32)
    which = rng.integers(0, 7, 3000)
    xq = rng.normal(size=(33, dim)).astype(np.float32)
    exact = cdist(xq.astype(np.float64), few.astype(np.float64), SCIPY[metric])
    expected = np.argsort(exact[:, which].round(9), axis=1, kind="stable")
    for k in 1, 100, 3000:
        dists, ids = filled(few[which], metric).search(xq, k)
        np.testing.assert_array_equal(ids, expected[:, :k])
        assert all(len(np.unique(row)) <= 7 for row in dists)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("share", [0., 0.01, 0.6, 1.])
def test_filters(metric, share):
    rng = np.random.default_rng(2)
    x, ids = rng.normal(size=(1500, 16)).astype(np.float32), rng.permutation(9999)[:1500]
    mask, xq = rng.random(1500) < share, x[:5]
    rows = np.flatnonzero(mask)
    d = cdist(xq.astype(np.float64), x.astype(np.float64), SCIPY[metric])[:, rows]
    ix = filled(x, metric, ids)
    for where in mask, ids[mask]:
        dists, found = ix.search(xq, 30, where=where)
        np.testing.assert_array_equal(found, ids[rows[np.argsort(d, 1)[:, :30]]])
        assert found.shape == (5, min(30, len(rows)))


@pytest.mark.parametrize("metric,radius", [("cosine", 0.), ("cosine", 0.8), ("cosine", 2.), ("l2", 0.),
                                           ("l2", 20.)])
def test_range_search(metric, radius):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(800, 16)).astype(np.float32)
    x[50] = x[3]
    lims, dists, ids = filled(x, metric).range_search(x[:9], radius)
    d = cdist(x[:9].astype(np.float64), x.astype(np.float64), SCIPY[metric])
    for q in range(9):
        found = ids[lims[q]:lims[q+1]]
        near = np.flatnonzero(d[q] <= radius + 1e-6)
        assert set(found) == set(near)
        assert (np.diff(dists[lims[q]:lims[q+1]]) >= 0).all()
    assert ids[:lims[1]][0] == 0 and 50 in ids[lims[3]:lims[4]]


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 200), k=st.integers(1, 250), dim=st.integers(1, 9), seed=st.integers(0, 10**6),
       metric=st.sampled_from(["cosine", "l2"]))
def test_small_whole_numbers_with_many_ties(n, k, dim, seed, metric):
    rng = np.random.default_rng(seed)
    x, xq = (rng.integers(1, 4, (m, dim)).astype(np.float32) for m in (n, 3))
    d = cdist(xq.astype(np.float64), x.astype(np.float64), SCIPY[metric])
    dists, ids = filled(x, metric).search(xq, k)
    if metric == "l2": np.testing.assert_array_equal(ids, np.argsort(d, 1, kind="stable")[:, :k])
    np.testing.assert_allclose(dists, np.sort(d, 1)[:, :k], atol=3e-7, rtol=1e-6)


def test_saving_and_removing(tmp_path):
    rng = np.random.default_rng(4)
    x = rng.normal(size=(300, 8)).astype(np.float32)
    path = filled(x, "l2").save(tmp_path/"v.index")
    ix = VectorIndex.load(path)
    assert ix.distance == "l2" and ix.dim == 8
    ix.remove(np.arange(0, 300, 2))
    ix.add(x[:4])
    dists, ids = ix.search(x[:1], 2)
    assert ids[0, 0] == 300 and dists[0, 0] == 0
    np.testing.assert_array_equal(VectorIndex.load(path, mmap=False).vectors, x)
    damaged = bytearray(path.read_bytes())
    damaged[-3000] ^= 2
    path.write_bytes(damaged)
    with pytest.raises(CorruptError): VectorIndex.load(path)


def test_empty_and_bad():
    ix = INDEXES.create("vectors", dim=4)
    assert ix.search(np.ones((2, 4)), 3)[0].shape == (2, 0)
    assert [o.tolist() for o in ix.range_search(np.ones((2, 4)), 3)] == [[0, 0, 0], [], []]
    for bad in np.ones(4), np.ones((1, 5)), np.full((1, 4), np.nan), np.zeros((1, 4)), [["a"]*4]:
        with pytest.raises(InputError): ix.add(bad)
    for kwargs in dict(dim=0), dict(dim=2.5):
        with pytest.raises(InputError): VectorIndex(**kwargs)
    with pytest.raises(UnknownNameError, match="distance"): VectorIndex(4, distance="dot")
    with pytest.raises(InputError, match="from 1"): ix.search(np.ones((2, 4)), 0)
