"""Attention kernels against each other, and the KV cache against attention over whole sequences."""

import functools

import pytest
import torch
from test_model import CLASSIC, MODERN, WINDOWED, random_rows

from data.batch import batch_rows
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
    flex_q = q if all_queries else q[packed.query_positions]
    y = attention.flex_attend(
        flex_q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), attention.flex_mask(packed)
    )
    flex = results(y.transpose(0, 1), q, k, v)

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


def make_mask_mod(batch, queries, window):
    """What flex_mask gives to create_block_mask."""
    sequence_id, response_id, pos = batch.sequence_id, batch.response_id, batch.pos

    def mask_mod(b, h, i, j):
        return is_visible(sequence_id, response_id, queries[i], j, pos, window)

    return mask_mod


def test_flex_masks_are_compiled_a_few_times_for_all_lengths(compilations):
    """Past Dynamo's limit a mask would be computed for all pairs."""
    from torch.nn.attention.flex_attention import create_block_mask

    fast = attention.compile_dynamic(create_block_mask)
    counts = []
    for seed in range(9):
        rows = random_rows(seed, 6, [80, 120, 40][seed % 3], 3)
        batch = batch_rows(rows, multiple=128)
        queries = batch.logit_positions.unique()
        shape = (len(queries), len(batch.idx))
        for window in (0, 9):
            mask_mod = make_mask_mod(batch, queries, window)
            a = fast(mask_mod, None, None, *shape, device="cpu")
            b = create_block_mask(mask_mod, None, None, *shape, device="cpu")
            assert torch.equal(a.to_dense(), b.to_dense())
        counts.append(compilations.frame_count)
    assert counts[-1] == counts[-3] < 20, counts


def test_flex_attention_is_compiled_while_sampling(compilations):
    """On a GPU it processes the prompts of a model with a sliding window. The sampler runs
    eagerly."""
    mask = attention.flex_mask(same_sequences(4, 32, sliding_window=5))
    x = torch.randn(2, 128, 16)
    with torch.compiler.set_stance("force_eager"):
        attention.flex_attend(x, x, x, mask)
    assert compilations.frame_count == 1


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
