"""Odd images in folders, lists and query files alike: grey, inks, palettes, alpha, bits, floats, one pixel, far too many pixels."""
import sys
import subprocess

import numpy as np
import pytest
import rasterio
import torch
import torch.nn.functional as F
from PIL import Image
from rasterio.transform import from_origin

from rsir_nb.config import load_config
from rsir_nb.core import InputError, UnknownNameError
from rsir_nb.data import images as image_page, rasters, scenes
from rsir_nb.data.bands import choose_bands, is_grey
from rsir_nb.data.checks import square_part, to_square
from rsir_nb.data.folders import ClassFolders, PairedFolders
from rsir_nb.data.image_list import ImageList
from rsir_nb.data.images import ImageFiles, read_reduced
from rsir_nb.data.rasters import raster_info, read_bands, read_raster
from rsir_nb.data.scenes import SceneArchive, read_patch_file
from rsir_nb.engine.retriever import open_search
from rsir_nb.engine.stages import index_run
from rsir_nb.engine.train import pretrain

GREY = dict(bands=["amplitude"], unit="byte")
rng = np.random.default_rng(7)
X = np.kron(rng.integers(1, 255, (6, 6, 3), dtype="uint8"), np.ones((8, 8, 1), "uint8"))     # 48 x 48, in squares that survive a JPEG
CHW = X.transpose(2, 0, 1)


def tif(path, x, **profile):
    with rasterio.open(path, "w", driver="GTiff", count=len(x), height=x.shape[1], width=x.shape[2], dtype=x.dtype, **profile) as ds: ds.write(x)


def write(kind, path):
    "A file of some kind, and what a sensor of red, green and blue has to see in it."
    picture = Image.fromarray(X)
    if kind == "grey jpeg": Image.fromarray(X[..., 0]).save(path, "JPEG", quality=100)
    if kind == "grey png": Image.fromarray(X[..., 0]).save(path, "PNG")
    if kind == "grey with alpha": Image.merge("LA", [Image.fromarray(X[..., 0]), Image.new("L", (48, 48), 255)]).save(path, "PNG")
    if kind == "one bit": Image.fromarray(X[..., 0] > 100).save(path, "PNG")
    if kind == "cmyk jpeg": picture.convert("CMYK").save(path, "JPEG", quality=100)
    if kind == "palette": picture.quantize(64, dither=Image.Dither.NONE).save(path, "PNG")
    if kind == "alpha": Image.fromarray(np.dstack([X, np.full((48, 48), 255, "uint8")])).save(path, "PNG")
    if kind == "progressive jpeg": picture.save(path, "JPEG", quality=100, progressive=True)
    if kind == "rgb tif": tif(path, CHW)
    if kind == "float tif": tif(path, CHW.astype("float32"))
    if kind == "16-bit tif": tif(path, CHW.astype("uint16")*257)
    if kind == "fraction tif": tif(path, (CHW/255).astype("float32"))
    if "tif" in kind:
        with rasterio.open(path, "r+") as ds:
            if ds.dtypes[0] != "uint8": ds.descriptions = "R", "G", "B"
    if "tif" in kind: return CHW
    with Image.open(path) as im:
        if kind.startswith(("grey", "one")): return np.stack([np.asarray(im.convert("L"))]*3)
        return np.asarray(im.convert("RGB")).transpose(2, 0, 1)


