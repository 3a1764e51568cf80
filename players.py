"""The players of a round: who responds to its prompts, who ranks the responses, what is reported.

    data        the best response of the row
    teacher     a checkpoint, a file of responses, or the second response of the row
    self        the policy, sampled now; "self:n": n samples
    self-n      the policy of n rounds before

Without a scorer their order is the ranking, and the samples of one player tie. `rank_by_score` is
the ranking of a scorer (scorer.py).
"""

import hashlib
import os

import numpy as np

from data import tokenizer
from data.files import is_there
from data.gsm8k.scorer import same_answer
from data.progress import ProgressBar
from data.rows import (
    best_only,
    encode_prompts,
    encode_rows,
    ids_source,
    prompt_key,
    read_own_rows,
    read_rows,
    response_ids,
    row_with_ids,
    sample_texts,
    sampled_row,
    write_rows,
)
from data.template import without_thoughts
from eval import is_ranked, length_accuracy
from nanospin import checkpoint, distributed, elastic, inputs, rounds
from nanospin.config import (
    is_function,
    is_scored,
    ordered_players,
    player_columns,
    scorer_name,
    scorer_setting,
)
from nanospin.distributed import all_gather_object, broadcast_from_rank0, run_on_rank0
from nanospin.rounds import (
    make_round_folder,
    part_files,
    remove_parts,
    round_folder,
    round_indices,
)
from sample import respond, response_text
from scorer import score_rows


def collect_candidates(cfg, round_id, split, rows, model, enc, say) -> list[dict]:
    """The responses of all players to every prompt, in the order of the players, as ranked rows
    with ids. The samples of one player are ties. In stage preference there are no players, but the
    data's own responses.

    An earlier self is absent in the rounds before there was one, and so is a teacher where its
    answer is empty.
    """
    if cfg.stage == "preference":
        return [data_candidates(row, enc, cfg.template) for row in rows]
    columns = []  # a column per player: of each row a list of (text, ids), None where absent
    for player in ordered_players(cfg):
        column = player_responses(cfg, round_id, split, player, rows, model, enc)
        if player == "teacher":
            column, num_empty = drop_empty(column)
            if num_empty:
                say(
                    f"round {round_id} {split}: {num_empty} of {len(rows)} answers of the teacher "
                    "are empty, so they are absent"
                )
        columns.append(column)
    names = player_columns(cfg)
    candidates = []
    for i, row in enumerate(rows):
        texts, ids = [], []
        for column in columns:
            texts += [text for text, _ in column[i]]
            ids += [y for _, y in column[i]]
        candidate = row_with_ids(row, texts, ids, enc, cfg.template)
        if len(set(names)) < len(names):
            candidate["ranks"] = [names.index(name) for name in names]
        candidates.append(candidate)
    return candidates


def data_candidates(row: dict, enc, template: str) -> dict:
    """The data's own responses to a prompt, to be ranked by a scorer."""
    ids = [response_ids(row, k, enc, template) for k in range(len(row["responses"]))]
    texts = [None if y is None else text for text, y in zip(row["responses"], ids)]
    return row_with_ids(row, texts, ids, enc, template)


def player_responses(cfg, round_id, split, player, rows, model, enc) -> list[list[tuple]]:
    """(text, ids) of a player's responses to each row: one, or n of the player "self:n". To add a
    player, add a branch here."""
    if player == "data":
        return [[(row["responses"][0], response_ids(row, 0, enc, cfg.template))] for row in rows]
    if player == "teacher":
        return [[response] for response in teacher_responses(cfg, split, rows, enc)]
    name, _, count = player.partition(":")
    rounds_ago = 0 if name == "self" else int(name.removeprefix("self-"))
    if rounds_ago > round_id:
        return [[(None, None)]] * len(rows)
    path = os.path.join(round_folder(cfg, round_id - rounds_ago), f"self_{split}.jsonl")
    count = int(count or 1)
    if rounds_ago == 0:
        sample_policy(path, cfg, rows, f"{round_id} self {split}", model, enc, count)
    return match_samples(path, rows, enc, count, cfg.template, own=True)


