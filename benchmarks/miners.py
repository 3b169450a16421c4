"""Claim: in a large batch, miners take a fraction of the time of the nearest ones of pytorch-metric-learning.

Losses take about as long as the library's, or far less where all pairs count.

Both sides get the same embeddings and labels and take turns; the figure is the median time of a call. A loss
is timed with its backward pass, on the pairs of the same miner. Graded mining has no counterpart there: the
published rule of CV4RS as a plain loop, image by image, is its peer.

    python benchmarks/miners.py                       # 512 embeddings of 512 numbers, 4 images of each class
    python benchmarks/miners.py --batch 128 --dim 128
"""
import argparse
import os
import platform
import time
from statistics import median

import torch
from pytorch_metric_learning import __version__ as pml_version
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import miners as pml_miners
from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_pairs_indices
from rsir_nb.losses.metric import MarginLoss, PairNTXentLoss, SupConLoss, TripletMarginLoss
from rsir_nb.losses.miners import AllPairs, DistanceWeighted, MultiLabelSemiHard, SemiHard
from rsir_nb.losses.pairs import as_vectors, vector_distances


def parse():
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep_lines)
    parser.add_argument("--batch", type=int, default=512, help="embeddings")
    parser.add_argument("--dim", type=int, default=512, help="their length")
    parser.add_argument("--per-class", type=int, default=4, help="images of each class")
    parser.add_argument("--labels", type=int, default=20, help="labels of the multi-label batch")
    parser.add_argument("--repeats", type=int, default=9, help="calls of each kind")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def graded_loop(z, labels):
    "Multi-label semi-hard mining as published: image by image, positive by positive."
    d, shared, found = vector_distances(as_vectors(z)), labels.float() @ labels.float().T, []
    for i in range(len(z)):
        order = d[i].argsort()
        share, made = shared[i, order], 0
        for at in torch.where(share > 0)[0].flip(0):
            if order[at] == i: continue
            fine = torch.where((share[:at] > 0) & (share[:at] < share[at]))[0]
            none = torch.where(share[:at] == 0)[0]
            coarse = [none[torch.randint(len(none), ())] for _ in range(min(3, len(none)))]
            found += [(i, int(order[at]), int(order[k])) for k in [*fine, *coarse]]
            made += len(fine) + len(coarse)
            if len(none) and made >= 3: break
    return found


def seconds(call, device):
    start = time.perf_counter()
    call()
    if device != "cpu": torch.cuda.synchronize()
    return time.perf_counter() - start


def with_backward(loss, z, labels, pairs):
    def call():
        x = z.clone().requires_grad_()
        loss(x, labels, pairs).backward()
    return call


def main():
    args = parse()
    rng = torch.Generator().manual_seed(0)
    z = as_vectors(torch.randn(args.batch, args.dim, generator=rng)).to(args.device)
    y = (torch.arange(args.batch) // args.per_class).to(args.device)
    several = (torch.rand(args.batch, args.labels, generator=rng) < 3 / args.labels).long().to(args.device)
    mined = SemiHard()(z, y)
    losses = [(PairNTXentLoss(), pml_losses.NTXentLoss(0.1)), (SupConLoss(), pml_losses.SupConLoss()),
              (TripletMarginLoss(), pml_losses.TripletMarginLoss(0.2)),
              (MarginLoss(learn=False), pml_losses.MarginLoss())]
    their_semi_hard = pml_miners.TripletMarginMiner(0.2, "semihard")
    rows = {
        "AllPairs": (lambda: AllPairs()(z, y), lambda: get_all_pairs_indices(y), "get_all_pairs_indices"),
        "SemiHard": (lambda: SemiHard()(z, y), lambda: their_semi_hard(z, y), "TripletMarginMiner"),
        "DistanceWeighted": (lambda: DistanceWeighted()(z, y),
                             lambda: pml_miners.DistanceWeightedMiner()(z, y), "DistanceWeightedMiner"),
        "MultiLabelSemiHard": (lambda: MultiLabelSemiHard()(z, several), lambda: graded_loop(z, several),
                               "plain loop")}
    for kind, pairs, which in ("semi-hard triplets", mined, losses), ("all pairs", None, losses[:2]):
        for ours, theirs in which:
            calls = with_backward(ours, z, y, pairs), with_backward(theirs, z, y, pairs)
            rows[f"{type(ours).__name__}, {kind}"] = (*calls, type(theirs).__name__)
    print(f"{platform.machine()}, {os.cpu_count()} cores, {args.device}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, pytorch-metric-learning {pml_version}; "
          f"B = {args.batch}, D = {args.dim}")
    print("| what | ms | peer | ms | times as fast |\n|---|---|---|---|---|")
    for name, (ours, theirs, peer) in rows.items():
        turns = range(args.repeats + 1)
        times = [(seconds(ours, args.device), seconds(theirs, args.device)) for _ in turns][1:]
        a, b = (1000 * median(o) for o in zip(*times, strict=True))
        print(f"| {name} | {a:.1f} | {peer} | {b:.1f} | {b / a:.1f} |", flush=True)


if __name__ == "__main__":
    main()
