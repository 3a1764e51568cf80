"""Sample responses from a checkpoint; also the batched generation that training uses.

    python sample.py out/demo/sft --prompt 'What does `os.getcwd()` do?'
    python sample.py out/demo/sft --chat
    python sample.py out/demo/sft --prompts data/pydocs/val.jsonl --out samples.jsonl --n 4

Start reading at `generate`. It uses continuous batching (Orca, OSDI 2022): finished requests leave
the batch and waiting ones join it, so one long response does not hold up the others. Keys and
values are cached (nanospin/kv_cache.py). nanospin/decoding.py makes a single step fast.
"""

import functools
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from data import cli, tokenizer
from data.files import printable
from data.progress import ProgressBar
from data.rows import encode_prompt, encode_prompts, read_rows, sampled_row, write_rows
from data.template import (
    RAW,
    cut_prompt_ids,
    split_template,
    without_thoughts,
    written_text,
)
from model import GPT
from nanospin import distributed, sample_command
from nanospin.decoding import DecodeStep, prepacked_weights
from nanospin.kv_cache import KVCache, Prompt
from nanospin.sample_command import PartialSamples

# Tokens of the prompts that are processed at a time, about; on a GPU those of a micro-batch.
PREFILL_TOKENS = {"cpu": 8192, "cuda": 32768}
BURST = {"cpu": 1, "cuda": 16}  # tokens per row between two checks for ends, which a GPU waits for


# ---- one token


def sample_token(
    logits: torch.Tensor,
    uniform: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> torch.Tensor:
    """Sample one id per row: logits (B, V) float32, uniform (B,) float64 in [0, 1) -> (B,).

    temperature 0 is greedy. top_k keeps the k most likely tokens. top_p keeps the fewest tokens
    whose probability reaches p (nucleus sampling, arXiv 1904.09751), after temperature and top_k.
    """
    if temperature == 0:
        return logits.argmax(-1)
    if temperature != 1:
        logits = logits / temperature
    if top_k and top_k < logits.shape[-1]:
        kth_largest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth_largest, -torch.inf)
    probs = logits.softmax(-1)
    if top_p and top_p < 1:
        sorted_probs, order = probs.sort(-1, descending=True)
        before = cumsum(sorted_probs) - sorted_probs  # probability of the more likely tokens
        outside = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, order, before >= top_p)
        probs = probs.masked_fill(outside, 0.0)
    return inverse_cdf(probs, uniform)


def inverse_cdf(probs, uniform):
    """The id at which the cumulative probability exceeds `uniform`: (B, V), (B,) -> (B,).

    First the block of 64 ids, then the id in the block: a sum is ten times as fast as a cumsum.
    """
    blocks = F.pad(probs, (0, -probs.shape[-1] % 64)).unflatten(-1, (-1, 64))  # (B, V / 64, 64)
    block_probs = blocks.sum(-1)
    point = uniform.float()[:, None] * block_probs.sum(-1, keepdim=True)  # (B, 1)
    block, rest = find_bin(block_probs, point)
    ids_in_block = blocks.take_along_dim(block[..., None], 1).squeeze(1)  # (B, 64)
    index, _ = find_bin(ids_in_block, rest)
    return (64 * block + index).squeeze(-1)


def find_bin(weights, point):
    """The first bin where the cumulative sum of weights (B, n) exceeds point (B, 1), and how far
    into this bin the point is; both (B, 1)."""
    cumulative = cumsum(weights)
    # Clamp to [0, total): after rounding, the point could fall into a bin of weight 0.
    point = torch.minimum(point.clamp(min=0.0), cumulative[:, -1:] * (1 - 2**-23))
    found = torch.searchsorted(cumulative, point, right=True)
    return found, point - (cumulative - weights).gather(-1, found)


