"""tools/hf.py against transformers.

Imported models have the same logits and gradients; exported models load as they are. Skipped where
transformers is not installed; `make test-peers` installs it.
"""

import functools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from data import tokenizer
from data.template import prompt_ids
from model import GPT, GPTConfig
from sample import generate
from tests.chat_templates import CHATML
from tests.test_hf import (
    CLASSIC,
    GEMMA2,
    GEMMA3,
    LINEAR,
    MODERN,
    NEOX,
    OLMO2,
    VOCAB_TABLES,
    YARN,
    fuzzed,
    make_run,
    update_json,
    write_tokenizer,
)
from tests.tokenizers_like import chatml, sentencepiece
from tools import hf, hf_families

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed; make test-peers installs it"
)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TOLERANCE = 1e-5
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 257,
    "n_positions": 48,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
}
EXACT_GELU = GPT2 | {"activation_function": "gelu"}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 257,
    "max_position_embeddings": 48,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 40,
    "rms_norm_eps": 1e-5,
}
MISTRAL = LLAMA | {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None}
QWEN2 = LLAMA | {"model_type": "qwen2", "num_key_value_heads": 2, "rms_norm_eps": 1e-6}
QWEN3 = QWEN2 | {"model_type": "qwen3", "head_dim": 16}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
OTHER_THETA = {"rope_type": "default", "rope_theta": 500.0}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 12,
}
# with a pad_token_id transformers drops the gradient of its embedding
PHI3 = LLAMA | {"model_type": "phi3", "num_key_value_heads": 2, "pad_token_id": None}
OLMO2_HF = LLAMA | {"model_type": "olmo2", "num_key_value_heads": 2}
PYTHIA = {
    "model_type": "gpt_neox",
    "vocab_size": 257,
    "max_position_embeddings": 48,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
}
SMOLLM3 = LLAMA | {
    "model_type": "smollm3",
    "num_hidden_layers": 5,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}
