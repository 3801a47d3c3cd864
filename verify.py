r"""Decide whether the final answer of a response equals the gold answer: strings first, then exact
arithmetic.

    verify(response, gold) -> bool        the reward
    grade(response, gold) -> Verdict      the same with the extracted answer and the reason
    extract(response) -> str | None       the final answer alone
    equal(answer, gold) -> bool           the comparison alone
    hendrycks(response, gold) -> bool     the reference's string equality, for replication

What counts as right:
 1. Only text after the last </think> counts; an unclosed <think> has no answer.
 2. The last \boxed or \fbox counts (the innermost if nested). Unclosed or empty, it is no answer:
    never an earlier one. One exception: if the gold answer is a set of n elements and the sentence
    of the last box holds exactly n boxes joined by commas, "and" or "or", they are that set.
 3. Without a box: the line after ####, <answer>, "answer is" or "answer:", else the last number;
    in the last 2,000 characters. Of a sentence with words, what follows its last "is" counts, or
    its first mathematics; the last, if the first only names a variable.
 4. There is no tolerance: 0.33 is not 1/3, 3.14 is not pi.
 5. p% equals p and p/100; a bare number never equals a hundred times itself.
 6. Units, $, degree signs, \text{} and trailing words are dropped. Units are never converted; where
    both answers name one, it must be the same: 10 weeks is 10, and not 10 days.
 7. {a, b} and a bare list are unordered and of equal length; (a, b) and [a, b] are ordered and
    their brackets count. In k = 4, n = 2 the names give the order.
 8. x = v equals v; x > 2 equals (2, oo), as does f(x) > 2; R equals (-oo, oo); f(x) = v is y = v.
 9. The base subscript of a number is part of the value: 52_8 is not 52.
10. Multiple choice by the leading letter; yes, no, true, false by the leading word when the
    opposite does not follow.
11. a \frac{b}{c} with integers b < c is a mixed number.
12. a:b is a ratio, 1:2 = 2:4 = 1/2, but two answers of the form h:mm may be times of day: they are
    equal if their digits are; a.m. is not p.m. h:mm equals the fraction h/mm in lowest terms only.

How: `clean` rewrites LaTeX and prose to a small core, `read` turns its tokens into a shape (value,
set, tuple, union, matrix, ...), `same` compares two shapes; values are exact, see exact.py. Work is
bounded by construction (length, depth, fuel): there is no clock, signal, thread or process, and
nothing of the text is ever executed.
"""

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from plumbing.exact import (
    CALL,
    FUNCTIONS,
    NAME,
    OPEN,
    Algebra,
    Unparsed,
    add,
    atom,
    by_symbols,
    closing,
    negative,
    number,
    rational,
    tokens,
    top_level,
)

# characters of an answer that is compared other than as a string; the longest of 5,600 gold answers
# has 133
LONGEST = 600


class Verdict(NamedTuple):
    """`reason` is "equal: <rule>", "different", "no answer" or "unparsed" (the answer, or the
    comparison, was beyond the reader)."""

    correct: bool
    extracted: str | None
    reason: str


def verify(response, gold):
    """True if the final answer of `response` equals `gold`. Any two strings are allowed; none
    raises."""
    return grade(response, gold).correct


def grade(response, gold):
    """The `Verdict` on a response: is its answer right, what was it, and why."""
    gold = str(gold)
    answer = extract(response)
    if answer is None:
        return Verdict(False, None, "no answer")
    reason = judge(answer, gold)
    if not reason.startswith("equal"):
        parts = boxes(response)
        if len(parts) > 1 and equal_set(parts, gold):
            return Verdict(True, ", ".join(parts), "equal: set")
    return Verdict(reason.startswith("equal"), answer, reason)


def verifiable(gold) -> bool:
    """Whether a response that says exactly this gold answer is accepted: if not, nothing can earn
    its reward."""
    return verify(f"\\boxed{{{gold}}}", gold)


def equal(answer, gold):
    """True if two answers are equal; reflexive and symmetric."""
    return judge(answer, gold).startswith("equal")


# ---------------------------------------------------------------- extraction

