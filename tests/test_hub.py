"""The hub's data sets, each on a small local stand-in of its schema."""

import gzip
import importlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, run_killed_at
from tokenizers_like import sentencepiece

from data import hub, tokenizer
from data.files import read_json, write_json
from data.folder import prepare_command, read_meta, read_stream
from data.hub import prepare as hub_prepare
from data.hub.read import PINNED, describe_folder, resolve_commit
from data.rows import read_rows
from data.shp_ranked.prepare import is_close


def parquet(folder, **splits):
    """Write a set as the hub has it: data/SPLIT-00000-of-00001.parquet, of some rows."""
    os.makedirs(f"{folder}/data", exist_ok=True)
    for split, rows in splits.items():
        table = pyarrow.Table.from_pylist(rows)
        path = f"{folder}/data/{split}-00000-of-00001.parquet"
        pyarrow.parquet.write_table(table, path, row_group_size=7)
    return str(folder)


def run_main(name, *args):
    importlib.import_module(f"data.{name}.prepare").main(list(args))


def prepare(name, folder, out, *args):
    """Run data/NAME/prepare.py on a folder. Returns (training rows, validation rows, dropped)."""
    run_main(name, f"--hub={folder}", f"--out={out}", *args)
    meta = read_meta(str(out), ["train.jsonl", "val.jsonl"])
    assert meta["source"] == os.path.basename(folder)
    assert sorted(os.listdir(out)) == ["meta.json", "train.jsonl", "val.jsonl"]
    train, val = read_rows(f"{out}/train.jsonl"), read_rows(f"{out}/val.jsonl")
    assert len(train) == meta["train_rows"]
    assert len(val) == meta["val_rows"]
    assert not {row["group"] for row in train} & {row["group"] for row in val}
    return train, val, meta["dropped"]


# ---- the sets


def test_gsm8k(tmp_path):
    """Notes of the calculator are removed, a solution without an answer is dropped and counted."""
    train = [
        {"question": " How many? ", "answer": "48/2 = <<48/2=24>>24 in May.\n#### 24"},
        {"question": "And now?", "answer": "Nobody knows."},
    ]
    test = [{"question": "Why?", "answer": "Because.\n#### 1,000"}]
    folder = parquet(tmp_path / "gsm8k", train=train, test=test)
    train, val, dropped = prepare("gsm8k", folder, tmp_path / "out")
    expected = {"prompt": "How many?", "responses": ["48/2 = 24 in May.\n#### 24"]}
    assert train == [expected | {"group": "gsm:how many"}]
    assert val[0]["responses"] == ["Because.\n#### 1,000"]
    assert dropped == {"solutions without ####": 1}


def chat(name, *texts, roles=("user", "assistant")):
    """A conversation as UltraChat has it."""
    messages = [{"content": text, "role": roles[i % 2]} for i, text in enumerate(texts)]
    return {"prompt": texts[0], "prompt_id": name, "messages": messages}


def test_ultrachat(tmp_path):
    train = [
        chat("a", " one", "two ", "three", "four", "five"),
        chat("b", "x", "y", "z", ""),
        chat("c", "x", "y", roles=("assistant", "user")),
        chat("d", "x"),
        chat("e", "", "y"),
    ]
    val = [chat("v", "q", "r"), chat("a", " one", "other")]
    folder = parquet(tmp_path / "set", train_sft=train, test_sft=val)
    rows, val, dropped = prepare("ultrachat", folder, tmp_path / "first")
    assert rows == [
        {"prompt": "one", "responses": ["two"], "group": "a"},
        {"prompt": "x", "responses": ["y"], "group": "b"},
    ]
    assert val == [{"prompt": "q", "responses": ["r"], "group": "v"}]
    assert dropped == {
        "conversations whose turns do not alternate": 2,
        "turns from an empty one on": 1,
        "validation rows whose group is in training too": 1,
    }
    rows, val, dropped = prepare("ultrachat", folder, tmp_path / "full", "--full")
    assert rows == [
        {"prompt": "one", "responses": ["two"], "group": "a"},
        {"prompt": "three", "responses": ["four"], "group": "a", "history": [["one", "two"]]},
        {"prompt": "x", "responses": ["y"], "group": "b"},
    ]
    assert dropped["turns from an empty one on"] == 2


def test_a_sample_is_of_conversations_and_does_not_depend_on_their_order(tmp_path):
    chats = [chat(f"c{i}", f"p{i}", "r", "s", "t") for i in range(40)]

    def sampled_groups(name, chats, *args):
        folder = parquet(tmp_path / name, train_sft=chats, test_sft=[chat("v", "q", "r")])
        args = ["--full", "--sample=10", *args]
        rows, _, _ = prepare("ultrachat", folder, tmp_path / f"{name}_out", *args)
        assert len(rows) == 20
        return {row["group"] for row in rows}

    groups = sampled_groups("forwards", chats)
    assert len(groups) == 10
    assert sampled_groups("backwards", chats[::-1]) == groups
    assert sampled_groups("seed", chats, "--seed=1") != groups


def shp(post, a, b, scores, labels, texts=None):
    """A pair of comments as SHP has it."""
    text_a, text_b = texts or (f"comment {a} of {post}", f"comment {b} of {post}")
    return {
        "post_id": post,
        "domain": "ask_train",
        "history": f"Why {post}?\n",
        "c_root_id_A": a,
        "c_root_id_B": b,
        "human_ref_A": text_a,
        "human_ref_B": text_b,
        "score_A": scores[0],
        "score_B": scores[1],
        "labels": labels,
        "score_ratio": max(scores) / min(scores),
    }


