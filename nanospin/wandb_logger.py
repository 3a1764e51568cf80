"""Weights & Biases: sends the records of metrics.jsonl, and tables of sampled responses.

Metrics get the names of TRL's trainers, as Hugging Face's callback writes them, so that the curves
can be compared: train/... and eval/..., over train/global_step, which counts optimizer steps over
all rounds. The W&B step of a record is its index in metrics.jsonl, warnings left out.

Resumed runs keep their W&B id, and no record is sent twice. When a run is started again it goes
through metrics.jsonl from the first record and skips what was sent: online by asking the server,
offline by reading out_dir/wandb.txt, because `wandb sync` appends each start to those before it.
A run that was offline, or not logged to W&B at all, is sent completely once it is started online.
"""

import contextlib
import glob
import netrc
import os
import re
import secrets
from dataclasses import asdict
from urllib.parse import urlsplit

from data.files import atomic_write, is_there, printable, write_line
from data.rows import read_rows
from nanospin import distributed
from nanospin.config import player_columns
from nanospin.rounds import response_titles

# Our names of metrics -> TRL's (DPOTrainer and RewardTrainer of TRL 1.16), by stage. A name that
# ends in "/" stands for every name that begins with it. As in TRL, logps are sums over a response
# and rewards are beta (log pi - log pi_ref), but for the losses that docs/tools.md names. For K > 2
# "rejected" is the mean of all but the best response, and rewards/PLAYER is that of each player.
RANKING_NAMES = {
    "rank_nll": "loss",
    "acc": "rewards/accuracies",
    "margin": "rewards/margins",
    "reward_chosen": "rewards/chosen",
    "reward_rejected": "rewards/rejected",
    "logp_chosen": "logps/chosen",
    "logp_rejected": "logps/rejected",
    "reward/": "rewards/",
    "logp/": "logps/",
}
STAGE_NAMES = {
    "pretrain": {"val_loss": "loss"},
    "sft": {"val_loss": "loss"},
    "preference": RANKING_NAMES,
    "spin": RANKING_NAMES,
    "reward": {"pair_nll": "loss", "acc": "accuracy", "score": "mean_reward"},
    "ppo": {},
}
COMMON_NAMES = {"lr": "learning_rate", "norm": "grad_norm"}

TABLE_ROWS = 16
TIMEOUTS = {"init_timeout": 30, "finish_timeout": 60}  # seconds to wait for the network


def wandb_sender(cfg):
    """A context manager whose value is a function that sends a record, or does nothing.

    It must be called with every record of the run, from the first.
    """
    if cfg.wandb == "off" or distributed.rank() != 0:
        return contextlib.nullcontext(lambda record: None)
    return WandbSender(cfg)


