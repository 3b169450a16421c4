"Handlers of the `retrieval.*` cases: uni- and cross-modal search of features, scored by label sets (M1)."
import numpy as np
from parity import check
from rsir_nb.metrics.scores import score_rankings, summarise
from rsir_nb.retrieval.vectors import VectorIndex

METRICS = {"prec": "m1_precision", "rec": "m1_recall", "f1": "m1_f1"}
DIRECTIONS = [(q, a) for q in ("s1", "s2") for a in ("s1", "s2")]


def search(arrays, source, target, k):
    "The nearest archive items of every query, by the cosine."
    archive = arrays[f"archive_{target}"]
    ix = VectorIndex(dim=archive.shape[1])
    ix.add(archive)
    return ix.search(arrays[f"query_{source}"], k)


def scores(arrays, ids, k):
    table = score_rankings(ids, arrays["query_labels"], arrays["archive_labels"], [k], METRICS.values())
    return summarise(table, [k], n=10).set_index("metric").value


def by_definition(arrays, source, target, k):
    "The same scores pair by pair in float64; an item without labels has precision 0."
    query, archive = (arrays[o].astype(np.float64) for o in (f"query_{source}", f"archive_{target}"))
    query, archive = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (query, archive))
    precision, recall = [], []
    for x, labels in zip(query, arrays["query_labels"], strict=True):
        wanted = set(np.flatnonzero(labels))
        for i in np.argsort(((archive - x)**2).sum(1), kind="stable")[:k]:
            found = set(np.flatnonzero(arrays["archive_labels"][i]))
            precision.append(len(wanted & found) / len(found) if found else 0.)
            recall.append(len(wanted & found) / len(wanted))
    p, r = np.mean(precision), np.mean(recall)
    return dict(prec=p, rec=r, f1=2*p*r / (p + r))


@check("retrieval.csmae_*", "retrieval.da4dte_*")
def label_sets(case):
    arrays, k = case.inputs(), case.constant("k")
    for source, target in DIRECTIONS:
        name = f"{source}_{target}"
        dists, ids = search(arrays, source, target, k)
        case.compare(f"{name}.topk_ids", ids, like="topk_ids")
        case.compare(f"{name}.topk_sqdist", 2*dists, like="topk_sqdist")   # |a - b|² = 2(1 - cos) at length 1
        found = scores(arrays, ids, k)
        for short, metric in METRICS.items(): case.compare(f"{name}.{short}", found[metric])


@check("retrieval.csmae_nan", "retrieval.da4dte_nan")
def an_item_without_labels(case):
    arrays, k = dict(case.input("features and labels")), case.constant("k")
    arrays["archive_labels"] = arrays["archive_labels"].copy()
    arrays["archive_labels"][case.constant("archive_item_without_labels")] = 0
    for source, target in DIRECTIONS:
        found = scores(arrays, search(arrays, source, target, k)[1], k)
        corrected = by_definition(arrays, source, target, k)
        for short, metric in METRICS.items():
            name = f"{source}_{target}.{short}"
            if np.isfinite(case.output(name)): case.compare(name, found[metric])
            else: case.divergent(name, found[metric], corrected[short], rtol=1e-9, atol=0, reason=(
                "an item without labels makes the published precision 0/0; here its precision is 0"))
