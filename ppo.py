"""Collect for stage ppo: policy gradients on the policy's own samples.

A round samples K = `samples_per_prompt` responses y to each of its prompts, all from the policy as
it is when the round starts, and gives every token an advantage A_t, by `advantage`:

    gae         PPO with a value function (arXiv 1707.06347; on language models 1909.08593,
                2203.02155). The tokens of a response are a trajectory with rewards
                    r_t = - kl_coef (log pi(y_t | ...) - log pi_ref(y_t | ...)),
                    and at the last token + R
                    A_t = sum_l (discount gae_lambda)^l delta_{t+l},
                    delta_t = r_t + discount V_{t+1} - V_t           (1506.02438, eq. 16)
                    G_t = A_t + V_t, the target of the value head
                V is the policy's scalar head, read where a token is predicted, and 0 after the last
                token. A is whitened over the round's tokens if `whiten_advantages`
    grpo        (R - mean) / standard deviation of the K samples of the prompt (2402.03300)
    dr_grpo     R - mean (2503.20783)
    rloo        R - the mean of the K - 1 others (2402.14740)
    reverse_kl  on-policy distillation: log pi_teacher(y_t | ...) - log pi(y_t | ...), token by
                token, without a reward. It descends KL(pi || pi_teacher) on the policy's own
                samples (2306.13649 with beta = 1 and only the student's samples)

    R = the reward of the response - `missing_eos_penalty` if y did not end

In grpo, dr_grpo and rloo all tokens of a response have its advantage. There is no value function,
and R - kl_coef sum_t (log pi - log pi_ref) stands for R. reverse_kl takes the same penalty from
each token. With gae the reward is first normalized by mean and deviation of the first round's
samples if `whiten_rewards`. pi_ref is `init`.

With kl_in "loss" the penalty is not in the advantages: the loss has kl_coef x `loss.kl_k3` at
each token (2402.03300, eq. 4). The loss is `loss.ppo_loss` for gae, else `loss.grpo_loss`.

RUN/round_R/ holds self_train.jsonl (samples, those of a prompt are K lines after each other),
train.jsonl (a row for each prompt: its samples with their scores, best first), rollout.npz
(log-probabilities and advantages of every token in the order of train.jsonl; values and returns
with gae, the reference with kl_in "loss") and collect.json (the report and what it was made from),
all made once, by the policy that sampled.
"""

import itertools
import os
import re
import time
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from data import tokenizer
from data.batch import Batch, ppo_batch
from data.files import atomic_write, is_there, read_arrays, sha256, write_json
from data.gsm8k.scorer import same_answer
from data.rows import read_own_rows, read_rows, row_with_ids, write_rows
from eval import map_batches, response_lengths, validation_rows
from loss import kl_k3
from model import GPT
from nanospin import checkpoint, distributed, inputs, lora, rounds
from nanospin.config import convert
from nanospin.distributed import broadcast_from_rank0, run_on_rank0
from nanospin.preflight import say_shared_prompts
from nanospin.rounds import (
    check_finite,
    discard_old_scores,
    reference_checkpoint,
    remove_parts,
    round_folder,
    score_in_parts,
    set_aside_round,
    with_checksum,
    write_scorer,
)
from players import (
    drop_rows_without_room,
    drop_unscorable_prompts,
    encode_for_run,
    match_samples,
    prompts_of_round,
    sample_policy,
    unique_prompts,
)
from scorer import score_rows

# The metrics of `evaluate`, for `keep_best`. exact_match is there if the data has answers.
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
    "exact_match",
]


@dataclass
class Trajectories:
    """K responses to each of n prompts, those of a prompt after each other. Lists and scores have
    an entry per response."""

    texts: list[str]
    ids: list[list[int]]
    ended: list[bool]
    scores: np.ndarray  # (n K,) float64 rewards as the scorer gives them; see `teacher_scores`
    logps: list[np.ndarray]  # (tokens,) float32 under the policy
    refs: list[np.ndarray]  # (tokens,) float32 under the reference
    values: list[np.ndarray] | None = None  # (tokens,) float32, with gae
    teacher: list[np.ndarray] | None = None  # (tokens,) float32 under the teacher, with reverse_kl
    group_size: int = 1  # K


