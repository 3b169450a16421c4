"""Images that lists name: every form of list, missing files, limits of classes, splits, and the published layouts."""
import gzip
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.preprocessing import MultiLabelBinarizer

from rsir_nb.cli import main
from rsir_nb.config import load_config
from rsir_nb.core import DATASETS, InputError, MissingFileError, UnknownNameError
from rsir_nb.data.image_list import ImageList
from rsir_nb.data.label_lists import ListFile, label_columns, limit_classes, list_files, read_labels, read_list, read_table
from rsir_nb.data.splits import multilabel_split
from rsir_nb.data.module import ArchiveData
from rsir_nb.engine.encode import encode
from rsir_nb.engine.evaluate import evaluate
from rsir_nb.engine.hash import train_hash
from rsir_nb.engine.parts import build_archive, build_method
from rsir_nb.engine.stages import index_run
from rsir_nb.engine.train import pretrain

rng = np.random.default_rng(3)


def picture(path, side=12):
    path.parent.mkdir(parents=True, exist_ok=True)
    x = rng.integers(0, 255, (side, side, 3), dtype="uint8")
    Image.fromarray(x).save(path)
    return x.transpose(2, 0, 1)


@pytest.fixture
def images(tmp_path):
    "Six pictures in two folders, by name."
    return {f"{d}/{d}{i}.png": picture(tmp_path/d/f"{d}{i}.png") for d in ("sea", "land") for i in range(3)}


def listed(tmp_path, text, name="list.csv", **kwargs):
    (tmp_path/name).write_text(text)
    return ImageList(tmp_path/name, **kwargs)


# forms of lists

@pytest.mark.parametrize("text, how, want", [
    ("img_path,label\na.png,3\nb.png,10\n", {}, [["3"], ["10"]]),
    ("img_path,label\na.png,3.0\nb.png,\n", {}, [["3"], None]),
    ("label;img_path\nsea;a.png\nland;b.png\n", {}, [["sea"], ["land"]]),
    ("image\tsea\tship\t\na.png\t1\t1\t\nb.png\t0\t0\t\n", {}, [["sea", "ship"], []]),
    ("image,sea,ship,split\na.png,1.0,0.0,train\nb.png,0,1,test\n", {}, [["sea"], ["ship"]]),
    ("image,tags,town\na.png,sea|ship,Kiel\nb.png,land,Rom\n", dict(labels="tags", separator="|"), [["sea", "ship"], ["land"]]),
    ("image,labels\na.png,\"['sea, open', 'ship']\"\nb.png,[]\n", dict(separator="list"), [["sea, open", "ship"], []]),
    ("image,labels\na.png,\"[\"\"sea\"\"]\"\nb.png,\n", dict(separator="list"), [["sea"], None]),
    (",image,label\n0,a.png,x\n1,b.png,y\n", {}, [["x"], ["y"]]),
    ("\ufeffimage,label\na.png,ü\nb.png,y\n", {}, [["ü"], ["y"]]),
    ("id,image,town\n1,a.png,Kiel\n2,b.png,Rom\n", dict(labels="town"), [["Kiel"], ["Rom"]]),
    ("image\na.png\nb.png\n", {}, None),
])
def test_forms_of_lists(tmp_path, text, how, want):
    (tmp_path/"a.csv").write_text(text, encoding="utf-8")
    found, _ = read_list(ListFile(tmp_path/"a.csv"), **how)
    assert found["image"].tolist() == ["a.png", "b.png"]
    assert ("labels" in found) == (want is not None)
    if want: assert found["labels"].tolist() == want


def test_columns_of_zero_and_one_against_scikit_learn(tmp_path):
    marks = rng.integers(0, 2, (50, 7))
    names = [f"c{i}" for i in range(7)]
    pd.DataFrame(marks, columns=names).assign(image=[f"{i}.png" for i in range(50)]).to_csv(tmp_path/"a.csv", index=False)
    found, order = read_list(ListFile(tmp_path/"a.csv"))
    assert order == names
    assert np.array_equal(MultiLabelBinarizer(classes=names).fit_transform(found["labels"]), marks)


