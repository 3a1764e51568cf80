"""Keys and values of the tokens so far, for decoding one token per row at a time.

Rows are right-aligned, so that the next token of every row goes to the same column:

    column     0  1  2  3  4  5 |6  7
    row 0      .  .  a0 a1 a2 a3|           a mask hides the columns before a row's first token
    row 1      .  .  .  .  b0 b1|           end = 6: the next tokens go to column 6
    row 2      c0 c1 c2 c3 c4 c5|           columns 6 and 7 are room to grow

On a CPU rows of similar length form a group with its own tensors. Without groups, every row would
cost as much as the longest one. On a GPU all rows are one group, and the kernel (gpu_kernels.py)
reads only the columns that a row uses.

A prompt that is sampled several times is kept once, as a `Prompt`, and read once per step for all
its rows (Hydragen, arXiv 2402.05099). The columns of these rows hold only the tokens after it.
Such a group has n neighbouring rows of each of U prompts; here U = 2 and n = 3:

    prompts      column    0  1  2| 3
    p0 p1 p2     row 0     a3 a4 a5|          a token sees its prompt and the columns of its row,
                 row 1     b3 b4 b5|          in one softmax
                 row 2     c3 c4 c5|
    q0 q1 .      row 3     .  d2 d3|          a mask hides the padding of a shorter prompt
                 row 4     .  e2 e3|
                 row 5     .  f2 f3|

The last bits of the result depend on n and on the lengths of the others, as those of any row depend
on its batch.

On a GPU prompts are not shared: every row has its own copy of the prompt and reads that. Sharing
would take a second kernel in every layer, and has not been measured.
"""

import itertools
import math
from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from nanospin.attention import on_gpu, round_up

GROUP_SIZE = {"cpu": 16, "cuda": 4096}  # most rows of a group

# A full group grows to a multiple of so many columns. On a CPU unused ones cost time, on a GPU
# growing costs a new CUDA graph.
GROWTH = {"cpu": 32, "cuda": 128}


@dataclass(eq=False)
class Prompt:
    """A prompt that rows share: its keys and values, {layer: (Hkv, length, D)}."""

    length: int
    k: dict[int, torch.Tensor] = field(default_factory=dict)
    v: dict[int, torch.Tensor] = field(default_factory=dict)


