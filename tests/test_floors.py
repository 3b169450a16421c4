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


def tree_of(module): return ast.parse((ROOT / "rsir_nb" / (module.replace(".", "/") + ".py")).read_text())


def is_private(name): return name.startswith("_") and not name.startswith("__")


def borrowed(tree, module):
    "Private names that a module takes from another one of the package: imported, or as attributes of what was imported."
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and imported_base(node, module) is not None:
            yield from (o.name for o in node.names if is_private(o.name))
            modules |= {o.asname or o.name for o in node.names}
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "lazy_import":
            modules |= {o.id for o in node.targets if isinstance(o, ast.Name)}
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own |= {o.attr for o in ast.walk(tree) if isinstance(o, ast.Attribute) and getattr(o.value, "id", "") in ("self", "cls")}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not is_private(node.attr): continue
        base = getattr(node.value, "id", "")
        mine = base in ("self", "cls") or ast.unparse(node.value).startswith("super(") or node.attr in own and base not in modules
        if not mine and not re.match(r"_repr_\w+_$|_asdict$|_version$|_foreach_", node.attr): yield ast.unparse(node)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_private_names_stay_at_home(module):
    "A name that begins with an underscore belongs to its page; what another page needs is published."
    assert not list(borrowed(tree_of(module), module))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_methods_are_attached_in_one_way(module):
    "A class has its methods in its body, or a later cell adds them by `@patch`; none is a function that is assigned to the class."
    for node in tree_of(module).body:
        if isinstance(node, ast.FunctionDef) and node.args.args and node.args.args[0].arg == "self":
            assert any(ast.unparse(o).startswith("patch") for o in node.decorator_list), f"{node.name} takes self by hand"
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [o for t in targets for o in (t.elts if isinstance(t, ast.Tuple) else [t])]
        assert not any(isinstance(o, ast.Attribute) for o in targets), f"{ast.unparse(node)} attaches something by hand"


@pytest.mark.parametrize("code, found", [
    ("from .other import _name", ["_name"]), ("from .other import name\nname._part", ["name._part"]), ("from numpy import _core", []),
    ("other = lazy_import('rsir_nb.geo')\nother._ring", ["other._ring"]), ("class A:\n def f(self, o): return o._f, self._x", ["o._f"]),
    ("class A:\n def f(self, o):\n  self._x = o._x", []), ("super(A, self)._f(1)\nx._repr_html_()", [])])
def test_borrowed_names_are_found(code, found): assert list(borrowed(ast.parse(code), "a.b")) == found
