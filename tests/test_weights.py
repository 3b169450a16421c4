"Published checkpoints: read completely, refused otherwise, and never trusted."
import os
import pickle
import zipfile
from functools import lru_cache

import pytest
import torch
from safetensors.torch import save_file

from rsir_nb.core import CorruptError, InputError, MissingFileError, RsirError, UnsafeFileError
from rsir_nb.models.decoder import CrossSensorDecoder
from rsir_nb.models.vit import MultiSensorViT
from rsir_nb.models.names import from_published_names, to_published_names
from rsir_nb.models.weights import infer_config, load_published, read_checkpoint

CHANS = dict(s1=2, s2=10)
SIZE = dict(img_size=40, patch_size=10, embed_dim=64, num_heads=1)


def make(specific=1, shared=1, decoder=None, pool="avg", n_bits=None):
    "A model and its published state dict."
    vit, published = _made(specific, shared, decoder, pool, n_bits)
    return vit, dict(published)


@lru_cache(maxsize=None)
def _made(specific, shared, decoder, pool, n_bits):
    torch.manual_seed(0)
    vit = MultiSensorViT(CHANS, specific_depth=specific, shared_depth=shared, global_pool=pool, **SIZE).eval()
    ours = {f"backbone.{k}": v for k, v in vit.state_dict().items()}
    if decoder:
        head = CrossSensorDecoder(CHANS, 64, vit.grid, 10, kind=decoder, embed_dim=32, depth=2, num_heads=1)
        ours |= {f"decoder.{k}": v for k, v in head.state_dict().items()}
    if n_bits:
        for m in CHANS:
            net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, n_bits))
            ours |= {f"heads.{m}.{k}": v for k, v in net.state_dict().items()}
    return vit, to_published_names(ours)


def bare(state): return {k.removeprefix("backbone."): v for k, v in state.items()}


@pytest.mark.parametrize("specific,shared", [(0, 2), (2, 0), (1, 2), (0, 0)])
@pytest.mark.parametrize("decoder", [None, "common", "specific"])
@pytest.mark.parametrize("pool", ["avg", "token"])
@pytest.mark.parametrize("kind", ["ckpt", "bare.pt", "safetensors"])
def test_every_form_is_loaded_whole(tmp_path, specific, shared, decoder, pool, kind):
    vit, published = make(specific, shared, decoder, pool)
    path = tmp_path / f"weights.{kind}"
    if kind == "ckpt": torch.save(dict(epoch=1, state_dict=published, optimizer_states=[{"lr": 0.1}]), path)
    elif kind == "bare.pt": torch.save(bare(published), path)
    else: save_file({k: v.clone() for k, v in published.items()}, path)
    weights = load_published(path)
    assert weights.config["backbone"] == dict(in_chans=CHANS, specific_depth=specific, shared_depth=shared,
        mlp_ratio=4.0, global_pool=pool, norm_eps=1e-6, **SIZE)
    assert (weights.config["decoder"] or {}).get("kind") == decoder
    x = torch.randn(2, 10, 40, 40)
    with torch.no_grad(): assert torch.equal(weights.make_backbone()(x, "s2"), vit(x, "s2"))
    head = weights.make_decoder()
    assert (head is None) == (decoder is None)
    if head: assert all(torch.equal(v, weights.part("decoder")[k]) for k, v in head.state_dict().items())


def test_hash_heads_and_other_names_for_the_sensors(tmp_path):
    _, published = make(n_bits=24)
    torch.save(bare(published), tmp_path / "cmmae.pt")
    weights = load_published(tmp_path / "cmmae.pt", modalities=("radar", "optical"))
    assert weights.config["n_bits"] == 24 and "hash heads: 24 bits" in weights.report
    assert weights.state_dict["heads.optical.2.weight"].shape == (24, 64)
    assert torch.equal(weights.state_dict["heads.radar.0.bias"], published["backbone.f.0.bias"])
    assert list(weights.config["backbone"]["in_chans"]) == ["radar", "optical"]


def test_the_trap_of_the_heads(tmp_path):
    "The number of heads is not in the file: the base size gets 12, not the 16 of the published class."
    state = {"backbone.pos_embed": torch.zeros(1, 65, 768)}
    for m, c in CHANS.items(): state[f"backbone.patch_embeds.{m}.proj.weight"] = torch.zeros(768, c, 15, 15)
    config = infer_config(state)["backbone"]
    assert (config["num_heads"], config["norm_eps"], config["img_size"]) == (12, 1e-6, 120)
    assert infer_config(state, num_heads=16)["backbone"]["num_heads"] == 16


def test_a_width_that_does_not_tell_its_heads(tmp_path):
    vit = MultiSensorViT(CHANS, 40, 10, 48, 4, 1, 1)
    ours = {f"backbone.{k}": v for k, v in vit.state_dict().items()}
    torch.save(to_published_names(ours), tmp_path / "w.pt")
    with pytest.raises(InputError, match="pass num_heads"): load_published(tmp_path / "w.pt")
    assert load_published(tmp_path / "w.pt", num_heads=4).config["backbone"]["num_heads"] == 4


def test_half_precision_is_read_as_float32(tmp_path):
    _, published = make()
    torch.save({k: v.half() for k, v in published.items()}, tmp_path / "half.pt")
    assert {v.dtype for v in load_published(tmp_path / "half.pt").state_dict.values()} == {torch.float32}


