"""The optimizers, and the schedule of their learning rates."""

import math

import torch


def make_optimizers(model, cfg, lr: float, device) -> list[torch.optim.Optimizer]:
    """AdamW or RMSprop for what is not frozen, with weight decay on matrices and embeddings, none
    on norms and biases.

    With `optimizer = "muon"` the matrices of the blocks go to Muon
    (kellerjordan.github.io/posts/muon) and everything else to AdamW.
    """
    muon = []
    decay = []
    no_decay = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.dim() < 2:
            no_decay.append(p)
        elif cfg.optimizer == "muon" and name.startswith("h."):
            muon.append(p)
        else:
            decay.append(p)
    groups = [
        {"params": decay, "weight_decay": cfg.weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizers = []
    if cfg.optimizer == "rmsprop":
        optimizers.append(torch.optim.RMSprop(groups, lr=lr))
    elif groups:  # with LoRA everything may be Muon's
        fused = device.type in ("cpu", "cuda")
        optimizers.append(torch.optim.AdamW(groups, lr=lr, betas=cfg.adam_betas, fused=fused))
    if muon:
        if not hasattr(torch.optim, "Muon"):
            raise SystemExit(
                f"config: optimizer muon needs torch.optim.Muon, which torch {torch.__version__} "
                "does not have; use adamw or a newer torch"
            )
        optimizers.append(torch.optim.Muon(muon, lr=cfg.muon_lr, weight_decay=cfg.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def lr_factor(cfg, step: int, num_steps: int) -> float:
    """The learning rate at a step, as a share of `lr`: linear warmup over `warmup_ratio` of the
    steps, then the schedule, which ends at `min_lr_ratio` (constant: stays at 1)."""
    warmup_steps = int(cfg.warmup_ratio * num_steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    if cfg.schedule == "cosine":
        decayed = 0.5 * (1 + math.cos(math.pi * progress))
    elif cfg.schedule == "linear":
        decayed = 1 - progress
    elif cfg.schedule == "constant":
        decayed = 1.0
    else:
        raise ValueError(f"unknown schedule {cfg.schedule!r}")
    return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * decayed
