"""The model types of Hugging Face that tools/hf.py reads and writes: their settings in config.json
and the names of their tensors.

`FAMILIES` has the tables. `parse_hf_config` translates a config.json to GPTConfig's fields, and
`to_hf_config` the other way. `tensor_map` lists the tensors that each of our parameters is made of.
"""

import dataclasses
import math
import typing
from dataclasses import dataclass, field, replace

import torch

from data.files import printable
from model import GPT, GPTConfig, is_nth
from nanospin import config

# ------------------------------------------------------------------------------------- the tables


@dataclass(frozen=True)
class Family:
    """What a model_type calls its settings, and its modules."""

    architecture: str  # the class in transformers
    names: dict[str, str]  # GPTConfig's fields and their names in config.json
    activations: dict[str, str]  # in config.json and in GPTConfig.mlp; export uses the first
    fields: dict  # GPTConfig's fields that all its models share
    defaults: dict  # the fields that a config.json may leave out, as transformers has them
    prefix: str = "model."  # of the names of tensors, but for the head's
    modules: dict[str, list[str]] = field(default_factory=dict)  # ours -> theirs; {}: the same
    rope_theta: float = 10000.0  # the default
    rotary_fraction: float | None = None  # the default; None: all dimensions are rotated
    norm_offset: float = 0.0  # what is added to the weight of a norm that is stored


LLAMA_NAMES = {
    "block_size": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "head_dim": "head_dim",
    "n_embd": "hidden_size",
    "n_inner": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "mlp": "hidden_act",
    "tie_embeddings": "tie_word_embeddings",
}

