"""Collect the data of a round: what `fit` trains on and is evaluated on.

    pretrain      token streams
    sft           the best response of each row
    reward        the ranked responses of the data
    preference    the same, with their log-probabilities under the reference
    spin          the responses of the `players`, best first, the policy's own sampled now, and
                  their log-probabilities under the reference

RUN/round_R/ holds self_{train,val}.jsonl (samples), {train,val}.jsonl (ranked rows: text and token
ids), {train,val}.ref.npz (reference log-probabilities) and collect.json (the manifest: report,
settings, hashes of the inputs). Each file is written once and renamed into place, and samples are
kept in parts on the way, so an interrupted collect resumes. Rank 0 decides what is there.

`python -m tools.rebuild` makes a round again from its manifest.
"""

import hashlib
import os
import time
from dataclasses import replace

import numpy as np
from tqdm import tqdm

from data import tokenizer
from data.batch import permutation
from data.files import atomic_write, read_arrays
from data.folder import read_stream
from data.rows import (
    drop_equal_responses,
    encode_rows,
    name_tokenizer,
    prompt_fields,
    prompt_key,
    read_rows,
    response_ids,
    sampled_row,
    write_rows,
)
from eval import (
    extract_answer,
    is_ranked,
    length_accuracy,
    row_logps,
    validation_rows,
)
from model import GPT
from nanospin import checkpoint, distributed, elastic, inputs, rounds
from nanospin.distributed import all_gather_object, broadcast_from_rank0, run_on_rank0
from nanospin.rounds import (
    check_files,
    check_policy,
    make_round_folder,
    part_files,
    policy_sha256,
    reference_checkpoint,
    remove_parts,
    round_folder,
    rows_sha256,
    score_in_parts,
    write_manifest,
)
from sample import respond, response_text


def collect(cfg, round_id: int, model, enc, device, dtype, say):
    """(train, val, report) of a round. train and val are token streams for pretrain, else lists of
    encoded rows. Rows of preference and spin have "ref", the reference log-probability of each
    response. report: what to log about the players, on validation rows. say: prints a line."""
    if cfg.stage == "pretrain":
        return read_stream(cfg.data, "train"), read_stream(cfg.data, "val"), {}
    start = time.perf_counter()
    uses_reference = cfg.stage in ("preference", "spin")
    run_on_rank0(check_files, cfg, round_id)
    if uses_reference:
        run_on_rank0(check_policy, cfg, round_id)
    rows_by_split = load_rows(cfg)
    if round_id == 0:
        say_shared_prompts(rows_by_split["train"], rows_by_split["val"], say)
    encoded, report = {}, {}
    for split, rows in rows_by_split.items():
        if cfg.stage == "sft":
            rows = [row | {"responses": row["responses"][:1], "scores": None} for row in rows]
        if cfg.stage == "spin":
            rows = play_round(cfg, round_id, split, rows, model, enc, dtype, say)
            report[split] = player_report(cfg, rows, enc)
            if split == "train":
                rows = rows + name_tokenizer(earlier_rows(cfg, round_id), enc)
        encoded[split] = encode(cfg, round_id, split, rows, enc, model.config.block_size, say)
        if uses_reference:
            refs = reference_logprobs(cfg, round_id, split, model, enc, encoded[split], device)
            for row, ref in zip(encoded[split], refs, strict=True):
                row["ref"] = ref[: len(row["responses"])].tolist()
    if uses_reference and distributed.rank() == 0:
        write_manifest(cfg, round_id, enc, device, dtype, encoded, report, start)
    distributed.barrier()
    return encoded["train"], encoded["val"], report.get("val", {})


def load_rows(cfg) -> dict[str, list[dict]]:
    """The data's rows: a seeded choice of max_rows to train on, and the same validation rows for
    every run."""
    rows = read_rows(f"{cfg.data}/train.jsonl")
    chosen = permutation(len(rows), cfg.seed, 0)
    if cfg.max_rows:
        chosen = chosen[: cfg.max_rows]
    return {
        "train": [rows[i] for i in chosen],
        "val": validation_rows(cfg.data, cfg.eval_rows),
    }


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


