"""Convert checkpoints from and to the format of Hugging Face.

    python -m tools.hf import FOLDER --out=out/gpt2         # a local folder, or org/name
    python -m tools.hf export out/demo/sft --out=out/export # for AutoModelForCausalLM
    python -m tools.hf export out/spin_k3 --out=out/export --dtype=bfloat16 --shard_gb=2

Both directions support the model types of tools/hf_families.py. An import is a run with one
checkpoint: use it as `init` or `teacher`, or with sample.py and eval.py. A setting or a tensor that
has no counterpart here is an error that names it.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import math
import os
import re
import shutil
import sys
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from data import cli, tokenizer
from data.chat_template import (
    CHECK_TEXTS,
    NotFollowed,
    check_ids,
    check_template,
    follow,
    read_chat_source,
    read_chat_template,
    say_other_ids,
    to_jinja,
)
from data.files import atomic_write, parse_json, printable, read_json, sha256, write_json
from data.template import TEMPLATE, end_token, lacks_bos, with_bos
from model import GPT, GPTConfig
from nanospin import checkpoint, config
from tools.hf_families import (
    VOCAB_TABLES,
    full_name,
    head_name,
    parse_hf_config,
    tensor_map,
    to_hf_config,
)

GGUF_ADVICE = (
    " is GGUF; take the original, or convert it with transformers:"
    " AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=FILE).save_pretrained(OUT), and the"
    " same with AutoTokenizer"
)
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# Constants that old files store beside the weights: rotary frequencies, causal masks.
BUFFERS = (
    r".*\.rotary_emb\.inv_freq|transformer\.h\.\d+\.attn\.(bias|masked_bias)"
    r"|gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias)"
)


# ----------------------------------------------------------------------------------------- import


def import_model(
    source: str, out: str, block_size: int = 0, template: str = "", kwargs: dict | None = None
) -> None:
    """Write a Hugging Face model as the checkpoint out/round_0/step_000000.

    block_size 0: the model's. template "": that of the model's chat template, under the variables
    kwargs; if it has none, our default.
    """
    folder = find_folder(source)
    check_format(folder)
    config_path = os.path.join(folder, "config.json")
    hf_model = parse_hf_config(read_json(config_path), config_path)

    enc, tokenizer_name = read_tokenizer(folder)
    if not template:
        chat_template = read_chat_template(folder, enc, kwargs)
        template = with_bos(enc, TEMPLATE)
        if chat_template:
            template = follow(chat_template, enc, folder)
    elif lacks_bos(enc, template):
        print(printable(lacks_bos(enc, template)))
    enc = with_stop_tokens(folder, enc, template)
    describe_sampling(folder)
    if autotokenizer_differs(hf_model.model_type, enc):
        print(TOKENIZER_ADVICE)
    cfg = config.Config(out_dir=out, template=template)
    config.check(config.Config(max_steps=1, template=template))
    check_template(enc, template, folder)

    block_size = choose_block_size(hf_model, block_size)
    vocab_size = choose_vocab_size(config_path, hf_model.vocab_rows, enc, template)
    fields = hf_model.fields | {"block_size": block_size, "vocab_size": vocab_size}
    model_config = GPTConfig(**fields)
    check_size(folder, hf_model.model_type, model_config)
    with torch.device("meta"):
        model = GPT(model_config)

    path = os.path.join(out, "round_0", "step_000000")
    unfinished = checkpoint.sibling_path(path, "writing")
    import_weights(folder, hf_model, model, unfinished)
    if tokenizer_name not in ("gpt2", "bytes"):
        tokenizer.save(enc, os.path.join(unfinished, tokenizer_name))
    meta = {
        "round": 0,
        "step": 0,
        "model": asdict(model.config),
        "config": asdict(cfg),
        "metrics": {},
        "history": {"skipped": 0, "losses": []},
        "tokenizer": tokenizer_name,
        "tokenizer_sha256": tokenizer.fingerprint(enc),
        "source": source,
    }
    if os.path.isdir(source):  # a model of the hub has a commit
        meta["source_sha256"] = source_sha256(source)
    checkpoint.publish(unfinished, path, meta)
    print(
        f"{path}: {hf_model.model_type}, {model.num_params() / 1e6:.2f}M parameters,"
        f" tokenizer {tokenizer_name}, block_size {block_size}, template {template!r}"
    )


def choose_vocab_size(config_path, vocab_rows: int, enc, template: str) -> int:
    """The smaller of the tokenizer's vocabulary and the embedding's rows.

    Ids that have no row must be special tokens that no prompt has, such as an added <pad>.
    """
    if vocab_rows > enc.n_vocab:
        print(
            f"dropping {vocab_rows - enc.n_vocab} of {vocab_rows} embedding rows:"
            f" the tokenizer has {enc.n_vocab} ids, and so will an export"
        )
    if vocab_rows >= enc.n_vocab:
        return enc.n_vocab
    specials = tokenizer.specials(enc)
    used = [enc.eot_token, *tokenizer.stop_ids(enc).values()]
    used += [i for token, i in specials.items() if token in template]
    used += tokenizer.ordinary_ids(enc)
    if max(used) >= vocab_rows:
        raise SystemExit(
            f"{config_path}: vocab_size {vocab_rows} is smaller than the tokenizer's vocabulary of"
            f" {enc.n_vocab}, and prompts or responses can have ids from {vocab_rows} on"
        )
    print(f"the tokenizer has {enc.n_vocab} ids, of which the model knows {vocab_rows}")
    return vocab_rows


def check_format(folder):
    """Exit with what to do if a folder holds an adapter or quantised weights, not a model."""
    names = sorted(os.listdir(folder))
    if "config.json" in names and any(name.startswith("model") for name in names):
        return
    if "adapter_config.json" in names:
        base = read_json(os.path.join(folder, "adapter_config.json")).get("base_model_name_or_path")
        raise SystemExit(
            printable(
                f"{folder} holds an adapter of {base}, not a model; import that, then merge the"
                f" adapter: python -m tools.adapter import {folder} --base=RUN --out=OUT"
            )
        )
    for name in names:
        if name.endswith(".gguf"):
            raise SystemExit(printable(f"{os.path.join(folder, name)}{GGUF_ADVICE}"))


def check_size(folder, model_type, c: GPTConfig):
    """Exit if the files are too small for the matrices of the blocks and the embedding, at two
    bytes a number: config.json could describe a model that fills any memory."""
    block = c.n_embd * (2 * c.n_head * c.head_dim + 2 * c.n_inner)
    needed = 2 * (c.n_layer * block + c.vocab_size * c.n_embd)
    files = set(read_index(folder).values()) or ["model.safetensors"]
    paths = [os.path.join(folder, file) for file in files]
    if not all(map(os.path.exists, paths)):
        return  # open_tensors names the missing file
    found = sum(map(os.path.getsize, paths))
    if found < needed:
        with contextlib.ExitStack() as stack:
            open_tensors(folder, model_type, stack)  # exits if a file is cut
        raise SystemExit(
            f"{folder}/config.json describes a model of more than {needed:,} bytes;"
            f" its safetensors files have {found:,}"
        )


def find_folder(source):
    """A local folder, or the folder to which a commit of the hub is downloaded."""
    if os.path.isdir(source):
        return source
    if source.endswith(PICKLE_SUFFIXES):
        raise SystemExit(
            f"{source} is a pickle, which can run code when loaded; only safetensors are read"
        )
    if source.endswith(".gguf"):
        raise SystemExit(printable(source + GGUF_ADVICE))
    from huggingface_hub import logging, snapshot_download

    logging.set_verbosity(logging.CRITICAL)  # it logs every retry
    name, _, commit = source.partition("@")
    patterns = ["*.json", "*.safetensors", "merges.txt", "*.jinja"]
    try:
        return snapshot_download(name, revision=commit, allow_patterns=patterns)
    except Exception as e:  # whatever the HTTP client raises
        raise SystemExit(
            f"{source} could not be downloaded ({type(e).__name__});"
            " download the folder elsewhere and pass its path"
        )


def pin_commit(source: str) -> str:
    """org/name or org/name@REVISION of the hub as org/name@COMMIT; a path as it is."""
    if os.path.isdir(source) or source.endswith((*PICKLE_SUFFIXES, ".gguf")):
        return source
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", source)
    if not match:
        raise SystemExit(
            printable(
                f"{source}: expected a local folder, or org/name or org/name@REVISION of the hub"
            )
        )
    name, revision = match[1], match[2] or "main"
    if re.fullmatch("[0-9a-f]{40}", revision):
        return source
    import huggingface_hub

    try:
        commit = huggingface_hub.HfApi().model_info(name, revision=revision).sha
    except Exception as e:  # whatever the HTTP client raises
        raise SystemExit(
            f"{source}: no such folder, and the hub does not answer ({type(e).__name__});"
            " download the folder elsewhere and pass its path"
        )
    print(f"{name}: {revision} is the commit {commit}")
    return f"{name}@{commit}"


def choose_block_size(hf_model, block_size):
    """The block_size asked for, checked, or the model's."""
    limit = hf_model.max_block_size
    limited = limit < hf_model.fields["block_size"]
    if not 0 <= block_size <= limit:
        reason = ", the sliding window of some of its layers" if limited else ""
        raise SystemExit(f"block_size must be from 1 to {limit}{reason}, got {block_size}")
    if limited and not block_size:
        print(
            f"block_size {limit}: the sliding window of some layers;"
            " longer sequences are not supported"
        )
    return block_size or limit


