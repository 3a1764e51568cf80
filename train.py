"""The trainer: config -> round -> collect -> fit.

    python train.py config/demo_sft.py --lr=1e-3                           one process
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

import checkpoint
import config
import launch
import parallel
import ppo
from begin import begin, with_template
from board import sending
from config import per_round
from calibration import calibration
from data import (
    batch_indices,
    batch_rows,
    first_outside,
    read_meta,
    reward_batch,
    read_stream,
    row_tokens,
    split_by_tokens,
    stream_batch,
    tokenizer,
    tokenizer_path,
)
from eval import (
    loss_metrics,
    ranking_metrics,
    reward_metrics,
    reward_scores,
    run,
    score,
    stream_loss,
    stream_parts,
)
from log import describe, make_log
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
from optim import lr_factor, make_optimizers
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
        cfg.kind,
        ranks=batch["ranks"],
        depth=cfg.depth or None,
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
        cfg.kind,
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
        clip=cfg.clip,
        value_clip=cfg.value_clip,
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


def micro_batches(cfg, round, step, train, model_config, device, eot):
    """This rank's micro-batches of a step, a function of (data, seed, round, step): as many on every rank, of like size."""
    world, rank = parallel.world(), parallel.rank()
    budget, seed = parallel.micro_batch_tokens(cfg, device), cfg.seed + 1000 * round
    if cfg.stage == "pretrain":
        for part in stream_parts(cfg, model_config.block_size, device):
            yield stream_batch(
                train,
                model_config.block_size,
                cfg.batch_size,
                seed,
                step,
                model_config.vocab_size,
                part,
                eot if cfg.documents_apart else None,
            )
        return
    tokens = {
        i: row_tokens(train[i], cfg.layout)
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


def parts(cfg, train):
    """What a step is made of, [(config, data, weight, objective)]: the round's rows, and the pretraining stream beside them if
    the config asks, as a stage of its own would take it."""
    mine = [(cfg, train, 1.0, OBJECTIVES[cfg.stage])]
    if cfg.pretrain_coef:
        other = config.beside(cfg)
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


def steps_of_round(cfg, train):
    return cfg.max_steps or math.ceil(cfg.epochs * len(train) / cfg.batch_size)


# ------------------------------------------------------------------------------------------------------------- the fit


def fit(cfg, round, model, enc, tokenizer_name, train, val, start, device, log):
    """Train one round from step `start` to its last. The one loop, the one step."""
    steps = steps_of_round(cfg, train)
    beta, lr = per_round(cfg.beta, round), per_round(cfg.lr, round)
    optimizers = make_optimizers(model, cfg, lr, device)
    one_run = cfg.stage == "ppo"  # whose rounds are some steps each of one optimisation
    before = parallel.agree(checkpoint.latest(cfg.out_dir))
    history = checkpoint.read_meta(before)["history"] if before else {"skipped": 0, "losses": []}
    if start or one_run and round:
        checkpoint.resume(before, model, optimizers)
    else:
        history["losses"] = []
    params = list(model.parameters())
    mix = parts(cfg, train)
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
                part[0], round, step, part[1], model.config, device, enc.eot_token
            )
        ],
        range(start, steps),
    )
    for step in range(start, steps + 1):
        parallel.at(f"round {round} step {step}")
        if watched(cfg, round, step, steps) and (step > start or not start):
            held_out = figures(cfg, round, step, model, val, device, enc)
            if cfg.keep_best and cfg.keep_best.lstrip("-") not in held_out:
                raise SystemExit(
                    f"config: keep_best {cfg.keep_best!r} is no held-out figure; there are {', '.join(held_out)}"
                )
            log({"kind": "eval", "round": round, "step": step} | held_out)
        stop = step > start and bool(record["stop"])
        if (step % cfg.save_interval == 0 or step == steps or stop) and step > start:
            settle(saving, cfg, round, step, log)
            saving = checkpoint.save(
                cfg.out_dir,
                round,
                step,
                model,
                optimizers,
                cfg,
                enc,
                tokenizer_name,
                held_out if watched(cfg, round, step, steps) else {},
                history,
            )
        if step == steps or stop:
            settle(saving, cfg, round, step, log, last=True)
            launch.stop_if_asked()
            break

        # ---- one training step
        began = time.time()
        torch.manual_seed(
            hash((cfg.seed, round, step, parallel.rank())) % 2**62
        )  # dropout is a function of the step
        model.train()
        batches = next(loader)  # [(its part of the mix, batch)]
        asked = [int((b["targets"] >= 0).sum()) if "targets" in b else 0 for _, b in batches]
        counted = [
            (n, len(b["present"]) if mix[n][0].stage in PER_PROMPT else m)
            for (n, b), m in zip(batches, asked)
        ]
        *counts, asked, tokens = parallel.total(
            [sum(m for part, m in counted if part == n) for n in range(len(mix))]
            + [sum(asked), sum(b["tokens"] for _, b in batches)],
            device,
        )
        sums = {}
        for n, batch in batches:
            of, _, weight, objective = mix[n]
            output, batch = run(model, batch, device, needs_logits(of))
            loss, metrics = objective(output, batch, at_step(of, step, steps), beta)
            backward(
                loss * (weight * parallel.world() / counts[n])
            )  # FSDP means gradients over the ranks
            for name, value in ({"loss": weight * loss.detach()} | metrics).items():
                sums[name] = sums.get(name, 0.0) + value.double() / counts[n]
        norm = parallel.clip_(params, cfg.grad_clip)
        record = dict(
            zip(
                [*sums, "norm", "stop"],
                parallel.total(
                    [*sums.values(), norm / parallel.world(), len(launch.signals)], device
                ),
            )
        )
        if not sound(cfg, round, step, record, history, train, enc, saving, log):
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            continue
        factor = (
            lr_factor(cfg, round * steps + step, cfg.rounds * steps)
            if one_run
            else lr_factor(cfg, step, steps)
        )
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        # ----

        if step == 0 and cfg.stage in STARTS:
            check_start(
                cfg, round, record, [b for n, b in batches if n == 0], beta, counts[0], model, log
            )
        seconds = time.time() - began
        log(
            {"kind": "step", "round": round, "step": step}
            | {name: value for name, value in record.items() if name != "stop"}
            | {
                "lr": lr * factor,
                "ms": 1000 * seconds,
                "tokens_per_second": tokens / seconds,
                "mfu": peak
                and model.flops_per_token(context(batches[0][1]), asked / tokens)
                * tokens
                / seconds
                / peak
                / parallel.world(),
            },
            steps,
        )