def encode(cfg, round_id, split, rows, enc, block_size, say) -> list[dict]:
    """Encode the rows of a round. Rows that leave no room for a response are dropped, and so are
    those in which nothing is ranked, where the stage ranks. Both are counted and reported."""
    encoded, counts = encode_rows(
        rows, enc, cfg.template, block_size, cfg.max_prompt, cfg.max_response
    )
    if cfg.score_margin:
        attach_scores(encoded, rows, f"{cfg.data}/{split}.jsonl")
    kept = [row for row in encoded if row is not None]
    if cfg.stage != "sft":
        num_equal = sum(map(drop_equal_responses, kept))
        for row in rows:  # and those that spin has made absent
            num_equal += sum(same_as is not None for same_as in row.get("same_as") or [])
        counts["responses equal to a better one"] = num_equal
        ranked = [row for row in kept if is_ranked(row)]
        counts["with nothing ranked"] = len(kept) - len(ranked)
        if split == "train":
            kept = ranked
        elif cfg.stage != "spin" and not ranked:
            kept = []  # nothing to evaluate; spin still has the validation loss
    if not kept:
        raise SystemExit(
            f"{cfg.data}/{split}.jsonl: none of its {len(rows)} rows can be used "
            f"({list_counts(counts)})"
        )
    say(f"round {round_id} {split}: {list_counts(counts)}")
    return kept


def list_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {what}" for what, n in counts.items())


def attach_scores(encoded, rows, where: str):
    """Copy the data's scores into encoded rows."""
    for row, encoded_row in zip(rows, encoded):
        if encoded_row is None:
            continue
        if not row.get("scores"):
            raise SystemExit(
                f"{where}: score_margin needs scores, and the row with the prompt "
                f"{row['prompt'][:60]!r} has none"
            )
        encoded_row["scores"] = row["scores"]


# ---------------------------------------------------------------------------------- reference


def reference_logprobs(cfg, round_id, split, model, enc, rows, device) -> np.ndarray:
    """log pi_ref of every response (rows, K).

    They are computed once and stored, with a hash of the reference's weights and the rows' ids.
    """
    path = os.path.join(round_folder(cfg, round_id), f"{split}.ref.npz")
    weights = run_on_rank0(policy_sha256, cfg, round_id)
    fingerprint = rows_sha256(weights, rows)
    if broadcast_from_rank0(os.path.exists(path)):
        remove_parts(path)
        return read_reference_logprobs(path, fingerprint, rows)
    if broadcast_from_rank0(checkpoint.latest(cfg.out_dir, round_id)):
        raise SystemExit(
            f"{path} is missing, and the policy of round {round_id} has been trained, so it is no "
            "longer its reference; remove the folder of that round"
        )
    reference = run_on_rank0(reference_checkpoint, cfg, round_id)
    budget = distributed.micro_batch_tokens(cfg, device)
    K = max(len(row["responses"]) for row in rows)

    def score(numbers: range) -> dict[str, np.ndarray]:
        part = [rows[n] for n in numbers]
        refs = row_logps(model, part, budget, device, "reference", cfg.layout)
        check_finite(refs, part, enc, f"log-probabilities under {reference}")
        return {"refs": np.pad(refs, ((0, 0), (0, K - refs.shape[1])))}

    refs = score_in_parts(path, rows, weights, score)["refs"]
    if distributed.rank() == 0:
        with atomic_write(path, "wb") as f:
            np.savez(f, refs=refs, of=fingerprint)
    remove_parts(path)
    return refs


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


def read_reference_logprobs(path: str, fingerprint: str, rows: list[dict]) -> np.ndarray:
    stored = read_arrays(path)
    if str(stored.get("of")) != fingerprint:
        raise SystemExit(
            f"{path} is of other rows or another reference: the data has changed since; "
            "use another out_dir"
        )
    refs = stored.get("refs")
    shape = (len(rows), max(len(row["responses"]) for row in rows))
    if refs is None or refs.shape != shape or not np.isfinite(refs).all():
        raise SystemExit(
            f"{path} is damaged: its refs are not the log-probabilities of {len(rows)} rows"
        )
    return refs


# ----------------------------------------------------------------------------------- self-play


def play_round(cfg, round_id, split, rows, model, enc, dtype, say) -> list[dict]:
    """The ranked rows of a round: read from the run's folder, or made and written there."""
    path = os.path.join(round_folder(cfg, round_id), f"{split}.jsonl")
    rows = drop_overlong_prompts(
        cfg, rows, enc, model.config.block_size, say if round_id == 0 else None, split
    )
    if not broadcast_from_rank0(os.path.exists(path)):
        ranked = build_ranked_rows(cfg, round_id, split, rows, model, enc, dtype, say)
        inputs.check_again(cfg)
        if distributed.rank() == 0:
            write_rows(path, ranked)
        distributed.barrier()
    ranked = name_tokenizer(read_rows(path), enc)
    if list(map(prompt_key, ranked)) != list(map(prompt_key, rows)):
        raise SystemExit(
            f"{path} has other prompts than the rows of {cfg.data} that are to be ranked: one of "
            "the two was changed; put the original back, or use another out_dir"
        )
    return ranked


