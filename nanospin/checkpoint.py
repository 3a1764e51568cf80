"""Save, load and resume: everything that writes or reads weights.

A checkpoint is a folder RUN/round_R/step_S:

    model.safetensors     the full model in float32, for sampling, evaluation and later stages
    adapter.safetensors   with LoRA: what is trained; model.safetensors has it merged
    optimizer/            the optimizers' state: torch.distributed.checkpoint, one file per rank
    meta.json             round, step, model config, config, tokenizer, validation metrics
    tokenizer.tiktoken    if the tokenizer was trained here; tokenizer.json and
                          tokenizer_config.json if it is another model's
    manifest.json         sha256 and size of every file, written last

No file is a pickle. Training continues while a checkpoint is written, as soon as the tensors are
copied to the CPU. The order of a save is:

    1. every rank writes its tensors into RUN/round_R/writing_S, and rank 0 joins the weights
    2. every rank compares what is in the files with its tensors in memory, bit for bit
    3. the ranks agree; rank 0 writes meta.json and the manifest
    4. every file, then every folder, is flushed to the disk (fsync)
    5. writing_S is renamed to step_S, and the round's folder flushed
    6. only then are older checkpoints removed

If any part fails on any rank, there is no step_S, and the older checkpoints stay.
"""

import contextlib
import copy
import hashlib
import json
import math
import numbers
import os
import re
import shutil
import stat
import tempfile
import time
import typing
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from data import tokenizer
from data.files import (
    RETRY_SECONDS,
    fsync_file,
    fsync_folder,
    is_there,
    list_folder,
    printable,
    retried,
    sha256,
    write_json,
)
from data.template import is_template
from nanospin import config, distributed, lock, lora

FORMAT = 2  # of the folder; meta.json has it

# The fields of meta.json besides "format", and their types. A run's also has "settings", from which
# a lost config.json is written again.
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
BAD_JSON_ERRORS = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
BAD_FILE_ERRORS = (OSError, *BAD_JSON_ERRORS)
# What a save can raise. CheckpointException is a BaseException: `except Exception` would miss it.
SAVE_ERRORS = (OSError, SafetensorError, dcp.CheckpointException, RuntimeError, ValueError)

MAX_JSON_BYTES = 2**26  # of a meta.json or manifest.json
MAX_SIZE = 2**28  # of a number in a model's config
NOT_FINITE = "weights are not finite"

tokenizers = {}  # those that were loaded: `tokenizer_content` -> tokenizer

save_thread = ThreadPoolExecutor(1, thread_name_prefix="save")
latest_save = None  # the Future of the last save of this process
removal_problems = []  # what could not be removed, and why; the saver logs it


# ----------------------------------------------------------------------------------------- saving


class Saver:
    """Saves a run's checkpoints in the background, one at a time.

    start: preflight.Start, where this start of the run began, and its settings.
    """

    def __init__(self, cfg, enc, tokenizer_name: str, log, start):
        self.cfg = cfg
        self.enc = enc
        self.tokenizer_name = tokenizer_name
        self.log = log
        self.start = start
        self.pending = None  # the Future of the save that may still be running
        self.said = set()  # problems with removals that were logged

    def save(self, round_id, step, model, optimizers, metrics: dict, history: dict):
        """Wait for the previous save, then start to save this step; see the function `save`."""
        self.wait(round_id, step)
        lock.check()
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
            settings=self.start.settings,
            flush_log=self.log.flush,
        )

    def wait(self, round_id: int, step: int, last: bool = False):
        """Wait for the previous save. If it failed, log a warning; exit if it was the last one, if
        the weights are not finite, or if out_dir is no longer this run's."""
        error = wait_for_save(self.pending)
        self.pending = None
        self.log_removal_problems(round_id, step)
        if not error:
            return
        lock.check()
        if NOT_FINITE in error:
            text = f"round {round_id} step {step}: a checkpoint was not saved ({error})"
            raise SystemExit(f"{text}; {self.where_to_go_on()}")
        if last:
            path = distributed.broadcast_from_rank0(latest(self.cfg.out_dir))
            raise SystemExit(
                f"the checkpoint at round {round_id} step {step} could not be saved ({error}); "
                f"the latest checkpoint is {path}"
            )
        text = f"the previous checkpoint could not be saved ({error}); training continues"
        self.log.warning(round_id, step, text)

    def where_to_go_on(self) -> str:
        """The end of the message of a run that stops because its numbers are not finite."""
        path = distributed.broadcast_from_rank0(latest(self.cfg.out_dir))
        if path and path != self.start.path:
            return f"last checkpoint: {path}"
        began = f"this start began at {path}" if path else "there is no checkpoint"
        return (
            f"{began}: the same command will stop here again; "
            "change lr or the like, and use another out_dir"
        )

    def log_removal_problems(self, round_id: int, step: int):
        """Log once what could not be removed. It is tried again after the next save."""
        for problem in removal_problems:
            if problem not in self.said:
                self.said.add(problem)
                text = f"an old checkpoint could not be removed ({problem}); the next save retries"
                self.log.warning(round_id, step, text)
        removal_problems.clear()


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
    settings: dict | None = None,
    flush_log=None,
) -> Future:
    """Start to write RUN/round_R/step_S, with everything that resuming needs. Afterwards remove the
    round's earlier checkpoints, except those that `keep_last` and `keep_best` keep.

    metrics: validation metrics of this step, {} if there was no evaluation.
    history: what the training loop remembers of earlier steps.
    settings: from which a lost config.json can be written again.
    flush_log(): called on rank 0 before the checkpoint is complete.
    Returns a Future for `wait_for_save`.
    """
    global latest_save
    on_cpu = next(model.parameters()).device.type == "cpu"
    options = StateDictOptions(cpu_offload=not on_cpu)
    adapter = {}
    if lora.is_added(model):
        weights = {name: t.float().to("cpu") for name, t in lora.merged_weights(model)}
        adapter = lora.trained_weights(model)
        optimizer_states = get_optimizer_state_dict(model, optimizers, options=options)
    else:
        weights, optimizer_states = get_state_dict(model, optimizers, options=options)
    tensors = {"model": weights, "optimizer": state_tensors(optimizer_states), "adapter": adapter}
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
    if settings is not None:
        meta["settings"] = settings
    path = os.path.join(run, f"round_{round_id}", f"step_{step:06d}")
    latest_save = save_thread.submit(write, path, tensors, meta, enc, cfg, flush_log)
    return latest_save


