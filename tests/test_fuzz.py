"""Readers and damaged files: bytes of good files are changed, cut, doubled and lengthened; what comes is a value or an error of ours.

Each reader gets a few dozen files here and RSIR_FUZZ of them (10,000) when marked slow: pytest -m slow tests/test_fuzz.py
"""
import io
import json
import os
import resource
import struct
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
from engine_run import tiny_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from test_records import RECORD

from rsir_nb.arrays import read_array_file
from rsir_nb.checksums import read_sealed, write_sealed
from rsir_nb.config import load_config, load_run_config, save_config
from rsir_nb.core import RsirError, read_json
from rsir_nb.data.features import read_arrays
from rsir_nb.data.records import load_v1_record, load_v2_record
from rsir_nb.data.scenes import read_patch_file
from rsir_nb.engine.runs import CheckedCheckpoints
from rsir_nb.engine.verify import check_files
from rsir_nb.geo import read_geoparquet, wkb_box, write_geoparquet
from rsir_nb.live.index import LiveIndex
from rsir_nb.models.saving import read_tensors
from rsir_nb.models.weights import load_published
from rsir_nb.retrieval.codes import CodeStore
from rsir_nb.retrieval.hamming import HammingIndex

RNG = np.random.default_rng(0)
LONG = int(os.environ.get("RSIR_FUZZ", 10_000))

edits = st.lists(st.one_of(
    st.tuples(st.just("flip"), st.floats(0, 1, exclude_max=True), st.integers(0, 7)),
    st.tuples(st.just("byte"), st.floats(0, 1, exclude_max=True), st.sampled_from([0, 1, 0x7F, 0x80, 0xFF])),
    st.tuples(st.just("word"), st.floats(0, 1, exclude_max=True), st.sampled_from([0, 1, 2**20, 2**31 - 1, 2**32 - 1])),
    st.tuples(st.just("cut"), st.floats(0, 1, exclude_max=True), st.just(0)),
    st.tuples(st.just("repeat"), st.floats(0, 1, exclude_max=True), st.integers(1, 200)),
    st.tuples(st.just("head"), st.integers(0, 200), st.integers(0, 255))), min_size=1, max_size=4)


def edited(raw, changes):
    raw = bytearray(raw)
    for what, where, value in changes:
        if not raw: break
        at = min(where, len(raw) - 1) if what == "head" else int(where*len(raw))
        if what == "flip": raw[at] ^= 1 << value
        elif what in ("byte", "head"): raw[at] = value
        elif what == "word": raw[at:at + 4] = struct.pack("<I", value)
        elif what == "cut": del raw[at:]
        else: raw[at:at] = raw[at:at + value]
    return bytes(raw)


@contextmanager
def little_memory(gib=4):
    "Asking for more than `gib` beyond what is in use is a MemoryError, which no reader may let through."
    used = int(Path("/proc/self/statm").read_text().split()[0])*resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (gib << 30), old[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_AS, old)


def saved(save_to, suffix):
    "The bytes of a file that `save_to` writes."
    import tempfile
    with tempfile.TemporaryDirectory() as d:
        save_to(Path(d)/f"a{suffix}")
        return (Path(d)/f"a{suffix}").read_bytes()


def arrays(suffix):
    x = RNG.normal(size=(20, 4)).astype("f4")
    return saved(lambda p: np.save(p, x) if suffix == ".npy" else np.savez_compressed(p, x=x, ids=np.array(["a", "b"])), suffix)


