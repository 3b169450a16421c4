"CMMAE: the supervised term for any number of sensors, both stages, published weights of both systems."
import json
import signal
from functools import lru_cache

import numpy as np
import pytest
import torch
from engine_run import HERE, run_python
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from test_weights import Command

from rsir_nb.all import import_pages
from rsir_nb.config import load_config
from rsir_nb.checksums import read_sealed, write_sealed
from rsir_nb.core import METHODS, CorruptError, InputError, RsirError, UnknownNameError, UnsafeFileError
from rsir_nb.machine import declare_torchvision_ops
from rsir_nb.data.base import TensorArchive
from rsir_nb.data.classes import Vocab
from rsir_nb.data.module import ArchiveData
from rsir_nb.simulate.synthetic import SyntheticArchive
from rsir_nb.engine.encode import encode_run
from rsir_nb.engine.evaluate import evaluate
from rsir_nb.engine.hash import train_hash
from rsir_nb.engine.retriever import Retriever
from rsir_nb.engine.loop import Training
from rsir_nb.engine.parts import load_method
from rsir_nb.engine.train import pretrain, read_history
from rsir_nb.methods.base import Method
from rsir_nb.methods.cmmae import CMMAE
from rsir_nb.methods.csmae import CSMAE
from rsir_nb.methods.hashing import HashHeads
from rsir_nb.models.names import LAYOUTS, recognise, to_published_names
from rsir_nb.models.weights import load_published
from rsir_nb.retrieval.codes import binarise
from rsir_nb.sensors import BAND_ORDERS, norm_stats, reorder_bands

declare_torchvision_ops()
import pytorch_lightning as pl

TINY = dict(img_size=30, patch_size=6, embed_dim=32, num_heads=2, specific_depth=1, shared_depth=1,
            decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
VESSEL = dict(TINY, specific_depth=0, shared_depth=2, global_pool="token", reconstruction_loss="l1", norm="vessel")
WET = dict(water=["Inland waters", "Marine waters"], towns="Urban fabric")


@lru_cache(maxsize=None)
def synthetic(): return SyntheticArchive(n_places=6, patches_per_place=4, seed=3, img_size=30)


def archive_of(*modalities):
    "The synthetic archive with only these sensors."
    whole = synthetic()
    arrays = {m: torch.stack([whole[i][m] for i in range(len(whole))]) for m in modalities}
    return TensorArchive(arrays, labels=whole.class_names, vocab=whole.vocab)


def batch_of(archive): return {k: torch.stack([archive[i][k] for i in range(len(archive))])
                               for k in [*archive.sensors, "labels"]}


def quiet_trainer(**kw):
    return pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False, **kw)


# ---- training

@pytest.mark.parametrize("modalities", [("s1",), ("s2",), ("s1", "s2")])
@pytest.mark.parametrize("weight", [0, 1])
def test_one_step_on_the_synthetic_archive(modalities, weight):
    torch.manual_seed(0)
    archive = archive_of(*modalities)
    method = CMMAE(modalities, supervised_weight=weight, supervised_classes=WET if weight else None, **TINY)
    before = {k: v.clone() for k, v in method.named_parameters()}
    quiet_trainer(max_steps=1).fit(Training(method), datamodule=ArchiveData(archive, batch_size=8))
    moved = [k for k, v in method.named_parameters() if v.requires_grad and not torch.equal(v, before[k])]
    assert {k.split(".")[0] for k in moved} == {"backbone", "decoder"} | ({"classifier"} if weight else set())
    assert method.vocab == (list(archive.vocab) if weight else None)


