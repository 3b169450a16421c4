"""The command line: what it prints, and that a user's mistake is one message and status 2, never a traceback."""
import logging
import re
import subprocess
import sys

import pytest
from rsir_nb.cli import KINDS, MORE, main
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
    ("pretrain demo trainer.accelerator=tpu data.n_places=3 data.patches_per_place=1", "this machine cannot train so"),
    ("pretrain demo trainer.devices=9999 trainer.accelerator=cpu data.n_places=3 data.patches_per_place=1", "at most"),
    ("list metods", "methods"),
    ("list sampler", "samplers"),
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


def test_list_shows_every_kind_that_a_config_can_name():
    "The kinds are those of the source; the hash heads alone are chosen by the methods. In a process of its own."
    from rsir_nb.core import registered_parts
    parts = registered_parts()
    assert set(KINDS.values()) == {*parts} - {"hash head"}
    code = ("from rsir_nb.cli import main, KINDS\nassert main(['list']) == 0\n"
            "for kind in KINDS: print('\\f'); assert main(['list', kind]) == 0")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    shown, *pages = run.stdout.split("\f\n")
    assert len(pages) == len(KINDS)
    for kind, out in zip(KINDS, pages, strict=True):
        names = re.findall(r"^  (\w+) +\S", out.replace("  and any name", "and any name"), re.M)
        assert out.startswith(f"{kind}:") and names == sorted(parts[KINDS[kind]]), kind
        assert all(f"\n  {o} " in shown for o in names)


@pytest.mark.parametrize("kind, line", [
    ("samplers", "clusters               Batches from one cluster each."), ("metrics", "source: M3: CV4RS, as mAP@k"),
    ("distances", "chi2"), ("optimisers", "and any name of timm's factory, e.g. lamb, lion or adopt"),
    ("schedules", "one_cycle"), ("miners", "paper: https://arxiv.org/abs/1503.03832"), ("augmentations", "rotate90"),
])
def test_list_of_one_kind(kind, line, capsys):
    assert main(["list", kind]) == 0
    assert line in capsys.readouterr().out


def test_the_optimisers_that_the_list_names_are_known():
    from rsir_nb.methods.optim import make_optim
    for name in re.findall(r"\b(?:lamb|lion|adopt)\b", MORE["optimisers"]): assert make_optim({"optimizer": name}).optimizer == name
    assert len(re.findall(r"\b(?:lamb|lion|adopt)\b", MORE["optimisers"])) == 3


def test_a_part_of_this_process_is_listed(capsys):
    from rsir_nb.data.samplers import SAMPLERS
    SAMPLERS.register("of_this_test", "Nothing is drawn.")(lambda archive, batch_size, seed: [])
    try:
        assert main(["list", "samplers"]) == 0
        assert "of_this_test           Nothing is drawn." in capsys.readouterr().out
    finally:
        del SAMPLERS.entries["of_this_test"], SAMPLERS.meta["of_this_test"]


def test_debug_shows_the_error():
    with pytest.raises(RsirError): main(["--debug", "pretrain", "dmeo"])


def test_convert_goes_on_and_verifies(tmp_path, capsys):
    store = str(tmp_path / "small.store")
    call = ["data", "convert", "synthetic", store, *SMALL, "--size", "30"]
    assert main(call) == 0 and "6 patches written" in capsys.readouterr().out
    assert main(call) == 0 and "6 were there" in capsys.readouterr().out
    assert main([*call, "data.seed=3"]) == 2 and "another archive" in capsys.readouterr().err
    assert main([o.replace("n_places=3", "n_places=4") for o in call]) == 0     # the same world, one place more
    assert main(["data", "verify", store]) == 0
    assert main(["data", "info", store]) == 0 and "s1" in capsys.readouterr().out


