"""Five closed Stack Exchange sites: questions with their answers, ranked by votes.

    python -m data.stackexchange.prepare

From github.com/collapsed-stacks: Answers on Startups, Startups, Economics, How Things Work and
AskAboutGadgets, 13,687 questions (CC BY-SA 3.0: who gives rows on must keep the licence and name
the pages and their authors, which the rows do not). Writes three data folders, split by a hash of
the question's title:

    OUT/ranked     2,528 rows   K = 3 to 6: the six best answers, with 3 or more numbers of votes
    OUT/sft       10,429 rows   K = 1: the best answer, if it has a vote
    OUT/threads   11,260 texts  "Question: ..." and up to four times "Answer: ...", for pretraining

A question of more than 320 tokens (GPT-2's BPE) is left out, and so is an answer of less than 20 or
more than 400.

- A page is a mixture of Markdown and HTML. Both are reduced to plain text: links to "[link]",
  e-mail addresses to "[email]", emphasis and images to nothing.
- Votes tie, and earlier answers gather more of them: the best is the older one in 70 % of the
  questions, and the longer one in 66 %.
"""

import html
import os
import re
import sys
from dataclasses import dataclass

from data import cli, github, tokenizer

PAGES = r"questions/\d+/[^/]+\.md"
SITES = [  # name, commit, checksum of its pages
    ("onstartups", "240fea96a6a543e3e9cf557dcfe08bb74f829622", "43c1e552d55108df39a5e83ae9e9c67d"),
    ("startups", "b98ec0474467306e20f325339e9670e253dbcd41", "324d1483b22f4ce0be4aa3829993f623"),
    ("economics", "9bfa5ddf311182c2424bc756343788410b17849a", "aa1574644d1f4ba8ba62a0237c3649e8"),
    ("htw", "b0c26cdb9d18f5de6e705d3d74cd2927b148ef1c", "0e41dcb958b4b0f82a7e9b201bf89d67"),
    ("gadgets", "3f9fc12a957a0d115bb010e4557c6b8c1e15d540", "bea2cdf273b8797f5fd003dc2f0d1229"),
]
MAX_PROMPT = 320  # tokens
MIN_ANSWER, MAX_ANSWER = 20, 400  # tokens

# in this order
REPLACEMENTS = [
    (r"(?i)<br\s*/?>", "\n"),
    (r"(?i)<li>\s*", "\n- "),
    (r"(?i)</(p|ul|ol|blockquote|pre|h\d)>|<hr\s*/?>", "\n\n"),
    (r"(?i)<img[^>]*>", ""),
    (r"!\[[^\]]*\](\([^)]*\)|\[[^\]]*\])", ""),  # images of Markdown
    (r"</?code>", "`"),
    (r"</?[a-zA-Z][^>]*>", ""),
]
REPLACEMENTS_OF_TEXT = [
    (r"\[([^\]]*)\]\((?! )(?:[^()]|\([^)]*\))*\)", r"\1"),  # [text](address)
    (r"\[([^\]]+)\]\[[^\]]*\]", r"\1"),  # [text][number]
    (r"(?m)^ *\[[^\]]+\]: *\S+.*$", ""),  # [number]: address
    (r"https?://\S+|www\.\S+", "[link]"),
    (r"[\w.+-]+@[\w-]+\.[\w.]+", "[email]"),
    (r"\*\*", ""),
    (r"[ \t]+\n", "\n"),
    (r"(?<=\S)[ \t]{2,}", " "),
    (r"\n{3,}", "\n\n"),
]


@dataclass
class Answer:
    text: str
    votes: int


def plain_text(text: str) -> str:
    """The text of a post without its marks."""
    for pattern, replacement in REPLACEMENTS:
        text = re.sub(pattern, replacement, text)
    text = html.unescape(text).replace("\xa0", " ")
    for pattern, replacement in REPLACEMENTS_OF_TEXT:
        text = re.sub(pattern, replacement, text)
    return text.strip()


def parse_page(page: str, where: str) -> tuple[str, str, list[Answer]]:
    """A page as (title, prompt, answers). The most votes come first; ties stay in their order."""
    page = page.partition("\n---\n\nAll content is licensed")[0].partition("\n## No Answers\n")[0]
    question, *parts = re.split(r"(?m)^## Answer \d+\n", page)
    title = plain_text(question.partition("\n")[0].removeprefix("## "))
    body = parse_post(question, where).text
    answers = [parse_post(part, where) for part in parts]
    answers.sort(key=lambda answer: -answer.votes)
    return title, title if body == title else f"{title}\n\n{body}", answers


def parse_post(text: str, where: str) -> Answer:
    """A question or an answer: below the lines "- posted by", "- tagged" and "- score"."""
    header = re.search(r"(?m)^- posted by: .*\n(?:- tagged: .*\n)?- score: (-?\d+)$", text)
    if header is None:
        raise SystemExit(f'{where}: a post without "- posted by" and "- score"')
    return Answer(plain_text(text[header.end() :]), int(header[1]))


def page_rows(page: str, where: str, enc) -> dict[str, dict]:
    """{data folder: row} of a page; {} if its question or all of its answers are left out."""
    title, prompt, answers = parse_page(page, where)
    group = github.group_name("se", title)
    kept = []
    for answer in answers:
        if MIN_ANSWER <= len(tokenizer.encode(enc, answer.text)) <= MAX_ANSWER:
            kept.append(answer)
    if not kept or len(tokenizer.encode(enc, prompt)) > MAX_PROMPT:
        return {}
    parts = [f"Question: {prompt}"] + [f"Answer: {answer.text}" for answer in kept[:4]]
    rows = {"threads": {"text": "\n\n".join(parts), "group": group}}
    if kept[0].votes > 0:
        rows["sft"] = {"prompt": prompt, "responses": [kept[0].text], "group": group}
    texts = [answer.text for answer in kept[:6]]
    votes = [answer.votes for answer in kept[:6]]
    if len(set(votes)) >= 3:
        rows["ranked"] = {"prompt": prompt, "responses": texts, "scores": votes, "group": group}
    return rows


def main(argv=None):
    parser = cli.ArgumentParser(description=__doc__)
    github.add_options(parser, __file__)
    args = parser.parse_args(argv)
    folders = {"ranked": [], "sft": [], "threads": []}
    for name in folders:
        github.check_folder(os.path.join(args.out, name))
    enc = tokenizer.load("gpt2")
    sources = []
    for site, commit, checksum in SITES:
        repository = github.Repository(f"collapsed-stacks/{site}", commit, PAGES, checksum)
        files, source = github.read_files(repository, args)
        sources.append(source)
        for path, page in files.items():
            for name, row in page_rows(page, f"{site}/{path}", enc).items():
                folders[name].append(row)
    for name, rows in folders.items():
        github.write_split(os.path.join(args.out, name), rows, sources, args.val_share)


if __name__ == "__main__":
    sys.exit(cli.run(main))
