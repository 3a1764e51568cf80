"""Rows of other projects -> ranked rows: which columns are recognised, and what becomes of them.

FORMATS is the table. A row is recognised by the names of its columns, never by its contents, and
the first format whose columns are all there is taken. Texts are kept as they are. What makes no
row is counted by its reason; nothing is left out silently.

A conversation is a list of messages: {"role", "content"}, or ShareGPT's {"from", "value"}.
Responses are compared at the last message only: all before it is the prompt and its history.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable

from data.files import parse_json, printable
from data.rows import check_row, ended_flags, is_ended, prompt_key

HUMAN = "\n\nHuman:"  # begins a transcript of Anthropic
PROMPT = "prompt|question|instruction|query|input"
INPUT = {"instruction": ("input", "context")}  # columns that are a second part of the prompt
SYSTEM = "system|system_prompt"


@dataclasses.dataclass(frozen=True)
class Format:
    """Columns, by what they hold. "a|b" is the first of those that a row has; "a?" need not be
    there. `resolve` puts the names in that a row has.

    name        as it is printed
    prompt      a text or messages; "" where the responses are whole conversations
    responses   columns with a response each, best first unless a verdict or `scored` says more
    verdict     which of two responses is better, as `read_verdict` says
    scored      columns with the score of each response
    score       column with the score of the only response; rows of one prompt are merged
    listed      column with a list of responses: texts, or objects with a text and a score
    scores      column with the scores of a list
    messages    column with a conversation; every answer in it is a response
    needed      further columns without which it is another format
    is_json     prompt and responses are the turns of a conversation, as JSON lists of strings
    is_ours     the project's own rows (data/__init__.py)
    refused     why rows of this format are refused
    """

    name: str
    prompt: str = ""
    responses: tuple[str, ...] = ()
    verdict: str = ""
    scored: tuple[str, ...] = ()
    score: str = ""
    listed: str = ""
    scores: str = ""
    messages: str = ""
    needed: tuple[str, ...] = ()
    is_json: bool = False
    is_ours: bool = False
    refused: str = ""


FORMATS = (
    Format(
        "unpaired preference (KTO)",
        prompt="prompt",
        responses=("completion",),
        needed=("label",),
        refused="a response and a label, and no second response to the same prompt; the losses"
        " here compare responses. --prompt=prompt --response=completion trains on all of them",
    ),
    Format(
        "stepwise supervision",
        prompt="prompt",
        listed="completions",
        needed=("labels",),
        refused="the completions are steps of one response, with a label each; they are not"
        " responses to compare",
    ),
    Format("preference pairs", PROMPT + "|conversations?", ("chosen", "rejected")),
    Format("preference pairs (Argilla)", PROMPT, ("chosen_response", "rejected_response")),
    Format("SPIN", "", ("real", "generated")),
    Format("PKU-SafeRLHF", "prompt", ("response_0", "response_1"), verdict="better_response_id"),
    Format("HelpSteer3", "context", ("response1", "response2"), verdict="overall_preference"),
    Format(
        "HelpSteer2 preference",
        "prompt",
        ("response_1", "response_2"),
        verdict="preference_strength",
    ),
    Format("arena conversations", "", ("conversation_a", "conversation_b"), verdict="winner"),
    Format(
        "arena 55k",
        "prompt",
        ("response_a", "response_b"),
        scored=("winner_model_a", "winner_model_b"),
        is_json=True,
    ),
    Format(
        "rated responses (HelpSteer2)",
        "prompt",
        ("response",),
        score="helpfulness",
        needed=("verbosity",),
    ),
    # our own scores count more than ratings beside them, and ratings more than the order of a list
    Format("ranked responses", "prompt", listed="responses", scores="scores", is_ours=True),
    Format("rated responses", "prompt", listed="responses", scores="ratings|rewards"),
    Format("ranked responses", "prompt", listed="responses", is_ours=True),
    Format("prompt and response", "prompt", ("response",), is_ours=True),
    Format(
        "completions with scores",
        PROMPT,
        listed="responses|completions|generations|candidates|answers",
        scores="scores|ratings|rating|rewards?",
    ),
    Format("prompt and completion", "prompt", ("completion",)),
    Format("conversations", messages="messages"),
    Format("conversations (ShareGPT)", messages="conversations|conversation"),
    Format("instructions (Alpaca)", PROMPT, ("output|response|answer|completion",)),
    Format("texts", messages="", needed=("text",), is_ours=True),
)

OPTIONS = ("prompt", "system", "chosen", "rejected", "response", "responses", "scores", "messages")


def add_arguments(parser):
    """The options that name columns, and the choice of turns."""
    group = parser.add_argument_group("columns, where they are not recognised by their names")
    group.add_argument("--prompt", help="column of the prompt: a text or messages")
    group.add_argument("--system", help="column of the system message")
    group.add_argument("--chosen", help="column of the better response")
    group.add_argument("--rejected", help="column of the worse response")
    group.add_argument("--response", help="column of the only response")
    group.add_argument("--responses", help="column of a list of responses")
    group.add_argument(
        "--scores",
        help="column of their scores, high is best; with --response: of its score, and all rows of"
        " a prompt are ranked",
    )
    group.add_argument("--better", help="column that says which of two responses is better")
    group.add_argument("--messages", help="column of a conversation")
    parser.add_argument(
        "--turns",
        choices=["all", "first", "last"],
        default="all",
        help="which answers of a conversation are rows (default %(default)s); the turns before are"
        " history",
    )


# ---- recognising


def recognise(row: dict, where: str, args) -> Format:
    """The format of rows that have the columns of this one, with their names in it. Exits with one
    line if there is none, or if it is refused. args: the options of `add_arguments`."""
    columns = list(row)
    named = named_format(args)
    if named:
        found = resolve(named, columns)
        if not found:
            missing = [name for name in wanted(named) if name not in columns]
            raise SystemExit(
                f"{where}: there is no column {', '.join(missing)}; the columns are"
                f" {listing(columns)}"
            )
    else:
        found = next(filter(None, (resolve(one, columns) for one in FORMATS)), None)
        if not found:
            raise SystemExit(f"{where}: {unknown(columns)}")
    if args.system and args.system not in columns:
        raise SystemExit(
            f"{where}: there is no column {args.system}; the columns are {listing(columns)}"
        )
    if found.refused:
        raise SystemExit(f"{where}: {found.name}: {found.refused}")
    is_implicit = found.responses and not found.prompt and not named
    if is_implicit and may_have_a_prompt(row, found):
        raise SystemExit(
            f"{where}: {' and '.join(found.responses)} are texts, and no column is known as their"
            f" prompt among {listing(columns)}; name it: --prompt=, --chosen=, --rejected=. If they"
            " begin with it, give --chosen= and --rejected= alone"
        )
    if args.better:
        if len(found.responses) != 2 or args.better not in columns:
            raise SystemExit(
                f"{where}: --better={args.better} needs that column and two responses; the columns"
                f" are {listing(columns)}"
            )
        found = dataclasses.replace(found, verdict=args.better)
    return found


def may_have_a_prompt(row: dict, one: Format) -> bool:
    """Whether a row's responses are texts whose prompt may be in another of its columns. Each row
    is asked: others of its file, or of another file, may hold messages."""
    return len(row) > 2 and is_plain(row[one.responses[0]])


def is_plain(value) -> bool:
    """Whether it is a text that is no transcript."""
    return isinstance(value, str) and not value.startswith(HUMAN)


def named_format(args) -> Format | None:
    """The format that the options name, or None without options. Exits if they do not agree."""
    given = [name for name in OPTIONS if getattr(args, name) and name != "system"]
    if not given:
        return None
    allowed = (
        ("messages",),
        ("prompt",),
        ("chosen", "rejected"),
        ("prompt", "chosen", "rejected"),
        ("prompt", "response"),
        ("prompt", "response", "scores"),
        ("prompt", "responses"),
        ("prompt", "responses", "scores"),
    )
    if tuple(given) not in allowed:
        raise SystemExit(
            f"--{', --'.join(given)}: give --messages, --prompt and --response, [--prompt and]"
            " --chosen and --rejected, or --prompt and --responses [and --scores]; or --prompt for"
            " prompts without responses"
        )
    rated = bool(args.response and args.scores)
    pair = (args.chosen, args.rejected) if args.chosen else ()
    return Format(
        "columns as named",
        prompt=args.prompt or "",
        responses=pair or ((args.response,) if args.response else ()),
        score=args.scores if rated else "",
        listed=args.responses or "",
        scores="" if rated else args.scores or "",
        messages=args.messages or "",
    )


SLOTS = ("prompt", "verdict", "score", "listed", "scores", "messages")
SLOT_LISTS = ("responses", "scored", "needed")


def resolve(one: Format, columns) -> Format | None:
    """The format with the names of columns that are there, or None if it lacks one."""
    changed = {}
    for slot in SLOTS:
        name = present(getattr(one, slot), columns)
        if name is None:
            return None
        changed[slot] = name
    for slot in SLOT_LISTS:
        names = [present(name, columns) for name in getattr(one, slot)]
        if None in names:
            return None
        changed[slot] = tuple(names)
    return dataclasses.replace(one, **changed)


def present(slot: str, columns) -> str | None:
    """The column that fills a slot, "" if none need to, None if one is missing."""
    for name in (slot, *slot.removesuffix("?").split("|")):
        if name in columns:
            return name
    return None if slot and not slot.endswith("?") else ""


def wanted(one: Format) -> list[str]:
    """The columns that a format must have, as "a or b"."""
    slots = [getattr(one, slot) for slot in SLOTS]
    for slot in SLOT_LISTS:
        slots += getattr(one, slot)
    needed = [slot for slot in slots if slot and not slot.endswith("?")]
    return [" or ".join(slot.split("|")) for slot in needed]


def unknown(columns) -> str:
    """That no format has these columns, and which is nearest: the one of whose columns most, as a
    share, are there."""
    nearest, share, lacking = None, 0, []
    for one in FORMATS:
        names = wanted(one)
        missing = [name for name in names if not set(name.split(" or ")) & set(columns)]
        if not one.refused and 1 - len(missing) / len(names) > share:
            nearest, share, lacking = one, 1 - len(missing) / len(names), missing
    text = f"no known format has the columns {listing(columns)}"
    if nearest:
        text += f"; the nearest is {nearest.name}, and {' and '.join(lacking)} is missing"
    return text + (
        ". Name the columns: --messages=, or --prompt= and --response=, or --chosen= and"
        " --rejected=, or --prompt=, --responses= and --scores=; --prompt= alone is for prompts"
        " whose responses will be sampled"
    )


def listing(columns) -> str:
    """Names of columns for a message: at most 20, each of at most 40 characters."""
    names = [str(name)[:40] for name in list(columns)[:20]] + ["..."] * (len(columns) > 20)
    return ", ".join(names) or "nothing"


def unused_columns(one: Format, row: dict, args) -> list[str]:
    """The columns of a row, and the fields of its messages, that are no part of the rows of a
    recognised format."""
    used = {one.prompt, one.verdict, one.score, one.listed, one.scores, one.messages, "history"}
    used |= {*one.responses, *one.scored, *INPUT.get(one.prompt, ())}
    used |= {args.system or present(SYSTEM + "?", row), "ended"}
    unused = []
    for name, value in row.items():
        if name not in used:
            unused.append(name)
        elif is_messages(value):
            unused += [f"{name}.{key}" for key in unused_fields(value)]
    return unused


def unused_fields(messages) -> list[str]:
    """The fields of what `is_messages` takes that are not read, once each."""
    known = ("role", "from", "content", "value", *HAS_LOSS, *OTHER_PARTS)
    if isinstance(messages, dict):
        messages = [messages]
    found = {}
    for message in messages:
        if isinstance(message, dict):
            found |= dict.fromkeys(message)
    return [name for name in found if name not in known]


# ---- what is printed


def describe(one: Format, columns, unused: list[str], row: dict | None) -> str:
    """What is recognised, and the first row with what of it has a loss."""
    used = [name for name in columns if name not in unused]
    unused = list(dict.fromkeys(unused))
    text = f"recognised: {one.name} ({', '.join(used)})"
    if unused:
        text += f"; not used: {listing(unused)}"
    if not row:
        return text
    return "\n".join([text, "the first row; a run's template goes around it:", *row_lines(row)])


def row_lines(row: dict):
    """A row, field by field, with what has a loss."""
    if not row["prompt"]:
        yield shown("text", "loss", row["responses"][0], END)
        return
    if row.get("system"):
        yield shown("system", "no loss; the template must have {system}", row["system"])
    for prompt, response in row.get("history") or []:
        yield shown("earlier prompt", "no loss", prompt)
        yield shown("earlier response", "no loss", response)
    yield shown("prompt", "no loss", row["prompt"])
    responses = row.get("responses", [])
    scores = row.get("scores") or [None] * len(responses)
    for k, response in enumerate(responses):
        if response is not None:
            score = "" if scores[k] is None else f", score {scores[k]:g}"
            end = "" if ended_flags(row)[k] is False else END
            yield shown(f"response {k + 1}", f"loss{score}", response, end)


END = " + end of text"


def shown(name: str, mask: str, text: str, end: str = "") -> str:
    """A line of the first row. Long texts are shown by their two ends."""
    if len(text) > 160:
        text = f"{text[:100]} [{len(text) - 150:,} characters] {text[-50:]}"
    return f"    {name} ({mask}): {text!r}{end}"


# ---- rows


class Unusable(Exception):
    """Why a row, or a part of it, makes no ranked row. It is counted by its text."""


def drop(dropped: dict, reason: str, n: int = 1) -> list:
    """Count n dropped things in place. Returns [], the rows that are left."""
    dropped[reason] = dropped.get(reason, 0) + n
    return []


def describe_dropped(dropped: dict) -> str:
    counts = [f"{n:,} {reason}" for reason, n in sorted(dropped.items())]
    return "dropped: " + (", ".join(counts) or "nothing")


def describe_ignored(ignored: Counter) -> str:
    """The fields that no row keeps, with how many rows had them."""
    names = [f"{name} ({n:,})" for name, n in ignored.most_common(10)]
    more = f" and {len(ignored) - 10} more" if len(ignored) > 10 else ""
    return f"ignored fields: {', '.join(names)}{more}"


def convert_checked(row: dict, convert: Callable, dropped: dict) -> list[dict]:
    """convert(row, dropped), every result checked; a malformed row is dropped and its reason
    counted."""
    try:
        rows = convert(row, dropped)
        return [check_row(one, "malformed rows", prompt_only=True) for one in rows]
    except Unusable as e:
        return drop(dropped, str(e))
    except SystemExit as e:  # from check_row
        return drop(dropped, str(e))
    except (TypeError, ValueError, AttributeError, IndexError, RecursionError) as e:
        return drop(dropped, f"malformed rows: {type(e).__name__}")  # such as null for a text


def convert(row: dict, one: Format, dropped: dict, args) -> list[dict]:
    """The ranked rows of a row of a recognised format. Raises Unusable with the reason."""
    if row.get("tools"):
        raise Unusable("rows with tools")
    system = read_system(row, args.system)
    if one.messages:
        check_no_history(row)
        if not all(read_ended(row, 1)):
            raise Unusable("conversations whose ended is false")
        return conversation_rows(row[one.messages], system, dropped, args.turns)
    if one.is_json:
        chats = [json_conversation(row[one.prompt], row[name], system) for name in one.responses]
    elif not one.responses and not one.listed:
        return [row_of(read_prompt_chat(row, one, system))]
    elif one.listed:
        answers, scores, ended = read_list(row, one)
        chats = [read_chat(row, one, answer, system) for answer in answers]
        return ranked_rows(chats, scores, ended, dropped)
    elif one.prompt or len(one.responses) == 1 or is_messages(row[one.responses[0]]):
        chats = [read_chat(row, one, row[name], system) for name in one.responses]
    else:
        if may_have_a_prompt(row, one) and not named_format(args):
            raise Unusable("texts beside columns of which none is known as their prompt")
        chats = implicit_prompt(*[row[name] for name in one.responses], system)
    ended = read_ended(row, len(chats))
    if one.score:
        return [row_of(chats[0], [chats[0].answer], [read_score(row[one.score])], ended)]
    scores = None
    if one.verdict:
        sign = read_verdict(row[one.verdict], one.verdict)
        scores = [max(sign, 0), max(-sign, 0)]
    elif one.scored:
        scores = [read_score(row[name]) for name in one.scored]
    if len(chats) > 1:
        return ranked_rows(chats, scores, ended, dropped)
    if not chats[0].answer.strip():
        raise Unusable("rows with an empty response")
    return [row_of(chats[0], [chats[0].answer], None, ended)]


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation that ends in an answer."""

    system: str
    turns: tuple[str, ...]  # of the user and the assistant by turns, the last one is the user's
    answer: str


