r"""Decide whether the final answer of a response equals the gold answer: strings first, then exact
arithmetic.

    verify(response, gold) -> bool        the reward
    grade(response, gold) -> Verdict      the same with the extracted answer and the reason
    extract(response) -> str | None       the final answer alone
    equal(answer, gold) -> bool           the comparison alone

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
12. a:b is a ratio, 1:2 = 2:4 = 1/2, but what has the form h:mm may be a time: two are equal if
    their digits are, a.m. is not p.m., and it is no fraction.

How: `clean` rewrites LaTeX and prose to a small core, `read` turns its tokens into a shape (value,
set, tuple, union, relation, ...), `same` compares two shapes; values are exact, see exact.py. Work
is bounded by construction (length, depth, fuel): there is no clock, signal, thread or process, and
nothing of the text is ever executed.
"""

import re
from functools import lru_cache
from typing import NamedTuple

from plumbing.exact import (
    FUNCTIONS,
    Algebra,
    Reader,
    Unparsed,
    add,
    atom,
    closing,
    depths,
    number,
    split,
    tokens,
)

# characters of an answer that is compared other than as a string; the longest of 5,600 gold answers
# has 133
LONGEST = 600


class Verdict(NamedTuple):
    """`reason` is "equal: <kind of answer>", "different", "no answer" or "unparsed" (the answer,
    the gold answer or their comparison was beyond the reader)."""

    correct: bool
    extracted: str | None
    reason: str


def verify(response, gold):
    """True if the final answer of `response` equals `gold`. Any two strings are allowed; none
    raises."""
    return grade(response, gold).correct


def grade(response, gold):
    """The `Verdict` on a response: is its answer right, what was it, and why."""
    answer, gold = extract(response), str(gold)
    if answer is None:
        return Verdict(False, None, "no answer")
    reason = judge(answer, gold)
    parts = [] if reason.startswith("equal") else boxes(response)
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

BOX = re.compile(r"\\(?:boxed|fbox)\s{0,100}")
BRACE = re.compile(r"(?s)\\.|[{}]")  # \{ and \} do not nest
CUE = r"(?i)answer\W{0,8}?(?:is\b|:)[\s:*]*"
FORMULA = r"(?:\$+((?:[^$\\]|\\(?s:.))+)\$|\\[(\[]((?s:.+?))\\[)\]])"
FORMULAS = rf"{FORMULA}(?:\s*(?:,\s*and|,\s*or|,|;|and|or)\s*{FORMULA})*"
NUMBER = (
    r"(?:(?<![\w)}])-)?"
    r"(?:\\[dt]?frac\{-?[0-9]+\}\{[0-9]+\}|\.?[0-9](?:,?[0-9])*(?:\.[0-9]+)?(?:/[0-9]+)?)"
)
# a point inside a number does not end a sentence, nor does a line end after "is" or a colon
SENTENCE_END = r"(?<! is)(?<!:)\n|[.!](?=\s|\*|$)|\s+I hope\b"
ASIDE = r",?\s+(?:where|which|since|because)\b"
IS = r"\b(?:is|are|be|equals?|equal to)\b[\s:*]*(?=[$\\(\[{]|[-+]?\.?[0-9])"
HEDGED = r"(?i)\b(?:not|cannot|never|neither|no|at most|at least|below|above|\w+ than)\b|n't"
VERB = r"\s*(?:[:=]|(?:is|are|equals?|must|can|has|have|will|should|would)\b)"
FULL_STOP = r"[.!?](?=[\s$*)\\]|$)"  # between the boxes of two sentences
LABEL = r"(?<![A-Za-z\\])([A-Za-z](?:_\w|_\{\w+\})?)\s*=[\s$]*$"
NOT = r"(?i)\b(?:not|neither|nor|never)[\s$(\\]*$"
# what stands between the boxes of a list: no words that take the one before back or go on from it
JOINT = (
    r"(?is)(?!.*\b(?:not?|nor|wait|but|instead|rather|actually|correct\w*|wrong|sorry|mistake|so"
    r"|thus|hence|therefore|then|after|finally|becomes?|which)\b)"
    r"(?=.*(?:[,;&]|\b(?:and|or)\b)).{0,100}"
)


