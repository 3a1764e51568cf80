"""The main path, in this process: stages, resuming, refusing."""

from model import GPT
from data.folder import write_meta
from data.rows import write_rows
import glob
import json
import math
import os
import shutil
import threading

import pytest
import torch

from nanospin import checkpoint
from nanospin import config
import rollout
import train
from conftest import load_config, TINY, WORDS, final_weights, read_metrics
from data.rows import read_rows, write_rows
from data.files import sha256
from data.folder import write_meta


def spin_args(runs, data, out, *more):
    return [
        "--stage=spin",
        f"--out_dir={out}",
        f"--data={data}",
        f"--init={runs['sft']}",
        "--template=Q: {prompt}\nA: ",
        "--max_response=16",
        "--device=cpu",
        "--eval_rows=8",
        "--batch_size=8",
        "--epochs=1",
        "--lr=1e-3",
        "--beta=0.5",
        "--save_interval=2",
        "--eval_interval=2",
        *more,
    ]


def test_training_learns(tiny_runs):
    for run in tiny_runs.values():
        losses = [r["val_loss"] for r in read_metrics(run, "eval")]
        assert losses[-1] < losses[0] - 0.1
    steps = read_metrics(tiny_runs["pretrain"], "step")
    assert [r["step"] for r in steps] == list(range(8)) and abs(
        steps[0]["loss"] - math.log(257)
    ) < 0.1


def test_the_optimizer_is_as_asked(tiny_runs):
    model, _, _ = GPT.from_checkpoint(tiny_runs["sft"])
    cfg = load_config(["--max_steps=1", "--optimizer=muon", "--weight_decay=0.1"])
    adamw, muon = train.make_optimizers(model, cfg, 1e-3, torch.device("cpu"))
    assert adamw.defaults["fused"] and len(muon.param_groups[0]["params"]) == sum(
        n.startswith("h.") and p.dim() == 2 for n, p in model.named_parameters()
    )
    assert all(p.dim() >= 2 for p in adamw.param_groups[0]["params"]) and all(
        p.dim() == 1 for p in adamw.param_groups[1]["params"]
    )
    assert [g["weight_decay"] for g in adamw.param_groups] == [0.1, 0.0]
    grouped = sum(p.numel() for o in (adamw, muon) for g in o.param_groups for p in g["params"])
    assert grouped == model.num_params()
    assert train.make_optimizers(model, load_config(["--max_steps=1"]), 1e-3, torch.device("cuda"))[
        0
    ].defaults["fused"]


def test_schedules():
    for name, end in (("cosine", 0.1), ("linear", 0.1), ("constant", 1.0)):
        cfg = load_config(["--max_steps=1", f"--schedule={name}", "--warmup_ratio=0.1", "--min_lr_ratio=0.1"])
        shares = [train.lr_factor(cfg, s, 100) for s in range(101)]
        assert (
            shares[0] < shares[5] < shares[10] == 1.0
            and abs(shares[100] - end) < 1e-12
            and max(shares) == 1.0
        )


