"""Every check and measurement for one GPU, from one command.

    bash bench/gpu.sh OUT             all of them, within --budget seconds
    bash bench/gpu.sh OUT decode      some of them; --help names all
    bash bench/gpu.sh OUT --small     the same code at toy size on a CPU, to see that it runs

Each check and each measurement is a process of its own with a time limit, and the others go on if
it fails. --jobs of them run at a time: the checks, and the preparation of the measurements, which
build and compile a model. A measurement that is ready leaves its place to the next and waits. When
all are ready, they measure one after the other. Each prints one line. OUT receives a log and a
JSON file for each, ratios.json and table.md.

Times are medians, with the GPU synchronized before and after. MFU counts the FLOPs of
GPT.flops_per_token at the card's dense bfloat16 peak, for both sides.
"""

import argparse
import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from bench import gpu_checks, gpu_speed
from bench.baselines import ROOT
from bench.gpu_setup import SMALL, Bench, Size
from data import cli
from data.files import write_json
from nanospin import distributed

CPUS = len(os.sched_getaffinity(0))
JOBS = max(2, min(12, CPUS * 3 // 4))

# name -> (function, seconds that it may take). Those that take long begin first.
CHECKS = {
    "resume_spin": (gpu_checks.resume_spin, 150),
    "torchrun": (gpu_checks.torchrun, 150),
    "resume_pretrain": (gpu_checks.resume_pretrain, 150),
    "attention": (gpu_checks.attention_values, 150),
    "float32": (gpu_checks.float32, 150),
    "two_ranks": (gpu_checks.two_ranks, 130),
    "fsdp": (gpu_checks.fsdp, 130),
    "sampled_ids": (gpu_checks.sampled_ids, 130),
}

# The seconds are for the preparation and, again, for the turn. Profiles are last: what they compile
# is in Inductor's cache by then.
MEASUREMENTS = {
    "versions": (gpu_speed.versions, 60),
    "preference_padded": (gpu_speed.preference_padded, 120),
    "preference_each": (gpu_speed.preference_each, 120),
    "preference": (gpu_speed.preference, 120),
    "preference_flex": (gpu_speed.preference_flex, 120),
    "pretrain_nanogpt": (gpu_speed.pretrain_nanogpt, 120),
    "pretrain": (gpu_speed.pretrain, 120),
    "pretrain_eager": (gpu_speed.pretrain_eager, 120),
    "self_play": (gpu_speed.self_play, 120),
    "attention_speed": (gpu_speed.attention_speed, 120),
    "head": (gpu_speed.head, 100),
    "decode": (gpu_speed.decode, 100),
    "decode_transformers": (gpu_speed.decode_transformers, 100),
    "profile_preference": (gpu_speed.profile_preference, 120),
    "profile_pretrain": (gpu_speed.profile_pretrain, 120),
    "profile_decode": (gpu_speed.profile_decode, 120),
}
ALL = CHECKS | MEASUREMENTS

# name -> ((measurement, its number), the same of what it is divided by)
RATIOS = {
    "pretrain to nanoGPT": (("pretrain", "tokens/s"), ("pretrain_nanogpt", "tokens/s")),
    "pretrain, compiled to eager": (("pretrain", "tokens/s"), ("pretrain_eager", "tokens/s")),
    "preference to padded": (
        ("preference", "target tokens/s"),
        ("preference_padded", "target tokens/s"),
    ),
    "preference to a forward each": (
        ("preference", "target tokens/s"),
        ("preference_each", "target tokens/s"),
    ),
    "preference, FlashAttention to FlexAttention": (
        ("preference", "target tokens/s"),
        ("preference_flex", "target tokens/s"),
    ),
    "decode to transformers": (("decode", "tokens/s"), ("decode_transformers", "tokens/s")),
    "decode to the floor": (("decode", "decode tokens/s"), ("decode", "floor tokens/s")),
}


def find_ratios(out) -> dict[str, float]:
    """Of the speeds in the JSON files of the folder `out`. A ratio needs both."""
    ratios = {}
    for name, pair in RATIOS.items():
        rates = [read_number(out, *place) for place in pair]
        if None not in rates:
            ratios[name] = rates[0] / rates[1]
    return ratios


def read_number(out, name, key):
    """None if it was not measured."""
    path = f"{out}/{name}.json"
    if not os.path.exists(path):
        return None
    with open(path) as f:
        return json.load(f).get(key)


class Job:
    """A check or a measurement in a process of its own."""

    def __init__(self, name, args):
        self.name = name
        self.path = f"{args.out}/{name}"
        self.seconds = 0.0  # in which it ran, without waiting for its turn
        self.problem = ""
        self.has_ended = False
        for ending in (".json", ".ready", ".go"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.path + ending)
        command = [sys.executable, "-m", "bench.gpu", args.out, f"--check={name}"]
        if args.small:
            command.append("--small")
        threads = max(1, CPUS // args.jobs)
        with open(f"{self.path}.log", "w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its children end with it
            )

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def is_ready(self) -> bool:
        return os.path.exists(f"{self.path}.ready")

    def prepare(self, deadline):
        """Wait until it has ended or is ready for its turn."""
        self.wait("", deadline, self.is_ready)

    def take_turn(self, deadline):
        """Let it measure, and wait until it has ended."""
        open(f"{self.path}.go", "w").close()
        self.wait("its turn was ", deadline, lambda: False)

    def wait(self, what, deadline, is_done):
        """Wait until it has ended or is_done(), and end it if that takes too long."""
        start = time.time()
        limit = min(ALL[self.name][1], deadline - start)
        while self.is_alive() and not is_done():
            if time.time() - start > limit:
                self.problem = f"{what}longer than {max(0, limit):.0f} s, see {self.path}.log"
                self.end()
            time.sleep(0.02)
        self.seconds += time.time() - start
        if not self.is_alive():
            self.end()

    def end(self):
        """End the process and its children. A live one writes to its log where it is."""
        if self.has_ended:
            return
        self.has_ended = True
        with contextlib.suppress(ProcessLookupError):
            if self.is_alive():
                self.process.send_signal(signal.SIGUSR1)
                time.sleep(0.3)
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def result(self) -> dict:
        """Prints the line of an ended job -> {"name", "ok", "text", "seconds"}."""
        if self.problem:
            return report(self.name, False, self.problem, self.seconds)
        if self.process.returncode or not os.path.exists(f"{self.path}.json"):
            with open(f"{self.path}.log") as f:
                lines = f.read().split("\n")
            last = [line for line in lines if line.strip()][-1:] or ["no output"]
            text = f"{last[0][:200]} (see {self.path}.log)"
            return report(self.name, False, text, self.seconds)
        with open(f"{self.path}.json") as f:
            found = json.load(f)
        text = ", ".join(f"{key} {show(value)}" for key, value in found.items())
        return report(self.name, True, text, self.seconds)


def report(name, ok, text, seconds):
    print(f"{'ok  ' if ok else 'FAIL'} {name:<19} {seconds:5.0f} s  {text}", flush=True)
    return {"name": name, "ok": ok, "text": text, "seconds": seconds}


def show(value):
    """A number with four digits."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def run_all(args) -> int:
    """All checks and measurements, or those that are named. Returns 1 if one failed."""
    os.makedirs(args.out, exist_ok=True)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp(prefix="inductor"))
    start = time.time()
    # the rest is for the turns
    ready_by, end_by = start + 0.7 * args.budget, start + args.budget
    chosen = args.names or list(ALL)
    jobs, results = [], []  # jobs: all that were started

    def prepare(name) -> Job | None:
        """The job if it waits for its turn."""
        if ready_by - time.time() < 5:
            results.append(report(name, False, "not run: out of time", 0.0))
            return None
        job = Job(name, args)
        jobs.append(job)
        job.prepare(ready_by)
        if job.is_alive():
            return job
        results.append(job.result())
        return None

    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            waiting = list(pool.map(prepare, [name for name in ALL if name in chosen]))
            print(f"     all is ready after {time.time() - start:.0f} s", flush=True)
            for job in waiting:
                if job is not None:
                    job.take_turn(end_by)
                    results.append(job.result())
        finally:
            for job in jobs:  # after Ctrl-C
                job.end()
    results.sort(key=lambda result: list(ALL).index(result["name"]))
    ratios = find_ratios(args.out)
    write_json(f"{args.out}/ratios.json", ratios)
    write_table(args.out, results, ratios)
    failed = [result["name"] for result in results if not result["ok"]]
    done = f"{len(results) - len(failed)} of {len(results)} ok in {time.time() - start:.0f} s"
    print(f"{done}; {args.out}/table.md")
    return 1 if failed else 0


def write_table(out, results, ratios):
    """OUT/table.md. Prints the ratios."""
    lines = ["| check | | seconds | |", "|---|---|---:|---|"]
    for result in results:
        ok = "ok" if result["ok"] else "FAIL"
        lines.append(f"| {result['name']} | {ok} | {result['seconds']:.0f} | {result['text']} |")
    for name, ratio in ratios.items():
        lines.append(f"| {name} | | | {ratio:.3f} |")
        print(f"     {name}: {ratio:.3f}")
    with open(f"{out}/table.md", "w") as f:
        f.write("\n".join(lines) + "\n")


def make_parser():
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("out", help="folder for the logs and the table")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of: {', '.join(ALL)}")
    parser.add_argument("--small", action="store_true", help="at toy size on a CPU")
    parser.add_argument("--budget", type=float, default=420, help="seconds for all; default 420")
    help_text = f"that check or compile at a time, sharing the GPU's memory; default {JOBS} here"
    parser.add_argument("--jobs", type=int, default=JOBS, help=help_text)
    # what the processes of this program are started with
    parser.add_argument("--check", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    return parser


def main(argv=None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in ALL]
    if unknown:
        parser.error(f"no such check: {', '.join(unknown)}")
    if args.check is None and args.rank is None:
        return run_all(args)
    faulthandler.register(signal.SIGUSR1)  # see Job.end
    device = torch.device("cpu" if args.small else "cuda")
    distributed.configure_torch(device)
    torch.manual_seed(0)
    bench = Bench(SMALL if args.small else Size(), device, args.check, args.out)
    if args.rank is not None:
        return gpu_checks.run_rank(bench, args.rank, args.store)
    found = ALL[args.check][0](bench)
    write_json(f"{args.out}/{args.check}.json", found)
    print(f"ends at {time.time():.3f}", flush=True)
    os._exit(0)  # the others need not wait until its compile workers have ended


if __name__ == "__main__":
    sys.exit(cli.run(main))
