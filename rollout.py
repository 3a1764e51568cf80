"""Collect the data of a round: what `fit` trains on and is evaluated on.

    pretrain      token streams
    sft           the best response of each row
    reward        the ranked responses of the data
    preference    the same, with their log-probabilities under the reference
    spin          the responses of the `players` (players.py), best first, the policy's own sampled
                  now, and their log-probabilities under the reference

`ranked_by` says who ranks: the data, the order of the players, or a scorer (scorer.py).

Of preference and spin, RUN/round_R/ holds self_{train,val}.jsonl (samples), {train,val}.jsonl
(ranked rows: text and token ids), {train,val}.ref.npz (reference log-probabilities) and
collect.json (the manifest: report, settings, hashes of the inputs); docs/checkpoints.md has all
files. Each is renamed into place when it is complete, and samples are kept in parts on the way, so
an interrupted collect resumes. Rank 0 decides what is there.

`python -m tools.rebuild` makes a round again from its manifest.
"""

import os
import time
from dataclasses import replace

import numpy as np

from data import tokenizer
from data.batch import permutation
from data.files import atomic_write, is_there, printable, read_arrays
from data.folder import read_stream
from data.rows import (
    best_only,
    drop_equal_responses,
    prompt_key,
    read_own_rows,
    read_rows,
    write_rows,
)
from eval import is_ranked, row_logps, validation_rows
from model import GPT
from nanospin import checkpoint, distributed, inputs
from nanospin.config import is_function, is_online, is_scored, scorer_setting
from nanospin.distributed import broadcast_from_rank0, run_on_rank0
from nanospin.preflight import say_shared_prompts
from nanospin.rounds import (
    check_files,
    check_finite,
    discard_old_scores,
    policy_sha256,
    reference_checkpoint,
    remove_parts,
    round_folder,
    rows_sha256,
    score_in_parts,
    set_aside_round,
    write_manifest,
    write_scorer,
)
from players import (
    check_room,
    collect_candidates,
    drop_rows_without_room,
    drop_unscorable_prompts,
    encode_for_run,
    list_counts,
    prompts_of_round,
    rank_by_score,
    round_report,
    teacher_responses,
    unique_prompts,
    write_samples,
)


def collect(cfg, round_id: int, model, enc, device, say):
    """(train, val, report) of a round. train and val are token streams for pretrain, else lists of
    encoded rows. Rows of preference and spin have "ref", the reference log-probability of each
    response. report: what to log about the players, on validation rows. say: prints a line."""
    if cfg.stage == "pretrain":
        return read_stream(cfg.data, "train"), read_stream(cfg.data, "val"), {}
    start = time.perf_counter()
    uses_reference = cfg.stage in ("preference", "spin")
    run_on_rank0(check_files, cfg, round_id)
    if uses_reference:
        run_on_rank0(set_aside_round, cfg, round_id)
        run_on_rank0(discard_old_scores, cfg, round_id)
    rows_by_split = load_rows(cfg, round_id, say)
    if round_id == 0:
        say_shared_prompts(rows_by_split["train"], rows_by_split["val"], say)
    played = None
    if cfg.stage == "spin" or is_scored(cfg):
        played = play_round(cfg, round_id, rows_by_split, model, enc, device, say)
    encoded, report = {}, {}
    for split, rows in rows_by_split.items():
        if cfg.stage == "sft":
            rows = [best_only(row) for row in rows]
        if played:
            rows, data_rows = played[split]
            report[split] = round_report(cfg, rows, data_rows, enc)
            if split == "train":
                rows = rows + earlier_rows(cfg, round_id, enc)
        encoded[split] = encode(cfg, round_id, split, rows, enc, model.config.block_size, say)
        if split == "val" and cfg.stage == "spin" and "data" not in cfg.players:
            encoded[split] += encode_validation_answers(cfg, enc, model.config.block_size)
        if uses_reference:
            refs = reference_logprobs(cfg, round_id, split, model, enc, encoded[split], device)
            for row, ref in zip(encoded[split], refs, strict=True):
                row["ref"] = ref[: len(row["responses"])].tolist()
    if uses_reference and distributed.rank() == 0:
        write_manifest(cfg, round_id, enc, device, encoded, report, start)
    distributed.barrier()
    return encoded["train"], encoded["val"], report.get("val", {})


