"""Settings: files, overrides, types, ranges, renamed and foreign names."""

import glob
import re
import subprocess
import sys

import pytest
from conftest import load_config

import train
from loss import LOSS_TYPES, OPTION_TYPES
from model import GPTConfig
from nanospin.config import (
    ELSEWHERE,
    Config,
    command_for_run,
    field_hints,
    import_function,
    model_config_from,
    per_round,
    settings_without_effect,
)

PPO = ["--stage=ppo", "--init=x", "--reward=m:f"]
SPIN = ["--stage=spin", "--init=x"]


def test_files_overrides_and_inheritance(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from config.demo.spin_k2 import *\n"
        "import math\n"
        "_half = 0.5\n"
        "lr = [1e-4, _half * 1e-4]\n"
        "beta = math.e\n"
        "n_layer = 3\n"
    )
    overrides = ["--batch_size=16", "--players=data,self,self-1", "--compile=true", "--lr=[0.1, 1]"]
    cfg = load_config([str(path), *overrides])
    assert cfg.stage == "spin"
    assert cfg.lr == [0.1, 1.0]
    assert cfg.batch_size == 16
    assert cfg.compile is True
    assert cfg.players == ["data", "self", "self-1"]
    assert cfg.beta == pytest.approx(2.718, abs=1e-3)
    assert cfg.model == {"n_layer": 3}


def test_the_command_line_wins_wherever_it_stands(tmp_path):
    first, second = tmp_path / "first.py", tmp_path / "second.py"
    first.write_text("out_dir = 'of_file'\nlr = 1e-4\nbeta = 0.5\nmax_steps = 3\n")
    second.write_text("beta = 0.2\n")
    cfg = load_config(["--out_dir=mine", "--lr", "7e-3", str(first), "--lr=1e-3", str(second)])
    assert (cfg.out_dir, cfg.lr, cfg.beta, cfg.max_steps) == ("mine", 1e-3, 0.2, 3)


def test_values_convert_to_the_type_of_the_setting():
    assert load_config(["--lr=1", "--max_steps=1"]).lr == 1.0
    assert load_config(["--lr", "1e-3", "--max_steps", "1"]).lr == 1e-3
    assert load_config(["--rope_theta=5", "--max_steps=1"]).model == {"rope_theta": 5.0}


def test_per_round():
    assert per_round([0.1, 1.0], 1) == 1.0
    assert per_round([3.0], 5) == 3.0
    assert per_round(2.0, 7) == 2.0


def test_fewer_rounds_take_the_first_values():
    cfg = load_config(["config/spin_k2.py", "--rounds=2"])
    assert [per_round(cfg.lr, r) for r in range(cfg.rounds)] == [5e-7, 5e-7]


