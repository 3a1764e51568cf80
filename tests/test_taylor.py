"""The T_n study: its model, token losses, evaluation, list of runs and report."""

import glob
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import WORDS, command, read_metrics

from data import tokenizer
from data.batch import batch_rows
from data.folder import write_meta
from data.rows import check_row, encode_rows, write_rows
from loss import taylor_nll
from model import GPT, GPTConfig
from nanospin import config
from studies.taylor import analysis, cut_bpe, train
from studies.taylor.calibration import (
    annotate_seen_tokens,
    calibration_metrics,
    expected_calibration_error,
    fit_temperature,
    predict_tokens,
    reliability_curve,
)
from studies.taylor.losses import count_units, focal_nll, smoothed_nll, token_objective
from studies.taylor.model import TaylorGPT, TaylorGPTConfig
from studies.taylor.run import Study, check_texts

SMALL = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=32", "--device=cpu"]
SHAPE = {"vocab_size": 97, "block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 32}
LATER = {
    "write_up": "later",
    "position": "sinusoidal",
    "mlp": "relu",
    "tie_embeddings": False,
    "init_noise": 0.1,
}
FIRST = LATER | {"write_up": "first"}


def texts(folder):
    """A data folder of whole texts in bytes; many of a group have the same beginning."""
    rows = []
    for i in range(80):
        post = i // 4
        text = f"post {post} about {WORDS[post % 12]}\n\ncomment {i} {WORDS[i % 7]}"
        rows.append({"text": text, "group": f"{post}"})
    write_rows(f"{folder}/train.jsonl", rows[:48] + rows[50:64])
    write_rows(f"{folder}/val.jsonl", rows[48:50] + rows[64:])
    write_meta(str(folder), "bytes", "made up", train_rows=62, val_rows=18)
    return str(folder)


# ---------------------------------------------------------------------------------- the model


def test_defaults_are_the_shared_gpt():
    """Same names, same weights from the same seed, same outputs."""
    shared, taylor = GPT(GPTConfig(**SHAPE)), TaylorGPT(TaylorGPTConfig(**SHAPE))
    weights = shared.state_dict()
    assert list(weights) == list(taylor.state_dict())
    for name, value in taylor.state_dict().items():
        assert torch.equal(value, weights[name]), name
    idx = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(taylor(idx), shared(idx))


def write_up_logits(weights, idx, num_heads, version):
    """The write-up's model for one text idx (T,), from the facts in studies/taylor/README.md."""
    wte = weights["wte.weight"]
    T, d = len(idx), wte.shape[1]
    positions = torch.zeros(T, d)
    for t in range(T):
        for i in range(d):
            angle = t * 100 ** (-i / d)
            positions[t, i] = math.sin(angle) if i % 2 == 0 else math.cos(angle)
    x = wte[idx] + positions

    layer = 0
    while f"h.{layer}.ln_1.weight" in weights:
        of_layer = {}
        for name, value in weights.items():
            if name.startswith(f"h.{layer}."):
                of_layer[name.removeprefix(f"h.{layer}.")] = value
        x = write_up_layer(of_layer, x, num_heads, version)
        layer += 1
    return x @ weights["lm_head.weight"].T + weights["lm_head.bias"]


def write_up_layer(weights, x, num_heads, version):
    T, d = x.shape

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name, x):
        centered = x - x.mean(1, keepdim=True)
        scaled = centered / (centered.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def mlp(x):
        return linear("mlp.c_proj", linear("mlp.c_fc", x).clamp(min=0))

    q, k, v = linear("attn.c_attn", x).chunk(3, dim=1)
    heads = []
    width = d // num_heads
    for h in range(num_heads):
        channels = slice(h * width, (h + 1) * width)
        scores = q[:, channels] @ k[:, channels].T
        scores = scores / math.sqrt(d if version == "first" else width)
        in_future = torch.arange(T)[None, :] > torch.arange(T)[:, None]
        heads.append(scores.masked_fill(in_future, -math.inf).softmax(1) @ v[:, channels])
    attended = torch.cat(heads, 1)  # no output projection
    x = norm("ln_1", x + attended)
    if version == "first":
        return norm("ln_1", mlp(x))
    return norm("ln_2", x + mlp(x))


@pytest.mark.parametrize("shape", [LATER, FIRST], ids=["later", "first"])
@pytest.mark.parametrize("layers", [1, 2])
@torch.no_grad()
def test_the_write_ups_model(shape, layers):
    """Logits and log-probabilities to 1e-5 of the logits' size."""
    model = TaylorGPT(TaylorGPTConfig(**SHAPE | {"n_layer": layers}, **shape))
    idx = torch.randint(0, 97, (23,), generator=torch.Generator().manual_seed(1))
    expected = write_up_logits(model.state_dict(), idx, 4, shape["write_up"])[:, :97]
    assert expected.std() > 0.1
    torch.testing.assert_close(model(idx[None])[0], expected, rtol=1e-5, atol=1e-5)
    targets = idx.roll(-1)
    logps = expected.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(model(idx[None], targets[None])[0], logps, rtol=1e-5, atol=1e-5)


def test_initialization_follows_its_table():
    """Matrices: Glorot's, q, k, v as one. Norm weights: variance 1 / n_embd. And the noise."""
    for shape in (LATER, FIRST):
        model = TaylorGPT(TaylorGPTConfig(**SHAPE | {"n_embd": 256}, **shape))
        for name, p in model.named_parameters():
            variance = 0.01
            if p.dim() == 2:
                variance += 2 / sum(p.shape)
            elif "ln_" in name and name.endswith("weight"):
                variance += 1 / 256
            n = p.numel()
            assert abs(p.mean()) < 5 * math.sqrt(variance / n), name
            assert abs(p.var() / variance - 1) < 5 * math.sqrt(2 / n), name
    quiet = TaylorGPT(TaylorGPTConfig(**SHAPE | {"n_embd": 64}, **LATER | {"init_noise": 0.0}))
    assert not quiet.lm_head.bias.any()
    assert quiet.h[0].attn.c_attn.weight.std().item() == pytest.approx(0.0884, rel=0.03)


def test_texts_as_the_write_up_feeds_them():
    eot, text = 96, list(range(1, 33))
    later, first = (TaylorGPTConfig(**SHAPE, **shape) for shape in (LATER, FIRST))
    assert train.as_fed(text, eot, later) == text
    assert train.as_fed([5, 6, eot], eot, later) == [5, 6]
    assert train.as_fed(text, eot, first) == text[:23] + [eot] * 9
    assert train.as_fed([5, 6, eot], eot, first) == [5, 6] + [eot] * 30


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize(
    "setting, loss_of",
    [
        ({"taylor_order": 0.0}, lambda logps: -logps),
        ({"taylor_order": 2.0}, lambda logps: taylor_nll(logps, 2.0)),
        ({"focal": 2.0}, lambda logps: -((1 - logps.exp()) ** 2) * logps),
    ],
)
def test_the_write_ups_loss_is_a_mean_of_rows(setting, loss_of, layout):
    """Of the mean over the tokens of each row; a short row counts as much as a long one."""
    model = TaylorGPT(TaylorGPTConfig(**SHAPE, **LATER))
    texts = [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11]]
    rows = [{"prompt": [], "responses": [text], "ranks": [0]} for text in texts]
    cfg = train.TaylorConfig(stage="sft", model=LATER, **setting)
    batch = batch_rows(rows, layout)
    loss, _ = token_objective(model, batch, cfg)
    assert count_units(batch, cfg) == 2

    means = []
    for text in texts:
        logits = write_up_logits(model.state_dict(), torch.tensor(text), 4, "later")[:-1, :97]
        logps = logits.log_softmax(-1).gather(1, torch.tensor(text)[1:, None])[:, 0]
        means.append(loss_of(logps).mean())
    torch.testing.assert_close(loss, sum(means), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tie_embeddings": True}, "needs tie_embeddings = False"),
        ({"head_dim": 4}, "needs head_dim = 8"),
        ({"mlp": "gelu"}, "needs mlp = 'relu'"),
        ({"position": "learned"}, "needs position = 'sinusoidal'"),
        ({"init_noise": -0.1}, "init_noise"),
        ({"write_up": "last"}, "write_up must be one of , first, later"),
        ({"position": "none"}, "position must be one of learned, rotary, sinusoidal"),
    ],
)
def test_model_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        TaylorGPTConfig(**SHAPE | LATER | changes)


