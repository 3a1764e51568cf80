"""The settings of a run: one dataclass, its loader and its checks.

    python train.py config/spin_k3.py --beta=0.5

A config file is Python code that assigns the settings below; it may begin with
`from config.spin_k2 import *`. Names that start with an underscore are ignored. Settings on the
command line win over those of files, later ones over earlier ones. A mistake ends the program with
one line.
"""

import ast
import difflib
import glob
import importlib
import inspect
import os
import re
import types
import typing
from dataclasses import dataclass, field, fields, replace

from data import cli
from data.files import shorten
from data.template import template_problem


@dataclass
class Config:
    # ---- run
    stage: str = "pretrain"  # pretrain | sft | reward | preference | spin | ppo
    out_dir: str = "out/run"  # what the run writes; the same command resumes from here
    init: str = ""  # run folder or checkpoint to start from; "": random weights
    seed: int = 1337
    device: str = ""  # cpu | cuda; "": cuda if there is one
    dtype: str = ""  # of matmuls: float32 | bfloat16; "": bfloat16 on GPUs that have it
    matmul_precision: str = ""  # torch.set_float32_matmul_precision; "": see configure_torch
    compile: bool | None = None  # the embedding and each block; None: on a GPU
    cuda_graphs: bool = True  # replay steps of sampling on a GPU as CUDA graphs
    activation_checkpointing: int = 0  # recompute every n-th block in backward; 0: none
    deterministic: bool = False  # torch.use_deterministic_algorithms, for GPUs

    # ---- model: any field of GPTConfig (model.py) is a setting too. What is not set comes from the
    # checkpoint, or is GPTConfig's default. The loader collects what is set here.
    model: dict = field(default_factory=dict)

    # ---- several processes (FSDP2)
    hsdp_shard_size: int = 0  # shard over this many ranks and replicate over the rest; 0: over all
    reshard_after_forward: bool = (
        True  # free a block's gathered weights between forward and backward
    )
    fsdp_prefetch: int = 0  # blocks to gather ahead; 0: FSDP2's default
    sample_sharded: bool = False  # sample without a full copy of the weights on each rank: slower
    timeout: float = 1800.0  # seconds without progress after which a hanging rank is named

    # ---- data
    data: str = "data/pydocs"  # folder with {train,val}.bin (pretrain) or {train,val}.jsonl
    tokenizer: str = (
        ""  # gpt2 | bytes | a .tiktoken or .json file; "": the checkpoint's or the data's
    )
    template: str = (
        ""  # text around {prompt} (data/template.py); "": the checkpoint's or the default
    )
    max_prompt: int = 0  # tokens; longer prompts lose old turns, then their start; 0: block_size
    max_response: int = 0  # tokens, end-of-text included; longer ones lose their end; 0: what fits
    document_mask: bool = False  # pretrain: documents of a window do not attend to each other
    max_rows: int = 0  # train on this many rows (a seeded choice); 0: all

    # ---- self-play: a round samples from the policy, ranks the responses and trains
    rounds: int = 1
    keep_rounds: int = 0  # keep the checkpoints of this many earlier rounds; 0: all
    # best first: data, teacher, self, and self-1, self-2 ... (samples of earlier rounds); self:4 is
    # four samples
    players: list[str] = field(default_factory=lambda: ["data", "self"])
    # who ranks: "order" of the players (spin) or the "data" (preference), both the default there,
    # or a scorer: module:function(row, text) -> float, or a checkpoint of a reward model or of a
    # language model, a judge. docs/ranking.md
    ranked_by: str = ""
    top_players: list[str] = field(default_factory=list)  # stay on top, whatever the scorer says
    best_and_worst: bool = False  # of what a scorer ranks, train on these two only
    judge_length_normalize: bool = True  # divide a judge's log-probability by the tokens
    teacher: str = ""  # checkpoint, ranked .jsonl file, or "rows": each row's second response
    replay_rounds: int = 0  # train on the rows of this many earlier rounds too (SPIN: 1)
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    gen_batch_size: int = 128  # prompts sampled at a time on each rank

    # ---- optimization
    batch_size: int = 32  # sequences or prompts per step, over all ranks
    micro_batch_tokens: int = 0  # tokens per forward pass on a rank; 0: MICRO_BATCH_TOKENS
    layout: str = "packed"  # packed: K responses share their prompt | padded: one row per response
    max_steps: int = 0  # steps per round; 0: `epochs` over the rows
    epochs: float = 1.0
    optimizer: str = (
        "adamw"  # adamw | rmsprop (SPIN) | muon (matrices of blocks; adamw for the rest)
    )
    lr: float | list[float] = 3e-4  # a list has one value per round
    muon_lr: float = 0.02  # learning rate of muon's matrices, on the same schedule
    schedule: str = "cosine"  # cosine | linear | constant, after the warmup
    warmup_ratio: float = 0.0  # share of the steps
    min_lr_ratio: float = 0.1  # final learning rate as a share of lr
    weight_decay: float = 0.0  # on matrices and embeddings
    adam_betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    grad_clip: float = 1.0  # 0: none

    # ---- LoRA (nanospin/lora.py): train adapters of `init`, whose weights are frozen
    lora_rank: int = 0  # r; 0: no LoRA, all weights are trained
    lora_alpha: float = 32.0  # what an adapter adds is scaled by lora_alpha / lora_rank
    # linear layers of the blocks, by the end of their names: attn.c_proj is one of the two c_proj
    lora_targets: list[str] = field(default_factory=lambda: ["c_attn", "c_proj", "c_fc"])

    # ---- objective
    beta: float | list[float] = 0.1  # temperature of implicit rewards; a list: one value per round
    # pl (DPO, SPIN) | pairs | ipo | simpo | orpo | hinge | linear | sppo | best_of_n; reward: pl |
    # pairs
    loss_type: str = "pl"
    length_normalize: bool = False  # implicit rewards per token of the response
    margin: float = 0.0  # simpo's gamma
    rank_depth: int = 0  # terms of the ranking that count; 0: all
    label_smoothing: float = 0.0  # weight of the reversed ranking (cDPO)
    nll_coef: float = 0.0  # weight of the next-token loss on the best response (RPO)
    taylor_order: float = 0.0  # n of T_n, for tokens and rankings; 0: -log p
    score_margin: float = 0.0  # pl, pairs: margin per difference of the scores
    center_coef: float = 0.0  # reward: weight of (s_i + s_j)^2, which centers the scores

    # ---- ppo: a round samples and scores max_rows prompts and takes `epochs` over them
    reward: str = ""  # checkpoint of a reward model, or module:function(row, text) -> float
    # gae, with a value head | from the samples of a prompt: grpo | dr_grpo | rloo | from `teacher`,
    # token by token: reverse_kl (on-policy distillation)
    advantage: str = "gae"
    samples_per_prompt: int = 1  # the size of a group
    loss_average: str = "token"  # over tokens | sequence: of responses' means | constant: Dr. GRPO
    kl_in: str = "reward"  # where kl_coef counts: in the reward | in the loss, by k3
    kl_coef: float = 0.05  # penalty on log pi - log pi_ref per token; the reference is `init`
    kl_target: float = 0.0  # nats per response that kl_coef adapts to; 0: kl_coef is fixed
    kl_adapt: float = 0.1  # speed of the adaptation (K_beta of arXiv 1909.08593)
    whiten_rewards: bool = True  # gae: by mean and deviation of the first round's samples
    whiten_advantages: bool = True  # gae: over the tokens of a round
    missing_eos_penalty: float = 1.0  # subtracted if a response has no end-of-text
    discount: float = 1.0
    gae_lambda: float = 0.95
    clip_range: float = 0.2  # of the policy ratio; 0: none
    clip_range_high: float = 0.0  # its upper end; 0: the same
    value_clip_range: float = 0.2  # of the change in value; 0: none
    value_coef: float = 0.1
    entropy_coef: float = 0.0

    # ---- pretraining loss beside sft or ppo (PPO-ptx, arXiv 2203.02155, eq. 2)
    pretrain_coef: float = 0.0  # its weight; 0: none
    pretrain_data: str = ""  # folder of the token stream; "": data
    pretrain_batch_size: int = 8  # sequences of block_size per step, over all ranks

    # ---- evaluation, checkpoints, logging
    eval_interval: int = 100  # steps (ppo: rounds); the last step is always evaluated
    eval_batches: int = 20  # pretrain: batches of the validation stream
    eval_rows: int = 256  # validation rows
    save_interval: int = 200  # steps; the last step is always saved
    keep_last: int = 2  # checkpoints kept per round
    keep_best: str = ""  # also keep the best by this metric: val_loss; -acc: the highest acc
    on_nonfinite: str = "stop"  # stop | skip the step
    loss_spike_factor: float = 5.0  # warn if a loss exceeds the recent median this much; 0: never
    log_interval: int = 1  # steps per printed line; metrics.jsonl has every step
    wandb: str = "off"  # off | online | offline
    wandb_project: str = "nanospin"
    wandb_runs: str = "one"  # one | rounds: a W&B run for each round, in a group
    tensorboard: bool = False  # write the same metrics to out_dir/tensorboard


