"Filters: conditions give what pandas gives and reach nothing else; boxes and dates are checked against other libraries."
import datetime

import numpy as np
import pandas as pd
import pytest
from rsir_nb.core import InputError, UnknownNameError
from rsir_nb.engine.conditions import rows_matching
from rsir_nb.engine.filters import TableFilter, filter_rows
from rsir_nb.geo import wkb_box, wkb_polygon


def make_table(n=400, seed=0):
    rng = np.random.default_rng(seed)
    text = lambda *names: rng.choice(np.array(names, dtype=object), n)
    return pd.DataFrame(dict(
        id=[f"p{i:03}" for i in range(n)], split=text("train", "val", "test"), place=text("a b", "c&d", "e'f", None),
        cloud=np.where(rng.random(n) < .1, np.nan, rng.random(n)), count=rng.integers(0, 9, n), snow=rng.random(n) < .3,
        date=pd.to_datetime("2017-06-01") + pd.to_timedelta(rng.integers(0, 700*24, n), unit="h"),
        labels=pd.Series([rng.choice(["sea", "sand", "town"], rng.integers(0, 4), replace=False).tolist()
                          for _ in range(n)], dtype=object), **{"cloud cover": rng.integers(0, 100, n)}))


@pytest.fixture(scope="module")
def table(): return make_table()


@pytest.mark.parametrize("text", [
    "split == 'test'", "split != 'test'", "split in ['test', 'val']", "split not in ('test',)", "'test' == split",
    "cloud < 0.5", "cloud >= 0.2 and cloud < 0.7", "0.2 <= cloud < 0.7", "not cloud > 0.5", "~(cloud > 0.5)",
    "count != 5", "count + 1 > 2*cloud", "(count - 4)/2 >= -1", "-count < -3", "snow", "not snow and count == 3",
    "split == 'test' & count > 3", "split == 'test' | count > 3 & snow", "date > '2018'", "date <= '2017-09-03 12:00'",
    "'2017-09' <= date < '2018-01'", "`cloud cover` > 50", "place == 'c&d'", "place == \"e'f\"", "place == 'a b' | snow",
    "place.isna()", "place.notna() and snow", "place.str.startswith('a', na=False)", "count.isin([1, 2])",
    "date.dt.month == 7", "date.dt.year in [2017]", "date.dt.day_of_year < 100"])
def test_conditions_find_what_pandas_finds(table, text):
    wanted = np.flatnonzero(table.index.isin(table.query(text, engine="python").index))
    ours = text.replace(", na=False", "")
    assert rows_matching(table, ours).tolist() == wanted.tolist() and 0 < len(wanted) < len(table)
    assert rows_matching(table.set_index("id", drop=False), ours).tolist() == wanted.tolist()


def test_conditions_on_lists_and_on_texts_as_they_are(table):
    has = lambda name: np.array([name in o for o in table["labels"]])
    assert rows_matching(table, "'sea' in labels").tolist() == np.flatnonzero(has("sea")).tolist()
    both = "'sea' in labels and 'town' not in labels"
    assert rows_matching(table, both).tolist() == np.flatnonzero(has("sea") & ~has("town")).tolist()
    plain = pd.DataFrame(dict(id=["a.c", "abc", "x(y", None]))
    assert rows_matching(plain, "id.str.contains('.')").tolist() == [0]
    assert rows_matching(plain, "id.str.contains('(')").tolist() == [2]
    assert rows_matching(plain, "id.str.endswith('c')").tolist() == [0, 1]
    assert rows_matching(plain, "id < 'b'").tolist() == [0, 1] and rows_matching(plain, "id != 'abc'").tolist() == [0, 2, 3]
    zoned = pd.DataFrame(dict(date=pd.to_datetime(["2017-01-01", "2018-01-01"], utc=True)))
    assert rows_matching(zoned, "date > '2017-06'").tolist() == [1]
    old = pd.DataFrame(dict(date=["2017-01-01", "2018-01-01"], source=["a", "b"]))
    assert rows_matching(old, "datetime > '2017-06' and href == 'b'").tolist() == [1]   # as rankings call them


