"""Image classifiers of Hugging Face transformers, from a folder on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from marginclip.errors import UserError, first_line, require
from marginclip.models.imported import NormalizedNetwork
from marginclip.models.normalize import make_normalize

TINY = 1e-6  # what is nearer to nothing is rounding


def huggingface_model(
    num_classes: int,
    in_channels: int = 3,
    *,
    path: str | None = None,
    output: str = "logits",
    mean: Sequence[float] | str | None = "auto",
    std: Sequence[float] | str | None = "auto",
) -> nn.Module:
    """The image classifier in the folder ``path``: ``config.json``, and its weights in safetensors; needs the package transformers.

    Nothing is downloaded, and no code or pickle in the folder is run. Without safetensors the weights are fresh ones, for
    ``num_classes`` classes.

    Args:
        num_classes: how many logits it gives; where the folder has weights, it must be their own number of classes.
        in_channels: channels of the images.
        path: the folder. None, the default, is refused.
        output: attribute or key of what the network returns that holds the logits.
        mean: what is subtracted from each channel, (in_channels,) for images in [0, 1]. ``auto``: what ``preprocessor_config.json``
            does, where there is one, or ``pretrained_cfg`` of ``config.json``, as models of timm have it. None: nothing.
        std: what each channel is divided by then, (in_channels,) and positive; given together with ``mean``. ``auto``: as for
            ``mean``. None: nothing.

    Returns:
        The network behind its normalisation, in full precision.

    Raises:
        UserError: without the package, for a folder that holds no such classifier, for another number of classes, and for
            statistics that do not fit.
    """
    folder = Path(path or "")
    require(
        path is not None and (folder / "config.json").is_file(),
        f"model.path must be a folder with config.json and safetensors, got {path!r}",
    )
    network, loaded = _network(folder, num_classes)
    own_mean, own_std = _own_statistics(folder, in_channels) if "auto" in (mean, std) else (None, None)
    normalize = make_normalize(in_channels, own_mean if mean == "auto" else mean, own_std if std == "auto" else std)  # type: ignore[arg-type]
    model = NormalizedNetwork(normalize, network.float(), output)
    model.loaded_from = str(path) if loaded else None
    return model


def _network(folder: Path, num_classes: int) -> tuple[nn.Module, bool]:
    """The network, and whether it has the folder's weights."""
    try:
        from transformers import AutoConfig, AutoModelForImageClassification
    except ImportError as error:
        raise UserError("model=huggingface needs the package transformers: pip install 'marginclip[huggingface]'") from error
    safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    told = f"model.path='{folder}'"
    try:
        with _quiet():
            if not any(folder.glob("*.safetensors")):
                config = AutoConfig.from_pretrained(folder, num_labels=num_classes, **safe)
                return AutoModelForImageClassification.from_config(config, trust_remote_code=False), False
            network, info = AutoModelForImageClassification.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, **safe
            )
    except Exception as error:  # whatever transformers raises for somebody else's folder
        raise UserError(f"{told} holds no image classifier that transformers can make ({first_line(error)})") from error
    missing = sorted(map(str, info["missing_keys"]))
    require(not missing, f"{told} lacks weights, such as '{missing[0] if missing else ''}': it is no trained classifier")
    own = int(network.config.num_labels)
    require(
        own == num_classes,
        f"{told} has {own} classes and the data set {num_classes}: dataset.root needs one sub-folder for each class of the model, named "
        "so that they sort in its order",
    )
    return network, True


def _own_statistics(folder: Path, in_channels: int) -> tuple[list[float] | None, list[float] | None]:
    """Mean and deviation, for images in [0, 1], that do what the folder's own preparation of images does; None where it does nothing."""
    content = _read(folder / "preprocessor_config.json")
    if content is None:
        timm = (_read(folder / "config.json") or {}).get("pretrained_cfg") or {}
        return _each(timm.get("mean"), in_channels), _each(timm.get("std"), in_channels)
    kind = str(content.get("image_processor_type"))
    mobile = kind.startswith("MobileViT")  # what the file leaves out is the processor's default
    require(
        not content.get("do_flip_channel_order", mobile),
        f"model.path='{folder}' wants its channels in the order blue, green, red (do_flip_channel_order), which is not supported",
    )
    normalizes = content.get("do_normalize", not mobile) and content.get("image_mean") is not None
    mean = _each(content["image_mean"] if normalizes else 0.0, in_channels)
    std = _each(content["image_std"] if normalizes else 1.0, in_channels)
    assert mean is not None and std is not None
    if content.get("include_top", kind.startswith("EfficientNet")):  # divides once more
        std = [value**2 for value in std]
    # What enters the normalisation is scale * x - offset for x in [0, 1].
    scale = 255 * content.get("rescale_factor", 1 / 255) if content.get("do_rescale", True) else 255.0
    offset = 1.0 if content.get("do_rescale", True) and content.get("rescale_offset", False) else 0.0
    mean, std = [(value + offset) / scale for value in mean], [value / scale for value in std]
    nothing = all(abs(value) < TINY for value in mean) and all(abs(value - 1) < TINY for value in std)
    return (None, None) if nothing else (mean, std)


def _each(value: Any, in_channels: int) -> list[float] | None:
    """A statistic for each channel, from one number for all of them or from a list."""
    return [float(value)] * in_channels if isinstance(value, (int, float)) else value


def _read(file: Path) -> dict[str, Any] | None:
    """The content of a JSON file; None where it is missing."""
    try:
        content: dict[str, Any] | None = json.loads(file.read_text()) if file.is_file() else None
    except ValueError as error:
        raise UserError(f"'{file}' is damaged ({first_line(error)}): give model.mean and model.std") from error
    return content


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, transformers prints no progress and no advice."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