LLAMA_MODULES = {
    "wte": ["embed_tokens"],
    "ln_f": ["norm"],
    "lm_head": ["lm_head"],
    "ln_1": ["input_layernorm"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.q_norm": ["self_attn.q_norm"],
    "attn.k_norm": ["self_attn.k_norm"],
    "attn.c_proj": ["self_attn.o_proj"],
    "ln_2": ["post_attention_layernorm"],
    "mlp.c_fc": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.c_proj": ["mlp.down_proj"],
}

GPT2 = Family(
    architecture="GPT2LMHeadModel",
    names={
        "block_size": "n_positions",
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_embd": "n_embd",
        "n_inner": "n_inner",
        "norm_eps": "layer_norm_epsilon",
        "mlp": "activation_function",
        "tie_embeddings": "tie_word_embeddings",
    },
    activations={
        "gelu_new": "gelu",
        "gelu_pytorch_tanh": "gelu",
        "gelu": "gelu_erf",
        "relu": "relu",
        "relu2": "relu2",
    },
    fields={"position": "learned", "norm": "layernorm"},
    defaults={"n_inner": 0, "tie_embeddings": True},
    prefix="transformer.",
)

LLAMA = Family(
    architecture="LlamaForCausalLM",
    names=LLAMA_NAMES,
    activations={"silu": "swiglu"},
    fields={"position": "rotary", "norm": "rmsnorm", "bias": False},
    defaults={"n_kv_head": 0, "head_dim": 0, "tie_embeddings": False},
    modules=LLAMA_MODULES,
)

PYTHIA = Family(  # GPT-NeoX
    architecture="GPTNeoXForCausalLM",
    names={
        "block_size": "max_position_embeddings",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_embd": "hidden_size",
        "n_inner": "intermediate_size",
        "norm_eps": "layer_norm_eps",
        "mlp": "hidden_act",
        "tie_embeddings": "tie_word_embeddings",
        "parallel_residual": "use_parallel_residual",
    },
    activations={
        "gelu": "gelu_erf",
        "gelu_new": "gelu",
        "gelu_pytorch_tanh": "gelu",
        "relu": "relu",
        "relu2": "relu2",
    },
    fields={"position": "rotary", "norm": "layernorm", "bias": True},
    defaults={"mlp": "gelu", "tie_embeddings": False, "parallel_residual": True},
    prefix="gpt_neox.",
    modules={
        "wte": ["embed_in"],
        "ln_f": ["final_layer_norm"],
        "lm_head": ["embed_out"],
        "ln_1": ["input_layernorm"],
        "attn.c_attn": ["attention.query_key_value"],
        "attn.c_proj": ["attention.dense"],
        "ln_2": ["post_attention_layernorm"],
        "mlp.c_fc": ["mlp.dense_h_to_4h"],
        "mlp.c_proj": ["mlp.dense_4h_to_h"],
    },
    rotary_fraction=0.25,
)

GEMMA2 = replace(
    LLAMA,
    architecture="Gemma2ForCausalLM",
    names=LLAMA_NAMES | {"mlp": "hidden_activation"},
    activations={"gelu_pytorch_tanh": "geglu"},
    fields=LLAMA.fields | {"norm_position": "both", "scale_embeddings": True},
    defaults={"head_dim": 256, "mlp": "gelu_pytorch_tanh", "tie_embeddings": True},
    modules=LLAMA_MODULES
    | {
        "ln_1_post": ["post_attention_layernorm"],
        "ln_2": ["pre_feedforward_layernorm"],
        "ln_2_post": ["post_feedforward_layernorm"],
    },
    norm_offset=1.0,
)

FAMILIES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": replace(
        LLAMA,
        architecture="MistralForCausalLM",
        defaults={"head_dim": 0, "tie_embeddings": False},
    ),
    "qwen2": replace(
        LLAMA,
        architecture="Qwen2ForCausalLM",
        fields=LLAMA.fields | {"qkv_bias": True},
        defaults={"head_dim": 0, "tie_embeddings": False},
    ),
    "qwen3": replace(
        LLAMA,
        architecture="Qwen3ForCausalLM",
        fields=LLAMA.fields | {"qk_norm": True},
        defaults={"head_dim": 128, "tie_embeddings": False},
    ),
    "phi3": replace(
        LLAMA,
        architecture="Phi3ForCausalLM",
        modules=LLAMA_MODULES
        | {"attn.c_attn": ["self_attn.qkv_proj"], "mlp.c_fc": ["mlp.gate_up_proj"]},
        rotary_fraction=1.0,
    ),
    "olmo2": replace(
        LLAMA,
        architecture="Olmo2ForCausalLM",
        fields=LLAMA.fields
        | {"norm_position": "after", "qk_norm": True, "qk_norm_over": "projection"},
        modules=LLAMA_MODULES
        | {
            "ln_1_post": ["post_attention_layernorm"],
            "ln_2_post": ["post_feedforward_layernorm"],
        },
    ),
    "smollm3": replace(
        LLAMA,
        architecture="SmolLM3ForCausalLM",
        defaults={"head_dim": 0, "tie_embeddings": True},
        rope_theta=2e6,
    ),
    "gpt_neox": PYTHIA,
    "gemma2": GEMMA2,
    "gemma3_text": replace(
        GEMMA2,
        architecture="Gemma3ForCausalLM",
        fields=GEMMA2.fields | {"qk_norm": True},
        rope_theta=1e6,
    ),
}

# The values of GPTConfig.rope_scaling, as config.json calls them.
ROPE_SCALING = {
    "linear": ["factor"],
    "llama3": [
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ],
    "yarn": [
        "factor",
        "beta_slow",
        "beta_fast",
        "original_max_position_embeddings",
        "attention_factor",
    ],
}

# Settings that do not change what the model computes. Dropout belongs to the training run.
IGNORED_SETTINGS = set(
    """
    _attn_implementation_autoset _name_or_path architectures attention_dropout attn_pdrop
    bos_token_id cache_implementation classifier_dropout dtype embd_pdrop eos_token_id
    finetuning_task gradient_checkpointing hidden_dropout id2label initializer_range is_llama_config
    label2id n_ctx n_special num_labels output_past pad_token_id predict_special_tokens
    pretraining_tp problem_type reorder_and_upcast_attn resid_pdrop return_dict sep_token_id
    task_specific_params tokenizer_class torch_dtype transformers.js_config transformers_version
    unk_token_id use_cache
    """.split()
)
IGNORED_PREFIXES = ("summary_", "unsloth_")

