"""hf.py without transformers: out and in again is the identity, and what is not understood is refused in a line."""

import json
import os
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanospin import checkpoint
from nanospin import config
from tools import hf
from data import tokenizer
from model import GPT, GPTConfig
from tests.conftest import SHARED

CLASSIC = dict(vocab_size=257, block_size=48, n_layer=2, n_head=4, n_embd=32)
MODERN = dict(
    CLASSIC, n_kv_head=2, position="rotary", norm="rmsnorm", mlp="swiglu", bias=False, tie_embeddings=False
)
QWEN3 = dict(MODERN, qk_norm=True, head_dim=16)
OURS = {
    "classic": CLASSIC,
    "untied": dict(CLASSIC, tie_embeddings=False, mlp="relu", n_inner=40),
    "modern": MODERN,
    "tied": dict(MODERN, tie_embeddings=True, norm_eps=1e-6),
    "qkv_bias": dict(MODERN, qkv_bias=True),
    "bias": dict(MODERN, bias=True),
    "scaled": dict(MODERN, rope_scaling=[8.0, 1.0, 4.0, 32.0], rope_theta=5e5),
    "qk_norm and wide heads": QWEN3,
    "windowed": dict(MODERN, sliding_window=9),
    "windowed, qkv_bias": dict(MODERN, sliding_window=9, qkv_bias=True),
    "windowed, qk_norm": dict(QWEN3, sliding_window=9),
}


def make_run(run, shape, enc=None, name="bytes", **settings):
    """A run with one checkpoint, every parameter of it random. Returns the model."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**shape)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    optimizers, cfg = (
        [torch.optim.SGD(model.parameters())],
        config.Config(out_dir=run, **{"template": config.TEMPLATE} | settings),
    )
    saving = checkpoint.save(
        run,
        0,
        7,
        model,
        optimizers,
        cfg,
        enc or tokenizer.load("bytes"),
        name,
        {"val_loss": 4.25},
        {},
    )
    assert checkpoint.wait_for_save(saving) == ""
    return model


def write_tokenizer(folder, enc=None):
    tokenizer.to_json(enc or tokenizer.load("bytes"), os.path.join(folder, "tokenizer.json"))


def files(folder):
    return {
        name: open(os.path.join(folder, name), "rb").read() for name in sorted(os.listdir(folder))
    }


def refused(*argv):
    with pytest.raises(SystemExit) as e:
        hf.main(list(map(str, argv)))
    assert isinstance(e.value.code, str) and "\n" not in e.value.code
    return e.value.code


@pytest.mark.parametrize("name", OURS)
def test_out_and_in_again_is_the_identity(name, tmp_path):
    """Config, every tensor (the padding comes back as zeros), the logits; and out once more, every byte."""
    model = make_run(str(tmp_path / "run"), OURS[name])
    hf.main(["export", str(tmp_path / "run"), f"--out={tmp_path / 'out'}"])
    hf.main(["import", str(tmp_path / "out"), f"--out={tmp_path / 'back'}"])
    back, enc, meta = checkpoint.load_model(str(tmp_path / "back"))
    assert (
        back.config == model.config
        and meta["tokenizer"] == "bytes"
        and checkpoint.find_corruption(checkpoint.latest(str(tmp_path / "back"))) == ""
    )
    for (parameter, mine), its in zip(model.named_parameters(), back.parameters()):
        rows = 257 if parameter in ("wte.weight", "lm_head.weight") else None
        assert torch.equal(mine[:rows], its[:rows]) and (
            rows is None or len(its) == 320 and not its[rows:].any()
        )
    idx = torch.randint(0, 257, (2, 40))
    assert torch.equal(model(idx), back(idx))
    hf.main(["export", str(tmp_path / "back"), f"--out={tmp_path / 'again'}"])
    first, second = files(tmp_path / "out"), files(tmp_path / "again")
    assert first.pop("README.md") != second.pop("README.md") and first == second
    card = open(tmp_path / "out" / "README.md").read()
    assert "| val_loss | 4.25 |" in card and "### Instruction: {prompt}" in card


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_and_bfloat16(dtype, tmp_path):
    """Every file keeps the limit, the index names each tensor's, and what comes in again is what went out, rounded once."""
    model = make_run(str(tmp_path / "run"), MODERN)
    hf.main(
        [
            "export",
            str(tmp_path / "run"),
            f"--out={tmp_path / 'out'}",
            f"--dtype={dtype}",
            "--shard_gb=2.5e-5",
        ]
    )
    shards = {
        name: load_file(tmp_path / "out" / name)
        for name in os.listdir(tmp_path / "out")
        if name.endswith(".safetensors")
    }
    sizes = {name: [t.nbytes for t in tensors.values()] for name, tensors in shards.items()}
    assert len(shards) > 2 and set(shards) == {
        f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)
    }
    assert (
        all(sum(size) <= 25000 or len(size) == 1 for size in sizes.values())
        and max(map(len, sizes.values())) > 1
    )
    with open(tmp_path / "out" / "model.safetensors.index.json") as f:
        index = json.load(f)
    assert index == {
        "metadata": {"total_size": sum(map(sum, sizes.values()))},
        "weight_map": {tensor: name for name, tensors in shards.items() for tensor in tensors},
    }
    hf.main(["import", str(tmp_path / "out"), f"--out={tmp_path / 'back'}"])
    back = checkpoint.load_model(str(tmp_path / "back"))[0]
    for (name, mine), its in zip(model.named_parameters(), back.parameters()):
        rows = 257 if name in ("wte.weight", "lm_head.weight") else None
        assert torch.equal(mine[:rows].to(getattr(torch, dtype)).float(), its[:rows]), name
    hf.main(["export", str(tmp_path / "back"), f"--out={tmp_path / 'whole'}", f"--dtype={dtype}"])
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert whole.keys() == index["weight_map"].keys() and all(
        torch.equal(whole[name], shards[file][name]) for name, file in index["weight_map"].items()
    )
    assert "--shard_gb must be above 0, got 0.0" in refused(
        "export", tmp_path / "run", f"--out={tmp_path / 'no'}", "--shard_gb=0"
    )
    assert "invalid choice: 'float16'" in refused(
        "export", tmp_path / "run", f"--out={tmp_path / 'no'}", "--dtype=float16"
    ) and not os.path.exists(tmp_path / "no")


