"""Score responses: the reward of PPO, and who ranks the responses of a round.

`reward` of stage ppo and `ranked_by` of stages spin and preference name a scorer:

    module:function    function(row, text) -> float, called with the data's row and a response
    RUN                a reward model: its score of the response
    RUN                a language model, a judge: its mean log-probability of a token of the
                       response, or the sum if judge_length_normalize is off

A model scores with its own tokenizer, template and limits. To add another kind, add a branch to
`score_responses`.
"""

import copy
import math
import sys
import traceback

import numpy as np

from data.files import printable
from data.rows import encode_rows, is_score, prompt_fields, row_with_ids
from eval import pad_rows_to_K, response_lengths, retokenize, row_logps, row_scores
from model import GPT
from nanospin import distributed, inputs
from nanospin.config import import_function, scorer_name, scorer_setting
from nanospin.distributed import run_on_rank0
from nanospin.rounds import score_in_parts


def score_rows(cfg, path: str, rows: list[dict], texts, ids, enc, device, dtype) -> np.ndarray:
    """The scores of K responses to each row: (rows, K) float64, NaN where a response is absent.

    texts, ids: K texts and lists of token ids of each row, None where one is absent. What has been
    scored is kept in parts beside `path`; the caller calls `rounds.remove_parts`. All ranks call
    this together and get the same.

    Exits with one line, before anything is written, if the scorer raises or gives a number that is
    not finite.
    """
    name = scorer_name(cfg)
    judge = None if ":" in name else GPT.from_checkpoint(name, device, dtype)
    weights = run_on_rank0(inputs.scorer_sha256, name)
    of = f"{weights} {'per token' if cfg.judge_length_normalize else 'sum'}"
    hashed = []
    for row, row_texts in zip(rows, texts):
        hashed.append(prompt_fields(row) | {"responses": row_texts})

    def score(numbers: range) -> dict[str, np.ndarray]:
        part = slice(numbers.start, numbers.stop)
        scores = score_responses(cfg, judge, rows[part], texts[part], ids[part], enc, device)
        return {"scores": scores}

    return score_in_parts(path, hashed, of, score)["scores"]


def score_responses(cfg, judge, rows, texts, ids, enc, device) -> np.ndarray:
    """`score_rows` for a part of the rows. judge: (model, tokenizer, meta); None: a function."""
    scores = np.full((len(rows), len(texts[0])), np.nan)
    there = []  # of each row, which responses there are
    for row_texts in texts:
        there.append([k for k, text in enumerate(row_texts) if text is not None])
    if judge is None:
        places = []
        for i, columns in enumerate(there):
            places += [(i, k) for k in columns]
        values = call_function(cfg, [(rows[i], texts[i][k]) for i, k in places])
        for (i, k), value in zip(places, values):
            scores[i, k] = value
        return scores
    responded = []
    for i, columns in enumerate(there):
        present = [texts[i][k] for k in columns], [ids[i][k] for k in columns]
        responded.append((rows[i], *present))
    for i, values in enumerate(judge_scores(cfg, judge, responded, enc, device)):
        scores[i, there[i]] = values[: len(there[i])]
    return scores


def judge_scores(cfg, judge, responded, enc, device) -> np.ndarray:
    """The scores that a model gives, (rows, K) float64. responded: (row, texts, ids) per row."""
    judge, judge_enc, meta = judge
    config = meta["config"]
    sampled = []
    for row, texts, ids in responded:
        judge_ids = []
        for text, y in zip(texts, ids):
            judge_ids.append(retokenize(judge_enc, enc, text, y, config["template"]))
        sampled.append(row_with_ids(row, texts, judge_ids, judge_enc))
    encoded, counts = encode_rows(
        sampled,
        judge_enc,
        config["template"],
        judge.config.block_size,
        config["max_prompt"],
        config["max_response"],
    )
    if None in encoded:
        raise SystemExit(
            f"{scorer_setting(cfg)}: its block_size {judge.config.block_size} leaves no room after "
            f"{counts['dropped']} prompts; set max_prompt of that run"
        )
    budget = distributed.micro_batch_tokens(cfg, device)
    if judge.config.scalar_head:
        scores = row_scores(judge, encoded, budget, device).astype(np.float64)
    else:
        scores = row_logps(judge, encoded, budget, device).astype(np.float64)
        if cfg.judge_length_normalize:
            lengths = response_lengths(pad_rows_to_K(encoded, scores.shape[1]))
            scores = scores / np.maximum(lengths, 1)
    for (row, texts, _), values in zip(responded, scores):
        for text, value in zip(texts, values):
            if not is_score(float(value)):
                raise SystemExit(bad_score(cfg, f"gave {value}, not a finite number", row, text))
    return scores


def call_function(cfg, calls: list[tuple[dict, str]]) -> np.ndarray:
    """The scores (n,) float64 that the function gives to n pairs of row and text. Each is scored by
    one rank, once: a function that is not deterministic must give all ranks the same."""
    function = import_function(scorer_name(cfg))
    scores, error, shown = {}, "", ""
    for n in range(distributed.rank(), len(calls), distributed.world_size()):
        row, text = calls[n]
        distributed.heartbeat.touch()  # a call may take a second: it is progress
        try:
            value = function(copy.deepcopy(row), text)  # it may change its row
        except (Exception, SystemExit) as e:
            error = bad_score(cfg, f"raised {type(e).__name__}: {e}", row, text)
            trace = e.__traceback__.tb_next  # without this function
            shown = "".join(traceback.format_exception(type(e), e, trace))
            break
        scores[n] = as_number(value)
        if not is_score(scores[n]):
            error = bad_score(cfg, f"gave {shorten(value)}, not a finite number", row, text)
            break
    of_ranks = distributed.all_gather_object((error, shown))
    for rank, (error, shown) in enumerate(of_ranks):
        if error:
            if rank == distributed.rank():
                sys.stderr.write(printable(shown))
            raise SystemExit(error)
    return np.array(distributed.merge_results(len(calls), scores), dtype=np.float64)


def as_number(value) -> float:
    """What a function returned as a float; NaN if it is not a number."""
    if isinstance(value, (str, bytes)):
        return math.nan
    try:
        return float(value)
    except Exception:  # of whatever type it is
        return math.nan


def bad_score(cfg, what: str, row: dict, text: str) -> str:
    return (
        f"{scorer_setting(cfg)} {what}, for the prompt {row['prompt'][:60]!r} and the response "
        f"{text[:60]!r}; no row of the round was written: mend it and run the same command again"
    )


def shorten(value) -> str:
    """A value in one short line."""
    return " ".join(repr(value).split())[:80]