def test_spin_with_a_teacher_and_history(tiny_runs, tiny_data, tmp_path):
    out = str(tmp_path / "spin")
    args = spin_args(
        tiny_runs,
        tiny_data,
        out,
        "--players=data,teacher,self,self-1",
        f"--teacher={tiny_runs['pretrain']}",
        "--rounds=2",
        "--replay_rounds=1",
        "--nll_coef=0.1",
    )
    train.main(args)
    for start in read_metrics(out, "start"):
        assert start["off"] < 1e-4
    # the first round has no earlier self: K = 3; the second has four players
    assert abs(read_metrics(out, "eval")[0]["rank_nll"] - math.log(6)) < 1e-5
    second = [r for r in read_metrics(out, "eval") if r["round"] == 1][0]
    assert abs(second["rank_nll"] - math.log(24)) < 1e-5 and "reward/self-1" in second
    rows = [read_rows(f"{out}/round_{r}/train.jsonl") for r in (0, 1)]
    assert all(
        a["responses"][2] == b["responses"][3] for a, b in zip(*rows)
    )  # round 0's self is round 1's self-1
    assert all(row["responses"][3] is None for row in rows[0])
    data = {r["prompt"]: r["responses"][0] for r in read_rows(f"{tiny_data}/train.jsonl")}
    assert all(row["responses"][0] == data[row["prompt"]] for row in rows[0])
    assert all(
        len(y) <= 16 for row in rows[0] for y in row["ids"] if y
    )  # one limit for every player
    steps = [r for r in read_metrics(out, "step") if r["round"] == 1]
    assert len(steps) == math.ceil(2 * 40 / 8)  # with the earlier round's rows
    report = json.load(open(f"{out}/round_1/collect.json"))
    assert (
        report["made_of"]["reference"]
        == checkpoint.read_meta(checkpoint.latest(out, 0))["weights_sha256"]
    )
    assert {"tie/self", "length/data", "ended/self", "exact_match/self", "length_acc/self"} <= set(
        report["report"]["val"]
    )
    # the policy learns to tell the players apart where it is trained
    losses = [r["nll"] for r in read_metrics(out, "step") if r["round"] == 0]
    assert losses[-1] < losses[0]


def test_equal_responses_are_absent(tiny_runs, tiny_data, tmp_path):
    """A sample equal to the data's, or to the teacher's, teaches nothing; exact match counts the first alone as right."""
    import data

    folder, cfg_args = (
        str(tmp_path / "echo"),
        ["--temperature=0", "--players=data,teacher,self", "--teacher=rows"],
    )
    shutil.copytree(tiny_data, folder)
    model, enc, _ = GPT.from_checkpoint(tiny_runs["sft"])
    for split in ("train", "val"):
        rows = read_rows(f"{folder}/{split}.jsonl")
        said, ids = rollout.respond(
            model, enc, "Q: {prompt}\nA: ", rows, max_response=16, temperature=0
        )
        for i, (row, text, y) in enumerate(zip(rows, said, ids)):
            texts = [[text, "x", None], ["x", text, None], ["x", "z", None]][
                i % 3
            ]  # equal to the data's, the teacher's, to none
            row["responses"] = [t if t is not None else "unused" for t in texts]
            row["ids"] = None
        write_rows(
            f"{folder}/{split}.jsonl",
            [{k: v for k, v in row.items() if k != "ids"} for row in rows],
        )
    write_meta(folder, "bytes", "made up")
    # greedy samples of so small a model run to the limit; a text that is cut there equals its own prefix
    out = str(tmp_path / "run")
    train.main(spin_args(tiny_runs, folder, out, *cfg_args, "--max_steps=1"))
    rows, first = read_rows(f"{out}/round_0/val.jsonl"), read_rows(f"{folder}/val.jsonl")
    for row, source in zip(
        rows, rollout.load_rows(load_config(spin_args(tiny_runs, folder, out, *cfg_args)))["val"]
    ):
        kind = first.index(source) % 3
        assert row["same_as"] == [None, None, [0, 1, None][kind]] and (row["ids"][2] is None) == (
            kind < 2
        )
    report = read_metrics(out, "collect")[0]
    right = sum(row["same_as"][2] == 0 for row in rows) / len(rows)
    assert report["exact_match/self"] == right and 0 < right < report["tie/self"] < 1


def test_a_prompt_without_room_is_dropped_and_reported(tiny_runs, tiny_data, tmp_path, capsys):
    import data

    folder = str(tmp_path / "long")
    shutil.copytree(tiny_data, folder)
    for split in ("train", "val"):
        rows = read_rows(f"{folder}/{split}.jsonl")
        rows[1]["prompt"] = "long " * 50
        write_rows(f"{folder}/{split}.jsonl", rows)
    write_meta(folder, "bytes", "made up")
    train.main(
        spin_args(
            tiny_runs,
            folder,
            f"{tmp_path}/r",
            "--players=data,teacher,self",
            f"--teacher={tiny_runs['pretrain']}",
            "--max_steps=1",
        )
    )
    assert (
        len(read_rows(f"{tmp_path}/r/round_0/train.jsonl")) == 39
        and "data train: 40 rows, 0 prompts cut" in (said := capsys.readouterr().out)
        and "1 dropped" in said
    )


