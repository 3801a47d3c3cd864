r"""Exact values of formulas: read one LaTeX expression into a sum of products, decide whether such
a sum is zero.

    Reader().read(tokens(r"\sqrt{12} + x^2")) -> {monomial: coefficient}
    Algebra().equal(a, b) -> bool

A sum maps monomials to nonzero rational coefficients (int or Fraction, never float); a monomial is
a sorted tuple of (atom, exponent); an atom is a pair of its kind and x:
    ("prime", p)       a prime under a root, or -1: (-1) ** (1/2) is i
    ("name", text)     a variable or a constant such as pi
    ("exp", monomial)  e to that power
    ("sum", items)     a frozen sum that could not be expanded: a denominator, or under a root
    ("ln", atom)       its natural logarithm
    ("call", (f, xs))  a function of frozen sums
What makes the form canonical, so that a - b is empty when a = b:
 - integers under roots are factored: sqrt(12) is 2 sqrt(3), and 1 / sqrt(2) is sqrt(2) / 2;
 - circular and hyperbolic functions are written in exponentials (Euler), e ** (pi i r) at the usual
   angles in radicals;
 - a power with a symbol above is exp(exponent * ln(base)), and ln of a product is a sum: 4 ** n and
   2 ** (2 n) are the same atoms.
Only denominators can be left in a - b: `equal` multiplies them away. Nested radicals are compared
as they stand. Nothing is approximated, nothing is evaluated as code. The work is bounded by fuel,
depth, sizes and bits; beyond them, as for anything outside the language, `Unparsed` is raised.
"""

import itertools
import math
import re
from fractions import Fraction
from functools import lru_cache

FUEL = 1500  # of one reading or comparison, in products of two terms
BITS = 16000  # of any integer
LARGEST = 250  # nodes of an atom
DEPTH = 30  # of nested brackets
MINUS = ("prime", -1)
HALF = Fraction(1, 2)
IPI = ((("name", r"\pi"), 1), (MINUS, HALF))
# cos(pi r) for 0 <= r <= 1/2; sin and the rest of the circle follow
COSINES = {
    Fraction(r): cosine
    for r, cosine in {
        "0": "1",
        "1/12": r"(\sqrt6+\sqrt2)/4",
        "1/10": r"\sqrt{10+2\sqrt5}/4",
        "1/6": r"\sqrt3/2",
        "1/5": r"(1+\sqrt5)/4",
        "1/4": r"\sqrt2/2",
        "3/10": r"\sqrt{10-2\sqrt5}/4",
        "1/3": "1/2",
        "2/5": r"(\sqrt5-1)/4",
        "5/12": r"(\sqrt6-\sqrt2)/4",
        "1/2": "0",
    }.items()
}
CIRCULAR = set("sin cos tan cot sec csc sinh cosh tanh coth".split())
RECIPROCALS = {"cot": "tan", "sec": "cos", "csc": "sin", "coth": "tanh"}
FUNCTIONS = CIRCULAR | set(
    "ln log lg exp arcsin arccos arctan arsinh arcosh artanh "
    "max min gcd lcm det arg deg dim ker tr sgn".split()
)


class Unparsed(Exception):
    """The text is outside the language read here, or a budget ran out."""


# ---------------------------------------------------------------- sums


def number(x):
    return {(): x} if x else {}


def atom(kind, x, k=1):
    return {(((kind, x), k),): 1}


def plain(x):
    """A rational number, as an int if it is whole."""
    return x.numerator if x.denominator == 1 else x


def rational(s):
    """The rational number that a sum is, or None."""
    return plain(s.get((), 0)) if s.keys() <= {()} else None


def accumulate(out, s, scale):
    """out += scale * s in place."""
    for m, c in s.items():
        c = out.pop(m, 0) + c * scale
        if c:
            if (c.numerator * c.denominator).bit_length() > 2 * BITS:
                raise Unparsed("number too large")
            out[m] = c
    return out


def add(a, b, scale=1):
    return accumulate(dict(a), b, scale)


def negative(s):
    return {m: -c for m, c in s.items()}


def expandable(s, k):
    """Whether s ** k is written out: a sum, up to 200 terms."""
    small = len(s) > 1 and k.denominator == 1 and 1 <= k <= 200
    return small and math.comb(k + len(s) - 1, k) <= 200


