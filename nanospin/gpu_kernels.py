"""Two Triton kernels for what PyTorch has no fast kernel for.

Both are bound by the memory's bandwidth. Triton comes with PyTorch where there is a GPU, so this
file is imported there only. tests/gpu compares the kernels with plain PyTorch, also without a
GPU, by Triton's interpreter.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def cap(x, softcap):
    """softcap * tanh(x / softcap), without overflow. Near 0 it is exact to 1e-7 softcap only."""
    return softcap * (2 * tl.sigmoid(2 * x / softcap) - 1)


# ---- attention of a decoding step


@triton.jit
def decode_kernel(
    q,  # (B, Hkv G, D), rows q_stride apart
    new_k,  # (B, Hkv, D), rows k_stride apart
    new_v,  # (B, Hkv, D), rows v_stride apart
    k,  # (B, Hkv, columns, D)
    v,
    out,  # (B, Hkv G, D)
    first,  # (B,)
    last,  # (1,)
    q_stride,
    k_stride,
    v_stride,
    num_columns,
    scale,
    softcap,
    Hkv: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,  # G, padded for the tensor cores
    WIDTH: tl.constexpr,  # D, padded to a power of two
    BLOCK: tl.constexpr,  # columns at a time
    HAS_SOFTCAP: tl.constexpr,
):
    """One row and one head of keys and values, with the G heads of queries that share it. It keeps
    the new key and value in column `last`, and goes over the columns before it."""
    b = tl.program_id(0) // Hkv
    head = tl.program_id(0) % Hkv
    b_wide = b.to(tl.int64)
    start, stop = tl.load(first + b).to(tl.int32), tl.load(last).to(tl.int32)
    g, d = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    in_head = d < D
    in_rows = (g[:, None] < G) & in_head[None, :]
    head_place = (head * G + g[:, None]) * D + d[None, :]
    queries = tl.load(q + b_wide * q_stride + head_place, in_rows, 0.0)

    key = tl.load(new_k + b_wide * k_stride + head * D + d, in_head, 0.0)
    value = tl.load(new_v + b_wide * v_stride + head * D + d, in_head, 0.0)
    cache = (b_wide * Hkv + head) * num_columns * D
    tl.store(k + cache + stop * D + d, key, in_head)
    tl.store(v + cache + stop * D + d, value, in_head)

    # The softmax so far: the highest score, the sum of exp(score - highest), and the values
    # weighted by these. It begins with the new token.
    score = tl.sum(queries.to(tl.float32) * key.to(tl.float32)[None, :], 1) * scale
    highest = cap(score, softcap) if HAS_SOFTCAP else score
    total = tl.full((ROWS,), 1.0, tl.float32)
    weighted = tl.zeros((ROWS, WIDTH), tl.float32) + value.to(tl.float32)[None, :]
    for block in range(start // BLOCK * BLOCK, stop, BLOCK):
        column = block + tl.arange(0, BLOCK)
        visible = (column >= start) & (column < stop)
        place = cache + column[:, None] * D + d[None, :]
        read = visible[:, None] & in_head[None, :]
        keys = tl.load(k + place, read, 0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        scores = cap(scores, softcap) if HAS_SOFTCAP else scores
        scores = tl.where(visible[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        p = tl.exp(scores - new_highest[:, None])
        shrink = tl.exp(highest - new_highest)
        values = tl.load(v + place, read, 0.0)
        p_values = tl.dot(p.to(values.dtype), values, input_precision="ieee")
        weighted = weighted * shrink[:, None] + p_values
        total = total * shrink + tl.sum(p, 1)
        highest = new_highest
    result = (weighted / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + b_wide * Hkv * G * D + head_place, result, in_rows)


def decode_attention(q, new_k, new_v, k, v, first, last, softcap: float = 0.0):
    """Attention of one new token per row, and its key and value into the cache.

    q (B, H, D); new_k and new_v (B, Hkv, D); k and v (B, Hkv, columns, D), contiguous. Row b sees
    the columns from first[b], (B,), to last, (1,), which is the new token's. Returns (B, H, D).

    One program goes over all columns of a row and head, so a few long rows do not fill a GPU.
    """
    B, num_kv_heads, num_columns, head_dim = k.shape
    q, new_k, new_v = (dense_heads(x.to(k.dtype)) for x in (q, new_k, new_v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    group = q.shape[1] // num_kv_heads
    with on_device_of(q):
        decode_kernel[(B * num_kv_heads,)](
            q,
            new_k,
            new_v,
            k,
            v,
            out,
            first,
            last,
            q.stride(0),
            new_k.stride(0),
            new_v.stride(0),
            num_columns,
            head_dim**-0.5,
            softcap,
            Hkv=num_kv_heads,
            G=group,
            D=head_dim,
            ROWS=max(16, triton.next_power_of_2(group)),
            WIDTH=max(16, triton.next_power_of_2(head_dim)),
            BLOCK=64 if head_dim <= 128 else 32,
            HAS_SOFTCAP=softcap > 0,
            num_warps=4,
            num_stages=2,
        )
    return out


def dense_heads(x):
    """x (B, heads, D), with the numbers of a row one after the other. The rows may be apart, as
    those of a view of the projection to queries, keys and values are."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


