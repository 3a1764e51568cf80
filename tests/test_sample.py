"""Batched generation against one prompt at a time without a cache; sampling against its
distribution."""

import functools
import json
import os

import pytest
import torch
from conftest import TEMPLATE, Killed, command, killing
from test_model import CLASSIC, MODERN, WINDOWED
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map

import sample
import train
from data.rows import read_rows
from model import GPT, GPTConfig
from nanospin import decoding
from nanospin.decoding import prepacked_weights
from sample import generate, sample_token
from studies.taylor.model import TaylorGPT, TaylorGPTConfig

CONFIGS = {"classic": CLASSIC, "modern": MODERN, "windowed": WINDOWED}


def slow_generate(model, prompt, n, eot):
    """Greedy, one prompt, no cache: the whole sequence again for each token."""
    ids = list(prompt)
    while len(ids) - len(prompt) < n and len(ids) < model.config.block_size:
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        if ids[-1] == eot:
            break
    return ids[len(prompt) :]


def far_from_ties(config):
    """A model whose likeliest tokens are clear and depend on the tokens before."""
    model = GPT(GPTConfig(**config)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(4.0)
    return model


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def model(request):
    return far_from_ties(request.param)


def random_prompts(n, seed=0):
    """n prompts of 1 to 19 tokens."""
    g = torch.Generator().manual_seed(seed)
    prompts = []
    for _ in range(n):
        length = int(torch.randint(1, 20, (), generator=g))
        prompts.append(torch.randint(0, 97, (length,), generator=g).tolist())
    return prompts


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# ---- generate


@torch.no_grad()
def test_cached_ragged_greedy_equals_one_prompt_at_a_time_without_cache(model):
    prompts = random_prompts(13) + [[5], [1] * 31]  # a single token; room for a single token
    free = generate(model, prompts, 20, temperature=0)
    eot = free[0][3]  # a token that occurs, so that some responses end early
    fast = generate(model, prompts, 20, temperature=0, eot=eot, batch_size=6)
    assert fast == [slow_generate(model, prompt, 20, eot) for prompt in prompts]
    assert any(ids[-1] == eot and len(ids) < 20 for ids in fast)
    assert any(eot not in ids for ids in fast)
    assert all(eot not in ids[:-1] for ids in fast)
    assert len(fast[-1]) == 1


def test_samples_depend_on_the_seed_but_not_on_the_batch(model):
    prompts = random_prompts(40)
    options = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "eot": 3}

    def run(batch_size, seed=7):
        return generate(
            model, prompts, 12, **options, generator=seeded(seed), batch_size=batch_size
        )

    together = run(32)
    assert together == run(1) == run(40)
    assert together != run(32, seed=8)
    some = [5, 17, 39]  # the request's id decides, not its place in the list
    alone = generate(
        model,
        [prompts[i] for i in some],
        12,
        **options,
        generator=seeded(7),
        request_ids=some,
    )
    assert alone == [together[i] for i in some]


@torch.no_grad()
def test_requests_of_many_lengths_come_and_go(model):
    """More requests than rows, each with its own limit, some prompts equal: as if each were
    alone."""
    prompts = random_prompts(30, seed=3) * 2
    limits = [1 + (7 * i) % 12 for i in range(60)]
    together = generate(model, prompts, limits, temperature=0, batch_size=8)
    assert [len(ids) for ids in together] == limits
    assert together == [slow_generate(model, p, n, None) for p, n in zip(prompts, limits)]


def test_equal_prompts_are_sampled_independently(model):
    """They are prefilled once."""
    samples = generate(model, [[1, 2, 3]] * 50, 6, generator=seeded(0))
    assert len({tuple(ids) for ids in samples}) > 10