def collect(cfg, round_id: int, model, enc, device, say):
    """(train, val, report) of a round.

    train: encoded rows of K responses, with the arrays of `rollout_names`, each (tokens,) float32,
    response after response. val: held-out rows, sampled when the run is evaluated. report: metrics
    of the samples. The rows of the data may be prompts without responses.
    """
    folder, block_size = round_folder(cfg, round_id), model.config.block_size
    if cfg.teacher:
        run_on_rank0(check_teacher, cfg, enc, block_size)
    rows_by_split = {
        "train": read_rows(f"{cfg.data}/train.jsonl", prompt_only=True),
        "val": validation_rows(cfg.data, cfg.eval_rows, prompt_only=True),
    }
    say_once = say if round_id == 0 else None
    for split, rows in rows_by_split.items():
        rows = unique_prompts(rows, say_once, split)
        rows = drop_rows_without_room(cfg, rows, enc, block_size, say_once, split)
        rows_by_split[split] = drop_unscorable_prompts(cfg, rows, say_once, split)
    rows, val = rows_by_split["train"], rows_by_split["val"]
    if round_id == 0:
        say_shared_prompts(rows, val, say)
    rows = prompts_of_round(cfg, rows, round_id)

    run_on_rank0(set_aside_round, cfg, round_id)
    run_on_rank0(discard_old_scores, cfg, round_id)
    run_on_rank0(remove_later_evaluations, cfg, round_id)
    manifest_path = os.path.join(folder, "collect.json")
    if not broadcast_from_rank0(is_there(manifest_path)):
        if broadcast_from_rank0(checkpoint.latest(cfg.out_dir, round_id)):
            raise SystemExit(
                f"{manifest_path} is missing, and the policy of round {round_id} has been trained, "
                "so it is no longer the one that sampled; remove the folder of that round"
            )
        make_round(cfg, round_id, rows, model, enc, device)
    remove_score_parts(os.path.join(folder, "self_train.jsonl"))
    train, report = read_round(cfg, folder, enc, block_size)
    num_responses = len(train) * cfg.samples_per_prompt
    num_tokens = sum(len(row["logps"]) for row in train)
    say(f"round {round_id}: {num_responses} responses of {num_tokens} tokens")
    return train, val, report


def check_teacher(cfg, enc, block_size: int):
    """Exit with one line if the teacher cannot score the tokens of this policy."""
    meta = checkpoint.read_meta(checkpoint.resolve(cfg.teacher))
    if meta["tokenizer_sha256"] != tokenizer.fingerprint(enc):
        raise SystemExit(
            f"teacher {cfg.teacher} has another tokenizer than the policy ({meta['tokenizer']}); "
            "advantage reverse_kl compares their probabilities of the same tokens"
        )
    has_template = meta["config"]["stage"] != "pretrain"
    if has_template and meta["config"]["template"] != cfg.template:
        raise SystemExit(
            f"teacher {cfg.teacher} has the template {meta['config']['template']!r}, the policy "
            f"{cfg.template!r}; advantage reverse_kl scores the same tokens under both: train the "
            "policy with the teacher's"
        )
    longest = (cfg.max_prompt or block_size) + (cfg.max_response or block_size)
    longest = min(longest, block_size)
    if meta["model"]["block_size"] < longest:
        raise SystemExit(
            f"teacher {cfg.teacher} has block_size {meta['model']['block_size']}, too short for "
            f"{longest} tokens; set max_prompt and max_response"
        )


