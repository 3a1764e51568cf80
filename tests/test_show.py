"""tools/show.py prints what training reads, and nothing that drives the terminal."""

import re

import pytest

from data import tokenizer
from data.batch import batch_rows, stream_batch
from data.folder import read_stream, write_meta
from data.rows import encode_rows, read_rows, write_rows
from data.template import TEMPLATE
from tools import show

BYTES = tokenizer.load("bytes")


def output(capsys, *args):
    show.main([str(arg) for arg in args])
    return capsys.readouterr().out


def marked(prompt, response):
    """ASCII text in bytes: a prompt's tokens end in |, a response's are in brackets."""
    return "".join(f"{c}|" for c in prompt) + "".join(f"[{c}]" for c in response)


def test_a_ranked_row(tiny_data, capsys):
    row = read_rows(f"{tiny_data}/train.jsonl")[3]
    text = output(capsys, tiny_data, "--row=3", "--block_size=2000")
    for response in row["responses"]:
        prompt = TEMPLATE.replace("{prompt}", row["prompt"])
        assert marked(prompt, response) + "[<|endoftext|>]\n" in text
    # as many targets as in the packed layout
    encoded, _ = encode_rows([row], BYTES, TEMPLATE, 2000)
    num_targets = len(batch_rows(encoded).targets)
    assert sum(map(int, re.findall(r"(\d+) with a loss", text))) == num_targets
    assert text.count("]") == num_targets


def test_template_and_limits_of_a_checkpoint(tiny_data, tiny_runs, capsys):
    """Fine-tuning takes the best response only."""
    row = read_rows(f"{tiny_data}/train.jsonl")[3]
    options = ["--row=3", f"--checkpoint={tiny_runs['sft']}", "--max_response=6"]
    text = output(capsys, tiny_data, *options)
    cut = marked("Q: " + row["prompt"] + "\nA: ", row["responses"][0][:6])
    assert "\n" + cut + "\n" in text
    assert text.count("---") == 1
    assert "1 responses cut" in text
    assert "no end-of-text" in text


def test_absent_responses_and_sampled_ids(tmp_path, capsys):
    row = {
        "prompt": "a",
        "responses": ["b", None, "\ufffd"],
        "ids": [[98, 256], None, [195]],
        "tokenizer": tokenizer.fingerprint(BYTES),
        "scores": [2, 1, 1],
    }
    write_rows(f"{tmp_path}/x.jsonl", [row])
    text = output(capsys, f"{tmp_path}/x.jsonl", "--tokenizer=bytes", "--template={prompt}:")
    assert text.splitlines()[1:] == [
        "--- response 1 of 3, rank 0: 4 tokens, 2 with a loss",
        "a|:|[b][<|endoftext|>]",
        "--- response 2 of 3, rank 1: absent",
        "--- response 3 of 3, rank 1: 3 tokens, 1 with a loss, no end-of-text",
        "a|:|[<195>]",
    ]


def test_a_row_that_training_drops(tmp_path, capsys):
    write_rows(f"{tmp_path}/x.jsonl", [{"prompt": "abc", "responses": ["d"]}])
    options = ["--tokenizer=bytes", "--template={prompt}", "--block_size=3"]
    text = output(capsys, f"{tmp_path}/x.jsonl", *options)
    assert text.endswith("training drops it: block_size 3 leaves no room\n")


