"""The hub's data sets, each on a little local stand-in of its schema."""

from data.files import write_json
from data.folder import prepare_command, read_stream
import gzip
import importlib
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import data
from conftest import ROOT
from data import hub
from data.folder import read_meta
from data.rows import read_rows


def parquet(folder, **splits):
    """A set as the hub keeps it: data/SPLIT-00000-of-00001.parquet of some rows."""
    for split, rows in splits.items():
        os.makedirs(f"{folder}/data", exist_ok=True)
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows),
            f"{folder}/data/{split}-00000-of-00001.parquet",
            row_group_size=7,
        )
    return str(folder)


def prepare(name, folder, out, *args):
    """(training rows, validation rows, what was dropped) of data/NAME/prepare.py on a folder."""
    importlib.import_module(f"data.{name}.prepare").main([f"--hub={folder}", f"--out={out}", *args])
    meta = read_meta(str(out), ["train.jsonl", "val.jsonl"])
    assert meta["source"] == os.path.basename(folder) and sorted(os.listdir(out)) == [
        "meta.json",
        "train.jsonl",
        "val.jsonl",
    ]
    train, val = read_rows(f"{out}/train.jsonl"), read_rows(f"{out}/val.jsonl")
    assert (len(train), len(val)) == (meta["train_rows"], meta["val_rows"]) and not {
        row["group"] for row in train
    } & {row["group"] for row in val}
    return train, val, meta["dropped"]


def chat(name, *said, roles=("user", "assistant")):
    return {
        "prompt": said[0],
        "prompt_id": name,
        "messages": [{"content": text, "role": roles[i % 2]} for i, text in enumerate(said)],
    }


def test_ultrachat(tmp_path):
    train = [
        chat("a", " one", "two ", "three", "four", "five"),
        chat("b", "x", "y", "z", ""),
        chat("c", "x", "y", roles=("assistant", "user")),
        chat("d", "x"),
        chat("e", "", "y"),
    ]
    folder = parquet(
        tmp_path / "set",
        train_sft=train,
        test_sft=[chat("v", "q", "r"), chat("a", " one", "other")],
    )
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


def test_a_sample_is_of_conversations_and_no_matter_of_their_order(tmp_path):
    chats, kept = [chat(f"c{i}", f"p{i}", "r", "s", "t") for i in range(40)], []
    for name, some, args in (
        ("there", chats, []),
        ("back", chats[::-1], []),
        ("other", chats, ["--seed=1"]),
    ):
        rows, _, _ = prepare(
            "ultrachat",
            parquet(tmp_path / name, train_sft=some, test_sft=[chat("v", "q", "r")]),
            tmp_path / f"{name}_out",
            "--full",
            "--sample=10",
            *args,
        )
        assert len(rows) == 20
        kept.append({row["group"] for row in rows})
    assert kept[0] == kept[1] != kept[2] and len(kept[0]) == 10


def shp(post, a, b, scores, labels, texts=None):
    texts = texts or [f"comment {name} of {post}" for name in (a, b)]
    return {
        "post_id": post,
        "domain": "ask_train",
        "history": f"Why {post}?\n",
        "c_root_id_A": a,
        "c_root_id_B": b,
        "human_ref_A": texts[0],
        "human_ref_B": texts[1],
        "score_A": scores[0],
        "score_B": scores[1],
        "labels": labels,
        "score_ratio": max(scores) / min(scores),
    }


def test_shp_ranked(tmp_path):
    """Posts whose pairs are apart, mention a comment twice, tie, or say the same."""
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
    rows, _, dropped = prepare("shp_ranked", folder, tmp_path / "apart", "--min_ratio=3")
    assert [(row["group"], row["scores"]) for row in rows] == [("p", [9, 3])] and dropped[
        "comments below --min_ratio"
    ] == 5
    rows, _, dropped = prepare(
        "shp_ranked", folder, tmp_path / "pairs", "--pairs", "--min_ratio=1.5"
    )
    assert [(row["group"], row["responses"][0], row["scores"]) for row in rows] == [
        ("p", "comment a of p", [9, 3]),
        ("p", "comment a of p", [9, 2]),
        ("p", "comment d of p", [3, 2]),
    ]
    assert dropped["pairs below --min_ratio"] == 1


