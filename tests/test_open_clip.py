"Image towers of open_clip and the published types of foundation models, against open_clip, timm and their own preprocessing."
import json
import subprocess
import sys

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rsir_nb.core import InputError, MissingFileError, UnknownNameError, UnsafeFileError
from rsir_nb.machine import declare_torchvision_ops
from rsir_nb.models.backbones import make_backbone, timm_backbone
from rsir_nb.models.first_conv import IN_WEIGHTS, remap_first_conv
from rsir_nb.models.foundation import FOUNDATION, foundation_backbone

declare_torchvision_ops()
import timm  # noqa: E402

open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed: pip install 'rsir_nb[foundation]'")
from rsir_nb.models.open_clip import open_clip_backbone  # noqa: E402

VIT = dict(image_size=32, layers=2, width=64, patch_size=8)
TOWERS = dict(vit=VIT, clipa=dict(VIT, no_ln_pre=True, pool_type="avg", final_ln_after_pool=True, pos_embed_type="sin_cos_2d"),
              coca=dict(VIT, attentional_pool=True, attn_pooler_heads=4, output_tokens=True),
              convnext=dict(timm_model_name="convnext_atto", timm_pool="", timm_proj="linear", image_size=32),
              convnext_mlp=dict(timm_model_name="convnext_atto", timm_pool="", timm_proj="mlp", image_size=32),
              eva02=dict(timm_model_name="eva02_tiny_patch14_224", timm_pool="token", timm_proj=None, image_size=224),
              resnet=dict(image_size=32, layers=[1, 1, 1, 1], width=16, patch_size=None))
TEXT = dict(context_length=4, vocab_size=11, width=16, heads=2, layers=1)


def images(size=32, n=2, seed=0): return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "name -> file of a small model that open_clip itself made and saved; the models are known to open_clip for these tests alone."
    folder, files = tmp_path_factory.mktemp("configs"), {}
    for name, vision in TOWERS.items():
        (folder / f"tiny-{name}.json").write_text(json.dumps(dict(embed_dim=24, vision_cfg=vision, text_cfg=TEXT)))
    open_clip.add_model_config(folder)
    for name in TOWERS:
        torch.manual_seed(1)
        whole = open_clip.create_model(f"tiny-{name}")
        files[name] = folder / f"{name}.pt"
        torch.save(whole.state_dict(), files[name])
    yield files
    open_clip.factory._MODEL_CONFIG_PATHS.remove(folder)
    open_clip.factory._rescan_model_configs()


def theirs(name, file, **kwargs):
    model, _, transform = open_clip.create_model_and_transforms(f"tiny-{name}", pretrained=str(file), **kwargs)
    if hasattr(model.visual, "output_tokens"): model.visual.output_tokens = False
    return model.eval(), transform.transforms[-1]


# towers -------------------------------------------------------------------------------------------

def test_importing_the_page_imports_neither_library():
    code = "import sys, rsir_nb.models.foundation; print({'timm', 'open_clip'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "set()"


@pytest.mark.parametrize("name", TOWERS)
def test_features_and_preprocessing_are_those_of_the_library(models, name):
    model, normalize = theirs(name, models[name])
    made = make_backbone(dict(name="open_clip", model=f"tiny-{name}", weights=str(models[name]), projection=True), 3, None).eval()
    size = TOWERS[name]["image_size"]
    with torch.no_grad(): torch.testing.assert_close(made(images(size)), model.encode_image(images(size)))
    assert (made.mean, made.std, made.size, made.img_size) == (tuple(normalize.mean), tuple(normalize.std), size, size)
    assert made.embed_dim == 24 and made.about()["first_conv"] == "as trained"
    assert made.state_dict().keys() == {f"net.{o}" for o in model.visual.state_dict()}     # no text tower


@pytest.mark.parametrize("name", [o for o in TOWERS if o != "resnet"])
def test_without_projection_as_published(models, name):
    "UniFEx: a ViT without `proj`, a ConvNeXt's trunk."
    made = open_clip_backbone(3, model=f"tiny-{name}", weights=models[name]).eval()
    visual = theirs(name, models[name])[0].visual
    if name in ("vit", "clipa", "coca"): visual.proj = None
    elif name == "eva02": visual.trunk.head = nn.Identity()
    else: visual = visual.trunk
    x = images(TOWERS[name]["image_size"])
    with torch.no_grad(): torch.testing.assert_close(made(x), visual(x))


