"""arithmetic.py: the sums and word problems that are made here."""

import re
from itertools import accumulate

import pytest

from plumbing import arithmetic, data
from verify import verify

SETS = (
    "words",
    "words:2",
    "words:1:20",
    "words:4:4",
    "words-test",
    "words-test:2:20",
    "sums",
    "sums-test",
    "sums-long",
)


def solve(text):
    """The answer of a word problem, read off its text alone."""
    begins, *rest = re.split(r" and |\. Then |\. How", text, maxsplit=1)
    rest = rest[0] if rest else ""
    value = int(re.search(r"\d+", begins)[0])
    if " boxes with " in begins:
        value *= int(re.findall(r"\d+", begins)[1])
    for phrase in re.split(r"\. Then |\. ", rest):
        for n in map(int, re.findall(r"\d+", phrase)):
            if "times as many" in phrase:
                value *= n
            elif "equal" in phrase or "equally" in phrase:
                assert value % n == 0
                value //= n
            elif " more" in phrase:
                value += n
            else:
                assert " of them" in phrase
                value -= n
        assert value > 0
    return value


@pytest.mark.parametrize("name", SETS)
def test_answers_are_right_and_texts_are_clean(name):
    problems = arithmetic.problems(name)
    assert len(problems) == (arithmetic.TEST if "-" in name else arithmetic.TRAIN)
    for question, answer in problems:
        assert verify(f"\\boxed{{{answer}}}", answer)
        if name.startswith("sums"):
            more = "{4}" if name == "sums-long" else "{2,3}"
            assert re.fullmatch(rf"[1-9]([+-][1-9]){more}", question)
            sums = list(accumulate(map(int, re.findall(r"[+-]?\d", question))))
            assert min(sums) >= 0 and sums[-1] == int(answer)
        else:
            assert solve(question) == int(answer) > 0, question
            assert question.endswith(("now?", "in all?")) and not re.search(
                r"[{}]|  |\b1\b", question
            )
    if name.startswith("words"):
        assert len({question for question, _ in problems}) == len(problems)


@pytest.mark.parametrize(
    "name, operations, largest",
    [("words", 1, 9), ("words:2", 2, 9), ("words:1:20", 1, 20), ("words-test:3:100", 3, 100)],
)
def test_difficulty_is_the_number_of_operations_and_the_largest_number(name, operations, largest):
    seen = set()
    for question, _ in arithmetic.problems(name):
        numbers = [int(n) for n in re.findall(r"\d+", question)]
        assert len(numbers) == operations + 1 and max(numbers) <= largest
        seen |= set(numbers)
    assert seen == set(range(2, largest + 1))


def test_all_four_operations_occur_in_a_few_dozen_wordings():
    wordings = set()
    counts = dict.fromkeys("+-*/", 0)
    for question, answer in arithmetic.problems("words"):
        a, b = map(int, re.findall(r"\d+", question))
        for operation, value in (("+", a + b), ("-", a - b), ("*", a * b), ("/", a / b)):
            counts[operation] += value == int(answer)
        wordings.add(
            re.sub(r"\d+|^\w+|^A \w+|has \d+ \w+|How many \w+|does (the )?\w+", "", question)
        )
    assert min(counts.values()) > 200
    assert len(wordings) > 24


def test_held_out_parts_are_disjoint_from_all_that_is_trained_on():
    train, test = set(), set()
    for name in SETS:
        (test if "-" in name else train).update(q for q, _ in arithmetic.problems(name))
    assert not train & test and len(test) > 1000
    assert all(map(arithmetic.is_held_out, test)) and not any(map(arithmetic.is_held_out, train))


def test_the_sets_are_the_same_for_everybody():
    """A change of these breaks the resume of every run on them, and comparisons with other
    people's."""
    prints = {
        name: data.fingerprint(data.load_problems(name))[:16]
        for name in ("words", "words:2:20", "sums")
    }
    assert prints == {
        "words": "c8917ae89e83252c",
        "words:2:20": "926f1581023e982e",
        "sums": "a93c75412d767d64",
    }


def test_other_names_and_difficulties():
    for name in ("math500", "word", "words2", "wordss", "sums-tests", "sums/test", "x/words:1"):
        assert arithmetic.problems(name) is None
    for name in (
        "words:",
        "words:0",
        "words:5",
        "words:1:3",
        "words:1:1001",
        "words:x",
        "words:1:20:3",
        "sums:2",
        "words-long",
    ):
        with pytest.raises(
            FileNotFoundError, match=r"words\[:operations\[:largest number\]\]"
        ) as e:
            arithmetic.problems(name)
        assert name in str(e.value)
