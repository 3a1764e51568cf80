"""Evaluation: validation loss, ranking accuracy, bits per byte, exact match, win rate.

    python eval.py sft=out/demo/sft
    python eval.py sft=out/demo/sft spin=out/demo/spin_k3 --judge=out/demo/sft_teacher
    python eval.py sft=out/demo/sft cold=out/demo/sft@0.5 --out=out/eval     # @ temperature
    python eval.py sft=out/demo/sft sft.greedy=out/demo/sft@0 --samples=8    # and pass_at_8
    python eval.py rm=out/reward --data=data/ranked                          # a reward model
    python eval.py out/demo/sft --logps --data=rows.jsonl                    # of each response

All checkpoints are measured on the same held-out rows, those that every one of them can take. Each
is sampled with its own template and limits.
"""

import bisect
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from data import cli, tokenizer
from data.batch import (
    Batch,
    batch_rows,
    count_row_tokens,
    num_supervised,
    permutation,
    reward_batch,
    split_by_tokens,
    stream_batch,
)
from data.files import check_output, printable, write_json
from data.gsm8k.scorer import same_answer
from data.progress import ProgressBar
from data.rows import (
    EDITED,
    drop_equal_responses,
    encode_rows,
    ids_source,
    read_rows,
    response_ids,
    row_with_ids,
    write_rows,
)
from data.template import (
    split_template,
    without_thoughts,
    written_ids,
    written_text,
    written_whole,
)
from loss import chosen_rejected_metrics, gradient_weight, plackett_luce, wins
from model import GPT, response_logps, response_scores
from nanospin import checkpoint, distributed, eval_command
from nanospin.config import import_function
from nanospin.distributed import all_reduce_sum, world_size
from nanospin.eval_command import Entry
from nanospin.user_function import call_once
from sample import respond

EVAL_TOKENS = 8192  # tokens per forward pass of the command line


# ------------------------------------------------------------- forward passes without gradients


@torch.no_grad()
def stream_loss(model, tokens, cfg, device, document_end: int | None = None) -> float:
    """Mean cross-entropy per token over `eval_batches` batches of the validation stream, which are
    the same for every run."""
    was_training = model.training
    model.eval()
    length, vocab_size = model.config.block_size, model.config.vocab_size
    nll = torch.zeros((), dtype=torch.float64)
    num_targets = 0
    for step in range(cfg.eval_batches):
        for part in window_slices(cfg, length, device):
            batch = stream_batch(
                tokens, length, cfg.batch_size, 0, step, vocab_size, part, document_end
            ).to(device)
            logps = model(batch.idx, batch.targets, **batch.layout())
            nll -= logps.double().sum().cpu()
            num_targets += batch.num_targets
    distributed.reshard(model)
    model.train(was_training)
    nll, num_targets = all_reduce_sum([nll, num_targets], device)
    return nll / num_targets


def window_slices(cfg, length: int, device) -> list[slice]:
    """This rank's part of a global batch of windows, as slices. Every rank has the same
    number."""
    share = cfg.batch_size // world_size()
    size = max(1, distributed.micro_batch_tokens(cfg, device) // length)
    first = distributed.rank() * share
    end = first + share
    return [slice(start, min(start + size, end)) for start in range(first, end, size)]


@torch.no_grad()
def map_batches(
    model,
    rows: list[dict],
    tokens: int,
    device,
    make_batch: Callable,
    function: Callable,
    desc: str | None = None,
    layout: str = "packed",
) -> list:
    """function(batch) for all rows, about `tokens` tokens at a time -> one result per row, on every
    rank. The model is in evaluation mode.

    make_batch(rows, layout) -> Batch; function(batch) -> a result for each of its rows.
    desc: title of a progress bar; None: no bar.
    """
    was_training = model.training
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: count_row_tokens(rows[i], layout))
    sizes = [count_row_tokens(rows[i], layout) for i in order]
    num_batches = min(len(rows), math.ceil(sum(sizes) / tokens))
    parts = list(distributed.batches_of_rank(split_by_tokens(sizes, num_batches)))
    hide_bar = not desc or distributed.rank() != 0
    results = {}
    for part in ProgressBar(parts, desc=desc, hide=hide_bar):
        indices = [order[i] for i in part]
        batch = make_batch([rows[i] for i in indices], layout).to(device)
        results.update(zip(indices, function(batch)))
    distributed.reshard(model)
    model.train(was_training)
    return distributed.merge_results(len(rows), results)


def row_logps(
    model, rows: list[dict], tokens: int, device, desc: str | None = None, layout: str = "packed"
) -> np.ndarray:
    """log pi(y_k|x) of every response of encoded rows -> (rows, K) float32, 0 where absent, on
    every rank. Policy and reference are both computed here."""

    def score(batch: Batch):
        return response_logps(model, batch).cpu().numpy()

    return pad_and_stack(map_batches(model, rows, tokens, device, batch_rows, score, desc, layout))


def row_scores(
    model, rows: list[dict], tokens: int, device, desc: str | None = None, layout: str = "packed"
) -> np.ndarray:
    """A reward model's score of every response -> (rows, K) float32, 0 where it is absent."""

    def score(batch: Batch):
        return response_scores(model, batch).cpu().numpy()

    scores = map_batches(model, rows, tokens, device, reward_batch, score, desc, layout)
    return pad_and_stack(scores)


