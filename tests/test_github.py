"""Data sets from GitHub, each on a small archive of the same files: the texts are made up."""

import functools
import http.server
import importlib
import io
import json
import os
import tarfile
import threading

import pytest

from data import github, tokenizer
from data.folder import read_meta
from data.gsm8k.prepare import MODELS
from data.rows import read_rows
from data.stackexchange.prepare import SITES, parse_page, plain_text
from data.tldr_pages.prepare import code_text, page_rows, plain_command

SOLUTIONS = "grade_school_math/data/example_model_solutions.jsonl"


def write_archive(path, files, prefix="name-0123456/"):
    """A .tar.gz as GitHub makes it: below one folder."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))


def prepare(name, tmp_path, *args):
    """Run data/NAME/prepare.py on the archives in tmp_path/source, to tmp_path/out."""
    module = importlib.import_module(f"data.{name}.prepare")
    module.main([f"--source={tmp_path}/source", f"--out={tmp_path}/out", *args])


def all_rows(folder):
    read_meta(str(folder), ["train.jsonl", "val.jsonl"])
    train, val = read_rows(f"{folder}/train.jsonl"), read_rows(f"{folder}/val.jsonl")
    assert not {row["group"] for row in train} & {row["group"] for row in val}
    return {row["prompt"]: row for row in train + val}


# ---- GSM8K


def problem(i, right):
    """A line of example_model_solutions.jsonl. right: the models that are."""
    value = {
        "question": f"Ann has {i} pens. Bob gives her 2. How many?",
        "ground_truth": f"{i} + 2 = <<{i}+2={i + 2}>>{i + 2}\nA: {i + 2}",
    }
    for model in reversed(MODELS):
        solution = f"{model} says <<{i}+2={i + 2}>>{i + 2}.\nJob A: 1\nA: {i + 2}"
        value[model] = {"is_correct": model in right, "solution": solution}
    return value


def test_gsm8k_solutions(tmp_path):
    """All models: the right ones, which tie, above the wrong ones. `A:` begins the last line."""
    problems = [problem(i, ["175b_finetuning", "6b_finetuning"]) for i in range(40)]
    lines = "".join(json.dumps(value) + "\n" for value in problems)
    write_archive(f"{tmp_path}/source/grade-school-math.tar.gz", {SOLUTIONS: lines})
    prepare("gsm8k", tmp_path, "--solutions=all")
    rows = all_rows(tmp_path / "out")
    assert len(rows) == 40
    row = rows["Ann has 7 pens. Bob gives her 2. How many?"]
    assert row["group"] == "gsm:ann has 7 pens bob gives her 2 how many"
    assert row["scores"] == [2, 1, 1, 0, 0]
    assert row["responses"][0] == "7 + 2 = 9\n#### 9"
    assert row["responses"][1] == "175b_finetuning says 9.\nJob A: 1\n#### 9"
    names = [text.split()[0] for text in row["responses"][1:]]
    assert names == ["175b_finetuning", "6b_finetuning", "175b_verification", "6b_verification"]


def test_gsm8k_solutions_of_named_models(tmp_path):
    lines = "".join(json.dumps(problem(i, [])) + "\n" for i in range(40))
    write_archive(f"{tmp_path}/source/grade-school-math.tar.gz", {SOLUTIONS: lines})
    prepare("gsm8k", tmp_path, "--solutions=6b_finetuning,175b_verification")
    for row in all_rows(tmp_path / "out").values():
        assert "scores" not in row and len(row["responses"]) == 3
        assert row["responses"][1].startswith("6b_finetuning")
    with pytest.raises(SystemExit, match="--solutions is all, or some of 175b_verification"):
        prepare("gsm8k", tmp_path, "--solutions=7b")
    write_archive(f"{tmp_path}/source/grade-school-math.tar.gz", {SOLUTIONS: '{"question": "?"}'})
    with pytest.raises(SystemExit, match="no problem with solutions.*ground_truth"):
        prepare("gsm8k", tmp_path, "--solutions=all")


# ---- tldr-pages

PAGE = """# pack-it

> Put files into an archive.
> See also: `unpack`.
> It can be compressed.
> Note: it is old.
> More information: <https://example.com>.

- [c]reate an archive of a directory:

`pack-it {{[-c|--create]}} {{path/to/a.pack}} {{directory}}`

- List [i]ts files:

