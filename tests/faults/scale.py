"""Sections of the harness about ranks and numbers: the same losses on any number of ranks, and the same decision on all."""

import json
import os
import signal
import time

import torch

from nanospin import preflight
from nanospin import elastic
from nanospin import distributed
import train
from data.folder import write_meta
from data.rows import write_rows
from tests.faults.harness import ROOT, difference, elastic, free_port, go, small_parts, start


def logged(out, kind, key):
    with open(f"{out}/metrics.jsonl", encoding="utf-8") as f:
        return [r[key] for r in map(json.loads, f) if r["kind"] == kind and key in r]


def apart(a, b):
    """The largest relative difference of two lists of numbers."""
    return max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))


def on_call(stage, number, bad, only=1):
    """A `before`: on rank `only` the objective's loss of micro-batch `number` becomes bad(loss, logps)."""

    def before(rank):
        good, calls = train.OBJECTIVES[stage], [0]

        def objective(logps, *rest):
            calls[0] += 1
            loss, metrics = good(logps, *rest)
            return (
                bad(loss, logps) if calls[0] == number and rank in (only, only - 2) else loss
            ), metrics

        train.OBJECTIVES[stage] = objective

    return before


def figures(place, short):
    """not a number in one rank's batch, an infinite gradient, a batch with nothing asked, a spike: all ranks decide alike"""
    failed = []

    def check(name, run, ok):
        if not ok():
            failed.append(f"{name}: {run.status} {run.said[-1500:]}")

    nan = lambda loss, logps: loss * float("nan")
    steep = lambda loss, logps: (
        loss + (logps.float().sum() * 0).sqrt()
    )  # its value is 0, its slope infinite
    for name, bad in (("loss", nan), ("gradient", steep))[short:]:
        out = place.new()
        run = go(place.args("sft", out), 2, before=on_call("sft", 4, bad))
        check(
            f"{name}, stop",
            run,
            lambda: (
                run.status == [1, 1]
                and run.err.count("\n") == 1
                and "round 0 step 3: loss" in run.err
                and "step_000002" in run.err
                and "rows: [" in run.err
            ),
        )
        again = go(place.args("sft", out), 2)
        check(
            f"{name}, again",
            again,
            lambda: again.status == [0, 0] and not difference(place.undisturbed("sft", 2), out),
        )
        out = place.new()
        run = go(place.args("sft", out, "--on_nonfinite=skip"), 2, before=on_call("sft", 4, bad))
        check(
            f"{name}, skip",
            run,
            lambda: (
                run.status == [0, 0]
                and logged(out, "warning", "skipped") == [1]
                and logged(out, "step", "step") == [0, 1, 2, 4, 5]
                and all(torch.tensor(logged(out, "step", "loss")).isfinite())
            ),
        )
    folder, out = f"{place.folder}/texts", place.new()
    os.makedirs(folder, exist_ok=True)
    for split in ("train", "val"):
        write_rows(
            f"{folder}/{split}.jsonl",
            [{"text": "x"}] * 8
            + [{"text": f"{i} some words"} for i in range(8 * (split == "val"))],
        )
    write_meta(folder, "bytes", "made up")
    run = go(place.args("sft", out, f"--data={folder}", "--max_response=1"), 2)
    check(
        "nothing asked",
        run,
        lambda: run.status == [1, 1] and "is left" in run.err and run.err.count("\n") == 1,
    )
    out = place.new()
    run = go(
        place.args("sft", out, "--max_steps=16", "--loss_spike_factor=3"),
        2,
        before=on_call("sft", 14, lambda loss, logps: 20 * loss),
    )
    check(
        "spike",
        run,
        lambda: (
            run.status == [0, 0]
            and [
                "times the median loss" in text and "rows: [" in text
                for text in logged(out, "warning", "text")
            ]
            == [True]
        ),
    )
    n = 5 if short else 8
    return n - len(failed), n, failed, ""


def differing(place, short):
    """ranks with another config, other data, other code or another torch: refused in one line that names the rank"""

    def config(rank):
        load = train.config.load
        train.config.load = lambda argv: load(argv + ["--lr=0.5"] * rank)

    def data(rank):
        read = preflight.read_meta
        preflight.read_meta = lambda *args: (
            (meta := read(*args)) | {"files": {**meta["files"], "other": rank}}
        )

    def code(rank):
        sha256 = preflight.sha256
        preflight.sha256 = lambda path: sha256(path) + "x" * rank

    def version(rank):
        torch.__version__ += "x" * rank

    failed = []
    for name, before in (("lr", config), ("data", data), ("code", code), ("torch", version)):
        run = go(place.args("pretrain", place.new()), 2, before=before)
        if (
            run.status != [1, 1]
            or run.err.count("\n") != 1
            or f"rank 1 has another {'setting ' * (name == 'lr')}{name}" not in run.err
        ):
            failed.append(f"{name}: {run.status} {run.said[-800:]}")
    return 4 - len(failed), 4, failed, ""


