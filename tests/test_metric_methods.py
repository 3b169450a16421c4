"Metric learning: every method trains, resumes to the same curve, is saved and loaded, and finds images; what cannot be is refused."

import numpy as np
import pytest
import torch
from engine_run import run_python, tiny_config
from scipy.optimize import linear_sum_assignment

from rsir_nb.config import load_config
from rsir_nb.core import METHODS, InputError, MissingFileError, UnknownNameError
from rsir_nb.data.module import ArchiveData
from rsir_nb.engine.parts import TrainerConfig, build_archive, build_method, load_method
from rsir_nb.engine.retriever import Retriever
from rsir_nb.engine.train import fit_method, pretrain, read_history
from rsir_nb.losses.boosting import BinomialDevianceLoss
from rsir_nb.losses.metric import MarginLoss
from rsir_nb.losses.miners import SemiHard
from rsir_nb.methods.base import Method
from rsir_nb.methods.divide_conquer import assign, match_clusters
from rsir_nb.methods.margin import MetricMethod, standardise_images

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


@pytest.mark.parametrize("name", NAMES)
def test_an_image_that_is_no_number_stops_the_training_with_its_id(tmp_path, name):
    cfg = config(tmp_path/"run", name)
    archive = build_archive(cfg.data)
    method, batch = build_method(cfg, archive), batch_of(archive)
    method.start_training(archive)
    method.start_epoch(0)
    batch["s2"] = batch["s2"].index_fill(0, torch.tensor([5]), float("nan"))
    with pytest.raises(InputError, match=rf"no numbers; found {batch['id'][5]};"): method.losses(batch, torch.Generator())


@pytest.mark.parametrize("name", NAMES)
def test_labels_that_tell_nothing_apart_are_refused(tmp_path, name, caplog):
    cfg = config(tmp_path/"run", name)
    archive = build_archive(cfg.data)
    method, first = build_method(cfg, archive), int(archive.class_counts().argmax())
    alone = archive.subset(np.flatnonzero((archive.labels[:, first] == 1) & (archive.labels.sum(1) == 1)))
    assert len(alone) > 1
    with pytest.raises(InputError, match=f"two classes or more; found {archive.vocab.names[first]} alone"): method.start_training(alone)
    none = archive.subset(range(8))
    none.table["labels"] = [[] for _ in range(8)]
    with pytest.raises(InputError, match="no image with a label"): method.start_training(none)


def test_a_class_with_one_image_is_named(tmp_path, caplog):
    cfg = config(tmp_path/"run", "margin")
    archive = build_archive(cfg.data)
    counts = archive.class_counts()
    rare = int(np.flatnonzero(counts > 0)[0])
    rows = np.r_[np.flatnonzero(archive.labels[:, rare])[:1], np.flatnonzero(archive.labels[:, rare] == 0)]
    build_method(cfg, archive).start_training(archive.subset(rows))
    assert f"have a single image, which is a positive of none: {archive.vocab.names[rare]}" in caplog.text


# ---- what they have in common

def test_a_frozen_backbone_stays(tmp_path):
    cfg = config(tmp_path/"run", "margin", "method.freeze=true")
    fresh, trained = build_method(cfg, build_archive(cfg.data)), load_method(pretrain(cfg, progress=False))
    same = {k.split(".")[0]: True for k, v in fresh.named_parameters()}
    for k, v in fresh.named_parameters(): same[k.split(".")[0]] &= torch.equal(v, trained.get_parameter(k))
    assert same == dict(backbones=True, necks=False, loss=False)
    assert not trained.train().backbones.training and trained.necks.training


