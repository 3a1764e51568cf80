"""Reads a run folder as far as it can be read.

A run may have been cut short, kept in part, or damaged: what cannot be read becomes a note.
"""

import functools
import json
import os
import re
from dataclasses import dataclass, field

from data.batch import Batch, batch_rows, permutation, reward_batch, stream_batch, target_positions
from data.files import printable, read_json, sha256
from data.folder import read_meta, read_stream
from data.rows import best_only, drop_equal_responses, encode_rows, prompt_key, read_rows
from data.tokenizer import is_end
from nanospin import checkpoint
from nanospin.config import Config, is_scored, player_columns
from nanospin.rounds import response_titles
from players import num_tokens
from rollout import keep_best_and_worst
from tools.plot import global_steps
from tools.report.charts import number

DEFAULTS = json.loads(json.dumps(vars(Config())))  # as config.json has them


@dataclass(eq=False)  # hashed by identity
class Run:
    folder: str
    config: dict = field(default_factory=dict)
    starts: list = field(default_factory=list)  # versions and device of each start
    records: list = field(default_factory=list)  # "x": step since the start of the run
    rounds: list = field(default_factory=list)  # those with a folder
    checkpoint: str | None = None  # the latest; its meta.json and tokenizer
    meta: dict | None = None
    enc: object = None
    notes: list = field(default_factory=list)

    @property
    def name(self):
        return os.path.basename(os.path.abspath(self.folder))

    @property
    def stage(self):
        return str(self.config.get("stage", "unknown stage"))

    @property
    def players(self):
        """The player of each response of a row, unless the row says it itself."""
        return player_columns(self.ranking()) if self.stage == "spin" else []

    @property
    def is_scored(self):
        """Whether a scorer ranks the responses."""
        return self.stage in ("spin", "preference") and is_scored(self.ranking())

    def ranking(self):
        """The settings of players and of who ranks them."""
        return Config(players=self.setting("players"), ranked_by=self.setting("ranked_by"))

    @property
    def span(self):
        """The first and the last step."""
        steps = [r["x"] for r in self.records] or [0]
        return min(steps), max(steps)

    def setting(self, name):
        """A setting, or its default if the run has none of that type."""
        value = self.config.get(name)
        return value if type(value) is type(DEFAULTS[name]) else DEFAULTS[name]

    def of_kind(self, kind):
        return [r for r in self.records if r["kind"] == kind]

    def by_round(self):
        """{round: its records}."""
        rounds = {}
        for r in self.records:
            rounds.setdefault(r["round"], []).append(r)
        return dict(sorted(rounds.items()))

    def num_parameters(self):
        path = os.path.join(self.checkpoint or "", "model.safetensors")
        return os.path.getsize(path) // 4 if os.path.exists(path) else None  # float32

    def round_path(self, round_id, name=""):
        return os.path.join(self.folder, f"round_{round_id}", name)

    def attempt(self, function, *args):
        """function(*args). If it exits with a message, that becomes a note."""
        try:
            return function(*args)
        except SystemExit as e:
            self.note(str(e))

    def note(self, text):
        if text not in self.notes:
            self.notes.append(text)


def last_record(records: list[dict], kind: str) -> dict | None:
    return next((r for r in reversed(records) if r["kind"] == kind), None)


def totals(records: list[dict]) -> dict:
    """Steps, time, first and last loss of some records."""
    steps = [r for r in records if r["kind"] == "step"]
    minutes = sum(number(r, "seconds") or 0 for r in records) / 60
    found = {"steps": len(steps), "minutes": minutes}
    if steps:
        found |= {"first_loss": steps[0].get("loss"), "last_loss": steps[-1].get("loss")}
    return found


