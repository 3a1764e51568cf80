"""LoRA against peft: the same logits and gradients, and adapters in both directions.

Skipped where peft is not installed; `make test-peers` installs it.
"""

import pytest
import torch
import torch.nn.functional as F

import train
from model import GPT
from nanospin import lora
from tests.conftest import TEMPLATE, make_data
from tests.peers.test_hf_peers import HF_CONFIGS, make_batch, make_hf_model, relative_error
from tools import adapter, hf

peft = pytest.importorskip("peft", reason="peft is not installed; make test-peers installs it")

TOLERANCE = 1e-5
NAMES = ["gpt2", "llama, grouped", "mistral", "qwen2, tied", "qwen3", "phi3, partial", "olmo2"]
NAMES += ["gpt_neox", "smollm3", "gemma2", "gemma3_text"]
TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


FUSED = ("gpt2", "phi3", "gpt_neox")  # several of our adapters are one of peft


def family(name):
    model_type = name.partition(",")[0]
    return model_type if model_type in TARGETS else "llama"


@pytest.fixture(params=NAMES)
def base(request, tmp_path):
    """(name, model of transformers, run with the same weights)."""
    theirs = make_hf_model(tmp_path / "theirs", HF_CONFIGS[request.param])
    hf.main(["import", str(tmp_path / "theirs"), f"--out={tmp_path / 'base'}"])
    return request.param, theirs, tmp_path / "base"


def add_peft(name, theirs, **options):
    """A model of peft with random A and B."""
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=TARGETS[family(name)],
        task_type="CAUSAL_LM",
        fan_in_fan_out=family(name) == "gpt2",
        **options,
    )
    model = peft.get_peft_model(theirs, settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if "lora_" in parameter_name:
                p.copy_(0.1 * torch.randn_like(p))  # larger ones make the logits chaotic
    return model.eval()


def test_a_trained_adapter_in_peft(base, tmp_path):
    name, theirs, run = base
    data = make_data(str(tmp_path / "data"))
    train.main(
        [
            "--stage=sft",
            f"--init={run}",
            f"--data={data}",
            f"--out_dir={tmp_path / 'tuned'}",
            f"--template={TEMPLATE}",
            "--lora_rank=4",
            "--lora_alpha=12",
            "--lr=0.03",
            "--max_steps=8",
            "--max_prompt=16",
            "--max_response=16",
            "--device=cpu",
        ]
    )
    adapter.main(["export", str(tmp_path / "tuned"), f"--out={tmp_path / 'adapter'}"])
    ours, _, _ = GPT.from_checkpoint(str(tmp_path / "tuned"))
    idx, _ = make_batch(ours)
    with torch.no_grad():
        before = relative_error(ours(idx), theirs(idx).logits[..., :257])
        tuned = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
        error = relative_error(ours(idx), tuned(idx).logits[..., :257])
    print(name, f"base {before:.1e}, with the adapter {error:.1e}")
    assert before > 0.01 and error < TOLERANCE
    assert len(tuned.peft_config["default"].target_modules) == len(TARGETS[family(name)]) + (
        family(name) == "gpt2"  # attn.c_proj and mlp.c_proj
    )

    adapter.main(
        ["import", str(tmp_path / "adapter"), f"--base={run}", f"--out={tmp_path / 'back'}"]
    )
    back, _, _ = GPT.from_checkpoint(str(tmp_path / "back"))
    with torch.no_grad():
        assert relative_error(back(idx), ours(idx)) < TOLERANCE


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"layers_to_transform": [1]}])
def test_an_adapter_of_peft_here(base, options, tmp_path):
    name, theirs, run = base
    model = add_peft(name, theirs, **options)
    model.save_pretrained(tmp_path / "adapter")
    adapter.main(
        ["import", str(tmp_path / "adapter"), f"--base={run}", f"--out={tmp_path / 'merged'}"]
    )
    ours, _, meta = GPT.from_checkpoint(str(tmp_path / "merged"))
    assert meta["config"]["template"]
    idx, _ = make_batch(ours)
    with torch.no_grad():
        logits = model(idx).logits[..., :257]
        assert relative_error(ours(idx), logits) < TOLERANCE
        with model.disable_adapter():
            assert relative_error(model(idx).logits[..., :257], logits) > 0.01


def test_gradients(base):
    """Of A and B of every part; a fused matrix is one adapter in peft, so not there."""
    name, theirs, run = base
    if family(name) in FUSED:
        pytest.skip("peft has one adapter for queries, keys and values")
    model = add_peft(name, theirs)
    ours, _, _ = GPT.from_checkpoint(str(run))
    lora.add(ours, 4, 12.0, ["c_attn", "c_proj", "c_fc"])
    their_params = dict(model.named_parameters())
    _, mapped = adapter.hf_tensors(ours)

    def theirs_of(layer, kind):
        return [
            their_params[f"base_model.model.{hf_name[:-7]}.lora_{kind}.default.weight"]
            for hf_name in mapped[f"{layer}.weight"].shapes
        ]

    adapted = {}
    for parameter_name, p in ours.named_parameters():
        if lora.is_adapter(parameter_name):
            layer, _, kind = parameter_name.rpartition(".lora_")
            adapted[parameter_name] = p, theirs_of(layer, kind)
            p.data = torch.cat(theirs_of(layer, kind)).detach().clone()
    idx, targets = make_batch(ours)
    logits = model(idx).logits[..., :257]
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    (-ours(idx, targets).mean()).backward()
    for parameter_name, (p, their_parts) in adapted.items():
        expected = torch.cat([part.grad for part in their_parts])
        assert relative_error(p.grad, expected) < TOLERANCE, parameter_name


@pytest.mark.parametrize(
    "options, message",
    [
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = ['lm_head'] is not supported"),
        ({"alpha_pattern": {"up_proj": 3}}, "alpha_pattern = {'up_proj': 3} is not supported"),
    ],
)
def test_what_is_refused(options, message, tmp_path):
    theirs = make_hf_model(tmp_path / "theirs", HF_CONFIGS["llama, untied"])
    hf.main(["import", str(tmp_path / "theirs"), f"--out={tmp_path / 'base'}"])
    add_peft("llama", theirs, **options).save_pretrained(tmp_path / "adapter")
    with pytest.raises(SystemExit) as e:
        adapter.main(
            [
                "import",
                str(tmp_path / "adapter"),
                f"--base={tmp_path / 'base'}",
                f"--out={tmp_path / 'merged'}",
            ]
        )
    assert message in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "merged").exists()