def cumsum(x):
    """Cumulative sums of the rows of x. In deterministic mode PyTorch refuses them on a GPU, where
    only the sum of one very long row depends on the order of its parts."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        return x.cumsum(-1)
    finally:
        torch.use_deterministic_algorithms(deterministic)


# ---- batched generation


@dataclass
class Request:
    """A prompt and the tokens sampled for it so far."""

    index: int  # its place in the list of prompts
    prompt: list[int]
    max_new_tokens: int
    shares_prompt: bool  # whether other requests have the same prompt
    new_ids: list[int] = field(default_factory=list)

    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.new_ids)

    def has_ended(self, eot) -> bool:
        if not self.new_ids:
            return False
        return self.new_ids[-1] in eot or len(self.new_ids) == self.max_new_tokens

    def extend(self, ids, eot):
        """Append sampled ids, up to the end, to a request that has not ended."""
        ids = ids[: self.max_new_tokens - len(self.new_ids)]
        ends = [i for i, token in enumerate(ids) if token in eot]
        self.new_ids += ids[: ends[0] + 1] if ends else ids


@dataclass
class Row:
    """A request in the batch, and the place of its keys and values (of all tokens but the last)."""

    request: Request
    last_id: torch.Tensor  # (1,) on the device
    cache: KVCache
    cache_row: int
    prompt: Prompt | None  # that it shares with other rows


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # compiled blocks would be compiled for each length
def generate(
    model,
    prompts: list[list[int]],
    max_new_tokens: int | list[int],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eot: int | Collection[int] | None = None,
    generator: torch.Generator | None = None,
    *,
    batch_size: int = 128,
    request_ids=None,
    progress: ProgressBar | None = None,
    on_token: Callable[[int, list[int]], None] | None = None,
    on_end: Callable[[int, list[int]], None] | None = None,
) -> list[list[int]]:
    """Sample a continuation of each prompt. Returns the new ids of each prompt.

    max_new_tokens: a limit for all prompts, or one for each. Prompt and continuation together have
        at most block_size tokens.
    eot: the token or tokens that end a continuation. The one that does is part of the result.
    generator: seeds the random numbers. The t-th one of a request depends only on the generator,
        the request's id and t, so neither batch_size nor the other prompts change a sample.
    batch_size: most requests in the batch. Others join when a quarter of it has ended.
    request_ids: an integer for each prompt; default 0, 1, 2, ...
    progress: a progress bar that advances with every finished request.
    on_token: called as on_token(i, new ids of prompt i so far) while they grow.
    on_end: called as on_end(i, new ids of prompt i) when the request leaves the batch.

    Raises ValueError for a prompt that is empty or fills block_size.
    """
    if eot is None or isinstance(eot, int):
        eot = {eot}
    device = model.wte.weight.device
    requests = make_requests(prompts, max_new_tokens, model.config.block_size)
    waiting = sorted(requests, key=lambda request: len(request.prompt), reverse=True)

    longest = max((request.max_new_tokens for request in requests), default=1)
    if request_ids is None:
        request_ids = range(len(requests))
    uniform = uniform_numbers(request_ids, longest, generator).to(device)

    def sample(request_index, logits, num_sampled):
        """One token per row: (B,), (B, V), (B,) -> (B,)."""
        u = uniform[request_index, num_sampled.clamp(max=longest - 1)]
        return sample_token(logits, u, temperature, top_k, top_p)

    was_training = model.training
    model.eval()
    rows = []  # the batch, in the order of the KV cache's rows
    # A single autocast around all steps casts the weights once.
    with model.autocast(device), prepacked_weights(model, min(batch_size, len(prompts))):
        while rows or waiting:
            running = [row for row in rows if not row.request.has_ended(eot)]
            if len(running) <= 0.75 * (batch_size if waiting else len(rows)):
                # Finished requests leave, waiting ones join, the shortest prompts first.
                report_ended([row.request for row in rows], eot, progress, on_end)
                num_joining = min(len(waiting), batch_size - len(running))
                joining = [waiting.pop() for _ in range(num_joining)]
                rows = running + admit(model, running, joining, sample, on_token)
                if rows:
                    step = regroup(model, rows, sample)
                continue

            # Rows that have ended are decoded too until they leave. Their tokens are ignored.
            sampled = []
            for _ in range(BURST[device.type]):
                step()
                sampled.append(step.ids.clone())
            new_ids = torch.stack(sampled, 1).tolist()  # (B, BURST)
            for row, ids in zip(rows, new_ids):
                request = row.request
                if request.has_ended(eot):
                    continue
                request.extend(ids, eot)
                if on_token is not None:
                    on_token(request.index, request.new_ids)
    model.train(was_training)
    return [request.new_ids for request in requests]


def report_ended(requests, eot, progress, on_end):
    """Tell `progress` and `on_end` of those of a batch's requests that have ended."""
    ended = [request for request in requests if request.has_ended(eot)]
    if progress is not None:
        progress.update(len(ended))
    if on_end is not None:
        for request in ended:
            on_end(request.index, request.new_ids)


