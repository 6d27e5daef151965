"""What one process keeps from run to run: data on their device, and networks whose training step is captured.

Runs that differ in their seed alone have the same network, so that of the first is kept, and the weights of the next
are written into it: uploading data and capturing a CUDA graph take as long as training a small network.
"""

from __future__ import annotations

from collections import OrderedDict
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
    _steps: OrderedDict[Hashable, TrainingStep] = field(default_factory=OrderedDict)
    _captures: dict[torch.device, CudaCapture] = field(default_factory=dict)

    def data(self, key: Hashable, make: Callable[[], Data]) -> Data:
        """The data called ``key``; only the last ones are kept."""
        if self._data is None or self._data[0] != key:
            self._data = (key, make())
        return self._data[1]

    def step(self, key: Hashable, model: nn.Module, recipe: Recipe, device: torch.device) -> TrainingStep:
        """A training step of a network that is ``model`` in all values; equal ``key`` means equal in all but those."""
        step = self._steps.get(key)
        if step is None:
            step = make_step(model, recipe, device=device, capture=self._capture(device))
        else:
            step.model.load_state_dict(model.state_dict())
        self._steps[key] = step
        self._steps.move_to_end(key)
        while len(self._steps) > KEPT:
            self._steps.popitem(last=False)
        return step

    def _capture(self, device: torch.device) -> CudaCapture | None:
        """One for all graphs of a device. They may share memory, since none runs while another does."""
        if device.type == "cuda" and device not in self._captures:
            self._captures[device] = CudaCapture(device)
        return self._captures.get(device)

    def forget_networks(self) -> None:
        """After a failure, which may have left anything in them."""
        self._steps.clear()
        self._captures.clear()