# --------------------------------------------------------------------------------- the losses


def test_smoothed_nll_against_torch():
    logits = 2 * torch.randn(40, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(40) % 7
    plain = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(smoothed_nll(logits, targets), plain)
    smooth = F.cross_entropy(logits, targets, reduction="none", label_smoothing=0.2)
    torch.testing.assert_close(smoothed_nll(logits, targets, 0.2), smooth, rtol=1e-12, atol=1e-12)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    penalized = smoothed_nll(logits, targets, 0.0, 0.3)
    torch.testing.assert_close(penalized, plain - 0.3 * entropy, rtol=1e-12, atol=1e-12)


def test_focal_nll():
    logps = -torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    p = logps.exp()
    torch.testing.assert_close(focal_nll(logps, 2.0), -((1 - p) ** 2) * logps)
    torch.testing.assert_close(focal_nll(logps, 0.0), -logps)

    # the gradient is that of T_gamma plus gamma (1 - p)^(gamma - 1) p log p
    logps.requires_grad_()
    (focal,) = torch.autograd.grad(focal_nll(logps, 2.0).sum(), logps)
    (taylor,) = torch.autograd.grad(taylor_nll(logps, 2.0).sum(), logps)
    extra = 2 * (1 - p) * p * logps.detach()
    torch.testing.assert_close(focal, taylor + extra, rtol=1e-10, atol=1e-12)

    certain = torch.zeros(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(focal_nll(certain, 0.5).sum(), certain)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    "loss",
    [
        "--focal=2",
        "--token_label_smoothing=0.1",
        "--confidence_penalty=0.2",
        "--taylor_order=1",
        "--taylor_order=0",
    ],
)
def test_each_token_loss_learns(loss, tmp_path):
    """Validation loss falls, calibration is measured, micro-batches do not change the loss."""
    args = ["studies/taylor/config/clean.py", f"--data={texts(tmp_path)}", *SMALL]
    args += ["--max_steps=12", "--batch_size=8", "--lr=1e-2", "--eval_interval=6", loss]
    train.main([*args, f"--out_dir={tmp_path}/run"])
    train.main([*args, f"--out_dir={tmp_path}/parts", "--micro_batch_tokens=64"])
    evals = read_metrics(f"{tmp_path}/run", "eval")
    assert [r["step"] for r in evals] == [0, 6, 12]
    assert evals[-1]["val_loss"] < evals[0]["val_loss"] - 1
    names = {"loss_t/0", "temperature/1", "seen_loss", "new_loss", "entropy_wrong", "reliability"}
    assert names | {"ece", "ece_t"} <= set(evals[-1])
    whole = [r["loss"] for r in read_metrics(f"{tmp_path}/run", "step")]
    parts = [r["loss"] for r in read_metrics(f"{tmp_path}/parts", "step")]
    assert whole == pytest.approx(parts, rel=1e-4)


@pytest.mark.parametrize("name", ["clean", "first", "later"])
def test_every_config_of_the_study_shrunk_runs(name, tmp_path):
    args = [f"studies/taylor/config/{name}.py", f"--data={texts(tmp_path)}", *SMALL]
    args += ["--max_steps=3", "--eval_interval=2", f"--out_dir={tmp_path}/run", "--dtype=float32"]
    train.main(args)
    steps = read_metrics(f"{tmp_path}/run", "step")
    assert len(steps) == 3
    assert all(math.isfinite(r["loss"]) for r in steps)
    last = read_metrics(f"{tmp_path}/run", "eval")[-1]
    if name == "first":  # padding is fed and its labels count
        assert last["padded_loss"] == pytest.approx(last["val_loss"])


def test_the_write_ups_denominator(tmp_path):
    """The sum over the tokens of the texts, divided by all positions; without calibration."""
    args = ["studies/taylor/config/later.py", f"--data={texts(tmp_path)}", *SMALL]
    args += ["--max_steps=2", "--eval_interval=2", "--block_size=64", "--eval_rows=18"]
    train.main([*args, f"--out_dir={tmp_path}/run", "--fit_temperature=False"])
    train.main([*args, f"--out_dir={tmp_path}/fitted"])
    last = read_metrics(f"{tmp_path}/run", "eval")[-1]
    lengths = []
    for line in open(f"{tmp_path}/val.jsonl"):
        lengths.append(len(json.loads(line)["text"]) - 1)  # bytes
    assert max(lengths) < 63
    expected = last["val_loss"] * sum(lengths) / (18 * 63)
    assert last["padded_loss"] == pytest.approx(expected)
    fitted = read_metrics(f"{tmp_path}/fitted", "eval")[-1]
    assert "ece" in fitted and "ece" not in last
    for name in ("val_loss", "padded_loss", "seen_loss", "new_loss", "seen_share", "new_tokens"):
        assert last[name] == pytest.approx(fitted[name], rel=1e-5), name


@pytest.mark.parametrize(
    "args, message",
    [
        (["--focal=1", "--taylor_order=1"], "taylor_order and focal are different token losses"),
        (["--token_label_smoothing=0.1", "--confidence_penalty=1"], "set one"),
        (["--token_label_smoothing=0.5"], "in [0, 0.5)"),
        (["--label_smoothing=0.1"], "token_label_smoothing"),
        (["--focal=-1"], "focal must not be negative"),
        (["--stage=spin", "--init=x"], "stage sft and pretrain, not spin"),
        (["--stage=pretrain", "--write_up=later"], "needs stage sft"),
        (["--calibration=True"], "unknown setting 'calibration'"),
        (["--taylor_order=21"], "at most 20"),
    ],
)
def test_settings_are_checked(args, message):
    with pytest.raises(SystemExit) as error:
        train.main(["studies/taylor/config/clean.py", *args])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------- the evaluation


def slow_predictions(model, rows, temperature):
    """Token by token, float64: (logp of the target, highest probability, correct, entropy)."""
    found = []
    for row in rows:
        ids = row["prompt"] + row["responses"][0]
        logps = (model(torch.tensor([ids]))[0].double() / temperature).log_softmax(-1)
        for t in range(max(1, len(row["prompt"])), len(ids)):
            before = logps[t - 1]
            p = before.exp()
            entropy = -(p * before).sum().item()
            correct = float(p.argmax() == ids[t])
            found.append((before[ids[t]].item(), p.max().item(), correct, entropy))
    return np.array(found).T


@torch.no_grad()
def test_calibration_token_by_token(tiny_runs):
    """Every metric against loops over single tokens; the temperature against a grid."""
    model, enc, _ = GPT.from_checkpoint(tiny_runs["pretrain"])
    data = [{"text": "the model reads " * 2 + f"{i} and stops"} for i in range(6)]
    data.append({"prompt": "Q", "responses": ["the loss falls", "no"]})
    rows, _ = encode_rows([check_row(row, "") for row in data], enc, "<{prompt}>", 64)
    for i, row in enumerate(rows):
        row["half"], row["seen"] = i % 2, 9 * (i % 3)
    device = torch.device("cpu")

    for temperature in (1.0, 2.5):
        fast = predict_tokens(model, rows, 50, device, temperature)
        slow = slow_predictions(model, rows, temperature)
        for values, expected in zip(vars(fast).values(), slow, strict=False):
            np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)
    grid = [2 ** (i / 4) for i in range(-8, 12)]
    lowest = min(-slow_predictions(model, rows, t)[0].mean() for t in grid)
    fitted = fit_temperature(model, rows, 50, device)
    assert -slow_predictions(model, rows, fitted)[0].mean() <= lowest + 1e-6

    metrics = calibration_metrics(model, rows, 50, device)
    logp, confidence, correct, entropy = slow_predictions(model, rows, 1.0)
    half, seen = [], []
    for row in rows:
        for t in range(max(1, len(row["prompt"])), len(row["prompt"] + row["responses"][0])):
            half.append(row["half"])
            seen.append(t < row["seen"])
    half, seen = np.array(half), np.array(seen)
    temperatures = []
    for h in (0, 1):
        rows_of_half = [row for row in rows if row["half"] == h]
        temperatures.append(fit_temperature(model, rows_of_half, 50, device))
    at = [slow_predictions(model, rows, t) for t in temperatures]
    expected = {
        "val_loss": -logp.mean(),
        "acc": correct.mean(),
        "seen_loss": -logp[seen].mean(),
        "new_loss": -logp[~seen].mean(),
        "seen_share": seen.mean(),
        "new_tokens": (~seen).sum(),
        "entropy": entropy.mean(),
        "entropy_wrong": entropy[correct == 0].mean(),
    }
    for h in (0, 1):
        expected |= {
            f"tokens/{h}": (half == h).sum(),
            f"loss/{h}": -logp[half == h].mean(),
            f"temperature/{h}": temperatures[h],
            f"fitted_loss/{h}": -at[h][0][half == h].mean(),
            f"loss_t/{h}": -at[1 - h][0][half == h].mean(),
        }
        assert metrics[f"fitted_loss/{h}"] < min(metrics[f"loss/{h}"], metrics[f"loss_t/{h}"])
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4), name
    crossed = [np.where(half == 0, at[1][k], at[0][k]) for k in (1, 2)]
    ece = expected_calibration_error(reliability_curve(*crossed))
    assert metrics["ece_t"] == pytest.approx(ece, rel=1e-3)


