from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from basis.numbers import plain_fields


@dataclass(frozen=True)
class Settings:
    size: int | None = 3
    share: float = 0.5
    name: str = "x"
    flag: bool = True

    def __post_init__(self):
        plain_fields(self)


@pytest.mark.parametrize(
    "given", [{"size": np.int64(3)}, {"size": np.uint8(3)}, {"share": np.float32(0.5)}, {"share": np.float16(0.5)}]
)
def test_numbers_of_numpy_are_numbers(given):
    assert repr(Settings(**given)) == repr(Settings())
    assert (Settings(size=None).size, Settings(share=2).share) == (None, 2)


@pytest.mark.parametrize(
    "wrong",
    [{"size": True}, {"size": 3.0}, {"size": "3"}, {"share": None}, {"share": False}, {"share": "1"}, {"share": 1j}],
)
def test_what_is_no_such_number_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)