class KVCache:
    """Keys and values of every layer. Row b of the batch is the b-th row of all groups in order.

    ends: the column after the last tokens of each group. For a cache that the model fills with
    prompts (`store`), pass the length of each.
    """

    def __init__(self, ends=()):
        self.k = {}  # layer -> [(b, Hkv, columns, D) for each group]
        self.v = {}
        self.prompts = []  # of each group: a PromptBatch, or None
        self.ends = list(ends)
        self.column = None  # (groups,) on the device: the column of the last tokens
        # {sliding window: [a mask of each group]}: (b Hkv, 1, columns), 0 or -inf. On a GPU the
        # first column that each row sees, (b,).
        self.masks = {}
        self.windows = []  # of each layer
        self.softcap = 0.0
        self.shift = None  # by how many columns `store` moves each row to the right, (B,)

    def store(self, layer: int, k, v):
        """Keep a right-padded batch of prompts (B, Hkv, T, D). Each row is a group; on a GPU they
        are one, right-aligned."""
        if not on_gpu(k):
            self.k[layer] = list(k.split(1))
            self.v[layer] = list(v.split(1))
            return
        T = k.shape[2]
        if self.shift is None:
            self.shift = T - torch.tensor(self.ends, device=k.device)
            self.ends = [T]
        column = torch.arange(T, device=k.device) - self.shift[:, None]
        column = column.clamp(min=0)[:, None, :, None].expand_as(k)
        self.k[layer] = [k.gather(2, column)]
        self.v[layer] = [v.gather(2, column)]

    def prompt(self, row: int) -> Prompt | None:
        """The prompt that `store` has kept as this row, for rows to share. None on a GPU."""
        if on_gpu(self.groups()[0]):
            return None
        prompt = Prompt(self.ends[row])
        for layer in self.k:
            prompt.k[layer] = self.k[layer][row][0, :, : prompt.length]
            prompt.v[layer] = self.v[layer][row][0, :, : prompt.length]
        return prompt

    def rebuild(self, rows: list[tuple["KVCache", int]], lengths: list[int], prompts=None):
        """Fill this empty cache with rows (cache, row) of other caches, which have these lengths.
        prompts: the Prompt with which each row begins, or None if it shares none; default None.

        Neighbours form groups (`split_groups`), so sort the rows by length, and those that share
        prompts by the number of rows that do.
        """
        prompts = prompts or [None] * len(rows)
        places = {}
        for cache, _ in rows:
            if cache not in places:
                places[cache] = cache.row_places()

        layers = list(rows[0][0].k)
        device = rows[0][0].k[layers[0]][0].device
        groups = []
        for group in split_groups(prompts, GROUP_SIZE[device.type]):
            groups.append(find_sources(rows[group], places, device))
            shared = None if prompts[group.start] is None else PromptBatch(prompts[group])
            self.prompts.append(shared)
            end = 0  # longest row, without a shared prompt
            for length, prompt in zip(lengths[group], prompts[group]):
                end = max(end, length - (prompt.length if prompt else 0))
            self.ends.append(end)
        self.column = torch.tensor(self.ends, device=device) - 1

        for layer in layers:
            self.k[layer], self.v[layer] = [], []
            for sources, end in zip(groups, self.ends):
                keys = [source.cache.k[layer][source.group] for source in sources]
                values = [source.cache.v[layer][source.group] for source in sources]
                self.k[layer].append(right_align(sources, keys, end))
                self.v[layer].append(right_align(sources, values, end))

    def row_places(self) -> list[tuple[int, int]]:
        """(group, index in the group) of each row."""
        places = []
        for group, keys in enumerate(self.groups()):
            places += [(group, index) for index in range(len(keys))]
        return places

    def groups(self) -> list[torch.Tensor]:
        """The keys of the first layer, from which the sizes of the groups can be read."""
        return next(iter(self.k.values()))

    def room(self) -> int:
        """Number of steps until a group is full."""
        return min(keys.shape[2] - end for keys, end in zip(self.groups(), self.ends))

    def begin_step(
        self, pos: torch.Tensor, windows: list[int], num_shared: int = 1, softcap: float = 0.0
    ):
        """Call this before the layers of a decoding step. pos (B,): the position of each new token.
        windows: of each layer; a token sees so many tokens up to itself, or all if it is 0.
        num_shared: the number of query heads that share a head of keys and values. softcap: as of
        PackedSequences.

        Unless the cache has to grow, a step only changes tensors in place and never reads one on
        the CPU, so that a CUDA graph of one step can be replayed for the next.
        """
        self.windows, self.softcap = windows, softcap
        if self.room() == 0:
            self.grow()
        self.ends = [end + 1 for end in self.ends]
        self.column += 1
        self.masks = {}
        for window in set(windows):
            self.masks[window] = self.make_masks(pos, window, num_shared)

    def make_masks(self, pos, sliding_window: int, num_shared: int) -> list:
        """The masks of a decoding step of all groups, in the layers with a window; on a GPU the
        first column that each row sees."""
        masks = []
        groups = self.groups()
        group_pos = pos.split([len(keys) for keys in groups])
        for keys, column, row_pos, prompts in zip(groups, self.column, group_pos, self.prompts):
            if on_gpu(keys):
                first = column - row_pos
                if sliding_window:
                    first = torch.maximum(first, column - sliding_window + 1)
                masks.append(first)
                continue
            num_kv_heads, num_columns = keys.shape[1:3]
            if prompts is not None:
                row_pos = prompts.begin_step(row_pos, sliding_window, num_shared)
            # (columns,): how many tokens before the new one
            distance = column - torch.arange(num_columns, device=pos.device)
            visible = (distance >= 0) & (distance <= row_pos[:, None])  # (b, columns)
            if sliding_window:
                visible = visible & (distance < sliding_window)
            masks.append(additive_mask(visible[:, None], num_kv_heads, keys.dtype))
        return masks

    def grow(self):
        """Make room in the groups that are full."""
        for tensors in (*self.k.values(), *self.v.values()):
            for group, end in enumerate(self.ends):
                if end == tensors[group].shape[2]:
                    tensors[group] = with_room(tensors[group], end)

    def select(self, x: torch.Tensor) -> torch.Tensor:
        """As in PackedSequences: the output of every token is needed."""
        return x

    @torch.compiler.disable
    def attend(self, layer: int, q, k, v) -> torch.Tensor:
        """Add one token per row, q (B, H, D), k and v (B, Hkv, D) -> (B, H, D)."""
        sizes = [len(keys) for keys in self.k[layer]]
        q, k, v = q.split(sizes), k.split(sizes), v.split(sizes)
        out = []
        window = self.windows[layer]
        for group, mask in enumerate(self.masks[window]):
            keys, values = self.k[layer][group], self.v[layer][group]
            column = self.column[group : group + 1]
            if on_gpu(q[group]):
                new = q[group], k[group], v[group]
                out.append(decode_attention(*new, keys, values, mask, column, self.softcap))
                continue
            keys.index_copy_(2, column, k[group][:, :, None])
            values.index_copy_(2, column, v[group][:, :, None])

            b, num_kv_heads, num_columns, head_dim = keys.shape
            keys = keys.view(b * num_kv_heads, num_columns, head_dim)
            values = values.view(b * num_kv_heads, num_columns, head_dim)
            queries = q[group].reshape(b * num_kv_heads, -1, head_dim)  # (b Hkv, g, D)
            scores = masked_scores(queries, keys, mask, self.softcap)
            if self.prompts[group] is None:
                y = torch.softmax(scores, -1) @ values  # (b Hkv, g, D)
            else:
                prompts = self.prompts[group]
                y = prompts.attend(layer, queries, scores, values, window, self.softcap)
            out.append(y.view(b, -1, head_dim))
        return torch.cat(out)