CUE = re.compile(r"answer\W{0,8}?(?:is\b|:)[\s:*]*", re.I)
MATH = re.compile(r"\$+((?:[^$\\]|\\.)+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S)
NUMBER = re.compile(
    r"(?:(?<![\w)}])-)?"
    r"(?:\\[dt]?frac\{-?[0-9]+\}\{[0-9]+\}|\.?[0-9](?:,?[0-9])*(?:\.[0-9]+)?(?:/[0-9]+)?)"
)
# a point inside a number does not end a sentence, nor does a line end after "is" or a colon
SENTENCE_END = re.compile(r"(?<! is)(?<!:)\n|[.!](?=\s|\*|$)|\s+I hope\b")
ASIDE = re.compile(r",?\s+(?:where|which|since|because)\b")
IS = re.compile(
    r"\b(?:is|are|be|equals?)\b[\s:*]*"
    r"(?:(?:therefore|thus|then|exactly|simply|given by|equal to)[\s:*]+)?"
    r"(?=[$\\(\[{]|[-+]?\.?[0-9])"
)
HEDGED = re.compile(
    r"\b(?:not|cannot|never|neither|no|at most|at least|below|above)\b|n't"
    r"|\b(?:less|more|greater|fewer|smaller|larger) than\b",
    re.I,
)
AND = re.compile(r"\s*(?:,\s*and|,\s*or|,|;|and|or)\s*")
VERB = re.compile(r"\s*(?:[:=]|(?:is|are|equals?|must|can|has|have|will|should|would)\b)")
BOX = re.compile(r"\\(?:boxed|fbox)")
FULL_STOP = re.compile(r"[.!?](?=[\s$*)\\]|$)")  # between the boxes of two sentences
LABEL = re.compile(r"(?<![A-Za-z\\])([A-Za-z](?:_\w|_\{\w+\})?)\s*=[\s$]*$")
NOT = re.compile(r"\b(?:not|neither|nor|never)[\s$(\\]*$", re.I)
LINK = re.compile(r"[,;&]|\b(?:and|or)\b")
# words that take the box before them back, or go on from it to another
TAKEN_BACK = re.compile(
    r"\b(?:not?|nor|wait|but|instead|rather|actually|correct\w*|wrong|sorry|mistake|so|thus|hence"
    r"|therefore|then|after|finally|becomes?|which)\b",
    re.I,
)


def extract(response):
    """The final answer of a response as text, or None (policies 1 to 3)."""
    text = response.rpartition("</think>")[2]
    if "<think>" in text:
        return None
    start = last_command(text, len(text))
    if start >= 0:
        return unbox(text, start)[0]
    tail = text[-2000:]
    if "####" in tail:
        found = tail.rpartition("####")[2].strip().partition("\n")[0]
    elif "<answer>" in tail:
        found = tail.rpartition("<answer>")[2].partition("</answer>")[0]
    elif cues := list(CUE.finditer(tail)):
        found = stated(tail[cues[-1].end() :])
    else:
        numbers = NUMBER.findall(tail)
        found = numbers[-1] if numbers else ""
    return found.strip(" \t\r\n*$") or None


def stated(text):
    """The answer that stands in the text after a cue (policy 3)."""
    opening, end = formulas(text)
    if opening and not (is_variable(opening) and VERB.match(text, end)):
        return opening
    sentence = SENTENCE_END.split(text, maxsplit=1)[0]
    main = ASIDE.split(sentence, maxsplit=1)[0]
    if re.match(r"[-+]?\.?[0-9]", sentence) or LEAD.match(sentence) or CHOICE.fullmatch(main):
        return main
    for part in (main, sentence):
        verbs = list(IS.finditer(part))
        if verbs:
            after = part[verbs[-1].end() :]
            return formulas(after)[0] or after
    inline = [inside(m) for m in MATH.finditer(sentence)]
    if not inline or HEDGED.search(sentence):
        return sentence
    return inline[-1] if is_variable(inline[0]) else inline[0]


def formulas(text):
    """The formulas at the start of a text, as a list with commas, and where they end."""
    found, at = [], 0
    while m := MATH.match(text, at):
        found.append(inside(m).strip())
        end = m.end()
        joint = AND.match(text, end)
        if not joint:
            break
        at = joint.end()
    return ", ".join(found), end if found else 0


def inside(m):
    """What stands between the delimiters of a match of MATH."""
    return next(group for group in m.groups() if group)


def is_variable(formula):
    """Whether a formula only names something: n, x_1, f(x), ABC; not a constant."""
    name = re.sub(r"\s", "", formula)
    return bool(NAMED.fullmatch(name)) and name not in (r"\pi", "e", "i", r"\infty", r"\emptyset")


def last_command(text, end):
    """Where the last box command before `end` starts, or -1."""
    return max(text.rfind(r"\boxed", 0, end), text.rfind(r"\fbox", 0, end))


def unbox(text, start):
    """The argument of the box command at `start`, and where it ends: a group of up to 4,000
    characters, or one word. None for an empty or unclosed one."""
    start += len(BOX.match(text, start)[0])
    start += len(re.match(r"\s{0,100}", text[start : start + 100])[0])
    if text[start : start + 1] != "{":
        word = re.match(r"[^\s$]{1,200}", text[start : start + 200])
        return (word[0].rstrip(".,;*") or None, start + word.end()) if word else (None, start)
    depth, at, end = 0, start, min(len(text), start + 4000)
    while at < end:
        c = text[at]
        at += 2 if c == "\\" else 1  # \{ and \} do not nest
        depth += (c == "{") - (c == "}")
        if depth == 0:
            return text[start + 1 : at - 1].strip() or None, at
    return None, end


def boxes(response, most=64):
    """The contents of all boxes of the last sentence that has one, or [] where they are no list."""
    text = response.rpartition("</think>")[2]
    found, right = [], None  # `right` is where the box after starts
    start = last_command(text, len(text))
    while start >= 0:
        content, end = unbox(text, start)
        if right is not None:
            between = text[end:right]
            if end > right or FULL_STOP.search(between):
                break
            linked = LINK.search(between) and not TAKEN_BACK.search(between)
            if not linked or len(between) > 100 or len(found) == most:
                return []
        if content is None:
            return []
        before = text[max(0, start - 40) : start]
        if NOT.search(before):
            return []
        label = LABEL.search(before)
        found.append(f"{label[1]} = {content}" if label and "=" not in content else content)
        right = start
        start = last_command(text, start)
    return found[::-1]


# ---------------------------------------------------------------- cleaning

UNICODE = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "—": "-",
        "×": "*",
        "·": "*",
        "⋅": "*",
        "∗": "*",
        "÷": "/",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "±": r"\pm ",
        "∞": r"\infty ",
        "∪": r"\cup ",
        "∈": r"\in ",
        "∅": r"\emptyset ",
        "≈": r"\approx ",
        "√": r"\sqrt ",
        "∖": r"\setminus ",
        "°": r"\degree ",
        "ℝ": r"\mathbb{R}",
        "ℤ": r"\mathbb{Z}",
        "ℕ": r"\mathbb{N}",
        "ℚ": r"\mathbb{Q}",
        "ℂ": r"\mathbb{C}",
        "′": "'",
        "’": "'",
        "，": ",",
        "²": "^{2}",
        "³": "^{3}",
        "⁴": "^{4}",
        "ⁿ": "^{n}",
        "₀": "_0",
        "₁": "_1",
        "₂": "_2",
        "₃": "_3",
        "⟨": "(",
        "⟩": ")",
        "（": "(",
        "）": ")",
        "½": r"\frac{1}{2}",
        "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}",
        "€": "",
        "£": "",
        "¥": "",
        "¢": "",
        "\u00a0": " ",
        "\u2009": " ",
        "\u202f": " ",
        "α": r"\alpha ",
        "β": r"\beta ",
        "γ": r"\gamma ",
        "δ": r"\delta ",
        "ε": r"\epsilon ",
        "θ": r"\theta ",
        "λ": r"\lambda ",
        "μ": r"\mu ",
        "π": r"\pi ",
        "ρ": r"\rho ",
        "σ": r"\sigma ",
        "τ": r"\tau ",
        "φ": r"\phi ",
        "ω": r"\omega ",
        "Δ": r"\Delta ",
        "Γ": r"\Gamma ",
    }
)
MACROS = {
    "\\" + old: new
    for olds, new in (
        (
            "left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr displaystyle textstyle "
            "scriptstyle limits ! $ ( ) [ ] pounds",
            "",
        ),
        (", ; : ~ quad qquad space thinspace", " "),
        ("dfrac tfrac cfrac", r"\frac"),
        ("dbinom tbinom", r"\binom"),
        ("leq leqslant", r"\le"),
        ("geq geqslant", r"\ge"),
        ("neq", r"\ne"),
        ("lt", "<"),
        ("gt", ">"),
        ("cdot times ast", "*"),
        ("div", "/"),
        ("Vert lVert rVert", r"\|"),
        ("lbrace", r"\{"),
        ("rbrace", r"\}"),
        ("langle", "("),
        ("rangle", ")"),
        ("lbrack", "["),
        ("rbrack", "]"),
        ("varnothing", r"\emptyset"),
        ("bigcup", r"\cup"),
        ("backslash", r"\setminus"),
        ("R reals", r"\mathbb{R}"),
        ("%", "%"),
        ("degree", "°"),
        ("Bbb", r"\mathbb"),
        ("dots ldots", r"\cdots"),
        ("vert lvert rvert mid", "|"),
    )
    for old in olds.split()
} | {"\\ ": " "}
MACRO = re.compile(r"\\(?:[A-Za-z]+|.)", re.S)
SIMPLE = re.compile(r"-?[0-9]+")
FONTS = ("mathit", "mathbf", "boldsymbol", "bm", "vec", "pmb", "underline")
TEXT = re.compile(
    r"\\(text[a-z]*|mbox|hbox|mathrm|operatorname\*?|mathsf|mathtt|"
    + "|".join(FONTS)
    + r")\s*\{([^{}]*)\}"
)
UNIT = r"(?:(?:cm|mm|km|dm|kg|mg|ml|mL|mph|ft|in|lbs?|oz|hrs?|sec|min|deg|mi|m/s|km/h)\b|\s(?:per|sq|USD|day|[A-Za-z][a-z]{3,})\b)"  # noqa: E501
EARLY = [
    (re.compile(old), new)
    for old, new in (
        (r"\\(?:left|right)\s*\.|\\(?:text)?color\{[a-z]*\}", ""),
        (r"\\mathcal\s*\{?O\}?", "O"),
        (r"\{([^{}]*)\\choose([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"^(-?[0-9]+\.[0-9]+)e([+-]?[0-9]{1,3})$|^(-?[0-9]+)e\+?([0-9]{1,3})$", r"\1\3*10^{\2\4}"),
        (r"\\\{\s*\\\}", r"\\emptyset "),
        (r"\{,\}|,\\!\s*", ","),
        (r"(?<=[0-9])\\,(?=[0-9]{3})", ""),
    )
]
GROUPS = [
    (re.compile(old), new)
    for old, new in (
        (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})", "°"),
        (r"\\begin\{[pbB]?(?:small)?(?:matrix|array)\}(?:\{[^{}]*\})?", r"\\mat "),
        (r"\\begin\{[vV]matrix\}", r"\\vmat "),
        (r"\\end\{[vVpbB]?(?:small)?(?:matrix|array)\}", r"\\endmat "),
    )
]
# a measure as it may be written: its name
UNITS = {}
for forms in (
    "second sec s",
    "minute min",
    "hour hr h",
    "day",
    "week",
    "month",
    "year",
    "cent",
    "dollar USD",
    "euro",
    "degree deg",
    "radian rad",
    "inch inche in",
    "foot feet ft",
    "yard yd",
    "mile mi",
    "millimeter millimetre mm",
    "centimeter centimetre cm",
    "decimeter decimetre dm",
    "meter metre m",
    "kilometer kilometre km",
    "milligram mg",
    "gram g",
    "kilogram kg",
    "pound lb",
    "ounce oz",
    "milliliter millilitre ml mL",
    "liter litre l L",
):
    for form in forms.split():
        UNITS[form] = forms.split()[0]
        if len(form) > 1:
            UNITS[form + "s"] = forms.split()[0]
