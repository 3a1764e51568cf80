"""What a run reads again at every round, compared with what it was when the run began.

The data, a teacher's file, and the checkpoints that are sampled from or compared with (init,
teacher, reward model) are read at every round. config.json has their hashes. `check_unchanged`
compares them at the start of each round: a run must not go on with other rows or another reference.
An input that has moved is accepted if its hash is the same.

Hashes of files are kept in RUN/hashes.json, so that a large file is read once and not at every
round. An entry counts as long as the file's size, times and inode are the same.
"""

import contextlib
import functools
import hashlib
import importlib
import inspect
import os
import time
import weakref
from dataclasses import replace

from data import tokenizer
from data.files import is_there, read_json, write_json
from nanospin import checkpoint, distributed
from nanospin.config import (
    import_function,
    is_function,
    pretrain_config,
    scorer_name,
    scorer_setting,
)
from nanospin.distributed import broadcast_from_rank0, run_on_rank0

# Stages whose `init` is the reference too, for as long as the run lasts.
POLICY_STAGES = ("preference", "spin", "ppo")

# Settings that name a checkpoint. A teacher can be a file, and the last two functions.
ROLES = ("init", "teacher", "reward", "ranked_by")
NO_PATHS = ("", "rows", "order", "data")  # values of these settings that name none
CHUNK_SIZE = 2**24  # bytes that are read at a time
SETTLED = 2.0  # seconds; the hash of a file that changed more recently is not kept

# Entries of config.json that are, or hold, paths. What is there is compared by its hash.
PATHS = ("data", "pretrain_data", "tokenizer", *ROLES, "checkpoints")

# Entries of config.json that are not compared: where an input was found, and one of older runs.
NOT_COMPARED = ("data_source", "checkpoints", "reward_source_sha256", "prompts_differ")

imported_sources = weakref.WeakKeyDictionary()  # module of a scorer -> {function: sha256}
watched = {}  # out_dir -> {path: sha256} of what its current round reads


# ------------------------------------------------------------------------------ hashes of files


def file_sha256(path: str, out_dir: str) -> str:
    """The sha256 of a file, from out_dir/hashes.json if the file has not changed since.

    Exits with one line if the file cannot be read.
    """
    name = os.path.abspath(path)
    cache = os.path.join(out_dir, "hashes.json")
    hashes = read_hashes(cache)
    try:
        key = file_key(path)
        entry = hashes.get(name)
        if isinstance(entry, dict) and entry.get("key") == key:
            return str(entry.get("sha256"))
        value = hash_chunks(path)
        unchanged = file_key(path) == key
    except OSError as e:
        raise SystemExit(f"{path}: {e.strerror}; fix it and run the same command again")
    newest_change = max(key[1], key[2]) / 1e9
    if unchanged and time.time() - newest_change > SETTLED and os.path.isdir(out_dir):
        hashes[name] = {"key": key, "sha256": value}
        with contextlib.suppress(OSError):  # it can be made again
            write_json(cache, hashes)
    return value


def file_key(path: str) -> list[int]:
    """What changes when a file does: size, time of the content and of the inode, inode."""
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def read_hashes(cache: str) -> dict:
    """The entries of hashes.json; none if it is missing or damaged: it can be made again."""
    try:
        return read_json(cache)
    except SystemExit:
        return {}


def hash_chunks(path: str) -> str:
    """The sha256 of a file, chunk by chunk. A large file takes a while: this is progress."""
    h = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(CHUNK_SIZE):
            h.update(chunk)
            distributed.heartbeat.touch()
    return h.hexdigest()


def require_sha256(path: str, expected: str, out_dir: str, since: str):
    """Exit with one line if a file has another hash. since: whose hash is expected."""
    found = file_sha256(path, out_dir)
    if found != expected:
        raise SystemExit(
            f"{path} was changed: its sha256 is {found[:16]}..., {since} has "
            f"{str(expected)[:16]}...; put the original back and run the same command again, or "
            "use another out_dir"
        )


# ------------------------------------------------------------------------- what a run began with


