"""Files."""

import hashlib
import json
import os
import re
import numpy as np


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_json(path, value):
    """Write beside and rename, so that the file is whole or absent."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1, ensure_ascii=False)
        f.write("\n")
    os.replace(path + ".tmp", path)


def read_json(path, need=(), advice=""):
    """The object in a JSON file, with the names in `need`. Exits with one line if it is not there."""
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except OSError as e:
        raise SystemExit(f"{path}: {e.strerror}{advice}")
    except (ValueError, RecursionError) as e:
        raise SystemExit(f"{path} is not JSON ({e}){advice}")
    missing = [name for name in need if name not in value] if isinstance(value, dict) else need
    if missing or not isinstance(value, dict):
        raise SystemExit(f"{path} is not what it should be: it has no {', '.join(missing)}{advice}")
    return value


def read_arrays(path):
    """The arrays of an .npz file, by name; none of objects, which would be pickles. Exits with one line if it cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as f:
            return {name: f[name] for name in f.files}
    except Exception as e:  # numpy and zipfile raise many kinds
        raise SystemExit(f"{path} is damaged: it is no .npz file of numbers ({type(e).__name__})")


def printable(text):
    """A text for a terminal, which must not obey it: control characters but newline and tab are escaped."""
    return re.sub(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", lambda found: ascii(found[0])[1:-1], text
    )
