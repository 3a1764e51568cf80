"""LM head and log-softmax in one function, without a (tokens, V) matrix of logits.

Both are computed a chunk of tokens at a time. The backward pass needs the probabilities again:
those of the first tokens are kept, of all if there is room, and the rest is recomputed. Liger
Kernel and Cut Cross-Entropy (arXiv 2411.09009) recompute all of them.

On a GPU a chunk is a matmul and one kernel (gpu_kernels.py), which reads the logits, computes in
float32 and writes the gradient in their place.
"""

import math

import torch

from nanospin.attention import on_gpu

# Logits of one chunk: on a CPU about what its last cache level holds, on a GPU enough to fill it.
CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 29}
# Elements of nll_grad that a CPU keeps. Recomputing the rest costs a quarter of the head's work.
KEPT_ELEMENTS = 1 << 24


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
    float32 (float64 for float64 inputs), 0 where there is no target. On a CPU only tokens with a
    target are computed. On a GPU all are: to select some, the CPU would have to wait for it.

    softcap: c > 0 turns the logits into c * tanh(logit / c), as in Gemma 2.
    vocab_size: the ids from here on are padding and have no probability; None: V.
    chunk: number of tokens at a time. kept: number of probabilities kept for backward.

    Under autocast the matmuls run in its dtype. The weight's gradient is accumulated in float32.
    Raises ValueError for a target outside the vocabulary, on a CPU only: on a GPU the check would
    have to wait for the device.
    """
    vocab_size = vocab_size or len(weight)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    chunk = chunk or tokens_of_chunk(hidden, len(weight))
    num_kept_chunks = 0
    if needs_grad:
        kept = room_for_kept(hidden, dtype) if kept is None else kept
        num_kept_chunks = kept // (chunk * len(weight))

    def logprobs(hidden, targets):  # (n, C), (n,) -> (n,)
        num_kept = min(len(targets), num_kept_chunks * chunk)
        with torch.autocast(device, enabled=False):
            return LinearLogprobs.apply(
                hidden.to(dtype),
                weight.to(dtype),
                targets,
                softcap,
                vocab_size,
                chunk,
                num_kept,
                needs_grad,
            )

    if on_gpu(hidden):
        logps = logprobs(hidden.flatten(0, -2), targets.flatten().clamp(min=0))
        return logps.view(targets.shape).masked_fill(targets < 0, 0.0)
    check_targets(targets, vocab_size)
    has_target = (targets >= 0).nonzero(as_tuple=True)
    logps = logprobs(hidden[has_target], targets[has_target])
    return logps.new_zeros(targets.shape).index_put(has_target, logps)


def tokens_of_chunk(hidden, vocab_size: int) -> int:
    """Tokens to compute at a time; on a GPU a multiple of 128, for its matmuls."""
    if on_gpu(hidden):
        return max(1, CHUNK_ELEMENTS["cuda"] // vocab_size // 128) * 128
    return max(64, CHUNK_ELEMENTS["cpu"] // vocab_size)


def room_for_kept(hidden, dtype) -> int:
    """Number of elements to keep for backward; on a GPU half of the free memory."""
    if hidden.device.type != "cuda":
        return KEPT_ELEMENTS
    free, _ = torch.cuda.mem_get_info(hidden.device)
    free += torch.cuda.memory_reserved(hidden.device) - torch.cuda.memory_allocated(hidden.device)
    return free // 2 // dtype.itemsize


def check_targets(targets, vocab_size):
    if targets.numel() and (targets.min() < -1 or targets.max() >= vocab_size):
        raise ValueError(
            f"targets must be -1 or in [0, {vocab_size}), got {targets.min()} to {targets.max()}"
        )


class LinearLogprobs(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[target], a chunk of tokens at a time.

    nll_grad (n, V) is the gradient of -logp by the logits, p_v - [v = target], times the slope of
    the soft cap if there is one. It is kept for the first num_kept tokens: all of them, or a whole
    number of chunks.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap, vocab_size, chunk, num_kept, needs_grad):
        # hidden (n, C), weight (V, C), targets (n,)
        n = len(hidden)
        in_place = logits_dtype(hidden) == hidden.dtype  # write directly into `kept`
        buffer = None
        if not in_place or num_kept < n:
            buffer = logits_buffer(chunk, hidden, weight)
        logps = hidden.new_empty(n, dtype=torch.promote_types(hidden.dtype, torch.float32))
        kept = hidden.new_empty(num_kept, len(weight))
        for start in range(0, n, chunk):
            part = slice(start, min(start + chunk, n))
            keep = part.stop <= num_kept
            logits = kept[part] if keep and in_place else buffer[: part.stop - part.start]
            logps[part] = logprobs_(
                logits, hidden[part], weight, targets[part], softcap, vocab_size, needs_grad
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
        is_frozen = not ctx.needs_input_grad[1]  # by LoRA
        d_weight = None if is_frozen else torch.zeros_like(weight, dtype=grad.dtype)

        def add_gradients(part, nll_grad):
            d_nll = -grad[part, None]  # (tokens, 1)
            torch.mul(nll_grad @ weight, d_nll, out=d_hidden[part])
            if is_frozen:
                return
            scaled_hidden = hidden[part] * d_nll
            if d_weight.dtype == nll_grad.dtype:
                d_weight.addmm_(nll_grad.T, scaled_hidden)
            else:
                d_weight.add_(nll_grad.T @ scaled_hidden.to(nll_grad.dtype))

        # On a GPU a chunk at a time: how many are kept depends on its free memory, and the sums in
        # d_weight must not.
        step = chunk if on_gpu(hidden) else max(num_kept, 1)
        for start in range(0, num_kept, step):
            part = slice(start, min(start + step, num_kept))
            add_gradients(part, kept[part])
        if num_kept < n:
            buffer = logits_buffer(chunk, hidden, weight)
        for start in range(num_kept, n, chunk):
            part = slice(start, min(start + chunk, n))
            logits = buffer[: part.stop - part.start]
            logprobs_(logits, hidden[part], weight, targets[part], softcap, vocab_size)
            add_gradients(part, logits.to(hidden.dtype))
        return d_hidden, None if is_frozen else d_weight.to(weight.dtype), *[None] * 6


def logits_dtype(hidden) -> torch.dtype:
    """On a CPU float32 or wider."""
    return hidden.dtype if on_gpu(hidden) else torch.promote_types(hidden.dtype, torch.float32)


def logits_buffer(chunk, hidden, weight):
    """Memory for the logits of one chunk. The chunks share it, because glibc does not reuse the
    memory of a large buffer for the next one of its size."""
    size = min(chunk, len(hidden)), len(weight)
    return hidden.new_empty(size, dtype=logits_dtype(hidden))


def logprobs_(logits, hidden, weight, targets, softcap, vocab_size, needs_grad=True):
    """The log-probabilities (n,) of a chunk's targets, float32 or wider.

    logits (n, V) is the buffer to compute in. Afterwards it holds nll_grad, on a GPU only if it is
    needed.
    """
    if logits.dtype == hidden.dtype:
        torch.mm(hidden, weight.T, out=logits)
    else:
        logits.copy_(hidden @ weight.T)
    if on_gpu(logits):
        return log_softmax_(logits, targets, softcap, vocab_size, needs_grad)
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


def log_softmax_(*args):
    """gpu_kernels.log_softmax_. Without a GPU there may be no Triton to import."""
    from nanospin import gpu_kernels

    return gpu_kernels.log_softmax_(*args)
