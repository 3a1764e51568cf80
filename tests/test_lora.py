"""LoRA: gradients, frozen weights, every stage, resuming, two ranks, merging, PEFT's files."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
from conftest import (
    TEMPLATE,
    Killed,
    assert_same_run,
    final_weights,
    killing,
    read_metrics,
    refused,
    spin_args,
)
from safetensors.torch import load_file, save_file
from test_distributed import assert_equal_up_to_rounding, torchrun

import sample
import train
from model import GPT, GPTConfig
from nanospin import checkpoint, distributed, lora
from nanospin.config import Config
from nanospin.optim import make_optimizers
from sample import generate
from tools import adapter, hf, rebuild

TARGETS = ["c_attn", "c_proj", "c_fc"]
MODERN = {
    "position": "rotary",
    "norm": "rmsnorm",
    "mlp": "swiglu",
    "bias": False,
    "n_kv_head": 1,
    "tie_embeddings": False,
}
LORA = ["--lora_rank=4", "--lora_alpha=8", "--lr=0.01"]


def make_model(dtype=torch.float32, **fields):
    """A GPT with adapters of rank 3 that are not 0."""
    sizes = {"vocab_size": 64, "block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 16}
    model = GPT(GPTConfig(**sizes | fields)).to(dtype)
    lora.add(model, 3, 6.0, TARGETS, dtype)
    lora.init_weights(model, 1)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


def make_batch():
    tokens = torch.randint(0, 64, (3, 21), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]


def merged_copy(model):
    """The model of the merged weights, without adapters."""
    plain = GPT(model.config).to(model.wte.weight.dtype)
    plain.load_state_dict(dict(lora.merged_weights(model)))
    return plain


# --------------------------------------------------------------------------------- one layer


@pytest.mark.parametrize("fields", [{}, MODERN], ids=["classic", "modern"])
def test_gradients_by_hand(fields):
    """With G = dL/dW of the merged matrix, for each part: dL/dB = s G A', dL/dA = s B' G."""
    model = make_model(torch.float64, **fields)
    plain = merged_copy(model)
    idx, targets = make_batch()
    for each in (model, plain):
        (-each(idx, targets).double().mean()).backward()
    of_plain = dict(plain.named_parameters())
    num_parts = []
    for name, module in model.named_modules():
        if not isinstance(module, lora.LoRALinear):
            continue
        assert module.scale == 6.0 / 3
        grads = of_plain[f"{name}.weight"].grad.split(module.rows)
        A, B = module.lora_A.detach().split(3), module.lora_B.detach().split(module.rows)
        grad_A = torch.cat([2.0 * b.T @ g for b, g in zip(B, grads)])
        grad_B = torch.cat([2.0 * g @ a.T for a, g in zip(A, grads)])
        torch.testing.assert_close(module.lora_A.grad, grad_A, rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(module.lora_B.grad, grad_B, rtol=1e-9, atol=1e-15)
        num_parts.append(len(A))
    assert num_parts == [3, 1, 2 if fields else 1, 1] * 2
    for name, p in model.named_parameters():
        assert (p.grad is None) == (not lora.is_adapter(name)), name


@pytest.mark.parametrize("fields", [{}, MODERN], ids=["classic", "modern"])
def test_merged_equals_unmerged(fields):
    model = make_model(torch.float64, **fields)
    idx, targets = make_batch()
    with torch.no_grad():
        found = model(idx, targets)
        expected = merged_copy(model)(idx, targets)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # logps are rounded to 32
        with lora.disabled(model):
            base = model(idx, targets)
        assert (base - found).abs().max() > 0.01
        assert torch.equal(model(idx, targets), found)


def test_a_new_adapter_changes_nothing():
    """B is 0, and A is drawn as PEFT draws it, each from its own name."""
    plain = GPT(GPTConfig(vocab_size=64, block_size=32, n_layer=2, n_head=2, n_embd=16))
    idx, targets = make_batch()
    expected = plain(idx, targets)
    lora.add(plain, 4, 32.0, TARGETS)
    lora.init_weights(plain, 1)
    assert torch.equal(plain(idx, targets), expected)
    drawn = {}
    for name, p in plain.named_parameters():
        if name.endswith("lora_A"):
            drawn[name] = p
            bound = p.shape[1] ** -0.5
            assert p.abs().max() <= bound and p.abs().max() > 0.9 * bound
            assert abs(p.std() - bound / 3**0.5) < 0.2 * bound
    assert len({p[0, 0].item() for p in drawn.values()}) == len(drawn) == 8


@pytest.mark.parametrize("target, names", [("c_proj", 2), ("mlp.c_proj", 1), ("c_attn", 1)])
def test_targets(target, names):
    model = GPT(GPTConfig(vocab_size=64, block_size=32, n_layer=2, n_head=2, n_embd=16))
    lora.add(model, 4, 32.0, [target])
    adapted = [n for n, m in model.named_modules() if isinstance(m, lora.LoRALinear)]
    assert len(adapted) == 2 * names and all(n.endswith(target) for n in adapted)


@pytest.mark.parametrize(
    "fields", [{}, MODERN, {"mlp": "relu2"}], ids=["classic", "modern", "relu2"]
)
def test_sampling(fields):
    """The merged copy has plain linear layers; it samples what the unmerged model samples, which
    must not be prepacked without its adapters."""
    model = make_model(**fields)
    policy = distributed.gather_full_model(model, torch.float32)
    assert not lora.is_added(policy) and lora.is_added(model)
    assert policy.wte.weight.data_ptr() == model.wte.weight.data_ptr()
    prompts = [[1, 2, 3], [4, 5], [6]]
    samples = []
    for each in (policy, model):
        generator = torch.Generator().manual_seed(3)
        samples.append(generate(each, prompts, 12, temperature=1.0, generator=generator))
    assert samples[0] == samples[1]
    with lora.disabled(model):
        generator = torch.Generator().manual_seed(3)
        assert generate(model, prompts, 12, temperature=1.0, generator=generator) != samples[0]


def test_bfloat16_base():
    """The frozen matrices are stored in bfloat16, norms and adapters in float32."""
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=64, block_size=32, n_layer=2, n_head=2, n_embd=16))
    lora.add(model, 4, 32.0, TARGETS, torch.bfloat16)
    for name, p in model.named_parameters():
        is_small = lora.is_adapter(name) or p.dim() == 1
        assert p.dtype == (torch.float32 if is_small else torch.bfloat16), name


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop", "muon"])
def test_the_optimizers_have_the_adapters_only(optimizer):
    model = make_model()
    cfg = Config(optimizer=optimizer)
    count = 0
    for each in make_optimizers(model, cfg, 1e-3, torch.device("cpu")):
        for group in each.param_groups:
            count += sum(p.numel() for p in group["params"])
    of_block = 3 * (3 * 16 + 3 * 16 + 16 + 16 + 16 + 64 + 64 + 16)  # A and B of four layers
    assert count == 2 * of_block


def test_flops_of_a_frozen_base():
    """Two thirds of those of the weights, and all of attention's."""
    model = make_model()

    class Micro:
        num_tokens, pos, idx = 40, None, torch.zeros(2, 20)

    every = train.step_flops(model, [(None, Micro)], 40, 40)
    frozen = train.step_flops(model, [(None, Micro)], 40, 40, is_frozen=True)
    attention = 12 * 2 * 2 * 8 * 20 * 40
    assert frozen == pytest.approx((every - attention) * 2 / 3 + attention)


