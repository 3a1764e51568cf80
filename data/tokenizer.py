"""Tokenizers, each a `tiktoken.Encoding`: "gpt2", "bytes", or a byte-level BPE that `train` left in a .tiktoken file
(tiktoken's own format: base64 of a token's bytes, a space, its rank). End-of-text is the last id."""
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
    """"gpt2", "bytes" or the path of a .tiktoken file -> tiktoken.Encoding. Exits with one line if it cannot."""
    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as e:      # the package raises whatever its HTTP client does
            raise SystemExit(f"tokenizer gpt2: tiktoken could not fetch the vocabulary ({type(e).__name__}); without a "
                             "network set TIKTOKEN_CACHE_DIR to a folder that holds it")
    if name == "bytes":
        return encoding("bytes", {bytes([i]): i for i in range(256)})
    try:
        with open(name, "rb") as f:
            lines = [line.split() for line in f]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except OSError as e:
        raise SystemExit(f"tokenizer {name}: {e.strerror}; it is gpt2, bytes or a .tiktoken file")
    except ValueError:
        raise SystemExit(f"tokenizer {name}: not a .tiktoken file (lines of base64 token and rank)")
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([i]) not in ranks for i in range(256)):
        raise SystemExit(f"tokenizer {name}: ranks must be 0..n-1 and hold every byte")
    return encoding(os.path.basename(name), ranks)


def encoding(name, ranks):
    return tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})


def save(enc, path):
    """Write the ranks of an Encoding as a .tiktoken file."""
    with open(path, "wb") as f:
        for token, rank in sorted(enc._mergeable_ranks.items(), key=lambda item: item[1]):
            f.write(base64.b64encode(token) + b" " + str(rank).encode() + b"\n")


@functools.cache
def fingerprint(enc):
    """sha256 of every (token, id) pair: equal for equal tokenizers, whatever their file."""
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
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False))
    to_byte = byte_of_char()
    vocab = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    return encoding("bpe", {bytes(to_byte[c] for c in token): i for token, i in vocab})


def byte_of_char():
    """GPT-2's printable stand-ins for bytes (its `bytes_to_unicode`), inverted."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    other = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(other)}


# ------------------------------------------------------------------------------- tokenizer.json, of the `tokenizers` package


def merges_of(ranks):
    """[(left, right)] in the order of ranks: a token's own bytes, merged under the ranks before it, end as the two that it is made of."""
    merges = []
    for token, own in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            rank, i = min((ranks.get(a + b, own), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
            if rank >= own:
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) > 2 or len(parts) == 2 and max(ranks[part] for part in parts) > own:
            raise SystemExit(f"the tokenizer's {token!r} is no merge of two tokens before it")
        merges += [tuple(parts)] if len(parts) == 2 else []
    return merges


def to_json(enc, path):
    """Write an Encoding as a tokenizer.json that gives the ids of `encode_ordinary`, end-of-text a special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    to_char = {b: c for c, b in byte_of_char().items()}
    spelt = {token: "".join(to_char[b] for b in token) for token in enc._mergeable_ranks}
    bpe = Tokenizer(models.BPE(vocab={spelt[token]: rank for token, rank in enc._mergeable_ranks.items()},
                               merges=[(spelt[a], spelt[b]) for a, b in merges_of(enc._mergeable_ranks)]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.add_special_tokens([EOT])
    bpe.save(path)


def from_json(parts, path):
    """A parsed tokenizer.json -> tiktoken.Encoding. Exits with one line if it is not byte-level BPE that cuts text as PATTERN does."""
    def must(ok, what):
        if not ok:
            raise SystemExit(f"{path}: {what} is not supported yet; byte-level BPE that cuts text as GPT-2 does is, with {EOT} as the last id")

    try:
        bpe, before, to_byte = parts["model"], parts["pre_tokenizer"] or {}, byte_of_char()
        must(bpe["type"] == "BPE" and not bpe.get("byte_fallback"), f"the model {bpe['type']!r}{' with byte_fallback' * bool(bpe.get('byte_fallback'))}")
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            must(not bpe.get(name), f"the model's {name}")
        must(not parts.get("normalizer"), "a normalizer")
        for piece in before.get("pretokenizers", [before]):         # one, or Split and ByteLevel without a pattern of its own
            pattern = (piece.get("pattern") or {}).get("Regex")
            must(piece.get("type") in ("Split", "ByteLevel") and pattern in (None, PATTERN), f"the pre-tokenizer {json.dumps(piece)}")
            must(not piece.get("add_prefix_space") and not piece.get("invert") and piece.get("behavior", "Isolated") == "Isolated", f"the pre-tokenizer {json.dumps(piece)}")
        kinds = [(piece["type"], piece.get("use_regex", True)) for piece in before.get("pretokenizers", [before])]
        must(kinds in ([("ByteLevel", True)], [("Split", True), ("ByteLevel", False)]), f"the pre-tokenizer {json.dumps(before)}")
        must((parts.get("post_processor") or {"type": "ByteLevel"})["type"] == "ByteLevel", "a post-processor that adds tokens")
        vocab = {token: i for token, i in bpe["vocab"].items() if token != EOT}
        specials = {EOT: bpe["vocab"].get(EOT, len(vocab))} | {token["content"]: token["id"] for token in parts.get("added_tokens", [])}
        must(specials == {EOT: len(vocab)}, f"a tokenizer with the special tokens {', '.join(map(repr, specials))}")
        must(sorted(vocab.values()) == list(range(len(vocab))) and set("".join(vocab)) <= set(to_byte) <= set(vocab), "a vocabulary that is not of bytes")
        ranks = {bytes(to_byte[c] for c in token): i for token, i in vocab.items()}
        merges = [tuple(bytes(to_byte[c] for c in half) for half in (pair.split(" ") if isinstance(pair, str) else pair)) for pair in bpe["merges"]]
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise SystemExit(f"{path} is no tokenizer.json ({type(e).__name__}: {e})")
    must(merges == merges_of(ranks), "merges in another order than their ids")
    return encoding("bpe", ranks)
