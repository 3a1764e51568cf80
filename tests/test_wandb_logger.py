"""What reaches W&B, read back from the files that it writes and from a stand-in for its server."""

import glob
import json
import os
import shutil
import struct
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import TINY
from test_train import Killed, killing, spin_args

import train
from data.rows import write_rows
from model import GPTConfig
from nanospin import config, wandb_logger

wandb = pytest.importorskip("wandb")

CLOCK = ("seconds", "ms", "tokens_per_second", "mfu")  # differ from start to start
TRL_NAMES = {
    "loss",
    "learning_rate",
    "grad_norm",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
}


@pytest.fixture(autouse=True)
def no_account(monkeypatch):
    """A user without a key, whose home is not writable, in a process where wandb was not used."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "XDG_", "NETRC")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/dev/null/home")
    monkeypatch.setattr(wandb_logger, "TIMEOUTS", {"init_timeout": 1, "finish_timeout": 10})
    wandb.teardown()
    before = set(os.listdir("."))
    yield
    wandb.teardown()
    assert set(os.listdir(".")) == before


def pretrain_args(data, out, *more):
    return [
        "--stage=pretrain",
        f"--data={data}",
        f"--out_dir={out}",
        "--batch_size=4",
        *more,
        *TINY,
    ]


# -------------------------------------------------------------------------- reading wandb's files


def read_leveldb_log(path):
    """The records of a .wandb file, which is in LevelDB's log format: blocks of 2^15 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    with open(path, "rb") as f:
        content = f.read()
    records = []
    record = b""
    pos = 7  # after wandb's own header
    while pos + 7 <= len(content):
        room = 2**15 - pos % 2**15
        if room < 7:  # no header fits: padding
            pos += room
            continue
        length, kind = struct.unpack("<HB", content[pos + 4 : pos + 7])
        record += content[pos + 7 : pos + 7 + length]
        pos += 7 + length
        if kind in (1, 4):  # a complete record, or the last piece of one
            records.append(Record.FromString(record))
            record = b""
    return records


def read_history(history):
    return {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in history.item}


def read_offline_runs(out):
    """[(the run's record, {step: its values})] of each start, oldest first."""
    found = []
    for path in sorted(glob.glob(f"{out}/wandb/offline-run-*/*.wandb"), key=os.path.getctime):
        records = read_leveldb_log(path)
        (run,) = [r.run for r in records if r.HasField("run")]
        history = [r.history for r in records if r.HasField("history")]
        values = {h.step.num: read_history(h) for h in history}
        assert len(values) == len(history) and list(values) == sorted(values)
        metrics = [r.metric for r in records if r.HasField("metric")]
        assert {(m.name or m.glob_name, m.step_metric) for m in metrics} == {
            ("train/global_step", ""),
            ("*", "train/global_step"),
        }
        found.append((run, values))
    return found


def read_id(out):
    with open(f"{out}/wandb.txt", encoding="utf-8") as f:
        return f.readline().partition("-")[0]


