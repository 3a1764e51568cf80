"""Three evaluations of one model agree: lm-evaluation-harness on its export, the harness on the run
through adapter.py, and eval.py.

Accuracies and greedy texts are equal, bits per byte to 1e-3. Skipped where lm-eval is not
installed; `make test-peers` installs it.
"""

import json
import math
import os
import random
from dataclasses import dataclass

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed; make test-peers installs it")

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

import eval as evaluation
import train
from data import tokenizer
from data.folder import write_meta
from data.rows import read_rows, write_rows
from model import GPT
from tests.peers.adapter import NanoSpinLM
from tools import hf

WORDS = (
    "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn "
    "fünfzehn sechzehn siebzehn achtzehn"
).split()
# no space at the end: the harness would count it to the answer
TEMPLATE = "Frage: {prompt}\nAntwort:"
RUNS = {
    "classic, bytes": ["--max_steps=200"],
    "modern, BPE": [
        "--max_steps=100",
        "--position=rotary",
        "--norm=rmsnorm",
        "--mlp=swiglu",
        "--bias=False",
        "--tie_embeddings=False",
        "--n_kv_head=1",
    ],
}


# ----------------------------------------------------------------------------------- data and model


def make_sum(rng, a, b):
    """A sum in German words with four answers, the right one first."""
    right = WORDS[a + b]
    wrong = rng.sample([word for word in WORDS if word != right], 3)
    return {
        "prompt": f"{WORDS[a]} und {WORDS[b]}?",
        "word": f" {right}",
        "responses": [f" {word}, denn {a}+{b}" for word in [right, *wrong]],
    }


def make_text(rng, pairs):
    """Several sums in one text; most texts are longer than block_size."""
    chosen = rng.sample(pairs, rng.choice([1, 4, 6]))
    parts = [f"{WORDS[a]} und {WORDS[b]} macht {WORDS[a + b]}" for a, b in chosen]
    return {"text": "; ".join(parts)}


def make_data(folder):
    """Data folders "sums" (half of the validation rows are training rows) and "texts"; a BPE."""
    rng = random.Random(0)
    pairs = []
    for a in range(10):
        pairs += [(a, b) for b in range(10)]
    rng.shuffle(pairs)
    sums = [make_sum(rng, a, b) for a, b in pairs]
    texts = [make_text(rng, pairs) for _ in range(12)]

    for name in ("sums", "texts"):
        os.makedirs(f"{folder}/{name}", exist_ok=True)
    write_rows(f"{folder}/sums/train.jsonl", sums[:60])
    write_rows(f"{folder}/sums/val.jsonl", sums[44:76])
    write_rows(f"{folder}/texts/train.jsonl", texts)
    write_rows(f"{folder}/texts/val.jsonl", texts)
    for name in ("sums", "texts"):
        write_meta(f"{folder}/{name}", None, "made up")
    corpus = [json.dumps(row, ensure_ascii=False) for row in sums + texts]
    tokenizer.save(tokenizer.train(corpus, 320), f"{folder}/bpe.tiktoken")


@pytest.fixture(scope="module", params=RUNS)
def folder(request, tmp_path_factory):
    """A folder with data, "run", a model that is sometimes right, and "export", the same model."""
    folder = str(tmp_path_factory.mktemp("judges"))
    make_data(folder)
    name = f"{folder}/bpe.tiktoken" if "BPE" in request.param else "bytes"
    train.main(
        [
            "--stage=sft",
            f"--out_dir={folder}/run",
            f"--data={folder}/sums",
            f"--tokenizer={name}",
            f"--template={TEMPLATE}",
            "--n_layer=2",
            "--n_head=2",
            "--n_embd=64",
            "--block_size=96",
            "--max_response=24",
            "--batch_size=16",
            "--lr=3e-3",
            "--eval_rows=8",
            "--device=cpu",
            *RUNS[request.param],
        ]
    )
    hf.main(["export", f"{folder}/run", f"--out={folder}/export"])
    return folder


# ------------------------------------------------------------------------------------- evaluations


def make_task(folder, name, output_type, data, **options):
    """A task of the harness on a local file."""
    return {
        "task": name,
        "output_type": output_type,
        "dataset_path": "json",
        "test_split": "test",
        "dataset_kwargs": {
            "data_files": {"test": f"{folder}/{data}/val.jsonl"},
            "cache_dir": f"{folder}/cache",
        },
    } | options


def make_tasks(folder):
    """A task of each of the harness's kinds, and generation with and without a stop sequence."""

    def generation(name, target, stop):
        return make_task(
            folder,
            name,
            "generate_until",
            "sums",
            doc_to_text="{{prompt}}",
            doc_to_target=target,
            generation_kwargs={"until": stop, "max_gen_toks": 24, "do_sample": False},
            metric_list=[{"metric": "exact_match"}],
        )

    choice = make_task(
        folder,
        "choice",
        "multiple_choice",
        "sums",
        doc_to_text="{{prompt}}",
        doc_to_choice="{{responses}}",
        doc_to_target=0,
        target_delimiter="",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}, {"metric": "acc_bytes"}],
    )
    rolling = make_task(
        folder,
        "rolling",
        "loglikelihood_rolling",
        "texts",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
    )
    word = generation("word", "{{word}}", [","])
    whole = generation("whole", "{{responses[0]}}", [])
    return {"choice": choice, "rolling": rolling, "word": word, "whole": whole}