@pytest.mark.parametrize("modalities", [("s2",), ("s1", "s2")])
@pytest.mark.parametrize("pool", ["avg", "token"])
def test_the_supervised_term_goes_down(modalities, pool):
    torch.manual_seed(0)
    archive = archive_of(*modalities)
    method = CMMAE(modalities, supervised_weight=1, supervised_classes=WET, global_pool=pool, **TINY).fit_labels(archive)
    batch, adam, curve = batch_of(archive), torch.optim.AdamW(method.parameters(), 3e-3), []
    for i in range(30):
        terms = method.losses(batch, generator=torch.Generator().manual_seed(i))
        adam.zero_grad()
        terms["loss"].backward()
        adam.step()
        curve.append(terms["supervised"].item())
    assert curve[-1] < 0.6*curve[0]
    y = method.targets(batch["labels"])
    right = [((method.class_scores(batch[m], m) > 0.5) == (y > 0.5)).float().mean().item() for m in modalities]
    chance = torch.maximum(y.mean(0), 1 - y.mean(0)).mean().item()
    assert min(right) > chance


def test_the_term_is_binary_cross_entropy_of_the_embedding():
    archive = archive_of("s1", "s2")
    method, batch = CMMAE(["s1", "s2"], supervised_weight=0.3, supervised_classes=WET, **TINY).fit_labels(archive), batch_of(archive)
    terms = method.losses(batch, generator=torch.Generator().manual_seed(0))
    y = np.array([[any("waters" in o for o in names), "Urban fabric" in names] for names in archive.class_names], float)
    w, b = (o.detach().double().numpy() for o in (method.classifier.weight, method.classifier.bias))
    parts = []
    for m in ("s1", "s2"):
        p = 1/(1 + np.exp(-(method.embed(batch[m], m).double().numpy() @ w.T + b)))
        parts.append(-(y*np.log(p) + (1 - y)*np.log(1 - p)).mean())
    assert np.isclose(terms["supervised"].item(), np.mean(parts), rtol=1e-5)
    assert np.isclose(terms["loss"].item(), 0.3*terms["supervised"].item() + sum(v.item() for k, v in terms.items()
                                                                               if k not in ("loss", "supervised")), rtol=1e-5)
    plain = CSMAE(["s1", "s2"], **TINY)
    plain.load_state_dict({k: v for k, v in method.state_dict().items() if not k.startswith("classifier")})
    same = plain.losses(batch, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(same[k], terms[k]) for k in same if k != "loss"), "the rest is CSMAE, whatever the labels"
    method.losses({m: batch[m] for m in ("s1", "labels")})["supervised"].backward()
    assert method.backbone.patch_embeds["s1"].proj.weight.grad.abs().sum() > 0


def test_in_half_precision():
    archive = archive_of("s1", "s2")
    method = CMMAE(["s1", "s2"], supervised_weight=1, supervised_classes=WET, **TINY).fit_labels(archive)
    g = lambda: torch.Generator().manual_seed(0)
    wanted = method.losses(batch_of(archive), generator=g())
    with torch.autocast("cpu", torch.bfloat16): found = method.losses(batch_of(archive), generator=g())
    assert found["supervised"].dtype == torch.float32
    for k, v in wanted.items(): torch.testing.assert_close(found[k].float(), v, rtol=0.05, atol=0.05)


def test_targets_by_name():
    archive = archive_of("s2")
    labels = batch_of(archive)["labels"]
    one = CMMAE(["s2"], supervised_weight=1, supervised_classes="marine waters", **TINY).fit_labels(archive)
    assert one.targets(labels)[:, 0].tolist() == [float("Marine waters" in o) for o in archive.class_names]
    every = CMMAE(["s2"], supervised_weight=1, **TINY).fit_labels(archive)
    assert torch.equal(every.targets(labels), labels) and every.classifier.out_features == len(archive.vocab)
    torch.manual_seed(1)
    again = CMMAE(["s2"], supervised_weight=1, **TINY).fit_labels(archive)
    assert torch.equal(again.classifier.weight, every.classifier.weight), "its first weights follow from the seed"
    turned = TensorArchive(archive.arrays, labels=archive.class_names, vocab=Vocab(tuple(archive.vocab)[::-1]))
    one.fit_labels(turned)
    assert one.targets(labels.flip(1))[:, 0].tolist() == [float("Marine waters" in o) for o in archive.class_names]
    with pytest.raises(InputError, match="other classes.*supervised_classes"): every.fit_labels(turned)


