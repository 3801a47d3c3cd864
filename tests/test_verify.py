"""The verifier: own cases for every policy, properties on any text, hostile inputs, and the real
gold answers where they are."""

import json
import multiprocessing
import pathlib
import random
import re
import threading
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import verify
from plumbing import exact
from plumbing.hendrycks import hendrycks
from verify import equal, extract, grade

CASES = [
    json.loads(line)
    for line in (pathlib.Path(__file__).parent / "verify_cases.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()
]


# ---------------------------------------------------------------- own cases

# right answers that are beyond the verifier
MISSED = [
    # nested roots, and angles whose cosine is one
    r"\sqrt{3+2\sqrt{2}}",
    r"\cot 22.5^\circ",
    r"\sqrt{7-4\sqrt{3}}",
    r"\sqrt[3]{2+\sqrt{5}}+\sqrt[3]{2-\sqrt{5}}",
    r"\sqrt{5+2\sqrt{6}}",
    r"\cos(\arctan(3/4))",
    r"\frac{7}{32}",  # for 7:32, which may be a time
    "3",  # for 3 PM
    "y-2x=3",  # for f(x) = 2x + 3
    r"5\text{ cm}^2",  # for 5 square units
]


def test_own_cases():
    """Every case as a careful reader would decide it, but for the listed right answers that are
    missed."""
    wrong = [
        (case, verdict)
        for case in CASES
        if (verdict := grade(case["response"], case["gold"])).correct != case["expected"]
    ]
    assert len(CASES) >= 1100 and sum(not case["expected"] for case in CASES) >= 500
    assert [verdict.extracted for case, verdict in wrong if case["expected"]] == MISSED and len(
        wrong
    ) == len(MISSED), wrong


def test_all_in_a_thread_and_in_a_process_pool():
    pairs = [(case["response"], case["gold"]) for case in CASES[::7]]
    here = [verify.verify(*pair) for pair in pairs]
    there = []
    thread = threading.Thread(target=lambda: there.extend(verify.verify(*pair) for pair in pairs))
    thread.start()
    thread.join()
    assert there == here
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.starmap(verify.verify, pairs) == here


# ---------------------------------------------------------------- faults, mended

TIMES = [  # once read as ratios
    ("1:00", "12:00"),
    ("1:15", "2:30"),
    ("2", "12:06"),
    (r"3:00\text{ a.m.}", r"3:00\text{ p.m.}"),
    ("1:02.5", "2:05"),
    ("12:24", "1/2"),
    ("1:0", "2:0"),
    ("0:5", "0"),
]
MEASURES = [  # once dropped from both sides
    ("10 weeks", "10 days"),
    (r"5\text{ cm}", r"5\text{ m}"),
    ("5 dollars", "5 cents"),
    ("60 mph", "60 km/h"),
    (r"5\text{ cm}^2", r"5\text{ cm}^3"),
    ("2 hours 30 minutes", "30 hours 2 minutes"),
    (r"2\text{ hours and 30 minutes}", "2"),
]
READ = [  # once missed
    ("S_1:S_2=7:32", "7:32"),
    ("28 pct", r"28\%"),
    ("1 000", "1000"),
    ("(11,7)or(7,11)", "(7,11), (11,7)"),
    ("f(x)=2x+1", "y=2x+1"),
    ("10weeks", "10"),
    ("45 degrees, 135 degrees", r"45^\circ, 135^\circ"),
    (r"99\pi square inches", r"99\pi"),
    ("0<f(x)<1", "(0,1)"),
    ("x=1orx=2", "1, 2"),
    (r"\frac{NO}{BO}=\frac{1}{\sqrt6}", r"1/\sqrt6"),
]
OTHERWISE = [  # once equal by another accident
    ("1 000", "0"),
    ("2 3", "6"),
    ("k=45, n=2", "2, 45"),
    (r"5\text{ or 6}", "5"),
]


@pytest.mark.parametrize("a, b", TIMES + MEASURES + OTHERWISE)
def test_mended_false_positives(a, b):
    assert not equal(a, b) and not equal(b, a)


@pytest.mark.parametrize("a, b", READ)
def test_mended_misses(a, b):
    assert equal(a, b) and equal(b, a)


@settings(max_examples=200)
@given(*[st.integers(1, 12), st.integers(0, 59)] * 2, st.sampled_from(["a.m.", "PM", ""]))
def test_times_are_equal_if_their_digits_are(hour, minute, other_hour, other_minute, half):
    time, other = f"{hour}:{minute:02}", f"{other_hour}:{other_minute:02}"
    assert equal(f"{time} {half}", rf"{other}\text{{ {half}}}") == (time == other)
    assert not equal(f"{time} p.m.", f"{time} a.m.")
    assert equal(f"{time} p.m.", f"{time}p.m.") and equal(time, f"0{time}"[-5:])


@settings(max_examples=200)
@given(*[st.integers(1, 60)] * 3)
def test_ratios_are_equal_if_proportional(a, b, k):
    assert equal(f"A:B={a}:{b}", f"{k * a}:{k * b}")
    assert equal(f"A:B={a}:{b}", f"{b}:{a}") == (a == b)
    assert equal(f"A:B={a}:{b}", rf"\frac{{{a}}}{{{b}}}")
    assert not equal(f"{a}:{b}", f"{a}:{b + 1}")


@settings(max_examples=200)
@given(st.integers(10_000, 10**10), st.sampled_from([1, 2, 4]))
def test_thousands_may_be_set_apart_by_spaces(n, places):
    spaced = f"{n:,}".replace(",", " ")
    assert equal(spaced, str(n)) and equal(f"x = {spaced}.5", f"{n}.5")
    assert not equal(spaced, spaced.replace(" ", ".", 1)) and not equal(spaced, str(n + 1))
    digits = str(n)
    assert not equal(f"{digits[:-places]} {digits[-places:]}", digits)


@settings(max_examples=100)
@given(st.integers(1, 999), *[st.sampled_from("week day hour minute inch mile dollar".split())] * 2)
def test_two_measures_must_agree(n, one, two):
    plural = {"inch": "inches"}.get(one, one + "s")
    forms = (f"{n} {plural}", f"{n}{plural}", rf"{n}\text{{ {plural}}}", rf"{n}\mbox{{ {one}}}")
    for form in forms:
        assert equal(form, str(n)) and not equal(form, str(n + 1))
        assert equal(form, f"{n} {two}") == (one == two)


# ---------------------------------------------------------------- extraction


@pytest.mark.parametrize(
    "response, answer",
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{1} then \boxed{", None),
        (r"\boxed{1} then \boxed{}", None),
        (r"\boxed{1} then \boxed{ }", None),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\text{a \} b}}", r"\text{a \} b}"),
        (r"\boxed{x = \boxed{3}}", "3"),
        (r"\fbox{3}", "3"),
        (r"\boxed{3} \fbox{4}", "4"),
        (r"\boxed 7$ .", "7"),
        (r"\boxed  {7}", "7"),
        (r"\boxed", None),
        (r"<think>\boxed{1}", None),
        (r"<think>\boxed{1}</think>\boxed{2}", "2"),
        (r"<think>\boxed{1}</think> no idea", None),
        (r"\boxed{1}</think>", None),
        ("5 + 5\n#### 1,010\nbye", "1,010"),
        ("<answer> 12 </answer> 13", "12"),
        ("The answer is $x^2$, I think 3", "x^2"),
        ("**Answer:** 73", "73"),
        ("The final answer is 3.5. Done in 2 steps.", "3.5"),
        ("Answer: \\(\\frac{1}{2}\\)", r"\frac{1}{2}"),
        ("so we have 3 and then -4.", "-4"),
        ("thus $1,234,567$", "1,234,567"),
        ("so 5-3", "3"),
        ("nothing", None),
        ("", None),
        ("12 " + "x" * 3000, None),
        (r"\boxed{" + "1" * 5000 + "}", None),
        (r"\boxed{" + "1" * 3000 + "}", "1" * 3000),
    ],
)
def test_extract(response, answer):
    assert extract(response) == answer