def import_weights(folder, hf_model, model, out):
    """Write out/model.safetensors from a folder's tensors, one parameter in memory at a time."""
    positions = hf_model.fields["block_size"]
    tensors = tensor_map(model, hf_model.model_type, hf_model.vocab_rows, positions)
    with contextlib.ExitStack() as stack:
        stored = open_tensors(folder, hf_model.model_type, stack)
        copy_of_embedding = head_name(hf_model.model_type) if model.config.tie_embeddings else ""
        check_tensors(stored, tensors, copy_of_embedding, folder)
        os.makedirs(out)
        makers = {}
        for name, parameter in model.named_parameters():
            vocab_size = model.config.vocab_size
            arguments = (folder, name, parameter, tensors[name], stored, vocab_size)
            makers[name] = parameter.shape, functools.partial(import_parameter, *arguments)
        checkpoint.write_safetensors(os.path.join(out, "model.safetensors"), makers)


def import_parameter(folder, name, parameter, hf_tensors, stored, vocab_size):
    """One of our parameters, float32. The padding of vocabulary tables is 0. Exits with one line if
    a number that is kept is not finite."""
    parts = [stored[hf_name].load().float() for hf_name in hf_tensors.shapes]
    tensor = hf_tensors.join(parts)
    num_rows = parameter.shape[0]
    # a smaller block_size shortens the position table
    tensor = tensor[: vocab_size if name in VOCAB_TABLES else num_rows]
    checkpoint.require_finite(folder, " or ".join(hf_tensors.shapes), tensor)
    if name not in VOCAB_TABLES:
        return tensor
    return F.pad(tensor, (0, 0, 0, num_rows - len(tensor)))


