"DUCH, on image pairs and in full: terms against closed forms, two optimisers, codes that do not change, refusals."
import logging
import shutil

import numpy as np
import pytest
import torch
from engine_run import tiny_config

from rsir_nb.config import load_config
from rsir_nb.core import (CorruptError, InputError, MissingFileError, UnknownNameError, UnsafeFileError)
from rsir_nb.data.features import FeatureArchive, read_arrays
from rsir_nb.data.batches import collate
from rsir_nb.data.module import ArchiveData
from rsir_nb.data.transforms import blur_and_turn
from rsir_nb.engine.encode import encode_run
from rsir_nb.engine.evaluate import evaluate_store
from rsir_nb.engine.hash import train_hash
from rsir_nb.engine.protocols import Protocol
from rsir_nb.engine.parts import build_archive, build_method, load_method
from rsir_nb.engine.train import pretrain, read_history
from rsir_nb.losses.duch import (adversarial_loss, agreed_code_loss, discriminator_loss, geometric_ramp, gradient_penalty,
                                 similarity_preservation_loss)
from rsir_nb.methods.duch_pairs import DuchPairs
from rsir_nb.models.names import to_published_names
from rsir_nb.methods.duch import Duch

PAIRS = ["method=duch_pairs", "method.patch_size=15", "method.embed_dim=16", "method.num_heads=2", "method.depth=1",
         "method.n_bits=16"]
FULL = ["method.n_bits=16", "method.hidden_dim=24", "optim.epochs=3", "optim.lr=1e-3", "trainer.batch_size=16"]
random = lambda *shape, seed=0: torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- terms

def test_ramp_is_geometric_and_ends():
    for n in 2, 7, 150: assert np.allclose([geometric_ramp(e, n) for e in range(n)], np.geomspace(1e-4, 1, n), rtol=1e-12)
    assert geometric_ramp(10**6, 150) == geometric_ramp(0, 1) == 1
    assert geometric_ramp(3, 7, 1, 8) == pytest.approx(8**.5)


def test_neighbours_are_found_by_distance_and_have_a_gradient():
    z = random(12, 5)
    apart = np.linalg.norm(z.numpy()[:, None] - z.numpy(), axis=-1)
    np.fill_diagonal(apart, np.inf)
    n = apart.argmin(1)
    unit = z.numpy()/np.linalg.norm(z.numpy(), axis=1, keepdims=True)
    assert similarity_preservation_loss(z).item() == pytest.approx((unit*unit[n]).sum(1).mean(), rel=1e-12)
    assert similarity_preservation_loss([z, 3*z]).item() == pytest.approx((unit*unit[n]).sum(1).mean(), rel=1e-12)
    assert torch.autograd.gradcheck(similarity_preservation_loss, z.requires_grad_(True))


def test_agreed_codes():
    h, target = random(2, 6, 8).tanh(), torch.sign(random(6, 8, seed=1))
    wanted = sum(((target - o)**2).sum() for o in h)
    assert agreed_code_loss([*h], target, "sum").item() == pytest.approx(wanted.item(), rel=1e-12)
    assert agreed_code_loss([*h], target).item() == pytest.approx(wanted.item()/h.numel(), rel=1e-12)


def test_log_losses_of_the_judge():
    real, fake = random(9), random(9, seed=1)
    p, q = torch.sigmoid(real), torch.sigmoid(fake)
    assert discriminator_loss(real, fake).item() == pytest.approx(-(p.log().mean() + (1 - q).log().mean()).item(), rel=1e-12)
    assert adversarial_loss(fake).item() == pytest.approx(-q.log().mean().item(), rel=1e-12)
    assert torch.isfinite(discriminator_loss(torch.tensor([-1e4]), torch.tensor([1e4])))


def test_gradient_penalty_of_a_linear_judge_and_its_own_gradient():
    w, (real, fake) = random(8).requires_grad_(True), random(2, 20, 8, seed=1)
    penalty = gradient_penalty(lambda x: x @ w, real, fake, torch.Generator().manual_seed(0))
    length = w.norm()
    assert penalty.item() == pytest.approx(((length - 1)**2).item(), rel=1e-12)
    assert torch.allclose(torch.autograd.grad(penalty, w)[0], (2*(length - 1)*w/length).detach())
    squares = lambda x: (x**2).sum(1)/2   # slope x: the points lie between the codes
    u = torch.rand(20, 1, generator=torch.Generator().manual_seed(3)).double()
    points = u*real + (1 - u)*fake
    found = gradient_penalty(squares, real, fake, torch.Generator().manual_seed(3))
    assert found.item() == pytest.approx(((points.norm(dim=1) - 1)**2).mean().item(), rel=1e-9)