GEMMA = LLAMA | {
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 12,
    "sliding_window": 9,
    "pad_token_id": None,
}
GEMMA2_HF = GEMMA | {"model_type": "gemma2"}
SMALL_CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
NO_CAPS = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
GEMMA3_HF = GEMMA | {"model_type": "gemma3_text", "num_hidden_layers": 7}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}
HF_CONFIGS = {
    "gpt2": GPT2,
    "gpt2, untied": GPT2 | {"tie_word_embeddings": False},
    "gpt2, relu, n_inner, eps": GPT2
    | {"activation_function": "relu", "n_inner": 56, "layer_norm_epsilon": 1e-3},
    "gpt2, exact GELU": EXACT_GELU,
    "gpt2, padded": GPT2 | {"vocab_size": 300},
    "llama, untied": LLAMA,
    "llama, tied": LLAMA | {"tie_word_embeddings": True},
    "llama, grouped": LLAMA | {"num_key_value_heads": 2},
    "llama, one key head, tied": LLAMA | {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "llama, biases": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "llama, theta and eps": LLAMA | {"rope_parameters": OTHER_THETA, "rms_norm_eps": 1e-3},
    "llama 3's rope": LLAMA | {"rope_parameters": LLAMA3_ROPE},
    "llama, padded": LLAMA | {"vocab_size": 320},
    "llama, wide heads": LLAMA | {"head_dim": 16, "num_key_value_heads": 2},
    "mistral": MISTRAL,
    "mistral, window": MISTRAL | {"sliding_window": 16},
    "mistral, window, grouped as one": MISTRAL | {"sliding_window": 9, "num_key_value_heads": 1},
    "mistral, wide heads": MISTRAL | {"head_dim": 12},
    "qwen2, untied": QWEN2,
    "qwen2, tied": QWEN2 | {"tie_word_embeddings": True},
    "qwen2, window of all layers": QWEN2 | QWEN_WINDOW,
    "qwen2, window of one layer, padded": QWEN2
    | QWEN_WINDOW
    | {"max_window_layers": 1, "vocab_size": 272},
    "qwen3": QWEN3,
    "qwen3, tied, padded": QWEN3 | {"head_dim": 8, "tie_word_embeddings": True, "vocab_size": 320},
    "qwen3, window of all layers": QWEN3 | QWEN_WINDOW | {"sliding_window": 5},
    "llama, linear": LLAMA | {"rope_parameters": LINEAR_ROPE},
    "llama, yarn": LLAMA | {"rope_parameters": YARN_ROPE},
    "qwen2, yarn with other turns": QWEN2
    | {"rope_parameters": YARN_ROPE | {"beta_fast": 4.0, "beta_slow": 0.5, "factor": 2.5}},
    "qwen3, yarn with a factor": QWEN3
    | {"rope_parameters": YARN_ROPE | {"attention_factor": 1.25}},
    "mistral, yarn with two scales": MISTRAL
    | {"rope_parameters": YARN_ROPE | {"mscale": 1.0, "mscale_all_dim": 0.5}},
    "phi3": PHI3,
    "phi3, window, padded": PHI3 | {"sliding_window": 9, "vocab_size": 320},
    "phi3, partial": PHI3
    | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.75}},
    "olmo2": OLMO2_HF,
    "olmo2, ungrouped, tied": OLMO2_HF | {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "gpt_neox": PYTHIA,
    "gpt_neox, serial, tied, padded": PYTHIA
    | {"use_parallel_residual": False, "tie_word_embeddings": True, "vocab_size": 304},
    "gpt_neox, all rotated": PYTHIA
    | {
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-3,
        "rope_parameters": LINEAR_ROPE | {"partial_rotary_factor": 1.0},
    },
    "smollm3": SMOLLM3,
    "smollm3, untied, biases": SMOLLM3
    | {
        "no_rope_layer_interval": 2,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "gemma2": GEMMA2_HF,
    "gemma2, small caps, padded": GEMMA2_HF | SMALL_CAPS | {"vocab_size": 320},
    "gemma2, no caps, untied": GEMMA2_HF | NO_CAPS | {"tie_word_embeddings": False},
    "gemma3_text": GEMMA3_HF,
    "gemma3_text, other thetas, scaled": GEMMA3_HF
    | {"rope_parameters": GEMMA3_ROPE, "query_pre_attn_scalar": 16},
    "gemma3_text, all windowed": GEMMA3_HF | {"num_hidden_layers": 3},
}
# what becomes of the sliding windows above
SLIDING_WINDOWS = {
    "mistral, window": 16,
    "mistral, window, grouped as one": 9,
    "qwen2, window of all layers": 16,
    "qwen3, window of all layers": 5,
    "phi3, window, padded": 9,
} | {name: 9 for name in HF_CONFIGS if name.startswith("gemma")}
BLOCK_SIZES = {"qwen2, window of one layer, padded": 16}


def make_hf_model(folder, hf_config, **saving):
    """Save a model of transformers with random parameters, and a tokenizer of bytes."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**hf_config), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    model.save_pretrained(folder, **saving)
    write_tokenizer(folder)
    return model


def relative_error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def make_batch(model, seed=0):
    """(idx, targets) of random bytes, (3, up to 40)."""
    length = min(model.config.block_size, 40) + 1
    tokens = torch.randint(0, 257, (3, length), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def gradients(loss, model):
    """{name: gradient} of a model's parameters."""
    params = dict(model.named_parameters())
    return dict(zip(params, torch.autograd.grad(loss, list(params.values()))))


@torch.no_grad()
def sgd_step(model, grads, lr=0.1):
    for name, p in model.named_parameters():
        p.sub_(lr * grads[name])


# ----------------------------------------------------------------------------------------- import


@pytest.mark.parametrize("name", [name for name in HF_CONFIGS if "padded" in name])
def test_an_import_that_is_exported_gives_its_log_probabilities(name, tmp_path):
    """The softmax of transformers is over all rows of the vocabulary, with or without a token."""
    make_hf_model(tmp_path / "theirs", HF_CONFIGS[name])
    run, exported = f"{tmp_path}/ours", f"{tmp_path}/export"
    hf.main(["import", str(tmp_path / "theirs"), f"--out={run}"])
    hf.main(["export", run, f"--out={exported}"])
    ours, _, _ = GPT.from_checkpoint(run)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported)
    idx, targets = make_batch(ours)
    with torch.no_grad():
        expected = F.cross_entropy(theirs(idx).logits.flatten(0, 1), targets.flatten())
        loss = -ours(idx, targets).mean()
    assert abs(loss - expected) < TOLERANCE * expected


