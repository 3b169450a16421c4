"Pictures of the embeddings over the epochs: what they show, that they change nothing, wandb, and what is refused."
import json

import numpy as np
import pytest
from engine_run import tiny_config
from sklearn.neighbors import NearestNeighbors

from rsir_nb.core import InputError, UnknownNameError
from rsir_nb.engine.encode import encode
from rsir_nb.engine.parts import CALLBACKS, build_archive, load_method, make_callbacks
from rsir_nb.engine.progress import epoch_views, progress_html
from rsir_nb.engine.train import pretrain, read_history
from rsir_nb.gallery.epochs import draw_views, show_answers

SMALL = ["method=margin", "method.backbone={name: vit, embed_dim: 16, depth: 1, num_heads: 2}", "method.sizes=[8]", "optim.lr=1e-3",
         "optim.warmup_epochs=0", "trainer.batch_size=8"]
VIEWS = "trainer.callbacks={name: embedding_views, every: 2, patches: 16, queries: 2, hits: 3}"


def config(out, *changes): return tiny_config(out, *SMALL, *changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return pretrain(config(tmp_path_factory.mktemp("views")/"run", VIEWS, "trainer.wandb=offline"), progress=False)


@pytest.fixture(scope="module")
def store(run, tmp_path_factory):
    archive = build_archive(config(run).data)
    return encode(load_method(run), archive, tmp_path_factory.mktemp("store")/"codes", progress=False), archive


def test_pictures_of_the_first_the_second_next_and_the_last_epoch(run):
    assert read_history(run)["epoch"].max() == 2
    names = {o.name for o in (run/"pictures").iterdir()}
    assert names == {f"{view}_{epoch:03d}.png" for view in ("map", "distances", "answers") for epoch in (0, 2)} | {"views.json"}
    told = json.loads((run/"pictures"/"views.json").read_text())
    assert len(told) == 6 and all(len(o["alt"]) > 20 for o in told)


def test_the_curve_is_the_same_with_and_without_them(run, tmp_path):
    other = pretrain(config(tmp_path/"run"), progress=False)
    assert read_history(run)["loss"].tolist() == read_history(other)["loss"].tolist()
    pretrain(config(run), progress=False)          # done already: callbacks do not decide what is trained


def test_wandb_has_them(run):
    found = [o.name for o in (run/"wandb").rglob("*.png")]
    assert all(any(view in o for o in found) for view in ("map", "distances", "answers")), found


def test_report_and_progress_show_them(run):
    html = epoch_views(run)
    assert html.count("<img") == 6 and "After epoch 3" in html and "Map of the embeddings" in html
    assert html in progress_html(run)
    assert epoch_views(run/"nowhere") == ""


def test_the_sheet_shows_the_nearest_patches_and_marks_wrong_ones(store):
    codes, archive = store
    z, labels = np.asarray(codes.embeddings["s1"], np.float32), archive.labels
    axes = show_answers(codes, archive, "s1", queries=3, hits=4, seed=1)
    near = NearestNeighbors(n_neighbors=5, metric="cosine").fit(z).kneighbors(z, return_distance=False)
    wanted = {tuple(bool((labels[i]*labels[q]).sum()) for i in row[row != q][:4]) for q, row in enumerate(near)}
    for row in axes:
        assert row[0].get_xlabel().startswith("query")
        marks = tuple("✓" in ax.get_xlabel() for ax in row[1:])
        assert marks in wanted and all(("✗" in ax.get_xlabel()) != o for ax, o in zip(row[1:], marks, strict=True))


def test_without_labels_there_is_the_map_alone(store):
    codes, archive = store
    labels = codes.table["labels"].copy()
    codes.table["labels"] = None
    try: assert list(draw_views(codes, archive)) == ["map"]
    finally: codes.table["labels"] = labels


def test_what_cannot_be_is_refused(run, tmp_path):
    given = dict(archive=build_archive(config(run).data), run_dir=tmp_path, seed=0)
    with pytest.raises(UnknownNameError, match="embedding_views"): make_callbacks("embedding_view", **given)
    with pytest.raises(InputError, match="not set by hand"): make_callbacks(dict(name="embedding_views", seed=1), **given)
    with pytest.raises(InputError, match="patches from 4"): make_callbacks(dict(name="embedding_views", patches=1), **given)
    assert make_callbacks(None) == [] and CALLBACKS.list() == ["embedding_views"]
