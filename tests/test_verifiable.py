"""studies/verifiable: its commands, its table against numbers by hand, and what a failure stops."""

import json
import os
import re
import shutil
import subprocess
import time

import numpy as np
import pytest

from data.files import write_json
from data.rows import write_rows
from model import GPTConfig
from nanospin import config
from studies.rlhf import table as rlhf
from studies.smollm2 import table as smollm2
from studies.verifiable import run, summarize
from tools.plot import read_metrics


class Args:
    task, out, data, list = "sums", "out/x", "data/x", False


class Countdown(Args):
    task = "countdown"


@pytest.mark.parametrize("name", run.METHODS)
def test_every_method_is_a_valid_config(name):
    command = run.train_command(Args, "1", name, run.METHODS[name], "sft")
    cfg = config.load(command[2:], GPTConfig)
    assert cfg.init == "out/x/1/sft"
    assert cfg.out_dir == f"out/x/1/{name}"
    assert cfg.data.startswith("data/x/")
    assert cfg.seed == 1
    given = [setting.partition("=")[0] for setting in run.METHODS[name][1:]]
    assert len(set(given)) == len(given)  # no setting is given twice


@pytest.mark.parametrize("name", ["sft_new", "online_pl_4", "grpo_8", "ppo"])
def test_the_methods_on_countdown(name):
    command = run.train_command(Countdown, "1", name, run.METHODS[name], "sft")
    cfg = config.load(command[2:], GPTConfig)
    assert (cfg.max_prompt, cfg.max_response) == (40, 16)
    assert cfg.data.startswith("data/x/all_games" if name == "sft_new" else "data/x/games/")
    scorer = {"spin": cfg.ranked_by, "ppo": cfg.reward}.get(cfg.stage, "")
    assert scorer == ("" if name == "sft_new" else "data.countdown.scorer:reaches")
    assert "--scorer=data.countdown.scorer:reaches" in run.eval_command(Countdown, "1", name)


def test_countdown_has_no_teacher():
    with pytest.raises(SystemExit, match="only --task=sums has a teacher"):
        run.main(["--task=countdown", "--only", "distill", "--list"])


def test_other_runs_and_other_data_are_not_taken_for_those_asked_for(tmp_path):
    options = [f"--out={tmp_path}/out", f"--data={tmp_path}/data", "--seeds", "1", "2", "--list"]
    os.makedirs(f"{tmp_path}/out/2/sft")
    write_json(f"{tmp_path}/out/2/sft/config.json", {"config": {"max_steps": 350}})
    run.main([*options, "--only", "spin"])
    with pytest.raises(SystemExit, match="2/sft was trained for 350 steps, not 700"):
        run.main([*options, "--sft_steps=700"])
    os.makedirs(f"{tmp_path}/data/sums/answers")
    write_json(f"{tmp_path}/data/sums/answers/meta.json", {"train_rows": 60})
    with pytest.raises(SystemExit, match="60 answers, not 1500"):
        run.main(options)


@pytest.mark.parametrize("main", [run.main, summarize.main])
def test_a_seed_counts_once(main, tmp_path):
    with pytest.raises(SystemExit, match="--seeds: 1 2 1 has one seed twice"):
        main([f"--out={tmp_path}", "--seeds", "1", "2", "1"])


def test_methods_under_a_scorer_draw_as_many_samples():
    for name in summarize.methods_of("no answers, a checker"):
        cfg = config.load(run.train_command(Args, "1", name, run.METHODS[name])[2:], GPTConfig)
        K = cfg.samples_per_prompt
        if cfg.stage == "spin":
            K = int(cfg.players[0].removeprefix("self:"))
        assert cfg.rounds * cfg.max_rows * K == 65536


def test_the_groups_have_every_method_once():
    grouped = []
    for group in summarize.GROUPS:
        grouped += summarize.methods_of(group)
    assert grouped == list(run.METHODS)
    assert set(summarize.LABELS) == {"sft", *run.METHODS}


def write_run(folder: str, name: str, greedy: float):
    os.makedirs(f"{folder}/{name}/eval")
    sampled = {"exact_match": greedy / 2, "pass_at_8": greedy, "val_loss": 1.0, "kl": 0.5}
    sampled["checkpoint"] = f"elsewhere/{name}/round_1/step_000007"
    table = {name: sampled, f"{name}_greedy": {"exact_match": greedy}}
    with open(f"{folder}/{name}/eval/eval.json", "w") as f:
        json.dump(table, f)
    with open(f"{folder}/{name}/metrics.jsonl", "w") as f:
        for round_id, step in ((0, 0), (0, 5), (1, 7)):
            f.write(json.dumps({"kind": "eval", "round": round_id, "step": step}) + "\n")