@pytest.mark.parametrize("name", HF_CONFIGS)
def test_import_matches_transformers(name, tmp_path):
    """Logits, losses and gradients in three steps of SGD.

    A gradient's error is relative to the largest entry of its tensor.
    """
    shard_size = "20KB" if "grouped" in name else "1GB"
    theirs = make_hf_model(tmp_path / "theirs", HF_CONFIGS[name], max_shard_size=shard_size)
    hf.main(["import", str(tmp_path / "theirs"), f"--out={tmp_path / 'ours'}"])
    ours, enc, _ = GPT.from_checkpoint(str(tmp_path / "ours"))
    assert ours.config.vocab_size == enc.n_vocab == 257
    assert ours.config.block_size == BLOCK_SIZES.get(name, 48)
    assert ours.config.sliding_window == SLIDING_WINDOWS.get(name, 0)

    hf_config = HF_CONFIGS[name]
    tensors = hf.tensor_map(ours, hf_config["model_type"], hf_config["vocab_size"], 48)
    errors = {"logits": 0.0, "loss": 0.0, "gradients": 0.0}
    for step in range(3):
        idx, targets = make_batch(ours, step)
        logits = theirs(idx).logits[..., :257]
        errors["logits"] = max(errors["logits"], relative_error(ours(idx), logits))

        their_loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        our_loss = -ours(idx, targets).mean()
        errors["loss"] = max(errors["loss"], relative_error(our_loss, their_loss))

        their_grads, our_grads = gradients(their_loss, theirs), gradients(our_loss, ours)
        if "embed_out.weight" not in their_grads and "lm_head.weight" in their_grads:
            their_grads["embed_out.weight"] = their_grads["lm_head.weight"]  # GPT-NeoX's files
        for parameter, hf_tensors in tensors.items():
            hf_tensors = replace(hf_tensors, offset=0.0)
            expected = hf_tensors.join([their_grads[name] for name in hf_tensors.shapes])
            if parameter in VOCAB_TABLES:
                expected = expected[:257]
            found, padding = our_grads[parameter].tensor_split([len(expected)])
            errors["gradients"] = max(errors["gradients"], relative_error(found, expected))
            assert not padding.any()
        sgd_step(theirs, their_grads)
        sgd_step(ours, our_grads)
    print(name, {key: f"{value:.1e}" for key, value in errors.items()})
    assert max(errors.values()) < TOLERANCE


# ------------------------------------------------------------------- wrong conversions are refused


@dataclass
class WrongConversion:
    hf_config: dict
    break_it: Callable  # (monkeypatch, folder of the Hugging Face model)
    error: str = "the conversion is wrong"  # that of --check, which compares logits


def swap_modules(a, b):
    def break_it(monkeypatch, folder):
        swapped = {a: b, b: a}
        for model_type, family in hf_families.FAMILIES.items():
            modules = {}
            for ours, theirs in family.modules.items():
                modules[ours] = [swapped.get(name, name) for name in theirs]
            broken = replace(family, modules=modules)
            monkeypatch.setitem(hf_families.FAMILIES, model_type, broken)

    return break_it


def change_fields(**changes):
    """Fields of GPTConfig that differ from what config.json says."""

    def break_it(monkeypatch, folder, parse=hf.parse_hf_config):
        def wrong(hf_config, path):
            hf_model = parse(hf_config, path)
            return replace(hf_model, fields=hf_model.fields | changes)

        monkeypatch.setattr(hf, "parse_hf_config", wrong)

    return break_it


def change_config_json(**settings):
    def break_it(monkeypatch, folder):
        update_json(folder / "config.json", **settings)

    return break_it


def change_nothing(monkeypatch, folder):
    pass


def take_exact_for_tanh(monkeypatch, folder):
    monkeypatch.setitem(hf_families.GPT2.activations, "gelu", "gelu")


def leave_untransposed(module):
    def break_it(monkeypatch, folder, tensor_map=hf.tensor_map):
        def wrong(*args):
            tensors = tensor_map(*args)
            for name in tensors:
                if module in name:
                    tensors[name] = replace(tensors[name], transposed=False)
            return tensors

        monkeypatch.setattr(hf, "tensor_map", wrong)

    return break_it