@pytest.mark.parametrize("name", [o for o in NAMES if o != "diva"])
def test_features_of_a_frozen_backbone_are_computed_once(tmp_path, name):
    import tiny_plugin
    frozen = ["method.freeze=true", "trainer.augment=false", "method.dropout=0"]
    before = tiny_plugin.reads
    run = pretrain(config(tmp_path/"cached", name, *frozen), progress=False)
    reads = tiny_plugin.reads - before
    n = len(build_archive(config(run, name).data).split("train"))
    assert n <= reads < 2*n + 8
    whole = pretrain(config(tmp_path/"whole", name, *frozen, "trainer.cache=false"), progress=False)
    assert tiny_plugin.reads - before - reads > 3*n - 8
    a, b = (read_history(o)["loss"].to_numpy() for o in (run, whole))
    np.testing.assert_allclose(a, b, rtol=0.02, atol=0.02)        # features are kept in float16
    x = next(iter(build_archive(config(run, name).data).split("test")))["s2"][None]
    torch.testing.assert_close(load_method(run).embed(x, "s2"), load_method(whole).embed(x, "s2"), rtol=0.05, atol=0.02)


def test_frozen_diva_looks_at_images_and_keeps_its_backbone(tmp_path):
    cfg = config(tmp_path/"run", "diva", "method.freeze=true")
    fresh, trained = build_method(cfg, build_archive(cfg.data)), load_method(pretrain(cfg, progress=False))
    assert not (tmp_path/"run"/"features").exists() and not trained.train().backbones.training
    own = dict(trained.backbones.named_parameters())
    assert all(torch.equal(v, own[k]) for k, v in fresh.backbones.named_parameters())
    assert any(not torch.equal(v, dict(trained.necks.named_parameters())[k]) for k, v in fresh.necks.named_parameters())


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


def test_standardised_images_do_not_depend_on_light(tmp_path):
    x = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    z = standardise_images(x)
    plain = x.numpy()
    wanted = (plain - plain.mean((2, 3), keepdims=True))/plain.std((2, 3), keepdims=True)
    assert np.allclose(z, wanted, atol=1e-5) and torch.allclose(standardise_images(7*x + 3), z, atol=1e-5)
    cfg = config(tmp_path/"run", "margin", "method.standardise=true", "optim.epochs=1")
    method = load_method(pretrain(cfg, progress=False))
    archive = build_archive(cfg.data)
    x = batch_of(archive)["s1"]
    assert torch.allclose(method.embed(x, "s1"), method.embed(x*2 - 1, "s1"), atol=1e-4)


# ---- divide and conquer

@pytest.mark.parametrize("n", (1, 2, 3, 5, 8, 13))
def test_assignments_are_those_of_scipy(n):
    rng = np.random.default_rng(n)
    for costs in [rng.normal(size=(n, n)), rng.integers(0, 4, (n, n)), np.zeros((n, n))]*5:
        mine, theirs = assign(costs), linear_sum_assignment(costs)[1]
        assert sorted(mine) == list(range(n)) and costs[range(n), mine].sum() == pytest.approx(costs[range(n), theirs].sum())


def test_clusters_keep_their_numbers():
    rng = np.random.default_rng(0)
    old = rng.integers(0, 6, 400)
    for order in [rng.permutation(6) for _ in range(20)]:
        noisy = np.where(rng.random(400) < .1, rng.integers(0, 6, 400), old)
        assert np.array_equal(match_clusters(order[noisy], old, 6), noisy)
    found = match_clusters(np.zeros(5, int), np.array([2, 2, 2, 0, 1]), 3)     # clusters may be empty
    assert found.tolist() == [2]*5