def test_a_ranked_stage_shows_what_it_trains_on(tmp_path, capsys, monkeypatch):
    """Not rows in which nothing is ranked, and of training rows the best and the worst sample if
    the run asks for that."""
    read_settings = show.read_settings

    def of_spin(args):
        settings, enc = read_settings(args)
        return settings | {"stage": "spin", "best_and_worst": True}, enc

    monkeypatch.setattr(show, "read_settings", of_spin)
    rows = [
        {"prompt": "p", "responses": ["a", "b", "c"]},
        {"prompt": "p", "responses": ["a", "a", "a"]},
        {"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 1, 1]},
    ]
    options = ["--tokenizer=bytes", "--template={prompt}"]
    for name, shown in (("train", ["a", "c"]), ("val", ["a", "b", "c"])):
        write_rows(f"{tmp_path}/{name}.jsonl", rows)
        text = output(capsys, f"{tmp_path}/{name}.jsonl", *options)
        assert re.findall(r"p\|\[(.)\]", text) == shown
        for row in (1, 2):
            text = output(capsys, f"{tmp_path}/{name}.jsonl", *options, f"--row={row}")
            assert text.endswith("training drops it: nothing in it is ranked\n")
    write_rows(f"{tmp_path}/train.jsonl", [{"prompt": "p", "responses": ["a"]}])
    text = output(capsys, f"{tmp_path}/train.jsonl", *options)
    assert "\na round adds samples to it\n" in text and "p|[a]" in text


def test_the_first_token_of_a_whole_text_has_no_loss(tmp_path, capsys):
    write_rows(f"{tmp_path}/train.jsonl", [{"text": "one"}, {"text": "two", "group": "g"}])
    write_meta(str(tmp_path), "bytes", "made up")
    text = output(capsys, tmp_path, "--row=1")
    assert "row 1 of 2, group g\n" in text
    assert "t|[w][o][<|endoftext|>]\n" in text


def test_a_window_is_the_one_that_training_reads(tiny_data, capsys):
    text = output(capsys, f"{tiny_data}/train.bin", "--row=5", "--block_size=32", "--seed=7")
    # windows 4 and 5, two in a batch
    batch = stream_batch(read_stream(tiny_data, "train"), 32, 2, 7, 2, 257)
    first, *rest = [*batch.idx[1].tolist(), batch.targets[1, -1].item()]
    expected = f"{BYTES.decode([first])}|"
    for i in rest:
        expected += f"[{BYTES.decode([i])}]"
    assert f"\n{expected}\n" in text


def test_only_our_own_colours_reach_the_terminal(tmp_path, capsys, monkeypatch):
    row = {"prompt": "a\x1b[31m", "responses": ["b\n\x9bc"], "group": "\x1b]0;g\x07"}
    write_rows(f"{tmp_path}/x.jsonl", [row])
    args = [f"{tmp_path}/x.jsonl", "--tokenizer=bytes", "--template={prompt}"]
    assert "\x1b" not in output(capsys, *args)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    text = output(capsys, *args)
    colours = set(re.findall("\x1b[^m]*m", text))
    assert colours == {"\x1b[2m", "\x1b[2;37m", "\x1b[32m", "\x1b[1;32m", "\x1b[0m"}
    assert not re.search("[\x07\x80-\x9f]", text)
    plain = re.sub("\x1b[^m]*m", "", text)
    assert plain.endswith("a\\x1b[31mb\n<194><155>c<|endoftext|>\n")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in output(capsys, *args)


def test_mistakes_are_one_line(tiny_data, tmp_path):
    write_rows(f"{tmp_path}/x.jsonl", [{"text": "one"}])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    for args, message in (
        ([tiny_data, "--row=40"], "has 40 rows"),
        ([tiny_data, "--row=-1"], "at least 0"),
        ([tiny_data, "--block_size=0"], "at least 1"),
        ([f"{tmp_path}/y.jsonl"], "No such file"),
        ([f"{tmp_path}/run"], "is a run; give a file of a round"),
        ([f"{tmp_path}/x.jsonl"], "names no tokenizer"),
        ([tiny_data, "--template=x"], "contain {prompt} once"),
        ([tiny_data, "--row=x"], "must be a number"),
        ([f"{tiny_data}/train.bin", "--tokenizer=gpt2x.json"], "gpt2x.json"),
    ):
        with pytest.raises(SystemExit, match=re.escape(message)) as e:
            show.main(args)
        assert "\n" not in str(e.value)
