"""Convert LoRA adapters to and from the format of PEFT.

    python -m tools.adapter export out/run --out=out/adapter   # for PeftModel.from_pretrained
    python -m tools.adapter import FOLDER --base=out/qwen3 --out=out/merged

`export` writes the adapter of a run that was trained with lora_rank. `import` merges an adapter
into a run, its base: the result is a run like those of tools.hf. A setting or a tensor that has no
counterpart here is an error that names it.
"""

import os
import re
import sys

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from data import cli, tokenizer
from data.files import printable, read_json, write_json
from model import GPT, GPTConfig
from nanospin import checkpoint, config, lora
from tools.hf import new_folder, source_sha256
from tools.hf_families import HFTensors, tensor_map, to_hf_config

PREFIX = "base_model.model."  # of the names in adapter_model.safetensors

# Settings of adapter_config.json that are read here, or do not change what a trained adapter does.
KNOWN_SETTINGS = set(
    """
    auto_mapping base_model_name_or_path fan_in_fan_out inference_mode layers_pattern
    layers_to_transform lora_alpha lora_dropout megatron_core peft_type peft_version
    qalora_group_size r rank_pattern revision target_modules exclude_modules task_type use_rslora
    """.split()
)
# Values of the others that say nothing. pissa and the like also change the base's weights.
EMPTY_VALUES = (None, False, "", "none", [], {})
PLAIN_INITS = (True, False, "gaussian", "orthogonal")


def build_shape(meta: dict, path: str) -> GPT:
    """The model of a checkpoint on the meta device, without a scalar head."""
    settings = meta["model"] | {"scalar_head": False}
    with torch.device("meta"):
        return GPT(config.model_config_from(settings, GPTConfig, f"{path}/meta.json"))


def hf_tensors(model: GPT) -> tuple[str, dict]:
    """(model type, {our parameter: its HFTensors}) of a model."""
    c = model.config
    model_type, _ = to_hf_config(c)
    return model_type, tensor_map(model, model_type, c.vocab_size, c.block_size)


# ----------------------------------------------------------------------------------------- export


def export_adapter(run: str, out: str):
    """Write adapter_model.safetensors and adapter_config.json of a run's adapter."""
    path = checkpoint.resolve(run)
    meta = checkpoint.read_meta(path)
    file = os.path.join(path, "adapter.safetensors")
    if not os.path.exists(file):
        raise SystemExit(f"{path} has no adapter: it was not trained with lora_rank")
    stored = load_file(file)
    model = build_shape(meta, path)
    model_type, mapped = hf_tensors(model)
    rank = meta["config"]["lora_rank"]
    tensors, modules, rank_pattern = {}, set(), {}
    for name, A in stored.items():
        if not name.endswith(".lora_A"):
            continue
        layer = name.removesuffix(".lora_A")
        B = stored[f"{layer}.lora_B"]
        for module, (a, b) in split_parts(layer, A, B, mapped, model.config).items():
            tensors[f"{PREFIX}{module}.lora_A.weight"] = a.shape, lambda a=a: a
            tensors[f"{PREFIX}{module}.lora_B.weight"] = b.shape, lambda b=b: b
            target = ".".join(module.split(".")[-2:])  # attn.c_proj is not mlp.c_proj
            modules.add(target)
            if len(a) != rank:
                rank_pattern[target] = len(a)
    checkpoint.write_safetensors(os.path.join(out, "adapter_model.safetensors"), tensors)
    if "scalar_head.weight" in stored:
        print("the scalar head (reward or value) is not exported, only the language model")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        **base_model(meta["config"]["init"], checkpoint.read_meta_of_init(meta)),
        "r": rank,
        "lora_alpha": meta["config"]["lora_alpha"],
        "lora_dropout": 0.0,
        "target_modules": sorted(modules),
        "rank_pattern": rank_pattern,
        "fan_in_fan_out": model_type == "gpt2",
        "bias": "none",
        "inference_mode": True,
    }
    write_json(os.path.join(out, "adapter_config.json"), settings)
    print(f"{out}: an adapter of rank {rank} in {len(tensors) // 2} layers of {model_type}")


