"""Rows of other projects, each on a small set of the schema that its publisher has."""

import copy
import gzip
import json
import math
import random
import types

import pyarrow
import pyarrow.parquet
import pytest
from conftest import Killed, killing

from data import cli, formats, hub
from data.files import read_json
from data.hub import prepare as hub_prepare
from data.jsonl import prepare as jsonl_prepare
from data.rows import check_row, read_rows

# ---- schemas, of the columns on the hub; {} are names of columns and their contents


def chat(*texts, system=None, keys=("role", "content"), roles=("user", "assistant")):
    """Messages by turns. keys and roles: as a publisher names them."""
    role, content = keys
    messages = [{content: system, role: "system"}] if system else []
    for i, text in enumerate(texts):
        messages.append({content: text, role: roles[i % 2]})
    return messages


def share_gpt(*texts, system=None):
    return chat(*texts, system=system, keys=("from", "value"), roles=("human", "gpt"))


def plain(i, *responses, **more):
    return {"prompt": f"ask {i}", "responses": list(responses)} | more


def pair(i, **more):
    return plain(i, " good", "bad\n", **more)


def later(i, *responses, **more):
    """A row whose prompt is the second one of a conversation."""
    history = [[f"ask {i}", "ok"]]
    return {"prompt": "more", "responses": list(responses), "history": history} | more


def ultrafeedback_h4(i):
    return {
        "prompt": f"ask {i}",
        "prompt_id": f"{i:064x}",
        "chosen": chat(f"ask {i}", " good"),
        "rejected": chat(f"ask {i}", "bad\n"),
        "messages": chat(f"ask {i}", " good"),
        "score_chosen": 8.5,
        "score_rejected": 8.5,
    }


def ultrafeedback_trl(i):
    return {
        "chosen": chat(f"ask {i}", " good"),
        "rejected": chat(f"ask {i}", "bad\n"),
        "score_chosen": 9.0,
        "score_rejected": 7.5,
    }


def ultrafeedback_argilla(i):
    return {
        "source": "sharegpt",
        "instruction": f"ask {i}",
        "chosen_response": " good",
        "rejected_response": "bad\n",
        "chosen_avg_rating": 5.0,
        "rejected_avg_rating": 3.0,
        "chosen_model": "gpt-4",
    }


def ultrafeedback_cleaned(i):
    return {
        "source": "evol_instruct",
        "prompt": f"ask {i}",
        "chosen": chat(f"ask {i}", " good"),
        "chosen-rating": 5.0,
        "chosen-model": "gpt-4",
        "rejected": chat(f"ask {i}", "bad\n"),
        "rejected-rating": 3.0,
        "rejected-model": "llama-2-7b-chat",
    }


def spin(i):
    return {"real": chat(f"ask {i}", " good"), "generated": chat(f"ask {i}", "bad\n")}


def dpo_mix(i):
    return {
        "dataset": "argilla/distilabel-capybara-dpo-7k-binarized",
        "chosen": chat(f"ask {i}", "ok", "more", "good", system="Be kind."),
        "chosen_rating": 5.0,
        "rejected": chat(f"ask {i}", "ok", "more", "bad", system="Be kind."),
        "rejected_rating": 4.0,
    }


def orca_intel(i):
    return {
        "system": "Be brief." if i % 2 else "",
        "question": f"ask {i}",
        "chosen": " good",
        "rejected": "bad\n",
    }


def orca_argilla(i):
    return {
        "system": "Be brief.",
        "input": f"ask {i}",
        "chosen": " good",
        "rejected": "bad\n",
        "generations": [" good", "bad\n"],
        "order": ["gpt4", "llama"],
        "labelling_model": "gpt-4-1106-preview",
        "labelling_prompt": chat("Rate.", system="You judge."),
        "raw_labelling_response": "9 7",
        "rating": [9.0, 7.0],
        "rationale": "Because.",
        "status": "unchanged",
        "original_chosen": " good",
        "original_rejected": "bad\n",
        "chosen_score": 9.0,
        "in_gsm8k_train": False,
    }


def tulu_sft(i):
    return {
        "id": f"oasst1_{i}",
        "messages": chat(f"ask {i}", "ok", "more", "yes", system="Be kind."),
        "source": "ai2-adapt-dev/oasst1_converted",
    }


def tulu_preference(i):
    return {
        "id": f"uf_{i}",
        "source": "ai2-adapt-dev/ultrafeedback_cleaned",
        "prompt": f"ask {i}",
        "chosen": chat(f"ask {i}", " good"),
        "rejected": chat(f"ask {i}", "bad\n"),
        "chosen_rating": 4.5,
        "rejected_rating": 3.0,
    }


def smoltalk(i):
    return {
        "messages": chat(f"ask {i}", "ok", "more", "yes", "trailing"),
        "source": "smol-magpie-ultra",
    }


def open_hermes(i):
    return {
        "custom_instruction": None,
        "topic": None,
        "model_name": None,
        "model": None,
        "skip_prompt_formatting": False,
        "category": "orca",
        "conversations": [
            message | {"weight": None}
            for message in share_gpt(f"ask {i}", "ok", system="Think." if i % 2 else None)
        ],
        "views": None,
        "language": None,
        "id": str(i),
        "title": None,
        "idx": None,
        "hash": None,
        "avatarUrl": None,
        "system_prompt": None,
        "source": "airoboros2.2",
    }


def help_steer2(i):
    """Two rows of a prompt follow each other."""
    n = i // 2
    prompt = f"ask {n}"
    if n % 2:
        prompt += "\n<extra_id_1>Assistant\nok\n<extra_id_1>User\nmore"
    return {
        "prompt": prompt,
        "response": "good" if i % 2 else "bad",
        "helpfulness": 4 if i % 2 else 1,
        "correctness": 4,
        "coherence": 4,
        "complexity": 2,
        "verbosity": 1,
    }


def help_steer2_preference(i):
    return {
        "split": "train",
        "prompt": f"ask {i}",
        "response_1": "bad",
        "response_2": "good",
        "preference_strength": 2,
        "preference_statement": "Response 2 is better than Response 1",
        "preference_elaboration": "It is right.",
        "three_most_similar_preferences": [{"statement": "s", "elaboration": "e", "strength": 2}],
        "all_preferences_unprocessed": [{"statement": "s", "elaboration": "e", "strength": 2}],
    }


