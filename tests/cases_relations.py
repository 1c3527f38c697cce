"""Rows of the losses on relations; the oracles are loops over pairs, triplets and channels."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import permutations, product

import torch
from torch import Tensor

from cases_features import by_example, draw, scaled
from loss_cases import Case
from understudy.losses.relations import (
    correlation_congruence,
    nst,
    pkt,
    rkd_angle,
    rkd_distance,
    similarity,
)

Vector = list[float]


def of_batch(slow: Callable[[list[Vector], list[Vector]], float]) -> Callable[..., Tensor]:
    """Return the oracle of two tensors from that of two lists of vectors."""

    def with_lists(student: Tensor, teacher: Tensor) -> Tensor:
        rows = ([example.reshape(-1).tolist() for example in features] for features in (student, teacher))
        return torch.tensor(slow(*rows), dtype=torch.float64)

    return with_lists


def inner(one: Vector, other: Vector) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def difference(one: Vector, other: Vector) -> Vector:
    return [a - b for a, b in zip(one, other, strict=True)]


def huber(x: float) -> float:
    return x**2 / 2 if abs(x) <= 1 else abs(x) - 0.5


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def slow_rkd_distance(student: list[Vector], teacher: list[Vector]) -> float:
    pairs = list(permutations(range(len(student)), 2))

    def relative(points: list[Vector]) -> list[float]:
        lengths = [math.dist(points[i], points[j]) for i, j in pairs]
        return [length / mean(lengths) for length in lengths]

    return mean([huber(t - s) for s, t in zip(relative(student), relative(teacher), strict=True)])


def slow_rkd_angle(student: list[Vector], teacher: list[Vector]) -> float:
    def cosine(points: list[Vector], i: int, j: int, k: int) -> float:
        return inner(scaled(difference(points[i], points[j])), scaled(difference(points[k], points[j])))

    return mean(
        [
            huber(cosine(teacher, *triplet) - cosine(student, *triplet))
            for triplet in permutations(range(len(student)), 3)
        ]
    )


def slow_similarity(student: list[Vector], teacher: list[Vector]) -> float:
    def rows(features: list[Vector]) -> list[Vector]:
        return [scaled([inner(one, other) for other in features]) for one in features]

    squares = [
        (t - s) ** 2
        for row_s, row_t in zip(rows(student), rows(teacher), strict=True)
        for s, t in zip(row_s, row_t, strict=True)
    ]
    return sum(squares) / len(student) ** 2


def slow_congruence(student: list[Vector], teacher: list[Vector], gamma: float, order: int) -> float:
    def kernel(one: Vector, other: Vector) -> float:
        x = 2 * gamma * inner(scaled(one), scaled(other))
        term = total = 1.0
        for p in range(1, order + 1):
            term *= x / p
            total += term
        return math.exp(-2 * gamma) * total

    indices = range(len(student))
    return mean(
        [(kernel(teacher[i], teacher[j]) - kernel(student[i], student[j])) ** 2 for i, j in product(indices, indices)]
    )


def slow_pkt(student: list[Vector], teacher: list[Vector]) -> float:
    def conditional(points: list[Vector], i: int) -> dict[int, float]:
        kernel = {j: (inner(scaled(points[i]), scaled(points[j])) + 1) / 2 for j in range(len(points)) if j != i}
        return {j: value / sum(kernel.values()) for j, value in kernel.items()}

    total = 0.0
    for i in range(len(student)):
        p, q = conditional(teacher, i), conditional(student, i)
        total += sum(p[j] * math.log(p[j] / q[j]) for j in p)
    return total / len(student) ** 2


def slow_nst(student: list[list[Vector]], teacher: list[list[Vector]]) -> float:
    def channels(maps: list[list[Vector]]) -> list[Vector]:
        return [scaled([value for row in channel for value in row]) for channel in maps]

    def kernel(one: list[Vector], other: list[Vector]) -> float:
        return mean([inner(a, b) ** 2 for a, b in product(one, other)])

    s, t = channels(student), channels(teacher)
    return kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)


SHAPES = {"": ((4,), (4,)), " of other widths": ((3,), (5,)), " of maps": ((2, 2, 2), (3, 3, 1))}

CASES = [
    *(
        Case(
            name + suffix,
            loss,
            draw(*shapes),
            of_batch(slow),
            per_example=False,
            zero_at_equality=shapes[0] == shapes[1],  # the inputs cannot be equal otherwise
            ignores_shift=name.startswith("rkd"),
            ignores_scale=True,
        )
        for name, loss, slow in (
            ("rkd_distance", rkd_distance, slow_rkd_distance),
            ("rkd_angle", rkd_angle, slow_rkd_angle),
            ("similarity", similarity, slow_similarity),
            ("pkt", pkt, slow_pkt),
        )
        for suffix, shapes in SHAPES.items()
    ),
    *(
        Case(
            f"correlation_congruence gamma={gamma:g} order={order} widths=4,{width}",
            partial(correlation_congruence, gamma=gamma, order=order),
            draw((4,), (width,)),
            of_batch(partial(slow_congruence, gamma=gamma, order=order)),
            per_example=False,
            zero_at_equality=width == 4,  # the inputs cannot be equal otherwise
            ignores_scale=True,
        )
        for gamma, order, width in ((0.4, 2, 4), (0.4, 2, 6), (1.0, 5, 4))
    ),
    Case("nst", nst, draw((3, 3, 4), (3, 3, 4)), by_example(slow_nst), ignores_scale=True),
    Case(
        "nst of other channels",
        nst,
        draw((2, 3, 4), (5, 3, 4)),
        by_example(slow_nst),
        zero_at_equality=False,  # the inputs cannot be equal
        ignores_scale=True,
    ),
]