`pack-it -i {{path/to/a.pack}}`
"""


def test_tldr_page():
    rows = page_rows("pages/osx/pack-it.md", PAGE, 0)
    prompt = "Write a shell command that uses `pack-it` on macOS for this task: "
    assert [(row["prompt"], row["responses"][0]) for row in rows] == [
        (
            "What does the command `pack-it` do on macOS?",
            "Put files into an archive. It can be compressed.",
        ),
        (
            prompt + "create an archive of a directory.",
            "pack-it --create path/to/a.pack directory",
        ),
        (prompt + "List its files.", "pack-it -i path/to/a.pack"),
    ]
    assert {row["group"] for row in rows} == {"tldr:pack it"}
    one = page_rows("pages/common/pack-it.md", PAGE, 1)
    assert len(one) == 2 and "on macOS" not in one[0]["prompt"]


def test_tldr_command():
    assert plain_command("a {{[-x|--long]}} {{b|c}} {{<Ctrl c>}}") == "a --long b|c <Ctrl c>"
    command = "tuc {{[-e|--regex]}} '{{[, ]+}}' {{[-f|--fields]}} {{1,3}}"
    assert plain_command(command) == "tuc --regex '[, ]+' --fields 1,3"
    assert code_text("`ls -l `") == "ls -l "
    assert code_text("`` echo `date` ``") == "echo `date`"
    command = r"docker ps --format '\{\{.ID\}\} {{text}}'"
    assert plain_command(command) == "docker ps --format '{{.ID}} text'"


def test_tldr_pages(tmp_path):
    files = {}
    for i in range(30):
        files[f"pages/linux/c{i}.md"] = PAGE.replace("pack-it", f"c{i}")
        files[f"pages.de/linux/c{i}.md"] = "not English"
    write_archive(f"{tmp_path}/source/tldr.tar.gz", files)
    prepare("tldr_pages", tmp_path)
    assert len(all_rows(tmp_path / "out")) == 60
    meta = read_meta(str(tmp_path / "out"), [])
    assert meta["source"] == "tldr-pages/tldr"  # without the commit: other files


# ---- Stack Exchange

QUESTION = """## How do {0} work?