def earlier_rows(cfg, round_id: int) -> list[dict]:
    """The training rows of the replay_rounds rounds before this one."""
    rows = []
    for earlier in range(max(0, round_id - cfg.replay_rounds), round_id):
        rows += read_rows(os.path.join(round_folder(cfg, earlier), "train.jsonl"))
    return rows


def drop_overlong_prompts(cfg, rows, enc, block_size: int, say=None, split="") -> list[dict]:
    """The rows whose prompt leaves room for a response. Exits if a row has no prompt."""
    if not all(row["prompt"] for row in rows):
        raise SystemExit(f"{cfg.data}: rows that are whole texts have no prompt to respond to")
    best = [row | {"responses": row["responses"][:1], "scores": None} for row in rows]
    encoded, counts = encode_rows(
        best, enc, cfg.template, block_size, cfg.max_prompt, cfg.max_response
    )
    if say:
        say(f"data {split}: {list_counts(counts)}")
    kept = [row for row, encoded_row in zip(rows, encoded) if encoded_row is not None]
    if not kept:
        raise SystemExit(
            f"{cfg.data}: no prompt leaves room for a response ({list_counts(counts)}); set "
            "max_prompt, or use a shorter template or a larger block_size"
        )
    return kept


def build_ranked_rows(cfg, round_id, split, rows, model, enc, dtype, say) -> list[dict]:
    """The responses of all players to every prompt, best first, as ranked rows with ids.

    A response that equals a better one teaches nothing: it is absent, and "same_as" says which one
    it equals. An earlier self is absent in the rounds before there was one, and so is a teacher
    where its answer is empty.
    """
    columns = []  # a column per player: (text, ids) per row, None where it is absent
    for player in cfg.players:
        column = player_responses(cfg, round_id, split, player, rows, model, enc, dtype)
        if player == "teacher":
            column, num_empty = drop_empty(column)
            if num_empty:
                say(
                    f"round {round_id} {split}: {num_empty} of {len(rows)} answers of the teacher "
                    "are empty, so they are absent"
                )
        columns.append(column)
    ranked = []
    for i, row in enumerate(rows):
        texts = [column[i][0] for column in columns]
        ids = [column[i][1] for column in columns]
        ranked.append(
            prompt_fields(row)
            | {"responses": texts, "ids": ids, "tokenizer": tokenizer.fingerprint(enc)}
        )
    encoded, _ = encode_rows(
        ranked, enc, cfg.template, model.config.block_size, cfg.max_prompt, cfg.max_response
    )
    for row, encoded_row in zip(ranked, encoded):
        mark_equal_responses(row, encoded_row["responses"])
    return ranked


def player_responses(cfg, round_id, split, player, rows, model, enc, dtype) -> list[tuple]:
    """(text, ids) of a player's response to each row. To add a player, add a branch here."""
    if player == "data":
        return [(row["responses"][0], response_ids(row, 0, enc)) for row in rows]
    if player == "teacher":
        return teacher_responses(cfg, split, rows, enc)
    rounds_ago = 0 if player == "self" else int(player.removeprefix("self-"))
    if rounds_ago > round_id:
        return [(None, None)] * len(rows)
    path = os.path.join(round_folder(cfg, round_id - rounds_ago), f"self_{split}.jsonl")
    if rounds_ago == 0:
        sample_policy(path, cfg, rows, f"{round_id} self {split}", model, enc, dtype)
    return match_responses(path, rows, enc)


def drop_empty(column: list[tuple]) -> tuple[list[tuple], int]:
    """Make the responses of a player absent that have no text. Returns their number too."""
    kept = []
    for text, ids in column:
        kept.append((text, ids) if text and text.strip() else (None, None))
    return kept, kept.count((None, None))


