"""Fuzz: more than 2,000 mutated inputs of every kind that a stranger may have made.

Each is refused in one line, or it is read as the data that it is: never a traceback, never more
than five seconds of computing, never a wrong success. Each test says what a wrong success is. The
seed is fixed; FUZZ_SEED=2 tries others.
"""

import ast
import contextlib
import functools
import io
import json
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors

import sample
from data import tokenizer
from data.chat_template import ChatTemplate, NotFollowed, from_jinja
from data.files import sha256, write_json
from data.folder import read_meta, read_stream, token_dtype
from data.jsonl import prepare
from data.rows import check_row, encode_rows, read_rows
from data.template import TEMPLATE, is_template
from model import GPT, GPTConfig
from nanospin import checkpoint, config, preflight, same_run
from tests.mutations import (
    CONTROL,
    duplicate_key,
    mutate_bytes,
    mutate_json,
    run_cases,
    to_bytes,
)
from tools import hf

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("FUZZ_SEED", 1))
SENTENCE = "the loss of a model, and 12 + 30 = 42\n\n(naïve) 中文 \U0001f600"


def check_cases(cases):
    failures = run_cases(cases)
    assert not failures, f"{len(failures)} of {len(cases)}:\n" + "\n".join(failures)


def mutated(rng, value) -> bytes:
    """A mutation of JSON that still is JSON, has a key twice, or is damaged bytes."""
    kind = rng.choice(("json", "json", "json", "json", "twice", "bytes"))
    if kind == "twice" and isinstance(value, dict) and value:
        return duplicate_key(rng, value).encode("utf-8", "surrogatepass")
    if kind == "bytes":
        return mutate_bytes(rng, to_bytes(value))
    return to_bytes(mutate_json(rng, value))


def write(path: str, content: bytes) -> str:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as f:
        f.write(content)
    return path


def read(path: str) -> bytes:
    with open(path, "rb") as f:
        return f.read()


def copied(source: str, folder: str) -> str:
    """A fresh copy of a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    return folder


def is_same(a, b) -> bool:
    """Equal JSON values: numbers by value, texts and lists exactly."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


# -------------------------------------------------------------------------------------------- rows

ROWS = [
    {"prompt": "2 + 2 = ?", "responses": ["4", "5", None], "scores": [2.0, 1.0, 0.5]},
    {"prompt": "and?", "responses": ["yes", "no"], "history": [["a", "b"], ["c", "d"]]},
    {"text": "a whole text", "group": "g"},
    {"prompt": "p", "responses": ["ab", "c"], "ids": [[97, 98, 256], None], "group": "0"},
    {"prompt": "r", "responses": ["naïve \U0001f600"]},
]
LINES = [
    {"prompt": "a", "response": "b"},
    {"prompt": "c", "responses": ["d", "e"]},
    {"prompt": "f", "responses": [{"text": "g", "score": 2}, {"text": "h", "score": 0.5}]},
    {"prompt": "i", "responses": [{"text": "j", "rank": 1}, {"text": "k", "rank": 2}], "url": "u"},
    {"prompt": "l", "response": "m", "history": [["n", "o"]]},
    {"prompt": "p", "responses": ["q", "r"], "scores": [2, 1]},
    {"prompt": "s", "response": "t", "system": "be short"},
    {"prompt": "u", "response": "v", "group": 0},
]
ROW_FIELDS = ("prompt", "responses", "history", "scores", "ids", "group")


def rows_file(rng, rows: list, folder: str, number: int) -> str:
    """A .jsonl file of three good rows and a mutated one."""
    chosen = rng.sample(rows, 4)
    lines = [to_bytes(row) for row in chosen]
    lines[0] = mutated(rng, chosen[0])
    rng.shuffle(lines)
    content = b"\n".join(lines) + b"\n"
    if rng.random() < 0.1:
        content = mutate_bytes(rng, content)
    return write(f"{folder}/{number}.jsonl", content)


def parsed_lines(path: str) -> list:
    with open(path, encoding="utf-8", newline="\n") as f:
        return [json.loads(line) for line in f if line.strip()]