@pytest.mark.parametrize(
    "setting, value",
    [
        ("position", "sinusoidal"),
        ("softcap", 5.0),
        ("mlp", "relu2"),
        ("attn_scale", "embd"),
        ("attn_proj", False),
    ],
)
def test_what_has_no_equivalent_is_named(setting, value, tmp_path):
    make_run(str(tmp_path / "run"), MODERN | {setting: value})
    assert f"{setting} is {value!r}" in refused(
        "export", tmp_path / "run", f"--out={tmp_path / 'out'}"
    ) and not os.path.exists(tmp_path / "out")


@pytest.mark.parametrize(
    "setting, value",
    [
        ("bias", False),
        ("n_kv_head", 2),
        ("norm", "rmsnorm"),
        ("mlp", "swiglu"),
        ("mlp_alone", True),
        ("window", 8),
    ],
)
def test_what_gpt2_has_not_is_named(setting, value):
    with pytest.raises(SystemExit, match=f"{setting} is {value!r}"):
        hf.equivalent(GPTConfig(**CLASSIC | {setting: value}))


def test_a_scalar_head_is_left_out(tmp_path, capsys):
    model = make_run(str(tmp_path / "run"), dict(MODERN, scalar_head=True), stage="reward")
    hf.main(["export", str(tmp_path / "run"), f"--out={tmp_path / 'out'}"])
    assert "scalar head" in capsys.readouterr().out
    hf.main(["import", str(tmp_path / "out"), f"--out={tmp_path / 'back'}"])
    idx = torch.randint(0, 257, (2, 40))
    assert torch.equal(checkpoint.load_model(str(tmp_path / "back"))[0](idx), model(idx))


