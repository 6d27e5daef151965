import copy

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from basis import evaluate, finetune
from basis.data import Data, hold_out, synthetic
from basis.statistics import proportion_estimate
from basis.training.finetuning import rate
from basis.training.loop import TrainingError, TrainingPaused
from tests.training.common import at

CLASSES = 4


def network(seed=0, classes=CLASSES):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.1), nn.Linear(32, classes),
    )  # fmt: skip


def samples(n=96, seed=0):
    """Images whose class is the place of a bright quarter."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, CLASSES, (n,), generator=generator)
    x = torch.randn((n, 3, 8, 8), generator=generator)
    for i, label in enumerate(y.tolist()):
        row, column = 4 * (label // 2), 4 * (label % 2)
        x[i, :, row : row + 4, column : column + 4] += 1.5
    return x, y


def loader(n=96, **options):
    return DataLoader(TensorDataset(*samples(n)), batch_size=32, shuffle=True, **options)


def held(n=200):
    return list(zip(*(part.split(64) for part in samples(n, seed=9)), strict=True))


def test_it_learns_from_a_loader_and_says_how():
    model = network().eval()
    model[1].train()
    flags = [module.training for module in model.modules()]
    before = evaluate(model, held())
    result = finetune(model, loader(), epochs=4, lr=0.05, precision="fp32")
    after = evaluate(model, held())
    assert after.accuracy.value > before.accuracy.value + 0.3
    assert [module.training for module in model.modules()] == flags
    assert (result.steps, result.images, len(result.curves)) == (12, 384, 4)
    assert str(result).startswith("fine-tuned for 4 epochs: 12 steps, 384 images")
    assert "in the last epoch" in str(result)


def test_the_rate_rises_to_its_peak_and_falls_to_zero():
    rates = [rate(0.4, step, 200) for step in range(201)]
    assert [rates[0], max(rates), rates[10], rates[105], rates[200]] == pytest.approx([0.4 / 11, 0.4, 0.4, 0.2, 0])
    assert sorted(rates[:11]) == rates[:11]
    assert rate(0.4, 5, 0) == pytest.approx(0, abs=1e-12)  # more steps than were announced


def test_one_step_is_nesterov_on_the_loss_with_the_teachers_part():
    model, teacher = network(0).eval(), network(1)
    for module in (model, teacher):
        module[7] = nn.Identity()
    teacher_state, teacher_flags = copy.deepcopy(teacher.state_dict()), [m.training for m in teacher.modules()]
    mine, (x, y) = copy.deepcopy(model), samples(16)
    finetune(
        model, [(x, y)], lr=0.1, teacher=teacher, distillation=0.25, weight_decay=0.01, label_smoothing=0.1,
        precision="fp32",
    )  # fmt: skip
    mine.train()
    q = mine(x)
    with torch.no_grad():
        p = teacher.eval()(x)
    kl = F.kl_div((q / 4).log_softmax(1), (p / 4).softmax(1), reduction="batchmean")
    (0.75 * F.cross_entropy(q, y, label_smoothing=0.1) + 0.25 * 16 * kl).backward()
    with torch.no_grad():
        for own, expected in zip(model.parameters(), mine.parameters(), strict=True):
            gradient = expected.grad + 0.01 * expected
            assert torch.allclose(own, expected - 0.1 * 1.9 * gradient, atol=1e-5)
    assert all(torch.equal(value, teacher_state[name]) for name, value in teacher.state_dict().items())
    assert sum(teacher_flags) == len(teacher_flags)


@pytest.mark.parametrize("own", [False, True])
def test_a_paused_training_ends_as_an_uninterrupted_one(tmp_path, own):
    def source():
        return loader(generator=torch.Generator().manual_seed(3)) if own else loader()

    path = tmp_path / "c.pt"
    straight, paused = network(), network()
    torch.manual_seed(5)
    whole = finetune(straight, source(), epochs=3, lr=0.05)
    torch.manual_seed(5)
    steps = len(source())
    for question, said in ((steps, "after epoch 1 of 3"), (steps + 1, "in epoch 3 of 3.* after epoch 2")):
        with pytest.raises(TrainingPaused, match=said):
            finetune(paused, source(), epochs=3, lr=0.05, checkpoint=path, should_stop=at(question))
    torch.manual_seed(77)
    resumed = network()
    result = finetune(resumed, source(), epochs=3, lr=0.05, checkpoint=path)
    assert [row["train_loss"] for row in result.curves] == [row["train_loss"] for row in whole.curves]
    assert all(torch.equal(value, straight.state_dict()[name]) for name, value in resumed.state_dict().items())
    again = network()
    done = finetune(again, source(), epochs=3, lr=0.05, checkpoint=path)  # nothing is left to do
    assert done.curves == result.curves
    assert torch.equal(again[0].weight, resumed[0].weight)
    with pytest.raises(TrainingError, match="belongs to a training with another model"):
        finetune(network(), source(), epochs=2, lr=0.05, checkpoint=path)
    path.write_bytes(b"no")
    with pytest.raises(TrainingError, match="cannot be read"):
        finetune(network(), source(), epochs=3, lr=0.05, checkpoint=path)


def test_data_are_augmented(tmp_path):
    data = hold_out(synthetic(train=300, test=10, size=16), 60)
    models = [network(classes=10) for _ in range(2)]
    path = tmp_path / "c.pt"
    torch.manual_seed(0)  # of dropout
    result = finetune(models[0], data, epochs=2, lr=0.1, batch_size=60)
    assert (result.steps, result.images) == (8, 480)
    torch.manual_seed(0)
    with pytest.raises(TrainingPaused):
        finetune(models[1], data, epochs=2, lr=0.1, batch_size=60, checkpoint=path, should_stop=lambda: True)
    torch.manual_seed(1)
    resumed = finetune(network(classes=10), data, epochs=2, lr=0.1, batch_size=60, checkpoint=path)
    assert [row["train_loss"] for row in resumed.curves] == [row["train_loss"] for row in result.curves]
    with pytest.raises(TrainingError, match="batch_size is 500, but there are 240 training images"):
        finetune(models[0], data, batch_size=500)
    with pytest.raises(TrainingError, match="Images alone"):
        finetune(models[0], data.train)
    assert isinstance(data, Data)


class Endless(IterableDataset):
    def __iter__(self):
        return iter(samples(8))


def test_what_cannot_be_trained_is_refused_before_anything_changes():
    model = network()
    before = copy.deepcopy(model.state_dict())
    x, y = samples(8)
    half, frozen = network().half(), network().requires_grad_(False)
    for bad, data, options, words in (
        (frozen, [(x, y)], {}, "no parameter of the model requires a gradient"),
        (half, [(x.half(), y)], {}, "float16"),
        (model, [], {}, "data hold no batch"),
        (model, DataLoader(Endless()), {}, "a DataLoader without a length"),
        (model, [x], {}, "batch 0 of data is a tensor of shape"),
        (model, [(x[:, :2], y)], {}, "cannot run on inputs of shape"),
        (model, [(x, y + 9)], {}, r"the labels run from \d+ to \d+, but 4 logits take 0 to 3"),
        (model, [(x, y[:, None])], {}, "the labels are a tensor of shape"),
        (model[:4], [(x, y)], {}, "it must return logits"),
        (model, [(x, y)], {"teacher": model}, "shares parameters"),
        (model, [(x, y)], {"teacher": nn.Sequential(model)}, "shares parameters"),
        (model, [(x, y)], {"teacher": network(classes=7)}, "the teacher's logits are"),
    ):
        with pytest.raises(TrainingError, match=words):
            finetune(bad, data, **options)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for options, words in (
        ({"teacher": network(1), "distillation": 1.5}, "distillation is 1.5"),
        ({"precision": "int8"}, "precision is 'int8'"),
    ):
        with pytest.raises(ValueError, match=words):
            finetune(model, [(x, y)], **options)


def test_probabilities_may_be_labels():
    x, y = samples(32)
    soft = F.one_hot(y, CLASSES).double()
    models = [network() for _ in range(2)]
    torch.manual_seed(0)
    first = finetune(models[0], [(x, y)], epochs=2)
    torch.manual_seed(0)
    second = finetune(models[1], [(x, soft)], epochs=2)
    assert second.curves[1]["train_loss"] == pytest.approx(first.curves[1]["train_loss"], rel=1e-5)
    assert second.curves[1]["train_accuracy"] == first.curves[1]["train_accuracy"]
    assert evaluate(models[0], [(x, soft)]).accuracy == evaluate(models[0], [(x, y)]).accuracy


# -- evaluation ---------------------------------------------------------------------------------


def test_evaluation_counts_what_is_right():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), nn.Linear(8, 8, bias=False))
    model[1].weight.data = torch.eye(8)
    model[0].eval()
    logits, y = torch.randn(50, 8), torch.randint(0, 8, (50,))
    found = evaluate(model, DataLoader(TensorDataset(logits, y), batch_size=16))
    ranks = (logits > logits.gather(1, y[:, None])).sum(1)
    assert found.accuracy.value == pytest.approx((ranks == 0).float().mean().item())
    assert found.top5.value == pytest.approx((ranks < 5).float().mean().item())
    assert found.loss == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
    assert (found.n, found.classes) == (50, 8)
    assert not model[0].training
    assert model.training
    assert f"n = {found.n}" in str(found)
    five = evaluate(network(), [samples(8)])
    assert five.top5 is None


def test_evaluation_refuses_what_it_cannot_judge():
    x, y = samples(8)
    for model, data, words in (
        (network(), [], "data holds no samples"),
        (network(), [(x, y.float())], "the labels are a tensor .*float32"),
        (network()[:4], [(x, y)], "it must return logits"),
        (network(), synthetic(train=10, test=10), "give one of them, such as data.test"),
        (nn.ReLU(), [(x, y)], "the model has no parameters"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluate(model, data)


@pytest.mark.parametrize(("right", "n"), [(0, 10), (3, 10), (10, 10), (870, 1000)])
def test_the_interval_is_wilsons(right, n):
    found, expected = proportion_estimate(right, n), stats.binomtest(right, n).proportion_ci(method="wilson")
    assert (found.value, found.n) == (right / n, n)
    assert (found.low, found.high) == (pytest.approx(expected.low, abs=1e-12), pytest.approx(expected.high, abs=1e-12))