MEASURED = r"\measure"  # the macro that stands for a unit
SQUARE = re.compile(r"\bsq(?:uared?)?\b|\^\s*\{?2")
CUBIC = re.compile(r"\bcub(?:ic|ed)\b|\^\s*\{?3")


def unit(m):
    """What replaces words after a number: the macro for the measure they name, its power (A, B or
    C) first; "" if they name none; the words themselves if they go on to another number."""
    text = m[0].replace("mph", "mile/hour")
    words = re.findall(r"[A-Za-z]+", text)
    if words in (["percent"], ["per", "cent"], ["pct"]):
        return "%"
    # "in" is an inch only where it stands alone
    names = [UNITS[word] for word in words if word in UNITS and (word != "in" or len(words) == 1)]
    if (names or "and" in words or "or" in words) and re.search(r"(?<![\^{])[0-9]", text):
        return m[0]
    power = "B" if SQUARE.search(text) else "C" if CUBIC.search(text) else "A"
    return f" {MEASURED}{power}{''.join(names)}" if names or power != "A" else ""


TEXT_AT_END = re.compile(r"(?<=[^\s\x02,=:])(?:\s*\x02[^\x03]*\x03(?:\s*\^\s*\{?[23]\}?)?)+[\s.]*$")
WORDS_AT_END = re.compile(
    r"(?:(?<=[0-9})!%°])|(?<=\\pi))"
    r"(?:(?:\s|\s?/\s?)?" + UNIT + r"\.?(?:\s*\^\s*\{?[23]\}?)?)+$"
)
LONG = "|".join(sorted((form for form in UNITS if len(form) > 3), key=len, reverse=True))
MEASURE = re.compile(  # after a number, also inside a list
    r"(?:(?<=[0-9})!%°])|(?<=\\pi)|(?<=\\pi ))"
    rf" ?(?:(?:square|cubic|sq\.?) )?(?:{LONG}|cm|mm|km|kg|mg|ft|yd|lbs?|hrs?|mph)\b"
    rf"(?: ?(?:per|/) ?(?:{LONG}|h|s)\b)?(?:\s*\^\s*\{{?[23]\}}?)?"
)
HALF_OF_DAY = re.compile(
    r"(?:(?<=:[0-9]{2})\s*|(?<=[0-9])\s+)([ap])m\b|(?<=[0-9])\s*([ap])\.\s?m\b\.?"
    r"|(?<=[0-9])\s*\x02\s*([ap])\.?\s?m\b[^\x03]*\x03"
    r"|(?<=[0-9])\s*\x02?\s*(noon|midnight)\b",
    re.I,
)
PROSE = [
    (re.compile(old), new)
    for old, new in ((r"[\x02\x03\s]+", " "), (r"^[ ,;:=*\"`]+|[ .,;:*\"`]+$", ""))
]
WORDY = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2}|\\approx|[0-9] [0-9]")
WORDS = [
    (re.compile(old), new)
    for old, new in (
        (
            r"^(?:\\approx|(?i:(?:the )?(?:(?:final|correct) )?(?:answer|option|choice)(?: is)?\b:?)) ?",  # noqa: E501
            "",
        ),
        (r"^(?:the )?empty set$", r"\\emptyset "),
        (r",?\s\b(?:and|or)\b\s", ", "),
        (r"(?<=[0-9)\]}])\s?,?\s?(?:and|or)\s?(?=[-0-9(\[{\\]|[A-Za-z]\w* ?[=(])", ", "),
        (r"(?:\s*\bper ?cent|(?<=[0-9)}])\s?(?:per ?cent|pct)\b)\.?(?= ?(?:$|,))", "%"),
        (
            r"(?i:(?<![A-Za-z\\])\+?(?:infinity|infinite|infinitely many|inf|oo)(?![A-Za-z]))",
            r"\\infty ",
        ),
        (r"(?i:^(?:the )?(?:set of )?(?:all )?real(?:s| numbers)$)", r"\\mathbb{R}"),
        (WORDS_AT_END, unit),
        (MEASURE, unit),
        (
            r"(?<![\\A-Za-z])((?:arc)?(?:sin|cos|tan)h?|cot|sec|csc|ln|log|exp|sqrt|pi|gcd|lcm|max|min)(?=\s*(?:[0-9_(^\\{}*/+-]|[a-z]\b|$))",  # noqa: E501
            r"\\\1 ",
        ),
        (r"(?<![0-9A-Za-z.}])([0-9]+) ([0-9]+)/([0-9]+)(?![0-9])", r"\1\\frac{\2}{\3}"),
    )
]
THOUSANDS = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9]|,[0-9])")
SPACED = re.compile(  # 1 000
    r"(?<![0-9.,_^\\}])(?<![0-9._^}] )[1-9][0-9]{0,2}(?: [0-9]{3})+(?![0-9/]| [0-9])"
)


