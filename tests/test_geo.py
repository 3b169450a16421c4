"Footprints and tables: rings, bytes, boxes and files, against bytes written by hand and pyproj."
import struct

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import shapely
from rsir_nb.core import CorruptError, InputError, MissingFileError
from rsir_nb.geo import (bounding_boxes, footprint, read_geoparquet, wkb_box, wkb_polygon, wkb_quads,
                         wkb_to_geojson, write_geoparquet)


def by_hand(ring):
    "A closed ring as little-endian WKB, as the standard has it."
    return struct.pack("<BIII", 1, 3, 1, len(ring)) + b"".join(struct.pack("<dd", *o) for o in ring)


def test_bytes_are_those_of_the_standard():
    clockwise = [(0., 0.), (0., 4.), (5., 4.), (5., 0.), (0., 0.)]
    for ring in clockwise, clockwise[:-1], clockwise[::-1]: assert wkb_polygon(ring) == by_hand(clockwise[::-1])
    assert wkb_quads(np.array([clockwise[:-1], clockwise[:0:-1]])) == [by_hand(clockwise[::-1])]*1 + [wkb_polygon(clockwise[:0:-1])]
    assert wkb_quads(np.empty((0, 4, 2))) == []
    big_endian = struct.pack(">BIdd", 0, 1, 1.5, -2)
    assert wkb_to_geojson(big_endian) == dict(type="Point", coordinates=[1.5, -2])
    for bad in [(0, 0), (1, 1)], [(0, 0), (1, np.nan), (2, 0)], [(0, 0, 0)]*4, [1, 2, 3]:
        with pytest.raises(InputError, match="no polygon"): wkb_polygon(bad)


def test_rings_are_turned():
    ring, hole = [(0, 0), (0, 4), (5, 4), (5, 0)], [(1, 1), (2, 1), (2, 2)]
    ours = shapely.from_wkb(wkb_polygon(ring, holes=[hole]))
    assert ours.equals(shapely.Polygon(ring, [hole]))
    assert ours.exterior.is_ccw and not ours.interiors[0].is_ccw
    assert shapely.from_wkb(wkb_box(1, 2, 3, 4)).bounds == (1, 2, 3, 4)


GEOMETRIES = [shapely.Point(1, 2), shapely.LineString([(0, 0), (1, 2)]), shapely.box(0, 1, 2, 3),
              shapely.Polygon([(0, 0), (9, 0), (9, 9)], [[(3, 2), (4, 2), (4, 3)]]),
              shapely.MultiPoint([(0, 0), (1, 1)]),
              shapely.MultiLineString([[(0, 0), (1, 1)], [(2, 2), (3, 3)]]),
              shapely.MultiPolygon([shapely.box(0, 0, 1, 1), shapely.box(5, 5, 6, 6)]),
              shapely.Point(1, 2, 3), shapely.Polygon([(0, 0, 1), (9, 0, 1), (9, 9, 1)])]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: g.geom_type + "Z"*g.has_z)
@pytest.mark.parametrize("how", [dict(byte_order=1), dict(byte_order=0), dict(include_srid=True),
                                 dict(flavor="iso")], ids=str)
def test_we_read_what_shapely_writes(geometry, how):
    wkb = shapely.to_wkb(shapely.set_srid(geometry, 4326), **how)
    flat = shapely.force_2d(geometry)
    assert shapely.geometry.shape(wkb_to_geojson(wkb)).equals(flat)
    assert tuple(bounding_boxes([wkb])[0]) == flat.bounds


@pytest.mark.parametrize("size", range(0, 93, 4))
def test_truncated_wkb_is_refused(size):
    with pytest.raises(CorruptError): wkb_to_geojson(wkb_box(1, 2, 3, 4)[:size])


def test_a_collection_has_no_coordinates():
    with pytest.raises(CorruptError, match="GeometryCollection"): wkb_to_geojson(shapely.to_wkb(shapely.GeometryCollection([GEOMETRIES[0]])))


