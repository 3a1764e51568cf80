"""Figures and reports from metrics.jsonl, also from logs that are older than today's settings."""

import json
import os
import re
import shutil

import matplotlib.pyplot as plt
import pytest
from conftest import command, read_metrics, spin_args

import train
from tools import plot

SEEDS = [f"studies/selfplay/demo_seeds/{seed}" for seed in (1, 2, 3)]
GSM8K = "studies/selfplay/gsm8k/spin_k3_gsm8k"


def run(*args):
    return command("tools.plot", *args)


def is_figure(path):
    """Whether PATH.png and PATH.svg are there, with text kept as text in the SVG."""
    with open(f"{path}.png", "rb") as f:
        is_png = f.read(4) == b"\x89PNG"
    with open(f"{path}.svg", encoding="utf-8") as f:
        svg = f.read()
    return is_png and "</svg>" in svg and "<text" in svg


def write_run(folder, evals):
    os.makedirs(folder)
    with open(f"{folder}/metrics.jsonl", "w") as f:
        for record in evals:
            f.write(json.dumps({"kind": "eval", "seconds": 1.0} | record) + "\n")
    return str(folder)


# ------------------------------------------------------------------------------------------ style


def test_a_figure_is_written_twice_at_200_dpi_and_always_the_same(tmp_path):
    def draw(path):
        with plot.style():
            fig, ax = plt.subplots(figsize=(4, 3))
            ax.plot([0, 1], [0, 1], label="T_0.5")
            plot.reference_line(ax, 0.5, "chance")
            plot.figure_legend(fig)
            plot.save_figure(fig, path)

    draw(f"{tmp_path}/a.png")
    draw(f"{tmp_path}/T_0.5")  # no ending
    assert sorted(os.listdir(tmp_path)) == ["T_0.5.png", "T_0.5.svg", "a.png", "a.svg"]
    assert is_figure(f"{tmp_path}/a") and is_figure(f"{tmp_path}/T_0.5")
    assert plt.imread(f"{tmp_path}/a.png").shape[1] == pytest.approx(4 * 200, rel=0.1)
    with open(f"{tmp_path}/a.svg") as a, open(f"{tmp_path}/T_0.5.svg") as b:
        assert a.read() == b.read()


def test_sequential_colors_get_lighter():
    lightness = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b, _ in plot.sequential_colors(6)]
    assert lightness == sorted(lightness) and lightness[-1] < 0.8
    assert len(set(plot.PALETTE)) == len(plot.PALETTE)


# ------------------------------------------------------------------------------------ the commands


def test_loss(tiny_runs, tmp_path):
    pretrain, sft = tiny_runs["pretrain"], tiny_runs["sft"]
    done = run("loss", f"{tmp_path}/loss.png", f"a={pretrain},{pretrain}", f"b={sft}")
    assert done.returncode == 0 and is_figure(f"{tmp_path}/loss"), done.stderr


def test_the_mean_of_seeds_is_where_all_have_a_value():
    with plot.style():
        _, ax = plt.subplots()
        plot.draw_seeds(ax, [([0, 10, 20], [1.0, 2.0, 3.0]), ([0, 20], [2.0, 5.0])], "red", "a")
        first, second, mean = ax.get_lines()
    assert list(mean.get_xdata()) == [0, 20] and list(mean.get_ydata()) == [1.5, 4.0]
    assert list(first.get_xdata()) == [0, 10, 20] and list(second.get_ydata()) == [2.0, 5.0]
    plt.close("all")


def test_steps_count_over_rounds():
    places = ((0, 0), (0, 8), (1, 0), (1, 4), (2, 1))
    records = [{"kind": "eval", "round": r, "step": s} for r, s in places]
    assert plot.global_steps(records) == [0, 8, 8, 12, 13]
    assert plot.round_spans([records]) == {0: (0, 8), 1: (8, 12), 2: (13, 13)}
    assert plot.round_lengths(records) == {0: 8, 1: 4, 2: 1}


def test_rounds_that_do_not_end_in_an_evaluation():
    """PPO evaluates every few rounds. The record of step n - 1 is the last of n."""
    records = []
    for round_id in range(3):
        records += [{"kind": "step", "round": round_id, "step": s} for s in range(4)]
    records.append({"kind": "eval", "round": 2, "step": 4})
    assert plot.global_steps(records) == [*range(12), 12]
    assert sum(plot.round_lengths(records).values()) == 12