def read_chat(row: dict, one: Format, response, system: str) -> Chat:
    """The prompt of a row with one of its responses.

    A response is a text, the message of an assistant, or a whole conversation, which holds the
    prompt. Then a prompt that is a text must be in one of its messages.
    """
    if not is_messages(response):
        if not isinstance(response, str):
            raise Unusable("rows without a response")
        if response.startswith(HUMAN):
            raise Unusable(
                "rows with a prompt beside responses that are whole transcripts (name only"
                " --chosen= and --rejected=)"
            )
        return read_prompt_chat(row, one, system, response)
    messages = read_messages(response)
    if messages[0][0] != "assistant":
        check_no_history(row)
    if one.prompt and messages[0][0] == "assistant":
        if len(messages) > 1:
            raise Unusable("responses of several messages")
        messages = prompt_messages(row, one) + messages
    elif one.prompt and is_messages(row[one.prompt]):
        prompt = read_messages(row[one.prompt])
        if messages[: len(prompt)] != prompt:
            raise Unusable("rows whose responses do not begin with the prompt")
    elif one.prompt:
        prompt = read_prompt(row, one.prompt).strip()
        if not any(prompt in text for _, text in messages):
            raise Unusable(
                f"rows whose {one.prompt} is not in their conversations (to leave it out, name"
                " only the others)"
            )
    system, turns = read_turns(messages, system)
    if len(turns) % 2:
        raise Unusable("responses that do not end with the assistant")
    return Chat(system, tuple(turns[:-1]), turns[-1])


