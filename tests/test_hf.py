"""tools/hf.py without transformers: import undoes export; what is not supported is refused."""

import json
import os
import random
import re
import shutil
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as evaluation
import sample
import train
from data import tokenizer
from data.files import read_json, write_json
from data.rows import sampled_row
from data.template import TEMPLATE
from model import GPT, GPTConfig
from nanospin import checkpoint, config
from tests.conftest import SHARED
from tests.tokenizers_like import sentencepiece
from tools import hf, hf_families

CLASSIC = {"vocab_size": 257, "block_size": 48, "n_layer": 2, "n_head": 4, "n_embd": 32}
MODERN = CLASSIC | {
    "n_kv_head": 2,
    "position": "rotary",
    "norm": "rmsnorm",
    "mlp": "swiglu",
    "bias": False,
    "tie_embeddings": False,
}
QWEN3 = MODERN | {"qk_norm": True, "head_dim": 16}
OLMO2 = MODERN | {"norm_position": "after", "qk_norm": True, "qk_norm_over": "projection"}
NEOX = CLASSIC | {
    "position": "rotary",
    "rotary_dim": 4,
    "mlp": "gelu_erf",
    "parallel_residual": True,
    "tie_embeddings": False,
}
GEMMA2 = MODERN | {
    "n_layer": 4,
    "head_dim": 16,
    "mlp": "geglu",
    "norm_position": "both",
    "scale_embeddings": True,
    "tie_embeddings": True,
    "sliding_window": 9,
    "full_attention_interval": 2,
    "query_pre_attn_scalar": 12.0,
    "attention_softcap": 5.0,
    "logit_softcap": 3.0,
}
GEMMA3 = GEMMA2 | {
    "full_attention_interval": 3,
    "attention_softcap": 0.0,
    "logit_softcap": 0.0,
    "query_pre_attn_scalar": 0.0,
    "qk_norm": True,
    "rope_theta": 1e6,
    "rope_local_theta": 500.0,
}
LINEAR = {"rope_scaling": [4.0], "rope_scaling_type": "linear"}
YARN = {"rope_scaling": [4.0, 1.0, 32.0, 12.0, 1.125], "rope_scaling_type": "yarn"}
MODELS = {
    "classic": CLASSIC,
    "untied": CLASSIC | {"tie_embeddings": False, "mlp": "relu", "n_inner": 40},
    "exact GELU": CLASSIC | {"mlp": "gelu_erf"},
    "modern": MODERN,
    "tied": MODERN | {"tie_embeddings": True, "norm_eps": 1e-6},
    "qkv_bias": MODERN | {"qkv_bias": True},
    "bias": MODERN | {"bias": True},
    "scaled": MODERN | {"rope_scaling": [8.0, 1.0, 4.0, 32.0], "rope_theta": 5e5},
    "qk_norm and wide heads": QWEN3,
    "windowed": MODERN | {"sliding_window": 9},
    "windowed, qkv_bias": MODERN | {"sliding_window": 9, "qkv_bias": True},
    "windowed, qk_norm": QWEN3 | {"sliding_window": 9},
    "linear": MODERN | LINEAR,
    "yarn": MODERN | YARN,
    "phi3": MODERN | {"rotary_dim": 6, "sliding_window": 9},
    "olmo2": OLMO2,
    "olmo2, yarn": OLMO2 | YARN,
    "gpt_neox": NEOX,
    "gpt_neox, serial, scaled": NEOX
    | LINEAR
    | {"parallel_residual": False, "mlp": "gelu", "rotary_dim": 0},
    "smollm3": MODERN | {"n_layer": 4, "no_rope_layer_interval": 4, "bias": True},
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "gemma3_text, scaled, no window": GEMMA3
    | LINEAR
    | {"sliding_window": 0, "full_attention_interval": 0, "rope_local_theta": 0.0},
}
MODEL_TYPES = {"phi3", "olmo2", "gpt_neox", "smollm3", "gemma2", "gemma3_text"}
VOCAB_TABLES = ("wte.weight", "lm_head.weight")
SENTENCE = "the loss of a model falls when it reads what people write"


def make_run(run, fields, enc=None, name="bytes", **settings):
    """Write a run with one checkpoint whose parameters are all random. Returns the model."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**fields)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    cfg = config.Config(out_dir=run, **{"template": TEMPLATE} | settings)
    saving = checkpoint.save(
        run,
        0,
        7,
        model,
        [torch.optim.SGD(model.parameters())],
        cfg=cfg,
        enc=enc or tokenizer.load("bytes"),
        tokenizer_name=name,
        metrics={"val_loss": 4.25},
        history={},
    )
    assert checkpoint.wait_for_save(saving) == ""
    return model


def load(run):
    model, _, _ = GPT.from_checkpoint(str(run))
    return model


def read_meta(run):
    return checkpoint.read_meta(checkpoint.resolve(str(run)))


def write_tokenizer(folder, enc=None):
    tokenizer.to_json(enc or tokenizer.load("bytes"), os.path.join(folder, "tokenizer.json"))


def import_model(source, out, *options):
    hf.main(["import", str(source), f"--out={out}", *options])


def export_model(run, out, *options):
    hf.main(["export", str(run), f"--out={out}", *options])


def refused(*argv):
    """The error message of a command line: one line."""
    with pytest.raises(SystemExit) as e:
        hf.main([str(arg) for arg in argv])
    message = e.value.code
    assert isinstance(message, str) and "\n" not in message
    return message


def read_folder(folder):
    """{name: bytes} of a folder's files."""
    contents = {}
    for name in os.listdir(folder):
        with open(os.path.join(folder, name), "rb") as f:
            contents[name] = f.read()
    return contents


def edit_json(path, change):
    """Rewrite a JSON file after change(its value)."""
    with open(path, encoding="utf-8") as f:
        value = json.load(f)
    change(value)
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f)


def update_json(path, **settings):
    edit_json(path, lambda value: value.update(settings))


# -------------------------------------------------------------------------------- export and import


@pytest.mark.parametrize("name", MODELS)
def test_export_then_import_is_the_identity(name, tmp_path):
    """Config, parameters and logits are the same; a second export has the same bytes.

    Gemma's files have the weight of a norm minus 1, which rounds weights below 0.5.
    """
    run, exported, imported, again = (tmp_path / x for x in ("run", "export", "import", "again"))
    model = make_run(str(run), MODELS[name])
    export_model(run, exported)
    import_model(exported, imported)
    back, _, meta = GPT.from_checkpoint(str(imported))
    assert back.config == model.config
    model_type = name.split(",")[0]
    if model_type in MODEL_TYPES:
        assert read_json(str(exported / "config.json"))["model_type"] == model_type
    assert meta["tokenizer"] == "bytes"
    assert checkpoint.find_corruption(checkpoint.latest(str(imported))) == ""

    for (parameter, before), after in zip(model.named_parameters(), back.parameters()):
        if parameter in VOCAB_TABLES:  # the padding becomes 0
            assert len(after) == 320 and not after[257:].any()
            before, after = before[:257], after[:257]
        if name.startswith("gemma") and after.dim() == 1:
            assert torch.equal(before[before >= 0.5], after[before >= 0.5]), parameter
            assert (before - after).abs().max() <= 2**-24, parameter
        else:
            assert torch.equal(before, after), parameter
    idx = torch.randint(0, 257, (2, 40))
    if name.startswith("gemma"):
        torch.testing.assert_close(model(idx), back(idx), rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(model(idx), back(idx))

    export_model(imported, again)
    first, second = read_folder(exported), read_folder(again)
    card = first.pop("README.md").decode()
    assert card != second.pop("README.md").decode()
    assert first == second
    assert "| val_loss | 4.25 |" in card
    assert "### Instruction: {prompt}" in card


def test_norm_weights_of_gemma_in_and_out():
    """1 + w and back: exact for a bfloat16 w of at least 2^-16, and for a 1 + w of at least 0.5."""

    def read(w):
        return hf_families.HFTensors({"w": (len(w),)}, offset=1.0).join([w])

    def write(weight):
        return hf_families.HFTensors({"w": (len(weight),)}, offset=1.0).split(weight)["w"]

    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).float()
    w = every[(every.abs() >= 2**-16) & (every.abs() < 2**15) | (every == 0)]
    assert len(w) > 7900
    assert torch.equal(read(w), 1.0 + w)
    assert torch.equal(write(read(w)), w)
    weight = torch.cat([torch.linspace(0.5, 1, 10_001), torch.rand(9999) * 50 + 0.5])
    assert torch.equal(read(write(weight)), weight)
    small = torch.linspace(-0.5, 0.5, 10_001)
    assert (read(write(small)) - small).abs().max() <= 2**-24


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_and_bfloat16(dtype, tmp_path):
    """Files respect the limit, the index is right, and weights are rounded once."""
    run, exported = tmp_path / "run", tmp_path / "export"
    model = make_run(str(run), MODERN)
    export_model(run, exported, f"--dtype={dtype}", "--shard_gb=2.5e-5")
    names = sorted(name for name in os.listdir(exported) if name.endswith(".safetensors"))
    shards = {name: load_file(exported / name) for name in names}
    n = len(shards)
    assert n > 2
    assert names == [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]

    total_size, weight_map = 0, {}
    for name, tensors in shards.items():
        size = sum(t.nbytes for t in tensors.values())
        assert size <= 25000 or len(tensors) == 1
        total_size += size
        weight_map |= dict.fromkeys(tensors, name)
    assert max(len(tensors) for tensors in shards.values()) > 1
    with open(exported / "model.safetensors.index.json") as f:
        index = json.load(f)
    assert index == {"metadata": {"total_size": total_size}, "weight_map": weight_map}

    import_model(exported, tmp_path / "import")
    back = load(tmp_path / "import")
    for (name, before), after in zip(model.named_parameters(), back.parameters()):
        if name in VOCAB_TABLES:
            before, after = before[:257], after[:257]
        assert torch.equal(before.to(getattr(torch, dtype)).float(), after), name

    export_model(tmp_path / "import", tmp_path / "single", f"--dtype={dtype}")
    single = load_file(tmp_path / "single" / "model.safetensors")
    assert single.keys() == weight_map.keys()
    for name, file in weight_map.items():
        assert torch.equal(single[name], shards[file][name])

    out = f"--out={tmp_path / 'no'}"
    assert "--shard_gb must be above 0, got 0.0" in refused("export", run, out, "--shard_gb=0")
    assert "invalid choice: 'float16'" in refused("export", run, out, "--dtype=float16")
    assert not os.path.exists(tmp_path / "no")