def pad_and_stack(rows: list) -> np.ndarray:
    """Arrays of at most K numbers -> (rows, K), padded with 0."""
    K = max(len(row) for row in rows)
    return np.stack([np.pad(row, (0, K - len(row))) for row in rows])


# ------------------------------------------------------------------------- metrics of rankings

# The metrics that the evaluation of a stage can have, for `keep_best`. Some are there only if the
# rows have what they measure. A name that ends in "/" or "@" is followed by a player or a distance.
RANKING_METRICS = [
    "val_loss",
    "rank_nll",
    "acc",
    "acc_se",
    "grad_weight",
    "margin",
    "reward_chosen",
    "reward_rejected",
    "logp_chosen",
    "logp_rejected",
    "kl_from_ref",
    "acc/",
    "reward/",
    "logp/",
]
REWARD_METRICS = [
    "pair_nll",
    "acc",
    "acc_se",
    "length_acc",
    "acc@",
    "pairs@",
    "score",
    "score_std",
]


def pad_rows_to_K(rows: list[dict], K: int) -> list[dict]:
    """Rows with absent responses added, so that each has K."""
    padded = []
    for row in rows:
        missing = K - len(row["responses"])
        if "players" in row:
            row = row | {"players": row["players"] + [""] * missing}
        if "same_as" in row:
            row = row | {"same_as": row["same_as"] + [None] * missing}
        full = row | {
            "responses": row["responses"] + [None] * missing,
            "ranks": row["ranks"] + [K] * missing,
        }
        if "ref" in row:
            full["ref"] = row["ref"] + [0.0] * missing
        padded.append(full)
    return padded


def response_masks(rows: list[dict]) -> np.ndarray:
    """(rows, K) bool: which responses are there. All rows have K."""
    masks = []
    for row in rows:
        masks.append([response is not None for response in row["responses"]])
    return np.array(masks)


def response_lengths(rows: list[dict]) -> np.ndarray:
    """(rows, K) supervised tokens, 0 where a response is absent. All rows have K."""
    lengths = []
    for row in rows:
        lengths.append([num_supervised(row["prompt"], y) for y in row["responses"]])
    return np.array(lengths)


def loss_metrics(logps: np.ndarray, rows: list[dict]) -> dict[str, float]:
    """Cross-entropy per token on each row's best response, whatever objective was trained."""
    num_targets = sum(num_supervised(row["prompt"], row["responses"][0]) for row in rows)
    return {"val_loss": float(-logps[:, 0].sum() / num_targets)}


