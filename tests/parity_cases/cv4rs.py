"""Multi-label metric learning (CV4RS): miners and losses.

The published miners draw with numpy's legacy generator, image by image. Here the candidates and probabilities come from
the package and the draws from the same generator, so that the triplets have to be the published ones.
"""
import numpy as np
import torch
from parity import check
from parity_cases.csmae import tensor
from scipy.optimize import linear_sum_assignment

from rsir_nb.data.base import TensorArchive
from rsir_nb.data.samplers import ClassSampler
from rsir_nb.losses.boosting import BinomialDevianceLoss, DecorrelationLoss, norm_penalty, split_parts
from rsir_nb.losses.metric import LabelLoss, MarginLoss
from rsir_nb.losses.memory import FastMoCoLoss, MemoryNCALoss
from rsir_nb.losses.miners import distance_probabilities, graded_triplets, semi_hard_candidates
from rsir_nb.losses.pairs import relations
from rsir_nb.methods.divide_conquer import assign, match_clusters, membership_costs
from rsir_nb.methods.margin import standardise_images
from rsir_nb.models.backbones import make_backbone
from rsir_nb.models.necks import PartsNeck


def padded(mask, width):
    "Numbers of the true entries of each row, filled up with -1."
    rows = [np.flatnonzero(o)[:width] for o in mask.numpy()]
    return np.stack([np.pad(o, (0, width - len(o)), constant_values=-1) for o in rows])


def compare_triplets(case, triplets, prefix=""):
    for name, values in zip(("anchors", "positives", "negatives"), np.array(triplets).T, strict=True):
        case.compare(prefix + name, values, like="selected")


@check("cv4rs.miner_semihard")
def semi_hard(case):
    z = tensor(case, "features")
    for prefix, name in (("", "labels"), ("singleton.", "labels_with_singleton")):
        positives, negatives = semi_hard_candidates(z, tensor(case, name))
        rng, found = np.random.RandomState(case.constant("numpy_seed")), []
        for i in torch.where(positives.any(1))[0].tolist():
            p = rng.choice(np.flatnonzero(positives[i]))
            found.append((i, p, rng.choice(np.flatnonzero(negatives[i]))))
        compare_triplets(case, found, prefix)
        if prefix: continue
        for kind, mask in (("positive", positives), ("negative", negatives)):
            name = f"{kind}_candidates"
            case.compare(name, padded(mask, case.output(name).shape[1]))


def drawn_by_distance(labels, weights, rng):
    "Anchor, positive and negative of each image that has a positive, drawn as published."
    same = relations(labels)[0].numpy()
    return [(i, rng.choice(np.flatnonzero(same[i])), rng.choice(len(same), p=weights[i])) for i in range(len(same)) if same[i].any()]


@check("cv4rs.miner_distance")
def distance_weighted(case):
    z, y = tensor(case, "features"), tensor(case, "labels")
    lower = case.constant("lower_cutoff")
    weights = distance_probabilities(z, y, lower, upper=None)
    case.compare("negative_probabilities", weights, like="probabilities")
    case.compare("positive_candidates", padded(relations(y)[0], case.output("positive_candidates").shape[1]))
    compare_triplets(case, drawn_by_distance(y, weights.numpy(), np.random.RandomState(case.constant("numpy_seed"))))
    longer = distance_probabilities(2.5 * z, y, lower, upper=None)[0]
    case.divergent("unnormalised_features.probabilities_anchor0", longer, case.output("negative_probabilities")[0], rtol=1e-4, atol=1e-7,
                   reason="the published code gives NaN for vectors that are not of length 1; here lengths do not count")


@check("cv4rs.miner_random")
def random_miners(case):
    z, y = tensor(case, "features"), tensor(case, "labels")
    rng = np.random.RandomState(case.constant("numpy_seed"))
    order = rng.choice(len(y), len(y), replace=False)
    case.compare("label_permutation", order)
    other = y[torch.from_numpy(order)]
    weights = distance_probabilities(z, other, upper=None)
    case.compare("random_distance.negative_probabilities", weights, like="probabilities")
    compare_triplets(case, drawn_by_distance(other, weights.numpy(), rng), "random_distance.")
    rng, members = np.random.RandomState(case.constant("numpy_seed")), {c: np.flatnonzero(y == c) for c in y.unique().tolist()}
    found = [rng.choice(members[c], 3, replace=True) for c in rng.choice(list(members), len(y), replace=True)]
    compare_triplets(case, found, "intra_random.")