class WandbSender:
    """Sends a run's records. A missing key or network, or an error in the package, is reported in
    one line and never ends the run."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.run_per_round = cfg.wandb_runs == "rounds"
        self.mode = cfg.wandb  # online, offline, or failed: nothing is sent any more
        self.run = None  # the open W&B run
        # wandb.txt: the run's id and the inode of this file, then the index of each record sent
        self.sent_file = None
        self.run_id = ""
        self.last_sent = -1  # the highest index in wandb.txt
        self.first_to_send = 0  # the first index that the open run does not have yet
        self.index = -1  # of the current record in metrics.jsonl
        self.round_id = 0  # of the current record
        self.step = 0  # optimizer steps of this round, up to the current record
        self.steps_before = 0  # optimizer steps of the rounds before, in the same W&B run
        self.added_variables = []  # environment variables to remove at the end

    def __enter__(self):
        self.open_sent_file()
        folder = os.path.join(os.path.abspath(self.cfg.out_dir), "wandb")
        for name in ("DATA", "CACHE"):  # wandb's own files go to out_dir too
            variable = f"WANDB_{name}_DIR"
            if variable not in os.environ:
                os.environ[variable] = os.path.join(folder, name.lower())
                self.added_variables.append(variable)
        return self.send

    def __exit__(self, error_type, error, traceback):
        finish_run(self.run, 1 if error_type else 0)
        self.sent_file.close()
        for variable in self.added_variables:
            os.environ.pop(variable, None)

    def open_sent_file(self):
        path = os.path.join(self.cfg.out_dir, "wandb.txt")
        if not is_there(path):
            with atomic_write(path) as f:  # the inode stays when the file gets its name
                f.write(f"{secrets.token_hex(4)}-{os.fstat(f.fileno()).st_ino}\n")
        with open(path, encoding="utf-8") as f:
            lines = f.read().splitlines(keepends=True)
        if len(lines) > 1 and not lines[-1].endswith("\n"):  # cut short by a full disk
            lines.pop()
            os.truncate(path, len("".join(lines).encode()))
        words = "".join(lines).split()
        first = re.fullmatch("([0-9A-Za-z]+)(-[0-9]+)?", words[0]) if words else None
        if not first or not all(w.isdecimal() for w in words[1:]):
            raise SystemExit(
                printable(f"{path} is damaged; without it the run would get another W&B id")
            )
        self.run_id, inode = first.groups()
        if inode and inode != f"-{os.stat(path).st_ino}":
            report(
                f"{path} was copied: both folders have the W&B run {self.run_id}, which keeps what "
                "it gets first; to log this one by itself, remove the file"
            )
        self.last_sent = max([int(word) for word in words[1:]], default=-1)
        self.sent_file = open(path, "a", encoding="utf-8", buffering=1)

    def send(self, record: dict):
        """Send a record unless it was sent before."""
        if self.mode == "failed" or record["kind"] == "warning":
            return
        self.index += 1
        try:
            if record["round"] > self.round_id:
                self.begin_round(record["round"])
            self.step = record["step"] + 1 if record["kind"] == "step" else record["step"]
            if self.was_sent():
                return
            if self.run is None:
                self.open_run()
            if self.index >= self.first_to_send:
                self.log(record)
        except (Exception, SystemExit) as e:  # whatever the package raises, or a missing table file
            self.mode = "failed"
            report(
                f"{error_text(e)}; training continues without it, and running the same command "
                "again sends what is missing"
            )

    def begin_round(self, round_id: int):
        self.round_id = round_id
        if self.run_per_round:
            if self.run is not None:
                self.run.finish()
                self.run = None
        else:
            self.steps_before += self.step

    def was_sent(self) -> bool:
        """Whether the current record was sent by an earlier start, as far as is known here."""
        return self.mode == "offline" and self.index <= self.last_sent

    def open_run(self):
        run_id = self.run_id
        name = group_name(self.cfg)
        if self.run_per_round:
            run_id += f"-round-{self.round_id}"
            name += f" round {self.round_id}"
        self.run, self.mode = init_run(self.cfg, run_id, name, self.mode)
        if self.mode == "online":
            self.first_to_send = self.run.starting_step  # the server's
        else:
            self.first_to_send = self.last_sent + 1

    def log(self, record: dict):
        values = wandb_names(record, self.cfg.stage) | sample_table(self.cfg, record)
        values["round"] = self.round_id
        values["train/global_step"] = self.steps_before + self.step
        self.run.log(values, step=self.index, commit=True)
        self.last_sent = max(self.last_sent, self.index)
        write_line(self.sent_file, str(self.index))


# ----------------------------------------------------------------------------------- a run at W&B


def group_name(cfg) -> str:
    return cfg.out_dir.strip("/").replace("/", "-")[-100:]


def init_run(cfg, run_id: str, name: str, mode: str):
    """Open a W&B run. Returns (run, mode): online if configured and possible, else offline."""
    import wandb

    options = {
        "project": cfg.wandb_project,
        "group": group_name(cfg),
        "name": name,
        "id": run_id,
        "job_type": cfg.stage,
        "dir": cfg.out_dir,
        "config": asdict(cfg),
        "allow_val_change": True,
        "settings": wandb.Settings(silent=True, x_transaction_log_flush_interval=1, **TIMEOUTS),
    }
    run = None
    if mode == "online":
        try:
            if not has_key(wandb.setup().settings):
                raise LookupError("no API key (WANDB_API_KEY, or wandb login)")
            run = wandb.init(mode="online", resume="allow", **options)
            mark_as_synced(cfg.out_dir, run_id)
        except Exception as e:  # whatever the package raises
            report(
                f"{error_text(e)}; logging offline to {cfg.out_dir}/wandb: "
                "send it with wandb sync, or run the same command again"
            )
            wandb.teardown()  # it would not let another run have the id
    if run is None:
        mode = "offline"
        run = wandb.init(mode=mode, **options)
    run.define_metric("train/global_step")
    run.define_metric("*", step_metric="train/global_step")
    return run, mode


def mark_as_synced(out_dir: str, run_id: str):
    """Keep `wandb sync` from sending what earlier offline starts wrote: this start sends it all."""
    folder = os.path.join(glob.escape(out_dir), "wandb", f"offline-run-*-{run_id}")
    for path in glob.glob(os.path.join(folder, "*.wandb")):
        with open(path + ".synced", "a"):
            pass


def has_key(settings) -> bool:
    """Whether wandb will find an API key by itself. Otherwise it would ask for one."""
    if settings.api_key or settings.identity_token_file:
        return True
    if "NETRC" in os.environ:
        paths = [os.environ["NETRC"]]
    else:
        paths = [os.path.expanduser("~/.netrc"), os.path.expanduser("~/_netrc")]
    host = urlsplit(settings.base_url).netloc
    for path in paths:
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(path).authenticators(host):
                return True
    return False


def finish_run(run, status: int):
    """End a W&B run, and wandb's own process, which may still be writing."""
    if run is None:
        return
    try:
        import wandb

        run.finish(exit_code=status)
        wandb.teardown()
    except Exception as e:  # whatever the package raises
        report(f"{error_text(e)}; send the rest with wandb sync, or run the same command again")