@pytest.mark.parametrize("name,size", [("vit", 48), ("clipa", 16), ("convnext", 64), ("eva02", 112)])
def test_other_sizes_as_the_library_resamples(models, name, size):
    model, _ = theirs(name, models[name], force_image_size=size)
    made = open_clip_backbone(3, size, f"tiny-{name}", models[name], projection=True).eval()
    with torch.no_grad(): torch.testing.assert_close(made(images(size)), model.encode_image(images(size)))
    assert made.size == TOWERS[name]["image_size"] and made.img_size == size


@pytest.mark.parametrize("name", ["vit", "convnext"])
@pytest.mark.parametrize("how", sorted(IN_WEIGHTS))
def test_other_bands(models, name, how):
    made = open_clip_backbone(10, model=f"tiny-{name}", weights=models[name], in_weights=how).eval()
    with torch.no_grad(): assert made(torch.randn(2, 10, 32, 32)).isfinite().all()
    assert made.mean is made.std is None and made.size == 32 and made.about()["first_conv"] == IN_WEIGHTS[how]
    if how == "random": return
    net = open_clip_backbone(3, model=f"tiny-{name}", weights=models[name]).net
    wanted = next(o for o in remap_first_conv(net, 10, how).modules() if isinstance(o, nn.Conv2d)).weight
    assert torch.equal(next(o for o in made.modules() if isinstance(o, nn.Conv2d)).weight, wanted)


def test_a_file_of_the_tower_alone_and_one_of_another_model(models, tmp_path):
    state = {k.removeprefix("visual."): v.contiguous() for k, v in torch.load(models["vit"]).items() if k.startswith("visual.")}
    save_file(state, tmp_path / "tower.safetensors")
    a, b = (open_clip_backbone(3, model="tiny-vit", weights=o).eval() for o in (tmp_path / "tower.safetensors", models["vit"]))
    with torch.no_grad(): assert torch.equal(a(images()), b(images()))
    for other in ("clipa", "convnext", "coca"):
        with pytest.raises(InputError, match="weights of another model.*open_clip's tiny-vit"):
            open_clip_backbone(3, model="tiny-vit", weights=models[other])


def test_without_loading_the_module_is_the_same_but_for_its_values(models, tmp_path):
    full = open_clip_backbone(4, 48, "tiny-vit", models["vit"])
    empty = open_clip_backbone(4, 48, "tiny-vit", "gone.pt", load=False)
    empty.load_state_dict(full.state_dict())
    with torch.no_grad(): assert torch.equal(empty.eval()(torch.ones(1, 4, 48, 48)), full.eval()(torch.ones(1, 4, 48, 48)))
    assert empty.size == full.size == 32


def test_a_compiled_program_is_refused(tmp_path):
    torch.jit.script(nn.Linear(2, 3)).save(tmp_path / "openai.pt")
    with pytest.raises(UnsafeFileError, match="compiled program"): open_clip_backbone(3, weights=tmp_path / "openai.pt")


# tags ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("model,weights,mean,gelu", [
    ("ViT-B-32", "laion2b_s34b_b79k", 0.48145466, "GELU"), ("ViT-B-32.openai", "pretrained", 0.48145466, "QuickGELU"),
    ("ViT-B-16.metaclip_fullcc", None, None, "QuickGELU"), ("ViT-L-14", "laion2b_s32b_b82k", 0.5, "GELU"),
    ("ViT-L-14-CLIPA", "pretrained", 0.485, "GELU"), ("ViT-B-16-SigLIP", "webli", 0.5, "GELU")])
def test_a_tag_decides_on_normalisation_and_activation(model, weights, mean, gelu):
    with torch.device("meta"): made = open_clip_backbone(3, model=model, weights=weights, load=False)
    assert (made.mean and made.mean[0]) == mean
    assert {type(o).__name__ for o in made.modules()} & {"GELU", "QuickGELU"} == {gelu}