def help_steer3(i):
    return {
        "domain": "general",
        "language": "english",
        "context": chat(f"ask {i}", "ok", "more"),
        "response1": "good",
        "response2": "bad",
        "overall_preference": [-3, 0, 1][i % 3],
        "individual_preference": [
            {"score": -3, "reasoning": "r", "feedback1": "f", "feedback2": "g"}
        ],
    }


def safe_rlhf(i):
    harms = {"Violence": False, "Privacy Violation": False}
    return {
        "prompt": f"ask {i}",
        "response_0": "rude",
        "response_1": "kind",
        "prompt_source": "Alpaca3-70B",
        "response_0_source": "Alpaca3-8B",
        "response_1_source": "WizardLM-30B-Uncensored",
        "is_response_0_safe": False,
        "is_response_1_safe": True,
        "response_0_harm_category": harms,
        "response_1_harm_category": harms,
        "response_0_severity_level": 1,
        "response_1_severity_level": 0,
        "better_response_id": 0,
        "safer_response_id": 1,
        "response_0_sha256": "0" * 64,
        "response_1_sha256": "1" * 64,
    }


def arena_33k(i):
    return {
        "question_id": f"{i:032x}",
        "model_a": "koala-13b",
        "model_b": "vicuna-13b",
        "winner": ["model_a", "model_b", "tie", "tie (bothbad)"][i % 4],
        "judge": f"arena_user_{i}",
        "conversation_a": chat(f"ask {i}", "one"),
        "conversation_b": chat(f"ask {i}", "two"),
        "turn": 1,
        "anony": True,
        "language": "English",
        "tstamp": 1682351591.1322,
        "openai_moderation": {"flagged": False},
        "toxic_chat_tag": {"roberta-large": {"flagged": False, "probability": 0.01}},
    }


def arena_140k(i):
    def side(answer):
        messages = chat(f"ask {i}", answer)
        for message in messages:
            part = {"type": "text", "text": message["content"], "image": None, "mimeType": None}
            message["content"] = [part]
        return messages

    return {
        "id": str(i),
        "model_a": "a",
        "model_b": "b",
        "winner": ["model_b", "both_bad"][i % 2],
        "evaluation_session_id": "e",
        "evaluation_order": 1,
        "conversation_a": side("one"),
        "conversation_b": side("two"),
        "full_conversation": [{"user": {"role": "user"}}],
        "conv_metadata": {"turns": 1},
        "category_tag": {"if_v0.1": {"if": False}},
        "language": "en",
        "is_code": False,
        "timestamp": "2025-06-26",
    }


def arena_55k(i):
    return {
        "id": i,
        "model_a": "gpt-4-1106-preview",
        "model_b": "gpt-4-0613",
        "prompt": json.dumps([f"ask {i}"]),
        "response_a": json.dumps(["one"]),
        "response_b": json.dumps(["two"]),
        "winner_model_a": int(i % 3 == 0),
        "winner_model_b": int(i % 3 == 1),
        "winner_tie": int(i % 3 == 2),
    }


def alpaca(i):
    text = f"Below is an instruction ... ### Instruction:\nask {i}"
    return {"instruction": f"ask {i}", "input": "7" if i % 2 else "", "output": "yes", "text": text}


def tied(i, is_tie, responses, scores, **more):
    """A row with a verdict."""
    return plain(i, *responses, scores=[0, 0] if is_tie else scores, **more)


def arena_row(i):
    return tied(i, i % 4 > 1, ("two", "one") if i % 4 == 1 else ("one", "two"), [1, 0])


def arena_55k_row(i):
    is_tie = i % 3 == 2
    return tied(i, is_tie, ("two", "one") if i % 3 == 1 else ("one", "two"), [1, 0])


def help_steer3_row(i):
    order = ["bad", "good"] if i % 3 == 2 else ["good", "bad"]
    return later(i, *order, scores=[[1, 0], [0, 0], [1, 0]][i % 3])


# name: (rows, the ranked row or rows that the i-th one makes)
SETS = {
    "HuggingFaceH4/ultrafeedback_binarized": (ultrafeedback_h4, pair),
    "trl-lib/ultrafeedback_binarized": (ultrafeedback_trl, pair),
    "argilla/ultrafeedback-binarized-preferences": (ultrafeedback_argilla, pair),
    "argilla/ultrafeedback-binarized-preferences-cleaned": (ultrafeedback_cleaned, pair),
    "UCLA-AGI/SPIN_iter0": (spin, pair),
    "argilla/dpo-mix-7k": (dpo_mix, lambda i: later(i, "good", "bad", system="Be kind.")),
    "Intel/orca_dpo_pairs": (
        orca_intel,
        lambda i: pair(i, system="Be brief.") if i % 2 else pair(i),
    ),
    "argilla/distilabel-intel-orca-dpo-pairs": (
        orca_argilla,
        lambda i: pair(i, system="Be brief."),
    ),
    "allenai/tulu-3-sft-mixture": (
        tulu_sft,
        lambda i: [plain(i, "ok", system="Be kind."), later(i, "yes", system="Be kind.")],
    ),
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": (tulu_preference, pair),
    "HuggingFaceTB/smoltalk": (smoltalk, lambda i: [plain(i, "ok"), later(i, "yes")]),
    "teknium/OpenHermes-2.5": (
        open_hermes,
        lambda i: plain(i, "ok", system="Think.") if i % 2 else plain(i, "ok"),
    ),
    "nvidia/HelpSteer2": (
        help_steer2,
        lambda i: [] if i > 7 else (later if i % 2 else plain)(i, "good", "bad", scores=[4, 1]),
    ),
    "nvidia/HelpSteer2 preference": (
        help_steer2_preference,
        lambda i: plain(i, "good", "bad", scores=[1, 0]),
    ),
    "nvidia/HelpSteer3": (help_steer3, help_steer3_row),
    "PKU-Alignment/PKU-SafeRLHF": (safe_rlhf, lambda i: plain(i, "rude", "kind", scores=[1, 0])),
    "lmsys/chatbot_arena_conversations": (arena_33k, arena_row),
    "lmarena-ai/arena-human-preference-140k": (
        arena_140k,
        lambda i: tied(i, i % 2, ("one", "two") if i % 2 else ("two", "one"), [1, 0]),
    ),
    "lmarena-ai/arena-human-preference-55k": (arena_55k, arena_55k_row),
    "tatsu-lab/alpaca": (
        alpaca,
        lambda i: {"prompt": f"ask {i}\n\n7" if i % 2 else f"ask {i}", "responses": ["yes"]},
    ),
}
DROPPED = {"HuggingFaceTB/smoltalk": {"last messages of the user, without an answer": 16}}
NUM_ROWS = 16


