"""Sections of the harness about runs that are killed, starved or damaged.

A section is called with (place, short) -> (how many held, of how many, [a line for each that did not], what was measured).
"""

import contextlib
import glob
import io
import os
import shutil
import signal
import subprocess
import time

from nanospin import checkpoint
from data.files import sha256
from tests.faults.harness import Fault, difference, elastic, forget, go, numbers, small_parts, start


def bitwise(place, short):
    """stages x ranks x dtypes: killed, resumed, equal to the last bit"""
    cells = [
        (stage, ranks, dtype)
        for stage in ("pretrain", "sft", "preference", "spin2", "spin3", "sampling", "ppo")
        for ranks in (1, 2)
        for dtype in ("float32", "bfloat16")
    ]
    failed = []
    cells = place.rng.sample(cells, 2) if short else cells
    for stage, ranks, dtype in cells:
        of = "spin3" if stage == "sampling" else stage
        more = [f"--dtype={dtype}"]
        out, whole = place.new(), place.undisturbed(of, ranks, *more)
        where, call = (
            ("rollout.respond", place.rng.randint(2, 8))
            if stage == "sampling"
            else ("train.lr_factor", place.rng.randint(2, 4))
        )
        faults = [Fault(where, "kill", rank, call) for rank in range(ranks)]
        run = start(
            place.args(of, out, *more),
            ranks,
            before=lambda rank: (small_parts(rank), faults[rank].arm()),
        )
        killed = run.wait()
        again = go(place.args(of, out, *more), ranks)
        what = difference(whole, out) if again.status == [0] * ranks else again.said[-2000:]
        if killed != [-9] * ranks or what:
            failed.append(f"{stage} on {ranks} ranks, {dtype}, {faults[0]}: {killed}, {what}")
    return len(cells) - len(failed), len(cells), failed, ""


PHASES = [
    ("data.batch_rows", 3),
    ("model.GPT.forward", 9),
    ("distributed.gather_full_model", 1),
    ("checkpoint.write", 2),
    ("checkpoint.thin", 2),
    ("rollout.respond", 3),
    ("eval.score", 2),
    ("train.evaluate", 2),
    ("checkpoint.save", 3),
    ("rollout.write_rows", 2),
    ("distributed.all_reduce_sum", 8),
    ("checkpoint.load_weights", 1),
]
FAULTS = [
    Fault(where, "kill", rank, call)
    for where, call in PHASES
    for rank in (0, 1)
    if (where, rank) not in {("checkpoint.thin", 1), ("rollout.write_rows", 1)}
] + [
    Fault("model.GPT.forward", "hang", 1, 9),
    Fault("rollout.respond", "hang", 0, 2),
    Fault("checkpoint.write", "hang", 1, 1),
    Fault("eval.score", "hang", 1, 3),
    Fault("data.batch_rows", "raise", 1, 3),
    Fault("model.GPT.forward", "raise", 0, 9),
    Fault("rollout.respond", "raise", 1, 2),
    Fault("checkpoint.save", "raise", 0, 2),
    Fault("train.lr_factor", "SIGTERM", 0, 2),
    Fault("train.lr_factor", "SIGTERM", 1, 4),
    Fault("rollout.respond", "SIGTERM", 1, 2),
    Fault("eval.score", "SIGTERM", 0, 2),
    Fault("train.evaluate", "SIGTERM", 1, 2),
    Fault("train.lr_factor", "SIGUSR1", 1, 3),
    Fault("train.evaluate", "SIGUSR1", 0, 1),
    Fault("train.lr_factor", "SIGINT", 0, 2),
    Fault("rollout.respond", "SIGINT", 0, 3),
    Fault("data.write_rows", "full", 0, 2),
    Fault("checkpoint.write_json", "full", 0, 1),
    Fault("os.fsync", "full", 1, 3),
]


