"""A row, a text or a window of a stream as training takes it, token by token: what is asked is green or [in brackets], the rest is dim or |ended.

    python -m data.show data/pydocs --row=3 --checkpoint=out/demo/sft        under a run's template, limits and tokenizer
    python -m data.show out/demo/spin_k3/round_0/train.jsonl --checkpoint=out/demo/spin_k3
    python -m data.show data/pydocs/train.bin --tokenizer=gpt2 --block_size=256

A response without <|endoftext|> was cut off, or did not end when it was sampled. <7> is the token 7, a part of a character.
"""

import argparse
import os
import sys

from nanospin import checkpoint
from nanospin import config
from data.batch import batch_rows, stream_batch
from data.rows import encode_rows, read_rows
from data.files import printable
from data.folder import read_meta, read_stream, tokenizer_path
from data import tokenizer


def tokens(batch, n=0):
    """[(id, whether it is asked)] of sequence n of a padded batch, or of a flat one: what is read, and its last target."""
    idx, targets = (
        batch[name].view(-1, batch["idx"].shape[-1])[n].tolist() for name in ("idx", "targets")
    )
    end = max(t for t, target in enumerate(targets) if target >= 0)
    return list(
        zip(
            [*idx[: end + 1], targets[end]],
            [False] + [target >= 0 for target in targets[: end + 1]],
        )
    )


def painted(enc, asked, colour):
    """Tokens as text, in colours or with marks; every second one is another shade, so that one sees where they end."""
    shown = []
    for i, (token, is_asked) in enumerate(asked):
        text = enc.decode([token])
        text = printable(text) if "\ufffd" not in text else f"<{token}>"
        if colour:
            style = ("1;32" if i % 2 else "32") if is_asked else ("2;37" if i % 2 else "2")
            text = "\n".join(
                f"\033[{style}m{line}\033[0m" if line else line for line in text.split("\n")
            )
        else:
            text = f"[{text}]" if is_asked else f"{text}|"
        shown.append(text)
    return "".join(shown)


def counted(enc, asked):
    return f"{len(asked)} tokens, {sum(is_asked for _, is_asked in asked)} asked" + (
        "" if asked[-1][0] == enc.eot_token else ", no end-of-text"
    )


def show_row(path, rows, number, enc, settings, stage, colour):
    """A ranked row, each response after its prompt, or a whole text."""
    if number >= len(rows):
        raise SystemExit(f"{path} has {len(rows)} rows; --row counts from 0")
    row = rows[number]
    if stage == "sft":  # whose collect takes the best response alone
        row = {**row, "responses": row["responses"][:1], "scores": None}
    (encoded,), counts = encode_rows([row], enc, **settings)
    print(
        f"{printable(path)}, row {number} of {len(rows)}"
        + (f", group {printable(row['group'])}" if row.get("group") else "")
        + "".join(f", {n} {what}" for what, n in counts.items() if what != "rows" and n)
    )
    if encoded is None:
        return print(
            f"block_size {settings['block_size']} leaves no room: it is left out of training"
        )
    batch, n = batch_rows([encoded], "padded"), 0
    for k, (ids, rank) in enumerate(zip(encoded["responses"], encoded["ranks"]), 1):
        head = f"--- {k} of {len(encoded['responses'])}, {rank} above it: "
        if ids is None:
            print(head + "absent")
            continue
        asked, n = tokens(batch, n), n + 1
        print(f"{head}{counted(enc, asked)}\n{painted(enc, asked, colour)}")