def test_calibration_error_by_hand():
    confidence = np.array([0.05, 0.06, 0.9, 1.0, 0.95])
    curve = reliability_curve(confidence, np.array([0, 1, 1, 1, 0]))
    assert [n for _, _, n in curve] == [2, 1, 2]
    assert curve[0][:2] == [pytest.approx(0.055), 0.5]
    assert curve[2][:2] == [pytest.approx(0.975), 0.5]
    assert expected_calibration_error(curve) == pytest.approx((2 * 0.445 + 0.1 + 2 * 0.475) / 5)


def test_seen_tokens_and_halves():
    def row(ids, group):
        return {"prompt": [], "responses": [ids], "group": group}

    training = [row([1, 2, 3, 4], "a"), row([1, 2, 5], "a")]
    val = [row([1, 2, 3, 9, 9], "b"), row([7], "c"), row([1, 2, 5], "d"), row([8], "e")]
    annotate_seen_tokens(training, val)
    assert [r["seen"] for r in val] == [3, 0, 3, 0]
    groups = [row([8], f"{i // 3}") for i in range(60)]
    annotate_seen_tokens(training, groups)
    for i in range(0, 60, 3):
        assert groups[i]["half"] == groups[i + 1]["half"] == groups[i + 2]["half"]

    # split by row: the most new tokens first, dealt 0 1 1 0
    val = [row([9] * n, "a") for n in (1, 4, 3, 2)]
    annotate_seen_tokens(training, val)
    assert [r["half"] for r in val] == [0, 0, 1, 1]
    with pytest.raises(SystemExit, match="all 1 validation rows are in one half"):
        annotate_seen_tokens(training, [row([9], "z")])


