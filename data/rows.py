"""Ranked rows: read, check, write and encode them. data/__init__.py describes a row."""

import bisect
import json
import operator
import os

from data import tokenizer
from data.files import atomic_write, parse_json
from data.folder import prepare_command, write_meta
from data.template import (
    cut_prompt_ids,
    puts_space_before_response,
    response_form,
    split_template,
    written_ids,
    written_text,
)

# fields that a whole text, {"text": ...}, cannot have
TEXT_EXCLUDES = ("prompt", "response", "responses", "system", "history", "scores", "ids")


def read_rows(path: str, prompt_only: bool = False) -> list[dict]:
    """Read and check the rows of a .jsonl file. Exits with the file, the line and what is wrong.

    prompt_only: rows may be prompts without responses.
    """
    rows = []
    number = 0
    try:
        # not as text, which is read ahead: a line that is not UTF-8 would have no number
        f = open(path, "rb")
    except OSError as e:
        folder = os.path.dirname(path)
        if os.path.isfile(folder):
            raise SystemExit(
                f"{folder} is a file, and data is a folder; make one with:"
                f" python -m data.jsonl.prepare {folder} --out=FOLDER"
            )
        raise SystemExit(f"{path}: {e.strerror}; make it with: {prepare_command(folder)}")
    with f:
        try:
            for number, content in enumerate(f, 1):
                line = content.decode()
                if line.strip():
                    rows.append(check_row(parse_json(line), f"{path}:{number}", prompt_only))
        except UnicodeDecodeError as e:
            raise SystemExit(f"{path}:{number}: not UTF-8: {e.reason}")
        except (ValueError, RecursionError) as e:
            raise SystemExit(f"{path}:{number}: not JSON: {e}")
    if not rows:
        raise SystemExit(f"{path}: no rows")
    return rows


def write_rows(path: str, rows):
    """Write rows as JSON lines."""
    with atomic_write(path) as f:
        for row in rows:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_ranked_folder(folder: str, tokenizer_name: str, source: str, train: list, val: list):
    """Write ranked rows to a data folder that the caller has locked, meta.json last, and say how
    many there are."""
    write_rows(os.path.join(folder, "train.jsonl"), train)
    write_rows(os.path.join(folder, "val.jsonl"), val)
    sizes = {"train_rows": len(train), "val_rows": len(val)}
    write_meta(folder, tokenizer_name, source, **sizes)
    print(f"{folder}: {len(train):,} train rows, {len(val):,} val rows")


def best_only(row: dict) -> dict:
    """A copy of a row with its best response alone."""
    return row | {"responses": row["responses"][:1], "scores": None}


# ---- checking


def check_row(row, where: str, prompt_only: bool = False) -> dict:
    """Return a row that is well formed, a whole text as a row with an empty prompt.

    prompt_only: a row without responses is well formed too. Exits with `where` (such as
    train.jsonl:3) and what is wrong. data/hub also counts rows by these messages, in meta.json.
    """

    def must(ok, message):
        if not ok:
            raise SystemExit(f"{where}: {message}")

    must(isinstance(row, dict), "a row must be an object with prompt and responses, or a text")
    group = row.get("group")
    must(
        group is None or isinstance(group, str) and is_unicode(group),
        "group must be a string",
    )
    if "text" in row:
        return check_whole_text(row, must)

    needed = ["prompt"] if prompt_only else ["prompt", "responses"]
    missing = [name for name in needed if name not in row]
    if missing:
        must(False, f"a row needs prompt and responses, or text; {missing_fields(row, missing)}")
    prompt = row["prompt"]
    must(
        not isinstance(prompt, list),
        "prompt is a list of messages; python -m data.jsonl.prepare makes a row of it",
    )
    must(
        isinstance(prompt, str) and prompt.strip(),
        "prompt must be a string that is not empty",
    )
    must(is_unicode(prompt), "text must be Unicode, without lone surrogates")
    must(
        not row.get("system") or is_text(row["system"]),
        "system must be a Unicode string with more than white space",
    )
    history = row.get("history", [])
    must(
        isinstance(history, list) and all(map(is_turn, history)),
        "history must be a list of [prompt, response], Unicode strings that are not empty",
    )
    if "responses" in row:
        check_responses(row, must)
    return row


