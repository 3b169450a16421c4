"""Pictures of every kind: the bands that a file has, and the right values of each pixel."""
import numpy as np
import pytest
import rasterio
import torch
from omegaconf import OmegaConf
from PIL import Image
from rasterio.enums import ColorInterp
from rasterio.transform import from_origin
from shapely import wkb

from rsir_nb.config import load_config
from rsir_nb.core import CorruptError, InputError, RsirError, UnknownNameError
from rsir_nb.data.base import concat_archives
from rsir_nb.data.checks import to_square
from rsir_nb.data.folders import ClassFolders, PairedFolders
from rsir_nb.data.images import ImageFiles
from rsir_nb.data.module import ArchiveData
from rsir_nb.data.rasters import raster_info, read_raster
from rsir_nb.data.scenes import SceneArchive, read_patch_file
from rsir_nb.data.store import PatchStore, write_store
from rsir_nb.engine.encode import encode
from rsir_nb.engine.parts import build_archive, build_method, load_method
from rsir_nb.engine.train import pretrain

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


# palettes, transparency and bits in every file that can have them

def write_tif(path, x, roles=None, **profile):
    profile = dict(crs="EPSG:32632", transform=from_origin(690000, 5340000, 10, 10)) | profile
    with rasterio.open(path, "w", driver="GTiff", count=len(x), height=x.shape[1], width=x.shape[2], dtype=x.dtype, **profile) as ds:
        ds.write(x)
        if roles: ds.colorinterp = roles
    return path


def palette_tif(path, index, colours, **profile):
    write_tif(path, index[None], **profile)
    with rasterio.open(path, "r+") as ds: ds.write_colormap(1, {i: tuple(c) for i, c in enumerate(colours.tolist())})
    return path


def test_a_palette_in_a_tiff(tmp_path):
    colours, index = noise(256, 3), noise(40, 50, low=0)
    path = palette_tif(tmp_path/"a.tif", index, colours)
    want = colours[index].transpose(2, 0, 1)
    assert raster_info(path).bands == ("R", "G", "B")
    assert np.array_equal(ImageFiles("rgb").read(path), want)
    assert np.array_equal(read_raster(path, [2, 0], (3, 4, 10, 20)), want[[2, 0], 3:13, 4:24])
    archive = SceneArchive(path, img_size=20)
    assert list(archive.sensors) == ["rgb"] and np.array_equal(archive[0]["rgb"], want[:, :20, :20])
    with pytest.raises(InputError, match="has not all the bands"): ImageFiles(GREY).look(path)
    with pytest.raises(InputError, match="names do not fit .*3 bands in the file"): SceneArchive(path, img_size=20, bands=["R"])


def test_a_palette_with_a_missing_colour(tmp_path):
    colours, index = noise(256, 3), noise(20, 20, low=1)
    index[:5] = 0
    path = palette_tif(tmp_path/"a.tif", index, colours, nodata=0)
    image = Image.fromarray(index, "P")
    image.putpalette(colours.ravel().tolist())
    image.save(tmp_path/"a.png", transparency=0)
    mean = colours[index[5:]].reshape(-1, 3).mean(0)
    for file in path, tmp_path/"a.png":
        assert raster_info(file).bands == ("R", "G", "B", "alpha")
        x = ImageFiles("rgb").read(file).numpy()
        assert np.array_equal(x[:, 5:], colours[index[5:]].transpose(2, 0, 1)), file
        assert np.allclose(x[:, :5], mean[:, None, None], atol=1e-2), file


