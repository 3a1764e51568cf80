"""Collect for PPO (arXiv 1707.06347; on language models 1909.08593, 2203.02155).

A round samples one response y to each of its prompts from the policy. Its tokens are a trajectory:

    r_t = - kl_coef (log pi(y_t | ...) - log pi_ref(y_t | ...)),  and at the last token + R(x, y)
    R   = the reward, normalized by mean and deviation of the first round's samples if
          `whiten_rewards`, minus `missing_eos_penalty` if y did not end
    A_t = sum_l (discount gae_lambda)^l delta_{t+l},
          delta_t = r_t + discount V_{t+1} - V_t                       GAE, 1506.02438, eq. 16
    G_t = A_t + V_t, the target of the value head

A is whitened over the round's tokens if `whiten_advantages`. pi_ref is `init`. V is the policy's
scalar head, read where a token is predicted, and 0 after the last token.

RUN/round_R/ holds self_train.jsonl (samples), train.jsonl (with their scores), rollout.npz
(log-probabilities, values, advantages and returns of every token) and collect.json (the report and
what it was made from), all made once, by the policy that sampled.
"""

import os
import re
import time
from dataclasses import dataclass

import numpy as np
import torch

from data import tokenizer
from data.batch import Batch, batch_indices, ppo_batch
from data.files import atomic_write, read_arrays, sha256, write_json
from data.rows import (
    encode_rows,
    name_tokenizer,
    prompt_fields,
    read_rows,
    sampled_row,
    write_rows,
)
from eval import map_batches, validation_rows
from loss import kl_estimates
from model import GPT
from nanospin import checkpoint, distributed, inputs, rounds
from nanospin.config import convert
from nanospin.distributed import broadcast_from_rank0, run_on_rank0
from nanospin.rounds import (
    check_policy,
    reference_checkpoint,
    remove_parts,
    round_folder,
    score_in_parts,
    with_checksum,
)
from rollout import (
    check_finite,
    drop_overlong_prompts,
    match_responses,
    sample_policy,
    say_shared_prompts,
    unique_prompts,
)
from scorer import score_rows

# The metrics of `sample_report`, for `keep_best`.
METRICS = [
    "reward",
    "reward_std",
    "reward_se",
    "kl",
    "kl_se",
    "kl_token",
    "entropy",
    "length",
    "ended",
]


@dataclass
class Trajectories:
    """One response to each of n prompts. Lists have an entry per response."""

    texts: list[str]
    ids: list[list[int]]
    ended: list[bool]
    scores: np.ndarray  # (n,) float64 rewards as the scorer gives them
    logps: list[np.ndarray]  # (tokens,) float32 under the policy
    refs: list[np.ndarray]  # (tokens,) float32 under the reference
    values: list[np.ndarray]  # (tokens,) float32


def collect(cfg, round_id: int, model, enc, device, dtype, say):
    """(train, val, report) of a round.

    train: encoded rows of one response, with logps, values, advantages and returns, each (tokens,)
    float32. val: held-out rows, sampled when the run is evaluated. report: metrics of the samples.
    """
    folder, block_size = round_folder(cfg, round_id), model.config.block_size
    rows = unique_prompts(read_rows(f"{cfg.data}/train.jsonl"))
    rows = drop_overlong_prompts(
        cfg, rows, enc, block_size, say if round_id == 0 else None, "train"
    )
    n = min(cfg.max_rows or len(rows), len(rows))
    val = unique_prompts(validation_rows(cfg.data, cfg.eval_rows))
    if round_id == 0:
        say_shared_prompts(rows, val, say)
    rows = [rows[i] for i in batch_indices(len(rows), n, cfg.seed, round_id)]
    val = drop_overlong_prompts(cfg, val, enc, block_size)

    run_on_rank0(check_policy, cfg, round_id)
    run_on_rank0(remove_later_evaluations, cfg, round_id)
    manifest_path = os.path.join(folder, "collect.json")
    if not broadcast_from_rank0(os.path.exists(manifest_path)):
        if broadcast_from_rank0(checkpoint.latest(cfg.out_dir, round_id)):
            raise SystemExit(
                f"{manifest_path} is missing, and the policy of round {round_id} has been trained, "
                "so it is no longer the one that sampled; remove the folder of that round"
            )
        make_round(cfg, round_id, rows, model, enc, device, dtype)
    remove_score_parts(os.path.join(folder, "self_train.jsonl"))
    train, report = read_round(cfg, folder, enc, block_size)
    num_tokens = sum(len(row["values"]) for row in train)
    say(f"round {round_id}: {len(train)} responses of {num_tokens} tokens")
    return train, val, report


