"""Save, load and resume: everything that writes or reads weights.

A checkpoint is a folder RUN/round_R/step_S:

    model.safetensors     the full model in float32, for sampling, evaluation and later stages
    optimizer/            the optimizers' state: torch.distributed.checkpoint, one file per rank
    meta.json             round, step, model config, config, tokenizer, validation metrics
    tokenizer.tiktoken    if the tokenizer was trained here; tokenizer.json and
                          tokenizer_config.json if it is another model's
    manifest.json         sha256 and size of every file, written last

It is written as RUN/round_R/writing_S and renamed when it is complete. No file is a pickle.
Training continues while a checkpoint is written, as soon as the tensors are copied to the CPU.
"""

import copy
import hashlib
import json
import math
import os
import re
import shutil
import typing
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from data import tokenizer
from data.files import printable, sha256, write_json
from data.template import is_template
from nanospin import config, distributed

FORMAT = 2  # of the folder; meta.json has it

# The fields of meta.json besides "format", and their types.
META = {
    "round": int,
    "step": int,
    "model": dict,
    "config": dict,
    "metrics": dict,
    "history": dict,
    "tokenizer": str,
    "tokenizer_sha256": str,
    "weights_sha256": str,
}
# The settings in its "config" that later stages and the tools use.
CONFIG_FIELDS = ("stage", "template", "max_prompt", "max_response")
TOKENIZERS = ("gpt2", "bytes", "tokenizer.tiktoken", "tokenizer.json")

SAFETENSORS_DTYPE = {torch.float32: "F32", torch.bfloat16: "BF16"}

# What reading a JSON file with unexpected content can raise.
BAD_FILE_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)

save_thread = ThreadPoolExecutor(1, thread_name_prefix="save")


# ----------------------------------------------------------------------------------------- saving


class Saver:
    """Saves a run's checkpoints in the background, one at a time."""

    def __init__(self, cfg, enc, tokenizer_name: str, log):
        self.cfg = cfg
        self.enc = enc
        self.tokenizer_name = tokenizer_name
        self.log = log
        self.pending = None  # the Future of the save that may still be running

    def save(self, round_id, step, model, optimizers, metrics: dict, history: dict):
        """Wait for the previous save, then start to save this step; see the function `save`."""
        self.wait(round_id, step)
        self.pending = save(
            self.cfg.out_dir,
            round_id,
            step,
            model,
            optimizers,
            cfg=self.cfg,
            enc=self.enc,
            tokenizer_name=self.tokenizer_name,
            metrics=metrics,
            history=history,
        )

    def wait(self, round_id: int, step: int, last: bool = False):
        """Wait for the previous save. If it failed, log a warning; exit if it was the last one."""
        error = wait_for_save(self.pending)
        self.pending = None
        if error and last:
            raise SystemExit(
                f"the checkpoint at round {round_id} step {step} could not be saved ({error}); "
                f"the latest checkpoint is {latest(self.cfg.out_dir)}"
            )
        if error:
            text = f"the previous checkpoint could not be saved ({error}); training continues"
            self.log.warning(round_id, step, text)


