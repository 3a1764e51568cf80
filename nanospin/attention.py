"""Attention over packed sequences.

The model keeps all tokens of a batch in one flat list (n, C), without padding. Only attention has
to know which tokens belong together. A sequence is one prompt followed by its K responses, so the
prompt is computed once and not K times (prefix sharing, arXiv 2410.20305). Here are two
sequences: a prompt p with two responses a and b, and a prompt q with one response c.

    token         p0 p1 p2 a0 a1 b0 b1 q0 q1 c0
    sequence_id    0  0  0  0  0  0  0  1  1  1
    response_id    0  0  0  1  1  2  2  0  0  1     0: the prompt; k >= 1: the k-th response
    pos            0  1  2  3  4  3  4  0  1  2     each response continues right after the prompt

A token sees the prompt of its own sequence and its own response, up to and including itself:

          p0 p1 p2 a0 a1 b0 b1 q0 q1 c0
      p0   x
      p1   x  x
      p2   x  x  x
      a0   x  x  x  x
      a1   x  x  x  x  x
      b0   x  x  x  .  .  x
      b1   x  x  x  .  .  x  x
      q0   .  .  .  .  .  .  .  x
      q1   .  .  .  .  .  .  .  x  x
      c0   .  .  .  .  .  .  .  x  x  x

The attention layers call `attend(layer, q, k, v)` of an object that knows this mask:
`PackedSequences` here, `FlashSequences` (flash_attention.py) for most packed batches on a GPU, or
`KVCache` (kv_cache.py) while decoding. The queries are (n, H, D), the keys and values (n, Hkv, D),
the result (m, H, D): of the queries that were asked for, by default all.

Here three kernels compute it for whole sequences: `TiledAttention` on a CPU; on a GPU
`scaled_dot_product_attention` for plain (B, T) batches, and FlexAttention for everything else.
"""

import contextlib
import copy
import functools
import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanospin.compiling import compile_dynamic


class PackedSequences:
    """The layout of a batch of whole sequences, and attention over it.

    sequence_id, response_id, pos: (n,) each, as in the picture above.
    sliding_window: number of tokens that a token sees, itself included (arXiv 2310.06825); 0: all.
    shape: (B, T) if the batch is B rows of T tokens without responses, for which there are faster
        kernels.
    kv_cache: a KVCache that receives the keys and values of every layer; needs `shape`.
    query_positions: (m,): compute the output of these tokens only; None: of all. On a CPU they are
        increasing. On a GPU they may be in any order, best in that of the tokens, and repeat.
    softcap: c > 0: scores become c tanh(scores / c) (Gemma 2, arXiv 2408.00118); 0: they do not.
    """

    def __init__(
        self,
        sequence_id: torch.Tensor,
        response_id: torch.Tensor,
        pos: torch.Tensor | None = None,
        sliding_window: int = 0,
        shape: tuple[int, int] | None = None,
        kv_cache=None,
        query_positions: torch.Tensor | None = None,
        softcap: float = 0.0,
    ):
        self.sequence_id = sequence_id
        self.response_id = response_id
        self.pos = pos
        self.sliding_window = sliding_window
        self.shape = shape
        self.kv_cache = kv_cache
        self.query_positions = query_positions
        self.softcap = softcap
        # made by the first layer, used by all
        self.mask = None  # tiles, or a BlockMask
        self.visible_keys = None  # of all tokens, on a GPU

    def with_queries(self, positions: torch.Tensor) -> "PackedSequences":
        """The same sequences, with the output of these positions only."""
        return self.changed(query_positions=positions)

    def with_window(self, sliding_window: int) -> "PackedSequences":
        """The same sequences, for the layers with this window."""
        return self.changed(sliding_window=sliding_window, visible_keys=None)

    def changed(self, **changes):
        other = copy.copy(self)
        other.__dict__.update(changes, mask=None)
        return other

    def select(self, x: torch.Tensor) -> torch.Tensor:
        """The tokens of x (n, C) whose output is needed: (m, C) with query_positions."""
        return x if self.query_positions is None else x.index_select(0, self.query_positions)

    def attend(self, layer: int, q, k, v) -> torch.Tensor:
        """q (n, H, D), k and v (n, Hkv, D) -> (n, H, D), or (m, H, D) with query_positions."""
        if self.kv_cache is not None:
            self.store(layer, k, v)
        if on_gpu(q) and self.is_causal_rectangle():  # can be compiled
            y = rectangular_attention(q, k, v, self.shape)
            return y if self.query_positions is None else y.index_select(0, self.query_positions)
        return self.attend_packed(q, k, v)

    @torch.compiler.disable
    def attend_packed(self, q, k, v):
        if self.query_positions is not None:
            q = q.index_select(0, self.query_positions)
            if not len(q):
                return q
        if on_gpu(q):
            if self.mask is None:
                self.mask = flex_mask(self)
            return flex_attend(q, k, v, self.mask, self.softcap)

        if self.mask is None:
            self.mask = self.make_tiles(q.dtype)
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)  # (heads, tokens, D)
        return TiledAttention.apply(q, k, v, self.mask, self.softcap).transpose(0, 1)

    @torch.compiler.disable
    def store(self, layer, k, v):
        """Copy keys and values to the cache, as (B, Hkv, T, D). Views would not do: they would
        keep the whole output of the fused q, k, v projection in memory."""
        k = k.unflatten(0, self.shape).transpose(1, 2).contiguous()
        v = v.unflatten(0, self.shape).transpose(1, 2).contiguous()
        self.kv_cache.store(layer, k, v)

    def is_causal_rectangle(self):
        """Whether this is plain causal attention over (B, T), with no window shorter than T and no
        soft cap."""
        plain = self.shape and not self.softcap
        return bool(plain) and not 0 < self.sliding_window < self.shape[1]

    def make_tiles(self, dtype):
        if self.shape and self.query_positions is None:
            return rectangular_tiles(*self.shape, dtype, self.sliding_window)
        return attention_tiles(self, dtype)