def make_round(cfg, round_id: int, rows, model, enc, device, dtype):
    """Sample, score and write a round's files."""
    start, folder = time.perf_counter(), round_folder(cfg, round_id)
    path = os.path.join(folder, "self_train.jsonl")
    name = f"{round_id} self train"
    samples = sample_trajectories(cfg, path, name, rows, model, enc, device, dtype)
    scaling = reward_scaling(cfg, round_id, samples.scores)
    arrays, report = advantages(cfg, scaling, samples)
    report = sample_report(samples) | report
    inputs.check_again(cfg)
    if distributed.rank() == 0:
        rows_path = os.path.join(folder, "train.jsonl")
        arrays_path = os.path.join(folder, "rollout.npz")
        write_rows(rows_path, scored_rows(rows, samples, enc))
        with atomic_write(arrays_path, "wb") as f:
            np.savez(f, **arrays)
        policy = reference_checkpoint(cfg, round_id)
        manifest = {
            "policy": checkpoint.read_meta(policy)["weights_sha256"],
            "reward": cfg.reward,
            "reward_sha256": inputs.scorer_sha256(cfg.reward),
            "tokenizer": tokenizer.fingerprint(enc),
            "seed": cfg.seed,
            "files": {
                "train.jsonl": sha256(rows_path),
                "rollout.npz": sha256(arrays_path),
            },
            "now": scaling,
            "report": report,
            "seconds": time.perf_counter() - start,
        }
        write_json(os.path.join(folder, "collect.json"), with_checksum(manifest))
    distributed.barrier()


def scored_rows(rows, samples: Trajectories, enc) -> list[dict]:
    """The samples as rows with their score and their KL to the reference."""
    scored = []
    for i, row in enumerate(rows):
        scored.append(
            prompt_fields(row)
            | {
                "responses": [samples.texts[i]],
                "ids": [samples.ids[i]],
                "tokenizer": tokenizer.fingerprint(enc),
                "scores": [float(samples.scores[i])],
                "kl": float(np.sum(samples.logps[i] - samples.refs[i])),
                "ended": samples.ended[i],
            }
        )
    return scored


def read_manifest(folder: str) -> dict:
    """collect.json of a round; exits with one line if it is damaged or was edited."""
    manifest = rounds.read_manifest(folder, {"files": dict, "now": dict, "report": dict})
    numbers = {f"now.{name}": manifest["now"].get(name) for name in ("kl_coef", "mean", "std")}
    numbers["report.kl"] = manifest["report"].get("kl")
    for name, value in numbers.items():
        convert(name, value, float, os.path.join(folder, "collect.json"))
    return manifest


