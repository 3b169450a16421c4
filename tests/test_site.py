"""The processed pages that Quarto would read, the README and the packaging: what a visitor meets first."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from check_site import anchor, check_navigation, check_site, read_site, site_address
from make_pages import MARKS, api, book, filled, promise
from make_readme import readme
from rsir_nb.style import THEMES

ROOT = Path(__file__).resolve().parent.parent
HOST = "https://site.example/docs"


@pytest.fixture(scope="module")
def processed(tmp_path_factory):
    "`nbdev_proc_nbs` over a copy of the repository: the folder of processed pages."
    folder = tmp_path_factory.mktemp("site")
    for part in "nbs", "rsir_nb", "benchmarks", "settings.ini", "setup.py", "_quarto.yml", "README.md":
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, folder / part, **({"symlinks": True} if (ROOT / part).is_dir() else {}))
    # where quarto is missing nbdev would fetch it, and install this copy over the checkout: a stand-in keeps it from that
    stand_in = tmp_path_factory.mktemp("bin") / "quarto"
    stand_in.write_text("#!/bin/sh\nexit 1\n")
    stand_in.chmod(0o755)
    env = {**os.environ, "PATH": os.pathsep.join([str(stand_in.parent), os.environ["PATH"]])}
    subprocess.run([Path(sys.executable).parent / "nbdev_proc_nbs"], cwd=folder, check=True, timeout=600, env=env)
    return folder / "_proc"


def test_every_page_was_processed(processed):
    ours = {str(p.relative_to(ROOT / "nbs")) for p in (ROOT / "nbs").rglob("*")
            if p.suffix in (".ipynb", ".md") and ".ipynb_checkpoints" not in p.parts}
    assert ours == set(read_site(processed))


def test_the_processed_site_is_in_order(processed):
    found = check_site(processed, site_address(ROOT / "settings.ini"))
    assert not found, "\n".join(found)


def test_the_benchmarks_page_is_the_results_file(processed):
    "A link and no copy, so that there is nothing to keep current."
    assert (ROOT / "nbs/benchmarks.md").is_symlink()
    assert (processed / "benchmarks.md").read_text() == (ROOT / "benchmarks/RESULTS.md").read_text()


# a small site in order, and what may be wrong with it

def notebook(*cells):
    "Cells of a processed page: a string is prose, a dict the data of a code cell's output."
    front = "---\noutput-file: part.html\ntitle: part\n---\n"
    made = [dict(cell_type="raw", metadata={}, source=front)]
    for o in cells:
        if isinstance(o, str): made.append(dict(cell_type="markdown", metadata={}, source=o))
        else: made.append(dict(cell_type="code", metadata={}, source="show()", outputs=[dict(output_type="display_data", data=o)]))
    return json.dumps(dict(cells=made, metadata={}, nbformat=4, nbformat_minor=5))


CONFIG = """
format: {html: {theme: {light: [cosmo, theme.scss]}}}
website:
  navbar: {left: [{text: Start, href: index.md}, {text: Code, href: "https://code.example"}]}
  sidebar:
    contents:
      - index.md
      - section: Parts
        contents: [10_part.ipynb]
"""
INDEX = f"""---
title: Home
---

# Home

