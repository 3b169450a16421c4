"""Vectors made elsewhere: files of every kind, ids, labels, dates and places, and the whole line over them."""
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyproj import Transformer
from shapely import Point, box, to_wkb, wkb
from sklearn.metrics.pairwise import cosine_similarity

from rsir_nb.cli import main
from rsir_nb.config import load_config
from rsir_nb.core import DATASETS, CorruptError, InputError, MissingFileError, UnknownNameError
from rsir_nb.data.features import class_lists, read_arrays
from rsir_nb.data.vectors import VectorArchive, pick_vectors, vector_places
from rsir_nb.engine.evaluate import evaluate
from rsir_nb.engine.hash import train_hash
from rsir_nb.engine.parts import build_archive, build_method, load_method
from rsir_nb.engine.retriever import open_search
from rsir_nb.engine.stages import index_run
from rsir_nb.engine.train import pretrain
from rsir_nb.geo import wkb_box, write_geoparquet

rng = np.random.default_rng(11)
N, D = 120, 12
KIND = rng.integers(3, size=N)
X = (rng.normal(size=(3, D))[KIND] + 0.4*rng.normal(size=(N, D)) + 2).astype("float32")
LON, LAT = 8 + rng.random(N), 46 + rng.random(N)


def table(**changes):
    return pd.DataFrame(dict(item_id=[f"t{i:03d}" for i in range(N)], embeddings=list(X), label=np.array(["field", "lake", "town"])[KIND],
                             cloud=np.linspace(0, 1, N), datetime=pd.date_range("2024-01-01", periods=N, tz="UTC"),
                             geometry=[wkb_box(a, b, a + 0.01, b + 0.01) for a, b in zip(LON, LAT, strict=True)]) | changes)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory): return write_geoparquet(table(), tmp_path_factory.mktemp("v")/"clay.parquet")


# files

@pytest.mark.parametrize("kind", ["list", "large_list", "fixed", "float16", "chunks"])
def test_vectors_of_a_parquet_column(tmp_path, kind):
    x = X.astype("float16") if kind == "float16" else X
    flat = pa.array(x.ravel())
    if kind in ("fixed", "float16"): column = pa.FixedSizeListArray.from_arrays(flat, D)
    elif kind == "large_list": column = pa.LargeListArray.from_arrays(np.arange(0, N*D + 1, D), flat)
    else: column = pa.ListArray.from_arrays(np.arange(0, N*D + 1, D, dtype="int32"), flat)
    pq.write_table(pa.table(dict(emb=column)), tmp_path/"a.parquet", row_group_size=17 if kind == "chunks" else None)
    assert np.array_equal(read_arrays(tmp_path/"a.parquet")["emb"], x)
    archive = VectorArchive(tmp_path/"a.parquet")
    assert np.array_equal(archive[7]["vector"].flatten(), x[7].astype("float32")) and archive.ids[:2] == ["0", "1"]


def test_what_a_parquet_file_may_hold(tmp_path):
    told = pd.DataFrame(dict(a=["x", None], b=[1, 2], c=[1.5, np.nan], d=[["p"], ["q"]], e=pd.to_datetime(["2020-01-01", None]),
                             f=[b"\x00\x01", None], g=[True, None]))
    told.to_parquet(tmp_path/"a.parquet")
    found = read_arrays(tmp_path/"a.parquet")
    assert found["a"].tolist() == ["x", None] and found["b"].dtype == np.int64 and np.isnan(found["c"][1])
    assert found["d"].tolist() == [["p"], ["q"]] and found["e"].dtype.kind == "M" and found["f"].tolist() == [b"\x00\x01", None]
    assert list(read_arrays(tmp_path/"a.parquet", ["b"])) == ["b"]
    with pytest.raises(UnknownNameError, match="array in .*a.parquet"): read_arrays(tmp_path/"a.parquet", ["bb"])
    (tmp_path/"b.parquet").write_bytes((tmp_path/"a.parquet").read_bytes()[:200])
    with pytest.raises(CorruptError, match="cannot be read as Parquet"): read_arrays(tmp_path/"b.parquet")
    pd.DataFrame(dict(v=[[1.], [1., 2.]])).to_parquet(tmp_path/"c.parquet")
    with pytest.raises(InputError, match="several lengths; found 1 to 2"): read_arrays(tmp_path/"c.parquet")


@pytest.mark.parametrize("ending", ["npz", "npy", "h5", "parquet", "columns"])
def test_every_file_gives_the_same_vectors(tmp_path, ending):
    path = tmp_path/f"a.{ending}"
    if ending == "npz": np.savez(path, features=X, ids=np.arange(N))
    if ending == "npy": np.save(path, X)
    if ending == "h5":
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "w") as f: f["vectors"] = X
    if ending == "parquet": table().to_parquet(path)
    if ending == "columns":
        path = tmp_path/"b.parquet"
        pd.DataFrame({f"A{i:02d}": X[:, i] for i in range(D)} | dict(lat=LAT, lon=LON, year=2024)).to_parquet(path)
    archive = VectorArchive(path)
    assert np.array_equal(torch.stack([archive[i]["vector"] for i in range(N)])[:, :, 0, 0], X)
    assert archive.sensors["vector"].in_chans == D


