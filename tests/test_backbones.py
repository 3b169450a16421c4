"Image encoders behind one registry: shapes, remapped filters, weights and what is refused, against timm itself."
import subprocess
import sys

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rsir_nb.core import BACKBONES, InputError, MissingFileError, UnknownNameError
from rsir_nb.machine import declare_torchvision_ops
from rsir_nb.models.backbones import Backbone, make_backbone, timm_backbone
from rsir_nb.models.first_conv import IN_WEIGHTS, remap_first_conv
from rsir_nb.models.tuning import blocks_of, choose_trainable, keep_still
from rsir_nb.models.small import SmallBlock

declare_torchvision_ops()
import timm  # noqa: E402
from timm.models import adapt_input_conv  # noqa: E402

SMALL = dict(name="vit", depth=1, embed_dim=32, num_heads=4)
CONVNEXT = dict(name="timm", model="convnext_atto")


def rng(seed=0): return torch.Generator().manual_seed(seed)


def saved(model, path, seed=0, **kwargs):
    "A timm model with random weights, and the file it was saved to."
    torch.manual_seed(seed)
    net = timm.create_model(model, pretrained=False, **kwargs).eval()
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, path)
    return net


def test_importing_the_page_does_not_import_timm():
    code = "import sys, rsir_nb.models.backbones; print('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize("spec", ["resnet18", "resnet34", "resnet50", "small_resnet", "vit", SMALL, CONVNEXT,
                                  dict(name="timm", model="vit_tiny_patch16_224")], ids=str)
@pytest.mark.parametrize("chans", [1, 3, 10])
def test_every_entry_embeds_any_bands(spec, chans):
    encoder = make_backbone(spec, chans, 64).eval()
    with torch.no_grad(): z = encoder(torch.randn(2, chans, 64, 64, generator=rng()))
    assert z.shape == (2, encoder.embed_dim) and z.isfinite().all()
    assert (encoder.in_chans, encoder.img_size) == (chans, 64)
    assert encoder.mean is encoder.std is encoder.size is None
    about = encoder.about()
    assert about["parameters"] == sum(o.numel() for o in encoder.parameters()) and about["embed_dim"] == z.shape[1]
    assert about["name"] == (spec if isinstance(spec, str) else spec["name"])


def test_what_is_registered_is_built_by_the_test_above():
    ours = {"resnet18", "resnet34", "resnet50", "small_resnet", "timm", "vit"}
    assert set(BACKBONES.list()) == ours | {"open_clip", "foundation", "shipped"} # of test_open_clip, test_pretrained


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "vit_small_patch14_dinov2", "vit_small_patch16_dinov3", "eva02_tiny_patch14_224",
                                   "swin_tiny_patch4_window7_224", "tf_efficientnet_lite0", "mixer_s32_224"])
def test_the_width_is_found_without_computing(model):
    encoder = timm_backbone(4, 224, model).eval()
    with torch.no_grad(): assert encoder(torch.zeros(1, 4, 224, 224)).shape == (1, encoder.embed_dim)


# filters ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("chans", [1, 2, 4, 7, 12])
def test_repeat_is_the_rule_of_timm(chans):
    conv = nn.Conv2d(3, 5, 7)
    wanted = adapt_input_conv(chans, conv.weight.detach().clone())
    torch.testing.assert_close(remap_first_conv(nn.Sequential(conv), chans)[0].weight.detach(), wanted)
    assert conv.in_channels == chans and conv.weight.requires_grad


@pytest.mark.parametrize("how", ["repeat", "mean"])
def test_equal_bands_keep_their_response(how):
    conv, x = nn.Conv2d(3, 4, 5), torch.rand(2, 1, 20, 20, generator=rng())
    before = conv(x.expand(-1, 3, -1, -1))
    for chans in (1, 6, 12):
        torch.testing.assert_close(remap_first_conv(nn.Sequential(conv), chans, how)(x.expand(-1, chans, -1, -1)), before)


@pytest.mark.parametrize("how,more", [("rgb_first", lambda w: 0 * w[:, 0]), ("copy_first", lambda w: w[:, 0])])
def test_first_bands_keep_their_filters(how, more):
    conv = nn.Conv2d(3, 4, 5)
    old = conv.weight.detach().clone()
    remap_first_conv(nn.Sequential(conv), 8, how)
    assert torch.equal(conv.weight[:, :3], old)
    for band in range(3, 8): assert torch.equal(conv.weight[:, band], more(old))
    remap_first_conv(nn.Sequential(conv), 2, how)
    assert torch.equal(conv.weight, old[:, :2])


