"Two runs compared: the numbers by hand, what is refused, and where the scores of single queries come from."
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from engine_run import tiny_config
from rsir_nb.core import InputError, MissingFileError, UnknownNameError
from rsir_nb.engine.compare import compare_runs
from rsir_nb.engine.evaluate import evaluate, evaluate_store
from rsir_nb.engine.hash import train_hash
from rsir_nb.engine.protocols import Protocol
from rsir_nb.engine.train import pretrain
from rsir_nb.retrieval.codes import CodeStore
from rsir_nb.metrics.intervals import bootstrap_ci, sign_flip_test

CLASSES = list("ABCDE")


def keep(folder, name, n_bits=32, rows=slice(None), protocol="csmae", sensors=("s1", "s2"), depth=1000, changes=None):
    "A folder like that of a run, with an evaluation of codes of 20 places."
    rng = np.random.default_rng(0)
    labels = rng.random((200, 5)) < 0.35
    labels[np.arange(200), rng.integers(0, 5, 200)] = True
    mixing = rng.normal(size=(5, 64))
    h = {m: labels @ mixing + noise*rng.normal(size=(200, 64)) for m, noise in dict(s1=1.5, s2=1.).items()}
    codes = {m: np.packbits(h[m][rows, :n_bits] > 0, axis=1) for m in sensors}
    table = pd.DataFrame(dict(id=[f"p{i}" for i in range(200)], place=[f"place {i//10}" for i in range(200)],
                              split=["val"]*100 + ["test"]*100, labels=[list(np.array(CLASSES)[x]) for x in labels]))
    store = CodeStore.write(folder/name/"codes", codes, table.assign(**(changes or {}))[rows], name)
    kept = evaluate_store(store, protocol, name, depth=depth, drawings=20)
    kept.save(folder/name/"evaluation"/(protocol if isinstance(protocol, str) else "mine"))
    return folder/name, kept


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    return [keep(folder, name, n_bits) for name, n_bits in dict(long=64, short=8).items()]


def test_the_numbers(runs):
    (a, kept_a), (b, kept_b) = runs
    found = compare_runs(a, b, "csmae").set_index("direction")
    assert list(found.index) == ["s1->s1", "s1->s2", "s2->s1", "s2->s2"] and set(found.k) == {100}
    for name, row in found.iterrows():
        x, y = (o.queries[o.queries.direction == name].set_index("id") for o in (kept_a, kept_b))
        gap = (x["map@100"] - y["map@100"]).astype(float)
        assert row.mean_a == pytest.approx(kept_a.pivot()[name].item(), abs=1e-6)
        assert row.mean_b == pytest.approx(kept_b.pivot()[name].item(), abs=1e-6)
        assert row.difference == pytest.approx(gap.mean(), abs=1e-7) == pytest.approx(row.mean_a - row.mean_b)
        interval = bootstrap_ci(gap.dropna().to_numpy(), groups=x.place[gap.notna()])
        assert (row.ci_low, row.ci_high) == pytest.approx((interval.low, interval.high))
        by_place = gap.groupby(x.place.astype(str)).sum()
        statistic = lambda v, axis: v.sum(axis=axis)
        test = scipy.stats.permutation_test((by_place,), statistic, permutation_type="samples")
        assert row.p_value == pytest.approx(test.pvalue) and row.n_places == len(by_place) == 10
        assert row.n_queries == gap.notna().sum()
    assert (found.difference > 0).all() and (found.p_value < 0.05).all()   # 64 bits are better than 8
    turned = compare_runs(b, a, "csmae").set_index("direction")
    np.testing.assert_allclose(turned.difference, -found.difference)
    np.testing.assert_allclose(turned.p_value, found.p_value)


def test_other_metrics_and_depths(runs):
    a, b = (folder for folder, _ in runs)
    found = compare_runs(a, b, "csmae", "precision", k=10)
    assert set(found.metric) == {"precision"} and set(found.k) == {10}
    assert compare_runs(a, b, "csmae", "ndcg").k.eq(100).all()
    same = compare_runs(a, a, "csmae")
    assert same[["difference", "ci_low", "ci_high"]].eq(0).all(axis=None) and same.p_value.eq(1).all()


