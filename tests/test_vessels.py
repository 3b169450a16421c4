"""Vessel archives: a made-up folder in the layout of the VDD, the real ports in ../shared/data, and all that can be wrong."""
import json
import pickle
import shutil

import numpy as np
import pytest
import rasterio
import torch
from shapely import wkb

from rsir_nb.config import load_config
from rsir_nb.core import DATASETS, CorruptError, InputError, MissingFileError, UnknownNameError
from rsir_nb.data.vessels import (ANNOTATIONS, ZEROS, VesselArchive, place_in_name, read_annotations, read_name_list,
                                  read_split_lists, vessel_boxes, write_vessels)
from rsir_nb.engine.parts import build_archive
from rsir_nb.sensors import norm_stats


@pytest.fixture
def root(tmp_path): return write_vessels(tmp_path/"vdd", n_scenes=2, grid=(2, 3), img_size=32, n_ships=15, seed=3)


def annotations(root): return json.loads((root/ANNOTATIONS).read_text())


def change(root, **entries): (root/ANNOTATIONS).write_text(json.dumps({**annotations(root), **entries}))


def test_table_and_patches(root):
    archive, said = VesselArchive(root), annotations(root)
    zeros = json.loads((root/ZEROS).read_text())["zero_patches"]
    assert archive.ids == sorted(set(said) - set(zeros)) and len(zeros) == 1
    assert archive.table.n_vessels.tolist() == [len(said[o]["annotations"]) for o in archive.ids]
    assert archive.labels[:, 1].tolist() == (archive.table.n_vessels > 0).astype(int).tolist()
    assert list(archive.vocab) == ["no vessel", "vessel"] and 0 < archive.labels[:, 1].sum() < len(archive)
    assert set(archive.table.place) == {"T31TAJ", "T31TBJ"} and archive.table.scene.nunique() == 2
    assert archive.table.date.iloc[0].strftime("%Y%m%d") in archive.ids[0]
    for i, name in enumerate(archive.ids):
        with rasterio.open(root/"tif"/f"{name}.tif") as ds:
            assert np.array_equal(archive[i]["s2"], ds.read().astype("float32"))
            x, y = ds.transform * (16, 16)
        centre = wkb.loads(archive.table.geometry[i]).centroid
        from pyproj import Transformer
        lon, lat = Transformer.from_crs("EPSG:32631", "OGC:CRS84", always_xy=True).transform(x, y)
        assert abs(centre.x - lon) < 1e-5 and abs(centre.y - lat) < 1e-5
    assert archive.skipped.source.tolist() == zeros
    assert torch.equal(pickle.loads(pickle.dumps(archive))[2]["s2"], archive[2]["s2"])


def test_ships_are_where_the_boxes_are(root):
    archive = VesselArchive(root)
    inside, rest = [], []
    for i in np.flatnonzero(archive.table.n_vessels):
        x, mask = archive[int(i)]["s2"].numpy().mean(0), np.zeros((32, 32), bool)
        for ring in archive.boxes(int(i)):
            (x0, y0), (x1, y1) = np.clip(ring.min(0), 0, 32).round().astype(int), np.clip(ring.max(0), 0, 32).round().astype(int)
            mask[y0:y1, x0:x1] = True
        inside.append(x[mask].max())
        rest.append(x[~mask].mean())
    assert min(inside) > max(rest)


def test_the_maker_repeats_itself(tmp_path):
    seeds = dict(a=0, b=0, c=1)
    a, b, c = (write_vessels(tmp_path/o, n_scenes=1, grid=(1, 2), img_size=16, seed=s) for o, s in seeds.items())
    names = sorted(p.name for p in (a/"tif").iterdir())
    same = [(a/"tif"/o).read_bytes() == (b/"tif"/o).read_bytes() for o in names]
    other = [(a/"tif"/o).read_bytes() == (c/"tif"/o).read_bytes() for o in names]
    assert all(same) and not all(other) and annotations(a) == annotations(b)


@pytest.mark.parametrize("name,place", [("T10SEG_20190808T184921_TCI_crop_x-1408_y-1152", "T10SEG"),
                                        ("genoa_2023-07-10_r0120_c0240", "genoa"), ("port_of_x_20230710_1", "port_of_x"),
                                        ("harbour", None), ("T10SE_x", None)])
