"""Chat templates in Jinja, as transformers has them: from them and to them.

A chat template is a program; a template of ours is a text (data/template.py). `from_jinja` finds
the text from what the program writes for a few conversations. `check_ids` then compares the ids of
many, so a chat template is followed exactly or refused with a reason, never approximated.
"""

import functools
import glob
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from typing import NoReturn

from data import tokenizer
from data.files import printable, read_text
from data.template import (
    end_token,
    is_template,
    prompt_ids,
    split_template,
    written_ids,
)

RENDER_SECONDS = 10  # after which a chat template is given up, on a machine that is busy
DATES = "2024-07-26", "2001-12-03"  # a template that writes the day writes two texts
TEMPLATE_ADVICE = "give the prompt's format by --template (docs/checkpoints.md)"

# Prompts, responses and system messages to compare ids on.
CHECK_TEXTS = [
    "What is 12 + 30?",
    "hi",
    " a space before",
    "a space after ",
    "  two spaces around  ",
    "\na line break before",
    "a line break after\n",
    "\n\n  line breaks and spaces around \n\n",
    "\ta tab before and after\t",
    "two\n\nparagraphs",
    "1. one\n2. two\n   - three\n",
    "def f(x):\n    return x ** 2\n",
    "naïve café — “quoted” …",
    "日本語のテキスト",
    "emoji 🙂👩‍👩‍👧 end",
    "It's 3.14159, isn't it?",
    "a: b; c, d! (e) [f] {g} | h / i",
    "UPPER lower MiXeD 0123456789",
    "User: not a turn\n\nAssistant: not one",
    "<think>\nfirst this\n</think>\n\nthen that",
    "lines of Windows\r\nend in two characters\r\n",
    "no-break\u00a0spaces\u00a0",
    "\f<b>a tag</b> &amp; an entity\f",
    "a long text, " * 400,
]


class NotFollowed(ValueError):
    """A chat template has no equivalent here. The message says why. A second argument is a template
    that may serve."""


@dataclass
class ChatTemplate:
    """A model's chat template and what it can read."""

    source: str
    variables: dict  # bos_token, eos_token ... and chat_template_kwargs

    def render(self, chats: list[dict]) -> list[tuple[str | None, str | None]]:
        """(text, error) of each chat, one of them None. chats: see data/render.py.

        It runs in a process of its own. Raises NotFollowed if that fails as a whole.
        """
        job = {"source": self.source, "variables": self.variables, "chats": chats}
        try:
            done = subprocess.run(
                [sys.executable, "-m", "data.render"],
                input=json.dumps(job).encode(),
                capture_output=True,
                cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
                timeout=RENDER_SECONDS,
            )
            return [tuple(result) for result in json.loads(done.stdout)]
        except subprocess.TimeoutExpired:
            raise NotFollowed("it takes too long")
        except (ValueError, TypeError):
            lines = done.stderr.decode(errors="replace").strip().splitlines() or [
                "out of time or memory"
            ]
            raise NotFollowed(f"it cannot be rendered ({lines[-1][:200]})")

    def render_all(self, chats: "list[Chat]") -> list[str]:
        """The texts of conversations. Raises NotFollowed if it raises in one of them."""
        results = self.render([chat.job() for chat in chats])
        for chat, (_, error) in zip(chats, results):
            if error:
                raise NotFollowed(f"{describe(chat)} it raises {error}")
        return [text for text, _ in results]


