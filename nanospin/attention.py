"""Who attends to whom. Everything in the model but attention works on a flat list of tokens (n, C), of texts of any lengths.
What a token sees of the others is told by an object with one method,

    attend(layer, q (n, H, D), k, v (n, Hkv, D)) -> (n, H, D)

`Packed` of whole texts, `KVCache` of one more token for each.
"""

import contextlib
import functools
import itertools
import math
import typing

import torch
import torch.nn.functional as F


class Packed:
    """Texts, one after the other. doc (n,): the row a token belongs to; branch (n,): 0 in its prompt, k >= 1 in its k-th
    response. A token sees its row's prompt and its own branch, up to itself: K responses share one prompt
    (arXiv 2410.20305). shape (B, T): B whole rows of T without branches; their keys and values go into `keep`, a KVCache.
    window: of its text a token sees only so many, by their pos (n,), itself the last (arXiv 2310.06825); 0: all.
    asked (m,): the places that are answered, rising; None: all."""

    def __init__(self, doc, branch, pos=None, window=0, shape=None, keep=None, asked=None):
        self.doc, self.branch, self.pos, self.window, self.shape, self.keep, self.asked = (
            doc,
            branch,
            pos,
            window,
            shape,
            keep,
            asked,
        )
        self.tiles = None

    def only(self, asked):
        return Packed(self.doc, self.branch, self.pos, self.window, self.shape, self.keep, asked)

    @torch.compiler.disable
    def attend(self, layer, q, k, v):
        if (
            self.keep is not None
        ):  # copied: as they are, they would hold the queries that c_attn made with them
            self.keep.store(
                layer, *(x.unflatten(0, self.shape).transpose(1, 2).contiguous() for x in (k, v))
            )
        on_gpu = q.device.type == "cuda"
        if self.shape and on_gpu and not 0 < self.window < self.shape[1]:
            y = rectangular_attention(q, k, v, self.shape)
            return y if self.asked is None else y.index_select(0, self.asked)
        q = q if self.asked is None else q.index_select(0, self.asked)
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # (H, m, D), (Hkv, n, D)
        if self.tiles is None:  # of the first layer, for all of them
            what = self.doc, self.branch, self.pos, self.window, self.asked
            whole = self.shape and self.asked is None
            self.tiles = (
                flex_mask(*what)
                if on_gpu
                else rectangular_tiles(*self.shape, q.dtype, self.window)
                if whole
                else attention_tiles(*what, q.dtype)
            )
        y = (
            flex_attend(q, k, v, self.tiles)
            if on_gpu
            else TiledAttention.apply(q, k, v, self.tiles)
        )
        return y.transpose(0, 1)


def is_visible(doc, branch, i, j, pos=None, window=0):
    """Whether token i sees token j."""
    seen = (doc[i] == doc[j]) & ((branch[j] == 0) | (branch[i] == branch[j])) & (i >= j)
    return seen & (pos[i] - pos[j] < window) if window else seen


def rectangular_attention(q, k, v, shape):
    """Causal attention of B whole rows of T, shape (B, T): q (B T, H, D), k, v (B T, Hkv, D) -> (B T, H, D)."""
    q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
    if (
        q.dtype == torch.float32 and q.shape[1] != k.shape[1]
    ):  # PyTorch's fused kernels have no groups of heads in it; the one that does holds all scores
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return (
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        .transpose(1, 2)
        .flatten(0, 1)
    )


@torch.no_grad()
def flex_mask(doc, branch, pos=None, window=0, asked=None):
    """Who sees whom, for FlexAttention. On a GPU the mask is compiled, which never holds all pairs."""
    from torch.nn.attention.flex_attention import create_block_mask

    on_gpu = doc.device.type == "cuda"
    asked = torch.arange(len(doc), device=doc.device) if asked is None else asked
    return (compile_dynamic(create_block_mask) if on_gpu else create_block_mask)(
        lambda b, h, i, j: is_visible(doc, branch, asked[i], j, pos, window),
        None,
        None,
        len(asked),
        len(doc),
        device=doc.device,
    )


