"""A pretraining loss beside another stage's, and SFT on preferred responses as DPO's reference."""

import os
import shutil

import pytest
import torch
from conftest import (
    Killed,
    assert_same_run,
    final_weights,
    killing,
    load_config,
    read_metrics,
    refused,
)

import train
from data import tokenizer
from data.folder import write_meta, write_stream


def sft_args(runs, data, out, *more):
    return [
        "--stage=sft",
        f"--out_dir={out}",
        f"--data={data}",
        f"--init={runs['pretrain']}",
        "--max_response=16",
        "--device=cpu",
        "--eval_rows=8",
        "--eval_batches=2",
        "--batch_size=8",
        "--max_steps=1",
        "--lr=1e-3",
        "--pretrain_batch_size=4",
        *more,
    ]


@pytest.fixture(scope="module")
def sft_run(tiny_runs, tiny_data, tmp_path_factory):
    """One step on rows alone."""
    out = str(tmp_path_factory.mktemp("sft") / "run")
    train.main(sft_args(tiny_runs, tiny_data, out))
    return out


@pytest.fixture(scope="module")
def stream_run(tiny_runs, tiny_data, tmp_path_factory):
    """One step of stage pretrain on the batch that is added to the rows."""
    out = str(tmp_path_factory.mktemp("stream") / "run")
    train.main(
        [
            "--stage=pretrain",
            f"--out_dir={out}",
            f"--data={tiny_data}",
            f"--init={tiny_runs['pretrain']}",
            "--device=cpu",
            "--batch_size=4",
            "--max_steps=1",
            "--lr=1e-3",
            "--eval_batches=2",
        ]
    )
    return out


@pytest.mark.parametrize("options", [[], ["--micro_batch_tokens=128"]])
def test_the_loss_is_the_sum_of_both(tiny_runs, tiny_data, sft_run, stream_run, tmp_path, options):
    """Each is a mean over its own tokens, whatever the micro-batches."""
    out = f"{tmp_path}/both"
    train.main(sft_args(tiny_runs, tiny_data, out, "--pretrain_coef=0.5", *options))
    both = read_metrics(out, "step")[0]
    rows = read_metrics(sft_run, "step")[0]["loss"]
    stream = read_metrics(stream_run, "step")[0]["loss"]
    assert both["pretrain_loss"] == pytest.approx(stream, rel=1e-5)
    assert both["loss"] == pytest.approx(rows + 0.5 * stream, rel=1e-5)
    expected = read_metrics(stream_run, "eval")[0]["val_loss"]
    assert read_metrics(out, "eval")[0]["pretrain_loss"] == pytest.approx(expected, rel=1e-5)


def distance(a, b):
    return sum((a[name] - b[name]).abs().sum().item() for name in a)


def test_the_gradient_is_the_sum_of_both(tiny_runs, tiny_data, sft_run, stream_run, tmp_path):
    """With a large weight the step is that of stage pretrain: clipping and AdamW make it
    independent of the scale of the loss."""
    out = f"{tmp_path}/large"
    train.main(sft_args(tiny_runs, tiny_data, out, "--pretrain_coef=1e4"))
    start = final_weights(tiny_runs["pretrain"])
    stream, rows, both = final_weights(stream_run), final_weights(sft_run), final_weights(out)
    step = distance(stream, start)
    assert distance(stream, both) < 0.05 * step
    assert distance(stream, rows) > 0.25 * step


def test_it_resumes_bit_for_bit(tiny_runs, tiny_data, tmp_path, monkeypatch):
    def args(out):
        options = ["--pretrain_coef=0.3", "--max_steps=6", "--save_interval=2"]
        return sft_args(tiny_runs, tiny_data, f"{tmp_path}/{out}", *options)

    train.main(args("whole"))
    with monkeypatch.context() as m:
        m.setattr(train, "lr_factor", killing(train.lr_factor, 3))
        with pytest.raises(Killed):
            train.main(args("killed"))
    train.main(args("killed"))
    assert_same_run(f"{tmp_path}/whole", f"{tmp_path}/killed")