def test_the_course_of_divide_and_conquer(tmp_path):
    cfg = config(tmp_path/"run", "divide_conquer", "optim.epochs=10", "method.every=3", "method.slices_until=0.4",
                 "method.clusters_until=0.8")
    archive = build_archive(cfg.data)
    method = build_method(cfg, archive)
    method.start_training(archive)
    seen = []
    for epoch in range(10):
        method.epoch = epoch
        method.start_epoch(epoch)
        seen.append(method.clusters)
        method.zero_grad()
        one = np.flatnonzero(seen[-1] == seen[-1][0])[:8]
        batch = ArchiveData(archive.subset(one), batch_size=len(one), augment=False)
        batch = {**next(batch.batches()), "row": torch.as_tensor(one)}
        method.losses(batch, torch.Generator().manual_seed(0))["loss"].backward()
        grads = [o.weight.grad is not None and bool(o.weight.grad.any()) for o in method.necks["s2"].layers]
        assert sum(grads) <= 1 if epoch < 4 else len(set(grads)) == 1
    changes = [e for e in range(1, 10) if not np.array_equal(seen[e], seen[e - 1])]
    assert set(changes) <= {3, 6, 8} and seen[0].any() and not seen[8].any() and not seen[9].any()
    with pytest.raises(InputError, match="more clusters than images"): method.start_training(archive.subset([3]))
    with pytest.raises(InputError, match="no such course"): build_method(config(tmp_path/"b", "divide_conquer", "method.every=0"), archive)


def test_the_loss_of_slices_is_that_of_each_slice(tmp_path):
    cfg = config(tmp_path/"run", "divide_conquer", "method.dropout=0", "method.loss={name: margin, learn: false, per: pair}",
                 "method.miner=all_pairs")
    archive = build_archive(cfg.data)
    method, batch = build_method(cfg, archive), batch_of(archive, 48)
    method.start_training(archive)
    method.cluster_of[::2] = 1
    z, own = method.parts_of(batch), method.cluster_of[batch["row"]]
    total = 0
    for c in 0, 1:
        part = torch.cat([o[own == c][:, 8*c:8*c + 8] for o in z.values()])
        total = total + MarginLoss(learn=False, per="pair")(part, torch.cat([batch["labels"][own == c]]*2))/2
    assert torch.allclose(method.losses(batch)["loss"], total, rtol=1e-5)
    method.eval()
    whole = torch.cat([*method.parts_of(batch).values()])
    assert torch.allclose(method.losses(batch)["loss"],
                          MarginLoss(learn=False, per="pair")(whole, torch.cat([batch["labels"]]*2)))


# ---- DiVA

def test_diva_is_the_weighted_sum_of_its_tasks(tmp_path):
    cfg = config(tmp_path/"run", "diva", "method.task_weights=[1,2,3,4]", "method.decorrelation=5")
    archive = build_archive(cfg.data)
    method, batch = build_method(cfg, archive), batch_of(archive)
    terms = method.losses(batch, torch.Generator().manual_seed(0))
    order = "discriminative", "self_similarity", "shared", "intra"
    assert torch.allclose(terms["loss"], sum(w*terms[k] for w, k in zip((1, 2, 3, 4), order, strict=True)) + terms["decorrelation"])
    off = build_method(config(tmp_path/"off", "diva", "method.decorrelation=0"), archive)
    assert "decorrelation" not in off.losses(batch, torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="four parts"): build_method(config(tmp_path/"b", "diva", "method.sizes=[8,8]"), archive)


def test_the_key_network_follows_and_is_never_trained(tmp_path):
    cfg = config(tmp_path/"run", "diva", "method.momentum=0.75")
    archive = build_archive(cfg.data)
    method, batch = build_method(cfg, archive), batch_of(archive)
    key, fast = method.key["necks"]["s2"].layers[1].weight, method.necks["s2"].layers[1].weight
    assert torch.equal(key, fast) and not any(p.requires_grad for p in method.key.parameters())
    before = key.clone()
    with torch.no_grad(): fast += 1
    method.losses(batch, torch.Generator().manual_seed(0))["loss"].backward()
    method.after_step(batch)
    assert torch.allclose(key, 0.75*before + 0.25*fast) and method.loss["self_similarity"].filled == 32
    assert all(p.grad is None for p in method.key.parameters())
    frozen = build_method(config(tmp_path/"f", "diva", "method.freeze=true"), archive).train()
    assert not frozen.key["backbones"].training and frozen.key["necks"].training


