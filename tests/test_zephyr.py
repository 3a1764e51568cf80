"""SPIN's recipe at 7B, end to end at toy size: a sharded bfloat16 Mistral with its kind of tokenizer comes in, plays four rounds on two
processes by config/spin_zephyr_7b.py, and goes out."""

import json
import math
import os

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nanospin import checkpoint
from nanospin import config
from tools import hf
import sample
from data.rows import read_rows
from data import tokenizer
from data.template import prompt_ids
from tests.conftest import read_metrics
from tests.test_parallel import torchrun
from tests.tokenizers_like import sentencepiece


def random_mistral(folder):
    """config.json, two files of bfloat16, their index, a tokenizer, zephyr's chat template."""
    sentencepiece(folder)
    shape = {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": tokenizer.load(os.path.join(folder, "tokenizer.json")).n_vocab,
        "max_position_embeddings": 256,
        "sliding_window": 24,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    block = {
        "input_layernorm": (32,),
        "post_attention_layernorm": (32,),
        "self_attn.q_proj": (32, 32),
        "self_attn.k_proj": (16, 32),
        "self_attn.v_proj": (16, 32),
        "self_attn.o_proj": (32, 32),
        "mlp.gate_proj": (48, 32),
        "mlp.up_proj": (48, 32),
        "mlp.down_proj": (32, 48),
    }
    shapes = {
        f"model.layers.{i}.{name}.weight": size for i in range(2) for name, size in block.items()
    }
    shapes |= {
        "model.embed_tokens.weight": (shape["vocab_size"], 32),
        "model.norm.weight": (32,),
        "lm_head.weight": (shape["vocab_size"], 32),
    }
    torch.manual_seed(0)
    tensors = {
        name: (torch.ones(size) if len(size) == 1 else 0.1 * torch.randn(size)).bfloat16()
        for name, size in shapes.items()
    }
    index = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(index.values()):
        save_file(
            {name: tensors[name] for name in tensors if index[name] == file},
            os.path.join(folder, file),
        )
    for name, value in (
        ("config.json", shape),
        ("model.safetensors.index.json", {"weight_map": index}),
    ):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
            json.dump(value, f)
    return tensors


def test_the_recipe_on_two_processes(tiny_data, tmp_path, capsys):
    theirs = random_mistral(str(tmp_path / "theirs"))
    hf.main(["import", str(tmp_path / "theirs"), f"--out={tmp_path / 'base'}"])
    said = capsys.readouterr().out
    assert (
        "block_size 256" in said
        and checkpoint.load_model(str(tmp_path / "base"))[0].config.sliding_window == 24
        and r"<|user|>\n{prompt}</s>\n<|assistant|>\n{response}" in said
    )
    run = str(tmp_path / "spin")
    toy = [
        "--max_rows=8",
        "--max_prompt=40",
        "--max_response=16",
        "--batch_size=4",
        "--micro_batch_tokens=0",
        "--gen_batch_size=4",
        "--eval_rows=4",
        "--eval_interval=100",
        "--device=cpu",
    ]
    torchrun(
        [
            "config/spin_zephyr_7b.py",
            f"--init={tmp_path / 'base'}",
            f"--data={tiny_data}",
            f"--out_dir={run}",
            *toy,
        ]
    )
    recipe, starts, steps = (
        config.load(["config/spin_zephyr_7b.py"]),
        read_metrics(run, "start"),
        read_metrics(run, "step"),
    )
    assert [s["round"] for s in starts] == [0, 1, 2, 3] and all(
        abs(s["loss"] - math.log(2)) < 0.05 for s in starts
    )  # of bfloat16 products
    assert [len([s for s in steps if s["round"] == r]) for r in range(4)] == [
        4,
        8,
        8,
        8,
    ]  # two epochs over 8 rows, then over 16
    assert [max(s["lr"] for s in steps if s["round"] == r) <= recipe.lr[r] for r in range(4)] == [
        True
    ] * 4
    enc, meta = checkpoint.load_model(run)[1:]
    assert (
        meta["config"]["template"] == recipe.template
        and prompt_ids(enc, recipe.template, "why?")[0] == 1 == enc.specials["<s>"]
    )
    assert all(
        row["ids"][1] is None or 1 <= len(row["ids"][1]) <= 16
        for row in read_rows(f"{run}/round_0/train.jsonl")
    )
    hf.main(["export", f"{run}/round_3", f"--out={tmp_path / 'out'}"])
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as f:
        assert set(f.keys()) == set(theirs) and all(
            f.get_slice(name).get_shape() == list(t.shape) for name, t in theirs.items()
        )
    moved = load_file(tmp_path / "out" / "model.safetensors")
    assert any(not torch.equal(moved[name], t.float()) for name, t in theirs.items())
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        tmp_path / "theirs" / "tokenizer.json"
    ).read_bytes()
    hf.main(["import", str(tmp_path / "out"), f"--out={tmp_path / 'back'}"])
    capsys.readouterr()
    for each in (run, str(tmp_path / "back")):
        sample.main([each, "--prompt=why?", "--temperature=0", "--max_new_tokens=8"])
    one, two = capsys.readouterr().out.splitlines()[-2:]
    assert one == two