# ---- what cannot be learned from

def test_labels_that_cannot_teach():
    archive = archive_of("s2")
    make = lambda **kw: CMMAE(["s2"], supervised_weight=1, **kw, **TINY)
    with pytest.raises(InputError, match="needs labels.*24 of 24"): make().fit_labels(TensorArchive(archive.arrays))
    some = TensorArchive(archive.arrays, labels=archive.class_names, vocab=archive.vocab)
    some.table.at[3, "labels"] = None
    with pytest.raises(InputError, match="1 of 24 patches without"): make().fit_labels(some)
    towns = archive.subset(np.array(["Urban fabric" in o for o in archive.class_names]))
    with pytest.raises(InputError, match="one class only.*'Urban fabric' in all"): make(supervised_classes=["Urban fabric"]).fit_labels(towns)
    same = TensorArchive(archive.arrays, labels=[["Urban fabric"]]*len(archive))
    with pytest.raises(InputError, match="one class only"): make().fit_labels(same)
    with pytest.raises(UnknownNameError, match="Urban fabric"): make(supervised_classes=["Urban fabrik"]).fit_labels(archive)
    for wanted in ([], {}, {"a": []}):
        with pytest.raises(InputError, match="needs classes"): make(supervised_classes=wanted)


def test_batches_that_cannot_teach():
    archive = archive_of("s1", "s2")
    batch = batch_of(archive)
    method = CMMAE(["s1", "s2"], supervised_weight=1, supervised_classes=WET, **TINY)
    with pytest.raises(InputError, match="call fit_labels"): method.losses(batch)
    method.fit_labels(archive)
    with pytest.raises(InputError, match="has no labels"): method.losses({m: batch[m] for m in ("s1", "s2")})
    with pytest.raises(InputError, match="3 columns.*19"): method.losses({**batch, "labels": batch["labels"][:, :3]})
    known = torch.arange(len(batch["labels"])) != 1
    with pytest.raises(InputError, match="every patch; found none on b;"):   # a row of zeros would mean no to every class
        method.losses({**batch, "id": [*"abcdefgh"], "labelled": known})
    lone = {k: o[:1] for k, o in batch.items()}
    with pytest.raises(InputError, match="a batch of one place"): method.losses(lone)
    assert method.eval().losses(lone)["mim"].item() == 0
    assert "mim" not in CMMAE(["s1", "s2"], mim_weight=0, **TINY).losses(lone)
    for weights in dict(umr_weight=0), dict(umr_weight=0, mde_weight=1):
        with pytest.raises(InputError, match="need a second one"): CMMAE(["s1"], **weights, **TINY)
    assert CMMAE(["s1"], umr_weight=0, supervised_weight=1, **TINY).embed_dim == 32
    with pytest.raises(InputError, match="nothing to learn from"):
        CMMAE(["s1", "s2"], umr_weight=0, cmr_weight=0, mim_weight=0, **TINY).losses(batch)


# ---- codes and files

@pytest.fixture(scope="module", params=[("s2",), ("s1", "s2")], ids=len)
def trained(request):
    torch.manual_seed(0)
    archive = archive_of(*request.param)
    method = CMMAE(request.param, supervised_weight=1, supervised_classes=WET, **TINY)
    quiet_trainer(max_steps=2).fit(Training(method), datamodule=ArchiveData(archive, batch_size=8))
    method.heads = HashHeads(dict.fromkeys(request.param, 32), 32)
    return method.eval(), archive