![a picture](images/a.png) and [a part](10_part.ipynb#a-section-of-its-own), the same as [here]({HOST}/part.html#pile).

::: {{.grid}}
[A class](10_part.ipynb#pile), [below](#home), [outside](https://elsewhere.example/x), <a href="10_part.ipynb">again</a>
:::

```python
[not](a_link.md)
```
"""
PART = ["# part\n\n## A *section* of its own", "Text with `[code](nothing.md)` [home](index.md)",
        {"text/markdown": "### Pile\n\nwhat it does", "text/plain": "Pile"},
        {"application/vnd.jupyter.widget-view+json": {}, "text/html": "<p>static</p>"}]


@pytest.fixture
def site(tmp_path):
    "A small site that is in order."
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(b"")
    (tmp_path / "theme.scss").write_text("")
    (tmp_path / "_quarto.yml").write_text(CONFIG)
    (tmp_path / "index.md").write_text(INDEX)
    (tmp_path / "10_part.ipynb").write_text(notebook(*PART))
    return tmp_path


def test_a_site_in_order_passes(site):
    assert check_site(site, HOST) == []


@pytest.mark.parametrize("file,old,new,told", [
    ("_quarto.yml", "      - index.md\n", "", "index.md is not in the sidebar"),
    ("_quarto.yml", "[10_part.ipynb]", "[10_part.ipynb, 20_gone.ipynb]", "lists 20_gone.ipynb, which is no page"),
    ("_quarto.yml", "[10_part.ipynb]", "[10_part.ipynb, 10_part.ipynb]", "lists 10_part.ipynb twice"),
    ("_quarto.yml", "href: index.md", "href: start.md", "navbar points at start.md"),
    ("_quarto.yml", "theme.scss", "dark.scss", "no style sheet dark.scss"),
    ("index.md", "images/a.png", "images/b.png", "there is no images/b.png"),
    ("_quarto.yml", "website:\n", "website:\n  favicon: images/icon.svg\n", "no icon images/icon.svg"),
    ("_quarto.yml", "website:\n", "website:\n  open-graph: true\n", "site-url"),
    ("index.md", "![a picture](images/a.png) and", "![a picture](images/a.png)\n\nAnd", "a caption of the alt text"),
    ("index.md", "![a picture](images/a.png) and", '![a](images/a.png){fig-alt="a picture"}\n\nAnd', None),
    ("index.md", "[a part](10_part.ipynb#", "[[`part`](10_part.ipynb)](10_part.ipynb#", "a link within a link"),
    ("index.md", "![a picture]", "![]", "a picture without alt text"),
    ("index.md", "![a picture]", '<img src="images/a.png"> ![a picture]', "a picture without alt text"),
    ("index.md", "[a part](10_part.ipynb#", "[a part](11_part.ipynb#", "there is no 11_part.ipynb"),
    ("index.md", "#a-section-of-its-own", "#another-section", "has no section #another-section"),
    ("index.md", "part.html#pile", "part.html#heap", "has no section #heap"),
    ("index.md", "part.html#pile", "parts.html#pile", "there is no https"),
    ("index.md", "(#home)", "(#house)", "has no section #house"),
    ("index.md", '<a href="10_part.ipynb">', '<a href="part.ipynb">', "there is no part.ipynb"),
    ("index.md", "index.md", "index.md", None),
    ("index.md", "[outside](https://elsewhere.example/x)", "[outside](../x.md)", "leads out of the site"),
    ("index.md", "\n:::\n", "\n", "1 fences stay open"),
    ("index.md", "::: {.grid}\n", "", "a fence closes that never opened"),
    ("index.md", "```python\n", "", "a fence of code stays open"),
    ("10_part.ipynb", '"text/html": "<p>static</p>"', '"text/plain": "QueryGallery()"', "a widget without a static twin"),
    ("10_part.ipynb", "<p>static</p>", "<p>/home/somebody/archive</p>", "a path of a machine"),
    ("10_part.ipynb", "<p>static</p>", "<img src='nothing.png' alt='x'>", "there is no nothing.png"),
    ("10_part.ipynb", "### Pile", "### Heap", "has no section #pile"),
])
def test_each_check_can_fail(site, file, old, new, told):
    text = (site / file).read_text()
    assert old in text or told is None
    (site / file).write_text(text.replace(old, new, 1))
    found = check_site(site, HOST)
    assert not found if told is None else any(told in o for o in found), found


def test_anchors_are_those_of_pandoc():
    "Examples from pandoc's manual (auto_identifiers), and a name of a method."
    for heading, name in {"Heading identifiers in HTML": "heading-identifiers-in-html", "Maître d'hôtel": "maître-dhôtel",
                          "*Dogs*?--in *my* house?": "dogs--in-my-house", "[HTML], [S5], or [RTF]?": "html-s5-or-rtf",
                          "3. Applications": "applications", "Retriever.query": "retriever.query", "Own {#mine}": "mine",
                          "`code` and [a link](x.md)": "code-and-a-link"}.items():
        assert anchor(heading) == name


def test_the_command_says_what_is_wrong(site):
    (site / "index.md").write_text(INDEX.replace("images/a.png", "b.png"))
    done = subprocess.run([sys.executable, ROOT / "tests/check_site.py", site], capture_output=True, text=True)
    assert done.returncode == 1 and "index.md: there is no b.png" in done.stdout


def test_a_sidebar_may_be_deep():
    part = dict(section="A", contents=[dict(section="B", contents=["b.md"]), dict(text="c", href="c.md")])
    pages = dict.fromkeys(["a.md", "b.md", "c.md"])
    assert not list(check_navigation(dict(website=dict(sidebar=dict(contents=["a.md", part]))), pages))


# pages that are made from other pages

def test_pages_have_a_line_in_the_book_and_their_names_in_the_api():
    for name, text in dict(book=book(), api=api()).items():
        path = ROOT / f"nbs/{name}.md"
        assert path.read_text() == filled(path, text), "run `make pages`"


def test_the_lists_follow_the_pages(tmp_path):
    assert promise("41_retrieval.hamming.ipynb") in book()
    assert "| [`HammingIndex`](41_retrieval.hamming.ipynb#hammingindex) | Exact search among packed binary codes" in api()
    path = tmp_path / "page.md"
    path.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    assert filled(path, "new") == f"before\n{MARKS[0]}\n\nnew\n\n{MARKS[1]}\nafter\n"
    path.write_text("no marks")
    with pytest.raises(ValueError, match="page.md has no line"): filled(path, "new")


def test_readme_is_the_home_page():
    assert (ROOT / "README.md").read_text() == readme(), "run `python tests/make_readme.py`"


def test_readme_links_resolve():
    text = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text) + re.findall(r"src=\"(?!https?://)([^\"]+)", text):
        assert (ROOT / link).exists(), link


def test_readme_is_read_in_a_minute():
    "Short, with each of the four common questions answered within two clicks, and its terms linked to the glossary."
    text = (ROOT / "README.md").read_text()
    assert len(re.sub(r"\]\([^)]*\)", "]", text).split()) < 700
    for question in "BigEarthNet", "published weights", "RGB aerial pictures", "foundation model":
        row = next(o for o in text.splitlines() if o.startswith("|") and question in o)
        for link, place in re.findall(r"\]\(([^)#\s]+)#?([\w-]*)\)", row):
            headings = map(anchor, re.findall(r"^##+ (.+)$", (ROOT / link).read_text(), re.M))
            assert not place or place in headings, f"{link} has no section {place}"
    assert text.count("glossary.md#") >= 8


# workflows

@pytest.mark.parametrize("name", ["tests", "docs"])
def test_workflows_run_what_is_there(name):
    "The YAML is read as GitHub would, and each script that a step runs exists."
    flow = yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text())
    assert {"push", "pull_request"} <= set(flow[True]), "`on` is read as a truth value by YAML 1.1"
    steps = [o for job in flow["jobs"].values() for o in job["steps"]]
    assert all(("uses" in o) != ("run" in o) for o in steps)
    assert all(re.fullmatch(r"[\w-]+/[\w/-]+@v\d+", o["uses"]) for o in steps if "uses" in o)
    for path in re.findall(r"(?:tests|\.ci)/[\w./-]+", "\n".join(o.get("run", "") for o in steps)):
        assert (ROOT / path).exists(), path


# the site's settings and colours

def test_the_site_knows_where_it_is():
    "Its address and repository are those of settings.ini, and its pictures keep their alternative text."
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    settings = (ROOT / "settings.ini").read_text()
    assert config["website"]["site-url"] == site_address(ROOT / "settings.ini")
    assert f"git_url = {config['website']['repo-url']}\n" in settings
    assert (ROOT / "nbs" / config["website"]["favicon"]).is_file()
    assert config["format"]["html"]["from"] == "markdown-implicit_figures"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_galleries_follow_the_switch_of_the_site(theme):
    rules = (ROOT / "nbs/theme-rules.scss").read_text()
    own = re.search(rf"^body\.quarto-{theme} \.rsir \{{(.*)\}}$", rules, re.M)[1]
    assert dict(re.findall(r"--([\w-]+): ([^;]+);", own)) == THEMES[theme] and f"color-scheme: {theme};" in own


def contrast(a, b):
    "How far two colours are apart, as WCAG 2 counts: 1 to 21."
    def luminance(colour):
        parts = [int(colour[i:i + 2], 16)/255 for i in (1, 3, 5)]
        return sum(w*(o/12.92 if o <= 0.04045 else ((o + 0.055)/1.055)**2.4) for w, o in zip((0.2126, 0.7152, 0.0722), parts, strict=True))
    low, high = sorted([luminance(a), luminance(b)])
    return (high + 0.05)/(low + 0.05)


def test_contrast_of_known_pairs():
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("theme", ["theme", "theme-dark"])
def test_colours_can_be_told_apart(theme):
    "WCAG AA asks for 4.5 between text and ground."
    value = dict(re.findall(r"^\$([\w-]+):\s*(#[0-9a-f]{6});", (ROOT / f"nbs/{theme}.scss").read_text(), re.M))
    for text, ground in [("body-color", "body-bg"), ("link-color", "body-bg"), ("text-muted", "body-bg"), ("navbar-fg", "navbar-bg"),
                         ("navbar-hl", "navbar-bg"), ("code-color", "code-bg"), ("body-color", "code-bg"), ("link-color", "code-bg")]:
        assert contrast(value[text], value[ground]) >= 4.5, f"{text} on {ground}: {contrast(value[text], value[ground]):.2f}"