def drop_empty(column: list[list[tuple]]) -> tuple[list[list[tuple]], int]:
    """Make the responses of a player absent that have no text. Returns too how many rows have none
    then, of a player with one response a row."""
    kept = []
    for responses in column:
        kept.append([(text, y) if text and text.strip() else (None, None) for text, y in responses])
    return kept, kept.count([(None, None)])


def teacher_responses(cfg, split, rows, enc) -> list[tuple]:
    """(text, ids) of the teacher's response to each row."""
    if cfg.teacher == "rows":
        single = [row["prompt"] for row in rows if len(row["responses"]) < 2]
        if single:
            raise SystemExit(
                f"teacher is 'rows', but {len(single)} of {len(rows)} rows of "
                f"{cfg.data}/{split}.jsonl have one response, the first: {single[0][:60]!r}"
            )
        return [(row["responses"][1], response_ids(row, 1, enc, cfg.template)) for row in rows]
    path = cfg.teacher
    if os.path.isdir(path) or inputs.is_answered(cfg):
        path = inputs.teacher_file(cfg, split)
    return match_responses(path, rows, enc, cfg.template)


def encode_for_run(cfg, rows: list[dict], enc, block_size: int) -> tuple[list, dict[str, int]]:
    """`encode_rows` with the template and the limits of the run."""
    return encode_rows(rows, enc, cfg.template, block_size, cfg.max_prompt, cfg.max_response)


def drop_rows_without_room(cfg, rows, enc, block_size: int, say=None, split="") -> list[dict]:
    """The rows whose prompt leaves room for a response, and whose best response has a token. Exits
    if a row has no prompt, or if none is left."""
    if not all(row["prompt"] for row in rows):
        raise SystemExit(f"{cfg.data}: rows that are whole texts have no prompt to respond to")
    if all(row.get("responses") for row in rows):
        best = [best_only(row) for row in rows]
        encoded, counts = encode_for_run(cfg, best, enc, block_size)
    else:
        encoded, counts = encode_prompts(rows, enc, cfg.template, block_size, cfg.max_prompt)
    if say:
        say(f"data {split}: {list_counts(counts)}")
    kept = [row for row, its_encoded in zip(rows, encoded) if its_encoded]
    if not kept:
        raise SystemExit(
            f"{cfg.data}: no prompt leaves room for a response ({list_counts(counts)}); set "
            "max_prompt, or use a shorter template or a larger block_size"
        )
    return kept


def check_room(cfg, rows, enc, block_size: int):
    """Exit with one line if a prompt leaves no room for a response in the teacher. cfg: with the
    template of the teacher. enc, block_size: of the teacher."""
    prompts = encode_for(
        f"teacher {cfg.teacher}", rows, enc, cfg.template, block_size, cfg.max_prompt
    )
    without = [row["prompt"] for row, prompt in zip(rows, prompts) if not prompt]
    if without:
        raise SystemExit(
            f"{cfg.data}: {len(without)} of {len(rows)} prompts leave no room for a response in "
            f"the block_size {block_size} of teacher {cfg.teacher}, the first: "
            f"{without[0][:60]!r}; set max_prompt"
        )


def encode_for(who: str, rows, enc, *limits) -> list[list[int]]:
    """The ids of the prompts for another model than the policy, [] where it has no room. Exits with
    a line that names it for a prompt that it cannot take, such as one with a system message."""
    try:
        return encode_prompts(rows, enc, *limits)[0]
    except SystemExit as e:
        raise SystemExit(f"{who}: {e}")