# Settings that change nothing with these values: transformers' defaults. Old files name them all,
# those of sampling included.
HARMLESS_VALUES = {
    "partial_rotary_factor": 1.0,
    "is_decoder": True,
    "is_causal": True,
    "chunk_size_feed_forward": 0,
    "pruned_heads": {},
    "max_length": 20,
    "min_length": 0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "diversity_penalty": 0.0,
    "length_penalty": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
}

# Of others false is harmless too: something that the model does not have.
TRUE_BY_DEFAULT = ("is_causal", "use_rope", "use_qk_norm", "use_bias", "normalize_before")

VOCAB_TABLES = ("wte.weight", "lm_head.weight")  # one row for each token id, padded

REQUIRED = object()


# ------------------------------------------------------------------------------------ config.json


@dataclass
class HFModel:
    """What a config.json says, in our terms."""

    model_type: str
    fields: dict  # GPTConfig's fields, without vocab_size
    vocab_rows: int  # rows of the embedding; often more than the tokenizer has ids
    max_block_size: int  # the longest sequence on which our GPT computes the same


class HFSettings:
    """The settings of a config.json. Each is taken once; those left over are an error."""

    def __init__(self, settings, path):
        self.left = dict(settings)
        self.path = path

    def refuse(self, message) -> typing.NoReturn:
        raise SystemExit(printable(f"{self.path}: {message}"))

    def take(self, name, kind, default=REQUIRED):
        """Remove a setting and return it, checked to be of a type. null counts as missing."""
        value = self.left.pop(name, None)
        if value is not None:
            return config.convert(name, value, kind, self.path)
        if default is REQUIRED:
            self.refuse(f"{name} is missing")
        return default

    def check_none_left(self):
        unknown = []
        for name, value in self.left.items():
            ignored = name in IGNORED_SETTINGS or name.startswith(IGNORED_PREFIXES)
            harmless = [None, HARMLESS_VALUES.get(name)]
            if name not in TRUE_BY_DEFAULT:
                harmless.append(False)
            if not ignored and value not in harmless:
                unknown.append(f"{name} = {value!r}")
        if unknown:
            self.refuse(f"these settings are not supported: {', '.join(unknown)}")


def parse_hf_config(hf_config: dict, path: str) -> HFModel:
    """Translate a config.json. Exits with the name of the first setting we cannot represent."""
    settings = HFSettings(hf_config, path)
    if settings.left.get("quantization_config"):
        settings.refuse(
            "its weights are quantised (quantization_config); take the original, or save it in full"
            " with transformers: model.dequantize(), then model.save_pretrained(FOLDER)"
        )
    if settings.left.get("auto_map"):
        settings.refuse(
            "the model brings code of its own (auto_map), which is not run; if it computes what its"
            " model_type does, remove auto_map from config.json"
        )
    model_type = settings.take("model_type", str)
    if model_type == "gemma3":
        settings.refuse("a model of images and text (gemma3); only gemma3_text is supported")
    if model_type not in FAMILIES:
        supported = ", ".join(FAMILIES)
        settings.refuse(f"model_type {model_type!r} is not supported; use one of {supported}")

    fields = take_named(settings, FAMILIES[model_type])
    vocab_rows = settings.take("vocab_size", int)
    max_block_size = fields["block_size"]
    if model_type == "gpt2":
        if not settings.take("scale_attn_weights", bool, True):
            settings.refuse("scale_attn_weights = false is not supported")
    else:
        fields |= take_biases(settings, model_type)
        if model_type.startswith("gemma"):
            fields |= take_gemma(settings, model_type, fields)
        fields |= take_rope(settings, model_type, fields)
        fields |= take_no_rope_layers(settings, model_type, fields["n_layer"])
    if model_type in ("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3"):
        window, in_all_layers = take_sliding_window(settings, model_type, fields["n_layer"])
        if window and in_all_layers:
            fields["sliding_window"] = window
        elif window:  # up to this length a window of some layers makes no difference
            max_block_size = min(max_block_size, window)

    settings.check_none_left()
    return HFModel(model_type, fields, vocab_rows, max_block_size)


