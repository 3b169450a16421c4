"Training: the same curve after a kill, one writer, checkpoints that can be trusted, wandb that cannot fail a run."
import logging
import shutil
import signal

import numpy as np
import pandas as pd
import pytest
import torch

from engine_run import run_python, tiny_config
from rsir_nb.config import load_run_config
from rsir_nb.core import BusyError, CorruptError, InputError, MissingFileError, UnknownNameError, read_json
from rsir_nb.locks import folder_lock
from rsir_nb.engine.runs import append_row, last_checkpoint, make_wandb, trim_rows
from rsir_nb.engine.parts import TrainerConfig, build_archive, build_method, load_method, split_of
from rsir_nb.engine.train import pretrain, read_history
from rsir_nb.methods.optim import lr_factor, make_optim

STEPS = 4   # in an epoch: 16 training patches in batches of 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run that nobody disturbed."
    cfg = tiny_config(tmp_path_factory.mktemp("whole")/"run", "trainer.pictures=1")
    return pretrain(cfg, progress=False)


def test_what_a_run_leaves(whole):
    history = read_history(whole)
    assert history["step"].tolist() == list(range(1, 3*STEPS + 1))
    assert history["epoch"].tolist() == sorted([0, 1, 2]*STEPS)
    assert {"lr", "loss", "umr_s1", "cmr_s2_from_s1", "mim"} <= set(history.columns)
    assert history["loss"].iloc[-STEPS:].mean() < history["loss"].iloc[:STEPS].mean()
    assert sorted(o.name for o in (whole/"pictures").iterdir()) == [f"epoch_{i:03}.png" for i in range(3)]
    assert sorted(o.name for o in (whole/"checkpoints").iterdir()) == ["epoch_0002.ckpt", "epoch_0002.json"]
    assert load_run_config(whole).method.embed_dim == 16
    assert read_json(whole/"versions.json")["torch"] == torch.__version__
    assert not list(whole.rglob("*.part"))


def test_learning_rate_follows_the_closed_form(whole):
    history = read_history(whole)
    optim = make_optim(dict(warmup_epochs=1, epochs=3))
    wanted = [1e-3*lr_factor(i, 3*STEPS, 3, optim) for i in range(1, 3*STEPS + 1)]
    assert np.allclose(history["lr"], wanted)   # logged after the step that used the one before


@pytest.mark.parametrize("at", [16 + 7, 2*16 + 13])
def test_killed_run_goes_on_to_the_same_curve(tmp_path, whole, at):
    code = f"from engine_run import *; from rsir_nb.engine.train import pretrain; " \
           f"pretrain(tiny_config({str(tmp_path/'run')!r}), progress=False)"
    assert run_python(code, RSIR_TEST_KILL_AT=at + 1) == -signal.SIGKILL   # the first read finds the patches' size
    killed = read_history(tmp_path/"run")
    assert STEPS <= len(killed) < 3*STEPS and not (tmp_path/"run"/"method").exists()
    with open(tmp_path/"run"/"metrics.csv", "a") as f: f.write("99,2,0.")   # a line that the kill cut in two
    pretrain(tiny_config(tmp_path/"run"), progress=False)
    pd.testing.assert_frame_equal(read_history(tmp_path/"run"), read_history(whole), check_exact=True)
    assert load_method(tmp_path/"run").weights_hash == load_method(whole).weights_hash


def test_finished_run_returns_at_once_and_says_so(whole, caplog):
    before = (whole/"metrics.csv").stat().st_mtime_ns
    with caplog.at_level(logging.INFO): pretrain(tiny_config(whole, "trainer.pictures=1"), progress=False)
    assert "is done" in caplog.text
    assert (whole/"metrics.csv").stat().st_mtime_ns == before


def test_other_settings_are_refused_and_named(whole):
    with pytest.raises(InputError, match="optim.lr=0.001.*optim.lr=0.5"): pretrain(tiny_config(whole, "optim.lr=0.5"))
    pretrain(tiny_config(whole, "trainer.num_workers=2", "trainer.wandb=offline"))   # these change nothing