def test_a_method_is_needed_beside_the_baseline(tmp_path):
    for name in ("sft", "sft_more"):
        write_run(f"{tmp_path}/1", name, 0.3)
    options = [f"--out={tmp_path}", "--seeds", "1"]
    with pytest.raises(SystemExit, match="has no method to compare to sft_more"):
        summarize.main(options)
    write_run(f"{tmp_path}/1", "spin", 0.4)
    for name, message in (("sft_more", "b has no sft, where"), ("sft", "no method is in all of")):
        write_run(f"{tmp_path}/b/1", name, 0.4)
        with pytest.raises(SystemExit, match=message):
            summarize.main([*options, "--map", f"120={tmp_path}", f"240={tmp_path}/b"])
        shutil.rmtree(f"{tmp_path}/b")
    assert not os.path.exists(f"{tmp_path}/results.json")


def test_the_table_by_hand(tmp_path, capsys):
    """Differences are paired by seed, and their interval is Student's: 12.706 s / sqrt(2) for 2."""
    for seed, start, more, spin in ((1, 0.2, 0.3, 0.5), (2, 0.4, 0.6, 0.7)):
        for name, greedy in (("sft", start), ("sft_more", more), ("spin", spin)):
            write_run(f"{tmp_path}/{seed}", name, greedy)
        write_run(f"{tmp_path}/{seed}", "online_pl_4", more)  # not the first of its group
    options = [f"--out={tmp_path}", "--seeds", "1", "2", f"--map=350={tmp_path}"]
    summarize.main(options)
    printed = capsys.readouterr()
    assert "grpo_8 is left out" in printed.err
    lines = printed.out.splitlines()
    start = lines.index("| gain over the start | 350 steps |")
    headings = [line.split(" | ")[0] for line in lines[:start] if line.startswith("| *")]
    assert headings == ["| *the same 1,500 answers*", "| *no answers, a checker*"]
    line = next(line for line in lines if "| SPIN, K = 2 |" in line)
    half_width = 12.706 * np.std([20, 10], ddof=1) / np.sqrt(2)
    assert line.split(" | ")[1:4] == ["60.0 %", f"+15.0 ± {half_width:.1f}", "30.0 %"]
    assert line.split(" | ")[-1] == "12 |"  # steps
    half_width = 12.706 * np.std([30, 30], ddof=1) / np.sqrt(2)
    assert lines[start + 2] == "| SFT, where all start | 30.0 % |"
    assert f"| SPIN, K = 2 | +30.0 ± {half_width:.1f} |" in lines[start:]
    with open(f"{tmp_path}/results.json") as f:
        assert json.load(f)["spin"][1]["greedy"] == pytest.approx(70)
    for name in ("methods.png", "methods.svg", "map.png"):
        assert os.path.getsize(f"{tmp_path}/{name}") > 1000

    summarize.main(options)  # replaces its own
    with pytest.raises(SystemExit, match="350 steps are given twice"):
        summarize.main([*options[:-1], "--map", *[f"350={tmp_path}"] * 2])
    for name in ("results.json", "map.json"):
        mine = tmp_path / "figures" / name
        mine.parent.mkdir(exist_ok=True)
        mine.write_text('{"mine": 1}')
        with pytest.raises(SystemExit, match=f"{name} is not of this command"):
            summarize.main([*options, f"--figures={mine.parent}"])
        assert mine.read_text() == '{"mine": 1}'
        mine.unlink()
    for name in ("methods.png", "map.svg"):
        mine = tmp_path / "figures" / name
        mine.write_text("mine")
        with pytest.raises(SystemExit, match=f"{name} is there"):
            summarize.main([*options, f"--figures={mine.parent}"])
        assert mine.read_text() == "mine"
        mine.unlink()
    with pytest.raises(SystemExit, match="not of this command and task"):
        summarize.main(["--task=countdown", *options])


def test_a_run_that_has_gone_on_is_not_in_the_table(tmp_path):
    """Its validation loss and number of steps would be of two different checkpoints."""
    task = run.TASKS["sums"]
    write_run(f"{tmp_path}/1", "spin", 0.5)
    spin = f"{tmp_path}/1/spin"
    os.makedirs(f"{spin}/round_1/step_000007")
    assert summarize.measured(task, tmp_path, "1", "spin")["greedy"] == 50
    os.makedirs(f"{spin}/round_2/step_000003")
    with pytest.raises(SystemExit, match="spin has gone on since .*step_000007 was measured"):
        summarize.measured(task, tmp_path, "1", "spin")


def test_the_table_of_smollm2_follows_from_its_scores():
    folder = os.path.dirname(smollm2.__file__)
    with open(f"{folder}/README.md", encoding="utf-8") as f:
        text = f.read()
    scored = [smollm2.read_scores(f"{folder}/logs/{seed}.scores.jsonl") for seed in (1, 2, 3)]
    assert "\n".join(smollm2.make_table(smollm2.mean_over_seeds(scored))) in text


