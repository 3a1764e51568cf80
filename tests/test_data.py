"""Rows, batches, token streams, data folders, tokenizers, and the data sets that need no hub."""

import glob
import gzip
import importlib.util
import itertools
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import SHARED, command, run_killed_at, source_files
from tokenizers_like import byte_level

from data import tokenizer
from data.batch import (
    batch_indices,
    batch_rows,
    count_row_tokens,
    num_supervised,
    split_by_tokens,
    stream_batch,
)
from data.files import UNFINISHED, atomic_write, printable, read_arrays, read_json, write_json
from data.folder import (
    find_invalid_token,
    lock_folder,
    prepare_command,
    read_meta,
    read_stream,
    split_of,
    tokenizer_path,
)
from data.jsonl import prepare as jsonl_prepare
from data.rows import (
    EDITED,
    check_row,
    drop_equal_responses,
    encode_rows,
    longest_shared_prefix,
    read_rows,
    sampled_row,
    write_rows,
)
from data.template import response_form
from eval import is_ranked, retokenize

BYTES = tokenizer.load("bytes")
EOT = 256
RANKED = f"{SHARED}/ranked.jsonl.gz"
needs_shared_rows = pytest.mark.skipif(
    not os.path.exists(RANKED), reason="the shared rows are not at hand"
)


def encode(rows, block_size=32, **limits):
    return encode_rows(rows, BYTES, "<{prompt}>", block_size, **limits)


def encode_one(row, **limits):
    (encoded,), _ = encode([row], **limits)
    return encoded


def write_lines(path, objects):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in objects))


def read_both(folder):
    """The training and validation rows of a data folder."""
    return read_rows(f"{folder}/train.jsonl"), read_rows(f"{folder}/val.jsonl")


# ---- rows -> batches


def test_padded_layout_row_by_row():
    """Every response token and its end-of-text is a target, nothing else is."""
    rows, counts = encode(
        [{"prompt": "ab", "responses": ["x", "yz"]}, {"prompt": "c", "responses": ["", None]}]
    )
    batch = batch_rows(rows, "padded")
    lt, gt, a, b, c, x, y, z = b"<>abcxyz"
    assert batch.idx.tolist() == [
        [lt, a, b, gt, x, 0],
        [lt, a, b, gt, y, z],
        [lt, c, gt, 0, 0, 0],
    ]
    assert batch.targets.tolist() == [
        [-1, -1, -1, x, EOT, -1],
        [-1, -1, -1, y, z, EOT],
        [-1, -1, EOT, -1, -1, -1],
    ]
    assert batch.response_index.tolist() == [
        [-1, -1, -1, 0, 0, -1],
        [-1, -1, -1, 1, 1, 1],
        [-1, -1, 2, -1, -1, -1],
    ]
    assert batch.response_mask.tolist() == [[True, True], [True, False]]
    assert batch.lengths.tolist() == [[2, 3], [1, 0]]
    assert counts == {"rows": 2, "prompts cut": 0, "responses cut": 0, "dropped": 0}


def test_a_token_with_the_padding_id_is_a_target():
    rows, _ = encode([{"prompt": "a", "responses": ["\0\0", "b"]}])
    batch = batch_rows(rows, "padded")
    assert batch.targets.tolist() == [[-1, -1, 0, 0, EOT], [-1, -1, ord("b"), EOT, -1]]


def test_packed_layout_row_by_row():
    """The prompt is there once. Its last token predicts the first one of every response, and each
    response continues its positions. Padding to a multiple is a row of its own without targets."""
    rows, _ = encode(
        [{"prompt": "ab", "responses": ["x", None, "yz"]}, {"prompt": "c", "responses": [""]}]
    )
    batch = batch_rows(rows, "packed", 16)
    lt, gt, a, b, c, x, y, z = b"<>abcxyz"
    assert batch.idx.tolist() == [lt, a, b, gt, x, y, z, lt, c, gt] + [0] * 6
    assert batch.pos.tolist() == [0, 1, 2, 3, 4, 4, 5, 0, 1, 2] + [0] * 6
    assert batch.sequence_id.tolist() == [0] * 7 + [1] * 3 + [2] * 6
    assert batch.response_id.tolist() == [0, 0, 0, 0, 1, 3, 3] + [0] * 9
    assert batch.logit_positions.tolist() == [3, 4, 3, 5, 6, 9]
    assert batch.targets.tolist() == [x, EOT, y, z, EOT, EOT]
    assert batch.response_index.tolist() == [0, 0, 2, 2, 2, 3]
    assert batch.lengths.tolist() == [[2, 0, 3], [1, 0, 0]]
    assert batch.num_tokens == 10
    assert sum(count_row_tokens(row) for row in rows) == 10
    assert count_row_tokens(rows[0], "padded") == 12


def test_split_by_tokens():
    sizes = sorted(np.random.default_rng(0).integers(10, 300, 100))
    for n in (1, 3, 10):
        parts = split_by_tokens(sizes, n)
        assert np.concatenate(parts).tolist() == list(range(100))
        for part in parts:
            size = sum(sizes[i] for i in part)
            assert abs(size - sum(sizes) / n) <= 300
    assert [len(part) for part in split_by_tokens([1, 1, 1000], 3)] == [1, 1, 1]  # none is empty


