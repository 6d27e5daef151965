from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from basis.data import Images
from basis.digests import contents, samples


def batches(seed=0, size=6):
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(6, 3, generator=draw), torch.randint(0, 5, (6,), generator=draw)) for _ in range(2)]


def test_samples_do_not_depend_on_batches_and_order_of_samples():
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    turned = x.flip(0), y.flip(0)
    assert samples(batches()) == samples([(x, y)]) == samples([turned]) != samples(batches(1))
    assert samples([({"a": x, "b": y}, None)]) == samples([(x, y)])
    assert samples([(x, y)]) != samples([(x, y.flip(0))])
    boxes = {"boxes": torch.arange(5.0)}
    assert samples([(x, boxes)]) != samples([(x, {"boxes": torch.ones(5)})])


class Own(Dataset):
    def __init__(self, seed=0, **attributes):
        self.x, self.y = batches(seed)[0]
        self._open = object()
        vars(self).update(attributes)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        raise AssertionError("nothing is drawn")


class Endless(IterableDataset):
    def __iter__(self):
        raise AssertionError("nothing is drawn")


MANY = [(f"{i}.png", 0) for i in range(30_000)]
DIFFERENT = [
    lambda seed: batches(seed),
    lambda seed: TensorDataset(*batches(seed)[0]),
    lambda seed: DataLoader(TensorDataset(*batches(seed)[0]), 2, shuffle=True),
    lambda seed: DataLoader(Own(seed, transform=print), 2),
    lambda seed: Own(0, targets=[0, 1, seed]),
    lambda seed: Own(0, table=np.array([0, 1, seed])),
    lambda seed: Subset(Own(), [0, seed]),
    lambda seed: DataLoader(Own(), 2 + seed),
    lambda seed: DataLoader(Endless(), 2 + seed),
    lambda seed: Own(samples=[*MANY, (f"{seed}.png", 0), ("x.png", 1)]),
    lambda seed: Own(samples=MANY[seed:]),
    lambda seed: Images(torch.full((2, 4, 4, 3), seed, dtype=torch.uint8), torch.zeros(2, dtype=torch.long)),
    lambda seed: [torch.zeros(2, 3 + seed)],
    lambda seed: [torch.zeros(2, dtype=(torch.float32, torch.int32)[seed])],
    lambda seed: [{"a": np.zeros(2 + seed)}],
]


@pytest.mark.parametrize("make", DIFFERENT)
def test_contents_tell_data_apart_without_drawing_a_sample(make):
    torch.manual_seed(0)
    expected = torch.random.get_rng_state()
    assert contents(make(0)) == contents(make(0)) != contents(make(1))
    assert torch.equal(torch.random.get_rng_state(), expected)


def weighted(weight):
    return lambda outputs, targets: weight * outputs


class Scaled:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, outputs, targets):
        return outputs * self.scale


LOSSES = [
    lambda outputs, targets: outputs, lambda outputs, targets: targets, lambda outputs, targets: outputs + 1,
    lambda outputs, targets: outputs + 2, lambda outputs, targets, shift=2: outputs + shift,
    weighted(1.0), weighted(2.0), partial(weighted, 1.0), partial(weighted, 2.0), Scaled(1.0), Scaled(2.0),
    Scaled(1.0).__call__, nn.MSELoss(), nn.MSELoss(reduction="none"), nn.functional.mse_loss, torch.abs, torch.sin,
]  # fmt: skip


def test_functions_are_told_apart_as_far_as_can_be():
    assert len({contents(loss) for loss in LOSSES}) == len(LOSSES)
    for make in (weighted, Scaled, partial(partial, weighted)):
        assert contents(make(1.0)) == contents(make(1.0))
