"""The fault harness: what is promised of a run that is killed, starved, misled or lied to, each with its count.

    make test-faults                                        everything, at most 20 minutes on 2 cores
    python -m tests.faults --seed=2 bitwise faults          some sections
    python -m tests.faults --short                          a sample of each, as `make test` runs it

A line a section; what failed stands below it, and the exit status is 1 if anything did.
"""
import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

from safetensors import safe_open

from tests.faults.harness import ROOT, Fault, forget, start, strike

import checkpoint
import conftest
import rollout
import train
from data import sha256
from tests.faults.refusals import inputs, payloads

TINY, TEMPLATE = conftest.TINY, "--template=Q: {prompt}\nA: "


class Place:
    """The scratch folder with data, base runs and undisturbed runs to compare with."""
    def __init__(self, folder, seed):
        self.folder, self.rng, self.n, self.whole = folder, random.Random(seed), 0, {}
        self.data, self.runs = f"{folder}/data", {stage: f"{folder}/runs/{stage}" for stage in ("pretrain", "sft")}
        made = start([], main=lambda argv: conftest.make_runs(f"{folder}/runs", conftest.make_data(self.data)))
        assert made.wait() == [0], made.said

    def new(self):
        self.n += 1
        return f"{self.folder}/out/{self.n}"

    def args(self, stage, out, *more):
        """A small run of a stage: two to four saves, evaluations between them."""
        common = [f"--out_dir={out}", f"--data={self.data}", "--device=cpu", "--eval_rows=8", "--save_interval=2", "--eval_interval=2", "--batch_size=8", "--lr=1e-3"]
        if stage == "pretrain":
            return ["--stage=pretrain", "--max_steps=6", "--dropout=0.1", *common, *TINY, *more]
        common += [f"--init={self.runs['sft' if stage != 'sft' else 'pretrain']}", TEMPLATE, "--max_response=16"]
        if stage in ("sft", "preference"):
            return [f"--stage={stage}", "--max_steps=6", *common, *more]
        if stage == "ppo":
            return ["--stage=ppo", "--rounds=2", "--reward=data.pydocs.scorer:concrete", "--max_rows=16", *common, *more]
        teacher = ["--players=data,teacher,self", f"--teacher={self.runs['pretrain']}"] if stage == "spin3" else []
        return ["--stage=spin", "--rounds=2", "--max_steps=3", *common, *teacher, *more]

    def undisturbed(self, stage, ranks, *more):
        """Such a run that nothing happened to."""
        key = stage, ranks, more
        if key not in self.whole:
            run = go(self.args(stage, self.new(), *more), ranks)
            assert run.status == [0] * ranks, run.said
            self.whole[key] = f"{self.folder}/out/{self.n}"
            forget(run)
        return self.whole[key]


def small_parts(rank):
    rollout.PART = 16       # prompts: several parts a round


def go(argv, ranks=1, fault=None, **options):
    """A run to its end."""
    run = start(argv, ranks, fault, before=small_parts, **options)
    run.wait()
    return run


TIMES = ("seconds", "ms", "tokens_per_second", "mfu")


def numbers(out):
    with open(f"{out}/metrics.jsonl", encoding="utf-8") as f:
        return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in f]


def difference(a, b):
    """What of two runs is not bit for bit the same: every logged number but the clock's, weights, optimizer, samples, rows; or ""."""
    if numbers(a) != numbers(b):
        return "logged numbers differ"
    one, two = checkpoint.latest(a), checkpoint.latest(b)
    if not two or os.path.relpath(one, a) != os.path.relpath(two, b):
        return f"newest checkpoints are {one} and {two}"
    if tensors_of(one) != tensors_of(two):
        return "weights or optimizer states differ"
    names = [f"{r}/{f}" for r in sorted(os.listdir(a)) if r.startswith("round_") for f in sorted(os.listdir(f"{a}/{r}")) if f.endswith((".jsonl", ".npz"))]
    other = [name for name in names if not os.path.exists(f"{b}/{name}") or sha256(f"{a}/{name}") != sha256(f"{b}/{name}")]
    return f"files differ: {other}" if other else ""


def tensors_of(path):
    """{tensor's name and place: sha256} of a checkpoint."""
    found = {}
    for name in checkpoint.files_of(path):
        if name.endswith(".safetensors"):
            with safe_open(os.path.join(path, name), framework="np") as f:
                found |= {(name, key): hashlib.sha256(f.get_tensor(key).tobytes()).hexdigest() for key in f.keys()}
    return found


