"What packages that are installed beside this one add to it: verbs, datasets and kinds of index, by entry points."
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rsir_nb.cli import main
from rsir_nb.core import DATASETS, INDEXES, UnknownNameError
from rsir_nb.plugins import installed, load_installed

VERBS = '''
import typer
from rsir_nb.core import InputError
from rsir_nb.options import Filters

def count(words:list[str], filters:Filters={}):
    "Count words."
    if words == ["none"]: raise InputError("there is nothing to count")
    print(len(words), filters)

lab = typer.Typer(help="Verbs of a laboratory.")

@lab.command()
def hello(name:str): print("hello", name)

@lab.command()
def bye(name:str): print("bye", name)

def query(): print("not this one")
'''
PARTS = '''
from rsir_nb.core import DATASETS
from rsir_nb.data.base import TensorArchive

@DATASETS.register("lab_zeros")
def zeros(n:int=3):
    "Nothing, seen n times."
    import torch
    return TensorArchive(dict(rgb=torch.zeros(n, 3, 8, 8)))
'''
POINTS = '''
[rsir_nb.verbs]
count = lab_verbs:count
lab = lab_verbs:lab
query = lab_verbs:query
lost = lab_nowhere:verb

[rsir_nb.plugins]
engine = toy_server
lab = lab_parts
lost = lab_nowhere
'''


def install(folder, points=POINTS, **modules):
    "The files that pip would write for a package."
    about = folder/"lab-1.0.dist-info"
    about.mkdir(parents=True)
    (about/"METADATA").write_text("Metadata-Version: 2.1\nName: lab\nVersion: 1.0\n")
    (about/"entry_points.txt").write_text(points)
    for name, text in modules.items(): (folder/f"{name}.py").write_text(text)
    return folder


@pytest.fixture
def lab(tmp_path, monkeypatch):
    "A package that is installed for the time of one test."
    monkeypatch.syspath_prepend(install(tmp_path/"site", lab_verbs=VERBS, lab_parts=PARTS))
    load_installed.cache_clear()
    yield tmp_path
    load_installed.cache_clear()
    for o in "lab_verbs", "lab_parts", "toy_server": sys.modules.pop(o, None)
    for o in DATASETS, INDEXES:
        for name in "lab_zeros", "toy_server": o.entries.pop(name, None), o.meta.pop(name, None)


def test_verbs_are_found(lab, capsys):
    assert main(["count", "a", "b", "--label", "lake"]) == 0
    assert main(["lab", "hello", "you"]) == 0
    assert capsys.readouterr().out == "2 {'label': 'lake'}\nhello you\n"
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(o in text for o in ("Count words", "Verbs of a laboratory", "Cannot be loaded", "Search satellite archives"))


def test_mistakes_in_them_are_one_line(lab, capsys):
    for line, told in (("count none", "nothing to count"), ("coumt a", "Did you mean 'count'"), ("lab helo x", "hello"),
                       ("count a --lable lake", "--label"), ("lost in space --at night", "package lab cannot be loaded")):
        assert main(line.split()) == 2
        err = capsys.readouterr().err
        assert told in err and err.count("\n") == 1, err


def test_our_own_verbs_stay_ours(lab, capsys):
    assert main(["query", "--help"]) == 0
    assert "not this one" not in capsys.readouterr().out and "lab_verbs" not in sys.modules, "nothing was loaded for it"


def test_parts_are_found_by_configs(lab, capsys, caplog):
    with caplog.at_level(logging.WARNING): assert main(["pretrain", "baseline", "data=lab_zeros", "data.n=4", "--dry-run"]) == 0
    assert "name: lab_zeros" in capsys.readouterr().out
    assert "lab_nowhere" in caplog.text and "package lab" in caplog.text
    assert main(["list", "datasets"]) == 0
    assert "Nothing, seen n times" in capsys.readouterr().out


def test_an_engine_with_an_address_of_its_own(lab, capsys):
    from rsir_nb.engine.retriever import IndexConfig
    from rsir_nb.remote.engines import open_index
    codes = np.arange(40, dtype=np.uint8).reshape(20, 2)
    open_index("toy://a", n_bits=16).add(codes)
    assert open_index("toy://a").search(codes[3:4], 1)[1].tolist() == [[3]] and IndexConfig("toy://b").engine == "toy://b"
    with pytest.raises(UnknownNameError, match="did you mean toy"): IndexConfig("tox://b")
    assert main(["list", "indexes"]) == 0 and "schemes: toy" in capsys.readouterr().out
    assert main(["codes", "info", "toy://a"]) == 0 and "items: 20" in capsys.readouterr().out


def test_without_the_package_its_addresses_are_unknown(capsys):
    assert main(["codes", "info", "toy://a"]) == 2
    assert "no address of an index is called 'toy:'" in capsys.readouterr().err


def test_where_there_is_none_nothing_is_loaded(tmp_path):
    "The metadata of packages are not parsed for people without plugins, and a verb of ours never looks for any."
    code = ("import sys; from rsir_nb.cli import main; main({}); "
            "print('LOADED', [o for o in ('importlib.metadata', 'lab_verbs') if o in sys.modules])")
    def loaded(args, *folders):
        env = dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, [Path(__file__).parent.parent, *folders])))
        ran = subprocess.run([sys.executable, "-c", code.format(args)], check=True, capture_output=True, text=True, env=env)
        return eval(ran.stdout.rsplit("LOADED", 1)[1])
    site = install(tmp_path/"site", lab_verbs=VERBS)
    assert loaded(["--help"]) == []
    assert "lab_verbs" not in loaded(["list", "--help"], site)
    assert loaded(["--help"], site) == ["importlib.metadata", "lab_verbs"]


def test_metadata_that_cannot_be_read_for_us(tmp_path, monkeypatch):
    install(tmp_path/"other", points="[console_scripts]\nlab = lab_verbs:count\n")
    (tmp_path/"archive.zip").write_bytes(b"PK\5\6" + bytes(18))
    for o in ("other", "archive.zip", "not there"): monkeypatch.syspath_prepend(tmp_path/o)
    assert installed("rsir_nb.verbs") == []
