from data.files import printable, read_arrays, read_json
from data.folder import find_invalid_token, prepare_command, read_meta
from data.rows import check_row
import gzip
import json
import os

import numpy as np
import pytest
import torch

import data
from conftest import SHARED, command
from data.batch import batch_indices, batch_rows, count_row_tokens, split_by_tokens, stream_batch
from data.rows import encode_rows, longest_shared_prefix, read_rows
from data.folder import read_stream, split_of
from data import tokenizer

BYTES = tokenizer.load("bytes")
EOT = 256


def encode(rows, block_size=32, **limits):
    return encode_rows(rows, BYTES, "<{prompt}>", block_size, **limits)


def test_masks_row_by_row():
    """Every response token and its eot is asked for, nothing else; what a model reads is one token behind."""
    rows, counts = encode(
        [{"prompt": "ab", "responses": ["x", "yz"]}, {"prompt": "c", "responses": ["", None]}]
    )
    batch = batch_rows(rows, "padded")
    lt, gt, a, b, c, x, y, z = b"<>abcxyz"
    assert batch["idx"].tolist() == [
        [lt, a, b, gt, x, 0],
        [lt, a, b, gt, y, z],
        [lt, c, gt, 0, 0, 0],
    ]
    assert batch["targets"].tolist() == [
        [-1, -1, -1, x, EOT, -1],
        [-1, -1, -1, y, z, EOT],
        [-1, -1, EOT, -1, -1, -1],
    ]
    assert batch["seq"].tolist() == [
        [-1, -1, -1, 0, 0, -1],
        [-1, -1, -1, 1, 1, 1],
        [-1, -1, 2, -1, -1, -1],
    ]
    assert batch["present"].tolist() == [[True, True], [True, False]]
    assert batch["lengths"].tolist() == [[2, 3], [1, 0]]
    assert counts == {"rows": 2, "prompts cut": 0, "responses cut": 0, "dropped": 0}


def test_a_pad_that_equals_a_token_hides_nothing():
    """Byte 0 is also what pads; it is asked for all the same."""
    batch = batch_rows(encode([{"prompt": "a", "responses": ["\0\0", "b"]}])[0], "padded")
    assert batch["targets"].tolist() == [[-1, -1, 0, 0, EOT], [-1, -1, ord("b"), EOT, -1]]


def test_shared_layout_row_by_row():
    """Each prompt once; its last token predicts the first of every response; positions restart after it; the last token of a
    response is not read. The rest, up to a multiple, is a row of its own that nobody asks."""
    rows, _ = encode(
        [{"prompt": "ab", "responses": ["x", None, "yz"]}, {"prompt": "c", "responses": [""]}]
    )
    batch = {name: t.tolist() for name, t in batch_rows(rows, "shared", 16).items()}
    lt, gt, a, b, c, x, y, z = b"<>abcxyz"
    assert batch["idx"] == [lt, a, b, gt, x, y, z, lt, c, gt] + [0] * 6
    assert batch["pos"] == [0, 1, 2, 3, 4, 4, 5, 0, 1, 2] + [0] * 6
    assert batch["doc"] == [0] * 7 + [1] * 3 + [2] * 6
    assert batch["branch"] == [0, 0, 0, 0, 1, 3, 3] + [0] * 9
    assert batch["at"] == [3, 4, 3, 5, 6, 9]
    assert batch["targets"] == [x, EOT, y, z, EOT, EOT]
    assert batch["seq"] == [0, 0, 2, 2, 2, 3]
    assert batch["lengths"] == [[2, 0, 3], [1, 0, 0]] and batch["tokens"] == 10
    assert (
        sum(count_row_tokens(row) for row in rows) == 10
        and count_row_tokens(rows[0], "padded") == 12
    )


def test_parts_of_about_the_same_size():
    sizes = sorted(np.random.default_rng(0).integers(10, 300, 100))
    for n in (1, 3, 10):
        parts = split_by_tokens(sizes, n)
        assert [i for part in parts for i in part] == list(range(100))
        assert all(abs(sum(sizes[i] for i in part) - sum(sizes) / n) <= 300 for part in parts)
    assert [len(part) for part in split_by_tokens([1, 1, 1000], 3)] == [1, 1, 1]  # none is empty


