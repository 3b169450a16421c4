"Exported methods: the same embeddings and codes as the method, in both formats; files that could run code; what is refused."
import contextlib
import io
import json
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_run import tiny_config

from rsir_nb.cli import main
from rsir_nb.core import CorruptError, InputError, MissingFileError, UnknownNameError, UnsafeFileError
from rsir_nb.engine.export import RawEncoder, export, trace_method
from rsir_nb.engine.exported import ExportedMethod, check_program
from rsir_nb.engine.hash import train_hash
from rsir_nb.engine.parts import load_method
from rsir_nb.engine.train import pretrain
from rsir_nb.methods.baselines import BandQuantiles, BandStatistics
from rsir_nb.methods.cmmae import CMMAE
from rsir_nb.methods.cross_modal import CrossModal
from rsir_nb.methods.csmae import CSMAE
from rsir_nb.methods.hashing import HashHeads
from rsir_nb.methods.margin import MarginMethod
from rsir_nb.methods.universal import Universal
from rsir_nb.retrieval.codes import binarise, pack_bits

MAE = dict(img_size=30, embed_dim=16, num_heads=2, specific_depth=1, shared_depth=1, decoder=None)
VIT = dict(name="vit", embed_dim=16, depth=1, num_heads=2)
METHODS = dict(
    csmae=lambda: CSMAE(["s1", "s2"], **MAE), cmmae=lambda: CMMAE(["s1", "s2"], **MAE),
    margin=lambda: MarginMethod(["s2"], vocab=["a", "b"], img_size=30, backbone=VIT, sizes=[8], standardise=True),
    cross_modal=lambda: CrossModal(["s1", "s2"], img_size=30, backbone=VIT, projection=dict(name="mlp", embed_dim=8)),
    band_quantiles=lambda: BandQuantiles(["s2"], img_size=None),
    universal=lambda: Universal(["rgb"], dict(name="timm", model="convnext_atto"), ["a", "b"], img_size=30, input_size=64),
    swapped=lambda: CSMAE(["s2"], transpose=True, band_orders=dict(s2=["B12", "B11", "B8A", "B08", "B07", "B06", "B05", "B04", "B03", "B02"]), **MAE))


def images(modality, n=9, size=30):
    g = torch.Generator().manual_seed(3)
    if modality == "rgb": return torch.randint(0, 256, (n, 3, size, size), generator=g, dtype=torch.uint8)
    return dict(s1=-14 + 3*torch.randn(n, 2, size, size, generator=g), s2=1500 + 500*torch.randn(n, 10, size, size, generator=g))[modality]


def close(a, b): torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-5, atol=1e-5*max(1, float(torch.as_tensor(b).abs().max())))


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return CSMAE(["s1", "s2"], **MAE).eval()


@pytest.fixture(scope="module")
def file(small, tmp_path_factory): return export(small, tmp_path_factory.mktemp("export")/"s2.pt2", "s2")


@pytest.mark.parametrize("name", METHODS)
def test_a_program_gives_the_embeddings_of_the_method(name, tmp_path):
    torch.manual_seed(1)
    method = METHODS[name]().eval()
    m = list(method.sensors)[-1]
    exported = ExportedMethod(export(method, tmp_path/"x.pt2", m, size=30 if method.img_size is None else None))
    x = images(m)
    for n in (1, 2, 9): close(exported.embed(x[:n]), method.embed(x[:n], m))
    assert exported.about["weights_hash"] == method.weights_hash and exported.sensor == method.sensors[m]
    assert exported.about["preprocessing"]["statistics"] == method.inputs.stats()[m]


def test_codes_are_those_of_the_method(small, tmp_path):
    torch.manual_seed(2)
    small.heads = HashHeads(dict(s1=16, s2=16), n_bits=24).eval()
    try:
        exported, x = ExportedMethod(export(small, tmp_path/"x.pt2", "s1")), images("s1")
        assert exported.n_bits == 24
        np.testing.assert_array_equal(exported.codes(x), pack_bits(binarise(small.hash(small.embed(x, "s1"), "s1"))))
        plain = ExportedMethod(export(small, tmp_path/"y.pt2", "s1", codes=False))
        with pytest.raises(InputError, match="makes no codes"): plain.codes(x)
    finally: small.heads = None