@dataclass
class StoredTensor:
    """A tensor in an open safetensors file."""

    file: safe_open
    name: str

    def load(self):
        return self.file.get_tensor(self.name)

    def shape(self):
        return tuple(self.file.get_slice(self.name).get_shape())

    def dtype(self):
        """The dtype as safetensors writes it: "F32", "BF16" ..."""
        return self.file.get_slice(self.name).get_dtype()


def open_tensors(folder, model_type, stack):
    """{name: StoredTensor} of all safetensors files of a folder, which `stack` closes."""
    index = read_index(folder)
    files = sorted(set(index.values())) or ["model.safetensors"]
    stored = {}
    for file in files:
        path = os.path.join(folder, file)
        try:
            f = stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as e:
            raise SystemExit(printable(f"{path} cannot be read ({' '.join(str(e).split())})"))
        for name in f.keys():
            if index and index.get(name) != file:
                raise SystemExit(
                    printable(f"{path} has {name}, but the index does not list it there")
                )
            parameter = full_name(name, model_type)
            if parameter in stored:
                raise SystemExit(printable(f"{path}: {name} appears twice"))
            stored[parameter] = StoredTensor(f, name)
    if index and len(index) != len(stored):
        raise SystemExit(f"{folder}/model.safetensors.index.json lists tensors that no file has")
    return stored


def source_sha256(folder) -> str:
    """A checksum of the safetensors files of a folder."""
    files = sorted(set(read_index(folder).values())) or ["model.safetensors"]
    hashes = [sha256(os.path.join(folder, file)) for file in files]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def read_index(folder):
    """{tensor: file} of model.safetensors.index.json, {} if there is a single file."""
    path = os.path.join(folder, "model.safetensors")
    if os.path.exists(path):
        return {}
    index_path = f"{path}.index.json"
    if not os.path.exists(index_path):
        message = f"{folder}: model.safetensors is missing"
        pickles = [name for name in sorted(os.listdir(folder)) if name.endswith(PICKLE_SUFFIXES)]
        if pickles:
            message += f"; {pickles[0]} is a pickle, which can run code when loaded, and is refused"
        raise SystemExit(message)

    index = read_json(index_path, ["weight_map"])["weight_map"]
    if not isinstance(index, dict):
        raise SystemExit(f"{index_path}: weight_map must be an object")
    for file in index.values():
        if not isinstance(file, str) or os.path.basename(file) != file:
            raise SystemExit(f"{index_path}: weight_map must name files of the same folder")
    return index