@pytest.mark.parametrize("how", sorted(IN_WEIGHTS))
def test_three_bands_stay_as_they_are(how):
    conv = nn.Conv2d(3, 4, 5)
    old = conv.weight.detach().clone()
    remap_first_conv(nn.Sequential(conv), 3, how)
    assert torch.equal(conv.weight, old) == (how != "random")


def test_a_model_with_two_first_convolutions():
    net = timm.create_model("fastvit_t8", num_classes=0).eval()
    with torch.no_grad(): assert remap_first_conv(net, 6)(torch.zeros(1, 6, 64, 64)).shape[0] == 1


@pytest.mark.parametrize("net,word", [(nn.Linear(3, 4), "no convolution"), (nn.Conv2d(4, 4, 3, groups=4), "plain Conv2d")])
def test_networks_without_a_plain_first_convolution(net, word):
    with pytest.raises(InputError, match=word): remap_first_conv(net, 5)


# weights ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("model", ["resnet18", "convnext_atto", "tf_efficientnet_lite0", "vit_tiny_patch16_224"])
def test_weights_of_a_file_give_the_features_of_timm(model, tmp_path):
    net = saved(model, tmp_path / "w.safetensors")
    encoder = make_backbone(dict(name="timm", model=model, weights=str(tmp_path / "w.safetensors")), 3, 224).eval()
    net.reset_classifier(0)
    x = torch.randn(2, 3, 224, 224, generator=rng())
    with torch.no_grad(): torch.testing.assert_close(encoder(x), net(x))
    cfg = timm.get_pretrained_cfg(model)
    assert (encoder.mean, encoder.std, encoder.size) == (tuple(cfg.mean), tuple(cfg.std), cfg.input_size[-1])
    assert encoder.about()["first_conv"] == "as trained"


