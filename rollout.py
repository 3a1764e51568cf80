"""One round's collect: what `fit` will train on and be watched on.

    pretrain      token streams
    sft           the data's best responses
    reward        the data's ranked responses
    preference    the same, and the reference's log-probabilities of them
    spin          the same after a game: each prompt's responses by `players`, best first, the policy's own sampled now

Everything of a round lies in RUN/round_R: self_{train,val}.jsonl (samples), {train,val}.jsonl (ranked rows, text and
ids), {train,val}.ref.npz (log-probabilities under the reference), collect.json (the manifest: report, settings, hashes).
Each file is written whole once, so an interrupted collect goes on where it stopped; samples are kept in parts on the
way. Rank 0 looks what is there, for all.

rebuild.py makes a round again from its manifest and what that names by hash.
"""

import glob
import hashlib
import json
import os
import time
from dataclasses import asdict, replace

import numpy as np
from tqdm import tqdm

from nanospin import checkpoint
from nanospin import elastic
from nanospin import metrics_logger
from nanospin import distributed
from data.rows import (
    prompt_key,
    encode_rows,
    longest_shared_prefix,
    prompt_fields,
    read_rows,
    write_rows,
)
from data.batch import permutation
from data.files import read_arrays, sha256, write_json
from data.folder import read_stream, split_of
from data import tokenizer
from eval import extract_answer, validation_rows, length_accuracy, response_logprobs
from sample import respond

PART = 1024  # prompts sampled before they are written down


def collect(cfg, round_id, model, enc, device, dtype, say):
    """(train, val, report) of a round: for pretrain two token streams, else lists of encoded rows; where responses are
    ranked, each row has "ref", the reference's log-probability of every response. report: what is to be said of a game's
    players, of validation rows. say: a function that prints a line."""
    if cfg.stage == "pretrain":
        return read_stream(cfg.data, "train"), read_stream(cfg.data, "val"), {}
    start, folder, block_size = (
        time.time(),
        os.path.join(cfg.out_dir, f"round_{round_id}"),
        model.config.block_size,
    )
    result, report = {}, {}
    for split, rows in load_rows(cfg).items():
        if cfg.stage == "sft":
            rows = [{**row, "responses": row["responses"][:1], "scores": None} for row in rows]
        if cfg.stage == "spin":
            path = os.path.join(folder, f"{split}.jsonl")
            rows = drop_overlong_prompts(
                cfg, rows, enc, block_size, say if round_id == 0 else None, split
            )
            if not distributed.broadcast_from_rank0(os.path.exists(path)):
                played = build_ranked_rows(cfg, round_id, split, rows, model, enc, dtype)
                if distributed.rank() == 0:
                    write_rows(path, played)
                distributed.barrier()
            rows = read_rows(path)
            report[split] = player_report(cfg, rows, enc)
            if split == "train":
                for earlier in range(max(0, round_id - cfg.replay_rounds), round_id):
                    rows = rows + read_rows(
                        os.path.join(cfg.out_dir, f"round_{earlier}", "train.jsonl")
                    )
        encoded, counts = encode_rows(
            rows, enc, cfg.template, block_size, cfg.max_prompt, cfg.max_response
        )
        if cfg.score_margin:
            attach_scores(encoded, rows, f"{cfg.data}/{split}.jsonl")
        encoded = [row for row in encoded if row is not None]
        if cfg.stage != "sft":
            ranked = [
                row
                for row in encoded
                if len({r for r, y in zip(row["ranks"], row["responses"]) if y is not None}) >= 2
            ]
            counts["with nothing ranked"] = len(encoded) - len(ranked)
            encoded = ranked if split == "train" or cfg.stage != "spin" and not ranked else encoded
        if not encoded:
            raise SystemExit(
                f"{cfg.data}/{split}.jsonl: none of its {len(rows)} rows is left ({counts})"
            )
        say(f"round {round_id} {split}: " + ", ".join(f"{n} {what}" for what, n in counts.items()))
        if cfg.stage in ("preference", "spin"):
            for row, ref in zip(
                encoded,
                reference_logprobs(cfg, round_id, split, model, encoded, device),
                strict=True,
            ):
                row["ref"] = ref[: len(row["responses"])].tolist()
        result[split] = encoded
    if cfg.calibration:
        annotate_seen_tokens(result["train"], result["val"])
    done = os.path.join(folder, "collect.json")
    if cfg.stage in ("preference", "spin") and distributed.rank() == 0 and not os.path.exists(done):
        write_json(
            done,
            with_checksum(
                {
                    "round": round_id,
                    "config": asdict(cfg),
                    "tokenizer": tokenizer.fingerprint(enc),
                    "made_of": {
                        name: checkpoint.weights_sha256(path)
                        for name, path in input_files(
                            cfg, round_id, reference_checkpoint(cfg, round_id)
                        ).items()
                    },
                    "made_by": metrics_logger.versions(device, dtype),
                    "rows": {split: len(encoded) for split, encoded in result.items()},
                    "files": {
                        f: sha256(os.path.join(folder, f))
                        for f in sorted(os.listdir(folder))
                        if f.endswith((".jsonl", ".npz"))
                    },
                    "report": report,
                    "seconds": time.time() - start,
                }
            ),
        )
    distributed.barrier()
    return result["train"], result["val"], report.get("val", {})