def take_named(settings, family):
    """GPTConfig's fields of the settings in a family's table, and those all its models share."""
    types = config.field_hints(GPTConfig)
    fields = dict(family.fields)
    for name, hf_name in family.names.items():
        fields[name] = settings.take(hf_name, types[name], family.defaults.get(name, REQUIRED))

    if fields["n_layer"] > GPTConfig.MOST["n_layer"]:
        settings.refuse(f"{family.names['n_layer']} = {fields['n_layer']} is too large")
    if fields["mlp"] not in family.activations:
        supported = ", ".join(family.activations)
        settings.refuse(
            f"{family.names['mlp']} {fields['mlp']!r} is not supported; use one of {supported}"
        )
    fields["mlp"] = family.activations[fields["mlp"]]
    return fields


def take_biases(settings, model_type):
    if model_type == "gpt_neox":  # its MLP always has biases
        if not settings.take("attention_bias", bool, True):
            settings.refuse("attention_bias = false is not supported")
        return {}
    bias = settings.take("attention_bias", bool, False)
    if settings.take("mlp_bias", bool, False) != bias:
        settings.refuse("attention_bias and mlp_bias must be equal")
    return {"bias": bias}


def take_gemma(settings, model_type, fields):
    """The scale of queries, the soft caps and the windows of Gemma 2 or 3, and the rotary positions
    of Gemma 3's layers with a window. Those of the others are left to `take_rope`."""
    for ignored in ("hidden_act", "sliding_window_size"):  # transformers does not read them
        settings.left.pop(ignored, None)
    scalar = settings.take("query_pre_attn_scalar", float, 256.0)
    taken = {"query_pre_attn_scalar": 0.0 if scalar == fields["head_dim"] else scalar}
    if model_type == "gemma2":
        taken["attention_softcap"] = take_softcap(settings, "attn_logit_softcapping", 50.0)
        taken["logit_softcap"] = take_softcap(settings, "final_logit_softcapping", 30.0)
        pattern = 2
    else:
        taken["logit_softcap"] = take_softcap(settings, "final_logit_softcapping", 0.0)
        # transformers writes the first beside layer_types, and reads only the second without them
        written = settings.take("_sliding_window_pattern", int, 0)
        pattern = settings.take("sliding_window_pattern", int, 6)
        if written not in (0, pattern) and settings.left.get("layer_types") is None:
            settings.refuse(f"_sliding_window_pattern {written} needs layer_types")
        taken["rope_local_theta"] = take_local_theta(settings)

    window = settings.take("sliding_window", int, 4096)
    n_layer = fields["n_layer"]
    is_full = [is_nth(layer, pattern) for layer in range(n_layer)]
    usual = ["full_attention" if full else "sliding_attention" for full in is_full]
    layer_types = take_layer_types(settings, usual)
    interval = find_interval([name == "full_attention" for name in layer_types])
    if interval is None:
        settings.refuse(f"layer_types {layer_types} are not supported: they are not periodic")
    if interval == 1:  # no layer has a window
        return taken | {"rope_local_theta": 0.0}
    return taken | {"sliding_window": window, "full_attention_interval": interval}


def take_softcap(settings, name, default):
    if name in settings.left and settings.left[name] is None:  # null: none
        default = 0.0
    return settings.take(name, float, default)


def take_local_theta(settings):
    """Gemma 3's theta in layers with a window. What it says of the others replaces
    rope_parameters."""
    theta = settings.take("rope_local_base_freq", float, 10000.0)
    rope = dict(settings.take("rope_parameters", dict, {}))
    local = rope.pop("sliding_attention", None) or {}
    full = rope.pop("full_attention", None) or {}
    local = dict(config.convert("sliding_attention", local, dict, settings.path))
    theta = local.pop("rope_theta", theta)
    local_type = local.pop("rope_type", "default")
    if rope or local or local_type != "default":
        settings.refuse(f"rotary positions {rope | local} of type {local_type!r} are not supported")
    settings.left["rope_parameters"] = full
    return config.convert("rope_theta", theta, float, settings.path)


def take_layer_types(settings, usual):
    layer_types = settings.take("layer_types", list[str], usual)
    known = set(layer_types) <= {"full_attention", "sliding_attention"}
    if not known or len(layer_types) != len(usual):
        settings.refuse(f"layer_types {layer_types} are not supported")
    return layer_types


