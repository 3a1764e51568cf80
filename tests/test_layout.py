"""The shape of the repository: which way imports point, and that there is one backward pass."""

import ast

import pytest
from conftest import source_files

# each may import those before it
ROOT_MODULES = ["loss", "model", "sample", "eval", "scorer", "players", "rollout", "ppo", "train"]

# a package may import these packages, and itself
PACKAGES = {
    "data": set(),
    "nanospin": {"data"},
    "tools": {"data", "nanospin", *ROOT_MODULES},
    "studies": {"data", "nanospin", "tools", *ROOT_MODULES},
    "bench": {"data", "nanospin", "tools", *ROOT_MODULES},
}


def imported_packages(path):
    """The first part of every module that a file imports, anywhere in it."""
    with open(path, encoding="utf-8") as f:
        tree = ast.parse(f.read())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def allowed_imports(path):
    name = path.split("/")[0].removesuffix(".py")
    if name in PACKAGES:
        return PACKAGES[name] | {name}
    return {"data", "nanospin", *ROOT_MODULES[: ROOT_MODULES.index(name)]}


@pytest.mark.parametrize("path", source_files())
def test_imports_point_down(path):
    ours = set(PACKAGES) | set(ROOT_MODULES)
    for package in imported_packages(path):
        assert package not in ours or package in allowed_imports(path), package


def test_there_is_one_backward_pass():
    calls = []
    for path in source_files():
        with open(path, encoding="utf-8") as f:
            tree = ast.parse(f.read())
        for node in ast.walk(tree):
            is_method = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if is_method and node.func.attr == "backward":
                calls.append(path)
    assert calls == ["train.py"]