def test_views_of_the_trainer_are_the_second_views(tmp_path):
    cfg = config(tmp_path/"run", "diva", "trainer.views=2", "trainer.augment=[flips, noise]", "optim.epochs=1")
    assert np.isfinite(read_history(pretrain(cfg, progress=False))["loss"]).all()
    archive = build_archive(cfg.data)
    method, batch = build_method(cfg, archive).eval(), batch_of(archive)
    same = method.keys_of({**batch, "s1_view": batch["s1"], "s2_view": batch["s2"]})
    own = torch.cat([o.split(4, 1)[1] for o in method.parts_of(batch).values()])
    assert torch.allclose(same, own, atol=1e-6) and not torch.allclose(method.keys_of(batch, torch.Generator().manual_seed(0)), own)


# ---- BIER

def test_bier_is_deviance_adversary_and_lengths(tmp_path):
    cfg = config(tmp_path/"run", "bier", "method.dropout=0", "method.diversity=0.01", "method.weight_norm=3", "method.decorrelation=7")
    archive = build_archive(cfg.data)
    method, batch = build_method(cfg, archive), batch_of(archive)
    z, y = torch.cat([*method.parts_of(batch).values()]), torch.cat([batch["labels"]]*2)
    layers = [o for neck in method.necks.values() for o in neck.layers]
    lengths = sum(((o.weight.square().sum(1) - 1)**2).mean() for o in layers)/4 + method.loss["decorrelation"].penalty()
    wanted = BinomialDevianceLoss([6, 10])(z, y) + 0.01*(method.loss["decorrelation"](z) + 3*lengths)
    assert torch.allclose(method.losses(batch)["loss"], wanted, rtol=1e-5)


# ---- SNDL

def test_sndl_remembers_every_image_of_the_training_split(tmp_path):
    cfg = config(tmp_path/"run", "sndl", "optim.epochs=2")
    archive = build_archive(cfg.data).split("train")
    method = build_method(cfg, archive)
    fit_method(method, archive, None, TrainerConfig(batch_size=8, pictures=0), 0, progress=False)
    memory = method.loss["memory"]
    assert memory.seen.all() and len(memory.memory) == len(archive) and torch.equal(memory.labels.float(), torch.tensor(archive.labels).float())
    assert torch.allclose(memory.memory.norm(dim=1), torch.ones(len(archive)))
    method.start_epoch(1), method.start_epoch(2)
    assert memory.momentum == 0.8


def test_the_memory_of_two_sensors_is_their_mean(tmp_path):
    cfg = config(tmp_path/"run", "sndl", "method.dropout=0")
    archive = build_archive(cfg.data)
    method, batch = build_method(cfg, archive), batch_of(archive)
    method.start_training(archive)
    z = method.parts_of(batch)
    method.losses(batch)
    method.after_step(batch)
    mean = torch.nn.functional.normalize(z["s1"] + z["s2"]).detach()
    assert torch.allclose(method.loss["memory"].memory[batch["row"]], mean, atol=1e-6)
    with pytest.raises(InputError, match="nothing to validate"):
        build_method(config(tmp_path/"b", "sndl", "method.label_weight=0"), archive).eval().losses(batch)


def test_a_pretrained_backbone_gets_the_images_that_its_weights_expect():
    "Bands that no table knows: the weights' statistics; with `fit` those of the images."
    setting = ["data=eurosat_sample", "trainer.train_split=null", "method.backbone=shipped", "method.freeze=true"]
    for extra, wanted in ([], lambda x: (127., 128.)), (["method.norm=fit"], lambda x: (x.mean().item(), x.std(correction=0).item())):
        cfg = load_config("margin", [*setting, *extra])
        archive = build_archive(cfg.data)
        seen = build_method(cfg, archive).arguments["norm"]["rgb"]
        x = torch.stack([archive[i]["rgb"] for i in range(len(archive))]).double()
        for i, band in enumerate("RGB"): assert seen[band] == pytest.approx(wanted(x[:, i]), rel=1e-4)
