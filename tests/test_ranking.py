"Rankings and their files, read back by others where there are others."
import json

import numpy as np
import pandas as pd
import pytest
from rsir_nb.core import InputError, UnknownNameError
from rsir_nb.geo import read_geoparquet, wkb_box
from rsir_nb.retrieval.ranking import Ranking


@pytest.fixture
def table():
    return pd.DataFrame(dict(
        id=["a", "b", "c", "d"], labels=[["Pastures", "Sea"], ["Sea"], [], ["Urban <fabric>"]],
        date=pd.to_datetime(["2026-01-01", None, "2026-03-01", "2026-04-01"]), source=["x.tif"]*4,
        has_s1=True, cloud=[0.1, np.nan, 0.3, 0.4],
        geometry=[wkb_box(i, 0, i + 1, 1) if i != 1 else None for i in range(4)]))


@pytest.fixture
def ranking(table):
    return Ranking(dict(id="q", sensor="s1", labels=["Pastures", "Sea"]), [2, 1, 0, 3], [3, 3, 9, 64], table,
                   sensor="s2", n_bits=128, k=4, info=dict(weights_hash="77"))


def picture(name, sensor): return np.full((8, 8, 3), 0.5)


def test_table(ranking):
    df = ranking.table()
    assert df["id"].tolist() == ranking.ids == ["c", "b", "a", "d"] and df["rank"].tolist() == [1, 2, 3, 4]
    assert df.hamming.tolist() == [3, 3, 9, 64] and df.score.tolist() == [1 - 3/128, 1 - 3/128, 1 - 9/128, .5]
    assert df.shared_labels.tolist() == [0, 1, 2, 0] and df.relevant.tolist() == [False, True, True, False]
    assert set(df.direction) == {"s1->s2"} and {"datetime", "href", "cloud"} <= set(df) and "has_s1" not in df
    assert ranking.relevance == [False, True, True, False]


def test_distances_of_vectors(table):
    df = Ranking("q", [0, 1], np.array([0.25, 1.], np.float32), table).table()
    assert "hamming" not in df and df.distance.tolist() == [0.25, 1] and df.score.tolist() == [0.8, 0.5]
    assert df.relevant.isna().all() and df.direction.tolist() == ["", ""]


def test_names_instead_of_rows(table):
    assert Ranking("q", ["d", "a"], [1, 2], table).rows.tolist() == [3, 0]
    with pytest.raises(UnknownNameError): Ranking("q", ["d", "z"], [1, 2], table)


def test_unknown_labels_are_not_irrelevance(table):
    for query in "q", dict(id="q", labels=[]), dict(id="q", labels=None):
        assert Ranking(query, [0], [1], table).relevance == [None]
    table["labels"] = [["Sea"], None, np.array(["Sea"]), np.nan]
    ranking = Ranking(dict(id="q", labels=("Sea",)), [0, 1, 2, 3], [1, 1, 1, 1], table)
    assert ranking.relevance == [True, None, True, None]
    assert Ranking(dict(id="q", labels=["Sea"]), [0], [1], table.drop(columns="labels")).relevance == [None]


def test_geojson_is_read_by_others(ranking, tmp_path):
    shapely = pytest.importorskip("shapely")
    path = ranking.to_geojson(tmp_path/"hits.geojson")
    strict = json.loads(path.read_text(), parse_constant=lambda o: pytest.fail(f"{o} is no JSON"))
    assert strict["type"] == "FeatureCollection" and strict["rsir_nb"]["weights_hash"] == "77"
    shapes = [f["geometry"] and shapely.geometry.shape(f["geometry"]).bounds for f in strict["features"]]
    assert shapes == [(2, 0, 3, 1), None, (0, 0, 1, 1), (3, 0, 4, 1)]
    properties = strict["features"][1]["properties"]
    assert properties["labels"] == ["Sea"] and properties["cloud"] is None and properties["datetime"] is None
    assert properties["relevant"] is True and properties["hamming"] == 3 and properties["rank"] == 2
    features = pytest.importorskip("rasterio.features")
    assert features.is_valid_geom(strict["features"][0]["geometry"])


def test_geoparquet(ranking, tmp_path):
    df = read_geoparquet(ranking.to_parquet(tmp_path/"hits.parquet"))
    assert df.geometry.tolist() == ranking.table().geometry.tolist() and df.labels.tolist()[1] == ["Sea"]
    assert df.attrs["rsir_nb"]["query"]["sensor"] == "s1" and df.attrs["geo"]["version"] == "1.1.0"
    assert df.relevant.tolist() == [False, True, True, False]


def test_csv(ranking, tmp_path):
    df = pd.read_csv(ranking.to_csv(tmp_path/"hits.csv"))
    assert df.labels.fillna("").tolist() == ["", "Sea", "Pastures; Sea", "Urban <fabric>"]
    assert json.loads(df.geometry[0])["type"] == "Polygon" and pd.isna(df.geometry[1])
    beside = json.loads((tmp_path/"hits.csv.json").read_text())
    assert beside["ties"] and beside["k"] == 4 and beside["n_bits"] == 128


