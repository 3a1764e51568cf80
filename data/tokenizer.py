"""Tokenizers, each a `tiktoken.Encoding`: "gpt2", "bytes", or a byte-level BPE that `train` left in a .tiktoken file
(tiktoken's own format: base64 of a token's bytes, a space, its rank). End-of-text is the last id."""
import base64
import functools
import hashlib
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
