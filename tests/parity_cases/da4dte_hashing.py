"Handler of `da4dte.hashing_losses`: the published objective of the hashing stage, its vessel variants and gradients."
import torch
from parity import check

from rsir_nb.losses.contrastive import ntxent_loss
from rsir_nb.losses.hashing import bit_balance_loss, quantisation_loss, zero_one_loss
from rsir_nb.methods.hashing import hashing_losses
from rsir_nb.retrieval.codes import binarise


@check("da4dte.hashing_losses")
def hashing_stage(case):
    h = {m: torch.from_numpy(case.input(name)).requires_grad_() for m, name in (("s1", "h1"), ("s2", "h2"))}
    labels, t = torch.from_numpy(case.input("labels_onehot")), case.constant("contrastive_temp")
    weights = dict(contrastive=1., quantisation=case.constant("beta_quantisation"),
                   balance=case.constant("gamma_bit_balance"))
    both = dict(ntxent=lambda: ntxent_loss(h["s1"], h["s2"], t),
                quantisation=lambda: quantisation_loss(h, "sum"),
                bit_balance=lambda: bit_balance_loss(h, reduction="sum"),
                total=lambda: hashing_losses(h, h, weights, temperature=t, published=True)["loss"])
    for name, loss in both.items():
        value = loss()
        case.compare(name, value)
        for m, g in zip(h, torch.autograd.grad(value, list(h.values())), strict=True):
            case.compare(f"{name}_grad_{m}", g)
    case.compare("quantisation_vessel", quantisation_loss(h["s2"], "sum"))
    case.compare("bit_balance_vessel", bit_balance_loss(h["s2"], reduction="sum"))
    value = zero_one_loss(h["s2"], labels)
    case.compare("zero_one", value)
    case.compare("zero_one_grad", torch.autograd.grad(value, h["s2"])[0])
    for m in h: case.compare(f"code_{m}", binarise(h[m].detach().numpy()))