def test_documents_apart(tiny_data):
    """An end-of-text stands at the beginning of what follows it."""
    tokens = np.array([5, 6, EOT, 7, 8, 9, EOT, 1, 2] * 9, dtype=np.uint16)
    batch = stream_batch(tokens, 20, 2, 0, 0, 257, apart=EOT)
    plain = stream_batch(tokens, 20, 2, 0, 0, 257)
    assert torch.equal(batch["idx"], plain["idx"].flatten()) and torch.equal(
        batch["targets"], plain["targets"].flatten()
    )
    begins = (batch["idx"] == EOT).tolist()
    for n, (doc, pos) in enumerate(zip(batch["doc"].tolist(), batch["pos"].tolist())):
        if n % 20 == 0 or begins[n]:
            assert pos == 0 and (n == 0 or doc == batch["doc"][n - 1] + 1)
        else:
            assert pos == batch["pos"][n - 1] + 1 and doc == batch["doc"][n - 1]


def test_truncation():
    row = {"prompt": "abcdef", "responses": ["uvwxyz", "q"]}
    (e,), counts = encode([row], max_prompt=5, max_response=4)
    assert e["prompt"] == list(b"cdef>") and e["responses"] == [
        list(b"uvwx"),
        [ord("q"), EOT],
    ]  # cut: no eot
    assert counts["prompts cut"] == 1 and counts["responses cut"] == 1
    (e,), _ = encode(
        [row], block_size=10
    )  # the room that the prompt leaves, the same for every response
    assert e["prompt"] == list(b"<abcdef>") and e["responses"] == [list(b"uv"), [ord("q"), EOT]]
    (e,), counts = encode([row], block_size=8)  # none
    assert e is None and counts["dropped"] == 1
    (e,), _ = encode([row], max_response=7)  # six letters and eot just fit
    assert e["responses"][0] == list(b"uvwxyz") + [EOT]


def test_sampled_ids_are_never_encoded_again():
    ids = [EOT - 1, 65, 65]  # not UTF-8, and without eot: it was cut
    (e,), _ = encode([{"prompt": "a", "responses": ["b", "�AA"], "ids": [None, ids]}])
    assert e["responses"] == [[ord("b"), EOT], ids]


def test_ties_from_scores():
    (e,), _ = encode([{"prompt": "a", "responses": ["b", "c", "d", "e"], "scores": [3, 1, 1, 0]}])
    assert e["ranks"] == [0, 1, 1, 3]


def test_special_tokens_in_text_are_text():
    assert (
        EOT not in BYTES.encode_ordinary("<|endoftext|>")
        and len(BYTES.encode_ordinary("<|endoftext|>")) == 13
    )


def test_batches_are_permutations_and_functions_of_the_step():
    for n, batch in ((10, 3), (7, 7), (5, 12)):
        seen = np.concatenate([batch_indices(n, batch, 1, step) for step in range(20)])
        for epoch in range(len(seen) // n):
            assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))
        assert (batch_indices(n, batch, 1, 13) == seen[13 * batch : 14 * batch]).all()
    assert (batch_indices(100, 50, 1, 0) != batch_indices(100, 50, 2, 0)).any()


def test_stream_batches(tiny_data):
    tokens = read_stream(tiny_data, "train")
    whole = stream_batch(tokens, 16, 6, 3, 5, 257)
    assert torch.equal(whole["idx"][:, 1:], whole["targets"][:, :-1])
    parts = [stream_batch(tokens, 16, 6, 3, 5, 257, slice(r, r + 3)) for r in (0, 3)]
    assert torch.equal(torch.cat([p["idx"] for p in parts]), whole["idx"])
    # one epoch reads every window once
    n = (len(tokens) - 1) // 16 - 1
    starts = {tuple(stream_batch(tokens, 16, 1, 3, s, 257)["idx"][0].tolist()) for s in range(n)}
    assert len(starts) > 0.95 * n  # a few windows of so small a text may be alike
    with pytest.raises(SystemExit, match="outside the vocabulary"):
        stream_batch(tokens, 16, 6, 3, 5, 100)
    with pytest.raises(SystemExit, match="block_size"):
        stream_batch(tokens[:20], 16, 6, 3, 5, 257)


