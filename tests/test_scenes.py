"""Raster files by band name, and scenes cut into patches: small files with one defect each, and real ones."""
import os
import pickle

import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from pyproj import Geod
from rasterio.transform import from_origin
from rasterio.warp import transform_geom
from rasterio.windows import Window
from shapely import wkb
from shapely.geometry import shape
from torch.utils.data import DataLoader

from rsir_nb.core import DATASETS, CorruptError, InputError, MissingFileError, UnknownNameError
from rsir_nb.data.files import date_in_name, find_files
from rsir_nb.data.rasters import fill_nodata, footprints, nodata_mask, raster_info, read_raster
from rsir_nb.data.bands import RasterInfo, to_unit
from rsir_nb.data.scenes import SceneArchive, read_patch_file, window_grid
from rsir_nb.geo import wkb_polygon, wkb_quads
from rsir_nb.sensors import get_sensor

TEN = get_sensor("s2").bands
RGBN = "B02 B03 B04 B08".split()
rng = np.random.default_rng(0)


def optical(n=4, height=100, width=130): return rng.integers(100, 5000, (n, height, width), dtype="uint16")


def radar(height=100, width=130): return rng.normal(-14, 3, (2, height, width)).astype("float32")


def write_tif(path, x, bands=None, **profile):
    profile = dict(crs="EPSG:32632", transform=from_origin(690000, 5340000, 10, 10)) | profile
    shape = dict(count=len(x), height=x.shape[1], width=x.shape[2], dtype=x.dtype)
    with rasterio.open(path, "w", driver="GTiff", **shape, **profile) as ds:
        ds.write(x)
        if bands: ds.descriptions = tuple(bands)
    return path


# the window grid

@settings(deadline=None, max_examples=200)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(1, 50))
def test_window_grids(height, width, size, stride):
    seen = {}
    for rule in ("drop", "shift", "pad"):
        grid = window_grid(height, width, size, stride, rule)
        assert len(np.unique(grid, axis=0)) == len(grid)
        hits = np.zeros((height, width), int)
        for row, col in grid:
            assert 0 <= row < height and 0 <= col < width
            hits[row:row+size, col:col+size] += 1
        if rule != "pad": assert len(grid) == 0 or (grid + size <= (height, width)).all()
        fits = size <= min(height, width)
        if stride <= size and (rule == "pad" or rule == "shift" and fits): assert hits.all()
        seen[rule] = set(map(tuple, grid))
    assert seen["drop"] <= seen["shift"] and seen["drop"] <= seen["pad"]


def test_bad_grids():
    with pytest.raises(InputError, match="size 0"): window_grid(9, 9, 0)
    with pytest.raises(InputError, match="stride 0"): window_grid(9, 9, 3, 0)
    with pytest.raises(UnknownNameError, match="did you mean drop"): window_grid(9, 9, 3, partial="dropp")


# patches

def test_patches_are_the_windows_of_the_scene(tmp_path):
    x = optical()
    path = write_tif(tmp_path/"a_2023-05-04.tif", x, RGBN)
    archive = SceneArchive(tmp_path, "s2_rgbn", img_size=40, stride=20)
    assert len(archive) == 4 * 5 and set(archive.table.date) == {pd.Timestamp("2023-05-04")}
    for i, row in enumerate(archive.table.itertuples()):
        want = x[[2, 1, 0, 3], row.row:row.row+40, row.col:row.col+40]
        assert np.array_equal(archive[i]["s2"], want) and archive[i]["s2"].dtype == torch.float32
    with rasterio.open(path) as ds:
        bounds = ds.window_bounds(Window(archive.table.col[7], archive.table.row[7], 40, 40))
    assert wkb.loads(archive.table.native_geometry[7]).bounds == pytest.approx(bounds)
    assert set(archive.table.crs) == {"EPSG:32632"}


def test_footprints_equal_gdal_and_have_the_right_size(tmp_path):
    write_tif(tmp_path/"a.tif", optical(), RGBN)
    table = SceneArchive(tmp_path, img_size=40).table
    for row in table.itertuples():
        native = wkb.loads(row.native_geometry)
        want = shape(transform_geom(row.crs, "EPSG:4326", native.__geo_interface__))
        got = wkb.loads(row.geometry)
        assert got.exterior.is_ccw and got.symmetric_difference(want).area < 1e-9 * want.area
        assert Geod(ellps="WGS84").geometry_area_perimeter(got)[0] == pytest.approx(400**2, rel=2e-3)


