"Archive pages: numbers against libraries, what is missing said in a line, the map in a browser."
import base64
import json
import re
import shutil
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from engine_run import tiny_config

from rsir_nb.cli import main
from rsir_nb.core import InputError, MissingFileError, UnknownNameError, make_rng
from rsir_nb.engine.encode import encode_run
from rsir_nb.engine.evaluate import evaluate
from rsir_nb.engine.hash import train_hash
from rsir_nb.engine.train import pretrain
from rsir_nb.gallery.atlas import _ends, atlas, atlas_body, class_scores, run_store, store_duplicates
from rsir_nb.gallery.labels import distance_densities, draw_pairs, label_counts, label_together, pair_distances
from rsir_nb.gallery.projection import Projection, neighbour_map, principal_components, project
from rsir_nb.gallery.scatter import EmbeddingMap
from rsir_nb.gallery.thumbs import missing_picture
from rsir_nb.retrieval.codes import CodeStore, pack_bits


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A trained, hashed, encoded and evaluated run."
    cfg = tiny_config(tmp_path_factory.mktemp("atlas")/"run", "optim.epochs=1")
    pretrain(cfg, progress=False)
    train_hash(cfg.out, progress=False, n_bits=24)
    encode_run(cfg.out, progress=False)
    evaluate(cfg.out, progress=False)
    return cfg


@pytest.fixture(scope="module")
def page(run): return atlas(run.out, radius=2).read_text()


def check_page(text):
    "No scripts, no addresses, a text for every picture, headings in order, tables with scopes."
    for word in "<script", "http://", "https://", "onload", "url(", "@import": assert word not in text, word
    for image in re.findall(r"<img[^>]*>", text):
        assert re.search(r'alt="[^"]{5,}"', image) and 'src="data:image/png;base64,' in image
    levels = [int(o) for o in re.findall(r"<h([1-6])", text)]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
    for head in re.findall(r"<th[ >][^>]*", text): assert "scope=" in head


def test_everything_is_there(run, page):
    check_page(page)
    for words in ("What there is", "Labels", "Map", "Distances", "Results", "Bits", "Twice or nearly", "S1 → S2", "24 bits"):
        assert words in page, words
    assert "Not shown" not in page and str(run.out) not in page and len(page) < 6_000_000
    store, found = run_store(run.out), evaluate(run.out, progress=False)
    for value in class_scores(found, store).to_numpy().ravel(): assert f"{value:.3f}" in page or value == int(value)
    for name, row in label_counts(store.table).iterrows(): assert name in page and f">{row.patches:.0f}<" in page


def test_every_section_says_what_it_lacks(run, tmp_path):
    store = run_store(run.out)
    def body(table, codes=None, embeddings=None, **more):
        path = tmp_path/f"store{len(list(tmp_path.iterdir()))}"
        text = atlas_body(CodeStore.write(path, codes or {}, table, "w", embeddings=embeddings), **more)
        found = dict(re.findall(r'<h2>([^<]*)</h2>\n<p class="quiet">Not shown: ([^<]*)</p>', text))
        return found, text
    codes = {m: np.array(x) for m, x in store.codes.items()}
    z = {m: np.array(x) for m, x in store.embeddings.items()}
    found, _ = body(store.table[["id"]], codes, z)
    assert set(found) == {"Labels", "Distances", "Results"} and "no labels" in found["Labels"]
    found, text = body(store.table[["id"]], None, z)
    assert {"Bits", "Twice or nearly"} <= set(found) and "only embeddings" in found["Bits"]
    found, text = body(store.table[["id", "labels"]], codes)
    assert set(found) == {"Results"} and "Codes of" in text   # the map is made of codes
    assert "<dt>splits</dt><dd>not known" in text and "<dt>places</dt><dd>not known" in text
    one = {m: x[:1] for m, x in codes.items()}
    found, text = body(store.table[["id", "labels"]][:1], one, {m: x[:1] for m, x in z.items()})
    assert "no two labelled patches" in text and "Map" not in found and "0 pairs" in text
    found, text = body(store.table[["id"]][:1], {"s1": one["s1"]}, how="tsne")
    assert "too few points" in found["Map"]
    wide = {"s1": z["s1"], "s2": np.hstack([z["s2"]]*2)}   # sensors that cannot be compared have a map each
    found, text = body(store.table[["id", "labels"]], None, wide)
    assert "cannot be compared" in text and text.count("Embeddings of 48 patches") >= 4 and "Map" not in found


