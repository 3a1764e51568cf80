"""Tokenizers, each with encode_ordinary, decode, n_vocab and eot_token: a `tiktoken.Encoding`, which is "gpt2", "bytes", or a
byte-level BPE that `train` left in a .tiktoken file (tiktoken's own format: base64 of a token's bytes, a space, its rank), with
end-of-text as the last id; or a `Json`, any other model's tokenizer.json."""

import base64
import functools
import hashlib
import json
import os

import tiktoken

# GPT-2's way to cut text before merging (tiktoken_ext/openai_public.py); the `tokenizers` package's ByteLevel does the same
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
EOT = "<|endoftext|>"


def load(name):
    """ "gpt2", "bytes", the path of a .tiktoken file or of a tokenizer.json -> a tokenizer. Exits with one line if it cannot."""
    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as e:  # the package raises whatever its HTTP client does
            raise SystemExit(
                f"tokenizer gpt2: tiktoken could not fetch the vocabulary ({type(e).__name__}); without a "
                "network set TIKTOKEN_CACHE_DIR to a folder that holds it"
            )
    if name == "bytes":
        return encoding("bytes", {bytes([i]): i for i in range(256)})
    if name.endswith(".json"):
        return load_json(name)
    try:
        with open(name, "rb") as f:
            lines = [line.split() for line in f]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except OSError as e:
        raise SystemExit(
            f"tokenizer {name}: {e.strerror}; it is gpt2, bytes, a .tiktoken file or a tokenizer.json"
        )
    except ValueError:
        raise SystemExit(f"tokenizer {name}: not a .tiktoken file (lines of base64 token and rank)")
    if sorted(ranks.values()) != list(range(len(ranks))) or any(
        bytes([i]) not in ranks for i in range(256)
    ):
        raise SystemExit(f"tokenizer {name}: ranks must be 0..n-1 and hold every byte")
    return encoding(os.path.basename(name), ranks)


def encoding(name, ranks):
    return tiktoken.Encoding(
        name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)}
    )


def file_of(enc, name):
    """What a tokenizer is called in a checkpoint: "gpt2", "bytes" or the file that `save` writes."""
    return (
        name
        if name in ("gpt2", "bytes")
        else "tokenizer.json"
        if isinstance(enc, Json)
        else "tokenizer.tiktoken"
    )


def save(enc, path):
    """Write an Encoding's ranks as a .tiktoken file, or a tokenizer.json and the tokenizer_config.json beside it."""
    if isinstance(enc, Json):
        to_json(enc, path)
        with open(
            os.path.join(os.path.dirname(path), "tokenizer_config.json"), "w", encoding="utf-8"
        ) as f:
            json.dump({"eos_token": enc.eos, "tokenizer_class": "PreTrainedTokenizerFast"}, f)
        return
    with open(path, "wb") as f:
        for token, rank in sorted(enc._mergeable_ranks.items(), key=lambda item: item[1]):
            f.write(base64.b64encode(token) + b" " + str(rank).encode() + b"\n")


def adopt(name, folder):
    """(tokenizer, its name in a data folder) of "gpt2", "bytes" or a file, which is copied there."""
    enc = load(name)
    name = file_of(enc, name)
    if name not in ("gpt2", "bytes"):
        os.makedirs(folder, exist_ok=True)
        save(enc, os.path.join(folder, name))
    return enc, name


@functools.cache
def fingerprint(enc):
    """sha256 of every (token, id) pair: equal for equal tokenizers, whatever their file; of a `Json` of its text."""
    if isinstance(enc, Json):
        return hashlib.sha256(f"{enc.eos}\n{enc.text}".encode()).hexdigest()
    h = hashlib.sha256()
    for token, rank in sorted(enc._mergeable_ranks.items(), key=lambda item: item[1]):
        h.update(len(token).to_bytes(4, "big") + token + rank.to_bytes(4, "big"))
    return h.hexdigest()


def train(texts, vocab_size):
    """Train a byte-level BPE on an iterable of texts: `vocab_size` ids, end-of-text the last. Returns an Encoding."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False
        ),
    )
    to_byte = byte_of_char()
    vocab = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    return encoding("bpe", {bytes(to_byte[c] for c in token): i for token, i in vocab})


def byte_of_char():
    """GPT-2's printable stand-ins for bytes (its `bytes_to_unicode`), inverted."""
    plain = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    other = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(other)}