def check_whole_text(row: dict, must) -> dict:
    """A row with a text as a row with an empty prompt and one response."""
    others = [name for name in TEXT_EXCLUDES if row.get(name) is not None]
    must(not others, f"a row with text is a whole text; drop text, or drop {', '.join(others)}")
    must(is_text(row["text"]), "text must be a Unicode string that is not empty")
    whole_text = {"prompt": "", "responses": [row["text"]]}
    for name in ("group", "ended"):
        if name in row:
            whole_text[name] = row[name]
    must(is_ended(row.get("ended"), 1), "ended must be true, false or null")
    return whole_text


def check_responses(row: dict, must):
    """Check the responses of a row, and what is given for each of them."""
    responses = row["responses"]
    must(
        isinstance(responses, list) and responses and all(map(is_response, responses)),
        "responses must be a list of strings, best first (null: absent)",
    )
    must(responses[0] is not None, "the best response must be there")
    for text in responses:
        must(text is None or is_unicode(text), "text must be Unicode, without lone surrogates")
    ranks = row.get("ranks")
    if ranks is not None:
        must(
            is_list_of(ranks, len(responses)) and all(map(is_id, ranks)) and ranks == sorted(ranks),
            "ranks must be an integer for each response, 0 for the best, and must not fall",
        )
    scores = row.get("scores")
    if scores is not None:
        rule = "scores must be a number for each response"
        must(is_list_of(scores, len(responses)), rule)
        numbers = scores
        if ranks is not None:  # a round's: an absent response has no score
            numbers = [s for s, text in zip(scores, responses) if (s, text) != (None, None)]
        must(all(map(is_score, numbers)), rule)
        must(
            ranks is not None or all(map(operator.ge, numbers, numbers[1:])),
            "scores must fall from best to worst",
        )
    ids = row.get("ids")
    must(
        ids is None or is_list_of(ids, len(responses)) and all(map(is_ids_or_none, ids)),
        "ids must be a list of token ids, or null, for each response",
    )
    for text, its_ids in zip(responses, ids or []):
        must(text is not None or its_ids is None, "a response with ids must have its text too")
    must(
        row.get("tokenizer") is None or isinstance(row["tokenizer"], str),
        "tokenizer must be the checksum of the tokenizer of the ids",
    )
    must(
        is_ended(row.get("ended"), len(responses)),
        "ended must be true, false or null: a list of them if there are several responses",
    )


def missing_fields(row: dict, missing: list[str]) -> str:
    """Which fields of a row are missing and which are there, for a message."""
    there = [str(name)[:40] for name in list(row)[:12]] + ["..."] * (len(row) > 12)
    return f"it has no {', '.join(missing)}; it has {', '.join(there) or 'nothing'}"


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can encode it; JSON can hold half a surrogate pair, which UTF-8 cannot."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def is_text(value) -> bool:
    """Whether it is a Unicode string with more than white space."""
    return isinstance(value, str) and value.strip() != "" and is_unicode(value)


def is_response(value) -> bool:
    return value is None or isinstance(value, str)


def is_score(value) -> bool:
    """Whether it is a finite number."""
    return type(value) in (int, float) and abs(value) < 1e30


def is_turn(value) -> bool:
    """Whether it is [prompt, response]."""
    return is_list_of(value, 2) and all(map(is_text, value))


def is_ids_or_none(value) -> bool:
    """Whether it is None or a list of one or more token ids."""
    if value is None:
        return True
    return isinstance(value, list) and value != [] and all(map(is_id, value))


def is_id(value) -> bool:
    return type(value) is int and value >= 0


