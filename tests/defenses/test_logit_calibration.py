"""Calibration of logits as a defense: what may not change, what is recovered, cosine heads, and mistakes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from marginclip.defenses import LogitCalibration
from marginclip.errors import UserError

METHODS = {
    "temperature_scaling": ("shared", False),
    "bias_only": ("none", True),
    "bias_corrected_temperature": ("shared", True),
    "vector_scaling": ("per_class", True),
    "lws": ("per_class", False),
}


def calibrated(model, clean, **settings):
    return LogitCalibration(**settings).fit(model, *clean)


def sharpened(counts, temperature, num=20000):
    """A classifier f / T + ln counts for labels that follow softmax(f): what calibration should undo; and its clean set."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(num, 1, 1, len(counts), generator=generator)
    labels = torch.multinomial((4 * images.flatten(1)).softmax(1), 1, generator=generator)[:, 0]
    model = nn.Sequential(nn.Flatten(), nn.Linear(len(counts), len(counts)))
    with torch.no_grad():
        model[1].weight.copy_(4 / temperature * torch.eye(len(counts)))
        model[1].bias.copy_(torch.tensor(counts).log())
    return model.eval(), (images, labels)


def test_temperature_leaves_every_decision_alone(victim, clean):
    """On images that it has not seen, too: the accuracy is identical, and only the confidence moves."""
    images = torch.rand(2000, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    repaired = calibrated(victim, clean, scale="shared", shift=False).network
    with torch.no_grad():
        assert torch.equal(repaired(images).argmax(1), victim(images).argmax(1))
        assert not torch.allclose(repaired(images), victim(images), rtol=0.05)


def test_a_known_temperature_is_found():
    model, clean = sharpened([1.0] * 4, temperature=0.25)
    found = calibrated(model, clean, scale="shared", shift=False).findings
    assert found["temperature"] == pytest.approx(4.0, rel=0.05)
    assert found["clean_nll"] < found["clean_nll_before"]


@pytest.mark.parametrize("method", ["bias_only", "bias_corrected_temperature", "vector_scaling"])
def test_a_known_shift_is_found(method):
    counts = [1000.0, 100.0, 30.0, 10.0]
    scale, shift = METHODS[method]
    temperature = 1.0 if method == "bias_only" else 0.5
    found = calibrated(*sharpened(counts, temperature), scale=scale, shift=shift).findings
    # 4 T (f / T + ln counts) + shift is f where the scale is T: the shift is -T ln counts, up to a constant
    wanted = [-temperature * math.log(count) for count in counts]
    middle = sum(wanted) / 4 - sum(found["shift"]) / 4
    assert [value + middle for value in found["shift"]] == pytest.approx(wanted, abs=0.2)
    if method == "bias_corrected_temperature":
        assert 1 / found["temperature"] == pytest.approx(0.5, rel=0.05)
    if method == "vector_scaling":
        assert found["scale"] == pytest.approx([0.5] * 4, rel=0.1)


@pytest.mark.parametrize(("scale", "shift"), METHODS.values(), ids=METHODS)
def test_record_says_the_cross_entropy_before_and_after(victim, clean, scale, shift):
    images, labels = clean
    clean = images, torch.cat([(labels[:5] + 1) % 4, labels[5:]])  # of an overconfident model
    defense = calibrated(victim, clean, scale=scale, shift=shift)
    with torch.no_grad():
        for key, network in (("clean_nll_before", victim), ("clean_nll", defense.network)):
            slow = [float(F.cross_entropy(network(image[None]), label[None])) for image, label in zip(*clean, strict=True)]
            assert defense.findings[key] == pytest.approx(sum(slow) / 24, rel=1e-4)
    assert defense.findings["clean_nll"] < defense.findings["clean_nll_before"]
    assert ("shift" in defense.findings) is shift


class ScaledCosine(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))

    def forward(self, features):
        return 30 * F.linear(F.normalize(features), F.normalize(self.weight))


@pytest.mark.parametrize(("scale", "shift"), [METHODS["bias_only"], METHODS["vector_scaling"]])
def test_a_cosine_head_is_no_obstacle(victim, clean, scale, shift):
    model = nn.Sequential(*list(victim)[:-1], ScaledCosine()).eval()
    repaired = calibrated(model, clean, scale=scale, shift=shift).network
    assert F.cross_entropy(repaired(clean[0]), clean[1]) < F.cross_entropy(model(clean[0]), clean[1])


def test_a_model_that_is_worse_than_chance_has_no_temperature(victim, clean):
    with pytest.raises(UserError, match="the best temperature on the clean set is not positive"):
        calibrated(victim, (clean[0], (clean[1] + 1) % 4), scale="shared", shift=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"scale": "per_clas"},
            r"defense\.scale must be none, shared or per_class, got 'per_clas'; did you mean 'per_class'\?",
        ),
        ({"scale": "none", "shift": False}, "leaves nothing to learn"),
        ({"l2": -1.0}, r"defense\.l2 must be positive, got -1"),
    ],
)
def test_settings_that_make_no_sense_name_their_key(settings, message):
    with pytest.raises(UserError, match=message):
        LogitCalibration(**settings)
