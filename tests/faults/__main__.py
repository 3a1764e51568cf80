"""The fault harness: what is promised of a run that is killed, starved, misled or lied to, each with its count.

    make test-faults                                        everything, at most 20 minutes on 2 cores
    python -m tests.faults --seed=2 bitwise faults          some sections
    python -m tests.faults --short                          a sample of each, as `make test` runs it

A line a section; what failed stands below it, and the exit status is 1 if anything did.
"""

import argparse
import os
import sys
import tempfile
import time

from tests.faults import kills, refusals, scale
from tests.faults.harness import ROOT, Place

SECTIONS = [
    kills.bitwise,
    kills.faults,
    kills.soak,
    kills.saves,
    kills.restarts,
    scale.nodes,
    kills.exits,
    kills.corruption,
    kills.disks,
    refusals.inputs,
    refusals.payloads,
    scale.differing,
    scale.figures,
    scale.golden,
    scale.ranks,
    scale.ways,
    scale.memory,
    scale.pause,
]

LONG = [
    kills.restarts,
    scale.ranks,
    scale.pause,
]  # not in a short run: test_parallel.py has a restart


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sections",
        nargs="*",
        choices=[[], *(s.__name__ for s in SECTIONS)],
        metavar="section",
        help=", ".join(s.__name__ for s in SECTIONS) + "; none: all",
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="of the places where runs are killed and files damaged"
    )
    parser.add_argument("--short", action="store_true", help="a sample of each section")
    parser.add_argument(
        "--write-golden", action="store_true", help="keep the losses as they are now in golden.json"
    )
    args = parser.parse_args(argv)
    os.chdir(ROOT)
    wrong, began = 0, time.time()
    with tempfile.TemporaryDirectory() as folder:
        place = Place(folder, args.seed)
        tempfile.tempdir = folder
        if args.write_golden:
            return print(scale.golden(place, False, write=True)[3])
        for section in SECTIONS:
            if (
                args.sections
                and section.__name__ not in args.sections
                or args.short
                and not args.sections
                and section in LONG
            ):
                continue
            start_of = time.time()
            held, tried, failed, note = section(place, args.short)
            print(
                f"{section.__name__:<12} {held:>4} of {tried:<4} {section.__doc__}{f' ({note})' if note else ''} [{time.time() - start_of:.0f} s]",
                flush=True,
            )
            for line in failed:
                print(f"    {line}", flush=True)
            wrong += len(failed)
    print(
        f"seed {args.seed}: {'everything held' if not wrong else f'{wrong} did not hold'}, {time.time() - began:.0f} s"
    )
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
