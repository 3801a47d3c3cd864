r"""Exact values of formulas: read one LaTeX expression into a sum of products, decide whether such
a sum is zero.

    Algebra().read(tokens(r"\sqrt{12} + x^2")) -> {monomial: coefficient}
    Algebra().is_zero(a - b) -> bool

A sum maps monomials to nonzero rational coefficients (int or Fraction, never float); a monomial is
a sorted tuple of (atom, exponent); an atom is a root of a prime, a name, a power of e, a sum that
could not be expanded, or a function of frozen sums. What makes the form canonical, so that a - b is
empty when a = b:
 - integers under roots are factored: sqrt(12) is 2 sqrt(3), and 1 / sqrt(2) is sqrt(2) / 2;
 - circular and hyperbolic functions are written in exponentials (Euler), e ** (pi i r) at the usual
   angles in radicals;
 - a power with a symbol above is exp(exponent * ln(base)), and ln of a product is a sum: 4 ** n and
   2 ** (2 n) are the same atoms.
Two things can be left in a - b. Denominators are atoms (sum, -k): `is_zero` multiplies them away.
Nested radicals: `sign` proves that an algebraic number is zero by interval arithmetic below a root
bound. Nothing is approximated, nothing is evaluated as code. The work is bounded by fuel, depth,
sizes and bits; beyond them, as for anything outside the language, `Unparsed` is raised.
"""

import math
import re
from fractions import Fraction
from functools import lru_cache

FUEL = 5000  # of one reading or comparison, in products of two light terms
BITS = 16000  # of any integer
LARGEST = 250  # nodes of an atom
DEPTH = 30  # of nested brackets
# an atom is (kind, x), x an integer, a name, a monomial, a frozen sum, (name, frozen sums)
PRIME, NAME, EXP, SUM, CALL = range(5)
I, PI, E = (NAME, "i"), (NAME, r"\pi"), (EXP, ())  # e is exp of the monomial () = 1
IPI = ((PI, 1), (I, 1))
HALF = Fraction(1, 2)
# cos(pi r) for 0 <= r <= 1/2; sin and the rest of the circle follow
COSINES = {
    Fraction(*r): cosine
    for r, cosine in {
        (0, 1): "1",
        (1, 12): r"(\sqrt6+\sqrt2)/4",
        (1, 10): r"\sqrt{10+2\sqrt5}/4",
        (1, 8): r"\sqrt{2+\sqrt2}/2",
        (1, 6): r"\sqrt3/2",
        (1, 5): r"(1+\sqrt5)/4",
        (1, 4): r"\sqrt2/2",
        (3, 10): r"\sqrt{10-2\sqrt5}/4",
        (1, 3): "1/2",
        (3, 8): r"\sqrt{2-\sqrt2}/2",
        (2, 5): r"(\sqrt5-1)/4",
        (5, 12): r"(\sqrt6-\sqrt2)/4",
        (1, 2): "0",
    }.items()
}
INVERSES = {
    "arcsin": [HALF - r for r in COSINES] + [r - HALF for r in COSINES],
    "arccos": [*COSINES, *(1 - r for r in COSINES)],
    "arctan": [r * sign for r in COSINES if r < HALF for sign in (1, -1)],
}
TRIGONOMETRIC = set("sin cos tan cot sec csc sinh cosh tanh coth".split())
FUNCTIONS = TRIGONOMETRIC | set(
    "ln log lg exp arcsin arccos arctan arsinh arcosh artanh "
    "max min gcd lcm det arg deg dim ker tr sgn".split()
)


class Unparsed(Exception):
    """The text is outside the language read here, or a budget ran out."""


# ---------------------------------------------------------------- sums


def number(x):
    return {(): x} if x else {}


def atom(a, k=1):
    return {((a, k),): 1}


def rational(s):
    """The rational number that a sum is, or None."""
    if s and (len(s) > 1 or () not in s):
        return None
    c = s.get((), 0)
    return c.numerator if c.denominator == 1 else c


