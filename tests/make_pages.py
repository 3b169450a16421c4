"""Writes the lists of nbs/book.md and nbs/api.md from the pages: `python tests/make_pages.py [--check]`.

What stands outside the two marks of each file is written by hand and stays.
"""
import ast
import json
import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
MARKS = "<!-- made by tests/make_pages.py -->", "<!-- made until here -->"


def sections():
    "The sections of the sidebar that hold numbered pages: title and pages, in the book's order."
    contents = yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"]["contents"]
    parts = [(o["section"], [p for p in o["contents"] if re.match(r"\d\d", p)]) for o in contents if "section" in o]
    return [(title, pages) for title, pages in parts if pages]


def cells(page): return json.loads((ROOT / "nbs" / page).read_text())["cells"]


def promise(page):
    "What a page promises: its line that begins with `>`."
    first = "".join(cells(page)[0]["source"])
    return re.search(r"^> (.+(?:\n> .+)*)", first, re.M)[1].replace("\n> ", " ")


def module_of(page):
    code = "\n".join("".join(o["source"]) for o in cells(page) if o["cell_type"] == "code")
    found = re.search(r"^#\|\s*default_exp\s+(\S+)", code, re.M)
    return found and found[1]


def book():
    "One line for each page: number, title, promise."
    parts = []
    for title, pages in sections():
        lines = [f"- [{re.match(r'[0-9a-z]+', p)[0]} {Path(p).stem.partition('_')[2]}]({p}): {promise(p)}" for p in pages]
        parts.append("\n".join([f"## {title}", "", *lines]))
    return "\n\n".join(parts)


def public_names(path):
    "The names that a module exports, with the first line of their docstring, or None for what is no function or class."
    tree = ast.parse(path.read_text())
    docs = {o.name: ast.get_docstring(o) or "" for o in tree.body if isinstance(o, (ast.FunctionDef, ast.ClassDef))}
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            names = [o.value for o in node.value.elts if isinstance(o, ast.Constant)]
    return {o: docs.get(o, "").split("\n")[0] or None for o in names}


def api():
    "Every public name with what it does, by the page that has it."
    parts = []
    for title, pages in sections():
        parts.append(f"## {title}")
        for page in pages:
            if not (module := module_of(page)): continue
            names = public_names(ROOT / "rsir_nb" / (module.replace(".", "/") + ".py"))
            if not names: continue
            parts.append(f"### [{module}]({page})")
            rows = [f"| [`{o}`]({page}#{o.lower()}) | {doc.replace('|', chr(92) + '|')} |" for o, doc in names.items()
                    if doc is not None]
            if rows: parts.append("\n".join(["| name | what it does |", "|---|---|", *rows]))
            rest = ", ".join(f"`{o}`" for o, doc in names.items() if doc is None)
            if rest: parts.append(f"Values: {rest}.")
    return "\n\n".join(parts)


def filled(path, text):
    "The file with `text` between the marks."
    before, _, rest = path.read_text().partition(MARKS[0])
    if not rest: raise ValueError(f"{path.name} has no line {MARKS[0]!r}, after which the list comes")
    return f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{rest.partition(MARKS[1])[2]}"


def main():
    stale = [p for p, make in ((ROOT / "nbs/book.md", book), (ROOT / "nbs/api.md", api)) if not written(p, make())]
    if stale: print(*(f"{p.name} is not what the pages say; run `make pages`" for p in stale), sep="\n")
    return bool(stale)


def written(path, text):
    "Writes the file, or with `--check` only says whether it is current."
    text = filled(path, text)
    if "--check" in sys.argv: return path.read_text() == text
    path.write_text(text)
    return True


if __name__ == "__main__":
    sys.exit(main())
