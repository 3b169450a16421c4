"The retriever: ids, files, arrays, filters, feedback; parts that do not belong together are refused."
import shutil

import numpy as np
import pytest
import rasterio
import torch

from engine_run import tiny_config
from rsir_nb.core import CorruptError, InputError, MissingFileError, UnknownNameError, read_json
from rsir_nb.data.base import TensorArchive
from rsir_nb.engine.encode import encode
from rsir_nb.engine.hash import train_hash
from rsir_nb.engine.retriever import Retriever
from rsir_nb.engine.parts import build_archive, build_method, load_method
from rsir_nb.engine.train import pretrain
from rsir_nb.engine.weighted import rocchio, weighted_distances, weighted_nearest
from rsir_nb.retrieval.codes import pack_bits, unpack_bits


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A trained run with hash heads."
    cfg = tiny_config(tmp_path_factory.mktemp("search")/"run", "optim.epochs=1")
    pretrain(cfg, progress=False)
    train_hash(cfg.out, progress=False)
    return cfg


@pytest.fixture(scope="module")
def archive(run): return build_archive(run.data)


@pytest.fixture(scope="module")
def retriever(run, archive): return Retriever.build(load_method(run.out), archive, f"{run.out}/search", progress=False)


def hamming(a, b): return np.bitwise_count(a ^ b).sum(-1)


def test_query_by_id_is_a_stable_sort_of_the_distances(retriever, archive):
    for source in "s1", "s2":
        for target in "s1", "s2":
            got = retriever.query(archive.ids[7], source=source, target=target, k=48)
            d = hamming(np.asarray(retriever.store.codes[target]), retriever.store.codes[source][7])
            order = [i for i in np.argsort(d, kind="stable") if source != target or i != 7]
            assert got.ids == [archive.ids[i] for i in order]
            assert np.array_equal(got.dists, d[order])


def test_a_patch_is_not_its_own_answer_wherever_it_ranks(tmp_path, retriever):
    store, method = retriever.store, retriever.method
    same = {m: np.repeat(np.asarray(x[:1]), 6, axis=0) for m, x in store.codes.items()}
    twins = type(store).write(tmp_path/"twins", same, store.table.iloc[:6].drop(columns=["has_s1", "has_s2"]),
                              method.weights_hash)
    got = Retriever.build(method, twins, tmp_path/"r").query(twins.ids[3], source="s1", k=3)
    assert got.ids == [twins.ids[i] for i in (0, 1, 2)] and got.dists.tolist() == [0, 0, 0]


def test_array_file_sample_and_id_find_the_same(tmp_path, retriever, archive):
    patch = archive[9]
    by_id = retriever.query(archive.ids[9], source="s1", target="s2", k=5)
    assert retriever.query(patch["s1"], target="s2", k=5).ids == by_id.ids
    assert retriever.query(patch["s1"].numpy(), target="s2", k=5).ids == by_id.ids
    assert retriever.query(patch, source="s1", target="s2", k=5).ids == by_id.ids
    path, metres = tmp_path/"patch.tif", retriever.ask.ground[1] / 30
    def write(pixel):
        corner = rasterio.transform.from_origin(500_000, 5_300_000, pixel, pixel)
        with rasterio.open(path, "w", driver="GTiff", width=30, height=30, count=2, dtype="float32",
                           transform=corner, crs="EPSG:32632") as f:
            f.write(patch["s1"].numpy())
            f.descriptions = ("VH", "VV")
    write(metres)
    by_file = retriever.query(path, target="s2", k=5)
    assert by_file.ids == by_id.ids and by_file.query["id"] == "patch.tif" and by_file.query["sensor"] == "s1"
    assert retriever.query(str(path), target="s2", k=5).ids == by_id.ids
    write(metres / 2)
    with pytest.raises(InputError, match="found 30x30 pixels; wanted 60x60"): retriever.query(path, target="s2")
    assert retriever.query(path, target="s2", k=5, file={"fit": "resample"}).ids == by_id.ids