def is_saving() -> bool:
    return latest_save is not None and not latest_save.done()


def wait_for_save(saving: Future | None) -> str:
    """Wait for a save. Returns, on every rank, the error of the first rank that has one, or ""."""
    error = saving.result() if saving else ""
    return first_nonempty(distributed.all_gather_object(error))


def first_nonempty(texts: list[str]) -> str:
    for text in texts:
        if text:
            return text
    return ""


class SaveError(Exception):
    """A part of a save failed on some rank. All ranks raise it."""


def write(path, tensors, meta, enc, cfg, flush_log=None) -> str:
    """The part of a save that runs in the background. Returns an error text, or ""."""
    staging = sibling_path(path, "writing")
    alias = ""
    try:
        together(on_rank0, make_staging, staging)
        alias = together(make_alias, staging)
        together(write_tensors, tensors["model"], alias, enable_consolidation=True)
        together(write_tensors, tensors["optimizer"], os.path.join(alias, "optimizer"))
        together(on_rank0, add_other_files, staging, meta, enc)
        if tensors["adapter"]:
            together(on_rank0, write_adapter, staging, tensors["adapter"])
        together(verify, staging, tensors)
        if flush_log:
            together(on_rank0, flush_log)
        together(on_rank0, check_lock)
        together(on_rank0, publish, staging, path, meta)
    except SaveError as e:
        if distributed.rank() == 0 and not lock.problem():  # else it may be another run's
            shutil.rmtree(staging, ignore_errors=True)
        return str(e)
    finally:
        remove_alias(alias)
    if distributed.rank() == 0:
        prune_steps(os.path.dirname(path), cfg)
    return ""


def together(function, *args, **options):
    """Call a function on every rank. If it fails on one, all raise SaveError."""
    result, text = None, ""
    try:
        result = function(*args, **options)
    except SAVE_ERRORS as e:
        error = e
        if isinstance(e, dcp.CheckpointException) and e.failures:
            error, _traceback = next(iter(e.failures.values()))  # the first rank's
        text = f"{type(error).__name__}: {error}".splitlines()[0]
    texts = [text]
    if distributed.world_size() > 1:
        texts = [""] * distributed.world_size()
        dist.all_gather_object(texts, text, group=distributed.process_groups["saves"])
    if any(texts):
        raise SaveError(first_nonempty(texts))
    return result


def on_rank0(function, *args):
    if distributed.rank() == 0:
        function(*args)


def check_lock():
    text = lock.problem()
    if text:
        raise OSError(text)