def read_records(out):
    with open(f"{out}/metrics.jsonl", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def without_clock(values):
    return {name: value for name, value in values.items() if not name.endswith(CLOCK)}


# ---------------------------------------------------------------------------------------- offline


def test_a_spin_run_that_is_killed_and_resumed_offline(tiny_runs, tiny_data, tmp_path, monkeypatch):
    out = str(tmp_path / "spin")
    args = spin_args(
        tiny_runs,
        tiny_data,
        out,
        "--rounds=2",
        "--max_steps=4",
        "--players=data,teacher,self",
        "--teacher=rows",
        "--wandb=offline",
    )
    with monkeypatch.context() as m:  # in the second round's last step, one past its checkpoint
        m.setattr(train, "lr_factor", killing(train.lr_factor, 7))
        with pytest.raises(Killed):
            train.main(args)
    train.main(args)
    (run_1, sent_1), (run_2, sent_2) = read_offline_runs(out)
    check_run_records(out, run_1, run_2)

    # nothing is missing, nothing was sent twice
    assert not set(sent_1) & set(sent_2)
    records, sent = read_records(out), sent_1 | sent_2
    assert list(sent) == list(range(len(records)))
    global_steps = [values["train/global_step"] for values in sent.values()]
    assert global_steps == sorted(global_steps)
    assert global_steps[-1] == 8 and set(global_steps) == set(range(9))
    for record, values in zip(records, sent.values()):
        check_values(record, values)
    check_tables(out, sent)

    train.main(args)  # a finished run sends nothing more
    assert len(read_offline_runs(out)) == 2


def check_run_records(out, *runs):
    name = out.strip("/").replace("/", "-")[-100:]
    for run in runs:
        assert run.run_id == read_id(out)
        assert (run.run_group, run.display_name) == (name, name)
        assert (run.job_type, run.project) == ("spin", "nanospin")
    settings = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert settings["players"] == ["data", "teacher", "self"]


def check_values(record, values):
    """The values that W&B has for one record."""
    assert values["round"] == record["round"]
    expected = wandb_logger.wandb_names(record, "spin")
    numbers = [v for v in record.values() if isinstance(v, (int, float))]
    assert len(expected) == len(numbers) - 2  # without round and step
    kept = {name: value for name, value in values.items() if name in expected}
    assert without_clock(expected) == without_clock(kept)
    if record["kind"] == "step":
        names = {n.removeprefix("train/") for n in values if n.startswith("train/")}
        assert names >= TRL_NAMES
        assert values["train/rewards/chosen"] == record["reward_chosen"]
        assert values["train/logps/rejected"] == record["logp_rejected"]
        assert values["train/grad_norm"] == record["norm"]
    if record["kind"] == "eval":
        assert values["eval/rewards/teacher"] == record["reward/teacher"]
        assert values["eval/loss"] == record["rank_nll"]


def check_tables(out, sent):
    """One table of samples per round."""
    tables = [values for values in sent.values() if "samples/path" in values]
    assert [values["round"] for values in tables] == [0, 1]
    for values in tables:
        (path,) = glob.glob(f"{out}/wandb/offline-run-*/files/{values['samples/path']}")
        with open(path) as f:
            table = json.load(f)
        assert table["columns"] == ["prompt", "data", "teacher", "self"]
        with open(f"{out}/round_{values['round']}/val.jsonl", encoding="utf-8") as f:
            rows = [json.loads(line) for line in f]
        assert len(rows) == 8
        for row, cells in zip(rows, table["data"], strict=True):
            assert cells[0] == row["prompt"]
            for cell, text, better in zip(cells[1:], row["responses"], row["same_as"], strict=True):
                players = ("data", "teacher", "self")
                assert cell == (text if better is None else f"(as {players[better]})")


def test_without_a_key_online_becomes_offline(tiny_runs, tiny_data, tmp_path, capsys):
    out = str(tmp_path / "rounds")
    train.main(
        spin_args(
            tiny_runs,
            tiny_data,
            out,
            "--rounds=2",
            "--max_steps=1",
            "--wandb=online",
            "--wandb_runs=rounds",
        )
    )
    captured = capsys.readouterr()
    lines = (captured.out + captured.err).splitlines()
    assert [line for line in lines if "wandb" in line] == [
        "wandb: no API key (WANDB_API_KEY, or wandb login); logging offline to "
        f"{out}/wandb: send it with wandb sync, or run the same command again"
    ]
    runs, run_id = read_offline_runs(out), read_id(out)
    assert [run.run_id for run, _ in runs] == [f"{run_id}-round-0", f"{run_id}-round-1"]
    assert len({run.run_group for run, _ in runs}) == 1
    for round_id, (_, sent) in enumerate(runs):
        assert {values["round"] for values in sent.values()} == {round_id}
        assert {values["train/global_step"] for values in sent.values()} == {0, 1}


def test_without_a_network_online_becomes_offline(tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    out = f"{tmp_path}/r"
    train.main(pretrain_args(tiny_data, out, "--max_steps=2", "--wandb=online"))
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("wandb:") and "logging offline" in line]
    ((_, sent),) = read_offline_runs(out)
    losses = [record["val_loss"] for record in read_records(out) if record["kind"] == "eval"]
    assert [v["eval/loss"] for v in sent.values() if "eval/loss" in v] == losses


# ----------------------------------------------------------------------------------------- online


class Server(BaseHTTPRequestHandler):
    """As much of W&B's server as a run needs: it keeps each run's history."""

    protocol_version = "HTTP/1.1"
    runs = {}  # run id -> {line number: values}

    def log_message(self, *args):
        pass

    def reply(self, value):
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.endswith("/file_stream"):
            self.store_history(json.loads(body))
            self.reply({})
            return
        request = json.loads(body) if body.startswith(b"{") else {"query": ""}
        name = (request.get("variables") or {}).get("name")
        query = request["query"]
        if "upsertBucket" in query:
            data = {"upsertBucket": {"inserted": name not in self.runs, "bucket": self.run(name)}}
        elif "historyLineCount" in query:
            bucket = self.run(name) if name in self.runs else None
            data = {"model": self.PROJECT | {"bucket": bucket}}
        elif "createRunFiles" in query:
            data = {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}
        elif "viewer" in query:
            data = {"viewer": {"id": "u", "username": "me", "entity": "me", "flags": "{}"}}
        else:
            data = {"project": None}
        self.reply({"data": data})

    do_PUT = do_POST

    PROJECT = {"id": "p", "name": "nanospin", "entity": {"id": "e", "name": "me"}}

    def store_history(self, body):
        history = (body.get("files") or {}).get("wandb-history.jsonl")
        if history:
            lines = self.runs.setdefault(self.path.split("/")[-2], {})
            for number, line in enumerate(history["content"], history["offset"]):
                lines[number] = json.loads(line)

    def run(self, name):
        lines = self.runs.get(name, {})
        tail = [json.dumps(lines[len(lines) - 1])] if lines else []
        return {
            "id": "b",
            "name": name,
            "displayName": name,
            "project": self.PROJECT,
            "projectId": "p",
            "summaryMetrics": "{}",
            "config": "{}",
            "wandbConfig": '{"t": 1}',
            "tags": [],
            "logLineCount": 0,
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "historyLineCount": len(lines),
            "historyTail": json.dumps(tail),
        }


@pytest.fixture
def server(monkeypatch):
    """A stand-in for W&B's server. Runs log to it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(wandb_logger, "TIMEOUTS", {"init_timeout": 30, "finish_timeout": 30})
    yield server
    server.shutdown()


def test_a_round_that_was_not_logged_is_sent_too(
    tiny_runs, tiny_data, tmp_path, server, monkeypatch
):
    """With a W&B run for each round: online is switched on after the first round."""
    monkeypatch.setattr(wandb_logger, "sample_table", lambda cfg, record: {})  # files, not history
    out = f"{tmp_path}/r"
    rounds = ["--rounds=2", "--max_steps=1", "--wandb_runs=rounds"]
    args = spin_args(tiny_runs, tiny_data, out, *rounds)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(train, "lr_factor", killing(train.lr_factor, 1))
        with pytest.raises(Killed):
            train.main(args)
    assert {record["round"] for record in read_records(out)} == {0, 1}
    train.main([*args, "--wandb=online"])
    records = read_records(out)
    for round_id in (0, 1):
        expected = [i for i, record in enumerate(records) if record["round"] == round_id]
        history = Server.runs[f"{read_id(out)}-round-{round_id}"]
        assert [history[i]["_step"] for i in range(len(history))] == expected


def test_online_continues_after_what_the_server_has(tiny_data, tmp_path, monkeypatch, server):
    """And a run that was offline before is sent completely."""
    out = f"{tmp_path}/r"
    args = pretrain_args(tiny_data, out, "--max_steps=8", "--save_interval=3", "--eval_interval=2")

    def run_until_killed(mode, steps):
        with monkeypatch.context() as m:
            m.setattr(train, "lr_factor", killing(train.lr_factor, steps))
            with pytest.raises(Killed):
                train.main([*args, f"--wandb={mode}"])

    run_until_killed("offline", 5)
    ((_, sent_offline),) = read_offline_runs(out)
    run_until_killed("online", 4)
    history = Server.runs[read_id(out)]
    steps = [history[i]["_step"] for i in range(len(history))]
    assert steps == list(range(len(read_records(out)))) and len(steps) > len(sent_offline)
    assert glob.glob(f"{out}/wandb/offline-run-*/*.synced")

    train.main([*args, "--wandb=online"])
    records = read_records(out)
    lines = [history[i] for i in range(len(history))]
    assert [line["_step"] for line in lines] == list(range(len(records)))
    losses = [record["loss"] for record in records if record["kind"] == "step"]
    assert [line["train/loss"] for line in lines if "train/loss" in line] == losses


def test_a_copied_run_is_told_that_it_has_the_id_of_another(tiny_data, tmp_path, server, capsys):
    out, copy = f"{tmp_path}/r", f"{tmp_path}/copy"
    train.main(pretrain_args(tiny_data, out, "--max_steps=1", "--wandb=online"))
    os.rename(out, f"{out}_moved")
    train.main(pretrain_args(tiny_data, f"{out}_moved", "--max_steps=1", "--wandb=online"))
    assert "was copied" not in capsys.readouterr().out
    shutil.copytree(f"{out}_moved", copy, symlinks=True)
    train.main(pretrain_args(tiny_data, copy, "--max_steps=1", "--wandb=online"))
    line = f"wandb: {copy}/wandb.txt was copied: both folders have the W&B run {read_id(copy)}"
    assert line in capsys.readouterr().out
    os.remove(f"{copy}/wandb.txt")
    train.main(pretrain_args(tiny_data, copy, "--max_steps=1", "--wandb=online"))
    assert read_id(copy) != read_id(f"{out}_moved")
    assert len(Server.runs[read_id(copy)]) == len(read_records(copy))


def test_a_round_whose_folder_was_removed_is_sent_without_its_table(tiny_runs, tiny_data, tmp_path):
    out = f"{tmp_path}/r"
    train.main(spin_args(tiny_runs, tiny_data, out, "--rounds=2", "--max_steps=1"))
    shutil.rmtree(f"{out}/round_0")
    more = ["--rounds=2", "--max_steps=1", "--wandb=offline"]
    train.main(spin_args(tiny_runs, tiny_data, out, *more))
    ((_, values),) = read_offline_runs(out)
    assert list(values) == list(range(len(read_records(out))))
    assert sum("samples/path" in sent for sent in values.values()) == 1


# ----------------------------------------------------------------------------------------- errors


def test_an_error_of_the_package_does_not_end_the_run(tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wandb, "init", lambda **options: 1 / 0)
    out = f"{tmp_path}/r"
    train.main(pretrain_args(tiny_data, out, "--max_steps=2", "--wandb=offline"))
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("wandb:")] == [
        "wandb: division by zero; training continues without it, "
        "and running the same command again sends what is missing"
    ]
    assert len(read_records(out)) == 4


def test_wandb_is_not_needed_if_it_is_off(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    out = f"{tmp_path}/r"
    train.main(pretrain_args(tiny_data, out, "--max_steps=1"))
    assert not os.path.exists(f"{out}/wandb.txt")


def test_no_module_imports_wandb_at_the_top():
    for path in glob.glob("*.py") + glob.glob("nanospin/*.py") + glob.glob("tools/**/*.py"):
        with open(path, encoding="utf-8") as f:
            for line in f:
                assert not line.startswith(("import wandb", "from wandb")), path


def test_a_damaged_id_is_refused(tmp_path):
    argv = ["--max_steps=1", f"--out_dir={tmp_path}", "--wandb=offline"]
    cfg = config.load(argv, GPTConfig)
    for text in ("", "ab12\n0\nx\n", "a/b\n"):
        (tmp_path / "wandb.txt").write_text(text)
        with pytest.raises(SystemExit, match="wandb.txt is damaged"):
            with wandb_logger.wandb_sender(cfg):
                pass


def test_a_last_index_that_was_cut_short_is_removed(tmp_path):
    cfg = config.load(["--max_steps=1", f"--out_dir={tmp_path}", "--wandb=offline"], GPTConfig)
    path = tmp_path / "wandb.txt"
    path.write_text("ab12\n0\n1")  # of 12, say: the next index would be joined to it
    sender = wandb_logger.WandbSender(cfg)
    with sender:
        assert sender.last_sent == 0
    assert path.read_text() == "ab12\n0\n"


def test_a_start_that_is_killed_before_the_id_is_written_leaves_no_file(tmp_path, monkeypatch):
    def killed(size):
        raise KeyboardInterrupt

    cfg = config.load(["--max_steps=1", f"--out_dir={tmp_path}", "--wandb=offline"], GPTConfig)
    with monkeypatch.context() as patch:
        patch.setattr(wandb_logger.secrets, "token_hex", killed)
        with pytest.raises(KeyboardInterrupt), wandb_logger.wandb_sender(cfg):
            pass
    assert os.listdir(tmp_path) == []
    with wandb_logger.wandb_sender(cfg):
        assert read_id(tmp_path)


def test_a_key_is_found(tmp_path, monkeypatch):
    settings = types.SimpleNamespace(
        api_key=None, identity_token_file=None, base_url="https://api.wandb.ai"
    )
    assert not wandb_logger.has_key(settings)
    path = tmp_path / "netrc"
    path.write_text("machine example.org\n login user\n password x\n")
    monkeypatch.setenv("NETRC", str(path))
    assert not wandb_logger.has_key(settings)
    path.write_text("machine api.wandb.ai\n login user\n password x\n")
    assert wandb_logger.has_key(settings)


def test_the_table_of_a_scored_round(tmp_path):
    """A column for each sample of a player, the best first, and the scores in that order."""
    cfg = config.Config(
        stage="spin",
        out_dir=str(tmp_path),
        players=["teacher", "self:2", "data"],
        ranked_by="module:function",
    )
    os.makedirs(f"{tmp_path}/round_1")
    rows = [
        {
            "prompt": "p",
            "responses": ["b", "a", None, None],
            "ranks": [0, 1, 2, 4],
            "scores": [3.0, 2.5, 0.123456, None],
            "players": ["self", "data", "self", "teacher"],
            "same_as": [None, None, 1, None],
        }
    ]
    write_rows(f"{tmp_path}/round_1/val.jsonl", rows)
    record = {"kind": "collect", "round": 1, "step": 0}
    table = wandb_logger.sample_table(cfg, record)["samples"]
    assert table.columns == ["prompt", "data", "self 1", "self 2", "teacher", "scores"]
    assert table.data == [["p", "a", "b", "(as data)", None, "2.5, 3, 0.1235, -"]]


def test_the_table_of_several_samples_in_order(tmp_path):
    cfg = config.Config(stage="spin", out_dir=str(tmp_path), players=["data", "self:2"])
    os.makedirs(f"{tmp_path}/round_0")
    row = {"prompt": "p", "responses": ["a", "b", None], "ranks": [0, 1, 1]}
    write_rows(f"{tmp_path}/round_0/val.jsonl", [row | {"same_as": [None, None, 1]}])
    record = {"kind": "collect", "round": 0, "step": 0}
    table = wandb_logger.sample_table(cfg, record)["samples"]
    assert table.columns == ["prompt", "data", "self 1", "self 2"]
    assert table.data == [["p", "a", "b", "(as self 1)"]]


def test_the_table_of_ppo(tmp_path):
    os.makedirs(tmp_path / "round_3")
    rows = [{"prompt": f"{i}", "responses": [f"said {i}"], "ids": [[1]]} for i in range(20)]
    write_rows(f"{tmp_path}/round_3/val_step_000007.jsonl", rows)
    argv = ["--stage=ppo", f"--out_dir={tmp_path}", "--init=x", "--reward=a:b", "--rounds=4"]
    cfg = config.load(argv, GPTConfig)
    assert wandb_logger.sample_table(cfg, {"kind": "step", "round": 3, "step": 7}) == {}
    table = wandb_logger.sample_table(cfg, {"kind": "eval", "round": 3, "step": 7})["samples"]
    assert table.columns == ["prompt", "response"]
    assert table.data == [[f"{i}", f"said {i}"] for i in range(16)]