def read_and_encode(path: str, enc, template: str) -> str:
    """Wrong success: a row that was read has another value in a field than the file, or its ids do
    not decode to its prompt and responses."""
    rows = read_rows(path)
    for line, row in zip(parsed_lines(path), rows, strict=True):
        if "text" in line and "prompt" not in line:
            line = {"prompt": "", "responses": [line["text"]]} | line
        for name in ROW_FIELDS:
            if line.get(name) is not None and not is_same(line[name], row.get(name)):
                return f"{name} {line[name]!r} was read as {row.get(name)!r}"
    block_size = 5000
    encoded, _ = encode_rows(rows, enc, template, block_size)
    for row, encoded_row in zip(rows, encoded):
        if encoded_row is None:
            continue
        if row["prompt"] not in enc.decode(encoded_row["prompt"]):
            return f"the prompt {row['prompt'][:60]!r} is not in its ids"
        for text, ids in zip(row["responses"], encoded_row["responses"]):
            if ids is None or row.get("ids"):
                continue
            if enc.decode(ids[:-1]) != text and len(ids) < block_size - len(encoded_row["prompt"]):
                return f"the response {text[:60]!r} is not what its ids say"
    return ""


def prepare_rows(path: str, out: str) -> str:
    """Wrong success: a line is missing in the output, or lost its history, scores, system or
    group."""
    shutil.rmtree(out, ignore_errors=True)
    argv = [path, f"--out={out}", "--val_share=0.5", "--tokenizer=bytes"]
    with contextlib.redirect_stdout(io.StringIO()):
        prepare.main(argv)
    written = []
    for side in ("train", "val"):
        if os.path.exists(f"{out}/{side}.jsonl"):
            written += read_rows(f"{out}/{side}.jsonl")
    by_prompt = {}
    for row in written:
        by_prompt.setdefault(row["prompt"], []).append(row)
    for line in parsed_lines(path):
        if "text" in line:
            continue
        rows = by_prompt.get(line["prompt"], [])
        if not rows:
            return f"the prompt {line['prompt'][:60]!r} is missing and was not refused"
        for name in ("history", "scores", "system"):
            kept = [row for row in rows if is_same(row.get(name), line.get(name))]
            if line.get(name) not in (None, []) and not kept:
                return f"{name} {line[name]!r} of {line['prompt'][:60]!r} was dropped"
        group = line.get("group")
        if group is not None and all(str(row.get("group")) != str(group) for row in rows):
            return f"group {group!r} became {rows[0].get('group')!r}"
    return ""


def sample_rows(path: str, out: str, model, enc) -> str:
    """Wrong success: a prompt of the file has no response, or its history or group is lost."""
    settings = {"template": "Q: {prompt}\nA: ", "max_response": 2, "seed": 0, "max_prompt": 20}
    with contextlib.redirect_stdout(io.StringIO()) as said:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{out}.partial")  # of a case that was refused
        sample.respond_to_file(model, enc, "", path, out, 1, settings)
    responses = read_rows(out)
    with open(path, encoding="utf-8", newline="\n") as f:
        num_asked = sum(1 for line in f if line.strip())
    reasons = (" left no room", " have no prompt")
    if len(responses) < num_asked and not any(reason in said.getvalue() for reason in reasons):
        return f"{len(responses)} responses to {num_asked} rows, nothing said"
    return ""


def test_rows_for_training(tmp_path):
    rng, enc = random.Random(f"rows {SEED}"), tokenizer.load("bytes")
    cases = []
    for i in range(500):
        path = rows_file(rng, ROWS, f"{tmp_path}/rows", i)
        cases.append((path, functools.partial(read_and_encode, path, enc, TEMPLATE)))
    check_cases(cases)


def test_rows_for_prepare(tmp_path):
    rng = random.Random(f"prepare {SEED}")
    cases = []
    for i in range(200):
        path = rows_file(rng, LINES, f"{tmp_path}/rows", i)
        cases.append((path, functools.partial(prepare_rows, path, f"{tmp_path}/out")))
    check_cases(cases)


def test_rows_for_sampling(tmp_path):
    rng, enc = random.Random(f"sampling {SEED}"), tokenizer.load("bytes")
    model = GPT(GPTConfig(vocab_size=257, block_size=48, n_layer=1, n_head=1, n_embd=8)).eval()
    cases = []
    for i in range(60):
        path = rows_file(rng, ROWS, f"{tmp_path}/rows", i)
        run = functools.partial(sample_rows, path, f"{tmp_path}/out.jsonl", model, enc)
        cases.append((path, run))
    check_cases(cases)


