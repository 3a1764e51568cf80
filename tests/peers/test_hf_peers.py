"""hf.py against transformers: what it imports computes the same, logits and gradients, and what it exports is loaded as it is.
`make test-peers` has transformers installed; elsewhere these are skipped."""

import json
import os

import pytest
import torch
import torch.nn.functional as F

from nanospin import checkpoint
from tools import hf
from data import tokenizer
from data.template import prompt_ids
from model import GPTConfig
from tests.test_hf import MODERN, CLASSIC, fuzzed, make_run, write_tokenizer
from tests.tokenizers_like import chatml, sentencepiece

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed; make test-peers installs it"
)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TOLERANCE = 1e-5
GPT2 = dict(model_type="gpt2", vocab_size=257, n_positions=48, n_embd=32, n_layer=2, n_head=4)
LLAMA = dict(
    model_type="llama",
    vocab_size=257,
    max_position_embeddings=48,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    intermediate_size=40,
    rms_norm_eps=1e-5,
)
MISTRAL = dict(LLAMA, model_type="mistral", num_key_value_heads=2, sliding_window=None)
QWEN2 = dict(LLAMA, model_type="qwen2", num_key_value_heads=2, rms_norm_eps=1e-6)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
LAYOUTS = {
    "gpt2": GPT2,
    "gpt2, untied": dict(GPT2, tie_word_embeddings=False),
    "gpt2, relu, n_inner, eps": dict(
        GPT2, activation_function="relu", n_inner=56, layer_norm_epsilon=1e-3
    ),
    "gpt2, padded": dict(GPT2, vocab_size=300),
    "llama, untied": LLAMA,
    "llama, tied": dict(LLAMA, tie_word_embeddings=True),
    "llama, grouped": dict(LLAMA, num_key_value_heads=2),
    "llama, one key head, tied": dict(LLAMA, num_key_value_heads=1, tie_word_embeddings=True),
    "llama, biases": dict(LLAMA, attention_bias=True, mlp_bias=True),
    "llama, theta and eps": dict(
        LLAMA, rope_parameters={"rope_type": "default", "rope_theta": 500.0}, rms_norm_eps=1e-3
    ),
    "llama 3's rope": dict(LLAMA, rope_parameters=LLAMA3),
    "llama, padded": dict(LLAMA, vocab_size=320),
    "mistral": MISTRAL,
    "mistral, window": dict(MISTRAL, sliding_window=16),
    "mistral, window, grouped as one": dict(MISTRAL, sliding_sliding_window=9, num_key_value_heads=1),
    "qwen2, window of all layers": dict(
        QWEN2, use_sliding_window=True, sliding_window=16, max_window_layers=0
    ),
    "qwen3, window of all layers": dict(
        QWEN2,
        model_type="qwen3",
        head_dim=16,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=0,
    ),
    "llama, wide heads": dict(LLAMA, head_dim=16, num_key_value_heads=2),
    "mistral, wide heads": dict(MISTRAL, head_dim=12),
    "qwen3": dict(QWEN2, model_type="qwen3", head_dim=16),
    "qwen3, tied, padded": dict(
        QWEN2, model_type="qwen3", head_dim=8, tie_word_embeddings=True, vocab_size=320
    ),
    "qwen2, untied": QWEN2,
    "qwen2, tied": dict(QWEN2, tie_word_embeddings=True),
    "qwen2, window, padded": dict(
        QWEN2, use_sliding_window=True, sliding_window=16, max_window_layers=1, vocab_size=272
    ),
}


def make_theirs(folder, shape, seed=0, **saving):
    """A model of transformers whose every parameter is random, saved with a tokenizer of bytes."""
    torch.manual_seed(seed)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**shape), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.2 * torch.randn_like(p))
    theirs.save_pretrained(folder, **saving)
    write_tokenizer(folder)
    return theirs


def error(mine, theirs):
    return ((mine - theirs).abs().max() / theirs.abs().max()).item()


def batch(model, seed=0):
    idx = torch.randint(
        0,
        257,
        (3, min(model.config.block_size, 40) + 1),
        generator=torch.Generator().manual_seed(seed),
    )
    return idx[:, :-1], idx[:, 1:]


