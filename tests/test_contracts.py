"A method, and every part that it is made of, that nobody wrote for this package: trained, killed, resumed, searched, scored."
import json
import signal

import numpy as np
import pandas as pd
import pytest
import torch

import toy_contracts
from engine_run import run_python
from rsir_nb.config import load_config
from rsir_nb.core import InputError, UnknownNameError, read_json
from rsir_nb.engine.evaluate import evaluate
from rsir_nb.engine.hash import train_hash
from rsir_nb.engine.parts import build_archive, load_method
from rsir_nb.engine.retriever import open_search
from rsir_nb.engine.stages import index_run
from rsir_nb.engine.train import pretrain, read_history
from rsir_nb.methods.base import Method

EPOCHS, STEPS = 4, 5    # 40 training patches in batches of 8
WHAT = ["plugins=[toy_contracts]", "data=toy_bytes", "method=toy_everything", "optim.optimizer=sgd", "optim.lr=0.01", "optim.momentum=0.5",
        f"optim.epochs={EPOCHS}", "optim.warmup_epochs=0", "optim.schedule=step", "optim.milestones=[2]", "trainer.batch_size=8",
        "trainer.pictures=0", "trainer.val_split=val", "trainer.monitor=val/toy_first@3", "trainer.augment=[flips,{name: toy_dim, least: 0.8}]",
        "trainer.views=2", "hash.n_bits=16", "hash.min_steps=20", "hash.epochs=2", "evaluate.drawings=50"]


def toy_config(out, *changes): return load_config("base", [*WHAT, f"out={out}", *changes])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "Trained, undisturbed."
    toy_contracts.seen.clear()
    return pretrain(toy_config(tmp_path_factory.mktemp("toy")/"run"), progress=False)


def test_what_the_loop_gave_the_method(run):
    seen, method = toy_contracts.seen, load_method(run)
    assert seen["epochs"] == list(range(EPOCHS))
    assert seen["dtype"] == dict(a=torch.float32, b=torch.float32)      # bytes until the batch is on the device
    assert seen["train"].read_stored(0)["a"].dtype == torch.uint8
    assert list(method.vocab) == list(toy_contracts.KINDS) and sum(method.class_counts) == len(seen["train"])
    assert method.inputs.stats()["a"]["R"][1] > 10      # no table knows the band: fitted, and saved with the method
    assert (method.distance, method.modalities) == ("toy_l1", ["a", "b", "a+b"])


def test_curves_and_learning_rates(run):
    history = read_history(run)
    assert len(history) == EPOCHS*STEPS and {"pull", "views", "drift", "val/toy_first@3", "val/loss"} <= set(history)
    assert np.allclose(history.lr*10, history.lr_2)     # the backbones learn at a tenth
    assert history.lr_2.round(6).tolist() == [0.01]*(2*STEPS) + [0.001]*(2*STEPS) or \
        history.lr_2.iloc[0] == 0.01 and history.lr_2.iloc[-1] == pytest.approx(0.001)
    told = read_json(run/"finished.json")
    assert told["monitor"] == "val/toy_first@3" and told["value"] == pytest.approx(history["val/toy_first@3"].max())


def test_training_state_is_kept_but_neither_named_nor_shipped(run):
    method = load_method(run)
    kept = torch.load(max((run/"checkpoints").glob("*.ckpt")), weights_only=True)["state_dict"]
    assert kept["method.bank.rows"].abs().sum() > 0
    assert not [k for k in method.state_dict() if k.startswith("bank")]
    assert not [k for k in json.loads((run/"method"/"method.json").read_text()) if "bank" in k]
    assert (run/"method"/"training.safetensors").is_file()


def test_killed_run_goes_on_to_the_same_curve(run, tmp_path):
    code = "from test_contracts import *; pretrain(toy_config(%r), progress=False)" % str(tmp_path/"run")
    assert run_python(code, RSIR_TOY_KILL_AT=2*(STEPS + 2) + 3) == -signal.SIGKILL
    assert not (tmp_path/"run"/"method").exists()
    pretrain(toy_config(tmp_path/"run"), progress=False)
    pd.testing.assert_frame_equal(read_history(tmp_path/"run"), read_history(run), check_exact=True)
    assert load_method(tmp_path/"run").weights_hash == load_method(run).weights_hash