def extract(response):
    """The final answer of a response as text, or None (policies 1 to 3)."""
    text = response.rpartition("</think>")[2]
    if "<think>" in text:
        return None
    start = last_box(text, len(text))
    if start >= 0:
        return unbox(text, start)[0]
    tail = text[-2000:]
    if "####" in tail:
        found = tail.rpartition("####")[2].strip().partition("\n")[0]
    elif "<answer>" in tail:
        found = tail.rpartition("<answer>")[2].partition("</answer>")[0]
    elif re.search(CUE, tail):
        found = stated(re.split(CUE, tail)[-1])
    else:
        found = (re.findall(NUMBER, tail) or [""])[-1]
    return found.strip(" \t\r\n*$") or None


def stated(text):
    """The answer that stands in the text after a cue (policy 3)."""
    opening, rest = formulas(text)
    if opening and not re.match(VERB, rest):
        return opening
    sentence = re.split(SENTENCE_END, text, maxsplit=1)[0]
    main = re.split(ASIDE, sentence, maxsplit=1)[0]
    if re.match(r"[-+]?\.?[0-9]", main) or re.match(LEAD, main) or re.fullmatch(CHOICE, main):
        return main
    *verbs, after = re.split(IS, main)
    if verbs:
        return formulas(after)[0] or after
    inline = [m[1] or m[2] for m in re.finditer(FORMULA, sentence)]
    if not inline or re.search(HEDGED, sentence):
        return sentence
    names_it = re.fullmatch(NAMED, re.sub(r"\s", "", inline[0]))  # n, x_1, f(x), ABC
    return inline[-1] if names_it else inline[0]


def formulas(text):
    """The formulas at the start of a text, as a list with commas, and what follows them."""
    m = re.match(FORMULAS, text)
    if not m:
        return "", text
    return ", ".join((f[1] or f[2]).strip() for f in re.finditer(FORMULA, m[0])), text[m.end() :]


def last_box(text, end):
    """Where the last box command before `end` starts, or -1."""
    return max(text.rfind(r"\boxed", 0, end), text.rfind(r"\fbox", 0, end))


def unbox(text, start):
    """The argument of the box command at `start`, and where it ends: a group of up to 4,000
    characters, or one word. None for an empty or unclosed one."""
    start = BOX.match(text, start).end()
    if not text.startswith("{", start):
        word = re.match(r"[^\s$]*", text[start : start + 200])[0]
        return word.rstrip(".,;*") or None, start + len(word)
    depth = 0
    for brace in BRACE.finditer(text, start, start + 4000):
        depth += (brace[0] == "{") - (brace[0] == "}")
        if depth == 0:
            return text[start + 1 : brace.start()].strip() or None, brace.end()
    return None, len(text)


def boxes(response):
    """The contents of all boxes of the last sentence that has one, or [] where they are no list."""
    text = response.rpartition("</think>")[2]
    found, right = [], len(text)  # `right` is where the box after starts
    while (start := last_box(text, right)) >= 0:
        content, end = unbox(text, start)
        if found:
            between = text[end:right]
            if end > right or re.search(FULL_STOP, between):
                break
            if len(found) == 64 or not re.fullmatch(JOINT, between):
                return []
        before = text[max(0, start - 40) : start]
        if content is None or re.search(NOT, before):
            return []
        label = re.search(LABEL, before)
        found.append(f"{label[1]} = {content}" if label and "=" not in content else content)
        right = start
    return found[::-1]


# ---------------------------------------------------------------- cleaning

