"""Checks before a run's first step: the ranks agree, the inputs exist, out_dir is this run's."""

import glob
import os
import re
from dataclasses import dataclass, replace

import numpy as np
import torch

from data import tokenizer
from data.files import RUN_FOLDER_MARKS, is_there, printable, sha256
from data.folder import find_invalid_token, read_meta, read_stream
from data.rows import shared_rows
from data.template import TEMPLATE, lacks_bos
from nanospin import checkpoint, config, distributed, inputs, lock
from nanospin.distributed import run_on_rank0
from nanospin.inputs import POLICY_STAGES
from nanospin.same_run import (
    check_same_run,
    flat_settings,
    read_config_json,
    read_run_settings,
    run_settings,
)


def resolve_template(cfg):
    """Return the config with its template filled in: that of the run if it has checkpoints, else
    that of `init`, else the default. All ranks call this together."""
    if cfg.template:
        return cfg
    return replace(cfg, template=run_on_rank0(find_template, cfg) or TEMPLATE)


def find_template(cfg) -> str:
    if checkpoint.latest(cfg.out_dir):
        template = read_run_settings(cfg.out_dir).get("template") or ""
        return config.convert("template", template, str, os.path.join(cfg.out_dir, "config.json"))
    if cfg.init:
        return checkpoint.read_meta(checkpoint.resolve(cfg.init))["config"]["template"]
    return ""


def say_template(cfg, enc, say):
    """Say that the template leaves out the beginning-of-text token that `init` was trained with."""
    line = lacks_bos(enc, cfg.template)
    if line and cfg.init and cfg.stage != "pretrain" and run_on_rank0(init_has_bos, cfg.init, enc):
        say(printable(line))


def init_has_bos(init: str, enc) -> bool:
    """Whether a checkpoint was trained on prompts or documents after a beginning-of-text token, as
    far as they are still there."""
    meta = checkpoint.read_meta(checkpoint.resolve(init))
    cfg = meta["config"]
    if cfg["stage"] == "pretrain" and meta["step"] > 0:
        then = meta.get("settings", {}).get("data_sha256", {}).get("train.bin")
        try:
            now = read_meta(cfg["data"], ["train.bin"])["files"]["train.bin"]["sha256"]
            return now == then and stream_has_bos(cfg["data"], enc)
        except (SystemExit, OSError):
            return False
    return not lacks_bos(enc, cfg["template"])


def stream_has_bos(folder: str, enc) -> bool:
    return bool(tokenizer.begin_ids(enc)[0] in read_stream(folder, "train")[: 2**20])


def say_stream(cfg, enc, say):
    """Say that documents lack the beginning-of-text token: older versions left it out."""
    if not (cfg.stage == "pretrain" or cfg.pretrain_coef) or not tokenizer.begin(enc):
        return
    folder = config.pretrain_config(cfg).data
    if not stream_has_bos(folder, enc):
        bos = printable(tokenizer.begin(enc))
        say(
            f"the documents of {folder} begin without {bos}. This tokenizer puts it before a text; "
            "so do bits_per_byte of eval.py and sample.py --raw. Prepare the documents again"
        )


@dataclass
class Start:
    """Where a run starts, and with what."""

    cfg: config.Config  # with its template
    settings: dict  # for config.json
    path: str | None = None  # the checkpoint that it resumes from
    round_id: int = 0
    step: int = -1  # -1: the run has no checkpoint yet

    @property
    def at(self) -> tuple[int, int]:
        return self.round_id, self.step


def prepare_run(cfg) -> Start:
    """Check the config and everything that the run reads, take the lock of its out_dir, and find
    the checkpoint that it resumes from. Exits with one line on a mistake.

    All ranks call this together, and rank 0 decides.
    """
    check_batch_sizes(cfg)
    check_ranks_agree(cfg)
    cfg = resolve_template(cfg)
    settings = run_settings(cfg)
    check_teacher(cfg)
    run_on_rank0(check_policies, cfg)
    run_on_rank0(check_scorer, cfg)
    check_out_dir(cfg.out_dir)
    run_on_rank0(lock.acquire, cfg.out_dir)
    if distributed.rank() == 0:
        checkpoint.remove_unfinished(cfg.out_dir)
        for problem in checkpoint.removal_problems:
            print(f"could not be removed: {problem}", flush=True)
        checkpoint.removal_problems.clear()
    say_what_keep_best_misses(cfg)
    say_literal_line_break(cfg)
    path = checkpoint.latest_valid(cfg.out_dir)
    run_on_rank0(check_same_run, cfg, settings, path)
    start = Start(cfg, settings, path)
    if path:
        meta = run_on_rank0(checkpoint.read_meta, path)
        start.round_id, start.step = meta["round"], meta["step"]
    return start


# ----------------------------------------------------------------------------------------- checks


def check_batch_sizes(cfg):
    names = ["batch_size"]
    if cfg.pretrain_coef:
        names.append("pretrain_batch_size")
    for name in names:
        value = getattr(cfg, name)
        if value % distributed.world_size():
            raise SystemExit(
                f"config: {name} {value} must be a multiple of the number of ranks, "
                f"{distributed.world_size()}"
            )


