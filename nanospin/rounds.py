"""The files of a round, RUN/round_R: parts that a killed run goes on from, and collect.json.

collect.json is the manifest of a round: its report, its settings, and the hashes of what it was
made from and of its files.
"""

import contextlib
import glob
import hashlib
import json
import os
import time
from dataclasses import asdict

import numpy as np

from data import tokenizer
from data.batch import permutation
from data.files import atomic_write, is_there, read_arrays, read_json, sha256, write_json
from nanospin import checkpoint, config, distributed, elastic, inputs, metrics_logger
from nanospin.distributed import broadcast_from_rank0

PART_SIZE = 1024  # rows that are sampled or scored before they are written to disk

# What is made from the scores of a round's samples. scorer.json is the last: `discard_old_scores`
# compares it.
SCORED_FILES = (
    "collect.json",
    "train.jsonl",
    "val.jsonl",
    "train.ref.npz",
    "val.ref.npz",
    "rollout.npz",
    "scorer.json",
)


def round_folder(cfg, round_id: int) -> str:
    return os.path.join(cfg.out_dir, f"round_{round_id}")


def round_indices(n: int, size: int, seed: int, round_id: int) -> np.ndarray:
    """Which of n rows a round has: `size` different ones, size <= n.

    The rounds take them in order, from one permutation after the other, as `batch_indices` does.
    Where a round begins the next permutation, rows that it has already come after it. So at any
    time all rows have been taken equally often, up to one.
    """
    orders = [permutation(n, seed, 0)]
    for epoch in range(1, ((round_id + 1) * size - 1) // n + 1):
        old = epoch * n % size  # how many the round that spans both has from the order before
        order = permutation(n, seed, epoch)
        head = order[~np.isin(order, orders[-1][n - old :])][: size - old]
        rest = order[~np.isin(order, head)]
        orders.append(np.concatenate([head, rest]))
    return np.concatenate(orders)[round_id * size : (round_id + 1) * size]


def response_titles(players: list[str]) -> list[str]:
    """A title for each response of a row whose responses are these players': the player, numbered
    if it has several: ["data", "self", "self"] has data, self 1, self 2."""
    titles = []
    for k, player in enumerate(players):
        several = players.count(player) > 1
        titles.append(f"{player} {players[: k + 1].count(player)}" if several else player)
    return titles


def make_round_folder(path: str):
    """Make the folder of a round's file. The run's own folder is not made again: if somebody has
    removed it, the run must stop."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(os.path.dirname(path))


def reference_checkpoint(cfg, round_id: int) -> str:
    """The reference of a round, which also samples: the last checkpoint of the previous round, or
    `init` (also in a later round that tools/rebuild.py makes again). Ranks that look at different
    times could find different ones: ask rank 0, with `run_on_rank0`."""
    previous = checkpoint.latest(cfg.out_dir, round_id - 1) if round_id else None
    return previous or checkpoint.resolve(cfg.init)


def set_aside_round(cfg, round_id: int):
    """Set the files of a round aside if another policy made them than the one that there is now:
    its checkpoint was damaged or removed, and the steps that were repeated since are not the same,
    on another number of ranks say. policy.json names it."""
    if checkpoint.latest(cfg.out_dir, round_id):
        return  # they have been trained on
    folder = round_folder(cfg, round_id)
    path = os.path.join(folder, "policy.json")
    weights = checkpoint.weights_sha256(reference_checkpoint(cfg, round_id))
    if is_there(path):
        if policy_sha256(cfg, round_id) == weights:
            return
        if os.listdir(folder) != ["policy.json"]:
            aside = checkpoint.unused_path(f"{folder}.other_policy")
            os.rename(folder, aside)
            print(
                f"{folder} was made by another policy than the one that there is now; renamed to "
                f"{aside}, and made again",
                flush=True,
            )
    make_round_folder(path)
    write_json(path, {"weights_sha256": weights})


def policy_sha256(cfg, round_id: int) -> str:
    """The sha256 of the policy that made a round: that in policy.json, or if it is missing, that of
    the round's reference now."""
    path = os.path.join(round_folder(cfg, round_id), "policy.json")
    if is_there(path):
        return str(read_json(path, ("weights_sha256",))["weights_sha256"])
    return checkpoint.weights_sha256(reference_checkpoint(cfg, round_id))


def write_scorer(cfg, round_id: int):
    """Write the source of the function that scores to scorer.json, before the rows of a round."""
    if config.is_function(config.scorer_name(cfg)):
        path = os.path.join(round_folder(cfg, round_id), "scorer.json")
        write_json(path, {"sha256": inputs.source_sha256(config.scorer_name(cfg))})


def discard_old_scores(cfg, round_id: int):
    """Remove the rows of a round, and what was made from them, if the function that scored them has
    another source now and nothing of the round is trained on. Its samples stay, and are scored
    again."""
    folder = round_folder(cfg, round_id)
    path = os.path.join(folder, "scorer.json")
    name = config.scorer_name(cfg)
    if (
        not config.is_function(name)
        or not is_there(path)
        or checkpoint.latest(cfg.out_dir, round_id)
    ):
        return
    if read_json(path, ("sha256",))["sha256"] == inputs.source_sha256(name):
        return
    for file in SCORED_FILES:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, file))
    print(
        f"{folder}: {config.scorer_setting(cfg)} has another source than when it scored this "
        "round, and nothing of it is trained on: its samples are scored again",
        flush=True,
    )


