"""BigEarthNet in its four forms: small files in the published layouts, and the real samples of ../shared."""
import bz2
import json
import pickle

import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
import torch.nn.functional as F
from pyproj import Geod
from rasterio.transform import from_origin
from safetensors.numpy import save as dump_safetensors
from shapely import wkb

from rsir_nb.core import (DATASETS, CorruptError, InputError, MissingFileError, UnknownNameError,
                          UnsafeFileError)
from rsir_nb.data import bigearthnet_tiff
from rsir_nb.data.bigearthnet import BenV1Lmdb, BenV2Lmdb, stack_bands
from rsir_nb.data.bigearthnet_tiff import BenV1Tiff, BenV2Tiff
from rsir_nb.data.encoder import dump_v1_record
from rsir_nb.data.labels import BEN19, BEN43, to_19_labels
from rsir_nb.data.layouts import write_v1_lmdb, write_v1_tiff, write_v2_lmdb, write_v2_tiff
from rsir_nb.data.lmdb import LmdbReader, LmdbWriter
from rsir_nb.data.records import load_v1_record, load_v2_record
from rsir_nb.simulate.synthetic import SyntheticArchive
from rsir_nb.data.tiles import parse_names, patch_places, season_of, tile_origin
from rsir_nb.sensors import get_sensor

V1 = ["S2A_MSIL2A_20170613T101031_87_48", "S2B_MSIL2A_20180204T94161_57_38",
      "S2A_MSIL2A_20170617T113321_4_55"]
S1 = ["S1A_IW_GRDH_1SDV_20170613T165043_33UUP_87_48", "S1A_IW_GRDH_1SDV_20180204T043253_35VPK_57_38",
      "S1A_IW_GRDH_1SDV_20170617T064724_29UPU_4_55"]
V2 = [f"S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP_{i}_48" for i in range(3)]
CLASSES = [["Vineyards", "Olive groves", "Airports"], ["Sea and ocean"], ["Pastures", "Peatbogs"]]
SIZES = {10: 120, 20: 60, 60: 20}


def make_bands(seed):
    rng = np.random.default_rng(seed)
    s1 = {o: rng.normal(-14, 3, (120, 120)).astype("float32") for o in ("VH", "VV")}
    side = dict(B02=120, B03=120, B04=120, B08=120, B01=20, B09=20)
    s2 = {o: rng.integers(1, 5000, (side.get(o, 60),)*2, dtype="uint16") for o in get_sensor("s2_12").bands}
    return s1, s2


def write_tif(path, x, **profile):
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = dict(crs="EPSG:32633", transform=from_origin(404400, 5342400, 1200/len(x), 1200/len(x)),
                   driver="GTiff", count=1, height=len(x), width=len(x), dtype=x.dtype) | profile
    with rasterio.open(path, "w", **profile) as ds:
        ds.write(x, 1)


@pytest.fixture
def v1_lmdb(tmp_path):
    with LmdbWriter(tmp_path/"v1.lmdb") as out:
        for i, name in enumerate(V1):
            s1, s2 = make_bands(i)
            out.commit([(name.encode(), dump_v1_record({**s1, **s2}, CLASSES[i], to_19_labels(CLASSES[i])))])
    return tmp_path/"v1.lmdb"


@pytest.fixture
def v2_lmdb(tmp_path):
    with LmdbWriter(tmp_path/"v2.lmdb") as out:
        for i, (s1_name, name) in enumerate(zip(S1, V2, strict=True)):
            s1, s2 = make_bands(i)
            out.commit([(s1_name.encode(), dump_safetensors(s1)), (name.encode(), dump_safetensors(s2)),
                        (f"{name}_reference_map".encode(), dump_safetensors({"Data": s2["B02"]}))])
    return tmp_path/"v2.lmdb"


@pytest.fixture
def metadata(tmp_path):
    labels = [to_19_labels(o) for o in CLASSES]
    pd.DataFrame(dict(patch_id=V2, labels=labels, split=["train", "validation", "test"], country="Austria",
                      s1_name=S1)).to_parquet(tmp_path/"metadata.parquet")
    return tmp_path/"metadata.parquet"


