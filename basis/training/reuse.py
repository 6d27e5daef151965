"""What one process keeps from run to run: data on their device, and networks whose training step is captured.

Runs that differ in their seed alone have the same network, so that of the first is kept, and the weights of the next
are written into it: uploading data and capturing a CUDA graph take as long as training a small network.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import nn

from basis.data import Data
from basis.training.loop import Recipe, make_step
from basis.training.stepping import CudaCapture, TrainingStep

KEPT = 16  # networks: as many as a study has variants


@dataclass
class Reuse:
    """The last data, and the networks of the last :data:`KEPT` kinds, whose graphs share their memory."""

    _data: tuple[Hashable, Data] | None = None
    _steps: dict[Hashable, TrainingStep] = field(default_factory=dict)
    _captures: dict[torch.device, CudaCapture] = field(default_factory=dict)

    def data(self, key: Hashable, make: Callable[[], Data]) -> Data:
        """The data called ``key``; only the last ones are kept."""
        if self._data is None or self._data[0] != key:
            self._data = (key, make())
        return self._data[1]

    def step(self, key: Hashable, model: nn.Module, recipe: Recipe, device: torch.device) -> TrainingStep:
        """A training step of a network that is ``model`` in all values; equal ``key`` means equal in all but those."""
        if device.type == "cuda" and device not in self._captures:  # one for all, since one graph runs at a time
            self._captures[device] = CudaCapture(device)
        step = self._steps.pop(key, None)
        if step is None:
            step = make_step(model, recipe, device=device, capture=self._captures.get(device))
        else:
            step.model.load_state_dict(model.state_dict())
        self._steps[key] = step
        while len(self._steps) > KEPT:
            self._steps.pop(next(iter(self._steps)))
        return step

    def forget_networks(self) -> None:
        """After a failure, which may have left anything in them."""
        self._steps.clear()
        self._captures.clear()