- posted by: [Ann](https://example.com/users/1/ann) on 2011-04-18
- tagged: `a`, `b`
- score: 8

I **know** [a page](https://example.com/a_(b)) &amp; <em>more</em>. See https://example.com/x.


"""
ANSWER = """## Answer {0}

- posted by: [Bob](https://example.com/users/2/bob) on 2011-04-19
- score: {1}

{2}

"""
END = "\n---\n\nAll content is licensed under the [CC BY-SA 3.0 license](https://example.com/).\n"
WORDS = "This answer has about as many words as it takes to be longer than twenty tokens, and: "


def stack_page(topic, votes, text=WORDS):
    answers = [ANSWER.format(i, score, f"{text}{i}") for i, score in enumerate(votes)]
    return QUESTION.format(topic) + "".join(answers) + END


def test_stackexchange_page():
    title, prompt, answers = parse_page(stack_page("cats", [1, 5, 1]), "x")
    assert title == "How do cats work?"
    assert prompt == "How do cats work?\n\nI know a page & more. See [link]"
    assert [answer.votes for answer in answers] == [5, 1, 1]
    assert [answer.text[-1] for answer in answers] == ["1", "0", "2"]  # ties in their order
    _, _, answers = parse_page(QUESTION.format("dogs") + "## No Answers\n" + END, "x")
    assert answers == []
    with pytest.raises(SystemExit, match="x: a post without"):
        parse_page("## Title\n\ntext", "x")


@pytest.mark.parametrize(
    "text, plain",
    [
        ("<p>One<br/>two</p>\n\n<ul>\n<li>a</li>\n<li>b</li>\n</ul>", "One\ntwo\n\n- a\n\n- b"),
        ("Write to ann.b@example.com,  or\xa0call.", "Write to [email], or call."),
        ("![a](b.png)See [this][1].\n\n  [1]: https://example.com", "See this."),
        ("<pre><code>x = 1\n</code></pre>", "`x = 1\n`"),
        ("a < b and `c`", "a < b and `c`"),
    ],
)
def test_plain_text(text, plain):
    assert plain_text(text) == plain


def test_stackexchange(tmp_path, monkeypatch):
    """Short and long answers do not count, six are kept, three different votes make a ranking.
    A token is a byte here: GPT-2's vocabulary would have to be downloaded."""
    load = tokenizer.load
    monkeypatch.setattr(tokenizer, "load", lambda name: load("bytes"))
    votes = {"cats": [3, 2, 1], "dogs": [1, 1], "cows": [0], "ants": [9, 8, 7, 6, 5, 4, 3]}
    for site, _, _ in SITES:
        files = {}
        for i in range(30):
            for topic, its_votes in votes.items():
                name = f"{topic} {i} at {site}"
                files[f"questions/{len(files)}/{topic}.md"] = stack_page(name, its_votes)
        files["questions/9999/a.md"] = stack_page("no short answers", [3, 2, 1], "No.")
        files["questions/9998/a.md"] = stack_page("long questions " * 200, [3, 2, 1])
        files["questions/README.md"] = "an index"
        write_archive(f"{tmp_path}/source/{site}.tar.gz", files)
    prepare("stackexchange", tmp_path)
    ranked, sft = (all_rows(tmp_path / "out" / name) for name in ("ranked", "sft"))
    texts = read_rows(f"{tmp_path}/out/threads/train.jsonl")
    texts += read_rows(f"{tmp_path}/out/threads/val.jsonl")
    assert (len(ranked), len(sft), len(texts)) == (300, 450, 600)
    prompts = [prompt for prompt in ranked if "ants 3 at htw" in prompt]
    assert ranked[prompts[0]]["scores"] == [9, 8, 7, 6, 5, 4]
    assert sft[prompts[0]]["responses"] == [ranked[prompts[0]]["responses"][0]]
    text = next(row["responses"][0] for row in texts if "dogs 3 at htw" in row["responses"][0])
    answers = [f"Answer: {WORDS}{i}" for i in range(2)]
    assert text == "\n\n".join(["Question: " + prompts[0].replace("ants", "dogs"), *answers])


# ---- the archives

REPOSITORY = github.Repository(
    "ann/pens", "0" * 40, r"a/\d\.txt", github.checksum({"a/1.txt": "one", "a/2.txt": "two"})
)
FILES = {"a/2.txt": "two", "a/1.txt": "one", "a/x.txt": "left out"}


class Args:
    def __init__(self, folder):
        self.source = str(folder)


def test_a_clone_and_an_archive_are_read_alike(tmp_path, capsys):
    write_archive(f"{tmp_path}/archives/pens.tar.gz", FILES)
    for name, text in FILES.items():
        path = tmp_path / "clones" / "pens" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    os.symlink("1.txt", tmp_path / "clones" / "pens" / "a" / "3.txt")
    for folder in ("archives", "clones"):
        files, source = github.read_files(REPOSITORY, Args(tmp_path / folder))
        assert list(files.items()) == [("a/1.txt", "one"), ("a/2.txt", "two")]
        assert source == f"ann/pens @ {'0' * 40}"
    assert capsys.readouterr().out == ""

    write_archive(f"{tmp_path}/others/pens.tar.gz", {"a/1.txt": "uno"})
    files, source = github.read_files(REPOSITORY, Args(tmp_path / "others"))
    assert (files, source) == ({"a/1.txt": "uno"}, "ann/pens")
    assert "not the files of ann/pens @ 000" in capsys.readouterr().out


def test_what_is_wrong_with_an_archive(tmp_path):
    path = tmp_path / "pens.tar.gz"
    for content, message in ((b"no archive", "is damaged"), (b"\x1f\x8b\x08\x00", "is damaged")):
        path.write_bytes(content)
        with pytest.raises(SystemExit, match=message):
            github.read_files(REPOSITORY, Args(tmp_path))
    write_archive(str(path), {"b.txt": "other"})
    with pytest.raises(SystemExit, match="none of its files is named"):
        github.read_files(REPOSITORY, Args(tmp_path))
    write_archive(str(path), FILES)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(SystemExit, match="is damaged"):
        github.read_files(REPOSITORY, Args(tmp_path))


def test_download(tmp_path, monkeypatch):
    """The archive of the commit is fetched once; a failure leaves nothing and is one line."""
    commit = "0" * 40
    write_archive(f"{tmp_path}/served/ann/pens/tar.gz/{commit}", FILES)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "served")
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *args: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(github, "ARCHIVES", f"http://127.0.0.1:{server.server_port}")
    try:
        _, source = github.read_files(REPOSITORY, Args(tmp_path / "source"))
        assert source == f"ann/pens @ {commit}"
        missing = github.Repository("ann/none", commit, ".*", "")
        with pytest.raises(SystemExit, match="404.*holds none.tar.gz or a clone none/"):
            github.read_files(missing, Args(tmp_path / "source"))
        assert os.listdir(tmp_path / "source") == ["pens.tar.gz"]
        monkeypatch.setattr(github, "MAX_ARCHIVE", 10)
        with pytest.raises(SystemExit, match="more than 10 bytes"):
            github.read_files(REPOSITORY, Args(tmp_path / "again"))
        assert os.listdir(tmp_path / "again") == []
    finally:
        server.shutdown()
        server.server_close()
    _, source = github.read_files(REPOSITORY, Args(tmp_path / "source"))  # not fetched again
    assert source == f"ann/pens @ {commit}"
