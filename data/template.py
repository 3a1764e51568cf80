"""Prompt templates: how a prompt becomes token ids in training, scoring, sampling and export.

A template is a text with {prompt} in it. For conversations, and to follow another model's format,
it can have

    BEGIN{turn}BEFORE{prompt}AFTER{response}END

BEGIN comes once, before the first turn: a beginning-of-text token, a system message. END comes
between a response and the next turn, in place of the end-of-text token that a response has in
training; without {response} it is two line breaks. Special tokens of the tokenizer are recognised
in the template. In a prompt their text is encoded as plain text.
"""

import bisect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

from data import tokenizer
from data.files import read_json, read_text
from data.tokenizer import JsonTokenizer

RENDER_SECONDS = 10  # after which a chat template is given up, on a machine that is busy

TEMPLATE = "### Instruction: {prompt}\n\n### Response: "  # the default


class TemplateParts(NamedTuple):
    begin: str  # before the first turn
    before: str  # before each prompt
    after: str  # between a prompt and its response
    end: str  # between a response and the next turn


def is_template(text: str) -> bool:
    """Whether it has one {prompt}, at most one {turn} before and one {response} after it."""
    fields = re.findall(r"\{(?:turn|prompt|response)\}", text)
    in_order = [field for field in ("{turn}", "{prompt}", "{response}") if field in fields]
    return fields.count("{prompt}") == 1 and fields == in_order


def split_template(template: str) -> TemplateParts:
    """The parts of a template, which `is_template` accepts."""
    begin, turn, rest = template.partition("{turn}")
    if not turn:
        begin, rest = "", template
    before, _, rest = rest.partition("{prompt}")
    after, response, end = rest.partition("{response}")
    return TemplateParts(begin, before, after, end if response else "\n\n")


def prompt_ids(enc, template: str, prompt: str, history=()) -> list[int]:
    """The token ids of a prompt under a template, after the earlier turns of the conversation.

    history: [(prompt, response)]; a response is a text, or token ids without the end-of-text token.
    The text between two responses is encoded in one piece, each response by itself.
    """
    begin, before, after, end = split_template(template)
    ids = []
    lead, where = begin + before, "start"
    for earlier_prompt, response in history:
        ids += encode_framed(enc, lead, earlier_prompt, after, where)
        if isinstance(response, str):
            ids += tokenizer.encode(enc, response, "within")
        else:
            ids += response
        lead, where = end + before, "within"
    return ids + encode_framed(enc, lead, prompt, after, where)


def cut_prompt_ids(enc, template: str, prompt: str, history, limit: int) -> tuple[list[int], bool]:
    """The ids of `prompt_ids`, at most `limit` of them. Returns (ids, whether anything was cut).

    What the template adds stays: beginning-of-text, system message, role markers. The oldest turns
    go first, then characters at the start of the prompt, no more than needed. The ids are [] if the
    template leaves no room for any of the prompt.
    """

    def ids_of(num_characters: int, num_turns: int) -> list[int]:
        """Of the end of the prompt after the latest turns."""
        end = prompt[len(prompt) - num_characters :]
        return prompt_ids(enc, template, end, history[len(history) - num_turns :])

    def turns_fit(num_turns: int) -> bool:
        return len(ids_of(len(prompt), num_turns)) <= limit

    def characters_fit(num_characters: int) -> bool:
        return len(ids_of(num_characters, 0)) <= limit

    ids = ids_of(len(prompt), len(history))
    if len(ids) <= limit:
        return ids, False
    num_turns = most_that(turns_fit, len(history))
    if num_turns or turns_fit(0):
        return ids_of(len(prompt), num_turns), True
    num_characters = most_that(characters_fit, len(prompt))
    return (ids_of(num_characters, 0) if num_characters else []), True


def most_that(fits: Callable[[int], bool], n: int) -> int:
    """The largest number in 1..n that fits, or 0. It is tried by doubling, then by bisection, so
    that nothing much larger than what fits is encoded."""
    bound = 1
    while bound < n and fits(bound):
        bound *= 2
    return bisect.bisect_left(range(1, min(bound, n) + 1), True, key=lambda k: not fits(k))


def encode_framed(enc, before: str, text: str, after: str, where: str) -> list[int]:
    """The token ids of before + text + after, with special tokens in before and after only.

    where: what comes before it, see `tokenizer.encode`.
    """
    special_ids = tokenizer.specials(enc)
    left = split_at_specials(before, special_ids)
    right = split_at_specials(after, special_ids)
    # text, special, text, ..., special, text: the ends that touch `text` are one piece with it
    pieces = [*left[:-1], left[-1] + text + right[0], *right[1:]]
    ids = []
    for i, piece in enumerate(pieces):
        if i % 2 == 1:
            ids.append(special_ids[piece])
            where = "special"
        elif piece:
            ids += tokenizer.encode(enc, piece, where)
    return ids


def split_at_specials(text: str, special_ids: dict) -> list[str]:
    """Split a text into [text, special, text, ..., special, text]; longer special tokens win."""
    if not special_ids:
        return [text]
    names = sorted(special_ids, key=len, reverse=True)
    return re.split("(" + "|".join(map(re.escape, names)) + ")", text)


