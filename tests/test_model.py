import functools
import math
import random

import pytest
import torch
import torch.nn.functional as F

from nanospin import attention
from nanospin.attention import Packed, attention_tiles, is_visible
from data.batch import batch_rows
from loss import sequence_logprobs
from model import GPT, GPTConfig, init_mean_std

CLASSIC = dict(vocab_size=97, block_size=32, n_layer=2, n_head=4, n_embd=32)
MODERN = dict(
    CLASSIC,
    n_kv_head=2,
    position="rotary",
    norm="rmsnorm",
    mlp="swiglu",
    bias=False,
    tie_embeddings=False,
    qk_norm=True,
    logit_softcap=5.0,
)
WINDOWED = dict(CLASSIC, position="rotary", norm="rmsnorm", mlp="swiglu", bias=False, sliding_window=7)
SQUARED = dict(CLASSIC, position="rotary", norm="rmsnorm", mlp="relu2", bias=False)


# the two versions of the block that config/tn_shp_*.py reproduce
LATER = dict(
    CLASSIC,
    position="sinusoidal",
    mlp="relu",
    attn_proj=False,
    tie_embeddings=False,
    head_bias=True,
    init_scheme="glorot",
    init_noise=0.1,
)
FIRST = dict(LATER, attn_scale="embd", mlp_alone=True)


@pytest.fixture(
    params=[CLASSIC, MODERN, SQUARED, WINDOWED, LATER, FIRST],
    ids=["classic", "modern", "squared", "windowed", "later", "first"],
)
def model(request):
    return GPT(GPTConfig(**request.param)).eval()


def test_logprobs_are_the_logits_log_softmax(model):
    idx, targets = torch.randint(0, 97, (3, 20)), torch.randint(-1, 97, (3, 20))
    slow = model(idx).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1) * (
        targets >= 0
    )
    torch.testing.assert_close(model(idx, targets), slow, rtol=1e-5, atol=1e-5)
    assert model(idx).shape == (3, 20, 97)  # without the padded ids


def test_causal(model):
    idx = torch.randint(0, 97, (1, 20))
    other = idx.clone()
    other[0, 12:] = (other[0, 12:] + 1) % 97
    a, b = model(idx), model(other)
    assert torch.equal(a[:, :12], b[:, :12]) and not torch.equal(a[:, 12:], b[:, 12:])


def test_right_padding_changes_nothing(model):
    idx = torch.randint(0, 97, (1, 10))
    padded = F.pad(idx, (0, 7), value=3)
    torch.testing.assert_close(model(padded)[:, :10], model(idx), rtol=1e-5, atol=1e-5)


def random_rows(seed, n, longest, most):
    """Encoded rows of 1 to `most` responses, some absent, some of one token, some prompts empty."""
    rng = random.Random(seed)

    def ids(least):
        return [
            rng.randrange(97) for _ in range(int(rng.uniform(least, longest ** rng.random() + 1)))
        ]

    rows = [
        {
            "prompt": ids(0),
            "responses": [
                ids(1),
                *(rng.choice([ids(1), ids(1), None]) for _ in range(rng.randrange(most))),
            ],
        }
        for _ in range(n)
    ]
    return [row | {"ranks": list(range(len(row["responses"])))} for row in rows]


@pytest.mark.parametrize(
    "config", [CLASSIC, MODERN, SQUARED, WINDOWED], ids=["classic", "modern", "squared", "windowed"]
)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("queries, longest", [(128, 20), (32, 150), (128, 300)])
def test_shared_layout_equals_the_padded_one(
    config, dtype, tolerance, queries, longest, monkeypatch
):
    """Sequence log-probabilities and every gradient, relative to the largest of a tensor; rows that share a tile, and rows
    that need several."""
    monkeypatch.setattr(attention, "QUERIES", queries)
    model = GPT(GPTConfig(**config | dict(block_size=2 * longest + 2))).to(dtype)
    with torch.no_grad():
        for p in model.parameters():  # as drawn, attention hardly looks
            p.mul_(3.0 if p.dim() == 2 else 1.0)
    rows, found = random_rows(queries + longest, 9, longest, 4), {}
    for layout in ("padded", "shared"):
        batch = batch_rows(rows, layout)
        B, K = batch["present"].shape
        logps = model(
            **{
                name: batch[name]
                for name in ("idx", "targets", "pos", "doc", "branch", "at")
                if name in batch
            }
        )
        scores = sequence_logprobs(logps, batch["seq"], B * K).view(B, K)
        weights = torch.linspace(-1, 1, B * K).view(B, K).to(scores)
        found[layout] = [
            scores.detach(),
            *torch.autograd.grad((scores * weights).sum(), list(model.parameters())),
        ]
    for slow, fast in zip(found["padded"], found["shared"]):
        assert (slow - fast).abs().max() <= tolerance * slow.abs().max()


