"Handlers of the `bigearthnet.*` cases: bands, orders and constants; label tables; preprocessing."
import torch

from parity import check
from rsir_nb.data.bigearthnet import stack_bands
from rsir_nb.data.checks import to_grid
from rsir_nb.data.labels import (BEN19, BEN19_ORIGINAL, BEN43, BEN43_ORIGINAL, CLASS_43_TO_19, LABEL_ALIASES,
                                 label_name, to_19_labels)
from rsir_nb.methods.inputs import InputAdapter
from rsir_nb.sensors import (BAND_ORDERS, BANDS, CHANNEL_PRESETS, NORM_TABLES, SENSORS, get_sensor,
                             norm_stats, reorder_bands)


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


@check("bigearthnet.label_tables")
def label_tables(case):
    case.compare("class_43_to_19", CLASS_43_TO_19)
    case.compare("classes_43_original_order", list(BEN43_ORIGINAL))
    case.compare("classes_43_sorted", list(BEN43))
    case.compare("classes_19_original_order", list(BEN19_ORIGINAL))
    case.compare("classes_19_sorted", list(BEN19))
    case.compare("csmae_classes_19_lowercase_order", [o.lower() for o in BEN19])
    case.compare("cbir_classes_19_order", list(BEN19_ORIGINAL))
    case.compare("cbir_classes_43_order", list(BEN43_ORIGINAL))
    members = [[i for i, o in enumerate(BEN43_ORIGINAL) if to_19_labels([o]) == [name]]
               for name in BEN19_ORIGINAL]
    case.compare("cbir_label_conversion_19_from_43_indices", members)
    spelled = {label_name(o): o for o in LABEL_ALIASES}   # the two names that CV4RS spells in its own way
    case.compare("cv4rs_classes_43_order", [spelled.get(o, o) for o in BEN43_ORIGINAL])


@check("bigearthnet.label_examples")
def label_examples(case):
    def example(classes):
        hot = lambda vocab, names: vocab.encode(names).int().tolist()
        names = to_19_labels(classes)
        out = {"labels_43": classes, "labels_19": names or None, "multi_hot_43_sorted": hot(BEN43, classes),
               "multi_hot_43_original": hot(BEN43_ORIGINAL, classes)}
        if not names: return out   # CSMAE refuses a patch without a class, the set has no vectors for it
        return {**out, "multi_hot_19_sorted": hot(BEN19, names),
                "multi_hot_19_original": hot(BEN19_ORIGINAL, names),
                "csmae_vector": hot(BEN19, [o.lower() for o in names])}
    stored = case.output("examples")
    once = [{**o, "labels_19": o["labels_19"] and list(dict.fromkeys(o["labels_19"]))} for o in stored]
    case.divergent("examples", [example(o["labels_43"]) for o in stored], once,
                   "of 43 classes that meet in one of 19 its name is given once; vectors are as published")


@check("bigearthnet.bicubic")
def bicubic(case):
    x = torch.from_numpy(case.input("x"))
    for name, corners in (("align_corners_true", True), ("align_corners_false", False)):
        size = case.output(name).shape[-1]
        case.compare(name, to_grid(x, size, "bicubic", align_corners=corners))


@check("bigearthnet.preprocessing_csmae")
def preprocessing_csmae(case):
    raw = {name.removeprefix("raw_"): x for name, x in case.inputs().items()}
    size, orders = max(x.shape[-1] for x in raw.values()), BAND_ORDERS["csmae"]
    x = {m: stack_bands(raw, get_sensor(m).bands, size) for m in orders}   # as the archives hand it out
    read = torch.cat([reorder_bands(x[m], get_sensor(m).bands, bands) for m, bands in orders.items()])
    case.compare("reader_rows0_29", read[:, :case.output("reader_rows0_29").shape[1]])
    adapter = InputAdapter(list(orders), size, "ben_v1", orders, transpose=True)
    seen = torch.cat([adapter(x[m][None], m)[0] for m in orders])
    rows = case.output("model_input_rows0_29").shape[1]
    case.compare("model_input_rows0_29", seen[:, :rows], like="model_input")
    names = case.other("bigearthnet.label_tables").output("csmae_classes_19_lowercase_order")
    ones = [name for name, hot in zip(names, case.output("labels"), strict=True) if hot]
    case.compare("labels", BEN19.encode(ones))