def drop_unscorable_prompts(cfg, rows, say=None, split="") -> list[dict]:
    """The rows whose prompt leaves room for a response in the model that scores, if one does. Its
    weights are not needed."""
    name = scorer_name(cfg)
    if not name or is_function(name):
        return rows
    path = checkpoint.resolve(name)
    meta = run_on_rank0(checkpoint.read_meta, path)
    block_size, config = meta["model"]["block_size"], meta["config"]
    enc = checkpoint.read_tokenizer(path, meta)
    limits = config["template"], block_size, config["max_prompt"]
    prompts = encode_for(scorer_setting(cfg), rows, enc, *limits)
    kept = [row for row, prompt in zip(rows, prompts) if prompt]
    what = (
        f"{len(rows) - len(kept)} of {len(rows)} prompts leave no room for a response in the "
        f"block_size {block_size} of {scorer_setting(cfg)}"
    )
    if not kept:
        raise SystemExit(f"{cfg.data}: {what}; set max_prompt when that run is trained")
    if say and len(kept) < len(rows):
        say(f"data {split}: {what}, and are left out")
    return kept


def list_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {what}" for what, n in counts.items())


# ------------------------------------------------------------------------------------------ ranking


def rank_by_score(cfg, path: str, rows, candidates, enc, device) -> list[dict]:
    """The candidates of each row in the order of their scores, best first; equal scores are ties.
    top_players come before the others, in their own order. Absent ones come last.

    rows: the data's rows, which a scorer is called with. A ranked row has "scores", and in stage
    spin "players", the player of each response. The order of cfg.players makes no difference.
    """
    texts = [candidate["responses"] for candidate in candidates]
    ids = [candidate["ids"] for candidate in candidates]
    K = max(map(len, texts))
    texts = [row_texts + [None] * (K - len(row_texts)) for row_texts in texts]
    scores = score_rows(cfg, path, rows, texts, ids, enc, device)
    names = player_columns(cfg) if cfg.stage == "spin" else [""] * K
    ranked = []
    for candidate, row_scores in zip(candidates, scores.tolist()):
        ranked.append(sort_by_score(cfg, candidate, names, row_scores))
    return ranked


def sort_by_score(cfg, candidate: dict, names: list[str], scores: list[float]) -> dict:
    """One row of `rank_by_score`. names: the player of each response."""
    ids = candidate["ids"]
    there = [k for k, y in enumerate(ids) if y is not None]
    absent = [k for k, y in enumerate(ids) if y is None]

    def key_of(k: int) -> tuple[int, float]:  # smaller is better; equal keys are ties
        if names[k] in cfg.top_players:
            return cfg.top_players.index(names[k]), 0.0
        return len(cfg.top_players), -scores[k]

    keys = {k: key_of(k) for k in there}
    # Ties are ordered by a hash, so that no property of the text decides. Equal responses have the
    # same hash and keep their order, in which the data's comes first.
    there.sort(key=lambda k: (keys[k], hash_ids(ids[k][: cfg.max_response or None])))
    order = there + absent
    sorted_keys = [keys[k] for k in there]
    row = candidate | {
        "responses": [candidate["responses"][k] for k in order],
        "ids": [ids[k] for k in order],
        "scores": [scores[k] if k in keys else None for k in order],
        # the place of the first one with the same key
        "ranks": [sorted_keys.index(key) for key in sorted_keys] + [len(order)] * len(absent),
    }
    if cfg.stage == "spin":
        row["players"] = [names[k] for k in order]
    return row


def hash_ids(ids: list[int]) -> str:
    return hashlib.sha256(str(ids).encode()).hexdigest()


# ----------------------------------------------------------------------------------------- sampling


def sample_policy(path, cfg, rows, name: str, model, enc, count: int = 1):
    """Sample the policy as it is now, with a full copy of its weights on each rank unless
    sample_sharded is set."""
    policy = model
    if not cfg.sample_sharded:
        device = next(model.parameters()).device
        policy = distributed.gather_full_model(model, distributed.compute_dtype(cfg, device))
    write_samples(path, policy, enc, cfg, rows, name, count)


