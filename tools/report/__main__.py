"""One self-contained HTML page of a run: curves, rounds, samples, loss mask, settings.

    python -m tools.report out/demo/spin_k3 --out=report.html
    python -m tools.report out/demo/sft out/demo/spin_k3       several runs: compared first

A run that was cut short or damaged gives a page that says what is missing.
"""

import glob
import json
import os
import re
import sys

import jinja2
from markupsafe import Markup, escape

from data import cli
from data.files import atomic_write, check_output, printable
from tools.plot import HEADLINE_METRICS
from tools.report import charts, runs

# Control characters except newline and tab, characters that change the direction of writing, and
# halves of surrogate pairs.
ODD = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def visible(value) -> Markup:
    """A value as HTML: escaped, odd characters by their code. What is HTML already stays."""
    if isinstance(value, Markup):
        return value
    return Markup(ODD.sub(lambda match: ascii(match[0])[1:-1], str(escape(value))))


def token_text(text: str) -> str:
    """The text of a token, with newlines and tabs by their code, too."""
    return text.replace("\n", "\\n\n").replace("\t", "\\t\t")


def json_text(value) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def attempt(macro, *args) -> Markup:
    """The text of a macro, or why it failed: the files of a run may hold anything."""
    try:
        return macro(*args)
    except Exception as e:
        error = visible(f"{type(e).__name__}: {e}")
        text = "This cannot be shown. A file of the run is not as expected"
        return Markup(f"<p class=none>{text} ({error}).</p>")


def render(all_runs: list[runs.Run], num_rows: int) -> str:
    """The page."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(os.path.dirname(__file__)),
        autoescape=True,
        finalize=visible,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    env.filters |= {
        "token_text": token_text,
        "json_text": json_text,
        "number": charts.format_number,
        "with_error": charts.with_error,
        "totals": runs.totals,
        "last_record": runs.last_record,
    }
    page = env.get_template("page.html.jinja").render(
        all_runs=all_runs,
        num_rows=num_rows,
        attempt=attempt,
        charts=charts,
        runs=runs,
        headline_metrics=HEADLINE_METRICS,
    )
    return page.lstrip()


def main(argv: list[str] | None = None):
    parser = cli.ArgumentParser(prog="python -m tools.report", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the out_dir of a run")
    parser.add_argument("--out", default="report.html", help="the file to write")
    rows = cli.number_type(int, 1, 1000)
    parser.add_argument("--rows", type=rows, default=8, help="number of prompts, 1 to 1000")
    args = parser.parse_args(argv)
    for folder in args.runs:
        inputs = glob.glob(os.path.join(glob.escape(folder), "round_*", "*.json*"))
        inputs += [os.path.join(folder, name) for name in ("config.json", "metrics.jsonl")]
        check_output(args.out, inputs)
    page = render([runs.read_run(folder) for folder in args.runs], args.rows)
    try:
        with atomic_write(args.out) as f:
            f.write(page)
    except OSError as e:
        parser.error(f"--out {args.out}: {e.strerror}")
    print(printable(f"{args.out}: {len(page.encode()) / 1024:.0f} KiB"))


if __name__ == "__main__":
    sys.exit(cli.run(main))
