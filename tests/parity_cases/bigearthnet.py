"Handlers of the `bigearthnet.*` cases: bands, orders and constants; label tables; preprocessing."
import torch

from parity import check
from rsir_nb.sensors import BAND_ORDERS, BANDS, CHANNEL_PRESETS, NORM_TABLES, SENSORS, get_sensor, norm_stats


def stats_dict(bands, table):
    "Mean and std by band."
    return {k: dict(zip(bands, v, strict=True)) for k, v in stats_lists(bands, table).items()}


def stats_lists(bands, table):
    "Mean and std in channel order, in double precision, since the tables are compared exactly."
    mean, std = norm_stats(bands, table, dtype=torch.float64)
    return {"mean": mean.tolist(), "std": std.tolist()}


@check("bigearthnet.bands")
def bands(case):
    level_2a = get_sensor("s2_12").bands
    delivered_at = lambda metres: [o for o in level_2a if BANDS[o].resolution == metres]
    case.compare("band_stats_s2", stats_dict(level_2a, "ben_v1"))
    radar = [o for o in NORM_TABLES["ben_v1"] if o not in level_2a]
    case.compare("band_stats_s1", stats_dict(radar, "ben_v1"))
    case.compare("channels_all_s2", level_2a)
    for metres in (10, 20, 60): case.compare(f"channels_{metres}m", delivered_at(metres))
    case.compare("channels_10m_20m_natural_order", BAND_ORDERS["natural"]["s2"])
    case.compare("channels_rgb", SENSORS["s2_rgb"].bands)
    case.compare("csmae_band_combinations", {k: list(v) for k, v in CHANNEL_PRESETS.items()})
    case.compare("csmae_mean_std", {k: stats_lists(v, "ben_v1") for k, v in CHANNEL_PRESETS.items()})
    case.compare("cbir_order", BAND_ORDERS["cbir"])
    case.compare("cv4rs_order", BAND_ORDERS["cv4rs"]["s2"])
    case.compare("vessel_normalisation", stats_lists(BAND_ORDERS["vessel"]["s2"], "vessel"))
