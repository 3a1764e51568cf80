"""The scorers of data/: addition, countdown, GSM8K; and the rows of countdown."""

import ast
import random
import re
import time
from collections import Counter
from fractions import Fraction

import pytest
from conftest import command

from data.addition import scorer as addition
from data.countdown import prepare as countdown_prepare
from data.countdown.prepare import draw_problem
from data.countdown.scorer import MAX_DEPTH, MAX_LENGTH, evaluate, reaches, tokenize
from data.folder import read_meta
from data.gsm8k import scorer as gsm8k
from data.rows import read_rows

SUM = {"prompt": "What is 347 + 58?"}
COUNTDOWN = {"prompt": "Reach 24 with 3, 8, 4, 4."}
SOLUTION = "8 * 3 + 4 - 4"
GSM8K = {"prompt": "How many?", "responses": ["1,200 + 34 = 1,234\n#### 1,234"]}

# for every scorer: nothing of this is right, and nothing raises
HOSTILE = [
    "",
    " ",
    "\x00",
    "\ud800",
    "٤٠٥",
    "4" * 10**6,
    "(" * 10**6,
    "#" * 10**6,
    "#### " * 10**5,
    "-" * 10**5 + "1",
    "9**9**9**9",
    "__import__('os').abort()",
    "1e400",
    "nan",
    "####",
    "#### -",
    "#### ,.,",
]


def random_texts(n):
    """Texts of random bytes, and of random characters that expressions are made of."""
    rng = random.Random(0)
    alphabet = b"0123456789+-*/()# .,"
    texts = []
    for i in range(n):
        data = rng.randbytes(rng.randrange(300))
        if i % 2:
            data = bytes(alphabet[byte % len(alphabet)] for byte in data)
        texts.append(data.decode(errors="replace"))
    return texts


@pytest.mark.parametrize(
    "score, row",
    [(addition.exact_match, SUM), (reaches, COUNTDOWN), (gsm8k.exact_match, GSM8K)],
)
def test_no_text_raises_or_takes_long(score, row):
    for text in HOSTILE:
        start = time.perf_counter()
        assert score(row, text) == 0.0
        assert time.perf_counter() - start < 0.5, text[:20]
    start = time.perf_counter()
    scores = [score(row, text) for text in random_texts(2000)]
    assert time.perf_counter() - start < 2.0  # 1 ms each
    assert set(scores) == {0.0}


# ---- addition


@pytest.mark.parametrize("text", ["405", " 405", "405\n", "\t405 "])
def test_a_right_sum(text):
    score = addition.exact_match(SUM, text)
    assert type(score) is float and score == 1.0


@pytest.mark.parametrize(
    "text",
    ["404", "0405", "+405", "405.", "405.0", "4 05", "4_05", "405 405", "４０５", "347 + 58"],
)
def test_a_wrong_sum(text):
    assert addition.exact_match(SUM, text) == 0.0


def test_a_sum_needs_no_response_and_reads_none():
    assert addition.exact_match(SUM | {"responses": ["1"]}, "405") == 1.0
    assert addition.exact_match({"prompt": f"What is {2**61} + {2**61}?"}, str(2**62)) == 1.0


def test_every_row_of_addition_is_right(tmp_path):
    done = command("data.addition.prepare", "--rows=200", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    for row in read_rows(f"{tmp_path}/train.jsonl"):
        text = row["responses"][0]
        assert addition.exact_match({"prompt": row["prompt"]}, text) == 1.0
        assert addition.exact_match({"prompt": row["prompt"]}, f"1{text}") == 0.0


@pytest.mark.parametrize("prompt", ["What is 1 - 2?", "What is 1 + 2", "what is 1 + 2?", "", "1"])
@pytest.mark.parametrize("score", [addition.exact_match, reaches])
def test_a_prompt_of_other_data_is_an_error(score, prompt):
    with pytest.raises(ValueError, match="not a prompt of data/(addition|countdown): ") as error:
        score({"prompt": prompt}, "3")
    assert "\n" not in str(error.value)


# ---- GSM8K


@pytest.mark.parametrize(
    "text",
    ["#### 1234", "so it is\n####1,234.", "#### 1\n#### 1234", "#### 1,234 apples", " 1234 "],
)
def test_a_right_answer(text):
    score = gsm8k.exact_match(GSM8K, text)
    assert type(score) is float and score == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "#### 1235",
        "#### -1234",
        "#### 1234\n#### 1",
        "### 1234",
        "it is 1234",
        "#### ١٢٣٤",
        "1,234",
    ],
)
def test_a_wrong_answer(text):
    assert gsm8k.exact_match(GSM8K, text) == 0.0


