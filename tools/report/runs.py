"""What a run's folder holds, read as far as it can be: a run may be cut short, kept in part, or damaged. What cannot be read is
a line in run["notes"], never the end."""

import json
import os
import re

from nanospin import checkpoint
from nanospin.config import Config
from data.batch import batch_rows, permutation, reward_batch, stream_batch
from data.rows import encode_rows, read_rows
from data.files import printable, read_json, sha256
from data.folder import read_meta, read_stream
from tools.plot import along


def told(run, function, *args):
    """function(*args); a line that it ends with becomes a note of the run, and the result None."""
    try:
        return function(*args)
    except SystemExit as e:
        run["notes"].append(str(e))


def read_run(folder):
    """{"folder", "name", "stage", "config", "starts", "records", "span", "rounds", "players", "checkpoint", "meta", "enc", "notes"};
    a record's "x" is its step since the run began, over its rounds. Exits with one line if no run is there."""
    about_path, log_path = (os.path.join(folder, name) for name in ("config.json", "metrics.jsonl"))
    names = os.listdir(folder) if os.path.isdir(folder) else []
    run = {
        "folder": folder,
        "name": os.path.basename(os.path.abspath(folder)),
        "notes": [],
        "meta": None,
        "enc": None,
    }
    run["rounds"] = sorted(int(name[6:]) for name in names if re.fullmatch(r"round_\d{1,9}", name))
    about = told(run, read_json, about_path, ("config", "starts")) or {}
    if not about and not run["rounds"] and not os.path.exists(log_path):
        raise SystemExit(
            printable(
                f"{folder}: no run there; it should be the out_dir of a run, with its config.json and metrics.jsonl"
            )
        )
    run["checkpoint"] = checkpoint.latest(folder)
    if run["checkpoint"]:
        run["meta"] = told(run, checkpoint.read_meta, run["checkpoint"])
        run["enc"] = run["meta"] and told(
            run, checkpoint.read_tokenizer, run["checkpoint"], run["meta"]
        )
    else:
        run["notes"].append(
            "There is no checkpoint (yet), so no tokenizer: what the loss asks for cannot be shown."
        )
    run["config"] = (
        about["config"]
        if isinstance(about.get("config"), dict)
        else run["meta"]["config"]
        if run["meta"]
        else {}
    )
    run["starts"] = about.get("starts", [])
    run["stage"] = str(run["config"].get("stage", "of an unknown stage"))
    run["players"] = setting(run, "players") if run["stage"] == "spin" else []
    run["records"] = read_records(run, log_path)
    lengths = along(
        [r | {"step": r["step"] + (r["kind"] == "step")} for r in run["records"]]
    )  # a round is as long as the steps that it took
    for x, record in zip(lengths, run["records"]):
        record["x"] = x - (record["kind"] == "step")
    run["span"] = (
        min((r["x"] for r in run["records"]), default=0),
        max((r["x"] for r in run["records"]), default=0),
    )
    if run["config"] and not at_its_end(run):
        last = [
            f"its last record is of round {r['round']}, step {r['step']}" for r in run["records"]
        ][-1:] or ["nothing is logged"]
        wanted = f"asked for were {setting(run, 'rounds')} rounds of {setting(run, 'max_steps') or 'some'} steps"
        run["notes"].append(
            f"The run is not at its end (it may be under way): {last[0]}; {wanted}. The same command goes on."
        )
    return run


def read_records(run, path):
    """The records of metrics.jsonl that are whole."""
    records, broken = [], 0
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            for line in f:
                try:
                    record = json.loads(line)
                    if type(record["kind"]) is not str or any(
                        type(record[n]) is not int or not 0 <= record[n] < 2**40
                        for n in ("round", "step")
                    ):
                        raise ValueError
                    records.append(record)
                except (ValueError, KeyError, TypeError, RecursionError):
                    broken += 1
    except OSError as e:
        run["notes"].append(f"metrics.jsonl: {e.strerror}: there are no curves and no figures.")
    if broken:
        run["notes"].append(
            f"metrics.jsonl: {broken} of {broken + len(records)} lines cannot be read; a kill may cut the last one short."
        )
    return records


def at_its_end(run):
    """Whether the last thing that the run did was to evaluate its last round's last step, as far as the settings say which that is."""
    last = [r for r in run["records"] if r["kind"] in ("step", "eval")][-1:]
    return (
        bool(last)
        and last[0]["kind"] == "eval"
        and last[0]["round"] == setting(run, "rounds") - 1
        and last[0]["step"] > 0
        and setting(run, "max_steps") in (0, last[0]["step"])
    )


def kind(run, name, round_id=None):
    return [r for r in run["records"] if r["kind"] == name and round_id in (None, r["round"])]


def of(record, key):
    """A record's figure, None where it is no finite number."""
    value = record.get(key)
    return value if type(value) in (int, float) and abs(value) < 1e300 else None


def minutes(records):
    return sum(of(r, "seconds") or 0 for r in records) / 60


