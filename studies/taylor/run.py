"""Train the runs of the T_n study, then write its report.

    python -m studies.taylor.run main                        # 54 runs: T_n and baselines
    python -m studies.taylor.run map                         # 12 runs: first version, rates, blocks
    python -m studies.taylor.run play --demo=out/demo        # 21 runs: fine-tuning and self-play
    python -m studies.taylor.run original --ranked=FILE      # 4 runs of the original size on a CPU
    python -m studies.taylor.run main --full                 # 120 runs of the original size

The texts are ranked forum answers with --ranked=FILE, else docstrings of the installed packages;
with --full they are SHP from the Hugging Face hub. `play` starts from the models of `make demo`.
`original` has GPT-2's BPE without the tokens that the texts do not use.
A finished run is skipped and an interrupted one resumes. --list prints the commands only.
"""

import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from data import cli
from data.files import read_json, sha256, write_json
from studies.taylor import analysis

SEEDS = [1, 2, 3]  # each has its own posts, split and vocabulary
ORDERS = ["0", "0.5", "1", "2", "4"]  # n of T_n
ROW_ORDERS = ["0", "1", "2"]  # and at CPU size when split by row

BASELINES = {
    "dropout": ["--dropout=0.1"],
    "weight_decay": ["--weight_decay=1.0"],
    "label_smoothing": ["--token_label_smoothing=0.1"],
    "focal": ["--focal=2"],
    "confidence_penalty": ["--confidence_penalty=0.1"],
}

# what differs from later.py and clean.py at CPU size
SMALL_LATER = [
    "--n_head=2",
    "--block_size=64",
    "--batch_size=10",
    "--lr=2e-3",
    "--eval_interval=200",
    "--eval_rows=110",
    "--max_steps=6000",
]
SMALL_LATER_POST = ["--eval_interval=20", "--max_steps=400"]  # and when split by post
SMALL_CLEAN = [
    "--n_layer=1",
    "--n_head=2",
    "--n_embd=64",
    "--block_size=64",
    "--lr=2e-3",
    "--eval_interval=25",
    "--eval_rows=100",
    "--max_steps=350",
]

# variants of the row split, one seed: where does the write-up's pattern appear?
VARIANTS = {
    "map_first": ["--write_up=first", "--schedule=cosine", "--min_lr_ratio=0.01"],
    "map_lr_1e-3": ["--lr=1e-3"],
    "map_no_noise": ["--init_noise=0"],
    "map_gpt2_block": [
        "--write_up=",
        "--position=learned",
        "--mlp=gelu",
        "--tie_embeddings=True",
        "--init_noise=0",
    ],
}


@dataclass
class Run:
    name: str  # SETTING/SPLIT/METHOD/SEED, its folder
    command: list[str]  # module and arguments