# ------------------------------------------------------------------------------------ data folders


def read_folder(folder: str, content: bytes, good: dict) -> str:
    """Wrong success: meta.json gives another tokenizer, dtype or checksum of a file that is read,
    and the folder is used as if it did not."""
    write(f"{folder}/meta.json", content)
    meta = read_meta(folder, ["train.jsonl", "val.jsonl", "train.bin", "val.bin"])
    preflight.check_stream(folder, tokenizer.load("bytes"), "bytes")
    cfg = config.Config(data=folder, max_steps=1, out_dir=f"{folder}_run")
    same_run.run_settings(cfg)  # a run compares its token streams with meta.json here
    for split in ("train", "val"):
        expected = np.fromfile(f"{folder}/{split}.bin", token_dtype(257))
        if not np.array_equal(read_stream(folder, split), expected):
            return f"{split}.bin was read as other tokens"
    for file, entry in meta["files"].items():
        wrong = file in good["files"] and entry["sha256"] != good["files"][file]["sha256"]
        if wrong:
            return f"the sha256 of {file} is another one, and it is read"
    return ""


def test_meta_of_data(tmp_path, workspace):
    rng = random.Random(f"data {SEED}")
    good = json.loads(read(f"{workspace.data}/meta.json"))
    folder = copied(workspace.data, f"{tmp_path}/data")
    cases = []
    for i in range(150):
        content = mutated(rng, good)
        run = functools.partial(read_folder, folder, content, good)
        cases.append((f"data meta {i} {content[:3000]!r}", run))
    check_cases(cases)


# ------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Small data, a pretrained and a fine-tuned run, made in processes of their own."""
    from tests.faults.harness import Workspace

    return Workspace(str(tmp_path_factory.mktemp("fuzz")), SEED)


def reseal(path: str, *, weights: bool = True):
    """Make every hash of a checkpoint right again, as somebody would who knows the format."""
    if weights:
        with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
            meta = json.loads(read(f"{path}/meta.json"))
            meta["weights_sha256"] = sha256(f"{path}/model.safetensors")
            write_json(f"{path}/meta.json", meta)
    checkpoint.write_manifest(path)


def use_checkpoint(path: str, good_tensors: dict) -> str:
    """Wrong success: a checkpoint is used with other weights than were saved, or with other ids."""
    model, enc, meta = GPT.from_checkpoint(path)
    checkpoint.weights_sha256(path)
    if not is_template(meta["config"]["template"]):
        return "its template is not one"
    texts, _ = sample.respond(
        model, enc, meta["config"]["template"], [{"prompt": "a"}], max_response=1, seed=0
    )
    if not isinstance(texts[0], str | None):
        return "it gives no text"
    for name, p in model.named_parameters():
        if name in good_tensors and not torch.equal(p, good_tensors[name]):
            return f"{name} has other values"
    return ""


def changed_meta(path: str, content: bytes, sealed: bool, good_tensors: dict, good: bytes) -> str:
    """Wrong success, unsealed: any other content."""
    write(f"{path}/meta.json", content)
    if sealed:
        reseal(path, weights=False)
        return use_checkpoint(path, good_tensors)
    use_checkpoint(path, good_tensors)
    return "meta.json is another one, and it is used" if content != good else ""


def test_meta_of_checkpoints(tmp_path, workspace):
    rng = random.Random(f"checkpoint {SEED}")
    source = checkpoint.latest(workspace.base_runs["sft"])
    path = copied(source, f"{tmp_path}/round_0/{os.path.basename(source)}")
    good = read(f"{path}/meta.json")
    tensors = load_tensors(read(f"{path}/model.safetensors"))
    cases = []
    for i in range(200):
        content, sealed = mutated(rng, json.loads(good)), i % 4 > 0
        if not sealed:
            shutil.copy(f"{source}/manifest.json", f"{path}/manifest.json")
        run = functools.partial(changed_meta_fresh, source, path, content, sealed, tensors, good)
        cases.append((f"checkpoint meta {i} sealed {sealed} {content[:3000]!r}", run))
    check_cases(cases)


def changed_meta_fresh(source, path, content, sealed, tensors, good):
    shutil.copy(f"{source}/manifest.json", f"{path}/manifest.json")
    return changed_meta(path, content, sealed, tensors, good)