def read_prompt_chat(row: dict, one: Format, system: str, answer: str = "") -> Chat:
    """The prompt of a row, with an answer that is a text."""
    system, turns = read_turns(prompt_messages(row, one), system)
    if len(turns) % 2 == 0:
        raise Unusable("prompts that do not end with the user")
    return Chat(system, tuple(turns), answer)


def prompt_messages(row: dict, one: Format) -> list[tuple[str, str]]:
    """The messages before the responses of a row."""
    if not one.prompt:
        raise Unusable("rows whose responses are no conversations, without a prompt")
    if is_messages(row[one.prompt]):
        check_no_history(row)
        return read_messages(row[one.prompt])
    return history_messages(row) + text_messages(read_prompt(row, one.prompt))


def read_prompt(row: dict, column: str) -> str:
    """A prompt that is a text, with its second part after an empty line."""
    if not isinstance(row[column], str):
        raise Unusable("rows without a prompt")
    parts = [row[column], *[row[name] for name in INPUT.get(column, ()) if row.get(name)]]
    return "\n\n".join(part for part in parts if part.strip())


def read_system(row: dict, column: str | None) -> str:
    """The system message that a column of the row gives, or ""."""
    name = column or present(SYSTEM + "?", row)
    value = row.get(name) if name else None
    if value is None or isinstance(value, str) and not value.strip():
        return ""
    if not isinstance(value, str):
        raise Unusable("system messages that are no text")
    return value