def test_tiles_cover_what_is_seen_once():
    """Over random packings: every pair of tokens that see each other is in exactly one tile, and no other pair in any."""
    for seed in range(30):
        rows, window = random_rows(seed, 8, [10, 60, 300][seed % 3], 4), [0, 5, 100][seed // 3 % 3]
        batch = batch_rows(rows, "shared", [1, 64][seed % 2])
        n = len(batch["idx"])
        seen = torch.zeros(n, n)
        index = torch.arange(n)
        asked = [None, batch["at"].unique(), index[torch.rand(n) < 0.3]][seed // 9 % 3]
        for i, lo, hi, spans, mask in attention_tiles(
            batch["doc"], batch["branch"], batch["pos"], window, asked
        ):
            keys = torch.cat([index[a:b] for a, b in spans])
            assert mask.shape[1] <= len(keys) and hi - lo <= 128
            mask = torch.cat((torch.zeros(len(mask), len(keys) - mask.shape[1]), mask), 1)
            seen[i + lo : i + hi].index_add_(1, keys, (mask[lo:hi] == 0).float())
        queries = index if asked is None else asked
        assert torch.equal(
            seen[: len(queries)],
            is_visible(
                batch["doc"], batch["branch"], queries[:, None], index, batch["pos"], window
            ).float(),
        )


def test_a_pack_is_no_longer_than_its_tokens():
    rows = random_rows(0, 40, 200, 4)
    batch = batch_rows(rows, multiple=64)
    assert batch["tokens"] == sum(
        len(r["prompt"]) + sum(len(y) - 1 for y in r["responses"] if y) for r in rows
    )
    assert batch["idx"].numel() - batch["tokens"] < 64


def flex_and_tiles(
    heads, kv_heads, D, window, all_asked, seed=3, device="cpu", dtype=torch.float32
):
    """(FlexAttention, the tiles on a CPU), [outputs, and where FlexAttention has a backward pass the gradients of q, k, v], of random rows."""
    batch = batch_rows(random_rows(seed, 6, 80, 3), multiple=128)
    n, generator = len(batch["idx"]), torch.Generator().manual_seed(seed)
    x = [torch.randn(n, H, D, generator=generator).to(dtype) for H in (heads, kv_heads, kv_heads)]
    asked = None if all_asked else batch["at"].unique()
    grad = torch.randn(n if all_asked else len(asked), heads, D, generator=generator).to(dtype)
    both = []
    for where in (device, "cpu"):
        doc, branch, pos = (batch[name].to(where) for name in ("doc", "branch", "pos"))
        q, k, v = (t.to(where).requires_grad_(device != "cpu") for t in x)
        if len(both) == 0:
            places = asked if asked is None else asked.to(where)
            mask = attention.flex_mask(doc, branch, pos, window, places)
            y = attention.flex_attend(
                *(
                    (q if all_asked else q[places]).transpose(0, 1),
                    k.transpose(0, 1),
                    v.transpose(0, 1),
                ),
                mask,
            ).transpose(0, 1)
        else:
            y = Packed(doc, branch, pos, window, asked=asked).attend(0, q, k, v)
        if device != "cpu":
            y.backward(grad.to(where))
        both.append([y.detach().cpu()] + [t.grad.cpu() for t in (q, k, v) if t.grad is not None])
    return both


@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize("all_asked", [True, False])
@pytest.mark.parametrize("D", [8, 16, 160])
def test_flex_attention_sees_the_same(window, all_asked, D, monkeypatch):
    """What a GPU runs, forward (on a CPU it has no backward, and is not compiled), against the tiles."""
    pytest.importorskip("torch.nn.attention.flex_attention")
    monkeypatch.setattr(attention, "compiled", lambda function: function)
    (fast,), (y,) = flex_and_tiles(4, 2, D, window, all_asked)
    torch.testing.assert_close(fast, y, rtol=1e-5, atol=1e-5)


@pytest.fixture
def compilations(monkeypatch):
    """Counts what `attention.compiled` compiles (traced, and then run as it is)."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    monkeypatch.setattr(
        attention, "compiled", functools.cache(attention.compile_dynamic.__wrapped__)
    )
    with torch._dynamo.config.patch(recompile_limit=8), torch.no_grad():
        yield counter


def test_flex_attentions_masks_are_compiled_for_any_length(compilations):
    """A few times for all lengths: past Dynamo's limit a mask would be made of all pairs."""
    from torch.nn.attention.flex_attention import create_block_mask

    fast, compiled_for = attention.compile_dynamic(create_block_mask), []
    for seed in range(9):
        batch = batch_rows(random_rows(seed, 6, [80, 120, 40][seed % 3], 3), multiple=128)
        doc, branch, asked = batch["doc"], batch["branch"], batch["at"].unique()
        for window in (0, 9):

            def seen(b, h, i, j):
                return is_visible(doc, branch, asked[i], j, batch["pos"], window)

            masks = [
                make(seen, None, None, len(asked), len(doc), device="cpu")
                for make in (fast, create_block_mask)
            ]
            assert torch.equal(masks[0].to_dense(), masks[1].to_dense())
        compiled_for.append(compilations.frame_count)
    assert compiled_for[-1] == compiled_for[-3] < 20, compiled_for


@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="FlexAttention has kernels and a backward pass on a GPU alone",
)
@pytest.mark.parametrize("D", [8, 48, 64, 128])
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_attention_and_its_gradients_on_a_gpu(D, kv_heads, dtype):
    """One length after the other, so that what is compiled for one is used for the next. TF32 and bfloat16 keep 10 and 8 bits."""
    for seed in range(6):
        for window, all_asked in ((0, True), (0, False), (9, False)):
            for fast, slow in zip(
                *flex_and_tiles(8, kv_heads, D, window, all_asked, seed, "cuda", dtype)
            ):
                assert (fast.double() - slow.double()).norm() <= 2**-6 * slow.double().norm()


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_rows_by_the_other_kernel(kv_heads, dtype):
    """What a GPU runs where rows are rectangular, against the tiles."""
    q, k, v = (torch.randn(3 * 20, H, 16).to(dtype) for H in (4, kv_heads, kv_heads))
    doc = torch.arange(3).repeat_interleave(20)
    y = Packed(doc, torch.zeros_like(doc), torch.arange(20).repeat(3), shape=(3, 20)).attend(
        0, q, k, v
    )
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(
        attention.rectangular_attention(q, k, v, (3, 20)), y, rtol=tolerance, atol=tolerance
    )


def test_flex_attention_is_compiled_while_sampling(compilations):
    """A GPU reads a windowed model's prompts by it; the sampler runs all else as it is."""
    doc, x = torch.arange(4).repeat_interleave(32), torch.randn(2, 128, 16)
    mask = attention.flex_mask(doc, torch.zeros_like(doc), torch.arange(32).repeat(4), window=5)
    with torch.compiler.set_stance("force_eager"):
        attention.flex_attend(x, x, x, mask)
    assert compilations.frame_count == 1


@torch.no_grad()
@pytest.mark.parametrize("asked", [[], [0], [59], [7, 7, 3, 41], range(60)])
def test_what_is_asked_for_alone_is_the_same(model, asked):
    """Of some places, in any order, more than once or none, against all of them; the last block makes those alone."""
    model.double()
    idx, asked = torch.randint(0, 97, (3, 20)), torch.tensor(list(asked), dtype=torch.long)
    torch.testing.assert_close(
        model(idx, at=asked), model(idx).flatten(0, 1)[asked], rtol=0, atol=1e-6
    )  # logits are float32
    torch.testing.assert_close(
        model.hidden(idx, asked=asked.unique()),
        model.hidden(idx).flatten(0, 1)[asked.unique()],
        rtol=0,
        atol=1e-12,
    )


def test_documents_apart_are_each_alone():
    model = GPT(GPTConfig(**MODERN)).eval()
    texts = [torch.randint(0, 97, (n,)) for n in (5, 11, 1, 14)]
    pos, doc = (
        torch.cat([torch.arange(len(t)) for t in texts]),
        torch.cat([torch.full((len(t),), d) for d, t in enumerate(texts)]),
    )
    together = model(torch.cat(texts), pos=pos, doc=doc, branch=torch.zeros_like(doc))
    alone = torch.cat([model(t[None])[0] for t in texts])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_rotary_sees_distances_alone():
    """Attention of one block over the same tokens, all shifted by 9 positions, is the same; learned positions differ."""
    idx = torch.randint(0, 97, (1, 10))
    for config, same in ((SQUARED, True), (CLASSIC, False)):
        model = GPT(GPTConfig(**config)).eval()
        a, b = model.hidden(idx), model.hidden(idx, pos=torch.arange(9, 19)[None])
        assert torch.allclose(a, b, atol=1e-5) == same


@pytest.mark.parametrize(
    "config",
    [dict(CLASSIC, n_embd=256), dict(MODERN, n_embd=256), dict(LATER, n_embd=256)],
    ids=["classic", "modern", "later"],
)
def test_initialisation_has_its_tables_deviations(config):
    """Within four standard errors, std / sqrt(2 n), of what the table says; meta and direct building agree."""
    model = GPT(GPTConfig(**config))
    scaled = 0
    for name, p in model.named_parameters():
        mean, std = init_mean_std(name, p.shape, model.config)
        assert mean == ("norm" in name or ".ln_" in "." + name) * (not name.endswith("bias")), name
        assert abs(p.std().item() - std) <= 4 * std / math.sqrt(2 * p.numel()), name
        assert abs(p.mean().item() - mean) <= 4 * std / math.sqrt(p.numel()), name
        scaled += std == 0.02 / math.sqrt(2 * config["n_layer"])
    assert scaled == (0 if config.get("init_scheme") == "glorot" else 2 * config["n_layer"])
    with torch.device("meta"):
        late = GPT(model.config)
    late.to_empty(device="cpu").init_weights()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), late.parameters()))