def test_places_in_names(name, place): assert place_in_name(name) == place


def test_files_without_band_names_are_red_green_blue_infrared(root):
    before = VesselArchive(root)[0]["s2"]
    path = root/"tif"/f"{VesselArchive(root).ids[0]}.tif"
    with rasterio.open(path) as ds: x, profile = ds.read(), ds.profile
    with rasterio.open(path, "w", **profile) as ds: ds.write(x)
    assert torch.equal(VesselArchive(root)[0]["s2"], before)
    with rasterio.open(path, "w", **profile) as ds:
        ds.write(x[::-1])
        ds.descriptions = ("B08", "B02", "B03", "B04")
    assert torch.equal(VesselArchive(root)[0]["s2"], before)
    with pytest.raises(InputError, match="has not all the bands"): VesselArchive(root, sensor="s2", on_error="raise")
    assert VesselArchive(root, sensor="s2_rgb")[0]["s2"].shape == (3, 32, 32)


# splits

def test_splits(root):
    names = VesselArchive(root).ids
    (root/"q.json").write_text(json.dumps([f"{o}.tif" for o in names[:4]]))
    (root/"a.json").write_text(json.dumps(dict(names=names[4:9])))
    archive = VesselArchive(root, splits=dict(query="q.json", archive="a.json"))
    assert archive.table.split.tolist() == ["query"]*4 + ["archive"]*5 + [None]*(len(names) - 9)
    assert archive.split("query").ids == names[:4]


@pytest.mark.parametrize("content,message", [('["a", "a"]', "names patches twice"), ('["a", 1]', "no list of patches"),
                                             ('{"a": ["x"], "b": []}', "no list"), ('"a"', "no list of patches")])
def test_bad_lists(tmp_path, content, message):
    (tmp_path/"x.json").write_text(content)
    with pytest.raises(InputError, match=message): read_name_list(tmp_path/"x.json")


def test_lists_that_overlap_or_are_missing(root):
    (root/"q.json").write_text('["a", "b"]')
    (root/"a.json").write_text('["b.tif", "c"]')
    with pytest.raises(InputError, match="two splits hold the patch b; found query and archive"):
        read_split_lists(dict(query=root/"q.json", archive=root/"a.json"))
    with pytest.raises(MissingFileError, match="z.json"): VesselArchive(root, splits=dict(query="z.json"))
    (root/"cut.json").write_text('["a", ')
    with pytest.raises(CorruptError): read_name_list(root/"cut.json")


def test_a_split_that_names_an_absent_patch(root):
    (root/"q.json").write_text('["T99ABC_20190101_x"]')
    archive = VesselArchive(root, splits=dict(query="q.json"))
    assert "T99ABC_20190101_x" in archive.skipped.source.tolist()
    with pytest.raises(MissingFileError, match="split query"):
        VesselArchive(root, splits=dict(query="q.json"), on_error="raise")


# what can be wrong

def test_missing_files(root, tmp_path):
    with pytest.raises(MissingFileError, match="nobody knows which patch"): VesselArchive(tmp_path)
    shutil.rmtree(root/"tif")
    with pytest.raises(MissingFileError, match="tif"): VesselArchive(root)


def test_annotation_without_patch_and_patch_without_annotation(root):
    first, second = VesselArchive(root).ids[:2]
    said = annotations(root)
    del said[first]
    (root/ANNOTATIONS).write_text(json.dumps(said | dict(lost=dict(annotations=[]))))
    archive = VesselArchive(root)
    reasons = dict(archive.skipped.values.tolist())
    assert first not in archive.ids and second in archive.ids
    assert "has no annotations" in reasons[first] and "no image of lost" in reasons["lost"]
    with pytest.raises((InputError, MissingFileError)): VesselArchive(root, on_error="raise")


@pytest.mark.parametrize("entry", [dict(), dict(annotations=3), [], None, dict(annotations=[{}]), "text",
                                   dict(annotations=[dict(geometry=dict(coordinates=[[[1, 2], [3, 4]]]))]),
                                   dict(annotations=[dict(geometry=dict(coordinates=[[["a", 2]]*4]))]),
                                   dict(annotations=[dict(geometry=dict(coordinates=[[[float("nan"), 2]]*4]))])])
