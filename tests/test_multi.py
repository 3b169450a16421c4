"Tables of substrings against the definition, against the scan, and against faiss; near-duplicates of a whole archive."
import pickle
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rsir_nb.core import INDEXES, CorruptError, InputError, UnknownNameError
from rsir_nb.retrieval.buckets import BucketTables, _bits, _walk
from rsir_nb.retrieval.codes import hamming_distances
from rsir_nb.retrieval.duplicates import DuplicatePairs, duplicate_groups, iter_near_duplicates, near_duplicates
from rsir_nb.retrieval.hamming import HammingIndex
from rsir_nb.retrieval.local import load_arrays, save_arrays
from rsir_nb.retrieval.substrings import count_buckets, substring_cuts, table_bytes
from rsir_nb.retrieval.multi import MultiIndex

QUICK = settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))


def make_codes(n, n_bits, seed=0, groups=None, flips=0.05):
    "Codes; with `groups` they lie in clusters, which makes many ties."
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (n, n_bits//8), dtype=np.uint8)
    if groups and n: codes = codes[rng.integers(0, groups, n) % n] ^ np.packbits(rng.random((n, n_bits)) < flips, axis=1)
    return codes


def filled(kind, codes, ids=None, **options):
    ix = kind(n_bits=codes.shape[1]*8, **options)
    ix.add(codes, ids)
    return ix


def same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


def nearest(xq, codes, k, rows=None):
    d = hamming_distances(xq, codes)
    rows = np.arange(len(codes)) if rows is None else rows
    at = np.argsort(d[:, rows], axis=1, kind="stable")[:, :k]
    return np.take_along_axis(d[:, rows], at, 1), rows[at]


def within(xq, codes, radius, rows=None):
    d = hamming_distances(xq, codes)
    if rows is not None: d[:, np.setdiff1d(np.arange(len(codes)), rows)] = 10**6
    query, at = np.nonzero(d <= radius)
    order = np.lexsort((at, d[query, at], query))
    return np.searchsorted(query, np.arange(len(xq) + 1)), d[query, at][order], at[order]


@st.composite
def archives(draw):
    n_bits = 8*draw(st.integers(1, 20) | st.sampled_from([32, 33, 64]))
    n = draw(st.integers(1, 400))
    codes = make_codes(n, n_bits, draw(st.integers(0, 10**6)), draw(st.none() | st.integers(1, 20)),
                       draw(st.sampled_from([0., 0.01, 0.1])))
    own = codes[draw(st.lists(st.integers(0, n - 1), max_size=4))]
    return codes, np.concatenate([own, make_codes(draw(st.integers(0, 3)), n_bits, 1)])


@QUICK
@given(archives(), st.integers(1, 450), st.data())
def test_the_k_nearest_are_those_of_the_definition(archive, k, data):
    codes, xq = archive
    rows = data.draw(st.none() | st.lists(st.integers(0, len(codes) - 1), unique=True).map(sorted))
    where = None if rows is None else np.isin(np.arange(len(codes)), rows)
    rows = None if rows is None else np.array(rows, dtype=int)
    ix = filled(MultiIndex, codes, tables=True, threads=data.draw(st.integers(1, 3)))
    if rows is None or len(rows):
        dists, at = ix.search(xq, k, where=where)
        same((dists, at), nearest(xq, codes, k, rows))
        if len(xq): assert ix.last_plan["tables"] == len(xq)
    else: assert ix.search(xq, k, where=where)[1].shape == (len(xq), 0)


@QUICK
@given(archives(), st.integers(0, 40) | st.just(10_000), st.data())
def test_all_within_a_radius_are_those_of_the_definition(archive, radius, data):
    codes, xq = archive
    mask = data.draw(st.none() | st.integers(0, 99).map(lambda s: np.random.default_rng(s).random(len(codes)) < 0.3))
    ix = filled(MultiIndex, codes, tables=True, threads=data.draw(st.integers(1, 3)))
    wanted = within(xq, codes, radius, None if mask is None else np.flatnonzero(mask))
    same(ix.range_search(xq, radius, where=mask), wanted)
    if ix.last_plan: assert ix.last_plan["tables"] == len(xq)


@QUICK
@given(st.integers(0, 10**6), st.sampled_from([16, 40, 64, 128, 200]), st.data())
def test_all_indexes_agree_while_they_change(seed, n_bits, data):
    "Add, remove, save and load; tables always, never, and by themselves with prices that make them pay or not."
    rng, plain = np.random.default_rng(seed), HammingIndex(n_bits=n_bits)
    others = [MultiIndex(n_bits=n_bits, tables=t) for t in (True, False, "auto", "auto")]
    pool = make_codes(2000, n_bits, seed, groups=30)
    for _ in range(data.draw(st.integers(1, 6))):
        act = data.draw(st.sampled_from(["add", "add", "remove", "load", "build"]))
        x = pool[rng.integers(0, 2000, rng.integers(0, 600))]
        gone = plain.ids[rng.random(len(plain)) < 0.3]
        for i, ix in enumerate([plain, *others]):
            if act == "add": ix.add(x)
            if act == "remove": assert ix.remove(gone) == len(gone)
            if act == "build" and i: ix.build()
            if act == "load" and i:
                with tempfile.TemporaryDirectory() as folder:
                    others[i - 1] = MultiIndex.load(ix.save(f"{folder}/index"), mmap=bool(i % 2))
        others[2]._price, others[3]._price = lambda: 1e9, lambda: 1e-9
        xq, k, radius = pool[rng.integers(0, 2000, 5)], int(rng.integers(1, 50)), int(rng.integers(0, n_bits + 9))
        mask = rng.random(len(plain)) < rng.choice([0.05, 0.9])
        for where in None, mask, plain.ids[mask]:
            nearest, near = plain.search(xq, k, where=where), plain.range_search(xq, radius, where=where)
            for ix in others:
                same(ix.search(xq, k, where=where), nearest)
                same(ix.range_search(xq, radius, where=where), near)


@pytest.mark.parametrize("n_bits, groups", [(64, None), (64, 20), (128, 100), (256, 30), (72, 10)])
def test_distances_are_those_of_faiss(n_bits, groups):
    codes = make_codes(5000, n_bits, groups=groups)
    xq = np.concatenate([codes[:20], make_codes(5, n_bits, seed=9)])
    ix, flat = filled(MultiIndex, codes, tables=True, threads=2), faiss.IndexBinaryFlat(n_bits)
    flat.add(codes)
    for radius in 0, 2, 5, 11:
        lims, dists, ids = ix.range_search(xq, radius)
        peer_lims, peer_dists, peer_ids = flat.range_search(xq, radius + 1)     # in faiss the edge is outside
        np.testing.assert_array_equal(lims, peer_lims)
        for a, b in zip(lims[:-1], lims[1:], strict=True):
            order = np.lexsort((peer_ids[a:b], peer_dists[a:b]))
            np.testing.assert_array_equal(dists[a:b], peer_dists[a:b][order])
            np.testing.assert_array_equal(ids[a:b], peer_ids[a:b][order])
    for k in 1, 10, 200: np.testing.assert_array_equal(ix.search(xq, k)[0], flat.search(xq, k)[0])


def test_what_faiss_finds_by_its_hashes_is_found():
    "`IndexBinaryMultiHash` misses neighbours by design; what it finds are some of ours, with our distances."
    codes = make_codes(20_000, 128, groups=200)
    peer = faiss.IndexBinaryMultiHash(128, 8, 16)
    peer.nflip = 1
    peer.add(codes)
    lims, dists, ids = filled(MultiIndex, codes, tables=True).range_search(codes[:50], 8)
    peer_lims, peer_dists, peer_ids = peer.range_search(codes[:50], 9)
    assert len(peer_ids) > 500
    for j in range(50):
        ours = dict(zip(ids[lims[j]:lims[j + 1]].tolist(), dists[lims[j]:lims[j + 1]].tolist(), strict=True))
        theirs = slice(peer_lims[j], peer_lims[j + 1])
        assert all(ours[i] == d for i, d in zip(peer_ids[theirs].tolist(), peer_dists[theirs].tolist(), strict=True))


@pytest.mark.parametrize("order", ["equal", "one value in most substrings", "rising", "falling"])
def test_codes_that_crowd_in_few_buckets(order):
    bits = np.zeros((3000, 128), dtype=np.uint8)
    rng = np.random.default_rng(0)
    if order.startswith("one"): bits[:, :20] = rng.integers(0, 2, (3000, 20))
    if order in ("rising", "falling"):
        ones = np.sort(rng.integers(0, 129, 3000))[::1 if order == "rising" else -1]
        bits[np.arange(128) < ones[:, None]] = 1
    codes = np.packbits(bits, axis=1)
    ix, xq = filled(MultiIndex, codes, tables=True), np.concatenate([codes[:2], np.full((1, 16), 255, np.uint8)])
    for k in 1, 2, 7, 500, 3000: same(ix.search(xq, k), nearest(xq, codes, k))
    for radius in 0, 3, 16: same(ix.range_search(xq, radius), within(xq, codes, radius))


# --- which way is taken

def test_both_ways_are_taken_by_themselves():
    codes = make_codes(60_000, 128, groups=600, flips=0.02)
    ix, plain, xq = filled(MultiIndex, codes, threads=1), filled(HammingIndex, codes, threads=1), codes[::600]
    ix._price = lambda: 1.
    same(ix.range_search(xq[:1], 2), plain.range_search(xq[:1], 2))
    assert ix.last_plan["scan"] == 1, "one question does not pay for tables"
    same(ix.search(xq, 1000), plain.search(xq, 1000))
    same(ix.range_search(xq, 60), plain.range_search(xq, 60))
    assert ix._buckets is None, "nor do searches that tables are no help to"
    for _ in range(200):
        if ix._buckets is not None: break
        ix.range_search(xq, 2)
    same(ix.range_search(xq, 2), plain.range_search(xq, 2))
    assert ix.last_plan == ix.last_plan | dict(queries=100, tables=100, scan=0, given_up=0)
    same(ix.range_search(xq, 60), plain.range_search(xq, 60))
    assert ix.last_plan == ix.last_plan | dict(tables=0, scan=100)
    ix._reach.clear()
    same(ix.search(xq, 2000), plain.search(xq, 2000))
    assert ix.last_plan["given_up"] == 100, "nothing was known of the radius"
    same(ix.search(xq, 2000), plain.search(xq, 2000))
    assert ix.last_plan["scan"] == 100, "it is known now"


def test_some_queries_of_a_call_go_one_way_and_some_the_other():
    "A crowd of equal codes beside a spread archive: a query from the crowd costs all of it."
    codes = np.concatenate([make_codes(20_000, 128), np.zeros((20_000, 16), np.uint8)])
    xq = np.concatenate([codes[:10], codes[-10:]])[np.random.default_rng(0).permutation(20)]
    ix, plain = filled(MultiIndex, codes).build(), filled(HammingIndex, codes)
    ix._price = lambda: 1.
    for radius in 0, 3, 7:
        same(ix.range_search(xq, radius), plain.range_search(xq, radius))
        assert ix.last_plan == ix.last_plan | dict(tables=10, scan=10)
    same(ix.search(xq, 5), plain.search(xq, 5))
    assert ix.last_plan["tables"] + ix.last_plan["given_up"] + ix.last_plan["scan"] == 20
    assert ix.last_plan["given_up"] >= 10


def test_off_is_off_and_on_is_on():
    codes = make_codes(3000, 64, groups=10)
    off, on = filled(MultiIndex, codes, tables=False), filled(MultiIndex, codes, tables=True)
    for ix in off, on: ix._price = lambda: 1e9
    assert off.build()._buckets is None
    off.range_search(codes[:4], 0)
    assert off.last_plan == dict(queries=4, tables=0, scan=4, given_up=0, buckets=0, codes=0)
    on._price = lambda: 0.
    same(on.range_search(codes[:4], 64), off.range_search(codes[:4], 64))
    assert on.last_plan["tables"] == 4 and on.last_plan["buckets"] >= 2*2**8


def test_tables_follow_an_index_that_grows():
    codes = make_codes(9000, 64, groups=10)
    ix = filled(MultiIndex, codes[:8000], tables=True)
    ix.search(codes[:1], 3)
    assert len(ix._buckets) == 8000
    ix.add(codes[8000:8500])
    same(ix.search(codes[8400:8410], 20), nearest(codes[8400:8410], codes[:8500], 20))
    assert len(ix._buckets) == 8000, "the few new ones are compared one by one"
    ix.add(codes[8500:])
    ix.add(make_codes(4000, 64, 1))
    ix.search(codes[:1], 3)
    assert len(ix._buckets) == 13_000
    ix.remove([0])
    assert ix._buckets is None
    same(ix.search(codes[:3], 20), filled(HammingIndex, ix.codes, ix.ids).search(codes[:3], 20))


def test_memory_is_bounded():
    codes = make_codes(3000, 64)
    assert table_bytes(3000, 64) == filled(MultiIndex, codes).build()._buckets.nbytes
    ix = filled(MultiIndex, codes, memory=table_bytes(3000, 64) - 1)
    ix._price = lambda: 1e9
    ix.range_search(codes[:5], 1)
    assert ix._buckets is None and ix.build()._buckets is None and ix.last_plan["scan"] == 5
    with pytest.raises(InputError, match="too large"):
        filled(MultiIndex, codes, tables=True, memory=1).search(codes[:1], 1)
    for n in 10**3, 10**6, 10**8, 10**9:
        for n_bits in 8, 64, 128, 256: assert table_bytes(n, n_bits) < 25*max(n, 4096)*n_bits/16


# --- pieces

@given(st.integers(1, 2**63), st.integers(0, 2**64 - 1), st.integers(0, 127), st.integers(1, 30))
def test_a_substring_is_cut_across_words(a, b, lo, width):
    hi = min(128, lo + width)
    words = np.array([a, b], dtype=np.uint64)
    wanted = ((a | b << 64) >> lo) & (2**(hi - lo) - 1)
    assert int(_bits.py_func(words[lo >> 6], words[(hi - 1) >> 6], lo, hi)) == wanted


@pytest.mark.parametrize("n", [0, 1, 200, 10**4, 10**6, 10**8, 2**32])
@pytest.mark.parametrize("n_bits", [8, 16, 24, 64, 72, 128, 256, 2048])
def test_substrings_cover_a_code(n, n_bits):
    cuts = substring_cuts(n_bits, n)
    assert cuts[0] == 0 and cuts[-1] == n_bits and 1 <= np.diff(cuts).min() and np.diff(cuts).max() <= 30
    assert count_buckets(n, n_bits, n_bits) <= sum(2**int(w) for w in np.diff(cuts))
    assert count_buckets(n, n_bits, 0) == 1


def test_a_search_through_every_bucket_meets_every_code_once():
    codes = make_codes(500, 40, groups=3)
    ix = filled(HammingIndex, codes)
    query, dists, at, fate, work = BucketTables(ix).look_up(ix, codes[:3], 40)
    assert len(at) == 1500 and fate.tolist() == [0, 0, 0] and work[1] == 3*500*(len(substring_cuts(40, 500)) - 1)
    np.testing.assert_array_equal(np.sort(at.reshape(3, -1), axis=1), np.tile(np.arange(500), (3, 1)))


def test_work_is_what_the_pigeonholes_say():
    codes = make_codes(5000, 128)
    ix = filled(HammingIndex, codes)
    for radius in range(0, 30, 3):
        work = BucketTables(ix).look_up(ix, codes[:7], radius)[4]
        assert work[0] <= 7*count_buckets(5000, 128, radius) + 7*30 and work[0] >= 7*radius/10


# --- contract

def test_registered_pickled_and_named():
    codes = make_codes(3000, 64, groups=10)
    ix = INDEXES.create("multi", n_bits=64, tables=True)
    assert isinstance(ix, MultiIndex) and repr(ix) == "MultiIndex(n_bits=64) of 0 codes"
    ix.add(codes, ids=np.arange(3000)[::-1]*7)
    wanted = ix.search(codes[:3], 9)
    same(pickle.loads(pickle.dumps(ix)).search(codes[:3], 9), wanted)
    ix.search(codes[:3], 9, where=np.arange(3000) % 2 == 0)
    assert len(_walk.signatures) == 1, "whatever the arrays are like, the kernel is compiled once"


def test_empty_things():
    for tables in True, "auto":
        ix, xq = MultiIndex(n_bits=16, tables=tables).build(), make_codes(3, 16)
        assert [o.shape for o in ix.search(xq, 5)] == [(3, 0), (3, 0)]
        assert [o.tolist() for o in ix.range_search(xq, 5)] == [[0, 0, 0, 0], [], []]
        ix.add(xq)
        assert [o.shape for o in ix.search(xq[:0], 5)] == [(0, 3), (0, 3)]
        assert ix.search(xq, 5, where=[])[0].shape == (3, 0)
        assert ix.remove([0, 1, 2]) == 3 and ix.search(xq, 1)[0].shape == (3, 0)


BAD = {
    "neither on nor off": (lambda ix: MultiIndex(n_bits=64, tables="yes"), "True, False or 'auto'"),
    "a number for on": (lambda ix: MultiIndex(n_bits=64, tables=1), "True, False or 'auto'"),
    "no memory": (lambda ix: MultiIndex(n_bits=64, memory=float("nan")), "bytes, from 0"),
    "memory in words": (lambda ix: MultiIndex(n_bits=64, memory="4 GB"), "bytes, from 0"),
    "length": (lambda ix: MultiIndex(n_bits=12), "multiple of 8"),
    "other length": (lambda ix: ix.search(np.zeros((1, 16), np.uint8), 1), "128 bits"),
    "k is 0": (lambda ix: ix.search(ix.codes[:1], 0), "from 1"),
    "negative radius": (lambda ix: ix.range_search(ix.codes[:1], -1), "from 0"),
    "float codes": (lambda ix: ix.range_search(np.zeros((1, 8)), 1), "pack_bits"),
    "mask too short": (lambda ix: ix.search(ix.codes[:1], 1, where=[True, False]), "does not fit"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    call, match = BAD[name]
    with pytest.raises(InputError, match=match): call(filled(MultiIndex, make_codes(20, 64), tables=True))
    with pytest.raises(UnknownNameError): filled(MultiIndex, make_codes(20, 64)).remove([77])


def test_files():
    codes = make_codes(3000, 64, groups=10)
    ix = filled(MultiIndex, codes, memory=1e8).build()
    with tempfile.TemporaryDirectory() as folder:
        path = ix.save(Path(folder)/"index")
        for mmap in True, False:
            opened = MultiIndex.load(path, mmap=mmap)
            assert len(opened._buckets) == 3000 and opened.memory == 1e8 and opened.tables == "auto"
            opened._price = lambda: 1e9
            same(opened.search(codes[:5], 7), ix.search(codes[:5], 7))
            assert opened.last_plan["tables"] == 5
        with pytest.raises(InputError, match="another kind"): HammingIndex.load(path)
        meta, arrays = load_arrays(path, "multi", mmap=False)
        for name, broken in dict(cuts=arrays["cuts"] + 1, base=arrays["base"]*2, starts=arrays["starts"][:-1],
                                 places=np.tile(arrays["places"], 2)).items():
            save_arrays(Path(folder)/"broken", "multi", meta, arrays | {name: broken})
            with pytest.raises(CorruptError, match="do not fit"): MultiIndex.load(Path(folder)/"broken")
        raw = bytearray(path.read_bytes())
        raw[-5000] ^= 1
        path.write_bytes(raw)
        with pytest.raises(CorruptError, match="checksum"): MultiIndex.load(path)


def test_many_threads_ask_at_once():
    codes = make_codes(20_000, 128, groups=100)
    ix, plain = filled(MultiIndex, codes, threads=2, tables=True), filled(HammingIndex, codes)
    wanted = [plain.search(codes[i:i + 70], 5) for i in range(0, 700, 70)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: ix.search(codes[i:i + 70], 5), range(0, 700, 70)))
    for a, b in zip(found, wanted, strict=True): same(a, b)


# --- near-duplicates

def all_pairs(codes, radius):
    d = hamming_distances(codes, codes)
    first, second = np.nonzero(np.triu(d <= radius, 1))
    return DuplicatePairs(first, second, d[first, second])


def with_copies(n, n_bits, seed, groups=None):
    "Codes of which a third are there several times."
    codes, rng = make_codes(n, n_bits, seed, groups), np.random.default_rng(seed)
    copied = rng.random(n) < 0.3
    codes[copied] = codes[rng.integers(0, max(1, n//10), copied.sum())]
    return codes


@QUICK
@given(st.integers(1, 500), st.sampled_from([8, 24, 64, 72, 128, 256]), st.integers(0, 10**6), st.integers(0, 30),
       st.sampled_from([None, 3, 40]), st.sampled_from([True, False, "auto"]))
def test_near_duplicates_are_those_of_the_definition(n, n_bits, seed, radius, groups, tables):
    codes = with_copies(n, n_bits, seed, groups)
    wanted = all_pairs(codes, radius)
    same(near_duplicates(codes, radius, tables=tables, threads=1 + seed % 2), wanted)
    few = near_duplicates(codes, radius, representatives=True, tables=tables)
    firsts = duplicate_groups(all_pairs(codes, 0), n)
    keep = (firsts[wanted.first] == wanted.first) & ((firsts[wanted.second] == wanted.second)
                                                      | (firsts[wanted.second] == wanted.first))
    same(few, DuplicatePairs(*(o[keep] for o in wanted)))
    np.testing.assert_array_equal(duplicate_groups(few, n), duplicate_groups(wanted, n))


@pytest.mark.parametrize("tables", [True, False, "auto"])
@pytest.mark.parametrize("n, radius", [(4096, 4), (9000, 3), (9000, 9)])
def test_near_duplicates_are_those_of_faiss(n, radius, tables):
    "More codes than a block holds, in portions that have to stop for want of memory."
    codes = with_copies(n, 64, 5, groups=n//60)
    flat = faiss.IndexBinaryFlat(64)
    flat.add(codes)
    lims, dists, second = flat.range_search(codes, radius + 1)
    first = np.repeat(np.arange(n), np.diff(lims).astype(int))
    wanted = DuplicatePairs.join([DuplicatePairs(*(
        o[second > first] for o in (first, second, dists.astype(np.int32))))])
    assert len(wanted.first) > 1e6//64
    portions = list(iter_near_duplicates(codes, radius, tables=tables, memory=1e6, threads=2))
    same(DuplicatePairs.join(portions), wanted)
    assert max(len(p.first) for p in portions) < 2*1e6/64 and len(portions) > 2


def test_both_ways_of_joining_are_taken(monkeypatch):
    "A crowd of codes that share most substrings is compared, the rest is looked up."
    import rsir_nb.retrieval.duplicates as page
    codes = np.concatenate([make_codes(3000, 128), make_codes(3000, 128, 1)])
    codes[3000:, 2:] = 0
    counts = dict(looked=0, compared=0)
    def counted(name, function):
        def call(*args):
            for n, pairs in function(*args):
                counts[name] += n
                yield n, pairs
        return call
    monkeypatch.setattr(page, "_compared", counted("compared", page._compared))
    monkeypatch.setattr(page, "_looked_up", counted("looked", page._looked_up))
    monkeypatch.setattr(page, "scan_price", lambda n_bits: 4.)
    wanted = all_pairs(codes, 4)
    same(near_duplicates(codes, 4), wanted)
    n_distinct = len(np.unique(codes, axis=0))
    assert counts["looked"] == n_distinct and 1000 < counts["compared"] <= n_distinct - 3000
    counts.update(looked=0, compared=0)
    same(near_duplicates(codes, 4, tables=False), wanted)
    assert counts == dict(looked=0, compared=n_distinct)
    counts.update(looked=0, compared=0)
    monkeypatch.setattr(page, "scan_price", lambda n_bits: 0.)
    same(near_duplicates(codes, 4, tables=True), wanted)
    assert counts == dict(looked=n_distinct, compared=0)


def test_an_archive_of_one_code():
    codes = np.full((200_000, 16), 7, np.uint8)
    for radius in 0, 5:
        with pytest.raises(InputError, match="found .* or more; choose a smaller radius"):
            near_duplicates(codes, radius, progress=False)
        pairs = near_duplicates(codes, radius, representatives=True, progress=False)
        assert not pairs.first.any() and np.array_equal(pairs.second, np.arange(1, 200_000))
        assert not duplicate_groups(pairs, 200_000).any()
    first = next(iter_near_duplicates(codes, memory=1e6))
    assert len(first.first) == 1e6//64


def test_limit_is_exact_and_indexes_are_taken():
    codes = with_copies(600, 128, 0, groups=100)
    n = len(all_pairs(codes, 6).first)
    ix = filled(MultiIndex, codes)
    assert len(near_duplicates(ix, 6, limit=n).first) == n
    with pytest.raises(InputError, match=f"limit of {n - 1:,}"): near_duplicates(ix, 6, limit=n - 1)
    for few, tables in [(codes[:0], True), (codes[:0], "auto"), (codes[:1], True), (codes[:1], False)]:
        pairs = near_duplicates(few, 3, tables=tables)
        assert [o.shape for o in pairs] == [(0,)]*3 and len(duplicate_groups(pairs, len(few))) == len(few)


def test_a_filter_comes_as_a_mask_or_as_positions():
    codes = make_codes(2000, 64, groups=20)
    ix, mask = filled(MultiIndex, codes, tables=True), np.random.default_rng(0).random(2000) < 0.4
    same(ix._nearest(codes[:5], 30, mask), ix._nearest(codes[:5], 30, np.flatnonzero(mask)))
    same(ix._within(codes[:5], 9, mask), ix._within(codes[:5], 9, np.flatnonzero(mask)))
    same(ix._nearest(codes[:5], 30, mask), nearest(codes[:5], codes, 30, np.flatnonzero(mask)))


def test_looking_up_nothing():
    ix = filled(HammingIndex, make_codes(50, 64), threads=2)
    assert [len(o) for o in BucketTables(ix).look_up(ix, np.zeros((0, 8), np.uint8), 3)] == [0, 0, 0, 0, 2]
    empty = HammingIndex(n_bits=64)
    assert len(BucketTables(empty).look_up(empty, np.zeros((2, 8), np.uint8), 64)[2]) == 0


def test_groups_are_connected_components():
    rng = np.random.default_rng(0)
    for n, m in (50, 20), (1000, 700), (1000, 3000):
        ends = rng.integers(0, n, (2, m))
        labels = duplicate_groups(DuplicatePairs(*ends, np.zeros(m, np.int32)), n)
        wanted = np.arange(n)
        for _ in range(n):
            before = wanted.copy()
            np.minimum.at(wanted, ends[0], before[ends[1]])
            np.minimum.at(wanted, ends[1], before[ends[0]])
            if np.array_equal(wanted, before): break
        np.testing.assert_array_equal(labels, wanted)
    chain = np.arange(100_000)
    assert not duplicate_groups(DuplicatePairs(chain[:-1][::-1], chain[1:][::-1], chain[1:]), 100_000).any()


def test_pairs_and_groups_of_a_few():
    codes = np.packbits(np.array([[0]*8, [1] + [0]*7, [1]*8, [0]*8, [1]*8], np.uint8), axis=1)
    pairs = near_duplicates(codes, 1)
    assert list(zip(*(o.tolist() for o in pairs), strict=True)) == [(0, 1, 1), (0, 3, 0), (1, 3, 1), (2, 4, 0)]
    assert duplicate_groups(pairs, 5).tolist() == [0, 0, 2, 0, 2]


BAD_JOINS = {
    "radius": (lambda codes: near_duplicates(codes, 1.5), "whole number of bits"),
    "no radius": (lambda codes: near_duplicates(codes, True), "whole number of bits"),
    "negative": (lambda codes: iter_near_duplicates(codes, -1), "from 0"),
    "tables": (lambda codes: near_duplicates(codes, 1, tables="no"), "True, False or 'auto'"),
    "memory": (lambda codes: near_duplicates(codes, 1, memory=10), "from 1e6"),
    "limit": (lambda codes: near_duplicates(codes, 1, limit=-1), "from 0"),
    "floats": (lambda codes: near_duplicates(codes/2, 1), "pack_bits"),
    "other archive": (lambda codes: duplicate_groups(near_duplicates(codes, 20), 2), "not of this archive"),
}


@pytest.mark.parametrize("name", BAD_JOINS)
def test_a_join_that_cannot_be_is_refused(name):
    call, match = BAD_JOINS[name]
    with pytest.raises(InputError, match=match): call(make_codes(20, 32, groups=2))