def check_tensors(stored, tensors, copy_of_embedding, folder):
    """Every tensor is used once, none is missing, each has the right shape and a float dtype. A
    tied model may have the embedding a second time, under the name copy_of_embedding."""
    left = {name for name in stored if not re.fullmatch(BUFFERS, name)}
    for hf_tensors in tensors.values():
        for name, shape in hf_tensors.shapes.items():
            if name not in left:
                raise SystemExit(f"{folder}: the tensor {name} is missing")
            left.remove(name)
            found, dtype = stored[name].shape(), stored[name].dtype()
            if found != shape or dtype not in ("F32", "BF16", "F16"):
                raise SystemExit(
                    f"{folder}: {name} has shape {found} and dtype {dtype};"
                    f" config.json needs {shape} of F32, BF16 or F16"
                )
    if copy_of_embedding in left:  # some files store the shared table twice
        embedding_name = next(iter(tensors["wte.weight"].shapes))
        if not torch.equal(stored[embedding_name].load(), stored[copy_of_embedding].load()):
            raise SystemExit(
                f"{folder}: tie_word_embeddings is true, but {copy_of_embedding} is not the"
                " embedding"
            )
        left.remove(copy_of_embedding)
    if left:
        names = ", ".join(sorted(left)[:3])
        raise SystemExit(
            printable(f"{folder}: {len(left)} tensors have no counterpart here: {names}")
        )


def read_tokenizer(folder):
    """The tokenizer of a folder and its name in a checkpoint.

    Read from tokenizer.json, or from vocab.json and merges.txt. It becomes a tiktoken encoding
    if it is GPT-2's kind of byte-level BPE.
    """
    path = os.path.join(folder, "tokenizer.json")
    merges_path = os.path.join(folder, "merges.txt")
    old_format = not os.path.exists(path) and os.path.exists(merges_path)
    if old_format:
        check_old_format(folder)
        with open(merges_path, encoding="utf-8") as f:
            merges = [line.rstrip("\n") for line in f if not line.startswith("#version")]
        vocab = read_json(os.path.join(folder, "vocab.json"))
        parts = {
            "model": {"type": "BPE", "vocab": vocab, "merges": merges},
            "pre_tokenizer": {"type": "ByteLevel"},
        }
    else:
        parts = read_json(path, ["model"])

    enc = tokenizer.from_json(parts)
    if enc is None and old_format:
        raise SystemExit(
            f"{folder}: vocab.json and merges.txt are not a tokenizer like GPT-2's,"
            " and there is no tokenizer.json"
        )
    if enc is None:
        enc = tokenizer.load(path)  # exits if the file is broken
    if not old_format:
        check_added_tokens(folder, parts.get("added_tokens", []), enc)
    say_prefix_space(folder, enc)
    tokenizer.say_unmarked_stops(enc)
    if parts["model"].get("dropout"):
        print("the tokenizer's BPE dropout is off: a text always has the same ids")
    if isinstance(enc, tokenizer.JsonTokenizer):
        return enc, "tokenizer.json"

    eos = content_of(tokenizer.read_settings(folder).get("eos_token"))
    if eos not in (None, tokenizer.EOT):
        print(printable(f"a response ends in {tokenizer.EOT} here; eos_token is {eos!r}"))
    known = {257: "bytes", 50257: "gpt2"}.get(enc.n_vocab)
    if known:
        # without its vocabulary and a network tiktoken cannot load gpt2; then we save a file
        with contextlib.suppress(SystemExit):
            if tokenizer.fingerprint(tokenizer.load(known)) == tokenizer.fingerprint(enc):
                return tokenizer.load(known), known
    return enc, "tokenizer.tiktoken"


SPECIAL_TOKEN_LISTS = ("additional_special_tokens", "extra_special_tokens")


