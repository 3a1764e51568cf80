from nanospin.kv_cache import GROUP
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map

from nanospin import attention
import sample
from nanospin.kv_cache import KVCache
from conftest import command
from model import GPT, GPTConfig
from sample import sample_token, generate, prepacked_weights
from test_model import CLASSIC, MODERN, WINDOWED


def slow_generate(model, prompt, n, eot):
    """Greedy, one prompt, no cache, the whole text again for each token."""
    ids = list(prompt)
    while len(ids) - len(prompt) < n and len(ids) < model.config.block_size:
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        if ids[-1] == eot:
            break
    return ids[len(prompt) :]


def far_from_ties(config):
    model = GPT(GPTConfig(**config)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(
                4.0
            ) if p.dim() == 2 else None  # so are the likely tokens, and what a token is depends on those before it
    return model


@pytest.fixture(params=[CLASSIC, MODERN, WINDOWED], ids=["classic", "modern", "windowed"])
def model(request):
    return far_from_ties(request.param)


def ragged(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, 97, (int(torch.randint(1, 20, (), generator=g)),), generator=g).tolist()
        for _ in range(n)
    ]


@torch.no_grad()
def test_cached_ragged_greedy_equals_one_at_a_time_without_cache(model):
    prompts = ragged(13) + [[5], [1] * 31]  # one token; and room for one
    free = generate(model, prompts, 20, temperature=0)
    eot = free[0][3]  # a token that does come up, so that some end early and some do not
    fast = generate(model, prompts, 20, temperature=0, eot=eot, batch_size=6)
    assert fast == [slow_generate(model, p, 20, eot) for p in prompts]
    assert any(y[-1] == eot and len(y) < 20 for y in fast) and any(eot not in y for y in fast)
    assert all(eot not in y[:-1] for y in fast)
    assert len(fast[-1]) == 1


def test_a_seed_fixes_the_output_whatever_the_batch(model):
    prompts = ragged(40)

    def run(batch_size, seed=7, **options):
        return generate(
            model,
            prompts,
            12,
            temperature=0.9,
            top_k=50,
            top_p=0.95,
            eot=3,
            generator=torch.Generator().manual_seed(seed),
            batch_size=batch_size,
            **options,
        )

    together = run(32)
    assert together == run(1) == run(40)
    assert together != run(32, seed=8)
    some = [5, 17, 39]  # a request's number, not its place, decides
    alone = generate(
        model,
        [prompts[i] for i in some],
        12,
        temperature=0.9,
        top_k=50,
        top_p=0.95,
        eot=3,
        generator=torch.Generator().manual_seed(7),
        numbers=some,
    )
    assert alone == [together[i] for i in some]


@torch.no_grad()
@pytest.mark.parametrize(
    "config", [CLASSIC, MODERN, WINDOWED], ids=["classic", "modern", "windowed"]
)
def test_a_cache_that_grows_says_what_whole_texts_say(config, monkeypatch):
    """Rows of unlike lengths in groups of two, through several sizes of the cache, then dealt anew: in float64, a few hundred roundings of 2^-53."""
    monkeypatch.setitem(GROUP, "cpu", 2)
    model = GPT(GPTConfig(**config | {"block_size": 160})).double().eval()
    lengths = [1, 31, 32, 70]
    texts = torch.randint(0, 97, (4, 160), generator=torch.Generator().manual_seed(0))
    expected = model.hidden(texts)
    prefilled, cache = KVCache(lengths), KVCache()
    model.hidden(texts[:, :70], cache=prefilled)  # what stands behind a row's end is not seen
    cache.rebuild([(prefilled, b) for b in range(4)], lengths)
    rows = list(range(4))
    for t in range(80):
        if t == 40:  # row 1 has left, the others change places
            again, rows = KVCache(), [0, 2, 3]
            again.rebuild([(cache, b) for b in rows], [lengths[b] + t for b in rows])
            cache = again
        pos = torch.tensor([lengths[b] + t for b in rows])
        torch.testing.assert_close(
            model.hidden(texts[rows, pos], pos=pos, cache=cache),
            expected[rows, pos],
            rtol=0,
            atol=1e-12,
        )


@torch.no_grad()
def test_requests_of_many_lengths_come_and_go(model):
    """More requests than rows, each with its own limit, some prompts equal: as if each were alone."""
    prompts = ragged(30, seed=3) * 2
    limits = [1 + (7 * i) % 12 for i in range(60)]
    together = generate(model, prompts, limits, temperature=0, batch_size=8)
    assert [len(y) for y in together] == limits
    assert together == [slow_generate(model, p, n, None) for p, n in zip(prompts, limits)]
    drawn = generate(model, [[1, 2, 3]] * 50, 6, generator=torch.Generator().manual_seed(0))
    assert (
        len(set(map(tuple, drawn))) > 10
    )  # equal prompts are read once, and drawn each for itself