def test_bytes_go_in_as_they_are_or_as_numbers(tmp_path):
    method = Universal(["rgb"], VIT, ["a", "b"], img_size=30).eval()
    bytes_, numbers = (ExportedMethod(export(method, tmp_path/f"{o}.pt2", dtype=o)) for o in ("uint8", "float32"))
    x = images("rgb")
    wanted = method.embed(x, "rgb")
    for given in (x, x.float(), x.numpy()): close(bytes_.embed(given), wanted)
    close(numbers.embed(x), wanted)
    close(numbers.embed(x*.5), method.embed(x*.5, "rgb"))
    with pytest.raises(InputError, match="whole numbers from 0 to 255"): bytes_.embed(x*.5)
    with pytest.raises(InputError, match="whole numbers"): bytes_.embed(x.float() + 300)


def test_onnx(small, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'rsir_nb[export]'")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install 'rsir_nb[export]'")
    method = Universal(["rgb"], dict(name="timm", model="convnext_atto"), ["a", "b"], img_size=30, input_size=64).eval()
    method.heads = HashHeads(dict(rgb=64), n_bits=16).eval()
    path, x = export(method, tmp_path/"x.onnx"), images("rgb")
    for n in (1, 9): close(ExportedMethod(path).embed(x[:n]), method.embed(x[:n], "rgb"))
    np.testing.assert_array_equal(ExportedMethod(path).codes(x), pack_bits(binarise(method.hash(method.embed(x, "rgb"), "rgb"))))
    session = onnxruntime.InferenceSession(str(path))
    assert [(o.name, o.type) for o in session.get_inputs()] == [("images", "tensor(uint8)")]
    z, codes = session.run(None, dict(images=x.numpy()))
    close(z, method.embed(x, "rgb"))
    assert codes.dtype == np.uint8 and codes.shape == (9, 2)
    close(ExportedMethod(export(small, tmp_path/"s2.onnx", "s2")).embed(images("s2")), small.embed(images("s2"), "s2"))


def test_torch_alone_can_use_the_program(file, small):
    program, x = torch.export.load(str(file)).module(), images("s2", 4)
    with torch.no_grad(): close(program(x), small.embed(x, "s2"))


# files that are not to be trusted -----------------------------------------------------------------

class Evil:
    def __reduce__(self): return (Path.touch, (Path("touched"),))


def changed(file, path, changes):
    "A copy of an archive in which members were replaced, or added below its first folder."
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(path, "w") as new:
        top = old.namelist()[0].partition("/")[0]
        for o in old.namelist():
            inner = o.partition("/")[2]
            data = old.read(o)
            new.writestr(o, changes.pop(inner)(data) if inner in changes else data)
        for inner, make in changes.items(): new.writestr(f"{top}/{inner}", make(b""))
    return path


def in_json(change):
    def make(data):
        found = json.loads(data)
        change(found)
        return json.dumps(found)
    return make


def pickled(_):
    file = io.BytesIO()
    torch.save((Evil(),), file)
    return file.getvalue()


def of_graph(change): return {"models/model.json": in_json(lambda o: change(o["graph_module"]["graph"]))}


@pytest.mark.parametrize("changes,said", [
    ({"data/sample_inputs/model.pt": pickled}, "pickled example inputs"), ({"data/weights/model.pt": pickled}, "data/weights/model.pt"),
    ({"data/aotinductor/model/x.so": lambda _: b"\x7fELF"}, "aotinductor"),
    ({"data/weights/model_weights_config.json": in_json(lambda o: next(iter(o["config"].values())).update(use_pickle=True))}, "use_pickle"),
    ({"models/model.json": in_json(lambda o: o.update(guards_code=["__import__('os')"]))}, "guards_code"),
    (of_graph(lambda o: o["nodes"][0].update(target="torch.hub.load")), "target torch.hub.load"),
    (of_graph(lambda o: next(iter(o["sym_int_values"].values()))["as_expr"].update(expr_str="__import__('os').getcwd()")), "expr_str"),
], ids=lambda o: o if isinstance(o, str) else "")
def test_a_file_that_could_run_code_is_refused(file, tmp_path, monkeypatch, changes, said):
    monkeypatch.chdir(tmp_path)
    check_program(file)
    path = changed(file, tmp_path/"evil.pt2", dict(changes))
    with pytest.raises(UnsafeFileError, match=said): ExportedMethod(path)
    assert not Path("touched").exists()


def test_torch_itself_would_have_run_it(file, tmp_path, monkeypatch):
    "What the check is for; once torch refuses this too, the check may go."
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(Exception): torch.export.load(str(changed(file, tmp_path/"evil.pt2", {"data/sample_inputs/model.pt": pickled})))
    assert Path("touched").exists()


