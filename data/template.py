"""How a prompt is put to a model, for all who do it: sampling, scoring, fine-tuning, chat, the exported chat template.

A template is a text around {prompt}. For conversations, and for models that are used to something else, it may have all of

    BEGIN{turn}BEFORE{prompt}AFTER{response}END

BEGIN stands once, before the first turn (a beginning-of-text token, a system message); END between a response and the next turn,
in place of the end-of-text that a response has in training: two line breaks if there is no {response}. A special token of the
tokenizer is that token where the template spells it, and plain text where a prompt does.
"""

import json
import os
import re

from data import tokenizer

MARKS = re.compile(
    r"(?s)(?:(?P<begin>.*)\{turn\})?(?P<before>.*)\{prompt\}(?P<after>.*?)(?:\{response\}(?P<end>.*))?"
)


def split_template(template):
    """(BEGIN, BEFORE, AFTER, END) of a template: config.is_template."""
    found = MARKS.fullmatch(template)
    return (
        found["begin"] or "",
        found["before"],
        found["after"],
        "\n\n" if found["end"] is None else found["end"],
    )


def prompt_ids(enc, template, prompt, history=()):
    """The ids of a prompt under a template, after a conversation's earlier turns: history is [(prompt, response)], a response a text
    or the ids of one, without its end-of-text. What stands between two responses is encoded as one text, each response on its own."""
    begin, before, after, end = split_template(template)
    ids, lead, where = [], begin + before, "start"
    for said, answered in history:
        ids += encode_framed(enc, lead, said, after, where) + (
            tokenizer.encode(enc, answered, "within")
            if isinstance(answered, str)
            else list(answered)
        )
        lead, where = end + before, "within"
    return ids + encode_framed(enc, lead, prompt, after, where)


def encode_framed(enc, before, text, after, where):
    """before + text + after -> ids; the special tokens that are named in before and after are tokens."""
    specials = tokenizer.specials(enc)
    cut = re.compile(
        "(" + ("|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or "(?!)") + ")"
    )  # the last: never
    *heads, left = cut.split(before)  # text, special, text, special ... text
    right, *tails = cut.split(after)
    ids = []
    for piece, special in (
        [(piece, n % 2) for n, piece in enumerate(heads)]
        + [(left + text + right, 0)]
        + [(piece, 1 - n % 2) for n, piece in enumerate(tails)]
    ):
        ids += (
            [specials[piece]] if special else tokenizer.encode(enc, piece, where) if piece else []
        )
        where = "special" if special else where
    return ids


def to_jinja(template):
    """The template as transformers wants it, in Jinja. A last response gets the end-of-text."""
    begin, before, after, end = (
        json.dumps(part, ensure_ascii=False) for part in split_template(template)
    )
    return (
        "{{ "
        + begin
        + " }}{% for m in messages %}{% if m['role'] == 'user' %}{{ "
        + before
        + " + m['content'] + "
        + after
        + " }}"
        "{% elif m['role'] == 'assistant' %}{{ m['content'] + (eos_token if loop.last else "
        + end
        + ") }}"
        "{% else %}{{ raise_exception('roles are user and assistant') }}{% endif %}{% endfor %}"
    )


def from_jinja(source, **tokens):
    """The template of a chat template in Jinja, or None where it is no text around what is said: found by two turns whose texts are
    marks. It runs in Jinja's sandbox, as in transformers; tokens: eos_token and the like, by their names."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message):
        raise TemplateError(message)

    marks = ["{prompt}", "{response}", "{second prompt}"]
    try:
        env = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        env.globals["raise_exception"] = refuse
        chat = env.from_string(source)
        said = [
            {"role": "user" if n % 2 == 0 else "assistant", "content": mark}
            for n, mark in enumerate(marks)
        ]
        one, two = (
            chat.render(
                messages=messages, add_generation_prompt=True, tools=None, documents=None, **tokens
            )
            for messages in (said[:1], said)
        )
        end = re.fullmatch(r"(?s)(.*)\{prompt\}(.*)\{response\}(.*)\{second prompt\}(.*)", two)
        head, after = one.split("{prompt}")
        assert end[1] == head and end[2] == end[4] == after
        # the second turn begins where the first one did, as far as they end alike, at a token or a line
        borders = ("\n", *tokens.values())
        before = next(
            head[i:]
            for i in range(len(head) + 1)
            if end[3].endswith(head[i:]) and (i in (0, len(head)) or head[:i].endswith(borders))
        )
        template = (
            head[: len(head) - len(before)]
            + "{turn}"
            + before
            + "{prompt}"
            + after
            + "{response}"
            + end[3][: len(end[3]) - len(before)]
        )
    except Exception:  # a template may raise anything
        return None
    return template.removeprefix("{turn}").removesuffix("{response}\n\n")


def with_bos(enc, template):
    """A template after what the tokenizer itself puts before a text."""
    first = tokenizer.begin(enc)
    return first + "{turn}" * bool(first) + template


def read_template(folder, enc, usual):
    """How a prompt is put to the model in a folder, by its chat template; without one as `usual`, after the beginning-of-text that its
    tokenizer sets."""
    path, settings = (
        os.path.join(folder, "chat_template.jinja"),
        os.path.join(folder, "tokenizer_config.json"),
    )
    theirs = {}
    if os.path.exists(settings):
        with open(settings, encoding="utf-8") as f:
            theirs = json.load(f)
        if not isinstance(theirs, dict):
            raise SystemExit(f"{settings} is not what it should be: an object")
    chat = theirs.get("chat_template")
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            chat = f.read()
    usual = with_bos(enc, usual)
    if not chat:
        return usual
    text = {
        name: token.get("content") if isinstance(token, dict) else token
        for name, token in theirs.items()
        if name.endswith("_token")
    }
    text = {
        name: token for name, token in text.items() if isinstance(token, str)
    }  # add_bos_token is none
    found = (
        from_jinja(chat, **text | {"eos_token": tokenizer.eos(enc)})
        if isinstance(chat, str)
        else None
    )
    if not found:
        print(
            f"the chat template is no text around what is said; {usual!r} is taken, unless --template says another"
        )
    return found or usual


def check_template(enc, template, folder):
    """That what we make of a prompt is what the tokenizer itself makes of the whole text."""
    begin, before, after, _ = split_template(template)
    if isinstance(enc, tokenizer.Json) and prompt_ids(
        enc, template, "What is 12 + 30?"
    ) != enc.with_specials(begin + before + "What is 12 + 30?" + after):
        raise SystemExit(
            f"{folder}: its tokenizer makes other ids of the template {template!r} than its parts have; its special tokens may take the spaces beside them"
        )
