"The gallery without a browser: what users hand it that does not fit, and archives that lack something."
import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
from rasterio.transform import from_origin

from rsir_nb.all import import_pages
from rsir_nb.core import METHODS
from rsir_nb.data.base import TensorArchive
from rsir_nb.simulate.synthetic import SyntheticArchive
from rsir_nb.engine.encode import encode
from rsir_nb.engine.hash import paired_features
from rsir_nb.engine.retriever import Retriever
from rsir_nb.gallery import app
from rsir_nb.gallery.app import QueryGallery
from rsir_nb.engine.hash import train_heads
from rsir_nb.sensors import get_sensor


def make(archive, path):
    import_pages()
    if len(archive) == 1:
        torch.manual_seed(0)
        method = METHODS.create("csmae", sensors=archive.sensors, img_size=60, patch_size=15, embed_dim=32, num_heads=2,
                                specific_depth=1, shared_depth=1, decoder=None)
    else:
        method = METHODS.create("band_statistics", sensors=archive.sensors, img_size=60).fit(archive)
        features = paired_features(encode(method, archive, path/"features", progress=False))
        method.heads = train_heads(features, n_bits=16, min_steps=20, progress=False).heads
    return Retriever.build(method, archive, path/"search", progress=False)


@pytest.fixture(scope="module")
def archive(): return SyntheticArchive(n_places=4, patches_per_place=4, img_size=60)


@pytest.fixture(scope="module")
def retriever(archive, tmp_path_factory): return make(archive, tmp_path_factory.mktemp("gallery"))


@pytest.fixture
def gallery(retriever):
    gallery = QueryGallery(retriever, k=5)
    gallery.ask(retriever.store.ids[0], source="s2")
    return gallery


def tif(path, bands=10, size=60, crs="EPSG:32632", dtype="uint16", pixel=10):
    where = dict(crs=crs, transform=from_origin(500_000, 5_300_000, pixel, pixel)) if crs else {}
    with rasterio.open(path, "w", driver="GTiff", width=size, height=size, count=bands, dtype=dtype, **where) as file:
        if bands == 10: file.descriptions = get_sensor("s2").bands
        file.write((1000 + 500*np.random.default_rng(0).random((bands, size, size))).astype(dtype))
    return dict(name=path.name, content=path.read_bytes())


def refused(gallery, words):
    "The gallery says so, without the folder that nobody knows, and its hits stay."
    assert gallery.hits.failed and words in gallery.hits.status, gallery.hits.status
    if hasattr(gallery, "_folder"): assert gallery._folder.name not in gallery.hits.status
    assert [o["name"] for o in gallery.hits.items] == gallery.session.view.ranking.ids


def test_no_image(gallery):
    gallery.ask_upload(dict(name="notes.tif", content=b"no image"))
    refused(gallery, "notes.tif")


def test_other_bands(gallery, tmp_path):
    gallery.ask_upload(tif(tmp_path/"rgb.tif", bands=3))
    refused(gallery, "rgb.tif")
    assert "3" in gallery.hits.status


def test_too_large(gallery, monkeypatch):
    monkeypatch.setattr(app, "UPLOAD_LIMIT", 1 << 20)
    gallery.ask_upload(dict(name="huge.tif", content=bytes(3 << 20)))
    refused(gallery, "3 MB")
    assert "name its path under File" in gallery.hits.status


def test_too_many_pixels(gallery, tmp_path):
    gallery.ask_upload(tif(tmp_path/"scene.tif", size=900))
    refused(gallery, "scene.tif")


def test_another_ground(gallery, tmp_path):
    "The reason is that of the sensor whose bands the file has, not of the first one."
    gallery.ask_upload(tif(tmp_path/"coarse.tif", pixel=20))
    refused(gallery, "has not the size of a patch")
    assert "30x30 pixels" in gallery.hits.status


def test_without_a_georeference(gallery, tmp_path):
    "The ground is not known, so the size in pixels has to fit; a patch of the right size answers."
    gallery.ask_upload(tif(tmp_path/"anywhere.tif", crs=None))
    if gallery.hits.failed: refused(gallery, "anywhere.tif")
    else: assert gallery.session.view.ranking.query["id"] == "anywhere.tif" and len(gallery.hits.items) == 5


def test_a_file_that_fits(gallery, tmp_path):
    tif(tmp_path/"patch.tif")
    gallery.controls["file"].value = str(tmp_path/"patch.tif")
    assert not gallery.hits.failed, gallery.hits.status
    question = gallery.question.items[0]
    assert question["name"] == "patch.tif" and "#" in question["key"] and question["still"]
    assert gallery.question.thumbs(question["name"], "s2").startswith(b"\x89PNG")


def test_two_files_of_one_name_are_two_pictures(gallery, retriever):
    keys = []
    for i in 0, 1:
        gallery.ask(retriever.archive[i]["s2"])
        keys.append(gallery.question.items[0]["key"])
    assert keys[0] != keys[1]


def patches(n, **kwargs):
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.uniform(100, 3000, (n, 10, 60, 60)), dtype=torch.float32)
    return TensorArchive({"s2": x}, ids=[f"patch_{i}" for i in range(n)], **kwargs)


def test_without_labels_and_places(tmp_path):
    gallery = QueryGallery(make(patches(6), tmp_path), k=3)
    gallery.ask("patch_2")
    assert not gallery.hits.failed and {o["kind"] for o in gallery.hits.items} == {"none"}
    assert gallery.controls["browse_label"].options == ("any",)
    gallery.ask_place("11, 48")
    refused(gallery, "does not know where")
    gallery.hits.on_mark(gallery.hits.items[0]["name"], True)
    gallery.refine()
    assert not gallery.hits.failed and "recision" not in gallery.hits.status
    gallery.show_map(True)
    assert "no known place" in gallery.map.words.value
    gallery.export(tmp_path/"hits.geojson")
    refused(gallery, "known place")
    gallery.export(tmp_path/"hits.csv")
    assert len(pd.read_csv(tmp_path/"hits.csv")) == 3


def test_one_image(tmp_path):
    gallery = QueryGallery(make(patches(1), tmp_path), k=3)
    assert gallery.chooser.status == "Page 1 of 1, 1 patch"
    gallery.ask("patch_0")
    assert not gallery.hits.failed and gallery.hits.items == [] and gallery.hits.status.startswith("0 hits")
    gallery.export(tmp_path/"none.html")
    assert (tmp_path/"none.html").is_file()
    assert "There are no hits" in gallery.to_html()


def test_explaining_without_tokens_shows_the_bits(gallery):
    gallery.hits.on_why(gallery.hits.items[0]["name"])
    assert not gallery.hits.failed and "bits are the same" in gallery.why.value and "no tokens" in gallery.why.value
    gallery.ask_random()
    assert gallery.why.value == ""


def test_the_same_card_says_other_things_only_while_it_is_there(gallery):
    gallery.hits._heard(gallery.hits, dict(type="why", key="s2/nobody"), [])
    assert gallery.why.value == "" and not gallery.hits.failed