def changed_manifest(path: str, content: bytes, good: dict) -> str:
    """Wrong success: the checkpoint passes for whole while its manifest.json says something else of
    a file that it has, or does not name one that is loaded."""
    write(f"{path}/manifest.json", content)
    found = checkpoint.find_corruption(path)
    with contextlib.suppress(SystemExit):
        checkpoint.read_meta(path)
    if found:
        return "" if "\n" not in found else f"several lines: {found!r}"
    manifest = json.loads(content)
    for name, entry in good.items():
        if name not in manifest:
            return f"{name} is not in it, and nothing is found"
        if not is_same(entry | manifest[name], manifest[name]):
            return f"{name} has no {entry}, and nothing is found"
        if any(manifest[name][key] != value for key, value in entry.items()):
            return f"{name} is {manifest[name]!r}, and nothing is found"
    return ""


def test_manifests(tmp_path, workspace):
    rng = random.Random(f"manifest {SEED}")
    source = checkpoint.latest(workspace.base_runs["sft"])
    path = copied(source, f"{tmp_path}/round_0/{os.path.basename(source)}")
    good = json.loads(read(f"{path}/manifest.json"))
    cases = []
    for i in range(150):
        content = mutated(rng, good)
        if i % 3 == 0:  # in the form that our own code writes
            with contextlib.suppress(ValueError, RecursionError):
                content = json.dumps(json.loads(content), indent=1, ensure_ascii=False) + "\n"
                content = content.encode("utf-8", "surrogatepass")
        run = functools.partial(changed_manifest, path, content, good)
        cases.append((f"manifest {i} {content[:3000]!r}", run))
    check_cases(cases)


# --------------------------------------------------------------------------------------- weights


def mutated_weights(rng, content: bytes) -> bytes:
    """A .safetensors file with a changed header or body."""
    size = int.from_bytes(content[:8], "little")
    header, body = content[8 : 8 + size], content[8 + size :]
    kind = rng.choice(("header", "header", "dtype", "bytes", "body", "size", "number", "twice"))
    if kind == "header":
        header = mutated(rng, json.loads(header))
    elif kind == "dtype":
        values = json.loads(header)
        name = rng.choice([name for name in values if name != "__metadata__"])
        values[name]["dtype"] = rng.choice(("I32", "U32", "F64", "F16", "BF16", "BOOL", "U8", "F8"))
        header = to_bytes(values)
    elif kind == "twice":
        header = duplicate_key(rng, json.loads(header)).encode("utf-8", "surrogatepass")
    elif kind == "bytes":
        return mutate_bytes(rng, content)
    elif kind == "body":
        body = body[: rng.randrange(len(body))] if rng.random() < 0.5 else body + b"\x00" * 8
    elif kind == "number":
        at = 4 * rng.randrange(len(body) // 4)
        values = (float("nan"), float("inf"), float("-inf"))
        body = body[:at] + np.float32(rng.choice(values)).tobytes() + body[at + 4 :]
    elif kind == "size":
        traps = (0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1)
        return rng.choice(traps).to_bytes(8, "little") + header + body
    return len(header).to_bytes(8, "little") + header + body


def changed_weights(source: str, path: str, content: bytes, sealed: bool) -> str:
    """Wrong success, sealed: weights that are not finite, not of a floating-point type, or not
    those that the safetensors package reads. Unsealed: any other content."""
    for name in ("meta.json", "manifest.json"):
        shutil.copy(f"{source}/{name}", f"{path}/{name}")
    write(f"{path}/model.safetensors", content)
    if sealed:
        reseal(path)
    model, _, _ = GPT.from_checkpoint(path)
    if not sealed:
        return "the file is another one, and it is used"
    stored = load_tensors(content)
    for name, p in model.named_parameters():
        if name not in stored:
            continue
        if not stored[name].is_floating_point():
            return f"{name} is {stored[name].dtype}, and it is used"
        if not p.isfinite().all():
            return f"{name} is not finite, and it is used"
        if not torch.equal(p, stored[name].float()):
            return f"{name} is not what the file holds"
    return ""


def test_weights(tmp_path, workspace):
    rng = random.Random(f"weights {SEED}")
    source = checkpoint.latest(workspace.base_runs["sft"])
    path = copied(source, f"{tmp_path}/round_0/{os.path.basename(source)}")
    good = read(f"{path}/model.safetensors")
    cases = []
    for i in range(200):
        content = mutated_weights(rng, good)
        if content == good:
            content += b"\x00"
        file = write(f"{tmp_path}/weights/{i}", content)
        run = functools.partial(changed_weights, source, path, content, i % 4 > 0)
        cases.append((f"weights {i} sealed {i % 4 > 0} {file} {content[8:700]!r}", run))
    check_cases(cases)


# ------------------------------------------------------------------------------------- tokenizers


def small_tokenizer(folder: str):
    """(its tokenizer.json parsed, its tokenizer_config.json parsed, its .tiktoken file)."""
    enc = tokenizer.train([SENTENCE * 3, "the model of the loss"], 280)
    os.makedirs(folder, exist_ok=True)
    tokenizer.to_json(enc, f"{folder}/tokenizer.json")
    tokenizer.save(enc, f"{folder}/a.tiktoken")
    settings = {"eos_token": "<|endoftext|>", "bos_token": None, "add_bos_token": False}
    spec = json.loads(read(f"{folder}/tokenizer.json"))
    spec["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}]}
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [279], "tokens": ["<|endoftext|>"]}
        },
    }
    return spec, settings, read(f"{folder}/a.tiktoken")