def is_visible(sequence_id, response_id, i, j, pos=None, sliding_window=0):
    """Whether token i sees token j. i and j are integers or index tensors that broadcast."""
    same_sequence = sequence_id[i] == sequence_id[j]
    in_prompt_or_own_response = (response_id[j] == 0) | (response_id[i] == response_id[j])
    visible = same_sequence & in_prompt_or_own_response & (i >= j)
    if sliding_window:
        visible = visible & (pos[i] - pos[j] < sliding_window)
    return visible


def on_gpu(x: torch.Tensor) -> bool:
    return x.device.type == "cuda"


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


# ---- GPU


WITHOUT_CUDNN = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def rectangular_attention(q, k, v, shape):
    """Causal attention over rows, shape = (B, T): q (B T, H, D), k and v (B T, Hkv, D)."""
    q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in (q, k, v))  # (B, heads, T, D)
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.dtype == torch.float32:
        # In float32 only the unfused kernel supports grouped heads, and it holds all scores.
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        grouped = False
    kernels = contextlib.nullcontext()
    if not torch.is_grad_enabled():
        # Prompts have every length, and cuDNN would make a plan for each.
        kernels = sdpa_kernel(WITHOUT_CUDNN)
    with kernels:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return y.transpose(1, 2).flatten(0, 1)


FLEX_BLOCK = 128  # queries or keys of a block of FlexAttention's mask


@dataclass
class VisibleKeys:
    """The keys that each of m queries sees are two spans of tokens: of its prompt and of its own
    response. A prompt's token has only the second. All tensors are (m,) int32."""

    prompt_start: torch.Tensor
    prompt_stop: torch.Tensor
    own_start: torch.Tensor
    own_stop: torch.Tensor

    def map_tensors(self, function) -> "VisibleKeys":
        tensors = (self.prompt_start, self.prompt_stop, self.own_start, self.own_stop)
        return VisibleKeys(*map(function, tensors))