ALIKE = {"grey jpeg": dict(grey=True), "grey png": dict(grey=True), "grey with alpha": dict(grey=True), "one bit": dict(grey=True),
         "cmyk jpeg": {}, "palette": {}, "alpha": {}, "progressive jpeg": {}, "rgb tif": {}, "float tif": dict(bands=["R", "G", "B"]),
         "16-bit tif": dict(bands=["R", "G", "B"], scale="16-bit"), "fraction tif": dict(bands=["R", "G", "B"], scale=255)}


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
@pytest.mark.parametrize("kind", ALIKE)
def test_a_folder_a_list_and_a_query_see_the_same(tmp_path, kind):
    ending = "tif" if "tif" in kind else "jpg" if "jpeg" in kind else "png"
    path = tmp_path/"A"/f"a.{ending}"
    path.parent.mkdir()
    want, how = write(kind, path), ALIKE[kind]
    (tmp_path/"l.csv").write_text(f"image,label\nA/a.{ending},x\n")
    seen = [ClassFolders(tmp_path, **how)[0]["rgb"], ImageList(tmp_path/"l.csv", **how)[0]["rgb"], read_patch_file(path, "rgb", **how),
            PairedFolders(tmp_path, ["rgb"], dict(rgb="A"), **{k: v if k == "grey" else dict(rgb=v) for k, v in how.items()})[0]["rgb"]]
    for x in seen: assert np.abs(x.numpy() - want).max() < 1e-2, kind
    small = [ClassFolders(tmp_path, img_size=20, **how)[0]["rgb"], ImageList(tmp_path/"l.csv", img_size=20, **how)[0]["rgb"],
             read_patch_file(path, "rgb", 20, **how)]
    resized = F.interpolate(torch.tensor(want, dtype=torch.float32)[None], (20, 20), mode="bicubic", antialias=True)[0].clamp(0, 255)
    for x in small: assert torch.allclose(x, resized, atol=1e-2), kind


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
@pytest.mark.parametrize("kind, told", {
    "grey jpeg": "1 band without a name; wanted R, G, B; .*grey=true takes a grey picture for each colour",
    "grey with alpha": "1 band without a name and alpha; .*grey=true", "16-bit tif": "uint16 values, 16-bit; .*scale=16-bit",
    "fraction tif": "brightness as a fraction; wanted brightness 0..255; multiply by 255: scale=255"}.items())
def test_what_has_to_be_said(tmp_path, kind, told):
    path = tmp_path/"A"/("a.tif" if "tif" in kind else "a.png")
    path.parent.mkdir()
    write(kind, path)
    (tmp_path/"l.csv").write_text(f"image,label\nA/{path.name},x\n")
    for read in (lambda: ClassFolders(tmp_path), lambda: ImageList(tmp_path/"l.csv"), lambda: read_patch_file(path, "rgb")):
        with pytest.raises(InputError, match=told): read()


def test_grey_is_for_colours_alone(tmp_path):
    Image.fromarray(X[..., 0]).save(tmp_path/"g.png")
    info = raster_info(tmp_path/"g.png")
    assert is_grey(info, "rgb") and not is_grey(info, "s2_rgb") and not is_grey(info, "rgbn")
    assert choose_bands(info, "rgb", grey=True) == [0, 0, 0]
    with pytest.raises(InputError, match="1 band without a name"): ImageFiles("rgbn", grey=True).look(tmp_path/"g.png")
    Image.fromarray(X).save(tmp_path/"c.png")
    assert np.array_equal(ImageFiles("rgb", grey=True).read(tmp_path/"c.png"), CHW), "a picture in colour keeps its colours"
    named = ImageFiles("rgb", bands=["R", "G", "B"], grey=True)
    assert np.array_equal(named.read(tmp_path/"g.png"), np.stack([X[..., 0]]*3)) and named.reading == dict(bands=["R", "G", "B"], grey=True)
    seen = np.full((48, 48), 255, "uint8")
    seen[:, :10] = 0
    Image.merge("LA", [Image.fromarray(X[..., 0]), Image.fromarray(seen)]).save(tmp_path/"la.png")
    x = ImageFiles("rgb", grey=True).read(tmp_path/"la.png").numpy()
    assert np.array_equal(x[:, :, 10:], np.stack([X[:, 10:, 0]]*3)) and np.allclose(x[:, :, :10], X[:, 10:, 0].mean(), atol=1e-3)


