"""The fault tests: runs are killed, starved and given wrong or malicious input.

    make test-faults                                        everything, 27 to 45 minutes on 2 cores
    python -m tests.faults --seed=2 bitwise faults          some sections
    python -m tests.faults --short                          a sample of each section

Prints a line per section: how many cases held, of how many, and what was promised. The cases that
failed are listed below it, and the exit status is 1 if there are any.
"""

import os
import sys
import tempfile
import time

from data import cli
from tests.faults import folders, kills, lasting, payloads, reads, refusals, scale, scored, writes
from tests.faults.harness import ROOT, Workspace

SECTIONS = [
    kills.bitwise,
    kills.faults,
    kills.soak,
    scored.scored,
    scored.scorers,
    scored.damages,
    kills.saves,
    kills.restarts,
    scale.nodes,
    kills.exits,
    kills.corruption,
    kills.disks,
    folders.names,
    folders.writers,
    folders.strays,
    folders.special_files,
    reads.unreadable,
    reads.moves,
    reads.nonfinite,
    writes.syncs,
    writes.millions,
    lasting.signals,
    lasting.memory_slope,
    lasting.environments,
    refusals.inputs,
    payloads.payloads,
    scale.differing,
    scale.figures,
    scale.golden,
    scale.ranks,
    scale.ways,
    scale.memory,
    scale.pause,
]
NAMES = [section.__name__ for section in SECTIONS]
NOT_SHORT = [kills.restarts, scale.ranks, scale.pause]  # they have no short form


def make_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument(
        "sections",
        nargs="*",
        choices=[[], *NAMES],
        metavar="section",
        help=", ".join(NAMES) + "; default: all",
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="decides where runs are killed and files damaged"
    )
    parser.add_argument("--short", action="store_true", help="a sample of each section")
    parser.add_argument(
        "--write-golden",
        action="store_true",
        help="write the losses of section golden, as they are now, to golden.json",
    )
    return parser


def chosen_sections(args) -> list:
    if args.sections:
        return [section for section in SECTIONS if section.__name__ in args.sections]
    if args.short:
        return [section for section in SECTIONS if section not in NOT_SHORT]
    return SECTIONS


def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    os.chdir(ROOT)
    start_time = time.time()
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        workspace = Workspace(folder, args.seed)
        if args.write_golden:
            scale.write_golden(workspace)
            return 0
        for section in chosen_sections(args):
            failures += run_section(section, workspace, args.short)
    outcome = f"{failures} did not hold" if failures else "everything held"
    print(f"seed {args.seed}: {outcome}, {time.time() - start_time:.0f} s")
    return 1 if failures else 0


def run_section(section, workspace: Workspace, short: bool) -> int:
    """Run a section and print its lines. Returns the number of failures."""
    start_time = time.time()
    result = section(workspace, short)
    promise = " ".join(section.__doc__.split())
    note = f" ({result.note})" if result.note else ""
    seconds = time.time() - start_time
    held = f"{result.held:>4} of {result.tried:<4}"
    print(f"{section.__name__:<12} {held} {promise}{note} [{seconds:.0f} s]", flush=True)
    for line in result.failures:
        print(f"    {line}", flush=True)
    return len(result.failures)


if __name__ == "__main__":
    sys.exit(cli.run(main))