def test_changed_data_is_noticed(tiny_runs, tiny_data, tmp_path):
    import data

    folder = str(tmp_path / "d")
    shutil.copytree(tiny_data, folder)
    args = [
        "--stage=preference",
        f"--out_dir={tmp_path}/r",
        f"--data={folder}",
        f"--init={tiny_runs['sft']}",
        "--max_response=16",
        "--device=cpu",
        "--batch_size=8",
        "--max_steps=2",
        "--eval_rows=8",
    ]
    train.main(args)
    write_rows(f"{folder}/train.jsonl", read_rows(f"{folder}/train.jsonl")[::-1])
    write_meta(folder, "bytes", "made up")
    assert "begun with data_sha256" in refused(args)
    write_rows(f"{folder}/train.jsonl", read_rows(f"{folder}/train.jsonl")[::-1])
    write_meta(folder, "bytes", "made up")
    assert "begun with init" in refused(args + [f"--init={tiny_runs['pretrain']}"])
    train.main(args)
    write_rows(f"{folder}/train.jsonl", read_rows(f"{folder}/train.jsonl")[::-1])
    write_meta(folder, "bytes", "made up")
    os.remove(f"{tmp_path}/r/config.json")
    assert "other rows or another reference" in refused(args)
    os.remove(f"{tmp_path}/r/round_0/train.ref.npz")
    assert "no longer its reference" in refused(args)


class Killed(Exception):
    pass


def killing(function, at):
    """`function`, whose call number `at` (from 0) is a kill."""
    calls = [0]

    def wrapped(*args, **kw):
        calls[0] += 1
        if calls[0] > at:
            if not threading.current_thread().name.startswith("save"):
                checkpoint.save_thread.submit(
                    int
                ).result()  # a process that is killed leaves no thread that saves on
            raise Killed
        return function(*args, **kw)

    return wrapped


LOGGED = ("kind", "round", "step", "loss", "norm", "val_loss", "rank_nll", "acc", "lr", "off")


def assert_same_run(a, b):
    """Bit for bit: weights and every logged number but the clock's."""

    def numbers(run):
        with open(f"{run}/metrics.jsonl") as f:
            return [{k: r[k] for k in LOGGED if k in r} for r in map(json.loads, f)]

    assert numbers(a) == numbers(b)
    one, two = final_weights(a), final_weights(b)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "rmsprop"])
def test_pretraining_resumes_bit_for_bit(tiny_data, tmp_path, monkeypatch, optimizer):
    """Six steps equal three and three resumed, with dropout, accumulation and a schedule; killed two steps past its checkpoint."""

    def args(out):
        return [
            "--stage=pretrain",
            f"--out_dir={tmp_path}/{out}",
            f"--data={tiny_data}",
            "--max_steps=6",
            "--save_interval=3",
            "--eval_interval=2",
            "--batch_size=8",
            "--micro_batch_tokens=256",
            f"--optimizer={optimizer}",
            "--lr=1e-3",
            "--warmup_ratio=0.3",
            "--dropout=0.1",
            "--weight_decay=0.1",
            *TINY,
        ]

    train.main(args("whole"))
    with monkeypatch.context() as m:
        m.setattr(train, "lr_factor", killing(train.lr_factor, 5))
        with pytest.raises(Killed):
            train.main(args("killed"))
    assert (
        checkpoint.latest(f"{tmp_path}/killed").endswith("step_000003")
        and len(read_metrics(f"{tmp_path}/killed", "step")) == 5
    )
    with open(f"{tmp_path}/killed/metrics.jsonl", "a") as f:
        f.write('{"kind": "st')  # a line cut short
    train.main(args("killed"))
    assert_same_run(f"{tmp_path}/whole", f"{tmp_path}/killed")
    before = open(f"{tmp_path}/whole/metrics.jsonl").read()
    train.main(args("whole"))  # a finished run is left as it is
    assert open(f"{tmp_path}/whole/metrics.jsonl").read() == before


