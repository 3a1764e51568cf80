"""The trainer: config -> round -> collect -> fit.

    python train.py config/demo/sft.py --lr=1e-3                           one process
    torchrun --nproc_per_node=8 train.py config/spin_k3.py                 FSDP2 over eight

Started again, the same command goes on where it stopped. `python train.py --help` lists the settings.
"""

import functools
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

os.environ.setdefault(
    "TORCH_CPP_LOG_LEVEL", "ERROR"
)  # before torch is loaded: of a rank that leaves it says a page

import numpy as np
import torch

from nanospin import checkpoint
from nanospin import config
from nanospin import elastic
from nanospin import distributed
import ppo
from nanospin.preflight import prepare_run, resolve_template
from nanospin.wandb_logger import wandb_sender
from nanospin.config import per_round
from studies.taylor.calibration import calibration
from data.batch import (
    batch_indices,
    batch_rows,
    reward_batch,
    count_row_tokens,
    split_by_tokens,
    stream_batch,
)
from data.folder import find_invalid_token, read_meta, read_stream, tokenizer_path
from data import tokenizer
from eval import (
    loss_metrics,
    ranking_metrics,
    reward_metrics,
    reward_scores,
    forward_batch,
    response_logprobs,
    stream_loss,
    stream_micro_batches,
)
from nanospin.metrics_logger import write_config, make_logger
from loss import (
    focal_nll,
    ppo_loss,
    preference_loss,
    reward_loss,
    sequence_logprobs,
    smoothed_nll,
    taylor_nll,
)
from model import GPT, GPTConfig
from nanospin.optim import lr_factor, make_optimizers
from rollout import collect, prepare_teacher

PEAK_FLOPS = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}  # dense bfloat16


# ------------------------------------------------------------------------------------------------------ the objectives
# the model's output for a batch, logps of its targets -> the loss summed over what is counted, and metrics summed alike


def token_objective(logps, batch, cfg, beta):
    """Next-token loss, counted by target token. logps are the logits (N, T, V) where the loss needs them."""
    asked = batch["targets"] >= 0
    if needs_logits(cfg):
        return smoothed_nll(
            logps[asked], batch["targets"][asked], cfg.label_smoothing, cfg.confidence_penalty
        ).sum(), {}
    return (
        focal_nll(logps[asked], cfg.focal)
        if cfg.focal
        else taylor_nll(logps[asked], cfg.taylor_order)
    ).sum(), {}


def needs_logits(cfg):
    return cfg.stage in ("pretrain", "sft") and bool(cfg.label_smoothing or cfg.confidence_penalty)


def ranking_objective(logps, batch, cfg, beta):
    """Preference loss, counted by prompt."""
    B, K = batch["present"].shape
    policy = sequence_logprobs(logps, batch["seq"], B * K).view(B, K)
    return sum_over_rows(policy, batch, cfg, beta)


def sum_over_rows(policy, batch, cfg, beta):
    loss, metrics = preference_loss(
        policy,
        batch["ref"],
        batch["present"],
        beta,
        cfg.loss_type,
        ranks=batch["ranks"],
        depth=cfg.rank_depth or None,
        label_smoothing=cfg.label_smoothing,
        taylor_order=cfg.taylor_order,
        nll_coef=cfg.nll_coef,
        margin=cfg.margin,
        lengths=batch["lengths"],
    )
    B = len(policy)
    return loss * B, {name: value * B for name, value in metrics.items()}


def reward_objective(scores, batch, cfg, beta):
    """A reward model's loss on the scores (r,) of the responses that are there, counted by prompt."""
    B, K = batch["present"].shape
    scores = scores.new_zeros(B * K).index_put((batch["slot"],), scores).view(B, K)
    loss, metrics = reward_loss(
        scores,
        batch["present"],
        cfg.loss_type,
        ranks=batch["ranks"],
        gaps=batch.get("gaps"),
        score_margin=cfg.score_margin,
        center_coef=cfg.center_coef,
    )
    return loss * B, {name: value * B for name, value in metrics.items()}