def clean(s):
    """LaTeX, Unicode and prose brought to a small core: no spacing, sizes, fonts, currency or final
    point; a unit becomes one macro after its number."""
    s = s.strip()
    if SIMPLE.fullmatch(s):
        return s
    s = re.sub(r"(?<!\\)\$", "", s).strip("* ").replace("**", "^")
    if not s.isascii():
        s = s.translate(UNICODE)
    for old, new in EARLY:
        s = old.sub(new, s)
    s = MACRO.sub(lambda m: MACROS.get(m[0], m[0]), s).replace("$", "").replace("~", " ")
    if "\\" in s:
        for old, new in GROUPS:
            s = old.sub(new, s)
        # a \text inside a \text is as deep as models go
        for _ in range(3):
            s = TEXT.sub(untext, s)
    s = HALF_OF_DAY.sub(half_of_day, s)
    s = TEXT_AT_END.sub(unit, s)
    for old, new in PROSE:
        s = old.sub(new, s)
    if WORDY.search(s):
        for old, new in WORDS:
            s = old.sub(new, s)
    if " " in s:
        s = SPACED.sub(lambda m: m[0].replace(" ", ""), s)
    if "=" in s:
        s = s.replace("!=", r"\ne ").replace("<=", r"\le ").replace(">=", r"\ge ")
    if not ("(" in s or "[" in s or r"\{" in s):  # inside brackets a comma separates
        s = THOUSANDS.sub(lambda m: m[0].replace(",", ""), s)
    return s.strip()


def untext(m):
    r"""What is left of one \text{...}: prose between two marks, a plain letter, or the name of a
    function."""
    kind, content = m[1], m[2].strip()
    if kind in FONTS or (kind == "mathrm" and content in ("e", "i", "d")):
        return content
    if content in FUNCTIONS or (kind.startswith("operatorname") and content.isalpha()):
        return f"\\{content} "
    return f"\x02{m[2]}\x03"


def half_of_day(m):
    """The macro for a.m. or p.m.; 12:00 midnight is a.m."""
    word = m[1] or m[2] or m[3] or m[4]
    return r" \AM " if word[0] in "aAmM" else r" \PM "


