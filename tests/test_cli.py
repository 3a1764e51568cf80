"""The guard of every command: errors in one line, escaped output, closed pipes, full disks."""

import ast
import contextlib
import errno
import io
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, command, source_files
from test_help import scripts
from tqdm import tqdm

from data import cli
from data.files import atomic_write, check_output, one_line, printable, read_json, write_line
from nanospin import checkpoint

EVIL = "a\x1b]0;owned\x07\r\u202eb\u2066\u200f\ud800"


def run_guarded(main, argv=()):
    """(status, stdout, stderr) of cli.run."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.run(main, list(argv))
    return status, out.getvalue(), err.getvalue()


def raising(error):
    def main(argv):
        raise error

    return main


# ------------------------------------------------------------------------------ the guard


@pytest.mark.parametrize("path", scripts())
def test_every_script_runs_under_the_guard(path):
    with open(path, encoding="utf-8") as f:
        last = ast.parse(f.read()).body[-1]
    calls = [ast.unparse(node.func) for node in ast.walk(last) if isinstance(node, ast.Call)]
    assert "cli.run" in calls or "elastic.run" in calls


def test_every_parser_is_ours():
    for path in source_files():
        with open(path, encoding="utf-8") as f:
            text = f.read()
        assert path == "data/cli.py" or "argparse.ArgumentParser" not in text, path


@pytest.mark.parametrize(
    "error, status, printed",
    [
        (SystemExit(f"no {EVIL}\nfile"), 1, one_line(f"no {EVIL}\nfile") + "\n"),
        (SystemExit(None), 0, ""),
        (SystemExit(3), 3, ""),
        (KeyboardInterrupt(), 130, ""),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 1, "x: No space left on device\n"),
        (OSError(errno.EROFS, "Read-only file system"), 1, "a file: Read-only file system\n"),
        (PermissionError(errno.EACCES, "Permission denied", "y"), 1, "y: Permission denied\n"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "z"), 1, "z: Disk quota exceeded\n"),
        (OSError(errno.EIO, "Input/output error", "z"), 1, "z: Input/output error\n"),
        (MemoryError(), 1, "out of memory: use a smaller model, batch or input\n"),
    ],
)
def test_errors_are_one_line(error, status, printed):
    assert run_guarded(raising(error)) == (status, "", printed)


def test_a_bug_keeps_its_traceback():
    status, _, err = run_guarded(raising(ZeroDivisionError(EVIL)))
    assert status == 1
    assert "Traceback" in err and "ZeroDivisionError" in err
    assert err == printable(err) and "owned" in err


def test_the_status_of_a_main_is_kept():
    assert run_guarded(lambda argv: 7)[0] == 7
    assert run_guarded(lambda argv: argv, ["a"])[0] == 0


def test_output_is_escaped():
    def main(argv):
        print(EVIL, end="|\n")
        sys.stdout.writelines([EVIL])
        print("50 %\r", EVIL[:3], file=sys.stderr)

    before = sys.stdout, sys.stderr
    _, out, err = run_guarded(main)
    escaped = "a\\x1b]0;owned\\x07\\r\\u202eb\\u2066\\u200f\\ud800"
    assert out == f"{escaped}|\n{escaped}"
    assert err == "50 %\r a\\x1b]\n"  # a progress bar needs its carriage return
    assert (sys.stdout, sys.stderr) == before


def test_a_console_is_a_stream():
    with open(os.devnull, "w", encoding="ascii") as f:
        console = cli.Console(f, "x", kept="\r")
        assert console.isatty() is False and console.fileno() == f.fileno()
        assert console.buffer is f.buffer and console.encoding == "ascii"
        console.reconfigure(errors="backslashreplace")
        console.write("é字")
        for _ in tqdm(range(3), file=console):
            pass


def test_own_colours_are_not_escaped():
    def main(argv):
        sys.stdout.write_styled("\x1b[32mgreen\x1b[0m")

    assert run_guarded(main)[1] == "\x1b[32mgreen\x1b[0m"


# ---------------------------------------------------------------------- pipes and full disks

PRINTS = "import sys; from data import cli; sys.exit(cli.run(lambda argv: {}))"


def shell(script, **options):
    return subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, cwd=ROOT, **options
    )


def test_a_closed_pipe_ends_a_command_quietly():
    body = "[print(i) for i in range(100000)]"
    done = shell(f"{sys.executable} -c '{PRINTS.format(body)}' | head -1; echo ${{PIPESTATUS[0]}}")
    assert done.stdout == f"0\n{128 + signal.SIGPIPE}\n" and not done.stderr


def test_help_into_a_closed_pipe():
    done = shell(f"{sys.executable} train.py --help | head -1; echo ${{PIPESTATUS[0]}}")
    assert done.stdout.endswith("\n0\n") and "Traceback" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_standard_output():
    done = shell(f"{sys.executable} -c '{PRINTS.format('print(1)')}' > /dev/full")
    assert done.returncode == 1
    assert done.stderr == "standard output: No space left on device\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_line_for_a_full_disk_names_the_file():
    def main(argv):
        write_line(open("/dev/full", "a", encoding="utf-8", buffering=1), "text")

    status, _, err = run_guarded(main)
    assert (status, err) == (1, "/dev/full: No space left on device\n")


def test_closed_descriptors_are_not_given_to_files(tmp_path):
    body = f'open("{tmp_path}/x", "w").fileno() > 2 or 9'
    script = PRINTS.format(body).replace('"', '\\"')
    done = shell(f'{sys.executable} -c "{script}" >&- 2>&- <&-')
    assert done.returncode == 1  # True


# --------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    "script, args, message",
    [
        ("sample", ["x", "--prompt=a", "--temperature=1e-45"], "--temperature: must be 0 (greedy)"),
        ("sample", ["x", "--prompt=a", "--temperature=1e9"], "--temperature: must be 0 (greedy)"),
        ("sample", ["x", "--prompt=a", "--temperature=nan"], "--temperature: must be at least 0"),
        ("sample", ["x", "--prompt=a", "--top_p=1e-300"], "--top_p: must be at least 1e-06"),
        ("sample", ["x", "--prompt=a", "--seed=18446744073709551616"], "--seed: must be at most"),
        ("eval", ["a=x@1e-40"], "the temperature must be 0 (greedy)"),
        ("eval", ["a=x", "--seed=18446744073709551616"], "--seed: must be at most"),
        (
            "data.jsonl.prepare",
            ["x", "--out=o", "--val_share=nan"],
            "--val_share: must be at least",
        ),
        ("data.jsonl.prepare", ["x", "--out=o", "--val_share=2"], "--val_share: must be at most 1"),
        (
            "data.jsonl.prepare",
            ["x", "--out=o", "--vocab_size=1"],
            "--vocab_size: must be at least",
        ),
        ("data.nectar.prepare", ["--val_share=-1"], "--val_share: must be at least 0"),
        ("data.fineweb.prepare", ["--tokens=-1"], "--tokens: must be at least 0"),
        ("data.addition.prepare", ["--below=0"], "--below: must be at least 1"),
        ("tools.show", ["x", "--row=-1"], "--row: must be at least 0"),
        ("tools.show", ["x", "--block_size=0"], "--block_size: must be at least 1"),
    ],
)
def test_ranges_of_arguments(script, args, message):
    done = command(script, *args)
    assert done.returncode == 1 and message in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1


def test_more_new_tokens_than_fit(tiny_runs):
    done = command("sample", tiny_runs["sft"], "--prompt=a", "--max_new_tokens=1000000000")
    assert done.returncode == 0 and done.stdout


# ----------------------------------------------------------------------------------- files


def test_outputs_are_regular_files_and_no_inputs(tmp_path):
    path = tmp_path / "input"
    path.write_text("kept")
    for name, make in {
        "link": lambda p: os.symlink(path, p),
        "dangling": lambda p: os.symlink(tmp_path / "nothing", p),
        "folder": os.mkdir,
        "pipe": os.mkfifo,
    }.items():
        make(tmp_path / name)
        with pytest.raises(SystemExit, match="neither followed nor replaced"):
            check_output(str(tmp_path / name))
        with pytest.raises(SystemExit), atomic_write(str(tmp_path / name)) as f:
            f.write("lost")
    with pytest.raises(SystemExit, match="neither followed nor replaced"):
        check_output("/dev/null")
    os.link(path, tmp_path / "hard")
    with pytest.raises(SystemExit, match="is what this command reads"):
        check_output(str(tmp_path / "hard"), [str(path)])
    os.link(path, tmp_path / "out.tmp")
    with pytest.raises(SystemExit, match="out.tmp is what this command reads"):
        check_output(str(tmp_path / "out"), [str(path)])
    check_output(str(tmp_path / "new"), [str(path)])
    assert path.read_text() == "kept"


def test_no_output_becomes_a_file_of_a_run_or_of_data(tiny_runs, tiny_data):
    """Not into a checkpoint or a round's folder at all; elsewhere not the names that these have."""
    run = tiny_runs["sft"]
    step = checkpoint.latest(run)
    for path in (
        f"{step}/meta.json",
        f"{step}/report.html",
        f"{step}/optimizer/x",
        f"{run}/metrics.jsonl",
        f"{run}/teacher_val.jsonl",
        f"{tiny_data}/val.jsonl",
    ):
        with pytest.raises(SystemExit, match="would be a file of a run or of data"):
            check_output(path)
    check_output(f"{run}/report.html")
    check_output(f"{tiny_data}/teacher.jsonl")
    check_output(f"{tiny_data}/val.jsonl", is_data=True)
    with pytest.raises(SystemExit, match="manifest.json is there"):
        check_output(f"{step}/meta.json", is_data=True)


