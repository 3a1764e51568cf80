"""One round's collect: what `fit` will train on and be watched on.

    pretrain      token streams
    sft           the data's best responses
    preference    the data's ranked responses, and the reference's log-probabilities of them
    spin          the same after a game: each prompt's responses by `players`, best first, the policy's own sampled now

Everything of a round lies in RUN/round_R: self_{train,val}.jsonl (samples), {train,val}.jsonl (ranked rows, text and
ids), {train,val}.ref.npy (log-probabilities under the reference), collect.json (provenance and report). Each file is
written whole once, so an interrupted collect goes on where it stopped; samples are kept in parts on the way.
"""
import hashlib
import os
import time

import numpy as np
from tqdm import tqdm

import checkpoint
import parallel
from data import encode_rows, permutation, read_rows, read_stream, sha256, tokenizer, write_json, write_rows
from eval import held_out, length_accuracy, sample_metrics, score
from sample import respond

PART = 1024     # prompts sampled before they are written down


def collect(cfg, round, model, enc, device, dtype, say):
    """(train, val, report) of a round: for pretrain two token streams, else lists of encoded rows; where responses are
    ranked, each row has "ref", the reference's log-probability of every response. report: what is to be said of a game's
    players, of validation rows. say: a function that prints a line."""
    if cfg.stage == "pretrain":
        return read_stream(cfg.data, "train"), read_stream(cfg.data, "val"), {}
    start, folder, result, report = time.time(), os.path.join(cfg.out_dir, f"round_{round}"), {}, {}
    for split, rows in source(cfg).items():
        path = os.path.join(folder, f"{split}.jsonl")
        if cfg.stage == "sft":
            rows = [{**row, "responses": row["responses"][:1], "scores": None} for row in rows]
        if cfg.stage == "spin":
            if not os.path.exists(path):
                played, counts = play(cfg, round, split, rows, model, enc, device, dtype)
                if parallel.rank() == 0:
                    write_rows(path, played)
                parallel.barrier()
            rows = read_rows(path)
            report[split] = game_report(cfg, rows, enc) | {"prompts": len(rows)}
            if split == "train":
                for earlier in range(max(0, round - cfg.mix_rounds), round):
                    rows = rows + read_rows(os.path.join(cfg.out_dir, f"round_{earlier}", "train.jsonl"))
        encoded, counts = encode_rows(rows, enc, cfg.template, model.config.block_size, cfg.max_prompt, cfg.max_response)
        encoded = [row for row in encoded if row is not None]
        if cfg.stage != "sft":
            ranked = [row for row in encoded if len({r for r, y in zip(row["ranks"], row["responses"]) if y is not None}) >= 2]
            counts["nothing ranked"] = len(encoded) - len(ranked)
            encoded = ranked if split == "train" else encoded
            counts["dropped"] = counts["rows"] - len(encoded)
        if not encoded:
            raise SystemExit(f"{cfg.data}/{split}.jsonl: none of its {len(rows)} rows is left ({counts})")
        say(f"round {round} {split}: " + ", ".join(f"{n} {what}" for what, n in counts.items()))
        if cfg.stage != "sft":
            refs = reference(os.path.join(folder, f"{split}.ref.npy"), model, encoded, cfg, device)
            for row, ref in zip(encoded, refs):
                row["ref"] = ref[:len(row["responses"])].tolist()
        result[split] = encoded
    if cfg.stage != "sft" and not os.path.exists(os.path.join(folder, "collect.json")) and parallel.rank() == 0:
        before = checkpoint.latest(cfg.out_dir, round - 1) if round else checkpoint.resolve(cfg.init)
        write_json(os.path.join(folder, "collect.json"), {
            "reference": checkpoint.read_meta(before)["weights_sha256"], "tokenizer": tokenizer.fingerprint(enc),
            "players": cfg.players, "temperature": cfg.temperature, "top_k": cfg.top_k, "top_p": cfg.top_p, "seed": cfg.seed,
            "template": cfg.template, "max_prompt": cfg.max_prompt, "max_response": cfg.max_response,
            "files": {f: sha256(os.path.join(folder, f)) for f in sorted(os.listdir(folder)) if f.endswith((".jsonl", ".npy"))},
            "report": report, "seconds": time.time() - start})
    parallel.barrier()
    return result["train"], result["val"], report.get("val", {})


