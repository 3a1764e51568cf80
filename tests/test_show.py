"""data/show.py against what training makes of the same row, and against a terminal that would obey."""

import re

import pytest

from tools import show
from data.batch import batch_rows, stream_batch
from data.rows import encode_rows, read_rows, write_rows
from data.folder import read_stream, write_meta
from data import tokenizer

BYTES = tokenizer.load("bytes")


def shown(capsys, *args):
    data.show.main([*map(str, args)])
    return capsys.readouterr().out


def marked(prompt, response):
    """Of ASCII text in bytes: the prompt's tokens ended, the response's in brackets."""
    return "".join(f"{c}|" for c in prompt) + "".join(f"[{c}]" for c in response)


def test_a_ranked_row(tiny_data, tiny_runs, capsys):
    row = read_rows(f"{tiny_data}/train.jsonl")[3]
    said = shown(capsys, tiny_data, "--row=3", "--block_size=2000")
    for response in row["responses"]:
        assert (
            marked(f"### Instruction: {row['prompt']}\n\n### Response: ", response)
            + "[<|endoftext|>]\n"
            in said
        )
    # as many asked as in the layout that training has by default
    encoded, _ = encode_rows([row], BYTES, "### Instruction: {prompt}\n\n### Response: ", 2000)
    assert (
        sum(map(int, re.findall(r"(\d+) asked", said)))
        == len(batch_rows(encoded)["targets"])
        == said.count("]")
    )
    # under a run's template and limits; fine-tuning takes the best response alone
    said = shown(
        capsys, tiny_data, "--row=3", f"--checkpoint={tiny_runs['sft']}", "--max_response=6"
    )
    cut = marked("Q: " + row["prompt"] + "\nA: ", row["responses"][0][:6])
    assert (
        said.count("---") == 1
        and "\n" + cut + "\n" in said
        and "1 responses cut" in said
        and "no end-of-text" in said
    )


def test_absent_responses_and_sampled_ids(tmp_path, capsys):
    name = tokenizer.fingerprint(BYTES)
    write_rows(
        f"{tmp_path}/x.jsonl",
        [
            {
                "prompt": "a",
                "responses": ["b", None, "\ufffd"],
                "ids": [[98, 256], None, [195]],
                "tokenizer": name,
                "scores": [2, 1, 1],
            }
        ],
    )
    said = shown(capsys, f"{tmp_path}/x.jsonl", "--tokenizer=bytes", "--template={prompt}:")
    assert said.splitlines()[1:] == [
        "--- 1 of 3, 0 above it: 4 tokens, 2 asked",
        "a|:|[b][<|endoftext|>]",
        "--- 2 of 3, 1 above it: absent",
        "--- 3 of 3, 1 above it: 3 tokens, 1 asked, no end-of-text",
        "a|:|[<195>]",
    ]


def test_a_whole_text_asks_no_first_token(tmp_path, capsys):
    write_rows(f"{tmp_path}/train.jsonl", [{"text": "one"}, {"text": "two", "group": "g"}])
    write_meta(str(tmp_path), "bytes", "made up")
    said = shown(capsys, tmp_path, "--row=1")
    assert "row 1 of 2, group g\n" in said and "t|[w][o][<|endoftext|>]\n" in said


def test_a_window_is_the_one_that_training_takes(tiny_data, capsys):
    said = shown(capsys, f"{tiny_data}/train.bin", "--row=5", "--block_size=32", "--seed=7")
    batch = stream_batch(
        read_stream(tiny_data, "train"), 32, 2, 7, 2, 257
    )  # windows 4 and 5, two at a time
    first, *rest = [*batch["idx"][1].tolist(), batch["targets"][1, -1].item()]
    assert (
        f"\n{BYTES.decode([first])}|" + "".join(f"[{BYTES.decode([i])}]" for i in rest) + "\n"
        in said
    )


def test_colours_are_a_terminals_and_nothing_else_speaks_to_it(tmp_path, capsys, monkeypatch):
    write_rows(
        f"{tmp_path}/x.jsonl",
        [{"prompt": "a\x1b[31m", "responses": ["b\n\x9bc"], "group": "\x1b]0;g\x07"}],
    )
    args = [f"{tmp_path}/x.jsonl", "--tokenizer=bytes", "--template={prompt}"]
    assert "\x1b" not in shown(capsys, *args)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    said = shown(capsys, *args)
    assert set(re.findall("\x1b[^m]*m", said)) == {
        "\x1b[2m",
        "\x1b[2;37m",
        "\x1b[32m",
        "\x1b[1;32m",
        "\x1b[0m",
    } and not re.search("[\x07\x80-\x9f]", said)
    assert re.sub("\x1b[^m]*m", "", said).endswith("a\\x1b[31mb\n<194><155>c<|endoftext|>\n")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in shown(capsys, *args)


def test_mistakes_are_a_line(tiny_data, tmp_path):
    write_rows(f"{tmp_path}/x.jsonl", [{"text": "one"}])
    for args, message in (
        ([tiny_data, "--row=40"], "has 40 rows"),
        ([tiny_data, "--row=-1"], "at least 0"),
        ([f"{tmp_path}/y.jsonl"], "No such file"),
        ([f"{tmp_path}/x.jsonl"], "names no tokenizer"),
        ([tiny_data, "--template=x"], "contain {prompt} once"),
        ([tiny_data, "--row=x"], "invalid int"),
    ):
        with pytest.raises(SystemExit, match=re.escape(message)):
            data.show.main(args)
