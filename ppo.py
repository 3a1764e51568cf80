"""PPO's collect (arXiv 1707.06347; on language models 1909.08593, 2203.02155).

A round samples one response y to each of its prompts from the policy and makes a trajectory of its tokens:

    r_t = - kl_coef (log pi(y_t | ...) - log pi_ref(y_t | ...)),  and at the last token + R(x, y)
    R   = the reward, by its mean and deviation over the first round's samples if `whiten_rewards`, less `eot_penalty`
          where y did not end
    A_t = sum_l (discount gae_lambda)^l delta_{t+l},  delta_t = r_t + discount V_{t+1} - V_t       GAE, 1506.02438, eq. 16
    G_t = A_t + V_t, what the value head is fitted to; A is whitened over the round's tokens if `whiten_advantages`

pi_ref is `init`, V the policy's scalar head, read where a token is predicted; behind the last token it is 0. In
RUN/round_R lie self_train.jsonl (samples), train.jsonl (with their scores), rollout.npz (log-probabilities, values,
advantages, returns of every token), collect.json (report and provenance), made once, by the policy that sampled.
"""

import importlib
import os
import time

import numpy as np
import torch

from nanospin import checkpoint
from nanospin import distributed
from data.batch import batch_indices, batch_rows, pin_memory
from data.rows import encode_rows, prompt_fields, read_rows, write_rows
from data.files import read_arrays, read_json, sha256, write_json
from data import tokenizer
from eval import validation_rows, map_batches, retokenize, reward_scores
from loss import kl_estimates
from rollout import match_responses, drop_overlong_prompts, unique_prompts, write_samples


def collect(cfg, round_id, model, enc, device, dtype, say):
    """(train, val, report) of a round. train: encoded rows of one response with logps, values, advantages, returns, each
    (tokens,) float32; val: the held-out rows to be sampled when the run is evaluated; report: figures of the samples."""
    start, folder, block_size = (
        time.time(),
        os.path.join(cfg.out_dir, f"round_{round_id}"),
        model.config.block_size,
    )
    rows = drop_overlong_prompts(
        cfg,
        unique_prompts(read_rows(f"{cfg.data}/train.jsonl")),
        enc,
        block_size,
        say if round_id == 0 else None,
        "train",
    )
    rows = [
        rows[i]
        for i in batch_indices(
            len(rows), min(cfg.max_rows or len(rows), len(rows)), cfg.seed, round_id
        )
    ]
    val = drop_overlong_prompts(
        cfg, unique_prompts(validation_rows(cfg.data, cfg.eval_rows)), enc, block_size
    )
    done, kept, arrays = (
        os.path.join(folder, name) for name in ("collect.json", "train.jsonl", "rollout.npz")
    )
    if not distributed.broadcast_from_rank0(os.path.exists(done)):
        if distributed.broadcast_from_rank0(checkpoint.latest(cfg.out_dir, round_id)):
            raise SystemExit(
                f"{done} is missing, and the policy of round {round_id} is no longer the one that sampled; remove that round's folder"
            )
        t = sample_trajectories(
            cfg,
            os.path.join(folder, "self_train.jsonl"),
            f"{round_id} self train",
            rows,
            model,
            enc,
            device,
            dtype,
        )
        now = reward_scaling(cfg, round_id, t["scores"])
        tokens, report = advantages(cfg, now, t)
        report = sample_report(t) | report
        if distributed.rank() == 0:
            write_rows(
                kept,
                [
                    prompt_fields(row)
                    | {
                        "responses": [text],
                        "ids": [y],
                        "scores": [s],
                        "kl": float(np.sum(p - r)),
                        "ended": ended,
                    }
                    for row, text, y, s, p, r, ended in zip(
                        rows,
                        t["texts"],
                        t["ids"],
                        t["scores"].tolist(),
                        t["logps"],
                        t["refs"],
                        t["ended"],
                    )
                ],
            )
            with open(arrays + ".tmp", "wb") as f:
                np.savez(f, **tokens)
            os.replace(arrays + ".tmp", arrays)
            write_json(
                done,
                {
                    "policy": checkpoint.read_meta(
                        checkpoint.latest(cfg.out_dir, round_id - 1)
                        if round_id
                        else checkpoint.resolve(cfg.init)
                    )["weights_sha256"],
                    "reward": cfg.reward,
                    "tokenizer": tokenizer.fingerprint(enc),
                    "seed": cfg.seed,
                    "files": {os.path.basename(path): sha256(path) for path in (kept, arrays)},
                    "now": now,
                    "report": report,
                    "seconds": time.time() - start,
                },
            )
        distributed.barrier()
    written = read_json(done, ("files", "now", "report"))
    for path in (kept, arrays):
        if not os.path.exists(path) or sha256(path) != written["files"].get(os.path.basename(path)):
            raise SystemExit(f"{path} is damaged: its sha256 is not the one in collect.json")
    train, _ = encode_rows(
        read_rows(kept), enc, cfg.template, block_size, cfg.max_prompt, cfg.max_response
    )
    tokens = read_arrays(arrays)
    ends = np.cumsum([len(row["responses"][0]) for row in train])
    for name in ("logps", "values", "advantages", "returns"):
        if name not in tokens or tokens[name].shape != (ends[-1],):
            raise SystemExit(f"{arrays} is damaged: its {name} are not those of {ends[-1]} tokens")
        for row, part in zip(train, np.split(tokens[name], ends[:-1]), strict=True):
            row[name] = part
    say(
        f"round {round_id}: {len(train)} responses of {sum(len(row['values']) for row in train)} tokens"
    )
    return train, val, written["report"]