def test_embeddings_are_searched_by_cosine(retriever, archive):
    z = np.float64(np.float32(retriever.store.embeddings["s2"]))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    got = retriever.query(archive.ids[0], source="s2", k=10, by="embeddings")
    assert got.ids == [archive.ids[i] for i in np.argsort(-(z @ z[0]), kind="stable") if i != 0][:10]
    assert np.allclose(got.dists, 1 - np.sort(-(z @ z[0]))[1:11]*-1, atol=1e-5)
    assert got.n_bits is None


def test_filters(retriever, archive):
    table, name = retriever.table, archive.ids[0]
    test = (table["split"] == "test").to_numpy()
    a = retriever.query(name, target="s2", k=100, where="split == 'test'")
    assert set(a.ids) == set(table["id"][test])
    assert retriever.query(name, target="s2", k=100, where=test).ids == a.ids
    assert retriever.query(name, target="s2", k=100, where=table["id"][test].tolist()).ids == a.ids
    assert retriever.query(name, target="s2", k=100, where=np.flatnonzero(test)).ids == a.ids
    with pytest.raises(InputError, match="mask does not fit"): retriever.query(name, where=test[:5])
    with pytest.raises(InputError, match="condition on id, place"): retriever.query(name, where="splt == 3")
    with pytest.raises(UnknownNameError, match="did you mean"): retriever.query(name, where=["tiny_00"])


def test_no_table_is_read_before_it_is_needed(run, retriever):
    fresh = Retriever.load(retriever.path)
    code = np.asarray(fresh.store.codes["s1"][:1])
    fresh.search_codes(code, fresh.method.weights_hash, "s1", k=2)
    assert fresh.store._table is None and "filters" not in vars(fresh.ask)
    assert fresh.rows_where(label="lake").tolist() == [i for i, o in enumerate(fresh.table["labels"]) if "lake" in o]


def test_short_and_empty_results_say_so(retriever, archive):
    few = retriever.query(archive.ids[0], target="s2", k=1000)
    assert len(few) == 48 and "48 of the 1000 asked for" in repr(few)
    none = retriever.query(archive.ids[0], where="place == 'nowhere'")
    assert len(none) == 0 and len(none.table()) == 0 and "0 of the 10" in repr(none)
    with pytest.raises(InputError, match="number of results"): retriever.query(archive.ids[0], k=0)


def test_questions_that_make_no_sense(tmp_path, retriever, archive):
    x = archive[0]
    with pytest.raises(UnknownNameError, match="did you mean tiny_00"): retriever.query("tiny_0000")
    with pytest.raises(InputError, match="no sensor"): retriever.query(torch.zeros(3, 30, 30))
    with pytest.raises(InputError, match="no sensor"): retriever.query(x["s1"], source="s2")
    with pytest.raises(InputError, match="decibels"): retriever.query(10**(x["s1"]/10))
    with pytest.raises(InputError, match="30 x 30"): retriever.query(x["s1"][:, :20, :20])
    with pytest.raises(UnknownNameError, match="s1"): retriever.query(archive.ids[0], target="s3")
    with pytest.raises(UnknownNameError, match="s1"): retriever.query(archive.ids[0], source="s3")
    with pytest.raises(UnknownNameError, match="codes"): retriever.query(archive.ids[0], by="code")
    (tmp_path/"no.tif").write_text("this is text")
    with pytest.raises(CorruptError, match="no.tif cannot be read"): retriever.query(tmp_path/"no.tif")
    with pytest.raises(MissingFileError, match="missing.tif"): retriever.query(tmp_path/"missing.tif")
    with pytest.raises(UnknownNameError, match="fit"): retriever.query(tmp_path/"no.tif", file={"fitt": "centre"})