def source(cfg):
    """Rows of both splits: `max_rows` of training, a seeded choice; the same `eval_rows` of validation for everyone."""
    rows = read_rows(f"{cfg.data}/train.jsonl")
    rows = [rows[i] for i in permutation(len(rows), cfg.seed, 0)[:cfg.max_rows or None]]
    return {"train": rows, "val": held_out(cfg.data, cfg.eval_rows)}


def reference(path, model, rows, cfg, device):
    """log pi_ref of every response (rows, K): computed once, by the code that computes the policy's, and kept."""
    if os.path.exists(path):
        return np.load(path, allow_pickle=False)
    refs = score(model, rows, parallel.micro_batch_size(cfg), device, desc="reference")
    if parallel.rank() == 0:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path + ".tmp", "wb") as f:
            np.save(f, refs)
        os.replace(path + ".tmp", path)
    parallel.barrier()
    return refs


# ------------------------------------------------------------------------------------------------------------ the game


def play(cfg, round, split, rows, model, enc, device, dtype):
    """Every prompt's responses in the order of `players` -> ranked rows with ids. A response that equals a better one
    teaches nothing and is absent; so are an earlier self's before there was one."""
    texts = [row["prompt"] for row in rows]
    columns = []        # of each player: (text, ids) a prompt, ids None where the text is still to be encoded
    for player in cfg.players:
        if player == "data":
            columns.append([(row["responses"][0], None) for row in rows])
        elif player == "teacher":
            columns.append(teacher_responses(cfg, split, rows, enc))
        else:
            back = 0 if player == "self" else int(player[5:])
            path = os.path.join(cfg.out_dir, f"round_{round - back}", f"self_{split}.jsonl")
            if back == 0:
                policy = parallel.whole(model, device, dtype)
                sample_file(path, policy, enc, cfg, texts, f"{round} self {split}")
                del policy
            columns.append(by_prompt(path, texts, enc) if back <= round else [(None, None)] * len(rows))
    played = [{"prompt": row["prompt"], "responses": [c[i][0] for c in columns], "ids": [c[i][1] for c in columns],
               **({"group": row["group"]} if "group" in row else {})} for i, row in enumerate(rows)]
    encoded, counts = encode_rows(played, enc, cfg.template, model.config.block_size, cfg.max_prompt, cfg.max_response)
    for row, e in zip(played, encoded):
        if e is not None:
            ids = e["responses"]
            row["ids"] = [None if y in ids[:k] else y for k, y in enumerate(ids)]
            row["responses"] = [None if y is None else text for y, text in zip(row["ids"], row["responses"])]
    return [row for row, e in zip(played, encoded) if e is not None], counts


def prepare_teacher(cfg, enc, device, dtype):
    """A teacher that is a checkpoint writes its responses to RUN/teacher_{train,val}.jsonl before the student is built:
    the two never share memory."""
    paths = {split: os.path.join(cfg.out_dir, f"teacher_{split}.jsonl") for split in ("train", "val")}
    if not os.path.isdir(cfg.teacher) or all(os.path.exists(p) for p in paths.values()):
        return
    teacher, its_enc, _ = checkpoint.load_model(cfg.teacher, device, dtype)
    for split, rows in source(cfg).items():
        sample_file(paths[split], teacher, its_enc, cfg, [r["prompt"] for r in rows], f"teacher {split}")