def evaluate(cfg, round_id, step, model, rows, enc, device):
    """Held-out figures of the policy as it is: `summary` of one response to each row, with the same random numbers at every
    evaluation. The samples stay in RUN/round_R/val_step_S.jsonl."""
    path = os.path.join(cfg.out_dir, f"round_{round_id}", f"val_step_{step:06d}.jsonl")
    return sample_report(
        sample_trajectories(
            cfg, path, "held out", rows, model, enc, device, distributed.compute_dtype(cfg, device)
        )
    )


def ppo_batch(rows, layout="packed"):
    """Rows of `collect` -> `data.batch_rows` with read: a state's value is read where its token is predicted; and old_logps,
    old_values, advantages, returns (m,), in the order of the targets that are asked."""
    batch = batch_rows(rows, layout)
    batch["read"] = (
        batch["at"] if "at" in batch else (batch["targets"] >= 0).flatten().nonzero().squeeze(1)
    )
    for name, key in (
        ("old_logps", "logps"),
        ("old_values", "values"),
        ("advantages", "advantages"),
        ("returns", "returns"),
    ):
        if key in rows[0]:
            batch[name] = torch.from_numpy(np.concatenate([row[key] for row in rows]))
    return pin_memory(batch)


# ------------------------------------------------------------------------------------------------------ the trajectories


def sample_trajectories(cfg, path, what, rows, model, enc, device, dtype):
    """Sample one response to each row into a ranked file, and measure it -> {"texts", "ids", "ended": one each; "scores"
    (rows,) the rewards as they are; "logps", "refs", "values": for each row (tokens,) float32}, on every rank."""
    policy = model if cfg.sample_sharded else distributed.gather_full_model(model, dtype)
    write_samples(path, policy, enc, cfg, rows, what)
    del policy
    texts, ids = zip(*match_responses(path, rows, enc))
    played = [
        prompt_fields(row) | {"responses": [text], "ids": [y]}
        for row, text, y in zip(rows, texts, ids)
    ]
    encoded, _ = encode_rows(
        played, enc, cfg.template, model.config.block_size, cfg.max_prompt, cfg.max_response
    )
    logps, values = token_scores(model, encoded, cfg, device)
    reference, _, _ = checkpoint.load_model(cfg.init, device, dtype)
    refs, _ = token_scores(reference, encoded, cfg, device)
    del reference
    return {
        "texts": texts,
        "ids": ids,
        "ended": [y[-1] == enc.eot_token for y in ids],
        "logps": logps,
        "values": values,
        "refs": refs,
        "scores": rewards(cfg, rows, texts, ids, enc, device, dtype),
    }


def token_scores(model, rows, cfg, device):
    """Log-probabilities, and values if the model has a scalar head, of every response token: two lists of (tokens,) float32."""

    def pick(output, batch):
        logps, values = output if model.config.scalar else (output, output)
        lengths = batch["lengths"].flatten().tolist()
        return list(
            zip(
                *(
                    (x[batch["targets"] >= 0] if x.shape == batch["targets"].shape else x)
                    .cpu()
                    .split(lengths)
                    for x in (logps, values)
                )
            )
        )

    def make(rows, layout):
        batch = ppo_batch(rows, layout)
        return (
            batch
            if model.config.scalar
            else {name: t for name, t in batch.items() if name != "read"}
        )

    results = map_batches(
        model,
        rows,
        distributed.micro_batch_tokens(cfg, device),
        device,
        make,
        pick,
        layout=cfg.layout,
    )
    return [[np.asarray(row[n], dtype=np.float32) for row in results] for n in (0, 1)]


def rewards(cfg, rows, texts, ids, enc, device, dtype):
    """R(x, y) as it is (rows,), float64: of a reward model under its own template and limits, or of module:function, which
    is called with the data's row and the response's text."""
    if ":" in cfg.reward:
        function = reward_function(cfg.reward)
        return np.array([float(function(row, text)) for row, text in zip(rows, texts)])
    judge, its_enc, meta = checkpoint.load_model(cfg.reward, device, dtype)
    limits = [meta["config"][name] for name in ("max_prompt", "max_response")]
    played = [
        prompt_fields(row) | {"responses": [text], "ids": [retokenize(its_enc, enc, text, y)]}
        for row, text, y in zip(rows, texts, ids)
    ]
    encoded, counts = encode_rows(
        played, its_enc, meta["config"]["template"], judge.config.block_size, *limits
    )
    if None in encoded:
        raise SystemExit(
            f"{cfg.reward}: its block_size {judge.config.block_size} leaves no room after {counts['dropped']} prompts; set max_prompt of that run"
        )
    return reward_scores(judge, encoded, distributed.micro_batch_tokens(cfg, device), device)[
        :, 0
    ].astype(np.float64)


