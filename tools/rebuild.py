"""Make a round of preference or spin again from its manifest, and what that names by hash: bit for bit on a CPU.

python rebuild.py out/demo/spin_k3/round_1 --out=out/again
"""

import argparse
import functools
import itertools
import os
import shutil
import sys
from dataclasses import replace

import numpy as np

from nanospin import checkpoint
from nanospin import config
from nanospin import elastic
from nanospin import metrics_logger
from nanospin import distributed
from data.files import printable, read_arrays, read_json, sha256
from rollout import collect, input_files, reference_checkpoint, with_checksum
from train import build

MANIFEST = {
    "round": int,
    "config": dict,
    "tokenizer": str,
    "made_of": dict,
    "made_by": dict,
    "files": dict,
    "sha256": str,
}


def rebuild(folder, out, given):
    """Make the round of RUN/round_R again in `out`, from its manifest and what that names, and compare. given: {setting: value},
    where that lies now. Ends with a line that names what is not as it was."""
    path, run = os.path.join(folder, "collect.json"), os.path.normpath(os.path.join(folder, ".."))
    manifest = read_json(path, MANIFEST, "; it takes the folder of a round of preference or spin")
    for name, kind in MANIFEST.items():
        config.convert(name, manifest[name], kind, path)
    if (
        with_checksum({name: value for name, value in manifest.items() if name != "sha256"})
        != manifest
    ):
        raise SystemExit(f"{path} was edited: its sha256 is not that of what it says")
    round_id, by = manifest["round"], manifest["made_by"]
    settings = (
        manifest["config"]
        | {"dtype": str(by.get("dtype")).removeprefix("torch."), "out_dir": run}
        | given
    )
    cfg = config.load(
        [f"--{name}={value}" for name, value in settings.items() if value is not None]
    )
    device = distributed.setup_device(cfg)
    elastic.join_process_group(device, cfg.timeout)
    dtype, say = (
        distributed.compute_dtype(cfg, device),
        functools.partial(print, flush=True) if distributed.rank() == 0 else lambda text: None,
    )
    if distributed.broadcast_from_rank0(
        os.path.exists(out) and (not os.path.isdir(out) or bool(os.listdir(out)))
    ):
        raise SystemExit(f"--out {out} is there already, and no empty folder")

    reference = given.get("init") or reference_checkpoint(cfg, round_id)
    for name, at in input_files(cfg, round_id, reference).items():
        if not os.path.exists(at):
            raise SystemExit(
                f"{at}, the round's {name}, is not there; --init, --data and --teacher say where they lie now"
            )
        if (now := checkpoint.weights_sha256(at)) != manifest["made_of"].get(name):
            raise SystemExit(
                f"{at} is not the {name} that the round was made of: its sha256 is {now[:16]}..., in the manifest {str(manifest['made_of'].get(name))[:16]}..."
            )
        if name.startswith("round_") and distributed.rank() == 0:
            os.makedirs(os.path.join(out, os.path.dirname(name)), exist_ok=True)
            shutil.copy(at, os.path.join(out, name))
    others = [
        f"{name} {by.get(name)!r}, here {value!r}"
        for name, value in metrics_logger.versions(device, dtype).items()
        if by.get(name) != value
    ]
    if others:
        say(
            f"warning: it was made by {'; '.join(others)}: last digits may differ, and samples after them"
        )

    cfg, reference = replace(cfg, init=reference, out_dir=out), checkpoint.resolve(reference)
    if checkpoint.read_meta(reference)["tokenizer_sha256"] != manifest["tokenizer"]:
        raise SystemExit(f"{reference} has another tokenizer than the round")
    model, enc, _ = build(cfg, device, dtype)
    collect(cfg, round_id, model, enc, device, dtype, say)

    again = os.path.join(out, f"round_{round_id}")
    made = read_json(os.path.join(again, "collect.json"), ("files",))["files"]
    names = sorted(
        manifest["files"], key=lambda name: ("val" in name, "ref" in name, "self" not in name)
    )  # as they are made
    for name in names:
        if made.get(name) != manifest["files"][name]:
            old, new = (os.path.join(at, name) for at in (folder, again))
            there = (
                os.path.exists(new)
                and os.path.exists(old)
                and sha256(old) == manifest["files"][name]
            )
            raise SystemExit(
                f"{new} is the first file that differs"
                + (
                    first_difference(old, new)
                    if there
                    else f" ({old} is not there as it was, to say where)"
                )
            )
    say(f"bit for bit the same: {', '.join(names)}")


def first_difference(old, new):
    """Where a round's own file and the one made again part."""
    if old.endswith(".npz"):
        a, b = read_arrays(old)["refs"], read_arrays(new)["refs"]
        apart = np.argwhere(a != b).tolist() if a.shape == b.shape else []
        return (
            f": row {apart[0][0]}, response {apart[0][1]}: {b[*apart[0]]} for {a[*apart[0]]}, and {len(apart) - 1} more"
            if apart
            else ": it is of other rows"
        )
    with open(old, encoding="utf-8") as f, open(new, encoding="utf-8") as g:
        number, a, b = next(
            (number, a, b)
            for number, (a, b) in enumerate(itertools.zip_longest(f, g, fillvalue=""), 1)
            if a != b
        )
    at = max(0, len(os.path.commonprefix([a, b])) - 20)
    return f": line {number}, {b[at : at + 60]!r} for {a[at : at + 60]!r}"


def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: sys.exit(printable(message))  # one line, without the usage
    parser.add_argument(
        "round",
        metavar="RUN/round_R",
        help="a round's folder; only its collect.json is read, and of RUN what that names",
    )
    parser.add_argument(
        "--out", required=True, help="the folder for the round made again: new, or empty"
    )
    moved = {
        "init": "the policy that the round began with, if it has moved",
        "data": "the data, if it has moved",
        "teacher": "the teacher",
        "device": "cpu or cuda",
    }
    for name, what in moved.items():
        parser.add_argument(f"--{name}", help=what)
    args = parser.parse_args(argv)
    rebuild(
        args.round, args.out, {name: getattr(args, name) for name in moved if getattr(args, name)}
    )


if __name__ == "__main__":
    sys.exit(elastic.run(main, sys.argv[1:]))