@pytest.mark.parametrize("batch_size", [7, 60])
def test_samples_do_not_depend_on_sharing(model, batch_size):
    """Five samples of each prompt, together, equal those of five calls with different prompts.
    Requests of one prompt join the batch at different times, and end at different times."""
    prompts = random_prompts(12, seed=6)
    assert len(set(map(tuple, prompts))) == 12
    repeated = []
    for prompt in prompts:
        repeated += [prompt] * 5
    options = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "eot": 3}
    together = generate(model, repeated, 12, **options, generator=seeded(7), batch_size=batch_size)
    assert len(set(map(len, together))) > 3
    for k in range(5):
        alone = generate(
            model, prompts, 12, **options, generator=seeded(7), request_ids=range(k, 60, 5)
        )
        assert together[k::5] == alone


@torch.no_grad()
def test_greedy_samples_of_equal_prompts_equal_whole_sequences(model):
    """Requests of the same prompts with different limits come and go."""
    prompts = random_prompts(6, seed=8) * 7
    limits = [1 + (5 * i) % 13 for i in range(42)]
    together = generate(model, prompts, limits, temperature=0, batch_size=9)
    assert together == [slow_generate(model, p, n, None) for p, n in zip(prompts, limits)]


def test_equal_prompts_count_once_in_a_prefill():
    requests = sample.make_requests([[1]] * 20 + [[2, 3]] * 10 + [[4, 5, 6]] * 3, 5, 32)
    sizes = [len(group) for group in sample.prefill_groups(requests, 8)]
    assert sizes == [30, 3]


@pytest.mark.parametrize("burst", [1, 3, 16])
def test_checking_for_ends_less_often_changes_nothing(model, burst, monkeypatch):
    """On a GPU several tokens are sampled between two checks."""
    prompts = random_prompts(20, seed=4) + [[1] * 31]
    expected = generate(model, prompts, 11, temperature=0, batch_size=8, eot=7)
    monkeypatch.setitem(sample.BURST, "cpu", burst)
    assert generate(model, prompts, 11, temperature=0, batch_size=8, eot=7) == expected


def test_no_id_from_the_padding_of_the_vocabulary():
    model = GPT(GPTConfig(**CLASSIC)).eval()
    with torch.no_grad():  # the padding would win if it could
        model.wte.weight[97:] = 100 * model.wte.weight[:1].sign()
    samples = generate(model, [[1, 2]] * 50, 8, temperature=5.0, generator=seeded(0))
    assert max(max(ids) for ids in samples) < 97


def test_bad_requests(model):
    with pytest.raises(ValueError, match="prompt 1"):
        generate(model, [[1], []], 5)
    with pytest.raises(ValueError, match="prompt 0"):
        generate(model, [[1] * 32], 5)
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(model, [[1]], 0)
    assert generate(model, [], 5) == []


# ---- CUDA graphs


def tensors_of(step):
    return step.ids, step.pos, step.num_sampled, step.cache.column, step.cache.k, step.cache.v


def set_tensors(step, tensors):
    step.ids, step.pos, step.num_sampled, step.cache.column, step.cache.k, step.cache.v = tensors


def record_on_cpu(work):
    """What capture_cuda_graph does, on a CPU: record the tensor operations of a step on copies, and
    replay them. Python numbers that change from step to step would keep their first value."""
    step = work.__self__

    def traced(*tensors):
        set_tensors(step, tensors)
        work()

    original = tensors_of(step)
    with torch.no_grad():
        graph = make_fx(traced)(*tree_map(torch.clone, original))
    set_tensors(step, original)
    for node in graph.graph.nodes:
        for reads_a_value in ("_local_scalar_dense", "nonzero", "lift_fresh"):
            assert reads_a_value not in str(node.target), "a CUDA graph cannot do this"

    def replay():
        record_on_cpu.replays += 1
        graph(*original)

    return replay


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize(
    "options",
    [{"temperature": 0}, {"temperature": 0.9, "top_k": 50, "top_p": 0.95}],
    ids=["greedy", "sampled"],
)
def test_a_recorded_step_can_be_replayed(config, options, monkeypatch):
    """Through growth and regrouping, with several tokens between two checks for ends."""
    # float64, because prepacked weights cannot be traced
    model = far_from_ties(config | {"block_size": 100}).double()
    prompts = random_prompts(14, seed=5)
    prompts[5:9] = [prompts[4]] * 4  # five requests share a prompt
    limits = [3 + (11 * i) % 60 for i in range(14)]

    def run():
        return generate(model, prompts, limits, eot=7, batch_size=6, generator=seeded(1), **options)

    expected = run()
    record_on_cpu.replays = 0
    monkeypatch.setattr(decoding, "GRAPHS", {"cpu"})
    monkeypatch.setattr(decoding, "capture_cuda_graph", record_on_cpu)
    monkeypatch.setitem(sample.BURST, "cpu", 8)
    assert run() == expected
    assert record_on_cpu.replays > 50


