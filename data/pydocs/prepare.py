"""The documentation of the Python packages that are installed anyway, read with `ast`: nothing is imported, no network.

    python -m data.pydocs.prepare

{train,val}.bin    every docstring of the standard library, numpy, torch and datasets, under its name and signature
{train,val}.jsonl  "What does `name(signature)` do?" -> the docstring's first paragraph
bpe.tiktoken       a byte-level BPE of 4,096 ids trained on train.bin's text

Split by module: no docstring of a validation module is in the training stream or rows. Counts change with versions.
"""

import argparse
import ast
import importlib.metadata
import importlib.util
import os
import platform
import sysconfig

from tqdm import tqdm

from data.folder import split_of, write_meta, write_stream
from data import tokenizer
from data.rows import write_rows

PACKAGES = ["numpy", "torch", "datasets"]
HERE = os.path.dirname(os.path.abspath(__file__))


def sources():
    """(module, path) of every source file, tests left out."""
    roots = [("", sysconfig.get_paths()["stdlib"])]
    roots += [
        (name, importlib.util.find_spec(name).submodule_search_locations[0]) for name in PACKAGES
    ]
    for package, root in roots:
        for folder, names, files in os.walk(root):
            names[:] = sorted(
                n
                for n in names
                if n.isidentifier()
                and n
                not in (
                    "site_packages",
                    "test",
                    "tests",
                    "testing",
                    "idlelib",
                    "lib2to3",
                    "__pycache__",
                )
            )
            parts = [
                p
                for p in [package, *os.path.relpath(folder, root).split(os.sep)]
                if p not in ("", ".")
            ]
            for file in sorted(files):
                if file.endswith(".py"):
                    yield (
                        ".".join(parts + ([] if file == "__init__.py" else [file[:-3]]))
                        or "builtins",
                        os.path.join(folder, file),
                    )


def documented(module, path):
    """(qualified name, signature, docstring) of everything documented in a file; signature None for modules and classes."""
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
    """The first paragraph on one line, if it is a sentence of some length."""
    text = " ".join(doc.strip().split("\n\n")[0].split())
    return text if 15 <= len(text) <= 300 and len(text.split()) >= 3 else None


def main(argv=None):
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    texts, rows, seen_docs, seen_rows = (
        {"train": [], "val": []},
        {"train": [], "val": []},
        set(),
        set(),
    )
    for module, path in tqdm(list(sources()), desc="reading docstrings", disable=None):
        split = split_of(module, 0.08)
        for name, signature, doc in documented(module, path):
            if doc not in seen_docs:
                seen_docs.add(doc)
                texts[split].append(
                    f"{name}({signature})\n\n{doc}" if signature is not None else f"{name}\n\n{doc}"
                )
            short = name[len(module) + 1 :]
            if signature is None or not summary(doc) or len(signature) > 160:
                continue
            row = f"What does `{short}({signature})` do?", summary(doc)
            if row not in seen_rows:
                seen_rows.add(row)
                rows[split].append({"prompt": row[0], "responses": [row[1]], "group": module})
    print("training the tokenizer")
    enc = tokenizer.train(texts["train"], 4096)
    tokenizer.save(enc, os.path.join(HERE, "bpe.tiktoken"))
    sizes = {}
    for split in ("train", "val"):
        sizes[f"{split}_tokens"] = write_stream(
            os.path.join(HERE, f"{split}.bin"), texts[split], enc
        )
        sizes[f"{split}_rows"] = len(rows[split])
        write_rows(os.path.join(HERE, f"{split}.jsonl"), rows[split])
    versions = {name: importlib.metadata.version(name) for name in PACKAGES} | {
        "python": platform.python_version()
    }
    write_meta(HERE, "bpe.tiktoken", versions, **sizes)
    print("data/pydocs: " + ", ".join(f"{n:,} {what}" for what, n in sizes.items()))


if __name__ == "__main__":
    main()