def write_set(folder, rows, split="train"):
    (folder / "data").mkdir(parents=True, exist_ok=True)
    path = folder / "data" / f"{split}-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(folder)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(folder):
    """The rows of a folder in any order, without their groups."""
    rows = []
    for side in ("train", "val"):
        rows += read_rows(f"{folder}/{side}.jsonl")
    for row in rows:
        assert row.pop("group") == (row.get("history") or [[row["prompt"]]])[0][0].strip()
    return sorted(rows, key=json.dumps)


def expected_rows(row_of):
    rows = []
    for i in range(NUM_ROWS):
        made = row_of(i)
        rows += made if isinstance(made, list) else [made]
    return sorted(json.loads(json.dumps(rows, sort_keys=False)), key=json.dumps)


def normal(rows):
    """Rows with their fields in one order."""
    return sorted(json.dumps(row, sort_keys=True) for row in rows)


@pytest.mark.parametrize("name", SETS)
def test_published_schemas(tmp_path, capsys, name):
    """From the hub's parquet and from JSON lines: the same rows, and the first one is printed."""
    make, row_of = SETS[name]
    rows = [make(i) for i in range(NUM_ROWS)]
    folder = write_set(tmp_path / "set", rows)
    hub_prepare.main([folder, f"--out={tmp_path}/hub", "--val_share=0.4"])
    printed = capsys.readouterr().out
    assert "recognised: " in printed
    assert "(no loss): 'ask 0" in printed
    assert normal(rows_of(tmp_path / "hub")) == normal(expected_rows(row_of))
    assert read_json(f"{tmp_path}/hub/meta.json")["dropped"] == DROPPED.get(name, {})

    lines = write_lines(tmp_path / "in.jsonl", rows)
    jsonl_prepare.main([lines, f"--out={tmp_path}/lines", "--val_share=0.4"])
    assert "recognised: " in capsys.readouterr().out
    assert normal(rows_of(tmp_path / "lines")) == normal(rows_of(tmp_path / "hub"))
    assert read_json(f"{tmp_path}/lines/meta.json").get("dropped", {}) == DROPPED.get(name, {})


@pytest.mark.parametrize("prepare", [hub_prepare, jsonl_prepare])
@pytest.mark.parametrize("column", ["ratings", "rewards"])
def test_responses_with_ratings_are_ranked_by_them(tmp_path, prepare, column):
    """Our own rows have `responses`, too, best first, but no ratings."""
    rows = []
    for i in range(NUM_ROWS):
        rows.append({"prompt": f"ask {i}", "responses": ["bad", "mid", "good"], column: [1, 2, 9]})
    (tmp_path / "set").mkdir()
    lines = write_lines(tmp_path / "set" / "train.jsonl", rows)
    source = f"{tmp_path}/set" if prepare is hub_prepare else lines
    prepare.main([source, f"--out={tmp_path}/out", "--val_share=0.4"])
    for row in rows_of(f"{tmp_path}/out"):
        assert row["responses"] == ["good", "mid", "bad"]
        assert row["scores"] == [9, 2, 1]


@pytest.mark.parametrize("column", ["score", "rating", "reward", "rank", "ranks", "ranking"])
def test_strings_beside_what_may_be_another_order(tmp_path, column):
    row = {"prompt": "ask", "responses": ["bad", "mid", "good"], column: [3, 2, 1]}
    args = [write_lines(tmp_path / "a.jsonl", [row]), f"--out={tmp_path}/out"]
    with pytest.raises(SystemExit, match=rf"a.jsonl:1: {column} is not read, and the responses"):
        jsonl_prepare.main(args)
    for known in (row | {column: 3}, row | {"scores": [9, 2, 1]}):
        write_lines(tmp_path / "a.jsonl", [known | {"prompt": f"ask {i}"} for i in range(20)])
        jsonl_prepare.main([*args, "--val_share=0.4"])
        for kept in rows_of(f"{tmp_path}/out"):
            assert kept["responses"] == row["responses"]


@pytest.mark.parametrize("prepare", [hub_prepare, jsonl_prepare])
def test_a_field_that_only_a_late_row_has_is_named(tmp_path, capsys, prepare):
    """Of 300 conversations the last ten have it."""
    rows = []
    for i in range(300):
        messages = [{"role": "user", "content": f"ask {i}"}]
        messages.append({"role": "assistant", "content": "yes"})
        if i >= 290:
            messages[1]["trainable"] = False
        rows.append({"messages": messages})
    (tmp_path / "set").mkdir()
    lines = write_lines(tmp_path / "set" / "train.jsonl", rows)
    source = f"{tmp_path}/set" if prepare is hub_prepare else lines
    prepare.main([source, f"--out={tmp_path}/out", "--val_share=0.4"])
    assert "ignored fields: messages.trainable (10)" in capsys.readouterr().out


# ---- forms of TRL and others


def options_of(*options):
    parser = cli.ArgumentParser()
    formats.add_arguments(parser)
    return parser.parse_args(list(options))


def converted(row, *options):
    """(ranked rows without group, {reason: number dropped}) of one row, by the options."""
    args = options_of(*options)
    dropped = {}
    found = formats.recognise(row, "x:1", args)
    rows = formats.convert_checked(
        row, lambda row, dropped: formats.convert(row, found, dropped, args), dropped
    )
    for ranked_row in rows:
        del ranked_row["group"]
    return rows, dropped


ASK, GOOD, BAD = (
    chat("ask 0"),
    chat("good", roles=("assistant",)),
    chat("bad", roles=("assistant",)),
)
SYSTEM_ASK = chat("ask 0", system="Be kind.")
ONE = plain(0, "good")
TWO = plain(0, "good", "bad")