def history_messages(row: dict) -> list[tuple[str, str]]:
    """The messages of a `history` column: messages, or [[prompt, response], ...]."""
    history = row.get("history") or []
    if is_messages(history):
        return read_messages(history)
    messages = []
    for turn in history:
        if not isinstance(turn, (list, tuple)) or [type(text) for text in turn] != [str, str]:
            raise Unusable("rows whose history is neither messages nor [[prompt, response], ...]")
        messages += [("user", turn[0]), ("assistant", turn[1])]
    return messages


def check_no_history(row: dict):
    """Earlier turns are in a conversation, or in a column of their own, not in both."""
    if row.get("history"):
        raise Unusable("rows with a history beside a conversation")


def read_list(row: dict, one: Format) -> tuple[list, list, list[bool]]:
    """The responses of a list, their scores, and which of them ended."""
    answers = row[one.listed]
    if not isinstance(answers, list) or not answers:
        raise Unusable("rows without a list of responses")
    ended = read_ended(row, len(answers))
    if all(isinstance(answer, dict) for answer in answers) and not is_messages(answers):
        texts = [answer[first_key(answer, TEXT_KEYS)] for answer in answers]
        if row.get("ended") is None:
            flags = [answer.get("ended") for answer in answers]
            ended = read_ended({"ended": flags}, len(answers))
        if all("rank" in answer for answer in answers) and not one.scores:
            return texts, [-read_score(answer["rank"]) for answer in answers], ended
        if not one.scores:
            scores = [read_score(answer[first_key(answer, SCORE_KEYS)]) for answer in answers]
            return texts, scores, ended
        answers = texts
    if not one.scores:
        raise Unusable("rows without scores: nothing says which response is better (--scores=)")
    scores = row[one.scores]
    if not isinstance(scores, list) or len(scores) != len(answers):
        raise Unusable("rows without a score for each response")
    return answers, [read_score(score) for score in scores], ended


