"""Checkpoints from and to Hugging Face: GPT-2, Llama, Mistral, Qwen 2 and 3 come in; GPT-2, Llama, Qwen 2 and 3 go out.

    python hf.py import FOLDER --out=out/gpt2           # FOLDER: local, or org/name@COMMIT of the hub
    python hf.py export out/demo/sft --out=out/export   # for transformers.AutoModelForCausalLM
    python hf.py export out/spin_k3 --out=out/export --dtype=bfloat16 --shard_gb=2

What is imported is a run with one checkpoint: an `init`, a `teacher`, for sample.py and eval.py. `table` says of which tensors
of theirs a parameter of ours is made; both ways are read off it. Nothing is guessed: a setting or a tensor that has no
counterpart here ends the program with its name.
"""

import argparse
import contextlib
import math
import os
import re
import shutil
import sys
import typing
from dataclasses import asdict

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from nanospin import checkpoint
from nanospin import config
from data.files import printable, read_json, write_json
from data import tokenizer
from data.template import check_template, read_template, to_jinja
from model import GPT, GPTConfig

# our settings by the names in config.json; Mistral's and Qwen's are Llama's
SETTINGS = {
    "gpt2": {
        "block_size": "n_positions",
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_embd": "n_embd",
        "n_inner": "n_inner",
        "norm_eps": "layer_norm_epsilon",
        "mlp": "activation_function",
        "tie": "tie_word_embeddings",
    },
    "llama": {
        "block_size": "max_position_embeddings",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_kv_head": "num_key_value_heads",
        "head_dim": "head_dim",
        "n_embd": "hidden_size",
        "n_inner": "intermediate_size",
        "norm_eps": "rms_norm_eps",
        "mlp": "hidden_act",
        "tie": "tie_word_embeddings",
    },
}
DEFAULTS = {
    "gpt2": {"n_inner": 0, "tie": True},
    "llama": {"n_kv_head": 0, "head_dim": 0, "tie": False},
    "mistral": {"head_dim": 0, "tie": False},
    "qwen2": {"head_dim": 0, "tie": False},
    "qwen3": {"head_dim": 128, "tie": False},
}
ACTIVATIONS = {
    "gpt2": {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu": "relu", "relu2": "relu2"},
    "llama": {"silu": "swiglu"},
}
SHAPE = {
    "gpt2": {"position": "learned", "norm": "layernorm"},
    "llama": {"position": "rotary", "norm": "rmsnorm"},
}
ROPE = [
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
]  # of model.py's rope_scaling
# what does not change the function, nor does what is null or false; dropout is the training run's own
IGNORED = """_name_or_path architectures attention_dropout attn_pdrop bos_token_id dtype embd_pdrop eos_token_id gradient_checkpointing initializer_range
    is_llama_config n_ctx n_special output_past pad_token_id predict_special_tokens pretraining_tp reorder_and_upcast_attn resid_pdrop
    task_specific_params torch_dtype transformers.js_config transformers_version unk_token_id use_cache""".split()

# modules by their names in Llama; GPT-2's are ours
LLAMA = {
    "wte": ["model.embed_tokens"],
    "ln_f": ["model.norm"],
    "lm_head": ["lm_head"],
    "attn.q_norm": ["self_attn.q_norm"],
    "attn.k_norm": ["self_attn.k_norm"],
    "ln_1": ["input_layernorm"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.c_proj": ["self_attn.o_proj"],
    "ln_2": ["post_attention_layernorm"],
    "mlp.c_fc": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.c_proj": ["mlp.down_proj"],
}
TABLES = ("wte.weight", "lm_head.weight")  # a row a token
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
BUFFERS = r".*\.rotary_emb\.inv_freq|transformer\.h\.\d+\.attn\.(bias|masked_bias)"  # old files hold these constants too


def shape_of(theirs, where):
    """(family, GPTConfig's settings without the vocabulary, rows of the embedding, up to how many tokens it is that) by a config.json."""

    def refuse(what):
        raise SystemExit(printable(f"{where}: {what}"))

    left = dict(theirs)

    def take(name, kind, *default):
        value = left.pop(name, None)
        if value is None and not default:
            refuse(f"{name} is missing")
        return default[0] if value is None else config.convert(name, value, kind, where)

    model_type = take("model_type", str)
    if model_type not in DEFAULTS:
        refuse(f"model_type {model_type!r} is not supported; {', '.join(DEFAULTS)} are")
    family = "gpt2" if model_type == "gpt2" else "llama"
    hints, shape = typing.get_type_hints(GPTConfig), dict(SHAPE[family])
    for ours, name in SETTINGS[family].items():
        shape[ours] = take(
            name, hints[ours], *[DEFAULTS[model_type][ours]] if ours in DEFAULTS[model_type] else []
        )
    if shape["mlp"] not in ACTIVATIONS[family]:
        refuse(
            f"{SETTINGS[family]['mlp']} {shape['mlp']!r} is not supported; {', '.join(ACTIVATIONS[family])} are"
        )
    shape["mlp"] = ACTIVATIONS[family][shape["mlp"]]
    rows, limit = take("vocab_size", int), shape["block_size"]
    if family == "gpt2":
        if not take("scale_attn_weights", bool, True):
            refuse("scale_attn_weights = false is not supported")
    else:
        shape["bias"], shape["qkv_bias"], shape["qk_norm"] = (
            take("attention_bias", bool, False),
            model_type == "qwen2",
            model_type == "qwen3",
        )
        if take("mlp_bias", bool, False) != shape["bias"]:
            refuse("attention_bias and mlp_bias are supported only together")
        rope = (
            {"rope_type": "default"}
            | take("rope_scaling", dict, {})
            | take("rope_parameters", dict, {})
        )
        shape["rope_theta"] = config.convert(
            "rope_theta", rope.pop("rope_theta", take("rope_theta", float, 10000.0)), float, where
        )
        kind = rope.pop("type", rope["rope_type"])
        if kind == "llama3":
            shape["rope_scaling"] = config.convert(
                "rope_scaling", [rope.pop(name, None) for name in ROPE], list[float], where
            )
        if kind not in ("default", "llama3") or set(rope) != {"rope_type"}:
            refuse(f"rotary positions {rope} are not supported")
        window = take(
            "sliding_window",
            int,
            4096 if model_type == "mistral" and "sliding_window" not in theirs else 0,
        ) * take("use_sliding_window", bool, True)
        full = take("max_window_layers", int, 28) * model_type.startswith("qwen")
        kinds = take(
            "layer_types",
            list[str],
            [
                "full_attention" if i < full else "sliding_attention"
                for i in range(shape["n_layer"])
            ],
        )
        if not set(kinds) <= {"full_attention", "sliding_attention"}:
            refuse(f"layer_types {theirs['layer_types']} are not supported")
        if "sliding_attention" in kinds and window:
            shape["window"], limit = (
                (window, limit) if "full_attention" not in kinds else (0, min(limit, window))
            )  # of some layers alone
    odd = {
        name: value
        for name, value in left.items()
        if name not in IGNORED and not name.startswith("summary_") and value not in (None, False)
    }
    if odd:
        refuse(
            f"the setting {', '.join(f'{name} = {value!r}' for name, value in odd.items())} is not supported"
        )
    return family, shape, rows, limit


def table(model, family, rows, positions):
    """{parameter: ([(their tensor, its shape)], whether it is transposed)}. Theirs stand one below the other in ours; GPT-2 keeps the
    matrices of a block as (in, out). rows: of their embedding and head; positions: of their position table."""
    c, found = model.config, {}
    heights = {"wte": [rows], "lm_head": [rows], "wpe": [positions]}
    if family == "llama":
        heights |= {
            "attn.c_attn": [
                c.n_head * c.head_dim,
                c.n_kv_head * c.head_dim,
                c.n_kv_head * c.head_dim,
            ],
            "mlp.c_fc": [c.n_inner] * 2,
        }
    for name, p in model.named_parameters():
        module, kind = name.rsplit(".", 1)
        if module == "scalar":  # of a reward model
            continue
        _, layer, inner = module.split(".", 2) if module.startswith("h.") else ("", "", module)
        names = (
            ["transformer." * (module != "lm_head") + module]
            if family == "gpt2"
            else [f"model.layers.{layer}." * bool(layer) + theirs for theirs in LLAMA[inner]]
        )
        transposed = family == "gpt2" and p.dim() == 2 and bool(layer)
        shapes = [(height, *p.shape[1:]) for height in heights.get(inner, [p.shape[0]])]
        found[name] = (
            [
                (f"{theirs}.{kind}", shape[::-1] if transposed else shape)
                for theirs, shape in zip(names, shapes)
            ],
            transposed,
        )
    return found


# -------------------------------------------------------------------------------------------------------------------- in


def local(source):
    """The folder of a model: itself, or what is fetched from the hub by its commit."""
    if os.path.isdir(source):
        return source
    if source.endswith(PICKLES):
        raise SystemExit(
            f"{source} is a pickle, which can run code when it is read; safetensors alone are read"
        )
    name = re.fullmatch(r"([\w.-]+/[\w.-]+)@([0-9a-f]{40})", source)
    if not name:
        raise SystemExit(
            printable(
                f"{source}: neither a folder here nor org/name@COMMIT of the hub, 40 hexadecimal digits"
            )
        )
    from huggingface_hub import logging, snapshot_download

    logging.set_verbosity(logging.CRITICAL)  # it says each of its tries
    try:
        return snapshot_download(
            name[1],
            revision=name[2],
            allow_patterns=["*.json", "*.safetensors", "merges.txt", "chat_template.jinja"],
        )
    except Exception as e:  # the package raises whatever its HTTP client does
        raise SystemExit(
            f"{source} could not be fetched ({type(e).__name__}); fetch its folder where there is a network and give that"
        )


def open_tensors(folder, family, stack):
    """{name: open file that holds the tensor}, of model.safetensors or of all files that its index names."""
    path = os.path.join(folder, "model.safetensors")
    index = (
        read_json(path + ".index.json", ["weight_map"])["weight_map"]
        if not os.path.exists(path) and os.path.exists(path + ".index.json")
        else {}
    )
    if not isinstance(index, dict) or any(
        type(file) is not str or os.path.basename(file) != file for file in index.values()
    ):
        raise SystemExit(f"{path}.index.json: weight_map must name files of the same folder")
    if not index and not os.path.exists(path):
        pickles = [name for name in sorted(os.listdir(folder)) if name.endswith(PICKLES)]
        raise SystemExit(
            f"{folder}: no model.safetensors there"
            + (
                f"; {pickles[0]} is a pickle, which can run code when it is read, and is refused"
                if pickles
                else ""
            )
        )
    found = {}
    for file in sorted(set(index.values())) or ["model.safetensors"]:
        try:
            f = stack.enter_context(safe_open(os.path.join(folder, file), framework="pt"))
        except (SafetensorError, OSError) as e:
            raise SystemExit(
                printable(f"{folder}/{file} cannot be read ({' '.join(str(e).split())})")
            )
        for name in f.keys():
            if index and index.get(name) != file:
                raise SystemExit(printable(f"{folder}/{file}: {name} is not there by the index"))
            bare = family == "gpt2" and not name.startswith(
                ("transformer.", "lm_head.")
            )  # the hub's gpt2 is saved without its head
            if "transformer." * bare + name in found:
                raise SystemExit(printable(f"{folder}/{file}: {name} is there twice"))
            found["transformer." * bare + name] = f, name
    if index and len(index) != len(found):
        raise SystemExit(f"{path}.index.json names tensors that no file holds")
    return found


def check_tensors(found, wanted, tied, folder):
    """Every tensor is used once, none is missing, each has its shape and a floating dtype."""
    left = {name for name in found if not re.fullmatch(BUFFERS, name)}
    for name, shape in (pair for parts, _ in wanted.values() for pair in parts):
        if name not in left:
            raise SystemExit(f"{folder}: the tensor {name} is missing")
        left.remove(name)
        part = found[name][0].get_slice(found[name][1])
        if tuple(part.get_shape()) != tuple(shape) or part.get_dtype() not in (
            "F32",
            "BF16",
            "F16",
        ):
            raise SystemExit(
                f"{folder}: {name} has shape {tuple(part.get_shape())} and dtype {part.get_dtype()}; by config.json {tuple(shape)} of F32, BF16 or F16"
            )
    if tied and "lm_head.weight" in left:  # some write the shared table twice
        embedding, head = (
            found[name][0].get_tensor(found[name][1])
            for name in (wanted["wte.weight"][0][0][0], "lm_head.weight")
        )
        if not torch.equal(embedding, head):
            raise SystemExit(
                f"{folder}: lm_head.weight is not the embedding, but tie_word_embeddings is true"
            )
        left.remove("lm_head.weight")
    if left:
        raise SystemExit(
            printable(f"{folder}: no use for {len(left)} tensors: {', '.join(sorted(left)[:3])}")
        )


def import_(source, out, block_size=0, template=""):
    """A folder of Hugging Face's -> out/round_0/step_000000."""
    folder = local(source)
    where, path = os.path.join(folder, "config.json"), os.path.join(out, "round_0", "step_000000")
    family, shape, rows, limit = shape_of(read_json(where), where)
    enc, name = read_tokenizer(folder)
    template = template or read_template(folder, enc, config.TEMPLATE)
    config.check(config.Config(max_steps=1, template=template))
    check_template(enc, template, folder)
    positions = shape["block_size"]
    if not 0 <= block_size <= limit:
        raise SystemExit(
            f"block_size {block_size} is not within the model's {limit}"
            + ", the sliding window of some of its layers" * (limit < positions)
        )
    if limit < positions and not block_size:
        print(
            f"block_size {limit}: the sliding window of some layers, up to which every layer sees the whole text"
        )
    if rows < enc.n_vocab:
        raise SystemExit(f"{where}: vocab_size {rows} is below the tokenizer's {enc.n_vocab}")
    if rows > enc.n_vocab:
        print(
            f"{rows - enc.n_vocab} of {rows} rows of the embedding are left out: the tokenizer has {enc.n_vocab} ids"
        )
    with torch.device("meta"):
        model = GPT(
            GPTConfig(**shape | {"block_size": block_size or limit, "vocab_size": enc.n_vocab})
        )
    wanted, beside = table(model, family, rows, positions), checkpoint.sibling_path(path, "writing")
    with contextlib.ExitStack() as stack:
        found = open_tensors(folder, family, stack)
        check_tensors(found, wanted, model.config.tie, folder)

        def make(parameter, p):
            parts, transposed = wanted[parameter]
            tensor = torch.cat(
                [
                    file.get_tensor(theirs).float()
                    for file, theirs in (found[part] for part, _ in parts)
                ]
            )
            tensor = (tensor.T if transposed else tensor)[
                : enc.n_vocab if parameter in TABLES else p.shape[0]
            ]
            return (
                F.pad(tensor, (0, 0, 0, p.shape[0] - len(tensor)))
                if parameter in TABLES
                else tensor
            )

        os.makedirs(beside)
        checkpoint.write_safetensors(
            os.path.join(beside, "model.safetensors"),
            {n: (p.shape, lambda n=n, p=p: make(n, p)) for n, p in model.named_parameters()},
        )
    if name not in ("gpt2", "bytes"):
        tokenizer.save(enc, os.path.join(beside, name))
    checkpoint.publish(
        beside,
        path,
        {
            "round": 0,
            "step": 0,
            "model": asdict(model.config),
            "config": asdict(config.Config(out_dir=out, template=template)),
            "figures": {},
            "history": {"skipped": 0, "losses": []},
            "tokenizer": name,
            "tokenizer_sha256": tokenizer.fingerprint(enc),
            "source": source,
        },
    )
    print(
        f"{path}: {family} with {model.num_params() / 1e6:.2f}M parameters, tokenizer {name}, block_size {model.config.block_size}, template {template!r}"
    )


def read_tokenizer(folder):
    """(tokenizer, its name in a checkpoint) by tokenizer.json, or by vocab.json and merges.txt: tiktoken's where it has GPT-2's ways."""
    path = os.path.join(folder, "tokenizer.json")
    if os.path.exists(path) or not os.path.exists(os.path.join(folder, "merges.txt")):
        parts = read_json(path, ["model"])
    else:
        with open(os.path.join(folder, "merges.txt"), encoding="utf-8") as f:
            merges = [line.rstrip("\n") for line in f if not line.startswith("#version")]
        parts = {
            "model": {
                "type": "BPE",
                "vocab": read_json(os.path.join(folder, "vocab.json")),
                "merges": merges,
            },
            "pre_tokenizer": {"type": "ByteLevel"},
        }
    enc = tokenizer.from_json(parts)
    if enc is None and not os.path.exists(path):
        raise SystemExit(
            f"{folder}: vocab.json and merges.txt are not GPT-2's kind of tokenizer, and there is no tokenizer.json"
        )
    if enc is None:
        return tokenizer.load(path), "tokenizer.json"
    for name in ["bytes"] * (enc.n_vocab == 257) + ["gpt2"] * (enc.n_vocab == 50257):
        with contextlib.suppress(
            SystemExit
        ):  # tiktoken may have no vocabulary and no network: then it is a file
            if tokenizer.fingerprint(tokenizer.load(name)) == tokenizer.fingerprint(enc):
                return tokenizer.load(name), name
    return enc, "tokenizer.tiktoken"


def check(folder, run, most=1e-4):
    """End with a line if transformers' model in a folder and ours in a run do not give the same logits, relative to the largest."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise SystemExit(
            "--check compares with transformers, which is not installed: pip install transformers"
        )
    ours, theirs = (
        checkpoint.load_model(run)[0],
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
    )
    idx = torch.randint(
        ours.config.vocab_size,
        (2, min(ours.config.block_size, 512)),
        generator=torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        wanted = theirs(idx).logits[..., : ours.config.vocab_size]
        off = ((ours(idx) - wanted).abs().max() / wanted.abs().max()).item()
    if not off <= most:
        raise SystemExit(
            f"{folder}: transformers' logits are others than those of {run}, by {off:.1e} of the largest; the conversion is wrong"
        )
    print(f"logits are transformers' up to {off:.1e} of the largest")


# ------------------------------------------------------------------------------------------------------------------- out


def equivalent(c):
    """(family, config.json's settings) of a GPTConfig. Exits with the setting that has no equivalent."""
    family = "gpt2" if c.position == "learned" else "llama"
    usual = {
        "softcap": 0.0,
        "head_bias": False,
        "attn_proj": True,
        "attn_scale": "head",
        "mlp_alone": False,
    } | SHAPE[family]
    if family == "gpt2":
        usual |= {
            "bias": True,
            "n_kv_head": c.n_head,
            "head_dim": c.n_embd // c.n_head,
            "qk_norm": False,
            "window": 0,
        }
    elif c.qk_norm:  # Qwen 3
        usual |= {"bias": False, "qkv_bias": False}
    elif c.sliding_window:  # Mistral or Qwen 2
        usual |= {"bias": False}
    for name, value in usual.items():
        if getattr(c, name) != value:
            raise SystemExit(
                f"no Hugging Face equivalent: {name} is {getattr(c, name)!r}; {family} has {value!r}"
            )
    back = {ours: theirs for theirs, ours in reversed(ACTIVATIONS[family].items())}
    if c.mlp not in back:
        raise SystemExit(
            f"no Hugging Face equivalent: mlp is {c.mlp!r}; {family} has {' or '.join(back)}"
        )
    theirs = {name: getattr(c, ours) for ours, name in SETTINGS[family].items()} | {
        SETTINGS[family]["mlp"]: back[c.mlp],
        "vocab_size": c.vocab_size,
    }
    if family == "gpt2":
        return family, {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        } | theirs
    scaling = {"rope_type": "llama3"} | dict(
        zip(ROPE, [*c.rope_scaling[:-1], *map(int, c.rope_scaling[-1:])])
    )
    theirs |= {"rope_theta": c.rope_theta, "rope_scaling": scaling if c.rope_scaling else None}
    if c.qk_norm or c.qkv_bias and not c.bias:
        kind = ("qwen3", "Qwen3ForCausalLM") if c.qk_norm else ("qwen2", "Qwen2ForCausalLM")
        windows = {
            "use_sliding_window": bool(c.sliding_window),
            "sliding_window": c.sliding_window or None,
            "max_window_layers": 0 if c.sliding_window else c.n_layer,
        }
        return family, {
            "model_type": kind[0],
            "architectures": [kind[1]],
            "attention_bias": False,
        } | windows | theirs
    if c.sliding_window:
        return family, {
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "sliding_window": c.sliding_window,
        } | theirs
    return family, {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": c.bias,
        "mlp_bias": c.bias,
    } | theirs


def write_shards(folder, tensors, dtype, limit):
    """model.safetensors; or, where that has more than `limit` bytes, several files and the index that says which tensor is where."""
    sizes = {name: dtype.itemsize * math.prod(shape) for name, (shape, _) in tensors.items()}
    files, filled = [[]], 0
    for name, size in sizes.items():
        if files[-1] and filled + size > limit:
            files, filled = [*files, []], 0
        files[-1].append(name)
        filled += size
    index = {}
    for n, names in enumerate(files, 1):
        file = (
            "model.safetensors"
            if len(files) == 1
            else f"model-{n:05d}-of-{len(files):05d}.safetensors"
        )
        checkpoint.write_safetensors(
            os.path.join(folder, file), {name: tensors[name] for name in names}, dtype
        )
        index |= dict.fromkeys(names, file)
    if len(files) > 1:
        write_json(
            os.path.join(folder, "model.safetensors.index.json"),
            {"metadata": {"total_size": sum(sizes.values())}, "weight_map": index},
        )


def export(run, out, dtype="float32", shard_gb=math.inf):
    """A run's checkpoint -> a folder of Hugging Face's, its files of at most shard_gb 10^9 bytes unless one tensor has more.
    config.json comes last: without it a folder is no model."""
    if not shard_gb > 0:
        raise SystemExit(f"--shard_gb must be above 0, got {shard_gb}")
    path = checkpoint.resolve(run)
    family, theirs = equivalent(GPTConfig(**checkpoint.read_meta(path)["model"]))
    model, enc, meta = checkpoint.load_model(path)
    c, cfg, params, tensors = model.config, meta["config"], dict(model.named_parameters()), {}
    if meta["model"]["scalar"]:
        print("the scalar head (reward, value) is left out: the language model alone is exported")
    for name, (parts, transposed) in table(model, family, c.vocab_size, c.block_size).items():
        ours = params[name].detach()[: c.vocab_size if name in TABLES else None]
        for (their, shape), part in zip(
            parts, [ours.T] if transposed else ours.split([shape[0] for _, shape in parts])
        ):
            tensors[their] = shape, lambda part=part: part
    write_shards(out, tensors, getattr(torch, dtype), 1e9 * shard_gb)
    tokenizer.to_json(enc, os.path.join(out, "tokenizer.json"))
    eos, bos = tokenizer.eos(enc), tokenizer.begin(enc)
    bos = bos if bos in tokenizer.specials(enc) else eos
    ends = {
        "bos_token_id": tokenizer.specials(enc)[bos],
        "eos_token_id": enc.eot_token,
        "pad_token_id": enc.eot_token,
    }
    sampling = {
        "do_sample": cfg["temperature"] > 0,
        "temperature": cfg["temperature"] or 1.0,
        "top_k": cfg["top_k"],
        "top_p": cfg["top_p"],
    }
    write_json(os.path.join(out, "generation_config.json"), ends | sampling)
    write_json(
        os.path.join(out, "tokenizer_config.json"),
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": eos,
            "pad_token": eos,
            "clean_up_tokenization_spaces": False,
            "model_max_length": c.block_size,
            "chat_template": to_jinja(cfg["template"]),
        },
    )
    with open(os.path.join(out, "README.md"), "w", encoding="utf-8") as f:
        f.write(
            card(
                os.path.basename(os.path.normpath(run)),
                theirs["model_type"],
                model,
                meta,
                eos,
                dtype,
            )
        )
    write_json(os.path.join(out, "config.json"), theirs | ends | {"dtype": dtype})
    print(
        f"{out}: {theirs['model_type']} with {model.num_params() / 1e6:.2f}M parameters, of {path}"
    )


def card(name, model_type, model, meta, eos, dtype):
    """README.md of an export, by what its checkpoint says of itself."""
    c, cfg = model.config, meta["config"]
    figures = "".join(
        f"| {key} | {value:.4g} |\n"
        for key, value in meta["figures"].items()
        if isinstance(value, (int, float))
    )
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n# {name}\n\n"
        f"Trained with nanoSPIN (stage `{cfg['stage']}`, round {meta['round']}, step {meta['step']}) and exported as `{model_type}`:\n"
        f"{model.num_params() / 1e6:.2f}M {dtype} parameters, {c.n_layer} layers of width {c.n_embd},\n"
        f"{c.n_head} heads ({c.n_kv_head} of keys and values), {c.vocab_size} tokens, contexts of {c.block_size}.\n\n"
        + (f"| held out, at that step | |\n|---|---:|\n{figures}\n" if figures else "")
        + f"A prompt is put like this, the tokenizer's chat template; a response ends with `{eos}`.\n\n```\n{cfg['template']}\n```\n"
    )


@contextlib.contextmanager
def new_folder(path):
    """Make a folder, which is gone again if what fills it fails."""
    if os.path.exists(path) and (not os.path.isdir(path) or os.listdir(path)):
        raise SystemExit(f"{path} is there already; use another --out, or remove it")
    there = os.path.exists(path)
    os.makedirs(path, exist_ok=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        if there:
            os.makedirs(path)
        raise


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    into, outof = (
        commands.add_parser(name, help=what, description=what)
        for name, what in (
            ("import", "a folder of Hugging Face's, or of the hub, as a run"),
            ("export", "a run as a folder that transformers loads"),
        )
    )
    parser.error = into.error = outof.error = lambda message: sys.exit(
        printable(message)
    )  # one line, without the usage
    into.add_argument(
        "source",
        help="a folder with config.json, safetensors and tokenizer, or org/name@COMMIT of the hub",
    )
    into.add_argument(
        "--block_size",
        type=int,
        default=0,
        help="longest sequence; 0: the model's, or its sliding window",
    )
    into.add_argument(
        "--template",
        default="",
        help="how a prompt is put to the model, as data/template.py says; default: by its chat template, or else our own",
    )
    outof.add_argument("run", help="a run folder or a checkpoint in it")
    outof.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="bfloat16: half the bytes, rounded",
    )
    outof.add_argument(
        "--shard_gb",
        type=float,
        default=math.inf,
        help="several files of at most so many 10^9 bytes, and their index",
    )
    for each in (into, outof):
        each.add_argument(
            "--check",
            action="store_true",
            help="compare the logits with transformers', which must be installed",
        )
        each.add_argument(
            "--out", required=True, help="the folder to write, which is not there yet"
        )
    args = parser.parse_args(argv)
    try:
        with new_folder(args.out):
            if args.command == "export":
                export(args.run, args.out, args.dtype, args.shard_gb)
                args.check and check(args.out, args.run, 1e-4 if args.dtype == "float32" else 0.05)
            else:
                import_(args.source, args.out, args.block_size, args.template)
                args.check and check(local(args.source), args.out)
    except (OSError, SafetensorError, ValueError) as e:  # the last of GPTConfig
        raise SystemExit(printable(f"{args.out}: {type(e).__name__}: {e}"))


if __name__ == "__main__":
    main()