@pytest.mark.parametrize(
    "row, expected",
    [
        # TRL, standard and conversational
        ({"prompt": "ask 0", "completion": " good"}, plain(0, " good")),
        ({"prompt": ASK, "completion": GOOD}, ONE),
        ({"prompt": SYSTEM_ASK, "completion": GOOD}, ONE | {"system": "Be kind."}),
        ({"prompt": ASK, "completion": "good"}, ONE),
        ({"prompt": "ask 0", "chosen": "good", "rejected": "bad"}, TWO),
        ({"prompt": ASK, "chosen": GOOD, "rejected": BAD}, TWO),
        ({"prompt": ASK, "chosen": GOOD[0], "rejected": BAD[0]}, TWO),
        ({"prompt": "ask 0", "chosen": GOOD, "rejected": BAD}, TWO),
        ({"prompt": ASK, "chosen": ASK + GOOD, "rejected": ASK + BAD}, TWO),
        ({"chosen": SYSTEM_ASK + GOOD, "rejected": SYSTEM_ASK + BAD}, TWO | {"system": "Be kind."}),
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is black."},
            {"prompt": "The sky is bl", "responses": ["ue.", "ack."]},
        ),
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is green."},
            {"prompt": "The sky is", "responses": [" blue.", " green."]},
        ),
        ({"messages": SYSTEM_ASK + GOOD}, ONE | {"system": "Be kind."}),
        # a transcript of Anthropic, in a pair and as a prompt
        (
            {
                "chosen": "\n\nHuman: ask 0\n\nAssistant: ok\n\nHuman: more\n\nAssistant: it is",
                "rejected": "\n\nHuman: ask 0\n\nAssistant: ok\n\nHuman: more\n\nAssistant: it was",
            },
            later(0, "it is", "it was"),
        ),
        (
            {
                "prompt": "\n\nHuman: ask 0\n\nAssistant: ok\n\nHuman: more\n\nAssistant:",
                "response": "good",
                "chosen": "good",
                "rejected": "bad",
            },
            later(0, "good", "bad"),
        ),
        # LLaMA-Factory's pairs after a ShareGPT conversation, and its Alpaca rows with a history
        (
            {
                "conversations": share_gpt("ask 0", "ok", "more"),
                "chosen": share_gpt("x", "good")[1],
                "rejected": share_gpt("x", "bad")[1],
            },
            later(0, "good", "bad"),
        ),
        (
            {
                "instruction": "more",
                "input": "",
                "output": "good",
                "system": "Be kind.",
                "history": [["ask 0", "ok"]],
            },
            later(0, "good", system="Be kind."),
        ),
        # Dolly
        (
            {"instruction": "ask 0", "context": "7", "response": "good", "category": "qa"},
            {"prompt": "ask 0\n\n7", "responses": ["good"]},
        ),
        ({"question": "ask 0", "answer": "good"}, ONE),
        # lists with scores, in any order; equal ones tie, and texts of digits are numbers
        (
            {"prompt": "ask 0", "completions": ["bad", "good"], "scores": [1.5, 2]},
            plain(0, "good", "bad", scores=[2, 1.5]),
        ),
        (
            {"instruction": "ask 0", "generations": ["good", "bad"], "rating": ["3", "3"]},
            plain(0, "good", "bad", scores=[3, 3]),
        ),
        (
            {
                "prompt": ASK,
                "responses": [{"response": "bad", "score": -1}, {"response": "good", "score": 0}],
            },
            plain(0, "good", "bad", scores=[0, -1]),
        ),
        (
            {
                "prompt": ASK,
                "answers": [{"answer": "bad", "rank": 2.0}, {"answer": "good", "rank": 1}],
            },
            plain(0, "good", "bad", scores=[-1, -2]),
        ),
        # contents in parts, and lists of roles and contents
        (
            {
                "messages": [
                    chat("ask 0")[0] | {"content": [{"type": "text", "text": "ask 0"}]},
                    *GOOD,
                ]
            },
            ONE,
        ),
        ({"messages": {"role": ["user", "assistant"], "content": ["ask 0", "good"]}}, ONE),
        # earlier turns as messages
        (
            {"prompt": "more", "completion": "good", "history": chat("ask 0", "ok")},
            later(0, "good"),
        ),
        ({"instruction": "", "input": "ask 0", "output": "good"}, ONE),
        ({"prompt": "ask 0", "chosen": ASK + GOOD, "rejected": ASK + BAD, "history": []}, TWO),
    ],
)
def test_forms(row, expected):
    rows, dropped = converted(row)
    assert rows == [expected]
    assert dropped == {}


@pytest.mark.parametrize(
    "options, row, expected",
    [
        (["--prompt=q", "--response=a"], {"q": "ask 0", "a": "good"}, ONE),
        (
            ["--prompt=q", "--chosen=a", "--rejected=b"],
            {"q": "ask 0", "a": "good", "b": "bad"},
            TWO,
        ),
        (
            ["--prompt=q", "--responses=a", "--scores=s"],
            {"q": "ask 0", "a": ["bad", "good"], "s": [0, 1]},
            plain(0, "good", "bad", scores=[1, 0]),
        ),
        (
            ["--prompt=q", "--response=a", "--scores=s"],
            {"q": "ask 0", "a": "good", "s": 4},
            plain(0, "good", scores=[4]),
        ),
        (["--messages=m", "--system=s"], {"m": ASK + GOOD, "s": "Be."}, ONE | {"system": "Be."}),
        (
            ["--chosen=chosen", "--rejected=rejected"],
            spin(0) | {"chosen": "a b", "rejected": "a c"},
            {"prompt": "a", "responses": [" b", " c"]},
        ),
        (
            ["--system=s"],
            {"prompt": "ask 0", "response": "good", "s": "Be."},
            ONE | {"system": "Be."},
        ),
        (["--prompt=q"], {"q": SYSTEM_ASK}, {"prompt": "ask 0", "system": "Be kind."}),
        (["--better=safer_response_id"], safe_rlhf(0), plain(0, "kind", "rude", scores=[1, 0])),
        (
            ["--prompt=prompt", "--response=completion"],
            {"prompt": "ask 0", "completion": "good", "label": True},
            ONE,
        ),
    ],
)
def test_columns_that_options_name(options, row, expected):
    rows, dropped = converted(row, *options)
    assert rows == [expected]
    assert dropped == {}