def ppo_objective(output, batch, cfg, beta):
    """PPO's loss, counted by token."""
    logps, values = output
    loss, metrics = ppo_loss(
        logps[batch["targets"] >= 0],
        values,
        *(batch[name] for name in ("old_logps", "old_values", "advantages", "returns")),
        clip=cfg.clip_range,
        value_clip=cfg.value_clip_range,
        value_coef=cfg.value_coef,
        entropy_coef=cfg.entropy_coef,
    )
    return loss * len(values), {name: value * len(values) for name, value in metrics.items()}


def stream_objective(logps, batch, cfg, beta):
    """The pretraining loss beside another, counted by token."""
    loss, _ = token_objective(logps, batch, cfg, beta)
    return loss, {"pretrain_loss": loss.detach()}


OBJECTIVES = {
    "pretrain": token_objective,
    "sft": token_objective,
    "reward": reward_objective,
    "preference": ranking_objective,
    "spin": ranking_objective,
    "ppo": ppo_objective,
}
PER_PROMPT = (
    "reward",
    "preference",
    "spin",
)  # whose losses are counted by prompt, the others' by token


# ----------------------------------------------------------------------------------------------------------- the batch


def micro_batches(cfg, round_id, step, train, model_config, device, eot):
    """This rank's micro-batches of a step, a function of (data, seed, round, step): as many on every rank, of like size."""
    world, rank = distributed.world_size(), distributed.rank()
    budget, seed = distributed.micro_batch_tokens(cfg, device), cfg.seed + 1000 * round_id
    if cfg.stage == "pretrain":
        for part in stream_micro_batches(cfg, model_config.block_size, device):
            yield stream_batch(
                train,
                model_config.block_size,
                cfg.batch_size,
                seed,
                step,
                model_config.vocab_size,
                part,
                eot if cfg.document_mask else None,
            )
        return
    tokens = {
        i: count_row_tokens(train[i], cfg.layout)
        for i in batch_indices(len(train), cfg.batch_size, seed, step)
    }
    indices = sorted(batch_indices(len(train), cfg.batch_size, seed, step), key=tokens.get)
    dealt = [indices[r::world] for r in range(world)]
    n = min(
        len(indices) // world,
        max(math.ceil(sum(tokens[i] for i in mine) / budget) for mine in dealt),
    )
    for part in split_by_tokens([tokens[i] for i in dealt[rank]], n):
        rows = [train[dealt[rank][i]] for i in part]
        batch = MAKE_BATCH.get(cfg.stage, batch_rows)(rows, cfg.layout)
        K = batch["present"].shape[1]
        for key, name in (("ref", "ref"), ("scores", "gaps")):
            if key in rows[0]:
                batch[name] = torch.tensor(
                    [row[key] + [0.0] * (K - len(row[key])) for row in rows], dtype=torch.float32
                )
        yield batch


MAKE_BATCH = {"reward": reward_batch, "ppo": ppo.ppo_batch}


def loss_terms(cfg, train):
    """What a step is made of, [(config, data, weight, objective)]: the round's rows, and the pretraining stream beside them if
    the config asks, as a stage of its own would take it."""
    mine = [(cfg, train, 1.0, OBJECTIVES[cfg.stage])]
    if cfg.pretrain_coef:
        other = config.pretrain_config(cfg)
        mine.append((other, read_stream(other.data, "train"), cfg.pretrain_coef, stream_objective))
    return mine


def prefetch(make, steps):
    """make(step) of each step, the next one made by another thread while this one is worked on."""
    with ThreadPoolExecutor(1) as thread:
        coming = None
        for step in steps:
            now, coming = (
                coming or thread.submit(make, step),
                thread.submit(make, step + 1) if step + 1 in steps else None,
            )
            yield now.result()


def at_step(cfg, step, steps):
    """The config with n of T_n at a step."""
    if cfg.taylor_end is None:
        return cfg
    return replace(
        cfg,
        taylor_order=cfg.taylor_order
        + (cfg.taylor_end - cfg.taylor_order) * step / max(1, steps - 1),
    )


def num_steps_of_round(cfg, train):
    return cfg.max_steps or math.ceil(cfg.epochs * len(train) / cfg.batch_size)


# ------------------------------------------------------------------------------------------------------------- the fit


