"""Where the bounds stand against the activations, stage by stage."""

from __future__ import annotations

from typing import Any

import numpy as np

from marginclip.reporting.style import Arrays

SERIES = {"clean": "clean_max", "triggered": "triggered_max", "bound": "upper"}


def stages(arrays: Arrays) -> list[dict[str, Any]]:
    """An entry for each activation call, in the order of execution: medians over its feature maps, in activation units.

    ``clean`` and ``triggered`` are the largest activations on images of that kind, ``bound`` the learned upper bound; None where the
    run has none. ``clips_clean`` and ``clips_triggered`` are the shares, in [0, 1], of feature maps whose largest activation is above
    the bound. ``lower`` is the median lower bound of an activation that can be negative.
    """
    names = sorted({name[len("activations/") :].rpartition("/")[0] for name in arrays if name.startswith("activations/")})
    return [
        _stage(name, {key: arrays.get(f"activations/{name}/{key}") for key in (*SERIES.values(), "lower")}) for name in names
    ]


def _stage(name: str, values: dict[str, np.ndarray | None]) -> dict[str, Any]:
    bound = values["upper"]
    channels = next((len(each) for each in values.values() if each is not None), 0)
    stage: dict[str, Any] = {"name": name, "channels": channels, "lower": _median(values["lower"])}
    stage |= {text: _median(values[key]) for text, key in SERIES.items()}
    for kind in ("clean", "triggered"):
        largest = values[f"{kind}_max"]
        stage[f"clips_{kind}"] = None if largest is None or bound is None else float(np.mean(largest > bound))
    return stage


def _median(values: np.ndarray | None) -> float | None:
    if values is None or not len(values) or not np.isfinite(np.median(values)):
        return None
    return float(f"{np.median(values):.4g}")