def test_rounds_of_unequal_length_are_compared_step_by_step():
    """Where a scorer ranks, a tie of all samples drops a row, and seeds differ in steps."""
    by_seed = []
    for length in (7, 5):
        records = []
        for round_id in (0, 1):
            for step in (0, 4, length):
                record = {"kind": "eval", "round": round_id, "step": step}
                records.append(record | {"reward/self": 10 * length + step})
        by_seed.append(records)
    assert plot.round_spans(by_seed) == {0: (0, 7), 1: (7, 14)}
    fig, ax = plot.plt.subplots()
    plot.draw_rounds(ax, by_seed, "reward/self", "red", "self")
    means = [line for line in ax.lines if line.get_linewidth() >= 1]
    plot.plt.close(fig)
    assert [list(line.get_xdata()) for line in means] == [[0, 4], [7, 11]]
    assert [list(line.get_ydata()) for line in means] == [[60, 64], [60, 64]]


def test_rounds_from_old_logs(tmp_path):
    done = run("rounds", f"{tmp_path}/gsm8k.png", GSM8K)
    assert done.returncode == 0 and is_figure(f"{tmp_path}/gsm8k"), done.stderr
    with open(f"{tmp_path}/gsm8k.svg", encoding="utf-8") as f:
        svg = f.read()
    for text in ("round 1", "teacher above self", "chance (1/2; data: 1/3)", "nats per response"):
        assert text in svg, text
    assert "studies" not in svg  # no path of a run


@pytest.mark.parametrize(
    "options, texts",
    [
        (["--players=data,self:2"], ["data above self", "chance (1/2)"]),
        (
            ["--players=data,self:2,teacher", "--teacher=rows"],
            ["all pairs", "data above self and teacher", "chance (1/2; data: 1/4; self: 1/3)"],
        ),
        (
            ["--players=data,self:2", "--ranked_by=conftest:letters"],
            ["data above all worse", "self above all worse", "chance (1/2, all pairs)"],
        ),
    ],
)
def test_rounds_of_several_samples(tiny_runs, tiny_data, tmp_path, options, texts):
    """Chance is 1 of the responses, not of the players; none is given where a scorer ranks."""
    out = f"{tmp_path}/run"
    train.main(spin_args(tiny_runs, tiny_data, out, "--max_rows=16", "--max_steps=2", *options))
    done = run("rounds", f"{tmp_path}/figure.png", out)
    assert done.returncode == 0 and is_figure(f"{tmp_path}/figure"), done.stderr
    with open(f"{tmp_path}/figure.svg", encoding="utf-8") as f:
        svg = f.read()
    for text in texts:
        assert text in svg, text
    assert "length alone" not in svg or options == ["--players=data,self:2"]


def test_rounds_of_the_datas_own_ranking(tiny_runs, tiny_data, tmp_path):
    """The responses are named by their places."""
    out = f"{tmp_path}/run"
    options = ["--stage=preference", "--max_rows=16", "--max_steps=2"]
    train.main(spin_args(tiny_runs, tiny_data, out, *options))
    done = run("rounds", f"{tmp_path}/figure.png", out)
    assert done.returncode == 0 and is_figure(f"{tmp_path}/figure"), done.stderr
    with open(f"{tmp_path}/figure.svg", encoding="utf-8") as f:
        svg = f.read()
    for text in ("1 above 2 and 3", "2 above 3", "chance (1/2; 1: 1/3)"):
        assert text in svg, text


def test_table(tiny_runs, tmp_path):
    done = run("table", f"{tmp_path}/table", tiny_runs["sft"])
    first, *_, last = read_metrics(tiny_runs["sft"], "eval")
    assert f"| val_loss | {first['val_loss']:.4f} | {last['val_loss']:.4f} |  |" in done.stdout
    assert sorted(os.listdir(f"{tmp_path}/table")) == ["report.md", "sft"]


def test_a_table_of_runs_of_one_name(tiny_runs, tmp_path):
    """Seeds in folders of their own: each has a row and a log. A file of the user stays."""
    for seed in "ab":
        shutil.copytree(tiny_runs["sft"], tmp_path / seed / "sft")
    with open(tmp_path / "b/sft/metrics.jsonl", "a") as f:
        f.write(json.dumps(read_metrics(tiny_runs["sft"], "eval")[-1] | {"val_loss": 1.25}) + "\n")
    runs = [f"{tmp_path}/{seed}/sft" for seed in "ab"]
    for _ in range(2):
        done = run("table", f"{tmp_path}/table", *runs)
        assert done.returncode == 0, done.stderr
        assert "| a/sft | sft |" in done.stdout and "| b/sft | sft |" in done.stdout
    for seed in "ab":
        copies = [
            tmp_path / seed / "sft/metrics.jsonl",
            tmp_path / f"table/{seed}/sft/metrics.jsonl",
        ]
        assert copies[0].read_bytes() == copies[1].read_bytes()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/report.md").write_text("mine")
    for args, message in (
        (["table", f"{tmp_path}/notes", runs[0]], "report.md is not a report of this command"),
        (["table", f"{tmp_path}/table", runs[0], runs[0]], "a/sft is given twice"),
        (["loss", f"{tmp_path}/x.png", f"a={runs[0]}", f"a={runs[1]}"], "are a=RUN,RUN"),
    ):
        done = run(*args)
        assert done.returncode == 1 and message in done.stderr
    assert (tmp_path / "notes/report.md").read_text() == "mine"
    path = str(tmp_path / "notes/report.md")
    with pytest.raises(SystemExit, match="not a report of this command"):
        plot.check_report(path, plot.REPORT_HEAD)
    plot.check_report(path, "mi")
    plot.check_report(path + "x", plot.REPORT_HEAD)