def is_ended(value, num_responses: int) -> bool:
    """Whether it says which responses ended: a list, or, of a single one, its item. None: all."""
    if not isinstance(value, list):
        return value is None or isinstance(value, bool) and num_responses == 1
    is_flag = [item is None or isinstance(item, bool) for item in value]
    return is_list_of(value, num_responses) and all(is_flag)


def is_list_of(value, length: int) -> bool:
    return isinstance(value, list) and len(value) == length


# ---- encoding


def prompt_key(row: dict) -> tuple:
    """A dictionary key for what the responses of a row answer: system, history and prompt."""
    system = [(row["system"],)] if row.get("system") else []
    history = [tuple(turn) for turn in row.get("history", [])]
    return (*system, *history, row["prompt"])


def shared_rows(train: list[dict], val: list[dict]) -> list[dict]:
    """The rows of val whose prompt a row of train has, or whose text if they are whole texts."""

    def key(row):
        return prompt_key(row) if row["prompt"] else (row["responses"][0],)

    known = set(map(key, train))
    return [row for row in val if key(row) in known]


def prompt_fields(row: dict) -> dict:
    """The row without its responses: prompt, system, history and group."""
    return {name: row[name] for name in ("prompt", "system", "history", "group") if name in row}


# what `encode_rows` counts of rows whose text or ids were edited
EDITED = "responses whose ids are used, which are of another text (drop the ids to use the text)"


def encode_rows(
    rows, enc, template: str, block_size: int, max_prompt: int = 0, max_response: int = 0
) -> tuple[list[dict | None], dict[str, int]]:
    """Encode rows to token ids, under one template and one set of limits for every response.

    Returns (encoded rows, counts). An encoded row is a dict

        prompt      token ids; [] for a whole text, which has no prompt and no template
        responses   K lists of token ids, text + end-of-text; None where a response is absent
        ranks       K ints, 0 for the best, equal ones are ties
        group       as in the row, if it has one

    A prompt longer than max_prompt is cut, see `template.cut_prompt_ids`. A response is cut at its
    end, to max_response and to what the prompt leaves of block_size; it then has no end-of-text. 0
    means block_size. A row that is dropped is None: its prompt leaves no room for a response, its
    best response has no token, or it is a whole text of fewer than two tokens, whose first one is
    never predicted. counts: rows, prompts cut, responses cut, dropped; and if there are such,
    responses whose ids are used although their text is another (`count_edited`).
    """
    max_response = max_response or block_size
    counts = {"rows": len(rows), "prompts cut": 0, "responses cut": 0, "dropped": 0}
    encoded = []
    for row in rows:
        encoded_row = encode_row(row, enc, template, block_size, max_prompt, max_response, counts)
        if encoded_row is None:
            counts["dropped"] += 1
        encoded.append(encoded_row)
    return encoded, counts


def encode_row(
    row: dict, enc, template: str, block_size: int, max_prompt: int, max_response: int, counts: dict
) -> dict | None:
    """One row of `encode_rows`, or None. Counts what is cut."""
    prompt = []
    if row["prompt"]:
        prompt, was_cut = encode_prompt(row, enc, template, block_size, max_prompt)
        if not prompt:
            return None
        counts["prompts cut"] += was_cut
    else:
        template = ""  # of a whole text
    room = min(max_response, block_size - len(prompt))
    responses, num_cut = encode_responses(row, enc, template, room)
    counts["responses cut"] += num_cut
    num_edited = count_edited(row, enc, template)
    if num_edited:
        counts[EDITED] = counts.get(EDITED, 0) + num_edited
    if responses[0] is None or not prompt and len(responses[0]) < 2:
        return None
    encoded = {"prompt": prompt, "responses": responses, "ranks": ranks_of(row)}
    if "group" in row:
        encoded["group"] = row["group"]
    return encoded