def test_a_negative_answer():
    row = {"prompt": "p", "responses": ["#### -5", "#### 7"]}
    assert gsm8k.exact_match(row, "#### -5") == 1.0
    assert gsm8k.exact_match(row, "#### 7") == 0.0  # only the best response counts


@pytest.mark.parametrize(
    "reference, right, wrong",
    [
        ("#### 1. Apples\n#### 2. Pears", " #### 1. Apples\n#### 2. Pears\n", "#### 2. Other"),
        ("#### Answer\n5", "#### Answer\n5", "#### 5"),
        ("#### 1\nso it is", "#### 1\nso it is", "#### 1"),
        ("#### ,", "#### ,", "#### ."),
        ("#### 2 apples", "#### 2 apples", "#### 2"),
        ("405", " 405 ", "#### 405"),
        ("1 + 6\n#### 1,234.\n", "#### 2\n####1234", "1,234"),
    ],
)
def test_only_a_last_line_with_a_number_is_a_number(reference, right, wrong):
    """Other lines that begin with #### are headings of Markdown."""
    assert gsm8k.same_answer(right, reference)
    assert not gsm8k.same_answer(wrong, reference)
    row = {"prompt": "p", "responses": [reference]}
    assert (gsm8k.exact_match(row, right), gsm8k.exact_match(row, wrong)) == (1.0, 0.0)


@pytest.mark.parametrize("more", [{}, {"responses": []}, {"responses": [None, "#### 1"]}])
def test_a_row_without_an_answer_is_an_error(more):
    with pytest.raises(ValueError, match="a row without responses has no answer: 'How many?"):
        gsm8k.exact_match({"prompt": "How many?"} | more, "#### 1")


# ---- countdown: the checker


@pytest.mark.parametrize(
    "text",
    [
        SOLUTION,
        " 8*3+4-4\n",
        "(((8 * 3)) + (4 - 4))",
        "4 - 4 + 3 * 8",
        "3 * (8 + 4 - 4)",
        "4 - (4 - 3 * 8)",  # a partial result below 0
        "8 / (4 / (4 * 3))",  # a fraction
    ],
)
def test_a_right_expression(text):
    score = reaches(COUNTDOWN, text)
    assert type(score) is float and score == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "8 * 3",  # numbers left out
        "8 * 3 + 4 - 4 + 4 - 4",  # used too often
        "24",
        "8 * 3 * 4 - 4",  # another value
        f"{SOLUTION} = 24",
        f"= {SOLUTION}",
        f"{SOLUTION}.",
        f"-(4 - {SOLUTION} - 4)",
        "4 + -4 + 8 * 3",
        "+8 * 3 + 4 - 4",
        "8 * 3 + 4 / (4 - 4)",
        "4 - 4 / (8 * 3 - 24)",
        "8 * 3 + (4 - 4",
        "8 * 3) + 4 - 4",
        "8 * 3 + () 4 - 4",
        "8 3 4 4",
        "8 * 3 + 4 4",
        "(8)(3) + 4 - 4",
        "8 ** 3 + 4 - 4",
        "8 // 3 + 4 - 4",
        "08 * 3 + 4 - 4",
        "8.0 * 3 + 4 - 4",
        "8 × 3 + 4 − 4",
        "８ * 3 + 4 - 4",
        "8 * 3\n+ 4 - 4",
        "8 * 3 + 4 - 4 # right",
    ],
)
def test_a_wrong_expression(text):
    assert reaches(COUNTDOWN, text) == 0.0


def test_numbers_are_not_joined_from_digits():
    row = {"prompt": "Reach 35 with 34, 1."}
    assert reaches(row, "34 + 1") == 1.0
    assert reaches(row, "31 + 4") == 0.0
    assert reaches({"prompt": "Reach 35 with 3, 41."}, "34 + 1") == 0.0


def test_division_by_zero():
    row = {"prompt": "Reach 3 with 3, 4, 4."}
    assert reaches(row, "3 / (4 - 4)") == 0.0
    assert reaches(row, "3 - (4 - 4)") == 1.0