def test_changed_copies_are_alike_in_all_modalities_and_differ_between_images():
    x = random(3, 2, 12, 12).float()
    made = blur_and_turn(dict(a=x, b=2*x, id=["p"]*3), np.random.default_rng(0))
    assert torch.allclose(made["b"], 2*made["a"], atol=1e-6) and made["id"] == ["p"]*3
    same = blur_and_turn(dict(a=x[:1].expand(3, -1, -1, -1)), np.random.default_rng(0))["a"]
    assert not torch.allclose(same[0], same[1])


# ---- image pairs

@pytest.fixture(scope="module")
def pairs_run(tmp_path_factory):
    return pretrain(tiny_config(tmp_path_factory.mktemp("pairs")/"run", *PAIRS), progress=False)


def test_pairs_are_trained_whole(pairs_run, tmp_path):
    cfg = tiny_config(tmp_path/"other", *PAIRS)
    fresh, trained = build_method(cfg, build_archive(cfg.data)), load_method(pairs_run)
    still = [k for k, v in fresh.named_parameters() if torch.equal(v, trained.get_parameter(k))]
    assert still == [] and "backbone.pos_embed" in dict(fresh.named_parameters())
    history = read_history(pairs_run)
    assert {"loss", "ntxent", "mde", "msp"} <= set(history)
    ramp = np.array([geometric_ramp(e, cfg.optim.epochs) for e in history.epoch])
    assert np.allclose(history.loss, history.ntxent + ramp*(history.mde + history.msp), atol=1e-5)


def test_codes_come_right_after_pretraining(pairs_run, tmp_path):
    run = shutil.copytree(pairs_run, tmp_path/"run")
    store = encode_run(run, progress=False)
    assert store.n_bits == 16 and store.modalities == ["s1", "s2"]
    with pytest.raises(InputError, match="multiple of 8"): train_hash(run, n_bits=12, progress=False)
    method = train_hash(run, n_bits=32, progress=False)
    assert method.heads.n_bits == 32 and load_method(run).heads.n_bits == 32
    assert encode_run(run, progress=False).n_bits == 32         # codes of the old head are made again


def test_a_code_is_the_same_alone_in_pairs_and_in_batches(pairs_run, full_run):
    for run in pairs_run, full_run:
        method, archive = load_method(run), build_archive(load_config(run/"config.yaml").data)
        for m in method.sensors:
            x = torch.stack([archive[i % len(archive)][m] for i in range(64)])
            wanted = method.hash(method.embed(x, m), m)
            for n in 1, 2:
                found = [method.hash(method.embed(o, m), m) for o in x.split(n)]
                assert torch.equal(torch.cat(found), wanted)


def test_the_sign_is_a_choice_and_the_ramp_ends():
    torch.manual_seed(0)
    small = dict(img_size=24, patch_size=8, embed_dim=16, num_heads=2, depth=1, n_bits=16, ramp_epochs=4)
    x = {m: random(5, c, 24, 24).float() for m, c in dict(s1=2, s2=10).items()}
    paper = DuchPairs(["s1", "s2"], **small)
    code = DuchPairs(["s1", "s2"], similarity_sign="code", **small)
    code.load_state_dict(paper.state_dict())
    a, b = paper.losses(x, epoch=1), code.losses(x, epoch=1)
    assert a["msp"].item() == -b["msp"].item() < 0
    assert (b["loss"] - a["loss"]).item() == pytest.approx(2*geometric_ramp(1, 4)*b["msp"].item(), rel=1e-4)
    assert torch.equal(paper.losses(x, epoch=99)["loss"], paper.losses(x, epoch=3)["loss"])
    assert torch.equal(paper.eval().losses(x)["loss"], paper.losses(x, epoch=3)["loss"])