# ------------------------------------------------------------------------------------------------------------ sections
# (place, short) -> (how many held, of how many, [a line for each that did not], what was measured)


def bitwise(place, short):
    """stages x ranks x dtypes: killed, resumed, equal to the last bit"""
    cells = [(stage, ranks, dtype) for stage in ("pretrain", "sft", "preference", "spin2", "spin3", "sampling", "ppo") for ranks in (1, 2) for dtype in ("float32", "bfloat16")]
    failed = []
    cells = place.rng.sample(cells, 3) if short else cells
    for stage, ranks, dtype in cells:
        of = "spin3" if stage == "sampling" else stage
        more = [f"--dtype={dtype}"]
        out, whole = place.new(), place.undisturbed(of, ranks, *more)
        where, call = ("rollout.respond", place.rng.randint(2, 8)) if stage == "sampling" else ("train.lr_factor", place.rng.randint(2, 6 if of not in ("ppo", "spin2", "spin3") else 5))
        faults = [Fault(where, "kill", rank, call) for rank in range(ranks)]
        run = start(place.args(of, out, *more), ranks, before=lambda rank: (small_parts(rank), faults[rank].arm()))
        killed = run.wait()
        again = go(place.args(of, out, *more), ranks)
        what = difference(whole, out) if again.status == [0] * ranks else again.said[-2000:]
        if killed != [-9] * ranks or what:
            failed.append(f"{stage} on {ranks} ranks, {dtype}, {faults[0]}: {killed}, {what}")
    return len(cells) - len(failed), len(cells), failed, ""


PHASES = [("data.batch_rows", 3), ("model.GPT.forward", 9), ("parallel.whole", 1), ("checkpoint.write", 2), ("checkpoint.thin", 2), ("rollout.respond", 3), ("eval.score", 2), ("train.evaluate", 2),
          ("checkpoint.save", 3), ("rollout.write_rows", 2)]
FAULTS = [Fault(where, "kill", rank, call) for where, call in PHASES for rank in (0, 1) if (where, rank) not in {("checkpoint.thin", 1), ("rollout.write_rows", 1)}] + [
    Fault("model.GPT.forward", "hang", 1, 9), Fault("rollout.respond", "hang", 0, 2), Fault("checkpoint.write", "hang", 1, 1), Fault("eval.score", "hang", 1, 3),
    Fault("data.batch_rows", "raise", 1, 3), Fault("model.GPT.forward", "raise", 0, 9), Fault("rollout.respond", "raise", 1, 2), Fault("checkpoint.save", "raise", 0, 2),
    Fault("train.lr_factor", "SIGTERM", 0, 2), Fault("train.lr_factor", "SIGTERM", 1, 4), Fault("rollout.respond", "SIGTERM", 1, 2), Fault("eval.score", "SIGTERM", 0, 2), Fault("train.evaluate", "SIGTERM", 1, 2),
    Fault("train.lr_factor", "SIGUSR1", 1, 3), Fault("train.evaluate", "SIGUSR1", 0, 1), Fault("train.lr_factor", "SIGINT", 0, 2), Fault("rollout.respond", "SIGINT", 0, 3),
    Fault("data.write_rows", "full", 0, 2), Fault("checkpoint.write_json", "full", 0, 1), Fault("checkpoint.write_tensors", "full", 1, 3)]


