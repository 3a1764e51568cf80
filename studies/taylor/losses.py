"""Token losses that T_n is compared with, and the training objective of the study."""

import torch
import torch.nn.functional as F
from torch import Tensor

from data.batch import Batch
from loss import taylor_nll
from model import GPT


def focal_nll(logps: Tensor, gamma: float) -> Tensor:
    """Focal loss, -(1 - p)^gamma log p with p = exp(logps) (arXiv 1708.02002, eq. 4).

    logps (...) <= 0, gamma >= 0. Returns the same shape. The gradient is that of T_gamma plus the
    term gamma (1 - p)^(gamma - 1) p log p.
    """
    q = -torch.expm1(
        logps.clamp(max=-(2.0**-24))
    )  # for gamma < 1 the gradient is infinite at p = 1
    return -(q**gamma) * logps


def smoothed_nll(
    logits: Tensor,
    targets: Tensor,
    label_smoothing: float = 0.0,
    confidence_penalty: float = 0.0,
) -> Tensor:
    """Cross-entropy with label smoothing or a confidence penalty.

    logits (n, V), targets (n,) -> (n,)

    label_smoothing eps: the target distribution is (1 - eps) one-hot + eps uniform (arXiv
    1512.00567, section 7). confidence_penalty: this times the entropy of the prediction is
    subtracted (arXiv 1701.06548, eq. 3). Both need all the logits, a (tokens, V) matrix.
    """
    logps = F.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
    target_logps = logps.gather(-1, targets[:, None]).squeeze(-1)
    loss = -(1 - label_smoothing) * target_logps - label_smoothing * logps.mean(-1)
    if confidence_penalty:
        loss = loss + confidence_penalty * (logps.exp() * logps).sum(-1)
    return loss


def count_units(batch: Batch, cfg) -> int:
    """What the loss is a mean over: tokens, or with a model of the write-up rows."""
    return batch.num_rows if cfg.model.get("write_up") else batch.num_targets


def token_losses(model: GPT, batch: Batch, cfg) -> tuple[Tensor, Tensor | None]:
    """The loss of each token, T_n or the one of the other losses that is set, and the
    batch.response_index of these tokens. T_n is 0 where there is no target; the others are of
    tokens with a target only.
    """
    if not (cfg.token_label_smoothing or cfg.confidence_penalty or cfg.focal):
        logps = model(batch.idx, batch.targets, **batch.layout())
        return taylor_nll(logps, cfg.taylor_order), batch.response_index

    supervised = batch.targets >= 0
    response_index = None if batch.response_index is None else batch.response_index[supervised]
    if cfg.focal:
        logps = model(batch.idx, batch.targets, **batch.layout())
        return focal_nll(logps[supervised], cfg.focal), response_index
    losses = smoothed_nll(
        model(batch.idx, **batch.layout())[supervised],
        batch.targets[supervised],
        cfg.token_label_smoothing,
        cfg.confidence_penalty,
    )
    return losses, response_index


def token_objective(model: GPT, batch: Batch, cfg):
    """The token losses, summed. With a model of the write-up: their mean over each row, summed."""
    losses, response_index = token_losses(model, batch, cfg)
    if model.config.write_up:
        losses = losses / batch.lengths.flatten()[response_index]
    return losses.sum(), {}