def test_epochs_are_permutations_and_a_batch_depends_on_its_step_only():
    for n, batch_size in ((10, 3), (7, 7), (5, 12)):
        batches = [batch_indices(n, batch_size, 1, step) for step in range(20)]
        seen = np.concatenate(batches)
        for epoch in range(len(seen) // n):
            assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert (batch_indices(100, 50, 1, 0) != batch_indices(100, 50, 2, 0)).any()


# ---- token streams


def test_stream_batches(tiny_data):
    tokens = read_stream(tiny_data, "train")
    batch = stream_batch(tokens, 16, 6, 3, 5, 257)
    assert torch.equal(batch.idx[:, 1:], batch.targets[:, :-1])
    halves = [stream_batch(tokens, 16, 6, 3, 5, 257, slice(r, r + 3)).idx for r in (0, 3)]
    assert torch.equal(torch.cat(halves), batch.idx)
    with pytest.raises(SystemExit, match="outside the vocabulary"):
        stream_batch(tokens, 16, 6, 3, 5, 100)
    with pytest.raises(SystemExit, match="block_size"):
        stream_batch(tokens[:20], 16, 6, 3, 5, 257)


def test_an_epoch_reads_every_window_once(tiny_data):
    tokens = read_stream(tiny_data, "train")
    n = (len(tokens) - 1) // 16 - 1
    windows = set()
    for step in range(n):
        windows.add(tuple(stream_batch(tokens, 16, 1, 3, step, 257).idx[0].tolist()))
    assert len(windows) > 0.95 * n  # in so small a text a few windows may be alike


def test_document_mask():
    """An end-of-text token begins the document after it."""
    tokens = np.array([5, 6, EOT, 7, 8, 9, EOT, 1, 2] * 9, dtype=np.uint16)
    packed = stream_batch(tokens, 20, 2, 0, 0, 257, document_end=EOT)
    plain = stream_batch(tokens, 20, 2, 0, 0, 257)
    assert torch.equal(packed.idx, plain.idx.flatten())
    assert torch.equal(packed.targets, plain.targets.flatten())
    ids, pos, documents = packed.idx.tolist(), packed.pos.tolist(), packed.sequence_id.tolist()
    for i in range(len(ids)):
        if i % 20 == 0 or ids[i] == EOT:
            assert pos[i] == 0
            assert i == 0 or documents[i] == documents[i - 1] + 1
        else:
            assert pos[i] == pos[i - 1] + 1
            assert documents[i] == documents[i - 1]


def test_a_stream_of_another_size_is_refused(tiny_data, tmp_path):
    with open(f"{tiny_data}/meta.json", "rb") as f:
        (tmp_path / "meta.json").write_bytes(f.read())
    with open(f"{tiny_data}/train.bin", "rb") as f:
        (tmp_path / "train.bin").write_bytes(f.read()[:-1])
    with pytest.raises(SystemExit, match="meta.json says"):
        read_stream(str(tmp_path), "train")


def test_an_id_outside_the_vocabulary_is_found_anywhere():
    tokens = np.array([1, 2, 3, 9, 4, 9, 1], dtype=np.uint16)
    assert find_invalid_token(tokens, 10) == 7  # none
    assert find_invalid_token(tokens, 9) == 3
    assert find_invalid_token(tokens, 2**17) == 7  # above uint16
    for chunk_size in (1, 2, 3, 7):
        halves = [find_invalid_token(tokens, 9, part, 2, chunk_size) for part in range(2)]
        assert min(halves) == 3
        thirds = [find_invalid_token(tokens[4:], 9, part, 3, chunk_size) for part in range(3)]
        assert min(thirds) == 1


# ---- encoding rows


def test_truncation():
    row = {"prompt": "abcdef", "responses": ["uvwxyz", "q"]}
    (e,), counts = encode([row], max_prompt=5, max_response=4)
    assert e["prompt"] == list(b"<def>")  # the template stays
    assert e["responses"] == [list(b"uvwx"), [ord("q"), EOT]]  # the cut one has no end-of-text
    assert counts["prompts cut"] == 1
    assert counts["responses cut"] == 1

    e = encode_one(row, block_size=10)  # what the prompt leaves, the same for every response
    assert e["prompt"] == list(b"<abcdef>")
    assert e["responses"] == [list(b"uv"), [ord("q"), EOT]]

    (e,), counts = encode([row], block_size=8)  # the prompt leaves nothing
    assert e is None
    assert counts["dropped"] == 1

    e = encode_one(row, max_response=7)  # six letters and end-of-text just fit
    assert e["responses"][0] == list(b"uvwxyz") + [EOT]


def of_bytes(row):
    """A row whose ids are those of BYTES."""
    return row | {"tokenizer": tokenizer.fingerprint(BYTES)}


def test_sampled_ids_are_not_encoded_again():
    ids = [EOT - 1, 65, 65]  # not UTF-8, and without end-of-text
    row = {"prompt": "a", "responses": ["b", "�AA"], "ids": [None, ids]}
    assert encode_one(of_bytes(row))["responses"] == [[ord("b"), EOT], ids]


def test_ids_of_another_tokenizer_are_not_used():
    row = {"prompt": "a", "responses": ["b"], "ids": [[7]]}
    assert encode_one(of_bytes(row))["responses"] == [[7]]
    assert encode_one(row | {"tokenizer": "another"})["responses"] == [[ord("b"), EOT]]
    with pytest.raises(SystemExit, match="outside the vocabulary"):
        encode([of_bytes(row | {"ids": [[257]]})])


def test_edited_samples_are_counted():
    """Their ids are used, and no longer those of their text. Also of a whole text, and of a sample
    that did not end. White space at the ends does not count."""
    for row in ({"prompt": "a"}, {"prompt": ""}):
        for ids in ([98, 99, EOT], [98, 99]):
            row |= {"ids": [ids], "ended": EOT in ids}
            for text, num_edited in (("bc", 0), (" bc", 0), ("bd", 1)):
                (encoded,), counts = encode([of_bytes(row | {"responses": [text]})])
                assert encoded["responses"] == [ids]
                assert counts.get(EDITED, 0) == num_edited


def test_ids_of_no_tokenizer_are_refused():
    row = {"prompt": "a", "responses": ["b"], "ids": [[7]]}
    with pytest.raises(SystemExit, match="'a' has ids and does not name their tokenizer"):
        encode([row])
    assert encode_one(row | {"ids": [None]})["responses"] == [[ord("b"), EOT]]


@pytest.mark.parametrize("of", ["{prompt}", " A:{prompt}\n", "{prompt}{answer} um {response}"])
def test_ids_of_a_template_that_writes_responses_otherwise_are_not_used(of):
    """What the template writes beside a response is in its ids. The text is encoded instead."""
    lead = "{prompt}{answer} hm {response}"
    text, not_utf8 = [*"\ufffd".encode(), EOT], [255, EOT]
    row = sampled_row({"prompt": "a"}, "\ufffd", not_utf8, BYTES, of)
    (encoded,), _ = encode_rows([row], BYTES, lead, 32)
    assert encoded["responses"] == [[*b" hm ", *text]]
    (encoded,), _ = encode_rows([row], BYTES, of, 32)
    assert encoded["responses"] == [not_utf8]
    (encoded,), _ = encode_rows([row], BYTES, "<{prompt}>", 32)
    assert encoded["responses"] == [text if "um" in of else not_utf8]


def test_data_that_is_a_file(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("{}")
    with pytest.raises(SystemExit, match="is a file, and data is a folder; make one with"):
        read_rows(f"{path}/train.jsonl")


def test_the_form_of_a_response():
    assert response_form("{prompt} ") == response_form("") == ""
    assert response_form("{prompt}{answer} {response|trim}.{end}\n") == " {response|trim}."


@pytest.mark.parametrize("other", [False, True], ids=["bytes", "another tokenizer"])
def test_a_sample_that_did_not_end_has_no_end_token(other):
    """Whoever encodes it; in a row of several responses it is said for each."""
    enc = tokenizer.train(["abcdefgh " * 9], 300) if other else BYTES
    rows = [
        {"prompt": "a", "responses": ["bad"], "ended": False},
        {"prompt": "a", "responses": ["bad"], "ended": True},
        {"prompt": "a", "responses": ["bad", "cab", "dab"], "ended": [True, False, None]},
        check_row({"text": "a whole text", "ended": False}, ""),
        {"prompt": "a", "responses": [""], "ended": False},  # no token at all
    ]
    encoded, counts = encode_rows(rows, enc, "<{prompt}>", 32)
    ends = []
    for row in encoded[:-1]:
        ends.append([response[-1] == enc.eot_token for response in row["responses"]])
    assert ends == [[False], [True], [True, False, True], [False]]
    assert encoded[-1] is None and counts["dropped"] == 1


def test_equal_responses_are_absent():
    """Also those that are equal after they are cut, and those that tie."""
    row = {"prompt": "a", "responses": ["uvwx1", "b", "uvwx2", "b"], "scores": [3, 2, 1, 1]}
    encoded = encode_one(row, max_response=4)
    assert drop_equal_responses(encoded) == 2
    assert encoded["responses"] == [[*b"uvwx"], [*b"b", EOT], None, None]
    assert drop_equal_responses(encoded) == 0  # absent ones are not equal
    encoded = encode_one({"prompt": "a", "responses": ["b", "b"]})
    assert drop_equal_responses(encoded) == 1
    assert not is_ranked(encoded)


def test_equal_scores_share_a_rank():
    row = {"prompt": "a", "responses": ["b", "c", "d", "e"], "scores": [3, 1, 1, 0]}
    assert encode_one(row)["ranks"] == [0, 1, 1, 3]
    del row["scores"]
    assert encode_one(row)["ranks"] == [0, 1, 2, 3]


def test_whole_texts():
    """Every token but the first is a target, under any template; then end-of-text, if it fits."""
    short = check_row({"text": "abcd", "group": "g"}, "")
    long = check_row({"text": "x" * 40}, "")
    rows, counts = encode([short, long])
    assert rows[0] == {"prompt": [], "responses": [[*b"abcd", EOT]], "ranks": [0], "group": "g"}
    assert counts["responses cut"] == 1
    batch = batch_rows(rows)
    assert batch.targets.tolist() == [*b"bcd", EOT] + [ord("x")] * 31
    assert batch.lengths.tolist() == [[4], [31]]
    assert [num_supervised(row["prompt"], row["responses"][0]) for row in rows] == [4, 31]
    assert num_supervised([1], [2, 3]) == 2
    assert num_supervised([1], None) == num_supervised([], [2]) == 0
    (e,), counts = encode([short], max_response=1)
    assert e is None and counts["dropped"] == 1

    with pytest.raises(SystemExit, match="drop text, or drop prompt, responses"):
        check_row({"prompt": "a", "responses": ["b"], "text": "of another field"}, "")
    for bad in ({"text": ""}, {"text": 3}, {"text": "\ud800"}):
        with pytest.raises(SystemExit, match="text must be"):
            check_row(bad, "")


def test_special_tokens_in_a_text_are_text():
    ids = BYTES.encode_ordinary("<|endoftext|>")
    assert len(ids) == 13
    assert EOT not in ids


def test_longest_shared_prefix_against_every_pair():
    rng = np.random.default_rng(0)

    def random_texts():
        return [rng.integers(0, 3, rng.integers(1, 9)).tolist() for _ in range(60)]

    def shared(a, b):
        n = 0
        while n < min(len(a), len(b)) and a[n] == b[n]:
            n += 1
        return n

    texts, others = random_texts(), random_texts()
    expected = []
    for text in texts:
        expected.append(max(shared(text, other) for other in others))
    assert longest_shared_prefix(texts, others) == expected
    assert max(expected) > 3 and min(expected) < 3


# ---- files and folders


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"prompt": "a\\ud800", "responses": ["b"]}', "surrogates"),
        ('{"prompt": "a"', "2: not JSON"),
        ("[1]", "must be an object"),
        ('{"prompt": "", "responses": ["a"]}', "prompt must be"),
        ('{"prompt": "a"}', "has no responses; it has prompt"),
        (
            '{"prompt": [{"role": "user"}], "responses": ["b"]}',
            "python -m data.jsonl.prepare makes",
        ),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}', "it has prompt, chosen, rejected"),
        ('{"messages": []}', "has no prompt, responses; it has messages"),
        ('{"prompt": "a", "responses": ["b"], "system": ["x"]}', "system must be a Unicode string"),
        ('{"prompt": "a", "responses": ["b"], "system": " "}', "system must be a Unicode string"),
        ('{"text": "a", "system": "x"}', "drop text, or drop system"),
        ('{"text": "a", "history": [["b", "c"]]}', "drop text, or drop history"),
        ('{"prompt": "a", "responses": ["b", null], "ids": [null, [1]]}', "must have its text"),
        ('{"prompt": "a", "responses": ["b"], "ended": 1}', "ended must be"),
        ('{"prompt": "a", "responses": ["b", "c"], "ended": false}', "ended must be"),
        ('{"prompt": "a", "responses": ["b"], "tokenizer": 3}', "tokenizer must be"),
        ('{"prompt": "a", "responses": []}', "responses must be"),
        ('{"prompt": "a", "responses": [1]}', "responses must be"),
        ('{"prompt": "a", "responses": [null, "b"]}', "best response"),
        ('{"prompt": "a", "responses": ["b", "c"], "scores": [1]}', "scores must be"),
        ('{"prompt": "a", "responses": ["b", "c"], "scores": [1, 2]}', "scores must fall"),
        ('{"prompt": "a", "responses": ["b"], "scores": [NaN]}', "scores must be"),
        ('{"prompt": "a", "responses": ["b"], "scores": [true]}', "scores must be"),
        ('{"prompt": "a", "responses": ["b"], "group": 3}', "group must be"),
        ('{"prompt": "a", "responses": ["b"], "ids": [[]]}', "ids must be"),
        ('{"prompt": "a", "responses": ["b"], "ids": [[-1]]}', "ids must be"),
        ('{"prompt": "a", "responses": ["b"], "history": [["c"]]}', "history must be"),
    ],
)
def test_malformed_rows_are_named(tmp_path, line, message):
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "a", "responses": ["b"]}\n' + line + "\n")
    with pytest.raises(SystemExit, match=message) as e:
        read_rows(str(path))
    assert f"{path}:2" in str(e.value)


