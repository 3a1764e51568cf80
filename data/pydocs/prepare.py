"""The documentation of installed Python packages, read with `ast`. Nothing is imported; no network.

    python -m data.pydocs.prepare

Writes

    train.bin, val.bin        every docstring of the standard library, numpy, torch and datasets,
                              after its name and signature
    train.jsonl, val.jsonl    "What does `name(signature)` do?" -> the docstring's first paragraph
    bpe.tiktoken              a byte-level BPE of 4,096 ids, trained on the training docstrings

The split is by module. Modules repeat some of each other's docstrings: one of both sides is kept
where it is read first, and of the rows of validation 3 % have the response of a training row. Sizes
depend on the versions of the packages.
"""

import ast
import importlib.metadata
import importlib.util
import os
import platform
import sys
import sysconfig

from data import cli, tokenizer
from data.folder import lock_folder, split_of, write_meta, write_stream
from data.progress import ProgressBar
from data.rows import write_rows

HERE = os.path.dirname(os.path.abspath(__file__))
PACKAGES = ["numpy", "torch", "datasets"]
SKIPPED_FOLDERS = (
    "site_packages",
    "test",
    "tests",
    "testing",
    "idlelib",
    "lib2to3",
    "__pycache__",
)


def sources():
    """Yield (module, path) of every source file, tests left out."""
    yield from sources_below("", sysconfig.get_paths()["stdlib"])
    for package in PACKAGES:
        root = importlib.util.find_spec(package).submodule_search_locations[0]
        yield from sources_below(package, root)


def sources_below(package, root):
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(
            name for name in subfolders if name.isidentifier() and name not in SKIPPED_FOLDERS
        )
        parts = [package, *os.path.relpath(folder, root).split(os.sep)]
        parts = [part for part in parts if part not in ("", ".")]
        for file in sorted(files):
            if file.endswith(".py"):
                names = parts if file == "__init__.py" else [*parts, file.removesuffix(".py")]
                yield ".".join(names) or "builtins", os.path.join(folder, file)


def documented(module, path):
    """Yield (qualified name, signature, docstring) of everything documented in a file.

    The signature is None for modules and classes.
    """
    try:
        with open(path, encoding="utf-8") as f:
            tree = ast.parse(f.read())
    except (SyntaxError, ValueError):
        return
    stack = [(tree, module)]
    while stack:
        node, name = stack.pop()
        doc = ast.get_docstring(node)
        if doc:
            is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            yield name, ast.unparse(node.args) if is_function else None, doc
        for child in getattr(node, "body", []):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                stack.append((child, f"{name}.{child.name}"))


def summary(doc):
    """The first paragraph on one line, or None if it is too short or too long for a sentence."""
    text = " ".join(doc.strip().split("\n\n")[0].split())
    return text if 15 <= len(text) <= 300 and len(text.split()) >= 3 else None


def read_docstrings():
    """Returns ({side: texts}, {side: rows}), each docstring and each row once."""
    texts = {"train": [], "val": []}
    rows = {"train": [], "val": []}
    seen_docs, seen_rows = set(), set()
    for module, path in ProgressBar(list(sources()), desc="reading docstrings"):
        side = split_of(module, 0.08)
        for name, signature, doc in documented(module, path):
            if doc not in seen_docs:
                seen_docs.add(doc)
                title = name if signature is None else f"{name}({signature})"
                texts[side].append(f"{title}\n\n{doc}")
            response = summary(doc)
            if signature is None or not response or len(signature) > 160:
                continue
            short_name = name[len(module) + 1 :]
            prompt = f"What does `{short_name}({signature})` do?"
            if (prompt, response) not in seen_rows:
                seen_rows.add((prompt, response))
                rows[side].append({"prompt": prompt, "responses": [response], "group": module})
    return texts, rows


def main(argv=None):
    parser = cli.ArgumentParser(description=__doc__)
    parser.parse_args(argv)
    texts, rows = read_docstrings()

    print("training the tokenizer")
    enc = tokenizer.train(texts["train"], 4096)
    with lock_folder(HERE):
        tokenizer.save_into(HERE, enc, "bpe.tiktoken")
        sizes = {}
        for side in ("train", "val"):
            path = os.path.join(HERE, f"{side}.bin")
            sizes[f"{side}_tokens"] = write_stream(path, texts[side], enc)
            sizes[f"{side}_rows"] = len(rows[side])
            write_rows(os.path.join(HERE, f"{side}.jsonl"), rows[side])
        versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        versions["python"] = platform.python_version()
        write_meta(HERE, "bpe.tiktoken", versions, **sizes)
    print("data/pydocs: " + ", ".join(f"{n:,} {what}" for what, n in sizes.items()))


if __name__ == "__main__":
    sys.exit(cli.run(main))