def test_pairs_refuse_what_cannot_be_learned():
    small = dict(img_size=24, patch_size=8, embed_dim=16, num_heads=2, depth=1, n_bits=16)
    method = DuchPairs(["s1", "s2"], **small)
    x = {m: random(2, c, 24, 24).float() for m, c in dict(s1=2, s2=10).items()}
    with pytest.raises(InputError, match="larger batch"): method.losses({m: o[:1] for m, o in x.items()})
    with pytest.raises(InputError, match="pairs of sensors"): method.losses(dict(s2=x["s2"]))
    with pytest.raises(InputError, match="learns from pairs"): DuchPairs(["s1"], **small)
    with pytest.raises(InputError, match="multiple of 8"): DuchPairs(["s1", "s2"], **{**small, "n_bits": 12})
    with pytest.raises(UnknownNameError, match="paper"): DuchPairs(["s1", "s2"], similarity_sign="papers", **small)
    with pytest.raises(UnknownNameError): method.hash(torch.zeros(1, 16), "s3")
    three = DuchPairs(["s1", "s2", "rgb"], norm=None, **small)
    assert torch.isfinite(three.losses(dict(x, rgb=x["s1"][:, [0, 1, 1]]))["loss"])


def test_published_file_is_read_whole_or_not_at_all(tmp_path):
    twin = DuchPairs(["s1", "s2"], img_size=24, patch_size=8, embed_dim=16, num_heads=2, depth=2, n_bits=24,
                     global_pool="avg", norm="ben_v1")
    own = {k: v for k, v in twin.state_dict().items() if not k.startswith("inputs.")}
    state = {k.removeprefix("backbone."): v for k, v in to_published_names(own, layout="duch_pairs").items()}
    def read(changed):
        torch.save({"state_dict": changed}, tmp_path/"duch.ckpt")
        return DuchPairs.from_published(tmp_path/"duch.ckpt", num_heads=2)
    found = read(state)
    assert found.arguments["global_pool"] == "avg" and found.heads.n_bits == 24 and found.inputs.transpose
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in found.state_dict().items() if not k.startswith("inputs."))
    for name in state:
        with pytest.raises(InputError): read({k: v for k, v in state.items() if k != name})
    with pytest.raises(InputError, match="not those of a BEN-DUCH"): read({**state, "f.0.weight": torch.zeros(16, 16)})
    with pytest.raises(InputError): read({**state, "norm.bias": torch.zeros(5)})


# ---- full DUCH

def write_features(path, n=120, seed=0, **changes):
    "Vectors of images and captions of items of four kinds."
    rng = np.random.default_rng(seed)
    labels = np.eye(4, dtype=int)[rng.integers(4, size=n)]
    place = labels @ rng.normal(size=(4, 8)) + 0.3*rng.normal(size=(n, 8))
    look = lambda d: place @ rng.normal(size=(8, d)) + 0.3*rng.normal(size=(n, d))
    content = dict(image_emb=look(20), caption_emb=look(12), labels=labels, ids=[f"item{i}" for i in range(n)])
    np.savez(path, **{k: v for k, v in {**content, **changes}.items() if v is not None})
    return path


@pytest.fixture(scope="module")
def features(tmp_path_factory): return write_features(tmp_path_factory.mktemp("features")/"features.npz")


def full_config(features, out, *changes): return load_config("duch", [f"data.path={features}", f"out={out}", *FULL, *changes])


@pytest.fixture(scope="module")
def full_run(features, tmp_path_factory):
    return pretrain(full_config(features, tmp_path_factory.mktemp("full")/"run"), progress=False)


def test_both_networks_get_their_own_steps(features, full_run, tmp_path):
    cfg = full_config(features, tmp_path/"run", "method.adversarial=0")
    fresh, trained = build_method(cfg, build_archive(cfg.data)), load_method(full_run)
    moved = {k.split(".")[0] for k, v in fresh.named_parameters() if not torch.equal(v, trained.get_parameter(k))}
    assert moved == {"heads", "discriminator"}
    alone = load_method(pretrain(cfg, progress=False))
    moved = {k.split(".")[0] for k, v in fresh.named_parameters() if not torch.equal(v, alone.get_parameter(k))}
    assert moved == {"heads"}
    history = read_history(full_run)
    assert history.step.tolist() == list(range(1, 3*3 + 1))   # 60 items: three batches of 16 an epoch
    assert {"discriminator", "adversarial", "inter", "intra"} <= set(history)
    assert "adversarial" not in read_history(tmp_path/"run")