def test_other_weights_and_other_lengths_are_refused(tmp_path, run, retriever, archive):
    fresh = build_method(run, archive)
    with pytest.raises(InputError, match="other weights"): Retriever(fresh, retriever.store, retriever.indexes)
    with pytest.raises(InputError, match="other weights"): Retriever.build(fresh, retriever.store, tmp_path/"a")
    with pytest.raises(InputError, match="another weights"): Retriever.build(fresh, archive, retriever.path, progress=False)
    codes = np.asarray(retriever.store.codes["s1"][:2])
    with pytest.raises(InputError, match="other weights"): retriever.search_codes(codes, fresh.weights_hash, "s1")
    with pytest.raises(InputError, match="another length"):
        retriever.search_codes(np.hstack([codes, codes]), retriever.method.weights_hash, "s1")
    dists, rows = retriever.search_codes(codes, retriever.method.weights_hash, "s1", k=4)
    assert dists.shape == rows.shape == (2, 4) and (dists[:, 0] == 0).all()


def test_saved_and_loaded(tmp_path, retriever, archive):
    copy = Retriever.load(retriever.save(tmp_path/"copy"), mmap=False, archive=archive)
    a, b = (o.query(archive.ids[3], target="s2", k=7) for o in (retriever, copy))
    assert a.ids == b.ids and a.dists.tolist() == b.dists.tolist() and copy.archive is archive
    with pytest.raises(InputError, match="there already"): retriever.save(tmp_path/"copy")
    told = read_json(tmp_path/"copy"/"retriever.json")
    assert told["weights"] == retriever.method.weights_hash


def test_parts_that_do_not_belong_together(tmp_path, run, retriever, archive):
    path = retriever.save(tmp_path/"copy")
    (path/"retriever.json").unlink()
    with pytest.raises(MissingFileError, match="no complete retriever"): Retriever.load(path)
    assert Retriever.build(retriever.method, archive, path, progress=False).query(archive.ids[0], k=1).ids   # mended
    index = path/"index"/"s1.index"
    raw = bytearray(index.read_bytes())
    raw[-70] ^= 1
    index.write_bytes(raw)
    with pytest.raises(CorruptError, match="s1.index"): Retriever.load(path)
    shutil.rmtree(path/"codes")
    encode(retriever.method, archive.subset(range(9)), path/"codes", progress=False)
    with pytest.raises(CorruptError, match="index of other codes"): Retriever.load(path)


def test_built_twice_and_from_a_store(tmp_path, retriever, archive):
    again = Retriever.build(retriever.method, retriever.store, tmp_path/"r")
    assert again.query(archive.ids[0], k=3).ids == retriever.query(archive.ids[0], k=3).ids
    before = (tmp_path/"r"/"index"/"s1.index").stat().st_mtime_ns
    Retriever.build(retriever.method, retriever.store, tmp_path/"r")
    assert (tmp_path/"r"/"index"/"s1.index").stat().st_mtime_ns == before


def test_a_method_without_codes_searches_embeddings(tmp_path, run, archive):
    plain = Retriever.build(build_method(run, archive), archive, tmp_path/"r", progress=False)
    got = plain.query(archive.ids[2], target="s2", k=4)
    assert len(got) == 4 and got.n_bits is None
    with pytest.raises(InputError, match="rsir hash"): plain.query(archive.ids[2], target="s2", by="codes")


def test_patches_that_one_sensor_has_not_seen(tmp_path, run, retriever, archive):
    class Blind(type(archive)):
        def read(self, i):
            patch = super().read(i)
            if i % 3 == 0: del patch["s1"]
            return patch
    some = Blind()
    r = Retriever.build(retriever.method, some, tmp_path/"r", progress=False)
    got = r.query(some.ids[1], target="s1", k=100)
    assert set(got.ids) == {o for i, o in enumerate(some.ids) if i % 3} - {some.ids[1]}
    assert r.query(some.ids[0], k=1).query["sensor"] == "s2"   # the only sensor that has seen it
    with pytest.raises(UnknownNameError, match="s2"): r.query(some.ids[0], source="s1")


def test_empty_archive_is_refused(tmp_path, retriever, archive):
    with pytest.raises(InputError, match="none of the 0 patches"):
        Retriever.build(retriever.method, archive.subset([]), tmp_path/"r", progress=False)