def test_which_array_holds_the_vectors():
    file = dict(a=X, b=X + 1, embedding=X + 2, labels=np.eye(3)[KIND])
    assert pick_vectors(file)[1] == ["embedding"] and pick_vectors(file, "b")[1] == ["b"]
    assert np.array_equal(pick_vectors({f"f{i}": X[:, i] for i in (10, 2, 0)}, "f*")[0], X[:, [0, 2, 10]]), "columns in the order of numbers"
    assert pick_vectors(dict(x=LON, y=LAT), ["y", "x"])[0].shape == (N, 2)
    with pytest.raises(InputError, match="not clear which array of the file holds the vectors; found a, b"): pick_vectors(dict(a=X, b=X))
    with pytest.raises(InputError, match="not clear"): pick_vectors({f"{o}{i}": LON for i in range(4) for o in "ab"})
    with pytest.raises(UnknownNameError, match="did you mean embedding"): pick_vectors(file, "embeding")
    with pytest.raises(InputError, match="holds no vectors"): pick_vectors(dict(a=np.zeros((2, 3, 4))), "a")


def test_a_folder_of_files(tmp_path):
    for i in range(3): table().iloc[40*i:40*i + 40].to_parquet(tmp_path/f"part{i}.parquet")
    archive = VectorArchive(tmp_path)
    assert archive.ids == table().item_id.tolist() and np.array_equal(archive[95]["vector"].flatten(), X[95])
    assert archive.table.source.nunique() == 3
    assert VectorArchive([tmp_path/"part1.parquet"]).ids[0] == "t040"
    np.save(tmp_path/"wide.npy", X[:, :5])
    with pytest.raises(InputError, match=r"several lengths; found \[5, 12\]"): VectorArchive([tmp_path/"part1.parquet", tmp_path/"wide.npy"])
    with pytest.raises(MissingFileError): VectorArchive(tmp_path/"nowhere.parquet")
    with pytest.raises(MissingFileError): VectorArchive([])


# what belongs to a vector

def test_table_of_a_published_file(parquet):
    archive = VectorArchive(parquet)
    t = archive.table
    assert t.id.tolist() == table().item_id.tolist() and list(archive.vocab) == ["field", "lake", "town"]
    assert archive.targets.tolist() == KIND.tolist() and np.allclose(t.cloud, np.linspace(0, 1, N))
    assert t.date[3] == pd.Timestamp("2024-01-04") and t.geometry[5] == table().geometry[5] and "embeddings" not in t


@pytest.mark.parametrize("labels, how, want", [
    (["a;b", "b"]*60, dict(separator=";"), [["a", "b"], ["b"]]), ([["x"], ["x", "y"]]*60, {}, [["x"], ["x", "y"]]),
    ([3, 10]*60, {}, [["3"], ["10"]]), (["u", None]*60, {}, [["u"], None])])
def test_labels(tmp_path, labels, how, want):
    table(label=labels).to_parquet(tmp_path/"a.parquet")
    assert VectorArchive(tmp_path/"a.parquet", **how).class_names[:2] == want
    if labels[0] == 3: assert list(VectorArchive(tmp_path/"a.parquet").vocab) == ["3", "10"]


def test_labels_of_numpy_files(tmp_path):
    marks = rng.integers(0, 2, (N, 4))
    np.savez(tmp_path/"a.npz", emb=X, labels=marks, classes=list("wxyz"), split=["train", "validation"]*60)
    archive = VectorArchive(tmp_path/"a.npz", "emb")
    assert np.array_equal(archive.labels, marks) and archive.table.split[1] == "val"
    assert class_lists(np.array([1, 0]), ["sea", "land"])[0] == [["land"], ["sea"]]
    assert class_lists(np.array(["b", "a"]))[1] == ["a", "b"]