# ---------------------------------------------------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("hf")
    for name in ("classic", "modern", "tied"):
        make_run(str(root / f"{name}_run"), OURS[name])
        hf.main(["export", str(root / f"{name}_run"), f"--out={root / name}"])
    return root


def edit(file, change):
    with open(file, encoding="utf-8") as f:
        value = json.load(f)
    change(value)
    with open(file, "w", encoding="utf-8") as f:
        json.dump(value, f)


def retensor(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")


K, NORM = "model.layers.0.self_attn.k_proj.weight", "model.layers.1.input_layernorm.weight"
DAMAGE = [
    (
        "modern",
        "config.json",
        lambda d: d.update(model_type="bloom"),
        "model_type 'bloom' is not supported",
    ),
    ("modern", "config.json", lambda d: d.update(model_type=["llama"]), "model_type must be str"),
    (
        "modern",
        "config.json",
        lambda d: d.update(layer_types=["chunked_attention"] * 2),
        "layer_types",
    ),
    ("modern", "config.json", lambda d: d.pop("rms_norm_eps"), "rms_norm_eps is missing"),
    ("modern", "config.json", lambda d: d.update(hidden_size="32"), "hidden_size must be int"),
    (
        "modern",
        "config.json",
        lambda d: d.update(hidden_act="gelu"),
        "hidden_act 'gelu' is not supported",
    ),
    (
        "modern",
        "config.json",
        lambda d: d.update(attention_bias=True),
        "attention_bias and mlp_bias",
    ),
    (
        "modern",
        "config.json",
        lambda d: d.update(attn_logit_softcapping=50.0),
        "attn_logit_softcapping = 50.0 is not supported",
    ),
    (
        "modern",
        "config.json",
        lambda d: d.update(quantization_config={"bits": 4}),
        "quantization_config",
    ),
    (
        "modern",
        "config.json",
        lambda d: d.update(rope_scaling={"type": "linear", "factor": 2.0}),
        "rotary positions",
    ),
    (
        "modern",
        "config.json",
        lambda d: d.update(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        "partial_rotary_factor",
    ),
    ("modern", "config.json", lambda d: d.update(head_dim=16), "q_proj.weight has shape (32, 32)"),
    ("modern", "config.json", lambda d: d.update(num_attention_heads=6), "q_proj.weight has shape"),
    (
        "modern",
        "config.json",
        lambda d: d.update(num_key_value_heads=3),
        "n_head 4 must be a multiple of n_kv_head 3",
    ),
    (
        "modern",
        "config.json",
        lambda d: d.update(num_key_value_heads=1),
        "k_proj.weight has shape (16, 32)",
    ),
    (
        "modern",
        "config.json",
        lambda d: d.update(num_hidden_layers=3),
        "the tensor model.layers.2.input_layernorm.weight is missing",
    ),
    ("modern", "config.json", lambda d: d.update(num_hidden_layers=1), "no use for 9 tensors"),
    (
        "modern",
        "config.json",
        lambda d: d.update(vocab_size=256),
        "vocab_size 256 is below the tokenizer's 257",
    ),
    (
        "modern",
        "config.json",
        lambda d: d.update(tie_word_embeddings=True),
        "lm_head.weight is not the embedding",
    ),
    (
        "tied",
        "config.json",
        lambda d: d.update(tie_word_embeddings=False),
        "lm_head.weight is missing",
    ),
    ("classic", "config.json", lambda d: d.update(scale_attn_weights=False), "scale_attn_weights"),
    (
        "classic",
        "config.json",
        lambda d: d.update(scale_attn_by_inverse_layer_idx=True),
        "scale_attn_by_inverse_layer_idx = True",
    ),
    (
        "classic",
        "config.json",
        lambda d: d.update(activation_function="gelu"),
        "activation_function 'gelu' is not supported; gelu_new",
    ),
    ("modern", "model.safetensors", lambda t: t.pop(K), f"the tensor {K} is missing"),
    (
        "classic",
        "model.safetensors",
        lambda t: t.update({"wte.weight": t["transformer.wte.weight"].clone()}),
        "wte.weight is there twice",
    ),
    (
        "modern",
        "model.safetensors",
        lambda t: t.update(extra=torch.zeros(2)),
        "no use for 1 tensors: extra",
    ),
    ("modern", "model.safetensors", lambda t: t.update({K: t[K].T}), f"{K} has shape (32, 16)"),
    (
        "modern",
        "model.safetensors",
        lambda t: t.update({NORM: t[NORM].long()}),
        f"{NORM} has shape (32,) and dtype I64",
    ),
    ("modern", "tokenizer.json", lambda d: d.pop("model"), "has no model"),
    ("modern", "tokenizer.json", lambda d: d.update(model=[]), "cannot be read"),
]


@pytest.mark.parametrize("which, file, change, message", DAMAGE, ids=range(len(DAMAGE)))
def test_what_is_not_understood_is_refused(which, file, change, message, exported, tmp_path):
    shutil.copytree(exported / which, tmp_path / "in")
    retensor(tmp_path / "in", change) if file.endswith("safetensors") else edit(
        tmp_path / "in" / file, change
    )
    assert message in refused("import", tmp_path / "in", f"--out={tmp_path / 'out'}")
    assert not os.path.exists(tmp_path / "out")


def test_files_that_are_not_there_or_no_safetensors(exported, tmp_path, monkeypatch):
    folder, out = tmp_path / "in", f"--out={tmp_path / 'out'}"
    shutil.copytree(exported / "modern", folder)
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    assert "model.safetensors cannot be read" in refused("import", folder, out)
    os.rename(folder / "model.safetensors", folder / "pytorch_model.bin")
    assert "pytorch_model.bin is a pickle" in refused("import", folder, out)
    assert "is a pickle" in refused("import", folder / "pytorch_model.bin", out)
    os.remove(folder / "config.json")
    assert "config.json: No such file" in refused("import", folder, out)
    assert "40 hexadecimal digits" in refused("import", "org/name@main", out)
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kw: 1 / 0)
    assert "could not be fetched (ZeroDivisionError)" in refused(
        "import", "org/name@" + "0" * 40, out
    )
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, revision, **kw: str(exported / "modern")
    )
    hf.main(["import", "org/name@" + "0" * 40, out])
    assert "is there already" in refused("import", exported / "modern", out)
    assert "is there already" in refused("export", tmp_path / "out", out)
    assert "no checkpoint there" in refused(
        "export", tmp_path / "nothing", f"--out={tmp_path / 'other'}"
    )
    assert "the following arguments are required" in refused("import", folder)


