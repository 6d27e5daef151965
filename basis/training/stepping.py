"""The training step, eager, compiled, captured as a CUDA graph, or both.

A step is the forward pass, the loss, the backward pass and the update; it reads nothing back from the device. A graph
launches its hundreds of kernels at once. It repeats the same kernels on the same memory, so images and labels are
copied to fixed places, learning rates are tensors, and each kind of step (as of skip-training) has its own graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._triton import has_triton

from basis.batches import Loss, logits_of, losses_of
from basis.inputs import run, samples_in
from basis.text import first_line

Step = Literal["eager", "compiled", "graphed", "fast"]
Capture = Callable[[Callable[[], None]], Callable[[], None]]
Autocast = Callable[[], AbstractContextManager]  # makes the context of a forward pass

WARM_UPS = 3  # steps before a capture, as PyTorch advises: libraries choose their algorithms in the first ones
VARIANTS = 64  # networks of one class that one process can compile; torch gives up silently after 8


class Means(NamedTuple):
    """Active accelerations, and why the others are off; as text: ``eager (needs a GPU)``."""

    compiled: bool = False
    graphed: bool = False
    reason: str = ""

    @property
    def prepares(self) -> bool:
        """Whether the first step of each kind takes longer."""
        return self.compiled or self.graphed

    def __str__(self) -> str:
        names = [name for name in ("compiled", "graphed") if getattr(self, name)]
        return " and ".join(names or ["eager"]) + (f" ({self.reason})" if self.reason else "")


def means_for(step: Step | None, device: torch.device) -> Means:
    """What ``step`` comes to on this device: what it does not support is left out, with the reason.

    None is graphed on a GPU, else eager. "fast" on a CPU is eager: compiling ResNet-20 took 35 s on one core and made
    a step 1.3 times as fast, so it pays after some 300 steps.
    """
    gpu = device.type == "cuda"
    if step is None:
        return Means(graphed=gpu)
    if step == "eager":
        return Means()
    if step == "fast" and not gpu:
        return Means(reason=f"on {device.type} compiling takes longer than a short training gains")
    if step == "graphed":
        return Means(graphed=True) if gpu else Means(reason=f"CUDA graphs need a GPU, not {device.type}")
    missing = "torch.compile needs Triton" if gpu and not has_triton() else ""
    return Means(compiled=not missing, graphed=step == "fast" and gpu, reason=missing)


class TrainingStep:
    """One step of a training, to be called again and again: ``step(x, labels, kind)``.

    The first step of each kind is compiled or captured, after trial steps whose effects are undone; those seconds add
    up in ``setup_seconds``. Where that fails the step is eager, and ``means`` says so.

    Args:
        model: from images to logits (N, classes); on its device, in training mode when a step is called.
        optimizer, scaler: over parameters of ``model``, fused for CUDA graphs; of the loss.
        objective: (loss, kind) to what is differentiated.
        channels_last: the memory format of ``model``, which a compiler has to be made to keep.
        capture: runs a function and returns what repeats it; a CUDA graph unless given.
        beside: runs ``model`` beside a teacher, inputs to logits and a term that is added to what is
            differentiated. Not compiled.
        loss_function: of outputs and targets, whatever they are; cross-entropy unless given.

    Attributes:
        loss, correct: sums since :meth:`start_epoch` of the samples' losses, and of images classified rightly.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.SGD, scaler: torch.amp.GradScaler,
        objective: Callable[[Tensor, Any], Tensor], *, means: Means,
        autocast: Autocast = nullcontext, label_smoothing: float = 0.0,
        channels_last: bool = False, capture: Capture | None = None,
        beside: Callable[[Any], tuple[Tensor, Tensor]] | None = None, loss_function: Loss | None = None,
    ) -> None:  # fmt: skip
        if beside and means.compiled:
            means = means._replace(compiled=False, reason="a network beside its teacher is not compiled")
        self.model, self.optimizer, self.scaler, self.means = model, optimizer, scaler, means
        self.beside, self.loss_function, self.setup_seconds = beside, loss_function, 0.0
        self._objective, self._autocast, self._label_smoothing = objective, autocast, label_smoothing
        self._device = next(model.parameters()).device
        self.loss, self.correct = (torch.zeros((), device=self._device) for _ in range(2))
        self._network: Any = compiled(model, channels_last) if means.compiled else model
        self._capture = capture or (CudaCapture(self._device) if means.graphed else None)
        self._rates = [torch.tensor(group["lr"], device=self._device) for group in optimizer.param_groups]
        self._prepared: dict[Hashable, Callable[[Tensor, Tensor], None]] = {}
        self.set_rates([group["lr"] for group in optimizer.param_groups])
        self.forget()

    def __call__(self, x: Any, labels: Any, kind: Hashable = None) -> None:
        """Train on one batch; ``kind`` tells apart steps that compute different things, and goes to ``objective``.

        Where steps are prepared, ``x`` and ``labels`` are tensors.
        """
        if not self.means.prepares:
            return self._run(x, labels, kind=kind)
        key = (kind, x.shape)
        if key not in self._prepared:
            began = time.perf_counter()
            self._prepared[key] = self._prepare(x, labels, kind)
            self.setup_seconds += time.perf_counter() - began
        return self._prepared[key](x, labels)

    def set_rates(self, rates: Sequence[float]) -> None:
        """The learning rate of each parameter group, for the steps to come."""
        for group, place, rate in zip(self.optimizer.param_groups, self._rates, rates, strict=True):
            # Set anew each time, since a checkpoint brings learning rates of its own.
            group["lr"] = place.fill_(rate) if self.means.graphed else rate

    def start_epoch(self) -> None:
        """Begin the sums anew."""
        self.loss.zero_()
        self.correct.zero_()

    def forget(self) -> None:
        """Drop what is captured, after ``optimizer.load_state_dict``."""
        self._prepared.clear()
        if self.means.prepares:  # momentum has its place before anything is captured
            for group in self.optimizer.param_groups:
                for p in group["params"] if group["momentum"] else ():
                    self.optimizer.state[p].setdefault("momentum_buffer", torch.zeros_like(p))

    def _run(self, x: Any, labels: Any, *, kind: Hashable) -> None:
        term: Tensor | None = None
        if self.beside:
            outputs, term = self.beside(x)
        else:
            with self._autocast():
                outputs = run(self._network, x)
        if self.loss_function is not None:
            with self._autocast():
                loss = losses_of(self.loss_function, outputs, labels, samples=samples_in(x), mean=True).mean()
        else:
            loss = F.cross_entropy(logits_of(outputs).float(), labels, label_smoothing=self._label_smoothing)
        objective = self._objective(loss, kind)
        if term is not None:
            objective = objective + term
        self.optimizer.zero_grad(set_to_none=True)
        if objective.requires_grad:  # a step may train nothing, where all but a skipped part is frozen
            self.scaler.scale(objective).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif any(p.requires_grad for p in self.model.parameters()):
            raise ValueError("the loss has no gradient: the model or the loss detaches it, or gradients are off")
        self.loss += loss.detach() * samples_in(x)
        if self.loss_function is None:
            right = labels if labels.dim() == 1 else labels.argmax(1)  # labels may be probabilities
            self.correct += (outputs.detach().argmax(1) == right).sum()

    def _prepare(self, x: Tensor, labels: Tensor, kind: Hashable) -> Callable[[Tensor, Tensor], None]:
        run = partial(self._run, kind=kind)
        if self.means.compiled:
            try:
                with _many_variants():
                    self._rehearse(partial(run, x, labels), times=1)
            except Exception as error:  # the compiler, what it calls, or the model itself, which is run again below
                self._give_up(error, "compiled")
        if not self.means.graphed or self._capture is None:
            return run
        x, labels = x.clone(), labels.clone()  # the places that the graph reads
        self._rehearse(partial(run, x, labels), times=WARM_UPS)
        try:
            replay = self._capture(partial(run, x, labels))
        except RuntimeError as error:  # the model does something that waits for the device
            self._give_up(error, "graphed")
            return run

        def repeat(batch: Tensor, its_labels: Tensor) -> None:
            x.copy_(batch)
            labels.copy_(its_labels)
            replay()

        return repeat

    def _give_up(self, error: Exception, what: Literal["compiled", "graphed"]) -> None:
        """Go on without what failed, in all kinds of steps."""
        reason = "; ".join(filter(None, [self.means.reason, f"could not be {what}: {first_line(error)}"]))
        self.means = self.means._replace(reason=reason, **{what: False})
        if not self.means.compiled:
            self._network = self.model
        self.set_rates([float(group["lr"]) for group in self.optimizer.param_groups])
        self._prepared.clear()
        self.optimizer.zero_grad(set_to_none=True)

    def _rehearse(self, run: Callable[[], None], *, times: int) -> None:
        """Run steps that leave no trace in the training."""
        kept = [*self.model.parameters(), *self.model.buffers(), self.loss, self.correct]
        kept += [value for state in self.optimizer.state.values() for value in state.values()]
        before, scaler = [tensor.detach().clone() for tensor in kept], self.scaler.state_dict()
        gpus = [self._device] if self._device.type == "cuda" else []
        try:
            with torch.random.fork_rng(gpus), on_side_stream(self._device):
                for _ in range(times):
                    run()
        finally:
            with torch.no_grad():
                for tensor, value in zip(kept, before, strict=True):
                    tensor.copy_(value)
            self.scaler.load_state_dict(scaler)
            self.optimizer.zero_grad(set_to_none=True)


