"""Confidence intervals by the bootstrap: of a mean, and of a mean difference of pairs.

The kind is the bootstrap-t (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter
12). With m and s the mean and the standard error of the n values, and m*, s* those of a resample,
the quantiles of

    t* = (m* - m) / max(s*, FLOOR s)

stand in for those of Student's t: the interval goes from m - t*[1 - a/2] s to m - t*[a/2] s.

Why this one: each kind was tried on 2,000 simulated samples of n = 3, 5, 8, 16 and 1,000 of n = 30
of normal, skewed and bounded values. For nominal 95 % the percentile interval covers 75 % (n = 3)
and 88 % (n = 8) of normal values and 84 % of exponential ones (n = 8); BCa is within two points of
that. An expanded percentile interval (Hesterberg, The American Statistician 69, 2015) cannot leave
the range of the values and covers 75 % at n = 3. Student's t covers 88 to 92 % of skewed values at
n = 5 to 16, the bootstrap-t 91 to 95 %.

Why the floor: few values, or values of 0 and 1, have resamples of equal values, with s* = 0 and an
infinite t*. Leaving those out covers 60 % of binomial values at n = 3. Of the floors from 0.15 to
0.4, 0.25 covers normal and exponential values best at n = 3 to 8.

Measured coverage in per cent (5,000 samples; of n = 3 3,000, of n = 500 2,000; by `python -m
tests.test_intervals`):

    n                          3     5     8    16    30   500
    normal                  97.6  94.6  94.6  95.3  94.3  94.5
    exponential             91.6  92.0  93.8  94.1  94.7  94.5
    accuracy .95, skewed    93.0  92.7  93.6  94.1  94.3  94.5
    accuracy .99 of 256     99.3  94.9  95.1  94.9  94.8  94.7
    Avg@32, many 0          91.0  94.3  97.0  97.3  96.7  94.9
    0/1, half are 1        100.0 100.0  99.3  99.9  98.1  95.2
    0/1, .9 are 1          100.0 100.0  99.9  99.5  98.8  94.0

A few values of 0 and 1 take few means, and no interval covers just 95 % of those: here it is the
wide side.
"""

import numpy as np

FLOOR = 0.25  # least standard error of a resample, as a share of that of the values
PIECE = 1_000_000  # values drawn at once


def bootstrap_mean(values, confidence=0.95, resamples=10_000, seed=0, within=None):
    """(mean, low, high) of n values: the bootstrap-t interval of the mean that they were drawn
    around, low <= mean <= high. The same arguments give the same interval.

    within: (least, most) that a value can be, such as (0, 1) for accuracies; the interval is cut
    to it.

    low and high are None where the values do not tell: fewer than three, or all equal. But when all
    are equal to an end of `within`, and both its ends are finite, that end is one bound and Clopper
    and Pearson's the other: for n accuracies of 1, low = ((1 - confidence) / 2)^(1/n), which is
    right whatever their distribution.

    Raises ValueError for no values, values that are not finite numbers or not `within`, and a
    confidence that is not between 0 and 1.
    """
    values = np.asarray(values, float)
    if values.ndim != 1 or not values.size:
        raise ValueError("an interval needs a list of numbers, one at least")
    if not np.isfinite(values).all():
        raise ValueError("an interval needs finite numbers")
    least, most = within or (-np.inf, np.inf)
    smallest = values.min()
    largest = values.max()
    if smallest < least or largest > most:
        raise ValueError(f"values from {smallest:g} to {largest:g} are not in {within}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is a share between 0 and 1, not {confidence}")
    n = len(values)
    mean = float(values.mean())
    tail = (1 - confidence) / 2
    if smallest == largest:
        share = tail ** (1 / n)  # of such values, where n of them are drawn with that chance
        reach = (most - least) * (1 - share)
        if smallest == least and np.isfinite(reach):
            return mean, mean, mean + reach
        if smallest == most and np.isfinite(reach):
            return mean, mean - reach, mean
        return mean, None, None
    if n < 3:
        return mean, None, None
    t = _t(values, resamples, seed)
    t_low = np.quantile(t, tail)
    t_high = np.quantile(t, 1 - tail)
    t_low = min(t_low, 0)
    t_high = max(t_high, 0)
    error = _error(values)
    low = mean - t_high * error
    high = mean - t_low * error
    low = max(low, least)
    high = min(high, most)
    return mean, float(low), float(high)


def _error(values):
    """Standard error of the mean, along the last axis."""
    n = values.shape[-1]
    return values.std(axis=-1, ddof=1) / n**0.5


def _t(values, resamples, seed):
    """t* of each resample, [resamples]."""
    n = len(values)
    mean = values.mean()
    floor = FLOOR * _error(values)
    rng = np.random.default_rng(seed)
    rows = max(1, PIECE // n)
    pieces = []
    for first in range(0, resamples, rows):
        size = min(rows, resamples - first)
        index = rng.integers(n, size=(size, n))
        drawn = values[index]
        error = _error(drawn)
        error = np.maximum(error, floor)
        difference = drawn.mean(axis=1) - mean
        pieces.append(difference / error)
    return np.concatenate(pieces)


def bootstrap_paired(a, b, within=None, **options):
    """(mean, low, high) of a - b, where a[i] and b[i] are of the same question or seed: what the
    two share, such as how hard the question is, is no noise then.

    within: (least, most) of a value of a and of b. options: as of `bootstrap_mean`, and so are the
    errors; ValueError too for different lengths.
    """
    if len(a) != len(b):
        raise ValueError(f"pairs need equal lengths, not {len(a)} and {len(b)} values")
    differences = np.subtract(a, b, dtype=float)
    if within:
        least, most = within
        within = least - most, most - least
    return bootstrap_mean(differences, within=within, **options)