def every_name(): return sorted(make(decoder="common", n_bits=8)[1])


@pytest.mark.parametrize("name", every_name())
def test_no_tensor_may_be_missing_or_misshapen(tmp_path, name):
    _, published = make(decoder="common", n_bits=8)
    path = tmp_path / "w.pt"
    torch.save({k: v for k, v in published.items() if k != name}, path)
    with pytest.raises(InputError): load_published(path)
    *rest, last = published[name].shape
    torch.save({**published, name: torch.zeros(*rest, last + 1)}, path)
    with pytest.raises(InputError): load_published(path)


STRANGERS = ["backbone.zerone.0.weight", "backbone.blocks.1.norm1.weight", "head.weight",
             "backbone.blocks.99999999999.norm1.weight", "backbone.blocks.x.norm1.weight",
             "decoder.decoder_pred.weight", "backbone.blocks_s3.0.norm1.bias",
             "backbone.blocks_s1.1.norm1.bias"]


@pytest.mark.parametrize("extra", STRANGERS)
def test_no_tensor_may_be_left_over(tmp_path, extra):
    _, published = make(decoder="common")
    torch.save({**published, extra: torch.zeros(64)}, tmp_path / "w.pt")
    with pytest.raises(InputError): load_published(tmp_path / "w.pt")


def test_errors_name_the_tensor_and_the_file(tmp_path):
    _, published = make()
    name = "backbone.blocks_s2.0.attn.qkv.weight"
    torch.save({k: v for k, v in published.items() if k != name}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=f"w.pt.*{name}"): load_published(tmp_path / "w.pt")
    published[name] = torch.full((192, 64), float("inf"))
    torch.save(published, tmp_path / "w.pt")
    with pytest.raises(InputError, match="not finite.*attn.qkv"): load_published(tmp_path / "w.pt")


def test_names_go_there_and_back():
    for decoder in None, "common", "specific":
        _, published = make(decoder=decoder, n_bits=8)
        ours = from_published_names(published)
        assert to_published_names(ours) == published
        assert from_published_names(bare(published)).keys() == ours.keys()
    with pytest.raises(InputError, match="two sensors"): to_published_names(ours, ("a", "b", "c"))


# hostile files --------------------------------------------------------------------------------------

class Command:
    def __init__(self, text): self.text = text
    def __reduce__(self): return os.system, (self.text,)


def hostile_files(folder):
    "Files that run a command if opened by a trusting reader."
    run = Command(f"touch {folder}/pwned")
    torch.save(dict(state_dict={"a": torch.ones(2)}, x=run), folder / "zip.pt")
    torch.save(dict(a=run), folder / "old.pt", _use_new_zipfile_serialization=False)
    for protocol in range(6): (folder / f"raw{protocol}.pt").write_bytes(pickle.dumps(run, protocol))
    with zipfile.ZipFile(folder / "handmade.pt", "w") as z:
        z.writestr("a/data.pkl", pickle.dumps(run, 2))
        z.writestr("a/version", "3\n")
    (folder / "reduce.pt").write_bytes(b"cbuiltins\nexec\n(S'open(\"pwned\", \"w\")'\ntR.")
    (folder / "inst.pt").write_bytes(b"(S'touch pwned'\nios\nsystem\n.")
    return sorted(folder.glob("*.pt"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_file_runs_anything(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in hostile_files(tmp_path):
        with pytest.raises((UnsafeFileError, CorruptError)): load_published(path)
        assert not (tmp_path / "pwned").exists(), path.name
    with pytest.raises(UnsafeFileError, match="system"): read_checkpoint(tmp_path / "zip.pt")
    with pytest.raises(UnsafeFileError, match="exec"): read_checkpoint(tmp_path / "reduce.pt")


@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
def test_truncated_files_are_named(tmp_path, kind):
    _, published = make(specific=0)
    whole = tmp_path / "whole"
    if kind == "safetensors": save_file({k: v.clone() for k, v in published.items()}, whole)
    else: torch.save(published, whole, _use_new_zipfile_serialization=kind == "zip")
    content, cut = whole.read_bytes(), tmp_path / "cut.pt"
    for n in (0, 1, 9, 100, len(content) // 2, len(content) - 1):
        cut.write_bytes(content[:n])
        with pytest.raises(RsirError, match="cut.pt"): load_published(cut)


def test_a_flipped_byte_is_found(tmp_path):
    _, published = make(specific=0)
    path = tmp_path / "w.pt"
    torch.save(published, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptError, match="checksum"): load_published(path)


def test_files_that_are_no_checkpoint(tmp_path):
    with pytest.raises(MissingFileError): load_published(tmp_path / "none.pt")
    with pytest.raises(MissingFileError): load_published(tmp_path)
    (tmp_path / "text.pt").write_text("weights: see attachment")
    with pytest.raises(CorruptError): load_published(tmp_path / "text.pt")
    for value in [torch.ones(3), dict(a=1), {}, [torch.ones(2)], dict(state_dict={"a": 1})]:
        torch.save(value, tmp_path / "odd.pt")
        with pytest.raises(InputError): load_published(tmp_path / "odd.pt")
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="not those of a published system"): load_published(tmp_path / "other.pt")