@pytest.mark.parametrize("burst", [1, 3, 16])
def test_looking_less_often_changes_nothing(model, burst, monkeypatch):
    """As on a GPU, where several tokens are drawn between two looks at who has ended."""
    prompts = ragged(20, seed=4) + [[1] * 31]
    expected = generate(model, prompts, 11, temperature=0, batch_size=8, eot=7)
    monkeypatch.setitem(sample.BURST, "cpu", burst)
    assert generate(model, prompts, 11, temperature=0, batch_size=8, eot=7) == expected


def recorded(work):
    """What a CUDA graph is to a GPU: all that a step does to tensors, recorded on copies of its own, and done again on those. Numbers that
    Python would have changed from step to step are what they were."""
    step = work.__self__

    def put(ids, pos, t, column, k, v):
        step.ids, step.pos, step.t, step.cache.column, step.cache.k, step.cache.v = (
            ids,
            pos,
            t,
            column,
            k,
            v,
        )
        work()

    mine = step.ids, step.pos, step.t, step.cache.column, step.cache.k, step.cache.v
    with torch.no_grad():
        graph = make_fx(put)(*tree_map(torch.clone, mine))
    step.ids, step.pos, step.t, step.cache.column, step.cache.k, step.cache.v = mine
    said = {str(node.target) for node in graph.graph.nodes}
    assert not [
        name
        for name in said
        if any(waits in name for waits in ("_local_scalar_dense", "nonzero", "lift_fresh"))
    ], "a graph cannot look at values, or fetch them"

    def replay():
        recorded.replays += 1
        graph(*mine)

    return replay


@pytest.mark.parametrize(
    "config", [CLASSIC, MODERN, WINDOWED], ids=["classic", "modern", "windowed"]
)
@pytest.mark.parametrize(
    "options",
    [dict(temperature=0), dict(temperature=0.9, top_k=50, top_p=0.95)],
    ids=["greedy", "sampled"],
)
def test_a_step_recorded_once_is_every_step(config, options, monkeypatch):
    """As a GPU's CUDA graphs need it; through growth and regrouping, several tokens between two looks."""
    model = far_from_ties(
        config | {"block_size": 100}
    ).double()  # in float64 weights are not packed
    prompts, limits = ragged(14, seed=5), [3 + (11 * i) % 60 for i in range(14)]

    def run():
        return generate(
            model,
            prompts,
            limits,
            eot=7,
            batch_size=6,
            generator=torch.Generator().manual_seed(1),
            **options,
        )

    expected, recorded.replays = run(), 0
    monkeypatch.setattr(sample, "GRAPHS", {"cpu"})
    monkeypatch.setattr(sample, "captured", recorded)
    monkeypatch.setitem(sample.BURST, "cpu", 8)
    assert run() == expected
    assert recorded.replays > 50


@pytest.mark.parametrize("ended", [True, False])
def test_a_step_that_no_graph_can_hold(model, ended, monkeypatch, capsys):
    """Sampling goes on without, unless the capture could not be ended: its stream stays the current one then."""

    class Capture:
        def __init__(self, *args, **options):
            pass

        def __enter__(self):
            raise RuntimeError("not permitted\nwhy")

        def __exit__(self, *_):
            pass

    streams = iter(["own", "own" if ended else "capture's"])
    for name, fake in (
        ("CUDAGraph", object),
        ("graph", Capture),
        ("current_stream", lambda: next(streams)),
    ):
        monkeypatch.setattr(torch.cuda, name, fake)
    prompts = ragged(5)
    expected = generate(model, prompts, 9, temperature=0)
    monkeypatch.setattr(sample, "GRAPHS", {"cpu"})
    if not ended:
        with pytest.raises(RuntimeError, match="not permitted"):
            generate(model, prompts, 9, temperature=0)
        return
    assert generate(model, prompts, 9, temperature=0) == expected
    assert capsys.readouterr().err == "sampling goes on without CUDA graphs (not permitted)\n"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("products", [None, torch.bfloat16])
def test_a_gpus_graphs_say_what_its_steps_say(model, products, monkeypatch):
    model.cuda().products = products
    prompts, limits = ragged(14, seed=5), [3 + (5 * i) % 12 for i in range(14)]

    def run():
        return generate(
            model, prompts, limits, eot=7, batch_size=6, generator=torch.Generator().manual_seed(1)
        )

    expected = run()
    assert sample.GRAPHS == {"cuda"}, "none could be made"
    monkeypatch.setattr(sample, "GRAPHS", set())
    assert run() == expected


