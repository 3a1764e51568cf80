"""bench/gpu.py at toy size on a CPU: every check runs and passes, a failure is one line, and
measurements take turns."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

from bench import gpu, gpu_speed
from data.files import write_json


def run_small(out, *arguments):
    command = [sys.executable, "-m", "bench.gpu", str(out), "--small", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def turn(out, name):
    """(start, end) of a measurement's turn, by its own clock."""
    log = (out / f"{name}.log").read_text()
    start, end = re.search(r"turn begins at (\S+)[\s\S]*ends at (\S+)", log).groups()
    return float(start), float(end)


@pytest.mark.slow
def test_every_check_runs_at_toy_size(tmp_path):
    done = run_small(tmp_path, "--jobs=2", "--budget=900")
    print(done.stdout, done.stderr)
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert sum(line.startswith("ok ") for line in lines) == len(gpu.ALL)
    table = (tmp_path / "table.md").read_text()
    for name in gpu.ALL:
        assert (tmp_path / f"{name}.log").exists() and (tmp_path / f"{name}.json").exists()
        assert f"| {name} | ok |" in table
    for name in gpu.find_ratios(tmp_path):
        assert f"| {name} | | |" in table
    # no measurement before all are ready, and one at a time
    names = [name for name in gpu.MEASUREMENTS if "turn begins" in read_log(tmp_path, name)]
    assert set(gpu.MEASUREMENTS) - set(names) <= {"decode_transformers"}
    turns = [turn(tmp_path, name) for name in names]
    for (_, end), (start, _) in zip(turns, turns[1:]):
        assert end <= start
    last_ready = max((tmp_path / f"{name}.ready").stat().st_mtime for name in names)
    assert turns[0][0] >= last_ready


def read_log(out, name):
    return (out / f"{name}.log").read_text()


@pytest.mark.slow
def test_the_others_go_on_after_a_failure(tmp_path, monkeypatch, capsys):
    """A check and a preparation that raise, a preparation that hangs, and a turn that does."""
    for name, limit in (("absent", 60), ("gone", 60), ("head", 0.5)):
        monkeypatch.setitem(gpu.ALL, name, (None, limit))
    monkeypatch.setattr(gpu.Job, "take_turn", no_time_for("self_play", gpu.Job.take_turn))
    names = ["absent", "gone", "head", "attention_speed", "self_play"]
    assert gpu.main([str(tmp_path), *names, "--small", "--jobs=2"]) == 1
    output = capsys.readouterr().out
    lines = {}
    for line in output.splitlines():
        if line.startswith(("FAIL", "ok")):
            lines[line.split()[1]] = line
    assert set(lines) == set(names)
    assert lines["absent"].startswith("FAIL") and "KeyError: 'absent'" in lines["absent"]
    assert lines["gone"].startswith("FAIL") and "KeyError: 'gone'" in lines["gone"]
    assert lines["head"].startswith("FAIL") and "longer than 0 s" in lines["head"]
    assert lines["self_play"].startswith("FAIL") and "its turn was longer" in lines["self_play"]
    assert lines["attention_speed"].startswith("ok")
    assert "1 of 5 ok" in output


def no_time_for(name, take_turn):
    def with_limit(job, deadline):
        take_turn(job, 0.0 if job.name == name else deadline)

    return with_limit


def test_ratios_come_from_the_json_files(tmp_path):
    numbers = {
        "pretrain": {"tokens/s": 300.0},
        "pretrain_nanogpt": {"tokens/s": 200.0},
        "decode": {"tokens/s": 10.0, "decode tokens/s": 12.0, "floor tokens/s": 48.0},
        "decode_transformers": {"transformers": "not installed"},
        "preference": {"target tokens/s": 9.0},
        "preference_padded": {"target tokens/s": 6.0},
        "preference_each": {"target tokens/s": 3.0},
        "preference_flex": {"target tokens/s": 4.5},
    }
    for name, found in numbers.items():
        write_json(f"{tmp_path}/{name}.json", found)
    assert gpu.find_ratios(tmp_path) == {
        "pretrain to nanoGPT": 1.5,
        "preference to padded": 1.5,
        "preference to a forward each": 3.0,
        "preference, FlashAttention to FlexAttention": 2.0,
        "decode to the floor": 0.25,
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>", "attention"),
        ("triton_tem_fused_flex_attention_0", "attention"),
        ("nvjet_sm90_tst_192x192_64x3_1x2_h_bz_coopB_splitK_NTN", "matmuls"),
        ("triton_poi_fused__to_copy_0", "compiled"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("multi_tensor_apply_kernel", "optimizer"),
        ("vectorized_layer_norm_kernel", "other"),
    ],
)
def test_kinds_of_kernels(name, kind):
    assert gpu_speed.kind_of_kernel(name) == kind


def test_an_unknown_check_is_a_one_line_error():
    with pytest.raises(SystemExit, match="no such check: speed"):
        gpu.main(["out", "speed"])