def change_tensors(**changes):
    """All tensors are read with these changes of HFTensors."""

    def break_it(monkeypatch, folder, tensor_map=hf.tensor_map):
        def wrong(*args):
            tensors = tensor_map(*args)
            return {name: replace(each, **changes) for name, each in tensors.items()}

        monkeypatch.setattr(hf, "tensor_map", wrong)

    return break_it


def interleave_heads(monkeypatch, folder, from_checkpoint=GPT.from_checkpoint):
    """Pairs of rotated coordinates side by side, as in Meta's own files."""

    def wrong(path):
        model, enc, meta = from_checkpoint(path)
        for name, p in model.named_parameters():
            if name.endswith("c_attn.weight"):
                queries_keys, values = p.data.split([64, 32])
                heads = queries_keys.unflatten(0, (-1, 2, 4)).transpose(1, 2)
                p.data = torch.cat([heads.flatten(0, 2), values])
        return model, enc, meta

    monkeypatch.setattr(GPT, "from_checkpoint", wrong)


swap_queries_and_keys = swap_modules("self_attn.q_proj", "self_attn.k_proj")
mistral_with_window = HF_CONFIGS["mistral, window"]
WRONG_CONVERSIONS = {
    "queries and keys swapped": WrongConversion(LLAMA, swap_queries_and_keys),
    "queries and keys swapped, grouped": WrongConversion(QWEN2, swap_queries_and_keys, "has shape"),
    "gate and up swapped": WrongConversion(LLAMA, swap_modules("mlp.gate_proj", "mlp.up_proj")),
    "norms swapped": WrongConversion(
        LLAMA, swap_modules("input_layernorm", "post_attention_layernorm")
    ),
    "theta": WrongConversion(LLAMA, change_fields(rope_theta=20000.0)),
    "Llama 3's scaling left out": WrongConversion(
        HF_CONFIGS["llama 3's rope"], change_fields(rope_scaling=[])
    ),
    "interleaved heads": WrongConversion(LLAMA, interleave_heads),
    "eps of RMSNorm": WrongConversion(LLAMA, change_fields(norm_eps=1e-6)),
    "eps of LayerNorm": WrongConversion(GPT2, change_fields(norm_eps=1e-6)),
    "another GELU": WrongConversion(
        GPT2 | {"activation_function": "quick_gelu"},
        change_nothing,
        "activation_function 'quick_gelu' is not supported",
    ),
    "exact GELU taken for the tanh form": WrongConversion(EXACT_GELU, take_exact_for_tanh),
    "tied read as untied": WrongConversion(
        LLAMA | {"tie_word_embeddings": True},
        change_config_json(tie_word_embeddings=False),
        "lm_head.weight is missing",
    ),
    "untied read as tied": WrongConversion(
        LLAMA, change_config_json(tie_word_embeddings=True), "lm_head.weight is not the embedding"
    ),
    "a square matrix not transposed": WrongConversion(GPT2, leave_untransposed("attn.c_proj")),
    "an oblong matrix not transposed": WrongConversion(
        GPT2, leave_untransposed("mlp.c_fc"), "AssertionError"
    ),
    "too few key heads": WrongConversion(
        QWEN2, change_config_json(num_key_value_heads=1), "has shape"
    ),
    "too many key heads": WrongConversion(
        QWEN2, change_config_json(num_key_value_heads=4), "has shape"
    ),
    "biases left out": WrongConversion(
        QWEN2, change_config_json(model_type="mistral"), "6 tensors have no counterpart here"
    ),
    "a window left out": WrongConversion(mistral_with_window, change_fields(sliding_window=0)),
    "linear scaling left out": WrongConversion(
        HF_CONFIGS["llama, linear"], change_fields(rope_scaling=[])
    ),
    "yarn's scale left out": WrongConversion(
        HF_CONFIGS["llama, yarn"], change_fields(rope_scaling=[4.0, 1.0, 32.0, 12.0, 1.0])
    ),
    "heads of GPT-NeoX not sorted": WrongConversion(PYTHIA, change_tensors(heads=0)),
    "a serial residual": WrongConversion(PYTHIA, change_fields(parallel_residual=False)),
    "too many rotated": WrongConversion(PYTHIA, change_fields(rotary_dim=4)),
    "tanh for the exact GELU": WrongConversion(PYTHIA, change_fields(mlp="gelu")),
    "positions in all layers": WrongConversion(SMOLLM3, change_fields(no_rope_layer_interval=0)),
    "norms of Gemma not shifted": WrongConversion(GEMMA2_HF, change_tensors(offset=0.0)),
    "embeddings not scaled": WrongConversion(GEMMA2_HF, change_fields(scale_embeddings=False)),
    "no cap of attention": WrongConversion(
        GEMMA2_HF | SMALL_CAPS, change_fields(attention_softcap=0.0)
    ),
    "a window in all layers": WrongConversion(GEMMA3_HF, change_fields(full_attention_interval=0)),
    "one theta": WrongConversion(GEMMA3_HF, change_fields(rope_local_theta=1e6)),
    "another scale of queries": WrongConversion(
        GEMMA3_HF, change_fields(query_pre_attn_scalar=0.0)
    ),
    "a window too wide by one": WrongConversion(
        mistral_with_window, change_fields(sliding_window=17)
    ),
}