def test_the_write_ups_initialisation():
    """Glorot's deviation of each matrix, queries, keys and values apart, and noise of 0.1 added to every parameter."""
    w = dict(GPT(GPTConfig(**dict(LATER, n_embd=256))).named_parameters())
    for name, mean, variance in (
        ("wte.weight", 0, 2 / (128 + 256)),
        ("h.0.attn.c_attn.weight", 0, 2 / (256 + 256)),
        ("h.1.mlp.c_fc.weight", 0, 2 / (256 + 1024)),
        ("lm_head.weight", 0, 2 / (128 + 256)),
        ("h.0.attn.c_attn.bias", 0, 0),
        ("h.0.ln_1.weight", 1, 0),
        ("ln_f.bias", 0, 0),
    ):
        n, std = w[name].numel(), math.sqrt(variance + 0.1**2)
        assert abs(w[name].std().item() - std) < 4 * std / math.sqrt(2 * n) and abs(
            w[name].mean().item() - mean
        ) < 4 * std / math.sqrt(n), name


def test_loss_at_initialisation_is_about_uniform(model):
    if model.config.init_noise:
        pytest.skip("its noise makes logits of its own")
    idx = torch.randint(0, 97, (8, 32))
    assert abs(-model(idx, idx.roll(-1, 1)).mean().item() - math.log(97)) < 0.1