def find_visible_keys(packed: PackedSequences) -> VisibleKeys:
    """`is_visible` as spans, for all tokens, without waiting for the GPU."""
    sequence_id, response_id, pos = packed.sequence_id, packed.response_id, packed.pos
    index = torch.arange(len(sequence_id), device=sequence_id.device)

    def latest(mask, value):  # `value` at the last True up to each token, or 0
        return torch.where(mask, value, 0).cummax(0).values

    new_sequence = torch.ones_like(sequence_id, dtype=torch.bool)
    new_sequence[1:] = sequence_id[1:] != sequence_id[:-1]
    new_response = torch.ones_like(new_sequence)
    new_response[1:] = response_id[1:] != response_id[:-1]
    prompt_start = latest(new_sequence, index)
    own_start = latest(new_sequence | new_response, index)
    prompt_stop = latest(response_id == 0, index + 1)
    # empty for a sequence without a prompt, and for the tokens of a prompt
    prompt_stop = torch.minimum(torch.maximum(prompt_stop, prompt_start), own_start)
    if packed.sliding_window:
        for start in (prompt_start, own_start):
            first = pos - packed.sliding_window + 1  # the first position that a token sees
            start += (first - pos[start]).clamp(min=0)
    keys = VisibleKeys(prompt_start, prompt_stop, own_start, index + 1)
    return keys.map_tensors(lambda x: x.int())


@torch.no_grad()
def flex_mask(packed: PackedSequences):
    """The BlockMask of FlexAttention, exact in every block.

    It is built from the overlap of each query's spans with each block of keys, m n / 128 numbers,
    by a few plain operations: `create_block_mask` would test all m n pairs, or be compiled for
    every length, and `BlockMask.from_kv_blocks` takes longer to find the blocks of queries of each
    block of keys.
    """
    from torch.nn.attention.flex_attention import BlockMask  # slow to import

    if packed.visible_keys is None:
        packed.visible_keys = find_visible_keys(packed)
    keys = packed.visible_keys
    if packed.query_positions is not None:
        keys = keys.map_tensors(lambda x: x.index_select(0, packed.query_positions))
    m, n = len(keys.own_start), whole_blocks(len(packed.sequence_id))
    if m < whole_blocks(m):  # the queries that are added see key 0
        keys = keys.map_tensors(lambda x: F.pad(x, (0, whole_blocks(m) - m)))
        keys.own_stop[m:] = 1
    prompt_start, prompt_stop = keys.prompt_start, keys.prompt_stop
    own_start, own_stop = keys.own_start, keys.own_stop

    blocks = torch.arange(0, n, FLEX_BLOCK, device=own_start.device, dtype=torch.int32)
    count = overlap(prompt_start, prompt_stop, blocks) + overlap(own_start, own_stop, blocks)
    count = count.unflatten(0, (-1, FLEX_BLOCK))  # (query blocks, 128, key blocks)
    full = (count == FLEX_BLOCK).all(1)
    partial = (count > 0).any(1) & ~full

    def mask_mod(b, h, q, k):
        in_prompt = (k >= prompt_start[q]) & (k < prompt_stop[q])
        in_own_response = (k >= own_start[q]) & (k < own_stop[q])
        return in_prompt | in_own_response

    kv_num_blocks, kv_indices = block_list(partial)
    full_kv_num_blocks, full_kv_indices = block_list(full)
    q_num_blocks, q_indices = block_list(partial.T)
    full_q_num_blocks, full_q_indices = block_list(full.T)
    return BlockMask(
        seq_lengths=(len(own_start), n),
        kv_num_blocks=kv_num_blocks,
        kv_indices=kv_indices,
        full_kv_num_blocks=full_kv_num_blocks,
        full_kv_indices=full_kv_indices,
        q_num_blocks=q_num_blocks,
        q_indices=q_indices,
        full_q_num_blocks=full_q_num_blocks,
        full_q_indices=full_q_indices,
        BLOCK_SIZE=(FLEX_BLOCK, FLEX_BLOCK),
        mask_mod=mask_mod,
    )


def whole_blocks(n: int) -> int:
    """n tokens rounded up to blocks, at least two: one would be compiled as a special case."""
    return max(round_up(n, FLEX_BLOCK), 2 * FLEX_BLOCK)


def overlap(start, stop, blocks):
    """How many keys of each block (m, blocks) are in the span [start, stop) of each query."""
    first = torch.maximum(start[:, None], blocks)
    last = torch.minimum(stop[:, None], blocks + FLEX_BLOCK)
    return (last - first).clamp(min=0)


