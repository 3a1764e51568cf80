"""The trainer: config -> round -> collect -> fit.

    python train.py config/demo_sft.py --lr=1e-3                           one process
    torchrun --nproc_per_node=8 train.py config/spin_k3.py                 FSDP2 over eight

Started again, the same command goes on where it stopped. `python train.py --help` lists the settings.
"""
import functools
import glob
import json
import math
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import numpy as np
import torch

import checkpoint
import config
import parallel
from config import per_round
from data import batch_indices, batch_rows, read_meta, row_tokens, sha256, split_by_tokens, stream_batch, tokenizer, tokenizer_path, write_json
from eval import evaluate, run, stream_parts
from loss import focal_nll, preference_loss, sequence_logprobs, smoothed_nll, taylor_nll
from model import GPT, GPTConfig
from rollout import collect, prepare_teacher

PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12, "RTX 4090": 165e12}     # dense bfloat16


# ------------------------------------------------------------------------------------------------------ the objectives
# logps (N, T) of a batch's targets -> the loss summed over what is counted, and metrics summed alike


def token_objective(logps, batch, cfg, beta, order):
    """Next-token loss, counted by target token. logps are the logits (N, T, V) where the loss needs them."""
    asked = batch["targets"] >= 0
    if needs_logits(cfg):
        return smoothed_nll(logps[asked], batch["targets"][asked], cfg.label_smoothing, cfg.confidence_penalty).sum(), {}
    return (focal_nll(logps[asked], cfg.focal) if cfg.focal else taylor_nll(logps[asked], order)).sum(), {}


def needs_logits(cfg):
    return cfg.stage in ("pretrain", "sft") and bool(cfg.label_smoothing or cfg.confidence_penalty)


def ranking_objective(logps, batch, cfg, beta, order):
    """Preference loss, counted by prompt."""
    B, K = batch["present"].shape
    policy = sequence_logprobs(logps, batch["seq"], B * K).view(B, K)
    return sum_over_rows(policy, batch, cfg, beta, order)


def sum_over_rows(policy, batch, cfg, beta, order):
    loss, metrics = preference_loss(policy, batch["ref"], batch["present"], beta, cfg.kind, ranks=batch["ranks"],
                                    depth=cfg.depth or None, label_smoothing=cfg.label_smoothing,
                                    taylor_order=order, nll_coef=cfg.nll_coef, margin=cfg.margin, lengths=batch["lengths"])
    B = len(policy)
    return loss * B, {name: value * B for name, value in metrics.items()}


OBJECTIVES = {"pretrain": token_objective, "sft": token_objective, "preference": ranking_objective, "spin": ranking_objective}


# ----------------------------------------------------------------------------------------------------------- the batch