@pytest.mark.parametrize("name", LAYOUTS)
def test_import_is_transformers(name, tmp_path):
    """Logits, and three steps of SGD: every loss, and every gradient relative to the largest of its tensor."""
    theirs = make_theirs(
        tmp_path / "theirs", LAYOUTS[name], max_shard_size="20KB" if "grouped" in name else "1GB"
    )
    hf.main(["import", str(tmp_path / "theirs"), f"--out={tmp_path / 'ours'}"])
    ours, enc, _ = checkpoint.load_model(str(tmp_path / "ours"))
    assert (
        ours.config.block_size == (16 if name == "qwen2, window, padded" else 48)
        and bool(ours.config.window) == ("window" in name and "padded" not in name)
        and ours.config.vocab_size == enc.n_vocab == 257
    )
    worst = {"logits": 0.0, "loss": 0.0, "gradients": 0.0}
    rows = LAYOUTS[name]["vocab_size"]
    parts = hf.table(ours, "gpt2" if "gpt2" in name else "llama", rows, 48)
    for step in range(3):
        idx, targets = batch(ours, step)
        logits = theirs(idx).logits[..., :257]
        worst["logits"] = max(worst["logits"], error(ours(idx), logits))
        losses = (
            F.cross_entropy(logits.flatten(0, 1), targets.flatten()),
            -ours(idx, targets).mean(),
        )
        worst["loss"] = max(worst["loss"], abs(losses[1].item() / losses[0].item() - 1))
        named, params = dict(theirs.named_parameters()), dict(ours.named_parameters())
        grads = dict(zip(named, torch.autograd.grad(losses[0], list(named.values()))))
        mine = dict(zip(params, torch.autograd.grad(losses[1], list(params.values()))))
        for parameter, (names, transposed) in parts.items():
            grad = torch.cat([grads[n] for n, _ in names])
            grad = (grad.T if transposed else grad)[
                : 257 if parameter in ("wte.weight", "lm_head.weight") else None
            ]
            worst["gradients"] = max(worst["gradients"], error(mine[parameter][: len(grad)], grad))
            assert not mine[parameter][len(grad) :].any()  # of the padding
        with torch.no_grad():
            for p, grad in [
                *zip(named.values(), grads.values()),
                *zip(params.values(), mine.values()),
            ]:
                p.sub_(0.1 * grad)
    print(name, {key: f"{value:.1e}" for key, value in worst.items()})
    assert max(worst["logits"], worst["loss"], worst["gradients"]) < TOLERANCE


def swapped(names, a, b):
    return {
        **names,
        **{key: [{a: b, b: a}.get(n, n) for n in value] for key, value in names.items()},
    }


def wrong_shape(monkeypatch, **other):
    def shape_of(theirs, where, right=hf.shape_of):
        family, shape, rows, window = right(theirs, where)
        return family, shape | other, rows, window

    monkeypatch.setattr(hf, "shape_of", shape_of)


def edit(folder, **settings):
    with open(folder / "config.json") as f:
        theirs = json.load(f)
    (folder / "config.json").write_text(json.dumps(theirs | settings))


def not_transposed(monkeypatch, module):
    monkeypatch.setattr(
        hf,
        "table",
        lambda *args, right=hf.table: {
            name: (parts, transposed and module not in name)
            for name, (parts, transposed) in right(*args).items()
        },
    )


def interleaved(model, *args, right=hf.table):
    """Heads as Meta's own files have them, pairs side by side: a permutation of the rows of queries and keys."""
    for name, p in model.named_parameters():
        if name.endswith("c_attn.weight"):
            q, v = p.data.split([8 * 8, 4 * 8]) if len(p) == 96 else (p.data, p.data[:0])
            p.data = torch.cat([q.unflatten(0, (-1, 2, 4)).transpose(1, 2).flatten(0, 2), v])
    return model


