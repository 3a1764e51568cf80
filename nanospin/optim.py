"""The optimizers and the schedule of their learning rates."""

import math

import torch


def make_optimizers(model, cfg, lr, device):
    """Decay on matrices and embeddings, none on norms and biases. Muon takes the blocks' matrices alone
    (kellerjordan.github.io/posts/muon) and AdamW the rest."""
    params = dict(model.named_parameters())
    matrices = {n: p for n, p in params.items() if p.dim() >= 2}
    muon = (
        {n: p for n, p in matrices.items() if n.startswith("h.")} if cfg.optimizer == "muon" else {}
    )
    groups = [
        {
            "params": [p for n, p in matrices.items() if n not in muon],
            "weight_decay": cfg.weight_decay,
        },
        {"params": [p for p in params.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if cfg.optimizer == "rmsprop":
        optimizers = [torch.optim.RMSprop(groups, lr=lr)]
    else:
        optimizers = [
            torch.optim.AdamW(
                groups, lr=lr, betas=cfg.adam_betas, fused=device.type in ("cpu", "cuda")
            )
        ]
    if muon:
        if not hasattr(torch.optim, "Muon"):
            raise SystemExit(
                f"optimizer muon: torch {torch.__version__} has no torch.optim.Muon; use adamw"
            )
        optimizers.append(
            torch.optim.Muon(list(muon.values()), lr=cfg.muon_lr, weight_decay=cfg.weight_decay)
        )
    for group in (g for o in optimizers for g in o.param_groups):
        group["initial_lr"] = group["lr"]
    return optimizers


def lr_factor(cfg, step, steps):
    """Share of the learning rate at a step: linear warmup, then the schedule down to min_lr."""
    warmup = int(cfg.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    share = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[
        cfg.schedule
    ]
    return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * share