def test_hh_rlhf(tmp_path):
    def row(
        chosen, rejected, context="\n\nHuman: hi\n\nAssistant: hello\n\nHuman: how?", other=None
    ):
        return {
            "chosen": f"{context}\n\nAssistant:{chosen}",
            "rejected": f"{other or context}\n\nAssistant:{rejected}",
        }

    train = [
        row(" well", " badly"),
        row(" a", " b", "\n\nHuman: one turn"),
        row(" a", " b", other="\n\nHuman: hi\n\nAssistant: hallo\n\nHuman: how?"),
        row(" a", ""),
        row("", " b"),
        row(" a", " a"),
        row(" a\n\nHuman: and I", " b"),
        row(" a", " b", "\n\nHuman: hi\n\nHuman: again"),
        row(" a", " b", "\n\nHuman: hi\n\nAssistant:\n\nHuman: again"),
        row(" a", " b", "no one: hi"),
    ]
    val = [
        row(" a", " b", "\n\nHuman: new"),
        row(" a", " b", "\n\nHuman: hi\n\nAssistant: hey\n\nHuman: else"),
    ]
    rows, val, dropped = prepare(
        "hh_rlhf", parquet(tmp_path / "set", train=train, test=val), tmp_path / "out"
    )
    assert rows == [
        {
            "prompt": "how?",
            "responses": ["well", "badly"],
            "scores": [1, 0],
            "group": "hi",
            "history": [["hi", "hello"]],
        },
        {"prompt": "one turn", "responses": ["a", "b"], "scores": [1, 0], "group": "one turn"},
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


def feedback(i, ratings, overall, source="flan", responses=None):
    """Four answers, `ratings` of each in all aspects, or in each of the four."""
    aspects = ("instruction_following", "honesty", "truthfulness", "helpfulness")
    ratings = [r if isinstance(r, tuple) else (r,) * 4 for r in ratings]
    return {
        "source": source,
        "instruction": f"Do {i}.",
        "models": list("abcd"),
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
        "completions": [
            {
                "model": "abcd"[k],
                "principle": "honesty",
                "custom_system_prompt": "Be honest.",
                "response": (responses or ["A", "B", "C", "D"])[k],
                "critique": "so so",
                "overall_score": overall[k],
                "fine-grained_score": 3.0,
                "annotations": {
                    aspect: {"Rating": r, "Rationale": "because"}
                    for aspect, r in zip(aspects, ratings[k])
                },
            }
            for k in range(len(ratings))
        ],
    }


def test_ultrafeedback(tmp_path):
    rows = [
        feedback(0, ["3", "5", "1", "3"], [2.0, 1.0, 10.0, 4.0]),
        feedback(1, [("4", "N/A", "4", "4"), ("5", "1", "5", "5"), "3", "2"], [1.0] * 4),
        feedback(2, ["N/A", "1", "2", "3"], [5.0, 6.0, 7.0, 8.0]),
        feedback(3, ["1", "2", "3", "4"], [1.0, 2.0, 3.0, 4.0], "truthful_qa"),
        feedback(4, [], []),
        feedback(5, ["1", "2", "3", "4"], [1.0, 2.0, 3.0, 4.0], responses=["a", "b", "", None]),
    ]
    rows += [feedback(i, ["1", "2", "3", "4"], [1.0, 2.0, 3.0, 4.0]) for i in range(6, 40)]
    folder = parquet(tmp_path / "set", train=rows)
    train, val, dropped = prepare("ultrafeedback", folder, tmp_path / "out", "--val_share=0.2")
    by = {row["group"]: row for row in train + val}
    assert by["Do 0."] == {
        "prompt": "Do 0.",
        "responses": ["B", "A", "D", "C"],
        "scores": [5.0, 3.0, 3.0, 1.0],
        "group": "Do 0.",
    }  # a tie is kept
    assert by["Do 1."]["responses"] == ["B", "A", "C", "D"] and by["Do 1."]["scores"] == [
        5.0,
        4.0,
        3.0,
        2.0,
    ]  # compared without honesty
    assert (
        by["Do 5."]["responses"] == ["b", "a"]
        and len(by) == 37
        and not {"Do 2.", "Do 3.", "Do 4."} & set(by)
    )
    assert dropped == {
        "aspects (not rows) that not all answers are rated in": 1,
        "rows without an aspect that all answers are rated in": 1,
        "rows of truthful_qa": 1,
        "rows without two different responses": 1,
        "empty responses": 2,
    }
    train, val, _ = prepare(
        "ultrafeedback",
        folder,
        tmp_path / "overall",
        "--val_share=0.2",
        "--by=overall_score",
        "--without=",
    )
    by = {row["group"]: row for row in train + val}
    assert (
        by["Do 0."]["responses"] == ["C", "D", "A", "B"]
        and by["Do 1."]["scores"] == [1.0] * 4
        and {"Do 2.", "Do 3."} <= set(by)
    )


def test_nectar(tmp_path):
    def row(prompt, ranks, texts="abcdefg"):
        return {
            "prompt": prompt,
            "answers": [{"answer": f" {t}", "model": "m", "rank": r} for t, r in zip(texts, ranks)],
            "turns": 1,
            "num_responses": 7,
            "source": ["flan"],
            "good_natured": True,
        }

    rows = [
        row("\n\nHuman: hi\n\nAssistant: ", [3.0, 1.0, 2.0, 7.0, 6.0, 5.0, 4.0]),
        row(
            "\n\nHuman: hi\n\nAssistant: ho\n\nHuman: on?\n\nAssistant: ",
            [2.0, 1.0, None, 3.0, 4.0, 5.0, 6.0],
            "abccaab",
        ),
        row("\n\nHuman: hi\n\nAssistant: I began", [1.0, 2.0]),
        row("hi", [1.0, 2.0]),
    ] + [row(f"\n\nHuman: {i}\n\nAssistant: ", [1.0, 2.0]) for i in range(30)]
    train, val, dropped = prepare(
        "nectar", parquet(tmp_path / "set", train=rows), tmp_path / "out", "--val_share=0.2"
    )
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
    assert len(train + val) == 32 and dropped == {
        "rows whose turns do not alternate or are empty": 2,
        "responses that repeat a better one": 3,
    }


def test_tldr(tmp_path):
    post = "SUBREDDIT: r/tifu\n\nTITLE: me\n\nPOST: I fell.\n\nTL;DR:"
    pairs = {
        "train": [
            {"prompt": post, "chosen": " fell", "rejected": " flew"},
            {"prompt": post, "chosen": " fell", "rejected": " fell"},
            {"prompt": None, "chosen": " fell", "rejected": " flew"},
        ],
        "validation": [
            {
                "prompt": "TITLE: News\n\nAn article.\n\nTL;DR:",
                "chosen": " news",
                "rejected": " no",
            },
            {"prompt": post.replace("me", "you"), "chosen": " b", "rejected": " a"},
        ],
    }
    train, val, dropped = prepare("tldr", parquet(tmp_path / "pairs", **pairs), tmp_path / "out")
    assert (
        train == [{"prompt": post, "responses": ["fell", "flew"], "scores": [1, 0], "group": post}]
        and val[0]["responses"] == ["b", "a"]
        and len(val) == 1
    )
    assert dropped == {
        "rows that are no Reddit post": 1,
        "responses that repeat a better one": 1,
        "rows without two different responses": 1,
        "malformed rows: AttributeError": 1,
    }
    sft = {
        split: [
            {"prompt": post + split, "completion": " fell"},
            {"prompt": " ", "completion": " fell"},
            {"prompt": post, "completion": " "},
        ]
        for split in ("train", "validation")
    }
    train, val, dropped = prepare(
        "tldr", parquet(tmp_path / "sft", **sft), tmp_path / "out_sft", "--sft"
    )
    assert (
        train == [{"prompt": post + "train", "responses": ["fell"], "group": post + "train"}]
        and len(val) == 1
    )
    assert dropped == {
        "empty responses": 2,
        "malformed rows: prompt must be a string that is not empty": 2,
    }


class Killed(Exception):
    pass


def killed_at(monkeypatch, when):
    """As a kill between the bytes and the state that speaks of them: write_json fails at its `when`-th call."""
    calls = []

    def write_json(path, value):
        calls.append(path)
        if len(calls) == when:
            raise Killed
        write_json(path, value)

    monkeypatch.setattr(hub, "write_json", write_json)


def contents(folder):
    return {name: open(f"{folder}/{name}", "rb").read() for name in sorted(os.listdir(folder))}


def documents(folder):
    rows = [{"text": f"Document {i}. " + "Words. " * (i % 7), "id": str(i)} for i in range(200)] + [
        {"text": " ", "id": "x"}
    ]
    os.makedirs(folder / "data")
    for k in range(3):
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows[k::3]),
            f"{folder}/data/train-0000{k}-of-00003.parquet",
            row_group_size=11,
        )
    return rows