class CudaCapture:
    """CUDA graphs of one GPU that share their memory, since only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        # A stream of its own: torch's usual one is on the GPU of the process's first capture, whatever GPU this is.
        self._device, self._pool, self._stream = device, torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """Capture what ``function`` does on the GPU; ``RuntimeError`` where it waits for the GPU."""
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer context goes back to the present stream, which a capture that fails does not.
            with (
                torch.cuda.stream(torch.cuda.current_stream(self._device)),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream),
            ):
                function()
        except RuntimeError as error:  # that of the end of the capture hides what ended it
            raise RuntimeError(str(error.__context__ or error)) from error
        return graph.replay


def compiled(model: nn.Module, channels_last: bool) -> Any:
    """``model`` compiled for fixed shapes, as a function; it keeps channels-last where the model is.

    Without ``force_layout_optimization`` inductor gives up channels-last for a whole graph in which one 3x3
    convolution has at most half as many outputs as inputs, as that with B has at r <= 1/2.
    """
    options: Any = {"force_layout_optimization": True} if channels_last else None
    return torch.compile(model, dynamic=False, options=options)


def _many_variants() -> AbstractContextManager:
    """Let torch compile many networks of one class in one process; beyond its limit they are eager, in silence."""
    import torch._dynamo.config as config  # slow to import

    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # its name before torch 2.7
    return config.patch({limit: VARIANTS})


@contextmanager
def on_side_stream(device: torch.device) -> Iterator[None]:
    """On a GPU: on a stream of its own, as trial steps before a capture have to be."""
    if device.type != "cuda":
        yield
        return
    stream, main = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(main)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        main.wait_stream(stream)