METHODS = {  # that others have as a stage or a trainer of its own
    "dpo": "; DPO is stage=preference",
    "simpo": "; SimPO is stage=preference with loss_type=simpo",
    "orpo": "; ORPO is stage=preference with loss_type=orpo",
    "ipo": "; IPO is stage=preference with loss_type=ipo",
    "grpo": "; GRPO is stage=ppo with advantage=grpo",
    "rloo": "; RLOO is stage=ppo with advantage=rloo",
}

CHOICES = {
    "stage": ["pretrain", "sft", "reward", "preference", "spin", "ppo"],
    "device": ["", "cpu", "cuda"],
    "advantage": ["gae", "grpo", "dr_grpo", "rloo", "reverse_kl"],
    "loss_average": ["token", "sequence", "constant"],
    "kl_in": ["reward", "loss"],
    "dtype": ["", "float32", "bfloat16"],
    "matmul_precision": ["", "highest", "high", "medium"],
    "optimizer": ["adamw", "rmsprop", "muon"],
    "schedule": ["cosine", "linear", "constant"],
    "on_nonfinite": ["stop", "skip"],
    "wandb": ["off", "online", "offline"],
    "wandb_runs": ["one", "rounds"],
    "layout": ["packed", "padded"],
}

POSITIVE_INTEGERS = [
    "rounds",
    "batch_size",
    "eval_interval",
    "eval_batches",
    "eval_rows",
    "save_interval",
    "log_interval",
    "gen_batch_size",
    "pretrain_batch_size",
    "keep_last",
    "samples_per_prompt",
]

