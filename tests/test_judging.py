"All scores in one pass against their definitions, whatever the labels, ties, depths and blocks are."
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rsir_nb.core import InputError, UnknownNameError
from rsir_nb.metrics.judging import JUDGED, Judge, LabelSets, count_relevant
from rsir_nb.metrics.labels import overlap_histogram
from rsir_nb.metrics.scores import METRICS, Judged, drop_own, get_metric, score_rankings


def rankings(n_queries, n_items, n_labels, share, n_dists, own, seed, depth=None):
    "Random labels, some of them none at all, and rankings by distances with many ties."
    rng = np.random.default_rng(seed)
    draw = lambda n: ((rng.random((n, n_labels)) < share) & (rng.random((n, 1)) > 0.15)).astype(np.uint8)
    query, archive = draw(n_queries), draw(n_items)
    if own: archive = np.concatenate([query, archive])
    dists = rng.integers(0, n_dists, (n_queries, len(archive))).astype(np.float64)
    ids = np.argsort(dists, axis=1, kind="stable")
    dists, owned = np.take_along_axis(dists, ids, 1), np.arange(n_queries) if own else None
    if own: ids, dists = drop_own(ids, owned, dists)
    return query, archive, ids[:, :depth], dists[:, :depth], owned


def by_definition(query, archive, ids, dists, own, ks, names):
    judged = Judged(ids, query, archive, dists, own)
    found = {o: get_metric(o).compute(judged, ks) for o in names}
    return {o: np.where(query.any(1)[:, None], x, np.nan) for o, x in found.items()}


def same(ours, theirs):
    assert set(ours) == set(theirs)
    for name, x in ours.items(): np.testing.assert_allclose(x, theirs[name], rtol=1e-12, atol=1e-12, err_msg=name)


@settings(max_examples=80, deadline=None)
@given(n_queries=st.integers(1, 9), n_items=st.integers(1, 40), n_labels=st.sampled_from([1, 2, 7, 19, 63, 64, 65, 130]),
       share=st.sampled_from([0.02, 0.15, 0.5, 1.]), n_dists=st.sampled_from([1, 3, 200]), own=st.booleans(),
       seed=st.integers(0, 2**32 - 1), data=st.data())
def test_whole_rankings(n_queries, n_items, n_labels, share, n_dists, own, seed, data):
    world = rankings(n_queries, n_items, n_labels, share, n_dists, own, seed)
    query, archive, ids, dists, owned = world
    ks = data.draw(st.lists(st.integers(1, ids.shape[1]), min_size=1, max_size=6))      # in any order, also twice
    found = score_rankings(ids, query, archive, ks, None, dists, owned, block=data.draw(st.integers(1, 10)))
    assert set(found) == set(JUDGED)
    same(found, by_definition(query, archive, ids, dists, owned, ks, JUDGED))


