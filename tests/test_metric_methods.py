"Metric learning: every method trains, resumes to the same curve, is saved and loaded, and finds images; what cannot be is refused."

import numpy as np
import pytest
import torch
from engine_run import run_python, tiny_config

from rsir_nb.core import METHODS, InputError, MissingFileError, UnknownNameError
from rsir_nb.data.module import ArchiveData
from rsir_nb.engine.parts import TrainerConfig, build_archive, build_method, load_method
from rsir_nb.engine.retriever import Retriever
from rsir_nb.engine.train import fit_method, pretrain, read_history
from rsir_nb.losses.metric import MarginLoss
from rsir_nb.losses.miners import SemiHard
from rsir_nb.methods.base import Method
from rsir_nb.methods.margin import MetricMethod

SMALL = ["method.backbone={name: vit, embed_dim: 16, depth: 1, num_heads: 2}", "optim.lr=1e-3", "trainer.batch_size=8",
         "optim.warmup_epochs=0"]
EXTRA = dict(margin=["method.sizes=[16]"],
             diva=["method.sizes=[4,4,4,4]", "method.hidden_dim=8", "method.n_keys=32"],
             divide_conquer=["method.sizes=[8,8]", "method.every=1", "method.slices_until=0.4", "method.clusters_until=0.7"],
             bier=["method.sizes=[6,10]", "method.hidden_dim=8"],
             sndl=["method.sizes=[16]", "method.momentum=[[0,0.5],[2,0.8]]"])
NAMES = list(EXTRA)


def config(out, name, *changes): return tiny_config(out, f"method={name}", *SMALL, *EXTRA[name], *changes)


def batch_of(archive, n=16, views=1):
    return next(ArchiveData(archive, batch_size=n, augment=False, views=views).batches())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "name -> a finished run of three epochs, made when first asked for."
    made = {}
    def get(name):
        if name not in made: made[name] = pretrain(config(tmp_path_factory.mktemp(name)/"run", name), progress=False)
        return made[name]
    return get


@pytest.mark.parametrize("name", NAMES)
def test_everything_learns_and_the_curve_is_finite(runs, tmp_path, name):
    cfg = config(tmp_path/"other", name)
    fresh, trained = build_method(cfg, build_archive(cfg.data)), load_method(runs(name))
    own = dict(trained.named_parameters())
    still = [k for k, v in fresh.named_parameters() if k in own and v.requires_grad and torch.equal(v, own[k])]
    assert still == []
    history = read_history(runs(name))
    assert np.isfinite(history["loss"]).all() and history["epoch"].max() == 2


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_run_goes_on_to_the_same_curve(runs, tmp_path, name):
    out = tmp_path/"run"
    code = f"""
from test_metric_methods import config
from rsir_nb.engine.train import pretrain
pretrain(config({str(out)!r}, {name!r}), progress=False)
"""
    whole = read_history(runs(name))
    reads = 16*len(whole)//3 + 2    # in the second epoch
    assert run_python(code, RSIR_TEST_KILL_AT=reads) < 0
    assert not (out/"finished.json").exists()
    pretrain(config(out, name), progress=False)
    assert load_method(out).weights_hash == load_method(runs(name)).weights_hash
    np.testing.assert_array_equal(read_history(out)["loss"], whole["loss"])


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_without_what_only_training_needs(runs, tmp_path, name):
    method = load_method(runs(name))
    archive = build_archive(config(tmp_path, name).data)
    x = batch_of(archive)["s2"]
    z = method.embed(x, "s2")
    again = Method.load(method.save(tmp_path/"method", training=False))
    assert torch.equal(again.embed(x, "s2"), z) and again.weights_hash == method.weights_hash
    assert torch.equal(method.embed(x[3:4], "s2"), z[3:4])
    assert set(again.lacks) <= set(again.training_only)
    if again.lacks:
        with pytest.raises(InputError, match="only training needs"):
            fit_method(again, archive, None, TrainerConfig(batch_size=8, pictures=0), 0, progress=False)


@pytest.mark.parametrize("name", NAMES)
def test_queries_by_image_and_across_sensors(runs, tmp_path, name):
    archive = build_archive(config(tmp_path, name).data)
    retriever = Retriever.build(load_method(runs(name)), archive, tmp_path/"search", progress=False)
    by_id = retriever.query("tiny_002", source="s2", target="s1", k=5)
    assert len(by_id.ids) == 5 and retriever.query(archive["tiny_002"]["s2"], target="s1", k=6).ids[:5] == by_id.ids


@pytest.mark.parametrize("name", NAMES)
def test_class_numbers_of_one_sensor(tmp_path, name):
    cfg = config(tmp_path/"run", name, "data=tiny_rgb", "trainer.train_split=null", "optim.epochs=1")
    method = load_method(pretrain(cfg, progress=False))
    assert method.embed(batch_of(build_archive(cfg.data))["rgb"], "rgb").shape == (16, method.embed_dim)


@pytest.mark.parametrize("name", NAMES)
def test_validation_by_retrieval_keeps_the_best(tmp_path, name):
    cfg = config(tmp_path/"run", name, "trainer.val_split=val", "trainer.monitor=map", "trainer.every=2", "optim.epochs=2")
    run = pretrain(cfg, progress=False)
    assert read_history(run)["val/map"].notna().any() and load_method(run).embed_dim