def test_lists_without_a_header(tmp_path):
    (tmp_path/"a.txt").write_text("x/1.jpg\t0\t1\n")
    with pytest.raises(InputError, match="has no header; found x/1.jpg.*columns="): read_table(tmp_path/"a.txt")
    table = read_table(tmp_path/"a.txt", ["image", "sea", "ship"])
    assert label_columns(table, "image") == ["sea", "ship"] and read_labels(table, ["sea", "ship"]) == [["ship"]]
    with gzip.open(tmp_path/"a.csv.gz", "wt") as f: f.write("image,label\nx.jpg,1\n")
    assert read_table(tmp_path/"a.csv.gz")["label"].tolist() == ["1"]


@pytest.mark.parametrize("text, how, why", [
    ("image,sea\na.png,2\nb.png,1\n", dict(labels=["sea"]), "'sea' is no column of 0 and 1; found '2' in row 1"),
    ("image,a,b\na.png,x,y\nb.png,x,y\n", {}, "not clear which columns hold the labels; found a, b"),
    ("image,label\na.png,x\n,y\n", {}, "rows that name no image; found row 2, 1 in all"),
    ("image,labels\na.png,sea\n", dict(separator="list"), "holds no list; found sea"),
    ("image,label\n", {}, "is empty"), ("", {}, "cannot be read as a table"),
])
def test_lists_that_cannot_be_read(tmp_path, text, how, why):
    (tmp_path/"a.csv").write_text(text)
    with pytest.raises(InputError, match=why): read_list(ListFile(tmp_path/"a.csv"), **how)


def test_files_that_are_no_text(tmp_path):
    (tmp_path/"a.csv").write_bytes(bytes(range(256)))
    with pytest.raises(InputError, match="cannot be read as a table.*UTF-8"): read_table(tmp_path/"a.csv")
    (tmp_path/"a.xlsx").write_bytes(b"PK")
    with pytest.raises(InputError, match="save it as CSV"): read_table(tmp_path/"a.xlsx")
    with pytest.raises(MissingFileError): read_table(tmp_path/"b.csv")
    with pytest.raises(UnknownNameError, match="did you mean label"):
        (tmp_path/"c.csv").write_text("image,label\na.png,1\n")
        read_list(ListFile(tmp_path/"c.csv"), labels="labl")


# several lists

def test_lists_apart_have_the_numbers_of_offsets(tmp_path, images):
    "UniFEx numbers the sorted labels of each list and adds the number of classes before."
    labels = dict(a=[7, 3, 7], b=[5, 3, 3])
    paths = dict(a=[o for o in images if "sea" in o], b=[o for o in images if "land" in o])
    for name, y in labels.items(): pd.DataFrame(dict(img_path=paths[name], label=y)).to_csv(tmp_path/f"{name}.csv", index=False)
    want, before = [], 0
    for y in labels.values():
        known = sorted(set(y))
        want += [known.index(o) + before for o in y]
        before += len(known)
    archive = ImageList([tmp_path/"a.csv", tmp_path/"b.csv"], apart=True)
    assert list(archive.vocab) == ["a/3", "a/7", "b/3", "b/5"] and archive.targets.tolist() == want
    offset = ImageList([tmp_path/"a.csv", dict(path=tmp_path/"b.csv", offset=100)])
    assert list(offset.vocab) == ["3", "7", "103", "105"]
    named = ImageList([dict(path=tmp_path/"a.csv", prefix="cars/"), tmp_path/"b.csv"])
    assert list(named.vocab) == ["cars/3", "cars/7", "3", "5"]


def test_equal_numbers_in_two_lists_are_told(tmp_path, images, caplog):
    for name in "sea", "land": (tmp_path/f"{name}.csv").write_text(f"image,label\n{name}/{name}0.png,0\n{name}/{name}1.png,1\n")
    files = [tmp_path/"sea.csv", tmp_path/"land.csv"]
    assert ImageList(files).class_counts().tolist() == [2, 2] and "apart=true tells them apart" in caplog.text
    caplog.clear()
    halves = ImageList(dict(train=files[0], validation=files[1]))
    assert not caplog.text and halves.table["split"].tolist() == ["train"]*2 + ["val"]*2