PER_ROUND = ("lr", "beta")  # settings that may be a list with one value per round

MAX_FLOAT = 1e30  # of a setting: float32 ends at 3.4e38

# every other number must be at least 0; these have a range of their own, which `check` tests
OWN_RANGE = ["lr", "beta", "margin"]

# names that other codebases use -> ours
ELSEWHERE = {
    "learning_rate": "lr",
    "output_dir": "out_dir",
    "init_from": "init",
    "model": "init",
    "model_name_or_path": "init",
    "dataset": "data",
    "max_iters": "max_steps",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "micro_batch_tokens",
    "gradient_checkpointing": "activation_checkpointing",
    "max_grad_norm": "grad_clip",
    "lr_scheduler_type": "schedule",
    "min_lr": "min_lr_ratio",
    "warmup": "warmup_ratio",
    "warmup_iters": "warmup_ratio",
    "warmup_steps": "warmup_ratio",
    "eval_iters": "eval_batches",
    "eval_steps": "eval_interval",
    "save_steps": "save_interval",
    "logging_steps": "log_interval",
    "report_to": "wandb",
    "wandb_log": "wandb",
    "max_length": "block_size",
    "max_prompt_length": "max_prompt",
    "max_completion_length": "max_response",
    "max_new_tokens": "max_response",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "loss": "loss_type",
    "simpo_gamma": "margin",
    "rpo_alpha": "nll_coef",
    "cliprange": "clip_range",
    "vf_coef": "value_coef",
    "gamma": "discount",
    "lam": "gae_lambda",
    "reward_model": "reward",
    "reward_funcs": "reward",
    "num_generations": "samples_per_prompt",
    "group_size": "samples_per_prompt",
    "adv_estimator": "advantage",
    "epsilon": "clip_range",
    "epsilon_high": "clip_range_high",
    "judge": "ranked_by",
    "num_rounds": "rounds",
    "lora_r": "lora_rank",
    "lora_target_modules": "lora_targets",
    "bf16": "dtype",
}


# ------------------------------------------------------------------------------------- loading