UNICODE = str.maketrans("−–—×·⋅∗÷，⟨⟩（）′’", "---****/,()()''", "€£¥¢")
LETTERS = (
    r"≤ \le ≥ \ge ≠ \ne ± \pm ∞ \infty ∪ \cup ∈ \in ∅ \emptyset ≈ \approx √ \sqrt ∖ \setminus "
    r"ℝ \mathbb{R} ℤ \mathbb{Z} ℕ \mathbb{N} ℚ \mathbb{Q} ℂ \mathbb{C} ² ^{2} ³ ^{3} ⁴ ^{4} ⁿ ^{n} "
    r"₀ _0 ₁ _1 ₂ _2 ₃ _3 ½ \frac{1}{2} ¼ \frac{1}{4} ¾ \frac{3}{4} α \alpha β \beta γ \gamma "
    r"δ \delta ε \epsilon θ \theta λ \lambda μ \mu π \pi ρ \rho σ \sigma τ \tau φ \phi ω \omega "
    r"Δ \Delta Γ \Gamma"
).split()
for sign, macro in zip(LETTERS[::2], LETTERS[1::2], strict=True):
    UNICODE[ord(sign)] = macro + " "
NOTHING = (
    r"\left \right \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \biggl \biggr \displaystyle "
    r"\textstyle \scriptstyle \limits \pounds \! \$ \( \) \[ \]"
)
SPACES = r"\, \; \: \~ \quad \qquad \space \thinspace"
MACROS = dict.fromkeys(NOTHING.split(), "") | dict.fromkeys([*SPACES.split(), "\\ "], " ")
for row in (
    r"\frac \dfrac \tfrac \cfrac, \binom \dbinom \tbinom, \le \leq \leqslant, \ge \geq \geqslant, "
    r"\ne \neq, < \lt, > \gt, * \cdot \times \ast, / \div, \{ \lbrace, \} \rbrace, ( \langle, "
    r") \rangle, [ \lbrack, ] \rbrack, \emptyset \varnothing, \cup \bigcup, \setminus \backslash, "
    r"\mathbb{R} \R \reals, \mathbb \Bbb, % \%, ° \degree, | \vert \lvert \rvert \mid"
).split(", "):
    plain, *others = row.split()
    MACROS |= dict.fromkeys(others, plain)
FONTS = "mathit|mathbf|boldsymbol|bm|vec|pmb|underline"
TEXT = rf"\\(text[a-z]*|mbox|hbox|mathrm|operatorname\*?|mathsf|mathtt|{FONTS})\s*\{{([^{{}}]*)\}}"
# {a word for a measure or its power: its name}, the first of each row. A unit's name is that of its
# words, sorted and joined: mph and miles per hour are hourmile, cm^2 and square cm Squarecentimeter
UNITS = {}
for row in (
    "second sec s,minute min,hour hr h,day,week,month,year,cent,dollar USD,euro,degree deg,"
    "radian rad,inch inche in,foot feet ft,yard yd,mile mi,millimeter millimetre mm,"
    "centimeter centimetre cm,decimeter decimetre dm,meter metre m,kilometer kilometre km,"
    "milligram mg,gram g,kilogram kg,pound lb,ounce oz,milliliter millilitre ml mL,liter litre l L,"
    "hourmile mph,Square square squared sq 2,Cubic cubic cubed 3,am midnight,pm noon"
).split(","):
    forms = row.split()
    UNITS |= dict.fromkeys([*forms, *(form + "s" for form in forms)], forms[0])
KNOWN = "m/s|" + "|".join(form for form in UNITS if len(form) > 1 and form not in ("am", "pm"))
POWER = r"(?:\s*\^\s*\{?[23]\}?)?"
MEASURE = (
    r"(?:(?<=[0-9})!%°])|(?<=\\pi)|(?<=\\pi ))"  # after a number
    rf"(?:(?:\s?/?\s?(?:{KNOWN})(?:\s?/\s?[hs])?|\s(?:per|[A-Za-z][a-z]{{3,}}))\b\.?{POWER})+"
    r"(?=\s*(?:$|[,;)\]0-9]|\\\}))"
)
SPELT = "(?:arc)?(?:sin|cos|tan)h?|cot|sec|csc|ln|log|exp|sqrt|pi|gcd|lcm|max|min"
SPACED = r"(?<![0-9.,_^\\}])(?<![0-9._^}] )[1-9][0-9]{0,2}(?: [0-9]{3})+(?![0-9/]| [0-9])"
THOUSANDS = r"(?<![0-9.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9]|,[0-9])"