# ---- log-softmax of a chunk of logits


@triton.jit
def log_softmax_kernel(
    logits,  # (n, V)
    targets,  # (n,)
    logps,  # (n,)
    vocab_size,
    V,
    softcap,
    BLOCK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEEDS_GRAD: tl.constexpr,
):
    """One row: the log-sum-exp in one pass over it, the gradient in another."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    dtype = logps.dtype.element_ty
    target = tl.load(targets + row)
    target_logit = tl.load(logits + target, target < vocab_size, 0.0).to(dtype)
    target_logit = cap(target_logit, softcap) if HAS_SOFTCAP else target_logit
    target_logit = tl.where(target < vocab_size, target_logit, float("-inf"))

    highest = tl.full((), float("-inf"), dtype)
    total = tl.zeros((), dtype)  # of exp(logit - highest)
    for start in range(0, vocab_size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = tl.load(logits + token, token < V, 0.0).to(dtype)
        x = cap(x, softcap) if HAS_SOFTCAP else x
        x = tl.where(token < vocab_size, x, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(x, 0))
        total = total * tl.exp(highest - new_highest) + tl.sum(tl.exp(x - new_highest), 0)
        highest = new_highest
    logsumexp = highest + tl.log(total)
    tl.store(logps + row, target_logit - logsumexp)

    if NEEDS_GRAD:
        for start in range(0, V, BLOCK):
            token = start + tl.arange(0, BLOCK)
            x = tl.load(logits + token, token < V, 0.0).to(dtype)
            x = cap(x, softcap) if HAS_SOFTCAP else x
            p = tl.exp(x - logsumexp)
            grad = tl.where(token == target, p - 1, p)
            if HAS_SOFTCAP:
                grad *= 1 - (x / softcap) * (x / softcap)
            grad = tl.where(token < vocab_size, grad, 0.0)
            tl.store(logits + token, grad.to(logits.dtype.element_ty), token < V)


def log_softmax_(logits, targets, softcap: float, vocab_size: int, needs_grad: bool):
    """Log-probabilities (n,) of targets (n,) under softmax(logits), float32 or wider; -inf for ids
    from vocab_size on. logits (n, V) becomes the gradient of -logp by the logits, if that is
    needed.

    8 warps and 4,096 ids at a time were the fastest of eight choices on an H200 (bench/logs/h200).
    """
    n, V = logits.shape
    logps = logits.new_empty(n, dtype=torch.promote_types(logits.dtype, torch.float32))
    with on_device_of(logits):
        log_softmax_kernel[(n,)](
            logits,
            targets,
            logps,
            vocab_size,
            V,
            softcap,
            BLOCK=4096,
            HAS_SOFTCAP=softcap > 0,
            NEEDS_GRAD=needs_grad,
            num_warps=8,
        )
    return logps


def on_device_of(x):
    """Triton launches on the current device."""
    return torch.cuda.device(x.device if x.device.type == "cuda" else -1)  # -1: do nothing
