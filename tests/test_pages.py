"""What every page and every public name owes its reader (STYLE.md sections 2.3 to 2.6 and 2.15)."""
import ast
import importlib
import inspect
import json
import re
from pathlib import Path

import pytest
import yaml
from fastcore.docments import docments

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
MODULES = sorted(p for p in (ROOT / "rsir_nb").rglob("*.py") if p.stem not in ("__init__", "_modidx"))
MACHINE_PATH = re.compile(r"/home/|/root/|/work/|/tmp/|/Users/|[A-Z]:\\\\")
relative = lambda p: str(p.relative_to(ROOT))


def cells_of(page, kind=None):
    return [c for c in json.loads(page.read_text())["cells"] if kind in (None, c["cell_type"])]


def source(cell): return "".join(cell["source"])


def exported(page): return [source(c) for c in cells_of(page, "code") if re.search(r"^#\|\s*exporti?\b", source(c), re.M)]


@pytest.mark.parametrize("page", NOTEBOOKS, ids=relative)
def test_title_and_promise(page):
    first = source(cells_of(page)[0])
    assert re.match(r"# \S", first), "a page opens with its title"
    assert re.search(r"^> \S", first, re.M), "and one line that promises something"


@pytest.mark.parametrize("page", NOTEBOOKS, ids=relative)
def test_no_output_holds_a_machine_path(page):
    for cell in cells_of(page, "code"):
        for output in cell["outputs"]:
            assert output["output_type"] != "error", f"a saved error in {source(cell)[:80]!r}"
            data = {k: v for k, v in output.get("data", {}).items() if not k.startswith("image/")}
            text = re.sub(r'data:image/[^"]+', "", json.dumps([output.get("text"), data]))
            found = MACHINE_PATH.search(text)
            assert not found, f"{text[max(0, found.start() - 40):found.end() + 40]!r}"


@pytest.mark.parametrize("page", NOTEBOOKS, ids=relative)
def test_saved_outputs_are_there_and_small(page):
    code = cells_of(page, "code")
    assert not code or any(c["outputs"] for c in code), "a page is readable from its saved outputs"
    assert page.stat().st_size < 1_500_000, f"{page.stat().st_size/1e6:.1f} MB"
    for cell in code:
        for output in cell["outputs"]:
            size = len("".join(output.get("data", {}).get("image/png", "")))
            assert size < 205_000, f"a picture of {size*3//4//1000} kB in {source(cell)[:60]!r}"


def alt_texts(text):
    "The texts of a cell's `fig-alt`, a string or a list of strings on one line."
    found = re.search(r"^#\|\s*fig-alt:[ ]*(.+)$", text, re.M)
    value = yaml.safe_load(found[1]) if found else []
    return [str(o) for o in value] if isinstance(value, list) else [str(value)]


def alt_faults(cells):
    "What is wrong with the texts of the saved pictures, and how to mend it."
    seen = {}
    for cell in (c for c in cells if c["cell_type"] == "code"):
        data = [o.get("data", {}) for o in cell["outputs"]]
        n, texts = sum(any(k.startswith("image/") for k in o) for o in data), alt_texts(source(cell))
        code = re.sub(r"^#\|.*\n", "", source(cell), flags=re.M)
        where, lines = repr(code[:60]), source(cell).splitlines()
        if n != len(texts):
            lists = "[" + ", ".join(['"what is to be seen"']*n) + "]"
            yield (f"{where}: {n} pictures and {len(texts)} texts. Look at the output and write "
                   f"`#| fig-alt: {lists if n > 1 else lists[1:-1]}` in one line before the code.")
        if len(texts) > 1 and not all(any(k.startswith("image/") for k in o) for o in data[:n]):
            yield f"{where}: Quarto hands the list out to all outputs, and one before a picture is none; split the cell"
        if texts and not re.match(r"(#\|.*\n)*#\|\s*fig-alt:", source(cell)):
            yield f"{where}: fig-alt belongs to the lines at the top of the cell, or nobody reads it"
        if any(re.match(r"#\|\s*(fig-alt:\s*$|-)", o) for o in lines):
            yield f"{where}: nbdev drops directives of several lines; write fig-alt in one line"
        for text in texts:
            if not 20 <= len(text.strip()) <= 300: yield f"{where}: one sentence of 20 to 300 characters, not {text!r}"
            if re.match(r"(the |a |an )?(picture|figure|image)\b", text.strip(), re.I):
                yield f"{where}: say what is to be seen; that {text!r} is a picture is known"
            if text in seen: yield f"{where}: says the same as {seen[text]}; say what is different: {text!r}"
            seen[text] = where
        for html in ("".join(o.get("text/html", "")) for o in data):
            for image in re.findall(r"<img\b[^>]*>", html):
                if not re.search(r"""\balt=("[^"]*\S[^"]*"|'[^']*\S[^']*')""", image):
                    yield f"{where}: an image of the saved HTML has no alt text: {image[:80]}"


