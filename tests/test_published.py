"""Published files in, ours out: weights as methods, safetensors and runs; configs key by key."""
import pickle

import pytest
import torch
import yaml
from rsir_nb.cli import main
from rsir_nb.config import load_config, to_dict
from rsir_nb.core import InputError, UnsafeFileError, read_json
from rsir_nb.engine.imports import import_config, write_imported
from rsir_nb.engine.published import adopt_weights, convert_weights, read_published
from rsir_nb.methods.cmmae import CMMAE
from rsir_nb.methods.csmae import CSMAE
from rsir_nb.methods.duch_pairs import DuchPairs
from rsir_nb.models.names import LAYOUTS, to_published_names

SIZE = dict(img_size=30, patch_size=15, embed_dim=16, num_heads=2)


def network(layout):
    "A small network of each system, with the input that its published code prepares."
    o = LAYOUTS[layout]
    seen = dict(norm=o.norm, transpose=o.transpose, band_orders=o.band_orders(), **SIZE)
    torch.manual_seed(0)
    if layout == "duch_pairs": return DuchPairs(["s1", "s2"], depth=1, n_bits=16, **seen)
    depth = dict(specific_depth=0, shared_depth=2) if layout == "cmmae_vessel" else dict(specific_depth=1, shared_depth=1)
    return (CSMAE if layout == "csmae" else CMMAE)(o.sensors, decoder=None, **depth, **seen)


def write_published(path, layout):
    "A checkpoint as the published code writes it: a pickle under published names."
    net = network(layout)
    own = {k: v for k, v in net.state_dict().items() if not k.startswith("inputs.")}
    if layout == "cmmae":
        for m in "s1", "s2":
            own |= {f"heads.{m}.{i}.{k}": torch.randn(*s) for i, n in ((0, 16), (2, 8)) for k, s in
                    (("weight", (n, 16)), ("bias", (n,)))}
    torch.save({"state_dict": to_published_names(own, layout=layout), "epoch": 3}, path)
    return net.eval()


@pytest.mark.parametrize("layout", ["csmae", "cmmae", "cmmae_vessel", "duch_pairs"])
def test_every_system_is_read_converted_and_adopted(layout, tmp_path):
    net = write_published(tmp_path/"w.ckpt", layout)
    method = read_published(tmp_path/"w.ckpt", num_heads=2)
    assert type(method) is type(net) and method.inputs.transpose == LAYOUTS[layout].transpose
    report = convert_weights(tmp_path/"w.ckpt", tmp_path/"w.safetensors", num_heads=2)
    assert LAYOUTS[layout].title in report[0]
    assert read_published(tmp_path/"w.safetensors", num_heads=2).weights_hash == method.weights_hash
    if layout == "cmmae_vessel": return                    # its four bands are not the synthetic archive's
    cfg = load_config("base", ["data.n_places=3", "data.patches_per_place=2", "data.img_size=30", f"out={tmp_path/'run'}"])
    run = adopt_weights(tmp_path/"w.ckpt", cfg, num_heads=2)
    assert read_json(run/"finished.json")["weights_hash"] == method.weights_hash
    assert main(["index", str(run)]) == 0
    told = read_json(run/"search"/"codes"/"provenance.json")
    assert told["method"]["arguments"]["transpose"] is True and told["weights_hash"] == method.weights_hash
    assert bool(told["n_bits"]) == (layout in ("cmmae", "duch_pairs"))
    assert main(["evaluate", str(run), "evaluate.protocol=leave_one_out", "evaluate.baselines=[random]",
                 "evaluate.drawings=20"]) == 0


