"""Importing is free (DESIGN.md, section 4): what a light module or a verb loads, and names that need no import."""
import importlib
import subprocess
import sys

import pytest

from rsir_nb import core
from rsir_nb.all import import_pages, public_names
from rsir_nb.core import registered_parts

HEAVY = {"torch", "pytorch_lightning", "lightning_fabric", "torchmetrics", "torchvision", "timm", "wandb", "matplotlib", "pandas",
         "numba", "rasterio", "faiss", "shapely", "psycopg", "ray"}
LIGHT = ["core", "typed", "machine", "plugins", "config", "rundir", "style", "sensors", "html", "charts", "show", "geo", "retrieval.codes",
         "retrieval.index", "retrieval.local", "retrieval.substrings", "remote.engines", "retrieval.blocks", "retrieval.hamming",
         "retrieval.vectors", "retrieval.ranking", "engine.conditions", "engine.filters",
         "engine.weighted", "engine.asking", "engine.search", "engine.retriever", "options", "verbs", "verbs_codes", "verbs_pages",
         "cli", "all"]


def loaded_by(code):
    "Which heavy modules a new process has loaded after `code`."
    tail = f"\nimport sys; print('LOADED', *sorted({HEAVY!r} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code + tail], check=True, capture_output=True, text=True)
    return set(ran.stdout.rsplit("LOADED", 1)[1].split())


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_nothing_heavy(module):
    assert loaded_by(f"import rsir_nb.{module}") == set()


@pytest.mark.parametrize("args", [["--help"], ["list"], ["list", "methods"], ["list", "metrics"], ["list", "optimisers"], ["query", "--help"], ["lst"], ["query", "x", "y", "--sorce", "s1"],
                                  ["query", "no/such/run", "y"]], ids=" ".join)
def test_help_lists_and_mistypings_load_nothing_heavy(args):
    assert loaded_by(f"from rsir_nb.cli import main; main({args!r})") == set()


def test_only_the_data_module_needs_lightning():
    pages = sorted(o for o in core.package_sources() if o.startswith(("rsir_nb.data.", "rsir_nb.simulate.")) and o != "rsir_nb.data.module")
    imports = "; ".join(f"import {o}" for o in [*pages, "rsir_nb.methods.base"])
    assert len(pages) > 25 and loaded_by(imports) & {"pytorch_lightning", "lightning_fabric", "torchmetrics", "timm"} == set()


def test_the_number_of_modules_behind_the_help_is_small():
    code = "import sys; from rsir_nb.cli import main; main(['--help']); print('COUNT', sum(o.startswith('rsir_nb') for o in sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(ran.stdout.rsplit("COUNT", 1)[1]) <= 10


def test_the_source_says_what_importing_everything_registers():
    import_pages()
    modules = [o for name, o in sys.modules.items() if name.startswith("rsir_nb.")]
    registries = {o.kind: o for module in modules for o in vars(module).values() if isinstance(o, core.Registry)}
    assert set(registries) >= set(registered_parts()) >= {"dataset", "method", "hash head", "sampler", "miner", "metric"}
    for registry in registries.values():
        mine = {name: o for name, o in registry.entries.items() if o.__module__.startswith("rsir_nb.")}
        found = registered_parts()[registry.kind]
        assert set(found) == set(mine), registry.kind
        for name, builder in mine.items():
            own = builder.__qualname__.rpartition("<locals>.")[2] # what a function made inside another is called
            assert found[name]["home"] == f"{builder.__module__}.{own}"
            assert found[name] == {**found[name], **registry.meta[name]}, "facts are literals that the source shows"
            assert registry.info(name)["description"] == found[name]["description"]


def test_public_names_are_those_of_the_pages():
    names = import_pages()
    assert set(names) == set(public_names()) and len(names) > 500
    assert names["HammingIndex"] is importlib.import_module("rsir_nb.retrieval.hamming").HammingIndex
    with pytest.raises(ImportError): exec("from rsir_nb.all import nothing_of_that_name")


def test_a_name_from_all_loads_its_own_page_alone():
    assert loaded_by("from rsir_nb.all import HammingIndex") == set()
    assert "torch" in loaded_by("from rsir_nb.all import Method")