TEXT_KEYS = ("text", "response", "content", "completion", "answer")
SCORE_KEYS = ("score", "rating", "overall_score", "reward")


def first_key(answer: dict, keys) -> str:
    for key in keys:
        if key in answer:
            return key
    raise Unusable(f"responses without {' or '.join(keys)}")


def read_score(value) -> float | None:
    """A score, or None where there is none. A number may be given as a text."""
    if type(value) is int:
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def read_ended(row: dict, num_responses: int) -> list[bool]:
    """Whether each response ended: a column `ended` says false of a sample that was cut, for all
    responses or in a list."""
    value = row.get("ended")
    flags = value if isinstance(value, list) else [value] * num_responses
    if not is_ended(flags, num_responses):
        raise Unusable("rows whose ended is not true or false for each response")
    return [flag is not False for flag in flags]


STRENGTHS = ("preference_strength", "overall_preference")  # of HelpSteer, -3 to 3
WINNERS = {"model_a": 1, "model_b": -1, "tie": 0, "tie (bothbad)": 0, "both_bad": 0}


def read_verdict(value, column: str) -> int:
    """1 if the first of two responses is better, -1 if the second, 0 for a tie.

    A text is looked up in WINNERS. In a column that ends in "_id" a number is the position of the
    better response, 0 or 1. In STRENGTHS it is how much better the second one is. In another column
    it could be either, so it is not used.
    """
    if isinstance(value, str) and value in WINNERS:
        return WINNERS[value]
    is_number = type(value) in (int, float) and math.isfinite(value)
    if column.endswith("_id") and is_number and value in (0, 1):
        return 1 - 2 * int(value)
    if column in STRENGTHS and is_number:
        return (value < 0) - (value > 0)
    advice = ""
    if is_number and column not in STRENGTHS:
        advice = ": it must be 0 or 1, the position of the better one, in a column named *_id"
    raise Unusable(f"rows whose {column} is {str(value)[:20]!r}{advice}")


