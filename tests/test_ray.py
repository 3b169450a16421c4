"Search over a Ray cluster of several nodes on this machine, while nodes die."
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from engines import clustered, hamming, nodes, same  # noqa: F401
from rsir_nb.core import INDEXES, BusyError, CorruptError, InputError, MissingFileError, RsirError
from rsir_nb.remote.engines import fill_index, open_index
from rsir_nb.retrieval.hamming import HammingIndex
from rsir_nb.remote.ray import RayIndex
from rsir_nb.remote.shards import Searchers, start_ray


def nodes_of(pool): return [on for _, on in pool.actors]


def test_searchers_stand_on_different_nodes(nodes):  # noqa: F811
    nodes.pool.up()
    assert len(set(nodes_of(nodes.pool))) == 2


def test_a_node_is_killed_while_queries_run(nodes, tmp_path):  # noqa: F811
    "Every answer before, during and after is the whole one; the shards of the lost node are opened elsewhere."
    codes, third = clustered(4000), nodes.add()
    pool, results, errors, stop = Searchers(number=3, threads=1, timeout=90), [], [], threading.Event()
    ix = RayIndex.build(tmp_path/"shards", codes, shards=6, searchers=pool)
    wanted = hamming(codes).search(codes[:5], 50)
    same(ix.search(codes[:5], 50), wanted)
    assert third.node_id in nodes_of(pool), (third.node_id, pool.actors, pool.lost)

    def ask():
        try:
            while not stop.is_set(): results.append(ix.search(codes[:5], 50))
        except BaseException as e: errors.append(e)

    thread = threading.Thread(target=ask)
    thread.start()
    while len(results) < 3 and not errors: time.sleep(0.05)
    nodes.kill(third)
    until, noticed = time.monotonic() + 90, None
    while not errors and time.monotonic() < until and (noticed is None or len(results) < noticed + 4):
        if noticed is None and pool.lost: noticed = len(results)
        time.sleep(0.02)
    stop.set()
    thread.join()
    assert not errors, errors
    assert noticed and len(results) >= noticed + 4
    for o in results: same(o, wanted)
    assert pool.lost and not pool.lost & set(nodes_of(pool))
    same(ix.range_search(codes[:5], 8), hamming(codes).range_search(codes[:5], 8))
    pool.close()


def test_a_killed_process_is_replaced(nodes):  # noqa: F811
    ix, codes = nodes.new(64), clustered(300)
    ix.add(codes)
    ix.search(codes[:1], 1)
    for actor, _ in list(nodes.pool.actors): nodes.ray.kill(actor)
    same(ix.search(codes[:2], 300), hamming(codes).search(codes[:2], 300))
    nodes.pool.lost.clear()             # the nodes live, only processes died


def test_what_cannot_be_completed_is_an_error_and_no_part(nodes, tmp_path):  # noqa: F811
    codes = clustered(200)
    pool = Searchers(number=2, threads=1, timeout=0.1)
    ix = RayIndex.build(tmp_path/"shards", codes, shards=2, searchers=pool)
    with pytest.raises(RsirError, match="did not answer"):
        while True: ix.search(codes[:2], 3)     # until a new process was asked: none starts that soon
    pool.close()


@pytest.mark.parametrize("shards", [1, 3, 7])
def test_merging_shards_is_exact(nodes, tmp_path, shards):  # noqa: F811
    "All codes equal: every place in the result is decided by a tie."
    codes = np.repeat(clustered(3), 50, axis=0)
    ids = np.random.default_rng(0).permutation(1000)[:150]
    ix = RayIndex.build(tmp_path/"shards", codes, ids, shards=shards, searchers=nodes.pool)
    local, rng = hamming(codes, ids), np.random.default_rng(1)
    assert len(ix.shards.files) == shards
    for k in 1, 49, 51, 150: same(ix.search(codes[::50], k), local.search(codes[::50], k))
    for share in 0, 0.02, 0.5:
        mask = rng.random(150) < share
        same(ix.search(codes[::50], 60, mask), local.search(codes[::50], 60, mask))
        same(ix.search(codes[::50], 60, ids[mask]), local.search(codes[::50], 60, ids[mask]))
        same(ix.range_search(codes[::50], 20, mask), local.range_search(codes[::50], 20, mask))


def test_few_ids_are_no_mask_to_a_small_shard(nodes, tmp_path):  # noqa: F811
    "Three ids, zero and one among them, and a shard of three: one machine takes them as ids, so do the shards."
    codes = clustered(9)
    ix = RayIndex.build(tmp_path/"shards", codes, shards=3, searchers=nodes.pool)
    same(ix.search(codes[:1], 9, [0, 1, 1]), hamming(codes).search(codes[:1], 9, [0, 1, 1]))