def test_columns_by_name(tmp_path):
    table().rename(columns=dict(item_id="key", label="town", datetime="seen")).to_parquet(tmp_path/"a.parquet")
    plain = VectorArchive(tmp_path/"a.parquet")
    assert plain.vocab is None and "date" not in plain.table and plain.ids[0] == "0"
    named = VectorArchive(tmp_path/"a.parquet", id="key", labels="town", date="seen", split=dict(a=1, b=1))
    assert named.ids[0] == "t000" and len(named.vocab) == 3 and set(named.table.split) == {"a", "b"}
    with pytest.raises(UnknownNameError, match="did you mean key"): VectorArchive(tmp_path/"a.parquet", id="keys")
    with pytest.raises(InputError, match="dates that cannot be read; found "): VectorArchive(tmp_path/"a.parquet", date="town")
    table(item_id=["a", *["b"]*(N - 1)]).to_parquet(tmp_path/"b.parquet")
    with pytest.raises(InputError, match="ids are not unique; found 'b'"): VectorArchive(tmp_path/"b.parquet")
    table(item_id=[None, *map(str, range(N - 1))]).to_parquet(tmp_path/"c.parquet")
    with pytest.raises(InputError, match="rows without an id; found 1 of 120"): VectorArchive(tmp_path/"c.parquet")


# places

def test_places_in_another_coordinate_system(tmp_path):
    geopandas_like = pa.table(dict(emb=list(X), geom=pa.array([to_wkb(Point(5e5 + 100*i, 5.2e6)) for i in range(N)], pa.binary())))
    from json import dumps
    from pyproj import CRS
    meta = dict(version="1.1.0", primary_column="geom", columns=dict(geom=dict(encoding="WKB", geometry_types=["Point"],
                                                                              crs=CRS.from_epsg(32632).to_json_dict())))
    pq.write_table(geopandas_like.replace_schema_metadata({b"geo": dumps(meta).encode()}), tmp_path/"a.parquet")
    archive = VectorArchive(tmp_path/"a.parquet")
    want = Transformer.from_crs(32632, 4326, always_xy=True).transform(5e5 + 700, 5.2e6)
    assert np.allclose(wkb.loads(archive.table.geometry[7]).coords[0], want, atol=1e-9) and "geom" not in archive.table
    meta["columns"]["geom"]["encoding"] = "point"
    pq.write_table(geopandas_like.replace_schema_metadata({b"geo": dumps(meta).encode()}), tmp_path/"b.parquet")
    with pytest.raises(InputError, match="are not WKB; found point"): VectorArchive(tmp_path/"b.parquet")


def test_places_of_columns(tmp_path):
    np.savez(tmp_path/"a.npz", emb=X, longitude=LON, latitude=np.where(np.arange(N) == 3, np.nan, LAT))
    places = VectorArchive(tmp_path/"a.npz").table.geometry
    assert np.allclose(wkb.loads(places[5]).coords[0], (LON[5], LAT[5])) and places[3] is None
    bounds = np.stack([LON, LAT, LON + 0.1, LAT + 0.2], 1)
    np.savez(tmp_path/"b.npz", emb=X, bounds=bounds)
    assert wkb.loads(VectorArchive(tmp_path/"b.npz", "emb").table.geometry[5]).equals(box(*bounds[5]))
    np.savez(tmp_path/"c.npz", emb=X, x=LON*1e5, y=LAT*1e5)
    with pytest.raises(InputError, match="are no degrees"): VectorArchive(tmp_path/"c.npz", "emb", lonlat=["x", "y"])
    with pytest.raises(UnknownNameError): VectorArchive(tmp_path/"c.npz", "emb", lonlat=["x", "z"])
    assert vector_places(dict(emb=X), tmp_path/"c.npz") is None


# bad rows

def test_bad_vectors_are_counted_and_named(tmp_path, caplog):
    x = X.copy()
    x[3, 2], x[5] = np.nan, 0
    table(embeddings=[None, *x[1:]]).to_parquet(tmp_path/"a.parquet")
    archive = VectorArchive(tmp_path/"a.parquet")
    assert len(archive) == N - 3 and archive.skipped.source.tolist() == ["t000", "t003", "t005"]
    assert "117 of 120 vectors are used, 3 left out; the first: the vector of t000 cannot be used; found missing numbers" in caplog.text
    assert np.array_equal(archive["t006"]["vector"].flatten(), X[6])
    with pytest.raises(InputError, match="vector of t000"): VectorArchive(tmp_path/"a.parquet", on_error="raise")
    table(embeddings=list(np.where(np.arange(N)[:, None] < 70, np.nan, X))).to_parquet(tmp_path/"b.parquet")
    with pytest.raises(InputError, match="loses most of its vectors; found 50 of 120"): VectorArchive(tmp_path/"b.parquet")
    np.savez(tmp_path/"c.npz", emb=X, id=np.arange(7))
    with pytest.raises(InputError, match="differ in length; found {'id': 7}; wanted 120"): VectorArchive(tmp_path/"c.npz")


# the whole line

def config(path, out, *more): return load_config("vectors", [f"data.path={path}", f"out={out}", *more])