def check_old_format(folder):
    """Exit if a folder without tokenizer.json has tokens beside those of vocab.json, or another
    end-of-text than GPT-2's: they would be plain text here. Also if a text begins with a token."""
    settings = tokenizer.read_settings(folder)
    vocab = read_json(os.path.join(folder, "vocab.json"))
    path = os.path.join(folder, "added_tokens.json")
    added = list(read_json(path)) if os.path.exists(path) else []
    for name in ("added_tokens_decoder", *SPECIAL_TOKEN_LISTS):
        added += listed_tokens(folder, name)
    others = [token for token in added if token not in vocab and token != tokenizer.EOT]
    eos = content_of(settings.get("eos_token"))
    if eos not in (None, tokenizer.EOT):
        others.append(eos)
    if settings.get("add_bos_token"):
        others.append(content_of(settings.get("bos_token")) or tokenizer.EOT)
    if others:
        raise SystemExit(
            printable(
                f"{folder}: vocab.json and merges.txt do not say what becomes of the token"
                f" {others[0]!r}, and there is no tokenizer.json: write one by save_pretrained of"
                " transformers"
            )
        )


def content_of(token):
    """The text of a special token of tokenizer_config.json, which may be an object."""
    return token.get("content") if isinstance(token, dict) else token


def listed_tokens(folder, name: str) -> list[str]:
    """The texts of the tokens in a list or an object of tokenizer_config.json; [] without it. Exits
    with one line if it is something else."""
    tokens = tokenizer.read_settings(folder).get(name) or []
    if isinstance(tokens, dict):
        tokens = list(tokens.values())
    contents = list(map(content_of, tokens)) if isinstance(tokens, list) else [None]
    if not all(isinstance(content, str) for content in contents):
        raise SystemExit(
            printable(f"{folder}/tokenizer_config.json: {name} must hold tokens, texts or objects")
        )
    return contents


def say_prefix_space(folder, enc):
    """Say that tokenizer_config.json asks for another space before a text than the tokenizer puts:
    some classes of transformers follow the first."""
    asked = tokenizer.read_settings(folder).get("add_prefix_space")
    puts_space = isinstance(enc, tokenizer.JsonTokenizer) and enc.puts_space
    if asked is not None and bool(asked) != puts_space:
        print(
            f"add_prefix_space of tokenizer_config.json is {bool(asked)}, and the tokenizer itself"
            f" puts {'a' if puts_space else 'no'} space before a text: that is followed here, in"
            " transformers it depends on the class"
        )


def check_added_tokens(folder, added_tokens: list[dict], enc):
    """Exit if tokenizer_config.json and the added_tokens of tokenizer.json differ in what a token
    takes of the text around it: transformers follows the first, and only the second is read here.
    A token that only the first has is said: here it is text."""
    path = os.path.join(folder, "tokenizer_config.json")
    described = tokenizer.read_settings(folder).get("added_tokens_decoder", {})
    if not isinstance(described, dict) or not all(isinstance(t, dict) for t in described.values()):
        raise SystemExit(f"{path}: added_tokens_decoder must have an object for each id")
    known = {token["content"]: token for token in added_tokens}
    for token in described.values():
        content = str(token.get("content"))
        if content not in known:
            print(printable(f"{content!r} is no token here: only tokenizer_config.json has it"))
            continue
        for flag in ("single_word", "lstrip", "rstrip"):
            value, other = token.get(flag, False), known[content].get(flag, False)
            if value != other:
                text = f"{path}: added_tokens_decoder: {content!r} has {flag} = {value}, and"
                raise SystemExit(printable(f"{text} {other} in tokenizer.json; make the two equal"))
    said = {str(token.get("content")) for token in described.values()}
    for name in SPECIAL_TOKEN_LISTS:
        for content in listed_tokens(folder, name):
            if content not in said and not tokenizer.has_token(enc, content):
                print(printable(f"{content!r} is no token here: only tokenizer_config.json has it"))
            said.add(content)


def with_stop_tokens(folder, enc, template):
    """The tokenizer with the tokens that end a sample, one of which ends a response in training.

    That one is the template's, which is often not eos_token. The others are eos_token and those of
    generation_config.json. Prints what differs from eos_token.
    """
    if not isinstance(enc, tokenizer.JsonTokenizer):
        return enc
    stop_tokens = [enc.eos]
    for token_id in read_eos_ids(folder):
        token = enc.full.id_to_token(token_id)
        if token is not None and token not in stop_tokens:
            stop_tokens.append(token)
    end = end_token(enc, template)
    if end != enc.eos:
        print(f"a response ends in {end!r}, as in the template; eos_token is {enc.eos!r}")
    if end not in stop_tokens:
        print(f"generation_config.json does not list {end!r}; samples stop there all the same")
        stop_tokens.append(end)
    if len(stop_tokens) > 1:
        print(f"samples stop at {', '.join(map(repr, stop_tokens))}")
    return tokenizer.JsonTokenizer(enc.text, end, stop_tokens)


