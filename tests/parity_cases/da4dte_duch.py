"""DUCH on image pairs, as DA4DTE publishes it: encoders, head, loss terms, the whole objective and its gradients."""
import re

import numpy as np
import torch
from parity import check, recipe_weights

from rsir_nb.losses.contrastive import modality_discrepancy_loss, ntxent_loss
from rsir_nb.losses.duch import geometric_ramp, similarity_preservation_loss
from rsir_nb.methods.duch_pairs import DuchPairs
from rsir_nb.models.names import to_published_names
from rsir_nb.sensors import BAND_ORDERS, SENSORS

PAIR = "s1", "s2"


def published_names(state, prefix=""):
    "The same under published names, bare or as the training module calls them."
    found = to_published_names(state, PAIR, "duch_pairs")
    return {prefix + k.removeprefix("backbone."): v for k, v in found.items()}


def tensor(case, name): return torch.from_numpy(case.input(name))


def images_of(case):
    "The stacked bands, Sentinel-2 first, as one tensor a sensor."
    x, n = tensor(case, "images"), SENSORS["s2"].in_chans
    return {"s1": x[:, n:], "s2": x[:, :n]}


def stored_method(case, backbone, **changes):
    "The network of a stored checkpoint, for images that are normalised and ordered already."
    path = case.folder / next(e["file"] for e in case.entry["inputs"] if e["name"] == "state_dict")
    order = {m: BAND_ORDERS["natural"][m] for m in PAIR}
    method = DuchPairs.from_published(path, PAIR, num_heads=backbone.constants["num_heads"], norm=None,
                                      band_orders=order, transpose=False, **changes)
    size = method.backbone
    for ours, theirs in dict(img_size="img_size", patch_size="patch_size", embed_dim="embed_dim",
                             global_pool="global_pool").items():
        wanted = backbone.constants[theirs]
        assert getattr(size, ours) == wanted, f"{ours} {getattr(size, ours)}, wanted {wanted}"
    assert method.heads.n_bits == backbone.constants["hash_bits"]
    assert len(size.specific_blocks["s1"]) == backbone.constants["depth"]
    assert size.specific_norms["s1"].eps == backbone.constants["norm_eps"]
    return method


def compare_outputs(case, method, images):
    "Embeddings and codes, of images alone as of a batch."
    for m in PAIR:
        z = method.embed(images[m], m)
        case.compare(f"out_{m}", z)
        case.compare(f"feats_{m}", method.hash(z, m))


@check("da4dte.duch_backbone_*")
def backbone(case): compare_outputs(case, stored_method(case, case), images_of(case))


@check("da4dte.duch_full_recipe")
def full_recipe(case):
    method = DuchPairs(PAIR, norm=None)
    names = published_names({k: k for k in method.state_dict() if not k.startswith("inputs.")})
    filled = recipe_weights({theirs: method.state_dict()[ours] for theirs, ours in names.items()},
                            case.constants["recipe_seed"])
    method.load_state_dict({ours: filled[theirs] for theirs, ours in names.items()}, strict=False)
    compare_outputs(case, method.eval(), images_of(case))


@check("da4dte.duch_method")
def objective(case):
    weights = next(e["file"] for e in case.entry["inputs"] if e["name"] == "state_dict")
    found = next(e["id"] for e in case.manifest["cases"] if e["id"].startswith("da4dte.duch_backbone_")
                 and any(o["file"] == weights for o in e["inputs"]))
    epochs = case.constants["epochs"]
    method = stored_method(case, case.other(found), similarity_sign="code", ramp_epochs=epochs,
                           temperature=case.constants["contrastive_temp"]).train()
    images = images_of(case)
    case.compare("schedule", np.array([geometric_ramp(e, epochs) for e in range(epochs)]), rtol=1e-9)
    compare_outputs(case, method, images)
    norms = next(n for n in case.output_names() if n.startswith("gradient_norms"))
    at = int(re.search(r"epoch (\d+)", norms)[1])
    for epoch in sorted({int(o[1]) for n in case.output_names() if (o := re.match(r"epoch(\d+)\.", n))}):
        terms = method.losses(images, epoch=epoch)
        case.compare(f"epoch{epoch}.total", terms["loss"])
        case.compare(f"epoch{epoch}.alpha_beta", np.array(method.ramp(epoch)), rtol=1e-9)
    case.compare("loss_ntxent", terms["ntxent"])
    case.compare("loss_mde", -terms["mde"])
    case.compare("loss_msp", terms["msp"])
    method.zero_grad()
    method.losses(images, epoch=at)["loss"].backward()
    found = {k: v.grad.norm().item() for k, v in method.named_parameters() if v.grad is not None}
    published = published_names(found, "backbone.")
    case.compare(norms, published, like="gradient_norms")


@check("da4dte.duch_losses")
def loss_terms(case):
    x = {n: tensor(case, n).requires_grad_(True) for n in case.input_names()}
    out, codes = ({m: x[f"{kind}_{m}"] for m in PAIR} for kind in ("out", "hash"))
    epoch, temperature = case.constants["epoch"], case.constants["contrastive_temp"]
    epochs = case.other("da4dte.duch_method").constants["epochs"]
    case.compare("ntxent", ntxent_loss(*codes.values(), temperature=temperature))
    case.compare("mde", modality_discrepancy_loss(*out.values()))
    case.compare("msp", similarity_preservation_loss(out))
    case.compare("alpha_beta", np.array(geometric_ramp(epoch, epochs)), rtol=1e-9)
    small = dict(img_size=24, patch_size=8, embed_dim=out["s1"].shape[1], num_heads=1, depth=1)
    method = DuchPairs(PAIR, similarity_sign="code", ramp_epochs=epochs, temperature=temperature, **small)
    total = method.losses_of(out, codes, epoch)["loss"]
    total.backward()
    case.compare("total", total)
    for name, value in x.items(): case.compare(f"grad_{name}", value.grad)