def make_staging(staging):
    """Make the folder that a checkpoint is written into. A run's own folder is never made again:
    if somebody has removed it, the save fails."""
    check_lock()
    round_folder = os.path.dirname(staging)
    if not lock.held:  # not a run
        os.makedirs(os.path.dirname(round_folder), exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.mkdir(round_folder)
        fsync_folder(os.path.dirname(round_folder))
    remove_tree(staging)
    os.mkdir(staging)


def make_alias(folder) -> str:
    """A path to an existing folder that has only letters, digits and -._/ in it: a symbolic link in
    a new temporary folder. DCP takes brackets and other characters in a path for patterns or
    addresses. Nor can it make the folder again through the link if it is removed meanwhile."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder)  # on NFS another machine's folder may be seen late, but not by mkdir
    alias = os.path.join(make_plain_folder(), "checkpoint")
    os.symlink(os.path.abspath(folder), alias)
    return alias


def make_plain_folder() -> str:
    """A new temporary folder whose path has only letters, digits and -._/ in it."""
    for place in (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"):
        if re.fullmatch(r"[\w./-]+", place, re.ASCII) and os.access(place, os.W_OK):
            return tempfile.mkdtemp(prefix="nanospin", dir=place)
    raise OSError("no temporary folder with a plain name; set TMPDIR to one")


def remove_alias(alias):
    """Remove a link, or a folder of links, with its temporary folder. What they point to stays."""
    if alias:
        shutil.rmtree(os.path.dirname(alias), ignore_errors=True)


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


def add_other_files(staging, meta, enc):
    """Rank 0: name the file in which DCP has put the ranks' weights together; add the tokenizer."""
    consolidated = os.path.join(staging, "model-00001-of-00001.safetensors")
    os.rename(consolidated, os.path.join(staging, "model.safetensors"))
    os.remove(os.path.join(staging, "model.safetensors.index.json"))
    shutil.rmtree(os.path.join(staging, "sharded"))
    if meta["tokenizer"] not in ("gpt2", "bytes"):
        tokenizer.save(enc, os.path.join(staging, meta["tokenizer"]))


def write_adapter(folder, tensors):
    """Write adapter.safetensors: {name: float32 tensor}, on the CPU."""
    makers = {name: (tensor.shape, lambda t=tensor: t) for name, tensor in tensors.items()}
    write_safetensors(os.path.join(folder, "adapter.safetensors"), makers)


def verify(staging, tensors):
    """Compare the files with this rank's tensors in memory. Raises ValueError at a difference, and
    if the weights are not finite."""
    weights = tensors["model"]
    with safe_open(os.path.join(staging, "model.safetensors"), framework="pt") as f:
        if set(f.keys()) != set(weights):
            raise ValueError("model.safetensors has other tensors than the model")
        for name, tensor in weights.items():
            local, part = local_part(tensor)
            if not torch.isfinite(local).all():
                raise ValueError(f"{NOT_FINITE}: {name}")
            saved = f.get_slice(name)
            same_shape = list(saved.get_shape()) == list(tensor.shape)
            if not same_shape or (local.numel() and not same_bits(saved[part], local)):
                raise ValueError(f"model.safetensors: {name} was not written as it is")

    if tensors["adapter"]:
        saved = load_file(os.path.join(staging, "adapter.safetensors"))
        for name, tensor in tensors["adapter"].items():
            if not same_bits(saved[name], tensor):
                raise ValueError(f"adapter.safetensors: {name} was not written as it is")
    verify_optimizer(os.path.join(staging, "optimizer"), tensors["optimizer"])


def verify_optimizer(folder, tensors):
    """`verify` for the optimizers' state: this rank's file. Rank 0 looks that it is complete."""
    files = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    sizes = dict.fromkeys(tensors, 0)  # numbers in the files of all ranks
    for file in files:
        own = file.startswith(f"shard-{distributed.rank() + 1:05d}-")
        if not own and distributed.rank() != 0:
            continue
        with safe_open(os.path.join(folder, file), framework="pt") as f:
            for name in f.keys():
                sizes[name] = sizes.get(name, 0) + math.prod(f.get_slice(name).get_shape())
                if own and not same_bits(f.get_tensor(name), local_part(tensors[name])[0]):
                    raise ValueError(f"optimizer/{file}: {name} was not written as it is")
    if distributed.rank() == 0 and sizes != {name: t.numel() for name, t in tensors.items()}:
        raise ValueError("optimizer: its files do not hold all of its state")


def local_part(tensor) -> tuple:
    """(this rank's part of a tensor, the slices of the tensor that it is)."""
    if not isinstance(tensor, DTensor):
        return tensor, tuple(slice(0, n) for n in tensor.shape)
    local = tensor.to_local()
    (chunk,) = tensor.__create_chunk_list__()
    part = []
    for start, size in zip(chunk.offsets, chunk.sizes):
        part.append(slice(start, start + size))
    return local, tuple(part)


def same_bits(a, b) -> bool:
    """Whether two tensors are equal bit for bit: also NaN, and not 0.0 and -0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def publish(staging, path, meta):
    """Write meta.json and manifest.json into a folder that has the other files of a checkpoint,
    flush everything to the disk, and rename the folder to `path`."""
    weights = os.path.join(staging, "model.safetensors")
    meta = {"format": FORMAT} | meta | {"weights_sha256": sha256(weights)}
    write_json(os.path.join(staging, "meta.json"), meta)
    write_manifest(staging)
    for name in list_files(staging):
        fsync_file(os.path.join(staging, name))
    for folder, _, _ in os.walk(staging, topdown=False):
        fsync_folder(folder)
    round_folder = os.path.dirname(path)
    before = ""  # a checkpoint of this step, which is replaced
    if os.path.lexists(path):
        before = sibling_path(path, "removing")
        remove_tree(before)
        os.rename(path, before)
    os.rename(staging, path)
    fsync_folder(round_folder)
    fsync_folder(os.path.dirname(round_folder))
    if before:
        remove_tree(before)


def write_manifest(path):
    """Write manifest.json: the sha256 and size of every other file of a checkpoint."""
    manifest = {}
    for name in list_files(path):
        file = os.path.join(path, name)
        manifest[name] = {"sha256": sha256(file), "bytes": os.path.getsize(file)}
    write_json(os.path.join(path, "manifest.json"), manifest)


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


def load_optimizers(path, model, optimizers):
    """Load the optimizers' state from a checkpoint, which may be from another number of ranks. The
    weights are loaded by `load_weights`."""
    weights, states = get_state_dict(model, optimizers)
    tensors = state_tensors(states)
    folder = os.path.join(path, "optimizer")
    alias = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            # DCP reads every .safetensors file that it finds: show it those of the manifest only.
            alias = os.path.join(make_plain_folder(), "optimizer")
            os.mkdir(alias)
            for name in distributed.run_on_rank0(saved_files, path, "optimizer"):
                file = os.path.join(alias, os.path.basename(name))
                os.symlink(os.path.abspath(os.path.join(path, name)), file)
                # Fail here if it cannot be read: DCP would print a traceback.
                with safe_open(file, framework="pt"):
                    pass
            dcp.load(
                tensors,
                storage_reader=HuggingFaceStorageReader(alias),
                no_dist=distributed.world_size() == 1,
            )
        except (dcp.CheckpointException, SafetensorError, OSError) as e:
            raise SystemExit(
                f"{folder} cannot be read ({type(e).__name__}); run the same command again, or "
                f"remove {path}: {without_it(path)}"
            )
        finally:
            remove_alias(alias)
    for name, state in states["state"].items():
        for key in state:
            if isinstance(state[key], torch.Tensor):
                state[key] = tensors[f"{name}.{key}"]
    set_state_dict(model, optimizers, model_state_dict=weights, optim_state_dict=states)


def saved_files(path, folder: str) -> list[str]:
    """The files of a checkpoint in one of its folders, as its manifest names them."""
    manifest = json.loads(retried(read_small_file, os.path.join(path, "manifest.json")))
    return [name for name in manifest if name.startswith(f"{folder}/")]


@contextlib.contextmanager
def one_line_if_unreadable(file):
    """Exit with one line if a .safetensors file is damaged, or cannot be read now."""
    try:
        yield
    except SafetensorError as e:
        raise SystemExit(printable(f"{file} is damaged: it cannot be read ({e})"))
    except OSError as e:
        raise SystemExit(printable(f"{file} cannot be read ({e})"))


def load_weights(path, model, with_head: bool = True):
    """Fill a GPT, sharded or not, from a checkpoint's model.safetensors, one tensor at a time. All
    ranks call this together.

    A scalar head that only the model has is set to 0, and so is every one without `with_head`; one
    that only the file has is ignored. The adapters of a model with LoRA stay as they are.
    """
    file = os.path.join(path, "model.safetensors")
    expected = distributed.run_on_rank0(read_meta, path)["weights_sha256"]
    with one_line_if_unreadable(file):
        if retried(sha256, file) != expected:
            raise SystemExit(f"{file} is damaged: its sha256 is not the one in meta.json")
        check_weights(path, model)
        with safe_open(file, framework="pt") as f:
            names = set(f.keys())
            if not with_head:
                names.discard("scalar_head.weight")
            for name, p in base_parameters(model).items():
                tensor = f.get_tensor(name) if name in names else torch.zeros(p.shape)
                require_finite(file, name, tensor)
                distributed.copy_parameter_(p, tensor)


def base_parameters(model) -> dict:
    """{name: parameter} of a model, without LoRA's adapters."""
    return {name: p for name, p in model.named_parameters() if not lora.is_adapter(name)}


def load_adapter(path, model):
    """Fill what a model with LoRA trains from a checkpoint's adapter.safetensors."""
    file = os.path.join(path, "adapter.safetensors")
    with one_line_if_unreadable(file):
        tensors = retried(load_file, file)
    for name, p in model.named_parameters():
        if p.requires_grad:
            if name not in tensors or tensors[name].shape != p.shape:
                raise SystemExit(f"{file} has no {name} of shape {tuple(p.shape)}")
            distributed.copy_parameter_(p, tensors[name])


def require_finite(file, name: str, tensor):
    if not torch.isfinite(tensor).all():
        raise SystemExit(printable(f"{file}: {name} has numbers that are not finite"))


def check_finite(path):
    """Exit with one line if a checkpoint's weights are not all finite."""
    file = os.path.join(path, "model.safetensors")
    with one_line_if_unreadable(file), safe_open(file, framework="pt") as f:
        for name in f.keys():
            require_finite(file, name, f.get_tensor(name))
            distributed.heartbeat.touch()


def check_weights(path, model):
    """Check that a checkpoint's model.safetensors has a model's tensors: their names, shapes and
    floating-point numbers. The model may be on the meta device, so that nothing is allocated for a
    model that is not the file's."""
    file = os.path.join(path, "model.safetensors")
    params = base_parameters(model)
    with one_line_if_unreadable(file), safe_open(file, framework="pt") as f:
        names = set(f.keys())
        differing = [n for n in names ^ set(params) if not n.startswith("scalar_head.")]
        if differing:
            raise SystemExit(
                printable(f"{file} has other tensors than the model: {sorted(differing)[:3]}")
            )
        for name in names & set(params):
            shape, dtype = f.get_slice(name).get_shape(), f.get_slice(name).get_dtype()
            if list(shape) != list(params[name].shape):
                raise SystemExit(
                    f"{file}: {name} has shape {tuple(shape)}, "
                    f"the model needs {tuple(params[name].shape)}"
                )
            if not str(dtype).startswith(("F", "BF")):
                raise SystemExit(f"{file}: {name} is {dtype}, not floating point")


def read_meta(path) -> dict:
    """Read a checkpoint's meta.json. Exits with one line if it is damaged or of another format.

    The fields of "model" are not checked here but for their size: see config.model_config_from.
    """
    file = f"{path}/meta.json"
    try:
        text = retried(read_small_file, os.path.join(path, "meta.json"))
        manifest = json.loads(retried(read_small_file, os.path.join(path, "manifest.json")))
        if hashlib.sha256(text).hexdigest() != manifest["meta.json"]["sha256"]:
            raise SystemExit(f"{file} is damaged: its sha256 is not the one in manifest.json")
        meta = json.loads(text)
        if meta.get("format") != FORMAT:
            raise SystemExit(
                f"{path} was written by another version of nanoSPIN and cannot be read by this one"
            )
        check_meta(meta, file)
        retried(check_num_layers, path, meta["model"])
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
    if "settings" in meta:
        config.convert("settings", meta["settings"], dict, where)
    for name, value in meta["model"].items():
        if type(value) is int and abs(value) > MAX_SIZE:
            raise ValueError(f"{name} must be at most {MAX_SIZE}")


def check_num_layers(path, model: dict):
    """A model with more layers than model.safetensors has tensors is not built, not even on the
    meta device: a billion of layers would take hours. Everything else: `check_weights`."""
    n_layer = model.get("n_layer")
    with contextlib.suppress(SafetensorError, FileNotFoundError):  # said when it is loaded
        with safe_open(os.path.join(path, "model.safetensors"), framework="pt") as f:
            num_tensors = len(f.keys())
        if type(n_layer) is int and n_layer > num_tensors:
            raise ValueError(f"n_layer is {n_layer}, model.safetensors has {num_tensors} tensors")


def read_small_file(path) -> bytes:
    """The content of a regular file of a reasonable size; ValueError if it is none."""
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):
        raise ValueError(f"{os.path.basename(path)} is not a regular file")
    if info.st_size > MAX_JSON_BYTES:
        raise ValueError(f"{os.path.basename(path)} has {info.st_size} bytes")
    with open(path, "rb") as f:
        return f.read()