def test_unreadable_files(tmp_path):
    good = b'{"prompt": "a", "responses": ["b"]}\n'
    (tmp_path / "a.jsonl").write_bytes(good * 3 + good.replace(b"a", b"\xff"))
    with pytest.raises(SystemExit, match="a.jsonl:4: not UTF-8"):
        read_rows(str(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").write_text("\n")
    with pytest.raises(SystemExit, match="no rows"):
        read_rows(str(tmp_path / "b.jsonl"))
    with pytest.raises(SystemExit, match="make it with: python -m data.jsonl.prepare"):
        read_meta(str(tmp_path / "nothing"), [])
    with pytest.raises(SystemExit, match="make it with: python -m data.pydocs.prepare"):
        read_meta("data/pydocs", ["nothing.bin"])
    with pytest.raises(SystemExit, match="Not a directory"):
        read_meta(str(tmp_path / "a.jsonl"), [])


def test_prepare_command():
    for folder, expected in {
        "data/pydocs": "python -m data.pydocs.prepare",
        os.path.abspath("data/pydocs"): "python -m data.pydocs.prepare",
        "data/shakespeare": "python -m data.shakespeare.prepare FILE",
        "data/shp/group": "python -m data.shp.prepare",
        "data/shp/x/1/row": "python -m data.shp.prepare --out=data/shp/x/1",
        "x/y": "python -m data.jsonl.prepare FILE.jsonl --out=x/y",
    }.items():
        assert prepare_command(folder) == expected
    gsm8k = prepare_command("data/gsm8k_ranked/")
    assert gsm8k.endswith("--solutions=175b_verification --out=data/gsm8k_ranked")


def test_every_config_has_a_command_for_its_data():
    """It runs a module that exists, and writes the folder by default or by --out."""
    configs = glob.glob("config/**/*.py", recursive=True) + glob.glob("studies/*/config/*.py")
    folders = set()
    for path in configs:
        with open(path, encoding="utf-8") as f:
            folders |= set(re.findall(r'^(?:pretrain_)?data = "(.+?)"', f.read(), flags=re.M))
    assert len(folders) > 5
    for folder in folders:
        _, _, module, *arguments = prepare_command(folder).split()
        assert importlib.util.find_spec(module), folder
        if module == "data.jsonl.prepare":
            assert f"--out={folder}" in arguments
            assert "FILE.jsonl" not in arguments, f"{folder} has no command in data/folder.py"
        elif module.startswith("data."):
            by_default = folder.split("/")[1] == module.split(".")[1]
            outs = [f"--out={folder}", f"--out={os.path.dirname(folder)}"]
            assert by_default or set(outs) & set(arguments)


def test_the_split_is_by_group_and_stable():
    sides = [split_of(f"g{i}") for i in range(5000)]
    assert abs(sides.count("val") / 5000 - 0.1) < 0.02
    assert [split_of(group) for group in "abcde"] == ["train", "train", "train", "val", "train"]


def test_files_are_data(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.array([{}], dtype=object))
    with pytest.raises(SystemExit, match="not an .npz file of numbers"):
        read_arrays(str(tmp_path / "a.npz"))
    for text, message in (
        ("{", "not JSON"),
        ("[" * 100000, "not JSON"),
        ("[]", "must hold a JSON object, got a list"),
        ('{"y": 1}', "has no x; advice"),
    ):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(SystemExit, match=message):
            read_json(str(tmp_path / "a.json"), ("x",), "; advice")
    assert printable("a\tb\n\x1b[2J\r\x9b\ud800é") == "a\tb\n\\x1b[2J\\r\\x9b\\ud800é"
    assert printable("\u202eab\u2069\u200f\u061c\u2028") == (
        "\\u202eab\\u2069\\u200f\\u061c\\u2028"
    )


def test_two_writers_of_one_file(tmp_path):
    """The second one begins anew. The first neither puts its half in place nor removes anything."""
    path = tmp_path / "f.txt"
    with pytest.raises(SystemExit, match="another process has written it meanwhile"):
        with atomic_write(str(path)) as first:
            first.write("first")
            with atomic_write(str(path)) as second:
                second.write("second")
    assert path.read_text() == "second"
    with pytest.raises(SystemExit, match="another process has written it meanwhile"):
        with atomic_write(str(path)) as first:
            os.unlink(f"{path}.tmp")
            (tmp_path / "f.txt.tmp").write_text("of the second")
    assert path.read_text() == "second"
    assert (tmp_path / "f.txt.tmp").read_text() == "of the second"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError):
        with atomic_write(str(path)) as f:
            f.write("half of the ne")
            f.write(str(1 / 0))
    assert path.read_text() == "old"
    with atomic_write(str(path)) as f:
        f.write("new")
    assert path.read_text() == "new"


# ---- tokenizers


def test_trained_bpe_round_trip(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    texts = []
    for path in ("loss.py", "model.py", "train.py"):
        with open(path, encoding="utf-8") as f:
            texts += list(f)
    enc = tokenizer.train(texts, 600)
    tokenizer.save(enc, str(tmp_path / "a.tiktoken"))
    loaded = tokenizer.load(str(tmp_path / "a.tiktoken"))
    assert loaded.n_vocab == 600
    assert loaded.eot_token == 599
    assert tokenizer.fingerprint(loaded) == tokenizer.fingerprint(enc)

    # the package that trained it gives the same ids
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=599,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    for text in texts[:200] + ["naïve café 你好 \t\n  x"]:
        ids = loaded.encode_ordinary(text)
        assert ids == bpe.encode(text).ids
        assert loaded.decode(ids) == text


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
    assert enc.n_vocab == 50257
    assert enc.eot_token == 50256
    assert enc.encode_ordinary("Hello world") == [15496, 995]
    ours = tokenizer.make_encoding("gpt2", enc._mergeable_ranks)  # PATTERN is GPT-2's
    for text in ("It's  two\n\nlines, 12345 é", "def f(x):\n    return x"):
        assert ours.encode_ordinary(text) == enc.encode_ordinary(text)


# ---- data sets


def prepare(name, *args):
    return command(f"data.{name}.prepare", *args)


def test_addition_is_right_and_split_by_pair(tmp_path):
    done = prepare("addition", "--rows=300", "--below=30", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    train, val = read_both(tmp_path)
    for row in train + val:
        a, b = re.findall(r"\d+", row["prompt"])
        assert row["responses"] == [str(int(a) + int(b))]
    assert not {row["group"] for row in train} & {row["group"] for row in val}


def test_pydocs_reads_without_importing(tmp_path):
    from data.pydocs.prepare import documented, summary

    path = tmp_path / "m.py"
    path.write_text(
        '''"""Module text."""
raise SystemExit("imported")
class A:
    def f(self, x: int = 1, *a):
        """Return x, or what
        else.

        More."""
'''
    )
    found = {name: (signature, doc) for name, signature, doc in documented("m", str(path))}
    assert found["m"] == (None, "Module text.")
    signature, doc = found["m.A.f"]
    assert signature == "self, x: int=1, *a"
    assert summary(doc) == "Return x, or what else."
    assert summary("x") is None


def test_known_reward():
    from data.pydocs.scorer import concrete

    assert concrete(None, "Return an index into the list, as bytes.") == 1
    assert concrete(None, "Return the index of a string in a list.") == 1 - 1 / 9
    assert concrete(None, "Return it.") == 0
    assert concrete(None, "lists strings bytes files modules methods") == 0  # six kinds
    assert concrete(None, "the the the the") == -0.75


QUESTION = "Question {}: " + "why is that so " * 6


def shp_rows(posts=40):
    """Rows of SHP's schema: the pairs of three comments for each post."""
    rows = []
    for i in range(posts):
        for a, b in ((0, 1), (2, 0), (1, 2)):
            row = {
                "post_id": f"p{i}",
                "domain": "ask",
                "history": QUESTION.format(i),
                "human_ref_A": f"comment {a} of {i}",
                "human_ref_B": f"comment {b} of {i}",
                "labels": int(a < b),
                "score_A": 9 - a,
                "score_B": 9 - b,
            }
            rows.append(row)
    return rows


def threads(posts=40):
    """The same as ranked rows."""
    rows = [{"prompt": "sum", "response": "1", "source": "gsm8k"}]
    for i in range(posts):
        responses = [{"text": f"comment {k} of {i}", "score": 9 - k} for k in range(3)]
        row = {
            "prompt": QUESTION.format(i),
            "group": f"p{i}",
            "source": "stackexchange/ask",
            "responses": responses,
        }
        rows.append(row)
    return rows


def check_shp_folder(folder, split):
    """Check groups and leaks of a data folder of the Taylor study. Returns its texts, sorted."""
    train, val = read_both(folder)
    shared_posts = {row["group"] for row in train} & {row["group"] for row in val}
    leaks = read_meta(folder, ["train.jsonl", "val.jsonl"])["leaks"]
    starts = {row["responses"][0].encode()[:64] for row in train}
    leaked = [row["responses"][0].encode()[:64] in starts for row in val]
    assert leaks == pytest.approx(np.mean(leaked))
    if split == "group":
        assert not shared_posts
        assert leaks < 0.05
    else:
        assert shared_posts
        assert leaks > 0.8
    return sorted(row["responses"][0] for row in train + val)


def test_shp_by_row_and_by_post(tmp_path):
    """From a stand-in of the hub's set, from ranked rows, and from docstrings. The split by row
    leaks nearly every validation text, the split by post none; both have the same texts."""
    write_lines(tmp_path / "hub" / "train.jsonl", shp_rows())
    write_lines(tmp_path / "ranked.jsonl", threads())
    texts = {}
    for name, args in (
        ("hub", [f"--hub={tmp_path}/hub"]),
        ("local", [f"{tmp_path}/ranked.jsonl"]),
        ("surrogate", ["--surrogate", "--rows=300"]),
    ):
        done = prepare("shp", *args, f"--out={tmp_path}/{name}", "--tokenizer=bytes")
        assert done.returncode == 0, done.stderr
        texts[name] = check_shp_folder(f"{tmp_path}/{name}/row", "row")
        assert check_shp_folder(f"{tmp_path}/{name}/group", "group") == texts[name]
    assert texts["hub"] == texts["local"]
    assert len(texts["hub"]) == 120
    assert any("comment 0 of 3" in text for text in texts["hub"])
    assert not any("comment 2 of 3" in text for text in texts["hub"])  # it is never preferred


def test_shp_leaves_out_pairs_without_a_post_or_a_comment(tmp_path):
    rows = shp_rows()
    rows[0]["history"] = None
    rows[1]["human_ref_B"] = None  # comment 0, which is preferred
    rows[5] |= {"history": " ", "human_ref_A": ""}
    write_lines(tmp_path / "hub" / "train.jsonl", rows)
    args = [f"--hub={tmp_path}/hub", "--split=group", f"--out={tmp_path}/out", "--tokenizer=bytes"]
    done = prepare("shp", *args)
    assert done.returncode == 0, done.stderr
    assert "left out 3 pairs without a post or a comment" in done.stdout
    train, val = read_both(f"{tmp_path}/out/group")
    texts = [row["responses"][0] for row in train + val]
    assert len(texts) == 117
    assert not any("None" in text for text in texts)


def test_shp_sets_are_other_rows(tmp_path):
    write_lines(tmp_path / "hub" / "train.jsonl", shp_rows())
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
    posts = []
    for n in (1, 2):
        train, val = read_both(f"{tmp_path}/out/{n}/group")
        assert len(train) + len(val) == 45
        posts.append({row["group"] for row in train + val})
    assert not posts[0] & posts[1]
    assert os.listdir(tmp_path / "out" / "1") == ["group"]


def test_shp_refusals(tmp_path):
    write_lines(tmp_path / "hub" / "train.jsonl", [{"prompt": "a"}])
    row = {"prompt": "a", "responses": ["b", "c"], "system": "S"}
    write_lines(tmp_path / "system.jsonl", [row])
    for args, message in (
        ([f"--hub={tmp_path}/hub"], "its rows have no"),
        ([f"--hub={tmp_path}/nothing"], "could not read it"),
        ([f"{tmp_path}/no.jsonl"], "No such file"),
        (["--surrogate", "--rows=1"], "too few"),
        (["--surrogate", "--rows=0"], "at least 1"),
        (["--surrogate", "--tokenizer=foo"], "tokenizer foo"),
        (["--surrogate", "a.jsonl"], "either files"),
        ([f"{tmp_path}/system.jsonl"], "a thread has no system; drop it"),
    ):
        done = prepare("shp", f"--out={tmp_path}/out", "--tokenizer=bytes", *args)
        assert done.returncode
        assert message in done.stderr
        assert "Traceback" not in done.stderr


@needs_shared_rows
def test_the_row_split_of_real_threads_leaks(tmp_path):
    for split, least, most in (("row", 0.9, 1.0), ("group", 0.0, 0.02)):
        options = ["--rows=1000", "--tokenizer=bytes", f"--split={split}"]
        done = prepare("shp", RANKED, f"--out={tmp_path}", *options)
        assert done.returncode == 0, done.stderr
        assert least <= read_meta(f"{tmp_path}/{split}", [])["leaks"] <= most


def test_jsonl_takes_every_form(tmp_path):
    scored = [
        {"text": "low", "score": 1},
        {"text": "high", "score": 2},
        {"text": "too", "score": 1},
    ]
    lines = []
    for i in range(30):
        lines += [
            {"text": "a story " * 3, "url": f"u{i}"},
            {"prompt": f"p{i}", "response": "r"},
            {"prompt": f"q{i}", "responses": ["best", "worst"], "group": f"g{i // 2}"},
            {"prompt": f"o{i}", "responses": scored},
        ]
    path = tmp_path / "in.jsonl.gz"
    with gzip.open(path, "wt") as f:
        f.writelines(json.dumps(line) + "\n" for line in lines)
    out = str(tmp_path / "out")
    done = prepare("jsonl", path, f"--out={out}", "--tokenizer=bytes", "--val_share=0.3")
    assert done.returncode == 0, done.stderr
    train, val = read_both(out)
    assert len(train) + len(val) == 90
    by_prompt = {row["prompt"]: row for row in train + val}
    assert by_prompt["o3"]["responses"] == ["high", "low", "too"]
    assert by_prompt["o3"]["scores"] == [2, 1, 1]
    num_documents = 0
    for side in ("train", "val"):
        num_documents += (read_stream(out, side) == EOT).sum()
    assert num_documents == 30


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "1: not JSON"),
        ('{"prompt": "a", "response": 3}', "must be a string"),
        ('{"prompt": "a", "responses": [{"text": "b"}]}', "rank or score"),
        ('{"text": ""}', "not empty"),
        ('{"text": "\\udfff"}', "Unicode"),
        ('{"prompt": "a", "responses": 5}', "must be a string"),
        ('{"text": "alone"}', "no row was assigned to"),
        ('{"prompt": "a", "response": "b", "group": "\\ud800"}', "group must be Unicode"),
        ('{"other": 1}', "no known format has the columns other. Name"),
        ("3", "not an object"),
        ('{"prompt": "a", "response": "b", "text": "c"}', "drop text, or drop prompt, response"),
        ('{"prompt": "a", "response": "b", "responses": ["c"]}', "not both"),
        ('{"prompt": "a", "response": "b", "group": [1]}', "group must be a string or a number"),
        ('{"prompt": "a", "response": "b", "history": ["c"]}', "history must be"),
        ('{"prompt": "a", "responses": ["b", "c"], "scores": [1, 2]}', "scores must fall"),
        ('{"prompt": "a", "responses": [{"text": "b", "rank": 1}], "scores": [1]}', "objects"),
        ('{"text": "a b", "ended": false}', "ended is false"),
    ],
)
def test_jsonl_names_the_line(tmp_path, line, message):
    (tmp_path / "in.jsonl").write_text(line + "\n")
    done = prepare("jsonl", tmp_path / "in.jsonl", f"--out={tmp_path}/out")
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


