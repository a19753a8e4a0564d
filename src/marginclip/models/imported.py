"""Architectures from elsewhere: any function that makes a torch network, and the models of timm."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from marginclip.errors import UserError, first_line, nearest, require
from marginclip.models.normalize import make_normalize

PRIVATE = "marginclip_file_"  # how the names of files that are imported as modules begin


class NormalizedNetwork(nn.Module):
    """A network behind a normalisation: images in [0, 1] to logits (N, K).

    ``loaded_from`` is the file or folder that the network's weights were read from, None for other ones.

    Args:
        normalize: maps images (N, C, H, W) in [0, 1] to what the network takes.
        network: maps that to logits, or to something that holds them.
        output: attribute or key of what the network returns that holds the logits. None: it returns them.
    """

    loaded_from: str | None = None

    def __init__(self, normalize: nn.Module, network: nn.Module, output: str | None = None) -> None:
        super().__init__()
        self.normalize, self.network, self.output = normalize, network, output

    def forward(self, images: Tensor) -> Tensor:
        found: Any = self.network(self.normalize(images))
        if self.output is not None:
            found = found[self.output] if isinstance(found, Mapping) else getattr(found, self.output)
        logits: Tensor = found
        return logits


def imported_model(
    num_classes: int,
    in_channels: int = 3,
    *,
    target: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    output: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """The network that the factory ``target`` makes from ``arguments``.

    **Importing a module or a file runs its code**: name only what you trust. A file is run once for each content, under a name of its own:
    it takes the place of no other module.

    Args:
        num_classes: given to the factory where it takes an argument of this name and ``arguments`` does not say otherwise.
        in_channels: channels of the images; given to the factory in the same way.
        target: ``package.module:factory`` or ``path/to/file.py:factory``. None, the default, is refused.
        arguments: further ones of the factory, by name. None: none.
        output: attribute or key of what the network returns that holds the logits. None: it returns them.
        mean: what is subtracted from each channel, (in_channels,) for images in [0, 1]. None: nothing.
        std: what each channel is divided by then, (in_channels,) and positive; given together with ``mean``. None: nothing.

    Returns:
        The network behind its normalisation.

    Raises:
        UserError: for a target that cannot be imported, a factory that raises or lacks arguments, what is no module, and
            statistics that do not fit.
    """
    if not isinstance(target, str) or not all(target.rpartition(":")[::2]):
        raise UserError(f"model.target must be package.module:factory or path/to/file.py:factory, got {target!r}")
    factory = _factory(target)
    given = dict(arguments or {})
    taken = _arguments_of(factory)
    known = {"num_classes": num_classes, "in_channels": in_channels}
    given = {name: value for name, value in known.items() if name in taken} | given
    try:
        network = factory(**given)
    except Exception as error:  # whatever somebody else's factory raises
        raise UserError(f"model.target='{target}' fails: {first_line(error)}; model.arguments are its arguments") from error
    require(
        isinstance(network, nn.Module),
        f"model.target='{target}' must make a torch.nn.Module, it makes a {type(network).__name__}",
    )
    return NormalizedNetwork(make_normalize(in_channels, mean, std), network, output)


def timm_model(
    num_classes: int,
    in_channels: int = 3,
    *,
    network: str = "resnet18",
    arguments: Mapping[str, Any] | None = None,
    mean: Sequence[float] | None = (0.485, 0.456, 0.406),
    std: Sequence[float] | None = (0.229, 0.224, 0.225),
) -> nn.Module:
    """A classifier of timm by its name, with fresh weights and the normalisation inside; needs the package timm.

    Args:
        num_classes: how many logits it gives.
        in_channels: channels of the images.
        network: name of a model of timm.
        arguments: further ones of ``timm.create_model``, such as ``img_size``. None: none.
        mean: what is subtracted from each channel, (in_channels,) for images in [0, 1]. The default is ImageNet's, of 3
            channels. None: nothing.
        std: what each channel is divided by then, (in_channels,) and positive; given together with ``mean``. None: nothing.

    Returns:
        The network behind its normalisation.

    Raises:
        UserError: without the package, for an unknown name, for arguments that timm refuses, and for statistics that do not
            fit.
    """
    try:
        import timm
    except ImportError as error:
        raise UserError("model=timm needs the package timm: pip install 'marginclip[timm]'") from error
    known = timm.list_models()
    if network not in known:
        raise UserError(f"model.network '{network}' is not a model of timm{nearest(network, known)}")
    try:
        made = timm.create_model(network, num_classes=num_classes, in_chans=in_channels, **dict(arguments or {}))
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"model.network={network} cannot be made: {first_line(error)}") from error
    return NormalizedNetwork(make_normalize(in_channels, mean, std), made)


def _factory(target: str) -> Callable[..., Any]:
    place, _, name = target.rpartition(":")
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # whatever somebody else's module raises
        raise UserError(f"model.target='{target}' cannot be imported ({first_line(error)})") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"model.target='{target}': '{place}' has no '{name}' that could be called{nearest(name, own)}")
    return factory  # type: ignore[no-any-return]


def _from_file(file: Path) -> Any:
    """The file as a module, run once for each content; its private name takes the place of no other module."""
    require(file.is_file(), f"'{file}' is not a file")
    place = os.path.abspath(file)
    name = PRIVATE + hashlib.sha256(os.fsencode(place) + b"\0" + file.read_bytes()).hexdigest()[:16]
    os.environ[name] = place
    return importlib.import_module(name)


class _Files(MetaPathFinder):
    """Finds the files of :func:`_from_file` by their private names, for pickled networks in the processes of several devices, too."""

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        place = os.environ.get(name) if name.startswith(PRIVATE) else None
        return None if place is None else importlib.util.spec_from_file_location(name, place)


sys.meta_path.append(_Files())


def _arguments_of(factory: Callable[..., Any]) -> set[str]:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return set()
    return {each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