def test_images_of_one_pixel(tmp_path):
    for name in "A", "B":
        (tmp_path/name).mkdir()
        for i in range(2): Image.fromarray(X[i:i + 1, :1]).save(tmp_path/name/f"{i}.png")
    archive = ClassFolders(tmp_path)
    assert np.array_equal(archive["A/1"]["rgb"], CHW[:, 1:2, :1])
    assert torch.equal(ClassFolders(tmp_path, img_size=9)["A/1"]["rgb"], torch.tensor(CHW[:, 1:2, :1]).float().expand(3, 9, 9))
    cfg = load_config("baseline", ["data=class_folders", f"data.root={tmp_path}", f"out={tmp_path}/run"])
    with pytest.raises(InputError, match="no band statistics; found 1x1 pixels; wanted 3x3 or more"): pretrain(cfg, progress=False)
    Image.fromarray(X[:3, :3]).save(tmp_path/"A"/"9.png")
    with pytest.raises(InputError, match="smaller than the part to cut; found 1x1"): ClassFolders(tmp_path, img_size=4, fit="centre")


def test_one_pixel_among_others_is_left_out(tmp_path, caplog):
    (tmp_path/"A").mkdir()
    for i in range(4): Image.fromarray(X).save(tmp_path/"A"/f"{i}.png")
    Image.fromarray(X[:1, :1]).save(tmp_path/"A"/"one.png")
    assert len(ClassFolders(tmp_path)) == 4 and "one.png has another size than most; found 1x1 pixels; wanted 48x48" in caplog.text


# many pixels

def gradient(h, w, n=3):
    "Smooth colours of any size, (n,h,w) bytes, and what they are at relative places."
    value = lambda y, x: np.stack([(127 + 100*np.sin(3*(i + 1)*x + 2*y)) for i in range(n)])
    yy, xx = np.meshgrid((np.arange(h) + 0.5)/h, (np.arange(w) + 0.5)/w, indexing="ij")
    return value(yy, xx).round().astype("uint8"), value


def save(path, x):
    how = {1: dict(photometric="MINISBLACK"), 3: dict(photometric="RGB"), 4: dict(photometric="RGB", alpha="yes")}[len(x)]
    if path.suffix == ".tif": tif(path, x, tiled=True, blockxsize=256, blockysize=256, **how)
    else: Image.fromarray(x[0] if len(x) == 1 else x.transpose(1, 2, 0)).save(path, quality=95)


@pytest.fixture
def low(monkeypatch):
    "Limits for small files: above 10,000 pixels in parts, at most 200,000 at once, strips of 2,000."
    for module in rasters, image_page, scenes: monkeypatch.setattr(module, "LARGE", 10_000, raising=False)
    monkeypatch.setattr(rasters, "MOST", 200_000)
    monkeypatch.setattr(image_page, "_STRIP", 2_000)


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
@pytest.mark.parametrize("ending", ["tif", "png", "jpg"])
@pytest.mark.parametrize("n", [1, 3])
def test_large_images_are_read_in_parts(tmp_path, low, ending, n):
    x, value = gradient(500, 700, n)
    path, sensor = tmp_path/"A"/f"a.{ending}", "rgb" if n == 3 else GREY
    path.parent.mkdir()
    save(path, x)
    yy, xx = np.meshgrid((np.arange(32) + 0.5)/32, (100 + 500*(np.arange(32) + 0.5)/32)/700, indexing="ij")
    archive = ClassFolders(tmp_path, sensor, img_size=32)
    read = archive[0][archive.modality]
    assert read.shape == (n, 32, 32) and np.abs(read.numpy() - value(yy, xx)).max() < 4
    query = read_patch_file(path, archive.sensors[archive.modality], 32, fit="short_side")
    assert torch.equal(query, read)
    with pytest.raises(InputError, match="too large to be read at once; found 500x700 pixels; wanted at most 200,000.*img_size="):
        ClassFolders(tmp_path, sensor, on_error="raise")
    with pytest.raises(InputError, match="no images that can be used.*too large"): ClassFolders(tmp_path, sensor)
    with pytest.raises(InputError, match="too large"): read_patch_file(path, archive.sensors[archive.modality])
    with pytest.raises(InputError, match="too large"): read_raster(path)


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
def test_parts_are_means_of_blocks(tmp_path, low):
    x = rng.integers(1, 4000, (2, 300, 450), dtype="uint16")
    x[:, 50:90, 200:240] = 0
    tif(tmp_path/"a.tif", x)
    info = raster_info(tmp_path/"a.tif")
    found, missing = read_reduced(info, [1, 0], square_part(300, 450, 15), 15, ("fraction", 5.))
    part = x[[1, 0], :, 75:375].astype("float64").reshape(2, 30, 10, 30, 10)
    seen = (part > 0).all(0, keepdims=True)
    want = np.where(seen, part*10000 + 5, 0).sum((2, 4))/np.maximum(seen.sum((2, 4)), 1)
    assert np.array_equal(missing, ~seen[0].any((1, 3))) and missing.sum() > 10
    assert np.allclose(found[:, ~missing], want[:, ~missing], rtol=1e-5)
    whole, _ = read_reduced(info, [0], (10, 20, 60, 60), 60)
    assert np.array_equal(whole[0], read_bands(info, [0], window=(10, 20, 60, 60))[0][0]), "nothing is averaged where all is wanted"


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
def test_transparent_parts_of_a_large_image(tmp_path, low):
    x, _ = gradient(400, 400)
    alpha = np.full((1, 400, 400), 255, "uint8")
    alpha[:, :, :100] = 0
    for name in "a.png", "a.tif":
        save(tmp_path/name, np.concatenate([x, alpha]))
        read = ImageFiles("rgb", img_size=16).read(tmp_path/name).numpy()
        blocks = x.reshape(3, 50, 8, 50, 8).mean((2, 4))[:, :, 13:]
        assert np.allclose(read[:, 2:-2, :2], blocks.mean((1, 2))[:, None, None], atol=3), name
        query = read_patch_file(tmp_path/name, "rgb", 16).numpy()
        assert np.array_equal(query, read)
    alpha[:] = 0
    save(tmp_path/"none.png", np.concatenate([x, alpha]))
    with pytest.raises(InputError, match="none.png is empty; found no data in any pixel"): ImageFiles("rgb", img_size=16).read(tmp_path/"none.png")
    with pytest.raises(InputError, match="nearly empty; found no data in 100%"): read_patch_file(tmp_path/"none.png", "rgb", 16)