@pytest.mark.parametrize(
    "field, value", [("norm", "layernorm"), ("logit_softcap", 5.0), ("mlp", "relu2")]
)
def test_fields_that_llama_lacks_are_refused(field, value, tmp_path):
    make_run(str(tmp_path / "run"), MODERN | {field: value})
    message = refused("export", tmp_path / "run", f"--out={tmp_path / 'out'}")
    assert f"cannot be exported: {field} is {value!r}, llama has" in message
    assert not os.path.exists(tmp_path / "out")


@pytest.mark.parametrize(
    "fields, message",
    [
        (GEMMA3 | {"attention_softcap": 5.0}, "attention_softcap is 5.0, gemma3_text has 0.0"),
        (GEMMA2 | {"norm": "layernorm"}, "norm is 'layernorm', gemma2 has 'rmsnorm'"),
        (GEMMA2 | {"rope_local_theta": 9.0}, "rope_local_theta is 9.0, gemma2 has 0.0"),
        (OLMO2 | {"qk_norm_over": "head"}, "qk_norm_over is 'head', olmo2 has 'projection'"),
        (OLMO2 | {"sliding_window": 9}, "sliding_window is 9, olmo2 has 0"),
        (NEOX | {"n_kv_head": 2}, "n_kv_head is 2, gpt_neox has 4"),
        (NEOX | {"bias": False}, "bias is False, gpt_neox has True"),
        (MODERN | {"rotary_dim": 4, "bias": True}, "bias is True, phi3 has False"),
        (MODERN | {"no_rope_layer_interval": 2, "rotary_dim": 4}, "rotary_dim is 4, smollm3 has 0"),
        (MODERN | {"parallel_residual": True}, "parallel_residual is True, llama has False"),
    ],
)
def test_fields_that_other_families_lack_are_refused(fields, message):
    with pytest.raises(SystemExit, match=message):
        hf_families.to_hf_config(GPTConfig(**fields))


@pytest.mark.parametrize(
    "field, value",
    [
        ("bias", False),
        ("n_kv_head", 2),
        ("norm", "rmsnorm"),
        ("mlp", "swiglu"),
        ("sliding_window", 8),
    ],
)
def test_fields_that_gpt2_lacks_are_refused(field, value):
    with pytest.raises(SystemExit, match=f"{field} is {value!r}, gpt2 has"):
        hf_families.to_hf_config(GPTConfig(**CLASSIC | {field: value}))


@pytest.mark.parametrize("name", ["qkv_bias", "modern"])
def test_whose_tokenizer_autotokenizer_replaces(name, tmp_path, capsys):
    """Of a qwen2, by Qwen's. tests/peers compares with transformers."""
    make_run(str(tmp_path / "run"), MODELS[name])
    export_model(tmp_path / "run", tmp_path / "export")
    is_qwen = name == "qkv_bias"
    assert ("load its tokenizer by PreTrainedTokenizerFast" in capsys.readouterr().out) == is_qwen
    card = (tmp_path / "export/README.md").read_text()
    assert ("PreTrainedTokenizerFast.from_pretrained" in card) == is_qwen
    import_model(tmp_path / "export", tmp_path / "again")
    assert ("load its tokenizer by PreTrainedTokenizerFast" in capsys.readouterr().out) == is_qwen


def test_the_scalar_head_is_not_exported(tmp_path, capsys):
    model = make_run(str(tmp_path / "run"), MODERN | {"scalar_head": True}, stage="reward")
    export_model(tmp_path / "run", tmp_path / "export")
    assert "scalar head" in capsys.readouterr().out
    import_model(tmp_path / "export", tmp_path / "import")
    idx = torch.randint(0, 257, (2, 40))
    assert torch.equal(load(tmp_path / "import")(idx), model(idx))


def test_an_export_says_which_answers_have_other_ids(tmp_path, capsys):
    """The default template ends in a space, with which this tokenizer joins the first word of an
    earlier answer. One whose first word has the space itself is not joined. Bytes never are. Where
    a template cannot be followed at all, that is said too."""
    bpe = tokenizer.train([SENTENCE] * 3, 300)
    llama = tokenizer.load(sentencepiece(tmp_path / "l", specials=["<|end|>"]) + "/tokenizer.json")
    tail = "<s>{turn}U: {prompt}\nA:{answer} {response}<|end|>{end}\n"
    cases = [
        (bpe, "t.tiktoken", TEMPLATE, r"\d+ of 24 test answers have other ids in transformers.*"),
        (bpe, "t.tiktoken", "Q: {prompt} A:{answer} {response}", ""),
        (None, "bytes", TEMPLATE, ""),
        (llama, "tokenizer.json", tail, "apply_chat_template gives other ids: for several turns.*"),
    ]
    for i, (enc, name, template, expected) in enumerate(cases):
        fields = CLASSIC | {"vocab_size": 600}
        make_run(str(tmp_path / f"run{i}"), fields, enc, name, template=template)
        capsys.readouterr()
        export_model(tmp_path / f"run{i}", tmp_path / f"out{i}")
        first, *others = capsys.readouterr().out.splitlines()
        assert re.fullmatch(expected, first if others else ""), first


# --------------------------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with exports, and the runs that they come from."""
    root = tmp_path_factory.mktemp("hf")
    names = ["classic", "modern", "tied", "phi3", "olmo2", "gpt_neox", "smollm3", "gemma2"]
    for name in [*names, "gemma3_text"]:
        make_run(str(root / f"{name}_run"), MODELS[name])
        export_model(root / f"{name}_run", root / name)
    return root


@dataclass
class BadSetting:
    export: str
    settings: dict[str, Any]  # changes of config.json
    message: str