def read_run(folder: str) -> Run:
    """A Run. Exits with one line if the folder is not that of a run."""
    run = Run(folder)
    names = os.listdir(folder) if os.path.isdir(folder) else []
    run.rounds = sorted(int(n[6:]) for n in names if re.fullmatch(r"round_\d{1,9}", n))
    about = run.attempt(read_json, os.path.join(folder, "config.json"), ("config", "starts")) or {}
    if not about and not run.rounds and "metrics.jsonl" not in names:
        raise SystemExit(printable(f"{folder}: not a run's out_dir: it has no config.json"))
    run.checkpoint = checkpoint.latest(folder)
    if run.checkpoint:
        run.meta = run.attempt(checkpoint.read_meta, run.checkpoint)
        if run.meta:
            run.enc = run.attempt(checkpoint.read_tokenizer, run.checkpoint, run.meta)
    else:
        run.note("There is no checkpoint yet, and so no tokenizer: the loss mask cannot be shown.")
    if isinstance(about.get("config"), dict):
        run.config = about["config"]
    elif run.meta:
        run.config = run.meta["config"]
    if isinstance(about.get("starts"), list):
        run.starts = [start for start in about["starts"] if isinstance(start, dict)]
    read_records(run, os.path.join(folder, "metrics.jsonl"))
    if run.config and not is_finished(run):
        last = "nothing is logged"
        for r in run.records:
            last = f"its last record is of round {r['round']}, step {r['step']}"
        steps = run.setting("max_steps") or "some"
        run.note(
            f"The run is not finished (it may still be running): {last}; it should have "
            f"{run.setting('rounds')} rounds of {steps} steps. The same command resumes it."
        )
    return run


def read_records(run: Run, path: str):
    """Read the complete lines of metrics.jsonl."""
    broken = 0
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            for line in f:
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    record = None
                if is_record(record):
                    run.records.append(record)
                else:
                    broken += 1
    except OSError as e:
        run.note(f"metrics.jsonl: {e.strerror}; there are no curves and no metrics.")
    if broken:
        total = broken + len(run.records)
        run.note(f"metrics.jsonl: {broken} of {total} lines cannot be read; a kill may cut one.")
    for r, x in zip(run.records, global_steps(run.records)):
        r["x"] = x


def is_record(record) -> bool:
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return False
    counts = (record.get("round"), record.get("step"))
    return all(type(n) is int and 0 <= n < 2**40 for n in counts)


def is_finished(run: Run) -> bool:
    """Whether the last record is the evaluation at the last step of the last round, and the last
    checkpoint is of that step. Older checkpoints do not say how many steps a round has."""
    if run.meta and checkpoint.is_end_of_run(run.meta, run.setting("rounds")) is False:
        return False
    records = [r for r in run.records if r["kind"] in ("step", "eval")]
    if not records:
        return False
    last, max_steps = records[-1], run.setting("max_steps")
    at_end = last["step"] == max_steps if max_steps else last["step"] > 0
    return at_end and last["kind"] == "eval" and last["round"] == run.setting("rounds") - 1


# ------------------------------------------------------------------------------------------- rows


def read_unchanged_rows(run: Run, path: str, hashes: dict | None) -> list[dict]:
    """The rows of a file if its sha256 is still the one in `hashes`; else [] and a note."""
    if not os.path.exists(path):
        run.note(f"{path} does not exist: not sampled yet, or not kept.")
        return []
    expected = hashes.get(os.path.basename(path)) if isinstance(hashes, dict) else None
    if expected and expected != sha256(path):
        run.note(f"{path} has changed since the run used it (another sha256). It is not shown.")
        return []
    return run.attempt(read_rows, path) or []


def round_rows(run: Run, round_id: int, name: str) -> list[dict]:
    """The rows of a file in a round's folder."""
    origin, hashes = run.round_path(round_id, "collect.json"), None
    if os.path.exists(origin):
        hashes = (run.attempt(read_json, origin) or {}).get("files")
    return read_unchanged_rows(run, run.round_path(round_id, name), hashes)


@functools.cache
def training_rows(run: Run) -> list[dict]:
    """The rows that the latest round trains on, in the order of the run."""
    if run.stage in ("spin", "ppo") or run.is_scored:
        return round_rows(run, run.rounds[-1], "train.jsonl") if run.rounds else []
    path = os.path.join(run.setting("data"), "train.jsonl")
    rows = read_unchanged_rows(run, path, run.config.get("data_sha256"))
    order = permutation(len(rows), run.setting("seed"), 0)
    return [rows[i] for i in order[: run.setting("max_rows") or None]]