# ---- chat templates in Jinja


def to_jinja(template: str, end: str = "") -> str:
    """The template as a chat template of transformers.

    end: the special token that ends a last response; default: eos_token.
    """
    parts = split_template(template)
    begin, before, after, between = (json.dumps(part, ensure_ascii=False) for part in parts)
    last = json.dumps(end, ensure_ascii=False) if end else "eos_token"
    return (
        "{{ " + begin + " }}"
        "{% for m in messages %}"
        "{% if m['role'] == 'user' %}"
        "{{ " + before + " + m['content'] + " + after + " }}"
        "{% elif m['role'] == 'assistant' %}"
        "{{ m['content'] + (" + last + " if loop.last else " + between + ") }}"
        "{% else %}"
        "{{ raise_exception('roles are user and assistant') }}"
        "{% endif %}"
        "{% endfor %}"
    )


def from_jinja(source: str, **special_tokens) -> str | None:
    """Our template for a chat template in Jinja, or None if there is no equivalent.

    It is rendered for one turn and for two, with placeholders as contents, in a process of its own
    (data/render.py). special_tokens: eos_token="..." and the like.
    """
    messages = [
        {"role": "user", "content": "{prompt}"},
        {"role": "assistant", "content": "{response}"},
        {"role": "user", "content": "{second prompt}"},
    ]
    job = {
        "source": source,
        "conversations": [messages[:1], messages],
        "special_tokens": special_tokens,
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "data.render"],
            input=json.dumps(job).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
            timeout=RENDER_SECONDS,
            check=True,
        )
        one_turn, two_turns = json.loads(done.stdout)
        return template_from_renders(one_turn, two_turns, list(special_tokens.values()))
    except (subprocess.SubprocessError, ValueError):
        return None


def template_from_renders(one_turn: str, two_turns: str, special_tokens: list[str]) -> str:
    """Our template from what a chat template renders for one turn and for two, or a ValueError."""
    head, after = one_turn.split("{prompt}")
    pattern = r"(?s)(.*)\{prompt\}(.*)\{response\}(.*)\{second prompt\}(.*)"
    match = re.fullmatch(pattern, two_turns)
    if not match or match[1] != head or match[2] != after or match[4] != after:
        raise ValueError("it is not the same text around each turn")
    between = match[3]  # END + BEFORE
    before = common_turn_start(head, between, special_tokens)
    begin = head.removesuffix(before)
    end = between.removesuffix(before)
    template = begin + "{turn}" + before + "{prompt}" + after + "{response}" + end
    return template.removeprefix("{turn}").removesuffix("{response}\n\n")


def common_turn_start(head: str, between: str, special_tokens: list[str]) -> str:
    """BEFORE: the longest text that ends both BEGIN + BEFORE and END + BEFORE.

    It starts at the start of `head`, after a line break or after a special token; else it is "".
    """
    borders = ("\n", *special_tokens)
    for i in range(len(head)):
        if between.endswith(head[i:]) and (i == 0 or head[:i].endswith(borders)):
            return head[i:]
    return ""


# ---- other models' templates


def with_bos(enc, template: str) -> str:
    """A template after the beginning-of-text token that the tokenizer itself puts before a text."""
    bos = tokenizer.begin(enc)
    return bos + "{turn}" + template if bos else template


def read_template(folder: str, enc, default: str) -> str:
    """The template of the chat template in a model's folder (in the Hugging Face format).

    Without one, or if it has no equivalent, it is `default` after the tokenizer's
    beginning-of-text token.
    """
    config_path = os.path.join(folder, "tokenizer_config.json")
    jinja_path = os.path.join(folder, "chat_template.jinja")
    tokenizer_config = {}
    if os.path.exists(config_path):
        tokenizer_config = read_json(config_path)
    chat_template = tokenizer_config.get("chat_template")
    if os.path.exists(jinja_path):
        chat_template = read_text(jinja_path)
    default = with_bos(enc, default)
    if not chat_template:
        return default
    special_tokens = {}
    for name, token in tokenizer_config.items():
        if isinstance(token, dict):
            token = token.get("content")
        if name.endswith("_token") and isinstance(token, str):  # add_bos_token is a bool
            special_tokens[name] = token
    special_tokens["eos_token"] = tokenizer.eos(enc)
    template = None
    if isinstance(chat_template, str):
        template = from_jinja(chat_template, **special_tokens)
    if not template:
        print(
            "the chat template is not text around prompts and responses;"
            f" using {default!r} (--template sets another)"
        )
        return default
    return template


def check_template(enc, template: str, folder: str):
    """Check that our ids of a prompt are those that the tokenizer gives for the whole text."""
    if not isinstance(enc, JsonTokenizer):
        return
    parts = split_template(template)
    prompt = "What is 12 + 30?"
    whole = parts.begin + parts.before + prompt + parts.after
    if prompt_ids(enc, template, prompt) != enc.encode_with_specials(whole):
        raise SystemExit(
            f"{folder}: the tokenizer encodes the template {template!r} differently as a whole and"
            " in parts; its special tokens may take the spaces beside them"
        )