def test_an_image_has_one_code_in_any_company(trained):
    method, archive = trained
    x = {m: torch.cat([o]*3)[:64] for m, o in batch_of(archive).items() if m in archive.sensors}
    code = lambda z, m: binarise(method.hash(z, m))
    for m in x:
        whole = method.embed(x[m], m)
        assert whole.shape == (64, 32)
        for size in 1, 2:
            parts = torch.cat([method.embed(o, m) for o in x[m].split(size)])
            assert torch.equal(parts, whole), (m, size)
            assert np.array_equal(np.concatenate([code(o, m) for o in parts.split(size)]), code(whole, m))
        assert torch.equal(method.embed(x)[m], whole), "paired calls"
        assert torch.equal(method.embed(x[m].flip(0), m).flip(0), whole)
        assert torch.equal(torch.cat([method.class_scores(o, m) for o in x[m].split(2)]), method.class_scores(x[m], m))


def test_save_and_load(trained, tmp_path):
    method, archive = trained
    method.save(tmp_path/"m")
    again, x = Method.load(tmp_path/"m"), batch_of(archive)
    assert type(again) is CMMAE and again.weights_hash == method.weights_hash
    assert again.vocab == method.vocab and again.classes == dict(water=["Inland waters", "Marine waters"], towns=["Urban fabric"])
    for m in archive.sensors:
        assert torch.equal(again.hash(again.embed(x[m], m), m), method.hash(method.embed(x[m], m), m))
        assert torch.equal(again.class_scores(x[m], m), method.class_scores(x[m], m))
    g = lambda: torch.Generator().manual_seed(0)
    assert torch.equal(again.losses(x, generator=g())["loss"], method.losses(x, generator=g())["loss"])
    weights = load_file(tmp_path/"m"/"model.safetensors")
    del weights["classifier.bias"]
    save_file(weights, tmp_path/"m"/"model.safetensors")
    with pytest.raises(CorruptError, match="model.safetensors is damaged"): Method.load(tmp_path/"m")
    about = read_sealed(tmp_path/"m"/"method.json")
    write_sealed(tmp_path/"m"/"method.json", {k: v for k, v in about.items() if k != "files"})    # as an earlier version wrote it
    with pytest.raises(CorruptError, match="classifier.bias"): Method.load(tmp_path/"m")


# ---- configs

def settings(name, monkeypatch):
    import_pages()
    monkeypatch.setenv("RSIR_DATA", "archives")
    return load_config(name)


def count(module): return sum(o.numel() for o in module.parameters())


def build_whole(cfg, sensors, img_size):
    "The network of a config at full size, without memory; its statistics are those of no table there."
    told = {k: v for k, v in OmegaConf.to_container(cfg.method).items() if k != "name"}
    with torch.device("meta"):
        method = METHODS.create(cfg.method.name, sensors=sensors, img_size=img_size, **{**told, "norm": None})
        return method, HashHeads(dict.fromkeys(method.sensors, method.embed_dim), cfg.hash.n_bits, cfg.hash.hidden_dim)


def test_config_cmmae_has_the_published_numbers(monkeypatch):
    cfg = settings("cmmae", monkeypatch)
    m, o, t = cfg.method, cfg.optim, cfg.trainer
    assert (m.name, m.specific_depth, m.shared_depth, m.decoder, m.supervised_weight) == ("cmmae", 10, 2, "specific", 0)
    assert (m.patch_size, m.mask_ratio, m.temperature, m.masking, m.reconstruction) == (15, 0.5, 0.5, "random", "disjoint")
    assert (m.umr_weight, m.cmr_weight, m.mim_weight, m.mde_weight, m.norm) == (1, 1, 1, 0, "ben_v1")
    assert (o.lr, o.weight_decay, list(o.betas), o.epochs, o.warmup_epochs) == (1e-4, 0.05, [0.9, 0.95], 150, 10)
    assert (t.batch_size, t.precision, cfg.seed, cfg.evaluate.protocol) == (128, "16-mixed", 42, "da4dte")
    h = cfg.hash
    assert (h.n_bits, h.epochs, h.lr, h.weight_decay, h.quantisation, h.balance, h.published_sums) == \
        (128, 25, 1e-4, 0.01, 0.001, 0.01, True)
    method, heads = build_whole(cfg, ["s1", "s2"], 120)
    assert (count(method.backbone), count(heads), count(method.decoder)) == (158_065_920, 2*689_024, 52_680_332)
    assert count(method) == 158_065_920 + 52_680_332


