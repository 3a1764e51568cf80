"""Numbers, tables and curves of metrics; page.html.jinja draws the curves as SVG."""

import itertools
import math
from dataclasses import dataclass

from loss import MEAN_LOGPROB_TYPES

LEFT, RIGHT, TOP, BOTTOM = 58, 368, 26, 186  # the axes in a picture of 380 x 220
MAX_POINTS = 300  # of a curve; with more, neighbouring steps are averaged

# Metrics with a chart: name, unit, and the chart if it is another one's. "acc/": of each player.
CHARTED = {
    "loss": ("Loss", "nats"),
    "val_loss": ("Cross-entropy", "nats per token"),
    "nll": ("Ranking loss", "nats per prompt"),
    "rank_nll": ("Ranking loss", "nats per prompt"),
    "pair_nll": ("Loss of pairs", "nats per pair", "Ranking loss"),
    "acc": ("Ranking accuracy", "share of pairs"),
    "length_acc": ("Accuracy by length alone", "share of pairs", "Ranking accuracy"),
    "acc/": ("Above all worse responses", "share of rows"),
    "reward/": ("Implicit reward", "beta x nats"),
    "logp/": ("Log-probability of the response", "nats"),
    "reward": ("Reward", "as scored"),
    "kl": ("KL to the reference", "nats per response"),
    "kl_from_ref": ("KL from the reference", "nats per token"),
    "entropy": ("Entropy", "nats per token"),
    "length": ("Length of responses", "tokens"),
    "ended": ("Ended with end-of-text", "share"),
    "score/": ("Score", "as scored"),
    "score_best": ("Best score", "as scored", "Score"),
    "score_worst": ("Worst score", "as scored", "Score"),
    "signal": ("Rows in which something is ranked", "share"),
    "policy_loss": ("Policy loss", "per token"),
    "value_loss": ("Value loss", "squared reward"),
    "clip_fraction": ("Clipped policy ratios", "share of tokens"),
    "pretrain_loss": ("Pretraining loss", "nats per token"),
    "norm": ("Gradient norm", "before clipping"),
    "lr": ("Learning rate", ""),
    "tokens_per_second": ("Speed", "tokens per second"),
    # of training, where evaluations have another quantity of that name
    "train_nll": ("Ranking loss in training", "per prompt"),
    "train_acc": ("Ranking accuracy in training", "share of pairs"),
    "train_kl": ("KL to the reference in training", "nats per token"),
}
METRICS = CHARTED | {
    "steps": ("Steps", ""),
    "minutes": ("Time", "minutes"),
    "first_loss": ("Loss, first step", "nats"),
    "last_loss": ("Loss, last step", "nats"),
    "expected": ("Expected initial loss", "nats"),
    "off": ("Difference from the expected loss", "nats"),
    "kl_token": ("KL to the reference", "nats per token"),
    "tie": ("Equal to a better response", "share"),
    "empty": ("Without text", "share"),
    "length_acc/": ("Told from the data by length alone", "share of pairs"),
    "exact_match": ("Exact match with the data", "share"),
    "reward_std": ("Standard deviation of the reward", ""),
    "score_std": ("Standard deviation of the scores", ""),
    "explained_variance": ("Variance explained by the value head", "share"),
    "kl_coef": ("KL coefficient", "reward per nat"),
}
LABELS = {"step": "training", "eval": "validation", "collect": "sampled"}  # by kind of record


def lookup(key: str) -> tuple[str, str]:
    """(key in METRICS, player) of a metric: ("acc/", "self") of acc/self."""
    name, slash, player = key.partition("/")
    return name + slash if name + slash in METRICS else name, player


def describe(key: str) -> tuple[str, str]:
    """(name, unit) of a metric such as val_loss, reward/self or acc@2."""
    key, _, distance = key.partition("@")
    base, player = lookup(key)
    name, unit = METRICS.get(base, (base, ""))[:2]
    name += f", {player}" if player else ""
    return name + (f", {distance} ranks apart" if distance else ""), unit