def test_draw_has_the_distribution():
    """Frequencies of 200,000 draws within five standard errors; top_k, top_p and padded ids leave nothing outside."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    many = logits.expand(len(uniform), -1)
    for options, kept in (
        (dict(), 5),
        (dict(temperature=0.5), 5),
        (dict(top_k=2), 2),
        (dict(top_p=0.9), 3),
        (dict(top_p=0.01), 1),
    ):
        probs = (logits / options.get("temperature", 1.0)).softmax(-1)
        probs[kept:] = 0
        probs /= probs.sum()
        found = torch.bincount(sample_token(many, uniform, **options), minlength=5) / len(uniform)
        assert (found[kept:] == 0).all()
        assert ((found - probs).abs() <= 5 * (probs * (1 - probs) / len(uniform)).sqrt()).all()
    assert sample_token(many[:1], uniform[:1], temperature=0).item() == 0


def test_draw_is_the_inverse_of_the_cumulative_distribution():
    """300 ids, of which the first and the last 100 have no probability, in sums of two levels: what float64 finds in one, up to
    roundings of the uniform's own size, and never one of those 200."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(300, generator=g) * 3
    logits[:100] = logits[200:] = -torch.inf
    uniform = torch.cat(
        [
            torch.rand(20_000, generator=g, dtype=torch.float64),
            torch.tensor([0.0, 1 - 2**-53, 1 - 2**-24], dtype=torch.float64),
        ]
    )
    cdf = logits.double().softmax(-1).cumsum(-1)
    found = sample_token(logits.expand(len(uniform), -1), uniform)
    assert 100 <= found.min() and found.max() < 200
    for near in (-1e-6, 1e-6):
        at_edge = torch.searchsorted(cdf, (uniform + near).clamp(0, 1 - 1e-12), right=True)
        assert ((found - at_edge) * (1 if near < 0 else -1) >= 0).all()


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [CLASSIC, MODERN, dict(CLASSIC, tie_embeddings=False, head_bias=True)],
    ids=["classic", "modern", "head_bias"],
)
@pytest.mark.parametrize("products, tolerance", [(None, 1e-5), (torch.bfloat16, 2**-6)])
def test_packed_weights_make_the_same_logits(config, products, tolerance):
    """Relative to the largest logit; two roundings of bfloat16 differ by up to 2^-7 of each of a few layers' outputs. Then the model is as it was."""
    model = GPT(GPTConfig(**config)).eval()
    for p in model.parameters():
        p.add_(
            0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        )  # no bias is zero
    model.products = products
    idx = torch.randint(0, 97, (5, 20), generator=torch.Generator().manual_seed(1))
    plain, precision = model(idx), torch.get_float32_matmul_precision()
    with (
        prepacked_weights(model, 5),
        torch.autocast("cpu", torch.bfloat16, enabled=products is not None),
    ):
        made = model(idx)
        assert "head" in model.__dict__ and all(
            "forward" in block.attn.c_attn.__dict__ for block in model.h
        )
    assert (made - plain).abs().max() <= tolerance * plain.abs().max()
    with pytest.raises(KeyboardInterrupt), prepacked_weights(model, 5):
        raise KeyboardInterrupt
    assert torch.equal(model(idx), plain) and torch.get_float32_matmul_precision() == precision
    model.products = None
    with prepacked_weights(model.double(), 5):  # left alone
        assert "head" not in model.__dict__


def test_no_id_from_the_padding():
    model = GPT(GPTConfig(**CLASSIC)).eval()
    with torch.no_grad():
        model.wte.weight[97:] = (
            100 * model.wte.weight[:1].sign()
        )  # the padding would win if it could
    out = generate(
        model, [[1, 2]] * 50, 8, temperature=5.0, generator=torch.Generator().manual_seed(0)
    )
    assert max(max(y) for y in out) < 97


def test_bad_requests(model):
    with pytest.raises(ValueError, match="prompt 1"):
        generate(model, [[1], []], 5)
    with pytest.raises(ValueError, match="prompt 0"):
        generate(model, [[1] * 32], 5)
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(model, [[1]], 0)
    assert generate(model, [], 5) == []


def test_command_line(tiny_runs, tiny_data, tmp_path):
    def run(*args, **kw):
        return command("sample", tiny_runs["sft"], *args, **kw)

    one = run("--prompt", "0 the loss", "--max_new_tokens", "8")
    assert one.returncode == 0, one.stderr
    chat = run("--chat", "--max_new_tokens", "8", input="0 the loss\n\nmodel\n")
    assert chat.returncode == 0 and chat.stdout.startswith(one.stdout), chat.stderr
    out = tmp_path / "samples.jsonl"
    many = run("--prompts", f"{tiny_data}/val.jsonl", "--out", str(out))
    assert many.returncode == 0 and "12 rows" in many.stdout, many.stderr
    from data.rows import read_rows

    assert all(
        len(row["ids"][0]) <= 16 for row in read_rows(str(out))
    )  # the checkpoint's max_response
    assert len(chat.stdout) > len(one.stdout)
    for bad in (
        run("--prompt", "a", "--temperature=-1"),
        run("--prompt", "a", "--device=tpu"),
        run("--prompt", " "),
        run("--prompts", "nothing.jsonl", "--out", str(out)),
        run("--prompts", str(out)),
    ):
        assert bad.returncode != 0 and "Traceback" not in bad.stderr


def test_a_chat_without_standard_input_is_one_line(tiny_runs, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(SystemExit) as e:
        sample.main([tiny_runs["sft"], "--chat"])
    assert e.value.code == "--chat reads from standard input, and that is closed"
