from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from basis.numbers import plain_fields, plain_number


@dataclass(frozen=True)
class Settings:
    size: int | None = 3
    share: float = 0.5
    name: str = "x"
    flag: bool = True

    def __post_init__(self):
        plain_fields(self)


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_whole_numbers_are_ints(value):
    assert type(plain_number("size", value, whole=True)) is int
    assert repr(Settings(size=value)) == repr(Settings())


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5), np.float16(0.5)])
def test_others_are_floats(value):
    assert type(plain_number("share", value)) is float
    assert repr(Settings(share=value)) == repr(Settings())


def test_a_field_that_may_be_none_stays_none():
    assert Settings(size=None).size is None
    assert Settings(share=2).share == 2


@pytest.mark.parametrize(
    "wrong",
    [{"size": True}, {"size": 3.0}, {"size": "3"}, {"share": None}, {"share": False}, {"share": "1"}, {"share": 1j}],
)
def test_what_is_no_such_number_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)