def annotate_seen_tokens(train, val):
    """What `calibration.calibration` asks of validation rows: "seen", how many of a row's first tokens begin a training row too, and
    "half", 0 or 1. A group stands in one half, unless it stands in training too: then the split was by row, and so are the halves,
    dealt so that both have as many rows with new tokens."""
    ids = [[row["prompt"] + row["responses"][0] for row in rows] for rows in (train, val)]
    for row, whole, seen in zip(val, ids[1], longest_shared_prefix(ids[1], ids[0])):
        row |= {
            "seen": seen,
            "half": int(split_of(f"half of {row.get('group', whole)}", 0.5) == "val"),
        }
    trained = {row.get("group") for row in train} - {None}
    if any(row.get("group") in trained for row in val):
        by_new = sorted(
            range(len(val)), key=lambda i: val[i]["seen"] - len(ids[1][i])
        )  # most new tokens first
        for place, i in enumerate(by_new):
            val[i]["half"] = (place + 1) // 2 % 2  # 0 1 1 0 0 1 1 0 ...: as many tokens, too
    if len({row["half"] for row in val}) < 2:
        raise SystemExit(
            f"calibration: all {len(val)} validation rows are of one half; it takes more groups"
        )


def attach_scores(encoded, rows, where):
    """Give encoded rows the data's own scores."""
    for row, e in zip(rows, encoded):
        if e is not None:
            if not row.get("scores"):
                raise SystemExit(
                    f"{where}: score_margin needs scores, and a row has none ({row['prompt'][:60]!r})"
                )
            e["scores"] = row["scores"]


def load_rows(cfg):
    """Rows of both splits: `max_rows` of training, a seeded choice; the same `eval_rows` of validation for everyone."""
    rows = read_rows(f"{cfg.data}/train.jsonl")
    rows = [rows[i] for i in permutation(len(rows), cfg.seed, 0)[: cfg.max_rows or None]]
    return {"train": rows, "val": validation_rows(cfg.data, cfg.eval_rows)}


def reference_checkpoint(cfg, round_id):
    """The checkpoint that is this round's reference, and the policy that samples: the round before's last, or `init`, which
    rebuild.py gives for a later round too."""
    return round_id and checkpoint.latest(cfg.out_dir, round_id - 1) or checkpoint.resolve(cfg.init)