def test_rotated_scene(tmp_path):
    move, turn, size = rasterio.Affine.translation, rasterio.Affine.rotation, rasterio.Affine.scale
    turned = move(690000, 5340000) @ turn(30) @ size(10, -10)
    write_tif(tmp_path/"a.tif", optical(), RGBN, transform=turned)
    table = SceneArchive(tmp_path, img_size=40).table
    corner = wkb.loads(table.native_geometry[4]).exterior.coords[:4]
    want = turned @ (float(table.col[4]), float(table.row[4]))
    assert min(np.hypot(*np.subtract(o, want)) for o in corner) < 1e-6


def test_many_quads_equal_single_polygons():
    corners = rng.normal(size=(50, 4, 2)).cumsum(1)
    assert wkb_quads(corners) == [wkb_polygon(o) for o in corners]
    lonlat = footprints(corners*100 + [690000, 5340000], "EPSG:32632")
    assert len(lonlat) == 50 and 11 < wkb.loads(lonlat[0]).centroid.x < 12


def test_partial_windows(tmp_path):
    x = optical(height=50, width=70)
    write_tif(tmp_path/"a.tif", x, RGBN)
    shift, pad = (SceneArchive(tmp_path, "s2_rgbn", img_size=40, partial=o) for o in ("shift", "pad"))
    assert len(SceneArchive(tmp_path, img_size=40)) == 1 and len(shift) == len(pad) == 4
    assert np.array_equal(shift[3]["s2"], x[[2, 1, 0, 3], 10:, 30:])
    last = pad[3]["s2"].numpy()
    inside = x[[2, 1, 0, 3], 40:, 40:]
    assert np.array_equal(last[:, :10, :30], inside)
    assert np.allclose(last[:, 10:], inside.mean((1, 2), keepdims=True)) and np.isfinite(last).all()
    assert pad.table.nodata[3] == pytest.approx(1 - 300/1600, abs=1e-4)
    assert wkb.loads(pad.table.native_geometry[3]).area == 100 * 300


def test_patches_without_enough_data_are_left_out(tmp_path):
    x = optical(height=80, width=120)
    x[:, :40, :40] = 0
    x[:, 40:, 80:83] = 0
    x[1, 40:, :40] = 0          # one dark band is no gap
    write_tif(tmp_path/"a.tif", x, RGBN)
    archive = SceneArchive(tmp_path, "s2_rgbn", img_size=40)
    assert archive.ids == ["a_r00000_c00040", "a_r00000_c00080", "a_r00040_c00000", "a_r00040_c00040",
                           "a_r00040_c00080"]
    assert archive.table.nodata.tolist() == [0, 0, 0, 0, 0.075]
    assert np.allclose(archive[-1]["s2"][:, :, :3], x[[2, 1, 0, 3], 40:, 83:].mean((1, 2))[:, None, None])
    assert len(SceneArchive(tmp_path, img_size=40, max_nodata=0)) == 4
    x[3, 50, 50] = 65535
    write_tif(tmp_path/"a.tif", x, RGBN)
    assert len(SceneArchive(tmp_path, img_size=40, nodata=65535, max_nodata=0)) == 3


def test_nan_and_declared_nodata(tmp_path):
    x = radar()
    x[0, :40, :40] = np.nan
    x[1, :40, 40:80] = -9999
    write_tif(tmp_path/"a.tif", x, ["VV", "VH"], nodata=-9999)
    archive = SceneArchive(tmp_path, "s1", img_size=40)
    assert archive.ids[0] == "a_r00000_c00080" and len(archive) == 4
    assert all(archive[i]["s1"].min() > -40 for i in range(len(archive)))


def test_same_names_in_different_folders(tmp_path):
    for o in ("may", "june"):
        (tmp_path/o).mkdir()
        write_tif(tmp_path/o/"scene.tif", optical(), RGBN)
    assert {o[:10] for o in SceneArchive(tmp_path, img_size=100).ids} == {"may_scene_", "june_scene"}


def test_workers_read_the_same(tmp_path):
    write_tif(tmp_path/"a.tif", optical(), RGBN)
    archive = SceneArchive(tmp_path, img_size=40)
    again = pickle.loads(pickle.dumps(archive))
    assert torch.equal(again[3]["s2"], archive[3]["s2"])
    loader = DataLoader(archive, num_workers=2, batch_size=None, multiprocessing_context="fork")
    assert all(torch.equal(a["s2"], archive[i]["s2"]) for i, a in enumerate(loader))