@pytest.fixture(scope="module")
def search(run):
    "Hashed, encoded and indexed."
    train_hash(run, progress=False)
    index_run(run, progress=False)
    return open_search(run, archive=build_archive(toy_config(run).data))


def test_queries_by_every_modality_in_the_method_s_own_distance(run, search):
    store = search.store
    assert (store.distance, store.modalities) == ("toy_l1", ["a", "b", "a+b"])
    z = np.asarray(store.embeddings["a"], np.float32)
    found = search.query("toy00", source="a", target="a", by="embeddings", k=5)
    wanted = np.abs(z - z[0]).sum(1)
    wanted[0] = np.inf
    assert found.ids == [store.ids[i] for i in np.argsort(wanted, kind="stable")[:5]]
    fused = search.query("toy00", source="a+b", target="a+b", k=3)
    assert fused.table()["fused_of"].tolist() == ["a and b"]*3
    patch = search.archive["toy05"]
    alone = search.query(dict(a=patch["a"]), source="a+b", target="b", by="embeddings", k=3)     # the camera is missing
    assert alone.query["fused_of"] == "a"
    x = load_method(run).embed({"a": patch["a"][None], "nonsense": None, "row": None}, "a+b")
    assert torch.equal(x, load_method(run).embed(patch["a"][None], "a"))


def test_evaluation_by_labels_and_by_partners(run, search):
    found = evaluate(run, progress=False)
    assert set(found.partners.direction) == {"a->b", "b->a"}     # a fusion is no partner of its own sensors
    ours = found.table[(found.table.system == "toy_everything") & (found.table.kind == "float")]
    assert {"a->a", "a->b", "b->a", "a+b->a", "a+b->a+b"} <= set(ours.direction) and "toy_first" in set(ours.metric)
    same = ours[(ours.metric == "map") & (ours.k == ours.k.max()) & ours.direction.isin(["a->a", "b->b", "a+b->a+b"])]
    assert len(same) == 3 and same.value.min() > 0.99    # the four kinds of brightness are easy within a sensor


def test_a_retriever_ships_without_training_state(run, search, tmp_path):
    method = load_method(run)
    light = Method.load(method.save(tmp_path/"light", training=False))
    assert light.weights_hash == method.weights_hash and not (tmp_path/"light"/"training.safetensors").exists()


@pytest.mark.parametrize("change, error, text", [
    ("method.backbone=toy_mean", UnknownNameError, "did you mean toy_means"),
    ("method.backbone={name: toy_means, widht: 3}", UnknownNameError, "did you mean width"),
    ("trainer.sampler=toy_kind", UnknownNameError, "did you mean toy_kinds"),
    ("trainer.augment=[flip]", UnknownNameError, "did you mean flips"),
    ("trainer.monitor=val/toy_frist@3", UnknownNameError, "did you mean toy_first"),
    ("optim.optimizer=sdg", UnknownNameError, "did you mean .*sgd"),
    ("optim.schedule=steps", UnknownNameError, "did you mean step"),
    ("method.loss=toy_pul", UnknownNameError, "did you mean toy_pull"),
    ("method.miner=toy_neighbour", UnknownNameError, "did you mean toy_neighbours"),
    ("trainer.sampler={name: m_per_class, m: 99}", InputError, "99"),
])
def test_what_is_mistyped_is_one_clear_line(tmp_path, change, error, text):
    with pytest.raises(error, match=text): pretrain(toy_config(tmp_path/"run", change), progress=False)


def test_what_an_archive_cannot_give(tmp_path):
    toy_contracts.DATASETS.register("toy_unlabelled")(unlabelled)
    with pytest.raises(InputError, match="needs labels"):
        pretrain(toy_config(tmp_path/"m", "data=toy_unlabelled", "trainer.sampler=epoch"), progress=False)
    with pytest.raises(InputError, match="labels"):
        pretrain(toy_config(tmp_path/"s", "data=toy_unlabelled", "trainer.sampler=balanced", "trainer.monitor=val/partner_r@1"), progress=False)


def unlabelled(n:int=72):
    "The toy bytes without labels."
    whole = toy_contracts.toy_bytes(n)
    return toy_contracts.TensorArchive(whole.arrays, toy_contracts.SENSORS, ids=whole.ids, split=whole.table["split"].tolist())
