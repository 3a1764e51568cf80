"""Checks before a run's first step: the ranks agree, the inputs exist, out_dir is this run's."""

import glob
import json
import os
import re
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from data import tokenizer
from data.files import RUN_FOLDER_MARKS, check_input, sha256
from data.folder import find_invalid_token, read_meta, read_stream
from data.rows import prompt_key
from data.template import TEMPLATE
from nanospin import checkpoint, config, distributed, inputs, lock, rounds
from nanospin.distributed import run_on_rank0
from nanospin.inputs import POLICY_STAGES

# Settings that may differ when a run is resumed: results change at most by rounding, or a line says
# so. Of lists with one value per round see `is_same_so_far`.
MAY_CHANGE = {
    "out_dir",
    "device",
    "compile",
    "cuda_graphs",
    "activation_checkpointing",
    "deterministic",
    "hsdp_shard_size",
    "reshard_after_forward",
    "fsdp_prefetch",
    "sample_sharded",
    "timeout",
    "keep_last",
    "keep_best",
    "keep_rounds",
    "on_nonfinite",
    "loss_spike_factor",
    "log_interval",
    "save_interval",
    "wandb",
    "wandb_project",
    "wandb_runs",
    "tensorboard",
    "gen_batch_size",
    "micro_batch_tokens",
    "layout",
    "rounds",
}


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
    have their hash, and a mended checkpoint would be refused for it."""
    if not os.path.exists(os.path.join(cfg.out_dir, "config.json")):
        checkpoint.check_finite(path)


def check_out_dir(out_dir: str):
    """Make out_dir if it does not exist; it must be a folder that can be written to, and no part of
    a checkpoint or of another run's round."""
    if os.path.exists(out_dir) and not os.path.isdir(out_dir):
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


def check_same_run(cfg, settings: dict, newest: str | None):
    """If out_dir has results, they must come from the same settings, except for MAY_CHANGE. Those
    in a checkpoint are protected by its manifest, so they count more than config.json, which knows
    better only where inputs that were moved are now."""
    before = read_run_settings(cfg.out_dir, print)
    if newest:
        saved = checkpoint.read_meta(newest).get("settings") or {}
        paths = {name: before[name] for name in inputs.PATHS if name in before}
        before |= saved | paths
    if not newest and not has_rows(cfg.out_dir):
        return
    if not before:
        before = collected_settings(cfg.out_dir, settings)
    if not before:
        refuse_if_samples(cfg.out_dir)
        return
    same = inputs.match_inputs(cfg, before, settings)
    for name in settings | before:
        if name in MAY_CHANGE or name in same:
            continue
        if name not in before and name not in cfg.model and has_default(cfg, settings, name):
            continue  # a setting that did not exist yet
        if name in config.PER_ROUND and is_same_so_far(cfg, before.get(name), settings[name]):
            continue
        if before.get(name) != settings.get(name):
            raise SystemExit(
                f"{cfg.out_dir} was begun with {name} = {before.get(name)!r}, "
                f"now it is {settings.get(name)!r}; use another out_dir, or remove that one"
            )
    say_schedule_change(cfg, before.get("rounds"))
    if newest:
        say_dropout_change(before, settings, checkpoint.read_meta(newest)["model"])


def has_default(cfg, settings: dict, name: str) -> bool:
    """Whether a setting has its default. Entries of config.json that are no settings have none, and
    count as if they had."""
    defaults = settings_as_json(type(cfg)())
    return name not in defaults or settings[name] == defaults[name]


def is_same_so_far(cfg, before, now) -> bool:
    """Whether a setting that may be a list with one value per round has the same values in all
    rounds that have begun. Those of later rounds may change, and there may be more of them."""
    folders = checkpoint.list_numbered(cfg.out_dir, "round")
    begun = 1
    if folders:
        begun += int(os.path.basename(folders[-1]).removeprefix("round_"))
    values = [value if isinstance(value, list) else [value] for value in (before, now)]
    begun = min(begun, cfg.rounds, max(map(len, values)))
    for n, listed in enumerate(values):
        values[n] = listed * begun if len(listed) == 1 else listed[:begun]
    return values[0] == values[1]


def collected_settings(out_dir: str, settings: dict) -> dict:
    """The settings in collect.json of the latest round that has them, {} if none does.

    They name the checkpoints that init, teacher and reward were: where that is what `settings` have
    found, it is the same setting.
    """
    for folder in reversed(checkpoint.list_numbered(out_dir, "round")):
        path = os.path.join(folder, "collect.json")
        if not os.path.exists(path):
            continue
        manifest = rounds.read_manifest(folder, {})
        if not isinstance(manifest.get("config"), dict):
            continue  # stage ppo
        before = saved_settings(manifest)
        for role, found in settings["checkpoints"].items():
            if inputs.same_path(before.get(role), found):
                before[role] = settings[role]
        print(f"{out_dir} has no config.json: its settings are taken from {path}", flush=True)
        return before
    return {}


def refuse_if_samples(out_dir: str):
    """Exit with one line if a run's folder has samples or scores. Nothing says with which settings
    they were made."""
    for pattern in ("round_*/*.jsonl*", "round_*/*.npz*", "teacher_*.jsonl*"):
        for path in sorted(glob.glob(os.path.join(glob.escape(out_dir), pattern))):
            if os.path.getsize(path):
                raise SystemExit(
                    f"{out_dir} has samples ({path}), and no config.json or checkpoint that says "
                    "with which settings they were made: put its config.json back, or use another "
                    "out_dir"
                )


