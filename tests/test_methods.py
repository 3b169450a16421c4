"""Methods: the contract of `Method`, every CSMAE variant, the hand-made baselines against independent computations."""
import json
from itertools import product

import numpy as np
import pytest
import torch
from sklearn.cross_decomposition import CCA

from rsir_nb.core import METHODS, CorruptError, InputError, UnknownNameError
from rsir_nb.machine import declare_torchvision_ops
from rsir_nb.data.base import TensorArchive
from rsir_nb.engine.loop import Training
from rsir_nb.methods.base import Method
from rsir_nb.methods.baselines import BandCCA, BandStatistics, band_statistics, canonical_correlation
from rsir_nb.methods.csmae import CSMAE, VARIANTS
from rsir_nb.methods.hashing import HashHeads
from rsir_nb.sensors import BAND_ORDERS, Sensor

declare_torchvision_ops()
import pytorch_lightning as pl

TINY = dict(img_size=24, patch_size=6, embed_dim=32, num_heads=2, specific_depth=1, shared_depth=1,
            decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
SENSORS = dict(s1="s1", s2="s2", thermal=Sensor("thermal", ("T1", "T2", "T3"), "K", 100))
NORM = dict(s1="ben_v2", s2="ben_v2", thermal=dict(T1=(280, 10), T2=(285, 10), T3=(290, 10)))


def images(n=4, size=24, seed=0, modalities=("s1", "s2")):
    g = torch.Generator().manual_seed(seed)
    draw = dict(s1=(2, -15, 4), s2=(10, 1800, 700), thermal=(3, 285, 8))
    return {m: mean + std*torch.randn(n, c, size, size, generator=g)
            for m, (c, mean, std) in draw.items() if m in modalities}


def stats_of(*modalities):
    from rsir_nb.sensors import NORM_TABLES
    return {m: NORM[m] if m == "thermal" else NORM_TABLES["ben_v2"] for m in modalities}


@pytest.fixture(scope="module")
def csmae():
    torch.manual_seed(0)
    method = CSMAE(["s1", "s2"], **TINY)
    method.heads = HashHeads(dict(s1=32, s2=32), n_bits=32)
    return method


@pytest.mark.parametrize("masking,reconstruction,decoder,depths",
    list(product(("random", "identical", "disjoint"), ("disjoint", "identical"), ("specific", "common"), ((0, 2), (1, 1)))))
def test_every_combination_learns_something(masking, reconstruction, decoder, depths):
    torch.manual_seed(0)
    method = CSMAE(["s1", "s2"], **{**TINY, "specific_depth": depths[0], "shared_depth": depths[1]}, masking=masking,
                   reconstruction=reconstruction, decoder=decoder, mde_weight=1, norm_pix=True, reconstruction_loss="l1")
    adam = torch.optim.AdamW(method.parameters(), 3e-3)
    values = []
    for _ in range(4):
        terms = method.losses(images(), generator=torch.Generator().manual_seed(0))
        adam.zero_grad()
        terms["loss"].backward()
        adam.step()
        values.append(terms["loss"].item())
    assert set(terms) == {"loss", "umr_s1", "umr_s2", "cmr_s1_from_s2", "cmr_s2_from_s1", "mim", "mde"}
    assert np.isfinite(values).all() and values[-1] < values[0]
    without = [k for k, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


@pytest.mark.parametrize("name", VARIANTS)
def test_paper_variants(name):
    depths = {k: min(v, 2) if k.endswith("depth") else v for k, v in VARIANTS[name].items()}
    method = METHODS.create("csmae", sensors=["s1", "s2"], **{**TINY, **depths})
    assert (method.decoder.kind == "common") == (name[-2] == "c")
    assert bool(len(method.backbone.specific_blocks)) == (name[0] == "s")


@pytest.mark.parametrize("masking", ("random", "identical", "disjoint"))
def test_three_sensors(masking):
    three = ("s1", "s2", "thermal")
    method = CSMAE(SENSORS, norm=stats_of(*three), masking=masking, **TINY)
    terms = method.losses(images(modalities=three))
    assert len([k for k in terms if k.startswith("cmr_")]) == 6 and len([k for k in terms if k.startswith("umr_")]) == 3
    assert torch.isfinite(terms["loss"]) and "mim" in terms
    z = method.embed(images(modalities=("thermal",)))
    assert z["thermal"].shape == (4, 32)
    shown = method.reconstruct(images(modalities=three))
    assert len(shown.guesses) == 9 and shown.guesses["s1", "thermal"].shape == (4, 3, 24, 24)


def test_losses_do_not_depend_on_global_randomness(csmae):
    first = csmae.losses(images(), generator=torch.Generator().manual_seed(3))["loss"]
    torch.manual_seed(99)
    assert torch.equal(first, csmae.losses(images(), generator=torch.Generator().manual_seed(3))["loss"])


@pytest.mark.parametrize("modality,size", (("s1", 24), ("s2", 24), ("s2", 48)))
def test_same_image_same_embedding_and_code_whatever_the_batch(csmae, modality, size):
    if size != csmae.img_size:
        heads, csmae = csmae.heads, CSMAE(["s1", "s2"], **{**TINY, "img_size": size})
        csmae.heads = heads
    x = images(64, size)[modality]
    whole = csmae.embed(x, modality)
    code = csmae.hash(whole, modality)
    for size in 1, 2, 7, 33:
        parts = torch.cat([csmae.embed(o, modality) for o in x.split(size)])
        assert torch.equal(parts, whole), size
        assert torch.equal(torch.cat([csmae.hash(o, modality) for o in parts.split(size)]), code), size
    assert torch.equal(csmae.embed(x.flip(0), modality).flip(0), whole)


def test_embed_norm_is_batch_norm_in_training_and_steady_afterwards(tmp_path):
    method, batch = CSMAE(["s1", "s2"], **TINY, embed_norm="batch"), images(16)
    plain = CSMAE(["s1", "s2"], **TINY)
    plain.load_state_dict({k: v for k, v in method.state_dict().items() if "embed_norms" not in k})
    g = lambda: torch.Generator().manual_seed(0)
    for _ in range(200): out = method.masked_pass(batch, generator=g())
    raw = plain.masked_pass(batch, generator=g()).features
    for m in batch:
        wanted = torch.nn.functional.batch_norm(raw[m], None, None, training=True)
        torch.testing.assert_close(out.features[m], wanted)
        mean, var = raw[m].mean(0), raw[m].var(0)
        z = (plain.embed(batch[m], m) - mean)/(var + 1e-5).sqrt()
        torch.testing.assert_close(method.embed(batch[m], m), z, rtol=1e-3, atol=1e-3)
        assert torch.equal(method.embed(batch[m][3:4], m), method.embed(batch[m], m)[3:4])
    before = {k: v.clone() for k, v in method.state_dict().items()}
    method.reconstruct(batch), method.masked_pass({m: o[:1] for m, o in batch.items()})
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items()), "only batches count"
    again = Method.load(method.save(tmp_path/"method"))
    assert torch.equal(again.embed(batch["s1"], "s1"), method.eval().embed(batch["s1"], "s1"))


def test_decoding_a_part_of_the_batch():
    "The reconstruction terms are those of the first images; the contrastive term is that of all."
    some, every = (CSMAE(["s1", "s2"], **TINY, decode_ratio=o, seed=1) for o in (0.25, 1))
    every.load_state_dict(some.state_dict())
    batch, noises = images(7), {m: torch.rand(7, 16, generator=torch.Generator().manual_seed(i)) for i, m in enumerate(("s1", "s2"))}
    terms, all_terms = some.losses(batch, noises), every.losses(batch, noises)
    few = every.losses({m: o[:2] for m, o in batch.items()}, {m: o[:2] for m, o in noises.items()})
    torch.testing.assert_close(terms["mim"], all_terms["mim"])
    for k in terms.keys() - {"mim", "loss"}: torch.testing.assert_close(terms[k], few[k])
    with pytest.raises(InputError, match="above 0, up to 1"): CSMAE(["s1", "s2"], **TINY, decode_ratio=1.5)


def test_embed_leaves_the_training_mode_alone(csmae):
    csmae.train()
    csmae.embed(images())
    assert csmae.training
    csmae.eval()
    assert not csmae.embed(images())["s1"].requires_grad and not csmae.training


def test_the_published_way_of_looking_at_images():
    "Reordered, transposed and normalised by hand, the same embedding comes out."
    torch.manual_seed(0)
    method = CSMAE(["s1", "s2"], norm="ben_v1", band_orders=BAND_ORDERS["csmae"], transpose=True, **TINY)
    x = images()["s2"]
    from rsir_nb.sensors import get_sensor, norm_stats, reorder_bands
    mean, std = norm_stats(BAND_ORDERS["csmae"]["s2"], "ben_v1")
    seen = reorder_bands(x, get_sensor("s2").bands, BAND_ORDERS["csmae"]["s2"])
    seen = ((seen - mean[:, None, None]) / std[:, None, None]).transpose(2, 3)
    with torch.no_grad(): expected = method.backbone(seen, "s2")
    torch.testing.assert_close(method.embed(x, "s2"), expected)
    shown = method.reconstruct(images())
    tokens = shown.hidden["s2"][0, 0].reshape(4, 6, 4, 6).mean((1, 3))
    noise = torch.arange(16.).flip(0)[None].repeat(4, 1)   # the first half of the tokens, row by row, is hidden
    shown = method.reconstruct(images(), dict(s1=noise, s2=noise))
    tokens = shown.hidden["s2"][0, 0].reshape(4, 6, 4, 6).mean((1, 3))
    assert tokens.tolist() == [[1, 1, 0, 0]]*4             # swapped back: columns of the upright image


def test_save_and_load(csmae, tmp_path):
    x = images()
    csmae.save(tmp_path/"method")
    again = Method.load(tmp_path/"method")
    assert type(again) is CSMAE and again.weights_hash == csmae.weights_hash and not again.training
    for m in x:
        assert torch.equal(again.embed(x[m], m), csmae.embed(x[m], m))
        assert torch.equal(again.hash(again.embed(x[m], m), m), csmae.hash(csmae.embed(x[m], m), m))
    assert again.optim == csmae.optim and again.sensors == csmae.sensors
    again.save(tmp_path/"method")   # over what is there
    about = json.loads((tmp_path/"method/method.json").read_text())
    assert about["norm_stats"]["s2"]["B08"][0] == pytest.approx(2193.29199)
    assert CSMAE.load(tmp_path/"method").weights_hash == csmae.weights_hash
    with pytest.raises(InputError, match="another method"): BandStatistics.load(tmp_path/"method")


def test_damaged_files_are_named(csmae, tmp_path):
    csmae.save(tmp_path/"a")
    weights = tmp_path/"a/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9])
    with pytest.raises(CorruptError, match="model.safetensors"): Method.load(tmp_path/"a")
    weights.write_bytes(whole[:-9] + bytes(9))
    with pytest.raises(CorruptError, match="damaged"): Method.load(tmp_path/"a")
    weights.unlink()
    with pytest.raises(FileNotFoundError): Method.load(tmp_path/"a")
    with pytest.raises(FileNotFoundError): Method.load(tmp_path/"b")


def test_weights_hash_tells_what_decides_about_codes():
    def made(**kw):
        torch.manual_seed(0)
        return CSMAE(["s1", "s2"], **{**TINY, **kw})
    base = made()
    assert made(optim=dict(lr=1e-3), seed=5).weights_hash == base.weights_hash
    assert made(num_heads=4).weights_hash != base.weights_hash      # not visible in any tensor
    assert made(norm="ben_v1").weights_hash != base.weights_hash
    assert made(transpose=True).weights_hash != base.weights_hash


def test_what_does_not_fit_is_named(csmae):
    x = images()
    with pytest.raises(UnknownNameError, match="s3"): csmae.embed(x["s1"], "s3")
    with pytest.raises(InputError, match="no image of this method's sensors; found radar; wanted s1 or s2"): csmae.embed(dict(radar=x["s1"]))
    with pytest.raises(InputError, match="10: B02"): csmae.embed(x["s1"], "s2")
    with pytest.raises(InputError, match="to_grid"): csmae.embed(x["s1"][..., :20, :20], "s1")
    with pytest.raises(InputError, match="NaN"): csmae.embed(torch.full((1, 2, 24, 24), torch.nan), "s1")
    with pytest.raises(InputError, match="train_heads"): CSMAE(["s1"], **TINY).hash(torch.zeros(1, 32), "s1")
    with pytest.raises(InputError, match="no decoder"): CSMAE(["s1"], decoder=None, **TINY).reconstruct(x)
    with pytest.raises(UnknownNameError, match="mask_ratio"): METHODS.create("csmae", sensors=["s1"], maskratio=1)
    with pytest.raises(UnknownNameError, match="lr"): CSMAE(["s1"], optim=dict(lrate=1), **TINY)
    with pytest.raises(InputError, match="no training objective"): BandStatistics(["s1"]).losses(x)


def test_one_epoch_with_lightning(tmp_path):
    data = torch.utils.data.DataLoader([{m: o[i] for m, o in images(8).items()} for i in range(8)], batch_size=4)
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append((trainer.optimizers[0].param_groups[0]["lr"], dict(trainer.callback_metrics)))

    torch.manual_seed(0)
    method = CSMAE(["s1", "s2"], optim=dict(lr=1e-3, warmup_epochs=1, epochs=2), **TINY)
    before = method.weights_hash
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    pl.Trainer(max_epochs=2, accelerator="cpu", callbacks=[Watch()], **quiet).fit(Training(method), data, data)
    assert [lr for lr, _ in seen] == pytest.approx([1e-3, 1e-3, 5e-4, 0])   # of the step that comes next
    assert {"train/loss", "train/umr_s1", "train/cmr_s2_from_s1", "train/mim"} <= set(seen[0][1])
    assert "val/loss" in seen[-1][1] and method.weights_hash != before


def test_fit_norm(tmp_path):
    x = images(6)
    method = CSMAE(["s1", "s2"], **TINY).fit_norm(TensorArchive(x))
    z = torch.cat([method.prepare(x["s2"], "s2")]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(z.mean(1), torch.zeros(10), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std(1), torch.ones(10), atol=1e-3, rtol=0)
    again = Method.load(method.save(tmp_path/"m"))
    assert torch.equal(again.prepare(x["s2"], "s2"), method.prepare(x["s2"], "s2"))


def correlated(n=300, seed=0):
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(n, 3))
    return [torch.tensor(common @ rng.normal(size=(3, d)) + rng.normal(size=(n, d))) for d in (5, 8)]


def test_canonical_correlation_is_that_of_sklearn():
    x, y = correlated()
    wx, wy, corr = canonical_correlation(x, y, 4)
    a, b = CCA(4, max_iter=5000, tol=1e-12).fit_transform(x.numpy(), y.numpy())
    expected = [np.corrcoef(a[:, i], b[:, i])[0, 1] for i in range(4)]
    np.testing.assert_allclose(corr, expected, atol=1e-6)
    u, v = (x - x.mean(0)) @ wx, (y - y.mean(0)) @ wy
    np.testing.assert_allclose(u.T @ u / len(x), np.eye(4), atol=1e-9)
    np.testing.assert_allclose(u.T @ v / len(x), np.diag(expected), atol=1e-6)


def test_canonical_correlation_of_dependent_columns():
    x, y = correlated()
    corr = canonical_correlation(x, y)[2]
    again = canonical_correlation(torch.cat([x, x @ torch.ones(5, 2, dtype=x.dtype)], 1), y)[2]
    np.testing.assert_allclose(again[:5], corr[:5], atol=1e-6)


def test_band_statistics_against_numpy():
    x = images(3)["s2"]
    found = band_statistics(x).view(3, 10, 9).double().numpy()
    a = x.double().numpy()
    flat = a.reshape(3, 10, -1)
    dy, dx = np.diff(a, axis=2)[..., :-1], np.diff(a, axis=3)[:, :, :-1]
    slope = np.hypot(dx, dy).reshape(3, 10, -1)
    wanted = [flat.mean(-1), flat.std(-1, ddof=1), slope.mean(-1), slope.std(-1, ddof=1),
              *np.quantile(flat, (0.05, 0.25, 0.5, 0.75, 0.95), axis=-1)]
    np.testing.assert_allclose(found, np.stack(wanted, -1), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("name", ("band_statistics", "band_cca"))
def test_baselines_fit_save_and_load(name, tmp_path):
    x = images(40)
    method = METHODS.create(name, sensors=["s1", "s2"], img_size=24)
    with pytest.raises(InputError, match="fit"): method.embed(x)
    method.fit(TensorArchive(x))
    z = method.embed(x)
    again = Method.load(method.save(tmp_path/"m"))
    assert all(torch.equal(again.embed(x)[m], z[m]) for m in x)
    assert torch.equal(method.embed(x["s2"][5:6], "s2"), z["s2"][5:6])
    if name == "band_cca": assert z["s1"].shape == z["s2"].shape == (40, method.embed_dim)
    else: assert {m: o.shape[1] for m, o in z.items()} == method.embed_dim


def test_band_cca_finds_what_sensors_share():
    "A brightness that both sensors see, with opposite signs, is the first component on unseen places too."
    rng = np.random.default_rng(0)
    level = torch.tensor(rng.normal(size=(60, 1, 1, 1)), dtype=torch.float32)
    x = images(60)
    x = dict(s1=x["s1"] + 8*level, s2=x["s2"] - 1500*level)
    cca = BandCCA(["s1", "s2"], img_size=24).fit(TensorArchive({m: o[:40] for m, o in x.items()}))
    z = {m: o[40:, 0] for m, o in cca.embed(x).items()}
    assert np.corrcoef(z["s1"], z["s2"])[0, 1] > 0.95
    assert abs(np.corrcoef(z["s1"], level[40:].flatten())[0, 1]) > 0.95
    with pytest.raises(InputError, match="two sensors"): BandCCA(["s1"])


def test_weights_are_hashed_once_until_they_change(monkeypatch):
    from rsir_nb.models import fingerprint
    method, calls = METHODS.create("band_statistics", sensors=["s2"], img_size=None), []
    net = METHODS.create("csmae", sensors=["s1", "s2"], **TINY)
    real = fingerprint.content_hash
    monkeypatch.setattr(fingerprint, "content_hash", lambda *a: calls.append(1) or real(*a))
    first = net.weights_hash
    assert net.weights_hash == first and len(calls) == 1
    weight = next(net.parameters())
    with torch.no_grad(): weight.add_(1)
    second = net.weights_hash
    assert second != first and len(calls) == 2
    optimiser = torch.optim.AdamW(net.parameters(), lr=1., fused=True)     # which torch's counter does not see
    weight.grad = torch.ones_like(weight)
    optimiser.step()
    stepped = net.weights_hash
    assert stepped != first
    other = {k: v + 1 for k, v in net.state_dict().items()}
    net.load_state_dict(other)
    assert net.weights_hash not in (first, stepped)
    weight.data = weight.data.clone()*2
    assert net.weights_hash == real_hash(net)
    before = method.weights_hash
    with torch.no_grad():
        for o in method.buffers(): o.mul_(2)
    assert method.weights_hash == real_hash(method) and (not list(method.buffers()) or method.weights_hash != before)


def real_hash(method):
    "The name, computed anew."
    vars(method)["_fingerprint"].seen = None
    return method.weights_hash