def test_a_sample_that_did_not_end_stays_one():
    """It must get no end-of-text, whatever its columns are called and wherever it is ranked."""
    rows, _ = converted({"prompt": "ask 0", "completion": "good", "ended": False})
    assert rows == [ONE | {"ended": [False]}]
    rows, _ = converted({"prompt": "ask 0", "completion": "good", "ended": True})
    assert rows == [ONE]
    named = ["--prompt=prompt", "--responses=a", "--scores=s"]
    row = {"prompt": "ask 0", "a": ["bad", "good"], "s": [0, 1], "ended": [False, None]}
    rows, _ = converted(row, *named)
    assert rows == [plain(0, "good", "bad", scores=[1, 0], ended=[True, False])]
    rows, _ = converted(row | {"ended": False}, *named)
    assert rows == [plain(0, "good", "bad", scores=[1, 0], ended=[False, False])]
    objects = [{"text": "bad", "rank": 2, "ended": False}, {"text": "good", "rank": 1}]
    rows, _ = converted({"prompt": "ask 0", "completions": objects})
    assert rows == [plain(0, "good", "bad", scores=[-1, -2], ended=[True, False])]
    rows, _ = converted({"prompt": "ask 0", "completions": objects, "ended": None})
    assert rows == [plain(0, "good", "bad", scores=[-1, -2], ended=[True, False])]

    rated = []
    for text, score, ended in (("a", 1, False), ("b", 3, True), ("c", 2, None), ("a", 0, True)):
        row = {"prompt": "ask 0", "response": text, "score": score, "ended": ended}
        rows, _ = converted(row, "--prompt=prompt", "--response=response", "--scores=score")
        rated += [row | {"group": "g"} for row in rows]
    assert rated[0]["ended"] == [False]
    three, all_of_them = rated[:3], rated
    expected = plain(0, "b", "c", "a", scores=[3, 2, 1], ended=[True, True, False], group="g")
    assert list(formats.merge_rated(copy.deepcopy(three), {})) == [expected]
    del expected["ended"]  # the same text has ended once
    assert list(formats.merge_rated(all_of_them, {})) == [expected]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss": False}])
@pytest.mark.parametrize("system", [None, "Be kind."])
def test_answers_without_a_loss_are_context(mark, system):
    messages = chat("a", "one", "b", "two", "c", "three")
    messages[1] |= mark
    messages[5] |= mark
    messages[3] |= dict.fromkeys(mark, True)
    if system:
        messages.insert(0, {"role": "system", "content": system})
    expected = {"prompt": "b", "responses": ["two"], "history": [["a", "one"]]}
    expected |= {"system": system} if system else {}
    for turns in ("all", "first", "last"):
        rows, dropped = converted({"messages": messages}, f"--turns={turns}")
        assert rows == [expected]
        assert dropped == {"answers that must have no loss (weight, train or loss)": 2}


def test_fields_of_messages_that_are_not_read_are_named():
    messages = [ASK[0] | {"name": "Ann"}, GOOD[0] | {"loss": True, "prefix": True, "name": "Bo"}]
    args = options_of()
    found = formats.recognise({"messages": messages}, "x:1", args)
    row = {"messages": messages, "id": 3}
    assert formats.unused_columns(found, row, args) == ["messages.name", "messages.prefix", "id"]
    lists = {"role": ["user", "assistant"], "content": ["a", "b"], "name": ["Ann", "Bo"]}
    assert formats.unused_columns(found, {"messages": lists}, args) == ["messages.name"]
    row = {"prompt": "a", "completion": GOOD[0] | {"trainable": False}}
    found = formats.recognise(row, "x:1", args)
    assert formats.unused_columns(found, row, args) == ["completion.trainable"]


@pytest.mark.parametrize("values", [(0, 1), (1, 2), (-1, 1), (True, False)])
def test_a_number_that_may_be_a_position_or_a_strength_is_not_used(values):
    options = ["--prompt=q", "--chosen=a", "--rejected=b", "--better=choice"]
    for value in values:
        rows, dropped = converted({"q": "q", "a": "A", "b": "B", "choice": value}, *options)
        assert rows == []
        assert f"rows whose choice is '{value}'" in next(iter(dropped))


def test_a_system_message_beside_turns_in_lists():
    rows, _ = converted(arena_55k(0) | {"system": "Be kind."})
    assert [row["system"] for row in rows] == ["Be kind."]


