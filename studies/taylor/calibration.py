"""How well a language model's probabilities are what they say: expected calibration error, one fitted temperature, tokens that
training had seen. What the T_n study (taylor.py) is made of; `calibration = True` in a config of stage sft."""

import numpy as np
import torch

from data.batch import batch_rows
from eval import map_batches


@torch.no_grad()
def distributions(model, rows, tokens, device, temperature=1.0):
    """What a model says of each target token of encoded rows' best responses, its logits divided by `temperature`. Arrays, one
    value a token in the rows' order: `logp` of the target; `top`, the greatest probability; `right`, whether the target has it;
    `entropy` in nats; `slope` and `bend`, the first and second derivative of -logp by 1 / temperature."""

    def figures(logits, batch):
        targets = batch["targets"][:, None]
        logps = torch.log_softmax(logits / temperature, -1)
        p = logps.exp()
        mean = (p * logits).sum(-1)
        values = torch.stack(
            [
                logps.gather(1, targets)[:, 0],
                p.amax(-1),
                logits.argmax(-1) == targets[:, 0],
                -(p * logps).sum(-1),
                mean - logits.gather(1, targets)[:, 0],
                (p * logits.square()).sum(-1) - mean.square(),
            ]
        )
        return [part.cpu().numpy() for part in values.split(batch["lengths"][:, 0].tolist(), dim=1)]

    tokens = min(tokens, max(256, 2**26 // model.config.vocab_size))  # a (tokens, V) matrix
    rows = [row | {"responses": row["responses"][:1]} for row in rows]
    values = np.concatenate(
        map_batches(model, rows, tokens, device, batch_rows, figures, whole=True), axis=1
    ).astype(np.float64)
    return dict(zip(("logp", "top", "right", "entropy", "slope", "bend"), values))


def fit_temperature(model, rows, tokens, device, plain=None):
    """The temperature that makes rows' cross-entropy least (arXiv 1706.04599, section 4.2), in [0.05, 20]. The loss is convex in
    1 / temperature, whose Newton steps are held to a factor of 2. plain: the rows' `distributions` at temperature 1, if at hand."""
    inverse = 1.0
    for n in range(10):
        at = plain if plain and n == 0 else distributions(model, rows, tokens, device, 1 / inverse)
        before, best = inverse, inverse - at["slope"].mean() / max(at["bend"].mean(), 1e-12)
        inverse = float(np.clip(np.clip(best, before / 2, before * 2), 0.05, 20.0))
        if abs(inverse / before - 1) < 0.01:  # the next step would be about its square
            break
    return 1 / inverse


def reliability(top, right, bins=15):
    """Tokens in bins of equal width by the greatest probability: [[its mean, share right, tokens]] of those not empty."""
    at = np.minimum((top * bins).astype(int), bins - 1)
    return [
        [float(top[at == b].mean()), float(right[at == b].mean()), int((at == b).sum())]
        for b in range(bins)
        if (at == b).any()
    ]


def expected_calibration_error(curve):
    """ECE: mean of |probability - share right| over tokens, by the bins of `reliability` (arXiv 1706.04599, eq. 3)."""
    return sum(n * abs(top - right) for top, right, n in curve) / sum(n for _, _, n in curve)


def calibration(model, rows, tokens, device):
    """The figures of the T_n study, on plain cross-entropy a target token whatever was trained. Validation rows stand in two halves,
    0 and 1; what is chosen, a step or a temperature, is chosen on one and measured on the other, and both ways are averaged.

    val_loss                all rows                      loss/H          half H; tokens/H its target tokens
    temperature/H           fitted on half H              fitted_loss/H   half H at the temperature fitted on itself: to choose by
    loss_t/H                half H at the temperature fitted on the other half: what is measured
    acc                     share of the tokens whose most likely id is right
    ece, reliability        expected calibration error and its curve; ece_t at the other half's temperature
    entropy, entropy_wrong  mean over the tokens, and over those whose most likely id is wrong
    seen_loss, new_loss     tokens whose row, up to and with them, begins a training row too, and the others;
    seen_share, new_tokens  the share of the first kind, the number of the others
    """
    lengths = [
        len(row["responses"][0]) - (not row["prompt"]) for row in rows
    ]  # an empty prompt leaves the first token unasked
    seen = np.concatenate(
        [
            len(row["prompt"]) + (not row["prompt"]) + np.arange(n) < row["seen"]
            for row, n in zip(rows, lengths)
        ]
    )
    half = np.repeat([row["half"] for row in rows], lengths)
    plain = distributions(model, rows, tokens, device)
    figures = {
        "val_loss": -plain["logp"].mean(),
        "acc": plain["right"].mean(),
        "entropy": plain["entropy"].mean(),
        "seen_share": seen.mean(),
        "new_tokens": (~seen).sum(),
    }
    warm = {
        name: np.empty(len(half)) for name in ("top", "right")
    }  # each half at the other's temperature
    for h in (0, 1):
        mine = {name: values[half == h] for name, values in plain.items()}
        temperature = fit_temperature(
            model, [row for row in rows if row["half"] == h], tokens, device, mine
        )
        at = distributions(model, rows, tokens, device, temperature)
        figures |= {
            f"tokens/{h}": (half == h).sum(),
            f"loss/{h}": -plain["logp"][half == h].mean(),
            f"temperature/{h}": temperature,
            f"fitted_loss/{h}": -at["logp"][half == h].mean(),
            f"loss_t/{1 - h}": -at["logp"][half != h].mean(),
        }
        for name, values in warm.items():
            values[half != h] = at[name][half != h]
    curve = reliability(plain["top"], plain["right"])
    figures |= {
        "ece": expected_calibration_error(curve),
        "reliability": curve,
        "ece_t": expected_calibration_error(reliability(warm["top"], warm["right"])),
    }
    some = [
        ("seen_loss", -plain["logp"], seen),
        ("new_loss", -plain["logp"], ~seen),
        ("entropy_wrong", plain["entropy"], plain["right"] == 0),
    ]
    figures |= {name: values[where].mean() for name, values, where in some if where.any()}
    return {
        name: value if isinstance(value, list) else float(value) for name, value in figures.items()
    }
