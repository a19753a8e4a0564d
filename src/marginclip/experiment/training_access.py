"""What attackers who control training can use: training data, surrogates, other attacks' victims, the defender's method."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from marginclip.attacks import Attack, Surrogate
from marginclip.clipping import BoundedNetwork
from marginclip.data import Augment, ImageData
from marginclip.data.batches import Subset, load_all
from marginclip.data.clean import automatic_sizes, split_clean
from marginclip.defenses import Defense
from marginclip.evaluation import Evaluation
from marginclip.experiment.fitting import fit_resumably
from marginclip.experiment.groups import Choice
from marginclip.experiment.objects import make
from marginclip.experiment.recipe import find_surrogate
from marginclip.experiment.setup import VictimSetup, build_model, build_setup
from marginclip.experiment.spec import RunSpec
from marginclip.experiment.store import Victim
from marginclip.experiment.trainers import build_trainer, device_of
from marginclip.networks.layout import channels_last
from marginclip.precision import precision_for
from marginclip.silence import SILENT

log = logging.getLogger(__name__)


class AttackerAccess:
    """The :class:`~marginclip.attacks.base.TrainingAccess` of the victim that ``spec`` asks for, trained from ``setup``."""

    def __init__(self, spec: RunSpec, setup: VictimSetup, obtain: Callable[[RunSpec, VictimSetup], Any]) -> None:
        self.spec, self.setup, self.obtain = spec, setup, obtain

    def training_labels(self) -> Tensor:
        """True labels (N,) of the training images."""
        return self.setup.splits.train.labels

    def training_images(self, index: Tensor) -> Tensor:
        """Stored training images (B, C, H, W) in [0, 1] by index (B,)."""
        return load_all(Subset(self.setup.splits.train.images, index))

    def replace_training_images(self, index: Tensor, images: Tensor) -> None:
        """Train on ``images`` (B, C, H, W) in [0, 1], rounded to 8 bits, in the place of the stored ones."""
        self.setup.data.replace_training_images(index, (images.cpu() * 255).round().to(torch.uint8))

    def robust_surrogate(self, settings: Surrogate) -> nn.Module:
        """The surrogate of these settings, from the store of ``runs_dir`` or trained now."""
        spec = replace(self.spec, seed=settings.seed, training=replace(self.spec.training.from_scratch, epochs=settings.epochs))
        found = find_surrogate(spec, asdict(settings))
        model = build_model(spec, len(self.setup.classes), self.setup.splits.image_shape)
        if not found.finished:
            with found.lock():
                if found.record is None:
                    self._train_surrogate(spec, settings, model, found)
                found.forget_checkpoint()
        found.restore(model, None)
        model.to(device_of(spec.trainer))
        precision = precision_for(spec.trainer.precision, accelerator=spec.trainer.accelerator)
        return _Autocast(model.eval().requires_grad_(False), bf16=precision.startswith("bf16"))

    def _train_surrogate(self, spec: RunSpec, settings: Surrogate, model: nn.Module, found: Victim) -> None:
        log.info("training the robust surrogate %s", found.folder.name)
        data = ImageData(
            self.setup.splits, augment=Augment(**spec.dataset.augment), batch_size=spec.training.batch_size, clean_per_class=1,
            seed=settings.seed,
        )  # fmt: skip
        made = {
            "_target_": "marginclip.training.AdversarialTraining", "optimizer": spec.training.optimizer,
            "scheduler": spec.training.scheduler, "label_smoothing": spec.training.label_smoothing,
        }  # fmt: skip
        training = make(made, model, eps=settings.eps, seed=settings.seed, key="training")
        fit_resumably(spec, found, training, data, {"max_epochs": settings.epochs})
        evaluation = Evaluation({"none": model})
        build_trainer(spec.trainer, found.folder, **SILENT).test(evaluation, data, verbose=False)
        found.save(model, None, {"surrogate": asdict(settings), "metrics": evaluation.results()["none"]})

    def load_base_victim(self, base: Attack) -> None:
        """Give the weights of the victim of ``attack.base`` to the model, and its trigger to ``base``."""
        assert self.spec.attack is not None
        content = {key: value for key, value in self.spec.attack.settings["base"].items() if key != "_partial_"}
        spec = replace(self.spec, attack=Choice.of("attack", content))
        setup = build_setup(spec)
        self.obtain(spec, setup)
        self.setup.model.load_state_dict(setup.model.state_dict())
        assert setup.attack is not None
        base.load_state_dict(setup.attack.state_dict())

    def bound_learner(
        self, defender: Callable[..., Defense], clean_per_class: int, images: str
    ) -> Callable[[nn.Module], dict[str, Tensor]]:
        """What learns bounds as the defender does, on the defender's own clean set of that size, or on as many ``training`` images."""
        splits, spec = self.setup.splits, self.spec
        source = splits.held_out if images == "defender" else splits.train
        count, _ = automatic_sizes(source.labels, clean_per_class)
        index, _ = split_clean(source.labels, source.classes, per_class=count, seed=spec.seed, order=spec.clean_order)
        chosen, labels = load_all(Subset(source.images, index)), source.labels[index]

        def learn(model: nn.Module) -> dict[str, Tensor]:
            result = defender(seed=spec.seed).fit(
                model, chosen, labels, make_trainer=lambda epochs: build_trainer(spec.trainer, max_epochs=epochs, **SILENT)
            )
            assert isinstance(result.network, BoundedNetwork)
            return result.network.bounds_state()

        return learn


class _Autocast(nn.Module):
    """A network that computes in bf16 where the run does."""

    def __init__(self, network: nn.Module, *, bf16: bool) -> None:
        super().__init__()
        self.network, self.bf16 = channels_last(network), bf16

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            logits: Tensor = self.network(images)
        return logits
