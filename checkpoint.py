"""Save, load, resume: all that writes or reads weights.

A checkpoint is a folder RUN/round_R/step_S, written beside and renamed into place, so it is whole or absent:
    model.safetensors     the whole model, float32, to hand on: sampling, evaluation, the next stage, a teacher
    state/                torch.distributed.checkpoint of model and optimizer, to resume this very run (its index is a
                          pickle: a folder of your own, never one to download)
    meta.json             round, step, model shape, config, tokenizer, hashes
    tokenizer.tiktoken    where the tokenizer is a trained one
"""
import json
import os
import re
import shutil
import warnings
from dataclasses import asdict

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

import config
import parallel
from data import sha256, tokenizer, write_json
from model import GPT, GPTConfig


def save(run, round, step, model, optimizers, cfg, enc, tokenizer_name):
    """Write RUN/round_R/step_S with everything a resumed run needs, then remove the round's earlier steps."""
    path = os.path.join(run, f"round_{round}", f"step_{step:06d}")
    beside = os.path.join(run, f"round_{round}", f"writing_{step:06d}")
    if parallel.rank() == 0:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(path, ignore_errors=True)
        os.makedirs(beside)
    parallel.barrier()
    weights, states = get_state_dict(model, optimizers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)        # DCP's, that there is one process
        dcp.save({"model": weights, "optimizers": tensors_of(states)}, checkpoint_id=os.path.join(beside, "state"),
                 no_dist=parallel.world() == 1)
    whole = {}
    for name, p in weights.items():
        full = (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        if parallel.rank() == 0:
            whole[name] = full.cpu().contiguous()
    if parallel.rank() == 0:
        save_file(whole, os.path.join(beside, "model.safetensors"))
        if tokenizer_name not in ("gpt2", "bytes"):
            tokenizer_name = "tokenizer.tiktoken"
            tokenizer.save(enc, os.path.join(beside, tokenizer_name))
        write_json(os.path.join(beside, "meta.json"), {
            "round": round, "step": step, "model": asdict(model.config), "config": asdict(cfg),
            "tokenizer": tokenizer_name, "tokenizer_sha256": tokenizer.fingerprint(enc),
            "weights_sha256": sha256(os.path.join(beside, "model.safetensors"))})
        os.rename(beside, path)
        for other in steps_of(os.path.join(run, f"round_{round}")):
            if other != path:
                shutil.rmtree(other)
    parallel.barrier()
    return path


def tensors_of(states):
    """The tensors of an optimizer's state dict by name; the rest of it, its param_groups, the config knows."""
    return {f"{name}.{key}": value for name, state in states["state"].items() for key, value in state.items()
            if isinstance(value, torch.Tensor)}


def resume(path, model, optimizers):
    """Put the state of a run back into a model and its optimizers, on as many ranks as there are now."""
    weights, states = get_state_dict(model, optimizers)
    tensors = tensors_of(states)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        dcp.load({"model": weights, "optimizers": tensors}, checkpoint_id=os.path.join(path, "state"), no_dist=parallel.world() == 1)
    for name, state in states["state"].items():
        for key in state:
            if isinstance(state[key], torch.Tensor):
                state[key] = tensors[f"{name}.{key}"]
    set_state_dict(model, optimizers, model_state_dict=weights, optim_state_dict=states)


def steps_of(folder):
    """The checkpoints of one round's folder, oldest first."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return [os.path.join(folder, name) for name in sorted(names) if re.fullmatch(r"step_\d+", name)]


def prune(run, first):
    """Remove the checkpoints of the rounds before `first`; what else lies there stays."""
    if parallel.rank() == 0:
        for path in (path for round in range(first) for path in steps_of(os.path.join(run, f"round_{round}"))):
            shutil.rmtree(path)
    parallel.barrier()


def latest(run, round=None):
    """The newest checkpoint of a run (of one round), or None."""
    rounds = sorted(int(m[1]) for m in map(re.compile(r"round_(\d+)").fullmatch, os.listdir(run)) if m) if os.path.isdir(run) else []
    found = [path for r in rounds if round in (None, r) for path in steps_of(os.path.join(run, f"round_{r}"))]
    return found[-1] if found else None


def resolve(path):
    """A run folder, a round's folder or a checkpoint -> the checkpoint. Exits with one line if there is none."""
    for candidate in (path, latest(path), (steps_of(path) or [None])[-1]):
        if candidate and os.path.exists(os.path.join(candidate, "meta.json")) and os.path.exists(os.path.join(candidate, "model.safetensors")):
            return candidate
    command = config.maker(path)
    raise SystemExit(f"{path}: no checkpoint there; " + (f"make it with: {command}" if command else
                     "it should be the out_dir of a run, or a folder round_R/step_S in it"))


def read_meta(path):
    """meta.json of a checkpoint."""
    try:
        with open(os.path.join(path, "meta.json"), encoding="utf-8") as f:
            meta = json.load(f)
        GPTConfig(**meta["model"])
        return meta
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise SystemExit(f"{path}/meta.json cannot be read ({type(e).__name__}: {e})")


def read_tokenizer(path, meta):
    name = meta["tokenizer"]
    enc = tokenizer.load(name if name in ("gpt2", "bytes") else os.path.join(path, name))
    if tokenizer.fingerprint(enc) != meta["tokenizer_sha256"]:
        raise SystemExit(f"{path}: the tokenizer {name} is not the one that the checkpoint was trained with")
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
                    raise SystemExit(f"{file}: {name} has shape {tuple(tensor.shape)}, the model {tuple(p.shape)}")
                parallel.copy_(p, tensor)
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
    return parallel.cast(model, dtype).eval(), read_tokenizer(path, meta), meta