def test_block_size_and_window(exported, tmp_path, capsys):
    """A window of all layers is the model's; one of some limits how long a text may be."""
    shutil.copytree(exported / "modern", tmp_path / "in")
    config_json, out = tmp_path / "in" / "config.json", tmp_path / "out"
    edit(config_json, lambda d: d.update(model_type="mistral", sliding_window=16))
    hf.main(
        [
            "import",
            str(tmp_path / "in"),
            f"--out={out}",
            "--template=Q: {prompt}\nA: ",
            "--block_size=40",
        ]
    )
    meta = checkpoint.read_meta(checkpoint.resolve(str(out)))
    assert (
        meta["model"]["block_size"] == 40
        and meta["model"]["window"] == 16
        and meta["config"]["template"] == "Q: {prompt}\nA: "
    )
    edit(config_json, lambda d: d.update(model_type="qwen3", max_window_layers=1, head_dim=8))
    some = f"--out={tmp_path / 'some'}"
    assert (
        "block_size 32 is not within the model's 16, the sliding window of some of its layers"
        in refused("import", tmp_path / "in", some, "--block_size=32")
    )
    edit(
        config_json,
        lambda d: d.update(
            model_type="mistral", layer_types=["full_attention", "sliding_attention"]
        ),
    )
    hf.main(["import", str(tmp_path / "in"), some])
    assert "block_size 16: the sliding window of some layers" in capsys.readouterr().out
    assert checkpoint.read_meta(checkpoint.resolve(str(tmp_path / "some")))["model"]["window"] == 0
    hf.main(["import", str(exported / "classic"), f"--out={tmp_path / 'short'}", "--block_size=20"])
    short, whole = (
        checkpoint.load_model(str(path))[0]
        for path in (tmp_path / "short", exported / "classic_run")
    )
    idx = torch.randint(0, 257, (2, 20))
    assert short.wpe.weight.shape == (20, 32) and torch.equal(short(idx), whole(idx))
    assert "not within the model's 48" in refused(
        "import", exported / "classic", f"--out={tmp_path / 'long'}", "--block_size=49"
    )


