"""SPIN's recipe at 7B, config/spin_zephyr_7b.py, at toy size from import to export.

A sharded bfloat16 Mistral with its kind of tokenizer is imported, plays four rounds on two
processes, and is exported.
"""

import json
import math
import os

import torch
from safetensors.torch import load_file

import sample
from data import tokenizer
from data.rows import read_rows
from data.template import prompt_ids
from model import GPT, GPTConfig
from nanospin import config
from tests.conftest import read_metrics
from tests.test_distributed import torchrun
from tests.test_hf import save_shards
from tests.tokenizers_like import sentencepiece
from tools import hf


def make_mistral(folder):
    """Write config.json, two bfloat16 files and their index, a tokenizer with zephyr's template."""
    sentencepiece(folder)
    vocab_size = tokenizer.load(os.path.join(folder, "tokenizer.json")).n_vocab
    settings = {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocab_size,
        "max_position_embeddings": 256,
        "sliding_window": 24,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as f:
        json.dump(settings, f)

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
    shapes = {}
    for i in range(2):
        for name, shape in block.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
    shapes["model.embed_tokens.weight"] = (vocab_size, 32)
    shapes["model.norm.weight"] = (32,)
    shapes["lm_head.weight"] = (vocab_size, 32)

    torch.manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        is_norm = len(shape) == 1
        tensor = torch.ones(shape) if is_norm else 0.1 * torch.randn(shape)
        tensors[name] = tensor.bfloat16()
    save_shards(folder, tensors)
    return tensors


def test_the_recipe_on_two_processes(tiny_data, tmp_path, capsys):
    theirs, base = tmp_path / "theirs", tmp_path / "base"
    run, exported, back = str(tmp_path / "spin"), tmp_path / "export", tmp_path / "back"
    tensors = make_mistral(str(theirs))
    hf.main(["import", str(theirs), f"--out={base}"])
    output = capsys.readouterr().out
    assert "block_size 256" in output
    assert r"<|user|>\n{prompt}</s>\n<|assistant|>\n{response}" in output
    model, _, _ = GPT.from_checkpoint(str(base))
    assert model.config.sliding_window == 24

    torchrun(
        [
            "config/spin_zephyr_7b.py",
            f"--init={base}",
            f"--data={tiny_data}",
            f"--out_dir={run}",
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
    )
    starts = read_metrics(run, "start")
    assert [record["round"] for record in starts] == [0, 1, 2, 3]
    for record in starts:
        assert abs(record["loss"] - math.log(2)) < 0.05  # bfloat16 matrix products

    recipe = config.load(["config/spin_zephyr_7b.py"], GPTConfig)
    steps = read_metrics(run, "step")
    for round_id in range(4):
        rates = [record["lr"] for record in steps if record["round"] == round_id]
        num_rows = 8 if round_id == 0 else 16  # replay_rounds = 1
        assert len(rates) == 2 * num_rows / 4  # two epochs of batches of 4
        assert max(rates) <= recipe.lr[round_id]

    _, enc, meta = GPT.from_checkpoint(run)
    assert meta["config"]["template"] == recipe.template
    assert prompt_ids(enc, recipe.template, "why?")[0] == enc.specials["<s>"] == 1
    for row in read_rows(f"{run}/round_0/train.jsonl"):
        sampled = row["ids"][1]
        assert sampled is None or 1 <= len(sampled) <= 16

    hf.main(["export", f"{run}/round_3", f"--out={exported}"])
    trained = load_file(exported / "model.safetensors")
    assert set(trained) == set(tensors)
    for name, tensor in tensors.items():
        assert trained[name].shape == tensor.shape
    assert any(not torch.equal(trained[name], t.float()) for name, t in tensors.items())
    tokenizer_json = (theirs / "tokenizer.json").read_bytes()
    assert (exported / "tokenizer.json").read_bytes() == tokenizer_json

    hf.main(["import", str(exported), f"--out={back}"])
    answers = []
    for checkpoint_dir in (run, back):
        capsys.readouterr()
        sample.main([str(checkpoint_dir), "--prompt=why?", "--temperature=0", "--max_new_tokens=8"])
        answers.append(capsys.readouterr().out.splitlines()[-1])
    assert answers[0] == answers[1]
