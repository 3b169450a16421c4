"""CSMAE: positions, encoder, losses, complete objectives and checkpoint names."""
import math
import re

import numpy as np
import torch
from parity import check
from torch.nn import functional as F

from rsir_nb.losses.contrastive import modality_discrepancy_loss, ntxent_loss
from rsir_nb.losses.reconstruction import reconstruction_loss
from rsir_nb.models.decoder import CrossSensorDecoder
from rsir_nb.models.masking import masking_plan, random_masking
from rsir_nb.models.patches import patchify, sincos_pos_embed
from rsir_nb.models.vit import MultiSensorViT
from rsir_nb.models.weights import from_published_names, infer_config, load_published, to_published_names

SENSORS = "s1", "s2"


def tensor(case, name): return torch.from_numpy(case.input(name))


def images_of(case):
    "The stacked bands, Sentinel-2 first, as one tensor a sensor."
    x, n = tensor(case, "images"), case.constant("in_chans_s2")
    return {"s1": x[:, n:], "s2": x[:, :n]}


def noises_of(case, prefix=""):
    "Noise of each sensor, where stored: the second is drawn for random masking only."
    found = {m: f"{prefix}noise_{i}" for i, m in enumerate(SENSORS, 1)}
    return {m: tensor(case, name) if name in case.input_names() else None for m, name in found.items()}


def weights_of(case, name="state_dict"):
    "A stored state dict through the loader of published checkpoints."
    path = case.folder / next(e["file"] for e in case.entry["inputs"] if e["name"] == name)
    weights = load_published(path, num_heads=case.constant("num_heads"))
    size = weights.config["backbone"]
    for ours, theirs in dict(img_size="img_size", patch_size="patch_size", embed_dim="embed_dim",
                             norm_eps="norm_eps", mlp_ratio="mlp_ratio").items():
        assert size[ours] == case.constant(theirs), f"{ours} {size[ours]}, wanted {case.constant(theirs)}"
    return weights


@check("csmae.pos_encoding")
def pos_encoding(case):
    for name in case.output_names():
        width, rows, cols = map(int, re.match(r"pos_(\d+)_(\d+)x(\d+)", name).groups())
        case.compare(name, sincos_pos_embed(width, (rows, cols), cls_token="nocls" not in name))


@check("csmae.backbone_eval_*")
def backbone_eval(case):
    weights, x = weights_of(case), images_of(case)
    config, state = weights.config["backbone"], weights.part("backbone")
    for pool in "avg", "token":
        vit = MultiSensorViT(**{**config, "global_pool": pool}).eval()
        vit.load_state_dict({k: v for k, v in state.items() if pool == "avg" or not k.startswith("fc_norm.")})
        with torch.no_grad():
            for m in SENSORS: case.compare(f"{m}_{pool}", vit(x[m], m))


@check("csmae.backbone_eval_disjoint")
def backbone_eval_disjoint(case):
    x, state = images_of(case), case.input("state_dict")
    for pool in "avg", "token":
        method = make_method(case, "state_dict", masking="disjoint", global_pool=pool)
        z = {m: method.embed(x[m], m) for m in SENSORS}
        case.compare(f"s1_{pool}", z["s1"])
        wanted = plain_transformer(state, x["s2"], "s2", case.constant("num_heads"), pool)
        case.divergent(f"s2_{pool}", z["s2"], wanted, "no masking at inference, whatever the strategy; "
                       "checked against a plain float64 transformer", rtol=1e-4, atol=2e-5)


