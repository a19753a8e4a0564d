"""The post-hoc methods on a model of imbalanced training data, with 50 clean images a class: what they gain on new images."""

import pytest
import torch

from marginclip.defenses import FineTune, LastLayer, LogitAdjustment, LogitCalibration

COUNTS = [200, 60, 20, 6]  # of the fixture
# The least gain that each must bring in mean accuracy over the classes, in points; the model has about 77 %.
METHODS = {
    "logit_adjustment estimated": (lambda: LogitAdjustment(), 2),
    "logit_adjustment counts": (lambda: LogitAdjustment(class_counts=COUNTS), 5),
    "logit_adjustment auto": (lambda: LogitAdjustment(class_counts=COUNTS, tau="auto"), 5),
    "bias_only": (lambda: LogitCalibration(), 5),
    "bias_corrected_temperature": (lambda: LogitCalibration(scale="shared"), 5),
    "vector_scaling": (lambda: LogitCalibration(scale="per_class"), 5),
    "lws": (lambda: LogitCalibration(scale="per_class", shift=False), 3),
    "last_layer": (lambda: LastLayer(), 5),
    "last_layer restarted": (lambda: LastLayer(restart=True, learning_rate=0.1), 5),
    "finetune": (lambda: FineTune(batch_norm="frozen"), 5),
}


@torch.no_grad()
def recalls(model, images, labels):
    decisions = model(images).argmax(1)
    return [float((decisions[labels == label] == label).float().mean()) for label in range(4)]


@pytest.mark.parametrize("method", METHODS)
def test_rare_classes_gain_and_the_mean_rises(imbalanced, fit, method):
    model, clean, new = imbalanced
    make, least = METHODS[method]
    before, after = recalls(model, *new), recalls(fit(make(), model, clean), *new)
    assert sum(after) / 4 > sum(before) / 4 + least / 100
    assert after[3] > before[3]


def test_temperature_moves_no_recall_and_no_error(imbalanced, fit):
    model, clean, new = imbalanced
    repaired = fit(LogitCalibration(scale="shared", shift=False), model, clean)
    assert recalls(repaired, *new) == recalls(model, *new)
    with torch.no_grad():
        before, after = (torch.nn.functional.cross_entropy(network(new[0]), new[1]) for network in (model, repaired))
    assert after < before


def test_a_balanced_model_is_not_harmed_by_the_estimated_prior(victim, clean, fit):
    repaired = fit(LogitAdjustment(), victim, clean)
    assert torch.equal(repaired(clean[0]).argmax(1), victim(clean[0]).argmax(1))