def record(cfg, data_sha256: dict) -> dict:
    """Entries of config.json about the inputs: the checkpoints that init, teacher and reward are
    now, the sha256 of their weights, or of a teacher's file, and of a reward function's source.

    data_sha256: what meta.json says of the data's files; token streams are compared with it here.
    """
    for path, expected in data_files(cfg, data_sha256).items():
        if path.endswith(".bin"):
            require_sha256(path, expected, cfg.out_dir, "meta.json")
    checkpoints, hashes = {}, {}
    for role in ROLES:
        path = getattr(cfg, role)
        if path in NO_PATHS or not is_there(path):
            continue  # a missing one is refused where it is needed
        if role == "teacher" and os.path.isfile(path):
            hashes[role] = file_sha256(path, cfg.out_dir)
            continue
        try:
            found = checkpoint.resolve(path)
            hashes[role] = checkpoint.read_meta(found)["weights_sha256"]
            checkpoints[role] = found
        except SystemExit:
            if is_read(cfg, role):
                raise
    entries = {"players_sha256": hashes, "checkpoints": checkpoints}
    if is_function(scorer_name(cfg)):
        entries["reward_source_sha256"] = source_sha256(scorer_name(cfg))
    if cfg.tokenizer not in ("", "gpt2", "bytes"):
        entries["tokenizer_sha256"] = tokenizer.fingerprint(tokenizer.load(cfg.tokenizer))
    return entries


def data_files(cfg, data_sha256: dict) -> dict[str, str]:
    """{path: sha256} of the files named in config.json's data_sha256."""
    files = {}
    for name, expected in data_sha256.items():
        folder = cfg.data
        if name.startswith("pretrain/"):
            folder = pretrain_config(cfg).data
        files[os.path.join(folder, os.path.basename(name))] = expected
    return files


def source_sha256(function: str) -> str | None:
    """The sha256 of the source of "module:function", as it was when this process imported it: it
    may have changed since. None if it is not Python.

    The source is the module's file, and that of the function if the module imports it from there.
    Other modules that they import are not in it.
    """
    found = import_function(function)
    module = importlib.import_module(function.partition(":")[0])
    known = imported_sources.setdefault(module, {})
    if function not in known:
        hashes = []
        for path in dict.fromkeys((getattr(module, "__file__", None), file_of_function(found))):
            if path and path.endswith(".py") and os.path.exists(path):
                hashes.append(hash_chunks(path))
        if len(hashes) == 2:
            hashes = [hashlib.sha256("".join(hashes).encode()).hexdigest()]
        known[function] = hashes[0] if hashes else None
    return known[function]


def file_of_function(function) -> str | None:
    """The file that defines a function, or the class of an object that is called; what a decorator
    or a partial wraps. None if it is not Python."""
    if isinstance(function, functools.partial):
        function = function.func
    try:
        function = inspect.unwrap(function)
        is_object = not inspect.isroutine(function) and not inspect.isclass(function)
        return inspect.getsourcefile(type(function) if is_object else function)
    except (TypeError, ValueError):
        return None


def scorer_sha256(scorer: str) -> str | None:
    """The sha256 of a function's source, or of the weights of a model that scores."""
    return source_sha256(scorer) if is_function(scorer) else checkpoint.weights_sha256(scorer)


def pin(cfg, settings: dict):
    """The config with init, teacher and reward replaced by the checkpoints that they were when the
    run began. The run that wrote them may go on and have newer ones. Every rank's settings become
    those of rank 0."""
    settings.update(broadcast_from_rank0(settings))
    return replace(cfg, **settings["checkpoints"])


# ------------------------------------------------------------------------------------- comparing


def match_inputs(cfg, before: dict, settings: dict) -> set[str]:
    """Which settings need not be equal as text: inputs that are what the run began with, wherever
    they are now.

    before: the settings in config.json. settings: those of this start. If init, teacher or reward
    model have newer checkpoints, and the one that the run began with is still there, `settings`
    gets that one.
    """
    same = set(NOT_COMPARED)
    for name in ("data", "pretrain_data", *ROLES):
        if same_path(before.get(name), settings.get(name)):
            same.add(name)
    if before.get("data_sha256") == settings["data_sha256"]:
        same |= {"data", "pretrain_data"}
    if settings.get("tokenizer_sha256") and (
        before.get("tokenizer_sha256") == settings["tokenizer_sha256"]
    ):
        same.add("tokenizer")

    if before.get("reward_source_sha256"):
        settings["reward_source_sha256"] = before["reward_source_sha256"]
    if isinstance(before.get("players_sha256"), dict):
        for role, expected in before["players_sha256"].items():
            if role in same and settings["players_sha256"].get(role) != expected:
                use_recorded_checkpoint(role, expected, before, settings)
            if role in same and settings["players_sha256"].get(role) != expected:
                accept_if_unread(cfg, role, expected, before, settings)
            if settings["players_sha256"].get(role) == expected:
                same.add(role)
    if cfg.stage not in POLICY_STAGES and not cfg.lora_rank:
        same.add("players_sha256")  # init was read once, at the beginning
    return same


