"""Attention kernels against each other, and the KV cache against attention over whole sequences."""

import functools

import numpy as np
import pytest
import torch
from test_model import CLASSIC, MODERN, WINDOWED, random_rows

from data.batch import batch_rows, stream_batch
from model import GPT, GPTConfig
from nanospin import attention, kv_cache
from nanospin.attention import PackedSequences, attention_tiles, is_visible
from nanospin.kv_cache import KVCache

CONFIGS = {"classic": CLASSIC, "modern": MODERN, "windowed": WINDOWED}


def pack(batch, sliding_window=0, query_positions=None, device="cpu"):
    """The layout of a packed batch."""
    return PackedSequences(
        batch.sequence_id.to(device),
        batch.response_id.to(device),
        batch.pos.to(device),
        sliding_window,
        query_positions=None if query_positions is None else query_positions.to(device),
    )


def same_sequences(B, T, **options):
    """B rows of T tokens without responses."""
    sequence_id = torch.arange(B).repeat_interleave(T)
    pos = torch.arange(T).repeat(B)
    return PackedSequences(sequence_id, torch.zeros_like(sequence_id), pos, **options)


# ---- the packed layout


def test_the_picture_in_the_documentation():
    lines = [line.split() for line in attention.__doc__.splitlines()]
    fields = {line[0]: line[1:] for line in lines if line}
    tokens = fields["token"]
    n = len(tokens)
    sequence_id, response_id, pos = (
        torch.tensor([int(x) for x in fields[name][:n]])
        for name in ("sequence_id", "response_id", "pos")
    )
    index = torch.arange(n)
    visible = is_visible(sequence_id, response_id, index[:, None], index)
    for i, token in enumerate(tokens):
        row = fields[token]
        assert [mark == "x" for mark in row] == visible[i, : i + 1].tolist()
        assert not visible[i, i + 1 :].any()
        assert pos[i] == visible[i].sum() - 1  # a token's position: the number of tokens before it


def test_a_packed_batch_has_no_padding_but_at_its_end():
    rows = random_rows(0, 40, 200, 4)
    batch = batch_rows(rows, multiple=64)
    num_tokens = 0
    for row in rows:
        num_tokens += len(row["prompt"])
        num_tokens += sum(len(response) - 1 for response in row["responses"] if response)
    assert batch.num_tokens == num_tokens
    assert batch.idx.numel() - num_tokens < 64


# ---- tiles


def choose_queries(batch, seed):
    n = len(batch.idx)
    return [None, batch.logit_positions.unique(), torch.arange(n)[torch.rand(n) < 0.3]][seed % 3]