RATED = ("--prompt=prompt", "--response=response", "--scores=score", "--val_share=0.3")


def test_rated_lines_of_a_prompt_in_any_order(tmp_path):
    """Samples of two policies in a file each make the rows of one sorted file, on the side of their
    group."""
    lines = []
    for policy, score in (("a", 0), ("b", 2)):
        for i in range(40):
            for k in range(2):
                line = {"prompt": f"q{i}", "response": f"{policy}{k}", "score": score + k}
                lines.append(line | {"group": f"g{i // 4}", "url": f"answer {policy}{k}{i}"})
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, part in zip(files, (lines[:80], lines[80:])):
        path.write_text("".join(json.dumps(line) + "\n" for line in part))
    done = prepare("jsonl", *files, f"--out={tmp_path}/two", *RATED)
    assert done.returncode == 0, done.stderr
    assert "ignored fields: url (160)" in done.stdout
    train, val = read_both(tmp_path / "two")
    assert len(train + val) == 40
    assert not {row["group"] for row in train} & {row["group"] for row in val}
    for row in train + val:
        assert row["group"] == f"g{int(row['prompt'][1:]) // 4}"
        assert (row["responses"], row["scores"]) == (["b1", "b0", "a1", "a0"], [3, 2, 1, 0])

    in_order = sorted(lines, key=lambda line: int(line["prompt"][1:]))
    (tmp_path / "sorted.jsonl").write_text("".join(json.dumps(line) + "\n" for line in in_order))
    prepare("jsonl", tmp_path / "sorted.jsonl", f"--out={tmp_path}/sorted", *RATED)
    assert read_both(tmp_path / "sorted") == (train, val)


