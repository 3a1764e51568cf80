"""Two CPU processes under torchrun give the same run as one, on ragged rows."""

import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, TINY, final_weights, read_metrics
from test_taylor import texts
from test_train import assert_same_run, spin_args

import studies.taylor.train
import train
from model import GPT, GPTConfig
from nanospin import checkpoint, distributed, elastic, metrics_logger
from nanospin.config import Config
from nanospin.mfu import peak_flops

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
            # At a first step the policy is the reference: rounding decides between equal rewards.
            is_equal = abs(x.get("margin", 1.0)) < 1e-5
            for key in ("loss", "norm", "val_loss", "acc", "rank_nll", "nll"):
                if key in x and not (key == "acc" and is_equal):
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


SAMPLE_SIZES = """
import torch
from nanospin import distributed

def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096 / 2**20

distributed.configure_torch("cpu")
x = torch.randn(200, 64)
weights = [torch.randn(rows, 64) for rows in (64, 192, 256, 2048)]
weights = [torch.ops.mkldnn._reorder_linear_weight(weight, 1) for weight in weights]

def multiply(sizes):
    for size in sizes:
        for weight in weights:
            torch.ops.mkldnn._linear_pointwise(x[:size], weight, None, "none", [], "")

multiply(range(1, 40))
before = resident()
multiply(range(40, 200))
print(resident() - before)
"""


def test_compiled_matmuls_are_few():
    """160 sizes of 4 matmuls: 400 MiB if all stay in memory."""
    env = {key: value for key, value in os.environ.items() if "CACHE_CAPACITY" not in key}
    command = [sys.executable, "-c", SAMPLE_SIZES]
    output = subprocess.run(command, env=env, cwd=ROOT, check=True, capture_output=True, text=True)
    assert float(output.stdout) < 60


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
    assert metrics_logger.format_step(record, 400, 192.0, 192.0) == (
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


def test_peak_of_a_gpu_by_its_name():
    """As NVIDIA's driver has it: boards of one chip differ."""
    for name, peak in [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla T4", None),
    ]:
        assert peak_flops(name) == peak


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
    while logged_steps(killed) <= 12 or not os.path.isdir(f"{killed}/round_0/step_000010"):
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


# ------------------------------------------------------------------- starting, signals, and errors


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"RANK": "0"}, "WORLD_SIZE is not"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x"}, "MASTER_PORT is not"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "x"}, "RANK must be a whole number"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK must be a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "-1"}, "WORLD_SIZE must be a whole number"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"LOCAL_RANK": "²"}, "LOCAL_RANK must be a whole number"),
    ],
)
def test_an_incomplete_environment_is_one_line(variables, message, monkeypatch, capsys):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        elastic.read_environment()
    line = capsys.readouterr().err
    assert message in line and line.count("\n") == 1


def test_one_process_has_no_environment(monkeypatch):
    assert elastic.read_environment() is None
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert elastic.read_environment() is None


def start_rank(tiny_data, tmp_path, rank, world_size, port, timeout=2):
    env = ENV | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    args = [*pretrain_args(tiny_data, tmp_path / "out", "adamw"), f"--timeout={timeout}"]
    command = [sys.executable, "train.py", *args]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def start_ranks(tiny_data, tmp_path, ranks, world_size, port):
    """Start some ranks of a run. Returns [(exit status, standard error)]."""
    runs = [start_rank(tiny_data, tmp_path, rank, world_size, port) for rank in ranks]
    return [(run.wait(60), run.stderr.read()) for run in runs]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_ranks_that_never_come_are_named(tiny_data, tmp_path):
    line = "2 of 3 ranks came within 2 seconds; missing: 1\n"
    ends = start_ranks(tiny_data, tmp_path, [0, 2], 3, free_port())
    assert ends == [(1, line), (1, line)]