def save(
    run,
    round_id,
    step,
    model,
    optimizers,
    *,
    cfg,
    enc,
    tokenizer_name: str,
    metrics: dict,
    history: dict,
) -> Future:
    """Start to write RUN/round_R/step_S, with everything that resuming needs. Afterwards remove the
    round's earlier checkpoints, except those that `keep_last` and `keep_best` keep.

    metrics: validation metrics of this step, {} if there was no evaluation.
    history: what the training loop remembers of earlier steps.
    Returns a Future for `wait_for_save`.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    options = StateDictOptions(cpu_offload=not on_cpu)
    weights, optimizer_states = get_state_dict(model, optimizers, options=options)
    tensors = {"model": weights, "optimizer": state_tensors(optimizer_states)}
    if on_cpu:  # not copied yet, and the next step will change them
        for part, named in tensors.items():
            tensors[part] = {name: t.detach().clone() for name, t in named.items()}
    meta = {
        "round": round_id,
        "step": step,
        "model": asdict(model.config),
        "config": asdict(cfg),
        "metrics": metrics,
        "history": copy.deepcopy(history),
        "tokenizer": tokenizer.file_name(enc, tokenizer_name),
        "tokenizer_sha256": tokenizer.fingerprint(enc),
    }
    path = os.path.join(run, f"round_{round_id}", f"step_{step:06d}")
    return save_thread.submit(write, path, tensors, meta, enc, cfg)


def wait_for_save(saving: Future | None) -> str:
    """Wait for a save. Returns, on every rank, the error of the first rank that has one, or ""."""
    error = saving.result() if saving else ""
    return first_nonempty(distributed.all_gather_object(error))


def first_nonempty(texts: list[str]) -> str:
    for text in texts:
        if text:
            return text
    return ""


def write(path, tensors, meta, enc, cfg) -> str:
    """The part of a save that runs in the background. Returns an error text, or ""."""
    staging = sibling_path(path, "writing")
    try:
        write_tensors(tensors["model"], staging, enable_consolidation=True)
        write_tensors(tensors["optimizer"], os.path.join(staging, "optimizer"))
        if distributed.rank() == 0:
            # DCP has put the ranks' files together in this one.
            consolidated = os.path.join(staging, "model-00001-of-00001.safetensors")
            os.rename(consolidated, os.path.join(staging, "model.safetensors"))
            os.remove(os.path.join(staging, "model.safetensors.index.json"))
            shutil.rmtree(os.path.join(staging, "sharded"))
            if meta["tokenizer"] not in ("gpt2", "bytes"):
                tokenizer.save(enc, os.path.join(staging, meta["tokenizer"]))
            publish(staging, path, meta)
            prune_steps(os.path.dirname(path), cfg)
        return ""
    except (OSError, SafetensorError, dcp.CheckpointException, RuntimeError) as e:
        if distributed.rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
        error = e
        if isinstance(e, dcp.CheckpointException) and e.failures:
            error, _traceback = next(iter(e.failures.values()))  # the first rank's
        return f"{type(error).__name__}: {error}".splitlines()[0]


def write_tensors(tensors, folder, **options):
    """Write {name: tensor} with torch.distributed.checkpoint, each rank its part."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # DCP warns that there is one process
        dcp.save(
            tensors,
            storage_writer=HuggingFaceStorageWriter(folder, save_distributed=True, **options),
            process_group=distributed.process_groups.get("saves"),
            no_dist=distributed.world_size() == 1,
        )


def publish(staging, path, meta):
    """Write meta.json and manifest.json into a folder that has the other files of a checkpoint, and
    rename it to `path`."""
    weights = os.path.join(staging, "model.safetensors")
    meta = {"format": FORMAT} | meta | {"weights_sha256": sha256(weights)}
    write_json(os.path.join(staging, "meta.json"), meta)
    manifest = {}
    for name in list_files(staging):
        file = os.path.join(staging, name)
        manifest[name] = {"sha256": sha256(file), "bytes": os.path.getsize(file)}
    write_json(os.path.join(staging, "manifest.json"), manifest)
    if os.path.exists(path):
        remove_checkpoint(path)
    os.rename(staging, path)


