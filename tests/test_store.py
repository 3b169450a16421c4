"A patch store gives back what was put in, or says what is wrong; whatever happens to its writer or its file."
import multiprocessing
import os
import pickle
import random
import time

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

from rsir_nb.core import DATASETS, BusyError, CorruptError, InputError, MissingFileError, UnknownNameError
from rsir_nb.data.base import TensorArchive, concat_archives
from rsir_nb.data.lmdb import LmdbReader, LmdbWriter
from rsir_nb.data.batches import collate
from rsir_nb.data.module import ArchiveData
from rsir_nb.data.packing import PACKINGS, Packing, StoreHeader, seal
from rsir_nb.data.store import PatchStore, StoreWriter, write_store
from rsir_nb.sensors import Sensor, get_sensor


def make_archive(n=12, size=24, seed=0, **columns):
    rng = np.random.default_rng(seed)
    arrays = dict(s1=rng.normal(-14, 4, (n, 2, size, size)).astype("float32"),
                  s2=rng.integers(0, 9000, (n, 10, size, size)).astype("float32"))
    labels = [["Pastures"], ["Arable land", "Pastures"], []] * n
    return TensorArchive(arrays, ids=[f"patch_{i}" for i in range(n)], labels=labels[:n],
                         place=[f"tile {i // 3}" for i in range(n)], split=(["train", "val"] * n)[:n], **columns)


def store(archive, path, **kwargs): return write_store(archive, path, size=24, progress=False, **kwargs)


def same(a, b):
    assert a.ids == b.ids
    pd.testing.assert_frame_equal(a.table, b.table)
    for i in range(len(a)):
        x, y = a.raw(i), b.raw(i)
        assert x.keys() == y.keys()
        for m in x: np.testing.assert_array_equal(x[m], y[m])


# round trips

def test_round_trip(tmp_path):
    archive = make_archive(date=pd.to_datetime(["2017-07-17"] * 12), geometry=[b"\x01wkb"] * 11 + [None])
    report = store(archive, tmp_path / "a")
    assert (report.written, report.present, report.skipped) == (12, 0, [])
    back = PatchStore(tmp_path / "a")
    assert back.complete and back.ids == archive.ids and list(back.vocab) == list(archive.vocab)
    for column in archive.table: assert back.table[column].tolist()[:11] == archive.table[column].tolist()[:11], column
    assert back.table["geometry"].iloc[11] is None or pd.isna(back.table["geometry"].iloc[11])
    assert back.sensors == archive.sensors
    np.testing.assert_array_equal(back.labels, archive.labels)
    for i, id in enumerate(archive.ids):
        want, got = archive[i], back[id]
        assert got["id"] == id and got.keys() == want.keys()
        torch.testing.assert_close(got["s2"], want["s2"], rtol=0, atol=0)
        torch.testing.assert_close(got["s1"], want["s1"], rtol=0, atol=0.00101)
        assert got["s1"].dtype == got["s2"].dtype == torch.float32
        assert {m: x.dtype for m, x in back.raw(i).items()} == dict(s1=np.int16, s2=np.uint16)
        got["s1"].zero_()   # what is handed out is the caller's
        torch.testing.assert_close(back[id]["s1"], want["s1"], rtol=0, atol=0.00101)
    assert DATASETS.create("store", path=tmp_path / "a").ids == archive.ids
    assert back.verify(progress=False) == []


def test_values_out_of_range_never_wrap(tmp_path):
    archive = make_archive(8)
    s1, s2 = archive.arrays["s1"], archive.arrays["s2"]
    s2[0, 0, 0, 0], s2[1, 0, 0, 0], s2[2, 0, 0, 0], s2[3, 0, 0, 0] = -1000, -1001, 64535, 64536
    s1[4, 0, 0, 0], s1[5, 0, 0, 0] = 65.5, 65.6
    s2[6] += np.float32(0.25)
    store(archive, tmp_path / "a")
    back = PatchStore(tmp_path / "a")
    kinds = [[back.raw(i)[m].dtype == np.float32 for m in ("s1", "s2")] for i in range(8)]
    assert kinds == [[False, False], [False, True], [False, False], [False, True], [False, False], [True, False],
                     [False, False], [False, False]]
    for i in range(8):
        torch.testing.assert_close(back[i]["s2"], archive[i]["s2"], rtol=0, atol=0.5)
        torch.testing.assert_close(back[i]["s1"], archive[i]["s1"], rtol=0, atol=0.00101)
    torch.testing.assert_close(back[1]["s2"], archive[1]["s2"], rtol=0, atol=0)


