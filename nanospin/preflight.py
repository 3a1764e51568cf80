"""What must hold before a run's first step: ranks that are alike, inputs that are there, a folder of this very run."""

import glob
import json
import os
import shutil
from dataclasses import asdict, replace

import numpy as np
import torch

from nanospin import checkpoint
from nanospin import config
from nanospin import distributed
import ppo
from data.files import read_json, sha256
from data.folder import read_meta


def check_ranks_agree(cfg):
    """End the run if a rank has another config, other data, code or package versions than rank 0."""
    here = os.path.dirname(os.path.abspath(__file__))
    code = [
        sha256(f)
        for f in sorted(
            glob.glob(os.path.join(glob.escape(here), "*.py"))
            + glob.glob(os.path.join(glob.escape(here), "config", "__init__.py"))
            + glob.glob(os.path.join(glob.escape(here), "data", "*.py"))
        )
    ]
    mine = {f"setting {name}": value for name, value in asdict(cfg).items()} | {
        "data": read_meta(cfg.data, [])["files"],
        "code": code,
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    everyone = distributed.all_gather_object(mine)
    for rank, its in enumerate(everyone):
        for name, value in its.items():
            if value != everyone[0][name]:
                raise SystemExit(
                    f"rank {rank} has another {name} than rank 0"
                    + (
                        f": {value!r}, not {everyone[0][name]!r}"
                        if name != "code" and name != "data"
                        else ""
                    )
                )


def prepare_run(cfg):
    """Check the batch arithmetic and what the run reads, and return where it stands, (round, step), step -1 at the very
    beginning, and its `settings`, which a run that was begun keeps."""
    world = distributed.world_size()
    for name in ["batch_size"] + ["pretrain_batch_size"] * bool(cfg.pretrain_coef):
        if getattr(cfg, name) % world:
            raise SystemExit(
                f"config: {name} {getattr(cfg, name)} must be a multiple of the number of ranks, {world}"
            )
    check_ranks_agree(cfg)
    now = run_settings(cfg)
    if cfg.teacher.endswith(".jsonl") and not os.path.isfile(cfg.teacher):
        raise SystemExit(
            f"{cfg.teacher}: no such file; make it with: python sample.py TEACHER --prompts {cfg.data}/train.jsonl --out {cfg.teacher}, "
            "and the same for val.jsonl, appended"
        )
    sampled = cfg.stage in (
        "preference",
        "spin",
        "ppo",
    )  # whose init is the reference too, as long as the run goes on
    policies = {"init": cfg.init} if sampled or not checkpoint.latest(cfg.out_dir) else {}
    policies |= (
        {"teacher": cfg.teacher}
        if cfg.teacher != "rows" and not os.path.isfile(cfg.teacher)
        else {}
    )
    for name, path in policies.items():
        if (
            path
            and checkpoint.read_meta(checkpoint.resolve(path))["config"]["stage"] == "reward"
            and sampled
        ):
            raise SystemExit(f"{name} {path} is a reward model, no policy; it goes into reward")
    if ":" in cfg.reward:
        ppo.reward_function(cfg.reward)
    elif (
        cfg.reward
        and checkpoint.read_meta(checkpoint.resolve(cfg.reward))["config"]["stage"] != "reward"
    ):
        raise SystemExit(
            f"reward {cfg.reward} is not a reward model: it was not trained by stage reward"
        )
    if os.path.exists(cfg.out_dir) and not os.path.isdir(cfg.out_dir):
        raise SystemExit(f"out_dir {cfg.out_dir} is a file")
    try:
        os.makedirs(cfg.out_dir, exist_ok=True)
    except OSError as e:
        raise SystemExit(f"out_dir {cfg.out_dir}: {e.strerror}")
    if not os.access(cfg.out_dir, os.W_OK):
        raise SystemExit(f"out_dir {cfg.out_dir}: it cannot be written to")
    if distributed.rank() == 0:
        for name in ("writing_*", "removing_*"):
            for folder in glob.glob(os.path.join(glob.escape(cfg.out_dir), "round_*", name)):
                shutil.rmtree(folder)
    newest, path = checkpoint.latest_valid(cfg.out_dir), os.path.join(cfg.out_dir, "config.json")
    written = glob.glob(os.path.join(glob.escape(cfg.out_dir), "**", "*.jsonl*"), recursive=True)
    before = (
        read_json(path, ("config", "starts"), "; it is of no run: use another out_dir")["config"]
        if os.path.exists(path)
        else {}
    )
    if newest or any(os.path.getsize(f) for f in written):
        for key, value in now.items():
            if key not in MAY_CHANGE and key in before and before[key] != value:
                raise SystemExit(
                    f"{cfg.out_dir} was begun with {key} = {before[key]!r}, now it is {value!r}; "
                    "use another out_dir, or remove that one"
                )
    meta = checkpoint.read_meta(newest) if newest else {"round": 0, "step": -1}
    distributed.barrier()
    return (meta["round"], meta["step"]), now


def resolve_template(cfg):
    """The config with the template that it leaves to the checkpoint: that of the run, once it has one, of init, or config.TEMPLATE."""
    if cfg.template:
        return cfg
    path, template = os.path.join(cfg.out_dir, "config.json"), None
    if checkpoint.latest(cfg.out_dir) and os.path.exists(path):
        template = read_json(path, ("config", "starts"))["config"].get("template")
    elif cfg.init:
        template = checkpoint.read_meta(checkpoint.resolve(cfg.init))["config"]["template"]
    return replace(cfg, template=template or config.TEMPLATE)


MAY_CHANGE = {
    "out_dir",
    "device",
    "compile",
    "recompute",
    "deterministic",
    "shards",
    "reshard_after_forward",
    "prefetch",
    "sample_sharded",
    "timeout",
    "keep_last",
    "keep_best",
    "nonfinite",
    "spike",
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


def run_settings(cfg):
    """What a run keeps from its first start to its last: the config as JSON has it, and the hashes of its data and, where
    they are a game's players or a reference, of init and teacher."""
    names = ["train.bin", "val.bin"] if cfg.stage == "pretrain" else ["train.jsonl", "val.jsonl"]
    meta = read_meta(cfg.data, names)
    files = meta["files"]
    stream = (
        read_meta(config.pretrain_config(cfg).data, ["train.bin", "val.bin"])["files"]
        if cfg.pretrain_coef
        else {}
    )
    players = [
        path
        for path in (cfg.init, cfg.teacher, cfg.reward)
        if path and cfg.stage in ("preference", "spin", "ppo")
    ]
    hashes = {path: checkpoint.weights_sha256(path) for path in players if os.path.exists(path)}
    of_data = {name: files[name]["sha256"] for name in names} | {
        f"beside/{name}": stream[name]["sha256"] for name in stream if name.endswith(".bin")
    }
    return json.loads(json.dumps(asdict(cfg))) | {
        "data_source": meta["source"],
        "data_sha256": of_data,
        "players_sha256": hashes,
    }
