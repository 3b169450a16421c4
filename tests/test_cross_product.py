"""Every registered archive with every registered method that fits: one step, one embedding, by a config alone.

A dataset or method that is registered and not named here fails the first test: then it gets a maker, or a size.
"""
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from omegaconf import OmegaConf
from PIL import Image

from rsir_nb.all import import_pages
from rsir_nb.config import load_config, to_dict
from rsir_nb.core import DATASETS, METHODS, InputError
from rsir_nb.data.bigearthnet_tuples import write_tuple_lmdbs
from rsir_nb.data.layouts import write_v1_lmdb, write_v1_tiff, write_v2_lmdb, write_v2_tiff
from rsir_nb.data.store import write_store
from rsir_nb.simulate.synthetic import SyntheticArchive, write_scene
from rsir_nb.data.vessels import write_vessels
from rsir_nb.engine.parts import build_archive, build_method, load_method
from rsir_nb.engine.train import pretrain

import_pages()
SIDE = 120
PAIRS = dict(n_places=3, patches_per_place=2)


def v1_lmdb(home):
    write_v1_lmdb(SyntheticArchive(**PAIRS), home, progress=False)
    return dict(path=home / "BigEarthNetEncoded.lmdb", split_dir=home / "splits")


def v2_lmdb(home):
    write_v2_lmdb(SyntheticArchive(**PAIRS), home, progress=False)
    return dict(path=home / "BigEarthNet.lmdb", metadata=home / "metadata.parquet")


def v1_tiff(home):
    write_v1_tiff(SyntheticArchive(**PAIRS), home, progress=False)
    return dict(s2_dir=home / "BigEarthNet-v1.0", s1_dir=home / "BigEarthNet-S1-v1.0")


def tuples(home):
    write_tuple_lmdbs(SyntheticArchive(**PAIRS), home)
    return dict(s2_path=home / "S2", s1_path=home / "S1", split_dir=home / "splits")


def v2_tiff(home):
    write_v2_tiff(SyntheticArchive(**PAIRS), home, progress=False)
    return dict(root=home, metadata=home / "metadata.parquet")


def store(home):
    write_store(SyntheticArchive(**PAIRS), home, size=SIDE, progress=False)
    return dict(path=home)


def class_folders(home):
    for kind in "field", "lake":
        for i in range(3):
            (home / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(i).integers(30, 220, (64, 64, 3), np.uint8)).save(home/kind/f"{kind}_{i}.png")
    return dict(root=home)


def paired_folders(home):
    archive = SyntheticArchive(**PAIRS)
    for i in range(4):
        for m, sensor in archive.sensors.items():
            (home / m).mkdir(parents=True, exist_ok=True)
            x = archive[i][m].numpy()
            with rasterio.open(home/m/f"place_{i}.tif", "w", driver="GTiff", count=len(x), height=SIDE, width=SIDE,
                               dtype="float32", crs="EPSG:32632",
                               transform=rasterio.transform.from_origin(5e5 + 2000*i, 5e6, 10, 10)) as f:
                f.write(x)
                f.descriptions = sensor.bands
    return dict(root=home)


def scenes(home): return dict(paths=write_scene(home/"a.tif", size=240))


def features(home):
    rng = np.random.default_rng(0)
    home.mkdir(exist_ok=True)
    np.savez(home/"features.npz", image_emb=rng.normal(size=(40, 12)), caption_emb=rng.normal(size=(40, 9)),
             labels=np.eye(4, dtype=int)[rng.integers(4, size=40)])
    return dict(path=home/"features.npz")


def image_list(home):
    class_folders(home)
    rows = [f"{o.relative_to(home)},{o.parent.name}" for o in sorted(home.rglob("*.png"))]
    (home/"list.csv").write_text("\n".join(["image,label", *rows]) + "\n")
    return dict(lists=home/"list.csv")


def vectors(home):
    rng = np.random.default_rng(0)
    home.mkdir(exist_ok=True)
    np.savez(home/"vectors.npz", embedding=rng.normal(size=(40, 12)), label=np.arange(40) % 4)
    return dict(path=home/"vectors.npz")


def joined(home): return dict(parts=[dict(name="synthetic", seed=k, **PAIRS) for k in range(2)])


MAKERS = dict(ben_tuples_lmdb=tuples, ben_v1_lmdb=v1_lmdb, ben_v1_tiff=v1_tiff, ben_v2_lmdb=v2_lmdb, ben_v2_tiff=v2_tiff, store=store,
              class_folders=class_folders, paired_folders=paired_folders, scenes=scenes, features=features, joined=joined,
              image_list=image_list, vectors=vectors, eurosat_sample=lambda home: {},
              synthetic=lambda home: dict(PAIRS), vessels=lambda home: dict(root=write_vessels(home, img_size=64)))

