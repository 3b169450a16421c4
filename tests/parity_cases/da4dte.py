"""CMMAE and CMMAE-Vessel: published weights through the loader, codes, complete objectives and checkpoint names.

Images of the set are normalised already and in published band order, so the adapters of `from_published` are turned off.
"""
import re
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from parity import check
from parity_cases.csmae import SENSORS, compare_objective, noises_of, plain_transformer, tensor
from safetensors.torch import save_file
from torch.nn import functional as F

from rsir_nb.methods.cmmae import CMMAE
from rsir_nb.methods.hashing import HashHeads
from rsir_nb.models.decoder import CrossSensorDecoder
from rsir_nb.models.masking import random_masking
from rsir_nb.models.names import LAYOUTS, from_published_names, recognise, to_published_names
from rsir_nb.models.vit import MultiSensorViT
from rsir_nb.models.weights import infer_config, load_published
from rsir_nb.retrieval.codes import binarise
from rsir_nb.sensors import get_sensor

AS_STORED = dict(norm=None, band_orders=None, transpose=False)
VESSEL = next(iter(LAYOUTS["cmmae_vessel"].sensors))   # our name of its only sensor


def images_of(case):
    "The stacked bands, Sentinel-2 first, as one tensor a sensor."
    x, n = tensor(case, "images"), get_sensor("s2").in_chans
    return {"s1": x[:, n:], "s2": x[:, :n]}


def path_of(case, name): return case.folder / next(e["file"] for e in case.entry["inputs"] if e["name"] == name)