def test_old_names_shards_and_other_dtypes(exported, tmp_path):
    """GPT-2 as the hub has it: no `transformer.`, the masks, the head twice; in two files; bfloat16; vocab.json and merges.txt."""
    shutil.copytree(exported / "classic", tmp_path / "in")
    tensors = {
        name.removeprefix("transformer."): t
        for name, t in load_file(tmp_path / "in" / "model.safetensors").items()
    }
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 48, 48).tril() for i in range(2)} | {
        "lm_head.weight": tensors["wte.weight"].clone()
    }
    os.remove(tmp_path / "in" / "model.safetensors")
    index = {
        name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(tensors)
    }
    for file in set(index.values()):
        save_file(
            {name: tensors[name].bfloat16() for name in tensors if index[name] == file},
            tmp_path / "in" / file,
        )
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    enc = tokenizer.train(["the loss of a model falls when it reads what people write"] * 3, 300)
    write_tokenizer(tmp_path / "in", enc)
    with open(tmp_path / "in" / "tokenizer.json", encoding="utf-8") as f:
        bpe = json.load(f)["model"]
    assert "vocab_size 257 is below the tokenizer's" in refused(
        "import", tmp_path / "in", f"--out={tmp_path / 'out'}"
    )
    os.remove(tmp_path / "in" / "tokenizer.json")
    (tmp_path / "in" / "vocab.json").write_text(
        json.dumps(
            {token: i for token, i in bpe["vocab"].items() if i < 256} | {tokenizer.EOT: 256}
        )
    )
    (tmp_path / "in" / "merges.txt").write_text("#version: 0.2\n")
    hf.main(["import", str(tmp_path / "in"), f"--out={tmp_path / 'out'}"])
    mine, its = (
        checkpoint.load_model(str(exported / "classic_run"))[0],
        checkpoint.load_model(str(tmp_path / "out"))[0],
    )
    for (name, a), b in zip(mine.named_parameters(), its.parameters()):
        assert torch.equal(
            a.bfloat16().float()[:257] if name == "wte.weight" else a.bfloat16().float(),
            b[:257] if name == "wte.weight" else b,
        )
    for change, message in (
        (
            lambda w: w.update(more="model-00001-of-00002.safetensors"),
            "names tensors that no file holds",
        ),
        (lambda w: w.update({"wpe.weight": "../x"}), "same folder"),
        (lambda w: w.update(dict.fromkeys(w, "y.safetensors")), "y.safetensors"),
        (lambda w: w.update({"ln_f.weight": index["ln_f.bias"]}), "not there by the index"),
    ):
        edit(
            tmp_path / "in" / "model.safetensors.index.json",
            lambda d: (d.update(weight_map=dict(index)), change(d["weight_map"])),
        )
        assert message in refused("import", tmp_path / "in", f"--out={tmp_path / 'other'}")


# -------------------------------------------------------------------------------------------------------------- tokenizers