def mark_equal_responses(row: dict, ids: list):
    """Make responses absent that equal a better one, and note in "same_as" which. ids: of each
    response, as encoded and cut."""
    same_as = []
    for k, response in enumerate(ids):
        equal = response is not None and response in ids[:k]
        same_as.append(ids.index(response) if equal else None)
    row["same_as"] = same_as
    row["ids"] = [y if same is None else None for y, same in zip(ids, same_as)]
    texts = row["responses"]
    row["responses"] = [None if y is None else text for y, text in zip(row["ids"], texts)]


def prepare_teacher(cfg, enc, block_size: int, device, dtype):
    """Write the responses of a teacher checkpoint to RUN/teacher_{train,val}.jsonl, with the
    teacher's own template. A teacher that is a file must have a response to every prompt."""
    if not cfg.teacher or broadcast_from_rank0(inputs.is_answered(cfg)):
        return
    if not os.path.isdir(cfg.teacher):
        for split, rows in load_rows(cfg).items():
            rows = drop_overlong_prompts(cfg, rows, enc, block_size)
            teacher_responses(cfg, split, rows, enc)
        return
    teacher, teacher_enc, meta = GPT.from_checkpoint(cfg.teacher, device, dtype)
    teacher_cfg = replace(cfg, template=meta["config"]["template"])
    for split, rows in load_rows(cfg).items():
        rows = drop_overlong_prompts(cfg, rows, enc, block_size)
        path = inputs.teacher_file(cfg, split)
        write_samples(path, teacher, teacher_enc, teacher_cfg, rows, f"teacher {split}")


def teacher_responses(cfg, split, rows, enc) -> list[tuple]:
    """(text, ids) of the teacher's response to each row."""
    if cfg.teacher == "rows":
        single = [row["prompt"] for row in rows if len(row["responses"]) < 2]
        if single:
            raise SystemExit(
                f"teacher is 'rows', but {len(single)} of {len(rows)} rows of "
                f"{cfg.data}/{split}.jsonl have one response, the first: {single[0][:60]!r}"
            )
        return [(row["responses"][1], response_ids(row, 1, enc)) for row in rows]
    path = cfg.teacher
    if os.path.isdir(path) or inputs.is_answered(cfg):
        path = inputs.teacher_file(cfg, split)
    return match_responses(path, rows, enc)


def match_responses(path: str, rows: list[dict], enc) -> list[tuple]:
    """(text, ids) of the best response in a ranked file to the prompt of each row, from the first
    row of that prompt if the file has several.

    Samples of this tokenizer keep their ids, see `data.rows.response_ids`.
    """
    fingerprint = tokenizer.fingerprint(enc)
    responses = {}
    for row in read_rows(path):
        if row.get("tokenizer") == fingerprint:
            ids = own_ids(path, row, enc)
        else:
            ids = response_ids(row, 0, enc)
        responses.setdefault(prompt_key(row), (row["responses"][0], ids))
    missing = [row["prompt"] for row in rows if prompt_key(row) not in responses]
    if missing:
        raise SystemExit(
            f"{path}: no response to {len(missing)} of {len(rows)} prompts, "
            f"the first: {missing[0][:80]!r}"
        )
    return [responses[prompt_key(row)] for row in rows]


def own_ids(path: str, row: dict, enc) -> list[int]:
    """The ids of a row's first response, which this tokenizer made. Exits if they cannot be."""
    ids = (row.get("ids") or [None])[0]
    if not ids:
        raise SystemExit(
            f"{path}: the row with the prompt {row['prompt'][:60]!r} names its tokenizer and has "
            "no ids"
        )
    if max(ids) >= enc.n_vocab:
        raise SystemExit(
            f"{path}: the row with the prompt {row['prompt'][:60]!r} has the id {max(ids)}, "
            f"outside the vocabulary of {enc.n_vocab}"
        )
    if response_text(enc, ids) != row["responses"][0]:
        raise SystemExit(
            f"{path}: in the row with the prompt {row['prompt'][:60]!r} the ids are not those of "
            "its text: one of the two was edited; drop the ids to use the text"
        )
    return ids


# ------------------------------------------------------------------------------------ sampling


def sample_policy(path, cfg, rows, name: str, model, enc, dtype):
    """Sample the policy as it is now, with a full copy of its weights on each rank unless
    sample_sharded is set."""
    policy = model if cfg.sample_sharded else distributed.gather_full_model(model, dtype)
    write_samples(path, policy, enc, cfg, rows, name)