def test_the_discriminator_step_leaves_the_heads_alone(features):
    torch.manual_seed(0)
    method = Duch(FeatureArchive(features).sensors, n_bits=16, hidden_dim=24)
    codes = {m: [torch.randn(8, 16).tanh().requires_grad_(True) for _ in range(2)] for m in method.sensors}
    optim = torch.optim.SGD(method.discriminator.parameters(), lr=0.05)
    losses = []
    for i in range(100):
        terms = method.discriminator_losses(codes, torch.Generator().manual_seed(i))
        optim.zero_grad()
        terms["loss"].backward()
        optim.step()
        losses.append(terms["discriminator"].item())
    assert losses[-1] < losses[0] and all(h.grad is None for pair in codes.values() for h in pair)
    method.losses_of(codes)["adversarial"].backward()
    a, b = codes.values()
    assert a[0].grad is not None and a[1].grad is not None and b[0].grad is None


def test_objective_is_the_published_sum_over_two_n(features):
    torch.manual_seed(0)
    method = Duch(FeatureArchive(features).sensors, n_bits=16, hidden_dim=24).double()
    N, (a1, a2, b1, b2) = 6, random(4, 6, 16).tanh()
    target = torch.sign(random(6, 16, seed=1))
    found = method.losses_of(dict(image=[a1, a2], text=[b1, b2]), target)
    def ntxent_sum(x, y):
        "As published: at temperature 1, with the vector itself taken out by subtracting e."
        z = torch.nn.functional.normalize(torch.cat([x, y]))
        like = (z @ z.T).exp()
        return -(like[torch.arange(2*N), (torch.arange(2*N) + N) % (2*N)]/(like.sum(1) - np.e)).log().sum()
    views = a1, a2, b1, b2
    logits = method.discriminator(torch.cat([a1, a2]))
    wanted = ntxent_sum(a1, b1) + ntxent_sum(a1, a2) + ntxent_sum(b1, b2) \
        - 0.01*torch.sigmoid(logits).log().sum() + 0.001*sum(((target - h)**2).sum() for h in views) \
        + 0.01*sum((h.sum(1)**2).sum() for h in views)
    assert 2*N*found["loss"].item() == pytest.approx(wanted.item(), rel=1e-10)


def test_agreed_codes_are_refreshed(features):
    torch.manual_seed(0)
    archive = FeatureArchive(features)
    method = Duch(archive.sensors, n_bits=16, hidden_dim=24, noise=0.)
    memory = method.remember(archive)
    first, again, later = method.agree(memory, 0), method.agree(memory, 0), method.agree(memory, 1)
    assert torch.equal(first, again) and set(first.unique().tolist()) == {-1, 1} and not torch.equal(first, later)
    method.eval()   # without noise, the four codes are two
    h = [method.hash(torch.stack([archive[i][m].flatten() for i in range(len(archive))]), m) for m in method.sensors]
    assert torch.equal(later, torch.where(sum(h) >= 0, 1., -1.))


def test_resumed_training_ends_with_the_same_weights(features, full_run, tmp_path, monkeypatch):
    step = Duch.steps
    def killed(self, batch, generator):
        if self.epoch == 2: raise RuntimeError("killed")
        yield from step(self, batch, generator)
    cfg = full_config(features, tmp_path/"run")
    monkeypatch.setattr(Duch, "steps", killed)
    with pytest.raises(RuntimeError, match="killed"): pretrain(cfg, progress=False)
    monkeypatch.undo()
    assert load_method(pretrain(cfg, progress=False)).weights_hash == load_method(full_run).weights_hash
    assert read_history(tmp_path/"run").equals(read_history(full_run))


def test_text_finds_images_and_images_text(features, tmp_path):
    changes = ["optim.epochs=12", "optim.lr=3e-3", "method.n_bits=32", "method.hidden_dim=48"]
    run = pretrain(full_config(features, tmp_path/"run", *changes), progress=False)
    store = encode_run(run, progress=False)
    found = evaluate_store(store, Protocol("val", "test", (20,), "DUCH"), drawings=20, metrics=["map_first_relevant"])
    rows = found.table[(found.table.metric == "map_first_relevant") & (found.table.k == 20)].set_index("direction").value
    assert set(rows.index) == {"image->image", "image->text", "text->image", "text->text"}
    assert rows[["image->text", "text->image"]].min() > 0.6   # four kinds: 0.25 by chance