def test_damaged_and_strange_files(file, tmp_path):
    (tmp_path/"cut.pt2").write_bytes(file.read_bytes()[:-3000])
    with pytest.raises(CorruptError, match="cut.pt2 cannot be read"): ExportedMethod(tmp_path/"cut.pt2")
    with pytest.raises(MissingFileError, match="is not there"): ExportedMethod(tmp_path/"none.pt2")
    with pytest.raises(InputError, match="none that rsir exported"): ExportedMethod(changed(file, tmp_path/"x.pt2", {"extra/rsir.json": lambda _: "{}"}))
    (tmp_path/"text.onnx").write_text("no model")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'rsir_nb[export]'")
    with pytest.raises(CorruptError, match="text.onnx cannot be read"): ExportedMethod(tmp_path/"text.onnx")


def test_pickle_is_what_the_evil_file_uses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Evil()))
    assert Path("touched").exists()


# what is refused ----------------------------------------------------------------------------------

@pytest.mark.parametrize("kwargs,error,word", [
    (dict(), InputError, "--sensor s1 or --sensor s2"), (dict(modality="s3"), UnknownNameError, "did you mean s"),
    (dict(modality="s1", codes=True), InputError, "no hash heads"), (dict(modality="s1", dtype="int8"), UnknownNameError, "uint8"),
    (dict(modality="s1", size=60), InputError, "images of one size")])
def test_wrong_arguments(small, tmp_path, kwargs, error, word):
    with pytest.raises(error, match=word): export(small, tmp_path/"x.pt2", **kwargs)
    with pytest.raises(InputError, match="wanted .pt2 or .onnx"): export(small, tmp_path/"x.pth", "s1")
    assert list(tmp_path.iterdir()) == []


def test_methods_that_cannot_be_exported(tmp_path):
    stats = BandStatistics(["s2"], img_size=None).fit([dict(s2=o) for o in images("s2")])
    with pytest.raises(InputError, match="images of any size"): export(stats, tmp_path/"x.pt2")
    with pytest.raises(InputError, match="BandStatistics cannot be exported.*Method.load"): export(stats, tmp_path/"x.pt2", size=30)
    fused = METHODS["cross_modal"]()
    with pytest.raises(InputError, match="fused of several"): export(fused, tmp_path/"x.pt2", "s1+s2")
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_differs_is_not_kept(small, tmp_path, monkeypatch):
    real = RawEncoder.forward
    monkeypatch.setattr(RawEncoder, "forward", lambda self, images: real(self, images)*1.001)
    with pytest.raises(InputError, match="gives other embeddings"): export(small, tmp_path/"x.pt2", "s1")
    assert list(tmp_path.iterdir()) == []


def test_images_that_do_not_fit(file):
    exported = ExportedMethod(file)
    with pytest.raises(InputError, match="wanted 10"): exported.embed(images("s1"))
    with pytest.raises(InputError, match="30 x 30"): exported.embed(images("s2", size=20))


def test_without_the_packages_for_onnx(small, file, tmp_path, monkeypatch):
    for name in "onnxscript", "onnxruntime", "onnx": monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingFileError, match=r"rsir_nb\[export\]"): export(small, tmp_path/"x.onnx", "s1")
    (tmp_path/"y.onnx").write_bytes(b"x")
    with pytest.raises(MissingFileError, match=r"rsir_nb\[export\]"): ExportedMethod(tmp_path/"y.onnx")


def test_tracing_keeps_quiet(small, capfd):
    class Erratic(CSMAE):
        def encode(self, x, modality): return super().encode(x if x.sum() > 0 else -x, modality)
    with pytest.raises(InputError, match="Erratic cannot be exported"): trace_method(RawEncoder(Erratic(["s1"], **MAE), "s1"), images("s1", 2))
    out = capfd.readouterr()
    assert out.out == "" and "GraphModule" not in out.err


# the command --------------------------------------------------------------------------------------

def test_the_command(tmp_path, capsys):
    run = pretrain(tiny_config(tmp_path/"run", "optim.epochs=1"), progress=False)
    assert main(["export", str(run), str(tmp_path/"m.pt2")]) == 2
    assert "--sensor s1 or --sensor s2" in capsys.readouterr().err
    train_hash(run, progress=False)
    assert main(["export", str(run), str(tmp_path/"m.pt2"), "--sensor", "s2"]) == 0
    assert "m.pt2: " in capsys.readouterr().out
    exported, method = ExportedMethod(tmp_path/"m.pt2"), load_method(run)
    assert exported.n_bits == 16 and exported.about["weights_hash"] == method.weights_hash
    close(exported.embed(images("s2")), method.embed(images("s2"), "s2"))
    assert main(["export", str(tmp_path/"nothing"), str(tmp_path/"n.pt2")]) == 2