def unit(m):
    """The macro for the measure that words after a number name, or ""."""
    names = {UNITS[word] for word in re.findall("[A-Za-z]+|[23]", m[0]) if word in UNITS}
    return rf" \unit{''.join(sorted(names))} " if names else ""


def untext(m):
    r"""What is left of one \text{...}: prose between two marks, a plain letter, or the name of a
    function."""
    content = m[2].strip()
    if m[1] in FONTS or content in ("e", "i", "d"):
        return content
    return f"\\{content} " if content in FUNCTIONS else f"\x02{m[2]}\x03"


# Patterns and what takes their place, in this order. \x02 and \x03 stand around prose, see `untext`
REWRITINGS = (
    # LaTeX: spelling, degrees, matrices
    (r"\{,\}", ","),  # 1{,}000
    (r"\\(?:left|right)\s*\.|\\(?:text)?color\{[a-z]*\}", ""),
    (r"\\\{\s*\\\}", r"\\emptyset "),  # { }
    (r"\\(?:[A-Za-z]+|.)", lambda m: MACROS.get(m[0], m[0])),
    (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})", "°"),  # 90^{\circ}
    (r"\\begin\{[pbB]?(?:matrix|array)\}(?:\{[^{}]*\})?", r"\\mat "),
    (r"\\end\{[pbB]?(?:matrix|array)\}", r"\\endmat "),
    (r"(\\(?:frac|binom)\{(?:[^{}]|\{[^{}]*\})*\})([0-9])", r"\1{\2}"),  # \frac{a}2
    # prose and signs typed as words
    (TEXT, untext),
    (TEXT, untext),  # a \text inside a \text
    (r"!=", r"\\ne "),
    (r"<=", r"\\le "),
    (r">=", r"\\ge "),
    (r"~", " "),
    # 3 pm -> 3:00 pm -> 3:00 \unitpm; 5 percent -> 5%; what prose is left names a unit or nothing
    (r"(?i:(?<![:0-9])([0-9]{1,2})(?=\s*\x02?\s*[ap]\.?\s?m\b))", r"\1:00"),
    (r"(?i:(?<=:[0-5][0-9])\s*\x02?\s*a\.?\s?m\b\.?)", r" \\unitam "),
    (r"(?i:(?<=:[0-5][0-9])\s*\x02?\s*p\.?\s?m\b\.?)", r" \\unitpm "),
    (r"(?<![A-Za-z])\s*(?:per ?cent|pct)\b\.?(?= ?(?:$|,|\x03))", "%"),
    (rf"(?<=[^\s\x02,=:])(?:\s*\x02[^\x03%0-9]*\x03{POWER})+[\s.]*$", unit),
    # what stands around an answer: "the final answer is", punctuation; "2 and 3" -> 2, 3
    (r"[\x02\x03\s]+", " "),
    (r"^[ ,;:=*\"`]+|[ .,;:*\"`]+$", ""),
    (r"^(?:\\approx|(?i:(?:the )?(?:(?:final|correct) )?(?:answer|option)(?: is)?\b:?)) ?", ""),
    (r",?\s\b(?:and|or)\b\s", ", "),
    (r"(?<=[0-9)\]}])\s?,?\s?(?:and|or)\s?(?=[-0-9(\[{\\]|[A-Za-z]\w* ?[=(])", ", "),
    # words for values; units after a number; sin x -> \sin x; 1 2/3 -> 1\frac{2}{3}; 1 000 -> 1000
    (r"(?i:(?<![A-Za-z\\])\+?(?:infinity|infinitely many|oo)(?![A-Za-z]))", r"\\infty "),
    (r"(?i:^(?:the )?(?:set of )?(?:all )?real(?:s| numbers)$)", r"\\mathbb{R}"),
    (MEASURE, unit),
    (rf"(?<![\\A-Za-z])({SPELT})(?=\s*(?:[0-9_(^\\{{}}*/+-]|[a-z]\b|$))", r"\\\1 "),
    (r"(?<![0-9A-Za-z.}])([0-9]+) ([0-9]+)/([0-9]+)(?![0-9])", r"\1\\frac{\2}{\3}"),
    (SPACED, lambda m: m[0].replace(" ", "")),
)
REWRITINGS = [(re.compile(old, re.S), new) for old, new in REWRITINGS]


