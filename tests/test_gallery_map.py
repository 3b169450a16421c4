"Maps of hits: footprints, the date line, round degrees, and what happens without places."
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rsir_nb
import shapely
from matplotlib.text import Text
from shapely.geometry import box as shapely_box
from shapely.geometry import shape

from rsir_nb.core import InputError
from rsir_nb.gallery.map import (HitMap, bounds_of, corners, cut_of, degrees_text, graticule, graticule_steps,
                                 hit_footprints, map_html, map_picture, side_by_side)
from rsir_nb.geo import wkb_box
from rsir_nb.maps import spread, world_lines
from rsir_nb.retrieval.ranking import Ranking


def ranking(boxes, query=None, labels=None):
    table = pd.DataFrame(dict(id=[f"p{i}" for i in range(len(boxes))]))
    table["geometry"] = pd.Series([o and wkb_box(*o) for o in boxes], dtype=object)
    table["labels"] = pd.Series(labels or [["Sea"]]*len(boxes), dtype=object)
    asked = dict(id="q", sensor="s2", labels=["Sea"], **(dict(geometry=wkb_box(*query)) if query else {}))
    return Ranking(asked, np.arange(len(boxes)), np.arange(len(boxes)), table, "s1", n_bits=64)


def test_footprints_are_the_geometries():
    boxes = [(10, 40, 11, 41), None, (12, 42, 13, 43)]
    found = hit_footprints(ranking(boxes, (9, 39, 10, 40), [["Sea"], ["Sea"], ["Town"]]))
    assert [o["properties"]["rank"] for o in found] == [0, 1, 3]
    assert [o["properties"]["kind"] for o in found] == ["query", "good", "bad"]
    assert shape(found[2]["geometry"]).equals(shapely_box(12, 42, 13, 43))


@pytest.mark.parametrize("shift", np.arange(0, 360, 17.))
def test_neighbours_stay_neighbours_wherever_the_world_is_cut(shift):
    wrap = lambda o: (o + 180) % 360 - 180
    starts = wrap(shift + np.array([0, 3, 8]))
    boxes = [(o, 10, o + .5, 11) for o in starts if o + .5 <= 180]
    west, south, east, north = bounds_of(side_by_side(hit_footprints(ranking(boxes))), margin=0)
    assert east - west <= 8.5 + .02 and (south, north) == pytest.approx((9.995, 11.005))


def test_the_cut_lies_in_the_widest_gap():
    rng = np.random.default_rng(0)
    for _ in range(50):
        lons = rng.uniform(-180, 180, 6)
        cut = cut_of(lons)
        moved = np.where(lons < cut, lons + 360, lons)
        gaps = np.diff(np.sort(np.append(lons, lons.min() + 360)))
        assert np.ptp(moved) == pytest.approx(360 - gaps.max())


@pytest.mark.parametrize("low, high", [(10.2, 12.9), (-179.4, 180.7), (47.001, 47.009), (0, 1e-3), (-90, 90)])
def test_lines_lie_at_round_degrees(low, high):
    steps = graticule_steps(low, high)
    assert 2 <= len(steps) <= 12 and low - 1e-6 <= steps[0] and steps[-1] <= high + 1e-6
    width = np.diff(steps)
    assert np.allclose(width, width[0])
    digits = width[0]/10**np.floor(np.log10(width[0]) + 1e-9)
    assert min(abs(digits - o) for o in (1, 2, 5, 10)) < 1e-6
    lines, labels = graticule((low, -80, high, 80))
    assert len(labels) == len(lines["geometry"]["coordinates"]) >= 4


def test_degrees_in_words():
    assert [degrees_text(o) for o in (0, 180, -180, 190, 12.5)] == ["0°", "180°", "180°", "170°W", "12.5°E"]
    with pytest.raises(InputError, match="nothing between"): graticule_steps(3, 3)


def test_one_hit_and_none():
    assert "1 of 1 hits" in map_picture(ranking([(10, 40, 10.01, 40.01)])).figure.get_label()
    with pytest.raises(InputError, match="known place"): map_picture(ranking([]))
    assert "known place" in map_html(ranking([None])) and "Nothing was asked" in map_html(None)
    assert 'alt="Map of' in map_html(ranking([(10, 40, 11, 41)]))


def test_the_live_map_reports_and_counts():
    pytest.importorskip("ipyleaflet", reason="ipyleaflet is not installed")
    said = []
    found = ranking([(10, 40, 11, 41), None], (9, 39, 10, 40))
    live = HitMap(found, on_open=lambda *o: said.append(o), on_box=said.append)
    assert live.words.value.endswith(">1 of 2 hits have no known place")
    shapes = next(o for o in live.widget.layers if getattr(o, "data", {}).get("type") == "FeatureCollection")
    live._opened(feature=shapes.data["features"][1])
    ring = [[10, 40], [10, 42], [12, 42], [12, 40], [10, 40]]
    live._drawn(None, "created", dict(geometry=dict(type="Polygon", coordinates=[ring])))
    live._drawn(None, "deleted", dict(geometry=dict(type="Polygon", coordinates=[ring])))
    assert said == [("p0", "s1"), (10., 40., 12., 42.)]
    assert not any("tile" in type(o).__name__.lower() for o in live.widget.layers), "no network unless asked for"
    assert "text/html" in live._repr_mimebundle_()
    many = HitMap(ranking([(i/10, 40, i/10 + .05, 40.05) for i in range(300)]))
    pins = [o for o in many.widget.layers if "Marker" in type(o).__name__ and o.title]
    assert len(pins) <= 101 and corners(hit_footprints(many.ranking)[0]).shape == (5, 2)