GOLDEN = os.path.join(ROOT, "tests", "faults", "golden.json")
GOLDEN_MORE = ["--max_steps=100", "--save_interval=100", "--eval_interval=100"]
GOLDEN_RUNS = {  # (stage, settings, ten times what another matrix library or another order of the sums made of it)
    "pretrain, GPT-2's block, AdamW": ("pretrain", ["--lr=3e-3", "--dropout=0"], 1.5e-4),
    "pretrain, the modern block, Muon": (
        "pretrain",
        [
            "--lr=3e-3",
            "--dropout=0",
            "--optimizer=muon",
            "--position=rotary",
            "--norm=rmsnorm",
            "--mlp=swiglu",
            "--qk_norm=True",
            "--n_kv_head=1",
        ],
        2e-2,
    ),
    "preference, K = 3": ("preference", ["--lr=3e-4"], 5e-6),
}


def golden(place, short, write=False):
    """losses of 100 steps of three configs as they are kept in golden.json, but for rounding"""
    found = {}
    for name, (stage, more, _) in list(GOLDEN_RUNS.items())[: 1 if short else 3]:
        out = place.new()
        run = go(place.args(stage, out, *GOLDEN_MORE, *more), 1)
        assert run.status == [0], run.said
        found[name] = [round(loss, 6) for loss in logged(out, "step", "loss")]
    if write:
        with open(GOLDEN, "w", encoding="utf-8") as f:
            f.write(
                "{"
                + ",\n ".join(
                    f"{json.dumps(name)}: {json.dumps(losses)}" for name, losses in found.items()
                )
                + "}\n"
            )
    with open(GOLDEN, encoding="utf-8") as f:
        before = json.load(f)
    off = {name: apart(before[name], losses) for name, losses in found.items()}
    failed = [f"{name}: {off[name]:.1e} off" for name in off if off[name] > GOLDEN_RUNS[name][2]]
    return (
        len(found) - len(failed),
        len(found),
        failed,
        ", ".join(f"{value:.0e}" for value in off.values()) + " off",
    )


def ranks(place, short):
    """one run on 1, 2, 4 and 1 ranks in turn, 60 steps: losses within 1e-6 of one rank's"""
    one, many = place.new(), place.new()
    steps = [
        "--max_steps=60",
        "--dropout=0",
        "--lr=3e-4",
        "--save_interval=15",
        "--eval_interval=30",
    ]
    run = go(place.args("pretrain", one, *steps), 1)
    assert run.status == [0], run.said
    for n, until in ((1, 15), (2, 30), (4, 45), (1, 60)):

        def stop_at(rank, until=until):
            good = train.checkpoint.save

            def save(run, round_id, step, *rest):
                elastic.received_signals += [15] * (step == until)
                return good(run, round_id, step, *rest)

            train.checkpoint.save = save

        run = go(place.args("pretrain", many, *steps), n, before=stop_at)
        assert set(run.status) <= {143, 0}, run.said
    off = apart(logged(one, "step", "loss"), logged(many, "step", "loss"))
    return (
        int(off <= 1e-6),
        1,
        [] if off <= 1e-6 else [f"{off:.1e} off"],
        f"largest difference {off:.1e}",
    )


def ways(place, short):
    """HSDP, activation checkpointing, prefetch, weights kept after forward, compiled blocks, sharded sampling: the same losses"""
    failed, offs = [], {}
    cases = [
        (4, ["--hsdp_shard_size=2"]),
        (2, ["--hsdp_shard_size=1"]),
        (2, ["--activation_checkpointing=1"]),
        (2, ["--activation_checkpointing=2"]),
        (2, ["--prefetch=1"]),
        (2, ["--reshard_after_forward=False"]),
        (2, ["--sample_sharded=True"]),
        (2, ["--sample_sharded=True", "--eval_rows=1"]),
    ]
    cases += [] if short else [(1, ["--activation_checkpointing=1"]), (2, ["--compile=True", "--activation_checkpointing=1"])]
    for n, more in cases[:3] if short else cases:
        out = place.new()
        run = start(place.args("spin3", out, *more), n)
        run.wait(400)
        if run.status != [0] * n:
            failed.append(f"{n} ranks {more}: {run.status} {run.said[-1500:]}")
            continue
        whole = place.undisturbed("spin3", min(n, 2))
        offs[more[0]] = apart(logged(whole, "step", "loss"), logged(out, "step", "loss"))
        if offs[more[0]] > 1e-5:
            failed.append(f"{n} ranks {more}: {offs[more[0]]:.1e} off")
    n = 3 if short else len(cases)
    return n - len(failed), n, failed, f"largest difference {max(offs.values(), default=0):.1e}"


