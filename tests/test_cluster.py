"Encoding and evaluating on a Ray cluster: the same store and the same scores, also after a break."
import numpy as np
import pandas as pd
import pytest
import torch
from engine_run import tiny_config
from engines import nodes  # noqa: F401
from rsir_nb.core import BusyError, InputError, UnknownNameError
from rsir_nb.locks import folder_lock
from rsir_nb.engine.cluster import encode_on_ray, evaluate_on_ray
from rsir_nb.engine.encode import encode
from rsir_nb.engine.evaluate import evaluate_store
from rsir_nb.engine.hash import train_hash
from rsir_nb.engine.parts import build_archive, load_method
from rsir_nb.engine.train import pretrain


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A trained run with hash heads, and what one thread here makes of its archive."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("cluster")
    cfg = tiny_config(folder/"run", "optim.epochs=1")
    pretrain(cfg, progress=False)
    train_hash(cfg.out, progress=False)
    local = encode(load_method(cfg.out), build_archive(cfg.data), folder/"local", batch_size=5, shard_size=13, progress=False)
    yield cfg, local
    torch.set_num_threads(threads)


SIZES = dict(batch_size=5, shard_size=13, progress=False)


def test_the_store_is_that_of_one_machine(nodes, run):  # noqa: F811
    cfg, local = run
    store = encode_on_ray(cfg.out, overwrite=True, **SIZES)
    for m in local.modalities:
        assert np.array_equal(store.codes[m], local.codes[m]) and np.array_equal(store.embeddings[m], local.embeddings[m])
    assert store.table.equals(local.table) and store.provenance["job"] == local.provenance["job"]
    assert not store.path.with_name("codes.part").exists() and not store.verify().provenance["skipped"]


def test_a_broken_job_goes_on_with_the_shards_that_are_there(nodes, run, monkeypatch):  # noqa: F811
    from rsir_nb.engine import cluster
    cfg, local = run

    def stop(*args): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(cluster, "finish_store", stop)                    # all shards are there, the store is not
        with pytest.raises(KeyboardInterrupt): encode_on_ray(cfg.out, overwrite=True, **SIZES)
    part = local.path.with_name("run")/"codes.part"
    shards = sorted(part.glob("shard_*.npz"))
    assert len(shards) == 4
    shards[0].unlink()
    shards[2].write_bytes(b"damaged")
    kept, asked = [shards[i].stat().st_mtime_ns for i in (1, 3)], []
    collect = cluster._collect
    with monkeypatch.context() as m:
        m.setattr(cluster, "_collect", lambda ray, refs, *a: asked.append(len(refs)) or collect(ray, refs, *a))
        m.setattr(cluster, "finish_store", stop)
        with pytest.raises(KeyboardInterrupt): encode_on_ray(cfg.out, **SIZES)
    assert asked == [2] and kept == [shards[i].stat().st_mtime_ns for i in (1, 3)]
    with pytest.raises(InputError, match="another batch_size"): encode_on_ray(cfg.out, **{**SIZES, "batch_size": 4})
    with folder_lock(part.parent, ".codes.lock"):
        with pytest.raises(BusyError): encode_on_ray(cfg.out, overwrite=True, **SIZES)
    store = encode_on_ray(cfg.out, **SIZES)
    for m in local.modalities: assert np.array_equal(store.codes[m], local.codes[m])


def test_a_node_with_other_weights_is_refused(nodes, run):  # noqa: F811
    from rsir_nb.engine.cluster import _encode_shard
    cfg, local = run
    plan = dict(local.provenance["job"], batch_size=5, shard_size=13, weights="others")
    with pytest.raises(InputError, match="other weights"):
        _encode_shard(cfg.out, build_archive(cfg.data), local.path/"x.npz", 0, plan)


def test_an_error_of_a_task_is_the_callers(nodes, run, monkeypatch):  # noqa: F811
    from rsir_nb.engine import cluster
    cfg, local = run
    monkeypatch.setattr(cluster, "describe_job", lambda *a: dict(local.provenance["job"], weights="others"))
    with pytest.raises(InputError, match="other weights"): encode_on_ray(cfg.out, overwrite=True, **SIZES)


@pytest.mark.parametrize("wrong", [dict(batchsize=3), dict(modalities=["s9"])])
def test_settings_that_cannot_be(run, wrong):
    with pytest.raises(UnknownNameError): encode_on_ray(run[0].out, progress=False, **wrong)


def test_scores_are_those_of_one_machine(nodes, run):  # noqa: F811
    for metrics in None, ["precision"]:
        found = evaluate_on_ray(run[1], drawings=20, metrics=metrics)
        pd.testing.assert_frame_equal(found, evaluate_store(run[1], drawings=20, metrics=metrics).table)
