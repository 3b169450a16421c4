"Encoding: shards that survive a kill, bad patches left out by name, other jobs refused; hash heads on cached features."
import json
import logging
import re
import signal

import numpy as np
import pytest
import torch

from engine_run import run_python, tiny_config
from rsir_nb.core import BusyError, InputError, UnknownNameError
from rsir_nb.locks import folder_lock
from rsir_nb.data.base import Archive, TensorArchive
from rsir_nb.methods.embedding import common_sensors, encode_batch
from rsir_nb.engine.encode import encode, encode_run, skipped_patches
from rsir_nb.engine.hash import paired_features, train_hash
from rsir_nb.engine.parts import build_archive, build_method, load_method
from rsir_nb.engine.train import pretrain
from rsir_nb.retrieval.codes import CodeStore, binarise, pack_bits


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A trained run with hash heads."
    cfg = tiny_config(tmp_path_factory.mktemp("encode")/"run", "optim.epochs=1")
    pretrain(cfg, progress=False)
    train_hash(cfg.out, progress=False)
    return cfg


@pytest.fixture(scope="module")
def archive(run): return build_archive(run.data)


@pytest.fixture(scope="module")
def method(run): return load_method(run.out)


def test_codes_are_those_of_the_method(tmp_path, method, archive):
    store = encode(method, archive, tmp_path/"codes", batch_size=5, shard_size=13, progress=False)
    x = torch.stack([archive[i]["s2"] for i in range(len(archive))])
    z = method.embed(x, "s2")
    assert np.array_equal(store.codes["s2"], pack_bits(binarise(method.hash(z, "s2"))))
    assert np.allclose(store.embeddings["s2"], z.numpy(), atol=2e-3)
    assert store.ids == archive.ids and store.weights_hash == method.weights_hash and store.n_bits == 16
    assert store.provenance["sensors"]["s1"]["bands"] == ["VH", "VV"]
    assert store.provenance["method"]["norm_stats"]["s2"]["B02"]
    assert store.provenance["classes"] == list(archive.vocab)
    assert not (tmp_path/"codes.part").exists() and not store.verify().provenance["skipped"]


def test_batches_shards_and_workers_do_not_matter(tmp_path, method, archive):
    a = encode(method, archive, tmp_path/"a", batch_size=5, shard_size=13, progress=False)
    b = encode(method, archive, tmp_path/"b", batch_size=64, num_workers=2, progress=False)
    for m in "s1", "s2":
        assert np.array_equal(a.codes[m], b.codes[m]) and np.array_equal(a.embeddings[m], b.embeddings[m])


def test_killed_job_goes_on(tmp_path, run, method, archive):
    code = f"""
from engine_run import *
from rsir_nb.engine.encode import encode
from rsir_nb.engine.parts import build_archive, load_method
cfg = tiny_config({run.out!r})
encode(load_method(cfg.out), build_archive(cfg.data), {str(tmp_path/'codes')!r}, batch_size=4, shard_size=8, progress=False)
"""
    assert run_python(code, RSIR_TEST_KILL_AT=29) == -signal.SIGKILL
    done = sorted((tmp_path/"codes.part").glob("shard_*.npz"))
    assert len(done) == 3 and not (tmp_path/"codes").exists()   # 48 patches: 3 of 6 shards are whole
    before = [o.stat().st_mtime_ns for o in done]
    done[1].write_bytes(done[1].read_bytes()[:-100])             # a damaged one is made again
    reads = Counting(archive)
    store = encode(method, reads, tmp_path/"codes", batch_size=4, shard_size=8, progress=False)
    whole = encode(method, archive, tmp_path/"whole", batch_size=4, shard_size=8, progress=False)
    assert reads.count == 48 - 2*8 and len(before) == 3
    for m in "s1", "s2":
        assert np.array_equal(store.codes[m], whole.codes[m]) and np.array_equal(store.embeddings[m], whole.embeddings[m])
    assert store.table.equals(whole.table)


class Counting(Archive):
    "An archive that counts how often it is read."
    def __init__(self, whole):
        super().__init__(whole.table, whole.sensors, whole.vocab)
        self.whole, self.count = whole, 0

    def read(self, i):
        self.count += 1
        return self.whole.read(i)


