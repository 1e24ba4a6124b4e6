"""Which recorded forwards are measured: noise levels in ranges, one forward of each range for each prompt."""

from collections.abc import Sequence

from dit_accel.finetune.data.collect import Samples
from dit_accel.finetune.moments import Moments
from dit_accel.method.assignment import Moment
from dit_accel.planner.record import NoiseRange


def ranges_of(moments: Sequence[Moment], count: int) -> list[tuple[float, float]]:
    """Up to `count` ranges (low, high) of noise levels, from 1 down to 0, with about as many of a run's steps in each."""
    levels = sorted({moment.noise for moment in moments}, reverse=True)
    count = min(count, len(levels))
    firsts = [levels[round(n * len(levels) / count)] for n in range(count)]  # the noisiest level of each range
    lasts = [levels[round(n * len(levels) / count) - 1] for n in range(1, count)]
    cuts = [(last + first) / 2 for last, first in zip(lasts, firsts[1:], strict=True)]
    return list(zip([*cuts, 0.0], [1.0, *cuts], strict=True))


def place(noise: float, ranges: Sequence[tuple[float, float]]) -> int:
    """The range of a noise level; 0, which no range has, is in the last."""
    return next((n for n, (low, high) in enumerate(ranges) if low < noise <= high), len(ranges) - 1)


def spread(samples: Samples, moments: Moments, ranges: Sequence[tuple[float, float]], each: int) -> list[tuple[int, int]]:
    """(range, position) of `each` forwards of every run and range; runs take other steps, and passes of guidance, in turn."""
    found = []
    for number, run in enumerate(samples.runs()):
        for n in range(len(ranges)):
            inside = [position for position in run if place(moments[position].noise, ranges) == n]
            first = number * len(inside) // max(1, len(samples.runs())) + number
            found += [(n, inside[(first + i * len(inside) // each) % len(inside)]) for i in range(min(each, len(inside)))]
    return found


def described(ranges: Sequence[tuple[float, float]], chosen: Sequence[tuple[int, int]], moments: Moments) -> tuple[NoiseRange, ...]:
    """The ranges with the levels of the forwards that were chosen."""
    levels = [sorted({round(moments[p].noise, 6) for k, p in chosen if k == n}, reverse=True) for n in range(len(ranges))]
    return tuple(NoiseRange(low, high, tuple(own)) for (low, high), own in zip(ranges, levels, strict=True))