def test_a_killed_stream_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    from data.fineweb.prepare import main

    rows = documents(tmp_path / "set")
    monkeypatch.setattr(hub, "CHUNK", 16)
    args = [f"--hub={tmp_path}/set", "--tokenizer=bytes", "--val_share=0.2"]
    main([*args, f"--out={tmp_path}/whole"])
    meta = read_meta(f"{tmp_path}/whole", ["train.bin", "val.bin"])
    streams = np.concatenate([read_stream(f"{tmp_path}/whole", side) for side in ("train", "val")])
    texts = [
        bytes(ids[ids < 256].astype(np.uint8)).decode()
        for ids in np.split(streams, np.flatnonzero(streams == 256) + 1)[:-1]
    ]
    assert sorted(texts) == sorted(row["text"] for row in rows if row["text"].strip()) and meta[
        "dropped"
    ] == {"documents without a text": 1}
    assert (
        meta["train_tokens"] + meta["val_tokens"] == sum(len(text) + 1 for text in texts)
        and meta["tokenizer"] == "bytes"
    )
    for kills in ([1], [2, 1, 5], [13]):
        out = f"{tmp_path}/killed{kills}"
        for when in kills:
            killed_at(monkeypatch, when)
            with pytest.raises(Killed):
                main([*args, f"--out={out}"])
            assert not os.path.exists(f"{out}/meta.json")
            with open(f"{out}/train.bin.partial", "ab") as f:
                f.write(b"half a docu")
        monkeypatch.setattr(hub, "write_json", write_json)
        main([*args, f"--out={out}"])
        assert contents(out) == contents(f"{tmp_path}/whole")


