"""Learnable bounds behind every activation of any torch model (Eq. 2 of the MMAC paper)."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from marginclip.clipping.activations import choose_sites, find_sites, make_out_of_place
from marginclip.clipping.bounds import Bound, LogitOffsets
from marginclip.errors import UserError, require
from marginclip.networks.copies import fold_batch_norms
from marginclip.networks.memory import images_at_once
from marginclip.networks.tracing import trace


class BoundedNetwork(nn.Module):
    """A copy of ``model`` with bounds behind every activation call; its own weights are frozen, its bounds are to be learned.

    Takes what the model takes and gives its logits; with infinite bounds, as at first, exactly the model's own in evaluation
    mode. Every call of an activation gets its own bounds, whether it is a module, one module called many times, a function or
    in place: one for each feature map, for each neuron behind a dense layer. Upper bounds for ReLU-like functions, lower and
    upper for LeakyReLU, GELU, SiLU and the like. Nothing is shared with the model that was given. Bounds are in ``state_dict``
    under ``bounds.*`` (the same tensors once more under ``network.bound_*``); :meth:`bounds_state` and :meth:`load_bounds` save and
    load them alone.

    Args:
        model: any torch network that torch.fx can trace and that gives logits.
        example: one image (C, H, W) or a batch (N, C, H, W).
        channel_axis: where the channels of activations with more than two axes are. None: found by the model's layers
            (:func:`marginclip.clipping.activations.find_sites`).
        sites: which activations are bounded: ``all``, ``last``, ``first_half`` or a list of names
            (:func:`marginclip.clipping.activations.choose_sites`).
        offsets: add one learnable number to the logit of each class (``offsets.value``), 0 at first. False: ``offsets`` is None.
        scaled: multiply all logits by one learnable number before (``offsets.scale``), 1 at first; with ``offsets`` only.

    Raises:
        UserError: for a model that cannot be traced or has no activations.

    Examples:
        >>> bounded = BoundedNetwork(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.rand(1, 2, 2))
        >>> [(name, bound.upper.tolist()) for name, bound in bounded.each()]
        [('000_2', [inf, inf, inf])]
        >>> bounded.num_bounds
        3
    """

    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        *,
        channel_axis: int | None = None,
        sites: str | Sequence[str] = "all",
        offsets: bool = False,
        scaled: bool = False,
    ) -> None:
        super().__init__()
        require(offsets or not scaled, "a scale of the logits is learned with offsets only")
        with torch.inference_mode(False), torch.no_grad():  # made in a validation loop, it can be learned all the same
            traced = trace(model, example if example.dim() > 3 else example.unsqueeze(0))
            self.network, self.bounds, num_classes = _with_bounds(traced, example, channel_axis, sites)
            device = next(self.bounds.parameters()).device
            self.offsets = LogitOffsets(num_classes, scaled=scaled).to(device) if offsets else None
        self.channel_axis = channel_axis
        for parameter in self.network.parameters():
            parameter.requires_grad_(False)
        for bound in self.bounds.values():
            for value in bound.values():  # type: ignore[operator]
                value.requires_grad_(True)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits if self.offsets is None else self.offsets(logits)

    def train(self, mode: bool = True) -> BoundedNetwork:
        """The repaired network stays in evaluation mode: its dropout and batch norm were fixed when it was traced."""
        del mode
        return super().train(False)

    def each(self) -> Iterator[tuple[str, Bound]]:
        """The bounds by the name of their activation call, in the order of execution."""
        for name, bound in self.bounds.items():
            assert isinstance(bound, Bound)
            yield name, bound

    def bound_parameters(self) -> list[nn.Parameter]:
        """All bounds, to be handed to an optimizer."""
        return [value for _, bound in self.each() for value in bound.values()]

    @property
    def num_bounds(self) -> int:
        """How many scalar bounds there are (the papers' ResNet-18: 3,904)."""
        return sum(value.numel() for value in self.bound_parameters())

    def bounds_state(self) -> dict[str, Tensor]:
        """What was learned, ``<call>.upper``, ``<call>.lower`` and, where there are such, ``offsets`` and ``scale``: detached copies."""
        bounds = {name: value.detach().clone() for name, value in self.bounds.state_dict().items()}
        return bounds if self.offsets is None else bounds | self.offsets.state()

    @torch.no_grad()
    def load_bounds(self, state: dict[str, Tensor]) -> None:
        """Set the bounds from :meth:`bounds_state`, or from the ``bounds.safetensors`` of a run, also where the network was part of another
        module there (activations have longer names then). Raises :class:`UserError` for bounds of another architecture."""
        own = self.bounds_state()
        state = _under_names(list(own), state)
        scaled = "offsets" in own and "scale" not in own and "scale" in state
        require(
            not scaled, "these bounds were learned with a scale of the logits: load them into BoundedNetwork(..., scaled=True)"
        )
        odd = sorted((set(own) ^ set(state)) - {"scale"}) or [name for name in state if own[name].shape != state[name].shape]
        require(not odd, f"these bounds are of another architecture: '{odd[0] if odd else ''}' does not fit")
        self.bounds.load_state_dict({name: value for name, value in state.items() if name not in ("offsets", "scale")})
        if self.offsets is not None:
            self.offsets.load(state)

    @torch.no_grad()
    def set_constant(self, value: float) -> None:
        """Every upper bound at ``value``, every lower one at ``-value`` (the paper's start: 1)."""
        require(value > 0, f"an initial bound must be positive, got {value:g}")
        for _, bound in self.each():
            bound.upper.fill_(value)
            if bound.lower is not None:
                bound.lower.fill_(-value)

    @torch.no_grad()
    def set_from_images(
        self, images: Tensor, *, share: float = 1.0, quantile: float = 1.0, batch_size: int | None = None
    ) -> None:
        """Every bound at ``share`` of what its map reaches on clean images (N, C, H, W).

        What a map reaches is the ``quantile`` over images of its largest value in an image (smallest, for lower bounds); 1 is
        the maximum over the set. Silent maps get the bound 0.
        """
        require(share > 0, f"the initial share of the clean maximum must be positive, got {share:g}")
        require(0 < quantile <= 1, f"the initial quantile must be in (0, 1], got {quantile:g}")
        extremes = activation_extremes(self, images, batch_size=batch_size)
        for name, bound in self.each():
            lowest, highest = extremes[name]
            bound.upper.copy_(share * highest.quantile(quantile, dim=0).to(bound.upper.device))
            if bound.lower is not None:
                bound.lower.copy_(share * lowest.quantile(1 - quantile, dim=0).to(bound.lower.device))
        self.project_()

    def project_(self) -> None:
        """Project all bounds to their feasible values (see :meth:`Bound.project_`)."""
        for _, bound in self.each():
            bound.project_()
        if self.offsets is not None:
            self.offsets.project_()

    @contextmanager
    def unbounded(self) -> Iterator[None]:
        """Inside, the network is the model as it was given."""
        switches: list[Bound | LogitOffsets] = [bound for _, bound in self.each()]
        switches += [] if self.offsets is None else [self.offsets]
        before = [(switch, switch.enabled) for switch in switches]
        for bound, _ in before:
            bound.enabled = False
        try:
            yield
        finally:
            for bound, enabled in before:
                bound.enabled = enabled

    def fused(self) -> BoundedNetwork:
        """The same network with batch norms folded into the layers before them, **sharing these bounds**.

        For learning: it is faster, and equal up to rounding. Where a batch norm cannot be folded it stays.
        """
        twin = copy.copy(self)
        twin._modules = dict(self._modules)
        network = copy.deepcopy(self.network)
        for name in self.bounds:
            setattr(network, f"bound_{name}", self.bounds[name])
        folded = fold_batch_norms(network)
        if folded is None:
            return self
        twin._modules["network"] = folded
        for parameter in folded.parameters():
            parameter.requires_grad_(any(parameter is value for value in self.bound_parameters()))
        return twin  # the offsets are its own, too: they come with the dictionary of modules

    @torch.no_grad()
    def active_share(self, extremes: dict[str, tuple[Tensor, Tensor]]) -> float:
        """The share of bounds that cut something, given :func:`activation_extremes` of the unbounded network."""
        active, total = 0, 0
        for name, bound in self.each():
            lowest, highest = extremes[name]
            active += int((highest.amax(0).to(bound.upper) > bound.upper).sum())
            total += bound.upper.numel()
            if bound.lower is not None:
                active += int((lowest.amin(0).to(bound.lower) < bound.lower).sum())
                total += bound.lower.numel()
        return active / total

    def __deepcopy__(self, memo: dict[int, Any]) -> BoundedNetwork:
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        nn.Module.__init__(twin)
        twin.channel_axis = self.channel_axis
        twin.network = copy.deepcopy(self.network, memo)
        twin.offsets = copy.deepcopy(self.offsets, memo)
        twin.bounds = nn.ModuleDict({name: twin.network.get_submodule(f"bound_{name}") for name in self.bounds})
        return twin.eval()


def _under_names(names: list[str], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The ``state`` under these names, where its own differ from them by the path in front alone; else as it is."""
    pairs = list(zip(sorted(names), sorted(state), strict=False))
    alike = len(names) == len(state) and all(
        one[:4] == other[:4] and (one[4:].endswith(other[4:]) or other[4:].endswith(one[4:])) for one, other in pairs
    )
    return {own: state[name] for own, name in pairs} if alike else state


@torch.no_grad()
def activation_extremes(
    bounded: BoundedNetwork, images: Tensor, *, batch_size: int | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Smallest and largest value of every feature map in every image, by activation call: two tensors (N, channels) on the CPU.

    Measured on the network *without* bounds (paper 1, Fig. 2 and 3 show the maxima over images).
    """
    collected: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name, _ in bounded.each()}

    def note(name: str, axis: int) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            flat = (
                inputs[0].detach().float().movedim(axis, 1).flatten(2)
                if inputs[0].dim() > 2
                else inputs[0].float().unsqueeze(2)
            )
            collected[name].append((flat.amin(2).cpu(), flat.amax(2).cpu()))

        return hook

    handles = [bound.register_forward_pre_hook(note(name, bound.axis)) for name, bound in bounded.each()]
    device = bounded.bound_parameters()[0].device
    try:
        with bounded.unbounded():
            for batch in images.split(batch_size or images_at_once(images)):
                bounded(batch.to(device))
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: (torch.cat([low for low, _ in parts]), torch.cat([high for _, high in parts]))
        for name, parts in collected.items()
    }