def path_of_init(meta: dict) -> str:
    """What a checkpoint of a run began with, or what an adapter was merged into; else ""."""
    return meta["config"]["init"] if meta["step"] > 0 else meta.get("base", "")


def read_meta_of_init(meta: dict) -> dict | None:
    """The meta.json of `path_of_init`; None if it cannot be read, or is another checkpoint now."""
    expected = meta.get("base_sha256")
    if meta["step"] > 0:
        expected = meta.get("settings", {}).get("players_sha256", {}).get("init")
    try:
        found = read_meta(resolve(path_of_init(meta)))
    except (SystemExit, OSError):
        return None
    return None if expected and found["weights_sha256"] != expected else found


def weights_sha256(path) -> str:
    """sha256 of a file, or of the weights of a run or checkpoint."""
    if os.path.isdir(path):
        return read_meta(resolve(path))["weights_sha256"]
    return sha256(path)


def read_tokenizer(path, meta):
    """A checkpoint's tokenizer. One with the same files is loaded once: it is large, and PPO reads
    two checkpoints in every round."""
    name = meta["tokenizer"]
    file = name if name in ("gpt2", "bytes") else os.path.join(path, name)
    content = tokenizer_content(file)
    enc = tokenizers.get(content) or tokenizer.load(file)
    if tokenizer.fingerprint(enc) != meta["tokenizer_sha256"]:
        raise SystemExit(
            f"{path}: the tokenizer {name} is not the one that the checkpoint was trained with"
        )
    tokenizers[content] = enc
    return enc