@pytest.mark.parametrize("page", NOTEBOOKS, ids=relative)
def test_every_picture_has_its_text(page):
    faults = list(alt_faults(cells_of(page)))
    assert not faults, "\n".join(faults)


def picture_cell(text, n=1, html=None, first=None):
    data = [first]*bool(first) + [{"image/png": "iVBORw0="}]*n + ([{"text/html": [html]}] if html else [])
    return dict(cell_type="code", source=[text], outputs=[dict(output_type="display_data", data=o) for o in data])


TWO = '#| slow\n#| fig-alt: ["A query and its five hits.", "Bars of four methods: the last leads."]\nshow()'
GOOD = '#| fig-alt: "Two curves: both fall, one of them faster."\nshow()'


@pytest.mark.parametrize("cells, told", [
    ([picture_cell("show()")], "1 pictures and 0 texts"),
    ([picture_cell(GOOD, n=2)], "2 pictures and 1 texts"),
    ([picture_cell(GOOD, n=0)], "0 pictures and 1 texts"),
    ([picture_cell(TWO, n=2, first={"text/plain": "7"})], "split the cell"),
    ([picture_cell('#| fig-alt: ""\nshow()')], "20 to 300"),
    ([picture_cell('#| fig-alt: "Figure of two curves that both fall."\nshow()')], "what is to be seen"),
    ([picture_cell('#| fig-alt:\n#|   - "Two curves that both fall."\nshow()')], "in one line"),
    ([picture_cell('show()\n#| fig-alt: "Two curves that both fall."')], "top of the cell"),
    ([picture_cell(GOOD), picture_cell(GOOD)], "says the same"),
    ([picture_cell("x", n=0, html="<img src='a.png' alt=''>")], "has no alt text"),
    ([picture_cell("x", n=0, html='<p><img src="a.png"></p>')], "has no alt text"),
])
def test_a_missing_text_is_found(cells, told):
    assert told in "\n".join(alt_faults(cells))


def test_good_texts_pass():
    html = '<img src="a.png" alt="a lake"><svg></svg>'
    assert not list(alt_faults([picture_cell(GOOD), picture_cell(TWO, n=2), picture_cell("x", n=0, html=html)]))


# Patterns of ../shared/WRITING.md that a reader stumbles over: (name, regular expression).
MANNERED = dict(
    told=r"\b(is|are|was|were) (told|said)\b(?! apart| from)",
    stands=r"\b(stands?|lies|lie) (beside|there|first|side by side|below|above)\b|\bstands? (in|on|at)\b(?! for)",
    who=r"(^|[.:;] )(Who|Whoever)\b(?![^.?!]*\?)",
    but_for=r"\bbut for\b",
    per=r"\b(an?|one) (row|record|file|line|dot|byte|bit|panel|column) an? [a-z]+\b"
        r"|\b(ms|bytes|seconds|images|patches|hits) an? (patch|code|second|query|image|row|item|epoch|step)\b",
    heap=r"\b[Tt]wo heaps\b",
    question=r"\b(each|every|per) question\b")
# How many such sentences a page still has; the numbers may fall, never rise.
STILL_MANNERED = {
    "nbs/09a_data.files.ipynb": 1, "nbs/09f_data.products.ipynb": 2, "nbs/09g_data.places.ipynb": 1,
    "nbs/10_data.base.ipynb": 2, "nbs/10a_data.labels.ipynb": 1, "nbs/10e_data.tiles.ipynb": 1,
    "nbs/10f_data.encoder.ipynb": 1, "nbs/11b_data.layouts.ipynb": 1, "nbs/12b_simulate.surface.ipynb": 1,
    "nbs/14_data.bigearthnet.ipynb": 3, "nbs/14a_data.bigearthnet_tiff.ipynb": 2,
    "nbs/15_data.vessels.ipynb": 2, "nbs/15a_data.splits.ipynb": 1, "nbs/16_data.scenes.ipynb": 2,
    "nbs/17a_data.features.ipynb": 1, "nbs/17b_data.label_lists.ipynb": 1,
    "nbs/40g_retrieval.kernels.ipynb": 2, "nbs/65_methods.universal.ipynb": 1,
    "nbs/66_methods.pretrained.ipynb": 3, "nbs/index.ipynb": 1, "nbs/tutorials/hashing.ipynb": 1,
    "nbs/tutorials/own_scenes.ipynb": 3, "README.md": 1, "nbs/benchmarks.md": 4, "nbs/book.md": 2}


def sentences(text):
    "Sentences of Markdown, without code, tables, link targets and markup."
    for pattern, put in ((r"```.*?```", "\n\n"), (r"`+[^`]*`+", "X"), (r"\[([^\]]*)\]\([^)]*\)", r"\1"),
                         (r"(?m)^\s*\|.*$", ""), (r"<[^>]+>", ""), (r"[*_>#]", "")):
        text = re.sub(pattern, put, text, flags=re.S if pattern.startswith("```") else 0)
    for paragraph in re.split(r"\n\s*\n|\n\s*[-\d]+[.)]?\s", text):
        yield from re.split(r"(?<=[.!?:;])\s+(?=[A-Z])", " ".join(paragraph.split()))