def write_samples(path: str, model, enc, cfg, rows: list[dict], name: str):
    """Sample one response to every prompt and write them to a ranked file.

    The prompts are divided among the ranks. A sample is a function of (weights, seed, name, number
    of the prompt): another name draws other samples. Every finished part is kept, so a resumed file
    is the same file.
    """
    if broadcast_from_rank0(os.path.exists(path)):
        remove_parts(path)
        return
    rows = unique_prompts(rows)
    make_round_folder(path)
    size = max(rounds.PART_SIZE, cfg.gen_batch_size * distributed.world_size())
    parts = part_files(path, len(rows), size)
    written = broadcast_from_rank0([part for part in parts if os.path.exists(part)])
    hide_bar = None if distributed.rank() == 0 else True
    progress = tqdm(total=len(rows), desc=f"sampling {name}", disable=hide_bar)
    for part, numbers in parts.items():
        if part in written:
            progress.update(len(numbers))
            continue
        distributed.heartbeat.set_stage(f"sampling {name}, prompts from {numbers[0]} on")
        samples = sample_part(model, enc, cfg, rows, numbers, name, progress)
        if distributed.rank() == 0:
            write_rows(part, [sampled_row(rows[n], *samples[n], enc) for n in numbers])
        elastic.exit_if_signalled()
    if distributed.rank() == 0:
        sampled = []
        for part in parts:
            sampled += read_rows(part)
        write_rows(path, sampled)
    remove_parts(path)


def sample_part(model, enc, cfg, rows, numbers: range, name: str, progress) -> dict[int, tuple]:
    """{number of a prompt: (text, ids)} of the prompts `numbers`, on every rank."""
    digest = hashlib.sha256(f"{cfg.seed} {name}".encode()).digest()
    mine = numbers[distributed.rank() :: distributed.world_size()]
    with distributed.lockstep_forward(model):
        texts, ids = respond(
            model,
            enc,
            cfg.template,
            [rows[n] for n in mine],
            cfg.max_prompt,
            cfg.max_response,
            seed=int.from_bytes(digest[:7], "big"),
            temperature=cfg.temperature,
            top_k=cfg.top_k,
            top_p=cfg.top_p,
            request_ids=mine,
            batch_size=cfg.gen_batch_size,
            progress=progress,
        )
    if None in ids:
        prompt = rows[mine[ids.index(None)]]["prompt"]
        raise SystemExit(
            f"{name}: block_size {model.config.block_size} leaves no room after the prompt "
            f"{prompt[:80]!r}; set max_prompt"
        )
    samples = {}
    for of_rank in all_gather_object(dict(zip(mine, zip(texts, ids)))):
        samples.update(of_rank)
    return samples


def unique_prompts(rows: list[dict]) -> list[dict]:
    """Rows of different prompts: each is sampled once, however often it is in the data."""
    return list({prompt_key(row): row for row in rows}.values())


# -------------------------------------------------------------------------------------- report


def player_report(cfg, rows: list[dict], enc) -> dict[str, float]:
    """What a round reports of its players.

    tie/PLAYER          share of responses that equal a better one
    length/PLAYER       mean tokens
    ended/PLAYER        share that ended with end-of-text
    empty/teacher       share of answers without text, if there are any
    exact_match/PLAYER  with the data
    length_acc/PLAYER   how well length alone separates them from the data's

    Tied responses count for tie and exact match only.
    """
    report = {}
    for k, player in enumerate(cfg.players):
        present = [row for row in rows if row["ids"][k] is not None]
        tied = [row for row in rows if row["same_as"][k] is not None]
        num_absent = len(rows) - len(present) - len(tied)
        if player == "teacher" and num_absent:
            report["empty/teacher"] = num_absent / len(rows)
        if not present:
            continue
        lengths = [len(row["ids"][k]) for row in present]
        ended = [row["ids"][k][-1] == enc.eot_token for row in present]
        report[f"tie/{player}"] = 1 - len(present) / len(present + tied)
        report[f"length/{player}"] = float(np.mean(lengths))
        report[f"ended/{player}"] = float(np.mean(ended))
        if player != "data":
            right = []
            for row in present + tied:
                same_as = row["same_as"][k]
                text = row["responses"][k if same_as is None else same_as]
                right.append(extract_answer(text) == extract_answer(row["responses"][0]))
            data_lengths = [len(row["ids"][0]) for row in present]
            report[f"exact_match/{player}"] = float(np.mean(right))
            report[f"length_acc/{player}"] = length_accuracy(data_lengths, lengths)
    return report
