"""Sections about ranks and numbers: the same losses on any number of ranks, and the same decisions.

A section is called with (workspace, short) and returns a Result. Its docstring is what it promises.
"""

import dataclasses
import json
import os
import signal
import time

import torch

import train
from data.folder import write_meta
from data.rows import write_rows
from nanospin import checkpoint, elastic, preflight
from tests.faults.harness import (
    ROOT,
    Result,
    Workspace,
    compare,
    count,
    difference,
    free_port,
    logged,
    run_to_end,
    sample_in_small_parts,
    start,
    torchrun,
)


def relative_difference(a: list[float], b: list[float]) -> float:
    """The largest relative difference of two lists of numbers."""
    return max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------------- one decision of all ranks


def figures(workspace: Workspace, short: bool) -> Result:
    """a loss that is not a number or a gradient that is infinite on one rank, rows without targets,
    a loss spike: all ranks decide alike"""
    failures = []
    bad_losses = {"gradient": infinite_gradient}
    if not short:
        bad_losses["loss"] = not_a_number
    for name, change in bad_losses.items():
        failures += stop_and_resume(workspace, name, change)
        failures += skip_step(workspace, name, change)
    failures += train_without_targets(workspace)
    failures += loss_spike(workspace)
    return count(3 * len(bad_losses) + 2, failures)


def not_a_number(loss):
    return loss * float("nan")


def infinite_gradient(loss):
    """The same value, with an infinite gradient: that of sqrt at 0."""
    return loss + (loss - loss.detach()).sqrt()


def change_loss(number: int, change):
    """A `before` that changes the loss of rank 1's micro-batch `number`, counted from 1."""

    def before(rank):
        stage = train.STAGES["sft"]
        calls = 0

        def changed_objective(model, batch, cfg):
            nonlocal calls
            calls += 1
            loss, metrics = stage.objective(model, batch, cfg)
            if calls == number and rank == 1:
                loss = change(loss)
            return loss, metrics

        train.STAGES["sft"] = dataclasses.replace(stage, objective=changed_objective)

    return before


def describe(name: str, run) -> list[str]:
    return [f"{name}: {run.status} {run.output[-1500:]}"]


def stop_and_resume(workspace: Workspace, name: str, change) -> list[str]:
    """Two cases: the run stops with one line, and the same command then finishes."""
    failures = []
    out = workspace.new_run()
    run = run_to_end(workspace.args("sft", out), 2, before=change_loss(4, change))
    expected = ("round 0 step 3: loss", "step_000002", "rows: [")
    named = all(text in run.errors for text in expected)
    if run.status != [1, 1] or run.errors.count("\n") != 1 or not named:
        failures += describe(f"{name}, stop", run)
    again = run_to_end(workspace.args("sft", out), 2)
    if again.status != [0, 0] or difference(workspace.undisturbed("sft", 2), out):
        failures += describe(f"{name}, again", again)
    return failures


def skip_step(workspace: Workspace, name: str, change) -> list[str]:
    out = workspace.new_run()
    argv = workspace.args("sft", out, "--on_nonfinite=skip")
    run = run_to_end(argv, 2, before=change_loss(4, change))
    if (
        run.status != [0, 0]
        or logged(out, "warning", "skipped") != [1]
        or logged(out, "step", "step") != [0, 1, 2, 4, 5]
        or not torch.tensor(logged(out, "step", "loss")).isfinite().all()
    ):
        return describe(f"{name}, skip", run)
    return []


def train_without_targets(workspace: Workspace) -> list[str]:
    """Training rows of one token each, of which none is predicted."""
    folder = f"{workspace.folder}/texts"
    os.makedirs(folder, exist_ok=True)
    short_texts = [{"text": "x"}] * 8
    write_rows(f"{folder}/train.jsonl", short_texts)
    write_rows(f"{folder}/val.jsonl", short_texts + [{"text": f"{i} words"} for i in range(8)])
    write_meta(folder, "bytes", "made up")
    argv = workspace.args("sft", workspace.new_run(), f"--data={folder}", "--max_response=1")
    run = run_to_end(argv, 2)
    one_line = run.errors.count("\n") == 1
    if run.status != [1, 1] or "can be used" not in run.errors or not one_line:
        return describe("no targets", run)
    return []


def loss_spike(workspace: Workspace) -> list[str]:
    out = workspace.new_run()
    argv = workspace.args("sft", out, "--max_steps=16", "--loss_spike_factor=3")
    run = run_to_end(argv, 2, before=change_loss(14, lambda loss: 20 * loss))
    warnings = logged(out, "warning", "text")
    reported = len(warnings) == 1 and "times the recent median" in warnings[0]
    if run.status != [0, 0] or not reported or "rows: [" not in warnings[0]:
        return describe("spike", run)
    return []