def weight(x):
    return 1 + sum(map(weight, x)) if isinstance(x, tuple) else 1


@lru_cache(maxsize=1024)
def factor(n):
    """[(p, exponent)] of n > 0 by trial division to 1,000; what is left counts as one prime."""
    if n.bit_length() > 2000:
        raise Unparsed("number too large")
    out = []
    for p in (2, *range(3, 1000, 2)):
        k = 0
        while n % p == 0:
            n, k = n // p, k + 1
        if k:
            out.append((p, k))
        if p * p > n:
            break
    return [*out, (n, 1)] if n > 1 else out


def factors(c):
    """[(atom, exponent)] of a positive rational."""
    parts = (c.numerator, 1), (c.denominator, -1)
    return [(("prime", p), k * sign) for n, sign in parts for p, k in factor(n)]


@lru_cache(maxsize=64)
def constant(text):
    return Reader().read(tokens(text))


class Algebra:
    """Arithmetic on sums with the fuel of one reading or comparison."""

    def __init__(self):
        self.fuel = FUEL

    def spend(self, n):
        self.fuel -= n
        if self.fuel < 0:
            raise Unparsed("too much work")

    def inside(self, x):
        """x, checked to be small enough to sit inside an atom: nested functions could make it grow
        exponentially."""
        if weight(x) > LARGEST:
            raise Unparsed("too large")
        return x

    def freeze(self, s):
        return self.inside(tuple(sorted(s.items())))

    def mul(self, a, b):
        for s, other in ((a, b), (b, a)):
            r = rational(s)
            if r is not None:
                return accumulate({}, other, r)
        self.spend(len(a) * len(b))
        out = {}
        for ma, ca in a.items():
            for mb, cb in b.items():
                accumulate(out, self.settle(ma + mb), ca * cb)
        return out

    def settle(self, powers):
        """The product of powers as a sum, each in its range: p ** k has 0 < k < 1, sums are
        expanded."""
        exponents = {}
        for a, k in powers:
            exponents[a] = exponents.get(a, 0) + k
        c, mono, sums = 1, [], []
        for a, k in exponents.items():
            kind, x = a
            whole = math.floor(k)
            if kind == "prime" and whole:
                c, k = c * self.integer_power(x, whole), k - whole
            elif kind == "sum" and expandable(x, whole):
                sums.append(self.power(dict(x), whole))
                k -= whole
            if a == MINUS and k and k != HALF and abs(HALF - k) in COSINES:
                # e ** (pi i k) is cos + i sin
                cos, sin = constant(COSINES[min(k, 1 - k)]), constant(COSINES[abs(HALF - k)])
                sin = self.mul(atom("prime", -1, HALF), sin)
                sums.append(add(sin, cos, 1 if k < HALF else -1))
            elif k:
                mono.append((a, plain(k)))
        mono.sort()
        out = {tuple(mono): c}
        for s in sums:
            out = self.mul(out, s)
        return out

    def integer_power(self, c, k):
        """c ** k for a rational c and an integer k."""
        if abs(k) * ((c.numerator * c.denominator).bit_length() - 1) > BITS:
            raise Unparsed("number too large")
        if not c and k < 0:
            raise Unparsed("division by zero")
        return plain(Fraction(c) ** k) if k < 0 else c**k

    def power(self, s, r):
        """s ** r for a rational r. An even power under an even root leaves an absolute value."""
        r = plain(r)
        if not s:
            return number(self.integer_power(0, (r > 0) - (r < 0)))
        if expandable(s, r):
            out = s
            for _ in range(r - 1):
                out = self.mul(out, s)
            return out
        c, m = self.product(s)
        powers = []
        for a, k in m:
            if a[0] in ("name", "call") and k % 2 == 0 and k * r % 2 == 1:
                a = ("call", ("abs", (self.freeze(atom(*a)),)))
            powers.append((a, k * r))
        return self.mul(self.root(c, r), self.settle(powers))

    def product(self, s):
        """A sum as (c, monomial): of several terms the content c, a positive rational that leaves
        coprime integers, and an atom."""
        if len(s) == 1:
            ((m, c),) = s.items()
            return c, m
        over = math.gcd(*(c.numerator for c in s.values()))
        under = math.lcm(*(c.denominator for c in s.values()))
        rest = self.freeze(accumulate({}, s, Fraction(under, over)))
        return Fraction(over, under), ((("sum", rest), 1),)

    def root(self, c, r):
        """c ** r for rationals as a sum; an odd root of a negative number is real."""
        if c == 1 or r.denominator == 1:
            return number(self.integer_power(c, math.ceil(r)))
        powers = [(a, k * r) for a, k in factors(abs(c))]
        if c < 0:
            powers.append((MINUS, r.numerator if r.denominator % 2 else r))
        return self.settle(powers)

    def exp(self, s):
        """e ** s: c ln(a) gives a ** c, any other product stands above e."""
        powers = []
        for m, c in s.items():
            match m:
                case ((("ln", a), 1),):
                    powers.append((a, c))
                case _:
                    powers.append((MINUS if m == IPI else ("exp", m), c))
        return self.settle(self.inside(tuple(powers)))

    def ln(self, s):
        """Natural logarithm; of a product as a sum, which takes its symbols as positive."""
        if not s:
            raise Unparsed("logarithm of zero")
        c, m = self.product(s)
        out = {IPI: 1} if c < 0 else {}
        for a, k in [*factors(abs(c)), *m]:
            one = IPI if a == MINUS else a[1] if a[0] == "exp" else ((("ln", self.inside(a)), 1),)
            out = add(out, {one: k})
        return out

    def call(self, name, *args):
        return atom("call", (name, tuple(map(self.freeze, args))))

    def function(self, name, x):
        """A named function of one argument; by Euler's formulas, if it is circular."""
        r = rational(x)
        if name == "abs" and r is not None:
            return number(abs(r))
        if name not in CIRCULAR:
            return self.call(name, x)
        if name in RECIPROCALS:
            return self.power(self.function(RECIPROCALS[name], x), -1)
        j = number(1) if name[-1] == "h" else atom("prime", -1, HALF)
        up, down = self.exp(self.mul(j, x)), self.exp(negative(self.mul(j, x)))
        cos = self.mul(number(HALF), add(up, down))
        if name[:3] == "cos":
            return cos
        sin = self.mul(self.power(j, -1), self.mul(number(HALF), add(up, down, -1)))
        return sin if name[:3] == "sin" else self.mul(sin, self.power(cos, -1))

    def equal(self, a, b):
        """Whether two sums are equal once the denominators of a - b are multiplied away."""
        s = add(a, b, -1)
        for _ in range(4):
            lowest = {}
            for a, k in itertools.chain(*s):
                if a[0] == "sum" and k < 0:
                    lowest[a] = min(lowest.get(a, 0), k)
            if not lowest:
                break
            s = self.mul(s, {tuple((a, -k) for a, k in lowest.items()): 1})
        return not s

    def ratio(self, a, b):
        """The rational number a / b, or None if it is none or a or b is zero."""
        shared = a.keys() & b.keys()
        if not shared:
            return None
        m = max(shared)
        k = Fraction(a[m]) / b[m]
        return k if self.equal(a, accumulate({}, b, k)) else None