def test_a_busy_port_and_a_missing_rank_0(tiny_data, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        first, second = start_ranks(tiny_data, tmp_path, [0, 1], 2, port)
    assert first == (1, f"MASTER_PORT {port} is in use by another program; choose another one\n")
    assert second[0] == 1 and second[1].count("\n") == 1
    ((status, line),) = start_ranks(tiny_data, tmp_path, [1], 2, port)
    assert (status, line) == (1, f"rank 0 did not answer at 127.0.0.1:{port} within 2 seconds\n")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_ends_a_rank_that_waits_for_the_others(tiny_data, tmp_path, rank):
    """Rank 0 waits for rank 1, and rank 1 for an answer of what listens in the place of rank 0."""
    port = free_port()
    with socket.socket() as s:
        if rank == 1:
            s.bind(("127.0.0.1", port))
            s.listen()
            s.settimeout(60)
        run = start_rank(tiny_data, tmp_path, rank, 2, port, timeout=600)
        try:
            if rank == 1:
                s.accept()
            else:
                wait_for_listener(port)
            time.sleep(0.5)
            run.send_signal(signal.SIGTERM)
            assert run.wait(20) == -signal.SIGTERM
        finally:
            run.kill()
            run.communicate()


def wait_for_listener(port):
    for _ in range(600):
        with contextlib.suppress(OSError):
            return socket.create_connection(("127.0.0.1", port)).close()
        time.sleep(0.1)
    raise AssertionError(f"nobody listens on {port}")


class Ended(Exception):
    """Raised instead of ending the process."""


class Store(dict):
    """A store of a process without others, and of what the others would have written."""

    def set(self, key, value):
        self[key] = value

    def check(self, keys):
        return all(key in self for key in keys)

    def get(self, key):
        return self[key].encode()


@pytest.fixture
def watch(monkeypatch):
    """watch(timeout, others): run the watcher thread of rank 0 of two, which makes no progress,
    until it would end the process. others(seconds) is what rank 1's pulse then says. Returns
    (seconds, its line, the pulses of rank 0)."""

    def run(timeout, others=lambda seconds: {"time": seconds, "idle": seconds}):
        watched = elastic.Watch(timeout)
        store = Store()
        pulses = []

        def sleep(seconds):
            pulses.append(json.loads(store["pulse/0"]))
            watched.idle += seconds
            pulse = {"collectives": 0, "waiting": True, "location": "stage 1"}
            store.set("pulse/1", json.dumps(pulse | others(len(pulses) / 2)))

        def exit_with_error(text):
            raise Ended(text)

        monkeypatch.setattr(elastic.time, "sleep", sleep)
        monkeypatch.setattr(elastic.time, "monotonic", lambda: len(pulses))
        monkeypatch.setattr(elastic, "exit_with_error", exit_with_error)
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        monkeypatch.setattr(distributed.heartbeat, "collectives", 3)
        with pytest.raises(Ended) as ended:
            elastic.watch_ranks(watched, store, torch.device("cpu"))
        return len(pulses) / 2, str(ended.value), pulses

    return run


def test_the_watcher_looks_at_the_main_thread_once_and_only_if_it_seems_to_hang(watch, monkeypatch):
    """The frames of a thread that runs are not safe to read: CPython 3.11 crashed."""
    looks = []

    def current_location():
        looks.append(1)
        return False, "a line"

    monkeypatch.setattr(elastic, "current_location", current_location)
    seconds, text, pulses = watch(10.0)
    assert looks == [1] and seconds <= 21
    for pulse in pulses:
        assert (pulse["location"] == "a line") == (pulse["idle"] > 5)
        assert pulse["waiting"] == (pulse["idle"] <= 5)


@pytest.mark.parametrize("behind", [True, False])
def test_a_rank_that_has_made_fewer_collective_calls_is_named(watch, monkeypatch, behind):
    """Even if its last progress is so near that it has not said where it is."""
    monkeypatch.setattr(elastic, "current_location", lambda: (True, "a line"))

    def others(seconds):
        return {"time": seconds, "idle": seconds - 7, "collectives": 2 if behind else 3}

    seconds, text, _ = watch(10.0, others)
    assert 17 <= seconds <= 31
    waits = ": the other ranks wait for rank 1 (stage 1)" if behind else ", in "
    assert text.startswith(f"no progress for 10 seconds{waits}")


def test_a_rank_that_works_is_waited_for(watch, monkeypatch):
    """The other one makes progress for a minute, for example in a slow scorer."""
    monkeypatch.setattr(elastic, "current_location", lambda: (True, "a line"))
    seconds, _, _ = watch(10.0, lambda seconds: {"time": seconds, "idle": max(0, seconds - 60)})
    assert 70 <= seconds <= 81


def test_a_rank_that_is_gone_is_not_waited_for(watch, monkeypatch):
    """Its last pulse tells of progress for ever."""
    monkeypatch.setattr(elastic, "current_location", lambda: (True, "a line"))
    seconds, text, _ = watch(10.0, lambda seconds: {"time": min(seconds, 3), "idle": 0.5})
    assert seconds <= 21
    assert text == "no progress for 10 seconds: lost rank 1 (stage 1)"


def seconds_until_given_up(monkeypatch, happen):
    """The thread that counts until it ends the process: (seconds that it slept, exit status).
    happen(watch, seconds) is what happens in the other threads meanwhile."""
    watched = elastic.Watch(10.0)
    slept = [0.0]

    def sleep(seconds):
        slept[0] += seconds
        happen(watched, slept[0])

    def leave(status):
        raise Ended(status)

    monkeypatch.setattr(elastic.time, "sleep", sleep)
    monkeypatch.setattr(elastic.os, "_exit", leave)
    with pytest.raises(Ended) as ended:
        elastic.count_seconds(watched)
    return slept[0], ended.value.args[0]


def test_a_store_that_does_not_answer_does_not_hang_this_rank(monkeypatch, capsys):
    """Rank 0 is stopped, and with it the store; the other thread waits in it for ever."""
    assert seconds_until_given_up(monkeypatch, lambda watch, seconds: None) == (10.5, 1)
    error = capsys.readouterr().err
    assert "no progress for 10 seconds" in error and "rank 0 does not answer" in error


def test_a_suspended_job_is_not_hanging(monkeypatch):
    """A count every half second, and once 1,000 seconds in which nothing ran."""
    clock = [0.0]

    def happen(watch, seconds):
        clock[0] += 1000.0 if seconds == 2.5 else 0.5

    monkeypatch.setattr(elastic.time, "monotonic", lambda: clock[0])
    seconds_until_given_up(monkeypatch, happen)
    assert 1010 <= clock[0] <= 1011


def test_progress_and_answers_are_waited_for(monkeypatch):
    """Progress until 20 seconds, then answers of the store until 50."""

    def happen(watch, seconds):
        if seconds <= 20:
            distributed.heartbeat.touch()
        elif seconds <= 50:
            watch.silent = 0.0

    assert seconds_until_given_up(monkeypatch, happen) == (60.0, 1)


def test_a_crash_of_native_code_prints_the_line_of_python(tmp_path):
    code = "from nanospin import elastic\n"
    code += "import os, signal\n"
    code += "elastic.run(lambda argv: os.kill(os.getpid(), signal.SIGSEGV), [])\n"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in run.stderr
    assert 'File "<string>", line 3' in run.stderr


def test_words_alone_do_not_make_a_lost_rank(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    users = RuntimeError("reward server: Connection refused, timeout of a peer")
    assert not elastic.is_connection_error(users)
    assert elastic.is_connection_error(dist.DistNetworkError("x"))

    def raise_inside(text):
        code = compile("raise RuntimeError(text)", f"{os.path.dirname(dist.__file__)}/x.py", "exec")
        try:
            exec(code, {"text": text})
        except RuntimeError as e:
            return e

    assert elastic.is_connection_error(raise_inside("gloo: Connection closed by peer"))
    assert not elastic.is_connection_error(raise_inside("shapes differ"))


def test_a_disk_error_of_users_code_keeps_its_traceback(tmp_path, capsys):
    def ours(argv):
        raise PermissionError(errno.EACCES, "Permission denied", "x")

    assert elastic.run_main(ours, []) == (1, False)
    assert capsys.readouterr().err == "x: Permission denied; everything saved before is intact\n"
    code = compile("def f(e): raise e", f"{tmp_path}/reward.py", "exec")
    users = {}
    exec(code, users)
    error = PermissionError(errno.EACCES, "Permission denied", "x")
    assert elastic.run_main(lambda argv: users["f"](error), []) == (1, False)
    assert "reward.py" in capsys.readouterr().err


LONG = ["--max_steps=5000", "--save_interval=5000", "--eval_interval=5000"]


def start_alone(tiny_data, out, prefix=()):
    args = [*pretrain_args(tiny_data, out, "adamw"), *LONG]
    run = subprocess.Popen(
        [*prefix, sys.executable, "train.py", *args],
        env=ENV,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while logged_steps(out) < 3:
        assert run.poll() is None
        time.sleep(0.05)
    return run


def test_a_hangup_saves_and_nohup_goes_on(tiny_data, tmp_path):
    run = start_alone(tiny_data, tmp_path / "a")
    run.send_signal(signal.SIGHUP)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGHUP
    assert "SIGHUP: stopped; run the same command to continue" in output
    assert checkpoint.latest(str(tmp_path / "a"))

    run = start_alone(tiny_data, tmp_path / "b", ["nohup"])
    run.send_signal(signal.SIGHUP)
    before = logged_steps(tmp_path / "b")
    while logged_steps(tmp_path / "b") < before + 5:
        assert run.poll() is None
        time.sleep(0.05)
    run.kill()
    run.communicate()


def test_a_closed_pipe_does_not_end_training(tiny_data, tmp_path):
    args = pretrain_args(tiny_data, tmp_path / "out", "adamw")
    run = subprocess.Popen(
        [sys.executable, "train.py", *args],
        env=ENV,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    run.stdout.close()
    assert run.wait(60) == 0
    assert run.stderr.read() == "standard output: Broken pipe; going on without it\n"
    assert checkpoint.latest(str(tmp_path / "out")).endswith("step_000003")