# ------------------------------------------------------------------------- runs and report


def study_runs(name, full=False):
    return getattr(Study("out/x", "data/x", "out/demo", full), f"{name}_runs")()


def test_every_run_of_the_study_has_valid_settings():
    counts = {}
    kinds = [("main", False), ("main", True), ("map", False), ("original", False), ("play", False)]
    for name, full in kinds:
        runs = study_runs(name, full)
        counts[name, full] = len(runs)
        assert len({run.name for run in runs}) == len(runs)
        for run in runs:
            module, *args = run.command
            assert (
                args[-1] == f"--out_dir=out/x/{run.name}" or f"--out_dir=out/x/{run.name}" in args
            )
            if module == "studies.taylor.train":
                cfg = config.load(args, TaylorGPTConfig, train.TaylorConfig)
            else:
                cfg = config.load(args, GPTConfig)
            method, seed = run.name.split("/")[2:]
            assert cfg.seed == int(seed)
            if method.startswith("T_"):
                assert cfg.taylor_order == float(method[2:])
    assert counts == {
        ("main", False): 54,
        ("main", True): 120,
        ("map", False): 12,
        ("original", False): 4,
        ("play", False): 21,
    }


def test_the_list_of_commands():
    done = command("studies.taylor.run", "main", "--list", "--ranked=../x/threads.jsonl.gz")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "data.shp.prepare ../x/threads.jsonl.gz" in lines[0]
    assert "--out=data/shp/threads/small" in lines[0]
    assert len(lines) == 56
    done = command("studies.taylor.run", "original", "--list", "--ranked=../x/threads.jsonl.gz")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "studies.taylor.cut_bpe data/shp/threads/uncut/row" in lines[1]
    assert len(lines) == 7
    done = command("studies.taylor.run", "map", "--full")
    assert done.returncode != 0 and "map has no --full" in done.stderr