BRACED = re.compile(r"([_^])\{([A-Za-z0-9])\}")
HIDDEN = re.compile(r"(?<![0-9]) | (?![0-9])")


# ---------------------------------------------------------------- shapes

RELATIONS = {"=", "<", ">", r"\le", r"\ge", r"\ne", r"\in", r"\approx"}
STRUCTURE = RELATIONS | set(r"\cup \setminus \pm \mp \{ \mat \vmat , ; : ( [ % { \AM \PM".split())
MINUTES = r"(?::([0-5][0-9](?:\.[0-9]+)?))?"
CLOCK = re.compile(r"([01]?[0-9]|2[0-4])" + MINUTES + MINUTES)
FLIP = {">": "<", r"\ge": r"\le"}
LEAD = re.compile(r"(yes|no|true|false)\b", re.I)
OPPOSITE = {"yes": "no", "no": "yes", "true": "false", "false": "true"}
CHOICE = re.compile(r"[(\[]([A-Ja-j])[)\]][.:]?(?:\s.*)?|([A-J])[).:](?:\s.*)?", re.S)
SECOND = re.compile(r"\([A-J]\)|\b[A-J]\)")
WORD = re.compile(r"(?=.*[A-Za-z]{3}|[ivxIVX]{2,}$)[A-Za-z][A-Za-z\s,.'/-]*")
# what may stand before "=" as the name of the answer: x, x_1, f(x), AB, \angle ABC, Area, \hat{y};
# |AB|; (x, y); an integral or a limit; \frac{AB}{CD}
NAMED = re.compile(
    r"(?:(?:m?\\angle|\\triangle)?[A-Z]+|\\?[A-Za-z]|[A-Za-z]{3,}|\\[A-Za-z]+"
    r"|\\(?:hat|bar|overline|mathbb|mathcal)\{?[A-Za-z]+\}?)'*"
    r"(?:_(?:\w|\{[^{}]*\}|\\\w+))?(?:\^\*)?'*(?:\([\w,\\]*\))?"
    r"|\|[A-Z]+\||\([a-z](?:,[a-z])+\)|\\(?:int|sum|lim|prod)(?![A-Za-z]).*"
    r"|\\frac\{[A-Z]{2,}\}\{[A-Z]{2,}\}"
)
INFINITY = atom((NAME, r"\infty"))
LINE = ("tuple", "()", [("value", negative(INFINITY)), ("value", INFINITY)])


def judge(answer, gold):
    """The reason of a verdict: are two answers equal, and by which rule?"""
    answer, gold = answer.strip(), gold.strip()
    if answer == gold:
        return "equal: string"
    if len(answer) > LONGEST or len(gold) > LONGEST:
        return "unparsed" if len(answer) > LONGEST else "different"
    text, x = shape(answer)
    gold_text, y = shape(gold)
    if text == gold_text and text:
        return "equal: string"
    if not x or not y:
        return "different" if x else "unparsed"
    try:
        rule = same(x, y, Algebra())
    except Unparsed:
        return "unparsed"
    return "equal: " + rule if rule else "different"


def equal_set(parts, gold):
    """Whether answers, each of its own box, are the elements of a gold answer that is a set."""
    if len(gold) > LONGEST or sum(map(len, parts)) > LONGEST:
        return False
    y = shape(gold.strip())[1]
    if not y or y[0] != "set" or len(parts) not in (len(y[1]), len(spread(y[1]))):
        return False
    xs = [shape(part)[1] for part in parts]
    if not all(xs) or assigns(xs) != assigns(y[1]):  # x = 6 and y = 24 are no set
        return False
    try:
        return matched(xs, y[1], Algebra())
    except Unparsed:
        return False


@lru_cache(maxsize=4096)
def shape(text):
    """(the text without what does not show, its shape or None). Cached: a gold answer is compared
    with many responses."""
    s = clean(text)
    try:
        out = worded(s) or read(tokens(s), Algebra())
    except Unparsed:
        out = None
    return HIDDEN.sub("", BRACED.sub(r"\1\2", s)), out


def worded(s):
    """The shape of an answer in words, or by a letter of multiple choice, or None."""
    lead = LEAD.match(s)
    if lead and not re.search(rf"\b{OPPOSITE[lead[1].lower()]}\b", s[lead.end() :], re.I):
        return "word", lead[1].lower()
    choice = CHOICE.fullmatch(s)
    if choice and not SECOND.search(s, 3):
        return "choice", choice[1] or choice[2]
    if WORD.fullmatch(s):
        return "word", re.sub(r"^(?:the|an?) |[^a-z]", "", s.lower())
    return None