def load(argv: list[str], model_config_class: type, config_class: type = Config) -> Config:
    """Config files and --name=value (or --name value) overrides -> a checked config.

    model_config_class: GPTConfig or a subclass; its fields are settings, collected in cfg.model.
    config_class: Config, or a subclass with more settings. Exits with one line on a mistake.
    """
    if "-h" in argv or "--help" in argv:
        print(help_text(model_config_class, config_class))
        raise SystemExit(0)
    hints = typing.get_type_hints(config_class)
    hints.pop("model")
    model_hints = field_hints(model_config_class)
    for name in ("vocab_size", "scalar_head"):  # these follow from the tokenizer and the stage
        model_hints.pop(name)

    settings, model_settings = {}, {}
    for name, value, where in assignments(argv):
        if name in hints:
            settings[name] = convert(name, parse(value, hints[name]), hints[name], where)
        elif name in model_hints:
            hint = model_hints[name]
            model_settings[name] = convert(name, parse(value, hint), hint, where)
        else:
            raise SystemExit(unknown_setting(name, [*hints, *model_hints], where))
    cfg = config_class(**settings, model=model_settings)
    check(cfg)
    return cfg


class Text(str):
    """A value from the command line, to be parsed by the type of its setting."""


def assignments(argv: list[str]) -> list[tuple]:
    """[(name, value, where it stands)] of every setting in argv: those of the files, then those of
    the command line, wherever they stand; each in order."""
    of_files, of_command_line = [], []
    args = iter(argv)
    for arg in args:
        if not arg.startswith("--"):
            for name, value in read_file(arg).items():
                of_files.append((name, value, arg))
            continue
        name, equals, text = arg[2:].partition("=")
        if not equals:
            text = next(args, None)
            if text is None or text.startswith("--"):
                raise SystemExit(f"{arg} needs a value: {arg}=VALUE")
        of_command_line.append((name, Text(text), "command line"))
    return of_files + of_command_line


def read_file(path: str) -> dict:
    """The settings that a config file assigns. The file is Python code, and it is run."""
    try:
        with open(path, encoding="utf-8") as f:
            code = compile(f.read(), path, "exec")
        names = {}
        exec(code, names)
    except OSError as e:
        raise SystemExit(f"{path}: {e.strerror}")
    except SyntaxError as e:
        raise SystemExit(f"{path}:{e.lineno}: {e.msg}")
    except Exception as e:
        raise SystemExit(f"{path}: {type(e).__name__}: {' '.join(str(e).split())}")
    settings = {}
    for name, value in names.items():
        if not name.startswith("_") and not isinstance(value, types.ModuleType):
            settings[name] = value
    return settings


def unknown_setting(name: str, known: list[str], where: str) -> str:
    """The error message for a setting that does not exist."""
    if name in ELSEWHERE:
        return f"{where}: unknown setting {name!r}; here it is {ELSEWHERE[name]!r}"
    message = f"{where}: unknown setting {name!r}"
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        message += f", did you mean {close[0]!r}?"
    return message


def field_hints(dataclass_type: type) -> dict:
    """{field: type} of a dataclass, class variables left out."""
    hints = typing.get_type_hints(dataclass_type)
    return {f.name: hints[f.name] for f in fields(dataclass_type)}


def parse(value, hint):
    """A value from the command line as Python; others are returned as they are."""
    if not isinstance(value, Text):
        return value
    text = str(value)
    if hint is str:
        return text
    if hint == list[str] and not text.startswith("["):
        return text.split(",")
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text  # `convert` reports the type that it should have


def convert(name: str, value, hint, where: str):
    """The value if it has the hinted type; an int becomes a float where one is expected.

    Exits with one line otherwise. Infinite numbers and NaN are refused.
    """
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else [hint]
    for option in options:
        if typing.get_origin(option) is list:
            (item_type,) = typing.get_args(option)
            if isinstance(value, (list, tuple)) and all(has_type(v, item_type) for v in value):
                return [item_type(v) for v in value]
        elif has_type(value, option):
            return option(value) if option is float else value
    expected = hint.__name__ if isinstance(hint, type) and not typing.get_origin(hint) else hint
    raise SystemExit(f"{where}: {name} must be {expected}, got {value!r}")


def check_magnitude(name: str, value, where: str):
    """Exit with one line if a float setting, or one of a list, could overflow in float32."""
    for number in value if isinstance(value, list) else [value]:
        if type(number) is float and abs(number) > MAX_FLOAT:
            raise SystemExit(f"{where}: {name} must be at most {MAX_FLOAT:g}, got {number}")


def has_type(value, expected: type) -> bool:
    if expected is float:
        return type(value) in (int, float) and abs(value) < 1e300
    return type(value) is expected


