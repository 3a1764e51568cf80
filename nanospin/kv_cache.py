"""x"""

import itertools
import math
import torch
from nanospin.attention import round_up


GROUP = {"cpu": 16, "cuda": 4096}  # rows of a cache that share a length


ROOM = {
    "cpu": 32,
    "cuda": 128,
}  # columns that it grows by, which cost time until they are used: more where growing costs a new graph


class KVCache:
    """Keys and values of every layer. Rows stand in groups of like length, so that work grows with the tokens that are there.
    In a group all rows end at one column, and the next token of each goes there; where a row begins, a mask says."""

    asked = None  # the next token of every row is

    def __init__(self, ends=()):
        self.k, self.v = (
            {},
            {},
        )  # layer -> the groups' (b, Hkv, length, D), which make up the rows (B, ...)
        self.ends = list(ends)  # the column behind each group's last tokens
        self.column = None  # (groups,): that of the last tokens, for the device

    def store(self, layer, k, v):
        """Whole rows (B, Hkv, T, D), right-padded from `ends` on: each is a group."""
        self.k[layer], self.v[layer] = list(k.split(1)), list(v.split(1))

    def rebuild(self, rows, lengths):
        """Take over `rows`, [(cache, its row)], of so many tokens each. They are grouped as they come, so sort them by length."""
        first = next(iter(rows[0][0].k))
        device = rows[0][0].k[first][0].device
        stands = {
            id(cache): [(g, b) for g, group in enumerate(cache.k[first]) for b in range(len(group))]
            for cache, _ in rows
        }
        spans = [slice(i, i + GROUP[device.type]) for i in range(0, len(rows), GROUP[device.type])]
        self.ends = [max(lengths[span]) for span in spans]
        self.column = torch.tensor(self.ends, device=device) - 1
        runs = []  # of each new group: (cache, its group, rows of that) that it takes over, one after the other
        for span in spans:
            placed = [(cache, *stands[id(cache)][r]) for cache, r in rows[span]]
            runs.append(
                [
                    (*key, torch.tensor([b for *_, b in run], device=device))
                    for key, run in itertools.groupby(placed, key=lambda p: p[:2])
                ]
            )
        for name in ("k", "v"):
            for layer in rows[0][0].k:
                getattr(self, name)[layer] = [
                    grown(
                        [
                            getattr(cache, name)[layer][g][:, :, : cache.ends[g]].index_select(
                                0, taken
                            )
                            for cache, g, taken in run
                        ],
                        end,
                    )
                    for run, end in zip(runs, self.ends)
                ]

    def room(self):
        """How many steps there is room for before keys and values move."""
        return min(
            group.shape[2] - end for group, end in zip(next(iter(self.k.values())), self.ends)
        )

    def at(self, pos, window=0):
        """Before a step: the next token of each row stands at pos (B,) of its text, and sees the last `window` up to itself; 0: all.
        With room, all that a step does is done to tensors, so that a CUDA graph of one step is one of the next."""
        if not self.room():
            for groups in (*self.k.values(), *self.v.values()):
                groups[:] = [
                    grown([group], end) if end == group.shape[2] else group
                    for group, end in zip(groups, self.ends)
                ]
        groups, self.masks = next(iter(self.k.values())), []
        self.ends = [end + 1 for end in self.ends]
        self.column += 1
        for group, column, p in zip(
            groups, self.column, pos.split([len(group) for group in groups])
        ):
            ago = column - torch.arange(
                group.shape[2], device=pos.device
            )  # (length,): so many tokens before this one
            seen = (ago >= 0) & (ago <= p[:, None])  # (b, length)
            seen = seen & (ago < window) if window else seen
            mask = torch.zeros(seen.shape, dtype=group.dtype, device=pos.device).masked_fill_(
                ~seen, -math.inf
            )
            self.masks.append(
                mask.repeat_interleave(group.shape[1], 0)[:, None]
            )  # (b Hkv, 1, length)

    @torch.compiler.disable
    def attend(self, layer, q, k, v):
        sizes, out = [len(group) for group in self.k[layer]], []
        for q, k, v, K, V, column, mask in zip(
            *(x.split(sizes) for x in (q, k, v)),
            self.k[layer],
            self.v[layer],
            self.column.split(1),
            self.masks,
        ):
            K.index_copy_(2, column, k[:, :, None])
            V.index_copy_(2, column, v[:, :, None])
            b, H, S, D = K.shape
            scores = torch.baddbmm(
                mask, q.reshape(b * H, -1, D), K.view(b * H, S, D).mT, alpha=D**-0.5
            )  # (b Hkv, g, S)
            out.append((torch.softmax(scores, -1) @ V.view(b * H, S, D)).view(b, -1, D))
        return torch.cat(out)


def grown(parts, end):
    """Rows, in parts (b, Hkv, length, D), as one tensor where all end at this column, with room behind it, rounded up."""
    _, H, _, D = parts[0].shape
    sizes = [len(part) for part in parts]
    whole = parts[0].new_empty(sum(sizes), H, round_up(end + 1, ROOM[parts[0].device.type]), D)
    whole[:, :, end:].zero_()
    for new, part in zip(whole.split(sizes), parts):
        n = min(part.shape[2], end)
        new[:, :, : end - n].zero_()
        new[:, :, end - n : end] = part[:, :, part.shape[2] - n :]
    return whole
