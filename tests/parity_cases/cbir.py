"Handlers of the contrastive system (cbir): loss, fusion and classifier, networks under published names, preprocessing."
import re

import numpy as np
import torch
from parity import check
from rsir_nb.data.bigearthnet import stack_bands
from rsir_nb.losses.contrastive import ntxent_loss
from rsir_nb.losses.metric import LabelLoss
from rsir_nb.methods.contrastive import Contrastive
from rsir_nb.methods.fusion import fuse_parts
from rsir_nb.methods.inputs import InputAdapter
from rsir_nb.sensors import BAND_ORDERS, get_sensor

STAGES = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}


# loss -----------------------------------------------------------------------------------------------

def closed_form(z1, z2, t):
    "NT-Xent with 1e-6 in the denominator, as published, in float64; a vector without length has cosine 0."
    z = np.concatenate([z1, z2]).astype(np.float64)
    z /= np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
    e, n = np.exp(z @ z.T/t), len(z1)
    others = np.maximum(e.sum(1) - np.diag(e), 1e-6)
    pairs = e[np.arange(2*n), np.roll(np.arange(2*n), n)]
    return -np.log(pairs/(others + 1e-6)).mean()


@check("cbir.ntxent")
def ntxent(case):
    for name in case.output_names():
        group, t, what = re.fullmatch(r"(\w+)\.t([\d.]+)\.(\w+)", name).groups()
        z1, z2 = (torch.tensor(case.input(f"{group}.{o}")).requires_grad_() for o in ("z1", "z2"))
        t = float(t)
        loss = ntxent_loss(z1, z2, t)
        exact = what == "loss_exact_arithmetic"
        if exact:
            double = ntxent_loss(z1.double(), z2.double(), t).item()
            tiny = closed_form(z1.detach().numpy(), z2.detach().numpy(), t)
            case.compare(name, tiny, like=what, rtol=1e-7, atol=1e-12)
            assert abs(double - tiny) < 2e-6, (name, double, tiny)
        elif what.startswith("grad"):
            grads = torch.autograd.grad(loss, (z1, z2))
            case.compare(name, grads[what == "grad_z2"], rtol=1e-5, atol=1e-5)
        elif t < 0.05 or group == "zero_vector":
            case.divergent(name, loss, closed_form(z1.detach().numpy(), z2.detach().numpy(), t),
                           "a vector's likeness with itself is left out, not subtracted after rounding", 1e-4, 1e-5)
        else: case.compare(name, loss, atol={0.05: 0.02, 0.1: 0.002}.get(t, 1e-5), rtol=1e-5)


@check("cbir.fusion_classification")
def fusion(case):
    x = {k: torch.tensor(v) for k, v in case.inputs().items()}
    for name in "concat", "avg", "sum", "max":
        z, weight = fuse_parts(dict(s1=x["z1"], s2=x["z2"]), ["s1", "s2"], name), x[f"{name}.fc_weight"]
        loss = LabelLoss(weight.shape[1], weight.shape[0])
        loss.classifier.load_state_dict(dict(weight=weight, bias=x[f"{name}.fc_bias"]))
        case.compare(f"{name}.fused", z)
        case.compare(f"{name}.logits", loss.classifier(z))
        case.compare(f"{name}.loss", loss(z, x["labels"]))


# networks -------------------------------------------------------------------------------------------

def networks(case):
    "The method in its three forms, at the published size; images of the set are normalised already."
    size, bands = case.constant("out_channels"), BAND_ORDERS["cbir"]
    sensors = {m: dict(get_sensor(m).to_dict(), bands=bands[m]) for m in ("s2", "s1")}
    make = lambda encoder: Contrastive(sensors, norm=None, encoder=encoder,
                                       projection=dict(name="relu", embed_dim=case.constant("projection_dim")))
    return dict(separate=make("separate"), joint=make(dict(name="joint", adapter_dim=size)), bands12=make("early"))


def published_trunk(net, head):
    "(published name, tensor) of a ResNet, after the names of its first convolution."
    found = [(head, net.conv1.weight), ("encoder.0.weight", net.conv1.weight)]
    for k, v in net.state_dict(keep_vars=True).items():
        stage, _, rest = k.partition(".")
        if stage in STAGES and stage != "conv1": found.append((f"encoder.{STAGES[stage]}.{rest}", v))
    return found