def write_samples(path: str, model, enc, cfg, rows: list[dict], name: str, count: int = 1):
    """Sample `count` responses to every prompt and write them to a ranked file, one row per
    sample. A prompt of several rows is sampled once; its samples are consecutive.

    The rows are divided among the ranks. A sample is a function of (weights, seed, name, number of
    the row): another name draws other samples. Every finished part is kept, so a resumed file is
    the same file. A part that is damaged is made again.
    """
    repeated = []
    for row in unique_prompts(rows):
        repeated += [row] * count
    rows = repeated
    if broadcast_from_rank0(is_there(path)):
        if not run_on_rank0(is_sampled, path, rows, enc, cfg.template):
            raise SystemExit(
                f"{path} is not as it was sampled: it was damaged or edited; put the original "
                "back, or remove it to sample again"
            )
        remove_parts(path)
        return
    make_round_folder(path)
    size = max(rounds.PART_SIZE, cfg.gen_batch_size * distributed.world_size())
    parts = part_files(path, len(rows), size)
    written = []
    for part, numbers in parts.items():
        its_rows = [rows[n] for n in numbers]
        if run_on_rank0(is_sampled, part, its_rows, enc, cfg.template):
            written.append(part)
    hide_bar = distributed.rank() != 0
    progress = ProgressBar(total=len(rows), desc=f"sampling {name}", hide=hide_bar)
    for part, numbers in parts.items():
        if part in written:
            progress.update(len(numbers))
            continue
        distributed.heartbeat.set_stage(f"sampling {name}, samples from {numbers[0]} on")
        samples = sample_part(model, enc, cfg, rows, numbers, name, progress)
        if distributed.rank() == 0:
            sampled = [sampled_row(rows[n], *samples[n], enc, cfg.template) for n in numbers]
            write_rows(part, sampled)
        elastic.exit_if_signalled()
    progress.close()
    if distributed.rank() == 0:
        sampled = []
        for part in parts:
            sampled += read_rows(part)
        write_rows(path, sampled)
    remove_parts(path)


def is_sampled(path: str, rows: list[dict], enc, template: str) -> bool:
    """Whether a file of samples, or a part of one, is there and has a response to each of these
    rows, as it was written."""
    try:
        for row, sample in zip(rows, read_own_rows(path, enc, template), strict=True):
            _, ids = own_sample(path, sample, enc, template)
            if sampled_row(row, sample["responses"][0], ids, enc, template) != sample:
                return False
    except (SystemExit, ValueError):
        return False
    return True


def sample_part(model, enc, cfg, rows, numbers: range, name: str, progress) -> dict[int, tuple]:
    """{number of a row: (text, ids)} of the rows `numbers`, on every rank."""
    digest = hashlib.sha256(f"{cfg.seed} {name}".encode()).digest()
    mine = numbers[distributed.rank() :: distributed.world_size()]
    with distributed.lockstep_forward(model):
        texts, ids = respond(
            model,
            enc,
            cfg.template,
            [rows[n] for n in mine],
            cfg.max_prompt,
            cfg.max_response,
            seed=int.from_bytes(digest[:7], "big"),
            temperature=cfg.temperature,
            top_k=cfg.top_k,
            top_p=cfg.top_p,
            request_ids=mine,
            batch_size=cfg.gen_batch_size,
            progress=progress,
        )
    if None in ids:
        prompt = rows[mine[ids.index(None)]]["prompt"]
        raise SystemExit(
            f"{name}: block_size {model.config.block_size} leaves no room after the prompt "
            f"{prompt[:80]!r}; set max_prompt"
        )
    samples = {}
    for of_rank in all_gather_object(dict(zip(mine, zip(texts, ids)))):
        samples.update(of_rank)
    return samples


def unique_prompts(rows: list[dict], say=None, split="") -> list[dict]:
    """The first row of each prompt: each is sampled once, however often it is in the data."""
    first = {}
    for row in rows:
        first.setdefault(prompt_key(row), row)
    if say and len(first) < len(rows):
        num_left_out = len(rows) - len(first)
        say(f"data {split}: {num_left_out} rows with the prompt of an earlier row are left out")
    return list(first.values())


