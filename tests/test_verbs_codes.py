"`rsir codes`: what each verb does in a folder and with a file, and what it says of what cannot be."
import numpy as np
import pandas as pd
import pytest
from rsir_nb.cli import main
from rsir_nb.core import InputError, MissingFileError
from rsir_nb.retrieval.hamming import HammingIndex
from rsir_nb.verbs_codes import hits_table, load_array

pytest.importorskip("rsir_nb.live.index")
pytest.importorskip("rsir_nb.remote.engines")


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A folder with codes, their ids and queries, which is the working directory."
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (500, 8), dtype=np.uint8)
    np.save("codes.npy", codes)
    np.save("ids.npy", np.arange(500)*3 + 10)
    np.save("queries.npy", codes[:7] ^ 5)
    return tmp_path


def told(capsys, line, status=0):
    capsys.readouterr()
    assert main(["codes", *line.split()]) == status, line
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return err if status else out


def expected(k=None, within=None, keep=slice(None)):
    "(query, id, distance) by brute force, ties in the order of insertion."
    codes, ids = np.load("codes.npy")[keep], np.load("ids.npy")[keep]
    rows = []
    for q, x in enumerate(np.load("queries.npy")):
        d = np.bitwise_count(codes ^ x).sum(1)
        order = np.argsort(d, kind="stable")[:k]
        rows += [(q, int(ids[i]), int(d[i])) for i in order if within is None or d[i] <= within]
    return rows


def found(path):
    table = pd.read_csv(path)
    assert (table.groupby("query").cumcount() + 1 == table["rank"]).all()
    return list(table[["query", "id", "distance"]].itertuples(index=False, name=None))


def test_a_folder_from_making_to_compacting(here, capsys):
    assert "0 codes of 64 bits" in told(capsys, "create store --bits 64")
    assert "500 added, 500 in all" in told(capsys, "add store codes.npy --ids ids.npy")
    out = told(capsys, "search store queries.npy -k 6 --out hits.csv -n 2")
    assert out.count("query ") == 2 and "7 queries, 42 hits" in out and found("hits.csv") == expected(k=6)
    told(capsys, "search store queries.npy --within 22 --out near.csv")
    assert found("near.csv") == expected(within=22) and len(expected(within=22)) > 7
    assert "3 removed, 497 left" in told(capsys, "remove store 10 13 16")
    np.save("gone.npy", np.array([19, 22]))
    assert "2 removed, 495 left" in told(capsys, "remove store gone.npy")
    told(capsys, "search store queries.npy -k 4 --out left.csv")
    assert found("left.csv") == expected(k=4, keep=slice(5, None))
    info = told(capsys, "info store")
    assert "items: 495" in info and "n_bits: 64" in info and "deleted: 5" in info
    assert "bytes less" in told(capsys, "compact store") and "deleted: 0" in told(capsys, "info store")
    assert "all 495 codes" in told(capsys, "verify store")
    told(capsys, "search store queries.npy -k 4 --out again.csv")
    assert found("again.csv") == found("left.csv")


def test_a_file_is_searched_and_begins_a_folder(here, capsys):
    index = HammingIndex(n_bits=64)
    index.add(np.load("codes.npy"), np.load("ids.npy"))
    index.save("old.index")
    told(capsys, "search old.index queries.npy -k 5 --out hits.npz")
    with np.load("hits.npz") as f: assert f["dists"].shape == f["ids"].shape == (7, 5) and f["ids"][0, 0] == 10
    told(capsys, "search old.index queries.npy --within 20 --out near.npz")
    with np.load("near.npz") as f: assert f["lims"][-1] == len(f["ids"]) == len(expected(within=20))
    assert "items: 500" in told(capsys, "info old.index") and "all 500" in told(capsys, "verify old.index")
    assert "makes a folder of it" in told(capsys, "add old.index codes.npy", 2)
    assert "500 codes of 64 bits" in told(capsys, "create store --begin old.index")
    np.save("more.npy", np.zeros((2, 8), np.uint8))
    assert "502 in all" in told(capsys, "add store more.npy")
    raw = bytearray((here/"old.index").read_bytes())
    raw[len(raw)//2] ^= 1
    (here/"old.index").write_bytes(raw)
    assert "damaged" in told(capsys, "verify old.index", 2)


def test_only_some(here, capsys):
    told(capsys, "create store --bits 64")
    told(capsys, "add store codes.npy --ids ids.npy")
    np.save("only.npy", np.load("ids.npy")[100:103])
    told(capsys, "search store queries.npy --only only.npy --out hits.csv")
    assert found("hits.csv") == expected(keep=slice(100, 103))
    mask = np.zeros(500, bool)
    mask[100:103] = True
    np.save("mask.npy", mask)
    told(capsys, "search store queries.npy --only mask.npy --out same.csv")
    assert found("same.csv") == found("hits.csv")
    np.save("none.npy", np.zeros(500, bool))
    assert "query 0: nothing" in told(capsys, "search store queries.npy --only none.npy")


def test_mistakes_are_one_message(here, capsys):
    told(capsys, "create store --bits 64")
    told(capsys, "add store codes.npy --ids ids.npy")
    np.save("floats.npy", np.zeros((2, 8)))
    np.save("short.npy", np.zeros((2, 4), np.uint8))
    np.save("objects.npy", np.array([{}]), allow_pickle=True)
    np.savez("many.npz", a=np.zeros(1))
    (here/"text.npy").write_text("no array")
    for line, said in {
            "search nowhere queries.npy": "rsir codes create", "add nowhere codes.npy": "rsir codes create",
            "add store codes.npy --ids ids.npy": "given twice", "add store floats.npy": "not packed", "add store short.npy": "another length",
            "add store objects.npy": "without pickles", "add store many.npz": "several arrays", "add store text.npy": "no array",
            "add store nowhere.npy": "not there", "remove store 11": "not in the index", "remove store ten": "no ids",
            "remove store -- -3": "no ids", "search store queries.npy -k 0": "number of results", "search store short.npy": "another length",
            "search store queries.npy --within -1": "no radius", "search store queries.npy --out hits.txt": ".npz or .csv",
            "create store --bits 64": "not empty", "create other --bits 12": "multiple of 8", "create other.index": "name a folder",
            "verify nowhere": "rsir codes create", "info gopher://codes": "gopher", "create other --begin nowhere.index": "not there"}.items():
        assert said in told(capsys, line, 2), line
    assert "items: 500" in told(capsys, "info store")


def test_arrays_and_tables(here):
    assert isinstance(load_array("codes.npy"), np.memmap)
    with pytest.raises(MissingFileError): load_array("no.npy")
    with pytest.raises(InputError, match="pickles"):
        np.save("o.npy", np.array([print], object), allow_pickle=True)
        load_array("o.npy")
    empty = hits_table(dict(dists=np.empty((3, 0), np.int32), ids=np.empty((3, 0), np.int64)))
    assert len(empty) == 0 and list(empty) == ["query", "rank", "id", "distance"]
    some = hits_table(dict(lims=np.array([0, 0, 2]), dists=np.array([1, 4]), ids=np.array([9, 7])))
    assert some.values.tolist() == [[1, 1, 9, 1], [1, 2, 7, 4]]


def test_no_password_is_printed():
    from rsir_nb.verbs_codes import _told
    for where in "postgresql://me:secret@host/db", "host=a password=secret user=me", "host=a password = 'se secret' user=me", \
                 "postgresql://me@host/db?password=secret&user=me":
        assert "secret" not in _told(where) and "me" in _told(where)
    assert _told("codes/a:b") == "codes/a:b" and _told("postgresql://host/db") == "postgresql://host/db"
