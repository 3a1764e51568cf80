"""The model against slow, obvious computations."""

import math
import random

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from data.batch import batch_rows
from loss import sequence_logprobs
from model import GPT, Block, GPTConfig
from nanospin import attention
from nanospin.rotary import rotary_angles, rotary_frequencies
from sample import generate

CLASSIC = {"vocab_size": 97, "block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 32}
LLAMA = CLASSIC | {"position": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "bias": False}
MODERN = LLAMA | {"n_kv_head": 2, "tie_embeddings": False, "qk_norm": True, "logit_softcap": 5.0}
SQUARED = LLAMA | {"mlp": "relu2"}
WINDOWED = LLAMA | {"sliding_window": 7}
OLMO2 = LLAMA | {"norm_position": "after", "qk_norm": True, "qk_norm_over": "projection"}
NEOX = CLASSIC | {
    "position": "rotary",
    "rotary_dim": 4,
    "mlp": "gelu_erf",
    "parallel_residual": True,
}
SMOLLM3 = LLAMA | {"n_layer": 3, "no_rope_layer_interval": 2, "n_kv_head": 2}
GEMMA = LLAMA | {
    "n_layer": 3,
    "n_kv_head": 2,
    "mlp": "geglu",
    "norm_position": "both",
    "scale_embeddings": True,
    "sliding_window": 7,
    "full_attention_interval": 2,
    "rope_local_theta": 100.0,
    "attention_softcap": 0.7,
    "query_pre_attn_scalar": 5.0,
    "rope_scaling": [4.0, 1.0, 32.0, 12.0, 1.25],
    "rope_scaling_type": "yarn",
}
CONFIGS = {
    "classic": CLASSIC,
    "modern": MODERN,
    "squared": SQUARED,
    "windowed": WINDOWED,
    "olmo2": OLMO2,
    "neox": NEOX,
    "smollm3": SMOLLM3,
    "gemma": GEMMA,
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def model(request):
    return GPT(GPTConfig(**request.param)).eval()


def test_logprobs_are_the_log_softmax_of_the_logits(model):
    idx, targets = torch.randint(0, 97, (3, 20)), torch.randint(-1, 97, (3, 20))
    logits = model(idx)
    assert logits.shape == (3, 20, 97)  # without the padding of the vocabulary
    slow = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    slow = slow * (targets >= 0)
    torch.testing.assert_close(model(idx, targets), slow, rtol=1e-5, atol=1e-5)


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
    """Encoded rows of 1 to `most` responses: some absent, some of one token, some prompts empty."""
    rng = random.Random(seed)

    def ids(least):
        length = int(rng.uniform(least, longest ** rng.random() + 1))
        return [rng.randrange(97) for _ in range(length)]

    rows = []
    for _ in range(n):
        prompt = ids(0)
        responses = [ids(1)]
        for _ in range(rng.randrange(most)):
            responses.append(rng.choice([ids(1), ids(1), None]))
        ranks = list(range(len(responses)))
        rows.append({"prompt": prompt, "responses": responses, "ranks": ranks})
    return rows


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("max_queries, longest", [(128, 20), (32, 150), (128, 300)])
def test_packed_layout_equals_padded(config, dtype, tolerance, max_queries, longest, monkeypatch):
    """Sequence log-probabilities and every gradient, relative to the largest of a tensor; for
    rows that share a tile and rows that need several."""
    monkeypatch.setattr(attention, "TILE_QUERIES", max_queries)
    model = GPT(GPTConfig(**config | {"block_size": 2 * longest + 2})).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(3.0)  # at initialization attention is nearly uniform
    rows = random_rows(max_queries + longest, 9, longest, 4)
    results = {}
    for layout in ("padded", "packed"):
        batch = batch_rows(rows, layout)
        B, K = batch.response_mask.shape
        logps = model(batch.idx, batch.targets, **batch.layout())
        scores = sequence_logprobs(logps, batch.response_index, B * K).view(B, K)
        weights = torch.linspace(-1, 1, B * K).view(B, K).to(scores)
        grads = torch.autograd.grad((scores * weights).sum(), list(model.parameters()))
        results[layout] = [scores.detach(), *grads]
    for slow, fast in zip(results["padded"], results["packed"]):
        assert (slow - fast).abs().max() <= tolerance * slow.abs().max()


POSITIONS = {
    "none": [],
    "first": [0],
    "last": [59],
    "repeated": [7, 7, 3, 41],
    "all": list(range(60)),
}


@torch.no_grad()
@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS.keys())
def test_logit_positions_select_from_the_whole_output(model, positions):
    """In any order, repeated or none. The last block computes only these."""
    model.double()
    idx = torch.randint(0, 97, (3, 20))
    positions = torch.tensor(positions, dtype=torch.long)
    whole = model(idx).flatten(0, 1)[positions]
    torch.testing.assert_close(
        model(idx, logit_positions=positions), whole, rtol=0, atol=1e-6
    )  # logits are float32
    ascending = positions.unique()
    whole = model.hidden(idx).flatten(0, 1)[ascending]
    torch.testing.assert_close(
        model.hidden(idx, query_positions=ascending), whole, rtol=0, atol=1e-12
    )


@torch.no_grad()
def test_values_and_logps_of_one_pass_are_those_of_two():
    model = GPT(GPTConfig(**MODERN, scalar_head=True)).double().eval()
    idx, targets = torch.randint(0, 97, (3, 20)), torch.randint(0, 97, (3, 20))
    logit_positions = torch.tensor([5, 5, 30, 12])
    value_positions = torch.tensor([30, 2, 59])
    values = model.values(idx, value_positions)
    whole = model.scalars(model.hidden(idx).flatten(0, 1))
    torch.testing.assert_close(values, whole[value_positions], rtol=0, atol=1e-12)
    for options, chosen in (
        ({}, targets),
        ({"logit_positions": logit_positions}, targets.flatten()[logit_positions]),
    ):
        logps, again = model.logps_and_values(idx, chosen, value_positions, **options)
        torch.testing.assert_close(again, values, rtol=0, atol=1e-12)
        torch.testing.assert_close(logps, model(idx, chosen, **options), rtol=0, atol=1e-12)


def test_sequences_in_one_batch_do_not_see_each_other():
    model = GPT(GPTConfig(**MODERN)).eval()
    texts = [torch.randint(0, 97, (n,)) for n in (5, 11, 1, 14)]
    pos = torch.cat([torch.arange(len(text)) for text in texts])
    sequence_id = torch.cat([torch.full((len(text),), i) for i, text in enumerate(texts)])
    together = model(
        torch.cat(texts),
        pos=pos,
        sequence_id=sequence_id,
        response_id=torch.zeros_like(sequence_id),
    )
    alone = torch.cat([model(text[None])[0] for text in texts])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config, same", [(SQUARED, True), (CLASSIC, False)])
def test_rotary_positions_are_relative(config, same):
    """Shifting all positions by 9 changes nothing. With learned positions it does."""
    model = GPT(GPTConfig(**config)).eval()
    idx = torch.randint(0, 97, (1, 10))
    shifted = model.hidden(idx, pos=torch.arange(9, 19)[None])
    assert torch.allclose(model.hidden(idx), shifted, atol=1e-5) == same


@pytest.mark.parametrize("config", [CLASSIC, MODERN, GEMMA], ids=["classic", "modern", "gemma"])
def test_initialization_follows_its_table(config):
    """Within four standard errors, std / sqrt(2 n). Building on the meta device gives the same."""
    model = GPT(GPTConfig(**config | {"n_embd": 256}))
    num_scaled = 0
    for name, p in model.named_parameters():
        mean, std = model.init_mean_std(name, p.shape)
        is_norm = "norm" in name or ".ln_" in "." + name
        assert mean == (1.0 if is_norm and not name.endswith("bias") else 0.0), name
        assert abs(p.std().item() - std) <= 4 * std / math.sqrt(2 * p.numel()), name
        assert abs(p.mean().item() - mean) <= 4 * std / math.sqrt(p.numel()), name
        num_scaled += std == 0.02 / math.sqrt(2 * config["n_layer"])
    assert num_scaled == 2 * config["n_layer"]
    with torch.device("meta"):
        late = GPT(model.config)
    late.to_empty(device="cpu").init_weights()
    for a, b in zip(model.parameters(), late.parameters()):
        assert torch.equal(a, b)


def test_a_parameter_of_a_fork_needs_an_initial_value():
    """A gate that its module sets to 0 would be drawn from N(0, 0.02)."""

    class GatedBlock(Block):
        def __init__(self, config):
            super().__init__(config)
            self.gate = nn.Parameter(torch.zeros(config.n_embd))

    class Gated(GPT):
        def make_block(self, config):
            return GatedBlock(config)

    class WithValue(Gated):
        def init_mean_std(self, name, shape):
            return (0.0, 0.0) if name.endswith("gate") else super().init_mean_std(name, shape)

    with pytest.raises(ValueError, match="h.0.gate: give its initial mean and deviation in init_m"):
        Gated(GPTConfig(**CLASSIC))
    assert not WithValue(GPTConfig(**CLASSIC)).h[1].gate.any()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_sampling_with_the_cache_equals_the_full_forward(config):
    """Greedy, for prompts of several lengths, one of them shared by three rows."""
    model = GPT(GPTConfig(**config | {"block_size": 64, "tie_embeddings": False})).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    model.double()
    prompts = []
    for length in (1, 5, 12, 20, 20):
        prompts.append(torch.randint(0, 97, (length,), generator=generator).tolist())
    prompts += [prompts[2]] * 2
    sampled = generate(model, prompts, 30, temperature=0.0)
    for prompt, response in zip(prompts, sampled):
        idx = torch.tensor([prompt + response])
        with torch.no_grad():
            greedy = model(idx).argmax(-1)[0, len(prompt) - 1 : -1]
        assert response == greedy.tolist()
    assert len(set(sum(sampled, []))) > 10  # not one token again and again


def test_loss_at_initialization_is_about_uniform(model):
    idx = torch.randint(0, 97, (8, 32))
    assert abs(-model(idx, idx.roll(-1, 1)).mean().item() - math.log(97)) < 0.1


def test_gpt2_has_124m_parameters():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    padding = (model.config.padded_vocab_size - 50257) * 768
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
    "changes, message",
    [
        ({"n_head": 5}, "multiple of n_head"),
        ({"n_kv_head": 3}, "n_kv_head"),
        ({"n_kv_head": -1}, "n_kv_head"),
        ({"n_inner": -1}, "n_inner"),
        ({"mlp": "swish"}, "mlp must be"),
        ({"n_layer": 0}, "n_layer"),
        ({"rope_scaling": [8.0, 4.0, 1.0, 64.0]}, "low < high"),
        ({"rope_scaling": [8.0, 1.0, 4.0, 64.0, 1.0]}, "low < high"),
        ({"rope_scaling": [0.0], "rope_scaling_type": "linear"}, "rope_scaling must be"),
        ({"rope_scaling_type": "dynamic"}, "rope_scaling_type must be"),
        ({"position": "rotary", "n_embd": 20}, "even head_dim"),
        ({"rotary_dim": 3}, "rotary_dim must be even and at most head_dim 8"),
        ({"rotary_dim": 10}, "rotary_dim must be even and at most head_dim 8"),
        ({"sliding_window": -1}, "sliding_window"),
        ({"full_attention_interval": 3}, "full_attention_interval must be from 0 to n_layer"),
        ({"no_rope_layer_interval": -1}, "no_rope_layer_interval must be from 0 to n_layer"),
        ({"attention_softcap": -1.0}, "attention_softcap must not be negative"),
        ({"rope_local_theta": math.nan}, "rope_local_theta must be above 1"),
        ({"rope_theta": 0.0}, "rope_theta must be above 1"),
        ({"norm_position": "middle"}, "norm_position must be one of"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**CLASSIC | changes)


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match="block_size 32"):
        GPT(GPTConfig(**CLASSIC))(torch.zeros(1, 33, dtype=torch.long))


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_tiled_attention_has_the_gradients_of_a_softmax(softcap, monkeypatch):
    """Two heads, one of keys, against autograd; with a soft cap of the scores and without."""
    monkeypatch.setattr(attention, "TILE_QUERIES", 32)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(h, 70, 8, generator=generator).double() for h in (2, 1, 1))
    inputs = [3 * q, 3 * k, v]
    for x in inputs:
        x.requires_grad_()
    q, k, v = inputs
    tiles = attention.rectangular_tiles(1, 70, torch.float64)
    scores = q @ k.mT * 8**-0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    future = torch.ones(70, 70, dtype=torch.bool).triu(1)
    expected = scores.masked_fill(future, -math.inf).softmax(-1) @ v
    found = attention.TiledAttention.apply(q, k, v, tiles, softcap)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = torch.randn(expected.shape, generator=generator).double()
    slow = torch.autograd.grad((expected * weights).sum(), inputs)
    fast = torch.autograd.grad((found * weights).sum(), inputs)
    for a, b in zip(fast, slow):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_soft_cap_is_a_constant_of_the_compiled_kernel():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    score_mod = torch.compile(attention.softcap_score(2.5), dynamic=True, backend=backend)
    scores = torch.linspace(-9, 9, 7)
    torch.testing.assert_close(score_mod(scores, 0, 0, 0, 0), 2.5 * torch.tanh(scores / 2.5))
    assert attention.softcap_score(2.5) is attention.softcap_score(2.5)
    (graph,) = graphs
    assert ".item()" not in graph.code and "2.5" in graph.code


