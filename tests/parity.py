"""Check the package against a set of reference values: `python tests/parity.py DIR`.

DIR holds MANIFEST.json and the arrays it names. A handler is a function `(case)` in a module of
`parity_cases/`, registered with `@check("csmae.backbone_eval_*")`; a case goes to the handler whose pattern
is the longest that fits. It reads inputs and constants from the case, calls the public API and hands every
output to `case.compare`; an output that is a known mistake of the published code goes to `case.divergent`
with a corrected value computed independently. A case passes when every output that the manifest lists was
covered. Nothing here knows the numbers of one set.
"""
import importlib
import json
import sys
import traceback
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from zlib import crc32

import numpy as np

HERE = Path(__file__).resolve().parent
HANDLERS = {}


def check(*patterns):
    "Register the decorated handler for the case ids that match one of `patterns` (wildcards allowed)."
    def decorate(handler):
        for pattern in patterns:
            known = HANDLERS.get(pattern)
            if known and (known.__module__, known.__name__) != (handler.__module__, handler.__name__):
                raise ValueError(f"two handlers for {pattern!r}: {known.__module__} and {handler.__module__}")
            HANDLERS[pattern] = handler
        return handler
    return decorate


def handler_of(case_id):
    "The handler with the longest pattern that matches, or None."
    fitting = [p for p in HANDLERS if fnmatch(case_id, p)]
    return HANDLERS[max(fitting, key=len)] if fitting else None


def load_handlers():
    "Import every module of `parity_cases/`, which registers its handlers."
    if str(HERE) not in sys.path: sys.path.insert(0, str(HERE))
    for path in sorted((HERE / "parity_cases").glob("[a-z]*.py")):
        importlib.import_module(f"parity_cases.{path.stem}")


@lru_cache(maxsize=8)
def _npz(path):
    with np.load(path, allow_pickle=False) as arrays: return {k: arrays[k] for k in arrays.files}


@lru_cache(maxsize=8)
def _json(path): return json.loads(Path(path).read_text())


def _read(folder, entry):
    "The stored value that one manifest entry (name, file, key) points to."
    path, key = str(folder / entry["file"]), entry["key"]
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file
        tensors = load_file(path)
        return tensors if key == "*" else tensors[key]
    if path.endswith(".json"):
        values = _json(path)
        whole = not isinstance(values, dict) or key not in values   # '<parameter name>', '[i]': all of it
        return values if whole else values[key]
    arrays = _npz(path)
    if not key.endswith("*"): return arrays[key]
    return {k.removeprefix(key[:-1]): v for k, v in arrays.items() if k.startswith(key[:-1])}


def _labels(entries):
    "Names of entries; those that share a name are told apart by their key."
    names = [e["name"] for e in entries]
    return [e["key"] if names.count(e["name"]) > 1 else e["name"] for e in entries]


