"""Every command line explains itself."""

import argparse
import contextlib
import importlib
import sys

import pytest
from conftest import source_files

from model import GPTConfig
from nanospin import config


def scripts():
    """The files that can be run: as a file in the root, else as a module."""
    found = []
    for path in source_files():
        with open(path, encoding="utf-8") as f:
            if 'if __name__ == "__main__"' in f.read():
                found.append(path)
    return found


def test_scripts_are_found():
    expected = {"train.py", "sample.py", "eval.py", "tools/plot.py", "data/jsonl/prepare.py"}
    assert expected <= set(scripts())


def arguments(parser):
    """The arguments of a parser, and those of its subcommands."""
    for action in parser._actions:
        if not isinstance(action, argparse._SubParsersAction):
            yield action
            continue
        yield from action._choices_actions
        for subparser in action.choices.values():
            yield from arguments(subparser)


@pytest.mark.parametrize("path", [path for path in scripts() if not path.endswith("train.py")])
def test_help(path, monkeypatch, capsys):
    """--help prints what the script is and exits with 0. Every argument has a text."""
    parsers = []
    print_help = argparse.ArgumentParser.print_help

    def record(parser, file=None):
        parsers.append(parser)
        print_help(parser, file)

    monkeypatch.setattr(argparse.ArgumentParser, "print_help", record)
    monkeypatch.setattr(sys, "argv", [path, "--help"])
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    with contextlib.suppress(SystemExit):
        module.main(["--help"])
    printed = capsys.readouterr()
    assert module.__doc__.splitlines()[0] in printed.out
    assert not printed.err
    for parser in parsers:
        for action in arguments(parser):
            assert action.help, f"{path}: {action.dest} has no help text"


def test_help_of_train_lists_every_setting():
    text = config.help_text(GPTConfig, config.Config)
    names = [*vars(config.Config()), *vars(GPTConfig())]
    for name in names:
        assert f"\n    {name}: " in text, name
    for group in ("run", "data", "self-play", "optimization", "objective", "ppo"):
        assert f"# ---- {group}" in text