def read(tok, algebra, depth=0):
    """The shape of an answer, (kind, payload ...).

    Kinds: value, percent, unit, ratio, clock, set, tuple, union, matrix, equation, relation.
    """
    if depth > 6 or not tok:
        raise Unparsed("too deep" if tok else "empty")

    if STRUCTURE.isdisjoint(tok) and not tok[-1].startswith(MEASURED):
        return "value", algebra.read(tok)

    def inner(part):
        return read(part, algebra, depth + 1)

    if tok[-1].startswith(MEASURED) and len(top_level(tok, {",", ";", r"\cup"})) == 1:
        return "unit", inner(tok[:-1]), tok[-1].removeprefix(MEASURED)
    whole = tok[0] in OPEN and closing(tok, 0) == len(tok) - 1
    if whole and tok[0] == "{":
        return inner(tok[1:-1])
    if whole and tok[0] in (r"\mat", r"\vmat"):
        rows = [row for row in top_level(tok[1:-1], {"\\\\"})[::2] if row]
        return "matrix" + tok[0], [
            [inner(cell) for cell in top_level(row, {"&"})[::2]] for row in rows
        ]
    parts = top_level(tok, {r"\cup"})[::2]
    if len(parts) > 1:
        return "union", list(map(inner, parts))
    parts = top_level(tok, {",", ";"})[::2]
    # "n in Z" after an answer says what n is, it is not another answer
    if len(parts) > 1:
        parts = parts[:1] + [
            part for part in parts[1:] if not (r"\in" in part and r"\mathbb" in part)
        ]
        return listed(list(map(inner, parts))) if len(parts) > 1 else inner(parts[0])
    cut = top_level(tok, RELATIONS)
    if len(cut) > 1:
        return related(cut[::2], cut[1::2], inner)
    cut = top_level(tok, {r"\setminus"})
    if len(cut) == 3 and "".join(cut[0]) == r"\mathbb{R}":
        hole = inner(cut[2])
        return outside(hole[1][0] if hole[0] == "set" else hole)
    if whole and tok[0] in ("(", "[", r"\{"):
        parts = top_level(tok[1:-1], {",", ";"})[::2]
        if tok[0] == r"\{":
            builder = top_level(tok[1:-1], {"|", ":"})
            if (
                len(builder) == 3
                and len(builder[0]) in (1, 6)
                and not RELATIONS.isdisjoint(builder[2])
            ):
                return inner(builder[2])  # {x | condition} or {x in R | condition}
            return "set", list(map(inner, parts))
        if len(parts) > 1:
            return "tuple", tok[0] + tok[-1], list(map(inner, parts))
        if tok[1:2] in ([r"\mat"], [r"\vmat"]):
            return inner(tok[1:-1])
        if tok[0] == "[":
            return "tuple", "[" + tok[-1], [inner(tok[1:-1])]
    if r"\pm" in tok or r"\mp" in tok:
        return "set", [
            inner([signs.get(t, t) for t in tok])
            for signs in ({r"\pm": "+", r"\mp": "-"}, {r"\pm": "-", r"\mp": "+"})
        ]
    if tok[-1] == "%":
        return "percent", algebra.read(tok[:-1])
    parts = top_level(tok, {":"})[::2]
    time = clock(tok)
    if time or len(parts) == 1:
        return time or ("value", algebra.read(tok))
    return "ratio", list(map(algebra.read, parts))


def listed(parts):
    """The shape of a list: a set; in order where the measures differ, as in 2 hours, 30 minutes."""
    measures = {part[2] for part in parts if part[0] == "unit"}
    return ("tuple", ",", parts) if len(measures) > 1 else ("set", parts)


def clock(tok):
    """("clock", numbers, half of the day or "", the same as a ratio or None), or None for no time.

    A time is h:mm, h:mm:ss, or with a.m. or p.m. also h. A ratio has no leading zeros.
    """
    half = tok[-1] if tok[-1] in (r"\AM", r"\PM") else ""
    m = CLOCK.fullmatch("".join(tok[:-1] if half else tok))
    if not m or not (half or m[2]):
        return None
    written = [part for part in m.groups() if part]
    numbers = [Fraction(part) for part in written]
    if half or any(part[0] == "0" for part in written):
        return "clock", numbers, half, None
    return "clock", numbers, half, ("ratio", list(map(number, numbers)))


def related(sides, operators, inner):
    """The shape of sides joined by relations."""
    names = top_level(sides[0], {":"})[::2]  # S_1:S_2 names a ratio
    named = all(NAMED.fullmatch("".join(name)) and name[0][1:] not in FUNCTIONS for name in names)
    if operators == [r"\in"] and named:
        return inner(sides[1])
    if r"\approx" in operators:  # the exact side counts
        at = operators.index(r"\approx")
        keep = sides[1:2] if at == 0 and named else sides[: at + 1]
        return related(keep, operators[:at], inner) if len(keep) > 1 else inner(keep[0])
    if set(operators) == {"="}:
        try:
            first = inner(sides[0])
        except Unparsed:
            # an integral, a limit: only its value is asked for
            if not named:
                raise
            first = "text", "".join(sides[0])
        rest = [inner(side) for side in sides[1:]]
        if len(names) > 1:
            rest = [side[3] or side if side[0] == "clock" else side for side in rest]
        return "equation", [first, *rest], named
    if all(op in FLIP for op in operators):
        sides, operators = sides[::-1], [FLIP[op] for op in operators[::-1]]
    if not set(operators) <= {"<", r"\le"} and operators != [r"\ne"]:
        raise Unparsed("mixed relations")
    return "relation", [inner(side) for side in sides], operators


def outside(point):
    """The line without one point."""
    return "union", [("tuple", "()", [LINE[2][0], point]), ("tuple", "()", [point, LINE[2][1]])]


def is_symbol(shape):
    return (
        shape[0] == "value"
        and len(shape[1]) == 1
        and all(
            c == 1 and len(m) == 1 and m[0][1] == 1 and m[0][0][0] == NAME
            for m, c in shape[1].items()
        )
    )


def application(shape):
    """(f, x) of a shape that is f(x), a letter applied to another, else None."""
    if shape[0] != "value" or len(shape[1]) != 1:
        return None
    ((powers, coefficient),) = shape[1].items()
    if coefficient != 1 or len(powers) != 1 or powers[0][1] != 1 or powers[0][0][0] != CALL:
        return None
    f, arguments = powers[0][0][1]
    x = "value", dict(arguments[0])
    letter = f.partition("_")[0]
    if len(arguments) != 1 or len(letter) != 1 or not letter.isalpha() or not is_symbol(x):
        return None
    return f, min(x[1])[0][0][1]


def mentions(frozen, name):
    """Whether a symbol occurs in nested tuples of an exact value."""
    if frozen == (NAME, name):
        return True
    return isinstance(frozen, tuple) and any(mentions(part, name) for part in frozen)