def prompts_of_round(cfg, rows: list[dict], round_id: int) -> list[dict]:
    """max_rows of the rows, all different, and others in each round until each was there once."""
    size = min(cfg.max_rows or len(rows), len(rows))
    return [rows[i] for i in round_indices(len(rows), size, cfg.seed, round_id)]


def match_samples(
    path: str, rows: list[dict], enc, count: int, template: str, own: bool = False
) -> list[list[tuple]]:
    """(text, ids) of the best response of the first `count` rows in a ranked file that have the
    prompt of each row.

    own: they are the policy's, with this tokenizer and template. Samples of this tokenizer and form
    keep their ids, see `data.rows.response_ids`. Others lose thoughts that the template does not
    have; how many do is printed.
    """
    source = ids_source(enc, template)
    responses = {}
    num_rows, num_without_thoughts = 0, 0
    for row in read_own_rows(path, enc, template) if own else read_rows(path):
        text = row["responses"][0]
        if row.get("tokenizer") == source:
            text, ids = own_sample(path, row, enc, template)
        else:
            text = without_thoughts(template, text)
            num_without_thoughts += text != row["responses"][0]
            ids = response_ids(row | {"responses": [text, *row["responses"][1:]]}, 0, enc, template)
        responses.setdefault(prompt_key(row), []).append((text, ids))
        num_rows += 1
    if num_without_thoughts and distributed.rank() == 0:
        print(
            f"{path}: the template is one without thoughts, so those of {num_without_thoughts} of "
            f"{num_rows} responses are left out",
            flush=True,
        )
    missing = []
    for row in rows:
        if len(responses.get(prompt_key(row), [])) < count:
            missing.append(row["prompt"])
    if missing:
        wanted = "response" if count == 1 else f"{count} responses"
        raise SystemExit(
            f"{path}: no {wanted} to {len(missing)} of {len(rows)} prompts, "
            f"the first: {missing[0][:80]!r}"
        )
    return [responses[prompt_key(row)][:count] for row in rows]


def match_responses(path: str, rows: list[dict], enc, template: str) -> list[tuple]:
    """(text, ids) of the response in a ranked file to the prompt of each row, see `match_samples`.
    If the file has several rows of a prompt, the first counts."""
    return [responses[0] for responses in match_samples(path, rows, enc, 1, template)]


def own_sample(path: str, row: dict, enc, template: str) -> tuple[str, list[int]]:
    """(text, ids) of a row's first response, whose ids this tokenizer made. Exits if the two do not
    belong together."""
    ids = (row.get("ids") or [None])[0]
    if not ids:
        raise SystemExit(
            f"{path}: the row with the prompt {row['prompt'][:60]!r} names its tokenizer and has "
            "no ids"
        )
    if max(ids) >= enc.n_vocab:
        raise SystemExit(
            f"{path}: the row with the prompt {row['prompt'][:60]!r} has the id {max(ids)}, "
            f"outside the vocabulary of {enc.n_vocab}"
        )
    texts = sample_texts(enc, template, ids)
    if row["responses"][0] not in texts:
        raise SystemExit(
            f"{path}: in the row with the prompt {row['prompt'][:60]!r} the ids are not those of "
            "its text: one of the two was edited; drop the ids to use the text"
        )
    return texts[0], ids


# ------------------------------------------------------------------------------------------- report


def round_report(cfg, ranked: list[dict], rows: list[dict], enc) -> dict[str, float]:
    """What a round reports of its ranked rows. rows: those of the data, one for each.

    tie/PLAYER          share of responses that equal a better one
    length/PLAYER       mean tokens
    ended/PLAYER        share that ended with end-of-text
    empty/teacher       share of answers without text, if there are any
    exact_match/PLAYER  with the data
    length_acc/PLAYER   how well length alone separates those that are ranked from the data's

    Responses that equal a better one count in all but length_acc. Under a scorer also

    score/PLAYER        mean score
    score_best, score_worst    means over rows of the best and the worst score
    signal              share of rows in which something is ranked
    """
    report = {}
    if cfg.stage == "spin":
        for player in dict.fromkeys(player_columns(cfg)):
            report |= player_report(cfg, player, ranked, rows, enc)
    if is_scored(cfg):
        best, worst = [], []
        for row in ranked:
            scores = [score for score in row["scores"] if score is not None]
            best.append(max(scores))
            worst.append(min(scores))
        report["score_best"] = float(np.mean(best))
        report["score_worst"] = float(np.mean(worst))
        signal = []
        for row in ranked:
            signal.append(is_ranked({"ranks": row["ranks"], "responses": row["ids"]}))
        report["signal"] = float(np.mean(signal))
    return report


