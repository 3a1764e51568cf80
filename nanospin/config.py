"""The settings: one dataclass, its loader, its checks.

    config.load(["config/spin_k3.py", "--beta=0.5"]) -> Config

A config file is Python assignments to the names below; it may start with `from config.spin_k2 import *`. Names that
start with an underscore are the file's own. A mistake ends the program with one line.
"""

import ast
import difflib
import glob
import inspect
import os
import re
import types
import typing
from dataclasses import dataclass, replace


TEMPLATE = "### Instruction: {prompt}\n\n### Response: "


@dataclass
class Config:
    # the run
    stage: str = "pretrain"  # pretrain | sft | reward | preference | spin | ppo
    out_dir: str = "out/run"  # everything the run writes; the same command goes on where it stopped
    init: str = ""  # run folder or checkpoint to start from; "": from scratch
    seed: int = 1337
    device: str = ""  # cpu | cuda; "": cuda if there is one
    dtype: str = ""  # float32 | bfloat16, of the products; "": bfloat16 where the GPU has it. Weights are float32
    matmul_precision: str = ""  # torch.set_float32_matmul_precision; "": as parallel.tune says
    compile: bool = False  # torch.compile each block
    activation_checkpointing: int = 0  # activation checkpointing: every n-th block is computed again in backward; 0: none, 1: all, 2: every second
    deterministic: bool = False  # a GPU's deterministic algorithms; a CPU has no others

    # several ranks: FSDP2
    hsdp_shard_size: int = (
        0  # ranks that share one copy of the weights, as the GPUs of a node (HSDP); 0: all
    )
    reshard_after_forward: bool = (
        True  # a block's weights are given up after forward and gathered again for backward
    )
    prefetch: int = 0  # blocks whose weights are gathered ahead; 0: as FSDP2 does by itself
    sample_sharded: bool = False  # sample from the sharded weights, gathered for every token, where a whole copy on each rank does not fit
    timeout: float = (
        1800.0  # seconds without a sign of a rank after which the others end with its name
    )

    # the model; None: the checkpoint's, or from scratch model.GPTConfig's default, where each is explained
    block_size: int | None = None
    n_layer: int | None = None
    n_head: int | None = None
    n_kv_head: int | None = None
    n_embd: int | None = None
    head_dim: int | None = None
    n_inner: int | None = None
    position: str | None = None
    rope_theta: float | None = None
    rope_scaling: list[float] | None = None
    sliding_window: int | None = None
    norm: str | None = None
    norm_eps: float | None = None
    mlp: str | None = None
    bias: bool | None = None
    qkv_bias: bool | None = None
    tie_embeddings: bool | None = None
    qk_norm: bool | None = None
    logit_softcap: float | None = None
    head_bias: bool | None = None
    attn_proj: bool | None = None
    attn_scale: str | None = None
    mlp_alone: bool | None = None
    init_scheme: str | None = None
    init_noise: float | None = None
    dropout: float | None = None  # the one that may differ from the checkpoint's

    # the data
    data: str = (
        "data/pydocs"  # folder with {train,val}.bin for pretrain, {train,val}.jsonl for the rest
    )
    tokenizer: str = ""  # gpt2 | bytes | a .tiktoken file | a tokenizer.json; "": the checkpoint's, or else the data's
    template: str = ""  # how a prompt is put, in training, scoring and sampling: data/template.py; "": the checkpoint's, or else TEMPLATE
    max_prompt: int = 0  # tokens of a prompt, cut at its start; 0: block_size
    max_response: int = (
        0  # tokens of a response with its end-of-text, cut at its end; 0: what block_size leaves
    )
    document_mask: bool = False  # pretrain: documents of a window do not see each other
    max_rows: int = 0  # use this many training rows (a seeded choice); 0: all

    # self-play: each round samples the policy's responses, ranks them under `players` (ppo: scores them), fits
    rounds: int = 1
    keep_rounds: int = 0  # checkpoints of this many earlier rounds are kept; 0: all
    players: list[str] = (
        "data",
        "self",
    )  # best first: data, teacher, self, and self-1, self-2 ... (earlier rounds' samples)
    teacher: str = (
        ""  # run folder or checkpoint, a ranked .jsonl file, or "rows": each row's second response
    )
    replay_rounds: int = 0  # train on the rows of this many earlier rounds too (SPIN: 1)
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    gen_batch_size: int = 128  # prompts a rank samples at a time

    # the optimisation. A step is batch_size over all ranks, each of which takes its share by micro_batch_tokens at a time
    batch_size: int = (
        32  # sequences (pretrain), or prompts with all their responses, a step over all ranks
    )
    micro_batch_tokens: int = 0  # about so many tokens a rank takes at a time, for memory alone; 0: parallel.MICRO_BATCH_TOKENS
    layout: str = "shared"  # shared: a prompt once, its responses after it; padded: each response a row with its prompt
    max_steps: int = 0  # steps a round; 0: `epochs` over the rows
    epochs: float = 1.0
    optimizer: str = (
        "adamw"  # adamw | rmsprop (SPIN's own) | muon (hidden matrices; adamw for the rest)
    )
    lr: float | list[float] = 3e-4  # a list has one value a round
    muon_lr: float = 0.02  # of muon's matrices, on the same schedule
    schedule: str = "cosine"  # cosine | linear | constant, after the warmup
    warmup_ratio: float = 0.0  # share of the steps
    min_lr_ratio: float = 0.1  # the schedule's end, as a share of lr
    weight_decay: float = 0.0  # on matrices and embeddings only
    adam_betas: list[float] = (0.9, 0.95)
    grad_clip: float = 1.0  # 0: none

    # the objective
    beta: float | list[float] = (
        0.1  # temperature of the implicit rewards; a list has one value a round
    )
    loss_type: str = "pl"  # pl (DPO, SPIN) | pairs | ipo | simpo | orpo: loss.preference_loss; reward: pl | pairs
    margin: float = 0.0  # simpo's
    rank_depth: int = 0  # terms of the ranking that count; 0: all
    label_smoothing: float = (
        0.0  # weight of the reversed ranking (cDPO), or of the uniform distribution over tokens
    )
    nll_coef: float = 0.0  # weight of next-token loss on the best response (RPO)
    taylor_order: float = 0.0  # n of T_n, for tokens and rankings; 0: -log p
    taylor_end: float | None = (
        None  # if given, n goes there in a straight line over the round's steps
    )
    focal: float = 0.0  # tokens: gamma of focal loss
    confidence_penalty: float = 0.0  # tokens: weight of minus the entropy

    score_margin: float = (
        0.0  # reward: a pair's margin is this times the difference of its `scores`; 0: none
    )
    center_coef: float = 0.0  # reward: weight of (s_i + s_j)^2, which centres the scores

    # ppo: a round is max_rows prompts, sampled and scored once, and `epochs` over them in steps of batch_size
    reward: str = (
        ""  # run folder or checkpoint of a reward model, or module:function(row, text) -> float
    )
    kl_coef: float = 0.05  # price of log pi - log pi_ref, a token; the reference is init
    kl_target: float = 0.0  # nats a response that kl_coef is steered to; 0: it is fixed
    kl_adapt: float = 0.1  # how fast: K_beta of arXiv 1909.08593
    whiten_rewards: bool = (
        True  # rewards less their mean, by their deviation, of the first round's samples
    )
    whiten_advantages: bool = True  # over the round's tokens
    missing_eos_penalty: float = (
        1.0  # what a response without end-of-text loses, of the reward as it is trained on
    )
    discount: float = 1.0
    gae_lambda: float = 0.95
    clip_range: float = 0.2  # of the policy's ratio; 0: none
    value_clip_range: float = 0.2  # of the value's change; 0: none
    value_coef: float = 0.1
    entropy_coef: float = 0.0

    # the pretraining stream beside the rows, of sft and ppo (alpha L_GPT + L_FT; gamma of PPO-ptx, arXiv 2203.02155, eq. 2)
    pretrain_coef: float = 0.0  # weight of its next-token loss; 0: none
    pretrain_data: str = ""  # its folder; "": data
    pretrain_batch_size: int = 8  # windows of block_size a step over all ranks

    # what is watched, kept and said
    eval_interval: int = 100  # steps (ppo: rounds); the last one is always evaluated
    eval_batches: int = 20  # pretrain: batches of the validation stream
    eval_rows: int = 256  # validation rows
    calibration: bool = False  # sft: also accuracy, calibration, one fitted temperature, tokens that training had: calibration.py
    save_interval: int = 200  # steps; the last step is always saved
    keep_last: int = 2  # checkpoints of a round that are kept
    keep_best: str = (
        ""  # and the one that is best by a held-out figure, as val_loss; -acc: the highest acc
    )
    on_nonfinite: str = "stop"  # stop | skip the step, where a loss or gradient is not finite
    loss_spike_factor: float = 5.0  # say so, with its rows, where a loss is so many times the median of the 50 before it; 0: never
    log_interval: int = 1  # steps a printed line; metrics.jsonl has every step
    wandb: str = "off"  # off | online | offline, Weights & Biases: board.py. Without a key or a network online is offline
    wandb_project: str = "nanospin"
    wandb_runs: str = "one"  # one for all rounds | rounds: one for each, in a group