class Case:
    "One case of a reference set: its constants, inputs and outputs, and what has been checked of them."

    def __init__(self, entry, folder, manifest):
        self.entry, self.folder, self.manifest = entry, Path(folder), manifest
        self.id, self.constants = entry["id"], entry.get("constants", {})
        self.quirks, self.tolerance = entry.get("quirks", []), entry.get("tolerance", {})
        self._in = dict(zip(_labels(entry["inputs"]), entry["inputs"], strict=True))
        self._out = dict(zip(_labels(entry["outputs"]), entry["outputs"], strict=True))
        self.covered, self.problems, self.reasons = set(), [], []

    def input_names(self): return list(self._in)
    def output_names(self): return list(self._out)

    def input(self, name):
        "An input: an array, or a dict of tensors for a whole safetensors file."
        return _read(self.folder, self._in[name])

    def inputs(self): return {name: self.input(name) for name in self._in}

    def output(self, name):
        "A stored output."
        return _read(self.folder, self._out[name])

    def constant(self, name):
        "A constant of this case, or of another that reads the same weights, or at least another same file."
        if name in self.constants: return self.constants[name]
        for weights_only in True, False:
            counts = lambda e, only=weights_only: not only or e["key"] == "*"
            files = {e["file"] for e in self.entry["inputs"] if counts(e)}
            for other in self.manifest["cases"]:
                shares = any(e["file"] in files for e in other["inputs"] if counts(e))
                if shares and name in other.get("constants", {}): return other["constants"][name]
        raise KeyError(f"{self.id} has no constant {name!r}, nor has a case with the same inputs")

    def other(self, case_id):
        "Another case of the same set, to read inputs or constants from."
        return Case(next(e for e in self.manifest["cases"] if e["id"] == case_id), self.folder, self.manifest)

    def recipe(self, tensors):
        "Fill a dict of tensors by the weight recipe of the set's README; names decide the values."
        seed = self.constants.get("recipe_seed", self.manifest.get("recipe_seed"))
        return recipe_weights(tensors, seed)

    def tolerance_of(self, name, like=None):
        "rtol and atol for one output; `like` names an entry of the tolerance that means a group of outputs."
        found = {k: self.tolerance[k] for k in ("rtol", "atol") if k in self.tolerance}
        for key, value in self.tolerance.items():
            own = key in (like, name) or name.endswith(f".{key}") or name.startswith(f"{key}.")
            if not own: continue
            if isinstance(value, str) and value.startswith("exact"): found = {}
            if isinstance(value, dict): found = {k: v for k, v in value.items() if k in ("rtol", "atol")}
        for word in "rtol", "atol":
            for stem in {name, like} - {None}:
                if f"{stem}_{word}" in self.tolerance: found[word] = self.tolerance[f"{stem}_{word}"]
        return {"rtol": 0.0, "atol": 0.0, **found}

    def compare(self, name, value, like=None, **override):
        "Check `value` against the stored output `name` under the case's tolerance, or rtol=, atol= given."
        if name not in self._out: raise KeyError(f"{self.id} has no output {name!r}")
        self.covered.add(name)
        tolerance = {**self.tolerance_of(name, like), **override}
        self.problems += [f"{name}{o}" for o in differences(value, self.output(name), **tolerance)]

    def divergent(self, names, value, corrected, reason, rtol=1e-5, atol=1e-6):
        "Check `value` against `corrected` instead of the stored outputs `names`, which hold a mistake."
        names = [names] if isinstance(names, str) else list(names)
        missing = [n for n in names if n not in self._out]
        if missing: raise KeyError(f"{self.id} has no output {missing}")
        if not self.quirks: self.problems.append(f"{names[0]} is declared divergent, but no quirk is named")
        self.covered.update(names)
        self.reasons.append(reason)
        what = '+'.join(names) + ' (corrected)'
        self.problems += [what + o for o in differences(value, corrected, rtol, atol)]

    def open_outputs(self): return [n for n in self._out if n not in self.covered]


def _plain(value):
    "Tensors as arrays; tuples as lists."
    if hasattr(value, "detach"): value = value.detach().cpu()
    if hasattr(value, "numpy") and not isinstance(value, np.ndarray): value = value.numpy()
    return list(value) if isinstance(value, tuple) else value


def differences(value, wanted, rtol=0.0, atol=0.0, where=""):
    "Sentences that say where `value` is not `wanted`; empty if they agree. Text and integers must be equal."
    value, wanted = _plain(value), _plain(wanted)
    if isinstance(wanted, dict):
        if not isinstance(value, dict): return [f"{where}: found {type(value).__name__}, wanted names"]
        odd = sorted(map(str, set(wanted) ^ set(value)))
        if odd: return [f"{where}: {len(odd)} names differ, such as {odd[:4]}"]
        return [o for k in wanted for o in differences(value[k], wanted[k], rtol, atol, f"{where}.{k}")]
    if wanted is None or isinstance(wanted, (str, bool)):
        return [] if value == wanted else [f"{where}: found {value!r}, wanted {wanted!r}"]
    if isinstance(wanted, list) and not all(type(o) in (int, float) for o in wanted):
        if len(value) != len(wanted): return [f"{where}: found {len(value)} items, wanted {len(wanted)}"]
        return [o for i, (a, b) in enumerate(zip(value, wanted, strict=True))
                for o in differences(a, b, rtol, atol, f"{where}[{i}]")]
    return _array_differences(np.asarray(value), np.asarray(wanted), rtol, atol, where)


