"""The pretraining stream beside the rows: alpha L_GPT + L_FT; and a reference from the preferred responses alone."""

from data.folder import write_meta, write_stream
import pytest
import torch

from nanospin import config
import train
from conftest import load_config, final_weights, read_metrics
from test_train import Killed, assert_same_run, killing, refused


def args(runs, data, out, *more):
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


def test_the_loss_is_the_sum_of_both(tiny_runs, tiny_data, tmp_path):
    """alpha L_GPT + L_FT, each a mean over its own tokens, whatever the micro-batches; L_GPT is what stage pretrain has on that batch."""
    train.main(args(tiny_runs, tiny_data, f"{tmp_path}/rows"))
    train.main(
        [
            "--stage=pretrain",
            f"--out_dir={tmp_path}/stream",
            f"--data={tiny_data}",
            f"--init={tiny_runs['pretrain']}",
            "--device=cpu",
            "--batch_size=4",
            "--max_steps=1",
            "--lr=1e-3",
            "--eval_batches=2",
        ]
    )
    rows, stream = (
        read_metrics(f"{tmp_path}/{name}", "step")[0]["loss"] for name in ("rows", "stream")
    )
    for more in ([], ["--micro_batch_tokens=128"]):
        train.main(
            args(tiny_runs, tiny_data, f"{tmp_path}/both{len(more)}", "--pretrain_coef=0.5", *more)
        )
        both = read_metrics(f"{tmp_path}/both{len(more)}", "step")[0]
        assert both["pretrain_loss"] == pytest.approx(stream, rel=1e-5) and both[
            "loss"
        ] == pytest.approx(rows + 0.5 * stream, rel=1e-5)
    assert read_metrics(f"{tmp_path}/both0", "eval")[0]["pretrain_loss"] == pytest.approx(
        read_metrics(f"{tmp_path}/stream", "eval")[0]["val_loss"], rel=1e-5
    )
    # the gradient is of both: with a great alpha the step is the stream's own, which clipping and AdamW make independent of scale
    train.main(args(tiny_runs, tiny_data, f"{tmp_path}/great", "--pretrain_coef=1e4"))
    start, one, two, other = (
        final_weights(run)
        for run in (
            tiny_runs["pretrain"],
            f"{tmp_path}/stream",
            f"{tmp_path}/great",
            f"{tmp_path}/rows",
        )
    )

    def apart(a, b):
        return sum((a[n] - b[n]).abs().sum().item() for n in a)

    assert apart(one, two) < 0.05 * apart(one, start) < apart(one, other)


def test_it_resumes_bit_for_bit(tiny_runs, tiny_data, tmp_path, monkeypatch):
    def mixed(out):
        return args(
            tiny_runs,
            tiny_data,
            f"{tmp_path}/{out}",
            "--pretrain_coef=0.3",
            "--max_steps=6",
            "--save_interval=2",
        )

    train.main(mixed("whole"))
    with monkeypatch.context() as m:
        m.setattr(train, "lr_factor", killing(train.lr_factor, 3))
        with pytest.raises(Killed):
            train.main(mixed("killed"))
    train.main(mixed("killed"))
    assert_same_run(f"{tmp_path}/whole", f"{tmp_path}/killed")


def test_its_data_must_fit(tiny_runs, tiny_data, tmp_path):
    import data
    from data import tokenizer

    tokenizer.save(
        tokenizer.train(["some text to train on"] * 5, 300), str(tmp_path / "other.tiktoken")
    )
    enc = tokenizer.load(str(tmp_path / "other.tiktoken"))
    for split in ("train", "val"):
        write_stream(f"{tmp_path}/{split}.bin", ["some text"] * 50, enc)
    write_meta(str(tmp_path), "other.tiktoken", "made up")
    assert "was written with the tokenizer" in refused(
        args(
            tiny_runs,
            tiny_data,
            f"{tmp_path}/r",
            "--pretrain_coef=0.3",
            f"--pretrain_data={tmp_path}",
        )
    )
    assert "make it with" in refused(
        args(
            tiny_runs,
            tiny_data,
            f"{tmp_path}/r",
            "--pretrain_coef=0.3",
            f"--pretrain_data={tmp_path}/none",
        )
    )


def test_preferred_ft_is_sft_on_the_rows_of_dpo(tiny_runs, tiny_data, tmp_path):
    """DPO's config but for the stage, its start and its steps: SFT on the best response, then the reference of DPO, which starts at its ln 2."""
    dpo, ft = (load_config([f"config/{name}_local.py"]) for name in ("dpo", "preferred_ft"))
    assert {n for n in vars(dpo) if getattr(dpo, n) != getattr(ft, n)} == {
        "stage",
        "out_dir",
        "init",
        "max_rows",
        "batch_size",
        "lr",
    }
    small = [
        f"--data={tiny_data}",
        "--device=cpu",
        "--max_steps=2",
        "--batch_size=8",
        "--eval_rows=8",
        "--max_prompt=40",
        "--max_response=16",
    ]
    train.main(
        [
            "config/local/preferred_ft.py",
            f"--init={tiny_runs['pretrain']}",
            f"--out_dir={tmp_path}/ft",
            *small,
        ]
    )
    train.main(
        ["config/local/dpo.py", f"--init={tmp_path}/ft", f"--out_dir={tmp_path}/dpo", *small]
    )
    assert read_metrics(f"{tmp_path}/dpo", "start")[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert all(torch.isfinite(w).all() for w in final_weights(f"{tmp_path}/dpo").values())
