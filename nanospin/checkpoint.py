"""Save, load, resume: all that writes or reads weights.

A checkpoint is a folder RUN/round_R/step_S, written beside and renamed into place, so it is whole or absent:
    model.safetensors     the whole model, float32, to hand on: sampling, evaluation, the next stage, a teacher
    optimizer/            torch.distributed.checkpoint of the optimizer's state in safetensors, a file a rank
    meta.json             round, step, model shape, config, tokenizer, held-out figures
    tokenizer.tiktoken    where the tokenizer is a trained one; tokenizer.json and tokenizer_config.json where it is another model's
    manifest.json         sha256 and size of every file, written last
Nothing in it is a pickle. A save goes on beside the training: it waits for a copy to the CPU alone.
"""

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

from nanospin import config
from nanospin import distributed
from data.files import printable, sha256, write_json
from data import tokenizer
from model import GPT, GPTConfig

save_thread = ThreadPoolExecutor(1, thread_name_prefix="save")
META = {
    "round": int,
    "step": int,
    "model": dict,
    "config": dict,
    "figures": dict,
    "history": dict,
    "tokenizer": str,
    "tokenizer_sha256": str,
    "weights_sha256": str,
}


def save(run, round_id, step, model, optimizers, cfg, enc, tokenizer_name, figures, history):
    """Begin to write RUN/round_R/step_S with everything that a resumed run needs; then the round's earlier steps are removed
    but the last `keep_last` and the best by `keep_best`. Returns a Future for `finished`. figures: held-out ones of this step;
    history: what the loop remembers."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    weights, states = get_state_dict(
        model, optimizers, options=StateDictOptions(cpu_offload=not on_cpu)
    )
    tensors = {"model": weights, "optimizer": state_tensors(states)}
    if on_cpu:
        tensors = {
            part: {name: t.detach().clone() for name, t in named.items()}
            for part, named in tensors.items()
        }
    meta = {
        "round": round_id,
        "step": step,
        "model": asdict(model.config),
        "config": asdict(cfg),
        "figures": figures,
        "history": dict(history),
        "tokenizer": tokenizer.file_of(enc, tokenizer_name),
        "tokenizer_sha256": tokenizer.fingerprint(enc),
    }
    return save_thread.submit(
        write, os.path.join(run, f"round_{round_id}", f"step_{step:06d}"), tensors, meta, enc, cfg
    )


def write(path, tensors, meta, enc, cfg):
    """A save's part that runs beside the training. Returns what went wrong, or ""."""
    beside = sibling_path(path, "writing")
    try:
        write_tensors(tensors["model"], beside, enable_consolidation=True)
        write_tensors(tensors["optimizer"], os.path.join(beside, "optimizer"))
        if distributed.rank() == 0:
            os.rename(
                os.path.join(beside, "model-00001-of-00001.safetensors"),
                os.path.join(beside, "model.safetensors"),
            )
            os.remove_checkpoint(os.path.join(beside, "model.safetensors.index.json"))
            shutil.rmtree(os.path.join(beside, "sharded"))
            if meta["tokenizer"] not in ("gpt2", "bytes"):
                tokenizer.save(enc, os.path.join(beside, meta["tokenizer"]))
            publish(beside, path, meta)
            prune_steps(os.path.dirname(path), cfg)
        return ""
    except (OSError, SafetensorError, dcp.CheckpointException, RuntimeError) as e:
        if distributed.rank() == 0:
            shutil.rmtree(beside, ignore_errors=True)
        reasons = list(e.failures.values()) if isinstance(e, dcp.CheckpointException) else []
        reason = reasons[0][0] if reasons else e
        return f"{type(reason).__name__}: {reason}".splitlines()[0]


def publish(beside, path, meta):
    """Write meta.json and manifest.json, with the hashes of what lies `beside`, and rename it into place."""
    write_json(
        os.path.join(beside, "meta.json"),
        meta | {"weights_sha256": sha256(os.path.join(beside, "model.safetensors"))},
    )
    write_json(
        os.path.join(beside, "manifest.json"),
        {
            name: {
                "sha256": sha256(os.path.join(beside, name)),
                "bytes": os.path.getsize(os.path.join(beside, name)),
            }
            for name in list_files(beside)
        },
    )
    if os.path.exists(path):
        remove_checkpoint(path)
    os.rename(beside, path)