@dataclass
class HarnessResult:
    metrics: dict  # {task: {metric: value}}
    answers: dict  # {task: {prompt or text: the model's answers}}


def run_harness(model, folder, args=None, tasks=("choice", "rolling", "word", "whole")):
    """Evaluate with the harness. model: a name of its registry with args, or an LM object."""
    available = make_tasks(folder)
    result = simple_evaluate(
        model=model,
        model_args=args,
        tasks=[available[name] for name in tasks],
        task_manager=TaskManager(include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
        batch_size=8,
        device="cpu",
        verbosity="ERROR",
    )
    metrics, answers = {}, {}
    for task, values in result["results"].items():
        metrics[task] = {}
        for key, value in values.items():
            if key.endswith(",none"):
                metrics[task][key.removesuffix(",none")] = value
    for task, samples in result["samples"].items():
        answers[task] = {}
        for sample in samples:
            doc = sample["doc"]
            answers[task][doc.get("prompt") or doc["text"]] = sample["filtered_resps"]
    return HarnessResult(metrics, answers)


def run_eval(folder):
    """eval.py's metrics {data folder: metrics}, and its greedy samples {prompt: text}."""
    metrics = {}
    for data in ("sums", "texts"):
        out = f"{folder}/eval/{data}"
        evaluation.main(
            [
                f"m={folder}/run@0",
                f"--data={folder}/{data}",
                "--rows=100",
                "--device=cpu",
                f"--out={out}",
            ]
        )
        with open(f"{out}/eval.json", encoding="utf-8") as f:
            metrics[data] = json.load(f)["m"]
    rows = read_rows(f"{folder}/eval/sums/m.jsonl")
    return metrics, {row["prompt"]: row["responses"][0] for row in rows}


# --------------------------------------------------------------------------------------- agreement


def test_three_evaluations_agree(folder):
    exported = run_harness("hf", folder, f"pretrained={folder}/export")
    adapted = run_harness(NanoSpinLM(f"{folder}/run"), folder)
    ours, texts = run_eval(folder)
    print(json.dumps([exported.metrics, adapted.metrics, ours], indent=1))
    theirs = exported.metrics

    for name in ("acc", "acc_norm", "acc_bytes"):
        assert theirs["choice"][name] == adapted.metrics["choice"][name]
    assert theirs["choice"]["acc"] == ours["sums"]["choice_acc"]
    assert theirs["choice"]["acc_bytes"] == ours["sums"]["choice_acc_bytes"]

    for name in ("bits_per_byte", "byte_perplexity"):
        expected = pytest.approx(adapted.metrics["rolling"][name], abs=1e-4)
        assert theirs["rolling"][name] == expected
    expected = pytest.approx(ours["texts"]["bits_per_byte"], abs=1e-3)
    assert theirs["rolling"]["bits_per_byte"] == expected

    for name in ("word", "whole"):
        assert theirs[name]["exact_match"] == adapted.metrics[name]["exact_match"]
    # comparable, because none of these texts ends in a space
    assert theirs["whole"]["exact_match"] == ours["sums"]["exact_match"]

    # the model is neither always right nor always wrong
    for share in (
        theirs["choice"]["acc"],
        theirs["choice"]["acc_bytes"],
        theirs["word"]["exact_match"],
    ):
        assert 0 < share < 1

    check_answers(exported.answers, adapted.answers, texts)
    rows = read_rows(f"{folder}/sums/val.jsonl")
    num_bytes = sum(len(row["responses"][0].encode()) for row in rows)
    logp = sum(answers[0][0] for answers in exported.answers["choice"].values())
    bits_per_byte = -logp / math.log(2) / num_bytes
    assert ours["sums"]["bits_per_byte"] == pytest.approx(bits_per_byte, abs=1e-3)


def check_answers(exported, adapted, texts):
    """Greedy texts are equal, choices have the same log-probabilities. texts: eval.py's samples."""
    for prompt, text in texts.items():
        assert exported["whole"][prompt] == adapted["whole"][prompt] == [text]
        assert exported["word"][prompt] == adapted["word"][prompt] == [text.split(",")[0]]
        choices = zip(exported["choice"][prompt], adapted["choice"][prompt])
        for (their_logp, their_greedy), (logp, greedy) in choices:
            assert their_logp == pytest.approx(logp, rel=1e-4)
            assert their_greedy == greedy


def test_shards_in_bfloat16_agree(folder):
    """The harness on a sharded bfloat16 export, and on our import of it, in float32 matmuls."""
    small, back = f"{folder}/small", f"{folder}/back"
    hf.main(["export", f"{folder}/run", f"--out={small}", "--dtype=bfloat16", "--shard_gb=1e-4"])
    hf.main(["import", small, f"--out={back}"])
    shards = [name for name in os.listdir(small) if name.endswith(".safetensors")]
    assert len(shards) > 2
    model, _, _ = GPT.from_checkpoint(back)
    assert all(torch.equal(p, p.bfloat16().float()) for p in model.parameters())

    exported = run_harness("hf", folder, f"pretrained={small},dtype=float32")
    adapted = run_harness(NanoSpinLM(back), folder)
    assert exported.answers["whole"] == adapted.answers["whole"]
    assert exported.metrics["choice"]["acc"] == adapted.metrics["choice"]["acc"]
    expected = pytest.approx(adapted.metrics["rolling"]["bits_per_byte"], abs=1e-4)
    assert exported.metrics["rolling"]["bits_per_byte"] == expected