def test_dry_run_prints_the_resolved_config(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", "demo", "hash.n_bits=32", "--dry-run"]) == 0
    assert "n_bits: 32" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_folder_of_images_to_hits(tmp_path, capsys):
    "The shortest way of the page Command line: scenes, no training, a query by file, hits for a map."
    from rsir_nb.simulate.synthetic import write_scene
    scene = write_scene(tmp_path / "scenes" / "a.tif", size=480)
    run = str(tmp_path / "run")
    assert main(["index", "baseline", "data=scenes", f"data.paths={scene.parent}", f"out={run}"]) == 0
    capsys.readouterr()
    hits, page = tmp_path / "hits.geojson", tmp_path / "hits.html"
    asked = ["query", run, "a_0_120", "--k", "3", "--geojson", str(hits), "--html", str(page)]
    from rsir_nb.engine.retriever import Retriever
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


@pytest.mark.parametrize("line, said", [
    ("pretrain demo optim.epochs=-3 --dry-run", "epochs -3"),
    ("pretrain demo hash.n_bits=0 --dry-run", "multiple of 8"),
    ("pretrain demo encode.batch_size=0 --dry-run", "batch_size 0"),
    ("pretrain demo evaluate.protocol=nope --dry-run", "protocol"),
    ("pretrain demo trainer.precision=8 --dry-run", "trainer.precision"),
    ("pretrain demo data.split=[1] data.n_places=4", "add up to 1"),
    ("pretrain demo data.split=[.5,.5,.5] data.n_places=4", "add up to 1"),
    ("index baseline data=scenes data.paths=off", "off is not there"),
    ("index baseline data=scenes data.paths=5", "5 is not there"),
    ("index runs/dmeo", "no run's folder"),
    ("pretrain demo optim.betas=[1,2] --dry-run", "betas"),
    ("pretrain demo optim.betas=[0.9] --dry-run", "betas"),
    ("pretrain demo trainer.num_workers=-1 --dry-run", "num_workers"),
    ("pretrain demo trainer.clip=-1 --dry-run", "trainer.clip"),
    ("pretrain demo data.sensors=[] data.n_places=3", "archive is empty"),
    ("pretrain demo method.patch_size=0 data.n_places=3 data.patches_per_place=1", "a token needs pixels"),
    ("pretrain demo method.mask_ratio=0 data.n_places=3 data.patches_per_place=1", "mask_ratio"),
    ("pretrain vessels data.root=nowhere", "nowhere"),
    ("pretrain demo evaluate.metrics=map --dry-run", "wanted list"),
    ("pretrain demo hash.noise=-1 --dry-run", "noise -1"),
    ("pretrain demo data.nuisance=-1 data.n_places=3", "nuisance"),
    ("pretrain demo method.specific_depth=-1 data.n_places=3 data.patches_per_place=1", "needs blocks"),
    ("bench methods bench/duch --out b data.n_places=3", "name bench/cmmae before it"),
    ("data table nowhere", "nowhere"),
])
def test_what_cannot_be_is_told_before_anything_is_made(line, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err and not list(tmp_path.rglob("config.yaml"))


def test_an_error_of_ours_is_one_line_too(capsys, monkeypatch):
    monkeypatch.setattr("rsir_nb.config.list_configs", lambda: 1/0)
    assert main(["list"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError): main(["list", "--debug"])


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    "A run of the method that needs no training, indexed."
    from engine_run import HERE
    sys.path.insert(0, str(HERE))
    run = tmp_path_factory.mktemp("cli") / "run"
    line = f"index baseline plugins=[tiny_plugin] data=tiny_pairs method=band_cca hash.n_bits=16 hash.min_steps=20 out={run}"
    assert main(line.split()) == 0
    return run


def test_index_hash_index(tiny_run, capsys, caplog):
    "Heads trained after indexing: the old index still answers and says so, the next one is made of codes."
    ask = ["query", str(tiny_run), "tiny_003", "-k", "3"]
    assert main(ask) == 0 and "s1 to s1" in capsys.readouterr().out
    assert main(["hash", str(tiny_run)]) == 0
    capsys.readouterr()
    with caplog.at_level(logging.WARNING): assert main(ask) == 0
    assert "s1 to s1" in capsys.readouterr().out and "other weights" in caplog.text and "rsir index" in caplog.text
    assert main(["index", str(tiny_run)]) == 0
    assert main(ask) == 0
    assert main(["index", str(tiny_run), "--overwrite"]) == 0
    assert main(["encode", str(tiny_run), "encode.batch_size=8"]) == 0
    capsys.readouterr()
    assert main(["encode", str(tiny_run), "hash.n_bits=8"]) == 2 and "does not concern" in capsys.readouterr().err
    (tiny_run / "search" / "index" / "s1.index").write_bytes(b"cut")
    assert main(ask) == 2 and "--overwrite" in capsys.readouterr().err
    assert main(["index", str(tiny_run), "--overwrite"]) == 0 and main(ask) == 0


def test_a_choice_of_hash_settings_is_what_is_trained(tiny_run):
    from rsir_nb.core import read_json
    line = ["hash", str(tiny_run), "hash=supervised", "hash.n_bits=8", "hash.min_steps=5", "hash.epochs=1", "--overwrite"]
    assert main([*line, "--dry-run"]) == 0 and main(line) == 0
    told = read_json(tiny_run / "hash" / "finished.json")
    assert told["supervised"] == 1 and told["contrastive"] == 0 and told["n_bits"] == 8
    assert main(["hash", str(tiny_run), "hash.device=cuda:77", "--overwrite"]) == 2


def test_labels_of_the_queries_that_were_learned_from_are_told(tiny_run, capsys):
    main(["hash", str(tiny_run), "hash=supervised", "hash.n_bits=8", "hash.min_steps=5", "hash.epochs=1", "--overwrite"])
    fair = ["report", str(tiny_run), "evaluate.drawings=20", "evaluate.baselines=[random]"]
    assert main(fair) == 0 and "Not a fair test" not in (tiny_run / "report.html").read_text()
    assert main([*fair, "--protocol", "train_test"]) == 0
    assert "labels of the queries were learned from" in (tiny_run / "report.html").read_text()


def test_what_a_query_prints(tiny_run, capsys):
    main(["index", str(tiny_run)])
    capsys.readouterr()
    assert main(["query", str(tiny_run), "tiny_003", "--target", "s2", "--label", "lake"]) == 0
    out = capsys.readouterr().out
    assert "s1 to s2" in out and "lake" in out and "b'" not in out and max(map(len, out.splitlines())) < 110
    assert main(["query", str(tiny_run), "tiny_003", "--where", "place == 'nowhere'"]) == 0
    assert "nothing found" in capsys.readouterr().out
    assert main(["query", str(tiny_run), "tiny_003", "--label", "lakes"]) == 2
    assert "did you mean lake" in capsys.readouterr().err
    assert main(["data", "table", str(tiny_run), "--label", "lake", "-n", "2"]) == 0
    out = capsys.readouterr().out
    assert "tiny_" in out and "in all" in out


def test_a_failed_first_try_does_not_block_the_second(tmp_path, capsys, monkeypatch):
    from rsir_nb.simulate.synthetic import write_scene
    monkeypatch.chdir(tmp_path)
    write_scene("scenes/a.tif", size=240)
    line = "index baseline data=scenes data.paths={} out=run"
    assert main(line.format("scnes").split()) == 2
    assert main(line.format("scenes").split()) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["gallery", "../run", "-n", "1", "-k", "1"]) == 0                     # its data is still found
    assert main(["query", "../run", "../scenes/a.tif"]) == 2                         # another extent than a patch
    assert "wanted 120x120 pixels" in capsys.readouterr().err
    assert main(["query", "../run", "../scenes/a.tif", "--fit", "centre"]) == 0
    assert main(["query", "../run", "../scenes/a.tif", "--fit", "centre", "--scale", "1", "--offset", "5"]) == 0
    assert main(["query", "../run", "../scenes/a.tif", "--scale", "log"]) == 2
    (tmp_path / "run" / "config.yaml").write_text("")
    for verb in "report", "evaluate": assert main([verb, "../run"]) == 2
    assert "config.yaml" in capsys.readouterr().err


def test_ways_to_ask(tiny_run, capsys, tmp_path):
    "Examples, radius, embeddings, boxes: the verb asks as the retriever does."
    from rsir_nb.engine.retriever import open_search
    main(["index", str(tiny_run)])
    search = open_search(tiny_run)
    def ask(line):
        capsys.readouterr()
        assert main(["query", str(tiny_run), *line.split()]) == 0
        return capsys.readouterr().out.strip()
    many = search.query_many(["tiny_003", "tiny_007", "tiny_011"], k=5)
    assert ask("tiny_003 --also tiny_007 --also tiny_011 -k 5") == many.to_text()
    nearest = search.query_many(["tiny_003", "tiny_007"], "min", target="s2", label="lake")
    assert ask("tiny_003 --also tiny_007 --combine min --target s2 --label lake") == nearest.to_text()
    assert ask("tiny_003 --rescore 3 -k 4") == search.query("tiny_003", k=4, rescore=3).to_text()
    assert ask("tiny_003 --within 3") == search.within("tiny_003", 3).to_text()
    assert ask("tiny_003 --within 3 -k 1") == search.within("tiny_003", 3, k=1).to_text()
    box = search.query("tiny_003", box=(11.1, 40, 11.2, 50)).to_text()
    assert ask("tiny_003 --box 11.1,40,11.2,50") == box and "tiny_0" in box
    assert "nothing found" in ask("tiny_003 --box -11.2,40,-11.1,50")
    assert main(["query", str(tiny_run), "tiny_003", "--also", "tiny_007", "--html", str(tmp_path/"many.html")]) == 0
    assert (tmp_path/"many.html").read_text().count("<img") == 11
    for line, said in {"--rescore 2 --within 3": "do not go together", "--also x --within 3": "do not go together",
                       "--box 1,2,3": "this is no box", "--box a,2,3,4": "this is no box", "--from 2018": "known date",
                       "--where id.to_csv('x')": "cannot be used", "--also tiny_099": "tiny_099", "--rescore 0": "rescore",
                       "--also tiny_007 --combine max": "mean", "--within 99": "no radius", "-k 0": "number of results"}.items():
        assert main(["query", str(tiny_run), "tiny_003", *line.split()]) == 2, line
        err = capsys.readouterr().err
        assert said in err and "Traceback" not in err


def test_gallery_and_table_take_the_same_filters(tiny_run, capsys, tmp_path):
    main(["index", str(tiny_run)])
    page = tmp_path/"g.html"
    assert main(["gallery", str(tiny_run), "-n", "2", "-k", "3", "--box", "11,48,11.1,48.01", "--html", str(page)]) == 0
    assert page.read_text().count("<img") == 8
    assert main(["gallery", str(tiny_run), "--box", "1,48,2,48.01"]) == 2 and "box=" in capsys.readouterr().err
    capsys.readouterr()
    assert main(["data", "table", str(tiny_run), "--box", "11,48,11.1,48.01", "--csv", str(tmp_path/"t.csv")]) == 0
    assert "tiny_010" in capsys.readouterr().out and (tmp_path/"t.csv").read_text().count("tiny_") == 11
    assert main(["data", "table", str(tiny_run), "--from", "2017", "--to", "2016"]) == 2
    assert main(["data", "table", str(tiny_run), "--box", "11,48,11.1"]) == 2


def test_converted_at_the_size_of_the_archive(tmp_path):
    from rsir_nb.data.store import PatchStore
    assert main(["data", "convert", "synthetic", str(tmp_path/"a.store"), *SMALL]) == 0
    assert PatchStore(tmp_path/"a.store")[0]["s2"].shape[-2:] == (30, 30)
    assert main(["data", "convert", "synthetic", str(tmp_path/"b.store"), *SMALL, "--size", "20"]) == 0
    assert PatchStore(tmp_path/"b.store")[0]["s2"].shape[-2:] == (20, 20)


def test_bench_shows_its_configs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "methods", "bench/cmmae", "bench/duch", "--out", "b", "optim.epochs=2", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "# cmmae" in out and "# duch" in out and out.count("epochs: 2") >= 2 and not list(tmp_path.iterdir())


def test_two_runs_compared(tiny_run, tmp_path, capsys):
    pytest.importorskip("rsir_nb.engine.compare")
    import shutil

    import pandas as pd
    main(["evaluate", str(tiny_run), "evaluate.drawings=20", "evaluate.baselines=[random]"])
    shutil.copytree(tiny_run, tmp_path/"same")
    capsys.readouterr()
    assert main(["compare", str(tiny_run), str(tmp_path/"same"), "--csv", str(tmp_path/"c.csv")]) == 0
    assert "s1->s2" in capsys.readouterr().out and (pd.read_csv(tmp_path/"c.csv")["difference"] == 0).all()
    assert main(["compare", str(tiny_run), str(tmp_path/"nowhere")]) == 2
    assert main(["compare", str(tiny_run), str(tiny_run), "--metric", "mapp"]) == 2
    assert "Traceback" not in capsys.readouterr().err
