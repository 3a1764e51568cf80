"""Tokenizers. Each has encode_ordinary(text), decode(ids), n_vocab and eot_token.

There are two kinds:

    tiktoken.Encoding    "gpt2", "bytes", or a byte-level BPE that `train` made. Its file is
                         .tiktoken, in tiktoken's own format: on each line base64 of a token's
                         bytes, a space, its rank. End-of-text is the last id.
    JsonTokenizer        any other model's tokenizer.json (of the `tokenizers` package), with the
                         tokenizer_config.json beside it.
"""

import base64
import contextlib
import functools
import gc
import hashlib
import json
import os
import re

import tiktoken

from data.files import (
    atomic_write,
    check_foreign,
    check_input,
    printable,
    read_json,
    read_text,
    write_json,
)

# GPT-2's regular expression that cuts text before merging (tiktoken_ext/openai_public.py).
# ByteLevel of the `tokenizers` package does the same.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
EOT = "<|endoftext|>"

# Longer runs of characters of one kind are encoded in pieces of this length: tiktoken's regular
# expression fails on a million spaces, and the time of a merge grows faster than its length.
MAX_RUN = 10_000
RUNS = re.compile(r"\s+|[^\W\d_]+|\d+|(?:[^\w\s]|_)+")  # of spaces, letters, digits, others

MAX_VOCAB = 2**24  # ids of a tokenizer.json

# How many times as long the steps of a tokenizer.json may make a text, and what each step can do:
# U+FDFA has 18 characters in compatibility forms.
MAX_GROWTH = 1000
NORMALIZER_GROWTH = {"NFKC": 18, "NFKD": 18, "Precompiled": 18, "BertNormalizer": 3, "ByteLevel": 4}


# ---- load, train, save


def load(name: str):
    """Load a tokenizer: "gpt2", "bytes", the path of a .tiktoken file or of a tokenizer.json.

    Exits with one line if it cannot.
    """
    if name == "gpt2":
        return load_gpt2()
    if name == "bytes":
        return make_encoding("bytes", {bytes([i]): i for i in range(256)})
    if name.endswith(".json"):
        return load_json(name)
    return load_tiktoken(name)


def load_gpt2() -> tiktoken.Encoding:
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as e:  # tiktoken raises whatever its HTTP client does
        raise SystemExit(
            f"tokenizer gpt2: tiktoken could not download the vocabulary ({type(e).__name__});"
            " without a network set TIKTOKEN_CACHE_DIR to a folder that holds it"
        )


def load_tiktoken(path: str) -> tiktoken.Encoding:
    ranks = {}
    try:
        check_input(path)
        with open(path, "rb") as f:
            for line in f:
                text, rank = line.split()
                token = base64.b64decode(text, validate=True)
                if token in ranks:
                    raise ValueError("a token occurs twice")
                ranks[token] = int(rank)
    except OSError as e:
        raise SystemExit(
            f"tokenizer {path}: {e.strerror};"
            " a tokenizer is gpt2, bytes, a .tiktoken file or a tokenizer.json"
        )
    except ValueError:
        raise SystemExit(f"tokenizer {path}: not a .tiktoken file (lines of base64 token and rank)")
    has_every_byte = all(bytes([i]) in ranks for i in range(256))
    if not has_every_byte or sorted(ranks.values()) != list(range(len(ranks))):
        raise SystemExit(f"tokenizer {path}: ranks must be 0..n-1 and hold every byte")
    return make_encoding(os.path.basename(path), ranks)


def make_encoding(name: str, ranks: dict) -> tiktoken.Encoding:
    """A byte-level BPE from {token in bytes: rank}, with end-of-text as the last id."""
    return tiktoken.Encoding(
        name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)}
    )