def test_rounds_of_runs_with_other_players_are_not_mixed(tmp_path):
    runs = []
    for name, players in (("a", ["data", "self"]), ("b", ["1", "2"])):
        record = {"round": 0, "step": 1} | {f"reward/{player}": 0.0 for player in players}
        runs.append(write_run(tmp_path / name, [record]))
    done = run("rounds", f"{tmp_path}/x.png", *runs)
    assert done.returncode == 1 and "b has other players than" in done.stderr


@pytest.mark.parametrize("longest", [0, 1])
def test_a_round_that_a_seed_lacks_has_no_mean(longest):
    """But the line of the seed that has it, whatever the order of the seeds."""

    def record(round_id, step):
        return {"kind": "eval", "round": round_id, "step": step, "acc": 0.5 + 0.1 * round_id}

    short = [record(0, 0), record(0, 4)]
    by_seed = [short, short]
    by_seed[longest] = [*short, record(1, 0), record(1, 4)]
    assert list(plot.round_spans(by_seed)) == [0, 1]
    fig, ax = plot.plt.subplots()
    plot.draw_rounds(ax, by_seed, "acc", "#000000", "all pairs")
    drawn = [(list(line.get_xdata()), line.get_linewidth() < 1) for line in ax.lines]
    plot.plt.close(fig)
    assert drawn.count(([0, 4], True)) == 2 and drawn.count(([0, 4], False)) == 1
    assert drawn.count(([4, 8], True)) == 1 and ([4, 8], False) not in drawn


def test_the_last_of_many_rounds_is_compared():
    metrics = {"win_rate": 0.5, "win_rate_se": 0.01, "val_loss": 3.0}
    rounds = {}
    for stage in ("spin_k2", "spin_k3"):
        rounds |= {f"{stage}.round_{n}": metrics for n in (2, 9, 10)}
    lines = [line for _, line in plot.comparisons([{"sft": metrics, "sft_more": metrics} | rounds])]
    assert len(lines) == 8 and all(".round_10 is" in line for line in lines)


def test_the_demos_report_says_what_the_logs_say(tmp_path):
    """The report made again from the repository's logs is the one in the repository."""
    demos = [str(tmp_path / seed) for seed in "123"]
    for seed, demo in zip(SEEDS, demos):
        shutil.copytree(seed, demo)
    done = run("report", *demos, f"{tmp_path}/a_file")
    assert done.returncode == 0, done.stderr
    with open(f"{tmp_path}/report.md") as f, open(f"{SEEDS[0]}/../report.md") as kept:
        text = f.read()
        assert text == kept.read()
    assert "| sft_more | 4.4590 ± 0.022 | - | 51.8 % ± 2.7 |" in text
    assert "self-play is better in 0, worse in 4, and not distinguishable in 10" in text
    for name in re.findall(r"\((\w+)\.png\)", text):
        assert is_figure(f"{tmp_path}/{name}")
        assert os.path.getsize(f"{tmp_path}/{name}.svg") < 300_000

    done = run("report", demos[0])
    with open(f"{demos[0]}/report.md") as f:
        text = f.read()
    assert done.returncode == 0 and "One seed." in text and "±" not in text
    assert "one training run, 95 % interval over the prompts" in text