@pytest.mark.parametrize("mode", ["palette", "see-through palette", "one bit", "one colour", "cmyk", "16-bit"])
def test_large_pictures_of_every_kind_are_as_small_ones(tmp_path, monkeypatch, mode):
    x, _ = gradient(200, 300)
    picture, path, how = Image.fromarray(x.transpose(1, 2, 0)), tmp_path/"a.png", {}
    if mode == "palette": picture.quantize(200).save(path)
    if mode == "see-through palette": picture.quantize(200).save(path, transparency=3)
    if mode == "one bit": picture.convert("1").save(path)
    if mode == "one colour": picture.save(path, transparency=tuple(map(int, x[:, 10, 10])))
    if mode == "cmyk":
        path = tmp_path/"a.jpg"
        picture.convert("CMYK").save(path, quality=100)
    if mode == "16-bit": Image.fromarray(x[0].astype("uint16")*257).save(path); how = dict(scale="16-bit")
    sensor = GREY if mode in ("one bit", "16-bit") else "rgb"
    plain = ImageFiles(sensor, img_size=20, **how).read(path)
    for module in rasters, image_page: monkeypatch.setattr(module, "LARGE", 10_000)
    monkeypatch.setattr(image_page, "_STRIP", 3_000)
    parts = ImageFiles(sensor, img_size=20, **how).read(path)
    assert (parts - plain).abs().mean() < 4 and (parts - plain).abs().max() < (60 if mode == "one bit" else 20)