def sample_columns(run: Run) -> list[tuple]:
    """[(title, {prompt: row}, player's title)] of samples for validation prompts: of the policy
    after at most four rounds (spin) or evaluations (ppo), of the other players once. The player's
    title is None if there are no players."""
    files = []
    for round_id in run.rounds:
        for name in sorted(os.listdir(run.round_path(round_id))):
            if re.fullmatch(r"val(_step_\d{1,9})?\.jsonl", name):
                files.append((round_id, name))
    if len(files) > 4:
        files = [files[round(i * (len(files) - 1) / 3)] for i in range(4)]
    columns = []
    for round_id, name in files:
        rows = {prompt_key(row): row for row in round_rows(run, round_id, name)}
        if name != "val.jsonl":
            columns.append((f"round {round_id}, step {int(name[9:-6])}", rows, None))
        for player, title in zip(run.players, response_titles(run.players)):
            if player == "self":
                columns.append((f"{title}, round {round_id}", rows, title))
            elif round_id == files[0][0] and not player.startswith("self"):
                columns.append((player, rows, title))
    return columns


def validation_cards(run: Run, n: int) -> list[tuple]:
    """[(row, [(color, title, row, which response)])] of n validation prompts."""
    columns, cards = sample_columns(run), []
    prompts = next((rows for _, rows, _ in columns if rows), {})
    for prompt in list(prompts)[:n]:
        answers = []
        for color, (title, rows, player) in enumerate(columns):
            if prompt not in rows:
                continue
            row = rows[prompt]
            names = response_names(run, row)
            if player is None:
                answers.append((color, title, row, 0))
            elif player in names:
                answers.append((color, title, row, names.index(player)))
        cards.append((prompts[prompt], answers))
    return cards


