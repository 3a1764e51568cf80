"""Render a chat template in a process of its own; data/chat_template.py starts it.

A chat template is a program: it can loop for hours or fill the memory. So it runs here, in Jinja's
sandbox as in transformers, with limits of time and memory. Reads from standard input a JSON object

    source       the template
    variables    what it can read beside the messages, such as bos_token
    chats        [{"messages": [...], "add_generation_prompt": bool, "date": "2024-07-26"}]

Writes a JSON list with [text, error] of each chat, one of them null.
"""

import contextlib
import datetime
import json
import resource
import sys

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 2  # of computing
MAX_MEMORY = 2**30  # bytes
MAX_TEXT = 2**20  # characters


class Generation(Extension):
    """{% generation %} marks in training templates what the model writes. It adds no text."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        # As in transformers: what the body sets is not set after it
        return nodes.CallBlock(self.call_method("body"), [], [], body).set_lineno(line)

    def body(self, caller):
        return caller()


def main():
    job = json.load(sys.stdin)
    with contextlib.suppress(ValueError, OSError):  # some systems have no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))

    def raise_exception(message):
        raise TemplateError(message)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    env.globals["raise_exception"] = raise_exception
    env.filters["tojson"] = to_json
    chat_template = env.from_string(job["source"])
    results = []
    for chat in job["chats"]:
        date = datetime.datetime.fromisoformat(chat.pop("date"))
        env.globals["strftime_now"] = date.strftime
        try:
            text = chat_template.render(tools=None, documents=None, **chat, **job["variables"])
        except (MemoryError, RecursionError):
            raise
        except Exception as e:  # whatever the template raises
            results.append([None, f"{type(e).__name__}: {e}"[:200]])
            continue
        if len(text) > MAX_TEXT:
            raise ValueError("the rendered text is too long")
        results.append([text, None])
    json.dump(results, sys.stdout)


def to_json(value, indent=None, ensure_ascii=False, separators=None, sort_keys=False):
    """Jinja's own would escape <, > and & for HTML; transformers' does not."""
    return json.dumps(
        value,
        indent=indent,
        ensure_ascii=ensure_ascii,
        separators=separators,
        sort_keys=sort_keys,
    )


main()