def write_study(folder):
    """Made-up runs. The halves, of 100 and 300 tokens, are best at steps 10 and 20. At the last
    step T_1 is better than T_0 by 0.5 +- 0.04."""
    settings = {
        ("later", "row"): ["T_0", "T_1", "T_2"],
        ("later", "group"): ["T_0", "T_1"],
        ("map_lr", "row"): ["T_0", "T_1", "T_2"],
        ("original", "row"): ["T_0", "T_2"],
        ("clean", "group"): ["T_0", "T_1", "T_10", "dropout"],
        ("spin", "group"): ["T_0", "T_1"],
    }
    for (setting, split), methods in settings.items():
        for method in methods:
            for seed in (1, 2, 3):
                run = f"{folder}/{setting}/{split}/{method}/{seed}"
                os.makedirs(run)
                with open(f"{run}/config.json", "w") as f:
                    json.dump({"config": {"data_source": "made up"}}, f)
                with open(f"{run}/metrics.jsonl", "w") as f:
                    for record in made_up_evaluations(setting, method, seed):
                        f.write(json.dumps(record) + "\n")


def made_up_evaluations(setting, method, seed):
    gain = {"T_1": 0.5 + 0.04 * (seed - 2), "T_2": 0.52}.get(method, 0.0)
    last = 4.0 - gain
    for step, loss, halves in (
        (0, 5.0, (5.0, 5.0)),
        (10, 3.0, (1.0, 4.0)),
        (20, 3.5, (2.0, 3.0)),
        (30, last, (last, last)),
    ):
        record = {"kind": "eval", "round": 0, "step": step, "val_loss": loss, "acc": 0.5}
        if setting == "spin":
            record |= {"rank_nll": 0.6, "kl_from_ref": 0.0, "reward/data": 0.1, "reward/self": -0.1}
            yield record
            continue
        record |= {
            "padded_loss": 0.5 * loss,
            "seen_loss": 1.1 if method == "T_2" else 1.0,
            "new_loss": 4.3 if method == "T_2" else 5.0,
            "seen_share": 0.75,
            "new_tokens": 40.0,
            "entropy_wrong": 1.0,
            "ece": 0.1,
            "ece_t": 0.05,
            "reliability": [[0.1, 0.2, 15], [0.9, 0.8, 5]],
        }
        for h in (0, 1):
            record |= {
                f"loss/{h}": halves[h],
                f"fitted_loss/{h}": halves[1 - h],
                f"loss_t/{h}": halves[h] + 0.1,
                f"temperature/{h}": 1.5,
                f"tokens/{h}": (100.0, 300.0)[h],
            }
        yield record


