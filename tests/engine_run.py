"Small runs of the engine, for the tests of its pages."
import os
import subprocess
import sys
from pathlib import Path

from rsir_nb.config import load_config

HERE = Path(__file__).resolve().parent
TINY = ["plugins=[tiny_plugin]", "data=tiny_pairs", "method=csmae", "method.patch_size=15", "method.embed_dim=16",
        "method.num_heads=2", "method.specific_depth=1", "method.shared_depth=1", "method.decoder_embed_dim=16",
        "method.decoder_depth=1", "method.decoder_num_heads=2", "optim.epochs=3", "optim.warmup_epochs=1",
        "optim.lr=1e-3", "trainer.batch_size=4", "trainer.pictures=0", "hash.n_bits=16", "hash.epochs=5",
        "hash.min_steps=20", "evaluate.drawings=100"]


def tiny_config(out, *changes):
    "The config of a run of seconds; with another method the keys of this one are left out."
    if str(HERE) not in sys.path: sys.path.insert(0, str(HERE))
    other = any(o.startswith("method=") for o in changes)
    kept = [o for o in TINY if not (other and o.startswith("method"))]
    return load_config("base", [*kept, f"out={out}", *changes])


def run_python(code, **env):
    "Run `code` in a process of its own, with `tests` on its path; returns its exit status."
    env = {**os.environ, "PYTHONPATH": str(HERE), **{k: str(v) for k, v in env.items()}}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    if done.returncode > 0: raise AssertionError(done.stderr[-3000:])
    return done.returncode