HOSTILE = [
    "id.to_csv('{here}')", "id.to_pickle('{here}') == 1", "@pd.read_pickle('{here}')", "@os.system('touch {here}')",
    "__import__('os').system('touch {here}')", "open('{here}', 'w')", "exec('1')", "eval('1') == 1", "id.__class__",
    "id.__class__.__init__.__globals__['os']", "(lambda: 1)() == 1", "[o for o in id]", "id.map(print)", "id.pipe(print)",
    "id.apply(exec) == 1", "f'{{id}}' == id", "(x := 3) == 3", "id.str.decode('utf-8') == 'a'", "id.values.tofile('{here}')",
    "9**9**9 > count", "count << 10**9 > 1", "'a'*10**9 == id", "count * 10**10**10 > 1", "id.str.contains('(a+)+$', regex=True)",
    "id.str.repeat(10**9) == 'a'", "count if snow else count", "id[0] == 'p000'", "{{'a': 1}} == id", "*id", "yield", "await id",
    "print(id)", "count.sum() > 3", "id.str.len() > 2", "lambda: 1", "True", "'x'", "count", "split", "1 == 1", "labels == 'sea'",
    "(" * 300 + "snow" + ")" * 300, "not " * 5000 + "snow", "+".join(["1"] * 4000) + " < count", "snow;snow", "snow\nsnow", "",
    "`", "@", "''", "\x00", "snow == ", "splt == 1", "split > 3", "split == 3", "count == 'a'", "count == True + 'a'", "date > 5",
    "date > 'spring'", "date > '99999'", "place == None", "count/0 > 1 and 1/0 > count", "snow and count", "split in 'test'",
    "count in split", "'a' in count", "split is 'test'", "count in [[1]]", "count in [id]", "x" * 10_001, "count == 1e999*'a'"]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_conditions_are_refused(table, text, tmp_path):
    with pytest.raises(InputError, match="cannot be used") as told:
        rows_matching(table, text.format(here=tmp_path/"pwned") if "{here}" in text else text)
    assert not list(tmp_path.iterdir()) and "a condition on id, split" in str(told.value) and len(str(told.value)) < 800


def test_a_row_number_is_a_row_number(table):
    assert filter_rows(table, [5, 3, 3]).tolist() == [3, 5] and filter_rows(table, []).tolist() == []
    with pytest.raises(InputError, match="not in the table"): filter_rows(table, [-1, 3])
    with pytest.raises(InputError, match="not in the table"): filter_rows(table, [len(table)])
    with pytest.raises(InputError, match="zeros and ones"): filter_rows(table, table["snow"].astype(int))
    with pytest.raises(UnknownNameError, match="did you mean p"): filter_rows(table, ["p03"])


def test_boxes_against_shapely():
    shapely, rng = pytest.importorskip("shapely"), np.random.default_rng(1)
    west, south = rng.uniform(-179, 170, 300), rng.uniform(-80, 70, 300)
    places = [None if i % 10 == 0 else wkb_box(x, y, x + w, y + h) for i, (x, y, w, h) in
              enumerate(zip(west, south, rng.uniform(.1, 9, 300), rng.uniform(.1, 9, 300), strict=True))]
    table = pd.DataFrame(dict(id=np.arange(300).astype(str), geometry=places))
    found = TableFilter(table)
    boxes = [None if o is None else shapely.from_wkb(o) for o in places]
    for _ in range(50):
        w, e = rng.uniform(-180, 180, 2)
        s, n = np.sort(rng.uniform(-90, 90, 2))
        pieces = [shapely.box(w, s, e, n)] if w <= e else [shapely.box(w, s, 180, n), shapely.box(-180, s, e, n)]
        wanted = [i for i, o in enumerate(boxes) if o is not None and any(o.intersects(p) for p in pieces)]
        assert found(box=(w, s, e, n)).tolist() == wanted


