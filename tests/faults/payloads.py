"""The section `payloads`: what somebody else would like a run to do.

Every file and text that a user may point a run at is replaced by one that would execute something,
or drive the terminal, if it were more than data. A payload that is executed makes the file
`place.marker`. A run may refuse it, in one line, or use it as the data that it is.
"""

import io
import os
import pickle
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data.files import sha256, write_json
from nanospin.rounds import with_checksum
from tests.faults.harness import Result, Workspace, start
from tests.faults.spoil import (
    CHECKPOINT,
    CONTROL,
    EVAL,
    SAMPLE,
    Place,
    begun,
    change_config,
    changed_data,
    changed_run,
    check_cases,
    ppo,
    pretrain,
    read_json,
    remove_checkpoints,
    reward,
    sft,
    sft_from,
    spin,
    spin_with_teacher,
    swapped_tokenizer,
    train_rows,
    update_hashes,
    write_file,
)

LIMIT = 60  # seconds


@dataclass
class Payload:
    """Arguments of a run that meets a payload."""

    arguments: Callable
    main: Callable | None = None


def payloads(workspace: Workspace, short: bool) -> Result:
    """malicious files through every path that a user may name: nothing is executed, and no control
    character reaches the terminal"""
    cases = WEIGHTS | OTHER_FILES | NAMES | TEXTS
    return check_cases(workspace, short, cases, check_payload)


def check_payload(place: Place, payload: Payload) -> tuple[str, float]:
    """Run into a payload. Returns (what went wrong or "", seconds)."""
    argv = payload.arguments(place)
    start_time = time.time()
    run = start(argv, main=payload.main)
    run.wait(LIMIT)
    problem = harm_done(run, place)
    run.forget()
    return problem, time.time() - start_time


def harm_done(run, place: Place) -> str:
    output = run.output
    executed = [name for name in os.listdir() if name.startswith("executed")]
    for _, _, names in os.walk(place.good):
        executed += [name for name in names if name.startswith("executed")]
    if executed:
        return "it was executed"
    refused = len(run.errors.splitlines()) == 1 and "hung" not in run.status
    if run.status != [0] and not refused:
        return f"ended with {run.status}: ... {output[-300:]!r}"
    control = CONTROL.search(output)
    if control:
        start_of_text = max(0, control.start() - 80)
        return f"a control character is printed: {output[start_of_text:][:200]!r}"
    path = f"{place.folder}/victim"
    if os.path.exists(path):
        with open(path) as f:
            if f.read() != "mine":
                return "a file outside was changed"
    return ""


# ------------------------------------------------------------------------------- what is malicious


class Executed:
    """Its pickle runs a shell command when it is loaded."""

    def __init__(self, marker: str):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def pickled(place) -> bytes:
    return pickle.dumps(Executed(place.marker))


def torch_archive(place) -> bytes:
    """What torch.save writes: a zip archive with a pickle in it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        z.writestr("archive/data.pkl", pickled(place))
        z.writestr("archive/version", "3\n")
    return out.getvalue()


def array_of_objects(place, **more) -> bytes:
    """An .npz file of pickled objects."""
    objects = np.array([Executed(place.marker)], dtype=object)
    names = ("refs", "logps", "values", "advantages", "returns")
    out = io.BytesIO()
    np.savez(out, **dict.fromkeys(names, objects) | more)
    return out.getvalue()


def harmful_texts(place) -> list[str]:
    """Texts that a shell, Python, a template, a path, a terminal or YAML might interpret."""
    command = f"touch {place.marker}"
    return [
        "{prompt}{0.__class__.__init__.__globals__}{{prompt}}%(prompt)s%s%n${prompt}",
        f"$({command}) `{command}` ; {command} | {command}",
        f"__import__('os').system('{command}')",
        f'""" + __import__(\'os\').system(\'{command}\') + """',
        "\x1b]0;title\x07\x1b[2J\x1b[31m\x9b31m\r\x08\x7f",
        f"../../{place.marker}",
        "<|endoftext|>",
        "\x00",
        f"!!python/object/apply:os.system ['{command}']",
    ]


def harmful_data(place) -> str:
    """--data of rows with harmful texts everywhere."""
    changes = {}
    for split in ("train", "val"):
        rows = []
        for i, text in enumerate(harmful_texts(place)):
            responses = [text, f"{text}."]
            rows.append({"prompt": f"{text} {split} {i}", "responses": responses, "group": text})
        changes[f"{split}.jsonl"] = rows
    return changed_data(place, changes)


def harmful_config(place) -> dict:
    """The config in the good SFT run's meta.json, with harmful values."""
    config = read_json(f"{place.run('sft')}/{CHECKPOINT}/meta.json")["config"]
    texts = harmful_texts(place)
    config["template"] = texts[0].replace("{{prompt}}", "") + texts[2]
    config["reward"] = "os:system"
    config["out_dir"] = f"../../{place.marker}"
    config["device"] = f"$(touch {place.marker})"
    return config