def show_window(folder, split, number, enc, settings, seed, apart, colour):
    """A window of a stream, in the order in which training under this seed takes them."""
    meta = read_meta(folder, [f"{split}.bin"])
    if meta["tokenizer_sha256"] != tokenizer.fingerprint(enc):
        raise SystemExit(
            f"{folder} was written with the tokenizer {meta['tokenizer']}: another shows other text"
        )
    asked = tokens(
        stream_batch(
            read_stream(folder, split),
            settings["block_size"],
            1,
            seed,
            number,
            enc.n_vocab,
            apart=enc.eot_token if apart else None,
        )
    )
    print(
        f"{printable(folder)}/{split}.bin, window {number} under seed {seed}: {counted(enc, asked)}\n{painted(enc, asked, colour)}"
    )


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m data.show",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = lambda message: sys.exit(printable(message))  # one line, without the usage
    parser.add_argument(
        "path",
        help="a .jsonl file of rows, a train.bin or val.bin, or a data folder: its train.jsonl, or else train.bin",
    )
    parser.add_argument(
        "--row", type=int, default=0, help="which row, or which window of a stream, from 0"
    )
    parser.add_argument(
        "--checkpoint",
        help="a run folder or a checkpoint in it, whose tokenizer, template and limits are taken",
    )
    parser.add_argument(
        "--tokenizer", help="gpt2, bytes or a file; else the checkpoint's, or the data folder's"
    )
    parser.add_argument(
        "--template", help="how a prompt is put; else the checkpoint's, or the default one"
    )
    parser.add_argument(
        "--block_size", type=int, help="longest sequence; else the checkpoint's, or 1024"
    )
    parser.add_argument(
        "--max_prompt", type=int, help="tokens of a prompt; else the checkpoint's, or block_size"
    )
    parser.add_argument(
        "--max_response",
        type=int,
        help="tokens of a response; else the checkpoint's, or what block_size leaves",
    )
    parser.add_argument(
        "--seed", type=int, help="of a stream's windows; else the checkpoint's, or the default one"
    )
    args = parser.parse_args(argv)
    run, enc, block_size = vars(config.Config()), None, 1024
    if args.checkpoint:
        path = checkpoint.resolve(args.checkpoint)
        meta = checkpoint.read_meta(path)
        run, enc, block_size = (
            run | meta["config"],
            checkpoint.read_tokenizer(path, meta),
            meta["model"]["block_size"],
        )
    given = {
        name: getattr(args, name)
        for name in ("template", "block_size", "max_prompt", "max_response", "seed")
        if getattr(args, name) is not None
    }
    run = run | {"block_size": block_size} | given
    run["template"] = run["template"] or config.TEMPLATE
    config.check(
        config.Config(
            max_steps=1,
            **{name: run[name] for name in ("template", "max_prompt", "max_response", "seed")},
        )
    )
    if args.row < 0 or run["block_size"] < 1:
        parser.error(
            f"--row is at least 0 and --block_size at least 1, got {args.row} and {run['block_size']}"
        )
    file = args.path
    if os.path.isdir(file):
        file = next(
            (
                os.path.join(file, name)
                for name in ("train.jsonl", "train.bin")
                if os.path.exists(os.path.join(file, name))
            ),
            os.path.join(file, "train.jsonl"),
        )
    folder, name = os.path.dirname(file) or ".", os.path.basename(file)
    rows = None if name.endswith(".bin") else read_rows(file)
    if args.tokenizer:
        enc = tokenizer.load(args.tokenizer)
    if enc is None:
        of_data = (
            read_meta(folder, [])["tokenizer"]
            if os.path.exists(os.path.join(folder, "meta.json"))
            else None
        )
        if not of_data:
            parser.error(f"{file} names no tokenizer: give --checkpoint or --tokenizer")
        enc = tokenizer.load(tokenizer_path(folder, of_data))
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    settings = {
        name: run[name] for name in ("template", "block_size", "max_prompt", "max_response")
    }
    if rows is None:
        show_window(
            folder,
            name.removesuffix(".bin"),
            args.row,
            enc,
            settings,
            run["seed"],
            run["documents_apart"],
            colour,
        )
    else:
        show_row(
            file, rows, args.row, enc, settings, run["stage"] if args.checkpoint else "", colour
        )


if __name__ == "__main__":
    main()