def test_weighted_distances_against_the_definition():
    rng = np.random.default_rng(0)
    codes, v = rng.integers(0, 256, (50, 4), dtype=np.uint8), rng.normal(size=32).astype(np.float32)
    bits = unpack_bits(codes).astype(bool)
    wanted = np.where(bits != (v > 0), np.abs(v.astype(np.float64)), 0).sum(1)
    assert np.allclose(weighted_distances(v, codes), wanted, rtol=1e-5)
    q, p, n = codes[:1], codes[1:4], codes[4:6]
    by_hand = (2.*bits[0] - 1) + .75*(2.*bits[1:4] - 1).mean(0) - .25*(2.*bits[4:6] - 1).mean(0)
    assert np.allclose(rocchio(q, p, n), by_hand)
    assert np.array_equal(weighted_distances(rocchio(q, p[:0], n[:0]), codes), hamming(codes, q))


def test_feedback_moves_the_answer(tmp_path, retriever):
    rng = np.random.default_rng(1)
    kind = np.arange(60) % 3
    centres = rng.integers(0, 2, (3, 16))
    bits = centres[kind] ^ (rng.random((60, 16)) < 0.1)
    table = retriever.table.iloc[:48].copy()
    codes = pack_bits(bits[:48].astype(np.uint8))
    store = type(retriever.store).write(tmp_path/"codes", dict(s1=codes), table.drop(columns=["has_s1", "has_s2"]),
                                        retriever.method.weights_hash)
    r = Retriever.build(retriever.method, store, tmp_path/"r")
    ids, good = np.array(store.ids), kind[:48] == 1
    first = r.query(ids[0], source="s1", k=10)
    after = r.feedback(ids[0], positive=ids[good][:4], negative=first.ids[:5], source="s1", k=10)
    assert np.isin(after.ids, ids[good]).mean() > np.isin(first.ids, ids[good]).mean()
    assert not set(after.ids) & {*first.ids[:5], ids[0]} and (np.diff(after.dists) >= 0).all()
    only = r.feedback(ids[0], positive=ids[good][:4], source="s1", k=10, where=ids[good].tolist())
    assert set(only.ids) <= set(ids[good])
    assert r.feedback(ids[0], source="s1", k=5).ids == r.query(ids[0], source="s1", k=5).ids
    with pytest.raises(UnknownNameError): r.feedback(ids[0], positive=["nobody"], source="s1")


def test_pictures(retriever, archive):
    with_pictures = Retriever(retriever.method, retriever.store, retriever.indexes, archive=archive)
    html = with_pictures.query(archive[4]["s1"], target="s2", k=3).to_html()
    assert html.count("<img") == 4
    assert "<img" not in Retriever.load(retriever.path).query(archive.ids[0], k=3).to_html()


def test_tensor_archive_ids_are_strings(tmp_path, retriever, archive):
    x = torch.stack([archive[i]["s2"] for i in range(4)])
    r = Retriever.build(retriever.method, TensorArchive({"s2": x}), tmp_path/"r", progress=False)
    assert r.query("0", k=2).query["id"] == "0"


def cosines(retriever, target, source, row):
    "1 - cos of every patch's embedding and one, in float64."
    x, q = (np.float64(np.float32(retriever.store.embeddings[m])) for m in (target, source))
    unit = lambda o: o/np.linalg.norm(o, axis=-1, keepdims=True)
    return 1 - unit(x) @ unit(q[row])


@pytest.mark.parametrize("source, target", [("s1", "s1"), ("s1", "s2"), ("s2", "s1")])
@pytest.mark.parametrize("rescore", [1, 3, 100])
@pytest.mark.parametrize("where", [None, "split == 'test'"])
def test_rescored_hits_are_the_shortlist_in_the_order_of_its_embeddings(retriever, archive, source, target, rescore, where):
    k, row = 4, 9
    bits = hamming(np.asarray(retriever.store.codes[target]), retriever.store.codes[source][row])
    fine = cosines(retriever, target, source, row)
    allowed = [i for i in range(48) if (source != target or i != row) and (not where or retriever.table["split"][i] == "test")]
    short = sorted(allowed, key=lambda i: (bits[i], i))[:k*rescore]
    got = retriever.query(archive.ids[row], source=source, target=target, k=k, rescore=rescore, where=where)
    assert len(got) == min(k, len(allowed)) and set(got.rows) <= set(short)
    assert np.allclose(got.dists, np.sort(fine[short])[:k], atol=1e-6)
    assert got.table()["hamming"].tolist() == bits[got.rows].tolist() and got.n_bits is None
    assert np.allclose(got.table()["distance"], fine[got.rows], atol=1e-6) and "hamming" in got.to_text()
    if rescore == 100:
        assert got.ids == retriever.query(archive.ids[row], source=source, target=target, k=k, by="embeddings", where=where).ids