def test_weights_for_another_image_size_are_resampled_as_timm_does(tmp_path):
    saved("vit_tiny_patch16_224", tmp_path / "w.safetensors")
    overlay = dict(file=str(tmp_path / "w.safetensors"))
    net = timm.create_model("vit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, img_size=96, in_chans=5).eval()
    encoder = timm_backbone(5, 96, "vit_tiny_patch16_224", tmp_path / "w.safetensors").eval()
    x = torch.randn(2, 5, 96, 96, generator=rng())
    with torch.no_grad(): torch.testing.assert_close(encoder(x), net(x))
    assert encoder.mean is None and encoder.size == 224 and encoder.about()["first_conv"] == IN_WEIGHTS["repeat"]


def test_weights_from_the_cache_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    spec = dict(name="timm", model="resnet18.a1_in1k", weights="pretrained")
    with pytest.raises(MissingFileError, match="hf download timm/resnet18.a1_in1k"): make_backbone(spec, 3, 64)
    folder = tmp_path / "hub/models--timm--resnet18.a1_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("abc")
    (folder / "snapshots/abc").mkdir(parents=True)
    net = saved("resnet18", folder / "snapshots/abc/model.safetensors")
    assert torch.equal(make_backbone(spec, 3, 64).net.layer4[1].conv2.weight, net.layer4[1].conv2.weight)


def test_weights_from_the_cache_of_torch(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    url = timm.get_pretrained_cfg("resnet18.a1_in1k").url
    (tmp_path / "checkpoints").mkdir()
    net = timm.create_model("resnet18")
    torch.save(net.state_dict(), tmp_path / "checkpoints" / url.rpartition("/")[2])
    encoder = make_backbone(dict(name="timm", model="resnet18.a1_in1k", weights="pretrained"), 3, 64)
    assert torch.equal(encoder.net.conv1.weight, net.conv1.weight)


def test_without_loading_the_module_is_the_same_but_for_its_values(tmp_path):
    saved("resnet18", tmp_path / "w.safetensors")
    spec = dict(name="timm", model="resnet18", weights=str(tmp_path / "w.safetensors"))
    full = make_backbone(spec, 10, 64)
    (tmp_path / "w.safetensors").unlink()
    empty = make_backbone(spec, 10, 64, load=False)
    empty.load_state_dict(full.state_dict())
    assert empty.size == full.size and torch.equal(empty.net.conv1.weight, full.net.conv1.weight)
    with pytest.raises(MissingFileError, match="is not there"): make_backbone(spec, 10, 64)


@pytest.mark.parametrize("made,asked,word", [("resnet34", "resnet18", "tensors too many"), ("resnet18", "resnet34", "nothing for"),
                                             ("resnet50", "resnet18", "other shapes"), ("resnet18", "vit_tiny_patch16_224", "")])
def test_weights_of_another_model_are_refused(made, asked, word, tmp_path):
    saved(made, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="weights of another model.*" + word): timm_backbone(3, 64, asked, tmp_path / "w.safetensors")


# own sizes, options, blocks -----------------------------------------------------------------------

def test_without_a_size_it_is_that_of_the_model():
    made = make_backbone(dict(name="timm", model="vit_tiny_patch16_384", options=dict(depth=1)), 3, None)
    assert made.img_size == timm.get_pretrained_cfg("vit_tiny_patch16_384").input_size[-1] == 384
    assert len(made.net.blocks) == 1 and made.about()["options"] == dict(depth=1)
    with pytest.raises(InputError, match="no size of its own"): make_backbone("vit", 3, None)


def test_options_keep_a_classifier_and_are_checked():
    assert make_backbone(dict(name="timm", model="resnet18", options=dict(num_classes=7)), 3, 64).embed_dim == 7
    with pytest.raises(InputError, match="no such option"): timm_backbone(3, 64, options=dict(depht=3))


@pytest.mark.parametrize("spec,n", [("resnet18", 8), ("resnet50", 16), ("vit", 12), (SMALL, 1), (CONVNEXT, 4),
                                    (dict(name="timm", model="vit_tiny_patch16_224"), 12), (dict(name="timm", model="swin_tiny_patch4_window7_224"), 4),
                                    (dict(name="timm", model="tf_efficientnet_lite0"), 7), (dict(name="timm", model="eva02_tiny_patch14_224"), 12)], ids=str)
def test_blocks_and_which_of_them_learn(spec, n):
    size = 224 if "22" in str(spec) else 64
    net = make_backbone(spec, 3, size)
    assert len(blocks_of(net)) == n
    before = {k for k, p in net.named_parameters() if p.requires_grad}
    last = {id(p) for p in blocks_of(net)[-1].parameters()}
    earlier = {id(p) for o in blocks_of(net)[:-1] for p in o.parameters()}
    choose_trainable(net, 1)
    learns = {k: p for k, p in net.named_parameters() if p.requires_grad}
    assert set(learns) <= before and last & {id(p) for p in net.parameters()} <= {id(p) for p in learns.values()} | {id(p) for k, p in net.named_parameters() if k not in before}
    assert not earlier & {id(p) for p in learns.values()}
    assert {k for k, p in choose_trainable(make_backbone(spec, 3, size), "all").named_parameters() if p.requires_grad} == before
    assert not any(p.requires_grad for p in choose_trainable(make_backbone(spec, 3, size), 0).parameters())
    with pytest.raises(InputError, match=f"0 to {n} blocks"): choose_trainable(net, n + 1)


def test_frozen_parts_keep_their_statistics():
    net, x = keep_still(choose_trainable(make_backbone("resnet18", 3, 64), 2).train()), torch.randn(4, 3, 64, 64, generator=rng())
    before = {k: v.clone() for k, v in net.named_buffers()}
    net(x)
    moved = {k.split(".")[1] for k, v in net.named_buffers() if not torch.equal(v, before[k])}
    assert moved == {"layer4"}
    assert not keep_still(choose_trainable(net, 0).train()).training


# what is refused ----------------------------------------------------------------------------------

@pytest.mark.parametrize("spec,error,word", [
    ("resnet17", UnknownNameError, "did you mean resnet18"), (dict(name="timm", model="convnext_ato"), UnknownNameError, "convnext_atto"),
    (dict(name="timm", model="resnet18.a9_in1k"), UnknownNameError, "resnet18.a1_in1k"),
    (dict(name="timm", in_weights="rgb"), UnknownNameError, "rgb_first"), (dict(name="timm", load=False), InputError, "not set by hand"),
    (dict(name="vit", deph=3), UnknownNameError, "depth"), (dict(name="vit", depth="deep"), InputError, "wanted int"),
    (dict(name="vit", patch_size=15), InputError, "divides img_size"), (dict(model="resnet18"), InputError, "is not named"),
    (None, InputError, "is not named")], ids=str)
def test_wrong_specs_name_what_is_right(spec, error, word):
    with pytest.raises(error, match=word): make_backbone(spec, 3, 64)


@pytest.mark.parametrize("model,size,word", [("vit_tiny_patch16_224", 120, "112 or 128"), ("vit_tiny_patch16_224", 8, "use img_size 16"),
                                             ("levit_128s", 120, "cannot take"), ("hiera_tiny_224", 120, "cannot take")])
def test_sizes_that_do_not_fit(model, size, word):
    with pytest.raises(InputError, match=word): timm_backbone(3, size, model)


@pytest.mark.parametrize("shape", [(2, 4, 64, 64), (3, 64, 64), (2, 3, 60, 60)])
def test_images_that_do_not_fit(shape):
    with pytest.raises(InputError, match="images do not fit"): make_backbone(SMALL, 3, 64)(torch.zeros(shape))


def test_a_convolutional_network_takes_crops():
    assert make_backbone("resnet18", 3, 64).eval()(torch.zeros(1, 3, 40, 48)).shape == (1, 512)


@pytest.mark.parametrize("builder,word", [(lambda in_chans, img_size: nn.Linear(3, 4), "builds no backbone"),
                                          (lambda in_chans, img_size: 7, "found int")])
def test_something_registered_that_is_no_backbone(builder, word, monkeypatch):
    monkeypatch.setitem(BACKBONES.entries, "odd", builder)
    with pytest.raises(InputError, match=word): make_backbone("odd", 3, 64)


def test_any_module_with_a_width_is_a_backbone(monkeypatch):
    class Means(nn.Module):
        def __init__(self, in_chans:int, img_size:int, width:int=5):
            super().__init__()
            self.embed_dim, self.mean, self.linear = width, [0.5] * in_chans, nn.Linear(in_chans, width)

        def forward(self, x): return self.linear(x.mean((2, 3)))

    monkeypatch.setitem(BACKBONES.entries, "means", Means)
    made = make_backbone(dict(name="means", width=6), 4, 32)
    assert isinstance(made, Backbone) and made(torch.zeros(2, 4, 32, 32)).shape == (2, 6)
    assert made.mean == (0.5,) * 4 and made.std is None and made.about()["name"] == "means"


# a small ResNet -----------------------------------------------------------------------------------

@pytest.mark.parametrize("n_in,n_out,stride", [(8, 8, 1), (8, 16, 1), (8, 16, 2)])
def test_a_small_block_is_timms_basic_block(n_in, n_out, stride):
    from timm.models.resnet import BasicBlock, downsample_avg
    torch.manual_seed(0)
    ours = SmallBlock(n_in, n_out, stride)
    with torch.no_grad(): ours.body[-1][-1].weight.normal_()
    other = None if n_in == n_out and stride == 1 else downsample_avg(n_in, n_out, 1, stride=stride)
    theirs = BasicBlock(n_in, n_out, stride=stride, downsample=other)
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    x = torch.randn(3, n_in, 11, 11)
    for mode in (True, False): torch.testing.assert_close(ours.train(mode)(x), theirs.train(mode)(x))


def test_a_small_resnet_embeds_images_of_any_size_as_it_embeds_them_alone():
    encoder = make_backbone(dict(name="small_resnet", widths=[8, 16], blocks=[1, 2], stem=4), 3, 64).eval()
    x = torch.randn(4, 3, 40, 52, generator=rng())
    with torch.no_grad(): z = encoder(x)
    assert z.shape == (4, 16) and sum(isinstance(o, SmallBlock) for o in encoder.modules()) == 3
    with torch.no_grad(): torch.testing.assert_close(encoder(x.contiguous(memory_format=torch.channels_last)), z)
    for bad in (dict(widths=[]), dict(widths=[8], blocks=[1, 1]), dict(widths=[8, 0]), dict(stem=0), dict(blocks=0)):
        with pytest.raises(InputError, match="make no ResNet"): make_backbone(dict(name="small_resnet", **bad), 3, 64)
