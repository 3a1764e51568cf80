"""tldr-pages: a task and its shell command, and a command and its description.

    python -m data.tldr_pages.prepare
    python -m data.tldr_pages.prepare --commands=0      # every command of a page

The English pages of github.com/tldr-pages/tldr for Linux, macOS, Windows and those common to all:
7,315 pages with 7,302 descriptions and 31,745 commands, of which one per page is kept (CC BY 4.0;
who gives rows on must name the tldr-pages team and contributors). Writes train.jsonl and val.jsonl,
K = 1. The command is the group: its pages for several platforms stay together.

- `{{placeholders}}` become their text, `{{[-s|--long]}}` the long option, escaped braces braces.
- The brackets of mnemonics, "[c]reate", are removed from the tasks.
- Notes, links and "See also" are left out of the descriptions.
- Which command of a page is kept is a hash of its task.

`data.tldr` is another set: Reddit posts and their summaries.
"""

import hashlib
import re
import sys

from data import cli, github

PLATFORMS = {"common": "", "linux": "", "osx": " on macOS", "windows": " on Windows"}
OPENING, CLOSING = "\x00", "\x01"  # stand for braces that are no placeholder's
REPOSITORY = github.Repository(
    "tldr-pages/tldr",
    "08e345f42639f67d99282813247ac670dc6e87cb",
    r"pages/(common|linux|osx|windows)/[^/]+\.md",
    "7dc9ed4bd0e6c1cfd5f8725ae888e2e7",
)


def page_rows(path: str, text: str, num_commands: int) -> list[dict]:
    """The rows of a page: its description, and `num_commands` of its commands (0: all)."""
    platform = PLATFORMS[path.split("/")[1]]
    title, task, descriptions, commands = "", "", [], []
    for line in text.splitlines():
        if line.startswith("# "):
            title = line[2:].strip()
        elif line.startswith("> "):
            if not re.search("^> *(More information|See also|Note:)|<http", line):
                descriptions.append(line[2:].strip())
        elif line.startswith("- "):
            task = re.sub(r"\[(\w+)\]", r"\1", line[2:].strip().rstrip(":"))
        elif line.startswith("`"):
            commands.append((task, plain_command(code_text(line.strip()))))
    if num_commands:
        commands.sort(key=lambda command: hashlib.sha256(command[0].encode()).digest())
        commands = commands[:num_commands]

    rows = []
    if descriptions:
        rows.append((f"What does the command `{title}` do{platform}?", " ".join(descriptions)))
    for task, command in commands:
        prompt = f"Write a shell command that uses `{title}`{platform} for this task: {task}."
        rows.append((prompt, command))
    group = github.group_name("tldr", title)
    return [{"prompt": prompt, "responses": [text], "group": group} for prompt, text in rows]


def code_text(code: str) -> str:
    """The text between backticks, one or more on each side."""
    ticks = len(code) - len(code.lstrip("`"))
    text = code[ticks:-ticks]
    return text.strip() if ticks > 1 else text


def plain_command(command: str) -> str:
    """A command without the marks of its placeholders; of an option's two forms the long one.

    "tar {{[-x|--extract]}} {{file}}" -> "tar --extract file". Braces behind backslashes are
    braces.
    """
    command = command.replace(r"\{\{", OPENING).replace(r"\}\}", CLOSING)
    inside = r"((?:(?!\}\}).)*?)"  # one pair of braces
    command = re.sub(rf"\{{\{{\[{inside}\|{inside}\]\}}\}}", r"\2", command)
    command = re.sub(r"\{\{(.*?)\}\}", r"\1", command)
    return command.replace(OPENING, "{{").replace(CLOSING, "}}")


def main(argv=None):
    parser = cli.ArgumentParser(description=__doc__)
    github.add_options(parser, __file__)
    parser.add_argument(
        "--commands",
        type=cli.number_type(int, 0),
        default=1,
        help="commands of a page; 0: all",
    )
    args = parser.parse_args(argv)
    github.check_folder(args.out)
    files, source = github.read_files(REPOSITORY, args)
    rows = []
    for path, text in files.items():
        rows += page_rows(path, text, args.commands)
    github.write_split(args.out, rows, source, args.val_share)


if __name__ == "__main__":
    sys.exit(cli.run(main))
