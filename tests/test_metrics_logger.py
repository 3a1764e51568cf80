"""The console's lines: the time that is left, and the metrics of a round's samples."""

import pytest
from conftest import spin_args

import train
from nanospin.metrics_logger import RoundClock, format_record, format_step


def step_record(round_id, step, seconds):
    return {"kind": "step", "round": round_id, "step": step, "ms": 1000 * seconds}


def test_time_left_of_a_round_and_of_the_run():
    """Three rounds of four steps of 2 seconds. Before a round's first step it samples for 30
    seconds, before its first and its third step it evaluates for 5."""
    now, clock = 7.0, RoundClock(began=7.0)
    left = {}
    for round_id in range(3):
        now += 30
        clock.add({"kind": "collect", "round": round_id, "step": 0}, now)
        for step in range(4):
            if step in (0, 2):
                now += 5
                clock.add({"kind": "eval", "round": round_id, "step": step}, now)
            now += 2
            clock.add(step_record(round_id, step, 2.0), now)
            left[round_id, step] = clock.seconds_left(3 - step, 4, 2 - round_id)
    # before an evaluation between two steps has been seen, and without a whole round
    assert left[0, 0] == (3 * 2, 3 * 2 + 2 * (30 + 4 * 2))
    # one of 5 seconds in two intervals
    assert left[0, 2] == (2 + 2.5, 4.5 + 2 * (30 + 4 * 4.5))
    # a round takes 30 + 2 x 5 + 4 x 2 = 48 seconds
    assert left[1, 0] == (6, 6 + 48)
    assert left[2, 1] == (4, 4)
    assert left[2, 3] == (0, 0)


def test_a_skipped_step_counts_as_time_between_steps():
    clock = RoundClock(began=0.0)
    clock.add(step_record(0, 0, 1.0), 1.0)
    clock.add(step_record(0, 2, 1.0), 3.0)
    assert clock.seconds_left(4, 10, 0) == (4 * (1 + 1), 8)


@pytest.mark.parametrize(
    "of_run, shown", [(65.0, "eta 1:05"), (3700.0, "eta 1:05, run 1:01:40")], ids=["one", "more"]
)
def test_the_step_line(of_run, shown):
    record = step_record(0, 4, 0.25) | {"loss": 1.0, "lr": 1e-3, "norm": 2.0, "mfu": None}
    line = format_step(record | {"tokens_per_second": 1500}, 10, 65.0, of_run)
    assert line == (
        f"round 0 step 5/10 | loss 1.0000 | lr 1.0e-03 | norm 2.00 | 250 ms | 1.5k tok/s | {shown}"
    )


def test_rounds_show_the_time_of_the_run(tiny_runs, tiny_data, tmp_path, capsys):
    train.main(spin_args(tiny_runs, tiny_data, f"{tmp_path}/spin", "--rounds=2"))
    lines = [line for line in capsys.readouterr().out.splitlines() if "tok/s" in line]
    assert len(lines) == 10
    for line in lines:
        assert ("run 0:" in line) == line.startswith("round 0")


def test_relabelled_pairs_show_their_scores(tiny_runs, tiny_data, tmp_path, capsys):
    out = f"{tmp_path}/dpo"
    args = ["--stage=preference", f"--out_dir={out}", f"--data={tiny_data}", "--device=cpu"]
    args += [f"--init={tiny_runs['sft']}", "--ranked_by=conftest:letters", "--max_steps=1"]
    train.main([*args, "--batch_size=4", "--max_response=16"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "collect:" in line]
    assert "collect: score_best 0." in line and "score_worst" in line and "signal" in line


def test_no_metric_is_shown_twice():
    record = {"kind": "collect", "round": 1, "step": 0, "score_best": 0.5, "signal": 0.25}
    line = format_record(record, "preference")
    assert line == "round 1 step 0 | collect: score_best 0.5000, signal 0.2500"
