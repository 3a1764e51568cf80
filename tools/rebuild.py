"""Make a round of stage preference or spin again from its manifest, and compare the two.

    python -m tools.rebuild out/demo/spin_k3/round_1 --out=out/again

The manifest (collect.json) has the settings, the library versions, and the sha256 of every input
and output file. On a CPU the files of the rebuilt round are the same bit for bit.
"""

import itertools
import os
import shutil
import sys
from dataclasses import replace

import numpy as np

from data import cli
from data.files import read_arrays, read_json, sha256
from model import GPT, GPTConfig
from nanospin import checkpoint, config, distributed, elastic, inputs, lock, metrics_logger
from nanospin.config import is_function, is_scored
from nanospin.rounds import input_files, read_manifest, reference_checkpoint
from rollout import collect, prepare_teacher
from train import build_model, resolve_model

MANIFEST = {
    "round": int,
    "config": dict,
    "tokenizer": str,
    "made_of": dict,
    "made_by": dict,
    "files": dict,
    "sha256": str,
}


def rebuild(folder: str, out: str, overrides: dict, base: str | None = None) -> None:
    """Make the round in the folder RUN/round_R again in `out`, and compare their files.

    overrides: settings that differ from the manifest's, such as the new path of a moved input.
    base: with LoRA, the new path of the run's init.
    Exits with the first input, or the first output file, that is not the original.
    """
    run = os.path.normpath(os.path.join(folder, ".."))
    advice = "; expected the folder of a round of stage preference or spin"
    manifest = read_manifest(folder, MANIFEST, advice)
    round_id = manifest["round"]
    cfg = load_config(manifest, run, overrides)

    device = distributed.setup_device(cfg)
    elastic.join_process_group(device, cfg.timeout)
    dtype = distributed.compute_dtype(cfg, device)
    distributed.run_on_rank0(take_folder, out)

    if round_id and "init" not in overrides and not checkpoint.latest(run, round_id - 1):
        raise SystemExit(
            f"{run} has no checkpoint of round {round_id - 1} any more, which this round started "
            "from; pass a copy of it as --init"
        )
    reference = overrides.get("init") or reference_checkpoint(cfg, round_id)
    if is_scored(cfg) and is_function(cfg.ranked_by):
        if "ranked_by" not in overrides:  # the manifest is data, so it does not import anything
            raise SystemExit(
                f"the function {cfg.ranked_by} ranked this round; to import it, pass "
                f"--ranked_by={cfg.ranked_by}"
            )
        check_function(cfg.ranked_by, manifest)
    base = base or manifest["config"]["init"]
    for name, path in input_files(replace(cfg, init=base), round_id, reference).items():
        check_input(name, path, manifest)
        if name.startswith("round_") and distributed.rank() == 0:
            os.makedirs(os.path.join(out, os.path.dirname(name)), exist_ok=True)
            shutil.copy(path, os.path.join(out, name))
    reference = checkpoint.resolve(reference)
    if checkpoint.read_meta(reference)["tokenizer_sha256"] != manifest["tokenizer"]:
        raise SystemExit(f"{reference} has a different tokenizer from the round's")
    print_on_rank0(version_warning(manifest, metrics_logger.versions(device, dtype)))

    cfg = replace(cfg, init=reference, out_dir=out)
    model_config, enc, _, path = resolve_model(cfg, GPT)
    if cfg.stage == "spin":
        prepare_teacher(cfg, enc, model_config.block_size, device)
    if cfg.lora_rank and round_id:  # the policy is an adapter of the run's init
        model = build_model(
            replace(cfg, init=base), GPT, model_config, path, device, dtype, resumes=True
        )
    else:
        model = build_model(cfg, GPT, model_config, path, device, dtype)
    collect(cfg, round_id, model, enc, device, print_on_rank0)

    names = compare_files(manifest, folder, os.path.join(out, f"round_{round_id}"))
    print_on_rank0(f"identical, bit for bit: {', '.join(names)}")


def load_config(manifest, run, overrides):
    """The settings that the round was made with, dtype included, and the overrides."""
    settings = dict(manifest["config"])
    settings |= settings.pop("model", {})
    settings["dtype"] = str(manifest["made_by"].get("dtype")).removeprefix("torch.")
    settings["out_dir"] = run
    settings |= overrides
    argv = [f"--{name}={value}" for name, value in settings.items() if value is not None]
    return config.load(argv, GPTConfig)


def take_folder(path):
    """Make a folder and take its lock, so that two commands do not write there at once."""
    if os.path.exists(path) and (not os.path.isdir(path) or set(os.listdir(path)) - {"lock"}):
        raise SystemExit(f"--out {path} must be a new or an empty folder")
    os.makedirs(path, exist_ok=True)
    lock.acquire(path)