def load_rows(cfg, round_id: int = 0, say=None) -> dict[str, list[dict]]:
    """The data's rows: a seeded choice of max_rows to train on, and the same validation rows for
    every run. Online ranking has all prompts, none twice on a side; `play_round` draws those of a
    round. say: says in the first round how many rows are left out."""
    prompt_only = not needs_responses(cfg)
    train = read_rows(f"{cfg.data}/train.jsonl", prompt_only)
    val = validation_rows(cfg.data, cfg.eval_rows, prompt_only)
    if is_online(cfg):
        say_once = say if round_id == 0 else None
        train = unique_prompts(train, say_once, "train")
        val = unique_prompts(val, say_once, "val")
    else:
        chosen = permutation(len(train), cfg.seed, 0)
        train = [train[i] for i in chosen[: cfg.max_rows or None]]
    return {"train": train, "val": val}


def needs_responses(cfg) -> bool:
    """Whether the data must have responses. A scorer can rank the policy's own samples of prompts
    that have none."""
    if is_online(cfg):
        return "data" in cfg.players or cfg.teacher == "rows"
    return cfg.stage != "ppo"


def encode_validation_answers(cfg, enc, block_size: int) -> list[dict]:
    """The data's best responses, unranked, for the validation loss where the data is no player: of
    all held-out rows, as other runs have it, not only the first of each prompt."""
    answered = []
    for row in validation_rows(cfg.data, cfg.eval_rows, prompt_only=True):
        if row.get("responses"):
            answered.append(best_only(row))
    encoded, _ = encode_for_run(cfg, answered, enc, block_size)
    return [row | {"players": ["data"]} for row in encoded if row is not None]


def earlier_rows(cfg, round_id: int, enc) -> list[dict]:
    """The training rows of the replay_rounds rounds before this one."""
    rows = []
    for earlier in range(max(0, round_id - cfg.replay_rounds), round_id):
        path = os.path.join(round_folder(cfg, earlier), "train.jsonl")
        rows += read_own_rows(path, enc, cfg.template)
    return rows


# ---------------------------------------------------------------------------------------- self-play


def play_round(cfg, round_id, rows_by_split, model, enc, device, say) -> dict[str, tuple]:
    """{split: (ranked rows, the data's rows that they are of)} of a round, read from the run's
    folder, or made and written there. Both splits are ranked before either is written: a scorer
    that fails leaves no rows."""
    folder, block_size = round_folder(cfg, round_id), model.config.block_size
    say_once = say if round_id == 0 else None
    paths = {split: os.path.join(folder, f"{split}.jsonl") for split in rows_by_split}
    missing = [split for split in paths if not broadcast_from_rank0(is_there(paths[split]))]
    rows_of = {}
    for split, rows in rows_by_split.items():  # both splits are checked before either is sampled
        rows = drop_rows_without_room(cfg, rows, enc, block_size, say_once, split)
        rows_of[split] = rows_to_rank(cfg, round_id, split, rows, split not in missing, say_once)
    ranked_of = {}
    for split in missing:
        ranked_of[split] = rank_split(cfg, round_id, split, rows_of[split], model, enc, device, say)
    if ranked_of:
        inputs.check_again(cfg)
        if distributed.rank() == 0:
            write_scorer(cfg, round_id)
            for split, ranked in ranked_of.items():
                write_rows(paths[split], ranked)
        distributed.barrier()
    played = {}
    for split, rows in rows_of.items():
        remove_parts(f"{paths[split]}.scores")
        played[split] = read_ranked(cfg, paths[split], rows, enc)
    return played


def rows_to_rank(cfg, round_id, split, rows: list[dict], is_made: bool, say) -> list[dict]:
    """Those of a split's rows that a round ranks: under a scorer the prompts that leave it room,
    and of these, to train on, the round's share. is_made: the round is in the run's folder."""
    if not is_made:
        rows = drop_unscorable_prompts(cfg, rows, say, split)
    is_drawn = split == "train" and is_online(cfg)
    # once a judge has ranked them, `read_ranked` knows which rows they were
    if is_drawn and not (is_made and is_judged(cfg)):
        rows = prompts_of_round(cfg, rows, round_id)
    return rows


