"""Prompt templates: how a prompt becomes token ids in training, scoring, sampling and export.

A template is a text with {prompt} in it. For conversations, and to follow another model's format,
it can have

    SYSTEM{system}MIDDLE{no_system}BEGIN{turn}BEFORE{prompt}AFTER{response}END

BEGIN comes once, before the first turn: a beginning-of-text token, a default system message. If a
row has a system message, SYSTEM, the message and MIDDLE come instead. A template without {system}
refuses it. END comes between a response and the next turn, in place of the end-of-text token that a
response has in training; without {response} it is two line breaks. Special tokens of the tokenizer
are recognised in the template. In a prompt their text is encoded as plain text.

Three more fields say what belongs to a response:

    AFTER{answer}LEAD{response}TAIL{end}END

    {answer}   the prompt ends here. LEAD, such as a space, is what the model writes first
    {end}      TAIL is what the model writes last, before the end-of-text token
    {last}     before {response}: what follows stands in the last turn only, not in earlier ones

{prompt|trim} drops the white space at both ends of a prompt; {system|trim} and {response|trim} too.
{response|thoughts} treats <think>...</think> as Qwen 3 does: a response that has it is written with
it in place of LEAD, and turns before the last lose it if there is {last}.
"""

import bisect
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from data import tokenizer

TEMPLATE = "### Instruction: {prompt}\n\n### Response: "  # the default
RAW = ""  # no template: a prompt is a text to continue, which begins as the tokenizer begins a text

FIELDS = ["system", "no_system", "turn", "prompt", "answer", "last", "response", "end"]  # in order
FIELD = re.compile(r"\{(" + "|".join(FIELDS) + r")((?:\|trim|\|thoughts)*)\}")
FILTERS = {"system": {"trim"}, "prompt": {"trim"}, "response": {"trim", "thoughts"}}
NEEDS = {  # fields that others need
    "system": "turn",
    "no_system": "system",
    "answer": "response",
    "last": "response",
    "end": "response",
}


@dataclass(frozen=True)
class TemplateParts:
    """The texts of a template."""

    begin: str  # before the first turn, if there is no system message
    before: str  # before each prompt
    after: str  # between a prompt and what the model writes
    end: str  # between what the model wrote and the next turn
    lead: str = ""  # what the model writes before the text of a response
    tail: str = ""  # and after it
    history_after: str = ""  # after and lead of the turns before the last
    history_lead: str = ""
    has_last: bool = False
    system: tuple[str, str] | None = None  # the texts around a system message
    filters: dict[str, set[str]] = field(default_factory=dict)  # of system, prompt, response

    def trim(self, name: str, text: str) -> str:
        """A system message or a prompt as the template writes it."""
        return text.strip() if "trim" in self.filters.get(name, ()) else text

    def written(self, text: str, is_last: bool = True) -> list[str]:
        """What the model writes for a response, without the token that ends it: pieces, of which
        0, 2, 4 ... are the template's and those between them are text."""
        lead = [self.lead if is_last else self.history_lead]
        text = self.trim("response", text)
        if "thoughts" in self.filters.get("response", ()):
            lead, text = place_thoughts(lead, text, is_last or not self.has_last)
        return [*lead, text, self.tail]

    def is_verbatim(self) -> bool:
        """Whether a response stands in earlier turns as the model wrote it."""
        same = (self.after, self.lead) == (self.history_after, self.history_lead)
        return same and not self.filters.get("response")

    def text_of(self, written: str) -> str:
        """The text of a response of which the model wrote this."""
        return self.trim("response", written.removeprefix(self.lead).removesuffix(self.tail))


def response_form(template: str) -> str:
    """How a template writes a response: "LEAD{response|trim}TAIL", and "" if it is the text alone.
    The ids of a sample are those of its text only under templates of the same form."""
    if not template:  # of a whole text
        return ""
    parts = split_template(template)
    names = ["response", *sorted(parts.filters.get("response", ()))]
    form = f"{parts.lead}{{{'|'.join(names)}}}{parts.tail}"
    return "" if form == "{response}" else form


def place_thoughts(lead: list[str], text: str, keeps_thoughts: bool) -> tuple[list[str], str]:
    """(pieces before the text of a response, its text) under {response|thoughts}.

    Raises ValueError if it has thoughts and the template says that there are none.
    """
    is_cut = text.lstrip().startswith("<think>") and "</think>" not in text
    if is_cut and keeps_thoughts:
        if "</think>" not in lead[0]:
            raise ValueError("it has thoughts (<think>), and the template is one without")
        return ["" if lead[0].startswith("<think>") else lead[0]], text
    if "</think>" not in text:
        return lead, text.lstrip("\n") if keeps_thoughts else text
    thoughts = text.split("</think>")[0].rstrip("\n").split("<think>")[-1].strip("\n")
    text = text.split("</think>")[-1].lstrip("\n")
    if not keeps_thoughts:
        return lead, text
    if "</think>" not in lead[0]:
        raise ValueError("it has thoughts (</think>), and the template is one without")
    start = "<think>\n" if lead[0].startswith("<think>") else ""  # or the prompt ends in it
    return [start, thoughts, "\n</think>\n\n"], text