def block_list(mask):
    """(rows, columns) bool -> how many columns of each row are True, and their indices first, as a
    BlockMask has them: (1, 1, rows) and (1, 1, rows, columns), int32 and contiguous."""
    count = mask.sum(1, dtype=torch.int32)
    indices = mask.int().argsort(dim=1, descending=True, stable=True).int().contiguous()
    return count[None, None], indices[None, None]


def flex_attend(q, k, v, mask, softcap: float = 0.0):
    """FlexAttention over packed sequences: q (m, H, D), k and v (n, Hkv, D) -> (m, H, D).

    The kernels get contiguous tokens, which they load 16 bytes at a time, and whole blocks of them.
    So one compiled kernel serves every length.
    """
    m = len(q)
    y = flex_attention(pad_tokens(q), pad_tokens(k), pad_tokens(v), mask, softcap)
    return y if len(y) == m else y[:m]  # the gradient of a slice is a copy


def pad_tokens(x):
    """x (n, heads, D) -> (whole_blocks(n), heads, D), contiguous."""
    if len(x) < whole_blocks(len(x)):
        x = F.pad(x, (0, 0, 0, 0, 0, whole_blocks(len(x)) - len(x)))
    return x.contiguous()


# FlexAttention's options by (bytes of a number, head width), on NVIDIA's Hopper. PyTorch takes
# blocks of 128 x 128 scores. In the code that ptxas makes of forward they do not fit in registers,
# and both ways a multiprocessor has room for one block only, so it idles while that block waits.
# With these options and IS_DIVISIBLE forward is 3.8 times as fast on an H200, backward 1.5 times
# (bench/logs/h200).
HOPPER_OPTIONS = {
    (2, 64): {
        "fwd_BLOCK_M": 64,
        "fwd_BLOCK_N": 64,
        "fwd_num_warps": 4,
        "fwd_num_stages": 3,
        "bwd_BLOCK_M1": 32,
        "bwd_BLOCK_N1": 64,
        "bwd_BLOCK_M2": 64,
        "bwd_BLOCK_N2": 64,
        "bwd_num_warps": 4,
        "bwd_num_stages": 2,
    },
}