def rank_split(cfg, round_id, split, rows, model, enc, device, say) -> list[dict]:
    """The ranked rows of one split."""
    ranked = collect_candidates(cfg, round_id, split, rows, model, enc, say)
    if is_scored(cfg):
        path = os.path.join(round_folder(cfg, round_id), f"{split}.jsonl.scores")
        ranked = rank_by_score(cfg, path, rows, ranked, enc, device)
    mark_equal_responses(cfg, ranked, enc, model.config.block_size)
    return ranked


def is_judged(cfg) -> bool:
    """Whether a model ranks, rather than a function."""
    return is_scored(cfg) and not is_function(cfg.ranked_by)


def read_ranked(cfg, path: str, rows: list[dict], enc) -> tuple[list, list]:
    """The ranked rows in a file, and the data's rows that they are of. Exits if it has others."""
    ranked = read_own_rows(path, enc, cfg.template)
    keys = list(map(prompt_key, ranked))
    if is_scored(cfg):
        # Only the prompts in the file: others left no room in the judge, which may be gone by now.
        # A round of older code can have a held-out prompt twice, so its last row stays.
        rows_with = {}
        for row in rows:
            rows_with.setdefault(prompt_key(row), []).append(row)
        rows = []
        for key in keys:
            of_key = rows_with.get(key, [])
            rows += of_key[:1]
            if len(of_key) > 1:
                of_key.pop(0)
    if keys != list(map(prompt_key, rows)):
        raise SystemExit(
            f"{path} has other prompts than the rows of {cfg.data} that are to be ranked: one of "
            "the two was changed; put the original back, or use another out_dir"
        )
    return ranked, rows


def mark_equal_responses(cfg, ranked: list[dict], enc, block_size: int):
    """Make responses absent that equal a better one, as encoded and cut: they teach nothing. Note
    in "same_as" which one it is, in "lengths" how many tokens the limits leave of each response if
    one is cut, and in "ended" whether each has ended, if one has not: text and ids stay whole, for
    another run with other limits."""
    encoded, _ = encode_for_run(cfg, ranked, enc, block_size)
    for row, encoded_row in zip(ranked, encoded):
        cut_ids = encoded_row["responses"]
        first_equal = [None if y is None else cut_ids.index(y) for y in cut_ids]
        same_as = [first if first != k else None for k, first in enumerate(first_equal)]
        row["same_as"] = same_as
        row["ids"] = [y if same is None else None for y, same in zip(row["ids"], same_as)]
        texts = row["responses"]
        row["responses"] = [None if y is None else text for y, text in zip(row["ids"], texts)]
        lengths = [y and len(cut) for y, cut in zip(row["ids"], cut_ids)]
        if lengths != [y and len(y) for y in row["ids"]]:
            row["lengths"] = lengths
        ended = [y is None or tokenizer.is_end(enc, y[-1]) for y in row["ids"]]
        if not all(ended):
            row["ended"] = ended


def prepare_teacher(cfg, enc, block_size: int, device):
    """Write the responses of a teacher checkpoint to RUN/teacher_{train,val}.jsonl, with the
    teacher's own template. A teacher that is a file must have a response to every prompt. Exits
    with one line, before anything is sampled, if the teacher lacks one or has no room for it."""
    if not cfg.teacher or broadcast_from_rank0(inputs.is_answered(cfg)):
        return
    if cfg.teacher == "rows" or not os.path.isdir(cfg.teacher):
        for split, rows in load_rows(cfg).items():
            rows = drop_rows_without_room(cfg, rows, enc, block_size)
            teacher_responses(cfg, split, rows, enc)
        return
    dtype = distributed.compute_dtype(cfg, device)
    teacher, teacher_enc, meta = GPT.from_checkpoint(cfg.teacher, device, dtype)
    teacher_cfg = replace(cfg, template=meta["config"]["template"])
    rows_by_split = {}
    for split, rows in load_rows(cfg).items():
        rows_by_split[split] = drop_rows_without_room(cfg, rows, enc, block_size)
        check_room(teacher_cfg, rows_by_split[split], teacher_enc, teacher.config.block_size)
    for split, rows in rows_by_split.items():
        path = inputs.teacher_file(cfg, split)
        write_samples(path, teacher, teacher_enc, teacher_cfg, rows, f"teacher {split}")