def faults(place, short):
    """injected faults: the others end by themselves and say whom they lost; the same command finishes, equal to the last bit"""
    failed, whole, slowest = [], place.undisturbed("spin3", 2), 0.0
    chosen = (
        [
            FAULTS[0],
            next(f for f in FAULTS if f.what == "SIGTERM"),
            next(f for f in FAULTS if f.what == "full"),
        ]
        if short
        else FAULTS
    )
    for fault in chosen:
        out = place.new()
        argv = place.args("spin3", out, f"--timeout={8 if fault.what == 'hang' else 100}")
        run = start(argv, 2, fault, before=small_parts)
        began = None
        while None in run.poll():
            others = [s for r, s in enumerate(run.status) if r != fault.rank]
            if fault.what == "hang" and None not in others:
                run.kill()  # as torchrun does once a rank has failed
            if began is None and any(s is not None for s in run.status):
                began = time.time()
            if time.time() - run.began > 90:
                run.kill()
                run.poll_all()
                failed.append(f"{fault}: still there after 90 seconds: {run.said[-1000:]}")
                break
            time.sleep(0.01)
        slowest = max(slowest, time.time() - (began or time.time()))
        status, said = run.status, run.err
        expected = {
            "kill": status[fault.rank] == -9
            and status[1 - fault.rank] == 1
            and f"rank {fault.rank} " in said,
            "hang": status[1 - fault.rank] == 1 and f"rank {fault.rank} " in said,
            "raise": 1 in status and "an injected error" in said,
            "full": "No space left" in run.said,
        }.get(fault.what, status == [128 + getattr(signal, fault.what, 0)] * 2 and said == "")
        if (
            fault.what.startswith("SIG")
            and not lost_nothing(out)
            or "respond" in fault.where
            and fault.what.startswith("SIG")
            and sampled(out) < 16 * fault.call - 8
        ):
            failed.append(f"{fault}: steps or samples are lost")
        again = go(argv, 2)
        what = difference(whole, out) if again.status == [0, 0] else again.said[-1500:]
        if (
            fault.what == "full"
            and "warning" in what
            or "logged numbers" in what
            and fault.what == "full"
        ):
            what = weights_differ(whole, out)  # the run logged a warning that the other has not
        if not expected or what:
            failed.append(f"{fault}: {status} {said[-600:]!r}; then {what}")
        forget(run)
        forget(again)
    return (
        len(chosen) - len({line.split(":")[0] for line in failed}),
        len(chosen),
        failed,
        f"slowest end after the first rank's {slowest:.0f} s",
    )


def lost_nothing(out):
    """Whether the newest checkpoint is at the last logged step."""
    steps = (
        [r for r in numbers(out) if r["kind"] == "step"]
        if os.path.exists(f"{out}/metrics.jsonl")
        else []
    )
    if not steps:
        return True
    meta = checkpoint.read_meta(checkpoint.latest(out))
    return (meta["round"], meta["step"]) == (steps[-1]["round"], steps[-1]["step"] + 1)


def sampled(out):
    """How many responses are written down; a part is 16 of them, the last of a file 8."""
    files = [
        path for name in ("teacher_*", "round_*/self_*") for path in glob.glob(f"{out}/{name}")
    ]
    return sum(len(open(path, encoding="utf-8").readlines()) for path in files)


def weights_differ(a, b):
    return (
        ""
        if sha256(checkpoint.latest(a) + "/model.safetensors")
        == sha256(checkpoint.latest(b) + "/model.safetensors")
        else "weights differ"
    )