def decode_attention(*args):
    """gpu_kernels.decode_attention. Without a GPU there may be no Triton to import."""
    from nanospin import gpu_kernels

    return gpu_kernels.decode_attention(*args)


class PromptBatch:
    """The U prompts of a group, right-padded, and attention to them. Row i of the group begins with
    prompt i // n.

    k, v: {layer: (U, Hkv, P, D)}.
    """

    def __init__(self, prompts: list[Prompt]):
        """prompts: of each row."""
        prompts = list(dict.fromkeys(prompts))
        self.k, self.v = {}, {}
        for layer in prompts[0].k:
            self.k[layer] = pad_and_stack([prompt.k[layer] for prompt in prompts])
            self.v[layer] = pad_and_stack([prompt.v[layer] for prompt in prompts])
            for u, prompt in enumerate(prompts):  # keep nothing twice
                prompt.k[layer] = self.k[layer][u, :, : prompt.length]
                prompt.v[layer] = self.v[layer][u, :, : prompt.length]
        lengths = [prompt.length for prompt in prompts]
        self.lengths = torch.tensor(lengths, device=self.k[0].device)[:, None]  # (U, 1)
        self.masks = {}  # {sliding window: (U Hkv, 1 or n g, P)}

    def begin_step(self, pos: torch.Tensor, sliding_window: int, num_shared: int) -> torch.Tensor:
        """Make the mask of a window for tokens at pos (U n,). Returns how many tokens of their own
        rows, behind the prompt, are before them (U n,)."""
        _, num_kv_heads, P, _ = self.k[0].shape
        pos = pos.view(len(self.lengths), -1)  # (U, n)
        prompt_pos = torch.arange(P, device=pos.device)
        visible = (prompt_pos < self.lengths)[:, None]  # (U, 1, P)
        if sliding_window:
            visible = visible & (pos[:, :, None] - prompt_pos < sliding_window)  # (U, n, P)
            visible = visible.repeat_interleave(num_shared, 1)
        self.masks[sliding_window] = additive_mask(visible, num_kv_heads, self.k[0].dtype)
        return (pos - self.lengths).flatten()

    def attend(
        self, layer: int, queries, own_scores, own_values, sliding_window: int, softcap: float
    ) -> torch.Tensor:
        """Attention of queries (b Hkv, g, D) to their prompts and to the tokens behind them, which
        have own_scores (b Hkv, g, columns) and own_values (b Hkv, columns, D) -> (b Hkv, g, D)."""
        U, num_kv_heads, P, _ = self.k[layer].shape
        g = queries.shape[1]

        def by_prompt(x):
            """(b Hkv, g, width) -> (U Hkv, n g, width): the queries that read the same keys."""
            x = x.view(U, -1, num_kv_heads, g, x.shape[-1]).transpose(1, 2)
            return x.reshape(U * num_kv_heads, -1, x.shape[-1])

        def by_row(x):
            """And back."""
            x = x.view(U, num_kv_heads, -1, g, x.shape[-1]).transpose(1, 2)
            return x.reshape(-1, g, x.shape[-1])

        keys, values = self.k[layer].flatten(0, 1), self.v[layer].flatten(0, 1)
        scores = masked_scores(by_prompt(queries), keys, self.masks[sliding_window], softcap)
        probs = torch.softmax(torch.cat([by_row(scores), own_scores], -1), -1)
        y = by_row(by_prompt(probs[:, :, :P]) @ values)
        return torch.baddbmm(y, probs[:, :, P:], own_values)