def load_for_data(name: str):
    """`load` a tokenizer that a user names for new data.

    Warns of tokens that GPT-2's regular expression cuts, such as those of cl100k_base: they were
    made with another one, which a .tiktoken file does not hold. Of a tokenizer.json see
    `say_unmarked_stops`.
    """
    enc = load(name)
    if isinstance(enc, JsonTokenizer):
        say_unmarked_stops(enc)
        return enc
    cut = []
    for token, rank in enc._mergeable_ranks.items():
        try:
            text = token.decode()
        except UnicodeDecodeError:  # a part of a character
            continue
        if enc.encode_ordinary(text) != [rank]:
            cut.append(text)
    if cut:
        print(
            f"warning: {printable(name)}: {len(cut):,} of {enc.n_vocab:,} tokens, as {cut[0]!r}, "
            "are of another regular expression than GPT-2's, which cuts texts here: ids will not "
            "be those of the tokenizer's authors; give a tokenizer.json for these"
        )
    return enc


def say_unmarked_stops(enc):
    """Warn of stop tokens that a text can contain, because a tokenizer.json does not mark them as
    special or has them in its vocabulary: it ends a response or a document there."""
    for text, token_id in stop_ids(enc).items():
        if token_id in encode(enc, text, "within"):
            print(
                f"warning: where the data's texts contain {printable(text)!r}, the tokenizer makes "
                "it the token that ends a response"
            )