def test_patches_across_the_antimeridian():
    across = wkb_polygon([(179.9, -17), (-179.9, -17), (-179.85, -16.8), (179.95, -16.8)])
    table = pd.DataFrame(dict(id=["across", "west", "greenwich"], geometry=[across, wkb_box(170, -17, 171, -16), wkb_box(0, -17, 1, -16)]))
    rows = lambda *box: filter_rows(table, box=box).tolist()
    assert rows(179.8, -18, -179.8, -16) == [0] and rows(-180, -18, -179.86, -16) == [0] and rows(179.99, -18, 180, -16) == [0]
    assert rows(-180, -18, 180, -16) == [0, 1, 2] and rows(160, -18, 179.89, -16) == [1] and rows(-179.84, -18, 100, -16) == [2]
    assert rows(170.5, -17, -170, -16) == [0, 1] and rows(179.8, -10, -179.8, -9) == []


@pytest.mark.parametrize("box", [(1, 2, 3), "1,2,3,4", (0, 5, 1, 4), (0, -91, 1, 0), (181, 0, 182, 1), (0, 0, np.nan, 1), 7, ("a", 0, 1, 1)])
def test_bad_boxes(box):
    table = pd.DataFrame(dict(id=["a"], geometry=[wkb_box(0, 0, 1, 1)]))
    with pytest.raises(InputError, match="this is no box.*south"): filter_rows(table, box=box)


def test_no_places_and_no_dates_are_told(table):
    with pytest.raises(InputError, match="known place"): filter_rows(table, box=(0, 0, 1, 1))
    with pytest.raises(InputError, match="known date"): filter_rows(table.drop(columns="date"), dates=("2017", None))
    with pytest.raises(InputError, match="known date"): filter_rows(table.assign(date="soon"), dates=("2017", None))


def test_dates(table):
    d = table["date"]
    for span, wanted in {
            ("2017-08", "2017-09"): (d >= "2017-08-01") & (d < "2017-10-01"), ("2018", "2018"): d.dt.year == 2018,
            (None, "2017-07-14"): d < "2017-07-15", ("2018-02-03", None): d >= "2018-02-03",
            (datetime.date(2018, 2, 3), datetime.date(2018, 2, 9)): (d >= "2018-02-03") & (d < "2018-02-10"),
            (pd.Timestamp("2018-02-03 06:00"), datetime.datetime(2018, 2, 9, 6)): (d >= "2018-02-03 06:00") & (d <= "2018-02-09 06:00"),
            (2018, "2018-03-01T05"): (d >= "2018") & (d < "2018-03-01 06:00")}.items():
        assert filter_rows(table, dates=span).tolist() == np.flatnonzero(wanted).tolist() and wanted.any()
    assert filter_rows(table, dates=(None, None)) is None
    mixed = pd.DataFrame(dict(id=list("abcd"), date=["2017-06-13", "2017-06-13T10:00:00Z", None, "2019"]))
    assert filter_rows(mixed, dates=("2017-06-13", "2017-06-13")).tolist() == [0, 1]
    for bad in ("2018", "2017"), ("soon", None), "2017", ("2017",), (None, "2017-13"):
        with pytest.raises(InputError, match="date"): filter_rows(table, dates=bad)


def test_filters_go_together(table):
    rng = np.random.default_rng(3)
    table = table.assign(geometry=[wkb_box(x, 0, x + 1, 1) for x in rng.uniform(0, 20, len(table))])
    found, all_rows = TableFilter(table), np.arange(len(table))
    kinds = dict(where="split == 'test'", label="sea", box=(3, 0, 12, 1), dates=("2017-09", None))
    single = {k: set(found(**{k: v}).tolist()) for k, v in kinds.items()}
    for pick in range(16):
        chosen = {k: v for i, (k, v) in enumerate(kinds.items()) if pick >> i & 1}
        wanted = set.intersection(set(all_rows.tolist()), *(single[k] for k in chosen))
        got = found(**chosen)
        assert (set(all_rows.tolist()) if got is None else set(got.tolist())) == wanted and (got is None) == (not chosen)


def test_places_are_read_once(table, monkeypatch):
    import rsir_nb.engine.filters as module
    found = TableFilter(table.assign(geometry=[wkb_box(0, 0, 1, 1)]*len(table)))
    found(box=(0, 0, 1, 1))
    monkeypatch.setattr(module, "bounding_boxes", lambda o: pytest.fail("read again"))
    assert len(found(box=(0.5, 0.5, 2, 2))) == len(table) and not len(found(box=(2, 0, 3, 1)))