@pytest.mark.slow
def test_spawned_workers_read_the_same(tmp_path):
    write_tif(tmp_path/"a.tif", optical(), RGBN)
    archive = SceneArchive(tmp_path, img_size=40)
    loader = DataLoader(archive, num_workers=1, batch_size=None, multiprocessing_context="spawn")
    assert all(torch.equal(a["s2"], archive[i]["s2"]) for i, a in enumerate(loader))


# bands and units

def test_bands_by_argument(tmp_path):
    x = optical()
    write_tif(tmp_path/"a.tif", x)
    with pytest.raises(InputError, match="name no sensor; found 4 bands without names.*bands="):
        SceneArchive(tmp_path)
    with pytest.raises(InputError, match="found 4 bands without names; wanted B04, B03, B02, B08"):
        SceneArchive(tmp_path, "s2_rgbn")
    archive = SceneArchive(tmp_path, "s2_rgbn", bands=["B08", "B02", "B03", "B04"], img_size=40)
    assert np.array_equal(archive[0]["s2"], x[[3, 2, 1, 0], :40, :40])
    assert SceneArchive(tmp_path, "s2_rgbn", bands="vessel", img_size=40)[0]["s2"].shape == (4, 40, 40)
    with pytest.raises(InputError, match="4 bands in the file; wanted 3"):
        SceneArchive(tmp_path, bands=["B02", "B03", "B04"])


@pytest.mark.parametrize("scale,offset,make", [
    (None, -1000, lambda x: x + 1000), ("fraction", None, lambda x: x/np.float32(10000)),
    (0.5, 3, lambda x: (x.astype("float32") - 3)*2)])
def test_optical_units(tmp_path, scale, offset, make):
    x = optical()
    write_tif(tmp_path/"a.tif", make(x), RGBN)
    sample = SceneArchive(tmp_path, img_size=40, scale=scale, offset=offset)[0]["s2"]
    assert np.allclose(sample, x[:, :40, :40], atol=0.01)


@pytest.mark.parametrize("scale,power", [("linear", 10), ("amplitude", 20)])
def test_radar_units(tmp_path, scale, power):
    x = radar()
    write_tif(tmp_path/"a.tif", 10**(x/power), ["VV", "VH"])
    with pytest.raises(InputError, match="a.*linear power or amplitude; wanted decibels"):
        SceneArchive(tmp_path, "s1", img_size=40)
    sample = SceneArchive(tmp_path, "s1", img_size=40, scale=scale)[0]["s1"]
    assert np.allclose(sample, x[[1, 0], :40, :40], atol=1e-3)


def test_declared_scaling_must_be_confirmed(tmp_path):
    x = optical()
    path = write_tif(tmp_path/"a.tif", x, RGBN)
    with rasterio.open(path, "r+") as ds: ds.scales, ds.offsets = (1e-4,)*4, (-0.1,)*4
    with pytest.raises(InputError, match="a.tif declares.*found scale 0.0001, offset -0.1"):
        SceneArchive(tmp_path)
    want = x[:, :40, :40].astype("float32") - 1000
    assert np.array_equal(SceneArchive(tmp_path, img_size=40, offset=-1000)[0]["s2"], want)


# bad files

BAD = {
    "missing_bands": (lambda p: write_tif(p, optical(2), ["B02", "B04"]), "found B02, B04; wanted B03, B08"),
    "too_small": (lambda p: write_tif(p, optical(height=30), RGBN), "gives no patch; found 30x130 pixels"),
    "empty": (lambda p: write_tif(p, optical()*0, RGBN), "found 100x130 pixels, 6 windows, too little data"),
    "no_crs": (lambda p: write_tif(p, optical(), RGBN, crs=None), "has no coordinate system.*pass crs="),
    "fraction": (lambda p: write_tif(p, optical()/np.float32(1e4), RGBN), "reflectance as a fraction"),
    "no_image": (lambda p: p.write_text("hello"), "cannot be read as an image; found 5 bytes, not recognized"),
    "zero_bytes": (lambda p: p.write_bytes(b""), "cannot be read"),
    "cut": (lambda p: p.write_bytes(write_tif(p, optical(), RGBN).read_bytes()[:9_000]), "cannot be read"),
    "all_nan": (lambda p: write_tif(p, np.full((4, 100, 130), np.nan, "float32"), RGBN), "too little data"),
}