@pytest.mark.parametrize(
    "response, answer",
    [
        ("Final Answer: The largest $n$ is 34", "34"),
        ("Answer: we get $n$ equal to $34$", "34"),
        ("Final Answer: The largest $n$ is\n$$34$$", "34"),
        ("Answer: $n$ is $34$.", "34"),
        (r"Final Answer: The final answer is $\$18.90$. I hope it is correct.", r"\$18.90"),
        ("Final Answer: The final answer is 5 I hope it is correct.", "5"),
        ("Final Answer: The volume of $ABCD$ is 120. I hope it is correct.", "120"),
        ("The final answer: the value of $x$ when $y$ is $3$ is $7$.", "7"),
        ("The answer is 5, where $n$ is $3$.", "5"),
        ("The answer is $1$ and $2$.", "1, 2"),
        ("Answer: There are $12$ ways, which is $3$ times more.", "12"),
        ("Answer: The values of $x$ are $1$ and $2$.", "1, 2"),
        ("Answer: Yes, since $n$ is $3$.", "Yes"),
        ("The answer is $n$.", "n"),
        (r"The answer is $\pi$, roughly $3.14$.", r"\pi"),
        ("Final Answer: The largest $n$ is not $34$.", "The largest $n$ is not $34"),
    ],
)
def test_the_answer_in_a_sentence(response, answer):
    assert extract(response) == answer


