"""Collect the data of a round: what `fit` trains on and is evaluated on.

    pretrain      token streams
    sft           the best response of each row
    reward        the ranked responses of the data
    preference    the same, with their log-probabilities under the reference
    spin          the responses of the `players`, best first, the policy's own sampled now, and
                  their log-probabilities under the reference

`ranked_by` says who ranks: the data, the order of the players, or a scorer (scorer.py).

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
from data.batch import batch_indices, permutation
from data.files import atomic_write, read_arrays
from data.folder import read_stream
from data.rows import (
    drop_equal_responses,
    encode_prompts,
    encode_rows,
    name_tokenizer,
    prompt_key,
    read_rows,
    response_ids,
    row_with_ids,
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
from nanospin.config import is_scored, ordered_players, player_columns
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
from scorer import score_rows


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
    rows_by_split = load_rows(cfg, round_id)
    if round_id == 0:
        say_shared_prompts(rows_by_split["train"], rows_by_split["val"], say)
    encoded, report = {}, {}
    for split, rows in rows_by_split.items():
        if cfg.stage == "sft":
            rows = [row | {"responses": row["responses"][:1], "scores": None} for row in rows]
        answers = []
        if cfg.stage == "spin" or is_scored(cfg):
            if split == "val" and cfg.stage == "spin" and "data" not in cfg.players:
                answers = encode_answers(cfg, rows, enc, model.config.block_size)
            rows, of_data = play_round(cfg, round_id, split, rows, model, enc, device, dtype, say)
            report[split] = round_report(cfg, rows, of_data, enc)
            if split == "train":
                rows = rows + name_tokenizer(earlier_rows(cfg, round_id), enc)
        encoded[split] = encode(cfg, round_id, split, rows, enc, model.config.block_size, say)
        encoded[split] += answers
        if uses_reference:
            refs = reference_logprobs(cfg, round_id, split, model, enc, encoded[split], device)
            for row, ref in zip(encoded[split], refs, strict=True):
                row["ref"] = ref[: len(row["responses"])].tolist()
    if uses_reference and distributed.rank() == 0:
        write_manifest(cfg, round_id, enc, device, dtype, encoded, report, start)
    distributed.barrier()
    return encoded["train"], encoded["val"], report.get("val", {})


def load_rows(cfg, round_id: int = 0) -> dict[str, list[dict]]:
    """The data's rows: a seeded choice of max_rows to train on, and the same validation rows for
    every run. Under a scorer spin has other prompts to train on in each round."""
    prompt_only = not needs_responses(cfg)
    rows = read_rows(f"{cfg.data}/train.jsonl", prompt_only)
    if cfg.stage == "spin" and is_scored(cfg):
        rows = unique_prompts(rows)
        n = min(cfg.max_rows or len(rows), len(rows))
        chosen = batch_indices(len(rows), n, cfg.seed, round_id)
    else:
        chosen = permutation(len(rows), cfg.seed, 0)
        if cfg.max_rows:
            chosen = chosen[: cfg.max_rows]
    return {
        "train": [rows[i] for i in chosen],
        "val": validation_rows(cfg.data, cfg.eval_rows, prompt_only),
    }


def needs_responses(cfg) -> bool:
    """Whether the data must have responses. A scorer can rank the policy's own samples of prompts
    that have none."""
    if cfg.stage == "spin" and is_scored(cfg):
        return "data" in cfg.players or cfg.teacher == "rows"
    return cfg.stage != "ppo"


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


def encode_answers(cfg, rows, enc, block_size: int) -> list[dict]:
    """The data's best responses, unranked: for the validation loss where the data is no player."""
    answered = []
    for row in rows:
        if row.get("responses"):
            answered.append(row | {"responses": row["responses"][:1], "scores": None})
    encoded, _ = encode_rows(
        answered, enc, cfg.template, block_size, cfg.max_prompt, cfg.max_response
    )
    return [row | {"players": ["data"]} for row in encoded if row is not None]


def row_key(row: dict) -> tuple:
    return prompt_key(row) if row["prompt"] else (row["responses"][0],)