def write_safetensors(path, tensors, dtype=torch.float32):
    """Write a .safetensors file with one tensor in memory at a time.

    tensors: {name: (shape, function that returns the float32 tensor)}. They are rounded to dtype.
    """
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, _) in tensors.items():
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {
            "dtype": SAFETENSORS_DTYPE[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for shape, make in tensors.values():
            tensor = make()
            assert tensor.shape == tuple(shape) and tensor.dtype == torch.float32
            f.write(tensor.to(dtype).contiguous().view(torch.uint8).numpy().data)


def state_tensors(optimizer_states) -> dict:
    """{"parameter.key": tensor} of an optimizer's state dict. The rest of it, the param_groups, is
    made from the config again."""
    tensors = {}
    for name, state in optimizer_states["state"].items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{name}.{key}"] = value
    return tensors


# ---------------------------------------------------------------------------------------- loading


def resume(path, model, optimizers):
    """Load the optimizers' state from a checkpoint, which may be from another number of ranks. The
    weights are loaded by `load_weights`."""
    weights, states = get_state_dict(model, optimizers)
    tensors = state_tensors(states)
    folder = os.path.join(path, "optimizer")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            for name in os.listdir(folder):
                if name.endswith(".safetensors"):
                    # Fail here if it cannot be read: DCP would print a traceback.
                    with safe_open(os.path.join(folder, name), framework="pt"):
                        pass
            dcp.load(
                tensors,
                storage_reader=HuggingFaceStorageReader(folder),
                no_dist=distributed.world_size() == 1,
            )
        # CheckpointException is a BaseException: `except Exception` would miss it.
        except (dcp.CheckpointException, SafetensorError, OSError) as e:
            raise SystemExit(
                f"{folder} cannot be read ({type(e).__name__}); "
                f"remove {path} to continue from the checkpoint before it"
            )
    for name, state in states["state"].items():
        for key in state:
            if isinstance(state[key], torch.Tensor):
                state[key] = tensors[f"{name}.{key}"]
    set_state_dict(model, optimizers, model_state_dict=weights, optim_state_dict=states)


def load_weights(path, model):
    """Fill a GPT, sharded or not, from a checkpoint's model.safetensors, one tensor at a time. A
    scalar head that only the model has is set to 0; one that only the file has is ignored."""
    file = os.path.join(path, "model.safetensors")
    if sha256(file) != read_meta(path)["weights_sha256"]:
        raise SystemExit(f"{file} is damaged: its sha256 is not the one in meta.json")
    params = dict(model.named_parameters())
    try:
        with safe_open(file, framework="pt") as f:
            names = set(f.keys())
            differing = [n for n in names ^ set(params) if not n.startswith("scalar_head.")]
            if differing:
                raise SystemExit(
                    f"{file} has other tensors than the model: {sorted(differing)[:3]}"
                )
            for name, p in params.items():
                tensor = f.get_tensor(name) if name in names else torch.zeros(p.shape)
                if tensor.shape != p.shape:
                    raise SystemExit(
                        f"{file}: {name} has shape {tuple(tensor.shape)}, "
                        f"the model needs {tuple(p.shape)}"
                    )
                distributed.copy_parameter_(p, tensor)
    except SafetensorError as e:
        raise SystemExit(f"{file} cannot be read ({e})")


def read_meta(path) -> dict:
    """Read a checkpoint's meta.json. Exits with one line if it is damaged or of another format.

    The fields of "model" are not checked here: see config.model_config_from.
    """
    file = f"{path}/meta.json"
    try:
        with open(os.path.join(path, "meta.json"), "rb") as f:
            text = f.read()
        with open(os.path.join(path, "manifest.json"), encoding="utf-8") as f:
            manifest = json.load(f)
        if hashlib.sha256(text).hexdigest() != manifest["meta.json"]["sha256"]:
            raise SystemExit(f"{file} is damaged: its sha256 is not the one in manifest.json")
        meta = json.loads(text)
        if meta.get("format") != FORMAT:
            raise SystemExit(
                f"{path} was written by another version of nanoSPIN and cannot be read by this one"
            )
        check_meta(meta, file)
    except BAD_FILE_ERRORS as e:
        raise SystemExit(printable(f"{file} cannot be read ({type(e).__name__}: {e})"))
    return meta


def check_meta(meta: dict, where: str):
    """Check the types of meta.json's fields, its tokenizer and its template."""
    for name, expected in META.items():
        config.convert(name, meta[name], expected, where)
    hints = typing.get_type_hints(config.Config)
    for name in CONFIG_FIELDS:
        config.convert(name, meta["config"][name], hints[name], where)
    if meta["tokenizer"] not in TOKENIZERS:
        raise ValueError(f"tokenizer {meta['tokenizer']!r}")
    if not is_template(meta["config"]["template"]):
        raise ValueError(f"template {meta['config']['template']!r}")


def weights_sha256(path) -> str:
    """sha256 of a file, or of the weights of a run or checkpoint."""
    if os.path.isdir(path):
        return read_meta(resolve(path))["weights_sha256"]
    return sha256(path)


def read_tokenizer(path, meta):
    """A checkpoint's tokenizer."""
    name = meta["tokenizer"]
    enc = tokenizer.load(name if name in ("gpt2", "bytes") else os.path.join(path, name))
    if tokenizer.fingerprint(enc) != meta["tokenizer_sha256"]:
        raise SystemExit(
            f"{path}: the tokenizer {name} is not the one that the checkpoint was trained with"
        )
    return enc


# ---------------------------------------------------------------------------- finding checkpoints


def list_steps(folder) -> list[str]:
    """The checkpoints in a round's folder, oldest first."""
    if not os.path.isdir(folder):
        return []
    names = [name for name in os.listdir(folder) if re.fullmatch(r"step_\d+", name)]
    return [os.path.join(folder, name) for name in sorted(names)]


def latest(run, round_id: int | None = None) -> str | None:
    """The latest checkpoint of a run, or of one of its rounds."""
    if not os.path.isdir(run):
        return None
    rounds = []
    for name in os.listdir(run):
        if re.fullmatch(r"round_\d+", name):
            rounds.append(int(name.removeprefix("round_")))
    for r in sorted(rounds, reverse=True):
        if round_id is None or round_id == r:
            paths = list_steps(os.path.join(run, f"round_{r}"))
            if paths:
                return paths[-1]
    return None


def resolve(path) -> str:
    """A run folder, a round's folder or a checkpoint -> the checkpoint. Exits if there is none."""
    steps = list_steps(path)
    for candidate in (path, latest(path), steps[-1] if steps else None):
        if candidate and is_checkpoint(candidate):
            return candidate
    command = config.command_for_run(path)
    if command:
        raise SystemExit(f"{path}: no checkpoint found; make it with: {command}")
    raise SystemExit(
        f"{path}: no checkpoint found; give the out_dir of a run, or a folder round_R/step_S in it"
    )


def is_checkpoint(path) -> bool:
    names = ("meta.json", "model.safetensors")
    return all(os.path.exists(os.path.join(path, name)) for name in names)


def latest_valid(run) -> str | None:
    """The latest checkpoint of a run whose files are as they were saved. Damaged ones are reported
    and renamed to damaged_S. All ranks call this together."""
    while path := distributed.broadcast_from_rank0(latest(run)):
        problem = find_corruption(path)
        if not problem:
            return path
        damaged = sibling_path(path, "damaged")
        if distributed.rank() == 0:
            print(
                f"{path} is damaged: {problem}; "
                f"renamed to {damaged}, looking for the checkpoint before it",
                flush=True,
            )
            shutil.rmtree(damaged, ignore_errors=True)
            os.rename(path, damaged)
        distributed.barrier()
    return None


def find_corruption(path) -> str:
    """What is wrong with a checkpoint's files, in one line, or "". Each rank reads a share of the
    files; all get the result."""
    try:
        problem = find_own_corruption(path)
    except BAD_FILE_ERRORS as e:
        problem = f"its manifest.json or a file cannot be read ({type(e).__name__}: {e})"
    return first_nonempty(distributed.all_gather_object(printable(problem)))


def find_own_corruption(path) -> str:
    """`find_corruption` for this rank's share of the files."""
    with open(os.path.join(path, "manifest.json"), "rb") as f:
        text = f.read()
    manifest = json.loads(text)
    if text.decode() != json.dumps(manifest, indent=1, ensure_ascii=False) + "\n":
        return "manifest.json was altered"
    names = sorted(manifest)
    if names != list_files(path):
        differing = sorted(set(names) ^ set(list_files(path)))
        return f"its files are not those in manifest.json ({', '.join(differing)})"
    for name in names[distributed.rank() :: distributed.world_size()]:
        file = os.path.join(path, name)
        if os.path.getsize(file) != manifest[name]["bytes"]:
            return f"the size of {name} is not the one in manifest.json"
        if sha256(file) != manifest[name]["sha256"]:
            return f"the sha256 of {name} is not the one in manifest.json"
    with open(os.path.join(path, "meta.json"), encoding="utf-8") as f:
        meta = json.load(f)
    folders = os.path.abspath(path).split(os.sep)[-2:]
    if folders != [f"round_{meta['round']}", f"step_{meta['step']:06d}"]:
        return f"its meta.json is of round {meta['round']!r} step {meta['step']!r}"
    return ""


def list_files(path) -> list[str]:
    """The files of a checkpoint, relative to it and sorted, without manifest.json."""
    files = []
    for folder, _, names in os.walk(path):
        files += [os.path.relpath(os.path.join(folder, name), path) for name in names]
    return sorted(file for file in files if file != "manifest.json")


# ------------------------------------------------------------------------------ removing old ones


def prune_steps(folder, cfg):
    """Remove a round's checkpoints except the last `keep_last` and the best one by `keep_best`."""
    paths = list_steps(folder)
    best = best_checkpoint(paths, cfg.keep_best) if cfg.keep_best else None
    for path in paths[: -cfg.keep_last]:
        if path != best:
            remove_checkpoint(path)


def best_checkpoint(paths, keep_best: str) -> str | None:
    """The checkpoint with the lowest value of the metric `keep_best`, or the highest of "-metric".
    The earlier one wins a tie."""
    highest = keep_best.startswith("-")
    rated = []
    for path in paths:
        value = read_meta(path)["metrics"].get(keep_best.lstrip("-"))
        if value is not None:
            rated.append((-value if highest else value, path))
    return min(rated)[1] if rated else None


def prune_rounds(run, first: int):
    """Remove the checkpoints of the rounds before `first`. Other files of these rounds are kept."""
    if distributed.rank() == 0:
        for round_id in range(first):
            for path in list_steps(os.path.join(run, f"round_{round_id}")):
                remove_checkpoint(path)
    distributed.barrier()


def remove_checkpoint(path):
    """Rename it first, so that a step_S folder is always complete."""
    removing = sibling_path(path, "removing")
    os.rename(path, removing)
    shutil.rmtree(removing)


def sibling_path(path, state: str) -> str:
    """The folder of a checkpoint that is being written or removed, or is damaged: step_000012 ->
    writing_000012, removing_000012, damaged_000012."""
    folder, name = os.path.split(path)
    return os.path.join(folder, name.replace("step", state))