@pytest.mark.parametrize("name", WRONG_CONVERSIONS)
def test_a_wrong_import_is_refused(name, tmp_path, monkeypatch):
    case = WRONG_CONVERSIONS[name]
    make_hf_model(tmp_path / "theirs", case.hf_config)
    case.break_it(monkeypatch, tmp_path / "theirs")
    with pytest.raises((SystemExit, AssertionError)) as e:
        hf.main(["import", str(tmp_path / "theirs"), f"--out={tmp_path / 'ours'}", "--check"])
    assert case.error in f"{type(e.value).__name__}: {e.value}"
    assert not os.path.exists(tmp_path / "ours")


def test_a_wrong_export_is_refused(tmp_path, monkeypatch, capsys):
    run, out = str(tmp_path / "run"), tmp_path / "out"
    make_run(run, MODERN)
    for dtype in ("float32", "bfloat16"):
        hf.main(["export", run, f"--out={out}-{dtype}", "--check", f"--dtype={dtype}"])
        assert "logits agree with transformers' to" in capsys.readouterr().out
    swap_modules("mlp.gate_proj", "mlp.up_proj")(monkeypatch, None)
    with pytest.raises(SystemExit, match="the conversion is wrong"):
        hf.main(["export", run, f"--out={out}", "--check"])
    assert not os.path.exists(out)


# ----------------------------------------------------------------------------------------- export


MODELS = {
    "gpt2": CLASSIC,
    "gpt2, untied, relu2": CLASSIC | {"tie_embeddings": False, "mlp": "relu2", "n_inner": 56},
    "llama": MODERN,
    "llama, tied": MODERN | {"tie_embeddings": True, "rope_theta": 500.0},
    "llama, biases": MODERN | {"bias": True},
    "llama, scaled": MODERN | {"rope_scaling": [8.0, 1.0, 4.0, 16.0], "rope_theta": 500.0},
    "mistral": MODERN | {"sliding_window": 9},
    "qwen2": MODERN | {"qkv_bias": True},
    "qwen2, windowed": MODERN | {"qkv_bias": True, "sliding_window": 9},
    "qwen3": MODERN | {"qk_norm": True, "head_dim": 16},
    "qwen3, windowed": MODERN | {"qk_norm": True, "sliding_window": 9},
    "llama, linear": MODERN | LINEAR,
    "llama, yarn": MODERN | YARN,
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
    "gemma3_text, scaled": GEMMA3 | LINEAR,
    "gemma3_text, no window": GEMMA3
    | {"sliding_window": 0, "full_attention_interval": 0, "rope_local_theta": 0.0},
}