def use_tokenizer(path: str) -> str:
    """Wrong success: ids outside the vocabulary, an end-of-text token outside it, or a vocabulary
    that no file of this size can hold."""
    enc = tokenizer.load(path)
    tokenizer.fingerprint(enc)
    ids = tokenizer.encode(enc, SENTENCE)
    enc.decode(ids)
    tokenizer.begin(enc)
    if ids and not 0 <= max(ids) < enc.n_vocab:
        return f"the id {max(ids)} is outside the vocabulary of {enc.n_vocab}"
    if not 0 <= enc.eot_token < enc.n_vocab:
        return f"end-of-text is {enc.eot_token!r}, outside the vocabulary of {enc.n_vocab}"
    if enc.n_vocab > 2**24:
        return f"a vocabulary of {enc.n_vocab} ids"
    return ""


def test_tokenizer_json(tmp_path):
    rng = random.Random(f"tokenizer {SEED}")
    spec, settings, _ = small_tokenizer(f"{tmp_path}/good")
    parts = [name for name in spec if name != "model"]
    cases = []
    for i in range(200):
        folder = f"{tmp_path}/{i}"
        contents = {"tokenizer.json": to_bytes(spec), "tokenizer_config.json": to_bytes(settings)}
        kind = rng.choice(("part", "part", "model", "vocab", "whole", "settings"))
        changed = dict(spec)
        if kind == "part":
            name = rng.choice(parts)
            changed = spec | {name: mutate_json(rng, spec[name])}
        elif kind == "model":
            model = mutate_json(rng, {**spec["model"], "vocab": {}, "merges": []}) or {}
            if isinstance(model, dict):
                changed = spec | {
                    "model": spec["model"] | model | {"vocab": spec["model"]["vocab"]}
                }
        elif kind == "vocab":
            changed = spec | {"model": mutate_json(rng, spec["model"])}
        contents["tokenizer.json"] = to_bytes(changed)
        if kind == "whole":
            contents["tokenizer.json"] = mutated(rng, spec)
        if kind == "settings":
            contents["tokenizer_config.json"] = mutated(rng, settings)
        for name, content in contents.items():
            write(f"{folder}/{name}", content)
        path = f"{folder}/tokenizer.json"
        cases.append((f"{kind} {path}", functools.partial(use_tokenizer, path)))
    check_cases(cases)


def use_tiktoken(path: str, content: bytes) -> str:
    """Wrong success: a line of the file is not a token of the tokenizer."""
    problem = use_tokenizer(path)
    enc = tokenizer.load(path)
    lines = {line for line in content.split(b"\n") if line}
    if not problem and enc.n_vocab != len(lines) + 1:
        problem = f"{len(lines)} different lines give {enc.n_vocab} ids"
    return problem


