"""Evaluation on validation texts: loss, accuracy, calibration, tokens that training has seen.

Everything is plain cross-entropy per token, whatever the training loss is.
"""

from dataclasses import dataclass

import numpy as np
import torch

from data.batch import Batch, batch_rows, num_supervised
from data.folder import split_of
from data.rows import longest_shared_prefix
from eval import map_batches
from nanospin import distributed

LOGIT_ELEMENTS = 2**26  # of a (tokens, V) matrix of logits
NUM_BINS = 15  # of the reliability curve


@dataclass
class TokenPredictions:
    """What a model predicts for each target token: arrays (tokens,) in the order of the rows."""

    logp: np.ndarray  # log-probability of the target
    confidence: np.ndarray  # the highest probability
    correct: np.ndarray  # 1.0 if the target has it
    entropy: np.ndarray  # nats
    slope: np.ndarray  # d(-logp) / d(1 / temperature)
    curvature: np.ndarray  # its derivative

    def at(self, where: np.ndarray) -> "TokenPredictions":
        """The tokens of a boolean mask."""
        return TokenPredictions(*(values[where] for values in vars(self).values()))


def evaluate(run, round_id: int, step: int, train: list[dict], val: list[dict]) -> dict:
    """The evaluator of the study, for `train.main`."""
    if "seen" not in val[0]:
        annotate_seen_tokens(train, val)
    max_tokens = distributed.micro_batch_tokens(run.cfg, run.device)
    measure = calibration_metrics if run.cfg.fit_temperature else loss_metrics
    metrics = measure(run.model, val, max_tokens, run.device)
    if run.model.config.write_up:
        # the write-up's: the sum over tokens divided by all positions, padding included
        positions = len(val) * (run.model.config.block_size - 1)
        num_targets = sum(num_supervised(row["prompt"], row["responses"][0]) for row in val)
        metrics["padded_loss"] = metrics["val_loss"] * num_targets / positions
    return metrics


def annotate_seen_tokens(train: list[dict], val: list[dict]):
    """Add to encoded validation rows what `calibration_metrics` needs.

    seen  how many of the row's first tokens are also the beginning of a training row
    half  0 or 1. All rows of a group are in one half, unless groups are in training too: then the
          split was by row, and the halves are balanced by their number of new tokens.
    """
    train_ids = [row["prompt"] + row["responses"][0] for row in train]
    val_ids = [row["prompt"] + row["responses"][0] for row in val]
    for row, ids, seen in zip(val, val_ids, longest_shared_prefix(val_ids, train_ids), strict=True):
        row["seen"] = seen
        row["half"] = int(split_of(f"half of {row.get('group', ids)}", 0.5) == "val")

    train_groups = {row.get("group") for row in train} - {None}
    if any(row.get("group") in train_groups for row in val):
        most_new_first = sorted(range(len(val)), key=lambda i: val[i]["seen"] - len(val_ids[i]))
        for place, i in enumerate(most_new_first):
            val[i]["half"] = (place + 1) // 2 % 2  # 0 1 1 0 0 1 1 0 ...
    if len({row["half"] for row in val}) < 2:
        raise SystemExit(f"calibration: all {len(val)} validation rows are in one half; add groups")


