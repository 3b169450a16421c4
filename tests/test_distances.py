"Distances by name against scipy, scikit-learn and faiss; ties, ranks, threads, and a distance of one's own."
import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rsir_nb.core import METHODS, InputError, UnknownNameError
from rsir_nb.data.base import TensorArchive
from rsir_nb.engine.encode import encode
from rsir_nb.engine.evaluate import evaluate_store
from rsir_nb.engine.search import Searcher
from rsir_nb.methods.base import Method
from rsir_nb.retrieval.distances import DISTANCES, Distance, ProposedDistance, make_distance
from rsir_nb.retrieval.vectors import VectorIndex
from scipy.spatial.distance import cdist
from sklearn.metrics.pairwise import additive_chi2_kernel


class CityBlock(Distance):
    "Sum of absolute differences, as a user would write it."
    def pairwise(self, xq, x): return cdist(xq, x, "cityblock")


ORACLES = {"cosine": lambda a, b: cdist(a, b, "cosine"), "l2": lambda a, b: cdist(a, b, "sqeuclidean"),
           "ip": lambda a, b: -(a @ b.T), "chi2": lambda a, b: -additive_chi2_kernel(a, b)/2,
           "city": lambda a, b: cdist(a, b, "cityblock")}
NAMES = list(ORACLES)


def get(name): return CityBlock() if name == "city" else make_distance(name)


def features(rng, n, dim): return np.maximum(rng.normal(size=(n, dim)) + 0.3, 0.01 if dim < 9 else 0).astype(np.float32)