def read_round(cfg, folder: str, enc, block_size: int) -> tuple[list[dict], dict]:
    """(rows to train on, report) of a round that was made. Exits if a file was changed."""
    manifest = read_manifest(folder)
    rows_path = os.path.join(folder, "train.jsonl")
    arrays_path = os.path.join(folder, "rollout.npz")
    for path in (rows_path, arrays_path):
        expected = manifest["files"].get(os.path.basename(path))
        if not os.path.exists(path) or sha256(path) != expected:
            raise SystemExit(f"{path} is damaged: its sha256 is not the one in collect.json")
    train, _ = encode_rows(
        name_tokenizer(read_rows(rows_path), enc),
        enc,
        cfg.template,
        block_size,
        cfg.max_prompt,
        cfg.max_response,
    )
    arrays = read_arrays(arrays_path)
    ends = np.cumsum([len(row["responses"][0]) for row in train])
    for name in ("logps", "values", "advantages", "returns"):
        if name not in arrays or arrays[name].shape != (ends[-1],):
            raise SystemExit(
                f"{arrays_path} is damaged: its {name} are not those of {ends[-1]} tokens"
            )
        for row, part in zip(train, np.split(arrays[name], ends[:-1]), strict=True):
            row[name] = part
    return train, manifest["report"]


def evaluate(cfg, round_id: int, step: int, model, rows, enc, device) -> dict[str, float]:
    """Held-out metrics of the policy: `sample_report` of one response to each row, drawn with the
    same random numbers at every evaluation and kept in RUN/round_R/val_step_S.jsonl."""
    path = os.path.join(round_folder(cfg, round_id), f"val_step_{step:06d}.jsonl")
    dtype = distributed.compute_dtype(cfg, device)
    samples = sample_trajectories(cfg, path, "held out", rows, model, enc, device, dtype)
    remove_score_parts(path)
    return sample_report(samples)


def remove_later_evaluations(cfg, round_id: int):
    """Remove held-out samples of steps that will be repeated. The policy may differ then: on
    another number of ranks, say."""
    newest = checkpoint.latest(cfg.out_dir, round_id)
    last = int(os.path.basename(newest).removeprefix("step_")) if newest else 0
    folder = round_folder(cfg, round_id)
    for name in os.listdir(folder):
        found = re.match(r"val_step_([0-9]+)\.jsonl", name)
        if found and int(found[1]) > last:
            os.remove(os.path.join(folder, name))


# -------------------------------------------------------------------------------- trajectories


def sample_trajectories(cfg, path, name, rows, model, enc, device, dtype) -> Trajectories:
    """Sample one response to each row into a ranked file and score it, on every rank.

    What has been scored is kept in parts beside the file, see `remove_score_parts`.
    """
    sample_policy(path, cfg, rows, name, model, enc, dtype)
    texts, ids = [], []
    for text, response in match_responses(path, rows, enc):
        texts.append(text)
        ids.append(response)
    sampled = []
    for row, text, y in zip(rows, texts, ids):
        sampled.append(sampled_row(row, text, y, enc))
    encoded, _ = encode_rows(
        sampled, enc, cfg.template, model.config.block_size, cfg.max_prompt, cfg.max_response
    )

    def score_policy(numbers: range) -> dict[str, np.ndarray]:
        part = [encoded[n] for n in numbers]
        return token_arrays(model, cfg, part, enc, device, "the policy")

    policy = score_in_parts(f"{path}.policy", encoded, "policy", score_policy)
    refs = reference_logps(cfg, path, encoded, enc, device, dtype)
    one_each = [[text] for text in texts], [[y] for y in ids]
    scores = score_rows(cfg, f"{path}.reward", rows, *one_each, enc, device, dtype)[:, 0]
    ends = np.cumsum([len(row["responses"][0]) for row in encoded])[:-1]
    return Trajectories(
        texts=texts,
        ids=ids,
        ended=[y[-1] == enc.eot_token for y in ids],
        scores=scores,
        logps=np.split(policy["logps"], ends),
        refs=np.split(refs, ends),
        values=np.split(policy["values"], ends),
    )


def reference_logps(cfg, path, encoded, enc, device, dtype) -> np.ndarray:
    """Log-probabilities of all response tokens under the reference, (tokens,) float32."""
    reference, _, _ = GPT.from_checkpoint(cfg.init, device, dtype)
    weights = run_on_rank0(checkpoint.weights_sha256, cfg.init)

    def score(numbers: range) -> dict[str, np.ndarray]:
        part = [encoded[n] for n in numbers]
        return token_arrays(reference, cfg, part, enc, device, f"the reference {cfg.init}")

    return score_in_parts(f"{path}.reference", encoded, weights, score)["logps"]


