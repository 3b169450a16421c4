"""The processed pages that Quarto would read, the README and the packaging: what a visitor meets first."""
import re
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from make_readme import readme

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def processed(tmp_path_factory):
    "`nbdev_proc_nbs` over a copy of the repository: the folder of processed pages."
    folder = tmp_path_factory.mktemp("site")
    for part in "nbs", "rsir_nb", "settings.ini", "setup.py", "_quarto.yml", "README.md":
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, folder / part, **({"symlinks": True} if (ROOT / part).is_dir() else {}))
    # where quarto is missing nbdev would fetch it, and install this copy over the checkout: a stand-in keeps it from that
    stand_in = tmp_path_factory.mktemp("bin") / "quarto"
    stand_in.write_text("#!/bin/sh\nexit 1\n")
    stand_in.chmod(0o755)
    env = {**os.environ, "PATH": os.pathsep.join([str(stand_in.parent), os.environ["PATH"]])}
    subprocess.run([Path(sys.executable).parent / "nbdev_proc_nbs"], cwd=folder, check=True, timeout=600, env=env)
    return folder / "_proc"


def pages(folder):
    return {p: p.read_text() for p in sorted(folder.rglob("*.ipynb"))}


def markdown_of(text):
    import json
    return "\n\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")


def test_every_page_was_processed(processed):
    ours = {p.relative_to(ROOT / "nbs") for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    assert ours == {p.relative_to(processed) for p in pages(processed)}


def test_links_and_pictures_resolve(processed):
    for page, text in pages(processed).items():
        for link in re.findall(r"\]\((?!https?://|#|mailto:|attachment:|data:)([^)#\s]+)", markdown_of(text)):
            target = (page.parent / re.sub(r"\.html$", ".ipynb", link)).resolve()
            inside = target.exists() or (ROOT / "nbs" / target.relative_to(processed.resolve().parent)).exists() \
                if target.is_relative_to(processed.resolve().parent) else False
            assert inside, f"{page.name} links to {link}"


def test_fences_are_paired(processed):
    for page, text in pages(processed).items():
        depth = 0
        for line in markdown_of(text).splitlines():
            if re.match(r":::+\s*\{?\S", line): depth += 1
            elif re.match(r":::+\s*$", line): depth -= 1
            assert depth >= 0, f"{page.name}: a fence closes that never opened"
        assert depth == 0, f"{page.name}: {depth} fences stay open"


def test_pictures_in_prose_have_alt_text():
    for page, text in pages(ROOT / "nbs").items():
        assert not re.search(r"!\[\s*\]\(", markdown_of(text)), f"{page.name} has a picture without alt text"


def test_readme_is_the_home_page():
    assert (ROOT / "README.md").read_text() == readme(), "run `python tests/make_readme.py`"


def test_readme_links_resolve():
    for link in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", (ROOT / "README.md").read_text()):
        assert (ROOT / link).exists(), link
