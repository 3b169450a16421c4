"Batched transforms move all sensors alike, and draw chance only from the generator they are given."
import numpy as np
import pytest
import torch

from rsir_nb.core import InputError
from rsir_nb.data import transforms as t
from rsir_nb.sensors import NORM_TABLES, SENSORS


def make(n=6, size=16):
    "Both modalities hold the pixel's own number, so that geometry can be read off."
    x = torch.arange(n * size * size, dtype=torch.float32).reshape(n, 1, size, size)
    return dict(id=[str(i) for i in range(n)], s1=x.repeat(1, 2, 1, 1), s2=x.repeat(1, 10, 1, 1), labels=torch.eye(n))


RANDOM = dict(flips=lambda b, rng: t.random_flips(b, rng), crop=lambda b, rng: t.random_crop(b, 10, rng),
              zoom=lambda b, rng: t.random_resized_crop(b, rng, (0.3, 0.9)))


@pytest.mark.parametrize("name", RANDOM)
def test_same_geometry_for_all_sensors(name):
    batch, func = make(), RANDOM[name]
    out = func(batch, np.random.default_rng(0))
    for k in range(2): torch.testing.assert_close(out["s1"][:, k], out["s2"][:, 5 + k], rtol=0, atol=0)
    assert out["id"] == batch["id"] and out["labels"] is batch["labels"]
    torch.testing.assert_close(batch["s1"], make()["s1"]), "nothing is changed in place"
    torch.manual_seed(1)
    np.random.seed(1)
    torch.testing.assert_close(func(batch, np.random.default_rng(0))["s1"], out["s1"], rtol=0, atol=0)
    assert not torch.equal(func(batch, np.random.default_rng(7))["s1"], out["s1"])


def test_flips_are_four_and_even():
    batch = make(400, 4)
    out = t.random_flips(batch, np.random.default_rng(0))["s1"]
    kinds = [batch["s1"], batch["s1"].flip(-1), batch["s1"].flip(-2), batch["s1"].flip(-1, -2)]
    counts = [int(sum(torch.equal(a, b) for a, b in zip(out, k, strict=True))) for k in kinds]
    assert sum(counts) == 400 and min(counts) > 70
    assert torch.equal(t.random_flips(batch, np.random.default_rng(0), 0, 0)["s1"], batch["s1"])
    assert torch.equal(t.random_flips(batch, np.random.default_rng(0), 1, 0)["s1"], batch["s1"].flip(-1))


def test_crops_are_windows():
    batch = make(300, 6)
    out = t.random_crop(batch, 4, np.random.default_rng(0))["s2"]
    assert out.shape == (300, 10, 4, 4)
    corners = (out[:, 0, 0, 0] - batch["s2"][:, 0, 0, 0]).int()
    assert {divmod(int(o), 6) for o in corners} == {(r, c) for r in range(3) for c in range(3)}
    assert (out[:, 0] - out[:, 0, :1, :1] == batch["s2"][0, 0, :4, :4]).all()
    assert torch.equal(t.center_crop(batch, 4)["s1"], batch["s1"][..., 1:5, 1:5])
    for bad in (0, 7):
        with pytest.raises(InputError): t.center_crop(batch, bad)


def test_full_zoom_changes_nothing():
    batch = make()
    assert torch.equal(t.random_resized_crop(batch, np.random.default_rng(0), (1, 1))["s1"], batch["s1"])


def test_one_grid():
    batch = make()
    with pytest.raises(InputError, match="one grid"): t.random_flips({**batch, "s2": batch["s2"][..., :8]}, np.random.default_rng(0))
    with pytest.raises(InputError, match="no images"): t.image_size(dict(id=["a"]))
    assert t.resample({**batch, "s2": batch["s2"][..., :8, :8]}, 16)["s2"].shape == (6, 10, 16, 16)


@pytest.mark.parametrize("table", ["ben_v1", "ben_v2"])
def test_normalise_against_float64(table):
    sensor = SENSORS["s2"]
    x = np.random.default_rng(0).gamma(4, 400, (3, 10, 5, 5))
    mean, std = np.array([NORM_TABLES[table][b] for b in sensor.bands]).T
    normalise = t.Normalise.of(sensor, table)
    got = normalise(torch.tensor(x, dtype=torch.float32))
    np.testing.assert_allclose(got, (x - mean[:, None, None]) / std[:, None, None], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(normalise.inverse(got), x, rtol=1e-4)
    again = t.Normalise(torch.zeros(10), torch.ones(10))
    again.load_state_dict(normalise.state_dict())
    assert torch.equal(again(got), normalise(got))
    with pytest.raises(InputError): t.Normalise(torch.zeros(3), torch.zeros(3))


def test_csmae_input(shared):
    "Grid, order, orientation and constants together give what the published network is fed."
    from rsir_nb.data.checks import to_grid
    from rsir_nb.sensors import norm_stats, stacked_bands
    case = np.load(shared / "golden/bigearthnet/preprocessing_csmae.npz")
    bands = stacked_bands("csmae")
    x = torch.stack([to_grid(case[f"in.raw_{b}"], 120) for b in bands])
    seen = t.csmae_orientation(x)
    np.testing.assert_allclose(x[:, :30], case["out.reader_rows0_29"], rtol=1e-5, atol=1e-2)
    got = t.Normalise(*norm_stats(bands, "ben_v1"))(seen)
    np.testing.assert_allclose(got[:, :30], case["out.model_input_rows0_29"], rtol=1e-4, atol=1e-4)
