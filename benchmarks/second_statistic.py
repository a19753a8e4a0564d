"""Other statistics to detect triggers by than the margin that bounds take away, on one victim, at the same promised false-alarm rate.

    python benchmarks/second_statistic.py attack=wanet training.epochs=50
    python benchmarks/second_statistic.py attack=sinusoid

Each is a drop of the margin of the model's decision: to the bounded network (MMDF), to the network that was fine-tuned below its bounds
(``defense=mmac_finetune``), or to the model's own margin on the image with Gaussian noise. Two are combined by twice the smaller
p-value. Nulls come from networks that were learned without the image. The repaired network decides what is flagged, without the class that
the model chose; the rest keeps the model's decision. The victim is found in the store or trained; arguments are options of
``marginclip defend``.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from marginclip.defenses.cross_fitting import stratified_folds
from marginclip.defenses.weights.mmac_finetune import MMACFineTune
from marginclip.experiment.command import plain
from marginclip.experiment.process import prepare_process
from marginclip.experiment.setup import VictimSetup, build_setup
from marginclip.experiment.spec import run_spec
from marginclip.experiment.stages import load_model
from marginclip.experiment.trainers import build_trainer
from marginclip.maxmargin.detector import corrected
from marginclip.maxmargin.null import p_values
from marginclip.maxmargin.statistic import margin_drop
from marginclip.networks.logits import batched_logits
from marginclip.silence import SILENT, silence_lightning

CONF = Path(__file__).parents[1] / "conf"
THETA, NOISE, FOLDS, IMAGES = 0.005, 12 / 255, 2, 1500
SINGLE = ("bounded", "fine-tuned", "noise")
PAIRS = (("bounded", "fine-tuned"), ("bounded", "noise"), ("fine-tuned", "noise"))


def noisy(images: Tensor) -> Tensor:
    """The images with Gaussian noise of deviation ``NOISE``, the same for the same number of images."""
    drawn = torch.randn(images.shape, generator=torch.Generator().manual_seed(7))
    return (images + NOISE * drawn.to(images)).clamp(0, 1)


def networks_of(defense: MMACFineTune, fitted: nn.Module) -> dict[str, nn.Module]:
    """The two networks of one fit, as copies: the next fit would change the bounded one."""
    assert defense.bounded is not None
    return {"bounded": copy.deepcopy(defense.bounded.network), "fine-tuned": copy.deepcopy(fitted)}


def logits_of(model: nn.Module, networks: dict[str, nn.Module], images: Tensor) -> dict[str, Tensor]:
    """Logits (N, K) of the model as given, of the networks, and of the model on noisy images."""
    found = {name: batched_logits(network, images).cpu() for name, network in networks.items()}
    return found | {"given": batched_logits(model, images).cpu(), "noise": batched_logits(model, noisy(images)).cpu()}


def out_of_fold(
    defense: MMACFineTune, model: nn.Module, images: Tensor, labels: Tensor, make_trainer: Any
) -> dict[str, Tensor]:
    """The same on the clean set, each image by networks that never saw it."""
    fold = stratified_folds(labels.cpu(), FOLDS, defense.seed)
    whole: dict[str, Tensor] = {}
    for number in range(FOLDS):
        out = fold == number
        fitted = defense.fit(model, images[~out], labels[~out], make_trainer=make_trainer)
        for name, part in logits_of(model, networks_of(defense, fitted.network), images[out]).items():
            whole.setdefault(name, torch.zeros(len(images), part.shape[1]))[out] = part
    return whole


def evaluated(setup: VictimSetup, index: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Clean (0) or triggered (1) evaluation images, and their labels or sources and targets."""
    loader = setup.data.eval_dataloaders(limit=IMAGES)[index]
    batches = [setup.data.on_after_batch_transfer(batch, index) for batch in loader]
    columns = [name for name in batches[0] if name in ("labels", "sources", "targets")]
    return torch.cat([batch["images"] for batch in batches]), {
        name: torch.cat([batch[name] for batch in batches]) for name in columns
    }


def p_value(names: tuple[str, ...], logits: dict[str, Tensor], clean: dict[str, Tensor]) -> Tensor:
    """P-values (N,) of one statistic, or of several by the number of them times the smallest."""
    values = [p_values(margin_drop(logits["given"], logits[name]), margin_drop(clean["given"], clean[name])) for name in names]
    return len(names) * torch.stack(values).amin(0)


def decided(names: tuple[str, ...], logits: dict[str, Tensor], clean: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Which images are flagged, and the decisions (N,)."""
    flagged, own = p_value(names, logits, clean) < THETA, logits["given"].argmax(1)
    repaired = logits["fine-tuned" if "fine-tuned" in names else "bounded"]
    return flagged, torch.where(flagged, corrected(own, repaired, "exclude", 0.0), own)


def main() -> None:
    silence_lightning()
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    options = ["defense=mmac_finetune", "logger=none", "trainer.enable_progress_bar=false", *sys.argv[1:]]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        spec = run_spec(plain(compose("defend", options)))
    prepare_process(spec.trainer.threads)
    assert spec.defense is not None
    defense = spec.defense.choice.make(seed=spec.seed)
    setup = build_setup(spec, clean_per_class=defense.clean_per_class)
    load_model(spec, setup)
    if setup.attack is None:
        sys.exit("error: attack=none has no triggered images")
    images, labels = setup.data.clean_set()

    def make_trainer(epochs: int) -> Any:
        return build_trainer(spec.trainer, max_epochs=epochs, **SILENT)

    networks = networks_of(defense, defense.fit(setup.model, images, labels, make_trainer=make_trainer).network)
    (clean_images, truth), (triggered_images, sides) = evaluated(setup, 0), evaluated(setup, 1)
    tested, triggered = (logits_of(setup.model, networks, each) for each in (clean_images, triggered_images))
    null = out_of_fold(defense, setup.model, images, labels, make_trainer)
    print("| statistic | FPR % | ACC % | TPR % | ASR % |\n|---|---|---|---|---|")
    for names in (*((name,) for name in SINGLE), *PAIRS):
        alarms, decisions = decided(names, tested, null)
        found, outcomes = decided(names, triggered, null)
        shares = [alarms, decisions == truth["labels"], found, outcomes == sides["targets"]]
        print(f"| {' + '.join(names)} |" + "|".join(f" {100 * float(share.float().mean()):.1f} " for share in shares) + "|")


if __name__ == "__main__":
    main()