def test_killed_before_its_last_word(tmp_path):
    run = pretrain(tiny_config(tmp_path/"run"), progress=False)
    weights = load_method(run).weights_hash
    (run/"finished.json").unlink()
    shutil.rmtree(run/"method")
    before = read_history(run)
    pretrain(tiny_config(run), progress=False)
    assert load_method(run).weights_hash == weights and read_history(run).equals(before)


def test_starting_over(tmp_path):
    pretrain(tiny_config(tmp_path/"run", "optim.epochs=1"), progress=False)
    pretrain(tiny_config(tmp_path/"run", "optim.epochs=2"), resume=False, progress=False)
    assert len(read_history(tmp_path/"run")) == 2*STEPS


def test_two_writers(tmp_path):
    with folder_lock(tmp_path/"run"), pytest.raises(BusyError, match="process"):
        pretrain(tiny_config(tmp_path/"run"), progress=False)


def stopped_run(folder, monkeypatch):
    "A run that ended with an error in its second epoch."
    import tiny_plugin
    monkeypatch.setenv("RSIR_TEST_FAIL_AT", str(tiny_plugin.reads + 1 + 16 + 7))
    with pytest.raises(RuntimeError, match="stopped"): pretrain(tiny_config(folder), progress=False)
    monkeypatch.delenv("RSIR_TEST_FAIL_AT")
    return last_checkpoint(folder/"checkpoints")