@pytest.mark.parametrize("unit", PACKINGS)
def test_packings_against_float64(unit):
    packing = PACKINGS[unit]
    ends = np.iinfo(packing.dtype)
    x = np.linspace(ends.min * packing.scale + packing.offset, ends.max * packing.scale + packing.offset, 100_003)
    back = packing.unpack(packing.pack(x.astype("float32"))).astype("float64")
    assert np.abs(back - x).max() <= packing.scale / 2 * 1.01 + 1e-5
    assert packing.pack(np.array([np.nan])) is None and packing.pack(np.array([np.inf])) is None
    assert packing.pack(np.array([x[-1] + 1000.0])) is None and packing.pack(np.array([x[0] - 1000.0])) is None


def test_pictures_are_kept_as_bytes(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (3, 3, 24, 24))
    store(TensorArchive(dict(rgb=x)), tmp_path / "a")
    back = PatchStore(tmp_path / "a")
    np.testing.assert_array_equal(np.stack([back.raw(i)["rgb"] for i in range(3)]), x)
    assert back.raw(0)["rgb"].dtype == np.uint8 and back.vocab is None and "labels" not in back[0]


def test_units_of_ones_own_are_kept_whole(tmp_path):
    height = Sensor("height", ("h",), "metres")
    x = np.random.default_rng(0).normal(500, 300, (3, 1, 24, 24)).astype("float32")
    archive = TensorArchive(dict(dem=x), dict(dem=height))
    store(archive, tmp_path / "a")
    np.testing.assert_array_equal(PatchStore(tmp_path / "a")[1]["dem"], x[1])
    store(archive, tmp_path / "b", dtypes=dict(dem=Packing("int16", scale=0.5)))
    assert np.abs(PatchStore(tmp_path / "b")[1]["dem"].numpy() - x[1]).max() <= 0.25
    with pytest.raises(UnknownNameError, match="did you mean int16"): store(archive, tmp_path / "c", dtypes=dict(dem="int61"))


def test_absent_modalities_stay_absent(tmp_path):
    both = concat_archives([make_archive(3), TensorArchive(dict(s1=make_archive(2).arrays["s1"]), ids=["r0", "r1"])])
    store(both, tmp_path / "a")
    back = PatchStore(tmp_path / "a")
    assert set(back["r1"]) == {"id", "s1"} and set(back["patch_0"]) == {"id", "s1", "s2", "labels"}
    assert back.has("s1", "s2").tolist() == [True] * 3 + [False] * 2
    assert len(ArchiveData(back, batch_size=2).train) == 3


def test_resampled_once(tmp_path):
    archive = make_archive(2, size=12)
    write_store(archive, tmp_path / "a", size=24, progress=False, dtypes=dict(s1="float32", s2="float32"))
    want = torch.nn.functional.interpolate(archive[1]["s2"][None], (24, 24), mode="bicubic", align_corners=True)[0]
    torch.testing.assert_close(PatchStore(tmp_path / "a")[1]["s2"], want, rtol=0, atol=0)


def test_real_patches(shared, tmp_path):
    archive = DATASETS.create("ben_v1_lmdb", path=shared / "data/configilm_ben_lmdb/BENv1/BigEarthNetEncoded.lmdb")
    report = write_store(archive, tmp_path / "a", progress=False)
    assert report.written == 30
    back = PatchStore(tmp_path / "a")
    for i in range(30):
        torch.testing.assert_close(back[i]["s2"], archive[i]["s2"], rtol=0, atol=0.501)
        torch.testing.assert_close(back[i]["s1"], archive[i]["s1"], rtol=0, atol=0.00101)
        assert back.raw(i)["s2"].dtype == np.uint16


def test_empty_archive(tmp_path):
    empty = make_archive(2).subset([])
    assert store(empty, tmp_path / "a").written == 0
    back = PatchStore(tmp_path / "a")
    assert len(back) == 0 and back.complete and back.ids == [] and back.verify(progress=False) == []
    with pytest.raises(IndexError): back[0]
    assert store(make_archive(2), tmp_path / "a").written == 2
    assert PatchStore(tmp_path / "a").ids == ["patch_0", "patch_1"]


# bad patches

