"""Print a row, or a window of a token stream, as training reads it: its tokens and loss mask.

    python -m tools.show data/pydocs --row=3 --checkpoint=out/demo/sft
    python -m tools.show out/demo/spin_k3/round_0/train.jsonl --checkpoint=out/demo/spin_k3
    python -m tools.show data/pydocs/train.bin --tokenizer=gpt2 --block_size=256

Tokens with a loss are green, or [in brackets] if there is no colour; the others are dim, or end
in |. A response's rank is the number of responses with a higher score. A response without
<|endoftext|> was cut, or did not end when it was sampled. <7> is token 7, a part of a character.
"""

import os
import sys

from data import cli, tokenizer
from data.batch import batch_rows, stream_batch
from data.files import printable
from data.folder import read_meta, read_stream, tokenizer_path
from data.rows import best_only, drop_equal_responses, encode_rows, read_rows
from data.template import TEMPLATE
from nanospin import checkpoint, config
from rollout import keep_best_and_worst

LIMITS = ("template", "block_size", "max_prompt", "max_response")  # arguments of encode_rows


def main(argv=None):
    args = parse_args(argv)
    settings, enc = read_settings(args)
    path = find_file(args.path)
    folder, name = os.path.dirname(path) or ".", os.path.basename(path)
    is_stream = name.endswith(".bin")
    rows = None if is_stream else read_rows(path)
    if args.tokenizer:
        enc = tokenizer.load(args.tokenizer)
    if enc is None:
        enc = load_data_tokenizer(folder, path)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    if is_stream:
        show_window(folder, name.removesuffix(".bin"), args.row, enc, settings, colour)
    else:
        show_row(path, rows, args.row, enc, settings, colour)


# ---- what to show


def parse_args(argv):
    row, limit = cli.number_type(int, 0, 2**48), cli.number_type(int, 0, 2**31)
    length = cli.number_type(int, 1, 2**31)
    parser = cli.ArgumentParser(prog="python -m tools.show", description=__doc__)
    parser.add_argument(
        "path",
        help="a .jsonl file, a train.bin or val.bin, or a data folder: its train.jsonl, else"
        " its train.bin",
    )
    parser.add_argument(
        "--row", type=row, default=0, help="index of the row, or of the stream's window, from 0"
    )
    parser.add_argument(
        "--checkpoint", help="run folder or checkpoint; gives tokenizer, template, limits and seed"
    )
    parser.add_argument(
        "--tokenizer", help="gpt2, bytes or a file; else the checkpoint's or the data folder's"
    )
    parser.add_argument("--template", help="prompt template; else the checkpoint's or the default")
    parser.add_argument(
        "--block_size", type=length, help="tokens of a sequence; else the checkpoint's, or 1024"
    )
    parser.add_argument(
        "--max_prompt", type=limit, help="tokens of a prompt; else the checkpoint's, or block_size"
    )
    parser.add_argument(
        "--max_response",
        type=limit,
        help="tokens of a response; else the checkpoint's, or what block_size leaves",
    )
    parser.add_argument(
        "--seed", type=row, help="seed of a stream's windows; else the checkpoint's or the default"
    )
    return parser.parse_args(argv)


def read_settings(args):
    """The checkpoint's settings, overridden by the command line, and its tokenizer or None."""
    settings = vars(config.Config()) | {"stage": "", "block_size": 1024}
    enc = None
    if args.checkpoint:
        path = checkpoint.resolve(args.checkpoint)
        meta = checkpoint.read_meta(path)
        enc = checkpoint.read_tokenizer(path, meta)
        settings |= meta["config"] | {"block_size": meta["model"]["block_size"]}
    for name in (*LIMITS, "seed"):
        if getattr(args, name) is not None:
            settings[name] = getattr(args, name)
    settings["template"] = settings["template"] or TEMPLATE
    checked = {name: settings[name] for name in ("template", "max_prompt", "max_response", "seed")}
    config.check(config.Config(max_steps=1, **checked))
    return settings, enc


def find_file(path):
    """The file to show: the path, or of a folder train.jsonl, else train.bin."""
    if not os.path.isdir(path):
        return path
    rows, stream = os.path.join(path, "train.jsonl"), os.path.join(path, "train.bin")
    if os.path.exists(os.path.join(path, "config.json")):
        raise SystemExit(printable(f"{path} is a run; give a file of a round, or its data folder"))
    return stream if os.path.exists(stream) and not os.path.exists(rows) else rows


def load_data_tokenizer(folder, path):
    """The tokenizer that the data folder's meta.json names."""
    name = None
    if os.path.exists(os.path.join(folder, "meta.json")):
        name = read_meta(folder, [])["tokenizer"]
    if name is None:
        raise SystemExit(printable(f"{path} names no tokenizer: give --checkpoint or --tokenizer"))
    return tokenizer.load(tokenizer_path(folder, name))