def test_config_cmmae_vessel(monkeypatch):
    cfg = settings("cmmae_vessel", monkeypatch)
    m = cfg.method
    assert (m.patch_size, m.global_pool, m.reconstruction_loss, m.norm, m.mask_ratio) == (8, "token", "l1", "vessel", 0.5)
    assert (m.supervised_weight, list(m.supervised_classes)) == (1, ["vessel"])
    method, heads = build_whole(cfg, LAYOUTS["cmmae_vessel"].sensors, 128)
    assert (count(method.backbone), count(heads), count(method.classifier)) == (85_451_520, 689_024, 769)
    assert method.backbone.n_tokens == 256 and next(iter(method.decoder.decoders.values())).preds["s2"].out_features == 256


def config(out, name, *changes):
    "A packaged config, made small."
    import sys
    if str(HERE) not in sys.path: sys.path.insert(0, str(HERE))
    small = [f"method.{k}={v}" for k, v in TINY.items() if k != "img_size"]
    return load_config(name, ["plugins=[tiny_plugin]", "data=tiny_pairs", *small, "optim.epochs=2", "optim.warmup_epochs=1",
        "trainer.batch_size=4", "trainer.num_workers=0", "trainer.pictures=0", "hash.n_bits=16",
        "hash.epochs=2", "evaluate.drawings=20", f"out={out}", *changes])


def test_both_stages_and_packed_codes(tmp_path):
    cfg = config(tmp_path/"run", "cmmae")
    pretrain(cfg, progress=False)
    method = train_hash(cfg.out, progress=False)
    assert type(method) is CMMAE and list(method.heads) == ["s1", "s2"] and method.classifier is None
    store = encode_run(cfg.out, progress=False)
    assert {m: (o.dtype, o.shape[1]) for m, o in store.codes.items()} == dict.fromkeys(("s1", "s2"), (np.uint8, 2))
    found = evaluate(cfg.out, progress=False).table
    mine = found[(found.system == "cmmae") & (found.kind == "binary") & (found.metric == "m1_f1") & (found.k == 8)]
    assert sorted(mine.direction) == ["s1->s1", "s1->s2", "s2->s1", "s2->s2"]
    assert set(mine.n_bits) == {16} and mine.value.between(0, 1).all()


LABELS = "method.supervised_weight=1", "method.supervised_classes=[lake,town]"


def test_a_supervised_run_goes_on_after_a_kill(tmp_path):
    whole = pretrain(config(tmp_path/"whole", "cmmae", *LABELS), progress=False)
    assert read_history(whole)["supervised"].notna().all()
    told = json.loads((whole/"method"/"method.json").read_text())["arguments"]
    assert told["vocab"] == ["field", "forest", "lake", "town"] and told["supervised_classes"] == ["lake", "town"]
    code = f"from test_cmmae import *; pretrain(config({str(tmp_path/'run')!r}, 'cmmae', *LABELS), progress=False)"
    assert run_python(code, RSIR_TEST_KILL_AT=16 + 8) == -signal.SIGKILL
    pretrain(config(tmp_path/"run", "cmmae", *LABELS), progress=False)
    assert load_method(tmp_path/"run").weights_hash == load_method(whole).weights_hash
    train_hash(whole, progress=False)
    assert {"cmmae", "untrained"} <= set(evaluate(whole, progress=False).table.system)


