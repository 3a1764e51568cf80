"""The trainer: config -> rounds -> collect -> fit.

    python train.py config/demo/sft.py --lr=1e-3              one process
    torchrun --nproc_per_node=8 train.py config/spin_k3.py    eight, sharded by FSDP2

The same command resumes a run that was stopped. `python train.py --help` lists the settings.
"""

import math
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

# must be set before torch is imported; without it a rank that leaves prints a page of errors
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import numpy as np
import torch

import ppo
import rollout
from data import tokenizer
from data.batch import (
    Batch,
    batch_indices,
    batch_rows,
    count_row_tokens,
    ppo_batch,
    reward_batch,
    split_by_tokens,
    stream_batch,
)
from data.folder import read_meta, read_stream, tokenizer_path
from eval import (
    RANKING_METRICS,
    REWARD_METRICS,
    loss_metrics,
    pad_rows_to_K,
    ranking_metrics,
    reward_metrics,
    row_logps,
    row_scores,
    stream_loss,
    window_slices,
)
from loss import (
    OPTION_TYPES,
    REWARD_LOSS_TYPES,
    check_options,
    grpo_loss,
    kl_k3,
    ppo_loss,
    preference_loss,
    reward_loss,
    taylor_nll,
)
from model import GPT, response_logps, response_scores
from nanospin import checkpoint, distributed, elastic, inputs, lock, lora, metrics_logger, preflight
from nanospin import config as config_module
from nanospin.config import (
    Config,
    per_round,
    player_columns,
    pretrain_config,
    samples_policy_itself,
)
from nanospin.distributed import all_reduce_sum, broadcast_from_rank0, run_on_rank0, world_size
from nanospin.mfu import mfu
from nanospin.optim import lr_factor, make_optimizers
from nanospin.tensorboard_logger import tensorboard_sender
from nanospin.wandb_logger import wandb_sender

# ------------------------------------------------------------------------------- objectives
# objective(model, batch, cfg) -> (loss, metrics), both summed over the units of the batch: what a
# mean is taken over, prompts, responses or supervised tokens. STAGES, below, says which.


def count_tokens(batch: Batch, cfg: Config) -> int:
    return batch.num_targets


def count_prompts(batch: Batch, cfg: Config) -> int:
    return batch.num_rows


def count_tokens_or_responses(batch: Batch, cfg: Config) -> int:
    return batch.num_targets if cfg.loss_average == "token" else batch.num_responses


def token_objective(model, batch: Batch, cfg: Config):
    """Next-token loss: cross-entropy, or the Taylor loss T_n (loss.taylor_nll)."""
    logps = model(batch.idx, batch.targets, **batch.layout())  # 0 where there is no target
    return taylor_nll(logps, cfg.taylor_order).sum(), {}


def added_pretrain_objective(model, batch: Batch, cfg: Config):
    """The pretraining loss that pretrain_coef adds to sft or ppo. It is logged by its own name."""
    loss, _ = token_objective(model, batch, cfg)
    return loss, {"pretrain_loss": loss.detach()}


def ranking_objective(model, batch: Batch, cfg: Config):
    """Plackett-Luce on implicit rewards, or another preference loss: K responses in one forward."""
    return ranking_loss(response_logps(model, batch), batch, cfg)


def reward_objective(model, batch: Batch, cfg: Config):
    """Bradley-Terry or Plackett-Luce on the scores of a reward model."""
    return reward_model_loss(response_scores(model, batch), batch, cfg)


def ppo_objective(model, batch: Batch, cfg: Config):
    """Clipped surrogate and entropy; with gae the value loss; with kl_in "loss" the KL to the
    reference."""
    values = None
    if cfg.advantage == "gae":
        logps, values = model.logps_and_values(
            batch.idx, batch.targets, batch.value_positions, **batch.layout()
        )
    else:
        logps = model(batch.idx, batch.targets, **batch.layout())
    if batch.logit_positions is None:  # padded: (N, T)
        logps = logps.flatten().index_select(0, batch.value_positions)
    return policy_gradient_loss(logps, values, batch, cfg)


def ranking_loss(policy_logps, batch: Batch, cfg: Config):
    loss, metrics = preference_loss(
        policy_logps,
        batch.ref_logps,
        batch.response_mask,
        cfg.beta,
        cfg.loss_type,
        ranks=batch.ranks,
        lengths=batch.lengths,
        data_scores=batch.data_scores,
        **loss_options(cfg),
    )
    return as_sums(batch.num_rows, loss, metrics)