def test_turns_of_a_conversation():
    row = {"messages": chat("ask 0", "a", "q", "b", "r", "c")}
    assert [row["responses"] for row in converted(row)[0]] == [["a"], ["b"], ["c"]]
    first, dropped = converted(row, "--turns=first")
    assert first == [plain(0, "a")]
    assert dropped == {"turns that are not the first (--turns)": 2}
    last, dropped = converted(row, "--turns=last")
    assert last == [{"prompt": "r", "responses": ["c"], "history": [["ask 0", "a"], ["q", "b"]]}]
    assert dropped == {"turns that are not the last (--turns)": 2}


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"messages": []}, "conversations without a message"),
        ({"messages": None}, "conversations without a message"),
        (
            {"messages": chat("a", system=" ")[:0] + [{"role": "tool", "content": "x"}]},
            "the role 'tool'",
        ),
        ({"messages": GOOD + ASK}, "do not alternate"),
        ({"messages": ASK + ASK + GOOD}, "do not alternate"),
        ({"messages": ASK + GOOD + chat(system="Be.")}, "do not alternate"),
        (
            {"messages": [ASK[0], GOOD[0] | {"tool_calls": [{"id": 1}]}]},
            "conversations with tool_calls",
        ),
        ({"messages": [ASK[0], GOOD[0] | {"content": None}]}, "a message without a text"),
        ({"messages": ASK + GOOD, "tools": [{"name": "f"}]}, "rows with tools"),
        (
            {"messages": [ASK[0] | {"content": [{"type": "image"}]}, *GOOD]},
            "images or other parts",
        ),
        ({"messages": SYSTEM_ASK + GOOD, "system": "Be rude."}, "two different system messages"),
        (
            {"chosen": chat("a", "b", "c", "d"), "rejected": chat("a", "x", "c", "d")},
            "differ before their last message",
        ),
        ({"chosen": ASK + GOOD, "rejected": SYSTEM_ASK + BAD}, "differ before their last message"),
        ({"chosen": ASK, "rejected": ASK + BAD}, "do not end with the assistant"),
        ({"prompt": ASK, "completion": GOOD + ASK + GOOD}, "responses of several messages"),
        (
            {"prompt": chat("other"), "chosen": ASK + GOOD, "rejected": ASK + BAD},
            "do not begin with the prompt",
        ),
        ({"prompt": ASK + GOOD, "completion": "x"}, "prompts that do not end with the user"),
        ({"prompt": "ask 0", "chosen": "", "rejected": "bad"}, "an empty response"),
        ({"prompt": "ask 0", "chosen": None, "rejected": "bad"}, "rows without a response"),
        ({"prompt": None, "chosen": "good", "rejected": "bad"}, "rows without a prompt"),
        (
            {"prompt": " ", "chosen": "good", "rejected": "bad"},
            "prompt must be a string that is not",
        ),
        ({"prompt": "ask 0", "chosen": "good", "rejected": "good"}, "responses are equal"),
        ({"prompt": "ask 0", "completion": "\ud800"}, "lone surrogates"),
        ({"chosen": "blue", "rejected": "green"}, "pairs without a prompt"),
        ({"prompt": "ask 0", "completions": ["good"], "scores": [1]}, "two different responses"),
        ({"prompt": "ask 0", "completions": ["good", "bad"], "scores": [1]}, "a score for each"),
        ({"prompt": ASK, "responses": ["good", "bad"]}, "nothing says which response is better"),
        (arena_33k(0) | {"winner": "x"}, "rows whose winner is 'x'"),
        (safe_rlhf(0) | {"better_response_id": 2}, "rows whose better_response_id is '2'"),
        (help_steer3(0) | {"overall_preference": None}, "rows whose overall_preference is 'None'"),
        (arena_55k(0) | {"response_a": "[null]"}, "a message without a text"),
        (arena_55k(0) | {"response_a": "x"}, "malformed rows"),
        (
            help_steer2_preference(0) | {"preference_strength": math.nan},
            "preference_strength is 'nan'",
        ),
        (
            {"prompt": "q", "completion": "good", "history": [{"human": "a", "gpt": "b"}]},
            "history is neither messages",
        ),
        (
            {"prompt": "q", "completion": "good", "history": [["a", "b", "c"]]},
            "history is neither messages",
        ),
        ({"messages": ASK + GOOD, "history": [["a", "b"]]}, "a history beside a conversation"),
        (
            {"prompt": ASK, "completion": "good", "history": [["a", "b"]]},
            "a history beside a conversation",
        ),
        (
            {
                "prompt": "ask 0",
                "chosen": ASK + GOOD,
                "rejected": ASK + BAD,
                "history": [["a", "b"]],
            },
            "a history beside a conversation",
        ),
        (
            {"prompt": "Context. ask 0", "chosen": ASK + GOOD, "rejected": ASK + BAD},
            "prompt is not in their conversations",
        ),
        (
            {"prompt": "q", "chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "b"},
            "responses that are whole transcripts",
        ),
        ({"messages": [ASK[0], GOOD[0] | {"weight": 0}]}, "answers that must have no loss"),
        (
            {"prompt": "q", "completion": [GOOD[0] | {"train": False}]},
            "an answer whose train is False",
        ),
        ({"prompt": "q", "completion": [GOOD[0] | {"loss": 0}]}, "an answer whose loss is 0"),
        ({"messages": [ASK[0], GOOD[0] | {"reasoning": "so"}]}, "conversations with reasoning"),
        ({"messages": ASK + GOOD, "ended": False}, "conversations whose ended is false"),
        ({"messages": ASK + GOOD, "ended": [False]}, "conversations whose ended is false"),
        ({"messages": ASK + GOOD, "ended": 0.0}, "ended is not true or false"),
        ({"prompt": "q", "completion": "a", "ended": [True, True]}, "ended is not true or false"),
        ({"prompt": "q", "completion": "a", "ended": "no"}, "ended is not true or false"),
        ({"prompt": "q", "completion": "a", "ended": 0}, "ended is not true or false"),
    ],
)
def test_what_cannot_be_used_is_counted(row, reason):
    rows, dropped = converted(row)
    assert rows == []
    assert list(dropped.values()) == [1]
    assert reason in next(iter(dropped))


def test_parts_that_cannot_be_used_are_counted():
    row = {
        "prompt": "ask 0",
        "completions": ["a", " ", "a", "b", "c"],
        "scores": [1, 9, 2, 0, None],
    }
    rows, dropped = converted(row)
    assert rows == [plain(0, "a", "b", scores=[2, 0])]
    assert dropped == {
        "responses without a score": 1,
        "empty responses": 1,
        "responses that repeat a better one": 1,
    }
    rows, dropped = converted({"messages": chat("ask 0", "good", "more", " ", "on", "and")})
    assert rows == [ONE]
    assert dropped == {"turns from an empty one on": 2}