def find_interval(marked: list[bool]) -> int | None:
    """k if every k-th layer is marked and no other; 0 if none is; None if it is otherwise."""
    interval = marked.index(True) + 1 if True in marked else 0
    periodic = [is_nth(layer, interval) for layer in range(len(marked))]
    return interval if marked == periodic else None


def take_rope(settings, model_type, fields):
    """GPTConfig's fields of rotary positions. They are at the top level, or in a dictionary."""
    family = FAMILIES[model_type]
    rope = {"rope_type": "default"}
    scaling = settings.take("rope_scaling", dict, {})
    parameters = settings.take("rope_parameters", dict, {})
    if scaling and parameters and scaling != parameters:  # transformers 5 would read only the first
        settings.refuse("rope_scaling and rope_parameters differ: which of them is right?")
    rope |= scaling or parameters

    theta_name = "rotary_emb_base" if model_type == "gpt_neox" else "rope_theta"
    theta = settings.take(theta_name, float, family.rope_theta)
    theta = rope.pop("rope_theta", theta)
    taken = {"rope_theta": config.convert("rope_theta", theta, float, settings.path)}

    if family.rotary_fraction is not None:
        name = "rotary_pct" if model_type == "gpt_neox" else "partial_rotary_factor"
        fraction = settings.take(name, float, family.rotary_fraction)
        fraction = rope.pop("partial_rotary_factor", fraction)
        fraction = config.convert("partial_rotary_factor", fraction, float, settings.path)
        head_dim = fields.get("head_dim") or fields["n_embd"] // max(fields["n_head"], 1)
        if not 0 < head_dim <= GPTConfig.MOST["head_dim"] or not 0 < fraction <= 1:
            settings.refuse(f"{name} = {fraction} of {head_dim} dimensions is out of range")
        rotary_dim = int(head_dim * fraction)
        if not rotary_dim:
            settings.refuse(f"{name} = {fraction} rotates nothing")
        taken["rotary_dim"] = 0 if rotary_dim == head_dim else rotary_dim
    elif rope.get("partial_rotary_factor") == 1.0:
        del rope["partial_rotary_factor"]

    rope_type = rope.pop("type", rope["rope_type"])  # old files say "type"
    rope_type = config.convert("rope_type", rope_type, str, settings.path)
    if model_type == "phi3":
        settings.take("original_max_position_embeddings", int, 0)
        if rope_type != "default":  # transformers takes yarn for longrope
            settings.refuse("longrope is not supported: its frequencies change with the length")
    if rope_type in ROPE_SCALING:
        taken["rope_scaling_type"] = rope_type
        taken["rope_scaling"] = take_scaling(settings, rope, rope_type, fields["block_size"])
    if rope_type not in ("default", *ROPE_SCALING) or set(rope) != {"rope_type"}:
        settings.refuse(f"rotary positions {rope} are not supported")
    return taken


def take_scaling(settings, rope, rope_type, block_size):
    """The values of GPTConfig.rope_scaling, which are removed from `rope`."""
    if rope_type != "linear":
        rope.setdefault("original_max_position_embeddings", block_size)
    if rope_type == "yarn":
        if rope.pop("truncate", True) is not True:
            settings.refuse("rotary positions with truncate = false are not supported")
        mscales = rope.pop("mscale", None), rope.pop("mscale_all_dim", None)
        for name, default in (("beta_slow", 1.0), ("beta_fast", 32.0)):
            rope[name] = rope.get(name) or default
        if rope.get("attention_factor") is None:
            rope["attention_factor"] = yarn_scale(settings, rope.get("factor"), *mscales)
    values = [rope.pop(name, None) for name in ROPE_SCALING[rope_type]]
    return config.convert("rope_scaling", values, list[float], settings.path)


def yarn_scale(settings, *values):
    """yarn's default factor of cos and sin: values are factor, mscale and mscale_all_dim."""
    values = [0.0 if value is None else value for value in values]
    factor, mscale, mscale_all_dim = config.convert("yarn", values, list[float], settings.path)

    def scale(m):
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    if mscale and mscale_all_dim:
        return scale(mscale) / scale(mscale_all_dim)
    return scale(1.0)