def flex_attend(q, k, v, mask):
    """FlexAttention: q (H, m, D), k, v (Hkv, n, D) -> (H, m, D). Its kernels take heads from 16 on, and not all between 128 and 256; the one
    for less than 128 queries, which does not take every group of heads, is not used."""
    from torch.nn.attention.flex_attention import flex_attention

    D = q.shape[-1]
    width = max(16 if D <= 128 else 256, D)
    if width > D:
        q, k, v = (F.pad(x, (0, width - D)) for x in (q, k, v))
    q, k, v = (x[None] for x in (q, k, v))
    return compile_dynamic(flex_attention)(
        q,
        k,
        v,
        block_mask=mask,
        scale=D**-0.5,
        enable_gqa=q.shape[1] != k.shape[1],
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
    )[0, ..., :D]


@functools.cache
def compile_dynamic(function):
    """A function of FlexAttention's, compiled for any length, in the sampler too, which else compiles nothing. Each pairing of
    lengths, heads and gradient is compiled for itself; beyond Dynamo's limit (8) it would be run as it is, and hold all scores."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compiler.set_stance("default")(torch.compile(function, dynamic=True))


TILE_QUERIES = 128  # of a tile: enough for the products to run at their rate, few enough that the scores stay in a cache


class Tile(typing.NamedTuple):
    """Attention of the queries [i, i + R), of which those in [lo, hi) are meant, to S keys of one or two spans."""

    i: int
    lo: int
    hi: int
    spans: list  # [(start, stop)]: of the prompt, and of the branch up to the last query
    mask: (
        torch.Tensor
    )  # (R, last keys) 0, or too low to be seen; what stands before them all queries see


def attention_tiles(doc, branch, pos=None, window=0, asked=None, dtype=torch.float32):
    """Tiles that cover every pair of tokens that see each other; asked (m,): the places of the queries, in rising order, if not
    all are asked for. Short rows share a tile, and so do the end of a long prompt and its short responses; what is longer is
    cut at QUERIES, and no key behind a tile's last query is touched. Sizes are rounded up by tokens that the mask hides: each
    new size of a product costs the library's compiler a millisecond."""
    n = len(doc)
    asked = torch.arange(n) if asked is None else asked
    starts = [
        0,
        *(((doc[1:] != doc[:-1]) | (branch[1:] != branch[:-1])).nonzero()[:, 0] + 1).tolist(),
    ]
    stops = [*starts[1:], n]
    docs, branches = doc[starts].tolist(), branch[starts].tolist()
    edges, places = torch.searchsorted(asked, torch.tensor([*starts, n])).tolist(), asked.tolist()
    parts = []  # (queries i to j, prompt's span, where the keys of its own branch begin, keys that all queries see, with whom it may share a tile)
    for row in [list(g) for _, g in itertools.groupby(range(len(starts)), key=lambda r: docs[r])]:
        first, last = starts[row[0]], stops[row[-1]]
        if last - first <= TILE_QUERIES:
            parts.append(
                (edges[row[0]], edges[row[-1] + 1], (first, first), first, 0, "short rows")
            )
            continue
        end = first if branches[row[0]] else stops[row[0]]  # of the prompt
        for r in row:
            for i in range(edges[r], edges[r + 1], TILE_QUERIES):
                j = min(i + TILE_QUERIES, edges[r + 1])
                if branches[r]:
                    parts.append(
                        (i, j, (first, end), starts[r], end - first + places[i] - starts[r], first)
                    )
                elif places[j - 1] < end - 1:
                    parts.append((i, j, (first, first), first, places[i] - first, None))
                else:  # the last of it sees the whole prompt, as the responses do
                    parts.append((i, j, (first, end), end, places[i] - first, first))
    merged = []
    for i, j, prompt, own, clear, shares in parts:
        if (
            merged
            and shares is not None
            and shares == merged[-1][5]
            and j - merged[-1][0] <= TILE_QUERIES
            and places[j - 1] - merged[-1][3] < TILE_QUERIES
        ):
            i, _, prompt, own, clear, _ = merged.pop()
            clear = min(clear, prompt[1] - prompt[0])
        if i < j:
            merged.append((i, j, prompt, own, clear, shares))
    tiles, index = [], torch.arange(n)
    for i, j, prompt, own, clear, _ in merged:
        R = min(round_up(j - i, 32), len(asked))
        shared = prompt[1] - prompt[0]
        S = min(round_up(shared + places[j - 1] + 1 - own, 64) - shared, n)
        clear = 0 if window or own > n - S else clear
        start, own = min(i, len(asked) - R), min(own, n - S)
        spans = (
            [(prompt[0], own + S)]
            if prompt[1] == own
            else [prompt] * (shared > 0) + [(own, own + S)] * (S > 0)
        )
        keys, queries = (
            torch.cat([index[a:b] for a, b in spans])[clear:],
            asked[start : start + R, None],
        )
        seen = is_visible(doc, branch, queries, keys, pos, window)
        seen[:, max(shared - clear, 0) :] &= (
            keys[max(shared - clear, 0) :] >= prompt[1]
        )  # the rounding may reach back into the prompt
        mask = (~seen).to(dtype) * (
            torch.finfo(dtype).min / 2
        )  # of -inf alone softmax would be NaN
        tiles.append(Tile(start, i - start, j - start, spans, mask))
    return tiles