def test_the_command_line_of_weights(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_published("w.ckpt", "cmmae")
    assert main("weights info w.ckpt --num-heads 2".split()) == 0 and "BEN-CMMAE" in capsys.readouterr().out
    assert main("weights convert w.ckpt w.safetensors --num-heads 2".split()) == 0
    assert main("weights convert w.ckpt w.safetensors --num-heads 2".split()) == 2
    small = "data.n_places=3 data.patches_per_place=2 data.img_size=30"
    assert main(f"weights adopt w.safetensors {small} --num-heads 2".split()) == 0 and (tmp_path/"runs/w").is_dir()
    assert main(f"weights adopt w.safetensors {small} --num-heads 2".split()) == 2
    assert "choose another" in capsys.readouterr().err
    for wrong, said in dict([("method.embed_dim=5", "cannot be chosen"), ("data.img_size=60", "wanted 30x30")]).items():
        assert main(f"weights adopt w.safetensors {small} {wrong} --num-heads 2 out=other".split()) == 2
        assert said in capsys.readouterr().err and not (tmp_path/"other").exists()
    (tmp_path/"cut.ckpt").write_bytes((tmp_path/"w.ckpt").read_bytes()[:3000])
    (tmp_path/"evil.ckpt").write_bytes(pickle.dumps({"state_dict": print}))
    for bad in "cut.ckpt", "evil.ckpt", "none.ckpt":
        assert main(["weights", "info", bad]) == 2
        assert bad in capsys.readouterr().err
    with pytest.raises((UnsafeFileError, InputError)): read_published("evil.ckpt")


def test_weights_of_other_bands_are_not_adopted(tmp_path):
    write_published(tmp_path/"w.ckpt", "cmmae_vessel")
    cfg = load_config("base", ["data.n_places=3", "data.img_size=30", f"out={tmp_path/'run'}"])
    with pytest.raises(InputError, match="different sensors"): adopt_weights(tmp_path/"w.ckpt", cfg, num_heads=2)
    assert not (tmp_path/"run").exists()


# ---- configs

def published(**changes):
    "What the published files have in common; a dotted key of `changes` replaces or adds."
    tree = dict(
        wandb=dict(enabled=True, entity="<TODO>"), augmentations=[dict(rrc=dict(enabled=False), crop_size=120)],
        backbone=dict(name="vit_base", kwargs=dict(patch_size=15, img_size=120, in_chans=12, global_pool="avg",
                                                   multi_sensor_encoder_depth=10, cross_sensor_encoder_depth=2)),
        method_kwargs=dict(decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16, mask_ratio=0.5,
                           apply_umr_loss=True, apply_mde_loss=False, mim_temp=0.5),
        data=dict(dataset="ben", root_dir="<TODO>", num_workers=10, num_classes=19),
        optimizer=dict(batch_size=128, lr=1e-4, classifier_lr=1e-4, weight_decay=0.05, kwargs=dict(betas=[0.9, 0.95])),
        scheduler=dict(name="warmup_cosine", warmup_epochs=10), seed=42, max_epochs=150, devices=[0], precision=16)
    for key, value in changes.items():
        at, *path = tree, *key.split("__")
        for o in path[:-1]: at = at[o]
        at[path[-1]] = value
    return tree


def imported(tmp_path, name="cfg", **changes):
    "Our config made of it, checked, and the notes."
    (tmp_path/f"{name}.yaml").write_text(yaml.safe_dump(published(**changes)))
    notes = write_imported(tmp_path/f"{name}.yaml", tmp_path/f"{name}_ours.yaml")
    return load_config(tmp_path/f"{name}_ours.yaml", ["data=synthetic"]), notes


def test_cmmae_is_the_packaged_config(tmp_path):
    cfg, notes = imported(tmp_path, method="cmmae")
    assert to_dict(cfg.method) == to_dict(load_config("cmmae", ["data=synthetic"]).method)
    assert to_dict(cfg.optim) == to_dict(load_config("cmmae", ["data=synthetic"]).optim)
    assert cfg.trainer.batch_size == 128 and cfg.trainer.precision == "16-mixed" and cfg.seed == 42
    made = import_config(tmp_path/"cfg.yaml")
    assert made.groups["data"] == {"name": "ben_v1_lmdb"}
    (tmp_path/"paths.yaml").write_text(yaml.safe_dump(published(data__root_dir="/archives", data__split_dir="/splits")))
    write_imported(tmp_path/"paths.yaml", tmp_path/"paths_ours.yaml")
    data = load_config(tmp_path/"paths_ours.yaml").data
    assert data.path == "/archives/BigEarthNetEncoded.lmdb" and data.split_dir == "/splits"
    assert any("classifier_lr" in o for o in notes) and any("placeholder" in o for o in notes)


@pytest.mark.parametrize("variant", ["cecd", "cesd", "secd", "sesd"])
def test_the_four_variants(tmp_path, variant):
    depths = (12, 0) if variant.startswith("ce") else (10, 2)                 # as the shipped files say
    decoder = "common" if variant.endswith("cd") else "specific"
    cfg, notes = imported(tmp_path, f"csmae_{variant}", max_epochs=1, method_kwargs__decoding_strategy=decoder,
                          backbone__kwargs__multi_sensor_encoder_depth=depths[0],
                          backbone__kwargs__cross_sensor_encoder_depth=depths[1])
    assert to_dict(cfg.method) == to_dict(load_config(f"csmae_{variant}", ["data=synthetic"]).method)
    assert cfg.optim.epochs == 150 and any("placeholder" in o for o in notes)
    assert any("other way round" in o for o in notes) == variant.startswith("ce")


def test_vessels(tmp_path):
    cfg, notes = imported(tmp_path, method="cmmae_vessel", data__dataset="vessel", max_epochs=1, seed=5,
                          backbone__kwargs=dict(img_size=128, in_chans=4, patch_size=8, supervised_loss=True, global_pool="token"),
                          method_kwargs__supervised_loss=True, method_kwargs__supervised_loss_factor=1.0,
                          momentum=dict(base_tau=0.9995, final_tau=1.0))
    wanted = to_dict(load_config("cmmae_vessel", ["data=synthetic"]).method)
    assert {k: v for k, v in to_dict(cfg.method).items() if wanted[k] != v} == {}
    assert any("128 pixels" in o for o in notes) and any("momentum" in o for o in notes)


def test_a_term_that_is_off_stays_off_and_other_datasets_are_refused(tmp_path):
    cfg, notes = imported(tmp_path, method="cmmae_vessel", data__dataset="vessel", method_kwargs__supervised_loss=False,
                          method_kwargs__supervised_loss_factor=1.0, data__split_dir="/splits")
    assert cfg.method.supervised_weight == 0 and any("split_dir" in o for o in notes)
    with pytest.raises(InputError, match="imagenet"): imported(tmp_path, "i", data__dataset="imagenet")
    cfg, notes = imported(tmp_path, "duch", method="duch")
    assert cfg.method.name == "duch_pairs" and any("12 blocks" in o for o in notes)


def test_what_is_not_known_is_told_and_what_is_no_config_refused(tmp_path):
    _, notes = imported(tmp_path, "odd", method="cmmae", method_kwargs__colour="blue", scheduler__min_lr=0)
    assert "not known, left out: method_kwargs.colour=blue" in notes
    (tmp_path/"args.yaml").write_text("a: !!python/object/apply:os.system [ls]")
    with pytest.raises(InputError, match="plain YAML"): import_config(tmp_path/"args.yaml")
    (tmp_path/"none.yaml").write_text("x: 1")
    with pytest.raises(InputError, match="no config of the published"): import_config(tmp_path/"none.yaml")
    with pytest.raises(InputError, match="not one of these engines"): imported(tmp_path, "m", method="mocov2")
    assert main(["config", "import", str(tmp_path/"odd.yaml"), str(tmp_path/"odd_ours.yaml")]) == 2
    assert main(["config", "import", str(tmp_path/"nowhere.yaml"), str(tmp_path/"b.yaml")]) == 2
    assert main(["config", "import", str(tmp_path/"odd.yaml"), str(tmp_path/"b.yaml")]) == 0