def test_more_pixels_than_pillow_opens(tmp_path):
    "Pillow refuses 179 million pixels, and warns of 89; sizes are ours to judge."
    import struct, zlib
    def png(path, side):
        chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        rows = zlib.compressobj(1)
        data = b"".join(rows.compress(b"\0" + bytes([i*250//side])*side) for i in range(side)) + rows.flush()
        head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    (tmp_path/"A").mkdir()
    png(tmp_path/"A"/"a.png", 14_000)
    info = raster_info(tmp_path/"A"/"a.png")
    assert (info.height, info.width, info.bands) == (14_000, 14_000, (None,))
    with pytest.raises(InputError, match="14,000x14,000 pixels; wanted at most 134,217,728"): ImageFiles(GREY).look(tmp_path/"A"/"a.png")
    code = ("import resource, sys; from rsir_nb.data.images import ImageFiles\n"
            "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "files, before = ImageFiles(dict(bands=['a'], unit='byte'), img_size=50), used()\n"
            "x = files.read(sys.argv[1]); print(used() - before, *x[0, :, 0].tolist())")
    done = subprocess.run([sys.executable, "-c", code, tmp_path/"A"/"a.png"], capture_output=True, text=True, check=True)
    grown, *column = map(float, done.stdout.split())
    assert grown < 170_000, f"{grown/1e3:.0f} MB for an image of 196 MB"
    assert np.allclose(column, (np.arange(50) + 0.5)*5, atol=1.5)


def test_large_pictures_are_no_scenes(tmp_path, low):
    x, _ = gradient(500, 300)
    save(tmp_path/"a.png", x)
    with pytest.raises(InputError, match="cannot be cut into patches; found a large picture without tiles.*gdal_translate"):
        SceneArchive(tmp_path/"a.png", "rgb", img_size=50, crs="unknown")


# query files

def test_a_query_file_is_fitted_like_the_archive(tmp_path):
    "A photograph that is not square, in another size: the archive takes the middle of its images, and so of the query."
    for name, k in dict(A=0, B=1).items():
        (tmp_path/"c"/name).mkdir(parents=True)
        for i in range(4): Image.fromarray(np.roll(X[:40], 5*i + 90*k, axis=1)).save(tmp_path/"c"/name/f"{i}.png")
    Image.fromarray(np.repeat(np.repeat(X[:40], 2, 0), 2, 1)).save(tmp_path/"q.png")
    cfg = load_config("baseline", ["data=class_folders", f"data.root={tmp_path}/c", "data.img_size=24", f"out={tmp_path}/run"])
    index_run(pretrain(cfg, progress=False), progress=False)
    search = open_search(tmp_path/"run")
    assert search.store.provenance["reading"]["rgb"] == dict(fit="short_side")
    assert search.query(str(tmp_path/"q.png"), k=1).hits["id"].tolist() == ["A/0"]
    with pytest.raises(InputError, match="has not the size of a patch"): search.query(str(tmp_path/"q.png"), k=1, file=dict(fit="resample"))


def test_ways_to_fit_a_query(tmp_path):
    Image.fromarray(X[:40]).save(tmp_path/"a.png")
    for fit in "short_side", "stretch":
        assert torch.equal(read_patch_file(tmp_path/"a.png", "rgb", 20, fit=fit), to_square(torch.tensor(CHW[:, :40]).float(), 20, "byte", fit))
    with pytest.raises(UnknownNameError, match="did you mean short_side"): read_patch_file(tmp_path/"a.png", "rgb", 20, fit="shortside")


def test_places_of_a_georeferenced_list(tmp_path):
    (tmp_path/"A").mkdir()
    tif(tmp_path/"A"/"a.tif", CHW, crs="EPSG:32632", transform=from_origin(690000, 5340000, 10, 10), photometric="RGB")
    (tmp_path/"l.csv").write_text("image,label\nA/a.tif,x\n")
    table = ImageList(tmp_path/"l.csv").table
    assert table.crs[0] == "EPSG:32632" and table.geometry[0] == ClassFolders(tmp_path).table.geometry[0]


def test_three_equal_bands_with_alpha_for_a_sensor_of_one(tmp_path):
    "The mask is that of each pixel, not of the first row."
    x, alpha = X[..., :1].repeat(3, 2), np.full((48, 48, 1), 255, "uint8")
    alpha[:16] = 0
    Image.fromarray(np.concatenate([x, alpha], 2)).save(tmp_path/"a.png")
    read = ImageFiles(GREY).read(tmp_path/"a.png").numpy()
    assert np.array_equal(read[0, 16:], X[16:, :, 0]) and np.allclose(read[0, :16], X[16:, :, 0].mean(), atol=1e-3)
