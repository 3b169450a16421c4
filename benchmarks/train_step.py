"""Claim: a training step of CSMAE costs no more than the published one, at equal losses; less in bfloat16.

The published way, in eager float32, embeds every token and throws the masked ones away, predicts every token
of every target and multiplies the error with the mask. The package embeds only what is visible and predicts
only what counts. Both take turns on the same network, images and masks; a step is forward, backward, AdamW.

    python benchmarks/train_step.py                            # ViT-B, SESD, what the machine has
    python benchmarks/train_step.py --device cuda --batch 128
"""
import argparse
import os
import platform
import time

import numpy as np
import torch
from rsir_nb.methods.csmae import CSMAE, VARIANTS
from rsir_nb.models.masking import decoding_plan, make_noise, masking_plan, random_masking
from rsir_nb.models.patches import patchify
from torch.nn import functional as F


def parse():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="sesd", choices=VARIANTS)
    parser.add_argument("--batch", type=int, default=4, help="pairs a step")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each kind")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def published_loss(method, batch, noises):
    "The objective as the published code computes it: all tokens embedded, all predicted, errors masked."
    vit, P = method.backbone, method.backbone.patch_size
    x = {m: method.prepare(v, m) for m, v in batch.items()}
    plan = masking_plan(noises, method.masking, method.mask_ratio)
    masks = {m: random_masking(*o) for m, o in plan.items()}
    tokens = {}
    for m in x:
        every = vit.patch_embeds[m](x[m]) + vit.pos_embed[:, 1:]
        kept = every.gather(1, masks[m].ids_keep[..., None].expand(-1, -1, every.shape[2]))
        kept = torch.cat([(vit.cls_tokens[m] + vit.pos_embed[:, :1]).expand(len(kept), -1, -1), kept], 1)
        if m in vit.specific_blocks: kept = vit.specific_norms[m](vit.specific_blocks[m](kept))
        tokens[m] = vit.norm(vit.blocks(kept))
    total = 0
    for s in x:
        for t in x:
            ids_restore, ids = decoding_plan(s, t, masks, method.masking, method.reconstruction)
            mask = torch.zeros(ids_restore.shape, device=ids.device).scatter(1, ids, 1)
            error = (method.decoder(tokens[s], ids_restore, t) - patchify(x[t], P)).square().mean(-1)
            total = total + (error*mask).sum()/mask.sum()
    z = F.normalize(torch.cat([vit.pool(o) for o in tokens.values()]), dim=1)
    logits = (z @ z.T/method.temperature).fill_diagonal_(float("-inf"))
    return total + F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z)//2))


def main():
    args = parse()
    torch.manual_seed(0)
    method = CSMAE(["s1", "s2"], **VARIANTS[args.variant]).to(args.device)
    adam = torch.optim.AdamW(method.parameters(), 1e-4)
    draw = dict(s1=(2, -15, 5), s2=(10, 1500, 1000))
    batch = {m: (mean + std*torch.randn(args.batch, c, 120, 120)).to(args.device)
             for m, (c, mean, std) in draw.items()}
    noises = {m: make_noise(args.batch, method.backbone.n_tokens).to(args.device) for m in batch}
    ours = lambda: method.losses(batch, noises)["loss"]

    def bf16():
        with torch.autocast(args.device, torch.bfloat16): return ours()

    kinds = {"published, float32": lambda: published_loss(method, batch, noises), "ours, float32": ours,
             "ours, bfloat16": bf16}
    with torch.no_grad(): losses = {k: f().item() for k, f in kinds.items()}
    ratio = losses["ours, float32"]/losses["published, float32"]
    if abs(ratio - 1) > 1e-5: raise SystemExit(f"the losses differ: {losses}")
    times = {k: [] for k in kinds}
    for i in range(args.repeats + 1):
        for name, loss in kinds.items():
            start = time.perf_counter()
            adam.zero_grad()
            loss().backward()
            adam.step()
            if args.device == "cuda": torch.cuda.synchronize()
            if i: times[name].append(time.perf_counter() - start)
    cpu = f"{os.cpu_count()} cores, {platform.machine()}"
    where = torch.cuda.get_device_name() if args.device == "cuda" else cpu
    print(f"CSMAE {args.variant}, batch {args.batch}, torch {torch.__version__}, {where}\n")
    print("| step | loss before | seconds | pairs/s | of the published time |\n|---|---|---|---|---|")
    base = np.array(times["published, float32"])
    for name, t in times.items():
        print(f"| {name} | {losses[name]:.4f} | {np.median(t):.3f} | {args.batch/np.median(t):.1f} | "
              f"{np.median(np.array(t)/base):.2f} |")


if __name__ == "__main__":
    main()