def differing(workspace: Workspace, short: bool) -> Result:
    """ranks with another setting, other data, other code or another torch: refused in one line that
    names the rank"""
    cases = {
        "setting lr": other_setting,
        "data": other_data,
        "code": other_code,
        "torch": other_torch,
    }
    failures = []
    for name, before in cases.items():
        run = run_to_end(workspace.args("pretrain", workspace.new_run()), 2, before=before)
        named = f"rank 1 has a different {name} than rank 0" in run.errors
        if run.status != [1, 1] or run.errors.count("\n") != 1 or not named:
            failures.append(f"{name}: {run.status} {run.output[-800:]}")
    return count(len(cases), failures)


def other_setting(rank):
    load = train.config_module.load

    def load_other(argv, *classes):
        return load(argv + ["--lr=0.5"] * rank, *classes)

    train.config_module.load = load_other


def other_data(rank):
    read_meta = preflight.read_meta

    def read_other_meta(folder, files_needed):
        meta = read_meta(folder, files_needed)
        return meta | {"files": meta["files"] | {"other": rank}}

    preflight.read_meta = read_other_meta


def other_code(rank):
    sha256 = preflight.sha256
    preflight.sha256 = lambda path: sha256(path) + "x" * rank


def other_torch(rank):
    torch.__version__ += "x" * rank


# ---------------------------------------------------------------------------------- the same losses

GOLDEN = os.path.join(ROOT, "tests", "faults", "golden.json")
GOLDEN_STEPS = ["--max_steps=100", "--save_interval=100", "--eval_interval=100"]
MODERN_BLOCK = [
    "--position=rotary",
    "--norm=rmsnorm",
    "--mlp=swiglu",
    "--qk_norm=True",
    "--n_kv_head=1",
]
GOLDEN_RUNS = {  # name -> (stage, settings)
    "pretrain, GPT-2's block, AdamW": ("pretrain", ["--lr=3e-3", "--dropout=0"]),
    "pretrain, the modern block, Muon": (
        "pretrain",
        ["--lr=3e-3", "--dropout=0", "--optimizer=muon", *MODERN_BLOCK],
    ),
    "preference, K = 3": ("preference", ["--lr=3e-4"]),
}
# ten times the difference that another matrix library, or another order of the sums, has made
GOLDEN_TOLERANCE = {
    "pretrain, GPT-2's block, AdamW": 1.5e-4,
    "pretrain, the modern block, Muon": 2e-2,
    "preference, K = 3": 5e-6,
}


def golden(workspace: Workspace, short: bool) -> Result:
    """losses of 100 steps of three configs equal those in golden.json, except for rounding"""
    names = list(GOLDEN_RUNS)[: 1 if short else None]
    with open(GOLDEN, encoding="utf-8") as f:
        expected = json.load(f)
    failures = []
    differences = []
    for name in names:
        off = relative_difference(expected[name], golden_losses(workspace, name))
        differences.append(f"{off:.0e}")
        if off > GOLDEN_TOLERANCE[name]:
            failures.append(f"{name}: {off:.1e} off")
    return count(len(names), failures, f"off by {', '.join(differences)}")


def golden_losses(workspace: Workspace, name: str) -> list[float]:
    stage, settings = GOLDEN_RUNS[name]
    out = workspace.new_run()
    run = run_to_end(workspace.args(stage, out, *GOLDEN_STEPS, *settings))
    assert run.status == [0], run.output
    return [round(loss, 6) for loss in logged(out, "step", "loss")]


def write_golden(workspace: Workspace):
    lines = []
    for name in GOLDEN_RUNS:
        lines.append(f"{json.dumps(name)}: {json.dumps(golden_losses(workspace, name))}")
    with open(GOLDEN, "w", encoding="utf-8") as f:
        f.write("{" + ",\n ".join(lines) + "}\n")


def ranks(workspace: Workspace, short: bool) -> Result:
    """one run on 1, 2, 4 and 1 ranks in turn, 60 steps: losses within 1e-6 of one rank's"""
    steps = [
        "--max_steps=60",
        "--dropout=0",
        "--lr=3e-4",
        "--save_interval=15",
        "--eval_interval=30",
    ]
    one_rank = workspace.new_run()
    run = run_to_end(workspace.args("pretrain", one_rank, *steps))
    assert run.status == [0], run.output
    many_ranks = workspace.new_run()
    for num_ranks, last_step in ((1, 15), (2, 30), (4, 45), (1, 60)):
        argv = workspace.args("pretrain", many_ranks, *steps)
        run = run_to_end(argv, num_ranks, before=stop_at(last_step))
        assert set(run.status) <= {128 + signal.SIGTERM, 0}, run.output
    off = relative_difference(logged(one_rank, "step", "loss"), logged(many_ranks, "step", "loss"))
    failures = [f"{off:.1e} off"] if off > 1e-6 else []
    return count(1, failures, f"largest difference {off:.1e}")