def encode_prompts(
    rows, enc, template: str, block_size: int, max_prompt: int = 0
) -> tuple[list[list[int]], dict[str, int]]:
    """The ids of the prompt of each row, [] where it leaves no room for a response, and counts:
    rows, prompts cut, dropped."""
    counts = {"rows": len(rows), "prompts cut": 0, "dropped": 0}
    prompts = []
    for row in rows:
        ids, was_cut = encode_prompt(row, enc, template, block_size, max_prompt)
        counts["prompts cut"] += was_cut
        counts["dropped"] += not ids
        prompts.append(ids)
    return prompts, counts


def encode_prompt(
    row: dict, enc, template: str, block_size: int, max_prompt: int = 0
) -> tuple[list[int], bool]:
    """The ids of a row's prompt, at most max_prompt of them (0: block_size), and whether it was
    cut. The ids are [] if there is no prompt, or none that leaves room for a response."""
    limit = min(max_prompt or block_size, block_size)
    if not row["prompt"]:
        return [], False
    history, system = row.get("history") or [], row.get("system") or ""
    ids, was_cut = cut_prompt_ids(enc, template, row["prompt"], history, limit, system)
    if len(ids) == block_size or was_cut and limit == block_size:
        return [], False
    return ids, was_cut


def encode_responses(row: dict, enc, template: str, room: int):
    """The token ids of the responses of a row, each cut to `room`. Returns (lists of ids, number
    cut). template: as in `response_ids`."""
    responses = []
    num_cut = 0
    for k in range(len(row["responses"])):
        ids = response_ids(row, k, enc, template)
        if ids is not None and len(ids) > room:
            num_cut += 1
            ids = ids[:room]
        responses.append(ids)
    return responses, num_cut


def response_ids(row: dict, k: int, enc, template: str) -> list[int] | None:
    """The token ids of response k: text + end-of-text, None if it is absent or has no token.

    A sampled response keeps its ids if this tokenizer made them, under a template that writes
    responses alike. One that did not end ("ended": false) gets no end-of-text. template: "" for a
    whole text, which has none.
    """
    text = row["responses"][k]
    if text is None:
        return None
    if keeps_ids(row, k, enc, template):
        return row["ids"][k]
    ended = ended_flags(row)[k] is not False
    if template:
        ids = written_ids(enc, template, text, ended=ended)
    else:
        ids = tokenizer.encode(enc, text)
    if ended:
        ids = ids + [enc.eot_token]
    return ids or None


def row_with_ids(row: dict, texts: list, ids: list, enc, template: str) -> dict:
    """These responses to a row's prompt, as a row that keeps their ids and names what made them."""
    return prompt_fields(row) | {
        "responses": texts,
        "ids": ids,
        "tokenizer": ids_source(enc, template),
    }


def sampled_row(row: dict, text: str, ids: list[int], enc, template: str) -> dict:
    """A sample as a ranked row that names its tokenizer and says whether it ended."""
    ended = tokenizer.is_end(enc, ids[-1])
    return row_with_ids(row, [text], [ids], enc, template) | {"ended": ended}


def ids_source(enc, template: str) -> str:
    """What made the ids of a sample: the tokenizer's checksum, and behind a space what else its
    template writes with a response, if it does, and whether the tokenizer puts a space before a
    response there. Ids of another source are not used."""
    source = f"{tokenizer.fingerprint(enc)} {response_form(template)}".rstrip(" ")
    if template and puts_space_before_response(enc, template):
        source += " space"
    return source


def keeps_ids(row: dict, k: int, enc, template: str) -> bool:
    """Whether response k has ids of this tokenizer and of a template that writes responses alike.
    Exits if it is not said whose ids they are, or if they cannot be this tokenizer's."""
    ids = (row.get("ids") or [None] * len(row["responses"]))[k]
    if ids is None:
        return False
    where = f"the row with the prompt {row['prompt'][:60]!r}"
    if not row.get("tokenizer"):
        raise SystemExit(
            f"{where} has ids and does not name their tokenizer; add tokenizer, its checksum, or"
            " drop the ids"
        )
    if row["tokenizer"] != ids_source(enc, template):
        return False
    if max(ids) >= enc.n_vocab:
        raise SystemExit(f"{where} has the id {max(ids)}, outside the vocabulary of {enc.n_vocab}")
    return True