def clean(s):
    """LaTeX, Unicode and prose brought to a small core: no spacing, sizes, fonts, currency or final
    point; a unit becomes one macro after its number."""
    s = re.sub(r"(?<!\\)\$", "", s).strip("* ").replace("**", "^").translate(UNICODE)
    for old, new in REWRITINGS:
        s = old.sub(new, s)
    if not ("(" in s or "[" in s or r"\{" in s):  # inside brackets a comma separates
        s = re.sub(THOUSANDS, lambda m: m[0].replace(",", ""), s)
    return s.strip()


# ---------------------------------------------------------------- shapes

RELATIONS = {"=", "<", ">", r"\le", r"\ge", r"\ne", r"\in"}
LIST = {",", ";"}
FLIP = {">": "<", r"\ge": r"\le"}
ENDS = {"<": "()", r"\le": "[]"}
TIME = r"[0-9]{1,2}(?::[0-5][0-9](?:\.[0-9]+)?){1,2}"
# the opposite does not follow
LEAD = r"(?is)yes\b(?!.*\bno\b)|no\b(?!.*\byes\b)|true\b(?!.*\bfalse\b)|false\b(?!.*\btrue\b)"
CHOICE = (  # (A), A) or A: with words after it, but for a second letter
    r"(?s)(?:[(\[]([A-Ja-j])[)\]][.:]?|([A-J])[).:])(?:\s(?!.*\b[A-J]\)).*)?"
)
WORD = r"(?=.*[A-Za-z]{3}|[ivxIVX]{2,}$)[A-Za-z][A-Za-z\s,.'/-]*"
TRANSPOSE = r"\^\s*\{?(?:T|\\top|\\dagger|\*|\\prime)(?![A-Za-z])"
# what may stand before "=" as the name of the answer: x, x_1, f(x), AB, \angle ABC, Area, \hat{y};
# |AB|; (x, y); an integral or a limit; \frac{AB}{CD}
NAMED = (
    r"(?!\\(?:arc)?(?:sin|cos|tan|cot|sec|csc|ln|log|lg|exp|max|min|gcd|lcm|det|arg))"
    r"(?:(?:m?\\angle|\\triangle)?[A-Z]+|\\?[A-Za-z]|[A-Za-z]{3,}|\\[A-Za-z]+"
    r"|\\(?:hat|bar|overline|mathbb|mathcal)\{?[A-Za-z]+\}?)'*"
    r"(?:_(?:\w|\{[^{}]*\}|\\\w+))?(?:\^\*)?'*(?:\([\w,\\]*\))?"
    r"|\|[A-Z]+\||\([a-z](?:,[a-z])+\)|\\(?:int|sum|lim|prod)(?![A-Za-z]).*"
    r"|\\frac\{[A-Z]{2,}\}\{[A-Z]{2,}\}"
)
APPLIED = r"([A-Za-z])\(([A-Za-z])\)"  # f(x)
VARIABLE = r"\\?[A-Za-z]+(?: _ .*)?|[A-Za-z] \( [A-Za-z] \)"  # tokens of x_1, f(x)
INFINITY = atom("name", r"\infty")
BELOW, ABOVE = ("value", add({}, INFINITY, -1)), ("value", INFINITY)


WHOLE = "-?[0-9]{1,18}"