# --------------------------------------------------------------------------------------- parts


def part_files(path: str, n: int, size: int) -> dict[str, range]:
    """The files in which the n rows of `path` are kept while it is made: {file: numbers of its
    rows}. A killed run goes on from those that it has."""
    parts = {}
    for start in range(0, n, size):
        end = min(start + size, n)
        parts[f"{path}.part{start:09d}-{end:09d}"] = range(start, end)
    return parts


def remove_parts(path: str):
    """Remove the parts of a file that is complete, also those that a kill has left."""
    if distributed.rank() == 0:
        for part in glob.glob(glob.escape(path) + ".part*"):
            os.remove(part)
    distributed.barrier()


def score_in_parts(
    path: str, rows: list[dict], scorer_id: str, score, size: int = 0
) -> dict[str, np.ndarray]:
    """Score encoded rows, `size` at a time (0: PART_SIZE), and keep each part: {name: array} on
    every rank.

    score(numbers) -> {name: array} of the rows `numbers`, on every rank; the arrays of the parts
    are concatenated. scorer_id: a hash of what scores them; a part of other rows or of another
    scorer is made again. After each part the run stops if a signal asks it to. The caller calls
    `remove_parts`.
    """
    make_round_folder(path)
    parts = part_files(path, len(rows), size or PART_SIZE)
    hashes = {}
    for part, numbers in parts.items():
        hashes[part] = rows_sha256(scorer_id, [rows[n] for n in numbers])
    kept = broadcast_from_rank0([part for part in parts if is_whole(part, hashes[part])])
    num_kept = sum(len(parts[part]) for part in kept)
    if num_kept and distributed.rank() == 0:
        print(f"{path}: {num_kept} of {len(rows)} rows are scored already", flush=True)
    results = []
    for part, numbers in parts.items():
        if part in kept:
            arrays = read_arrays(part)
            del arrays["of"]
            results.append(arrays)
            continue
        distributed.heartbeat.set_stage(f"scoring {path}, rows from {numbers[0]} on")
        results.append(score(numbers))
        if distributed.rank() == 0:
            with atomic_write(part, "wb") as f:
                np.savez(f, of=part_stamp(hashes[part], results[-1]), **results[-1])
        elastic.exit_if_signalled()
    merged = {}
    for name in results[0]:
        merged[name] = np.concatenate([arrays[name] for arrays in results])
    return merged


def check_finite(values, rows: list[dict], enc, what: str):
    """Exit with one line if a number is not finite, before anything is written.

    values: for each of the encoded rows an array, or a number.
    """
    for row, value in zip(rows, values, strict=True):
        if not np.isfinite(value).all():
            prompt = enc.decode(row["prompt"])[-60:]
            raise SystemExit(
                f"{what} are not finite numbers for the prompt that ends in {prompt!r}; "
                "nothing was written"
            )


def is_whole(part: str, expected: str) -> bool:
    """Whether a part is there, can be read, is of these rows and their scorer (`rows_sha256`), and
    has all its arrays: one bit in the directory of a zip file can hide some."""
    if not is_there(part):
        return False
    try:
        arrays = read_arrays(part)
    except SystemExit:
        return False
    stamp = arrays.pop("of", None)
    return str(stamp) == part_stamp(expected, arrays)


def part_stamp(rows_hash: str, arrays: dict) -> str:
    """What a part says of itself: whose scores it has, and the names of its arrays."""
    return " ".join([rows_hash, *sorted(arrays)])


def rows_sha256(weights: str, rows: list[dict]) -> str:
    """A hash of encoded rows and of what they are scored with."""
    names = ("prompt", "responses", "ranks", "group", "scores")
    contents = []
    for row in rows:
        contents.append({name: row[name] for name in names if name in row})
    return hashlib.sha256((weights + json.dumps(contents)).encode()).hexdigest()


# ------------------------------------------------------------------------------------ manifest


