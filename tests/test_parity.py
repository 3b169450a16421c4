"Every case of the reference set beside the repository, through the public API (see parity.py)."
import os
from pathlib import Path

import pytest

import parity

FOLDER = Path(os.environ.get("RSIR_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "golden"
MANIFEST = parity.read_manifest(FOLDER) if (FOLDER / "MANIFEST.json").is_file() else {"cases": []}
parity.load_handlers()


@pytest.mark.skipif(not MANIFEST["cases"], reason="no ../shared/golden: reference values are not here")
@pytest.mark.parametrize("entry", MANIFEST["cases"], ids=lambda e: e["id"])
def test_case(entry):
    state, why = parity.run_case(entry, FOLDER, MANIFEST)
    if state == "skipped": pytest.skip(why)
    assert state in ("passed", "divergent"), why


def test_differences_are_found():
    assert parity.differences([1.0, 2.0], [1.0, 2.0 + 1e-9], rtol=1e-6) == []
    assert parity.differences({"a": "x"}, {"a": "x"}) == []
    assert "2 of 3 differ" in parity.differences([1, 0, 0], [1, 2, 3])[0]
    assert "shape" in parity.differences([[1.0]], [1.0])[0]
    assert "names differ" in parity.differences({"a": 1}, {"b": 1})[0]


def made_up_case(tmp_path, **entry):
    import numpy as np
    x = np.arange(3.0)
    np.savez(tmp_path / "x.npz", **{"in.x": x, "out.y": x * 2, "out.z": np.zeros(2)})
    io = lambda kind, name: dict(name=name, file="x.npz", key=f"{kind}.{name}")
    entry |= dict(id="made.up", system="made up", tolerance={"rtol": 1e-6})
    return dict(inputs=[io("in", "x")], outputs=[io("out", "y"), io("out", "z")], **entry)


def test_an_output_that_is_not_compared_fails_the_case(tmp_path, monkeypatch):
    entry = made_up_case(tmp_path)
    monkeypatch.setitem(parity.HANDLERS, "made.*", lambda case: case.compare("y", case.input("x") * 2))
    assert parity.run_case(entry, tmp_path, {"cases": [entry]}) == ("failed", "not compared: z")


@pytest.mark.parametrize("quirks,state", [([], "failed"), (["z is wrong"], "divergent")])
def test_divergence_needs_a_quirk(tmp_path, monkeypatch, quirks, state):
    def handler(case):
        case.compare("y", case.input("x") * 2)
        case.divergent("z", [1.0, 1.0], [1.0, 1.0], "ones are meant")
    entry = made_up_case(tmp_path, quirks=quirks)
    monkeypatch.setitem(parity.HANDLERS, "made.*", handler)
    assert parity.run_case(entry, tmp_path, {"cases": [entry]})[0] == state