def number(record: dict, key: str) -> float | None:
    """A metric of a record, or None if it is not a finite number."""
    value = record.get(key)
    return value if type(value) in (int, float) and abs(value) < 1e300 else None


def format_number(value: float | None) -> str:
    """A number with four digits; "-" for None."""
    if value is None:
        return "-"
    return typeset(f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}")


def typeset(text: str) -> str:
    return text.replace("e-0", "e-").replace("-", "\N{MINUS SIGN}")


def with_error(record: dict | None, key: str) -> str:
    """A metric with its standard error if there is one; "-" without a record."""
    if not record:
        return "-"
    text, error = format_number(number(record, key)), number(record, key + "_se")
    return text if error is None else f"{text} ± {error:.2g}"


def metric_keys(records: list[dict | None]) -> list[str]:
    """The metrics of some records (None: no record), those of players beside each other."""
    groups = {}
    for r in records:
        for key in r or ():
            hidden = key in ("round", "step", "seconds", "x") or key.endswith("_se")
            if not hidden and number(r, key) is not None:
                groups.setdefault(key.partition("/")[0], {})[key] = None
    return list(itertools.chain(*groups.values()))


# ----------------------------------------------------------------------------------------- curves


def run_charts(run):
    """Every Chart that a run has records for."""
    curves = {}  # {title: {label: curve}}
    for kind, label in LABELS.items():
        records = run.of_kind(kind)
        for key in metric_keys(records):
            base, player = lookup(key)
            if base == "loss" and is_cross_entropy(run):
                base = "val_loss"  # the same quantity, so the same chart
            if kind == "step" and base in different_in_training(run):
                base = f"train_{base}"
            if base in CHARTED:
                name, _, *chart = CHARTED[base]
                if base == "pair_nll" and "nll" in different_in_training(run):
                    chart = []
                series = curves.setdefault(chart[0] if chart else name, {})
                by_round = run.stage == "spin" and kind != "collect"
                label_of_curve = player or (name.lower() if chart else label)
                series[label_of_curve] = make_curve(records, key, by_round)
    starts = {r["round"]: r["x"] for r in reversed(run.records)}
    borders = [(x, f"round {round_id}") for round_id, x in sorted(starts.items())][1:]
    levels = {"Ranking loss": equal_scores(run), "Ranking accuracy": (0.5, "chance")}
    charts = []
    units = dict(metric[:2] for metric in CHARTED.values())
    for title, unit in units.items():
        if title in curves:
            series = dict(list(curves[title].items())[:12])
            charts.append(Chart(title, unit, series, run.span, borders, levels.get(title)))
    return charts


def is_cross_entropy(run) -> bool:
    """Whether the training loss is the mean cross-entropy of tokens, and nothing else."""
    only_nll = not run.setting("taylor_order") and not run.setting("pretrain_coef")
    return run.stage in ("pretrain", "sft") and only_nll


def different_in_training(run) -> set[str]:
    """The metrics of a step that evaluations have under that name, or in that chart, and compute in
    another way: those do not know the loss. Their ranking loss is Plackett-Luce on the implicit
    rewards of all responses, or a reward model's loss of pairs."""
    different = {"kl"}
    by_length = run.setting("loss_type") in MEAN_LOGPROB_TYPES or run.setting("length_normalize")
    if run.setting("best_and_worst") or by_length:
        different |= {"nll", "acc"}
    loss_type = "pairs" if run.stage == "reward" else "pl"
    is_pair = loss_type == "pl" and run.setting("loss_type") == "pairs" and len(run.players) == 2
    if run.setting("loss_type") != loss_type and not is_pair:
        different.add("nll")
    if run.setting("rank_depth") or run.setting("score_margin"):
        different.add("nll")
    return different


def compare(all_runs):
    """The validation curves that two or more runs have, as Charts."""
    series, units = {}, {}
    for i, run in enumerate(all_runs, 1):
        for chart in run_charts(run):
            if "validation" in chart.series:
                units[chart.title] = chart.unit
                label = f"{i} {run.name}"
                series.setdefault(chart.title, {})[label] = chart.series["validation"]
    span = (0, max(run.span[1] for run in all_runs))
    shared = {title: curves for title, curves in series.items() if len(curves) > 1}
    return [Chart(f"{title}, validation", units[title], shared[title], span) for title in shared]