def remove_score_parts(path: str):
    """Remove what `sample_trajectories` has kept, once its result is written or not needed."""
    for scorer in ("policy", "reference", "reward"):
        remove_parts(f"{path}.{scorer}")


def token_arrays(model, cfg, rows, enc, device, scorer: str) -> dict[str, np.ndarray]:
    """{"logps", "values"} of all response tokens, (tokens,) float32. Exits with one line, which
    names `scorer`, if one is not finite."""
    logps, values = token_scores(model, rows, cfg, device)
    check_finite(logps, rows, enc, f"log-probabilities under {scorer}")
    check_finite(values, rows, enc, f"values of {scorer}")
    return {"logps": np.concatenate(logps), "values": np.concatenate(values)}


def token_scores(model, rows, cfg, device) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Log-probability and value of every response token: two lists of (tokens,) float32, one entry
    per row. Without a scalar head the values are the log-probabilities again."""

    def score(batch: Batch):
        if model.config.scalar_head:
            logps, values = model.logps_and_values(
                batch.idx, batch.targets, batch.value_positions, **batch.layout()
            )
        else:
            logps = model(batch.idx, batch.targets, **batch.layout())
            values = None
        logps = logps[batch.targets >= 0]
        values = logps if values is None else values
        lengths = batch.lengths.flatten().tolist()
        return list(zip(logps.cpu().split(lengths), values.cpu().split(lengths)))

    budget = distributed.micro_batch_tokens(cfg, device)
    results = map_batches(model, rows, budget, device, ppo_batch, score, layout=cfg.layout)
    logps = [np.asarray(row[0], dtype=np.float32) for row in results]
    values = [np.asarray(row[1], dtype=np.float32) for row in results]
    return logps, values


# ---------------------------------------------------------------------------------- arithmetic


def reward_scaling(cfg, round_id: int, scores: np.ndarray) -> dict[str, float]:
    """{"kl_coef", "mean", "std"} of a round.

    Mean and deviation of the rewards stay those of the first round, so that neither the objective
    nor its price in KL moves. Scores that are all equal are not scaled. With kl_target the
    coefficient adapts (1909.08593, section 2.2):

        kl_coef <- kl_coef (1 + kl_adapt clip(KL / kl_target - 1, -0.2, 0.2))
    """
    if round_id == 0:
        std = float(scores.std()) if np.ptp(scores) else 1.0
        return {"kl_coef": cfg.kl_coef, "mean": float(scores.mean()), "std": std}
    previous = read_manifest(round_folder(cfg, round_id - 1))
    error = 0.0
    if cfg.kl_target:
        error = previous["report"]["kl"] / cfg.kl_target - 1
    factor = 1 + cfg.kl_adapt * min(0.2, max(-0.2, error))
    return previous["now"] | {"kl_coef": previous["now"]["kl_coef"] * factor}


def advantages(
    cfg, scaling: dict[str, float], samples: Trajectories
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """({"logps", "values", "advantages", "returns"} (tokens,) float32, response after response,
    metrics) of a round's samples."""
    lengths = np.array([len(y) for y in samples.ids])
    n, T = len(lengths), lengths.max()
    inside = np.arange(T) < lengths[:, None]  # (n, T)
    logps = np.concatenate(samples.logps)  # (tokens,)
    log_ratio = logps.astype(np.float64) - np.concatenate(samples.refs)
    rewards, values = np.zeros((n, T)), np.zeros((n, T))
    rewards[inside] = -scaling["kl_coef"] * log_ratio
    values[inside] = np.concatenate(samples.values)
    scores = samples.scores
    if cfg.whiten_rewards:
        scores = (scores - scaling["mean"]) / scaling["std"]
    missing_eos = ~np.array(samples.ended)
    rewards[np.arange(n), lengths - 1] += scores - cfg.missing_eos_penalty * missing_eos

    padded = gae(rewards, values, lengths, cfg.discount, cfg.gae_lambda)
    returns = (padded + values)[inside]
    values, advantage = values[inside], padded[inside]
    metrics = {
        "explained_variance": float(1 - np.var(returns - values) / max(np.var(returns), 1e-12)),
        "value": float(values.mean()),
        "return": float(rewards.sum(1).mean()),
        "kl_coef": scaling["kl_coef"],
    }
    if cfg.whiten_advantages:
        advantage = whiten(advantage)
    arrays = {"logps": logps, "values": values, "advantages": advantage, "returns": returns}
    return {name: array.astype(np.float32) for name, array in arrays.items()}, metrics