CHOICES = {
    "stage": ["pretrain", "sft", "reward", "preference", "spin", "ppo"],
    "device": ["", "cpu", "cuda"],
    "loss_type": ["pl", "pairs", "ipo", "simpo", "orpo"],
    "dtype": ["", "float32", "bfloat16"],
    "matmul_precision": ["", "highest", "high", "medium"],
    "optimizer": ["adamw", "rmsprop", "muon"],
    "schedule": ["cosine", "linear", "constant"],
    "on_nonfinite": ["stop", "skip"],
    "wandb": ["off", "online", "offline"],
    "wandb_runs": ["one", "rounds"],
    "layout": ["packed", "padded"],
}
AT_LEAST = {
    "rounds": 1,
    "batch_size": 1,
    "eval_interval": 1,
    "eval_batches": 1,
    "eval_rows": 1,
    "save_interval": 1,
    "log_interval": 1,
    "gen_batch_size": 1,
    "pretrain_batch_size": 1,
    "keep_last": 1,
    "timeout": 1,
}
NOT_NEGATIVE = [
    "seed",
    "max_prompt",
    "max_response",
    "max_rows",
    "replay_rounds",
    "temperature",
    "top_k",
    "micro_batch_tokens",
    "max_steps",
    "epochs",
    "muon_lr",
    "weight_decay",
    "grad_clip",
    "rank_depth",
    "nll_coef",
    "taylor_order",
    "focal",
    "confidence_penalty",
    "score_margin",
    "center_coef",
    "keep_rounds",
    "kl_coef",
    "kl_target",
    "kl_adapt",
    "missing_eos_penalty",
    "clip_range",
    "value_clip_range",
    "value_coef",
    "entropy_coef",
    "pretrain_coef",
    "activation_checkpointing",
    "hsdp_shard_size",
    "prefetch",
    "loss_spike_factor",
]
MODEL = [
    "block_size",
    "n_layer",
    "n_head",
    "n_kv_head",
    "n_embd",
    "head_dim",
    "n_inner",
    "position",
    "rope_theta",
    "rope_scaling",
    "sliding_window",
    "norm",
    "norm_eps",
    "mlp",
    "bias",
    "qkv_bias",
    "tie_embeddings",
    "qk_norm",
    "logit_softcap",
    "head_bias",
    "attn_proj",
    "attn_scale",
    "mlp_alone",
    "init_scheme",
    "init_noise",
    "dropout",
]