def faults(place, short):
    """injected faults: the others end by themselves and say whom they lost; the same command finishes, equal to the last bit"""
    failed, whole, slowest = [], place.undisturbed("spin3", 2), 0.0
    chosen = [FAULTS[0], next(f for f in FAULTS if f.what == "SIGTERM"), next(f for f in FAULTS if f.what == "full")] if short else FAULTS
    for fault in chosen:
        out = place.new()
        argv = place.args("spin3", out, "--timeout=6")
        run = start(argv, 2, fault, before=small_parts)
        began = None
        while None in run.poll():
            others = [s for r, s in enumerate(run.status) if r != fault.rank]
            if fault.what == "hang" and None not in others:
                run.kill()          # as torchrun does once a rank has failed
            if began is None and any(s is not None for s in run.status):
                began = time.time()
            if time.time() - run.began > 60:
                run.kill()
                run.poll_all()
                failed.append(f"{fault}: still there after a minute: {run.said[-1000:]}")
                break
            time.sleep(0.01)
        slowest = max(slowest, time.time() - (began or time.time()))
        status, said = run.status, run.err
        expected = {"kill": status[fault.rank] == -9 and status[1 - fault.rank] == 1 and f"rank {fault.rank} " in said,
                    "hang": status[1 - fault.rank] == 1 and f"rank {fault.rank} " in said,
                    "raise": 1 in status and "an injected error" in said,
                    "full": "No space left" in run.said}.get(fault.what, status == [128 + getattr(signal, fault.what, 0)] * 2 and said == "")
        if fault.what.startswith("SIG") and not lost_nothing(out):
            failed.append(f"{fault}: steps are lost")
        again = go(argv, 2)
        what = difference(whole, out) if again.status == [0, 0] else again.said[-1500:]
        if fault.what == "full" and "warning" in what or "logged numbers" in what and fault.what == "full":
            what = weights_differ(whole, out)            # the run logged a warning that the other has not
        if not expected or what:
            failed.append(f"{fault}: {status} {said[-600:]!r}; then {what}")
        forget(run)
        forget(again)
    return len(chosen) - len({line.split(":")[0] for line in failed}), len(chosen), failed, f"slowest end after the first rank's {slowest:.0f} s"


def lost_nothing(out):
    """Whether the newest checkpoint is at the last logged step."""
    steps = [r for r in numbers(out) if r["kind"] == "step"] if os.path.exists(f"{out}/metrics.jsonl") else []
    if not steps:
        return True
    meta = checkpoint.read_meta(checkpoint.latest(out))
    return (meta["round"], meta["step"]) == (steps[-1]["round"], steps[-1]["step"] + 1)


def weights_differ(a, b):
    return "" if sha256(checkpoint.latest(a) + "/model.safetensors") == sha256(checkpoint.latest(b) + "/model.safetensors") else "weights differ"


def soak(place, short):
    """random kills of one rank or both, at random times, until a run is done; each done run equal to the last bit"""
    failed, whole, kills, done, n = [], place.undisturbed("spin3", 2), 0, 0, 4 if short else 100
    out = place.new()
    while kills < n:
        run = start(place.args("spin3", out), 2, before=small_parts)
        until = time.time() + place.rng.uniform(0.3, 4.5)
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
        what = difference(whole, out) if run.status == [0, 0] else f"{run.status} {run.said[-1500:]}"
        if what:
            failed.append(f"after {kills} kills: {what}")
        done, out = done + 1, place.new()
        forget(run)
    return kills - len(failed), kills, failed, f"{done} runs came to their end"


def saves(place, short):
    """kills while a checkpoint is saved, thinned or renamed: whatever is there afterwards can be loaded"""
    failed, n = [], 5 if short else 100
    out, unloadable = place.new(), 0
    points = ["os.rename", "os.replace", "os.fsync", "os.mkdir", "os.remove", "shutil.rmtree", "checkpoint.sha256", "checkpoint.write_json", "checkpoint.write_tensors"]
    hit = tries = 0
    while hit < n and tries < 3 * n:
        tries += 1
        fault = Fault(place.rng.choice(points), "kill", 0, place.rng.randint(1, 6))
        run = go(place.args("pretrain", out, "--save_interval=1", "--max_steps=60", "--eval_interval=1000"), 1, fault)
        hit += run.status == [-9]
        bad = [path for r in (0,) for path in checkpoint.steps_of(f"{out}/round_{r}") if checkpoint.damage(path)]
        unloadable += len(bad)
        if bad or run.status not in ([-9], [0]):
            failed.append(f"{fault}: {run.status} {bad} {run.said[-800:]}")
        if run.status == [0]:
            out = place.new()
        forget(run)
    return hit - len(failed), hit, failed, f"{unloadable} unloadable"


class Left(BaseException):
    pass


def elastic(restarts=0, before=None):
    """A main for `start`: torchrun's own agent with two workers, which are forked too."""
    def worker(argv):
        import parallel
        leave = os._exit

        def left(status):       # multiprocessing's workers return to the agent
            if threading.current_thread() is not threading.main_thread() or status:
                leave(status)
            raise Left
        os._exit = left
        if before:
            before(int(os.environ["RANK"]))
        try:
            sys.exit(parallel.run(train.main, argv))
        except Left:
            os._exit = leave

    def main(argv):
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch
        elastic_launch(LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="x", max_restarts=restarts, start_method="fork", rdzv_backend="c10d",
                                    rdzv_endpoint="127.0.0.1:0", monitor_interval=0.05), worker)(argv)
    return main