def published(forms, label):
    "Published name -> tensor; aliases are one tensor."
    if label == "bands12": return dict(published_trunk(forms["bands12"].encoder.net.net, "conv1.weight"))
    separate, joint, found = forms["separate"], forms["joint"], {}
    for m in "s1", "s2":
        found |= {f"encoder_{m}.{k}": v for k, v in published_trunk(separate.encoder.nets[m].net, "conv1.weight")}
        found |= {f"projection_head_{m}.{k}": v for k, v in separate.projections[m].state_dict(keep_vars=True).items()}
    for m, theirs in dict(s1="SAR", s2="RGB").items():
        found |= {f"encoder_joint.conv_{theirs}.conv.{k}": v
                  for k, v in joint.encoder.adapters[m].state_dict(keep_vars=True).items()}
    return found | {f"encoder_joint.{k}": v for k, v in published_trunk(joint.encoder.net.net, "conv_first.weight")}


def entries(tensors, stored):
    "The entries of `stored`, as `tensors` give them; a second name of a tensor counts as a buffer."
    seen, found = set(), {}
    for name, v in tensors.items():
        learns = isinstance(v, torch.nn.Parameter) and id(v) not in seen
        seen.add(id(v))
        found[name] = dict(name=name, shape=list(v.shape), dtype=str(v.dtype).removeprefix("torch."),
                           kind="parameter" if learns else "buffer", trainable=learns)
    return [found.pop(e["name"], None) for e in stored] + list(found.values())


@check("cbir.resnet_full_recipe")
def resnets(case):
    forms, tables = networks(case), {e["key"]: e["name"] for e in case.entry["outputs"] if e["name"] == "keys"}
    for label in tables:
        tensors, stored = published(forms, label), case.output(label)
        case.compare(label, entries(tensors, stored))
        ordered = {e["name"]: tensors[e["name"]] for e in stored}
        for name, value in case.recipe(ordered).items():
            with torch.no_grad(): ordered[name].copy_(value)
    heads = {m: forms["separate"].projections[m] for m in ("s1", "s2")}
    x = {"eval": torch.tensor(case.input("images")), "train": torch.tensor(case.input("images_train"))}
    cut = lambda o: dict(s1=o[:, 10:], s2=o[:, :10])
    for mode, images in x.items():
        # batch statistics of four images: the stored float32 values are 5e-4 from the same networks in float64
        loose = dict(rtol=case.tolerance["train_mode_rtol"], atol=1e-3) if mode == "train" else {}
        for form in "separate", "joint":
            encoder = forms[form].encoder.train(mode == "train")
            with torch.no_grad(): h = {m: encoder(cut(images)[m], m) for m in ("s1", "s2")}
            for m, o in h.items():
                case.compare(f"{mode}.{form}.h_{m}", o, **loose)
                case.compare(f"{mode}.{form}.projection_{m}", heads[m](o), **loose)
    with torch.no_grad(): case.compare("eval.bands12", forms["bands12"].encoder.eval().net(x["eval"]))
    after = published(forms, "two_branch")
    for name in [o for o in case.output_names() if ".encoder_" in o and "after" in o]:
        case.compare(name, after[re.sub(r"^train\.after\w*\.", "", name)], **loose)


# images ---------------------------------------------------------------------------------------------

@check("cbir.preprocessing")
def preprocessing(case):
    orders, x = BAND_ORDERS["cbir"], case.inputs()
    stacked = [*x["bands_10m"], *x["bands_20m"]]
    arrays = dict(zip(orders["s2"], stacked, strict=True)) | dict(VV=x["vv"], VH=x["vh"])
    adapter = InputAdapter(dict(s1="s1", s2="s2"), 120, "ben_v1", orders)
    for m, name in dict(s2="bands_S2", s1="bands_S1").items():
        image = stack_bands(arrays, get_sensor(m).bands, align_corners=False)
        case.compare(f"{name}_rows0_29", adapter(image[None], m)[0, :, :30])