@check("cv4rs.miner_multilabel")
def multi_label(case):
    bounds, drawn = [], iter(case.output("randint_results").tolist())
    k = case.constant("max_negatives_per_pos")

    def choose(numbers):
        out = torch.zeros(len(numbers), k, dtype=torch.long)
        for row, n in zip(out, numbers.tolist(), strict=True):
            for i in range(min(k, n)):
                bounds.append(n)
                row[i] = next(drawn)
        return out

    triplets, fine = graded_triplets(tensor(case, "features"), tensor(case, "labels"), choose, k, case.constant("max_trips_per_anchor"))
    compare_triplets(case, torch.stack(triplets, 1).numpy())
    case.compare("kind", fine.long())
    case.compare("randint_upper_bounds", np.array(bounds))
    case.compare("randint_results", np.random.RandomState(case.constant("numpy_seed")).randint(0, np.array(bounds)))
    assert next(drawn, None) is None, "draws are left over"


@check("cv4rs.margin_loss")
def margin_loss(case):
    y, triplets = tensor(case, "labels"), tuple(tensor(case, "triplets").T)
    common = dict(margin=case.constant("margin"), boundary=case.constant("beta"), penalty=case.constant("nu"), normalise=False)
    made = dict(trainable_scalar=MarginLoss(**common), fixed=MarginLoss(**common, learn=False),
                trainable_per_class=MarginLoss(**common, per_class=True, n_classes=int(y.max()) + 1))
    made["trainable_per_class"].boundary.data = tensor(case, "class_betas")
    for name in {o.rpartition(".")[0] for o in case.output_names()} - {*made, "inactive"}:   # fixed_beta0.9_margin0.4
        beta, margin = (float(o) for o in name.removeprefix("fixed_beta").split("_margin"))
        made[name] = MarginLoss(margin, beta, learn=False, normalise=False)
    for name, loss in made.items():
        z = tensor(case, "features").requires_grad_()
        value = loss(z, y, triplets)
        value.backward()
        case.compare(f"{name}.loss", value.detach())
        case.compare(f"{name}.grad_features", z.grad)
        if name.startswith("trainable"): case.compare(f"{name}.grad_beta", loss.boundary.grad)
    far, triplets = tensor(case, "inactive.features"), tuple(tensor(case, "inactive.triplets").T)
    case.compare("inactive.loss", made["trainable_scalar"](far, torch.zeros(len(far), dtype=torch.long), triplets).detach())


@check("cv4rs.bce_loss")
def label_loss(case):
    weight = tensor(case, "weight")
    loss = LabelLoss(weight.shape[1], weight.shape[0])
    loss.classifier.load_state_dict(dict(weight=weight, bias=tensor(case, "bias")))
    case.compare("loss", loss(tensor(case, "features"), tensor(case, "labels")).detach())


def boundary_of(part, y, weights, alpha):
    "The boundary of a variant whose name does not say it, from the weights sigmoid(-alpha (cosine - b)) of positive pairs."
    same = relations(y)[0]
    return round(((part @ part.T)[same] + torch.logit(torch.as_tensor(weights).reshape(same.shape)[same]) / alpha).mean().item(), 4)


@check("cv4rs.binomial_loss")
def binomial_deviance(case):
    y, order = tensor(case, "labels"), case.constant("order")
    common = dict(alpha=case.constant("alpha"), boundary=case.constant("beta"), cost=case.constant("C"), penalty=case.constant("nu"),
                  normalise=False)
    for name in sorted({o.rpartition(".")[0] for o in case.output_names()}):
        parts = [tensor(case, f"features_{o}") for o in order]
        kind, *changes = name.split("_")                     # eta_C10_alpha1
        own = {dict(C="cost").get(w.rstrip("0123456789"), w.rstrip("0123456789")): float(w.lstrip("Calph")) for w in changes if w[-1].isdigit()}
        if own: own["boundary"] = boundary_of(parts[0], y, case.output(f"{name}.boosting_weights")[0], own["alpha"])
        sizes = [o.shape[1] for o in parts]
        loss = BinomialDevianceLoss(sizes, **{**common, **own}, boosting=kind, learn="trainable" in changes)
        z = torch.cat(parts, 1).requires_grad_()
        value = loss(z, y)
        value.backward()
        case.compare(f"{name}.loss", value.detach())
        for part, grad in zip(order, z.grad.split(sizes, 1), strict=True): case.compare(f"{name}.grad_{part}", grad)
        weights = [boost.flatten() for _, boost in loss.learners(split_parts(z.detach(), sizes, False), y)]
        case.compare(f"{name}.boosting_weights", torch.stack(weights).detach())
        if loss.boundary.requires_grad: case.compare(f"{name}.grad_beta", loss.boundary.grad)