@settings(max_examples=60, deadline=None)
@given(n_labels=st.sampled_from([1, 19, 70]), share=st.sampled_from([0.02, 0.2, 0.7]), own=st.booleans(),
       depth=st.integers(1, 30), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_rankings_that_end_early(n_labels, share, own, depth, seed, data):
    query, archive, ids, dists, owned = rankings(6, 50, n_labels, share, 400, own, seed, depth)
    ks = data.draw(st.lists(st.integers(1, depth), min_size=1, max_size=5))
    found = score_rankings(ids, query, archive, ks, own=owned)
    assert set(found) == set(JUDGED[:-2])
    same(found, by_definition(query, archive, ids, dists, owned, ks, JUDGED[:-2]))
    if depth == max(ks): return
    names, inside = ["map_tie_aware"], dists[:, max(ks) - 1] < dists[:, -1]
    if not inside.all(): return
    same(score_rankings(ids, query, archive, ks, names, dists, owned),
         by_definition(query, archive, ids, dists, owned, ks, names))


def test_threads_and_blocks_change_nothing():
    query, archive, ids, dists, _ = rankings(400, 90, 19, 0.2, 12, False, 0)
    queries, items = LabelSets(query), LabelSets(archive)
    one, three = (Judge(queries, items, [1, 30, 90], 90, threads=o)(ids, slice(None), JUDGED, dists) for o in (1, 3))
    judge = Judge(queries, items, [1, 30, 90], 90, threads=2)
    blocks = [judge(ids[i:i+70], slice(i, i + 70), JUDGED, dists[i:i+70]) for i in range(0, 400, 70)]
    for name in JUDGED:
        np.testing.assert_array_equal(one[name], three[name])
        np.testing.assert_array_equal(one[name], np.concatenate([o[name] for o in blocks]))


@pytest.mark.parametrize("n_labels", [1, 19, 64, 65, 200])
def test_label_sets(n_labels):
    labels = (np.random.default_rng(0).random((300, n_labels)) < 1.5/n_labels).astype(np.uint8)
    sets = LabelSets(labels)
    np.testing.assert_array_equal(sets.labels, labels)
    np.testing.assert_array_equal(sets.sets[sets.which], sets.words)
    assert len(sets.sets) == len(np.unique(labels, axis=0)) and len(sets) == 300
    rows = np.array([5, 2, 2, 299])
    np.testing.assert_array_equal(sets.take(rows).labels, labels[rows])


@pytest.mark.parametrize("own", [False, True])
def test_what_there_was_to_find(own):
    rng = np.random.default_rng(1)
    labels = (rng.random((500, 70)) < 0.04).astype(np.uint8)
    sets, rows, items = LabelSets(labels), np.arange(0, 500, 7), np.arange(500) if own else np.arange(1, 500, 2)
    which, at_least = count_relevant(sets.take(rows), sets.take(items), leave_out=own)
    wanted = overlap_histogram(labels[rows], labels[items], np.searchsorted(items, rows) if own else None)
    np.testing.assert_array_equal(at_least[which], np.cumsum(wanted[:, ::-1], axis=1)[:, ::-1])
    plain = labels[rows].astype(int) @ labels[items].astype(int).T
    np.testing.assert_array_equal(wanted[:, 1:].sum(1), (plain > 0).sum(1) - (own & labels[rows].any(1)))


def test_a_metric_of_ones_own_goes_by_its_definition(monkeypatch):
    query, archive, ids, dists, own = rankings(20, 30, 9, 0.3, 8, True, 3)
    def last(j, ks):
        "whether the item at rank k is relevant"
        return j.rel[:, np.array(ks) - 1]

    def halves(j, ks):
        "half of map"
        return METRICS.get("map")(j, ks)/2
    for name, f in dict(last=last, halves=halves).items():
        monkeypatch.setitem(METRICS.entries, name, f)
        monkeypatch.setitem(METRICS.meta, name, dict(source="a user"))
    assert (get_metric("halves").definition, get_metric("halves").source) == ("half of map", "a user")
    found = score_rankings(ids, query, archive, [1, 5], ["last", "map", "halves"], dists, own, block=7)
    assert list(found) == ["last", "map", "halves"]
    np.testing.assert_allclose(found["halves"], found["map"]/2)
    for name in "last", "halves": assert np.isnan(found[name][~query.any(1)]).all()
    asked = query.any(1)
    shared = query[:, None].astype(int) & archive[ids][:, [0, 4]]
    np.testing.assert_array_equal(found["last"][asked], shared.any(-1)[asked])
    everything = score_rankings(ids, query, archive, [1, 5], None, dists, own)
    assert {"last", "halves"} <= set(everything)
    with pytest.raises(InputError, match="registered twice"): METRICS.register("map")(halves)


def test_what_cannot_be_judged():
    query, archive, ids, dists, _ = rankings(5, 30, 9, 0.5, 8, False, 0)
    queries, items = LabelSets(query, "queries"), LabelSets(archive)
    judge = Judge(queries, items, [3, 10], 10)
    with pytest.raises(InputError, match="other labels"): Judge(LabelSets(query[:, :8]), items, [3], 10)
    with pytest.raises(InputError, match="1 to 10"): Judge(queries, items, [11], 10)
    with pytest.raises(InputError, match="these depths"): Judge(queries, items, [], 10)
    with pytest.raises(InputError, match="another depth"): judge(ids)
    with pytest.raises(InputError, match="no rankings"): judge(ids[:, :10], slice(0, 2))
    with pytest.raises(InputError, match="0 to 29"): judge(ids[:, :10] + 30)
    with pytest.raises(InputError, match="pass dists"): judge(ids[:, :10], names=["map_tie_aware"])
    with pytest.raises(InputError, match="do not fit"): judge(ids[:, :10], names=["map_tie_aware"], dists=dists)
    with pytest.raises(InputError, match="do not rise"):
        judge(ids[:, :10], names=["map_tie_aware"], dists=-np.arange(50.).reshape(5, 10))
    with pytest.raises(InputError, match="whole archive"): judge(ids[:, :10], names=["map_first_relevant"])
    with pytest.raises(UnknownNameError, match="did you mean"): judge(ids[:, :10], names=["ndgc"])
    with pytest.raises(InputError, match="zeros and ones"): LabelSets(query*2)


def test_no_queries_and_no_labels():
    query, archive, ids, _, _ = rankings(5, 30, 9, 0.5, 8, False, 0)
    for x in score_rankings(ids[:0], query[:0], archive, [3]).values(): assert x.shape == (0, 1)
    for x in score_rankings(ids, query*0, archive, [3]).values(): assert np.isnan(x).all()
    for x in score_rankings(ids, query, archive*0, [3]).values(): assert (x[query.any(1)] == 0).all()


def rows_of(classes, n_classes): return np.vstack([np.eye(n_classes, dtype=np.uint8), np.zeros((1, n_classes), np.uint8)])[classes]


@settings(max_examples=60, deadline=None)
@given(n_queries=st.integers(1, 9), n_items=st.integers(1, 40), n_classes=st.sampled_from([1, 3, 70]),
       n_dists=st.sampled_from([1, 3, 200]), own=st.booleans(), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_class_numbers_are_judged_as_their_rows_of_zeros_and_ones(n_queries, n_items, n_classes, n_dists, own, seed, data):
    rng = np.random.default_rng(seed)
    query, archive = rng.integers(-1, n_classes, n_queries), rng.integers(-1, n_classes, n_items)
    if own: archive = np.concatenate([query, archive])
    dists = rng.integers(0, n_dists, (n_queries, len(archive))).astype(np.float64)
    ids = np.argsort(dists, axis=1, kind="stable")
    dists, owned = np.take_along_axis(dists, ids, 1), np.arange(n_queries) if own else None
    if own: ids, dists = drop_own(ids, owned, dists)
    ks = data.draw(st.lists(st.integers(1, ids.shape[1]), min_size=1, max_size=4))
    for names in None, ["m3_precision", "m3_accuracy", "m3_subset_accuracy"]:
        found = score_rankings(ids, query, archive, ks, names, dists, owned, block=4)
        same(found, score_rankings(ids, rows_of(query, n_classes), rows_of(archive, n_classes), ks, names, dists, owned))
    same(found, by_definition_of(query, archive, ids, dists, owned, ks, list(found)))


def by_definition_of(query, archive, ids, dists, own, ks, names):
    judged = Judged(ids, query, archive, dists, own)
    return {o: np.where((query >= 0)[:, None], get_metric(o).compute(judged, ks), np.nan) for o in names}


def test_thirty_five_thousand_classes_of_330_000_images():
    rng, n = np.random.default_rng(0), 330_000
    import tracemalloc
    classes = rng.integers(0, 35_000, n)
    rows = rng.choice(n, 3000, replace=False)
    ids = rng.integers(0, n, (3000, 20))
    ids[:, 3] = np.argsort(classes, kind="stable")[np.searchsorted(np.sort(classes), classes[rows])]   # one of its class
    score_rankings(ids[:9], classes[rows[:9]], classes, [1, 5, 20])   # compiled before memory is counted
    tracemalloc.start()
    found = score_rankings(ids, classes[rows], classes, [1, 5, 20])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6, f"{peak/1e6:.0f} MB"                          # 11.5 GB as a dense matrix
    hits = classes[ids] == classes[rows, None]
    np.testing.assert_array_equal(found["hit"], np.maximum.accumulate(hits, 1)[:, [0, 4, 19]])
    counts = np.bincount(classes)[classes[rows]]
    np.testing.assert_allclose(found["recall"][:, 2], hits.sum(1)/counts)


def test_forms_of_labels_do_not_mix():
    classes, rows = np.array([0, 1, -1]), np.array([[1, 0], [0, 1], [0, 0]])
    ids = np.array([[0, 1, 2]]*3)
    for a, b in (classes, rows), (rows, classes):
        with pytest.raises(InputError, match="other labels"): score_rankings(ids, a, b, [1])
        with pytest.raises(InputError, match="other labels"): overlap_histogram(a, b)
    for bad in np.array([0., 1., 2.]), np.array([0, -2, 1]), np.array(["a", "b", "c"]):
        with pytest.raises(InputError, match="class numbers"): LabelSets(bad)
    with pytest.raises(InputError, match="class numbers of the queries"): overlap_histogram(np.array([0.5]), classes)
    for x in score_rankings(ids, classes, classes, [2]).values(): assert np.isnan(x[2]).all()