def _with_bounds(
    traced: fx.GraphModule, example: Tensor, channel_axis: int | None, wanted: str | Sequence[str]
) -> tuple[fx.GraphModule, nn.ModuleDict, int]:
    """Insert a :class:`Bound` behind every activation call of a traced model; also returns its number of classes."""
    example = torch.cat([example[:1] if example.dim() > 3 else example.unsqueeze(0)] * 2)  # a batch of one, squeezed, is none
    parameter = next(iter(traced.parameters()), None)
    example = example if parameter is None else example.to(parameter.device)
    logits = _logits(traced, example)
    sites = find_sites(traced, example, channel_axis=channel_axis)
    if not sites:
        raise UserError("the model has no activation functions that could be bounded (ReLU, LeakyReLU, GELU, SiLU, ...)")
    bounds = nn.ModuleDict()
    make_out_of_place(traced, [site.node for site in sites])
    for site in choose_sites(sites, wanted):
        bound = Bound(site) if parameter is None else Bound(site).to(parameter.device)
        bounds[site.name] = bound
        target = f"bound_{site.name}"
        traced.add_submodule(target, bound)
        with traced.graph.inserting_after(site.node):
            clipped = traced.graph.call_module(target, (site.node,))
        site.node.replace_all_uses_with(clipped, delete_user_cb=partial(operator.is_not, clipped))
    traced.graph.lint()
    traced.recompile()
    require(
        torch.allclose(_logits(traced, example), _logits(traced, example), rtol=1e-4, atol=1e-5, equal_nan=True),
        "the model gives other logits for the same image each time: it must not draw random numbers in evaluation mode",
    )
    require(
        torch.allclose(_logits(traced, example), logits, rtol=1e-4, atol=1e-5, equal_nan=True),
        "the model overwrites an activation's input in place and reads it under another name (a view, nn.Identity, "
        "nn.Dropout); write that activation out of place so that it can be bounded",
    )
    return traced, bounds, logits.shape[1]


@torch.no_grad()
def _logits(traced: fx.GraphModule, example: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():  # in this order: leaving inference mode turns gradients on
        logits: Tensor = traced(example.detach().clone())
    require(isinstance(logits, Tensor), f"the model must return one tensor of logits, not a {type(logits).__name__}")
    require(logits.dim() >= 2, f"the model must return logits (N, K), got {tuple(logits.shape)}")
    return logits
