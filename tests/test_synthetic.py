"""The simulated archive: the same whatever the order of access, split by place, and in plausible units."""
import numpy as np
import pytest
import torch
from rsir_nb.core import InputError
from rsir_nb.simulate.synthetic import SyntheticArchive
from rsir_nb.sensors import norm_stats

SMALL = dict(n_places=10, patches_per_place=4, img_size=60)


@pytest.fixture(scope="module")
def archive(): return SyntheticArchive(**SMALL)


def test_order_of_access_does_not_matter(archive):
    again = SyntheticArchive(**SMALL)
    for i in (37, 2, 20):
        for m in ("s1", "s2"): assert torch.equal(archive[i][m], again[i][m])
    assert torch.equal(again[2]["s2"], archive[archive.ids[2]]["s2"])
    assert not torch.equal(SyntheticArchive(**SMALL, seed=1)[2]["s2"], archive[2]["s2"])


def test_no_place_is_in_two_splits(archive):
    assert archive.table.groupby("place").split.nunique().max() == 1
    assert set(archive.table.split) == {"train", "val", "test"}


def test_every_patch_has_labels_and_a_footprint(archive):
    assert (archive.labels.sum(1) >= 1).all() and archive.labels.shape == (40, 19)
    assert archive.table.geometry.notna().all() and archive.table.id.is_unique


def test_values_are_those_of_the_sensors(archive):
    "Means of all patches within two standard deviations of BigEarthNet's, band by band."
    for m in ("s1", "s2"):
        x = torch.stack([archive[i][m] for i in range(0, 40, 2)])
        mean, std = norm_stats(archive.sensors[m].bands, "ben_v1")
        assert torch.isfinite(x).all()
        assert ((x.mean((0, 2, 3)) - mean).abs() < 2 * std).all()


def test_clouds_are_seen_by_one_sensor_only():
    clear, cloudy = SyntheticArchive(**SMALL), SyntheticArchive(**SMALL, clouds=1.0)
    assert torch.equal(clear[5]["s1"], cloudy[5]["s1"])
    assert not torch.equal(clear[5]["s2"], cloudy[5]["s2"])


def test_labels_are_neither_rare_nor_everywhere():
    labels = SyntheticArchive(n_places=40, patches_per_place=4, img_size=120).labels.astype(int)
    shared = labels @ labels.T > 0
    np.fill_diagonal(shared, False)
    assert 0.1 < shared.mean() < 0.5


def test_nonsense_is_refused():
    with pytest.raises(InputError, match="at least one of each"): SyntheticArchive(n_places=0)
