"""Transforms of universal embeddings by name, against torchvision's."""
import numpy as np
import pytest
import torch

from rsir_nb.core import InputError, UnknownNameError
from rsir_nb.data.augment import make_augment
from rsir_nb.data.module import ArchiveData
from rsir_nb.data.base import TensorArchive
from rsir_nb.data.photo_views import crop_boxes, jitter_colours, resized_crops, short_side_crop
from rsir_nb.data.transforms import AUGMENTATIONS

tv = pytest.importorskip("torchvision.transforms.v2")
tvf = pytest.importorskip("torchvision.transforms.v2.functional")
BICUBIC = tv.InterpolationMode.BICUBIC
rng = np.random.default_rng(2)
X = torch.from_numpy(rng.integers(0, 256, (6, 3, 50, 70))).float()
NAMES = "openai_clip", "openclip", "eva_clip", "siglip", "custom"


def test_all_five_are_named():
    assert set(NAMES) <= set(AUGMENTATIONS.list())
    with pytest.raises(UnknownNameError, match="did you mean eva_clip"): make_augment("eva-clip")


@pytest.mark.parametrize("size", [24, 50, 96])
def test_crops_are_those_of_torchvision(size):
    boxes = crop_boxes(6, 50, 70, np.random.default_rng(size))
    found = resized_crops(X, boxes, size)
    for x, y, (t, l, h, w) in zip(X, found, boxes.tolist(), strict=True):
        assert 0 <= t <= 50 - h and 0 <= l <= 70 - w and min(h, w) >= 1
        want = tvf.resized_crop(x, t, l, h, w, [size, size], BICUBIC, antialias=True)
        assert torch.allclose(y, want, atol=1e-3)


@pytest.mark.parametrize("scale, ratio", [((0.08, 1), (3/4, 4/3)), ((0.9, 1), (1, 1)), ((0.3, 0.5), (0.5, 2))])
def test_boxes_are_distributed_as_torchvisions(scale, ratio):
    torch.manual_seed(0)
    image = torch.zeros(3, 200, 260)
    transform = tv.RandomResizedCrop(10, scale=scale, ratio=ratio)
    params = [transform.make_params([image]) for _ in range(4000)]
    want = np.array([[o["top"], o["left"], o["height"], o["width"]] for o in params], float)
    mine = crop_boxes(4000, 200, 260, np.random.default_rng(0), scale, ratio).astype(float)
    for measure in (lambda b: b[:, 2]*b[:, 3]/52_000, lambda b: np.log(b[:, 3]/b[:, 2]), lambda b: b[:, 0]/200, lambda b: b[:, 1]/260):
        a, b = measure(want), measure(mine)
        error = (a.var()/len(a) + b.var()/len(b))**0.5 + 1e-3
        assert abs(a.mean() - b.mean()) < 4*error
        assert np.allclose(np.quantile(a, [0.1, 0.5, 0.9]), np.quantile(b, [0.1, 0.5, 0.9]), atol=0.04)


def test_a_box_that_never_fits_is_the_middle():
    boxes = crop_boxes(3, 10, 100, np.random.default_rng(0), (1, 1), (1, 1))
    torch.manual_seed(0)
    want = tv.RandomResizedCrop(5, scale=(1, 1), ratio=(1, 1)).make_params([torch.zeros(3, 10, 100)])
    assert boxes.tolist() == [[want[o] for o in ("top", "left", "height", "width")]]*3


@pytest.mark.parametrize("shape", [(50, 70), (70, 50), (33, 33), (101, 64)])
@pytest.mark.parametrize("size", [32, 64])
def test_short_side_and_middle(shape, size):
    x = torch.from_numpy(rng.integers(0, 256, (2, 3, *shape))).float()
    want = tv.Compose([tv.Resize(size, BICUBIC, antialias=True), tv.CenterCrop(size)])(x)
    assert torch.allclose(short_side_crop(dict(rgb=x), None, size)["rgb"], want, atol=1e-3)


def test_colours_are_those_of_torchvision():
    factors, order = rng.uniform(0.6, 1.4, (6, 3)), rng.permuted(np.tile(np.arange(3), (6, 1)), axis=1)
    ways = tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation
    found = jitter_colours(X, factors, order)
    for x, y, f, o in zip(X, found, factors, order, strict=True):
        want = x/255
        for i in o: want = ways[i](want, f[i])
        assert torch.allclose(y, want*255, atol=1e-2)


def test_colour_factors_are_distributed_as_torchvisions():
    "Means of many jittered copies of one picture agree."
    torch.manual_seed(0)
    x = X[0]/255
    jitter = tv.ColorJitter(brightness=(0.6, 1.4), contrast=(0.6, 1.4), saturation=(0.6, 1.4))
    want = torch.stack([jitter(x) for _ in range(600)])
    mine = make_augment("colour_jitter")(dict(rgb=X[:1].repeat(600, 1, 1, 1)), np.random.default_rng(0))["rgb"]/255
    for a, b in ((want.mean((1, 2, 3)), mine.mean((1, 2, 3))), (want.std((1, 2, 3)), mine.std((1, 2, 3)))):
        assert abs(a.mean() - b.mean()) < 4*(a.var()/600 + b.var()/600)**0.5
        assert abs(a.std() - b.std()) < 0.15*a.std()


@pytest.mark.parametrize("name", NAMES)
def test_batches_of_every_name(name):
    x = X[:, :, :, 10:60]
    batch = dict(id=list("abcdef"), rgb=x, row=torch.arange(6))
    augment = make_augment([name])
    one, again, other = (augment(batch, np.random.default_rng(i))["rgb"] for i in (0, 0, 1))
    assert one.shape == (6, 3, 50, 50) and torch.equal(one, again) and torch.isfinite(one).all()
    assert torch.equal(one, other) == (name == "openai_clip")
    assert make_augment(dict(name=name, size=24))(batch, np.random.default_rng(0))["rgb"].shape == (6, 3, 24, 24)
    if name in ("siglip", "custom"): assert one.min() >= 0 and one.max() <= 255
    assert torch.equal(batch["rgb"], x) and torch.equal(x, X[:, :, :, 10:60]), "the batch itself stays"


def test_two_sensors_are_cut_alike():
    x = X[:, :, :50, :50]
    found = make_augment("openclip")(dict(a=x, b=2*x), np.random.default_rng(0))
    assert torch.allclose(found["b"], 2*found["a"], atol=1e-3)


def test_other_units_and_names_are_refused():
    with pytest.raises(InputError, match="pictures of bytes; found values .*use jitter"): make_augment("siglip")(dict(s2=30*X), np.random.default_rng(0))
    changed = make_augment(dict(name="colour_jitter", only=["rgb"]))(dict(s2=30*X, rgb=X), np.random.default_rng(0))
    assert torch.equal(changed["s2"], 30*X) and not torch.equal(changed["rgb"], X)
    with pytest.raises(UnknownNameError, match="did you mean size"): make_augment(dict(name="openclip", sice=3))
    with pytest.raises(InputError, match="no box can be drawn"): crop_boxes(1, 9, 9, np.random.default_rng(0), (0, 1))


def test_in_a_data_module():
    archive = TensorArchive(dict(rgb=X[:, :, :50, :50].to(torch.uint8)))
    batch = next(ArchiveData(archive, batch_size=4, augment=["siglip"]).batches())
    assert batch["rgb"].shape == (4, 3, 50, 50) and batch["rgb"].dtype == torch.float32