# ------------------------------------------------------------------------------- wrong settings


@pytest.mark.parametrize(
    "args, message",
    [
        (["--lora_targets=c_atn"], "lora_targets c_atn fit no linear layer; there are attn.c_attn"),
        (["--lora_targets=c_attn,lm_head"], "lora_targets lm_head fit no linear layer"),
        (["--lora_targets=[]"], "lora_targets must not be empty"),
        (["--lora_rank=64"], "lora_rank 64 exceeds 32, a side of h.0.attn.c_attn"),
        (["--lora_rank=-1"], "lora_rank must not be negative"),
        (["--lora_alpha=0"], "lora_alpha must be above 0"),
        (["--lora_r=2"], "here it is 'lora_rank'"),
    ],
)
def test_wrong_settings(tiny_runs, tiny_data, tmp_path, args, message):
    assert message in refused(sft_args(tiny_runs, tiny_data, tmp_path / "r", *args))


def test_lora_needs_a_base():
    assert "lora_rank needs init" in refused(["--stage=sft", "--lora_rank=4"])


# ---------------------------------------------------------------------------------------- runs


def sft_args(runs, data, out, *more):
    return [
        "--stage=sft",
        f"--out_dir={out}",
        f"--data={data}",
        f"--init={runs['sft']}",
        f"--template={TEMPLATE}",
        "--max_steps=6",
        "--batch_size=8",
        "--max_response=16",
        "--device=cpu",
        "--eval_rows=8",
        "--save_interval=2",
        *LORA,
        *more,
    ]


