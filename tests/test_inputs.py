"""What a network takes: copied, repeated, said and made."""

from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn

from basis.inputs import example_inputs, mapped, tensors_in
from tests.unusual import Output

Pair = namedtuple("Pair", "left right")


def test_tensors_are_found_and_changed_in_every_container():
    x = torch.ones(2)
    value = {"pair": Pair(x, [x, 3]), "output": Output(x, (x, "name")), "class": Output}
    changed = mapped(lambda tensor: tensor + 1, value)
    assert [tensor.tolist() for tensor in tensors_in(changed)] == [[2, 2]] * 4
    assert type(changed["pair"]) is Pair
    assert changed["pair"].right[1] == 3
    assert changed["output"].hidden[1] == "name"
    assert changed["class"] is Output


def test_example_inputs_fit_the_model():
    model = nn.Linear(4, 2, dtype=torch.complex64)
    assert example_inputs(model, np.array([7, 4]), None, batch_size=np.int64(3)).shape == (3, 7, 4)
    assert example_inputs(model, (4,), None).dtype == torch.complex64
    assert example_inputs(model, torch.Size([]), None).shape == (1,)
    tokens = example_inputs(model, None, {"ids": torch.ones(2, 3, dtype=torch.long), "flag": True})
    assert (tokens["ids"].dtype, tokens["flag"]) == (torch.long, True)
    assert example_inputs(model, None, torch.ones(2, 4, device="meta")).is_meta
    assert not example_inputs(model, None, torch.ones(2, 4, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    ("size", "inputs", "options", "says"),
    [
        (None, None, {}, "give one of"), ((3,), torch.ones(1, 3), {}, "give one of"),
        (1024, None, {}, "list of numbers"),
        ((3, 0), None, {}, "input_size"), ((3, 2.0), None, {}, "input_size"), ("32", None, {}, "input_size"),
        ((3, np.float64(2)), None, {}, "input_size"), ((3,), None, {"batch_size": 0}, "batch_size"),
        ((3,), None, {"batch_size": True}, "batch_size"), (None, torch.tensor(1.0), {}, "no tensor with a sample"),
        (None, torch.ones(0, 3), {}, "no tensor with a sample"), (None, {}, {}, "no tensor with a sample"),
        (None, torch.ones(2, 3), {"batch_size": 3}, "the inputs are 2 samples"),
    ],
)  # fmt: skip
def test_examples_that_make_no_sense_are_refused(size, inputs, options, says):
    with pytest.raises(ValueError, match=says):
        example_inputs(nn.Linear(3, 2), size, inputs, **options)
