"Universal image embeddings (UniFEx): margin losses and necks."
import torch
from parity import check
from parity_cases.csmae import tensor

from rsir_nb.losses.margins import AdaCosLoss, AdaFaceLoss, ArcFaceLoss, CurricularFaceLoss, DynMArcFaceLoss, LiArcFaceLoss
from rsir_nb.models.necks import PoolingNeck, ProjectionNeck


def compare_steps(case, make, **state):
    "Two passes in training mode with the same weights; `state` names buffers by the outputs that hold them."
    weight = tensor(case, "weight")
    classes = weight.shape[0] // case.constants.get("k", 1)
    loss = make(weight.shape[1], classes)
    loss.weight.data = weight
    for step in ("step1", "step2"):
        z, y = tensor(case, f"embeddings_{step}").requires_grad_(), tensor(case, f"labels_{step}")
        loss.zero_grad()
        before = {k: v.clone() for k, v in loss.named_buffers()}
        case.compare(f"{step}.logits", loss.logits(z, y).detach())
        loss.load_state_dict({**loss.state_dict(), **before})      # one pass a step: what the logits moved is put back
        value = loss(z, y)
        value.backward()
        case.compare(f"{step}.cross_entropy", value.detach())
        case.compare(f"{step}.grad_embeddings", z.grad, like="gradients")
        case.compare(f"{step}.grad_weight", loss.weight.grad, like="gradients")
        for output, name in state.items(): case.compare(f"{step}.{output}", getattr(loss, name))
    return loss


@check("unifex.arcface_*")
def arcface(case):
    c = case.constant
    compare_steps(case, lambda d, n: ArcFaceLoss(d, n, c("s"), c("m"), c("k")))


@check("unifex.dynm_arcface")
def dynm_arcface(case):
    c = case.constant
    loss = compare_steps(case, lambda d, n: DynMArcFaceLoss(d, n, tensor(case, "class_counts"), c("s"), c("m_max"), c("m_min"), c("k")))
    torch.testing.assert_close(loss.margins, tensor(case, "class_margins"))


@check("unifex.liarcface")
def li_arcface(case):
    compare_steps(case, lambda d, n: LiArcFaceLoss(d, n, case.constant("s"), case.constant("m")))


@check("unifex.adacos_*")
def adacos(case):
    loss = compare_steps(case, lambda d, n: AdaCosLoss(d, n, dynamic=case.id.endswith("dynamic")), s="scale")
    start = AdaCosLoss(loss.weight.shape[1], loss.n_classes).scale
    torch.testing.assert_close(start, torch.tensor([case.constant("s0")]))


@check("unifex.curricularface")
def curricularface(case):
    c = case.constant
    compare_steps(case, lambda d, n: CurricularFaceLoss(d, n, c("s"), c("m"), c("ema")), t="t")


@check("unifex.adaface_*")
def adaface(case):
    c = case.constant
    compare_steps(case, lambda d, n: AdaFaceLoss(d, n, c("s"), c("m"), c("h"), c("t_alpha")), batch_mean="mean", batch_std="std")


@check("unifex.necks")
def necks(case):
    weight = tensor(case, "proj_weight")
    neck = ProjectionNeck(*weight.T.shape).eval()
    neck.load_state_dict({"1.weight": weight, "1.bias": tensor(case, "proj_bias")})     # published as neck.1.weight, neck.1.bias
    case.compare("proj_layer", neck(tensor(case, f"x{weight.shape[1]}")).detach())
    for name in (o for o in case.output_names() if o.startswith("pooling_")):
        long, short = (int(o) for o in name.removeprefix("pooling_").split("_to_"))
        case.compare(name, PoolingNeck(long, short)(tensor(case, f"x{long}")))
