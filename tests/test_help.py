"""Every command line says what it takes."""

import argparse
import glob
import importlib

import pytest

from nanospin import config

SCRIPTS = [
    f
    for f in sorted(
        glob.glob("*.py")
        + glob.glob("data/**/*.py", recursive=True)
        + glob.glob("tests/*/__main__.py")
    )
    if "__name__ == " in open(f, encoding="utf-8").read()
]


def actions(parser):
    """Its arguments, and those of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action._choices_actions
            for command in action.choices.values():
                yield from actions(command)
        else:
            yield action


def test_scripts_are_found():
    assert {
        "train.py",
        "sample.py",
        "eval.py",
        "plot.py",
        "data/show.py",
        "data/jsonl/prepare.py",
        "tests/faults/__main__.py",
    } <= set(SCRIPTS)


@pytest.mark.parametrize("path", SCRIPTS)
def test_help(path, monkeypatch, capsys):
    """--help prints what the script is and ends with status 0; every option of argparse's has a text."""
    parsers, print_help = [], argparse.ArgumentParser.print_help
    monkeypatch.setattr(
        argparse.ArgumentParser,
        "print_help",
        lambda parser, file=None: (parsers.append(parser), print_help(parser, file)),
    )
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    try:
        module.main(["--help"])
    except SystemExit as e:
        assert not e.code
    said = capsys.readouterr()
    assert (config if path == "train.py" else module).__doc__.splitlines()[
        0
    ] in said.out and not said.err
    with open(path, encoding="utf-8") as f:
        text = f.read()
    assert len(parsers) == ("ArgumentParser(" in text or "hub.arguments(" in text)
    for action in (action for parser in parsers for action in actions(parser)):
        assert action.help, f"{path}: {action.dest} has no help text"
    if path == "train.py":
        assert all(f"\n    {name}: " in said.out for name in vars(config.Config()))
