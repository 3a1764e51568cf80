"""Two CPU processes under torchrun give the same run as one, on ragged rows."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import torch
from conftest import TINY, final_weights, read_metrics
from test_taylor import texts
from test_train import assert_same_run, spin_args

import studies.taylor.train
import train
from model import GPT, GPTConfig
from nanospin import distributed, elastic, metrics_logger
from nanospin.config import Config

ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def torchrun_command(args, *options, program=("train.py",)):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return [*launcher, *options, *program, *args]


def torchrun(args, program=("train.py",)):
    command = torchrun_command(args, program=program)
    done = subprocess.run(command, capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr[-3000:]


def assert_equal_up_to_rounding(a, b, tolerance):
    for kind in ("step", "eval", "start"):
        for x, y in zip(read_metrics(a, kind), read_metrics(b, kind), strict=True):
            for key in ("loss", "norm", "val_loss", "acc", "rank_nll", "nll"):
                if key in x:
                    allowed = tolerance * max(1.0, abs(x[key]))
                    assert abs(x[key] - y[key]) <= allowed, (kind, x["step"], key, x[key], y[key])
    one, two = final_weights(a), final_weights(b)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------ one process


def test_matmuls_are_float32():
    """Whatever library is used on this chip. In bfloat16 they would be 1,000 times as far off."""
    before = torch.get_float32_matmul_precision()
    try:
        distributed.configure_torch("cpu")
        a, b = torch.randn(256, 256), torch.randn(256, 256)
        # 256 terms of about 1, each rounded at 6e-8 of a sum of about 16
        torch.testing.assert_close((a @ b).double(), a.double() @ b.double(), rtol=0, atol=1e-4)
    finally:
        torch.set_float32_matmul_precision(before)


def test_expandable_segments_unless_the_environment_has_a_setting(monkeypatch):
    precision = torch.get_float32_matmul_precision()
    setting = "max_split_size_mb:64"

    monkeypatch.setenv("PYTORCH_ALLOC_CONF", setting)
    distributed.configure_torch("cuda")
    assert os.environ["PYTORCH_ALLOC_CONF"] == setting
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")

    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", setting)
    distributed.configure_torch("cuda")
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")

    distributed.configure_torch("cpu")
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    distributed.configure_torch("cuda")
    assert os.environ.pop("PYTORCH_ALLOC_CONF") == "expandable_segments:True"
    torch.set_float32_matmul_precision(precision)


def test_activation_checkpointing_is_off_without_gradients(monkeypatch):
    calls = []
    original = distributed.activation_checkpoint

    def counting(*args, **options):
        calls.append(1)
        return original(*args, **options)

    monkeypatch.setattr(distributed, "activation_checkpoint", counting)
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=97, block_size=8, n_layer=2, n_head=2, n_embd=16))
    cfg = Config(activation_checkpointing=1)
    model = distributed.prepare_model(model, torch.device("cpu"), torch.float32, cfg)
    model.init_weights()
    idx = torch.zeros(1, 3, dtype=torch.long)
    with torch.no_grad():
        expected = model(idx)
    assert not calls
    torch.testing.assert_close(model(idx), expected, rtol=0, atol=0)
    assert len(calls) == 2


def test_a_hang_report_names_the_stage_and_the_line():
    distributed.heartbeat.set_stage("round 0 step 12")
    waiting, location = elastic.current_location()
    assert not waiting and location == "round 0 step 12"  # a test is no file of the project

    root = elastic.ROOT
    assert elastic.is_project_file(f"{root}/train.py")
    assert elastic.is_project_file(f"{root}/nanospin/checkpoint.py")
    assert not elastic.is_project_file(f"{root}/nanospin/distributed.py")
    assert not elastic.is_project_file(f"{root}/nanospin/elastic.py")
    assert not elastic.is_project_file(f"{root}/tests/test_distributed.py")
    assert not elastic.is_project_file("<string>")


def test_console_lines():
    record = {
        "kind": "step",
        "round": 0,
        "step": 119,
        "loss": 0.53124,
        "acc": 0.708,
        "norm": 0.4211,
        "lr": 3e-4,
        "ms": 412.3,
        "tokens_per_second": 39812.0,
        "mfu": 0.41,
        "seconds": 0.5,
    }
    assert metrics_logger.format_step(record, 400, 192.0) == (
        "round 0 step 120/400 | loss 0.5312 | acc 0.71 | lr 3.0e-04 | norm 0.42 | 412 ms"
        " | 39.8k tok/s | mfu 41.0% | eta 3:12"
    )
    metrics = {"val_loss": 1.5, "rank_nll": 0.6931, "acc": 0.5, "acc_se": 0.1, "reward/self": 0.0}
    record = {"kind": "eval", "round": 1, "step": 120} | metrics
    assert metrics_logger.format_record(record, "spin") == (
        "round 1 step 120 | eval: val_loss 1.5000, rank_nll 0.6931, acc 0.5000"
    )
    assert metrics_logger.format_duration(3792.4) == "1:03:12"


# ---------------------------------------------------------------------------------- two processes


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


def test_pretraining(tiny_data, tmp_path):
    """From random weights: initialisation, batches, gradients, clipping, logged means. Another
    order of sums leaves differences of about 1e-6."""
    train.main(pretrain_args(tiny_data, tmp_path / "one", "adamw"))
    torchrun(pretrain_args(tiny_data, tmp_path / "two", "adamw"))
    assert_equal_up_to_rounding(tmp_path / "one", tmp_path / "two", 1e-5)


SPOIL_ON_RANK_1 = """
import sys

sys.path.insert(0, ROOT)
import train
from nanospin import checkpoint, distributed, elastic

verify = checkpoint.verify