def fit(cfg, round_id, model, enc, tokenizer_name, train, val, start, device, log):
    """Train one round from step `start` to its last. The one loop, the one step."""
    steps = num_steps_of_round(cfg, train)
    beta, lr = per_round(cfg.beta, round_id), per_round(cfg.lr, round_id)
    optimizers = make_optimizers(model, cfg, lr, device)
    one_run = cfg.stage == "ppo"  # whose rounds are some steps each of one optimisation
    before = distributed.broadcast_from_rank0(checkpoint.latest(cfg.out_dir))
    history = checkpoint.read_meta(before)["history"] if before else {"skipped": 0, "losses": []}
    if start or one_run and round_id:
        checkpoint.resume(before, model, optimizers)
    else:
        history["losses"] = []
    params = list(model.parameters())
    mix = loss_terms(cfg, train)
    peak = next(
        (
            f
            for chip, f in PEAK_FLOPS.items()
            if device.type == "cuda" and chip in torch.cuda.get_device_name(device)
        ),
        None,
    )
    saving, held_out = None, {}
    loader = prefetch(
        lambda step: [
            (n, b)
            for n, part in enumerate(mix)
            for b in micro_batches(
                part[0], round_id, step, part[1], model.config, device, enc.eot_token
            )
        ],
        range(start, steps),
    )
    for step in range(start, steps + 1):
        distributed.heartbeat.set_stage(f"round {round_id} step {step}")
        if should_evaluate(cfg, round_id, step, steps) and (step > start or not start):
            held_out = evaluate_all(cfg, round_id, step, model, val, device, enc)
            if cfg.keep_best and cfg.keep_best.lstrip("-") not in held_out:
                raise SystemExit(
                    f"config: keep_best {cfg.keep_best!r} is no held-out figure; there are {', '.join(held_out)}"
                )
            log({"kind": "eval", "round": round_id, "step": step} | held_out)
        stop = step > start and bool(record["stop"])
        if (step % cfg.save_interval == 0 or step == steps or stop) and step > start:
            wait_for_save(saving, cfg, round_id, step, log)
            saving = checkpoint.save(
                cfg.out_dir,
                round_id,
                step,
                model,
                optimizers,
                cfg,
                enc,
                tokenizer_name,
                held_out if should_evaluate(cfg, round_id, step, steps) else {},
                history,
            )
        if step == steps or stop:
            wait_for_save(saving, cfg, round_id, step, log, last=True)
            elastic.exit_if_signalled()
            break

        # ---- one training step
        began = time.time()
        torch.manual_seed(
            hash((cfg.seed, round_id, step, distributed.rank())) % 2**62
        )  # dropout is a function of the step
        model.train()
        batches = next(loader)  # [(its part of the mix, batch)]
        asked = [int((b["targets"] >= 0).sum()) if "targets" in b else 0 for _, b in batches]
        counted = [
            (n, len(b["present"]) if mix[n][0].stage in PER_PROMPT else m)
            for (n, b), m in zip(batches, asked)
        ]
        *counts, asked, tokens = distributed.all_reduce_sum(
            [sum(m for part, m in counted if part == n) for n in range(len(mix))]
            + [sum(asked), sum(b["tokens"] for _, b in batches)],
            device,
        )
        sums = {}
        for n, batch in batches:
            of, _, weight, objective = mix[n]
            output, batch = forward_batch(model, batch, device, needs_logits(of))
            loss, metrics = objective(output, batch, at_step(of, step, steps), beta)
            backward(
                loss * (weight * distributed.world_size() / counts[n])
            )  # FSDP means gradients over the ranks
            for name, value in ({"loss": weight * loss.detach()} | metrics).items():
                sums[name] = sums.get(name, 0.0) + value.double() / counts[n]
        norm = distributed.clip_grad_norm_(params, cfg.grad_clip)
        record = dict(
            zip(
                [*sums, "norm", "stop"],
                distributed.all_reduce_sum(
                    [
                        *sums.values(),
                        norm / distributed.world_size(),
                        len(elastic.received_signals),
                    ],
                    device,
                ),
            )
        )
        if not is_finite_step(cfg, round_id, step, record, history, train, enc, saving, log):
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            continue
        factor = (
            lr_factor(cfg, round_id * steps + step, cfg.rounds * steps)
            if one_run
            else lr_factor(cfg, step, steps)
        )
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        # ----

        if step == 0 and cfg.stage in INITIAL_LOSS:
            check_initial_loss(
                cfg,
                round_id,
                record,
                [b for n, b in batches if n == 0],
                beta,
                counts[0],
                model,
                log,
            )
        seconds = time.time() - began
        log(
            {"kind": "step", "round": round_id, "step": step}
            | {name: value for name, value in record.items() if name != "stop"}
            | {
                "lr": lr * factor,
                "ms": 1000 * seconds,
                "tokens_per_second": tokens / seconds,
                "mfu": peak
                and model.flops_per_token(mean_context_length(batches[0][1]), asked / tokens)
                * tokens
                / seconds
                / peak
                / distributed.world_size(),
            },
            steps,
        )