def decorrelation_of(case, prefix, names, sizes):
    "The loss with stored regressors, and our name of each of their tensors."
    keys = list(case.constant("directions"))
    directions = [[names.index(o) for o in key.split("-")] for key in keys]
    loss = DecorrelationLoss(sizes, directions, [case.constant("directions")[k]["weight"] for k in keys], case.constant("hidden_size"))
    ours = {f"{prefix}.{key}.{o}": f"regressors.{i}.{o}" for i, key in enumerate(keys) for o in ("0.weight", "0.bias", "2.weight", "2.bias")}
    loss.load_state_dict({name: tensor(case, theirs) for theirs, name in ours.items()})
    return loss, ours


@check("cv4rs.adversarial_loss")
def decorrelation(case):
    names = [o.removeprefix("features.") for o in case.input_names() if o.startswith("features.")]
    parts = [tensor(case, f"features.{o}") for o in names]
    sizes = [o.shape[1] for o in parts]
    loss, ours = decorrelation_of(case, "regressor.regressors", names, sizes)
    z = torch.cat(parts, 1).requires_grad_()
    value = loss(z)
    value.backward()
    case.compare("loss", value.detach())
    for name, grad in zip(names, z.grad.split(sizes, 1), strict=True): case.compare(f"grad_features.{name}", grad)
    grads = {name: o.grad for name, o in loss.named_parameters()}
    for theirs, name in ours.items(): case.compare(f"grad_{theirs}", grads[name])


@check("cv4rs.bier_total")
def boosted_total(case):
    sizes = case.constant("sub_embed_sizes")
    layers = []
    for i in range(1, len(sizes) + 1):
        weight = tensor(case, f"last_linear.embed_{i}.weight")
        layers.append(torch.nn.Linear(*weight.T.shape))
        layers[-1].load_state_dict(dict(weight=weight, bias=tensor(case, f"last_linear.embed_{i}.bias")))
    rows, classes = tensor(case, "pairs").T
    x = tensor(case, "penultimate")[rows]
    with torch.no_grad():
        z = torch.cat([torch.nn.functional.normalize(o(x)) for o in layers], 1)
        deviance = BinomialDevianceLoss(sizes, boundary=0.5, penalty=0.1)(z, classes)
        loss, _ = decorrelation_of(case, "regressor.regressors", list(map(str, sizes)), sizes)
        found, penalty = loss(z), loss.penalty()
        embed = sum(map(norm_penalty, layers)) / len(layers)
    case.compare("binominal", deviance)
    case.compare("adversarial", found)
    case.compare("adv_weight", penalty)
    case.compare("embed_weight", embed)
    case.compare("Train", deviance + case.constant("lambda_div") * (found + case.constant("lambda_weight") * (penalty + embed)))


@check("cv4rs.nca_memory")
def memory_nca(case):
    y, memory, rows = (tensor(case, o) for o in ("multi_hot_labels", "memory", "indexes"))
    for name, margin in case.constant("margin").items():
        loss = MemoryNCALoss(*memory.shape, y.shape[1], temperature=case.constant("temperature"), momentum=case.constant("momentum"),
                             margin=margin, normalise=False)
        loss.update(memory, y, torch.arange(len(memory)))
        z = tensor(case, "embeddings").requires_grad_()
        case.compare(f"{name}.similarity", loss.similarity(z).detach())
        value = loss(z, y[rows], rows=rows)
        value.backward()
        case.compare(f"{name}.loss", value.detach())
        case.compare(f"{name}.grad_embeddings", z.grad)
        loss.update(z, y[rows], rows)
        case.compare(f"{name}.memory_after_backward", loss.memory)


@check("cv4rs.fast_moco_loss")
def fast_moco(case):
    queue = tensor(case, "queue")

    def made(queue=queue, normalise=False, **changes):
        kwargs = dict(temperature=case.constant("temperature"), lower=case.constant("lower_cutoff"), upper=case.constant("upper_cutoff"))
        loss = FastMoCoLoss(queue.shape[1], len(queue), **{**kwargs, **changes}, normalise=normalise)
        loss.queue.copy_(queue)
        loss.filled.fill_(len(queue))
        return loss

    q, k, loss = tensor(case, "query").requires_grad_(), tensor(case, "key").requires_grad_(), made()
    value = loss(q, keys=k)
    value.backward()
    case.compare("loss", value.detach())
    case.compare("grad_query", q.grad)
    case.compare("grad_key", k.grad)
    loss.update(k)
    case.compare("queue_after_update", loss.queue)
    for name in (o for o in case.output_names() if o.startswith("loss_temperature")):
        case.compare(name, made(temperature=float(name.removeprefix("loss_temperature")))(q, keys=k).detach())
    case.divergent("loss_unnormalised_queue", made(3 * queue, normalise=True)(q, keys=k).detach(), case.output("loss"), rtol=1e-4,
                   reason="the published code gives NaN for a queue of vectors that are not of length 1; here lengths do not count")