@functools.cache
def is_hopper(device) -> bool:
    """AMD's MI200 has the same numbers."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)


def kernel_options(q):
    """FlexAttention's options for queries (m, H, D). IS_DIVISIBLE promises whole blocks, which a
    kernel for any length cannot know: it would check every index it loads."""
    options = {"IS_DIVISIBLE": True}
    if on_gpu(q) and is_hopper(q.device):
        options |= HOPPER_OPTIONS.get((q.element_size(), q.shape[-1]), {})
    return options


def flex_attention(q, k, v, mask, softcap: float = 0.0):
    """The compiled kernels: q (m, H, D), k and v (n, Hkv, D) -> (m, H, D), m and n whole blocks.

    Heads are padded with zeros where they do not support the width: below 16, and between 128 and
    256.
    """
    head_dim = q.shape[-1]
    width = max(16 if head_dim <= 128 else 256, head_dim)
    if head_dim < width:
        q, k, v = (F.pad(x, (0, width - head_dim)) for x in (q, k, v))
    y = compile_dynamic(flex_over_tokens)(
        q,
        k,
        v,
        score_mod=softcap_score(softcap) if softcap else None,
        block_mask=mask,
        scale=head_dim**-0.5,
        enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=kernel_options(q),
    )
    return y if width == head_dim else y[..., :head_dim]


def flex_over_tokens(q, k, v, **options):
    """FlexAttention, which wants (B, heads, tokens, D). These views are compiled with it: else the
    gradient of its output would be copied into that order."""
    from torch.nn.attention import flex_attention as flex  # slow to import

    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return flex.flex_attention(q, k, v, **options).squeeze(0).transpose(0, 1)


@functools.cache  # a new function would be compiled anew
def softcap_score(softcap: float):
    """FlexAttention's score_mod of a soft cap. The number is captured as text, which is a constant
    to Dynamo: a float would become a tensor that the kernel has to read."""
    text = repr(softcap)

    def score_mod(score, b, h, q, k):
        return float(text) * torch.tanh(score / float(text))

    return score_mod


# ---- CPU: attention by tiles
#
# A tile is a block of queries and the keys that they need: at most two spans of consecutive
# tokens, the prompt and the queries' own response. Inside a tile attention is dense, with a mask.
# Keys that no query of a tile sees are not computed:
#
#     keys:     prompt  response 1  response 2
#     tile 1    #####   ####                        queries of response 1
#     tile 2    #####               #######         queries of response 2
#
# Short sequences share a tile. So do the end of a long prompt and the short responses after it.
#
# `attention_tiles` plans the tiles in three steps: cut the tokens into segments (one prompt or one
# response each), cut the segments into query blocks, merge small neighbouring blocks.

TILE_QUERIES = 128  # most queries of a tile: enough for fast matmuls, and the scores stay in cache


@dataclass
class Tile:
    """R queries, from `start` on, and the S keys in `spans`. Only the queries [first, last) of the
    R are meant; the others round R up. mask (R, M) is added to the scores of the last M keys: 0,
    or a large negative number. Every query sees the other keys."""

    start: int
    first: int
    last: int
    spans: list[tuple[int, int]]  # one or two, [start, stop) each
    mask: torch.Tensor


@dataclass
class Segment:
    """The tokens [start, stop) of one prompt or one response."""

    start: int
    stop: int
    sequence_id: int
    is_prompt: bool
    query_start: int  # the queries among them: query_positions[query_start:query_stop]
    query_stop: int


@dataclass
class QueryBlock:
    """The queries query_positions[start:stop], and the keys they need: of the two spans
    [prompt_start, prompt_stop) and [own_start, last query]."""

    start: int
    stop: int
    prompt_start: int
    prompt_stop: int
    own_start: int
    num_unmasked: int  # every query of the block sees the first so many of these keys
    merge_key: int | str | None  # neighbours with the same key may share a tile; None: never

    @property
    def prompt_len(self):
        return self.prompt_stop - self.prompt_start


def attention_tiles(packed: PackedSequences, dtype=torch.float32) -> list[Tile]:
    """Tiles in which every pair of tokens that see each other occurs exactly once."""
    if packed.query_positions is None:
        query_positions = torch.arange(len(packed.sequence_id))
    else:
        query_positions = packed.query_positions
    positions = query_positions.tolist()
    segments = find_segments(packed, query_positions)
    blocks = []
    for _, sequence in itertools.groupby(segments, key=lambda segment: segment.sequence_id):
        blocks += query_blocks(list(sequence), positions)
    blocks = merge_blocks(blocks, positions)
    return [make_tile(block, packed, query_positions, positions, dtype) for block in blocks]


@functools.lru_cache(maxsize=8)
def rectangular_tiles(B, T, dtype, sliding_window=0):
    """Tiles of B rows of T tokens."""
    sequence_id = torch.arange(B).repeat_interleave(T)
    response_id = torch.zeros_like(sequence_id)
    pos = torch.arange(T).repeat(B)
    return attention_tiles(PackedSequences(sequence_id, response_id, pos, sliding_window), dtype)


def find_segments(packed, query_positions) -> list[Segment]:
    """Cut the packed tokens where a prompt or a response begins."""
    sequence_id, response_id = packed.sequence_id, packed.response_id
    new_sequence = sequence_id[1:] != sequence_id[:-1]
    new_response = response_id[1:] != response_id[:-1]
    starts = [0] + (torch.nonzero(new_sequence | new_response)[:, 0] + 1).tolist()
    edges = starts + [len(sequence_id)]
    query_edges = torch.searchsorted(query_positions, torch.tensor(edges)).tolist()
    sequence_ids = sequence_id[starts].tolist()
    response_ids = response_id[starts].tolist()
    segments = []
    for s, start in enumerate(starts):
        segment = Segment(
            start=start,
            stop=edges[s + 1],
            sequence_id=sequence_ids[s],
            is_prompt=response_ids[s] == 0,
            query_start=query_edges[s],
            query_stop=query_edges[s + 1],
        )
        segments.append(segment)
    return segments


def query_blocks(sequence: list[Segment], positions: list[int]) -> list[QueryBlock]:
    """The blocks of one sequence, of at most TILE_QUERIES queries each; none without queries."""
    start, stop = sequence[0].start, sequence[-1].stop
    query_start, query_stop = sequence[0].query_start, sequence[-1].query_stop
    if query_start == query_stop:
        return []
    if stop - start <= TILE_QUERIES:  # short: one block, whose mask does the rest
        block = QueryBlock(
            start=query_start,
            stop=query_stop,
            prompt_start=start,
            prompt_stop=start,
            own_start=start,
            num_unmasked=0,
            merge_key="short sequences",
        )
        return [block]

    prompt_stop = sequence[0].stop if sequence[0].is_prompt else start
    blocks = []
    for segment in sequence:
        for i in range(segment.query_start, segment.query_stop, TILE_QUERIES):
            j = min(i + TILE_QUERIES, segment.query_stop)
            block = QueryBlock(
                start=i,
                stop=j,
                prompt_start=start,
                prompt_stop=prompt_stop,
                own_start=segment.start,
                num_unmasked=positions[i] - segment.start,  # the keys before the first query
                merge_key=start,
            )
            if not segment.is_prompt:
                block.num_unmasked += block.prompt_len
            elif positions[j - 1] < prompt_stop - 1:
                block.prompt_stop = start
                block.merge_key = None
            else:
                # The prompt's last token sees the whole prompt, as the responses do: share a tile.
                block.own_start = prompt_stop
            blocks.append(block)
    return blocks


def merge_blocks(blocks: list[QueryBlock], positions: list[int]) -> list[QueryBlock]:
    """Let small neighbouring blocks share a tile."""
    merged = []
    for block in blocks:
        last = merged[-1] if merged else None
        if last is not None and fit_one_tile(last, block, positions):
            last.stop = block.stop
            last.num_unmasked = min(last.num_unmasked, last.prompt_len)
        else:
            merged.append(block)
    return merged


def fit_one_tile(a: QueryBlock, b: QueryBlock, positions: list[int]) -> bool:
    """Whether b may join a, the block before it: at most TILE_QUERIES queries and own keys."""
    if b.merge_key is None or b.merge_key != a.merge_key:
        return False
    num_queries = b.stop - a.start
    num_own_keys = positions[b.stop - 1] + 1 - a.own_start
    return num_queries <= TILE_QUERIES and num_own_keys <= TILE_QUERIES


def make_tile(block, packed, query_positions, positions, dtype) -> Tile:
    """Round the sizes up and mask what this adds: each new size costs the matmul library 1 ms."""
    n, num_queries = len(packed.sequence_id), len(query_positions)
    R = min(round_up(block.stop - block.start, 32), num_queries)
    start = min(block.start, num_queries - R)

    prompt_len = block.prompt_len
    own_len = positions[block.stop - 1] + 1 - block.own_start
    own_len = min(round_up(prompt_len + own_len, 64) - prompt_len, n)
    own_start = min(block.own_start, n - own_len)
    if block.prompt_stop == own_start:
        spans = [(block.prompt_start, own_start + own_len)]
    else:
        spans = [(block.prompt_start, block.prompt_stop), (own_start, own_start + own_len)]
        spans = [(a, b) for a, b in spans if a < b]

    num_unmasked = block.num_unmasked
    if packed.sliding_window or own_start < block.own_start:
        num_unmasked = 0
    keys = torch.cat([torch.arange(a, b) for a, b in spans])[num_unmasked:]
    visible = is_visible(
        packed.sequence_id,
        packed.response_id,
        query_positions[start : start + R, None],
        keys,
        packed.pos,
        packed.sliding_window,
    )
    # Rounding may extend the second span back into the prompt, whose keys are in the first span.
    first_own = max(prompt_len - num_unmasked, 0)
    visible[:, first_own:] &= keys[first_own:] >= block.prompt_stop
    # A finite value, because a row of nothing but -inf would become NaN in the softmax.
    mask = (~visible).to(dtype) * (torch.finfo(dtype).min / 2)
    return Tile(start, block.start - start, block.stop - start, spans, mask)


def gather_spans(x, spans):
    """The tokens of one or more spans of x (heads, n, D)."""
    if len(spans) == 1:
        start, stop = spans[0]
        return x[:, start:stop]
    return torch.cat([x[:, start:stop] for start, stop in spans], 1)


@contextlib.contextmanager
def small_matmuls():
    """Run float32 matmuls on a CPU with MKL, whatever distributed.configure_torch has chosen.

    oneDNN may be faster for the large matmuls of the model. It is slower for those of attention,
    which have few rows and a head's width, and much slower for a single query.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


