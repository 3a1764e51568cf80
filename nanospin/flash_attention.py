"""FlashAttention over packed sequences whose responses share their prompt, on a GPU.

A token of a response sees its prompt, and its own response up to itself. FlashAttention's kernels
know no such mask. So they are called twice (data/varlen.py has the two lists of sequences):

    segments   each prompt and each response alone, causal
    rows       the responses of a row, all together, see all of its prompt

Each call returns its outputs y and the logarithms lse of the sums of exp(score) that it divided by.
The softmax over the keys of both calls is

    lse = log(exp(lse_1) + exp(lse_2))
    y = exp(lse_1 - lse) y_1 + exp(lse_2 - lse) y_2

The backward kernel computes probabilities again as exp(score - lse). Called with the y and the lse
of both, it returns the exact share of one call in the gradients, and the shares are added. Ring
attention (arXiv 2310.01889) puts blocks of keys together in the same way.
"""

import functools
import sys

import torch
from torch import Tensor

from data.varlen import VarlenLayout, varlen_layout
from nanospin.attention import is_visible
from nanospin.compiling import compile_dynamic

SHORTEST_MEAN = 32  # tokens; a kernel's block has 128, and shorter segments fill little of it


def can_attend(varlen: VarlenLayout | None, config, device, dtype) -> bool:
    """Whether FlashSequences takes a batch of a model with this GPTConfig, whose queries have this
    dtype. FlexAttention does the rest: float32, windows, soft caps, heads of other widths, batches
    of short segments, and GPUs on which the kernels fail."""
    if varlen is None or device.type != "cuda":
        return False
    if config.sliding_window or config.attention_softcap:
        return False
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    if config.head_dim % 8 or config.head_dim > 128:  # wider ones do not fit on every GPU
        return False
    if len(varlen.order) < SHORTEST_MEAN * (len(varlen.segment_starts) - 1):
        return False
    return is_right(device, dtype, config.head_dim, config.n_head // config.n_kv_head)


class FlashSequences:
    """The layout of a batch of packed sequences, in the order of a VarlenLayout, and attention over
    it.

    positions (m,): the tokens, by their places here, whose output is needed; None: all. Attention
        computes all.
    """

    def __init__(self, varlen: VarlenLayout, positions: Tensor | None = None):
        self.varlen = varlen
        self.positions = positions

    def with_queries(self, positions: Tensor | None) -> "FlashSequences":
        """The same, with the output of these tokens of the batch only, or of all, in the order of
        the batch."""
        place = self.varlen.place
        if positions is not None:
            return FlashSequences(self.varlen, place.index_select(0, positions))
        return FlashSequences(self.varlen, place) if self.varlen.num_response_tokens else self

    def select(self, x: Tensor) -> Tensor:
        """The tokens of x (n, ...) whose output is needed."""
        return x if self.positions is None else x.index_select(0, self.positions)

    @torch.compiler.disable
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (n, H, D), k and v (n, Hkv, D) -> (n, H, D), or (m, H, D) with positions."""
        return self.select(FlashAttention.apply(q, k, v, self.varlen))


class FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, varlen):
        y, lse = packed_forward(q, k, v, varlen, compiled_mix if q.is_cuda else mix_)
        ctx.save_for_backward(q, k, v, y, lse)
        ctx.varlen = varlen
        return y

    @staticmethod
    def backward(ctx, dy):
        return *packed_backward(dy, *ctx.saved_tensors, ctx.varlen), None


def packed_forward(q, k, v, varlen, mix):
    """-> y (n, H, D), lse (H, n) float32. mix: `mix_`, perhaps compiled."""
    y, lse = flash_forward(q, k, v, segments(varlen), causal=True)
    if varlen.num_response_tokens:
        row_q, row_k, row_v = of_rows(q, k, v, varlen)
        row_y, row_lse = flash_forward(row_q, row_k, row_v, rows(varlen), causal=False)
        own_lse = responses_of(lse, varlen, dim=1)
        weight = torch.sigmoid(row_lse - own_lse).T  # = exp(lse_2 - lse)
        mix(responses_of(y, varlen), row_y, weight)
        torch.logaddexp(own_lse, row_lse, out=own_lse)
    return y, lse


def packed_backward(dy, q, k, v, y, lse, varlen):
    """-> the gradients of q, k, v, given dy of y."""
    dq, dk, dv = flash_backward(dy, q, k, v, y, lse, segments(varlen), causal=True)
    if varlen.num_response_tokens:
        more = flash_backward(
            responses_of(dy, varlen),
            *of_rows(q, k, v, varlen),
            responses_of(y, varlen),
            responses_of(lse, varlen, dim=1).contiguous(),
            rows(varlen),
            causal=False,
        )
        for grad, row_grad in zip(of_rows(dq, dk, dv, varlen), more, strict=True):
            grad += row_grad
    return dq, dk, dv


def mix_(y, row_y, weight):
    """y becomes (1 - weight) y + weight row_y: y and row_y (r, H, D), weight (r, H) float32."""
    weight = weight.unsqueeze(-1)
    y.copy_((1 - weight) * y + weight * row_y)


def compiled_mix(*tensors):
    """`mix_`, compiled for any number of tokens, with the other sizes as constants."""
    for x in tensors:
        torch._dynamo.maybe_mark_dynamic(x, 0)
    compile_dynamic(mix_, dynamic=None)(*tensors)


def of_rows(q, k, v, varlen):
    """The part of q that belongs to responses of rows, and those of k and v that do to prompts."""
    p = varlen.num_prompt_tokens
    return responses_of(q, varlen), k.narrow(0, 0, p), v.narrow(0, 0, p)


def responses_of(x, varlen, dim=0):
    return x.narrow(dim, varlen.num_prompt_tokens, varlen.num_response_tokens)


def segments(varlen):
    """The lengths for a kernel: starts of queries and of keys, the longest of each."""
    starts, longest = varlen.segment_starts, varlen.longest_segment
    return starts, starts, longest, longest


def rows(varlen):
    """The same of responses, as queries, and prompts, as keys."""
    starts = varlen.response_starts, varlen.prompt_starts
    return *starts, varlen.longest_responses, varlen.longest_prompt


# ---- PyTorch's kernels. Its public `varlen_attn` calls them too, but its backward pass takes the
# lse of that call only.


NO_DROPOUT = 0.0
NO_DEBUG_MASK = False


def flash_forward(q, k, v, lengths, causal):
    """-> y (m, H, D), lse (H, m) float32."""
    kernel, scale = torch.ops.aten._flash_attention_forward, q.shape[-1] ** -0.5
    y, lse, *_ = kernel(q, k, v, *lengths, NO_DROPOUT, causal, NO_DEBUG_MASK, scale=scale)
    return y, lse


def flash_backward(dy, q, k, v, y, lse, lengths, causal):
    """-> dq, dk, dv."""
    kernel, scale = torch.ops.aten._flash_attention_backward, q.shape[-1] ** -0.5
    random_state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout
    unused = torch.empty(0, device=q.device)
    inputs = (dy, q, k, v, y, lse)
    return kernel(*inputs, *lengths, NO_DROPOUT, causal, random_state, unused, scale=scale)


# ---- the kernels are private functions of PyTorch, so they are tried before they are used


@functools.cache
def is_right(device: torch.device, dtype: torch.dtype, head_dim: int, groups: int) -> bool:
    """Whether outputs and gradients are those of dense attention on a few tokens. If not, says so
    in a line. groups: query heads for each head of keys."""
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        error = largest_error(device, dtype, head_dim, groups)
        problem = f"is off by {error:.1%}"
    except Exception as e:  # another signature, other shapes, or no kernel
        error = float("inf")
        problem = (str(e) or type(e).__name__).splitlines()[0]
    # bfloat16 rounds by 0.4 %. A wrong mask is off by a tenth or more.
    if error < 0.02:
        return True
    print(f"packed rows without FlashAttention ({problem})", file=sys.stderr, flush=True)
    return False


@torch.no_grad()
def largest_error(device, dtype, head_dim, groups) -> float:
    """The largest relative error of y, dq, dk and dv, of two prompts with two responses each."""
    sequence_id = torch.tensor([0] * 9 + [1] * 12)
    response_id = torch.tensor([0] * 4 + [1] * 3 + [2] * 2 + [0] * 5 + [1] * 1 + [2] * 6)
    varlen = varlen_layout(sequence_id.numpy(), response_id.numpy())
    sequence_id, response_id = sequence_id[varlen.order], response_id[varlen.order]
    varlen = varlen.map_tensors(lambda x: x.to(device))
    index = torch.arange(len(sequence_id))
    visible = is_visible(sequence_id, response_id, index[:, None], index).to(device)

    generator = torch.Generator().manual_seed(0)
    heads = []
    for n_head in (2 * groups, 2 * groups, 2, 2):
        x = torch.randn(len(sequence_id), n_head, head_dim, generator=generator)
        heads.append(x.to(device, dtype))
    dy, q, k, v = heads
    y, lse = packed_forward(q, k, v, varlen, mix_)
    found = (y, *packed_backward(dy, q, k, v, y, lse, varlen))
    with torch.autocast(device.type, enabled=False):
        expected = dense_attention(dy.float(), q.float(), k.float(), v.float(), visible)
    errors = []
    for a, b in zip(found, expected):
        errors.append((a - b).norm() / b.norm())
    return float(torch.stack(errors).max())


def dense_attention(dy, q, k, v, visible):
    """(y, dq, dk, dv), with all scores in memory. visible (n, n) bool."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    dy, q, k, v = (x.transpose(0, 1) for x in (dy, q, k, v))  # (H, n, D)
    scale = q.shape[-1] ** -0.5
    probs = (scale * q @ k.mT).masked_fill(~visible, -torch.inf).softmax(-1)
    d_probs = dy @ v.mT
    d_scores = probs * (d_probs - (probs * d_probs).sum(-1, keepdim=True))
    y, dq, dk, dv = probs @ v, scale * d_scores @ k, scale * d_scores.mT @ q, probs.mT @ dy
    dk, dv = (x.unflatten(0, (-1, groups)).sum(1) for x in (dk, dv))
    return [x.transpose(0, 1) for x in (y, dq, dk, dv)]