def test_an_evaluation_in_which_nothing_is_ranked(tmp_path):
    """All samples equal the data's response: it has neither a reward of self nor an accuracy."""
    ranked = {"reward/data": 0.1, "reward/self": -0.1, "acc": 0.75, "acc_se": 0.1, "val_loss": 1.0}
    converged = {"reward/data": 0.0, "val_loss": 0.5}
    assert plot.rewarded_players("r", [ranked, converged]) == ["data", "self"]
    assert plot.rewarded_players("r", [converged, ranked]) == ["data", "self"]
    for name, evals in (("a", [ranked, converged]), ("b", [converged, ranked])):
        os.makedirs(tmp_path / name)
        (tmp_path / name / "config.json").write_text('{"config": {"stage": "spin"}}')
        records = []
        for step, values in enumerate(evals):
            record = {"kind": "eval", "round": 0, "step": step, "seconds": 1.0}
            records.append(json.dumps(record | values) + "\n")
        (tmp_path / name / "metrics.jsonl").write_text("".join(records))
    plot.table(f"{tmp_path}/out", [f"{tmp_path}/a", f"{tmp_path}/b"])
    lines = (tmp_path / "out/report.md").read_text().splitlines()
    assert "| a | spin | 0 | 0.0 | acc | 0.7500 |  |  |" in lines
    assert "| b | spin | 0 | 0.0 | acc |  | 0.7500 | 0.1000 |" in lines
    kept = tmp_path / "out/a/metrics.jsonl"
    kept.write_text(kept.read_text()[:-9])  # of the same run, at an earlier time
    plot.table(f"{tmp_path}/out", [f"{tmp_path}/a"])
    kept.write_text("mine")
    with pytest.raises(SystemExit, match="is not an earlier copy"):
        plot.table(f"{tmp_path}/out", [f"{tmp_path}/a"])
    assert kept.read_text() == "mine"


def test_mistakes_are_one_line(tiny_runs, tmp_path):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for content in ("{}\n", "[1]\n", "{\n"):
        (damaged / "metrics.jsonl").write_text(content)
        done = run("loss", f"{tmp_path}/x.png", f"a={damaged}")
        assert done.returncode and "not the metrics of a run" in done.stderr
        assert done.stderr.count("\n") == 1
    for args, message in (
        (["loss", "x.png", "a=nowhere"], "nowhere/metrics.jsonl: No such file"),
        (["loss", "x.png", "a"], "must be NAME=RUN"),
        (["rounds", "x.png", tiny_runs["sft"]], "no evaluation of ranked responses"),
        (["table", "x", "nowhere"], "nowhere/metrics.jsonl: No such file"),
        (["report", "nowhere"], "nowhere/eval/eval.json: No such file"),
        ([], "required: command"),
    ):
        done = run(*args)
        assert done.returncode and message in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------ comparisons


def table(win_rate, more_win_rate, val_loss=3.0):
    """One seed's metrics: of self-play, and of SFT continued."""
    ours = {"win_rate": win_rate, "win_rate_se": 0.01, "val_loss": val_loss}
    return {
        "sft": {"val_loss": 2.95},
        "sft_more": {"win_rate": more_win_rate, "win_rate_se": 0.01, "val_loss": 2.9},
        "spin_k2.round_1": ours,
        "spin_k3.round_1": ours,
    }


@pytest.mark.parametrize(
    "other, metric, tables, outcome",
    [
        ("sft_more", "win rate", [table(0.6, 0.5)], "better than"),
        ("sft_more", "win rate", [table(0.4, 0.5)], "worse than"),
        ("sft_more", "win rate", [table(0.51, 0.5)], "not distinguishable from"),
        (
            "sft_more",
            "win rate",
            [table(0.6, 0.5), table(0.5, 0.55), table(0.55, 0.5)],
            "not distinguishable from",
        ),
        ("sft", "win rate", [table(0.6, 0.5), table(0.61, 0.5), table(0.62, 0.5)], "better than"),
        ("sft_more", "validation loss", [table(0.5, 0.5)], "in this run worse than"),
        (
            "sft",
            "validation loss",
            [table(0.6, 0.5, 3.0), table(0.6, 0.5, 3.01), table(0.6, 0.5, 2.99)],
            "worse than",
        ),
    ],
)
def test_a_comparison_follows_the_interval(other, metric, tables, outcome):
    found = plot.comparisons(tables)
    (match,) = [
        (word, line)
        for word, line in found
        if line.startswith("- spin_k2") and f" {other} in {metric}:" in line
    ]
    assert match[0] == outcome and f"**{outcome}** {other}" in match[1]
    if len(tables) == 1 and metric == "validation loss":
        assert "one training run, no interval" in match[1]
    counts = re.findall(r"\d+", plot.summary([word for word, _ in found]))
    tested = [word for word, _ in found if not word.startswith("in this run")]
    assert int(counts[0]) == len(tested) == sum(map(int, counts[1:]))


def test_students_interval():
    mean, half_width = plot.t_interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half_width == pytest.approx(4.303 / 3**0.5)
    assert plot.t_interval([5.0, 5.0])[1] == 0.0


def test_a_metric_that_a_run_does_not_have(tmp_path):
    record = {"kind": "eval", "round": 0, "step": 0, "reward": 0.5, "seconds": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(SystemExit, match="an evaluation has no val_loss; it has kind, round"):
        plot.eval_curve(str(tmp_path), "val_loss")