def region(shape):
    """An inequality in one variable, or the real line, as an interval or a union; any other shape
    as it is."""
    if shape == ("value", atom((NAME, r"\mathbbR"))):
        return LINE
    if shape[0] == "set" and all(part[0] == "relation" for part in shape[1]):
        return "union", [region(part) for part in shape[1]]
    if shape[0] != "relation":
        return shape
    sides, operators = shape[1:]
    free = [is_symbol(side) or application(side) for side in sides]
    if operators == [r"\ne"]:
        return outside(sides[1]) if free[0] else shape
    ends = ["]" if op == r"\le" else ")" for op in operators]
    if len(sides) == 2 and free[0]:
        return "tuple", "(" + ends[0], [LINE[2][0], sides[1]]
    if len(sides) == 2 and free[1]:
        return "tuple", ("[" if ends[0] == "]" else "(") + ")", [sides[0], LINE[2][1]]
    if len(sides) == 3 and free[1]:
        return "tuple", ("[" if ends[0] == "]" else "(") + ends[1], [sides[0], sides[2]]
    return shape


def same(x, y, algebra):
    """The name of the rule by which two shapes are equal, or "". Symmetric."""
    algebra.spend(1)
    if x[0] == y[0]:
        return alike(x, y, algebra)
    if x[0] == "unit" or y[0] == "unit":  # one side alone names a measure
        if x[0] == "percent" or y[0] == "percent":
            return ""
        x, y = (side[1] if side[0] == "unit" else side for side in (x, y))
        return same(x, y, algebra)
    for a, b in ((x, y), (y, x)):
        if a[0] == "choice":
            return "choice" if is_symbol(b) and min(b[1])[0][0][1] in (a[1], a[1].upper()) else ""
        if a[0] == "equation":
            value = side_value(a, algebra)
            return same(value, b, algebra) if value else ""
        if a[0] == "set" and len(a[1]) == 1:
            return same(a[1][0], b, algebra)
        if a[0] == "percent" and b[0] == "value":
            part = algebra.mul(a[1], number(Fraction(1, 100)))
            return "percent" if any(algebra.is_zero(add(v, b[1], -1)) for v in (a[1], part)) else ""
        if a[0] == "clock" and b[0] in ("ratio", "value"):
            return same_time(a, b, algebra)
        if a[0] == "ratio" and b[0] == "value" and len(a[1]) == 2:
            return "ratio" if all(a[1]) and proportional(a[1], (b[1], number(1)), algebra) else ""
        if a[0] == r"matrix\mat" and b[0] == "tuple" and b[1] == "()":
            flat = [cell for row in a[1] for cell in row]
            return (
                "vector" if 1 in (len(a[1]), len(a[1][0])) and pairwise(flat, b[2], algebra) else ""
            )
    p, q = region(x), region(y)
    return (
        "interval" if (p[0], q[0]) != (x[0], y[0]) and p[0] == q[0] and alike(p, q, algebra) else ""
    )


def same_time(time, other, algebra):
    """`same` for a time and another shape: it may be meant as a ratio, 3 p.m. as 3."""
    _, numbers, half, ratio = time
    if other[0] == "value" and half and len(numbers) == 1:
        return same(("value", number(numbers[0])), other, algebra)
    if not ratio:
        return ""
    if other[0] == "value" and Fraction(numbers[0], numbers[1]).numerator != numbers[0]:
        return ""  # 12:24 is no 1/2, but 7:32 is 7/32
    return same(ratio, other, algebra)


def same_clock(x, y):
    """Whether two times are equal: 3 p.m. is 3:00 p.m., which is not 3:00 a.m."""
    ours, theirs = ([*numbers, 0, 0][:3] for numbers in (x[1], y[1]))
    return ours == theirs and (x[2] == y[2] or not x[2] or not y[2])


def proportional(xs, ys, algebra):
    """Whether two lists of sums of equal length differ by a factor."""
    for x, y in zip(xs, ys, strict=True):
        if not algebra.is_zero(add(algebra.mul(x, ys[0]), algebra.mul(y, xs[0]), -1)):
            return False
    return True


def alike(x, y, algebra):
    """`same` for two shapes of one kind."""
    kind = x[0]
    if kind in ("word", "choice", "text"):
        equal = x[1] == y[1] or (kind == "choice" and x[1].upper() == y[1].upper())
    elif kind in ("value", "percent"):
        equal = x[1] == y[1] or algebra.is_zero(add(x[1], y[1], -1))
    elif kind in ("set", "union"):
        equal = matched(x[1], y[1], algebra)
    elif kind == "tuple":
        equal = x[1] == y[1] and pairwise(x[2], y[2], algebra)
    elif kind == "unit":  # square units are square inches
        names = x[2][1:] == y[2][1:] or not x[2][1:] or not y[2][1:]
        equal = names and x[2][0] == y[2][0] and same(x[1], y[1], algebra)
    elif kind == "clock":
        equal = same_clock(x, y)
    elif kind == "ratio":  # of which no part is zero
        equal = len(x[1]) == len(y[1]) and proportional(x[1], y[1], algebra)
        equal = equal and all(x[1]) and all(y[1])
    elif kind == "equation":
        equal = same_equation(x, y, algebra)
    elif kind == "relation":
        strict = x[2] != [r"\ne"]
        equal = x[2] == y[2] and (
            pairwise(x[1], y[1], algebra)
            or scaled(x[1], y[1], algebra, strict)
            or (not strict and pairwise(x[1], y[1][::-1], algebra))
        )
    else:
        equal = len(x[1]) == len(y[1]) and all(
            pairwise(a, b, algebra) for a, b in zip(x[1], y[1], strict=True)
        )
    return kind.partition("\\")[0] if equal else ""


def pairwise(xs, ys, algebra):
    return len(xs) == len(ys) and all(same(a, b, algebra) for a, b in zip(xs, ys, strict=True))


def spread(parts):
    """The elements of a list; an element a +- b stands for two."""
    out = []
    for part in parts:
        out += part[1] if part[0] == "set" else [part]
    return out