def player_report(cfg, player: str, ranked, rows, enc) -> dict[str, float]:
    """The part of `round_report` about one player."""
    report = {}
    present, tied, scores = [], [], []  # of its responses; the first two: (ranked row, k, data row)
    num_responses = 0
    for row, data_row in zip(ranked, rows, strict=True):
        for k in columns_of(cfg, player, row):
            num_responses += 1
            if row["ids"][k] is not None:
                present.append((row, k, data_row))
            elif row["same_as"][k] is not None:
                tied.append((row, k, data_row))
            if row.get("scores") and row["scores"][k] is not None:
                scores.append(row["scores"][k])
    num_absent = num_responses - len(present + tied)
    if player == "teacher" and num_absent:
        report["empty/teacher"] = num_absent / num_responses
    if scores:
        report[f"score/{player}"] = float(np.mean(scores))
    if not present and not tied:
        return report
    lengths, ended = [], []
    for row, k, _ in present + tied:
        one = distinct(row, k)
        ids = row["ids"][one]
        lengths.append(num_tokens(row, one))
        ended.append(tokenizer.is_end(enc, ids[-1]) and lengths[-1] == len(ids))
    report[f"tie/{player}"] = 1 - len(present) / len(present + tied)
    report[f"length/{player}"] = float(np.mean(lengths))
    report[f"ended/{player}"] = float(np.mean(ended))
    if player != "data":
        report |= compare_with_data(cfg, player, present, tied, enc)
    return report


def distinct(row: dict, k: int) -> int:
    """k, or the place of the better response that response k of a ranked row equals."""
    same_as = row["same_as"][k]
    return k if same_as is None else same_as


def text_of(cfg, player: str, row: dict, k: int, enc) -> str | None:
    """The text of response k of a ranked row, a player's. One that equals a better response is not
    in the row: if that one has its end, the texts are equal too. Else they are equal as far as the
    run's limits leave them, which is all of a sample; another player's whole text is not known."""
    one = distinct(row, k)
    ids = row["ids"][one][: num_tokens(row, one)]
    if one == k or tokenizer.is_end(enc, ids[-1]):
        return row["responses"][one]
    return response_text(enc, ids, cfg.template) if player.startswith("self") else None


def num_tokens(row: dict, k: int) -> int:
    """Tokens of response k of a ranked row, as far as the run's limits leave them."""
    return row["lengths"][k] if "lengths" in row else len(row["ids"][k])


def columns_of(cfg, player: str, row: dict) -> list[int]:
    """Which responses of a ranked row are a player's."""
    names = row.get("players") or player_columns(cfg)
    return [k for k, name in enumerate(names) if name == player]


def compare_with_data(cfg, player: str, present, tied, enc) -> dict[str, float]:
    """exact_match and length_acc of `round_report`, where the data has a response."""
    report = {}
    right, lengths, data_lengths = [], [], []
    for row, k, data_row in present + tied:
        if data_row.get("responses"):
            text = text_of(cfg, player, row, k, enc)
            if text is not None:
                right.append(same_answer(text, data_row["responses"][0]))
    for row, k, _ in present:
        for of_data in columns_of(cfg, "data", row):
            if row["ids"][of_data] is not None:
                lengths.append(num_tokens(row, k))
                data_lengths.append(num_tokens(row, of_data))
    if right:
        report[f"exact_match/{player}"] = float(np.mean(right))
    if data_lengths:
        report[f"length_acc/{player}"] = length_accuracy(data_lengths, lengths)
    return report
