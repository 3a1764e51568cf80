"""Rows of TRL's formats against what TRL's own functions make of them."""

import argparse

import pytest

from data import formats

data_utils = pytest.importorskip("trl.data_utils")

# Writes a conversation out, so that two ways to the same messages can be compared.
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Tokenizer:
    """As much of a tokenizer as TRL's functions call."""

    def apply_chat_template(self, messages, add_generation_prompt=False, **_):
        import jinja2

        template = jinja2.Template(CHAT_TEMPLATE)
        return template.render(messages=messages, add_generation_prompt=add_generation_prompt)


def ours(row):
    """A ranked row as prompt, chosen and rejected under CHAT_TEMPLATE."""
    parser = argparse.ArgumentParser()
    formats.add_arguments(parser)
    args = parser.parse_args([])
    dropped = {}
    (ranked_row,) = formats.convert(row, formats.recognise(row, "x", args), dropped, args)
    assert not dropped
    messages = []
    if "system" in ranked_row:
        messages.append({"role": "system", "content": ranked_row["system"]})
    for prompt, response in ranked_row.get("history", []):
        messages.append({"role": "user", "content": prompt})
        messages.append({"role": "assistant", "content": response})
    messages.append({"role": "user", "content": ranked_row["prompt"]})
    made = {"prompt": Tokenizer().apply_chat_template(messages, add_generation_prompt=True)}
    for name, response in zip(("chosen", "rejected"), ranked_row["responses"]):
        made[name] = response + "</assistant>"
    return made


def message(role, content):
    return {"role": role, "content": content}


QUESTION = [message("user", "What color is the sky?")]
BLUE, GREEN = message("assistant", " Blue."), message("assistant", "Green.\n")
TALK = [message("system", "Be kind."), *QUESTION, BLUE, message("user", "And grass?")]


@pytest.mark.parametrize("prompt", [QUESTION, TALK])
@pytest.mark.parametrize("is_implicit", [False, True])
def test_conversational_pairs(prompt, is_implicit):
    row = {"prompt": prompt, "chosen": [BLUE], "rejected": [GREEN]}
    if is_implicit:
        row = {"chosen": prompt + [BLUE], "rejected": prompt + [GREEN]}
    theirs = data_utils.apply_chat_template(data_utils.maybe_extract_prompt(row), Tokenizer())
    assert ours(row) == {name: theirs[name] for name in ("prompt", "chosen", "rejected")}


@pytest.mark.parametrize(
    "chosen, rejected",
    [
        ("The sky is blue.", "The sky is green."),
        ("The sky is blue.", "The sky is black."),
        ("a b c", "a x"),
    ],
)
def test_an_implicit_prompt(chosen, rejected):
    row = {"chosen": chosen, "rejected": rejected}
    theirs = data_utils.maybe_extract_prompt(row)
    chats = formats.implicit_prompt(chosen, rejected, "")
    assert chats[0].turns == (theirs["prompt"],)
    assert [chat.answer for chat in chats] == [theirs["chosen"], theirs["rejected"]]