def backward(loss):
    """A micro-batch's backward pass. Each reduces its gradients over the ranks: kept back for a step's last one, they would be whole
    on every rank. bench.py's steps, ours and the peers', take it too."""
    loss.backward()


def is_finite_step(cfg, round_id, step, record, history, train, enc, saving, log):
    """Whether a step may be taken. A loss or gradient that is not finite ends the run, or is skipped and counted; a spike is said."""
    loss, usual = (
        record["loss"],
        abs(float(np.median(history["losses"]))) if len(history["losses"]) >= 10 else math.inf,
    )
    finite = math.isfinite(loss) and math.isfinite(record["norm"])
    if finite:
        history["losses"] = [*history["losses"][-49:], loss]
        if not cfg.loss_spike_factor or loss <= cfg.loss_spike_factor * usual:
            return True
    text = f"loss {loss}, gradient norm {record['norm']}; rows: {prompts_of_step(cfg, round_id, step, train, enc)}"
    if finite:
        log(
            {
                "kind": "warning",
                "round": round_id,
                "step": step,
                "text": f"more than {cfg.loss_spike_factor} times the median loss of the steps before: {text}",
            }
        )
        return True
    if cfg.on_nonfinite == "stop":
        wait_for_save(saving, cfg, round_id, step, log)
        raise SystemExit(
            f"round {round_id} step {step}: {text}; last checkpoint: {checkpoint.latest(cfg.out_dir)}"
        )
    history["skipped"] += 1
    log(
        {
            "kind": "warning",
            "round": round_id,
            "step": step,
            "skipped": history["skipped"],
            "text": f"this step is skipped: {text}",
        }
    )
    return False


def wait_for_save(saving, cfg, round_id, step, log, last=False):
    """Wait for the save before. One that failed is said; the run goes on, unless there will be no other."""
    failed = checkpoint.wait_for_save(saving)
    if failed and last:
        raise SystemExit(
            f"the checkpoint at round {round_id} step {step} could not be saved ({failed}); the newest there is: {checkpoint.latest(cfg.out_dir)}"
        )
    if failed:
        log(
            {
                "kind": "warning",
                "round": round_id,
                "step": step,
                "text": f"the checkpoint before this one could not be saved ({failed}); the run goes on",
            }
        )


def mean_context_length(batch):
    """How many tokens a row of a batch has, for its attention: twice the mean position where rows are ragged."""
    return 2 * float(batch["pos"].float().mean()) + 1 if "pos" in batch else batch["idx"].shape[1]


def check_initial_loss(cfg, round_id, record, batches, beta, count, model, log):
    """At a round's first step the policy is its reference: every implicit reward is 0 and the ranking's nll, if it is full,
    ln K!. A loss that starts elsewhere was scored otherwise than it is trained (with dropout it is). So with a reward model,
    whose head starts at 0, and with PPO, whose policy is the one that sampled."""
    device = next(model.parameters()).device
    expected = (
        distributed.all_reduce_sum(
            [sum(INITIAL_LOSS[cfg.stage](b, cfg, beta)[0] for b in batches)], device
        )[0]
        / count
    )
    loss = record["loss"] - cfg.pretrain_coef * record.get("pretrain_loss", 0.0)
    off = abs(loss - expected)
    log(
        {"kind": "start", "round": round_id, "step": 0, "loss": loss, "expected": expected}
        | ({"ranking": record["nll"]} if "nll" in record else {})
        | {"off": off}
    )
    if (
        off > (1e-4 if distributed.compute_dtype(cfg, device) == torch.float32 else 0.05)
        and not model.config.dropout
    ):
        log(
            {
                "kind": "warning",
                "round": round_id,
                "step": 0,
                "text": f"the round starts at {loss:.5f}, not at {expected:.5f}: policy and reference are not the same",
            }
        )