def test_every_set_of_weights_is_known_with_its_preprocessing():
    checked = 0
    for name, tag in open_clip.list_pretrained():
        if not name.startswith(("ViT-B-32", "ViT-B-16", "ViT-L-14-CLIPA", "convnext_base")) or "SigLIP" in name: continue
        known = open_clip.get_pretrained_cfg(name, tag)
        with torch.device("meta"): made = open_clip_backbone(3, model=name, weights=tag, load=False, options=dict(layers=1))
        assert (made.mean, made.std) == (known["mean"], known["std"])
        assert made.size == open_clip.get_model_config(name)["vision_cfg"]["image_size"]
        checked += 1
    assert checked > 40


def test_weights_from_the_cache_of_the_hub_and_of_open_clip(models, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HOME", str(tmp_path))
    spec = dict(name="open_clip", model="ViT-B-32", weights="openai", options=dict(VIT))
    with pytest.raises(MissingFileError, match="open_clip's ViT-B-32.openai.*hf download timm/vit_base_patch32_clip_224.openai"):
        make_backbone(spec, 3, None)
    (tmp_path / ".cache/clip").mkdir(parents=True)
    state = open_clip.CLIP(512, VIT, TEXT).state_dict()
    torch.save(state, tmp_path / ".cache/clip/ViT-B-32.pt")
    assert torch.equal(make_backbone(spec, 3, None).net.conv1.weight, state["visual.conv1.weight"])
    folder = tmp_path / "hub/models--timm--vit_base_patch32_clip_224.openai"
    for part in ("refs", "snapshots/abc"): (folder / part).mkdir(parents=True)
    (folder / "refs/main").write_text("abc")
    other = {k: v + 1 for k, v in state.items()}
    save_file({k: v.contiguous() for k, v in other.items()}, folder / "snapshots/abc/open_clip_model.safetensors")
    assert torch.equal(make_backbone(spec, 3, None).net.conv1.weight, other["visual.conv1.weight"])     # the hub's comes first


@pytest.mark.parametrize("kwargs,error,word", [
    (dict(model="ViT-B32"), UnknownNameError, "did you mean ViT-B-32"), (dict(model="ViT-B-32.laion2b"), UnknownNameError, "laion2b_e16"),
    (dict(weights="laion2b_s34b_b79"), UnknownNameError, "did you mean laion2b_s34b_b79k"), (dict(weights="pretrained"), InputError, "name one"),
    (dict(weights="some/file.bin"), MissingFileError, "is not there"), (dict(model="ViT-B-32.openai", weights="laion400m_e31"), InputError, "two sets"),
    (dict(model="ViT-S-32", weights="pretrained"), InputError, "0 sets of weights; pass weights=FILE"), (dict(in_weights="rgb"), UnknownNameError, "rgb_first"),
    (dict(img_size=100), InputError, "96 or 128"), (dict(options=dict(layer=1)), InputError, "no such option"),
    (dict(model="RN50", img_size=64), InputError, "projection=true")], ids=str)
def test_what_is_refused(kwargs, error, word):
    with pytest.raises(error, match=word): open_clip_backbone(3, **kwargs)


def test_without_open_clip_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(MissingFileError, match=r"pip install 'rsir_nb\[foundation\]'"): make_backbone("open_clip", 3, 224)
    with pytest.raises(MissingFileError, match="foundation"): foundation_backbone(3, type="clip")


# types --------------------------------------------------------------------------------------------

DEEP = dict(depth=1)
SMALL = dict(clip=("ViT-B-32", dict(layers=1)), clip_convnext=("convnext_base_w", dict(timm_model_name="convnext_atto")),
             clipav2=("ViT-L-14-CLIPA", dict(layers=1, width=64)), meta_clip=("ViT-B-16.metaclip_fullcc", dict(layers=1)),
             eva02=("eva02_tiny_patch14_224", DEEP), siglip=("vit_base_patch16_siglip_224", DEEP), dinov2=("vit_small_patch14_dinov2", DEEP),
             sam=("samvit_base_patch16", dict(depth=3)), dinov3=("vit_small_patch16_dinov3", DEEP))


@pytest.mark.parametrize("type", SMALL)
def test_each_type_builds_and_embeds(type):
    model, options = SMALL[type]
    size = 112 if "14" in model else 128
    made = make_backbone(dict(name="foundation", type=type, model=model, options=options), 4, size).eval()
    with torch.no_grad(): z = made(torch.randn(2, 4, size, size))
    assert z.shape == (2, made.embed_dim) and z.isfinite().all() and made.about()["type"] == type


def test_all_types_are_tested_and_their_usual_models_exist():
    assert set(SMALL) == set(FOUNDATION)
    for type, family in FOUNDATION.items():
        with torch.device("meta"): made = foundation_backbone(3, type=type, weights="pretrained", load=False)
        name, _, tag = family.model.partition(".")
        if family.library == "timm":
            wanted = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(family.model).to_dict())
            assert (made.mean, made.std, made.size) == (wanted["mean"], wanted["std"], wanted["input_size"][-1]), type
            assert timm.get_pretrained_cfg(family.model).license.split("-")[0] == family.licence.lower().split("-")[0].split()[0]
        else: assert made.mean == open_clip.get_pretrained_cfg(name, tag)["mean"]