def train(texts, vocab_size: int) -> tiktoken.Encoding:
    """Train a byte-level BPE on an iterable of texts: vocab_size ids, end-of-text the last one."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    vocab = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    return make_encoding("bpe", {token_bytes(token): i for token, i in vocab})


def save(enc, path: str):
    """Write a .tiktoken file, or a tokenizer.json and the tokenizer_config.json beside it."""
    if isinstance(enc, JsonTokenizer):
        to_json(enc, path)
        config = {"eos_token": enc.eos, "tokenizer_class": "PreTrainedTokenizerFast"}
        if enc.stop_tokens != [enc.eos]:
            config["stop_tokens"] = enc.stop_tokens
        write_json(config_path(path), config)
        return
    with atomic_write(path, "wb") as f:
        for token, rank in by_rank(enc._mergeable_ranks):
            f.write(base64.b64encode(token) + b" " + str(rank).encode() + b"\n")


def file_name(enc, name: str) -> str:
    """The name of a tokenizer in a checkpoint or data folder: "gpt2", "bytes" or its file."""
    if name in ("gpt2", "bytes"):
        return name
    return "tokenizer.json" if isinstance(enc, JsonTokenizer) else "tokenizer.tiktoken"


def load_into(folder: str, name: str):
    """Load "gpt2", "bytes" or a tokenizer file, and copy the file to a data folder.

    Returns (tokenizer, its name in that folder's meta.json).
    """
    enc, source = load(name), name
    name = file_name(enc, name)
    if name not in ("gpt2", "bytes"):
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, name)
        if not os.path.exists(path) or not os.path.samefile(path, source):
            save_into(folder, enc, name)
    return enc, name


def save_into(folder: str, enc, name: str):
    """`save` to a data folder. Exits with one line if a file of the user would be replaced."""
    names = [name]
    if isinstance(enc, JsonTokenizer):
        names.append(os.path.basename(config_path(name)))
    check_foreign(folder, names)
    save(enc, os.path.join(folder, name))


@functools.lru_cache(maxsize=4)  # each entry keeps its tokenizer in memory
def fingerprint(enc) -> str:
    """A checksum that is equal for equal tokenizers, whatever their files are called.

    It is the sha256 of every (token, id) pair; of a JsonTokenizer, of its text.
    """
    if isinstance(enc, JsonTokenizer):
        return hashlib.sha256(f"{enc.eos}\n{enc.text}".encode()).hexdigest()
    h = hashlib.sha256()
    for token, rank in by_rank(enc._mergeable_ranks):
        h.update(len(token).to_bytes(4, "big") + token + rank.to_bytes(4, "big"))
    return h.hexdigest()


def by_rank(ranks: dict) -> list:
    """[(token, rank)], lowest rank first."""
    return sorted(ranks.items(), key=lambda item: item[1])


# ---- use


def encode(enc, text: str, where: str = "start") -> list[int]:
    """The token ids of a text; special tokens in it are encoded as plain text.

    where: the text is at the "start" of what the model reads, after a "special" token, or continues
    "within" a text. Some tokenizers put a space before what they take for a beginning.

    A run of more than MAX_RUN characters of one kind is encoded in pieces. Exits with one line that
    shows how the text begins if the tokenizer fails on it.
    """
    if not may_have_long_run(text):
        return encode_piece(enc, text, where)
    ids = []
    for piece in cut_long_runs(text):
        ids += encode_piece(enc, piece, where)
        where = "within"
    return ids


def decode(enc, ids: list[int], where: str = "within") -> str:
    """The text of ids that `encode` made with the same `where`, or that a model sampled there: a
    space that was put before a beginning is taken away."""
    return enc.decode(ids, where) if isinstance(enc, JsonTokenizer) else enc.decode(ids)


def encode_piece(enc, text: str, where: str) -> list[int]:
    try:
        if isinstance(enc, JsonTokenizer):
            return enc.encode_ordinary(text, where)
        return enc.encode_ordinary(text)
    except (KeyboardInterrupt, MemoryError):
        raise
    except BaseException as e:  # both packages are in Rust, and their panics are no Exception
        raise SystemExit(
            f"the tokenizer cannot encode the text of {len(text):,} characters that begins with"
            f" {text[:60]!r} ({type(e).__name__}: {' '.join(str(e).split())[:200]})"
        )


def cut_long_runs(text: str) -> list[str]:
    """The text in pieces, cut inside of runs of more than MAX_RUN characters of one kind. The rest
    of a run, at least two characters, stays with what follows it."""
    pieces = []
    start = 0
    for run in RUNS.finditer(text):
        for end in range(run.start() + MAX_RUN, run.end() - 1, MAX_RUN):
            pieces.append(text[start:end])
            start = end
    return [*pieces, text[start:]]


def may_have_long_run(text: str) -> bool:
    """A quick test: whether a block of MAX_RUN / 2 characters has no space, or nothing else."""
    if len(text) <= MAX_RUN:
        return False
    length = MAX_RUN // 2
    for start in range(0, len(text) - length, length):
        block = text[start : start + length]
        if block.isspace() or len(block.split(None, 1)) < 2:
            return True
    return False


def encode_whole(enc, text: str) -> list[int]:
    """The ids of a text in which special tokens are recognised, as transformers encodes what a chat
    template writes."""
    if isinstance(enc, JsonTokenizer):
        return enc.encode_with_specials(text)
    return enc.encode(text, allowed_special="all")


def specials(enc) -> dict[str, int]:
    """The special tokens: {text: id}."""
    if isinstance(enc, JsonTokenizer):
        return enc.specials
    return {name: enc.encode_single_token(name) for name in enc.special_tokens_set}


def ordinary_ids(enc) -> set[int]:
    """The ids that a text can have."""
    ids = range(enc.n_vocab)
    if isinstance(enc, JsonTokenizer):
        ids = enc.full.get_vocab(with_added_tokens=True).values()
    return set(ids) - set(specials(enc).values())


def strips(enc, special: str) -> tuple[bool, bool]:
    """Whether a special token takes the white space before it, and after it, as Phi-3's do."""
    return enc.strips[special] if isinstance(enc, JsonTokenizer) else (False, False)


def takes_space(enc) -> bool:
    """Whether a special token of it takes white space."""
    return isinstance(enc, JsonTokenizer) and any(map(any, enc.strips.values()))


def has_token(enc, text: str) -> bool:
    """Whether a text is one token of its own, special or not."""
    if isinstance(enc, JsonTokenizer):
        return enc.full.token_to_id(text) is not None
    return text in specials(enc)


def eos(enc) -> str:
    """The text of the end-of-text token."""
    return enc.eos if isinstance(enc, JsonTokenizer) else EOT


def stop_ids(enc) -> dict[str, int]:
    """The tokens that end a sample: {text: id}, first the eos_token of the model as imported. In
    training a response ends in `eos`, which is one of them."""
    if isinstance(enc, JsonTokenizer):
        return {token: enc.full.token_to_id(token) for token in enc.stop_tokens}
    return {EOT: enc.eot_token}


def is_end(enc, token_id: int) -> bool:
    """Whether a token ends a sample."""
    return token_id == enc.eot_token or token_id in stop_ids(enc).values()


def begin(enc) -> str:
    """The text of the special tokens that the tokenizer itself puts before a text (such as <s>)."""
    return "".join(enc.full.id_to_token(i) for i in begin_ids(enc))


@functools.lru_cache(maxsize=4)  # each entry keeps its tokenizer in memory
def begin_ids(enc) -> tuple[int, ...]:
    """The ids of `begin`."""
    if not isinstance(enc, JsonTokenizer):
        return ()
    with_bos = enc.full.encode("a", add_special_tokens=True).ids
    first_id = enc.full.encode("a", add_special_tokens=False).ids[0]
    return tuple(with_bos[: with_bos.index(first_id)])


def document_ids(enc, text: str) -> list[int]:
    """The ids of a whole text, as the tokenizer itself begins it, and the end-of-text token."""
    return [*begin_ids(enc), *encode(enc, text), enc.eot_token]


# ---- tokenizer.json

PREFIX_SPACE_PARTS = ("normalizer", "pre_tokenizer", "decoder")  # they can add or remove a space


class JsonTokenizer:
    """A tokenizer.json with the methods of a tiktoken.Encoding.

    text: the file's content. eos: the text of the token that ends a response. stop_tokens: all
    tokens that end a response of the original model, its eos_token first; default: eos.

    BPE dropout (arXiv 1910.13267), which encodes a text otherwise each time, is off.

    Raises ValueError for a file whose steps could make a text much longer.
    """

    def __init__(self, text: str, eos: str, stop_tokens: list[str] | None = None):
        self.text = text
        self.eos = eos
        self.stop_tokens = stop_tokens or [eos]
        self.full, self.bare, only_first, self.is_byte_level, self.n_vocab = parse_backends(text)
        # "first": the space comes before the whole text only, else also after each special token
        self.backends = {
            "start": self.full,
            "special": self.bare if only_first else self.full,
            "within": self.bare,
        }
        self.puts_space = self.encode_ordinary("a") != self.encode_ordinary("a", "within")
        self.eot_token = self.full.token_to_id(eos)
        self.specials = {}  # {text: id}
        self.strips = {eos: (False, False)}  # {text: whether it takes the space before, after it}
        self.added = self.full.get_added_tokens_decoder()
        for i, token in self.added.items():
            if token.special:
                self.specials[token.content] = i
                self.strips[token.content] = token.lstrip, token.rstrip
        self.specials[eos] = self.eot_token

    def encode_ordinary(self, text: str, where: str = "start") -> list[int]:
        text = text.encode("utf-8", "replace").decode()  # half of a surrogate pair: "?"
        return self.backends[where].encode(text, add_special_tokens=False).ids

    def encode_with_specials(self, text: str) -> list[int]:
        """The ids that the `tokenizers` package gives by default, special tokens recognised."""
        self.full.encode_special_tokens = False
        ids = self.full.encode(text, add_special_tokens=False).ids
        self.full.encode_special_tokens = True
        return ids

    def decode(self, ids, where: str = "within") -> str:
        # a decoder may take a space away that its encoder never puts
        backend = self.backends[where] if self.puts_space else self.bare
        return backend.decode(ids, skip_special_tokens=False)

    def num_bytes(self, token_id: int) -> int:
        """The bytes of a token that may hold a part of a character; 0 for others."""
        if token_id in self.added:
            return 0
        token = self.full.id_to_token(token_id) or ""
        if BYTE_TOKEN.fullmatch(token):
            return 1
        return len(token) if self.is_byte_level else 0


BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")  # of `byte_fallback`: one byte of a rare character


def check_growth(spec: dict):
    """Raise ValueError if the normalizer or the decoder of a parsed tokenizer.json could make a
    text more than MAX_GROWTH times as long. A chain of 40 replacements of "a" by "aa" would fill
    any memory."""
    for name in ("normalizer", "decoder"):
        factor = growth(spec.get(name))
        if factor > MAX_GROWTH:
            raise ValueError(f"its {name} can make a text {factor:.3g} times as long")


def growth(step) -> float:
    """How many times as many characters as before a text can have after a step."""
    if not isinstance(step, dict):
        return 1
    kind = step.get("type")
    factor = NORMALIZER_GROWTH.get(kind, 1)
    if kind == "Replace":
        pattern, content = step["pattern"], step["content"]
        shortest = len(pattern["String"]) if "String" in pattern else 1  # a match of a regex
        factor = max(1, len(content) / shortest) if shortest else 1 + len(content)
    for name in ("normalizers", "decoders"):
        for part in step.get(name, []):
            factor = min(factor * growth(part), 1e300)
    return factor


@functools.lru_cache(maxsize=2)  # a vocabulary of 150,000 takes half a second to parse
def parse_backends(text: str) -> tuple:
    """A tokenizer.json's text -> (tokenizer that may put a space before a text, one that does not,
    whether the first does so only before the whole text, whether a token is written as one
    character a byte, 1 + the largest id).

    Raises ValueError for a file whose steps could make a text much longer.
    """
    from tokenizers import Tokenizer

    spec = load_without_gc(text)
    check_growth(spec)
    if spec["model"].get("dropout"):
        return parse_backends(without_dropout(text))
    full = bare = Tokenizer.from_str(text)
    changed = without_prefix_space(spec)
    if changed != spec:
        bare = Tokenizer.from_str(json.dumps(changed))
    for backend in (full, bare):
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
    steps = {name: spec.get(name) for name in PREFIX_SPACE_PARTS}
    only_first = '"prepend_scheme": "first"' in json.dumps(steps)
    is_byte_level = '"ByteLevel"' in json.dumps(spec.get("decoder"))
    largest = max([last_id(spec["model"]), *full.get_added_tokens_decoder()])
    return full, bare, only_first, is_byte_level, 1 + largest


def without_dropout(text: str) -> str:
    """A tokenizer.json's text with BPE dropout off."""
    spec = load_without_gc(text)
    if spec["model"].get("dropout"):
        spec["model"]["dropout"] = None
        text = json.dumps(spec)
    return text


def load_without_gc(text: str):
    """json.loads without garbage collection: it makes so many objects that the collector would look
    at them again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return json.loads(text)
    finally:
        if was_enabled:
            gc.enable()


def last_id(model: dict) -> int:
    """The largest id of the model of a parsed tokenizer.json, -1 if it has none."""
    vocab = model["vocab"]  # {token: id}; of a Unigram [[token, score]]
    return max(vocab.values(), default=-1) if isinstance(vocab, dict) else len(vocab) - 1


def without_prefix_space(spec: dict) -> dict:
    """A parsed tokenizer.json that puts no space before a text and, when decoding, removes none. It
    equals `spec` if that puts none."""
    changed = dict(spec)
    for name in PREFIX_SPACE_PARTS:
        part = spec.get(name)
        is_byte_decoder = name == "decoder" and part and part.get("type") == "ByteLevel"
        if part and not is_byte_decoder:  # that decoder has add_prefix_space, and does not use it
            changed[name] = strip_prefix_space(part)
    return changed


def strip_prefix_space(part):
    """A normalizer, pre-tokenizer or decoder without the steps that add or remove a space."""
    if not isinstance(part, dict):
        return part
    for name in ("normalizers", "pretokenizers", "decoders"):  # a sequence
        if name in part:
            kept = [step for step in part[name] if step["type"] not in ("Prepend", "Strip")]
            return part | {name: [strip_prefix_space(step) for step in kept]}
    if part.get("type") in ("Prepend", "Strip"):
        return None
    part = dict(part)
    if "prepend_scheme" in part:
        part["prepend_scheme"] = "never"
    if "add_prefix_space" in part:
        part["add_prefix_space"] = False
    return part


def config_path(path: str) -> str:
    """The tokenizer_config.json beside a tokenizer.json."""
    return os.path.join(os.path.dirname(path), "tokenizer_config.json")


def read_settings(folder: str) -> dict:
    """The tokenizer_config.json of a folder, {} if there is none.

    An older folder also has special_tokens_map.json. As in transformers its entries replace those
    of tokenizer_config.json, unless that has added_tokens_decoder.
    """
    settings = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = os.path.join(folder, name)
        if "added_tokens_decoder" not in settings and os.path.exists(path):
            settings |= read_json(path)
    return settings


def load_json(path: str) -> JsonTokenizer:
    """Load a tokenizer.json. The tokenizer_config.json beside it names the end-of-text token."""
    try:
        text = read_text(path)
        settings = read_settings(os.path.dirname(path))
        eos = settings.get("eos_token")
        if isinstance(eos, dict):
            eos = eos.get("content")
        if not isinstance(eos, str):
            raise SystemExit(
                f"tokenizer {path}: the tokenizer_config.json beside it must give its eos_token,"
                f" got {eos!r}"
            )
        with no_panic_pages():
            enc = JsonTokenizer(text, eos, settings.get("stop_tokens"))
            begin(enc)  # some broken files fail only when they encode
            enc.encode_ordinary("a 1")
    except OSError as e:
        raise SystemExit(f"tokenizer {e.filename}: {e.strerror}")
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as e:  # the package raises plain exceptions, and panics
        reason = ascii(" ".join(str(e).split()))[1:-1]
        raise SystemExit(f"tokenizer {path} cannot be read ({type(e).__name__}: {reason})")
    if enc.eot_token is None:
        raise SystemExit(f"tokenizer {path}: its eos_token {enc.eos!r} is not one of its tokens")
    if enc.n_vocab > MAX_VOCAB:
        raise SystemExit(
            f"tokenizer {path}: its largest id is {enc.n_vocab - 1}, above {MAX_VOCAB - 1}"
        )
    if not is_token_list(enc, enc.stop_tokens):
        raise SystemExit(f"tokenizer {path}: its stop_tokens are not a list of its tokens")
    return enc


@contextlib.contextmanager
def no_panic_pages():
    """Drop what Rust prints when it panics, a page, before Python sees the exception."""
    kept = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def is_token_list(enc: JsonTokenizer, tokens) -> bool:
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        return False
    return all(enc.full.token_to_id(token) is not None for token in tokens)


# ---- conversion


def unicode_to_bytes() -> dict[str, int]:
    """GPT-2's {printable character: byte}, the inverse of its bytes_to_unicode."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [b for b in range(256) if b not in printable]
    table = {chr(b): b for b in printable}
    for i, b in enumerate(others):
        table[chr(256 + i)] = b
    return table


BYTE_OF = unicode_to_bytes()
CHAR_OF = {b: c for c, b in BYTE_OF.items()}


def token_bytes(token: str) -> bytes:
    """A token as tokenizer.json spells it -> its bytes."""
    return bytes(BYTE_OF[c] for c in token)


def token_chars(token: bytes) -> str:
    """The bytes of a token -> as tokenizer.json spells it."""
    return "".join(CHAR_OF[b] for b in token)


def merges_from_ranks(ranks: dict) -> list[tuple[bytes, bytes]]:
    """The merges [(left, right)] of a byte-level BPE, in the order of ranks.

    A token's bytes, merged with lower ranks only, end as the two parts that the token is made of.
    """
    merges = []
    for token, rank in by_rank(ranks):
        parts = merge_below(token, rank, ranks)
        if len(parts) < 2:
            continue
        if len(parts) > 2 or max(ranks[part] for part in parts) > rank:
            raise SystemExit(
                f"the tokenizer's {token!r} is not the merge of two tokens of lower rank"
            )
        merges.append((parts[0], parts[1]))
    return merges


def merge_below(token: bytes, limit: int, ranks: dict) -> list[bytes]:
    """Merge the bytes of a token by ranks below `limit`, lowest first, until two parts are left."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [left + right for left, right in zip(parts, parts[1:])]
        pair_ranks = [ranks.get(pair, limit) for pair in pairs]
        lowest = min(pair_ranks)
        if lowest >= limit:
            break
        i = pair_ranks.index(lowest)
        parts[i : i + 2] = [pairs[i]]
    return parts


def to_json(enc, path: str):
    """Write a tokenizer as tokenizer.json. An Encoding's gives the ids of `encode_ordinary`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    if isinstance(enc, JsonTokenizer):
        with atomic_write(path) as f:
            f.write(enc.text)
        return
    ranks = enc._mergeable_ranks
    vocab = {token_chars(token): rank for token, rank in ranks.items()}
    merges = [(token_chars(a), token_chars(b)) for a, b in merges_from_ranks(ranks)]
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([EOT])
    with atomic_write(path) as f:
        f.write(bpe.to_str(pretty=True))


def from_json(spec: dict) -> tiktoken.Encoding | None:
    """The tiktoken.Encoding with the same ids as a parsed tokenizer.json, or None if there is none.

    There is one for a byte-level BPE that cuts text as GPT-2 does, with EOT as its last id and only
    special token.
    """
    try:
        if not is_plain_bpe(spec) or not cuts_as_gpt2(spec["pre_tokenizer"]):
            return None
        vocab = dict(spec["model"]["vocab"])
        eot_id = vocab.pop(EOT, len(vocab))
        special_ids = {EOT: eot_id}
        for token in spec.get("added_tokens", []):
            special_ids[token["content"]] = token["id"]
        if special_ids != {EOT: len(vocab)} or sorted(vocab.values()) != list(range(len(vocab))):
            return None
        ranks = {token_bytes(token): i for token, i in vocab.items()}
        if not all(c in vocab for c in BYTE_OF):
            return None
        merges = []
        for pair in spec["model"]["merges"]:
            left, right = pair.split(" ") if isinstance(pair, str) else pair
            merges.append((token_bytes(left), token_bytes(right)))
        return make_encoding("bpe", ranks) if merges == merges_from_ranks(ranks) else None
    except (KeyError, TypeError, AttributeError, ValueError, SystemExit):
        return None


def is_plain_bpe(spec: dict) -> bool:
    """Whether a parsed tokenizer.json is a BPE without options, normalizer or post-processor."""
    model = spec["model"]
    options = ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if model["type"] != "BPE" or any(model.get(name) for name in options):
        return False
    post_processor = spec.get("post_processor") or {"type": "ByteLevel"}
    return not spec.get("normalizer") and post_processor["type"] == "ByteLevel"


def cuts_as_gpt2(pre_tokenizer: dict) -> bool:
    """Whether it is ByteLevel, or Split by PATTERN and then ByteLevel without a regex."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [(step["type"], step.get("use_regex", True)) for step in steps]
    if kinds not in ([("ByteLevel", True)], [("Split", True), ("ByteLevel", False)]):
        return False
    for step in steps:
        if step.get("add_prefix_space") or step.get("invert"):
            return False
        if step.get("behavior", "Isolated") != "Isolated":
            return False
        if "pattern" in step and step["pattern"] != {"Regex": PATTERN}:
            return False
    return True
