"""What attackers who control training can use: training data, surrogates, other attacks' victims, the defender's method."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor, nn

from marginclip.attacks import Attack, Surrogate
from marginclip.data import Augment, ImageData
from marginclip.data.batches import Subset, load_all
from marginclip.data.clean import automatic_sizes, split_clean
from marginclip.defenses import fit_defense
from marginclip.evaluation import Evaluation
from marginclip.experiment.building import VictimSetup, build_model, build_setup, instantiate, runs_dir
from marginclip.experiment.fitting import fit_resumably, victim_store
from marginclip.experiment.recipe import training_recipe
from marginclip.experiment.trainers import build_trainer, device_of
from marginclip.precision import precision_for

log = logging.getLogger(__name__)


class AttackerAccess:
    """The :class:`~marginclip.attacks.base.TrainingAccess` of the victim that ``config`` asks for, in its ``setup``."""

    def __init__(self, config: DictConfig, setup: VictimSetup, obtain: Callable[[DictConfig, VictimSetup], Any]) -> None:
        self.config, self.setup, self.obtain = config, setup, obtain
        self.precision = precision_for(config.trainer.precision, accelerator=config.trainer.accelerator)

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
        """The surrogate of these settings, from the store of ``config.runs_dir`` or trained now."""
        config = OmegaConf.merge(self.config, {"seed": settings.seed, "training": {"epochs": settings.epochs}})
        assert isinstance(config, DictConfig)
        recipe = training_recipe(config) | {"surrogate": asdict(settings)}
        name = f"{config.dataset.name}-{config.model.get('name', 'model')}-surrogate"
        found = victim_store(config).find(name, recipe)
        model = build_model(config, len(self.setup.classes), self.setup.splits.image_shape)
        with found.lock():
            if found.record is None:
                log.info("training the robust surrogate %s", found.folder.name)
                data = self._clean_data(settings.seed)
                training = instantiate(
                    {key: config.training[key] for key in ("optimizer", "scheduler", "label_smoothing")}
                    | {"_target_": "marginclip.training.AdversarialTraining"},
                    model,
                    eps=settings.eps,
                    seed=settings.seed,
                    cuda_graphs=config.trainer.cuda_graphs,
                    key="training",
                )
                fit_resumably(config, found, training, data, {"max_epochs": settings.epochs})
                evaluation = Evaluation({"none": model})
                quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
                build_trainer(config, found.folder, **quiet).test(evaluation, data, verbose=False)
                found.save(model, None, {"recipe": recipe, "metrics": evaluation.results()["none"]})
                found.forget_checkpoint()
        found.restore(model, None)
        model.to(device_of(config, found.folder))
        return _Autocast(model.eval().requires_grad_(False), bf16=str(self.precision).startswith("bf16"))

    def _clean_data(self, seed: int) -> ImageData:
        augment = Augment(**self.config.dataset.augment)
        return ImageData(
            self.setup.splits, augment=augment, batch_size=self.config.training.batch_size, clean_per_class=1, seed=seed
        )

    def load_base_victim(self, base: Attack) -> None:
        """Give the weights of the victim of ``attack.base`` to the model, and its trigger to ``base``."""
        config = self.config.copy()
        with open_dict(config):
            config.attack = {key: value for key, value in self.config.attack.base.items() if key != "_partial_"}
        setup = build_setup(config)
        self.obtain(config, setup)
        self.setup.model.load_state_dict(setup.model.state_dict())
        assert setup.attack is not None
        base.load_state_dict(setup.attack.state_dict())

    def bound_learner(self, defender: Callable[..., Any], clean_per_class: int) -> Callable[[nn.Module], dict[str, Tensor]]:
        """What learns bounds as the defender does, on the defender's own clean set of that size."""
        held_out, config = self.setup.splits.held_out, self.config
        count, _ = automatic_sizes(held_out.labels, clean_per_class)
        index, _ = split_clean(held_out.labels, held_out.classes, per_class=count, seed=config.seed, order=config.clean_order)
        images, labels = load_all(Subset(held_out.images, index)), held_out.labels[index]

        def learn(model: nn.Module) -> dict[str, Tensor]:
            quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}

            def trainer(epochs: int) -> Any:
                return build_trainer(config, runs_dir(config), max_epochs=epochs, **quiet)

            learned = fit_defense(defender(seed=config.seed), model, images, labels, make_trainer=trainer)
            state: dict[str, Tensor] = learned.bounds_state()  # type: ignore[operator]
            return state

        return learn


class _Autocast(nn.Module):
    """A network that computes in bf16 where the run does."""

    def __init__(self, network: nn.Module, *, bf16: bool) -> None:
        super().__init__()
        self.network, self.bf16 = network.to(memory_format=torch.channels_last), bf16  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            logits: Tensor = self.network(images)
        return logits