def test_rated_lines_of_a_prompt_have_one_group(tmp_path):
    line = {"prompt": "q", "response": "a", "score": 1, "group": "g"}
    for other in ({"group": "h"}, {"group": None}):
        lines = [line, line | {"response": "b"} | other]
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        done = prepare("jsonl", tmp_path / "in.jsonl", f"--out={tmp_path}/out", *RATED)
        assert done.returncode == 1
        assert "responses to 'q' have the groups 'g' and " in done.stderr
        assert "Traceback" not in done.stderr and not os.path.exists(tmp_path / "out/meta.json")


def test_jsonl_keeps_the_fields_of_a_row(tmp_path):
    """And says which fields no row keeps."""
    row = {
        "prompt": "and in the north?",
        "history": [["how is it in the south?", "Dry."]],
        "responses": ["Wet.", "Dry.", "No idea."],
        "scores": [2, 2, 1],
        "ids": [[5], None, None],
        "tokenizer": "some checksum",
        "ended": [False, True, None],
    }
    groups = [0, 1.5, "", "a"] + list(range(1, 20))
    lines = [row | {"group": group, "source": "x", "license": "y"} for group in groups]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = prepare("jsonl", tmp_path / "in.jsonl", f"--out={tmp_path}/out", "--val_share=0.3")
    assert done.returncode == 0, done.stderr
    assert f"ignored fields: source ({len(lines)}), license ({len(lines)})" in done.stdout
    train, val = read_both(tmp_path / "out")
    assert {r["group"] for r in train + val} == {str(group) for group in groups}
    for kept in train + val:
        assert kept == row | {"group": kept["group"]}


def test_jsonl_keeps_a_conversation_on_one_side(tmp_path):
    """Its rows have the opening as their group, if they have none."""
    turns = [("and then?", "This."), ("why?", "So.")]
    lines = []
    for n in range(40):
        history = [[f"q{n}", "Yes."]]
        lines.append({"prompt": f"q{n}", "responses": ["Yes."]})
        for prompt, response in turns:
            lines.append({"prompt": prompt, "responses": [response], "history": list(history)})
            history.append([prompt, response])
    write_lines(tmp_path / "in.jsonl", lines)
    done = prepare("jsonl", tmp_path / "in.jsonl", f"--out={tmp_path}/out", "--val_share=0.4")
    assert done.returncode == 0, done.stderr
    train, val = read_both(tmp_path / "out")
    assert len(train + val) == len(lines)
    assert len({row["group"] for row in train + val}) == 40
    assert not {row["group"] for row in train} & {row["group"] for row in val}


