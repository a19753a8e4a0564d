"""The repaired model, or the whole of its detection and correction, as one graph that runs without marginclip."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from marginclip.clipping.bounded_network import BoundedNetwork
from marginclip.clipping.one_batch import OneBatchPair, in_one_batch
from marginclip.clipping.scaled_bounds import scale_bounds
from marginclip.clipping.serving import NetworkPair, PairedNetwork, ServedNetwork, paired, same_weights
from marginclip.errors import UserError, require
from marginclip.files import write_whole
from marginclip.maxmargin import MarginDropDetector
from marginclip.maxmargin.detector import corrected
from marginclip.maxmargin.null import p_values
from marginclip.maxmargin.statistic import largest_of, margins
from marginclip.service.artefact import Artefact

FORMATS = ("onnx", "pt2")
PARTS = ("mmdf", "repaired")
TABLE = 512
FEW_IMAGES = 8  # up to so many, model and bounded network are faster as one batch (benchmarks/serving.py)
MOST_IMAGES = 1024  # of a fixed batch: an example of it is made


class DecisionNetwork(nn.Module):
    """MMDF as a network: images (N, C, H, W) in [0, 1] to corrected decisions (N,) int64, flags (N,) bool and p-values (N,).

    What both networks compute up to the first bound that can cut something is computed once, and a batch norm as a part of the layer
    before it. Threshold and null are frozen: flags are those of the detector, but for rounding. The p-value is looked up in a table of
    ``TABLE`` statistics and is that of the next smaller one there, so it is never too small; -1 is a rejected image.

    Args:
        detector: with the model and its repair; both are copied.
        fused: False leaves ReLUs alone, for a runtime that joins them to the layers before.
        images: as many as every call will have, if that is known. Up to ``FEW_IMAGES`` of them go through model and bounded network in
            one batch, which is faster.
    """

    grid: Tensor
    table: Tensor

    def __init__(self, detector: MarginDropDetector, *, fused: bool = True, images: Tensor | None = None) -> None:
        super().__init__()
        self.pair = _pair(detector.model, detector.repaired, fused, images)
        self.rule, self.correction = detector.rule, detector.correction
        self.lines, self.threshold, self.insisting_margin = detector.lines, detector.threshold, detector.insisting_margin
        clean = detector.clean_statistics
        low, high = float(clean.min()), float(clean.max())
        reach = max(high, self.threshold if self.threshold < float("inf") else high) + 4 * max(high - low, 1e-6)
        grid = torch.cat(
            [clean.double().unique(), torch.linspace(float(clean.quantile(0.8)), reach, TABLE, dtype=torch.float64)]
        ).unique()
        values = p_values(grid, clean, null_distribution=detector.null_distribution)
        self.register_buffer("grid", grid.float())
        self.register_buffer("table", torch.cat([values.new_ones(1), values]))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, bounded = (values.float() for values in self.pair(images))
        original, chosen = logits.argmax(1), bounded.argmax(1)
        statistic = largest_of(*margins(logits, bounded), self.lines)
        finite = (logits + bounded).isfinite().all(1)
        flagged = (statistic >= self.threshold) | ~finite
        places = (statistic.unsqueeze(1) >= self.grid.unsqueeze(0)).sum(1)
        values = torch.where(finite, self.table[places], torch.zeros_like(statistic))
        if self.rule == "or_disagree":
            flagged = flagged | (chosen != original)
        standing = chosen if self.rule == "repaired" else original
        instead = corrected(original, bounded, self.correction, self.insisting_margin)
        return torch.where(flagged, instead, standing), flagged, values


def _pair(
    model: nn.Module, repaired: nn.Module, fused: bool, images: Tensor | None
) -> OneBatchPair | PairedNetwork | NetworkPair:
    few = None if images is None or len(images) > FEW_IMAGES else images
    if few is not None and isinstance(repaired, BoundedNetwork) and same_weights(model, repaired):
        pair = in_one_batch(repaired, few)
        if pair is not None:
            return pair
    return paired(model, repaired, fused=fused, folded=True)


def export(
    artefact: Artefact, path: str | Path, *, format: str = "onnx", part: str = "mmdf", batch_size: int | None = None
) -> Path:
    """Write one graph.

    Weights of the graph are those of the model, with batch norms as a part of the layers before them; the bounded network's graph for
    ONNX has bounds as scales of the layers around them, too (:func:`~marginclip.clipping.scaled_bounds.scale_bounds`).
    The program that was written is not run: compare it with the artefact on your own images.

    Args:
        artefact: the repaired model with its detector.
        path: of the file to write.
        format: ``onnx``, which needs the packages onnx and onnxscript, or ``pt2`` (``torch.export``).
        part: ``mmdf``: images to decisions, flags and p-values (:class:`DecisionNetwork`); ``repaired``: images to logits.
        batch_size: of every call, 1 to ``MOST_IMAGES``. None leaves it free; up to ``FEW_IMAGES`` make ``mmdf`` faster.

    Returns:
        The path of the file.

    Raises:
        UserError: for another format or part, a batch size outside its range, and where onnx is not installed.
    """
    require(format in FORMATS, f"format must be one of {', '.join(FORMATS)}, got '{format}'")
    require(part in PARTS, f"part must be one of {', '.join(PARTS)}, got '{part}'")
    require(
        batch_size is None or 1 <= batch_size <= MOST_IMAGES,
        f"batch_size must be 1 to {MOST_IMAGES}, or not given, which leaves it free; got {batch_size}",
    )
    path = Path(path)
    example = torch.rand(batch_size or 2, *artefact.image_shape, generator=torch.Generator().manual_seed(0))
    example = example.to(next(artefact.model.parameters(), example).dtype)
    fused = format != "onnx"  # onnxruntime joins a ReLU to the layer before it, but not a clip with a number for each channel
    network = _to_be_written(artefact, part, fused, None if batch_size is None else example)
    network = network.cpu().eval().requires_grad_(False).to(memory_format=torch.contiguous_format)
    shapes = ({0: torch.export.Dim("batch")},) if batch_size is None else None
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(network, (example,), dynamic_shapes=shapes)
            write_whole(
                path, lambda partial: _write_pt2(program, partial) if format == "pt2" else _write_onnx(program, partial, part)
            )
    except ImportError as error:
        raise UserError("format=onnx needs the packages onnx and onnxscript: pip install 'marginclip[onnx]'") from error
    return path


def _to_be_written(artefact: Artefact, part: str, fused: bool, images: Tensor | None) -> nn.Module:
    if part == "mmdf":
        return DecisionNetwork(artefact.detector, fused=fused, images=images)
    served = ServedNetwork(artefact.network, fused=fused, folded=True)
    if not fused:
        scale_bounds(served.network)
    return served


def _write_pt2(program: torch.export.ExportedProgram, path: Path) -> None:
    with path.open("wb") as file:
        torch.export.save(program, file)


def _write_onnx(program: torch.export.ExportedProgram, path: Path, part: str) -> None:
    names = ["decisions", "flagged", "p_values"] if part == "mmdf" else ["logits"]
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        torch.onnx.export(
            program, (), str(path), input_names=["images"], output_names=names, dynamo=True, external_data=False, verbose=False
        )  # fmt: skip
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
