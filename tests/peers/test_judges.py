"""Three judges of one model: lm-evaluation-harness on its export by its own class for transformers, the harness on our model through
adapter.py, and eval.py. Accuracies and greedy texts are the same, bits per byte to 1e-3. `make test-peers` has the harness installed."""

import json
import math
import os
import random

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed; make test-peers installs it")

from nanospin import checkpoint
import eval
from tools import hf
import train
from data.rows import read_rows, write_rows
from data import tokenizer
from data.folder import write_meta
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from tests.peers.adapter import Run

WORDS = "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn achtzehn".split()
TEMPLATE = (
    "Frage: {prompt}\nAntwort:"  # no space at its end: the harness would move it to the answer
)
RUNS = {
    "classic, bytes": ["--tokenizer=bytes", "--max_steps=200"],
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


def make_data(folder):
    """Sums in German words, the right one best of four, half of those held out known; whole texts, most of them longer than the model reads."""
    rng = random.Random(0)
    sums = [(a, b) for a in range(10) for b in range(10)]
    rng.shuffle(sums)
    rows = []
    for a, b in sums:
        wrong = rng.sample([w for w in WORDS if w != WORDS[a + b]], 3)
        rows.append(
            {
                "prompt": f"{WORDS[a]} und {WORDS[b]}?",
                "word": " " + WORDS[a + b],
                "responses": [f" {w}, denn {a}+{b}" for w in [WORDS[a + b], *wrong]],
            }
        )
    texts = [
        {
            "text": "; ".join(
                f"{WORDS[a]} und {WORDS[b]} macht {WORDS[a + b]}"
                for a, b in rng.sample(sums, rng.choice([1, 4, 6]))
            )
        }
        for _ in range(12)
    ]
    for name, split, part in (
        ("sums", "train", rows[:60]),
        ("sums", "val", rows[44:76]),
        ("texts", "train", texts),
        ("texts", "val", texts),
    ):
        os.makedirs(f"{folder}/{name}", exist_ok=True)
        write_rows(f"{folder}/{name}/{split}.jsonl", part)
    for name in ("sums", "texts"):
        write_meta(f"{folder}/{name}", None, "made up")
    tokenizer.save(
        tokenizer.train([json.dumps(row, ensure_ascii=False) for row in rows + texts], 320),
        f"{folder}/bpe.tiktoken",
    )


@pytest.fixture(scope="module", params=RUNS)
def judged(request, tmp_path_factory):
    """(data folder, run, export) of a model that is right now and then."""
    folder = str(tmp_path_factory.mktemp("judges"))
    make_data(folder)
    shape = RUNS[request.param] + [f"--tokenizer={folder}/bpe.tiktoken"] * ("BPE" in request.param)
    train.main(
        [
            "--stage=sft",
            f"--out_dir={folder}/run",
            f"--data={folder}/sums",
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
            *shape,
        ]
    )
    hf.main(["export", f"{folder}/run", f"--out={folder}/export"])
    return folder


def tasks(folder):
    """The harness's three kinds, of local files."""

    def task(name, kind, data, **more):
        return {
            "task": name,
            "output_type": kind,
            "dataset_path": "json",
            "test_split": "test",
            "dataset_kwargs": {
                "data_files": {"test": f"{folder}/{data}/val.jsonl"},
                "cache_dir": f"{folder}/cache",
            },
        } | more

    greedy = {"doc_to_text": "{{prompt}}", "metric_list": [{"metric": "exact_match"}]}
    return [
        task(
            "choice",
            "multiple_choice",
            "sums",
            doc_to_text="{{prompt}}",
            doc_to_choice="{{responses}}",
            doc_to_target=0,
            target_delimiter="",
            metric_list=[{"metric": name} for name in ("acc", "acc_norm", "acc_bytes")],
        ),
        task(
            "rolling",
            "loglikelihood_rolling",
            "texts",
            doc_to_text="",
            doc_to_target="{{text}}",
            metric_list=[{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
        ),
        task(
            "word",
            "generate_until",
            "sums",
            doc_to_target="{{word}}",
            generation_kwargs={"until": [","], "max_gen_toks": 24, "do_sample": False},
            **greedy,
        ),
        task(
            "whole",
            "generate_until",
            "sums",
            doc_to_target="{{responses[0]}}",
            generation_kwargs={"until": [], "max_gen_toks": 24, "do_sample": False},
            **greedy,
        ),
    ]


def judge(model, folder, args=None, which=("choice", "rolling", "word", "whole")):
    """({task: figures}, {task: {document: answers}}) of the harness."""
    found = simple_evaluate(
        model=model,
        model_args=args,
        tasks=[task for task in tasks(folder) if task["task"] in which],
        task_manager=TaskManager(include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
        batch_size=8,
        device="cpu",
        verbosity="ERROR",
    )
    figures = {
        name: {
            key.removesuffix(",none"): value for key, value in of.items() if key.endswith(",none")
        }
        for name, of in found["results"].items()
    }
    return figures, {
        name: {
            one["doc"].get("prompt") or one["doc"]["text"]: one["filtered_resps"] for one in said
        }
        for name, said in found["samples"].items()
    }


def ours(folder, run):
    """({data folder: eval.py's figures}, {prompt: its greedy text})"""
    figures = {}
    for data in ("sums", "texts"):
        eval.main(
            [
                f"m={run}@0",
                f"--data={folder}/{data}",
                "--rows=100",
                "--device=cpu",
                f"--out={run}/{data}",
            ]
        )
        with open(f"{run}/{data}/eval.json", encoding="utf-8") as f:
            figures[data] = json.load(f)["m"]
    with open(f"{run}/sums/m.jsonl", encoding="utf-8") as f:
        return figures, {row["prompt"]: row["responses"][0] for row in map(json.loads, f)}


def agree(folder, theirs, adapted, mine):
    (theirs, said), (adapted, said_by_adapter), (figures, texts) = theirs, adapted, mine
    print(
        json.dumps(
            {"harness on the export": theirs, "harness on the run": adapted, "eval.py": figures},
            indent=1,
        )
    )
    for name in ("acc", "acc_norm", "acc_bytes"):
        assert theirs["choice"][name] == adapted["choice"][name]
    assert (
        theirs["choice"]["acc"] == figures["sums"]["choice_acc"]
        and theirs["choice"]["acc_bytes"] == figures["sums"]["choice_acc_bytes"]
    )
    for name in ("bits_per_byte", "byte_perplexity"):
        assert theirs["rolling"][name] == pytest.approx(adapted["rolling"][name], abs=1e-4)
    assert theirs["rolling"]["bits_per_byte"] == pytest.approx(
        figures["texts"]["bits_per_byte"], abs=1e-3
    )
    assert {name: theirs[name]["exact_match"] for name in ("word", "whole")} == {
        name: adapted[name]["exact_match"] for name in ("word", "whole")
    }
    assert (
        theirs["whole"]["exact_match"] == figures["sums"]["exact_match"]
    )  # no text of these ends in a space
    for prompt, text in texts.items():
        assert said["whole"][prompt] == said_by_adapter["whole"][prompt] == [text]
        assert said["word"][prompt] == said_by_adapter["word"][prompt] == [text.split(",")[0]]
        for (logp, greedy), (own, own_greedy) in zip(
            said["choice"][prompt], said_by_adapter["choice"][prompt]
        ):
            assert logp == pytest.approx(own, rel=1e-4) and greedy == own_greedy
    sizes = [len(row["responses"][0].encode()) for row in read_rows(f"{folder}/sums/val.jsonl")]
    assert figures["sums"]["bits_per_byte"] == pytest.approx(
        -sum(answers[0][0] for answers in said["choice"].values()) / math.log(2) / sum(sizes),
        abs=1e-3,
    )
    # and nothing of it is all or nothing
    assert all(
        0 < share < 1
        for share in (
            *(theirs["choice"][name] for name in ("acc", "acc_bytes")),
            theirs["word"]["exact_match"],
        )
    )


def test_three_judges_agree(judged):
    agree(
        judged,
        judge("hf", judged, f"pretrained={judged}/export"),
        judge(Run(f"{judged}/run"), judged),
        ours(judged, f"{judged}/run"),
    )


def test_of_shards_in_bfloat16_too(judged):
    """The export in bfloat16 and shards, read by the harness, and imported by us: the same weights, computed with in float32."""
    hf.main(
        ["export", f"{judged}/run", f"--out={judged}/small", "--dtype=bfloat16", "--shard_gb=1e-4"]
    )
    hf.main(["import", f"{judged}/small", f"--out={judged}/back"])
    assert (
        len([name for name in os.listdir(f"{judged}/small") if name.endswith(".safetensors")]) > 2
    )
    theirs, adapted = (
        judge("hf", judged, f"pretrained={judged}/small,dtype=float32"),
        judge(Run(f"{judged}/back"), judged),
    )
    assert (
        theirs[1]["whole"] == adapted[1]["whole"]
        and theirs[0]["choice"]["acc"] == adapted[0]["choice"]["acc"]
    )
    assert theirs[0]["rolling"]["bits_per_byte"] == pytest.approx(
        adapted[0]["rolling"]["bits_per_byte"], abs=1e-4
    )
    assert all(
        torch.equal(p, p.bfloat16().float())
        for p in checkpoint.load_model(f"{judged}/back")[0].parameters()
    )
