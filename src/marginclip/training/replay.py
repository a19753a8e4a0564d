"""A network's forward and backward pass as CUDA graphs: captured once, then replayed with one launch each, by a callback."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from marginclip.training.classifier import ClassifierTraining

log = logging.getLogger(__name__)


class _Call(nn.Module):
    """What is captured in the place of the model, which keeps its own ``forward``; its parts keep their modes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits


class ReplayedNetwork:
    """Maps images (B, C, H, W) to ``model``'s logits; on a GPU both passes of batches shaped like the first are replayed.

    The step of a small network is spent on launching its kernels one by one, which a replayed graph does at once. Everything else
    goes through ``model`` itself: batches of another shape, calls without gradients or with modules in other modes (training,
    evaluation), and a second call before the backward pass of the first. Replayed, that call would overwrite what the pass needs.
    :meth:`passed_back` says that a backward pass is done. A model that cannot be captured (its forward pass waits for the GPU,
    say) is used as it is, with one warning. Gradients must not be accumulated over several backward passes, and the model must
    stay where it is on the device.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.replayed: Callable[..., Any] | None = None
        self.shape: torch.Size | None = None
        self.modes: tuple[bool, ...] = ()
        self.waits = False

    def __call__(self, images: Tensor) -> Tensor:
        if self.shape is None and self.replayable(images):
            self.shape, self.modes = images.shape, self._modes()
            self.capture(images)
        fits = images.shape == self.shape and torch.is_grad_enabled() and self._modes() == self.modes
        if self.replayed is None or self.waits or not fits:
            logits: Tensor = self.model(images)
            return logits
        self.waits = True
        logits = self.replayed(images)
        return logits

    def passed_back(self) -> None:
        """To be called after every backward pass."""
        self.waits = False

    @staticmethod
    def replayable(images: Tensor) -> bool:
        """Whether passes on these images can be captured: on a GPU, and with gradients."""
        return images.is_cuda and torch.is_grad_enabled()

    def capture(self, images: Tensor) -> None:
        """Capture both passes; the warm-up passes that this takes leave no trace in the model's buffers."""
        device = images.device.type
        before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        half = torch.get_autocast_dtype(device)
        call, images = _Call(self.model), images.detach().clone()
        try:
            with _unharmed(images), torch.autocast(device, half, torch.is_autocast_enabled(device), cache_enabled=False):
                if images.is_cuda:
                    _rehearse(call, images)
                self.replayed = torch.cuda.make_graphed_callables(call, (images,))
        except (RuntimeError, AssertionError) as error:
            log.warning(
                "the model's passes cannot be replayed as CUDA graphs, training goes on without (%s); trainer.cuda_graphs=false "
                "says so from the start", str(error).partition("\n")[0],
            )  # fmt: skip
        finally:
            with torch.no_grad():
                for name, buffer in self.model.named_buffers():
                    buffer.copy_(before[name])

    def _modes(self) -> tuple[bool, ...]:
        return tuple(module.training for module in self.model.modules())


class CudaGraphs(L.Callback):
    """Lets a :class:`~marginclip.training.classifier.ClassifierTraining` replay its model's passes while it is fitted.

    One GPU replays; with several devices or accumulated gradients all goes through the model itself. Trainings with a step of their
    own, such as :class:`~marginclip.training.joint.JointTraining`, which do not call ``forward_pass``, are not concerned.
    """

    def __init__(self) -> None:
        self.network: ReplayedNetwork | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, ClassifierTraining)
        if trainer.world_size == 1 and trainer.accumulate_grad_batches == 1:
            pl_module.forward_pass = self.network = ReplayedNetwork(pl_module.model)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.network is not None:
            self.network.passed_back()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, ClassifierTraining)
        pl_module.forward_pass, self.network = pl_module.forward, None  # the model moves to the CPU now


def _rehearse(call: nn.Module, images: Tensor) -> None:
    """Both passes, with an error where the model waits for the GPU: in a capture, that would leave torch's state broken."""
    weights = [weight for weight in call.parameters() if weight.requires_grad]
    call(images)  # what waits in the first pass alone (libraries that are loaded) is no obstacle
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode")  # a prototype, it says; it need not find all
        torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(call(images).sum(), weights, allow_unused=True)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@contextmanager
def _unharmed(images: Tensor) -> Iterator[None]:
    """Put right what a capture that fails leaves behind on a GPU: another stream, and random numbers that cannot be drawn."""
    if not images.is_cuda:
        yield
        return
    device = images.device
    generator = torch.cuda.default_generators[device.index]
    state = generator.get_state()
    try:
        with torch.cuda.stream(torch.cuda.current_stream(device)):
            yield
    except BaseException:
        usable = torch.Generator(device)
        usable.set_state(state)
        generator.graphsafe_set_state(usable)
        raise
