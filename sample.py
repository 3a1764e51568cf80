r"""Batched generation with a KV cache; also a command line.

python sample.py out/demo/sft --prompt "what does \`os.getcwd()\` do?"
python sample.py out/demo/sft --chat
python sample.py out/demo/sft --prompts data/pydocs/val.jsonl --out samples.jsonl
"""

import argparse
import contextlib
import functools
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from nanospin.kv_cache import KVCache
from nanospin.attention import small_matmuls
from data.files import printable
from data.rows import prompt_fields, read_rows, write_rows
from data import tokenizer
from data.template import with_bos, prompt_ids


def sample_token(logits, uniform, temperature=1.0, top_k=None, top_p=None):
    """One id a row by inverse CDF: logits (B, V) float32, uniform (B,) float64 in [0, 1) -> (B,).

    temperature 0 is greedy. top_k keeps the k most likely; top_p the fewest whose probability reaches p
    (nucleus sampling, arXiv 1904.09751), after temperature and top_k.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature if temperature != 1 else logits
    if top_k and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    probs = logits.softmax(-1)
    if top_p and top_p < 1:
        ordered, where = probs.sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # what the more likely ones already reach
        probs = probs.masked_fill(torch.zeros_like(outside).scatter(-1, where, outside), 0.0)
    blocks = F.pad(probs, (0, -probs.shape[-1] % 64)).unflatten(
        -1, (-1, 64)
    )  # a sum is ten times as fast as a cumulative one
    weights = blocks.sum(-1)
    block, rest = searchsorted_weights(
        weights, uniform.float()[:, None] * weights.sum(-1, keepdim=True)
    )
    return (
        64 * block
        + searchsorted_weights(blocks.take_along_dim(block[..., None], 1).squeeze(1), rest)[0]
    ).squeeze(-1)


def searchsorted_weights(weights, point):
    """Which of weights (B, n) >= 0 first brings their sum above point (B, 1), and how far into it that is (both (B, 1)). The point
    is kept in [0, total) against rounding, so what is found has a weight."""
    total = weights.cumsum(-1)
    point = torch.minimum(point.clamp(min=0.0), total[:, -1:] * (1 - 2**-23))
    found = torch.searchsorted(total, point, right=True)
    return found, point - (total - weights).gather(-1, found)


@contextlib.contextmanager
def prepacked_weights(model, rows):
    """The model with a CPU's products for some `rows` a step: weights lie as oneDNN reads them, which every call else brings about
    anew, GELU is made in the same kernel, and attention has its `small_products`. The weights are there twice meanwhile. A GPU's,
    FSDP2's and other dtypes are left as they are."""
    weight = model.wte.weight
    dtype = model.products or weight.dtype
    # FSDP2's models have `reshard`; a look at one weight would not do, which may be whole between two steps
    if (
        weight.device.type != "cpu"
        or hasattr(model, "reshard")
        or not (
            torch.backends.mkldnn.is_available()
            and (
                dtype == torch.float32
                or dtype == torch.bfloat16
                and torch.ops.mkldnn._is_mkldnn_bf16_supported()
            )
        )
    ):
        yield
        return

    def product(weight, bias=None, then=("none", [], "")):
        laid = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), rows)
        bias = None if bias is None else bias.detach().to(dtype)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x.to(dtype), laid, bias, *then)

    changed = [
        (
            model,
            "head",
            product(weight)
            if model.config.tie
            else product(model.lm_head.weight, model.lm_head.bias),
        )
    ]
    for block in model.h:
        gelu = block.mlp.c_fc if model.config.mlp == "gelu" else None
        changed += [
            (m, "forward", product(m.weight, m.bias))
            for m in block.modules()
            if isinstance(m, torch.nn.Linear) and m is not gelu
        ]
        changed += (
            [(block.mlp, "inner", product(gelu.weight, gelu.bias, ("gelu", [], "tanh")))]
            if gelu
            else []
        )
    try:
        for module, name, made in changed:
            setattr(module, name, made)
        with (
            small_matmuls(),
            torch.inference_mode(),
        ):  # the latter spares every operation some bookkeeping
            yield
    finally:
        for module, name, _ in changed:
            module.__dict__.pop(name, None)


GRAPHS = {"cuda"}  # where a step is captured


