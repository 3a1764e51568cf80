"""What a run sends to Weights & Biases, if its config asks: the records of metrics.jsonl, and tables of sampled responses.

A record's names are those of TRL's trainers there, as Hugging Face's callback writes them, so that curves lie on one another:
train/ and eval/ before NAMES, over train/global_step, the optimisation steps before it, of all rounds. Its step there is its number
among the records. A start goes through all that metrics.jsonl has kept, and leaves out what was sent: online what the server has,
offline what RUN/wandb.txt says, for `wandb sync` appends a start's part to those before it. So what a kill had sent past the
checkpoint is not said twice, and a run that was offline, or had none of this, is sent whole when it is started online.
"""

import contextlib
import glob
import netrc
import os
import secrets
from dataclasses import asdict
from urllib.parse import urlsplit

from nanospin import distributed
from data.files import printable
from data.rows import read_rows

# ours -> theirs, by stage; a name that ends in / is a beginning. Their rewards are beta (log pi - log pi_ref), their logps sums over a
# response, as ours (DPOTrainer of TRL 1.16). At K > 2 rejected is the mean of the others, and rewards/PLAYER stands beside it
RANKED = {
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
NAMES = {
    "pretrain": {"val_loss": "loss"},
    "sft": {"val_loss": "loss"},
    "preference": RANKED,
    "spin": RANKED,
    "reward": {"pair_nll": "loss", "acc": "accuracy", "score": "mean_reward"},
    "ppo": {},
}
ALL = {"lr": "learning_rate", "norm": "grad_norm"}
ROWS = 16  # of a table
PATIENCE = {"init_timeout": 30, "finish_timeout": 60}  # seconds for a network that is not there


@contextlib.contextmanager
def wandb_sender(cfg, at):
    """A function that is told every record, from the run's first, and sends it; at = (round, step) is where this start begins. No
    key, no network or an error of the package cost a line, not the run."""
    if cfg.wandb == "off" or distributed.rank():
        yield lambda record: None
        return
    path = os.path.join(
        cfg.out_dir, "wandb.txt"
    )  # the run's id there, then the number of each record that was sent, a line each
    if not os.path.exists(path):
        with open(path, "w", encoding="utf-8") as f:
            f.write(secrets.token_hex(4) + "\n")
    with open(path, encoding="utf-8") as f:
        id, *told = f.read().split() or [""]
    if not id.isalnum() or not all(map(str.isdecimal, told)):
        raise SystemExit(
            printable(
                f"{path} is damaged; without it the run would be another one at Weights & Biases"
            )
        )
    told, sent = max(map(int, told), default=-1), open(path, "a", encoding="utf-8", buffering=1)
    folders = {
        f"WANDB_{name}_DIR": os.path.join(os.path.abspath(cfg.out_dir), "wandb", name.lower())
        for name in ("DATA", "CACHE")
    }
    folders = {name: path for name, path in folders.items() if name not in os.environ}
    os.environ.update(folders)
    mode, run, first, number, before, round_id, last, of_rounds = (
        cfg.wandb,
        None,
        0,
        -1,
        0,
        0,
        0,
        cfg.wandb_runs == "rounds",
    )

    def send(record):
        nonlocal mode, run, first, told, number, before, round_id, last
        if mode == "lost" or record["kind"] == "warning":
            return
        number += 1
        try:
            if record["round"] > round_id:
                before, round_id = 0 if of_rounds else before + last, record["round"]
                if of_rounds and run:
                    run = run.finish_run()
            last = record["step"] + (record["kind"] == "step")
            if of_rounds and round_id < at[0] or mode == "offline" and number <= told:
                return  # that round's run is complete; that record was told
            if not run:
                run, mode = init_run(
                    cfg,
                    id + f"-round-{round_id}" * of_rounds,
                    f" round {round_id}" * of_rounds,
                    mode,
                )
                first = run.starting_step if mode == "online" else told + 1
            if number >= first:
                run.log(
                    wandb_names(record, cfg.stage)
                    | sample_table(cfg, record)
                    | {"round": round_id, "train/global_step": before + last},
                    step=number,
                    commit=True,
                )
                told = max(told, number)
                sent.write(f"{number}\n")
        except (
            Exception,
            SystemExit,
        ) as e:  # whatever the package raises; a table's file that is gone
            mode = "lost"
            print_line(
                f"{error_text(e)}; the run goes on without it, and this command sends what is missing"
            )

    try:
        yield send
    except BaseException:
        finish_run(run, 1)
        raise
    else:
        finish_run(run, 0)
    finally:
        for name in folders:
            os.environ.pop(name, None)


def init_run(cfg, id, suffix, mode):
    """(a wandb run, its mode): online if asked and possible, else offline."""
    import wandb

    name = cfg.out_dir.strip("/").replace("/", "-")[-100:]
    what = dict(
        project=cfg.wandb_project,
        group=name,
        name=name + suffix,
        id=id,
        job_type=cfg.stage,
        dir=cfg.out_dir,
        config=asdict(cfg),
        allow_val_change=True,
        settings=wandb.Settings(silent=True, x_transaction_log_flush_interval=1, **PATIENCE),
    )
    run = None
    if mode == "online":
        try:
            if not has_key(wandb.setup().settings):
                raise LookupError("no API key (WANDB_API_KEY, or wandb login)")
            run = wandb.init(mode="online", resume="allow", **what)
            for path in glob.glob(
                os.path.join(glob.escape(cfg.out_dir), "wandb", f"offline-run-*-{id}", "*.wandb")
            ):
                open(
                    path + ".synced", "a"
                ).close()  # all of it is sent now: wandb sync is not to append it again
        except Exception as e:  # whatever the package raises
            print_line(
                f"{error_text(e)}; offline in {cfg.out_dir}/wandb: send it with wandb sync, or with this command"
            )
            wandb.teardown()  # it holds on to the id
    run, mode = (run, mode) if run else (wandb.init(mode="offline", **what), "offline")
    run.define_metric("train/global_step")
    run.define_metric("*", step_metric="train/global_step")
    return run, mode


def has_key(settings):
    """Whether wandb would find a key by itself, and not ask for one."""
    if settings.api_key or settings.identity_token_file:
        return True
    for path in (
        [os.environ["NETRC"]]
        if "NETRC" in os.environ
        else [os.path.expanduser("~/.netrc"), os.path.expanduser("~/_netrc")]
    ):
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(path).authenticators(urlsplit(settings.base_url).netloc):
                return True
    return False


def finish_run(run, status):
    """End the run, and wandb's own process, which may still be writing."""
    try:
        if run:
            import wandb

            run.finish_run(exit_code=status)
            wandb.teardown()
    except Exception as e:  # whatever the package raises
        print_line(f"{error_text(e)}; send the rest with wandb sync, or with this command")


def print_line(text):
    print(printable(f"wandb: {text}"), flush=True)


def error_text(e):
    return " ".join(str(e).split()) or type(e).__name__


def wandb_names(record, stage):
    """A record's numbers under their names there."""
    names, kind = ALL | NAMES[stage], {"step": "train"}.get(record["kind"], record["kind"])

    def there(name):
        head, slash, rest = name.partition("/")
        return names.get(name) or names.get(head + slash, head + slash) + rest

    return {
        f"{kind}/{there(name)}": value
        for name, value in record.items()
        if name not in ("kind", "round", "step") and isinstance(value, (int, float))
    }


def sample_table(cfg, record):
    """{"samples": some held-out prompts with what was said to them} of a game's round, or of a PPO evaluation."""
    folder = os.path.join(cfg.out_dir, f"round_{record['round']}")
    if cfg.stage == "spin" and record["kind"] == "collect":
        path, columns = os.path.join(folder, "val.jsonl"), cfg.players
    elif cfg.stage == "ppo" and record["kind"] == "eval":
        path, columns = os.path.join(folder, f"val_step_{record['step']:06d}.jsonl"), ["response"]
    else:
        return {}
    import wandb

    rows = []
    for row in read_rows(path)[:ROWS]:
        said = [text for turn in row.get("history", []) for text in turn]
        same_as = row.get("same_as", [None] * len(columns))
        rows.append(
            [
                "\n\n".join([*said, row["prompt"]]),
                *(
                    text if same is None else f"(as {columns[same]})"
                    for text, same in zip(row["responses"], same_as)
                ),
            ]
        )
    return {"samples": wandb.Table(columns=["prompt", *columns], data=rows)}