@pytest.mark.parametrize("defect", BAD)
def test_bad_scene_is_one_line_and_can_be_skipped(tmp_path, defect):
    make, message = BAD[defect]
    make(tmp_path/"bad.tif")
    write_tif(tmp_path/"good.tif", optical(), RGBN)
    with pytest.raises((InputError, CorruptError), match=message) as e:
        SceneArchive(tmp_path, "s2_rgbn", img_size=40)
    assert "bad" in str(e.value) and "\n" not in str(e.value)
    archive = SceneArchive(tmp_path, "s2_rgbn", img_size=40, on_error="skip")
    assert len(archive) == 6 and archive.skipped.source.tolist() == [str(tmp_path/"bad.tif")]
    assert archive.skipped.reason[0] == str(e.value)


def test_no_scene_at_all(tmp_path):
    with pytest.raises(MissingFileError, match="no image in"): SceneArchive(tmp_path)
    with pytest.raises(MissingFileError, match="not there"): SceneArchive(tmp_path/"none.tif")
    (tmp_path/"a.tif").write_text("hello")
    with pytest.raises(InputError, match="no scenes that can be used.*a.tif"):
        SceneArchive(tmp_path, on_error="skip")
    with pytest.raises(UnknownNameError, match="did you mean skip"): SceneArchive(tmp_path, on_error="skipp")


def test_no_crs(tmp_path):
    write_tif(tmp_path/"a.tif", optical(), RGBN, crs=None)
    assert SceneArchive(tmp_path, img_size=40, crs="EPSG:32632").table.geometry.notna().all()
    assert SceneArchive(tmp_path, img_size=40, crs="unknown").table.geometry.isna().all()


def test_scene_that_breaks_after_the_archive_was_made(tmp_path):
    path = write_tif(tmp_path/"a.tif", optical(), RGBN)
    archive = SceneArchive(tmp_path, img_size=40)
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole)//2])
    with pytest.raises(CorruptError, match="a.tif"): archive[5]
    path.unlink()
    with pytest.raises(MissingFileError, match="a.tif is not there"): archive[5]


# query files

def test_read_patch_file(tmp_path):
    x = optical(height=80, width=80)
    path = write_tif(tmp_path/"a.tif", x, RGBN)
    assert np.array_equal(read_patch_file(path, "s2_rgbn"), x[[2, 1, 0, 3]])
    assert read_patch_file(path, "s2_rgbn", size=120).shape == (4, 120, 120)
    assert np.array_equal(read_patch_file(path, "s2_rgbn", 40, fit="centre"), x[[2, 1, 0, 3], 20:60, 20:60])
    less = x[[2, 1, 0, 3]].astype("float32") - 1000
    assert np.array_equal(read_patch_file(path, "s2_rgbn", offset=-1000), less)
    with pytest.raises(InputError, match="wanted 90x90 pixels"):
        read_patch_file(path, "s2_rgbn", 90, fit="centre")
    with pytest.raises(UnknownNameError, match="centre"): read_patch_file(path, "s2_rgbn", 90, fit="center")
    with pytest.raises(InputError, match="found B02, B03, B04, B08; wanted B05"): read_patch_file(path, "s2")
    with pytest.raises(MissingFileError): read_patch_file(tmp_path/"none.tif", "s2")
    wide = write_tif(tmp_path/"wide.tif", optical(), RGBN)
    with pytest.raises(InputError, match="100x130 pixels; wanted 80x80 .*'centre' takes its middle"):
        read_patch_file(wide, "s2_rgbn", 80)


def test_a_file_of_another_scale_is_refused_unless_told_how_to_fit(tmp_path):
    path = write_tif(tmp_path/"a.tif", optical(height=240, width=240), RGBN)     # pixels of 10 m: 2400 m a side
    known = {"size": 120, "fit": None, "ground": (1200., 1200.)}
    with pytest.raises(InputError, match="found 240x240 pixels; wanted 120x120"):
        read_patch_file(path, "s2_rgbn", **known)
    assert np.array_equal(read_patch_file(path, "s2_rgbn", **{**known, "fit": "centre"}),
                          read_patch_file(path, "s2_rgbn")[:, 60:180, 60:180])
    finer = read_patch_file(path, "s2_rgbn", size=120, fit=None, ground=(2300., 2400.))   # the same ground in finer pixels
    assert np.array_equal(finer, read_patch_file(path, "s2_rgbn", size=120))
    dot = write_tif(tmp_path/"dot.tif", optical(height=1, width=1), RGBN)
    with pytest.raises(InputError, match="found 1x1 pixels"): read_patch_file(dot, "s2_rgbn", **known)