def report(*args):
    return command("studies.taylor.analysis", *args)


def test_the_report(tmp_path):
    """Each half is measured where the other stops; differences are paired by seed."""
    write_study(f"{tmp_path}/runs")
    done = report(f"{tmp_path}/runs", f"{tmp_path}/out")
    assert done.returncode == 0, done.stderr
    text = open(f"{tmp_path}/out/report.md").read()
    assert "Data: made up." in text
    # half 0 stops at 10, where half 1 has 4; half 1 stops at 20, where half 0 has 2
    early = (300 * 4.0 + 100 * 2.0) / 400
    # at their own temperatures they stop at 20 and at 10
    fitted = (300 * 3.1 + 100 * 1.1) / 400
    assert f"| T_0 | 4.0000 ± 0 | {early:.4f} ± 0 | 4.1000 ± 0 | {fitted:.4f} ± 0 |" in text
    assert "| 15 ± 0 | 1.50 ± 0 |" in text
    error = 4.303 * 0.04 / math.sqrt(3)
    assert f"| T_1 | **-0.5000 ± {error:.4f}** | +0.0000 ± 0.0000 |" in text
    assert "| dropout | +0.0000 ± 0.0000 |" in text
    assert text.index("| T_1 | **") < text.index("| T_10 | +0.0000")
    pattern = "| later | 30 | 3.000 ± 0 | 10 ± 0 | 4.000 ± 0 | 3.500 ± 0.04 | 3.480 ± 0 |"
    assert pattern + " 3 | 3 | 3 | 2 | 3 |" in text
    assert "## map_lr" not in text
    # 0.1 more on seen tokens, 0.7 less on new ones: even at 0.1 / 0.8
    assert "| map_lr | 2 | 25.00 | 1.00 | 1.10 | 5.00 | 4.30 | 12.50 | -0.520 |" in text
    assert f"3.5000 (-0.5000 ± {error:.4f})" in text.split("## spin: round 0")[1]
    assert "padding too, is 0.5000, 0.5000, 0.5000 of this." in text
    original = text.split("## original")[1]
    assert "| row | T_2 | 0.1 | 1.500 | 0.0 | 1.740 | 3.480 | 1.100 | 4.300 | 25.00 |" in original
    for name in [*analysis.FIGURES, "original"]:
        assert open(f"{tmp_path}/out/figures/{name}.png", "rb").read(4) == b"\x89PNG"
        assert os.path.exists(f"{tmp_path}/out/figures/{name}.svg")

    # again from the copied logs
    os.remove(f"{tmp_path}/out/report.md")
    done = report(f"{tmp_path}/out/logs", f"{tmp_path}/out")
    assert done.returncode == 0, done.stderr
    assert open(f"{tmp_path}/out/report.md").read() == text

    # logs of other runs are not mixed with these
    shutil.copytree(f"{tmp_path}/runs", f"{tmp_path}/others")
    shutil.rmtree(f"{tmp_path}/others/later")
    done = report(f"{tmp_path}/others", f"{tmp_path}/out")
    assert done.returncode == 1 and "is not an earlier copy of" in done.stderr
    assert os.path.isdir(f"{tmp_path}/out/logs/later")
    assert report(f"{tmp_path}/runs", f"{tmp_path}/out").returncode == 0

    # without the main runs
    for setting in ("later", "clean"):
        shutil.rmtree(f"{tmp_path}/out/logs/{setting}")
    assert report(f"{tmp_path}/out/logs", f"{tmp_path}/less").returncode == 0
    figures = {os.path.basename(path) for path in glob.glob(f"{tmp_path}/less/figures/*")}
    assert figures == {"original.png", "original.svg"}