def check_input(name, path, manifest):
    """Exit if an input file of the round is missing or has changed."""
    if not os.path.exists(path):
        raise SystemExit(
            f"{path}, the round's {name}, is missing; if it has moved, pass its path"
            " as --init, --base, --data, --teacher or --ranked_by"
        )
    expected = manifest["made_of"].get(name)
    found = checkpoint.weights_sha256(path)
    if found != expected:
        raise SystemExit(
            f"{path} is not the {name} that the round was made from: its sha256 is {found[:16]}...,"
            f" the manifest has {str(expected)[:16]}..."
        )


def check_function(name: str, manifest):
    """Exit if the function that ranked the round has another source now."""
    found = inputs.source_sha256(name)
    expected = manifest["made_of"].get("ranked_by")
    if found != expected:
        raise SystemExit(
            f"{name} is not the function that ranked the round: the sha256 of its source is "
            f"{str(found)[:16]}..., the manifest has {str(expected)[:16]}..."
        )


def version_warning(manifest, versions):
    """A line about libraries and hardware that differ from the manifest's, or ""."""
    made_by = manifest["made_by"]
    changed = []
    for name, value in versions.items():
        if made_by.get(name) != value:
            changed.append(f"{name} {made_by.get(name)!r} (now {value!r})")
    if not changed:
        return ""
    return (
        f"warning: the round was made with {', '.join(changed)};"
        " last digits may differ, and then samples too"
    )


def print_on_rank0(text):
    if text and distributed.rank() == 0:
        print(text, flush=True)


def compare_files(manifest, folder, rebuilt_folder):
    """The names of the round's files, in the order of `collect`. Exits at the first difference."""
    expected = manifest["files"]
    found = read_json(os.path.join(rebuilt_folder, "collect.json"), ("files",))["files"]

    def order(name):
        return "val" in name, "ref" in name, "self" not in name

    names = sorted(expected, key=order)
    for name in names:
        if found.get(name) == expected[name]:
            continue
        old = os.path.join(folder, name)
        new = os.path.join(rebuilt_folder, name)
        if not os.path.exists(new):
            detail = ": it was not made"
        elif os.path.exists(old) and sha256(old) == expected[name]:
            detail = first_difference(old, new)
        else:
            detail = f" (the original {old} is missing or changed, so no line can be named)"
        raise SystemExit(f"{new} is the first file that differs{detail}")
    return names


def first_difference(old, new):
    """Where an original file and the rebuilt one start to differ, to append to a message."""
    if old.endswith(".npz"):
        return first_different_number(read_arrays(old)["refs"], read_arrays(new)["refs"])
    with open(old, encoding="utf-8") as f, open(new, encoding="utf-8") as g:
        for number, (a, b) in enumerate(itertools.zip_longest(f, g, fillvalue=""), 1):
            if a != b:
                start = max(0, len(os.path.commonprefix([a, b])) - 20)
                excerpt = slice(start, start + 60)
                return f": line {number}, {b[excerpt]!r}, originally {a[excerpt]!r}"
    return ""


def first_different_number(old, new):
    """The same for arrays of log-probabilities (rows, K)."""
    if old.shape != new.shape:
        return f": it has shape {new.shape}, originally {old.shape}"
    different = np.argwhere(old != new).tolist()
    if not different:
        return ": its numbers are the same, but they belong to different rows"
    row, response = different[0]
    return (
        f": row {row}, response {response}: {new[row, response]}, originally {old[row, response]};"
        f" {len(different)} numbers differ"
    )


def main(argv):
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("round", metavar="RUN/round_R", help="the folder of the round")
    parser.add_argument("--out", required=True, help="folder for the rebuilt round: new or empty")
    parser.add_argument("--init", help="the policy that the round started from, if it has moved")
    parser.add_argument("--base", help="with lora_rank, the init of the run, if it has moved")
    parser.add_argument("--data", help="the data folder, if it has moved")
    parser.add_argument("--teacher", help="the teacher, if it has moved")
    parser.add_argument(
        "--ranked_by",
        help="module:function, if a function ranked; the reward model or judge, if it has moved",
    )
    parser.add_argument("--device", help="cpu or cuda, if not the original one")
    args = parser.parse_args(argv)
    overrides = {}
    for name in ("init", "data", "teacher", "ranked_by", "device"):
        if getattr(args, name):
            overrides[name] = getattr(args, name)
    try:
        rebuild(args.round, args.out, overrides, args.base)
    finally:
        lock.release()


if __name__ == "__main__":
    sys.exit(elastic.run(main, sys.argv[1:]))