class DecodeStep:
    """One more token for every row of a cache: ids (B,) the last ones, pos (B,) where they stand, t (B,) how many were drawn, all of
    which it goes on in place; choose(logits (B, V), t) -> ids. On a GPU the step is captured, and made again by a CUDA graph, one
    launch for its hundreds of kernels, until the cache has to grow. An FSDP2 model's is not: its ranks meet within a step."""

    def __init__(self, model, cache, ids, pos, t, choose):
        self.model, self.cache, self.ids, self.pos, self.t, self.choose = (
            model,
            cache,
            ids,
            pos,
            t,
            choose,
        )
        self.replay = None

    def __call__(self):
        if self.replay is not None and self.cache.room():
            self.replay()
            self.cache.ends = [end + 1 for end in self.cache.ends]
            return
        self.once()
        self.replay = None
        if (
            self.ids.device.type in GRAPHS
            and self.cache.room()
            and not hasattr(self.model, "reshard")
        ):
            ends = self.cache.ends
            self.replay = capture_cuda_graph(self.once)
            self.cache.ends = ends  # nothing was done yet

    def once(self):
        logits = self.model(
            self.ids, pos=self.pos.clamp(max=self.model.config.block_size - 1), cache=self.cache
        )  # (B, V)
        self.ids.copy_(self.choose(logits, self.t))
        self.pos += 1
        self.t += 1