def make_requests(prompts, max_new_tokens, block_size) -> list[Request]:
    if isinstance(max_new_tokens, int):
        max_new_tokens = [max_new_tokens] * len(prompts)
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < block_size:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens; it must have 1 to {block_size - 1}"
            )
    if min(max_new_tokens, default=1) < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {min(max_new_tokens)}")
    counts = Counter(tuple(prompt) for prompt in prompts)
    requests = []
    for i, (prompt, limit) in enumerate(zip(prompts, max_new_tokens)):
        shares_prompt = counts[tuple(prompt)] > 1
        requests.append(Request(i, prompt, min(limit, block_size - len(prompt)), shares_prompt))
    return requests


def uniform_numbers(request_ids, n, generator) -> torch.Tensor:
    """Random numbers (requests, n) float64 in [0, 1). A row depends only on its request's id and on
    one number from the generator."""
    key = int(torch.randint(2**62, (), generator=generator))
    rows = []
    for request_id in request_ids:
        philox = np.random.Philox(key=[key, request_id])
        rows.append(np.random.Generator(philox).random(n))
    return torch.from_numpy(np.array(rows))


def admit(model, running, requests, sample, on_token) -> list[Row]:
    """Prefill the prompts and sample each request's first token. running: the rows in the batch,
    which may have the same prompts."""
    prompts = {tuple(row.request.prompt): row.prompt for row in running}
    rows = []
    for group in prefill_groups(requests, PREFILL_TOKENS[model.wte.weight.device.type]):
        logits, places = prefill(model, [request.prompt for request in group])
        index = torch.tensor([request.index for request in group], device=logits.device)
        ids = sample(index, logits, torch.zeros_like(index))
        for request, token in zip(group, ids.tolist()):
            request.new_ids.append(token)
            if on_token is not None:
                on_token(request.index, request.new_ids)
        for request, last_id, (cache, cache_row) in zip(group, ids.split(1), places):
            key = tuple(request.prompt)
            if request.shares_prompt and key not in prompts:
                prompts[key] = cache.prompt(cache_row)
            rows.append(Row(request, last_id, cache, cache_row, prompts.get(key)))
    return rows


def prefill_groups(requests, num_tokens: int) -> list[list[Request]]:
    """Split requests, shortest prompt first, into groups of about num_tokens padded tokens. Equal
    prompts count once."""
    groups = []
    prompts = set()  # of the last group
    for request in requests:
        prompts.add(tuple(request.prompt))
        if groups and len(prompts) * len(request.prompt) <= num_tokens:
            groups[-1].append(request)
        else:
            groups.append([request])
            prompts = {tuple(request.prompt)}
    return groups


def prefill(model, prompts) -> tuple[torch.Tensor, list[tuple[KVCache, int]]]:
    """Run the model on N prompts, equal ones once. Returns the logits (N, V) of the token after
    each prompt, and the (cache, row) that holds its keys and values."""
    unique = list(dict.fromkeys(tuple(prompt) for prompt in prompts))
    row_of = {prompt: b for b, prompt in enumerate(unique)}
    rows = [row_of[tuple(prompt)] for prompt in prompts]

    lengths = [len(prompt) for prompt in unique]
    T = max(lengths)
    device = model.wte.weight.device
    idx = torch.tensor([list(ids) + [0] * (T - len(ids)) for ids in unique], device=device)
    last = torch.tensor([b * T + n - 1 for b, n in enumerate(lengths)], device=device)
    cache = KVCache(lengths)
    logits = model(idx, logit_positions=last, cache=cache)
    return logits[rows], [(cache, b) for b in rows]


def regroup(model, rows: list[Row], sample) -> DecodeStep:
    """Sort the rows and move them to one new KV cache. Returns its decoding step."""
    counts = Counter(row.prompt for row in rows)

    def order(row):
        """By length; if a prompt is shared, by the number of its rows, and the prompt."""
        length = row.request.num_tokens()
        if row.prompt is None:
            return 0, length
        return counts[row.prompt], row.prompt.length, row.request.prompt, length

    rows.sort(key=order)
    cached = [row.request.num_tokens() - 1 for row in rows]  # all but the last token
    cache = KVCache()
    sources = [(row.cache, row.cache_row) for row in rows]
    prompts = [row.prompt for row in rows]
    cache.rebuild(sources, cached, prompts)
    ids = torch.cat([row.last_id for row in rows])
    for b, row in enumerate(rows):
        row.last_id, row.cache, row.cache_row = ids[b : b + 1], cache, b  # ids changes in place

    index = torch.tensor([row.request.index for row in rows], device=ids.device)
    pos = torch.tensor(cached, device=ids.device)
    num_sampled = torch.tensor([len(row.request.new_ids) for row in rows], device=ids.device)
    return DecodeStep(model, cache, ids, pos, num_sampled, functools.partial(sample, index))