@contextmanager
def checkpoint(case, *parts):
    "A training checkpoint of stored state dicts; the first is the backbone, the others have whole names."
    state = {f"backbone.{k}": v for k, v in case.input(parts[0]).items()}
    for name in parts[1:]: state |= case.input(name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "training.safetensors"
        save_file(state, path)
        yield path


def check_sizes(case, method):
    for ours, theirs in dict(img_size="img_size", patch_size="patch_size", embed_dim="embed_dim",
                             global_pool="global_pool").items():
        assert getattr(method.backbone, ours) == case.constant(theirs), ours
    assert {o.eps for o in method.backbone.modules() if isinstance(o, torch.nn.LayerNorm)} == {case.constant("norm_eps")}


def masked(case, method, x, noise, modality, ratio):
    "What the encoder makes of the visible tokens: pooled, all of them, mask and order."
    hidden = random_masking(noise, ratio)
    with torch.no_grad(): tokens = method.backbone.encode(method.prepare(x, modality), modality, hidden.ids_keep)
    return dict(out=method.backbone.pool(tokens), feats=tokens, mask=hidden.mask, ids_restore=hidden.ids_restore)


@check("da4dte.cmmae_backbone")
def cmmae_backbone(case):
    path = path_of(case, "state_dict")
    assert load_published(path, num_heads=case.constant("num_heads")).layout == "cmmae"
    method = CMMAE.from_published(path, num_heads=case.constant("num_heads"), **AS_STORED)
    check_sizes(case, method)
    assert method.heads.n_bits == case.constant("hash_bits")
    x, noises = images_of(case), noises_of(case)
    z = method.embed(x)
    h = method.hash(z)
    for m in SENSORS:
        case.compare(f"pooled_{m}", z[m])
        case.compare(f"hash_{m}", h[m])
    for name, values in {"code_s1": h["s1"], "code_s2": h["s2"],
                         "code_s2_with_head_f": method.hash(z["s2"], "s1")}.items():
        clear = values.abs() > 1e-4
        bits = torch.as_tensor(binarise(values)).to(torch.uint8)
        case.compare(name, torch.where(clear, bits, torch.from_numpy(case.output(name))), rtol=0, atol=0)
    case.compare("binarise_example_out", torch.as_tensor(binarise(tensor(case, "binarise_example"))).to(torch.uint8),
                 rtol=0, atol=0)
    for name in [n for n in case.output_names() if n.startswith("masked")]:
        part = re.fullmatch(r"masked(\d+)_(\w+)_(s\d)", name)
        m = part[3]
        case.compare(name, masked(case, method, x[m], noises[m], m, int(part[1]) / 100)[part[2]])


@check("da4dte.cmmae_method")
def cmmae_method(case):
    c = case.constants
    heads = dict(num_heads=case.constant("num_heads"), decoder_heads=c["decoder_num_heads"])
    with checkpoint(case, "backbone_state_dict", "decoder_state_dict") as path:
        method = CMMAE.from_published(path, **heads, mask_ratio=c["mask_ratio"], temperature=c["mim_temp"],
                                      norm_pix=c["norm_pix_loss"], **AS_STORED)
    assert method.arguments["decoder_depth"] == c["decoder_depth"]
    assert method.arguments["decoder_embed_dim"] == c["decoder_embed_dim"]
    compare_objective(case, method.train(), noises_of(case), images=images_of(case))["loss"].backward()
    compare_norms(case, method, "cmmae")


def compare_norms(case, method, layout, modalities=None):
    name = next(o for o in case.output_names() if o.startswith("gradient_norms"))
    norms = {k: v.grad.norm().item() for k, v in method.named_parameters() if v.grad is not None}
    case.compare(name, to_published_names(norms, modalities, layout), like="gradient_norms")


@check("da4dte.vessel_backbone")
def vessel_backbone(case):
    path, x, n_heads = path_of(case, "backbone_state_dict"), tensor(case, "images"), case.constant("num_heads")
    method, state = CMMAE.from_published(path, num_heads=n_heads, **AS_STORED), case.input("backbone_state_dict")
    check_sizes(case, method)
    assert method.arguments["shared_depth"] == case.constant("depth") and method.arguments["specific_depth"] == 0
    z = method.embed(x, VESSEL)
    case.compare("eval_token", z)
    case.compare("masked50_supervised_out_unmasked", z)
    case.divergent("masked50_out_unmasked", z, plain_transformer(state, x, "s1", n_heads, "token"), "without a supervised "
                   "term nothing is encoded twice, so there are no ones in its place; the embedding is checked against a "
                   "plain float64 transformer", rtol=1e-4, atol=2e-5)
    case.compare("zerone_of_eval_token", torch.tanh(F.linear(z, state["zerone.0.weight"], state["zerone.0.bias"])))
    with tempfile.TemporaryDirectory() as folder:
        norm = {f"fc_norm.{o}": tensor(case, f"fc_norm_{o}") for o in ("weight", "bias")}
        save_file({**state, **norm}, f"{folder}/avg.safetensors")
        mean = CMMAE.from_published(f"{folder}/avg.safetensors", num_heads=n_heads, **AS_STORED)
    assert mean.backbone.global_pool == "avg"
    case.compare("eval_avg", mean.embed(x, VESSEL))
    for name in [n for n in case.output_names() if n.startswith("masked") and "unmasked" not in n]:
        part = re.fullmatch(r"masked(\d+)_(\w+)", name)
        case.compare(name, masked(case, method, x, tensor(case, "noise_1"), VESSEL, int(part[1]) / 100)[part[2]])


@check("da4dte.vessel_method")
def vessel_method(case):
    c, x = case.constants, tensor(case, "images")
    heads = dict(num_heads=case.constant("num_heads"), decoder_heads=c["decoder_num_heads"])
    batch, noise = {VESSEL: x, "labels": tensor(case, "targets_onehot")}, {VESSEL: tensor(case, "noise_1")}
    for prefix, norm_pix in c["norm_pix_loss"].items():
        with checkpoint(case, "backbone_state_dict", "decoder_and_classifier_state_dict") as path:
            method = CMMAE.from_published(path, **heads, mask_ratio=c["mask_ratio"], norm_pix=norm_pix,
                supervised_weight=c["supervised_loss_factor"].get(prefix, 0), vocab=["no vessel", "vessel"], **AS_STORED)
        assert method.arguments["decoder_depth"] == c["decoder_depth"]
        terms = method.train().losses(batch, noise)
        with torch.no_grad():
            guess, _ = method.predict(method.masked_pass(batch, noise), VESSEL, VESSEL, every_token=True)
        values = dict(loss_reconstruction=terms[f"umr_{VESSEL}"], loss_classification=terms.get("supervised", 0.),
                      loss_total=terms["loss"], pred=guess, vessel_logit=method.classifier(method.embed(x, VESSEL)))
        for name in [o for o in case.output_names() if o.split(".")[0] == prefix]:
            case.compare(name, values[name.split(".")[1]])
        if f"({prefix})" in " ".join(case.output_names()):
            terms["loss"].backward()
            compare_norms(case, method, "cmmae_vessel")


def made_by_recipe(case, keys, layout):
    "The method of the sizes that the list `keys` of the set shows, with the recipe's weights in encoder and heads."
    modalities = tuple(LAYOUTS[layout].sensors)
    stored = case.other("da4dte.keys").output(keys)
    shapes = from_published_names({e["name"]: torch.empty(e["shape"], device="meta") for e in stored})
    config = infer_config(shapes, modalities)
    size = {k: v for k, v in config["backbone"].items() if k not in ("in_chans", "norm_eps")}
    method = CMMAE(LAYOUTS[layout].sensors, norm=None, decoder=None, **size)
    if config["n_bits"]: method.heads = HashHeads(dict.fromkeys(modalities, method.embed_dim), config["n_bits"])
    kept = {k: v for k, v in method.state_dict().items() if k in shapes}
    bare = {k.removeprefix("backbone."): v for k, v in to_published_names(kept, layout=layout).items()}
    missing, extra = method.load_state_dict(from_published_names(case.recipe(bare), layout=layout), strict=False)
    assert not extra and all(k.split(".")[-1] in ("mean", "std") for k in missing), missing
    return method.eval()


@check("da4dte.cmmae_full_recipe")
def cmmae_full_recipe(case):
    method = made_by_recipe(case, "cmmae_backbone", "cmmae")
    x, noises = images_of(case), noises_of(case)
    for m in SENSORS:
        case.compare(f"hash_{m}", method.hash(method.embed(x[m], m), m))
        for name in [o for o in case.output_names() if re.fullmatch(rf"masked\d+_out_{m}", o)]:
            ratio = int(re.search(r"\d+", name)[0]) / 100
            case.compare(name, masked(case, method, x[m], noises[m], m, ratio)["out"])


@check("da4dte.vessel_full_recipe")
def vessel_full_recipe(case):
    method, x = made_by_recipe(case, "vessel_backbone_default", "cmmae_vessel"), tensor(case, "images")
    case.compare("eval_token", method.embed(x, VESSEL))
    for name in [o for o in case.output_names() if o.startswith("masked")]:
        ratio = int(re.search(r"\d+", name)[0]) / 100
        case.compare(name, masked(case, method, x, tensor(case, "noise_1"), VESSEL, ratio)["out"])


# checkpoint names -----------------------------------------------------------------------------------

@check("da4dte.keys")
def keys(case):
    for label in case.output_names():
        stored = case.output(label)
        mine = describe(known_parts(stored), stored)
        known = [e for e in stored if e["name"].removeprefix("backbone.").split(".")[0] != "zerone"]
        if known == stored and {e["dtype"] for e in stored} == {"float32"}: case.compare(label, mine)
        else: case.divergent(label, mine, [{**e, "dtype": "float32"} for e in known], "networks are float32 throughout, "
                             "and the head zerone, which nothing uses, is left out", rtol=0, atol=0)


def describe(parts, stored):
    "The entries of `stored` as networks of ours give them, in the order of `stored`; what is missing or extra at the end."
    bare, mine = not any(e["name"].startswith("backbone.") for e in stored), {}
    for name, (kind, trainable, shape, dtype) in parts.items():
        name = name.removeprefix("backbone.") if bare else name
        mine[name] = dict(name=name, shape=list(shape), dtype=dtype, kind=kind, trainable=trainable)
    return [mine.pop(e["name"]) for e in stored if e["name"] in mine] + list(mine.values())


def facts(module):
    "Name -> kind, trainable, shape, dtype of each tensor of a module."
    parameters = dict(module.named_parameters())
    return {k: ("parameter" if k in parameters else "buffer", k in parameters and parameters[k].requires_grad,
                tuple(v.shape), str(v.dtype).removeprefix("torch.")) for k, v in module.state_dict().items()}


def known_parts(stored):
    "The network that the stored names and shapes describe, under published names."
    tensors = {e["name"]: torch.empty(e["shape"], device="meta") for e in stored}
    layout = recognise(tensors)
    modalities = tuple(LAYOUTS[layout].sensors)
    own = LAYOUTS[layout]
    config = (own.infer or infer_config)(from_published_names(tensors), modalities, None, None)
    size = config["backbone"]
    with torch.device("meta"):
        if own.parts: return to_published_names(
            {f"{p}.{k}": v for p, o in own.parts(config).items() for k, v in facts(o).items()}, modalities, layout)
        vit = MultiSensorViT(**size)
        parts = dict(backbone=vit)
        if config["decoder"]: parts["decoder"] = CrossSensorDecoder(
            size["in_chans"], size["embed_dim"], vit.grid, size["patch_size"], **config["decoder"])
        if config["n_bits"]: parts["heads"] = HashHeads(dict.fromkeys(modalities, size["embed_dim"]), config["n_bits"])
        if config["n_classes"]: parts["classifier"] = torch.nn.Linear(size["embed_dim"], config["n_classes"])
    found = {f"{p}.{k}": v for p, o in parts.items() for k, v in facts(o).items()}
    found = {k: v for k, v in found.items() if not (k.startswith("heads.") and k.split(".")[-1] in ("mean", "std"))}
    return to_published_names(found, modalities, layout)
