"""Render a chat template in a process of its own; data/template.py starts it.

A chat template is a program: it can loop for hours or fill the memory. So it runs here, in Jinja's
sandbox as in transformers, with limits of time and memory. Reads from standard input a JSON object
with the template's source, conversations and special tokens. Writes a JSON list of texts.
"""

import contextlib
import json
import resource
import sys

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 2  # of computing
MAX_MEMORY = 2**30  # bytes
MAX_TEXT = 2**20  # characters


def main():
    job = json.load(sys.stdin)
    with contextlib.suppress(ValueError, OSError):  # some systems have no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))

    def raise_exception(message):
        raise TemplateError(message)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    env.globals["raise_exception"] = raise_exception
    chat_template = env.from_string(job["source"])
    texts = []
    for messages in job["conversations"]:
        text = chat_template.render(
            messages=messages,
            add_generation_prompt=True,
            tools=None,
            documents=None,
            **job["special_tokens"],
        )
        if len(text) > MAX_TEXT:
            raise ValueError("the rendered text is too long")
        texts.append(text)
    json.dump(texts, sys.stdout)


main()