def judge(answer, gold):
    """The reason of a verdict: are two answers equal, and by which rule?"""
    answer, gold = answer.strip(), gold.strip()
    if answer == gold:
        return "equal: string"
    if re.fullmatch(WHOLE, answer) and re.fullmatch(WHOLE, gold):  # most of them, so first
        return "equal: value" if int(answer) == int(gold) else "different"
    return compared(shape(answer), shape(gold))


def equal_set(parts, gold):
    """Whether answers, each of its own box, are the elements of a gold answer that is a set."""
    match shape(", ".join(parts)), shape(gold.strip()):
        case ((("set", xs) as x), (("set", ys) as y)):
            whole = len(parts) in (len(ys), len(spread(ys)))
            # x = 6 and y = 24 are no set
            return whole and ordered(xs) == ordered(ys) and compared(x, y) == "equal: set"
    return False


def compared(x, y):
    """The reason of a verdict on two shapes."""
    if x != y and "unparsed" in (x[0], y[0]):
        return "unparsed"
    try:
        return "equal: " + y[0] if x == y or same(x, y, Algebra()) else "different"
    except Unparsed:
        return "unparsed"


@lru_cache(maxsize=4096)
def shape(text):
    """The shape of an answer, or ("unparsed", its text without what does not show). Cached: a gold
    answer is compared with many responses."""
    if len(text) > LONGEST:
        return "unparsed", text
    s = clean(text)
    try:
        return worded(s) or read(tokens(s), Reader())
    except Unparsed:
        return "unparsed", re.sub("(?<![0-9]) | (?![0-9])", "", s)


def worded(s):
    """The shape of an answer in words, or by a letter of multiple choice, or None."""
    if lead := re.match(LEAD, s):
        return "word", lead[0].lower()
    if choice := re.fullmatch(CHOICE, s):
        return "value", atom("name", (choice[1] or choice[2]).upper())
    if re.fullmatch(WORD, s):
        return "word", re.sub(r"^(?:the|an?) |[^a-z]", "", s.lower())
    if re.search(TRANSPOSE, s):
        raise Unparsed("a transpose: products commute here")
    return None


def read(tok, reader, depth=0):
    """The shape of an answer: its kind and what it is made of.

    ("value", sum), ("word", text), ("unit", shape, name), ("time", sums),
    ("ratio", sums, may be a time), ("set", shapes), ("union", shapes),
    ("tuple", brackets, shapes), also for a matrix and its rows,
    ("equation", name, all names of the same, sides),
    ("relation", operators, sides, the same as an interval or None).
    """
    if depth > 6 or not tok:
        raise Unparsed("too deep" if tok else "empty")

    def inner(part):
        return read(part, reader, depth + 1)

    if "".join(tok) == r"\mathbb{R}":
        return "tuple", "()", [BELOW, ABOVE]
    if tok[0] in ("(", "[", "{", r"\{", r"\mat") and closing(tok, 0) == len(tok) - 1:
        return bracketed(tok, inner)
    if tok[-1].startswith(("%", r"\unit")) and len(split(tok, LIST | {r"\cup"})) == 1:
        return "unit", inner(tok[:-1]), tok[-1]
    if len(parts := split(tok, {r"\cup"})) > 1:
        return "union", list(map(inner, parts))
    if len(parts := split(tok, LIST)) > 1:
        shapes = list(map(inner, parts))
        measures = {part[2] for part in shapes if part[0] == "unit"}
        if len(measures) > 1:  # 2 hours, 30 minutes: in order
            return "tuple", "", shapes
        return "set", shapes
    if len(parts := split(tok, {r"\approx"})) > 1:  # the exact side counts
        return inner(parts[0])
    if len(parts := split(tok, RELATIONS)) > 1:
        found = zip(tok, depths(tok), strict=True)
        return related(parts, [t for t, depth in found if not depth and t in RELATIONS], inner)
    if len(parts := split(tok, {r"\setminus"})) > 1 and "".join(parts[0]) == r"\mathbb{R}":
        hole = inner(parts[1])
        return outside(hole[1][0] if hole[0] == "set" else hole)
    if r"\pm" in tok:
        return "set", [inner([sign if t == r"\pm" else t for t in tok]) for sign in "+-"]
    if len(parts := split(tok, {":"})) > 1:
        sums, text = [reader.read(part) for part in parts], "".join(tok)
        may_be_time = bool(re.fullmatch(TIME, text))
        if may_be_time and ":0" in text:
            return "time", sums
        return "ratio", sums, may_be_time
    return "value", reader.read(tok)