def encode(cfg, round_id, split, rows, enc, block_size, say) -> list[dict]:
    """Encode the rows of a round. Rows that leave no room for a response are dropped, and so are
    those in which nothing is ranked, where the stage ranks. Both are counted and reported."""
    encoded, counts = encode_rows(
        rows, enc, cfg.template, block_size, cfg.max_prompt, cfg.max_response
    )
    if cfg.score_margin and split == "train":
        attach_scores(encoded, rows, f"{cfg.data}/{split}.jsonl")
    for row, encoded_row in zip(rows, encoded):
        if encoded_row is not None and "players" in row:
            encoded_row["players"] = row["players"]
    kept = [row for row in encoded if row is not None]
    if cfg.stage != "sft":
        num_equal = sum(map(drop_equal_responses, kept))
        for row in rows:  # and those that spin has made absent
            num_equal += sum(same_as is not None for same_as in row.get("same_as") or [])
        if cfg.best_and_worst and split == "train":
            for row in kept:
                keep_best_and_worst(row)
        counts["responses equal to a better one"] = num_equal
        ranked = [row for row in kept if is_ranked(row)]
        counts["with nothing ranked"] = len(kept) - len(ranked)
        if split == "train":
            kept = ranked
        elif cfg.stage != "spin" and not ranked:
            kept = []  # nothing to evaluate; spin still has the validation loss
    if not kept and is_scored(cfg) and split == "train":
        raise SystemExit(
            f"round {round_id}: {cfg.ranked_by} gives all responses to a prompt the same score, "
            f"for each of {len(rows)} prompts, so there is nothing to learn ({list_counts(counts)})"
        )
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
        scores = row["scores"]
        encoded_row["scores"] = [0.0 if score is None else score for score in scores]


def keep_best_and_worst(encoded_row: dict):
    """Make absent, in place, all responses but the best and the worst."""
    responses = encoded_row["responses"]
    there = [k for k, response in enumerate(responses) if response is not None]
    for k in there[1:-1]:
        responses[k] = None


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


def play_round(cfg, round_id, split, rows, model, enc, device, dtype, say) -> tuple[list, list]:
    """The ranked rows of a round, read from the run's folder, or made and written there; and the
    data's rows that they are of."""
    path = os.path.join(round_folder(cfg, round_id), f"{split}.jsonl")
    rows = drop_overlong_prompts(
        cfg, rows, enc, model.config.block_size, say if round_id == 0 else None, split
    )
    if not broadcast_from_rank0(os.path.exists(path)):
        candidates = collect_candidates(cfg, round_id, split, rows, model, enc, dtype, say)
        if is_scored(cfg):
            ranked = rank_by_score(cfg, f"{path}.scores", rows, candidates, enc, device, dtype)
        else:
            ranked = candidates
        mark_equal_responses(cfg, ranked, enc, model.config.block_size)
        inputs.check_again(cfg)
        if distributed.rank() == 0:
            write_rows(path, ranked)
        distributed.barrier()
    remove_parts(f"{path}.scores")
    ranked = name_tokenizer(read_rows(path), enc)
    if list(map(prompt_key, ranked)) != list(map(prompt_key, rows)):
        raise SystemExit(
            f"{path} has other prompts than the rows of {cfg.data} that are to be ranked: one of "
            "the two was changed; put the original back, or use another out_dir"
        )
    return ranked, rows


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
    if all(row.get("responses") for row in rows):
        best = [row | {"responses": row["responses"][:1], "scores": None} for row in rows]
        encoded, counts = encode_rows(
            best, enc, cfg.template, block_size, cfg.max_prompt, cfg.max_response
        )
    else:
        encoded, counts = encode_prompts(rows, enc, cfg.template, block_size, cfg.max_prompt)
    if say:
        say(f"data {split}: {list_counts(counts)}")
    kept = [row for row, its_encoded in zip(rows, encoded) if its_encoded]
    if not kept:
        raise SystemExit(
            f"{cfg.data}: no prompt leaves room for a response ({list_counts(counts)}); set "
            "max_prompt, or use a shorter template or a larger block_size"
        )
    return kept