@pytest.mark.parametrize("type", [o for o, f in FOUNDATION.items() if f.library == "timm"])
@pytest.mark.parametrize("own", [True, False])
def test_weights_of_a_file_give_the_features_of_timm(type, own, tmp_path):
    model, options = SMALL[type]
    if own and type == "sam": pytest.skip("1024 pixels a side")
    torch.manual_seed(2)
    net = timm.create_model(model, num_classes=0, **options).eval()
    with torch.no_grad():
        for p in net.parameters(): p.add_(0.02*torch.randn_like(p))     # position tables start at zero
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path / "w.safetensors")
    size = net.pretrained_cfg["input_size"][-1] if own else 112
    if type == "sam": net.neck = nn.Identity()      # as published; the network itself takes any size
    elif not own:
        overlay = dict(file=str(tmp_path / "w.safetensors"))
        net = timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, img_size=size, **options).eval()
    made = make_backbone(dict(name="foundation", type=type, model=model, options=options, weights=str(tmp_path / "w.safetensors")), 3, size).eval()
    with torch.no_grad(): torch.testing.assert_close(made(images(size)), net(images(size)))
    assert made.embed_dim == net.embed_dim and made.size == net.pretrained_cfg["input_size"][-1]


def test_sam_averages_its_tokens():
    made = foundation_backbone(3, 64, "sam", "samvit_base_patch16", options=dict(depth=1)).eval()
    with torch.no_grad(): tokens = made.net.forward_features(images(64))
    assert tokens.shape == (2, 768, 4, 4)
    with torch.no_grad(): torch.testing.assert_close(made(images(64)), tokens.mean((2, 3)))
    assert timm_backbone(3, 64, "samvit_base_patch16", options=dict(depth=1)).embed_dim == 256


def test_siglip_at_the_published_size_whose_tokens_leave_a_margin():
    with torch.device("meta"): made = timm_backbone(3, None, "vit_so400m_patch14_siglip_384", "w", options=dict(depth=1), load=False)
    assert (made.img_size, made.embed_dim, made.size) == (384, 1152, 384)
    with pytest.raises(InputError, match="378 or 392"): timm_backbone(3, 380, "vit_so400m_patch14_siglip_384")


def test_eva_keeps_its_projection_if_asked():
    given = dict(type="eva02", model="eva02_base_patch16_clip_224", options=DEEP)
    with torch.device("meta"): widths = [foundation_backbone(3, projection=o, **given).embed_dim for o in (False, True)]
    assert widths == [768, 512]


@pytest.mark.parametrize("kwargs,error,word", [
    (dict(type="siglp"), UnknownNameError, "did you mean siglip"), (dict(type="clip", model="ViT-L-14-CLIPA"), UnknownNameError, "type clip"),
    (dict(type="clip", model="ViT-L-14", weights="metaclip_fullcc"), UnknownNameError, "type clip"),
    (dict(type="meta-clip", model="ViT-L-14.openai"), UnknownNameError, "metaclip"), (dict(type="dinov2", model="vit_small_patch16_dinov3"), UnknownNameError, "dinov2"),
    (dict(type="siglip", model="resnet50"), UnknownNameError, "type siglip"), (dict(type="sam", projection=True), InputError, "no projection"),
    (dict(type="dinov2", options=dict(deph=1)), InputError, "no such option")], ids=str)
def test_types_that_are_refused(kwargs, error, word):
    with pytest.raises(error, match=word): foundation_backbone(3, **kwargs)