@pytest.mark.parametrize(
    "where, at", [("sampling", 4), ("scoring", 0), ("training", 8), ("saving", 2)]
)
def test_spin_resumes_bit_for_bit(tiny_runs, tiny_data, tmp_path, monkeypatch, where, at):
    """Killed in the middle of sampling, scoring, a round's fit, or a save, of either round."""
    monkeypatch.setattr(rollout, "PART", 16)

    def args(out):
        return spin_args(
            tiny_runs,
            tiny_data,
            f"{tmp_path}/{out}",
            "--players=data,teacher,self",
            f"--teacher={tiny_runs['pretrain']}",
            "--rounds=2",
            "--nll_coef=0.1",
        )

    train.main(args("whole"))
    target = {
        "sampling": (rollout, "respond"),
        "scoring": (rollout, "score"),
        "training": (train, "lr_factor"),
        "saving": (checkpoint, "write_json"),
    }[where]
    with monkeypatch.context() as m:
        m.setattr(*target, killing(getattr(*target), at))
        with pytest.raises(Killed):
            train.main(args("killed"))
    train.main(args("killed"))
    assert_same_run(f"{tmp_path}/whole", f"{tmp_path}/killed")
    for r in (0, 1):
        for file in ("train.jsonl", "val.jsonl", "train.ref.npz"):
            assert (
                open(f"{tmp_path}/whole/round_{r}/{file}", "rb").read()
                == open(f"{tmp_path}/killed/round_{r}/{file}", "rb").read()
            )
    assert not glob.glob(f"{tmp_path}/killed/**/*.part*", recursive=True) and not glob.glob(
        f"{tmp_path}/killed/round_*/writing_*"
    )


@pytest.mark.parametrize("kind", ["pl", "pairs", "ipo", "simpo", "orpo"])
def test_preference_stage(tiny_runs, tiny_data, tmp_path, kind):
    out = str(tmp_path / "dpo")
    train.main(
        [
            "--stage=preference",
            f"--out_dir={out}",
            f"--data={tiny_data}",
            f"--init={tiny_runs['sft']}",
            "--template=Q: {prompt}\nA: ",
            "--max_response=16",
            "--device=cpu",
            "--batch_size=8",
            "--epochs=12",
            "--lr=5e-4",
            f"--beta={1.0 if kind in ('simpo', 'orpo') else 0.1}",
            "--eval_rows=8",
            f"--loss_type={kind}",
            f"--nll_coef={float(kind == 'orpo')}",
        ]
    )
    (start,) = read_metrics(out, "start")
    assert start["off"] < 1e-4
    steps = read_metrics(out, "step")
    assert (
        sum(r["loss"] for r in steps[-5:]) < sum(r["loss"] for r in steps[:5])
        and sum(r["acc"] for r in steps[-5:]) / 5 > 0.55
    )
    assert "acc/1" in read_metrics(out, "eval")[-1]


def test_layouts_train_alike(tiny_runs, tiny_data, tmp_path):
    """Shared and padded rows, all at once or few tokens at a time: the same losses to rounding."""

    def losses(out, *args):
        train.main(spin_args(tiny_runs, tiny_data, f"{tmp_path}/{out}", "--max_steps=4", *args))
        return [r["loss"] for r in read_metrics(f"{tmp_path}/{out}", "step")], [
            r["val_loss"] for r in read_metrics(f"{tmp_path}/{out}", "eval")
        ]

    shared = losses("shared", "--layout=packed")
    for out, *args in (
        ("padded", "--layout=padded"),
        ("small", "--layout=packed", "--micro_batch_tokens=64"),
    ):
        for a, b in zip(shared, losses(out, *args), strict=True):
            assert all(abs(x - y) < 1e-4 for x, y in zip(a, b, strict=True)), (
                out
            )  # AdamW turns a rounding of a gradient near 0 into a step


