"""What reaches Weights & Biases: read back from the files that it writes, and from a stand-in for its server."""

import ast
import glob
import json
import os
import struct
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nanospin import wandb_logger
from nanospin import config
import train
from conftest import TINY
from data.rows import write_rows
from test_house import files
from test_train import Killed, killing, spin_args

wandb = pytest.importorskip("wandb")
CLOCK = ("seconds", "ms", "tokens_per_second", "mfu")
THEIRS = {
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
def nobody(monkeypatch):
    """A user without a key, whose home cannot be written to, in a process that wandb has not seen yet."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "XDG_", "NETRC"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/dev/null/home")
    monkeypatch.setattr(board, "PATIENCE", {"init_timeout": 1, "finish_timeout": 10})
    wandb.teardown()
    before = set(os.listdir("."))
    yield
    wandb.teardown()
    assert set(os.listdir(".")) == before


def parts(out):
    """[(a run's record, {step: its values})] of each start's .wandb file: LevelDB's log format, blocks of 2^15 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(glob.glob(f"{out}/wandb/offline-run-*/*.wandb"), key=os.path.getctime):
        with open(path, "rb") as f:
            text = f.read()
        at, whole, records = 7, b"", []
        while at + 7 <= len(text):
            if 2**15 - at % 2**15 < 7:  # no header fits: padding
                at += 2**15 - at % 2**15
                continue
            length, kind = struct.unpack("<HB", text[at + 4 : at + 7])
            whole, at = whole + text[at + 7 : at + 7 + length], at + 7 + length
            if kind in (1, 4):  # a whole record, or its last piece
                records.append(Record.FromString(whole))
                whole = b""
        (run,) = [r.run for r in records if r.HasField("run")]
        steps = [r.history for r in records if r.HasField("history")]
        found.append(
            (
                run,
                {
                    h.step.num: {
                        i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in h.item
                    }
                    for h in steps
                },
            )
        )
        assert len(found[-1][1]) == len(steps) and list(found[-1][1]) == sorted(found[-1][1])
        assert {
            (r.metric.name or r.metric.glob_name, r.metric.step_metric)
            for r in records
            if r.HasField("metric")
        } == {("train/global_step", ""), ("*", "train/global_step")}
    return found


def id_of(out):
    with open(f"{out}/wandb.txt", encoding="utf-8") as f:
        return f.readline().strip()


def records_of(out):
    with open(f"{out}/metrics.jsonl", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def test_a_game_killed_and_resumed_offline(tiny_runs, tiny_data, tmp_path, monkeypatch):
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
    (one, first), (two, second) = parts(out)
    name = out.strip("/").replace("/", "-")[-100:]
    assert one.run_id == two.run_id == id_of(out)
    assert {(run.run_group, run.display_name, run.job_type, run.project) for run in (one, two)} == {
        (name, name, "spin", "nanospin")
    }
    assert {item.key: json.loads(item.value_json) for item in one.config.update}["players"] == [
        "data",
        "teacher",
        "self",
    ]
    records, sent = records_of(out), first | second
    assert not set(first) & set(second) and list(sent) == list(
        range(len(records))
    )  # nothing twice, nothing missing
    x = [values["train/global_step"] for values in sent.values()]
    assert x == sorted(x) and x[-1] == 8 and set(x) == set(range(9))
    for record, values in zip(records, sent.values()):
        prefix = {"step": "train"}.get(record["kind"], record["kind"])
        names = (
            [name.removeprefix("train/") for name in values if name.startswith("train/")]
            if prefix == "train"
            else []
        )
        assert values["round"] == record["round"] and not names or THEIRS <= set(names)
        told = wandb_logger.wandb_names(record, "spin")
        assert len(told) == sum(
            isinstance(v, (int, float))
            for k, v in record.items()
            if k not in ("kind", "round", "step")
        )
        assert {k: v for k, v in told.items() if not k.endswith(CLOCK)} == {
            k: v for k, v in values.items() if k in told and not k.endswith(CLOCK)
        }
        if record["kind"] == "step":
            assert (
                values["train/rewards/chosen"],
                values["train/logps/rejected"],
                values["train/grad_norm"],
            ) == (record["reward_chosen"], record["logp_rejected"], record["norm"])
        if record["kind"] == "eval":
            assert (values["eval/rewards/teacher"], values["eval/loss"]) == (
                record["reward/teacher"],
                record["rank_nll"],
            )
    train.main(args)  # a finished run has nothing more to say
    assert len(parts(out)) == 2
    tables = [values for values in sent.values() if "samples/path" in values]
    assert [values["round"] for values in tables] == [0, 1]
    for values in tables:
        (path,) = glob.glob(f"{out}/wandb/offline-run-*/files/{values['samples/path']}")
        table = json.load(open(path))
        with open(f"{out}/round_{values['round']}/val.jsonl", encoding="utf-8") as f:
            rows = [json.loads(line) for line in f]
        assert table["columns"] == ["prompt", "data", "teacher", "self"] and len(rows) == 8
        assert table["data"] == [
            [
                row["prompt"],
                *(
                    t if t is not None else f"(as {table['columns'][1 + s]})"
                    for t, s in zip(row["responses"], row["same_as"])
                ),
            ]
            for row in rows
        ]


def test_without_a_key_online_is_a_line_and_offline(tiny_runs, tiny_data, tmp_path, capsys):
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
    said = capsys.readouterr()
    assert [line for line in (said.out + said.err).splitlines() if "wandb" in line] == [
        f"wandb: no API key (WANDB_API_KEY, or wandb login); offline in {out}/wandb: send it with wandb sync, or with this command"
    ]
    runs, id = parts(out), id_of(out)
    assert [run.run_id for run, _ in runs] == [f"{id}-round-0", f"{id}-round-1"] and len(
        {run.run_group for run, _ in runs}
    ) == 1
    for round_id, (_, values) in enumerate(runs):
        assert {v["round"] for v in values.values()} == {round_id} and {
            v["train/global_step"] for v in values.values()
        } == {0, 1}


def test_without_a_network_online_is_a_line_and_offline(tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    train.main(
        [
            "--stage=pretrain",
            f"--data={tiny_data}",
            f"--out_dir={tmp_path}/r",
            "--max_steps=2",
            "--batch_size=4",
            "--wandb=online",
            *TINY,
        ]
    )
    assert [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("wandb:") and "offline in" in line
    ]
    ((_, values),) = parts(f"{tmp_path}/r")
    assert [v["eval/loss"] for v in values.values() if "eval/loss" in v] == [
        r["val_loss"] for r in records_of(f"{tmp_path}/r") if r["kind"] == "eval"
    ]


class Server(BaseHTTPRequestHandler):
    """As much of W&B's server as a run needs: it keeps the history by run."""

    protocol_version, runs = "HTTP/1.1", {}

    def log_message(self, *args):
        pass

    def reply(self, value):
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_POST(self):
        text = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.endswith("/file_stream"):
            history = (json.loads(text).get("files") or {}).get(
                "wandb-history.jsonl", {"offset": 0, "content": []}
            )
            self.runs.setdefault(self.path.split("/")[-2], {}).update(
                (history["offset"] + i, json.loads(line))
                for i, line in enumerate(history["content"])
            )
            return self.reply({})
        asked = json.loads(text) if text.startswith(b"{") else {"query": ""}
        project, name = (
            {"id": "p", "name": "nanospin", "entity": {"id": "e", "name": "me"}},
            (asked.get("variables") or {}).get("name"),
        )
        lines = self.runs.get(name, {})
        if "historyLineCount" in asked["query"] and "upsertBucket" not in asked["query"]:
            tail = json.dumps([json.dumps(lines[len(lines) - 1])]) if lines else "[]"
            return self.reply(
                {
                    "data": {
                        "model": project
                        | {
                            "bucket": lines
                            and {
                                "id": "b",
                                "name": name,
                                "projectId": "p",
                                "summaryMetrics": "{}",
                                "displayName": name,
                                "logLineCount": 0,
                                "tags": [],
                                "historyLineCount": len(lines),
                                "eventsLineCount": 0,
                                "historyTail": tail,
                                "eventsTail": "[]",
                                "config": "{}",
                                "wandbConfig": '{"t": 1}',
                            }
                            or None
                        }
                    }
                }
            )
        if "upsertBucket" in asked["query"]:
            return self.reply(
                {
                    "data": {
                        "upsertBucket": {
                            "inserted": not lines,
                            "bucket": {
                                "id": "b",
                                "name": name,
                                "displayName": name,
                                "project": project,
                                "historyLineCount": len(lines),
                            },
                        }
                    }
                }
            )
        self.reply(
            {
                "data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}
                if "createRunFiles" in asked["query"]
                else {"project": None}
            }
        )

    do_PUT = do_POST


def test_online_goes_on_where_the_server_is(tiny_data, tmp_path, monkeypatch):
    """And a run that was offline before is sent whole."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(board, "PATIENCE", {"init_timeout": 30, "finish_timeout": 30})
    out = f"{tmp_path}/r"
    args = [
        "--stage=pretrain",
        f"--data={tiny_data}",
        f"--out_dir={out}",
        "--max_steps=8",
        "--save_interval=3",
        "--eval_interval=2",
        "--batch_size=4",
        *TINY,
    ]
    real, offline = train.lr_factor, 0
    with monkeypatch.context() as m:
        for mode, steps in (("offline", 5), ("online", 4)):
            m.setattr(train, "lr_factor", killing(real, steps))
            with pytest.raises(Killed):
                train.main([*args, f"--wandb={mode}"])
            offline = offline or len(parts(out)[0][1])
    history = Server.runs[id_of(out)]
    before = [history[i]["_step"] for i in range(len(history))]
    assert (
        before == list(range(len(records_of(out))))
        and len(before) > offline
        and glob.glob(f"{out}/wandb/offline-run-*/*.synced")
    )
    train.main([*args, "--wandb=online"])
    assert [history[i]["_step"] for i in range(len(history))] == list(range(len(records_of(out))))
    assert [
        history[i]["train/loss"] for i in range(len(history)) if "train/loss" in history[i]
    ] == [r["loss"] for r in records_of(out) if r["kind"] == "step"]
    server.shutdown()


def test_a_package_that_fails_costs_a_line(tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wandb, "init", lambda **kw: 1 / 0)
    train.main(
        [
            "--stage=pretrain",
            f"--data={tiny_data}",
            f"--out_dir={tmp_path}/r",
            "--max_steps=2",
            "--batch_size=4",
            "--wandb=offline",
            *TINY,
        ]
    )
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("wandb:")]
    assert (
        said
        == [
            "wandb: division by zero; the run goes on without it, and this command sends what is missing"
        ]
        and len(records_of(f"{tmp_path}/r")) == 4
    )


def test_wandb_is_imported_where_it_is_asked_for(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it fails
    train.main(
        [
            "--stage=pretrain",
            f"--data={tiny_data}",
            f"--out_dir={tmp_path}/r",
            "--max_steps=1",
            "--batch_size=4",
            *TINY,
        ]
    )
    assert not os.path.exists(f"{tmp_path}/r/wandb.txt")
    for path, text in files().items():  # nor when ours are
        assert not [
            node
            for node in ast.parse(text).body
            if isinstance(node, (ast.Import, ast.ImportFrom)) and "wandb" in ast.unparse(node)
        ], path


def test_a_damaged_id_is_a_line(tmp_path):
    cfg = config.load(["--max_steps=1", f"--out_dir={tmp_path}", "--wandb=offline"])
    for text in ("", "ab12\n0\nx\n", "a/b\n"):
        (tmp_path / "wandb.txt").write_text(text)
        with (
            pytest.raises(SystemExit, match="wandb.txt is damaged"),
            wandb_logger.wandb_sender(cfg, (0, -1)),
        ):
            pass


def test_a_key_is_found(tmp_path, monkeypatch):
    settings = types.SimpleNamespace(
        api_key=None, identity_token_file=None, base_url="https://api.wandb.ai"
    )
    assert not wandb_logger.has_key(settings)
    (tmp_path / "netrc").write_text("machine example.org\n login user\n password x\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not wandb_logger.has_key(settings)
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n login user\n password x\n")
    assert wandb_logger.has_key(settings)


def test_the_table_of_ppo(tmp_path):
    os.makedirs(tmp_path / "round_3")
    write_rows(
        f"{tmp_path}/round_3/val_step_000007.jsonl",
        [{"prompt": f"{i}", "responses": [f"said {i}"], "ids": [[1]]} for i in range(20)],
    )
    cfg = config.load(
        ["--stage=ppo", f"--out_dir={tmp_path}", "--init=x", "--reward=a:b", "--rounds=4"]
    )
    assert wandb_logger.sample_table(cfg, {"kind": "step", "round": 3, "step": 7}) == {}
    table = wandb_logger.sample_table(cfg, {"kind": "eval", "round": 3, "step": 7})["samples"]
    assert table.columns == ["prompt", "response"] and table.data == [
        [f"{i}", f"said {i}"] for i in range(16)
    ]