def test_other_jobs_are_refused(tmp_path, run, method, archive):
    store = encode(method, archive, tmp_path/"codes", progress=False)
    assert encode(method, archive, tmp_path/"codes", batch_size=3, progress=False).ids == store.ids
    fresh = build_method(run, archive)
    with pytest.raises(InputError, match="another weights"): encode(fresh, archive, tmp_path/"codes")
    with pytest.raises(InputError, match="another archive"): encode(method, archive.subset([1, 2]), tmp_path/"codes")
    with pytest.raises(InputError, match="another modalities"): encode(method, archive, tmp_path/"codes", modalities=["s1"])
    (tmp_path/"half.part").mkdir()
    plan = dict(store.provenance["job"], weights="00c0ffee", batch_size=64, shard_size=4096)
    (tmp_path/"half.part"/"plan.json").write_text(json.dumps(plan))
    with pytest.raises(InputError, match="weights 00c0ffee"): encode(method, archive, tmp_path/"half", progress=False)
    with folder_lock(tmp_path, ".new.lock"), pytest.raises(BusyError): encode(method, archive, tmp_path/"new", progress=False)


class Broken(Archive):
    "Patches that are damaged in as many ways as there are."
    def __init__(self, whole):
        super().__init__(whole.table, whole.sensors, whole.vocab)
        self.whole = whole

    def read(self, i):
        patch = self.whole.read(i)
        if i == 1: raise OSError("patch 1 cannot be opened")
        if i == 2: patch["s1"][0, 0, 0] = np.nan
        if i == 3: patch["s2"] /= 10_000
        if i == 4: del patch["s1"]
        if i == 5: patch["s1"], patch["s2"] = patch["s1"]*0, patch["s2"][:, :20]
        return patch


def test_bad_patches_are_left_out_and_listed(tmp_path, method, archive, caplog):
    with caplog.at_level(logging.WARNING):
        store = encode(method, Broken(archive), tmp_path/"codes", batch_size=7, shard_size=9, progress=False)
    assert store.ids == [o for i, o in enumerate(archive.ids) if i not in (1, 5)]
    present = {m: [store.ids[i] for i in np.flatnonzero(~store.present(m))] for m in store.modalities}
    assert present == {"s1": [archive.ids[2], archive.ids[4]], "s2": [archive.ids[3]]}
    skipped = skipped_patches(store).groupby("id")["reason"].agg(" ".join)
    assert list(skipped.index) == [archive.ids[i] for i in (1, 2, 3, 5)]
    for i, words in {1: "cannot be opened", 2: "NaN", 3: "fraction", 5: "0 in every pixel"}.items():
        assert words in skipped[archive.ids[i]], skipped[archive.ids[i]]
    assert "4 of 48" in caplog.text
    whole = encode(method, archive, tmp_path/"whole", progress=False)
    assert np.array_equal(store.codes["s2"][store.present("s2")], np.delete(whole.codes["s2"], [1, 3, 5], axis=0))


def test_nothing_to_encode(tmp_path, method, archive):
    with pytest.raises(InputError, match="none of the 0 patches"): encode(method, archive.subset([]), tmp_path/"a")
    with pytest.raises(InputError, match="none of the 2 patches.*cannot be opened"):
        encode(method, Broken(archive).subset([1, 5]), tmp_path/"b", progress=False)


def test_sensors_must_be_the_same(method, archive):
    other = TensorArchive({"s2": torch.zeros(2, 10, 30, 30)}, {"s2": archive.sensors["s2"].subset(
        list(reversed(archive.sensors["s2"].bands)))})
    with pytest.raises(InputError, match="different sensors by 's2'"): common_sensors(method, other)
    with pytest.raises(UnknownNameError): common_sensors(method, archive, ["s9"])
    with pytest.raises(InputError, match="no sensor in common"):
        common_sensors(method, TensorArchive({"rgb": torch.zeros(2, 3, 30, 30)}))


def test_one_sensor_alone(tmp_path, method, archive):
    x = torch.stack([archive[i]["s1"] for i in range(6)])
    store = encode(method, TensorArchive({"s1": x}), tmp_path/"codes", progress=False)
    assert store.modalities == ["s1"]
    assert np.array_equal(store.codes["s1"], encode_batch(method, list(x), "s1")["codes"])


def test_without_heads_there_are_embeddings_alone(tmp_path, run, archive):
    method = build_method(run, archive)
    store = encode(method, archive, tmp_path/"codes", embeddings=False, progress=False)
    assert store.n_bits == 0 and not store.codes and set(store.embeddings) == {"s1", "s2"}
    assert CodeStore.open(store.path).verify().present("s1").all()
    half = encode(method, archive, tmp_path/"bf16", precision="bf16-mixed", progress=False)
    a, b = (np.float32(o.embeddings["s2"]) for o in (store, half))
    assert 0 < np.abs(a - b).max() < 0.1
    with pytest.raises(UnknownNameError): encode(method, archive, tmp_path/"fp4", precision="fp4")


