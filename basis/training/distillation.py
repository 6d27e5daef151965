"""Distillation: a network learns the predictions of a teacher (Hinton et al. 2015, arXiv 1503.02531, section 2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from basis.batches import logits_of, outputs_of
from basis.inputs import Inputs, run
from basis.modules import evaluating
from basis.training.stepping import Autocast

TEMPERATURE = 4.0


def distillation_loss(logits: Tensor, taught: Tensor) -> Tensor:
    """T^2 KL(p || q), mean over samples; logits (N, classes) of the model and of its teacher.

    T = :data:`TEMPERATURE`; T^2 keeps the size of the gradients.
    """
    log_q, log_p = (values.div(TEMPERATURE).log_softmax(1) for values in (logits, taught))
    return TEMPERATURE**2 * (log_p.exp() * (log_p - log_q)).sum(1).mean()


def teacher_logits(network: nn.Module, x: Inputs, autocast: Autocast) -> Tensor:
    """Of the network in evaluation mode, in fp32 and without gradients."""
    with torch.no_grad(), evaluating(network), autocast():
        return logits_of(outputs_of(network, x)).float()


def beside_teacher(
    student: nn.Module, teacher: nn.Module, *, share: float, autocast: Autocast
) -> Callable[[Inputs], tuple[Tensor, Tensor]]:
    """What runs a network beside its teacher: to the logits, and ``share`` times the :func:`distillation_loss`."""

    def both(x: Inputs) -> tuple[Tensor, Tensor]:
        with autocast():
            logits = logits_of(run(student, x)).float()
        return logits, share * distillation_loss(logits, teacher_logits(teacher, x, autocast))

    return both