# ----------------------------------------------------------------------------------------- encoding


def encode(cfg, round_id, split, rows, enc, block_size, say) -> list[dict]:
    """Encode the rows of a round, and print the counts of those that are cut or left out. Exits if
    none is left."""
    encoded, counts = encode_for_run(cfg, rows, enc, block_size)
    if cfg.score_margin and split == "train":
        attach_scores(encoded, rows, f"{cfg.data}/{split}.jsonl")
    for row, encoded_row in zip(rows, encoded):
        for name in ("players", "same_as"):
            if encoded_row is not None and name in row:
                encoded_row[name] = row[name]
    kept = [row for row in encoded if row is not None]
    num_texts = sum(not row["prompt"] for row in kept)
    if num_texts and tokenizer.begin(enc):
        counts[f"whole texts without {printable(tokenizer.begin(enc))} before them"] = num_texts
    if cfg.stage != "sft":
        kept = drop_unranked(cfg, split, rows, kept, counts)
    if kept:
        say(f"round {round_id} {split}: {list_counts(counts)}")
        return kept
    if is_scored(cfg) and split == "train":
        advice = f"; --rounds={round_id} ends the run with the rounds before" if round_id else ""
        raise SystemExit(
            f"round {round_id}: {scorer_setting(cfg)} gives all responses to a prompt the same "
            f"score, for each of {len(rows)} prompts, so there is nothing to learn "
            f"({list_counts(counts)}){advice}"
        )
    raise SystemExit(
        f"{cfg.data}/{split}.jsonl: none of its {len(rows)} rows can be used "
        f"({list_counts(counts)})"
    )


def drop_unranked(cfg, split, rows, encoded: list[dict], counts: dict) -> list[dict]:
    """Make responses absent, in place, that equal a better one or are not to be ranked, and drop
    the training rows in which nothing is ranked then. Adds both to `counts`.

    Validation rows stay. If none of them is ranked, they are of use for the validation loss of
    spin only.
    """
    num_equal = sum(map(drop_equal_responses, encoded))
    for row in rows:  # and those that spin has made absent
        num_equal += sum(same_as is not None for same_as in row.get("same_as") or [])
    if cfg.best_and_worst and split == "train":
        for row in encoded:
            keep_best_and_worst(row)
    counts["responses equal to a better one"] = num_equal
    ranked = [row for row in encoded if is_ranked(row)]
    counts["with nothing ranked"] = len(encoded) - len(ranked)
    if split == "train" or (cfg.stage != "spin" and not ranked):
        return ranked
    return encoded


def attach_scores(encoded, rows, where: str):
    """Copy the scores of rows, the data's or a scorer's, into encoded rows."""
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


# ---------------------------------------------------------------------------------------- reference


def reference_logprobs(cfg, round_id, split, model, enc, rows, device) -> np.ndarray:
    """log pi_ref of every response (rows, K).

    They are computed once and stored, with a hash of the reference's weights and the encoded rows.
    """
    path = os.path.join(round_folder(cfg, round_id), f"{split}.ref.npz")
    weights = run_on_rank0(policy_sha256, cfg, round_id)
    fingerprint = rows_sha256(weights, rows)
    if broadcast_from_rank0(is_there(path)):
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


def read_reference_logprobs(path: str, fingerprint: str, rows: list[dict]) -> np.ndarray:
    stored = read_arrays(path)
    if str(stored.get("of")) != fingerprint:
        raise SystemExit(
            f"{path} is of other rows or another reference: the data or policy.json has changed "
            "since; put the original back, or use another out_dir"
        )
    refs = stored.get("refs")
    shape = (len(rows), max(len(row["responses"]) for row in rows))
    if refs is None or refs.shape != shape or not np.isfinite(refs).all():
        raise SystemExit(
            f"{path} is damaged: its refs are not the log-probabilities of {len(rows)} rows"
        )
    return refs