def test_broken_entries(root, entry):
    name = VesselArchive(root).ids[0]
    with pytest.raises(InputError, match=f"boxes of {name} cannot be read"): vessel_boxes(name, entry)
    change(root, **{name: entry})
    archive = VesselArchive(root)
    assert name not in archive.ids and name in archive.skipped.source.tolist()


@pytest.mark.parametrize("content", ["[]", "{}", "null", "3"])
def test_annotations_that_are_none(tmp_path, content):
    (tmp_path/ANNOTATIONS).write_text(content)
    with pytest.raises(InputError, match="holds no annotations"): read_annotations(tmp_path/ANNOTATIONS)


def test_empty_and_cut_files(root):
    zero = json.loads((root/ZEROS).read_text())["zero_patches"][0]
    (root/ZEROS).unlink()
    with pytest.raises(InputError, match="0 in every pixel"): VesselArchive(root)[zero]
    cut = VesselArchive(root).ids[0]
    path = root/"tif"/f"{cut}.tif"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(CorruptError, match=cut): VesselArchive(root)[cut]
    archive = VesselArchive(root, check=True)
    assert archive.skipped.source.tolist() == sorted([zero, cut]) and len(archive) == 10
    path.write_bytes(b"no image")
    assert cut in VesselArchive(root).skipped.source.tolist()


def test_other_sizes_and_resampling(root):
    name = VesselArchive(root).ids[0]
    path = root/"tif"/f"{name}.tif"
    with rasterio.open(path) as ds: x, profile = ds.read(), ds.profile
    with rasterio.open(path, "w", **profile | dict(height=16)) as ds: ds.write(x[:, :16])
    archive = VesselArchive(root)
    assert ["another size than most" in o.reason for o in archive.skipped.itertuples() if name in o.source] == [True]
    assert VesselArchive(root, img_size=24)[name]["s2"].shape == (4, 24, 24)


def test_one_class_is_told(root, caplog):
    VesselArchive(root)
    assert not caplog.messages
    change(root, **{k: dict(annotations=[]) for k in annotations(root)})
    archive = VesselArchive(root)
    assert "nothing to tell apart" in caplog.text and archive.labels[:, 0].all()


def test_classes_of_the_annotations(root):
    archive = VesselArchive(root, labels="scene_class")
    said = annotations(root)
    assert archive.class_names == [[said[o]["scene_class"]] for o in archive.ids]
    with pytest.raises(UnknownNameError, match="did you mean scene_class"): VesselArchive(root, labels="scene_clas")
    change(root, **{archive.ids[0]: dict(annotations=[])})
    again = VesselArchive(root, labels="scene_class")
    assert again.class_names[0] is None and "labels" not in again[0]


def test_by_config(root, monkeypatch):
    monkeypatch.setenv("RSIR_DATA", str(root))
    archive = build_archive(load_config("base", ["data=vessels"]).data)
    assert isinstance(archive, VesselArchive) and len(archive) == 11
    assert isinstance(DATASETS.create("vessels", root=root), VesselArchive)
    mean, std = norm_stats(archive.sensors["s2"].bands, "vessel")
    assert mean.tolist() == pytest.approx([341.45270671, 306.65436551, 301.09752831, 416.97833933])
    assert std[3].item() == pytest.approx(1412.17678495)


def test_real_ports(shared):
    root = shared/"data"/"vessels"
    archive = VesselArchive(root, check=True)
    said, zeros = json.loads((root/ANNOTATIONS).read_text()), read_name_list(root/ZEROS)
    assert sorted(archive.ids) == sorted(set(said) - set(zeros)) and archive.skipped.source.tolist() == zeros
    with_box = sum(bool(said[o]["annotations"]) for o in archive.ids)
    assert archive.labels.sum(0).tolist() == [len(archive) - with_box, with_box]
    assert archive.table.place.tolist() == [said[o]["port"] for o in archive.ids]
    assert archive.table.geometry.notna().all() and archive.table.date.notna().all()
    assert archive[0]["s2"].shape == (4, 128, 128)