def collect_candidates(cfg, round_id, split, rows, model, enc, dtype, say) -> list[dict]:
    """The responses of all players to every prompt, in the order of the players, as ranked rows
    with ids. The samples of one player are ties. In stage preference there are no players, but the
    data's own responses.

    An earlier self is absent in the rounds before there was one, and so is a teacher where its
    answer is empty.
    """
    if cfg.stage == "preference":
        return [data_candidates(row, enc) for row in rows]
    columns = []  # a column per player: of each row a list of (text, ids), None where absent
    for player in ordered_players(cfg):
        column = player_responses(cfg, round_id, split, player, rows, model, enc, dtype)
        if player == "teacher":
            column, num_empty = drop_empty(column)
            if num_empty:
                say(
                    f"round {round_id} {split}: {num_empty} of {len(rows)} answers of the teacher "
                    "are empty, so they are absent"
                )
        columns.append(column)
    names = player_columns(cfg)
    candidates = []
    for i, row in enumerate(rows):
        texts, ids = [], []
        for column in columns:
            texts += [text for text, _ in column[i]]
            ids += [y for _, y in column[i]]
        candidate = row_with_ids(row, texts, ids, enc)
        if len(set(names)) < len(names):
            candidate["ranks"] = [names.index(name) for name in names]
        candidates.append(candidate)
    return candidates


def data_candidates(row: dict, enc) -> dict:
    """The data's own responses to a prompt, to be ranked by a scorer."""
    ids = [response_ids(row, k, enc) for k in range(len(row["responses"]))]
    texts = [None if y is None else text for text, y in zip(row["responses"], ids)]
    return row_with_ids(row, texts, ids, enc)


def player_responses(cfg, round_id, split, player, rows, model, enc, dtype) -> list[list[tuple]]:
    """(text, ids) of a player's responses to each row: one, or n of the player "self:n". To add a
    player, add a branch here."""
    if player == "data":
        return [[(row["responses"][0], response_ids(row, 0, enc))] for row in rows]
    if player == "teacher":
        return [[response] for response in teacher_responses(cfg, split, rows, enc)]
    name, _, count = player.partition(":")
    rounds_ago = 0 if name == "self" else int(name.removeprefix("self-"))
    if rounds_ago > round_id:
        return [[(None, None)]] * len(rows)
    path = os.path.join(round_folder(cfg, round_id - rounds_ago), f"self_{split}.jsonl")
    count = int(count or 1)
    if rounds_ago == 0:
        sample_policy(path, cfg, rows, f"{round_id} self {split}", model, enc, dtype, count)
    return match_samples(path, rows, enc, count)


def rank_by_score(cfg, path: str, rows, candidates, enc, device, dtype) -> list[dict]:
    """The candidates of each row in the order of their scores, best first; equal scores are ties.
    top_players come before the others, in their own order. Absent ones come last.

    rows: the data's rows, which a scorer is called with. A ranked row has "scores", and in stage
    spin "players", whose each response is. The order of cfg.players makes no difference.
    """
    texts = [candidate["responses"] for candidate in candidates]
    ids = [candidate["ids"] for candidate in candidates]
    K = max(map(len, texts))
    texts = [row_texts + [None] * (K - len(row_texts)) for row_texts in texts]
    scores = score_rows(cfg, path, rows, texts, ids, enc, device, dtype)
    names = player_columns(cfg) if cfg.stage == "spin" else [""] * K
    ranked = []
    for candidate, row_scores in zip(candidates, scores.tolist()):
        ranked.append(sort_by_score(cfg, candidate, names, row_scores))
    return ranked