def test_killed_while_it_finishes(tmp_path, monkeypatch):
    """Between the two names that a stream's files get, and while rows are sampled."""
    from data.fineweb.prepare import main

    documents(tmp_path / "set")
    args = [f"--hub={tmp_path}/set", "--tokenizer=bytes", "--val_share=0.2"]
    main([*args, f"--out={tmp_path}/whole"])
    replace, done = os.replace, []

    def failing(source, target):
        if source.endswith("val.bin.partial") and not done:
            done.append(target)
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(Killed):
        main([*args, f"--out={tmp_path}/killed"])
    main([*args, f"--out={tmp_path}/killed"])
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole") and done


def test_killed_rows_go_on_and_keep_their_settings(tmp_path, monkeypatch):
    from data.ultrachat.prepare import main

    folder = parquet(
        tmp_path / "set",
        train_sft=[chat(f"c{i}", f"p{i}", "r") for i in range(50)],
        test_sft=[chat(f"v{i}", f"q{i}", "r") for i in range(20)],
    )
    args = [f"--hub={folder}", "--sample=30", "--rows=45"]
    main([*args, f"--out={tmp_path}/whole"])
    monkeypatch.setattr(hub, "CHUNK", 16)
    for when in (2, 3, 4, 5):
        out = f"{tmp_path}/killed{when}"
        killed_at(monkeypatch, when)
        with pytest.raises(Killed):
            main([*args, f"--out={out}"])
        monkeypatch.setattr(hub, "write_json", write_json)
        with pytest.raises(SystemExit, match="was begun with --sample=30;") as e:
            main([f"--hub={folder}", "--sample=31", "--rows=45", f"--out={out}"])
        assert "\n" not in str(e.value)
        main([*args, f"--out={out}"])
        assert contents(out) == contents(f"{tmp_path}/whole")
    assert (
        len(read_rows(f"{tmp_path}/whole/train.jsonl")) == 30
        and len(read_rows(f"{tmp_path}/whole/val.jsonl")) == 20
    )


def test_the_layout_of_a_json_set_killed_and_resumed(tmp_path, monkeypatch):
    """HH-RLHF lies on the hub as gzipped JSON lines in folders, beside one of another schema that is no part of its splits."""
    from data.hh_rlhf.prepare import main

    for part in ("harmless-base", "helpful-base"):
        os.makedirs(tmp_path / "set" / part)
        for split in ("train", "test"):
            with gzip.open(tmp_path / "set" / part / f"{split}.jsonl.gz", "wt") as f:
                for i in range(30):
                    context = f"\n\nHuman: {part} {split} {i}\n\nAssistant:"
                    f.write(
                        json.dumps({"chosen": context + " yes", "rejected": context + " no"}) + "\n"
                    )
    os.makedirs(tmp_path / "set" / "red-team-attempts")
    with gzip.open(
        tmp_path / "set" / "red-team-attempts" / "red_team_attempts.jsonl.gz", "wt"
    ) as f:
        f.write('{"transcript": "a", "rating": 1}\n')
    main([f"--hub={tmp_path}/set", f"--out={tmp_path}/whole"])
    assert (
        len(read_rows(f"{tmp_path}/whole/train.jsonl"))
        == len(read_rows(f"{tmp_path}/whole/val.jsonl"))
        == 60
    )
    monkeypatch.setattr(hub, "CHUNK", 16)
    for when in (2, 1, 3):
        killed_at(monkeypatch, when)
        with pytest.raises(Killed):
            main([f"--hub={tmp_path}/set", f"--out={tmp_path}/killed"])
    monkeypatch.setattr(hub, "write_json", write_json)
    main([f"--hub={tmp_path}/set", f"--out={tmp_path}/killed"])
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_limit_of_tokens(tmp_path):
    from data.fineweb.prepare import main

    rows = documents(tmp_path / "set")
    main(
        [
            f"--hub={tmp_path}/set",
            "--tokenizer=bytes",
            "--val_share=0.2",
            "--tokens=1000",
            f"--out={tmp_path}/out",
        ]
    )
    meta = read_meta(f"{tmp_path}/out", ["train.bin", "val.bin"])
    assert (
        1000
        <= meta["train_tokens"] + meta["val_tokens"]
        < 1000 + max(len(row["text"]) + 1 for row in rows)
    )