def test_gpt2_has_124m_parameters():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    padding = (model.config.padded_vocab - 50257) * 768
    assert model.num_params() - padding == 124_439_808
    # 6 x (85.0M in blocks + 38.6M in the head) + 12 x 12 x 768 x 1024
    assert abs(model.flops_per_token() / 8.55e8 - 1) < 0.01


def test_overfits_one_batch():
    model = GPT(GPTConfig(**MODERN))
    idx = torch.randint(0, 97, (4, 16), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = -model(idx[:, :-1], idx[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(n_head=5), "multiple of n_head"),
        (dict(n_kv_head=3), "n_kv_head"),
        (dict(n_kv_head=-1), "n_kv_head"),
        (dict(n_inner=-1), "n_inner"),
        (dict(mlp="swish"), "mlp must be"),
        (dict(head_bias=True), "a head of its own"),
        (dict(position="sinusoidal", n_embd=33, n_head=3), "even n_embd"),
        (dict(n_layer=0), "n_layer"),
        (dict(rope_scaling=[8.0, 4.0, 1.0, 64.0]), "low < high"),
        (dict(position="rotary", n_embd=20), "even head width"),
        (dict(dropout=1.0), "dropout"),
    ],
)
def test_impossible_shapes(bad, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**CLASSIC | bad)