def take_no_rope_layers(settings, model_type, n_layer):
    """SmolLM3's layers without positions. In config.json 1 marks those that have them."""
    if model_type != "smollm3":
        return {}
    interval = settings.take("no_rope_layer_interval", int, 4)
    usual = [int(not is_nth(layer, interval)) for layer in range(n_layer)]
    has_rope = settings.take("no_rope_layers", list[int], usual)
    interval = find_interval([not flag for flag in has_rope])
    if interval is None or len(has_rope) != n_layer:
        settings.refuse(f"no_rope_layers {has_rope} are not supported: they are not periodic")
    return {"no_rope_layer_interval": interval}


def take_sliding_window(settings, model_type, n_layer):
    """The sliding window, 0 if there is none, and whether it is that of all layers.

    Each model type has what transformers reads there: Llama no window, Qwen and SmolLM3 a switch,
    Mistral and Qwen a type of each layer. Where something else would change the window it is
    refused.
    """
    is_qwen = model_type.startswith("qwen")
    has_switch = is_qwen or model_type == "smollm3"
    has_types = is_qwen or model_type == "mistral"
    default = 0
    if has_types and "sliding_window" not in settings.left:  # null: no window
        default = 4096
    window = settings.take("sliding_window", int, default)
    used = settings.take("use_sliding_window", bool, not has_switch)
    if used and model_type == "smollm3":
        settings.refuse("use_sliding_window = true is not supported")
    if window and not used and not has_switch and model_type != "llama":
        settings.refuse(
            f"use_sliding_window = false is not supported: transformers' {model_type} does not read"
            " it, and has the window; for a model without one remove sliding_window"
        )
    if not used or model_type == "llama":
        window = 0

    num_full = settings.take("max_window_layers", int, 28)  # Qwen's first layers have no window
    if not is_qwen:
        num_full = 0
    usual = ["full_attention" if i < num_full else "sliding_attention" for i in range(n_layer)]
    if not has_types:
        usual = ["sliding_attention" if window else "full_attention"] * n_layer
    layer_types = take_layer_types(settings, usual)
    if not has_types and layer_types != usual:
        settings.refuse(f"layer_types {layer_types} are not supported for {model_type}")
    if "sliding_attention" not in layer_types:
        window = 0
    return window, "full_attention" not in layer_types


def find_model_type(c: GPTConfig) -> str:
    """The model type that a GPTConfig is exported as, if it can be."""
    if c.position == "learned":
        return "gpt2"
    if c.norm_position == "both":
        return "gemma3_text" if c.qk_norm else "gemma2"
    if c.norm_position == "after":
        return "olmo2"
    if c.norm == "layernorm" and c.mlp in PYTHIA.activations.values():
        return "gpt_neox"
    if c.no_rope_layer_interval:
        return "smollm3"
    if 0 < c.rotary_dim < c.head_dim:
        return "phi3"
    if c.qk_norm:
        return "qwen3"
    if c.qkv_bias and not c.bias:
        return "qwen2"
    return "mistral" if c.sliding_window else "llama"


def to_hf_config(c: GPTConfig) -> tuple[str, dict]:
    """The model type and the config.json of a GPTConfig. Exits if no model type can represent it:
    if `parse_hf_config` reads something else from it."""
    model_type = find_model_type(c)
    family = FAMILIES[model_type]
    activation = next((hf for hf, ours in family.activations.items() if ours == c.mlp), None)
    if activation is None:
        supported = " or ".join(sorted(set(family.activations.values())))
        raise SystemExit(
            f"the model cannot be exported: mlp is {c.mlp!r}, {model_type} has {supported}"
        )

    hf_config = {"model_type": model_type, "architectures": [family.architecture]}
    hf_config |= special_settings(c, model_type)
    for name, hf_name in family.names.items():
        hf_config[hf_name] = activation if name == "mlp" else getattr(c, name)
    hf_config["vocab_size"] = c.vocab_size
    if model_type != "gpt2":
        hf_config |= rope_settings(c, model_type)

    fields = parse_hf_config(hf_config, "config.json").fields
    found = GPTConfig(**fields, vocab_size=c.vocab_size)
    unused = unused_fields(c)
    for name, theirs in dataclasses.asdict(found).items():
        ours = getattr(c, name)
        if ours != theirs and name not in unused:
            raise SystemExit(
                f"the model cannot be exported: {name} is {ours!r}, {model_type} has {theirs!r}"
            )
    return model_type, hf_config


