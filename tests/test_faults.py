"""A sample of the fault harness (tests/faults); `make test-faults` runs all of it."""

import subprocess
import sys


def test_a_sample_of_the_fault_harness():
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", "--short"], capture_output=True, text=True
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
