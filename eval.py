"""Validation loss, ranking accuracy, bits per byte, multiple choice, exact match, win rate; also a command line.

    python eval.py sft=out/demo/sft                                                   # validation loss, a sample's figures
    python eval.py sft=out/demo/sft spin=out/demo/spin_k2 --judge=out/demo/sft_teacher    # and win rate against the first
    python eval.py sft=out/demo/sft sft_cold=out/demo/sft@0.5 --out=eval.json         # @ is the sampling temperature
    python eval.py rm=out/reward --data=data/ranked                                   # a reward model's accuracy; as --judge it scores
    python eval.py report out/demo/spin_k2 --out=report.html                          # a page of a run

Everything is measured on the same held-out rows, sampled under the checkpoint's own template and limits.
"""

import argparse
import bisect
import math
import os
import re
import sys
from collections import Counter

import numpy as np
import torch
from tqdm import tqdm

from nanospin import checkpoint
from nanospin import distributed
from data.batch import (
    INPUTS,
    batch_rows,
    permutation,
    reward_batch,
    count_row_tokens,
    split_by_tokens,
    stream_batch,
)
from data.rows import prompt_key, encode_rows, prompt_fields, read_rows, write_rows
from data.files import printable, write_json
from data import tokenizer
from loss import chosen_rejected_metrics, plackett_luce, sequence_logprobs
from sample import device_type, number_type, respond


@torch.no_grad()
def stream_loss(model, tokens, cfg, device, eot=None):
    """Mean cross-entropy a token over `eval_batches` batches of the validation stream, the same ones for every run."""
    was_training = model.training
    model.eval()
    nll, count, length = torch.zeros((), dtype=torch.float64), 0, model.config.block_size
    parts = stream_micro_batches(cfg, length, device)
    for step in range(cfg.eval_batches):
        for part in parts:
            batch = stream_batch(
                tokens, length, cfg.batch_size, 0, step, model.config.vocab_size, part, eot
            )
            nll -= forward_batch(model, batch, device)[0].double().sum().cpu()
            count += batch["targets"].numel()
    distributed.reshard(model)
    model.train(was_training)
    nll, count = distributed.all_reduce_sum([nll, count], device)
    return nll / count


