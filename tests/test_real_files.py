"""Files as their providers and users have them: small inputs made after public problem reports, each with its right value."""
import json
import logging
import os
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
import shapely
from PIL import Image
from pyproj import Transformer
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.transform import Affine, from_origin

from rsir_nb.core import InputError, MissingFileError, RsirError, UnknownNameError
from rsir_nb.config import load_config
from rsir_nb.data.bands import band_name
from rsir_nb.data.folders import ClassFolders
from rsir_nb.data.look import look_at
from rsir_nb.data.rasters import footprints, raster_info
from rsir_nb.data.scenes import SceneArchive, read_patch_file
from rsir_nb.geo import read_geoparquet, wkb_on_earth, wkb_to_geojson, write_geoparquet
from rsir_nb.options import band_lines
from rsir_nb.sensors import BANDS, SENSORS, Sensor

FOUR = ("B02", "B03", "B04", "B08")
COLOURS = [ColorInterp.red, ColorInterp.green, ColorInterp.blue]
SAMPLES = Path(__file__).parents[1].parent / "shared/data/pds_samples"
real = pytest.mark.skipif(not SAMPLES.is_dir(), reason="the real samples are not here")
rng = np.random.default_rng(17)


def land(n=4, h=240, w=240, lo=300, hi=3500): return rng.integers(lo, hi, (n, h, w)).astype("uint16")


def write(path, x, bands=None, colours=None, scales=None, offsets=None, tags=None, **profile):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    place = dict(crs="EPSG:32632", transform=from_origin(500000, 5000000, 10, 10))
    profile = dict(driver="GTiff", count=len(x), height=x.shape[1], width=x.shape[2], dtype=x.dtype) | place | profile
    with rasterio.open(path, "w", **profile) as f:
        f.write(x)
        if bands: f.descriptions = bands
        if colours: f.colorinterp = colours
        if scales: f.scales, f.offsets = scales, offsets
        if tags: f.update_tags(**tags)
    return path


# which pixels are data

COLLAR = np.add.outer(np.arange(600), np.arange(600)) < 420


def windows_with_data(): # of 25 windows, those with at most a tenth of missing pixels
    return sum(COLLAR[r:r+120, c:c+120].mean() <= .1 for r in range(0, 600, 120) for c in range(0, 600, 120))


@pytest.mark.parametrize("white", [255, 0, 77])
@pytest.mark.parametrize("how", ["alpha", "mask inside", "mask beside", "nodata"])
def test_masks_of_every_kind_leave_out_the_collar(tmp_path, how, white):
    x = rng.integers(40, 220, (3, 600, 600)).astype("uint8")
    x[:, COLLAR] = white
    seen = np.where(COLLAR, 0, 255).astype("uint8")
    path = tmp_path/"dop20_mask.tif"
    if how == "alpha": write(path, np.concatenate([x, seen[None]]), colours=[*COLOURS, ColorInterp.alpha])
    elif how == "nodata": write(path, x, colours=COLOURS, nodata=white)
    else:
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=how == "mask inside"):
            write(path, x, colours=COLOURS)
            with rasterio.open(path, "r+") as f: f.write_mask(seen)
    assert windows_with_data() == 15 == len(SceneArchive(tmp_path))
    query = read_patch_file(path, "rgb").numpy()
    assert np.allclose(query[:, COLLAR], x[:, ~COLLAR].mean(1)[:, None], atol=.05), "a query file obeys the mask too"


def test_a_mask_beside_an_image_counts_in_class_folders(tmp_path):
    x = rng.integers(40, 220, (3, 32, 32)).astype("uint8")
    x[:, :, :8] = 255
    path = write(tmp_path/"a/b.tif", x, colours=COLOURS)
    with rasterio.open(path, "r+") as f: f.write_mask(np.where(np.arange(32) < 8, 0, 255)*np.ones((32, 1), "uint8"))
    got = ClassFolders(tmp_path)[0]["rgb"].numpy()
    assert np.allclose(got[:, :, :8], x[:, :, 8:].mean((1, 2))[:, None, None], atol=1e-3)


def test_black_is_data_where_a_mask_says_so(tmp_path):
    x = rng.integers(40, 220, (4, 240, 240)).astype("uint8")
    x[:3, :120], x[3] = 0, 255
    write(tmp_path/"a.tif", x, colours=[*COLOURS, ColorInterp.alpha])
    assert len(SceneArchive(tmp_path, img_size=240)) == 1