# the world below, and pins that do not lie on each other

def test_the_file_of_the_world():
    "Small, and where it should be: known places are on the coast that is drawn, to half a degree."
    path = Path(rsir_nb.__file__).parent / "world.json"
    assert path.stat().st_size < 120_000
    for lon, lat in [(8.93, 44.41), (-0.33, 39.45), (139.8, 35.4), (-74.0, 40.6), (18.4, -33.9)]:
        near = world_lines((lon - 1, lat - 1, lon + 1, lat + 1))
        assert min(np.abs(np.concatenate(near) - [lon, lat]).max(1)) < 1.1, (lon, lat)
        assert shapely.MultiLineString(near).distance(shapely.Point(lon, lat)) < .5, (lon, lat)
    assert world_lines((-40, 30, -35, 33)) == [], "the Atlantic has no coast"
    assert world_lines((6, 45, 8, 47.5), "borders"), "Switzerland has borders"


@pytest.mark.parametrize("turn", [-360, 0, 360])
def test_the_world_repeats(turn):
    here, there = world_lines((160, -50, 179, -30)), world_lines((160 + turn, -50, 179 + turn, -30))
    assert len(here) == len(there) > 0 and np.allclose(here[0] + [turn, 0], there[0])
    assert len(world_lines((170, 50, 200, 70))) > len(world_lines((170, 50, 180, 70))), "both sides of the date line"


@pytest.mark.parametrize("n", [1, 2, 30, 101])
def test_marks_do_not_overlap(n):
    rng = np.random.default_rng(n)
    points = rng.normal(size=(n, 2))*rng.choice([0, 10, 100])
    moved = spread(points, 20, 16)
    gaps = np.abs(moved[:, None] - moved[None])
    assert (((gaps[..., 0] < 20 - 1e-6) & (gaps[..., 1] < 16 - 1e-6)).sum(1) == 1).all()
    assert np.array_equal(moved[0], points[0])
    assert np.array_equal(spread(40*np.arange(2*n).reshape(n, 2), 20, 16), 40*np.arange(2*n).reshape(n, 2)), "nothing to move"
    assert spread(np.empty((0, 2)), 20, 16).shape == (0, 2)


def pins_of(live):
    "Where pins are on the screen, in pixels at the level that is shown."
    def at(lat, lon): return np.array([lon/360, -np.arcsinh(np.tan(np.radians(lat)))/(2*np.pi)])*256*2**live.widget.zoom
    return np.array([at(*o.location) - o.icon.icon_anchor for o in live.pins])


def test_pins_of_neighbours_are_moved_apart():
    pytest.importorskip("ipyleaflet", reason="ipyleaflet is not installed")
    live = HitMap(ranking([(10 + i/1e4, 44, 10.001 + i/1e4, 44.001) for i in range(12)] + [(30, 50, 30.01, 50.01)]))
    def free():
        gaps = np.abs(pins_of(live)[:, None] - pins_of(live)[None])
        return ((gaps[..., 0] < 19) & (gaps[..., 1] < 15)).sum() == len(live.pins)
    moved = [list(o.icon.icon_anchor) for o in live.pins]
    assert free() and moved[0] == [10, 8] != moved[1]
    live.widget.zoom = 16
    assert free() and moved != [list(o.icon.icon_anchor) for o in live.pins], "anew at each level"
    coasts = [o for o in live.widget.layers if getattr(o, "data", {}).get("geometry", {}).get("type") == "MultiLineString"]
    assert len(coasts) == 3 and sum(len(o.data["geometry"]["coordinates"]) for o in coasts) > 50, "graticule, coasts, borders"


@pytest.mark.parametrize("query", [None, (10, 44, 10.001, 44.001)], ids=["no place", "a place"])
def test_numbers_of_the_static_map_are_apart(query):
    hits = [(10 + i/1e4, 44, 10.001 + i/1e4, 44.001) for i in range(12)]
    ax = map_picture(ranking([*hits, (30, 50, 30.01, 50.01)], query))
    ax.figure.canvas.draw()
    boxes = [Text.get_window_extent(o) for o in ax.texts] # without their lines
    overlaps = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    assert len(boxes) == 13 + bool(query) and not overlaps
    assert not ax.child_axes, "it is large enough to know where it is"
    assert len(map_picture(ranking([(10, 44, 10.01, 44.01)])).child_axes) == 1, "a small one says where it is"


def test_hits_far_down_the_list_have_a_map():
    "None of the numbered ones has a place."
    assert not map_picture(ranking([None]*30 + [(10, 44, 10.01, 44.01)])).texts