def test_a_trained_run_as_backbone(tmp_path):
    csmae = pretrain(tiny_config(tmp_path/"csmae"), progress=False)
    cfg = tiny_config(tmp_path/"duch", "method=duch", f"method.backbone={csmae}", "method.n_bits=16", "method.hidden_dim=24")
    run, archive = pretrain(cfg, progress=False), build_archive(cfg.data)
    before = load_method(csmae)
    shutil.rmtree(csmae)   # the saved method needs it no more
    method = load_method(run)
    x = {m: torch.stack([archive[i][m] for i in range(5)]) for m in method.sensors}
    for m in x: assert torch.equal(method.embed(x[m], m), before.embed(x[m], m))
    assert all(torch.equal(v, method.backbone.state_dict()[k]) for k, v in before.state_dict().items())
    assert "csmae" in method.describe()["arguments"]["backbone"]["method"]
    store = encode_run(run, progress=False)
    assert store.n_bits == 16 and store.modalities == ["s1", "s2"]
    assert not [k for k, p in method.named_parameters() if k.startswith("backbone.") and p.requires_grad]


def test_second_views_of_an_archive_are_used(tmp_path):
    write_features(tmp_path/"a.npz"), write_features(tmp_path/"b.npz", seed=1)
    archive = FeatureArchive(tmp_path/"a.npz", view_path=tmp_path/"b.npz")
    method = Duch(archive.sensors, n_bits=16, hidden_dim=24)
    assert list(method.sensors) == ["image", "text"] and set(archive.sensors) == {"image", "text", "image_view", "text_view"}
    memory = method.remember(archive)
    other = FeatureArchive(tmp_path/"b.npz")
    for m in method.sensors:
        assert torch.equal(memory.views[m][1][7], other[7][m].flatten())
    batch = collate([archive[i] for i in range(8)])
    assert torch.isfinite(method.losses(batch)["loss"])


def test_full_duch_refuses_what_cannot_be_learned(features, tmp_path):
    archive = FeatureArchive(features)
    method = Duch(archive.sensors, n_bits=16, hidden_dim=24)
    batch = collate([archive[i] for i in range(4)])
    with pytest.raises(InputError, match="told apart"): method.losses({m: batch[m][:1] for m in method.sensors})
    with pytest.raises(InputError, match="text is missing"): method.losses(dict(image=batch["image"]))
    with pytest.raises(InputError, match="two modalities"): Duch(dict(image=archive.sensors["image"]))
    with pytest.raises(InputError, match="two modalities"): Duch(["s1", "s2", "rgb"])
    with pytest.raises(InputError, match="hashes features"): Duch(["s1", "s2"], img_size=30)
    with pytest.raises(MissingFileError, match="finished run"): Duch(["s1", "s2"], backbone=tmp_path)
    with pytest.raises(InputError, match="multiple of 8"): Duch(archive.sensors, n_bits=20)
    for change in "trainer.clip=1", "trainer.accumulate=2":
        cfg = full_config(features, tmp_path/change.split(".")[1], change)
        with pytest.raises(InputError, match="in turns"): pretrain(cfg, progress=False)


# ---- archives of features

def test_features_meet_the_contract(features, tmp_path):
    archive, raw = FeatureArchive(features), np.load(features)
    assert archive["item5"]["image"].shape == (20, 1, 1) and archive["item5"]["image"].dtype == torch.float32
    assert np.array_equal(archive[5]["text"].flatten(), raw["caption_emb"][5].astype(np.float32))
    assert np.array_equal(archive.labels, raw["labels"])
    assert archive.table["split"].value_counts().to_dict() == dict(train=60, val=12, test=48)
    assert archive.table["split"].tolist() == FeatureArchive(features).table["split"].tolist()
    assert archive.table["split"].tolist() != FeatureArchive(features, seed=1).table["split"].tolist()
    batch = next(ArchiveData(archive.split("train"), batch_size=8).batches())
    assert batch["text"].shape == (8, 12, 1, 1)
    import pickle
    assert torch.equal(pickle.loads(pickle.dumps(archive))[3]["text"], archive[3]["text"])


