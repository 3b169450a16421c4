"Configs: layers, overrides, checks against signatures, and the file beside the weights."
import json
from dataclasses import dataclass

import pytest
from omegaconf import OmegaConf

from rsir_nb.all import import_pages
from rsir_nb import config
from rsir_nb.config import (GROUPS, config_table, group_arguments, group_kwargs, list_configs, load_config,
                            load_run_config, register_schema, save_config, to_dict)
from rsir_nb.core import DATASETS, METHODS, InputError, MissingFileError, UnknownNameError


def toy_archive(path: str, n: int = 8, betas: tuple = (1, 2), scale: float = 1.0, split: str | None = None):
    return dict(path=path, n=n)


class ToyBase:
    def __init__(self, sensors, img_size: int = 120, norm: str | None = "ben_v2"): ...


class ToyMethod(ToyBase):
    def __init__(self, sensors, mask_ratio: float = 0.5, **kwargs): super().__init__(sensors, **kwargs)


@dataclass(frozen=True)
class ToyTrainer:
    batch_size: int = 4 # patches in a step
    precision: str = "32" # of the numbers


def toy_optim(lr=1e-4, weight_decay=0.05, betas=(1, 2), warmup_epochs=10, epochs=150, schedule=""): ...


@pytest.fixture(scope="module")
def everything(): import_pages()


@pytest.fixture
def toys(everything, monkeypatch):
    "Toy builders in place of the package's; what is taken away is put back."
    monkeypatch.setitem(DATASETS.entries, "toy_archive", toy_archive)
    monkeypatch.setitem(DATASETS.meta, "toy_archive", {})
    monkeypatch.setitem(METHODS.entries, "toy_method", ToyMethod)
    monkeypatch.setitem(METHODS.meta, "toy_method", {})
    builders = dict(trainer=ToyTrainer, optim=toy_optim, hash=lambda n_bits=128: None)
    for group in set(GROUPS) - {"data", "method"}:
        monkeypatch.setitem(config.SCHEMAS, group, builders.get(group, lambda: None))
        monkeypatch.setitem(config.CHECKS, group, None)
    return ["data=toy_archive", "data.path=here", "method=toy_method"]


def test_overrides_round_trip(toys):
    changes = ["data.n=3", "data.betas=[3,4]", "data.split=null", "optim.lr=1e-3", "seed=5", "out=runs/x"]
    cfg = load_config("base", [*toys, *changes])
    wanted = dict(name="toy_archive", path="here", n=3, betas=[3, 4], scale=1.0, split=None)
    assert to_dict(cfg.data) == wanted
    assert (cfg.optim.lr, cfg.seed, cfg.out) == (0.001, 5, "runs/x")
    again = load_config("base", [*toys, *(f"data.{k}={json.dumps(v)}" for k, v in cfg.data.items()
                                          if k != "betas"), *changes])
    assert again == cfg


def test_choices_come_before_their_keys_whatever_the_order(toys):
    assert load_config("base", toys[::-1]) == load_config("base", toys)