def unused_fields(c) -> set[str]:
    """The fields that do not change what this model computes."""
    unused = {"vocab_size", "dropout", "scalar_head"}
    if c.position == "learned":
        for each in dataclasses.fields(c):
            if each.name.startswith(("rope_", "rotary_", "no_rope_")):
                unused.add(each.name)
    if not c.rope_scaling:
        unused.add("rope_scaling_type")
    if not c.qk_norm:
        unused.add("qk_norm_over")
    if c.bias:
        unused.add("qkv_bias")
    if not c.sliding_window:
        unused |= {"full_attention_interval", "rope_local_theta"}
    if c.rotary_dim == c.head_dim:
        unused.add("rotary_dim")
    if c.query_pre_attn_scalar == c.head_dim:
        unused.add("query_pre_attn_scalar")
    return unused


def special_settings(c, model_type):
    """The settings that only some model types have, but for those of rotary positions."""
    if model_type == "gpt2":
        return {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    if model_type in ("qwen2", "qwen3"):
        return {
            "attention_bias": False,
            "use_sliding_window": bool(c.sliding_window),
            "sliding_window": c.sliding_window or None,
            "max_window_layers": 0 if c.sliding_window else c.n_layer,
        }
    if model_type == "mistral":
        return {"sliding_window": c.sliding_window}
    if model_type == "phi3":
        return {"sliding_window": c.sliding_window or None}
    if model_type == "llama":
        return {"attention_bias": c.bias, "mlp_bias": c.bias}
    if model_type == "smollm3":
        layers = range(c.n_layer)
        has_rope = [int(not is_nth(layer, c.no_rope_layer_interval)) for layer in layers]
        return {"attention_bias": c.bias, "mlp_bias": c.bias, "no_rope_layers": has_rope}
    if not model_type.startswith("gemma"):
        return {}

    types = {False: "full_attention", True: "sliding_attention"}
    scalar = c.query_pre_attn_scalar or c.head_dim
    settings = {
        "attention_bias": False,
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "final_logit_softcapping": c.logit_softcap or None,
        "sliding_window": c.sliding_window or c.block_size,  # transformers wants one always
        "layer_types": [types[c.window(layer) > 0] for layer in range(c.n_layer)],
    }
    if model_type == "gemma2":
        settings["attn_logit_softcapping"] = c.attention_softcap or None
    return settings


def rope_settings(c, model_type):
    settings = {"rope_theta": c.rope_theta, "rope_scaling": None}
    fraction = (c.rotary_dim or c.head_dim) / c.head_dim
    if model_type == "gpt_neox":
        settings = {"rotary_emb_base": c.rope_theta, "rotary_pct": fraction, "rope_scaling": None}
    elif model_type == "phi3":
        settings["partial_rotary_factor"] = fraction
    elif model_type == "gemma3_text":
        settings["rope_local_base_freq"] = c.rope_local_theta or c.rope_theta
    if c.rope_scaling:
        scaling = dict(zip(ROPE_SCALING[c.rope_scaling_type], c.rope_scaling))
        length = "original_max_position_embeddings"
        if length in scaling:
            scaling[length] = int(scaling[length])
        settings["rope_scaling"] = {"rope_type": c.rope_scaling_type} | scaling
    return settings


# ---------------------------------------------------------------------------------------- tensors


@dataclass
class HFTensors:
    """The tensors of a Hugging Face checkpoint that make up one of our parameters."""

    shapes: dict[str, tuple]  # {name: shape in the file}, top to bottom in our parameter
    transposed: bool = False  # GPT-2 stores the matrices of its blocks as (in, out)
    heads: int = 0  # GPT-NeoX stores queries, keys and values of each of so many heads together
    offset: float = 0.0  # Gemma multiplies by 1 + the weight of a norm

    def join(self, tensors):
        """The tensors in the order of `shapes` -> our parameter, without padding."""
        joined = torch.cat(tensors)
        if self.heads:
            joined = joined.unflatten(0, (self.heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        if self.offset:
            joined = joined + self.offset
        return joined.T if self.transposed else joined

    def split(self, parameter):
        """Our parameter without padding -> {name: tensor}. The inverse of `join`, but for the
        rounding of `offset`: at most 2**-24 for a weight from -1 to 0.5."""
        if self.transposed:
            parameter = parameter.T
        if self.offset:
            parameter = parameter - self.offset
        if self.heads:
            parameter = parameter.unflatten(0, (3, self.heads, -1)).transpose(0, 1).flatten(0, 2)
        rows = [shape[0] for shape in self.shapes.values()]
        return dict(zip(self.shapes, parameter.split(rows)))


def tensor_map(
    model: GPT, model_type: str, vocab_rows: int, positions: int
) -> dict[str, HFTensors]:
    """For each parameter of a model the Hugging Face tensors that it is made of.

    vocab_rows: rows of their embedding and head. positions: rows of their position table.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        if name.startswith("scalar_head."):
            continue
        if model_type == "gpt2":
            tensors[name] = gpt2_tensor(name, parameter, vocab_rows, positions)
        else:
            tensors[name] = family_tensors(name, parameter, vocab_rows, model.config, model_type)
    return tensors


def gpt2_tensor(name, parameter, vocab_rows, positions):
    hf_name = name if name == "lm_head.weight" else f"transformer.{name}"
    shape = list(parameter.shape)
    if name in VOCAB_TABLES:
        shape[0] = vocab_rows
    if name == "wpe.weight":
        shape[0] = positions
    transposed = name.startswith("h.") and parameter.dim() == 2
    if transposed:
        shape.reverse()
    return HFTensors({hf_name: tuple(shape)}, transposed)


def family_tensors(name, parameter, vocab_rows, c, model_type):
    family = FAMILIES[model_type]
    prefix = "" if name.startswith("lm_head.") else family.prefix
    in_block = name
    if name.startswith("h."):
        _, layer, in_block = name.split(".", 2)
        prefix += f"layers.{layer}."
    module, kind = in_block.rsplit(".", 1)  # kind: weight | bias
    hf_modules = family.modules[module]

    rows = [parameter.shape[0]]
    if name in VOCAB_TABLES:
        rows = [vocab_rows]
    elif module == "attn.c_attn" and len(hf_modules) == 3:
        kv_width = c.n_kv_head * c.head_dim
        rows = [c.n_head * c.head_dim, kv_width, kv_width]
    elif module == "mlp.c_fc" and len(hf_modules) == 2:
        rows = [c.n_inner, c.n_inner]

    shapes = {}
    for hf_module, n in zip(hf_modules, rows, strict=True):
        shapes[f"{prefix}{hf_module}.{kind}"] = (n, *parameter.shape[1:])
    is_norm = module.startswith("ln_") or module.endswith("_norm")
    return HFTensors(
        shapes,
        heads=c.n_head if model_type == "gpt_neox" and module == "attn.c_attn" else 0,
        offset=family.norm_offset if is_norm else 0.0,
    )


def full_name(name: str, model_type: str) -> str:
    """The name of a tensor in a file as `tensor_map` has it. A model that was saved without its
    head, like the hub's gpt2, lacks the prefix; torch.compile adds one of its own."""
    name = name.replace("_orig_mod.", "")
    family = FAMILIES[model_type]
    if model_type == "gpt2" and not name.startswith(("transformer.", "lm_head.")):
        return f"transformer.{name}"
    if model_type == "gpt_neox" and name.startswith("lm_head."):
        return name.replace("lm_head.", "embed_out.")  # transformers 5 has both
    if name.startswith(("embed_tokens.", "layers.", "norm.", "embed_in.", "final_layer_norm.")):
        return f"{family.prefix}{name}"
    return name


def head_name(model_type: str) -> str:
    """The name of the LM head's weight."""
    return "embed_out.weight" if model_type == "gpt_neox" else "lm_head.weight"