def verify_spoiled(staging, tensors):
    if distributed.rank() == 1 and staging.endswith("writing_000003"):
        tensors[PART][NAME].to_local()[-1, -1] += 1
    verify(staging, tensors)


checkpoint.verify = verify_spoiled
sys.exit(elastic.run(train.main, sys.argv[1:]))
"""


def test_each_rank_compares_its_shards_with_the_files(tiny_data, tmp_path):
    """If one rank finds a difference, there is no checkpoint. The folder has brackets in its name,
    which DCP would take for a pattern. The same command then resumes."""
    args = pretrain_args(tiny_data, tmp_path / "lr[1e-3]", "adamw")
    args.append("--save_interval=1")
    for part, name in (("model", "wte.weight"), ("optimizer", "wte.weight.exp_avg")):
        script = tmp_path / "spoil.py"
        program = SPOIL_ON_RANK_1.replace("ROOT", repr(os.getcwd()))
        script.write_text(program.replace("PART", repr(part)).replace("NAME", repr(name)))
        command = torchrun_command(args, program=(str(script),))
        done = subprocess.run(command, capture_output=True, text=True, env=ENV)
        assert done.returncode == 1
        assert f"{name} was not written as it is" in done.stderr
        steps = sorted(os.listdir(tmp_path / "lr[1e-3]/round_0"))
        assert steps == ["step_000001", "step_000002"]
    torchrun(args)
    train.main(pretrain_args(tiny_data, tmp_path / "one", "adamw"))
    assert_equal_up_to_rounding(tmp_path / "one", tmp_path / "lr[1e-3]", 1e-5)


def test_muon_orthogonalises_full_matrices(tiny_data, tmp_path):
    """Muon iterates in bfloat16, where another order of sums changes the last of 8 bits, and five
    iterations amplify that where a matrix is nearly singular. It makes 3 % of the size of a
    well-conditioned update, and up to 15 % of these. An update made from each rank's half of a
    matrix would have a norm that is off by a factor of sqrt 2."""
    train.main(pretrain_args(tiny_data, tmp_path / "one", "muon"))
    torchrun(pretrain_args(tiny_data, tmp_path / "two", "muon"))
    one, two = final_weights(tmp_path / "one"), final_weights(tmp_path / "two")
    model, _, _ = GPT.from_checkpoint(str(tmp_path / "one"))
    model.init_weights(1337)
    for name, p in model.named_parameters():
        assert (one[name] - two[name]).norm() < 0.3 * (one[name] - p).norm(), name
    steps_one = read_metrics(tmp_path / "one", "step")
    steps_two = read_metrics(tmp_path / "two", "step")
    for x, y in zip(steps_one, steps_two, strict=True):
        assert abs(x["loss"] - y["loss"]) < 1e-3


def test_spin_with_a_teacher(tiny_runs, tiny_data, tmp_path):
    """Two ranks sample the same rows as one, and take the same steps on ragged K = 3 batches."""

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
    one = (tmp_path / "one/round_0/train.jsonl").read_text()
    assert one == (tmp_path / "two/round_0/train.jsonl").read_text()
    assert_equal_up_to_rounding(f"{tmp_path}/one", f"{tmp_path}/two", 2e-5)


def test_taylor_study(tmp_path):
    """Rows of plain text with the study's model, a loss that needs all logits, and its evaluation;
    and in bfloat16."""

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

    program = ("-m", "studies.taylor.train")
    studies.taylor.train.main(args("one"))
    torchrun(args("two"), program)
    assert_equal_up_to_rounding(f"{tmp_path}/one", f"{tmp_path}/two", 1e-5)
    one = read_metrics(f"{tmp_path}/one", "eval")[-1]
    two = read_metrics(f"{tmp_path}/two", "eval")[-1]
    for key in ("temperature/0", "loss/1", "loss_t/0", "seen_loss", "new_loss", "entropy", "ece"):
        assert abs(one[key] - two[key]) < 1e-4, key
    torchrun(args("bf16", "--dtype=bfloat16"), program)
    loss = read_metrics(f"{tmp_path}/one", "step")[0]["loss"]
    assert abs(read_metrics(f"{tmp_path}/bf16", "step")[0]["loss"] - loss) < 0.02


def children(pid):
    """The processes that a process has started, oldest first."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as f:
            parent = int(f.read().rpartition(")")[2].split()[1])
            if parent == pid:
                found.append(int(name))
    return sorted(found)


def logged_steps(out):
    if not os.path.exists(f"{out}/metrics.jsonl"):
        return 0
    return len(read_metrics(out, "step"))


def test_torchrun_restarts_a_killed_worker_and_one_rank_resumes_from_two(tiny_data, tmp_path):
    def args(out):
        return [
            "--stage=pretrain",
            f"--out_dir={tmp_path}/{out}",
            f"--data={tiny_data}",
            "--max_steps=30",
            "--save_interval=10",
            "--eval_interval=30",
            "--batch_size=8",
            "--lr=1e-3",
            *TINY,
        ]

    undisturbed, killed = f"{tmp_path}/undisturbed", f"{tmp_path}/killed"
    torchrun(args("undisturbed"))
    run = subprocess.Popen(
        torchrun_command(args("killed"), "--max-restarts=1"),
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.time() + 120
    while logged_steps(killed) <= 12:
        assert run.poll() is None and time.time() < deadline
        time.sleep(0.01)
    os.kill(children(run.pid)[-1], signal.SIGKILL)
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 0, output
    with open(f"{killed}/config.json", encoding="utf-8") as f:
        assert len(json.load(f)["starts"]) == 2
    assert_same_run(undisturbed, killed)

    shutil.rmtree(f"{killed}/round_0/step_000030")
    train.main(args("killed"))
    # steps of AdamW amplify rounding
    assert_equal_up_to_rounding(undisturbed, killed, 1e-4)