def prose_of(path):
    "Markdown cells and exported docstrings of a notebook, or a Markdown file."
    if path.suffix == ".md":
        yield path.read_text()
        return
    for cell in cells_of(path):
        if cell["cell_type"] == "markdown": yield source(cell)
        elif re.search(r"^#\|\s*exporti?\b", source(cell), re.M):
            for node in ast.walk(ast.parse(source(cell))):
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)): yield ast.get_docstring(node) or ""


def mannered(text): return [(k, s) for s in sentences(text) for k, p in MANNERED.items() if re.search(p, s)]


PROSE = [*NOTEBOOKS, *(ROOT / o for o in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted((ROOT / "nbs").glob("*.md"))]


@pytest.mark.parametrize("page", PROSE, ids=relative)
def test_plain_words(page):
    found = [o for text in prose_of(page) for o in mannered(text)]
    assert len(found) <= STILL_MANNERED.get(relative(page), 0), "\n".join(f"{k}: {s}" for k, s in found)


@pytest.mark.parametrize("text, pattern", [
    ("What cannot be answered is told.", "told"), ("The length stands in the group.", "stands"),
    ("Whoever leaves it in begins with a gift.", "who"), ("No label was used, but for counting.", "but_for"),
    ("The table has one row a patch.", "per"), ("The two heaps touch little.", "heap")])
def test_mannered_sentences_are_found(text, pattern): assert pattern in [k for k, _ in mannered(text)]


def test_plain_sentences_pass():
    assert not mannered("Codes can be told apart. Who reads it? One row per patch; `is said` and [a link](stands_in) do not count.")


@pytest.mark.parametrize("page", NOTEBOOKS, ids=relative)
def test_sizes(page):
    blocks = exported(page)
    assert sum(len(b.splitlines()) for b in blocks) <= 300, "a page exports at most 300 lines, or is two pages"
    assert all(len(b.splitlines()) <= 60 for b in blocks), [b.splitlines()[1] for b in blocks if len(b.splitlines()) > 60]
    assert not blocks or len(cells_of(page, "markdown")) >= len(blocks), "prose before each exported cell"


@pytest.mark.parametrize("page", NOTEBOOKS, ids=relative)
def test_lessons_on_errors_run(page):
    "`expect_fail` is a context manager: handed a lambda, it never calls it and checks nothing."
    assert not any("expect_fail(lambda" in source(c) for c in cells_of(page, "code"))


def public(path):
    name = "rsir_nb." + str(path.relative_to(ROOT / "rsir_nb").with_suffix("")).replace("/", ".")
    module = importlib.import_module(name)
    for key in getattr(module, "__all__", []):
        value = getattr(module, key)
        if (inspect.isfunction(value) or inspect.isclass(value)) and value.__module__ == name: yield key, value


def undocumented(value, where):
    "Arguments of a function without a comment, a type, or a described return value."
    sig = inspect.signature(value)
    docs = docments(value, full=True, returns=True)
    for name, p in sig.parameters.items():
        if name in ("self", "cls") or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD): continue
        if p.annotation is p.empty: yield f"{where}({name}) has no type"
        if not docs.get(name) or not docs[name].docment: yield f"{where}({name}) has no comment"
    if sig.return_annotation not in (sig.empty, None) and not isinstance(sig.return_annotation, type(None)):
        if not docs["return"].docment: yield f"{where} does not describe its return value"


def problems(key, value):
    if not inspect.getdoc(value) or "alias" in inspect.getdoc(value)[:5]: yield f"{key} has no docstring"
    if inspect.isfunction(value): yield from undocumented(value, key)
    elif "__init__" in value.__dict__ and not hasattr(value, "__dataclass_fields__"):
        yield from undocumented(value.__init__, key)


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_every_public_name_is_documented(path):
    found = [o for key, value in public(path) for o in problems(key, value)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_no_prints_and_no_swallowed_errors(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
            assert path.stem in ("cli", "options", "verbs", "verbs_codes", "verbs_models", "verbs_pages"), f"line {node.lineno} prints; library code uses logging"
        if isinstance(node, ast.ExceptHandler):
            assert not all(isinstance(o, ast.Pass) for o in node.body), f"line {node.lineno} swallows an error"


def test_every_page_stands_in_the_sidebar():
    text = (ROOT / "_quarto.yml").read_text()
    listed = set(re.findall(r"[\w./]+\.ipynb", text))
    pages = {str(p.relative_to(ROOT / "nbs")) for p in NOTEBOOKS}
    assert listed == pages, f"missing {sorted(pages - listed)}, gone {sorted(listed - pages)}"