def test_bad_patches_are_left_out_and_listed(tmp_path):
    archive = make_archive(8)
    archive.arrays["s1"][1] = 10 ** (archive.arrays["s1"][1] / 10)
    archive.arrays["s2"][2] /= 10000
    archive.arrays["s2"][3, 4, 5, 6] = np.nan
    archive.arrays["s2"][5] = 0
    report = store(archive, tmp_path / "a")
    assert report.written == 4 and "4 left out" in repr(report)
    listed = pd.read_csv(tmp_path / "a" / "skipped.csv")
    assert listed["id"].tolist() == ["patch_1", "patch_2", "patch_3", "patch_5"]
    for reason, word in zip(listed["reason"], ["linear", "multiply by 10000", "NaN", "nodata"], strict=True):
        assert word in reason and "\n" not in reason
    back = PatchStore(tmp_path / "a")
    assert back.complete and back.ids == ["patch_0", "patch_4", "patch_6", "patch_7"]
    with pytest.raises(InputError, match="patch_1"): store(archive, tmp_path / "b", on_error="raise")
    assert PatchStore(tmp_path / "b").ids == ["patch_0"] and not PatchStore(tmp_path / "b").complete
    good = make_archive(8)
    report = store(good, tmp_path / "a")
    assert (report.written, report.present) == (4, 4) and not (tmp_path / "a" / "skipped.csv").exists()


# damage

def record_offset(path, id):
    back = PatchStore(path)
    payload = back.raw(id)["s2"].tobytes()
    data = (path / "data.mdb").read_bytes()
    assert data.count(payload[:512]) == 1
    return data.index(payload[:512]), len(payload)


def change(path, at):
    with open(path / "data.mdb", "r+b") as f:
        f.seek(at)
        old = f.read(1)[0]
        f.seek(at)
        f.write(bytes([old ^ 0x10]))


def test_a_changed_byte_is_named_and_never_a_result(tmp_path):
    store(make_archive(), tmp_path / "a")
    at, length = record_offset(tmp_path / "a", "patch_7")
    for place in (at, at + length // 3, at + length - 1):
        change(tmp_path / "a", place)
        back = PatchStore(tmp_path / "a")
        with pytest.raises(CorruptError, match="patch_7"): back["patch_7"]
        with pytest.raises(CorruptError, match="patch_7"): back.raw("patch_7")
        assert back.verify(progress=False) == ["patch_7"]
        assert back["patch_6"]["id"] == "patch_6"
        change(tmp_path / "a", place)
    assert PatchStore(tmp_path / "a").verify(progress=False) == []


def test_changes_anywhere_in_a_record_are_noticed(tmp_path):
    "Checksum, kinds and payload: every byte of the value counts."
    store(make_archive(3), tmp_path / "a")
    path, key = tmp_path / "a", b"p" + (1).to_bytes(8, "big")
    good = LmdbReader(path).get(key)
    rng = random.Random(0)
    for place in [*range(17), *(rng.randrange(len(good)) for _ in range(30)), len(good) - 1]:
        bad = bytearray(good)
        bad[place] ^= 1 << rng.randrange(8)
        with LmdbWriter(path) as writer: writer.commit([(key, bytes(bad))])
        with pytest.raises(CorruptError, match="patch_1"): PatchStore(path)["patch_1"]
    for bad in (b"", good[:7], good[:16], good[:-8], good + bytes(8), bytes(len(good))):
        with LmdbWriter(path) as writer: writer.commit([(key, bad)])
        with pytest.raises(CorruptError, match="patch_1"): PatchStore(path)["patch_1"]
    with LmdbWriter(path) as writer: writer.commit([(key, LmdbReader(path).get(b"p" + bytes(8)))])
    with pytest.raises(CorruptError, match="patch_1"): PatchStore(path)["patch_1"]   # another's record
    with LmdbWriter(path) as writer: writer.commit([], delete=[key])
    with pytest.raises(CorruptError, match="patch_1"): PatchStore(path)["patch_1"]


def test_damaged_header_and_table(tmp_path):
    for key in (b"header", b"table"):
        path = tmp_path / key.decode()
        store(make_archive(3), path)
        value = bytearray(LmdbReader(path).get(key))
        value[30] ^= 1
        with LmdbWriter(path) as writer: writer.commit([(key, bytes(value))])
        with pytest.raises(CorruptError, match=key.decode()): PatchStore(path)


@pytest.mark.parametrize("part", [0.0, 0.01, 0.3, 0.6, 0.9])
def test_cut_file(tmp_path, part):
    store(make_archive(), tmp_path / "a")
    used = LmdbReader(tmp_path / "a")
    pages = used.transact(lambda txn: used.shared.env.info()["last_pgno"] + 1)
    data = (tmp_path / "a" / "data.mdb").read_bytes()[:pages * 4096]
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "data.mdb").write_bytes(data[:int(len(data) * part)])
    with pytest.raises((CorruptError, MissingFileError, InputError)): PatchStore(cut)
    (cut / "data.mdb").write_bytes(data)
    assert PatchStore(cut).verify(progress=False) == []