# ---- text


def respond(
    model,
    enc,
    template: str,
    rows: list[dict],
    max_prompt: int = 0,
    max_response: int = 0,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    request_ids=None,
    **options,
) -> tuple[list[str | None], list[list[int] | None]]:
    """Sample a response to the prompt of each row. Returns (texts, ids).

    Template and limits are those of training and scoring. Both results are None for a prompt that
    is empty or leaves no room. options: batch_size, progress, on_token and on_end of `generate`.
    """
    block_size = model.config.block_size
    prompts = [encode_prompt(row, enc, template, block_size, max_prompt)[0] for row in rows]
    fits = [i for i, prompt in enumerate(prompts) if prompt]
    if request_ids is None:
        request_ids = range(len(rows))
    sampled = generate(
        model,
        [prompts[i] for i in fits],
        max_response or block_size,
        temperature,
        top_k,
        top_p,
        tokenizer.stop_ids(enc).values(),
        torch.Generator().manual_seed(seed),
        request_ids=[request_ids[i] for i in fits],
        **options,
    )
    texts, ids = [None] * len(rows), [None] * len(rows)
    for i, new_ids in zip(fits, sampled):
        texts[i] = response_text(enc, new_ids, template)
        ids[i] = new_ids
    return texts, ids


def response_text(enc, ids: list[int], template: str) -> str:
    """The text of a response, without the token that ends it, and without what the template says
    that the model writes around it."""
    return split_template(template).text_of(written_text(enc, template, ids))


def chat(model, enc, template, lines, system="", max_prompt=0, max_response=0, seed=0, **sampling):
    """Answer one line after the other, with the earlier turns as context.

    system: a system message, or "". What leaves no room for a response of max_response tokens, or
    of half of block_size if that is 0, is cut (`data.template.cut_prompt_ids`), and that is said
    once. Responses are printed while they grow.
    """
    block_size = model.config.block_size
    room = max_response or block_size // 2
    limit = min(max_prompt or block_size, max(1, block_size - room))
    keeps_ids = split_template(template).is_verbatim()
    history = []
    said = False
    for turn, line in enumerate(lines):
        line = line.strip()
        if not line:
            continue
        prompt, was_cut = cut_prompt_ids(enc, template, line, history, limit, system)
        if not prompt:  # the template takes more than that: a response gets what is left
            limit = min(max_prompt or block_size, block_size - 1)
            prompt, was_cut = cut_prompt_ids(enc, template, line, history, limit, system)
        if not prompt:
            reason = "template leaves no room" if was_cut else "tokenizer has no tokens"
            print(f"(the {reason} for this)", flush=True)
            continue
        if was_cut and not said:
            setting = ", max_prompt" if limit == max_prompt else ""
            text = f"(the oldest part is cut: the text has room for {limit} tokens{setting})"
            print(text, file=sys.stderr)
            said = True
        stream = StreamPrinter(enc, template)
        (new_ids,) = generate(
            model,
            [prompt],
            max_response or block_size,
            eot=tokenizer.stop_ids(enc).values(),
            generator=torch.Generator().manual_seed(seed),
            request_ids=[turn],
            on_token=stream.on_token,
            **sampling,
        )
        stream.finish(new_ids)
        if keeps_ids:
            history.append((line, [i for i in new_ids if not tokenizer.is_end(enc, i)]))
        else:
            text = response_text(enc, new_ids, template)
            history.append((line, without_thoughts(template, text)))


class StreamPrinter:
    """Prints a response while it is sampled, with what the template says that the model writes
    around it."""

    def __init__(self, enc, template: str):
        self.enc = enc
        self.template = template
        self.num_printed = 0  # characters

    def on_token(self, _, ids):
        # A character of several tokens decodes to U+FFFD until its last token has come.
        text = written_text(self.enc, self.template, ids).rstrip("\ufffd")
        print(printable(text[self.num_printed :]), end="", flush=True)
        self.num_printed = max(self.num_printed, len(text))

    def finish(self, ids):
        text = written_text(self.enc, self.template, ids)
        print(printable(text[self.num_printed :]), flush=True)