def backward(loss):
    """A micro-batch's backward pass. Each reduces its gradients over the ranks: kept back for a step's last one, they would be whole
    on every rank. bench.py's steps, ours and the peers', take it too."""
    loss.backward()


def sound(cfg, round, step, record, history, train, enc, saving, log):
    """Whether a step may be taken. A loss or gradient that is not finite ends the run, or is skipped and counted; a spike is said."""
    loss, usual = (
        record["loss"],
        abs(float(np.median(history["losses"]))) if len(history["losses"]) >= 10 else math.inf,
    )
    finite = math.isfinite(loss) and math.isfinite(record["norm"])
    if finite:
        history["losses"] = [*history["losses"][-49:], loss]
        if not cfg.spike or loss <= cfg.spike * usual:
            return True
    text = f"loss {loss}, gradient norm {record['norm']}; rows: {rows_of(cfg, round, step, train, enc)}"
    if finite:
        log(
            {
                "kind": "warning",
                "round": round,
                "step": step,
                "text": f"more than {cfg.spike} times the median loss of the steps before: {text}",
            }
        )
        return True
    if cfg.nonfinite == "stop":
        settle(saving, cfg, round, step, log)
        raise SystemExit(
            f"round {round} step {step}: {text}; last checkpoint: {checkpoint.latest(cfg.out_dir)}"
        )
    history["skipped"] += 1
    log(
        {
            "kind": "warning",
            "round": round,
            "step": step,
            "skipped": history["skipped"],
            "text": f"this step is skipped: {text}",
        }
    )
    return False


def settle(saving, cfg, round, step, log, last=False):
    """Wait for the save before. One that failed is said; the run goes on, unless there will be no other."""
    failed = checkpoint.finished(saving)
    if failed and last:
        raise SystemExit(
            f"the checkpoint at round {round} step {step} could not be saved ({failed}); the newest there is: {checkpoint.latest(cfg.out_dir)}"
        )
    if failed:
        log(
            {
                "kind": "warning",
                "round": round,
                "step": step,
                "text": f"the checkpoint before this one could not be saved ({failed}); the run goes on",
            }
        )


def context(batch):
    """How many tokens a row of a batch has, for its attention: twice the mean position where rows are ragged."""
    return 2 * float(batch["pos"].float().mean()) + 1 if "pos" in batch else batch["idx"].shape[1]


def check_start(cfg, round, record, batches, beta, count, model, log):
    """At a round's first step the policy is its reference: every implicit reward is 0 and the ranking's nll, if it is full,
    ln K!. A loss that starts elsewhere was scored otherwise than it is trained (with dropout it is). So with a reward model,
    whose head starts at 0, and with PPO, whose policy is the one that sampled."""
    device = next(model.parameters()).device
    expected = (
        parallel.total([sum(STARTS[cfg.stage](b, cfg, beta)[0] for b in batches)], device)[0]
        / count
    )
    loss = record["loss"] - cfg.pretrain_coef * record.get("pretrain_loss", 0.0)
    off = abs(loss - expected)
    log(
        {"kind": "start", "round": round, "step": 0, "loss": loss, "expected": expected}
        | ({"ranking": record["nll"]} if "nll" in record else {})
        | {"off": off}
    )
    if (
        off > (1e-4 if parallel.compute_dtype(cfg, device) == torch.float32 else 0.05)
        and not model.config.dropout
    ):
        log(
            {
                "kind": "warning",
                "round": round,
                "step": 0,
                "text": f"the round starts at {loss:.5f}, not at {expected:.5f}: policy and reference are not the same",
            }
        )


