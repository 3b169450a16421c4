"The Hamming index against faiss, against its definition, and against a model that is changed along with it."
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (RuleBasedStateMachine, initialize, invariant, precondition, rule,
                                 run_state_machine_as_test)
from rsir_nb.core import INDEXES, CorruptError, InputError, MissingFileError, RsirError, UnknownNameError
from rsir_nb.retrieval.codes import hamming_distances
from rsir_nb.retrieval.hamming import HammingIndex
from rsir_nb.retrieval.blocks import BLOCK, plain_nearest
from rsir_nb.retrieval.kernels import LANES, worth_guessing


def random_codes(n, n_bits, seed=0, groups=None):
    "Codes; with `groups` they lie in clusters, which makes many ties."
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (n, n_bits//8), dtype=np.uint8)
    if groups:
        flips = np.packbits(rng.random((n, n_bits)) < 0.05, axis=1)
        codes = codes[rng.integers(0, groups, n)] ^ flips
    return codes


def brute_force(xq, codes, k, rows=None):
    d = hamming_distances(xq, codes)
    rows = np.arange(len(codes)) if rows is None else rows
    at = np.argsort(d[:, rows], axis=1, kind="stable")[:, :k]
    return np.take_along_axis(d[:, rows], at, 1), rows[at]


@pytest.fixture(autouse=True, params=["compiled", "numpy"])
def scan(request, monkeypatch):
    "Every test runs with the compiled and with the plain scan."
    limit = dict(compiled=-1, numpy=float("inf"))[request.param]
    monkeypatch.setattr("rsir_nb.retrieval.hamming._COMPILE_S", limit)
    return request.param


def filled(codes, ids=None, threads=None):
    ix = HammingIndex(n_bits=codes.shape[1]*8, threads=threads)
    ix.add(codes, ids)
    return ix


@pytest.mark.parametrize("n_bits", [8, 16, 40, 64, 72, 128, 136, 256, 512])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_distances_are_those_of_faiss_and_ties_are_stable(n_bits, threads):
    codes = random_codes(3*BLOCK + 77, n_bits, groups=50)
    xq = np.concatenate([codes[:5], random_codes(4, n_bits, seed=1)])
    peer = faiss.IndexBinaryFlat(n_bits)
    peer.add(codes)
    ix = filled(codes, threads=threads)
    for k in 1, 10, 500:
        dists, ids = ix.search(xq, k)
        np.testing.assert_array_equal(dists, peer.search(xq, k)[0])
        np.testing.assert_array_equal(ids, brute_force(xq, codes, k)[1])
        assert dists.dtype == np.int32 and ids.dtype == np.int64


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("n", [1, 2, RUN := 128, 129, BLOCK - 1, BLOCK, BLOCK + 1, 9*BLOCK + 3])
@pytest.mark.parametrize("n_queries", [1, 3, 70])
def test_every_edge_of_runs_blocks_groups_and_pieces(n, n_queries, threads):
    codes, xq = random_codes(n, 24, seed=n), random_codes(n_queries, 24, seed=1)
    ix = filled(codes, threads=threads)
    for k in 1, 7, n:
        for found, wanted in zip(ix.search(xq, k), brute_force(xq, codes, k), strict=True):
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("groups", [None, 40])
@pytest.mark.parametrize("n_bits", [64, 128, 320])
def test_deep_searches_begin_with_a_guess_and_find_the_same(n_bits, groups):
    codes, k = random_codes(40_000, n_bits, groups=groups), 900
    xq = np.concatenate([codes[:3], random_codes(3, n_bits, seed=1)])
    assert worth_guessing(len(codes), k)
    for threads in 1, 3:
        for found, wanted in zip(filled(codes, threads=threads).search(xq, k), brute_force(xq, codes, k),
                                 strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_a_guess_that_is_too_low_costs_no_result():
    "The codes that the sample looks at are copies of one query; everything else is far from it."
    n, k = 100_000, 1600
    assert worth_guessing(n, k) and n//(k//16) < k
    codes = random_codes(n, 128)
    xq = random_codes(2, 128, seed=1)
    codes[np.arange(n)//LANES % (k//16) == 0] = xq[0]
    for found, wanted in zip(filled(codes, threads=1).search(xq, k), brute_force(xq, codes, k), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("order", ["rising", "falling", "equal"])
def test_orders_that_fill_the_candidate_list(order):
    "Falling distances make every code a candidate, equal ones make every code a tie."
    bits = np.zeros((20_000, 128), dtype=np.uint8)
    if order != "equal":
        ones = np.sort(np.random.default_rng(0).integers(0, 129, 20_000))
        bits[np.arange(128) < (ones if order == "rising" else ones[::-1])[:, None]] = 1
    codes, xq = np.packbits(bits, axis=1), np.zeros((2, 16), dtype=np.uint8)
    for k in 1, 3, 100, 5000:
        for threads in 1, 2:
            for found, wanted in zip(filled(codes, threads=threads).search(xq, k), brute_force(xq, codes, k),
                                     strict=True):
                np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("share", [0., 0.001, 0.1, 0.5, 0.999, 1.])
def test_a_filter_never_loses_a_result(share):
    codes, rng = random_codes(5*BLOCK, 64, groups=30), np.random.default_rng(1)
    mask, ids = rng.random(len(codes)) < share, rng.permutation(10*len(codes))[:len(codes)]
    rows, xq = np.flatnonzero(mask), codes[::2000]
    ix = filled(codes, ids)
    for k in 1, 50, len(codes):
        dists, at = brute_force(xq, codes, k, rows)
        for where in mask, rng.permutation(ids[mask]), list(ids[mask]), np.concatenate([ids[mask], [10**12]]):
            found = ix.search(xq, k, where=where)
            np.testing.assert_array_equal(found[0], dists)
            np.testing.assert_array_equal(found[1], ids[at])
            assert found[1].shape == (len(xq), min(k, len(rows)))


@pytest.mark.parametrize("n_bits", [32, 128])
@pytest.mark.parametrize("radius", [0, 3, 20, 200])
def test_range_search_is_that_of_faiss_but_for_the_edge(n_bits, radius):
    codes = np.concatenate([random_codes(2*BLOCK, n_bits, groups=20), random_codes(5, n_bits)])
    xq = codes[[0, 5, 9, len(codes) - 1]]
    peer = faiss.IndexBinaryFlat(n_bits)
    peer.add(codes)
    lims, dists, ids = filled(codes).range_search(xq, radius)
    peer_lims, peer_dists, peer_ids = peer.range_search(xq, radius + 1)     # in faiss the edge is outside
    np.testing.assert_array_equal(lims, peer_lims)
    for a, b in zip(lims[:-1], lims[1:], strict=True):
        order = np.lexsort((peer_ids[a:b], peer_dists[a:b]))
        np.testing.assert_array_equal(dists[a:b], peer_dists[a:b][order])
        np.testing.assert_array_equal(ids[a:b], peer_ids[a:b][order])
    mask = np.arange(len(codes)) % 3 == 0
    lims2, dists2, ids2 = filled(codes).range_search(xq, radius, where=mask)
    np.testing.assert_array_equal(ids2, ids[mask[ids]])
    np.testing.assert_array_equal(dists2, dists[mask[ids]])


def test_empty_things():
    ix, xq = HammingIndex(n_bits=16), random_codes(3, 16)
    assert [o.shape for o in ix.search(xq, 5)] == [(3, 0), (3, 0)]
    assert [o.tolist() for o in ix.range_search(xq, 5)] == [[0, 0, 0, 0], [], []]
    assert ix.add(np.zeros((0, 2), np.uint8)).shape == (0,) and len(ix) == 0 and ix.codes.shape == (0, 2)
    ix.add(xq)
    assert [o.shape for o in ix.search(xq[:0], 5)] == [(0, 3), (0, 3)]
    assert [o.shape for o in ix.search(xq, 5, where=[])] == [(3, 0), (3, 0)]
    assert ix.remove([]) == 0 and ix.remove([0, 1, 2]) == 3
    assert ix.search(xq, 1)[0].shape == (3, 0) and ix.add(xq[:1]).tolist() == [3]


BAD = {
    "float codes": (lambda ix: ix.add(np.zeros((1, 16))), "pack_bits"),
    "bits instead of codes": (lambda ix: ix.add(np.zeros((1, 128), np.uint8)), "1024 bits"),
    "other length": (lambda ix: ix.search(np.zeros((1, 8), np.uint8), 1), "64 bits"),
    "one code": (lambda ix: ix.search(np.zeros(16, np.uint8), 1), r"code\[None\]"),
    "signed": (lambda ix: ix.add(np.zeros((1, 16), np.int8)), "not packed"),
    "k is 0": (lambda ix: ix.search(ix.codes[:1], 0), "from 1"),
    "k is negative": (lambda ix: ix.search(ix.codes[:1], -1), "from 1"),
    "k is a float": (lambda ix: ix.search(ix.codes[:1], 2.), "from 1"),
    "ids twice": (lambda ix: ix.add(ix.codes[:2], [700, 700]), "given twice"),
    "id in use": (lambda ix: ix.add(ix.codes[:1], [3]), "in the index already"),
    "id beyond int64": (lambda ix: ix.add(ix.codes[:1], [2**63]), r"2\*\*63 - 1"),
    "id beyond uint64": (lambda ix: ix.add(ix.codes[:1], [2**70]), r"2\*\*63 - 1"),
    "negative id": (lambda ix: ix.add(ix.codes[:1], [-1]), "from 0"),
    "float id": (lambda ix: ix.add(ix.codes[:1], [1.5]), "whole numbers"),
    "named id": (lambda ix: ix.add(ix.codes[:1], ["patch"]), "whole numbers"),
    "too few ids": (lambda ix: ix.add(ix.codes[:2], [100]), "differ in number"),
    "mask too short": (lambda ix: ix.search(ix.codes[:1], 1, where=[True, False]), "does not fit"),
    "a mask of numbers": (lambda ix: ix.search(ix.codes[:1], 1, where=np.arange(20) % 2), "taken as ids"),
    "float filter": (lambda ix: ix.search(ix.codes[:1], 1, where=[.5]), "whole numbers"),
    "radius": (lambda ix: ix.range_search(ix.codes[:1], -1), "from 0"),
    "radius nan": (lambda ix: ix.range_search(ix.codes[:1], np.nan), "from 0"),
    "bits": (lambda ix: HammingIndex(n_bits=12), "multiple of 8"),
    "no bits": (lambda ix: HammingIndex(n_bits=0), "multiple of 8"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_told_and_changes_nothing(what):
    ix = filled(random_codes(20, 128))
    call, message = BAD[what]
    with pytest.raises(InputError, match=message): call(ix)
    assert len(ix) == 20 and ix.ids.tolist() == list(range(20))


def test_removing_what_is_not_there():
    ix = filled(random_codes(20, 128))
    with pytest.raises(UnknownNameError, match="77"): ix.remove([3, 77])
    assert len(ix) == 20


def test_strided_codes_and_lists_of_queries_are_taken_as_they_are_meant():
    codes = random_codes(100, 128)
    wide = np.concatenate([codes, codes], axis=1)
    np.testing.assert_array_equal(filled(wide[::-1, ::-1][::-1, 16:][:, ::-1]).codes, codes)
    fortran = np.asfortranarray(codes)
    ix = filled(codes)
    np.testing.assert_array_equal(ix.search(fortran[:3], 5)[1], ix.search(codes[:3], 5)[1])


@pytest.fixture
def saved(tmp_path):
    return filled(random_codes(5000, 72, groups=9), ids=np.arange(5000)*3).save(tmp_path/"a.index")


@pytest.mark.parametrize("mmap", [True, False])
def test_saved_is_loaded(saved, mmap):
    codes = random_codes(5000, 72, groups=9)
    ix, before = HammingIndex.load(saved, mmap=mmap), saved.read_bytes()
    np.testing.assert_array_equal(ix.codes, codes)
    np.testing.assert_array_equal(ix.search(codes[:9], 40)[1], brute_force(codes[:9], codes, 40)[1]*3)
    assert ix.add(codes[:10]).tolist() == list(range(14998, 15008))
    ix.remove(np.arange(0, 3000, 3))
    kept = np.concatenate([codes[1000:], codes[:10]])
    np.testing.assert_array_equal(ix.search(codes[:9], 40)[0], brute_force(codes[:9], kept, 40)[0])
    assert saved.read_bytes() == before
    assert ix.save(saved) == saved and len(HammingIndex.load(saved)) == 4010    # over the file that it maps


def test_every_truncation_and_flipped_byte_is_found(saved):
    whole = saved.read_bytes()
    for size in 0, 7, 23, 100, 5000, len(whole) - 1:
        saved.write_bytes(whole[:size])
        with pytest.raises(CorruptError): HammingIndex.load(saved)
    saved.write_bytes(whole + b"x")
    with pytest.raises(CorruptError): HammingIndex.load(saved)
    import json
    header = json.loads(whole[24:24 + int.from_bytes(whole[12:16], "little")])
    begin = len(whole) - header["size"]
    data = [begin + a["offset"] + 5 for a in header["arrays"].values()]
    for at in 0, 9, 13, 17, 30, 24 + 200, *data:
        damaged = bytearray(whole)
        damaged[at] ^= 1
        saved.write_bytes(damaged)
        with pytest.raises(CorruptError): HammingIndex.load(saved)


def test_other_files_are_refused(tmp_path, saved):
    with pytest.raises(MissingFileError): HammingIndex.load(tmp_path/"none")
    (tmp_path/"text").write_text("hello"*100)
    with pytest.raises(CorruptError, match="no index"): HammingIndex.load(tmp_path/"text")
    vectors = INDEXES.get("vectors")(dim=4)
    with pytest.raises(InputError, match="another kind"): HammingIndex.load(vectors.save(tmp_path/"v"))


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = filled(random_codes(10, 8)).save(tmp_path/"a.index")
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        filled(random_codes(20, 8)).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def in_child(ix, xq, queue): queue.put(ix.search(xq, 5)[1])


def test_searching_after_a_fork_and_after_pickling():
    codes = random_codes(20*BLOCK, 64)
    ix = filled(codes, threads=2)
    expected = ix.search(codes[:3], 5)[1]     # now there are threads, which a fork does not copy
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=in_child, args=(ix, codes[:3], queue))
    child.start()
    np.testing.assert_array_equal(queue.get(timeout=60), expected)
    child.join()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(ix)).search(codes[:3], 5)[1], expected)


def test_no_compiled_code_is_kept_on_disk(tmp_path):
    "numba's cache mixes up kernels when two processes fill it at once; results were silently wrong."
    code = ("import numpy as np; from rsir_nb.retrieval.hamming import HammingIndex; ix = HammingIndex(64, scan='compiled'); "
            "ix.add(np.arange(80, dtype=np.uint8).reshape(10, 8)); ix.search(ix.codes, 3); ix.range_search(ix.codes, 3)")
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)})
    assert not list(tmp_path.rglob("*.nb?"))