# ---- command line


def main(argv=None):
    parser = sample_command.make_parser(__doc__)
    args = parser.parse_args(argv)
    sample_command.check_arguments(parser, args)
    distributed.configure_torch(args.device)
    model, enc, meta = GPT.from_checkpoint(args.checkpoint, args.device, args.dtype)
    if model.config.scalar_head:
        parser.error(f"{args.checkpoint} is a reward model. It scores responses (eval.py)")
    cfg = meta["config"]
    settings = {
        "template": raw_template(enc) if args.raw else cfg["template"],
        "max_prompt": cfg["max_prompt"],
        "max_response": min(args.max_new_tokens, model.config.block_size) or cfg["max_response"],
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "seed": args.seed,
    }
    if args.prompts:
        weights = f"{meta['weights_sha256']} {args.dtype}"
        respond_to_file(model, enc, weights, args.prompts, args.out, args.n, settings)
    elif args.prompt is not None:
        row = {"prompt": args.prompt, "system": args.system}
        limits = (settings["template"], model.config.block_size, settings["max_prompt"])
        if encode_prompt(row, enc, *limits)[1]:
            print("(the prompt is cut to max_prompt or block_size)", file=sys.stderr)
        texts, _ = respond(model, enc, rows=[row] * args.n, **settings)
        if texts[0] is None:
            texts = ["(the prompt leaves no room for a response)"]
        for text in texts:
            print(printable(text))
    else:
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")
        if sys.stdin.isatty():
            print("one prompt per line; end with Ctrl-D")
        chat(model, enc, lines=sys.stdin, system=args.system, **settings)


def raw_template(enc) -> str:
    """RAW. With a tokenizer that puts no token before a text {prompt} is the same, and what older
    versions had: their unfinished samples are continued."""
    return RAW if tokenizer.begin(enc) else "{prompt}"


def respond_to_file(model, enc, weights: str, prompts_path, out_path, count: int, settings):
    """Write rows with a sampled response to each prompt of a file: ranked rows with K = 1, `count`
    of each prompt, one after the other.

    Finished samples are kept in OUT.partial, and a killed command that is run again continues from
    there. weights: the hash of the model's, and its dtype.
    """
    rows = read_rows(prompts_path, prompt_only=True)
    template, max_prompt = settings["template"], settings["max_prompt"]
    prompts, counts = encode_prompts(rows, enc, template, model.config.block_size, max_prompt)
    # the numbers of the samples: `count` for each prompt that leaves room
    numbers = []
    for i, ids in enumerate(prompts):
        if ids:
            numbers += range(i * count, (i + 1) * count)
    num_texts = sum(not row["prompt"] for row in rows)
    no_room = counts["dropped"] - num_texts
    if not numbers:
        raise SystemExit(
            f"{prompts_path}: nothing to respond to: {num_texts} of its {len(rows)} rows are whole "
            f"texts, and {no_room} prompts leave no room"
        )
    sources = json.dumps([weights, tokenizer.fingerprint(enc), count, settings, prompts])
    partial = PartialSamples(out_path, hashlib.sha256(sources.encode()).hexdigest())
    left = [number for number in numbers if number not in partial.ids]
    if len(left) < len(numbers):
        print(f"{partial.path}: {len(numbers) - len(left)} of {len(numbers)} samples are there")

    def keep(n, new_ids):
        partial.add(left[n], response_text(enc, new_ids, template), new_ids)

    with ProgressBar(total=len(numbers), initial=len(numbers) - len(left), desc="sampling") as bar:
        rows_left = [rows[number // count] for number in left]
        options = settings | {"request_ids": left, "progress": bar, "on_end": keep}
        respond(model, enc, rows=rows_left, **options)
    written = []
    for number in numbers:
        ids = partial.ids[number]
        text = response_text(enc, ids, template)
        written.append(sampled_row(rows[number // count], text, ids, enc, template))
    write_rows(out_path, written)
    partial.remove()
    note = f", {count} for each prompt" if count > 1 else ""
    note += f", {counts['prompts cut']} prompts cut" if counts["prompts cut"] else ""
    note += f", {no_room} prompts left no room" if no_room else ""
    note += f", {num_texts} whole texts have no prompt" if num_texts else ""
    print(f"{out_path}: {len(written)} rows{note}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