@dataclass
class Study:
    """Where the study reads and writes."""

    out: str  # run folders
    data: str  # data folders: {small,large}/SEED/{row,group}
    demo: str  # models of `make demo`
    full: bool  # the original size

    def run(self, name: str, config: str, *args: str) -> Run:
        """A run of studies/taylor/config/CONFIG.py."""
        command = ["studies.taylor.train", f"studies/taylor/config/{config}.py", *args]
        return Run(name, [*command, f"--out_dir={self.out}/{name}"])

    def at_cpu_size(self, *args: str) -> list[str]:
        return [] if self.full else list(args)

    def main_runs(self) -> list[Run]:
        """T_n in the write-up's setting on both splits and with a GPT-2 block; the baselines."""
        runs = []
        for seed in SEEDS:
            small, large = f"{self.data}/small/{seed}", f"{self.data}/large/{seed}"
            later_row = [f"--data={small}/row", *self.at_cpu_size(*SMALL_LATER)]
            later_post = [
                f"--data={small}/group",
                *self.at_cpu_size(*SMALL_LATER, *SMALL_LATER_POST),
            ]
            clean = [f"--data={large}/group", *self.at_cpu_size(*SMALL_CLEAN)]
            for n in ORDERS:
                args = [f"--taylor_order={n}", f"--seed={seed}"]
                end = f"T_{n}/{seed}"
                if self.full or n in ROW_ORDERS:
                    runs.append(self.run(f"later/row/{end}", "later", *later_row, *args))
                runs.append(self.run(f"later/group/{end}", "later", *later_post, *args))
                runs.append(self.run(f"clean/group/{end}", "clean", *clean, *args))
                if self.full:
                    runs += self.original_size_runs(small, end, args)
            for name, args in BASELINES.items():
                args = [*clean, *args, f"--seed={seed}"]
                runs.append(self.run(f"clean/group/{name}/{seed}", "clean", *args))
        return runs

    def original_size_runs(self, data: str, end: str, args: list[str]) -> list[Run]:
        """The write-up's wide models, of both versions."""
        runs = []
        for split in ("row", "group"):
            on_split = [f"--data={data}/{split}", *args]
            wide = self.run(f"later_1024/{split}/{end}", "later", *on_split, "--n_embd=1024")
            runs += [wide, self.run(f"first/{split}/{end}", "first", *on_split)]
        return runs

    def map_runs(self) -> list[Run]:
        """Variants of the write-up's setting on the row split; one seed is a lead, not a result."""
        runs = []
        seed = SEEDS[0]
        data = f"--data={self.data}/small/{seed}/row"
        for variant, changes in VARIANTS.items():
            changes = ["--max_steps=2000", *changes]
            for n in ROW_ORDERS:
                args = [data, *SMALL_LATER, f"--taylor_order={n}", f"--seed={seed}", *changes]
                runs.append(self.run(f"{variant}/row/T_{n}/{seed}", "later", *args))
        return runs

    def original_runs(self) -> list[Run]:
        """The write-up's size on a CPU: T_0 and T_2, width 64, 100 epochs, one seed."""
        runs = []
        for split in ("row", "group"):
            for n in ("0", "2"):
                args = [f"--data={self.data}/cut/{split}", f"--taylor_order={n}", "--seed=1"]
                args += ["--fit_temperature=False", "--save_interval=400"]
                runs.append(self.run(f"original/{split}/T_{n}/1", "later", *args))
        return runs

    def play_runs(self) -> list[Run]:
        """T_n of the fine-tuning loss, and of the ranking in self-play with history.

        In self-play K = 2 in the first round and 3 in the second. The control has T_0 and an
        nll_coef that is larger by (1 - 1/2)^-2, the weight that T_2 gives it at the start of K = 2.
        """
        sft = ["studies.taylor.train", "config/demo/sft.py", f"--init={self.demo}/pretrain"]
        sft += ["--max_steps=60", "--eval_interval=20"]
        spin = ["train", "config/demo/spin_k2.py", f"--init={self.demo}/sft"]
        spin += ["--players=data,self,self-1", "--rounds=2", "--max_rows=512", "--max_steps=16"]
        runs = []
        for seed in SEEDS:
            for n in ("0", "1", "2"):
                for setting, command in (("sft", sft), ("spin", spin)):
                    name = f"{setting}/group/T_{n}/{seed}"
                    args = [f"--taylor_order={n}", f"--seed={seed}", f"--out_dir={self.out}/{name}"]
                    runs.append(Run(name, [*command, *args]))
            name = f"spin/group/nll_coef/{seed}"
            args = ["--nll_coef=0.8", f"--seed={seed}", f"--out_dir={self.out}/{name}"]
            runs.append(Run(name, [*spin, *args]))
        return runs


def data_commands(study: Study, ranked: str) -> list[list[str]]:
    """The commands that write the data folders that are missing."""
    commands = []
    for size, rows in (("small", 500), ("large", 2400)):
        if os.path.exists(f"{study.data}/{size}/{SEEDS[-1]}/group/meta.json"):
            continue
        if study.full:
            args = ["--rows=10000"]
        else:
            source = [ranked] if ranked else ["--surrogate"]
            args = [*source, "--tokenizer=bpe", "--vocab_size=1024", f"--rows={rows}"]
        out = f"--out={study.data}/{size}"
        commands.append(["data.shp.prepare", *args, f"--sets={len(SEEDS)}", out])
    return commands