@pytest.mark.parametrize(
    "row, options, message",
    [
        (
            {"prompt": "a", "completion": "b", "label": True},
            [],
            "unpaired preference (KTO): a response",
        ),
        ({"prompt": "a", "completions": ["b"], "labels": [True]}, [], "steps of one response"),
        ({"prompt": "a", "chosen": "b"}, [], "preference pairs, and rejected is missing"),
        ({"x": 1, "y": 2}, [], "columns x, y. Name the columns"),
        ({"q": "a", "chosen": "b", "rejected": "c"}, [], "no column is known as their prompt"),
        ({"a": "b"}, ["--prompt=a", "--response=c"], "no column c; the columns are a"),
        ({"a": "b"}, ["--chosen=a"], "--chosen: give --messages"),
        ({"a": "b"}, ["--messages=a", "--prompt=a"], "--prompt, --messages: give --messages"),
        ({"messages": ASK}, ["--system=x"], "no column x; the columns are messages"),
        ({"messages": ASK}, ["--better=x"], "--better=x needs that column"),
    ],
)
def test_a_mistake_is_one_line(row, options, message):
    with pytest.raises(SystemExit) as error:
        converted(row, *options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_rated_responses_stay_together(tmp_path):
    """Also if each has a url of its own."""
    rows = []
    for i in range(20):
        rated = help_steer2(i) | {"prompt": f"ask {i // 2}", "response": f"r {i}"}
        rows.append(rated | {"url": f"u {i}"})
    lines = write_lines(tmp_path / "in.jsonl", rows)
    jsonl_prepare.main([lines, f"--out={tmp_path}/out", "--val_share=0.5"])
    written = read_rows(f"{tmp_path}/out/train.jsonl") + read_rows(f"{tmp_path}/out/val.jsonl")
    assert [len(row["responses"]) for row in written] == [2] * 10


def test_a_system_prompt_beside_our_own_columns(tmp_path):
    """Its other name is known here too. Of two the first one counts, and the other is named."""
    rows = []
    for i in range(9):
        rows.append({"prompt": f"q {i}", "response": "a", "system_prompt": "Be kind."})
    lines = write_lines(tmp_path / "in.jsonl", rows)
    jsonl_prepare.main([lines, f"--out={tmp_path}/out", "--val_share=0.5"])
    written = read_rows(f"{tmp_path}/out/train.jsonl") + read_rows(f"{tmp_path}/out/val.jsonl")
    assert [row["system"] for row in written] == ["Be kind."] * 9
    assert jsonl_prepare.ignored_fields(rows[0]) == []
    assert jsonl_prepare.ignored_fields(rows[0] | {"system": "x"}) == ["system_prompt"]


def test_a_first_row_is_shown_with_its_mask(tmp_path, capsys):
    row = dpo_mix(0) | {"prompt": "ask 0"}  # it repeats a message
    rows = [row, *(dpo_mix(i) for i in range(1, 9))]
    lines = write_lines(tmp_path / "in.jsonl", rows)
    jsonl_prepare.main([lines, f"--out={tmp_path}/out", "--val_share=0.5"])
    assert capsys.readouterr().out.splitlines()[:7] == [
        "recognised: preference pairs (chosen, rejected, prompt); not used: dataset, chosen_rating,"
        " rejected_rating",
        "the first row; a run's template goes around it:",
        "    system (no loss; the template must have {system}): 'Be kind.'",
        "    earlier prompt (no loss): 'ask 0'",
        "    earlier response (no loss): 'ok'",
        "    prompt (no loss): 'more'",
        "    response 1 (loss): 'good' + end of text",
    ]


def random_value(rng, depth=3):
    """What a column may hold by mistake."""
    texts = ["", " ", "a", "role", "user", "assistant", "\ud800", "[", "[" * 90_000, '["a"]']
    kind = rng.randrange(8 if depth else 4)
    if kind < 3:
        return rng.choice(texts)
    if kind == 3:
        return rng.choice([None, True, 0, 1, -1.5, float("nan"), float("inf"), 10**40])
    if kind == 4:
        return [random_value(rng, depth - 1) for _ in range(rng.randrange(3))]
    if kind == 5:
        keys = rng.sample(["role", "content", "from", "value", "text", "score", "rank", "x"], 3)
        return {key: random_value(rng, depth - 1) for key in keys}
    return chat("a", "b", "c")[: rng.randrange(4)]


@pytest.mark.parametrize("name", SETS)
def test_no_value_of_a_column_ends_the_command(name):
    """Every row makes rows that are well formed, or is counted."""
    rng = random.Random(name)
    make, _ = SETS[name]
    for i in range(100):
        row = make(i)
        for column in rng.sample(list(row), min(3, len(row))):
            row[column] = random_value(rng)
        try:
            rows, dropped = converted(row)
        except SystemExit as e:  # what kind of column it is decides on an implicit prompt
            assert "no column is known as their prompt" in str(e)
            continue
        assert rows or dropped
        for ranked_row in rows:
            check_row(ranked_row, "x")


def test_lines_in_other_forms_than_ours(tmp_path):
    """prompt and response are our own names too; as messages they are TRL's, and scores may have
    other names."""
    lines = []
    for i in range(9):
        lines.append({"prompt": f"ask {i}", "response": GOOD})
        lines.append({"prompt": chat(f"ask {i}"), "response": "good"})
        answers = [{"content": "bad", "rating": 1}, {"content": "good", "rating": 2}]
        lines.append({"prompt": f"ask {i}", "responses": answers})
        lines.append({"prompt": f"ask {i}", "responses": ["good", "bad"]})
    path = write_lines(tmp_path / "in.jsonl", lines)
    jsonl_prepare.main([path, f"--out={tmp_path}/out", "--val_share=0.4"])
    expected = []
    for i in range(9):
        expected += [plain(i, "good")] * 2 + [plain(i, "good", "bad")]
        expected.append(plain(i, "good", "bad", scores=[2, 1]))
    assert normal(rows_of(tmp_path / "out")) == normal(expected)


@pytest.mark.parametrize("options", [[], ["--chosen=chosen", "--rejected=rejected"]])
def test_texts_behind_messages_have_no_prompt_by_chance(tmp_path, capsys, options):
    """The columns are those of the first file. A common beginning is a prompt only if that is asked
    for."""
    messages, texts = [], []
    for i in range(9):
        pair = {"chosen": chat(f"ask {i}", "good"), "rejected": chat(f"ask {i}", "bad")}
        messages.append(pair | {"source": "x"})
        pair = {"chosen": f"I like cats {i}", "rejected": f"I hate dogs {i}"}
        texts.append(pair | {"source": "x"})
    first, second = (
        write_lines(tmp_path / name, lines) for name, lines in (("a", messages), ("b", texts))
    )
    jsonl_prepare.main([first, second, f"--out={tmp_path}/out", "--val_share=0.4", *options])
    prompts = [row["prompt"] for row in rows_of(tmp_path / "out")]
    printed = capsys.readouterr().out
    reason = "texts beside columns of which none is known as their prompt"
    assert (f"9 {reason}" in printed) == (not options)
    assert prompts.count("I") == (9 if options else 0)
    assert sum(prompt.startswith("ask") for prompt in prompts) == 9


# ---- the hub


def test_rated_responses_are_merged_where_a_chunk_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "CHUNK", 3)
    folder = write_set(tmp_path / "set", [help_steer2(i) for i in range(16)])
    hub_prepare.main([folder, f"--out={tmp_path}/out", "--val_share=0.4"])
    rows = rows_of(tmp_path / "out")
    assert [row["responses"] for row in rows] == [["good", "bad"]] * 8


def test_splits_are_chosen_by_their_names(tmp_path, capsys):
    folder = write_set(tmp_path / "set", [ultrafeedback_h4(i) for i in range(4)], "train_prefs")
    write_set(tmp_path / "set", [ultrafeedback_h4(i) for i in range(4, 7)], "test_prefs")
    write_set(tmp_path / "set", [ultrafeedback_h4(i) for i in range(9)], "train_sft")
    out = f"{tmp_path}/out"
    hub_prepare.main([folder, f"--out={out}"])
    printed = capsys.readouterr().out
    assert "split train_prefs; validation: split test_prefs; not read: train_sft" in printed
    assert "4 train rows, 3 val rows of 7 rows read; dropped: nothing" in printed
    other_splits = ["--train=train_sft", "--val=train_prefs"]
    with pytest.raises(SystemExit, match="4 validation rows whose group is in training too"):
        hub_prepare.main([folder, f"--out={out}", *other_splits])
    (tmp_path / "set" / "data" / "train_prefs-00000-of-00001.parquet").unlink()
    (tmp_path / "set" / "data" / "train_sft-00000-of-00001.parquet").unlink()
    write_set(tmp_path / "set", [spin(0)], "b")
    with pytest.raises(SystemExit, match="choose --train and --val of its splits: b, test_prefs"):
        hub_prepare.main([folder, f"--out={out}"])