def test_several_captions(tmp_path):
    flat = np.random.default_rng(0).normal(size=(600, 12))
    for shape in (600, 12), (120, 5, 12):
        path = write_features(tmp_path/"f.npz", caption_emb=flat.reshape(shape))
        first, mean, each = (FeatureArchive(path, several=o) for o in ("first", "mean", "each"))
        assert np.allclose(first[3]["text"].flatten(), flat[15]) and len(first) == len(mean) == 120
        assert np.allclose(mean[3]["text"].flatten(), flat[15:20].mean(0), atol=1e-6)
        assert len(each) == 600 and np.allclose(each["item3#2"]["text"].flatten(), flat[17])
        assert torch.equal(each["item3#2"]["image"], first[3]["image"])
        assert each.table.assign(item=each.item).groupby("item")["split"].nunique().max() == 1


@pytest.mark.parametrize("changes,match", [
    (dict(image_emb=np.ones((119, 4))), "does not belong"), (dict(caption_emb=np.ones((121, 4))), "does not belong"),
    (dict(image_emb=np.ones(120)), "no vectors"), (dict(image_emb=np.array(["a"]*120)), "no vectors"),
    (dict(labels=np.ones((7, 2))), "does not belong"), (dict(classes=["a"]), "do not fit"),
    (dict(ids=["a"]*120), "not unique"), (dict(split=["train"]), "does not belong"),
    (dict(image_emb=np.full((120, 3), np.inf)), "NaN or infinity"), (dict(image_emb=None), "image_emb"),
    (dict(ids=[], labels=None), "does not belong"), (dict(ids=None, labels=None, caption_emb=np.ones((0, 3))), "0, or a"),
    (dict(labels=np.full(120, 5), classes=["a", "b"]), "do not fit")])
def test_features_that_do_not_fit(tmp_path, changes, match):
    with pytest.raises((InputError, UnknownNameError), match=match): FeatureArchive(write_features(tmp_path/"f.npz", **changes))


def test_one_class_is_told(tmp_path, caplog):
    path = write_features(tmp_path/"f.npz", labels=np.array(["sea"]*120))
    with caplog.at_level(logging.WARNING): archive = FeatureArchive(path)
    assert archive.class_names[0] == ["sea"] and "one class" in caplog.text


def test_damaged_and_unsafe_files(tmp_path):
    good = write_features(tmp_path/"f.npz")
    for cut in 10, 100, 5000:
        (tmp_path/"cut.npz").write_bytes(good.read_bytes()[:-cut])
        with pytest.raises(CorruptError): FeatureArchive(tmp_path/"cut.npz")
    np.savez(tmp_path/"pickled.npz", image_emb=np.array([{}], dtype=object))
    with pytest.raises(UnsafeFileError, match="run code"): read_arrays(tmp_path/"pickled.npz")
    (tmp_path/"f.txt").write_text("1,2")
    with pytest.raises(InputError, match=".npz"): read_arrays(tmp_path/"f.txt")


def test_hdf5_says_the_same(tmp_path, features):
    h5py = pytest.importorskip("h5py")   # an extra
    raw = read_arrays(features)
    with h5py.File(tmp_path/"f.h5", "w") as f:
        for k, v in raw.items(): f[k] = v.tolist() if v.dtype.kind == "U" else v
    a, b = FeatureArchive(features), FeatureArchive(tmp_path/"f.h5")
    assert a.ids == b.ids and torch.equal(a[9]["text"], b[9]["text"]) and np.array_equal(a.labels, b.labels)
    with h5py.File(tmp_path/"link.h5", "w") as f: f["image_emb"] = h5py.ExternalLink(str(tmp_path/"f.h5"), "image_emb")
    with pytest.raises(UnsafeFileError, match="no array of its own"): read_arrays(tmp_path/"link.h5")
    with h5py.File(tmp_path/"raw.h5", "w") as f:
        f.create_dataset("image_emb", (4,), "u1", external=[(str(features), 0, 4)])
    with pytest.raises(UnsafeFileError, match="no array of its own"): read_arrays(tmp_path/"raw.h5")
    (tmp_path/"cut.h5").write_bytes((tmp_path/"f.h5").read_bytes()[:300])
    with pytest.raises(CorruptError): read_arrays(tmp_path/"cut.h5")


def test_hdf5_without_h5py(tmp_path, monkeypatch):
    import sys
    (tmp_path/"f.h5").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(InputError, match="numpy.savez"): read_arrays(tmp_path/"f.h5")