def ranked_rows(
    chats: list[Chat], scores: list | None, ended: list[bool], dropped: dict
) -> list[dict]:
    """One row of responses to the same prompt; without scores they are in order, best first. ended:
    which of them did."""
    for chat in chats:
        if (chat.system, chat.turns) != (chats[0].system, chats[0].turns):
            raise Unusable("responses that differ before their last message")
    answers = [chat.answer for chat in chats]
    if scores is None:
        if not all(answer.strip() for answer in answers):
            raise Unusable("rows with an empty response")
        if len(set(answers)) < len(answers):
            raise Unusable("rows whose responses are equal")
        return [row_of(chats[0], answers, None, ended)]
    best = best_answers(zip(answers, scores), dropped)
    if len(best) < 2:
        raise Unusable("rows without two different responses")
    flags = ended_of(best, answers, ended)
    return [row_of(chats[0], list(best), list(best.values()), flags)]


def ended_of(best, answers: list[str], ended: list[bool]) -> list[bool]:
    """Whether each of the texts `best` ended. Of equal answers one may have, and one been cut: the
    text is whole then."""
    of_text = {}
    for text, flag in zip(answers, ended):
        of_text[text] = of_text.get(text, False) or flag
    return [of_text[text] for text in best]


def best_answers(answers, dropped: dict) -> dict:
    """{response: score}, best first, of [(response, score)]. Of equal responses the best is kept.
    Responses that are empty or have no score are counted."""
    scored = []
    for text, score in answers:
        if score is None or score != score:
            drop(dropped, "responses without a score")
        else:
            scored.append((text, score))
    scored.sort(key=lambda answer: -answer[1])
    best = {}
    for text, score in scored:
        if not text or not text.strip():
            drop(dropped, "empty responses")
        elif text in best:
            drop(dropped, "responses that repeat a better one")
        else:
            best[text] = score
    return best


def row_of(
    chat: Chat,
    responses: list | None = None,
    scores: list | None = None,
    ended: list[bool] | None = None,
) -> dict:
    """A ranked row. Its group is the opening of the conversation."""
    turns = chat.turns
    row = {"prompt": turns[-1], "group": turns[0].strip()}
    if responses:
        row["responses"] = responses
    if scores:
        row["scores"] = scores
    if ended and not all(ended):
        row["ended"] = ended
    if chat.system:
        row["system"] = chat.system
    if len(turns) > 1:
        row["history"] = [list(pair) for pair in zip(turns[:-1:2], turns[1::2])]
    return row


