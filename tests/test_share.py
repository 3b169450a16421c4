"Sharing a run: what the folder holds and what stays at home, the model card, the hub's mixin and wandb, all offline."
import csv
import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from engine_run import tiny_config
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from rsir_nb.cli import main
from rsir_nb.core import CorruptError, InputError, MissingFileError, UnknownNameError
from rsir_nb.engine.evaluate import evaluate
from rsir_nb.engine.hash import train_hash
from rsir_nb.engine.parts import build_archive, load_method
from rsir_nb.engine.share import SharedMethod, evaluations_of, load_shared, log_artifact, share, without_folders
from rsir_nb.engine.train import pretrain
from rsir_nb.methods.base import Method

TEXTS = ".json", ".md", ".yaml", ".csv"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A small CSMAE with heads, evaluated."
    run = pretrain(tiny_config(tmp_path_factory.mktemp("share")/"tiny_run", "evaluate.baselines=[random]", "evaluate.drawings=20"), progress=False)
    train_hash(run, progress=False)
    evaluate(run, progress=False)
    return run


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory): return share(run, tmp_path_factory.mktemp("shared")/"csmae", "apache-2.0", "A tiny CSMAE")


def x(run): return build_archive(tiny_config(run).data)[0]["s2"][None]


def test_the_folder_is_the_method(run, folder):
    method, again = load_method(run), Method.load(folder)
    assert torch.equal(again.embed(x(run), "s2"), method.embed(x(run), "s2"))
    assert torch.equal(again.hash(again.embed(x(run), "s2"), "s2"), method.hash(method.embed(x(run), "s2"), "s2"))
    assert again.weights_hash == method.weights_hash and again.heads.n_bits == 16


def test_nothing_of_the_training_is_shipped(run, folder):
    assert {o.name for o in folder.iterdir()} == {"README.md", "config.json", "method.json", "model.safetensors", "training.yaml", "scores_csmae.csv"}
    trained, shipped = load_file(run/"hash/method/training.safetensors"), load_file(folder/"model.safetensors")
    assert trained and not set(trained) & set(shipped)


def test_no_path_of_this_machine_is_in_it(run, folder):
    home = str(run.parent)
    for o in folder.iterdir():
        if o.suffix in TEXTS: assert home not in o.read_text() and not re.search(r"/(tmp|root|home|work)/", o.read_text()), o.name
    assert yaml.safe_load((folder/"training.yaml").read_text())["out"] == "tiny_run"


def test_paths_in_settings():
    given = dict(root="/data/eurosat", paths=["~/a/b.tif", "./c.tif", "s1"], n=3, name="scenes", deep=dict(weights="../w.safetensors", x=None))
    assert without_folders(given) == dict(root="eurosat", paths=["b.tif", "c.tif", "s1"], n=3, name="scenes", deep=dict(weights="w.safetensors", x=None))


def test_the_card_is_one_that_the_hub_reads(run, folder):
    card = ModelCard.load(folder/"README.md")
    data = card.data
    assert (data.license, data.library_name, data.model_name, data.datasets) == ("apache-2.0", "rsir_nb", "A tiny CSMAE", ["tiny_pairs"])
    assert {"csmae", "s1", "s2", "hashing", "remote-sensing"} <= set(data.tags)
    with open(folder/"scores_csmae.csv") as f: rows = list(csv.DictReader(f))
    found = {o.dataset_config: o.metric_value for o in data.eval_results}
    assert set(found) == {f"csmae, {a}->{b}" for a in ("s1", "s2") for b in ("s1", "s2")}
    for name, value in found.items():
        mine = [o for o in rows if o["system"] == "csmae" and o["kind"] == "binary" and o["metric"] == "map" and o["direction"] == name.split(", ")[1]]
        assert value == pytest.approx(float(max(mine, key=lambda o: int(o["k"]))["value"]), abs=1e-4)
    text = card.text
    assert "codes of 16 bits" in text and "30 pixels" in text and "| s2 | B8A | DN |" in text and "Licence: apache-2.0" in text
    assert load_method(run).weights_hash in text and "Method.load" in text


def test_without_licence_and_scores(tmp_path, caplog):
    run = pretrain(tiny_config(tmp_path/"plain", "optim.epochs=1"), progress=False)
    card = ModelCard.load(share(run, tmp_path/"out")/"README.md")
    assert card.data.license == "unknown" and card.data.eval_results is None and "may not use the weights" in card.text
    assert "no licence was named" in caplog.text and card.data.model_name == "plain"