def test_other_versions_and_other_files(tmp_path):
    archive = make_archive(2)
    store(archive, tmp_path / "a")
    header = PatchStore(tmp_path / "a").header.to_json().replace(b'"version": 1', b'"version": 2')
    with LmdbWriter(tmp_path / "a") as writer: writer.commit([(b"header", seal(header, b"header"))])
    with pytest.raises(InputError, match="another version; found 2; wanted 1"): PatchStore(tmp_path / "a")
    with pytest.raises(InputError, match="another version"): store(archive, tmp_path / "a")
    with LmdbWriter(tmp_path / "b") as writer: writer.commit([(b"S2A_MSIL2A", b"something")])
    with pytest.raises(InputError, match="no patch store"): PatchStore(tmp_path / "b")
    with pytest.raises(MissingFileError): PatchStore(tmp_path / "nowhere")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "data.mdb").write_bytes(os.urandom(100_000))
    with pytest.raises(CorruptError): PatchStore(tmp_path / "c")
    with pytest.raises(CorruptError): store(archive, tmp_path / "c")


def test_a_store_of_another_kind_is_not_mixed(tmp_path):
    archive = make_archive(4)
    store(archive, tmp_path / "a")
    for bad, word in [(dict(size=12), "size"), (dict(size=24, dtypes=dict(s1="float32")), "packings")]:
        with pytest.raises(InputError, match=word): write_store(archive, tmp_path / "a", progress=False, **bad)
    with pytest.raises(InputError, match="sensors"): store(TensorArchive(dict(s1=archive.arrays["s1"])), tmp_path / "a")
    with pytest.raises(InputError, match="is there already"): store(archive, tmp_path / "a", resume=False)
    old = PatchStore(tmp_path / "a")
    old[0]
    store(TensorArchive(dict(s1=archive.arrays["s1"])), tmp_path / "a", overwrite=True)
    assert set(PatchStore(tmp_path / "a").sensors) == {"s1"}
    torch.testing.assert_close(old[1]["s2"], archive[1]["s2"])   # who had the old one open keeps it


# killed

def write_slowly(archive, path, pause):
    "Runs in a process of its own: commits every few patches and takes its time."
    read = archive.read
    archive.read = lambda i: (time.sleep(pause), read(i))[1]
    StoreWriter.__init__.__defaults__ = (*StoreWriter.__init__.__defaults__[:-1], 40_000)
    store(archive, path)


def start(archive, path, pause=0.002):
    process = multiprocessing.get_context("fork").Process(target=write_slowly, args=(archive, path, pause))
    process.start()
    return process


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment(tmp_path, seed):
    archive, sizes, rng = make_archive(80, date=[None, "2017-07-17"] * 40), [], random.Random(seed)
    store(archive, tmp_path / "whole")
    for _ in range(8):
        process = start(archive, tmp_path / "a")
        time.sleep(rng.uniform(0.02, 0.2))
        process.kill()
        process.join()
        try: back = PatchStore(tmp_path / "a")
        except MissingFileError: continue   # before the first commit there is nothing
        assert back.ids == [f"patch_{i}" for i in range(len(back))]
        assert back.verify(progress=False) == []
        sizes.append(len(back))
    assert sizes == sorted(sizes) and max(sizes) > 0, "each run goes on from the one before"
    store(archive, tmp_path / "a")
    same(PatchStore(tmp_path / "a"), PatchStore(tmp_path / "whole"))
    assert PatchStore(tmp_path / "a").complete


def test_an_unfinished_store_opens(tmp_path):
    archive = make_archive(6)
    header = StoreHeader(24, archive.sensors, {m: PACKINGS[o.unit] for m, o in archive.sensors.items()})
    writer = StoreWriter(tmp_path / "a", header, batch_bytes=30_000)
    seen = []
    for i in range(6):
        writer.add(archive.ids[i], archive.read(i), dict(place=archive.table["place"][i]))
        seen.append(len(PatchStore(tmp_path / "a")))
    assert seen == sorted(seen) and 0 < seen[3] < 6
    writer.lmdb.close()   # as if killed: what was not committed is gone
    back = PatchStore(tmp_path / "a")
    assert not back.complete and back.ids == archive.ids[:seen[-1]] and "tile 0" in back.table["place"].tolist()
    with StoreWriter(tmp_path / "a", header) as writer, pytest.raises(InputError, match="already"):
        writer.add(archive.ids[0], archive.read(0))


