"""LM head and log-softmax in one function, which never holds a (tokens, V) matrix of logits.

Both are computed a chunk of tokens at a time. The backward pass needs the probabilities again:
those of the first tokens are kept, up to KEPT_ELEMENTS, and the rest is recomputed. Liger Kernel
and Cut Cross-Entropy (arXiv 2411.09009) recompute all of them.
"""

import math

import torch

# Logits of one chunk: on a CPU about what its last cache level holds, on a GPU enough to fill it.
CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}
# Probabilities that are kept for backward. Recomputing the rest costs a quarter of the head's work.
KEPT_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 28}


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    softcap: float = 0.0,
    vocab_size: int | None = None,
    chunk: int | None = None,
    kept: int | None = None,
) -> torch.Tensor:
    """Log-probability of each target under softmax(hidden @ weight.T).

    hidden (..., C), weight (V, C), targets (...) int64, -1 where there is no target. Returns (...)
    float32 (float64 for float64 inputs), 0 where there is no target. Only tokens with a target are
    computed.

    softcap: c > 0 turns the logits into c * tanh(logit / c), as in Gemma 2.
    vocab_size: the ids from here on are padding and have no probability; None: V.
    chunk: number of tokens at a time. kept: number of probabilities kept for backward.

    Under autocast the matmuls run in its dtype. The weight's gradient is accumulated in float32.
    Raises ValueError for a target outside the vocabulary, on a CPU only: on a GPU the check would
    have to wait for the device.
    """
    vocab_size = vocab_size or len(weight)
    device = hidden.device.type
    if device == "cpu":
        check_targets(targets, vocab_size)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype

    has_target = (targets >= 0).nonzero(as_tuple=True)
    hidden, flat_targets = hidden[has_target].to(dtype), targets[has_target]
    chunk = chunk or max(64, CHUNK_ELEMENTS[device] // len(weight))
    kept = KEPT_ELEMENTS[device] if kept is None else kept
    num_kept_chunks = kept // (chunk * len(weight))
    num_kept = min(len(flat_targets), num_kept_chunks * chunk)
    with torch.autocast(device, enabled=False):
        logps = LinearLogprobs.apply(
            hidden, weight.to(dtype), flat_targets, softcap, vocab_size, chunk, num_kept
        )
    return logps.new_zeros(targets.shape).index_put(has_target, logps)


def check_targets(targets, vocab_size):
    if targets.numel() and (targets.min() < -1 or targets.max() >= vocab_size):
        raise ValueError(
            f"targets must be -1 or in [0, {vocab_size}), got {targets.min()} to {targets.max()}"
        )


class LinearLogprobs(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[target], a chunk of tokens at a time.

    nll_grad (n, V) is the gradient of -logp by the logits, p_v - [v = target]. It is kept for the
    first num_kept tokens: all of them, or a whole number of chunks.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap, vocab_size, chunk, num_kept):
        # hidden (n, C), weight (V, C), targets (n,)
        n = len(hidden)
        buffer = logits_buffer(chunk, hidden, weight)
        logps = buffer.new_empty(n)
        kept = hidden.new_empty(num_kept, len(weight))
        for start in range(0, n, chunk):
            part = slice(start, min(start + chunk, n))
            keep = part.stop <= num_kept
            # Write directly into `kept`, if its dtype is that of the logits.
            in_place = keep and kept.dtype == buffer.dtype
            logits = kept[part] if in_place else buffer[: part.stop - part.start]
            logps[part] = logprobs_(
                logits, hidden[part], weight, targets[part], softcap, vocab_size
            )
            if keep and not in_place:
                kept[part] = logits
        ctx.save_for_backward(hidden, weight, targets, kept)
        ctx.options = softcap, vocab_size, chunk
        return logps

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, kept = ctx.saved_tensors
        softcap, vocab_size, chunk = ctx.options
        n, num_kept = len(hidden), len(kept)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=grad.dtype)

        def add_gradients(part, nll_grad):
            d_nll = -grad[part, None]  # (tokens, 1)
            d_hidden[part] = (nll_grad @ weight) * d_nll
            scaled_hidden = hidden[part] * d_nll
            if d_weight.dtype == nll_grad.dtype:
                d_weight.addmm_(nll_grad.T, scaled_hidden)
            else:
                d_weight.add_(nll_grad.T @ scaled_hidden.to(nll_grad.dtype))

        if num_kept:
            add_gradients(slice(0, num_kept), kept)
        buffer = logits_buffer(chunk, hidden, weight)
        for start in range(num_kept, n, chunk):
            part = slice(start, min(start + chunk, n))
            logits = buffer[: part.stop - part.start]
            logprobs_(logits, hidden[part], weight, targets[part], softcap, vocab_size)
            add_gradients(part, logits.to(hidden.dtype))
        return d_hidden, d_weight.to(weight.dtype), None, None, None, None, None


def logits_buffer(chunk, hidden, weight):
    """Memory for the logits of one chunk, float32 or wider. The chunks share it, because glibc
    does not reuse the memory of a large buffer for the next one of its size."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty(min(chunk, len(hidden)), len(weight), dtype=dtype)


def logprobs_(logits, hidden, weight, targets, softcap, vocab_size):
    """The log-probabilities (n,) of a chunk's targets, float32 or wider.

    logits (n, V) is the buffer to compute in. Afterwards it holds nll_grad.
    """
    if logits.dtype == hidden.dtype:
        torch.mm(hidden, weight.T, out=logits)
    else:
        logits.copy_(hidden @ weight.T)
    if softcap:
        tanh = torch.tanh(logits.div_(softcap))
        torch.mul(tanh, softcap, out=logits)
    logits[:, vocab_size:].fill_(-math.inf)

    top_logit = logits.amax(-1, keepdim=True)
    target_logit = logits.gather(-1, targets[:, None])
    probs = torch.softmax(logits, -1, out=logits)
    # The likeliest token has p = 1 / sum(exp(logits - top_logit)): its log is minus the logsumexp.
    logps = target_logit - top_logit + probs.amax(-1, keepdim=True).log()

    probs.scatter_add_(-1, targets[:, None], torch.full_like(target_logit, -1.0))
    if softcap:
        probs *= 1 - tanh * tanh
    return logps.squeeze(-1)
