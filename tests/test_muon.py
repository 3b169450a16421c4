"Muon: singular values, the steps of timm's Muon and of torch's AdamW, groups, and training to the same state after a break."
import pytest
import torch

from rsir_nb.core import InputError
from rsir_nb.machine import declare_torchvision_ops
from rsir_nb.methods.muon import Muon, orthogonalise
from rsir_nb.methods.optim import OPTIMIZERS, make_optim, make_optimizer

declare_torchvision_ops()
from timm.optim.muon import Muon as TimmMuon  # noqa: E402


def rng(seed=0): return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16), (5, 200)])
def test_singular_vectors_stay_and_values_are_alike(shape):
    x = torch.randn(shape, generator=rng())
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    found = u.T @ orthogonalise(x) @ v.T
    values = found.diagonal()[s > 0.1*s[0]]
    assert ((values > 0.65) & (values < 1.25)).all()
    torch.testing.assert_close(found, found.diagonal().diag(), atol=2e-3, rtol=0)
    torch.testing.assert_close(orthogonalise(100*x), orthogonalise(x), atol=1e-4, rtol=1e-4)
    assert orthogonalise(torch.zeros(shape)).eq(0).all()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (8, 4, 3, 3)])
def test_steps_are_those_of_timm(shape, nesterov):
    start, slopes = torch.randn(shape, generator=rng()), torch.randn((6, *shape), generator=rng(1))
    weights = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    made = [Muon([weights[0]], lr=0.01, weight_decay=0.1, nesterov=nesterov),
            TimmMuon([weights[1]], lr=0.01, weight_decay=0.1, nesterov=nesterov, momentum=0.95, ns_coefficients="original")]
    for slope in slopes:
        for p, o in zip(weights, made, strict=True):
            p.grad = slope.clone()
            o.step()
    moved = (weights[1] - start).norm()
    assert (weights[0] - weights[1]).norm() < 0.05*moved       # timm computes in bfloat16


def test_vectors_are_trained_by_adamw():
    start, slopes = torch.randn(7, generator=rng()), torch.randn(5, 7, generator=rng(1))
    weights = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    made = [Muon([weights[0]], lr=0.02, weight_decay=0.1, betas=(0.9, 0.99)),
            torch.optim.AdamW([weights[1]], lr=0.02, weight_decay=0.1, betas=(0.9, 0.99))]
    for slope in slopes:
        for p, o in zip(weights, made, strict=True):
            p.grad = slope.clone()
            o.step()
    torch.testing.assert_close(*weights)


def test_a_broken_off_training_goes_on_to_the_same_weights():
    def net(): torch.manual_seed(0); return torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.Flatten(), torch.nn.Linear(36, 3))
    x = torch.randn(8, 5, 2, 5, 5, generator=rng())
    def steps(model, o, some):
        for batch in x[some]:
            o.zero_grad()
            model(batch).square().mean().backward()
            o.step()
    whole = net()
    steps(whole, Muon(whole.parameters(), lr=0.1), slice(0, 8))
    first = net()
    o = Muon(first.parameters(), lr=0.1)
    steps(first, o, slice(0, 4))
    second = net()
    second.load_state_dict(first.state_dict())
    other = Muon(second.parameters(), lr=0.1)
    other.load_state_dict(o.state_dict())
    steps(second, other, slice(4, 8))
    for a, b in zip(whole.parameters(), second.parameters(), strict=True): assert torch.equal(a, b)


def test_in_a_config_with_groups_of_their_own():
    net = torch.nn.Linear(6, 4)
    o = make_optim(dict(optimizer="muon", lr=0.02, weight_decay=0.3, warmup_epochs=0, epochs=4, options=dict(nesterov=False)))
    groups = [dict(params=[net.weight]), dict(params=[net.bias], lr_scale=0.5, weight_decay=0.)]
    made = make_optimizer(groups, o, steps=8)["optimizer"]
    assert isinstance(made, Muon) and "muon" in OPTIMIZERS.list()
    assert [(g["lr"], g["weight_decay"], g["nesterov"]) for g in made.param_groups] == [(0.02, 0.3, False), (0.01, 0., False)]
    loss = made.step(lambda: net(torch.ones(1, 6)).sum())
    assert loss.shape == ()
    with pytest.raises(InputError, match="cannot be built"): make_optimizer(groups, make_optim(dict(optimizer="muon", options=dict(speed=3))), steps=8)
