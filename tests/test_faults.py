"""A short form of the fault tests (tests/faults). `make test-faults` runs all of them."""

import subprocess
import sys

import pytest


def run_faults(*args):
    command = [sys.executable, "-m", "tests.faults", "--short", *args]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_some_sections():
    run_faults("saves", "inputs", "differing")


@pytest.mark.slow
def test_a_sample_of_every_section():
    run_faults()