def make_round(cfg, round_id: int, rows, model, enc, device):
    """Sample, score and write a round's files."""
    start, folder = time.perf_counter(), round_folder(cfg, round_id)
    path = os.path.join(folder, "self_train.jsonl")
    name = f"{round_id} self train"
    K = cfg.samples_per_prompt
    samples = sample_trajectories(cfg, path, name, rows, model, enc, device, K)
    samples = best_first(samples)
    scaling = reward_scaling(cfg, round_id, samples.scores)
    arrays, report = advantages(cfg, scaling, samples)
    report = sample_report(samples, rows) | report
    inputs.check_again(cfg)
    if distributed.rank() == 0:
        rows_path = os.path.join(folder, "train.jsonl")
        arrays_path = os.path.join(folder, "rollout.npz")
        write_scorer(cfg, round_id)
        write_rows(rows_path, scored_rows(rows, samples, enc, cfg.template))
        with atomic_write(arrays_path, "wb") as f:
            np.savez(f, **arrays)
        policy = reference_checkpoint(cfg, round_id)
        manifest = {
            "policy": checkpoint.read_meta(policy)["weights_sha256"],
            **scorer_entries(cfg),
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


def scorer_entries(cfg) -> dict:
    """What collect.json says of the reward, or of the teacher."""
    if cfg.teacher:
        return {
            "teacher": cfg.teacher,
            "teacher_sha256": checkpoint.weights_sha256(cfg.teacher),
        }
    return {
        "reward": cfg.reward,
        "reward_sha256": inputs.scorer_sha256(cfg.reward),
    }


def best_first(samples: Trajectories) -> Trajectories:
    """The samples of each prompt in the order of their scores. Ties stay as they were sampled."""
    K = samples.group_size
    groups = samples.scores.reshape(-1, K)
    order = np.argsort(-groups, axis=1, kind="stable")
    order = (order + K * np.arange(len(groups))[:, None]).ravel()
    changed = {}
    for f in fields(samples):
        value = getattr(samples, f.name)
        if isinstance(value, np.ndarray):
            changed[f.name] = value[order]
        elif isinstance(value, list):
            changed[f.name] = [value[i] for i in order]
    return replace(samples, **changed)


def scored_rows(rows, samples: Trajectories, enc, template: str) -> list[dict]:
    """The samples as ranked rows with their scores and their KL to the reference. With one sample
    per prompt, "kl" and "ended" are its own, not lists."""
    K = samples.group_size
    scored = []
    for i, row in enumerate(rows):
        part = slice(i * K, (i + 1) * K)
        kl = []
        for logps, refs in zip(samples.logps[part], samples.refs[part]):
            kl.append(float(np.sum(logps - refs)))
        ended = samples.ended[part]
        scored.append(
            row_with_ids(row, samples.texts[part], samples.ids[part], enc, template)
            | {
                "scores": samples.scores[part].tolist(),
                "kl": kl if K > 1 else kl[0],
                "ended": ended if K > 1 else ended[0],
            }
        )
    return scored


def rollout_names(cfg) -> list[str]:
    """The arrays of rollout.npz."""
    names = ["logps", "advantages"]
    if cfg.advantage == "gae":
        names += ["values", "returns"]
    if cfg.kl_in == "loss":
        names.append("refs")
    return names


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
        if not is_there(path) or sha256(path) != expected:
            raise SystemExit(f"{path} is damaged: its sha256 is not the one in collect.json")
    rows = read_own_rows(rows_path, enc, cfg.template)
    train, _ = encode_for_run(cfg, rows, enc, block_size)
    arrays = read_arrays(arrays_path)
    ends = np.cumsum(response_lengths(train).sum(1))
    for name in rollout_names(cfg):
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
    samples = sample_trajectories(cfg, path, "held out", rows, model, enc, device)
    remove_score_parts(path)
    inputs.check_again(cfg)  # the reward model and the reference are read at each evaluation
    return sample_report(samples, rows)


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


def sample_trajectories(cfg, path, name, rows, model, enc, device, count: int = 1) -> Trajectories:
    """Sample `count` responses to each row into a ranked file and score them, on every rank.

    What has been scored is kept in parts beside the file, see `remove_score_parts`.
    """
    sample_policy(path, cfg, rows, name, model, enc, count)
    texts, ids, sampled = [], [], []
    for row, samples in zip(rows, match_samples(path, rows, enc, count, cfg.template, own=True)):
        texts.append([text for text, _ in samples])
        ids.append([y for _, y in samples])
        sampled.append(row_with_ids(row, texts[-1], ids[-1], enc, cfg.template))
    encoded, _ = encode_for_run(cfg, sampled, enc, model.config.block_size)
    ends = np.cumsum(response_lengths(encoded))[:-1]  # of each response in the list of tokens

    def score_policy(numbers: range) -> dict[str, np.ndarray]:
        part = [encoded[n] for n in numbers]
        return token_arrays(model, cfg, part, enc, device, "the policy")

    policy = score_in_parts(f"{path}.policy", encoded, "policy", score_policy)
    logps = np.split(policy["logps"], ends)
    values = np.split(policy["values"], ends) if model.config.scalar_head else None
    base = model if cfg.lora_rank else None
    refs = checkpoint_logps(cfg, path, "reference", cfg.init, encoded, enc, device, base)
    teacher = None
    if cfg.teacher:
        teacher = checkpoint_logps(cfg, path, "teacher", cfg.teacher, encoded, enc, device)
        teacher = np.split(teacher, ends)
        scores = teacher_scores(logps, teacher)
    else:
        scores = score_rows(cfg, f"{path}.reward", rows, texts, ids, enc, device).ravel()
    ids = list(itertools.chain.from_iterable(ids))
    return Trajectories(
        texts=list(itertools.chain.from_iterable(texts)),
        ids=ids,
        ended=[tokenizer.is_end(enc, y[-1]) for y in ids],
        scores=scores[first_of_equals(ids, count)],
        logps=logps,
        refs=np.split(refs, ends),
        values=values,
        teacher=teacher,
        group_size=count,
    )


def teacher_scores(logps: list[np.ndarray], teacher: list[np.ndarray]) -> np.ndarray:
    """log pi_teacher(y|x) - log pi(y|x) of each response (n K,) float64: what reverse_kl has in
    place of a reward. Its mean is -KL(pi || pi_teacher)."""
    scores = []
    for policy_logps, teacher_logps in zip(logps, teacher):
        scores.append(float(np.sum(teacher_logps.astype(np.float64) - policy_logps)))
    return np.array(scores)


def checkpoint_logps(cfg, path, role, source, encoded, enc, device, policy=None) -> np.ndarray:
    """Log-probabilities of all response tokens under a checkpoint, (tokens,) float32. role:
    "reference" or "teacher". policy: a model with LoRA whose base is that checkpoint."""
    if policy is None:
        dtype = distributed.compute_dtype(cfg, device)
        model, _, _ = GPT.from_checkpoint(source, device, dtype)
    else:
        model = policy
    weights = run_on_rank0(checkpoint.weights_sha256, source)

    def score(numbers: range) -> dict[str, np.ndarray]:
        part = [encoded[n] for n in numbers]
        return token_arrays(model, cfg, part, enc, device, f"the {role} {source}")

    with lora.disabled(model):
        return score_in_parts(f"{path}.{role}", encoded, weights, score)["logps"]


def remove_score_parts(path: str):
    """Remove what `sample_trajectories` has kept, once its result is written or not needed."""
    for scorer in ("policy", "reference", "teacher", "reward"):
        remove_parts(f"{path}.{scorer}")


def token_arrays(model, cfg, rows, enc, device, scorer: str) -> dict[str, np.ndarray]:
    """`token_scores` in one array each, (tokens,) float32. Exits with one line, which names
    `scorer`, if one is not finite."""
    names = {"logps": "log-probabilities under", "values": "values of"}
    arrays = {}
    for name, scores in token_scores(model, rows, cfg, device).items():
        check_finite(scores, rows, enc, f"{names[name]} {scorer}")
        arrays[name] = np.concatenate(scores)
    return arrays


def token_scores(model, rows, cfg, device) -> dict[str, list[np.ndarray]]:
    """{"logps"} of every response token, and "values" if the model has a scalar head: lists of
    (tokens,) float32, one entry per row, its responses after each other."""

    def score(batch: Batch):
        lengths = batch.lengths.sum(1).tolist()
        if not model.config.scalar_head:
            logps = model(batch.idx, batch.targets, **batch.layout())[batch.targets >= 0]
            return [{"logps": y} for y in logps.cpu().split(lengths)]
        logps, values = model.logps_and_values(
            batch.idx, batch.targets, batch.value_positions, **batch.layout()
        )
        logps = logps[batch.targets >= 0].cpu().split(lengths)
        values = values.cpu().split(lengths)
        return [{"logps": y, "values": v} for y, v in zip(logps, values)]

    budget = distributed.micro_batch_tokens(cfg, device)
    results = map_batches(model, rows, budget, device, ppo_batch, score, layout=cfg.layout)
    scores = {}
    for name in results[0]:
        scores[name] = [np.asarray(row[name], dtype=np.float32) for row in results]
    return scores


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
    """(the arrays of `rollout_names`, (tokens,) float32, response after response, metrics) of a
    round's samples."""
    lengths = np.array([len(y) for y in samples.ids])
    logps, refs = np.concatenate(samples.logps), np.concatenate(samples.refs)  # (tokens,)
    kl_coef = scaling["kl_coef"] if cfg.kl_in == "reward" else 0.0
    rewards = -kl_coef * (logps.astype(np.float64) - refs)  # of each token
    scores = samples.scores  # of each response
    if cfg.advantage == "gae" and cfg.whiten_rewards:
        scores = (scores - scaling["mean"]) / scaling["std"]
    scores = scores - cfg.missing_eos_penalty * ~np.array(samples.ended)
    arrays = {"logps": logps}
    if cfg.advantage == "gae":
        more, metrics = value_advantages(cfg, samples.values, lengths, rewards, scores)
        arrays |= more
    elif cfg.advantage == "reverse_kl":
        arrays["advantages"] = rewards + np.concatenate(samples.teacher) - logps
        metrics = {"return": float(arrays["advantages"].sum() / len(lengths))}
    else:
        starts = np.cumsum(lengths) - lengths
        totals = np.add.reduceat(rewards, starts) + scores  # R of each response
        totals = totals[first_of_equals(samples.ids, samples.group_size)]
        of_group = group_advantages(totals.reshape(-1, samples.group_size), cfg.advantage)
        arrays["advantages"] = np.repeat(of_group.ravel(), lengths)
        metrics = {"return": float(totals.mean())}
    if cfg.kl_in == "loss":
        arrays["refs"] = refs
    metrics["kl_coef"] = scaling["kl_coef"]
    return {name: array.astype(np.float32) for name, array in arrays.items()}, metrics


def group_advantages(rewards: np.ndarray, estimator: str) -> np.ndarray:
    """Advantages of K samples of each prompt, from the group alone. rewards (n, K) -> (n, K).

    grpo      (R - mean) / (std + 1e-4), std with K - 1 (arXiv 2402.03300, section 4.1.2)
    dr_grpo   R - mean (2503.20783)
    rloo      R - the mean of the others = K / (K - 1) (R - mean) (2402.14740)
    """
    K = rewards.shape[1]
    rewards = rewards - rewards[:, :1]  # exactly 0 where all are equal
    centered = rewards - rewards.mean(1, keepdims=True)
    if estimator == "grpo":
        return centered / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)
    if estimator == "rloo":
        return centered * K / (K - 1)
    if estimator == "dr_grpo":
        return centered
    raise ValueError(f"{estimator} is no advantage of a group")