def test_an_error_keeps_what_was_read(tmp_path):
    archive = make_archive(6)
    read = archive.read
    archive.read = lambda i: read(i) if i < 4 else 1 / 0
    with pytest.raises(ZeroDivisionError): store(archive, tmp_path / "a")
    assert PatchStore(tmp_path / "a").ids == archive.ids[:4]


# several processes

def test_second_writer_is_refused(tmp_path):
    archive = make_archive(400)
    process = start(archive, tmp_path / "a", 0.005)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "a" / "data.mdb").is_file() and time.monotonic() < deadline: time.sleep(0.01)
        with pytest.raises(BusyError, match="written to by another process"): store(archive, tmp_path / "a")
        seen = set()
        while len(seen) < 3 and time.monotonic() < deadline:
            try: back = PatchStore(tmp_path / "a")
            except MissingFileError: continue
            if len(back): back[len(back) - 1]
            seen.add(len(back))
        assert len(seen) >= 3, "readers follow the writer"
        old = min(seen)
        assert [back[i]["id"] for i in range(old)] == archive.ids[:old]
        assert process.is_alive(), "the writer was not disturbed"
    finally:
        process.kill()
        process.join()
    back = PatchStore(tmp_path / "a")
    store(archive, tmp_path / "a")   # the lock died with its holder
    assert back[len(back) - 1]["id"] == back.ids[-1]


def test_two_writers_in_one_process(tmp_path):
    archive = make_archive(2)
    header = StoreHeader(24, archive.sensors, {m: PACKINGS[o.unit] for m, o in archive.sensors.items()})
    with StoreWriter(tmp_path / "a", header):
        with pytest.raises(BusyError): StoreWriter(tmp_path / "a", header)
        with pytest.raises(BusyError): store(archive, tmp_path / "a")
    with StoreWriter(tmp_path / "a", header) as writer: writer.add("x", archive.read(0))
    assert PatchStore(tmp_path / "a").ids == ["x"]


@pytest.mark.parametrize("way", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_reading_in_workers(tmp_path, way):
    store(make_archive(16), tmp_path / "a")
    back = PatchStore(tmp_path / "a")
    want = torch.stack([back[i]["s1"] for i in range(16)])   # opened in the parent before the workers come
    loader = DataLoader(back, 4, num_workers=2, collate_fn=collate, multiprocessing_context=way)
    batches = list(loader)
    assert [id for o in batches for id in o["id"]] == back.ids
    torch.testing.assert_close(torch.cat([o["s1"] for o in batches]), want)
    torch.testing.assert_close(back[0]["s1"], want[0])


def test_pickled(tmp_path):
    store(make_archive(3), tmp_path / "a")
    back = PatchStore(tmp_path / "a")
    back[0]
    again = pickle.loads(pickle.dumps(back))
    torch.testing.assert_close(again["patch_2"]["s2"], back["patch_2"]["s2"])
    part = pickle.loads(pickle.dumps(back.split("train")))
    assert part.ids == ["patch_0", "patch_2"]


def _read_forever(path, queue):
    back = PatchStore(path)
    before = back[0]["s2"].clone()
    queue.put("reading")
    while True:
        torch.testing.assert_close(back[0]["s2"], before)
        if os.path.exists(f"{path}.stop"): break
    queue.put("fine")


def test_the_map_grows_under_a_reader(tmp_path):
    archive = make_archive(40)
    store(archive.subset(range(3)), tmp_path / "a")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_read_forever, args=(str(tmp_path / "a"), queue))
    process.start()
    assert queue.get(timeout=60) == "reading"
    size = os.path.getsize(tmp_path / "a" / "data.mdb")
    with LmdbWriter(tmp_path / "a", map_size=size) as writer:
        before = writer.shared.env.info()["map_size"]
        writer.commit([(f"z{i}".encode(), bytes(1 << 20)) for i in range(20)])
        assert writer.shared.env.info()["map_size"] > 2 * before
    (tmp_path / "a.stop").touch()
    assert queue.get(timeout=60) == "fine"
    process.join(60)
    assert process.exitcode == 0
    assert len(PatchStore(tmp_path / "a")) == 3


def test_sensor_of_a_modality_is_kept(tmp_path):
    sensor = get_sensor("s2").subset(["B04", "B03", "B02"])
    archive = TensorArchive(dict(optical=make_archive(2).arrays["s2"][:, :3]), dict(optical=sensor))
    store(archive, tmp_path / "a")
    assert PatchStore(tmp_path / "a").sensors == dict(optical=sensor)