def stage_args(stage, runs, data, out):
    args = sft_args(runs, data, out, f"--stage={stage}")
    if stage == "pretrain":
        args += ["--eval_batches=2"]
    if stage in ("spin", "preference"):
        args += ["--beta=0.5"]
    if stage == "spin":
        args += ["--rounds=2", "--max_rows=16", "--max_steps=3"]
    if stage == "ppo":
        args += ["--rounds=2", "--max_rows=16", "--max_steps=3", "--reward=conftest:letters"]
        args += ["--eval_interval=1"]
    return args


def has_learnt(run):
    """A little: this base is hardly trained, and its head is frozen."""
    evaluations = read_metrics(run, "eval")
    return evaluations[-1]["val_loss"] < evaluations[0]["val_loss"] - 0.002


def adapter_of(run):
    return load_file(os.path.join(checkpoint.latest(run), "adapter.safetensors"))


def assert_only_the_adapter_has_changed(run, base):
    """Every matrix is that of the base plus (alpha / r) B A, and the rest is the base's."""
    merged, start, trained = final_weights(run), final_weights(base), adapter_of(run)
    config = checkpoint.read_meta(checkpoint.latest(run))["config"]
    scale = config["lora_alpha"] / config["lora_rank"]
    rank = config["lora_rank"]
    num_adapted = 0
    for name, weight in start.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A" in trained:
            A, B = trained[f"{layer}.lora_A"], trained[f"{layer}.lora_B"]
            num_adapted += 1
            assert B.any(), name
            n = len(A) // rank
            rows = [len(B)] if n == 1 else [len(B) // n] * n  # as many heads of each kind
            parts = [b @ a for a, b in zip(A.split(rank), B.split(rows))]
            weight = weight + scale * torch.cat(parts)
            torch.testing.assert_close(merged[name], weight, rtol=0, atol=1e-7)
        else:
            assert torch.equal(merged[name], weight), name
    assert num_adapted == 8
    assert set(merged) - set(start) <= {"scalar_head.weight"}


@pytest.mark.parametrize("stage", ["pretrain", "sft", "preference", "spin", "reward", "ppo"])
def test_every_stage(tiny_runs, tiny_data, tmp_path, monkeypatch, capsys, stage):
    """Killed in the last round and resumed, a run equals the undisturbed one bit for bit. Each
    round starts at its known loss. In memory the frozen weights are never written to."""
    built = []
    build_model = train.build_model

    def recording(*args, **options):
        built.append(build_model(*args, **options))
        return built[-1]

    monkeypatch.setattr(train, "build_model", recording)
    whole, killed = f"{tmp_path}/whole", f"{tmp_path}/killed"
    train.main(stage_args(stage, tiny_runs, tiny_data, whole))
    assert "M of them trained" in capsys.readouterr().out
    assert_only_the_adapter_has_changed(whole, tiny_runs["sft"])
    start = final_weights(tiny_runs["sft"])
    for name, p in built[0].named_parameters():
        trained = lora.is_adapter(name) or name == "scalar_head.weight"
        assert p.requires_grad == trained, name
        assert trained or torch.equal(p, start[name]), name
    for record in read_metrics(whole, "start"):
        assert record["off"] < 1e-5

    with monkeypatch.context() as m:
        m.setattr(train, "backward", killing(train.backward, 5))
        with pytest.raises(Killed):
            train.main(stage_args(stage, tiny_runs, tiny_data, killed))
    assert checkpoint.latest(killed)
    train.main(stage_args(stage, tiny_runs, tiny_data, killed))
    assert_same_run(whole, killed)
    one, two = adapter_of(whole), adapter_of(killed)
    assert one.keys() == two.keys()
    assert ("scalar_head.weight" in one) == (stage in ("reward", "ppo"))
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_the_reference_of_ppo_is_the_base(tiny_runs, tiny_data, tmp_path, monkeypatch):
    """Without a second model in memory, and with the same numbers."""
    train.main(stage_args("ppo", tiny_runs, tiny_data, f"{tmp_path}/a"))
    disabled = lora.disabled

    def from_file(model):
        if lora.is_added(model):
            base, _, _ = GPT.from_checkpoint(tiny_runs["sft"])
            for name, p in base.named_parameters():
                assert torch.equal(p, model.get_parameter(name))
        return disabled(model)

    monkeypatch.setattr(lora, "disabled", from_file)
    first = read_metrics(f"{tmp_path}/a", "eval")[0]
    assert first["kl"] == 0
    assert read_metrics(f"{tmp_path}/a", "eval")[-1]["kl"] != 0
    train.main(stage_args("ppo", tiny_runs, tiny_data, f"{tmp_path}/b"))
    assert_same_run(f"{tmp_path}/a", f"{tmp_path}/b")


def test_without_lora_nothing_is_added(tiny_runs):
    path = checkpoint.latest(tiny_runs["sft"])
    assert not os.path.exists(f"{path}/adapter.safetensors")
    model, _, _ = GPT.from_checkpoint(path)
    assert not lora.is_added(model)
    assert distributed.gather_full_model(model, torch.float32) is model
    assert Config().lora_rank == 0


def test_activation_checkpointing(tiny_runs, tiny_data, tmp_path):
    for name, every in (("a", 0), ("b", 1)):
        more = [f"--activation_checkpointing={every}"]
        train.main(sft_args(tiny_runs, tiny_data, tmp_path / name, *more))
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_muon(tiny_runs, tiny_data, tmp_path):
    train.main(sft_args(tiny_runs, tiny_data, tmp_path / "r", "--optimizer=muon"))
    assert has_learnt(tmp_path / "r")
    assert_only_the_adapter_has_changed(tmp_path / "r", tiny_runs["sft"])


def test_bfloat16_resumes_bit_for_bit(tiny_runs, tiny_data, tmp_path, monkeypatch):
    whole, killed = f"{tmp_path}/whole", f"{tmp_path}/killed"
    args = sft_args(tiny_runs, tiny_data, whole, "--dtype=bfloat16")
    train.main(args)
    assert has_learnt(whole)
    again = sft_args(tiny_runs, tiny_data, killed, "--dtype=bfloat16")
    with monkeypatch.context() as m:
        m.setattr(train, "backward", killing(train.backward, 3))
        with pytest.raises(Killed):
            train.main(again)
    train.main(again)
    assert_same_run(whole, killed)


def test_a_base_that_has_changed_is_refused(tiny_runs, tiny_data, tmp_path, monkeypatch):
    """A run resumes from its base and its adapter: another base would be another model."""
    train.main(sft_args(tiny_runs, tiny_data, f"{tmp_path}/base", "--lora_rank=0"))
    args = sft_args(tiny_runs, tiny_data, f"{tmp_path}/r", f"--init={tmp_path}/base")
    with monkeypatch.context() as m:
        m.setattr(train, "backward", killing(train.backward, 3))
        with pytest.raises(Killed):
            train.main(args)
    path = checkpoint.latest(f"{tmp_path}/base")
    os.rename(path, f"{tmp_path}/elsewhere")
    other = checkpoint.latest(f"{tmp_path}/base")
    os.rename(other, path)  # other weights under the same name
    assert "was begun with players_sha256 = {'init': " in refused(args)


def test_a_damaged_adapter_is_refused(tiny_runs, tiny_data, tmp_path):
    out = f"{tmp_path}/r"
    train.main(sft_args(tiny_runs, tiny_data, out))
    path = checkpoint.latest(out)
    tensors = adapter_of(out)
    name = next(iter(tensors))
    model = make_model()
    with pytest.raises(SystemExit, match="adapter.safetensors has no h.0.attn.c_attn.lora_A"):
        checkpoint.load_adapter(path, model)
    with open(f"{path}/adapter.safetensors", "r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"\x7f")
    assert "adapter.safetensors" in checkpoint.find_corruption(path)
    tensors[name] = tensors[name] + 1
    save_file(tensors, f"{path}/adapter.safetensors")
    assert "adapter.safetensors" in checkpoint.find_corruption(path)


def test_a_save_compares_the_adapter(tiny_runs, tiny_data, tmp_path, monkeypatch):
    original = checkpoint.write_adapter

    def spoiling(folder, tensors):
        name = next(iter(tensors))
        original(folder, tensors | {name: tensors[name] + 1e-6})

    monkeypatch.setattr(checkpoint, "write_adapter", spoiling)
    args = sft_args(tiny_runs, tiny_data, tmp_path / "r")
    assert "was not written as it is" in refused(args)


def test_later_stages_read_the_merged_checkpoint(tiny_runs, tiny_data, tmp_path, capsys):
    first, second = f"{tmp_path}/first", f"{tmp_path}/second"
    train.main(sft_args(tiny_runs, tiny_data, first))
    train.main(sft_args(tiny_runs, tiny_data, second, f"--init={first}", "--lora_rank=2"))
    start, end = read_metrics(second, "eval")[0], read_metrics(first, "eval")[-1]
    assert abs(start["val_loss"] - end["val_loss"]) < 1e-5
    sample.main([first, "--prompt=why?", "--temperature=0", "--max_new_tokens=4"])


def test_rebuild(tiny_runs, tiny_data, tmp_path, capsys):
    """The second round's reference is the unmerged adapter of the first round's end. Its base may
    have moved, and no other is taken for it."""
    run = f"{tmp_path}/r"
    init = str(shutil.copytree(tiny_runs["sft"], tmp_path / "init"))
    train.main(
        spin_args(tiny_runs, tiny_data, run, f"--init={init}", "--rounds=2", "--max_steps=3", *LORA)
    )
    for round_id in (0, 1):
        rebuild.main([f"{run}/round_{round_id}", f"--out={tmp_path}/again_{round_id}"])
        assert "identical, bit for bit" in capsys.readouterr().out

    os.rename(init, f"{tmp_path}/moved")
    again = [f"{run}/round_1", f"--out={tmp_path}/moved_1"]
    rebuild.main([*again, f"--base={tmp_path}/moved"])
    assert "identical, bit for bit" in capsys.readouterr().out
    again = [f"{run}/round_1", f"--out={tmp_path}/other_1"]
    with pytest.raises(SystemExit, match="is not the base that the round was made from"):
        rebuild.main([*again, f"--base={tiny_runs['pretrain']}"])


# ------------------------------------------------------------------------------------ two ranks


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.02)])
def test_two_ranks(tiny_runs, tiny_data, tmp_path, dtype, tolerance):
    """Sampling from the merged copy, reference, training, saving the merged shards."""

    def args(out):
        more = ["--rounds=2", "--max_steps=3", "--max_rows=16", f"--dtype={dtype}", *LORA]
        more += ["--activation_checkpointing=1", "--temperature=0.001"]
        more += [f"--sample_sharded={dtype == 'bfloat16'}"]
        return spin_args(tiny_runs, tiny_data, f"{tmp_path}/{out}", *more)

    train.main(args("one"))
    torchrun(args("two"))
    if dtype == "bfloat16":  # sampled tokens may differ: only what FSDP2 makes of mixed dtypes
        for record in read_metrics(f"{tmp_path}/two", "start"):
            assert record["off"] < 1e-6
        return
    assert_equal_up_to_rounding(tmp_path / "one", tmp_path / "two", tolerance)
    one, two = adapter_of(f"{tmp_path}/one"), adapter_of(f"{tmp_path}/two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=tolerance)
    assert_only_the_adapter_has_changed(f"{tmp_path}/two", tiny_runs["sft"])


# ------------------------------------------------------------------------------- PEFT's format


@pytest.fixture(scope="module")
def tuned(tiny_runs, tiny_data, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("tuned") / "r")
    train.main(sft_args(tiny_runs, tiny_data, out, "--max_steps=3"))
    return out


def test_adapters_there_and_back(tuned, tiny_runs, tmp_path):
    folder, back = f"{tmp_path}/adapter", f"{tmp_path}/back"
    adapter.main(["export", tuned, f"--out={folder}"])
    with open(f"{folder}/adapter_config.json", encoding="utf-8") as f:
        settings = json.load(f)
    assert (settings["r"], settings["lora_alpha"]) == (4, 8.0)
    assert settings["target_modules"] == [
        "mlp.down_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "self_attn.k_proj",
        "self_attn.o_proj",
        "self_attn.q_proj",
        "self_attn.v_proj",
    ]
    adapter.main(["import", folder, f"--base={tiny_runs['sft']}", f"--out={back}"])
    expected, found = final_weights(tuned), final_weights(back)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-7)
    sample.main([back, "--prompt=why?", "--temperature=0", "--max_new_tokens=4"])