def write_tensors(tensors, folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # DCP's, that there is one process
        dcp.save(
            tensors,
            storage_writer=HuggingFaceStorageWriter(folder, save_distributed=True, **options),
            process_group=distributed.process_groups.get("saves"),
            no_dist=distributed.world_size() == 1,
        )


def write_safetensors(path, tensors, dtype=torch.float32):
    """A file of {name: (shape, function that makes the float32 tensor)}, rounded to dtype; one of them is in memory at a time."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, _) in tensors.items():
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {
            "dtype": {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype],
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


def wait_for_save(saving):
    """Wait for a save. Returns on every rank what went wrong on the first that something went wrong on, or ""."""
    return next(
        filter(
            None,
            distributed.all_gather_object(saving.result() if isinstance(saving, Future) else ""),
        ),
        "",
    )


def state_tensors(states):
    """The tensors of an optimizer's state dict by name; the rest of it, its param_groups, the config knows."""
    return {
        f"{name}.{key}": value
        for name, state in states["state"].items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def resume(path, model, optimizers):
    """Put the optimizers' state of a run back, on as many ranks as there are now; the weights are `load_weights`'."""
    weights, states = get_state_dict(model, optimizers)
    tensors = state_tensors(states)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            for name in os.listdir(
                os.path.join(path, "optimizer")
            ):  # DCP would print a traceback of its own
                if name.endswith(".safetensors"):
                    safe_open(os.path.join(path, "optimizer", name), framework="pt").__exit__(
                        None, None, None
                    )
            dcp.load(
                tensors,
                storage_reader=HuggingFaceStorageReader(os.path.join(path, "optimizer")),
                no_dist=distributed.world_size() == 1,
            )
        except (
            dcp.CheckpointException,
            SafetensorError,
            OSError,
        ) as e:  # the first is no Exception
            raise SystemExit(
                f"{path}/optimizer cannot be read ({type(e).__name__}); remove {path}, and the checkpoint before it is taken"
            )
    for name, state in states["state"].items():
        for key in state:
            if isinstance(state[key], torch.Tensor):
                state[key] = tensors[f"{name}.{key}"]
    set_state_dict(model, optimizers, model_state_dict=weights, optim_state_dict=states)


# ----------------------------------------------------------------------------------------------- which checkpoints there are


def list_files(path):
    """The files of a checkpoint but its manifest, by their names in it."""
    found = [
        os.path.relpath(os.path.join(folder, name), path)
        for folder, _, names in os.walk(path)
        for name in names
    ]
    return sorted(name for name in found if name != "manifest.json")


def find_corruption(path):
    """What is wrong with a checkpoint's files, a line, or "": each rank reads its share of them."""

    def look():
        with open(os.path.join(path, "manifest.json"), "rb") as f:
            text = f.read()
        manifest = json.loads(text)
        if text.decode() != json.dumps(manifest, indent=1, ensure_ascii=False) + "\n":
            return "manifest.json was altered"
        if list_files(path) != sorted(manifest):
            return f"its files are not those in manifest.json ({printable(', '.join(sorted(set(manifest) ^ set(list_files(path)))))})"
        for name in sorted(manifest)[distributed.rank() :: distributed.world_size()]:
            if (
                os.path.getsize(os.path.join(path, name)) != manifest[name]["bytes"]
                or sha256(os.path.join(path, name)) != manifest[name]["sha256"]
            ):
                return f"{name} is not what was saved: its size and sha256 are not those in manifest.json"
        with open(os.path.join(path, "meta.json"), encoding="utf-8") as f:
            meta = json.load(f)
        if f"round_{meta['round']}/step_{meta['step']:06d}" != "/".join(
            os.path.abspath(path).split(os.sep)[-2:]
        ):
            return f"it is round {meta['round']!r} step {meta['step']!r} by its meta.json"
        return ""

    try:
        found = look()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        found = printable(f"its manifest.json or a file cannot be read ({type(e).__name__}: {e})")
    return next(filter(None, distributed.all_gather_object(found)), "")


def latest_valid(run):
    """The newest checkpoint of a run that is as it was saved, or None. Damaged ones are named and set aside, as damaged_S."""
    while path := distributed.broadcast_from_rank0(latest(run)):
        found = find_corruption(path)
        if not found:
            return path
        aside = sibling_path(path, "damaged")
        if distributed.rank() == 0:
            print(
                f"{path} is damaged: {found}; it is set aside as {aside}, and the one before it taken",
                flush=True,
            )
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
        distributed.barrier()


def prune_steps(folder, cfg):
    """Remove a round's checkpoints but the last ones and the best one."""
    paths = list_steps(folder)
    rated = (
        {path: read_meta(path)["figures"].get(cfg.keep_best.lstrip("-")) for path in paths}
        if cfg.keep_best
        else {}
    )
    best = sorted(
        (value if not cfg.keep_best.startswith("-") else -value, path)
        for path, value in rated.items()
        if value is not None
    )
    for path in paths[: -cfg.keep_last]:
        if path not in [path for _, path in best[:1]]:
            remove_checkpoint(path)


def sibling_path(path, what):
    """step_000012 as writing_000012, removing_000012 or damaged_000012: what is no checkpoint."""
    return os.path.join(os.path.dirname(path), os.path.basename(path).replace("step", what))


def remove_checkpoint(path):
    """Rename first: a checkpoint is whole or absent."""
    os.rename(path, sibling_path(path, "removing"))
    shutil.rmtree(sibling_path(path, "removing"))


def list_steps(folder):
    """The checkpoints of one round's folder, oldest first."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return [os.path.join(folder, name) for name in sorted(names) if re.fullmatch(r"step_\d+", name)]


def prune_rounds(run, first):
    """Remove the checkpoints of the rounds before `first`; what else lies there stays."""
    if distributed.rank() == 0:
        for path in (
            path
            for round_id in range(first)
            for path in list_steps(os.path.join(run, f"round_{round_id}"))
        ):
            remove_checkpoint(path)
    distributed.barrier()


def latest(run, round_id=None):
    """The newest checkpoint of a run (of one round), or None."""
    rounds = (
        sorted(int(m[1]) for m in map(re.compile(r"round_(\d+)").fullmatch, os.listdir(run)) if m)
        if os.path.isdir(run)
        else []
    )
    found = [
        path
        for r in rounds
        if round_id in (None, r)
        for path in list_steps(os.path.join(run, f"round_{r}"))
    ]
    return found[-1] if found else None


def resolve(path):
    """A run folder, a round's folder or a checkpoint -> the checkpoint. Exits with one line if there is none."""
    for candidate in (path, latest(path), (list_steps(path) or [None])[-1]):
        if (
            candidate
            and os.path.exists(os.path.join(candidate, "meta.json"))
            and os.path.exists(os.path.join(candidate, "model.safetensors"))
        ):
            return candidate
    command = config.maker(path)
    raise SystemExit(
        f"{path}: no checkpoint there; "
        + (
            f"make it with: {command}"
            if command
            else "it should be the out_dir of a run, or a folder round_R/step_S in it"
        )
    )


def read_meta(path):
    """meta.json of a checkpoint, checked against its manifest."""
    try:
        with open(os.path.join(path, "meta.json"), "rb") as f:
            text = f.read()
        with open(os.path.join(path, "manifest.json"), encoding="utf-8") as f:
            if hashlib.sha256(text).hexdigest() != json.load(f)["meta.json"]["sha256"]:
                raise SystemExit(
                    f"{path}/meta.json is damaged: its sha256 is not the one in manifest.json"
                )
        meta = json.loads(text)
        hints, settings = typing.get_type_hints(GPTConfig), typing.get_type_hints(config.Config)
        for name, value, hint in (
            [(name, meta[name], kind) for name, kind in META.items()]
            + [(name, value, hints[name]) for name, value in meta["model"].items()]
            + [
                (name, meta["config"][name], settings[name])
                for name in ("stage", "template", "max_prompt", "max_response")
            ]
        ):
            config.convert(name, value, hint, f"{path}/meta.json")
        if meta["tokenizer"] not in ("gpt2", "bytes", "tokenizer.tiktoken", "tokenizer.json"):
            raise ValueError(f"tokenizer {meta['tokenizer']!r}")
        if not config.is_template(meta["config"]["template"]):
            raise ValueError(f"template {meta['config']['template']!r}")
        GPTConfig(**meta["model"])
        return meta
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise SystemExit(printable(f"{path}/meta.json cannot be read ({type(e).__name__}: {e})"))


def weights_sha256(path):
    """sha256 of a file, or of a run's or checkpoint's weights."""
    return read_meta(resolve(path))["weights_sha256"] if os.path.isdir(path) else sha256(path)


def read_tokenizer(path, meta):
    name = meta["tokenizer"]
    enc = tokenizer.load(name if name in ("gpt2", "bytes") else os.path.join(path, name))
    if tokenizer.fingerprint(enc) != meta["tokenizer_sha256"]:
        raise SystemExit(
            f"{path}: the tokenizer {name} is not the one that the checkpoint was trained with"
        )
    return enc


def load_weights(path, model):
    """Fill a GPT, sharded or not, from a checkpoint's model.safetensors, one tensor at a time. A scalar head that only
    the model has starts at 0; one that only the file has is left there."""
    file = os.path.join(path, "model.safetensors")
    if sha256(file) != read_meta(path)["weights_sha256"]:
        raise SystemExit(f"{file} is damaged: its sha256 is not the one in meta.json")
    try:
        with safe_open(file, framework="pt") as f:
            params = dict(model.named_parameters())
            there = set(f.keys())
            other = [name for name in there ^ set(params) if not name.startswith("scalar.")]
            if other:
                raise SystemExit(f"{file} has other tensors than the model: {sorted(other)[:3]}")
            for name, p in params.items():
                tensor = f.get_tensor(name) if name in there else torch.zeros(p.shape)
                if tensor.shape != p.shape:
                    raise SystemExit(
                        f"{file}: {name} has shape {tuple(tensor.shape)}, the model {tuple(p.shape)}"
                    )
                distributed.copy_parameter_(p, tensor)
    except SafetensorError as e:
        raise SystemExit(f"{file} cannot be read ({e})")


def load_model(path, device="cpu", dtype=torch.float32):
    """(model in evaluation mode, tokenizer, meta) of a run folder or checkpoint, unsharded; with its scalar head if it is a
    reward model, without PPO's."""
    path = resolve(path)
    meta = read_meta(path)
    with torch.device("meta"):
        model = GPT(GPTConfig(**meta["model"] | {"scalar": meta["config"]["stage"] == "reward"}))
    model.to_empty(device=device)
    load_weights(path, model)
    return distributed.set_autocast_dtype(model, dtype).eval(), read_tokenizer(path, meta), meta