def reference_logprobs(cfg, round_id, split, model, rows, device):
    """log pi_ref of every response (rows, K): computed once, by the code that computes the policy's, and kept under a hash
    of the reference's weights and the rows' ids."""
    path = os.path.join(cfg.out_dir, f"round_{round_id}", f"{split}.ref.npz")
    of = hashlib.sha256(
        (checkpoint.weights_sha256(reference_checkpoint(cfg, round_id)) + json.dumps(rows)).encode()
    ).hexdigest()
    if distributed.broadcast_from_rank0(os.path.exists(path)):
        kept = read_arrays(path)
        if str(kept.get("of")) != of:
            raise SystemExit(
                f"{path} is of other rows or another reference: the data has changed since; use another out_dir"
            )
        if (
            "refs" not in kept
            or kept["refs"].shape != (len(rows), max(len(row["responses"]) for row in rows))
            or not np.isfinite(kept["refs"]).all()
        ):
            raise SystemExit(
                f"{path} is damaged: its refs are not the log-probabilities of {len(rows)} rows"
            )
        return kept["refs"]
    if distributed.broadcast_from_rank0(checkpoint.latest(cfg.out_dir, round_id)):
        raise SystemExit(
            f"{path} is missing, and the policy of round {round_id} is no longer its reference; remove that round's folder"
        )
    refs = response_logprobs(
        model, rows, distributed.micro_batch_tokens(cfg, device), device, "reference", cfg.layout
    )
    if distributed.rank() == 0:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path + ".tmp", "wb") as f:
            np.savez(f, refs=refs, of=of)
        os.replace(path + ".tmp", path)
    distributed.barrier()
    return refs


# ------------------------------------------------------------------------------------------------------------ the game


def drop_overlong_prompts(cfg, rows, enc, block_size, say=None, split=""):
    """The rows whose prompt leaves room for a response: no player is asked the others. Ends the run where a row has no prompt."""
    if not all(row["prompt"] for row in rows):
        raise SystemExit(f"{cfg.data}: rows that are whole texts have no prompt to play on")
    encoded, counts = encode_rows(
        [prompt_fields(row) | {"responses": row["responses"][:1]} for row in rows],
        enc,
        cfg.template,
        block_size,
        cfg.max_prompt,
        cfg.max_response,
    )
    if say:
        say(f"data {split}: " + ", ".join(f"{n} {what}" for what, n in counts.items()))
    return [row for row, e in zip(rows, encoded) if e is not None]


def build_ranked_rows(cfg, round_id, split, rows, model, enc, dtype):
    """Every prompt's responses in the order of `players` -> ranked rows with ids. A response that equals a better one
    teaches nothing and is absent ("same_as" says which one it equals); so are an earlier self's before there was one."""
    columns = []  # of each player: (text, ids) a prompt, ids None where the text is still to be encoded
    for player in cfg.players:
        if player == "data":
            columns.append([(row["responses"][0], None) for row in rows])
        elif player == "teacher":
            columns.append(teacher_responses(cfg, split, rows, enc))
        else:
            back = 0 if player == "self" else int(player[5:])
            path = os.path.join(cfg.out_dir, f"round_{round_id - back}", f"self_{split}.jsonl")
            if back == 0:
                policy = (
                    model if cfg.sample_sharded else distributed.gather_full_model(model, dtype)
                )
                write_samples(path, policy, enc, cfg, rows, f"{round_id} self {split}")
                del policy
            columns.append(
                match_responses(path, rows, enc) if back <= round_id else [(None, None)] * len(rows)
            )
    played = [
        prompt_fields(row)
        | {"responses": [c[i][0] for c in columns], "ids": [c[i][1] for c in columns]}
        for i, row in enumerate(rows)
    ]
    encoded, _ = encode_rows(
        played, enc, cfg.template, model.config.block_size, cfg.max_prompt, cfg.max_response
    )
    for row, e in zip(played, encoded):
        ids = e["responses"]
        row["same_as"] = [
            ids.index(y) if y is not None and y in ids[:k] else None for k, y in enumerate(ids)
        ]
        row["ids"] = [y if same is None else None for y, same in zip(ids, row["same_as"])]
        row["responses"] = [
            None if y is None else text for y, text in zip(row["ids"], row["responses"])
        ]
    return played