INITIAL_LOSS = {  # the objective of what the model gives at a round's first step
    "preference": lambda b, cfg, beta: sum_over_rows(b["ref"], b, cfg, beta),
    "spin": lambda b, cfg, beta: sum_over_rows(b["ref"], b, cfg, beta),
    "reward": lambda b, cfg, beta: reward_objective(torch.zeros(len(b["read"])), b, cfg, beta),
    "ppo": lambda b, cfg, beta: ppo_objective(
        (
            torch.zeros(b["targets"].shape).masked_scatter(b["targets"] >= 0, b["old_logps"]),
            b["old_values"],
        ),
        b,
        cfg,
        beta,
    ),
}


def prompts_of_step(cfg, round_id, step, train, enc):
    """The prompts of a step's global batch, as text."""
    if cfg.stage == "pretrain":
        return "windows of the stream"
    return [
        enc.decode(train[i]["prompt"])[-60:]
        for i in batch_indices(len(train), cfg.batch_size, cfg.seed + 1000 * round_id, step)
    ]


def should_evaluate(cfg, round_id, step, steps):
    """Whether the model is evaluated at a step. PPO's held-out figures are samples, taken at the beginning and at the end of rounds."""
    if cfg.stage == "ppo":
        return (
            round_id == step == 0
            or step == steps
            and ((round_id + 1) % cfg.eval_interval == 0 or round_id + 1 == cfg.rounds)
        )
    return step % cfg.eval_interval == 0 or step == steps


def evaluate_all(cfg, round_id, step, model, val, device, enc):
    """The held-out figures of a round's stage, and of the stream beside it."""
    if cfg.pretrain_coef:
        other = config.pretrain_config(cfg)
        stream = evaluate(
            other, round_id, model, read_stream(other.data, "val"), device, enc.eot_token
        )
        return evaluate_all(
            replace(cfg, pretrain_coef=0.0), round_id, step, model, val, device, enc
        ) | {"pretrain_loss": stream["val_loss"]}
    return (
        ppo.evaluate(cfg, round_id, step, model, val, enc, device)
        if cfg.stage == "ppo"
        else evaluate(cfg, round_id, model, val, device, enc.eot_token)
    )


def evaluate(cfg, round_id, model, val, device, eot):
    """The held-out figures of a stage; val_loss is plain cross-entropy, whatever is trained."""
    if cfg.stage == "pretrain":
        return {
            "val_loss": stream_loss(model, val, cfg, device, eot if cfg.document_mask else None)
        }
    if cfg.stage == "reward":
        return reward_metrics(
            reward_scores(
                model, val, distributed.micro_batch_tokens(cfg, device), device, layout=cfg.layout
            ),
            val,
        )
    if cfg.calibration:
        return calibration(model, val, distributed.micro_batch_tokens(cfg, device), device)
    logps = response_logprobs(
        model, val, distributed.micro_batch_tokens(cfg, device), device, layout=cfg.layout
    )
    if cfg.stage == "sft":
        return loss_metrics(logps, val)
    K = logps.shape[1]
    refs = np.array([row["ref"] + [0.0] * (K - len(row["ref"])) for row in val], dtype=np.float32)
    rows = [
        row
        | {
            "responses": row["responses"] + [None] * (K - len(row["responses"])),
            "ranks": row["ranks"] + [K] * (K - len(row["ranks"])),
        }
        for row in val
    ]
    names = cfg.players if cfg.stage == "spin" else [str(k + 1) for k in range(K)]
    return ranking_metrics(logps, refs, rows, per_round(cfg.beta, round_id), names)


# ------------------------------------------------------------------------------------------------------------ the run


