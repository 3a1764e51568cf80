"""What two CPU processes do under torchrun equals what one does: the main path itself, on ragged rows."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import torch

from nanospin import checkpoint
from nanospin import distributed
import train
from nanospin.config import Config
from conftest import TINY, final_weights, read_metrics
from model import GPT, GPTConfig
from test_train import assert_same_run, spin_args, texts


ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def command(args):
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "train.py",
        *args,
    ]


def torchrun(args):
    done = subprocess.run(command(args), capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr[-3000:]


def assert_equal_up_to_rounding(a, b, tolerance, pair=0.0):
    """pair: what one pair is of `acc`, if one that is equal up to rounding may fall to either side."""
    for kind in ("step", "eval", "start"):
        for x, y in zip(read_metrics(a, kind), read_metrics(b, kind), strict=True):
            for key in ("loss", "norm", "val_loss", "acc", "rank_nll", "nll"):
                if key in x:
                    assert abs(x[key] - y[key]) <= tolerance * max(1.0, abs(x[key])) + pair * (
                        key == "acc"
                    ), (kind, x["step"], key, x[key], y[key])
    one, two = final_weights(a), final_weights(b)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=tolerance)


def pretrain_args(tiny_data, out, optimizer):
    return [
        "--stage=pretrain",
        f"--out_dir={out}",
        f"--data={tiny_data}",
        "--max_steps=3",
        "--batch_size=10",
        "--micro_batch_tokens=192",
        "--lr=1e-3",
        f"--optimizer={optimizer}",
        "--position=rotary",
        "--norm=rmsnorm",
        "--mlp=swiglu",
        "--weight_decay=0.1",
        *TINY,
    ]


def test_tuned_products_are_float32():
    """Whatever library this chip gets: products in bfloat16 would be 1,000 times as far off."""
    before = torch.get_float32_matmul_precision()
    try:
        distributed.configure_torch("cpu")
        a, b = torch.randn(256, 256), torch.randn(256, 256)
        torch.testing.assert_close(
            (a @ b).double(), a.double() @ b.double(), rtol=0, atol=1e-4
        )  # 256 terms of about 1, each rounded at 6e-8 of a sum of about 16
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_gpus_memory_is_taken_in_segments_unless_the_environment_says(monkeypatch):
    precision = torch.get_float32_matmul_precision()
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "max_split_size_mb:64")
        distributed.configure_torch("cuda")
        assert os.environ.get("PYTORCH_ALLOC_CONF") == (
            None if "CUDA" in name else "max_split_size_mb:64"
        )
        monkeypatch.delenv(name)
    distributed.configure_torch("cpu")
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    distributed.configure_torch("cuda")
    assert os.environ.pop("PYTORCH_ALLOC_CONF") == "expandable_segments:True"
    torch.set_float32_matmul_precision(precision)


def test_nothing_is_kept_to_compute_again_where_nothing_goes_back(monkeypatch):
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=97, block_size=8, n_layer=2, n_head=2, n_embd=16))
    model = distributed.prepare_model(
        model, torch.device("cpu"), torch.float32, Config(recompute=1)
    )
    model.init_weights()
    calls, again = [], distributed.checkpoint
    monkeypatch.setattr(
        parallel, "checkpoint", lambda *args, **options: calls.append(1) or again(*args, **options)
    )
    with torch.no_grad():
        expected = model(torch.zeros(1, 3, dtype=torch.long))
    assert not calls
    torch.testing.assert_close(model(torch.zeros(1, 3, dtype=torch.long)), expected, rtol=0, atol=0)
    assert len(calls) == 2


def test_pretraining(tiny_data, tmp_path):
    """From scratch: initialisation, batches, gradients, clipping, logged means. Sums in another order leave some 1e-6."""
    train.main(pretrain_args(tiny_data, tmp_path / "one", "adamw"))
    torchrun(pretrain_args(tiny_data, tmp_path / "two", "adamw"))
    assert_equal_up_to_rounding(tmp_path / "one", tmp_path / "two", 1e-5)


def test_muon_orthogonalises_whole_matrices(tiny_data, tmp_path):
    """In bfloat16, where another order of sums turns the last of 8 bits in each of five iterations, which blow up what is
    near singular: 3 % of a well-conditioned update's size, up to 15 % of these. Made from each rank's half of a matrix,
    an update's norm alone would be off by a factor of sqrt 2."""
    train.main(pretrain_args(tiny_data, tmp_path / "one", "muon"))
    torchrun(pretrain_args(tiny_data, tmp_path / "two", "muon"))
    one, two = final_weights(tmp_path / "one"), final_weights(tmp_path / "two")
    model, _, _ = checkpoint.load_model(str(tmp_path / "one"))
    model.init_weights(1337)
    for name, p in model.named_parameters():
        assert (one[name] - two[name]).norm() < 0.3 * (one[name] - p).norm(), name
    for x, y in zip(
        read_metrics(tmp_path / "one", "step"), read_metrics(tmp_path / "two", "step"), strict=True
    ):
        assert abs(x["loss"] - y["loss"]) < 1e-3