def test_scores_of_other_weights_are_left_out(run, tmp_path, caplog):
    copy = shutil.copytree(run, tmp_path/"copy")
    assert set(evaluations_of(copy, load_method(copy).weights_hash)) == {"csmae"}
    method = load_method(copy)
    method.heads["s1"][0].weight.data += 1
    method.save(copy/"hash/method")
    assert ModelCard.load(share(copy, tmp_path/"out", "mit")/"README.md").data.eval_results is None
    assert "scores of csmae are of other weights" in caplog.text


def test_a_method_that_was_never_in_a_run(tmp_path):
    from rsir_nb.methods.baselines import BandQuantiles
    BandQuantiles(["s2"], img_size=None).save(tmp_path/"method")
    out = share(tmp_path/"method", tmp_path/"out", "cc0-1.0")
    assert {o.name for o in out.iterdir()} == {"README.md", "config.json", "method.json", "model.safetensors"}
    assert "any number of pixels" in (out/"README.md").read_text()


def test_what_is_refused(run, folder, tmp_path):
    (tmp_path/"mine.txt").write_text("precious")
    with pytest.raises(InputError, match="holds other things"): share(run, tmp_path)
    with pytest.raises(MissingFileError, match="no trained method"): share(tmp_path/"nothing", tmp_path/"out")
    assert share(run, shutil.copytree(folder, tmp_path/"again"), "mit").is_dir()     # one that was shared before is replaced
    damaged = shutil.copytree(folder, tmp_path/"damaged")
    told = json.loads((damaged/"method.json").read_text())
    (damaged/"method.json").write_text(json.dumps({**told, "weights_hash": "0"*16}))
    with pytest.raises(CorruptError, match="was changed after it was written"): load_shared(damaged)


# the hub ------------------------------------------------------------------------------------------

def test_the_mixin_loads_and_saves_folders(run, folder, tmp_path):
    shared = SharedMethod.from_pretrained(str(folder))
    shared.save_pretrained(tmp_path/"copy")
    assert {o.name: o.read_bytes() for o in folder.iterdir()} == {o.name: o.read_bytes() for o in (tmp_path/"copy").iterdir()}
    assert torch.equal(load_shared(tmp_path/"copy").embed(x(run), "s2"), shared.method.embed(x(run), "s2"))


def test_a_repository_in_the_cache_of_the_hub(folder, tmp_path, monkeypatch):
    home = tmp_path/"hub/models--me--csmae"
    (home/"refs").mkdir(parents=True)
    (home/"refs/main").write_text("abc")
    shutil.copytree(folder, home/"snapshots/abc")
    found = load_shared("me/csmae", cache_dir=tmp_path/"hub", local_files_only=True)
    assert found.weights_hash == Method.load(folder).weights_hash
    with pytest.raises(MissingFileError, match="no shared method me/other"): load_shared("me/other", cache_dir=tmp_path/"hub", local_files_only=True)


def test_what_is_pushed_is_the_folder(folder, monkeypatch):
    pushed = {}
    def upload(self, *, repo_id, folder_path, **_):
        pushed.update({o.name: o.read_bytes() for o in Path(folder_path).iterdir()}, repo=repo_id)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **_: huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}"))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    SharedMethod(folder).push_to_hub("me/csmae")
    assert pushed.pop("repo") == "me/csmae" and pushed == {o.name: o.read_bytes() for o in folder.iterdir()}


# wandb --------------------------------------------------------------------------------------------

def test_an_artifact_waits_offline(folder, tmp_path, capfd):
    assert log_artifact(folder, "tiny", home=tmp_path) == "tiny"
    runs = list((tmp_path/"wandb").glob("offline-run-*"))
    assert len(runs) == 1
    kept = next(runs[0].glob("*.wandb")).read_bytes()
    for name in (b"model.safetensors", b"method.json", b"README.md", b"tiny"): assert name in kept
    with pytest.raises(UnknownNameError, match="did you mean offline"): log_artifact(folder, mode="ofline")
    with pytest.raises(MissingFileError, match="rsir share"): log_artifact(tmp_path)


# the command --------------------------------------------------------------------------------------

def test_the_command(run, tmp_path, capsys):
    assert main(["share", str(run), str(tmp_path/"out"), "--licence", "mit", "--title", "Tiny", "--wandb", "offline"]) == 0
    said = capsys.readouterr().out
    assert "README.md" in said and "wandb artifact: out" in said
    assert ModelCard.load(tmp_path/"out/README.md").data.license == "mit"
    assert main(["share", str(tmp_path/"nothing"), str(tmp_path/"x")]) == 2
    assert "no trained method" in capsys.readouterr().err
