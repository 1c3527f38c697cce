"""Rows of the losses on features of one layer and on attention; the oracles are loops over examples and positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from loss_cases import BATCH, Case, Inputs
from understudy.losses.attention import attention, cat_kd, fsp
from understudy.losses.features import ab, ft, hint, ofd, review, simkd, srrl

Map = list[list[list[float]]]
"""One example: channels, rows, columns."""

MARGIN = [-1.5, -0.75, -0.25]


def draw(*shapes: tuple[int, ...]) -> Callable[[torch.Generator], Inputs]:
    """Return what draws a batch of each of the shapes."""
    return lambda generator: tuple(
        torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64) for shape in shapes
    )


def by_example(slow: Callable[..., float]) -> Callable[..., Tensor]:
    """Return the oracle of a batch from that of one example, whose arguments are nested lists."""

    def of_batch(*inputs: Tensor) -> Tensor:
        lists = (values.tolist() for values in inputs)
        return torch.tensor([slow(*example) for example in zip(*lists, strict=True)], dtype=torch.float64)

    return of_batch


def positions(one: Map, other: Map) -> Iterator[tuple[int, float, float]]:
    """Yield the channel and both values of every position of two maps of one shape."""
    for channel, (first, second) in enumerate(zip(one, other, strict=True)):
        for row, other_row in zip(first, second, strict=True):
            yield from ((channel, a, b) for a, b in zip(row, other_row, strict=True))


def mean_square(one: Sequence[float], other: Sequence[float]) -> float:
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) / len(one)


def scaled(values: Sequence[float]) -> list[float]:
    length = math.sqrt(sum(value**2 for value in values))
    return [value / length for value in values]


def flat(maps: Map) -> list[float]:
    return [value for channel in maps for row in channel for value in row]


def pooled(channel: list[list[float]], size: int) -> list[list[float]]:
    """Average over size x size cells; a cell holds every pixel that it touches."""
    height, width = len(channel), len(channel[0])

    def span(cell: int, length: int) -> range:
        return range(cell * length // size, -(-(cell + 1) * length // size))

    def cell(y: int, x: int) -> float:
        pixels = [channel[i][j] for i, j in product(span(y, height), span(x, width))]
        return sum(pixels) / len(pixels)

    return [[cell(y, x) for x in range(size)] for y in range(size)]


def slow_hint(student: Map, teacher: Map) -> float:
    squares = [(t - s) ** 2 for _, s, t in positions(student, teacher)]
    return 0.5 * sum(squares) / len(squares)


def slow_srrl(embedding: list[float], answer: list[float], h: list[float], z: list[float]) -> float:
    return mean_square(embedding, h) + mean_square(answer, z)


def slow_ofd(student: Map, teacher: Map) -> float:
    total = 0.0
    for channel, s, t in positions(student, teacher):
        target = t if t > MARGIN[channel] else MARGIN[channel]
        total += 0.0 if s <= target <= 0 else (target - s) ** 2
    return total


def slow_ab(student: Map, teacher: Map, margin: float) -> float:
    total = 0.0
    for _, s, t in positions(student, teacher):
        on = 1 if t > 0 else 0
        total += (on * max(0.0, margin - s) + (1 - on) * max(0.0, margin + s)) ** 2
    return total


def slow_ft(student: Map, teacher: Map) -> float:
    pairs = list(zip(scaled(flat(student)), scaled(flat(teacher)), strict=True))
    return sum(abs(t - s) for s, t in pairs) / len(pairs)


def slow_review(student: Map, teacher: Map) -> float:
    weights, values = [1.0], [mean_square(flat(student), flat(teacher))]
    for size in (4, 2, 1):
        if size < min(len(student[0]), len(student[0][0])):
            weights.append(weights[-1] / 2)
            cells = [flat([pooled(channel, size) for channel in maps]) for maps in (student, teacher)]
            values.append(mean_square(*cells))
    return sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)


def slow_attention(student: Map, teacher: Map, power: float) -> float:
    def strength(maps: Map) -> list[float]:
        height, width = len(maps[0]), len(maps[0][0])
        return [sum(abs(channel[y][x]) ** power for channel in maps) for y, x in product(range(height), range(width))]

    return mean_square(scaled(strength(student)), scaled(strength(teacher)))


def slow_cat_kd(student: Map, teacher: Map, size: int) -> float:
    values = [
        mean_square(scaled(flat([pooled(s, size)])), scaled(flat([pooled(t, size)])))
        for s, t in zip(student, teacher, strict=True)
    ]
    return sum(values) / len(values)


def slow_fsp(student_first: Map, student_second: Map, teacher_first: Map, teacher_second: Map) -> float:
    def flow(one: list[list[float]], other: list[list[float]]) -> float:
        products = [a * b for _, a, b in positions([one], [other])]
        return sum(products) / len(products)

    pairs = list(product(range(len(student_first)), range(len(student_second))))
    student = [flow(student_first[i], student_second[j]) for i, j in pairs]
    teacher = [flow(teacher_first[i], teacher_second[j]) for i, j in pairs]
    return mean_square(student, teacher)


def srrl_in_order(embedding: Tensor, answer: Tensor, h: Tensor, z: Tensor) -> Tensor:
    """Take the student's tensors first, as a row does."""
    return srrl(embedding, h, answer, z)