def soak(place, short):
    """random kills of one rank or both, at random times, until a run is done; each done run equal to the last bit"""
    failed, whole, kills, done, n = [], place.undisturbed("spin3", 2), 0, 0, 4 if short else 100
    out = place.new()
    while kills < n:
        run = start(place.args("spin3", out), 2, before=small_parts)
        until = time.time() + place.rng.uniform(0.2, 3.0)
        while None in run.poll() and time.time() < until:
            time.sleep(0.005)
        if None in run.poll():
            run.kill(ranks=place.rng.choice([[0, 1], [0], [1]]))
            time.sleep(0.05)
            run.kill()
            run.wait()
            kills += 1
            if kills % 40:
                continue
            run = go(place.args("spin3", out), 2)
        what = (
            difference(whole, out) if run.status == [0, 0] else f"{run.status} {run.said[-1500:]}"
        )
        if what:
            failed.append(f"after {kills} kills: {what}")
        done, out = done + 1, place.new()
        forget(run)
    return kills - len(failed), kills, failed, f"{done} runs came to their end"


def saves(place, short):
    """kills while a checkpoint is saved, thinned or renamed: whatever is there afterwards can be loaded"""
    failed, n = [], 5 if short else 100
    out, unloadable = place.new(), 0
    points = [
        "os.rename",
        "os.replace",
        "os.fsync",
        "os.mkdir",
        "os.remove",
        "shutil.rmtree",
        "checkpoint.sha256",
        "checkpoint.write_json",
        "checkpoint.write_tensors",
    ]
    hit = tries = 0
    while hit < n and tries < 3 * n:
        tries += 1
        fault = Fault(place.rng.choice(points), "kill", 0, place.rng.randint(1, 6))
        run = go(
            place.args(
                "pretrain", out, "--save_interval=1", "--max_steps=60", "--eval_interval=1000"
            ),
            1,
            fault,
        )
        hit += run.status == [-9]
        bad = [
            path
            for r in (0,)
            for path in checkpoint.list_steps(f"{out}/round_{r}")
            if checkpoint.find_corruption(path)
        ]
        unloadable += len(bad)
        if bad or run.status not in ([-9], [0]):
            failed.append(f"{fault}: {run.status} {bad} {run.said[-800:]}")
        if run.status == [0]:
            out = place.new()
        forget(run)
    return hit - len(failed), hit, failed, f"{unloadable} unloadable"


def restarts(place, short):
    """torchrun --max-restarts: workers killed again and again, one agent; the run ends by itself, equal to the last bit"""
    n, pids, long = (
        20,
        f"{place.folder}/pids",
        ["--max_steps=250", "--save_interval=5", "--eval_interval=50"],
    )
    whole, out = place.undisturbed("pretrain", 2, *long), place.new()
    os.makedirs(pids, exist_ok=True)

    def note(rank):
        small_parts(rank)
        with open(f"{pids}/{rank}.tmp", "w") as f:
            f.write(str(os.getpid()))
        os.replace(f"{pids}/{rank}.tmp", f"{pids}/{rank}")

    run = start(place.args("pretrain", out, *long), main=elastic(n, note))
    kills, last = 0, None
    while run.poll() == [None] and time.time() - run.began < 20 * n + 60:
        time.sleep(0.02)
        if (
            kills == n
            or not os.path.exists(f"{pids}/1")
            or (pid := int(open(f"{pids}/1").read())) == last
        ):
            continue
        time.sleep(place.rng.uniform(0.1, 2.0))
        if run.poll() == [None]:
            victim = int(open(f"{pids}/{place.rng.randint(0, 1)}").read())
            try:
                os.kill(victim, signal.SIGKILL)
                kills, last = kills + 1, pid
            except ProcessLookupError:
                pass
    status = run.wait(20 * n + 90)
    what = difference(whole, out) if status == [0] else f"{status} {run.said[-3000:]}"
    return (kills if not what else 0), kills, [what] if what else [], ""


def exits(place, short):
    """finished runs of two ranks under torchrun's agent: exit status 0"""
    n, failed = 3 if short else 50, []
    for _ in range(n):
        run = go(
            place.args("pretrain", place.new(), "--max_steps=1", "--eval_batches=1"), main=elastic()
        )
        if run.status != [0]:
            failed.append(f"{run.status} {run.said[-800:]}")
        forget(run)
    return n - len(failed), n, failed, ""


