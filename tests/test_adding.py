"""The claim of nbs/adding.ipynb, kept in a process of its own: its cells as one module, its YAML, and the `rsir` command."""
import json
import os
import re
import subprocess
import sys

import pytest

PAGE = "nbs/adding.ipynb"


@pytest.fixture(scope="module")
def home(root, tmp_path_factory):
    "A folder with the page's parts as `my_parts.py` and its config, which names the module as a plugin."
    folder = tmp_path_factory.mktemp("adding")
    code = ["".join(c["source"]) for c in json.loads((root/PAGE).read_text())["cells"] if c["cell_type"] == "code"]
    imports = next(o for o in code if "import Archive" in o)
    parts = [o for o in code if re.match(r"@[A-Z]+\.register", o)]
    kinds = re.findall(r"^@([A-Z]+)\.register", "\n".join(parts), re.M)
    assert sorted(kinds) == ["AUGMENTATIONS", "BACKBONES", "DATASETS", "DISTANCES", "INDEXES", "LOSSES", "METHODS", "METRICS", "SAMPLERS"]
    (folder/"my_parts.py").write_text("\n\n".join([imports, *parts]))
    text = next(re.search(r"'''(.+)'''", o, re.S)[1] for o in code if "mine.yaml').write_text" in o)
    assert "plugins: []" in text
    (folder/"mine.yaml").write_text(text.replace("plugins: []", "plugins: [my_parts]").lstrip())
    return folder


def rsir(home, *args, trusted="my_parts"):
    "What `rsir` prints, run in `home` with the folder on its path."
    path = os.pathsep.join([str(home), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "RSIR_PLUGINS": trusted}
    code = "import sys; from rsir_nb.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=home, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_a_module_and_a_yaml_are_enough(home):
    rsir(home, "pretrain", "mine.yaml", "out=runs/mine")
    with pytest.raises(AssertionError, match="cannot make us import"): rsir(home, "hash", "runs/mine", trusted="")
    rsir(home, "hash", "runs/mine")
    rsir(home, "index", "runs/mine")
    assert list(home.glob("runs/mine/**/s2.my_scan")), "the codes are searched with the index of the config"
    shown = rsir(home, "query", "runs/mine", "stripes_018", "--k", "3")
    assert "stripes_018" in shown and len(set(re.findall(r"stripes_\d+", shown))) == 4


def test_the_config_resolves_with_the_plugin_only(home):
    assert "my_stripes" in rsir(home, "pretrain", "mine.yaml", "--dry-run")
    with pytest.raises(AssertionError, match="my_stripes"):
        rsir(home, "pretrain", "mine.yaml", "plugins=[]", "--dry-run")


def test_a_saved_run_cannot_make_us_import(home, tmp_path):
    "A run's folder from somebody else names a module that lies in the path: nothing of it runs."
    (home/"spy.py").write_text("open('ran', 'w').close()")
    rsir(home, "pretrain", "mine.yaml", "--dry-run")
    code = ("from rsir_nb.config import load_config, save_config, load_run_config; from omegaconf import OmegaConf;"
            f"cfg = load_config('demo'); OmegaConf.set_struct(cfg, False); cfg.plugins = ['spy']; save_config(cfg, {str(tmp_path)!r});"
            f"load_run_config({str(tmp_path)!r})")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(home), *filter(None, [os.environ.get("PYTHONPATH")])])}
    done = subprocess.run([sys.executable, "-c", code], cwd=home, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "cannot make us import" in done.stderr and not (home/"ran").exists()
    subprocess.run([sys.executable, "-c", code], cwd=home, env={**env, "RSIR_PLUGINS": "spy"}, check=True, timeout=120)
    assert (home/"ran").exists(), "the spy would have been seen"