def teacher_responses(cfg, split, rows, enc):
    """(text, ids) a row."""
    if cfg.teacher == "rows":
        if any(len(row["responses"]) < 2 for row in rows):
            raise SystemExit(f"teacher is 'rows', but rows of {cfg.data}/{split}.jsonl have one response")
        return [(row["responses"][1], None) for row in rows]
    path = os.path.join(cfg.out_dir, f"teacher_{split}.jsonl") if os.path.isdir(cfg.teacher) else cfg.teacher
    return by_prompt(path, [row["prompt"] for row in rows], enc)


def by_prompt(path, texts, enc):
    """The best response to each prompt in a ranked file: (text, ids), ids where this tokenizer made them."""
    name, answers = tokenizer.fingerprint(enc), {}
    for row in read_rows(path):
        answers[row["prompt"]] = row["responses"][0], row["ids"][0] if row.get("tokenizer") == name else None
    missing = [t for t in texts if t not in answers]
    if missing:
        raise SystemExit(f"{path}: no response to {len(missing)} of {len(texts)} prompts, the first: {missing[0][:80]!r}")
    return [answers[t] for t in texts]


def sample_file(path, model, enc, cfg, texts, what):
    """Write one sampled response a prompt to a ranked file. Prompts are dealt to the ranks; every finished part is kept,
    and a sample is a function of (weights, seed, what, its prompt's number), so a resumed file is the same file."""
    if os.path.exists(path):
        return
    texts = list(dict.fromkeys(texts))      # one response a prompt, however often it stands in the data
    seed = int.from_bytes(hashlib.sha256(f"{cfg.seed} {what}".encode()).digest()[:7], "big")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    parts = [f"{path}.part{i // PART:04d}" for i in range(0, len(texts), PART)]
    progress = tqdm(total=len(texts), desc=f"sampling {what}", disable=None if parallel.rank() == 0 else True)
    for part, start in zip(parts, range(0, len(texts), PART)):
        if os.path.exists(part):
            progress.update(len(texts[start:start + PART]))
            continue
        numbers = list(range(start, min(start + PART, len(texts))))
        mine = numbers[parallel.rank()::parallel.world()]
        answers, ids = respond(model, enc, cfg.template, [texts[i] for i in mine], cfg.max_prompt, cfg.max_response, seed,
                               cfg.temperature, cfg.top_k, cfg.top_p, numbers=mine, batch_size=cfg.gen_batch_size, progress=progress)
        merged = {n: row for some in parallel.gather({n: (a, i) for n, a, i in zip(mine, answers, ids)}) for n, row in some.items()}
        if parallel.rank() == 0:
            write_rows(part, [sample_row(texts[n], *merged[n], enc) for n in numbers if merged[n][1] is not None])
        parallel.barrier()
    if parallel.rank() == 0:
        write_rows(path, [row for part in parts for row in read_rows(part)])
        for part in parts:
            os.remove(part)
    parallel.barrier()


def sample_row(prompt, text, ids, enc):
    """A sampled response as a ranked row that says which tokenizer its ids are of."""
    return {"prompt": prompt, "responses": [text], "ids": [ids], "tokenizer": tokenizer.fingerprint(enc)}


def game_report(cfg, rows, enc):
    """What a round says of its players, on text and ids: ties, lengths, ends, exact match, what length alone tells."""
    report = {}
    for k, name in enumerate(cfg.players):
        there = [row for row in rows if row["ids"][k] is not None]
        report[f"tie/{name}"] = 1 - len(there) / len(rows)
        if there:
            data, ids = [row["ids"][0] for row in there], [row["ids"][k] for row in there]
            figures = sample_metrics([row["responses"][k] for row in there], ids, [row["responses"][0] for row in there], enc.eot_token)
            report |= {f"length/{name}": figures["length"], f"ended/{name}": figures["ended"]}
            if name != "data":
                # a response equal to the data's is absent, and right
                report[f"exact_match/{name}"] = (figures["exact_match"] * len(there) + len(rows) - len(there)) / len(rows)
                report[f"length_acc/{name}"] = length_accuracy([len(y) for y in data], [len(y) for y in ids])
    return report