def read_eos_ids(folder) -> list[int]:
    """eos_token_id of generation_config.json, else of config.json: a list of ids."""
    for name in ("generation_config.json", "config.json"):
        path = os.path.join(folder, name)
        if not os.path.exists(path):
            continue
        ids = read_json(path).get("eos_token_id")
        ids = ids if isinstance(ids, list) else [ids]
        ids = [i for i in ids if i is not None]
        if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise SystemExit(f"{path}: eos_token_id must be token ids, got {ids!r}")
        if ids:
            return ids
    return []


def describe_sampling(folder):
    """Print the settings of generation_config.json that change the samples: they are not kept."""
    path = os.path.join(folder, "generation_config.json")
    if not os.path.exists(path):
        return
    settings = read_json(path)
    plain = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
    found = []
    for name, value in plain.items():
        if settings.get(name) not in (None, value):
            found.append(f"{name} {settings[name]}")
    if found:
        listed = ", ".join(found)
        print(
            printable(f"not kept of generation_config.json: {listed}; a run samples as it is set")
        )


def check_logits(folder: str, run: str, tolerance: float = 1e-4) -> None:
    """Compare the logits of transformers' model in a folder with those of ours in a run.

    Exits if they differ by more than tolerance times the largest logit.
    """
    from transformers import AutoModelForCausalLM

    ours, _, _ = GPT.from_checkpoint(run)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    vocab_size = ours.config.vocab_size
    length = min(ours.config.block_size, 512)
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(vocab_size, (2, length), generator=generator)
    with torch.no_grad():
        expected = theirs(idx).logits[..., :vocab_size]
        difference = (ours(idx) - expected).abs().max() / expected.abs().max()
    if not difference <= tolerance:
        raise SystemExit(
            f"{folder}: transformers' logits differ from those of {run} by {difference:.1e}"
            " of the largest; the conversion is wrong"
        )
    print(f"logits agree with transformers' to {difference:.1e} of the largest")


def check_chat(folder: str, run: str, kwargs: dict | None = None) -> None:
    """Compare the ids of transformers' apply_chat_template in a folder with those of a run. Exits
    if they differ. kwargs: variables for the chat template, if there is one."""
    if read_chat_source(folder) is None:
        return
    path = checkpoint.resolve(run)
    meta = checkpoint.read_meta(path)
    enc = checkpoint.read_tokenizer(path, meta)
    try:
        joined = compare_chat(folder, enc, meta["config"]["template"], kwargs)
    except NotFollowed as e:
        raise SystemExit(printable(f"{folder}: apply_chat_template gives other ids: {e}"))
    line = "token ids agree with apply_chat_template's"
    if joined:
        line += f", but for {joined} of {len(CHECK_TEXTS)} test answers in earlier turns"
    print(line)