def test_split_is_by_group_and_stable():
    groups = [f"g{i}" for i in range(5000)]
    share = sum(split_of(g) == "val" for g in groups) / len(groups)
    assert abs(share - 0.1) < 0.02 and split_of("g0") == split_of("g0")


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"prompt": "a\\ud800", "responses": ["b"]}', "surrogates"),
        ('{"prompt": "a"', "2: not JSON"),
        ("[1]", "must be an object"),
        ('{"prompt": "", "responses": ["a"]}', "prompt must be"),
        ('{"prompt": "a"}', "responses must be"),
        ('{"prompt": "a", "responses": []}', "responses must be"),
        ('{"prompt": "a", "responses": [1]}', "responses must be"),
        ('{"prompt": "a", "responses": [null, "b"]}', "best response"),
        ('{"prompt": "a", "responses": ["b", "c"], "scores": [1]}', "scores must be"),
        ('{"prompt": "a", "responses": ["b", "c"], "scores": [1, 2]}', "scores must fall"),
        ('{"prompt": "a", "responses": ["b"], "scores": [NaN]}', "scores must be"),
    ],
)
def test_malformed_rows_are_named(tmp_path, line, message):
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "a", "responses": ["b"]}\n' + line + "\n")
    with pytest.raises(SystemExit, match=message) as e:
        read_rows(str(path))
    assert f"{path}:2" in str(e.value)