def test_documents_apart(tiny_data, tmp_path):
    """It trains, and what it is watched by has its documents apart too."""
    args = [
        "--stage=pretrain",
        f"--data={tiny_data}",
        "--max_steps=3",
        "--batch_size=4",
        "--lr=1e-3",
        *TINY,
    ]
    for out, apart in (("apart", True), ("together", False)):
        train.main([*args, f"--out_dir={tmp_path}/{out}", f"--document_mask={apart}"])
    apart, together = (read_metrics(f"{tmp_path}/{out}", "eval") for out in ("apart", "together"))
    assert (
        all(math.isfinite(r["val_loss"]) for r in apart)
        and apart[0]["val_loss"] != together[0]["val_loss"]
    )


# a later stage's inputs, for the files in config/
CHANGES = {
    "pretrain": TINY + ["--batch_size=8", "--micro_batch_tokens=256"],
    "sft": ["--batch_size=8", "--micro_batch_tokens=256"],
    "spin": ["--batch_size=8", "--micro_batch_tokens=256", "--max_rows=8", "--gen_batch_size=8"],
    "preference": ["--batch_size=8", "--micro_batch_tokens=256"],
    "reward": ["--batch_size=8", "--micro_batch_tokens=256"],
    "ppo": [
        "--batch_size=8",
        "--micro_batch_tokens=256",
        "--max_rows=8",
        "--gen_batch_size=8",
        "--rounds=2",
        "--reward=test_ppo:letters",
    ],
}


def texts(folder):
    """A data folder of whole texts, many of a group beginning alike, in bytes."""
    rows = [
        {
            "text": f"post {i // 4} about {WORDS[i // 4 % 12]}\n\ncomment {i} {WORDS[i % 7]}",
            "group": f"{i // 4}",
        }
        for i in range(80)
    ]
    write_rows(f"{folder}/train.jsonl", rows[:48] + rows[50:64])
    write_rows(f"{folder}/val.jsonl", rows[48:50] + rows[64:])
    write_meta(str(folder), "bytes", "made up", train_rows=62, val_rows=18)
    return str(folder)


@pytest.mark.parametrize(
    "file", sorted(os.path.basename(f) for f in glob.glob("config/*.py") if "__init__" not in f)
)
def test_every_config_shrunk_runs(file, tiny_runs, tiny_data, tmp_path):
    cfg = load_config([f"config/{file}"])
    args = [
        f"config/{file}",
        f"--data={tiny_data}",
        f"--out_dir={tmp_path}/run",
        "--max_steps=3",
        "--device=cpu",
        "--dtype=float32",
        "--eval_rows=8",
        "--eval_batches=1",
        "--compile=False",
        *CHANGES[cfg.stage],
    ]
    if file.startswith("tn_"):  # of whole texts, from scratch
        args[1] = f"--data={texts(tmp_path)}"
        args += ["--n_embd=32", "--n_head=2", "--block_size=32", "--eval_interval=2"]
    elif cfg.stage != "pretrain":
        args += [
            f"--init={tiny_runs['pretrain' if cfg.stage == 'sft' else 'sft']}",
            "--max_prompt=40",
            "--max_response=16",
        ]
        args += [f"--teacher={tiny_runs['pretrain']}"] if cfg.teacher not in ("", "rows") else []
    elif cfg.n_kv_head:
        args += ["--n_kv_head=1"]
    args = [a for a in args if not a.startswith("--n_layer") or cfg.stage == "pretrain"]
    args += [f"--pretrain_data={tiny_data}"] if cfg.pretrain_coef else []
    train.main(args)
    assert len(read_metrics(f"{tmp_path}/run", "step")) == 3 * load_config(args).rounds
    assert all(math.isfinite(r["loss"]) for r in read_metrics(f"{tmp_path}/run", "step"))