TRUNK = {0: "conv1", 1: "bn1", 4: "layer1", 5: "layer2", 6: "layer3", 7: "layer4"}       # theirs are features.<number>


@check("cv4rs.network_full_recipe")
def network(case):
    images = tensor(case, "images")
    encoder = make_backbone("resnet50", images.shape[1], case.constant("crop")).eval()
    neck = PartsNeck(encoder.embed_dim, case.constant("sub_embed_sizes")).eval()
    ours = {f"features.{i}.{k.removeprefix(f'{name}.')}": v for i, name in TRUNK.items()
            for k, v in encoder.net.state_dict().items() if k.startswith(f"{name}.")}
    ours |= {f"last_linear.embed_{i}.{k}": v for i, o in enumerate(neck.layers, 1) for k, v in o.state_dict().items()}
    kinds = {e["name"]: e for e in case.output("keys")}
    case.compare("keys", [dict(e, shape=list(ours[n].shape), dtype=str(ours[n].dtype).removeprefix("torch.")) if n in ours else e
                          for n, e in kinds.items()])
    assert set(ours) == set(kinds), sorted(set(ours) ^ set(kinds))[:5]
    for name, value in case.recipe(ours).items(): ours[name].copy_(value)
    with torch.no_grad():
        x = encoder(images)
        case.compare("penultimate", torch.nn.functional.normalize(x))
        case.compare("embedding", neck(x))


@check("cv4rs.class_balanced")
def class_balanced(case):
    y = case.input("labels")
    names = [f"{c:03}" for c in range(y.shape[1])]
    labels = [[names[c] for c in np.flatnonzero(row)] for row in y]
    archive = TensorArchive(dict(rgb=np.zeros((len(y), 3, 1, 1), np.float32)), labels=labels)
    sampler = ClassSampler(archive, 2*y.shape[1])
    pools = {c: np.sort(sampler.members[sampler.starts[i]:sampler.starts[i] + sampler.counts[i]])
             for i, c in enumerate(map(int, archive.vocab.names))}
    draw = lambda rng, pool, n: rng.choice(pool, n, replace=len(pool) < n)
    for name in (o for o in case.output_names() if o.startswith("samples")):
        n, rng = int(name.removeprefix("samples").removesuffix(".pairs")), np.random.RandomState(case.constant("numpy_seed"))
        case.compare(name, np.array([[i, c] for c, pool in pools.items() for i in draw(rng, pool, n)[:2]]))
    wanted, rng = case.output("sampler.batches"), np.random.RandomState(case.constant("numpy_seed"))
    found = [np.unique([draw(rng, pool, 2) for pool in pools.values()]) for _ in wanted]
    case.compare("sampler.batches", np.array([np.pad(o, (0, wanted.shape[1] - len(o)), constant_values=-1) for o in found]))
    case.compare("sampler.length", len(found))      # the case does not tell the number of images that it divides


@check("cv4rs.cluster_reassign")
def cluster_reassign(case):
    old, new = case.input("previous"), case.input("current")
    n = len(case.output("costs"))
    costs = membership_costs(new, old, n)
    case.compare("costs", costs.astype(np.float32))
    case.compare("agreement_before", (new == old).mean())
    matched = match_clusters(new, old, n)
    case.compare("agreement_if_rows_were_mapped_to_columns", (matched == old).mean())
    case.divergent("reassigned", matched, linear_sum_assignment(costs)[1][new],
                   reason="the published code applies the inverse of the assignment that it found")
    case.divergent("agreement_after", (matched == old).mean(), case.output("agreement_if_rows_were_mapped_to_columns"),
                   reason="the published code applies the inverse of the assignment that it found")
    assert np.array_equal(np.argsort(assign(costs))[new], case.output("reassigned")), "the inverse is what was published"


@check("cv4rs.image_normalisation")
def image_normalisation(case):
    for name in case.input_names(): case.compare(name.replace("image", "normalised"), standardise_images(tensor(case, name)[None])[0])