@pytest.mark.parametrize("seed", range(30))
def test_tiles_cover_every_visible_pair_once(seed):
    """And no other pair, for random packings."""
    rows = random_rows(seed, 8, [10, 60, 300][seed % 3], 4)
    window = [0, 5, 100][seed // 3 % 3]
    batch = batch_rows(rows, "packed", [1, 64][seed % 2])
    packed = pack(batch, window, choose_queries(batch, seed // 9))
    n = len(batch.idx)
    index = torch.arange(n)
    queries = index if packed.query_positions is None else packed.query_positions
    covered = torch.zeros(len(queries), n)
    for tile in attention_tiles(packed):
        keys = torch.cat([index[start:stop] for start, stop in tile.spans])
        R, M = tile.mask.shape
        assert M <= len(keys) and tile.last - tile.first <= 128
        mask = torch.cat((torch.zeros(R, len(keys) - M), tile.mask), 1)
        visible = (mask[tile.first : tile.last] == 0).float()
        covered[tile.start + tile.first : tile.start + tile.last].index_add_(1, keys, visible)
    expected = is_visible(
        batch.sequence_id, batch.response_id, queries[:, None], index, batch.pos, window
    )
    assert torch.equal(covered, expected.float())


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("max_queries", [128, 16])
@pytest.mark.parametrize("seed", range(6))
def test_tiled_attention_equals_dense_attention(seed, max_queries, kv_heads, monkeypatch):
    """Output and gradients, in float64."""
    monkeypatch.setattr(attention, "TILE_QUERIES", max_queries)
    batch = batch_rows(random_rows(seed, 5, [60, 200][seed % 2], 4))
    packed = pack(batch, [0, 9][seed // 2 % 2], choose_queries(batch, seed))
    n = len(batch.idx)
    index = torch.arange(n)
    queries = index if packed.query_positions is None else packed.query_positions
    q, k, v = (
        torch.randn(n, heads, 8, dtype=torch.float64, requires_grad=True)
        for heads in (4, kv_heads, kv_heads)
    )
    visible = is_visible(
        packed.sequence_id,
        packed.response_id,
        queries[:, None],
        index,
        packed.pos,
        packed.sliding_window,
    )
    dense_k, dense_v = (x.repeat_interleave(4 // kv_heads, 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q[queries], dense_k) / 8**0.5
    probs = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    dense = torch.einsum("hij,jhd->ihd", probs, dense_v)
    tiled = packed.attend(0, q, k, v)
    torch.testing.assert_close(tiled, dense, rtol=0, atol=1e-12)
    upstream = torch.randn_like(dense)
    expected = torch.autograd.grad(dense, (q, k, v), upstream)
    found = torch.autograd.grad(tiled, (q, k, v), upstream)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# ---- the kernels of a GPU


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rectangular_attention_equals_tiles(kv_heads, dtype):
    q, k, v = (torch.randn(3 * 20, heads, 16).to(dtype) for heads in (4, kv_heads, kv_heads))
    tiled = same_sequences(3, 20, shape=(3, 20)).attend(0, q, k, v)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(
        attention.rectangular_attention(q, k, v, (3, 20)), tiled, rtol=tolerance, atol=tolerance
    )


def flex_and_tiles(
    heads, kv_heads, D, window, all_queries, seed=3, device="cpu", dtype=torch.float32
):
    """The same random rows by FlexAttention on a device and by tiles on a CPU. Returns [output]
    of each, and on a GPU [output, gradients of q, k, v]: FlexAttention has no backward pass on a
    CPU."""
    batch = batch_rows(random_rows(seed, 6, 80, 3), multiple=128)
    queries = None if all_queries else batch.logit_positions.unique()
    n = len(batch.idx)
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for num_heads in (heads, kv_heads, kv_heads):
        inputs.append(torch.randn(n, num_heads, D, generator=generator).to(dtype))
    num_queries = n if all_queries else len(queries)
    upstream = torch.randn(num_queries, heads, D, generator=generator).to(dtype)

    def results(y, q, k, v):
        if device == "cpu":
            return [y]
        y.backward(upstream.to(y.device))
        return [t.cpu() for t in (y.detach(), q.grad, k.grad, v.grad)]

    q, k, v = (t.to(device).requires_grad_(device != "cpu") for t in inputs)
    packed = pack(batch, window, queries, device)
    flex = results(
        attention.flex_attend(packed.select(q), k, v, attention.flex_mask(packed)), q, k, v
    )

    q, k, v = (t.clone().requires_grad_(device != "cpu") for t in inputs)
    tiled = results(pack(batch, window, queries).attend(0, q, k, v), q, k, v)
    return flex, tiled


@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize("all_queries", [True, False])
@pytest.mark.parametrize("D", [8, 16, 160])
def test_flex_attention_equals_tiles(window, all_queries, D, monkeypatch):
    """Forward only, and not compiled: that is what a CPU can run."""
    pytest.importorskip("torch.nn.attention.flex_attention")
    monkeypatch.setattr(attention, "compile_dynamic", lambda function: function)
    (flex,), (tiled,) = flex_and_tiles(4, 2, D, window, all_queries)
    torch.testing.assert_close(flex, tiled, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention needs a GPU for backward")
@pytest.mark.parametrize("D", [8, 48, 64, 128])
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_attention_and_its_gradients_on_a_gpu(D, kv_heads, dtype):
    """One length after the other, so that compiled kernels are used for other lengths. TF32 keeps
    10 bits, bfloat16 8."""
    for seed in range(6):
        for window, all_queries in ((0, True), (0, False), (9, False)):
            flex, tiled = flex_and_tiles(8, kv_heads, D, window, all_queries, seed, "cuda", dtype)
            for fast, slow in zip(flex, tiled):
                slow = slow.detach().double()
                assert (fast.double() - slow).norm() <= 2**-6 * slow.norm()


@pytest.fixture
def compilations(monkeypatch):
    """Counts the compilations of `attention.compile_dynamic`: functions are traced, then run
    eagerly."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    uncached = attention.compile_dynamic.__wrapped__
    monkeypatch.setattr(attention, "compile_dynamic", functools.cache(uncached))
    with torch._dynamo.config.patch(recompile_limit=8), torch.no_grad():
        yield counter


@pytest.mark.parametrize("seed", range(18))
def test_block_masks_are_exact(seed):
    """Every pair of tokens, and which blocks are full, partial or empty, against dense masks:
    packed rows, documents of a stream, sliding windows, all and some queries, any length."""
    pytest.importorskip("torch.nn.attention.flex_attention")
    window = [0, 5, 150][seed % 3]
    batch = batch_rows(random_rows(seed, 7, 300, 3), multiple=[1, 128][seed % 2])
    if seed % 4 == 3:
        stream = np.random.default_rng(seed).integers(0, 60, 2000)
        batch = stream_batch(stream, 200, 4, 0, 0, 60, document_end=0)
        batch.logit_positions = torch.arange(3, 700)
    queries = None if seed % 5 == 0 else batch.logit_positions
    packed = pack(batch, window, queries)
    n = len(batch.idx)
    i = torch.arange(n) if queries is None else queries
    expected = is_visible(
        batch.sequence_id, batch.response_id, i[:, None], torch.arange(n), batch.pos, window
    )
    mask = attention.flex_mask(packed)
    rows, columns = mask.seq_lengths
    assert rows % 128 == columns % 128 == 0
    found = mask.mask_mod(0, 0, torch.arange(rows)[:, None], torch.arange(columns))
    assert torch.equal(found[: len(i), :n], expected)
    assert not found[:, n:].any() and found.any(1).all()

    visible = found.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).sum((1, 3))
    full = dense_blocks(mask.full_kv_num_blocks, mask.full_kv_indices)
    partial = dense_blocks(mask.kv_num_blocks, mask.kv_indices)
    assert torch.equal(full, visible == 128 * 128)
    assert torch.equal(partial, (visible > 0) & ~full)
    assert torch.equal(dense_blocks(mask.full_q_num_blocks, mask.full_q_indices), full.T)
    assert torch.equal(dense_blocks(mask.q_num_blocks, mask.q_indices), partial.T)
    for indices in (mask.kv_indices, mask.full_kv_indices, mask.q_indices, mask.full_q_indices):
        assert indices.dtype == torch.int32 and indices.is_contiguous()


def dense_blocks(num_blocks, indices):
    """The lists of a BlockMask as (query blocks, key blocks) bool."""
    dense = torch.zeros(indices.shape[2:], dtype=torch.bool)
    for row, (count, columns) in enumerate(zip(num_blocks[0, 0], indices[0, 0])):
        dense[row, columns[:count]] = True
    return dense


def test_flex_attention_is_compiled_once(compilations):
    """For every length, window and set of queries."""
    for seed in range(6):
        batch = batch_rows(random_rows(seed, 6, [80, 200, 40][seed % 3], 3), multiple=128)
        q, k, v = (torch.randn(len(batch.idx), 2, 16) for _ in range(3))
        for window in (0, 9):
            for queries in (None, batch.logit_positions):
                packed = pack(batch, window, queries)
                attention.flex_attend(packed.select(q), k, v, attention.flex_mask(packed))
    assert compilations.frame_count == 1


def test_flex_attention_is_compiled_while_sampling(compilations):
    """On a GPU it processes the prompts of a model with a sliding window. The sampler runs
    eagerly."""
    mask = attention.flex_mask(same_sequences(4, 32, sliding_window=5))
    x = torch.randn(128, 2, 16)
    with torch.compiler.set_stance("force_eager"):
        attention.flex_attend(x, x, x, mask)
    assert compilations.frame_count == 1


def test_no_queries():
    """An empty set of queries has an empty output, and no gradient."""
    q, k, v = (torch.randn(20, 2, 8, requires_grad=True) for _ in range(3))
    y = same_sequences(2, 10, query_positions=torch.arange(0)).attend(0, q, k, v)
    assert y.shape == (0, 2, 8)
    y.sum().backward()
    assert not q.grad.any()


# ---- the KV cache


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_growing_cache_equals_whole_sequences(config, monkeypatch):
    """Rows of different lengths in groups of two, through several sizes of the cache, then
    regrouped. In float64, up to a few hundred roundings of 2^-53."""
    monkeypatch.setitem(kv_cache.GROUP_SIZE, "cpu", 2)
    model = GPT(GPTConfig(**config | {"block_size": 160})).double().eval()
    lengths = [1, 31, 32, 70]
    tokens = torch.randint(0, 97, (4, 160), generator=torch.Generator().manual_seed(0))
    expected = model.hidden(tokens)
    prompts = KVCache(lengths)
    model.hidden(tokens[:, :70], cache=prompts)  # tokens after a prompt's end are not visible later
    cache = KVCache()
    cache.rebuild([(prompts, b) for b in range(4)], lengths)
    rows = [0, 1, 2, 3]
    for t in range(80):
        if t == 40:  # row 1 leaves, the others move
            rows = [0, 2, 3]
            smaller = KVCache()
            smaller.rebuild([(cache, b) for b in rows], [lengths[b] + t for b in rows])
            cache = smaller
        pos = torch.tensor([lengths[b] + t for b in rows])
        found = model.hidden(tokens[rows, pos], pos=pos, cache=cache)
        torch.testing.assert_close(found, expected[rows, pos], rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("group_size", [1, 4, 16])
def test_rows_that_share_prompts_equal_whole_sequences(config, group_size, monkeypatch):
    """Three prompts of different lengths, three rows of each, and three rows alone; then rows leave
    and later some come back. In float64, up to a few hundred roundings of 2^-53."""
    monkeypatch.setitem(kv_cache.GROUP_SIZE, "cpu", group_size)
    model = GPT(GPTConfig(**config | {"block_size": 160})).double().eval()
    lengths = [1, 7, 40, 3, 8, 50]
    tokens = torch.randint(0, 97, (6, 160), generator=torch.Generator().manual_seed(0))
    prefilled = KVCache(lengths)
    model.hidden(tokens[:, :50], cache=prefilled)
    prompts = [prefilled.prompt(i) for i in range(3)] + [None] * 3
    # The rows of a prompt differ behind it.
    parents = [3, 4, 5] + [0] * 3 + [1] * 3 + [2] * 3
    sequences = torch.randint(0, 97, (12, 160), generator=torch.Generator().manual_seed(1))
    for row, parent in enumerate(parents):
        sequences[row, : lengths[parent]] = tokens[parent, : lengths[parent]]
    expected = model.hidden(sequences)

    def move(rows):
        """To a new cache. Rows that are not in the old one start with their prompt."""
        found = [
            (cache, old.index(row)) if row in old else (prefilled, parents[row]) for row in rows
        ]
        new = KVCache()
        new.rebuild(found, [pos_of[row] for row in rows], [prompts[parents[row]] for row in rows])
        return new

    cache, old = None, []
    pos_of = [lengths[parent] for parent in parents]
    for rows, num_steps in (
        (list(range(12)), 40),  # longer than the columns of a small cache
        ([0, 2, 3, 6, 7, 9, 10, 11], 3),  # one row of the first prompt is left, two of the second
        ([1, 0, 9, 10, 11, 3, 4, 6, 8], 35),  # rows 1, 4 and 8 start anew
    ):
        for row in rows:
            if row not in old:
                pos_of[row] = lengths[parents[row]]
        cache, old = move(rows), rows
        for _ in range(num_steps):
            pos = torch.tensor([pos_of[row] for row in rows])
            y = model.hidden(sequences[rows, pos], pos=pos, cache=cache)
            torch.testing.assert_close(y, expected[rows, pos], rtol=0, atol=1e-12)
            for row in rows:
                pos_of[row] += 1


def test_a_shared_prompt_is_kept_once():
    prefilled = KVCache([90, 100])
    k = torch.randn(2, 3, 100, 8)
    prefilled.store(0, k, -k)
    prompts = [prefilled.prompt(0), prefilled.prompt(1)]
    rows = [(prefilled, 0)] * 4 + [(prefilled, 1)] * 4
    for _ in range(2):
        cache = KVCache()
        cache.rebuild(rows, [90] * 4 + [100] * 4, [prompts[0]] * 4 + [prompts[1]] * 4)
        (batch,) = cache.prompts
        assert batch.k[0].shape == batch.v[0].shape == (2, 3, 100, 8)
        assert cache.k[0][0].shape == (8, 3, 32, 8)  # room for the tokens to come
        for prompt, row, length in zip(prompts, k, (90, 100)):
            assert torch.equal(prompt.k[0], row[:, :length])
            assert torch.equal(prompt.v[0], -row[:, :length])
            assert prompt.k[0].untyped_storage().data_ptr() == batch.k[0].data_ptr()
        rows = [(cache, b) for b in range(8)]


def test_groups_of_rows_that_share_prompts():
    """Neighbours with as many rows of a prompt, at most as many rows as fit."""
    a, b, c, d, e = (kv_cache.Prompt(1) for _ in range(5))
    prompts = [None] * 5 + [a, b] + [c, c, d, d, e, e]
    groups = kv_cache.split_groups(prompts, 4)
    edges = [(group.start, group.stop) for group in groups]
    assert edges == [(0, 4), (4, 5), (5, 7), (7, 11), (11, 13)]
    groups = kv_cache.split_groups([a] * 9 + [b] * 9, 4)  # the rows of a prompt stay together
    assert [(group.start, group.stop) for group in groups] == [(0, 9), (9, 18)]