def setting(run, name):
    """A setting of the run; the default where it has none of that type."""
    value, default = run["config"].get(name), json.loads(json.dumps(getattr(Config(), name)))
    return value if type(value) is type(default) else default


# ------------------------------------------------------------------------------------------------------------- its rows


def rows_at(run, path, files):
    """Rows of a file that still has the sha256 that `files` says, or []; a note says why."""
    if not os.path.exists(path):
        run["notes"].append(f"{path} is not there: not sampled to its end, or not kept.")
    elif (
        isinstance(files, dict)
        and os.path.basename(path) in files
        and files[os.path.basename(path)] != sha256(path)
    ):
        run["notes"].append(
            f"{path} is no longer what the run took: its sha256 is another. It is not shown."
        )
    else:
        return told(run, read_rows, path) or []
    return []


def round_rows(run, round_id, name):
    folder = os.path.join(run["folder"], f"round_{round_id}")
    made = os.path.join(folder, "collect.json")
    return rows_at(
        run,
        os.path.join(folder, name),
        (told(run, read_json, made) or {}).get("files") if os.path.exists(made) else None,
    )


def trained_rows(run):
    """What the newest round trains on: of a game its rows, else the data's, in the run's own order, if they are there as they were."""
    if "trained" not in run:
        if run["stage"] in ("spin", "ppo"):
            run["trained"] = (
                round_rows(run, run["rounds"][-1], "train.jsonl") if run["rounds"] else []
            )
        else:
            rows = rows_at(
                run,
                os.path.join(setting(run, "data"), "train.jsonl"),
                run["config"].get("data_sha256"),
            )
            run["trained"] = [
                rows[i]
                for i in permutation(len(rows), setting(run, "seed"), 0)[
                    : setting(run, "max_rows") or None
                ]
            ]
    return run["trained"]


def held_out_files(run):
    """[(round, name)] of the files of held-out samples: a game's val.jsonl, PPO's val_step_S.jsonl."""
    return [
        (t, name)
        for t in run["rounds"]
        for name in sorted(os.listdir(os.path.join(run["folder"], f"round_{t}")))
        if re.fullmatch(r"val(_step_\d{1,9})?\.jsonl", name)
    ]


def batch_of(run):
    """(an encoded row, a batch of it) as the stage makes it, (None, a window of the stream) of pretrain; None where there is none,
    and a note says why."""
    stage, cfg, model, enc = run["stage"], run["meta"]["config"], run["meta"]["model"], run["enc"]
    if stage == "pretrain":
        folder = setting(run, "data")
        about = told(run, read_meta, folder, ["train.bin"])
        if (
            about
            and about["files"]["train.bin"]["sha256"] == run["config"]["data_sha256"]["train.bin"]
        ):
            return None, stream_batch(
                read_stream(folder, "train"),
                model["block_size"],
                setting(run, "batch_size"),
                setting(run, "seed"),
                0,
                model["vocab_size"],
                slice(0, 1),
                enc.eot_token if setting(run, "documents_apart") else None,
            )
        run["notes"].append(
            f"{folder} has no longer the stream that the run took. It is not shown."
        )
        return None
    for row in trained_rows(run):
        row = row | {"responses": row["responses"][:1], "scores": None} if stage == "sft" else row
        (encoded,), _ = encode_rows(
            [row], enc, cfg["template"], model["block_size"], cfg["max_prompt"], cfg["max_response"]
        )
        if encoded and (
            stage in ("sft", "ppo")
            or len({r for r, y in zip(encoded["ranks"], encoded["responses"]) if y is not None}) > 1
        ):
            return encoded, (reward_batch if stage == "reward" else batch_rows)(
                [encoded], setting(run, "layout")
            )
    run["notes"].append("There is no row whose loss mask could be shown.")


def asked_for(batch):
    """Of a batch of one row, by its tensors alone: [(slot, [(id, whether it is asked for)])], slot -1 what all responses follow.

    A response is what is asked of its slot; before it is read what stands up to the place that predicts its first token. A reward
    model is asked for no token: its score is read at the marked one, the last of each response.
    """
    idx, T = batch["idx"].flatten().tolist(), batch["idx"].shape[-1]
    if "read" in batch:
        places = batch["read"].tolist()
        firsts = (
            [place // T * T for place in places]
            if batch["idx"].ndim == 2
            else [0] + [place + 1 for place in places[:-1]]
        )
        return [
            (slot, [(i, n == place) for n, i in enumerate(idx[first : place + 1], first)])
            for slot, first, place in zip(batch["slot"].tolist(), firsts, places)
        ]
    there = batch["targets"] >= 0
    at = batch["at"] if "at" in batch else there.flatten().nonzero().squeeze(1)
    targets = batch["targets"][there].tolist()
    slots = batch["seq"][there].tolist() if "seq" in batch else [0] * len(targets)
    return [(-1, [(i, False) for i in idx[: int(at[0]) + 1]])] + [
        (k, [(y, True) for y, slot in zip(targets, slots) if slot == k]) for k in sorted(set(slots))
    ]