def model_config_from(values: dict, model_config_class: type, where: str):
    """A model config from the dictionary in a checkpoint. Exits with one line on a mistake."""
    hints = field_hints(model_config_class)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise SystemExit(f"{where}: {model_config_class.__name__} has no {', '.join(unknown)}")
    for name, value in values.items():
        check_magnitude(name, convert(name, value, hints[name], where), where)
    try:
        return model_config_class(**values)
    except (ValueError, TypeError) as e:
        raise SystemExit(f"{where}: {e}")


def help_text(model_config_class: type, config_class: type) -> str:
    """Every setting by group, with type, default and meaning."""
    text = [__doc__]
    for dataclass_type in (*config_class.__mro__, *model_config_class.__mro__):
        if dataclass_type is not object:
            text.append(f"{dataclass_type.__name__}\n")
            text += field_lines(dataclass_type)
    return "\n".join(text)


def field_lines(dataclass_type: type) -> list[str]:
    """The lines of a dataclass that declare its fields, as they stand in its source."""
    lines = inspect.getsource(dataclass_type).splitlines()
    fields_only = []
    for line in lines[2:]:  # below "@dataclass" and "class ..."
        if "ClassVar" in line or line.startswith(("    def ", "    @")):
            break
        fields_only.append(line)
    return fields_only


# ------------------------------------------------------------------------------------ checking


def require(condition, message: str):
    if not condition:
        raise SystemExit(f"config: {message}")


def check(cfg: Config):
    """Check ranges and combinations. Exits with one line on the first mistake."""
    check_values(cfg)
    check_objective(cfg)
    check_rounds(cfg)
    check_ranked_by(cfg)
    if cfg.stage == "spin":
        check_players(cfg)
    if cfg.stage == "ppo":
        check_ppo(cfg)


def check_values(cfg: Config):
    """Each setting by itself."""
    for name, value in (vars(cfg) | cfg.model).items():
        if isinstance(value, str):
            text = re.sub("[\n\t]", "", value) if name == "template" else value
            control = re.search("[\x00-\x1f\x7f-\x9f\ud800-\udfff]", text)
            require(not control, f"{name} must be Unicode without control characters: {value!r}")
        if type(value) is int:
            require(value < 2**48, f"{name} must be below 2**48, got {value}")
        if name in POSITIVE_INTEGERS:
            require(value >= 1, f"{name} must be at least 1, got {value}")
        elif type(value) in (int, float) and name not in OWN_RANGE:
            require(value >= 0, f"{name} must not be negative, got {value}")
    for name, choices in CHOICES.items():
        value = getattr(cfg, name)
        listed = ", ".join(choice or repr(choice) for choice in choices)
        advice = METHODS.get(value, "") if name == "stage" else ""
        require(value in choices, f"{name} must be one of {listed}, got {value!r}{advice}")
    for name in ("norm_eps", "rope_theta"):
        value = cfg.model.get(name, 1.0)
        require(value > 0, f"{name} must be above 0, got {value}")
    require(1 <= cfg.timeout <= 1e7, f"timeout must be from 1 to 1e7, got {cfg.timeout}")
    require(
        cli.is_temperature(cfg.temperature),
        f"temperature must be {cli.TEMPERATURES}, got {cfg.temperature}",
    )
    require(
        cli.MIN_TOP_P <= cfg.top_p <= 1,
        f"top_p must be from {cli.MIN_TOP_P:g} to 1, got {cfg.top_p}",
    )
    require(cfg.warmup_ratio <= 1, f"warmup_ratio must be in [0, 1], got {cfg.warmup_ratio}")
    require(cfg.min_lr_ratio <= 1, f"min_lr_ratio must be in [0, 1], got {cfg.min_lr_ratio}")
    betas = cfg.adam_betas
    in_range = len(betas) == 2 and all(0 <= b < 1 for b in betas)
    require(in_range, f"adam_betas must be two numbers in [0, 1), got {betas}")
    problem = template_problem(cfg.template) if cfg.template else ""
    require(not problem, f"template {problem}")
    for name, value in (vars(cfg) | cfg.model).items():
        check_magnitude(name, value, "config")


