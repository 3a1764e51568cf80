"""The settings that a run was begun with, and which of them may differ when it is resumed."""

import json
import os
from dataclasses import asdict

from data.cli import default_device
from data.files import check_input, is_there, printable
from data.folder import read_meta
from nanospin import checkpoint, config, inputs, rounds
from nanospin.distributed import run_on_rank0

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

# What the seeds of one setting may differ in: the seed, and where they read what
OF_A_SEED = {
    "seed",
    "init",
    "teacher",
    "reward",
    "ranked_by",
    "data",
    "pretrain_data",
    "tokenizer",
    "data_source",
    "data_sha256",
    "players_sha256",
    "checkpoints",
}


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


def settings_as_json(cfg) -> dict:
    """`flat_settings` as JSON has them: tuples become lists."""
    return json.loads(json.dumps(flat_settings(cfg)))


def flat_settings(cfg) -> dict:
    """{setting: value}. The settings of the model that the config sets are among the others."""
    settings = asdict(cfg)
    model_settings = settings.pop("model")
    return settings | model_settings


# ------------------------------------------------------------------------------ the settings before


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


def collected_settings(out_dir: str, settings: dict) -> dict:
    """The settings in collect.json of the latest round that has them, {} if none does.

    They name the checkpoints that init, teacher and reward were: where that is what `settings` have
    found, it is the same setting.
    """
    for folder in reversed(checkpoint.list_rounds(out_dir)):
        path = os.path.join(folder, "collect.json")
        if not is_there(path):
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
    for path in files_with_rows(out_dir):
        if os.path.relpath(path, out_dir).startswith(("round_", "teacher_")):
            raise SystemExit(
                f"{out_dir} has samples ({path}), and no config.json or checkpoint that says "
                "with which settings they were made: put its config.json back, or use another "
                "out_dir"
            )


def files_with_rows(out_dir: str):
    """The samples, scores and metrics that a run has written: .jsonl and .npz files, or parts of
    them, with content. Hidden ones are not of the run. Raises OSError if a folder cannot be listed:
    it would look empty."""

    def stop(error):  # without it os.walk leaves the folder out
        if not isinstance(error, FileNotFoundError):
            raise error

    for folder, inside, names in os.walk(out_dir, onerror=stop, followlinks=True):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        for name in sorted(names):
            path = os.path.join(folder, name)
            is_of_rows = (".jsonl" in name or ".npz" in name) and not name.startswith(".")
            if is_of_rows and is_there(path) and os.path.getsize(path):  # a link may dangle
                yield path


# ---------------------------------------------------------------------------------------- comparing


def check_same_run(cfg, settings: dict, newest: str | None):
    """If out_dir has results, they must come from the same settings, except for MAY_CHANGE. Those
    in a checkpoint are protected by its manifest, so they count more than config.json, which knows
    better only where inputs that were moved are now."""
    before = read_run_settings(cfg.out_dir, print)
    if newest:
        saved = checkpoint.read_meta(newest).get("settings") or {}
        paths = {name: before[name] for name in inputs.PATHS if name in before}
        before |= saved | paths
    if not newest and not any(files_with_rows(cfg.out_dir)):
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
    if newest:
        check_rounds(cfg, newest)
    say_schedule_change(cfg, before.get("rounds"))
    if newest:
        say_dropout_change(before, settings, checkpoint.read_meta(newest)["model"])


def check_rounds(cfg, newest: str):
    """Exit with one line if a run is in a round already that `rounds` leaves out. Its newest
    checkpoint, perhaps of half a round, would be taken for the end."""
    begun = round_of(newest) + 1
    if cfg.rounds < begun:
        raise SystemExit(
            f"{cfg.out_dir} has begun {begun} rounds, more than rounds = {cfg.rounds}: "
            f"use rounds = {begun}, or another out_dir"
        )


def round_of(path: str) -> int:
    """The round of a checkpoint RUN/round_R/step_S."""
    return int(os.path.basename(os.path.dirname(path)).removeprefix("round_"))


def has_default(cfg, settings: dict, name: str) -> bool:
    """Whether a setting has its default. Entries of config.json that are no settings have none, and
    count as if they had."""
    defaults = settings_as_json(type(cfg)())
    return name not in defaults or settings[name] == defaults[name]


def check_same_settings(runs: list[str]):
    """Exit with one line if runs that are averaged as the seeds of one setting were trained with
    different settings. Compared are those that change results and name no file. A run without a
    config.json, such as a copied log, is not compared."""
    first = {}
    for run in filter(os.path.isdir, runs):
        settings, _ = read_config_json(os.path.join(run, "config.json"))
        for name, value in settings.items():
            if name in OF_A_SEED or name in MAY_CHANGE - {"rounds"}:
                continue
            of_run, expected = first.setdefault(name, (run, value))
            if value != expected:
                raise SystemExit(
                    printable(
                        f"{run} was trained with {name} = {value!r}, and {of_run} with "
                        f"{expected!r}: they are no seeds of one setting"
                    )
                )


def is_same_so_far(cfg, before, now) -> bool:
    """Whether a setting that may be a list with one value per round has the same values in all
    rounds up to that of the newest checkpoint. Those of later rounds may change, and there may be
    more of them: nothing of these rounds that is kept depends on them."""
    newest = checkpoint.latest(cfg.out_dir)
    begun = round_of(newest) + 1 if newest else 1
    values = [value if isinstance(value, list) else [value] for value in (before, now)]
    begun = min(begun, cfg.rounds, max(map(len, values)))
    for n, listed in enumerate(values):
        values[n] = listed * begun if len(listed) == 1 else listed[:begun]
    return values[0] == values[1]


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
    """Say that other micro-batches, or a compiled model, have other dropout masks, if the model has
    dropout."""
    if not model.get("dropout"):
        return
    before = settings | before  # an older run may lack some
    settings = dict(settings)
    for values in (before, settings):
        if values["compile"] is None:
            values["compile"] = (values["device"] or default_device()) != "cpu"
    for name in ("micro_batch_tokens", "layout", "compile"):
        if before[name] != settings[name]:
            print(
                f"{name} was {before[name]}, now it is {settings[name]}: the dropout masks of the "
                "coming steps are others, so the steps are not the same",
                flush=True,
            )
