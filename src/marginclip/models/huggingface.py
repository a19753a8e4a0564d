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
        mean: what is subtracted from each channel, (in_channels,) for images in [0, 1]. ``auto``: ``image_mean`` of
            ``preprocessor_config.json``, where there is one. None: nothing.
        std: what each channel is divided by then, (in_channels,) and positive; given together with ``mean``. ``auto``:
            ``image_std`` of the same file. None: nothing.

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
    found = {"image_mean": mean, "image_std": std}
    given: dict[str, Any] = {
        name: _statistic(folder, name, in_channels) if value == "auto" else value for name, value in found.items()
    }
    model = NormalizedNetwork(make_normalize(in_channels, given["image_mean"], given["image_std"]), network.float(), output)
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


def _statistic(folder: Path, name: str, in_channels: int) -> list[float] | None:
    """``image_mean`` or ``image_std`` of ``preprocessor_config.json``; None where it does not normalise."""
    file = folder / "preprocessor_config.json"
    try:
        content = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise UserError(f"'{file}' is damaged ({first_line(error)}): give model.mean and model.std") from error
    value = content.get(name) if content.get("do_normalize", True) else None
    return [float(value)] * in_channels if isinstance(value, (int, float)) else value


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
