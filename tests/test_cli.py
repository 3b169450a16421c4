"""The command line: what it prints, and that a user's mistake is one message and status 2, never a traceback."""
import subprocess
import sys

import pytest
from rsir_nb.cli import main
from rsir_nb.core import RsirError

SMALL = ["data.n_places=3", "data.patches_per_place=2", "data.img_size=30"]


@pytest.mark.parametrize("line, said", [
    ("pretrain dmeo", "demo"),
    ("pretrain demo method.mask_ration=0.5", "mask_ratio"),
    ("pretrain demo optim.epochs=many", "optim.epochs"),
    ("pretrain demo nonsense", "key=value"),
    ("pretrain demo optim.epochs=-3", "epochs -3"),
    ("pretrain demo optim.lr=-1", "lr above 0"),
    ("pretrain demo method.num_heads=0 data.n_places=3 data.patches_per_place=1 data.img_size=30", "num_heads"),
    ("pretrain demo trainer.batch_size=0", "trainer.batch_size"),
    ("list metods", "methods"),
    ("data convert synthtic out.store", "synthetic"),
    ("data convert ben_v2_lmdb out.store data.path=nowhere data.metadata=nowhere.parquet", "nowhere"),
    ("data info nowhere.store", "nowhere.store"),
    ("hash nowhere", "nowhere"),
    ("encode nowhere", "nowhere"),
    ("evaluate nowhere", "nowhere"),
    ("query nowhere some_patch", "nowhere"),
    ("report nowhere", "nowhere"),
    ("gallery nowhere", "nowhere"),
    ("search", "search"),
])
def test_a_mistake_is_one_message(line, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


def test_debug_shows_the_error():
    with pytest.raises(RsirError): main(["--debug", "pretrain", "dmeo"])


def test_convert_goes_on_and_verifies(tmp_path, capsys):
    store = str(tmp_path / "small.store")
    call = ["data", "convert", "synthetic", store, *SMALL, "--size", "30"]
    assert main(call) == 0 and "6 patches written" in capsys.readouterr().out
    assert main(call) == 0 and "6 were there" in capsys.readouterr().out
    assert main(["data", "verify", store]) == 0
    assert main(["data", "info", store]) == 0 and "s1" in capsys.readouterr().out


def test_dry_run_prints_the_resolved_config(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", "demo", "hash.n_bits=32", "--dry-run"]) == 0
    assert "n_bits: 32" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_folder_of_images_to_hits(tmp_path, capsys):
    "The README's shortest way: scenes, no training, a query by file, hits for a map."
    from rsir_nb.data.synthetic import write_scene
    scene = write_scene(tmp_path / "scenes" / "a.tif", size=480)
    run = str(tmp_path / "run")
    assert main(["index", "baseline", "data=scenes", f"data.paths={scene.parent}", f"out={run}"]) == 0
    capsys.readouterr()
    hits, page = tmp_path / "hits.geojson", tmp_path / "hits.html"
    asked = ["query", run, "a_0_120", "--k", "3", "--geojson", str(hits), "--html", str(page)]
    from rsir_nb.engine.search import Retriever
    asked[2] = Retriever.load(f"{run}/search").store.ids[1]
    assert main(asked) == 0
    assert hits.read_text().count('"Polygon"') == 3 and page.read_text().count("<img") >= 4
    assert main(["gallery", run, "--n", "2", "--k", "3"]) == 0
    page = (tmp_path / "run" / "gallery.html").read_text()
    assert page.count("<img") == page.count(' alt="') == 2 * 4
    assert main(["gallery", run, asked[2], "--k", "2", "--html", str(tmp_path / "one.html")]) == 0
    assert asked[2] in (tmp_path / "one.html").read_text()
    assert main(["gallery", run, "--source", "s9"]) == 2


def test_the_installed_command_runs():
    out = subprocess.run([sys.executable, "-c", "import sys; from rsir_nb.cli import main; sys.exit(main(['--help']))"],
                         capture_output=True, text=True, timeout=120)
    assert out.returncode == 0 and "query" in out.stdout