def test_built_from_blocks_or_a_file(nodes, tmp_path):  # noqa: F811
    codes = clustered(500)
    local = hamming(codes, np.arange(500)[::-1])
    for i, (source, ids) in enumerate([((o for o in np.split(codes, [100, 350])), np.arange(500)[::-1]),
                                       (local.save(tmp_path/"codes.index"), None)]):
        ix = RayIndex.build(tmp_path/f"{i}", source, ids, shards=3, searchers=nodes.pool)
        assert len(ix.shards.files) == 3
        same(ix.search(codes[:3], 100), local.search(codes[:3], 100))
        assert HammingIndex.load(ix.save(tmp_path/f"{i}.index")).ids.tolist() == local.ids.tolist()


@pytest.mark.parametrize("codes, ids, told", [(clustered(4), [1, 1, 2, 3], "given twice"), ([], None, "no codes"),
    (clustered(4), [1, 2], "differ in number"), (clustered(4).astype(float), None, "not packed"),
    (iter([clustered(2), clustered(2, 128)]), None, "another length")])
def test_a_build_that_cannot_be_leaves_no_index(tmp_path, codes, ids, told):
    with pytest.raises(InputError, match=told): RayIndex.build(tmp_path/"x", codes, ids)
    with pytest.raises(MissingFileError, match="RayIndex.build"): RayIndex(tmp_path/"x")
    RayIndex.build(tmp_path/"x", clustered(4))                                                 # and does not stand in the way
    with pytest.raises(InputError, match="already"): RayIndex.build(tmp_path/"x", clustered(4))


def test_damage_is_found_on_whichever_node(nodes, tmp_path):  # noqa: F811
    ix = RayIndex.build(tmp_path/"shards", clustered(400), shards=2, searchers=nodes.pool)
    file = Path(ix.shards.paths[1])
    good = file.read_bytes()
    for bad in bytes(bytearray(good[:-90]) + bytes([good[-90] ^ 4]) + good[-89:]), good[:-50], b"":
        file.write_bytes(bad)
        with pytest.raises(CorruptError): ix.search(clustered(1), 1)
    file.unlink()
    with pytest.raises(MissingFileError, match="refresh"): ix.search(clustered(1), 1)
    (ix.folder/"shards.json").write_text("{}")
    with pytest.raises(CorruptError, match="does not describe"): RayIndex(ix.folder)


def test_a_killed_writer_leaves_the_state_before(nodes, tmp_path):  # noqa: F811
    "Killed after its file is written and before shards.json names it."
    codes = clustered(100)
    ix = RayIndex.build(tmp_path/"shards", codes, shards=2, searchers=nodes.pool)
    code = (f"import os, rsir_nb.remote.ray as r, numpy as np\n"
            f"r.Shards.write = lambda self: os._exit(9)\nix = r.RayIndex({str(ix.folder)!r})\n"
            f"ix.add(np.zeros((5, 8), np.uint8))")
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ}, capture_output=True, timeout=120)
    assert done.returncode == 9, done.stderr[-2000:]
    ix.refresh()
    same(ix.search(codes[:2], 100), hamming(codes).search(codes[:2], 100))
    assert ix.add(codes[:1]).tolist() == [100] and len(ix) == 101


def test_two_writers_do_not_meet_and_readers_can_follow(nodes, tmp_path):  # noqa: F811
    from rsir_nb.locks import folder_lock
    codes = clustered(60)
    ix = RayIndex.build(tmp_path/"shards", codes, shards=2, searchers=nodes.pool)
    other = RayIndex(ix.folder, searchers=nodes.pool)
    with folder_lock(ix.folder):
        for call in lambda: ix.add(codes), lambda: ix.remove([0]):
            with pytest.raises(BusyError): call()
    ix.add(codes[:2])
    ix.remove([1])
    assert len(other.refresh()) == 61 and other.add(codes[:1]).tolist() == [62]
    assert ix.add(codes[:1]).tolist() == [63]       # a writer looks at the folder first


def test_open_index_and_fill_index(nodes, tmp_path):  # noqa: F811
    codes = clustered(250)
    ix = open_index(f"ray:{tmp_path/'a'}", n_bits=64, searchers=nodes.pool)
    fill_index(ix, codes[:100], block=40)
    fill_index(ix, codes, block=60)
    assert len(ix) == 250
    for where in f"ray:{tmp_path/'a'}", f"ray://{nodes.cluster.address}{tmp_path/'a'}", tmp_path/"a":
        same(open_index(where, searchers=nodes.pool).search(codes[:2], 9), hamming(codes).search(codes[:2], 9))
    with pytest.raises(InputError, match="another code length"): open_index(f"ray:{tmp_path/'a'}", n_bits=128)
    with pytest.raises(InputError, match="no address"): open_index("ray:")
    assert isinstance(INDEXES.create("ray", folder=tmp_path/"a"), RayIndex)


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nowhere", "no-such-host.invalid:6379"])
def test_a_cluster_that_does_not_answer(address, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)       # as in a process that is not connected yet
    with pytest.raises(InputError, match=f"no Ray cluster answers at {address}"): start_ray(address)


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"rsir_nb\[ray\]"): start_ray()