def merge_rated(rows, dropped: dict):
    """Rows with one rated response each: all of a prompt become one row, where the first of them
    stands. Exits with one line if those of a prompt have different groups."""
    merged = {}  # {prompt: row}
    for row in rows:
        first = merged.setdefault(prompt_key(row), row)
        if first is row:
            row["ended"] = list(ended_flags(row))
            continue
        if first["group"] != row["group"]:
            raise SystemExit(
                printable(
                    f"responses to {row['prompt']!r:.80} have the groups {first['group']!r} and "
                    f"{row['group']!r}: those of a prompt are ranked together, so they need one"
                )
            )
        first["ended"] += ended_flags(row)
        first["responses"] += row["responses"]
        first["scores"] += row["scores"]
    for row in merged.values():
        yield from rank_merged(row, dropped)


def rank_merged(row: dict, dropped: dict) -> list[dict]:
    best = best_answers(zip(row["responses"], row["scores"]), dropped)
    if len(best) < 2:
        return drop(dropped, "prompts without two different responses")
    ended = ended_of(best, row["responses"], read_ended(row, len(row["responses"])))
    row = row | {"responses": list(best), "scores": list(best.values())}
    row.pop("ended", None)
    return [row if all(ended) else row | {"ended": ended}]


# ---- conversations


ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
OTHER_PARTS = (
    "tool_calls",
    "function_call",
    "reasoning_content",
    "reasoning",
    "thinking",
    "images",
)
# Fields that say whether a message has a loss: of OpenAI, of Axolotl (two), of ms-swift
HAS_LOSS = ("weight", "train", "training", "loss")


def is_messages(value) -> bool:
    """Whether it is a list of messages, one message, or lists of roles and contents."""
    if isinstance(value, list) and value:
        value = value[0]
    return isinstance(value, dict) and bool({"role", "from"} & value.keys())


def read_messages(value, without_loss: set | None = None) -> list[tuple[str, str]]:
    """[(role, text)]. Raises Unusable for what is no text, and for an answer that must have no
    loss. With a set the places of such answers are added to it instead."""
    if isinstance(value, dict):
        value = unstack(value)
    messages = []
    for message in value:
        for name in OTHER_PARTS:
            if message.get(name):
                raise Unusable(f"conversations with {name}")
        role = message.get("role") or message.get("from")
        text = message.get("content")
        if text is None:
            text = message.get("value")
        role = ROLES.get(role, role)
        if role not in ("system", "user", "assistant"):
            raise Unusable(f"conversations with the role {str(role)[:20]!r}")
        name = no_loss_field(message) if role == "assistant" else ""
        if name and without_loss is None:
            raise Unusable(f"conversations with an answer whose {name} is {message[name]!r:.9}")
        if name:
            without_loss.add(len(messages))
        messages.append((role, read_text(text)))
    return messages


def no_loss_field(message: dict) -> str:
    """The field of a message that says that it has no loss, or ""."""
    for name in HAS_LOSS:
        if message.get(name) not in (None, 1):  # True is 1
            return name
    return ""


def unstack(value: dict) -> list[dict]:
    """A message as a list, or lists of roles and contents as messages."""
    if not isinstance(next(iter(value.values())), list):
        return [value]
    return [dict(zip(value, parts)) for parts in zip(*value.values())]


def read_text(content) -> str:
    """The content of a message: a text, or parts that are all texts."""
    if isinstance(content, list) and content:
        parts = [part.get("text") for part in content if part.get("type", "text") == "text"]
        if len(parts) == len(content) and all(isinstance(part, str) for part in parts):
            return "".join(parts)
        raise Unusable("conversations with images or other parts")
    if not isinstance(content, str):
        raise Unusable("conversations with a message without a text")
    return content


def read_turns(messages: list[tuple[str, str]], system: str = "") -> tuple[str, list[str]]:
    """(system message, texts of the user and the assistant by turns, the user's first)."""
    if messages and messages[0][0] == "system":
        own, messages = messages[0][1], messages[1:]
        if system and own.strip() and own != system:
            raise Unusable("rows with two different system messages")
        system = own if own.strip() else system
    if not messages:
        raise Unusable("conversations without a message")
    for i, (role, _) in enumerate(messages):
        if role != ("user", "assistant")[i % 2]:
            raise Unusable("conversations whose turns do not alternate from the user's")
    return system, [text for _, text in messages]