def test_shp_ranked(tmp_path):
    """Posts whose pairs are not adjacent, repeat a comment, tie, or have equal texts."""
    train = [
        shp("p", "a", "b", (9, 3), 1),
        shp("q", "k", "l", (5, 5), 0),
        shp("p", "c", "a", (2, 9), 0),
        shp("p", "d", "c", (3, 2), 1),
        shp("r", "m", "n", (4, 2), 1, ["same", " same "]),
        shp("s", "o", "p", (2, 4), 1),
        shp("t", "u", "w", (4, 2), 1, ["", "said"]),
    ]
    folder = parquet(tmp_path / "set", train=train, validation=[shp("v", "x", "y", (2, 7), 0)])
    rows, val, dropped = prepare("shp_ranked", folder, tmp_path / "ranked")
    assert rows == [
        {
            "prompt": "Why p?",
            "responses": [f"comment {name} of p" for name in "abdc"],
            "scores": [9, 3, 3, 2],
            "group": "p",
        },
        {
            "prompt": "Why q?",
            "responses": ["comment l of q", "comment k of q"],
            "scores": [5, 5],
            "group": "q",
        },
    ]
    assert val == [
        {
            "prompt": "Why v?",
            "responses": ["comment y of v", "comment x of v"],
            "scores": [7, 2],
            "group": "v",
        }
    ]
    assert dropped == {
        "pairs whose label and scores disagree": 1,
        "rows without two different responses": 2,
        "responses that repeat a better one": 1,
        "empty responses": 1,
    }

    rows, _, dropped = prepare("shp_ranked", folder, tmp_path / "ratio", "--min_ratio=3")
    assert [(row["group"], row["scores"]) for row in rows] == [("p", [9, 3])]
    assert dropped["comments below --min_ratio"] == 5

    options = ["--pairs", "--min_ratio=1.5"]
    rows, _, dropped = prepare("shp_ranked", folder, tmp_path / "pairs", *options)
    assert [(row["group"], row["responses"][0], row["scores"]) for row in rows] == [
        ("p", "comment a of p", [9, 3]),
        ("p", "comment a of p", [9, 2]),
        ("p", "comment d of p", [3, 2]),
    ]
    assert dropped["pairs below --min_ratio"] == 1
    assert not is_close(4, 2, 2) and is_close(3, 2, 2) and not is_close(2, 2, 1)
    assert is_close(-1, -1, 2) and is_close(0, 0, 2) and not is_close(1, -5, 2)


def hh_pair(chosen, rejected, context=None, rejected_context=None):
    """A pair of transcripts as HH-RLHF has it."""
    context = context or "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: how?"
    return {
        "chosen": f"{context}\n\nAssistant:{chosen}",
        "rejected": f"{rejected_context or context}\n\nAssistant:{rejected}",
    }


def test_hh_rlhf(tmp_path):
    other = "\n\nHuman: hi\n\nAssistant: hallo\n\nHuman: how?"
    train = [
        hh_pair(" well", " badly"),
        hh_pair(" a", " b", "\n\nHuman: one turn"),
        hh_pair(" a", " b", rejected_context=other),
        hh_pair(" a", ""),
        hh_pair("", " b"),
        hh_pair(" a", " a"),
        hh_pair(" a\n\nHuman: and I", " b"),
        hh_pair(" a", " b", "\n\nHuman: hi\n\nHuman: again"),
        hh_pair(" a", " b", "\n\nHuman: hi\n\nAssistant:\n\nHuman: again"),
        hh_pair(" a", " b", "no one: hi"),
    ]
    test = [
        hh_pair(" a", " b", "\n\nHuman: new"),
        hh_pair(" a", " b", "\n\nHuman: hi\n\nAssistant: hey\n\nHuman: else"),
    ]
    folder = parquet(tmp_path / "set", train=train, test=test)
    rows, val, dropped = prepare("hh_rlhf", folder, tmp_path / "out")
    assert rows == [
        {
            "prompt": "how?",
            "responses": ["well", "badly"],
            "scores": [1, 0],
            "group": "hi",
            "history": [["hi", "hello"]],
        },
        {
            "prompt": "one turn",
            "responses": ["a", "b"],
            "scores": [1, 0],
            "group": "one turn",
        },
    ]
    assert [row["group"] for row in val] == ["new"]
    assert dropped == {
        "rows whose two prompts differ": 1,
        "empty responses": 2,
        "responses that repeat a better one": 1,
        "rows without two different responses": 3,
        "rows that end with a human's turn": 1,
        "rows whose turns do not alternate or are empty": 3,
        "validation rows whose group is in training too": 1,
    }


def feedback(i, ratings, overall, source="flan", responses=("A", "B", "C", "D")):
    """An instruction as UltraFeedback has it. ratings: of each answer, one, or one per aspect."""
    aspects = ("instruction_following", "honesty", "truthfulness", "helpfulness")
    completions = []
    for k, rating in enumerate(ratings):
        annotations = {}
        for n, aspect in enumerate(aspects):
            value = rating[n] if isinstance(rating, tuple) else rating
            annotations[aspect] = {"Rating": value, "Rationale": "because"}
        completion = {
            "model": "abcd"[k],
            "principle": "honesty",
            "custom_system_prompt": "Be honest.",
            "response": responses[k],
            "critique": "so so",
            "overall_score": overall[k],
            "fine-grained_score": 3.0,
            "annotations": annotations,
        }
        completions.append(completion)
    return {
        "source": source,
        "instruction": f"Do {i}.",
        "models": list("abcd"),
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
        "completions": completions,
    }