def tokenizer_content(file: str) -> tuple[str, ...]:
    """The name of a tokenizer and the sha256 of its files."""
    content = [os.path.basename(file)]
    for path in (file, tokenizer.config_path(file)):
        try:
            content.append(sha256(path))
        except OSError:
            pass  # tokenizer.load says which file it needs
    return tuple(content)


# ---------------------------------------------------------------------------- finding checkpoints


def list_steps(folder) -> list[str]:
    """The checkpoints in a round's folder, in the order of their steps. Raises OSError if it cannot
    be read now: a run would begin again at step 0."""
    return list_numbered(folder, "step")


def list_numbered(folder, name: str) -> list[str]:
    """The paths NAME_N in a folder, in the order of N."""
    names = [n for n in list_folder(folder) if re.fullmatch(rf"{name}_[0-9]+", n)]
    names.sort(key=lambda n: int(n.removeprefix(f"{name}_")))
    return [os.path.join(folder, n) for n in names]


def list_rounds(run) -> list[str]:
    """The folders of a run's rounds, in order. A link to what is not there is left out if no run
    writes its name, such as round_00; another one stops whoever lists its checkpoints."""
    folders = []
    for folder in list_numbered(run, "round"):
        name = os.path.basename(folder)
        is_ours = name == f"round_{int(name.removeprefix('round_'))}"
        if is_ours or is_there(folder):
            folders.append(folder)
    return folders