def matched(xs, ys, algebra):
    """Whether two lists are equal as multisets; k = 4, n = 2 and a bare list in their order."""
    xs, ys = spread(xs), spread(ys)
    if len(xs) != len(ys):
        return False
    if assigns(xs) != assigns(ys):
        return pairwise(xs, ys, algebra)
    rest = list(ys)
    for x in xs:
        at = next((i for i, y in enumerate(rest) if same(x, y, algebra)), None)
        if at is None:
            return False
        del rest[at]
    return True


def assigns(parts):
    """Whether a list gives values to different letters; x_1 and x_2, or x twice, are one letter."""
    letters = set()
    for part in parts:
        part = part[1] if part[0] == "unit" else part
        if part[0] != "equation" or not part[2]:
            return False
        name = part[1][0]
        call = application(name)
        if not call and not is_symbol(name):
            return False
        symbol = call[0] if call else min(name[1])[0][0][1]
        letters.add(symbol.partition("_")[0])
    return len(letters) > 1


def same_equation(x, y, algebra):
    """`same` for two equations: l = r as it stands, turned round or scaled; f(x) = r as y = r."""
    if pairwise(x[1], y[1], algebra) or pairwise(x[1], y[1][::-1], algebra):
        return True
    if scaled(x[1], y[1], algebra, False):
        return True
    for a, b in ((x, y), (y, x)):
        call = application(a[1][0])
        right = a[1][1]
        if not call or len(a[1]) != 2 or right[0] != "value":
            continue
        for letter in ("y", call[0]):
            if letter == call[1] or mentions(tuple(right[1].items()), letter):
                continue
            sides = [("value", atom((NAME, letter))), right]
            if pairwise(sides, b[1], algebra) or scaled(sides, b[1], algebra, False):
                return True
    return False


def side_value(equation, algebra):
    """The shape that x = v, x = u = v or 2 + 3 = 5 states, or None."""
    sides = equation[1][1:] if equation[2] else equation[1]
    if equation[2] and equation[1][0][0] == "tuple" and sides[-1][0] != "tuple":
        return None
    return sides[-1] if all(same(sides[0], side, algebra) for side in sides[1:]) else None


def scaled(xs, ys, algebra, positive):
    """Whether l = r and l' = r' differ by a nonzero constant factor (a positive one, for
    inequalities)."""
    if not all(side[0] == "value" for side in (*xs, *ys)) or (len(xs), len(ys)) != (2, 2):
        return False
    x, y = add(xs[0][1], xs[1][1], -1), add(ys[0][1], ys[1][1], -1)
    gx, gy = by_symbols(x), by_symbols(y)
    lead = max(gx, default=None)
    if lead is None or lead not in gy:
        return False
    a, b = gx[lead], gy[lead]
    if positive:
        ra, rb = rational(a), rational(b)
        if ra is None or rb is None or ra * rb <= 0:
            return False
    return algebra.is_zero(add(algebra.mul(x, b), algebra.mul(y, a), -1))


# ---------------------------------------------------------------- the reward of the reference


def hendrycks(response, gold):
    """The reward of the reference: equality of two strings after the normalisation of the MATH
    benchmark (Hendrycks et al. 2021).

    Kept with its quirks, so that published runs can be replicated: "\\boxed " anywhere takes what
    follows its last occurrence up to a "$"; \\fbox is never right; only 0.5 among decimals is a
    fraction; text from "\\text{ " on is cut; a malformed \\frac or \\sqrt on either side makes the
    comparison one of raw strings.
    """
    answer = last_box(response)
    if answer is None:
        return False
    try:
        return normalise(answer) == normalise(gold)
    except (IndexError, ValueError):
        return answer == gold


def last_box(response):
    if r"\boxed " in response:
        return response.rpartition(r"\boxed ")[2].partition("$")[0]
    start = response.rfind(r"\boxed")
    depth, opened = 0, response.find("{", start) if start >= 0 else -1
    for at in range(start, len(response)) if opened >= 0 else ():
        c = response[at]
        depth += (c == "{") - (c == "}")
        # counted from the command, so that "\boxed}{" never closes
        if c == "}" and depth == 0:
            return response[start + 7 : at] if opened == start + 6 else None
    return None


def normalise(s):
    for old, new in (
        ("\n", ""),
        (r"\!", ""),
        ("\\\\", "\\"),
        ("tfrac", "frac"),
        ("dfrac", "frac"),
        (r"\left", ""),
        (r"\right", ""),
        (r"^{\circ}", ""),
        (r"^\circ", ""),
        (r"\$", ""),
    ):
        s = s.replace(old, new)
    if s.count(r"\text{ ") > 1:
        raise ValueError("two units")
    s = s.partition(r"\text{ ")[0]
    s = s.replace(r"\%", "").replace(r"\%", "")  # twice: of "\\%%" nothing is left
    s = s.replace(" .", " 0.").replace("{.", "{0.")
    if s[:1] == ".":
        s = "0" + s
    if s.count("=") == 1 and s.index("=") <= 2:
        s = s.partition("=")[2]
    head, *roots = s.split(r"\sqrt")
    s = (
        head + "".join(r"\sqrt" + (r if r[0] == "{" else "{" + r[0] + "}" + r[1:]) for r in roots)
    ).replace(" ", "")
    s = brace_fractions(s)
    if s == "0.5":
        return r"\frac{1}{2}"
    over, slash, under = s.partition("/")
    if slash and all(re.fullmatch(r"0|-?[1-9][0-9]{0,4299}", part) for part in (over, under)):
        return r"\frac{" + over + "}{" + under + "}"
    return s


def brace_fractions(s):
    head, *rest = s.split(r"\frac")
    for part in rest:
        head += r"\frac"
        if part[0] == "{":
            head += part
        elif len(part) < 2:
            return s
        else:
            head += (
                "{"
                + part[0]
                + "}"
                + (part[1:] if part[1] == "{" else "{" + part[1] + "}" + part[2:])
            )
    return head
