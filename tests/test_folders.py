"""Class folders and paired folders: small images, and the real EuroSAT in ../shared/data."""
import pickle

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.transform import from_origin
from shapely import wkb

from rsir_nb.core import DATASETS, CorruptError, InputError, MissingFileError, UnknownNameError
from rsir_nb.data.folders import ClassFolders, PairedFolders
from rsir_nb.sensors import BAND_ORDERS, get_sensor

rng = np.random.default_rng(0)
RGBN = "B02 B03 B04 B08".split()
PAIR = dict(s1="s1", s2="s2_rgbn")


def picture(path, size=(24, 24)):
    path.parent.mkdir(parents=True, exist_ok=True)
    x = rng.integers(0, 255, (*size, 3), dtype="uint8")
    Image.fromarray(x).save(path)
    return x.transpose(2, 0, 1)


def write_tif(path, x, bands=None, left=690000, **profile):
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = dict(crs="EPSG:32632", transform=from_origin(left, 5340000, 10, 10)) | profile
    shape = dict(count=len(x), height=x.shape[1], width=x.shape[2], dtype=x.dtype)
    with rasterio.open(path, "w", driver="GTiff", **shape, **profile) as ds:
        ds.write(x)
        if bands: ds.descriptions = tuple(bands)
    return x


def optical(n=4, side=20): return rng.integers(100, 5000, (n, side, side), dtype="uint16")


def radar(side=20): return rng.normal(-14, 3, (2, side, side)).astype("float32")


# a folder a class

def test_class_folders(tmp_path):
    made = {f"{c}/{c}_{i}": picture(tmp_path/c/f"{c}_{i}.{end}") for c in ("River", "Forest")
            for i, end in enumerate(["png", "png", "png"])}
    archive = ClassFolders(tmp_path)
    assert archive.ids == sorted(made) and list(archive.vocab) == ["Forest", "River"]
    for name, x in made.items(): assert np.array_equal(archive[name]["rgb"], x)
    assert archive["River/River_1"]["labels"].tolist() == [0, 1]
    assert torch.equal(pickle.loads(pickle.dumps(archive))[4]["rgb"], archive[4]["rgb"])
    chosen = ClassFolders(tmp_path, classes=["River"], img_size=48, modality="camera")
    assert len(chosen) == 3 and chosen[0]["camera"].shape == (3, 48, 48) and list(chosen.vocab) == ["River"]


def test_black_is_a_colour(tmp_path):
    x = np.full((3, 16, 16), 200, "uint8")
    x[:, :8] = 0
    (tmp_path/"A").mkdir()
    Image.fromarray(x.transpose(1, 2, 0)).save(tmp_path/"A"/"a.png")
    assert np.array_equal(ClassFolders(tmp_path)[0]["rgb"], x)


def test_all_bands_in_eurosat_order(tmp_path):
    x = write_tif(tmp_path/"Lake"/"Lake_1.tif", optical(13, 64))
    archive = ClassFolders(tmp_path, sensor="s2_13", bands="eurosat", modality="s2")
    order = [BAND_ORDERS["eurosat"]["s2"].index(o) for o in get_sensor("s2_13").bands]
    assert np.array_equal(archive[0]["s2"], x[order])
    assert wkb.loads(archive.table.geometry[0]).is_valid and archive.table.crs[0] == "EPSG:32632"
    assert np.array_equal(ClassFolders(tmp_path, sensor="s2_rgb", bands="eurosat")[0]["s2_rgb"], x[[3, 2, 1]])