# ---------------------------------------------------------------- reading

DIGITS = set("0123456789")
# of a number after \frac or \sqrt one digit, as in \frac12
TOKEN = re.compile(
    r"(?:(?<=\\frac)|(?<=\\frac )|(?<=\\frac[0-9])|(?<=\\frac [0-9])|(?<=\\sqrt)|(?<=\\log_))[0-9]"
    r"|[0-9]+(?:\.[0-9]*)?|\.[0-9]+|\\[A-Za-z]+|\\.|\S"
)
OPEN = {
    "(": ")",
    "[": "]",
    "{": "}",
    r"\{": r"\}",
    r"\mat": r"\endmat",
}
CLOSE = set(OPEN.values())
END = CLOSE | {"", "+", "-", ","}  # of a product
SYMBOLS = set(
    r"\alpha \beta \gamma \delta \epsilon \varepsilon \zeta \eta \theta \vartheta \iota \kappa "
    r"\lambda \mu \nu \xi \pi \rho \sigma \tau \upsilon \phi \varphi \chi \psi \omega \Gamma "
    r"\Delta \Theta \Lambda \Xi \Pi \Sigma \Upsilon \Phi \Psi \Omega \ell \hbar \aleph \beth "
    r"\emptyset \infty \wp \angle \triangle \partial \nabla \Re \Im".split()
)
DECORATIONS = set(
    r"\mathbb \mathcal \mathfrak \mathscr \hat \bar \overline \tilde \widehat "
    r"\overrightarrow".split()
)
# f(x + 1) is no product
APPLIED = set(r"f g h F G H P O \Gamma \zeta \phi \varphi \psi \chi \delta \Phi \wp".split())