def memory(place, short):
    """bytes a rank of parameters, gradients (after each micro-batch) and optimizer fall as 1 / ranks"""
    found = {}
    for n in (1, 2) if short else (1, 2, 4):
        out = place.new()

        def note(rank):
            run, backward, save, models, sizes = (
                train.run,
                train.backward,
                train.checkpoint.save,
                [],
                {"gradients": []},
            )
            local = lambda t: (t.to_local() if hasattr(t, "to_local") else t).nbytes

            def run_(model, *rest):
                models.append(model)
                return run(model, *rest)

            def backward_(loss):
                backward(loss)
                params = list(models[-1].parameters())
                sizes["parameters"] = sum(map(local, params))
                sizes["gradients"].append(
                    sum(local(p.grad) if p.grad is not None else 0 for p in params)
                )

            def save_(run, round_id, step, model, optimizers, *rest):
                sizes["optimizer"] = sum(
                    local(t)
                    for o in optimizers
                    for state in o.state.values()
                    for t in state.values()
                    if torch.is_tensor(t)
                )
                first, *more = sizes["gradients"]
                assert more == [first], "what two micro-batches leave is not as large"
                with open(f"{out}/sizes{rank}", "w") as f:
                    json.dump(sizes | {"gradients": first}, f)
                return save(run, round_id, step, model, optimizers, *rest)

            train.run, train.backward, train.checkpoint.save = run_, backward_, save_

        run = go(
            place.args(
                "pretrain",
                out,
                "--n_layer=4",
                "--n_embd=256",
                "--n_head=4",
                "--max_steps=1",
                "--eval_batches=1",
                "--eval_interval=1000",
                f"--micro_batch_tokens={256 // n}",
            ),
            n,
            before=note,
        )
        assert run.status == [0] * n, run.said
        found[n] = [json.load(open(f"{out}/sizes{rank}")) for rank in range(n)]
    failed = []
    for n, sizes in found.items():
        for name, whole in found[1][0].items():
            if not all(whole / n * 0.99 <= s[name] <= whole / n * 1.01 for s in sizes):
                failed.append(f"{n} ranks, {name}: {[s[name] for s in sizes]} of {whole}")
    table = "; ".join(
        f"{n}: "
        + ", ".join(f"{name} {max(s[name] for s in sizes) / 2**20:.2f}" for name in sizes[0])
        for n, sizes in found.items()
    )
    return 3 * len(found) - len(failed), 3 * len(found), failed, f"MiB a rank, {table}"


def pause(place, short):
    """how long a save holds up the training, of how long it takes; a loop that went on meanwhile"""
    out, n = place.new(), 2 if short else 4

    def note(rank):
        save, settle, times = train.checkpoint.save, train.wait_for_save, []

        def save_(*args):
            began = time.time()
            saving = save(*args)
            held = time.time() - began
            saving.add_done_callback(lambda _: times.append((held, time.time() - began)))
            return saving

        def settle_(saving, cfg, round_id, step, log, last=False):
            settle(saving, cfg, round_id, step, log, last)
            if last and rank == 0:
                with open(f"{out}/times", "w") as f:
                    json.dump(times, f)

        train.checkpoint.save, train.wait_for_save = save_, settle_

    run = go(
        place.args(
            "pretrain",
            out,
            "--n_layer=6",
            "--n_embd=384",
            "--n_head=6",
            f"--max_steps={12 * n}",
            "--save_interval=12",
            "--eval_interval=1000",
            "--eval_batches=1",
        ),
        2,
        before=note,
    )
    assert run.status == [0, 0], run.said
    times = json.load(open(f"{out}/times"))
    held, whole = (sorted(column)[len(times) // 2] for column in zip(*times))
    ok = held < whole / 2
    return (
        int(ok),
        1,
        [] if ok else [str(times)],
        f"10.7M parameters and AdamW's state, two ranks: held up {1000 * held:.0f} ms of {1000 * whole:.0f} ms",
    )


def nodes(place, short):
    """two torchrun agents on the loopback, a worker each; one of the workers is killed, both restart"""
    whole, out, port, pids = (
        place.undisturbed("spin3", 2),
        place.new(),
        free_port(),
        f"{place.folder}/nodes",
    )
    os.makedirs(pids, exist_ok=True)

    def note(rank):
        small_parts(rank)
        with open(f"{pids}/{rank}.{time.time():.3f}", "w") as f:
            f.write(str(os.getpid()))

    agents = [
        start(
            place.args("spin3", out), main=elastic(3, note, nodes=2, endpoint=f"127.0.0.1:{port}")
        )
        for _ in range(2)
    ]
    killed, began = False, time.time()
    while any(agent.poll() == [None] for agent in agents) and time.time() - began < 150:
        if not killed and os.path.exists(f"{out}/round_0/train.ref.npz"):
            newest = sorted(name for name in os.listdir(pids) if name.startswith("1."))[-1]
            os.kill(int(open(f"{pids}/{newest}").read()), signal.SIGKILL)
            killed = True
        time.sleep(0.02)
    for agent in agents:
        agent.kill()
        agent.poll_all()
    status = [agent.status[0] for agent in agents]
    what = (
        difference(whole, out)
        if status == [0, 0]
        else f"{status} " + "".join(agent.said[-2500:] for agent in agents)
    )
    return (
        int(killed and not what),
        1,
        [f"killed: {killed}; {what}"] if what or not killed else [],
        "",
    )