@pytest.mark.parametrize(
    "script, arguments",
    [
        ("tools.report.__main__", ["RUN", "--out=STEP/meta.json"]),
        ("sample", ["RUN", "--prompts=DATA/val.jsonl", "--out=STEP/model.safetensors"]),
        ("sample", ["RUN", "--prompts=DATA/val.jsonl", "--out=DATA/train.jsonl"]),
        ("data.jsonl.prepare", ["DATA/val.jsonl", "--out=STEP", "--tokenizer=bpe"]),
        ("data.shakespeare.prepare", ["DATA/val.jsonl", "--out=STEP"]),
        ("data.addition.prepare", ["--out=STEP", "--rows=20"]),
        ("data.tldr.prepare", ["--out=STEP", "--hub=DATA"]),
    ],
)
def test_commands_write_into_no_checkpoint(tiny_runs, tiny_data, script, arguments):
    step = checkpoint.latest(tiny_runs["sft"])
    before = {name: os.stat(f"{step}/{name}").st_mtime_ns for name in os.listdir(step)}
    for name, path in (("RUN", tiny_runs["sft"]), ("STEP", step), ("DATA", tiny_data)):
        arguments = [text.replace(name, path) for text in arguments]
    done = command(script, *arguments)
    assert done.returncode == 1
    assert "would be a file of a run or of data" in done.stderr
    assert before == {name: os.stat(f"{step}/{name}").st_mtime_ns for name in os.listdir(step)}


