"Bands by name: orders that invert each other, sensors that travel through JSON, errors name the nearest."
import itertools
import json

import numpy as np
import pytest
import torch

from rsir_nb.core import InputError, UnknownNameError
from rsir_nb.sensors import (BAND_ORDERS, BANDS, CHANNEL_PRESETS, NORM_TABLES, SENSORS, UNITS, Sensor,
                             band_permutation, get_sensor, norm_stats, register_sensor, reorder_bands,
                             stacked_bands)


@pytest.mark.parametrize("name", SENSORS)
def test_sensor_survives_json(name):
    sensor = get_sensor(name)
    assert get_sensor(json.loads(json.dumps(sensor.to_dict()))) == sensor
    assert sensor.unit in UNITS and {BANDS[o].unit for o in sensor.bands} == {sensor.unit}
    assert len({hash(sensor), hash(get_sensor(name))}) == 1


@pytest.mark.parametrize("a,b", list(itertools.permutations(("natural", "csmae", "cbir", "configilm"), 2)))
def test_orders_invert_each_other(a, b):
    x = torch.randn(3, 12, 2, 2)
    there = reorder_bands(x, stacked_bands(a), stacked_bands(b))
    assert torch.equal(reorder_bands(there, stacked_bands(b), stacked_bands(a)), x)


def test_reordering_follows_the_names_not_the_places():
    bands, want = SENSORS["s2_12"].bands, BAND_ORDERS["csmae"]["s2"]
    x = np.arange(12.0).reshape(12, 1, 1) * np.ones((12, 2, 2))
    for channel, band in zip(reorder_bands(x, bands, want), want, strict=True):
        assert (channel == bands.index(band)).all()


def test_every_preset_has_constants():
    for bands in CHANNEL_PRESETS.values():
        for table in ("ben_v1", "ben_v2"):
            mean, std = norm_stats(bands, table)
            assert mean.shape == std.shape == (len(bands),) and mean.dtype == torch.float32
            assert (std > 0).all()


def test_own_table_and_own_sensor():
    mean, std = norm_stats(["TIR1"], {"TIR1": (290.0, 12.0)})
    assert (mean.item(), std.item()) == (290.0, 12.0)
    sensor = Sensor("test_only_thermal", ["TIR1"], "kelvin", 30)
    assert register_sensor(sensor) is register_sensor(sensor) is get_sensor("test_only_thermal")
    assert "TIR1" in sensor._repr_markdown_()
    del SENSORS["test_only_thermal"]


def test_errors_name_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean.*B08"): get_sensor("s2").index("B8")
    with pytest.raises(UnknownNameError, match="ben_v1"): norm_stats(["B02"], "ben_v3")
    with pytest.raises(UnknownNameError, match="HH"): band_permutation(["VH", "VV"], ["HH"])
    with pytest.raises(InputError, match="B02"):
        reorder_bands(torch.zeros(9, 4, 4), get_sensor("s2").bands, ["B02"])
    with pytest.raises(InputError, match="each of them once"): Sensor("x", (), "dB")
    assert "imagenet" in NORM_TABLES