class TiledAttention(torch.autograd.Function):
    """Softmax attention by tiles: q (H, n, D), k and v (Hkv, n, D) -> (H, n, D).

    The probabilities are kept for backward. PyTorch's CPU kernel takes 1.7 times as long for 256
    causal tokens, and cannot skip tiles.

    With grouped-query attention a key/value head serves g = H / Hkv query heads. Their queries are
    stacked, so that a tile is one matmul per key/value head: (g R, D) @ (D, S).
    """

    @staticmethod
    @small_matmuls()
    def forward(ctx, q, k, v, tiles, softcap=0.0):
        q = (q * q.shape[-1] ** -0.5).unflatten(0, (len(k), -1))  # (Hkv, g, n, D)
        out = torch.empty_like(q)
        probs = []
        for tile in tiles:
            R, M = tile.mask.shape
            tile_q = q[:, :, tile.start : tile.start + R].flatten(1, 2)  # (Hkv, g R, D)
            scores = torch.bmm(tile_q, gather_spans(k, tile.spans).mT)  # (Hkv, g R, S)
            scores = scores.unflatten(1, (-1, R))  # (Hkv, g, R, S)
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            scores[..., -M:] += tile.mask
            p = torch.softmax(scores, -1)
            if tile.last - tile.first < R:
                p[:, :, : tile.first] = 0.0
                p[:, :, tile.last :] = 0.0
            y = torch.bmm(p.flatten(1, 2), gather_spans(v, tile.spans)).unflatten(1, (-1, R))
            written = slice(tile.start + tile.first, tile.start + tile.last)
            out[:, :, written] = y[:, :, tile.first : tile.last]
            probs.append(p)
        ctx.save_for_backward(q, k, v, *probs)
        ctx.tiles, ctx.softcap = tiles, softcap
        return out.flatten(0, 1)

    @staticmethod
    @small_matmuls()
    def backward(ctx, grad):
        q, k, v, *probs = ctx.saved_tensors
        grad = grad.unflatten(0, q.shape[:2])  # (Hkv, g, n, D)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for tile, p in zip(ctx.tiles, probs):
            R = len(tile.mask)
            p = p.flatten(1, 2)  # (Hkv, g R, S)
            tile_q = q[:, :, tile.start : tile.start + R].flatten(1, 2)  # (Hkv, g R, D)
            tile_grad = grad[:, :, tile.start : tile.start + R].flatten(1, 2)
            d_probs = torch.bmm(tile_grad, gather_spans(v, tile.spans).mT)
            d_scores = torch._softmax_backward_data(d_probs, p, -1, p.dtype)
            if ctx.softcap:  # the derivative of the cap; the scores are computed again
                scores = torch.bmm(tile_q, gather_spans(k, tile.spans).mT)
                d_scores = d_scores * (1 - torch.tanh(scores / ctx.softcap).square())
            tile_dq = torch.bmm(d_scores, gather_spans(k, tile.spans)).unflatten(1, (-1, R))
            written = slice(tile.start + tile.first, tile.start + tile.last)
            dq[:, :, written] = tile_dq[:, :, tile.first : tile.last]
            add_to_spans(dk, tile.spans, torch.bmm(d_scores.mT, tile_q))
            add_to_spans(dv, tile.spans, torch.bmm(p.mT, tile_grad))
        return dq.flatten(0, 1).mul_(q.shape[-1] ** -0.5), dk, dv, None, None


def add_to_spans(x, spans, values):
    """Add values (heads, S, D) to the tokens in the spans of x (heads, n, D)."""
    offset = 0
    for start, stop in spans:
        x[:, start:stop] += values[:, offset : offset + stop - start]
        offset += stop - start