@functools.lru_cache(maxsize=8)
def rectangular_tiles(B, T, dtype, window=0):
    """Tiles of B rows of T tokens."""
    doc = torch.arange(B).repeat_interleave(T)
    return attention_tiles(
        doc, torch.zeros_like(doc), torch.arange(T).repeat(B), window, dtype=dtype
    )


def round_up(n, multiple):
    return -(-n // multiple) * multiple


@contextlib.contextmanager
def small_matmuls():
    """Float32 products of a CPU by MKL, whatever parallel.tune has chosen for the large ones: where oneDNN is the faster for those, it
    is the slower for attention's, of few rows and a head's width, and by far for a single query's."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


class TiledAttention(torch.autograd.Function):
    """Softmax attention by tiles, whose probabilities are kept. PyTorch's kernel for a CPU takes 1.7 times as long at 256 causal
    tokens, and knows no tiles."""

    @staticmethod
    @small_matmuls()
    def forward(ctx, q, k, v, tiles):
        # q (H, n, D), k, v (Hkv, n, D), in memory token by token; the queries of a group's heads stand one below the other: (Hkv, g R, D)
        q = (q * q.shape[-1] ** -0.5).unflatten(0, (len(k), -1))  # (Hkv, g, n, D)
        out, probs = torch.empty_like(q), []
        for i, lo, hi, spans, mask in tiles:
            R = len(mask)
            scores = torch.bmm(
                q[:, :, i : i + R].flatten(1, 2), gather_spans(k, spans).mT
            ).unflatten(1, (-1, R))  # (Hkv, g, R, S)
            scores[..., -mask.shape[1] :] += mask
            p = torch.softmax(scores, -1)
            if hi - lo < R:
                p[:, :, :lo] = p[:, :, hi:] = 0.0
            y = torch.bmm(p.flatten(1, 2), gather_spans(v, spans)).unflatten(1, (-1, R))
            out[:, :, i + lo : i + hi] = y[:, :, lo:hi]
            probs.append(p)
        ctx.save_for_backward(q, k, v, *probs)
        ctx.tiles = tiles
        return out.flatten(0, 1)

    @staticmethod
    @small_matmuls()
    def backward(ctx, grad):
        q, k, v, *probs = ctx.saved_tensors
        g = grad.unflatten(0, q.shape[:2])
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (i, lo, hi, spans, mask), p in zip(ctx.tiles, probs):
            R = len(mask)
            d_out, p = (
                g[:, :, i : i + R].flatten(1, 2),
                p.flatten(1, 2),
            )  # (Hkv, g R, D), (Hkv, g R, S)
            d_scores = torch._softmax_backward_data(
                torch.bmm(d_out, gather_spans(v, spans).mT), p, -1, p.dtype
            )
            dq[:, :, i + lo : i + hi] = torch.bmm(d_scores, gather_spans(k, spans)).unflatten(
                1, (-1, R)
            )[:, :, lo:hi]
            d_k, d_v, at = (
                torch.bmm(d_scores.mT, q[:, :, i : i + R].flatten(1, 2)),
                torch.bmm(p.mT, d_out),
                0,
            )
            for a, b in spans:
                dk[:, a:b] += d_k[:, at : at + b - a]
                dv[:, a:b] += d_v[:, at : at + b - a]
                at += b - a
        return dq.flatten(0, 1).mul_(q.shape[-1] ** -0.5), dk, dv, None


def gather_spans(x, spans):
    """The tokens of some spans, x (H, n, D)."""
    return (
        x[:, spans[0][0] : spans[0][1]]
        if len(spans) == 1
        else torch.cat([x[:, a:b] for a, b in spans], 1)
    )