# the table of README.md: the task, and the two methods of each line
README_GAINS = [
    ("sums", "online_pl_4", "sft"),
    ("sums", "online_pl_4", "sft_more"),
    ("countdown", "online_pl_4", "sft_more"),
    ("sums", "online_pl_8", "best_of_8"),
    ("sums", "spin_nll", "sft"),
    ("sums", "spin_nll", "sft_more"),
    ("sums", "spin_new_nll", "sft_new"),
    ("sums", "spin_k3_new", "spin_new_nll"),
    ("sums", "online_pl_8", "online_pairs_8"),
    ("sums", "grpo_8", "online_pl_8"),
]


def test_the_table_of_the_readme_follows_from_the_results():
    """Bold where the interval excludes 0."""
    with open("README.md", encoding="utf-8") as f:
        lines = f.read().splitlines()
    start = lines.index("| gain, in points | greedy | sampled |") + 2
    results = {}
    for task, folder in (("sums", "figures"), ("countdown", "figures/countdown")):
        with open(f"studies/verifiable/{folder}/results.json") as f:
            results[task] = json.load(f)
    for line, (task, name, other) in zip(lines[start:], README_GAINS):
        cells = []
        for metric in ("greedy", "sampled"):
            gains = summarize.gains_over(results[task], name, other, metric)
            cell = summarize.format_difference(gains)
            mean, half_width = summarize.t_interval(gains)
            cells.append(f"**{cell}**" if abs(mean) > half_width else cell)
        assert line.strip("| ").split(" | ")[1:] == cells, (line, name, other)
    assert lines[start + len(README_GAINS)] == ""


def test_a_run_is_measured_again_only_if_it_is_another(tmp_path, monkeypatch):
    """train.py is always asked: it refuses other settings. eval.py runs if something changed."""
    commands = []
    newest = "step_000008"

    def note(command, log, list_only):
        commands.append(command[1])
        os.makedirs(f"{tmp_path}/1/spin/eval", exist_ok=True)

    monkeypatch.setattr(run, "run", note)
    monkeypatch.setattr(run.checkpoint, "resolve", lambda folder: f"{folder}/round_0/{newest}")

    class Study(Args):
        out = str(tmp_path)

    run.train_and_measure(Study, "1", "spin", run.METHODS["spin"])
    run.train_and_measure(Study, "1", "spin", run.METHODS["spin"])
    assert commands == ["train.py", "eval.py", "train.py"]
    newest = "step_000016"  # it was trained further
    run.train_and_measure(Study, "1", "spin", run.METHODS["spin"])
    assert commands[3:] == ["train.py", "eval.py"]
    monkeypatch.setattr(Study, "task", "countdown")  # another command of eval.py
    run.train_and_measure(Study, "1", "spin", run.METHODS["spin"])
    assert commands[5:] == ["train.py", "eval.py"]


def test_a_run_of_another_start_is_refused(tmp_path, monkeypatch):
    spin, sft = f"{tmp_path}/spin", f"{tmp_path}/sft"
    os.makedirs(spin)
    write_json(f"{spin}/config.json", {"config": {"players_sha256": {"init": "a"}}})
    monkeypatch.setattr(run.checkpoint, "weights_sha256", lambda path: weights)
    weights = "a"
    run.check_start(spin, sft)
    weights = "b"
    with pytest.raises(SystemExit, match="spin began with other weights than .*sft has now"):
        run.check_start(spin, sft)


def test_the_tables_of_rlhf_follow_from_its_logs():
    with open("studies/rlhf/README.md", encoding="utf-8") as f:
        text = f.read()
    seeds = [f"studies/rlhf/logs/{seed}" for seed in (1, 2, 3)]
    assert "\n".join(rlhf.ranking_table(seeds)) in text
    assert "\n".join(rlhf.ppo_table(seeds)) in text
    assert len(rlhf.pairs_that_differ(seeds)) == 5 and "five differ measurably" in text


def test_the_differences_of_frontier_follow_from_its_log():
    """The best settings within 5 nats of KL, seed by seed."""
    with open("studies/frontier/logs/log.txt", encoding="utf-8") as f:
        log = f.read()
    true = {}
    for name, reward in re.findall(r"out/frontier/(\S+): true ([0-9.]+),", log):
        true[name] = float(reward)
    gains = [true[f"PPO__learnt_reward_0.15_{s}"] - true[f"DPO_2.0_{s}"] for s in range(3)]
    mean, half_width = summarize.t_interval(gains)
    with open("studies/frontier/README.md", encoding="utf-8") as f:
        assert f"above DPO by {mean:.3f} ± {half_width:.3f}" in " ".join(f.read().split())


