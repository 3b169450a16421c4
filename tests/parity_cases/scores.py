"Handlers of the published scores: chi-square retrieval (cbir), label metrics and retrieval (cv4rs), mMP@5 (unifex)."
import numpy as np
from parity import check
from rsir_nb.metrics.classification import class_ranking_scores, classification_scores
from rsir_nb.metrics.labels import label_overlap, label_sizes
from rsir_nb.metrics.measures import f1_of, label_set_scores, union_counts, union_scores
from rsir_nb.metrics.scores import drop_own, score_rankings
from rsir_nb.retrieval.distances import make_distance
from rsir_nb.retrieval.vectors import VectorIndex

M2 = dict(ndcg_retrieved="ndcg", acg="acg", map_found="average_precision", m2_wap="weighted_average_precision",
          m2_precision_at_rank="precision_at_rank", m2_recall_at_rank="recall_at_rank", m2_f1_at_rank="f1_at_rank")


def search(queries, archive, k, distance):
    ix = VectorIndex(archive.shape[1], distance=distance)
    ix.add(archive)
    return ix.search(queries, k)


@check("cbir.retrieval")
def chi_square_retrieval(case):
    x, top, ranks = case.inputs(), case.constant("max_topk"), np.array(case.constant("ranks"))
    _, order = search(x["query_features"], x["archive_features"], len(x["archive_features"]), "chi2")
    case.compare("order", order)
    chi = make_distance("chi2")
    queries, first = (chi.prepare(x[o]) for o in ("query_features", "archive_features"))
    case.compare("distance_first100", chi.pairwise(queries, first[:100]), like="distance")
    found = score_rankings(order[:, :top], x["query_labels"], x["archive_labels"], range(1, top + 1), list(M2))
    for ours, theirs in M2.items():
        case.compare(f"mean.{theirs}", found[ours].mean(0))
        case.compare(f"per_query.{theirs}", found[ours][:, ranks - 1])


@check("cbir.overlap_metrics")
def label_overlaps(case):
    query, items = case.input("query_labels")[None], case.input("retrieved_labels")
    ids = np.arange(len(items))[None]
    def scores(query, ks):
        overlap = label_overlap(query, items, ids)
        return label_set_scores(overlap, label_sizes(query), label_sizes(items)[ids], ks)
    found, none = scores(query, range(1, len(items) + 1)), scores(0*query, [5])
    for name in "precision", "recall":
        case.compare(f"{name}_at_n", found[name][0])
        case.compare(f"empty_query.{name}_at_5", none[name][0, 0])


@check("cbir.classification_metrics")
def classification(case):
    y, p = case.input("true_labels"), case.input("probabilities")
    for name, value in {**classification_scores(y, p >= 0.5), **class_ranking_scores(y, p)}.items():
        case.compare(name, value)


@check("cv4rs.label_metrics")
def label_metrics(case):
    found = classification_scores(case.input("y_true"), case.input("y_pred"))
    names = dict(accuracyMacro="accuracy.macro", accuracyMicro="accuracy.micro", fbetaMacro="f1.macro",
                 fbetaMicro="f1.micro", subsetAccuracy="subset_accuracy", hammingLoss="hamming_loss",
                 accuracy="accuracy.sample", precision="precision.sample", recall="recall.sample",
                 precisionMacro="recall.macro", precisionMicro="recall.micro",   # exchanged in the published code
                 recallMacro="precision.macro", recallMicro="precision.micro")
    for theirs, ours in names.items(): case.compare(theirs, found[ours])
    case.compare("fbeta", f1_of(found["precision.sample"], found["recall.sample"]))


@check("cv4rs.retrieval_metrics")
def metric_learning_retrieval(case):
    x, ks = case.inputs(), case.constant("K")
    weighted, parts = case.constant("weighted"), []
    for w, z in zip(weighted["evaluation_weight"],
                    np.split(x["embeddings"], np.cumsum(weighted["sub_embed_sizes"])[:-1], axis=1), strict=True):
        parts.append(w*z)
    own = np.arange(len(x["labels"]))
    for name, queries, archive, labels, left_out in (
            ("standard", x["embeddings"], x["embeddings"], x["labels"], own),
            ("query_gallery", x["query_embeddings"], x["embeddings"], x["query_labels"], None),
            ("weighted", np.hstack(parts), np.hstack(parts), x["labels"], own)):
        k = max(ks) + (left_out is not None)
        _, ids = search(queries, archive, k, "cosine")           # the order of Euclidean distances at length 1
        if left_out is not None: ids = drop_own(ids, own)
        case.compare(f"{name}.neighbours", ids, like="neighbours")
        compare_scores(case, name, labels, x["labels"], ids, ks, left_out)


def compare_scores(case, name, labels, archive_labels, ids, ks, own):
    shared, every = union_counts(labels, archive_labels, ids)
    union = union_scores(shared, every, label_sizes(labels), labels.shape[1], ks)
    found = score_rankings(ids, labels, archive_labels, ks, ["m3_map", "m3_r_precision"], own=own)
    for i, k in enumerate(ks):
        for score in "recall", "precision", "accuracy", "hamming_loss", "subset_accuracy":
            case.compare(f"{name}.{score}@{k}", union[score][:, i].mean())
        case.compare(f"{name}.F_Measure@{k}", f1_of(union["precision"][:, i].mean(), union["recall"][:, i].mean()))
        predicted = archive_labels[ids[:, :k]].any(1)
        per_label = classification_scores(labels, predicted)
        case.compare(f"{name}.Mirco_F1@{k}", per_label["f1.micro"])
        case.compare(f"{name}.Macro_F1@{k}", per_label["f1.macro"])
        for ours, theirs in dict(m3_map="map", m3_r_precision="r_precision").items():
            case.compare(f"{name}.{theirs}@{k}", np.nansum(found[ours][:, i])/len(labels))   # unlabelled queries count as 0


@check("unifex.mmp5")
def universal_embeddings(case):
    x = case.inputs()
    _, ids = search(x["query"], x["index"], 5, "l2")
    case.compare("top5", ids, like="top5")
    case.compare("relevance", label_overlap(x["query_labels"], x["index_labels"], ids).astype(np.int64))
    case.compare("n_q", (x["index_labels"] == x["query_labels"][:, None]).sum(1))
    found = score_rankings(ids, x["query_labels"], x["index_labels"], [5], ["m5_mmp"])["m5_mmp"][:, 0]
    case.compare("per_query", found)
    case.compare("mmp5", found.mean())