def compare_chat(folder: str, enc, template: str, kwargs: dict | None = None) -> int:
    """Raises NotFollowed if apply_chat_template gives other ids than a template. Returns the number
    of test answers that the tokenizer joins with the text beside, see `check_ids`."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)

    def render(chats):
        texts = []
        for chat in chats:
            options = chat.job() | (kwargs or {})
            options.pop("date")
            messages = options.pop("messages")
            texts.append(theirs.apply_chat_template(messages, tokenize=False, **options))
        return texts

    def encode(text):
        return theirs(text, add_special_tokens=False).input_ids

    return check_ids(enc, template, render, encode)


# ----------------------------------------------------------------------------------------- export


def export_model(run: str, out: str, dtype: str = "float32", shard_gb: float = math.inf) -> str:
    """Write a run's checkpoint as a folder that transformers loads. Returns the checkpoint.

    Files have at most shard_gb * 10^9 bytes, unless one tensor alone is larger. config.json is
    written last: an unfinished folder is no model.
    """
    if not shard_gb > 0:
        raise SystemExit(f"--shard_gb must be above 0, got {shard_gb}")
    path = checkpoint.resolve(run)
    fields = checkpoint.read_meta(path)["model"]
    model_type, hf_config = to_hf_config(config.model_config_from(fields, GPTConfig, path))
    model, enc, meta = GPT.from_checkpoint(path)
    if meta["model"]["scalar_head"]:
        print("the scalar head (reward or value) is not exported, only the language model")

    torch_dtype = getattr(torch, dtype)
    write_shards(out, hf_weights(model, model_type), torch_dtype, 1e9 * shard_gb)
    token_ids = write_tokenizer(out, enc, meta["config"]["template"], model.config.block_size)
    say_other_ids(out, enc, meta["config"]["template"])
    write_json(
        os.path.join(out, "generation_config.json"), token_ids | sampling_settings(meta["config"])
    )
    name = os.path.basename(os.path.normpath(run))
    with atomic_write(os.path.join(out, "README.md")) as f:
        f.write(model_card(name, model_type, model, meta, enc, dtype))
    write_json(os.path.join(out, "config.json"), hf_config | token_ids | {"dtype": dtype})
    print(f"{out}: {model_type}, {model.num_params() / 1e6:.2f}M parameters, of {path}")
    if autotokenizer_differs(model_type, enc):
        print(TOKENIZER_ADVICE)
    return path


def hf_weights(model, model_type):
    """{name: tensor} of a model under Hugging Face's names. Vocabulary tables have a row for each
    token and no other: a row of 0 would be a logit of 0, and get probability in transformers."""
    c = model.config
    params = dict(model.named_parameters())
    weights = {}
    for name, hf_tensors in tensor_map(model, model_type, c.vocab_size, c.block_size).items():
        parameter = params[name].detach()
        if name in VOCAB_TABLES:
            parameter = parameter[: c.vocab_size]
        weights |= hf_tensors.split(parameter)
    return weights


def write_shards(folder, weights, dtype, max_bytes):
    """Write model.safetensors, or several files of at most max_bytes and their index."""
    sizes = {name: dtype.itemsize * tensor.numel() for name, tensor in weights.items()}
    shards = [[]]  # the names of each file's tensors
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size

    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        makers = {}
        for name in names:
            makers[name] = weights[name].shape, functools.partial(weights.get, name)
            weight_map[name] = file
        checkpoint.write_safetensors(os.path.join(folder, file), makers, dtype)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(os.path.join(folder, "model.safetensors.index.json"), index)


def write_tokenizer(folder, enc, template, block_size):
    """Write tokenizer.json and tokenizer_config.json. Returns the ids of the special tokens."""
    path = os.path.join(folder, "tokenizer.json")
    if isinstance(enc, tokenizer.JsonTokenizer):
        with atomic_write(path) as f:
            f.write(tokenizer.without_dropout(enc.text))
    else:
        tokenizer.to_json(enc, path)
    specials = tokenizer.specials(enc)
    stop_ids = tokenizer.stop_ids(enc)
    eos = next(iter(stop_ids))  # the original model's
    end_of_response = "" if tokenizer.eos(enc) == eos else tokenizer.eos(enc)
    bos = tokenizer.begin(enc)
    if bos not in specials:
        bos = eos
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": block_size,
        "chat_template": to_jinja(template, end_of_response),
    }
    write_json(os.path.join(folder, "tokenizer_config.json"), settings)
    ids = list(stop_ids.values())
    return {
        "bos_token_id": specials.get(bos, stop_ids[eos]),
        "eos_token_id": ids if len(ids) > 1 else ids[0],
        "pad_token_id": stop_ids[eos],
    }


# How Qwen 2 splits a text, in its tokenizer.json and in Qwen2Tokenizer of transformers
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


TOKENIZER_ADVICE = (
    "load its tokenizer by PreTrainedTokenizerFast: for a qwen2 AutoTokenizer of transformers 5"
    " splits texts as Qwen does, not as this tokenizer.json"
)


def autotokenizer_differs(model_type, enc) -> bool:
    """Whether AutoTokenizer reads another tokenizer than was written: for model type qwen2,
    transformers 5 puts Qwen's normalizer and split into the place of those in tokenizer.json."""
    if model_type != "qwen2":
        return False
    if not isinstance(enc, tokenizer.JsonTokenizer):
        return True
    parts = parse_json(enc.text)
    normalizer = (parts.get("normalizer") or {}).get("type")
    steps = (parts.get("pre_tokenizer") or {}).get("pretokenizers") or [{}]
    return normalizer != "NFC" or steps[0].get("pattern") != {"Regex": QWEN_SPLIT}


def sampling_settings(run_config):
    return {
        "do_sample": run_config["temperature"] > 0,
        "temperature": run_config["temperature"] or 1.0,
        "top_k": run_config["top_k"],
        "top_p": run_config["top_p"],
    }


