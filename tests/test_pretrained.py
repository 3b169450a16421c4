"""The network that ships, the sample that ships, and a search that needs nothing else."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rsir_nb.cli import main
from rsir_nb.core import DATASETS, METHODS, InputError, RsirError
from rsir_nb.data.base import TensorArchive
from rsir_nb.data.samples import sample_folder
from rsir_nb.methods.base import Method
from rsir_nb.models.backbones import make_backbone
from rsir_nb.models.shipped import about_shipped, shipped_folder
from rsir_nb.sensors import Sensor

SHARED = Path(os.environ.get("RSIR_SHARED", Path(__file__).parents[2]/"shared"))/"data"


@pytest.fixture(scope="module")
def images():
    archive = DATASETS.create("eurosat_sample")
    return archive, torch.stack([archive[i]["rgb"] for i in range(0, len(archive), 10)])


@pytest.fixture(scope="module")
def method(images): return METHODS.create("pretrained", sensors=images[0].sensors).eval()


def test_what_ships_is_small_and_licensed():
    home = shipped_folder()
    assert sum(o.stat().st_size for o in home.iterdir()) < 12*2**20
    assert sum(o.stat().st_size for o in sample_folder().rglob("*") if o.is_file()) < 2.5*2**20
    assert "MIT License" in (sample_folder()/"LICENSE").read_text()
    card = (home/"README.md").read_text()
    assert "Apache-2.0" in card and {"adapt.yaml", "log.csv", "model.json"} <= {o.name for o in home.iterdir()}
    for row in about_shipped()["scores"]["test"].values(): # the card tells the numbers of the file
        assert all(f"{v:.3f}".lstrip("0") in card for v in row)


def test_an_image_is_the_same_in_every_batch(method, images):
    x = images[1]
    z = method.embed(x, "rgb")
    assert torch.equal(z[5:6], method.embed(x[5:6], "rgb")) and torch.equal(z[3:20], method.embed(x[3:20], "rgb"))
    codes = method.hash(z, "rgb")
    assert codes.shape == (60, 128) and torch.equal(codes[7:8] > 0, method.hash(z[7:8], "rgb") > 0)


def test_classes_are_found_far_above_chance(method, images):
    archive, x = images
    y = torch.as_tensor(archive.targets)[::10]
    z = method.embed(x, "rgb")
    near = (z @ z.T).fill_diagonal_(-9).argmax(1)
    assert (y[near] == y).float().mean() > .75


def test_the_network_is_the_one_of_timm(images):
    net = make_backbone(dict(name="shipped", neck=False), 3, 128).eval()
    import timm
    plain = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    plain.load_state_dict(net.net.state_dict())
    x = torch.nn.functional.interpolate(images[1][:4]/255, (128, 128))
    x = (x - torch.tensor(net.mean).view(3, 1, 1))/torch.tensor(net.std).view(3, 1, 1)
    with torch.no_grad(): assert torch.allclose(net(x), plain(x), atol=1e-5)


def test_saved_and_loaded_it_is_the_same(method, images, tmp_path):
    again = Method.load(method.save(tmp_path/"m"))
    assert again.weights_hash == method.weights_hash
    assert torch.equal(again.embed(images[1][:9], "rgb"), method.embed(images[1][:9], "rgb"))


def test_a_sensor_without_known_range_is_fitted():
    sensor = Sensor("x", ("a", "b", "c", "d"), "reflectance")
    x = torch.rand(20, 4, 40, 40, generator=torch.Generator().manual_seed(0))*.4
    archive = TensorArchive(dict(x=x), dict(x=sensor))
    made = METHODS.create("pretrained", sensors=archive.sensors).fit(archive)
    low, high = (getattr(made, f"{o}_x") for o in ("low", "high"))
    flat = x[:, :3].transpose(0, 1).flatten(1)
    assert torch.allclose(low, flat.quantile(.02, dim=1), atol=.01)
    assert torch.allclose(high, flat.quantile(.98, dim=1), atol=.01)
    again = METHODS.create("pretrained", sensors=archive.sensors)
    with pytest.raises(InputError, match="fit"): again.embed(x, "x")
    z = made.embed(x, "x")
    assert z.shape == (20, 256 + 36) and torch.allclose(z.norm(dim=1), torch.ones(20), atol=1e-5)


def test_every_size_of_image_has_an_embedding(method):
    for side in 1, 2, 17, 500:
        assert torch.isfinite(method.embed(torch.full((1, 3, side, side), 99.), "rgb")).all()


@pytest.mark.parametrize("change, said", [
    (dict(bits=48), "64 or 128"), (dict(size=8), "32 or more"), (dict(statistics=2), "below 1"),
    (dict(norm="ben_v2"), "composite"),
    (dict(composite=dict(rgb=dict(bands=["R", "G", "X"]))), "band"), (dict(weights="satelite"), "satellite")])
def test_what_cannot_be_built_says_so(change, said):
    with pytest.raises(RsirError, match=re.escape(said)):
        METHODS.create("pretrained", sensors=dict(rgb="rgb"), **change)


def test_from_a_folder_to_hits_by_the_command_line(tmp_path, capsys):
    some = tmp_path/"pictures"
    for folder in sorted(sample_folder().iterdir())[:4]:
        if not folder.is_dir(): continue
        (some/folder.name).mkdir(parents=True)
        for o in sorted(folder.iterdir())[:5]: (some/folder.name/o.name).write_bytes(o.read_bytes())
    run = str(tmp_path/"run")
    assert main(["index", "pretrained", "data=class_folders", f"data.root={some}", f"out={run}"]) == 0
    asked = next((some/"Forest").iterdir())
    assert main(["query", run, str(asked), "--k", "3", "--html", str(tmp_path/"hits.html")]) == 0
    assert f"Forest/{asked.stem}" in capsys.readouterr().out and (tmp_path/"hits.html").is_file()
    grey = tmp_path/"grey.tif"
    Image.fromarray(np.zeros((64, 64), np.float32)).save(grey)
    assert main(["query", run, str(grey)]) == 2


@pytest.mark.skipif(not (SHARED/"scenes").is_dir(), reason="no ../shared/data/scenes beside the repository")
def test_scenes_need_no_training(tmp_path, capsys):
    scene = next((SHARED/"scenes").glob("*klang*"))
    run = str(tmp_path/"run")
    assert main(["index", "pretrained", "data=scenes", f"data.paths={scene}", f"out={run}"]) == 0
    first = json.loads((Path(run)/"method/method.json").read_text())
    assert first["arguments"]["bits"] == 128 and "patches can be searched" in capsys.readouterr().out


def test_the_real_demo_is_made_and_known_to_be_done(tmp_path):
    call = [sys.executable, "-m", "rsir_nb", "demo", "--real", f"out={tmp_path/'real'}", "evaluate.drawings=20"]
    call = [sys.executable, "-c", f"import sys; from rsir_nb.cli import main; sys.exit(main({call[3:]!r}))"]
    first = subprocess.run(call, capture_output=True, text=True)
    assert first.returncode == 0 and "4/4 write the report" in first.stderr + first.stdout, first.stderr[-2000:]
    page = (tmp_path/"real"/"report.html").read_text()
    assert "pretrained" in page and "band_statistics" in page
    again = subprocess.run(call, capture_output=True, text=True)
    assert again.returncode == 0 and "the demo is done" in again.stderr + again.stdout