# ---- printing


def show_row(path, rows, number, enc, settings, colour):
    """Print a ranked row, each response after its prompt, or a whole text."""
    if number >= len(rows):
        raise SystemExit(f"{path} has {len(rows)} rows; --row counts from 0")
    row = rows[number]
    if settings["stage"] == "sft":  # it trains on the best response only
        row = best_only(row)
    limits = {name: settings[name] for name in LIMITS}
    (encoded,), counts = encode_rows([row], enc, **limits)
    title = f"{printable(path)}, row {number} of {len(rows)}"
    if row.get("group"):
        title += f", group {printable(row['group'])}"
    is_ranked = settings["stage"] in ("reward", "preference", "spin")
    if encoded and is_ranked:
        counts["equal to a better one"] = drop_equal_responses(encoded)
        if settings["best_and_worst"] and os.path.basename(path) == "train.jsonl":
            keep_best_and_worst(encoded)
    for what, n in counts.items():
        if what != "rows" and n:
            title += f", {n} {what}"
    print(title)
    if encoded is None:
        print(f"training drops it: block_size {settings['block_size']} leaves no room")
        return
    there = zip(encoded["ranks"], encoded["responses"])
    if is_ranked and len({rank for rank, ids in there if ids is not None}) < 2:
        if settings["stage"] != "spin" or len(row["responses"]) > 1:
            print("training drops it: nothing in it is ranked")
            return
        print("a round adds samples to it")
    batch = batch_rows([encoded], "padded")  # a sequence for each response that is there
    sequences = zip(batch.idx.tolist(), batch.targets.tolist())
    num_responses = len(encoded["responses"])
    for k, response in enumerate(encoded["responses"]):
        head = f"--- response {k + 1} of {num_responses}, rank {encoded['ranks'][k]}: "
        if response is None:
            print(head + "absent")
            continue
        tokens = mark_loss(*next(sequences))
        print(head + describe(tokens, enc))
        print_styled(render(tokens, enc, colour))


def show_window(folder, split, number, enc, settings, colour):
    """Print a window of a token stream, in the order in which training reads them under a seed."""
    meta = read_meta(folder, [f"{split}.bin"])
    if meta["tokenizer_sha256"] != tokenizer.fingerprint(enc):
        raise SystemExit(f"{folder} was written with another tokenizer, {meta['tokenizer']}")
    batch = stream_batch(
        read_stream(folder, split),
        length=settings["block_size"],
        batch_size=1,
        seed=settings["seed"],
        step=number,
        vocab_size=enc.n_vocab,
        document_end=enc.eot_token if settings["document_mask"] else None,
    )
    tokens = mark_loss(batch.idx.flatten().tolist(), batch.targets.flatten().tolist())
    path = os.path.join(printable(folder), f"{split}.bin")
    print(f"{path}, window {number} under seed {settings['seed']}: {describe(tokens, enc)}")
    print_styled(render(tokens, enc, colour))


def mark_loss(idx, targets):
    """[(token id, whether it has a loss)] of a sequence and its last target, without padding."""
    last = max(t for t, target in enumerate(targets) if target >= 0)
    ids = [*idx[: last + 1], targets[last]]
    has_loss = [False] + [target >= 0 for target in targets[: last + 1]]
    return list(zip(ids, has_loss))


def describe(tokens, enc):
    num_supervised = sum(has_loss for _, has_loss in tokens)
    text = f"{len(tokens)} tokens, {num_supervised} with a loss"
    last_id, _ = tokens[-1]
    return text if tokenizer.is_end(enc, last_id) else text + ", no end-of-text"


def render(tokens, enc, colour):
    """Tokens as text, in colour or with marks. Two shades alternate to tell tokens apart."""
    rendered = []
    for i, (token, has_loss) in enumerate(tokens):
        text = enc.decode([token])
        text = f"<{token}>" if "\ufffd" in text else printable(text)
        if colour:
            shades = ("32", "1;32") if has_loss else ("2", "2;37")
            text = paint(text, shades[i % 2])
        else:
            text = f"[{text}]" if has_loss else f"{text}|"
        rendered.append(text)
    return "".join(rendered)


def print_styled(text):
    """Print a text that is escaped already, with its colours."""
    write = getattr(sys.stdout, "write_styled", sys.stdout.write)
    write(text + "\n")


def paint(text, style):
    """The text in an ANSI style, switched off at the end of each line."""
    lines = [f"\033[{style}m{line}\033[0m" if line else "" for line in text.split("\n")]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(cli.run(main))