def test_the_differences_of_selfplay_follow_from_its_logs():
    gains = {"above length": [], "score": [], "val_loss": []}
    for seed in (1, 2, 3):
        run = f"studies/selfplay/demo_seeds/{seed}"
        records = read_metrics(f"{run}/spin_k2")
        (collected,) = [r for r in records if r["kind"] == "collect" and r["round"] == 1]
        acc = [r["acc"] for r in records if r["kind"] == "eval"][-1]
        gains["above length"].append(100 * (acc - collected["length_acc/self"]))
        scores = [r["score/self"] for r in read_metrics(f"{run}/online_pl", "collect")]
        gains["score"].append(scores[1] - scores[0])
        with open(f"{run}/eval/eval.json", encoding="utf-8") as f:
            table = json.load(f)
        gains["val_loss"].append(table["online_pl.round_1"]["val_loss"] - table["sft"]["val_loss"])
    with open("studies/selfplay/README.md", encoding="utf-8") as f:
        text = " ".join(f.read().split())
    for name, digits in (("above length", 1), ("score", 3), ("val_loss", 3)):
        mean, half_width = summarize.t_interval(gains[name])
        assert f"{mean:.{digits}f} ± {half_width:.{digits}f}" in text, name


def test_rlhf_does_not_take_the_runs_of_other_files(tmp_path):
    """The data and the runs of one folder are not taken for those of another."""
    script = os.path.join(os.path.dirname(smollm2.__file__), "..", "rlhf", "run.sh")
    root = tmp_path / "copy"  # the script goes to the folder two above its own
    os.makedirs(root / "studies" / "rlhf")
    shutil.copy(script, root / "studies" / "rlhf")
    for name in ("first", "second"):
        os.makedirs(tmp_path / name)
        for kind in ("pretrain", "sft", "ranked"):
            (tmp_path / name / f"{kind}.jsonl.gz").write_text(name + kind)
    outputs = []
    for name in ("first", "first", "second"):
        command = ["bash", root / "studies" / "rlhf" / "run.sh", tmp_path / name]
        environment = {**os.environ, "PY": "echo"}  # prints the commands
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        outputs.append((done.returncode, sorted(done.stdout.splitlines()), done.stderr))
    assert outputs[0] == outputs[1]
    code, printed, _ = outputs[0]
    assert code == 0
    assert sum(line.startswith("train.py") for line in printed) == 3 * 13
    assert "-m studies.rlhf.table out/rlhf/1 out/rlhf/2 out/rlhf/3" in printed
    code, printed, error = outputs[2]
    assert (code, printed) == (1, [])
    assert error == f"{root}/out/rlhf was made from other files than these: move it away\n"


def test_after_a_failure_nothing_is_started(tmp_path, monkeypatch):
    started = []

    def fail_at_first(args, seed, name):
        started.append(name)
        if name == 0:
            raise SystemExit("failed")
        time.sleep(0.05)

    monkeypatch.setattr(run, "train_and_measure", fail_at_first)
    with pytest.raises(SystemExit, match="failed"):
        run.run_all([(None, "1", n) for n in range(100)], jobs=1)
    assert len(started) < 10  # those that had begun before it was noticed


def test_a_command_that_fails_says_its_last_line(tmp_path):
    command = [run.sys.executable, "train.py", "--no_such=1"]
    with pytest.raises(SystemExit, match="no_such"):
        run.run(command, f"{tmp_path}/a/log", False)


def test_the_seeds_of_smollm2_have_the_same_prompts():
    folder = os.path.dirname(smollm2.__file__)
    scored = [smollm2.read_scores(f"{folder}/logs/{seed}.scores.jsonl") for seed in (1, 2)]
    scored[1]["copied"]["f1"][7] += 0.5
    with pytest.raises(SystemExit, match="not measured on the same prompts"):
        smollm2.mean_over_seeds(scored)


def test_an_answer_that_is_missing_in_the_table_of_smollm2(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "TITLES", ["copied", "sft"])
    data = [{"prompt": f"`ls` for {n}", "responses": ["ls -l"]} for n in (1, 2)]
    os.makedirs(f"{tmp_path}/eval")
    write_json(f"{tmp_path}/eval/eval.json", {"sft": {"length": 3, "val_loss": 1}})
    write_rows(f"{tmp_path}/eval/data.jsonl", data)
    write_rows(f"{tmp_path}/eval/sft.jsonl", data)
    assert smollm2.score_all(str(tmp_path))["sft"]["exact_match"] == [1, 1]
    write_rows(f"{tmp_path}/eval/sft.jsonl", data[:1])
    with pytest.raises(SystemExit, match="sft has not answered '`ls` for 2'"):
        smollm2.score_all(str(tmp_path))