def test_bad_images_are_listed(tmp_path):
    for i in range(3): picture(tmp_path/"A"/f"good_{i}.png")
    picture(tmp_path/"A"/"size.png", (30, 24))
    picture(tmp_path/"stray.png")
    (tmp_path/"A"/"text.jpg").write_text("hello")
    (tmp_path/"A"/"empty.png").write_bytes(b"")
    (tmp_path/"A"/"cut.png").write_bytes((tmp_path/"A"/"good_0.png").read_bytes()[:900])
    write_tif(tmp_path/"A"/"bands.tif", optical(2))
    Image.fromarray(np.zeros((24, 24, 3), "uint8")).save(tmp_path/"A"/"black.png")
    with pytest.raises(InputError, match="loses most of its images; found 3 of 10.*on_error=skip_any"):
        ClassFolders(tmp_path, check=True)
    archive = ClassFolders(tmp_path, check=True, on_error="skip_any")
    assert archive.ids == ["A/good_0", "A/good_1", "A/good_2"]
    why = {o.source.rpartition("/")[2]: o.reason for o in archive.skipped.itertuples()}
    assert why.keys() == {"size.png", "stray.png", "text.jpg", "empty.png", "cut.png", "bands.tif",
                          "black.png"}
    assert "found 30x24 pixels; wanted 24x24; pass img_size=" in why["size.png"]
    assert "no class folder" in why["stray.png"] and "cannot be read" in why["cut.png"]
    assert "found 2 bands without names; wanted R, G, B" in why["bands.tif"]
    assert "0 in every pixel" in why["black.png"]
    with pytest.raises(CorruptError, match="cut.png cannot be read"): ClassFolders(tmp_path)["A/cut"]
    with pytest.raises(InputError, match="bands.tif"): ClassFolders(tmp_path, on_error="raise")
    assert "A/size" in ClassFolders(tmp_path, img_size=32).ids


def test_nothing_there(tmp_path):
    with pytest.raises(MissingFileError, match="no image in"): ClassFolders(tmp_path)
    with pytest.raises(MissingFileError, match="is not there"): ClassFolders(tmp_path/"none")
    (tmp_path/"A").mkdir()
    (tmp_path/"A"/"a.png").write_bytes(b"")
    with pytest.raises(InputError, match="no images that can be used; found 0 of 1, since .*a.png"): ClassFolders(tmp_path)
    with pytest.raises(InputError, match="has no images; check the folders"):
        ClassFolders(tmp_path, classes=["B"])
    with pytest.raises(UnknownNameError, match="did you mean sensor"):
        DATASETS.create("class_folders", root=".", sensr=1)


def test_declared_scaling(tmp_path):
    write_tif(tmp_path/"A"/"a.tif", optical(), RGBN)
    with rasterio.open(tmp_path/"A"/"a.tif", "r+") as ds: ds.scales = (1e-4,)*4
    with pytest.raises(InputError, match="declares that its numbers are scaled"):
        ClassFolders(tmp_path, "s2_rgbn", on_error="raise")
    assert len(ClassFolders(tmp_path, "s2_rgbn", scale=1)) == 1


# a folder a sensor

def test_paired_folders(tmp_path):
    made = {}
    for i in range(3):
        s1 = write_tif(tmp_path/"s1"/f"p{i}.tif", radar(), ["VV", "VH"], 690000 + 200*i)
        s2 = write_tif(tmp_path/"s2"/f"p{i}.tif", optical(), RGBN, 690000 + 200*i)
        made[f"p{i}"] = dict(s1=s1[[1, 0]], s2=s2[[2, 1, 0, 3]])
    (tmp_path/"s1"/"p0.tif").unlink()
    archive = PairedFolders(tmp_path, sensors=PAIR)
    assert archive.ids == ["p0", "p1", "p2"] and archive[0].keys() == {"id", "s2"}
    for i in (1, 2):
        for m in PAIR: assert np.array_equal(archive[i][m], made[f"p{i}"][m])
    assert PairedFolders(tmp_path, sensors=PAIR, only_complete=True).ids == ["p1", "p2"]
    boxes = [wkb.loads(o).bounds for o in archive.table.geometry]
    assert boxes[0][0] < boxes[1][0] < boxes[2][0]
    assert torch.equal(pickle.loads(pickle.dumps(archive))[1]["s1"], archive[1]["s1"])