def equal_scores(run):
    """(the ranking loss if all scores are equal, its name), or None. Where a scorer ranks, or a
    player has several samples, which are ties, it differs from row to row; with players of earlier
    rounds, from round to round; with `pairs`, from training to validation, which is Plackett-Luce;
    for a reward model trained by Plackett-Luce, with the number of responses in a row.
    """
    loss_type = run.setting("loss_type")
    if loss_type not in ("pl", "pairs") or run.setting("score_margin"):
        return None
    players = run.players
    several = len(set(players)) < len(players) or any(p.startswith("self-") for p in players)
    if loss_type == "pairs":
        K = 2 if run.stage == "reward" or len(players) == 2 else 0
    elif run.stage == "reward" or several or run.is_scored or run.setting("rank_depth"):
        K = 0  # it has no one value
    else:
        K = len(players)
    value = math.lgamma(K + 1)
    return (value, f"equal scores: ln {K}! = {value:.4f}") if K > 1 else None


def make_curve(records: list[dict], key: str, by_round: bool) -> list[list]:
    """[[(step, value), ...]]: one piece, or one for each round. Rounds of self-play are apart
    because each has its own reference and its own samples."""
    points, n, curve = {}, num_averaged(records), []
    for r in records:
        if number(r, key) is not None:
            points.setdefault(r["round"] if by_round else 0, []).append((r["x"], r[key]))
    for piece in points.values():
        groups = [zip(*piece[i : i + n]) for i in range(0, len(piece), n)]
        curve.append([(sum(x) / len(x), sum(y) / len(y)) for x, y in groups])
    return curve


def num_averaged(records: list[dict]) -> int:
    """How many records make one point of a curve."""
    return max(1, math.ceil(len(records) / MAX_POINTS))


def ticks(low: float, high: float, n: int) -> list[tuple[float, str]]:
    """About n round numbers from low to high, [(number, text)], with the decimals they need."""
    power = 10.0 ** math.floor(math.log10((high - low) / n))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= 0.999 * (high - low) / n)
    finest = math.floor(math.log10(step) + 1e-9)
    greatest = math.floor(math.log10(max(abs(low), abs(high))) + 1e-9)
    form = f",.{max(0, -finest)}f" if greatest > -4 else f".{greatest - finest}e"
    multiples = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [(i * step, typeset(format(i * step, form)) if i else "0") for i in multiples]


@dataclass
class Chart:
    """series: {label: curve}; span: first and last step; borders: [(step, text)] of vertical
    lines; level: (value, text) of a horizontal line."""

    title: str
    unit: str
    series: dict
    span: tuple
    borders: list = ()
    level: tuple | None = None

    def __post_init__(self):
        pieces = itertools.chain(*self.series.values())
        points = list(itertools.chain(*pieces))
        values = [value for _, value in points] + ([self.level[0]] if self.level else [])
        low, high = min(values), max(values)
        margin = 0.1 * abs(high) or 1.0
        if high > low:
            margin = max(0.06 * (high - low), 1e-4 * abs(high))
        self.low, self.high = low - margin, high + margin
        self.first, self.last = self.span[0], max(self.span[1], self.span[0] + 1)
        every = max(1, math.ceil(len(self.borders) / 5))
        self.border_lines = [(self.x(step), text) for step, text in self.borders[::every]]
        steps = ticks(self.first, self.last, 4)
        self.x_ticks = [(self.x(x), text) for x, text in steps if "." not in text]
        self.y_ticks = [(self.y(y), text) for y, text in ticks(self.low, self.high, 4)]

    def x(self, step):
        return round(LEFT + (step - self.first) / (self.last - self.first) * (RIGHT - LEFT), 1)

    def y(self, value):
        return round(BOTTOM - (value - self.low) / (self.high - self.low) * (BOTTOM - TOP), 1)