def accumulate(out, s, scale):
    """out += scale * s in place."""
    for m, c in s.items():
        c = out.pop(m, 0) + c * scale
        if c:
            if c.numerator.bit_length() + c.denominator.bit_length() > 2 * BITS:
                raise Unparsed("number too large")
            out[m] = c
    return out


def add(a, b, scale=1):
    return accumulate(dict(a), b, scale)


def negative(s):
    return {m: -c for m, c in s.items()}


def content(s):
    """(c, s / c) with c > 0 rational and the coefficients of s / c coprime integers."""
    c = Fraction(
        math.gcd(*(c.numerator for c in s.values())), math.lcm(*(c.denominator for c in s.values()))
    )
    if c.denominator.bit_length() > BITS:
        raise Unparsed("number too large")
    return c, {m: (v / c).numerator for m, v in s.items()}


def expandable(s, k):
    """Whether s ** k is written out: up to 200 terms."""
    return 1 <= k <= 200 and math.comb(k + len(s) - 1, k) <= 200


def weight(x):
    return 1 + sum(map(weight, x)) if isinstance(x, tuple) else 1


def nth_root(n, k):
    """floor(n ** (1/k)) for integers n >= 0, k >= 1 (Newton's method from above)."""
    if k == 1 or n < 2:
        return n
    if k == 2:
        return math.isqrt(n)
    x = 1 << -(-n.bit_length() // k)
    while (y := ((k - 1) * x + n // x ** (k - 1)) // k) < x:
        x = y
    return x


@lru_cache(maxsize=1024)
def factor(n):
    """[(p, exponent)] of n > 0 by trial division to 1,000; what is left counts as one prime, or the
    power of one."""
    out = []
    if n.bit_length() > 2000:
        raise Unparsed("number too large")
    for p in (2, *range(3, 1000, 2)):
        k = 0
        while n % p == 0:
            n, k = n // p, k + 1
        if k:
            out.append((p, k))
        if p * p > n:
            break
    for k in (2, 3, 5, 1):
        root = nth_root(n, k)
        if n > 1 and root**k == n:
            return [*out, (root, k)]
    return out


def factors(c):
    """[(p, exponent)] of a positive rational."""
    return factor(c.numerator) + [(p, -k) for p, k in factor(c.denominator)]


class Algebra:
    """Arithmetic on sums with the fuel of one reading or comparison."""

    def __init__(self):
        self.fuel = FUEL

    def read(self, tok):
        return Reader(tok, self).value()

    def spend(self, n):
        self.fuel -= n
        if self.fuel < 0:
            raise Unparsed("too much work")

    def inside(self, x):
        """x, checked to be small enough to sit inside an atom: nested functions could make it grow
        exponentially."""
        size = weight(x)
        self.spend(size >> 3)
        if size > LARGEST:
            raise Unparsed("too large")
        return x

    def freeze(self, s):
        return self.inside(tuple(sorted(s.items())))

    def mul(self, a, b):
        for s, other in ((a, b), (b, a)):
            r = rational(s)
            if r is not None:
                return other if r == 1 else accumulate({}, other, r) if r else {}
        # a pair costs about 10 us, and as much again for 16 nodes
        pairs = len(a) * len(b)
        self.spend(pairs if pairs < 5 else pairs * (1 + max(map(weight, (*a, *b))) // 16))
        out = {}
        for ma, ca in a.items():
            for mb, cb in b.items():
                accumulate(out, self.settle(ma + mb), ca * cb)
        return out

    def settle(self, powers):
        """The product of powers as a sum, each in its range: p ** k and e ** (pi i k) have 0 < k <
        1, i is bare, sums are expanded."""
        exponents = {}
        for a, k in powers:
            exponents[a] = exponents.get(a, 0) + k
        c, mono, sums = 1, [], []
        for a, k in exponents.items():
            kind, x = a
            if kind == PRIME and not 0 < k < 1:
                whole = math.floor(k)
                c, k = c * self.rational_power(x, whole), k - whole
            elif a == I:
                c, k = -c if k % 4 >= 2 else c, k % 2
            elif kind == SUM and expandable(x, math.floor(k)):
                whole = math.floor(k)
                sums.append(self.power(dict(x), whole))
                k -= whole
            elif kind == EXP and x == IPI:
                c, k = -c if k % 2 >= 1 else c, k % 1
                if abs(HALF - k) in COSINES:
                    cos = constant(COSINES[k]) if k <= HALF else negative(constant(COSINES[1 - k]))
                    sums.append(add(cos, self.mul(atom(I), constant(COSINES[abs(HALF - k)]))))
                    continue
            if k:
                mono.append((a, k.numerator if k.denominator == 1 else k))
        mono.sort()
        out = {tuple(mono): c}
        for s in sums:
            out = self.mul(out, s)
        return out

    def rational_power(self, c, k):
        """c ** k for an integer k, as a number."""
        if abs(k) * (max(c.numerator.bit_length(), c.denominator.bit_length()) - 1) > BITS:
            raise Unparsed("number too large")
        if not c and k < 0:
            raise Unparsed("division by zero")
        return (
            c**k
            if k >= 0
            else Fraction(c.denominator, c.numerator) ** -k
            if k < -1
            else Fraction(c.denominator, c.numerator)
        )

    def power(self, s, r):
        """s ** r for a rational r. An even power under an even root leaves an absolute value; an
        odd root of a negative number is real."""
        r = r.numerator if r.denominator == 1 else r
        if r == 1:
            return s
        if not s:
            return number(self.rational_power(0, r if r.denominator == 1 else -1 if r < 0 else 1))
        if len(s) == 1:
            ((m, c),) = s.items()
            out = self.root(c, r)
            for a, k in m:
                if a == I and r.denominator > 1:
                    a, k = (EXP, IPI), k * HALF
                elif a[0] in (NAME, CALL) and a != PI and k % 2 == 0 and k * r % 2 == 1:
                    a = (CALL, ("abs", (self.freeze(atom(a)),)))
                out = self.mul(out, self.settle(((a, k * r),)))
            return out
        if r.denominator == 1 and expandable(s, r):
            out = self.mul(*[self.power(s, r // 2)] * 2)
            return self.mul(out, s) if r % 2 else out
        c, rest = content(s)
        return self.mul(self.root(c, r), atom((SUM, self.freeze(rest)), r))

    def root(self, c, r):
        """c ** r for rationals as a sum."""
        if c == 1 or r.denominator == 1:
            return number(self.rational_power(c, r.numerator))
        out = number(1)
        if c < 0:
            out = (
                number(-1 if r.numerator % 2 else 1)
                if r.denominator % 2
                else self.settle((((EXP, IPI), r),))
            )
        return self.mul(out, self.settle([((PRIME, p), k * r) for p, k in factors(abs(c))]))

    def exp(self, s):
        """e ** s: c ln(a) gives a ** c, any other product stands above e."""
        out, powers = number(1), []
        for m, c in s.items():
            if len(m) == 1 and m[0][1] == 1 and m[0][0][0] == CALL and m[0][0][1][0] == "ln":
                out = self.mul(out, self.power(dict(m[0][0][1][1][0]), c))
            else:
                powers.append(((EXP, self.inside(m)), c))
        self.inside(tuple(powers))
        return self.mul(out, self.settle(powers))

    def ln(self, s):
        """Natural logarithm; of a product as a sum, which takes its symbols as positive."""
        if not s:
            raise Unparsed("logarithm of zero")
        if len(s) == 1:
            ((m, c),) = s.items()
        else:
            c, rest = content(s)
            m = (((SUM, self.freeze(rest)), 1),)
        out = {IPI: 1} if c < 0 else {}
        for a, k in [((PRIME, p), k) for p, k in factors(abs(c))] + list(m):
            kind, x = a
            if kind == EXP or a == I:
                out = add(out, {x: 1} if kind == EXP else {IPI: HALF}, k)
            else:
                out = add(
                    out,
                    self.call(
                        "ln", dict(x) if kind == SUM else number(x) if kind == PRIME else atom(a)
                    ),
                    k,
                )
        return out

    def call(self, name, *args):
        return atom((CALL, (name, tuple(map(self.freeze, args)))))

    def function(self, name, x):
        """A named function of one argument."""
        r = rational(x)
        if name in TRIGONOMETRIC:
            j = number(1) if name[-1] == "h" else atom(I)
            up, down = self.exp(self.mul(j, x)), self.exp(negative(self.mul(j, x)))
            cos = self.mul(number(HALF), add(up, down))
            sin = self.mul(self.power(j, -1), self.mul(number(HALF), add(up, down, -1)))
            one = number(1)
            over, under = {
                "sin": (sin, one),
                "cos": (cos, one),
                "tan": (sin, cos),
                "cot": (cos, sin),
                "sec": (one, cos),
                "csc": (one, sin),
            }[name.removesuffix("h")]
            return self.mul(over, self.power(under, -1))
        if r is not None and name in ("abs", "floor", "ceil"):
            return number({"abs": abs, "floor": math.floor, "ceil": math.ceil}[name](r))
        if name == "abs":
            c, x = content(x)
            x = negative(x) if max(x.items())[1] < 0 else x
            sign = self.sign(x)
            return self.mul(number(c), accumulate({}, x, sign) if sign else self.call(name, x))
        if name in INVERSES and all(algebraic(a) for m in x for a, _ in m):
            for angle in INVERSES[name]:  # the usual angles
                if (
                    self.function(name.removeprefix("arc"), {((PI, 1),): angle} if angle else {})
                    == x
                ):
                    return {((PI, 1),): angle} if angle else {}
        return self.call(name, x)

    # ------------------------------------------------------------ is it zero?

    def is_zero(self, s):
        """Whether a sum vanishes: multiply its denominators away, then the coefficient of every
        product of symbols must vanish."""
        for _ in range(12):
            lowest = {}
            for m in s:
                for a, k in m:
                    if a[0] == SUM:
                        lowest[a] = min(lowest.get(a, 0), k)
            clear = tuple((a, -k) for a, k in lowest.items() if k < 0)
            if not clear:
                break
            self.spend(len(s) + sum(map(weight, s)) // 16)
            s, before = {}, s
            for m, c in before.items():
                accumulate(s, self.settle(m + clear), c)
        return all(
            any(a[0] == SUM for m in group for a, _ in m) and self.sign(content(group)[1]) == 0
            for group in by_symbols(s).values()
        )

    def sign(self, s):
        """-1, 0 or 1 for a sum of real radicals with integer coefficients and no denominators; None
        if it is not one, or too costly.

        s is an algebraic integer; its degree is at most D, the product of the root indices in it;
        its conjugates are at most 2 ** bits in absolute value, and their product is an integer. So
        s is 0 or |s| >= 2 ** (-bits * (D - 1)): an enclosure closer to 0 is a proof.
        """
        roots = {}
        if not all(collect(a, k, roots) for m in s for a, k in m):
            return None
        bits = log_bound(s)
        needed = bits * math.prod(roots.values())
        if needed > 6000:
            return None
        self.spend(needed >> 1)
        lo, hi = enclose(s, needed + 2 * bits + 32)
        if lo > 0 or hi < 0:
            return 1 if lo > 0 else -1
        return 0 if max(-lo, hi) < 1 << (2 * bits + 32) else None


def algebraic(a):
    return a[0] == PRIME or (a[0] == SUM and all(algebraic(b) for m, _ in a[1] for b, _ in m))


def by_symbols(s):
    """{product of symbols: its coefficient}, the coefficients being sums of real algebraic
    numbers."""
    groups = {}
    for m, c in s.items():
        inner = tuple(p for p in m if algebraic(p[0]))
        groups.setdefault(tuple(p for p in m if not algebraic(p[0])), {})[inner] = c
    return groups


def collect(a, k, roots):
    """Add the root index of a ** k, and of all roots inside it, to `roots`; False if it is not an
    algebraic integer."""
    roots[a] = math.lcm(roots.get(a, 1), k.denominator)
    return k > 0 and (
        a[0] == PRIME or a[0] == SUM and all(collect(b, j, roots) for m, _ in a[1] for b, j in m)
    )


def log_bound(s):
    """log2 of a bound on every conjugate of an algebraic sum, rounded up (triangle inequality)."""
    terms = [
        c.numerator.bit_length()
        + sum(
            math.ceil(k * (x.bit_length() if kind == PRIME else log_bound(dict(x))))
            for (kind, x), k in m
        )
        for m, c in s.items()
    ]
    return max(terms) + len(terms).bit_length()


def enclose(s, bits):
    """Integers (lo, hi) with lo <= s * 2 ** bits <= hi; the root of a negative number is real if
    its index is odd, Unparsed if even."""
    low = high = 0
    for m, c in s.items():
        lo = hi = 1 << bits
        for (kind, x), k in m:
            a, b = (x << bits, x << bits) if kind == PRIME else enclose(dict(x), bits)
            n = k.denominator
            if a < 0 and n % 2 == 0:
                raise Unparsed("even root of a negative number")
            a, b = (v << bits * (n - 1) for v in (a, b))
            a = nth_root(a, n) if a >= 0 else -nth_root(-a, n) - 1
            b = nth_root(b, n) + 1 if b >= 0 else -nth_root(-b, n)
            for _ in range(k.numerator):
                ends = [p * q for p in (lo, hi) for q in (a, b)]
                lo, hi = min(ends) >> bits, (max(ends) >> bits) + 1
        lo, hi = sorted((lo * c, hi * c))
        low, high = low + lo, high + hi
    return low, high


@lru_cache(maxsize=64)
def constant(text):
    return Algebra().read(tokens(text))


# ---------------------------------------------------------------- reading

DIGITS = set("0123456789")
TOKEN = re.compile(r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+|\\[A-Za-z]+|\\.|\S")
OPEN = {
    "(": ")",
    "[": "]",
    "{": "}",
    r"\{": r"\}",
    r"\lfloor": r"\rfloor",
    r"\lceil": r"\rceil",
    r"\mat": r"\endmat",
    r"\vmat": r"\endmat",
}
CLOSE = set(OPEN.values())
SYMBOLS = {
    "\\" + w
    for w in "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa "
    "lambda mu nu xi pi rho sigma "
    "tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi "
    "Omega ell hbar aleph beth emptyset "
    "infty wp angle triangle partial nabla Re Im".split()
}
DECORATIONS = {
    "\\" + w
    for w in "mathbb mathcal mathfrak mathscr hat bar overline tilde widehat overrightarrow".split()
}
# f(x + 1) is no product
APPLIED = {
    *"fghFGHPO",
    r"\Gamma",
    r"\zeta",
    r"\phi",
    r"\varphi",
    r"\psi",
    r"\chi",
    r"\delta",
    r"\Phi",
    r"\wp",
}
TRANSPOSES = {"T", r"\top", r"\dagger", "*", r"\prime"}


def tokens(s):
    return TOKEN.findall(s)


def closing(tok, start):
    """Index of the token that closes the bracket at `start`; kinds may differ, as in (3, 4]."""
    depth = 0
    for at in range(start, len(tok)):
        depth += (tok[at] in OPEN) - (tok[at] in CLOSE)
        if depth == 0:
            return at
    raise Unparsed("unclosed bracket")


def top_level(tok, separators):
    """Cut tokens at separators (a set) outside all brackets: [part, separator, part, ...]."""
    if separators.isdisjoint(tok):
        return [tok]
    out, start, depth = [], 0, 0
    for at, t in enumerate(tok):
        depth += (t in OPEN) - (t in CLOSE)
        if depth == 0 and t in separators:
            out += [tok[start:at], t]
            start = at + 1
    return [*out, tok[start:]]


class Reader:
    """Recursive descent over tokens. value: the whole; expr: terms; term: factors; factor: a base
    with what stands above or after it."""

    def __init__(self, tok, algebra):
        # "" ends every look ahead
        self.tok, self.at, self.algebra = [*tok, "", "", "", ""], 0, algebra
        self.depth, self.bars, self.degrees = 0, 0, False

    def value(self):
        out = self.expr()
        if self.peek():
            raise Unparsed("trailing " + self.peek())
        return out

    def peek(self, ahead=0):
        return self.tok[self.at + ahead]

    def next(self, expected=None):
        t = self.peek()
        if not t or (expected and t != expected):
            raise Unparsed("expected " + (expected or "more"))
        self.at += 1
        return t

    def take(self, *wanted):
        """The next token if it is one of these, else ""."""
        t = self.tok[self.at]
        if t not in wanted:
            return ""
        self.at += 1
        return t

    def expr(self):
        self.depth += 1
        if self.depth > DEPTH:
            raise Unparsed("too deep")
        out, sign = {}, self.take("+", "-") or "+"
        while sign:
            out = add(out, self.term(), 1 if sign == "+" else -1)
            sign = self.take("+", "-")
        if len(out) > 300:
            raise Unparsed("too many terms")
        self.depth -= 1
        return out

    def term(self):
        start = self.at
        out = self.factor()
        if self.at == start + 1 and self.tok[start][0] in DIGITS and self.peek()[:1] in DIGITS:
            raise Unparsed("two numbers side by side")
        while (
            (t := self.peek())
            and t not in CLOSE
            and t not in ("+", "-", ",")
            and not (self.bars and t in ("|", r"\|"))
        ):
            self.take("*", "/")
            minus = t in ("*", "/") and self.take("-")
            right = self.factor()
            right = self.algebra.power(right, -1) if t == "/" else right
            out = self.algebra.mul(out, negative(right) if minus else right)
        return out

    def factor(self):
        out = self.base()
        while t := self.take("^", "!", "°"):
            if t == "^":
                out = self.raised(out, self.script())
            elif t == "!":
                n, double = rational(out), self.take("!")
                small = n is not None and n.denominator == 1 and 0 <= n <= 60 and not double
                out = (
                    number(math.factorial(n))
                    if small
                    else self.algebra.call("!!" if double else "!", out)
                )
            elif self.degrees:
                # dropped, except where they change the value
                out = self.algebra.mul(out, {((PI, 1),): Fraction(1, 180)})
        return out

    def raised(self, base, exponent):
        """base ** exponent: the rational part as a power, the rest as exp(rest * ln(base))."""
        algebra = self.algebra
        rest = {m: c for m, c in exponent.items() if m}
        out = algebra.power(base, exponent.get((), 0))
        return algebra.mul(out, algebra.exp(algebra.mul(rest, algebra.ln(base)))) if rest else out

    def script(self):
        """What stands above ^."""
        if self.peek() in TRANSPOSES or (
            self.peek() == "{" and self.peek(1) in TRANSPOSES and self.peek(2) == "}"
        ):
            raise Unparsed("a transpose: products commute here")
        return negative(self.base()) if self.take("-") else self.base()

    def argument(self):
        """The argument of a macro: a group, or one token, of a number its first digit."""
        t = self.peek()
        if len(t) > 1 and t.isdigit():
            self.tok = self.tok[: self.at] + [t[0], t[1:]] + self.tok[self.at + 1 :]
            return number(int(self.next()))
        return self.base()

    def group(self, closer):
        bars, self.bars = self.bars, 0
        out = self.expr()
        self.bars = bars
        self.next(closer)
        return out

    def base(self):
        t, algebra = self.next(), self.algebra
        if t[0] in "0123456789.":
            return self.numeral(t)
        if t in ("(", "[", "{", r"\{"):
            return self.group(OPEN[t])
        if t in (r"\lfloor", r"\lceil"):
            return algebra.function(t[2:], self.group(OPEN[t]))
        if t in ("|", r"\|"):
            self.bars += 1
            inner = self.expr()
            self.bars -= 1
            self.next(t)
            return algebra.function("abs" if t == "|" else "norm", inner)
        if t == r"\frac":
            over = self.argument()
            return algebra.mul(over, algebra.power(self.argument(), -1))
        if t == r"\sqrt":
            n = rational(self.group("]")) if self.take("[") else 2
            if not n:
                raise Unparsed("root index")
            return algebra.power(self.argument(), 1 / Fraction(n))
        if t == r"\binom":
            n, k = self.argument(), self.argument()
            a, b = rational(n), rational(k)
            small = (
                a is not None
                and b is not None
                and a.denominator == b.denominator == 1
                and 0 <= b <= a <= 200
            )
            return number(math.comb(a, b)) if small else algebra.call("binom", n, k)
        if t[1:] in FUNCTIONS and t[0] == "\\":
            return self.function(t[1:])
        if t in DECORATIONS or t in SYMBOLS or (len(t) == 1 and t.isalpha()):
            return self.symbol(t)
        raise Unparsed("unknown " + t)

    def numeral(self, t):
        if len(t) > 1000 or t == ".":
            raise Unparsed("number")
        x = int(t) if t.isdigit() else Fraction(t)
        x = x.numerator if x.denominator == 1 else x
        if self.peek() == "_":  # the base is part of the value
            return atom((NAME, t + self.subscripts()))
        if (
            self.peek() == r"\overline"
            and "." in t
            and self.peek(2).isdigit()
            and self.peek(3) == "}"
        ):
            digits, places = self.peek(2)[:300], len(t.partition(".")[2])
            self.at += 4
            return number(x + Fraction(int(digits), (10 ** len(digits) - 1) * 10**places))
        # a mixed number, if the fraction is a number below 1
        if t.isdigit() and self.peek() == r"\frac":
            part = self.base()
            r = rational(part)
            return (
                number(x + r)
                if r is not None and 0 < r < 1 and x
                else self.algebra.mul(number(x), part)
            )
        return number(x)

    def raw(self):
        """One group or token as text, for a name."""
        end = closing(self.tok, self.at) if self.peek() == "{" else self.at
        text = "".join(self.tok[self.at : end + 1])
        if not text:
            raise Unparsed("expected a name")
        self.at = end + 1
        return text.removeprefix("{").removesuffix("}")

    def subscripts(self):
        out = ""
        while self.take("_"):
            out += "_" + self.raw()
        return out

    def symbol(self, t):
        """A letter with subscripts and primes; before a parenthesis, an application (one argument
        list) or a factor (a sum follows)."""
        name = t + (self.raw() if t in DECORATIONS else "") + self.subscripts()
        while self.take("'"):
            name += "'"
        if name == "e":
            return atom(E)
        if name == r"\infty" and "".join(self.tok).strip("{}+") not in (name, "-" + name):
            raise Unparsed("arithmetic with infinity")
        if self.peek() == "(" and name not in ("i", r"\pi"):
            inner = self.tok[self.at + 1 : closing(self.tok, self.at)]
            if (
                name in APPLIED
                or name[-1] == "'"
                or inner[:1] == ["-"]
                or len(top_level(inner, {"+", "-"})) == 1
            ):
                return self.algebra.call(name, *self.arguments())
        return atom((NAME, name))

    def arguments(self):
        closer, out = OPEN[self.next()], [self.expr()]
        while self.take(","):
            out.append(self.expr())
        self.next(closer)
        return out

    def function(self, name):
        r"""\sin^2 x, \log_2(x), \max\{a, b\}: without brackets the argument is the product that
        follows, up to the next function."""
        algebra, subscript, exponent = self.algebra, None, None
        while t := self.take("_", "^"):
            if t == "_":
                subscript = self.argument()
            else:
                exponent = self.script()
        if exponent == number(-1) and "arc" + name in INVERSES:
            name, exponent = "arc" + name, None
        degrees, self.degrees = self.degrees, name in TRIGONOMETRIC
        if self.peek() in ("(", "[", "{", r"\{"):
            args = self.arguments()
        else:
            args = [self.factor()]
            while (t := self.peek()) in SYMBOLS or t.isalnum() or t == r"\frac":
                args[0] = algebra.mul(args[0], self.factor())
        self.degrees = degrees
        if name in ("ln", "log", "lg"):
            base = number(10) if name == "lg" else subscript
            out = algebra.ln(args[0])
            out = algebra.mul(out, algebra.power(algebra.ln(base), -1)) if base is not None else out
        elif name == "exp":
            out = algebra.exp(args[0])
        elif len(args) > 1:
            out = algebra.call(name, *sorted(args, key=lambda s: sorted(s.items())))
        else:
            out = algebra.function(name, args[0])
        return self.raised(out, exponent) if exponent is not None else out