def ofd_with_margin(student: Tensor, teacher: Tensor) -> Tensor:
    return ofd(student, teacher, torch.tensor(MARGIN))


maps = draw((3, 3, 4), (3, 3, 4))

CASES = [
    Case("hint", hint, maps, by_example(slow_hint)),
    Case("simkd embeddings", simkd, draw((6,), (6,)), by_example(mean_square)),
    Case("simkd maps", simkd, maps, by_example(lambda s, t: mean_square(flat(s), flat(t)))),
    Case("srrl", srrl_in_order, draw((6,), (4,), (6,), (4,)), by_example(slow_srrl), students=2, teachers=2),
    Case("ofd", ofd_with_margin, maps, by_example(slow_ofd)),
    *(
        Case(
            f"ab margin={m:g}",
            lambda s, t, m=m: ab(s, t, margin=m),
            maps,
            by_example(lambda s, t, m=m: slow_ab(s, t, m)),
            zero_at_equality=False,  # unless the teacher's neurons are all beyond the margin
        )
        for m in (1.0, 0.25)
    ),
    Case("ft", ft, maps, by_example(slow_ft), ignores_scale=True),
    *(
        Case(f"review {h}x{w}", review, draw((2, h, w), (2, h, w)), by_example(slow_review))
        for h, w in ((5, 6), (2, 4), (1, 1))
    ),
    *(
        Case(
            f"attention power={p:g}",
            lambda s, t, p=p: attention(s, t, power=p),
            draw((3, 3, 4), (3, 3, 4)),
            by_example(lambda s, t, p=p: slow_attention(s, t, p)),
            ignores_scale=True,
        )
        for p in (1.0, 2.0, 3.5)
    ),
    Case(
        "attention of other channels",
        attention,
        draw((2, 3, 4), (5, 3, 4)),
        by_example(lambda s, t: slow_attention(s, t, 2)),
        zero_at_equality=False,  # the inputs cannot be equal
        ignores_scale=True,
    ),
    *(
        Case(
            f"cat_kd size={n}",
            lambda s, t, n=n: cat_kd(s, t, size=n),
            draw((3, 3, 5), (3, 3, 5)),
            by_example(lambda s, t, n=n: slow_cat_kd(s, t, n)),
            ignores_scale=True,
        )
        for n in (2, 3)
    ),
    Case(
        "cat_kd of other places",
        cat_kd,
        draw((3, 3, 4), (3, 5, 2)),
        by_example(lambda s, t: slow_cat_kd(s, t, 2)),
        zero_at_equality=False,  # the inputs cannot be equal
        ignores_scale=True,
    ),
    Case(
        "fsp",
        fsp,
        draw((2, 3, 4), (3, 3, 4), (2, 3, 4), (3, 3, 4)),
        by_example(slow_fsp),
        students=2,
        teachers=2,
    ),
]