def test_boxes_of_the_last_sentence():
    """A set in several boxes is compared as one; `extract` alone knows no gold answer."""
    response = r"First \boxed{7}. Then $\boxed{(2,2)} \text{ and } \boxed{(6,2)}$."
    assert extract(response) == "(6,2)"
    assert grade(response, "(6,2), (2,2)") == (True, "(2,2), (6,2)", "equal: set")
    assert grade(response, "(6,2)") == (True, "(6,2)", "equal: string")
    assert grade(response, "(2,2)") == (False, "(6,2)", "different")
    assert grade(response, "(2,2), (6,2), 7") == (False, "(6,2)", "different")
    assert verify.boxes(r"$k=\boxed{45}$ and $n_1=\boxed{2}$") == ["k = 45", "n_1 = 2"]
    for response in (
        r"\boxed{1}, no, \boxed{2}",
        r"\boxed{1} or \boxed{}",
        r"\boxed{1} \boxed{2}",
        r"neither \boxed{1} nor \boxed{2}",
        r"not \boxed{1}, \boxed{2}",
        "none",
    ):
        assert verify.boxes(response) == []
    assert len(verify.boxes(r"\boxed{1}, " * 64)) == 64 and verify.boxes(r"\boxed{1}, " * 65) == []


def test_reasons():
    assert grade(r"\boxed{5}", "5") == (True, "5", "equal: string")
    assert grade(r"\boxed{\frac{10}{2}}", "5").reason == "equal: value"
    assert grade(r"\boxed{2, 1}", "1,2").reason == "equal: set"
    assert grade(r"\boxed{6}", "5") == (False, "6", "different")
    assert grade("none", "5") == (False, None, "no answer")
    assert grade(r"\boxed{\sum_k k}", "5") == (False, r"\sum_k k", "unparsed")
    assert grade(r"\boxed{9^{9^9}}", "5").reason == "unparsed"
    # a gold answer that JSON read as a number
    assert grade(r"\boxed{5}", 5).correct


# ---------------------------------------------------------------- exactness