def stream_micro_batches(cfg, length, device):
    """This rank's micro-batches of a batch of windows, as slices of it; every rank has as many."""
    share, size = (
        cfg.batch_size // distributed.world_size(),
        max(1, distributed.micro_batch_tokens(cfg, device) // length),
    )
    first, end = distributed.rank() * share, (distributed.rank() + 1) * share
    return [slice(start, min(start + size, end)) for start in range(first, end, size)]


def forward_batch(model, batch, device, whole=False):
    """(logps of a batch's targets, the batch on the device); whole: all logits at those places, (..., V)."""
    batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
    return model(
        **{
            name: batch[name]
            for name in INPUTS
            if name in batch and not (whole and name == "targets")
        }
    ), batch


@torch.no_grad()
def map_batches(model, rows, tokens, device, make, pick, desc=None, layout="packed", whole=False):
    """What `pick` takes of the model's output (whole: of all its logits), [one for each row], on every rank; about `tokens` tokens
    at a time. make(rows, layout) -> batch; pick(output, batch) -> [one for each of its rows]."""
    was_training = model.training
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: count_row_tokens(rows[i], layout))
    sizes = [count_row_tokens(rows[i], layout) for i in order]
    parts = split_by_tokens(sizes, min(len(rows), -(-sum(sizes) // tokens)))
    results = {}
    for part in tqdm(
        list(distributed.batches_of_rank(parts)),
        desc=desc,
        disable=None if desc and distributed.rank() == 0 else True,
    ):
        indices = [order[i] for i in part]
        results.update(
            zip(
                indices,
                pick(
                    *forward_batch(model, make([rows[i] for i in indices], layout), device, whole)
                ),
            )
        )
    distributed.reshard(model)
    model.train(was_training)
    return distributed.merge_results(len(rows), results)


def response_logprobs(model, rows, tokens, device, desc=None, layout="packed"):
    """log pi(y_k|x) of every response of encoded rows -> float32 array (rows, K), 0 where absent; on every rank.
    Policy and reference both go through here."""

    def pick(logps, batch):
        B, k = batch["present"].shape
        return sequence_logprobs(logps, batch["seq"], B * k).view(B, k).cpu().numpy()

    return pad_and_stack(map_batches(model, rows, tokens, device, batch_rows, pick, desc, layout))


def reward_scores(model, rows, tokens, device, desc=None, layout="packed"):
    """A reward model's score of every response of encoded rows -> float32 array (rows, K), 0 where absent; on every rank."""

    def pick(scores, batch):
        B, k = batch["present"].shape
        return scores.new_zeros(B * k).index_put((batch["slot"],), scores).view(B, k).cpu().numpy()

    return pad_and_stack(map_batches(model, rows, tokens, device, reward_batch, pick, desc, layout))


def pad_and_stack(rows):
    """Arrays of at most K numbers as one (rows, K), 0 where one has fewer."""
    K = max(map(len, rows))
    return np.stack([np.pad(row, (0, K - len(row))) for row in rows])


def loss_metrics(logps, rows):
    """Cross-entropy a token on each row's best response, from `score`: whatever was trained, this is comparable."""
    lengths = np.array([len(r["responses"][0]) for r in rows])
    return {"val_loss": float(-logps[:, 0].sum() / lengths.sum())}


def ranking_metrics(logps, refs, rows, beta, names):
    """What a round reports of its held-out rows. logps, refs (rows, K) from `score`; names: the K players.

    rank_nll       Plackett-Luce on the implicit rewards; acc, acc_se: every ordered pair, see `pair_accuracy`
    acc/NAME       share of rows in which that response is above all worse ones
    reward/NAME    mean implicit reward; logp/NAME mean log-probability of the response under the policy
    margin, reward_chosen ...   of the rows in which something is ranked: loss.best_and_others
    kl_from_ref    KL(pi_ref || pi_theta) a token, the Monte-Carlo mean of log pi_ref - log pi_theta over what the
                   reference sampled (player "self"); without such a player it is left out
    """
    present = np.array([[r is not None for r in row["responses"]] for row in rows])
    lengths = np.array([[len(r or []) for r in row["responses"]] for row in rows])
    ranks = np.array([row["ranks"] for row in rows])
    rewards = beta * (logps - refs)
    metrics = loss_metrics(logps, rows)
    ranked = present.sum(1) >= 2
    if ranked.any():
        scores, policy, there = (torch.from_numpy(a[ranked]) for a in (rewards, logps, present))
        nll = plackett_luce(scores, there, ranks=torch.from_numpy(ranks[ranked]))
        above = (
            (ranks[:, :, None] < ranks[:, None, :]) & present[:, :, None] & present[:, None, :]
        )  # k should beat j
        right, acc, error = pair_accuracy(rewards, above)
        metrics |= {"rank_nll": float(nll.mean()), "acc": acc, "acc_se": error} | {
            name: float(value)
            for name, value in chosen_rejected_metrics(scores, policy, there).items()
        }
        for k, name in enumerate(names[:-1]):
            prompt_key = above[:, k].any(-1)
            if prompt_key.any():
                metrics[f"acc/{name}"] = float(
                    (right[:, k] == above[:, k]).all(-1)[prompt_key].mean()
                )  # a tie is not above
    for k, name in enumerate(names):
        if present[:, k].any():
            metrics[f"reward/{name}"] = float(rewards[:, k][present[:, k]].mean())
            metrics[f"logp/{name}"] = float(logps[:, k][present[:, k]].mean())
    if "self" in names:
        k = names.index("self")
        if present[:, k].any():
            metrics["kl_from_ref"] = float(
                (refs - logps)[:, k][present[:, k]].sum() / lengths[:, k][present[:, k]].sum()
            )
    return metrics


def pair_accuracy(scores, pairs):
    """How often the first of a pair has the higher score, a tie half. scores (rows, K); pairs (rows, K, K), which (i, j) are asked
    -> (right (rows, K, K), the share over all pairs, its standard error with rows as the independent units)."""
    lead = scores[:, :, None].astype(np.float64) - scores[:, None, :]
    right = pairs * ((lead > 0) + 0.5 * (lead == 0))
    wins, n = right.sum((1, 2)), pairs.sum((1, 2))
    share = wins.sum() / max(1, n.sum())
    # a ratio of sums over rows: its error is that of the rows' residuals
    return right, float(share), float(np.sqrt(((wins - share * n) ** 2).sum()) / max(1, n.sum()))


def reward_metrics(scores, rows):
    """A reward model's held-out figures. scores (rows, K) from `reward_scores`, 0 where absent.

    pair_nll     mean over rows of its pairs' mean -log sigmoid(s_i - s_j); ln 2 = 0.6931 of equal scores
    acc          share of ordered pairs that are right, a tie half; acc_se: standard error, with rows as the independent units
    length_acc   the same of length in tokens alone, as the limits leave it: what a reward that knows nothing else gets
    acc@d, pairs@d   of pairs d ranks apart (ranks count distinct places: the best and the next best are 1 apart)
    score, score_std  of all responses
    """
    K = scores.shape[1]
    present = np.array(
        [
            [y is not None for y in row["responses"]] + [False] * (K - len(row["responses"]))
            for row in rows
        ]
    )
    taken = [
        sorted({r for r, y in zip(row["ranks"], row["responses"]) if y is not None}) for row in rows
    ]
    place = np.array(
        [
            [bisect.bisect_left(some, r) for r in row["ranks"]] + [K] * (K - len(row["ranks"]))
            for some, row in zip(taken, rows)
        ]
    )
    apart = np.where(
        present[:, :, None] & present[:, None, :], place[:, None, :] - place[:, :, None], 0
    )  # (rows, i, j)
    lead = scores[:, :, None].astype(np.float64) - scores[:, None, :]
    pairs = apart > 0
    n = pairs.sum((1, 2))
    nll = (np.logaddexp(0, -lead) * pairs).sum((1, 2))[n > 0] / n[n > 0]
    right, acc, error = pair_accuracy(scores, pairs)
    lengths = np.array(
        [
            [len(y or []) for y in row["responses"]] + [0] * (K - len(row["responses"]))
            for row in rows
        ]
    )
    metrics = {
        "pair_nll": float(nll.mean()),
        "acc": acc,
        "acc_se": error,
        "length_acc": pair_accuracy(lengths, pairs)[1],
    }
    for d in range(1, int(apart.max()) + 1):
        if (apart == d).any():
            metrics |= {
                f"acc@{d}": float(right[apart == d].mean()),
                f"pairs@{d}": int((apart == d).sum()),
            }
    return metrics | {
        "score": float(scores[present].mean()),
        "score_std": float(scores[present].std()),
    }


def extract_answer(text):
    """What exact match compares: the number after "####" (GSM8K), or the whole text."""
    found = re.findall(r"####\s*(-?[\d.,]+)", text)
    return found[-1].replace(",", "").rstrip(".") if found else text.strip()


def sample_metrics(texts, ids, references, eot):
    """Of sampled responses: share ended by eot, mean length in tokens, exact match with the references (texts)."""
    return {
        "ended": float(np.mean([i[-1] == eot for i in ids])),
        "length": float(np.mean([len(i) for i in ids])),
        "exact_match": float(
            np.mean([extract_answer(t) == extract_answer(r) for t, r in zip(texts, references)])
        ),
        "f1": float(np.mean([f1_score(t, r) for t, r in zip(texts, references)])),
    }


def f1_score(text, reference):
    """F1 of the two bags of words, as SQuAD measures answers (arXiv 1606.05250)."""
    a, b = Counter(text.lower().split()), Counter(reference.lower().split())
    common = (a & b).total()
    return 2 * common / max(1, a.total() + b.total())


def length_accuracy(data, other):
    """How well length alone tells the data's responses from others', the better of its two directions; a tie is a coin.
    data, other: lengths in tokens."""
    longer = np.mean((np.array(data) > other) + 0.5 * (np.array(data) == other))
    return float(max(longer, 1 - longer))


def rolling_windows(ids, first, length):
    """A whole text's ids as rows that ask for each of them once and read at most `length`: `first` stands before the first of them,
    one id before a next row's, before the last row's as many as fit. So lm-evaluation-harness cuts it (rolling)."""
    ids, n = [first, *ids], len(ids)
    return [
        {
            "prompt": ids[max(0, min(s + length, n) - length) : s + 1],
            "responses": [ids[s + 1 : s + length + 1]],
            "ranks": [0],
        }
        for s in range(0, n, length)
    ]


def harness_metrics(model, enc, rows, encoded, device):
    """What lm-evaluation-harness says of an export, on the same rows: the policy alone, no reference, and of each response what follows
    the prompt *without* end-of-text. encoded: from `encode_rows`, None where dropped. Rows with an empty response are left out.

    bits_per_byte     nats of the best responses / ln 2 / their UTF-8 bytes, as far as the limits leave them; a whole text is asked for whole,
                      in `windows` of block_size, its first token after an end-of-text (or the tokenizer's own beginning of a text)
    choice_acc        of rows with several responses: how often the best has the highest log-probability; of equal ones the first counts (acc)
    choice_acc_bytes  the same of log-probabilities a UTF-8 byte (acc_bytes; acc_norm takes them a character)

    The harness encodes prompt and response as one text and moves the prompt's last spaces to the response: the ids are the same where the
    template ends in no space and the response begins as a word of the tokenizer does, with a space.
    """
    scored, sizes = [], []
    for row, ids in zip(rows, encoded):
        if not row["prompt"]:
            first = tokenizer.specials(enc).get(
                tokenizer.begin(enc), enc.eot_token
            )  # an export's bos_token
            parts = rolling_windows(
                tokenizer.encode(enc, row["responses"][0]), first, model.config.block_size
            )
            scored += parts
            sizes += [[len(row["responses"][0].encode())]] + [[0]] * (len(parts) - 1)
        elif ids is not None:
            ended = [y is not None and y[-1] == enc.eot_token for y in ids["responses"]]
            bare = [y[:-1] if end else y for y, end in zip(ids["responses"], ended)]
            if [] not in bare:
                scored.append(ids | {"responses": bare})
                sizes.append(
                    [
                        0 if y is None else len((text if end else enc.decode(y)).encode())
                        for text, y, end in zip(row["responses"], bare, ended)
                    ]
                )
    if not scored:
        return {}
    logps, sizes = response_logprobs(model, scored, 8192, device), pad_and_stack(sizes)
    metrics = {
        "bits_per_byte": float(-logps[:, 0].sum(dtype=np.float64) / math.log(2) / sizes[:, 0].sum())
    }
    several = [
        i for i, row in enumerate(scored) if sum(y is not None for y in row["responses"]) > 1
    ]
    for name, each in (("choice_acc", logps), ("choice_acc_bytes", logps / np.maximum(sizes, 1))):
        if several:
            chosen = np.where(sizes > 0, each, -np.inf).argmax(1)
            metrics[name] = float(np.mean([scored[i]["ranks"][chosen[i]] == 0 for i in several]))
    return metrics


def win_rate(judge, pairs, device, tokens=8192):
    """Share of prompts on which the first response beats the second under a judge; equals count half. A reward model's higher
    score wins (its checkpoint has a scalar head), a language model's higher mean log-probability a token, end-of-text included.
    pairs: encoded rows of two responses. Returns (share, standard error)."""
    if judge.config.scalar:
        mean = reward_scores(judge, pairs, tokens, device)
    else:
        mean = response_logprobs(judge, pairs, tokens, device) / np.array(
            [[len(y) for y in row["responses"]] for row in pairs]
        )
    # equal responses are equal: in another place of a batch a product may round otherwise
    equal = np.array([row["responses"][0] == row["responses"][1] for row in pairs]) | (
        mean[:, 0] == mean[:, 1]
    )
    wins = np.where(equal, 0.5, mean[:, 0] > mean[:, 1])
    return float(wins.mean()), float(wins.std() / np.sqrt(len(wins)))


def validation_rows(folder, n):
    """The same n validation rows for every run and seed."""
    rows = read_rows(f"{folder}/val.jsonl")
    return [rows[i] for i in permutation(len(rows), 0, 0)[:n]]


def evaluate_checkpoint(path, temperature, seed, rows, args):
    """(figures, sampled rows, tokenizer) of one checkpoint on the held-out rows."""
    model, enc, meta = checkpoint.load_model(path, args.device)
    settings = {name: meta["config"][name] for name in ("template", "max_prompt", "max_response")}
    limits = (
        enc,
        settings["template"],
        model.config.block_size,
        settings["max_prompt"],
        settings["max_response"],
    )
    found = encode_rows(rows, *limits)[0]
    encoded = [row for row in found if row is not None]
    if not encoded:
        raise SystemExit(
            f"{path}: its block_size {model.config.block_size} leaves no room after any of {len(rows)} prompts"
        )
    if meta["config"]["stage"] == "reward":
        if all(
            len({r for r, y in zip(row["ranks"], row["responses"]) if y is not None}) < 2
            for row in encoded
        ):
            raise SystemExit(
                f"{path} is a reward model, and no row has two responses for it to rank"
            )
        return reward_metrics(reward_scores(model, encoded, 8192, args.device), encoded), {}, enc
    best = [row | {"responses": row["responses"][:1]} for row in encoded]
    figures = loss_metrics(
        response_logprobs(model, best, 8192, args.device), best
    ) | harness_metrics(model, enc, rows, found, args.device)
    if args.reference:
        K = max(len(row["responses"]) for row in encoded)
        full = [
            row
            | {
                "responses": row["responses"] + [None] * (K - len(row["responses"])),
                "ranks": row["ranks"] + [K] * (K - len(row["ranks"])),
            }
            for row in encoded
        ]
        ref, _, _ = checkpoint.load_model(args.reference, args.device)
        figures |= ranking_metrics(
            response_logprobs(model, full, 64, args.device),
            response_logprobs(ref, full, 64, args.device),
            full,
            args.beta,
            [str(k + 1) for k in range(K)],
        )
    texts, ids = respond(model, enc, rows=rows, seed=seed, temperature=temperature, **settings)
    there = [i for i, y in enumerate(ids) if y is not None]  # whole texts have no prompt to answer
    figures |= (
        {}
        if not there
        else sample_metrics(
            [texts[i] for i in there],
            [ids[i] for i in there],
            [rows[i]["responses"][0] for i in there],
            enc.eot_token,
        )
    )
    return figures, {prompt_key(rows[i]): (texts[i], ids[i]) for i in there}, enc


def retokenize(judge, enc, text, ids):
    """A response's ids for a judge: as they are if its tokenizer made them; else encoded, ended only if it had ended."""
    if enc is not None and tokenizer.fingerprint(enc) == tokenizer.fingerprint(judge):
        return ids
    return tokenizer.encode(judge, text, "within") + (
        [judge.eot_token] if enc is None or ids[-1] == enc.eot_token else []
    )


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["report"]:
        from tools import report

        return report.main(argv[1:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: sys.exit(printable(message))  # one line, without the usage
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="NAME=CHECKPOINT[@TEMPERATURE]",
        help="what it is called in the table, a run folder or a checkpoint in it, and the sampling temperature, else 1",
    )
    parser.add_argument(
        "--data", default="data/pydocs", help="the folder whose val.jsonl it is measured on"
    )
    parser.add_argument("--rows", type=number_type(int, 1), default=256, help="held-out rows")
    parser.add_argument(
        "--judge",
        help="checkpoint: win rate of everyone, and of the data, against the first one's samples",
    )
    parser.add_argument(
        "--reference",
        help="checkpoint: ranking figures of the data's own ranked responses, by implicit rewards against it",
    )
    parser.add_argument("--beta", type=number_type(float, 0), default=0.1, help="of those rewards")
    parser.add_argument("--out", help="folder for eval.json and each one's samples")
    parser.add_argument(
        "--seed",
        type=number_type(int, 0),
        default=0,
        help="of the sampling; the n-th checkpoint takes seed + n",
    )
    parser.add_argument(
        "--device",
        type=device_type,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda; else cuda if there is one",
    )
    args = parser.parse_args(argv)
    distributed.configure_torch(args.device)
    runs = {}
    for spec in args.checkpoints:
        found = re.fullmatch(r"([\w.@-]+)=(.+?)(?:@(\d+\.?\d*))?", spec)
        if not found or found[1] in runs or found[1] == "data":
            raise SystemExit(
                f"{spec!r}: a checkpoint is given as NAME=CHECKPOINT or NAME=CHECKPOINT@TEMPERATURE, each NAME once and none of them data"
            )
        runs[found[1]] = checkpoint.resolve(found[2]), float(found[3] or 1.0)
    for other in filter(None, (args.judge, args.reference)):
        checkpoint.resolve(other)
    try:
        os.makedirs(args.out or ".", exist_ok=True)
    except OSError as e:
        parser.error(f"--out {args.out}: {e.strerror}")
    no_policy = [
        name
        for name, (path, _) in runs.items()
        if args.judge and checkpoint.read_meta(path)["config"]["stage"] == "reward"
    ]
    if no_policy:
        raise SystemExit(
            f"{', '.join(no_policy)}: a reward model has no samples to judge; give it as --judge"
        )
    rows = validation_rows(args.data, args.rows)
    if args.judge and not all(row["prompt"] for row in rows):
        raise SystemExit(
            f"{args.data}: rows that are whole texts have no prompts; there is nothing to judge"
        )
    table, samples = (
        {},
        {"data": ({prompt_key(row): (row["responses"][0], None) for row in rows}, None)},
    )
    for n, (name, (path, temperature)) in enumerate(runs.items()):
        figures, *samples[name] = evaluate_checkpoint(path, temperature, args.seed + n, rows, args)
        table[name] = {"checkpoint": path, "temperature": temperature} | figures
        print(f"{name}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()), flush=True)
    if args.judge:
        judge, enc, meta = checkpoint.load_model(args.judge, args.device)
        first, *others = table
        settings = [meta["config"][name] for name in ("max_prompt", "max_response")]
        for name in ["data", *others]:
            both = [
                row
                for row in rows
                if all(prompt_key(row) in samples[who][0] for who in (name, first))
            ]
            answers = [
                [(samples[who][1], *samples[who][0][prompt_key(row)]) for who in (name, first)]
                for row in both
            ]
            pairs = [
                prompt_fields(row)
                | {
                    "responses": [text for _, text, _ in two],
                    "ids": [retokenize(enc, *one) for one in two],
                }
                for row, two in zip(both, answers)
            ]
            pairs = [
                p
                for p in encode_rows(
                    pairs, enc, meta["config"]["template"], judge.config.block_size, *settings
                )[0]
                if p is not None
            ]
            if not pairs:
                raise SystemExit(
                    f"{args.judge}: there is no prompt that {name} and {first} both answered and that leaves the judge room"
                )
            share, error = win_rate(judge, pairs, args.device)
            table.setdefault(name, {})
            table[name] |= {"win_rate": share, "win_rate_se": error, "against": first}
            print(
                f"{name} beats {first} in {100 * share:.1f} +- {100 * error:.1f} % of {len(pairs)} prompts"
            )
    if args.out:
        for name, (answers, _) in samples.items():
            if answers:
                write_rows(
                    os.path.join(args.out, f"{name}.jsonl"),
                    [
                        prompt_fields(row) | {"responses": [answers[prompt_key(row)][0]]}
                        for row in rows
                        if prompt_key(row) in answers
                    ],
                )
        write_json(os.path.join(args.out, "eval.json"), table)


if __name__ == "__main__":
    main()
