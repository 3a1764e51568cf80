"""Any local .jsonl or .jsonl.gz files: rows for fine-tuning and preferences, texts for pretraining.

    python -m data.jsonl.prepare sft.jsonl.gz --out=data/local_sft
    python -m data.jsonl.prepare pretrain.jsonl.gz --out=data/local_pretrain --tokenizer=gpt2
    python -m data.jsonl.prepare ranked.jsonl.gz --out=data/gsm8k --where=source=gsm8k --authors=human,175b_verification

A line is {"text"}, {"prompt", "response"}, or {"prompt", "responses"}: strings, best first, or objects with "text" and
"rank" (1 is best) or "score" (high is best); equal ones tie. "group" (else "url", else the prompt or text itself) keeps
rows of one origin on one side of the split. --authors picks one response of each named "author", in that order.
"""

import argparse
import gzip
import json
import os

from tqdm import tqdm

from data.rows import check_row, is_unicode, write_rows
from data.folder import split_of, write_meta, write_stream
from data import tokenizer


def read(path):
    """(place, object) of each line. Exits with file, line and what is wrong."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    try:
                        value = json.loads(line)
                    except ValueError as e:
                        raise SystemExit(f"{path}:{number}: not JSON: {e}")
                    if not isinstance(value, dict):
                        raise SystemExit(f"{path}:{number}: not an object")
                    yield f"{path}:{number}", value
    except UnicodeDecodeError as e:
        raise SystemExit(f"{path}: not UTF-8: {e.reason}")
    except (OSError, EOFError) as e:
        raise SystemExit(f"{path}: {getattr(e, 'strerror', None) or e}")


def ranked(value, where, authors=None):
    """A line's prompt and responses -> a ranked row, or None where an asked-for author did not answer."""
    responses = value["responses"] if "responses" in value else [value.get("response")]
    row = {"prompt": value.get("prompt"), "responses": responses}
    if isinstance(responses, list) and responses and all(isinstance(r, dict) for r in responses):
        if authors:
            by_author = {r.get("author"): r for r in reversed(responses)}
            if not all(a in by_author for a in authors):
                return None
            responses = [by_author[a] for a in authors]
            row["responses"] = [r.get("text") for r in responses]
        else:
            key = "rank" if all("rank" in r for r in responses) else "score"
            if any(type(r.get(key)) not in (int, float) for r in responses):
                raise SystemExit(
                    f"{where}: every response object needs a text and a number as rank or score"
                )
            goodness = [-r["rank"] if key == "rank" else r["score"] for r in responses]
            order = sorted(range(len(responses)), key=lambda i: -goodness[i])
            row["responses"] = [responses[i].get("text") for i in order]
            row["scores"] = [goodness[i] for i in order]
    elif authors:
        raise SystemExit(f"{where}: --authors needs responses that are objects with an author")
    if not isinstance(row["responses"], list) or any(
        not isinstance(r, str) for r in row["responses"] or [None]
    ):
        raise SystemExit(f"{where}: a response must be a string, or an object with a text")
    return check_row(row, where)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", help=".jsonl or .jsonl.gz")
    parser.add_argument("--out", required=True, help="the data folder to write")
    parser.add_argument("--where", help="KEY=PREFIX: only lines whose KEY begins so")
    parser.add_argument(
        "--authors",
        help="comma-separated, best first: a response of each, and no row that lacks one",
    )
    parser.add_argument(
        "--tokenizer",
        help="of a stream: gpt2 (default), bytes, a file (another model's tokenizer.json, a .tiktoken), or bpe, trained on it",
    )
    parser.add_argument("--vocab_size", type=int, default=4096, help="of bpe")
    parser.add_argument(
        "--val_share", type=float, default=0.1, help="of the groups, for validation"
    )
    args = parser.parse_args(argv)
    key, _, prefix = (args.where or "=").partition("=")
    rows, texts, dropped = {"train": [], "val": []}, {"train": [], "val": []}, 0
    for path in args.files:
        for where, value in tqdm(read(path), desc=os.path.basename(path), disable=None):
            if key and not str(value.get(key, "")).startswith(prefix):
                continue
            group = str(
                value.get("group") or value.get("url") or value.get("prompt") or value.get("text")
            )
            if "text" in value:
                if (
                    not isinstance(value["text"], str)
                    or not value["text"].strip()
                    or not is_unicode(value["text"])
                ):
                    raise SystemExit(f"{where}: text must be a Unicode string that is not empty")
                texts[split_of(group, args.val_share)].append(value["text"])
            else:
                row = ranked(value, where, args.authors and args.authors.split(","))
                dropped += row is None
                if row is not None:
                    rows[split_of(group, args.val_share)].append(row | {"group": group})
    if not any(rows.values()) and not any(texts.values()):
        raise SystemExit(
            f"{', '.join(args.files)}: no line is left ({dropped} without the asked-for authors)"
        )
    for kind in (rows, texts):
        if any(kind.values()) and not all(kind.values()):
            raise SystemExit(
                f"{', '.join(args.files)}: too few groups: one side of the split is empty; set --val_share"
            )
    os.makedirs(args.out, exist_ok=True)
    sizes, name = {}, args.tokenizer
    if any(texts.values()):
        if name == "bpe":
            name = os.path.join(args.out, "tokenizer.tiktoken")
            tokenizer.save(tokenizer.train(texts["train"], args.vocab_size), name)
        enc, name = tokenizer.adopt(name or "gpt2", args.out)
        for split, some in texts.items():
            sizes[f"{split}_tokens"] = write_stream(
                os.path.join(args.out, f"{split}.bin"),
                tqdm(some, desc=f"{split}.bin", disable=None),
                enc,
            )
    if any(rows.values()):
        for split, some in rows.items():
            sizes[f"{split}_rows"] = len(some)
            write_rows(os.path.join(args.out, f"{split}.jsonl"), some)
    write_meta(args.out, name, [os.path.basename(f) for f in args.files], **sizes)
    print(
        f"{args.out}: "
        + ", ".join(f"{n:,} {what}" for what, n in sizes.items())
        + (f"; {dropped} rows lack an author" if dropped else "")
    )


if __name__ == "__main__":
    main()