@dataclass
class Chat:
    """A conversation to render. Its last prompt has a response, or is to be answered."""

    prompt: str
    response: str | None = None
    history: list[tuple[str, str]] = field(default_factory=list)
    system: str = ""

    def job(self, date: str = DATES[0]) -> dict:
        """It as data/render.py reads it."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for prompt, response in [*self.history, (self.prompt, self.response)]:
            messages.append({"role": "user", "content": prompt})
            messages.append({"role": "assistant", "content": response})
        if self.response is None:
            messages.pop()
        return {
            "messages": messages,
            "add_generation_prompt": self.response is None,
            "date": date,
        }


# ---- from a model's folder


def read_chat_source(folder: str) -> str | None:
    """The source of the chat template in a model's folder (in the Hugging Face format), or None.

    Of several templates it is the one called default, as in transformers. Exits if there is none.
    """
    named = read_named_sources(folder)
    if not named:
        return None
    if "default" not in named:
        names = ", ".join(sorted(named))
        raise SystemExit(
            printable(
                f"{folder}: none of its chat templates ({names}) is called default;"
                f" {TEMPLATE_ADVICE}"
            )
        )
    source = named["default"]
    if not isinstance(source, str):
        raise SystemExit(f"{folder}/tokenizer_config.json: chat_template must be a text")
    return source or None


def read_named_sources(folder: str) -> dict:
    """{name: source} of the chat templates in a model's folder.

    As in transformers, files of their own replace all that tokenizer_config.json has.
    """
    files = {"default": os.path.join(folder, "chat_template.jinja")}
    pattern = os.path.join(glob.escape(folder), "additional_chat_templates", "*.jinja")
    for path in glob.glob(pattern):
        files[os.path.basename(path).removesuffix(".jinja")] = path
    named = {name: read_text(path) for name, path in files.items() if os.path.exists(path)}
    if named:
        return named
    source = tokenizer.read_settings(folder).get("chat_template")
    if isinstance(source, list):
        items = [item for item in source if isinstance(item, dict)]
        return {str(item.get("name")): item.get("template") for item in items}
    return {"default": source} if source else {}


def read_chat_template(folder: str, enc, kwargs: dict | None = None) -> ChatTemplate | None:
    """The chat template in a model's folder, None if it has none.

    kwargs: variables that it shall read beside the special tokens.
    """
    variables = {}
    for name, token in tokenizer.read_settings(folder).items():
        if isinstance(token, dict):
            token = token.get("content")
        if name.endswith("_token") and isinstance(token, str):  # add_bos_token is a bool
            variables[name] = token
    variables["eos_token"] = tokenizer.eos(enc)
    source = read_chat_source(folder)
    return ChatTemplate(source, variables | (kwargs or {})) if source else None


def follow(chat_template: ChatTemplate, enc, folder: str) -> str:
    """Our template for a model's chat template, which gives the same ids. Exits if there is none.

    Prints why a system message is refused, if it is, and which answers are encoded otherwise.
    """
    encode = functools.partial(tokenizer.encode_whole, enc)
    specials = list(tokenizer.specials(enc))
    try:
        template, note = from_jinja(chat_template, specials)
        try:
            joined = check_ids(enc, template, chat_template.render_all, encode)
        except NotFollowed as e:
            if split_template(template).system is None:
                raise
            template, note = from_jinja(chat_template, specials, without_system=True)[0], e.args[0]
            joined = check_ids(enc, template, chat_template.render_all, encode)
    except NotFollowed as e:
        refuse(chat_template, folder, e)
    if note:
        print(printable(f"rows with a system message are refused (the chat template: {note})"))
    say_joined(joined)
    return template


def say_joined(joined: int):
    """Print how many answers have other ids in transformers. joined: from `check_ids`."""
    if joined:
        print(
            f"{joined} of {len(CHECK_TEXTS)} test answers have other ids in transformers. It"
            " encodes a conversation as one text, in which the tokenizer joins them with the text"
            " beside. Here an answer is encoded by itself"
        )


def say_other_ids(folder: str, enc, template: str):
    """Print for which answers the chat template of an exported folder gives other ids than the
    template that it was made of."""
    encode = functools.partial(tokenizer.encode_whole, enc)
    exported = read_chat_template(folder, enc)
    texts = []

    def render(chats):
        texts.extend(exported.render_all(chats))
        return texts

    try:
        say_joined(check_ids(enc, template, render, encode))
    except NotFollowed as e:
        if texts:  # else it could not be rendered, which says nothing of ids
            print(printable(f"apply_chat_template gives other ids: {e}"))


def check_template(enc, template: str, folder: str):
    """Check that our ids of a prompt are those that the tokenizer gives for the whole text."""
    chat = Chat("What is 12 + 30?")
    whole = tokenizer.encode_whole(enc, chat_text(template, chat))
    if chat_ids(enc, template, chat) != whole:
        raise SystemExit(
            f"{folder}: the tokenizer encodes the template {template!r} differently as a whole and"
            " in parts"
        )


def refuse(chat_template: ChatTemplate, folder: str, error: NotFollowed) -> NoReturn:
    """Exit with why a chat template is not followed and what to do."""
    reason, *other = error.args
    advice = TEMPLATE_ADVICE
    if other and "date_string" in chat_template.source:
        advice = """choose one by --chat_template_kwargs='{"date_string": "26 Jul 2024"}'"""
    elif other:
        advice = f"choose one: --template={shell_quote(other[0])}"
    raise SystemExit(printable(f"{folder}: the chat template is not followed: {reason}; {advice}"))


def shell_quote(text: str) -> str:
    """A text on one line, as an argument for bash."""
    for character, name in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("\t", "\\t")):
        text = text.replace(character, name)
    return f"$'{text}'"


# ---- Jinja -> template


def from_jinja(
    chat_template: ChatTemplate, specials, without_system: bool = False
) -> tuple[str, str]:
    """(our template for a chat template, why it has no {system} or ""). Raises NotFollowed.

    It is rendered with placeholders as contents. specials: the special tokens. without_system: the
    template is to have no {system}.
    """
    prompt, response, second, system = "{prompt}", "{response}", "{second prompt}", "{system}"
    history = [(prompt, response)]
    chats = {
        "one turn": Chat(prompt),
        "an answer": Chat(prompt, response),
        "two turns": Chat(second, None, history),
        "white space": Chat(second, None, [(f" \n{prompt}\n ", f" \n{response}\n ")]),
        "thoughts": Chat(second, None, [(prompt, f"<think>\nx\n</think>\n\n{response}")]),
        "a system message": Chat(prompt, None, [], system),
        "system, two turns": Chat(second, None, history, system),
        "system, white space": Chat(prompt, None, [], f" \n{system}\n "),
    }
    jobs = [chat.job() for chat in chats.values()]
    jobs.append(chats["one turn"].job(DATES[1]))
    *rendered, other_day = chat_template.render(jobs)
    texts, errors = {}, {}
    for name, (text, error) in zip(chats, rendered):
        texts[name], errors[name] = text, error
    for name in list(chats)[:5]:
        if errors[name]:
            raise NotFollowed(f"for {name} it raises {errors[name]}")
    turns = read_turns(texts, specials, chat_template.variables["eos_token"])
    system_head, note = ("", "") if without_system else read_system(turns, texts, errors)
    keeps_thoughts = "<think>\nx" in texts["thoughts"]
    adds_thoughts = "</think>" in turns.between and texts["thoughts"].count("</think>") == 1
    thoughts = "|thoughts" if adds_thoughts or not keeps_thoughts else ""
    if not keeps_thoughts and "{last}" not in turns.between:
        raise NotFollowed("it drops thoughts (</think>) from earlier answers")
    spaced = texts["white space"]
    template = (
        system_head
        + turns.begin
        + "{turn}" * bool(system_head or turns.begin)
        + turns.before
        + field_of("prompt", spaced)
        + turns.between
        + field_of("response", spaced, thoughts)
        + turns.end
    )
    template = template.removesuffix("{response}\n\n")
    if not is_template(template):
        raise NotFollowed("its text contains the name of a field, such as {prompt}")
    if other_day[0] != texts["one turn"]:
        raise NotFollowed("it writes today's date", template)
    return template, note


def field_of(name: str, spaced: str, filters: str = "") -> str:
    """The field of a content, with |trim if white space around it is dropped in a text."""
    return "{" + name + ("" if f" \n{{{name}}}\n " in spaced else "|trim") + filters + "}"


@dataclass
class Turns:
    """The texts around prompts and responses."""

    begin: str
    before: str
    between: str  # after a prompt, with {answer} and {last}
    end: str  # with the text before {end}


def read_turns(texts: dict[str, str], specials, eos_token: str) -> Turns:
    """The texts around prompts and responses in what a chat template writes."""
    head, after = split_at(texts["one turn"], "{prompt}")
    answer_head, after_answer, answer_end = split_at(texts["an answer"], "{prompt}", "{response}")
    fields = "{prompt}", "{response}", "{second prompt}"
    first_head, history_after, between_turns, second_after = split_at(texts["two turns"], *fields)
    if (answer_head, first_head, second_after) != (head, head, after):
        raise NotFollowed("it does not write the same text around each turn")
    if not after_answer.startswith(after):
        raise NotFollowed(
            f"the prompt for an answer ends in {after[-30:]!r}, but before an answer it writes"
            f" {after_answer[-30:]!r}"
        )
    if not after_answer.startswith(history_after):
        raise NotFollowed(
            f"it writes {history_after[-30:]!r} before an earlier answer and {after_answer[-30:]!r}"
            " before the last one"
        )
    between = after_answer
    for place, mark in sorted([(len(after), "{answer}"), (len(history_after), "{last}")])[::-1]:
        if place < len(after_answer):
            between = between[:place] + mark + between[place:]

    tail, token = end_of_answer(between_turns, answer_end, specials, eos_token)
    next_turn = between_turns.removeprefix(tail + token)
    before = common_turn_start(head, next_turn, specials)
    begin = head.removesuffix(before)
    end = tail + "{end}" * bool(tail) + token + next_turn.removesuffix(before)
    return Turns(begin, before, between, end)


def split_at(text: str, *fields: str) -> list[str]:
    """The texts before, between and after placeholders, of which each must be there once."""
    pieces = []
    for name in fields:
        before, found, text = text.partition(name)
        if not found or name in text:
            raise NotFollowed("it does not write each prompt and answer once")
        pieces.append(before)
    return [*pieces, text]


def common_turn_start(head: str, between: str, specials) -> str:
    """BEFORE: the longest text that ends both BEGIN + BEFORE and END + BEFORE.

    It starts at the start of `head`, after a line break or after a special token; else it is "".
    """
    borders = ("\n", *specials)
    for i in range(len(head)):
        if between.endswith(head[i:]) and (i == 0 or head[:i].endswith(borders)):
            return head[i:]
    return ""


def end_of_answer(between_turns: str, answer_end: str, specials, eos_token: str):
    """(text, special token) that end an answer; both "" if other text stands between two turns, and
    eos_token ends only the last one.

    answer_end: what follows the answer in a conversation that it ends.
    """
    found = re.search("|".join(map(re.escape, sorted(specials, key=len, reverse=True))), answer_end)
    if not found:
        raise NotFollowed("no special token ends an answer")
    tail, token = answer_end[: found.start()], found[0]
    if between_turns.startswith(tail + token):
        return tail, token
    if (tail, token) == ("", eos_token):
        return "", ""
    raise NotFollowed(f"it ends the last answer in {tail + token!r} and earlier ones otherwise")


def read_system(turns: Turns, texts: dict, errors: dict) -> tuple[str, str]:
    """(the template up to BEGIN, why there is no {system}), one of them "". Changes `turns` if a
    system message changes what comes before the first prompt."""
    name = "a system message"
    for kind in (name, "system, two turns", "system, white space"):
        if errors[kind]:
            return "", f"it raises {errors[kind]}"
    if texts[name].count("{system}") != 1:
        return "", "it does not write one"
    head, _, rest = texts[name].partition("{system}")
    one_turn, two_turns = turns.begin + turns.before, texts["two turns"]
    rest_of_one, rest_of_two = texts["one turn"][len(one_turn) :], two_turns[len(one_turn) :]
    middle = rest.removesuffix(rest_of_one)
    same_turns = texts["system, two turns"] == head + "{system}" + middle + rest_of_two
    if not rest.endswith(rest_of_one) or not same_turns:
        return "", "it does not write it before the first prompt"
    if not middle.endswith(turns.before):
        turns.begin, turns.end = turns.begin + turns.before, turns.end + turns.before
        turns.before = ""
    middle = middle.removesuffix(turns.before)
    field = field_of("system", texts["system, white space"])
    return head + field + middle + ("{no_system}" if turns.begin else ""), ""


# ---- the same ids


def check_chats(template: str) -> list[Chat]:
    """Conversations on which ids are compared: one turn, an answer, several turns, and each of them
    with a system message if the template has one."""
    parts = split_template(template)
    filters = parts.filters.get("response", ())
    without_thoughts = "thoughts" in filters and "</think>" not in parts.lead
    chats = []
    for i, text in enumerate(CHECK_TEXTS):
        first, second = CHECK_TEXTS[i - 1], CHECK_TEXTS[i - 2]
        answer = first if without_thoughts and "</think>" in text else text
        for system in ("", text)[: 1 + (parts.system is not None)]:
            chats += [
                Chat(text, None, [], system),
                Chat(first, answer, [], system),
                Chat(second, None, [(text, first), (first, text)], system),
                Chat(second, answer, [(first, text)], system),
            ]
    turns = [(text, CHECK_TEXTS[0]) for text in CHECK_TEXTS[:7]]
    return [*chats, Chat("and then?", None, turns, "")]  # a long conversation


def chat_text(template: str, chat: Chat) -> str:
    """A conversation as one text. A response that ends it has no end-of-text token."""
    return chat_texts(template, chat)[-1][0]


def chat_texts(template: str, chat: Chat) -> list[tuple[str, str]]:
    """(its text up to here, response) where each response of a conversation begins and ends; last
    the whole text and "" or the last response."""
    parts = split_template(template)
    text = parts.begin
    if chat.system:
        before, after = parts.system
        text = before + parts.trim("system", chat.system) + after
    texts = []
    for prompt, response in chat.history:
        text += parts.before + parts.trim("prompt", prompt) + parts.history_after
        texts.append((text, response))
        text += "".join(parts.written(response, is_last=False))
        texts.append((text, response))
        text += parts.end
    text += parts.before + parts.trim("prompt", chat.prompt) + parts.after
    texts.append((text, chat.response or ""))
    if chat.response is not None:
        texts.append((text + "".join(parts.written(chat.response)), chat.response))
    return texts


def chat_ids(enc, template: str, chat: Chat) -> list[int]:
    """The token ids of a conversation. A response that ends it has the token that ends it."""
    ids = prompt_ids(enc, template, chat.prompt, chat.history, chat.system)
    if chat.response is not None:
        ids += written_ids(enc, template, chat.response)
        ids += tokenizer.encode_whole(enc, end_token(enc, template))
    return ids


def check_ids(enc, template: str, render, encode) -> int:
    """Check that a template gives the texts and the ids of a chat template.

    render: [Chat] -> its texts. encode: text -> ids. Raises NotFollowed at the first difference.

    Returns how many of CHECK_TEXTS the tokenizer joins, as an answer, with the text before or after
    it. The ids then do not begin with those of the prompt, so no model can write such an answer.
    Here an answer is encoded by itself, and such conversations are compared as text only.
    """
    special_tokens = tokenizer.specials(enc)
    chats = []
    for chat in check_chats(template):
        contents = "".join([chat.prompt, chat.response or "", chat.system, *sum(chat.history, ())])
        if not any(token in contents for token in special_tokens):
            chats.append(chat)
    joined = set()
    for chat, text in zip(chats, render(chats), strict=True):
        *texts, (expected, _) = chat_texts(template, chat)
        if chat.response is not None:
            expected += end_token(enc, template)
        if text[: len(expected)] != expected or chat.response is None and text != expected:
            raise NotFollowed(f"{describe(chat)} it writes {difference(text, expected)}")

        ids, whole_ids = chat_ids(enc, template, chat), encode(text)
        joined_here = set()
        for begin, response in texts:
            begin_ids = encode(begin)
            if whole_ids[: len(begin_ids)] != begin_ids:
                joined_here.add(response)
        joined |= joined_here
        if chat.response is not None:
            whole_ids = whole_ids[: len(ids)]
        if not joined_here and ids != whole_ids:
            raise NotFollowed(f"{describe(chat)} the tokenizer encodes it otherwise in parts")
    return len(joined)


def describe(chat: Chat) -> str:
    """Which conversation it is, for a message."""
    kind = "several turns" if chat.history else "one turn"
    system = ", a system message" if chat.system else ""
    return f"for {kind}{system} and the prompt {chat.prompt[:40]!r}"


def difference(text: str, expected: str) -> str:
    """Where two texts begin to differ, for a message."""
    n = len(os.path.commonprefix([text, expected]))
    start = max(0, n - 20)
    return f"{text[start : n + 20]!r}, not {expected[start : n + 20]!r}"


# ---- template -> Jinja


def to_jinja(template: str, end: str = "") -> str:
    """The template as a chat template of transformers.

    end: the special token that ends a last response; default: eos_token.
    """
    parts = split_template(template)
    last_end = quote(end) if end else "eos_token"
    if parts.system is None:
        no_system = "raise_exception('this model has no system message')"
        start = "{{ " + quote(parts.begin) + " }}{% set turns = messages %}"
        start = "{% if messages[0]['role'] == 'system' %}{{ " + no_system + " }}{% endif %}" + start
    else:
        before, after = map(quote, parts.system)
        content = content_of("messages[0]", "trim" in parts.filters["system"])
        start = (
            "{% if messages[0]['role'] == 'system' %}"
            "{{ " + before + " + " + content + " + " + after + " }}"
            "{% set turns = messages[1:] %}"
            "{% else %}"
            "{{ " + quote(parts.begin) + " }}"
            "{% set turns = messages %}"
            "{% endif %}"
        )
    is_last = "loop.index0 >= turns | length - 2"
    prompt = content_of("m", "trim" in parts.filters["prompt"])
    after = choose(is_last, quote(parts.after), quote(parts.history_after))
    between = quote(parts.tail + parts.end)
    end = choose("loop.last", f"({quote(parts.tail)} + {last_end})", between)
    return (
        start + "{% for m in turns %}"
        "{% if m['role'] != ['user', 'assistant'][loop.index0 % 2] %}"
        "{{ raise_exception('roles are user and assistant, in turns') }}"
        "{% elif m['role'] == 'user' %}"
        "{{ " + quote(parts.before) + " + " + prompt + " + " + after + " }}"
        "{% else %}" + response_to_jinja(parts) + "{{ " + end + " }}"
        "{% endif %}"
        "{% endfor %}"
    )


def response_to_jinja(parts) -> str:
    """What writes the message m, a response, up to its end."""
    filters = parts.filters.get("response", ())
    content = content_of("m", "trim" in filters)
    lead = choose("loop.last", quote(parts.lead), quote(parts.history_lead))
    if "thoughts" not in filters:
        return "{{ " + lead + " + " + content + " }}"
    keeps_thoughts = "loop.last" if parts.has_last else "true"
    thoughts = (
        "{{ raise_exception('an answer has thoughts, and this model writes none') }}"
        if "</think>" not in parts.lead
        else "{{ "
        + quote("<think>\n" if parts.lead.startswith("<think>") else "")
        + r" + c.split('</think>')[0].rstrip('\n').split('<think>')[-1].strip('\n')"
        r" + '\n</think>\n\n' + c.split('</think>')[-1].lstrip('\n') }}"
    )
    return (
        "{% set c = " + content + " %}"
        "{% if '</think>' not in c %}"
        "{{ " + lead + r" + (c.lstrip('\n') if " + keeps_thoughts + " else c) }}"
        "{% elif " + keeps_thoughts + " %}" + thoughts + "{% else %}"
        "{{ " + lead + r" + c.split('</think>')[-1].lstrip('\n') }}"
        "{% endif %}"
    )


def quote(text: str) -> str:
    """A text as a string in Jinja."""
    return json.dumps(text, ensure_ascii=False)


def content_of(message: str, is_trimmed: bool) -> str:
    return f"{message}['content']" + " | trim" * is_trimmed


def choose(condition: str, one: str, other: str) -> str:
    """An expression in Jinja."""
    return one if one == other else f"({one} if {condition} else {other})"