def test_jsonl_texts_may_have_numbers_as_groups(tmp_path):
    lines = [{"text": f"a text {n}", "group": n // 4} for n in range(80)]
    write_lines(tmp_path / "in.jsonl", lines)
    options = ["--tokenizer=bytes", "--val_share=0.3"]
    done = prepare("jsonl", tmp_path / "in.jsonl", f"--out={tmp_path}/out", *options)
    assert done.returncode == 0, done.stderr
    assert "80 lines" in done.stdout


def test_jsonl_where(tmp_path):
    lines = [{"prompt": f"q{n}", "response": "a", "source": f"x{n % 2}"} for n in range(60)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for where, message in (
        ("source:gsm8k", "give KEY=PREFIX"),
        ("source=gsm8k", "no line has a source that starts with 'gsm8k'"),
        ("origin=x", "no line has a origin that starts with 'x'"),
    ):
        done = prepare("jsonl", tmp_path / "in.jsonl", f"--out={tmp_path}/o", f"--where={where}")
        assert done.returncode == 1
        assert message in done.stderr
    done = prepare("jsonl", tmp_path / "in.jsonl", f"--out={tmp_path}/o", "--where=source=x1")
    assert done.returncode == 0, done.stderr
    assert sum(map(len, read_both(tmp_path / "o"))) == 30
    assert "ignored" not in done.stdout


@pytest.mark.parametrize("name", ["bytes", "FILE", "bpe"])
def test_jsonl_rows_with_a_tokenizer(tmp_path, name):
    """The folder takes the tokenizer, and a model can start from it."""
    own = tokenizer.train(["abcdefgh " * 9], 300)
    tokenizer.save(own, f"{tmp_path}/own.tiktoken")
    lines = [{"prompt": f"q{n}", "response": "an answer"} for n in range(30)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    option = f"--tokenizer={name.replace('FILE', f'{tmp_path}/own.tiktoken')}"
    out = str(tmp_path / "out")
    done = prepare("jsonl", tmp_path / "in.jsonl", f"--out={out}", option, "--val_share=0.3")
    assert done.returncode == 0, done.stderr
    meta = read_meta(out, ["train.jsonl", "val.jsonl"])
    enc = tokenizer.load(tokenizer_path(out, meta["tokenizer"]))
    assert meta["tokenizer_sha256"] == tokenizer.fingerprint(enc)
    if name == "FILE":
        assert tokenizer.fingerprint(enc) == tokenizer.fingerprint(own)
    if name == "bpe":
        assert len(enc.encode_ordinary("an answer")) == 2


@needs_shared_rows
def test_jsonl_takes_the_shared_rows_as_they_are(tmp_path):
    options = ["--where=source=gsm8k", "--authors=human,175b_verification"]
    done = prepare("jsonl", RANKED, f"--out={tmp_path}/pairs", *options)
    assert done.returncode == 0, done.stderr
    assert not os.path.exists(f"{tmp_path}/pairs/train.bin")
    train, val = read_both(f"{tmp_path}/pairs")
    assert len(train) + len(val) == 1162
    assert all(len(row["responses"]) == 2 for row in train + val)

    done = prepare("jsonl", RANKED, f"--out={tmp_path}/all")
    assert done.returncode == 0, done.stderr
    rows = read_rows(f"{tmp_path}/all/train.jsonl")
    assert {len(row["responses"]) for row in rows} == {3, 4, 5, 6}
    assert any(len(set(row["scores"])) < len(row["scores"]) for row in rows)  # ties


# ------------------------------------------------------------------------- bounds of what is read


def test_long_runs_are_encoded_in_pieces():
    most = tokenizer.MAX_RUN
    for run in (" ", "\n", "a", "7", "!"):
        for n in (most - 1, most, most + 1, 3 * most + 7):
            text = f"Some text,{run * n}and more."
            assert BYTES.decode(tokenizer.encode(BYTES, text)) == text
    text = "a table" + " " * 1_200_000 + "its last cell"
    assert len(tokenizer.encode(BYTES, text)) == len(text)
    pieces = tokenizer.cut_long_runs(text)
    assert "".join(pieces) == text and max(map(len, pieces)) < most + 100
    assert pieces[-1].endswith("  its last cell")
    enc = tokenizer.train(["aa aaaa  a"] * 3, 270)
    assert enc.decode(tokenizer.encode(enc, "a" * 1_000_000)) == "a" * 1_000_000


def test_other_texts_are_encoded_in_one_piece():
    """Those of the repository, and long ones without spaces."""
    texts = ["字，" * 9000, "a1" * 9000, "word " * 9000, "a" * tokenizer.MAX_RUN]
    for path in ("train.py", "README.md", "bench/growth.svg"):
        with open(path, encoding="utf-8") as f:
            texts.append(f.read() * 10)
    for text in texts:
        assert tokenizer.encode(BYTES, text) == BYTES.encode_ordinary(text)
        if tokenizer.may_have_long_run(text):
            assert tokenizer.cut_long_runs(text) == [text]


def test_nothing_encodes_around_the_cutting():
    for path in source_files():
        with open(path, encoding="utf-8") as f:
            text = f.read()
        assert path == "data/tokenizer.py" or "encode_ordinary(" not in text, path


def test_a_stop_token_that_is_not_special_is_said(tmp_path, capsys):
    """A text that contains it has its id."""
    folder = byte_level(tmp_path, ["<eos>"], chat="", eos="<eos>")
    path = f"{folder}/tokenizer.json"
    tokenizer.load_for_data(path)
    assert not capsys.readouterr().out
    with open(path, encoding="utf-8") as f:
        spec = json.load(f)
    for token in spec["added_tokens"]:
        token["special"] = False
    with open(path, "w", encoding="utf-8") as f:
        json.dump(spec, f)
    enc = tokenizer.load_for_data(path)
    assert "warning: where the data's texts contain '<eos>'" in capsys.readouterr().out
    assert enc.eot_token in tokenizer.encode(enc, "a<eos>b")


def test_a_tokenizer_of_another_regular_expression_is_said(tmp_path, capsys):
    """cl100k_base has ";\\n", which GPT-2's cuts. What is trained here has no such token."""
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {b"ab": 256, b";\n": 257, " é".encode(): 258}
    path = f"{tmp_path}/x.tiktoken"
    tokenizer.save(tokenizer.make_encoding("x", ranks), path)
    rows = [f'{{"prompt": "{n};", "response": "b;\\n"}}\n' for n in range(50)]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    jsonl_prepare.main([f"{tmp_path}/rows.jsonl", f"--out={tmp_path}/data", f"--tokenizer={path}"])
    said = capsys.readouterr().out
    assert said.count("warning") == 1 and "1 of 260 tokens, as ';\\n', are of another" in said
    assert tokenizer.load_for_data(path).decode([257]) == ";\n"

    texts = ["L'été, it's 12,345 naïve — 你好，世界!!  \n\n\t don't\r\n x = [1];\n"] * 9
    tokenizer.save(tokenizer.train(texts, 400), path)
    capsys.readouterr()
    assert tokenizer.load_for_data(path).n_vocab > 300
    assert tokenizer.load_for_data("bytes").n_vocab == 257
    assert not capsys.readouterr().out


def test_a_failure_of_a_tokenizer_names_the_text(monkeypatch):
    class Panic(BaseException):
        pass

    class Broken:
        def encode_ordinary(self, text):
            raise Panic("oops")

    with pytest.raises(SystemExit, match="text of 4 characters that begins with 'text'.*oops"):
        tokenizer.encode(Broken(), "text")


def test_a_tokenizer_that_makes_texts_longer_is_refused(tmp_path):
    tokenizer.to_json(BYTES, str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": tokenizer.EOT}))
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    anywhere = {"type": "Replace", "pattern": {"Regex": "a|"}, "content": "b" * 2000}
    for name, part, ok in [
        ("normalizer", {"type": "Sequence", "normalizers": [double] * 40}, False),
        ("normalizer", anywhere, False),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFKC"}, space]}, True),
        ("decoder", {"type": "Sequence", "decoders": [double] * 40}, False),
    ]:
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec | {name: part}))
        if ok:
            tokenizer.load(str(tmp_path / "tokenizer.json"))
            continue
        with pytest.raises(SystemExit, match=f"its {name} can make a text .* times as long"):
            tokenizer.load(str(tmp_path / "tokenizer.json"))


def test_a_token_that_occurs_twice_and_ids_that_are_too_large(tmp_path):
    path = tmp_path / "x.tiktoken"
    tokenizer.save(BYTES, str(path))
    first, rest = path.read_text().split("\n", 1)
    path.write_text(f"{first}\n{first}\n{rest}")
    with pytest.raises(SystemExit, match="not a .tiktoken file"):
        tokenizer.load(str(path))
    tokenizer.to_json(BYTES, str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": tokenizer.EOT}))
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["model"]["vocab"]["far"] = 2**31
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(SystemExit, match="its largest id is 2147483648"):
        tokenizer.load(str(tmp_path / "tokenizer.json"))


def test_a_gzip_bomb_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl_prepare, "MAX_LINE", 100_000)
    path = str(tmp_path / "x.jsonl.gz")
    row = json.dumps({"text": "a" * 50_000}) + "\n"
    with gzip.open(path, "wt") as f:
        f.write(row * 1000)
    with pytest.raises(SystemExit, match=r"x.jsonl.gz:\d+: unpacked it is more than 200 times"):
        list(jsonl_prepare.read_lines(path))
    with gzip.open(path, "wt") as f:
        f.write(row + "b" * 10**6)
    with pytest.raises(SystemExit, match="x.jsonl.gz:2: a line of more than 100,000 characters"):
        list(jsonl_prepare.read_lines(path))
    (tmp_path / "deep.jsonl").write_text(row + "[" * 90_000)
    with pytest.raises(SystemExit, match="deep.jsonl:2: not JSON"):
        list(jsonl_prepare.read_lines(str(tmp_path / "deep.jsonl")))
    with open(path, "r+b") as f:
        f.seek(40)
        f.write(b"damaged")
    with pytest.raises(SystemExit, match="x.jsonl.gz: "):
        list(jsonl_prepare.read_lines(path))


def test_a_preparation_does_not_adopt_data_of_another_kind(tmp_path):
    """train.bin of an earlier preparation may be of another tokenizer."""
    texts, rows, out = tmp_path / "texts.jsonl", tmp_path / "rows.jsonl", str(tmp_path / "d")
    texts.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(40)))
    lines = [json.dumps({"prompt": f"q{i}", "response": f"a{i}"}) + "\n" for i in range(40)]
    rows.write_text("".join(lines))
    arguments = [f"--out={out}", "--tokenizer=bpe", "--vocab_size=300", "--val_share=0.3"]
    jsonl_prepare.main([str(texts), *arguments])
    jsonl_prepare.main([str(texts), *arguments])  # the same kind again is fine
    with pytest.raises(SystemExit, match=r"train\.bin is of an earlier preparation"):
        jsonl_prepare.main([str(rows), *arguments])
    read_meta(out, ["train.bin", "val.bin"])


def test_jsonl_objects_say_which_samples_did_not_end():
    objects = [{"text": "a", "rank": 2, "ended": False}, {"text": "b", "rank": 1}]
    row = jsonl_prepare.to_row({"prompt": "q", "responses": objects}, "x:1")
    assert row["responses"] == ["b", "a"] and row["ended"] == [None, False]
    assert jsonl_prepare.ignored_fields({"prompt": "q", "responses": objects}) == []
    objects[1]["ended"] = "no"
    with pytest.raises(SystemExit, match="ended must be true, false or null"):
        jsonl_prepare.to_row({"prompt": "q", "responses": objects}, "x:1")


def test_jsonl_says_which_of_rank_and_score_it_ignores(tmp_path):
    """Ranks count if every response has one."""
    ranked = {"prompt": "q", "responses": [{"text": "a", "rank": 2, "score": 9}]}
    ranked["responses"].append({"text": "b", "rank": 1, "score": 1})
    scored = {"prompt": "p", "responses": [{"text": "a", "score": 9}]}
    scored["responses"].append({"text": "b", "rank": 1, "score": 1})
    (tmp_path / "in.jsonl").write_text(f"{json.dumps(ranked)}\n{json.dumps(scored)}\n" * 10)
    done = prepare("jsonl", tmp_path / "in.jsonl", f"--out={tmp_path}/o", "--val_share=0.5")
    assert "ignored fields: responses.score (20), responses.rank (10)" in done.stdout
    train, val = read_both(tmp_path / "o")
    best = {row["prompt"]: row["responses"][0] for row in train + val}
    assert best == {"q": "b", "p": "a"}


def test_a_source_whose_name_is_not_utf8(tmp_path):
    """Its data folder is complete: meta.json is written last."""
    path = os.fsdecode(bytes(tmp_path) + b"/b\xff.jsonl")
    with open(path, "w") as f:
        for n in range(20):
            f.write(json.dumps({"prompt": f"{n}", "response": "b"}) + "\n")
    done = prepare("jsonl", path, f"--out={tmp_path}/o", "--val_share=0.3")
    assert done.returncode == 0, done.stderr
    assert read_meta(f"{tmp_path}/o", ["train.jsonl"])["source"] == ["b\udcff.jsonl"]


@pytest.mark.parametrize("name", ["addition", "countdown"])
def test_few_answers(tmp_path, name):
    """The rows with answers and the prompts without are those of the whole set, and no row is in
    both."""
    whole, few = f"{tmp_path}/whole", f"{tmp_path}/few"
    sizes = ["--rows=300", "--below=30"]
    for out in ([f"--out={whole}"], [f"--out={few}", "--answers=100"]):
        assert prepare(name, *sizes, *out).returncode == 0
    rows = read_rows(f"{whole}/train.jsonl")
    answers = read_rows(f"{few}/answers/train.jsonl")
    prompts = read_rows(f"{few}/prompts/train.jsonl", prompt_only=True)
    assert answers == rows[:100]
    assert [row["prompt"] for row in prompts] == [row["prompt"] for row in rows[100:]]
    assert not any("responses" in row for row in prompts)
    for folder in ("answers", "prompts"):
        assert read_rows(f"{few}/{folder}/val.jsonl") == read_rows(f"{whole}/val.jsonl")


@pytest.mark.parametrize("name, arguments", [("addition", []), ("shakespeare", ["TEXT"])])
def test_other_preparations_adopt_no_data_either(tmp_path, name, arguments):
    text, out = tmp_path / "text.txt", tmp_path / "d"
    text.write_text("alpha beta gamma " * 50)
    out.mkdir()
    other = out / ("train.bin" if name == "addition" else "train.jsonl")
    other.write_bytes(b"abcd")
    module = importlib.import_module(f"data.{name}.prepare")
    arguments = [str(text) if argument == "TEXT" else argument for argument in arguments]
    with pytest.raises(SystemExit, match="is of an earlier preparation"):
        module.main([*arguments, f"--out={out}"])
    other.rename(out / "config.json")  # a run
    with pytest.raises(SystemExit, match="would be a file of a run"):
        module.main([*arguments, f"--out={out}"])
    with pytest.raises(SystemExit, match="would be a file of a run"):
        module.main([*arguments, f"--out={out}/round_0"])
    assert os.listdir(out) == ["config.json"]


def test_a_name_that_stands_twice_is_refused(tmp_path):
    """json.loads would take the last one without a word."""
    path = f"{tmp_path}/train.jsonl"
    with open(path, "w") as f:
        f.write('{"prompt": "a", "responses": ["b"]}\n')
        f.write('{"prompt": "a", "responses": ["b"], "prompt": "c"}\n')
    with pytest.raises(SystemExit, match="train.jsonl:2.*'prompt' stands twice"):
        read_rows(path)
    with pytest.raises(SystemExit, match="train.jsonl:2.*'prompt' stands twice"):
        jsonl_prepare.main([path, f"--out={tmp_path}/out"])


@pytest.mark.parametrize("author", [["a"], {"name": "a"}])
def test_an_author_that_is_no_text_is_one_line(tmp_path, author):
    responses = [{"text": "x", "author": "a"}, {"text": "y", "author": author}]
    write_lines(tmp_path / "in.jsonl", [{"prompt": "p", "responses": responses}])
    with pytest.raises(SystemExit, match="in.jsonl:1: an author must be a string"):
        jsonl_prepare.main([f"{tmp_path}/in.jsonl", f"--out={tmp_path}/out", "--authors=a"])


@pytest.mark.parametrize("kind", ["tokenizer.tiktoken", "tokenizer.json"])
@pytest.mark.parametrize("name", ["shakespeare", "shp"])
def test_other_preparations_copy_a_tokenizer_file(tmp_path, monkeypatch, name, kind):
    """From an absolute and from a relative path; the folder has all that a run needs."""
    own = tokenizer.train(["the loss of a model " * 9], 300)
    path = f"{tmp_path}/own/{kind}"
    os.makedirs(f"{tmp_path}/own")
    if kind == "tokenizer.json":
        tokenizer.to_json(own, path)
        write_json(f"{tmp_path}/own/tokenizer_config.json", {"eos_token": tokenizer.EOT})
    else:
        tokenizer.save(own, path)
    (tmp_path / "text.txt").write_text("the loss of a model " * 50)
    write_lines(tmp_path / "ranked.jsonl", threads())
    monkeypatch.chdir(tmp_path)
    source = "text.txt" if name == "shakespeare" else "ranked.jsonl"
    for n, given in enumerate((path, os.path.relpath(path))):
        out = f"{tmp_path}/{n}"
        module = importlib.import_module(f"data.{name}.prepare")
        module.main([source, f"--out={out}", f"--tokenizer={given}"])
        for folder in [out] if name == "shakespeare" else [f"{out}/row", f"{out}/group"]:
            meta = read_meta(folder, [])
            enc = tokenizer.load(tokenizer_path(folder, meta["tokenizer"]))
            assert tokenizer.fingerprint(enc) == meta["tokenizer_sha256"]
    with pytest.raises(SystemExit, match="gone.tiktoken: No such file"):
        module.main([source, f"--out={tmp_path}/new", "--tokenizer=gone.tiktoken"])
    assert not os.path.exists(f"{tmp_path}/new")


def test_two_preparations_of_a_folder_do_not_mix(tmp_path):
    """The second one is refused while the first writes; a lock leaves nothing behind."""
    lines = [{"prompt": f"q{n}", "response": "an answer"} for n in range(30)]
    write_lines(tmp_path / "in.jsonl", lines)
    (tmp_path / "text.txt").write_text("the loss of a model " * 50)
    out = str(tmp_path / "out")
    with lock_folder(out):
        for name, arguments in (
            ("jsonl", [tmp_path / "in.jsonl"]),
            ("shakespeare", [tmp_path / "text.txt"]),
            ("addition", []),
            ("nectar", [f"--hub={tmp_path}/hub"]),
            ("fineweb", [f"--hub={tmp_path}/hub", "--tokenizer=bytes"]),
        ):
            done = prepare(name, *arguments, f"--out={out}")
            assert done.returncode == 1 and done.stderr.count("\n") == 1
            assert f"{out} is being prepared by another command" in done.stderr
    assert os.listdir(out) == []
    done = prepare("jsonl", tmp_path / "in.jsonl", f"--out={out}", "--val_share=0.3")
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(out)) == ["meta.json", "train.jsonl", "val.jsonl"]