def test_what_is_refused(runs, tmp_path):
    a = runs[0][0]
    with pytest.raises(UnknownNameError, match="did you mean map"): compare_runs(a, a, "csmae", "mapp")
    with pytest.raises(InputError, match="no value for a single query"): compare_runs(a, a, "csmae", "m1_f1")
    with pytest.raises(InputError, match="one of 10, 100"): compare_runs(a, a, "csmae", k=11)
    with pytest.raises(MissingFileError, match="csmae.*rsir evaluate"): compare_runs(a, a, "duch")
    with pytest.raises(MissingFileError, match="no evaluation"): compare_runs(tmp_path, a, "csmae")
    fewer, _ = keep(tmp_path, "fewer", rows=slice(10, None))
    with pytest.raises(InputError, match="other queries.*90 in both"): compare_runs(a, fewer, "csmae")
    smaller, _ = keep(tmp_path, "smaller", rows=slice(0, 190))
    with pytest.raises(InputError, match="numbers of answers.*100 in long.*90 in smaller"): compare_runs(a, smaller, "csmae")
    _, other = keep(tmp_path, "other", protocol=Protocol("val", "test", (10,), "here"))
    other.save(tmp_path/"other/evaluation/csmae")
    with pytest.raises(InputError, match="other protocols"): compare_runs(a, tmp_path/"other", "csmae")
    s1, s2 = (keep(tmp_path, m, sensors=(m,))[0] for m in ("s1", "s2"))
    with pytest.raises(InputError, match="other directions"): compare_runs(s1, s2, "csmae")
    assert compare_runs(a, s2, "csmae").direction.tolist() == ["s2->s2"]
    shallow, _ = keep(tmp_path, "shallow", depth=50)
    assert compare_runs(a, shallow, "csmae").k.eq(10).all()              # the deepest that both know
    moved, _ = keep(tmp_path, "moved", changes=dict(place=[f"place {i//20}" for i in range(200)]))
    with pytest.raises(InputError, match="other places"): compare_runs(a, moved, "csmae")
    (a/"evaluation/csmae/queries.parquet").rename(tmp_path/"away")
    try:
        with pytest.raises(MissingFileError, match="no scores of single queries"): compare_runs(a, s2, "csmae")
    finally: (tmp_path/"away").rename(a/"evaluation/csmae/queries.parquet")


def test_runs_with_a_config(tmp_path):
    for name, n_bits in dict(a=16, b=8).items():
        cfg = tiny_config(tmp_path/name, "optim.epochs=1", f"hash.n_bits={n_bits}", "evaluate.baselines=[random]",
                          "evaluate.protocol=da4dte")
        pretrain(cfg, progress=False)
        train_hash(cfg.out, progress=False)
        evaluate(cfg.out, progress=False)
    found = compare_runs(tmp_path/"a", str(tmp_path/"b"))          # the protocol of the first run's config
    assert len(found) == 4 and found.difference.abs().max() < 1 and found.p_value.between(0, 1).all()
    kept, stamp = tmp_path/"a/evaluation/da4dte/queries.parquet", (tmp_path/"a/evaluation/da4dte/scores.csv").stat
    before = stamp().st_mtime_ns
    evaluate(tmp_path/"a", progress=False, memory_mb=1)            # changes no score: nothing is done again
    assert stamp().st_mtime_ns == before
    kept.unlink()                                                  # as in a folder of an earlier version
    evaluate(tmp_path/"a", progress=False)
    assert kept.is_file()
    pd.testing.assert_frame_equal(compare_runs(tmp_path/"a", tmp_path/"b"), found)


def test_sign_flips():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.3, 1, 11), np.zeros(11)
    exact = scipy.stats.permutation_test((a,), lambda v, axis: v.mean(axis=axis), permutation_type="samples")
    assert sign_flip_test(a, b, n=4000) == pytest.approx(exact.pvalue)       # 2048 outcomes: all are counted
    assert sign_flip_test(a, b, n=1000, seed=3) == pytest.approx(exact.pvalue, abs=0.05)
    a = rng.normal(0.2, 1, 200)
    t = scipy.stats.ttest_1samp(a, 0).pvalue
    assert sign_flip_test(a, np.zeros(200)) == pytest.approx(t, abs=0.01)
    assert sign_flip_test(a, np.zeros(200), seed=1) == sign_flip_test(a, np.zeros(200), seed=1)
    groups = np.repeat(np.arange(8), 25)
    by_group = scipy.stats.permutation_test((a.reshape(8, 25).sum(1),), lambda v, axis: v.sum(axis=axis),
                                            permutation_type="samples")
    assert sign_flip_test(a, np.zeros(200), groups=groups) == pytest.approx(by_group.pvalue)
    a[3] = np.nan
    assert sign_flip_test(a, np.zeros(200)) == sign_flip_test(np.delete(a, 3), np.zeros(199))
    assert np.isnan(sign_flip_test([np.nan], [1.])) and sign_flip_test([2.], [1.]) == 1
    with pytest.raises(InputError, match="other queries"): sign_flip_test(a, a[1:])


def test_p_values_are_uniform_where_nothing_is_better():
    rng = np.random.default_rng(1)
    p = [sign_flip_test(rng.normal(size=12), rng.normal(size=12), n=4095) for _ in range(400)]
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.01


def test_drawings_are_those_of_a_plain_loop():
    from rsir_nb.core import make_rng
    rng = np.random.default_rng(0)
    x, groups = rng.normal(size=(300, 3)), rng.integers(0, 40, 300)
    sums = np.stack([x[groups == g].sum(0) for g in np.unique(groups)])
    counts = np.bincount(groups)[np.unique(groups)]
    draw, means = make_rng(7, "bootstrap"), []
    for _ in range(200):
        rows = draw.integers(0, len(sums), len(sums))
        means.append(sums[rows].sum(0)/counts[rows].sum())
    found = bootstrap_ci(x, n=200, seed=7, groups=groups)
    np.testing.assert_allclose(found.value, x.mean(0))
    np.testing.assert_allclose([found.low, found.high], np.quantile(means, [.025, .975], axis=0))
