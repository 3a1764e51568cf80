"""One self-contained HTML page of runs: curves, rounds, samples side by side, what the loss asks for, settings and provenance.

    python eval.py report out/demo/spin_k3                                       report.html
    python eval.py report out/demo/sft out/demo/spin_k3 --out=both.html          several: compared first

A run that was cut short, or was not kept whole, gives a page that says what is missing.
"""

import argparse
import json
import math
import os
import re
import sys
from dataclasses import asdict

from nanospin.config import Config
from data.rows import prompt_key
from data.files import printable, read_json
from tools.report.page import colour, curve, figure, more, table, visible, whole
from tools.plot import FIGURES
from tools.report.runs import (
    asked_for,
    batch_of,
    held_out_files,
    kind,
    minutes,
    of,
    read_run,
    round_rows,
    setting,
    told,
    trained_rows,
)

NAMES = {  # of figures, what and unit; with a slash, of a player's
    "val_loss": ("cross-entropy", "nats a token"),
    "pretrain_loss": ("cross-entropy of the pretraining stream", "nats a token"),
    "rank_nll": ("ranking loss", "nats a prompt"),
    "pair_nll": ("loss of pairs", "nats"),
    "acc": ("pairs ranked right", "share"),
    "acc/": ("ranked above all worse", "share"),
    "reward/": ("implicit reward", "beta times nats"),
    "logp/": ("log-probability of the response", "nats"),
    "kl_from_ref": ("KL from the reference", "nats a token"),
    "kl": ("KL to the reference", "nats a response"),
    "kl_token": ("KL to the reference", "nats a token"),
    "entropy": ("entropy", "nats a token"),
    "length": ("length", "tokens"),
    "ended": ("ended by end-of-text", "share"),
    "tie": ("equal to a better response", "share"),
    "length_acc": ("told from others by length alone", "share"),
    "exact_match": ("exact match with data", "share"),
    "reward_std": ("deviation of the reward", ""),
    "score_std": ("deviation of the scores", ""),
    "explained_variance": ("explained by the value head", "share of variance"),
    "kl_coef": ("price of KL", "reward a nat"),
}

# title, unit, {label: kind of record/figure}; * is each player
TOKENS = [
    ("Loss", "nats a token", {"training": "step/loss", "held out": "eval/val_loss"})
]  # of pretrain and sft
OTHERS = [
    ("Loss", "nats", {"training": "step/loss"}),
    ("Cross-entropy of the best response", "nats a token", {"held out": "eval/val_loss"}),
]
PANELS = [
    (
        "Ranking loss",
        "nats a prompt",
        {"training": "step/nll", "held out": "eval/rank_nll", "held-out pairs": "eval/pair_nll"},
    ),
    (
        "Pairs ranked right",
        "share",
        {
            "training, a tie is wrong": "step/acc",
            "held out": "eval/acc",
            "length alone": "eval/length_acc",
        },
    ),
    ("Ranked above all worse responses", "share of rows", {"*": "eval/acc/"}),
    ("Implicit reward", "beta times nats", {"*": "eval/reward/"}),
    ("Log-probability of the response", "nats", {"*": "eval/logp/"}),
    ("Reward", "as scored", {"sampled": "collect/reward", "held out": "eval/reward"}),
    ("KL to the reference", "nats a response", {"sampled": "collect/kl", "held out": "eval/kl"}),
    ("KL from the reference", "nats a token", {"held out": "eval/kl_from_ref"}),
    ("Entropy", "nats a token", {"sampled": "collect/entropy", "held out": "eval/entropy"}),
    (
        "Length of a response",
        "tokens",
        {"sampled": "collect/length", "held out": "eval/length", "*": "collect/length/"},
    ),
    (
        "Ended by end-of-text",
        "share",
        {"sampled": "collect/ended", "held out": "eval/ended", "*": "collect/ended/"},
    ),
    ("Policy loss", "deviations of the advantage", {"training": "step/policy_loss"}),
    ("Value loss", "reward, squared", {"training": "step/value_loss"}),
    ("Ratios beyond the clip", "share of tokens", {"training": "step/clip_fraction"}),
    (
        "Pretraining stream",
        "nats a token",
        {"training": "step/pretrain_loss", "held out": "eval/pretrain_loss"},
    ),
    ("Gradient norm", "before clipping", {"training": "step/norm"}),
    ("Learning rate", "a step", {"training": "step/lr"}),
    ("Speed", "tokens a second", {"training": "step/tokens_per_second"}),
]
POINTS = 300  # of a curve; where there are more steps, each is the mean of some


