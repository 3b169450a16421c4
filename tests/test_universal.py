"""Universal embeddings: preprocessing as published, heads, frozen features computed once, partial training, zero-shot; what is refused."""
import numpy as np
import pytest
import torch
from engine_run import tiny_config
from torch.nn import functional as F

from rsir_nb.cli import main
from rsir_nb.config import load_config
from rsir_nb.core import InputError
from rsir_nb.engine.parts import TrainerConfig, build_archive, build_method, load_method
from rsir_nb.engine.retriever import Retriever
from rsir_nb.engine.train import cache_features, pretrain, read_history
from rsir_nb.machine import declare_torchvision_ops
from rsir_nb.methods.base import Method
from rsir_nb.methods.frozen import FrozenPart
from rsir_nb.methods.probe import Probe
from rsir_nb.methods.universal import Universal, weight_stats
from rsir_nb.models.backbones import make_backbone
from rsir_nb.sensors import Sensor

declare_torchvision_ops()

VIT = dict(name="vit", embed_dim=16, depth=1, num_heads=2)
NET = dict(name="timm", model="convnext_atto")
HEADS = ["arcface", "dynm_arcface", "li_arcface", "adacos", "curricularface", "adaface", "cosine_softmax"]
RGB = ["data=tiny_rgb", "trainer.train_split=null", "trainer.augment=false", "method=universal", "optim.optimizer=adam",
       "optim.lr=1e-2", "optim.warmup_epochs=1", "trainer.batch_size=8"]
SMALL = ["method.backbone={name: vit, embed_dim: 16, depth: 1, num_heads: 2}", "method.neck={name: projection, embed_dim: 8}"]


def config(out, *changes): return tiny_config(out, *RGB, *SMALL, *changes)


def pictures(n=5, size=30, seed=0):
    return torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed)).float()


def universal(backbone=VIT, **kwargs):
    torch.manual_seed(0)
    return Universal(["rgb"], backbone, **{**dict(vocab=["a", "b", "c"], img_size=30), **kwargs}).eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A head on a frozen backbone, three epochs."
    return pretrain(config(tmp_path_factory.mktemp("universal")/"run"), progress=False)


# what the backbone sees ---------------------------------------------------------------------------

