"Packed bits beside those of faiss and numpy, and code stores that are whole or not there."
import json
import multiprocessing
import os
import signal
import time

import faiss
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rsir_nb.core import CorruptError, InputError, MissingFileError, UnknownNameError
from rsir_nb.geo import wkb_box
from rsir_nb.retrieval.codes import (CodeStore, binarise, bit_statistics, check_codes, hamming_distances,
                                     pack_bits, unpack_bits)


def test_binarise_takes_the_sign_and_zero_is_zero():
    h = [[0.1, -0.1, 0., -0., 1e-30, -1e-30, 5, -5]]
    for x in np.array(h), torch.tensor(h, requires_grad=True), np.array(h, np.float16) + np.float16(0), h:
        bits = binarise(x)
        assert bits.dtype == np.uint8 and bits.tolist()[0][:4] == [1, 0, 0, 0]
    for bad in [[np.nan]], [[np.inf]], torch.tensor([[-np.inf]]), [["a"]]:
        with pytest.raises(InputError): binarise(bad)


@settings(max_examples=50, deadline=None)
@given(n=st.integers(0, 40), n_bytes=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_packing_is_that_of_faiss(n, n_bytes, seed):
    h = np.random.default_rng(seed).normal(size=(n, n_bytes*8)).astype(np.float32)
    codes = pack_bits(binarise(h))
    assert codes.shape == (n, n_bytes) and codes.dtype == np.uint8
    np.testing.assert_array_equal(unpack_bits(codes), h > 0)
    if not n: return
    peer = np.zeros_like(codes)
    faiss.fvecs2bitvecs(faiss.swig_ptr(h), faiss.swig_ptr(peer), n_bytes*8, n)
    np.testing.assert_array_equal(codes, peer)
    wanted = ((h[:, None] > 0) != (h > 0)).sum(-1)
    np.testing.assert_array_equal(hamming_distances(codes, codes), wanted)


def test_what_is_no_code():
    for bad in np.zeros((2, 12), np.uint8), np.zeros(16, np.uint8), np.full((2, 8), 2), np.full((2, 8), .5):
        with pytest.raises(InputError): pack_bits(bad)
    for bad, message in ((np.zeros((2, 16)), "pack_bits"), (np.zeros(16, np.uint8), r"code\[None\]"),
                         (np.zeros((2, 0), np.uint8), "another length"),
                         (np.zeros((2, 8), np.uint8), "that is 64 bits")):
        with pytest.raises(InputError, match=message): check_codes(bad, n_bits=128)


def test_bit_statistics():
    bits = np.zeros((1000, 16), np.uint8)
    rng = np.random.default_rng(0)
    bits[:, 1:9] = rng.integers(0, 2, (1000, 8))
    bits[:, 9:] = bits[:, 1:8]      # bit 0 never changes, the last seven are copies
    found = bit_statistics(pack_bits(bits))
    assert found["constant_bits"] == 1 and found["n"] == 1000 and found["n_bits"] == 16
    assert found["distinct"] == len(np.unique(bits, axis=0)) and found["ones"][0] == 0
    wanted = np.abs(np.corrcoef(bits[:, 1:].T))[~np.eye(15, dtype=bool)].mean()
    assert found["mean_abs_correlation"] == pytest.approx(wanted, rel=1e-3)
    assert found["entropy"] == pytest.approx(15/16, abs=0.01)
    with pytest.raises(InputError): bit_statistics(np.zeros((0, 2), np.uint8))


# The store.

def contents(n=50, seed=0):
    rng = np.random.default_rng(seed)
    codes = {m: rng.integers(0, 256, (n, 16), dtype=np.uint8) for m in ("s1", "s2")}
    place = [wkb_box(i, 0, i + 1, 1) for i in range(n)]
    names = [f"p{i}" for i in range(n)]
    return codes, pd.DataFrame(dict(id=names, labels=[["Sea"], []]*(n//2), split="test", geometry=place))


@pytest.fixture
def store(tmp_path):
    codes, table = contents()
    return CodeStore.write(tmp_path/"codes", codes, table, "aa11", embeddings=dict(s1=np.ones((50, 3))),
                           present=dict(s1=np.arange(50) > 4),
                           provenance=dict(norm="ben_v2", steps={1: (2, 3)}))


def test_what_was_written_is_opened(store):
    codes, table = contents()
    again = CodeStore.open(store.path).verify()
    for m in codes:
        np.testing.assert_array_equal(again.codes[m], codes[m])
        assert isinstance(again.codes[m], np.memmap)
    assert again.embeddings["s1"].dtype == np.float16 and list(again.embeddings) == ["s1"]
    assert len(again) == 50 and again.n_bits == 128 and again.modalities == ["s1", "s2"]
    assert again.ids == table["id"].tolist() and again.table.labels.tolist() == table.labels.tolist()
    assert again.table.geometry.tolist() == table.geometry.tolist()
    assert again.present("s1").sum() == 45 and again.present("s2").all()
    assert again.provenance["norm"] == "ben_v2" and again.provenance["steps"] == {"1": [2, 3]}
    assert again.provenance["versions"]["numpy"] == np.__version__
    assert "aa11" in again._repr_markdown_()


def test_embeddings_alone(tmp_path):
    _, table = contents()
    x = np.random.default_rng(0).normal(size=(50, 5)).astype(np.float16)
    store = CodeStore.write(tmp_path/"codes", {}, table, "w", embeddings=dict(s2=x)).verify()
    assert store.codes == {} and store.n_bits == 0 and store.modalities == ["s2"]
    np.testing.assert_array_equal(store.embeddings["s2"], x)
    assert "s2" in store._repr_markdown_() and store.require(modality="s2") is store


def test_require(store):
    assert store.require("aa11", 128, "s1") is store
    for kwargs in dict(weights_hash="bb"), dict(n_bits=64):
        with pytest.raises(InputError): store.require(**kwargs)
    for call in lambda: store.require(modality="s3"), lambda: store.present("s3"):
        with pytest.raises(UnknownNameError): call()


@pytest.mark.parametrize("name", ["codes/s1.npy", "embeddings/s1.npy", "table.parquet", "provenance.json"])
def test_every_file_is_checked(store, name):
    path = store.path/name
    whole = path.read_bytes()
    for at in 0, len(whole)//2, len(whole) - 1:
        damaged = bytearray(whole)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CorruptError): CodeStore.open(store.path).verify()
    for size in 0, len(whole)//2, len(whole) - 2:
        path.write_bytes(whole[:size])
        with pytest.raises(CorruptError):
            damaged = CodeStore.open(store.path)
            assert name == "table.parquet"      # the only one that is first read when it is asked for
            len(damaged.table)
    path.unlink()
    with pytest.raises((CorruptError, MissingFileError)): CodeStore.open(store.path).verify()


def test_other_versions_and_other_folders(store, tmp_path):
    with pytest.raises(MissingFileError): CodeStore.open(tmp_path/"none")
    (tmp_path/"empty").mkdir()
    with pytest.raises(CorruptError, match="missing"): CodeStore.open(tmp_path/"empty")
    record = json.loads((store.path/"provenance.json").read_text())
    for change, message in (dict(version=2), "version"), (dict(format="x"), "does not describe"), \
            (dict(weights_hash="bb"), "changed after"):
        (store.path/"provenance.json").write_text(json.dumps(record | change))
        with pytest.raises(CorruptError, match=message): CodeStore.open(store.path)


def test_contents_that_do_not_fit(tmp_path):
    codes, table = contents()
    short = {"s1": codes["s1"], "s2": codes["s2"][:-1]}
    other = {"s1": codes["s1"], "s2": codes["s2"][:, :8]}
    for args in ((short, table), (other, table), ({}, table), (codes, table.drop(columns="id")),
                 (codes, pd.concat([table[:-1], table[:1]]))):
        with pytest.raises(InputError): CodeStore.write(tmp_path/"codes", *args, "w")
    for more in (dict(embeddings=dict(s1=np.ones((3, 2)))), dict(embeddings=dict(s1=np.full((50, 2), 1e6))),
                 dict(present=dict(s1=[True]))):
        with pytest.raises(InputError), np.errstate(over="ignore"):
            CodeStore.write(tmp_path/"codes", codes, table, "w", **more)
    assert not list(tmp_path.iterdir())


def test_a_table_without_places(tmp_path):
    codes, table = contents()
    plain = CodeStore.write(tmp_path/"codes", codes, table.drop(columns="geometry"), "w")
    assert plain.verify().table["id"].tolist() == table["id"].tolist()


def test_overwriting_is_asked_for(store):
    codes, table = contents(10, seed=1)
    with pytest.raises(InputError, match="overwrite=True"): CodeStore.write(store.path, codes, table, "bb22")
    new = CodeStore.write(store.path, codes, table, "bb22", overwrite=True)
    assert len(new.verify()) == 10
    np.testing.assert_array_equal(store.codes["s2"], contents()[0]["s2"])   # who had it open keeps the old


def write_slowly(path):
    codes, table = contents(20_000)
    CodeStore.write(path, codes, table, "w")


@pytest.mark.parametrize("wait", [0., 0.02, 0.05, 0.1, 0.2])
def test_a_kill_while_writing_leaves_nothing_or_all(tmp_path, wait):
    child = multiprocessing.get_context("fork").Process(target=write_slowly, args=(tmp_path/"codes",))
    child.start()
    time.sleep(wait)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    if (tmp_path/"codes").exists(): CodeStore.open(tmp_path/"codes").verify()
    write_slowly(tmp_path/"again")      # what a dead process left behind is in nobody's way
    assert len(CodeStore.open(tmp_path/"again")) == 20_000