def check_ranks_agree(cfg):
    """All ranks must have the same settings, data, code and versions of torch and numpy."""
    own = {f"setting {name}": value for name, value in flat_settings(cfg).items()}
    own["data"] = read_meta(cfg.data, [])["files"]
    own["code"] = [sha256(path) for path in code_files()]
    own["torch"] = torch.__version__
    own["numpy"] = np.__version__
    everyone = distributed.all_gather_object(own)
    reference = everyone[0]
    for rank, values in enumerate(everyone):
        for name in reference | values:
            if values.get(name) != reference.get(name):
                message = f"rank {rank} has a different {name} than rank 0"
                if name not in ("code", "data"):
                    message += f": {values.get(name)!r}, not {reference.get(name)!r}"
                raise SystemExit(message)


def code_files() -> list[str]:
    """The source files that a run may import: the root's, nanospin/'s and data/'s."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    files = []
    for folder in ("", "nanospin", "data"):
        files += glob.glob(os.path.join(glob.escape(os.path.join(root, folder)), "*.py"))
    return sorted(files)


def check_teacher(cfg):
    """A teacher that is a file of rows must exist. (Checkpoints: `check_policies`.)"""
    if cfg.teacher.endswith(".jsonl") and not os.path.isfile(cfg.teacher):
        raise SystemExit(
            f"{cfg.teacher}: no such file; make it with: python sample.py TEACHER "
            f"--prompts {cfg.data}/train.jsonl --out {cfg.teacher}, "
            "then append the output for val.jsonl"
        )


def check_policies(cfg):
    """init and teacher must be readable checkpoints, and policies where they are sampled from or
    compared with."""
    needs_policy = cfg.stage in POLICY_STAGES
    paths = {}
    if inputs.is_read(cfg, "init") or not checkpoint.latest(cfg.out_dir):
        paths["init"] = cfg.init
    if cfg.teacher != "rows" and not os.path.isfile(cfg.teacher) and inputs.is_read(cfg, "teacher"):
        paths["teacher"] = cfg.teacher
    for name, path in paths.items():
        if not path:
            continue
        found = checkpoint.resolve(path)
        if needs_policy and checkpoint.read_meta(found)["config"]["stage"] == "reward":
            raise SystemExit(
                f"{name} {path} is a reward model, not a policy; a reward model is set as `reward`"
            )
        check_finite_at_first(cfg, found)


def check_scorer(cfg):
    """`reward` and `ranked_by` must be a function that can be imported, or a checkpoint; `reward`
    that of a reward model."""
    name = config.scorer_name(cfg)
    if config.is_function(name):
        config.import_function(name)
    elif name and inputs.is_read(cfg, "reward" if cfg.reward else "ranked_by"):
        found = checkpoint.resolve(name)
        if cfg.reward and checkpoint.read_meta(found)["config"]["stage"] != "reward":
            raise SystemExit(
                f"reward {name} is not a reward model: it was not trained by stage reward"
            )
        check_finite_at_first(cfg, found)


def check_finite_at_first(cfg, path: str):
    """Before a run writes anything, the weights that it reads must be finite: its config.json will
    have their hash, and a fixed checkpoint would be refused for it."""
    if not is_there(os.path.join(cfg.out_dir, "config.json")):
        checkpoint.check_finite(path)


def check_out_dir(out_dir: str):
    """Make out_dir if it does not exist; it must be a folder that can be written to, and no part of
    a checkpoint or of another run's round."""
    if is_there(out_dir) and not os.path.isdir(out_dir):
        raise SystemExit(f"out_dir {out_dir} is a file")
    for path in (os.path.abspath(out_dir), os.path.realpath(out_dir)):
        refuse_if_inside_run(out_dir, path)
    try:
        os.makedirs(out_dir, exist_ok=True)
    except OSError as e:
        raise SystemExit(f"out_dir {out_dir}: {e.strerror}")
    if not os.access(out_dir, os.W_OK):
        raise SystemExit(f"out_dir {out_dir}: no permission to write to it")


def refuse_if_inside_run(out_dir: str, path: str):
    """Exit with one line if a path is, or is in, a checkpoint or a round of a run: a run there
    would be removed with it, and its checkpoints would be taken for those of the other run."""
    while os.path.dirname(path) != path:
        if checkpoint.is_checkpoint(path) or is_round_of_run(path):
            raise SystemExit(
                f"out_dir {out_dir} would be inside a run or a checkpoint: {path} belongs to one; "
                "use another out_dir"
            )
        path = os.path.dirname(path)


def is_round_of_run(path: str) -> bool:
    """Whether a path is the folder round_R of a run, also one that the run has not made yet."""
    run, name = os.path.split(path)
    if not re.fullmatch("round_[0-9]+", name):
        return False
    if any(os.path.exists(os.path.join(path, mark)) for mark in RUN_FOLDER_MARKS):
        return True
    settings, _ = read_config_json(os.path.join(run, "config.json"))
    return bool(settings or checkpoint.list_steps(path))