def test_no_places(ranking, table, tmp_path):
    for without in table.drop(columns="geometry"), table.assign(geometry=None):
        ranking = Ranking("q", [0, 1], [1, 2], without)
        with pytest.raises(InputError, match="known place"): ranking.to_geojson(tmp_path/"hits.geojson")
        assert len(read_geoparquet(ranking.to_parquet(tmp_path/"hits.parquet"))) == 2
        assert len(pd.read_csv(ranking.to_csv(tmp_path/"hits.csv"))) == 2


def test_html(ranking, tmp_path):
    page = ranking.to_html(tmp_path/"hits.html", picture=picture)
    assert (tmp_path/"hits.html").read_text() == page
    assert page.count("<img") == 5 and page.count('alt="') == 5 and "Urban &lt;fabric&gt;" in page
    assert "Urban <fabric>" not in page and "<html lang=" in page and "weights_hash 77" in page
    assert "<img" not in ranking.to_html() and "<table" in ranking.to_html()
    assert "<table" in ranking._repr_html_()
    ranking.picture = picture
    assert ranking._repr_html_().count("<img") == 5
    assert len(ranking.show()) == 5


def test_fewer_than_asked_for_is_said(table):
    ranking = Ranking("q", [0, 1], [1, 2], table, k=10)
    assert "2 of the 10 asked for" in repr(ranking) and "2 of the 10" in ranking._repr_html_()
    empty = Ranking("q", [], [], table, sensor="s2", n_bits=128, k=10, picture=picture)
    assert len(empty.table()) == 0 and "0 of the 10" in empty._repr_html_() and empty.relevance == []


def test_bad_input(ranking, table):
    for ids, dists in ([0, 9], [1, 2]), ([-1], [1]), ([[0]], [[1]]), ([0, 1], [1]):
        with pytest.raises(InputError): Ranking("q", ids, dists, table)
    with pytest.raises(InputError, match="column 'id'"): Ranking("q", [0], [1], table.drop(columns="id"))
    with pytest.raises(InputError, match="no pictures"): ranking.show()


def test_an_empty_ranking_has_files_too(table, tmp_path):
    empty = Ranking("q", [], [], table, k=5)
    assert json.loads(empty.to_geojson(tmp_path/"a.geojson").read_text())["features"] == []
    assert len(read_geoparquet(empty.to_parquet(tmp_path/"a.parquet"))) == 0
    assert len(pd.read_csv(empty.to_csv(tmp_path/"a.csv"))) == 0
    assert "no hits" in empty.to_html(picture=picture)


def test_shapes_in_their_own_system_are_text(table, tmp_path):
    native = [wkb_box(500_000, 5_300_000, 501_200, 5_301_200)]*3 + [None]
    ranking = Ranking("q", [0, 3], [1, 2], table.assign(native_geometry=native, raw=[b"\x00\xff"]*4))
    df = pd.read_csv(ranking.to_csv(tmp_path/"hits.csv"))
    assert json.loads(df.native_geometry[0])["coordinates"][0][0] == [500_000, 5_300_000] and pd.isna(df.native_geometry[1])
    assert "b'" not in (tmp_path/"hits.csv").read_text() and json.loads(df.raw[0]) == "00ff"
    features = json.loads(ranking.to_geojson(tmp_path/"hits.geojson").read_text())["features"]
    assert json.loads(features[0]["properties"]["native_geometry"])["type"] == "Polygon"
    assert features[1]["properties"]["native_geometry"] is None and "b'" not in ranking.to_html()


def test_columns_of_a_search(table):
    ranking = Ranking(dict(ids=["a", "b"], labels=["Sea"]), [1, 0], [.1, .2], table, columns=dict(hamming=[4, 2]), info=dict(radius=9))
    assert ranking.table()["hamming"].tolist() == [4, 2] and ranking.query["id"] == "a + b" and ranking.relevance == [True, True]
    assert "hamming" in ranking.to_text() and "within 9 bits" in repr(ranking)
    ranking.picture = lambda name, sensor: np.full((8, 8, 3), dict(a=.2, b=.8).get(name, .5))
    assert ranking._cards(None)[0]["rgb"].shape == (8, 16, 3)


def test_what_is_the_same_in_all_stands_below(ranking):
    ranking.hits["split"] = "test"
    html = ranking.to_html()
    assert "The same in all: split test." in html and "<th scope=\"col\">split" not in html and "href<" not in html
    assert "The same" not in Ranking("q", [0], [1], ranking.hits).to_html()


def test_names_of_examples(table):
    name = lambda *ids: Ranking(dict(ids=ids), [0], [1], table).query["id"]
    assert (name("a"), name("a", "b"), name("a", "b", "c")) == ("a", "a + b", "a + 2 more")
