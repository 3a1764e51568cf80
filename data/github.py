"""Files of a GitHub repository at a fixed commit, for data sets that are not on the hub.

--source is a folder. The archive of a repository at its commit is downloaded into it once, as
NAME.tar.gz. Without a network put that file there, or a clone of the repository as NAME/.
"""

import hashlib
import http.client
import os
import re
import tarfile
import urllib.request
import zlib
from dataclasses import dataclass

from data import cli, hub
from data.files import atomic_write, check_output, printable
from data.folder import check_other_data, lock_folder, split_of
from data.progress import ProgressBar
from data.rows import write_ranked_folder

ARCHIVES = "https://codeload.github.com"
MAX_ARCHIVE = 2**29  # bytes; the largest one that is read here has about 2**26
MAX_FILE = 2**24  # bytes of a file inside


@dataclass(frozen=True)
class Repository:
    """A repository, and the files of it that a data set is made of."""

    name: str  # owner/name
    commit: str  # 40 hexadecimal digits
    pattern: str  # a regular expression for the whole path of a file that is read
    checksum: str  # `checksum` of these files

    def folder_name(self) -> str:
        return self.name.split("/")[1]


def add_options(parser: cli.ArgumentParser, script: str):
    """The options of a prepare.py for such a data set. script: the prepare.py; its folder is the
    default of --out."""
    add_source(parser)
    hub.add_val_share(parser, 0.1)
    out = os.path.dirname(os.path.abspath(script))
    parser.add_argument("--out", default=out, help="data folder to write")


def add_source(parser: cli.ArgumentParser):
    parser.add_argument(
        "--source",
        help="folder with the archive NAME.tar.gz or a clone NAME/ of each repository; what is"
        " missing is downloaded into it (default: OUT/source)",
    )


def read_files(repository: Repository, args) -> tuple[dict[str, str], str]:
    """The repository's files that match its pattern, {path: text} in the order of the paths, and
    the source as meta.json names it.

    Files of another commit are read too: then the source has no commit, and a line says so. Exits
    with one line if nothing can be read or downloaded.
    """
    source = args.source or os.path.join(args.out, "source")
    tree = os.path.join(source, repository.folder_name())
    archive = f"{tree}.tar.gz"
    if os.path.isdir(tree):
        path, files = tree, read_tree(tree, repository.pattern)
    else:
        if not os.path.exists(archive):
            os.makedirs(source, exist_ok=True)
            download(repository, archive)
        path, files = archive, read_archive(archive, repository.pattern)
    if not files:
        raise SystemExit(f"{path}: none of its files is named {repository.pattern}")
    files = dict(sorted(files.items()))
    if checksum(files) == repository.checksum:
        return files, f"{repository.name} @ {repository.commit}"
    print(f"{path}: not the files of {repository.name} @ {repository.commit}")
    return files, repository.name


def checksum(files: dict[str, str]) -> str:
    """The first 32 digits of a SHA-256 of the paths and the texts, in the order of the paths."""
    digest = hashlib.sha256()
    for path in sorted(files):
        text = hashlib.sha256(files[path].encode()).hexdigest()
        digest.update(f"{path}\n{text}\n".encode())
    return digest.hexdigest()[:32]


def download(repository: Repository, path: str):
    """Download the archive of the repository at its commit."""
    url = f"{ARCHIVES}/{repository.name}/tar.gz/{repository.commit}"
    try:
        with urllib.request.urlopen(url, timeout=60) as response, atomic_write(path, "wb") as f:
            bar = ProgressBar(desc=repository.name, unit="B", unit_scale=True)
            while block := response.read(2**20):
                f.write(block)
                bar.update(len(block))
                if f.tell() > MAX_ARCHIVE:
                    raise SystemExit(f"{url}: more than {MAX_ARCHIVE:,} bytes")
            bar.close()
    except (OSError, http.client.HTTPException) as e:  # URLError is an OSError
        raise SystemExit(
            printable(
                f"{url}: {e}; without a network give a folder that holds"
                f" {os.path.basename(path)} or a clone {repository.folder_name()}/: --source=FOLDER"
            )
        )


def read_archive(path: str, pattern: str) -> dict[str, str]:
    """{path: text} of the regular files in a .tar.gz. Nothing is unpacked to the disk. The paths
    are without their first part, which GitHub adds."""
    files = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = member.name.partition("/")[2]
                if member.isfile() and re.fullmatch(pattern, name):
                    files[name] = decode(archive.extractfile(member).read(MAX_FILE + 1), name, path)
    except (OSError, EOFError, tarfile.TarError, zlib.error) as e:
        raise SystemExit(printable(f"{path} is damaged ({e}); remove it and try again"))
    return files


def read_tree(folder: str, pattern: str) -> dict[str, str]:
    """The same of a folder. Links are not followed."""
    files = {}
    for parent, _, names in os.walk(folder):
        for file_name in names:
            path = os.path.join(parent, file_name)
            name = os.path.relpath(path, folder).replace(os.sep, "/")
            if re.fullmatch(pattern, name) and os.path.isfile(path) and not os.path.islink(path):
                with open(path, "rb") as f:
                    files[name] = decode(f.read(MAX_FILE + 1), name, folder)
    return files


def decode(content: bytes, name: str, where: str) -> str:
    if len(content) > MAX_FILE:
        raise SystemExit(printable(f"{where}: {name} has more than {MAX_FILE:,} bytes"))
    try:
        return content.decode()
    except UnicodeDecodeError as e:
        raise SystemExit(printable(f"{where}: {name} is not UTF-8: {e.reason}"))


def group_name(kind: str, text: str) -> str:
    """A group: two texts that differ only in case and punctuation are in the same one.

    ("gsm", "How many, Ann?") -> "gsm:how many ann".
    """
    return f"{kind}:" + re.sub("[^a-z0-9]+", " ", text.lower()).strip()


def check_folder(folder: str):
    """Exit with one line if no data folder of rows may be written there."""
    check_output(os.path.join(folder, "meta.json"), is_data=True)
    check_other_data(folder, (".jsonl",))


def write_split(folder: str, rows: list[dict], source, val_share: float):
    """Write a data folder of rows with a `group`, split by a hash of it."""
    sides = {"train": [], "val": []}
    for row in rows:
        sides[split_of(row["group"], val_share)].append(row)
    for side, its_rows in sides.items():
        if not its_rows:
            raise SystemExit(
                f"{folder}: no row of {len(rows)} was assigned to {side}; use another --val_share"
            )
    with lock_folder(folder):
        write_ranked_folder(folder, None, source, sides["train"], sides["val"])