def test_a_palette_beside_other_bands_is_refused(tmp_path):
    path = write_tif(tmp_path/"a.tif", noise(2, 9, 9), photometric="palette")
    with rasterio.open(path) as ds:
        if ColorInterp.palette not in ds.colorinterp: pytest.skip("this GDAL writes no such file")
    with pytest.raises(InputError, match="palette and further bands"): raster_info(path)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_png_of_sixteen_bits_keeps_its_bits_and_bands(tmp_path, n):
    x = rng.integers(1, 65535, (n, 12, 12), dtype="uint16")
    if n in (2, 4): x[-1, 0], x[-1, 1:] = 0, 65535
    with rasterio.open(tmp_path/"a.png", "w", driver="PNG", count=n, height=12, width=12, dtype="uint16") as ds: ds.write(x)
    info = raster_info(tmp_path/"a.png")
    assert info.dtype == "uint16" and info.bands == {1: (None,), 2: (None, "alpha"), 3: ("R", "G", "B"), 4: ("R", "G", "B", "alpha")}[n]
    assert np.array_equal(read_raster(tmp_path/"a.png"), x)
    sensor, bands = ("rgb", 3) if n > 2 else (GREY, 1)
    with pytest.raises(InputError, match="16-bit; wanted brightness 0..255; scale=16-bit"): ImageFiles(sensor).look(tmp_path/"a.png")
    read = ImageFiles(sensor, scale="16-bit").read(tmp_path/"a.png").numpy()
    assert np.allclose(read[:, 1:], x[:bands, 1:]/257, atol=1e-2)
    if n == 1:
        whole = (tmp_path/"a.png").read_bytes()
        (tmp_path/"half.png").write_bytes(whole[:len(whole)//2])
        with pytest.raises(CorruptError, match="half.png cannot be read"): read_raster(tmp_path/"half.png")


@pytest.mark.parametrize("mode,clear", [("RGB", (1, 2, 3)), ("L", 7)])
def test_one_transparent_colour(tmp_path, mode, clear):
    x = noise(10, 10, low=20) if mode == "L" else noise(10, 10, 3, low=20)
    x[:3] = clear
    Image.fromarray(x).save(tmp_path/"a.png", transparency=clear)
    read = ImageFiles(GREY if mode == "L" else "rgb").read(tmp_path/"a.png").numpy()
    rest = np.atleast_3d(x)[3:]
    assert np.array_equal(read[:, 3:], rest.transpose(2, 0, 1))
    assert np.allclose(read[:, :3], rest.mean((0, 1))[:, None, None], atol=1e-3)


def test_one_bit_and_cmyk(tmp_path):
    x = noise(8, 8) > 100
    Image.fromarray(x).save(tmp_path/"a.png")
    assert np.array_equal(ImageFiles(GREY).read(tmp_path/"a.png")[0], x*255)
    Image.fromarray(noise(8, 8, 3)).convert("CMYK").save(tmp_path/"a.jpg")
    assert raster_info(tmp_path/"a.jpg").bands == ("R", "G", "B"), "four inks are no red, green, blue and near infrared"
    with Image.open(tmp_path/"a.jpg") as im: want = np.asarray(im.convert("RGB"))
    assert np.array_equal(ImageFiles("rgb").read(tmp_path/"a.jpg"), want.transpose(2, 0, 1))


# alpha is never near infrared

RGBA = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]


def test_the_fourth_band_of_a_tiff(tmp_path):
    x = noise(4, 40, 40)
    x[3] = 255
    x[:, :, :10] = np.array([255, 255, 255, 0])[:, None, None]
    path = write_tif(tmp_path/"a.tif", x, RGBA)
    with pytest.raises(InputError, match="found R, G, B and alpha; wanted N; .*alpha is a mask, unless bands="):
        read_patch_file(path, "rgbn")
    assert np.array_equal(read_patch_file(path, "rgbn", bands=["R", "G", "B", "N"]), x), "named, it is a band"
    assert np.array_equal(read_patch_file(path, "rgb", bands=["R", "G", "B"])[:, :, 10:], x[:3, :, 10:])
    filled = read_patch_file(path, "rgb").numpy()
    assert np.allclose(filled[:, :, :10], x[:3, :, 10:].mean((1, 2))[:, None, None], atol=1e-3)
    archive = SceneArchive(path, img_size=10)
    assert archive.table.col.unique().tolist() == [10, 20, 30] and (archive.table.nodata == 0).all()
    assert np.array_equal(archive[0]["rgb"], x[:3, :10, 10:20])
    named = SceneArchive(path, sensor="rgbn", img_size=10, bands=["R", "G", "B", "N"])
    assert len(named) == 16 and np.array_equal(named[1]["rgbn"], x[:, :10, 10:20])


def test_a_description_says_more_than_a_role(tmp_path):
    x = noise(4, 12, 12)
    path = write_tif(tmp_path/"a.tif", x, RGBA)
    with rasterio.open(path, "r+") as ds: ds.descriptions = "R", "G", "B", "N"
    assert np.array_equal(ImageFiles("rgbn").read(path), x)


def test_a_query_that_is_mostly_transparent_is_refused(tmp_path):
    x = noise(20, 20, 4)
    x[..., 3] = 0
    x[:4, :, 3] = 255
    Image.fromarray(x).save(tmp_path/"a.png")
    with pytest.raises(InputError, match="nearly empty; found no data in 80%"): read_patch_file(tmp_path/"a.png", "rgb")


# sizes

def field(path, side=64):
    "A white square on black: bicubic weights overshoot at its edges."
    x = np.zeros((side, side, 3), "uint8")
    x[side//5:-side//5, side//4:-side//4] = 255
    Image.fromarray(x).save(path)
    return x


def test_overshoot_is_clipped_and_never_refused(tmp_path):
    x = torch.tensor(field(tmp_path/"a.png").transpose(2, 0, 1), dtype=torch.float32)
    free = torch.nn.functional.interpolate(x[None], (24, 24), mode="bicubic", antialias=True)[0]
    assert free.min() < -5 and free.max() > 260
    for read in ImageFiles("rgb", img_size=24).read(tmp_path/"a.png"), read_patch_file(tmp_path/"a.png", "rgb", 24):
        assert torch.equal(read, free.clamp(0, 255))
    (tmp_path/"A").mkdir()
    (tmp_path/"a.png").rename(tmp_path/"A"/"a.png")
    report = write_store(ClassFolders(tmp_path), tmp_path/"store", size=24, progress=False)
    assert report.written == 1 and not report.skipped
    assert np.abs(PatchStore(tmp_path/"store")[0]["rgb"] - free.clamp(0, 255)).max() <= 0.5


def test_values_are_checked_before_they_are_resampled(tmp_path):
    x = np.full((1, 32, 32), 90, "float32")
    x[0, ::8, ::8] = 400         # an average over 8 x 8 pixels would hide it
    path = write_tif(tmp_path/"a.tif", x)
    with pytest.raises(InputError, match="values 90..400; wanted brightness"): ImageFiles(GREY, img_size=4).read(path)
    with pytest.raises(InputError, match="values 90..400; wanted brightness"): read_patch_file(path, GREY, 4)


def test_the_footprint_is_that_of_the_part_that_is_used(tmp_path):
    (tmp_path/"A").mkdir()
    write_tif(tmp_path/"A"/"a.tif", noise(3, 20, 40))
    full = wkb.loads(ClassFolders(tmp_path).table.geometry[0]).bounds
    for fit, share in dict(short_side=1/2, stretch=1, centre=1/4).items():
        west, _, east, _ = wkb.loads(ClassFolders(tmp_path, img_size=10, fit=fit).table.geometry[0]).bounds
        assert (east - west)/(full[2] - full[0]) == pytest.approx(share, abs=0.02), fit
        assert (east + west)/2 == pytest.approx((full[0] + full[2])/2, abs=2e-5), fit
    with pytest.raises(InputError, match="no images .* found 0 of 1, since an image is smaller"): ClassFolders(tmp_path, img_size=30, fit="centre")
    with pytest.raises(UnknownNameError, match="did you mean stretch"): ClassFolders(tmp_path, img_size=10, fit="strech")


# what is lost is told before anything is trained

def pairs(root, n=8):
    for name, shape in dict(sar=(32, 32), rgb=(32, 32, 3)).items():
        (root/name).mkdir(parents=True, exist_ok=True)
        for i in range(n): Image.fromarray(noise(*shape)).save(root/name/f"p{i}.png")
    return root


def config(root, out, *more):
    small = "patch_size=8 embed_dim=16 num_heads=2 specific_depth=1 shared_depth=1 decoder_embed_dim=16 decoder_depth=1 decoder_num_heads=2 norm=null"
    return load_config("csmae", ["data=paired_folders", f"data.root={root}", f"out={out}", "trainer.batch_size=4", "trainer.num_workers=0",
                                 "trainer.pictures=0", "optim.epochs=1", "optim.warmup_epochs=0", "data.img_size=16",
                                 "data.sensors={sar: {bands: [amplitude], unit: byte}, rgb: rgb}",
                                 *(f"method.{o}" for o in small.split()), *more])


def test_a_config_alone_trains_and_encodes_both_sensors(tmp_path):
    cfg = config(pairs(tmp_path/"pairs"), tmp_path/"run")
    run = pretrain(cfg, progress=False)
    method, archive = load_method(run), build_archive(cfg.data)
    assert {m: o.bands for m, o in method.sensors.items()} == dict(sar=("amplitude",), rgb=("R", "G", "B"))
    store = encode(method, archive, tmp_path/"codes", progress=False)
    assert store.present("sar").all() and store.present("rgb").all() and len(store.table) == 8


def test_files_without_partners_are_no_training_set(tmp_path, caplog):
    root = pairs(tmp_path/"pairs", 3)
    for i in range(3): (root/"sar"/f"p{i}.png").rename(root/"sar"/f"radar_{i}.png")
    archive = PairedFolders(root, sensors=dict(sar=GREY, rgb="rgb"))
    assert "no file name is in two of the folders" in caplog.text and "sar: radar_0, radar_1, ...; rgb: p0" in caplog.text
    assert archive.coverage() == "sar 3, rgb 3, all of them 0 of 6 patches"
    with pytest.raises(InputError, match="nothing to learn from; found sar 3, rgb 3, all of them 0 of 6 patches"): ArchiveData(archive)
    with pytest.raises(InputError, match="no file name is in all the folders; found sar: radar_0"):
        PairedFolders(root, sensors=dict(sar=GREY, rgb="rgb"), only_complete=True)


def test_a_sensor_that_no_patch_has(tmp_path):
    cfg = config(pairs(tmp_path/"pairs", 3), tmp_path/"run")
    archive = build_archive(cfg.data)
    archive.table["modalities"] = [["rgb"]]*3
    with pytest.raises(InputError, match="no patch of the archive has sar; found sar 0, rgb 3, all of them 0 of 3 patches"):
        build_method(cfg, concat_archives([archive]))


def test_radar_of_three_equal_bands(tmp_path):
    grey = noise(24, 24)
    for name, picture in dict(a=Image.fromarray(grey).convert("RGB"), b=Image.fromarray(grey).convert("RGBA"),
                              c=Image.fromarray(grey)).items(): picture.save(tmp_path/f"{name}.png")
    for name in "abc": assert np.array_equal(ImageFiles(GREY).read(tmp_path/f"{name}.png"), grey[None])
    assert ImageFiles(GREY, img_size=12).read(tmp_path/"a.png").shape == (1, 12, 12)
    Image.fromarray(np.stack([grey, grey, 255 - grey], -1)).save(tmp_path/"d.png")
    with pytest.raises(InputError, match="d.png cannot be used as .*found colours, bands that differ"): ImageFiles(GREY).look(tmp_path/"d.png")
    named = ImageFiles(GREY, bands=["amplitude", "G", "B"])   # a band that is named is taken
    assert np.array_equal(named.read(tmp_path/"d.png"), grey[None])


def test_a_pair_that_is_not_whole_is_named(tmp_path, caplog):
    root = pairs(tmp_path/"pairs", 6)
    for i in 1, 4: (root/"rgb"/f"p{i}.png").unlink()
    assert len(ArchiveData(PairedFolders(root, sensors=dict(sar=GREY, rgb="rgb"))).train) == 4
    assert "left out: p1, p4" in caplog.text


def test_endings_in_capitals_and_tif_radar(tmp_path):
    root = pairs(tmp_path/"pairs", 4)
    for path in (root/"rgb").iterdir(): path.rename(path.with_suffix(".PNG"))
    for path in (root/"sar").iterdir():
        Image.open(path).save(path.with_suffix(".TIF"))
        path.unlink()
    archive = PairedFolders(root, sensors=dict(sar=GREY, rgb="rgb"))
    assert len(archive) == 4 and archive.has("sar", "rgb").all() and archive[0]["sar"].shape[0] == 1


def test_decibels_are_no_bytes(tmp_path):
    write_tif(tmp_path/"a.tif", -25*np.random.default_rng(0).random((1, 8, 8)).astype("float32"))
    with pytest.raises(InputError, match="wanted brightness 0..255; choose a sensor of another unit, e.g. unit: dB"):
        ImageFiles(GREY).read(tmp_path/"a.tif")
    assert ImageFiles(dict(bands=["amplitude"], unit="dB")).read(tmp_path/"a.tif").max() <= 0


def test_options_are_given_by_sensor(tmp_path):
    root = pairs(tmp_path, 1)
    with pytest.raises(UnknownNameError, match="sensor in 'scale' is called 'sra'"):
        PairedFolders(root, sensors=dict(sar=GREY, rgb="rgb"), scale=dict(sra=2))
    with pytest.raises(InputError, match="'bands' is not given by sensor"):
        PairedFolders(root, sensors=dict(sar=GREY, rgb="rgb"), bands="vessel")
    for wrong, why in {"{sar: {band: [a], unit: byte}}": "did you mean bands", "{sar: {bands: [a]}}": "unit of the sensor",
                       "{sar: {bands: a, unit: byte}}": "has no list of bands"}.items():
        sensors = OmegaConf.to_object(OmegaConf.create(f"x: {wrong}").x)
        with pytest.raises(RsirError, match=why): PairedFolders(root, sensors=sensors)


def test_one_readable_header_is_not_enough(tmp_path):
    (tmp_path/"A").mkdir()
    for i in range(6): write_tif(tmp_path/"A"/f"{i}.tif", np.full((3, 9, 9), 700.5, "float32"))
    with pytest.raises(InputError, match="values 700.5..700.5; wanted brightness"): ClassFolders(tmp_path, bands=["R", "G", "B"])
