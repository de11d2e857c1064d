"""What crosses a process border, and how often."""

from __future__ import annotations

from functools import partial

import pytest

from segfleet.core.parallel import run

PICKLED = [0]


class Heavy:
    """Stands for a reader with its list of cases."""

    def __reduce__(self):
        PICKLED[0] += 1
        return Heavy, ()


def double(heavy: Heavy, item: int) -> int:
    assert isinstance(heavy, Heavy)
    return 2 * item


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_bound_to_the_function_crosses_once_per_process(workers):
    counts = []
    for many in (4, 40):
        PICKLED[0] = 0
        found = dict(
            run(
                partial(double, Heavy()),
                range(many),
                weights=[0] * many,
                names=[""] * many,
                workers=workers,
            )
        )
        assert found == {n: 2 * n for n in range(many)}
        counts.append(PICKLED[0])
    assert max(counts) <= (workers if workers > 1 else 0)