def split_groups(prompts: list[Prompt | None], size: int) -> list[slice]:
    """The groups of rows with these prompts: of at most `size` rows that share none, or of as many
    rows of each prompt."""
    counts = Counter(prompts)
    num_sharing = [0 if prompt is None else counts[prompt] for prompt in prompts]
    groups = []
    start = 0
    for n, run in itertools.groupby(num_sharing):
        stop = start + len(list(run))
        most = max(n, size // n * n) if n else size
        for first in range(start, stop, most):
            groups.append(slice(first, min(first + most, stop)))
        start = stop
    return groups


def masked_scores(queries, keys, mask, softcap: float) -> torch.Tensor:
    """Attention scores, with a mask (b, 1 or m, S) added: queries (b, m, D), keys (b, S, D) ->
    (b, m, S)."""
    scale = keys.shape[-1] ** -0.5
    if not softcap:
        return torch.baddbmm(mask, queries, keys.mT, alpha=scale)
    scores = scale * (queries @ keys.mT)
    return mask + softcap * torch.tanh(scores / softcap)


def additive_mask(visible, num_kv_heads: int, dtype) -> torch.Tensor:
    """visible (b, m, columns) -> (b Hkv, m, columns): 0 where it is True, else -inf."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, -math.inf).repeat_interleave(num_kv_heads, 0)


def pad_and_stack(tensors) -> torch.Tensor:
    """Tensors (Hkv, length, D) of U prompts -> (U, Hkv, P, D)."""
    longest = max(x.shape[1] for x in tensors)
    return torch.stack([F.pad(x, (0, 0, 0, longest - x.shape[1])) for x in tensors])


@dataclass
class Source:
    """Rows of one group of a cache, and the rows of a new group that they become."""

    cache: KVCache
    group: int
    rows: torch.Tensor  # int64: indices in the group
    new_rows: torch.Tensor  # int64: indices in the new group


def find_sources(rows, places, device) -> list[Source]:
    """Where `rows` are to be copied from: all rows of a group together."""
    indices = {}  # (cache, group) -> ([index in the group], [index in the new group])
    for new_index, (cache, row) in enumerate(rows):
        group, index = places[cache][row]
        old, new = indices.setdefault((cache, group), ([], []))
        old.append(index)
        new.append(new_index)
    sources = []
    for (cache, group), (old, new) in indices.items():
        old, new = torch.tensor(old, device=device), torch.tensor(new, device=device)
        sources.append(Source(cache, group, old, new))
    return sources


def right_align(sources: list[Source], tensors, end: int) -> torch.Tensor:
    """Copy rows of groups, tensors[i] (b, Hkv, columns, D) for sources[i], into one new group, in
    which they all end at column `end`. Behind it there is room to grow."""
    num_rows = sum(len(source.rows) for source in sources)
    _, num_kv_heads, _, head_dim = tensors[0].shape
    aligned = tensors[0].new_zeros(num_rows, num_kv_heads, columns_for(end, tensors[0]), head_dim)
    for source, tensor in zip(sources, tensors):
        source_end = source.cache.ends[source.group]
        length = min(source_end, end)
        part = tensor[:, :, source_end - length : source_end].index_select(0, source.rows)
        aligned[:, :, end - length : end].index_copy_(0, source.new_rows, part)
    return aligned


def with_room(tensor, end: int) -> torch.Tensor:
    """A copy of a full group (b, Hkv, end, D) with room to grow."""
    return F.pad(tensor, (0, 0, 0, columns_for(end, tensor) - end))


def columns_for(end: int, tensor) -> int:
    """Columns of a group that ends at column `end`, with room to grow."""
    return round_up(end + 1, GROWTH["cuda" if on_gpu(tensor) else "cpu"])