def capture_cuda_graph(work):
    """A function that does again, by a CUDA graph, what `work` does to tensors, which must have been done before; None, and a line, where
    `work` does what a graph cannot."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(
            graph, capture_error_mode="thread_local"
        ):  # other threads, a save's, may go on
            work()
    except RuntimeError as e:
        if (
            torch.cuda.current_stream() != stream
        ):  # the capture could not be ended: neither memory nor random numbers are what they were
            raise
        GRAPHS.clear()
        print(
            f"sampling goes on without CUDA graphs ({str(e).splitlines()[0]})",
            file=sys.stderr,
            flush=True,
        )
        return None
    return graph.replay


PREFILL_TOKENS = 8192  # prompts are read about so many tokens at a time
BURST = {
    "cpu": 1,
    "cuda": 16,
}  # tokens drawn between two looks at who has ended: a GPU waits for each look


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # compiled blocks would compile again for each length
def generate(
    model,
    prompts,
    max_new_tokens,
    temperature=1.0,
    top_k=None,
    top_p=None,
    eot=None,
    generator=None,
    *,
    batch_size=128,
    numbers=None,
    progress=None,
    heard=None,
):
    """Continue each prompt (a list of ids) -> the new ids of each, eot included where it ended.

    A continuation is at most max_new_tokens long (an int, or one for each prompt), and prompt and continuation fit
    block_size. At most batch_size requests are under way; when a quarter of them has ended, they leave and the next ones
    come in, the shortest prompts first (continuous batching; Orca, OSDI 2022). Equal prompts that come in together are read once. generator (torch) seeds the
    draws: the t-th draw of a request is a function of (one number from the generator, the request's number, t), so neither
    the batch size nor the other prompts change it; `numbers` gives the requests' numbers, else 0, 1, 2 ...
    progress: a tqdm bar to advance. heard(i, ids): called with what request i has said so far, as it grows. Raises ValueError for a prompt that is empty or leaves no room.
    """
    block_size, device = model.config.block_size, model.wte.weight.device
    for i, p in enumerate(prompts):
        if not 0 < len(p) < block_size:
            raise ValueError(f"prompt {i} has {len(p)} tokens; it must have 1 to {block_size - 1}")
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    if min(limits, default=1) < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {min(limits)}")
    key = int(torch.randint(2**62, (), generator=generator))
    numbers = range(len(prompts)) if numbers is None else numbers
    longest = max(limits, default=1)
    draws = [np.random.Generator(np.random.Philox(key=[key, n])).random(longest) for n in numbers]
    uniform = torch.from_numpy(np.array(draws)).to(device)  # (requests, longest) float64
    room = [min(limit, block_size - len(p)) for limit, p in zip(limits, prompts)]
    new = [[] for _ in prompts]
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)

    def choose(where, logits, t):
        return sample_token(
            logits, uniform[where, t.clamp(max=longest - 1)], temperature, top_k, top_p
        )

    rows, cache, burst = (
        [],
        KVCache(),
        BURST[device.type],
    )  # rows: the request of each row of the cache
    ids = torch.zeros(
        0, dtype=torch.long, device=device
    )  # (B,): each row's last token, not yet read
    was_training = model.training
    model.eval()
    # one autocast around all steps casts the weights once
    with (
        torch.autocast(
            device.type, model.products or torch.bfloat16, enabled=model.products is not None
        ),
        prepacked_weights(model, min(batch_size, len(prompts))),
    ):
        while rows or waiting:
            live = [b for b, i in enumerate(rows) if new[i][-1] != eot and len(new[i]) < room[i]]
            if len(live) <= 0.75 * (batch_size if waiting else len(rows)):
                if progress is not None:
                    progress.update(len(rows) - len(live))
                coming = [waiting.pop() for _ in range(min(len(waiting), batch_size - len(live)))]
                there = [
                    (rows[b], ids[b : b + 1], (cache, b)) for b in live
                ]  # (request, its last token, where its row is)
                while coming:
                    group, coming, logits, places = prefill(model, prompts, coming)
                    drawn = sample_token(logits, uniform[group, 0], temperature, top_k, top_p)
                    for i, token in zip(group, drawn.tolist()):
                        new[i].append(token)
                        if heard is not None:
                            heard(i, new[i])
                    there += zip(group, drawn.split(1), places)
                there.sort(key=lambda it: len(prompts[it[0]]) + len(new[it[0]]))
                rows = [i for i, _, _ in there]
                if rows:
                    lengths = [len(prompts[i]) + len(new[i]) - 1 for i in rows]  # in the cache
                    ids, cache = torch.cat([token for _, token, _ in there]), KVCache()
                    cache.rebuild([place for _, _, place in there], lengths)
                    where, pos, t = torch.tensor(
                        [rows, lengths, [len(new[i]) for i in rows]], device=device
                    )
                    step = DecodeStep(model, cache, ids, pos, t, functools.partial(choose, where))
                continue
            drawn = []
            for _ in range(
                burst
            ):  # a row that has ended goes on until it leaves; nobody reads what it says
                step()
                drawn.append(ids.clone())
            drawn = torch.stack(drawn, 1).tolist()
            for b in live:
                said, i = drawn[b], rows[b]
                said = said[: said.index(eot) + 1] if eot in said else said
                new[i] += said[: room[i] - len(new[i])]
                if heard is not None:
                    heard(i, new[i])
    model.train(was_training)
    return new


def prefill(model, prompts, coming):
    """Read the first of some requests' prompts, right-padded, equal ones once -> (those requests, the rest, logits (B, V) of
    what follows each, [(KVCache, row)] of each)."""
    n = 1
    while n < len(coming) and (n + 1) * len(prompts[coming[n]]) <= PREFILL_TOKENS:
        n += 1
    group, device = coming[:n], model.wte.weight.device
    texts = list(dict.fromkeys(tuple(prompts[i]) for i in group))
    rows = {text: b for b, text in enumerate(texts)}
    T = max(map(len, texts))
    idx = torch.tensor([[*text, *[0] * (T - len(text))] for text in texts], device=device)
    last = torch.tensor([b * T + len(text) - 1 for b, text in enumerate(texts)], device=device)
    cache, mine = KVCache(map(len, texts)), [rows[tuple(prompts[i])] for i in group]
    logits = model(idx, at=last, cache=cache)[mine]
    return group, coming[n:], logits, [(cache, b) for b in mine]


def respond(
    model,
    enc,
    template,
    rows,
    max_prompt=0,
    max_response=0,
    seed=0,
    temperature=1.0,
    top_k=None,
    top_p=None,
    **options,
):
    """Responses to the prompts of rows under the template and limits that training and scoring use -> (texts, ids).
    A prompt that is empty or leaves no room gets None for both."""
    block_size = model.config.block_size
    prompts = [
        prompt_ids(enc, template, row["prompt"], row.get("history", ()))[
            -(max_prompt or block_size) :
        ]
        for row in rows
    ]
    fits = [i for i, p in enumerate(prompts) if rows[i]["prompt"] and 0 < len(p) < block_size]
    numbers = options.pop("numbers", range(len(rows)))
    ids = generate(
        model,
        [prompts[i] for i in fits],
        max_response or block_size,
        temperature,
        top_k,
        top_p,
        enc.eot_token,
        torch.Generator().manual_seed(seed),
        numbers=[numbers[i] for i in fits],
        **options,
    )
    by_row = dict(zip(fits, ids))
    ids = [by_row.get(i) for i in range(len(rows))]
    return [None if r is None else response_text(enc, r) for r in ids], ids


def number_type(kind, least, most=float("inf")):
    """An argparse type: an int or float from `least` to `most`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, got {text!r}")
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        if value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got {text}")
        return value

    return parse


def device_type(text):
    """An argparse type: a device that is there."""
    if text not in ("cpu", "cuda") or text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(
            f"must be cpu, or cuda where torch sees a GPU, got {text!r}"
        )
    return text


def response_text(enc, ids):
    """The text of response ids, without the end-of-text that ends it."""
    return enc.decode(ids[:-1] if ids[-1] == enc.eot_token else ids)