def test_tiktoken_files(tmp_path):
    rng = random.Random(f"tiktoken {SEED}")
    _, _, good = small_tokenizer(f"{tmp_path}/good")
    cases = []
    for i in range(100):
        lines = good.splitlines()
        at = rng.randrange(len(lines))
        token, rank = lines[at].split()
        changes = (
            b"%s %d" % (token, rng.choice((-1, 0, 2**31, 2**64, 10**30))),
            b"%s %s %s" % (token, rank, rank),
            rank + b" " + token,
            token + b" 1_0",
            token + b" nan",
            b"== " + rank,
            lines[at] + b"\n" + lines[at],
            b"",
        )
        lines[at] = rng.choice(changes)
        content = b"\n".join(lines) + b"\n"
        if i % 2:
            content = mutate_bytes(rng, good)
        path = write(f"{tmp_path}/{i}.tiktoken", content)
        cases.append((path, functools.partial(use_tiktoken, path, content)))
    check_cases(cases)


# ---------------------------------------------------------------------------------- chat templates

CHAT_TEMPLATES = [
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}"
    "{% endif %}{% endfor %}",
]
# What takes for ever, takes all memory, or reaches out of the sandbox.
HOSTILE = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ 'ab' * 10**9 ~ 'c' }}",
    "{{ 9**9**9**9 }}",
    "{{ 'a' | center(10**10) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:10000000000}'.format(1) }}",
    "{{ lipsum(n=10000000) }}",
    "{{ [1] * 10**9 }}",
    "{{ range(10**9) | list }}",
    "{% set x = namespace(v='a') %}{% for i in range(60) %}{% set x.v = x.v ~ x.v %}{% endfor %}",
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch executed') }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.getcwd() }}",
    "{% for m in messages %}{{ m.content }}{% endfor %}" * 2000,
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "{{ 'a'.join(['b' * 10**6] * 10**6) }}",
    "{{ messages | tojson | wordwrap(1) | replace('', 'x' * 10**9) }}",
    "{{ (10**10**8) | string | length }}",
    "{{ 'a' | indent(10**10) }}",
    "{{ '0' * 100000 | int }}",
]


def read_chat_template(source: str) -> str:
    """Wrong success: something that is no template of ours, or that another prompt breaks."""
    chat_template = ChatTemplate(source, {"eos_token": "</s>", "bos_token": "<s>"})
    try:
        template, _ = from_jinja(chat_template, ["<s>", "</s>"])
    except NotFollowed:
        template = TEMPLATE
    if not is_template(template):
        return f"it became {template[:200]!r}"
    if os.path.exists("executed"):
        return "it was executed"
    return ""


def test_chat_templates():
    rng = random.Random(f"jinja {SEED}")
    cases = []
    for source in HOSTILE:
        whole = CHAT_TEMPLATES[0] + source
        cases.append((source[:80], functools.partial(read_chat_template, whole)))
    while len(cases) < 75:
        source = mutate_bytes(rng, rng.choice(CHAT_TEMPLATES).encode()).decode("utf-8", "replace")
        if rng.random() < 0.2:
            source = source.replace("endfor", rng.choice(("endfor", "endif", "end", "for")), 1)
        cases.append((repr(source[:700]), functools.partial(read_chat_template, source)))
    check_cases(cases)


# ---------------------------------------------------------------------------------------- settings

TEXTS = [
    "nan", "inf", "-1", "0", "1e999", "1e-320", "9" * 5000, "[" * 5000, "[]", "{}", "None", "True",
    "", " ", "\ud800", "\x1b[31m", "0x10", "1_000", "١٢", "²", "self-²", "data,self,self-²",
    "data,self,self-99999999999999999999", "{prompt}{prompt}", "a" * 5000, "2**63", "[1e-3,nan]",
    "-0.0", "1e308", "281474976710655", "(1,)", "[[1]]", "\u202e", "..", "/dev/null", "b'a'",
    "os:system", ":", "a:b:c", "[True]", "1j", "'quoted'", "...", "lambda: 1",
]  # fmt: skip


def load_settings(argv: list[str]) -> str:
    """Wrong success: a number that is not finite, or a value that is not what was written."""
    cfg = config.load(argv, GPTConfig)
    for name, value in (vars(cfg) | cfg.model).items():
        values = value if isinstance(value, list) else [value]
        for v in values:
            if isinstance(v, float) and not abs(v) <= config.MAX_FLOAT:
                return f"{name} is {v}"
            if isinstance(v, int) and abs(v) >= 2**48:
                return f"{name} is {v}"
            if isinstance(v, str) and CONTROL.search(v):
                return f"{name} is {v!r}"
    for arg in argv:
        name, _, text = arg[2:].partition("=")
        value = getattr(cfg, name, cfg.model.get(name))
        if isinstance(value, str) and value != text:
            return f"{name}={text!r} became {value!r}"
        if type(value) in (int, float) and ast.literal_eval(text) != value:
            return f"{name}={text!r} became {value!r}"
    return ""