def test_spin_with_a_teacher(tiny_runs, tiny_data, tmp_path):
    """Sampling dealt to two ranks gives the same rows, and ragged K = 3 batches the same step."""

    def args(out):
        return spin_args(
            tiny_runs,
            tiny_data,
            f"{tmp_path}/{out}",
            "--players=data,teacher,self",
            f"--teacher={tiny_runs['pretrain']}",
            "--micro_batch_tokens=128",
            "--max_steps=2",
            "--nll_coef=0.1",
        )

    train.main(args("one"))
    torchrun(args("two"))
    assert (
        open(f"{tmp_path}/one/round_0/train.jsonl").read()
        == open(f"{tmp_path}/two/round_0/train.jsonl").read()
    )
    assert_equal_up_to_rounding(f"{tmp_path}/one", f"{tmp_path}/two", 2e-5)


def test_whole_texts_full_logits_and_calibration(tmp_path):
    """The T_n study's way: the write-up's block with its head's bias, a loss that needs every logit, fitted temperatures; and in bfloat16."""

    def args(out, *more):
        return [
            "studies/taylor/config/first.py",
            f"--data={texts(tmp_path)}",
            f"--out_dir={tmp_path}/{out}",
            "--n_embd=32",
            "--n_head=2",
            "--block_size=32",
            "--max_steps=3",
            "--device=cpu",
            "--batch_size=10",
            "--micro_batch_tokens=64",
            "--eval_interval=3",
            "--confidence_penalty=0.1",
            *more,
        ]

    train.main(args("one"))
    torchrun(args("two"))
    assert_equal_up_to_rounding(f"{tmp_path}/one", f"{tmp_path}/two", 1e-5)
    one, two = (read_metrics(f"{tmp_path}/{run}", "eval")[-1] for run in ("one", "two"))
    for key in ("temperature/0", "loss/1", "loss_t/0", "seen_loss", "new_loss", "entropy", "ece"):
        assert abs(one[key] - two[key]) < 1e-4, key
    torchrun(args("bf16", "--dtype=bfloat16"))
    assert (
        abs(
            read_metrics(f"{tmp_path}/bf16", "step")[0]["loss"]
            - read_metrics(f"{tmp_path}/one", "step")[0]["loss"]
        )
        < 0.02
    )


def children(pid):
    """The processes that a process has started, oldest first."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as f:
            found += [int(name)] * (int(f.read().rpartition(")")[2].split()[1]) == pid)
    return sorted(found)


def test_torchrun_brings_a_killed_worker_back_and_one_rank_goes_on_from_what_two_wrote(
    tiny_data, tmp_path
):
    def args(out, steps=30):
        return [
            "--stage=pretrain",
            f"--out_dir={tmp_path}/{out}",
            f"--data={tiny_data}",
            f"--max_steps={steps}",
            "--save_interval=10",
            "--eval_interval=30",
            "--batch_size=8",
            "--lr=1e-3",
            *TINY,
        ]

    torchrun(args("whole"))
    run = subprocess.Popen(
        [
            *command(args("killed"))[:3],
            "--standalone",
            "--nproc_per_node=2",
            "--max-restarts=1",
            "train.py",
            *args("killed"),
        ],
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.time() + 120
    while not (
        os.path.exists(f"{tmp_path}/killed/metrics.jsonl")
        and len(read_metrics(f"{tmp_path}/killed", "step")) > 12
    ):
        assert run.poll() is None and time.time() < deadline
        time.sleep(0.01)
    os.kill(children(run.pid)[-1], signal.SIGKILL)
    said, _ = run.communicate(timeout=120)
    assert run.returncode == 0, said
    with open(f"{tmp_path}/killed/config.json", encoding="utf-8") as f:
        assert len(json.load(f)["starts"]) == 2
    assert_same_run(f"{tmp_path}/whole", f"{tmp_path}/killed")
    shutil.rmtree(f"{tmp_path}/killed/round_0/step_000030")
    train.main(args("killed"))
    assert_equal_up_to_rounding(
        f"{tmp_path}/whole", f"{tmp_path}/killed", 1e-4
    )  # steps of AdamW let roundings grow