def bracketed(tok, inner):
    """The shape of what stands inside one pair of brackets."""
    opener, body = tok[0], tok[1:-1]
    if opener == r"\mat":
        rows = [split(row, {"&"}) for row in split(body, {"\\\\"}) if row]
        return "tuple", "matrix", [("tuple", "row", list(map(inner, row))) for row in rows]
    parts = split(body, LIST)
    if opener == r"\{":
        condition = split(body, {"|", ":"})
        if len(condition) == 2 and not RELATIONS.isdisjoint(condition[1]):
            return inner(condition[1])  # {x | condition}
        return "set", list(map(inner, parts))
    if len(parts) > 1 or (opener == "[" and r"\mat" not in body):
        return "tuple", opener + tok[-1], list(map(inner, parts))
    return inner(body)


def related(sides, operators, inner):
    """The shape of sides joined by relations."""
    name, numbers = "".join(sides[0]), split(sides[0], {":"})  # S_1:S_2 names a ratio
    named = all(re.fullmatch(NAMED, "".join(part)) for part in numbers)
    if operators == [r"\in"] and named:
        return inner(sides[1])
    if set(operators) == {"="}:
        try:
            first = inner(sides[0])
        except Unparsed:
            if not named:
                raise
            first = "word", name  # f'(x), an integral, a limit: only its value is asked for
        rest = list(map(inner, sides[1:]))
        if len(numbers) > 1:
            rest = [(*side[:2], False) if side[0] == "ratio" else side for side in rest]
        aliases = {name} if named else set()
        if call := re.fullmatch(APPLIED, name):  # f(x) = r is y = r, and x(t) = r is x = r
            aliases |= {call[1], "y"}.difference(call[2], *sides[1:])
        return "equation", name, aliases, [first, *rest]
    if all(op in FLIP for op in operators):
        sides, operators = sides[::-1], [FLIP[op] for op in operators[::-1]]
    if not set(operators) <= {"<", r"\le"} and operators != [r"\ne"]:
        raise Unparsed("mixed relations")
    shapes = [inner(side) for side in sides]
    free = [bool(re.fullmatch(VARIABLE, " ".join(side))) for side in sides]
    return "relation", operators, shapes, interval(free, operators, shapes)


def interval(free, operators, sides):
    """An inequality in one variable as an interval or a union, any other as None."""
    match free, operators, sides:
        case [True, _], [r"\ne"], [_, point]:
            return outside(point)
        case [True, _], [op], [_, high]:
            return "tuple", "(" + ENDS[op][1], [BELOW, high]
        case [_, True], ["<" | r"\le" as op], [low, _]:
            return "tuple", ENDS[op][0] + ")", [low, ABOVE]
        case [_, True, _], [left, right], [low, _, high]:
            return "tuple", ENDS[left][0] + ENDS[right][1], [low, high]
    return None


def outside(point):
    """The line without one point."""
    return "union", [("tuple", "()", [BELOW, point]), ("tuple", "()", [point, ABOVE])]


# ---------------------------------------------------------------- equality