def reward_function(name):
    """The function that module:function names."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
        if not callable(found):
            raise TypeError("it is no function")
        return found
    except Exception as e:  # whatever the module raises
        raise SystemExit(
            f"reward {name}: {' '.join(str(e).split())}; it is a reward model's run folder, or module:function"
        )


# --------------------------------------------------------------------------------------------------------- the arithmetic


def reward_scaling(cfg, round_id, scores):
    """What a round takes from the one before it: {"kl_coef", "mean", "std"}. The scores' mean and deviation stay the first round's,
    so that neither what is maximised nor its price in KL moves (scores that do not differ yet are not scaled); the coefficient
    follows kl_target (1909.08593, section 2.2): kl_coef <- kl_coef (1 + kl_adapt clip(KL / kl_target - 1, -0.2, 0.2))."""
    if round_id == 0:
        return {
            "kl_coef": cfg.kl_coef,
            "mean": float(scores.mean()),
            "std": float(scores.std()) if np.ptp(scores) else 1.0,
        }
    before = read_json(
        os.path.join(cfg.out_dir, f"round_{round_id - 1}", "collect.json"), ("now", "report")
    )
    error = before["report"]["kl"] / cfg.kl_target - 1 if cfg.kl_target else 0.0
    return before["now"] | {
        "kl_coef": before["now"]["kl_coef"] * (1 + cfg.kl_adapt * min(0.2, max(-0.2, error)))
    }


def advantages(cfg, now, t):
    """Of a round's trajectories -> ({"logps", "values", "advantages", "returns"} (tokens,) float32, row after row, figures)."""
    lengths = np.array([len(y) for y in t["ids"]])
    n, T = len(lengths), lengths.max()
    inside = np.arange(T) < lengths[:, None]  # (rows, T)
    rewards, values = np.zeros((n, T)), np.zeros((n, T))
    rewards[inside] = -now["kl_coef"] * (
        np.concatenate(t["logps"]).astype(np.float64) - np.concatenate(t["refs"])
    )
    values[inside] = np.concatenate(t["values"])
    scores = (t["scores"] - now["mean"]) / now["std"] if cfg.whiten_rewards else t["scores"]
    rewards[np.arange(n), lengths - 1] += scores - cfg.missing_eos_penalty * ~np.array(t["ended"])
    advantage = gae(rewards, values, lengths, cfg.discount, cfg.gae_lambda)
    returns = (advantage + values)[inside]
    figures = {
        "explained_variance": float(
            1 - np.var(returns - values[inside]) / max(np.var(returns), 1e-12)
        ),
        "value": float(values[inside].mean()),
        "return": float(rewards.sum(1).mean()),
        "kl_coef": now["kl_coef"],
    }
    advantage = whiten(advantage[inside]) if cfg.whiten_advantages else advantage[inside]
    arrays = {
        "logps": np.concatenate(t["logps"]),
        "values": values[inside],
        "advantages": advantage,
        "returns": returns,
    }
    return {name: a.astype(np.float32) for name, a in arrays.items()}, figures


def gae(rewards, values, lengths, discount=1.0, gae_lambda=0.95):
    """Generalised advantage estimates (arXiv 1506.02438, eq. 16) of trajectories of some lengths (n,): rewards, values (n, T),
    right-padded -> (n, T), 0 in the padding."""
    result, last, after = np.zeros_like(values), np.zeros(len(values)), np.zeros(len(values))
    for t in reversed(range(values.shape[1])):
        there = t < lengths
        delta = rewards[:, t] + discount * after - values[:, t]
        last = np.where(there, delta + discount * gae_lambda * last, 0.0)
        after = np.where(there, values[:, t], 0.0)
        result[:, t] = last
    return result


def whiten(x):
    """Mean 0 and deviation 1."""
    return (x - x.mean()) / (x.std() + 1e-8)


def sample_report(t):
    """Figures of sampled responses: `reward` as the scorer gives it, its deviation and standard error; `kl` = KL(pi || pi_ref) of a
    response, k1 of `loss.kl_estimates` summed over its tokens and averaged, with its standard error, `kl_token` the mean of k3 over tokens;
    `entropy` the mean of -log pi over tokens (of what is sampled: at temperature 1 the policy's); length; share ended by eot."""
    logps, refs = (torch.from_numpy(np.concatenate(t[name])).double() for name in ("logps", "refs"))
    kl = np.array([float(np.sum(p.astype(np.float64) - r)) for p, r in zip(t["logps"], t["refs"])])
    n = len(kl)
    return {
        "reward": float(t["scores"].mean()),
        "reward_std": float(t["scores"].std()),
        "reward_se": float(t["scores"].std() / n**0.5),
        "kl": float(kl.mean()),
        "kl_se": float(kl.std() / n**0.5),
        "kl_token": float(kl_estimates(logps, refs)[2].mean()),
        "entropy": float(-logps.mean()),
        "length": len(logps) / n,
        "ended": float(np.mean(t["ended"])),
    }