def test_the_base_that_an_adapter_names(tuned, tiny_runs, tmp_path):
    """What its base was imported from. A merge was not: PEFT would take the first adapter's base,
    and silently compute with another model."""
    first, merged = f"{tmp_path}/adapter", f"{tmp_path}/merged"
    adapter.main(["export", tuned, f"--out={first}"])
    adapter.main(["import", first, f"--base={tiny_runs['sft']}", f"--out={merged}"])
    path = checkpoint.latest(merged)
    meta = checkpoint.read_meta(path)
    assert meta["base_sha256"] == checkpoint.weights_sha256(tiny_runs["sft"])
    assert adapter.base_model(path, meta) == {"base_model_name_or_path": path}
    assert adapter.base_model("gone", None) == {"base_model_name_or_path": "gone"}

    llama, commit = f"{tmp_path}/llama", "ab" * 20
    os.mkdir(llama)
    for source, expected in (
        (first, {"base_model_name_or_path": path}),  # as older code wrote into a merge
        (llama, {"base_model_name_or_path": llama}),
        (f"{tmp_path}/gone", {"base_model_name_or_path": path}),
        (f"org/name@{commit}", {"base_model_name_or_path": "org/name", "revision": commit}),
    ):
        assert adapter.base_model(path, {"source": source}) == expected