def test_taylor_order_on_a_schedule(tmp_path):
    cfg = load_config(["--max_steps=5", "--taylor_order=2", "--taylor_end=0"])
    assert [train.at_step(cfg, step, 5).taylor_order for step in range(5)] == [
        2.0,
        1.5,
        1.0,
        0.5,
        0.0,
    ]
    assert (
        train.at_step(load_config(["--max_steps=5", "--taylor_order=0.5"]), 3, 5).taylor_order
        == 0.5
    )
    args = [
        "studies/taylor/config/clean.py",
        f"--data={texts(tmp_path)}",
        "--n_layer=1",
        "--n_embd=32",
        "--n_head=2",
        "--block_size=32",
        "--max_steps=4",
        "--device=cpu",
        "--batch_size=8",
    ]
    first = {}
    for name, more in (
        ("ends", ["--taylor_order=2", "--taylor_end=0"]),
        ("T_2", ["--taylor_order=2"]),
        ("T_0", []),
    ):
        train.main([*args, f"--out_dir={tmp_path}/{name}", *more])
        first[name] = [r["loss"] for r in read_metrics(f"{tmp_path}/{name}", "step")]
    assert (
        first["ends"][0] == first["T_2"][0] < first["T_0"][0] and first["ends"][2] > first["T_2"][2]
    )


@pytest.mark.parametrize(
    "loss",
    [
        "--focal=2",
        "--label_smoothing=0.1",
        "--confidence_penalty=0.2",
        "--taylor_order=1",
        "--taylor_order=0",
    ],
)
def test_each_token_loss_learns_and_says_its_calibration(loss, tmp_path):
    """Plain cross-entropy on validation texts falls from uniform's; micro-batches do not change the loss."""
    args = [
        "studies/taylor/config/clean.py",
        f"--data={texts(tmp_path)}",
        "--n_layer=1",
        "--n_embd=32",
        "--n_head=2",
        "--block_size=32",
        "--max_steps=12",
        "--device=cpu",
        "--batch_size=8",
        "--lr=1e-2",
        "--eval_interval=6",
        loss,
    ]
    train.main([*args, f"--out_dir={tmp_path}/run"])
    train.main([*args, f"--out_dir={tmp_path}/parts", "--micro_batch_tokens=64"])
    evals = read_metrics(f"{tmp_path}/run", "eval")
    assert [r["step"] for r in evals] == [0, 6, 12] and evals[-1]["val_loss"] < evals[0][
        "val_loss"
    ] - 1
    assert {
        "loss_t/0",
        "ece",
        "temperature/1",
        "seen_loss",
        "new_loss",
        "entropy_wrong",
        "reliability",
    } <= set(evals[-1])
    a, b = (
        [r["loss"] for r in read_metrics(f"{tmp_path}/{name}", "step")] for name in ("run", "parts")
    )
    assert a == pytest.approx(b, rel=1e-4)


def refused(args):
    with pytest.raises(SystemExit) as e:
        train.main(args)
    assert e.value.code and "\n" not in str(e.value), e.value
    return str(e.value)


