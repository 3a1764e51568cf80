"""bench/gpu.py at toy size on a CPU: every check runs and passes, and a failure is one line."""

import subprocess
import sys

import pytest
from conftest import ROOT

from bench import gpu


def run_small(out, *arguments):
    command = [sys.executable, "-m", "bench.gpu", str(out), "--small", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_every_check_runs_at_toy_size(tmp_path):
    done = run_small(tmp_path, "--jobs=2", "--budget=600")
    print(done.stdout, done.stderr)
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert [line.split()[0] for line in lines[:-1]] == ["ok"] * len(gpu.ALL)
    for name in gpu.ALL:
        assert (tmp_path / f"{name}.log").exists() and (tmp_path / f"{name}.json").exists()
        assert f"| {name} | ok |" in (tmp_path / "table.md").read_text()


@pytest.mark.slow
def test_the_others_go_on_after_a_failure(tmp_path, monkeypatch, capsys):
    """A check that raises, one that takes too long, and one that holds."""
    for name, limit in (("absent", 60), ("head", 0.5)):
        monkeypatch.setitem(gpu.CHECKS, name, (None, limit))
        monkeypatch.setitem(gpu.ALL, name, (None, limit))
    arguments = [str(tmp_path), "absent", "head", "attention_speed", "--small", "--jobs=1"]
    assert gpu.main(arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("FAIL absent") and "KeyError: 'absent'" in lines[0]
    assert lines[1].startswith("FAIL head") and "longer than 0 s" in lines[1]
    assert lines[-2].startswith("ok   attention_speed")


def test_an_unknown_check_is_a_one_line_error():
    with pytest.raises(SystemExit, match="no such check: speed"):
        gpu.main(["out", "speed"])