def load(argv):
    """argv: config files and --key=value overrides, later ones win. Returns a checked Config; exits on a mistake."""
    hints = typing.get_type_hints(Config)
    settings = {}
    for arg in argv:
        if arg in ("-h", "--help"):
            print(__doc__ + "\n" + inspect.getsource(Config))
            raise SystemExit(0)
        elif arg.startswith("--"):
            name, equals, text = arg[2:].partition("=")
            if not equals:
                raise SystemExit(f"{arg}: an override is written --name=value")
            known(name, hints, "command line")
            settings[name] = convert(name, parse(text, hints[name]), hints[name], "command line")
        else:
            for name, value in read_file(arg).items():
                known(name, hints, arg)
                settings[name] = convert(name, value, hints[name], arg)
    cfg = Config(**settings)
    cfg.players, cfg.adam_betas = list(cfg.players), list(cfg.adam_betas)
    check(cfg)
    return cfg


def read_file(path):
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
    return {
        k: v
        for k, v in names.items()
        if not k.startswith("_") and not isinstance(v, types.ModuleType)
    }


def known(name, hints, where):
    if name not in hints:
        close = difflib.get_close_matches(name, hints, n=1)
        raise SystemExit(
            f"{where}: unknown setting {name!r}"
            + (f", did you mean {close[0]!r}?" if close else "")
        )