def test_ultrafeedback(tmp_path):
    rising = ["1", "2", "3", "4"], [1.0, 2.0, 3.0, 4.0]
    rows = [
        feedback(0, ["3", "5", "1", "3"], [2.0, 1.0, 10.0, 4.0]),
        feedback(1, [("4", "N/A", "4", "4"), ("5", "1", "5", "5"), "3", "2"], [1.0] * 4),
        feedback(2, ["N/A", "1", "2", "3"], [5.0, 6.0, 7.0, 8.0]),
        feedback(3, *rising, "truthful_qa"),
        feedback(4, [], []),
        feedback(5, *rising, responses=["a", "b", "", None]),
    ]
    rows += [feedback(i, *rising) for i in range(6, 40)]
    folder = parquet(tmp_path / "set", train=rows)
    train, val, dropped = prepare("ultrafeedback", folder, tmp_path / "out", "--val_share=0.2")
    by_group = {row["group"]: row for row in train + val}
    assert by_group["Do 0."] == {
        "prompt": "Do 0.",
        "responses": ["B", "A", "D", "C"],
        "scores": [5.0, 3.0, 3.0, 1.0],  # a tie
        "group": "Do 0.",
    }
    assert by_group["Do 1."]["responses"] == ["B", "A", "C", "D"]
    assert by_group["Do 1."]["scores"] == [5.0, 4.0, 3.0, 2.0]  # compared without honesty
    assert by_group["Do 5."]["responses"] == ["b", "a"]
    assert len(by_group) == 37
    assert not {"Do 2.", "Do 3.", "Do 4."} & set(by_group)
    assert dropped == {
        "aspects (not rows) that not all answers are rated in": 1,
        "rows without an aspect that all answers are rated in": 1,
        "rows of truthful_qa": 1,
        "rows without two different responses": 1,
        "empty responses": 2,
    }

    options = ["--val_share=0.2", "--by=overall_score", "--without="]
    train, val, _ = prepare("ultrafeedback", folder, tmp_path / "overall", *options)
    by_group = {row["group"]: row for row in train + val}
    assert by_group["Do 0."]["responses"] == ["C", "D", "A", "B"]
    assert by_group["Do 1."]["scores"] == [1.0] * 4
    assert {"Do 2.", "Do 3."} <= set(by_group)

    out = tmp_path / "spaces"
    options = ["--val_share=0.2", "--without= truthful_qa, sharegpt"]
    _, _, dropped = prepare("ultrafeedback", folder, out, *options)
    assert dropped["rows of truthful_qa"] == 1
    with pytest.raises(SystemExit, match="no source 'truthfulqa'; there are evol_instruct"):
        prepare("ultrafeedback", folder, tmp_path / "typo", "--without=truthfulqa")


def nectar(prompt, ranks, texts="abcdefg"):
    """A ranking as Nectar has it."""
    answers = [{"answer": f" {t}", "model": "m", "rank": r} for t, r in zip(texts, ranks)]
    return {
        "prompt": prompt,
        "answers": answers,
        "turns": 1,
        "num_responses": 7,
        "source": ["flan"],
        "good_natured": True,
    }


def test_nectar(tmp_path):
    two_turns = "\n\nHuman: hi\n\nAssistant: ho\n\nHuman: on?\n\nAssistant: "
    rows = [
        nectar("\n\nHuman: hi\n\nAssistant: ", [3.0, 1.0, 2.0, 7.0, 6.0, 5.0, 4.0]),
        nectar(two_turns, [2.0, 1.0, None, 3.0, 4.0, 5.0, 6.0], "abccaab"),
        nectar("\n\nHuman: hi\n\nAssistant: I began", [1.0, 2.0]),
        nectar("hi", [1.0, 2.0]),
    ]
    rows += [nectar(f"\n\nHuman: {i}\n\nAssistant: ", [1.0, 2.0]) for i in range(30)]
    folder = parquet(tmp_path / "set", train=rows)
    train, val, dropped = prepare("nectar", folder, tmp_path / "out", "--val_share=0.2")
    first, second = [row for row in train + val if row["group"] == "hi"]
    assert first == {
        "prompt": "hi",
        "responses": list("bcagfed"),
        "scores": [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0],
        "group": "hi",
    }
    assert second == {
        "prompt": "on?",
        "responses": ["b", "a", "c"],
        "scores": [-1.0, -2.0, -3.0],
        "group": "hi",
        "history": [["hi", "ho"]],
    }
    assert len(train) + len(val) == 32
    assert dropped == {
        "responses without a score": 1,
        "rows whose turns do not alternate or are empty": 2,
        "responses that repeat a better one": 3,
    }


def test_tldr(tmp_path):
    post = "SUBREDDIT: r/tifu\n\nTITLE: me\n\nPOST: I fell.\n\nTL;DR:"
    news = "TITLE: News\n\nAn article.\n\nTL;DR:"
    folder = parquet(
        tmp_path / "pairs",
        train=[
            {"prompt": post, "chosen": " fell", "rejected": " flew"},
            {"prompt": post, "chosen": " fell", "rejected": " fell"},
            {"prompt": None, "chosen": " fell", "rejected": " flew"},
        ],
        validation=[
            {"prompt": news, "chosen": " news", "rejected": " no"},
            {"prompt": post.replace("me", "you"), "chosen": " b", "rejected": " a"},
        ],
    )
    train, val, dropped = prepare("tldr", folder, tmp_path / "out")
    assert train == [
        {"prompt": post, "responses": ["fell", "flew"], "scores": [1, 0], "group": post}
    ]
    assert [row["responses"] for row in val] == [["b", "a"]]
    assert dropped == {
        "rows that are no Reddit post": 1,
        "responses that repeat a better one": 1,
        "rows without two different responses": 1,
        "malformed rows: AttributeError": 1,
    }


def test_tldr_sft(tmp_path):
    post = "SUBREDDIT: r/tifu\n\nTITLE: me\n\nPOST: I fell.\n\nTL;DR:"
    splits = {}
    for split in ("train", "validation"):
        splits[split] = [
            {"prompt": post + split, "completion": " fell"},
            {"prompt": " ", "completion": " fell"},
            {"prompt": post, "completion": " "},
        ]
    folder = parquet(tmp_path / "sft", **splits)
    train, val, dropped = prepare("tldr", folder, tmp_path / "out", "--sft")
    prompt = post + "train"
    assert train == [{"prompt": prompt, "responses": ["fell"], "group": prompt}]
    assert len(val) == 1
    assert dropped == {
        "empty responses": 2,
        "malformed rows: prompt must be a string that is not empty": 2,
    }


def test_every_set_states_its_command():
    names = ("fineweb", "ultrachat", "shp_ranked", "hh_rlhf", "ultrafeedback", "nectar", "tldr")
    for name in names:
        doc = importlib.import_module(f"data.{name}.prepare").__doc__
        assert f"    python -m data.{name}.prepare" in doc
        assert prepare_command(f"data/{name}") == f"python -m data.{name}.prepare"
    assert prepare_command("data/tldr_sft") == (
        "python -m data.tldr.prepare --sft --out=data/tldr_sft"
    )
    assert prepare_command("data/openwebtext") == (
        "python -m data.fineweb.prepare --hub=Skylion007/openwebtext --out=data/openwebtext"
    )