def test_one_sensor_through_the_engine(tmp_path):
    options = ["data=tiny_rgb", "method.norm=imagenet", "method.supervised_classes=[town]", "trainer.train_split=null"]
    with pytest.raises(UnknownNameError, match="town"):
        pretrain(config(tmp_path/"odd", "cmmae_vessel", *options), progress=False)
    options[2] = "method.supervised_classes=[lake]"
    cfg = config(tmp_path/"run", "cmmae_vessel", *options)
    pretrain(cfg, progress=False)
    assert {"umr_rgb", "supervised"} <= set(read_history(cfg.out).columns) and "mim" not in read_history(cfg.out)
    method = train_hash(cfg.out, progress=False)
    assert list(method.heads) == ["rgb"] and method.classifier.out_features == 1


# ---- published weights

@lru_cache(maxsize=None)
def published(layout, training=True):
    "A method of each system, and its weights under published names."
    torch.manual_seed(0)
    sensors, size = LAYOUTS[layout].sensors, VESSEL if layout == "cmmae_vessel" else dict(TINY, norm="ben_v1", transpose=True)
    if layout == "cmmae": size = dict(size, band_orders=BAND_ORDERS["csmae"])
    classes = ["vessel"] if layout == "cmmae_vessel" and training else None
    method = CMMAE(sensors, supervised_classes=classes, **size, **({} if training else dict(decoder=None)))
    method.heads = HashHeads(dict.fromkeys(sensors, 32), 24)
    with torch.no_grad():
        for p in method.parameters():
            if p.requires_grad: p.add_(0.02*torch.randn(p.shape))
    state = {k: v for k, v in method.state_dict().items() if k.split(".")[-1] not in ("mean", "std")}
    state = to_published_names(state, layout=layout)
    return method.eval(), state if training else {k.removeprefix("backbone."): v for k, v in state.items()}


HEADS = dict(num_heads=2, decoder_heads=2)


@pytest.mark.parametrize("layout", ["cmmae", "cmmae_vessel"])
@pytest.mark.parametrize("kind", ["lightning", "hash stage", "bare", "safetensors", "half"])
def test_every_form_gives_the_same_codes(layout, kind, tmp_path):
    training = kind in ("lightning", "half")
    method, state = published(layout, training)
    path = tmp_path/"weights.ckpt"
    if kind == "lightning": torch.save(dict(epoch=3, state_dict=state, optimizer_states=[{"lr": 0.1}]), path)
    elif kind == "hash stage": torch.save(dict(trained_epochs=25, state_dict=state, optimizer_state_dict=dict(state={})), path)
    elif kind == "bare": torch.save(state, path)
    elif kind == "half": torch.save({k: v.half() for k, v in state.items()}, path)
    else: save_file({k: v.clone() for k, v in state.items()}, path)
    found = CMMAE.from_published(path, **HEADS)
    assert recognise(state) == layout and not found.training
    g = torch.Generator().manual_seed(0)
    for m, sensor in found.sensors.items():
        x = 1000 + 500*torch.randn(3, sensor.in_chans, 30, 30, generator=g)
        if m == "s1": x = -15 + 4*torch.randn(3, sensor.in_chans, 30, 30, generator=g)
        wanted = method.hash(method.embed(x, m), m)
        if kind == "half": torch.testing.assert_close(found.hash(found.embed(x, m), m), wanted, rtol=0.05, atol=0.05)
        else: assert torch.equal(found.hash(found.embed(x, m), m), wanted)
        if layout == "cmmae_vessel" and kind == "lightning":
            assert torch.equal(found.class_scores(x, m), method.class_scores(x, m))
    assert (found.decoder is None) == (not training)
    if kind == "hash stage": assert "trained_epochs" in " ".join(load_published(path, **HEADS).report)


