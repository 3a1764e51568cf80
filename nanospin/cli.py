"""What the command lines share: a parser with one-line errors, and argument types."""

import argparse
import sys
from collections.abc import Callable

from data.files import printable


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser with two changes: the description keeps its line breaks, and an error exits
    with one escaped line, without the usage."""

    def __init__(self, **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options)

    def error(self, message: str):
        sys.exit(printable(message))


def number_type(kind: type, least: float, most: float = float("inf")) -> Callable:
    """An argparse type: an int or float in [least, most]."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, got {text!r}")
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        if value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got {text}")
        return value

    return parse


def device_type(text: str) -> str:
    """An argparse type: a device that is present."""
    if text != "cpu" and text != default_device():
        raise argparse.ArgumentTypeError(f"must be cpu, or cuda if torch sees a GPU, got {text!r}")
    return text


def default_device() -> str:
    import torch  # takes a second, and most command lines do not need it

    return "cuda" if torch.cuda.is_available() else "cpu"