def check_objective(cfg: Config):
    """The settings of losses, and which stage has which. Which loss_type has which is known to
    loss.py, and checked by train.py."""
    stage = cfg.stage
    require(cfg.taylor_order <= 20, f"taylor_order must be at most 20, got {cfg.taylor_order}")
    require(
        cfg.label_smoothing < 0.5, f"label_smoothing must be in [0, 0.5), got {cfg.label_smoothing}"
    )
    if stage != "reward":
        require(not cfg.center_coef, "only stage reward has center_coef")
        require(
            not cfg.score_margin or stage in ("preference", "spin"),
            "score_margin is for stages reward, preference and spin",
        )
    require(
        not cfg.pretrain_coef or stage in ("sft", "ppo"),
        f"stage {stage} has no pretrain_coef, only sft and ppo",
    )
    if stage in ("reward", "ppo"):
        require(not cfg.taylor_order, f"stage {stage} has no taylor_order")
    if stage not in ("preference", "spin"):
        for name in ("rank_depth", "label_smoothing", "length_normalize", "nll_coef"):
            require(not getattr(cfg, name), f"only stages preference and spin have {name}")
    require(not cfg.replay_rounds or stage == "spin", "only stage spin has replay_rounds")
    needs_reward = stage == "ppo" and cfg.advantage != "reverse_kl"
    require(
        needs_reward == bool(cfg.reward),
        "stage ppo, and no other stage, needs `reward`: a reward model's run folder, or "
        "module:function; advantage reverse_kl has none",
    )


def check_rounds(cfg: Config):
    """Steps, rounds, and where the weights come from."""
    stage = cfg.stage
    require(stage != "pretrain" or cfg.max_steps, "stage pretrain needs max_steps")
    require(cfg.max_steps or cfg.epochs, "max_steps or epochs must be above 0")
    require(
        stage in ("pretrain", "sft") or cfg.init,
        f"stage {stage} needs init, the checkpoint to start from",
    )
    require(not cfg.lora_rank or cfg.init, "lora_rank needs init, the checkpoint to adapt")
    require(cfg.lora_alpha > 0, f"lora_alpha must be above 0, got {cfg.lora_alpha}")
    require(cfg.lora_targets, "lora_targets must not be empty")
    require(stage in ("spin", "ppo") or cfg.rounds == 1, f"stage {stage} has one round")
    for name in PER_ROUND:
        value = getattr(cfg, name)
        values = value if isinstance(value, list) else [value]
        require(
            len(values) == 1 or len(values) >= cfg.rounds,
            f"{name} has {len(values)} values for {cfg.rounds} rounds",
        )
        require(all(v > 0 for v in values), f"{name} must be above 0")
    rates_differ = isinstance(cfg.lr, list) and len(set(cfg.lr)) > 1
    require(
        not (rates_differ and cfg.optimizer == "muon"),
        "optimizer muon has one muon_lr for all rounds, so lr must be one number too",
    )


def check_ranked_by(cfg: Config):
    """Who ranks, and what only a scorer's ranking has."""
    stage, ranked_by = cfg.stage, cfg.ranked_by
    if stage not in ("preference", "spin"):
        require(not ranked_by, f"stage {stage} has no ranked_by, only preference and spin")
    require(
        (stage, ranked_by) not in (("spin", "data"), ("preference", "order")),
        f"stage {stage} is not ranked by {ranked_by}: stage preference ranks the data's responses, "
        "by the data or a scorer; stage spin the players', by their order or a scorer",
    )
    require(
        not cfg.best_and_worst or is_scored(cfg),
        "best_and_worst needs a scorer in ranked_by",
    )
    require(
        not cfg.top_players or is_online(cfg),
        "top_players needs stage spin and a scorer in ranked_by",
    )
    require(
        not cfg.score_margin or stage != "spin" or is_scored(cfg),
        "score_margin in stage spin needs a scorer in ranked_by",
    )


def check_players(cfg: Config):
    players = cfg.players
    for name in players:
        several = re.fullmatch("self:[1-9][0-9]{0,3}", name)
        earlier_self = re.fullmatch("self-[1-9][0-9]{0,5}", name)
        require(
            name in ("data", "teacher", "self") or several or earlier_self,
            f"players are data, teacher, self, self:2 ..., self-1, self-2 ..., got {name!r}",
        )
        require(
            not earlier_self or not is_scored(cfg),
            f"player {name} is for ranked_by order: under a scorer each round has other prompts",
        )
    columns = player_columns(cfg)
    names = [name.partition(":")[0] for name in players]
    require(len(set(names)) == len(names), f"players must differ, got {players}")
    require(len(columns) >= 2, f"players must be two or more, got {players}")
    require("self" in columns, "players must include self, the policy's own samples")
    require(
        is_scored(cfg) or players[0] == "data",
        "players must begin with data: validation loss and nll_coef use its responses; only a "
        "scorer in ranked_by takes any players",
    )
    require(
        ("teacher" in players) == bool(cfg.teacher),
        "set `teacher` exactly when players include teacher",
    )
    top = cfg.top_players
    require(
        not (top and cfg.score_margin),
        "score_margin follows the scores, which top_players do not: set one of the two",
    )
    for name in top:
        require(name in ("data", "teacher"), f"top_players are data and teacher, got {name!r}")
        require(name in players, f"top_players {name} is not among the players {players}")
    require(len(set(top)) == len(top), f"top_players must differ, got {top}")