@pytest.mark.parametrize("ended", [True, False])
def test_a_failed_capture(model, ended, monkeypatch, capsys):
    """Sampling continues without graphs, unless the capture could not be ended: then its stream is
    still the current one."""

    class FailingCapture:
        def __init__(self, *args, **options):
            pass

        def __enter__(self):
            raise RuntimeError("not permitted\nwhy")

        def __exit__(self, *_):
            pass

    streams = iter(["own", "own" if ended else "capture's"])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", FailingCapture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: next(streams))
    prompts = random_prompts(5)
    expected = generate(model, prompts, 9, temperature=0)
    monkeypatch.setattr(decoding, "GRAPHS", {"cpu"})
    if ended:
        assert generate(model, prompts, 9, temperature=0) == expected
        assert capsys.readouterr().err == "sampling without CUDA graphs (not permitted)\n"
    else:
        with pytest.raises(RuntimeError, match="not permitted"):
            generate(model, prompts, 9, temperature=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_cuda_graphs_sample_what_eager_steps_sample(model, dtype, monkeypatch):
    model.cuda().autocast_dtype = dtype
    prompts = random_prompts(14, seed=5)
    limits = [3 + (5 * i) % 12 for i in range(14)]

    def run():
        return generate(model, prompts, limits, eot=7, batch_size=6, generator=seeded(1))

    expected = run()
    assert decoding.GRAPHS == {"cuda"}, "the capture failed"
    monkeypatch.setattr(decoding, "GRAPHS", set())
    assert run() == expected


# ---- sample_token


@pytest.mark.parametrize(
    "options, num_possible",
    [
        ({}, 5),
        ({"temperature": 0.5}, 5),
        ({"top_k": 2}, 2),
        ({"top_p": 0.9}, 3),
        ({"top_p": 0.01}, 1),
    ],
)
def test_sample_token_has_the_distribution(options, num_possible):
    """Frequencies of 200,000 samples, within five standard errors."""
    n = 200_000
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])
    uniform = torch.rand(n, generator=seeded(0), dtype=torch.float64)
    probs = (logits / options.get("temperature", 1.0)).softmax(-1)
    probs[num_possible:] = 0
    probs /= probs.sum()
    ids = sample_token(logits.expand(n, -1), uniform, **options)
    found = torch.bincount(ids, minlength=5) / n
    assert (found[num_possible:] == 0).all()
    assert ((found - probs).abs() <= 5 * (probs * (1 - probs) / n).sqrt()).all()


def test_temperature_0_is_greedy():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert sample_token(logits, torch.tensor([0.999]), temperature=0).item() == 1


def test_sample_token_inverts_the_cumulative_distribution():
    """300 ids, the first and last 100 of probability 0. Against float64: equal up to float32
    rounding of the uniform number, and never an id of probability 0."""
    g = seeded(0)
    logits = torch.randn(300, generator=g) * 3
    logits[:100] = logits[200:] = -torch.inf
    extremes = torch.tensor([0.0, 1 - 2**-53, 1 - 2**-24], dtype=torch.float64)
    uniform = torch.cat([torch.rand(20_000, generator=g, dtype=torch.float64), extremes])
    cdf = logits.double().softmax(-1).cumsum(-1)
    found = sample_token(logits.expand(len(uniform), -1), uniform)
    assert 100 <= found.min() and found.max() < 200
    least = torch.searchsorted(cdf, (uniform - 1e-6).clamp(0, 1 - 1e-12), right=True)
    most = torch.searchsorted(cdf, (uniform + 1e-6).clamp(0, 1 - 1e-12), right=True)
    assert (least <= found).all() and (found <= most).all()