def test_only_a_parenthesis_closes_a_parenthesis():
    row = {"prompt": "Reach 24 with 3, 8, 5."}
    for text in ("(8 * 3 5", "(8 * 3 5)", "(8 * 3 (", "((8 * 3 5 )", "(8 * 3 ( 5"):
        assert reaches(row, text) == 0.0, text


def test_limits_of_length_and_depth():
    room = MAX_LENGTH - len(SOLUTION)
    assert reaches(COUNTDOWN, SOLUTION + " " * room) == 1.0
    assert reaches(COUNTDOWN, SOLUTION + " " * (room + 1)) == 0.0
    assert reaches(COUNTDOWN, "(" * MAX_DEPTH + SOLUTION + ")" * MAX_DEPTH) == 1.0
    deeper = MAX_DEPTH + 1
    assert reaches(COUNTDOWN, "(" * deeper + SOLUTION + ")" * deeper) == 0.0


def test_the_target_is_exact():
    row = {"prompt": "Reach 1 with 1, 3, 1, 3, 1, 3."}
    assert reaches(row, "1 / 3 + 1 / 3 + 1 / 3") == 1.0
    big = 10**17
    row = {"prompt": f"Reach {big} with {big}, 1, {big}."}
    assert reaches(row, f"{big} + 1 / {big}") == 0.0  # equal as floats


# ---- countdown: the checker against Python's own parser


def reference_value(text):
    """The value of an expression in exact fractions, by Python's parser; None: it has none."""
    operations = {
        ast.Add: lambda a, b: a + b,
        ast.Sub: lambda a, b: a - b,
        ast.Mult: lambda a, b: a * b,
        ast.Div: lambda a, b: a / b,
    }

    def value(node):
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        return operations[type(node.op)](value(node.left), value(node.right))

    try:
        return value(ast.parse(text.strip(), mode="eval").body)
    except ZeroDivisionError:
        return None


def random_expression(rng, numbers):
    """A random expression over the numbers in this order, often with needless parentheses."""
    if len(numbers) == 1:
        text = str(numbers[0])
    else:
        cut = rng.randrange(1, len(numbers))
        left = random_expression(rng, numbers[:cut])
        right = random_expression(rng, numbers[cut:])
        space = rng.choice(["", " "])
        text = f"{left}{space}{rng.choice('+-*/')}{space}{right}"
    return f"({text})" if rng.random() < 0.4 else text


def test_values_are_those_of_pythons_parser():
    rng = random.Random(1)
    num_right, num_undefined = 0, 0
    for _ in range(3000):
        below = rng.choice([3, 10])  # equal numbers give differences of 0
        numbers = [rng.randrange(1, below) for _ in range(rng.randrange(1, 7))]
        text = random_expression(rng, numbers)
        expected = reference_value(text)
        given = ", ".join(map(str, rng.sample(numbers, len(numbers))))
        target = rng.randrange(1, 30)
        if expected is None:
            num_undefined += 1
            with pytest.raises(ZeroDivisionError):
                evaluate(tokenize(text))
        else:
            assert evaluate(tokenize(text)) == expected, text
            if expected >= 1 and expected.denominator == 1 and rng.random() < 0.5:
                target = int(expected)
        is_right = expected == target
        num_right += is_right
        assert reaches({"prompt": f"Reach {target} with {given}."}, text) == is_right, text
    assert num_right > 300 and num_undefined > 20


def test_damaged_expressions():
    """One character of a right expression is dropped, doubled or replaced. It is still right only
    if Python reads an expression of the same numbers and value."""
    rng = random.Random(2)
    alphabet = "0123456789+-*/() "
    num_right = 0
    for _ in range(3000):
        given, target, text = draw_problem(rng, 4, 20)
        at = rng.randrange(len(text))
        damaged = text[:at] + rng.choice(["", text[at] * 2, rng.choice(alphabet)]) + text[at + 1 :]
        row = {"prompt": f"Reach {target} with {', '.join(map(str, given))}."}
        expected = is_solution(damaged, given, target)
        num_right += expected
        assert reaches(row, damaged) == expected, damaged
    assert 30 < num_right < 2000