def test_a_folder_of_lists_and_settings_of_its_own(tmp_path, images):
    (tmp_path/"lists").mkdir()
    for name in "sea", "land": (tmp_path/"lists"/f"{name}.csv").write_text(f"image,label\n{name}0.png,{name}\n")
    (tmp_path/"lists"/"notes.pdf").write_text("x")
    files = list_files(tmp_path/"lists", tmp_path)
    assert [o.path.name for o in files] == ["land.csv", "sea.csv"] and {o.root for o in files} == {tmp_path}
    own = [dict(path=tmp_path/"lists"/f"{o}.csv", root=tmp_path/o) for o in ("sea", "land")]
    archive = ImageList(own)
    assert archive.ids == ["sea0", "land0"] and np.array_equal(archive["land0"]["rgb"], images["land/land0.png"])
    with pytest.raises(UnknownNameError, match="did you mean root"): list_files([dict(path="a", rot="b")])
    with pytest.raises(InputError, match="cannot be offset; found sea; wanted whole numbers"):
        ImageList(dict(path=tmp_path/"lists"/"sea.csv", root=tmp_path/"sea", offset=3))


def test_rows_of_one_image_are_joined(tmp_path, images, caplog):
    caplog.set_level("INFO")
    archive = listed(tmp_path, "image,label\nsea/sea0.png,a\nsea/sea1.png,b\nsea/sea0.png,b\nsea/sea0.png,a\n")
    assert archive.class_names == [["a", "b"], ["b"]] and "2 rows name an image again" in caplog.text
    with pytest.raises(InputError, match="two splits; found .*sea0.png"):
        listed(tmp_path, "image,label,split\nsea/sea0.png,a,train\nsea/sea0.png,a,test\n")


# images

def test_pixels_ids_and_paths(tmp_path, images):
    rows = list(images)
    rows[1] = "/" + rows[1]
    rows[2] = rows[2].replace("/", "\\")
    rows[3] = str(tmp_path/rows[3])
    archive = listed(tmp_path, "image,label\n" + "".join(f"{o},{i}\n" for i, o in enumerate(rows)))
    assert archive.ids == [o.removesuffix(".png") for o in images]
    for name, x in images.items(): assert np.array_equal(archive[name.removesuffix(".png")]["rgb"], x)
    assert archive[2]["target"] == 2 and archive[2]["labels"].tolist() == np.eye(6)[2].tolist()
    assert torch.equal(pickle.loads(pickle.dumps(archive))[4]["rgb"], archive[4]["rgb"])
    assert archive.reading == {"rgb": {}} and archive.skipped.empty


def test_names_that_are_the_same_without_ending(tmp_path):
    picture(tmp_path/"a.png"), picture(tmp_path/"a.jpg")
    assert listed(tmp_path, "image\na.png\na.jpg\n").ids == ["a.png", "a.jpg"]
    picture(tmp_path/"x"/"1.png"), picture(tmp_path/"y"/"1.png")
    for o in "xy": (tmp_path/o/"l.csv").write_text("image,label\n1.png,0\n")
    assert len(set(ImageList([tmp_path/"x"/"l.csv", tmp_path/"y"/"l.csv"]).ids)) == 2


def test_missing_files_are_counted_and_named(tmp_path, images, caplog):
    text = "image,label\nsea/sea0.png,a\nsea/sea1.png,b\nsea/none.png,a\n"
    archive = listed(tmp_path, text)
    assert len(archive) == 2 and archive.skipped.source.tolist() == ["sea/none.png"]
    assert "2 of 3 images are used, 1 left out; the first: list.csv lists sea/none.png; found no such file below" in caplog.text
    with pytest.raises(MissingFileError, match="list.csv lists sea/none.png"): listed(tmp_path, text, on_error="raise")
    with pytest.raises(InputError, match="found 0 of 3.*root= names the folder"): listed(tmp_path, text, root=tmp_path/"sea")
    with pytest.raises(MissingFileError, match="nowhere is not there"): listed(tmp_path, text, root=tmp_path/"nowhere")
    most = "image,label\nsea/sea0.png,a\n" + "".join(f"x{i}.png,a\n" for i in range(4))
    with pytest.raises(InputError, match="loses most of its images; found 1 of 5"): listed(tmp_path, most)
    assert len(listed(tmp_path, most, on_error="skip_any")) == 1