def test_settings(tmp_path):
    rng = random.Random(f"settings {SEED}")
    names = [*config.field_hints(config.Config), *config.field_hints(GPTConfig)]
    cases = []
    for i in range(250):
        chosen = rng.sample(names, rng.choice((1, 1, 2, 3)))
        argv = [f"--{name}={rng.choice(TEXTS)}" for name in chosen]
        if i % 5 == 0:
            argv[0] = mutate_bytes(rng, argv[0].encode("utf-8", "surrogatepass")).decode(
                "utf-8", "surrogateescape"
            )
            argv = [argv[0]]
        if argv[0].startswith("--"):
            cases.append((f"{argv!r}", functools.partial(load_settings, argv)))
    for i in range(50):
        name = rng.choice(names)
        values = ("float('nan')", "10**400", "'\\ud800'", "[[]]", "None", "{}", "1j", "b'a'",
                  "float", "'x' * 10**6", "-1", "[1, 'a']", "lambda: 1", "object()")  # fmt: skip
        text = f"{name} = {rng.choice(values)}\n"
        path = write(f"{tmp_path}/{i}.py", text.encode())
        cases.append((text, functools.partial(config.load, [path], GPTConfig)))
    check_cases([(name, functools.partial(ignore_result, case)) for name, case in cases])


def ignore_result(case) -> str:
    result = case()
    return result if isinstance(result, str) else ""


# ------------------------------------------------------------------------------------ hub's files


def hub_rows(folder: str, out: str) -> str:
    """Wrong success: a row of the output is malformed, or rows are missing and not counted."""
    from data.nectar import prepare as nectar

    shutil.rmtree(out, ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()):
        nectar.main([f"--hub={folder}", f"--out={out}", "--val_share=0.4"])
    meta = json.loads(read(f"{out}/meta.json"))
    written = [row for side in ("train", "val") for row in parsed_lines(f"{out}/{side}.jsonl")]
    for row in written:
        check_row(row, "a row of the output")
    left_out = sum(n for reason, n in meta["dropped"].items() if "responses" not in reason)
    lines = read(f"{folder}/data/train-00000.jsonl").split(b"\n")
    num_lines = len([line for line in lines if line.strip()])
    if len(written) + left_out < num_lines:
        return f"{len(written)} rows and {left_out} counted as dropped, of {num_lines}"
    return ""


def test_hub_rows(tmp_path):
    rng = random.Random(f"hub {SEED}")
    pytest.importorskip("datasets")
    cases = []
    for i in range(40):
        rows = []
        for n in range(12):
            answers = [{"answer": f"{n} {k}", "rank": float(k), "model": "m"} for k in range(3)]
            prompt = f"\n\nHuman: question {n}\n\nAssistant: "
            rows.append({"prompt": prompt, "answers": answers, "turns": 1})
        at = rng.randrange(12)
        lines = [to_bytes(row) for row in rows]
        lines[at] = mutated(rng, rows[at])
        folder = f"{tmp_path}/{i}"
        write(f"{folder}/data/train-00000.jsonl", b"\n".join(lines) + b"\n")
        cases.append((folder, functools.partial(hub_rows, folder, f"{folder}.out")))
    check_cases(cases)


def import_folder(folder: str, out: str, reference: dict) -> str:
    """Wrong success: an imported model whose weights are not those of the folder."""
    shutil.rmtree(out, ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()):
        hf.main(["import", folder, f"--out={out}"])
    model, _, _ = GPT.from_checkpoint(out)
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            return f"{name} is not finite"
        same_shape = name in reference and p.shape == reference[name].shape
        if same_shape and not torch.allclose(p, reference[name]):
            return f"{name} has other values"
    return ""