def parse(text, hint):
    """The value of --name=text."""
    if hint in (str, str | None):
        return text
    if hint == list[str] and not text.startswith("["):
        return text.split(",")
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text  # `convert` says what it should have been


def convert(name, value, hint, where):
    """The value if it has the hinted type, an int where a float is asked made one; exits otherwise."""

    def fits(v, kind):
        return (
            abs(v) < 1e300 if kind is float and type(v) in (int, float) else type(v) is kind
        )  # neither infinite nor NaN

    for option in typing.get_args(hint) if isinstance(hint, types.UnionType) else [hint]:
        if typing.get_origin(option) is list:
            item = typing.get_args(option)[0]
            if isinstance(value, (list, tuple)) and all(fits(v, item) for v in value):
                return [item(v) for v in value]
        elif fits(value, option):
            return option(value) if option is float else value
    expected = str(hint) if not isinstance(hint, type) or typing.get_origin(hint) else hint.__name__
    raise SystemExit(
        f"{where}: {name} must be {expected.replace('NoneType', 'None')}, got {value!r}"
    )


def check(cfg):
    """Ranges and combinations."""

    def must(ok, message):
        if not ok:
            raise SystemExit(f"config: {message}")

    for name, value in vars(cfg).items():
        must(type(value) is not int or value < 2**48, f"{name} must be below 2**48, got {value}")
        odd = type(value) is str and re.search(
            "[\x00-\x1f\x7f-\x9f\ud800-\udfff]",
            re.sub("[\n\t]", "", value) if name == "template" else value,
        )
        must(not odd, f"{name} must be Unicode without control characters, got {value!r}")
    for name, choices in CHOICES.items():
        value = getattr(cfg, name)
        must(
            value in choices,
            f"{name} must be one of {', '.join(c or repr(c) for c in choices)}, got {value!r}",
        )
    for name, least in AT_LEAST.items():
        must(
            getattr(cfg, name) >= least,
            f"{name} must be at least {least}, got {getattr(cfg, name)}",
        )
    for name in NOT_NEGATIVE:
        must(getattr(cfg, name) >= 0, f"{name} must not be negative, got {getattr(cfg, name)}")
    must((cfg.logit_softcap or 0) >= 0, f"softcap must not be negative, got {cfg.logit_softcap}")
    for name in ("norm_eps", "rope_theta"):
        must(
            getattr(cfg, name) is None or getattr(cfg, name) > 0,
            f"{name} must be above 0, got {getattr(cfg, name)}",
        )
    must(0 < cfg.top_p <= 1, f"top_p must be in (0, 1], got {cfg.top_p}")
    for n in (cfg.taylor_order, cfg.taylor_end or 0.0):
        must(
            0 <= n <= 20, f"taylor_order and taylor_end must be at least 0 and at most 20, got {n}"
        )
    if cfg.stage in ("pretrain", "sft"):
        used = [
            name
            for name in ("taylor_order", "focal", "label_smoothing", "confidence_penalty")
            if getattr(cfg, name) or name == "taylor_order" and cfg.taylor_end
        ]
        must(len(used) <= 1, f"{' and '.join(used)} are each a token loss of its own: set one")
    else:
        must(
            not (cfg.focal or cfg.confidence_penalty),
            "focal and confidence_penalty are token losses, of pretrain and sft",
        )
    must(not cfg.calibration or cfg.stage == "sft", "calibration is measured in stage sft alone")
    must(
        0 <= cfg.warmup_ratio <= 1 and 0 <= cfg.min_lr_ratio <= 1,
        "warmup and min_lr are shares, in [0, 1]",
    )
    must(
        0 <= cfg.label_smoothing < 0.5,
        f"label_smoothing must be in [0, 0.5), got {cfg.label_smoothing}",
    )
    must(
        len(cfg.adam_betas) == 2 and all(0 <= b < 1 for b in cfg.adam_betas),
        "adam_betas must be two numbers in [0, 1)",
    )
    must(
        cfg.loss_type not in ("pairs", "ipo")
        or not (
            cfg.rank_depth
            or cfg.label_smoothing
            or cfg.stage in ("preference", "spin")
            and (cfg.taylor_order or cfg.taylor_end)
        ),
        f"kind {cfg.loss_type} has no depth, label_smoothing or taylor_order",
    )
    must(not cfg.margin or cfg.loss_type == "simpo", "margin is simpo's alone")
    if cfg.stage == "reward":
        must(
            cfg.loss_type in ("pl", "pairs"),
            f"stage reward has kind pl or pairs, not {cfg.loss_type}",
        )
        for name in ("rank_depth", "label_smoothing", "nll_coef", "taylor_order"):
            must(not getattr(cfg, name), f"stage reward has no {name}")
    else:
        must(
            not cfg.score_margin and not cfg.center_coef,
            "score_margin and center_coef are stage reward's alone",
        )
    must(
        not cfg.template or is_template(cfg.template),
        "template must contain {prompt} once, and at most once {turn} before it and {response} after it",
    )
    must(cfg.stage != "pretrain" or cfg.max_steps, "stage pretrain needs max_steps")
    must(cfg.max_steps or cfg.epochs, "either max_steps or epochs must be above 0")
    must(
        cfg.stage in ("pretrain", "sft") or cfg.init,
        f"stage {cfg.stage} needs init, the checkpoint to start from",
    )
    must(cfg.stage in ("spin", "ppo") or cfg.rounds == 1, f"stage {cfg.stage} has one round")
    must(
        not cfg.pretrain_coef or cfg.stage in ("sft", "ppo"),
        f"stage {cfg.stage} has no pretrain_coef",
    )
    must(
        (cfg.stage == "ppo") == bool(cfg.reward),
        "stage ppo, and no other, has a reward: a reward model's run folder, or module:function",
    )
    if cfg.stage == "ppo":
        must(
            (cfg.temperature, cfg.top_k, cfg.top_p) == (1, 0, 1),
            "stage ppo samples from the policy itself: temperature 1, no top_k, no top_p",
        )
        must(
            0 <= cfg.discount <= 1 and 0 <= cfg.gae_lambda <= 1,
            "discount and gae_lambda must be in [0, 1]",
        )
        must(cfg.clip_range < 1, f"clip must be below 1, got {cfg.clip_range}")
    for name in ("lr", "beta"):
        value = getattr(cfg, name)
        values = value if isinstance(value, list) else [value]
        must(
            len(values) in (1, cfg.rounds),
            f"{name} has {len(values)} values for {cfg.rounds} rounds",
        )
        must(all(v > 0 for v in values), f"{name} must be above 0")
    if cfg.stage == "spin":
        for p in cfg.players:
            must(
                p in ("data", "teacher", "self")
                or (p.startswith("self-") and p[5:].isdigit() and int(p[5:]) > 0),
                f"players are data, teacher, self, self-1, self-2 ..., got {p!r}",
            )
        must(
            len(set(cfg.players)) == len(cfg.players) >= 2,
            "players must be two or more different ones",
        )
        must(
            cfg.players[0] == "data",
            "players must begin with data: validation loss and nll_coef are on its responses",
        )
        must("self" in cfg.players, "players must name self: without it nothing is played")
        must(
            ("teacher" in cfg.players) == bool(cfg.teacher),
            "players names teacher exactly when `teacher` says where it is",
        )