def list_checkpoints(run) -> list[str]:
    """All checkpoints of a run, the latest first."""
    paths = []
    for folder in list_rounds(run):
        paths += list_steps(folder)
    return paths[::-1]


def is_end_of_run(meta: dict, rounds: int) -> bool | None:
    """Whether a checkpoint is the last one of a run with that many rounds, by its meta.json. None
    if it does not say how many steps its round has: an older one, or one that was imported."""
    num_steps = meta["history"].get("num_steps")
    if num_steps is None:
        return None
    return meta["round"] == rounds - 1 and meta["step"] == num_steps


def latest(run, round_id: int | None = None) -> str | None:
    """The latest checkpoint of a run, or of one of its rounds."""
    if round_id is None:
        paths = list_checkpoints(run)
        return paths[0] if paths else None
    paths = list_steps(os.path.join(run, f"round_{round_id}"))
    return paths[-1] if paths else None


def resolve(path) -> str:
    """A run folder, a round's folder or a checkpoint -> the checkpoint. Exits if there is none, or
    if a round has its best one left and not its last."""
    steps = list_steps(path)
    check_is_last_of_round(path, steps)
    for candidate in (path, latest(path), steps[-1] if steps else None):
        if candidate and is_checkpoint(candidate):
            return candidate
    command = config.command_for_run(path)
    if command:
        raise SystemExit(f"{path}: no checkpoint found; make it with: {command}")
    names = os.listdir(path) if os.path.isdir(path) else []
    if "config.json" in names and any(name.endswith(".safetensors") for name in names):
        raise SystemExit(
            f"{path} is a folder of transformers, not a run; import it: "
            f"python -m tools.hf import {path} --out=OUT"
        )
    raise SystemExit(
        f"{path}: no checkpoint found; give the out_dir of a run, or a folder round_R/step_S in it"
    )


def check_is_last_of_round(folder, steps: list[str]):
    """Exit with one line if the last checkpoint of an earlier round was removed (`keep_rounds`),
    and one that `keep_best` has kept would be taken for it."""
    run, name = os.path.split(os.path.abspath(folder))
    if not steps or not re.fullmatch("round_[0-9]+", name) or not is_checkpoint(steps[-1]):
        return
    next_round = os.path.join(run, f"round_{int(name.removeprefix('round_')) + 1}")
    meta = read_meta(steps[-1])
    num_steps = meta["history"].get("num_steps", meta["step"])
    if os.path.isdir(next_round) and meta["step"] < num_steps:
        raise SystemExit(
            f"{os.path.normpath(folder)}: its last checkpoint, of step {num_steps}, was removed; "
            f"{steps[-1]} is left: name that one if you mean it"
        )


def is_checkpoint(path) -> bool:
    names = ("meta.json", "model.safetensors")
    return all(is_there(os.path.join(path, name)) for name in names)


def latest_valid(run) -> str | None:
    """The latest checkpoint of a run whose files are as they were saved, and whose numbers are
    finite; None if the run has saved none. Others are reported and renamed to damaged_S. Exits if
    none can be used, or if one cannot be read now. All ranks call this together."""
    while path := distributed.broadcast_from_rank0(latest(run)):
        problem = find_corruption(path)
        if not problem:
            return path
        distributed.run_on_rank0(set_aside, path, problem)
    damaged = distributed.broadcast_from_rank0(list_damaged(run))
    if damaged:
        raise SystemExit(
            f"{run} has no checkpoint that can be used; {', '.join(damaged)} are damaged: fix one "
            f"and rename it as it was, to step_ and six digits, or remove {run} to begin again at "
            "step 0"
        )
    return None