def corruption(place, short):
    """files of a checkpoint truncated, emptied, one bit flipped, swapped with another save's: noticed, named, the one before taken"""
    whole, failed, tried = place.undisturbed("pretrain", 2, "--tokenizer=bytes"), [], 0
    older, newest = checkpoint.list_steps(f"{whole}/round_0")
    names = [*checkpoint.list_files(newest), "manifest.json"]
    flips = 20 if short else 300
    kinds = [
        (name, kind) for name in names for kind in ("truncated", "emptied", "swapped", "removed")
    ] + [(place.rng.choice(names), "flipped") for _ in range(flips)]
    for name, kind in kinds:
        out = place.new()
        for path in (older, newest):
            shutil.copytree(path, path.replace(whole, out))
        file = os.path.join(newest.replace(whole, out), name)
        text = bytearray(open(file, "rb").read())
        other = open(os.path.join(older, name), "rb").read()
        if kind == "swapped" and other == text:
            continue
        tried += 1
        if kind == "flipped":
            text[place.rng.randrange(len(text))] ^= 1 << place.rng.randrange(8)
        with open(file, "wb") as f:
            f.write(
                {"truncated": text[: len(text) // 2], "emptied": b"", "swapped": other}.get(
                    kind, text
                )
            )
        if kind == "removed":
            os.remove(file)
        found = checkpoint.find_corruption(newest.replace(whole, out))
        with contextlib.redirect_stdout(io.StringIO()):
            taken = checkpoint.latest_valid(out)
        if name not in found or taken != older.replace(whole, out):
            failed.append(f"{name} {kind}: {found!r}, {taken} taken")
        shutil.rmtree(out)
    out = place.new()  # and the run itself goes on from the one before, to the same end
    shutil.copytree(whole, out)
    with open(
        checkpoint.latest(out)
        + "/optimizer/"
        + os.listdir(checkpoint.latest(out) + "/optimizer")[0],
        "r+b",
    ) as f:
        f.seek(-1, 2)
        f.write(b"x")
    tried += 1
    run = go(place.args("pretrain", out, "--tokenizer=bytes"), 2)
    what = difference(whole, out) if run.status == [0, 0] else run.said[-1000:]
    if what or "is damaged" not in run.said:
        failed.append(f"a run with a damaged newest checkpoint: {what}")
    return tried - len(failed), tried, failed, ""


def disks(place, short):
    """a disk that fills up or becomes read-only: said in a line; with room again the same end"""
    failed, tried, whole = [], 0, place.undisturbed("pretrain", 2)
    mount = f"{place.folder}/small"
    os.makedirs(mount, exist_ok=True)
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", mount], capture_output=True
    ).returncode:
        return 0, 0, [], "left out: no right to mount a small disk here"
    try:
        for case in ("full", "full later", "read-only"):
            tried += 1
            out = f"{mount}/{tried}"
            if case == "read-only":
                subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
            if case == "full later":
                subprocess.run(["mount", "-o", "remount,size=1500k", mount], check=True)
            run = go(place.args("pretrain", out), 2)
            ended = (
                0 not in run.status
                and "Traceback" not in run.said
                and ("No space left" in run.said or "Read-only" in run.said)
            )
            subprocess.run(["mount", "-o", "remount,rw,size=40m", mount], check=True)
            again = go(place.args("pretrain", out), 2)
            what = weights_differ(whole, out) if again.status == [0, 0] else again.said[-1500:]
            if not ended or what:
                failed.append(f"{case}: {run.status} {run.said[:6000]}; then {what}")
            shutil.rmtree(out)
            subprocess.run(["mount", "-o", "remount,size=900k", mount], check=True)
    finally:
        subprocess.run(["umount", mount])
    return tried - len(failed), tried, failed, ""
