"""What the settings of networks in stages must be like."""

from __future__ import annotations

from typing import Any

from marginclip.errors import require


def check_stages(num_classes: int, blocks: Any, width: int) -> None:
    """Raise :class:`UserError` for fewer than two classes, for ``blocks`` that is no list of counts, and for a ``width`` under 1."""
    require(num_classes >= 2, f"a classifier needs at least 2 classes, got {num_classes}")
    counts = [] if isinstance(blocks, str) or not hasattr(blocks, "__iter__") else list(blocks)
    require(
        len(counts) > 0 and all(isinstance(count, int) and count >= 1 for count in counts),
        f"model.blocks must be a list of one or more counts from 1 up, got {counts or blocks}",
    )
    require(width >= 1, f"model.width must be at least 1, got {width}")
