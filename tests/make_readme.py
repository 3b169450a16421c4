"""Makes README.md from nbs/index.ipynb, as Quarto's `nbdev_readme` would: `python tests/make_readme.py [--check]`."""
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- Made from nbs/index.ipynb by tests/make_readme.py: edit the notebook. -->\n\n"


def cell_text(cell):
    "A cell as Markdown: prose as it is, code fenced, then its plain text output."
    source = "".join(cell["source"])
    if re.search(r"^#\|\s*hide\b", source, re.M): return ""
    if cell["cell_type"] == "markdown": return source
    parts = [f"```python\n{source}\n```"]
    for output in cell["outputs"]:
        data = output.get("data", {})
        text = "".join(data.get("text/markdown", ""))
        plain = "".join(data.get("text/plain", output.get("text", "")))
        if text: parts.append(text)
        elif plain: parts.append("\n".join("    " + line for line in plain.rstrip("\n").split("\n")))
    return "\n\n".join(parts)


def readme():
    "The README's text: links and pictures of the notebook, seen from the root."
    cells = json.loads((ROOT / "nbs/index.ipynb").read_text())["cells"]
    text = "\n\n".join(filter(None, map(cell_text, cells))).strip() + "\n"
    return NOTE + re.sub(r"\]\((?!https?://|#)([^)]+)\)", lambda o: f"]({from_root(o[1])})", text)


def from_root(link):
    "A link of the notebook seen from the root; where it leads to a link in the file system, what that points at."
    path, _, place = link.partition("#")
    found = (ROOT / "nbs" / path).resolve()
    return (str(found.relative_to(ROOT)) if found.exists() else f"nbs/{path}") + (f"#{place}" if place else "")


def main():
    path = ROOT / "README.md"
    if "--check" not in sys.argv: path.write_text(readme())
    elif not path.exists() or path.read_text() != readme():
        print("README.md differs from nbs/index.ipynb; run `python tests/make_readme.py`.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