BAD_SETTINGS = [
    BadSetting("modern", {"model_type": "bloom"}, "model_type 'bloom' is not supported"),
    BadSetting("modern", {"model_type": ["llama"]}, "model_type must be str"),
    BadSetting("modern", {"layer_types": ["chunked_attention"] * 2}, "layer_types"),
    BadSetting("modern", {"rms_norm_eps": None}, "rms_norm_eps is missing"),
    BadSetting("modern", {"hidden_size": "32"}, "hidden_size must be int"),
    BadSetting("modern", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    BadSetting("modern", {"attention_bias": True}, "attention_bias and mlp_bias"),
    BadSetting(
        "modern",
        {"attn_logit_softcapping": 50.0},
        "not supported: attn_logit_softcapping = 50.0",
    ),
    BadSetting("modern", {"quantization_config": {"bits": 4}}, "quantization_config"),
    BadSetting("modern", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rotary positions"),
    BadSetting("modern", {"rope_scaling": {"type": "linear"}}, "rope_scaling must be list[float]"),
    BadSetting(
        "modern",
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 5e5}},
        "rope_scaling and rope_parameters differ",
    ),
    BadSetting(
        "modern",
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}},
        "with truncate = false are not supported",
    ),
    BadSetting(
        "modern", {"rope_scaling": {"type": "yarn", "factor": "2"}}, "yarn must be list[float]"
    ),
    BadSetting("modern", {"rope_scaling": {"type": "linear", "factor": -2.0}}, "rope_scaling must"),
    BadSetting(
        "phi3",
        {"rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}},
        "longrope is not supported: its frequencies change with the length",
    ),
    BadSetting("phi3", {"partial_rotary_factor": 0.4}, "rotary_dim must be even"),
    BadSetting("phi3", {"partial_rotary_factor": 0.0}, "= 0.0 of 8 dimensions is out of range"),
    BadSetting("phi3", {"partial_rotary_factor": 0.1}, "rotates nothing"),
    BadSetting("modern", {"rope_scaling": {"rope_type": ["yarn"]}}, "rope_type must be str"),
    BadSetting("modern", {"rope_theta": 0.0}, "rope_theta must be above 1, got 0.0"),
    BadSetting("olmo2", {"attention_bias": True}, "attention_bias and mlp_bias must be equal"),
    BadSetting("olmo2", {"clip_qkv": 8.0}, "not supported: clip_qkv = 8.0"),
    BadSetting("olmo2", {"num_key_value_heads": 4}, "k_proj.weight has shape (16, 32)"),
    BadSetting("gpt_neox", {"attention_bias": False}, "attention_bias = false is not supported"),
    BadSetting("gpt_neox", {"hidden_act": "gelu_fast"}, "hidden_act 'gelu_fast' is not supported"),
    BadSetting("smollm3", {"no_rope_layers": [1, 0, 1, 1]}, "they are not periodic"),
    BadSetting("smollm3", {"no_rope_layers": [1, 0]}, "they are not periodic"),
    BadSetting(
        "smollm3",
        {"use_sliding_window": True, "sliding_window": 8},
        "use_sliding_window = true is not supported",
    ),
    BadSetting(
        "smollm3",
        {"layer_types": ["sliding_attention"] * 4, "sliding_window": 8},
        "are not supported for smollm3",
    ),
    BadSetting("modern", {"is_causal": False}, "not supported: is_causal = False"),
    BadSetting("gemma2", {"is_causal": False}, "not supported: is_causal = False"),
    BadSetting(
        "modern",
        {"model_type": "mistral", "sliding_window": 8, "use_sliding_window": False},
        "use_sliding_window = false is not supported: transformers' mistral does not read it",
    ),
    BadSetting("modern", {"layer_types": ["sliding_attention"] * 2}, "not supported for llama"),
    BadSetting("gemma2", {"layer_types": ["full_attention"] * 3}, "are not supported"),
    BadSetting(
        "gemma3_text",
        {"layer_types": ["full_attention"] + ["sliding_attention"] * 3},
        "they are not periodic",
    ),
    BadSetting("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    BadSetting("gemma3_text", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping = 5.0"),
    BadSetting(
        "gemma3_text",
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        "rotary positions {'factor': 2.0} of type 'linear' are not supported",
    ),
    BadSetting("gemma3_text", {"model_type": "gemma3"}, "a model of images and text"),
    BadSetting(
        "modern",
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor",
    ),
    BadSetting("modern", {"head_dim": 16}, "q_proj.weight has shape (32, 32)"),
    BadSetting("modern", {"num_attention_heads": 6}, "q_proj.weight has shape"),
    BadSetting("modern", {"num_key_value_heads": 3}, "n_head 4 must be a multiple of n_kv_head 3"),
    BadSetting("modern", {"num_key_value_heads": 1}, "k_proj.weight has shape (16, 32)"),
    BadSetting(
        "modern",
        {"num_hidden_layers": 3},
        "the tensor model.layers.2.input_layernorm.weight is missing",
    ),
    BadSetting("modern", {"num_hidden_layers": 1}, "9 tensors have no counterpart here"),
    BadSetting(
        "modern",
        {"vocab_size": 256},
        "vocab_size 256 is smaller than the tokenizer's vocabulary of 257",
    ),
    BadSetting("modern", {"tie_word_embeddings": True}, "lm_head.weight is not the embedding"),
    BadSetting("tied", {"tie_word_embeddings": False}, "lm_head.weight is missing"),
    BadSetting("classic", {"scale_attn_weights": False}, "scale_attn_weights"),
    BadSetting(
        "classic",
        {"scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx = True",
    ),
    BadSetting(
        "classic",
        {"activation_function": "gelu_fast"},
        "activation_function 'gelu_fast' is not supported; use one of gelu_new",
    ),
]


@pytest.mark.parametrize(
    "case", BAD_SETTINGS, ids=lambda case: f"{case.export}-{'-'.join(case.settings)}"
)
def test_unsupported_settings_are_refused(case, exported, tmp_path):
    shutil.copytree(exported / case.export, tmp_path / "in")
    update_json(tmp_path / "in" / "config.json", **case.settings)
    assert case.message in refused("import", tmp_path / "in", f"--out={tmp_path / 'out'}")
    assert not os.path.exists(tmp_path / "out")


def test_a_missing_setting_is_refused(exported, tmp_path):
    shutil.copytree(exported / "modern", tmp_path / "in")
    edit_json(tmp_path / "in" / "config.json", lambda settings: settings.pop("rms_norm_eps"))
    message = refused("import", tmp_path / "in", f"--out={tmp_path / 'out'}")
    assert "rms_norm_eps is missing" in message


KEY = "model.layers.0.self_attn.k_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"
BAD_TENSORS = {
    "missing": (
        "modern",
        lambda tensors: tensors.pop(KEY),
        f"the tensor {KEY} is missing",
    ),
    "twice": (
        "classic",
        lambda tensors: tensors.update({"wte.weight": tensors["transformer.wte.weight"].clone()}),
        "wte.weight appears twice",
    ),
    "unknown": (
        "modern",
        lambda tensors: tensors.update(extra=torch.zeros(2)),
        "1 tensors have no counterpart here: extra",
    ),
    "shape": (
        "modern",
        lambda tensors: tensors.update({KEY: tensors[KEY].T}),
        f"{KEY} has shape (32, 16)",
    ),
    "dtype": (
        "modern",
        lambda tensors: tensors.update({NORM: tensors[NORM].long()}),
        f"{NORM} has shape (32,) and dtype I64",
    ),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_unexpected_tensors_are_refused(name, exported, tmp_path):
    export, change, message = BAD_TENSORS[name]
    shutil.copytree(exported / export, tmp_path / "in")
    path = tmp_path / "in" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    assert message in refused("import", tmp_path / "in", f"--out={tmp_path / 'out'}")
    assert not os.path.exists(tmp_path / "out")


def test_damaged_tokenizers_are_refused(exported, tmp_path):
    shutil.copytree(exported / "modern", tmp_path / "in")
    path = tmp_path / "in" / "tokenizer.json"
    update_json(path, model=[])
    assert "cannot be read" in refused("import", tmp_path / "in", f"--out={tmp_path / 'out'}")
    edit_json(path, lambda parts: parts.pop("model"))
    assert "has no model" in refused("import", tmp_path / "in", f"--out={tmp_path / 'out'}")


def test_missing_files_and_pickles_are_refused(exported, tmp_path):
    folder, out = tmp_path / "in", f"--out={tmp_path / 'out'}"
    shutil.copytree(exported / "modern", folder)
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    assert "model.safetensors cannot be read" in refused("import", folder, out)
    os.rename(folder / "model.safetensors", folder / "pytorch_model.bin")
    assert "pytorch_model.bin is a pickle" in refused("import", folder, out)
    assert "is a pickle" in refused("import", folder / "pytorch_model.bin", out)
    os.remove(folder / "config.json")
    assert "config.json: No such file" in refused("import", folder, out)
    assert "the following arguments are required" in refused("import", folder)


def test_models_of_the_hub(exported, tmp_path, monkeypatch):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise ZeroDivisionError

    def download(name, revision, **kwargs):
        return str(exported / "modern")

    out = f"--out={tmp_path / 'out'}"
    model = "org/name@" + "0" * 40
    assert "expected a local folder, or org/name" in refused("import", "a/b/c", out)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert "could not be downloaded (ZeroDivisionError)" in refused("import", model, out)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    import_model(model, tmp_path / "out")
    assert read_meta(tmp_path / "out")["source"] == model

    class Api:
        def model_info(self, name, revision):
            if name != "org/name":
                raise ZeroDivisionError
            revisions.append(revision)
            return types.SimpleNamespace(sha="0" * 40)

    revisions = []
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    for source in ("org/name", "org/name@v1.0"):
        import_model(source, tmp_path / source)
        assert read_meta(tmp_path / source)["source"] == model
    assert revisions == ["main", "v1.0"]
    message = refused("import", "org/other", out + "2")
    assert "no such folder, and the hub does not answer (ZeroDivisionError)" in message


def test_existing_folders_are_kept(exported, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    out = f"--out={tmp_path / 'out'}"
    assert "already exists" in refused("import", exported / "modern", out)
    assert "already exists" in refused("export", exported / "modern_run", out)
    other = f"--out={tmp_path / 'other'}"
    assert "no checkpoint" in refused("export", tmp_path / "nothing", other)
    assert os.listdir(tmp_path) == ["out"]


def test_one_of_two_commands_makes_a_folder(tmp_path):
    """The second comes before the first has written anything, and removes nothing."""
    path = str(tmp_path / "new" / "out")
    with hf.new_folder(path):
        with pytest.raises(SystemExit, match="already exists"), hf.new_folder(path):
            raise KeyError
        with open(f"{path}/file", "w"):
            pass
    assert os.listdir(path) == ["file"]
    with pytest.raises(KeyError), hf.new_folder(f"{path}2"):
        raise KeyError
    assert os.listdir(tmp_path / "new") == ["out"]


# ----------------------------------------------------------------------------- variants of a folder


def test_block_size_and_sliding_window(exported, tmp_path, capsys):
    """A window of all layers is kept; one of some layers limits block_size."""
    folder, path = tmp_path / "in", tmp_path / "in" / "config.json"
    shutil.copytree(exported / "modern", folder)
    update_json(path, model_type="mistral", sliding_window=16)
    import_model(folder, tmp_path / "all", "--template=Q: {prompt}\nA: ", "--block_size=40")
    meta = read_meta(tmp_path / "all")
    assert meta["model"]["block_size"] == 40
    assert meta["model"]["sliding_window"] == 16
    assert meta["config"]["template"] == "Q: {prompt}\nA: "

    update_json(path, model_type="llama")  # as a Mistral renamed; transformers has no window there
    import_model(folder, tmp_path / "llama", "--template=Q: {prompt}\nA: ")
    assert read_meta(tmp_path / "llama")["model"]["sliding_window"] == 0

    update_json(path, model_type="qwen3", max_window_layers=1, head_dim=8)
    arguments = ["import", folder, f"--out={tmp_path / 'none'}", "--block_size=32"]
    assert "q_norm.weight is missing" in refused(*arguments)  # no window, which is Qwen's default
    update_json(path, max_window_layers=1, use_sliding_window=True)
    message = refused("import", folder, f"--out={tmp_path / 'some'}", "--block_size=32")
    assert "block_size must be from 1 to 16, the sliding window of some of its layers" in message
    layer_types = ["full_attention", "sliding_attention"]
    update_json(path, model_type="mistral", layer_types=layer_types)
    import_model(folder, tmp_path / "some")
    assert "block_size 16: the sliding window of some layers" in capsys.readouterr().out
    assert read_meta(tmp_path / "some")["model"]["sliding_window"] == 0


def test_a_smaller_block_size(exported, tmp_path):
    """The position table is cut."""
    import_model(exported / "classic", tmp_path / "short", "--block_size=20")
    short = load(tmp_path / "short")
    assert short.wpe.weight.shape == (20, 32)
    idx = torch.randint(0, 257, (2, 20))
    assert torch.equal(short(idx), load(exported / "classic_run")(idx))
    message = refused("import", exported / "classic", f"--out={tmp_path / 'l'}", "--block_size=49")
    assert "block_size must be from 1 to 48, got 49" in message


@pytest.fixture
def hub_gpt2(exported, tmp_path):
    """A folder like GPT-2's on the hub, and its index.

    Names without "transformer.", stored masks, the head stored twice, two bfloat16 files,
    vocab.json and merges.txt.
    """
    folder = tmp_path / "in"
    shutil.copytree(exported / "classic", folder)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors[name.removeprefix("transformer.")] = tensor.bfloat16()
    for i in range(2):
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 48, 48).tril()
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    os.remove(folder / "model.safetensors")
    index = save_shards(folder, tensors)

    with open(folder / "tokenizer.json", encoding="utf-8") as f:
        vocab = json.load(f)["model"]["vocab"]
    os.remove(folder / "tokenizer.json")
    vocab = {token: i for token, i in vocab.items() if i < 256} | {tokenizer.EOT: 256}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder, index


def save_shards(folder, tensors):
    """Save tensors in two files and their index. Returns {name: file}."""
    weight_map = {}
    for i, name in enumerate(tensors):
        weight_map[name] = f"model-0000{1 + i % 2}-of-00002.safetensors"
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(part, os.path.join(folder, file))
    with open(os.path.join(folder, "model.safetensors.index.json"), "w") as f:
        json.dump({"weight_map": weight_map}, f)
    return weight_map


def test_gpt2_as_on_the_hub(hub_gpt2, exported, tmp_path):
    import_model(hub_gpt2[0], tmp_path / "out")
    original, imported = load(exported / "classic_run"), load(tmp_path / "out")
    for (name, before), after in zip(original.named_parameters(), imported.parameters()):
        if name == "wte.weight":
            before, after = before[:257], after[:257]
        assert torch.equal(before.bfloat16().float(), after)


def test_a_tokenizer_larger_than_the_model_is_refused(exported, tmp_path):
    shutil.copytree(exported / "classic", tmp_path / "in")
    write_tokenizer(tmp_path / "in", tokenizer.train([SENTENCE] * 3, 300))
    message = refused("import", tmp_path / "in", f"--out={tmp_path / 'out'}")
    assert "vocab_size 257 is smaller than the tokenizer's" in message


def test_a_wrong_index_is_refused(hub_gpt2, tmp_path):
    folder, index = hub_gpt2
    first = "model-00001-of-00002.safetensors"
    cases = [
        (index | {"more": first}, "lists tensors that no file has"),
        (index | {"wpe.weight": "../x"}, "same folder"),
        (dict.fromkeys(index, "y.safetensors"), "y.safetensors"),
        (index | {"ln_f.weight": index["ln_f.bias"]}, "the index does not list it there"),
    ]
    for weight_map, message in cases:
        update_json(folder / "model.safetensors.index.json", weight_map=weight_map)
        assert message in refused("import", folder, f"--out={tmp_path / 'out'}")


def test_tokens_beside_vocab_json_are_refused(hub_gpt2, tmp_path):
    """Of a folder without tokenizer.json: they would be plain text."""
    folder, _ = hub_gpt2
    before = read_json(folder / "tokenizer_config.json")
    import_model(folder, tmp_path / "out")
    write_json(f"{folder}/added_tokens.json", {tokenizer.EOT: 256})
    import_model(folder, tmp_path / "with_eot")
    cases = [
        ("added_tokens.json", {tokenizer.EOT: 256, "<|im_start|>": 257}, "'<|im_start|>'"),
        ("tokenizer_config.json", before | {"eos_token": "<|im_end|>"}, "'<|im_end|>'"),
        (
            "tokenizer_config.json",
            before | {"added_tokens_decoder": {"257": {"content": "<x>"}}},
            "'<x>'",
        ),
        (
            "tokenizer_config.json",
            before | {"additional_special_tokens": [{"content": "<y>"}]},
            "'<y>'",
        ),
        (
            "tokenizer_config.json",
            before | {"add_bos_token": True, "bos_token": {"content": tokenizer.EOT}},
            f"'{tokenizer.EOT}'",
        ),
    ]
    for name, content, token in cases:
        write_json(f"{folder}/{name}", content)
        message = refused("import", folder, f"--out={tmp_path / 'other'}")
        assert f"do not say what becomes of the token {token}, and there is no tok" in message
        write_json(f"{folder}/{name}", before if name == "tokenizer_config.json" else {})
    import_model(folder, tmp_path / "again")


def test_a_space_before_a_text_that_one_file_asks_for_is_said(tmp_path, capsys):
    for scheme, asked, said in [("never", True, 1), ("never", False, 0), ("legacy", False, 1)]:
        folder = sentencepiece(tmp_path / f"{scheme}{asked}", scheme)
        update_json(folder + "/tokenizer_config.json", add_prefix_space=asked)
        hf.read_tokenizer(folder)
        out = capsys.readouterr().out
        assert out.count(f"add_prefix_space of tokenizer_config.json is {asked}") == said


def test_special_tokens_of_the_settings_only_are_said(exported, tmp_path, capsys):
    """They are text here. So is an eos_token of a tokenizer of GPT-2's kind, if it is another."""
    folder = sentencepiece(tmp_path / "t", specials=["<u>"])
    more = {"additional_special_tokens": ["<u>", "<a>", "<0x41>"]}
    more["extra_special_tokens"] = {"i": {"content": "<i>"}, "a": "<a>"}
    update_json(f"{folder}/tokenizer_config.json", **more)
    hf.read_tokenizer(folder)
    assert re.findall("'(.*)' is no token here", capsys.readouterr().out) == ["<a>", "<i>"]
    for wrong in (5, True, "<x>", [["<x>"]], [None], {"a": ["<x>"]}, [{"content": ["a"]}]):
        update_json(f"{folder}/tokenizer_config.json", additional_special_tokens=wrong)
        with pytest.raises(SystemExit, match="must hold tokens, texts or objects"):
            hf.read_tokenizer(folder)
    shutil.copytree(exported / "classic", tmp_path / "gpt2")
    hf.read_tokenizer(str(tmp_path / "gpt2"))
    assert not capsys.readouterr().out
    update_json(tmp_path / "gpt2" / "tokenizer_config.json", eos_token="<|e|>")
    hf.read_tokenizer(str(tmp_path / "gpt2"))
    said = "a response ends in <|endoftext|> here; eos_token is '<|e|>'\n"
    assert capsys.readouterr().out == said


def test_bpe_dropout_is_off(tmp_path, capsys):
    """A text has the same ids each time: those without dropout."""
    folder = sentencepiece(tmp_path / "t")
    enc, _ = hf.read_tokenizer(folder)
    assert not capsys.readouterr().out
    spec = read_json(f"{folder}/tokenizer.json")
    spec["model"]["dropout"] = 0.5
    write_json(f"{folder}/tokenizer.json", spec)
    with_dropout, _ = hf.read_tokenizer(folder)
    assert "dropout is off" in capsys.readouterr().out
    text = "the loss of a model " * 20
    ids = tokenizer.encode(enc, text)
    assert tokenizer.encode(with_dropout, text) == tokenizer.encode(with_dropout, text) == ids
    fields = CLASSIC | {"vocab_size": 600}
    make_run(str(tmp_path / "run"), fields, with_dropout, "tokenizer.json")
    _, again, _ = GPT.from_checkpoint(str(tmp_path / "run"))  # as it was saved
    assert again.text == with_dropout.text
    export_model(tmp_path / "run", tmp_path / "export")
    assert read_json(f"{tmp_path}/export/tokenizer.json")["model"]["dropout"] is None


# -------------------------------------------------------------------------------------- tokenizers


PIECES = [
    *("the", " loss", "It's", "we'LL", "'ve", "  ", "\n\n", "\t", " \n ", "\r\n"),
    *("naïve", "e\u0301", "日本語", "русский", "ß"),
    *("½", "٣", "१२", "123456", " 7"),
    *("🙂", "👩‍👩‍👧", "\u00a0", "\u2003", "\u3000"),
    *("\u200b", "\ufeff", "\u0085", "\u2028"),
    *("\x1c", "\x00", "\x7f", "<|endoftext|>", "<|", "!?...", "__init__", "ÄÖ", "ﬁ"),
    *("\U0001d54f", "\u0e33"),
]


def fuzzed(n):
    """n texts: half of PIECES, half of random characters, most of them rare."""
    rng = random.Random(0)
    texts = ["", " ", "\n"]
    for _ in range(n // 2):
        texts.append("".join(rng.choice(PIECES) for _ in range(rng.randint(1, 30))))
    while len(texts) < n:
        text = ""
        for _ in range(rng.randint(1, 40)):
            blocks = [rng.randrange(0x250), rng.randrange(0x3000), rng.randrange(0x11000)]
            code = rng.choice(blocks)
            if not 0xD800 <= code < 0xE000:  # half a surrogate pair
                text += chr(code)
        texts.append(text)
    return texts


def make_tokenizer(kind, monkeypatch):
    if kind == "trained":
        with open("README.md", encoding="utf-8") as f:
            return tokenizer.train([*fuzzed(200), f.read()], 700)
    if kind == "gpt2":
        cache = os.path.join(SHARED, "tiktoken_cache")
        if not os.path.isdir(cache):
            pytest.skip("GPT-2's vocabulary is not available")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", cache)
    return tokenizer.load(kind)


@pytest.mark.parametrize("kind", ["bytes", "trained", "gpt2"])
def test_tokenizers_round_trip(kind, tmp_path, monkeypatch):
    """tokenizer.json gives the same ids on 300 fuzzed texts, and the same tokenizer back."""
    from tokenizers import Tokenizer

    enc = make_tokenizer(kind, monkeypatch)
    write_tokenizer(tmp_path, enc)
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True  # like tiktoken's encode_ordinary
    for text in fuzzed(300):
        ids = enc.encode_ordinary(text)
        assert theirs.encode(text).ids == ids
        assert theirs.decode(ids) == text
    assert theirs.token_to_id(tokenizer.EOT) == enc.eot_token

    back, name = hf.read_tokenizer(tmp_path)
    assert tokenizer.fingerprint(back) == tokenizer.fingerprint(enc)
    assert back.eot_token == enc.eot_token
    assert name == ("tokenizer.tiktoken" if kind == "trained" else kind)

    def offline(name):
        raise SystemExit("no network")

    if kind == "gpt2":  # without a network the tokenizer is saved as a file
        monkeypatch.setattr(tokenizer, "load", offline)
        back, name = hf.read_tokenizer(tmp_path)
        assert name == "tokenizer.tiktoken"
        assert tokenizer.fingerprint(back) == tokenizer.fingerprint(enc)


def split_digits(parts):
    digits = {"type": "Digits", "individual_digits": True}
    parts["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [digits, parts["pre_tokenizer"]],
    }


def add_special_token(parts):
    last = parts["added_tokens"][0]
    parts["added_tokens"].append(last | {"id": last["id"] + 1, "content": "<|im_start|>"})


OTHER_TOKENIZERS = {  # changes after which tiktoken cannot represent a byte-level BPE
    "merges in another order": lambda parts: parts["model"]["merges"].reverse(),
    "digits one by one": split_digits,
    "a space before": lambda parts: parts["pre_tokenizer"].update(add_prefix_space=True),
    "normalised": lambda parts: parts.update(normalizer={"type": "NFC"}),
    "more special tokens": add_special_token,
}


@pytest.mark.parametrize("name", OTHER_TOKENIZERS)
def test_other_tokenizers_are_kept_as_they_are(name, tmp_path):
    from tokenizers import Tokenizer

    trained = tokenizer.train([SENTENCE] * 3, 300)
    write_tokenizer(tmp_path, trained)
    edit_json(tmp_path / "tokenizer.json", OTHER_TOKENIZERS[name])
    settings = tmp_path / "tokenizer_config.json"
    with pytest.raises(SystemExit, match="must give its eos_token, got None"):
        hf.read_tokenizer(tmp_path)
    settings.write_text(json.dumps({"eos_token": "</s>"}))
    with pytest.raises(SystemExit, match="eos_token '</s>'"):
        hf.read_tokenizer(tmp_path)

    settings.write_text(json.dumps({"eos_token": {"content": tokenizer.EOT}}))
    enc, file = hf.read_tokenizer(tmp_path)
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    assert file == "tokenizer.json"
    assert enc.eot_token == trained.eot_token
    assert enc.n_vocab == theirs.get_vocab_size()
    assert enc.n_vocab == trained.n_vocab + (1 if name == "more special tokens" else 0)
    for text in fuzzed(60):
        assert enc.encode_ordinary(text) == theirs.encode(text).ids
        if name != "normalised":
            assert enc.decode(tokenizer.encode(enc, text, "within")) == text


def test_gpt2_pre_tokenizer_in_two_parts(tmp_path):
    """Split by GPT-2's pattern, then ByteLevel without it: the same tokenizer."""
    enc = tokenizer.train([SENTENCE] * 3, 300)
    write_tokenizer(tmp_path, enc)
    split = {
        "type": "Split",
        "pattern": {"Regex": tokenizer.PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    update_json(tmp_path / "tokenizer.json", pre_tokenizer=pre_tokenizer)
    back, _ = hf.read_tokenizer(tmp_path)
    assert tokenizer.fingerprint(back) == tokenizer.fingerprint(enc)


def test_a_vocabulary_that_merges_cannot_make_is_refused(tmp_path):
    ranks = {bytes([i]): i for i in range(256)} | {b"abc": 256}
    enc = tokenizer.make_encoding("odd", ranks)
    with pytest.raises(SystemExit, match="merge of two"):
        tokenizer.to_json(enc, str(tmp_path / "odd.json"))


def test_a_trained_tokenizer_is_exported_and_imported(tmp_path):
    enc = tokenizer.train([SENTENCE] * 3, 300)
    fields = MODERN | {"vocab_size": enc.n_vocab}
    make_run(str(tmp_path / "run"), fields, enc, "some/tokenizer.tiktoken")
    export_model(tmp_path / "run", tmp_path / "export")
    import_model(tmp_path / "export", tmp_path / "import")
    _, back, meta = GPT.from_checkpoint(str(tmp_path / "import"))
    assert meta["tokenizer"] == "tokenizer.tiktoken"
    assert tokenizer.fingerprint(back) == tokenizer.fingerprint(enc)


# ------------------------------------------------------------------------------- use of an import


@pytest.mark.parametrize("name", ["modern", "gpt_neox", "smollm3", "gemma2"])
def test_an_import_is_a_run(name, exported, tiny_data, tmp_path, capsys):
    """It serves as init and teacher of self-play, and with sample.py and eval.py."""
    template = "--template=Q: {prompt}\nA: "
    imported = tmp_path / "import"
    import_model(exported / name, imported, template)
    train.main(
        [
            "--stage=spin",
            f"--out_dir={tmp_path / 'spin'}",
            f"--data={tiny_data}",
            f"--init={imported}",
            f"--teacher={imported}",
            "--players=data,teacher,self",
            "--max_rows=8",
            "--batch_size=4",
            "--max_steps=1",
            "--max_response=8",
            "--max_prompt=24",
            "--eval_rows=4",
            "--device=cpu",
            template,
        ]
    )
    capsys.readouterr()
    sample.main([str(imported), "--prompt=why?", "--max_new_tokens=4"])
    evaluation.main(
        [f"in={imported}", f"spin={tmp_path / 'spin'}", f"--data={tiny_data}", "--rows=4"]
    )
    assert "val_loss" in capsys.readouterr().out


# ------------------------------------------------------------------------- the end of a response

CHAT = (
    "{% for m in messages %}{% if loop.first %}<s>{% endif %}[{{ m['role'] }}]"
    "{{ m['content'] }}<|turn|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def turns(tmp_path):
    """A model whose eos_token is <|endoftext|> and whose turns end in <|turn|>, ids 256 and 257."""
    make_run(str(tmp_path / "run"), MODERN | {"vocab_size": 257})
    export_model(tmp_path / "run", tmp_path / "in")
    path = tmp_path / "in" / "tokenizer.json"
    edit_json(path, add_turn_tokens)
    weights = load_file(str(tmp_path / "in" / "model.safetensors"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], weights[name][:2]])
    save_file(weights, str(tmp_path / "in" / "model.safetensors"))
    update_json(tmp_path / "in" / "config.json", vocab_size=259)
    update_json(tmp_path / "in" / "tokenizer_config.json", chat_template=CHAT)
    update_json(tmp_path / "in" / "generation_config.json", eos_token_id=[256, 257])
    return tmp_path / "in"


def add_turn_tokens(parts):
    first = parts["added_tokens"][0]
    for i, content in ((257, "<|turn|>"), (258, "<s>")):
        parts["added_tokens"].append(first | {"id": i, "content": content})


def test_a_response_ends_in_the_token_of_the_template(turns, tmp_path, capsys):
    import_model(turns, tmp_path / "a")
    assert "a response ends in '<|turn|>', as in the template" in capsys.readouterr().out
    _, enc, meta = GPT.from_checkpoint(str(tmp_path / "a"))
    assert enc.eos == "<|turn|>" and enc.eot_token == 257
    assert list(tokenizer.stop_ids(enc)) == [tokenizer.EOT, "<|turn|>"]

    export_model(tmp_path / "a", tmp_path / "out")
    assert read_json(str(tmp_path / "out" / "generation_config.json"))["eos_token_id"] == [256, 257]
    assert read_json(str(tmp_path / "out" / "config.json"))["eos_token_id"] == [256, 257]
    assert read_json(str(tmp_path / "out" / "tokenizer_config.json"))["eos_token"] == tokenizer.EOT
    import_model(tmp_path / "out", tmp_path / "b")
    again = read_meta(tmp_path / "b")
    for name in ("tokenizer_sha256", "weights_sha256"):
        assert again[name] == meta[name], name
    assert again["config"]["template"] == meta["config"]["template"]


def test_sampling_settings_that_are_not_kept_are_named(turns, tmp_path, capsys):
    import_model(turns, tmp_path / "a")
    assert "not kept" not in capsys.readouterr().out  # an export's: temperature 1
    update_json(turns / "generation_config.json", temperature=0.6, top_k=20, top_p=1.0, min_p=None)
    import_model(turns, tmp_path / "b")
    said = (
        "not kept of generation_config.json: temperature 0.6, top_k 20; a run samples as it is set"
    )
    assert said in capsys.readouterr().out


def test_a_token_that_the_model_does_not_list_ends_a_response_too(turns, tmp_path, capsys):
    """The template says how a response ends; samples stop there, and the export lists it."""
    update_json(turns / "generation_config.json", eos_token_id=256)
    import_model(turns, tmp_path / "a")
    said = capsys.readouterr().out
    assert "generation_config.json does not list '<|turn|>'" in said
    assert "samples stop at '<|endoftext|>', '<|turn|>'" in said
    _, enc, _ = GPT.from_checkpoint(str(tmp_path / "a"))
    assert enc.eot_token == 257
    export_model(tmp_path / "a", tmp_path / "out")
    assert read_json(str(tmp_path / "out" / "generation_config.json"))["eos_token_id"] == [256, 257]
    update_json(turns / "generation_config.json", eos_token_id=["x"])
    assert "must be token ids" in refused("import", turns, f"--out={tmp_path / 'b'}")


def test_samples_stop_at_each_of_the_models_tokens(turns, tmp_path):
    """Whichever comes first is part of the sample, and the sample has ended."""
    import_model(turns, tmp_path / "a")
    model, enc, meta = GPT.from_checkpoint(str(tmp_path / "a"))
    rows = [{"prompt": "abc"[: 1 + i % 3]} for i in range(400)]
    texts, ids = sample.respond(model, enc, meta["config"]["template"], rows, 0, 10)
    last = {y[-1] for y in ids if len(y) < 10}
    assert last == {256, 257}
    for text, y in zip(texts, ids):
        assert not {256, 257} & set(y[:-1])
        has_ended = y[-1] in (256, 257)
        assert sampled_row({"prompt": "a"}, text, y, enc, "{prompt}")["ended"] == has_ended
        assert text == enc.decode(y[:-1] if has_ended else y)


def test_a_chat_template_that_is_not_followed_is_refused(turns, tmp_path):
    out = f"--out={tmp_path / 'a'}"
    update_json(turns / "tokenizer_config.json", chat_template="{{ messages[0]['content'] }}")
    message = refused("import", turns, out)
    assert "the chat template is not followed: it does not write each prompt and answer" in message
    assert not os.path.exists(tmp_path / "a")
    import_model(turns, tmp_path / "a", "--template=Q: {prompt}\nA: ")
    assert read_meta(tmp_path / "a")["config"]["template"] == "Q: {prompt}\nA: "

    flag = CHAT.replace("[assistant]", "[assistant]{{ mood if mood is defined else '' }}")
    flag = flag.replace("{{ m['content'] }}<|turn|>", "{{ m['content'] }}<|turn|>")
    update_json(turns / "tokenizer_config.json", chat_template=flag)
    kwargs = """--chat_template_kwargs={"mood": ""}"""
    import_model(turns, tmp_path / "b", kwargs)
    assert "must be a JSON object" in refused("import", turns, out, "--chat_template_kwargs=[1]")


@pytest.mark.parametrize("flag", ["single_word", "lstrip", "rstrip", "normalized", "special"])
def test_a_token_that_two_files_describe_differently(flag, turns, tmp_path):
    """transformers follows tokenizer_config.json, and here tokenizer.json is read. The last two do
    not change the ids of such tokens."""
    token = read_json(str(turns / "tokenizer.json"))["added_tokens"][1]
    assert token["content"] == "<|turn|>"
    change = {"257": token | {flag: not token[flag]}}
    update_json(turns / "tokenizer_config.json", added_tokens_decoder=change)
    if flag in ("normalized", "special"):
        import_model(turns, tmp_path / "a")
        return
    message = refused("import", turns, f"--out={tmp_path / 'a'}")
    assert "tokenizer_config.json: added_tokens_decoder: '<|turn|>' has" in message
    assert f"has {flag} = {not token[flag]}, and {token[flag]} in tokenizer.json" in message
    update_json(turns / "tokenizer_config.json", added_tokens_decoder={"257": token})
    import_model(turns, tmp_path / "a")


def test_a_token_that_one_file_lacks(turns, tmp_path, capsys):
    update_json(turns / "tokenizer_config.json", added_tokens_decoder="{")
    message = refused("import", turns, f"--out={tmp_path / 'a'}")
    assert "must have an object for each id" in message
    update_json(turns / "tokenizer_config.json", added_tokens_decoder={"300": {"content": "<x>"}})
    import_model(turns, tmp_path / "b")
    assert "'<x>' is no token here: only tokenizer_config.json has it" in capsys.readouterr().out


def test_a_chat_template_by_name(turns, tmp_path):
    """The one called default is followed, in whichever file it is; without it none is."""
    settings, folder = turns / "tokenizer_config.json", turns / "additional_chat_templates"
    out = f"--out={tmp_path / 'a'}"
    import_model(turns, tmp_path / "original")
    expected = read_meta(tmp_path / "original")["config"]["template"]

    named = [{"name": "tool_use", "template": CHAT}, {"name": "rag", "template": CHAT}]
    update_json(settings, chat_template=named)
    message = refused("import", turns, out)
    assert "none of its chat templates (rag, tool_use) is called default; give" in message
    import_model(turns, tmp_path / "by_hand", "--template=Q: {prompt}\nA: ")

    folder.mkdir()
    (folder / "other.jinja").write_text(CHAT)
    update_json(settings, chat_template=CHAT)  # which files of their own replace
    assert "its chat templates (other) is called default" in refused("import", turns, out)
    (folder / "default.jinja").write_text(CHAT)
    update_json(settings, chat_template="replaced")
    import_model(turns, tmp_path / "a")
    assert read_meta(tmp_path / "a")["config"]["template"] == expected


def test_special_tokens_of_an_old_folder(turns, tmp_path):
    """special_tokens_map.json is read, unless tokenizer_config.json describes the tokens."""
    settings, map_path = turns / "tokenizer_config.json", str(turns / "special_tokens_map.json")
    update_json(settings, chat_template=CHAT.replace("<s>", "{{ bos_token }}"))
    edit_json(settings, lambda value: [value.pop(name) for name in ("bos_token", "eos_token")])
    write_json(map_path, {"bos_token": "<s>", "eos_token": {"content": tokenizer.EOT}})
    import_model(turns, tmp_path / "a")
    assert read_meta(tmp_path / "a")["config"]["template"].startswith("<s>")

    update_json(settings, eos_token=tokenizer.EOT, added_tokens_decoder={})
    import_model(turns, tmp_path / "b")
    assert not read_meta(tmp_path / "b")["config"]["template"].startswith("<s>")


def test_a_system_message_in_and_out(turns, tmp_path):
    """Rows, sample.py and the exported chat template take a system message."""
    import_model(turns, tmp_path / "a")
    template = read_meta(tmp_path / "a")["config"]["template"]
    assert template.startswith("<s>[system]{system}<|turn|>{no_system}<s>{turn}[user]{prompt}")
    sample.main([str(tmp_path / "a"), "--prompt=a", "--system=b", "--max_new_tokens=2"])
    make_run(str(tmp_path / "plain"), MODERN)
    with pytest.raises(SystemExit, match="the template has no {system}"):
        sample.main([str(tmp_path / "plain"), "--prompt=a", "--system=b"])
    export_model(tmp_path / "a", tmp_path / "out")
    import_model(tmp_path / "out", tmp_path / "b")
    assert read_meta(tmp_path / "b")["config"]["template"] == template


def test_a_config_larger_than_its_files_is_refused(exported, tmp_path):
    shutil.copytree(exported / "modern", tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    for settings, message in [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000 is too large"),
        ({"num_hidden_layers": 9999}, "describes a model of more than"),
        ({"hidden_size": 2**20}, "describes a model of more than"),
        ({"hidden_size": 10**12}, "n_embd must be from 1 to"),
        ({"intermediate_size": 2**24}, "describes a model of more than"),
    ]:
        original = path.read_text()
        update_json(path, **settings)
        assert message in refused("import", tmp_path / "in", f"--out={tmp_path / 'out'}")
        path.write_text(original)


# -------------------------------------------------------------------------- what people bring


@dataclass
class HubModel:
    """A config.json like that of a model of the hub, and what is known of the model."""

    settings: dict[str, Any]
    num_params: int
    fields: dict[str, Any]  # some of GPTConfig's


def llama_shape(width, inner, layers, heads, kv_heads, vocab, length, eps=1e-6):
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": length,
        "rms_norm_eps": eps,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


GEMMA_SETTINGS = {
    "cache_implementation": "hybrid",
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "pad_token_id": 0,
}
HUB_MODELS = {
    "pythia-160m": HubModel(
        {
            "model_type": "gpt_neox",
            "hidden_act": "gelu",
            "hidden_size": 768,
            "intermediate_size": 3072,
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "rotary_emb_base": 10000,
            "rotary_pct": 0.25,
            "tie_word_embeddings": False,
            "use_parallel_residual": True,
            "vocab_size": 50304,
        },
        162_322_944,
        {"rotary_dim": 16, "parallel_residual": True, "rope_theta": 10000.0},
    ),
    "Phi-3-mini-4k": HubModel(
        llama_shape(3072, 8192, 32, 32, 32, 32064, 4096, 1e-5)
        | {
            "model_type": "phi3",
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "hidden_act": "silu",
            "original_max_position_embeddings": 4096,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "sliding_window": 2047,
            "tie_word_embeddings": False,
        },
        3_821_079_552,
        {"sliding_window": 2047, "rotary_dim": 0},
    ),
    "OLMo-2-0425-1B": HubModel(
        llama_shape(2048, 8192, 16, 16, 16, 100352, 4096)
        | {
            "model_type": "olmo2",
            "hidden_act": "silu",
            "rope_scaling": None,
            "rope_theta": 500000,
            "tie_word_embeddings": False,
        },
        1_484_916_736,
        {"norm_position": "after", "rope_theta": 5e5},
    ),
    "SmolLM3-3B": HubModel(
        llama_shape(2048, 11008, 36, 16, 4, 128256, 65536)
        | {
            "model_type": "smollm3",
            "hidden_act": "silu",
            "layer_types": ["full_attention"] * 36,
            "max_window_layers": 28,
            "mlp_bias": False,
            "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 1, 1, 0] * 9,
            "pretraining_tp": 2,
            "rope_scaling": None,
            "rope_theta": 5000000.0,
            "sliding_window": None,
            "use_sliding_window": False,
        },
        3_075_098_624,
        {"no_rope_layer_interval": 4, "rope_theta": 5e6, "tie_embeddings": True},
    ),
    "gemma-2-2b": HubModel(
        llama_shape(2304, 9216, 26, 8, 4, 256000, 8192)
        | GEMMA_SETTINGS
        | {
            "model_type": "gemma2",
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "hidden_act": "gelu_pytorch_tanh",
            "rope_theta": 10000.0,
            "sliding_window": 4096,
        },
        2_614_341_888,
        {"sliding_window": 4096, "full_attention_interval": 2, "attention_softcap": 50.0},
    ),
    "gemma-3-1b": HubModel(
        llama_shape(1152, 6912, 26, 4, 1, 262144, 32768)
        | GEMMA_SETTINGS
        | {
            "model_type": "gemma3_text",
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
        },
        999_885_952,
        {"sliding_window": 512, "full_attention_interval": 6, "rope_local_theta": 1e4},
    ),
    "gemma-3-270m": HubModel(
        llama_shape(640, 2048, 18, 4, 1, 262144, 32768)
        | GEMMA_SETTINGS
        | {
            "model_type": "gemma3_text",
            "_sliding_window_pattern": 6,
            "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
            "rope_local_base_freq": 10000.0,
            "rope_theta": 1000000.0,
            "sliding_window": 512,
            "use_bidirectional_attention": False,
        },
        268_098_176,
        {"full_attention_interval": 6, "query_pre_attn_scalar": 0.0, "rope_theta": 1e6},
    ),
    "Qwen2.5-0.5B, with yarn": HubModel(
        llama_shape(896, 4864, 24, 14, 2, 151936, 32768)
        | {
            "model_type": "qwen2",
            "hidden_act": "silu",
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
            },
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "max_window_layers": 24,
            "use_sliding_window": False,
            "tie_word_embeddings": True,
        },
        494_032_768,
        {"rope_scaling": [4.0, 1.0, 32.0, 32768.0, 1.1386294361119891]},
    ),
}


@pytest.mark.parametrize("name", HUB_MODELS)
def test_settings_of_models_of_the_hub(name):
    """Their config.json is read, and written and read again, and the number of parameters is the
    published one."""
    case = HUB_MODELS[name]
    hf_model = hf_families.parse_hf_config(case.settings, "config.json")
    for field, value in case.fields.items():
        assert hf_model.fields[field] == value, field
    model_config = GPTConfig(**hf_model.fields, vocab_size=hf_model.vocab_rows)
    with torch.device("meta"):
        model = GPT(model_config)
    assert model.num_params() == case.num_params
    _, again = hf_families.to_hf_config(model_config)
    fields = hf_families.parse_hf_config(again, "config.json").fields
    assert GPTConfig(**fields, vocab_size=hf_model.vocab_rows) == model_config


def test_the_pattern_that_transformers_does_not_read_is_refused():
    """Without layer_types transformers reads sliding_window_pattern only, and has 6 else."""
    settings = dict(HUB_MODELS["gemma-3-270m"].settings)
    settings["_sliding_window_pattern"] = 3
    fields = hf_families.parse_hf_config(settings, "config.json").fields
    assert fields["full_attention_interval"] == 6  # of layer_types
    del settings["layer_types"]
    with pytest.raises(SystemExit, match="_sliding_window_pattern 3 needs layer_types"):
        hf_families.parse_hf_config(settings, "config.json")
    settings["_sliding_window_pattern"] = 6
    fields = hf_families.parse_hf_config(settings, "config.json").fields
    assert fields["full_attention_interval"] == 6


def test_harmless_settings_are_ignored(exported, tmp_path):
    shutil.copytree(exported / "modern", tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    update_json(
        path,
        id2label={"0": "a"},
        label2id={"a": 0},
        unsloth_version="2025.1",
        unsloth_fixed=True,
        _attn_implementation_autoset=True,
        partial_rotary_factor=1.0,
        rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        temperature=1.0,
        num_beams=1,
        pruned_heads={},
    )
    import_model(tmp_path / "in", tmp_path / "a")
    assert read_meta(tmp_path / "a")["weights_sha256"]
    for name, value in (("partial_rotary_factor", 0.5), ("pruned_heads", {"0": [1]})):
        update_json(path, **{name: value})
        message = refused("import", tmp_path / "in", f"--out={tmp_path / 'b'}")
        assert f"not supported: {name} = {value!r}" in message
        update_json(path, **{name: None})


@pytest.mark.parametrize(
    "export, change",
    [
        ("modern", lambda name: name.removeprefix("model.")),
        ("modern", lambda name: f"_orig_mod.{name}"),
        ("modern", lambda name: name.replace("model.layers", "model._orig_mod.layers")),
        ("gemma2", lambda name: name.removeprefix("model.")),
        ("gpt_neox", lambda name: name.removeprefix("gpt_neox.")),
        ("gpt_neox", lambda name: name.replace("embed_out.", "lm_head.")),
        ("classic", lambda name: f"_orig_mod.{name.removeprefix('transformer.')}"),
    ],
)
def test_prefixes_of_tensors(export, change, exported, tmp_path):
    shutil.copytree(exported / export, tmp_path / "in")
    path = tmp_path / "in" / "model.safetensors"
    tensors = {change(name): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    import_model(tmp_path / "in", tmp_path / "a")
    import_model(exported / export, tmp_path / "b")
    first, second = read_meta(tmp_path / "a"), read_meta(tmp_path / "b")
    assert first["weights_sha256"] == second["weights_sha256"]


def test_what_is_no_model_says_what_to_do(exported, tmp_path):
    folder, out = tmp_path / "in", f"--out={tmp_path / 'out'}"
    folder.mkdir()
    (folder / "model.Q4.gguf").touch()
    assert "is GGUF; take the original, or convert it" in refused("import", folder, out)
    assert "gguf_file=FILE" in refused("import", "x/model.Q4.gguf", out)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    message = refused("import", folder, out)
    assert (
        "holds an adapter of org/base, not a model" in message
        and "python -m tools.adapter import" in message
    )
    shutil.copytree(exported / "modern", folder, dirs_exist_ok=True)
    update_json(folder / "config.json", quantization_config={"bits": 4})
    assert "quantised (quantization_config); take the original" in refused("import", folder, out)
    update_json(folder / "config.json", quantization_config=None, auto_map={"AutoModel": "a.B"})
    assert "code of its own (auto_map), which is not run" in refused("import", folder, out)


def test_a_tokenizer_with_more_tokens_than_the_model(turns, tmp_path, capsys):
    """A special token of no row, such as an added <pad>, is no reason to refuse."""
    first = read_json(str(turns / "tokenizer.json"))["added_tokens"][0]
    pad = first | {"id": 259, "content": "<pad>"}
    edit_json(turns / "tokenizer.json", lambda parts: parts["added_tokens"].append(pad))
    import_model(turns, tmp_path / "a")
    assert "has 260 ids, of which the model knows 259" in capsys.readouterr().out
    model, enc, _ = GPT.from_checkpoint(str(tmp_path / "a"))
    assert model.config.vocab_size == 259 and enc.n_vocab == 260
    assert max(enc.encode_ordinary("<pad>")) < 256
    export_model(tmp_path / "a", tmp_path / "out")
    assert read_json(str(tmp_path / "out" / "config.json"))["vocab_size"] == 259

    edit_json(
        turns / "tokenizer.json", lambda parts: parts["added_tokens"][-1].update(special=False)
    )
    message = refused("import", turns, f"--out={tmp_path / 'b'}")
    assert "vocabulary of 260, and prompts or responses can have ids from 259 on" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_imported(value, exported, tmp_path):
    """An overflow of a conversion to float16, say. The rows that no token has do not count."""
    shutil.copytree(exported / "modern", tmp_path / "in")
    path = tmp_path / "in" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name][0, 0] = value
    save_file({name: tensor.half() for name, tensor in tensors.items()}, path)
    message = refused("import", tmp_path / "in", f"--out={tmp_path / 'a'}")
    assert f"{name} or " in message or f" {name} has" in message
    assert "not finite" in message and not os.path.exists(tmp_path / "a")


def test_an_export_has_no_rows_without_a_token(turns, tmp_path):
    """The original's are dropped. Rows of 0 would be logits of 0, which may be the highest."""
    path = str(turns / "model.safetensors")
    weights = load_file(path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], torch.ones(61, 32)])
    save_file(weights, path)
    update_json(turns / "config.json", vocab_size=320)
    import_model(turns, tmp_path / "a")
    assert load(tmp_path / "a").config.vocab_size == 259
    export_model(tmp_path / "a", tmp_path / "out")
    assert read_json(str(tmp_path / "out" / "config.json"))["vocab_size"] == 259
    exported = load_file(str(tmp_path / "out" / "model.safetensors"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(exported[name], weights[name][:259])
    import_model(tmp_path / "out", tmp_path / "b")
    assert (
        read_meta(tmp_path / "a")["weights_sha256"] == read_meta(tmp_path / "b")["weights_sha256"]
    )