def victim(place) -> str:
    """A file outside the run, which must stay as it is."""
    return write_file(place, "victim", "mine")


# ---------------------------------------------------------------------------------------- weights


def harmful_weights(place, stage: str = "pretrain") -> str:
    """A copy of a good run whose weights are a pickle."""
    return changed_run(place, stage, {"model.safetensors": pickled(place)})


def torch_weights(place):
    archive = torch_archive(place)
    return sft_from(place, {"model.safetensors": archive, "pytorch_model.bin": archive})


def huge_header(place):
    return sft_from(place, {"model.safetensors": b"\xff" * 7 + b"\x7f" + pickled(place)})


def harmful_optimizer(place) -> dict[str, bytes]:
    """{file: content} that replaces the optimizer state of the good pretraining run by pickles."""
    changes = {
        "optimizer/.metadata": pickled(place),
        "optimizer/x.pt": torch_archive(place),
    }
    for name in os.listdir(f"{place.run('pretrain')}/{CHECKPOINT}/optimizer"):
        changes[f"optimizer/{name}"] = pickled(place)
    return changes


def teacher_with_optimizer(place):
    return spin_with_teacher(place, changed_run(place, "pretrain", harmful_optimizer(place)))


def resume_with_optimizer(place):
    begun(place, "pretrain")
    change_config(place, max_steps=4)
    for name, content in harmful_optimizer(place).items():
        write_file(place, f"run/{CHECKPOINT}/{name}", content)
    update_hashes(f"{place.out}/{CHECKPOINT}")
    return pretrain(place, "--max_steps=4")


WEIGHTS = {
    "weights that are a pickle": Payload(
        lambda place: sft(place, f"--init={harmful_weights(place)}")
    ),
    "weights that torch.save wrote": Payload(torch_weights),
    "weights whose header is huge": Payload(huge_header),
    "weights that are sampled from": Payload(
        lambda place: [harmful_weights(place, "sft"), "--prompt", "a"], SAMPLE
    ),
    "a reward model that is a pickle": Payload(
        lambda place: ppo(place, f"--reward={harmful_weights(place, 'reward')}")
    ),
    "a judge that is a pickle": Payload(
        lambda place: [
            f"a={place.run('sft')}",
            f"--data={place.data}",
            f"--judge={harmful_weights(place, 'reward')}",
        ],
        EVAL,
    ),
    "a teacher's optimizer of pickles": Payload(teacher_with_optimizer),
    "a run's own optimizer of pickles": Payload(resume_with_optimizer),
}


# ------------------------------------------------------------------------------------ other files


def reference_of_objects(place):
    with np.load(f"{place.run('spin')}/round_0/train.ref.npz") as f:
        content = array_of_objects(place, of=f["of"])
    return spin(remove_checkpoints(begun(place, "spin", "round_0/train.ref.npz", content)))


def pickled_reference(place):
    begun(place, "spin", "round_0/train.ref.npz", pickled(place))
    return spin(remove_checkpoints(place))


def rollout_of_objects(place):
    """rollout.npz holds objects, and collect.json has its hash."""
    begun(place, "ppo", "round_0/rollout.npz", array_of_objects(place))
    path = f"{place.out}/round_0/collect.json"
    manifest = read_json(path)
    manifest["files"]["rollout.npz"] = sha256(f"{place.out}/round_0/rollout.npz")
    write_json(path, with_checksum(manifest))
    return ppo(remove_checkpoints(place))


def pickled_stream(place):
    content = pickled(place) + b" " * 4000
    content += b" " * (len(content) % 2)
    return pretrain(place, changed_data(place, {"train.bin": content}))


def reducing_meta(place):
    dtype = {"__reduce__": ["os.system", f"touch {place.marker}"]}
    source = f"__import__('os').system('touch {place.marker}')"
    return pretrain(place, changed_data(place, dtype=dtype, source=source))


def tokenizer_outside_data(place):
    path = swapped_tokenizer(place, "o.tiktoken", (0, 0))
    return pretrain(place, changed_data(place, tokenizer=f"../{os.path.basename(path)}"))


def manifest_of_files_outside(place):
    begun(place, "pretrain")
    path = f"{place.out}/{CHECKPOINT}/manifest.json"
    manifest = read_json(path)
    manifest["../../../../victim"] = {"sha256": sha256(victim(place)), "bytes": 4}
    manifest["/etc/passwd"] = {"sha256": "", "bytes": 0}
    write_json(path, manifest)
    return pretrain(place)


def tokenizer_outside_checkpoint(place):
    victim(place)
    return sft_from(place, tokenizer="../../../victim")


