"""Progress bars: lines in a file, a bar in a terminal."""

import io

import pytest

from data.progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """The time that tqdm sees, in a list of one number."""
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def lines_of(file):
    text = file.getvalue()
    assert "\r" not in text
    return text.splitlines()


def test_a_file_gets_lines_at_growing_intervals(clock):
    """After 10 seconds, when the time has doubled, at least every 5 minutes, and at the end."""
    file = io.StringIO()
    for _ in ProgressBar(range(2000), desc="sampling", file=file):
        clock[0] += 1
    lines = lines_of(file)
    assert lines[0] == "sampling: 10 of 2000 in 00:10, 33:10 left"
    counts = [int(line.split()[1]) for line in lines]
    assert counts == [10, 20, 40, 80, 160, 320, 620, 920, 1220, 1520, 1820, 2000]
    assert lines[-1] == "sampling: 2000 of 2000 in 33:20, 00:00 left"


def test_updates_of_many_at_a_time(clock):
    file = io.StringIO()
    bar = ProgressBar(total=100, desc="scoring", file=file)
    for _ in range(4):
        clock[0] += 9
        bar.update(25)
    bar.close()
    bar.close()
    counts = [line.split()[1] for line in lines_of(file)]
    assert counts == ["50", "100", "100"]


def test_what_is_quick_or_hidden_prints_nothing_in_a_file(clock):
    file = io.StringIO()
    for _ in ProgressBar(range(9), desc="quick", file=file):
        clock[0] += 1
    for _ in ProgressBar(range(100), desc="hidden", file=file, hide=True):
        clock[0] += 1
    assert not file.getvalue()


def test_without_a_total(clock):
    file = io.StringIO()
    for _ in ProgressBar(iter(range(11)), desc="rows", unit=" rows", file=file):
        clock[0] += 1
    assert lines_of(file) == ["rows: 10 rows in 00:10", "rows: 11 rows in 00:11"]


def test_a_terminal_gets_a_bar():
    file = Terminal()
    for _ in ProgressBar(range(3), desc="sampling", file=file):
        pass
    assert "\r" in file.getvalue() and "100%|" in file.getvalue()