# identities that need more than collecting terms
EQUAL = [
    (r"\cos 36^\circ - \cos 72^\circ", r"\frac12"),
    (r"\sin\frac{\pi}{10}\sin\frac{3\pi}{10}", r"\frac14"),
    (r"\frac{1}{\sqrt2+\sqrt3+\sqrt5}", r"\frac{3\sqrt2+2\sqrt3-\sqrt{30}}{12}"),
    (r"\sin(a+b)", r"\sin a\cos b+\cos a\sin b"),
    (r"\sin^2\theta", r"\frac{1-\cos2\theta}{2}"),
    (r"\tan x+\cot x", r"\frac{2}{\sin 2x}"),
    (r"\cosh^2 x-\sinh^2 x", "1"),
    (r"\frac{1}{x}+\frac{1}{x+1}+\frac{1}{x+2}", r"\frac{3x^2+6x+2}{x(x+1)(x+2)}"),
    (r"\frac{x^3-y^3}{x-y}", "x^2+xy+y^2"),
    (r"\frac{\frac1a-\frac1b}{\frac1a+\frac1b}", r"\frac{b-a}{a+b}"),
    ("(a+b+c)^2-(a-b-c)^2", "4a(b+c)"),
    (r"\frac{x+1}{\sqrt{x+1}}", r"\sqrt{x+1}"),
    (r"\log_8 32", r"\frac53"),
    (r"e^{2\ln 3}", "9"),
    (r"2^{\log_2(d+1)}", "d+1"),
    (r"\ln(e^3\sqrt2)", r"3+\frac{\ln2}{2}"),
    ("6^n", r"2^n3^n"),
    (r"\sqrt{2}^{4k}", "4^k"),
    (r"(-8)^{-1/3}", r"-\frac12"),
    ("(1+i)^8", "16"),
    (r"(\cos 20^\circ + i\sin 20^\circ)^9", "-1"),
    (r"\frac{(1+\sqrt5)^3}{8}", r"2+\sqrt5"),
    ("3x-6y=9", r"y=\frac{x-3}{2}"),
    ("2x>4", "x>2"),
    ("-x<-2", "x>2"),
    (r"\{x \mid x \ge 2\}", r"[2,\infty)"),
    (r"0.1\overline{6}", r"\frac16"),
]
# near misses, and the wrong verdicts of other verifiers
UNEQUAL = [
    (r"\sqrt{3+2\sqrt2}", r"1-\sqrt2"),
    (r"\sqrt{10001}", "100.00499987500625"),
    (r"\sqrt{2}+\sqrt{3}", r"\sqrt{5+2\sqrt6}+\frac{1}{10^{60}}"),
    (r"\cos 36^\circ", "0.809016994374947424"),
    (r"e^{\pi\sqrt{163}}", "262537412640768744"),
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"),
    ("12345678901234567890", "12345678901234567891"),
    ("2^{2007}", "2^{2008}"),
    (r"\sqrt[3]{2}", r"\sqrt[4]{2}"),
    ("2^{n-1}", "2^{n}-1"),
    ("(a+b)/2", "a+b/2"),
    ("40_9", "409"),
    ("2516_8", "2516_9"),
    (r"\{0,1\}", "(0,1)"),
    ("[2,5)", "(2,5)"),
    ("p>1", r"p\ge1"),
    ("1,2", "12"),
    (r"\frac{11}{4}", r"\frac{1}{14}"),
    ("-2,1", "-2,10"),
    ("3,5,7", "3,5"),
    ("x_1=0", "x_2=0"),
    ("u^2+v^2=1", "u^3+v^2=1"),
    ("08", "02"),
    (r"3 \text{ or } 4", "3"),
    (r"\sqrt{x^2}", "x"),
    ("x>2", "-x>-2"),
    ("AB=BA", "CD=DC"),
    (r"\infty", "2"),
    (r"\infty-\infty", "0"),
    ("1^x", "0"),
    ("f(x+1)", "fx+f"),
    (r"\frac{1}{x-x}", r"\frac{2}{x-x}"),
    (r"\frac{x}{1-1}", r"\frac{y}{1-1}"),
    ("QQ^T", "Q^TQ"),
    ("e^{-a^2/2}", "e^{-b^2/2}"),
    ("5", r"50\%"),
]


@pytest.mark.parametrize("a, b", EQUAL)
def test_equal(a, b):
    assert equal(a, b) and equal(b, a)


@pytest.mark.parametrize("a, b", UNEQUAL)
def test_unequal(a, b):
    assert not equal(a, b) and not equal(b, a)


def test_factor():
    for n in (1, 2, 12, 97 * 89, 1009**2, 1013 * 1009, 2**61 - 1, 3**40):
        product = 1
        for p, k in exact.factor(n):
            product *= p**k
        assert product == n


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(-5, 5),
)
def test_nested_roots_near_a_sum_are_not_equal_to_it(p, q, r, k, off):
    """(k sqrt p + sqrt q)^2 under a root is that sum, which is not seen; moved by `off` / 10^r it
    is not, and no approximation says so."""
    nested = rf"\sqrt{{{k * k * p + q}+{2 * k}\sqrt{{{p * q}}}}}"
    assert not equal(nested, rf"{k}\sqrt{{{p}}}+\sqrt{{{q}}}+\frac{{{off or 1}}}{{10^{{{r}}}}}")


# ---------------------------------------------------------------- properties

PIECES = st.lists(
    st.sampled_from(
        [
            *"0123456789xynie()[]{}^_+-*/=<>,.:;|!%$ '",
            r"\frac",
            r"\sqrt",
            r"\pi",
            r"\infty",
            r"\sin",
            r"\ln",
            r"\log",
            r"\pm",
            r"\cup",
            r"\{",
            r"\}",
            r"\text{",
            r"\boxed{",
            r"\left(",
            r"\right)",
            r"\le",
            r"\mathbb{R}",
            r"\begin{pmatrix}",
            r"\\",
            "&",
            r"\end{pmatrix}",
            r"\overline",
            "yes",
            " or ",
            "cm",
            "°",
            "²",
            "\x00",
            "1:15",
            " p.m.",
            " weeks",
            "square ",
            "pct",
            "f(x)",
            " 000",
            "and",
            "\ud800",
            "３",
        ]
    ),
    max_size=30,
).map("".join)
ANY = st.one_of(st.text(max_size=200), PIECES)