def without_thoughts(template: str, text: str) -> str:
    """A response of another model as this template can write it: without its thoughts, if the
    template says that there are none, else as it is. It is empty if the thoughts were cut."""
    try:
        split_template(template).written(text)
    except ValueError:
        return text.split("</think>")[-1].lstrip("\n") if "</think>" in text else ""
    return text


# for messages
EXAMPLE = "System: {system}\n{turn}User: {prompt}\nAssistant:{response}\n"


def is_template(text: str) -> bool:
    """Whether `template_problem` finds nothing wrong with it."""
    return not template_problem(text)


def template_problem(text: str) -> str:
    """What is wrong with a template, to be read after "template", or "". It must have one {prompt},
    and of the other fields each at most once, in their order, with the fields and filters that they
    go with."""
    found = [(field[1], field[2]) for field in FIELD.finditer(text)]
    names = [name for name, _ in found]
    for name, filters in found:
        if names.count(name) > 1:
            return f"has {{{name}}} twice"
        if not set(filters.split("|")[1:]) <= FILTERS.get(name, set()):
            return f"has {filters} in {{{name}}}, which cannot have it"
    if "prompt" not in names:
        return "must contain {prompt} once"
    for name in names:
        needed = NEEDS.get(name, name)
        if needed not in names:
            return f"has {{{name}}}, which needs {{{needed}}}, as in {EXAMPLE!r}"
    in_order = [name for name in FIELDS if name in names]
    if "{last}" in text and "{answer}" in text and text.index("{last}") < text.index("{answer}"):
        i = in_order.index("answer")
        in_order[i : i + 2] = ["last", "answer"]  # these two may be in either order
    if names != in_order:
        return "must have its fields in this order: " + "".join(f"{{{n}}}" for n in in_order)
    return ""


@functools.lru_cache
def split_template(template: str) -> TemplateParts:
    """The parts of a template, which `is_template` accepts, or of RAW."""
    pieces = FIELD.split(template or "{prompt}")
    follows = dict(zip(pieces[1::3], pieces[3::3]))  # the text after each field
    filters = {}
    for name, names in zip(pieces[1::3], pieces[2::3]):
        filters[name] = set(names.split("|")[1:])
    begin, before, system = "", pieces[0], None
    if "turn" in follows:
        begin, before = pieces[0], follows["turn"]
    if "system" in follows:
        system = pieces[0], follows["system"]
        begin = follows.get("no_system", "")

    names = list(follows)
    texts = {"after": "", "lead": "", "history_after": "", "history_lead": ""}
    of_answer, of_last = "", ""  # set once these fields are passed
    between = names[names.index("prompt") :]
    if "response" in names:
        between = names[names.index("prompt") : names.index("response")]
    for name in between:
        of_answer = of_answer or name == "answer"
        of_last = of_last or name == "last"
        texts["lead" if of_answer else "after"] += follows[name]
        if not of_last:
            texts["history_lead" if of_answer else "history_after"] += follows[name]
    end = follows.get("response", "\n\n")
    tail = ""
    if "end" in follows:
        tail, end = end, follows["end"]
    return TemplateParts(
        begin,
        before,
        end=end,
        tail=tail,
        has_last="last" in follows,
        system=system,
        filters=filters,
        **texts,
    )


def prompt_ids(enc, template: str, prompt: str, history=(), system: str = "") -> list[int]:
    """The token ids of a prompt under a template, after the earlier turns of the conversation.

    history: [(prompt, response)]; a response is a text, or token ids without the end-of-text token.
    system: a system message, or "". Exits if there is one and the template has no {system}. The
    text between two responses is encoded in one piece, each response by itself.
    """
    parts = split_template(template)
    lead = [parts.begin + parts.before]
    if system:
        if parts.system is None:
            raise SystemExit(
                f"there is a system message, {system[:60]!r}, and the template has no {{system}}:"
                f" train with one that has, such as {EXAMPLE!r}, or leave the message out"
            )
        lead = [parts.system[0], parts.trim("system", system), parts.system[1] + parts.before]
    ids = [*tokenizer.begin_ids(enc)] if template == RAW else []
    where = "start"
    for earlier_prompt, response in history:
        earlier_prompt = parts.trim("prompt", earlier_prompt)
        ids += encode_pieces(enc, [*lead, earlier_prompt, parts.history_after], where)
        ids += written_ids(enc, template, response, False) if type(response) is str else response
        lead, where = [parts.end + parts.before], "within"
    return ids + encode_pieces(enc, [*lead, parts.trim("prompt", prompt), parts.after], where)


def written_ids(
    enc, template: str, response: str, is_last: bool = True, ended: bool = True
) -> list[int]:
    """The token ids of what the model writes for a response, without the token that ends it. One
    that did not end lacks what the template writes behind its text."""
    parts = split_template(template)
    pieces = written_pieces(template, response, is_last)
    if not ended:
        pieces[-1] = ""
    special = special_before(enc, parts.after if is_last else parts.history_after)
    if special:  # it changes how the first word is encoded
        return encode_pieces(enc, [special + pieces[0], *pieces[1:]], "within")[1:]
    return encode_pieces(enc, pieces, "within")