@pytest.mark.parametrize("layout,swap", [("cmmae", True), ("cmmae_vessel", False)])
def test_the_published_way_of_looking_is_saved(layout, swap, tmp_path):
    _, state = published(layout, False)
    torch.save(state, tmp_path/"w.pt")
    found = CMMAE.from_published(tmp_path/"w.pt", **HEADS)
    m, theirs, table = "s2", *((BAND_ORDERS["csmae"]["s2"], "ben_v1") if swap else (BAND_ORDERS["vessel"]["s2"], "vessel"))
    x = 1000 + 500*torch.randn(2, len(theirs), 30, 30)
    mean, std = norm_stats(theirs, table)
    seen = (reorder_bands(x, found.sensors[m].bands, theirs) - mean[:, None, None])/std[:, None, None]
    torch.testing.assert_close(found.prepare(x, m), seen.transpose(-1, -2) if swap else seen)
    told = json.loads((found.save(tmp_path/"m")/"method.json").read_text())
    assert (told["arguments"]["norm"], told["arguments"]["transpose"]) == (table, swap)
    assert tuple(told["arguments"]["band_orders"]["s2"]) == theirs
    assert np.allclose(told["norm_stats"]["s2"][theirs[0]], [mean[0], std[0]])
    assert torch.equal(Method.load(tmp_path/"m").embed(x, m), found.embed(x, m))


def test_what_a_retriever_tells_of_published_weights(tmp_path):
    _, state = published("cmmae", False)
    torch.save(state, tmp_path/"w.pt")
    found = CMMAE.from_published(tmp_path/"w.pt", **HEADS)
    r = Retriever.build(found, archive_of("s1", "s2"), tmp_path/"index", progress=False)
    text = json.dumps(r.store.provenance)
    assert '"ben_v1"' in text and '"transpose": true' in text and "B8A" in text and found.weights_hash in text


