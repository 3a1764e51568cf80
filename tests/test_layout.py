"""The shape of the house: who may import whom, one backward pass, files that stay small."""

import ast
import glob

OURS = {
    "train",
    "log",
    "board",
    "optim",
    "ppo",
    "rollout",
    "eval",
    "sample",
    "model",
    "attention",
    "loss",
    "parallel",
    "launch",
    "begin",
    "checkpoint",
    "data",
    "config",
    "plot",
    "bench",
    "taylor",
    "calibration",
    "frontier",
    "hf",
    "peers",
    "rebuild",
    "report",
}
MAY_IMPORT = {
    "loss": set(),
    "attention": set(),
    "config": set(),
    "optim": set(),
    "parallel": set(),
    "plot": set(),
    "peers": {"train", "loss", "data"},
    "data": {"data"},
    "data/show.py": {"data", "checkpoint", "config"},
    "taylor": {"plot"},
    "calibration": {"eval", "data"},
    "log": {"parallel", "data"},
    "board": {"parallel", "data"},
    "launch": {"parallel"},
    "begin": {"ppo", "checkpoint", "parallel", "data", "config"},
    "model": {"loss", "attention"},
    "checkpoint": {"config", "parallel", "data", "model"},
    "sample": {"attention", "data", "checkpoint", "parallel"},
    "hf": {"model", "checkpoint", "config", "data"},
    "report": {"report", "plot", "config", "data", "checkpoint"},
    "eval": {"report", "loss", "sample", "data", "checkpoint", "parallel"},
    "rollout": {"launch", "log", "eval", "sample", "data", "checkpoint", "parallel"},
    "rebuild": {"train", "rollout", "launch", "log", "data", "checkpoint", "config", "parallel"},
    "ppo": {"launch", "rollout", "eval", "loss", "data", "checkpoint", "parallel"},
    "train": OURS
    - {"train", "plot", "bench", "peers", "taylor", "frontier", "hf", "rebuild", "report"},
    "bench": OURS - {"plot", "bench", "taylor", "frontier", "hf", "rebuild", "report"},
    "frontier": {"train", "eval", "plot", "sample", "data", "checkpoint", "parallel"},
}


def files():
    found = [
        f
        for f in glob.glob("*.py")
        + glob.glob("config/__init__.py")
        + glob.glob("report/*.py")
        + glob.glob("data/**/*.py", recursive=True)
    ]
    return {f: open(f, encoding="utf-8").read() for f in found}


def module(path):
    """What a file is part of: of data/ the command line beside it is none, so nobody imports it."""
    return path if path in MAY_IMPORT else path.split("/")[0].removesuffix(".py")


def test_imports_point_down():
    assert {module(f) for f in files()} == set(MAY_IMPORT)
    for path, text in files().items():
        for node in ast.walk(ast.parse(text)):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for name in names:
                top = name.split(".")[0]
                assert top not in OURS or top in MAY_IMPORT[module(path)], f"{path} imports {name}"


def test_one_backward():
    calls = [
        (path, node.lineno)
        for path, text in files().items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "backward"
    ]
    assert len(calls) == 1 and calls[0][0] == "train.py"


def test_no_module_does_two_jobs():
    for path, text in files().items():
        assert len(text.splitlines()) <= 420, path