# ---- killed preparations


class Killed(Exception):
    pass


def kill_at(monkeypatch, call):
    """A kill between writing rows and writing the state: the call-th write_json raises."""
    num_calls = 0

    def failing_write_json(path, value):
        nonlocal num_calls
        num_calls += 1
        if num_calls == call:
            raise Killed
        write_json(path, value)

    monkeypatch.setattr(hub, "write_json", failing_write_json)


def run_killed(monkeypatch, call, name, *args):
    kill_at(monkeypatch, call)
    with pytest.raises(Killed):
        run_main(name, *args)
    monkeypatch.setattr(hub, "write_json", write_json)


def contents(folder):
    """{file name: bytes} of a folder."""
    found = {}
    for name in os.listdir(folder):
        with open(f"{folder}/{name}", "rb") as f:
            found[name] = f.read()
    return found


def write_documents(folder):
    """A set of 201 documents in three files, one of them without a text. Returns its rows."""
    rows = [{"text": f"Document {i}. " + "Words. " * (i % 7), "id": str(i)} for i in range(200)]
    rows.append({"text": " ", "id": "x"})
    os.makedirs(folder / "data")
    for k in range(3):
        table = pyarrow.Table.from_pylist(rows[k::3])
        path = f"{folder}/data/train-0000{k}-of-00003.parquet"
        pyarrow.parquet.write_table(table, path, row_group_size=11)
    return rows


def read_documents(folder):
    """The texts of both streams of a data folder, in bytes."""
    texts = []
    for side in ("train", "val"):
        stream = read_stream(str(folder), side)
        for ids in np.split(stream, np.flatnonzero(stream == 256) + 1)[:-1]:
            texts.append(bytes(ids[:-1].astype(np.uint8)).decode())
    return texts


def test_a_killed_stream_continues_to_the_same_bytes(tmp_path, monkeypatch):
    rows = write_documents(tmp_path / "set")
    monkeypatch.setattr(hub, "CHUNK", 16)
    args = [f"--hub={tmp_path}/set", "--tokenizer=bytes", "--val_share=0.2"]
    whole = tmp_path / "whole"
    run_main("fineweb", *args, f"--out={whole}")
    meta = read_meta(str(whole), ["train.bin", "val.bin"])
    texts = read_documents(whole)
    assert sorted(texts) == sorted(row["text"] for row in rows if row["text"].strip())
    assert meta["dropped"] == {"documents without a text": 1}
    assert meta["train_tokens"] + meta["val_tokens"] == sum(len(text) + 1 for text in texts)
    assert meta["tokenizer"] == "bytes"
    for kills in ([1], [2], [2, 1, 5], [14]):
        out = f"{tmp_path}/killed{kills}"
        for call in kills:
            run_killed(monkeypatch, call, "fineweb", *args, f"--out={out}")
            assert not os.path.exists(f"{out}/meta.json")
            if os.path.exists(f"{out}/state.json"):
                with open(f"{out}/train.bin.partial", "ab") as f:
                    f.write(b"half a docu")
        run_main("fineweb", *args, f"--out={out}")
        assert contents(out) == contents(whole)


def test_a_stream_is_not_continued_with_other_beginnings(tmp_path, monkeypatch):
    """Older versions put no <s> before a document."""
    write_documents(tmp_path / "set")
    monkeypatch.setattr(hub, "CHUNK", 16)
    name = f"{sentencepiece(str(tmp_path / 'llama'))}/tokenizer.json"
    args = [f"--hub={tmp_path}/set", f"--tokenizer={name}", f"--out={tmp_path}/out"]
    run_killed(monkeypatch, 2, "fineweb", *args, "--val_share=0.2")
    state = read_json(f"{tmp_path}/out/state.json")
    assert state["asked"]["document_begin"] == "<s>"
    begun = {key: value for key, value in state["asked"].items() if key != "document_begin"}
    write_json(f"{tmp_path}/out/state.json", state | {"asked": begun})
    with pytest.raises(SystemExit, match="was begun with a version that puts no beginning-of-text"):
        run_main("fineweb", *args, "--val_share=0.2")
    write_json(f"{tmp_path}/out/state.json", state)
    run_main("fineweb", *args, "--val_share=0.2")
    stream = read_stream(f"{tmp_path}/out", "train")
    enc = tokenizer.load(name)
    bos, *_ = tokenizer.begin_ids(enc)
    ends = np.flatnonzero(stream[:-1] == enc.eot_token)
    assert stream[0] == bos and (stream[ends + 1] == bos).all() and len(ends) > 3