# a conversion, what is wrong with it, and by what it is refused: the importer by itself, or its comparison of logits, --check
WRONG = {
    "queries and keys swapped": (
        LLAMA,
        lambda m, f: m.setattr(
            hf, "LLAMA", swapped(hf.LLAMA, "self_attn.q_proj", "self_attn.k_proj")
        ),
        "logits",
    ),
    "the same, grouped": (
        QWEN2,
        lambda m, f: m.setattr(
            hf, "LLAMA", swapped(hf.LLAMA, "self_attn.q_proj", "self_attn.k_proj")
        ),
        "has shape",
    ),
    "gate and up swapped": (
        LLAMA,
        lambda m, f: m.setattr(hf, "LLAMA", swapped(hf.LLAMA, "mlp.gate_proj", "mlp.up_proj")),
        "logits",
    ),
    "norms swapped": (
        LLAMA,
        lambda m, f: m.setattr(
            hf, "LLAMA", swapped(hf.LLAMA, "input_layernorm", "post_attention_layernorm")
        ),
        "logits",
    ),
    "theta": (LLAMA, lambda m, f: wrong_shape(m, rope_theta=20000.0), "logits"),
    "Llama 3's scaling left out": (
        LAYOUTS["llama 3's rope"],
        lambda m, f: wrong_shape(m, rope_scaling=[]),
        "logits",
    ),
    "pairs of a head side by side": (LLAMA, None, "logits"),
    "eps of RMSNorm": (LLAMA, lambda m, f: wrong_shape(m, norm_eps=1e-6), "logits"),
    "eps of LayerNorm": (GPT2, lambda m, f: wrong_shape(m, norm_eps=1e-6), "logits"),
    "GELU's exact form, as it is": (
        dict(GPT2, activation_function="gelu"),
        lambda m, f: None,
        "activation_function 'gelu' is not supported",
    ),
    "GELU's exact form, taken for the other": (
        dict(GPT2, activation_function="gelu"),
        lambda m, f: m.setitem(hf.ACTIVATIONS["gpt2"], "gelu", "gelu"),
        "logits",
    ),
    "tied, as untied": (
        dict(LLAMA, tie_word_embeddings=True),
        lambda m, f: edit(f, tie_word_embeddings=False),
        "lm_head.weight is missing",
    ),
    "untied, as tied": (
        LLAMA,
        lambda m, f: edit(f, tie_word_embeddings=True),
        "lm_head.weight is not the embedding",
    ),
    "a square projection not transposed": (
        GPT2,
        lambda m, f: not_transposed(m, "attn.c_proj"),
        "logits",
    ),
    "an oblong projection not transposed": (
        GPT2,
        lambda m, f: not_transposed(m, "mlp.c_fc"),
        "AssertionError",
    ),
    "too few key heads": (QWEN2, lambda m, f: edit(f, num_key_value_heads=1), "has shape"),
    "too many key heads": (QWEN2, lambda m, f: edit(f, num_key_value_heads=4), "has shape"),
    "biases left out": (QWEN2, lambda m, f: edit(f, model_type="mistral"), "no use for 6 tensors"),
    "a window forgotten": (
        LAYOUTS["mistral, window"],
        lambda m, f: wrong_shape(m, sliding_window=0),
        "logits",
    ),
    "a window one too wide": (
        LAYOUTS["mistral, window"],
        lambda m, f: wrong_shape(m, sliding_window=17),
        "logits",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_conversion_is_refused(name, tmp_path, monkeypatch):
    shape, spoil, found = WRONG[name]
    make_theirs(tmp_path / "theirs", shape)
    if spoil:
        spoil(monkeypatch, tmp_path / "theirs")
    else:
        monkeypatch.setattr(
            checkpoint,
            "load_model",
            lambda path, right=checkpoint.load_model: (interleaved(right(path)[0]), None, None),
        )
    with pytest.raises((SystemExit, AssertionError)) as e:
        hf.main(["import", str(tmp_path / "theirs"), f"--out={tmp_path / 'ours'}", "--check"])
    assert (
        "the conversion is wrong" if found == "logits" else found
    ) in f"{type(e.value).__name__}: {e.value}" and not os.path.exists(tmp_path / "ours")


def test_a_wrong_export_is_refused(tmp_path, monkeypatch, capsys):
    run, out = str(tmp_path / "run"), tmp_path / "out"
    make_run(run, MODERN)
    for dtype in ("float32", "bfloat16"):
        hf.main(["export", run, f"--out={out}-{dtype}", "--check", f"--dtype={dtype}"])
        assert "logits are transformers' up to" in capsys.readouterr().out
    monkeypatch.setattr(hf, "LLAMA", swapped(hf.LLAMA, "mlp.gate_proj", "mlp.up_proj"))
    with pytest.raises(SystemExit, match="the conversion is wrong"):
        hf.main(["export", run, f"--out={out}", "--check"])
    assert not os.path.exists(out)


OURS = {
    "gpt2": CLASSIC,
    "gpt2, untied, relu2": dict(CLASSIC, tie_embeddings=False, mlp="relu2", n_inner=56),
    "llama": MODERN,
    "llama, tied": dict(MODERN, tie_embeddings=True, rope_theta=500.0),
    "llama, biases": dict(MODERN, bias=True),
    "qwen2": dict(MODERN, qkv_bias=True),
    "mistral": dict(MODERN, sliding_window=9),
    "qwen2, windowed": dict(MODERN, qkv_bias=True, sliding_window=9),
    "qwen3": dict(MODERN, qk_norm=True, head_dim=16),
    "qwen3, windowed": dict(MODERN, qk_norm=True, sliding_window=9),
    "llama, scaled": dict(MODERN, rope_scaling=[8.0, 1.0, 4.0, 16.0], rope_theta=500.0),
}


@pytest.mark.parametrize("name", OURS)
def test_transformers_loads_an_export(name, tmp_path):
    ours = make_run(
        str(tmp_path / "run"), OURS[name], template="Frage: \"{prompt}\" 'ü'\n{{ x }} Antwort: "
    )
    hf.main(["export", str(tmp_path / "run"), f"--out={tmp_path / 'theirs'}"])
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "theirs", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    assert theirs.config.model_type == name.split(",")[0] and theirs.dtype == torch.float32
    idx, _ = batch(ours)
    off = error(ours(idx), theirs(idx).logits)
    print(f"{name}: {off:.1e}")
    assert off < TOLERANCE
    enc, tok = (
        tokenizer.load("bytes"),
        transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs"),
    )
    assert (
        tok.eos_token_id == enc.eot_token == theirs.generation_config.eos_token_id
        and tok.model_max_length == ours.config.block_size
    )
    for prompt in ("", "was ist das?", "{prompt} {{ m }} <b>\n ñ", "'\"\\n"):
        said = tok.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        assert said == f"Frage: \"{prompt}\" 'ü'\n{{{{ x }}}} Antwort: "
        ids = tok(said, add_special_tokens=True)["input_ids"]
        assert ids == enc.encode_ordinary(said) and tok.decode(ids) == said
    hf.main(["import", str(tmp_path / "theirs"), f"--out={tmp_path / 'back'}"])
    assert checkpoint.load_model(str(tmp_path / "back"))[0].config == GPTConfig(**OURS[name])
    new = theirs.generate(torch.tensor([[72, 105]]), do_sample=False, max_new_tokens=8)[
        0, 2:
    ].tolist()
    from sample import generate

    assert new == generate(ours, [[72, 105]], 8, temperature=0, eot=enc.eot_token)[0]


@pytest.mark.parametrize("kind", ["chatml", "legacy", "first", "never"])
def test_a_chat_template_goes_out_and_in(kind, tmp_path):
    """Of other models' tokenizers: transformers' ids of a conversation, by the folder that was imported and by our export of it, are ours."""
    theirs = make_theirs(tmp_path / "theirs", dict(LLAMA, vocab_size=700))
    os.remove(tmp_path / "theirs" / "tokenizer.json")
    folder = str(tmp_path / "theirs")
    chatml(folder) if kind == "chatml" else sentencepiece(folder, kind)
    hf.main(["import", folder, f"--out={tmp_path / 'ours'}"])
    ours, enc, meta = checkpoint.load_model(str(tmp_path / "ours"))
    hf.main(["export", str(tmp_path / "ours"), f"--out={tmp_path / 'out'}"])
    for where in (folder, str(tmp_path / "out")):
        tok = transformers.AutoTokenizer.from_pretrained(where)
        for text in fuzzed(100) + ["</s>", "<|im_end|>"]:
            if text.strip() and not any(special in text for special in enc.specials):
                ids = tok.apply_chat_template(
                    [{"role": "user", "content": text}],
                    add_generation_prompt=True,
                    return_dict=False,
                )
                assert ids == prompt_ids(enc, meta["config"]["template"], text), (where, text)
                assert theirs.config.vocab_size >= max(ids)