def test_the_bad_one_of_many_is_told():
    with pytest.raises(CorruptError, match="found 4 bytes"): bounding_boxes([wkb_box(1, 2, 3, 4), None, b"junk", wkb_box(1, 2, 3, 4)])


def test_boxes_of_a_mixed_column():
    some = [wkb_box(1, 2, 3, 4), None, shapely.to_wkb(shapely.Point(7, 8)), float("nan"),
            memoryview(wkb_box(-5, -4, -3, -2))]
    found = bounding_boxes(some)
    np.testing.assert_array_equal(found[[0, 2, 4]], [[1, 2, 3, 4], [7, 8, 7, 8], [-5, -4, -3, -2]])
    assert np.isnan(found[[1, 3]]).all() and bounding_boxes([]).shape == (0, 4)


def test_footprint_follows_the_projection():
    pyproj = pytest.importorskip("pyproj")
    bounds = (699_960, 5_300_000, 809_760, 5_409_800)
    fine, coarse = (shapely.from_wkb(footprint(bounds, "EPSG:32632", points=n)) for n in (200, 1))
    to_lonlat = pyproj.Transformer.from_crs(32632, 4326, always_xy=True).transform
    for x, y in [(699_960, 5_300_000), (809_760, 5_409_800), (754_860, 5_409_800)]:
        assert fine.exterior.distance(shapely.Point(to_lonlat(x, y))) < 1e-5
    assert coarse.exterior.distance(shapely.Point(to_lonlat(754_860, 5_409_800))) > 1e-4
    patch = shapely.from_wkb(footprint((691_000, 5_335_000, 692_200, 5_336_200), 32632))
    middle = shapely.Point(to_lonlat(691_600, 5_336_200))
    assert patch.exterior.distance(middle)*111_000 < 0.1     # metres
    assert patch.exterior.is_ccw and 11 < patch.centroid.x < 12 and 48 < patch.centroid.y < 49


def test_geoparquet_keeps_everything_and_says_what_it_is(tmp_path):
    df = pd.DataFrame(dict(id=["a", "b", "c"], labels=[["x"], [], ["x", "y"]], n=[1, 2, 3],
                           geometry=[wkb_box(1, 2, 3, 4), None, wkb_box(0, 0, 1, 1)]))
    path = write_geoparquet(df, tmp_path/"t.parquet", metadata=dict(sensors=["s1"]))
    back = read_geoparquet(path)
    assert back.attrs["sensors"] == ["s1"] and back.labels.tolist() == df.labels.tolist()
    assert back.geometry.tolist() == df.geometry.tolist() and back.n.tolist() == [1, 2, 3]
    geo = back.attrs["geo"]
    assert geo["version"] == "1.1.0" and geo["primary_column"] == "geometry"
    assert geo["columns"]["geometry"] == dict(encoding="WKB", geometry_types=["Polygon"], bbox=[0, 0, 3, 4])
    assert pq.read_schema(path).field("geometry").type == "binary"
    empty = read_geoparquet(write_geoparquet(df.iloc[:0], tmp_path/"empty.parquet"))
    assert len(empty) == 0 and "bbox" not in empty.attrs["geo"]["columns"]["geometry"]


def test_bad_tables(tmp_path):
    df = pd.DataFrame(dict(id=["a"], geometry=[wkb_box(1, 2, 3, 4)]))
    with pytest.raises(MissingFileError): read_geoparquet(tmp_path/"none.parquet")
    with pytest.raises(InputError, match="geometry"): write_geoparquet(df[["id"]], tmp_path/"t.parquet")
    with pytest.raises(CorruptError): write_geoparquet(df.assign(geometry=[b"junk"]), tmp_path/"t.parquet")
    assert not list(tmp_path.iterdir())
    whole = write_geoparquet(df, tmp_path/"t.parquet").read_bytes()
    for size in 0, 10, len(whole)//2, len(whole) - 1:
        (tmp_path/"t.parquet").write_bytes(whole[:size])
        with pytest.raises(CorruptError): read_geoparquet(tmp_path/"t.parquet")