def test_the_commit_is_found_once_and_kept(tmp_path, monkeypatch):
    """A set that is not pinned is read at what main was at the first run, however often it is killed."""
    import huggingface_hub

    folder = parquet(tmp_path / "set", train=[{"text": f"text {i}"} for i in range(50)])
    asked, read = [], hub.stream

    class Api:
        def dataset_info(self, name, revision):
            asked.append((name, revision))
            return type("Info", (), {"sha": "c0ffee" * 6 + "c0ff"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(
        hub,
        "stream",
        lambda name, split, commit, *rest: asked.append(commit) or read(folder, split, None, *rest),
    )
    monkeypatch.setattr(hub, "CHUNK", 20)
    from data.fineweb.prepare import main

    args = ["--hub=some/set", "--tokenizer=bytes", "--val_share=0.2", f"--out={tmp_path}/out"]
    killed_at(monkeypatch, 2)
    with pytest.raises(Killed):
        main(args)
    monkeypatch.setattr(hub, "write_json", write_json)
    main(args)
    sha = "c0ffee" * 6 + "c0ff"
    assert (
        asked == [("some/set", "main"), sha, sha]
        and read_meta(f"{tmp_path}/out", [])["source"] == f"some/set @ {sha}"
    )
    assert (
        hub.commit_of("Anthropic/hh-rlhf") == hub.PINNED["Anthropic/hh-rlhf"]
        and hub.commit_of("some/set", "ab" * 20) == "ab" * 20
        and len(asked) == 3
    )
    assert all(len(commit) == 40 for commit in hub.PINNED.values())


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
        (
            "hh_rlhf",
            [
                {
                    "chosen": f"\n\nHuman: a\n\nAssistant: {c}",
                    "rejected": "\n\nHuman: a\n\nAssistant: d",
                }
                for c in "bc"
            ],
            "is empty; dropped: 2 validation rows whose group",
        ),
        ("ultrachat", [{"prompt": "a"}], "Bad split: train_sft"),
    ],
)
def test_another_schema_is_one_line(tmp_path, name, rows, message):
    folder = parquet(tmp_path / "set", train=rows, test=rows)
    with pytest.raises(SystemExit) as e:
        importlib.import_module(f"data.{name}.prepare").main(
            [
                f"--hub={folder}",
                f"--out={tmp_path}/out",
                *["--tokenizer=bytes"] * (name == "fineweb"),
            ]
        )
    assert (
        message in str(e.value)
        and "\n" not in str(e.value)
        and not os.path.exists(f"{tmp_path}/out/meta.json")
    )


def test_without_a_network_there_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "data.hh_rlhf.prepare", f"--out={tmp_path}/out"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert (
        done.returncode == 1
        and "could not read it" in done.stderr
        and "--hub=FOLDER" in done.stderr
        and done.stderr.count("\n") == 1
    ), done.stderr


def test_a_commit_that_cannot_be_asked_for_is_one_line(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    from data.tldr.prepare import main

    with pytest.raises(
        SystemExit, match="trl-lib/tldr-preference: datasets could not read it"
    ) as e:
        main([f"--out={tmp_path}/out"])
    assert "\n" not in str(e.value)


def test_every_set_states_its_command():
    for name in (
        "fineweb",
        "ultrachat",
        "shp_ranked",
        "hh_rlhf",
        "ultrafeedback",
        "nectar",
        "tldr",
    ):
        assert (
            f"    python -m data.{name}.prepare"
            in importlib.import_module(f"data.{name}.prepare").__doc__
        )
        assert prepare_command(f"data/{name}") == f"python -m data.{name}.prepare"
    assert (
        prepare_command("data/openwebtext")
        == "python -m data.fineweb.prepare --hub=Skylion007/openwebtext --out=data/openwebtext"
    )
    assert (
        prepare_command("data/tldr_sft") == "python -m data.tldr.prepare --sft --out=data/tldr_sft"
    )