def test_codes_alone(tmp_path, method, archive):
    store = encode(method, archive, tmp_path/"codes", embeddings=False, progress=False)
    assert set(store.codes) == {"s1", "s2"} and not store.embeddings
    with pytest.raises(InputError, match="embeddings=True"): paired_features(store)


def test_hash_heads_learn_from_the_training_split(run, archive):
    features = CodeStore.open(f"{run.out}/hash/features")
    assert features.ids == archive.split("train").ids
    assert load_method(run.out).weights_hash != load_method(f"{run.out}/method").weights_hash
    told = json.loads(open(f"{run.out}/hash/finished.json").read())
    assert told["n_bits"] == 16 and told["min_steps"] == 20


def test_hash_settings(run, caplog):
    before = load_method(run.out).weights_hash
    with caplog.at_level(logging.INFO): assert train_hash(run.out, progress=False).weights_hash == before
    assert "is done" in caplog.text
    with pytest.raises(InputError, match="n_bits 16; wanted n_bits 24"): train_hash(run.out, n_bits=24)
    with pytest.raises(InputError, match="multiple of 8"): train_hash(run.out, n_bits=12)
    with pytest.raises(UnknownNameError, match="n_bits"): train_hash(run.out, n_bit=24)


def test_other_heads_drop_the_codes_that_the_old_ones_made(tmp_path):
    cfg = tiny_config(tmp_path/"run", "optim.epochs=1")
    pretrain(cfg, progress=False)
    for n_bits in 16, 24:
        train_hash(cfg.out, progress=False, overwrite=True, n_bits=n_bits)
        assert encode_run(cfg.out, progress=False).n_bits == n_bits


def test_unpaired_patches_teach_no_heads(tmp_path, method, archive, caplog):
    store = encode(method, Broken(archive), tmp_path/"codes", progress=False)
    with caplog.at_level(logging.INFO): found = paired_features(store)
    assert {m: len(x) for m, x in found.items()} == {"s1": 43, "s2": 43} and "43 of 46" in caplog.text


def test_codes_of_a_run(run, archive):
    store = encode_run(run.out, progress=False)
    assert store.ids == archive.ids and encode_run(run.out, progress=False).provenance == store.provenance


def test_the_speed_is_told(tmp_path, method, archive, caplog, capsys):
    with caplog.at_level(logging.INFO): encode(method, archive, tmp_path/"codes", batch_size=8)
    told = re.search(r"48 patches of s1 and s2 encoded in \d+ s, (\d+) a second", caplog.text)
    assert told and int(told[1]) > 0 and "patch/s" in capsys.readouterr().err
    caplog.clear()
    with caplog.at_level(logging.INFO): encode(method, archive, tmp_path/"codes", progress=False)
    assert "encoded in" not in caplog.text                                     # nothing was left to do


def test_each_sensor_alone_is_as_in_the_whole(tmp_path, method, archive):
    whole = encode(method, archive, tmp_path/"whole", progress=False)
    for m in "s1", "s2":
        alone = encode(method, archive, tmp_path/m, modalities=[m], progress=False)
        assert alone.modalities == [m] and np.array_equal(alone.codes[m], whole.codes[m])
        assert np.array_equal(alone.embeddings[m], whole.embeddings[m])


def test_bfloat16_codes_with_workers_and_bad_patches(tmp_path, method, archive):
    "What a big job is run with: two workers, bf16, small shards, some patches that are damaged."
    exact = encode(method, Broken(archive), tmp_path/"exact", progress=False)
    half = encode(method, Broken(archive), tmp_path/"half", batch_size=7, shard_size=11, num_workers=2,
                  precision="bf16-mixed", progress=False)
    assert half.ids == exact.ids and half.provenance["skipped"] == exact.provenance["skipped"]
    for m in "s1", "s2":
        assert np.array_equal(half.present(m), exact.present(m))
        wrong = np.bitwise_count(half.codes[m] ^ exact.codes[m]).mean()/8
        assert wrong < 0.05 and half.codes[m].any()
    assert half.provenance["job"]["precision"] == "bf16-mixed"
    with pytest.raises(InputError, match="another precision"): encode(method, Broken(archive), tmp_path/"half")
