"""x"""

import itertools
import math
import torch
from nanospin.attention import round_up


# logits of one chunk in `linear_logprobs`: on a CPU about what its last cache holds, on a GPU enough to fill it
CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}


# probabilities that it keeps for backward; what is over is computed again, a quarter of the head's work
KEPT_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 28}


class LinearLogprobs(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[target], a chunk of tokens at a time; for backward the first n_kept tokens' gradients by the logits stay."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap, vocab_size, chunk, n_kept):
        # hidden (n, C), weight (V, C), targets (n,)
        n, room = len(hidden), room_for(chunk, hidden, weight)
        logps, kept = room.new_empty(n), hidden.new_empty(n_kept, len(weight))
        for part in chunks(0, n, chunk):
            d = kept[part] if part.stop <= n_kept else room[: part.stop - part.start]
            logits = d if d.dtype == room.dtype else room[: len(d)]
            logps[part] = _logprobs(
                hidden[part], weight, targets[part], softcap, vocab_size, logits
            )
            if d is not logits:
                d.copy_(logits)
        ctx.save_for_backward(hidden, weight, targets, kept)
        ctx.options = softcap, vocab_size, chunk
        return logps

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, kept = ctx.saved_tensors
        softcap, vocab_size, chunk = ctx.options
        n, n_kept, room = len(hidden), len(kept), room_for(chunk, hidden, weight)
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=grad.dtype)
        for part in [slice(0, n_kept)] * (n_kept > 0) + chunks(n_kept, n, chunk):
            h, g, d = hidden[part], -grad[part, None], kept
            if part.stop > n_kept:
                _logprobs(h, weight, targets[part], softcap, vocab_size, room[: len(h)])
                d = room[: len(h)].to(hidden.dtype)
            d_hidden[part] = (d @ weight) * g
            if d_weight.dtype == d.dtype:
                d_weight.addmm_(d.T, h * g)
            else:
                d_weight += d.T @ (h * g).to(d.dtype)
        return d_hidden, d_weight.to(weight.dtype), None, None, None, None, None


def chunks(start, stop, size):
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


def room_for(chunk, hidden, weight):
    """For a chunk's logits; all chunks share it: glibc finds no place for a large buffer where one of its size was freed."""
    return hidden.new_empty(
        min(chunk, len(hidden)), len(weight), dtype=torch.promote_types(hidden.dtype, torch.float32)
    )


def _logprobs(hidden, weight, targets, softcap, vocab_size, logits):
    """Of a chunk: log-probabilities (n,), float32 or wider. In logits (n, V), where they are made, stay minus their gradients by the
    logits, p_v - [v = target]. Padded ids have no probability."""
    torch.mm(hidden, weight.T, out=logits) if logits.dtype == hidden.dtype else logits.copy_(
        hidden @ weight.T
    )
    if softcap:
        tanh = torch.tanh(logits.div_(softcap))
        torch.mul(tanh, softcap, out=logits)
    logits[:, vocab_size:].fill_(-math.inf)
    top, asked = logits.amax(-1, keepdim=True), logits.gather(-1, targets[:, None])
    p = torch.softmax(logits, -1, out=logits)
    logps = (
        asked - top + p.amax(-1, keepdim=True).log()
    )  # the likeliest id's p is 1 / sum of exp(logits - top)
    p.scatter_add_(-1, targets[:, None], torch.full_like(asked, -1.0))
    if softcap:
        p *= 1 - tanh * tanh
    return logps.squeeze(-1)


def linear_logprobs(hidden, weight, targets, softcap=0.0, vocab_size=None, chunk=None, kept=None):
    """Log-probability of each target under softmax(hidden @ weight.T), never holding a (tokens, V) matrix.

    hidden (..., C); weight (V, C); targets (...) int64, -1 where nothing is asked.
    softcap c > 0 bends the logits to c * tanh(logit / c) (Gemma 2); ids from `vocab_size` on are padding and take no
    probability; `chunk` is the number of tokens a time. Returns logps (...) float32, 0 where nothing is asked.
    Only asked-for tokens are computed, and the weight's gradient is accumulated in float32. Of the probabilities the first
    `kept` elements stay for backward, which computes the rest again (all of them: Liger Kernel and Cut Cross-Entropy,
    arXiv 2411.09009). Under autocast the products are made in its dtype. Raises ValueError for a target outside the vocabulary.
    """
    vocab_size = vocab_size or len(weight)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    asked = (targets >= 0).nonzero(as_tuple=True)
    h, t = hidden[asked].to(dtype), targets[asked]
    if (
        device == "cpu" and targets.numel() and (targets.min() < -1 or targets.max() >= vocab_size)
    ):  # a GPU would have to wait for it
        raise ValueError(
            f"targets must be -1 or in [0, {vocab_size}), got {targets.min()} to {targets.max()}"
        )
    chunk = chunk or max(64, CHUNK_ELEMENTS[device] // len(weight))
    n_kept = min(
        len(t), (KEPT_ELEMENTS[device] if kept is None else kept) // (chunk * len(weight)) * chunk
    )
    with torch.autocast(device, enabled=False):
        logps = LinearLogprobs.apply(h, weight.to(dtype), t, softcap, vocab_size, chunk, n_kept)
    return logps.new_zeros(targets.shape).index_put(asked, logps)