def test_a_stream_killed_between_its_two_renames(tmp_path, monkeypatch):
    write_documents(tmp_path / "set")
    args = [f"--hub={tmp_path}/set", "--tokenizer=bytes", "--val_share=0.2"]
    run_main("fineweb", *args, f"--out={tmp_path}/whole")
    replace = os.replace

    def failing_replace(source, target):
        if source.endswith("val.bin.partial"):
            raise Killed
        replace(source, target)

    with monkeypatch.context() as m:
        m.setattr(os, "replace", failing_replace)
        with pytest.raises(Killed):
            run_main("fineweb", *args, f"--out={tmp_path}/killed")
    assert os.path.exists(tmp_path / "killed" / "train.bin")
    run_main("fineweb", *args, f"--out={tmp_path}/killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_killed_rows_continue_with_their_settings_only(tmp_path, monkeypatch):
    folder = parquet(
        tmp_path / "set",
        train_sft=[chat(f"c{i}", f"p{i}", "r") for i in range(50)],
        test_sft=[chat(f"v{i}", f"q{i}", "r") for i in range(20)],
    )
    args = [f"--hub={folder}", "--sample=30", "--rows=45"]
    whole = tmp_path / "whole"
    run_main("ultrachat", *args, f"--out={whole}")
    assert len(read_rows(f"{whole}/train.jsonl")) == 30
    assert len(read_rows(f"{whole}/val.jsonl")) == 20
    monkeypatch.setattr(hub, "CHUNK", 16)
    for call in (2, 3, 4, 5):
        out = f"{tmp_path}/killed{call}"
        run_killed(monkeypatch, call, "ultrachat", *args, f"--out={out}")
        with pytest.raises(SystemExit, match="was begun with --sample=30;") as e:
            run_main("ultrachat", f"--hub={folder}", "--sample=31", "--rows=45", f"--out={out}")
        assert "\n" not in str(e.value)
        run_main("ultrachat", *args, f"--out={out}")
        assert contents(out) == contents(whole)


def write_gzip(path, objects):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with gzip.open(path, "wt") as f:
        f.writelines(json.dumps(value) + "\n" for value in objects)


def test_a_json_set_killed_and_resumed(tmp_path, monkeypatch):
    """HH-RLHF is gzipped JSON lines in folders, beside one of another schema and in no split."""
    for part in ("harmless-base", "helpful-base"):
        for split in ("train", "test"):
            contexts = [f"\n\nHuman: {part} {split} {i}" for i in range(30)]
            rows = [hh_pair(" yes", " no", context) for context in contexts]
            write_gzip(f"{tmp_path}/set/{part}/{split}.jsonl.gz", rows)
    other = [{"transcript": "a", "rating": 1}]
    write_gzip(f"{tmp_path}/set/red-team-attempts/red_team_attempts.jsonl.gz", other)
    run_main("hh_rlhf", f"--hub={tmp_path}/set", f"--out={tmp_path}/whole")
    assert len(read_rows(f"{tmp_path}/whole/train.jsonl")) == 60
    assert len(read_rows(f"{tmp_path}/whole/val.jsonl")) == 60
    monkeypatch.setattr(hub, "CHUNK", 16)
    args = [f"--hub={tmp_path}/set", f"--out={tmp_path}/killed"]
    for call in (2, 1, 3):
        run_killed(monkeypatch, call, "hh_rlhf", *args)
    run_main("hh_rlhf", *args)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def write_problems(folder, word, n=60):
    """A set of n problems without a validation split."""
    rows = [{"question": f"{word} {i}", "answer": f"{word}\n#### {i}"} for i in range(n)]
    return parquet(folder, train=rows)


@pytest.mark.parametrize("name", ["gsm8k", "fineweb"])
def test_a_set_is_prepared_again_and_killed_anywhere(tmp_path, monkeypatch, name):
    """The same command ends like an undisturbed one, and what the user has put there meanwhile is
    refused."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # slow, and no power is lost here
    if name == "gsm8k":
        write_problems(tmp_path / "set", "How many?")
        files, args, old_args = ("train.jsonl", "val.jsonl"), [], ["--rows=40"]
    else:
        write_documents(tmp_path / "set")
        files, args, old_args = ("train.bin", "val.bin"), ["--tokenizer=bytes"], ["--tokens=3000"]
    args += [f"--hub={tmp_path}/set", "--val_share=0.2"]
    run_main(name, *args, *old_args, f"--out={tmp_path}/old")
    run_main(name, *args, f"--out={tmp_path}/whole")
    whole = contents(tmp_path / "whole")
    assert whole != contents(tmp_path / "old")
    for event in itertools.count(1):
        out = tmp_path / f"out{event}"
        shutil.copytree(tmp_path / "old", out)
        is_killed = run_killed_at(event, run_main, name, *args, f"--out={out}")
        for file in files:
            os.rename(out / file, tmp_path / "aside")
            (out / file).write_text("mine")
            with pytest.raises(SystemExit, match=f"{file} is not what an earlier preparation"):
                run_main(name, *args, f"--out={out}")
            assert (out / file).read_text() == "mine"
            os.rename(tmp_path / "aside", out / file)
        run_main(name, *args, f"--out={out}")
        assert contents(out) == whole
        if not is_killed:
            break
    assert event > 15


def test_more_rows_after_too_few(tmp_path):
    """Nothing is left of the first try, wherever it was killed."""
    args = [f"--hub={write_problems(tmp_path / 'set', 'How many?')}", "--val_share=0.1"]
    run_main("gsm8k", *args, f"--out={tmp_path}/whole")
    for event in itertools.count(1):
        out = f"{tmp_path}/out{event}"
        try:
            is_killed = run_killed_at(event, run_main, "gsm8k", *args, "--rows=1", f"--out={out}")
        except SystemExit as e:
            assert "too few rows" in str(e)
            is_killed = False
        if is_killed:
            with pytest.raises(SystemExit, match="too few rows"):
                run_main("gsm8k", *args, "--rows=1", f"--out={out}")
        assert os.listdir(out) == []
        run_main("gsm8k", *args, f"--out={out}")
        assert contents(out) == contents(tmp_path / "whole")
        if not is_killed:
            break
    assert event > 4


@pytest.mark.parametrize("rows", [1, 0])
def test_other_options_after_a_kill_at_the_end(tmp_path, monkeypatch, rows):
    """A preparation that was killed while it removed its .partial files binds no later one."""
    args = [f"--hub={write_problems(tmp_path / 'set', 'How many?')}", f"--out={tmp_path}/out"]
    remove = os.remove

    def killed_after(path):
        remove(path)
        if path.endswith(".partial"):
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(os, "remove", killed_after)
        with pytest.raises(Killed):
            run_main("gsm8k", *args, "--val_share=0.1", f"--rows={rows}")
    run_main("gsm8k", *args, "--val_share=0.2")
    assert sorted(contents(f"{tmp_path}/out")) == ["meta.json", "train.jsonl", "val.jsonl"]


def test_a_limit_of_tokens(tmp_path):
    rows = write_documents(tmp_path / "set")
    args = ["--tokenizer=bytes", "--val_share=0.2", "--tokens=1000", f"--out={tmp_path}/out"]
    run_main("fineweb", f"--hub={tmp_path}/set", *args)
    meta = read_meta(f"{tmp_path}/out", ["train.bin", "val.bin"])
    num_tokens = meta["train_tokens"] + meta["val_tokens"]
    longest = max(len(row["text"]) + 1 for row in rows)
    assert 1000 <= num_tokens < 1000 + longest


# ---- commits and errors


def test_the_commit_is_resolved_once_and_kept(tmp_path, monkeypatch):
    """A set that is not pinned is read at what main was in the first run, also after a kill."""
    import huggingface_hub

    sha = "c0ffee" * 6 + "c0ff"
    folder = parquet(tmp_path / "set", train=[{"text": f"text {i}"} for i in range(50)])
    asked, read_at = [], []
    open_split = hub.open_split

    class Info:
        pass

    class Api:
        def dataset_info(self, name, revision):
            asked.append((name, revision))
            info = Info()
            info.sha = sha
            return info

    def open_local_split(name, split, commit, *rest):
        read_at.append(commit)
        return open_split(folder, split, None, *rest)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(hub, "open_split", open_local_split)
    monkeypatch.setattr(hub, "CHUNK", 20)
    args = ["--hub=some/set", "--tokenizer=bytes", "--val_share=0.2", f"--out={tmp_path}/out"]
    run_killed(monkeypatch, 2, "fineweb", *args)
    run_main("fineweb", *args)
    assert asked == [("some/set", "main")]
    assert read_at == [sha, sha]
    assert read_meta(f"{tmp_path}/out", [])["source"] == f"some/set @ {sha}"


def test_pinned_and_given_commits_need_no_network():
    assert all(len(commit) == 40 for commit in PINNED.values())
    assert resolve_commit("Anthropic/hh-rlhf") == PINNED["Anthropic/hh-rlhf"]
    assert resolve_commit("some/set", "ab" * 20) == "ab" * 20
    assert resolve_commit("data") is None  # a folder


SAME_PROMPT = [
    {
        "chosen": f"\n\nHuman: a\n\nAssistant: {answer}",
        "rejected": "\n\nHuman: a\n\nAssistant: d",
    }
    for answer in "bc"
]


@pytest.mark.parametrize(
    "name, rows, message",
    [
        (
            "fineweb",
            [{"content": "a"}],
            "its rows have no text; they have content, and text are needed",
        ),
        ("nectar", [{"prompt": "a"}], "no answers;"),
        (
            "nectar",
            [{"prompt": "\n\nHuman: a\n\nAssistant: ", "answers": [{"text": "a", "rank": 1.0}]}],
            "its rows have no 'answer' inside",
        ),
        (
            "hh_rlhf",
            [{"chosen": "a", "rejected": "b"}],
            "too few rows, one side of the split is empty; dropped: 2 rows whose turns do not",
        ),
        ("hh_rlhf", SAME_PROMPT, "is empty; dropped: 2 validation rows whose group"),
        ("ultrachat", [{"prompt": "a"}], "Bad split: train_sft"),
    ],
)
def test_another_schema_is_one_line(tmp_path, name, rows, message):
    folder = parquet(tmp_path / "set", train=rows, test=rows)
    args = [f"--hub={folder}", f"--out={tmp_path}/out"]
    if name == "fineweb":
        args.append("--tokenizer=bytes")
    with pytest.raises(SystemExit) as e:
        run_main(name, *args)
    assert message in str(e.value)
    assert "\n" not in str(e.value)
    assert not os.path.exists(f"{tmp_path}/out/meta.json")


CARD = """---
configs:
- {config_name: one, data_files: one.jsonl}
- {config_name: two, data_files: more/two.jsonl}
---
"""


@pytest.mark.parametrize(
    "names, card, unread",
    [
        (("train.jsonl", "more/b.jsonl"), "", "more/b.jsonl"),
        (("a.jsonl", "more/b.jsonl"), "", ""),
        (("one.jsonl", "more/two.jsonl"), CARD, ""),
        (
            ("one.jsonl", "more/two.jsonl", "three.jsonl", "more/four.csv"),
            CARD,
            "more/four.csv, three.jsonl",
        ),
    ],
)
def test_files_that_are_not_read_are_named(tmp_path, capsys, names, card, unread):
    """`datasets` takes them by their type and the names of splits, and says nothing of others."""
    folder = tmp_path / "set"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        rows = [{"prompt": f"{name} {i}", "completion": "yes"} for i in range(40)]
        (folder / name).write_text("\n".join(map(json.dumps, rows)))
    if card:
        (tmp_path / "card").write_text(card)
        os.symlink(tmp_path / "card", folder / "README.md")
        (folder / ".gitattributes").write_text("*.parquet filter=lfs")
        (folder / ".cache").mkdir(exist_ok=True)
        (folder / ".cache/a-00000-of-00002.parquet.metadata").write_text("of a download")
    config = ["--config=one"] if card else []
    hub_prepare.main([str(folder), f"--out={tmp_path}/out", "--val_share=0.4", *config])
    out = capsys.readouterr().out
    if unread:
        num_files = unread.count(",") + 1
        assert f"files in no split, not read ({num_files}): {unread}\n" in out
    else:
        assert "in no split" not in out
    assert "missing" not in out


def test_the_files_of_each_split_are_named(tmp_path, capsys):
    """`datasets` makes one split of train_prefs and train_sft."""
    for name in ("train_sft", "train_prefs", "test_sft"):
        rows = [{"prompt": f"{name} {i}", "completion": "yes"} for i in range(9)]
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "0000.jsonl").write_text("\n".join(map(json.dumps, rows)))
    hub_prepare.main([f"{tmp_path}/set", f"--out={tmp_path}/out"])
    out = capsys.readouterr().out
    assert "split train: 2 files, train_prefs/0000.jsonl to train_sft/0000.jsonl\n" in out
    assert "split test: test_sft/0000.jsonl\n" in out


def test_linked_folders_are_not_read_and_named(tmp_path, capsys):
    rows = [{"prompt": f"ask {i}", "completion": "yes"} for i in range(40)]
    for folder in ("set", "elsewhere"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    os.symlink(tmp_path / "elsewhere", tmp_path / "set/more")
    hub_prepare.main([f"{tmp_path}/set", f"--out={tmp_path}/out", "--val_share=0.4"])
    assert "files in no split, not read (1): more\n" in capsys.readouterr().out

    os.rename(tmp_path / "elsewhere/a.jsonl", tmp_path / "elsewhere/a-00000-of-00001.jsonl")
    (tmp_path / "set/README.md").write_text(CARD.replace("one.jsonl", "more/a-*.jsonl"))
    (tmp_path / "set/a.jsonl").unlink()
    describe_folder(f"{tmp_path}/set", "one")  # a card can name what is behind a link
    out = capsys.readouterr().out
    assert out == "split train: more/a-00000-of-00001.jsonl\n"


@pytest.mark.parametrize("hashes", ["", "-3a1b"])
def test_shards_that_are_missing_are_named(tmp_path, capsys, hashes):
    """A download that was cut short is smaller, and `datasets` reads what is there."""
    (tmp_path / "set").mkdir()
    for name in (f"train-00000-of-00003{hashes}.jsonl", "train-00002-of-00003.jsonl", "test.jsonl"):
        rows = [{"prompt": f"{name} {i}", "completion": "yes"} for i in range(9)]
        (tmp_path / "set" / name).write_text("\n".join(map(json.dumps, rows)))
    hub_prepare.main([f"{tmp_path}/set", f"--out={tmp_path}/out"])
    out = capsys.readouterr().out
    assert "files that are missing (1): train-00001-of-00003.jsonl\n" in out
    assert "in no split" not in out


@pytest.mark.parametrize("num_examples", [20, 35])
def test_a_split_that_is_shorter_than_its_card_says(tmp_path, capsys, num_examples):
    info = f"  splits:\n  - name: train\n    num_examples: {num_examples}\n"
    card = (
        f"---\nconfigs:\n- config_name: default\n  data_files: a.jsonl\ndataset_info:\n{info}---\n"
    )
    (tmp_path / "set").mkdir()
    (tmp_path / "set/README.md").write_text(card)
    rows = [{"prompt": f"ask {i}", "completion": "yes"} for i in range(20)]
    (tmp_path / "set/a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    hub_prepare.main([f"{tmp_path}/set", f"--out={tmp_path}/out", "--val_share=0.3"])
    is_short = "split train has 20 rows, and 35 by the data set's card" in capsys.readouterr().out
    assert is_short == (num_examples == 35)
    hub_prepare.main([f"{tmp_path}/set", f"--out={tmp_path}/b", "--val_share=0.3", "--rows=9"])
    assert "by the data set's card" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["set[12]", "s*t", "s?t"])
def test_a_folder_whose_name_is_a_pattern_is_refused(tmp_path, name):
    """`datasets` would read set1 and set2 for set[12]."""
    for folder in (name, "set1"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 9)
    with pytest.raises(SystemExit, match="takes . . . . for patterns of names; rename the folder"):
        hub_prepare.main([f"{tmp_path}/{name}", f"--out={tmp_path}/out"])


@pytest.mark.parametrize("name", ["json", "parquet", "text"])
def test_a_folder_that_is_called_like_a_type(tmp_path, monkeypatch, name):
    """`datasets` would read all files of that type below the current folder."""
    monkeypatch.chdir(tmp_path)
    for folder in (name, "other"):
        rows = [{"prompt": f"{folder} {i}", "completion": "yes"} for i in range(20)]
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    hub_prepare.main([name, "--out=out", "--val_share=0.3"])
    rows = [*read_rows("out/train.jsonl"), *read_rows("out/val.jsonl")]
    assert len(rows) == 20 and all(row["prompt"].startswith(name) for row in rows)


@pytest.mark.parametrize("card", ["", CARD.replace("one.jsonl", "one/*.jsonl")])
def test_a_part_of_a_folder(tmp_path, card):
    """Without a card `datasets` would mix the parts. The card names a file that is not there, as in
    a copy of one part."""
    parts = {}
    for part, text in (("one", "a red fox."), ("two", "a blue bird.")):
        (tmp_path / "set" / part).mkdir(parents=True)
        lines = [json.dumps({"text": f"{text} {i}"}) for i in range(30)]
        parts[part] = tmp_path / "set" / part / "train.jsonl"
        parts[part].write_text("\n".join(lines))
    if card:
        (tmp_path / "set/README.md").write_text(card)
    args = [f"--hub={tmp_path}/set", "--tokenizer=bytes", "--val_share=0.3", f"--out={tmp_path}/a"]
    run_main("fineweb", *args, "--config=one")
    for side in ("train", "val"):
        text = (tmp_path / f"a/{side}.bin").read_bytes()
        assert b"f\0o\0x" in text and b"b\0i\0r\0d" not in text
    if not card:
        with pytest.raises(SystemExit, match="set has neither a folder three nor a README.md that"):
            run_main("fineweb", *args, "--config=three")


@pytest.mark.parametrize("has_card", [False, True])
def test_the_files_of_a_part_are_named(tmp_path, capsys, has_card):
    """By their paths in the folder. What other parts lack is of no interest, and what they have is
    not missing."""
    rows = [{"prompt": f"ask {i}", "completion": "yes"} for i in range(20)]
    for part, total in (("one", 2), ("two", 9)):
        (tmp_path / "set" / part).mkdir(parents=True)
        path = tmp_path / "set" / part / f"train-00000-of-0000{total}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "set/one/notes.csv").write_text("a,b")
    if has_card:
        card = CARD.replace("one.jsonl", "one/*.jsonl").replace("more/two.jsonl", "two/*.jsonl")
        (tmp_path / "set/README.md").write_text(card)
    describe_folder(f"{tmp_path}/set", "one")
    assert capsys.readouterr().out.splitlines() == [
        "split train: one/train-00000-of-00002.jsonl",
        "files in no split, not read (1): one/notes.csv",
        "files that are missing (1): one/train-00001-of-00002.jsonl",
    ]
    (tmp_path / "set/one/train-00001-of-00002.jsonl").write_text(json.dumps(rows[0]))
    if has_card:  # the part is a sample of the other
        card = CARD.replace("one.jsonl", "one/train-00000-of-00002.jsonl")
        (tmp_path / "set/README.md").write_text(card.replace("more/two.jsonl", "one/*.jsonl"))
    describe_folder(f"{tmp_path}/set", "one")
    assert "missing" not in capsys.readouterr().out


def test_gsm8k_does_not_mix_its_parts(tmp_path, monkeypatch):
    for part in ("main", "socratic"):
        (tmp_path / "set" / part).mkdir(parents=True)
        for split in ("train", "test"):
            rows = []
            for i in range(3):
                rows.append({"question": f"{part} {split} {i}?", "answer": f"{i}\n#### {i}"})
            path = tmp_path / "set" / part / f"{split}-00000-of-00001.jsonl"
            path.write_text("\n".join(map(json.dumps, rows)))
    run_main("gsm8k", f"--hub={tmp_path}/set", f"--out={tmp_path}/out")
    for side in ("train", "val"):
        rows = read_rows(f"{tmp_path}/out/{side}.jsonl")
        assert len(rows) == 3 and all(row["prompt"].startswith("main") for row in rows)

    args = [f"--hub={tmp_path}/set", f"--out={tmp_path}/old"]
    run_killed(monkeypatch, 3, "gsm8k", *args)
    path = f"{tmp_path}/old/state.json"
    state = read_json(path)
    assert state.pop("is_part")
    write_json(path, state)  # as it was before parts were folders
    with pytest.raises(SystemExit, match="older code read all of .*set, not only main; remove"):
        run_main("gsm8k", *args)
    write_json(path, state | {"asked": None})  # as `remove_state` leaves it if it is killed
    run_main("gsm8k", *args)


def test_without_a_network_there_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "data.hh_rlhf.prepare", f"--out={tmp_path}/out"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 1
    assert "could not read it" in done.stderr
    assert "give a folder with its files in place of the id" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_a_commit_that_cannot_be_resolved_is_one_line(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = "trl-lib/tldr-preference: datasets could not read it"
    with pytest.raises(SystemExit, match=message) as e:
        run_main("tldr", f"--out={tmp_path}/out")
    assert "\n" not in str(e.value)


def test_documents_that_cannot_be_encoded_are_counted(tmp_path, monkeypatch):
    encode = tokenizer.encode_piece

    def failing(enc, text, where):
        if "Document 7" in text:
            raise SystemExit("the tokenizer cannot encode it")
        return encode(enc, text, where)

    write_documents(tmp_path / "set")
    monkeypatch.setattr(tokenizer, "encode_piece", failing)
    args = (f"--hub={tmp_path}/set", "--tokenizer=bytes", "--val_share=0.2")
    run_main("fineweb", *args, f"--out={tmp_path}/out")
    meta = read_json(str(tmp_path / "out" / "meta.json"))
    assert meta["dropped"]["documents that the tokenizer cannot encode"] >= 1


def test_unfinished_samples_are_not_replaced(tmp_path):
    """A killed `sample.py --out=OUT/train.jsonl` leaves OUT/train.jsonl.partial."""
    mine = tmp_path / "out" / "train.jsonl.partial"
    mine.parent.mkdir()
    mine.write_text("mine")
    args = SimpleNamespace(out=str(tmp_path / "out"), hub="x/y", revision="0" * 40, rows=0)
    with pytest.raises(SystemExit, match="train.jsonl.partial is not of this preparation"):
        hub.collect(args, [("train", "train")], ["prompt"], None)
    assert mine.read_text() == "mine" and os.listdir(mine.parent) == [mine.name]


def test_a_set_is_not_written_into_itself(tmp_path):
    write_documents(tmp_path / "set")
    for out in (tmp_path / "set", tmp_path / "set" / "inner"):
        with pytest.raises(SystemExit, match="is inside of --hub"):
            run_main("fineweb", f"--hub={tmp_path}/set", "--tokenizer=bytes", f"--out={out}")


def test_a_stream_goes_on_with_its_own_tokenizer_and_files_only(tmp_path, monkeypatch):
    write_documents(tmp_path / "set")
    own = str(tmp_path / "own.tiktoken")
    tokenizer.save(tokenizer.train(["abc abd " * 9], 300), own)
    args = [f"--hub={tmp_path}/set", f"--tokenizer={own}", "--val_share=0.2"]
    monkeypatch.setattr(hub, "CHUNK", 16)
    out = f"{tmp_path}/out"
    run_killed(monkeypatch, 2, "fineweb", *args, f"--out={out}")
    tokenizer.save(tokenizer.train(["xyz xyw " * 9], 300), own)
    with pytest.raises(SystemExit, match="was begun with another --tokenizer"):
        run_main("fineweb", *args, f"--out={out}")
    tokenizer.save(tokenizer.train(["abc abd " * 9], 300), own)
    os.utime(next((tmp_path / "set").rglob("*.parquet")), (1, 1))
    with pytest.raises(SystemExit, match="was begun with other files in --hub"):
        run_main("fineweb", *args, f"--out={out}")


def test_a_failed_preparation_keeps_the_tokenizer_of_a_folder(tmp_path):
    write_documents(tmp_path / "set")
    own, other, out = (str(tmp_path / name) for name in ("a.tiktoken", "b.tiktoken", "out"))
    tokenizer.save(tokenizer.train(["abc abd " * 9], 300), own)
    tokenizer.save(tokenizer.train(["xyz xyw " * 9], 300), other)
    args = ["--val_share=0.2", f"--out={out}"]
    run_main("fineweb", f"--hub={tmp_path}/set", f"--tokenizer={own}", *args)
    before = contents(out)
    with pytest.raises(SystemExit, match="could not read it"):
        run_main("fineweb", f"--hub={tmp_path}/none", f"--tokenizer={other}", *args)
    assert contents(out) == before
