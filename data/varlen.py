"""The lengths of packed prompts and responses, for attention kernels that take many lengths."""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor


@dataclass
class VarlenLayout:
    """Packed tokens as FlashAttention's kernels (arXiv 2307.08691) take them: sequences one after
    the other, and the place where each starts (`cu_seqlens`).

    A segment is a prompt or a response. A row here has a prompt and responses that are read. The
    tokens are in another order, so that the rows' prompts and responses are slices:

        prompts of rows, p tokens | responses of rows, r tokens | the rest: texts, prompts alone,
                                                                | documents, padding
    """

    order: Tensor  # (n,) int64: which token of the batch comes here
    place: Tensor  # (n,) int64: where a token of the batch is; the inverse
    segment_starts: Tensor  # (S + 1,) int32: where each segment starts, and the end, n
    prompt_starts: Tensor  # (G + 1,) int32: where the prompt of each row starts, and the end, p
    response_starts: Tensor  # (G + 1,) int32: its responses, counted from p, and the end, r
    num_prompt_tokens: int  # p
    num_response_tokens: int  # r
    longest_segment: int  # in tokens, rounded up
    longest_prompt: int
    longest_responses: int  # of a row, together

    def map_tensors(self, function) -> "VarlenLayout":
        changed = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                changed[f.name] = function(value)
        return replace(self, **changed)


def varlen_layout(sequence_id: np.ndarray, response_id: np.ndarray) -> VarlenLayout:
    """Of packed tokens (n,): see nanospin/attention.py."""
    row = (np.diff(sequence_id, prepend=-1) != 0).cumsum() - 1
    is_prompt = response_id == 0
    num_rows = row.max(initial=-1) + 1
    prompt_lengths = np.bincount(row[is_prompt], minlength=num_rows)
    response_lengths = np.bincount(row[~is_prompt], minlength=num_rows)
    has_both = (prompt_lengths > 0) & (response_lengths > 0)

    part = np.where(has_both[row], np.where(is_prompt, 0, 1), 2)
    order = np.argsort(part, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    new_segment = np.diff(row[order], prepend=-1) != 0
    new_segment |= np.diff(response_id[order], prepend=-1) != 0
    segment_lengths = np.diff(np.flatnonzero(new_segment), append=len(row))
    prompt_lengths, response_lengths = prompt_lengths[has_both], response_lengths[has_both]
    return VarlenLayout(
        order=torch.from_numpy(order),
        place=torch.from_numpy(place),
        segment_starts=starts(segment_lengths),
        prompt_starts=starts(prompt_lengths),
        response_starts=starts(response_lengths),
        num_prompt_tokens=int(prompt_lengths.sum()),
        num_response_tokens=int(response_lengths.sum()),
        longest_segment=longest(segment_lengths),
        longest_prompt=longest(prompt_lengths),
        longest_responses=longest(response_lengths),
    )


def starts(lengths: np.ndarray) -> Tensor:
    """Lengths (S,) -> the start of each and the end of the last (S + 1,), int32."""
    return torch.from_numpy(np.cumsum(np.append(0, lengths)).astype(np.int32))


def longest(lengths: np.ndarray) -> int:
    """The largest length, rounded up to blocks of 128: kernels need only a bound."""
    return -(-int(lengths.max(initial=0)) // 128) * 128
