"The index that lives on disk: against its definition, faiss and a plain model, and killed at every file operation."
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from power_loss import Disk, Killed
from rsir_nb.core import (INDEXES, BusyError, CorruptError, InputError, MissingFileError, UnknownNameError, atomic_path,
                          write_json)
from rsir_nb.retrieval import local as index_files
from rsir_nb.live import segments as segment_files
from rsir_nb.retrieval.hamming import HammingIndex
from rsir_nb.live.index import LiveIndex
from rsir_nb.live.segments import read_manifest
from test_hamming import brute_force, random_codes


def make(path, codes=None, ids=None, cuts=(), n_bits=None, **kwargs):
    "An index of `codes`, added in pieces that begin at `cuts`."
    LiveIndex.create(path, n_bits=n_bits or codes.shape[1]*8, **kwargs)
    with LiveIndex.write(path) as ix:
        for rows in np.split(np.arange(0 if codes is None else len(codes)), cuts):
            ix.add(codes[rows], None if ids is None else ids[rows]) if len(rows) else None
    return LiveIndex.open(path)


def check(ix, ids, codes, seed=0, ks=(1, 7, 10_000)):
    "The whole contract against its definition, with and without filters."
    rng, ids = np.random.default_rng(seed), np.asarray(ids, dtype=np.int64)
    assert len(ix) == len(ids) == ix.info()["items"]
    np.testing.assert_array_equal(ix.ids, ids)
    np.testing.assert_array_equal(ix.codes, codes)
    xq = rng.integers(0, 256, (3, ix.n_bits//8), dtype=np.uint8)
    mask = rng.random(len(ids)) < rng.choice([0, .02, .5, 1])
    chosen = np.concatenate([rng.permutation(ids[mask]), [10**15, 10**15 + 1]])
    for where, rows in (None, np.arange(len(ids))), (mask, np.flatnonzero(mask)), (chosen, np.flatnonzero(mask)):
        for k in ks:
            dists, at = brute_force(xq, codes, k, rows)
            found = ix.search(xq, k, where=where)
            np.testing.assert_array_equal(found[0], dists)
            np.testing.assert_array_equal(found[1], ids[at])
            assert found[0].dtype == np.int32 and found[1].dtype == np.int64
        radius = int(rng.integers(ix.n_bits))
        lims, dists, found = ix.range_search(xq, radius, where=where)
        dists_all, at = brute_force(xq, codes, len(ids) + 1, rows)
        for q in range(3):
            near = dists_all[q] <= radius
            np.testing.assert_array_equal(dists[lims[q]:lims[q + 1]], dists_all[q][near])
            np.testing.assert_array_equal(found[lims[q]:lims[q + 1]], ids[at[q][near]])
        assert lims[-1] == len(dists) == len(found)


@pytest.mark.parametrize("n_bits", [8, 24, 64, 128, 136])
def test_many_segments_answer_as_faiss_and_as_one(tmp_path, n_bits):
    codes = random_codes(6000, n_bits, groups=40)
    ids = np.random.default_rng(1).permutation(10**6)[:6000]
    ix = make(tmp_path/"a", codes, ids, cuts=[4000, 5100, 5700, 5950])
    assert len(ix.info()["segments"]) == 5
    peer, one, xq = faiss.IndexBinaryFlat(n_bits), HammingIndex(n_bits), codes[::1500]
    peer.add(codes)
    one.add(codes, ids)
    for k in 1, 100, 6000:
        dists, found = ix.search(xq, k)
        np.testing.assert_array_equal(dists, peer.search(xq, k)[0])
        np.testing.assert_array_equal(found, one.search(xq, k)[1])
    check(ix, ids, codes)
    gone = np.random.default_rng(2).random(6000) < .3
    with LiveIndex.write(tmp_path/"a") as ix:
        assert ix.remove(ids[gone]) == gone.sum()
    one.remove(ids[gone])
    check(LiveIndex.open(tmp_path/"a"), one.ids, one.codes)
    check(ix, one.ids, one.codes)
    saved = HammingIndex.load(ix.save(tmp_path/"one.index"))
    np.testing.assert_array_equal(saved.ids, one.ids)
    np.testing.assert_array_equal(saved.codes, one.codes)


def test_empty_things(tmp_path):
    ix, xq = make(tmp_path/"a", n_bits=16), random_codes(3, 16)
    check(ix, [], np.empty((0, 2), np.uint8))
    with LiveIndex.write(tmp_path/"a") as ix:
        assert ix.add(xq[:0]).shape == (0,) and ix.remove([]) == 0 and ix.compact() == 0 and ix.generation == 0
        ix.add(xq)
        assert [o.shape for o in ix.search(xq[:0], 5)] == [(0, 3), (0, 3)]
        assert [o.shape for o in ix.search(xq, 5, where=[])] == [(3, 0), (3, 0)]
        assert ix.remove([0, 1, 2]) == 3 and ix.info()["segments"] == [] and ix.info()["bytes"] == 0
        assert ix.search(xq, 1)[0].shape == (3, 0) and ix.add(xq[:1]).tolist() == [3]
    assert INDEXES.create("live", path=tmp_path/"a").verify().ids.tolist() == [3]
    assert len(LiveIndex.open(tmp_path/"a", verify=True)) == 1


BAD = {
    "float codes": (lambda ix: ix.add(np.zeros((1, 16))), "pack_bits"),
    "other length": (lambda ix: ix.add(np.zeros((1, 8), np.uint8)), "64 bits"),
    "queries of other length": (lambda ix: ix.search(np.zeros((1, 8), np.uint8), 1), "64 bits"),
    "one code": (lambda ix: ix.add(np.zeros(16, np.uint8)), r"code\[None\]"),
    "signed": (lambda ix: ix.add(np.zeros((1, 16), np.int8)), "not packed"),
    "k is 0": (lambda ix: ix.search(ix.codes[:1], 0), "from 1"),
    "k is a float": (lambda ix: ix.search(ix.codes[:1], 2.), "from 1"),
    "ids twice": (lambda ix: ix.add(ix.codes[:2], [700, 700]), "given twice"),
    "id in use, first segment": (lambda ix: ix.add(ix.codes[:1], [3]), "in the index already"),
    "id in use, last segment": (lambda ix: ix.add(ix.codes[:2], [900, 299]), "in the index already"),
    "id beyond int64": (lambda ix: ix.add(ix.codes[:1], [2**63]), r"2\*\*63 - 1"),
    "id beyond uint64": (lambda ix: ix.add(ix.codes[:1], [2**70]), r"2\*\*63 - 1"),
    "negative id": (lambda ix: ix.add(ix.codes[:1], [-1]), "from 0"),
    "float id": (lambda ix: ix.add(ix.codes[:1], [1.5]), "whole numbers"),
    "named id": (lambda ix: ix.add(ix.codes[:1], ["patch"]), "whole numbers"),
    "too few ids": (lambda ix: ix.add(ix.codes[:2], [1000]), "differ in number"),
    "mask too short": (lambda ix: ix.search(ix.codes[:1], 1, where=[True, False]), "does not fit"),
    "a mask of numbers": (lambda ix: ix.search(ix.codes[:1], 1, where=np.arange(300) % 2), "taken as ids"),
    "float filter": (lambda ix: ix.search(ix.codes[:1], 1, where=[.5]), "whole numbers"),
    "radius": (lambda ix: ix.range_search(ix.codes[:1], -1), "from 0"),
    "float ids to remove": (lambda ix: ix.remove([.5]), "whole numbers"),
    "group in a group": (lambda ix: nested(ix), "cannot hold another"),
}


def nested(ix):
    with ix.group(), ix.group(): pass


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_told_and_changes_nothing(tmp_path, what):
    codes = random_codes(300, 128)
    make(tmp_path/"a", codes, cuts=[200, 280])
    before = sorted((o.name, o.read_bytes()) for o in (tmp_path/"a").iterdir() if o.name != ".lock")
    call, message = BAD[what]
    with LiveIndex.write(tmp_path/"a") as ix:
        with pytest.raises(InputError, match=message): call(ix)
        assert ix.generation == 3
    assert before == sorted((o.name, o.read_bytes()) for o in (tmp_path/"a").iterdir() if o.name != ".lock")


def test_the_largest_id_and_the_end_of_numbers(tmp_path):
    codes, last = random_codes(3, 8), 2**63 - 1
    make(tmp_path/"a", codes[:2], np.array([last, 5]))
    with LiveIndex.write(tmp_path/"a") as ix:
        assert ix.search(codes[:1], 1, where=[last])[1].tolist() == [[last]]
        with pytest.raises(InputError, match="no id left"): ix.add(codes[2:])
        with pytest.raises(InputError, match="already"): ix.add(codes[2:], [last])
        ix.add(codes[2:], [6])
        assert ix.remove([last]) == 1 and ix.ids.tolist() == [5, 6]


def test_removing_what_is_not_there(tmp_path):
    make(tmp_path/"a", random_codes(20, 8), cuts=[15])
    with LiveIndex.write(tmp_path/"a") as ix:
        for ids in [3, 77], [19, 20], np.array([10**12]):
            with pytest.raises(UnknownNameError): ix.remove(ids)
        ix.remove([3, 3])
        with pytest.raises(UnknownNameError, match="3"): ix.remove([2, 3])
        assert len(ix) == 19 and ix.generation == 3


def test_what_cannot_be_made_or_opened(tmp_path):
    path = tmp_path/"a"
    for n_bits in 0, 12, "128", True:
        with pytest.raises(InputError, match="multiple of 8"): LiveIndex.create(path, n_bits=n_bits)
    for facts in ["weights"], dict(weights=object()), "3f2a":
        with pytest.raises(InputError, match="provenance"): LiveIndex.create(path, provenance=facts)
    assert not path.exists()
    for call in LiveIndex.open, LiveIndex.write:
        with pytest.raises(MissingFileError, match="LiveIndex.create"): call(path)
        assert not path.exists()
    make(path, random_codes(5, 8))
    with pytest.raises(InputError, match="not empty.*manifest"): LiveIndex.create(path)
    (tmp_path/"b").mkdir()
    (tmp_path/"b"/"thesis.tex").write_text("text")
    with pytest.raises(InputError, match="not empty.*thesis.tex"): LiveIndex.create(tmp_path/"b")
    with pytest.raises(InputError, match="is a file"): LiveIndex.create(tmp_path/"b"/"thesis.tex")
    with pytest.raises(MissingFileError): LiveIndex.open(tmp_path/"b"/"thesis.tex")


def test_provenance_is_checked_when_asked(tmp_path):
    facts = dict(weights="3f2a", bands=("B02", "B03"), scale=0.5)
    make(tmp_path/"a", random_codes(5, 8), provenance=facts)
    for call in LiveIndex.open, LiveIndex.write:
        call(tmp_path/"a", provenance=facts).close()
        call(tmp_path/"a", provenance=dict(scale=0.5)).close()
        for other in dict(weights="9c11"), dict(sensor="s1"), dict(facts, scale=1):
            with pytest.raises(InputError, match="another (weights|sensor|scale)"): call(tmp_path/"a", provenance=other)
    LiveIndex.write(tmp_path/"a").close()    # a refused writer has left no lock
    assert LiveIndex.open(tmp_path/"a").provenance == dict(facts, bands=["B02", "B03"])


def test_a_saved_index_is_taken_over(tmp_path):
    codes, old = random_codes(5000, 72), HammingIndex(72)
    old.add(codes, np.arange(5000)[::-1]*2)
    old.remove([9998])       # the highest id so far, which must not be given again
    file = old.save(tmp_path/"old.index")
    before = file.read_bytes()
    with pytest.raises(InputError, match="another length"): LiveIndex.create(tmp_path/"a", n_bits=64, from_index=file)
    check(LiveIndex.create(tmp_path/"a", from_index=file), old.ids, old.codes)
    with LiveIndex.write(tmp_path/"a") as ix:
        assert ix.add(codes[:2]).tolist() == [9999, 10_000]
        ix.remove([0, 2])
    check(LiveIndex.open(tmp_path/"a").verify(), [*old.ids[:-2], 9999, 10_000],
          np.concatenate([old.codes[:-2], codes[:2]]))
    assert file.read_bytes() == before
    empty = HammingIndex(16).save(tmp_path/"empty.index")
    assert len(LiveIndex.create(tmp_path/"b", from_index=empty)) == 0
    file.write_bytes(before[:-9])
    with pytest.raises(CorruptError): LiveIndex.create(tmp_path/"c", from_index=file)
    assert not (tmp_path/"c").exists()


def test_additions_leave_few_segments_and_copy_little(tmp_path, monkeypatch):
    written, real = [], segment_files.write_segment
    monkeypatch.setattr("rsir_nb.live.index.write_segment", lambda folder, number, index:
                        written.append(len(index)) or real(folder, number, index))
    monkeypatch.setattr(os, "fsync", lambda _: None)
    LiveIndex.create(tmp_path/"a", n_bits=8)
    rng, n = np.random.default_rng(0), 0
    with LiveIndex.write(tmp_path/"a") as ix:
        for i in range(300):
            size = 1 if i < 150 else int(rng.integers(1, 60))
            ix.add(rng.integers(0, 256, (size, 1), dtype=np.uint8))
            n += size
            sizes = [o["items"] for o in ix.info()["segments"]]
            assert sum(sizes) == n and len(sizes) <= np.log2(n) + 1
            assert all(size > sum(sizes[j + 1:]) for j, size in enumerate(sizes))
        assert sum(written) <= n*(np.log2(n) + 1)
        files = [o for o in (tmp_path/"a").iterdir() if o.suffix == ".index"]
        assert len(files) == len(sizes)


def test_deletions_write_bits_until_half_is_gone(tmp_path):
    codes = random_codes(20_000, 128)
    make(tmp_path/"a", codes)
    with LiveIndex.write(tmp_path/"a") as ix:
        segment = ix.info()["segments"][0]["file"]
        ix.remove(np.arange(9999))
        assert ix.info()["segments"][0]["file"] == segment and ix.info()["deleted"] == 9999
        note = next((tmp_path/"a").glob("deleted-*"))
        assert note.stat().st_size < 20_000/8 + 600
        ix.remove([15_000])
        assert ix.info()["deleted"] == 0 and not list((tmp_path/"a").glob("deleted-*"))
        assert not (tmp_path/"a"/segment).exists()
    keep = np.r_[9999:15_000, 15_001:20_000]
    check(LiveIndex.open(tmp_path/"a"), keep, codes[keep])


def test_an_id_that_comes_back_stands_where_it_was_added_last(tmp_path):
    codes = random_codes(100, 8)
    make(tmp_path/"a", codes, cuts=[90])
    with LiveIndex.write(tmp_path/"a") as ix:
        ix.remove([5, 95])
        ix.add(codes[:2], [95, 5])
        order = [*range(5), *range(6, 95), *range(96, 100), 95, 5]
        moved = np.concatenate([codes[order[:-2]], codes[:2]])
        check(ix, order, moved)
        ix.remove([5])
        check(ix, order[:-1], moved[:-1])
        ix.compact()
        check(ix, order[:-1], moved[:-1])
        assert ix.add(codes[:1]).tolist() == [100]


# Writers and readers

def test_one_writer_and_many_readers(tmp_path):
    codes = random_codes(400, 64)
    reader = make(tmp_path/"a", codes[:300])
    with pytest.raises(InputError, match="open for reading"): reader.add(codes[:1])
    with pytest.raises(InputError, match="open for reading"): reader.remove([0])
    with pytest.raises(InputError, match="open for reading"): reader.compact()
    with LiveIndex.write(tmp_path/"a") as ix:
        with pytest.raises(BusyError, match=f"process {os.getpid()}"): LiveIndex.write(tmp_path/"a")
        with pytest.raises(BusyError): LiveIndex.create(tmp_path/"a")
        ix.add(codes[300:])
        assert not ix.refresh()
        check(LiveIndex.open(tmp_path/"a"), np.arange(400), codes)
        check(reader, np.arange(300), codes[:300])
        ix.remove(np.arange(0, 400, 2))
        ix.compact()
        check(reader, np.arange(300), codes[:300])      # its files are deleted, and still mapped
        assert [o.name for o in (tmp_path/"a").glob("*.index")] == [ix.info()["segments"][0]["file"]]
        assert reader.refresh() and not reader.refresh()
        check(reader, np.arange(1, 400, 2), codes[1::2])
    with pytest.raises(InputError, match="open for reading"): ix.add(codes[:1])
    check(ix, np.arange(1, 400, 2), codes[1::2])
    LiveIndex.write(tmp_path/"a").close()


def hold(path, told, stop):
    with LiveIndex.write(path):
        told.set()
        stop.wait(60)


def test_a_writer_in_another_process_is_named_and_its_death_frees_the_index(tmp_path):
    make(tmp_path/"a", random_codes(9, 8))
    context = multiprocessing.get_context("fork")
    told, stop = context.Event(), context.Event()
    child = context.Process(target=hold, args=(tmp_path/"a", told, stop))
    child.start()
    try:
        assert told.wait(60)
        with pytest.raises(BusyError, match=f"process {child.pid}"): LiveIndex.write(tmp_path/"a")
        assert len(LiveIndex.open(tmp_path/"a")) == 9
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    with LiveIndex.write(tmp_path/"a") as ix: ix.add(random_codes(1, 8))


def add_in_child(ix, queue):
    try: queue.put(ix.add(random_codes(1, 8)).tolist())
    except BusyError as e: queue.put(str(e))


def test_a_forked_child_does_not_write_beside_its_parent(tmp_path):
    make(tmp_path/"a", random_codes(9, 8))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with LiveIndex.write(tmp_path/"a") as ix:
        child = context.Process(target=add_in_child, args=(ix, queue))
        child.start()
        assert f"process {os.getpid()}" in queue.get(timeout=60)
        child.join()
        assert ix.add(random_codes(1, 8)).tolist() == [9]


def test_a_reader_that_opens_while_files_are_replaced(tmp_path, monkeypatch):
    "Between its look at the manifest and at the files, the writer replaces both: it takes the newer state."
    codes = random_codes(50, 8)
    make(tmp_path/"a", codes, cuts=[40])
    writer, real = LiveIndex.write(tmp_path/"a"), segment_files.open_segment
    rounds = iter([1, 2, 3])
    def slow(folder, entry, n_bits):
        if i := next(rounds, None):
            writer.add(codes[:1], [100 + i])
            writer.compact()
        return real(folder, entry, n_bits)
    monkeypatch.setattr("rsir_nb.live.index.open_segment", slow)
    ix = LiveIndex.open(tmp_path/"a")
    assert ix.ids.tolist() == [*range(50), 101, 102, 103]
    writer.close()
    (tmp_path/"a"/ix.info()["segments"][0]["file"]).unlink()
    with pytest.raises(CorruptError, match="segment-"): LiveIndex.open(tmp_path/"a")
    with pytest.raises(CorruptError, match="segment-"): ix.verify()


def test_verifying_while_files_are_replaced(tmp_path, monkeypatch):
    make(tmp_path/"a", random_codes(50, 8), cuts=[40])
    writer, real, rounds = LiveIndex.write(tmp_path/"a"), segment_files.file_checksum, iter([1])
    def slow(path):
        if next(rounds, None): writer.compact()
        return real(path)
    monkeypatch.setattr(segment_files, "file_checksum", slow)
    LiveIndex.open(tmp_path/"a").verify()
    writer.close()


def test_searching_on_while_another_thread_refreshes(tmp_path):
    codes = random_codes(500, 32)
    reader = make(tmp_path/"a", codes[:1])
    failed, stop = [], threading.Event()
    def read():
        while not stop.is_set():
            reader.refresh()
            now = len(reader)
            dists, ids = reader.search(codes[:2], 1000)
            if not (ids[0] == ids[0]).all() or dists.shape[1] < now: failed.append((now, dists.shape))
    threads = [threading.Thread(target=read) for _ in range(2)]
    for o in threads: o.start()
    with LiveIndex.write(tmp_path/"a") as ix:
        for i in range(1, 40): ix.add(codes[i:i + 1])
    stop.set()
    for o in threads: o.join()
    assert not failed


def test_a_group_is_one_change_or_none(tmp_path):
    codes = random_codes(60, 8)
    reader = make(tmp_path/"a", codes[:30])
    with LiveIndex.write(tmp_path/"a") as ix:
        with ix.group() as same:
            assert same is ix
            ix.remove([3, 4])
            ix.add(codes[:1], [3])
            for i in range(40, 50): ix.add(codes[i:i + 1])
            ix.compact()
            assert len(ix) == 39 and not reader.refresh()
        assert reader.refresh() and len(reader) == 39 and reader.ids[28] == 3
        order = reader.ids
        for error in ValueError, KeyboardInterrupt:
            with pytest.raises(error), ix.group():
                ix.add(codes[:5])
                ix.remove([0])
                raise error
            np.testing.assert_array_equal(ix.ids, order)
        with ix.group(): pass
        assert not reader.refresh()
        assert ix.add(codes[:1]).tolist() == [40]
    assert len(list((tmp_path/"a").glob("*.index"))) == len(LiveIndex.open(tmp_path/"a").verify().info()["segments"])


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_full_disk_changes_nothing(tmp_path, monkeypatch, call):
    codes = random_codes(20, 8)
    make(tmp_path/"a", codes[:10])
    for calls in range(12):
        with LiveIndex.write(tmp_path/"a") as ix, monkeypatch.context() as patch:
            before, left, real = ix.ids, iter(range(calls)), getattr(os, call)
            def full(*args, left=left, real=real):
                if next(left, None) is None: raise OSError(28, "No space left on device")
                return real(*args)
            patch.setattr(os, call, full)
            try: ix.add(codes[10:])
            except OSError: failed = True
            else: failed = False
        now = LiveIndex.open(tmp_path/"a").verify()
        if not failed: break
        assert now.ids.tolist() in ([*before], [*before, *range(before[-1] + 1, before[-1] + 11)])
        assert not list((tmp_path/"a").glob(".*.part"))
    assert not failed and calls >= 2
    np.testing.assert_array_equal(now.ids, np.arange(len(now)))


def test_an_atomic_write_flushes_what_it_wrote_and_nothing_else(tmp_path, monkeypatch):
    "All of it, folders in it too, then the name; not the files that happen to lie beside it."
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.readlink(f"/proc/self/fd/{handle}")))
    (tmp_path/"beside").mkdir()
    (tmp_path/"beside"/"large").write_text("x")
    write_json(tmp_path/"a.json", 1)
    assert [Path(o).name for o in flushed] == [f".a.json.{os.getpid()}.part", tmp_path.name]
    flushed.clear()
    with atomic_path(tmp_path/"folder") as part:
        (part/"inner").mkdir(parents=True)
        (part/"inner"/"file").write_text("x")
    assert sorted(Path(o).name for o in flushed[:2]) == ["file", "inner"]
    assert [Path(o).name for o in flushed[2:]] == [f".folder.{os.getpid()}.part", tmp_path.name]