@pytest.mark.parametrize(
    "args, message",
    [
        (["--bta=0.1"], "unknown setting 'bta', did you mean 'beta'"),
        (["--lr"], "--lr needs a value: --lr=VALUE"),
        (["--compile", "--max_steps=1"], "--compile needs a value"),
        (["--max_steps=1.5"], "max_steps must be int"),
        (["--lr=fast"], "lr must be float"),
        (["--lr=[1,'a']"], "lr must be float"),
        (["--compile=1"], "compile must be bool"),
        (["--batch_size=True"], "must be int"),
        (["--n_layer='2'"], "n_layer must be int"),
        (["--stage=dpo"], "stage must be one of"),
        (["--batch_size=0"], "at least 1"),
        (["--temperature=-1"], "not be negative"),
        (["--temperature=1e-320"], "temperature must be 0 (greedy) or from 0.0001 to 10000"),
        (["--temperature=1e5"], "temperature must be 0 (greedy) or from 0.0001 to 10000"),
        (["--timeout=1e200"], "timeout must be from 1 to 1e7"),
        (["--value_clip_range=1e299"], "value_clip_range must be at most 1e+30, got 1e+299"),
        (["--grad_clip=1e39"], "grad_clip must be at most 1e+30"),
        (["--norm_eps=1e39"], "norm_eps must be at most 1e+30"),
        ([*SPIN, "--lr=[1e-3,1e39]"], "lr must be at most 1e+30"),
        (["--margin=-1e39"], "margin must be at most 1e+30"),
        (["--seed=18446744073709551616"], "seed must be below"),
        (["--lr=" + "[" * 5000], "lr must be float"),
        (["--top_p=0"], "top_p"),
        (["--top_p=1e-300"], "top_p must be from 1e-06 to 1"),
        ([*SPIN, "--players=data,self,self-²"], "players are"),
        ([*SPIN, "--players=data,self,self-٣"], "players are"),
        ([*SPIN, "--players=data,self,self-0"], "players are"),
        ([*SPIN, "--players=data,self,self-99999999999999999999"], "players are"),
        (["--template=Q"], "must contain {prompt}"),
        ([], "needs max_steps"),
        (SPIN[:1], "needs init"),
        (["--max_steps=1", "--rounds=2"], "has one round"),
        ([*SPIN, "--rounds=3", "--lr=[1,2]"], "2 values for 3 rounds"),
        ([*SPIN, "--players=data,teacher,self"], "teacher"),
        ([*SPIN, "--teacher=y"], "teacher"),
        ([*SPIN, "--players=self,data"], "begin with data"),
        ([*SPIN, "--players=data,selfie"], "players are"),
        ([*SPIN, "--players=data,self-1"], "must include self"),
        ([*SPIN, "--label_smoothing=0.5"], "label_smoothing must be in"),
        (["--max_steps=1", "--label_smoothing=0.1"], "preference and spin have label_smoothing"),
        ([*SPIN, "--optimizer=muon", "--rounds=2", "--lr=[1e-3,1e-4]"], "muon has one muon_lr"),
        ([*PPO, "--taylor_order=1"], "stage ppo has no taylor_order"),
        ([*PPO, "--nll_coef=1"], "only stages preference and spin have nll_coef"),
        (["--stage=sft", "--rank_depth=1"], "only stages preference and spin have rank_depth"),
        ([*PPO, "--replay_rounds=1"], "only stage spin has replay_rounds"),
        (["--seed=-1"], "seed must not"),
        (["--taylor_order=21"], "at most 20"),
        (["nothing.py"], "No such file"),
        (["--lr=0", "--max_steps=1"], "above 0"),
        (["--model={}"], "here it is 'init'"),
        (["--vocab_size=5"], "unknown setting 'vocab_size'"),
    ],
)
def test_mistakes_are_one_line(args, message):
    with pytest.raises(SystemExit) as e:
        load_config(args)
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def test_suggested_names_exist():
    known = [*field_hints(Config), *field_hints(GPTConfig)]
    for name in ELSEWHERE.values():
        assert name in known, name
    with pytest.raises(SystemExit, match="'learning_rate'; here it is 'lr'"):
        load_config(["--learning_rate=1"])