def test_an_adapter_does_not_name_another_base(tuned, tiny_runs, tiny_data, tmp_path, capsys):
    """Another model may have been imported to the folder of `init` since."""
    source, base, run = f"{tmp_path}/hf", f"{tmp_path}/base", f"{tmp_path}/run"
    hf.main(["export", tiny_runs["sft"], f"--out={source}"])
    hf.main(["import", source, f"--out={base}"])
    train.main(sft_args({"sft": base}, tiny_data, run, "--max_steps=1"))

    def named(out):
        capsys.readouterr()
        adapter.main(["export", run, f"--out={tmp_path}/{out}"])
        with open(f"{tmp_path}/{out}/adapter_config.json", encoding="utf-8") as f:
            return json.load(f)["base_model_name_or_path"], capsys.readouterr().out

    assert named("a")[0] == source and named("b")[1].count("\n") == 1
    hf.main(["export", tuned, f"--out={source}_2"])
    os.rename(source, f"{source}_1")
    shutil.copytree(f"{source}_2", source)
    name, said = named("replaced")
    assert name == f"{base}/round_0/step_000000" and f"{source} has other weights than" in said
    os.remove(f"{source}/model.safetensors")
    assert named("incomplete") == (name, said.replace("replaced", "incomplete"))
    shutil.rmtree(source)
    os.rename(f"{source}_1", source)
    assert named("as_before")[0] == source
    shutil.rmtree(base)
    hf.main(["import", f"{source}_2", f"--out={base}"])
    name, said = named("c")
    assert name == f"{base}/round_0/step_000000" and f"{name} cannot be read, or is another" in said