def test_rescore_needs_embeddings_and_a_number(tmp_path, retriever, archive):
    name = archive.ids[0]
    for bad in 0, -1, 1.5, True, "3":
        with pytest.raises(InputError, match="rescore.*whole number"): retriever.query(name, rescore=bad)
    with pytest.raises(InputError, match="nothing to score again"): retriever.query(name, by="embeddings", rescore=2)
    with pytest.raises(InputError, match="number of results"): retriever.query(name, k=0, rescore=2)
    bare = Retriever.build(retriever.method, archive, tmp_path/"r", progress=False, embeddings=False)
    with pytest.raises(InputError, match="embeddings=True"): bare.query(name, rescore=2)
    assert len(retriever.query(name, rescore=3, where="place == 'nowhere'")) == 0


def test_within_a_radius(retriever, archive):
    for source, target in ("s1", "s1"), ("s2", "s1"):
        bits = hamming(np.asarray(retriever.store.codes[target]), retriever.store.codes[source][5])
        for radius in 0, 3, 16:
            allowed = [i for i in range(48) if bits[i] <= radius and (source != target or i != 5)]
            got = retriever.within(archive.ids[5], radius, source=source, target=target)
            assert got.rows.tolist() == sorted(allowed, key=lambda i: (bits[i], i)) and (got.dists == bits[got.rows]).all()
            assert f"within {radius} bits" in repr(got) and "asked for" not in repr(got)
            assert retriever.within(archive.ids[5], radius, source=source, target=target, k=2).ids == got.ids[:2]
            lakes = retriever.within(archive.ids[5], radius, source=source, target=target, label="lake")
            assert lakes.ids == [i for i, o in zip(got.ids, got.hits["labels"], strict=True) if "lake" in o]
    for bad in -1, 17, 2.5, None, True:
        with pytest.raises(InputError, match="no radius.*0 to 16"): retriever.within(archive.ids[0], bad)
    with pytest.raises(InputError, match="number of results"): retriever.within(archive.ids[0], 3, k=0)
    with pytest.raises(UnknownNameError, match="did you mean where"): retriever.within(archive.ids[0], 3, wher="x")


@pytest.mark.parametrize("target", ["s1", "s2"])
@pytest.mark.parametrize("label", [None, "lake"])
def test_the_nearest_of_several_examples(retriever, archive, target, label):
    rows, codes = [3, 30, 17], np.asarray(retriever.store.codes[target])
    bits = np.min([hamming(codes, retriever.store.codes["s1"][i]) for i in rows], axis=0)
    allowed = [i for i in range(48) if (target != "s1" or i not in rows) and (not label or label in retriever.table["labels"][i])]
    wanted = sorted(allowed, key=lambda i: (bits[i], i))
    for k in 1, 5, 100:
        got = retriever.query_many([archive.ids[i] for i in rows], "min", source="s1", target=target, k=k, label=label)
        assert got.rows.tolist() == wanted[:k] and (got.dists == bits[got.rows]).all() and got.n_bits == 16