def split_parts(layer: str, A, B, mapped, c: GPTConfig) -> dict:
    """{module of Hugging Face: (A, B)} of one of our layers.

    Where a fused matrix is one module there too, as in GPT-2, its parts become one adapter of their
    summed rank. PEFT divides by that rank, so B is multiplied by the number of parts.
    """
    hf_tensors = mapped[f"{layer}.weight"]
    modules = [name.removesuffix(".weight") for name in hf_tensors.shapes]
    rows = lora.part_rows(layer, len(B), c)
    parts = B.split(rows)
    if len(modules) == len(rows):
        return dict(zip(modules, zip(A.chunk(len(rows)), parts)))
    assert len(modules) == 1, modules
    B = len(rows) * torch.block_diag(*parts)
    if hf_tensors.heads:  # GPT-NeoX has another order of rows
        (B,) = hf_tensors.split(B).values()
    return {modules[0]: (A, B)}


def base_model(base: str, meta: dict | None) -> dict:
    """PEFT's settings that name the base of a run: what it was imported from. If that is not known
    or not there, the path of its checkpoint, which transformers refuses to load.

    meta: the base's meta.json; None if there is none, or another checkpoint is there now.
    """
    if meta is None:
        print(
            f"{printable(base)} cannot be read, or is another checkpoint than the one that this "
            "adapter belongs to"
        )
    source = base if meta is None else meta.get("source") or base
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+)@([0-9a-f]{40})", source)
    if hub and not os.path.exists(source):
        return {"base_model_name_or_path": hub[1], "revision": hub[2]}
    # A merge by an older version names its adapter, which is only a part of this base.
    is_adapter = os.path.exists(os.path.join(source, "adapter_config.json"))
    if is_adapter or not os.path.exists(source):
        source = base
    elif source != base and is_other_model(source, meta.get("source_sha256")):
        print(f"{printable(source)} has other weights than the model that was imported from it")
        source = base
    return {"base_model_name_or_path": source}


def is_other_model(folder: str, expected: str | None) -> bool:
    """Whether a folder has other weights than at its import. expected: their checksum of then; None
    in imports by older versions."""
    try:
        return expected is not None and source_sha256(folder) != expected
    except (SystemExit, OSError):  # files are missing
        return True


# ----------------------------------------------------------------------------------------- import


def import_adapter(folder: str, base: str, out: str):
    """Write a run with the checkpoint of another one and an adapter merged into it."""
    path = checkpoint.resolve(base)
    meta = checkpoint.read_meta(path)
    settings_path = os.path.join(folder, "adapter_config.json")
    settings = read_json(settings_path)
    check_settings(settings, settings_path)
    file = os.path.join(folder, "adapter_model.safetensors")
    adapters = {}
    for name, tensor in load_file(file).items():
        adapters[name.removeprefix(PREFIX)] = tensor.float()

    model = build_shape(meta, path)
    _, mapped = hf_tensors(model)
    changes = {}
    for name, parameter in model.named_parameters():
        if name.startswith("h.") and name.endswith(".weight") and parameter.dim() == 2:
            change = change_of(mapped[name], parameter.shape, adapters, settings, file)
            if change is not None:
                changes[name] = change
    if adapters:
        raise SystemExit(printable(f"{file}: {min(adapters)} has no counterpart"))
    if not changes:
        raise SystemExit(f"{file} has no adapter")

    target = os.path.join(out, "round_0", "step_000000")
    unfinished = checkpoint.sibling_path(target, "writing")
    os.makedirs(unfinished)
    with safe_open(os.path.join(path, "model.safetensors"), framework="pt") as f:

        def make(name):
            weight = f.get_tensor(name).float()
            return weight + changes[name] if name in changes else weight

        tensors = {}
        for name in f.keys():
            shape = f.get_slice(name).get_shape()
            tensors[name] = shape, lambda name=name: make(name)
        checkpoint.write_safetensors(os.path.join(unfinished, "model.safetensors"), tensors)
    enc = checkpoint.read_tokenizer(path, meta)
    if meta["tokenizer"] not in ("gpt2", "bytes"):
        tokenizer.save(enc, os.path.join(unfinished, meta["tokenizer"]))
    merged = {name: meta[name] for name in ("model", "tokenizer", "tokenizer_sha256")}
    merged["config"] = meta["config"] | {"out_dir": out, "lora_rank": 0}
    merged |= {"round": 0, "step": 0, "metrics": {}, "history": {"skipped": 0, "losses": []}}
    # not `source`, from which a base is imported
    merged |= {"base": path, "base_sha256": meta["weights_sha256"], "adapter": folder}
    checkpoint.publish(unfinished, target, merged)
    print(f"{target}: {path} with the adapter {folder}, merged into {len(changes)} matrices")