def loss_options(cfg: Config) -> dict[str, float]:
    """The settings that are options of `preference_loss`."""
    return {name: getattr(cfg, name) for name in OPTION_TYPES}


def reward_model_loss(scores, batch: Batch, cfg: Config):
    loss, metrics = reward_loss(
        scores,
        batch.response_mask,
        cfg.loss_type,
        ranks=batch.ranks,
        data_scores=batch.data_scores,
        score_margin=cfg.score_margin,
        center_coef=cfg.center_coef,
    )
    return as_sums(batch.num_rows, loss, metrics)


def policy_gradient_loss(logps, values, batch: Batch, cfg: Config):
    """logps (m,) of the tokens; values (m,) with gae, else None."""
    options = {
        "clip": cfg.clip_range,
        "clip_high": cfg.clip_range_high or None,
        "entropy_coef": cfg.entropy_coef,
    }
    kl_coef = cfg.kl_coef if cfg.kl_in == "loss" else 0.0
    if cfg.advantage == "gae":
        loss, metrics = ppo_loss(
            logps,
            values,
            batch.old_logps,
            batch.old_values,
            batch.advantages,
            batch.returns,
            value_clip=cfg.value_clip_range,
            value_coef=cfg.value_coef,
            **options,
        )
        if kl_coef:
            kl = kl_k3(logps, batch.token_refs).mean()
            loss = loss + kl_coef * kl
            metrics["kl"] = kl.detach()
    else:
        loss, metrics = grpo_loss(
            logps,
            batch.old_logps,
            batch.advantages,
            batch.response_index,
            batch.lengths.flatten(),
            batch.token_refs,
            kl_coef=kl_coef,
            average=cfg.loss_average,
            max_length=cfg.max_response,
            **options,
        )
    return as_sums(count_tokens_or_responses(batch, cfg), loss, metrics)


def as_sums(n: int, loss, metrics: dict):
    """Means over n units -> sums, so that micro-batches of different sizes can be added up."""
    return loss * n, {name: value * n for name, value in metrics.items()}


# ------------------------------------------------------------------------- terms and batches


@dataclass(eq=False)  # compared by identity, so that it can be a key
class LossTerm:
    """A summand of the loss. There is one, and the pretraining loss beside it if pretrain_coef."""

    cfg: Config
    train: list | np.ndarray  # encoded rows, or a token stream
    val: list | np.ndarray  # held out
    weight: float
    stage: "Stage"
    objective: Callable

    def num_units(self, batch: Batch) -> int:
        """How many prompts, responses or supervised tokens the loss of a batch is a mean over."""
        return self.stage.num_units(batch, self.cfg)


def loss_terms(cfg: Config, train, val, stages: dict) -> list[LossTerm]:
    """The terms of a round. Token streams are opened once: what is put in their place while the
    round lasts is neither trained on nor evaluated."""
    stage = stages[cfg.stage]
    terms = [LossTerm(cfg, train, val, 1.0, stage, stage.objective)]
    if cfg.pretrain_coef:
        other = pretrain_config(cfg)
        streams = [read_stream(other.data, split) for split in ("train", "val")]
        pretrain = stages["pretrain"]
        term = LossTerm(other, *streams, cfg.pretrain_coef, pretrain, added_pretrain_objective)
        terms.append(term)
    return terms


def step_batches(run: "Run", terms, round_id: int, step: int) -> list[tuple[LossTerm, Batch]]:
    """This rank's micro-batches of a step. The global batch, of which they are a share, is a
    function of (data, seed, round, step).

    Every rank has the same number of them, and about the same number of tokens in each.
    """
    batches = []
    for term in terms:
        make = window_batches if term.cfg.stage == "pretrain" else row_batches
        for batch in make(run, term, round_id, step):
            batches.append((term, batch))
    return batches


def round_seed(cfg: Config, round_id: int) -> int:
    """The seed of the order of the training data."""
    return cfg.seed + 1000 * round_id


def window_batches(run: "Run", term: LossTerm, round_id: int, step: int):
    """Windows of a token stream."""
    cfg = term.cfg
    length, vocab_size = run.model.config.block_size, run.model.config.vocab_size
    seed = round_seed(cfg, round_id)
    document_end = run.enc.eot_token if cfg.document_mask else None
    for part in window_slices(cfg, length, run.device):
        yield stream_batch(
            term.train, length, cfg.batch_size, seed, step, vocab_size, part, document_end
        )