def refused_adapter(*args):
    with pytest.raises(SystemExit) as e:
        adapter.main([str(arg) for arg in args])
    message = str(e.value)
    assert "\n" not in message
    return message


def edit(folder, tensors=None, **settings):
    """Change an exported adapter. tensors: what to do with {name: tensor}."""
    path = f"{folder}/adapter_config.json"
    with open(path, encoding="utf-8") as f:
        before = json.load(f)
    with open(path, "w", encoding="utf-8") as f:
        json.dump(before | settings, f)
    if tensors:
        stored = load_file(f"{folder}/adapter_model.safetensors")
        tensors(stored)
        save_file(stored, f"{folder}/adapter_model.safetensors")


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "settings, tensors, message",
    [
        ({"peft_type": "IA3"}, None, "peft_type 'IA3' is not supported"),
        ({"use_dora": True}, None, "use_dora = True is not supported"),
        ({"init_lora_weights": "pissa"}, None, "init_lora_weights = 'pissa' is not supported"),
        ({"lora_alpha": None}, None, "lora_alpha must be float"),
        ({"r": None}, None, "r must be int"),
        ({"r": 12}, None, "q_proj has rank 4, which adapter_config.json has not"),
        ({"rank_pattern": [12]}, None, "rank_pattern must be an object"),
        ({}, lambda t: t.pop(f"{FIRST}.lora_B.weight"), "has only one of lora_A and lora_B"),
        (
            {},
            lambda t: t.update({f"{FIRST}.lora_B.weight": torch.zeros(5, 4)}),
            "q_proj has lora_A (4, 32) and lora_B (5, 4), the base's matrix is (32, 32)",
        ),
        (
            {},
            lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32)}),
            "lm_head.lora_A.weight has no counterpart",
        ),
        ({}, lambda t: t.clear(), "has no adapter"),
    ],
)
def test_a_foreign_adapter_is_refused(tuned, tiny_runs, tmp_path, settings, tensors, message):
    folder, out = f"{tmp_path}/adapter", f"{tmp_path}/back"
    adapter.main(["export", tuned, f"--out={folder}"])
    edit(folder, tensors, **settings)
    assert message in refused_adapter(
        "import", folder, f"--base={tiny_runs['sft']}", f"--out={out}"
    )
    assert not os.path.exists(out)


def test_a_run_without_an_adapter(tiny_runs, tmp_path):
    message = refused_adapter("export", tiny_runs["sft"], f"--out={tmp_path}/a")
    assert "has no adapter: it was not trained with lora_rank" in message


def test_the_command_line():
    command = [sys.executable, "-m", "tools.adapter", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "PeftModel.from_pretrained" in done.stdout
