"""Ranked rows: reading, checking, writing and encoding them."""

import bisect
import json
import os
from data import tokenizer as tokenizers
from data.template import prompt_ids
from data.files import printable
from data.folder import prepare_command


def write_rows(path, rows):
    """Ranked rows as JSON lines, whole or absent."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        for row in rows:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(path + ".tmp", path)


def read_rows(path):
    """Ranked rows of a .jsonl file, each checked. Exits with file, line and what is wrong."""
    rows = []
    try:
        f = open(path, encoding="utf-8")
    except OSError as e:
        raise SystemExit(
            f"{path}: {e.strerror}; make it with: {prepare_command(os.path.dirname(path))}"
        )
    with f:
        try:
            for number, line in enumerate(f, 1):
                if line.strip():
                    rows.append(check_row(json.loads(line), f"{path}:{number}"))
        except UnicodeDecodeError as e:
            raise SystemExit(f"{path}: not UTF-8 after line {len(rows)}: {e.reason}")
        except (ValueError, RecursionError) as e:
            raise SystemExit(f"{path}:{number}: not JSON: {e}")
    if not rows:
        raise SystemExit(f"{path}: no rows")
    return rows


def is_unicode(text):
    """Whether UTF-8 can write it; JSON may smuggle in half a surrogate pair."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def check_row(row, where):
    def must(ok, message):
        if not ok:
            raise SystemExit(f"{where}: {message}")

    must(isinstance(row, dict), "a row must be an object with prompt and responses, or a text")
    must(
        row.get("group") is None or isinstance(row["group"], str) and is_unicode(row["group"]),
        "group must be a string",
    )
    if "text" in row and "prompt" not in row and "responses" not in row:
        must(
            isinstance(row["text"], str) and row["text"].strip() and is_unicode(row["text"]),
            "text must be a Unicode string that is not empty",
        )
        return {"prompt": "", "responses": [row["text"]]} | (
            {"group": row["group"]} if "group" in row else {}
        )
    must(
        isinstance(row.get("prompt"), str) and row["prompt"].strip(),
        "prompt must be a string that is not empty",
    )
    responses = row.get("responses")
    must(
        isinstance(responses, list)
        and responses
        and all(isinstance(r, str) or r is None for r in responses),
        "responses must be a list of strings, best first (null: absent)",
    )
    must(responses[0] is not None, "the best response must be there")
    must(
        all(is_unicode(text) for text in [row["prompt"], *responses] if text is not None),
        "text must be Unicode, without lone surrogates",
    )
    scores = row.get("scores")
    must(
        scores is None
        or (
            isinstance(scores, list)
            and len(scores) == len(responses)
            and all(type(s) in (int, float) and abs(s) < 1e30 for s in scores)
        ),
        "scores must be a number for each response",
    )
    must(
        scores is None or all(a >= b for a, b in zip(scores, scores[1:])),
        "scores must fall from best to worst",
    )
    history = row.get("history", [])
    must(
        isinstance(history, list)
        and all(
            isinstance(turn, list)
            and len(turn) == 2
            and all(isinstance(said, str) and said.strip() and is_unicode(said) for said in turn)
            for turn in history
        ),
        "history must be a list of [prompt, response], Unicode strings that are not empty",
    )
    ids = row.get("ids")
    must(
        ids is None
        or isinstance(ids, list)
        and len(ids) == len(responses)
        and all(
            y is None or isinstance(y, list) and set(map(type, y)) == {int} and min(y) >= 0
            for y in ids
        ),
        "ids must be a list of token ids, or null, for each response",
    )
    return row


def prompt_key(row):
    """What of a row a response answers, to look it up by."""
    return tuple(map(tuple, row.get("history", []))) + (row["prompt"],)


def prompt_fields(row):
    """The part of a row that asks: prompt, history and group, where it has them."""
    return {name: row[name] for name in ("prompt", "history", "group") if name in row}


def encode_rows(rows, enc, template, block_size, max_prompt=0, max_response=0):
    """Rows to ids under one template and one set of limits, the same for every player.

    A row becomes {"prompt": ids, "responses": [ids or None], "ranks": [int], "group": its group?}; a response is
    encode(text) + [eot], cut at its end (then it has no eot), a prompt is cut at its start. Responses that come with "ids"
    were sampled: taken as they are, unless another "tokenizer" made them; a whole text has no prompt and no template. Returns the rows, None for those whose prompt
    leaves no room, and counts of what was cut and dropped.
    """
    max_prompt, max_response = max_prompt or block_size, max_response or block_size
    counts = {"rows": len(rows), "prompts cut": 0, "responses cut": 0, "dropped": 0}
    encoded, mine = [], tokenizers.fingerprint(enc)
    for row in rows:
        prompt = (
            prompt_ids(enc, template, row["prompt"], row.get("history", ()))
            if row["prompt"]
            else []
        )
        room = min(max_response, block_size - min(max_prompt, len(prompt)))
        if room < 1:
            counts["dropped"] += 1
            encoded.append(None)
            continue
        counts["prompts cut"] += len(prompt) > max_prompt
        prompt = prompt[-max_prompt:]
        responses = []
        for text, ids in zip(
            row["responses"],
            (row.get("tokenizer") or mine) == mine
            and row.get("ids")
            or [None] * len(row["responses"]),
        ):
            if ids is not None and max(ids) >= enc.n_vocab:
                raise SystemExit(
                    f"the row with the prompt {row['prompt'][:60]!r} has the id {max(ids)}, outside the vocabulary of {enc.n_vocab}"
                )
            if ids is None and text is not None:
                ids = tokenizers.encode(enc, text, "within" if prompt else "start") + [
                    enc.eot_token
                ]
                counts["responses cut"] += len(ids) > room
            responses.append(None if ids is None else ids[:room])
        if not prompt and max(len(y or []) for y in responses) < 2:  # a first token is not asked
            counts["dropped"] += 1
            encoded.append(None)
            continue
        scores = row.get("scores") or range(len(responses), 0, -1)
        ranks = [sum(better > s for better in scores) for s in scores]
        encoded.append(
            {"prompt": prompt, "responses": responses, "ranks": ranks}
            | ({"group": row["group"]} if "group" in row else {})
        )
    return encoded, counts


def longest_shared_prefix(texts, others):
    """For each of some texts (lists of ids) how many of its first tokens begin one of the others too."""
    ordered, shared = sorted(others), []
    for ids in texts:
        i = bisect.bisect(ordered, ids)  # of all others a neighbour in their order shares most
        shared.append(
            max(len(os.path.commonprefix([ids, other])) for other in ordered[max(0, i - 1) : i + 1])
        )
    return shared