def say_shared_prompts(train: list[dict], val: list[dict], say):
    """Say how many validation rows have the prompt of a training row, or its text if they are whole
    texts."""
    shared = shared_rows(train, val)
    if shared:
        first = shared[0]["prompt"] or shared[0]["responses"][0]
        say(
            f"warning: {len(shared)} of {len(val)} validation rows are among the training rows too "
            f"(the same prompt), the first: {first[:60]!r}"
        )


def check_tokenizer(cfg, path, meta):
    """A tokenizer in the config must be that of the checkpoint."""
    if not cfg.tokenizer:
        return
    if tokenizer.fingerprint(tokenizer.load(cfg.tokenizer)) != meta["tokenizer_sha256"]:
        raise SystemExit(f"config: tokenizer {cfg.tokenizer} is not the checkpoint's ({path})")


def check_stream(folder, enc, tokenizer_name):
    """A token stream must be of this tokenizer. The ranks share the work of looking at every id."""
    meta = read_meta(folder, [])
    if meta["tokenizer_sha256"] != tokenizer.fingerprint(enc):
        raise SystemExit(
            f"{folder} was written with the tokenizer {meta['tokenizer']}, "
            f"the model has another ({tokenizer_name})"
        )
    for split in ("train", "val"):
        tokens = read_stream(folder, split)
        rank, world_size = distributed.rank(), distributed.world_size()
        found = find_invalid_token(tokens, enc.n_vocab, rank, world_size)
        first = min(distributed.all_gather_object(found))
        if first < len(tokens):
            raise SystemExit(
                f"{folder}/{split}.bin: token id {tokens[first]} at position {first} is outside "
                f"the vocabulary of {enc.n_vocab}"
            )


def check_model_settings(cfg, model_config, its_config, path):
    """Model settings in the config must be those of the checkpoint; only dropout may differ."""
    for name, value in cfg.model.items():
        its_value = getattr(its_config, name)
        if name != "dropout" and getattr(model_config, name) != its_value:
            raise SystemExit(
                f"config: {name} is {value!r}, but the checkpoint {path} has {its_value!r}"
            )


def check_keep_best(cfg, metrics: list[str]):
    """keep_best must be one of the metrics that the stage's evaluation can have. Where a study's
    stage does not list them, the first evaluation finds out."""
    names = ["pretrain_loss"] if cfg.pretrain_coef else []
    for name in metrics:
        if name.endswith("/") and cfg.stage == "spin":
            players = config.player_columns(cfg)
            if name == "acc/" and not config.is_scored(cfg):
                players = [player for player in players if player != players[-1]]  # beats none
            names += [name + player for player in dict.fromkeys(players)]
        elif name != "kl_from_ref" or config.samples_policy_itself(cfg):
            names.append(name)
    if not cfg.keep_best or not metrics:
        return
    wanted = cfg.keep_best.removeprefix("-")
    for name in names:
        if wanted == name or (name.endswith(("/", "@")) and wanted.startswith(name)):
            return
    raise SystemExit(unknown_keep_best(cfg, names))


def say_what_keep_best_misses(cfg):
    """Say that keep_best cannot keep the best of all evaluations if some are of steps that are not
    saved. PPO evaluates at the end of a round, which is always saved."""
    if not cfg.keep_best or cfg.stage == "ppo" or cfg.eval_interval % cfg.save_interval == 0:
        return
    if distributed.rank() == 0:
        print(
            f"keep_best: the steps are evaluated every {cfg.eval_interval} and saved every "
            f"{cfg.save_interval}, and only one that is both can be kept as the best",
            flush=True,
        )


def say_literal_line_break(cfg):
    """Say that a template has a backslash and an n, which a shell has not made a line break."""
    if "\\n" in cfg.template and distributed.rank() == 0:
        print(
            "the template has a backslash and an n; for a line break write it in a config file, or "
            "in bash as --template=$'...\\n...'",
            flush=True,
        )


def unknown_keep_best(cfg, names: list[str]) -> str:
    return (
        f"config: keep_best {cfg.keep_best!r} is not a metric of this run; "
        f"there are {', '.join(names)}"
    )


def resolve_dropout(cfg, inherited: float, resumes: bool) -> float:
    """The dropout of a model that starts from a checkpoint: what the config sets, else the
    checkpoint's. A stage that compares the policy with its reference, which is scored without
    dropout, takes none from `init`. Both cases print a line."""
    dropout = cfg.model.get("dropout", inherited)
    if cfg.stage not in POLICY_STAGES or not inherited and not dropout:
        return dropout
    text = f"dropout {dropout} is on: the policy is trained with it, the reference scored without"
    if "dropout" not in cfg.model and not resumes:
        dropout = 0.0
        text = (
            f"dropout {inherited} of {cfg.init} is off in stage {cfg.stage} (set dropout to keep)"
        )
    if distributed.rank() == 0 and (dropout or "dropout" not in cfg.model):
        print(text, flush=True)
    return dropout
