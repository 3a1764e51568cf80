"""Validation loss, ranking accuracy, exact match, win rate; also a command line.

    python eval.py sft=out/demo/sft                                                   # validation loss, a sample's figures
    python eval.py sft=out/demo/sft spin=out/demo/spin_k2 --judge=out/demo/sft_teacher    # and win rate against the first
    python eval.py sft=out/demo/sft sft_cold=out/demo/sft@0.5 --out=eval.json         # @ is the sampling temperature

Everything is measured on the same held-out rows, sampled under the checkpoint's own template and limits.
"""
import argparse
import os
import re
from collections import Counter

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import parallel
from data import INPUTS, batch_rows, encode_rows, permutation, read_rows, row_tokens, split_by_tokens, stream_batch, tokenizer, write_json, write_rows
from loss import plackett_luce, sequence_logprobs
from sample import device_name, number, respond


@torch.no_grad()
def stream_loss(model, tokens, cfg, device, eot=None):
    """Mean cross-entropy a token over `eval_batches` batches of the validation stream, the same ones for every run."""
    was_training = model.training
    model.eval()
    nll, count, length = torch.zeros((), dtype=torch.float64), 0, model.config.block_size
    parts = stream_parts(cfg, length, device)
    for step in range(cfg.eval_batches):
        for part in parts:
            batch = stream_batch(tokens, length, cfg.batch_size, 0, step, model.config.vocab_size, part, eot)
            nll -= run(model, batch, device)[0].double().sum().cpu()
            count += batch["targets"].numel()
    parallel.reshard(model)
    model.train(was_training)
    nll, count = parallel.total([nll, count], device)
    return nll / count


def stream_parts(cfg, length, device):
    """This rank's micro-batches of a batch of windows, as slices of it; every rank has as many."""
    share, size = cfg.batch_size // parallel.world(), max(1, parallel.micro_batch_tokens(cfg, device) // length)
    first, end = parallel.rank() * share, (parallel.rank() + 1) * share
    return [slice(start, min(start + size, end)) for start in range(first, end, size)]


def run(model, batch, device, whole=False):
    """(logps of a batch's targets, the batch on the device); whole: all logits at those places, (..., V)."""
    batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
    return model(**{name: batch[name] for name in INPUTS if name in batch and not (whole and name == "targets")}), batch


@torch.no_grad()
def score(model, rows, tokens, device, desc=None, layout="shared"):
    """log pi(y_k|x) of every response of encoded rows -> float32 array (rows, K), 0 where absent; on every rank.
    Policy and reference both go through here, about `tokens` tokens at a time."""
    K = max(len(r["responses"]) for r in rows)

    def sums(some):
        logps, batch = run(model, batch_rows(some, layout), device)
        B, k = batch["present"].shape
        return np.pad(sequence_logprobs(logps, batch["seq"], B * k).view(B, k).cpu().numpy(), ((0, 0), (0, K - k)))
    return np.stack(over_rows(model, rows, tokens, sums, desc, layout))


