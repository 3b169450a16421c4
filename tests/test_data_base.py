"Archives, vocabularies, splits and the check of patches."
import bz2
import pickle

import numpy as np
import pandas as pd
import pytest
import torch

from rsir_nb.core import InputError, MissingFileError, UnknownNameError
from rsir_nb.data.base import Archive, Subset, TensorArchive, concat_archives
from rsir_nb.data.classes import Vocab
from rsir_nb.data.split_lists import assign_splits, read_split_csv, read_split_csvs, split_by_place
from rsir_nb.data.checks import check_patch, to_grid
from rsir_nb.sensors import SENSORS

RNG = np.random.default_rng(0)


def make(n=6, **kwargs):
    kwargs = dict(labels=[["Pastures"], ["Arable land", "Pastures"]] * (n // 2), **kwargs)
    return TensorArchive(dict(s1=RNG.normal(-14, 4, (n, 2, 8, 8)), s2=RNG.gamma(4, 400, (n, 10, 8, 8))),
                         ids=[f"p{i}" for i in range(n)], **kwargs)


def test_contract():
    archive = make(split=["train"] * 3 + ["validation"] * 3)
    sample = archive["p4"]
    assert set(sample) == {"id", "s1", "s2", "labels"} and sample["s1"].dtype == torch.float32
    assert archive[4]["id"] == archive[-2]["id"] == archive[np.int64(4)]["id"] == "p4"
    assert archive.labels.dtype == np.uint8 and archive.labels.tolist() == [[0, 1], [1, 1]] * 3
    assert archive.split("val").ids == archive.split("validation").ids == ["p3", "p4", "p5"]
    assert [o["id"] for o in archive] == archive.ids
    for bad in (6, -7):
        with pytest.raises(IndexError): archive[bad]
    with pytest.raises(TypeError): archive[1:3]
    with pytest.raises(UnknownNameError, match="did you mean p4"): archive["p44"]
    assert "6 patches" in archive._repr_markdown_()
    assert pickle.loads(pickle.dumps(archive)).ids == archive.ids


def test_an_archive_needs_unique_ids_and_a_reader():
    table = pd.DataFrame(dict(id=["a", "a"]))
    with pytest.raises(InputError, match="not unique"): Archive(table, dict(s1="s1"))
    with pytest.raises(InputError, match="no column 'id'"): Archive(table.rename(columns=dict(id="name")), {})
    with pytest.raises(InputError, match="no method `read`"): Archive(table[:1], dict(s1="s1"))[0]
    with pytest.raises(InputError, match="does not fit its sensor"): TensorArchive(dict(s1=np.zeros((2, 3, 8, 8))))


def test_unknown_labels_are_absent_not_empty():
    archive = make()
    archive.table["labels"] = pd.Series([["Pastures"], None, np.array(["Arable land"], dtype=object), [], float("nan"),
                                         ("Pastures",)], dtype=object)
    assert [("labels" in archive[i]) for i in range(6)] == [True, False, True, True, False, True]
    assert archive.labels.sum(1).tolist() == [1, 0, 1, 0, 0, 1]


def test_vocab():
    vocab = Vocab(["Water", "Fields"])
    assert vocab.decode(vocab.encode(["FIELDS", "water"])) == ["Water", "Fields"] and len(vocab) == 2
    assert vocab == pickle.loads(pickle.dumps(vocab)) and vocab != Vocab(["Fields", "Water"])
    with pytest.raises(UnknownNameError): vocab.encode(["fire"])
    with pytest.raises(InputError, match="twice"): Vocab(["a", "A"])


def test_subsets():
    archive = make()
    part = archive.subset([5, 3, 1])
    again = part.subset(np.array([True, False, True]))
    assert part.ids == ["p5", "p3", "p1"] and again.ids == ["p5", "p1"]
    assert isinstance(again, Subset) and again.whole is archive, "subsets of subsets stay flat"
    torch.testing.assert_close(again["p1"]["s2"], archive["p1"]["s2"])
    np.testing.assert_array_equal(part.labels, archive.labels[[5, 3, 1]])
    assert archive.subset(["p2", "p0"]).ids == ["p2", "p0"] and len(archive.subset([])) == 0
    with pytest.raises(InputError, match="mask"): archive.subset(np.ones(5, bool))
    with pytest.raises(UnknownNameError): archive.subset(["p9"])
    with pytest.raises(UnknownNameError): archive.split("train")


def test_concat():
    a, b = make(4), TensorArchive(dict(s1=RNG.normal(-14, 4, (2, 2, 8, 8))), ids=["r0", "r1"])
    both = concat_archives([a, b, make(2).subset([])])
    assert both.ids == [*a.ids, "r0", "r1"] and "s2" not in both["r1"] and "labels" not in both[4]
    torch.testing.assert_close(both["r1"]["s1"], b[1]["s1"])
    torch.testing.assert_close(both["p3"]["s2"], a[3]["s2"])
    assert both.has("s1").all() and both.has("s1", "s2").tolist() == [True] * 4 + [False] * 2
    assert both.subset([5, 0]).has("s2").tolist() == [False, True]
    assert both.labels.shape == (6, 2)
    with pytest.raises(InputError, match="different sensors"):
        concat_archives([b, TensorArchive(dict(s1=np.zeros((1, 3, 8, 8))), dict(s1="rgb"), ids=["c"])])
    other = TensorArchive(dict(s1=np.zeros((1, 2, 8, 8))), ids=["q"], labels=[["Sea"]])
    with pytest.raises(InputError, match="different classes"): concat_archives([a, other])


@pytest.mark.parametrize("seed", range(5))
def test_splits_keep_places_whole(seed):
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(dict(place=rng.integers(0, 40, 1000).astype(str)))
    table["split"] = split_by_place(table, dict(train=0.6, val=0.2, test=0.2), seed)
    assert table.groupby("place")["split"].nunique().max() == 1
    parts = table["split"].value_counts(normalize=True)
    for name, want in dict(train=0.6, val=0.2, test=0.2).items(): assert abs(parts[name] - want) < 0.05
    mixed = table.sample(frac=1, random_state=seed)
    again = split_by_place(mixed.drop(columns="split"), seed=seed)
    assert (mixed["split"] == again).all(), "the order of the rows does not matter"


def test_splits_of_few_places():
    table = pd.DataFrame(dict(place=list("abc") * 2))
    assert set(split_by_place(table, dict(train=0.98, val=0.01, test=0.01))) == {"train", "val", "test"}
    with pytest.raises(InputError, match="too few places"): split_by_place(table[:2])
    with pytest.raises(InputError, match="'place'"): split_by_place(table.rename(columns=dict(place="x")))


def test_split_files(tmp_path):
    (tmp_path / "train.csv").write_text("b,x\na,y\n\n")
    (tmp_path / "val.csv.bz2").write_bytes(bz2.compress(b"c\n"))
    splits = read_split_csvs(tmp_path)
    assert splits == dict(train=["b", "a"], val=["c"]) and assign_splits("abcd", splits) == ["train", "train", "val", None]
    (tmp_path / "test.csv").write_text("c\n")
    with pytest.raises(InputError, match="two splits"): read_split_csvs(tmp_path)
    (tmp_path / "test.csv").write_text("")
    with pytest.raises(InputError, match="no list"): read_split_csv(tmp_path / "test.csv")
    with pytest.raises(MissingFileError): read_split_csvs(tmp_path / "no")


def test_published_splits(shared):
    splits = read_split_csvs(shared / "data/bigearthnet_metadata")
    assert {k: len(o) for k, o in splits.items()} == dict(train=269_695, val=123_723, test=125_866)


@pytest.mark.parametrize("align_corners", [True, False])
def test_to_grid_is_torch_interpolate(align_corners):
    x = RNG.integers(0, 9000, (6, 60, 60)).astype("uint16")
    want = torch.nn.functional.interpolate(torch.tensor(x.astype("float32"))[None], size=(120, 120), mode="bicubic",
                                           align_corners=align_corners)[0]
    torch.testing.assert_close(to_grid(x, 120, align_corners=align_corners), want, rtol=0, atol=0)
    torch.testing.assert_close(to_grid(x[0], 120, align_corners=align_corners), want[0], rtol=1e-6, atol=1e-2)
    assert to_grid(x, 60).dtype == torch.float32 and to_grid(torch.from_numpy(x[0].astype("int16")), 30).shape == (30, 30)
    flipped = to_grid(x[:, ::-1, ::-1], 120, align_corners=align_corners)
    torch.testing.assert_close(flipped, want.flip(-1, -2), rtol=1e-5, atol=0.1)


GOOD = dict(s1=RNG.normal(-14, 4, (2, 8, 8)), s2=RNG.gamma(4, 400, (10, 8, 8)), rgb=RNG.integers(0, 256, (3, 8, 8)))
BAD = [("s1", lambda x: 10 ** (x / 10), r"10\*log10"), ("s1", lambda x: np.where(x < -14, -9999, x), "nodata"),
       ("s1", lambda x: np.where(x < -14, np.nan, x), "NaN or infinity in"), ("s1", lambda x: x * -np.inf, "infinity"),
       ("s1", lambda x: x[:1], r"2 bands \(VH, VV\)"), ("s1", lambda x: x[0], "2 bands"), ("s1", lambda x: x * 0, "nodata"),
       ("s1", lambda x: x[:, :4], "4x8 pixels; wanted 8x8"), ("s1", lambda x: x[:, :0], "0x8 pixels"),
       ("s2", lambda x: x / 10000, "multiply by 10000"), ("s2", lambda x: x * 1000, "another scale"),
       ("s2", lambda x: x[:4], "an array of 4x8x8; wanted 10 bands"), ("s2", lambda x: x * 0, "it is nodata"),
       ("rgb", lambda x: x / 255, "multiply by 255"), ("rgb", lambda x: x * 100, "0..255")]


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("sensor,spoil,words", BAD)
def test_bad_patches_are_refused_in_one_line(sensor, spoil, words, as_tensor):
    x = spoil(GOOD[sensor])
    with pytest.raises(InputError, match=words) as caught:
        check_patch(torch.tensor(x) if as_tensor else x, sensor, "scene.tif", size=8)
    text = str(caught.value)
    assert text.startswith("scene.tif cannot be used as") and "found" in text and "wanted" in text and "\n" not in text


@pytest.mark.parametrize("sensor", GOOD)
def test_good_patches_pass(sensor):
    x = GOOD[sensor]
    check_patch(x, sensor, "scene.tif", size=8)
    check_patch(torch.tensor(x, dtype=torch.float32), SENSORS[sensor], "scene.tif")
    partly = x.copy()
    partly[:, :3] = 0
    check_patch(partly, sensor, "scene.tif")
    if sensor != "s1": check_patch(x.astype("uint16"), sensor, "scene.tif")
    check_patch(np.broadcast_to(x[:, :1, :1], x.shape), sensor, "flat.tif")


def test_real_patches_pass(shared):
    from rsir_nb.data.lmdb import LmdbReader
    from rsir_nb.data.records import load_v1_record
    reader = LmdbReader(shared / "data/configilm_ben_lmdb/BENv1/BigEarthNetEncoded.lmdb")
    for key in reader.keys():
        bands = reader.use(key, load_v1_record)["bands"]
        for name in ("s1", "s2"):
            check_patch(torch.stack([to_grid(bands[b], 120) for b in SENSORS[name].bands]), name, key.decode(), 120)