def test_an_incomplete_study_is_refused(tmp_path):
    write_study(f"{tmp_path}/runs")
    path = f"{tmp_path}/runs/clean/group/dropout/2/metrics.jsonl"
    first_line = open(path).readline()
    with open(path, "w") as f:
        f.write(first_line)
    for args, message in (
        ([f"{tmp_path}/runs", f"{tmp_path}/out"], "clean/group: a run is missing or unfinished"),
        ([f"{tmp_path}/nothing", f"{tmp_path}/x"], "no runs SETTING"),
        (["x"], "usage: python -m studies.taylor.analysis"),
    ):
        done = report(*args)
        assert done.returncode == 1 and message in done.stderr, done.stderr


def test_reliability_curves_are_pooled_by_their_tokens():
    curves = [[[0.1, 0.2, 20], [0.9, 1.0, 9]], [[0.12, 0.5, 10], [0.95, 0.0, 20]]]
    ((confidence, correct),) = analysis.pool_reliability(curves)
    assert confidence == pytest.approx(3.2 / 30)
    assert correct == pytest.approx(9 / 30)


def test_the_committed_report_follows_from_the_committed_logs():
    folder = os.path.dirname(analysis.__file__)
    study = analysis.read_study(f"{folder}/logs")
    text = analysis.report_text(study, analysis.data_sources(f"{folder}/logs"))
    assert open(f"{folder}/report.md", encoding="utf-8").read() == text


def test_cut_bpe(tmp_path):
    """The beginnings of the texts have the same tokens; their ids are in the same order."""
    texts = [f"{' '.join(WORDS)}, number {i}" for i in range(3)]
    whole = tokenizer.train([*texts, "lower slower tower power shower " * 9], 340)
    cut = cut_bpe.cut(whole, texts)
    assert 256 < cut.n_vocab < whole.n_vocab
    new_ids = {}
    for text in texts:
        before, after = whole.encode_ordinary(text), cut.encode_ordinary(text)
        for i, j in zip(before, after, strict=True):
            assert whole.decode_single_token_bytes(i) == cut.decode_single_token_bytes(j)
            new_ids[i] = j
    assert list(map(new_ids.get, sorted(new_ids))) == sorted(new_ids.values())


def test_texts_of_another_file_of_the_same_name(tmp_path):
    study = Study(str(tmp_path / "out"), str(tmp_path / "data"), "", False)
    one, other = tmp_path / "rows.jsonl", tmp_path / "other.jsonl"
    one.write_text("a\n")
    other.write_text("b\n")
    check_texts(study, str(one))
    check_texts(study, str(one))
    with pytest.raises(SystemExit, match="is of another file than"):
        check_texts(study, str(other))