PREPARATIONS = {
    "jsonl": ["in.jsonl"],
    "addition": [],
    "shakespeare": ["text.txt"],
}


@pytest.mark.parametrize("name", PREPARATIONS)
@pytest.mark.parametrize("own", ["train.jsonl", "val.bin", "meta.json"])
def test_files_of_the_user_are_not_replaced(tmp_path, monkeypatch, name, own):
    """Neither before nor after a preparation was killed; what it has written itself is."""
    monkeypatch.chdir(tmp_path)
    lines = [{"prompt": f"q{n}", "response": "an answer"} for n in range(30)]
    write_lines(tmp_path / "in.jsonl", lines)
    (tmp_path / "text.txt").write_text("the loss of a model " * 50)
    main = importlib.import_module(f"data.{name}.prepare").main
    arguments = [*PREPARATIONS[name], "--out=out"]
    os.makedirs("out")
    (tmp_path / "out" / own).write_text('{"mine": 1}\n')
    assert refused_by(main, arguments).startswith(f"out/{own} is ")
    assert os.listdir("out") == [own] and (tmp_path / "out" / own).read_text() == '{"mine": 1}\n'

    os.rename(f"out/{own}", "out/mine")
    with monkeypatch.context() as patched:
        for module in ("data.rows", "data.jsonl.prepare", "data.shakespeare.prepare"):
            patched.setattr(f"{module}.write_meta", killed)
        with pytest.raises(MemoryError):
            main(arguments)
    assert "meta.json" not in os.listdir("out") and len(os.listdir("out")) > 2
    if name != "shakespeare":  # he has put his own there since
        os.rename("out/val.jsonl", "val.jsonl")
        (tmp_path / "out/val.jsonl").write_text("mine")
        assert refused_by(main, arguments).startswith("out/val.jsonl is not what")
        os.rename("val.jsonl", "out/val.jsonl")
    main(arguments)
    main(arguments)
    assert "mine" in os.listdir("out") and UNFINISHED not in os.listdir("out")
    read_meta("out", [])
    if own == "train.jsonl" and name != "shakespeare":  # the user's own under a name of ours
        os.replace("out/mine", f"out/{own}")
        assert refused_by(main, arguments).startswith(f"out/{own} is not what")