def restarts(place, short):
    """torchrun --max-restarts: workers killed again and again, one agent; the run ends by itself, equal to the last bit"""
    n, out, pids = 2 if short else 20, place.new(), f"{place.folder}/pids"
    whole = place.undisturbed("spin3", 2)
    os.makedirs(pids, exist_ok=True)

    def note(rank):
        small_parts(rank)
        with open(f"{pids}/{rank}.tmp", "w") as f:
            f.write(str(os.getpid()))
        os.replace(f"{pids}/{rank}.tmp", f"{pids}/{rank}")
    run = start(place.args("spin3", out), main=elastic(n, note))
    kills, last = 0, None
    while run.poll() == [None] and time.time() - run.began < 20 * n + 60:
        time.sleep(0.02)
        if kills == n or not os.path.exists(f"{pids}/1") or (pid := int(open(f"{pids}/1").read())) == last:
            continue
        time.sleep(place.rng.uniform(0.2, 3.0))
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
        run = go(place.args("pretrain", place.new(), "--max_steps=1", "--eval_batches=1"), main=elastic())
        if run.status != [0]:
            failed.append(f"{run.status} {run.said[-800:]}")
        forget(run)
    return n - len(failed), n, failed, ""


def corruption(place, short):
    """files of a checkpoint truncated, emptied, one bit flipped, swapped with another save's: noticed, named, the one before taken"""
    whole, failed, tried = place.undisturbed("pretrain", 2, "--tokenizer=bytes"), [], 0
    older, newest = checkpoint.steps_of(f"{whole}/round_0")
    names = [*checkpoint.files_of(newest), "manifest.json"]
    flips = 20 if short else 300
    kinds = [(name, kind) for name in names for kind in ("truncated", "emptied", "swapped", "removed")] + [(place.rng.choice(names), "flipped") for _ in range(flips)]
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
            f.write({"truncated": text[:len(text) // 2], "emptied": b"", "swapped": other}.get(kind, text))
        if kind == "removed":
            os.remove(file)
        found = checkpoint.damage(newest.replace(whole, out))
        with contextlib.redirect_stdout(io.StringIO()):
            taken = checkpoint.newest_good(out)
        if not (name in found or "manifest" in found) or taken != older.replace(whole, out):
            failed.append(f"{name} {kind}: {found!r}, {taken} taken")
        shutil.rmtree(out)
    out = place.new()       # and the run itself goes on from the one before, to the same end
    shutil.copytree(whole, out)
    with open(checkpoint.latest(out) + "/optimizer/" + os.listdir(checkpoint.latest(out) + "/optimizer")[0], "r+b") as f:
        f.seek(-1, 2)
        f.write(b"x")
    tried += 1
    run = go(place.args("pretrain", out, "--tokenizer=bytes"), 2)
    what = difference(whole, out) if run.status == [0, 0] else run.said[-1000:]
    if what or "is damaged" not in run.said:
        failed.append(f"a run with a damaged newest checkpoint: {what}")
    return tried - len(failed), tried, failed, ""


def disks(place, short):
    """a disk that fills up, a folder that becomes read-only, one that vanishes: said in a line; with room again the same end"""
    failed, tried, whole = [], 0, place.undisturbed("pretrain", 2)
    mount = f"{place.folder}/small"
    os.makedirs(mount, exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", mount], capture_output=True).returncode:
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
            ended = 0 not in run.status and "Traceback" not in run.said and ("No space left" in run.said or "Read-only" in run.said)
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


SECTIONS = [bitwise, faults, soak, saves, restarts, exits, corruption, disks]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[[], *(s.__name__ for s in SECTIONS)])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--short", action="store_true")
    args = parser.parse_args()
    os.chdir(ROOT)
    wrong, began = 0, time.time()
    with tempfile.TemporaryDirectory() as folder:
        place = Place(folder, args.seed)
        tempfile.tempdir = folder
        for section in SECTIONS:
            if args.sections and section.__name__ not in args.sections:
                continue
            start_of = time.time()
            held, tried, failed, note = section(place, args.short)
            print(f"{section.__name__:<12} {held:>4} of {tried:<4} {section.__doc__}{f' ({note})' if note else ''} [{time.time() - start_of:.0f} s]", flush=True)
            for line in failed:
                print(f"    {line}", flush=True)
            wrong += len(failed)
    print(f"seed {args.seed}: {'everything held' if not wrong else f'{wrong} did not hold'}, {time.time() - began:.0f} s")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
