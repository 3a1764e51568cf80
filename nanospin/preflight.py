"""Checks before a run's first step: the ranks agree, the inputs exist, out_dir is this run's."""

import glob
import json
import os
import shutil
from dataclasses import asdict, replace

import numpy as np
import torch

from data import tokenizer
from data.files import read_json, sha256
from data.folder import find_invalid_token, read_meta, read_stream
from data.template import TEMPLATE
from nanospin import checkpoint, config, distributed

# Stages whose `init` is the reference too, for as long as the run lasts.
POLICY_STAGES = ("preference", "spin", "ppo")

# Settings that may differ when a run is resumed: they do not change its results.
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
    "on_nonfinite",
    "loss_spike_factor",
    "log_interval",
    "save_interval",
    "wandb",
    "wandb_project",
    "wandb_runs",
    "gen_batch_size",
    "micro_batch_tokens",
    "layout",
    "rounds",
}


def resolve_template(cfg):
    """Return the config with its template filled in: that of the run if it has checkpoints, else
    that of `init`, else the default."""
    if cfg.template:
        return cfg
    template = ""
    path = os.path.join(cfg.out_dir, "config.json")
    if checkpoint.latest(cfg.out_dir) and os.path.exists(path):
        template = read_json(path, ("config", "starts"))["config"].get("template")
    elif cfg.init:
        template = checkpoint.read_meta(checkpoint.resolve(cfg.init))["config"]["template"]
    return replace(cfg, template=template or TEMPLATE)


def prepare_run(cfg) -> tuple[tuple[int, int], dict]:
    """Check the config and everything that the run reads. Exits with one line on a mistake.

    Returns where the run starts, (round, step), with step -1 if it has no checkpoint yet, and its
    settings for config.json. All ranks call this together.
    """
    check_batch_sizes(cfg)
    check_ranks_agree(cfg)
    settings = run_settings(cfg)
    check_teacher(cfg)
    check_policies(cfg)
    check_reward(cfg)
    check_out_dir(cfg.out_dir)
    if distributed.rank() == 0:
        remove_unfinished_checkpoints(cfg.out_dir)
    newest = checkpoint.latest_valid(cfg.out_dir)
    check_same_run(cfg, settings, newest)
    start = (0, -1)
    if newest:
        meta = checkpoint.read_meta(newest)
        start = (meta["round"], meta["step"])
    distributed.barrier()  # all have read config.json: rank 0 may write it
    return start, settings


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
    if needs_policy or not checkpoint.latest(cfg.out_dir):
        paths["init"] = cfg.init
    if cfg.teacher != "rows" and not os.path.isfile(cfg.teacher):
        paths["teacher"] = cfg.teacher
    for name, path in paths.items():
        if not path:
            continue
        stage = checkpoint.read_meta(checkpoint.resolve(path))["config"]["stage"]
        if needs_policy and stage == "reward":
            raise SystemExit(
                f"{name} {path} is a reward model, not a policy; a reward model is set as `reward`"
            )


def check_reward(cfg):
    """`reward` must be a function that can be imported, or a reward model."""
    if ":" in cfg.reward:
        config.import_function(cfg.reward)
    elif cfg.reward:
        meta = checkpoint.read_meta(checkpoint.resolve(cfg.reward))
        if meta["config"]["stage"] != "reward":
            raise SystemExit(
                f"reward {cfg.reward} is not a reward model: it was not trained by stage reward"
            )


def check_out_dir(out_dir: str):
    """Make out_dir if it does not exist; it must be a folder that can be written to."""
    if os.path.exists(out_dir) and not os.path.isdir(out_dir):
        raise SystemExit(f"out_dir {out_dir} is a file")
    try:
        os.makedirs(out_dir, exist_ok=True)
    except OSError as e:
        raise SystemExit(f"out_dir {out_dir}: {e.strerror}")
    if not os.access(out_dir, os.W_OK):
        raise SystemExit(f"out_dir {out_dir}: no permission to write to it")


def remove_unfinished_checkpoints(out_dir: str):
    """Remove what a killed run was writing or removing."""
    for name in ("writing_*", "removing_*"):
        for folder in glob.glob(os.path.join(glob.escape(out_dir), "round_*", name)):
            shutil.rmtree(folder)


def check_same_run(cfg, settings: dict, newest: str | None):
    """If out_dir has results, they must come from the same settings, except for MAY_CHANGE."""
    path = os.path.join(cfg.out_dir, "config.json")
    before = {}
    if os.path.exists(path):
        advice = "; it does not belong to a run: use another out_dir"
        before = read_json(path, ("config", "starts"), advice)["config"]
        if not isinstance(before, dict):
            raise SystemExit(f"{path}: config must be an object{advice}")
    if not before or (not newest and not has_rows(cfg.out_dir)):
        return
    for name in settings | before:
        if name in MAY_CHANGE:
            continue
        if name not in before and name not in cfg.model:
            continue  # a setting that did not exist yet
        if before.get(name) != settings.get(name):
            raise SystemExit(
                f"{cfg.out_dir} was begun with {name} = {before.get(name)!r}, "
                f"now it is {settings.get(name)!r}; use another out_dir, or remove that one"
            )


def has_rows(out_dir: str) -> bool:
    """Whether a run has written samples or metrics: a .jsonl file, or part of one, with content."""
    files = glob.glob(os.path.join(glob.escape(out_dir), "**", "*.jsonl*"), recursive=True)
    return any(os.path.getsize(file) for file in files)


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


# --------------------------------------------------------------------------------------- settings


def flat_settings(cfg) -> dict:
    """{setting: value}. The settings of the model that the config sets are among the others."""
    settings = asdict(cfg)
    model_settings = settings.pop("model")
    return settings | model_settings


def run_settings(cfg) -> dict:
    """What a run must keep from its first start to its last: the settings as JSON has them, the
    sha256 of the data, and that of the weights that it samples from or compares with."""
    settings = json.loads(json.dumps(flat_settings(cfg)))  # tuples become lists
    kind = "bin" if cfg.stage == "pretrain" else "jsonl"
    names = [f"train.{kind}", f"val.{kind}"]
    meta = read_meta(cfg.data, names)
    settings["data_source"] = meta["source"]
    settings["data_sha256"] = {name: meta["files"][name]["sha256"] for name in names}
    if cfg.pretrain_coef:
        stream = read_meta(config.pretrain_config(cfg).data, ["train.bin", "val.bin"])["files"]
        for name in ("train.bin", "val.bin"):
            settings["data_sha256"][f"pretrain/{name}"] = stream[name]["sha256"]
    settings["players_sha256"] = {}
    if cfg.stage in POLICY_STAGES:
        for path in (cfg.init, cfg.teacher, cfg.reward):
            if path and os.path.exists(path):
                settings["players_sha256"][path] = checkpoint.weights_sha256(path)
    return settings