def test_one_band_at_a_byte_mark_is_data_and_at_minus_9999_is_not(tmp_path):
    x = rng.integers(40, 220, (3, 120, 120)).astype("uint8")
    x[0] = 255                                            # a red roof, saturated
    write(tmp_path/"a/roof.tif", x, colours=COLOURS, nodata=255)
    assert len(SceneArchive(tmp_path/"a")) == 1
    y = land(h=120, w=120).astype("float32")
    y[0, :60] = -9999
    write(tmp_path/"b/half.tif", y, FOUR, nodata=-9999)
    with pytest.raises(InputError, match="gives no patch"): SceneArchive(tmp_path/"b")


@pytest.mark.parametrize("declared", [float("nan"), None, -32768])
def test_marks_that_the_file_does_not_declare(tmp_path, declared):
    x = land().astype("float32")
    x[:, :30] = -9999
    write(tmp_path/"a.tif", x, FOUR, nodata=declared)
    with pytest.raises(InputError, match="found -9999.*pass nodata=-9999"): SceneArchive(tmp_path)
    assert len(SceneArchive(tmp_path, nodata=-9999, max_nodata=.3)) == 4
    with pytest.raises(InputError, match="a mark of missing pixels.*nodata=-9999"):
        read_patch_file(tmp_path/"a.tif", Sensor("four", FOUR, "DN"))


# which band is which

LANDSAT = "LC08_L2SP_193029_20210713_20210721_02_T1"


