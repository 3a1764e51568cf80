"""Encoded rows and token streams -> batches."""

import functools
import numpy as np
import torch


INPUTS = (
    "idx",
    "targets",
    "pos",
    "doc",
    "branch",
    "at",
    "read",
)  # what of a batch model.GPT.forward takes


def count_row_tokens(row, layout="packed"):
    """Tokens that an encoded row costs in a layout."""
    P, lengths = len(row["prompt"]), [len(y) for y in row["responses"] if y is not None]
    return (
        P + sum(lengths) - len(lengths)
        if layout == "packed"
        else len(lengths) * (P + max(lengths) - 1)
    )


def split_by_tokens(sizes, n):
    """Cut a sequence of sizes into n parts of about the same sum -> [indices of each], none empty. Needs n <= len(sizes)."""
    middles = np.cumsum(sizes) - np.array(sizes) / 2
    part = np.minimum(middles * n / sum(sizes), n - 1).astype(int)
    if len(set(part)) < n:
        return np.array_split(np.arange(len(sizes)), n)
    return [np.flatnonzero(part == i) for i in range(n)]


def batch_rows(rows, layout="packed", multiple=None):
    """Encoded rows -> one batch of int64 tensors, as `pack_rows` or `pad_rows` lays the tokens out, with

    seq: b K + k of what is asked, the shape of targets; present (B, K) bool; ranks (B, K); lengths (B, K) of what is asked;
    tokens () that are read, without the padding. Masks come from lengths, never from an id. The last token of a response is
    not read, and what an empty prompt leaves without a predecessor is not asked.
    """
    B, K = len(rows), max(len(r["responses"]) for r in rows)
    multiple = multiple or (
        128 if torch.cuda.is_available() else 64
    )  # a GPU's attention works on blocks of 128
    present, ranks, lengths = np.zeros((B, K), bool), np.full((B, K), K), np.zeros((B, K), int)
    for b, row in enumerate(rows):
        for k, y in enumerate(row["responses"]):
            if y is not None:
                present[b, k], ranks[b, k], lengths[b, k] = (
                    True,
                    row["ranks"][k],
                    len(y) - (not row["prompt"]),
                )
    batch = (pack_rows(rows, K, multiple) if layout == "packed" else pad_rows(rows, K)) | dict(
        present=present, ranks=ranks, lengths=lengths
    )
    return pin_memory({name: torch.from_numpy(np.asarray(a)) for name, a in batch.items()})


def reward_batch(rows, layout="packed"):
    """Encoded rows -> a batch that reads a scalar at every response's last token instead of asking for next tokens: read (r,),
    places in the flat list of tokens; slot (r,): b K + k of each. The last token is read here, so a row has one more of
    each response; idx, present, ranks and the rest as in `batch_rows`."""
    longer = [
        row | {"responses": [y and [*y, 0] for y in row["responses"]]} for row in rows
    ]  # what follows is never read
    batch = batch_rows(longer, layout)
    targets, seq = batch.pop("targets"), batch.pop("seq")
    at = batch.pop("at") if "at" in batch else (targets >= 0).flatten().nonzero().squeeze(1)
    seq = seq[targets >= 0]
    last = torch.cat([seq[1:] != seq[:-1], torch.ones(1, dtype=torch.bool)])
    return pin_memory(
        batch
        | {
            "read": at[last],
            "slot": seq[last],
            "lengths": batch["lengths"] - batch["present"].long(),
        }
    )


def pin_memory(batch):
    """In memory that a GPU copies from while it computes, where there is one."""
    return (
        {name: t.pin_memory() for name, t in batch.items()} if torch.cuda.is_available() else batch
    )