def test_options_a_sensor(tmp_path):
    s1, s2 = radar(), optical()
    write_tif(tmp_path/"radar"/"a.tif", 10**(s1/10))
    write_tif(tmp_path/"optical"/"a.tif", s2 + 1000)
    folders, bands = dict(s1="radar", s2=tmp_path/"optical"), dict(s1=["VH", "VV"], s2=RGBN)
    archive = PairedFolders(tmp_path, sensors=PAIR, folders=folders, bands=bands, img_size=40,
                            scale=dict(s1="linear"), offset=dict(s2=-1000))
    sample = archive["a"]
    for m, x in dict(s1=s1, s2=s2[[2, 1, 0, 3]]).items():
        wanted = torch.nn.functional.interpolate(torch.from_numpy(x.astype("float32"))[None], size=40, mode="bicubic", antialias=True)[0]
        assert torch.allclose(sample[m], wanted, rtol=1e-4, atol=1e-2)


def test_pairs_that_do_not_meet(tmp_path):
    write_tif(tmp_path/"s1"/"a.tif", radar(), ["VV", "VH"])
    write_tif(tmp_path/"s2"/"a.tif", optical(), RGBN, left=690200)
    write_tif(tmp_path/"s1"/"b.tif", radar(), ["VV", "VH"])
    with pytest.raises(InputError, match="do not show the same place; found .*s1/a.tif and .*s2/a.tif"):
        PairedFolders(tmp_path, sensors=PAIR, on_error="raise")
    with pytest.raises(InputError, match="sensor s2 has no images that can be used"): PairedFolders(tmp_path, sensors=PAIR)
    write_tif(tmp_path/"s2"/"b.tif", optical(), RGBN)
    archive = PairedFolders(tmp_path, sensors=PAIR)
    assert archive.ids == ["b"] and archive.skipped.source.tolist() == ["a"]


def test_two_files_of_one_name(tmp_path):
    write_tif(tmp_path/"s2"/"a.tif", optical(), RGBN)
    write_tif(tmp_path/"s2"/"deeper"/"a.tif", optical(), RGBN)
    for on_error in "raise", "skip":
        with pytest.raises(InputError, match="have the name a; found .*s2/a.tif and .*s2/deeper/a.tif"):
            PairedFolders(tmp_path, dict(s2="s2_rgbn"), on_error=on_error)


def test_missing_folder(tmp_path):
    write_tif(tmp_path/"s1"/"a.tif", radar(), ["VV", "VH"])
    with pytest.raises(MissingFileError, match="s2 is not there"): PairedFolders(tmp_path, sensors=PAIR)


# real data

@pytest.mark.data
def test_real_eurosat(shared):
    root = shared/"data"/"eurosat_rgb"
    archive = ClassFolders(root)
    assert len(archive) == 8000 and len(archive.skipped) == 0 and len(archive.vocab) == 10
    assert archive.labels.sum(0).tolist() == [800]*10 and (archive.labels.sum(1) == 1).all()
    for i in range(0, 8000, 160):
        path, x = archive.table.source[i], archive[i]["rgb"]
        with Image.open(path) as im: want = np.asarray(im).transpose(2, 0, 1)
        assert np.array_equal(x, want) and x.shape == (3, 64, 64)
        assert archive.vocab.decode(archive[i]["labels"])[0] in path


@pytest.mark.data
def test_real_eurosat_all_bands(shared):
    home = shared/"data"/"rico_hdl_fixtures"/"tiffs"
    archive = ClassFolders(home/"EuroSAT_MS", sensor="s2_13", bands="eurosat", modality="s2")
    assert len(archive) == 3 and archive[0]["s2"].shape == (13, 64, 64)
    assert archive.table.geometry.notna().all()
    rgb = ClassFolders(home/"EuroSAT_RGB")
    assert rgb.ids == archive.ids
    for i in range(3):   # the colour image is stretched from the same bands: they must go together
        bands = archive[i]["s2"][[archive.sensors["s2"].index(o) for o in ("B04", "B03", "B02")]]
        for a, b in zip(bands, rgb[i]["rgb"], strict=True):
            if b.std() > 2: assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.6, archive.ids[i]