def original_data_commands(study: Study, ranked: str) -> list[list[str]]:
    """The commands that write the 10,000 texts with GPT-2's BPE, cut to the tokens they use."""
    if os.path.exists(f"{study.data}/cut/group/meta.json"):
        return []
    source = [ranked] if ranked else ["--surrogate"]
    bpe, uncut = f"{study.data}/gpt2_cut.tiktoken", f"{study.data}/uncut"
    prepare = ["data.shp.prepare", *source, "--rows=10000"]
    return [
        [*prepare, f"--out={uncut}"],
        ["studies.taylor.cut_bpe", f"{uncut}/row", bpe],
        [*prepare, f"--tokenizer={bpe}", f"--out={study.data}/cut"],
    ]


def check_texts(study: Study, ranked: str):
    """The data folders have the name of the file of rows. Exit if they are of another file of that
    name; note which one they are of."""
    path, digest = f"{study.data}/texts.json", sha256(ranked)
    if not os.path.exists(path):
        os.makedirs(study.data, exist_ok=True)
        write_json(path, {"sha256": digest})
    elif read_json(path, ("sha256",))["sha256"] != digest:
        raise SystemExit(
            f"{study.data} is of another file than {ranked}: remove it, or rename this"
        )


def python(command: list[str], threads: int | None = None) -> int:
    """Run a module with its arguments in a process of its own; returns its exit status."""
    env = dict(os.environ)
    if threads:
        env["OMP_NUM_THREADS"] = str(threads)
    return subprocess.run([sys.executable, "-m", *command], env=env).returncode


def train_all(runs: list[Run], jobs: int, threads: int | None):
    """Train the runs, `jobs` at a time. Exits if one fails, after the others."""
    with ThreadPoolExecutor(jobs) as pool:
        try:
            codes = list(pool.map(lambda run: python(run.command, threads), runs))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    failed = [run.name for run, code in zip(runs, codes, strict=True) if code]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}")


def main(argv: list[str]):
    parser = cli.ArgumentParser(prog="python -m studies.taylor.run", description=__doc__)
    parser.add_argument("runs", choices=["main", "map", "play", "original"], help="which runs")
    parser.add_argument("--ranked", default="", help="ranked rows of forum threads, .jsonl.gz")
    parser.add_argument("--full", action="store_true", help="the original size, one run at a time")
    parser.add_argument(
        "--jobs", type=cli.number_type(int, 1), default=2, help="runs at a time, one thread each"
    )
    parser.add_argument("--demo", default="out/demo", help="the models of `make demo`")
    parser.add_argument("--out", help="run folders (default: out/tn, or out/tn_full)")
    parser.add_argument("--report", help="folder for report, figures and logs (default: OUT)")
    parser.add_argument("--list", action="store_true", help="print the commands only")
    args = parser.parse_args(argv)
    if args.full and args.runs in ("map", "original"):
        parser.error(f"{args.runs} has no --full: its runs are for a CPU")

    out = args.out or ("out/tn_full" if args.full else "out/tn")
    texts = os.path.basename(args.ranked).split(".")[0] if args.ranked else "docstrings"
    study = Study(out, f"data/shp/{'hub' if args.full else texts}", args.demo, args.full)
    runs = getattr(study, f"{args.runs}_runs")()
    prepare = []
    if args.runs == "original":
        prepare = original_data_commands(study, args.ranked)
    elif args.runs != "play":
        prepare = data_commands(study, args.ranked)

    if args.list:
        commands = [run.command for run in runs]
        for command in [*prepare, *commands]:
            print("python -m " + shlex.join(command))
        return
    if args.ranked and args.runs != "play":
        check_texts(study, args.ranked)
    for command in prepare:
        if python(command):
            raise SystemExit(f"python -m {shlex.join(command)} failed")
    train_all(runs, jobs=1 if args.full else args.jobs, threads=None if args.full else 1)
    analysis.write_report(out, args.report or out)


if __name__ == "__main__":
    sys.exit(cli.run(main))