def stop_at(last_step: int):
    """A `before`: a run behaves as if it had received SIGTERM before the save of this step."""

    def before(rank):
        save = checkpoint.save

        def save_and_stop(run, round_id, step, *args, **options):
            if step == last_step:
                elastic.received_signals.append(signal.SIGTERM)
            return save(run, round_id, step, *args, **options)

        checkpoint.save = save_and_stop

    return before


WAYS = [  # (ranks, settings); a short run has the first three
    (4, ["--hsdp_shard_size=2"]),
    (2, ["--hsdp_shard_size=1"]),
    (2, ["--activation_checkpointing=1"]),
    (2, ["--activation_checkpointing=2"]),
    (2, ["--fsdp_prefetch=1"]),
    (2, ["--reshard_after_forward=False"]),
    (2, ["--sample_sharded=True"]),
    (2, ["--sample_sharded=True", "--eval_rows=1"]),
    (1, ["--activation_checkpointing=1"]),
    (2, ["--compile=True", "--activation_checkpointing=1"]),
]


def ways(workspace: Workspace, short: bool) -> Result:
    """HSDP, activation checkpointing, prefetch, weights kept after forward, compiled blocks,
    sharded sampling: the same losses"""
    cases = WAYS[:3] if short else WAYS
    failures = []
    largest = 0.0
    for num_ranks, settings in cases:
        out = workspace.new_run()
        run = start(workspace.args("spin3", out, *settings), num_ranks)
        run.wait(400)
        if run.status != [0] * num_ranks:
            failures.append(f"{num_ranks} ranks {settings}: {run.status} {run.output[-1500:]}")
            continue
        undisturbed = workspace.undisturbed("spin3", min(num_ranks, 2))
        off = relative_difference(logged(undisturbed, "step", "loss"), logged(out, "step", "loss"))
        largest = max(largest, off)
        if off > 1e-5:
            failures.append(f"{num_ranks} ranks {settings}: {off:.1e} off")
    return count(len(cases), failures, f"largest difference {largest:.1e}")


# ---------------------------------------------------------------------------- memory, time of saves


def memory(workspace: Workspace, short: bool) -> Result:
    """bytes per rank of parameters, gradients (after each micro-batch) and optimizer fall as
    1 / ranks"""
    sizes = {}  # number of ranks -> for each rank {what: bytes}
    for num_ranks in (1, 2) if short else (1, 2, 4):
        sizes[num_ranks] = measure_memory(workspace, num_ranks)
    failures = []
    table = []
    for num_ranks, of_ranks in sizes.items():
        row = []
        for name, whole in sizes[1][0].items():
            bytes_per_rank = [size[name] for size in of_ranks]
            row.append(f"{name} {max(bytes_per_rank) / 2**20:.2f}")
            share = whole / num_ranks
            if not all(0.99 * share <= n <= 1.01 * share for n in bytes_per_rank):
                failures.append(f"{num_ranks} ranks, {name}: {bytes_per_rank} of {whole}")
        table.append(f"{num_ranks}: {', '.join(row)}")
    return count(3 * len(sizes), failures, f"MiB per rank, {'; '.join(table)}")


def measure_memory(workspace: Workspace, num_ranks: int) -> list[dict[str, int]]:
    """{parameters, gradients, optimizer: bytes} of each rank, in a run of one step."""
    out = workspace.new_run()
    argv = workspace.args(
        "pretrain",
        out,
        "--n_layer=4",
        "--n_embd=256",
        "--n_head=4",
        "--max_steps=1",
        "--eval_batches=1",
        "--eval_interval=1000",
        f"--micro_batch_tokens={256 // num_ranks}",
    )
    run = run_to_end(argv, num_ranks, before=lambda rank: write_sizes(f"{out}/sizes{rank}"))
    assert run.status == [0] * num_ranks, run.output
    found = []
    for rank in range(num_ranks):
        with open(f"{out}/sizes{rank}") as f:
            found.append(json.load(f))
    return found


