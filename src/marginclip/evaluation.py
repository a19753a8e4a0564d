"""Evaluation of one model, its repaired versions and their detectors on clean and triggered images, in one pass."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics.classification import BinaryAUROC

from marginclip.errors import UserError
from marginclip.maxmargin.detector import MarginDropDetector
from marginclip.metrics import (
    AttackSuccessRate,
    CalibrationScores,
    CleanAccuracy,
    DecisionScores,
    FlaggedRate,
    PoisonedAccuracy,
)

CLEAN, TRIGGERED, CROSSED = 0, 1, 2
MAX_CONFUSION = 256  # classes up to which a confusion matrix is kept: more would be megabytes for a picture nobody can read


# Column of a batch -> the outcome that a decision of that class is.
OUTCOMES = {"labels": "clean_correct", "targets": "triggered_success", "sources": "triggered_restored"}


class Evaluation(L.LightningModule):
    """Runs every network once over each test batch and scores everything that decides from its logits.

    ``networks`` maps a name to a network (``none`` is the model as given); ``detectors`` maps a name to a detector and the
    name of the repaired network that it compares ``none`` with. The first test loader is clean (``labels``), the second, if
    any, triggered (``sources``, ``targets``), the third, if any, with the triggers of other images (``sources``). After
    ``Trainer.test``, :meth:`results` gives, for each name, ``acc``, under an attack ``asr`` and ``pacc``, and with cross triggers
    ``cross_acc``, as fractions; for detectors ``fpr`` and under an attack ``tpr`` and ``auroc`` too.

    With ``num_classes`` the clean images also give ``macro_f1`` and ``worst_class``, with ``training_counts`` (K,) ``many``,
    ``medium`` and ``few``, and for networks ``ece``, ``mce``, ``nll`` and ``brier`` (see :mod:`marginclip.metrics.classification`).

    Raises :class:`UserError` when a network gives logits that are not finite.
    """

    def __init__(
        self,
        networks: dict[str, nn.Module],
        detectors: dict[str, tuple[str, MarginDropDetector]] | None = None,
        *,
        num_classes: int | None = None,
        training_counts: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(networks)
        self.pairs = {name: repaired for name, (repaired, _) in (detectors or {}).items()}
        self.detectors = nn.ModuleDict({name: detector for name, (_, detector) in (detectors or {}).items()})
        names = [*self.networks, *self.detectors]
        self.accuracy = nn.ModuleDict({name: CleanAccuracy() for name in names})
        self.success = nn.ModuleDict({name: AttackSuccessRate() for name in names})
        self.poisoned_accuracy = nn.ModuleDict({name: PoisonedAccuracy() for name in names})
        self.cross_accuracy = nn.ModuleDict({name: PoisonedAccuracy() for name in names})
        self.flagged = nn.ModuleDict(
            {f"{name}_{kind}": FlaggedRate() for name in self.detectors for kind in ("clean", "triggered")}
        )
        self.auroc = nn.ModuleDict({name: BinaryAUROC() for name in self.detectors})
        self.statistics: dict[str, dict[str, list[Tensor]]] = {}
        self.flags: dict[str, dict[str, list[Tensor]]] = {}
        self.codes: dict[str, dict[str, list[Tensor]]] = {}
        self.training_counts = training_counts
        self.decided, self.calibrated = nn.ModuleDict(), nn.ModuleDict()
        if num_classes is not None:
            self.decided.update({name: DecisionScores(num_classes) for name in names})
            self.calibrated.update({name: CalibrationScores(num_classes) for name in self.networks})

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        logits = {name: network(batch["images"]).float() for name, network in self.networks.items()}
        for name, values in logits.items():
            if not torch.isfinite(values).all():
                raise UserError(f"the network '{name}' gives NaN or infinite logits; it cannot be repaired or evaluated")
            self._score(name, values.argmax(1), batch, dataloader_idx)
            if dataloader_idx == CLEAN and name in self.calibrated:
                self.calibrated[name].update(values, batch["labels"])  # type: ignore[operator]
        for name, detector in self.detectors.items():
            assert isinstance(detector, MarginDropDetector)
            detection = detector.decide(logits["none"], logits[self.pairs[name]])
            self._score(name, detection.decisions, batch, dataloader_idx)
            if dataloader_idx == CROSSED:
                continue
            kind = "clean" if dataloader_idx == CLEAN else "triggered"
            self.flagged[f"{name}_{kind}"].update(detection.flagged)  # type: ignore[operator]
            kinds = torch.full_like(detection.flagged, dataloader_idx, dtype=torch.long)
            self.auroc[name].update(_to_unit(detection.statistic), kinds)  # type: ignore[operator]
            self.statistics.setdefault(name, {}).setdefault(kind, []).append(detection.statistic.cpu())
            self.flags.setdefault(name, {}).setdefault(kind, []).append(detection.flagged.cpu())
            for outcome, codes in _outcome_codes(
                detector.alternatives(logits["none"], logits[self.pairs[name]]), batch
            ).items():
                self.codes.setdefault(name, {}).setdefault(outcome, []).append(codes.cpu())

    def _score(self, name: str, decisions: Tensor, batch: dict[str, Tensor], dataloader_idx: int) -> None:
        if dataloader_idx == CLEAN:
            self.accuracy[name].update(decisions, batch["labels"])  # type: ignore[operator]
            if name in self.decided:
                self.decided[name].update(decisions, batch["labels"])  # type: ignore[operator]
            return
        if dataloader_idx == CROSSED:
            self.cross_accuracy[name].update(decisions, batch["sources"])  # type: ignore[operator]
            return
        self.success[name].update(decisions, batch["targets"])  # type: ignore[operator]
        self.poisoned_accuracy[name].update(decisions, batch["sources"])  # type: ignore[operator]

    def results(self) -> dict[str, dict[str, float]]:
        """Metrics by name, as fractions; those that need triggered images are missing when there were none."""
        results: dict[str, dict[str, float]] = {}
        for name in [*self.networks, *self.detectors]:
            row = {"acc": _value(self.accuracy[name])}
            attacked = int(self.success[name].count) > 0  # type: ignore[arg-type]
            if attacked:
                row |= {"asr": _value(self.success[name]), "pacc": _value(self.poisoned_accuracy[name])}
            if int(self.cross_accuracy[name].count) > 0:  # type: ignore[arg-type]
                row["cross_acc"] = _value(self.cross_accuracy[name])
            if name in self.detectors:
                row["fpr"] = _value(self.flagged[f"{name}_clean"])
                if attacked:
                    row |= {"tpr": _value(self.flagged[f"{name}_triggered"]), "auroc": _value(self.auroc[name])}
            if name in self.decided:
                row |= self.decided[name].scores(self.training_counts)  # type: ignore[operator]
            if name in self.calibrated:
                row |= self.calibrated[name].scores()  # type: ignore[operator]
            results[name] = row
        return results

    def per_class(self) -> dict[str, list[float | None]]:
        """Accuracy of every class, as fractions, by name; None for a class without test images."""
        return {
            name: [None if value != value else round(value, 6) for value in scores.per_class().tolist()]  # type: ignore[operator]
            for name, scores in self.decided.items()
        }

    def class_arrays(self) -> dict[str, Tensor]:
        """``confusion/<name>`` (K, K) int32, rows the true class, and for networks ``reliability/<name>`` (15, 3).

        The confusion matrix of a detector has a last column more, of the images that it rejected, where there are any. It is left
        out for more than ``MAX_CONFUSION`` classes. A reliability bin is the number of images, mean confidence and accuracy.
        """
        arrays = {}
        for name, scores in self.decided.items():
            confusion: Tensor = scores.confusion()  # type: ignore[operator]
            if len(confusion) <= MAX_CONFUSION:
                kept = confusion if confusion[:, -1].any() else confusion[:, :-1]
                arrays[f"confusion/{name}"] = kept.int().cpu()
        for name, scores in self.calibrated.items():
            assert isinstance(scores, CalibrationScores)
            arrays[f"reliability/{name}"] = scores.reliability.compute().cpu()
        return arrays

    def scores(self, detector: str) -> dict[str, Tensor]:
        """The detection statistics of all evaluated images, ``clean`` (N,) and, where there are such, ``triggered`` (M,)."""
        return {kind: torch.cat(chunks).float() for kind, chunks in self.statistics[detector].items()}

    def flagged_images(self, detector: str) -> dict[str, Tensor]:
        """Which evaluated images were flagged, as :meth:`scores`, bool."""
        return {kind: torch.cat(chunks) for kind, chunks in self.flags[detector].items()}

    def outcomes(self, detector: str) -> dict[str, Tensor]:
        """What would come of each image at any threshold, uint8, in the order of :meth:`scores`.

        ``clean_correct`` (N,), and under an attack ``triggered_success`` and ``triggered_restored`` (M,): 1 where it holds for an
        image whose statistic is below the threshold, plus 2 where it holds for one at or above it, plus 4 for an image that is
        flagged at any threshold.
        """
        return {outcome: torch.cat(chunks) for outcome, chunks in self.codes[detector].items()}

    def configure_optimizers(self) -> Any:
        return None


def _outcome_codes(alternatives: tuple[Tensor, Tensor, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The codes of :meth:`Evaluation.outcomes` of a batch: whether a decision below or above the threshold is that of a column."""
    below, above, always = alternatives
    return {
        outcome: (below == batch[column]).byte() + 2 * (above == batch[column]).byte() + 4 * always.byte()
        for column, outcome in OUTCOMES.items()
        if column in batch
    }


def _to_unit(statistic: Tensor) -> Tensor:
    """Scores in [0, 1] in the same order: outside it the metric takes a float32 sigmoid, which ties all large statistics."""
    statistic = statistic.double()
    return 0.5 + 0.5 * statistic / (1 + statistic.abs())


def _value(metric: nn.Module) -> float:
    return float(metric.compute())  # type: ignore[operator]
