"""The order of the floors (DESIGN.md section 4): a page imports only from lower numbers, and 20s, 30s and 40s are siblings."""
import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
SIBLINGS = {2, 3, 4}


def number_of(page):
    "`11a_data.records.ipynb` -> (11, 'a')"
    found = re.match(r"(\d\d)([a-z]?)_", page.name)
    assert found, f"{page.name} should start with two digits, an optional letter and an underscore"
    return int(found[1]), found[2]


def module_of(page):
    cells = json.loads(page.read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    found = re.search(r"^#\|\s*default_exp\s+(\S+)", code, re.M)
    return found and found[1]


MODULES = {module_of(page): number_of(page) for page in PAGES if module_of(page)}


def imported_base(node, module):
    "The module, below the package, that a `from ... import` names; None for other packages. nbdev writes relative ones."
    if node.level:
        package = module.split(".")[:-node.level]
        return ".".join([*package, *filter(None, [node.module])])
    if (node.module or "").split(".")[0] == "rsir_nb": return node.module.removeprefix("rsir_nb").lstrip(".")


def imports_of(module):
    "The package's own modules that `module` imports, wherever in the file the import stands."
    path = ROOT / "rsir_nb" / (module.replace(".", "/") + ".py")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = imported_base(node, module)
            if base is None: continue
            full = [f"{base}.{name.name}".lstrip(".") for name in node.names]
            yield from (o if o in MODULES else base for o in full)
        elif isinstance(node, ast.Import):
            yield from (n.name.removeprefix("rsir_nb.") for n in node.names if n.name.startswith("rsir_nb."))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "lazy_import":
            name = ast.literal_eval(node.args[0])
            if name.startswith("rsir_nb."): yield name.removeprefix("rsir_nb.")


def test_pages_were_found():
    assert len(MODULES) >= 25, f"only {sorted(MODULES)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_file_name_is_module_name(page):
    module = module_of(page)
    assert module is None or page.stem.split("_", 1)[1] == module, f"{page.name} exports {module}"


def test_no_two_pages_share_a_number():
    numbers = list(map(number_of, PAGES))
    assert len(numbers) == len(set(numbers)), sorted(n for n in numbers if numbers.count(n) > 1)


def test_every_module_has_a_page():
    modules = {str(p.relative_to(ROOT / "rsir_nb").with_suffix("")).replace("/", ".")
               for p in (ROOT / "rsir_nb").rglob("*.py") if p.stem not in ("__init__", "_modidx")}
    assert modules == set(MODULES)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module):
    own = MODULES[module]
    for other in imports_of(module):
        assert other in MODULES, f"{module} imports rsir_nb.{other}, which no page exports"
        assert MODULES[other] < own, f"{own} {module} imports {MODULES[other]} {other}, which is not below it"
        decades = own[0] // 10, MODULES[other][0] // 10
        if decades[0] in SIBLINGS and decades[1] in SIBLINGS:
            assert decades[0] == decades[1], f"{module} imports {other}: the 20s, 30s and 40s are siblings"