def chat(model, enc, template, lines, max_prompt=0, max_response=0, seed=0, **sampling):
    """Answer a line after the other, each in the light of those before; the oldest are forgotten where they leave no room for an
    answer, of half a block if max_response does not say. What is said is printed as it grows."""
    block_size, history = model.config.block_size, []
    limit = min(max_prompt or block_size, max(1, block_size - (max_response or block_size // 2)))
    for turn, line in enumerate(lines):
        if not line.strip():
            continue
        prompt = prompt_ids(enc, template, line.strip(), history)
        while history and len(prompt) > limit:
            history.pop(0)
            prompt = prompt_ids(enc, template, line.strip(), history)
        prompt = prompt[-limit:]
        if not prompt:
            print("(the tokenizer has no tokens for this)", flush=True)
            continue
        printed = [0]

        def heard(_, ids):
            text = response_text(enc, ids)
            whole = text.rstrip("\ufffd")  # a character of several tokens is not there yet
            print(printable(whole[printed[0] :]), end="", flush=True)
            printed[0] = max(printed[0], len(whole))

        (new,) = generate(
            model,
            [prompt],
            max_response or block_size,
            eot=enc.eot_token,
            generator=torch.Generator().manual_seed(seed),
            numbers=[turn],
            heard=heard,
            **sampling,
        )
        print(printable(response_text(enc, new)[printed[0] :]), flush=True)
        history.append((line.strip(), [i for i in new if i != enc.eot_token]))


def main(argv=None):
    from nanospin import checkpoint
    from nanospin import distributed

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: sys.exit(printable(message))  # one line, without the usage
    parser.add_argument("checkpoint", help="a run folder or a checkpoint in it")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="answer this one, and print the answer")
    what.add_argument(
        "--chat",
        action="store_true",
        help="a prompt a line; each sees what was said before, as far as it fits",
    )
    what.add_argument("--prompts", help="a .jsonl file of rows with a prompt; needs --out")
    parser.add_argument("--out", help="where the ranked file goes")
    parser.add_argument(
        "--raw", action="store_true", help="continue the text as it is, without the template"
    )
    parser.add_argument(
        "--temperature",
        type=number_type(float, 0),
        default=1.0,
        help="0: the likeliest token each time",
    )
    parser.add_argument(
        "--top_k",
        type=number_type(int, 0),
        default=0,
        help="of the so many likeliest tokens; 0: of all",
    )
    parser.add_argument(
        "--top_p",
        type=number_type(float, 1e-9, 1),
        default=1.0,
        help="of the fewest tokens that are so likely together; 1: of all",
    )
    parser.add_argument(
        "--max_new_tokens",
        type=number_type(int, 0),
        default=0,
        help="of a response; 0: the checkpoint's max_response",
    )
    parser.add_argument("--seed", type=number_type(int, 0), default=0, help="of the sampling")
    parser.add_argument(
        "--device",
        type=device_type,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda; else cuda if there is one",
    )
    args = parser.parse_args(argv)
    if bool(args.prompts) != bool(args.out):
        parser.error("--prompts and --out go together")
    if args.chat and sys.stdin is None:
        parser.error("--chat reads from standard input, and that is closed")
    if args.prompt is not None and not args.prompt.strip():
        parser.error("the prompt is empty")
    if args.out and not os.path.isdir(os.path.dirname(args.out) or "."):
        parser.error(f"--out {args.out}: No such folder")
    distributed.configure_torch(args.device)
    model, enc, meta = checkpoint.load_model(args.checkpoint, args.device)
    if model.config.scalar:
        parser.error(
            f"{args.checkpoint} is a reward model, no policy: it scores responses (eval.py)"
        )
    settings = dict(
        template=with_bos(enc, "{prompt}") if args.raw else meta["config"]["template"],
        max_prompt=meta["config"]["max_prompt"],
        max_response=args.max_new_tokens or meta["config"]["max_response"],
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    if args.prompts:
        rows = read_rows(args.prompts)
        with tqdm(total=len(rows), desc="sampling", disable=None) as progress:
            texts, ids = respond(model, enc, rows=rows, progress=progress, **settings)
        kept = [(row, text, i) for row, text, i in zip(rows, texts, ids) if i is not None]
        made_by = tokenizer.fingerprint(enc)
        write_rows(
            args.out,
            [
                prompt_fields(row)
                | {
                    "responses": [text],
                    "ids": [i],
                    "tokenizer": made_by,
                    "ended": i[-1] == enc.eot_token,
                }
                for row, text, i in kept
            ],
        )
        print(
            f"{args.out}: {len(kept)} rows"
            + (f", {len(rows) - len(kept)} prompts left no room" if len(kept) < len(rows) else "")
        )
        return
    if args.prompt is not None:
        texts, _ = respond(model, enc, rows=[{"prompt": args.prompt}], **settings)
        print(
            "(the prompt leaves no room for a response)"
            if texts[0] is None
            else printable(texts[0])
        )
        return
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    if sys.stdin.isatty():
        print("a prompt a line; end with control-D")
    chat(model, enc, lines=sys.stdin, **settings)


if __name__ == "__main__":
    main()