def test_the_write_ups_block_by_hand():
    """Both versions of the block on one row, step by step, in plain tensor operations."""
    for config in (LATER, FIRST):
        model = GPT(GPTConfig(**config)).double().eval()
        w, idx, (T, C, H) = (
            dict(model.named_parameters()),
            torch.randint(0, 97, (1, 12)),
            (12, 32, 4),
        )
        place, wave = (
            torch.arange(T, dtype=torch.float64)[:, None],
            torch.arange(0, C, 2, dtype=torch.float64),
        )
        x = w["wte.weight"][idx[0]]
        x = x + torch.stack(
            [torch.sin(place / 10000 ** (wave / C)), torch.cos(place / 10000 ** (wave / C))], -1
        ).view(T, C)
        for i in range(2):

            def norm(x, name):
                return F.layer_norm(x, (C,), w[f"h.{i}.{name}.weight"], w[f"h.{i}.{name}.bias"])

            q, k, v = (
                (norm(x, "ln_1") @ w[f"h.{i}.attn.c_attn.weight"].T + w[f"h.{i}.attn.c_attn.bias"])
                .view(T, 3, H, C // H)
                .permute(1, 2, 0, 3)
            )
            scores = q @ k.mT / math.sqrt(C if config is FIRST else C // H)
            x = x + (
                scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1) @ v
            ).transpose(0, 1).reshape(T, C)
            y = F.relu(
                norm(x, "ln_1" if config is FIRST else "ln_2") @ w[f"h.{i}.mlp.c_fc.weight"].T
                + w[f"h.{i}.mlp.c_fc.bias"]
            )
            y = y @ w[f"h.{i}.mlp.c_proj.weight"].T + w[f"h.{i}.mlp.c_proj.bias"]
            x = y if config is FIRST else x + y
        x = F.layer_norm(x, (C,), w["ln_f.weight"], w["ln_f.bias"])
        torch.testing.assert_close(
            model(idx)[0].double(),
            (x @ w["lm_head.weight"].T + w["lm_head.bias"])[:, :97],
            rtol=1e-5,
            atol=1e-5,
        )


def test_too_long():
    with pytest.raises(ValueError, match="block_size 32"):
        GPT(GPTConfig(**CLASSIC))(torch.zeros(1, 33, dtype=torch.long))


def test_a_window_by_hand():
    """One layer, against softmax over the last `window` tokens written out."""
    model = GPT(GPTConfig(**WINDOWED | dict(n_layer=1, n_head=1, n_embd=8, sliding_window=3))).double()
    idx, block, rope = (
        torch.randint(0, 97, (1, 9)),
        model.h[0],
        10000.0 ** (-torch.arange(0, 8, 2) / 8),
    )
    x = model.wte(idx[0])
    q, k, v = block.attn.c_attn(block.ln_1(x)).chunk(3, -1)
    angle = torch.arange(9)[:, None] * rope
    q, k = (
        torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)
        for a, b in (q.chunk(2, -1), k.chunk(2, -1))
    )
    said = torch.stack(
        [
            torch.softmax(q[i] @ k[max(0, i - 2) : i + 1].T / 8**0.5, -1) @ v[max(0, i - 2) : i + 1]
            for i in range(9)
        ]
    )
    x = x + block.attn.c_proj(said)
    x = model.ln_f(x + block.mlp(block.ln_2(x)))
    torch.testing.assert_close(
        model(idx)[0], (x @ model.wte.weight.T)[:, :97].float(), rtol=1e-5, atol=1e-6
    )
