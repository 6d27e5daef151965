import pytest
import torch
from torch import nn

from basis.batches import balanced, calibration_inputs, stream_batches, targets_of

MODEL = nn.Linear(3, 2)
X, Y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
WIDE = torch.randn(4, 2, 5)  # logits of five places each


def test_batches_of_any_kind_are_taken_and_empty_ones_passed_over():
    for inputs in (X, (X, Y), [X], {"image": X, "scale": 2.0}):
        batches = [(inputs, {"boxes": [X, X[:2]]}), ({"x": X[:0]}, Y[:0])]
        assert str(list(stream_batches(batches, MODEL, "data"))) == str(batches[:1])
    with pytest.raises(ValueError, match="no samples"):
        list(stream_batches([((X[:0],), Y[:0])], MODEL, "data"))


@pytest.mark.parametrize(
    ("batch", "inputs"),
    [
        (X, X), ((X, Y), X), ([X], X), ({"a": X, "b": Y}, {"a": X, "b": Y}), (((X, Y),), (X, Y)),
        (((X, Y), Y), (X, Y)), (({"a": X}, {"classes": Y}), {"a": X}),
    ],
)  # fmt: skip
def test_calibration_takes_inputs_with_and_without_targets(batch, inputs):
    assert str(list(calibration_inputs([batch], MODEL))) == str([inputs])


def test_one_tensor_is_calibration_data_split_where_it_is_large():
    assert [len(x) for x in calibration_inputs(torch.zeros(300, 3), MODEL)] == [250, 50]


@pytest.mark.parametrize("batch", [X, {"a": X, "b": Y}, (X, Y, Y), ("x", Y), (torch.tensor(1.0), Y), (), ({}, Y), None])
def test_what_is_no_pair_is_refused(batch):
    with pytest.raises(ValueError, match=r"batch 1 of data is .* must be a pair"):
        list(stream_batches([(X, Y), batch], MODEL, "data"))


@pytest.mark.parametrize(
    ("data", "says"),
    [*((each, "must be an iterable of batches") for each in (X[0], "xy", {"inputs": X}, 3, None)),
     *(([batch], "batch 0 of calibration") for batch in ("x", {"a": 1}, (), None))],
)  # fmt: skip
def test_what_holds_no_batches_or_inputs_is_refused(data, says):
    with pytest.raises(ValueError, match=says):
        list(calibration_inputs(data, MODEL))


@pytest.mark.parametrize("last", [{"a": torch.zeros(1, 3), "b": torch.zeros(7)}, {"a": torch.zeros(1, 3)}])
def test_what_cannot_be_joined_stays_as_it_is(last):
    first = {"a": torch.zeros(4, 3), "b": torch.zeros(4)}
    assert [len(x["a"]) for x in balanced([first, last])] == [4, 1]


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [
        (X, torch.randn(4, 3)),  # a regression
        (X, torch.tensor([[1.0, 1.0, 0.0]]).expand(4, 3)),  # several classes
        (X, torch.tensor([[2.0, -1.0, 0.0]]).expand(4, 3)),
        (X, torch.full((4, 3), 1 / 3) + 0.01),
        (X, torch.full((4, 3), torch.nan)),
        *((X, targets) for targets in (torch.zeros(4, 3), Y.float(), Y.cfloat(), [0, 1, 1, 0], Y[:3], Y + 2, None)),
        (X, {"labels": Y}),
        (WIDE, torch.randn(4, 2, 5)),
        (WIDE, torch.rand(4, 2, 5).softmax(2)),  # sums to 1 along another dimension
        (X[:, :1], torch.zeros(4, dtype=torch.long)),  # cross-entropy of one class
        *((outputs, Y) for outputs in ({"out": X}, (X, X), X.long(), X[:, 0])),
    ],
)
def test_what_cross_entropy_would_take_wrongly_is_refused_with_the_way_out(outputs, targets):
    with pytest.raises(ValueError, match="loss="):
        targets_of(targets, outputs, samples=4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_probabilities_are_taken_in_any_precision(dtype):
    soft = (3 * torch.randn(4, 1000)).softmax(1).to(dtype)
    assert targets_of(soft, torch.randn(4, 1000), samples=4).dtype == torch.float32
    assert len(targets_of(torch.rand(4, 2, 5).softmax(1), WIDE, samples=4)) == 4
