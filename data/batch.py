"""Encoded rows and token streams -> batches. A global batch is a function of (data, seed, step).

Encoded rows come from `data.rows.encode_rows`. There are two layouts of a row's K responses:

    packed   the prompt once, its responses after it, all rows in one flat list: no padding
    padded   each response a right-padded row with a copy of its prompt: slow, tests compare with it
"""

import functools
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from data.varlen import VarlenLayout, varlen_layout


@dataclass
class Batch:
    """One micro-batch. B rows (prompts) of K responses; n tokens are read, m are predicted. Packed
    rows are flat, (n,); so are windows of a token stream whose documents are masked. Padded rows
    and other windows are (N, T)."""

    # model inputs
    idx: Tensor  # (n,) or (N, T) token ids
    pos: Tensor | None = None  # (n,) position in the prompt + response
    sequence_id: Tensor | None = None  # (n,) the row
    response_id: Tensor | None = None  # (n,) 0 in the prompt, 1 + k in response k
    logit_positions: Tensor | None = None  # (m,) where in idx each target is predicted
    varlen: VarlenLayout | None = None  # packed: the same for FlashAttention

    # what is predicted
    targets: Tensor | None = None  # (m,) or (N, T); -1 where not supervised
    response_index: Tensor | None = None  # like targets (ppo: (m,)): b K + k of each, -1 for none
    response_mask: Tensor | None = None  # (B, K) bool: the response is there
    ranks: Tensor | None = None  # (B, K) smaller is better, equal is a tie
    lengths: Tensor | None = None  # (B, K) supervised tokens of each response

    # preference, spin and reward
    ref_logps: Tensor | None = None  # (B, K) log-probability of each response under the reference
    data_scores: Tensor | None = None  # (B, K) scores that gave the ranks, for score_margin

    # reward and ppo
    value_positions: Tensor | None = None  # (r,) where in idx the scalar head is read
    value_response_index: Tensor | None = None  # (r,) b K + k of each

    # ppo, by token, from when the tokens were sampled; values and returns with gae
    old_logps: Tensor | None = None  # (m,)
    old_values: Tensor | None = None  # (m,)
    advantages: Tensor | None = None  # (m,)
    returns: Tensor | None = None  # (m,)
    token_refs: Tensor | None = None  # (m,) log-probability of each token under the reference

    num_tokens: int = 0  # tokens read, without padding
    num_targets: int = 0  # supervised tokens; counted from targets
    num_responses: int = 0  # that are there; counted from response_mask

    def __post_init__(self):
        if self.targets is not None and not self.num_targets:
            self.num_targets = int((self.targets >= 0).sum())
        if self.response_mask is not None and not self.num_responses:
            self.num_responses = int(self.response_mask.sum())

    @property
    def num_rows(self) -> int:
        return len(self.response_mask)

    def layout(self) -> dict[str, Tensor | VarlenLayout]:
        """The layout of the tokens, as keyword arguments of the model: model(idx, **layout())."""
        names = ("pos", "sequence_id", "response_id", "logit_positions", "varlen")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def map_tensors(self, function) -> "Batch":
        """A copy with function(tensor) in place of every tensor."""
        changed = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                changed[f.name] = function(value)
            elif isinstance(value, VarlenLayout):
                changed[f.name] = value.map_tensors(function)
        return replace(self, **changed)

    def to(self, device) -> "Batch":
        return self.map_tensors(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """In memory that a GPU can copy from while it computes, if there is a GPU."""
        if not torch.cuda.is_available():
            return self
        return self.map_tensors(lambda t: t.pin_memory())


# --------------------------------------------------------------------------- rows -> batches


def num_supervised(prompt: list[int], response: list[int] | None) -> int:
    """How many tokens of a response are predicted: all of them after a prompt, all but the first
    one of a whole text, none of an absent response. Means over tokens divide by this."""
    if response is None:
        return 0
    return len(response) if prompt else max(0, len(response) - 1)


def batch_rows(rows: list[dict], layout: str = "packed", multiple: int | None = None) -> Batch:
    """Encoded rows -> one batch, whose targets are the response tokens.

    The last token of a response is predicted but not read. The first token of a text without a
    prompt is read but not predicted. `multiple`: packed tokens are padded to a multiple of this, by
    default 64, and 128 on a machine with a GPU, the block size of its attention kernel.
    """
    B, K = len(rows), max(len(row["responses"]) for row in rows)
    response_mask = np.zeros((B, K), bool)
    ranks = np.full((B, K), K)
    lengths = np.zeros((B, K), int)
    for b, row in enumerate(rows):
        for k, response in enumerate(row["responses"]):
            if response is not None:
                response_mask[b, k] = True
                ranks[b, k] = row["ranks"][k]
                lengths[b, k] = num_supervised(row["prompt"], response)
    if layout == "packed":
        multiple = multiple or (128 if torch.cuda.is_available() else 64)
        tokens = pack_rows(rows, K, multiple)
        varlen = varlen_layout(tokens["sequence_id"], tokens["response_id"])
    else:
        tokens, varlen = pad_rows(rows, K), None
    num_tokens = tokens.pop("num_tokens")
    arrays = tokens | {"response_mask": response_mask, "ranks": ranks, "lengths": lengths}
    tensors = {name: torch.from_numpy(np.asarray(a)) for name, a in arrays.items()}
    for key, name in (("ref", "ref_logps"), ("scores", "data_scores")):
        if key in rows[0]:
            tensors[name] = pad_columns([row[key] for row in rows], K)
    return Batch(**tensors, varlen=varlen, num_tokens=num_tokens).pin_memory()


def reward_batch(rows: list[dict], layout: str = "packed") -> Batch:
    """Encoded rows -> a batch for a reward model. The scalar head is read at the last token of
    every response; there are no targets."""
    # One more token at the end, so that the last one is read too. It is never read itself.
    longer = []
    for row in rows:
        responses = [None if y is None else [*y, 0] for y in row["responses"]]
        longer.append(row | {"responses": responses})
    batch = batch_rows(longer, layout)
    index = batch.response_index[batch.targets >= 0]
    is_last = torch.cat([index[1:] != index[:-1], torch.ones(1, dtype=torch.bool)])
    return replace(
        batch,
        value_positions=target_positions(batch)[is_last],
        value_response_index=index[is_last],
        lengths=batch.lengths - batch.response_mask.long(),
        logit_positions=None,
        targets=None,
        response_index=None,
        num_targets=0,
    ).pin_memory()


def ppo_batch(rows: list[dict], layout: str = "packed") -> Batch:
    """Rows of `ppo.collect` -> a batch. A state's value is read where its token is predicted."""
    batch = batch_rows(rows, layout)
    batch.value_positions = target_positions(batch)
    batch.response_index = batch.response_index[batch.targets >= 0]  # (m,) in both layouts
    names = {
        "logps": "old_logps",
        "values": "old_values",
        "advantages": "advantages",
        "returns": "returns",
        "refs": "token_refs",
    }
    for key, name in names.items():
        if key in rows[0]:
            tokens = np.concatenate([row[key] for row in rows])
            setattr(batch, name, torch.from_numpy(tokens))
    return batch.pin_memory()


def target_positions(batch: Batch) -> Tensor:
    """Where in the flat list of tokens each target is predicted (m,)."""
    if batch.logit_positions is not None:
        return batch.logit_positions
    return (batch.targets >= 0).flatten().nonzero().squeeze(1)


def pad_columns(values: list[list[float]], K: int) -> Tensor:
    """Lists of at most K numbers -> (B, K) float32, padded with 0."""
    return torch.tensor([row + [0.0] * (K - len(row)) for row in values], dtype=torch.float32)


def pack_rows(rows: list[dict], K: int, multiple: int) -> dict:
    """The packed layout: each prompt once, its responses after it, row after row. Positions of each
    response continue those of the prompt. A prompt's last token predicts the first token of every
    response. The end is padded to a multiple of `multiple` tokens, which belong to no row."""
    idx, pos, sequence_id, response_id = [], [], [], []
    logit_positions, targets, response_index = [], [], []
    for b, row in enumerate(rows):
        prompt = row["prompt"]
        end_of_prompt = len(idx) + len(prompt)
        idx += prompt
        pos += range(len(prompt))
        response_id += [0] * len(prompt)
        sequence_id += [b] * len(prompt)
        for k, response in enumerate(row["responses"]):
            if response is None:
                continue
            start, read = len(idx), len(response) - 1
            predicted = response if prompt else response[1:]
            if prompt:
                logit_positions.append(end_of_prompt - 1)
            logit_positions += range(start, start + read)
            targets += predicted
            response_index += [b * K + k] * len(predicted)
            idx += response[:-1]
            pos += range(len(prompt), len(prompt) + read)
            response_id += [k + 1] * read
            sequence_id += [b] * read
    num_tokens, padding = len(idx), -len(idx) % multiple
    return {
        "idx": idx + [0] * padding,
        "pos": pos + [0] * padding,
        "sequence_id": np.array(sequence_id + [len(rows)] * padding, int),
        "response_id": np.array(response_id + [0] * padding, int),
        "logit_positions": np.array(logit_positions, int),
        "targets": np.array(targets, int),
        "response_index": np.array(response_index, int),
        "num_tokens": num_tokens,
    }


def pad_rows(rows: list[dict], K: int) -> dict:
    """The padded layout: each response is a right-padded row with its prompt. It reads the prompt K
    times, and padding up to the longest."""
    sequences = []  # (b K + k, prompt, response)
    for b, row in enumerate(rows):
        for k, response in enumerate(row["responses"]):
            if response is not None:
                sequences.append((b * K + k, row["prompt"], response))
    T = max(len(prompt) + len(response) for _, prompt, response in sequences) - 1
    N = len(sequences)
    idx = np.zeros((N, T), int)
    targets = np.full((N, T), -1)
    response_index = np.full((N, T), -1)
    num_tokens = 0
    for n, (slot, prompt, response) in enumerate(sequences):
        ids = prompt + response
        start, end = max(len(prompt) - 1, 0), len(ids) - 1
        idx[n, :end] = ids[:-1]
        targets[n, start:end] = ids[start + 1 :]
        response_index[n, start:end] = slot
        num_tokens += end
    arrays = {"idx": idx, "targets": targets, "response_index": response_index}
    return arrays | {"num_tokens": num_tokens}


# ------------------------------------------------------------- which rows are in which batch


def count_row_tokens(row: dict, layout: str = "packed") -> int:
    """Tokens that an encoded row takes in a layout, padding to its longest response included."""
    prompt = len(row["prompt"])
    lengths = [len(response) for response in row["responses"] if response is not None]
    if layout == "packed":
        return prompt + sum(lengths) - len(lengths)
    return len(lengths) * (prompt + max(lengths) - 1)


def split_by_tokens(sizes: list[int], n: int) -> list[np.ndarray]:
    """Cut a list of sizes into n runs of about the same sum -> the indices of each, none empty.

    Needs n <= len(sizes).
    """
    middles = np.cumsum(sizes) - np.array(sizes) / 2
    part = np.minimum(middles * n / sum(sizes), n - 1).astype(int)
    if len(set(part)) < n:
        return np.array_split(np.arange(len(sizes)), n)
    return [np.flatnonzero(part == i) for i in range(n)]


@functools.lru_cache(maxsize=4)
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def batch_indices(n: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Which of n samples are in the global batch of a step: one permutation after the other."""
    where = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, positions = np.divmod(where, n)
    return np.array([permutation(n, seed, int(e))[i] for e, i in zip(epochs, positions)])


# ------------------------------------------------------------------- token stream -> batches


def stream_batch(
    tokens: np.ndarray,
    length: int,
    batch_size: int,
    seed: int,
    step: int,
    vocab_size: int,
    part: slice = slice(None),
    document_end: int | None = None,
) -> Batch:
    """Windows of a token stream, (B, length), drawn without replacement. Each epoch shifts the
    windows by a seeded offset, so that the text is cut at other places.

    part: take these windows of the global batch. document_end: the id of end-of-text, if documents
    must not attend to each other. The batch is then packed, and each end-of-text begins the
    document after it. Exits if a token is outside the vocabulary, or the stream is shorter than two
    windows.
    """
    n = (len(tokens) - 1) // length - 1
    if n < 1:
        raise SystemExit(
            f"the token stream has {len(tokens)} tokens; block_size {length} needs {2 * length + 1}"
        )
    windows = batch_indices(n, batch_size, seed, step)[part]
    epochs = (np.arange(step * batch_size, (step + 1) * batch_size) // n)[part]
    starts = []
    for window, epoch in zip(windows, epochs):
        offset = np.random.default_rng([seed, int(epoch), 1]).integers(length)
        starts.append(window * length + int(offset))
    rows = np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int64)
    if rows.max() >= vocab_size:
        raise SystemExit(
            f"token id {rows.max()} near position {starts[0]} of the stream is outside the "
            f"vocabulary of {vocab_size}"
        )
    idx, targets = rows[:, :-1], rows[:, 1:]
    arrays, varlen = {"idx": idx, "targets": targets}, None
    if document_end is not None:
        is_start = idx == document_end
        is_start[:, 0] = True
        index = np.arange(idx.size)
        last_start = np.maximum.accumulate(np.where(is_start.ravel(), index, 0))
        arrays = {
            "idx": idx.ravel(),
            "targets": targets.ravel(),
            "pos": index - last_start,
            "sequence_id": is_start.ravel().cumsum(),
            "response_id": np.zeros_like(index),
        }
        varlen = varlen_layout(arrays["sequence_id"], arrays["response_id"])
    tensors = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}
    return Batch(**tensors, varlen=varlen, num_tokens=idx.size).pin_memory()