def fuzzed(n):
    """Texts of words, other scripts, control characters, whole ranges of Unicode, white space of every kind, end-of-text's own spelling."""
    rng = random.Random(0)
    pieces = [
        "the",
        " loss",
        "It's",
        "we'LL",
        "'ve",
        "  ",
        "\n\n",
        "\t",
        " \n ",
        "\r\n",
        "naïve",
        "e\u0301",
        "日本語",
        "русский",
        "ß",
        "½",
        "٣",
        "१२",
        "123456",
        " 7",
        "🙂",
        "👩‍👩‍👧",
        "\u00a0",
        "\u2003",
        "\u3000",
        "\u200b",
        "\ufeff",
        "\u0085",
        "\u2028",
        "\x1c",
        "\x00",
        "\x7f",
        "<|endoftext|>",
        "<|",
        "!?...",
        "__init__",
        "ÄÖ",
        "ﬁ",
        "\U0001d54f",
        "\u0e33",
    ]
    texts = ["", " ", "\n"] + [
        "".join(rng.choice(pieces) for _ in range(rng.randint(1, 30))) for _ in range(n // 2)
    ]
    while len(texts) < n:
        text = "".join(
            chr(rng.choice([rng.randrange(0x250), rng.randrange(0x3000), rng.randrange(0x11000)]))
            for _ in range(rng.randint(1, 40))
        )
        texts.append("".join(c for c in text if not 0xD800 <= ord(c) < 0xE000))
    return texts


@pytest.mark.parametrize("kind", ["bytes", "trained", "gpt2"])
def test_tokenizer_out_and_in(kind, tmp_path, monkeypatch):
    """The same ids on 300 fuzzed texts, and the same tokenizer back."""
    from tokenizers import Tokenizer

    if kind == "gpt2":
        if not os.path.isdir(os.path.join(SHARED, "tiktoken_cache")):
            pytest.skip("GPT-2's vocabulary is not here")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", os.path.join(SHARED, "tiktoken_cache"))
    enc = (
        tokenizer.train(fuzzed(200) + [open("README.md", encoding="utf-8").read()], 700)
        if kind == "trained"
        else tokenizer.load(kind)
    )
    write_tokenizer(tmp_path, enc)
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = (
        True  # as tiktoken's encode_ordinary: end-of-text's spelling in a text is text
    )
    for text in fuzzed(300):
        ids = enc.encode_ordinary(text)
        assert theirs.encode(text).ids == ids and theirs.decode(ids) == text
    assert theirs.token_to_id(tokenizer.EOT) == enc.eot_token
    back, name = hf.read_tokenizer(tmp_path)
    assert (
        tokenizer.fingerprint(back) == tokenizer.fingerprint(enc)
        and back.eot_token == enc.eot_token
    )
    assert name == (kind if kind != "trained" else "tokenizer.tiktoken")
    if kind == "gpt2":  # without the vocabulary and a network it is converted

        def offline(name):
            raise SystemExit("no network")

        monkeypatch.setattr(tokenizer, "load", offline)
        back, name = hf.read_tokenizer(tmp_path)
        assert name == "tokenizer.tiktoken" and tokenizer.fingerprint(
            back
        ) == tokenizer.fingerprint(enc)


def with_config(folder, **settings):
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": tokenizer.EOT} | settings)
    )


