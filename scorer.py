"""Score responses: the reward of PPO, and who ranks the responses of a round.

`reward` of stage ppo and `ranked_by` of stages spin and preference name a scorer:

    module:function    function(row, text) -> float, called with the data's row and a response
    RUN                a reward model: its score of the response
    RUN                a language model, a judge: its mean log-probability of a token of the
                       response, or the sum if judge_length_normalize is off

A model scores with its own tokenizer, template and limits. A server, or any other program, is a
function that calls it.
"""

import contextlib
import sys

import numpy as np

from data.files import printable
from data.rows import (
    drop_equal_responses,
    encode_rows,
    ids_source,
    is_score,
    prompt_fields,
    row_with_ids,
)
from data.template import without_thoughts
from eval import pad_rows_to_K, response_lengths, retokenize, row_logps, row_scores
from model import GPT
from nanospin import distributed, elastic, inputs, rounds
from nanospin.config import import_function, is_function, scorer_name, scorer_setting
from nanospin.distributed import run_on_rank0
from nanospin.rounds import score_in_parts
from nanospin.user_function import call_once

CALLS_OF_PART = 256  # of a function, at most, before its scores are written to disk


def score_rows(cfg, path: str, rows: list[dict], texts, ids, enc, device) -> np.ndarray:
    """The scores of K responses to each row: (rows, K) float64, NaN where a response is absent.

    texts, ids: K texts and lists of token ids of each row, None where one is absent. What has been
    scored is kept in parts beside `path`; the caller calls `rounds.remove_parts`. All ranks call
    this together and get the same. What a model cuts to its limits is printed.

    Exits with one line, before anything is written, if the scorer raises or gives a number that is
    not finite.
    """
    name = scorer_name(cfg)
    size, judge, encoded = rounds.PART_SIZE, None, []
    if is_function(name):  # a call may take seconds
        size = min(size, max(1, CALLS_OF_PART // len(texts[0])))
    else:
        dtype = distributed.compute_dtype(cfg, device)
        judge, judge_enc, meta = GPT.from_checkpoint(name, device, dtype)
        encoded = encode_for_judge(cfg, judge, judge_enc, meta, rows, texts, ids, enc)
    weights = run_on_rank0(inputs.scorer_sha256, name)
    scorer_id = f"{weights} {'per token' if cfg.judge_length_normalize else 'sum'}"
    hashed = []
    for row, row_texts in zip(rows, texts):
        hashed.append(prompt_fields(row) | {"responses": row_texts})

    def score(numbers: range) -> dict[str, np.ndarray]:
        part = slice(numbers.start, numbers.stop)
        scores = score_responses(cfg, judge, rows[part], texts[part], encoded[part], device)
        return {"scores": scores}

    return score_in_parts(path, hashed, scorer_id, score, size)["scores"]


def score_responses(cfg, judge, rows, texts, encoded, device) -> np.ndarray:
    """`score_rows` for a part of the rows. judge: a model, with rows of `encode_for_judge`; None: a
    function.

    Equal responses to a row are scored once: a batch could round them differently, and nothing may
    be ranked between them. Equal is the text for a function, the ids for a model.
    """
    if judge is None:
        return function_scores(cfg, rows, texts)
    return judge_scores(cfg, judge, rows, texts, encoded, device)


def columns_there(texts) -> list[int]:
    """Which of the K responses to a row there are."""
    return [k for k, text in enumerate(texts) if text is not None]


def function_scores(cfg, rows, texts) -> np.ndarray:
    """`score_responses` with a function."""
    scores = np.full((len(rows), len(texts[0])), np.nan)
    columns_of = {}  # (row, text) -> its columns
    for i, row_texts in enumerate(texts):
        for k in columns_there(row_texts):
            columns_of.setdefault((i, row_texts[k]), []).append(k)
    values = call_function(cfg, [(rows[i], text) for i, text in columns_of])
    for ((i, _), columns), value in zip(columns_of.items(), values):
        scores[i, columns] = value
    return scores


def encode_for_judge(cfg, judge, judge_enc, meta, rows, texts, ids, enc) -> list[dict]:
    """Rows as a judge reads them, with the responses that are there. Prints what is cut to its
    limits, and how many lose thoughts that its template does not have. judge_enc, meta: its
    tokenizer and the meta.json of its checkpoint."""
    config = meta["config"]
    judge_format = (judge_enc, config["template"])
    keeps_ids = ids_source(enc, cfg.template) == ids_source(*judge_format)
    sampled = []
    num_without_thoughts = 0
    for row, row_texts, row_ids in zip(rows, texts, ids):
        its_texts, its_ids = [], []
        for k in columns_there(row_texts):
            text = row_texts[k] if keeps_ids else without_thoughts(config["template"], row_texts[k])
            num_without_thoughts += text != row_texts[k]
            its_texts.append(text)
            its_ids.append(retokenize(*judge_format, enc, cfg.template, text, row_ids[k]))
        sampled.append(row_with_ids(row, its_texts, its_ids, *judge_format))
    limits = (judge.config.block_size, config["max_prompt"], config["max_response"])
    encoded, counts = encode_rows(sampled, *judge_format, *limits)
    cut = counts["prompts cut"] + counts["responses cut"]
    num_responses = sum(len(row["responses"]) for row in sampled)
    if num_without_thoughts and distributed.rank() == 0:
        print(
            f"{scorer_setting(cfg)} has a template without thoughts: those of "
            f"{num_without_thoughts} of {num_responses} responses are not scored",
            flush=True,
        )
    if cut and distributed.rank() == 0:
        print(
            f"{scorer_setting(cfg)} cuts to its limits {counts['prompts cut']} of {len(sampled)} "
            f"prompts and {counts['responses cut']} of {num_responses} responses",
            flush=True,
        )
    return encoded


def judge_scores(cfg, judge, rows, texts, encoded, device) -> np.ndarray:
    """`score_responses` with a model."""
    encoded = [dict(row) for row in encoded]
    same_as = []  # of each response, the first one of the row that equals it
    for row in encoded:
        same_as.append([row["responses"].index(y) for y in row["responses"]])
        drop_equal_responses(row)
    budget = distributed.micro_batch_tokens(cfg, device)
    if judge.config.scalar_head:
        values = row_scores(judge, encoded, budget, device).astype(np.float64)
    else:
        values = row_logps(judge, encoded, budget, device).astype(np.float64)
        if cfg.judge_length_normalize:
            lengths = response_lengths(pad_rows_to_K(encoded, values.shape[1]))
            values = values / np.maximum(lengths, 1)
    scores = np.full((len(rows), len(texts[0])), np.nan)
    for i, columns in enumerate(same_as):
        for k, first in zip(columns_there(texts[i]), columns):
            scores[i, k] = values[i, first]
            if not is_score(float(scores[i, k])):
                problem = f"gave {scores[i, k]}, not a finite number"
                raise SystemExit(bad_score(cfg, problem, rows[i], texts[i][k]))
    return scores


def call_function(cfg, calls: list[tuple[dict, str]]) -> np.ndarray:
    """The scores (n,) float64 that the function gives to n pairs of row and text. Each is scored by
    one rank, once: a function that is not deterministic must give all ranks the same.

    A signal ends the call and the run, and none of these scores count. If it is sent to all
    processes of a job, as Ctrl-C is, it also stops a program that a function runs, which then looks
    like a wrong answer.
    """
    function = import_function(scorer_name(cfg))
    scores, error, shown = {}, "", ""
    for n in range(distributed.rank(), len(calls), distributed.world_size()):
        distributed.heartbeat.touch()  # a call may take a second: it is progress
        with contextlib.suppress(elastic.Interrupted), elastic.interrupted_by_signals():
            scores[n], problem, shown = call_once(function, *calls[n])
        if elastic.received_signals:
            break
        if problem:
            error = bad_score(cfg, problem, *calls[n])
            break
    elastic.exit_if_signalled()
    of_ranks = distributed.all_gather_object((error, shown))
    for rank, (error, shown) in enumerate(of_ranks):
        if error:
            if rank == distributed.rank():
                sys.stderr.write(printable(shown))
            raise SystemExit(error)
    return np.array(distributed.merge_results(len(calls), scores), dtype=np.float64)


def bad_score(cfg, what: str, row: dict, text: str) -> str:
    return (
        f"{scorer_setting(cfg)} {what}, for the prompt {row['prompt'][:60]!r} and the response "
        f"{text[:60]!r}; fix it and run the same command again"
    )