def picture(kind):
    file = io.BytesIO()
    Image.fromarray(RNG.integers(1, 255, (40, 40, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


def tif(path):
    options = dict(driver="GTiff", width=40, height=40, count=3, dtype="uint8", crs="EPSG:32632", compress="deflate")
    with rasterio.open(path, "w", **options) as f: f.write(RNG.integers(1, 255, (3, 40, 40), dtype=np.uint8))


def table(path):
    rows = pd.DataFrame(dict(id=["a", "b", "c"], labels=[["x"], [], ["y", "z"]], date=pd.to_datetime(["2020-01-01"]*3)))
    write_geoparquet(rows.assign(geometry=[wkb_box(i, 1, i + 1, 2) for i in range(3)]), path)


def index(path):
    ix = HammingIndex(64)
    ix.add(RNG.integers(0, 256, (30, 8), dtype=np.uint8))
    ix.save(path)


def v2(): return save(dict(B02=torch.zeros(12, 12, dtype=torch.uint16), VV=torch.zeros(12, 12)))


def image(path): return read_patch_file(path, "rgb", 32, fit="resample")


FILES = dict(
    json=(".json", lambda: saved(lambda p: write_sealed(p, dict(a=[1, {"b": "é"}], weights_hash="ab")), ".json"), read_sealed),
    plain_json=(".json", lambda: json.dumps(dict(a=[1, 2.5, None])).encode(), read_json),
    npy=(".npy", lambda: arrays(".npy"), read_array_file),
    npz=(".npz", lambda: arrays(".npz"), read_array_file),
    vectors=(".npz", lambda: arrays(".npz"), read_arrays),
    csv=(".csv", lambda: b"id,label,date\na,x,2020-01-01\nb,,\n", lambda p: load_config("base", [f"data.root={p}"])),
    parquet=(".parquet", lambda: saved(table, ".parquet"), read_geoparquet),
    vector_table=(".parquet", lambda: saved(table, ".parquet"), read_arrays),
    png=(".png", lambda: picture("PNG"), image),
    jpeg=(".jpg", lambda: picture("JPEG"), image),
    geotiff=(".tif", lambda: saved(tif, ".tif"), image),
    index=(".index", lambda: saved(index, ".index"), HammingIndex.load),
    safetensors=(".safetensors", v2, read_tensors),
    published=(".pt", lambda: saved(lambda p: torch.save(dict(state_dict=dict(w=torch.ones(3))), p), ".pt"), load_published),
    config=(".yaml", lambda: saved(lambda p: save_config(tiny_config(p.parent), p.parent) and (p.parent/"config.yaml").rename(p),
                                   ".yaml"), lambda p: load_run_config(p)),
    own_config=(".yaml", lambda: b"base: demo\noptim:\n  epochs: 3\nmethod:\n  mask_ratio: 0.5\n", load_config),
    v1_record=("", lambda: bytes(RECORD), lambda p: load_v1_record(p.read_bytes())),
    v2_record=("", v2, lambda p: load_v2_record(p.read_bytes())),
)


def tried(name, changes, folder):
    suffix, good, read = FILES[name]
    if name not in GOOD: GOOD[name] = good()
    path = folder/f"a{suffix}"
    path.write_bytes(edited(GOOD[name], changes))
    with little_memory():
        try: read(path)
        except RsirError: pass


GOOD = {}
QUICK = settings(max_examples=25, deadline=None, derandomize=True,
                 suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
@QUICK
@given(changes=edits)
def test_a_file_is_read_or_refused(name, tmp_path, changes): tried(name, changes, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
@settings(QUICK, max_examples=LONG, derandomize=False)
@given(changes=edits)
def test_a_file_is_read_or_refused_for_long(name, tmp_path, changes): tried(name, changes, tmp_path)


# -- folders: what is read is right, or it is refused

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("folders")
    codes = RNG.integers(0, 256, (12, 4), dtype=np.uint8)
    rows = pd.DataFrame(dict(id=[f"p{i}" for i in range(12)]))
    CodeStore.write(home/"codes", dict(s1=codes), rows, "ab12", embeddings=dict(s1=RNG.normal(size=(12, 3))))
    LiveIndex.create(home/"live", 32)
    with LiveIndex.write(home/"live") as ix:
        ix.add(codes)
        ix.remove([3])
    CheckedCheckpoints().save_checkpoint(dict(epoch=1, state_dict=dict(w=torch.arange(9.))), home/"ckpt"/"epoch_0001.ckpt")
    return home


def codes_of(home):
    store = CodeStore.open(home/"codes")
    return store.codes["s1"].tolist(), store.embeddings["s1"].tolist(), store.ids


def live_of(home):
    ix = LiveIndex.open(home/"live")
    return ix.codes.tolist(), ix.ids.tolist()


def checkpoint_of(home):
    found = CheckedCheckpoints().load_checkpoint(home/"ckpt"/"epoch_0001.ckpt")
    return found["epoch"], found["state_dict"]["w"].tolist()


READERS = dict(codes=codes_of, live=live_of, ckpt=checkpoint_of)


def damaged(folders, part, which, changes):
    files = [o for o in sorted((folders/part).rglob("*")) if o.is_file() and o.name[0] != "."]
    path, right = files[int(which*len(files))], READERS[part](folders)
    raw = path.read_bytes()
    if (bad := edited(raw, changes)) == raw: return
    path.unlink()       # a new file: what is mapped of the old one must not change below its reader
    path.write_bytes(bad)
    try:
        with little_memory():
            try: assert READERS[part](folders) == right
            except RsirError: pass
        try: sound = bool(json.loads(raw) == json.loads(bad))     # another way to write the same note
        except ValueError: sound = False
        assert sound or (check_files(folders/part).state != "as written").any()
    finally:
        path.unlink()
        path.write_bytes(raw)


@pytest.mark.parametrize("part", READERS)
@QUICK
@given(which=st.floats(0, 1, exclude_max=True), changes=edits)
def test_a_folder_gives_what_was_written_or_an_error(folders, part, which, changes): damaged(folders, part, which, changes)


@pytest.mark.slow
@pytest.mark.parametrize("part", READERS)
@settings(QUICK, max_examples=LONG, derandomize=False)
@given(which=st.floats(0, 1, exclude_max=True), changes=edits)
def test_a_folder_gives_what_was_written_or_an_error_for_long(folders, part, which, changes):
    damaged(folders, part, which, changes)