# ---- prepacked weights


def head_bias_model():
    write_up = {"write_up": "later", "position": "sinusoidal", "mlp": "relu"}
    return TaylorGPT(TaylorGPTConfig(**CLASSIC | write_up | {"tie_embeddings": False}))


MODELS = {
    "classic": lambda: GPT(GPTConfig(**CLASSIC)),
    "modern": lambda: GPT(GPTConfig(**MODERN)),
    "head_bias": head_bias_model,
}


@torch.no_grad()
@pytest.mark.parametrize("make_model", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("dtype, tolerance", [(None, 1e-5), (torch.bfloat16, 2**-6)])
def test_prepacked_weights_give_the_same_logits(make_model, dtype, tolerance):
    """Relative to the largest logit: bfloat16 rounds by up to 2^-7 in each of a few layers.
    Afterwards the model is as it was."""
    model = make_model().eval()
    for p in model.parameters():
        p.add_(0.05 * torch.randn(p.shape, generator=seeded(0)))  # no bias is 0
    model.autocast_dtype = dtype
    idx = torch.randint(0, 97, (5, 20), generator=seeded(1))
    plain = model(idx)
    precision = torch.get_float32_matmul_precision()
    with prepacked_weights(model, 5), model.autocast(idx.device):
        prepacked = model(idx)
        assert "head" in model.__dict__
        assert all("forward" in block.attn.c_attn.__dict__ for block in model.h)
    assert (prepacked - plain).abs().max() <= tolerance * plain.abs().max()

    with pytest.raises(KeyboardInterrupt), prepacked_weights(model, 5):
        raise KeyboardInterrupt
    assert torch.equal(model(idx), plain)
    assert torch.get_float32_matmul_precision() == precision


def test_float64_is_not_prepacked():
    model = GPT(GPTConfig(**CLASSIC)).double()
    with prepacked_weights(model, 5):
        assert "head" not in model.__dict__


# ---- the command line


def test_command_line(tiny_runs, tiny_data, tmp_path):
    def run(*args, **options):
        return command("sample", tiny_runs["sft"], *args, **options)

    one = run("--prompt", "0 the loss", "--max_new_tokens", "8")
    assert one.returncode == 0, one.stderr
    chat = run("--chat", "--max_new_tokens", "8", input="0 the loss\n\nmodel\n")
    assert chat.returncode == 0 and chat.stdout.startswith(one.stdout), chat.stderr
    assert len(chat.stdout) > len(one.stdout)
    out = str(tmp_path / "samples.jsonl")
    many = run("--prompts", f"{tiny_data}/val.jsonl", "--out", out)
    assert many.returncode == 0 and "12 rows" in many.stdout, many.stderr
    assert all(len(row["ids"][0]) <= 16 for row in read_rows(out))  # the run's max_response


def test_prompts_without_responses(tiny_runs, tmp_path):
    """Rows with a prompt are enough; what is cut, or has no room, is counted."""
    path, out = tmp_path / "prompts.jsonl", str(tmp_path / "samples.jsonl")
    rows = [
        {"prompt": "the loss", "group": "g", "history": [["a", "b"]]},
        {"prompt": "model", "chosen": "c", "rejected": "d"},
        {"prompt": "x" * 90},  # max_prompt is block_size: it is not cut
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = command("sample", tiny_runs["sft"], "--prompts", path, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "2 rows, 1 prompts left no room" in done.stdout
    sampled = read_rows(out)
    assert [row["prompt"] for row in sampled] == ["the loss", "model"]
    assert sampled[0]["history"] == [["a", "b"]] and sampled[0]["group"] == "g"

    path.write_text(json.dumps({"text": "a whole text"}) + "\n" + json.dumps(rows[2]) + "\n")
    done = command("sample", tiny_runs["sft"], "--prompts", path, "--out", f"{tmp_path}/none.jsonl")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "1 of its 2 rows are whole texts, and 1 prompts leave no room" in done.stderr
    assert not (tmp_path / "none.jsonl").exists()
    for row in sampled:
        assert row["ended"] == (row["ids"][0][-1] == 256)

    path.write_text('{"question": "a"}\n')
    done = command("sample", tiny_runs["sft"], "--prompts", path, "--out", out)
    assert done.returncode == 1
    assert "has no prompt; it has question" in done.stderr


def prompts_file(path, n):
    """Rows of prompts alone, one of which leaves no room."""
    rows = [{"prompt": f"{i} the"} for i in range(n)]
    rows.insert(2, {"prompt": "x" * 90})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_several_samples_of_each_prompt(tiny_runs, tmp_path):
    """Rows of one prompt follow each other and differ. The same seed gives the same samples."""
    path = prompts_file(tmp_path / "prompts.jsonl", 5)
    outs = [f"{tmp_path}/{name}.jsonl" for name in "ab"]
    for out in outs:
        done = command("sample", tiny_runs["sft"], "--prompts", path, "--out", out, "--n", 3)
        assert done.returncode == 0, done.stderr
        assert "15 rows, 3 for each prompt, 1 prompts left no room" in done.stdout
    rows = read_rows(outs[0])
    assert [row["prompt"] for row in rows[::3]] == [f"{i} the" for i in range(5)]
    assert [row["prompt"] for row in rows[::3]] == [row["prompt"] for row in rows[2::3]]
    assert len({str(row["ids"]) for row in rows}) == 15
    assert read_rows(outs[1]) == rows
    assert not list(tmp_path.glob("*.partial"))

    one = command("sample", tiny_runs["sft"], "--prompt", "0 the", "--n", 2, "--max_new_tokens", 4)
    assert one.returncode == 0, one.stderr
    assert command("sample", tiny_runs["sft"], "--chat", "--n", 2).returncode == 1


def test_a_killed_file_of_samples_continues(tiny_runs, tmp_path, monkeypatch):
    """What had ended is kept, also if the last line was cut short, and is not sampled again. The
    file is that of a run that was not killed."""
    path, out = prompts_file(tmp_path / "prompts.jsonl", 9), tmp_path / "samples.jsonl"
    partial = tmp_path / "samples.jsonl.partial"
    args = [tiny_runs["sft"], "--prompts", path, "--n", 2, "--temperature=0.9"]
    command("sample", *args, "--out", tmp_path / "whole.jsonl")

    monkeypatch.setattr(sample, "generate", functools.partial(generate, batch_size=4))
    add = sample.PartialSamples.add
    monkeypatch.setattr(sample.PartialSamples, "add", killing(add, 7))
    with pytest.raises(Killed):
        command("sample", *args, "--out", out)
    assert not out.exists()
    kept = [json.loads(line) for line in partial.read_text().splitlines()[1:]]
    assert len(kept) == 7

    with open(partial, "a", encoding="utf-8") as f:
        f.write('{"sample": 3, "te')
    sampled = []

    def add_and_note(self, number, *more):
        sampled.append(number)
        add(self, number, *more)

    monkeypatch.setattr(sample.PartialSamples, "add", add_and_note)
    done = command("sample", *args, "--out", out, "--seed=1")
    assert done.returncode == 1 and "is of other prompts or settings" in done.stderr
    done = command("sample", *args, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "7 of 18 samples are there" in done.stdout
    assert len(sampled) == 11 and not set(sampled) & {line["sample"] for line in kept}
    rows = read_rows(out)
    assert rows == read_rows(tmp_path / "whole.jsonl")
    prompts = [f"{i} the" for i in range(2)] + ["no room"] + [f"{i} the" for i in range(2, 9)]
    for line in kept:
        number = line["sample"]
        place = number - 2 * (number > 4)  # in the file, which has no row of the third prompt
        assert rows[place]["prompt"] == prompts[number // 2]
        assert (rows[place]["responses"], rows[place]["ids"]) == ([line["text"]], [line["ids"]])
    assert not partial.exists()


@pytest.mark.parametrize(
    "content", ["mine", "[]\n", "not JSON\n", '{"of": 1}\n', '{"of": "x"}\n{"sample": 1}\n']
)
def test_a_partial_file_of_something_else_is_left_alone(tiny_runs, tmp_path, content):
    path, out = prompts_file(tmp_path / "prompts.jsonl", 3), tmp_path / "samples.jsonl"
    partial = tmp_path / "samples.jsonl.partial"
    partial.write_text(content)
    done = command("sample", tiny_runs["sft"], "--prompts", path, "--out", out)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "samples.jsonl.partial is of other prompts" in done.stderr
    assert partial.read_text() == content and not out.exists()


@pytest.mark.parametrize(
    "args, message",
    [
        (["--prompt", "a", "--temperature=-1"], "must be at least 0"),
        (["--prompt", "a", "--temperature=hot"], "must be a number"),
        (["--prompt", "a", "--top_p=1.5"], "must be at most 1"),
        (["--prompt", "a", "--device=tpu"], "must be cpu, or cuda"),
        (["--prompt", " "], "the prompt is empty"),
        (["--prompts", "nothing.jsonl", "--out", "samples.jsonl"], "No such file"),
        (["--prompts", "nothing.jsonl"], "go together"),
        (["--prompt", "a", "--out", "nowhere/samples.jsonl"], "go together"),
        (["--chat", "--prompt", "a"], "not allowed with"),
        ([], "is required"),
        (["--prompt", "a", "\x1b[31m"], r"unrecognized arguments: \x1b[31m"),
    ],
)
def test_bad_arguments_are_one_line(tiny_runs, args, message):
    found = command("sample", tiny_runs["sft"], *args)
    assert found.returncode != 0 and not found.stdout
    assert message in found.stderr and found.stderr.count("\n") == 1


def test_a_chat_goes_on_after_thoughts_of_a_model_without(tiny_runs, monkeypatch):
    model, enc, _ = GPT.from_checkpoint(tiny_runs["sft"])
    prompts = []

    def generate(model, asked, *args, **options):
        prompts.append(enc.decode(asked[0]))
        return [[*b"a</think>b", enc.eot_token]]

    monkeypatch.setattr(sample, "generate", generate)
    sample.chat(model, enc, "{prompt}A{response|thoughts}.", ["x", "y"])
    assert prompts == ["xA", "xAb.yA"]


def test_a_chat_without_standard_input_is_one_line(tiny_runs, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(SystemExit) as e:
        sample.main([tiny_runs["sft"], "--chat"])
    assert e.value.code == "--chat reads from standard input, and that is closed"


def test_samples_killed_before_the_first_line_begin_again(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killing(os.fsync, 0))  # the line is written, not yet in place
        with pytest.raises(Killed):
            sample.PartialSamples(f"{tmp_path}/x.jsonl", "hash")
    assert not os.path.exists(f"{tmp_path}/x.jsonl.partial")
    partial = sample.PartialSamples(f"{tmp_path}/x.jsonl", "hash")
    partial.add(0, "a", [97])
    partial.file.close()
    assert sample.PartialSamples(f"{tmp_path}/x.jsonl", "hash").ids == {0: [97]}


def test_a_prompt_that_is_cut_is_said(tiny_runs, tiny_data, tmp_path):
    run = f"{tmp_path}/run"
    options = [f"--init={tiny_runs['pretrain']}", f"--data={tiny_data}", f"--template={TEMPLATE}"]
    options += ["--max_prompt=24", "--max_response=16", "--max_steps=1", "--device=cpu"]
    train.main(["--stage=sft", f"--out_dir={run}", *options])
    for prompt, is_cut in (("a", False), ("many words " * 50, True)):
        done = command("sample", run, "--prompt", prompt, "--max_new_tokens", 4)
        assert done.returncode == 0, done.stderr
        assert ("the prompt is cut" in done.stderr) == is_cut