OTHER_FILES = {
    "a teacher's file that is a pickle": Payload(
        lambda place: spin_with_teacher(place, write_file(place, "t.jsonl", pickled(place)))
    ),
    "reference of objects": Payload(reference_of_objects),
    "reference that is a pickle": Payload(pickled_reference),
    "rollout of objects": Payload(rollout_of_objects),
    "tokenizer that is a pickle": Payload(
        lambda place: pretrain(
            place, f"--tokenizer={write_file(place, 't.tiktoken', pickled(place))}"
        )
    ),
    "stream that is a pickle": Payload(pickled_stream),
    "rows that are a pickle": Payload(lambda place: sft(place, train_rows(place, pickled(place)))),
    "data of dtype object": Payload(
        lambda place: pretrain(place, changed_data(place, dtype="object"))
    ),
    "data's meta.json that reduces": Payload(reducing_meta),
    "data's tokenizer outside": Payload(tokenizer_outside_data),
    "manifest that is a pickle": Payload(
        lambda place: sft_from(place, {"manifest.json": pickled(place)}, update=False)
    ),
    "meta.json that is a pickle": Payload(
        lambda place: sft_from(place, {"meta.json": pickled(place)})
    ),
    "manifest that names files outside": Payload(manifest_of_files_outside),
    "checkpoint's config with code": Payload(
        lambda place: [
            changed_run(place, "sft", config=harmful_config(place)),
            "--prompt",
            "a",
            "--temperature=0",
        ],
        SAMPLE,
    ),
    "checkpoint's tokenizer outside": Payload(tokenizer_outside_checkpoint),
    "checkpoint's tokenizer anywhere": Payload(
        lambda place: sft_from(place, tokenizer=victim(place))
    ),
}


# ------------------------------------------------------------------------------------------ names


def escapes_in_round(place):
    begun(place, "pretrain")
    update_hashes(f"{place.out}/{CHECKPOINT}", {"round": "\x1b[31m"})
    return pretrain(place)


def escapes_in_file_name(place):
    begun(place, "pretrain")
    write_file(place, f"run/{CHECKPOINT}/\x1b[31mx", "")
    return pretrain(place)


def shell_in_out_dir(place):
    name = f"a;touch {os.path.basename(place.marker)};$(touch executed)`touch executed`&|'\""
    return pretrain(place, f"--out_dir={place.folder}/{name}")


NAMES = {
    "checkpoint's settings with escapes": Payload(
        lambda place: sft_from(place, model={"\x1b]0;x\x07": 1})
    ),
    "checkpoint's round with escapes": Payload(escapes_in_round),
    "file names with escapes": Payload(escapes_in_file_name),
    "data's tokenizer with escapes": Payload(
        lambda place: pretrain(
            place,
            changed_data(place, tokenizer="\x1b]0;x\x07.tiktoken"),
            f"--tokenizer={swapped_tokenizer(place)}",
        )
    ),
    "out_dir with shell commands": Payload(shell_in_out_dir),
    "out_dir of lines": Payload(
        lambda place: pretrain(place, f"--out_dir={place.folder}/a\ntouch {place.marker}\n")
    ),
    "names of checkpoints with escapes": Payload(
        lambda place: ["\x1b[31m$(touch executed)=x\ny", f"--data={place.data}"], EVAL
    ),
}


# ------------------------------------------------------------------------------------------ texts


def train_on_harmful_rows(place):
    """Every loss is a spike, so every row is printed."""
    return sft(
        place, harmful_data(place), "--max_steps=12", "--loss_spike_factor=0.001", "--batch_size=2"
    )


def sample_harmful_prompts(place):
    prompts = harmful_data(place).removeprefix("--data=") + "/val.jsonl"
    return [place.run("sft"), "--prompts", prompts, "--out", f"{place.folder}/o.jsonl"]


def evaluate_harmful_rows(place):
    judge = f"--judge={place.run('reward')}"
    return [f"a={place.run('sft')}", harmful_data(place), judge, f"--out={place.folder}/o"]


TEXTS = {
    "rows of harmful texts": Payload(train_on_harmful_rows),
    "harmful texts in self-play": Payload(
        lambda place: spin(place, harmful_data(place), "--temperature=2")
    ),
    "harmful prompts that a teacher lacks": Payload(
        lambda place: spin_with_teacher(place, f"{place.data}/train.jsonl", harmful_data(place))
    ),
    "harmful prompts without scores": Payload(
        lambda place: reward(place, harmful_data(place), "--score_margin=1")
    ),
    "harmful prompts of a file": Payload(sample_harmful_prompts, SAMPLE),
    "harmful rows under eval": Payload(evaluate_harmful_rows, EVAL),
    "a harmful prompt": Payload(
        lambda place: [
            place.run("sft"),
            "--raw",
            "--prompt",
            "".join(harmful_texts(place)[2:4]),
            "--temperature=1000",
        ],
        SAMPLE,
    ),
    "a model that says anything": Payload(
        lambda place: [
            place.run("sft"),
            "--prompt",
            "a",
            "--temperature=1000",
            "--max_new_tokens=60",
        ],
        SAMPLE,
    ),
}