def specials(enc):
    """{text: id} of the special tokens."""
    return (
        enc.specials
        if isinstance(enc, Json)
        else {name: enc.encode_single_token(name) for name in enc.special_tokens_set}
    )


def eos(enc):
    """The text of end-of-text."""
    return enc.eos if isinstance(enc, Json) else EOT


def begin(enc):
    """The special tokens that the tokenizer itself puts before a text, as text."""
    if not isinstance(enc, Json):
        return ""
    ids, plain = (enc.whole.encode("a", add_special_tokens=added).ids for added in (True, False))
    return "".join(enc.whole.id_to_token(i) for i in ids[: ids.index(plain[0])])


def encode(enc, text, where="start"):
    """Ids of a text that is the start of what a model reads, or comes after a "special" token, or goes on "within" a text: some
    tokenizers put a space before what they take for a beginning. What spells a special token is plain text."""
    return enc.encode_ordinary(text, where) if isinstance(enc, Json) else enc.encode_ordinary(text)


# ------------------------------------------------------------------------------- tokenizer.json, of the `tokenizers` package


class Json:
    """A tokenizer.json with the methods of an Encoding. eos: the text of the token that ends a response."""

    def __init__(self, text, eos):
        from tokenizers import Tokenizer

        self.text, self.eos, parts = text, eos, json.loads(text)
        self.whole, self.bare = (
            Tokenizer.from_str(text),
            Tokenizer.from_str(json.dumps(without_prefix(parts))),
        )
        for each in (self.whole, self.bare):
            each.no_truncation()
            each.no_padding()
            each.encode_special_tokens = True
        first = '"prepend_scheme": "first"' in json.dumps(
            parts
        )  # the prefix stands before the whole text alone
        self.by_place = {
            "start": self.whole,
            "special": self.bare if first else self.whole,
            "within": self.bare,
        }
        self.n_vocab = 1 + max(self.whole.get_vocab(with_added_tokens=True).values())
        self.eot_token = self.whole.token_to_id(eos)
        self.specials = {
            token.content: i
            for i, token in self.whole.get_added_tokens_decoder().items()
            if token.special
        } | {eos: self.eot_token}

    def encode_ordinary(self, text, where="start"):
        return (
            self.by_place[where]
            .encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False)
            .ids
        )  # halves of surrogate pairs: "?"

    def with_specials(self, text):
        """As the package does it by default: what spells a special token is that token."""
        self.whole.encode_special_tokens = False
        ids = self.whole.encode(text, add_special_tokens=False).ids
        self.whole.encode_special_tokens = True
        return ids

    def decode(self, ids):
        """The text of ids that go on from another text."""
        return self.bare.decode(ids, skip_special_tokens=False)


def without_prefix(parts):
    """A parsed tokenizer.json that neither puts a space before a text nor, when decoding, takes one away."""

    def strip(part):
        if not isinstance(part, dict):
            return part
        for inside in ("normalizers", "pretokenizers", "decoders"):
            if inside in part:
                return part | {
                    inside: [
                        strip(p) for p in part[inside] if p["type"] not in ("Prepend", "Strip")
                    ]
                }
        if part.get("type") in ("Prepend", "Strip"):
            return None
        return part | {
            name: off
            for name, off in (("prepend_scheme", "never"), ("add_prefix_space", False))
            if name in part
        }

    return parts | {
        name: strip(parts.get(name)) for name in ("normalizer", "pre_tokenizer", "decoder")
    }


def load_json(path):
    """The `Json` of a tokenizer.json; its end-of-text is the eos_token of the tokenizer_config.json beside it."""
    try:
        with open(path, encoding="utf-8") as f:
            text = f.read()
        with open(
            os.path.join(os.path.dirname(path), "tokenizer_config.json"), encoding="utf-8"
        ) as f:
            eos = json.load(f).get("eos_token")
        eos = eos.get("content") if isinstance(eos, dict) else eos
        if not isinstance(eos, str):
            raise SystemExit(
                f"tokenizer {path}: the tokenizer_config.json beside it must say its eos_token, got {eos!r}"
            )
        enc = Json(text, eos)
        begin(enc), enc.encode_ordinary("a 1")  # some break here
    except OSError as e:
        raise SystemExit(f"tokenizer {e.filename}: {e.strerror}")
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as e:  # the package raises plain ones, and panics
        raise SystemExit(
            f"tokenizer {path} cannot be read ({type(e).__name__}: {ascii(' '.join(str(e).split()))[1:-1]})"
        )
    if enc.eot_token is None:
        raise SystemExit(f"tokenizer {path}: its eos_token {enc.eos!r} is none of its tokens")
    return enc


