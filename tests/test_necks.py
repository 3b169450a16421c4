"Necks: shapes, plain arithmetic and what is refused."
import numpy as np
import pytest
import torch

from rsir_nb.core import InputError, UnknownNameError
from rsir_nb.models.necks import NECKS, PartsNeck, PoolingNeck, ProjectionNeck, make_neck
from rsir_nb.models.projections import MlpNeck, ReluNeck


def features(n=6, f=96): return torch.randn(n, f, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("spec,width", [("projection", 64), ("pooling", 64), ("parts", 512), (None, 96), (dict(name="pooling", embed_dim=5), 5),
                                        (dict(name="parts", sizes=[3, 4]), 7), (dict(name="projection", embed_dim=9), 9),
                                        ("relu", 128), ("mlp", 128), (dict(name="mlp", embed_dim=9, hidden_dim=5, layers=3, relu=True), 9),
                                        (dict(name="mlp", layers=1, norm=True), 128)], ids=str)
def test_every_neck_says_how_long_its_embeddings_are(spec, width):
    neck = make_neck(spec, 96).eval()
    assert neck(features()).shape == (6, width) and neck.embed_dim == width


def test_all_registered_necks_are_tested(): assert set(NECKS.list()) == {"projection", "pooling", "parts", "relu", "mlp"}


@pytest.mark.parametrize("long,short", [(96, 64), (100, 64), (7, 7), (7, 1), (1152, 64)])
def test_pooling_by_loops(long, short):
    x = features(f=long)
    wanted = np.stack([x[:, int(np.floor(i * long / short)):int(np.ceil((i + 1) * long / short))].mean(1) for i in range(short)], 1)
    np.testing.assert_allclose(PoolingNeck(long, short)(x), wanted, rtol=1e-5, atol=1e-6)


def test_projection_is_linear_and_drops_features_in_training_only():
    neck, x = ProjectionNeck(96, 8, dropout=0.5), features()
    torch.testing.assert_close(neck.eval()(x), x @ neck[1].weight.T + neck[1].bias)
    assert not torch.equal(neck.train()(x), neck(x))


@pytest.mark.parametrize("neck", [ProjectionNeck(96, normalise=True), PoolingNeck(96, normalise=True)])
def test_unit_length(neck): torch.testing.assert_close(neck(features()).norm(dim=1), torch.ones(6))


def test_parts_are_normalised_one_by_one_and_weighted_at_evaluation_only():
    neck, x = PartsNeck(96, [3, 5], dropout=0, weights=[0.5, 2]), features()
    parts = [torch.nn.functional.normalize(x @ o.weight.T + o.bias) for o in neck.layers]
    torch.testing.assert_close(neck(x), torch.cat(parts, 1))
    weighted = torch.cat([0.5 * parts[0], 2 * parts[1]], 1)
    torch.testing.assert_close(neck.eval()(x), weighted / weighted.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("make,error,word", [
    (lambda: PoolingNeck(8, 9), InputError, "shortens"), (lambda: PartsNeck(8, []), InputError, "no embedding"),
    (lambda: PartsNeck(8, [4, 0]), InputError, "no embedding"), (lambda: PartsNeck(8, [4, 4], weights=[1]), InputError, "no embedding"),
    (lambda: make_neck("project", 8), UnknownNameError, "projection"), (lambda: make_neck(dict(name="parts", in_dim=8), 8), InputError, "by hand"),
    (lambda: make_neck(dict(name="pooling", dim=4), 8), UnknownNameError, "embed_dim")])
def test_what_is_refused(make, error, word):
    with pytest.raises(error, match=word): make()


def test_projection_heads():
    x = features()
    relu, mlp = ReluNeck(96, 8), MlpNeck(96, 8, relu=True).eval()
    assert torch.allclose(relu(x), (x @ relu[0].weight.T + relu[0].bias).clamp(min=0), atol=1e-5)
    assert relu.nonnegative and mlp.nonnegative and not MlpNeck(96).nonnegative and (mlp(x) >= 0).all()
    assert torch.allclose(mlp(x)[:1], mlp(x[:1]), atol=1e-5)
    for bad in dict(layers=0), dict(hidden_dim=0), dict(embed_dim=0):
        with pytest.raises(InputError, match="no multilayer perceptron"): MlpNeck(96, **bad)
    with pytest.raises(InputError, match="embed_dim 0"): ReluNeck(96, 0)


def test_a_head_that_normalises_over_the_batch():
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(0)) + 3
    head = MlpNeck(12, 8, layers=1, norm=True)
    z = head(x)
    linear = x @ head[0].weight.T + head[0].bias
    wanted = (linear - linear.mean(0))/(linear.var(0, correction=0) + 1e-5).sqrt()
    assert torch.allclose(z, wanted, atol=1e-5) and not head.nonnegative
    assert not [k for k, _ in head.named_parameters() if not k.startswith("0.")], "no scale is learned"
    head.eval()
    assert torch.allclose(head(x)[:3], head(x[:3]), atol=1e-6), "embeddings do not depend on the batch"
    assert (MlpNeck(12, 8, norm=True, relu=True)(x) >= 0).all()