@pytest.mark.parametrize("target", ["s1", "s2"])
def test_what_several_examples_have_in_common(retriever, archive, target):
    rows = [3, 30, 17, 8]
    votes = (2.*unpack_bits(retriever.store.codes["s1"][rows]) - 1).mean(0)
    wrong = unpack_bits(np.asarray(retriever.store.codes[target])).astype(bool) != (votes > 0)
    cost = (wrong*np.abs(votes)).sum(1)
    allowed = [i for i in range(48) if target != "s1" or i not in rows]
    got = retriever.query_many([archive.ids[i] for i in rows], source="s1", target=target, k=9)
    assert got.rows.tolist() == sorted(allowed, key=lambda i: (cost[i], i))[:9] and np.allclose(got.dists, cost[got.rows])
    labels = [set(retriever.table["labels"][i]) for i in rows]
    assert got.query["labels"] == sorted(set.intersection(*labels))
    nearest = retriever.query_many([archive.ids[i] for i in rows], "min", source="s1", target=target)
    assert nearest.query["labels"] == sorted(set.union(*labels)) and " + " in repr(nearest)


def test_examples_of_many_kinds(retriever, archive, tmp_path):
    mixed = retriever.query_many([archive.ids[0], archive[5]["s2"], archive[9]["s1"].numpy()], target="s2", k=4)
    assert len(mixed) == 4 and "sensor" not in mixed.query and mixed.query["ids"] == [archive.ids[0], "array", "array"]
    for combine in "mean", "min":
        one = retriever.query_many([archive.ids[4]], combine, source="s1", k=6)
        assert one.ids == retriever.query(archive.ids[4], source="s1", k=6).ids and one.query["id"] == archive.ids[4]
        assert len(retriever.query_many(archive.ids[:5], combine, source="s1", k=100)) == 43
        with pytest.raises(InputError, match="number of results"): retriever.query_many(archive.ids[:2], combine, k=0)
    for bad in "tiny_001", [], ():
        with pytest.raises(InputError, match="no examples"): retriever.query_many(bad)
    with pytest.raises(UnknownNameError, match="mean"): retriever.query_many(archive.ids[:2], "median")
    with pytest.raises(UnknownNameError, match="did you mean label"): retriever.query_many(archive.ids[:2], labels="lake")
    shown = Retriever(retriever.method, retriever.store, retriever.indexes, archive=archive)
    assert shown.query_many(archive.ids[:3], k=2).to_html().count("<img") == 3


def test_never_fewer_than_there_are(retriever, archive):
    "Whatever the filters: as many hits as asked for, or all that match."
    kinds = dict(where="split != 'train'", label="lake", box=(11.05, 47, 11.3, 49))
    for pick in range(8):
        chosen = {k: v for i, (k, v) in enumerate(kinds.items()) if pick >> i & 1}
        rows = retriever.rows_where(**chosen)
        allowed = set(range(48) if rows is None else rows.tolist()) - {0}
        for k in 1, 7, 48:
            for got in (retriever.query(archive.ids[0], k=k, **chosen), retriever.query(archive.ids[0], k=k, by="embeddings", **chosen),
                        retriever.query(archive.ids[0], k=k, rescore=2, **chosen), retriever.feedback(archive.ids[0], k=k, **chosen),
                        retriever.query_many([archive.ids[0]], k=k, **chosen)):
                assert len(got) == min(k, len(allowed)) and set(got.rows.tolist()) <= allowed
    assert retriever.query(archive.ids[0], k=1, box=kinds["box"]).info["box"] == "(11.05, 47, 11.3, 49)"
    with pytest.raises(InputError, match="known date"): retriever.query(archive.ids[0], dates=("2018", None))


def test_weighted_search_in_blocks():
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 4, (300, 4), dtype=np.uint8)                     # few values, so many ties
    v = rng.integers(-2, 3, 32).astype(np.float32)
    for rows in None, np.flatnonzero(rng.random(300) < .4), np.empty(0, np.int64):
        all_rows = np.arange(300) if rows is None else rows
        order = all_rows[np.argsort(weighted_distances(v, codes)[all_rows], kind="stable")]
        for k in 1, 10, 77, 1000:
            for block in 7, 64, 1000:
                dists, got = weighted_nearest(v, codes, k, rows, block)
                assert got.tolist() == order[:k].tolist() and np.array_equal(dists, weighted_distances(v, codes)[got])
    with pytest.raises(InputError, match="another length"): weighted_nearest(v[:16], codes, 3)
