"Patches, masks, the multi-sensor transformer and decoders, against timm and against themselves."
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from rsir_nb.core import InputError, UnknownNameError
from rsir_nb.models.decoder import DECODERS, CrossSensorDecoder
from rsir_nb.models.masking import (MASKINGS, RECONSTRUCTIONS, count_visible, decoding_plan, make_noise,
                                    masking_plan, random_masking)
from rsir_nb.models.patches import PatchEmbed, patchify, sincos_pos_embed, unpatchify
from rsir_nb.models.vit import MultiSensorViT

THREE = dict(s1=2, s2=10, thermal=1)
SMALL = dict(img_size=40, patch_size=10, embed_dim=32, num_heads=4, specific_depth=1, shared_depth=1)


def rng(seed=0): return torch.Generator().manual_seed(seed)


def images(chans, n=3, size=40, seed=0):
    draw = lambda c, i: torch.randn(n, c, size, size, generator=rng(seed + i))
    return {m: draw(c, i) for i, (m, c) in enumerate(chans.items())}


# patches ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("chans,size,patch", [(1, (30, 30), 15), (10, (120, 120), 15), (3, (32, 64), 8)])
def test_patchify_round_trip(chans, size, patch):
    x = torch.randn(2, chans, *size)
    tokens = patchify(x, patch)
    assert torch.equal(unpatchify(tokens, patch, (size[0] // patch, size[1] // patch)), x)
    row, col = 1, 0   # a token by hand, channel fastest
    part = x[:, :, row * patch:(row + 1) * patch, col * patch:(col + 1) * patch].permute(0, 2, 3, 1)
    assert torch.equal(tokens[:, row * (size[1] // patch) + col], part.reshape(2, -1))


def test_positions_are_those_of_the_formula():
    import numpy as np
    D, rows, cols = 24, 3, 5
    table = sincos_pos_embed(D, (rows, cols)).numpy()
    for y in range(rows):
        for x in range(cols):
            w = 10000.0 ** (-np.arange(D // 4) / (D / 4))
            wanted = np.concatenate([f(p * w) for p in (x, y) for f in (np.sin, np.cos)])
            np.testing.assert_allclose(table[1 + y * cols + x], wanted, atol=1e-6)
    assert not table[0].any()


# masks --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ratio", [0, 0.1, 0.5, 0.7, 0.75, 0.9])
def test_masking_keeps_what_it_says(ratio):
    noise = make_noise(5, 64, rng())
    masked = random_masking(noise, ratio)
    assert masked.ids_keep.shape[1] == count_visible(64, ratio) == int(64 * (1 - ratio))
    everyone = torch.cat([masked.ids_keep, masked.ids_removed], 1)
    assert torch.equal(everyone.gather(1, masked.ids_restore), torch.arange(64).expand(5, -1))
    assert torch.equal(masked.mask.gather(1, masked.ids_removed), torch.ones_like(masked.ids_removed).float())
    assert masked.mask.sum() == masked.ids_removed.numel()
    if masked.ids_removed.numel():
        shown, hidden = noise.gather(1, masked.ids_keep), noise.gather(1, masked.ids_removed)
        assert (shown.amax(1) < hidden.amin(1)).all()


@pytest.mark.parametrize("modalities", ["ab", "abc", "abcde"])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7])
def test_disjoint_masks_show_no_place_twice(modalities, ratio):
    plan = masking_plan({m: make_noise(7, 64, rng()) for m in modalities}, "disjoint", ratio)
    shown = torch.stack([1 - random_masking(*p).mask for p in plan.values()])
    assert shown.sum(0).max() == 1
    assert (shown.sum(2) >= 1).all()
    assert shown[0].sum(1).eq(int(64 * (1 - ratio))).all()


def test_ties_in_noise_do_not_break_disjoint_masks():
    noise = torch.zeros(2, 64)
    plan = masking_plan(dict(a=noise, b=noise), "disjoint", 0.5)
    a, b = (random_masking(*plan[m]).mask for m in "ab")
    assert torch.equal(a, 1 - b)


@pytest.mark.parametrize("strategy", MASKINGS)
def test_nothing_is_masked_at_ratio_0(strategy):
    plan = masking_plan({m: make_noise(2, 16, rng()) for m in "abc"}, strategy, 0)
    assert all(ratio == 0 for _, ratio in plan.values())


def test_masks_that_leave_nothing_are_refused():
    with pytest.raises(InputError, match="smaller mask_ratio"): count_visible(16, 0.99)
    with pytest.raises(InputError): masking_plan({m: make_noise(1, 16) for m in "ab"}, "disjoint", 0.01)
    with pytest.raises(UnknownNameError): masking_plan(dict(a=make_noise(1, 4)), "none", 0.5)


# the encoder --------------------------------------------------------------------------------------

@pytest.mark.parametrize("pool", ["avg", "max", "token"])
def test_one_sensor_is_the_transformer_of_timm(pool):
    "With a single sensor and all blocks shared, the encoder is timm's; its weights go straight over."
    theirs = VisionTransformer(img_size=40, patch_size=10, in_chans=5, embed_dim=32, depth=3, num_heads=4,
        num_classes=0, global_pool=pool, fc_norm=False).eval()
    size = {**SMALL, "specific_depth": 0, "shared_depth": 3}
    ours = MultiSensorViT(dict(x=5), **size, global_pool=pool).eval()
    names = {"patch_embed.proj.": "patch_embeds.x.proj.", "cls_token": "cls_tokens.x"}
    state = {}
    for k, v in theirs.state_dict().items():
        for old, new in names.items(): k = k.replace(old, new)
        state[k] = v
    if pool == "avg": state |= {"fc_norm.weight": torch.ones(32), "fc_norm.bias": torch.zeros(32)}
    state["cls_tokens.x"] = state["cls_tokens.x"] + 0.3
    theirs.cls_token.data += 0.3
    ours.load_state_dict(state)
    x = images(dict(x=5))["x"]
    with torch.no_grad():
        wanted = theirs(x)
        if pool == "avg":
            tokens = theirs.forward_features(x)[:, 1:].mean(1)
            wanted = torch.nn.functional.layer_norm(tokens, (32,), eps=1e-6)
        torch.testing.assert_close(ours(x, "x"), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("specific,shared", [(0, 2), (2, 0), (1, 1), (0, 0)])
def test_any_split_of_depth_embeds_three_sensors(specific, shared):
    vit = MultiSensorViT(THREE, **{**SMALL, "specific_depth": specific, "shared_depth": shared})
    x = images(THREE)
    for m in THREE:
        z = vit(x[m], m)
        assert z.shape == (3, 32) and z.isfinite().all()
        z.sum().backward()
    assert set(vit.specific_blocks) == (set(THREE) if specific else set())


def test_embedding_is_repeatable_and_does_not_depend_on_the_batch():
    vit = MultiSensorViT(THREE, **SMALL).eval()
    x = images(THREE, n=6)["s2"]
    with torch.no_grad():
        whole = vit(x, "s2")
        assert torch.equal(whole, vit(x, "s2"))
        torch.testing.assert_close(torch.cat([vit(o, "s2") for o in x.split(1)]), whole, rtol=1e-5, atol=1e-6)


def test_order_of_visible_tokens_does_not_matter_for_the_embedding():
    "Noise that keeps the same tokens in another order gives the same pooled vector, up to rounding."
    vit = MultiSensorViT(THREE, **SMALL).eval()
    x = images(THREE)["s1"]
    low = torch.arange(16).repeat(3, 1) < 8
    noises = [torch.where(low, torch.rand(3, 16, generator=rng(i)), 1 + torch.rand(3, 16)) for i in range(2)]
    kept = [random_masking(noise, 0.5).ids_keep for noise in noises]
    with torch.no_grad(): a, b = (vit.pool(vit.encode(x, "s1", ids)) for ids in kept)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_visible_tokens_are_all_the_encoder_sees():
    vit = MultiSensorViT(THREE, **SMALL).eval()
    x, masked = images(THREE)["s2"], random_masking(make_noise(3, 16, rng()), 0.5)
    with torch.no_grad():
        tokens = vit.encode(x, "s2", masked.ids_keep)
        changed = torch.where(masked.mask[..., None] > 0, torch.tensor(9.0), patchify(x, 10))
        assert torch.equal(vit.encode(unpatchify(changed, 10), "s2", masked.ids_keep), tokens)


def test_embedding_some_tokens_is_embedding_all_and_choosing():
    "Values and gradients, whatever the layout of the images in memory."
    x, ids = torch.randn(3, 5, 40, 60), torch.stack([torch.randperm(24)[:7] for _ in range(3)])
    embed = PatchEmbed(5, 10, 16)
    for images_ in (x, x.transpose(2, 3).contiguous().transpose(2, 3)):
        every = embed(images_)
        wanted = every.gather(1, ids[..., None].expand(-1, -1, 16))
        grads = [torch.autograd.grad(o.square().sum(), embed.proj.weight)[0] for o in (wanted, embed(images_, ids))]
        torch.testing.assert_close(embed(images_, ids), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-3)
        assert torch.equal(patchify(images_, 10, ids), patchify(images_, 10).gather(1, ids[..., None].expand(-1, -1, 500)))


@pytest.mark.parametrize("kwargs,word", [
    (dict(in_chans={}), "sensor"), (dict(img_size=41), "divides img_size"), (dict(num_heads=5), "num_heads"),
    (dict(embed_dim=30, num_heads=3), "multiple of 4"), (dict(global_pool="median"), "global_pool")])
def test_impossible_sizes_are_refused(kwargs, word):
    with pytest.raises((InputError, UnknownNameError), match=word):
        MultiSensorViT(**{"in_chans": dict(s1=2), **SMALL, **kwargs})


def test_published_starting_values():
    vit = MultiSensorViT(dict(s1=2, s2=10), embed_dim=192, num_heads=3, specific_depth=1, shared_depth=1)
    bound = (6 / (192 + 2 * 225)) ** 0.5
    assert 0.98 * bound < vit.patch_embeds["s1"].proj.weight.abs().max() <= bound
    linear = [o for o in vit.modules() if isinstance(o, torch.nn.Linear)]
    assert all(o.bias.abs().max() == 0 for o in linear)
    for o in linear: assert o.weight.abs().max() <= (6 / sum(o.weight.shape)) ** 0.5
    assert 0.015 < vit.cls_tokens["s2"].std() < 0.025
    assert not vit.pos_embed.requires_grad


# encoder, masks and decoder together --------------------------------------------------------------

@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
@pytest.mark.parametrize("masking", MASKINGS)
def test_every_combination_steps_for_three_sensors(masking, reconstruction, decoder):
    from rsir_nb.losses.reconstruction import reconstruction_loss
    vit = MultiSensorViT(THREE, **SMALL)
    head = CrossSensorDecoder(THREE, 32, vit.grid, 10, kind=decoder, embed_dim=16, depth=1, num_heads=2)
    x = images(THREE)
    plan = masking_plan({m: make_noise(3, 16, rng(i)) for i, m in enumerate(THREE)}, masking, 0.5)
    masks = {m: random_masking(*plan[m]) for m in THREE}
    tokens = {m: vit.encode(x[m], m, masks[m].ids_keep) for m in THREE}
    total = 0
    for s in THREE:
        for t in THREE:
            restore, ids = decoding_plan(s, t, masks, masking, reconstruction)
            pred = head(tokens[s], restore, t, ids)
            assert pred.shape == (3, ids.shape[1], 100 * THREE[t])
            every, scored = head(tokens[s], restore, t), torch.zeros(3, 16).scatter(1, ids, 1)
            loss = reconstruction_loss(pred, patchify(x[t], 10, ids))
            torch.testing.assert_close(loss, reconstruction_loss(every, patchify(x[t], 10), scored))
            total = total + loss
    total.backward()
    for module in vit, head:
        learning = {k: p for k, p in module.named_parameters() if p.requires_grad and "fc_norm" not in k}
        assert not [k for k, p in learning.items() if p.grad is None] and total.isfinite()


def test_decoder_puts_tokens_where_they_belong():
    "A decoder without blocks predicts each visible token from itself alone, at its own place."
    head = CrossSensorDecoder(dict(a=1), 8, 4, 2, embed_dim=8, depth=0, num_heads=2).eval()
    tokens, noise = torch.randn(2, 16, 8), make_noise(2, 16, rng())
    kept, _, ids_restore = masked = random_masking(noise, 0.5)
    kept, mask = tokens.gather(1, kept[..., None].expand(-1, -1, 8)), masked.mask
    d = head.decoders["a"]
    with torch.no_grad():
        pred = head(torch.cat([torch.zeros(2, 1, 8), kept], 1), ids_restore, "a")
        full = torch.where(mask[..., None] > 0, d.mask_token, d.embed(tokens)) + d.pos_embed[:, 1:]
        torch.testing.assert_close(pred, d.preds["a"](d.norm(full)))