def conversation_rows(value, system: str, dropped: dict, turns: str) -> list[dict]:
    """A row for each answer of a conversation that has a loss (or the first of them, or the last),
    with what is before."""
    if not is_messages(value):
        raise Unusable("conversations without a message")
    without_loss = set()
    messages = read_messages(value, without_loss)
    system, texts = read_turns(messages, system)
    offset = len(messages) - len(texts)  # 1 if the first one is the system message
    if len(texts) % 2:
        drop(dropped, "last messages of the user, without an answer")
        texts = texts[:-1]
    for i, text in enumerate(texts):
        if not text.strip():
            drop(dropped, "turns from an empty one on", len(texts) // 2 - i // 2)
            texts = texts[:i]
            break
    answers = [i for i in range(1, len(texts), 2) if i + offset not in without_loss]
    num_without = len(texts) // 2 - len(answers)
    if num_without:
        drop(dropped, "answers that must have no loss (weight, train or loss)", num_without)
    if turns != "all" and len(answers) > 1:
        drop(dropped, f"turns that are not the {turns} (--turns)", len(answers) - 1)
        answers = answers[:1] if turns == "first" else answers[-1:]
    return [row_of(Chat(system, tuple(texts[:i]), texts[i]), [texts[i]]) for i in answers]


# ---- prompts inside of texts


def text_messages(text: str) -> list[tuple[str, str]]:
    """A prompt that is a text, as messages: HelpSteer2 and Anthropic write several turns in one."""
    roles = {"User": "user", "Assistant": "assistant"}
    first, *rest = re.split(r"\n<extra_id_1>(User|Assistant)\n", text)
    if rest:
        others = [(roles[role], turn) for role, turn in zip(rest[::2], rest[1::2])]
        return [("user", first), *others]
    if text.startswith(HUMAN):
        context = re.sub(r"\n\nAssistant:\s*\Z", "", text)
        return transcript_messages(parse_transcript(context))
    return [("user", text)]


def transcript_messages(parsed) -> list[tuple[str, str]]:
    if not parsed:
        raise Unusable("transcripts whose turns do not alternate or are empty")
    history, prompt = parsed
    return history_messages({"history": history}) + [("user", prompt)]


def parse_transcript(text: str):
    r"""Parse "\n\nHuman: a\n\nAssistant: b\n\nHuman: c" into ([["a", "b"]], "c").

    Returns None if the turns do not alternate from a human to a human, or if one is empty.
    """
    before, *parts = re.split(r"\n\n(Human|Assistant):", text)
    speakers = parts[::2]
    turns = [part.strip() for part in parts[1::2]]
    if before.strip() or len(turns) % 2 == 0 or not all(turns):
        return None
    if any(speaker != ("Human", "Assistant")[i % 2] for i, speaker in enumerate(speakers)):
        return None
    history = [list(pair) for pair in zip(turns[:-1:2], turns[1::2])]
    return history, turns[-1]


def implicit_prompt(chosen, rejected, system: str) -> list[Chat]:
    """Two whole texts, with their common beginning as the prompt.

    Of Anthropic's transcripts it is all before the last answer. Of other texts it is the common
    characters, without a space at their end, as in TRL's extract_prompt:
    https://huggingface.co/docs/trl/main/en/data_utils#trl.extract_prompt
    """
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise Unusable("rows without a response")
    if chosen.startswith(HUMAN):
        chats = []
        for text in (chosen, rejected):
            context, _, answer = text.rpartition("\n\nAssistant:")
            if HUMAN in answer:
                raise Unusable("transcripts that end with a human's turn")
            _, turns = read_turns(transcript_messages(parse_transcript(context)))
            chats.append(Chat(system, tuple(turns), answer.strip()))
        return chats
    length = 0
    while length < min(len(chosen), len(rejected)) and chosen[length] == rejected[length]:
        length += 1
    if length and chosen[length - 1] == " ":
        length -= 1
    prompt = chosen[:length]
    if not prompt.strip():
        raise Unusable("pairs without a prompt: the two texts have no common beginning")
    return [Chat(system, (prompt,), text[length:]) for text in (chosen, rejected)]


def json_conversation(prompts, responses, system: str) -> Chat:
    """The arena's turns, JSON lists of texts, as a conversation."""
    prompts, responses = parse_json(prompts), parse_json(responses)
    if not isinstance(prompts, list) or not isinstance(responses, list):
        raise Unusable("turns that are no JSON list")
    if len(prompts) != len(responses) or not prompts:
        raise Unusable("conversations whose turns do not alternate from the user's")
    turns = []
    for prompt, response in zip(prompts, responses):
        turns += [read_text(prompt), read_text(response)]
    return Chat(system, tuple(turns[:-1]), turns[-1])