def test_a_small_search_compiles_nothing_and_many_do(monkeypatch):
    from rsir_nb.retrieval import hamming
    monkeypatch.setattr(hamming, "_COMPILE_S", 2.5)
    monkeypatch.setattr(hamming, "_spent", {})
    ix, used = filled(random_codes(5000, 64)), []
    monkeypatch.setattr(hamming, "plain_nearest", lambda *a: used.append(len(a[2])) or plain_nearest(*a))
    ix.search(ix.codes[:3], 5)
    assert used == [3]
    for _ in range(8): found = ix.search(ix.codes, 5)
    assert 1 < len(used) < 8, "the plain scan serves until it has taken as long as compiling"
    np.testing.assert_array_equal(found, brute_force(ix.codes, ix.codes, 5))


def test_importing_and_a_small_search_need_no_compiler_and_no_torch():
    code = ("import sys, numpy as np; from rsir_nb.retrieval.hamming import HammingIndex; ix = HammingIndex(64); "
            "ix.add(np.arange(80, dtype=np.uint8).reshape(10, 8)); ix.search(ix.codes, 3); ix.range_search(ix.codes, 3); "
            "assert not {'numba', 'torch', 'pandas'} & set(sys.modules), sorted(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_scan_names_the_known_ones():
    with pytest.raises(RsirError, match="did you mean compiled"): HammingIndex(64, scan="compile")


def test_found_by_name():
    assert isinstance(INDEXES.create("hamming", n_bits=64), HammingIndex)
    with pytest.raises(RsirError, match="did you mean n_bits"): INDEXES.create("hamming", bits=64)


class Model(RuleBasedStateMachine):
    "Random additions, removals, searches, saves and loads of an index and of a plain list, side by side."

    @initialize(n_bits=st.sampled_from([8, 24, 64, 128]), threads=st.sampled_from([1, 2]))
    def start(self, n_bits, threads):
        self.ix, self.n_bits, self.next = HammingIndex(n_bits, threads=threads), n_bits, 0
        self.ids, self.codes = [], np.empty((0, n_bits//8), np.uint8)
        self.folder = tempfile.TemporaryDirectory()

    def teardown(self):
        if hasattr(self, "folder"): self.folder.cleanup()

    def draw(self, n, seed):
        return np.random.default_rng(seed).integers(0, 4, (n, self.n_bits//8), dtype=np.uint8)

    @rule(n=st.integers(0, 300), seed=st.integers(0, 99), skip=st.integers(0, 5), named=st.booleans())
    def add(self, n, seed, skip, named):
        ids = self.next + np.arange(n)
        if named: ids = np.random.default_rng(seed).permutation(ids + skip)
        self.ix.add(self.draw(n, seed), ids if named else None)
        self.ids += ids.tolist()
        self.codes = np.concatenate([self.codes, self.draw(n, seed)])
        self.next = max([self.next - 1, *ids.tolist()]) + 1

    @precondition(lambda self: self.ids)
    @rule(share=st.floats(0, 1), seed=st.integers(0, 99))
    def remove(self, share, seed):
        gone = np.random.default_rng(seed).random(len(self.ids)) < share
        assert self.ix.remove(np.array(self.ids)[gone]) == gone.sum()
        self.ids, self.codes = np.array(self.ids)[~gone].tolist(), self.codes[~gone]

    @rule(mmap=st.booleans())
    def save_and_load(self, mmap):
        path = self.ix.save(Path(self.folder.name)/"a.index")
        self.ix = HammingIndex.load(path, mmap=mmap)

    @rule(n=st.integers(1, 6), k=st.integers(1, 400), seed=st.integers(0, 99),
          share=st.none() | st.floats(0, 1))
    def search(self, n, k, seed, share):
        xq, mask = self.draw(n, seed), None
        if share is not None: mask = np.random.default_rng(seed).random(len(self.ids)) < share
        rows = np.arange(len(self.ids)) if mask is None else np.flatnonzero(mask)
        dists, at = brute_force(xq, self.codes, k, rows)
        found = self.ix.search(xq, k, where=mask)
        np.testing.assert_array_equal(found[0], dists)
        np.testing.assert_array_equal(found[1], np.array(self.ids, dtype=np.int64)[at])

    @rule(radius=st.integers(0, 20), seed=st.integers(0, 99))
    def range_search(self, radius, seed):
        xq = self.draw(3, seed)
        near = hamming_distances(xq, self.codes) <= radius
        lims, dists, ids = self.ix.range_search(xq, radius)
        assert np.diff(lims).tolist() == near.sum(1).tolist() and (dists <= radius).all()
        for q in range(3):
            assert sorted(ids[lims[q]:lims[q+1]]) == sorted(np.array(self.ids, dtype=np.int64)[near[q]])

    @invariant()
    def same_content(self):
        if not hasattr(self, "ids"): return
        assert len(self.ix) == len(self.ids) and self.ix.ids.tolist() == self.ids
        np.testing.assert_array_equal(self.ix.codes, self.codes)


def test_random_histories_match_a_plain_list():
    run_state_machine_as_test(Model, settings=settings(max_examples=40, stateful_step_count=15, deadline=None,
                                                       suppress_health_check=list(HealthCheck)))


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 3000), n_bytes=st.integers(1, 20), k=st.integers(1, 3000),
       high=st.sampled_from([2, 5, 256]), seed=st.integers(0, 10**6), threads=st.integers(1, 3))
def test_any_archive(n, n_bytes, k, high, seed, threads):
    rng = np.random.default_rng(seed)
    codes, xq = (rng.integers(0, high, (m, n_bytes), dtype=np.uint8) for m in (n, 4))
    found = filled(codes, threads=threads).search(xq, k)
    np.testing.assert_array_equal(found, brute_force(xq, codes, k))


@pytest.mark.parametrize("ids", ["default", "rising", "shuffled"])
def test_ids_are_found_whether_they_rise_or_not(tmp_path, ids):
    codes, rng = random_codes(3000, 64), np.random.default_rng(2)
    own = dict(default=None, rising=np.arange(3000)*3 + 5, shuffled=rng.permutation(9000)[:3000])[ids]
    ix = HammingIndex(64)
    for i in range(0, 3000, 700): ix.add(codes[i:i+700], None if own is None else own[i:i+700])
    for ix in (ix, HammingIndex.load(ix.save(tmp_path/"codes.index"))):  # noqa: B020
        for n in 3, 2500:
            chosen = np.concatenate([rng.choice(ix.ids, n, replace=False), [10**9, 10**12]])
            rows = np.flatnonzero(np.isin(ix.ids, chosen))
            dists, found = ix.search(codes[:4], 20, where=chosen)
            wanted = brute_force(codes[:4], codes, 20, rows)
            np.testing.assert_array_equal(found, ix.ids[wanted[1]])
            np.testing.assert_array_equal(dists, wanted[0])
