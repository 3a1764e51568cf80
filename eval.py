"""Validation loss, ranking accuracy, exact match, win rate; also a command line.

    python eval.py loss out/demo/sft --data=data/pydocs                     # and a sample's figures
    python eval.py winrate out/demo/spin_k2 out/demo/sft --judge=out/demo/sft_teacher --data=data/pydocs

Figures are means over rows (or tokens), each row on its own, so that neither batch nor ranks change them.
"""
import argparse
import json
import re

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import parallel
from data import batch_indices, encode_rows, pad_rows, permutation, read_rows, stream_batch
from loss import plackett_luce, sequence_logprobs
from sample import respond


@torch.no_grad()
def stream_loss(model, tokens, cfg, device, batches):
    """Mean cross-entropy a token over the first batches of a seeded order of the validation stream."""
    was_training = model.training
    model.eval()
    block, vocab = model.config.block_size, model.config.vocab_size
    ours = slice(parallel.rank(), None, parallel.world())
    batch_size = max(parallel.world(), cfg.batch_size // parallel.world() * parallel.world())
    sums = []
    for i in range(batches):
        batch = stream_batch(tokens, block, batch_size, 0, i, vocab, ours)
        logps = model(batch["idx"].to(device), batch["targets"].to(device))
        sums += [-logps.double().sum(), torch.tensor(logps.numel())]
    nll, count = parallel.total([sum(sums[0::2]), sum(sums[1::2])], device)
    model.train(was_training)
    return nll / count


@torch.no_grad()
def score(model, rows, batch_size, device, desc=None):
    """log pi(y_k|x) of every response of encoded rows -> float32 array (rows, K), 0 where absent; on every rank.
    Policy and reference both go through here. Rows of like length share a batch."""
    was_training = model.training
    model.eval()
    K = max(len(r["responses"]) for r in rows)
    order = sorted(range(len(rows)), key=lambda i: max(len(rows[i]["prompt"]) + len(r or []) for r in rows[i]["responses"]))
    results = {}
    for indices in tqdm(list(parallel.shard(order, batch_size)), desc=desc, disable=None if desc and parallel.rank() == 0 else True):
        batch = {k: v.to(device) for k, v in pad_rows([rows[i] for i in indices]).items()}
        B, k = batch["present"].shape
        logps = sequence_logprobs(model(batch["idx"], batch["targets"]), batch["seq"], B * k).view(B, k).cpu().numpy()
        results.update({i: np.pad(row, (0, K - k)) for i, row in zip(indices, logps)})
    model.train(was_training)
    return np.stack(parallel.merge(len(rows), results))


def loss_metrics(logps, rows):
    """Cross-entropy a token on each row's best response, from `score`: whatever was trained, this is comparable."""
    lengths = np.array([len(r["responses"][0]) for r in rows])
    return {"val_loss": float(-logps[:, 0].sum() / lengths.sum())}


def ranking_metrics(logps, refs, rows, beta, names):
    """What a round reports of its held-out rows. logps, refs (rows, K) from `score`; names: the K players.

    rank_nll       Plackett-Luce on the implicit rewards; acc: every ordered pair; acc/NAME: that response above all worse
    reward/NAME    mean implicit reward; logp/NAME mean log-probability of the response under the policy
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
        nll = plackett_luce(*(torch.from_numpy(a[ranked]) for a in (rewards, present)), ranks=torch.from_numpy(ranks[ranked]))
        above = (ranks[:, :, None] < ranks[:, None, :]) & present[:, :, None] & present[:, None, :]   # k should beat j
        right = above & (rewards[:, :, None] > rewards[:, None, :])
        metrics |= {"rank_nll": float(nll.mean()), "acc": float(right.sum() / max(1, above.sum()))}
        for k, name in enumerate(names[:-1]):
            asked = above[:, k].any(-1)
            if asked.any():
                metrics[f"acc/{name}"] = float((right[:, k] == above[:, k]).all(-1)[asked].mean())
    for k, name in enumerate(names):
        if present[:, k].any():
            metrics[f"reward/{name}"] = float(rewards[:, k][present[:, k]].mean())
            metrics[f"logp/{name}"] = float(logps[:, k][present[:, k]].mean())
    if "self" in names:
        k = names.index("self")
        if present[:, k].any():
            metrics["kl_from_ref"] = float((refs - logps)[:, k][present[:, k]].sum() / lengths[:, k][present[:, k]].sum())
    return metrics


def answer(text):
    """What exact match compares: the number after "####" (GSM8K), or the whole text."""
    found = re.findall(r"####\s*(-?[\d.,]+)", text)
    return found[-1].replace(",", "").rstrip(".") if found else text.strip()


def sample_metrics(texts, ids, references, eot):
    """Of sampled responses: share ended by eot, mean length in tokens, exact match with the references (texts)."""
    return {"ended": float(np.mean([i[-1] == eot for i in ids])),
            "length": float(np.mean([len(i) for i in ids])),
            "exact_match": float(np.mean([answer(t) == answer(r) for t, r in zip(texts, references)]))}


def length_accuracy(data, other):
    """How well length alone tells the data's responses from others', the better of its two directions; a tie is a coin.
    data, other: lengths in tokens."""
    longer = np.mean((np.array(data) > other) + 0.5 * (np.array(data) == other))
    return float(max(longer, 1 - longer))


def win_rate(judge, prompts, a, b, batch_size, device):
    """Share of prompts on which response a beats b under a judge, a language model: the higher mean log-probability a
    token, end-of-text included, wins; equals count half. All ids (lists). Returns (share, standard error)."""
    rows = [{"prompt": p, "responses": [x, y], "ranks": [0, 1]} for p, x, y in zip(prompts, a, b)]
    mean = score(judge, rows, batch_size, device) / np.array([[len(x), len(y)] for x, y in zip(a, b)])
    wins = (mean[:, 0] > mean[:, 1]) + 0.5 * (mean[:, 0] == mean[:, 1])
    return float(wins.mean()), float(wins.std() / np.sqrt(len(wins)))


def held_out(folder, n):
    """The same n validation rows for every run and seed."""
    rows = read_rows(f"{folder}/val.jsonl")
    return [rows[i] for i in permutation(len(rows), 0, 0)[:n]]