# ----------------------------------------------------------------------------------------------------------- the figures


def named(key):
    """(what, unit) of a figure, as of reward/self or acc@2."""
    name, slash, player = key.partition("/")
    name, _, apart = name.partition("@")
    what, unit = NAMES.get(name + slash) or NAMES.get(name, (name, ""))
    return what + (f", {player}" if player else "") + (
        f", {apart} apart in rank" if apart else ""
    ), unit


def with_error(record, key):
    """A record's figure with its standard error; "-" where there is none."""
    error = of(record, key + "_se") if record else None
    return figure(of(record, key) if record else None) + (
        "" if error is None else f" ± {error:.2g}"
    )


def equal_scores(run):
    """(the ranking loss where all scores are equal, what to call it), or None."""
    K = len(run["players"])
    if run["stage"] == "reward":
        return math.log(2), "equal scores: ln 2 = 0.6931"
    return (
        (math.lgamma(K + 1), f"equal scores: ln {K}! = {math.lgamma(K + 1):.4f}") if K > 1 else None
    )


def pieces(records, key, apart):
    """[[(step, value), ...]] of a figure, a piece a round if rounds stand apart; very many as means of neighbours."""
    found, n = {}, -(-len(records) // POINTS)
    for r in records:
        if of(r, key) is not None:
            found.setdefault(apart and r["round"], []).append((r["x"], of(r, key)))
    return [
        [
            tuple(sum(some) / len(some) for some in zip(*piece[i : i + n]))
            for i in range(0, len(piece), n)
        ]
        for piece in found.values()
    ]


def curves(run):
    """Every panel that the run has figures for. A game's rounds stand apart: each has a reference and samples of its own."""
    drawn, first, n = (
        [],
        {r["round"]: r["x"] for r in reversed(run["records"])},
        -(-len(kind(run, "step")) // POINTS),
    )
    borders = [(x, f"round {t}") for t, x in sorted(first.items())][1:]
    levels = {"Ranking loss": equal_scores(run), "Pairs ranked right": (0.5, "chance")}
    for title, unit, wanted in (TOKENS if run["stage"] in ("pretrain", "sft") else OTHERS) + PANELS:
        series = {}
        for label, where in wanted.items():
            name, _, key = where.partition("/")
            records = kind(run, name)
            of_players = {k[len(key) :]: k for r in records for k in r if k.startswith(key)}
            for who, k in list(of_players.items())[:12] if label == "*" else [(label, key)]:
                if some := pieces(records, k, run["stage"] == "spin" and name != "collect"):
                    series[who] = some
        drawn += (
            [curve(title, unit, series, run["span"], borders, levels.get(title))] if series else []
        )
    if not drawn:
        return "<p class=none>No step and no evaluation is logged (yet).</p>"
    means = f" A point of training is the mean of {n} steps." if n > 1 else ""
    return f"<p class=dim>Steps count from the run's beginning, over its rounds. Beside a name stands its last value.{means}</p><div class=curves>{''.join(drawn)}</div>"


def figure_rows(title, records):
    """Rows of a table: every figure of some records, each a column; None is a record that is not there."""
    keys = [
        k
        for k in dict.fromkeys(k for r in records if r for k in r if of(r, k) is not None)
        if k not in ("round", "step", "seconds", "x") and not k.endswith("_se")
    ]
    bases = [k.partition("/")[0] for k in keys]
    rows = []
    for k in sorted(
        keys, key=lambda k: bases.index(k.partition("/")[0])
    ):  # players beside each other
        what, unit = named(k)
        rows.append(
            [
                f"{visible(what)} <small>{unit}</small>",
                *(visible(with_error(r, k)) for r in records),
            ]
        )
    return [[title], *rows] if rows else []


def rounds_table(run):
    rounds = sorted({r["round"] for r in run["records"]})
    if not rounds:
        return "<p class=none>Nothing is logged of any round (yet).</p>"
    steps, evals, starts, collects = (
        [kind(run, name, t) or [None] for t in rounds]
        for name in ("step", "eval", "start", "collect")
    )

    def cells(records, key):
        return [with_error(r, key) for r in records]

    rows = [
        ["training"],
        ["steps", *(figure(len(kind(run, "step", t))) for t in rounds)],
        [
            "time <small>minutes</small>",
            *(figure(minutes(r for r in run["records"] if r["round"] == t)) for t in rounds),
        ],
        ["loss, first step", *cells([some[0] for some in steps], "loss")],
        ["loss, last step", *cells([some[-1] for some in steps], "loss")],
    ]
    if kind(run, "start"):
        rows += [
            ["loss expected at the start", *cells([some[0] for some in starts], "expected")],
            ["off by", *cells([some[0] for some in starts], "off")],
        ]
    rows += figure_rows("held out, at the last evaluation", [some[-1] for some in evals])
    rows += figure_rows(
        "sampled, held-out prompts" if run["stage"] == "spin" else "sampled",
        [some[-1] for some in collects],
    )
    return table(["round", *map(str, rounds)], rows, numbers=True)


def tiles(run):
    """The headline: the stage's figures at the last evaluation and the first, the start check, size, time, warnings."""
    found, evals, offs = (
        [],
        kind(run, "eval"),
        [of(r, "off") for r in kind(run, "start") if of(r, "off") is not None],
    )
    for key in FIGURES.get(run["stage"], ["val_loss"]):
        if evals and of(evals[-1], key) is not None:
            what, unit = named(key)
            found.append(
                (
                    what,
                    with_error(evals[-1], key),
                    f"{unit}, from {figure(of(evals[0], key))}".lstrip(", "),
                )
            )
    if offs:
        wrong = any("the round starts at" in str(r.get("text")) for r in kind(run, "warning"))
        against = (
            equal_scores(run)[1]
            if len(run["players"]) > 1
            else "the policy that sampled"
            if run["stage"] == "ppo"
            else "equal scores"
        )
        found.append(
            (
                "start check",
                "not as expected" if wrong else "as expected",
                f"{against}; off by {max(offs):.2g} at most in {len(offs)} round{'s' * (len(offs) > 1)}",
            )
        )
    weights = os.path.join(run["checkpoint"] or "", "model.safetensors")
    if os.path.exists(weights):
        size, where = (
            os.path.getsize(weights) / 4e6,
            os.path.relpath(run["checkpoint"], run["folder"]),
        )  # 4 bytes each
        found.append(("model", f"{size:.3g}M", f"parameters, {where}"))
    rounds = f"{len({r['round'] for r in run['records']})} of {setting(run, 'rounds')} rounds"
    found.append(
        (
            "training",
            f"{len(kind(run, 'step')):,} steps",
            f"{minutes(run['records']):.1f} minutes, {rounds}",
        )
    )
    if kind(run, "warning"):
        found.append(("warnings", str(len(kind(run, "warning"))), "they stand at the end"))
    return (
        "<dl class=tiles>"
        + "".join(
            f"<div><dt>{visible(what)}</dt><dd><b>{visible(value)}</b>{visible(rest)}</dd></div>"
            for what, value, rest in found
        )
        + "</dl>"
    )


# ----------------------------------------------------------------------------------------------------------- the samples


def response_names(run, K):
    return (
        (run["players"] or ["response 1 (best)", *(f"response {k}" for k in range(2, K + 1))])[:K]
        if K > 1
        else ["response"]
    )


def answer(run, n, name, row, k):
    """Response k of a row, in the n-th colour: whose, how long, whether it ended, which better one it equals, its score."""
    K, tags = len(row["responses"]), []
    same, ids, score = ((row.get(key) or [None] * K)[k] for key in ("same_as", "ids", "scores"))
    text = row["responses"][k if same is None else same]
    if same is not None:
        tags.append(f"<mark>same as {visible(response_names(run, K)[same])}</mark>")
    if ids:
        tags.append(
            f"{len(ids)} token{'s' * (len(ids) != 1)}"
            + ", cut" * (run["enc"] is not None and ids[-1] != run["enc"].eot_token)
        )
    if score is not None:
        tags.append(
            f"score {figure(score)}"
            + ", <mark>tied</mark>" * (k > 0 and row["scores"][k - 1] == score)
        )
    if of(row, "kl") is not None:
        tags.append(f"KL {figure(row['kl'])} nats")
    said = (
        "<i class=dim>absent</i>"
        if text is None
        else visible(text)
        if text.strip()
        else "<i class=dim>(empty)</i>"
    )
    return (
        f'<div class="answer {colour(n)}"><h4><i class=key></i>{visible(name)}</h4>'
        f'<p class="text{" tie" * (same is not None)}" dir=auto>{said}</p><small>{" · ".join(tags)}</small></div>'
    )


def card(row, answers):
    """A prompt, the turns before it, and what was answered, side by side."""
    said = [
        f'<p class="text dim" dir=auto>{visible(text)}</p>'
        for turn in row.get("history") or []
        for text in turn
    ]
    prompt = f'<p class="text prompt" dir=auto>{visible(row["prompt"]) or "(no prompt)"}</p>'
    return f"<article>{''.join(said)}{prompt}<div class=answers>{''.join(answers)}</div></article>"


def cards(run, rows):
    return [
        card(
            row,
            [
                answer(run, k, name, row, k)
                for k, name in enumerate(response_names(run, len(row["responses"])))
            ],
        )
        for row in rows
    ]


def spread(items, n):
    """At most n of some items: the first, the last, and some between."""
    return (
        [items[i] for i in sorted({round(j * (len(items) - 1) / (n - 1)) for j in range(n)})]
        if len(items) > n
        else items
    )


def held_out_columns(run):
    """[(title, {what is asked: row}, which response)] of what was said to held-out prompts: of a game who is not the policy once, and the
    policy in some rounds; of PPO the policy at some evaluations."""
    columns = []
    for i, (t, name) in enumerate(spread(held_out_files(run), 4)):
        rows = {prompt_key(row): row for row in round_rows(run, t, name)}
        if name != "val.jsonl":
            columns.append((f"round {t}, step {int(name[9:-6])}", rows, 0))
            continue
        for k, player in enumerate(run["players"]):
            if player == "self":
                columns.append((f"self, round {t}", rows, k))
            elif i == 0 and not player.startswith("self"):
                columns.append((player, rows, k))
    return columns


def samples(run, n):
    """What was said to the same held-out prompts, round beside round; then what the newest round trained on."""
    if run["stage"] in ("reward", "preference"):
        return f"<p class=dim>This stage samples nothing. What it ranks are the data's responses, the best first:</p>{''.join(cards(run, trained_rows(run)[:n]))}"
    if run["stage"] not in ("spin", "ppo"):
        return f"<p class=dim>This stage samples nothing; <code>python sample.py {visible(run['folder'])} --chat</code> does.</p>"
    columns, found = held_out_columns(run), []
    for prompt, row in list(next((rows for _, rows, _ in columns if rows), {}).items())[:n]:
        there = [
            (i, title, rows[prompt], k)
            for i, (title, rows, k) in enumerate(columns)
            if prompt in rows and k < len(rows[prompt]["responses"])
        ]
        found.append(card(row, [answer(run, i, title, its, k) for i, title, its, k in there]))
    rows, about = trained_rows(run), "the first rows"
    if run["stage"] == "ppo" and len(rows) > n:
        rows, about = (
            sorted(rows, key=lambda row: -row["scores"][0]),
            "the highest rewards and the lowest",
        )
        rows = rows[: n - n // 2] + rows[len(rows) - n // 2 :]
    said = (
        "<p class=dim>The same held-out prompts, round beside round.</p>" + "".join(found)
        if found
        else "<p class=none>No held-out prompt is answered (yet).</p>"
    )
    return said + (
        more(f"What round {run['rounds'][-1]} trained on: {about}", cards(run, rows[:n]))
        if rows
        else ""
    )


def mask(run):
    """One row, its tokens coloured by whether the loss asks for them."""
    found = told(run, batch_of, run) if run["enc"] else None
    if not found:
        return "<p class=none>It cannot be shown: the notes at the top say why.</p>"
    row, batch = found
    parts, names, enc = (
        [],
        response_names(run, len(row["responses"])) if row else ["predicted"],
        run["enc"],
    )
    for slot, tokens in asked_for(batch):
        name = ("prompt" if row else "read first") if slot < 0 else names[slot]
        if "read" in batch and len(tokens) > len(row["responses"][slot]):
            name = f"prompt and {name}"
        n, spans = sum(wanted for _, wanted in tokens), []
        for i, wanted in tokens:
            text = re.sub(
                "[\n\t]",
                lambda c: f"<i class=odd>{ascii(c[0])[1:-1]}</i>{c[0]}",
                visible(enc.decode([i])),
            )
            spans.append(
                f'<span class="{"asked" if wanted else "read"}{" eot" * (i == enc.eot_token)}" title="id {i}">{text}</span>'
            )
        parts.append(
            f'<div class="{colour(max(0, slot))}"><h4>{visible(name)} <small>{len(tokens)} token{"s" * (len(tokens) != 1)}, {n} '
            f'{"read out" if "read" in batch else "asked for"}</small></h4><p class="text tokens">{"".join(spans)}</p></div>'
        )
    what = (
        "the score is read at the coloured tokens"
        if "read" in batch
        else "the loss asks for the coloured tokens, the others are only read"
    )
    where = (
        f"A row that the run trains on, out of its batch ({visible(setting(run, 'layout'))} layout)"
        if row
        else "The first window of the stream"
    )
    return f"<p class=dim>{where}: {what}.</p>{''.join(parts)}"


# -------------------------------------------------------------------------------------------------------------- the page


def pairs(values, defaults=None):
    """A table of names and values, of any JSON."""

    def cell(value):
        return visible(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))

    if defaults is None:
        return table(
            ["name", "value"], [[f"<code>{visible(k)}</code>", cell(v)] for k, v in values.items()]
        )
    return table(
        ["name", "value", "default"],
        [
            [f"<code>{visible(k)}</code>", cell(v), cell(defaults.get(k, ""))]
            for k, v in values.items()
        ],
    )


def provenance(run):
    """Settings, where it ran, what from, what was warned of."""
    defaults, config = json.loads(json.dumps(asdict(Config()))), run["config"]
    changed = {k: v for k, v in config.items() if k not in defaults or v != defaults[k]}
    rest = {k: v for k, v in config.items() if k not in changed}
    out = [
        pairs(changed, defaults)
        if changed
        else "<p class=none>There are no settings: config.json is missing.</p>",
        more("Settings left at their defaults", [pairs(rest)]) if rest else "",
    ]
    out += [
        more(f"Start {n}: what it ran on", [pairs(start)])
        for n, start in enumerate(run["starts"], 1)
    ]
    if run["meta"]:
        hashes = {k: run["meta"][k] for k in ("weights_sha256", "tokenizer", "tokenizer_sha256")}
        out.append(
            more(
                "The newest checkpoint",
                [pairs({"path": run["checkpoint"]} | hashes | run["meta"]["model"])],
            )
        )
    for t in run["rounds"]:
        path = os.path.join(run["folder"], f"round_{t}", "collect.json")
        made = told(run, read_json, path) if os.path.exists(path) else None
        out.append(
            more(
                f"Round {t}: where its rows come from (collect.json)",
                [pairs({k: v for k, v in made.items() if k != "report"})],
            )
            if made
            else ""
        )
    warnings = [
        [f"round {r['round']} step {r['step']}", visible(r.get("text", ""))]
        for r in kind(run, "warning")
    ]
    return (
        "".join(out)
        + "<h4>Warnings</h4>"
        + (table(["where", "what"], warnings) if warnings else "<p class=dim>None.</p>")
    )


def section(run, number, n):
    """All of one run; its notes stand first and are known last."""

    def part(make, *args):
        try:
            return make(run, *args)
        except Exception as e:  # a run's files may hold anything
            return f"<p class=none>This cannot be shown: a file of the run is not what it should be ({visible(type(e).__name__)}: {visible(e)}).</p>"

    parts = {
        "Curves": part(curves),
        "Rounds": part(rounds_table),
        "Samples": part(samples, n),
        "What the loss asks for": part(mask),
        "Settings and provenance": part(provenance),
    }
    notes = "".join(f"<li>{visible(note)}</li>" for note in dict.fromkeys(run["notes"]))
    return (
        f"<section id=run{number}><h2>{visible(run['name'])} <small>{visible(run['stage'])} · {visible(run['folder'])}</small></h2>{part(tiles)}"
        + f"<ul class=notes>{notes}</ul>" * bool(notes)
        + "".join(f"<h3>{title}</h3>{text}" for title, text in parts.items())
        + "</section>"
    )


def comparison(runs):
    """Several runs: the last held-out figures in one table, and the curves of those that two of them have."""
    last, drawn = [(kind(run, "eval") or [None])[-1] for run in runs], []
    rows = [
        ["stage", *(visible(run["stage"]) for run in runs)],
        ["steps", *(figure(len(kind(run, "step"))) for run in runs)],
        ["time <small>minutes</small>", *(figure(minutes(run["records"])) for run in runs)],
        *figure_rows("held out, at the last evaluation", last),
    ]
    for key in dict.fromkeys(
        key for run in runs for key in ["val_loss"] + FIGURES.get(run["stage"], [])
    ):
        series = {
            f"{i} {run['name']}": some
            for i, run in enumerate(runs, 1)
            if (some := pieces(kind(run, "eval"), key, run["stage"] == "spin"))
        }
        if len(series) > 1:
            what, unit = named(key)
            drawn.append(
                curve(
                    what.capitalize() + ", held out",
                    unit,
                    series,
                    (0, max(run["span"][1] for run in runs)),
                )
            )
    head = [
        "",
        *(f'<a href="#run{i}">{i} {visible(run["name"])}</a>' for i, run in enumerate(runs, 1)),
    ]
    return f"<section><h2>Side by side</h2>{table(head, rows, numbers=True)}<div class=curves>{''.join(drawn)}</div></section>"


def main(argv):
    parser = argparse.ArgumentParser(
        prog="eval.py report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = lambda message: sys.exit(printable(message))  # one line, without the usage
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's out_dir")
    parser.add_argument("--out", default="report.html")
    parser.add_argument(
        "--rows",
        type=int,
        choices=range(1, 1001),
        metavar="N",
        default=8,
        help="prompts that are shown, 1 to 1000",
    )
    args = parser.parse_args(argv)
    runs = [read_run(folder) for folder in args.runs]
    title = ", ".join(run["name"] for run in runs)
    several = f"<h1>{visible(title)}</h1>{comparison(runs)}" if len(runs) > 1 else ""
    text = whole(
        title, several + "".join(section(run, i, args.rows) for i, run in enumerate(runs, 1))
    )
    try:
        with open(args.out + ".tmp", "w", encoding="utf-8") as f:
            f.write(text)
        os.replace(args.out + ".tmp", args.out)
    except OSError as e:
        parser.error(f"--out {args.out}: {e.strerror}")
    print(printable(f"{args.out}: {len(text.encode()) / 1024:.0f} KiB"))