def plain_transformer(state, x, sensor, num_heads, pool, eps=1e-6):
    "The unmasked encoder, written out in float64 from the published tensors alone."
    p = {k: v.double() for k, v in state.items()}
    tail, own = ("", "s1") if sensor == "s1" else ("_s2", "s2")
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps)
    linear = lambda x, name: x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def block(x, name):
        B, L, D = x.shape
        qkv = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv").reshape(B, L, 3, num_heads, -1)
        score = torch.einsum("bqhd,bkhd->bhqk", qkv[:, :, 0], qkv[:, :, 1]) / math.sqrt(D // num_heads)
        seen = torch.einsum("bhqk,bkhd->bqhd", score.softmax(-1), qkv[:, :, 2]).reshape(B, L, D)
        x = x + linear(seen, f"{name}.attn.proj")
        return x + linear(F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")

    def stack(x, name, after):
        depth = len({k.split(".")[1] for k in p if k.startswith(f"{name}.")})
        for i in range(depth): x = block(x, f"{name}.{i}")
        return norm(x, after) if f"{after}.weight" in p else x

    weight, bias = (p[f"patch_embed{tail}.proj.{o}"] for o in ("weight", "bias"))
    tokens = F.conv2d(x.double(), weight, bias, stride=weight.shape[-1])
    tokens = torch.cat([p[f"cls_token{tail}"].expand(len(x), -1, -1), tokens.flatten(2).transpose(1, 2)], 1)
    tokens = stack(stack(tokens + p["pos_embed"], f"blocks_{own}", f"norm_{own}"), "blocks", "norm")
    return tokens[:, 0] if pool == "token" else norm(tokens[:, 1:].mean(1), "fc_norm")


@check("csmae.backbone_masked_*")
def backbone_masked(case):
    vit, x = weights_of(case).make_backbone(), images_of(case)
    plan = masking_plan(noises_of(case), case.id.split("_")[-2], case.constants["mask_ratio"])
    for m in SENSORS:
        with torch.no_grad():
            masked = random_masking(*plan[m])
            tokens = vit.encode(x[m], m, masked.ids_keep)
            case.compare(f"out_{m}", vit.pool(tokens))
        assert tokens.shape[1] == 1 + case.constants[f"kept_tokens_{m}"]
        case.compare(f"feats_{m}", tokens)
        case.compare(f"mask_{m}", masked.mask, like="ids_and_masks")
        case.compare(f"ids_restore_{m}", masked.ids_restore, like="ids_and_masks")


@check("csmae.backbone_full_recipe")
def backbone_full_recipe(case):
    c, x = case.constants, images_of(case)
    size = {k: c[k] for k in ("img_size", "patch_size", "embed_dim", "num_heads", "global_pool", "norm_eps")}
    size |= dict(specific_depth=c["multi_sensor_encoder_depth"], shared_depth=c["cross_sensor_encoder_depth"])
    vit = MultiSensorViT({m: v.shape[1] for m, v in x.items()}, **size).eval()
    published = to_published_names({f"backbone.{k}": v for k, v in vit.state_dict().items()})
    bare = {k.removeprefix("backbone."): v for k, v in published.items()}
    filled = from_published_names(case.recipe(bare))
    vit.load_state_dict({k.removeprefix("backbone."): v for k, v in filled.items()})
    plan = masking_plan(noises_of(case), "random", c["mask_ratio"])
    for m in SENSORS:
        with torch.no_grad():
            case.compare(m, vit(x[m], m))
            tokens = vit.encode(x[m], m, random_masking(*plan[m]).ids_keep)
            case.compare(f"masked_out_{m}", vit.pool(tokens))
            case.compare(f"masked_feats_{m}_first3tokens", tokens[:, :3])


@check("csmae.loss_reconstruction")
def loss_reconstruction(case):
    for prefix in dict.fromkeys(name.split(".")[0] for name in case.input_names()):
        images, pred, mask = (tensor(case, f"{prefix}.{o}") for o in ("images", "pred", "mask"))
        target = patchify(images, case.constants["patch_size"])
        case.compare(f"{prefix}.patchified", target)
        for name, kind in (("mse", "l2"), ("mae", "l1")):
            for scale, norm_pix in (("raw", False), ("norm", True)):
                value = reconstruction_loss(pred, target, mask, kind, norm_pix)
                case.compare(f"{prefix}.{name}_{scale}", value)
        pred.requires_grad_()
        reconstruction_loss(pred, target, mask).backward()
        case.compare(f"{prefix}.mse_raw_grad_pred_tok0_first32", pred.grad[:, 0, :32])


FEATURE = re.compile(r"(?P<set>\w+)\.(mim_t(?P<t>\d+(\.\d+)?)|mde)(_(?P<what>float64|grad_s1|grad_s2))?")


@check("csmae.loss_feature")
def loss_feature(case):
    for name in case.output_names():
        part = FEATURE.fullmatch(name)
        what, t = part["what"], part["t"] and float(part["t"])
        z = {m: tensor(case, f"{part['set']}.feats_{m}") for m in SENSORS}
        z = {m: (v.double() if what == "float64" else v).requires_grad_() for m, v in z.items()}
        value = ntxent_loss(*z.values(), t) if t else modality_discrepancy_loss(*z.values())
        if what in ("grad_s1", "grad_s2"):
            value.backward()
            case.compare(name, z[what[-2:]].grad)
        elif np.isnan(case.output(name)).any():
            wanted = plain_ntxent(*(v.detach().double().numpy() for v in z.values()), t)
            case.divergent(name, value, wanted, "a zero vector has cosine 0 with everything instead of NaN; "
                           "checked against the closed form in float64")
        else: case.compare(name, value, **(dict(rtol=1e-9, atol=1e-12) if what == "float64" else {}))


def plain_ntxent(z1, z2, t):
    "NT-Xent term by term, in float64; a vector without length has cosine 0."
    z = np.concatenate([z1, z2])
    z = z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-300)
    n, terms = len(z1), []
    for i in range(2 * n):
        others = [math.exp(z[i] @ z[k] / t) for k in range(2 * n) if k != i]
        terms.append(math.log(sum(others)) - z[i] @ z[(i + n) % (2 * n)] / t)
    return np.mean(terms)


@check("csmae.keys")
def keys(case):
    for label in case.output_names():
        stored = case.output(label)
        bare = not any(e["name"].startswith("backbone.") for e in stored)
        tensors = {e["name"]: torch.empty(e["shape"], device="meta") for e in stored}
        config = infer_config(from_published_names(tensors))
        size = config["backbone"]
        with torch.device("meta"):
            parts = {"backbone": MultiSensorViT(**size)}
            if config["decoder"]:
                grid, patch_size = parts["backbone"].grid, size["patch_size"]
                parts["decoder"] = CrossSensorDecoder(size["in_chans"], size["embed_dim"], grid, patch_size,
                                                      **config["decoder"])
        model = torch.nn.ModuleDict(parts)
        trainable = {k for k, v in model.named_parameters() if v.requires_grad}
        parameters = dict(model.named_parameters())
        state = to_published_names({k: (k, v) for k, v in model.state_dict().items()})
        mine = {}
        for name, (key, v) in state.items():
            name = name.removeprefix("backbone.") if bare else name
            mine[name] = dict(name=name, shape=list(v.shape), dtype=str(v.dtype).removeprefix("torch."),
                              kind="parameter" if key in parameters else "buffer", trainable=key in trainable)
        case.compare(label, [mine.pop(e["name"], None) for e in stored] + list(mine.values()))


def make_method(case, backbone="backbone_state_dict", decoder=None, **options):
    "The method with stored weights; images of the set are normalised already and in published band order."
    from rsir_nb.methods.csmae import CSMAE
    state = {f"backbone.{k}": v for k, v in case.input(backbone).items()}
    if decoder: state |= case.input(decoder)
    if options.get("global_pool") == "token":
        state = {k: v for k, v in state.items() if not k.startswith("backbone.fc_norm.")}
    ours = from_published_names(state)
    heads = dict(num_heads=case.constant("num_heads"))
    if decoder: heads |= dict(decoder_heads=case.constant("decoder_num_heads"))
    config = infer_config(ours, **heads)
    size = {k: v for k, v in config["backbone"].items() if k not in ("in_chans", "mlp_ratio", "norm_eps")}
    head = config["decoder"]
    if head: size |= {f"decoder_{k}": head[k] for k in ("embed_dim", "depth", "num_heads")}
    size |= dict(decoder=head["kind"]) if head else dict(decoder_depth=1)
    method = CSMAE({m: m for m in SENSORS}, norm=None, **size | options)
    missing, unexpected = method.load_state_dict(ours, strict=False)
    expected = "normalise." if decoder else ("normalise.", "decoder.")
    missing = [k for k in missing if not k.removeprefix("inputs.").startswith(expected)]
    assert not missing and not unexpected, f"missing {missing}, unexpected {unexpected}"
    return method


def compare_objective(case, method, noises, prefix="", images=None):
    "Every output under `prefix`, from one masked pass; its terms."
    out = method.masked_pass(images or images_of(case), {m: v for m, v in noises.items() if v is not None})
    terms = method.losses_of(out)
    pairs = method.pairs(out.images)
    with torch.no_grad(): guessed = {pair: method.predict(out, *pair, every_token=True) for pair in pairs}
    rebuilt = [v for k, v in terms.items() if k.startswith(("umr", "cmr"))]
    values = {f"loss_{k}": v for k, v in terms.items() if k not in ("loss", "mde")}
    values |= {"loss_total": terms["loss"], "loss_reconstruction_sum": sum(rebuilt)}
    if "mde" in terms: values["loss_mde_signed"] = terms["mde"]
    for m in SENSORS: values |= {f"mask_{m}": out.masks[m].mask, f"feats_{m}": out.features[m]}
    for (s, t), (pred, ids) in guessed.items():
        values[f"pred_{t}_from_{s}"] = pred
        if s != t: values[f"mask_{t}_from_{s}"] = torch.zeros(pred.shape[:2]).scatter(1, ids, 1)
    pattern = re.compile(r"(.+?)(?:_every(\d+)th_token|_tok(\d+)(?:_first(\d+))?)?")
    for name in [n for n in case.output_names() if n.startswith(prefix) and n != "gradient_norms"]:
        part = pattern.fullmatch(name.removeprefix(prefix))
        value = values[part[1]]
        if part[2]: value = value[:, ::int(part[2])]
        if part[3]: value = value[:, int(part[3]), :int(part[4]) if part[4] else None]
        case.compare(name, value)
    return terms


@check("csmae.method_*")
def method_variant(case):
    c = case.constants
    method = make_method(case, decoder="decoder_state_dict", masking=c["masking_strategy"],
        reconstruction=c["reconstruction_strategy"], mask_ratio=c["mask_ratio"], temperature=c["mim_temp"],
        norm_pix=c["norm_pix_loss"], global_pool=c["global_pool"],
        **{f"{o}_weight": float(c[f"apply_{o}_loss"]) for o in ("umr", "cmr", "mim", "mde")})
    assert method.arguments["decoder"] == c["decoding_strategy"]
    compare_objective(case, method, noises_of(case))["loss"].backward()
    norms = {k: v.grad.norm().item() for k, v in method.named_parameters() if v.grad is not None}
    case.compare("gradient_norms", to_published_names(norms), like="gradient_norms")


@check("csmae.method_mask_recon_grid")
def mask_recon_grid(case):
    c = case.constants
    for prefix in dict.fromkeys(name.split(".")[0] for name in case.output_names()):
        masking, reconstruction, decoder = prefix.split("_")
        method = make_method(case, decoder=f"decoder_state_dict_{decoder}", masking=masking,
            reconstruction=reconstruction, mask_ratio=c["mask_ratio"], temperature=c["mim_temp"])
        with torch.no_grad(): compare_objective(case, method, noises_of(case, f"{prefix}."), f"{prefix}.")


OPTIONS = dict(   # prefix of the outputs -> what is changed, as the case's `computes` says
    norm_pix=dict(norm_pix=True), with_mde=dict(mde_weight=1.0), token_pool=dict(global_pool="token"),
    umr_only=dict(cmr_weight=0.0, mim_weight=0.0), cmr_only=dict(umr_weight=0.0, mim_weight=0.0))


@check("csmae.method_options")
def method_options(case):
    for prefix in dict.fromkeys(name.split(".")[0] for name in case.output_names()):
        decoder = "common" if prefix.endswith("_only") else "specific"
        c = case.other("csmae.method_secd" if decoder == "common" else "csmae.method_sesd").constants
        options = dict(mask_ratio=c["mask_ratio"], temperature=c["mim_temp"]) | OPTIONS.get(prefix, {})
        if ratio := re.fullmatch(r"ratio(\d+)_temp(\d+)", prefix):
            options |= dict(mask_ratio=int(ratio[1]) / 100, temperature=int(ratio[2]) / 10)
        elif prefix not in OPTIONS: raise KeyError(f"no option is known for {prefix}")
        method = make_method(case, decoder=f"decoder_state_dict_{decoder}", **options)
        with torch.no_grad(): compare_objective(case, method, noises_of(case, f"{prefix}."), f"{prefix}.")
