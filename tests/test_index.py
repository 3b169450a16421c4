"What every kind of index must have, and how the place of an index says which kind it is."
import inspect

import numpy as np
import pytest
from rsir_nb.core import INDEXES, CorruptError, InputError, MissingFileError, UnknownNameError
from rsir_nb.live.index import LiveIndex
from rsir_nb.remote.engines import RemoteIndex, address_scheme, index_class, index_schemes, open_index, without_password
from rsir_nb.retrieval.hamming import HammingIndex
from rsir_nb.retrieval.index import Index, check_filter, choose_ids, merge_nearest, merge_ranges
from rsir_nb.retrieval.local import LocalIndex
from rsir_nb.retrieval.vectors import VectorIndex

PUBLIC = "add", "search", "range_search", "remove", "save", "ids", "__len__"


@pytest.mark.parametrize("name", INDEXES.list())
def test_every_registered_index_is_complete(name):
    cls, meta = INDEXES.get(name), INDEXES.info(name)
    assert issubclass(cls, Index) and not inspect.isabstract(cls)
    assert issubclass(cls, RemoteIndex) == bool(meta.get("schemes")), "an index beyond this process has an address"
    assert not issubclass(cls, LocalIndex) or cls.kind == name, "a file says by which name its class is registered"
    for o in PUBLIC: assert inspect.getdoc(getattr(cls, o)) or o == "__len__"


def test_one_that_forgot_something_is_refused():
    for base, missing in (Index, "_range_search"), (LocalIndex, "_within"), (RemoteIndex, "open"):
        names = {o for o in base.__abstractmethods__ if o != missing}
        cls = type("Incomplete", (base,), {o: lambda self: None for o in names})
        with pytest.raises(TypeError, match=missing): cls()


def test_ids_are_checked_in_one_place():
    held = lambda some: some[some % 2 == 0]
    assert choose_ids(None, 3, 5, held).tolist() == [5, 6, 7] and choose_ids([9, 6], 2, 5, held).tolist() == [9, 6]
    for ids, n, told in ([4], 1, "in the index already"), ([7, 7], 2, "given twice"), ([1], 2, "differ in number"), \
                        ([-1], 1, "whole numbers"):
        with pytest.raises(InputError, match=told): choose_ids(ids, n, 5, held)
    with pytest.raises(InputError, match="no id left"): choose_ids(None, 2, 2**63 - 2, held)
    assert check_filter([2, 0], 9).dtype == np.int64 and check_filter(np.ones(3, bool), 3).dtype == bool


def test_merging_keeps_the_order_of_insertion():
    rng = np.random.default_rng(0)
    codes, xq = rng.integers(0, 4, (90, 1), dtype=np.uint8), rng.integers(0, 4, (7, 1), dtype=np.uint8)
    whole, parts = HammingIndex(8), [HammingIndex(8) for _ in range(3)]
    whole.add(codes)
    for i, o in enumerate(parts): o.add(codes[30*i:30*(i + 1)], range(30*i, 30*(i + 1)))
    for k in 1, 40, 200:
        for a, b in zip(merge_nearest([o.search(xq, k) for o in parts], k), whole.search(xq, k), strict=True):
            np.testing.assert_array_equal(a, b)
    for a, b in zip(merge_ranges([o.range_search(xq, 1) for o in parts]), whole.range_search(xq, 1), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


@pytest.mark.parametrize("name", [o for o in INDEXES.list() if issubclass(INDEXES.get(o), LocalIndex)])
def test_a_file_says_which_kind_it_is(name, tmp_path):
    cls = INDEXES.get(name)
    ix = cls(16)
    ix.add(np.ones((3, 16), np.float32) if cls is VectorIndex else np.ones((3, 2), np.uint8))
    found = open_index(ix.save(tmp_path/"some.file"), mmap=False)
    assert type(found) is cls and found.ids.tolist() == [0, 1, 2]
    with pytest.raises(InputError, match="another length"): open_index(tmp_path/"some.file", n_bits=64)


def test_a_folder_says_which_kind_it_is(tmp_path):
    LiveIndex.create(tmp_path/"a", n_bits=8)
    assert isinstance(open_index(tmp_path/"a", threads=1), LiveIndex)
    (tmp_path/"b").mkdir()
    with pytest.raises(MissingFileError, match="manifest or shards.json"): open_index(tmp_path/"b")
    (tmp_path/"c").write_text("not an index")
    with pytest.raises(CorruptError, match="no index"): open_index(tmp_path/"c")
    with pytest.raises(MissingFileError, match="not there"): open_index(tmp_path/"d")


def test_addresses_belong_to_engines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert dict(postgresql="postgres", postgres="postgres", ray="ray").items() <= index_schemes().items()
    for where, scheme in {"postgresql://h/d": "postgresql", "POSTGRES://h/d": "postgres", "ray:folder": "ray", "host=h dbname=d": "postgresql",
                          "runs/a.index": None, "C:/codes": None, "engine=hamming": None}.items(): assert address_scheme(where) == scheme
    (tmp_path/"ray:here").mkdir()
    assert address_scheme("ray:here") is None, "what is there is a path"
    with pytest.raises(UnknownNameError, match="did you mean postgres"): index_class("postgrsql://h/d")
    named = {o: index_class(o).named(o, "s1") for o in ("ray://h:1/f", "postgresql://h/d?mode=hnsw", "postgres://h/d")}
    assert list(named.values()) == ["ray://h:1/f/s1", "postgresql://h/d?mode=hnsw&table=s1", "postgres://h/d?table=s1"]
    with pytest.raises(InputError, match="wanted a URL"): index_class("host=h").named("host=h", "s1")


@pytest.mark.parametrize("address, shown", [
    ("postgresql://me:secret@host/db", "postgresql://me@host/db"), ("ray://head:6379/folder", "ray://head:6379/folder"),
    ("host=a password='se secret' user=me", "host=a user=me"), ("password = secret host=a", "host=a"),
    ("toy://h/d?password=secret&x=1", "toy://h/d?x=1"), ("codes/a:b@c", "codes/a:b@c")])
def test_a_password_is_taken_out_of_any_address(address, shown): assert without_password(address) == shown