def test_rotary_scaling_by_hand():
    """yarn keeps a pair of many turns, divides one of few, and halves the way between them."""
    linear = GPTConfig(**LLAMA | {"rope_scaling": [4.0], "rope_scaling_type": "linear"})
    plain = rotary_frequencies(GPTConfig(**LLAMA), torch.device("cpu"))
    torch.testing.assert_close(plain, torch.tensor([1.0, 0.1, 0.01, 0.001]))
    torch.testing.assert_close(rotary_frequencies(linear, torch.device("cpu")), plain / 4)

    # 3,000 / 2 pi = 477 tokens a turn: 477, 47.7, 4.8 and 0.5 turns. 200 are at 0.38 and 2 at 2.38
    values = [4.0, 2.0, 200.0, 3000.0, 1.5]
    yarn = GPTConfig(**LLAMA | {"rope_scaling": values, "rope_scaling_type": "yarn"})
    kept = torch.tensor([1.0, 2 / 3, 1 / 3, 0.0])  # from 0 to 3
    expected = plain * (kept + (1 - kept) / 4)
    torch.testing.assert_close(rotary_frequencies(yarn, torch.device("cpu")), expected)
    values = [4.0, 1e-9, 4.0, 3000.0, 1.5]  # from 2 to 7, the number of dimensions minus 1
    edge = GPTConfig(**LLAMA | {"rope_scaling": values, "rope_scaling_type": "yarn"})
    kept = torch.tensor([1.0, 1.0, 1.0, 0.8])
    found = rotary_frequencies(edge, torch.device("cpu"))
    torch.testing.assert_close(found, plain * (kept + (1 - kept) / 4))

    cos, sin = rotary_angles(yarn, torch.tensor([0, 7]))
    torch.testing.assert_close(cos[1, 0], 1.5 * (7 * expected).cos())
    torch.testing.assert_close(sin[1, 0], 1.5 * (7 * expected).sin())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_residual_stream_keeps_its_dtype(config):
    """On a GPU it is bfloat16, and the norms' output float32, as autocast has it there."""
    block = GPT(GPTConfig(**config)).h[0]
    for norm in (block.ln_1, block.ln_1_post, block.ln_2, block.ln_2_post):
        if not isinstance(norm, nn.Identity):
            norm.register_forward_hook(lambda module, inputs, output: output.float())
    x, y = torch.randn(6, 32).bfloat16(), torch.randn(6, 4, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert block.after_attention(x, y).dtype == torch.bfloat16


def test_windows_and_positions_of_the_layers():
    config = GPTConfig(**GEMMA | {"n_layer": 5})
    assert [config.window(layer) for layer in range(5)] == [7, 0, 7, 0, 7]
    assert [GPTConfig(**WINDOWED).window(layer) for layer in range(2)] == [7, 7]

    angles = []
    model = GPT(config)
    for block in model.h:
        block.forward = lambda x, layout, layer, rope: angles.append(rope[0]) or x
    model(torch.zeros(1, 4, dtype=torch.long))
    full, local = (
        rotary_angles(config, torch.arange(4)),
        rotary_angles(config, torch.arange(4), True),
    )
    unscaled = 3 * 100.0 ** (-torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(local[0][3, 0], unscaled.cos())
    torch.testing.assert_close(local[1][3, 0], unscaled.sin())
    for layer, found in enumerate(angles):
        assert torch.equal(found, (full if layer % 2 else local)[0])

    with_positions = []
    model = GPT(GPTConfig(**SMOLLM3))
    for block in model.h:
        block.forward = lambda x, layout, layer, rope: with_positions.append(rope is not None) or x
    model(torch.zeros(1, 4, dtype=torch.long))
    assert with_positions == [True, False, True]


def test_a_block_with_other_norms_and_residuals_by_hand():
    """OLMo 2's norms are after attention and MLP; GPT-NeoX's MLP has the input of attention; Gemma
    scales embeddings and queries."""
    gemma = GPT(GPTConfig(**GEMMA))
    idx = torch.tensor([3, 1])
    torch.testing.assert_close(gemma.embed(idx, idx), 32**0.5 * gemma.wte.weight[idx])
    x = torch.randn(6, 32, dtype=torch.float64)
    y = torch.randn(6, 4, 8, dtype=torch.float64)
    for config in (OLMO2, NEOX, GEMMA):
        block = GPT(GPTConfig(**config)).double().h[0]
        with torch.no_grad():
            for p in block.parameters():
                p.add_(0.2 * torch.randn_like(p))
        attended = block.attn.c_proj(y.flatten(1))
        if config is NEOX:
            inner = F.gelu(block.mlp.c_fc(block.ln_2(x)))
            expected = x + attended + block.mlp.c_proj(inner)
        else:
            middle = x + block.ln_1_post(attended)
            norm = block.ln_2 if config is GEMMA else nn.Identity()
            gate, up = block.mlp.c_fc(norm(middle)).chunk(2, -1)
            act = F.gelu(gate, approximate="tanh") if config is GEMMA else F.silu(gate)
            expected = middle + block.ln_2_post(block.mlp.c_proj(act * up))
        torch.testing.assert_close(block.after_attention(x, y), expected, rtol=0, atol=1e-12)
        first = block.ln_1 if config is not OLMO2 else nn.Identity()
        q, _, _ = block.before_attention(x)
        expected = block.attn.c_attn(first(x))[:, :32]
        if config is OLMO2:  # over all heads together
            root = (expected.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            expected = block.attn.q_norm.weight * expected / root
        if config is GEMMA:
            expected = expected * (8 / 5) ** 0.5
        torch.testing.assert_close(q.flatten(1), expected, rtol=0, atol=1e-12)


def test_a_sliding_window_by_hand():
    """One layer, against a softmax over the last 3 tokens."""
    changes = {"n_layer": 1, "n_head": 1, "n_embd": 8, "sliding_window": 3}
    model = GPT(GPTConfig(**WINDOWED | changes)).double()
    idx, block = torch.randint(0, 97, (1, 9)), model.h[0]
    x = model.wte(idx[0])
    q, k, v = block.attn.c_attn(block.ln_1(x)).chunk(3, -1)

    angle = torch.arange(9)[:, None] * 10000.0 ** (-torch.arange(0, 8, 2) / 8)

    def rotate(x):
        a, b = x.chunk(2, -1)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    q, k = rotate(q), rotate(k)
    y = []
    for i in range(9):
        window = slice(max(0, i - 2), i + 1)
        y.append(torch.softmax(q[i] @ k[window].T / 8**0.5, -1) @ v[window])
    x = x + block.attn.c_proj(torch.stack(y))
    x = model.ln_f(x + block.mlp(block.ln_2(x)))
    expected = (x @ model.wte.weight.T)[:, :97].float()
    torch.testing.assert_close(model(idx)[0], expected, rtol=1e-5, atol=1e-6)