def bad_files(folder, layout):
    "Files that are no checkpoint of this system, and what is said about each."
    _, state = published(layout)
    torch.save({f"layer{i}.conv1.weight": torch.ones(2, 2) for i in range(4)}, folder/"resnet.pt")
    yield "resnet.pt", InputError, "not those of a published system.*layer0.conv1.weight"
    name = "backbone.blocks.0.mlp.fc1.bias"
    torch.save({k: v for k, v in state.items() if k != name}, folder/"missing.pt")
    yield "missing.pt", InputError, f"incomplete.*{name}"
    torch.save({k: v for k, v in state.items() if k != "backbone.cls_token"}, folder/"no_class_token.pt")
    yield "no_class_token.pt", InputError, "incomplete.*cls_token"
    torch.save({k: v for k, v in state.items() if k != "backbone.f.0.weight"}, folder/"half_a_head.pt")
    yield "half_a_head.pt", InputError, "incomplete.*backbone.f.0.weight"
    torch.save({**state, "backbone.extra.weight": torch.ones(2)}, folder/"extra.pt")
    yield "extra.pt", InputError, "backbone.extra.weight"
    torch.save({**state, "backbone.f.4.weight": torch.ones(2, 2)}, folder/"three_layers.pt")
    yield "three_layers.pt", InputError, "not those of a .*CMMAE.*backbone.f.4.weight"
    torch.save({**state, "backbone.norm.bias": torch.ones(33)}, folder/"shape.pt")
    yield "shape.pt", InputError, r"do not fit.*norm.bias: \(33,\)"
    torch.save(dict(state_dict=state, hyper_parameters=Command(f"touch {folder}/pwned")), folder/"code.pt")
    yield "code.pt", UnsafeFileError, "asks for code"
    torch.save(state, folder/"whole.pt")
    content = (folder/"whole.pt").read_bytes()
    (folder/"truncated.pt").write_bytes(content[:len(content)//2])
    yield "truncated.pt", CorruptError, "truncated.pt"


@pytest.mark.parametrize("layout", ["cmmae", "cmmae_vessel"])
def test_bad_files_say_one_clear_thing(layout, tmp_path):
    for name, kind, text in bad_files(tmp_path, layout):
        with pytest.raises(kind, match=text) as e: CMMAE.from_published(tmp_path/name, **HEADS)
        assert name in str(e.value) and isinstance(e.value, RsirError) and "\n" not in str(e.value)
    assert not (tmp_path/"pwned").exists()


def test_only_the_unused_head_is_left_out(tmp_path):
    _, state = published("cmmae_vessel")
    zerone = {"backbone.zerone.0.weight": torch.ones(128, 32), "backbone.zerone.0.bias": torch.ones(128)}
    torch.save({**state, **zerone}, tmp_path/"w.pt")
    found = load_published(tmp_path/"w.pt", **HEADS)
    assert not [k for k in found.state_dict if "zerone" in k]
    assert [o for o in found.report if o.startswith("left out")] == [
        "left out: backbone.zerone.0.weight, backbone.zerone.0.bias, a head that the published code makes and never uses"]
    torch.save({**state, "backbone.zerone.2.weight": torch.ones(2)}, tmp_path/"w.pt")
    with pytest.raises(InputError, match="zerone.2.weight"): load_published(tmp_path/"w.pt", **HEADS)


def test_what_fits_no_method(tmp_path):
    _, state = published("cmmae_vessel")
    torch.save(state, tmp_path/"w.pt")
    with pytest.raises(InputError, match="CMMAE.from_published"): CSMAE.from_published(tmp_path/"w.pt", **HEADS)
    with pytest.raises(InputError, match="one sensor"): CMMAE.from_published(tmp_path/"w.pt", ["s1", "s2"], **HEADS)
    with pytest.raises(InputError, match="does not fill"): CMMAE.from_published(tmp_path/"w.pt", shared_depth=3, **HEADS)
    with pytest.raises(InputError, match="does not fill"):
        CMMAE.from_published(tmp_path/"w.pt", supervised_classes=["a", "b"], **HEADS)
    renamed = CMMAE.from_published(tmp_path/"w.pt", dict(ships="s2_rgbn"), **HEADS)
    assert list(renamed.heads) == ["ships"] and renamed.arguments["band_orders"] == dict(ships=BAND_ORDERS["vessel"]["s2"])
    with pytest.raises(UnknownNameError, match="B8A|band"): CMMAE.from_published(tmp_path/"w.pt", ["rgb"], **HEADS)


def test_an_encoder_that_was_never_trained_is_named(tmp_path):
    fresh = CMMAE(["s1", "s2"], decoder=None, **TINY)
    state = {k: v for k, v in fresh.state_dict().items() if not k.startswith("inputs.")}
    torch.save(to_published_names(state), tmp_path/"w.pt")
    assert [o for o in load_published(tmp_path/"w.pt", **HEADS).report if "never trained" in o]
    torch.save(published("cmmae")[1], tmp_path/"w.pt")
    assert not [o for o in load_published(tmp_path/"w.pt", **HEADS).report if "never trained" in o]


def test_another_system_is_one_entry(tmp_path, monkeypatch):
    "A system with a network of its own: names, sizes and modules come from its layout."
    from rsir_nb.models.names import Layout
    pair = Layout("Linear", "cmmae", dict(s2="s2"), lambda m: [(f"net.{m[0]}.", "backbone.only.")], ("only.weight",), "csmae", "ben_v1",
                  infer=lambda state, m, *_: dict(shape=tuple(state[f"net.{m[0]}.weight"].shape), m=m[0]),
                  parts=lambda c: {f"net.{c['m']}": torch.nn.Linear(*c["shape"][::-1])})
    monkeypatch.setitem(LAYOUTS, "linear", pair)
    state = {f"only.{k}": v for k, v in torch.nn.Linear(3, 4).state_dict().items()}
    torch.save(state, tmp_path/"w.pt")
    found = load_published(tmp_path/"w.pt")
    assert found.layout == "linear" and torch.equal(found.state_dict["net.s2.bias"], state["only.bias"])
    torch.save({"only.weight": state["only.weight"]}, tmp_path/"w.pt")
    with pytest.raises(InputError, match="Linear is incomplete.*backbone.only.bias"): load_published(tmp_path/"w.pt")