def test_band_files_of_landsat_are_one_scene_with_its_own_bands(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    x = land(3, lo=8000, hi=20000)
    for i in range(3): write(tmp_path/LANDSAT/f"{LANDSAT}_SR_B{i+2}.TIF", x[i:i+1], nodata=0)
    write(tmp_path/LANDSAT/f"{LANDSAT}_QA_PIXEL.TIF", x[:1])
    write(tmp_path/LANDSAT/f"{LANDSAT}_ST_B10.TIF", x[:1] + 30000, nodata=0)
    archive = SceneArchive(tmp_path)
    (sensor,) = archive.sensors.values()
    assert sensor.bands == ("SR_B2", "SR_B3", "SR_B4") and len(archive) == 4
    assert archive.table["date"][0] == pd.Timestamp("2021-07-13") and archive.ids[0] == f"{LANDSAT}_r00000_c00000"
    (got,) = (o for k, o in archive[0].items() if k != "id")
    assert np.allclose(got, x[:, :120, :120]*.275 - 2000, atol=.01)
    assert "quality flags" in archive.skipped["reason"][0] and "scale 0.275" in caplog.text and "ST_B10" in caplog.text
    with pytest.raises(InputError, match="files of one band each.*leave bands out"): SceneArchive(tmp_path, bands=["B04"])


def test_landsat_numbers_in_one_file(tmp_path):
    names = ("SR_B2", "SR_B3", "SR_B4", "SR_B5", "SR_B6", "SR_B7", "ST_B10")
    x = np.concatenate([land(6, lo=7300, hi=22000), np.full((1, 240, 240), 44000)]).astype("float32")
    write(tmp_path/"export.tif", x, names, nodata=float("nan"))
    archive = SceneArchive(tmp_path)
    (m, sensor), = archive.sensors.items()
    assert m != "s2" and sensor.bands == names[:6] and BANDS["SR_B5"].wavelength == 864.7
    assert np.allclose(archive[0][m], x[:6, :120, :120]*.275 - 2000, atol=.1)


@pytest.mark.parametrize("text, path, want", [
    ("SR_B5", "", "SR_B5"), ("B5", "", "B05"), ("B5", "LC09_L2SP_1_SR_B5.TIF", "SR_B5"), ("SR_B4", "LT05_L2SP_x_SR_B4.TIF", "TM_SR_B4"),
    ("B4", "LC08_L1TP_016037_20170813_20170814_01_RT_B4.TIF", "L1_B4"), ("B10", "LC08_L1TP_x_B10.TIF", None),
    ("ST_B10", "", "ST_B10"), ("B05", "HLS.L30.T17MKV.2020.B05.tif", "SR_B5"), ("B05", "HLS.S30.T17MKV.2020.B05.tif", "B05"),
    ("Red", "", "red"), ("near infrared", "", "nir"), ("rededge", "", "red_edge"), ("Band 4: NIR", "", "nir"), ("redundant", "", None),
])
def test_bands_by_satellite(text, path, want): assert band_name(text, path) == want


def test_every_satellite_sensor_is_listed():
    lines = band_lines()
    assert all(o in lines for o in (*BANDS, *SENSORS)) and "near_infrared" in lines


def test_the_finest_of_several_files_of_a_band_on_one_grid(tmp_path):
    x = land(4, 120, 120, 1300, 5000)
    for band, full in zip(FOUR, x, strict=True):
        for metres in (10, 20, 60):
            k, side = metres//10, 1200//metres
            part = full.reshape(side, k, side, k).mean((1, 3)).astype("uint16")[None]
            if band != "B08" or metres == 10:
                write(tmp_path/f"R{metres}m/T32TMR_20230710T101031_{band}_{metres}m.tif", part,
                      transform=from_origin(500000, 5000000, metres, metres))
    archive = SceneArchive(tmp_path)
    assert np.array_equal(archive[0]["s2"], x) and archive.ids == ["T32TMR_20230710T101031_r00000_c00000"]
    assert sum("a coarser file" in o for o in archive.skipped["reason"]) == 6
    flat = tmp_path/"flat"
    flat.mkdir()
    for p in sorted(tmp_path.glob("R*/*.tif")): (flat/p.name).write_bytes(p.read_bytes())
    assert np.array_equal(read_patch_file(flat, Sensor("x", FOUR, "DN"), 120), x)


def test_a_band_file_of_another_place_is_left_out(tmp_path):
    for i, band in enumerate(FOUR):
        write(tmp_path/f"{band}.tif", land(1), transform=from_origin(500000 + 50000*(i == 3), 5000000, 10, 10))
    archive = SceneArchive(tmp_path)
    assert archive.sensors["s2"].bands == FOUR[:3] and archive.skipped["reason"].tolist() == ["another place"]


def test_tiles_of_several_bands_are_no_band_files(tmp_path):
    for i in (1, 2): write(tmp_path/f"mosaic_B{i}.tif", land(), FOUR)
    assert len(SceneArchive(tmp_path)) == 8


def test_a_folder_and_a_file_of_one_size_are_refused_alike(tmp_path):
    x = land(4, 360, 480)
    for band, full in zip(FOUR, x, strict=True): write(tmp_path/f"bands/LC08_{band}.tif", full[None])
    path = write(tmp_path/"scene.tif", x, FOUR)
    for o in (tmp_path/"bands", path):
        with pytest.raises(InputError, match="has not the size of a patch; found 360x480 pixels; wanted 120x120"):
            read_patch_file(o, Sensor("x", FOUR, "DN"), 120, fit=None)


def test_a_mistyped_band_is_an_error_with_the_nearest_names(tmp_path):
    write(tmp_path/"a.tif", land())
    with pytest.raises(UnknownNameError, match="no band is called 'B4'; did you mean B04"):
        SceneArchive(tmp_path, bands=["B02", "B03", "B4", "B08"])
    assert SceneArchive(tmp_path, bands=["B02", "B03", None, "B08"]).sensors["s2"].bands == ("B02", "B03", "B08")


def test_unnamed_bands_are_not_dropped_without_a_word(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write(tmp_path/"a.tif", land(), ("B02", "B03", "B04", "elevation"))
    SceneArchive(tmp_path)
    assert "bands are left out: 1 without a name" in caplog.text


def test_planet_with_its_mask(tmp_path):
    name = "20230710_101031_ssc4_u0001"
    write(tmp_path/f"{name}_AnalyticMS_SR.tif", land(), ("blue", "green", "red", "nir"), nodata=0)
    write(tmp_path/f"{name}_udm2.tif", rng.integers(0, 2, (8, 240, 240)).astype("uint8"))
    archive = SceneArchive(tmp_path)
    assert archive.sensors == {"planet4": SENSORS["planet4"]} and "a mask" in archive.skipped["reason"][0]
    write(tmp_path/"b.tif", rng.integers(1, 255, (4, 240, 240)).astype("uint8"), ("Red", "Green", "Blue", "NIR"))
    assert raster_info(tmp_path/"b.tif").bands == ("R", "G", "B", "N")


# which numbers

def test_a_scaling_of_any_band_is_seen(tmp_path):
    write(tmp_path/"a.tif", land(), FOUR, scales=(1, 1e-4, 1e-4, 1e-4), offsets=(0, -.1, -.1, -.1))
    with pytest.raises(InputError, match="scale 0.0001, offset -0.1 of B03, B04, B08.*offset=-1000"): SceneArchive(tmp_path)


def test_complex_numbers_are_refused_or_become_decibels(tmp_path):
    z = (rng.normal(0, 1, (1, 120, 120)) + 1j*rng.normal(0, 1, (1, 120, 120))).astype("complex64")
    path = write(tmp_path/"slc_VV.tif", z)
    with pytest.raises(InputError, match="complex numbers.*scale=amplitude"): SceneArchive(path)
    got = SceneArchive(path, scale="amplitude")[0]["s1"].numpy()
    assert np.allclose(got, 20*np.log10(np.abs(z)), atol=1e-3)


def test_16_bit_grey_is_refused_as_such(tmp_path):
    Image.fromarray(rng.integers(0, 65535, (64, 64)).astype("uint16")).save(tmp_path/"a.png")
    with pytest.raises(InputError, match="16-bit"): read_patch_file(tmp_path/"a.png", "rgb")
    got = read_patch_file(tmp_path/"a.png", "rgb", grey=True, scale="16-bit")
    assert 0 <= got.min() and got.max() <= 255


def test_a_palette_is_expanded_and_cannot_pass_as_brightness(tmp_path):
    index = rng.integers(0, 256, (1, 240, 240)).astype("uint8")
    with rasterio.open(tmp_path/"topo.tif", "w", driver="GTiff", height=240, width=240, count=1, dtype="uint8",
                       crs="EPSG:25832", transform=from_origin(5e5, 5e6, 2, 2)) as f:
        f.write(index)
        f.write_colormap(1, {i: (255 - i, i, i//2, 255) for i in range(256)})
    got = SceneArchive(tmp_path)[0]["rgb"]
    assert np.array_equal(got, np.stack([255 - index[0], index[0], index[0]//2])[:, :120, :120])
    with pytest.raises(InputError, match="3 bands in the file"): SceneArchive(tmp_path, bands=["R"])


OLD, NEW = "S2A_MSIL2A_20210710T101031_N0301_R022_T32TMR", "S2A_MSIL2A_20230710T101031_N0509_R022_T32TMR"


@pytest.mark.parametrize("name, tags", [(NEW, None), ("new", dict(PROCESSING_BASELINE="05.09")), ("new", dict(PRODUCT_URI=f"{NEW}.SAFE"))])
def test_the_offset_of_baseline_4_is_taken_off_file_by_file(tmp_path, caplog, name, tags):
    caplog.set_level(logging.INFO)
    x = land()
    write(tmp_path/f"{OLD}.tif", x, FOUR, nodata=0)
    new = write(tmp_path/f"{name}.tif", x + 1000, FOUR, nodata=0, tags=tags)
    archive = SceneArchive(tmp_path)
    assert np.array_equal(archive[0]["s2"], archive[4]["s2"]) and "offset -1000 is applied" in caplog.text
    assert np.array_equal(read_patch_file(new, archive.sensors["s2"]), x), "of a query file as well"
    assert SceneArchive(tmp_path, offset=0)[4]["s2"].min() > 1000, "what is said decides"


def test_an_offset_that_was_taken_off_before_stays_off(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    x = land()
    write(tmp_path/f"{NEW}.tif", x, FOUR, nodata=0)
    assert np.array_equal(SceneArchive(tmp_path)[0]["s2"], x[:, :120, :120]) and "taken off before" in caplog.text


# which place

LOCAL = 'LOCAL_CS["Site grid",UNIT["metre",1,AUTHORITY["EPSG","9001"]],AXIS["Easting",EAST],AXIS["Northing",NORTH]]'


def test_local_systems(tmp_path):
    x = rng.integers(1, 254, (3, 240, 240)).astype("uint8")
    site = write(tmp_path/"a_site.tif", x, colours=COLOURS, crs=LOCAL)
    write(tmp_path/"b_utm.tif", x, colours=COLOURS)
    with pytest.raises(InputError, match="a_site.tif has a local coordinate system, 'Site grid'.*crs='unknown'"): SceneArchive(site)
    assert SceneArchive(site, crs="unknown").table["geometry"].isna().all()
    assert set(SceneArchive(tmp_path, on_error="skip").table["place"]) == {"b_utm"}
    assert read_patch_file(site, "rgb", 240, ground=(2400, 2400)).shape == (3, 240, 240)
    assert ClassFolders(write(tmp_path/"classes/a/x.tif", x, colours=COLOURS, crs=LOCAL).parents[1]).table["geometry"].isna().all()


def test_control_points_give_places(tmp_path):
    at = lambda r, c: (100.6 - c*1e-4 - r*2e-5, -.01 + c*2e-5 - r*9e-5)
    points = [GroundControlPoint(r, c, *at(r, c)) for r in (0, 120, 240) for c in (0, 120, 240)]
    with rasterio.open(tmp_path/"s1.tif", "w", driver="GTiff", height=240, width=240, count=2, dtype="float32", gcps=points,
                       crs="EPSG:4326") as f:
        f.write(rng.normal(-12, 3, (2, 240, 240)).astype("float32"))
        f.descriptions = ("VV", "VH")
    table = SceneArchive(tmp_path).table
    ring = np.array(wkb_to_geojson(table["geometry"][3])["coordinates"][0])
    want = np.array([at(*o) for o in ((120, 120), (240, 120), (240, 240), (120, 240))])
    assert np.abs(np.sort(ring[:4], 0) - np.sort(want, 0)).max() < 1e-6


def test_a_system_without_a_geotransform_is_no_place(tmp_path):
    for crs in ("EPSG:32632", None):
        path = write(tmp_path/f"{crs}.tif", land(), FOUR, crs=crs, transform=Affine.identity())
        with pytest.raises(InputError, match="has no (geotransform|coordinate system)"): SceneArchive(path)
        with pytest.raises(InputError, match="crs=EPSG:4326 does not place"): SceneArchive(path, crs="EPSG:4326")
        assert len(SceneArchive(path, crs="unknown")) == 4


def test_footprints_are_cut_at_the_antimeridian(tmp_path):
    x0, y0 = Transformer.from_crs(4326, 32760, always_xy=True).transform(180, -16.5)
    write(tmp_path/"fiji.tif", land(4, 240, 360), FOUR, crs="EPSG:32760", transform=from_origin(x0 - 1800, y0, 10, 10))
    table = SceneArchive(tmp_path).table
    shapes = shapely.from_wkb(table["geometry"].to_numpy())
    widths = [np.ptp(shapely.bounds(o)[[0, 2]]) for o in shapely.get_parts(shapes)]
    assert max(widths) < .02 and "MultiPolygon" in {o.geom_type for o in shapes}
    meta = pq.read_metadata(write_geoparquet(table, tmp_path/"t.parquet")).metadata
    west, _, east, _ = json.loads(meta[b"geo"])["columns"]["geometry"]["bbox"]
    assert 179.9 < west <= 180 and -180 <= east < -179.9
    assert shapely.from_wkb(wkb_on_earth(np.array([[(350, 1), (350, 0), (351, 0), (351, 1)]]))[0]).bounds == (-10, 0, -9, 1)


def test_outside_of_a_projection_there_is_no_place_and_no_infinity(tmp_path):
    assert footprints(np.full((1, 4, 2), 1e12) + [[[0, 0], [0, 1], [1, 1], [1, 0]]], "EPSG:32632") == [None]
    path = write(tmp_path/"a.tif", land(), FOUR, transform=from_origin(5e12, 5e12, 10, 10))
    with pytest.raises(InputError, match="leaves the domain.*crs='unknown'"): SceneArchive(path)


# what was skipped

def test_what_is_left_out_is_counted_with_the_reason(tmp_path, caplog):
    for i in range(8):
        size = (253, 256) if i >= 6 else (256, 256)
        (tmp_path/"harbor").mkdir(exist_ok=True)
        Image.fromarray(rng.integers(1, 255, (*size, 3)).astype("uint8")).save(tmp_path/f"harbor/{i}.png")
    archive = ClassFolders(tmp_path)
    assert len(archive) == 6 and "6 of 8 images are used, 2 left out" in caplog.text and "img_size=" in caplog.text


def test_only_masks_are_no_archive(tmp_path):
    write(tmp_path/"T32TMR_20230710T101031_SCL_20m.tif", land(1))
    with pytest.raises(InputError, match="no imagery"): SceneArchive(tmp_path)
    with pytest.raises(MissingFileError, match="found 1 .nc"):
        (tmp_path/"x").mkdir()
        (tmp_path/"x/a.nc").touch()
        SceneArchive(tmp_path/"x")


def test_look_says_what_is_understood(tmp_path):
    for i in range(3): write(tmp_path/f"a_{i}.tif", land(), FOUR, nodata=0)
    write(tmp_path/"b.tif", land(1))
    (tmp_path/"broken.tif").write_text("x")
    (tmp_path/"c.hdf").touch()
    found = look_at(tmp_path)
    assert found.table["files"].tolist() == ["3", "1"] and "from descriptions" in found.table["bands"][0]
    assert "bands=[...]" in found.table["bands"][1] and "EPSG:32632" in found.table["place"][0] and "nodata 0" in found.table["missing"][0]
    assert len(found.left) == 2 and "cannot be read" in found.to_text() and ".hdf" in found.to_text() and "|" in found._repr_markdown_()


# which path

@pytest.mark.parametrize("override, key, want", [
    ("out=~/run", "out", "{home}/run"), ("out=run #2", "out", "run #2"), ("out=2019", "out", "2019"), ("out=a: b", "out", "a: b"),
    ("data.paths=~/scenes", "paths", "{home}/scenes"), ("data.paths=run #2", "paths", "{cwd}/run #2"), ("data.paths=2019", "paths", "{cwd}/2019"),
    ("data.paths=a b/in[1].tif", "paths", "{cwd}/a b/in[1].tif"), ("data.paths=no", "paths", "{cwd}/no"),
])
def test_paths_are_taken_as_they_were_typed(tmp_path, monkeypatch, override, key, want):
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg = load_config("baseline", ["data=scenes", *([] if "paths" in override else ["data.paths=in"]), override])
    assert (cfg.out if key == "out" else cfg.data.paths) == want.format(home=tmp_path, cwd=os.getcwd())


def test_brackets_of_a_folder_that_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path/"[new]/a.tif", land(), FOUR)
    assert load_config("baseline", ["data=scenes", "data.paths=[new]"]).data.paths == str(tmp_path/"[new]")
    assert load_config("baseline", ["data=scenes", "data.paths=[a, b]"]).data.paths == [str(tmp_path/o) for o in "ab"]
    assert len(SceneArchive("[new]")) == 4


def test_same_names_links_and_accents(tmp_path):
    for day in (20, 25): write(tmp_path/f"in/2019/11/{day}/0/scene.tif", land(), FOUR)
    archive = SceneArchive(tmp_path/"in")
    assert sorted(set(archive.table["place"])) == ["20_0_scene", "25_0_scene"] and len(archive) == 8
    (tmp_path/"linked").mkdir()
    (tmp_path/"linked/more").symlink_to(tmp_path/"in/2019")
    (tmp_path/"in/2019/loop").symlink_to(tmp_path/"in")
    assert len(SceneArchive(tmp_path/"linked")) == 8
    name = unicodedata.normalize("NFD", "Málaga")
    write(tmp_path/f"es/{name}.tif", land(), FOUR)
    spain = SceneArchive(tmp_path/"es")
    assert spain.number("Málaga_r00000_c00000") == 0 == spain.number(f"{name}_r00000_c00000")


def test_tables_of_other_programs(tmp_path):
    t = pa.table(dict(patch_id=["a"], labels=[["Pastures"]]))
    for i, extra in enumerate(({b"org.apache.spark.version": b"3.5.1"}, {b"r": b"A\n3\n263169\n"}, {b"x": b"\xff\xfe"})):
        pq.write_table(t.replace_schema_metadata(extra), tmp_path/f"{i}.parquet")
        assert read_geoparquet(tmp_path/f"{i}.parquet")["patch_id"].tolist() == ["a"]
    t.to_pandas().set_index("patch_id").to_parquet(tmp_path/"p.parquet")
    assert read_geoparquet(tmp_path/"p.parquet")["patch_id"].tolist() == ["a"]


# real samples

@real
@pytest.mark.parametrize("folder, size, bands, n_left", [
    ("landsat-pds", 60, SENSORS["landsat_l1"].bands, 5), ("sentinel-cogs", 120, SENSORS["s2_12"].bands, None),
    ("sentinel-s2-l2a", 60, SENSORS["s2_12"].bands, None)])
def test_real_folders_of_band_files(folder, size, bands, n_left):
    try: archive = SceneArchive(SAMPLES/folder, img_size=size)
    except RsirError as e: pytest.fail(str(e))
    (m, sensor), = archive.sensors.items()
    assert set(sensor.bands) == set(bands) and len(archive) and archive.table["place"].nunique() == 1
    x = archive[len(archive)//2][m].numpy()
    assert np.isfinite(x).all() and -500 < np.median(x) < 9000
    assert n_left is None or len(archive.skipped) == n_left


# numbers, in folders and queries too

def test_class_folders_obey_the_offset_as_scenes_do(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    x = land(h=32, w=32)
    for i in range(3): write(tmp_path/f"a/{NEW}_{i}.tif", x + 1000, FOUR, nodata=0)
    archive = ClassFolders(tmp_path, Sensor("four", FOUR, "DN"))
    assert np.array_equal(archive[1]["four"], x) and "offset -1000 is applied (a guess" in caplog.text
    assert ClassFolders(tmp_path, Sensor("four", FOUR, "DN"), offset=0)[1]["four"].min() > 1000


@pytest.mark.parametrize("name", ["1_3B_AnalyticMS.tif", "1_3B_AnalyticMS_8b_clip.tif", "1_ortho_analytic_4b.tif"])
def test_radiance_of_planet_is_refused(tmp_path, name):
    path = write(tmp_path/name, land(), ("blue", "green", "red", "nir"), nodata=0)
    with pytest.raises(InputError, match="radiance at the satellite.*AnalyticMS_SR"): SceneArchive(path)
    with pytest.raises(InputError, match="radiance"): read_patch_file(path, "planet4")
    assert len(SceneArchive(path, scale=1)) == 4
    path = write(tmp_path/"sr"/name.replace("MS", "MS_SR").replace("analytic_4b", "analytic_4b_sr"), land(),
                 ("blue", "green", "red", "nir"), nodata=0)
    assert len(SceneArchive(path)) == 4


def test_65535_in_all_bands_is_a_mark(tmp_path):
    x = land()
    x[:, :30] = 65535
    path = write(tmp_path/"a.tif", x, FOUR)
    with pytest.raises(InputError, match="found 65535 in 12%.*nodata=65535"): SceneArchive(path)
    with pytest.raises(InputError, match="nodata=65535"): read_patch_file(path, "s2_rgbn")
    assert len(SceneArchive(path, nodata=65535)) == 2
    assert len(SceneArchive(path, nodata=0)) == 4


def test_landsat_in_bytes_is_no_reflectance(tmp_path):
    x = rng.integers(20, 200, (3, 240, 240)).astype("uint8")
    path = write(tmp_path/"LT05_L1TP_193029_x.tif", x, ("B1", "B2", "B3"))
    with pytest.raises(InputError, match="8-bit values"): SceneArchive(path)


def test_white_is_missing_where_255_is_declared(tmp_path):
    x = rng.integers(40, 220, (3, 240, 240)).astype("uint8")
    x[:, :120], x[:, 120:140] = 255, 0
    path = write(tmp_path/"a.tif", x, colours=COLOURS, nodata=255)
    assert set(SceneArchive(path).table["row"]) == {120}, "white is missing, black is not"


def test_a_query_folder_says_what_it_leaves_out(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for band in FOUR: write(tmp_path/f"T32TMR_{band}.tif", land(1, 120, 120))
    write(tmp_path/"T32TMR_SCL.tif", np.ones((1, 120, 120), "uint8"))
    assert read_patch_file(tmp_path, "s2_rgbn").shape == (4, 120, 120)
    assert "T32TMR_SCL.tif: left out, a mask" in caplog.text