def test_another_choice_leaves_no_key_of_the_old_one(toys, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("data: {name: synthetic, n_places: 4}\nmethod: toy_method\n")
    more = tmp_path / "more.yaml"
    more.write_text("base: mine.yaml\ndata: {name: toy_archive, path: p}\n")
    assert "n_places" not in load_config(more).data
    assert load_config(more).out == "runs/more"


PARTS = """
base: contrastive
method:
  name: contrastive
  backbone: {name: vit, depth: 4, num_heads: 2}
  projection: {name: mlp, layers: 3}
trainer: {sampler: {name: m_per_class, m: 4}}
data: {name: paired_folders, root: r, sensors: {sar: s1, rgb: rgb}, split: {train: 0.6, val: 0.2, test: 0.2}}
hash: {n_bits: 64, hidden_dim: 7}
"""


@pytest.mark.parametrize("changes, key, wanted", [
    (["method.backbone=resnet18"], "method.backbone", "resnet18"),
    (["method.backbone.name=resnet18"], "method.backbone", dict(name="resnet18")),
    (["method.backbone={name: timm, model: resnet10t}"], "method.backbone", dict(name="timm", model="resnet10t")),
    (["method.backbone.name=vit"], "method.backbone", dict(name="vit", depth=4, num_heads=2)),
    (["method.backbone.depth=2"], "method.backbone", dict(name="vit", depth=2, num_heads=2)),
    (["method.backbone={name: vit, depth: 2}"], "method.backbone", dict(name="vit", depth=2, num_heads=2)),
    (["method.backbone.model=resnet10t", "method.backbone.name=timm"], "method.backbone", dict(name="timm", model="resnet10t")),
    (["method.backbone.model=resnet10t", "method.backbone=timm"], "method.backbone", dict(name="timm", model="resnet10t")),
    (["method.projection.name=relu"], "method.projection", dict(name="relu")),
    (["method.encoder.adapter_dim=8", "method.encoder=joint"], "method.encoder", dict(name="joint", adapter_dim=8)),
    (["method=margin", "method.loss={name: margin, boundary: 2}", "method.loss.name=triplet"], "method.loss", dict(name="triplet")),
    (["method=margin", "method.loss.boundary=2"], "method.loss", dict(name="margin", boundary=2)),
    (["trainer.sampler=balanced"], "trainer.sampler", "balanced"),
    (["trainer.sampler.name=balanced"], "trainer.sampler", dict(name="balanced")),
    (["trainer.sampler.m=2"], "trainer.sampler", dict(name="m_per_class", m=2)),
    (["data.sensors={s1: s1, s2: s2}"], "data.sensors", dict(s1="s1", s2="s2")),
    (["data.sensors.rgb=s2_rgb"], "data.sensors", dict(sar="s1", rgb="s2_rgb")),
    (["data.split={train: 0.8, val: 0.2}"], "data.split", dict(train=.8, val=.2)),
    (["data.split.test=0.1"], "data.split", dict(train=.6, val=.2, test=.1)),
    (["data.seed=3", "data.name=store", "data.path=p"], "data", None),
    (["hash=zero_one"], "hash.hidden_dim", 512), (["hash.n_bits=32"], "hash.hidden_dim", 7)])
def test_a_part_of_another_name_begins_afresh(everything, tmp_path, changes, key, wanted):
    "One rule for groups and for the parts inside them; a mapping without a name is one value."
    (tmp_path/"mine.yaml").write_text(PARTS)
    if wanted is None:   # an argument of the old archive is unknown to the new one
        with pytest.raises(UnknownNameError, match="seed"): load_config(tmp_path/"mine.yaml", changes)
        assert "root" not in load_config(tmp_path/"mine.yaml", changes[1:]).data
        return
    found = OmegaConf.select(load_config(tmp_path/"mine.yaml", changes), key)
    assert (OmegaConf.to_container(found) if OmegaConf.is_config(found) else found) == wanted


@pytest.mark.parametrize("pattern", ["{sensor}/*", "*/{sensor}/*_{place}", "{place}/{sensor}_{part}/{place}_{sensor}_{part}_*"])
def test_a_pattern_of_paths_needs_no_quotes(everything, pattern):
    assert load_config("contrastive_pairs", ["data.root=r", f"data.pattern={pattern}"]).data.pattern == pattern
    with pytest.raises(InputError, match="cannot be read"): load_config("contrastive_pairs", ["data.sensors={s1: s1, s2"])


def test_layers_of_files_follow_the_same_rule(everything, tmp_path):
    (tmp_path/"mine.yaml").write_text(PARTS)
    (tmp_path/"more.yaml").write_text("base: mine.yaml\nmethod: {backbone: {depth: 2}, projection: {name: relu}}\n"
                                      "data: {split: {train: 1.0}}\ntrainer: {sampler: balanced}\n")
    cfg = load_config(tmp_path/"more.yaml")
    assert to_dict(cfg.method.backbone) == dict(name="vit", depth=2, num_heads=2)
    assert to_dict(cfg.method.projection) == dict(name="relu") and to_dict(cfg.data.split) == dict(train=1.)
    assert cfg.trainer.sampler == "balanced" and cfg.data.sensors.sar == "s1"


def test_arguments_of_bases_are_keys_and_derived_ones_are_not(toys):
    assert list(group_arguments("method", "toy_method")) == ["mask_ratio", "norm"]
    with pytest.raises(InputError, match="not set by hand"):
        load_config("base", [*toys, "method.img_size=60"])


@pytest.mark.parametrize("override,text", [
    ("method.mask_ration=1", "did you mean mask_ratio"), ("trainer.batchsize=1", "did you mean batch_size"),
    ("dat.n=1", "did you mean data"), ("trainer=cpuu", "did you mean cpu"), ("trainr.x=1", "mean trainer")])
def test_unknown_names_are_answered_with_the_nearest(toys, override, text):
    with pytest.raises(UnknownNameError, match=text): load_config("base", [*toys, override])


@pytest.mark.parametrize("override,text", [
    ("data.n", "key=value"), ("--n=3", "key=value"), ("data.n = 3", "key=value"), ("data.n=[1", "quotes"),
    ("data.n=many", "wanted int"), ("data.n=true", "wanted int"), ("data.n=1.5", "wanted int"),
    ("data.scale=wide", "wanted float"), ("data=3", "cannot be set"), ("seed=x", "wanted int")])
def test_bad_overrides_say_what_is_wanted(toys, override, text):
    with pytest.raises(InputError, match=text): load_config("base", [*toys, override])


def test_numbers_become_what_the_signature_says(toys):
    cfg = load_config("base", [*toys, "data.scale=2", "trainer.precision=32"])
    assert isinstance(cfg.data.scale, float) and cfg.trainer.precision == "32"


def test_missing_arguments_and_paths(toys, monkeypatch):
    monkeypatch.delenv("RSIR_DATA", raising=False)
    with pytest.raises(InputError, match=r"data\.path is not set.*data\.path="):
        load_config("base", [toys[0], toys[2]])
    with pytest.raises(InputError, match="export RSIR_DATA"):
        load_config("base", [*toys, "data.path=${oc.env:RSIR_DATA}/x"])
    monkeypatch.setenv("RSIR_DATA", "archives")
    assert load_config("base", [*toys, "data.path=${oc.env:RSIR_DATA}/x"]).data.path == "archives/x"


def test_files_that_cannot_be_used(toys, tmp_path):
    bad = tmp_path / "bad.yaml"
    for text, match in (("a: [1", "not readable"), ("- 1", "no keys"), ("base: bad.yaml", "its own base")):
        bad.write_text(text)
        with pytest.raises(InputError, match=match): load_config(bad)
    for text, match in (("base: nothing", "nothing"), ("daat: x", "did you mean data")):
        bad.write_text(text)
        with pytest.raises(UnknownNameError, match=match): load_config(bad)
    with pytest.raises(MissingFileError): load_config(tmp_path / "none.yaml")


def test_struct_mode(toys):
    cfg = load_config("base", toys)
    with pytest.raises(Exception, match="not in struct"): cfg.data.m = 3
    assert group_kwargs(cfg.data)[0] == "toy_archive" and "name" not in group_kwargs(cfg.data)[1]


def test_saved_config_is_complete(toys, tmp_path, monkeypatch):
    monkeypatch.setenv("RSIR_DATA", "archives")
    cfg = load_config("base", [*toys, "data.path=${oc.env:RSIR_DATA}/x"])
    monkeypatch.delenv("RSIR_DATA")
    save_config(cfg, tmp_path / "run")
    assert load_run_config(tmp_path / "run") == cfg
    versions = json.loads((tmp_path / "run/versions.json").read_text())
    assert {"python", "git", "torch", "rsir_nb"} <= set(versions)
    with pytest.raises(MissingFileError, match="a run"): load_run_config(tmp_path)


def test_the_table_quotes_the_code(toys):
    table = config_table("trainer")
    assert table.loc["batch_size"].to_dict() == dict(type="int", default="4", meaning="patches in a step")
    with pytest.raises(UnknownNameError, match="trainer"): register_schema("trainr", ToyTrainer)


# ---- the packaged files, against the package's own builders

VARIANTS = dict(csmae_cecd=(0, 12, "common"), csmae_cesd=(0, 12, "specific"),
                csmae_secd=(10, 2, "common"), csmae_sesd=(10, 2, "specific"))


@pytest.mark.parametrize("name", list_configs())
def test_packaged_configs_load(everything, name, monkeypatch):
    monkeypatch.setenv("RSIR_DATA", "archives")
    cfg = load_config(name)
    assert "${" not in OmegaConf.to_yaml(cfg)


@pytest.mark.parametrize("group,name", [(g, o) for g in GROUPS for o in list_configs(g)])
def test_packaged_choices_are_legal(everything, group, name, monkeypatch):
    monkeypatch.setenv("RSIR_DATA", "archives")
    load_config("base", [f"{group}={name}"])


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_csmae_are_those_published(everything, name, monkeypatch):
    monkeypatch.setenv("RSIR_DATA", "archives")
    layer = OmegaConf.load(config.CONFIGS / f"{name}.yaml")
    assert layer.base == "csmae" and len(layer.method) <= 4 and set(layer) == {"base", "method"}
    cfg = load_config(name)
    m, o = cfg.method, cfg.optim
    assert (m.specific_depth, m.shared_depth, m.decoder) == VARIANTS[name]
    assert (m.embed_dim, m.num_heads, m.patch_size, m.mask_ratio, m.temperature) == (768, 12, 15, 0.5, 0.5)
    assert (m.decoder_embed_dim, m.decoder_depth, m.decoder_num_heads, m.norm) == (512, 8, 16, "ben_v1")
    assert (o.lr, o.weight_decay, list(o.betas)) == (1e-4, 0.05, [0.9, 0.95])
    assert (cfg.trainer.batch_size, o.epochs, o.warmup_epochs, o.schedule) == (128, 150, 10, "cosine")