def test_bad_images_are_left_out_with_the_missing(tmp_path, images, caplog):
    (tmp_path/"sea"/"sea1.png").write_bytes(b"no image")
    text = "image,label\n" + "".join(f"{o},a\n" for o in [*images, "x.png"])
    archive = listed(tmp_path, text)
    assert len(archive) == 5 and len(archive.skipped) == 2 and "5 of 7 images are used, 2 left out" in caplog.text
    assert len(listed(tmp_path, text, look="files", img_size=8)) == 6
    whole = (tmp_path/"sea"/"sea0.png").read_bytes()
    (tmp_path/"sea"/"sea0.png").write_bytes(whole[:len(whole)//2])
    assert len(listed(tmp_path, text)) == 5 and len(listed(tmp_path, text, look="pixels")) == 4


def test_images_by_name(tmp_path, images):
    archive = listed(tmp_path, "image,label\nsea0,a\nland2.png,b\n", by_name=True)
    assert archive.ids == ["sea/sea0", "land/land2"]
    picture(tmp_path/"more"/"sea0.png")
    with pytest.raises(MissingFileError, match="sea0; found several files of this name"):
        listed(tmp_path, "image,label\nsea0,a\n", by_name=True, on_error="raise")
    with pytest.raises(MissingFileError, match="sea9; found no file of this name"):
        listed(tmp_path, "image,label\nsea9,a\n", by_name=True, on_error="raise")


def test_dates_and_places(tmp_path):
    for o in "x_20170613.png", "y.png": picture(tmp_path/o)
    assert listed(tmp_path, "image\nx_20170613.png\ny.png\n").table.date.isna().tolist() == [False, True]
    told = listed(tmp_path, "image,date,place\nx_20170613.png,2020-02-01,Kiel\ny.png,,Rom\n").table
    assert told.date[0] == pd.Timestamp("2020-02-01") and told.place.tolist() == ["Kiel", "Rom"]
    with pytest.raises(InputError, match="dates that cannot be read; found soon"): listed(tmp_path, "image,date\ny.png,soon\n")


# classes

def test_classes_by_name_and_number(tmp_path, images, caplog):
    names = list(images)
    text = "image,label\n" + "".join(f"{o},{k}\n" for o, k in zip(names, ["b", "a", "B", "c", "a", ""], strict=True))
    archive = listed(tmp_path, text)
    assert list(archive.vocab) == ["B", "a", "c"] and archive.targets.tolist() == [0, 1, 0, 2, 1, -1]
    assert "differ in capital letters only are the same class: b and B" in caplog.text
    some = listed(tmp_path, text, classes=["c", "a"])
    assert list(some.vocab) == ["c", "a"] and some.targets.tolist() == [1, 0, 1, -1]
    with pytest.raises(UnknownNameError, match="class of these lists is called 'd'"): listed(tmp_path, text, classes=["d"])
    numbers = "image,label\n" + "".join(f"{o},{k}\n" for o, k in zip(names, [2, 10, 2, 0, 1, 1], strict=True))
    assert list(listed(tmp_path, numbers).vocab) == ["0", "1", "2", "10"], "sorted by value"
    (tmp_path/"classes.txt").write_text("\n".join(f"kind {i}" for i in range(11)) + "\n")
    read = listed(tmp_path, numbers, classes=tmp_path/"classes.txt")
    assert len(read.vocab) == 11 and read.targets.tolist() == [2, 10, 2, 0, 1, 1] and read.class_names[1] == ["kind 10"]
    with pytest.raises(InputError, match="labels and classes do not fit; found numbers 0 to 10; wanted 0 to 1"):
        listed(tmp_path, numbers, classes=["sea", "land"])
    with pytest.raises(MissingFileError): listed(tmp_path, numbers, classes="nowhere.txt")


def test_limits_of_classes():
    y = rng.integers(0, 40, 900)**2 // 30
    rows = [[str(o)] for o in y]
    left, keep = limit_classes(rows, least=10, most=25, seed=1)
    counts = pd.Series(y).value_counts()
    want = {str(k): min(n, 25) for k, n in counts.items() if n >= 10}
    assert pd.Series([o[0] for o, k in zip(left, keep, strict=True) if k]).value_counts().to_dict() == want
    assert np.array_equal(keep, limit_classes(rows, least=10, most=25, seed=1)[1])
    assert not np.array_equal(keep, limit_classes(rows, least=10, most=25, seed=2)[1])
    assert limit_classes([["a"], None, []], least=2)[1].tolist() == [False, True, True], "what is not known is kept"
    for bad in dict(least=0), dict(most=0), dict(least=5, most=4):
        with pytest.raises(InputError, match="no class can have so many"): limit_classes(rows, **bad)


def test_limits_with_several_labels():
    marks = rng.random((800, 12)) < np.geomspace(0.01, 0.6, 12)
    rows = [[f"c{j}" for j in np.flatnonzero(o)] for o in marks]
    left, keep = limit_classes(rows, least=12, most=60)
    counts = pd.Series([o for row, k in zip(left, keep, strict=True) if k for o in row]).value_counts()
    before = marks.sum(0)
    assert counts.max() <= 60 and set(counts.index) == {f"c{j}" for j in np.flatnonzero(before >= 12)}
    rare = [f"c{j}" for j in np.flatnonzero(before >= 12)][0]
    assert counts[rare] >= 0.8*before[int(rare[1:])], "rare classes are chosen first"


def test_limits_in_an_archive(tmp_path, images, caplog):
    caplog.set_level("INFO")
    text = "image,label\n" + "".join(f"{o},{k}\n" for o, k in zip(images, "aaaabc", strict=True))
    archive = listed(tmp_path, text, min_images=1, max_images=2)
    assert archive.class_counts().tolist() == [2, 1, 1] and list(archive.vocab) == ["a", "b", "c"]
    only = listed(tmp_path, text, min_images=2)
    assert list(only.vocab) == ["a"] and "1 of 3 classes and 4 of 6 images are left" in caplog.text
    with pytest.raises(InputError, match="no class has so many images"): listed(tmp_path, text, min_images=5)


# splits

def test_one_label_each_is_shared_out_exactly():
    y = rng.integers(0, 30, 2000)
    split = multilabel_split(pd.DataFrame(dict(labels=[[f"{o}"] for o in y])), seed=4)
    counts = pd.crosstab(y, split)[["train", "val", "test"]].to_numpy()
    assert np.abs(counts - counts.sum(1, keepdims=True)*[0.6, 0.2, 0.2]).max() < 1
    assert np.abs(counts.sum(0) - 2000*np.array([0.6, 0.2, 0.2])).max() <= 2


def test_many_labels_are_shared_out_better_than_by_chance():
    "The label distribution measure of Sechidis and others (2011), which is several times worse for a random split."
    marks = rng.random((3000, 60)) < np.geomspace(0.004, 0.3, 60)
    table = pd.DataFrame(dict(labels=[np.flatnonzero(o).tolist() for o in marks]))
    def measure(split):
        odds = [(marks[split == o].sum(0), (split == o).sum()) for o in ("train", "val", "test")]
        whole = marks.sum(0)/(len(marks) - marks.sum(0))
        return np.mean([np.abs(k/(n - k) - whole).mean() for k, n in odds])
    split = multilabel_split(table, seed=0)
    by_chance = [np.random.default_rng(i).permutation(split) for i in range(5)]
    assert measure(split) < 0.4*min(map(measure, by_chance))
    assert np.array_equal(split, multilabel_split(table, seed=0)) and not np.array_equal(split, multilabel_split(table, seed=1))
    sizes = pd.Series(split).value_counts(normalize=True)
    assert np.allclose(sizes[["train", "val", "test"]], [0.6, 0.2, 0.2], atol=0.01)
    test = marks[split == "test"].sum(0)
    assert (test[marks.sum(0) >= 5] > 0).all(), "no label of five patches or more is missing in the test part"


def test_splits_without_labels_and_bad_ones():
    none = pd.DataFrame(dict(labels=[None, [], ["a"], ["a"]]*5))
    assert pd.Series(multilabel_split(none, fractions=dict(a=1, b=1))).value_counts().tolist() == [10, 10]
    with pytest.raises(InputError, match="no fractions"): multilabel_split(none, fractions=dict(a=-1))
    with pytest.raises(InputError, match="nothing to split"): multilabel_split(none[:0])
    with pytest.raises(UnknownNameError): multilabel_split(none, "label")


def test_a_split_of_its_own_in_an_archive(tmp_path, images):
    text = "image,label,split\n" + "".join(f"{o},{k},test\n" for o, k in zip(images, "aaabbb", strict=True))
    own = listed(tmp_path, text, split=dict(train=2, val=1))
    assert pd.crosstab(own.targets, own.table.split).to_numpy().tolist() == [[2, 1], [2, 1]]
    assert set(listed(tmp_path, text).table.split) == {"test"}
    moved = listed(tmp_path, text.replace(",split", ",part"), split_column="part", labels="label")
    assert set(moved.table.split) == {"test"}
    bare = listed(tmp_path, "image\n" + "\n".join(images) + "\n", split=dict(a=1, b=1))
    assert bare.vocab is None and bare.table.split.value_counts().tolist() == [3, 3]


# published layouts

def config(name, root, *more): return load_config("baseline", [f"data={name}", f"data.root={root}", *more]).data


def test_mlrsnet_as_published(tmp_path):
    names = [f"label {i}" for i in range(60)]
    (tmp_path/"Labels").mkdir()
    made = {}
    for kind in "airport", "lake":
        files = [f"{kind}_{i:05d}.jpg" for i in range(1, 11)]
        for o in files: picture(tmp_path/"Images"/kind/o, 16)
        made |= dict(zip(files, rng.integers(0, 2, (10, 60)), strict=True))
        table = pd.DataFrame([made[o] for o in files], columns=names)
        table.insert(0, "image", files)
        table.to_csv(tmp_path/"Labels"/f"{kind}.csv", index=False)
    archive = build_archive(config("mlrsnet", tmp_path))
    assert list(archive.vocab) == names and archive.targets is None
    want = [made[o.split("/")[-1] + ".jpg"] for o in archive.ids]
    assert np.array_equal(archive.labels, want) and archive.ids[0] == "Images/airport/airport_00001"
    sizes = archive.table.split.value_counts()
    assert abs(sizes[["train", "val", "test"]] - [8, 2, 10]).max() <= 2 and sizes.sum() == 20


def test_ucmerced_as_published(tmp_path):
    names = "airplane bare-soil buildings cars chaparral court dock field grass mobile-home pavement sand sea ship tanks trees water".split()
    files = [f"{kind}{i:02d}" for kind in ("agricultural", "airplane") for i in range(5)]
    marks = rng.integers(0, 2, (10, 17))
    for o in files: picture(tmp_path/"Images"/o[:-2]/f"{o}.tif", 16 if o != "airplane03" else 15)
    rows = [["IMAGE\\LABEL", *names], *([o, *map(str, m)] for o, m in zip(files, marks, strict=True))]
    (tmp_path/"LandUse_Multilabeled.txt").write_text("".join("\t".join(o) + "\t\r\n" for o in rows))
    archive = build_archive(config("ucmerced_multilabel", tmp_path, "data.img_size=16"))
    assert list(archive.vocab) == names and np.array_equal(archive.labels, marks) and len(archive) == 10
    assert archive["Images/airplane/airplane03"]["rgb"].shape == (3, 16, 16)


def test_m4d_with_more_classes_than_are_written_out(tmp_path, caplog):
    "1,200 classes: an integer target per image, no rows of zeros and ones, and hash heads that need none."
    one = tmp_path/"d"/"one.jpg"
    picture(one, 16)
    y = np.repeat(np.arange(1300), 3)[:-130]
    (tmp_path/"m4d-35k_train.csv").write_text("img_path,label\n" + "".join(f"d/{i}.jpg,{k}\n" for i, k in enumerate(y)))
    for i in range(len(y)): (one.parent/f"{i}.jpg").hardlink_to(one)
    archive = build_archive(config("m4d_35k", tmp_path, "data.img_size=16"))
    assert len(archive.vocab) == 1256 and len(archive) == 3*1256, "one class with two images, which are left out"
    assert archive.targets.tolist() == y[:3*1256].tolist()
    assert "labels" not in archive[5] and archive[5]["target"].item() == 1
    with pytest.raises(InputError, match="not written out"): archive.known_labels.dense()


def test_classes_with_fewer_images_than_are_wanted(tmp_path, images, caplog):
    "Two classes of three and one: a sampler of four per class says so, and min_images leaves a class out."
    text = "image,label\n" + "".join(f"{o},{k}\n" for o, k in zip([*images][:4], "aaab", strict=True))
    archive = listed(tmp_path, text, img_size=8)
    with pytest.raises(InputError, match="2 of 2 classes have fewer than 4 patches; found 'a' with 3, 'b' with 1; rare=skip"):
        ArchiveData(archive, batch_size=4, sampler=dict(name="m_per_class", m=4))
    with pytest.raises(InputError, match="1 of 2 classes have fewer than 2 patches; found 'b' with 1"):
        ArchiveData(archive, batch_size=2, sampler=dict(name="m_per_class", m=2))
    only = listed(tmp_path, text, img_size=8, min_images=2)
    batch = next(ArchiveData(only, batch_size=2, sampler=dict(name="m_per_class", m=2)).batches())
    assert batch["target"].tolist() == [0, 0]
    (tmp_path/"list.csv").write_text(text)
    cfg = load_config("baseline", ["data=image_list", f"data.lists={tmp_path}/list.csv", "data.img_size=8", f"out={tmp_path}/run"])
    search = index_run(pretrain(cfg, progress=False), progress=False)
    assert len(search.query("sea/sea0", k=50)) == 3, "all others, and no more"
    table = evaluate(tmp_path/"run", protocol="leave_one_out", baselines=["random"], progress=False).table
    found = table.query("metric == 'map' and kind == 'float'").iloc[-1]
    assert found["n_queries"] == 4 and 0 < found["value"] <= 0.75, "no other image has the label of the fourth"


def test_hash_heads_of_an_archive_with_many_classes(tmp_path):
    picture(tmp_path/"one.png", 8)
    rows = [f"{i}.png,{i}" for i in range(1010)]
    for i in range(1010): (tmp_path/f"{i}.png").hardlink_to(tmp_path/"one.png")
    for i in range(3): picture(tmp_path/f"new{i}.png", 8)
    (tmp_path/"list.csv").write_text("\n".join(["image,label", *rows, *(f"new{i}.png,{i}" for i in range(3))]) + "\n")
    cfg = load_config("baseline", ["data=image_list", f"data.lists={tmp_path}/list.csv", f"out={tmp_path}/run"])
    run = pretrain(cfg, progress=False)
    assert train_hash(run, progress=False, n_bits=16, epochs=1, min_steps=4).heads.n_bits == 16
    with pytest.raises(InputError, match="not written out"): train_hash(run, progress=False, overwrite=True, supervised=1.)


def test_a_list_alone_is_indexed(tmp_path, images):
    text = "image,label\n" + "".join(f"{o},{k}\n" for o, k in zip(images, "aaabbb", strict=True))
    (tmp_path/"list.csv").write_text(text)
    cfg = load_config("baseline", ["data=image_list", f"data.lists={tmp_path}/list.csv", f"out={tmp_path}/run"])
    archive = build_archive(cfg.data)
    method = build_method(cfg, archive)
    method.fit(archive)
    store = encode(method, archive, tmp_path/"codes", progress=False)
    assert store.table["labels"].tolist() == [["a"]]*3 + [["b"]]*3


def test_it_is_registered():
    assert "image_list" in DATASETS.list()


def test_real_images_by_a_list(shared, tmp_path):
    "EuroSAT's classes by a list are those of its folders."
    root = shared/"data"/"eurosat_rgb"
    files = [o for k in ("Forest", "River") for o in sorted((root/k).glob("*.jpg"))[:20]]
    pd.DataFrame(dict(img_path=[str(o.relative_to(root)) for o in files], label=[o.parent.name for o in files])).to_csv(tmp_path/"l.csv", index=False)
    archive = ImageList(tmp_path/"l.csv", root)
    folders = DATASETS.create("class_folders", root=root, classes=["Forest", "River"])
    for o in archive.ids[::7]: assert torch.equal(archive[o]["rgb"], folders[o]["rgb"])
    assert archive.targets.tolist() == [0]*20 + [1]*20


def test_data_info_describes_what_a_config_names(tmp_path, images, capsys):
    (tmp_path/"list.csv").write_text("image,label\n" + "".join(f"{o},{k}\n" for o, k in zip(images, "aaaabc", strict=True)))
    assert main(["data", "info", "image_list", f"data.lists={tmp_path}/list.csv"]) == 0
    text = capsys.readouterr().out
    assert "**ImageList** of 6 patches" in text and "| patches per class | 1 to 4 |" in text
    (tmp_path/"my.yaml").write_text(f"base: baseline\ndata: {{name: image_list, lists: {tmp_path}/list.csv, max_images: 2}}\n")
    assert main(["data", "info", str(tmp_path/"my.yaml")]) == 0 and "of 4 patches" in capsys.readouterr().out
    assert main(["data", "info", "imag_list"]) == 2 and "did you mean image_list" in capsys.readouterr().err
    assert main(["data", "info", str(tmp_path), "data.a=1"]) == 2 and "takes no changes" in capsys.readouterr().err


def test_a_store_of_vectors_has_one_pixel(tmp_path, capsys):
    np.save(tmp_path/"v.npy", rng.normal(size=(6, 5)))
    assert main(["data", "convert", "vectors", str(tmp_path/"v.store"), f"data.path={tmp_path}/v.npy"]) == 0
    assert build_archive(dict(name="store", path=str(tmp_path/"v.store")))[0]["vector"].shape == (5, 1, 1)