def truth(name, xq, x): return ORACLES[name](xq.astype(np.float64), x.astype(np.float64))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [1, 10, 190, 700])
def test_nearest_and_pairwise(name, k):
    rng = np.random.default_rng(0)
    xq, x = features(rng, 23, 48), features(rng, 700, 48)
    d, distance = truth(name, xq, x), get(name)
    a, b = distance.prepare(xq), distance.prepare(x)
    np.testing.assert_allclose(distance.pairwise(a, b), d, rtol=2e-6, atol=3e-7)
    dists, at = distance.nearest(a, b, k)
    assert dists.dtype == np.float32 and at.dtype == np.int64 and dists.shape == at.shape == (23, k)
    np.testing.assert_allclose(dists, np.sort(d, 1)[:, :k], rtol=2e-6, atol=3e-7)
    np.testing.assert_allclose(np.take_along_axis(d, at, 1), np.sort(d, 1)[:, :k], rtol=2e-6, atol=3e-7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", [1, 5, 64, 513])
def test_equal_rows_tie_in_their_order_wherever_they_stand(name, dim):
    rng = np.random.default_rng(dim)
    few, which = features(rng, 7, dim), rng.integers(0, 7, 1500)
    xq, distance = features(rng, 70, dim), get(name)
    a, small = distance.prepare(xq), distance.prepare(few)
    x = small[which]
    exact = distance.pairwise(a, small)[:, which].astype(np.float32)
    for k in 1, 40, 1500:
        dists, at = distance.nearest(a, x, k)
        order = np.argsort(exact, axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(at, order)
        np.testing.assert_array_equal(dists, np.take_along_axis(exact, order, 1))
    own = rng.integers(0, 1500, 70)
    places = np.argsort(np.argsort(exact, axis=1, kind="stable"), axis=1)
    np.testing.assert_array_equal(distance.ranks(a, x, own), 1 + places[np.arange(70), own])


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(NAMES), n=st.integers(1, 90), n_queries=st.integers(1, 9), dim=st.integers(1, 12),
       seed=st.integers(0, 10**6), data=st.data())
def test_everything_agrees_with_the_whole_table(name, n, n_queries, dim, seed, data):
    rng, distance = np.random.default_rng(seed), get(name)
    a, x = (distance.prepare(rng.integers(1, 4, (m, dim))) for m in (n_queries, n))
    table, k = distance.pairwise(a, x).astype(np.float32), data.draw(st.integers(1, n))
    order = np.argsort(table, axis=1, kind="stable")
    dists, at = distance.nearest(a, x, k)
    np.testing.assert_array_equal(at, order[:, :k])
    own = np.array([data.draw(st.integers(0, n - 1)) for _ in range(n_queries)])
    assert distance.ranks(a, x, own).tolist() == [1 + o.tolist().index(i) for o, i in zip(order, own, strict=True)]
    radius = float(table.ravel()[data.draw(st.integers(0, table.size - 1))])
    query, near, rows = distance.within(a, x, radius)
    wanted = np.nonzero(table <= radius)
    np.testing.assert_array_equal((query, rows), wanted)
    np.testing.assert_array_equal(near, table[wanted])


def test_nothing_to_compare():
    for name in NAMES:
        distance = get(name)
        x = distance.prepare(np.ones((4, 3)))
        assert distance.nearest(x[:0], x, 2)[0].shape == (0, 2)
        assert [len(o) for o in distance.within(x[:0], x, 1.)] == [0, 0, 0]
        assert distance.ranks(x[:0], x, np.zeros(0, int)).shape == (0,)


def test_the_inner_product_is_that_of_faiss():
    rng = np.random.default_rng(3)
    x, xq = rng.normal(size=(3000, 32)).astype(np.float32), rng.normal(size=(20, 32)).astype(np.float32)
    peer = faiss.IndexFlatIP(32)
    peer.add(x)
    theirs, ids = peer.search(xq, 15)
    dists, at = make_distance("ip").nearest(xq, x, 15)
    np.testing.assert_allclose(-dists, theirs, rtol=1e-5)
    assert (at == ids).mean() > 0.99


def test_threads_change_nothing(monkeypatch):
    rng, chi = np.random.default_rng(4), make_distance("chi2")
    xq, x = features(rng, 333, 65), features(rng, 901, 65)
    found = []
    for threads in "1", "3":
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        found.append((*chi.nearest(xq, x, 40), chi.ranks(xq, x, np.arange(333)), *chi.within(xq, x, 9.)))
    for one, three in zip(*found, strict=True): np.testing.assert_array_equal(one, three)


def test_chi_square_of_large_and_of_tiny_counts():
    rng, chi = np.random.default_rng(5), make_distance("chi2")
    scale = np.float32(10)**rng.integers(-6, 5, 400)
    x = features(rng, 400, 300)*scale[:, None]
    d = np.array([[0.5*np.sum((u - v)**2/(u + v + 1e-10)) for v in x.astype(np.float64)] for u in x[:5].astype(np.float64)])
    dists, at = chi.nearest(x[:5], x, 400)
    np.testing.assert_array_equal(at, np.argsort(np.float32(d), axis=1, kind="stable"))
    np.testing.assert_allclose(dists, np.sort(d, 1), rtol=1e-6)
    zeros = np.zeros((3, 8), np.float32)
    assert chi.pairwise(zeros, zeros).max() == 0


def test_mistakes_are_named():
    with pytest.raises(UnknownNameError, match="did you mean chi2"): make_distance("chi")
    with pytest.raises(InputError, match="2 of the queries have negative values.*row 1"):
        make_distance("chi2").prepare([[0, 1], [-1, 2], [0, -3]], "queries")
    with pytest.raises(InputError, match="no direction"): make_distance("cosine").prepare(np.zeros((2, 3)))
    for name in "cosine", "l2", "ip", "chi2":
        distance = make_distance(name)
        for bad in np.ones(3), np.full((2, 2), np.inf), [["a"]], np.ones((2, 0)):
            with pytest.raises(InputError): distance.prepare(bad)
        with pytest.raises(InputError, match=r"\(N, 4\)"): distance.prepare(np.ones((2, 3)), dim=4)
    with pytest.raises(InputError, match="no pairwise"): Distance().nearest(np.ones((1, 2)), np.ones((3, 2)), 1)
    with pytest.raises(InputError, match="no rough"): ProposedDistance().within(np.ones((1, 2)), np.ones((3, 2)), 1)


def test_an_index_by_a_distance_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setitem(DISTANCES.entries, "city", CityBlock)
    monkeypatch.setitem(DISTANCES.meta, "city", {})
    rng = np.random.default_rng(6)
    x = features(rng, 60, 9)
    ix = VectorIndex(9, distance="city")
    ix.add(x)
    ix = VectorIndex.load(ix.save(tmp_path/"x.index"))
    assert ix.distance == "city"
    dists, ids = ix.search(x[:4], 5, where=np.arange(60) % 3 == 0)
    d = truth("city", x[:4], x)[:, ::3]
    np.testing.assert_array_equal(ids, 3*np.argsort(d, 1)[:, :5])
    np.testing.assert_allclose(dists, np.sort(d, 1)[:, :5], rtol=1e-6)


def test_a_radius_by_the_inner_product_may_be_negative():
    ix = VectorIndex(2, distance="ip")
    ix.add([[1, 2], [4, 8], [-1, 0]])
    lims, dists, ids = ix.range_search([[2, 2], [-1, 0]], -5)
    assert (lims.tolist(), dists.tolist(), ids.tolist()) == ([0, 2, 2], [-24, -6], [1, 0])
    with pytest.raises(InputError, match="no radius"): VectorIndex(2).range_search([[2, 2]], -0.1)


# A method says how its embeddings are compared; everything that compares them asks the store.

@METHODS.register("counts_for_tests")
class Counts(Method):
    "The means of four parts of an image: small counts matter most."
    needs_training, least_batch, distance = False, 1, "chi2"

    def __init__(self, sensors, img_size=8, norm=None, **kwargs):
        super().__init__(sensors, img_size=img_size, norm=norm, **kwargs)
        self.embed_dim = 4*next(iter(self.sensors.values())).in_chans

    def encode(self, x, modality): return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


def scenes(n=60):
    "Images whose kinds differ in one corner of one band, beside another band that says nothing."
    rng, kind = np.random.default_rng(8), np.arange(n) % 3
    x = rng.uniform(0.1, 0.3, (n, 3, 8, 8))
    x[:, 0, :4, :4] += 3*kind[:, None, None]
    x[:, 2] += rng.uniform(0, 60, n)[:, None, None]
    return TensorArchive({"rgb": x.astype(np.float32)}, labels=[["abc"[k]] for k in kind])


def test_query_and_evaluation_compare_as_the_method_says(tmp_path):
    archive = scenes()
    method = Counts(archive.sensors)
    store = encode(method, archive, tmp_path/"chi", progress=False)
    assert store.distance == "chi2" and store.provenance["distance"] == "chi2"
    z = np.asarray(store.embeddings["rgb"], np.float64)
    d = truth("chi2", z, z)
    hits = Searcher(method, store, {}).query("7", k=20)
    wanted = [i for i in np.argsort(d[7], kind="stable") if i != 7][:20]
    assert hits.ids == [str(i) for i in wanted] and hits.provenance()["distance"] == "chi2"
    np.testing.assert_allclose(hits.dists, d[7, wanted], rtol=1e-5)
    np.fill_diagonal(d, np.inf)
    rel = (np.arange(60)[:, None] - np.argsort(d, axis=1, kind="stable")) % 3 == 0
    found = evaluate_store(store, "leave_one_out", drawings=10)
    precision = found.table[(found.table.metric == "precision") & (found.table.k == 8)]["value"].item()
    assert precision == pytest.approx(rel[:, :8].mean()) and found.about["distance"] == "chi2"
    Counts.distance = "cosine"
    try: plain = encode(method, archive, tmp_path/"cosine", progress=False)
    finally: Counts.distance = "chi2"
    assert plain.distance == "cosine" and plain.weights_hash == store.weights_hash
    other = evaluate_store(plain, "leave_one_out", drawings=10)
    assert other.table[(other.table.metric == "precision") & (other.table.k == 8)]["value"].item() != precision


def test_a_distance_that_is_not_known_stops_encoding_before_it_begins(tmp_path, monkeypatch):
    archive = scenes(6)
    monkeypatch.setattr(Counts, "distance", "chi_square")
    with pytest.raises(UnknownNameError, match="distance"): encode(Counts(archive.sensors), archive, tmp_path/"x", progress=False)
    assert not (tmp_path/"x").exists() and not (tmp_path/"x.part").exists()


def test_negative_features_are_refused_where_they_are_compared(tmp_path, monkeypatch):
    archive, call = scenes(12), Counts.encode
    monkeypatch.setattr(Counts, "encode", lambda self, x, modality: call(self, x, modality) - 1)
    store = encode(Counts(archive.sensors), archive, tmp_path/"x", progress=False)
    with pytest.raises(InputError, match="negative values"): evaluate_store(store, "leave_one_out")