def test_refusals(tiny_runs, tiny_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = [
        "--stage=sft",
        f"--data={tiny_data}",
        f"--init={tiny_runs['pretrain']}",
        "--max_steps=1",
        "--batch_size=4",
        "--device=cpu",
        f"--out_dir={tmp_path}/r",
    ]
    assert "make it with: python -m data.jsonl.prepare" in refused(
        base + [f"--data={tmp_path}/none"]
    )
    assert "no checkpoint there" in refused(base + [f"--init={tmp_path}/none"])
    assert "make it with: python train.py config/demo/sft.py" in refused(
        base + ["--init=out/demo/sft"]
    )
    assert "n_embd is 64" in refused(base + ["--n_embd=64"])
    assert "not the checkpoint's" in refused(base + [f"--tokenizer={other_tokenizer(tmp_path)}"])
    with monkeypatch.context() as two:
        two.setattr("nanospin.distributed.world_size", lambda: 2)
        assert "multiple of the number of ranks, 2" in refused(base + ["--batch_size=5"])
    assert "block_size" in refused(
        [
            "--stage=pretrain",
            f"--data={tiny_data}",
            "--max_steps=1",
            "--block_size=100000",
            "--n_embd=32",
            "--n_head=2",
            "--n_layer=1",
            "--device=cpu",
            f"--out_dir={tmp_path}/q",
        ]
    )
    assert "multiple of n_head" in refused(
        [
            "--stage=pretrain",
            f"--data={tiny_data}",
            "--max_steps=1",
            "--n_embd=33",
            "--device=cpu",
            f"--out_dir={tmp_path}/p",
        ]
    )
    spin = spin_args(tiny_runs, tiny_data, f"{tmp_path}/s")
    assert "no response to" in refused(
        spin + ["--players=data,teacher,self", f"--teacher={tiny_data}/val.jsonl"]
    )


def other_tokenizer(tmp_path):
    from data import tokenizer

    tokenizer.save(
        tokenizer.train(["some text to train on"] * 5, 300), str(tmp_path / "other.tiktoken")
    )
    return tmp_path / "other.tiktoken"


def test_a_run_folder_keeps_its_config(tiny_data, tmp_path):
    args = [
        "--stage=pretrain",
        f"--data={tiny_data}",
        f"--out_dir={tmp_path}/r",
        "--max_steps=1",
        "--batch_size=4",
        *TINY,
    ]
    train.main(args)
    assert "begun with lr = 0.0003, now it is 0.1" in refused(args + ["--lr=0.1"])


def test_the_last_checkpoints_and_the_best_are_kept(tiny_runs, tiny_data, tmp_path):
    def run(out, *more):
        train.main(
            [
                "--stage=sft",
                f"--data={tiny_data}",
                f"--init={tiny_runs['pretrain']}",
                f"--out_dir={tmp_path}/{out}",
                "--max_steps=6",
                "--save_interval=1",
                "--eval_interval=2",
                "--batch_size=4",
                "--device=cpu",
                "--eval_rows=4",
                "--lr=1e-3",
                *more,
            ]
        )
        return [
            os.path.basename(path) for path in checkpoint.list_steps(f"{tmp_path}/{out}/round_0")
        ]

    assert run("last", "--keep_last=3") == ["step_000004", "step_000005", "step_000006"]
    assert run("best", "--keep_best=-val_loss", "--keep_last=1") == [
        "step_000002",
        "step_000006",
    ]  # the highest: the loss falls
    assert "there are val_loss" in refused(
        [
            "--stage=sft",
            f"--data={tiny_data}",
            f"--init={tiny_runs['pretrain']}",
            f"--out_dir={tmp_path}/no",
            "--max_steps=1",
            "--device=cpu",
            "--keep_best=los",
        ]
    )


def test_damaged_checkpoints(tiny_runs, tiny_data, tmp_path):
    def start(change):
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        shutil.copytree(checkpoint.latest(tiny_runs["sft"]), tmp_path / "c")
        change(tmp_path / "c")
        return refused(
            [
                "--stage=sft",
                f"--data={tiny_data}",
                f"--init={tmp_path}/c",
                "--max_steps=1",
                "--device=cpu",
                f"--out_dir={tmp_path}/{len(os.listdir(tmp_path))}",
            ]
        )

    def flip(folder):
        weights = bytearray((folder / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (folder / "model.safetensors").write_bytes(weights)

    assert "is damaged" in start(flip)
    assert "meta.json is damaged" in start(lambda folder: (folder / "meta.json").write_text("{"))
    assert "cannot be read" in start(lambda folder: os.remove(folder / "manifest.json"))

    def change_model(folder, **changes):
        meta, manifest = (
            json.loads((folder / name).read_text()) for name in ("meta.json", "manifest.json")
        )
        meta["model"] |= changes
        (folder / "meta.json").write_text(json.dumps(meta))
        manifest["meta.json"]["sha256"] = sha256(folder / "meta.json")
        (folder / "manifest.json").write_text(json.dumps(manifest))

    assert "has shape" in start(lambda folder: change_model(folder, n_embd=64))
    assert "other tensors" in start(lambda folder: change_model(folder, n_layer=3))


def test_a_loss_that_is_not_finite_names_step_and_rows(tiny_runs, tiny_data, tmp_path, monkeypatch):
    good = train.OBJECTIVES["sft"]
    calls = [0]

    def bad(logps, *rest):
        calls[0] += 1
        loss, metrics = good(logps, *rest)
        return loss * (math.nan if calls[0] == 3 else 1.0), metrics

    monkeypatch.setitem(train.OBJECTIVES, "sft", bad)
    message = refused(
        [
            "--stage=sft",
            f"--data={tiny_data}",
            f"--init={tiny_runs['pretrain']}",
            "--max_steps=5",
            "--batch_size=4",
            "--device=cpu",
            f"--out_dir={tmp_path}/r",
            "--eval_rows=4",
        ]
    )
    assert "step 2" in message and "loss nan" in message and "rows: [" in message


def test_a_round_that_does_not_start_at_ln_k_says_so(tiny_runs, tiny_data, tmp_path, monkeypatch):
    score = rollout.score
    monkeypatch.setattr(rollout, "score", lambda *args, **kw: score(*args, **kw) + [[1.0, 0.0]])
    train.main(spin_args(tiny_runs, tiny_data, str(tmp_path / "r"), "--max_steps=1"))
    assert "not the same" in read_metrics(str(tmp_path / "r"), "warning")[0]["text"]


def test_bfloat16(tiny_runs, tiny_data, tmp_path):
    """Products in bfloat16, weights in float32; policy and reference still agree at a round's start."""
    out = str(tmp_path / "r")
    train.main(spin_args(tiny_runs, tiny_data, out, "--dtype=bfloat16", "--max_steps=3"))
    assert read_metrics(out, "start")[0]["off"] < 0.02 and all(
        w.dtype == torch.float32 for w in final_weights(out).values()
    )
    assert not read_metrics(out, "warning")


def test_a_teacher_from_a_ranked_file(tiny_runs, tiny_data, tmp_path):
    """Text is encoded and ends in eot; ids that this tokenizer made are kept as they are, eot or none."""
    from data import tokenizer
    from data.rows import write_rows

    name = tokenizer.fingerprint(tokenizer.load("bytes"))
    rows = read_rows(f"{tiny_data}/train.jsonl") + read_rows(f"{tiny_data}/val.jsonl")
    kept = [i % 2 == 0 for i in range(len(rows))]
    write_rows(
        str(tmp_path / "teacher.jsonl"),
        [
            {"prompt": row["prompt"], "responses": ["so it ends"]}
            | ({"ids": [[1, 2, 3]], "tokenizer": name} if k else {})
            for row, k in zip(rows, kept)
        ],
    )
    train.main(
        spin_args(
            tiny_runs,
            tiny_data,
            f"{tmp_path}/r",
            "--players=data,teacher,self",
            f"--teacher={tmp_path}/teacher.jsonl",
            "--max_steps=1",
        )
    )
    by_prompt = {
        row["prompt"]: row["ids"][1] for row in read_rows(f"{tmp_path}/r/round_0/train.jsonl")
    }
    for row, k in zip(rows, kept):
        if row["prompt"] in by_prompt:
            assert by_prompt[row["prompt"]] == ([1, 2, 3] if k else [*b"so it ends", 256])


def test_the_template_is_the_checkpoints_unless_the_config_says(tiny_runs, tiny_data, tmp_path):
    """A later stage puts a prompt as its init is used to; the run keeps it, and another is a conflict."""
    args = [
        a
        for a in spin_args(tiny_runs, tiny_data, tmp_path / "spin")
        if not a.startswith("--template")
    ]
    train.main([*args, "--rounds=1", "--max_steps=1"])
    assert (
        checkpoint.read_meta(checkpoint.latest(str(tmp_path / "spin")))["config"]["template"]
        == "Q: {prompt}\nA: "
    )
    train.main([*args, "--rounds=1", "--max_steps=1"])
    with pytest.raises(SystemExit, match="was begun with template"):
        train.main([*args, "--rounds=1", "--max_steps=1", "--template=P: {prompt}"])
    assert (
        checkpoint.read_meta(checkpoint.resolve(tiny_runs["pretrain"]))["config"]["template"]
        == config.TEMPLATE
    )