def sort_by_score(cfg, candidate: dict, names: list[str], scores: list[float]) -> dict:
    """One row of `rank_by_score`. names: the player of each response."""
    ids = candidate["ids"]
    there = [k for k, y in enumerate(ids) if y is not None]
    absent = [k for k, y in enumerate(ids) if y is None]
    keys = {}  # smaller is better; equal keys are ties
    for k in there:
        on_top = names[k] in cfg.top_players
        place = cfg.top_players.index(names[k]) if on_top else len(cfg.top_players)
        keys[k] = (place, 0.0 if on_top else -scores[k])
    # ties stand in an order that depends on their ids alone, and on no property of the text; of
    # equal ones the data's is the first, and stays
    cut_ids = [y and y[: cfg.max_response or None] for y in ids]
    there.sort(key=lambda k: (keys[k], hash_ids(cut_ids[k])))
    order = there + absent
    sorted_keys = [keys[k] for k in there]
    row = candidate | {
        "responses": [candidate["responses"][k] for k in order],
        "ids": [ids[k] for k in order],
        "scores": [scores[k] if k in keys else None for k in order],
        # the place of the first one with the same key
        "ranks": [sorted_keys.index(key) for key in sorted_keys] + [len(order)] * len(absent),
    }
    if cfg.stage == "spin":
        row["players"] = [names[k] for k in order]
    return row


def hash_ids(ids: list[int]) -> str:
    return hashlib.sha256(str(ids).encode()).hexdigest()


def drop_empty(column: list[list[tuple]]) -> tuple[list[list[tuple]], int]:
    """Make the responses of a player absent that have no text. Returns their number too."""
    kept = []
    for responses in column:
        kept.append([(text, y) if text and text.strip() else (None, None) for text, y in responses])
    return kept, kept.count([(None, None)])


def mark_equal_responses(cfg, ranked: list[dict], enc, block_size: int):
    """Make responses absent that equal a better one, as encoded and cut: they teach nothing. Note
    in "same_as" which one it is."""
    encoded, _ = encode_rows(
        ranked, enc, cfg.template, block_size, cfg.max_prompt, cfg.max_response
    )
    for row, encoded_row in zip(ranked, encoded):
        ids = encoded_row["responses"]
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
    all_rounds = replace(cfg, max_rows=0) if is_scored(cfg) else cfg  # the prompts of all rounds
    if not os.path.isdir(cfg.teacher):
        for split, rows in load_rows(all_rounds).items():
            rows = drop_overlong_prompts(cfg, rows, enc, block_size)
            teacher_responses(cfg, split, rows, enc)
        return
    teacher, teacher_enc, meta = GPT.from_checkpoint(cfg.teacher, device, dtype)
    teacher_cfg = replace(cfg, template=meta["config"]["template"])
    for split, rows in load_rows(all_rounds).items():
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
    """(text, ids) of the response in a ranked file to the prompt of each row, see `match_samples`.
    If the file has several rows of a prompt, the first counts."""
    return [responses[0] for responses in match_samples(path, rows, enc, 1)]


def match_samples(path: str, rows: list[dict], enc, count: int) -> list[list[tuple]]:
    """(text, ids) of the best response of the first `count` rows in a ranked file that have the
    prompt of each row.

    Samples of this tokenizer keep their ids, see `data.rows.response_ids`.
    """
    fingerprint = tokenizer.fingerprint(enc)
    responses = {}
    for row in read_rows(path):
        if row.get("tokenizer") == fingerprint:
            ids = own_ids(path, row, enc)
        else:
            ids = response_ids(row, 0, enc)
        responses.setdefault(prompt_key(row), []).append((row["responses"][0], ids))
    missing = []
    for row in rows:
        if len(responses.get(prompt_key(row), [])) < count:
            missing.append(row["prompt"])
    if missing:
        wanted = "response" if count == 1 else f"{count} responses"
        raise SystemExit(
            f"{path}: no {wanted} to {len(missing)} of {len(rows)} prompts, "
            f"the first: {missing[0][:80]!r}"
        )
    return [responses[prompt_key(row)][:count] for row in rows]


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


def sample_policy(path, cfg, rows, name: str, model, enc, dtype, count: int = 1):
    """Sample the policy as it is now, with a full copy of its weights on each rank unless
    sample_sharded is set."""
    policy = model if cfg.sample_sharded else distributed.gather_full_model(model, dtype)
    write_samples(path, policy, enc, cfg, rows, name, count)