OTHERS = {  # what makes of a byte-level BPE a tokenizer that tiktoken does not have
    "merges in another order": lambda d: d["model"]["merges"].reverse(),
    "digits": lambda d: d.update(
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, d["pre_tokenizer"]],
        }
    ),
    "a space before": lambda d: d["pre_tokenizer"].update(add_prefix_space=True),
    "normalised": lambda d: d.update(normalizer={"type": "NFC"}),
    "more special tokens": lambda d: d["added_tokens"].append(
        d["added_tokens"][0] | {"id": d["added_tokens"][0]["id"] + 1, "content": "<|im_start|>"}
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_tokenizers_are_taken_as_they_are(what, tmp_path):
    from tokenizers import Tokenizer

    trained = tokenizer.train(
        ["the loss of a model falls when it reads what people write"] * 3, 300
    )
    write_tokenizer(tmp_path, trained)
    edit(tmp_path / "tokenizer.json", OTHERS[what])
    with pytest.raises(SystemExit, match="tokenizer_config.json: No such file"):
        hf.read_tokenizer(tmp_path)
    with_config(tmp_path, eos_token="</s>")
    with pytest.raises(SystemExit, match="its eos_token '</s>' is none of its tokens"):
        hf.read_tokenizer(tmp_path)
    with_config(tmp_path, eos_token={"content": tokenizer.EOT})
    enc, name = hf.read_tokenizer(tmp_path)
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    assert (
        name == "tokenizer.json"
        and enc.eot_token == trained.eot_token
        and enc.n_vocab
        == theirs.get_vocab_size()
        == trained.n_vocab + (what == "more special tokens")
    )
    for text in fuzzed(60):
        assert enc.encode_ordinary(text) == theirs.encode(text).ids
        assert what == "normalised" or enc.decode(tokenizer.encode(enc, text, "within")) == text


def test_gpt2s_ways_in_two_pieces_are_tiktokens(tmp_path):
    enc = tokenizer.train(["the loss of a model falls when it reads what people write"] * 3, 300)
    write_tokenizer(tmp_path, enc)
    edit(
        tmp_path / "tokenizer.json",
        lambda d: d.update(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [
                    {
                        "type": "Split",
                        "pattern": {"Regex": tokenizer.PATTERN},
                        "behavior": "Isolated",
                        "invert": False,
                    },
                    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
                ],
            }
        ),
    )
    assert tokenizer.fingerprint(hf.read_tokenizer(tmp_path)[0]) == tokenizer.fingerprint(enc)
    with pytest.raises(SystemExit, match="is no merge of two tokens"):
        tokenizer.to_json(
            tokenizer.encoding("odd", {bytes([i]): i for i in range(256)} | {b"abc": 256}),
            str(tmp_path / "odd.json"),
        )


def test_a_trained_tokenizer_goes_along(tmp_path):
    enc = tokenizer.train(["the loss of a model falls when it reads what people write"] * 3, 300)
    make_run(
        str(tmp_path / "run"), dict(MODERN, vocab_size=enc.n_vocab), enc, "some/tokenizer.tiktoken"
    )
    hf.main(["export", str(tmp_path / "run"), f"--out={tmp_path / 'out'}"])
    hf.main(["import", str(tmp_path / "out"), f"--out={tmp_path / 'back'}"])
    _, back, meta = checkpoint.load_model(str(tmp_path / "back"))
    assert meta["tokenizer"] == "tokenizer.tiktoken" and tokenizer.fingerprint(
        back
    ) == tokenizer.fingerprint(enc)


def test_an_import_is_a_run(exported, tiny_data, tmp_path, capsys):
    """As init and teacher of a round of self-play, for sample.py and for eval.py."""
    import eval
    import sample
    import train

    hf.main(
        [
            "import",
            str(exported / "modern"),
            f"--out={tmp_path / 'in'}",
            "--template=Q: {prompt}\nA: ",
        ]
    )
    train.main(
        [
            "--stage=spin",
            f"--out_dir={tmp_path / 'spin'}",
            f"--data={tiny_data}",
            f"--init={tmp_path / 'in'}",
            f"--teacher={tmp_path / 'in'}",
            "--players=data,teacher,self",
            "--max_rows=8",
            "--batch_size=4",
            "--max_steps=1",
            "--max_response=8",
            "--max_prompt=24",
            "--eval_rows=4",
            "--device=cpu",
            "--template=Q: {prompt}\nA: ",
        ]
    )
    capsys.readouterr()
    sample.main([str(tmp_path / "in"), "--prompt=why?", "--max_new_tokens=4"])
    eval.main(
        [f"in={tmp_path / 'in'}", f"spin={tmp_path / 'spin'}", f"--data={tiny_data}", "--rows=4"]
    )
    assert "val_loss" in capsys.readouterr().out