def say_shared_prompts(train: list[dict], val: list[dict], say):
    """Say how many validation rows have the prompt of a training row, or its text if they are whole
    texts."""
    known = {row_key(row) for row in train}
    shared = [row for row in val if row_key(row) in known]
    if shared:
        first = shared[0]["prompt"] or shared[0]["responses"][0]
        say(
            f"warning: {len(shared)} of {len(val)} validation rows are among the training rows too "
            f"(the same prompt), the first: {first[:60]!r}"
        )


def row_key(row: dict) -> tuple:
    return prompt_key(row) if row["prompt"] else (row["responses"][0],)


def say_schedule_change(cfg, rounds_before):
    """Say that another number of rounds changes the learning rate, where it does."""
    constant = cfg.schedule == "constant" and not cfg.warmup_ratio
    if cfg.stage != "ppo" or constant or rounds_before in (None, cfg.rounds):
        return
    print(
        f"rounds was {rounds_before}, now it is {cfg.rounds}: the learning-rate schedule of "
        "stage ppo spans all rounds, so the learning rate changes from here on",
        flush=True,
    )


def say_dropout_change(before: dict, settings: dict, model: dict):
    """Say that other micro-batches have other dropout masks, if the model has dropout."""
    for name in ("micro_batch_tokens", "layout"):
        if model.get("dropout") and before.get(name, settings[name]) != settings[name]:
            print(
                f"{name} was {before[name]}, now it is {settings[name]}: the dropout masks of the "
                "coming steps are others, so the steps are not the same",
                flush=True,
            )


def read_run_settings(out_dir: str, say=None) -> dict:
    """The settings that a run was begun with, {} if there is no run yet: those of config.json, or
    of the newest checkpoint if config.json was lost. say(text): called if it was."""
    path = os.path.join(out_dir, "config.json")
    settings, problem = read_config_json(path)
    if settings:
        return settings
    for checkpoint_path in checkpoint.list_checkpoints(out_dir):
        try:
            meta = checkpoint.read_meta(checkpoint_path)
        except SystemExit:
            continue  # a damaged one, which is found later
        if say:
            say(f"{path} is {problem}: its settings are taken from {checkpoint_path}")
        return saved_settings(meta)
    if problem == "damaged":
        raise SystemExit(f"{path} is damaged; it does not belong to a run: use another out_dir")
    return {}


def read_config_json(path: str) -> tuple[dict, str]:
    """(the settings in a config.json, "") or ({}, "missing", "empty" or "damaged")."""
    try:
        check_input(path)
        with open(path, "rb") as f:
            content = f.read()
    except FileNotFoundError:
        return {}, "missing"
    except OSError as e:
        raise SystemExit(f"{path} cannot be read now ({e.strerror})")
    if not content.strip():
        return {}, "empty"
    try:
        values = json.loads(content)
        settings, starts = values["config"], values["starts"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}, "damaged"
    if not settings or not isinstance(settings, dict) or not isinstance(starts, list):
        return {}, "damaged"
    return settings, ""


def saved_settings(meta: dict) -> dict:
    """The settings of a run from the meta.json of its checkpoint."""
    if "settings" in meta:
        return meta["settings"]
    settings = dict(meta["config"])  # an older checkpoint: the hashes of the inputs are not there
    model_settings = settings.pop("model", {})
    return settings | model_settings


def has_rows(out_dir: str) -> bool:
    """Whether a run has written samples, scores or metrics: a .jsonl or .npz file, or part of one,
    with content."""
    files = []
    for pattern in ("*.jsonl*", "*.npz*"):
        path = os.path.join(glob.escape(out_dir), "**", pattern)
        files += glob.glob(path, recursive=True)
    there = filter(os.path.exists, files)  # a link may dangle
    return any(os.path.getsize(file) for file in there)


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
    wanted = cfg.keep_best.lstrip("-")
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


# --------------------------------------------------------------------------------------- settings


def flat_settings(cfg) -> dict:
    """{setting: value}. The settings of the model that the config sets are among the others."""
    settings = asdict(cfg)
    model_settings = settings.pop("model")
    return settings | model_settings


def settings_as_json(cfg) -> dict:
    """`flat_settings` as JSON has them: tuples become lists."""
    return json.loads(json.dumps(flat_settings(cfg)))


def run_settings(cfg) -> dict:
    """What a run must keep from its first start to its last: the settings as JSON has them, the
    sha256 of the data, and that of the weights that it samples from or compares with. All ranks
    call this together."""
    settings = settings_as_json(cfg)
    kind = "bin" if cfg.stage == "pretrain" else "jsonl"
    names = [f"train.{kind}", f"val.{kind}"]
    meta = read_meta(cfg.data, names)
    settings["data_source"] = meta["source"]
    settings["data_sha256"] = {name: meta["files"][name]["sha256"] for name in names}
    if cfg.pretrain_coef:
        stream = read_meta(config.pretrain_config(cfg).data, ["train.bin", "val.bin"])["files"]
        for name in ("train.bin", "val.bin"):
            settings["data_sha256"][f"pretrain/{name}"] = stream[name]["sha256"]
    return settings | run_on_rank0(inputs.record, cfg, settings["data_sha256"])