def write_sizes(path: str):
    """Let this process write the sizes of its tensors to a file when it saves."""
    fit, backward, save = train.fit, train.backward, checkpoint.save
    params = []
    gradients = []  # bytes after each micro-batch

    def fit_and_note(run, *args):
        params.extend(run.model.parameters())
        fit(run, *args)

    def backward_and_measure(loss):
        backward(loss)
        gradients.append(sum(local_bytes(p.grad) for p in params if p.grad is not None))

    def measure_and_save(run, round_id, step, model, optimizers, **options):
        states = [state for o in optimizers for state in o.state.values()]
        optimizer_bytes = 0
        for state in states:
            optimizer_bytes += sum(local_bytes(t) for t in state.values() if torch.is_tensor(t))
        assert len(gradients) == 2, "the step should have two micro-batches"
        assert gradients[0] == gradients[1], "the second micro-batch leaves more than the first"
        sizes = {
            "parameters": sum(local_bytes(p) for p in params),
            "gradients": gradients[0],
            "optimizer": optimizer_bytes,
        }
        with open(path, "w") as f:
            json.dump(sizes, f)
        return save(run, round_id, step, model, optimizers, **options)

    train.fit = fit_and_note
    train.backward = backward_and_measure
    checkpoint.save = measure_and_save


def local_bytes(tensor) -> int:
    """The bytes of this rank's part of a tensor."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).nbytes


def pause(workspace: Workspace, short: bool) -> Result:
    """how long a save stops training, of how long it takes: less than half"""
    num_saves = 2 if short else 4
    out = workspace.new_run()
    argv = workspace.args(
        "pretrain",
        out,
        "--n_layer=6",
        "--n_embd=384",
        "--n_head=6",
        f"--max_steps={12 * num_saves}",
        "--save_interval=12",
        "--eval_interval=1000",
        "--eval_batches=1",
    )
    run = run_to_end(argv, 2, before=lambda rank: write_save_times(f"{out}/times{rank}"))
    assert run.status == [0, 0], run.output
    with open(f"{out}/times0") as f:
        times = json.load(f)
    stopped, total = (median(column) for column in zip(*times))
    failures = [] if stopped < total / 2 else [str(times)]
    note = (
        "10.7M parameters and AdamW's state, two ranks: "
        f"stopped for {1000 * stopped:.0f} ms of {1000 * total:.0f} ms"
    )
    return count(1, failures, note)


def median(values) -> float:
    return sorted(values)[len(values) // 2]


def write_save_times(path: str):
    """Let this process write, after its last save, (seconds that the call took, seconds until the
    checkpoint was written) of each save."""
    save, wait = checkpoint.save, checkpoint.Saver.wait
    times = []

    def timed_save(*args, **options):
        start_time = time.time()
        saving = save(*args, **options)
        stopped = time.time() - start_time
        saving.add_done_callback(lambda _: times.append((stopped, time.time() - start_time)))
        return saving

    def wait_and_write(saver, round_id, step, last=False):
        wait(saver, round_id, step, last)
        if last:
            with open(path, "w") as f:
                json.dump(times, f)

    checkpoint.save, checkpoint.Saver.wait = timed_save, wait_and_write


# -------------------------------------------------------------------------------------- two agents


def nodes(workspace: Workspace, short: bool) -> Result:
    """two torchrun agents on one machine, a worker each: one worker is killed, both restart"""
    undisturbed, out = workspace.undisturbed("spin3", 2), workspace.new_run()
    pids = f"{workspace.folder}/nodes"
    os.makedirs(pids, exist_ok=True)

    def write_pid(rank):
        sample_in_small_parts(rank)
        with open(f"{pids}/{rank}.{time.time():.3f}", "w") as f:
            f.write(str(os.getpid()))

    endpoint = f"127.0.0.1:{free_port()}"
    agents = []
    for _ in range(2):
        main = torchrun(3, write_pid, nodes=2, endpoint=endpoint)
        agents.append(start(workspace.args("spin3", out), main=main))
    killed = False
    start_time = time.time()
    while any(agent.poll() == [None] for agent in agents) and time.time() - start_time < 150:
        if not killed and os.path.exists(f"{out}/round_0/train.ref.npz"):
            newest = max(name for name in os.listdir(pids) if name.startswith("1."))
            with open(f"{pids}/{newest}") as f:
                os.kill(int(f.read()), signal.SIGKILL)
            killed = True
        time.sleep(0.02)
    for agent in agents:
        agent.kill()
        agent.reap()
    problem = compare(agents[0], undisturbed, out) or compare(agents[1], undisturbed, out)
    if problem or not killed:
        return count(1, [f"killed: {killed}; {problem}"])
    return count(1, [])