def test_archives_of_one_sensor_without_splits_and_places(tmp_path):
    cfg = tiny_config(tmp_path/"run", "data=tiny_rgb", "method=band_statistics")
    pretrain(cfg, progress=False)
    with pytest.raises(MissingFileError, match="rsir encode"): atlas(cfg.out)
    encode_run(cfg.out, progress=False)
    text = atlas(cfg.out, tmp_path/"pages").read_text()
    assert (tmp_path/"pages"/"atlas.html").is_file()
    check_page(text)
    assert "the run was not evaluated" in text and str(tmp_path) not in text and "only embeddings" in text and "No patch has more than one label" in text


def test_stale_scores_and_lost_patches_are_told(run, tmp_path, monkeypatch):
    copy = tmp_path/"run"
    shutil.copytree(run.out, copy)
    for path in copy.glob("evaluation/*/evaluation.json"):
        told = json.loads(path.read_text())
        path.write_text(json.dumps(told | {"job": {"codes": "others"}}))
    def gone(cfg): raise MissingFileError("the archive is gone")
    monkeypatch.setattr("rsir_nb.gallery.atlas.build_archive", gone)
    text = atlas(copy, radius=4).read_text()
    check_page(text)
    assert "evaluated with other codes" in text and str(tmp_path) not in text and "The patches are not at hand" in text


def test_the_verb(run, tmp_path, capsys):
    assert main(["atlas", str(run.out), "--out", str(tmp_path/"a.html"), "--radius", "1"]) == 0
    assert (tmp_path/"a.html").is_file() and "a.html" in capsys.readouterr().out
    assert main(["atlas", str(run.out), "--how", "umap"]) == 2
    assert "projection" in capsys.readouterr().err
    assert main(["atlas", str(tmp_path/"nothing")]) == 2


@pytest.mark.parametrize("shape", [(50, 8), (8, 50), (3, 2), (2, 1), (1, 4), (5, 1)])
def test_components_are_those_of_sklearn(shape):
    decomposition = pytest.importorskip("sklearn.decomposition")
    x = make_rng(0, "atlas", shape[0]).normal(size=shape)
    xy, share = principal_components(x)
    n = min(2, *shape)
    theirs = decomposition.PCA(n, svd_solver="full").fit(x)
    assert xy.shape == (len(x), 2) and np.allclose(xy[:, n:], 0)
    rank = min(n, len(x) - 1)     # where nothing is left to explain, the direction is anybody's choice
    assert np.allclose(xy[:, :rank], theirs.transform(x)[:, :rank]) and np.allclose(xy[:, rank:], 0, atol=1e-6)
    if len(x) > 1: assert np.allclose(share[:n], theirs.explained_variance_ratio_)


def test_projections_say_what_they_cannot_do(run, monkeypatch):
    store = run_store(run.out)
    with pytest.raises(InputError, match="no vectors"): principal_components(np.empty((0, 3)))
    with pytest.raises(InputError, match="not finite"): principal_components(np.full((2, 2), np.nan))
    with pytest.raises(InputError, match="nothing would be"): project(store, limit=0)
    monkeypatch.setitem(__import__("sys").modules, "sklearn.manifold", None)
    with pytest.raises(InputError, match=r"rsir_nb\[metric\]"): neighbour_map(np.eye(9))


def test_drawn_patches_are_the_same_for_all_sensors(run):
    found = project(run_store(run.out), limit=10, seed=3)
    ids = {m: o["id"].tolist() for m, o in found.points.groupby("sensor")}
    assert ids["s1"] == ids["s2"] and found.patches == 10 and "10 of 48" in found.title
    assert set(project(run_store(run.out), limit=10, seed=4).points["id"]) != set(found.points["id"])