def build(cfg, device, dtype):
    """(model, tokenizer, its name) from the newest checkpoint of this run, of `init`, or from scratch. A later stage takes
    shape and tokenizer from the checkpoint; a setting that conflicts ends the run."""
    path = checkpoint.latest(cfg.out_dir) or (cfg.init and checkpoint.resolve(cfg.init))
    given = config.model_settings(cfg)
    if path:
        meta = checkpoint.read_meta(path)
        enc, name = checkpoint.read_tokenizer(path, meta), meta["tokenizer"]
        if (
            cfg.tokenizer
            and tokenizer.fingerprint(tokenizer.load(cfg.tokenizer)) != meta["tokenizer_sha256"]
        ):
            raise SystemExit(f"config: tokenizer {cfg.tokenizer} is not the checkpoint's ({path})")
        shape = meta["model"] | given
    else:
        name = cfg.tokenizer or read_meta(cfg.data, [])["tokenizer"]
        if not name:
            raise SystemExit(
                f"config: from scratch on {cfg.data}, which names no tokenizer: set tokenizer"
            )
        name = cfg.tokenizer or tokenizer_path(cfg.data, name)
        enc = tokenizer.load(name)
        shape = given | {"vocab_size": enc.n_vocab}
    if cfg.stage == "pretrain" or cfg.pretrain_coef:
        data = read_meta(config.pretrain_config(cfg).data, [])
        if data["tokenizer_sha256"] != tokenizer.fingerprint(enc):
            raise SystemExit(
                f"{config.pretrain_config(cfg).data} was written with the tokenizer {data['tokenizer']}, the model has another ({name})"
            )
        for split in ("train", "val"):
            tokens = read_stream(config.pretrain_config(cfg).data, split)
            first = min(
                distributed.all_gather_object(
                    find_invalid_token(
                        tokens, enc.n_vocab, distributed.rank(), distributed.world_size()
                    )
                )
            )
            if first < len(tokens):
                raise SystemExit(
                    f"{config.pretrain_config(cfg).data}/{split}.bin: token id {tokens[first]} at position {first} is outside the vocabulary of {enc.n_vocab}"
                )
    try:
        shape = GPTConfig(**shape | {"scalar": cfg.stage in ("reward", "ppo")})
    except ValueError as e:
        raise SystemExit(f"config: {e}")
    for key in given if path else ():
        if getattr(shape, key) != getattr(GPTConfig(**meta["model"]), key) and key != "dropout":
            raise SystemExit(
                f"config: {key} is {given[key]!r}, but the checkpoint {path} has {getattr(GPTConfig(**meta['model']), key)!r}"
            )
    if cfg.stage == "spin":
        prepare_teacher(cfg, enc, shape.block_size, device, dtype)
    with torch.device("meta"):
        model = GPT(shape)
    model = distributed.prepare_model(model, device, dtype, cfg)
    if path:
        checkpoint.load_weights(path, model)
    else:
        model.init_weights(cfg.seed, distributed.copy_parameter_)
    return model, enc, name


def main(argv):
    began = time.time()
    cfg = resolve_template(config.load(argv))
    device = distributed.setup_device(cfg)
    elastic.join_process_group(device, cfg.timeout)
    dtype = distributed.compute_dtype(cfg, device)
    at, settings = prepare_run(cfg)
    if distributed.rank() == 0:
        write_config(cfg, settings, at, device, dtype)
    model, enc, tokenizer_name = build(cfg, device, dtype)
    say = functools.partial(print, flush=True) if distributed.rank() == 0 else lambda text: None
    say(
        f"{cfg.out_dir}: {cfg.stage}, {model.num_params() / 1e6:.2f}M parameters, {device.type} x {distributed.world_size()}, {dtype}, "
        f"float32 products {torch.get_float32_matmul_precision()}"
    )
    with wandb_sender(cfg, at) as send:
        log = make_logger(cfg, at, began, send)
        for round_id in range(at[0], cfg.rounds):
            distributed.heartbeat.set_stage(f"round {round_id}, collecting")
            train, val, report = (ppo.collect if cfg.stage == "ppo" else collect)(
                cfg, round_id, model, enc, device, dtype, say
            )
            start = max(0, at[1]) if round_id == at[0] else 0
            elastic.exit_if_signalled()
            if report and not start:
                log({"kind": "collect", "round": round_id, "step": 0} | report)
            if start < num_steps_of_round(cfg, train):
                fit(cfg, round_id, model, enc, tokenizer_name, train, val, start, device, log)
            if cfg.keep_rounds:
                checkpoint.prune_rounds(cfg.out_dir, round_id - cfg.keep_rounds)
        say(f"{cfg.out_dir}: done, {checkpoint.latest(cfg.out_dir)}")


if __name__ == "__main__":
    sys.exit(elastic.run(main, sys.argv[1:]))