def read_own_rows(path: str, enc, template: str) -> list[dict]:
    """`read_rows` of a file that this run has written with its tokenizer and template. Older
    versions did not name the space in `ids_source`."""
    source = ids_source(enc, template)
    rows = read_rows(path)
    for row in rows:
        if source == f"{row.get('tokenizer')} space":
            row["tokenizer"] = source
    return rows


def count_edited(row: dict, enc, template: str) -> int:
    """How many responses keep ids that are not those of their text: one of the two was edited."""
    num_edited = 0
    for k, text in enumerate(row["responses"]):
        if text is not None and keeps_ids(row, k, enc, template):
            num_edited += not are_ids_of(enc, template, row["ids"][k], text)
    return num_edited


def are_ids_of(enc, template: str, ids: list[int], text: str) -> bool:
    """Whether these are ids of a response: they decode to its text, as those of a sample do, or are
    what its text is encoded to. A tokenizer may change a text, so one of the two is enough; white
    space at its ends does not count, as some special tokens take it."""
    body = ids[:-1] if tokenizer.is_end(enc, ids[-1]) else ids
    if not template:  # a whole text
        decoded = tokenizer.decode(enc, body, "start")
        return text.strip() == decoded.strip() or tokenizer.encode(enc, text) == body
    if text.strip() in [sampled.strip() for sampled in sample_texts(enc, template, ids)]:
        return True
    try:
        encoded = [written_ids(enc, template, text, ended=ended) for ended in (True, False)]
    except SystemExit:  # the template cannot write this text
        return False
    return body in encoded or ids in encoded


def sample_texts(enc, template: str, ids: list[int]) -> list[str]:
    """The text of a sample, and as older versions wrote it: they kept the space that some
    tokenizers put after a special token."""
    text_of = split_template(template).text_of
    return [text_of(written_text(enc, template, ids)), text_of(written_text(enc, "{prompt}", ids))]


def ended_flags(row: dict) -> list[bool | None]:
    """Whether each response ended; None: it is not said, and means yes."""
    ended = row.get("ended")
    return ended if isinstance(ended, list) else [ended] * len(row["responses"])


def ranks_of(row: dict) -> list[int]:
    """The rank of each response: as the row says, else the number of higher scores, else its place.
    0 is the best, and equal ranks are ties."""
    if row.get("ranks"):
        return row["ranks"]
    scores = row.get("scores")
    return ranks_of_scores(scores) if scores else list(range(len(row["responses"])))


def ranks_of_scores(scores) -> list[int]:
    """For each score the number of higher ones: 0 for the best; equal scores share a rank."""
    ranks = []
    for score in scores:
        higher = [other for other in scores if other > score]
        ranks.append(len(higher))
    return ranks


def drop_equal_responses(encoded_row: dict) -> int:
    """Make absent, in place, each response that equals one before it. Returns their number.

    Responses are compared as encoded and cut: a model cannot tell them apart, so nothing is ranked
    between them, whatever their scores. Every stage that ranks calls this.
    """
    kept = []
    num_dropped = 0
    for response in encoded_row["responses"]:
        is_equal = response is not None and response in kept
        num_dropped += is_equal
        kept.append(None if is_equal else response)
    encoded_row["responses"] = kept
    return num_dropped


def longest_shared_prefix(texts, others) -> list[int]:
    """The length of the longest prefix that each of `texts` (lists of ids) shares with `others`."""
    ordered = sorted(others)
    lengths = []
    for ids in texts:
        i = bisect.bisect(ordered, ids)
        neighbours = ordered[max(0, i - 1) : i + 1]  # in sorted order a neighbour shares most
        lengths.append(max(len(os.path.commonprefix([ids, other])) for other in neighbours))
    return lengths