def killed(*args, **kwargs):
    raise MemoryError


# name: (arguments of the first data set, of the second one, the data folders in OUT)
PREPARED_TWICE = {
    "jsonl": (["old.jsonl"], ["new.jsonl"], ["."]),
    "shakespeare": (["old.txt", "--tokenizer=bytes"], ["new.txt", "--tokenizer=bytes"], ["."]),
    "addition": (
        ["--answers=20", "--rows=90", "--seed=5"],
        ["--answers=20", "--rows=90", "--seed=6"],
        ["answers", "prompts"],
    ),
    "countdown": (
        ["--answers=20", "--rows=150", "--seed=5"],
        ["--answers=20", "--rows=150", "--seed=6"],
        ["answers", "prompts"],
    ),
    "shp": (
        ["old_threads.jsonl", "--tokenizer=bytes"],
        ["new_threads.jsonl", "--tokenizer=bytes"],
        ["row", "group"],
    ),
}


@pytest.mark.parametrize("name", PREPARED_TWICE)
def test_a_folder_is_prepared_again_and_killed_anywhere(tmp_path, monkeypatch, name):
    """Folders that are accepted then are all old or all new. The same command, also after a second
    kill, ends like an undisturbed one."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # slow, and no power is lost here
    monkeypatch.chdir(tmp_path)
    for word in ("old", "new"):  # of equal length: the token streams differ in no size
        (tmp_path / f"{word}.txt").write_text(f"the {word} loss of a model " * 50)
        rows = [{"prompt": f"q{n}", "response": word} for n in range(40)]
        write_lines(tmp_path / f"{word}.jsonl", rows)
        rows = [row | {"prompt": f"{word} {row['prompt']}"} for row in threads()]
        write_lines(tmp_path / f"{word}_threads.jsonl", rows)
    main = importlib.import_module(f"data.{name}.prepare").main
    old, new, folders = PREPARED_TWICE[name]
    main([*old, "--out=old"])
    main([*new, "--out=new"])
    assert all(files_in(f"old/{folder}") != files_in(f"new/{folder}") for folder in folders)
    for event in itertools.count(1):
        out = f"out{event}"
        shutil.copytree("old", out)
        is_killed = run_killed_at(event, main, [*new, f"--out={out}"])
        accepted = set()
        for folder in folders:
            found = files_in(f"{out}/{folder}")
            if is_accepted(f"{out}/{folder}", files_in(f"old/{folder}")):
                is_old = found.items() >= files_in(f"old/{folder}").items()
                assert is_old or found.items() >= files_in(f"new/{folder}").items()
                accepted.add(is_old)
        assert len(accepted) <= 1
        run_killed_at(event - 1, main, [*old, f"--out={out}"])
        main([*new, f"--out={out}"])
        for folder in folders:
            assert files_in(f"{out}/{folder}") == files_in(f"new/{folder}")
        if not is_killed:
            break
    assert event > 10


def test_a_refused_preparation_keeps_the_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "threads.jsonl", threads())
    main = importlib.import_module("data.shp.prepare").main
    main(["threads.jsonl", "--tokenizer=bytes", "--out=out"])
    (tmp_path / "out/row/bpe.tiktoken").write_text("mine")
    arguments = ["threads.jsonl", "--tokenizer=bpe", "--vocab_size=270", "--out=out"]
    assert "out/row/bpe.tiktoken is not what" in refused_by(main, arguments)
    for folder in ("out/row", "out/group"):
        assert is_accepted(folder, ["train.jsonl", "val.jsonl"])


def files_in(folder) -> dict:
    """{name: bytes} of the files in a folder."""
    found = {}
    for name in os.listdir(folder):
        with open(f"{folder}/{name}", "rb") as f:
            found[name] = f.read()
    return found


def is_accepted(folder, names) -> bool:
    """Whether a data folder has a meta.json that fits these files."""
    try:
        read_meta(folder, [name for name in names if name != "meta.json"])
    except SystemExit:
        return False
    return True


def test_meta_names_no_files_of_the_user(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the loss of a model " * 50)
    os.makedirs("out")
    for name in ("notes.jsonl", "bpe.tiktoken"):
        (tmp_path / "out" / name).write_text("mine")
    main = importlib.import_module("data.shakespeare.prepare").main
    main(["text.txt", "--out=out", "--tokenizer=bytes"])
    assert sorted(read_meta("out", [])["files"]) == ["train.bin", "val.bin"]
    bpe = ["--tokenizer=bpe", "--vocab_size=260"]
    assert "out/bpe.tiktoken is not what" in refused_by(main, ["text.txt", "--out=out", *bpe])
    assert (tmp_path / "out/bpe.tiktoken").read_text() == "mine"


def test_a_tokenizer_of_the_user_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the loss of a model " * 50)
    tokenizer.save(tokenizer.train(["a b c " * 9], 270), "mine.tiktoken")
    os.makedirs("out")
    other = tokenizer.train(["the loss of a model " * 9], 300)
    tokenizer.save(other, "out/tokenizer.tiktoken")
    main = importlib.import_module("data.shakespeare.prepare").main
    for _ in range(2):
        message = refused_by(main, ["text.txt", "--out=out", "--tokenizer=mine.tiktoken"])
        assert "out/tokenizer.tiktoken is not what an earlier preparation has written" in message
        # the user's own may be used, and stays the user's
        main(["text.txt", "--out=out", "--tokenizer=out/tokenizer.tiktoken"])
        meta = read_meta("out", ["train.bin", "val.bin"])
        assert meta["tokenizer_sha256"] == tokenizer.fingerprint(other)
    os.remove("out/tokenizer.tiktoken")
    for name in ("mine.tiktoken", "other.tiktoken"):  # those of preparations are replaced
        tokenizer.save(tokenizer.train([name * 9], 265), name)
        main(["text.txt", "--out=out", f"--tokenizer={name}"])


def refused_by(main, arguments) -> str:
    with pytest.raises(SystemExit) as e:
        main(arguments)
    return str(e.value)


def test_a_response_that_did_not_end_has_no_tail():
    """What the template writes behind a response comes only after one that ended."""
    enc, template = tokenizer.load("bytes"), "Q {prompt}\n{answer}so {response} OK{end}\n"
    for ended, expected in ((True, [*b"so 12 OK", 256]), (False, [*b"so 12"])):
        row = {"prompt": "a", "responses": ["12"], "ended": ended}
        encoded, _ = encode_rows([row], enc, template, 64)
        assert encoded[0]["responses"] == [expected]
        ids = [*b"12", 256] if ended else [*b"12"]
        assert retokenize(enc, template, enc, "{prompt}", "12", ids) == expected


def test_scores_without_ranks_are_all_numbers(tmp_path):
    """Only in the files of a round, which have ranks, has an absent response no score."""
    row = {"prompt": "a", "responses": ["b", None], "scores": [1.0, None]}
    path = f"{tmp_path}/train.jsonl"
    for scores in ([1.0, None], 2.5):
        write_rows(path, [row | {"scores": scores}])
        with pytest.raises(SystemExit, match="scores must be a number for each response"):
            read_rows(path)
    write_rows(path, [row | {"ranks": [0, 2]}])
    assert read_rows(path)[0]["scores"] == [1.0, None]
