"""What a user gives as a number, wherever settings are made."""

import numpy as np
import pytest

from basis import Switch
from basis.bench.timing import Setting
from basis.training.loop import Recipe
from basis.training.skipping import Skip


@pytest.mark.parametrize(
    ("kind", "given", "plain"),
    [
        (Recipe, {"epochs": np.int64(3), "lr": np.float64(0.5)}, {"epochs": 3, "lr": 0.5}),
        (Skip, {"basis_every": np.uint8(2)}, {"basis_every": 2}),
        (Setting, {"rounds": np.int32(3), "seconds": np.float16(0.5)}, {"rounds": 3, "seconds": 0.5}),
        (Switch, {"ratios": np.array([0.5, 0.25]), "multiple": np.int64(2)}, {"ratios": (0.5, 0.25), "multiple": 2}),
        (Switch, {"budget": {"params": np.float32(0.5)}}, {"budget": {"params": 0.5}}),
    ],
)
def test_numbers_of_numpy_are_numbers(kind, given, plain):
    assert repr(kind(**given)) == repr(kind(**plain))


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (Recipe, "epochs", 2.0), (Recipe, "batch_size", True), (Recipe, "lr", "0.1"), (Recipe, "lr", False),
        (Recipe, "momentum", None), (Recipe, "lr", 1j), (Skip, "basis_every", 1.0), (Switch, "patience", True),
        (Switch, "ratios", ("1/2",)), (Switch, "budget", {"params": True}), (Setting, "batch_size", 2.5),
        (Setting, "rounds", "3"), (Setting, "seed", None), (Setting, "seconds", float("nan")),
    ],
)  # fmt: skip
def test_what_is_no_such_number_is_refused_by_name(kind, name, value):
    with pytest.raises(ValueError, match=name):
        kind(**{name: value})
