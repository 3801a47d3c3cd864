"""Problems that are made here, the same ones everywhere, for any model and without a network.

    sums              7+8-5                             three or four numbers from 1 to 9
    sums-long         7+8-5+6-2                         five: none to train on is as long
    words             Tom has 3 apples and buys 5 more. How many apples does Tom have now?
    words:2           two operations, one after the other
    words:1:20        the numbers in the text go up to 20, not 9
    sums-test, words-test:2           the held-out part: never among the problems to train on

One question in ten, by a hash of its text, is held out, so that no seed, size or difficulty can
bring the two together.
"""

import random
import re
import zlib

TRAIN, TEST = 4096, 512  # problems in a set
MOST_OPERATIONS, LEAST_NUMBER, MOST_NUMBER = 4, 4, 1000

NAMES = "Tom Anna Ben Clara David Emma Felix Grace Hugo Ida Jack Lena Max Nora Omar Rosa".split()
# Each story: who (None is a name), what there is, how it begins, what may then happen by
# operation. {n} is the number.
STORIES = [
    {
        "who": None,
        "things": "apples books buttons cards coins marbles pencils shells stamps stickers".split(),
        "begins": "{who} has {n} {things}",
        "+": ["buys {n} more", "finds {n} more", "wins {n} more", "gets {n} more from a friend"],
        "-": ["gives {n} of them away", "loses {n} of them", "sells {n} of them"],
        "*": [
            "buys so many more that there are {n} times as many",
            "goes on collecting until there are {n} times as many",
        ],
        "/": [
            "puts them into {n} equal piles and keeps only one pile",
            "sorts them into {n} equal rows and sells all rows but one",
            "packs them equally into {n} bags and gives away all bags but one",
        ],
    },
    {
        "who": "the shop",
        "things": "cups hats kites lamps pens plates scarves umbrellas".split(),
        "begins": "A shop has {n} {things}",
        "+": ["orders {n} more", "gets a delivery of {n} more"],
        "-": ["sells {n} of them", "sends {n} of them back"],
        "*": ["orders so many more that there are {n} times as many"],
        "/": ["divides them equally among {n} branches and keeps the share of one branch"],
    },
    {
        "who": "the farmer",
        "things": "cows ducks geese goats hens rabbits sheep".split(),
        "begins": "A farmer has {n} {things}",
        "+": ["buys {n} more at the market", "takes in {n} more from a neighbour"],
        "-": ["sells {n} of them", "gives {n} of them to a neighbour"],
        "*": ["has {n} times as many a year later"],
        "/": ["parts them into {n} equal flocks and sells all flocks but one"],
    },
    {
        "who": "the teacher",
        "things": "balls brushes crayons notebooks rulers".split(),
        "begins": "A teacher has {n} {things}",
        "+": ["brings {n} more", "is given {n} more"],
        "-": ["hands out {n} of them", "throws {n} of them away"],
        "*": ["orders so many more that there are {n} times as many"],
        "/": ["lays them out equally on {n} tables and clears away all tables but one"],
    },
]
# another beginning, for a product
BOXES = "{who} has {n} boxes with {m} {things} in each"


def is_held_out(question) -> bool:
    return zlib.crc32(question.encode()) % 10 == 0


def draw_sum(rng, held_out=False, lengths=(3, 4)):
    """Signed numbers from 1 to 9 such as [7, 8, -5], whose sums from the left are never negative: a
    question that is held out, or one that is not."""
    while True:
        numbers = [rng.randint(1, 9)]
        for _ in range(rng.choice(lengths) - 1):
            n = rng.randint(1, 9)
            negative = rng.random() < 0.5 and n <= sum(numbers)
            numbers.append(-n if negative else n)
        if is_held_out(sum_text(numbers)) == held_out:
            return numbers


def sum_text(numbers) -> str:
    return str(numbers[0]) + "".join(f"{n:+d}" for n in numbers[1:])


def sums(n, seed, held_out=False, lengths=(3, 4)):
    """n sums as (question, answer); some occur twice."""
    rng = random.Random(f"{seed} {held_out}")
    drawn = [draw_sum(rng, held_out, lengths) for _ in range(n)]
    return [(sum_text(numbers), str(sum(numbers))) for numbers in drawn]


def happening(rng, value, largest):
    """(operation, number, result): a number from 2 to `largest` that takes `value` to a whole
    number from 1 on.

    Products stop at ten times the largest number, and nothing is divided by itself; an addition
    takes their place.
    """
    operation, numbers = rng.choice("+-*/"), range(2, largest + 1)
    fits = {
        "+": numbers,
        "-": range(2, min(largest, value - 1) + 1),
        "*": range(2, min(largest, 10 * largest // value) + 1),
        "/": [n for n in numbers if n < value and value % n == 0],
    }
    operation = operation if fits[operation] else "+"
    n = rng.choice(fits[operation])
    result = {"+": value + n, "-": value - n, "*": value * n, "/": value // n}
    return operation, n, result[operation]


def story(rng, operations, largest):
    """A word problem as (question, answer)."""
    plot = rng.choice(STORIES)
    who, things = plot["who"] or rng.choice(NAMES), rng.choice(plot["things"])
    first = value = rng.randint(2, largest)
    text = plot["begins"].format(who=who, n=first, things=things)
    for i in range(operations):
        operation, n, value = happening(rng, value, largest)
        phrase = rng.choice(plot[operation]).format(n=n)
        boxed = i == 0 and operation == "*" and plot["who"] is None and rng.random() < 0.5
        if boxed:
            text = BOXES.format(who=who, n=first, m=n, things=things)
        else:
            text += f" and {phrase}" if i == 0 else f". Then {who} {phrase}"
    still = "in all" if boxed and operations == 1 else "now"
    return f"{text}. How many {things} does {who} have {still}?", str(value)


def words(n, seed, held_out=False, operations=1, largest=9):
    """n different word problems as (question, answer)."""
    rng = random.Random(f"words {seed} {held_out}")
    drawn = {}
    while len(drawn) < n:
        text, answer = story(rng, operations, largest)
        if is_held_out(text) == held_out:
            drawn[text] = answer
    return list(drawn.items())


def problems(name):
    """The (question, answer) pairs of a set named as at the top of this file; None where the name
    is not of that kind.

    Raises FileNotFoundError for a difficulty that there is not.
    """
    found = re.fullmatch(r"(sums|words)(-test|-long)?(?::(\d{1,4}))?(?::(\d{1,4}))?(:.*)?", name)
    if not found:
        return None
    kind, part, operations, largest, rest = found.groups()
    n, difficult = TEST if part else TRAIN, operations or rest
    if kind == "sums" and not difficult:
        return sums(n, 0, bool(part), lengths=(5,) if part == "-long" else (3, 4))
    operations, largest = int(operations or 1), int(largest or 9)
    known = 1 <= operations <= MOST_OPERATIONS and LEAST_NUMBER <= largest <= MOST_NUMBER
    if kind == "words" and known and not rest and part != "-long":
        return words(n, 0, bool(part), operations, largest)
    raise FileNotFoundError(
        f"there is no set {name!r}; sums has no difficulty, that of words is "
        f"words[:operations[:largest number]], as words:2:20: up to {MOST_OPERATIONS} operations "
        f"and numbers up to something from {LEAST_NUMBER} to {MOST_NUMBER:,}"
    )