def write_manifest(cfg, round_id, enc, device, encoded, report, start: float):
    """collect.json: the report, and everything that the files of a round were made from."""
    folder = round_folder(cfg, round_id)
    path = os.path.join(folder, "collect.json")
    if is_there(path):
        return
    files = [name for name in sorted(os.listdir(folder)) if name.endswith((".jsonl", ".npz"))]
    teacher_files, before = [], {}  # what a teacher checkpoint answered, for all rounds
    if inputs.is_answered(cfg):
        teacher_files = ["teacher_train.jsonl", "teacher_val.jsonl"]
        if round_id:  # the teacher may be gone by now
            before = manifest_hashes(round_folder(cfg, round_id - 1), "made_of") or {}
    made_of = {}
    for name, input_path in input_files(cfg, round_id, reference_checkpoint(cfg, round_id)).items():
        known = before.get(name) if name == "teacher" else None
        made_of[name] = known or checkpoint.weights_sha256(input_path)
    if config.is_scored(cfg):
        made_of["ranked_by"] = inputs.scorer_sha256(cfg.ranked_by)
    manifest = {
        "round": round_id,
        "config": asdict(cfg),
        "tokenizer": tokenizer.fingerprint(enc),
        "made_of": made_of,
        "made_by": metrics_logger.versions(device, distributed.compute_dtype(cfg, device)),
        "rows": {split: len(rows) for split, rows in encoded.items()},
        "files": {name: sha256(os.path.join(folder, name)) for name in files},
        "teacher_files": {name: sha256(os.path.join(cfg.out_dir, name)) for name in teacher_files},
        "report": report,
        "seconds": time.perf_counter() - start,
    }
    write_json(path, with_checksum(manifest))


def input_files(cfg, round_id: int, reference: str) -> dict[str, str]:
    """{name: path} of everything that a round is made from. Files of earlier rounds are named by
    their place in the run."""
    paths = {"reference": reference}
    if cfg.lora_rank and round_id:  # which is an adapter of it
        paths["base"] = cfg.init
    for split in ("train", "val"):
        paths[f"{split}.jsonl"] = f"{cfg.data}/{split}.jsonl"
    if config.is_scored(cfg) and not config.is_function(cfg.ranked_by):
        paths["ranked_by"] = cfg.ranked_by
    if cfg.stage != "spin":
        return paths
    if cfg.teacher not in ("", "rows"):
        paths["teacher"] = cfg.teacher
    earlier = []
    for player in cfg.players:
        if player.startswith("self-"):
            r = round_id - int(player.removeprefix("self-"))
            if r >= 0:
                earlier += [f"round_{r}/self_train.jsonl", f"round_{r}/self_val.jsonl"]
    for r in range(max(0, round_id - cfg.replay_rounds), round_id):
        earlier.append(f"round_{r}/train.jsonl")
    for name in earlier:
        paths[name] = os.path.join(cfg.out_dir, name)
    return paths


def check_files(cfg, round_id: int):
    """Exit with one line if a file that this round reads from the run's folder is not the one that
    an earlier round wrote or read, or that this one wrote before it was killed: its hash is in
    collect.json."""
    expected = own_files(cfg, round_id)
    for name, path in input_files(cfg, round_id, "").items():
        if name.startswith("round_"):
            folder, file = os.path.split(path)
            if file == "train.jsonl" and not is_there(path):
                raise SystemExit(
                    f"{path} is missing, and replay_rounds trains on it again: put it back, or use "
                    "another out_dir"
                )
            hashes = manifest_hashes(folder, "files")
            if hashes is not None:
                expected[path] = hashes.get(file)
    if cfg.stage == "spin" and round_id:
        hashes = manifest_hashes(round_folder(cfg, round_id - 1), "teacher_files") or {}
        for name, value in hashes.items():
            expected[os.path.join(cfg.out_dir, name)] = value
    for path, value in expected.items():
        inputs.require_sha256(path, value, cfg.out_dir, "collect.json")


def own_files(cfg, round_id: int) -> dict[str, str]:
    """{path: sha256} of the files of a round that are there, as its own collect.json has them. A
    missing one is made again, or refused where it cannot be."""
    folder = round_folder(cfg, round_id)
    expected = {}
    for name, value in (manifest_hashes(folder, "files") or {}).items():
        path = os.path.join(folder, name)
        if is_there(path):
            expected[path] = value
    return expected


def manifest_hashes(folder: str, entry: str) -> dict | None:
    """The hashes of files in a round's collect.json; None if there is none, as in a rebuilt run."""
    path = os.path.join(folder, "collect.json")
    if not is_there(path):
        return None
    hashes = read_manifest(folder, {"files": dict, "sha256": str}).get(entry, {})
    if not isinstance(hashes, dict):
        raise SystemExit(f"{path}: {entry} must be an object")
    return hashes


def read_manifest(folder: str, types: dict, advice: str = "") -> dict:
    """collect.json of a round. types: {name: type} of the fields that it must have.

    Exits with one line, which can end in `advice`, if it is damaged or was edited.
    """
    path = os.path.join(folder, "collect.json")
    manifest = read_json(path, types, advice)
    for name, expected in types.items():
        config.convert(name, manifest[name], expected, path)
    contents = {name: value for name, value in manifest.items() if name != "sha256"}
    if with_checksum(contents) != manifest:
        raise SystemExit(f"{path} was edited: its contents do not match its sha256")
    return manifest


def with_checksum(manifest: dict) -> dict:
    """The manifest with the sha256 of its contents, so that an edit is noticed."""
    text = json.dumps(manifest, sort_keys=True)
    return manifest | {"sha256": hashlib.sha256(text.encode()).hexdigest()}