def _array_differences(value, wanted, rtol, atol, where):
    if value.shape != wanted.shape: return [f"{where}: found shape {value.shape}, wanted {wanted.shape}"]
    if wanted.size == 0: return []
    if wanted.dtype.kind in "US": good = value == wanted
    elif wanted.dtype.kind in "iub": good = value == wanted
    else: good = np.isclose(value.astype(np.float64), wanted.astype(np.float64), rtol, atol, equal_nan=True)
    if np.all(good): return []
    first = np.unravel_index(np.argmin(good), wanted.shape)
    count = good.size - np.count_nonzero(good)
    text = f"{where}: {count} of {good.size} differ, first at {list(map(int, first))}"
    return [f"{text}: found {value[first]}, wanted {wanted[first]} (rtol {rtol}, atol {atol})"]


def recipe_weights(tensors, seed):
    "The weights that the set's README derives from names and shapes; tables and counters stay as they are."
    import torch
    filled, first_name = {}, {}
    for name, old in tensors.items():
        last = name.split(".")[-1]
        if last in ("pos_embed", "decoder_pos_embed", "num_batches_tracked"):
            filled[name] = old
            continue
        source = first_name.setdefault(old.data_ptr() or name, name)   # one tensor may have several names
        x = np.random.RandomState(crc32(f"{seed}:{source}".encode())).standard_normal(tuple(old.shape))
        if last in ("cls_token", "cls_token_s2", "mask_token"): x = 0.02 * x
        elif last == "running_mean": x = 0.1 * x
        elif last == "running_var": x = 1 + 0.1 * np.abs(x)
        elif x.ndim >= 2: x = x / np.sqrt(np.prod(x.shape[1:]))
        elif last == "weight": x = 1 + 0.1 * x
        else: x = 0.05 * x
        filled[name] = torch.from_numpy(x.astype(np.float32))
    return filled


def read_manifest(folder): return json.loads((Path(folder) / "MANIFEST.json").read_text())


def run_case(entry, folder, manifest):
    "Run one case: ('passed' | 'failed' | 'skipped' | 'divergent', why)."
    handler = handler_of(entry["id"])
    if handler is None: return "skipped", "system not built yet"
    case = Case(entry, folder, manifest)
    try: handler(case)
    except Exception as e:
        at = traceback.extract_tb(e.__traceback__)[-1]
        return "failed", f"{type(e).__name__}: {e} ({Path(at.filename).name} line {at.lineno})"
    missed = case.open_outputs()
    if missed: case.problems.append(f"not compared: {_few(missed, 4)}")
    if case.problems: return "failed", _few(case.problems, 3, "; ")
    return ("divergent", "; ".join(dict.fromkeys(case.reasons))) if case.reasons else ("passed", "")


def _few(parts, n, sep=", "): return sep.join([*parts[:n], *(["..."] if len(parts) > n else [])])


def main(folder, pattern="*"):
    "Print one line a case and the counts; the exit status is 1 if a case failed."
    from rsir_nb.machine import declare_torchvision_ops
    declare_torchvision_ops()
    load_handlers()
    manifest = read_manifest(folder)
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    for entry in manifest["cases"]:
        if not fnmatch(entry["id"], pattern): continue
        state, why = run_case(entry, Path(folder), manifest)
        counts["passed" if state == "divergent" else state] += 1
        print(f"{state} {entry['id']}" + (f": {why}" if why else ""), flush=True)
    print(", ".join(f"{n} {state}" for state, n in counts.items()))
    return int(counts["failed"] > 0)


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        print("usage: python tests/parity.py DIR [PATTERN]\n"
              "  DIR      a folder with MANIFEST.json\n  PATTERN  only case ids that match, e.g. 'csmae.*'")
        sys.exit(2)
    if not (Path(sys.argv[1]) / "MANIFEST.json").is_file():
        print(f"{sys.argv[1]} holds no MANIFEST.json; pass the folder of a reference set")
        sys.exit(2)
    from parity import main as run   # handlers import `parity`: use that copy of the registry, not __main__'s
    sys.exit(run(*sys.argv[1:]))