def render_prompt(tok, prompt):
    """A prompt in a tokenizer's chat template, as text."""
    messages = [{"role": "user", "content": prompt}]
    return tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_an_export(name, tmp_path):
    """The same logits, template, ids and greedy samples; importing it again gives our config."""
    run, exported, back = (str(tmp_path / folder) for folder in ("run", "export", "back"))
    ours = make_run(run, MODELS[name], template="Frage: \"{prompt}\" 'ü'\n{{ x }} Antwort: ")
    hf.main(["export", run, f"--out={exported}"])
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        exported, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    assert theirs.config.model_type == name.split(",")[0]
    assert theirs.dtype == torch.float32
    idx, _ = make_batch(ours)
    error = relative_error(ours(idx), theirs(idx).logits)
    print(f"{name}: {error:.1e}")
    assert error < TOLERANCE

    enc = tokenizer.load("bytes")
    tok = transformers.AutoTokenizer.from_pretrained(exported)
    assert tok.eos_token_id == enc.eot_token == theirs.generation_config.eos_token_id
    assert tok.model_max_length == ours.config.block_size
    for prompt in ("", "was ist das?", "{prompt} {{ m }} <b>\n ñ", "'\"\\n"):
        text = render_prompt(tok, prompt)
        assert text == f"Frage: \"{prompt}\" 'ü'\n{{{{ x }}}} Antwort: "
        ids = tok(text, add_special_tokens=True)["input_ids"]
        assert ids == enc.encode_ordinary(text)
        assert tok.decode(ids) == text

    hf.main(["import", exported, f"--out={back}"])
    assert GPT.from_checkpoint(back)[0].config == GPTConfig(**MODELS[name])
    prompt = [72, 105]
    sampled = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=8)
    assert sampled[0, 2:].tolist() == generate(ours, [prompt], 8, 0.0, eot=enc.eot_token)[0]


@pytest.mark.parametrize("kind", ["trained", "json", "json like Qwen's"])
@pytest.mark.parametrize("model_type", ["gpt2", *hf_families.FAMILIES])
def test_ids_of_an_export(model_type, kind, tmp_path):
    """AutoTokenizer gives our ids, but for a qwen2 with another tokenizer than Qwen's, of which the
    export says it."""
    texts = ["don't go, it's 12345 + 3.14", "  two\n\n lines\tof 'RE and I'LL 2024 e\u0301"]
    enc = tokenizer.train(texts * 50, 300)
    if kind != "trained":
        os.mkdir(tmp_path / "json")
        hf.write_tokenizer(str(tmp_path / "json"), enc, "{prompt}", 64)
        path = tmp_path / "json/tokenizer.json"
        parts = json.loads(path.read_text())
        split = {"type": "Split", "behavior": "Isolated", "invert": False}
        split["pattern"] = {"Regex": hf.QWEN_SPLIT if "Qwen" in kind else " ?[a-z]+"}
        bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
        steps = [split, bytes_only | {"trim_offsets": False}]
        parts["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        parts["normalizer"] = {"type": "NFC"}
        path.write_text(json.dumps(parts))
        enc = tokenizer.load_json(str(path))
    hf.write_tokenizer(str(tmp_path), enc, "{prompt}", 64)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    expected = [enc.encode_ordinary(text) for text in texts]
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert [fast(text).input_ids for text in texts] == expected
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    is_ours = [auto(text).input_ids for text in texts] == expected
    assert is_ours != hf.autotokenizer_differs(model_type, enc)


TOKENIZERS = {
    "chatml": chatml,
    "legacy": functools.partial(sentencepiece, scheme="legacy"),
    "first": functools.partial(sentencepiece, scheme="first"),
    "never": functools.partial(sentencepiece, scheme="never"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_chat_templates_are_imported_and_exported(kind, tmp_path, capsys):
    """transformers gives our ids of a prompt, from the original folder and from our export."""
    folder, run, exported = (str(tmp_path / name) for name in ("theirs", "ours", "export"))
    theirs = make_hf_model(folder, LLAMA | {"vocab_size": 700})
    os.remove(os.path.join(folder, "tokenizer.json"))
    TOKENIZERS[kind](folder)
    hf.main(["import", folder, f"--out={run}", "--check"])
    _, enc, meta = GPT.from_checkpoint(run)
    hf.main(["export", run, f"--out={exported}", "--check"])
    assert capsys.readouterr().out.count("token ids agree with apply_chat_template's") == 2
    update_json(os.path.join(exported, "tokenizer_config.json"), chat_template=CHATML)
    with pytest.raises(SystemExit, match="apply_chat_template gives other ids"):
        hf.check_chat(exported, run)
    shutil.rmtree(exported)
    hf.main(["export", run, f"--out={exported}"])

    for source in (folder, exported):
        tok = transformers.AutoTokenizer.from_pretrained(source)
        for text in [*fuzzed(100), "</s>", "<|im_end|>"]:
            if not text.strip() or any(special in text for special in enc.specials):
                continue
            ids = tok.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
            )
            assert ids == prompt_ids(enc, meta["config"]["template"], text), (source, text)
            assert max(ids) < theirs.config.vocab_size
