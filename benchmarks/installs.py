"""Claim: the wheel installs and searches on every supported Python, with newest and lowest requirements.

The wheel is built once. Each row of the table is a fresh virtual environment outside the checkout, in which a
smoke test indexes forty of the real images that come with the package, asks, scores, and verifies the run.
`lowest` pins every requirement of settings.ini to the version that it names. An extra is installed alone, and
the part of the package that needs it is imported.

    python benchmarks/installs.py --python python3.11 python3.12 python3.13
    python benchmarks/installs.py --python python3.11 --cases lowest

Each row downloads up to 6 GB. Ends with status 1 if a row failed.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CPU = "torch==2.13.0"
EXTRAS = {
    "metric": "import pytorch_metric_learning, sklearn, rsir_nb.losses.metric",
    "foundation": "import open_clip, rsir_nb.models.open_clip",
    "export": "import onnx, onnxruntime, onnxscript, rsir_nb.engine.export",
    "map": "import ipyleaflet, geopandas, rsir_nb.gallery.map",
    "lab": "import jupyterlab, voila, rsir_nb.gallery.app",
    "hdf5": "import h5py, rsir_nb.data.vectors",
    "ray": "import ray, rsir_nb.remote.ray",
    "postgres": "import psycopg, rsir_nb.remote.postgres",
}
SMOKE = """
set -eu
mkdir pictures
python - <<'P'
import shutil
from pathlib import Path
from rsir_nb.data.samples import sample_folder
for name in "Forest", "River", "Highway", "SeaLake":
    Path("pictures", name).mkdir()
    for o in sorted((sample_folder()/name).iterdir())[:10]: shutil.copy(o, Path("pictures", name))
P
rsir list methods >/dev/null
rsir index pretrained data=class_folders data.root=pictures out=run >log 2>&1 || { tail -5 log; exit 1; }
asked=$(cd pictures && ls River/* | head -1 | sed 's/.jpg//')
rsir query run "$asked" -k 5 >log 2>&1 || { tail -5 log; exit 1; }
rsir evaluate run --protocol leave_one_out >log 2>&1 || { tail -5 log; exit 1; }
rsir verify run >log 2>&1 || { tail -5 log; exit 1; }
"""
VERSIONS = "torch numpy pandas numba faiss-cpu rasterio pyarrow timm pytorch-lightning".split()


def settings():
    parser = ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT/"settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def lowest(requirements):
    "The requirements at the lowest version that they name."
    return [re.sub(r">=([^,]+).*", r"==\1", o) for o in requirements]


def call(command, cwd, env=None):
    "Output of a command; its last lines are the error where it fails."
    into = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    done = subprocess.run(command, cwd=cwd, env=env, text=True, **into)
    if done.returncode: raise RuntimeError("\n".join(done.stdout.strip().splitlines()[-6:]))
    return done.stdout


def build_wheel(folder):
    call([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)], folder)
    return next(folder.glob("*.whl"))


def try_one(python, case, wheel, home):
    "Versions that were installed and seconds of the smoke test."
    what = [str(wheel)] if case != "lowest" else [str(wheel), *lowest(settings()["requirements"].split())]
    if case in EXTRAS: what = [f"{wheel}[{case}]"]
    if case not in ("default", "lowest"): what.append(CPU)
    call([python, "-m", "venv", "env"], home)
    bin = home/"env"/"bin"
    call([str(bin/"pip"), "install", "-q", "--no-cache-dir", *what], home)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MPLBACKEND")}
    env |= dict(PATH=f"{bin}:{env['PATH']}", WANDB_MODE="offline", OMP_WAIT_POLICY="passive", HOME=str(home))
    if case in EXTRAS: call([str(bin/"python"), "-c", EXTRAS[case]], home, env)
    start = time.perf_counter()
    call(["bash", "-c", SMOKE], home, env)
    took = time.perf_counter() - start
    names = [o.split("==") for o in call([str(bin/"pip"), "freeze"], home).splitlines() if "==" in o]
    have = {name.lower(): version for name, version in names}
    return ", ".join(f"{o} {have[o]}" for o in VERSIONS if o in have), took


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--python", nargs="+", default=["python3.11", "python3.12", "python3.13"])
    cases = ["cpu", "default", "lowest", *EXTRAS]
    p.add_argument("--cases", nargs="+", choices=cases, default=cases)
    p.add_argument("--keep", type=Path, help="folder for the environments, each deleted after its row")
    o = p.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory(dir=o.keep) as folder:
        wheel = build_wheel(Path(folder))
        print(f"{wheel.name}, {wheel.stat().st_size/1e6:.1f} MB\n")
        print("| Python | case | versions | smoke test, s | |\n|---|---|---|---|---|")
        for python in o.python:
            for case in o.cases:
                if case in EXTRAS and python != o.python[0]: continue
                home = Path(folder)/"row"
                home.mkdir()
                try:
                    versions, took = try_one(python, case, wheel, home)
                    print(f"| {python} | {case} | {versions} | {took:.0f} | works |", flush=True)
                except RuntimeError as e:
                    failed += 1
                    print(f"| {python} | {case} | | | FAILED |\n{e}", flush=True)
                shutil.rmtree(home)
    sys.exit(failed > 0)


if __name__ == "__main__": main()