@pytest.mark.parametrize("name", NAMES)
def test_archives_without_labels_are_refused(tmp_path, name):
    cfg = config(tmp_path/"run", name)
    archive = build_archive(cfg.data)
    archive.vocab = None
    with pytest.raises(InputError, match="needs labels"): build_method(cfg, archive)


@pytest.mark.parametrize("name", NAMES)
def test_images_that_share_nothing_cost_nothing_that_is_nan(tmp_path, name):
    cfg = config(tmp_path/"run", name)
    archive = build_archive(cfg.data)
    method, batch = build_method(cfg, archive), batch_of(archive)
    method.start_training(archive)
    method.start_epoch(0)
    for labels in torch.zeros(16, 4), torch.eye(4)[torch.zeros(16, dtype=torch.long)], torch.cat([torch.eye(4), torch.zeros(12, 4)]):
        terms = method.losses({**batch, "labels": labels}, torch.Generator().manual_seed(0))
        assert torch.isfinite(torch.stack(list(terms.values()))).all()
        terms["loss"].backward()
        assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.grad is not None)


# ---- what they have in common

def test_a_frozen_backbone_stays(tmp_path):
    cfg = config(tmp_path/"run", "margin", "method.freeze=true")
    fresh, trained = build_method(cfg, build_archive(cfg.data)), load_method(pretrain(cfg, progress=False))
    same = {k.split(".")[0]: True for k, v in fresh.named_parameters()}
    for k, v in fresh.named_parameters(): same[k.split(".")[0]] &= torch.equal(v, trained.get_parameter(k))
    assert same == dict(backbones=True, necks=False, loss=False)
    assert not trained.train().backbones.training and trained.necks.training


def test_weights_are_read_once(tmp_path):
    import timm
    from safetensors.torch import save_file
    torch.manual_seed(1)
    path, net = tmp_path/"net.safetensors", timm.create_model("resnet10t", num_classes=0)
    save_file(net.state_dict(), path)
    backbone = dict(name="timm", model="resnet10t", weights=str(path), in_weights="copy_first")
    archive = build_archive(tiny_config(tmp_path/"run").data)
    make = lambda: METHODS.create("margin", sensors=archive.sensors, vocab=["a", "b"], img_size=30, backbone=backbone, sizes=[8])
    method = make()
    first = method.backbones["s2"].net.conv1[0].weight
    assert torch.equal(first[:, :3], net.conv1[0].weight) and torch.equal(first[:, 5], net.conv1[0].weight[:, 0])
    home, x = method.save(tmp_path/"method"), batch_of(archive)["s2"]
    path.unlink()
    assert torch.equal(Method.load(home).embed(x, "s2"), method.embed(x, "s2"))
    with pytest.raises(MissingFileError): make()


def test_the_boundary_learns_at_its_own_rate(tmp_path):
    cfg = config(tmp_path/"run", "margin", "method.boundary_lr=7")
    method = build_method(cfg, build_archive(cfg.data))
    (rest, edges), optim = method.optimisers()["main"]
    assert [p is method.loss["main"].boundary for p in edges["params"]] == [True]
    assert (edges["lr_scale"], edges["weight_decay"], optim.lr) == (7, 0, 1e-3)
    assert len(rest["params"]) + 1 == len(list(method.parameters()))


def test_a_pretrained_run_of_another_class_of_methods_has_no_objective():
    archive = build_archive(tiny_config("unused").data)
    method = MetricMethod(archive.sensors, vocab=["a"], img_size=30, backbone=dict(name="vit", embed_dim=8, depth=1, num_heads=2))
    with pytest.raises(InputError, match="no training objective"): method.losses(batch_of(archive))


# ---- margin

def test_margin_is_its_miner_and_its_loss(tmp_path):
    cfg = config(tmp_path/"run", "margin", "method.dropout=0")
    archive = build_archive(cfg.data)
    method, batch = build_method(cfg, archive), batch_of(archive)
    terms = method.losses(batch, torch.Generator().manual_seed(4))
    z = torch.cat([torch.cat([torch.nn.functional.normalize(o(method.backbones[m](method.prepare(batch[m], m))))
                              for o in method.necks[m].layers], 1) for m in ("s1", "s2")])
    y = torch.cat([batch["labels"]]*2)
    pairs = SemiHard()(z, y, torch.Generator().manual_seed(4))
    assert terms["pairs"] == len(pairs[0]) and torch.allclose(terms["loss"], MarginLoss()(z, y, pairs))


def test_other_losses_and_miners_by_name(tmp_path):
    for loss, miner in (("supcon", "all_pairs"), ("{name: margin, per_class: true}", "multi_label_semi_hard"),
                        ("label_bce", "distance_weighted")):
        cfg = config(tmp_path/f"{miner}", "margin", f"method.loss={loss}", f"method.miner={miner}", "optim.epochs=1")
        assert np.isfinite(read_history(pretrain(cfg, progress=False))["loss"]).all()
    with pytest.raises(UnknownNameError, match="semi_hard"): build_method(config(tmp_path/"a", "margin", "method.miner=semihard"),
                                                                          build_archive(cfg.data))