def test_pairs(tmp_path):
    rng = make_rng(0, "pairs")
    bits = rng.integers(0, 2, (60, 16))
    table = pd.DataFrame(dict(id=[f"p{i}" for i in range(60)]))
    table["labels"] = [[["a"], ["b"], ["a", "b"], None][i % 4] for i in range(60)]
    store = CodeStore.write(tmp_path/"c", dict(s1=pack_bits(bits), s2=pack_bits(1 - bits)), table, "w")
    pairs = pair_distances(store, "s1", "s2")
    labels = [set(o) if o else set() for o in table["labels"]]
    expected = [((bits[i] != 1 - bits[j]).sum(), bool(labels[i] & labels[j]))
                for i in range(60) for j in range(60) if i != j and labels[i] and labels[j]]
    assert sorted(zip(pairs.distance, pairs.shares, strict=True)) == sorted(expected)
    found = distance_densities(pairs)
    near, far = (np.array([d for d, s in expected if s is o]) for o in (True, False))
    assert np.isclose(found.nearer, np.mean([(a < b) + 0.5*(a == b) for a in near for b in far]))
    both = [np.bincount(o, minlength=17)/len(o) for o in (near, far)]
    assert np.isclose(found.overlap, np.minimum(*both).sum()) and list(found.at) == list(range(17))
    same = pairs.assign(shares=True)
    same.attrs = pairs.attrs
    assert np.isnan(distance_densities(same).overlap) and "all of them" in distance_densities(same).told
    a, b, every = draw_pairs(np.arange(40), np.arange(40), 500, rng)
    assert len(a) == len(b) == 500 and not every and (a != b).all()
    again = [pair_distances(store, "s1", "s1", 300, seed) for seed in (1, 1, 2)]
    assert again[0].equals(again[1]) and not again[0].equals(again[2]) and again[0].attrs["drawn"]


def test_labels_of_numbers_and_repeats():
    table = pd.DataFrame(dict(id=range(3), labels=[["x", "x"], np.array(["y", "x"]), []]))
    counts, (both, share) = label_counts(table), label_together(table)
    assert counts.patches.to_dict() == {"x": 2, "y": 1} and counts.share["x"] == 1
    assert both.loc["x", "y"] == 1 and share.loc["y", "x"] == 1 and share.loc["x", "y"] == 0.5
    most, part = label_together(table, 1)
    assert most.to_numpy().tolist() == [[2]] and part.to_numpy().tolist() == [[1]]


