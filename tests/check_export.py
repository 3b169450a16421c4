"""Fails when notebooks and modules disagree, or when a notebook is not clean. Writes nothing to the working tree.

Copies the tracked files to a temporary folder, exports and cleans there, and compares.
"""
import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ["nbs", "rsir_nb", "settings.ini", "setup.py", "pyproject.toml", "_quarto.yml", "README.md"]


def copy_to(folder):
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, symlinks=True,
                            ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        elif (ROOT / part).exists():
            shutil.copy(ROOT / part, folder / part)


def differing(folder, pattern):
    made = {p.relative_to(folder) for p in folder.glob(pattern) if ".ipynb_checkpoints" not in p.parts}
    ours = {p.relative_to(ROOT) for p in ROOT.glob(pattern) if ".ipynb_checkpoints" not in p.parts}
    gone, new = sorted(ours - made), sorted(made - ours)
    changed = [p for p in sorted(ours & made) if not filecmp.cmp(ROOT / p, folder / p, shallow=False)]
    return [*(f"{p}: no notebook exports it" for p in gone), *(f"{p}: not exported" for p in new),
            *(f"{p}: differs" for p in changed)]


def main():
    bin_ = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        copy_to(folder)
        for module in (folder / "rsir_nb").rglob("*.py"):
            if module.name != "__init__.py": module.unlink()
        for command in "nbdev_export", "nbdev_clean":
            subprocess.run([bin_ / command], cwd=folder, check=True)
        found = differing(folder, "rsir_nb/**/*.py") + differing(folder, "nbs/**/*.ipynb")
    if found:
        print(*found, "run `nbdev_export` and `nbdev_clean`, then commit notebooks and modules together.", sep="\n")
        return 1
    print(f"notebooks and modules agree; {len(list((ROOT/'nbs').rglob('*.ipynb')))} notebooks are clean")
    return 0


if __name__ == "__main__":
    sys.exit(main())