def ranking_metrics(
    logps: np.ndarray, refs: np.ndarray, rows: list[dict], beta: float, players: list[str]
) -> dict[str, float]:
    """Metrics of a round's held-out rows. logps and refs are (rows, K), from `row_logps`. players:
    of each response, or its place as a string, if the rows do not say it themselves.

    val_loss             cross-entropy per token of the data's response, or that in the first place
    rank_nll             Plackett-Luce on the implicit rewards
    acc, acc_se          share of ordered pairs in the right order, see `pair_accuracy`
    grad_weight          see `loss.gradient_weight`
    margin, reward_chosen, ...   see `loss.chosen_rejected_metrics`
    acc/PLAYER           share of this player's responses that beat all worse ones of their row; a
                         tie with the best of these counts half
    reward/PLAYER        mean implicit reward; equal responses of a row count once, here and in logp
    logp/PLAYER          mean log-probability of the response under the policy
    kl_from_ref          KL(pi_ref || pi_theta) per token: the mean of log pi_ref - log pi_theta
                         over the reference's own samples, the player "self", equal ones too: an
                         absent one counts as the response it equals ("same_as"). Left out without
    """
    mask = response_masks(rows)
    lengths = response_lengths(rows)
    ranks = np.array([row["ranks"] for row in rows])
    rewards = beta * (logps - refs)
    names = np.array([row.get("players", players) for row in rows])  # (rows, K)
    metrics = {}
    best = count_responses(rows, (names == "data") | (names == "1"), mask)
    if best.any():
        nats = -(best * logps).sum()
        metrics["val_loss"] = float(nats / (best * lengths).sum())

    worse = (ranks[:, :, None] < ranks[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    ranked = worse.any((1, 2))
    if ranked.any():
        scores = torch.from_numpy(rewards[ranked])
        policy = torch.from_numpy(logps[ranked])
        ranked_mask = torch.from_numpy(mask[ranked])
        nll = plackett_luce(scores, ranked_mask, ranks=torch.from_numpy(ranks[ranked]))
        right, acc, error = pair_accuracy(rewards, worse)
        metrics["rank_nll"] = float(nll.mean())
        metrics["acc"] = acc
        metrics["acc_se"] = error
        metrics["grad_weight"] = float(gradient_weight(scores, torch.from_numpy(worse[ranked])))
        for name, value in chosen_rejected_metrics(scores, policy, ranked_mask).items():
            metrics[name] = float(value)
        has_worse = worse.any(-1)  # (rows, K)
        beats_all = np.where(worse, right, 1.0).min(-1)  # 1/2 for a tie with the best of them
        for player in dict.fromkeys(players):
            selected = (names == player) & has_worse
            if selected.any():
                metrics[f"acc/{player}"] = float(beats_all[selected].mean())

    for player in dict.fromkeys(players):
        selected = (names == player) & mask
        if selected.any():
            metrics[f"reward/{player}"] = float(rewards[selected].mean())
            metrics[f"logp/{player}"] = float(logps[selected].mean())
    own = count_responses(rows, names == "self", mask)
    if own.any():
        nats = (own * (refs - logps)).sum()
        metrics["kl_from_ref"] = float(nats / (own * lengths).sum())
    return metrics


def count_responses(rows: list[dict], selected: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(rows, K): how many selected responses are equal to each one that is kept, itself included.
    The others of them are absent, and "same_as" says which one they equal. selected, mask (rows,
    K)."""
    counts = np.zeros(mask.shape, dtype=int)
    for i, row in enumerate(rows):
        same_as = row.get("same_as", [None] * mask.shape[1])
        for k in np.flatnonzero(selected[i]):
            one = k if same_as[k] is None else same_as[k]
            counts[i, one] += mask[i, one]
    return counts


def pair_accuracy(scores: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, float, float]:
    """How often the first of a pair has the higher score; a tie counts half (`loss.wins`).

    scores (rows, K); pairs (rows, K, K) bool, which pairs (i, j) count. Returns right (rows, K, K),
    the share over all pairs, and its standard error with rows as the independent units.
    """
    diff = scores[:, :, None].astype(np.float64) - scores[:, None, :]
    right = pairs * wins(torch.from_numpy(diff)).numpy()
    num_right = right.sum((1, 2))
    n = pairs.sum((1, 2))
    total = max(1, n.sum())
    share = num_right.sum() / total
    # The share is a ratio of sums over rows, so its error is that of the rows' residuals.
    error = np.sqrt(((num_right - share * n) ** 2).sum()) / total
    return right, float(share), float(error)


def reward_metrics(scores: np.ndarray, rows: list[dict]) -> dict[str, float]:
    """Held-out metrics of a reward model. scores (rows, K) from `row_scores`.

    pair_nll      mean over rows of the mean -log sigmoid(s_i - s_j) of their pairs; ln 2 = 0.6931
                  if all scores are equal
    acc, acc_se   share of ordered pairs in the right order, see `pair_accuracy`
    length_acc    the same if the score were the length in tokens
    acc@d, pairs@d    of pairs d distinct ranks apart
    score, score_std  of all responses
    """
    rows = pad_rows_to_K(rows, scores.shape[1])
    mask = response_masks(rows)
    places = np.array([dense_ranks(row) for row in rows])
    both = mask[:, :, None] & mask[:, None, :]
    apart = np.where(both, places[:, None, :] - places[:, :, None], 0)  # (rows, i, j)
    pairs = apart > 0

    diff = scores[:, :, None].astype(np.float64) - scores[:, None, :]
    n = pairs.sum((1, 2))
    nll = (np.logaddexp(0, -diff) * pairs).sum((1, 2))[n > 0] / n[n > 0]
    right, acc, error = pair_accuracy(scores, pairs)
    _, length_acc, _ = pair_accuracy(response_lengths(rows), pairs)
    metrics = {
        "pair_nll": float(nll.mean()),
        "acc": acc,
        "acc_se": error,
        "length_acc": length_acc,
    }
    for d in range(1, int(apart.max()) + 1):
        at_distance = apart == d
        if at_distance.any():
            metrics[f"acc@{d}"] = float(right[at_distance].mean())
            metrics[f"pairs@{d}"] = int(at_distance.sum())
    metrics["score"] = float(scores[mask].mean())
    metrics["score_std"] = float(scores[mask].std())
    return metrics


def dense_ranks(row: dict) -> list[int]:
    """The ranks of a row counted without gaps among the responses that are there: 0, 1, 1, 2 ..."""
    there = set()
    for rank, response in zip(row["ranks"], row["responses"]):
        if response is not None:
            there.add(rank)
    distinct = sorted(there)
    return [bisect.bisect_left(distinct, rank) for rank in row["ranks"]]


# ------------------------------------------------------------------------- metrics of samples


def sample_metrics(
    texts, ids, references, ended: list[bool], count: int = 1, scores: list[float] | None = None
) -> dict[str, float]:
    """Of sampled responses: share that ended, mean length in tokens, exact match and F1 with the
    reference texts, and the mean of their scores under --scorer. With `count` samples a prompt, one
    after the other, also pass_at_COUNT, the share of prompts with at least one exact match, and
    score_best_of_COUNT, the mean of the best score of each prompt."""
    pairs = list(zip(texts, references))
    exact = [same_answer(text, reference) for text, reference in pairs]
    metrics = {
        "ended": float(np.mean(ended)),
        "length": float(np.mean([len(y) for y in ids])),
        "exact_match": float(np.mean(exact)),
        "f1": float(np.mean([f1_score(text, reference) for text, reference in pairs])),
    }
    if count > 1:
        metrics[f"pass_at_{count}"] = float(np.reshape(exact, (-1, count)).any(1).mean())
    if scores is not None:
        metrics["score"] = float(np.mean(scores))
        if count > 1:
            metrics[f"score_best_of_{count}"] = float(np.reshape(scores, (-1, count)).max(1).mean())
    return metrics


def function_scores(name: str, rows: list[dict], texts: list[str]) -> list[float]:
    """The score that the function `name` (module:function) gives to each text, a response to the
    row beside it. Exits with one line, after the function's own traceback, if it raises or gives no
    finite number."""
    function = import_function(name)
    scores = []
    for row, text in zip(rows, texts, strict=True):
        score, problem, shown = call_once(function, row, text)
        if problem:
            sys.stderr.write(printable(shown))
            raise SystemExit(
                f"--scorer {name} {problem}, for the prompt {row['prompt'][:60]!r} and the"
                f" response {text[:60]!r}"
            )
        scores.append(score)
    return scores


def f1_score(text: str, reference: str) -> float:
    """F1 of the two bags of words, 1 if both are empty. As SQuAD measures answers (arXiv
    1606.05250), but punctuation and articles count: they matter in a command."""
    a = Counter(text.lower().split())
    b = Counter(reference.lower().split())
    if not a and not b:
        return 1.0
    common = (a & b).total()
    return 2 * common / (a.total() + b.total())


def length_accuracy(data_lengths, other_lengths) -> float:
    """How well length alone separates the data's responses from others, in the better of the two
    directions. A tie counts half."""
    data, other = np.array(data_lengths, float), np.array(other_lengths, float)
    longer = float(wins(torch.from_numpy(data - other)).mean())
    return float(max(longer, 1 - longer))


# ------------------------------------------------- what lm-evaluation-harness says of an export


def rolling_windows(ids: list[int], first: int, length: int) -> list[dict]:
    """A whole text as rows of at most `length` tokens that predict each id exactly once, cut as
    lm-evaluation-harness does (rolling). `first` stands before the first id. Windows begin with the
    id before, and the last one with as much context as fits."""
    n = len(ids)
    ids = [first, *ids]
    rows = []
    for start in range(0, n, length):
        context = ids[max(0, min(start + length, n) - length) : start + 1]
        predicted = ids[start + 1 : start + length + 1]
        rows.append({"prompt": context, "responses": [predicted], "ranks": [0]})
    return rows


def harness_metrics(model, enc, template: str, rows, encoded, device) -> dict[str, float]:
    """What lm-evaluation-harness reports of an exported checkpoint, on the same rows. There is no
    reference, and responses are scored without their end-of-text.

    bits_per_byte     nats of the best responses / ln 2 / their UTF-8 bytes, as the template writes
                      them: trimmed, with what stands around them. A whole text is scored in
                      `rolling_windows` of block_size, after a beginning-of-text
    choice_acc        of rows in which something is ranked, equal responses being one: how often the
                      best has the highest log-probability. Of equal ones the first counts (`acc`
                      of the harness)
    choice_acc_bytes  the same with log-probabilities per UTF-8 byte (acc_bytes)

    encoded: from `encode_rows`, None where a row was dropped. Rows with an empty response are left
    out. The harness encodes prompt and response as one text and moves the prompt's last spaces into
    the response. The ids are the same if the template ends without a space and the response begins
    as a word of the tokenizer does, with one.
    """
    scored, sizes = [], []  # encoded rows, and the bytes of each of their responses
    for row, ids in zip(rows, encoded):
        if not row["prompt"]:
            text = row["responses"][0]
            first = tokenizer.specials(enc).get(tokenizer.begin(enc), enc.eot_token)
            windows = rolling_windows(tokenizer.encode(enc, text), first, model.config.block_size)
            scored += windows
            sizes += [[len(text.encode())]] + [[0]] * (len(windows) - 1)
        elif ids is not None:
            responses, num_bytes = without_end(enc, template, row, ids)
            if [] not in responses:
                scored.append(ids | {"responses": responses})
                sizes.append(num_bytes)
    if not scored:
        return {}
    logps = row_logps(model, scored, EVAL_TOKENS, device)
    sizes = pad_and_stack(sizes)
    nats = -logps[:, 0].sum(dtype=np.float64)
    metrics = {"bits_per_byte": float(nats / math.log(2) / sizes[:, 0].sum())}
    ranked = []
    is_there = np.zeros(sizes.shape, bool)
    for i, row in enumerate(scored):
        different = dict(row)
        drop_equal_responses(different)
        for k, response in enumerate(different["responses"]):
            is_there[i, k] = response is not None
        if is_ranked(different):
            ranked.append(i)
    if ranked:
        for name, each in (
            ("choice_acc", logps),
            ("choice_acc_bytes", logps / np.maximum(sizes, 1)),
        ):
            chosen = np.where(is_there, each, -np.inf).argmax(1)
            right = [is_best(scored[i]["ranks"], chosen[i], is_there[i]) for i in ranked]
            metrics[name] = float(np.mean(right))
    return metrics


def is_best(ranks: list[int], chosen: int, is_there) -> bool:
    """Whether no response that is there has a better rank than the chosen one. Ranks need not begin
    at 0."""
    present = [rank for rank, there in zip(ranks, is_there) if there]
    return ranks[chosen] == min(present)


def without_end(enc, template: str, row: dict, encoded: dict) -> tuple[list, list[int]]:
    """The responses of an encoded row without end-of-text, and the UTF-8 bytes of what the template
    writes for each (0: absent). A response that was cut counts as far as it goes."""
    responses, num_bytes = [], []
    for text, ids in zip(row["responses"], encoded["responses"]):
        if ids is None:
            responses.append(None)
            num_bytes.append(0)
            continue
        is_whole = tokenizer.is_end(enc, ids[-1])
        responses.append(ids[:-1] if is_whole else ids)
        if is_whole and not tokenizer.takes_space(enc):
            num_bytes.append(len(written_whole(template, text).encode()))
        else:
            num_bytes.append(count_bytes(enc, template, responses[-1]))
    return responses, num_bytes


def count_bytes(enc, template: str, ids: list[int]) -> int:
    """The UTF-8 bytes of a response's ids, which may end within a character."""
    if not ids:
        return 0
    if hasattr(enc, "decode_bytes"):
        return len(enc.decode_bytes(ids))
    whole, text = len(ids), written_text(enc, template, ids)
    while text.endswith("\ufffd") and enc.num_bytes(ids[whole - 1]):  # a part of a character
        whole -= 1
        text = written_text(enc, template, ids[:whole]) if whole else ""
    return len(text.encode()) + sum(enc.num_bytes(token_id) for token_id in ids[whole:])


# --------------------------------------------------------------------------------- win rates


def win_rate(judge, pairs: list[dict], device, tokens: int = EVAL_TOKENS) -> tuple[float, float]:
    """Share of prompts on which the first response beats the second under a judge. Equal ones count
    half. pairs: encoded rows of two responses. Returns (share, standard error).

    The judge is a reward model (the higher score wins) or a language model (the higher mean
    log-probability per token wins, end-of-text included).
    """
    if judge.config.scalar_head:
        scores = row_scores(judge, pairs, tokens, device)
    else:
        lengths = response_lengths(pairs)
        scores = row_logps(judge, pairs, tokens, device) / lengths
    # Equal responses are equal even if rounding differs between two places of a batch.
    same_ids = np.array([row["responses"][0] == row["responses"][1] for row in pairs])
    diff = np.where(same_ids, 0.0, scores[:, 0].astype(float) - scores[:, 1])
    won = wins(torch.from_numpy(diff)).numpy()
    return float(won.mean()), float(won.std() / np.sqrt(len(won)))


def retokenize(
    judge_enc, judge_template: str, enc, template: str, text: str, ids: list[int] | None
) -> list[int]:
    """A response's ids for a judge: as they are if its tokenizer made them under a template of the
    same form, else encoded again under the judge's template, with end-of-text if the response had
    ended, or if it is no token of the judge's (white space). enc is None for texts of the data."""
    if enc is not None and ids_source(enc, template) == ids_source(judge_enc, judge_template):
        return ids
    ended = enc is None or tokenizer.is_end(enc, ids[-1])
    encoded = written_ids(judge_enc, judge_template, text, ended=ended)
    return encoded + [judge_enc.eot_token] if ended or not encoded else encoded


def validation_rows(folder: str, n: int, prompt_only: bool = False) -> list[dict]:
    """The same n validation rows for every run and seed. prompt_only: see `read_rows`."""
    rows = read_rows(f"{folder}/val.jsonl", prompt_only)
    return [rows[i] for i in permutation(len(rows), 0, 0)[:n]]


# ------------------------------------------------------------------------------ command line


@dataclass
class Samples:
    """What a player answered: {number of the row: (text, ids)}, and what made the ids."""

    answers: dict
    enc: object = None  # None: the data, whose texts have no ids
    template: str = ""


def rows_for_all(entries: dict[str, Entry], rows: list[dict]) -> list[dict]:
    """The rows that every checkpoint can take. Says how many are left out, and by which."""
    left_out = {}
    fits_all = [True] * len(rows)
    for name, entry in entries.items():
        encoded, counts = encode_rows(rows, entry.enc, **entry.limits)
        block_size = entry.limits["block_size"]
        if counts["dropped"] == len(rows):
            limit = entry.limits["max_prompt"]
            limit = f"max_prompt {limit}" if limit else f"block_size {block_size}"
            raise SystemExit(
                f"{entry.path}: its {limit} leaves no room after any of {len(rows)} prompts"
            )
        if counts["dropped"]:
            left_out[f"{name} (block_size {block_size})"] = counts["dropped"]
        for i, row in enumerate(encoded):
            fits_all[i] = fits_all[i] and row is not None
    kept = [row for row, fits in zip(rows, fits_all) if fits]
    if left_out:
        which = ", ".join(f"{n} have no room in {name}" for name, n in left_out.items())
        print(f"{len(kept)} of {len(rows)} rows are measured: {which}")
    if not kept:
        raise SystemExit(f"no row is left that all of {', '.join(entries)} can take")
    return kept


def evaluate_checkpoint(
    name: str, entry: Entry, seed: int, rows, args, reference: GPT | None
) -> tuple[dict, Samples]:
    """(metrics, samples) of a checkpoint on held-out rows, which it can take."""
    device, enc = args.device, entry.enc
    model, _, meta = GPT.from_checkpoint(entry.path, device, args.dtype)
    encoded, counts = encode_rows(rows, enc, **entry.limits)
    entry.counts["prompts_cut"] = counts["prompts cut"]
    entry.counts["responses_cut"] = counts["responses cut"]
    if counts["prompts cut"] or counts["responses cut"]:
        print(
            f"{name}: {counts['prompts cut']} prompts and {counts['responses cut']} responses of"
            f" {len(rows)} rows are cut to its limits, and measured as far as they go",
            flush=True,
        )
    if EDITED in counts:
        print(f"{name}: {counts[EDITED]} {EDITED}", flush=True)
    if meta["config"]["stage"] == "reward":
        entry.counts["equal_responses"] = drop_all_equal(name, encoded)
        if not any(is_ranked(row) for row in encoded):
            raise SystemExit(
                f"{entry.path} is a reward model, and no row has two responses to rank"
            )
        scores = row_scores(model, encoded, EVAL_TOKENS, device, f"{name}: scoring")
        return reward_metrics(scores, encoded), Samples({}, enc)

    best = [row | {"responses": row["responses"][:1]} for row in encoded]
    metrics = loss_metrics(row_logps(model, best, EVAL_TOKENS, device, f"{name}: scoring"), best)
    metrics |= harness_metrics(model, enc, entry.limits["template"], rows, encoded, device)
    if reference is not None:
        metrics |= reference_metrics(name, entry, model, encoded, args, reference)

    limits = {name: entry.limits[name] for name in ("template", "max_prompt", "max_response")}
    count = args.samples if entry.temperature else 1  # greedy samples are all the same
    repeated = np.repeat(np.arange(len(rows)), count).tolist()
    with ProgressBar(total=len(repeated), desc=f"{name}: sampling") as progress:
        texts, ids = respond(
            model,
            enc,
            rows=[rows[i] for i in repeated],
            seed=seed,
            temperature=entry.temperature,
            progress=progress,
            **limits,
        )
    answered = [n for n, y in enumerate(ids) if y is not None]  # whole texts have no prompt
    if not answered:
        return metrics, Samples({}, enc)
    of_rows = [rows[repeated[n]] for n in answered]
    its_texts = [texts[n] for n in answered]
    metrics |= sample_metrics(
        its_texts,
        [ids[n] for n in answered],
        [row["responses"][0] for row in of_rows],
        [tokenizer.is_end(enc, ids[n][-1]) for n in answered],
        count,
        function_scores(args.scorer, of_rows, its_texts) if args.scorer else None,
    )
    if reference is not None and entry.temperature == 1:  # these are samples of pi itself
        sampled = [encoded[repeated[n]] | {"responses": [ids[n]], "ranks": [0]} for n in answered]
        metrics |= sampled_kl(name, model, reference, sampled, device)
    first = answered[::count]  # the first sample of each row is judged and written
    return metrics, Samples(
        {repeated[n]: (texts[n], ids[n]) for n in first}, enc, entry.limits["template"]
    )


def sampled_kl(name: str, model, reference, rows: list[dict], device) -> dict[str, float]:
    """{"kl": KL(pi || pi_ref)} in nats per response, from pi's own samples: the mean of log pi(y|x)
    - log pi_ref(y|x). rows: encoded, each with one sample.

    {} and a line if pi_ref cannot take one of the samples: to leave out the long ones would be
    another mean.
    """
    block_size = reference.config.block_size
    too_long = [row for row in rows if num_tokens(row) > block_size]
    if too_long:
        print(
            f"{name}: no kl, because {len(too_long)} of {len(rows)} samples are longer than the"
            f" block_size of --reference, {block_size}"
        )
        return {}
    logps = row_logps(model, rows, EVAL_TOKENS, device)
    return {"kl": float((logps - row_logps(reference, rows, EVAL_TOKENS, device)).mean())}


def num_tokens(row: dict) -> int:
    """The length of an encoded row's prompt with its longest response."""
    return len(row["prompt"]) + max(len(y or []) for y in row["responses"])


def drop_all_equal(name: str, encoded: list[dict]) -> int:
    """Make responses absent that equal a better one, as in training, and say how many."""
    num_equal = sum(map(drop_equal_responses, encoded))
    if num_equal:
        print(f"{name}: {num_equal} responses equal to a better one are not ranked")
    return num_equal


def is_ranked(row: dict) -> bool:
    """Whether an encoded row has two responses of different ranks."""
    ranks = set()
    for rank, response in zip(row["ranks"], row["responses"]):
        if response is not None:
            ranks.add(rank)
    return len(ranks) >= 2


def reference_metrics(
    name: str, entry: Entry, model, rows, args, reference: GPT
) -> dict[str, float]:
    """Ranking metrics of the data's own responses, with implicit rewards against --reference."""
    K = max(len(row["responses"]) for row in rows)
    rows = pad_rows_to_K(rows, K)
    entry.counts["equal_responses"] = drop_all_equal(name, rows)
    longest = max(map(num_tokens, rows))
    if longest > reference.config.block_size:
        raise SystemExit(
            f"--reference {args.reference}: its block_size {reference.config.block_size} is too"
            f" short for the rows of {name}, of up to {longest} tokens"
        )
    logps = row_logps(model, rows, EVAL_TOKENS, args.device)
    refs = row_logps(reference, rows, EVAL_TOKENS, args.device)
    return ranking_metrics(logps, refs, rows, args.beta, [str(k + 1) for k in range(K)])


def judged_pairs(judge, judge_enc, config, rows, first: Samples, second: Samples):
    """(encoded rows of two responses, counts) for the prompts that both players answered. Rows that
    leave the judge no room are dropped and counted, and so are thoughts that its template does not
    have. config: the judge's settings."""
    template = config["template"]
    source = ids_source(judge_enc, template)
    pairs = []
    num_without_thoughts = 0
    for i, row in enumerate(rows):
        if i in first.answers and i in second.answers:
            responses, all_ids = [], []
            for player in (first, second):
                answer, ids = player.answers[i]
                is_own = player.enc and ids_source(player.enc, player.template) == source
                text = answer if is_own else without_thoughts(template, answer)
                num_without_thoughts += text != answer
                if player.enc is None:
                    best = row | {"responses": [text, *row["responses"][1:]]}
                    if text != answer:
                        best["ids"] = None  # they are of the thoughts too
                    ids = response_ids(best, 0, judge_enc, template)
                else:
                    ids = retokenize(judge_enc, template, player.enc, player.template, text, ids)
                responses.append(text)
                all_ids.append(ids)
            pairs.append(row_with_ids(row, responses, all_ids, judge_enc, template))
    encoded, counts = encode_rows(
        pairs,
        judge_enc,
        template,
        judge.config.block_size,
        config["max_prompt"],
        config["max_response"],
    )
    counts["without thoughts"] = num_without_thoughts
    return [row for row in encoded if row is not None], counts


def judge_all(
    args, judge, judge_enc, config, rows, samples: dict[str, Samples], first: str
) -> dict[str, dict]:
    """Win rates under --judge of every player against the first checkpoint -> {player: metrics}.
    config: the judge's settings."""
    results = {}
    for name, player in samples.items():
        if name == first:
            continue
        pairs, counts = judged_pairs(judge, judge_enc, config, rows, player, samples[first])
        if not pairs:
            raise SystemExit(
                f"{args.judge}: no prompt was answered by both {name} and {first} and leaves the "
                "judge room"
            )
        share, error = win_rate(judge, pairs, args.device)
        results[name] = {
            "win_rate": share,
            "win_rate_se": error,
            "against": first,
            "judged": len(pairs),
            "judge_prompts_cut": counts["prompts cut"],
            "judge_responses_cut": counts["responses cut"],
        }
        note = ""
        if counts["dropped"]:
            note = f"; {counts['dropped']} leave the judge no room"
        for what in ("prompts", "responses"):
            if counts[f"{what} cut"]:
                note += f"; {counts[f'{what} cut']} {what} are cut to the judge's limits"
        if counts["without thoughts"]:
            note += f"; {counts['without thoughts']} responses are judged without their thoughts"
        print(
            f"{name} beats {first} in {100 * share:.1f} +- {100 * error:.1f} % "
            f"of {len(pairs)} prompts{note}"
        )
    return results


def check_arguments(args, rows_path: str, entries: dict[str, Entry]):
    """Exit with one line if something cannot work, before anything is computed. --judge and
    --reference become the checkpoints that they are now: a run may go on and have newer ones."""
    for name in ("judge", "reference"):
        if getattr(args, name):
            setattr(args, name, checkpoint.resolve(getattr(args, name)))
    if args.reference and is_reward_model(args.reference):
        raise SystemExit(f"--reference {args.reference} is a reward model, not a policy")
    if args.scorer:
        import_function(args.scorer)
    check_out(args, rows_path, entries)
    for name, entry in entries.items():
        samples_nothing = entry.meta["config"]["stage"] == "reward"
        if args.judge and samples_nothing:
            raise SystemExit(f"{name}: a reward model has no samples to judge; give it as --judge")
        if args.reference and not samples_nothing:
            check_same_tokenizer(name, entry.enc, args.reference)


def check_out(args, rows_path: str, entries: dict[str, Entry]):
    """Exit with one line if --out has what this command would replace and does not measure."""
    settings = eval_command.settings_of(args)
    if args.out and eval_command.is_table(args.out):
        eval_command.check_table(args.out, rows_path, entries, settings)
    elif args.out:
        eval_command.check_folder(args.out, rows_path, entries, settings)


def check_judge(judge: str, rows: list[dict], rows_path: str):
    """Exit with one line if the judge cannot take these rows."""
    template = checkpoint.read_meta(checkpoint.resolve(judge))["config"]["template"]
    if not all(row["prompt"] for row in rows):
        raise SystemExit(f"{rows_path}: rows that are whole texts have no prompts to judge")
    if any(row.get("system") for row in rows) and split_template(template).system is None:
        raise SystemExit(
            f"{rows_path} has system messages, and the template of --judge {judge} has no"
            " {system}"
        )


def is_reward_model(path: str) -> bool:
    return checkpoint.read_meta(checkpoint.resolve(path))["config"]["stage"] == "reward"


def check_same_tokenizer(name: str, enc, reference: str):
    """Implicit rewards compare two models on the same ids, so these must mean the same to both."""
    path = checkpoint.resolve(reference)
    other = checkpoint.read_tokenizer(path, checkpoint.read_meta(path))
    if tokenizer.fingerprint(enc) != tokenizer.fingerprint(other):
        raise SystemExit(
            f"{name} and --reference {reference} have different tokenizers: log-probabilities of"
            " the same ids cannot be compared; give a reference of the same tokenizer"
        )


def write_logps(args, rows_path: str, entries: dict[str, Entry]):
    """A line for each checkpoint and row, see `logps_lines`, to --out or standard output."""
    for name, entry in entries.items():
        if entry.meta["config"]["stage"] == "reward":
            raise SystemExit(f"{name} is a reward model: it has no log-probabilities")
    for option in ("judge", "reference", "scorer"):
        if getattr(args, option):
            raise SystemExit(f"--logps only scores the data: it has no use for --{option}")
    if args.out and not args.out.endswith(".jsonl"):
        raise SystemExit(f"--out {args.out}: with --logps give a .jsonl file")
    if args.out:
        check_output(args.out, [rows_path])
    rows = read_rows(rows_path)[: args.rows]
    lines = []
    for name, entry in entries.items():
        lines += logps_lines(name, entry, rows, args.device, args.dtype)
    if args.out:
        write_rows(args.out, lines)
        print(f"{args.out}: {len(lines)} lines")
    else:
        for line in lines:
            print(json.dumps(line))


def logps_lines(name: str, entry: Entry, rows: list[dict], device, dtype) -> list[dict]:
    """{"checkpoint": name, "row": place in the file, "logps": [...], "tokens": [...]} of each row.

    logps: log pi(y_k|x) of each response, the sum over its tokens and end-of-text, which are
    counted in `tokens`. As in training: the same template, limits and batches. null and 0 where a
    response is absent, or its prompt leaves no room.
    """
    model, enc, _ = GPT.from_checkpoint(entry.path, device, dtype)
    encoded, counts = encode_rows(rows, enc, **entry.limits)
    print(f"{name}: " + ", ".join(f"{n} {what}" for what, n in counts.items()), file=sys.stderr)
    kept = [row for row in encoded if row is not None]
    logps = row_logps(model, kept, EVAL_TOKENS, device, f"{name}: scoring") if kept else []
    lines = []
    scored = iter(logps)
    for i, (row, its_ids) in enumerate(zip(rows, encoded)):
        line = {"checkpoint": name, "row": i, "logps": [None] * len(row["responses"])}
        line["tokens"] = [0] * len(row["responses"])
        if its_ids is not None:
            its_logps = next(scored)
            for k, response in enumerate(its_ids["responses"]):
                if response is not None:
                    line["logps"][k] = float(its_logps[k])
                    line["tokens"][k] = num_supervised(its_ids["prompt"], response)
        lines.append(line)
    return lines


def main(argv=None):
    parser = eval_command.make_parser(__doc__)
    args = parser.parse_args(argv)
    distributed.configure_torch(args.device)
    entries = {}
    for name, (path, temperature) in eval_command.parse_checkpoints(args.checkpoints).items():
        entries[name] = eval_command.read_entry(name, path, temperature, args)
    rows_path = eval_command.find_rows(args, [entry.meta for entry in entries.values()])
    if args.logps:
        return write_logps(args, rows_path, entries)
    check_arguments(args, rows_path, entries)
    all_rows = read_rows(rows_path)
    chosen = permutation(len(all_rows), 0, 0)[: args.rows or eval_command.ROWS]
    print(f"{rows_path}: {len(chosen)} of {len(all_rows)} rows", flush=True)
    all_rows = [all_rows[i] for i in chosen]
    if args.judge:
        check_judge(args.judge, all_rows, rows_path)
    rows = rows_for_all(entries, all_rows)
    eval_command.say_trained_on(entries, rows)

    # both are loaded at once: a run that goes on may remove its older checkpoints meanwhile
    reference = judge = None
    if args.reference:
        reference, _, _ = GPT.from_checkpoint(args.reference, args.device, args.dtype)
    if args.judge:
        judge = GPT.from_checkpoint(args.judge, args.device, args.dtype)
    table = {}
    with_prompt = [i for i, row in enumerate(rows) if row["prompt"]]
    samples = {"data": Samples({i: (rows[i]["responses"][0], None) for i in with_prompt})}
    for n, (name, entry) in enumerate(entries.items()):
        seed = args.seed + n
        metrics, samples[name] = evaluate_checkpoint(name, entry, seed, rows, args, reference)
        table[name] = {
            "checkpoint": entry.path,
            "weights_sha256": entry.meta["weights_sha256"],
            "temperature": entry.temperature,
            "data": rows_path,
            "settings": eval_command.settings_of(args),
            "max_prompt": entry.limits["max_prompt"],
            "max_response": entry.limits["max_response"],
            "rows": len(rows),
            "left_out": len(all_rows) - len(rows),
            **entry.counts,
            **metrics,
        }
        shown = [f"{metric} {value:.4f}" for metric, value in metrics.items()]
        print(f"{name}: " + ", ".join(shown), flush=True)
    if judge is not None:
        model, enc, meta = judge
        first = next(iter(entries))
        win_rates = judge_all(args, model, enc, meta["config"], rows, samples, first)
        for name, metrics in win_rates.items():
            table[name] = table.get(name, {}) | metrics
    check_out(args, rows_path, entries)  # another command may have written there since the start
    if args.out and eval_command.is_table(args.out):
        write_json(args.out, table)
    elif args.out:
        answered = {name: player for name, player in samples.items() if player.answers}
        eval_command.name_players(args.out, list(answered))
        for name, player in answered.items():
            path = os.path.join(args.out, f"{name}.jsonl")
            eval_command.write_samples(path, rows, player.answers, player.enc, player.template)
        write_json(os.path.join(args.out, "eval.json"), table)


if __name__ == "__main__":
    sys.exit(cli.run(main))