def check_ppo(cfg: Config):
    require(
        samples_policy_itself(cfg),
        "stage ppo samples from the policy itself: temperature 1, top_k 0, top_p 1",
    )
    require(cfg.discount <= 1, f"discount must be in [0, 1], got {cfg.discount}")
    require(cfg.gae_lambda <= 1, f"gae_lambda must be in [0, 1], got {cfg.gae_lambda}")
    require(cfg.clip_range < 1, f"clip_range must be below 1, got {cfg.clip_range}")
    require(
        not cfg.clip_range_high or cfg.clip_range,
        "clip_range_high needs clip_range: 0 does not clip",
    )
    of_group = cfg.advantage not in ("gae", "reverse_kl")
    require(
        not of_group or cfg.samples_per_prompt >= 2,
        f"advantage {cfg.advantage} compares the samples of a prompt: set samples_per_prompt to 2 "
        "or more",
    )
    for_distillation = cfg.advantage == "reverse_kl"
    require(
        for_distillation == bool(cfg.teacher),
        "stage ppo has a `teacher` exactly with advantage reverse_kl",
    )
    require(
        cfg.teacher != "rows" and not cfg.teacher.endswith(".jsonl"),
        "advantage reverse_kl needs a checkpoint as teacher: its log-probabilities",
    )
    require(
        cfg.loss_average == "token" or cfg.advantage != "gae",
        f"advantage gae has loss_average token, not {cfg.loss_average}",
    )
    require(
        not cfg.kl_target or cfg.kl_in == "reward",
        "kl_target adapts kl_coef in the reward: it needs kl_in reward",
    )
    require(
        cfg.loss_average != "constant" or cfg.max_response,
        "loss_average constant divides by max_response: set it",
    )


# -------------------------------------------------------------------------------- using a config


def per_round(value, round_id: int):
    """The value of a setting that may be a list with one value per round."""
    if not isinstance(value, list):
        return value
    return value[0] if len(value) == 1 else value[round_id]


def scorer_name(cfg: Config) -> str:
    """Who scores responses: `reward`, or `ranked_by` if that is a scorer; "" if nobody."""
    if cfg.reward:
        return cfg.reward
    return "" if cfg.ranked_by in ("order", "data") else cfg.ranked_by


def is_function(scorer: str) -> bool:
    """Whether a scorer is named as module:function. Else it is a checkpoint, whose folder may have
    a colon in its name, or ""."""
    return ":" in scorer and not os.path.isdir(scorer)


def scorer_setting(cfg: Config) -> str:
    """What messages call the scorer: "reward NAME" or "ranked_by NAME", as the config sets it."""
    return f"{'reward' if cfg.reward else 'ranked_by'} {scorer_name(cfg)}"


def samples_policy_itself(cfg: Config) -> bool:
    """Whether samples have the policy's own probabilities, not sharpened or cut ones."""
    return cfg.temperature == 1 and cfg.top_k == 0 and cfg.top_p == 1


def is_scored(cfg: Config) -> bool:
    """Whether a scorer ranks the responses of spin or preference."""
    return not cfg.reward and scorer_name(cfg) != ""


def is_online(cfg: Config) -> bool:
    """Online ranking: stage spin, in which a scorer ranks the players' responses."""
    return cfg.stage == "spin" and is_scored(cfg)


def ordered_players(cfg: Config) -> list[str]:
    """The players, best first; in alphabetical order under a scorer, to which their order in the
    config makes no difference."""
    return sorted(cfg.players) if is_scored(cfg) else cfg.players


def player_columns(cfg: Config) -> list[str]:
    """The player of each response of a row: ["data", "self:2"] has data, self, self."""
    columns = []
    for player in ordered_players(cfg):
        name, _, count = player.partition(":")
        columns += [name] * int(count or 1)
    return columns


