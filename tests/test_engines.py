"One contract, every engine: whatever HammingIndex answers, the engines beyond one process answer too."
import numpy as np
import pytest
from engines import clustered, engine, hamming, nodes, postgres, same  # noqa: F401
from rsir_nb.core import INDEXES, InputError, RsirError, UnknownNameError
from rsir_nb.retrieval.multi import MultiIndex

BITS = 64


@pytest.mark.parametrize("n_bits", [8, 40, 64, 128, 256])
def test_ties_and_distances(engine, n_bits):  # noqa: F811
    codes = clustered(700, n_bits, groups=10)
    xq = np.concatenate([codes[:3], clustered(2, n_bits, seed=5), ~codes[:1]])
    ix, local = engine(n_bits), hamming(codes)
    np.testing.assert_array_equal(ix.add(codes), np.arange(700))
    for k in 1, 10, 699, 700, 5000: same(ix.search(xq, k), local.search(xq, k))
    for radius in 0, 3, n_bits/4 + 0.5, n_bits, 10**6: same(ix.range_search(xq, radius), local.range_search(xq, radius))


def test_equal_codes_come_in_the_order_of_insertion(engine):  # noqa: F811
    ids = np.random.default_rng(0).permutation(10_000)[:300]
    ix = engine(BITS)
    for part in np.split(ids, [7, 100, 101]): ix.add(np.zeros((len(part), BITS//8), np.uint8), part)
    np.testing.assert_array_equal(ix.search(np.zeros((1, BITS//8), np.uint8), 250)[1][0], ids[:250])
    np.testing.assert_array_equal(ix.ids, ids)


@pytest.mark.parametrize("share", [0., 0.01, 0.4, 0.9, 1.])
def test_filters(engine, share):  # noqa: F811
    rng, codes = np.random.default_rng(1), clustered(900)
    ids = rng.permutation(9000)[:900]
    ix, local, mask = engine(BITS), hamming(codes, ids), rng.random(900) < share
    ix.add(codes, ids)
    xq = codes[:4]
    for where in mask, rng.permutation(ids[mask]), list(map(int, ids[mask])), np.append(ids[mask], 10**12):
        for k in 1, 30, 900: same(ix.search(xq, k, where=where), local.search(xq, k, where=where))
        same(ix.range_search(xq, 12, where=where), local.range_search(xq, 12, where=where))


def test_a_life_of_adding_and_removing(engine):  # noqa: F811
    rng = np.random.default_rng(2)
    ix, local, xq = engine(BITS), hamming(np.empty((0, BITS//8), np.uint8)), clustered(3, seed=9)
    for step in range(8):
        codes = clustered(int(rng.integers(1, 200)), seed=step)
        ids = None if step % 2 else rng.permutation(10_000)[:len(codes)] + 10_000*(step + 1)
        np.testing.assert_array_equal(ix.add(codes, ids), local.add(codes, ids))
        if step % 3 == 1:
            gone = rng.choice(local.ids, len(local)//3, replace=False)
            assert ix.remove(gone) == local.remove(gone) == len(gone)
        assert len(ix) == len(local)
        np.testing.assert_array_equal(ix.ids, local.ids)
        same(ix.search(xq, 40), local.search(xq, 40))
        mask = rng.random(len(local)) < 0.3
        same(ix.search(xq, 40, mask), local.search(xq, 40, mask))
        same(ix.range_search(xq, 20), local.range_search(xq, 20))
    ix.remove(local.ids)
    assert len(ix) == 0 and ix.search(xq, 5)[1].shape == (3, 0)


def test_empty_things(engine):  # noqa: F811
    ix, none = engine(BITS), np.empty((0, BITS//8), np.uint8)
    for o in (ix.search(clustered(2), 3), ix.search(none, 3)):
        assert o[0].dtype == np.int32 and o[1].dtype == np.int64 and o[0].shape[1] == 0
    lims, dists, ids = ix.range_search(clustered(2), 5)
    assert lims.tolist() == [0, 0, 0] and dists.dtype == np.int32 and ids.dtype == np.int64
    assert ix.add(none).tolist() == [] and len(ix) == 0 and ix.remove([]) == 0
    ix.add(clustered(5))
    same(ix.search(none, 3), hamming(clustered(5)).search(none, 3))
    same(ix.range_search(none, 3), hamming(clustered(5)).range_search(none, 3))
    assert ix.search(clustered(1), 3, where=[])[1].shape == (1, 0)
    assert ix.search(clustered(1), 3, where=np.zeros(5, bool))[1].shape == (1, 0)


def test_what_cannot_be_is_refused_and_changes_nothing(engine):  # noqa: F811
    ix, codes = engine(BITS), clustered(20)
    ix.add(codes)
    for call, error in [
        (lambda: ix.add(codes[:, :4]), "another length"), (lambda: ix.add(codes.astype(int)), "not packed"),
        (lambda: ix.add(codes[0]), "not a table"), (lambda: ix.add(codes[:2], [30, 30]), "given twice"),
        (lambda: ix.add(codes[:2], [30, 7]), "in the index already"), (lambda: ix.add(codes[:2], [1]), "differ in number"),
        (lambda: ix.add(codes[:1], [-1]), "whole numbers"), (lambda: ix.add(codes[:1], [2**63]), "whole numbers"),
        (lambda: ix.add(codes[:1], [0.5]), "whole numbers"), (lambda: ix.search(codes, 0), "from 1"),
        (lambda: ix.search(codes, 2.0), "whole number"), (lambda: ix.search(codes, True), "whole number"),
        (lambda: ix.search(codes[:, :4], 1), "another length"), (lambda: ix.search(codes, 1, [True]), "does not fit"),
        (lambda: ix.search(codes, 1, np.ones(20, int)), "taken as ids"), (lambda: ix.search(codes, 1, [0.5]), "whole numbers"),
        (lambda: ix.range_search(codes, -1), "no radius"), (lambda: ix.range_search(codes, np.nan), "no radius"),
        (lambda: ix.range_search(codes, [1]), "no radius"),
    ]:
        with pytest.raises(InputError, match=error): call()
    with pytest.raises(UnknownNameError, match="99"): ix.remove([0, 99])
    with pytest.raises(RsirError): ix.remove([0.5])
    assert len(ix) == 20
    same(ix.search(codes[:2], 20), hamming(codes).search(codes[:2], 20))


def test_the_largest_id_fits(engine):  # noqa: F811
    ix, codes = engine(BITS), clustered(2)
    ix.add(codes, [0, 2**62])
    assert ix.add(codes[:1]).tolist() == [2**62 + 1]
    assert ix.search(codes[1:], 1)[1].tolist() == [[2**62]]


def test_saved_as_an_index_in_one_file(engine, tmp_path):  # noqa: F811
    "A HammingIndex, or one with tables where there were some."
    codes = clustered(100)
    ix = engine(BITS)
    ix.add(codes, np.arange(100)[::-1])
    ix.remove([99, 50])
    kind = "multi" if isinstance(ix, MultiIndex) else "hamming"
    back = INDEXES.get(kind).load(ix.save(tmp_path/"saved.index"))
    same(back.search(codes[:3], 98), ix.search(codes[:3], 98))
    np.testing.assert_array_equal(back.ids, ix.ids)
    np.testing.assert_array_equal(back.add(codes[:1]), ix.add(codes[:1]))