def test_commands_do_not_overwrite_what_they_read(tiny_runs, tiny_data, tmp_path):
    rows = tmp_path / "train.jsonl"
    rows.write_text('{"prompt": "a", "responses": ["b"]}\n')
    copy = tmp_path / "metrics.jsonl"
    os.symlink(rows, copy)
    run = tiny_runs["sft"]
    for script, args in [
        ("sample", [run, "--prompts", rows, "--out", rows]),
        ("sample", [run, "--prompts", rows, "--out", copy]),
        ("data.jsonl.prepare", [rows, f"--out={tmp_path}"]),
        ("data.shakespeare.prepare", [rows, f"--out={tmp_path}"]),
        ("eval", [f"val={run}", f"--data={tiny_data}", f"--out={tiny_data}"]),
        ("tools.report", [run, f"--out={run}/metrics.jsonl"]),
        ("tools.plot", ["table", os.path.dirname(run), run]),
        ("tools.plot", ["loss", tmp_path / "link.png", f"a={run}"]),
    ]:
        if script == "data.shakespeare.prepare":
            os.rename(rows, tmp_path / "train.bin")
            args[0] = tmp_path / "train.bin"
        os.path.lexists(tmp_path / "link.png") or os.symlink(rows, tmp_path / "link.png")
        module = f"{script}.__main__" if script == "tools.report" else script
        done = command(module, *args)
        assert done.returncode == 1, (script, args)
        messages = ("reads; choose", "neither followed", "data folder; give another")
        assert any(message in done.stderr for message in messages), done.stderr
        if script == "data.shakespeare.prepare":
            os.rename(tmp_path / "train.bin", rows)
        assert rows.read_text() == '{"prompt": "a", "responses": ["b"]}\n'


def test_bounds_of_json(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    path.write_text("[" * 100_000)
    with pytest.raises(SystemExit, match="is not JSON"):
        read_json(str(path))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SystemExit, match="not a regular file"):
        read_json(str(tmp_path / "pipe"))
    monkeypatch.setattr("data.files.MAX_TEXT_BYTES", 1000)
    with pytest.raises(SystemExit, match="100,000 bytes; at most 1,000"):
        read_json(str(path))