def training_cards(run: Run, n: int) -> list[tuple]:
    """The same of the first n training rows; ppo: of the highest and the lowest rewards."""
    rows, cards = training_rows(run), []
    if run.stage == "ppo" and len(rows) > n:
        rows = sorted(rows, key=lambda row: -row["scores"][0])
        rows = rows[: n - n // 2] + rows[len(rows) - n // 2 :]
    for row in rows[:n]:
        names = response_names(run, row)
        cards.append((row, [(k, name, row, k) for k, name in enumerate(names)]))
    return cards


def is_tied(row: dict, k: int) -> bool:
    """Whether response k has the rank of the one before it; without ranks, its score."""
    ranks = row.get("ranks") or row["scores"]
    return k > 0 and ranks[k] == ranks[k - 1]


def is_cut(run: Run, row: dict, k: int) -> bool:
    """Whether response k was trained without its end: it did not end, or a limit cut it."""
    ids = row["ids"][k]
    return num_tokens(row, k) < len(ids) or bool(run.enc and not is_end(run.enc, ids[-1]))


def kl_of(row: dict, k: int) -> float:
    """KL to the reference of sample k of a row of stage ppo; a single sample's is no list."""
    return row["kl"][k] if type(row["kl"]) is list else row["kl"]


def response_names(run: Run, row: dict) -> list[str]:
    """A name for each response of a row: its player, or its place."""
    K = len(row["responses"])
    if K == 1:
        return ["response"]
    players = row.get("players") or run.players
    if players:
        return response_titles(players)[:K]
    return ["response 1 (best)", *(f"response {k}" for k in range(2, K + 1))]


# -------------------------------------------------------------------------------------- loss mask


def training_batch(run: Run) -> tuple | None:
    """(encoded row, a Batch of it) as the run trains on it; (None, first window) of a stream;
    None, with a note, if there is none."""
    cfg, block_size = run.meta["config"], run.meta["model"]["block_size"]
    if run.stage == "pretrain":
        return stream_window(run, block_size)
    rows = training_rows(run)
    for row in rows:
        if run.stage == "sft":
            row = best_only(row)
        limits = (block_size, cfg["max_prompt"], cfg["max_response"])
        (encoded,), _ = encode_rows([row], run.enc, cfg["template"], *limits)
        if not encoded:
            continue
        if "players" in row:
            encoded["players"] = row["players"]
        if run.stage not in ("sft", "ppo"):
            drop_equal_responses(encoded)
        if run.setting("best_and_worst"):
            keep_best_and_worst(encoded)
        ranks = {r for r, ids in zip(encoded["ranks"], encoded["responses"]) if ids is not None}
        if run.stage in ("sft", "ppo") or len(ranks) > 1:
            make_batch = reward_batch if run.stage == "reward" else batch_rows
            return encoded, make_batch([encoded], run.setting("layout"))
    run.note("There is no row to show the loss mask of.")


def stream_window(run: Run, block_size: int) -> tuple | None:
    """(None, a Batch of the first window that a pretraining run reads)."""
    folder, seed = run.setting("data"), run.setting("seed")
    meta = run.attempt(read_meta, folder, ["train.bin"])
    expected = run.config["data_sha256"]["train.bin"]
    if not meta or meta["files"]["train.bin"]["sha256"] != expected:
        run.note(f"{folder} no longer has the token stream of the run. It is not shown.")
        return None
    size, vocab_size = run.setting("batch_size"), run.meta["model"]["vocab_size"]
    document_end = run.enc.eot_token if run.setting("document_mask") else None
    stream, first = read_stream(folder, "train"), slice(0, 1)
    return None, stream_batch(stream, block_size, size, seed, 0, vocab_size, first, document_end)


def supervised_tokens(batch: Batch) -> list[tuple]:
    """[(slot, [(token id, supervised)])] of a batch of one row, from its tensors alone.

    Slot -1 is what stands before the first target: the prompt. For a reward model a token is
    supervised where the scalar head is read, and the first response includes the prompt.
    """
    idx, length = batch.idx.flatten().tolist(), batch.idx.shape[-1]
    if batch.targets is None:
        parts, start = [], 0
        for slot, end in zip(batch.value_response_index.tolist(), batch.value_positions.tolist()):
            if batch.idx.ndim == 2:
                start = end // length * length
            parts.append((slot, [(idx[n], n == end) for n in range(start, end + 1)]))
            start = end + 1
        return parts
    is_target = batch.targets >= 0
    targets = batch.targets[is_target].tolist()
    slots = [0] * len(targets)
    if batch.response_index is not None:
        slots = batch.response_index[is_target].tolist()
    first = int(target_positions(batch)[0])
    parts = {-1: [(token, False) for token in idx[: first + 1]]}
    for slot, token in zip(slots, targets):
        parts.setdefault(slot, []).append((token, True))
    return list(parts.items())


def mask_parts(run: Run) -> list[tuple]:
    """[(name, slot, [(token id, supervised)])] of one training row or window, or []."""
    found = run.attempt(training_batch, run) if run.enc else None
    if not found:
        return []
    row, batch = found
    names = response_names(run, row) if row else ["predicted"]
    parts = []
    for slot, tokens in supervised_tokens(batch):
        name = names[slot] if slot >= 0 else "prompt" if row else "context"
        if batch.targets is None and len(tokens) > len(row["responses"][slot]):
            name = f"prompt and {name}"
        parts.append((name, max(0, slot), tokens))
    return parts


def provenance(run: Run) -> list[tuple[str, dict]]:
    """[(title, {name: value})] of settings, starts, checkpoint and rounds."""
    changed = {k: v for k, v in run.config.items() if v != DEFAULTS.get(k)}
    unchanged = {k: v for k, v in run.config.items() if k not in changed}
    found = [("Settings that differ from the defaults", changed)]
    found.append(("Settings at their defaults", unchanged))
    for n, start in enumerate(run.starts, 1):
        found.append((f"Start {n}: versions and device", start))
    if run.meta:
        names = ("weights_sha256", "tokenizer", "tokenizer_sha256")
        values = {"path": run.checkpoint} | {name: run.meta[name] for name in names}
        found.append(("Latest checkpoint", values | run.meta["model"]))
    for round_id in run.rounds:
        path = run.round_path(round_id, "collect.json")
        origin = run.attempt(read_json, path) if os.path.exists(path) else {}
        origin = {k: v for k, v in (origin or {}).items() if k != "report"}  # report: see the table
        found.append((f"Round {round_id}: origin of its rows (collect.json)", origin))
    return [(title, values) for title, values in found if values]