@settings(max_examples=400, deadline=2000)
@given(ANY, ANY)
def test_any_text_is_graded(a, b):
    assert equal(a, a)
    assert equal(a, b) == equal(b, a)
    for response in (a, r"\boxed{" + a + "}", a + r" \boxed{"):
        verdict = grade(response, b)
        assert verdict.correct == verdict.reason.startswith("equal:") and (
            verdict.extracted is None
        ) == (verdict.reason == "no answer")
        assert hendrycks(response, b) in (True, False)


def formula(rng, depth):
    """A random well-formed formula, with the constructions that make canonical forms grow."""
    if depth <= 0:
        return rng.choice(
            [
                "x",
                "y",
                "2",
                "3",
                "-8",
                "0",
                r"\pi",
                "n",
                "i",
                "e",
                "a_1",
                r"\sqrt{2}",
                r"\sqrt[3]{5}",
                r"\infty",
            ]
        )
    a, b, c = formula(rng, depth - 1), formula(rng, depth - 2), formula(rng, 0)
    return rng.choice(
        [
            f"({a}+{b})",
            rf"({a}-{b})^{{{rng.choice(['2', '5', '12', 'n', '-1', '-3/7', '1/2', b])}}}",
            rf"\frac{{{a}}}{{{b}}}",
            rf"\sqrt{{{a}+{b}}}",
            rf"\{rng.choice(['sin', 'cos', 'tan', 'tanh', 'ln', 'exp', 'arctan', 'arccos'])}({a})",
            f"({a})({b})",
            f"{{{a}}}^{{{b}}}",
            rf"\log_{{{c}}}({a})",
            f"|{a}-{c}|",
            f"({a}+{b}+{c})^{{8}}",
            rf"\sqrt[5]{{{a}+1}}",
            f"({a}+{c}+{b})" * 4,
            f"({a})!",
            rf"\lfloor{{{a}}}\rfloor",
        ]
    )


@pytest.mark.parametrize("seed", range(4))
def test_random_formulas(seed):
    """Well-formed but wild: equal to itself rewritten, symmetric, quick, and exact (a float among
    the coefficients would raise)."""
    rng = random.Random(seed)
    for _ in range(60):
        a, b = formula(rng, rng.randint(1, 6)), formula(rng, 2)
        start = time.perf_counter()
        assert equal(a, b) == equal(b, a)
        assert equal(f"{a}+1", f"1+{a}") or verify.shape(a)[0] == "unparsed" or len(a) > 40
        assert time.perf_counter() - start < 2
        for kind, value, *_ in (verify.shape(a), verify.shape(b)):
            assert kind != "value" or not any(isinstance(c, float) for c in value.values())


@settings(max_examples=200, deadline=2000)
@given(
    PIECES,
    st.sampled_from(
        ["$%s$", r"\displaystyle %s", r"\left. %s", " %s ", r"\(%s\)", r"\,%s", r"\bigl %s"]
    ),
)
def test_rewriting_keeps_the_verdict(a, frame):
    # a star at the edge is Markdown, inside a frame a product
    if verify.clean(a) and not re.search(r"[$\\.]|\*\*|^\s*\*|\*\s*$", a):
        assert equal(frame % a, a)


@settings(max_examples=200, deadline=2000)
@given(st.fractions(max_denominator=1000), st.fractions(max_denominator=1000))
def test_rationals_compare_as_fractions(x, y):
    forms = (
        f"{x.numerator}/{x.denominator}",
        rf"\frac{{{x.numerator}}}{{{x.denominator}}}",
        f"x = {x.numerator}/{x.denominator}",
    )
    for form in forms:
        assert equal(form, f"{y.numerator}/{y.denominator}") == (x == y)
        assert equal(form, f"{x.numerator * 7}/{x.denominator * 7}")


# ---------------------------------------------------------------- hostile inputs