def test_bad_encodings_and_missing_files(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "\xff", "responses": ["b"]}\n')
    with pytest.raises(SystemExit, match="not UTF-8"):
        read_rows(str(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").write_text("\n")
    with pytest.raises(SystemExit, match="no rows"):
        read_rows(str(tmp_path / "b.jsonl"))
    with pytest.raises(SystemExit, match="make it with: python -m data.jsonl.prepare"):
        read_meta(str(tmp_path / "nothing"), [])
    with pytest.raises(SystemExit, match="make it with: python -m data.pydocs.prepare"):
        read_meta("data/pydocs", ["nothing.bin"])
    assert prepare_command("data/gsm8k").endswith(
        "--where=source=gsm8k --authors=human,175b_verification"
    )  # from the config's header
    assert (
        prepare_command("data/shp/group") == "python -m data.shp.prepare"
        and prepare_command("data/shp/x/1/row") == "python -m data.shp.prepare --out=data/shp/x/1"
    )
    assert prepare_command("data/shakespeare").endswith("FILE") and prepare_command("x/y").endswith(
        "--out=x/y"
    )
    with pytest.raises(SystemExit, match="Not a directory"):
        read_meta(str(tmp_path / "a.jsonl"), [])


def test_a_stream_of_another_size_is_noticed(tiny_data, tmp_path):
    for name in ("meta.json", "train.bin"):
        (tmp_path / name).write_bytes(
            open(f"{tiny_data}/{name}", "rb").read()[: -1 if name == "train.bin" else None]
        )
    with pytest.raises(SystemExit, match="meta.json says"):
        read_stream(str(tmp_path), "train")


def test_trained_bpe_round_trip(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    texts = [
        line
        for path in ("loss.py", "model.py", "train.py")
        for line in open(path, encoding="utf-8")
    ]
    enc = tokenizer.train(texts, 600)
    tokenizer.save(enc, str(tmp_path / "a.tiktoken"))
    again = tokenizer.load(str(tmp_path / "a.tiktoken"))
    assert (
        again.n_vocab == 600
        and again.eot_token == 599
        and tokenizer.fingerprint(again) == tokenizer.fingerprint(enc)
    )
    # the package that trained it cuts text into the same ids
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=599,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    for text in texts[:200] + ["naïve café 你好 \t\n  x"]:
        assert (
            again.encode_ordinary(text) == bpe.encode(text).ids
            and again.decode(again.encode_ordinary(text)) == text
        )


def test_bad_tokenizers(tmp_path):
    (tmp_path / "a.tiktoken").write_text("hello\n")
    (tmp_path / "b.tiktoken").write_text("YQ== 0\n")
    for name, message in (
        ("nothing.tiktoken", "gpt2, bytes, a"),
        (str(tmp_path / "a.tiktoken"), "not a .tiktoken file"),
        (str(tmp_path / "b.tiktoken"), "every byte"),
    ):
        with pytest.raises(SystemExit, match=message):
            tokenizer.load(name)


@pytest.mark.skipif(
    not os.path.isdir(f"{SHARED}/tiktoken_cache"), reason="GPT-2's vocabulary is not at hand"
)
def test_gpt2(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", f"{SHARED}/tiktoken_cache")
    enc = tokenizer.load("gpt2")
    assert (
        enc.n_vocab == 50257
        and enc.eot_token == 50256
        and enc.encode_ordinary("Hello world") == [15496, 995]
    )
    same = tokenizer.encoding("gpt2", enc._mergeable_ranks)  # our pattern is GPT-2's
    for text in ("It's  two\n\nlines, 12345 é", "def f(x):\n    return x"):
        assert same.encode_ordinary(text) == enc.encode_ordinary(text)


def prepare(name, *args):
    return command(f"data.{name}.prepare", *args)


def test_addition_is_right_and_split_by_pair(tmp_path):
    done = prepare("addition", "--rows=300", "--below=30", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    train, val = read_rows(str(tmp_path / "train.jsonl")), read_rows(str(tmp_path / "val.jsonl"))
    for row in train + val:
        a, b = row["prompt"].removeprefix("What is ").removesuffix("?").split(" + ")
        assert int(a) + int(b) == int(row["responses"][0])
    assert not {r["group"] for r in train} & {r["group"] for r in val}


def test_pydocs_reads_without_importing(tmp_path):
    from data.pydocs.prepare import documented, summary

    path = tmp_path / "m.py"
    path.write_text(
        '"""Module text."""\nraise SystemExit("imported")\nclass A:\n    def f(self, x: int = 1, *a):\n        """Return x, or what\n        else.\n\n        More."""\n'
    )
    found = dict((name, (signature, doc)) for name, signature, doc in documented("m", str(path)))
    assert found["m"] == (None, "Module text.") and found["m.A.f"][0] == "self, x: int=1, *a"
    assert summary(found["m.A.f"][1]) == "Return x, or what else." and summary("x") is None


def test_longest_shared_prefix_against_every_pair():
    rng = np.random.default_rng(0)
    texts, others = (
        [rng.integers(0, 3, rng.integers(1, 9)).tolist() for _ in range(60)] for _ in range(2)
    )
    slow = [
        max(
            next((i for i, (a, b) in enumerate(zip(t, o)) if a != b), min(len(t), len(o)))
            for o in others
        )
        for t in texts
    ]
    assert longest_shared_prefix(texts, others) == slow and max(slow) > 3 and min(slow) < 3


def test_whole_texts():
    """Every token but the first is asked, whatever the template; a text that fits ends in end-of-text."""
    rows, counts = encode(
        [check_row({"text": "abcd", "group": "g"}, ""), check_row({"text": "x" * 40}, "")]
    )
    assert (
        rows[0] == {"prompt": [], "responses": [[*b"abcd", EOT]], "ranks": [0], "group": "g"}
        and counts["responses cut"] == 1
    )
    batch = batch_rows(rows)
    assert batch["targets"].tolist() == [*b"bcd", EOT] + [ord("x")] * 31 and batch[
        "lengths"
    ].tolist() == [[4], [31]]
    assert (
        check_row({"prompt": "a", "responses": ["b"], "text": "of another field"}, "")["prompt"]
        == "a"
    )
    for bad in ({"text": ""}, {"text": 3}, {"text": "\ud800"}):
        with pytest.raises(SystemExit, match="text must be"):
            check_row(bad, "")


def shp_rows(posts=40):
    """Rows of SHP's schema: three comments a post, the pairs A, B in the published columns."""
    return [
        {
            "post_id": f"p{i}",
            "domain": "ask",
            "history": f"Question {i}: " + "why is that so " * 6,
            "human_ref_A": f"comment {a} of {i}",
            "human_ref_B": f"comment {b} of {i}",
            "labels": int(a < b),
            "score_A": 9 - a,
            "score_B": 9 - b,
        }
        for i in range(posts)
        for a, b in ((0, 1), (2, 0), (1, 2))
    ]


def test_shp_by_row_and_by_post(tmp_path):
    """The hub's path on a local stand-in of its schema, local ranked rows, and docstrings: the split by post parts the posts, the
    split by row leaks nearly every validation text, and both hold the same texts."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in shp_rows())
    )
    ranked = [
        {
            "prompt": f"Question {i}: " + "why is that so " * 6,
            "group": f"p{i}",
            "source": "stackexchange/ask",
            "responses": [{"text": f"comment {k} of {i}", "score": 9 - k} for k in range(3)],
        }
        for i in range(40)
    ] + [{"prompt": "sum", "response": "1", "source": "gsm8k"}]
    (tmp_path / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ranked))
    kept = {}
    for name, args in (
        ("hub", [f"--hub={tmp_path}/hub"]),
        ("local", [f"{tmp_path}/ranked.jsonl"]),
        ("surrogate", ["--surrogate", "--rows=300"]),
    ):
        done = prepare("shp", *args, f"--out={tmp_path}/{name}", "--tokenizer=bytes")
        assert done.returncode == 0, done.stderr
        for split in ("row", "group"):
            rows = {
                side: read_rows(f"{tmp_path}/{name}/{split}/{side}.jsonl")
                for side in ("train", "val")
            }
            kept[name, split] = sorted(
                row["responses"][0] for side in rows.values() for row in side
            )
            both = {row["group"] for row in rows["train"]} & {row["group"] for row in rows["val"]}
            leaks = read_meta(f"{tmp_path}/{name}/{split}", ["train.jsonl", "val.jsonl"])["leaks"]
            starts = {row["responses"][0].encode()[:64] for row in rows["train"]}
            assert leaks == pytest.approx(
                np.mean([row["responses"][0].encode()[:64] in starts for row in rows["val"]])
            )
            assert (not both and leaks < 0.05) if split == "group" else (both and leaks > 0.8), (
                name,
                split,
                leaks,
            )
    assert all(kept[name, "row"] == kept[name, "group"] for name in ("hub", "local", "surrogate"))
    assert kept["hub", "row"] == kept["local", "row"] and len(kept["hub", "row"]) == 120
    assert any("comment 0 of 3" in text for text in kept["hub", "row"]) and not any(
        "comment 2 of 3" in text for text in kept["hub", "row"]
    )


def test_shp_sets_are_other_rows(tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in shp_rows())
    )
    done = prepare(
        "shp",
        f"--hub={tmp_path}/hub",
        "--rows=45",
        "--sets=2",
        "--split=group",
        f"--out={tmp_path}/out",
        "--tokenizer=bpe",
        "--vocab_size=300",
    )
    assert done.returncode == 0, done.stderr
    first, second = (
        [
            row["group"]
            for side in ("train", "val")
            for row in read_rows(f"{tmp_path}/out/{n}/group/{side}.jsonl")
        ]
        for n in (1, 2)
    )
    assert (
        len(first) == 45
        and len(second) == 45
        and not set(first) & set(second)
        and sorted(os.listdir(tmp_path / "out" / "1")) == ["group"]
    )


def test_shp_refusals(tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_text('{"prompt": "a"}\n')
    for args, message in (
        ([f"--hub={tmp_path}/hub"], "its rows have no"),
        ([f"--hub={tmp_path}/nothing"], "could not read it"),
        ([f"{tmp_path}/no.jsonl"], "No such file"),
        (["--surrogate", "--rows=1"], "too few"),
        (["--surrogate", "--rows=0"], "at least 1"),
        (["--surrogate", "--tokenizer=foo"], "tokenizer foo"),
        (["--surrogate", "a.jsonl"], "either files"),
    ):
        done = prepare("shp", f"--out={tmp_path}/out", "--tokenizer=bytes", *args)
        assert done.returncode and message in done.stderr and "Traceback" not in done.stderr, (
            done.stderr
        )


@pytest.mark.skipif(
    not os.path.exists(f"{SHARED}/ranked.jsonl.gz"), reason="the shared rows are not at hand"
)
def test_the_row_split_of_real_threads_leaks(tmp_path):
    for split, least, most in (("row", 0.9, 1.0), ("group", 0.0, 0.02)):
        done = prepare(
            "shp",
            f"{SHARED}/ranked.jsonl.gz",
            "--rows=1000",
            "--tokenizer=bytes",
            f"--out={tmp_path}",
            f"--split={split}",
        )
        assert done.returncode == 0, done.stderr
        assert least <= read_meta(f"{tmp_path}/{split}", [])["leaks"] <= most


def test_jsonl_takes_every_form(tmp_path):
    lines = (
        [{"text": "a story " * 3, "url": f"u{i}"} for i in range(30)]
        + [{"prompt": f"p{i}", "response": "r"} for i in range(30)]
        + [
            {"prompt": f"q{i}", "responses": ["best", "worst"], "group": f"g{i // 2}"}
            for i in range(30)
        ]
        + [
            {
                "prompt": f"o{i}",
                "responses": [
                    {"text": "low", "score": 1},
                    {"text": "high", "score": 2},
                    {"text": "too", "score": 1},
                ],
            }
            for i in range(30)
        ]
    )
    path = tmp_path / "in.jsonl.gz"
    with gzip.open(path, "wt") as f:
        f.writelines(json.dumps(line) + "\n" for line in lines)
    out = tmp_path / "out"
    done = prepare("jsonl", str(path), f"--out={out}", "--tokenizer=bytes", "--val_share=0.3")
    assert done.returncode == 0, done.stderr
    rows = read_rows(str(out / "train.jsonl")) + read_rows(str(out / "val.jsonl"))
    assert len(rows) == 90
    by_prompt = {row["prompt"]: row for row in rows}
    assert by_prompt["o3"]["responses"] == ["high", "low", "too"] and by_prompt["o3"]["scores"] == [
        2,
        1,
        1,
    ]
    assert (read_stream(str(out), "train") == EOT).sum() + (
        read_stream(str(out), "val") == EOT
    ).sum() == 30


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "1: not JSON"),
        ('{"prompt": "a", "response": 3}', "must be a string"),
        ('{"prompt": "a", "responses": [{"text": "b"}]}', "rank or score"),
        ('{"text": ""}', "not empty"),
        ('{"text": "\\udfff"}', "Unicode"),
        ('{"prompt": "a", "responses": 5}', "must be a string"),
        ('{"text": "alone"}', "one side of the split is empty"),
        ('{"other": 1}', "must be a string"),
        ("3", "not an object"),
    ],
)
def test_jsonl_names_the_line(tmp_path, line, message):
    (tmp_path / "in.jsonl").write_text(line + "\n")
    done = prepare("jsonl", str(tmp_path / "in.jsonl"), f"--out={tmp_path}/out")
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(
    not os.path.exists(f"{SHARED}/ranked.jsonl.gz"), reason="the shared rows are not at hand"
)
def test_jsonl_takes_the_shared_rows_as_they_are(tmp_path):
    done = prepare(
        "jsonl",
        f"{SHARED}/ranked.jsonl.gz",
        f"--out={tmp_path}/r",
        "--where=source=gsm8k",
        "--authors=human,175b_verification",
    )
    assert done.returncode == 0 and not os.path.exists(f"{tmp_path}/r/train.bin"), done.stderr
    rows = read_rows(f"{tmp_path}/r/train.jsonl") + read_rows(f"{tmp_path}/r/val.jsonl")
    assert len(rows) == 1162 and all(len(row["responses"]) == 2 for row in rows)
    done = prepare("jsonl", f"{SHARED}/ranked.jsonl.gz", f"--out={tmp_path}/all")
    assert done.returncode == 0
    rows = read_rows(f"{tmp_path}/all/train.jsonl")
    assert {len(row["responses"]) for row in rows} == {3, 4, 5, 6} and any(
        len(set(row["scores"])) < len(row["scores"]) for row in rows
    )


def test_an_id_outside_the_vocabulary_is_found_anywhere():
    tokens = np.array([1, 2, 3, 9, 4, 9, 1], dtype=np.uint16)
    assert find_invalid_token(tokens, 10) == 7 and find_invalid_token(tokens, 9) == 3
    for length in (1, 2, 3, 7):
        assert min(find_invalid_token(tokens, 9, part, 2, length) for part in range(2)) == 3
        assert min(find_invalid_token(tokens[4:], 9, part, 3, length) for part in range(3)) == 1


def test_what_is_read_is_data(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.array([{}], dtype=object))
    with pytest.raises(SystemExit, match="no .npz file of numbers"):
        read_arrays(str(tmp_path / "a.npz"))
    for text, message in (
        ("{", "not JSON"),
        ("[" * 100000, "not JSON"),
        ("[]", "has no x"),
        ('{"y": 1}', "has no x"),
    ):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(SystemExit, match=message):
            read_json(str(tmp_path / "a.json"), ("x",))
    assert printable("a\tb\n\x1b[2J\r\x9b\ud800é") == "a\tb\n\\x1b[2J\\r\\x9b\\ud800é"


def test_ids_of_another_tokenizer_are_not_taken():
    row = {"prompt": "a", "responses": ["b"], "ids": [[7]]}
    assert encode([row | {"tokenizer": "another"}])[0][0]["responses"] == [
        [ord("b"), EOT]
    ] and encode([row])[0][0]["responses"] == [[7]]
    with pytest.raises(SystemExit, match="outside the vocabulary"):
        encode([row | {"ids": [[257]]}])