def prepare_teacher(cfg, enc, block_size, device, dtype):
    """A teacher that is a checkpoint writes its responses to RUN/teacher_{train,val}.jsonl, under its own template, before the student
    is built: the two never share memory. Another is looked through: it may lack a response that is asked for late."""
    if cfg.teacher and not os.path.isdir(cfg.teacher):
        for split, rows in load_rows(cfg).items():
            teacher_responses(cfg, split, drop_overlong_prompts(cfg, rows, enc, block_size), enc)
    paths = {
        split: os.path.join(cfg.out_dir, f"teacher_{split}.jsonl") for split in ("train", "val")
    }
    if not os.path.isdir(cfg.teacher) or distributed.broadcast_from_rank0(
        all(os.path.exists(p) for p in paths.values())
    ):
        return
    teacher, its_enc, meta = checkpoint.load_model(cfg.teacher, device, dtype)
    its_cfg = replace(cfg, template=meta["config"]["template"])  # each is asked as it is used to
    for split, rows in load_rows(cfg).items():
        write_samples(
            paths[split],
            teacher,
            its_enc,
            its_cfg,
            drop_overlong_prompts(cfg, rows, enc, block_size),
            f"teacher {split}",
        )


def teacher_responses(cfg, split, rows, enc):
    """(text, ids) a row."""
    if cfg.teacher == "rows":
        if any(len(row["responses"]) < 2 for row in rows):
            raise SystemExit(
                f"teacher is 'rows', but rows of {cfg.data}/{split}.jsonl have one response"
            )
        return [(row["responses"][1], None) for row in rows]
    path = (
        os.path.join(cfg.out_dir, f"teacher_{split}.jsonl")
        if os.path.isdir(cfg.teacher)
        else cfg.teacher
    )
    return match_responses(path, rows, enc)


def match_responses(path, rows, enc):
    """The best response in a ranked file to what each row asks: (text, ids). Ids where this tokenizer made them; of another
    tokenizer's sample that did not end, ids without end-of-text; else None, a text to be encoded with one."""
    name, answers = tokenizer.fingerprint(enc), {}
    for row in read_rows(path):
        text, ids = row["responses"][0], None
        if row.get("tokenizer") == name:
            if not (row.get("ids") or [None])[0]:
                raise SystemExit(
                    f"{path}: the row with the prompt {row['prompt'][:60]!r} names its tokenizer and has no ids"
                )
            if max(row["ids"][0]) >= enc.n_vocab:
                raise SystemExit(
                    f"{path}: the row with the prompt {row['prompt'][:60]!r} has the id {max(row['ids'][0])}, outside the vocabulary of {enc.n_vocab}"
                )
            ids = row["ids"][0]
        elif row.get("ended") is False:
            ids = tokenizer.encode(enc, text, "within")
        answers[prompt_key(row)] = text, ids
    missing = [row["prompt"] for row in rows if prompt_key(row) not in answers]
    if missing:
        raise SystemExit(
            f"{path}: no response to {len(missing)} of {len(rows)} prompts, the first: {missing[0][:80]!r}"
        )
    return [answers[prompt_key(row)] for row in rows]


def unique_prompts(rows):
    """Rows of different questions: each is sampled once a round, however often it stands in the data."""
    return list({prompt_key(row): row for row in rows}.values())