def test_images_are_prepared_as_published():
    "UniFEx: resize the raw image, bicubic with antialiasing, divide by 255, normalise with the backbone's mean and std."
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import normalize, resize
    method = universal(dict(NET, weights="gone.safetensors"), load=False, input_size=64)
    net = method.backbones["rgb"]
    assert net.mean == (0.485, 0.456, 0.406) and method.input_size == 64
    x = pictures()
    seen = normalize(resize(x, [64, 64], InterpolationMode.BICUBIC, antialias=True)/255, net.mean, net.std)
    torch.testing.assert_close(method.prepare(x, "rgb"), seen, rtol=1e-4, atol=1e-5)
    with torch.no_grad(): z = method.necks["rgb"](net(seen))
    torch.testing.assert_close(method.embed(x, "rgb"), z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unit,bands,white", [("byte", ("R", "G", "B"), 255), ("DN", ("B04", "B03", "B02"), 3000)])
def test_statistics_of_the_weights_in_the_unit_of_the_sensor(unit, bands, white):
    net = make_backbone(dict(NET, weights="gone"), 3, 64, load=False)
    stats = weight_stats(net, Sensor("x", bands, unit))
    np.testing.assert_allclose([stats[b] for b in bands], np.array([net.mean, net.std]).T*white)
    assert weight_stats(net, Sensor("x", bands, unit), 100)[bands[0]][0] == pytest.approx(48.5)
    assert weight_stats(make_backbone(VIT, 3, 32), Sensor("x", bands, unit))[bands[0]] == (white/2, white/2)


@pytest.mark.parametrize("sensor", ["s1", "s2", Sensor("heat", ("T1", "T2", "T3"), "K")])
def test_other_sensors_ask_for_the_statistics_of_the_archive(sensor):
    with pytest.raises(InputError, match="method.norm=fit"): Universal([sensor] if isinstance(sensor, str) else dict(heat=sensor),
                                                                         dict(NET, weights="gone"), ["a"], load=False)


def test_two_sensors_with_fitted_statistics(tmp_path):
    cfg = tiny_config(tmp_path/"run", "method=universal", *SMALL, "method.norm=fit", "method.loss=supcon", "optim.epochs=1")
    archive = build_archive(cfg.data)
    method = load_method(pretrain(cfg, progress=False))
    stats = method.inputs.stats()
    assert stats["s2"]["B04"][1] > 10 and -30 < stats["s1"]["VV"][0] < -5
    z = method.embed({m: archive[0][m][None] for m in ("s1", "s2")})
    assert {m: tuple(o.shape) for m, o in z.items()} == dict(s1=(1, 8), s2=(1, 8))


# training -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", HEADS)
def test_every_head_makes_a_step(name):
    method = universal(loss=name, class_counts=[4, 9, 30]).train()
    terms = method.losses(dict(rgb=pictures(6), target=torch.tensor([0, 1, 2, 0, 1, 2])))
    terms["loss"].backward()
    learned = {k for k, p in method.named_parameters() if p.grad is not None and p.grad.any()}
    assert learned == {"necks.rgb.1.weight", "necks.rgb.1.bias", "loss.weight"}


def test_a_frozen_backbone_is_asked_once(run, tmp_path, monkeypatch):
    assert [o.name for o in (run/"features").iterdir() if not o.name.startswith(".")] == ["train"]
    fresh, trained = build_method(config(tmp_path/"x"), build_archive(config(tmp_path/"x").data)), load_method(run)
    moved = {k.split(".")[0] for k, v in fresh.named_parameters() if not torch.equal(v, trained.get_parameter(k))}
    assert moved == {"necks", "loss"}
    asked, real = [], Universal.features
    monkeypatch.setattr(Universal, "features", lambda self, x, m: asked.append(len(x)) or real(self, x, m))
    pretrain(config(tmp_path/"run"), progress=False)
    once = sum(asked)
    asked.clear()
    pretrain(config(tmp_path/"again", "trainer.cache=false"), progress=False)
    assert once == 64 and sum(asked) == 3*24     # 24 pictures in one block of 64, and 24 in each of three epochs


def test_cached_and_computed_features_train_alike(run, tmp_path):
    other = pretrain(config(tmp_path/"run", "trainer.cache=false"), progress=False)
    a, b = read_history(run)["loss"].to_numpy(), read_history(other)["loss"].to_numpy()
    np.testing.assert_allclose(a, b, rtol=2e-3)     # features are kept in half precision
    assert a[-1] < a[0]


def test_features_of_an_archive(run, tmp_path):
    method, archive = load_method(run), build_archive(config(tmp_path).data)
    x = torch.stack([archive[i]["rgb"] for i in range(len(archive))])
    with torch.no_grad(): wanted = method.backbones["rgb"](method.prepare(x, "rgb"))
    part = FrozenPart(method)
    torch.testing.assert_close(part.embed(x, "rgb"), wanted)
    found = cache_features(method, archive, tmp_path/"f", TrainerConfig(augment=False), progress=False)
    torch.testing.assert_close(found.arrays["rgb"].flatten(1), wanted, rtol=1e-3, atol=1e-3)
    name = part.weights_hash
    method.necks["rgb"][1].weight.data += 1
    assert part.weights_hash == name
    method.backbones["rgb"].net.vit.norm.weight.data += 1
    assert part.weights_hash != name


def test_several_views_need_the_images(tmp_path):
    with pytest.raises(InputError, match="trainer.cache=false"): pretrain(config(tmp_path/"run", "trainer.augment=[flips]"), progress=False)
    assert (pretrain(config(tmp_path/"other", "trainer.augment=[flips]", "trainer.cache=false"), progress=False)/"finished.json").is_file()


@pytest.mark.parametrize("trainable,moved", [(0, set()), (1, {"blocks.1", "norm", "fc_norm"}),
                                             ("all", {"blocks.0", "blocks.1", "norm", "fc_norm", "patch_embeds", "cls_tokens"})])
def test_what_is_trained_moves_and_nothing_else(trainable, moved, tmp_path):
    deep = "method.backbone={name: vit, embed_dim: 16, depth: 2, num_heads: 2}"
    cfg = config(tmp_path/"run", deep, f"method.trainable={trainable}", "optim.epochs=1", "optim.warmup_epochs=0")
    fresh, trained = build_method(cfg, build_archive(cfg.data)), load_method(pretrain(cfg, progress=False))
    part = lambda k: ".".join(k.split(".")[4:6]) if "blocks.0" in k or "blocks.1" in k else k.split(".")[4]
    found = {part(k) for k, v in fresh.state_dict().items() if k.startswith("backbones.") and not torch.equal(v, trained.state_dict()[k])}
    assert found == moved
    rates = trained.optimisers()["main"][0]
    assert rates[1]["lr_scale"] == 0.1 and (trained.frozen == ("backbones",)) == (trainable == 0)


def test_sharpness_aware_minimisation_and_an_exponential_rise(tmp_path):
    cfg = config(tmp_path/"run", "optim.sam_rho=0.05", "optim.warmup=exponential", "trainer.val_split=null")
    history = read_history(pretrain(cfg, progress=False))
    assert np.isfinite(history["loss"]).all() and history["lr"].iloc[0] == pytest.approx(1e-2*(1 - np.exp(-10/3))/(1 - np.exp(-5)))


def test_counts_of_the_archive_make_the_margins(tmp_path):
    cfg = config(tmp_path/"run", "method.loss=dynm_arcface")
    assert build_method(cfg, build_archive(cfg.data)).loss.margins.numel() == 3


def test_labels_of_several_classes_and_none_at_all():
    method = universal()
    with pytest.raises(InputError, match="one class per image"): method.losses(dict(rgb=pictures(2), labels=torch.ones(2, 3)))
    with pytest.raises(InputError, match="have no labels"): method.losses(dict(rgb=pictures(2)))
    with pytest.raises(InputError, match="no image of this method's sensors"): method.losses(dict(s2=pictures(2), target=torch.zeros(2).long()))


def test_on_the_network_that_ships(tmp_path):
    "Real images that come with the package: a head that has learned from them, and the same network without training."
    from rsir_nb.metrics.named import score_embeddings
    from rsir_nb.models.shipped import about_shipped
    run = pretrain(load_config("universal", ["data=eurosat_sample", "trainer.train_split=null", "optim.epochs=3", "optim.lr=2e-2", f"out={tmp_path/'run'}"]), progress=False)
    method = load_method(run)
    assert method.input_size == about_shipped()["size"] and method.embed_dim == 64
    cfg = load_config("zero_shot", ["data=eurosat_sample", f"out={tmp_path/'zero'}"])
    archive = build_archive(cfg.data)
    some = archive.subset(list(range(0, len(archive), 6)))
    x = torch.stack([some[i]["rgb"] for i in range(len(some))]).float()
    zero = build_method(cfg, archive).eval()
    scores = [score_embeddings(dict(rgb=o.embed(x, "rgb").numpy()), some, ["map"])["map"] for o in (method, zero)]
    assert scores[0] > scores[1] > 0.2


# saved, searched, without training ----------------------------------------------------------------

def test_saved_without_its_head(run, tmp_path):
    method, x = load_method(run), pictures()
    again = Method.load(method.save(tmp_path/"m", training=False))
    assert torch.equal(again.embed(x, "rgb"), method.embed(x, "rgb")) and again.lacks == ("loss",)
    assert again.weights_hash == method.weights_hash and again.arguments["load"] is False


def test_weights_of_a_file_travel_with_the_method(tmp_path):
    import timm
    from safetensors.torch import save_file
    torch.manual_seed(3)
    net = timm.create_model("convnext_atto", num_classes=0)
    save_file(net.state_dict(), tmp_path/"net.safetensors")
    method = universal(dict(NET, weights=str(tmp_path/"net.safetensors")), input_size=64)
    assert torch.equal(method.backbones["rgb"].net.stem[0].weight, net.stem[0].weight)
    method.save(tmp_path/"m")
    (tmp_path/"net.safetensors").unlink()
    assert str(tmp_path) not in (tmp_path/"m/method.json").read_text()
    again = Method.load(tmp_path/"m")
    assert torch.equal(again.embed(pictures(), "rgb"), method.embed(pictures(), "rgb"))
    assert again.backbones["rgb"].mean == (0.485, 0.456, 0.406)


def test_search(run, tmp_path):
    archive = build_archive(config(tmp_path).data)
    found = Retriever.build(load_method(run), archive, tmp_path/"search", progress=False).query("rgb_3", k=4)
    assert len(found.ids) == 4


def test_a_zero_shot_model_averages_features_and_needs_no_training(tmp_path):
    zero = universal(loss=None, neck=dict(name="pooling", embed_dim=5), vocab=None)
    with torch.no_grad(): features = zero.features(zero.prepare(pictures(), "rgb"), "rgb")
    torch.testing.assert_close(zero.embed(pictures(), "rgb"), F.adaptive_avg_pool1d(features, 5))
    run = pretrain(config(tmp_path/"run", "method.loss=null", "method.neck=pooling", "method.backbone=resnet18", "method.input_size=32"), progress=False)
    assert not (run/"checkpoints").exists() and load_method(run).embed_dim == 64
    with pytest.raises(InputError, match="no training objective"): zero.losses(dict(rgb=pictures()))


@pytest.mark.parametrize("backbone", [VIT, "resnet18", dict(name="timm", model="vit_base_patch16_siglip_224", options=dict(depth=1))], ids=str)
def test_a_row_does_not_depend_on_its_batch(backbone):
    method = universal(backbone, input_size=None if backbone == VIT else 112)
    x = pictures(11)
    z = method.embed(x, "rgb")
    for i in (0, 7, 10): assert torch.equal(method.embed(x[i:i + 1], "rgb"), z[i:i + 1])
    assert torch.equal(method.embed(x[2:7], "rgb"), z[2:7])


def test_a_probe_on_a_zero_shot_model():
    zero = universal(loss=None, neck=None, vocab=None)
    probe = Probe(["rgb"], dict(method="universal", arguments={k: v for k, v in zero.describe()["arguments"].items() if k not in ("optim", "seed")}),
                  embed_dim=4, vocab=["a", "b"], loss="supcon").eval()
    probe.backbone.load_state_dict(zero.state_dict())
    torch.testing.assert_close(probe.embed(pictures(), "rgb"), probe.layers["rgb"](zero.embed(pictures(), "rgb")), rtol=1e-4, atol=1e-5)


# configs and errors -------------------------------------------------------------------------------

def test_the_published_config():
    cfg = load_config("universal_published", ["data.root=somewhere"])
    assert dict(cfg.method.loss) == dict(name="arcface", centres=3, scale=30, margin=0.5) and cfg.method.neck.embed_dim == 64
    assert dict(cfg.method.backbone) == dict(name="foundation", type="siglip", model="vit_so400m_patch14_siglip_384", weights="pretrained")
    o = cfg.optim
    assert (o.optimizer, o.lr, o.lr*o.min_factor, o.weight_decay, o.epochs) == ("adam", 2e-2, 1e-3, 1e-4, 10)
    assert (o.warmup_epochs, o.warmup, o.schedule, cfg.trainer.batch_size, cfg.seed) == (1, "linear", "cosine", 128, 42)
    o = load_config("universal", ["data.root=somewhere"]).optim
    assert (o.optimizer, o.lr, o.lr*o.min_factor, o.weight_decay) == ("adam", 2e-3, 1e-3, 1e-4)
    assert load_config("zero_shot", ["data.root=somewhere"]).method.loss is None


def test_weights_that_are_not_here_are_one_line(tmp_path, capsys, monkeypatch):
    import huggingface_hub.constants
    from PIL import Image
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path/"hub"))
    for i in range(4):
        (tmp_path/"data"/f"k{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (i, 9, 9)).save(tmp_path/"data"/f"k{i % 2}"/f"{i}.png")
    assert main(["pretrain", "universal_published", f"data.root={tmp_path/'data'}", f"out={tmp_path/'run'}"]) == 2
    err = capsys.readouterr().err
    assert "hf download timm/vit_so400m_patch14_siglip_384.webli" in err and "Traceback" not in err


@pytest.mark.parametrize("kwargs,word", [
    (dict(vocab=None), "learned from labels"), (dict(loss=None), "neck would stay random"), (dict(trainable=3), "0 to 1 blocks"),
    (dict(trainable="half"), "0 to 1 blocks"), (dict(neck=dict(name="pooling", embed_dim=99)), "pooling shortens")])
def test_what_is_refused(kwargs, word):
    with pytest.raises(InputError, match=word): universal(**kwargs)