def pack_rows(rows, K, multiple):
    """The shared layout: each prompt once, its responses after it, row after row, up to a multiple of some tokens.

    idx, pos, doc, branch (n,): ids, positions, which restart after the prompt, and what model.Packed says; at, targets, seq (m,):
    every response token, and the place that predicts it: a prompt's last token predicts the first one of each response.
    """
    idx, pos, doc, branch, at, targets, seq = [], [], [], [], [], [], []
    for b, row in enumerate(rows):
        prompt, first = row["prompt"], len(idx)
        idx += prompt
        pos += range(len(prompt))
        branch += [0] * len(prompt)
        for k, y in enumerate(row["responses"]):
            if y is not None:
                at += [first + len(prompt) - 1] * bool(prompt) + list(
                    range(len(idx), len(idx) + len(y) - 1)
                )
                targets += y if prompt else y[1:]
                seq += [b * K + k] * (len(y) - (not prompt))
                idx += y[:-1]
                pos += range(len(prompt), len(prompt) + len(y) - 1)
                branch += [k + 1] * (len(y) - 1)
        doc += [b] * (len(idx) - first)
    tokens, pad = len(idx), -len(idx) % multiple
    return dict(
        idx=idx + [0] * pad,
        pos=pos + [0] * pad,
        doc=doc + [len(rows)] * pad,
        branch=branch + [0] * pad,
        at=np.array(at, int),
        targets=np.array(targets, int),
        seq=np.array(seq, int),
        tokens=tokens,
    )


def pad_rows(rows, K):
    """The padded layout, one right-padded sequence a response: idx, targets, seq (N, T), -1 where nothing is asked. It costs the
    prompt K times, and the difference to the longest."""
    texts = [
        (b * K + k, row["prompt"], y)
        for b, row in enumerate(rows)
        for k, y in enumerate(row["responses"])
        if y is not None
    ]
    T = max(len(p) + len(y) for _, p, y in texts) - 1
    idx, targets, seq = (
        np.zeros((len(texts), T), int),
        np.full((len(texts), T), -1),
        np.full((len(texts), T), -1),
    )
    for n, (slot, prompt, y) in enumerate(texts):
        ids, start = prompt + y, max(len(prompt) - 1, 0)
        idx[n, : len(ids) - 1] = ids[:-1]
        targets[n, start : len(ids) - 1] = ids[start + 1 :]
        seq[n, start : len(ids) - 1] = slot
    return dict(
        idx=idx, targets=targets, seq=seq, tokens=sum(len(p) + len(y) - 1 for _, p, y in texts)
    )


@functools.lru_cache(maxsize=4)
def permutation(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


def batch_indices(n, batch_size, seed, step):
    """Which of n samples make the global batch of a step: permutations without replacement, one after the other."""
    where = np.arange(step * batch_size, (step + 1) * batch_size)
    return np.array([permutation(n, seed, int(e))[i] for e, i in zip(where // n, where % n)])


def stream_batch(tokens, length, batch_size, seed, step, vocab_size, part=slice(None), apart=None):
    """{"idx", "targets"} (B, T) and {"tokens"} () of a step: windows of a token stream, without replacement, T = length.

    Each epoch shifts the windows by a seeded offset, so that no two cut the text at the same places. `part` takes some
    of the global batch. apart: the id of end-of-text, if documents are not to see each other; then all is flat, (B T,), with
    pos and doc, and an end-of-text stands at the beginning of what follows it.
    Exits if a token is outside the vocabulary or the stream is shorter than two windows.
    """
    n = (len(tokens) - 1) // length - 1
    if n < 1:
        raise SystemExit(
            f"the token stream has {len(tokens)} tokens; block_size {length} needs {2 * length + 1}"
        )
    epochs = np.arange(step * batch_size, (step + 1) * batch_size) // n
    starts = [
        w * length + int(np.random.default_rng([seed, int(e), 1]).integers(length))
        for w, e in zip(batch_indices(n, batch_size, seed, step)[part], epochs[part])
    ]
    rows = np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64)
    if rows.max() >= vocab_size:
        raise SystemExit(
            f"token id {rows.max()} near position {starts[0]} of the stream is outside the vocabulary of {vocab_size}"
        )
    idx, targets = rows[:, :-1], rows[:, 1:]
    batch = {"idx": idx, "targets": targets}
    if apart is not None:
        begins = idx == apart
        begins[:, 0] = True
        places = np.arange(idx.size)
        pos = places - np.maximum.accumulate(np.where(begins.ravel(), places, 0))
        batch |= {
            "idx": idx.ravel(),
            "targets": targets.ravel(),
            "pos": pos,
            "doc": begins.ravel().cumsum(),
            "branch": np.zeros_like(pos),
        }
    return pin_memory(
        {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in batch.items()}
        | {"tokens": torch.tensor(idx.size)}
    )