def write_samples(path, model, enc, cfg, rows, what):
    """Write one sampled response a prompt to a ranked file. Prompts are dealt to the ranks; every finished part is kept,
    and a sample is a function of (weights, seed, what, its prompt's number), so a resumed file is the same file."""
    if distributed.broadcast_from_rank0(os.path.exists(path)):
        return
    rows = unique_prompts(rows)
    seed = int.from_bytes(hashlib.sha256(f"{cfg.seed} {what}".encode()).digest()[:7], "big")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    size = max(PART, cfg.gen_batch_size * distributed.world_size())
    parts = {
        f"{path}.part{i:09d}-{min(i + size, len(rows)):09d}": range(i, min(i + size, len(rows)))
        for i in range(0, len(rows), size)
    }
    there = distributed.broadcast_from_rank0([part for part in parts if os.path.exists(part)])
    progress = tqdm(
        total=len(rows), desc=f"sampling {what}", disable=None if distributed.rank() == 0 else True
    )
    for part, numbers in parts.items():
        if part in there:
            progress.update(len(numbers))
            continue
        mine = numbers[distributed.rank() :: distributed.world_size()]
        distributed.heartbeat.set_stage(f"sampling {what}, prompt {numbers[0]} and those after it")
        with distributed.lockstep_forward(model):
            answers, ids = respond(
                model,
                enc,
                cfg.template,
                [rows[i] for i in mine],
                cfg.max_prompt,
                cfg.max_response,
                seed,
                cfg.temperature,
                cfg.top_k,
                cfg.top_p,
                numbers=mine,
                batch_size=cfg.gen_batch_size,
                progress=progress,
            )
        if None in ids:
            prompt = rows[mine[ids.index(None)]]["prompt"]
            raise SystemExit(
                f"{what}: block_size {model.config.block_size} leaves no room after the prompt {prompt[:80]!r}; set max_prompt"
            )
        merged = {
            n: row
            for some in distributed.all_gather_object(
                {n: (a, i) for n, a, i in zip(mine, answers, ids)}
            )
            for n, row in some.items()
        }
        if distributed.rank() == 0:
            write_rows(part, [sampled_row(rows[n], *merged[n], enc) for n in numbers])
        elastic.exit_if_signalled()
    if distributed.rank() == 0:
        write_rows(path, [row for part in parts for row in read_rows(part)])
        for part in glob.glob(glob.escape(path) + ".part*"):
            os.remove(part)
    distributed.barrier()


def sampled_row(row, text, ids, enc):
    """A sampled response as a ranked row that says which tokenizer its ids are of, and whether it ended."""
    return prompt_fields(row) | {
        "responses": [text],
        "ids": [ids],
        "tokenizer": tokenizer.fingerprint(enc),
        "ended": ids[-1] == enc.eot_token,
    }


def player_report(cfg, rows, enc):
    """What a round says of its players: `tie/NAME` share equal to a better one, `length/NAME` mean tokens, `ended/NAME`
    share ended by end-of-text, `exact_match/NAME` with the data, `length_acc/NAME` how well length alone tells data from it.
    All but tie and exact match are of the responses that are not ties."""
    report = {}
    for k, name in enumerate(cfg.players):
        there = [row for row in rows if row["ids"][k] is not None]
        prompt_key = there + [row for row in rows if row["same_as"][k] is not None]
        if not there:
            continue
        lengths = [len(row["ids"][k]) for row in there]
        report |= {
            f"tie/{name}": 1 - len(there) / len(prompt_key),
            f"length/{name}": float(np.mean(lengths)),
            f"ended/{name}": float(np.mean([row["ids"][k][-1] == enc.eot_token for row in there])),
        }
        if name != "data":
            said = [
                row["responses"][k if row["same_as"][k] is None else row["same_as"][k]]
                for row in prompt_key
            ]
            report[f"exact_match/{name}"] = float(
                np.mean(
                    [
                        extract_answer(text) == extract_answer(row["responses"][0])
                        for text, row in zip(said, prompt_key)
                    ]
                )
            )
            report[f"length_acc/{name}"] = length_accuracy(
                [len(row["ids"][0]) for row in there], lengths
            )
    return report


# ----------------------------------------------------------------------------------------------------------- the manifest


def input_files(cfg, round_id, reference_logprobs):
    """{name: path} of all that a round's files are made of. An earlier round's file goes by its place in the run."""
    paths = {"reference": reference_logprobs} | {
        f"{split}.jsonl": f"{cfg.data}/{split}.jsonl" for split in ("train", "val")
    }
    if cfg.stage == "spin":
        paths |= {"teacher": cfg.teacher} if cfg.teacher not in ("", "rows") else {}
        earlier = [
            f"round_{round_id - int(p[5:])}/self_{split}.jsonl"
            for p in cfg.players
            if p.startswith("self-") and int(p[5:]) <= round_id
            for split in ("train", "val")
        ]
        earlier += [
            f"round_{r}/train.jsonl" for r in range(max(0, round_id - cfg.replay_rounds), round_id)
        ]
        paths |= {name: os.path.join(cfg.out_dir, name) for name in earlier}
    return paths


def with_checksum(manifest):
    """The manifest with the sha256 of what it says, so that an edit is seen."""
    return manifest | {
        "sha256": hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    }