def tokens(s):
    return TOKEN.findall(s)


def depths(tok):
    """How many brackets are open after each token."""
    return list(itertools.accumulate((t in OPEN) - (t in CLOSE) for t in tok))


def closing(tok, start):
    """Index of the token that closes the bracket at `start`; kinds may differ, as in (3, 4]."""
    opened = depths(tok[start:])
    if 0 not in opened:
        raise Unparsed("unclosed bracket")
    return start + opened.index(0)


def split(tok, separators):
    """The parts of a list of tokens between separators (a set) outside all brackets."""
    if separators.isdisjoint(tok):
        return [tok]
    parts = [[]]
    for t, depth in zip(tok, depths(tok), strict=True):
        if depth == 0 and t in separators:
            parts.append([])
        else:
            parts[-1].append(t)
    return parts


class Reader(Algebra):
    """Recursive descent over tokens. expr: terms; term: factors; factor: a base with what stands
    above or after it."""

    def read(self, tok):
        """The value of a whole expression."""
        self.tok, self.at = [*tok, ""], 0  # "" stands for the end
        self.depth, self.bars, self.degrees = 0, False, False
        out = self.expr()
        if self.peek():
            raise Unparsed("trailing " + self.peek())
        return out

    def peek(self):
        return self.tok[self.at]

    def next(self):
        if not self.peek():
            raise Unparsed("expected more")
        self.at += 1
        return self.tok[self.at - 1]

    def take(self, *wanted):
        """The next token if it is one of these, else ""."""
        return self.next() if self.peek() in wanted else ""

    def expr(self):
        self.depth += 1
        if self.depth > DEPTH:
            raise Unparsed("too deep")
        out, sign = {}, self.take("+", "-") or "+"
        while sign:
            out = add(out, self.term(), 1 if sign == "+" else -1)
            sign = self.take("+", "-")
        self.depth -= 1
        return out

    def term(self):
        out = self.factor()
        while (t := self.peek()) not in END:
            if t == "|" and self.bars:
                break
            if t[0] in DIGITS and self.tok[self.at - 1][-1] in DIGITS:
                raise Unparsed("two numbers side by side")
            self.take("*", "/")
            minus = self.take("-")
            right = self.factor()
            right = self.power(right, -1) if t == "/" else right
            out = self.mul(out, negative(right) if minus else right)
        return out

    def factor(self):
        out = self.base()
        while t := self.take("^", "!", "°"):
            if t == "^":
                out = self.raised(out, self.script())
            elif t == "!":
                match rational(out), self.peek():
                    case _, "!":
                        raise Unparsed("a double factorial")
                    case int(n), _ if 0 <= n <= 60:
                        out = number(math.factorial(n))
                    case _:
                        out = self.call("!", out)
            elif self.degrees:
                # dropped, except where they change the value
                out = self.mul(out, {((("name", r"\pi"), 1),): Fraction(1, 180)})
        return out

    def raised(self, base, exponent):
        """base ** exponent: the rational part as a power, the rest as exp(rest * ln(base))."""
        rest = {m: c for m, c in exponent.items() if m}
        out = self.power(base, exponent.get((), 0))
        return self.mul(out, self.exp(self.mul(rest, self.ln(base)))) if rest else out

    def script(self):
        """What stands above ^ or below _."""
        return negative(self.base()) if self.take("-") else self.base()

    def group(self, closer):
        """The sums up to the closing bracket, between commas."""
        bars, self.bars = self.bars, closer == "|"
        out = [self.expr()]
        while self.take(","):
            out.append(self.expr())
        self.bars = bars
        if not self.take(closer):
            raise Unparsed("unclosed bracket")
        return out

    def base(self):
        t = self.next()
        if t.strip(".")[:1] in DIGITS:
            return self.numeral(t)
        if t in OPEN or t == "|":
            inner = self.group(OPEN.get(t, t))
            if len(inner) > 1:
                raise Unparsed("a list")
            return self.function("abs", inner[0]) if t == "|" else inner[0]
        if t == r"\frac":
            over, under = self.base(), self.base()
            return self.mul(over, self.power(under, -1))
        if t == r"\sqrt":
            n = rational(self.group("]")[0]) if self.take("[") else 2
            if not n:
                raise Unparsed("root index")
            return self.power(self.base(), 1 / Fraction(n))
        if t == r"\binom":
            n, k = self.base(), self.base()
            match rational(n), rational(k):
                case int(a), int(b) if 0 <= b <= a <= 200:
                    return number(math.comb(a, b))
            return self.call("binom", n, k)
        if t[0] == "\\" and t[1:] in FUNCTIONS:
            return self.applied(t[1:])
        if t in DECORATIONS or t in SYMBOLS or (len(t) == 1 and t.isalpha()):
            return self.symbol(t)
        raise Unparsed("unknown " + t)

    def numeral(self, t):
        x = plain(Fraction(t))
        if self.peek() == "_":  # the base is part of the value
            return atom("name", t + self.subscript())
        if self.peek() == r"\overline" and "." in t:  # 0.1\overline{6}
            self.next()
            digits, places = self.raw(), len(t.partition(".")[2])
            if not digits.isdigit():
                raise Unparsed("repeating decimal")
            return number(x + Fraction(int(digits), (10 ** len(digits) - 1) * 10**places))
        if t.isdigit() and self.peek() == r"\frac":
            # a mixed number, if the fraction is a number below 1
            part = self.base()
            mixed = x and 0 < (rational(part) or 0) < 1
            return add(number(x), part) if mixed else self.mul(number(x), part)
        return number(x)

    def raw(self):
        """One group or token as text, for a name."""
        if self.peek() != "{":
            return self.next()
        end = closing(self.tok, self.at)
        text = "".join(self.tok[self.at + 1 : end])
        self.at = end + 1
        return text

    def subscript(self):
        return "_" + self.raw() if self.take("_") else ""

    def symbol(self, t):
        """A letter with its subscript; before a parenthesis, an application (one argument
        list) or a factor (a sum follows)."""
        name = t + (self.raw() if t in DECORATIONS else "") + self.subscript()
        if name == "e":
            return atom("exp", ())  # of the monomial () = 1
        if name == "i":
            return atom(*MINUS, HALF)
        if name == r"\infty" and "".join(self.tok).strip("+-") != name:
            raise Unparsed("arithmetic with infinity")
        if self.peek() == "(" and name != r"\pi":
            inner = self.tok[self.at + 1 : closing(self.tok, self.at)]
            if name in APPLIED or len(split(inner, {"+", "-"})) == 1:
                self.next()
                return self.call(name, *self.group(")"))
        return atom("name", name)

    def applied(self, name):
        r"""\sin^2 x, \log_2(x), \max\{a, b\}: without brackets the argument is the product that
        follows, up to the next function."""
        scripts = {}
        while t := self.take("_", "^"):
            scripts[t] = self.script()
        below, exponent = scripts.get("_"), scripts.get("^")
        if exponent == number(-1):
            name, exponent = "arc" + name, None
        degrees, self.degrees = self.degrees, name in CIRCULAR
        if opener := self.take("(", "[", "{", r"\{"):
            args = self.group(OPEN[opener])
        else:
            args = [self.factor()]
            while (t := self.peek()) in SYMBOLS or t.isalnum():
                args[0] = self.mul(args[0], self.factor())
        self.degrees = degrees
        if name in ("ln", "log"):
            out = self.ln(args[0])
            if below is not None:
                out = self.mul(out, self.power(self.ln(below), -1))
        elif name == "exp":
            out = self.exp(args[0])
        elif len(args) > 1:
            out = self.call(name, *sorted(args, key=lambda s: sorted(s.items())))
        else:
            out = self.function(name, args[0])
        return self.raised(out, exponent) if exponent is not None else out