@pytest.mark.parametrize(
    "text, message",
    [
        ("lr = (\n", "a.py:1: "),
        ("learning_rate = 1\n", "'learning_rate'"),
        ("lr = 1 / 0\n", "ZeroDivisionError"),
        ("n_layer = '2'\n", "n_layer must be int"),
    ],
)
def test_mistakes_in_a_file(tmp_path, text, message):
    (tmp_path / "a.py").write_text(text)
    with pytest.raises(SystemExit) as e:
        load_config([str(tmp_path / "a.py")])
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def test_a_mistake_as_a_user_sees_it():
    command = [sys.executable, "train.py", "--bta=1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.strip() == "command line: unknown setting 'bta', did you mean 'beta'?"


CONFIGS = glob.glob("config/**/*.py", recursive=True) + glob.glob("studies/smollm2/config/*.py")


@pytest.mark.parametrize("path", sorted(CONFIGS))
def test_every_config_says_how_it_is_run(path):
    """The header of a config has its command, the hardware, the time and the result to expect."""
    assert not settings_without_effect(load_config([path]))
    with open(path, encoding="utf-8") as f:
        header = f.read().split('"""')[1]
    assert f"train.py {path}" in header
    assert re.search(r"\bcores?\b|GPU", header)
    assert re.search(r"minute|hour|second", header)
    assert re.search(r"\d %|loss|reward|starts at", header)


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (
            ["--stage=sft", "--beta=0.5", "--loss_type=simpo", "--margin=0.7"],
            ["beta", "margin", "loss_type"],
        ),
        (["--stage=preference", "--init=x", "--teacher=rows", "--beta=0.5"], ["teacher"]),
        (["--stage=reward", "--init=x", "--loss_type=pairs", "--temperature=0.7"], ["temperature"]),
        (["--stage=sft", "--lora_alpha=64", "--muon_lr=0.1"], ["lora_alpha", "muon_lr"]),
        (["--stage=sft", "--max_steps=9", "--epochs=3"], ["epochs"]),
        (
            ["--stage=sft", "--schedule=constant", "--min_lr_ratio=0", "--optimizer=rmsprop"]
            + ["--adam_betas=0.9,0.99", "--eval_batches=3"],
            ["min_lr_ratio", "adam_betas", "eval_batches"],
        ),
        (
            ["--stage=pretrain", "--max_steps=9", "--max_rows=9", "--keep_rounds=1", "--epochs=2"]
            + ["--template={prompt} ", "--max_prompt=9"],  # of the later stages, which inherit them
            ["epochs", "max_rows", "keep_rounds"],
        ),
        (["--stage=sft", "--init=x", "--lora_rank=4", "--lora_alpha=64"], []),
        (["--stage=ppo", "--init=x", "--reward=m:f", "--gae_lambda=0.5", "--kl_coef=0.1"], []),
        (
            ["--stage=ppo", "--init=x", "--reward=m:f", "--advantage=grpo"]
            + ["--samples_per_prompt=4", "--gae_lambda=0.5", "--clip_range=0.1"],
            ["gae_lambda"],
        ),
        (["--stage=ppo", "--init=x", "--reward=m:f", "--kl_target=6"], []),
        (
            ["--stage=ppo", "--init=x", "--reward=m:f", "--kl_target=6", "--kl_coef=0"],
            ["kl_target"],
        ),
    ],
)
def test_settings_that_a_run_does_not_read_are_said(args, names):
    said = settings_without_effect(load_config(args))
    assert [text.split()[0] for text in said] == names


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("option", OPTION_TYPES)
def test_an_option_that_a_loss_cannot_have_is_refused_at_once(loss_type, option):
    """Where `preference_loss` would raise ValueError after the responses were sampled."""
    value = {"rank_depth": 1, "length_normalize": True}.get(option, 0.1)
    args = ["--stage=preference", "--init=x", f"--loss_type={loss_type}", f"--{option}={value}"]
    cfg = load_config(args)
    if loss_type in OPTION_TYPES[option]:
        train.check_loss_type(cfg)
    else:
        with pytest.raises(
            SystemExit, match=f"^config: loss_type {loss_type} has no {option}, only these: "
        ):
            train.check_loss_type(cfg)


@pytest.mark.parametrize(
    "args, message",
    [
        (
            ["--stage=preference", "--loss_type=dpo"],
            "config: unknown loss_type 'dpo': use one of pl",
        ),
        (["--stage=reward", "--loss_type=ipo"], "config: stage reward has loss_type pairs or pl"),
    ],
)
def test_an_unknown_loss_is_refused_at_once(args, message):
    with pytest.raises(SystemExit, match=f"^{message}"):
        train.main([*args, "--init=nowhere"])


def test_command_for_run():
    assert command_for_run("out/demo/sft") == "python train.py config/demo/sft.py"
    assert command_for_run("out/nowhere") == ""


def test_import_function():
    assert import_function("math:sqrt")(9.0) == 3.0
    for name in ("nowhere:f", "math:nothing", "math:pi"):
        with pytest.raises(SystemExit, match=f"scorer {name}"):
            import_function(name)


def test_numbers_of_a_model_fit_float32():
    with pytest.raises(SystemExit, match="here: norm_eps must be at most 1e"):
        model_config_from({"norm_eps": 1e39}, GPTConfig, "here")


def test_sizes_of_a_model_are_bounded():
    """Also those in a checkpoint: building a model of 10^9 layers would never end."""
    for name in ("n_layer", "n_embd", "block_size", "n_head", "n_inner", "vocab_size"):
        for value in (0 if name != "n_inner" else -1, 10**9, 10**30):
            with pytest.raises(SystemExit, match=f"here: {name} |here: n_embd"):
                model_config_from({name: value}, GPTConfig, "here")


@pytest.mark.parametrize("name, method", [("dpo", "stage=preference"), ("grpo", "advantage=grpo")])
def test_a_method_that_is_no_stage(name, method):
    with pytest.raises(SystemExit, match=f"got '{name}'; .*{method}"):
        load_config([f"--stage={name}"])