def is_solution(text, given, target):
    """Whether Python reads a text as binary operations on the given numbers with this value."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError:
        return False
    nodes = list(ast.walk(tree))
    numbers = [node.value for node in nodes if isinstance(node, ast.Constant)]
    kinds = {type(node) for node in nodes}
    allowed = {ast.Expression, ast.Constant, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div}
    if not kinds <= allowed or Counter(numbers) != Counter(given):
        return False
    return reference_value(text) == target


# ---- countdown: the rows


@pytest.fixture(scope="module")
def countdown(tmp_path_factory):
    out = tmp_path_factory.mktemp("countdown")
    countdown_prepare.main(["--rows=3000", "--numbers=3", "--below=10", f"--out={out}"])
    return out


def test_rows_are_solved_by_their_responses(countdown):
    sides = {side: read_rows(f"{countdown}/{side}.jsonl") for side in ("train", "val")}
    meta = read_meta(str(countdown), ["train.jsonl", "val.jsonl"])
    assert meta["tokenizer"] == "bytes"
    assert meta["train_rows"] == len(sides["train"]) and meta["val_rows"] == len(sides["val"])
    rows = sides["train"] + sides["val"]
    assert len(rows) > 1000
    for row in rows:
        (text,) = row["responses"]
        assert reaches({"prompt": row["prompt"]}, text) == 1.0, row
        assert reaches({"prompt": row["prompt"]}, f"{text} + 1") == 0.0
    assert len({row["prompt"] for row in rows}) == len(rows)


def test_orders_of_the_same_numbers_are_one_group(countdown):
    """No problem is on both sides of the split, not even in another order."""
    groups = {}
    for side in ("train", "val"):
        groups[side] = set()
        for row in read_rows(f"{countdown}/{side}.jsonl"):
            target, *given = map(int, row["prompt"][6:-1].replace(" with", ",").split(","))
            assert row["group"] == f"{target}: {sorted(given)}"
            assert 1 <= target <= 100 and len(given) == 3 and 1 <= min(given) <= max(given) < 10
            groups[side].add(row["group"])
    assert not groups["train"] & groups["val"]


@pytest.mark.parametrize("numbers, below", [(2, 10), (3, 20), (4, 10), (8, 1000)])
def test_a_solution_is_in_canonical_form(numbers, below):
    """As Python writes it, and without parentheses that its value does not need."""
    rng = random.Random(3)
    for _ in range(300):
        given, target, text = draw_problem(rng, numbers, below)
        assert reference_value(text) == target and len(text) <= MAX_LENGTH
        assert text == ast.unparse(ast.parse(text))
        # two kinds that Python would keep: a + (b - c), a * (b / c)
        assert not re.search(r"\+ \([^()]*\)(?! [*/])", text), text
        assert not re.search(r"\* \([0-9]+( [*/] [0-9]+)*\)", text), text
        assert sorted(int(token) for token in tokenize(text) if token.isdigit()) == sorted(given)


def test_all_operators_and_parentheses_are_in_the_rows(countdown):
    counts = Counter()
    for row in read_rows(f"{countdown}/train.jsonl"):
        counts.update(set(row["responses"][0]) & set("+-*/("))
    assert all(counts[c] > 50 for c in "+-*/("), counts


def test_preparing_again_writes_the_same_bytes(countdown, tmp_path):
    done = command(
        "data.countdown.prepare", "--rows=3000", "--numbers=3", "--below=10", f"--out={tmp_path}"
    )
    assert done.returncode == 0, done.stderr
    for name in ("train.jsonl", "val.jsonl", "meta.json"):
        assert (tmp_path / name).read_bytes() == (countdown / name).read_bytes()
    more = ["--rows=3000", "--numbers=4", "--below=10", f"--out={tmp_path}"]
    countdown_prepare.main(more)
    assert (tmp_path / "val.jsonl").read_bytes() != (countdown / "val.jsonl").read_bytes()


def test_max_target(tmp_path):
    countdown_prepare.main(["--rows=300", "--max_target=7", f"--out={tmp_path}"])
    for row in read_rows(f"{tmp_path}/train.jsonl"):
        assert int(row["prompt"].split()[1]) <= 7


@pytest.mark.parametrize("option", ["--numbers=1", "--below=1", "--max_target=0", "--rows=0"])
def test_ranges_of_options(option):
    with pytest.raises(SystemExit, match="must be at least"):
        countdown_prepare.main([option])


def test_other_data_and_runs_are_not_overwritten(tmp_path):
    (tmp_path / "train.bin").write_bytes(b"abcd")
    with pytest.raises(SystemExit, match="is of an earlier preparation"):
        countdown_prepare.main([f"--out={tmp_path}"])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="would be a file of a run"):
        countdown_prepare.main([f"--out={tmp_path}"])