def test_a_stream_that_is_replaced_during_a_round_changes_nothing(
    tiny_runs, tiny_data, tmp_path, monkeypatch
):
    folder = f"{tmp_path}/data"

    def args(out):
        options = ["--pretrain_coef=0.3", "--max_steps=4", "--eval_interval=1"]
        return sft_args(tiny_runs, tiny_data, out, f"--pretrain_data={folder}", *options)

    def replace_stream():
        os.rename(folder, f"{tmp_path}/old")
        shutil.copytree(tiny_data, folder)
        for split in ("train", "val"):
            write_stream(f"{folder}/{split}.bin", ["other text"] * 90, tokenizer.load("bytes"))
        write_meta(folder, "bytes", "made up")

    def evaluate(*arguments):
        metrics = measure(*arguments)
        if os.path.exists(folder) and not os.path.exists(f"{tmp_path}/old"):
            replace_stream()
        return metrics

    shutil.copytree(tiny_data, folder)
    train.main(args(f"{tmp_path}/whole"))
    measure = train.evaluate
    monkeypatch.setattr(train, "evaluate", evaluate)
    train.main(args(f"{tmp_path}/replaced"))
    assert os.path.exists(f"{tmp_path}/old")
    for kind in ("step", "eval"):
        losses = []
        for out in ("whole", "replaced"):
            records = read_metrics(f"{tmp_path}/{out}", kind)
            losses.append([record["pretrain_loss"] for record in records])
        assert losses[0] == losses[1] and len(losses[0]) >= 4


def test_a_stream_of_another_tokenizer_is_refused(tiny_runs, tiny_data, tmp_path):
    path = f"{tmp_path}/other.tiktoken"
    tokenizer.save(tokenizer.train(["some text to train on"] * 5, 300), path)
    enc = tokenizer.load(path)
    for split in ("train", "val"):
        write_stream(f"{tmp_path}/{split}.bin", ["some text"] * 50, enc)
    write_meta(str(tmp_path), "other.tiktoken", "made up")
    options = ["--pretrain_coef=0.3", f"--pretrain_data={tmp_path}"]
    message = refused(sft_args(tiny_runs, tiny_data, f"{tmp_path}/r", *options))
    assert "was written with the tokenizer" in message


def test_a_missing_stream_names_the_command_that_makes_it(tiny_runs, tiny_data, tmp_path):
    options = ["--pretrain_coef=0.3", f"--pretrain_data={tmp_path}/none"]
    message = refused(sft_args(tiny_runs, tiny_data, f"{tmp_path}/r", *options))
    assert "make it with" in message


def test_preferred_ft_is_sft_on_the_rows_of_dpo():
    """The two configs differ in the stage, where it starts, and its steps."""
    dpo = vars(load_config(["config/local/dpo.py"]))
    preferred_ft = vars(load_config(["config/local/preferred_ft.py"]))
    differing = {name for name in dpo if dpo[name] != preferred_ft[name]}
    assert differing == {"stage", "out_dir", "init", "max_rows", "batch_size", "lr", "loss_type"}


def test_preferred_ft_is_a_reference_of_dpo(tiny_runs, tiny_data, tmp_path):
    """Which then starts at its ln 2."""
    preferred_ft, dpo = f"{tmp_path}/preferred_ft", f"{tmp_path}/dpo"
    small = [
        f"--data={tiny_data}",
        "--device=cpu",
        "--max_steps=2",
        "--batch_size=8",
        "--eval_rows=8",
        "--max_prompt=40",
        "--max_response=16",
    ]
    inputs = [f"--init={tiny_runs['pretrain']}", f"--out_dir={preferred_ft}"]
    train.main(["config/local/preferred_ft.py", *inputs, *small])
    train.main(["config/local/dpo.py", f"--init={preferred_ft}", f"--out_dir={dpo}", *small])
    assert read_metrics(dpo, "start")[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert all(torch.isfinite(w).all() for w in final_weights(dpo).values())