def is_template(text):
    """Whether a text is what data/template.py calls a template."""
    marks = re.findall(r"\{(?:turn|prompt|response)\}", text)
    return marks.count("{prompt}") == 1 and marks == [
        m for m in ("{turn}", "{prompt}", "{response}") if m in marks
    ]


def maker(path):
    """The command that makes a run folder, if a file in config/ has it as out_dir; else ""."""
    for file in sorted(glob.glob(os.path.join(os.path.dirname(os.path.abspath(__file__)), "*.py"))):
        with open(file, encoding="utf-8") as f:
            if f'out_dir = "{path}"' in f.read():
                return f"python train.py config/{os.path.basename(file)}"
    return ""


def per_round(value, round_id):
    """The value of a setting that may be a list with one value a round."""
    return (
        (value if len(value) > 1 else value * (round_id + 1))[round_id]
        if isinstance(value, list)
        else value
    )


def model_settings(cfg):
    """The model's settings that the config gives, as a dict."""
    return {name: getattr(cfg, name) for name in MODEL if getattr(cfg, name) is not None}


def pretrain_config(cfg):
    """The config of the pretraining stream beside a run's rows, as a stage of its own would have it."""
    return replace(
        cfg,
        stage="pretrain",
        data=cfg.pretrain_data or cfg.data,
        batch_size=cfg.pretrain_batch_size,
        taylor_order=0.0,
        taylor_end=None,
        focal=0.0,
        label_smoothing=0.0,
        confidence_penalty=0.0,
    )