STARTS = {  # the objective of what the model gives at a round's first step
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


def rows_of(cfg, round, step, train, enc):
    """The prompts of a step's global batch, as text."""
    if cfg.stage == "pretrain":
        return "windows of the stream"
    return [
        enc.decode(train[i]["prompt"])[-60:]
        for i in batch_indices(len(train), cfg.batch_size, cfg.seed + 1000 * round, step)
    ]


def watched(cfg, round, step, steps):
    """Whether the model is evaluated at a step. PPO's held-out figures are samples, taken at the beginning and at the end of rounds."""
    if cfg.stage == "ppo":
        return (
            round == step == 0
            or step == steps
            and ((round + 1) % cfg.eval_interval == 0 or round + 1 == cfg.rounds)
        )
    return step % cfg.eval_interval == 0 or step == steps


def figures(cfg, round, step, model, val, device, enc):
    """The held-out figures of a round's stage, and of the stream beside it."""
    if cfg.pretrain_coef:
        other = config.beside(cfg)
        stream = evaluate(
            other, round, model, read_stream(other.data, "val"), device, enc.eot_token
        )
        return figures(replace(cfg, pretrain_coef=0.0), round, step, model, val, device, enc) | {
            "pretrain_loss": stream["val_loss"]
        }
    return (
        ppo.evaluate(cfg, round, step, model, val, enc, device)
        if cfg.stage == "ppo"
        else evaluate(cfg, round, model, val, device, enc.eot_token)
    )


def evaluate(cfg, round, model, val, device, eot):
    """The held-out figures of a stage; val_loss is plain cross-entropy, whatever is trained."""
    if cfg.stage == "pretrain":
        return {
            "val_loss": stream_loss(model, val, cfg, device, eot if cfg.documents_apart else None)
        }
    if cfg.stage == "reward":
        return reward_metrics(
            reward_scores(
                model, val, parallel.micro_batch_tokens(cfg, device), device, layout=cfg.layout
            ),
            val,
        )
    if cfg.calibration:
        return calibration(model, val, parallel.micro_batch_tokens(cfg, device), device)
    logps = score(model, val, parallel.micro_batch_tokens(cfg, device), device, layout=cfg.layout)
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
    return ranking_metrics(logps, refs, rows, per_round(cfg.beta, round), names)


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
        data = read_meta(config.beside(cfg).data, [])
        if data["tokenizer_sha256"] != tokenizer.fingerprint(enc):
            raise SystemExit(
                f"{config.beside(cfg).data} was written with the tokenizer {data['tokenizer']}, the model has another ({name})"
            )
        for split in ("train", "val"):
            tokens = read_stream(config.beside(cfg).data, split)
            first = min(
                parallel.gather(
                    first_outside(tokens, enc.n_vocab, parallel.rank(), parallel.world())
                )
            )
            if first < len(tokens):
                raise SystemExit(
                    f"{config.beside(cfg).data}/{split}.bin: token id {tokens[first]} at position {first} is outside the vocabulary of {enc.n_vocab}"
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
    model = parallel.wrap(model, device, dtype, cfg)
    if path:
        checkpoint.load_weights(path, model)
    else:
        model.init_weights(cfg.seed, parallel.copy_)
    return model, enc, name


def main(argv):
    began = time.time()
    cfg = with_template(config.load(argv))
    device = parallel.setup(cfg)
    launch.join(device, cfg.timeout)
    dtype = parallel.compute_dtype(cfg, device)
    at, settings = begin(cfg)
    if parallel.rank() == 0:
        describe(cfg, settings, at, device, dtype)
    model, enc, tokenizer_name = build(cfg, device, dtype)
    say = functools.partial(print, flush=True) if parallel.rank() == 0 else lambda text: None
    say(
        f"{cfg.out_dir}: {cfg.stage}, {model.num_params() / 1e6:.2f}M parameters, {device.type} x {parallel.world()}, {dtype}, "
        f"float32 products {torch.get_float32_matmul_precision()}"
    )
    with sending(cfg, at) as send:
        log = make_log(cfg, at, began, send)
        for round in range(at[0], cfg.rounds):
            parallel.at(f"round {round}, collecting")
            train, val, report = (ppo.collect if cfg.stage == "ppo" else collect)(
                cfg, round, model, enc, device, dtype, say
            )
            start = max(0, at[1]) if round == at[0] else 0
            launch.stop_if_asked()
            if report and not start:
                log({"kind": "collect", "round": round, "step": 0} | report)
            if start < steps_of_round(cfg, train):
                fit(cfg, round, model, enc, tokenizer_name, train, val, start, device, log)
            if cfg.keep_rounds:
                checkpoint.prune(cfg.out_dir, round - cfg.keep_rounds)
        say(f"{cfg.out_dir}: done, {checkpoint.latest(cfg.out_dir)}")


if __name__ == "__main__":
    sys.exit(launch.run(main, sys.argv[1:]))