def pretrain_config(cfg: Config) -> Config:
    """The config of the pretraining loss beside sft or ppo, as a stage of its own would have it."""
    return replace(
        cfg,
        stage="pretrain",
        data=cfg.pretrain_data or cfg.data,
        batch_size=cfg.pretrain_batch_size,
        taylor_order=0.0,
    )


def import_function(name: str):
    """The function that "module:function" names. Exits with one line if there is none."""
    module, _, function = name.partition(":")
    folder = os.getcwd()
    try:
        found = getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as e:  # whatever the module raises
        found, reason = None, f"{type(e).__name__}: {shorten(e, str)}"
    else:
        reason = "it is not a function"
    if os.getcwd() != folder:
        os.chdir(folder)
        found, reason = None, "its module changes the current folder, which it must not"
    if not callable(found):
        raise SystemExit(
            f"scorer {name}: {reason}; give a checkpoint's run folder, or module:function"
        )
    return found


def command_for_run(path: str) -> str:
    """The command that makes a run folder, if a file in config/ has it as out_dir; else ""."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    pattern = os.path.join(glob.escape(root), "config", "**", "*.py")
    for file in sorted(glob.glob(pattern, recursive=True)):
        if read_file(file).get("out_dir") == path:
            return f"python train.py {os.path.relpath(file, root)}"
    return ""


# ------------------------------------------------------------------------------ without effect

OF_PPO = [
    "advantage",
    "samples_per_prompt",
    "loss_average",
    "kl_in",
    "kl_coef",
    "kl_target",
    "clip_range",
    "clip_range_high",
    "entropy_coef",
]
OF_GAE = [
    "whiten_rewards",
    "whiten_advantages",
    "discount",
    "gae_lambda",
    "value_clip_range",
    "value_coef",
]


def settings_without_effect(cfg: Config) -> list[str]:
    """Settings of another stage or method: those that are not at their default and that this run
    does not read, each with what it needs. A config that imports another one may have some, so they
    are not refused."""
    is_ppo, ranks = cfg.stage == "ppo", cfg.stage in ("preference", "spin")
    reads_stream = cfg.stage == "pretrain" or cfg.pretrain_coef
    rules = [  # settings, whether this run reads them, what they need
        (["beta", "margin"], ranks, "stage preference or spin"),
        (["loss_type"], ranks or cfg.stage == "reward", "stage reward, preference or spin"),
        (["players", "temperature", "top_k", "top_p"], cfg.stage == "spin", "stage spin"),
        (["teacher"], cfg.stage == "spin" or is_ppo, "stage spin or ppo"),
        (["judge_length_normalize"], is_scored(cfg), "a scorer in ranked_by"),
        (OF_PPO, is_ppo, "stage ppo"),
        (["missing_eos_penalty"], cfg.reward, "a reward"),
        (OF_GAE, is_ppo and cfg.advantage == "gae", "stage ppo with advantage gae"),
        (["kl_adapt"], cfg.kl_target, "kl_target"),
        (["kl_target"], cfg.kl_coef or not is_ppo, "a kl_coef above 0, which it multiplies"),
        (["lora_alpha", "lora_targets"], cfg.lora_rank, "lora_rank"),
        (["epochs"], cfg.stage == "pretrain" or not cfg.max_steps, "max_steps 0"),
        (["min_lr_ratio"], cfg.schedule != "constant", "schedule cosine or linear"),
        (["adam_betas"], cfg.optimizer != "rmsprop", "optimizer adamw or muon"),
        (["muon_lr"], cfg.optimizer == "muon", "optimizer muon"),
        (
            ["epochs", "max_rows", "layout", "eval_rows"],
            cfg.stage != "pretrain",
            "another stage than pretrain",
        ),
        (["gen_batch_size", "keep_rounds"], cfg.stage == "spin" or is_ppo, "stage spin or ppo"),
        (["pretrain_data", "pretrain_batch_size"], cfg.pretrain_coef, "pretrain_coef"),
        (["document_mask", "eval_batches"], reads_stream, "stage pretrain or pretrain_coef"),
    ]
    default = Config()
    found = []
    for names, is_read, needed in rules:
        for name in names:
            if not is_read and getattr(cfg, name) != getattr(default, name):
                found.append(f"{name} (needs {needed})")
    return found