def row_batches(run: "Run", term: LossTerm, round_id: int, step: int):
    """Encoded rows, those of similar length together."""
    cfg, rows = term.cfg, term.train
    budget = distributed.micro_batch_tokens(cfg, run.device)
    chosen = batch_indices(len(rows), cfg.batch_size, round_seed(cfg, round_id), step)
    tokens = {i: count_row_tokens(rows[i], cfg.layout) for i in chosen}
    chosen = sorted(chosen, key=tokens.get)
    by_rank = [chosen[rank :: world_size()] for rank in range(world_size())]
    tokens_by_rank = [sum(map(tokens.get, indices)) for indices in by_rank]
    n = min(len(chosen) // world_size(), math.ceil(max(tokens_by_rank) / budget))
    mine = by_rank[distributed.rank()]
    my_tokens = [tokens[i] for i in mine]
    for part in split_by_tokens(my_tokens, n):
        yield term.stage.make_batch([rows[mine[i]] for i in part], cfg.layout)


def prefetch(make: Callable, steps: range):
    """make(step) of each step. A thread makes the next one while this one is trained on."""
    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(make, steps[0]) if steps else None
        for step in steps:
            ready = ahead
            if step + 1 in steps:
                ahead = thread.submit(make, step + 1)
            yield ready.result()


class Meter:
    """Adds up the metrics of micro-batches and ranks: sums over units / number of units."""

    def __init__(self):
        self.sums = {}

    def add(self, sums: dict, denominator: float):
        for name, value in sums.items():
            value = torch.as_tensor(value).double() / denominator
            self.sums[name] = self.sums.get(name, 0.0) + value

    def all_reduce(self, device, flags: list) -> tuple[dict[str, float], list[bool]]:
        """The metrics, and whether any rank has set each of the flags: in one message."""
        sums = all_reduce_sum([*self.sums.values(), *flags], device)
        return dict(zip(self.sums, sums)), [flag > 0 for flag in sums[len(self.sums) :]]


def num_steps_of_round(cfg: Config, train) -> int:
    steps = cfg.epochs * len(train) / cfg.batch_size
    return cfg.max_steps or max(1, math.ceil(steps - 1e-9))  # 0.1 * 30 is above 3 in floating point


# --------------------------------------------------------------------------------- the loop


@dataclass
class Run:
    """What stays the same over the rounds of a run."""

    cfg: Config
    model: GPT
    enc: object  # the tokenizer
    device: torch.device
    log: metrics_logger.MetricsLogger
    saver: checkpoint.Saver
    stages: dict  # STAGES, or those of a study


def fit(run: Run, round_id: int, train, val, start: int):
    """Train one round from step `start` to its end. The only training loop there is."""
    beta, lr = per_round(run.cfg.beta, round_id), per_round(run.cfg.lr, round_id)
    run = replace(run, cfg=replace(run.cfg, beta=beta, lr=lr))
    cfg, model, device = run.cfg, run.model, run.device
    num_steps = num_steps_of_round(cfg, train)
    optimizers = make_optimizers(model, cfg, lr, device)
    history = resume_optimization(run, round_id, start, optimizers) | {"num_steps": num_steps}
    terms = loss_terms(cfg, train, val, run.stages)
    params = list(model.parameters())
    loader = prefetch(
        lambda step: step_batches(run, terms, round_id, step), range(start, num_steps)
    )
    stop = False
    for step in range(start, num_steps + 1):
        distributed.heartbeat.set_stage(f"round {round_id} step {step}")
        eval_metrics = {}
        resumed_here = step == start > 0  # then it was evaluated before the checkpoint
        if should_evaluate(cfg, round_id, step, num_steps) and not resumed_here:
            eval_metrics = evaluate(run, round_id, step, terms)
            run.log.eval(round_id, step, eval_metrics)
            stop_if_not_finite(run, round_id, step, eval_metrics)
        last = step == num_steps or stop
        if step > start and (step % cfg.save_interval == 0 or last):
            run.saver.save(round_id, step, model, optimizers, eval_metrics, history)
        if last:
            run.saver.wait(round_id, step, last=True)
            elastic.exit_if_signalled()
            break

        # one training step
        step_start = time.perf_counter()
        # dropout is a function of (seed, round, step, rank), so that a resumed run repeats it
        torch.manual_seed(hash((cfg.seed, round_id, step, distributed.rank())) % 2**62)
        model.train()
        batches = next(loader)  # this rank's micro-batches: [(LossTerm, Batch)]
        units, num_targets, num_tokens = count_units(terms, batches, device)
        meter = Meter()
        for term, batch in batches:
            loss, sums = term.objective(model, batch.to(device), term.cfg)
            # FSDP averages gradients over the ranks
            backward(loss * (term.weight * world_size() / units[term]))
            meter.add({"loss": term.weight * loss.detach()} | sums, units[term])
        norm = distributed.clip_grad_norm_(params, cfg.grad_clip)
        meter.add({"norm": norm / world_size()}, 1)  # the same on all ranks, which are summed
        flags = [len(elastic.received_signals), lock.noticed()]
        metrics, (stop, lock_in_doubt) = meter.all_reduce(device, flags)
        if lock_in_doubt:
            lock.check()
        accepted = accept_step(run, round_id, step, metrics, history, train)
        factor = schedule_factor(cfg, round_id, step, num_steps)
        for optimizer in optimizers:
            if accepted:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * factor
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if not accepted:
            continue

        if step == 0:
            check_initial_loss(run, round_id, metrics, batches, terms[0], units)
        seconds = time.perf_counter() - step_start
        metrics["lr"] = lr * factor
        metrics["ms"] = 1000 * seconds
        metrics["tokens_per_second"] = num_tokens / seconds
        flops = step_flops(model, batches, num_targets, num_tokens, is_frozen=cfg.lora_rank > 0)
        metrics["mfu"] = mfu(flops, seconds, device)
        run.log.step(round_id, step, metrics, num_steps)


def resume_optimization(run: Run, round_id: int, start: int, optimizers) -> dict:
    """Load the state of the optimizers if the round continues from a checkpoint, or in ppo from the
    round before. Returns what the loop remembers between steps: the number of skipped ones and the
    recent losses."""
    latest = broadcast_from_rank0(checkpoint.latest(run.cfg.out_dir))
    history = {"skipped": 0, "losses": []}
    if latest:
        history = run_on_rank0(checkpoint.read_meta, latest)["history"]
    # rounds of ppo are parts of one optimization; the others begin anew
    continues = run.cfg.stage == "ppo" and round_id > 0
    if start or continues:
        checkpoint.load_optimizers(latest, run.model, optimizers)
    else:
        history["losses"] = []
    return history


def count_units(terms, batches, device) -> tuple[dict[LossTerm, float], float, float]:
    """Over all ranks: the units of each loss term, supervised tokens, tokens read."""
    units = dict.fromkeys(terms, 0)
    num_targets = num_tokens = 0
    for term, batch in batches:
        units[term] += term.num_units(batch)
        num_targets += batch.num_targets
        num_tokens += batch.num_tokens
    *totals, num_targets, num_tokens = all_reduce_sum(
        [*units.values(), num_targets, num_tokens], device
    )
    return dict(zip(terms, totals)), num_targets, num_tokens


def backward(loss):
    """The backward pass of a micro-batch, the only one in this repository. Each one reduces the
    gradients over the ranks. FSDP2 could do so once a step, but would hold whole gradients."""
    loss.backward()


def schedule_factor(cfg, round_id, step, num_steps) -> float:
    """Share of the learning rate. The schedule spans a round, and for ppo all of them."""
    if cfg.stage == "ppo":
        return lr_factor(cfg, round_id * num_steps + step, cfg.rounds * num_steps)
    return lr_factor(cfg, step, num_steps)


def accept_step(run: Run, round_id, step, metrics, history, train) -> bool:
    """Whether to take the optimizer step. A loss or gradient that is not finite ends the run, or is
    skipped and counted. A loss spike is only reported. Each names the rows of the batch."""
    cfg, loss, norm = run.cfg, metrics["loss"], metrics["norm"]

    def describe() -> str:
        rows = prompts_of_step(cfg, round_id, step, train, run.enc)
        return f"loss {loss}, gradient norm {norm}; rows: {rows}"

    if math.isfinite(loss) and math.isfinite(norm):
        if is_spike(loss, history["losses"], cfg.loss_spike_factor):
            text = f"more than {cfg.loss_spike_factor} times the recent median loss: {describe()}"
            run.log.warning(round_id, step, text, during_step=True)
        history["losses"] = [*history["losses"][-49:], loss]
        return True
    if cfg.on_nonfinite == "stop":
        run.saver.wait(round_id, step)
        raise SystemExit(
            f"round {round_id} step {step}: {describe()}; {run.saver.where_to_go_on()}"
        )
    history["skipped"] += 1
    text = f"this step is skipped: {describe()}"
    run.log.warning(round_id, step, text, skipped=history["skipped"], during_step=True)
    return False


def stop_if_not_finite(run: Run, round_id: int, step: int, metrics: dict):
    """End the run if a held-out metric is NaN or infinite: such a step is never saved."""
    name = broadcast_from_rank0(checkpoint.first_not_finite(metrics))
    if name:
        run.saver.wait(round_id, step)
        raise SystemExit(
            f"round {round_id} step {step}: {name} is {metrics[name]}, this step is not saved; "
            f"{run.saver.where_to_go_on()}"
        )


def is_spike(loss: float, recent: list[float], factor: float) -> bool:
    """Whether a loss exceeds the median of the recent ones by a factor; not before there are 10."""
    if not factor or len(recent) < 10:
        return False
    return loss > factor * abs(float(np.median(recent)))


def prompts_of_step(cfg, round_id, step, train, enc):
    """The prompts in a step's global batch, the last 60 characters of each."""
    if cfg.stage == "pretrain":
        return "windows of the stream"
    indices = batch_indices(len(train), cfg.batch_size, round_seed(cfg, round_id), step)
    return [enc.decode(train[i]["prompt"])[-60:] for i in indices]


def check_initial_loss(run: Run, round_id, metrics, batches, term: LossTerm, units: dict):
    """At the first step of a round the policy is the reference, so the loss must be the one at the
    reference's log-probabilities: ln K! for Plackett-Luce and a full ranking. A reward model's
    scores are 0, and PPO's policy is the one that sampled.

    Another loss means that rows are scored in another way than they are trained on.
    """
    if term.stage.initial_loss is None:
        return
    total = 0.0
    for its_term, batch in batches:
        if its_term is term:
            loss, _ = term.stage.initial_loss(batch, term.cfg)
            total += loss
    expected = all_reduce_sum([total], run.device)[0] / units[term]
    loss = metrics["loss"] - run.cfg.pretrain_coef * metrics.get("pretrain_loss", 0.0)
    off = abs(loss - expected)
    dropout = run.model.config.dropout
    report = {"loss": loss, "expected": expected}
    if "nll" in metrics:
        report["ranking"] = metrics["nll"]
    run.log.initial_loss(round_id, report | {"off": off})
    dtype = distributed.compute_dtype(run.cfg, run.device)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    if off > tolerance:
        reason = f"dropout is {dropout}, so this is not checked"
        if not dropout:
            reason = "policy and reference are not the same"
        text = f"the round starts at loss {loss:.5f}, not at {expected:.5f}: {reason}"
        run.log.warning(round_id, 0, text)


# initial_loss(batch, cfg) -> what the objective gives at the first step of a round


def initial_ranking_loss(batch: Batch, cfg: Config):
    return ranking_loss(batch.ref_logps, batch, cfg)


def initial_reward_loss(batch: Batch, cfg: Config):
    return reward_model_loss(torch.zeros(batch.response_mask.shape), batch, cfg)


def initial_ppo_loss(batch: Batch, cfg: Config):
    return policy_gradient_loss(batch.old_logps, batch.old_values, batch, cfg)


def step_flops(
    model, batches, num_targets: float, num_tokens: float, is_frozen: bool = False
) -> float:
    """FLOPs of a step over all ranks. This rank's micro-batches give the mean context length.

    is_frozen: by LoRA. Then a third of the weights' FLOPs, those of their gradients, are not done.
    """
    total = sum(batch.num_tokens * mean_context_length(batch) for _, batch in batches)
    context_length = total / sum(batch.num_tokens for _, batch in batches)
    fraction = num_targets / num_tokens
    flops = model.flops_per_token(context_length, fraction)
    if is_frozen:
        attention = model.flops_per_token(2 * context_length, fraction) - flops  # linear in it
        flops -= (flops - attention) / 3
    return flops * num_tokens


def mean_context_length(batch: Batch) -> float:
    """The context length that attention's FLOPs are counted with: twice the mean position."""
    if batch.pos is None:
        return batch.idx.shape[1]
    return 2 * float(batch.pos.float().mean()) + 1


# ------------------------------------------------------------------------------- evaluation
# evaluator(run, round_id, step, train, val) -> metrics of held-out data. val_loss is plain
# cross-entropy, whatever is trained.


def evaluate_pretrain(run: Run, round_id: int, step: int, train, val) -> dict:
    return {"val_loss": validation_stream_loss(run, run.cfg, val)}


def validation_stream_loss(run: Run, cfg: Config, stream) -> float:
    document_end = run.enc.eot_token if cfg.document_mask else None
    return stream_loss(run.model, stream, cfg, run.device, document_end)


def evaluate_sft(run: Run, round_id: int, step: int, train, val) -> dict:
    return loss_metrics(validation_logps(run, val), val)


def evaluate_reward(run: Run, round_id: int, step: int, train, val) -> dict:
    cfg = run.cfg
    budget = distributed.micro_batch_tokens(cfg, run.device)
    return reward_metrics(row_scores(run.model, val, budget, run.device, layout=cfg.layout), val)


def evaluate_ranking(run: Run, round_id: int, step: int, train, val) -> dict:
    cfg = run.cfg
    logps = validation_logps(run, val)
    K = logps.shape[1]
    rows = pad_rows_to_K(val, K)
    refs = np.array([row["ref"] for row in rows], dtype=np.float32)
    players = [str(k + 1) for k in range(K)]
    if cfg.stage == "spin":
        players = player_columns(cfg)
    metrics = ranking_metrics(logps, refs, rows, cfg.beta, players)
    if not samples_policy_itself(cfg):
        metrics.pop("kl_from_ref", None)  # it would be of other samples than the reference's
    return metrics


def evaluate_ppo(run: Run, round_id: int, step: int, train, val) -> dict:
    return ppo.evaluate(run.cfg, round_id, step, run.model, val, run.enc, run.device)


def validation_logps(run: Run, val) -> np.ndarray:
    """Log-probabilities of the responses of validation rows (rows, K)."""
    cfg = run.cfg
    budget = distributed.micro_batch_tokens(cfg, run.device)
    return row_logps(run.model, val, budget, run.device, layout=cfg.layout)


def should_evaluate(cfg, round_id, step, num_steps) -> bool:
    """Every eval_interval steps and at the end of a round. For ppo, whose evaluation samples: at
    the start, every eval_interval rounds and at the end of the run."""
    if cfg.stage == "ppo":
        if step == num_steps:
            return (round_id + 1) % cfg.eval_interval == 0 or round_id + 1 == cfg.rounds
        return round_id == 0 and step == 0
    return step % cfg.eval_interval == 0 or step == num_steps


def evaluate(run: Run, round_id: int, step: int, terms: list[LossTerm]) -> dict:
    """The held-out metrics of a stage, and of the pretraining stream beside it."""
    cfg = run.cfg
    main_term, *added = terms
    metrics = main_term.stage.evaluate(run, round_id, step, main_term.train, main_term.val)
    for term in added:
        metrics["pretrain_loss"] = validation_stream_loss(run, term.cfg, term.val)
    wanted = cfg.keep_best.removeprefix("-")
    if wanted and wanted not in metrics:
        # a ranking may lack a metric once: none of its held-out rows is ranked this time
        may_lack = cfg.stage in ("reward", "preference", "spin") and main_term.stage.metrics
        if not may_lack:
            raise SystemExit(preflight.unknown_keep_best(cfg, list(metrics)))
        text = f"this evaluation has no {wanted}, so keep_best does not rate it"
        run.log.warning(round_id, step, text)
    return metrics


# ---------------------------------------------------------------------------------- the stages


@dataclass
class Stage:
    """What a stage is made of. The loop is the same for all."""

    collect: Callable  # (cfg, round_id, model, enc, device, say) -> (train, val, report)
    objective: Callable
    evaluate: Callable
    make_batch: Callable = batch_rows
    num_units: Callable = count_tokens  # (batch, cfg) -> what the loss is a mean over
    initial_loss: Callable | None = None  # what a round's loss starts with, if that is known
    metrics: list[str] = field(default_factory=list)  # that `evaluate` can return; []: not listed


STAGES = {
    "pretrain": Stage(rollout.collect, token_objective, evaluate_pretrain, metrics=["val_loss"]),
    "sft": Stage(rollout.collect, token_objective, evaluate_sft, metrics=["val_loss"]),
    "reward": Stage(
        rollout.collect,
        reward_objective,
        evaluate_reward,
        make_batch=reward_batch,
        num_units=count_prompts,
        initial_loss=initial_reward_loss,
        metrics=REWARD_METRICS,
    ),
    "preference": Stage(
        rollout.collect,
        ranking_objective,
        evaluate_ranking,
        num_units=count_prompts,
        initial_loss=initial_ranking_loss,
        metrics=RANKING_METRICS,
    ),
    "spin": Stage(
        rollout.collect,
        ranking_objective,
        evaluate_ranking,
        num_units=count_prompts,
        initial_loss=initial_ranking_loss,
        metrics=RANKING_METRICS,
    ),
    "ppo": Stage(
        ppo.collect,
        ppo_objective,
        evaluate_ppo,
        make_batch=ppo_batch,
        num_units=count_tokens_or_responses,
        initial_loss=initial_ppo_loss,
        metrics=ppo.METRICS,
    ),
}


# ------------------------------------------------------------------------------------- the run


def resolve_model(cfg, model_class: type, path: str | None = None):
    """(model config, tokenizer, its name, checkpoint) from `path`, the checkpoint that this run
    resumes from, else from `init`, else from scratch (checkpoint None). Settings that contradict a
    checkpoint end the run."""
    resumes = bool(path)
    if not path and cfg.init:
        path = run_on_rank0(checkpoint.resolve, cfg.init)
    if path:
        meta = run_on_rank0(checkpoint.read_meta, path)
        enc, name = checkpoint.read_tokenizer(path, meta), meta["tokenizer"]
        preflight.check_tokenizer(cfg, path, meta)
        saved_config = config_module.model_config_from(
            meta["model"], model_class.config_class, f"{path}/meta.json"
        )
        settings = meta["model"] | cfg.model
        settings["dropout"] = preflight.resolve_dropout(
            cfg, meta["model"].get("dropout", 0.0), resumes
        )
    else:
        name = cfg.tokenizer or data_tokenizer(cfg.data)
        # load_for_data prints a warning: on rank 0 only
        load = tokenizer.load_for_data if distributed.rank() == 0 else tokenizer.load
        enc = load(name)
        settings = cfg.model | {"vocab_size": enc.n_vocab}
    if cfg.stage == "pretrain" or cfg.pretrain_coef:
        preflight.check_stream(pretrain_config(cfg).data, enc, name)

    has_values = cfg.stage == "ppo" and cfg.advantage == "gae"
    settings["scalar_head"] = cfg.stage == "reward" or has_values
    try:
        model_config = model_class.config_class(**settings)
    except ValueError as e:
        raise SystemExit(f"config: {e}")
    if path:
        preflight.check_model_settings(cfg, model_config, saved_config, path)
    return model_config, enc, name, path


def data_tokenizer(folder: str) -> str:
    """The tokenizer that a data folder names."""
    name = read_meta(folder, [])["tokenizer"]
    if not name:
        raise SystemExit(
            f"config: {folder} names no tokenizer, and there is no checkpoint to take one from: "
            "set tokenizer"
        )
    return tokenizer_path(folder, name)


def build_model(cfg, model_class: type, model_config, path, device, dtype, resumes=False) -> GPT:
    """The model, sharded over the ranks, with the weights of a checkpoint or new ones. The scalar
    head starts at zero, unless the run resumes from the checkpoint. With LoRA the weights are those
    of `init`, and only what is trained, adapters and scalar head, is the checkpoint's."""
    with torch.device("meta"):
        model = model_class(model_config)
    base = run_on_rank0(checkpoint.resolve, cfg.init) if cfg.lora_rank else path
    if base:
        checkpoint.check_weights(base, model)
    if cfg.lora_rank:
        lora.add(model, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets, dtype)
    model = distributed.prepare_model(model, device, dtype, cfg)
    if not base:
        model.init_weights(cfg.seed, distributed.copy_parameter_)
        return model
    checkpoint.load_weights(base, model, with_head=resumes and not cfg.lora_rank)
    if cfg.lora_rank and resumes:
        checkpoint.load_adapter(path, model)
    elif cfg.lora_rank:
        lora.init_weights(model, cfg.seed, distributed.copy_parameter_)
    return model


def check_loss_type(cfg: Config):
    """Exit with one line if loss.py does not have the loss, or the loss not an option that is set:
    before responses are sampled for it."""
    if cfg.stage == "reward" and cfg.loss_type not in REWARD_LOSS_TYPES:
        raise SystemExit(
            f"config: stage reward has loss_type {' or '.join(REWARD_LOSS_TYPES)}, not"
            f" {cfg.loss_type!r}"
        )
    if cfg.stage in ("preference", "spin"):
        try:
            check_options(cfg.loss_type, loss_options(cfg))
        except ValueError as e:
            raise SystemExit(f"config: {e}")


def main(
    argv: list[str],
    config_class: type = Config,
    model_class: type = GPT,
    stages: dict[str, Stage] = STAGES,
):
    """Run all rounds of a config. A study may pass its own settings, model and stages."""
    began = time.perf_counter()
    cfg = config_module.load(argv, model_class.config_class, config_class)
    check_loss_type(cfg)
    preflight.check_keep_best(cfg, stages[cfg.stage].metrics)
    device = distributed.setup_device(cfg)
    elastic.join_process_group(device, cfg.timeout)
    try:
        run_rounds(cfg, model_class, stages, device, began)
    except OSError:
        lock.exit_if_lost()  # a file of a removed out_dir: say that, not which file
        raise
    finally:
        if not checkpoint.is_saving():  # else the lock goes stale when this process ends
            lock.release()


def run_rounds(cfg: Config, model_class: type, stages: dict[str, Stage], device, began: float):
    """Everything from the checks to the last round. began: when the program was started."""
    start = preflight.prepare_run(cfg)
    cfg = inputs.pin(start.cfg, start.settings)
    dtype = distributed.compute_dtype(cfg, device)
    if distributed.rank() == 0:
        metrics_logger.write_config(cfg, start, device, dtype)

    def say(text: str):
        if distributed.rank() == 0:
            print(text, flush=True)

    model_config, enc, tokenizer_name, path = resolve_model(cfg, model_class, start.path)
    if cfg.stage == "spin":
        # the teacher samples before the student is built: the two are never in memory together
        rollout.prepare_teacher(cfg, enc, model_config.block_size, device)
    model = build_model(cfg, model_class, model_config, path, device, dtype, bool(start.path))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    trained_part = f"{trained / 1e6:.2f}M of them trained, " if cfg.lora_rank else ""
    say(
        f"{cfg.out_dir}: {cfg.stage}, {model.num_params() / 1e6:.2f}M parameters, {trained_part}"
        f"{device.type} x {world_size()}, {dtype}, "
        f"float32 matmul precision {torch.get_float32_matmul_precision()}"
    )
    unread = config_module.settings_without_effect(cfg)
    if unread:
        say(f"without effect here: {', '.join(unread)}")
    if start.path:
        say(f"resumes after step {start.step} of round {start.round_id}")
    else:
        preflight.say_template(cfg, enc, say)
        preflight.say_stream(cfg, enc, say)
    collect = stages[cfg.stage].collect
    with wandb_sender(cfg) as to_wandb, tensorboard_sender(cfg) as to_tensorboard:
        log = metrics_logger.MetricsLogger(cfg, start.at, began, [to_wandb, to_tensorboard])
        saver = checkpoint.Saver(cfg, enc, tokenizer_name, log, start)
        run = Run(cfg, model, enc, device, log, saver, stages)
        inputs.warn_if_reward_changed(cfg, start.settings, start.at, log)
        for round_id in range(start.round_id, cfg.rounds):
            distributed.heartbeat.set_stage(f"round {round_id}, collecting")
            lock.check()
            inputs.check_unchanged(cfg, start.settings)
            train, val, report = collect(cfg, round_id, model, enc, device, say)
            lock.check()
            step = max(0, start.step) if round_id == start.round_id else 0
            elastic.exit_if_signalled()
            if report and not step:
                log.collect(round_id, report)
            if step < num_steps_of_round(cfg, train):
                fit(run, round_id, train, val, step)
            if cfg.keep_rounds:
                checkpoint.prune_rounds(cfg.out_dir, round_id - cfg.keep_rounds, cfg.keep_best)
                saver.log_removal_problems(round_id, step)
        lock.check()
        say(f"{cfg.out_dir}: done, {checkpoint.latest(cfg.out_dir)}")


if __name__ == "__main__":
    sys.exit(elastic.run(main, sys.argv[1:]))