def first_of_equals(ids: list[list[int]], K: int) -> np.ndarray:
    """(n K,) for each sample the number of the first one of its prompt that equals it. What that
    one has, all have: another place in a batch rounds their log-probabilities differently.

    ids: of n K samples, those of a prompt after each other.
    """
    first = []
    for i, y in enumerate(ids):
        start = i - i % K
        first.append(start + ids[start : i + 1].index(y))
    return np.array(first)


def value_advantages(
    cfg, values: list[np.ndarray], lengths: np.ndarray, token_rewards, scores
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """({"values", "advantages", "returns"} (tokens,), metrics) by `gae`.

    lengths, scores (n,): of each response; its score is added to the reward of its last token.
    token_rewards (tokens,).
    """
    n, T = len(lengths), lengths.max()
    inside = np.arange(T) < lengths[:, None]  # (n, T)
    rewards, padded_values = np.zeros((n, T)), np.zeros((n, T))
    rewards[inside] = token_rewards
    rewards[np.arange(n), lengths - 1] += scores
    padded_values[inside] = np.concatenate(values)
    padded = gae(rewards, padded_values, lengths, cfg.discount, cfg.gae_lambda)
    returns = (padded + padded_values)[inside]
    values, advantage = padded_values[inside], padded[inside]
    metrics = {
        "explained_variance": float(1 - np.var(returns - values) / max(np.var(returns), 1e-12)),
        "value": float(values.mean()),
        "return": float(rewards.sum(1).mean()),
    }
    if cfg.whiten_advantages:
        advantage = whiten(advantage)
    return {"values": values, "advantages": advantage, "returns": returns}, metrics


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


def sample_report(samples: Trajectories, rows=()) -> dict[str, float]:
    """Metrics of sampled responses.

    reward, reward_std, reward_se   as the scorer gives it, with deviation and standard error;
                                    reverse_kl: see `teacher_scores`
    kl, kl_se                       KL(pi || pi_ref) of a response: log pi - log pi_ref summed
                                    over its tokens, with standard error
    kl_token                        mean of k3 over tokens
    entropy                         mean of -log pi over the sampled tokens
    length, ended                   mean tokens; share that ended with end-of-text
    exact_match                     with the first response of the data's `rows`, if all have one
    signal                          several samples of a prompt: share of the prompts whose samples
                                    have different scores
    score_best, score_worst         mean over prompts of the best and the worst score

    Standard errors are those of the prompts' means.
    """
    logps = torch.from_numpy(np.concatenate(samples.logps)).double()
    refs = torch.from_numpy(np.concatenate(samples.refs)).double()
    kl = []
    for logp, ref in zip(samples.logps, samples.refs):
        kl.append(float(np.sum(logp.astype(np.float64) - ref)))
    K = samples.group_size
    kl, scores = np.array(kl).reshape(-1, K), samples.scores.reshape(-1, K)
    n = len(kl)
    k3 = kl_k3(logps, refs)
    report = {
        "reward": float(scores.mean()),
        "reward_std": float(scores.std()),
        "reward_se": float(scores.mean(1).std() / n**0.5),
        "kl": float(kl.mean()),
        "kl_se": float(kl.mean(1).std() / n**0.5),
        "kl_token": float(k3.mean()),
        "entropy": float(-logps.mean()),
        "length": len(logps) / (n * K),
        "ended": float(np.mean(samples.ended)),
    }
    if rows and all(row.get("responses") for row in rows):
        right = []
        for i, text in enumerate(samples.texts):
            right.append(same_answer(text, rows[i // K]["responses"][0]))
        report["exact_match"] = float(np.mean(right))
    if K > 1:
        report["signal"] = float(np.mean(np.ptp(scores, axis=1) > 0))
        report["score_best"] = float(scores.max(1).mean())
        report["score_worst"] = float(scores.min(1).mean())
    return report