TRANSFORMER = dict(embed_dim=16, num_heads=2)
MAE = dict(TRANSFORMER, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, specific_depth=1, shared_depth=1)
METRIC = dict(backbone=dict(name="vit", embed_dim=16, depth=1, num_heads=2))
METRIC_SIZES = dict(margin=dict(METRIC, sizes=[16]), diva=dict(METRIC, sizes=[8]*4), divide_conquer=dict(METRIC, sizes=[8]*2),
                    bier=dict(METRIC, sizes=[8, 8]), sndl=dict(METRIC, sizes=[16]))
PAIRS_OF = dict(METRIC, projection=dict(name="mlp", embed_dim=8))
UNIVERSAL = dict(METRIC, neck=dict(name="projection", embed_dim=8), trainable="all", backbone_lr=1.)
SIZES = dict(csmae=MAE, cmmae=MAE, duch_pairs=dict(TRANSFORMER, depth=1, n_bits=16), duch=dict(n_bits=16, hidden_dim=32),
             contrastive=PAIRS_OF, cross_modal=PAIRS_OF, universal=dict(UNIVERSAL, loss="supcon"), **METRIC_SIZES)
ALONE = dict(cmr_weight=0, mim_weight=0)                    # of a masked autoencoder that sees one sensor
NORM = dict(features=None, vessels="vessel", class_folders=None, image_list=None, vectors=None, eurosat_sample=None)
OURS = {o for o in DATASETS.list() if DATASETS.get(o).__module__.startswith("rsir_nb.")}
STANDS_ON_A_RUN = {"probe"}     # see its own page and test_train
METHODS_HERE = [o for o in METHODS.list() if METHODS.get(o).__module__.startswith("rsir_nb.") and o not in STANDS_ON_A_RUN]


def fits(archive, method):
    "Why a method cannot work on an archive; nothing if it can."
    units, n = {o.unit for o in archive.sensors.values()}, len(archive.sensors)
    if method == "duch": return None if units == {"feature"} and n > 1 else "learns on features, or on a run's embeddings"
    if method == "vectors": return None if units == {"feature"} else "takes vectors"
    if method in ("duch_pairs", "band_cca", "contrastive", "cross_modal") and n < 2: return "wants two sensors"
    if units == {"feature"}: return None if method in ("band_quantiles", "contrastive", "cross_modal", *METRIC_SIZES) else "vectors are no images"
    if method in (*METRIC_SIZES, "universal") and archive.vocab is None: return "wants labels"
    return None


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    "name -> the archive's config, made when first asked for."
    made = {}
    def get(name):
        if name not in made: made[name] = dict(name=name, **{k: str(v) if isinstance(v, Path) else v for k, v in
                                                                MAKERS[name](tmp_path_factory.mktemp("cross")/name).items()})
        return made[name]
    return get


def test_nothing_is_left_out():
    assert set(MAKERS) >= OURS
    trained = {o for o in METHODS_HERE if METHODS.get(o).needs_training}
    assert set(SIZES) >= trained


@pytest.mark.parametrize("method", METHODS_HERE)
@pytest.mark.parametrize("dataset", sorted(OURS))
def test_one_step(archives, tmp_path, dataset, method):
    data, sizes = archives(dataset), dict(SIZES.get(method, {}))
    archive = build_archive(data)
    assert len(archive) >= 2
    if "embed_dim" in sizes:
        side = archive[0][next(iter(archive.sensors))].shape[-1]
        sizes |= dict(patch_size=16 if side % 15 else 15, norm=NORM.get(dataset, "ben_v2"))
        if len(archive.sensors) == 1 and method != "duch_pairs": sizes |= ALONE
    if method in METRIC_SIZES: sizes |= dict(norm=NORM.get(dataset, "ben_v2"))
    if method == "universal" and dataset != "class_folders": sizes |= dict(norm=NORM.get(dataset, "ben_v2"))
    steps = ["optim.epochs=1", "optim.warmup_epochs=0", "optim.lr=1e-3", "trainer.batch_size=64", "trainer.train_split=null",
             "trainer.augment=false", "trainer.pictures=0", f"out={tmp_path/'run'}"]
    cfg = load_config("base", [f"method={method}", *steps])
    cfg = OmegaConf.create({**to_dict(cfg), "data": data, "method": dict(name=method, **sizes)})
    if fits(archive, method):
        with pytest.raises(InputError): pretrain(cfg, progress=False)
        return
    fresh = build_method(cfg, archive) if METHODS.get(method).needs_training else None
    made = load_method(pretrain(cfg, progress=False))
    if fresh is not None: assert made.weights_hash != fresh.weights_hash
    for m in archive.sensors:
        z = made.embed(torch.stack([archive[i][m] for i in range(2)]), m)
        assert len(z) == 2 and torch.isfinite(z).all()