def set_aside(path, problem: str):
    """Rename a checkpoint to damaged_S. One that has this name already is kept."""
    damaged = unused_path(sibling_path(path, "damaged"))
    os.rename(path, damaged)
    print(
        f"{path} is damaged: {problem}; renamed to {damaged}, looking for the checkpoint before it",
        flush=True,
    )


def unused_path(path) -> str:
    """The path, with a number behind it if something is there already."""
    unused = path
    n = 1
    while os.path.lexists(unused):
        n += 1
        unused = f"{path}.{n}"
    return unused


def list_damaged(run) -> list[str]:
    """The checkpoints of a run that were set aside, the latest first."""
    found = []
    for folder in list_rounds(run):
        for name in sorted(list_folder(folder)):
            if name.startswith("damaged_"):
                found.append(os.path.join(folder, name))
    return found[::-1]


class Damaged(Exception):
    """What is wrong with a checkpoint's files."""


def find_corruption(path) -> str:
    """What is wrong with a checkpoint, in one line, or "". Each rank reads a share of the files,
    and all have the result.

    A file that cannot be read is not taken for damaged: the disk or the network may be at fault. It
    is tried again for three seconds, then the run exits.
    """
    unreadable = ""
    for pause in (0, *RETRY_SECONDS):
        time.sleep(pause)
        problem, unreadable = look_for_corruption(path)
        if not unreadable:
            return problem
    raise SystemExit(
        f"{path} cannot be read now ({unreadable}). It is not taken for damaged: run the same "
        f"command again later, or remove it: {without_it(path)}"
    )


def without_it(path) -> str:
    """What a run does without its checkpoint `path`."""
    others = list_checkpoints(os.path.dirname(os.path.dirname(path)))
    if path in others[:-1]:
        return f"the run then continues from {others[others.index(path) + 1]}"
    return "there is none before it, so the run would begin again at step 0"


def look_for_corruption(path) -> tuple[str, str]:
    """(what is wrong with a checkpoint, what cannot be read), on all ranks; "" if nothing."""
    manifest, problem, unreadable = {}, "", ""
    if distributed.rank() == 0:
        manifest, problem, unreadable = examine(read_manifest, path)
    # Rank 0 decides which files there are: another machine may see them late.
    manifest, problem, unreadable = distributed.broadcast_from_rank0(
        (manifest, problem, unreadable)
    )
    if not problem and not unreadable:
        _, problem, unreadable = examine(check_hashes, path, manifest)
    problems, failures = zip(*distributed.all_gather_object((problem, unreadable)))
    return first_nonempty(problems), first_nonempty(failures)


def examine(function, *args) -> tuple:
    """(the result of a function, what is wrong, what cannot be read)."""
    try:
        return function(*args), "", ""
    except Damaged as e:
        return None, printable(str(e)), ""
    except OSError as e:
        return None, "", printable(f"{e.filename or args[0]}: {e.strerror}")
    except (SafetensorError, *BAD_JSON_ERRORS) as e:
        text = f"its manifest.json or a file cannot be read ({type(e).__name__}: {e})"
        return None, printable(text), ""


def read_manifest(path) -> dict:
    """Read manifest.json. Raises Damaged if it, meta.json or a file's size is wrong. Files that it
    does not name are ignored."""
    try:
        text = read_small_file(os.path.join(path, "manifest.json"))
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged("it has no manifest.json")
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise Damaged(f"manifest.json cannot be read ({type(e).__name__}: {e})")
    if text.decode() != json.dumps(manifest, indent=1, ensure_ascii=False) + "\n":
        raise Damaged("manifest.json was altered")
    files = set(list_files(path))
    missing = sorted(set(manifest) - files)
    if missing:
        raise Damaged(f"files in manifest.json are missing: {', '.join(missing)}")
    ignored = sorted(files - set(manifest))
    for name in ignored:
        if name.startswith("optimizer/shard-") and name.endswith(".safetensors"):
            raise Damaged(f"manifest.json does not have {name}")
    if ignored:
        names = ", ".join(ignored)
        print(printable(f"{path}: ignored {names}: not in its manifest.json"), flush=True)
    for name in manifest:
        if os.path.getsize(os.path.join(path, name)) != manifest[name]["bytes"]:
            raise Damaged(f"the size of {name} is not the one in manifest.json")
    for name in ("meta.json", "model.safetensors"):
        if name not in manifest:
            raise Damaged(f"manifest.json does not have {name}")
    check_saved_meta(path, manifest)
    return manifest