def hostile():
    deep, n = 100_000, 10**6
    yield from (
        "{" * deep,
        "(" * deep + "1" + ")" * deep,
        r"\boxed{" * deep,
        r"\boxed{" + "{" * deep,
        r"\boxed{1" * 20_000,
        "9" * deep,
        "a" * n,
        "$" * n,
        "<think>" * deep,
        r"\frac" * 50_000,
        "\\" * n,
        " " * n,
        "=" * n,
        "-" * deep,
        "answer is " * deep,
        "#### " * deep,
        "1," * deep,
        "\x00" * 1000,
        "\ud800" * 100,
        "\u202e" * 1000,
        "１２３",
        "٣",
        "²" * 500,
        "\n" * n,
        r"\text{" * deep,
        "answer" + " " * n,
        r"\boxed" + " " * n,
    )
    for text in (r"\boxed{1}, ", r"$x = \boxed{2}$ or ", r"\boxed{" + "(x+y)" * 100 + "}, "):
        yield text * 5000
    for text in ("$n$ ", "is $1$ ", "$", r"\$", "is 1 ", ", where ", r"\(", "$1$ and ", " is\n"):
        yield "answer: $n$ is " + text * 600
    for text in (
        "1 000 ",
        "10 weeks ",
        "5weeks, ",
        "square ",
        "1:00 ",
        "p.m. ",
        r"\text{ cm}",
        "1or",
        "pct ",
        "0<f(x)<1,",
        "S:",
        "mile/",
        "k=1,",
        "f(f(",
        "y(x)=",
        "\x02",
        r"\measureA",
    ):
        yield r"\boxed{5 " + text * (580 // len(text)) + "}"
    short = (
        r"9^{9^{9^9}}",
        "9" + "^9" * 200,
        r"10^{100000000}",
        "99999999!",
        "9!!!!!!",
        "((((9!)!)!)!)",
        r"(x+1)^{100000}",
        r"(a+b+c+d+e)^{199}",
        "1e999999999",
        r"\binom{10^9}{10^8}",
        r"\sqrt[999999]{2}",
        "2^{0.123456789}",
        r"\frac{1}{0}",
        "0^{-1}",
        r"\ln 0",
        r"\sqrt[0]{2}",
        "9" * 550,
        "1/" * 290 + "3",
        "(" * 280 + "1" + ")" * 280,
        "{" * 280 + "1" + "}" * 280,
        r"\sqrt{" * 90 + "2" + "}" * 90,
        r"\sin(" * 60 + "x" + ")" * 60,
        "e^{" * 140 + "x" + "}" * 140,
        "|" * 500,
        "x" * 550,
        "x+" * 280 + "x",
        "".join(f"x_{{{i}}}+" for i in range(80)) + "1",
        "(x+y)" * 100,
        "(a+b+c+d+f+g+h+j+k+l)" * 25,
        r"\sin(" * 25 + "x" + ")" * 25,
        "(x+y+z)(x+y-z)" * 40,
        r"\pm1" * 120,
        "+".join(rf"\sqrt{{{n}}}" for n in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)),
        "1," * 290 + "1",
        r"\{" * 250 + r"\}" * 250,
        "1:" * 250 + "1",
        "+".join(rf"\sqrt{{{n}+\sqrt{{{n + 1}}}}}" for n in range(2, 20)),
        r"\cos\frac{\pi}{7}" * 30,
        "-".join(rf"\frac{{1}}{{x+{n}}}" for n in range(40)),
        "(" + "+".join(rf"\frac{{1}}{{x+{n}}}" for n in range(12)) + ")^3",
        r"\tan(" * 8 + "x" + ")" * 8,
        r"\frac{1+" * 40 + "x" + "}{x}" * 40,
        "=" * 500,
        "<" * 500,
        r"\begin{pmatrix}" * 30,
        "&" * 500,
        r"\text{" * 80 + "}" * 80,
        "9^{-9^{9}}",
        r"7^{7^{7}}\cdot 7^{7^{7}}",
        "1" + "0" * 500 + "!" * 50,
        r"\sqrt{" + "7" * 400 + "}",
        "*".join(str(2**61 - 1 + 2 * k) + "^{200}" for k in range(20)),
        r"(\sqrt2+\sqrt3+\sqrt5+\sqrt7)^{60}",
        r"\ln(" * 60 + "x" + ")" * 60,
        r"\overline{" * 100,
    )
    for s in short:
        yield r"\boxed{" + s + "}"
        yield rf"\boxed{{x = {s} + 1}}"