def test_damaged_checkpoint_is_named(tmp_path, monkeypatch):
    tiny_config(tmp_path/"run")
    path = stopped_run(tmp_path/"run", monkeypatch)
    raw = bytearray(path.read_bytes())
    raw[len(raw)//3] ^= 16
    path.write_bytes(raw)
    with pytest.raises(CorruptError, match="epoch_0000.ckpt is damaged"): pretrain(tiny_config(tmp_path/"run"), progress=False)


def test_checkpoints_hold_no_code(tmp_path, monkeypatch):
    path = stopped_run(tmp_path/"run", monkeypatch)
    state = torch.load(path, weights_only=True)
    assert state["epoch"] == 0 and state["global_step"] == STEPS and "hyper_parameters" not in state


def test_the_run_ends_with_its_best_epoch(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        run = pretrain(tiny_config(tmp_path/"run", "trainer.val_split=val", "optim.lr=1", "optim.epochs=4",
                                   "optim.schedule=constant", "optim.warmup_epochs=2"), progress=False)
    val = read_history(run)["val/loss"]
    assert val.notna().tolist() == ([False]*(STEPS - 1) + [True])*4
    best = int(np.argmin(val.dropna()))
    assert best < 3, "the learning rate is so high that the last epoch should not be the best"
    assert {o.stem for o in (run/"checkpoints").iterdir()} == {f"epoch_{i:04}" for i in {best, 3}}
    told = read_json(run/"finished.json")
    assert (told["best_epoch"], told["monitor"]) == (best, "val/loss") and told["value"] == pytest.approx(val.min())
    assert f"those of epoch {best + 1} of 4" in caplog.text
    kept = torch.load(run/"checkpoints"/f"epoch_{best:04}.ckpt", weights_only=True)["state_dict"]
    last = torch.load(run/"checkpoints"/"epoch_0003.ckpt", weights_only=True)["state_dict"]
    saved = load_method(run).state_dict()
    assert all(torch.equal(kept[f"method.{k}"], v) for k, v in saved.items())
    assert not all(torch.equal(last[f"method.{k}"], v) for k, v in saved.items())


def test_accumulation_and_bfloat16(tmp_path, whole):
    run = pretrain(tiny_config(tmp_path/"run", "trainer.precision=bf16-mixed", "trainer.accumulate=2", "trainer.log_every=2",
                               "trainer.clip=1.0"), progress=False)
    history = read_history(run)
    assert history["step"].tolist() == [2, 4, 6]
    assert np.allclose(history["loss"].iloc[0], read_history(whole)["loss"].iloc[3], rtol=0.05)


def test_fitted_and_unsplit(tmp_path, caplog):
    cfg = tiny_config(tmp_path/"run", "method=band_statistics")
    assert type(load_method(pretrain(cfg, progress=False))).__name__ == "BandStatistics"
    archive = build_archive(cfg.data)
    with pytest.raises(UnknownNameError, match="train"): split_of(archive, "trian")
    archive.table["split"] = None
    with caplog.at_level(logging.INFO): assert len(split_of(archive, "train")) == len(archive)
    assert "no splits" in caplog.text


def test_method_is_built_from_the_archive(tmp_path):
    cfg = tiny_config(tmp_path/"run", "data.img_size=45")
    archive = build_archive(cfg.data)
    method = build_method(cfg, archive)
    assert method.img_size == 45 and list(method.sensors) == ["s1", "s2"] and method.optim.epochs == 3
    with pytest.raises(InputError, match="archive is empty"): build_method(cfg, archive.subset([]))
    with pytest.raises(MissingFileError, match="name the folder of a run"): load_method(tmp_path)
    with pytest.raises(InputError, match="bf16-mixed"): TrainerConfig(precision="float8")


def test_rows(tmp_path):
    path = tmp_path/"metrics.csv"
    for i in range(1, 6): append_row(path, dict(step=i, loss=i/10))
    append_row(path, {"step": 6, "loss": 0.1, "val/loss": 0.2})
    trim_rows(path, 4)
    append_row(path, dict(step=5, loss=0.7))
    rows = pd.read_csv(path)
    assert rows["step"].tolist() == [1, 2, 3, 4, 5] and rows["loss"].iloc[-1] == 0.7


def test_wandb_cannot_fail_a_run(tmp_path, monkeypatch, caplog):
    import wandb
    def broken(*args, **kwargs): raise OSError("no network")
    monkeypatch.setattr(wandb, "init", broken)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with caplog.at_level(logging.INFO): assert make_wandb("online", tmp_path) == []
    assert "metrics.csv has the curves" in caplog.text and len(caplog.records) <= 3
    run = pretrain(tiny_config(tmp_path/"run", "trainer.wandb=offline", "optim.epochs=1"), progress=False)
    assert len(read_history(run)) == STEPS


@pytest.mark.slow
def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    run = pretrain(tiny_config(tmp_path/"run", "trainer.wandb=online", "optim.epochs=1"), progress=False)
    assert list((run/"wandb").glob("offline-run-*"))


@pytest.mark.slow
def test_two_processes(tmp_path, whole):
    code = f"""
from engine_run import *
from rsir_nb.engine.train import pretrain
if __name__ == '__main__':
    pretrain(tiny_config({str(tmp_path/'run')!r}, 'trainer.devices=2', 'trainer.accelerator=cpu', 'trainer.strategy=ddp_fork',
                         'trainer.batch_size=2'), progress=False)
"""
    assert run_python(code) == 0
    history = read_history(tmp_path/"run")
    assert history["step"].tolist() == list(range(1, 3*STEPS + 1)) and (tmp_path/"run"/"method").is_dir()


def test_a_probe_stands_on_a_run_whose_embeddings_are_computed_once(tmp_path, whole):
    import tiny_plugin
    cfg = lambda: tiny_config(tmp_path/"probe", "method=probe", f"method.backbone={whole}", "method.embed_dim=8", "trainer.val_split=val")
    pretrain(cfg(), progress=False)
    before, first = tiny_plugin.reads, load_method(tmp_path/"probe")
    shutil.rmtree(tmp_path/"probe"/"method")
    (tmp_path/"probe"/"finished.json").unlink()
    pretrain(cfg(), progress=False)    # the stores of embeddings are there: only the patches' size is read
    assert tiny_plugin.reads - before <= 1 and load_method(tmp_path/"probe").weights_hash == first.weights_hash
    frozen, x = load_method(whole), build_archive(cfg().data)[0]["s1"][None]
    assert torch.allclose(first.embed(x, "s1"), first.layers["s1"](frozen.embed(x, "s1")), atol=1e-6)
    assert sorted(o.name for o in (tmp_path/"probe"/"features").iterdir() if o.name[0] != ".") == ["train", "val"]
