"""Pictures of every kind: the bands that a file has, and the right values of each pixel."""
import numpy as np
import pytest
import torch
from PIL import Image

from rsir_nb.core import InputError
from rsir_nb.data.checks import to_square
from rsir_nb.data.folders import ClassFolders, PairedFolders
from rsir_nb.data.images import ImageFiles

GREY = dict(bands=["amplitude"], unit="byte")
rng = np.random.default_rng(5)


def noise(*shape, low=1, high=255): return rng.integers(low, high, shape, dtype="uint8")


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_a_one_band_picture_fits_a_one_band_sensor(tmp_path, ending):
    x = noise(16, 20)
    Image.fromarray(x).save(tmp_path/f"a.{ending}")
    assert np.array_equal(ImageFiles(GREY).read(tmp_path/f"a.{ending}"), x[None])
    with pytest.raises(InputError, match="has not all the bands of rgb; found 1 band"): ImageFiles("rgb").look(tmp_path/f"a.{ending}")


def test_a_grey_jpeg_has_one_band(tmp_path):
    Image.fromarray(noise(16, 16)).save(tmp_path/"a.jpg")
    want = np.asarray(Image.open(tmp_path/"a.jpg"))
    assert np.array_equal(ImageFiles(GREY).read(tmp_path/"a.jpg"), want[None])


def test_a_palette_is_read_through_its_colours(tmp_path):
    colours = noise(7, 3)
    at = rng.integers(0, 7, (12, 12)).astype("uint8")
    picture = Image.fromarray(at, "P")
    picture.putpalette(colours.ravel().tolist() + [0]*(768 - 21))
    picture.save(tmp_path/"a.png")
    assert np.array_equal(ImageFiles("rgb").read(tmp_path/"a.png"), colours[at].transpose(2, 0, 1))


def test_alpha_is_a_mask_and_no_band(tmp_path):
    x, alpha = noise(10, 10, 3), np.full((10, 10), 255, "uint8")
    alpha[:2] = 0
    Image.fromarray(np.dstack([x, alpha])).save(tmp_path/"a.png")
    read = ImageFiles("rgb").read(tmp_path/"a.png").numpy()
    assert np.array_equal(read[:, 2:], x[2:].transpose(2, 0, 1).astype("float32"))
    assert np.allclose(read[:, :2], x[2:].mean((0, 1))[:, None, None], atol=1e-3), "transparent pixels get the mean of the others"
    with pytest.raises(InputError, match="has not all the bands of s2_rgbn"): ImageFiles("s2_rgbn").look(tmp_path/"a.png")
    Image.fromarray(np.dstack([x, 0*alpha])).save(tmp_path/"none.png")
    with pytest.raises(InputError, match="no data in any pixel"): ImageFiles("rgb").read(tmp_path/"none.png")


def test_grey_with_alpha_is_one_band(tmp_path):
    x, alpha = noise(10, 10), np.full((10, 10), 255, "uint8")
    alpha[:, 7:] = 0
    Image.merge("LA", [Image.fromarray(x), Image.fromarray(alpha)]).save(tmp_path/"a.png")
    read = ImageFiles(GREY).read(tmp_path/"a.png").numpy()
    assert read.shape == (1, 10, 10) and np.array_equal(read[0, :, :7], x[:, :7])
    assert np.allclose(read[0, :, 7:], x[:, :7].mean(), atol=1e-3)


def test_sixteen_bits_need_a_scale_for_a_sensor_of_bytes(tmp_path):
    x = rng.integers(300, 60000, (9, 9)).astype("uint16")
    Image.fromarray(x).save(tmp_path/"a.png")
    with pytest.raises(InputError, match="16"): ImageFiles(GREY).look(tmp_path/"a.png")
    assert np.allclose(ImageFiles(GREY, scale=1/257).read(tmp_path/"a.png"), x[None]/257, atol=1e-2)


def test_shrinking_makes_no_bad_values_and_is_antialiased(tmp_path):
    x = np.zeros((64, 64, 3), "uint8")
    x[::2] = 255
    Image.fromarray(x).save(tmp_path/"a.png")
    read = ImageFiles("rgb", img_size=16).read(tmp_path/"a.png")
    assert read.shape == (3, 16, 16) and read.min() >= 0 and read.max() <= 255
    assert torch.allclose(read[:, 2:-2], torch.tensor(127.5), atol=4.), "stripes that are too fine become their mean"


def test_the_short_side_fits_and_the_middle_is_cut(tmp_path):
    x = np.tile(np.arange(0, 240, 4, dtype="uint8"), (20, 1))
    y = to_square(torch.from_numpy(x[None].astype("float32")), 20, "byte")
    assert torch.equal(y[0], torch.from_numpy(x[:, 20:40].astype("float32")))


def test_radar_and_colour_pictures_make_pairs_by_a_config_alone(tmp_path):
    for i in range(4):
        for name, shape in dict(sar=(24, 24), rgb=(24, 24, 3)).items():
            (tmp_path/name).mkdir(exist_ok=True)
            Image.fromarray(noise(*shape)).save(tmp_path/name/f"p{i}.png")
    archive = PairedFolders(tmp_path, sensors=dict(sar=GREY, rgb="rgb"), img_size=12)
    assert len(archive) == 4 and archive[0]["sar"].shape == (1, 12, 12) and archive[0]["rgb"].shape == (3, 12, 12)
    assert archive.has("sar", "rgb").all()


def test_a_sensor_that_loses_all_or_most_of_its_files_is_an_error(tmp_path, caplog):
    for i in range(4):
        for name in "sar", "rgb":
            (tmp_path/name).mkdir(exist_ok=True)
            Image.fromarray(noise(24, 24, 3)).save(tmp_path/name/f"p{i}.png")
    with pytest.raises(InputError, match="sensor sar .* no images that can be used; found 0 of 4, since .*p0.png.*on_error"):
        PairedFolders(tmp_path, sensors=dict(sar=GREY, rgb="rgb"))
    Image.fromarray(noise(24, 24)).save(tmp_path/"sar"/"p0.png")
    with pytest.raises(InputError, match="loses most of its images; found 1 of 4.*on_error=skip_any"):
        PairedFolders(tmp_path, sensors=dict(sar=GREY, rgb="rgb"))
    archive = PairedFolders(tmp_path, sensors=dict(sar=GREY, rgb="rgb"), on_error="skip_any")
    assert archive.has("sar").sum() == 1 and "1 of 4 images are used, 3 left out; the first: " in caplog.text


def test_skipped_files_are_counted_at_once(tmp_path, caplog):
    (tmp_path/"A").mkdir()
    for i in range(5): Image.fromarray(noise(24, 24, 3)).save(tmp_path/"A"/f"p{i}.png")
    (tmp_path/"A"/"p1.png").write_bytes(b"")
    archive = ClassFolders(tmp_path)
    assert len(archive) == 4 and "4 of 5 images are used, 1 left out; the first: " in caplog.text and "p1.png" in caplog.text