def test_hostile_inputs_end_quickly():
    """No exception, and none near a second; the budgets leave the worst at a small part of that."""
    for response in hostile():
        for gold in ("5", r"\sqrt{2+\sqrt{3}}", "x+y", response[7:-1]):
            start = time.perf_counter()
            grade(response, gold)
            hendrycks(response[:20000], gold)
            assert time.perf_counter() - start < 2, response[:60]


def test_nothing_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for code in (
        "open('owned','w').write('x')",
        "__import__('os').system('touch owned')",
        r"\text{open('owned','w')}#\pi",
        "exec(\"open('owned','w')\")",
    ):
        for gold in (code, "0", "1", r"\pi"):
            grade(r"\boxed{" + code + "}", gold)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the reward of the reference


@pytest.mark.parametrize(
    "response, gold, right",
    [
        (r"\boxed{\dfrac12}", r"\frac{1}{2}", True),
        (r"\boxed{1/2}", r"\frac{1}{2}", True),
        (r"\boxed{0.5}", r"\frac{1}{2}", True),
        (r"\boxed{0.25}", r"\frac{1}{4}", False),
        (r"\boxed{\text{Yes}}", "Yes", False),
        (r"\boxed{12.}", "12", False),
        (r"\boxed{x=5}", "5", True),
        (r"\boxed{x^{2}}", "x^2", False),
        (r"\boxed{3 \text{ or } 4}", "3", True),
        (r"\boxed{1,000}", "1000", False),
        (r"\boxed{\sqrt3}", r"\sqrt{3}", True),
        (r"\fbox{5}", "5", False),
        (r"\boxed 5$ and", "5", True),
        (r"\boxed 4$ or \boxed{5}", "5", False),
        (r"\boxed{5", "5", False),
        ("5", "5", False),
        (r"\boxed{\frac}", r"\frac", True),
        (r"\boxed{\frac}", r"\frac ", False),
        (r"\boxed{50\%}", "50", True),
        (r"\boxed{60^\circ}", "60", True),
        (r"\boxed{5 \text{ cm}}", "5", True),
        (r"\boxed{5 \text{ cm} \text{ or so}}", "5", False),
        (r"\boxed{5\text{cm}}", "5", False),
        (r"\boxed{\$5}", "5", True),
        (r"\boxed{5\\\\%}", r"5\\", True),
        (r"\boxed{5\\\\%}", "5", False),
        (r"\boxed{5\\\\%%}", "5", True),
        (r"\boxed{ab = 5}", "5", False),
        (r"\boxed{.5}", r"\frac{1}{2}", True),
        (r"\boxed{-1/2}", r"\frac{-1}{2}", True),
        (r"\boxed{01/2}", r"\frac{1}{2}", False),
    ],
)
def test_hendrycks(response, gold, right):
    assert hendrycks(response, gold) == right


# ---------------------------------------------------------------- real gold answers


@pytest.fixture(scope="module")
def golds(shared):
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        row
        for file in sorted((shared / "data").glob("*.parquet"))
        for row in parquet.read_table(file, columns=["reward_model"]).to_pylist()
    ]
    return [str(row["reward_model"]["ground_truth"]) for row in rows]


