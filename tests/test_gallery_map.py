"Maps of hits: footprints, the date line, round degrees, and what happens without places."
import numpy as np
import pandas as pd
import pytest
from shapely.geometry import box as shapely_box
from shapely.geometry import shape

from rsir_nb.core import InputError
from rsir_nb.gallery.map import (HitMap, bounds_of, corners, cut_of, degrees_text, graticule, graticule_steps,
                                 hit_footprints, map_html, map_picture, side_by_side)
from rsir_nb.geo import wkb_box
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