def model_card(name, model_type, model, meta, enc, dtype):
    """The README.md of an export."""
    c = model.config
    run_config = meta["config"]
    metrics = [
        f"| {key} | {value:.4g} |\n"
        for key, value in meta["metrics"].items()
        if isinstance(value, int | float)
    ]
    text = (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n"
        f"# {name}\n\n"
        f"Trained with nanoSPIN (stage `{run_config['stage']}`, round {meta['round']},"
        f" step {meta['step']}) and exported as `{model_type}`:\n"
        f"{model.num_params() / 1e6:.2f}M {dtype} parameters,"
        f" {c.n_layer} layers of width {c.n_embd},\n"
        f"{c.n_head} attention heads ({c.n_kv_head} key/value heads),"
        f" a vocabulary of {c.vocab_size}, a context of {c.block_size} tokens.\n\n"
    )
    if metrics:
        text += f"| validation metric | value |\n|---|---:|\n{''.join(metrics)}\n"
    if autotokenizer_differs(model_type, enc):
        text += "Its tokenizer: `PreTrainedTokenizerFast.from_pretrained`, not `AutoTokenizer`.\n\n"
    text += (
        "The prompt format, which is also the tokenizer's chat template:\n\n"
        f"```\n{run_config['template']}\n```\n\n"
        f"A response ends with `{tokenizer.eos(enc)}`.\n"
    )
    return text


# ----------------------------------------------------------------------------------- command line


@contextlib.contextmanager
def new_folder(path):
    """Make a folder, and remove it again if the code that fills it fails.

    Of two processes only one can make it; the other exits and removes nothing.
    """
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    try:
        os.mkdir(path)
    except FileExistsError:
        raise SystemExit(f"{path} already exists; choose another --out, or remove it")
    try:
        yield
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


def json_object(text: str) -> dict:
    try:
        value = parse_json(text)
    except (ValueError, RecursionError) as e:
        raise argparse.ArgumentTypeError(f"must be JSON: {e}")
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value


def parse_args(argv):
    parser = cli.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    about = "convert a Hugging Face model, local or on the hub, to a run"
    importer = commands.add_parser("import", help=about, description=about)
    importer.add_argument(
        "source",
        help="a folder with config.json, safetensors and tokenizer, or org/name of the hub, at main"
        " or org/name@REVISION; the commit is recorded",
    )
    importer.add_argument(
        "--block_size",
        type=cli.number_type(int, 0),
        default=0,
        help="longest sequence; 0: the model's, or its sliding window",
    )
    importer.add_argument(
        "--template",
        default="",
        help="prompt template (see data/template.py); default: that of the model's chat template, "
        "or our own if it has none",
    )
    importer.add_argument(
        "--chat_template_kwargs",
        type=json_object,
        help="variables that the model's chat template reads, as JSON: "
        """'{"enable_thinking": false}'""",
    )

    about = "convert a run to a folder that transformers loads"
    exporter = commands.add_parser("export", help=about, description=about)
    exporter.add_argument("run", help="a run folder or one of its checkpoints")
    exporter.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights"
    )
    exporter.add_argument(
        "--shard_gb",
        type=float,
        default=math.inf,
        help="split the weights into files of at most this many 10^9 bytes",
    )

    for each in (importer, exporter):
        each.add_argument("--out", required=True, help="the folder to write; must not exist")
        each.add_argument(
            "--check",
            action="store_true",
            help="compare the logits with transformers', which must be installed",
        )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.check and importlib.util.find_spec("transformers") is None:
        raise SystemExit("--check needs transformers: pip install transformers")
    try:
        with new_folder(args.out):
            if args.command == "import":
                kwargs = args.chat_template_kwargs
                source = pin_commit(args.source)
                import_model(source, args.out, args.block_size, args.template, kwargs)
                if args.check:
                    folder = find_folder(source)
                    check_logits(folder, args.out)
                    if not args.template:
                        check_chat(folder, args.out, kwargs)
            else:
                path = export_model(args.run, args.out, args.dtype, args.shard_gb)
                if args.check:
                    tolerance = 1e-4 if args.dtype == "float32" else 0.05
                    check_logits(args.out, path, tolerance)  # the run may have a newer one by now
                    check_chat(args.out, path)
    except (OSError, SafetensorError, ValueError) as e:  # ValueError: GPTConfig's
        raise SystemExit(printable(f"{args.out}: {type(e).__name__}: {e}"))


if __name__ == "__main__":
    sys.exit(cli.run(main))