def check_saved_meta(path, manifest: dict):
    """Raise Damaged if meta.json is not the one that was saved here, or has a metric that is not
    finite."""
    text = read_small_file(os.path.join(path, "meta.json"))
    if hashlib.sha256(text).hexdigest() != manifest["meta.json"]["sha256"]:
        raise Damaged("the sha256 of meta.json is not the one in manifest.json")
    meta = json.loads(text)
    folders = os.path.abspath(path).split(os.sep)[-2:]
    if folders != [f"round_{meta['round']}", f"step_{meta['step']:06d}"]:
        raise Damaged(f"its meta.json is of round {meta['round']!r} step {meta['step']!r}")
    name = first_not_finite(meta["metrics"])
    if name:
        raise Damaged(f"{name} is {meta['metrics'][name]}")


def check_hashes(path, manifest: dict):
    """Raise Damaged if one of this rank's share of the files has another hash, or if the weights
    are not finite."""
    for name in manifest:
        os.stat(os.path.join(path, name))  # this machine may see a file late: then it is no damage
    for name in sorted(manifest)[distributed.rank() :: distributed.world_size()]:
        file = os.path.join(path, name)
        if sha256(file) != manifest[name]["sha256"]:
            raise Damaged(f"the sha256 of {name} is not the one in manifest.json")
        if name == "model.safetensors":
            with safe_open(file, framework="pt") as f:
                for tensor_name in f.keys():
                    if not torch.isfinite(f.get_tensor(tensor_name)).all():
                        raise Damaged(f"its {NOT_FINITE}: {tensor_name}")


def first_not_finite(metrics: dict) -> str:
    """The name of the first metric that is NaN or infinite, or ""."""
    for name, value in metrics.items():
        if isinstance(value, numbers.Real) and not math.isfinite(value):
            return name
    return ""


def list_files(path) -> list[str]:
    """The files of a checkpoint, relative to it and sorted, without manifest.json."""

    def fail(error):
        raise error

    files = []
    for folder, _, names in os.walk(path, onerror=fail):
        files += [os.path.relpath(os.path.join(folder, name), path) for name in names]
    return sorted(file for file in files if file != "manifest.json")


# ------------------------------------------------------------------------------ removing old ones


def prune_steps(folder, cfg):
    """Remove a round's checkpoints except the last `keep_last` and the best one by `keep_best`, and
    what an earlier removal has left."""
    for path in list_numbered(folder, "removing"):
        try_to_remove(path)
    paths = list_steps(folder)
    best = best_checkpoint(paths, cfg.keep_best) if cfg.keep_best else None
    for path in paths[: -cfg.keep_last]:
        if path != best:
            remove_checkpoint(path)


def best_checkpoint(paths, keep_best: str) -> str | None:
    """The checkpoint with the lowest value of the metric `keep_best`, or the highest of "-metric".
    The earlier one wins a tie. Those whose meta.json cannot be read are left out."""
    highest = keep_best.startswith("-")
    rated = []
    for path in paths:
        try:
            value = read_meta(path)["metrics"].get(keep_best.removeprefix("-"))
        except SystemExit:
            continue
        if isinstance(value, (int, float)) and math.isfinite(value):
            rated.append((-value if highest else value, len(rated), path))
    return min(rated)[2] if rated else None


def prune_rounds(run, first: int, keep_best: str = ""):
    """Remove the checkpoints of the rounds before `first`, except the best one of all rounds by
    `keep_best`. Other files of these rounds are kept."""
    if distributed.rank() == 0:
        best = best_checkpoint(list_checkpoints(run)[::-1], keep_best) if keep_best else None
        for round_id in range(first):
            for path in list_steps(os.path.join(run, f"round_{round_id}")):
                if path != best:
                    remove_checkpoint(path)
    distributed.barrier()


def remove_unfinished(run):
    """Remove what a killed run was writing or removing."""
    for folder in list_rounds(run):
        for name in ("writing", "removing"):
            for path in list_numbered(folder, name):
                try_to_remove(path)


def remove_checkpoint(path):
    """Remove a checkpoint. It is renamed first, so that a step_S folder is always complete."""
    removing = sibling_path(path, "removing")
    try:
        remove_tree(removing)
        os.rename(path, removing)
    except OSError as e:
        removal_problems.append(f"{path}: {e.strerror}")
        return
    try_to_remove(removing)


def try_to_remove(path):
    """Remove a folder or a link. A failure is noted in `removal_problems`."""
    try:
        remove_tree(path)
    except OSError as e:
        removal_problems.append(f"{path}: {e.strerror}")


def remove_tree(path):
    """Remove a folder, a file or a link, if there is one. What a link points to stays."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)


def sibling_path(path, state: str) -> str:
    """The folder of a checkpoint that is being written or removed, or is damaged: step_000012 ->
    writing_000012, removing_000012, damaged_000012."""
    folder, name = os.path.split(path)
    return os.path.join(folder, name.replace("step", state))