@torch.no_grad()
def predict_tokens(model, rows, max_tokens, device, temperature=1.0) -> TokenPredictions:
    """Predictions for the tokens of the rows' best responses, logits divided by `temperature`."""

    def predict(batch: Batch) -> list[np.ndarray]:
        logits = model(batch.idx, **batch.layout())  # (m, V)
        targets = batch.targets[:, None]  # (m, 1)
        logps = torch.log_softmax(logits / temperature, -1)  # (m, V)
        p = logps.exp()
        mean_logit = (p * logits).sum(-1)
        values = [
            logps.gather(1, targets)[:, 0],
            p.amax(-1),
            logits.argmax(-1) == targets[:, 0],
            -(p * logps).sum(-1),
            mean_logit - logits.gather(1, targets)[:, 0],
            (p * logits.square()).sum(-1) - mean_logit.square(),
        ]
        by_row = torch.stack(values).split(batch.lengths[:, 0].tolist(), dim=1)
        return [part.cpu().numpy() for part in by_row]

    max_tokens = min(max_tokens, max(256, LOGIT_ELEMENTS // model.config.vocab_size))
    best = [row | {"responses": row["responses"][:1]} for row in rows]
    parts = map_batches(model, best, max_tokens, device, batch_rows, predict)
    return TokenPredictions(*np.concatenate(parts, axis=1).astype(np.float64))


def fit_temperature(model, rows, max_tokens, device, at_one: TokenPredictions | None = None):
    """The temperature in [0.05, 20] of lowest loss on the rows (arXiv 1706.04599, sec. 4.2).

    The loss is convex in 1 / temperature: Newton's method, with steps of at most a factor of 2.
    at_one: the predictions at temperature 1, if they are already computed.
    """
    inverse = 1.0
    for iteration in range(10):
        if iteration == 0 and at_one is not None:
            tokens = at_one
        else:
            tokens = predict_tokens(model, rows, max_tokens, device, 1 / inverse)
        before = inverse
        newton = before - tokens.slope.mean() / max(tokens.curvature.mean(), 1e-12)
        inverse = float(np.clip(np.clip(newton, before / 2, before * 2), 0.05, 20.0))
        if abs(inverse / before - 1) < 0.01:  # the error of the next step is about its square
            break
    return 1 / inverse


def reliability_curve(confidence: np.ndarray, correct: np.ndarray) -> list[list]:
    """[mean confidence, share correct, tokens] of each non-empty bin of equal width."""
    bins = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
    curve = []
    for b in range(NUM_BINS):
        inside = bins == b
        if inside.any():
            mean = float(confidence[inside].mean())
            curve.append([mean, float(correct[inside].mean()), int(inside.sum())])
    return curve


def expected_calibration_error(curve: list[list]) -> float:
    """Mean of |confidence - share correct| over tokens, by bins (arXiv 1706.04599, eq. 3)."""
    error = sum(n * abs(confidence - correct) for confidence, correct, n in curve)
    return error / sum(n for _, _, n in curve)


def seen_and_half(rows: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Of each target token: whether training has seen it in the same context (tokens,) bool, and
    the half of its row (tokens,) int."""
    lengths, seen = [], []
    for row in rows:
        prompt = len(row["prompt"])
        first = max(1, prompt)  # the first token of a text without a prompt has no prediction
        positions = np.arange(first, prompt + len(row["responses"][0]))
        lengths.append(len(positions))
        seen.append(positions < row["seen"])
    return np.concatenate(seen), np.repeat([row["half"] for row in rows], lengths)


@torch.no_grad()
def loss_metrics(model, rows: list[dict], max_tokens: int, device) -> dict:
    """The losses of `calibration_metrics` alone: one pass, without a matrix of logits."""

    def token_logps(batch: Batch) -> list[np.ndarray]:
        logps = model(batch.idx, batch.targets, **batch.layout())
        return [part.cpu().numpy() for part in logps.split(batch.lengths[:, 0].tolist())]

    logp = np.concatenate(map_batches(model, rows, max_tokens, device, batch_rows, token_logps))
    logp = logp.astype(np.float64)
    seen, _ = seen_and_half(rows)
    return {"val_loss": -float(logp.mean())} | losses_by_seen(logp, seen)


def losses_by_seen(logp: np.ndarray, seen: np.ndarray) -> dict:
    """The share of seen tokens, and the losses of seen and of new ones."""
    metrics = {"seen_share": float(seen.mean()), "new_tokens": float((~seen).sum())}
    if seen.any():
        metrics["seen_loss"] = -float(logp[seen].mean())
    if not seen.all():
        metrics["new_loss"] = -float(logp[~seen].mean())
    return metrics


def calibration_metrics(model, rows: list[dict], max_tokens: int, device) -> dict:
    """Metrics of annotated validation rows. H is a half, 0 or 1: what is chosen on one half, a step
    or a temperature, is measured on the other.

    val_loss                all tokens
    loss/H, tokens/H        half H, and its number of tokens
    temperature/H           fitted on half H
    fitted_loss/H           half H at its own temperature, to choose a step by
    loss_t/H                half H at the temperature of the other half, to report
    acc                     share of tokens whose most likely id is correct
    ece, reliability        expected calibration error and its curve
    ece_t                   the error of each half at the temperature of the other
    entropy, entropy_wrong  mean over all tokens, and over those predicted wrong
    seen_loss, new_loss     tokens that training has seen in the same context, and all others
    seen_share, new_tokens  share of the former, number of the latter
    """
    seen, half = seen_and_half(rows)

    plain = predict_tokens(model, rows, max_tokens, device)
    metrics = {
        "val_loss": -plain.logp.mean(),
        "acc": plain.correct.mean(),
        "entropy": plain.entropy.mean(),
    } | losses_by_seen(plain.logp, seen)
    # at the other half's temperature
    confidence, correct = np.empty(len(half)), np.empty(len(half))
    for h in (0, 1):
        mine, other = half == h, half != h
        rows_of_half = [row for row in rows if row["half"] == h]
        temperature = fit_temperature(model, rows_of_half, max_tokens, device, plain.at(mine))
        fitted = predict_tokens(model, rows, max_tokens, device, temperature)
        metrics |= {
            f"tokens/{h}": mine.sum(),
            f"loss/{h}": -plain.logp[mine].mean(),
            f"temperature/{h}": temperature,
            f"fitted_loss/{h}": -fitted.logp[mine].mean(),
            f"loss_t/{1 - h}": -fitted.logp[other].mean(),
        }
        confidence[other] = fitted.confidence[other]
        correct[other] = fitted.correct[other]

    curve = reliability_curve(plain.confidence, plain.correct)
    metrics["ece"] = expected_calibration_error(curve)
    metrics["reliability"] = curve
    metrics["ece_t"] = expected_calibration_error(reliability_curve(confidence, correct))
    wrong = plain.correct == 0
    if wrong.any():
        metrics["entropy_wrong"] = plain.entropy[wrong].mean()
    return {name: v if isinstance(v, list) else float(v) for name, v in metrics.items()}