@pytest.fixture
def v1_tiffs(tmp_path):
    corner = dict(ulx=404400, uly=5342400, lrx=405600, lry=5341200)
    for i, (s1_name, name) in enumerate(zip(S1, V1, strict=True)):
        s1, s2 = make_bands(i)
        says = dict(labels=CLASSES[i], coordinates=corner, projection="EPSG:32633")
        for home, patch, bands in (("s2", name, s2), ("s1", s1_name, s1)):
            for band, x in bands.items(): write_tif(tmp_path/home/patch/f"{patch}_{band}.tif", x)
            more = {} if home == "s2" else dict(corresponding_s2_patch=name)
            (tmp_path/home/patch/f"{patch}_labels_metadata.json").write_text(json.dumps(says | more))
    return tmp_path/"s2", tmp_path/"s1"


def assert_patch(sample, seed):
    "The arrays are what `make_bands` made, resampled with torch one band at a time."
    s1, s2 = make_bands(seed)
    for modality, bands in (("s1", s1), ("s2", s2)):
        for x, band in zip(sample[modality], get_sensor(modality).bands, strict=True):
            want = torch.from_numpy(bands[band].astype("float32"))[None, None]
            want = F.interpolate(want, size=(120, 120), mode="bicubic", align_corners=True)[0, 0]
            torch.testing.assert_close(x, want, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("mode", ["bicubic", "nearest"])
def test_bands_of_one_size_together_equal_one_by_one(mode):
    _, s2 = make_bands(0)
    bands = get_sensor("s2_12").bands
    for x, band in zip(stack_bands(s2, bands, 120, mode), bands, strict=True):
        corners = True if mode == "bicubic" else None
        want = torch.from_numpy(s2[band].astype("float32"))[None, None]
        torch.testing.assert_close(x, F.interpolate(want, (120, 120), mode=mode, align_corners=corners)[0, 0])


def test_v1_lmdb(v1_lmdb):
    archive = BenV1Lmdb(v1_lmdb)
    assert archive.ids == sorted(V1)
    for i, name in enumerate(V1): assert_patch(archive[name], i)
    assert archive.table.set_index("id").labels[V1[0]] == ["Permanent crops"]
    assert archive[V1[1]]["labels"].tolist() == BEN19.encode(["Marine waters"]).tolist()
    assert BenV1Lmdb(v1_lmdb, vocab=43)[V1[0]]["labels"].tolist() == BEN43.encode(CLASSES[0]).tolist()
    assert BenV1Lmdb(v1_lmdb, vocab="19_original").labels.sum() == archive.labels.sum()
    torch.testing.assert_close(pickle.loads(pickle.dumps(archive))[0]["s2"], archive[0]["s2"])


def test_v1_list_of_pairs(v1_lmdb, tmp_path):
    rows = "\n".join(f"{a},{b},Serbia,Winter" for a, b in zip(S1, V1, strict=True))
    (tmp_path/"pairs.csv.bz2").write_bytes(bz2.compress(f"s1_name,s2_name,country,season\n{rows}\n".encode()))
    table = BenV1Lmdb(v1_lmdb, metadata=tmp_path/"pairs.csv.bz2").table.set_index("id")
    assert table.s1_name[V1].tolist() == S1 and table.place[V1].tolist() == ["33UUP", "35VPK", "29UPU"]
    assert set(table.season) == {"Winter"} and set(table.country) == {"Serbia"}
    assert table.geometry.notna().all()
    (tmp_path/"other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="not the list of pairs.*columns s1_name"):
        BenV1Lmdb(v1_lmdb, metadata=tmp_path/"other.csv")
    with pytest.raises(MissingFileError): BenV1Lmdb(v1_lmdb, metadata=tmp_path/"none.csv")


def test_v2_lmdb(v2_lmdb, metadata):
    archive = BenV2Lmdb(v2_lmdb, metadata=metadata)
    assert archive.ids == V2 and archive.table.s1_name.tolist() == S1
    assert archive.table.split.tolist() == ["train", "val", "test"]
    assert archive.split("validation").ids == [V2[1]]
    for i, name in enumerate(V2): assert_patch(archive[name], i)
    assert archive.table.place.unique().tolist() == ["33UUP"]


def test_v2_lmdb_without_metadata_has_a_patch_a_record(v2_lmdb):
    archive = BenV2Lmdb(v2_lmdb)
    assert archive.ids == sorted(S1 + V2) and archive.labels.sum() == 0
    assert sorted(archive[S1[0]]) == ["id", "s1"] and sorted(archive[V2[0]]) == ["id", "s2"]


def test_v1_tiffs(v1_tiffs):
    archive = BenV1Tiff(*v1_tiffs)
    assert archive.ids == sorted(V1)
    for i, name in enumerate(V1): assert_patch(archive[name], i)
    assert archive.table.set_index("id").s1_name[V1].tolist() == S1
    assert set(archive.table.crs) == {"EPSG:32633"}
    assert BenV1Tiff(s1_dir=v1_tiffs[1])[V1[0]].keys() == {"id", "s1", "labels"}


def test_only_the_wanted_bands_are_opened(v1_tiffs, monkeypatch):
    opened, read = [], bigearthnet_tiff.read_raster
    spy = lambda path, *args, **kwargs: opened.append(path) or read(path, *args, **kwargs)
    monkeypatch.setattr(bigearthnet_tiff, "read_raster", spy)
    archive = BenV1Tiff(*v1_tiffs, sensors=dict(s2="s2_rgb"))
    assert archive[0]["s2"].shape == (3, 120, 120)
    assert sorted(o[-7:-4] for o in opened) == ["B02", "B03", "B04"]


def test_a_sensor_may_mix_both_instruments(v1_lmdb):
    both = dict(name="early", bands=["B02", "B8A", "VH"], unit="one")
    x = BenV1Lmdb(v1_lmdb, sensors=dict(both=both))[0]["both"]
    assert x.shape == (3, 120, 120) and x[2].max() < 0 < x[0].min()
    with pytest.raises(InputError, match="found B10"): BenV1Lmdb(v1_lmdb, sensors=["s2_13"])


def test_twelve_bands_and_those_of_43_classes_that_are_present(tmp_path):
    "As the published comparison of metric learning reads it: a class counts if every split has it, in the order of the 43."
    classes = [["Vineyards", "Pastures"], ["Sea and ocean", "Airports"], ["Pastures", "Sea and ocean", "Peatbogs"]]
    with LmdbWriter(tmp_path/"v1.lmdb") as out:
        for i, name in enumerate(V1):
            s1, s2 = make_bands(i)
            out.commit([(name.encode(), dump_v1_record({**s1, **s2}, classes[i], to_19_labels(classes[i])))])
    told = dict(sensors=dict(s2="s2_12"), vocab=43, present_only=True)
    every = BenV1Lmdb(tmp_path/"v1.lmdb", **told)
    assert list(every.vocab) == [o for o in BEN43 if o in sum(classes, [])] and every.sensors["s2"].bands == get_sensor("s2_12").bands
    for split, names in dict(train=V1[:2], test=V1[2:]).items(): (tmp_path/f"{split}.csv").write_text("\n".join(names))
    archive = BenV1Lmdb(tmp_path/"v1.lmdb", split_dir=tmp_path, **told)
    assert list(archive.vocab) == ["Pastures", "Sea and ocean"]
    at = {o: archive.class_names[archive.number(o)] for o in V1}
    assert at == {V1[0]: ["Pastures"], V1[1]: ["Sea and ocean"], V1[2]: ["Pastures", "Sea and ocean"]}
    assert archive[V1[2]]["labels"].tolist() == [1, 1] and archive[0]["s2"].shape == (12, 120, 120)
    (tmp_path/"test.csv").write_text(V1[1])
    (tmp_path/"train.csv").write_text(V1[0])
    with pytest.raises(InputError, match="no class is in all splits"): BenV1Lmdb(tmp_path/"v1.lmdb", split_dir=tmp_path, **told)


def test_splits(v1_lmdb, tmp_path):
    folder = tmp_path/"splits"
    folder.mkdir()
    (folder/"train.csv.bz2").write_bytes(bz2.compress(f"{V1[0]},{S1[0]}\n{V1[1]},{S1[1]}\n".encode()))
    (folder/"test.csv").write_text(f"{V1[2]}\n")
    archive = BenV1Lmdb(v1_lmdb, split_dir=folder)
    assert sorted(archive.split("train").ids) == sorted(V1[:2]) and archive.split("test").ids == [V1[2]]
    (folder/"val.csv").write_text("S2A_MSIL2A_20170613T101031_1_1\n")
    with pytest.raises(InputError, match=r"val.csv lists.*1 of 1, such as S2A.*_1_1; pass on_error='skip'"):
        BenV1Lmdb(v1_lmdb, split_dir=folder)
    archive = BenV1Lmdb(v1_lmdb, split_dir=folder, on_error="skip")
    assert len(archive) == 3 and len(archive.skipped) == 1


def test_index_is_made_once_and_only_for_these_keys(v1_lmdb, tmp_path, monkeypatch):
    index = tmp_path/"index.parquet"
    first = BenV1Lmdb(v1_lmdb, index=index)
    with monkeypatch.context() as m:
        m.setattr(BenV1Lmdb, "scan", lambda *a: pytest.fail("the index was not used"))
        again = BenV1Lmdb(v1_lmdb, index=index, vocab=43)
    assert again.ids == first.ids
    assert [to_19_labels(o) for o in again.table.labels] == first.table.labels.tolist()
    s1, s2 = make_bands(9)
    with LmdbWriter(v1_lmdb) as out:
        out.commit([(b"S2A_MSIL2A_20170613T101031_1_1", dump_v1_record({**s1, **s2}, [], []))])
    assert len(BenV1Lmdb(v1_lmdb, index=index)) == 4
    assert BenV1Lmdb(v1_lmdb, index=index).ids == BenV1Lmdb(v1_lmdb).ids


def test_bad_records_are_named_and_skipped(v1_lmdb):
    with LmdbWriter(v1_lmdb) as out: out.commit([(b"S2A_MSIL2A_20170613T101031_1_1", b"\x80\x04\x95oops"),
                                                 (b"S2A_MSIL2A_20170613T101031_1_2", pickle.dumps(print, 4))])
    with pytest.raises(CorruptError, match="20170613T101031_1_1"): BenV1Lmdb(v1_lmdb)
    archive = BenV1Lmdb(v1_lmdb, on_error="skip")
    assert len(archive) == 3 and len(archive.skipped) == 2
    assert "builtins.print" in archive.skipped.reason[1]
    with pytest.raises(UnsafeFileError, match="builtins.print"):
        archive.record("S2A_MSIL2A_20170613T101031_1_2")


def test_unknown_class(v1_tiffs):
    file = v1_tiffs[0]/V1[1]/f"{V1[1]}_labels_metadata.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(labels=["Sea and oceans"])))
    with pytest.raises(InputError, match=f"{V1[1]} has an unknown class; found .*did you mean Sea and ocean"):
        BenV1Tiff(*v1_tiffs)
    archive = BenV1Tiff(*v1_tiffs, on_error="skip")
    assert V1[1] not in archive.ids and archive.skipped.source.tolist() == [V1[1]]
    file.write_text("{no json")
    with pytest.raises(CorruptError, match="labels_metadata.json"): BenV1Tiff(*v1_tiffs)


def test_bad_tiffs(v1_tiffs):
    home = v1_tiffs[0]
    tif = lambda name, band: home/name/f"{name}_{band}.tif"
    tif(V1[0], "B05").unlink()
    whole = tif(V1[1], "B11").read_bytes()
    tif(V1[1], "B11").write_bytes(whole[:len(whole)//2])
    write_tif(tif(V1[2], "B02"), np.full((120, 120), np.nan, "float32"))
    archive = BenV1Tiff(*v1_tiffs)
    with pytest.raises(MissingFileError, match="_B05.tif is not there"): archive[V1[0]]
    with pytest.raises(CorruptError, match="_B11.tif cannot be read"): archive[V1[1]]
    with pytest.raises(InputError, match=f"{V1[2]} cannot be used as s2; found NaN"): archive[V1[2]]


def test_wrong_unit(v1_tiffs):
    for band in ("VV", "VH"):
        write_tif(v1_tiffs[1]/S1[0]/f"{S1[0]}_{band}.tif", np.full((120, 120), 0.05, "float32"))
    with pytest.raises(InputError, match="linear power or amplitude; wanted decibels"):
        BenV1Tiff(*v1_tiffs)[V1[0]]


def test_nothing_there(tmp_path, v1_lmdb, v2_lmdb, metadata):
    (tmp_path/"empty").mkdir()
    with pytest.raises(MissingFileError, match="holds no patch folders"): BenV1Tiff(tmp_path/"empty")
    with pytest.raises(MissingFileError, match="BigEarthNet-S2"): BenV2Tiff(tmp_path/"empty")
    with pytest.raises(InputError, match="no folder is given"): BenV1Tiff()
    with pytest.raises(MissingFileError, match="no LMDB folder"): BenV2Lmdb(tmp_path/"empty")
    with LmdbWriter(tmp_path/"bare.lmdb"): pass
    with pytest.raises(InputError, match="has no patches; check"): BenV1Lmdb(tmp_path/"bare.lmdb")
    with pytest.raises(InputError, match="labelled with the 19 classes.*vocab=19"):
        BenV2Lmdb(v2_lmdb, metadata=metadata, vocab=43)
    other = pd.read_parquet(metadata).assign(patch_id=["a", "b", "c"], s1_name=list("def"))
    other.to_parquet(tmp_path/"other.parquet")
    with pytest.raises(InputError, match="other.parquet lists patches that the archive has not; found 3"):
        BenV2Lmdb(v2_lmdb, metadata=tmp_path/"other.parquet")
    pd.DataFrame(dict(a=[1])).to_parquet(tmp_path/"no.parquet")
    with pytest.raises(InputError, match="not BigEarthNet's metadata.*patch_id"):
        BenV2Lmdb(v2_lmdb, metadata=tmp_path/"no.parquet")
    with pytest.raises(UnknownNameError, match="did you mean split_dir"):
        DATASETS.create("ben_v1_lmdb", path="x", split_dirs="y")


def test_all_four_forms_of_one_archive_are_equal(tmp_path):
    land = SyntheticArchive(n_places=3, patches_per_place=2)
    v1, v2 = tmp_path/"v1", tmp_path/"v2"
    for write, home in ((write_v1_lmdb, v1), (write_v2_lmdb, v2), (write_v1_tiff, v1), (write_v2_tiff, v2)):
        write(land, home, progress=False)
    of_v1 = BenV1Lmdb(v1/"BigEarthNetEncoded.lmdb", split_dir=v1/"splits")
    forms = [of_v1, BenV1Tiff(v1/"BigEarthNet-v1.0", v1/"BigEarthNet-S1-v1.0", split_dir=v1/"splits"),
             BenV2Lmdb(v2/"BigEarthNet.lmdb", metadata=v2/"metadata.parquet"),
             BenV2Tiff(v2, metadata=v2/"metadata.parquet")]
    for archive in forms:
        assert len(archive) == 6 and archive.table.geometry.notna().all()
        for i in range(6):
            k = list(land.table.s1_name).index(archive.table.s1_name[i])
            for m in ("s1", "s2"): torch.testing.assert_close(archive[i][m], land[k][m], rtol=1e-5, atol=0.01)
            assert torch.equal(archive[i]["labels"], land[k]["labels"])
            assert archive.table.split[i] == land.table.split[k]
            corners = [np.array(wkb.loads(o.table.geometry[j]).bounds) for o, j in ((archive, i), (land, k))]
            assert np.allclose(*corners, atol=1e-7)
    assert of_v1.table.place.str.len().unique().tolist() == [5]     # tiles, from the lists' second column


# places, read off names

def test_tile_origins():
    "Corners of tiles in odd and even zones, of Sentinel-2's own grid definition."
    assert tile_origin("33UUP") == ("EPSG:32633", 300000, 5400000)
    assert tile_origin("32TQM") == ("EPSG:32632", 699960, 4700040)
    assert tile_origin("35VPK") == ("EPSG:32635", 600000, 7000020)
    assert tile_origin("56HLH") == ("EPSG:32756", 300000, 6300040)     # Sydney


def test_footprint_is_a_patch_of_1200_m():
    found = parse_names(S1)
    for shape in map(wkb.loads, patch_places(found.tile, found.col, found.row).geometry):
        assert shape.is_valid and shape.exterior.is_ccw
        area, _ = Geod(ellps="WGS84").geometry_area_perimeter(shape)
        assert area == pytest.approx(1.2e3**2, rel=3e-3)


# real data

@pytest.fixture(scope="module")
def data(shared): return shared/"data"


@pytest.fixture(scope="module")
def real_v1(data):
    home = data/"configilm_ben_lmdb"/"BENv1"
    return BenV1Lmdb(home/"BigEarthNetEncoded.lmdb", split_dir=home,
                     metadata=data/"bigearthnet_metadata"/"s1_s2_name_country_season.csv.bz2")


@pytest.fixture(scope="module")
def real_v2(data):
    home = data/"configilm_ben_lmdb"/"BENv2"
    files = [home/"metadata.parquet", home/"metadata_for_patches_with_snow_cloud_or_shadow.parquet"]
    return BenV2Lmdb(home/"BigEarthNet-V2-LMDB", metadata=files)


@pytest.mark.data
def test_real_v1(real_v1):
    assert len(real_v1) == 30
    assert real_v1.table.split.value_counts().to_dict() == dict(train=10, val=10, test=10)
    counts = dict(zip(BEN19, real_v1.labels.sum(0).tolist(), strict=True))
    some = "Mixed forest", "Transitional woodland, shrub", "Coniferous forest", "Marine waters", "Arable land"
    assert [counts[o] for o in some] == [13, 12, 10, 9, 8]
    for i in range(30):
        sample, record = real_v1[i], real_v1.record(real_v1.ids[i])
        assert sample["s1"].shape == (2, 120, 120) and sample["s2"].shape == (10, 120, 120)
        assert set(BEN19.decode(sample["labels"])) == set(record["new_labels"])
        assert set(record["new_labels"]) == set(to_19_labels(record["labels"]))
        assert np.array_equal(sample["s1"][1], record["bands"]["VV"])
        assert np.array_equal(sample["s2"][0], record["bands"]["B02"])
    of_43 = [len(real_v1.record(o)["labels"]) for o in real_v1.ids]
    assert BenV1Lmdb(real_v1.path, vocab=43).labels.sum(1).tolist() == of_43


@pytest.mark.data
def test_real_v1_places_are_in_their_countries(real_v1):
    boxes = dict(Finland=(19, 59, 32, 70.5), Ireland=(-11, 51, -5, 56), Austria=(9, 46, 17.5, 49.5),
                 Serbia=(18, 42, 23.5, 46.5), Portugal=(-10, 36.5, -6, 42.5),
                 Lithuania=(20.5, 53.5, 27, 56.8), Belgium=(2, 49, 6.5, 52),
                 Luxembourg=(5, 49, 7, 50.5), Switzerland=(5.5, 45.5, 10.8, 48), Kosovo=(20, 41.5, 22, 43.5))
    for row in real_v1.table.itertuples():
        west, south, east, north = boxes[row.country]
        x, y = wkb.loads(row.geometry).centroid.coords[0]
        assert west < x < east and south < y < north, row


@pytest.mark.data
def test_real_v2(real_v2):
    assert len(real_v2) == 24 and real_v2.table.split.value_counts().to_dict() == dict(train=8, val=8, test=8)
    counts = dict(zip(BEN19, real_v2.labels.sum(0).tolist(), strict=True))
    some = ("Mixed forest", "Broad-leaved forest", "Inland waters", "Pastures", "Coniferous forest",
            "Urban fabric")
    assert [counts[o] for o in some] == [17, 16, 15, 15, 13, 9]
    for i in range(24):
        sample = real_v2[i]
        raw = real_v2.reader.use(real_v2.ids[i].encode(), load_v2_record)
        assert {"s1", "s2", "labels"} <= sample.keys() and np.array_equal(sample["s2"][2], raw["B04"])
    assert (season_of(real_v2.table.date) == real_v2.table.season).all()


@pytest.mark.data
def test_v2_folder_equals_the_reference_lmdb(data):
    home = data/"rico_hdl_fixtures"
    tiffs = BenV2Tiff(home/"tiffs"/"BigEarthNet", sensors=["s1", "s2_12"])
    reader = LmdbReader(home/"BigEarthNet_LMDB")
    assert [o.encode() for o in tiffs.ids] == sorted(reader.keys()) and len(tiffs) == 2
    for i, name in enumerate(tiffs.ids):
        bands, want = tiffs.bands(i), reader.use(name.encode(), load_v2_record)
        assert bands.keys() == want.keys()
        for band, x in want.items():
            assert bands[band].dtype == x.dtype and np.array_equal(bands[band], x), band
    lmdb = BenV2Lmdb(home/"BigEarthNet_LMDB", sensors=["s1", "s2_12"])
    for name in tiffs.ids:
        for m in lmdb[name].keys() - {"id"}: assert torch.equal(lmdb[name][m], tiffs[name][m])


@pytest.fixture(scope="module")
def real_v1_tiff(data):
    home = data/"bigearthnet_v1_tiff"
    return BenV1Tiff(home/"BigEarthNet-v1.0", home/"BigEarthNet-S1-v1.0", sensors=["s1", "s2_12"])


@pytest.mark.data
def test_real_v1_folder(real_v1_tiff):
    have = [frozenset(real_v1_tiff[i]) - {"id", "labels"} for i in range(len(real_v1_tiff))]
    assert len(have) == 17 and have.count({"s1", "s2_12"}) == 6
    assert have.count({"s2_12"}) == 8 and have.count({"s1"}) == 3
    assert real_v1_tiff.labels.sum(1).min() >= 1


@pytest.mark.data
def test_v1_lmdb_equals_its_geotiffs(real_v1, real_v1_tiff, tmp_path):
    """No patch of the real LMDB is among the real GeoTIFFs, so these are written in its layout and read back.

    The layout itself is that of the real records: `dump_v1_record` writes the same globals and states."""
    assert not set(real_v1.ids) & set(real_v1_tiff.ids)
    pairs = [i for i in range(len(real_v1_tiff)) if len(real_v1_tiff.bands(i)) == 14]
    home = write_v1_lmdb(real_v1_tiff.subset(pairs), tmp_path, progress=False)
    archive = BenV1Lmdb(home/"BigEarthNetEncoded.lmdb", sensors=["s1", "s2_12"])
    assert len(archive) == 6
    for name in archive.ids:
        a, b = archive[name], real_v1_tiff[name]
        assert all(torch.equal(a[o], b[o]) for o in ("s1", "s2_12", "labels"))
    value = LmdbReader(real_v1.path).get(real_v1.ids[0].encode())
    real = load_v1_record(value)
    again = load_v1_record(dump_v1_record(real["bands"], real["labels"], real["new_labels"]))
    assert all(np.array_equal(real["bands"][o], again["bands"][o]) for o in real["bands"])


@pytest.mark.data
def test_names_and_geotiffs_say_the_same_place(data):
    "Every real GeoTIFF whose name has a tile lies where `tile_origin` says, to the millimetre."
    homes = data/"bigearthnet_v1_tiff"/"BigEarthNet-S1-v1.0", data/"rico_hdl_fixtures"/"tiffs"/"BigEarthNet"
    files = [p for home in homes for p in home.rglob("*.tif") if p.stem.endswith(("_VV", "_B02"))]
    assert len(files) == 11
    for path in files:
        row = parse_names([path.parent.name]).iloc[0]
        crs, left, top = tile_origin(row.tile)
        with rasterio.open(path) as ds:
            assert ds.crs.to_string() == crs
            assert (ds.bounds.left, ds.bounds.top) == (left + 1200*row.col, top - 1200*row.row)


@pytest.mark.data
def test_all_published_names_are_understood(data):
    "Tiles lie in the country that the list states, seasons are the list's but for two days."
    known = pd.read_csv(data/"bigearthnet_metadata"/"s1_s2_name_country_season.csv.bz2").iloc[::97]
    s1, s2 = parse_names(known.s1_name), parse_names(known.s2_name)
    assert s1.notna().all().all() and s2.date.notna().all()
    assert (s1.col == s2.col).all() and (s1.row == s2.row).all()
    assert (season_of(s2.date).to_numpy() == known.season.to_numpy()).mean() > 0.998