def check_settings(settings: dict, path: str):
    """Exit with one line if an adapter_config.json has a setting that is not supported."""
    if settings.get("peft_type") != "LORA":
        raise SystemExit(
            printable(
                f"{path}: peft_type {settings.get('peft_type')!r} is not supported, only LORA"
            )
        )
    for name, value in settings.items():
        if name == "init_lora_weights":
            fine = value in PLAIN_INITS
        else:
            fine = name in KNOWN_SETTINGS or value in EMPTY_VALUES
        if not fine:
            raise SystemExit(printable(f"{path}: {name} = {value!r} is not supported"))
    config.convert("lora_alpha", settings.get("lora_alpha"), float, path)
    config.convert("r", settings.get("r"), int, path)
    if not isinstance(settings.get("rank_pattern") or {}, dict):
        raise SystemExit(f"{path}: rank_pattern must be an object")


def change_of(tensors: HFTensors, shape, adapters: dict, settings: dict, file: str):
    """What adapters add to one of our matrices of this shape, (alpha / r) B A of each of its parts;
    None if there is none. They are taken out of `adapters`."""
    parts, found = [], False
    for name, hf_shape in tensors.shapes.items():
        module = name.removesuffix(".weight")
        rows = hf_shape[1] if tensors.transposed else hf_shape[0]
        A = adapters.pop(f"{module}.lora_A.weight", None)
        B = adapters.pop(f"{module}.lora_B.weight", None)
        if A is None or B is None:
            if A is not B:
                raise SystemExit(printable(f"{file}: {module} has only one of lora_A and lora_B"))
            parts.append(torch.zeros(rows, shape[1]))
            continue
        found = True
        fits = A.dim() == B.dim() == 2 and A.shape[1] == shape[1] and B.shape == (rows, len(A))
        if not fits:
            raise SystemExit(
                printable(
                    f"{file}: {module} has lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)}, "
                    f"the base's matrix is {(rows, shape[1])}"
                )
            )
        # peft.add_weighted_adapter can save tensors of a rank that its settings do not have. Then
        # the scale is not known.
        ranks = [settings["r"], *(settings.get("rank_pattern") or {}).values()]
        if len(A) not in ranks:
            raise SystemExit(
                printable(f"{file}: {module} has rank {len(A)}, which adapter_config.json has not")
            )
        rank = len(A) ** 0.5 if settings.get("use_rslora") else len(A)
        parts.append(settings["lora_alpha"] / rank * B @ A)
    if not found:
        return None
    return tensors.join(parts) if tensors.heads else torch.cat(parts)


# ------------------------------------------------------------------------------------ command line


def parse_args(argv):
    parser = cli.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="import | export")
    about = "an adapter of PEFT, merged into a run -> a run"
    importer = commands.add_parser("import", help=about, description=about)
    importer.add_argument("folder", metavar="FOLDER", help="with adapter_config.json")
    importer.add_argument("--base", required=True, help="the run that the adapter is of")
    about = "the adapter of a run with lora_rank -> a folder for PEFT"
    exporter = commands.add_parser("export", help=about, description=about)
    exporter.add_argument("run", help="a run folder or one of its checkpoints")
    for each in (importer, exporter):
        each.add_argument("--out", required=True, help="the folder to write; must not exist")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        with new_folder(args.out):
            if args.command == "export":
                export_adapter(args.run, args.out)
            else:
                import_adapter(args.folder, args.base, args.out)
    except (OSError, SafetensorError) as e:
        raise SystemExit(printable(f"{args.out}: {type(e).__name__}: {e}"))


if __name__ == "__main__":
    sys.exit(cli.run(main))