def same(x, y, algebra):
    """Whether two shapes are equal. Symmetric."""
    algebra.spend(1)
    if x[0] == y[0]:
        return alike(x, y, algebra)
    for a, b in ((x, y), (y, x)):
        match a, b:
            case ("unit", ("value", v), "%"), ("value", w):
                return v == w or algebra.ratio(v, w) in (1, 100)
            case ("unit", inner, name), _ if name != "%":  # one side alone names a measure
                return same(inner, b, algebra)
            case ("equation", *_), _:
                value = stated_value(a, algebra)
                return bool(value) and same(value, b, algebra)
            case ("set", [one]), _:
                return same(one, b, algebra)
            case ("set", parts), ("union", _):  # x < 2 or x > 3
                bounds = [part[3] for part in parts if part[0] == "relation"]
                return len(bounds) == len(parts) and same(("union", bounds), b, algebra)
            case ("relation", _, _, bounds), _ if bounds:
                return same(bounds, b, algebra)
            case ("ratio", [_, _] as sums, False), ("value", u):
                return proportional(sums, [u, number(1)], algebra)
    return False


def alike(x, y, algebra):
    """`same` for two shapes of one kind."""
    match x, y:
        case ("value", v), (_, w):
            return v == w or algebra.equal(v, w)
        case ("unit", inner, name), (_, other, other_name):
            return name == other_name and same(inner, other, algebra)
        case ("set" | "union", parts), (_, others):
            return matched(parts, others, algebra)
        case ("tuple", brackets, parts), (_, other_brackets, others):
            return brackets == other_brackets and pairwise(parts, others, algebra)
        case ("ratio", parts, time), (_, others, other_time):
            if time and other_time:  # 1:15 is not 2:30
                return parts == others
            return len(parts) == len(others) and proportional(parts, others, algebra)
        case ("equation", name, names, sides), (_, other_name, other_names, others):
            if name in other_names or other_name in names:
                return pairwise(sides[1:], others[1:], algebra)
            return pairwise(sides, others, algebra) or scaled(sides, others, algebra)
        case ("relation", operators, sides, _), (_, other_operators, others, _):
            if operators == other_operators:
                positive = operators != [r"\ne"]
                return pairwise(sides, others, algebra) or scaled(sides, others, algebra, positive)
    return x == y


def pairwise(xs, ys, algebra):
    return len(xs) == len(ys) and all(same(a, b, algebra) for a, b in zip(xs, ys, strict=True))


def proportional(xs, ys, algebra):
    """Whether two lists of nonzero sums of equal length differ by a rational factor."""
    factors = {algebra.ratio(x, y) for x, y in zip(xs, ys, strict=True)}
    return len(factors) == 1 and None not in factors


def scaled(xs, ys, algebra, positive=False):
    """Whether l = r and l' = r' differ by a rational factor (a positive one, for inequalities)."""
    match xs, ys:
        case [("value", a), ("value", b)], [("value", c), ("value", d)]:
            factor = algebra.ratio(add(a, b, -1), add(c, d, -1))
            return factor is not None and (factor > 0 or not positive)
    return False


def stated_value(equation, algebra):
    """The shape that x = v, x = u = v or 2 + 3 = 5 states, or None."""
    _, name, aliases, sides = equation
    stated = sides[1:] if aliases else sides
    if name[0] == "(" and stated[-1][0] != sides[0][0]:  # (x, y) = 0
        return None
    return stated[-1] if all(same(stated[0], side, algebra) for side in stated[1:]) else None


def spread(parts):
    """The elements of a list; an element a +- b stands for two."""
    out = []
    for part in parts:
        out += part[1] if part[0] == "set" else [part]
    return out


def ordered(parts):
    """Whether a list gives values to different letters; x_1 and x_2, or x twice, are one letter."""
    parts = [part[1] if part[0] == "unit" else part for part in parts]
    named = all(part[0] == "equation" and part[2] for part in parts)
    return named and len({re.split(r"[_(]", part[1])[0] for part in parts}) > 1


def matched(xs, ys, algebra):
    """Whether two lists are equal as multisets; k = 4, n = 2 and a bare list in their order."""
    xs, ys = spread(xs), spread(ys)
    if len(xs) != len(ys):
        return False
    if ordered(xs) != ordered(ys):
        return pairwise(xs, ys, algebra)
    for x in xs:
        equal_ones = [y for y in ys if same(x, y, algebra)]
        if not equal_ones:
            return False
        ys.remove(equal_ones[0])
    return True