def test_a_part_or_a_split_that_is_not_there_is_one_line(tmp_path):
    folder = write_set(tmp_path / "set", [spin(i) for i in range(9)], "train")
    for option, message in (
        ("--config=x", "has no x; --config is one of: default"),
        ("--train=x", "has no split x; it has train"),
        ("--val=x", "has no split x; it has train"),
        ("--val=train", "--train and --val are both train"),
    ):
        with pytest.raises(SystemExit, match=message):
            hub_prepare.main([folder, f"--out={tmp_path}/out", option])
    names = (
        "configs:\n- {config_name: a, data_files: data/*}\n- {config_name: b, data_files: data/*}\n"
    )
    (tmp_path / "set" / "README.md").write_text(f"---\n{names}---\n")
    with pytest.raises(SystemExit, match="several parts; choose one with --config: a, b"):
        hub_prepare.main([folder, f"--out={tmp_path}/out"])
    hub_prepare.main([folder, f"--out={tmp_path}/out", "--config=b", "--val_share=0.4"])
    assert len(rows_of(tmp_path / "out")) == 9


def test_a_branch_is_pinned_to_a_commit(tmp_path, monkeypatch):
    """org/name and org/name@branch are read at the commit that the hub gives, also when the branch
    has moved before the preparation goes on."""
    shas = {"main": "ab" * 20, "refs/pr/1": "cd" * 20}
    folder = write_set(tmp_path / "set", [spin(i) for i in range(16)])
    read_at = []

    class Api:
        def dataset_info(self, name, revision):
            assert name == "org/name"
            return types.SimpleNamespace(sha=shas[revision])

    open_split = hub.open_split

    def open_local(name, split, commit, *rest):
        read_at.append(commit)
        return open_split(folder, split, None, *rest)

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    for module in (hub, hub_prepare):
        monkeypatch.setattr(module, "open_split", open_local)
    monkeypatch.setattr(hub_prepare, "config_names", lambda name, commit: ["default"])
    monkeypatch.setattr(hub_prepare, "split_names", lambda name, config, commit: ["train"])
    for name, branch in (("org/name", "main"), ("org/name@refs/pr/1", "refs/pr/1")):
        read_at.clear()
        out = tmp_path / branch.replace("/", "_")
        hub_prepare.main([name, f"--out={out}", "--val_share=0.4"])
        assert set(read_at) == {shas[branch]}
        assert read_json(f"{out}/meta.json")["source"] == f"org/name @ {shas[branch]}"

    read_at.clear()
    out = tmp_path / "killed"
    command = ["org/name@main", f"--out={out}", "--val_share=0.4"]
    monkeypatch.setattr(hub, "CHUNK", 5)
    with monkeypatch.context() as patch:
        patch.setattr(hub, "append_pieces", killing(hub.append_pieces, at=2))
        with pytest.raises(Killed):
            hub_prepare.main(command)
    shas["main"] = "ef" * 20
    hub_prepare.main(command)
    assert set(read_at) == {"ab" * 20}
    assert normal(rows_of(out)) == normal(rows_of(tmp_path / "main"))
    with pytest.raises(SystemExit, match="give one of them"):
        hub_prepare.main(["org/name@a", "--revision=b", f"--out={out}"])


def test_a_set_with_its_own_command_names_it(tmp_path):
    for name, module in hub_prepare.OWN.items():
        with pytest.raises(SystemExit, match=f"python -m data.{module}.prepare --out="):
            hub_prepare.main([name, f"--out={tmp_path}/out"])
        with open(f"data/{module}/prepare.py", encoding="utf-8") as f:
            assert f'"{name}"' in f.read()


def test_prompts_alone(tmp_path, capsys):
    folder = write_set(tmp_path / "set", [{"prompt": f"ask {i}"} for i in range(9)])
    with pytest.raises(SystemExit, match="--prompt= alone is for prompts whose responses will be"):
        hub_prepare.main([folder, f"--out={tmp_path}/out"])
    hub_prepare.main([folder, f"--out={tmp_path}/out", "--prompt=prompt", "--val_share=0.4"])
    assert "    prompt (no loss): 'ask 0'" in capsys.readouterr().out
    rows = read_rows(f"{tmp_path}/out/val.jsonl", prompt_only=True)
    assert rows[0] == {"prompt": rows[0]["prompt"], "group": rows[0]["prompt"]}


def test_files_as_publishers_have_them(tmp_path):
    """One JSON array (OpenHermes), and .jsonl.gz for each split (HelpSteer2)."""
    (tmp_path / "array").mkdir()
    rows = [open_hermes(i) for i in range(NUM_ROWS)]
    (tmp_path / "array" / "openhermes2_5.json").write_text(json.dumps(rows, indent=2))
    hub_prepare.main([f"{tmp_path}/array", f"--out={tmp_path}/a", "--val_share=0.4"])
    expected = expected_rows(SETS["teknium/OpenHermes-2.5"][1])
    assert normal(rows_of(tmp_path / "a")) == normal(expected)
    (tmp_path / "gz").mkdir()
    for split, numbers in (("train", range(12)), ("validation", range(12, 16))):
        with gzip.open(f"{tmp_path}/gz/{split}.jsonl.gz", "wt") as f:
            f.writelines(json.dumps(help_steer2(i)) + "\n" for i in numbers)
    hub_prepare.main([f"{tmp_path}/gz", f"--out={tmp_path}/g"])
    assert len(read_rows(f"{tmp_path}/g/train.jsonl")) == 6
    assert len(read_rows(f"{tmp_path}/g/val.jsonl")) == 2


def test_whole_texts_are_for_another_command(tmp_path):
    folder = write_set(tmp_path / "set", [{"text": f"text {i}"} for i in range(9)])
    with pytest.raises(SystemExit, match="for pretraining: python -m data.fineweb.prepare --hub="):
        hub_prepare.main([folder, f"--out={tmp_path}/out"])