def written_pieces(template: str, response: str, is_last: bool = True) -> list[str]:
    """`Parts.written`. Exits with one line if the template cannot write this response."""
    try:
        return split_template(template).written(response, is_last)
    except ValueError as e:
        raise SystemExit(f"the response {response[:60]!r}: {e}")


def written_whole(template: str, response: str) -> str:
    """The text that `written_ids` encodes, with white space that a special token may take."""
    return "".join(written_pieces(template, response))


def written_text(enc, template: str, ids: list[int]) -> str:
    """The text of ids that the model writes after a prompt, without the token that ends it: the
    inverse of `written_ids`."""
    if tokenizer.is_end(enc, ids[-1]):
        ids = ids[:-1]
    special = special_before(enc, split_template(template).after)
    return tokenizer.decode(enc, ids, "special" if special else "within")


def special_before(enc, text: str) -> str:
    """The special token that stands right before what follows a text of the template, as far as the
    tokenizer sees it: some take the white space behind them. "" if there is none."""
    *_, special, last = ["", *split_specials(enc, text)]
    if special and (last == "" or last.isspace() and tokenizer.strips(enc, special)[1]):
        return special
    return ""


@functools.lru_cache(maxsize=16)  # each entry keeps its tokenizer in memory
def puts_space_before_response(enc, template: str) -> bool:
    """Whether a response has other ids than in the middle of a text, because a special token of the
    template stands right before it, and the tokenizer puts a space after special tokens (the old
    form of sentencepiece)."""
    if not special_before(enc, split_template(template).after):
        return False
    return tokenizer.encode(enc, "a", "special") != tokenizer.encode(enc, "a", "within")


def end_token(enc, template: str) -> str:
    """The special token that ends a response: the one that END begins with, else eos_token."""
    first, *rest = split_specials(enc, split_template(template).end)
    return rest[0] if rest and first == "" else tokenizer.eos(enc)


def cut_prompt_ids(
    enc, template: str, prompt: str, history, limit: int, system: str = ""
) -> tuple[list[int], bool]:
    """The ids of `prompt_ids`, at most `limit` of them. Returns (ids, whether anything was cut).

    What the template adds stays: beginning-of-text, system message, role markers. The oldest turns
    go first, then characters at the start of the prompt, hardly more than needed. The ids are [] if
    the template leaves no room for any of the prompt.
    """
    prompt = split_template(template).trim("prompt", prompt)

    def ids_of(num_characters: int, num_turns: int) -> list[int]:
        """Of the end of the prompt after the latest turns."""
        end = prompt[len(prompt) - num_characters :]
        return prompt_ids(enc, template, end, history[len(history) - num_turns :], system)

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


def encode_pieces(enc, pieces: list[str], where: str) -> list[int]:
    """The token ids of a text in pieces. Special tokens are recognised in the pieces 0, 2, 4 ...,
    which the template gives, and are plain text in those between them.

    where: what comes before it, see `tokenizer.encode`.
    """
    texts = [""]  # text, special, text, ..., special, text
    for i, piece in enumerate(pieces):
        first, *rest = split_specials(enc, piece) if i % 2 == 0 else [piece]
        texts[-1] += first  # what touches is one piece
        texts += rest
    if len(texts) == 1:
        return tokenizer.encode(enc, texts[0], where) if texts[0] else []
    for i in range(1, len(texts), 2):
        strips_left, strips_right = tokenizer.strips(enc, texts[i])
        if strips_left:
            texts[i - 1] = texts[i - 1].rstrip()
        if strips_right:
            texts[i + 1] = texts[i + 1].lstrip()
    special_ids = tokenizer.specials(enc)
    ids = []
    for i, text in enumerate(texts):
        if i % 2 == 1:
            ids.append(special_ids[text])
            where = "special"
        elif text:
            ids += tokenizer.encode(enc, text, where)
    return ids


@functools.lru_cache(maxsize=16)  # the texts of a template; each entry keeps its tokenizer
def split_specials(enc, text: str) -> list[str]:
    """Split a text into [text, special, text, ..., special, text]; longer special tokens win."""
    names = sorted(tokenizer.specials(enc), key=len, reverse=True)
    if not names:
        return [text]
    return re.split("(" + "|".join(map(re.escape, names)) + ")", text)


def lacks_bos(enc, template: str) -> str:
    """A line about a template that leaves out the beginning-of-text token of its tokenizer; "" if
    it does not."""
    begin = tokenizer.begin_ids(enc)
    if tuple(prompt_ids(enc, template, "a")[: len(begin)]) == begin:
        return ""
    bos = tokenizer.begin(enc)
    return f"the template {template!r} leaves out {bos}, which this tokenizer puts before a text"


def with_bos(enc, template: str) -> str:
    """A template after the beginning-of-text token that the tokenizer itself puts before a text."""
    bos = tokenizer.begin(enc)
    return bos + "{turn}" + template if bos else template