def micro_batches(cfg, round, step, train, model_config, device, eot):
    """This rank's micro-batches of a step, a function of (data, seed, round, step): as many on every rank, of like size."""
    world, rank = parallel.world(), parallel.rank()
    budget, seed = parallel.micro_batch_tokens(cfg, device), cfg.seed + 1000 * round
    if cfg.stage == "pretrain":
        for part in stream_parts(cfg, model_config.block_size, device):
            yield stream_batch(train, model_config.block_size, cfg.batch_size, seed, step, model_config.vocab_size, part, eot if cfg.documents_apart else None)
        return
    tokens = {i: row_tokens(train[i], cfg.layout) for i in batch_indices(len(train), cfg.batch_size, seed, step)}
    indices = sorted(batch_indices(len(train), cfg.batch_size, seed, step), key=tokens.get)
    dealt = [indices[r::world] for r in range(world)]
    n = min(len(indices) // world, max(math.ceil(sum(tokens[i] for i in mine) / budget) for mine in dealt))
    for part in split_by_tokens([tokens[i] for i in dealt[rank]], n):
        rows = [train[dealt[rank][i]] for i in part]
        batch = batch_rows(rows, cfg.layout)
        if "ref" in rows[0]:
            K = batch["present"].shape[1]
            batch["ref"] = torch.tensor([row["ref"] + [0.0] * (K - len(row["ref"])) for row in rows])
        yield batch


def prefetch(make, steps):
    """make(step) of each step, the next one made by another thread while this one is worked on."""
    with ThreadPoolExecutor(1) as thread:
        coming = None
        for step in steps:
            now, coming = coming or thread.submit(make, step), thread.submit(make, step + 1) if step + 1 in steps else None
            yield now.result()


def taylor_order(cfg, step, steps):
    """n of T_n at a step."""
    return cfg.taylor_order if cfg.taylor_end is None else cfg.taylor_order + (cfg.taylor_end - cfg.taylor_order) * step / max(1, steps - 1)


def steps_of_round(cfg, train):
    return cfg.max_steps or math.ceil(cfg.epochs * len(train) / cfg.batch_size)


# ------------------------------------------------------------------------------------------------------- the optimizer


def make_optimizers(model, cfg, lr, device):
    """Decay on matrices and embeddings, none on norms and biases. Muon takes the blocks' matrices alone
    (kellerjordan.github.io/posts/muon) and AdamW the rest."""
    params = dict(model.named_parameters())
    matrices = {n: p for n, p in params.items() if p.dim() >= 2}
    muon = {n: p for n, p in matrices.items() if n.startswith("h.")} if cfg.optimizer == "muon" else {}
    groups = [{"params": [p for n, p in matrices.items() if n not in muon], "weight_decay": cfg.weight_decay},
              {"params": [p for p in params.values() if p.dim() < 2], "weight_decay": 0.0}]
    groups = [g for g in groups if g["params"]]
    if cfg.optimizer == "rmsprop":
        optimizers = [torch.optim.RMSprop(groups, lr=lr)]
    else:
        optimizers = [torch.optim.AdamW(groups, lr=lr, betas=cfg.adam_betas, fused=device.type in ("cpu", "cuda"))]
    if muon:
        if not hasattr(torch.optim, "Muon"):
            raise SystemExit(f"optimizer muon: torch {torch.__version__} has no torch.optim.Muon; use adamw")
        optimizers.append(torch.optim.Muon(list(muon.values()), lr=cfg.muon_lr, weight_decay=cfg.weight_decay))
    for group in (g for o in optimizers for g in o.param_groups):
        group["initial_lr"] = group["lr"]
    return optimizers


def lr_factor(cfg, step, steps):
    """Share of the learning rate at a step: linear warmup, then the schedule down to min_lr."""
    warmup = int(cfg.warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    share = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[cfg.schedule]
    return cfg.min_lr + (1 - cfg.min_lr) * share


# ------------------------------------------------------------------------------------------------------------- the fit


def fit(cfg, round, model, enc, tokenizer_name, train, val, start, device, log):
    """Train one round from step `start` to its last. The one loop, the one step."""
    steps = steps_of_round(cfg, train)
    beta, lr = per_round(cfg.beta, round), per_round(cfg.lr, round)
    optimizers = make_optimizers(model, cfg, lr, device)
    if start:
        checkpoint.resume(checkpoint.latest(cfg.out_dir, round), model, optimizers)
    params = list(model.parameters())
    objective = OBJECTIVES[cfg.stage]
    peak = next((f for chip, f in PEAK_FLOPS.items() if device.type == "cuda" and chip in torch.cuda.get_device_name(device)), None)
    loader = prefetch(lambda step: list(micro_batches(cfg, round, step, train, model.config, device, enc.eot_token)), range(start, steps))
    for step in range(start, steps + 1):
        if (step % cfg.eval_interval == 0 or step == steps) and (step > start or not start):
            log({"kind": "eval", "round": round, "step": step} | evaluate(cfg, beta, model, val, device, enc.eot_token))
        if (step % cfg.save_interval == 0 or step == steps) and step > start:
            checkpoint.save(cfg.out_dir, round, step, model, optimizers, cfg, enc, tokenizer_name)
        if step == steps:
            break

        # ---- one training step
        began = time.time()
        torch.manual_seed(hash((cfg.seed, round, step, parallel.rank())) % 2**62)      # dropout is a function of the step
        model.train()
        batches = next(loader)
        asked = [int((b["targets"] >= 0).sum()) for b in batches]
        counted = [len(b["present"]) if "ref" in b else n for b, n in zip(batches, asked)]
        count, asked, tokens = parallel.total([sum(counted), sum(asked), sum(b["tokens"] for b in batches)], device)
        sums = {}
        for j, batch in enumerate(batches):
            parallel.sync_gradients(model, j == len(batches) - 1)
            logps, batch = run(model, batch, device, needs_logits(cfg))
            loss, metrics = objective(logps, batch, cfg, beta, taylor_order(cfg, step, steps))
            (loss * parallel.world() / count).backward()        # FSDP means gradients over the ranks
            for name, value in ({"loss": loss.detach()} | metrics).items():
                sums[name] = sums.get(name, 0.0) + value
        norm = parallel.clip_(params, cfg.grad_clip)
        means = parallel.total([*sums.values(), norm / parallel.world()], device)
        record = {name: value / count for name, value in zip(sums, means)} | {"norm": means[-1]}
        if not (math.isfinite(record["loss"]) and math.isfinite(record["norm"])):
            raise SystemExit(f"round {round} step {step}: loss {record['loss']}, gradient norm {record['norm']}; last checkpoint: "
                             f"{checkpoint.latest(cfg.out_dir)}; rows: {rows_of(cfg, round, step, train, enc)}")
        factor = lr_factor(cfg, step, steps)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        # ----

        if step == 0 and "ref" in batches[0]:
            check_start(cfg, round, record, batches, beta, count, model, log)
        seconds = time.time() - began
        log({"kind": "step", "round": round, "step": step} | record |
            {"lr": lr * factor, "ms": 1000 * seconds, "tokens_per_second": tokens / seconds,
             "mfu": peak and model.flops_per_token(context(batches[0]), asked / tokens) * tokens / seconds / peak / parallel.world()}, steps)


def context(batch):
    """How many tokens a row of a batch has, for its attention: twice the mean position where rows are ragged."""
    return 2 * float(batch["pos"].float().mean()) + 1 if "pos" in batch else batch["idx"].shape[1]


def check_start(cfg, round, record, batches, beta, count, model, log):
    """At a round's first step the policy is its reference: every implicit reward is 0 and the ranking's nll, if it is full,
    ln K!. A loss that starts elsewhere was scored otherwise than it is trained (with dropout it is)."""
    device = next(model.parameters()).device
    expected = parallel.total([sum(sum_over_rows(b["ref"], b, cfg, beta, cfg.taylor_order)[0] for b in batches)], device)[0] / count
    off = abs(record["loss"] - expected)
    log({"kind": "start", "round": round, "step": 0, "loss": record["loss"], "expected": expected, "ranking": record["nll"], "off": off})
    if off > (1e-4 if parallel.compute_dtype(cfg, device) == torch.float32 else 0.05) and not model.config.dropout:
        log({"kind": "warning", "round": round, "step": 0,
             "text": f"the round starts at {record['loss']:.5f}, not at {expected:.5f}: policy and reference are not the same"})


def rows_of(cfg, round, step, train, enc):
    """The prompts of a step's global batch, as text."""
    if cfg.stage == "pretrain":
        return "windows of the stream"
    return [enc.decode(train[i]["prompt"])[-60:] for i in batch_indices(len(train), cfg.batch_size, cfg.seed + 1000 * round, step)]


# ------------------------------------------------------------------------------------------------------------ the run


def build(cfg, device, dtype):
    """(model, tokenizer, its name) from the newest checkpoint of this run, of `init`, or from scratch. A later stage takes
    shape and tokenizer from the checkpoint; a setting that conflicts ends the run."""
    path = checkpoint.latest(cfg.out_dir) or (cfg.init and checkpoint.resolve(cfg.init))
    given = config.model_settings(cfg)
    if path:
        meta = checkpoint.read_meta(path)
        enc, name = checkpoint.read_tokenizer(path, meta), meta["tokenizer"]
        if cfg.tokenizer and tokenizer.fingerprint(tokenizer.load(cfg.tokenizer)) != meta["tokenizer_sha256"]:
            raise SystemExit(f"config: tokenizer {cfg.tokenizer} is not the checkpoint's ({path})")
        shape = meta["model"] | given
    else:
        name = cfg.tokenizer or read_meta(cfg.data, [])["tokenizer"]
        if not name:
            raise SystemExit(f"config: from scratch on {cfg.data}, which names no tokenizer: set tokenizer")
        name = cfg.tokenizer or tokenizer_path(cfg.data, name)
        enc = tokenizer.load(name)
        shape = given | {"vocab_size": enc.n_vocab}
    if cfg.stage == "pretrain":
        data = read_meta(cfg.data, [])
        if data["tokenizer_sha256"] != tokenizer.fingerprint(enc):
            raise SystemExit(f"{cfg.data} was written with the tokenizer {data['tokenizer']}, the model has another ({name})")
    try:
        shape = GPTConfig(**shape)
    except ValueError as e:
        raise SystemExit(f"config: {e}")
    for key in given if path else ():
        if getattr(shape, key) != getattr(GPTConfig(**meta["model"]), key) and key != "dropout":
            raise SystemExit(f"config: {key} is {given[key]!r}, but the checkpoint {path} has {getattr(GPTConfig(**meta['model']), key)!r}")
    if cfg.stage == "spin":
        prepare_teacher(cfg, enc, shape.block_size, device, dtype)
    with torch.device("meta"):
        model = GPT(shape)
    model = parallel.wrap(model, device, dtype, cfg.compile)
    if path:
        checkpoint.load_weights(path, model)
    else:
        model.init_weights(cfg.seed, parallel.copy_)
    return model, enc, name


def begin(cfg):
    """Check the batch arithmetic and what the run reads, and return where it stands: (round, step), step -1 at the very
    beginning. A run that was begun keeps its settings."""
    world = parallel.world()
    if cfg.batch_size % world:
        raise SystemExit(f"config: batch_size {cfg.batch_size} must be a multiple of the number of ranks, {world}")
    if cfg.teacher.endswith(".jsonl") and not os.path.isfile(cfg.teacher):
        raise SystemExit(f"{cfg.teacher}: no such file; make it with: python sample.py TEACHER --prompts {cfg.data}/train.jsonl --out {cfg.teacher}, "
                         "and the same for val.jsonl, appended")
    if cfg.teacher not in ("", "rows") and not os.path.isfile(cfg.teacher):
        checkpoint.resolve(cfg.teacher)
    if os.path.exists(cfg.out_dir) and not os.path.isdir(cfg.out_dir):
        raise SystemExit(f"out_dir {cfg.out_dir} is a file")
    newest, path = checkpoint.latest(cfg.out_dir), os.path.join(cfg.out_dir, "config.json")
    written = glob.glob(os.path.join(glob.escape(cfg.out_dir), "**", "*.jsonl*"), recursive=True)
    if os.path.exists(path) and (newest or any(os.path.getsize(f) for f in written)):
        with open(path, encoding="utf-8") as f:
            before = json.load(f)["config"]
        for key, value in settings(cfg).items():
            if key not in MAY_CHANGE and key in before and before[key] != value:
                raise SystemExit(f"{cfg.out_dir} was begun with {key} = {before[key]!r}, now it is {value!r}; "
                                 "use another out_dir, or remove that one")
    meta = checkpoint.read_meta(newest) if newest else {"round": 0, "step": -1}
    parallel.barrier()
    return meta["round"], meta["step"]


MAY_CHANGE = {"out_dir", "device", "compile", "log_interval", "save_interval", "wandb", "wandb_project", "gen_batch_size", "micro_batch_tokens", "layout", "rounds"}


def settings(cfg):
    """What a run keeps from its first start to its last: the config as JSON has it, and the hashes of its data and, where
    they are a game's players or a reference, of init and teacher."""
    names = ["train.bin", "val.bin"] if cfg.stage == "pretrain" else ["train.jsonl", "val.jsonl"]
    files = read_meta(cfg.data, names)["files"]
    players = [path for path in (cfg.init, cfg.teacher) if path and cfg.stage in ("preference", "spin")]
    hashes = {path: checkpoint.read_meta(checkpoint.resolve(path))["weights_sha256"] if os.path.isdir(path) else sha256(path)
              for path in players if os.path.exists(path)}
    return json.loads(json.dumps(asdict(cfg))) | {"data_source": read_meta(cfg.data, [])["source"], "data_sha256": {name: files[name]["sha256"] for name in names}, "players_sha256": hashes}


def describe(cfg, at, device, dtype):
    """out_dir/config.json: the settings, and what each start of the run ran on."""
    path, starts = os.path.join(cfg.out_dir, "config.json"), []
    if at[1] >= 0 and os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            starts = json.load(f)["starts"]
    this = {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version(), "git": git_describe(),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(), "dtype": str(dtype),
            "matmul_precision": torch.get_float32_matmul_precision(), "ranks": parallel.world(), "threads": torch.get_num_threads()}
    os.makedirs(cfg.out_dir, exist_ok=True)
    write_json(path, {"config": settings(cfg), "starts": starts + [{"at": at} | this]})


def git_describe():
    """The commit, and "-dirty" if the files differ from it."""
    try:
        here = os.path.dirname(os.path.abspath(__file__))
        return subprocess.run(["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def make_log(cfg, at, began):
    """A function that appends a record to metrics.jsonl, prints it, and sends it to wandb if the config asks; rank 0's does.
    What a killed run had logged past its checkpoint `at` = (round, step) is dropped: it will be logged again."""
    if parallel.rank():
        return lambda record, steps=None: None
    path, kept = os.path.join(cfg.out_dir, "metrics.jsonl"), []
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            for text in f:
                record = json.loads(text) if text.endswith("\n") else {"round": math.inf}     # cut short by a kill
                if record["round"] < at[0] or record["round"] == at[0] and record["step"] + (record["kind"] == "step") <= at[1]:
                    kept.append(text)
        with open(path + ".tmp", "w", encoding="utf-8") as f:
            f.writelines(kept)
        os.replace(path + ".tmp", path)
    out = open(path, "a", encoding="utf-8", buffering=1)
    remote = None
    if cfg.wandb != "off":
        import wandb
        name = cfg.out_dir.strip("/").replace("/", "-")
        remote = wandb.init(project=cfg.wandb_project, id=name, name=name, resume="allow", mode=cfg.wandb, dir=cfg.out_dir, config=asdict(cfg))
    last = [began]      # loading and a teacher's samples are part of the run's time

    def log(record, steps=None):
        now = time.time()
        record = record | {"seconds": now - last[0]}
        last[0] = now
        out.write(json.dumps(record) + "\n")
        if record["kind"] != "step" or (record["step"] + 1) % cfg.log_interval == 0:
            print(line(record, steps), flush=True)
        if remote:
            remote.log({f"{record['kind']}/{k}": v for k, v in record.items() if isinstance(v, (int, float))})
    return log


def line(record, steps=None):
    """A record as one line."""
    head = f"round {record['round']} step {record['step'] + (steps is not None)}" + (f"/{steps}" if steps else "")
    if record["kind"] == "step":
        acc = f" | acc {record['acc']:.2f}" if "acc" in record else ""
        mfu = "-" if record["mfu"] is None else f"{100 * record['mfu']:.1f}%"
        return (f"{head} | loss {record['loss']:.4f}{acc} | lr {record['lr']:.1e} | norm {record['norm']:.2f} | {record['ms']:.0f} ms "
                f"| {record['tokens_per_second'] / 1000:.1f}k tok/s | mfu {mfu}")
    rest = {k: v for k, v in record.items() if k not in ("kind", "round", "step", "seconds") and not isinstance(v, list)}
    return f"{head} | {record['kind']}: " + ", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in rest.items())


def main(argv):
    began = time.time()
    cfg = config.load(argv)
    device = parallel.setup(cfg)
    dtype = parallel.compute_dtype(cfg, device)
    at = begin(cfg)
    if parallel.rank() == 0:
        describe(cfg, at, device, dtype)
    model, enc, tokenizer_name = build(cfg, device, dtype)
    say = functools.partial(print, flush=True) if parallel.rank() == 0 else lambda text: None
    say(f"{cfg.out_dir}: {cfg.stage}, {model.num_params() / 1e6:.2f}M parameters, {device.type} x {parallel.world()}, {dtype}, "
        f"float32 products {torch.get_float32_matmul_precision()}")
    log = make_log(cfg, at, began)
    for round in range(at[0], cfg.rounds):
        train, val, report = collect(cfg, round, model, enc, device, dtype, say)
        start = max(0, at[1]) if round == at[0] else 0
        if report and not start:
            log({"kind": "collect", "round": round, "step": 0} | report)
        if start < steps_of_round(cfg, train):
            fit(cfg, round, model, enc, tokenizer_name, train, val, start, device, log)
    say(f"{cfg.out_dir}: done, {checkpoint.latest(cfg.out_dir)}")
    if cfg.wandb != "off" and parallel.rank() == 0:
        import wandb
        wandb.finish()
    parallel.finish()


if __name__ == "__main__":
    main(sys.argv[1:])