def over_rows(model, rows, tokens, figures, desc=None, layout="shared"):
    """figures(some rows) -> one value of each, for all of them, about `tokens` tokens at a time: a list, on every rank."""
    was_training = model.training
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: row_tokens(rows[i], layout))
    sizes = [row_tokens(rows[i], layout) for i in order]
    parts = split_by_tokens(sizes, min(len(rows), -(-sum(sizes) // tokens)))
    results = {}
    for part in tqdm(list(parallel.shard(parts)), desc=desc, disable=None if desc and parallel.rank() == 0 else True):
        indices = [order[i] for i in part]
        results.update(zip(indices, figures([rows[i] for i in indices])))
    parallel.reshard(model)
    model.train(was_training)
    return parallel.merge(len(rows), results)


def evaluate(cfg, beta, model, val, device, eot):
    """The held-out figures of a stage; val_loss is plain cross-entropy, whatever is trained."""
    if cfg.stage == "pretrain":
        return {"val_loss": stream_loss(model, val, cfg, device, eot if cfg.documents_apart else None)}
    tokens = parallel.micro_batch_tokens(cfg, device)
    if cfg.calibration:
        return calibration(model, val, tokens, device)
    logps = score(model, val, tokens, device, layout=cfg.layout)
    if cfg.stage == "sft":
        return loss_metrics(logps, val)
    K = logps.shape[1]
    refs = np.array([row["ref"] + [0.0] * (K - len(row["ref"])) for row in val], dtype=np.float32)
    rows = [row | {"responses": row["responses"] + [None] * (K - len(row["responses"])),
                   "ranks": row["ranks"] + [K] * (K - len(row["ranks"]))} for row in val]
    names = cfg.players if cfg.stage == "spin" else [str(k + 1) for k in range(K)]
    return ranking_metrics(logps, refs, rows, beta, names)


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


# ----------------------------------------------------------------------------------------------------------- calibration


@torch.no_grad()
def distributions(model, rows, tokens, device, temperature=1.0):
    """What a model says of each target token of encoded rows' best responses, its logits divided by `temperature`. Arrays, one
    value a token in the rows' order: `logp` of the target; `top`, the greatest probability; `right`, whether the target has it;
    `entropy` in nats; `slope` and `bend`, the first and second derivative of -logp by 1 / temperature."""
    def figures(some):
        logits, batch = run(model, batch_rows(some), device, whole=True)
        targets = batch["targets"][:, None]
        logps = torch.log_softmax(logits / temperature, -1)
        p = logps.exp()
        mean = (p * logits).sum(-1)
        values = torch.stack([logps.gather(1, targets)[:, 0], p.amax(-1), logits.argmax(-1) == targets[:, 0], -(p * logps).sum(-1),
                              mean - logits.gather(1, targets)[:, 0], (p * logits.square()).sum(-1) - mean.square()])
        return [part.cpu().numpy() for part in values.split(batch["lengths"][:, 0].tolist(), dim=1)]
    tokens = min(tokens, max(256, 2**26 // model.config.vocab_size))            # a (tokens, V) matrix
    rows = [row | {"responses": row["responses"][:1]} for row in rows]
    values = np.concatenate(over_rows(model, rows, tokens, figures), axis=1).astype(np.float64)
    return dict(zip(("logp", "top", "right", "entropy", "slope", "bend"), values))


def fit_temperature(model, rows, tokens, device):
    """The temperature that makes rows' cross-entropy least (arXiv 1706.04599, section 4.2), in [0.05, 20]. The loss is convex in
    1 / temperature, whose Newton steps are held to a factor of 2."""
    inverse = 1.0
    for _ in range(10):
        at = distributions(model, rows, tokens, device, 1 / inverse)
        before, best = inverse, inverse - at["slope"].mean() / max(at["bend"].mean(), 1e-12)
        inverse = float(np.clip(np.clip(best, before / 2, before * 2), 0.05, 20.0))
        if abs(inverse / before - 1) < 0.01:        # the next step would be about its square
            break
    return 1 / inverse


def reliability(top, right, bins=15):
    """Tokens in bins of equal width by the greatest probability: [[its mean, share right, tokens]] of those not empty."""
    at = np.minimum((top * bins).astype(int), bins - 1)
    return [[float(top[at == b].mean()), float(right[at == b].mean()), int((at == b).sum())] for b in range(bins) if (at == b).any()]


def expected_calibration_error(curve):
    """ECE: mean of |probability - share right| over tokens, by the bins of `reliability` (arXiv 1706.04599, eq. 3)."""
    return sum(n * abs(top - right) for top, right, n in curve) / sum(n for _, _, n in curve)


def calibration(model, rows, tokens, device):
    """The figures of the T_n study, on plain cross-entropy a target token whatever was trained. Validation rows stand in two halves,
    0 and 1; what is chosen, a step or a temperature, is chosen on one and measured on the other, and both ways are averaged.

    val_loss                all rows                      loss/H          half H; tokens/H its target tokens
    temperature/H           fitted on half H              fitted_loss/H   half H at the temperature fitted on itself: to choose by
    loss_t/H                half H at the temperature fitted on the other half: what is measured
    acc                     share of the tokens whose most likely id is right
    ece, reliability        expected calibration error and its curve; ece_t at the other half's temperature
    entropy, entropy_wrong  mean over the tokens, and over those whose most likely id is wrong
    seen_loss, new_loss     tokens whose row, up to and with them, begins a training row too, and the others;
    seen_share, new_tokens  the share of the first kind, the number of the others
    """
    lengths = [len(row["responses"][0]) - (not row["prompt"]) for row in rows]         # an empty prompt leaves the first token unasked
    seen = np.concatenate([len(row["prompt"]) + (not row["prompt"]) + np.arange(n) < row["seen"] for row, n in zip(rows, lengths)])
    half = np.repeat([row["half"] for row in rows], lengths)
    plain = distributions(model, rows, tokens, device)
    figures = {"val_loss": -plain["logp"].mean(), "acc": plain["right"].mean(), "entropy": plain["entropy"].mean(), "seen_share": seen.mean(), "new_tokens": (~seen).sum()}
    warm = {name: np.empty(len(half)) for name in ("top", "right")}                 # each half at the other's temperature
    for h in (0, 1):
        temperature = fit_temperature(model, [row for row in rows if row["half"] == h], tokens, device)
        at = distributions(model, rows, tokens, device, temperature)
        figures |= {f"tokens/{h}": (half == h).sum(), f"loss/{h}": -plain["logp"][half == h].mean(), f"temperature/{h}": temperature,
                    f"fitted_loss/{h}": -at["logp"][half == h].mean(), f"loss_t/{1 - h}": -at["logp"][half != h].mean()}
        for name, values in warm.items():
            values[half != h] = at[name][half != h]
    curve = reliability(plain["top"], plain["right"])
    figures |= {"ece": expected_calibration_error(curve), "reliability": curve, "ece_t": expected_calibration_error(reliability(warm["top"], warm["right"]))}
    some = [("seen_loss", -plain["logp"], seen), ("new_loss", -plain["logp"], ~seen), ("entropy_wrong", plain["entropy"], plain["right"] == 0)]
    figures |= {name: values[where].mean() for name, values, where in some if where.any()}
    return {name: value if isinstance(value, list) else float(value) for name, value in figures.items()}


def answer(text):
    """What exact match compares: the number after "####" (GSM8K), or the whole text."""
    found = re.findall(r"####\s*(-?[\d.,]+)", text)
    return found[-1].replace(",", "").rstrip(".") if found else text.strip()


def sample_metrics(texts, ids, references, eot):
    """Of sampled responses: share ended by eot, mean length in tokens, exact match with the references (texts)."""
    return {"ended": float(np.mean([i[-1] == eot for i in ids])),
            "length": float(np.mean([len(i) for i in ids])),
            "exact_match": float(np.mean([answer(t) == answer(r) for t, r in zip(texts, references)])),
            "f1": float(np.mean([f1(t, r) for t, r in zip(texts, references)]))}


def f1(text, reference):
    """F1 of the two bags of words, as SQuAD measures answers (arXiv 1606.05250)."""
    a, b = Counter(text.lower().split()), Counter(reference.lower().split())
    common = (a & b).total()
    return 2 * common / max(1, a.total() + b.total())


def length_accuracy(data, other):
    """How well length alone tells the data's responses from others', the better of its two directions; a tie is a coin.
    data, other: lengths in tokens."""
    longer = np.mean((np.array(data) > other) + 0.5 * (np.array(data) == other))
    return float(max(longer, 1 - longer))


def win_rate(judge, pairs, device, tokens=8192):
    """Share of prompts on which the first response beats the second under a judge, a language model: the higher mean
    log-probability a token, end-of-text included, wins; equals count half.
    pairs: encoded rows of two responses. Returns (share, standard error)."""
    lengths = np.array([[len(y) for y in row["responses"]] for row in pairs])
    mean = score(judge, pairs, tokens, device) / lengths
    # the same response twice may differ in its last bits: the products' rounding depends on where a token stands
    equal = (mean[:, 0] == mean[:, 1]) | np.array([a == b for a, b in (row["responses"] for row in pairs)])
    wins = np.where(equal, 0.5, mean[:, 0] > mean[:, 1])
    return float(wins.mean()), float(wins.std() / np.sqrt(len(wins)))


def held_out(folder, n):
    """The same n validation rows for every run and seed."""
    rows = read_rows(f"{folder}/val.jsonl")
    return [rows[i] for i in permutation(len(rows), 0, 0)[:n]]


def measure(path, temperature, seed, rows, args):
    """(figures, sampled rows, tokenizer) of one checkpoint on the held-out rows."""
    model, enc, meta = checkpoint.load_model(path, args.device)
    settings = {name: meta["config"][name] for name in ("template", "max_prompt", "max_response")}
    limits = enc, settings["template"], model.config.block_size, settings["max_prompt"], settings["max_response"]
    encoded = [row for row in encode_rows(rows, *limits)[0] if row is not None]
    best = [row | {"responses": row["responses"][:1]} for row in encoded]
    figures = loss_metrics(score(model, best, 8192, args.device), best)
    if args.reference:
        K = max(len(row["responses"]) for row in encoded)
        full = [row | {"responses": row["responses"] + [None] * (K - len(row["responses"])), "ranks": row["ranks"] + [K] * (K - len(row["ranks"]))} for row in encoded]
        ref, _, _ = checkpoint.load_model(args.reference, args.device)
        figures |= ranking_metrics(score(model, full, 64, args.device), score(ref, full, 64, args.device), full, args.beta, [str(k + 1) for k in range(K)])
    texts, ids = respond(model, enc, texts=[row["prompt"] for row in rows], seed=seed, temperature=temperature, **settings)
    there = [i for i, y in enumerate(ids) if y is not None]         # whole texts have no prompt to answer
    figures |= {} if not there else sample_metrics([texts[i] for i in there], [ids[i] for i in there], [rows[i]["responses"][0] for i in there], enc.eot_token)
    return figures, {rows[i]["prompt"]: (texts[i], ids[i]) for i in there}, enc


def in_tongue(judge, enc, text, ids):
    """A response's ids for a judge: as they are if its tokenizer made them; else encoded, ended only if it had ended."""
    if enc is not None and tokenizer.fingerprint(enc) == tokenizer.fingerprint(judge):
        return ids
    return judge.encode_ordinary(text) + ([judge.eot_token] if enc is None or ids[-1] == enc.eot_token else [])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=CHECKPOINT[@TEMPERATURE]")
    parser.add_argument("--data", default="data/pydocs")
    parser.add_argument("--rows", type=number(int, 1), default=256, help="held-out rows")
    parser.add_argument("--judge", help="checkpoint: win rate of everyone, and of the data, against the first one's samples")
    parser.add_argument("--reference", help="checkpoint: ranking figures of the data's own ranked responses, by implicit rewards against it")
    parser.add_argument("--beta", type=number(float, 0), default=0.1, help="of those rewards")
    parser.add_argument("--out", help="folder for eval.json and each one's samples")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of the sampling; the n-th checkpoint takes seed + n")
    parser.add_argument("--device", type=device_name, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    parallel.tune(args.device)
    runs = {}
    for spec in args.checkpoints:
        found = re.fullmatch(r"([\w.@-]+)=(.+?)(?:@(\d+\.?\d*))?", spec)
        if not found or found[1] in runs or found[1] == "data":
            raise SystemExit(f"{spec}: a checkpoint is given as NAME=CHECKPOINT or NAME=CHECKPOINT@TEMPERATURE, each NAME once and none of them data")
        runs[found[1]] = checkpoint.resolve(found[2]), float(found[3] or 1.0)
    rows = held_out(args.data, args.rows)
    if args.judge and not all(row["prompt"] for row in rows):
        raise SystemExit(f"{args.data}: rows that are whole texts have no prompts; there is nothing to judge")
    table, samples = {}, {"data": ({row["prompt"]: (row["responses"][0], None) for row in rows}, None)}
    for n, (name, (path, temperature)) in enumerate(runs.items()):
        figures, *samples[name] = measure(path, temperature, args.seed + n, rows, args)
        table[name] = {"checkpoint": path, "temperature": temperature} | figures
        print(f"{name}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()), flush=True)
    if args.judge:
        judge, enc, meta = checkpoint.load_model(args.judge, args.device)
        first, *others = table
        settings = [meta["config"][name] for name in ("max_prompt", "max_response")]
        for name in ["data", *others]:
            prompts = [row["prompt"] for row in rows if all(row["prompt"] in samples[who][0] for who in (name, first))]
            answers = [[(samples[who][1], *samples[who][0][prompt]) for who in (name, first)] for prompt in prompts]
            pairs = [{"prompt": prompt, "responses": [text for _, text, _ in both], "ids": [in_tongue(enc, *one) for one in both]} for prompt, both in zip(prompts, answers)]
            pairs = [p for p in encode_rows(pairs, enc, meta["config"]["template"], judge.config.block_size, *settings)[0] if p is not None]
            share, error = win_rate(judge, pairs, args.device)
            table.setdefault(name, {})
            table[name] |= {"win_rate": share, "win_rate_se": error, "against": first}
            print(f"{name} beats {first} in {100 * share:.1f} +- {100 * error:.1f} % of {len(pairs)} prompts")
    if args.out:
        os.makedirs(args.out, exist_ok=True)
        for name, (answers, _) in samples.items():
            write_rows(os.path.join(args.out, f"{name}.jsonl"), [{"prompt": prompt, "responses": [text]} for prompt, (text, _) in answers.items()])
        write_json(os.path.join(args.out, "eval.json"), table)


if __name__ == "__main__":
    main()