def write_samples(path: str, model, enc, cfg, rows: list[dict], name: str, count: int = 1):
    """Sample `count` responses to every prompt and write them to a ranked file, a row each, those
    to one prompt after each other.

    The rows are divided among the ranks. A sample is a function of (weights, seed, name, number of
    the row): another name draws other samples. Every finished part is kept, so a resumed file is
    the same file.
    """
    if broadcast_from_rank0(os.path.exists(path)):
        remove_parts(path)
        return
    repeated = []
    for row in unique_prompts(rows):
        repeated += [row] * count
    rows = repeated
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


def round_report(cfg, ranked: list[dict], rows: list[dict], enc) -> dict[str, float]:
    """What a round reports of its ranked rows. rows: those of the data, one for each.

    tie/PLAYER          share of responses that equal a better one
    length/PLAYER       mean tokens
    ended/PLAYER        share that ended with end-of-text
    empty/teacher       share of answers without text, if there are any
    exact_match/PLAYER  with the data
    length_acc/PLAYER   how well length alone separates them from the data's

    Tied responses count for tie and exact match only. Under a scorer also

    score/PLAYER        mean score, tied responses included
    score_best, score_worst    means over rows of the best and the worst score
    signal              share of rows in which something is ranked
    """
    report = {}
    if cfg.stage == "spin":
        for player in dict.fromkeys(player_columns(cfg)):
            report |= player_report(cfg, player, ranked, rows, enc)
    if is_scored(cfg):
        best, worst = [], []
        for row in ranked:
            scores = [score for score in row["scores"] if score is not None]
            best.append(max(scores))
            worst.append(min(scores))
        report["score_best"] = float(np.mean(best))
        report["score_worst"] = float(np.mean(worst))
        signal = []
        for row in ranked:
            signal.append(is_ranked({"ranks": row["ranks"], "responses": row["ids"]}))
        report["signal"] = float(np.mean(signal))
    return report


def player_report(cfg, player: str, ranked, rows, enc) -> dict[str, float]:
    """The part of `round_report` about one player."""
    report = {}
    present, tied, scores = [], [], []  # of its responses; the first two: (ranked row, k, data row)
    num_responses = 0
    for row, data_row in zip(ranked, rows, strict=True):
        for k in columns_of(cfg, player, row):
            num_responses += 1
            if row["ids"][k] is not None:
                present.append((row, k, data_row))
            elif row["same_as"][k] is not None:
                tied.append((row, k, data_row))
            if row.get("scores") and row["scores"][k] is not None:
                scores.append(row["scores"][k])
    num_absent = num_responses - len(present + tied)
    if player == "teacher" and num_absent:
        report["empty/teacher"] = num_absent / num_responses
    if scores:
        report[f"score/{player}"] = float(np.mean(scores))
    if not present:
        return report
    lengths = [len(row["ids"][k]) for row, k, _ in present]
    ended = [row["ids"][k][-1] == enc.eot_token for row, k, _ in present]
    report[f"tie/{player}"] = 1 - len(present) / len(present + tied)
    report[f"length/{player}"] = float(np.mean(lengths))
    report[f"ended/{player}"] = float(np.mean(ended))
    if player != "data":
        report |= compare_with_data(cfg, player, present, tied)
    return report


def columns_of(cfg, player: str, row: dict) -> list[int]:
    """Which responses of a ranked row are a player's."""
    names = row.get("players") or player_columns(cfg)
    return [k for k, name in enumerate(names) if name == player]


def compare_with_data(cfg, player: str, present, tied) -> dict[str, float]:
    """exact_match and length_acc of `round_report`, where the data has a response."""
    report = {}
    right, lengths, data_lengths = [], [], []
    for row, k, data_row in present + tied:
        if data_row.get("responses"):
            same_as = row["same_as"][k]
            text = row["responses"][k if same_as is None else same_as]
            right.append(extract_answer(text) == extract_answer(data_row["responses"][0]))
    for row, k, _ in present:
        for of_data in columns_of(cfg, "data", row):
            if row["ids"][of_data] is not None:
                lengths.append(len(row["ids"][k]))
                data_lengths.append(len(row["ids"][of_data]))
    if right:
        report[f"exact_match/{player}"] = float(np.mean(right))
    if data_lengths:
        report[f"length_acc/{player}"] = length_accuracy(data_lengths, lengths)
    return report