def merges_of(ranks):
    """[(left, right)] in the order of ranks: a token's own bytes, merged under the ranks before it, end as the two that it is made of."""
    merges = []
    for token, own in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            rank, i = min(
                (ranks.get(a + b, own), i) for i, (a, b) in enumerate(zip(parts, parts[1:]))
            )
            if rank >= own:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) > 2 or len(parts) == 2 and max(ranks[part] for part in parts) > own:
            raise SystemExit(f"the tokenizer's {token!r} is no merge of two tokens before it")
        merges += [tuple(parts)] if len(parts) == 2 else []
    return merges


def to_json(enc, path):
    """Write a tokenizer as a tokenizer.json; an Encoding's gives the ids of `encode_ordinary`, end-of-text a special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    if isinstance(enc, Json):
        with open(path, "w", encoding="utf-8") as f:
            f.write(enc.text)
        return
    to_char = {b: c for c, b in byte_of_char().items()}
    spelt = {token: "".join(to_char[b] for b in token) for token in enc._mergeable_ranks}
    bpe = Tokenizer(
        models.BPE(
            vocab={spelt[token]: rank for token, rank in enc._mergeable_ranks.items()},
            merges=[(spelt[a], spelt[b]) for a, b in merges_of(enc._mergeable_ranks)],
        )
    )
    bpe.pre_tokenizer, bpe.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    bpe.add_special_tokens([EOT])
    bpe.save(path)


def from_json(parts):
    """A parsed tokenizer.json -> tiktoken.Encoding with the same ids, or None if it is not byte-level BPE that cuts text as PATTERN does,
    with EOT as its last id and only special token."""
    to_byte = byte_of_char()
    try:
        bpe, before = parts["model"], parts["pre_tokenizer"]
        pieces = before.get(
            "pretokenizers", [before]
        )  # one, or Split and a ByteLevel without a pattern of its own
        kinds = [(piece["type"], piece.get("use_regex", True)) for piece in pieces]
        plain = not any(
            piece.get("add_prefix_space")
            or piece.get("invert")
            or piece.get("behavior", "Isolated") != "Isolated"
            or "pattern" in piece
            and piece["pattern"] != {"Regex": PATTERN}
            for piece in pieces
        )
        odd = [
            bpe.get(name)
            for name in (
                "byte_fallback",
                "dropout",
                "continuing_subword_prefix",
                "end_of_word_suffix",
            )
        ] + [parts.get("normalizer")]
        vocab = {token: i for token, i in bpe["vocab"].items() if token != EOT}
        specials = {EOT: bpe["vocab"].get(EOT, len(vocab))} | {
            token["content"]: token["id"] for token in parts.get("added_tokens", [])
        }
        if (
            bpe["type"] != "BPE"
            or kinds not in ([("ByteLevel", True)], [("Split", True), ("ByteLevel", False)])
            or not plain
            or any(odd)
            or (parts.get("post_processor") or {"type": "ByteLevel"})["type"] != "ByteLevel"
            or specials != {EOT: len(vocab)}
            or sorted(vocab.values()) != list(range(len(vocab)))
            or not set("".join(vocab)) <= set(to_byte) <= set(vocab)
        ):
            return None
        ranks = {bytes(to_byte[c] for c in token): i for token, i in vocab.items()}
        merges = [
            tuple(
                bytes(to_byte[c] for c in half)
                for half in (pair.split(" ") if isinstance(pair, str) else pair)
            )
            for pair in bpe["merges"]
        ]
        return encoding("bpe", ranks) if merges == merges_of(ranks) else None
    except (KeyError, TypeError, AttributeError, ValueError, SystemExit):
        return None