def report(text: str):
    print(printable(f"wandb: {text}"), flush=True)


def error_text(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# --------------------------------------------------------------------------------- what is logged


def wandb_names(record: dict, stage: str) -> dict:
    """The numbers of a record under their W&B names."""
    prefix = "train" if record["kind"] == "step" else record["kind"]
    names = COMMON_NAMES | STAGE_NAMES[stage]
    values = {}
    for name, value in record.items():
        if name not in ("kind", "round", "step") and isinstance(value, (int, float)):
            values[f"{prefix}/{wandb_name(name, names)}"] = value
    return values


def wandb_name(name: str, names: dict) -> str:
    """acc -> rewards/accuracies, reward/self -> rewards/self; other names do not change."""
    if name in names:
        return names[name]
    head, slash, rest = name.partition("/")
    return names.get(head + slash, head + slash) + rest


def sample_table(cfg, record: dict) -> dict:
    """{"samples": a table of validation prompts with their responses}, for the samples of a spin
    round and for an evaluation of ppo; otherwise {}, and if their file is gone. Under a scorer a
    player's samples are numbered from its best one on, and "scores" has the scores in the order of
    the columns."""
    folder = os.path.join(cfg.out_dir, f"round_{record['round']}")
    if cfg.stage == "spin" and record["kind"] == "collect":
        path = os.path.join(folder, "val.jsonl")
        columns = response_titles(player_columns(cfg))
    elif cfg.stage == "ppo" and record["kind"] == "eval":
        path = os.path.join(folder, f"val_step_{record['step']:06d}.jsonl")
        columns = ["response"]
    else:
        return {}
    import wandb

    if not os.path.exists(path):
        return {}  # the folder of an old round was removed
    rows = read_rows(path)[:TABLE_ROWS]
    has_scores = "players" in rows[0]
    cells = [table_row(row, columns) for row in rows]
    head = ["prompt", *columns] + ["scores"] * has_scores
    return {"samples": wandb.Table(columns=head, data=cells)}


def table_row(row: dict, columns: list[str]) -> list[str]:
    """[the conversation up to the prompt, the response of each column]. A response that equals a
    better one, and is absent for that reason, is written as "(as teacher)"."""
    turns = [row["system"]] if row.get("system") else []
    for prompt, response in row.get("history", []):
        turns += [prompt, response]
    cells = ["\n\n".join([*turns, row["prompt"]])]
    titles = response_titles(row["players"]) if "players" in row else columns
    same_as = row.get("same_as", [None] * len(columns))
    where = [titles.index(column) for column in columns]  # the response of each column
    for k in where:
        better = same_as[k]
        cells.append(row["responses"][k] if better is None else f"(as {titles[better]})")
    if "players" in row:
        scores = [row["scores"][k] for k in where]
        cells.append(", ".join("-" if score is None else f"{score:.4g}" for score in scores))
    return cells