@pytest.mark.parametrize("how", ["plain", "centred", "l2", "fit"])
def test_answers_are_those_of_the_vectors(parquet, tmp_path, how):
    more = dict(plain=[], centred=["method.centre=true"], l2=["method.distance=l2"], fit=["method.norm=fit"])[how]
    run = pretrain(config(parquet, tmp_path/"run", *more), progress=False)
    index_run(run, progress=False)
    x = X - X.mean(0) if how in ("centred", "fit") else X
    if how == "fit": x = x/X.std(0)
    score = -((x[:, None] - x)**2).sum(-1) if how == "l2" else cosine_similarity(x)
    search = open_search(run)
    for i in 0, 17:
        want = np.argsort(-score[i], kind="stable")
        found = search.query(f"t{i:03d}", k=20).hits["id"].tolist()
        assert len(set(found) & {f"t{j:03d}" for j in want[want != i][:20]}) >= 19, "embeddings are kept in half precision"
        assert found[0] == f"t{want[want != i][0]:03d}"


def test_hash_query_by_file_and_evaluate(parquet, tmp_path, capsys):
    run = pretrain(config(parquet, tmp_path/"run"), progress=False)
    train_hash(run, progress=False, n_bits=64, epochs=5, min_steps=60)
    index_run(run, progress=False)
    search = open_search(run)
    assert search.store.n_bits == 64
    np.save(tmp_path/"q.npy", X[4])
    assert search.query(str(tmp_path/"q.npy"), k=1).hits["id"].tolist() == ["t004"]
    inside = search.query("t004", k=50, box=[8, 46, 8.5, 46.5]).hits["id"]
    assert 0 < len(inside) < 50 and all(LON[int(o[1:])] <= 8.5 for o in inside)
    found = evaluate(run, protocol="leave_one_out", progress=False)
    text = found.summary().to_string()
    assert "binary" in text and "float" in text and "chance" in text
    assert main(["query", str(run), "t004", "-k", "2", "--geojson", str(tmp_path/"h.geojson")]) == 0
    assert "Polygon" in (tmp_path/"h.geojson").read_text()
    np.save(tmp_path/"q.npy", X[4][:5])
    with pytest.raises(InputError, match=r"fits no sensor; found shape \(5, 1, 1\)"): search.query(str(tmp_path/"q.npy"))
    (tmp_path/"q.npy").write_bytes(b"text")
    with pytest.raises(InputError, match="cannot be read as an array"): search.query(str(tmp_path/"q.npy"))


def test_pictures(tmp_path, parquet):
    from PIL import Image
    plain = VectorArchive(parquet)
    x = plain.picture(0, "vector")
    assert x.shape == (4, 4, 3) and x.min() == 0 and x.max() == 1
    Image.fromarray(np.full((30, 20, 3), (255, 0, 51), "uint8")).save(tmp_path/"a.png")
    table(image=["a.png", *[None]*(N - 1)]).to_parquet(tmp_path/"v.parquet")
    shown = VectorArchive(tmp_path/"v.parquet", pictures="image")
    assert np.allclose(shown.picture("t000", "vector")[90, 90], (1, 0, 0.2)) and shown.picture("t001", "vector").shape == (4, 4, 3)
    with pytest.raises(UnknownNameError, match="did you mean image"): VectorArchive(tmp_path/"v.parquet", pictures="images")


def test_methods_that_do_not_fit(parquet, tmp_path):
    cfg = load_config("baseline", ["data=vectors", f"data.path={parquet}"])
    with pytest.raises(InputError, match="no band statistics.*method=vectors"):
        archive = build_archive(cfg.data)
        build_method(cfg, archive).fit(archive)
    (tmp_path/"a").mkdir()
    from PIL import Image
    Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype="uint8")).save(tmp_path/"a"/"x.png")
    cfg = load_config("vectors", ["data=class_folders", f"data.root={tmp_path}"])
    with pytest.raises(InputError, match="takes vectors, which are images of one pixel; found 8x8"): build_method(cfg, build_archive(cfg.data))
    with pytest.raises(UnknownNameError, match="did you mean cosine"):
        cfg = config(parquet, tmp_path/"r", "method.distance=cosin")
        build_method(cfg, build_archive(cfg.data))


def test_a_saved_method_comes_back(parquet, tmp_path):
    run = pretrain(config(parquet, tmp_path/"run", "method.centre=true"), progress=False)
    method = load_method(run)
    assert method.centre and torch.allclose(method.mean_vector, torch.tensor(X).mean(0), atol=1e-5)
    assert "vectors" in DATASETS.list()


def test_two_modalities_of_a_parquet_file(tmp_path):
    "The archive of features reads Parquet, too."
    pd.DataFrame(dict(ids=[f"i{k}" for k in range(N)], s1=list(X), s2=list(X[:, :5]))).to_parquet(tmp_path/"a.parquet")
    archive = DATASETS.create("features", path=tmp_path/"a.parquet", arrays=dict(s1="s1", s2="s2"))
    assert archive["i7"]["s1"].shape == (D, 1, 1) and archive["i7"]["s2"].shape == (5, 1, 1)