def test_many_labels_make_no_square_of_all():
    table = pd.DataFrame(dict(id=range(6000), labels=[[f"c{i}", f"c{(i + 1) % 6000}"] for i in range(6000)]))
    tracemalloc.start()
    both, share = label_together(table, 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert both.shape == (20, 20) and (np.diag(both) == 2).all() and peak < 6000**2/4   # a square of bytes is 36 MB
    scores = pd.DataFrame(dict(queries=1, score=np.arange(6000.)))
    some, words = _ends(scores)
    assert some["score"].tolist() == [*range(50), *range(5950, 6000)] and "50 of 6,000" in words
    assert _ends(scores[:100])[0] is not None and _ends(scores[:100])[1] == ""


def test_duplicates_are_found(run, tmp_path):
    codes = make_rng(1, "twice").integers(0, 256, (20, 16), dtype=np.uint8)
    codes[7], codes[13] = codes[2], codes[2] ^ np.eye(16, dtype=np.uint8)[0]
    table = pd.DataFrame(dict(id=[f"p{i}" for i in range(20)]))
    store = CodeStore.write(tmp_path/"c", dict(s1=codes), table, "w")
    pairs = store_duplicates(store)     # a 64th of 128 bits is two
    assert [tuple(o) for o in pairs[["id_a", "id_b", "distance"]].to_numpy()] == [("p2", "p7", 0), ("p2", "p13", 1)]
    with pytest.raises(UnknownNameError): store_duplicates(store, "s9")


def make_map(n, **options):
    "A map of n points in three clouds."
    rng, kind = make_rng(0, "map"), np.arange(n) % 3
    xy = rng.normal(size=(n, 2)) + np.array([[0, 0], [6, 0], [3, 5]])[kind]
    points = pd.DataFrame(dict(id=[f"patch_{i}" for i in range(n)], sensor=np.where(np.arange(n) % 2, "s2", "s1"),
                               x=xy[:, 0], y=xy[:, 1]))
    points["labels"] = [[["Sea", "Town <b>", "Wood"][k]] for k in kind]
    return EmbeddingMap(Projection(points, "pca", "embeddings", 0.5, n), lambda *o: missing_picture(), **options)


def test_static_twin_and_bad_messages():
    said = []
    widget = make_map(30, on_open=lambda *o: said.append(o))
    html = widget._repr_mimebundle_()["text/html"]
    assert "<table>" in html and "Town &lt;b&gt;" in html and 'alt="' in html and "<script" not in html
    for message in ({}, {"type": "open"}, {"type": "open", "point": "3"}, {"type": "open", "point": -1},
                    {"type": "open", "point": 30}, {"type": "need", "point": None}):
        widget._heard(widget, message, [])
    assert said == []
    widget._heard(widget, {"type": "open", "point": 3}, [])
    assert said == [("patch_3", "s2")]


HARNESS = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>A map</title><style>%s</style></head>
<body><main><h1>A map</h1><div id="here"></div></main><script type="module">
%s
const state = %s;
for (const key of ["xy", "groups", "seen_by"]) {
  const raw = Uint8Array.from(atob(state[key]), (o) => o.charCodeAt(0));
  state[key] = new DataView(raw.buffer);
}
window.sent = [];
const model = { get: (key) => state[key], set: (key, value) => (state[key] = value), save_changes: () => {},
  on: () => {}, off: () => {}, send: (o) => window.sent.push(o) };
window.state = state;
render({ model, el: document.getElementById("here") });
window.ready = true;
</script></body></html>"""


def harness(widget):
    "The widget's own script and style in a page, with a model that records what is sent."
    keys = [o for o in widget.traits(sync=True) if not o.startswith("_")]
    state = {k: getattr(widget, k) for k in keys if k not in ("layout", "tabbable", "tooltip")}
    state = {k: base64.b64encode(v).decode() if isinstance(v, bytes) else v for k, v in state.items()}
    return HARNESS % (EmbeddingMap._css.default_value if hasattr(EmbeddingMap._css, "default_value") else EmbeddingMap._css,
                      str(EmbeddingMap._esm).replace("export default { render };", ""), json.dumps(state))


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if not path: pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def no_serious(tab):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    found = axe.Axe().run(tab).response["violations"]
    return [o["id"] for o in found if o["impact"] in ("serious", "critical")]


@pytest.mark.slow
def test_walking_on_the_map(browser, tmp_path):
    widget = make_map(20_000, on_open=lambda *o: None)
    (tmp_path/"map.html").write_text(harness(widget))
    tab = browser.new_page(viewport=dict(width=1000, height=800))
    errors = []
    tab.on("pageerror", lambda e: errors.append(str(e)))
    tab.goto((tmp_path/"map.html").as_uri())
    tab.wait_for_function("window.ready")
    assert errors == [] and tab.locator("section *").count() < 60     # not an element a point
    tab.locator(".rsir-map-plot").focus()
    xy = np.frombuffer(widget.xy, np.float32).reshape(-1, 2)
    told = lambda: int(re.search(r"Point (\d+) of 20,000", tab.locator("[role=status]").inner_text())[1]) - 1
    tab.keyboard.press("Home")
    here = told()
    assert here == 0
    for key, axis, sign in ("ArrowRight", 0, 1), ("ArrowUp", 1, 1), ("ArrowLeft", 0, -1), ("ArrowDown", 1, -1):
        tab.keyboard.press(key)
        there = told()
        assert there != here and (xy[there] - xy[here])[axis]*sign > 0, key
        here = there
    tab.keyboard.press("n")
    assert told() == here + 1
    tab.keyboard.press("Enter")
    tab.wait_for_function(f"window.sent.some(o => o.type === 'need' && o.point === {here + 1})")
    assert tab.evaluate("window.sent.filter(o => o.type === 'open')") == [dict(type="open", point=here + 1)]
    box = tab.locator(".rsir-map-plot").bounding_box()
    far = int(xy[:, 0].argmax())     # the point at the very right edge: nothing else is near it
    w, h = box["width"] - 2 - 24, box["height"] - 2 - 24
    tab.mouse.click(box["x"] + 13 + w*float(xy[far, 0]), box["y"] + 13 + h*(1 - float(xy[far, 1])))
    assert told() == far
    assert tab.evaluate("window.sent.filter(o => o.type === 'open').at(-1)") == dict(type="open", point=far)
    tab.locator("select").select_option("Wood")
    assert tab.evaluate("window.state.label") == "Wood"
    assert no_serious(tab) == [] and errors == []
    tab.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_in_a_browser(browser, run, page, tmp_path, scheme):
    (tmp_path/"atlas.html").write_text(page)
    tab = browser.new_page(color_scheme=scheme, viewport=dict(width=390, height=800))
    tab.goto((tmp_path/"atlas.html").as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    assert tab.evaluate("[...document.images].every(o => o.complete && o.naturalWidth > 0)")
    tab.close()


@pytest.mark.slow
def test_page_is_accessible(browser, page, tmp_path):
    text = page.replace('http-equiv="Content-Security-Policy"', 'name="policy"')     # which stops axe too
    (tmp_path/"atlas.html").write_text(text)
    tab = browser.new_page()
    tab.goto((tmp_path/"atlas.html").as_uri())
    assert no_serious(tab) == []
    tab.close()