def group_advantages(rewards: np.ndarray, estimator: str) -> np.ndarray:
    """Advantages of K samples of each prompt, from the group alone. rewards (n, K) -> (n, K).

    grpo      (R - mean) / (std + 1e-4), std with K - 1 (arXiv 2402.03300, section 4.1.2)
    dr_grpo   R - mean (2503.20783)
    rloo      R - the mean of the others = K / (K - 1) (R - mean) (2402.14740)
    """
    K = rewards.shape[1]
    centered = rewards - rewards.mean(1, keepdims=True)
    if estimator == "grpo":
        return centered / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)
    if estimator == "rloo":
        return centered * K / (K - 1)
    return centered


def gae(
    rewards: np.ndarray,
    values: np.ndarray,
    lengths: np.ndarray,
    discount: float = 1.0,
    gae_lambda: float = 0.95,
) -> np.ndarray:
    """Generalized advantage estimation (arXiv 1506.02438, eq. 16).

    rewards, values (n, T), right-padded; lengths (n,). Returns (n, T), 0 in the padding.
    """
    result = np.zeros_like(values)
    last_advantage = np.zeros(len(values))
    next_value = np.zeros(len(values))
    for t in reversed(range(values.shape[1])):
        inside = t < lengths
        delta = rewards[:, t] + discount * next_value - values[:, t]
        last_advantage = np.where(inside, delta + discount * gae_lambda * last_advantage, 0.0)
        next_value = np.where(inside, values[:, t], 0.0)
        result[:, t] = last_advantage
    return result


def whiten(x: np.ndarray) -> np.ndarray:
    """Mean 0 and standard deviation 1."""
    return (x - x.mean()) / (x.std() + 1e-8)


def sample_report(samples: Trajectories) -> dict[str, float]:
    """Metrics of sampled responses.

    reward, reward_std, reward_se   as the scorer gives it, with deviation and standard error
    kl, kl_se                       KL(pi || pi_ref) of a response: k1 of `loss.kl_estimates` summed
                                    over its tokens, with standard error
    kl_token                        mean of k3 over tokens
    entropy                         mean of -log pi over the sampled tokens
    length, ended                   mean tokens; share that ended with end-of-text
    """
    logps = torch.from_numpy(np.concatenate(samples.logps)).double()
    refs = torch.from_numpy(np.concatenate(samples.refs)).double()
    kl = []
    for logp, ref in zip(samples.logps, samples.refs):
        kl.append(float(np.sum(logp.astype(np.float64) - ref)))
    kl = np.array(kl)
    n = len(kl)
    _, _, k3 = kl_estimates(logps, refs)
    return {
        "reward": float(samples.scores.mean()),
        "reward_std": float(samples.scores.std()),
        "reward_se": float(samples.scores.std() / n**0.5),
        "kl": float(kl.mean()),
        "kl_se": float(kl.std() / n**0.5),
        "kl_token": float(k3.mean()),
        "entropy": float(-logps.mean()),
        "length": len(logps) / n,
        "ended": float(np.mean(samples.ended)),
    }