def rewrites(gold):
    """(name, response) pairs that say the same as `gold`."""
    box = r"So $\boxed{%s}$."
    yield "dfrac", box % re.sub(r"\\[dtc]?frac", r"\\dfrac", gold)
    yield "tfrac", box % re.sub(r"\\[dtc]?frac", r"\\tfrac", gold)
    yield "wrong box first", r"First \boxed{123456}, no: " + box % gold
    yield "period", box % (gold + ".")
    yield "newlines", "\\[\n\\boxed{\n" + gold + "\n}\n\\]"
    yield "displaystyle", box % (r"\displaystyle " + gold)
    yield "dollars", box % f"${gold}$"
    yield "left", box % re.sub(r"(?<![\\A-Za-z])\((.*)\)$", r"\\left(\1\\right)", gold)
    yield (
        "spacing",
        box % re.sub(r"(?<=,)(?!\\)\s*", r"\\, ", gold)
        if not re.search(r"[0-9],[0-9]", gold)
        else box % (" " + gold),
    )
    yield (
        "spaces around signs",
        box % re.sub(r"(?<=[0-9a-z)}])\s*([+=])\s*(?=[0-9a-z(\\])", r" \1 ", gold),
    )
    if re.fullmatch(r"[A-Za-z][a-z]{2,}|Yes|No|no", gold):
        yield "text", box % (r"\text{" + gold + "}")
        yield "bold", box % (r"\textbf{" + gold + "}")
    if re.fullmatch(r"-?[0-9]+", gold):
        yield "n.0", box % (gold + ".0")
        yield "n =", box % ("n = " + gold)
        yield "is", f"Final Answer: The largest $n$ is {gold}. I hope it is correct."
        yield "days", box % (gold + "days")
        yield "text number", box % (r"\text{" + gold + "}")
        yield "units", box % (gold + r"\text{ units}")
        yield "no box", f"After all steps the result equals {gold}."
        yield "answer line", f"**Answer:** ${gold}$"
        yield "fraction", box % rf"\frac{{{3 * int(gold)}}}{{3}}"
        if len(gold.lstrip("-")) > 3 and not gold.lstrip("-").startswith("0"):
            yield "thousands", box % f"{int(gold):,}"
            yield "spaced thousands", box % f"{int(gold):,}".replace(",", " ")
            yield "latex thousands", box % f"{int(gold):,}".replace(",", "{,}")
    fraction = re.fullmatch(r"(-?)\\[dt]?frac\{(-?[0-9]+)\}\{([0-9]+)\}", gold)
    if fraction:
        sign, over, under = fraction.groups()
        yield "a/b", box % f"{sign}{over}/{under}"
        yield "x = a/b", box % rf"x = {sign}\frac{{{over}}}{{{under}}}"
        yield "no box fraction", f"the probability is {sign}{over}/{under}."
        value = Fraction(int(sign + over), int(under)) * 10**6
        if value.denominator == 1:
            yield "decimal", box % f"{float(value) / 10**6:.6f}".rstrip("0")


def test_real_golds_and_their_rewrites(golds):
    assert len(golds) == 5600
    assert [gold for gold in golds if not equal(gold, gold)] == []
    assert [gold for gold in golds if not verify.verify(r"Hence \boxed{" + gold + "}", gold)] == []
    unique = list(dict.fromkeys(golds))
    trials = [(name, gold, response) for gold in unique for name, response in rewrites(gold)]
    missed = [trial for trial in trials if not verify.verify(trial[2], trial[1])]
    assert len(trials) > 15_000 and len(missed) <= 0.005 * len(trials), (
        len(trials),
        len(missed),
        missed[:50],
    )


def edits(gold, rng):
    """Answers one token away from `gold`, which are wrong for it."""
    tok = exact.tokens(gold)
    for at, t in enumerate(tok):
        if t.isdigit() and (at == 0 or tok[at - 1] not in ("_", "/")):
            yield "".join(tok[:at] + [str(int(t) + rng.randint(1, 9))] + tok[at + 1 :])
        if t in "+-" and 0 < at:
            yield "".join(tok[:at] + ["-" if t == "+" else "+"] + tok[at + 1 :])
        if t in SWAPS:
            yield "".join(tok[:at] + [SWAPS[t]] + tok[at + 1 :])


SWAPS = {
    r"\pi": "e ",
    r"\sin": r"\cos ",
    r"\cos": r"\sin ",
    "<": ">",
    ">": "<",
    r"\leq": "<",
    r"\geq": ">",
    r"\infty": "7",
    "Y": "W",
}


def test_unequal_pairs_of_real_answers(golds):
    """One-token edits and answers of other questions, but for those that differ in writing alone
    (`normal`): none is accepted."""
    rng = random.Random(5)
    unique = list(dict.fromkeys(golds))
    edited = [(gold, edit) for gold in unique for edit in edits(gold, rng)]
    rng = random.Random(1)
    swapped = [(gold, rng.choice(unique)) for gold in unique for _ in range(3)]
    swapped = [(a, b) for a, b in swapped if normal(a) != normal(b)]
    accepted = [(gold, other) for gold, other in edited + swapped if equal(other, gold)]
    assert len(edited) > 2000 and len(swapped) > 5000 and accepted == [], accepted


def normal(s):
    """Crude: answers that the reader of a page would call the same."""
    return (
        re.sub(r"\\[dt]frac", r"\\frac", re.sub(r"\s|\\text|\\left|\\right|\^\\circ|[{}$]", "", s))
        .rpartition("=")[2]
        .lower()
    )