def same_path(one, other) -> bool:
    """Whether two settings name the same path: slashes and dots do not matter."""
    if not isinstance(one, str) or not isinstance(other, str) or not one or not other:
        return one == other
    return os.path.abspath(one) == os.path.abspath(other)


def use_recorded_checkpoint(role: str, expected: str, before: dict, settings: dict):
    """Put the checkpoint that a run began with into its settings, if it is still what it was and
    stands in the folder that the setting names."""
    path = recorded_checkpoint(role, before)
    if not path or not checkpoint.is_checkpoint(path):
        return
    folder = os.path.join(os.path.abspath(settings[role]), "")
    if not os.path.abspath(path).startswith(folder):
        return
    if checkpoint.read_meta(path)["weights_sha256"] == expected:
        settings["checkpoints"][role] = path
        settings["players_sha256"][role] = expected


def recorded_checkpoint(role: str, before: dict) -> str:
    """The checkpoint that a run began with, "" if config.json does not name it."""
    recorded = before.get("checkpoints")
    path = recorded.get(role) if isinstance(recorded, dict) else None
    return path if isinstance(path, str) else ""


def accept_if_unread(cfg, role: str, expected: str, before: dict, settings: dict):
    """Keep the recorded checkpoint in the settings if it is gone or another one now, and not needed
    any more. The run that wrote it removes old ones when it goes on."""
    path = recorded_checkpoint(role, before)
    if is_read(cfg, role) or not path:
        return
    settings["checkpoints"][role] = path
    settings["players_sha256"][role] = expected
    text = f"{role} {path} is not the one that this run began with any more; it is not read again"
    print(text, flush=True)


def check_unchanged(cfg, settings: dict):
    """Exit with one line if something that the coming round reads is not what the run began with.

    cfg: from `pin`. Rank 0 looks; all ranks call this together, before anything is written.
    """
    files = data_files(cfg, settings["data_sha256"])
    for role, expected in settings["players_sha256"].items():
        if is_read(cfg, role):
            path = getattr(cfg, role)
            file = path if os.path.isfile(path) else os.path.join(path, "model.safetensors")
            files[file] = expected
    watched[cfg.out_dir] = files
    check_again(cfg)


def check_again(cfg):
    """`check_unchanged` for what this round has read by now, before its rows are written. Sampling
    takes hours, and some inputs are read after it."""
    run_on_rank0(require_all, cfg.out_dir)


def require_all(out_dir: str):
    for path, expected in watched.get(out_dir, {}).items():
        require_sha256(path, expected, out_dir, "this run")


def is_read(cfg, role: str) -> bool:
    """Whether a run still reads a role's file. With a first checkpoint, preference and spin have
    what they need of init, and preference of its scorer; spin then has the answers of a teacher
    that is a checkpoint. LoRA needs init, its base, whenever it resumes.
    """
    if role == "init" and cfg.lora_rank:
        return True
    if cfg.stage not in POLICY_STAGES:
        return False
    if role == "reward" or cfg.stage == "ppo" or not checkpoint.latest(cfg.out_dir):
        return True
    if role == "ranked_by":
        return cfg.stage == "spin"
    return role == "teacher" and not is_answered(cfg)


def is_answered(cfg) -> bool:
    """Whether a run has all answers of a teacher that is a checkpoint."""
    if cfg.stage == "ppo" or cfg.teacher in ("", "rows") or os.path.isfile(cfg.teacher):
        return False
    return all(is_there(teacher_file(cfg, split)) for split in ("train", "val"))


def teacher_file(cfg, split: str) -> str:
    return os.path.join(cfg.out_dir, f"teacher_{split}.jsonl")


def warn_if_reward_changed(cfg, settings: dict, start: tuple[int, int], log):
    """Say that a reward function has another source than when the run began. This is not refused:
    once a function is fixed, the same command must continue."""
    name = scorer_name(cfg)
    if not is_function(name) or source_sha256(name) == settings.get("reward_source_sha256"):
        return
    text = f"the source of {scorer_setting(cfg)} has changed since this run began"
    log.warning(start[0], max(0, start[1]), text)