def test_eight_bits_are_no_reflectance(tmp_path):
    path = write_tif(tmp_path/"a.tif", (optical(height=80, width=80) // 40).clip(0, 255).astype("uint8"), RGBN)
    with pytest.raises(InputError, match="8-bit values"): read_patch_file(path, "s2_rgbn")
    with pytest.raises(InputError, match="8-bit values"): SceneArchive(path, "s2_rgbn", img_size=40)
    assert read_patch_file(path, "s2_rgbn", scale=40).max() > 255


def test_read_patch_file_with_gaps(tmp_path):
    x = radar(60, 60)
    x[:, :10] = np.nan
    path = write_tif(tmp_path/"a.tif", x, ["VV", "VH"])
    got = read_patch_file(path, "s1").numpy()
    assert np.isfinite(got).all() and np.allclose(got[:, :10], x[[1, 0], 10:].mean((1, 2))[:, None, None])
    with pytest.raises(InputError, match="nearly empty; found no data in 17% of its pixels"):
        read_patch_file(path, "s1", max_nodata=0.1)


def test_read_patch_folder_and_picture(tmp_path):
    for i, band in enumerate(TEN):
        side = 120 if i % 2 else 60
        write_tif(tmp_path/f"patch_1_{band}.tif", optical(1, side, side), transform=from_origin(690000, 5340000, 1200/side, 1200/side))
    assert read_patch_file(tmp_path, "s2").shape == (10, 120, 120)
    with pytest.raises(InputError, match="has not all the bands of s1.*wanted VH, VV"):
        read_patch_file(tmp_path, "s1")
    picture = rng.integers(0, 255, (32, 32, 3), dtype="uint8")
    picture[:4] = 0
    Image.fromarray(picture).save(tmp_path/"a.png")
    assert np.array_equal(read_patch_file(tmp_path/"a.png", "rgb"), picture.transpose(2, 0, 1))


# raster files

def test_pictures_equal_pillow_and_cut_ones_are_found(tmp_path):
    x = rng.integers(0, 255, (64, 64, 3), dtype="uint8")
    for name in ("a.jpg", "a.png"):
        Image.fromarray(x).save(tmp_path/name)
        want = np.asarray(Image.open(tmp_path/name)).transpose(2, 0, 1)
        assert np.array_equal(read_raster(tmp_path/name), want)
        assert np.array_equal(read_raster(tmp_path/name, [2], (3, 4, 5, 6)), want[2:3, 3:8, 4:10])
        whole = (tmp_path/name).read_bytes()
        for part in (10, len(whole)//2, len(whole) - 30):
            (tmp_path/f"cut_{name}").write_bytes(whole[:part])
            with pytest.raises(CorruptError, match=f"cut_{name} cannot be read"):
                read_raster(tmp_path/f"cut_{name}")


def test_grey_and_transparent_pictures(tmp_path):
    Image.fromarray(np.full((4, 4), 7, "uint8")).save(tmp_path/"grey.png")
    Image.fromarray(np.full((4, 4, 4), 9, "uint8")).save(tmp_path/"alpha.png")
    assert (read_raster(tmp_path/"grey.png") == 7).all() and (read_raster(tmp_path/"alpha.png") == 9).all()
    assert raster_info(tmp_path/"grey.png").bands == (None,), "one band, which no colour names"
    assert raster_info(tmp_path/"alpha.png").bands[:3] == ("R", "G", "B")


def test_rasters_leave_no_file_open(tmp_path):
    path = write_tif(tmp_path/"a.tif", optical(), RGBN)
    read_raster(path, [0], (0, 0, 10, 10))
    assert not [o for o in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{o}") == str(path)]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31))
def test_gaps_are_filled_with_means(seed):
    gen = np.random.default_rng(seed)
    x = gen.normal(5, 1, (3, 6, 7)).astype("float32")
    mask = gen.random((6, 7)) < gen.random()
    y = fill_nodata(np.where(mask, np.float32(np.nan), x), mask)
    if mask.all(): return
    assert np.array_equal(y[:, ~mask], x[:, ~mask])
    assert np.allclose(y[:, mask], x[:, ~mask].mean(1)[:, None], atol=1e-5)
    assert np.array_equal(nodata_mask(np.where(mask, np.nan, x)), mask)


def test_units_and_dates():
    x = np.array([0.0, 1e-3, 1.0], "float32")
    assert np.isnan(to_unit(x, "linear")[0]) and to_unit(x, "linear")[1:].tolist() == pytest.approx([-30, 0])
    assert to_unit(np.array([65535], "uint16"), offset=-1000)[0] == 64535
    days = {"S2A_MSIL2A_20170613T101031_87_48": "2017-06-13", "x_2023-07-10": "2023-07-10",
            "a20240229b": "2024-02-29"}
    for name, day in days.items():
        assert date_in_name(name) == pd.Timestamp(day)
    for name in ("scene", "12345678", "x_20231301", "S2_R022_T33UUP_00010002"):
        assert date_in_name(name) is pd.NaT


def test_corners_of_a_window():
    info = RasterInfo("a", 10, 20, ("B02",), "uint8", None, (2., 0., 100., 0., -3., 50.), None)
    assert info.corners().tolist() == [[100, 50], [100, 20], [140, 20], [140, 50]]
    assert info.corners(1, 2, 3, 4).tolist() == [[104, 47], [104, 38], [112, 38], [112, 47]]


def test_find_files(tmp_path):
    (tmp_path/"b").mkdir()
    for o in ("a.tif", "b/c.TIF", "b/.hidden.tif", "d.txt"): (tmp_path/o).write_bytes(b"")
    assert [o.name for o in find_files(tmp_path)] == ["a.tif", "c.TIF"]
    assert len(find_files([tmp_path, tmp_path/"a.tif"])) == 2


def test_registered_and_checked():
    with pytest.raises(UnknownNameError, match="did you mean stride"):
        DATASETS.create("scenes", paths=".", strid=3)


# real data

@pytest.mark.data
def test_four_real_scenes(shared):
    archive = SceneArchive(shared/"data"/"scenes", stride=120)
    assert len(archive) == 472 and archive.table.place.nunique() == 4 and len(archive.skipped) == 0
    assert archive.sensors["s2"].bands == ("B02", "B03", "B04", "B08", "B11")
    assert set(archive.table.crs) == {"EPSG:3857"}
    cities = dict(marseille=(5.3, 43.3), klang=(101.35, 3.0), valencia=(-0.3, 39.45), genoa=(8.85, 44.4))
    for name, (lon, lat) in cities.items():
        part = archive.table[archive.table.place.str.contains(name)]
        x, y = np.array([wkb.loads(o).centroid.coords[0] for o in part.geometry]).mean(0)
        assert abs(x - lon) < 0.2 and abs(y - lat) < 0.2
    for i in range(0, len(archive), 59):
        row = archive.table.iloc[i]
        with rasterio.open(row.source) as ds: want = ds.read(window=Window(row.col, row.row, 120, 120))
        assert np.array_equal(archive[i]["s2"], want)
    assert len(SceneArchive(shared/"data"/"scenes", sensor="s2_rgbn", partial="shift")) == 566


@pytest.mark.data
def test_real_files_as_queries(shared):
    data = shared/"data"
    scene = next(iter(sorted((data/"scenes").glob("*.tif"))))
    assert read_patch_file(scene, "s2_rgbn", 120, fit="centre").shape == (4, 120, 120)
    vessel = next(iter(sorted((data/"vessels"/"tif").glob("genoa*.tif"))))
    assert read_patch_file(vessel, "s2_rgbn", 120).shape == (4, 120, 120)
    patch = data/"bigearthnet_v1_tiff"/"BigEarthNet-v1.0"/"S2A_MSIL2A_20170613T101031_87_48"
    assert read_patch_file(patch, "s2", 120).shape == (10, 120, 120)
    home = data/"bigearthnet_v1_tiff"/"BigEarthNet-S1-v1.0"
    assert read_patch_file(home/"S1A_IW_GRDH_1SDV_20170613T165043_33UUP_87_48", "s1").max() < 20
    ssl4eo = sorted((data/"rico_hdl_fixtures"/"tiffs"/"SSL4EO-S12"/"s2a").rglob("B2.tif"))[0].parent
    assert read_patch_file(ssl4eo, "s2", 120).shape == (10, 120, 120)