def test_hub_models(tmp_path, workspace):
    rng = random.Random(f"model {SEED}")
    good, run = f"{tmp_path}/good", workspace.base_runs["sft"]
    with contextlib.redirect_stdout(io.StringIO()):
        hf.main(["export", run, f"--out={good}"])
        hf.main(["import", good, f"--out={tmp_path}/imported"])
    model, _, _ = GPT.from_checkpoint(f"{tmp_path}/imported")
    reference = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = sorted(name for name in os.listdir(good) if name.endswith((".json", ".safetensors")))
    cases = []
    for i in range(120):
        folder = copied(good, f"{tmp_path}/{i}")
        name = rng.choice((*names, "config.json", "config.json"))
        content = read(f"{good}/{name}")
        if name.endswith(".json"):
            content = mutated(rng, json.loads(content))
        else:
            content = mutated_header(rng, content)
        write(f"{folder}/{name}", content)
        run = functools.partial(import_folder, folder, f"{tmp_path}/out", reference)
        cases.append((f"{name} in {folder}", run))
    check_cases(cases)


def mutated_header(rng, content: bytes) -> bytes:
    """A .safetensors file with a changed header; its body, which no hash protects, is as it was."""
    size = int.from_bytes(content[:8], "little")
    header = mutated(rng, json.loads(content[8 : 8 + size]))
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


# ------------------------------------------------------------------------------------ the commands


def run_command(argv: list[str]) -> str:
    """Wrong success: any success of a broken file. And one line of error without control
    characters."""
    done = subprocess.run(
        [sys.executable, *argv], capture_output=True, timeout=60, stdin=subprocess.DEVNULL
    )
    errors = done.stderr.decode("utf-8", "replace").splitlines()
    if done.returncode == 0:
        return "it was accepted"
    if len(errors) != 1 or CONTROL.search(errors[0]):
        return f"status {done.returncode}, {len(errors)} lines of error: {errors[-1:]!r}"
    return ""


def test_command_lines(tmp_path, workspace):
    """Some of the same kinds through the real commands."""
    rng = random.Random(f"commands {SEED}")
    run = copied(workspace.base_runs["sft"], f"{tmp_path}/run")
    path = checkpoint.latest(run)
    size = int.from_bytes(read(f"{path}/model.safetensors")[:8], "little")
    weights = read(f"{path}/model.safetensors")
    header = json.loads(weights[8 : 8 + size])
    header["\x1b]0;x\x07"] = header.pop("wte.weight")
    text = to_bytes(header)
    weights = len(text).to_bytes(8, "little") + text + weights[8 + size :]
    write(f"{path}/model.safetensors", weights)
    reseal(path)
    good = workspace.base_runs["sft"]
    rows = write(f"{tmp_path}/rows.jsonl", b'{"prompt": "\\u001b[31m\\u202e", "responses": [5]}\n')
    deep = write(f"{tmp_path}/deep.jsonl", b"[" * 100000 + b"\n")
    commands = []
    for file in (rows, deep):
        commands += [
            ["sample.py", good, "--prompts", file, "--out", f"{tmp_path}/o.jsonl"],
            ["-m", "data.jsonl.prepare", file, f"--out={tmp_path}/d"],
            ["-m", "tools.show", file],
        ]
    commands += [
        ["sample.py", run, "--prompt", "a"],
        ["eval.py", f"a={run}", f"--data={workspace.data}"],
        ["-m", "tools.hf", "export", run, f"--out={tmp_path}/e"],
        ["-m", "tools.show", f"{tmp_path}/\x1b[31m.jsonl"],
        ["-m", "tools.rebuild", f"{tmp_path}/\x1b[31m", f"--out={tmp_path}/r"],
        ["-m", "tools.plot", "report", f"{tmp_path}/\x1b[31m"],
        ["train.py", f"--init={run}", "--stage=sft", f"--data={workspace.data}", "--device=cpu"],
    ]
    options = ("temperature", "top_p", "top_k", "seed", "max_new_tokens")
    while len(commands) < 24:
        text = rng.choice(("nan", "inf", "1e-320", "-1", "9" * 400, "\x1b[31m", "", "x", "1e999"))
        if text == "1e-320":
            continue
        commands.append(["sample.py", good, "--prompt", "a", f"--{rng.choice(options)}={text}"])
    failures = []
    for argv in commands:
        problem = run_command(argv)
        if problem:
            failures.append(f"{argv!r}: {problem}")
    assert not failures, "\n".join(failures)