# Damage

@pytest.fixture
def damaged(tmp_path):
    "An index of two segments, one with deletions."
    codes = random_codes(3000, 72)
    make(tmp_path/"a", codes, np.arange(3000)*3, cuts=[2500])
    with LiveIndex.write(tmp_path/"a") as ix: ix.remove([30, 33])
    return tmp_path/"a"


def test_every_flipped_byte_is_found_and_its_file_named(damaged):
    files = sorted(o for o in damaged.iterdir() if o.name != ".lock")
    assert [o.name.split("-")[0] for o in files] == ["deleted", "manifest", "segment", "segment"]
    rng = np.random.default_rng(0)
    for path in files:
        whole = path.read_bytes()
        step = 1 if path.name == "manifest" else 7 if path.name.startswith("deleted") else 97
        for at in {*range(0, min(1200, len(whole)), step), *rng.integers(0, len(whole), 60).tolist(), len(whole) - 1}:
            changed = bytearray(whole)
            changed[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(changed)
            with pytest.raises(CorruptError, match=path.name): LiveIndex.open(damaged, verify=True)
            if path.name == "manifest":
                with pytest.raises(CorruptError, match=path.name): LiveIndex.open(damaged)
        path.write_bytes(whole)
    LiveIndex.open(damaged, verify=True)


def test_a_flip_in_the_notes_of_deletions_is_found_on_open(damaged):
    "But for the zeros between the arrays, which mean nothing."
    path, ids, found = next(damaged.glob("deleted-*")), LiveIndex.open(damaged).ids, 0
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        try: np.testing.assert_array_equal(LiveIndex.open(damaged).ids, ids)
        except CorruptError as e: found += path.name in str(e)
        else: assert whole[at] == 0
    assert len(whole) - found < 2*64


def test_truncated_lengthened_and_missing_files_are_told_on_open(damaged):
    for path in sorted(o for o in damaged.iterdir() if o.name != ".lock"):
        whole = path.read_bytes()
        for content in b"", whole[:10], whole[:100], whole[:len(whole)//2], whole[:-1], whole + b"\0", None:
            path.write_bytes(content) if content is not None else path.unlink()
            error = MissingFileError if content is None and path.name == "manifest" else CorruptError
            with pytest.raises(error, match=path.name): LiveIndex.open(damaged)
            with pytest.raises(error, match=path.name): LiveIndex.write(damaged)
        path.write_bytes(whole)
    with LiveIndex.write(damaged) as ix: ix.verify()


def test_files_of_another_index_or_version_are_refused(damaged, tmp_path):
    with LiveIndex.write(make(tmp_path/"b", random_codes(3000, 72, seed=1), np.arange(3000)*3, cuts=[2500]).path) as ix:
        ix.remove([60, 66])
    for kind in "segment", "deleted":
        mine, theirs = (sorted(o.glob(f"{kind}-*"))[-1] for o in (damaged, tmp_path/"b"))
        whole = mine.read_bytes()
        assert mine.name == theirs.name and len(whole) == theirs.stat().st_size
        shutil.copy(theirs, mine)
        with pytest.raises(CorruptError, match="not the file that"): LiveIndex.open(damaged)
        mine.write_bytes(whole)
    path = damaged/"manifest"
    path.write_bytes(path.read_bytes().replace(b"version 1", b"version 2", 1))
    for call in LiveIndex.open, LiveIndex.write:
        with pytest.raises(CorruptError, match="found version 2; wanted version 1"): call(damaged)
    write_json(path, dict(n_bits=8))
    with pytest.raises(CorruptError, match="no manifest"): LiveIndex.open(damaged)


def test_an_index_made_anew_in_the_same_place_is_seen(tmp_path):
    codes = random_codes(40, 8)
    reader = make(tmp_path/"a", codes[:20])
    shutil.rmtree(tmp_path/"a")
    make(tmp_path/"a", codes[20:])
    assert reader.refresh()      # the same generation, of another index
    check(reader, np.arange(20), codes[20:])


def test_what_is_not_ours_is_never_swept_up(tmp_path):
    make(tmp_path/"a", random_codes(9, 8))
    for name in "notes.txt", "segment-1.index.bak", "mysegment-000001.index", ".part", "segment-x.index":
        (tmp_path/"a"/name).write_text("keep")
    for name in "segment-000099.index", ".segment-000002.index.17.part", ".manifest.17.part", "deleted-000003.index":
        (tmp_path/"a"/name).write_text("half")
    LiveIndex.open(tmp_path/"a")
    assert len(list((tmp_path/"a").iterdir())) == 12
    LiveIndex.write(tmp_path/"a").close()
    assert {o.name for o in (tmp_path/"a").iterdir()} == {
        ".lock", "manifest", "segment-000002.index", "notes.txt", "segment-1.index.bak", "mysegment-000001.index",
        ".part", "segment-x.index"}


# Killed

class Model:
    "What an index should hold: ids and codes in the order of insertion, and the next id."
    def __init__(self, n_bits, ids=(), codes=None, following=0):
        self.n_bits, self.ids, self.next = n_bits, list(ids), following
        self.codes = np.empty((0, n_bits//8), np.uint8) if codes is None else codes

    def add(self, codes, ids=None):
        ids = list(range(self.next, self.next + len(codes))) if ids is None else [int(o) for o in ids]
        return Model(self.n_bits, self.ids + ids, np.concatenate([self.codes, codes]), max([self.next - 1, *ids]) + 1)

    def remove(self, ids):
        keep = ~np.isin(self.ids, ids) if self.ids else np.ones(0, bool)
        return Model(self.n_bits, np.array(self.ids, dtype=np.int64)[keep].tolist(), self.codes[keep], self.next)

    def compact(self): return self

    def holds(self, ix):
        return ix.ids.tolist() == self.ids and np.array_equal(ix.codes, self.codes)


def script():
    "Changes that meet every way of writing: first, appended, merged, bits, rewritten, emptied, grouped, compacted."
    codes = lambda n, seed: random_codes(n, 8, seed)
    return [lambda o: o.add(codes(8, 0)),
            lambda o: o.add(codes(3, 1), [90, 70, 80]),
            lambda o: o.add(codes(1, 2)),
            lambda o: o.add(codes(6, 3)),
            lambda o: o.remove([2, 80]),
            lambda o: o.add(codes(2, 4), [2, 80]),
            lambda o: o.remove([2, 80]),
            lambda o: o.remove([0, 1, 3, 4, 5, 6, 7]),
            lambda o: o.add(codes(1, 5)),
            lambda o: o.compact(),
            lambda o: o.remove([70]),
            lambda o: o.compact()]


def run(disk, changes, model, seen):
    "Make changes one by one; `seen` gets the model before and after the one at work."
    with LiveIndex.write(disk.folder) as ix:
        for change in changes:
            after = change(model)
            seen[:] = [model, after]
            change(ix)
            model = after
            seen[:] = [model]
    return model


def fresh(folder):
    shutil.rmtree(folder, ignore_errors=True)
    LiveIndex.create(folder, n_bits=8)
    return Disk(folder, [index_files, segment_files])


def grouped(change_list):
    "All changes as one."
    def change(o):
        if isinstance(o, Model):
            for part in change_list: o = part(o)
            return o
        with o.group():
            for part in change_list: part(o)
    return change


@pytest.mark.parametrize("group", [False, True])
def test_killed_at_every_file_operation(tmp_path, group):
    "By a kill, and by losing power in two ways: the state is the one before or the one after, whole, and goes on."
    changes = script()
    if group: changes = [changes[0], grouped(changes[1:9]), grouped(changes[9:])]
    disk = fresh(tmp_path/"a")
    with disk.on():
        disk.arm(None)
        final = run(disk, changes, Model(8), [])
        total = disk.count
    assert final.holds(LiveIndex.open(disk.folder)) and total > (60 if group else 100)
    outcomes = set()
    for fatal in range(total):
        disk, seen = fresh(tmp_path/"a"), [Model(8)]
        with disk.on():
            disk.arm(fatal, fatal)
            with pytest.raises(Killed): run(disk, changes, Model(8), seen)
            moment = disk.moment()
            for power_lost in False, True, True:
                disk.restart(power_lost, moment)
                ix = LiveIndex.open(disk.folder, verify=True)
                fits = [o.holds(ix) for o in seen]
                assert any(fits), (fatal, power_lost, ix.ids, [o.ids for o in seen])
                outcomes.add((power_lost, fits.index(True)))
                model = seen[fits.index(True)]
                with LiveIndex.write(disk.folder) as ix:
                    ids = ix.add(random_codes(4, 8, 9))
                    assert ids.tolist() == list(range(model.next, model.next + 4))
                assert model.add(random_codes(4, 8, 9)).holds(LiveIndex.open(disk.folder, verify=True))
                named = {o["file"] for o in segment_files._notes(read_manifest(disk.folder))}
                assert {o.name for o in disk.folder.iterdir()} == {".lock", "manifest", *named}
    assert outcomes == {(False, 0), (False, 1), (True, 0), (True, 1)}


@pytest.mark.parametrize("adopted", [False, True])
def test_killed_while_it_is_made(tmp_path, adopted):
    "There is no index, and it can be made again, or there is a whole one."
    codes, old = random_codes(50, 8), HammingIndex(8)
    old.add(codes)
    source = dict(from_index=old.save(tmp_path/"old.index")) if adopted else dict(n_bits=8)
    wanted, outcomes = list(range(50)) if adopted else [], set()
    for fatal in range(30):
        for power_lost in False, True:
            shutil.rmtree(tmp_path/"a", ignore_errors=True)
            (tmp_path/"a").mkdir()
            disk = Disk(tmp_path/"a", [index_files, segment_files, shutil])
            with disk.on():
                disk.arm(fatal, fatal)
                try: LiveIndex.create(tmp_path/"a", **source)
                except Killed: killed = True
                else: killed = False
                disk.dead = True
                disk.restart(power_lost)
            try: found = LiveIndex.open(tmp_path/"a", verify=True)
            except MissingFileError: found = LiveIndex.create(tmp_path/"a", **source) if killed else None
            else: outcomes.add(killed)
            check(found.verify(), wanted, codes[wanted] if adopted else np.empty((0, 1), np.uint8))
    assert False in outcomes


def test_the_disk_that_stops_loses_what_was_not_flushed(tmp_path):
    "The tool itself: a writer that forgets to flush, or renames before it flushes, is caught."
    for forgets in "file", "folder":
        lost = 0
        for seed in range(20):
            disk = fresh(tmp_path/"a")
            with disk.on():
                disk.arm(None, seed)
                real = disk.fsync
                def careless(handle, forgets=forgets, real=real):
                    is_folder = os.path.isdir(f"/proc/self/fd/{handle}")
                    if is_folder != (forgets == "folder"): real(handle)
                os.fsync = careless
                with LiveIndex.write(disk.folder) as ix: ix.add(random_codes(9, 8))
                os.fsync = disk.fsync
                disk.restart(power_lost=True)
            try: lost += len(LiveIndex.open(disk.folder, verify=True)) != 9
            except (CorruptError, MissingFileError): lost += 1
        assert lost > 5, forgets


class Life(RuleBasedStateMachine):
    "Random additions, deletions, searches, compactions, readers and deaths beside a plain list."

    @initialize(n_bits=st.sampled_from([8, 64, 72]), pieces=st.sampled_from([[110, 50, 25, 12], [40, 7], []]))
    def start(self, n_bits, pieces):
        self.home = tempfile.TemporaryDirectory()
        LiveIndex.create(Path(self.home.name)/"a", n_bits=n_bits)
        self.disk = Disk(Path(self.home.name)/"a", [index_files, segment_files])
        self.model, self.readers = Model(n_bits), []
        self.on = self.disk.on()
        self.on.__enter__()
        self.ix = LiveIndex.write(self.disk.folder)
        for i, n in enumerate(pieces): self.make_a_change("add", n, i)
        if pieces: self.make_a_change("remove a few", 0, 0)

    def teardown(self):
        if not hasattr(self, "on"): return
        self.ix.close()
        self.on.__exit__(None, None, None)
        self.home.cleanup()

    def change(self, kind, n, seed):
        "A change of an index and of a model alike."
        rng, ids = np.random.default_rng(seed), np.array(self.model.ids, dtype=np.int64)
        codes = rng.integers(0, 4, (n, self.model.n_bits//8), dtype=np.uint8)
        gone = ids[rng.random(len(ids)) < (.05 if kind == "remove a few" else rng.choice([.3, .6, 1]))]
        free = np.setdiff1d(np.arange(self.model.next + n + 5), ids)
        named = rng.permutation(free)[:n]
        add, remove, compact = lambda o: o.add(codes), lambda o: o.remove(gone), lambda o: o.compact()
        return {"add": add, "named": lambda o: o.add(codes, named), "remove": remove, "remove a few": remove,
                "compact": compact, "swap": grouped([remove, add, compact]), "two": grouped([add, remove])}[kind]

    kinds = st.sampled_from(["add", "named", "remove a few", "remove", "two", "swap", "compact"])

    @rule(kind=kinds, n=st.integers(0, 60), seed=st.integers(0, 10**6))
    def make_a_change(self, kind, n, seed):
        change = self.change(kind, n, seed)
        change(self.ix)
        self.model = change(self.model)

    @rule(kind=kinds, n=st.integers(1, 60), seed=st.integers(0, 10**6), fatal=st.integers(0, 45),
          power_lost=st.booleans())
    def die_in_a_change(self, kind, n, seed, fatal, power_lost):
        change, ways = self.change(kind, n, seed), [self.model]
        self.disk.arm(fatal, seed)
        try:
            change(self.ix)
            self.model = change(self.model)
            ways = [self.model]
        except Killed: ways.append(change(self.model))
        self.disk.dead = True
        self.disk.restart(power_lost)
        self.ix.close()
        self.ix = LiveIndex.write(self.disk.folder)
        fits = [o for o in ways if o.holds(self.ix.verify())]
        assert fits
        self.model = fits[0]

    @rule()
    def open_again(self):
        self.ix.close()
        self.ix = LiveIndex.write(self.disk.folder)

    @rule()
    def open_a_reader(self):
        self.readers = [*self.readers[-2:], [LiveIndex.open(self.disk.folder), self.model]]

    @precondition(lambda self: self.readers)
    @rule(which=st.integers(0, 2), seed=st.integers(0, 99), refresh=st.booleans())
    def ask_a_reader(self, which, seed, refresh):
        reader = self.readers[which % len(self.readers)]
        if refresh:
            reader[0].refresh()
            reader[1] = self.model
        check(reader[0], reader[1].ids, reader[1].codes, seed, ks=(1, 5))

    @rule(seed=st.integers(0, 99), k=st.integers(1, 300))
    def ask(self, seed, k):
        check(self.ix, self.model.ids, self.model.codes, seed, ks=(k,))

    @invariant()
    def same_content(self):
        if not hasattr(self, "ix"): return
        assert self.model.holds(self.ix)
        sizes = [o["items"] + o["deleted"] for o in self.ix.info()["segments"]]
        assert all(o["deleted"] < o["items"] for o in self.ix.info()["segments"]) and min(sizes, default=1) > 0


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=80, stateful_step_count=30, deadline=None,
                             suppress_health_check=list(HealthCheck))


# Killed in earnest

def hashed(ids, width=8):
    "A code for every id, (n, width) uint8, the same in every process."
    x = (np.asarray(ids, dtype=np.uint64)[:, None] + np.arange(width//8, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return np.ascontiguousarray(x ^ (x >> np.uint64(27))).view(np.uint8)


def next_change(generation, ids):
    "What is done at a generation: some ids to add, or some to remove; never nothing."
    rng = np.random.default_rng(generation)
    if len(ids) > 150 or (len(ids) > 5 and rng.random() < .4):
        return "remove", rng.permutation(ids)[:int(rng.integers(1, len(ids)))]
    return "add", np.arange(generation*100, generation*100 + int(rng.integers(1, 40)))


def write_until_killed(path, done):
    with LiveIndex.write(path) as ix:
        while True:
            what, ids = next_change(ix.generation, ix.ids)
            ix.add(hashed(ids), ids) if what == "add" else ix.remove(ids)
            done.value = ix.generation


def test_killed_in_earnest_dozens_of_times(tmp_path):
    LiveIndex.create(tmp_path/"a", n_bits=64)
    context, rng = multiprocessing.get_context("fork"), random.Random(0)
    done, generation, ids = context.Value("q", 0), 0, np.empty(0, np.int64)
    reader = LiveIndex.open(tmp_path/"a")
    for _ in range(40):
        child = context.Process(target=write_until_killed, args=(tmp_path/"a", done))
        child.start()
        time.sleep(rng.uniform(0.01, 0.12))
        reader.refresh()      # while the other writes
        seen = reader.generation, reader.ids, reader.codes
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        ix = LiveIndex.open(tmp_path/"a", verify=True)
        assert ix.generation >= max(done.value, seen[0], generation)
        while generation < ix.generation:
            if generation == seen[0]: np.testing.assert_array_equal(seen[1], ids)
            what, changed = next_change(generation, ids)
            ids = np.concatenate([ids, changed]) if what == "add" else ids[~np.isin(ids, changed)]
            generation += 1
        np.testing.assert_array_equal(ix.ids, ids)
        np.testing.assert_array_equal(ix.codes, hashed(ids))
        np.testing.assert_array_equal(seen[2], hashed(seen[1]))
    assert generation > 40
    check(ix, ids, hashed(ids))


def test_pages_show_what_the_index_is(tmp_path):
    ix = make(tmp_path/"codes.live", random_codes(1500, 8), cuts=[1000], provenance=dict(weights="3f2a"))
    assert repr(ix) == "LiveIndex('codes.live') of 1,500 codes of 8 bits in 2 segments, generation 2"
    assert "3f2a" in ix._repr_markdown_() and "| segment-000002.index | 1,000 | 0 |" in ix._repr_markdown_()
    assert str(tmp_path) not in ix._repr_markdown_()
