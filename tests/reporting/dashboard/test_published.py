"""The papers' figures beside a run: those of its data set, attack, X2X setting and strength of the attack, and of no other."""

import pytest

from marginclip.reporting.dashboard.published import published_for

BADNET = {"attack": {"name": "badnet"}, "x2x": {"name": "all2one"}, "model": {"name": "resnet18"}}


@pytest.mark.parametrize(
    ("config", "table", "asr"),
    [
        (BADNET | {"dataset": {"name": "cifar10"}}, "Table 1", [99.41, 0.76]),
        (BADNET | {"dataset": {"name": "cifar10_images"}}, "Table 1", [99.41, 0.76]),
        (BADNET | {"dataset": {"name": "tiny_imagenet"}, "model": {"name": "vit_small"}}, "Table 4", [96.95, 1.07]),
        (BADNET | {"dataset": {"name": "cifar10"}, "attack": {"name": "adaptive", "beta": 5}}, "Table 3", None),
    ],
)
def test_a_run_of_the_papers_setting_has_its_figures(make_record, config, table, asr):
    found = published_for(make_record(config=config), "none")
    assert found is not None and found.source == f"arXiv 2308.04617, {table}"
    assert asr is None or found.metrics["ASR"] == asr


@pytest.mark.parametrize(
    "config",
    [
        BADNET | {"dataset": {"name": "mnist_m"}},
        BADNET | {"dataset": {"name": "cifar10"}, "model": {"name": "resnet20"}},
        BADNET | {"dataset": {"name": "cifar10"}, "attack": {"name": "adaptive", "beta": 4}},
        BADNET | {"dataset": {"name": "cifar10"}, "attack": {"name": "sinusoid"}},
    ],
)
def test_a_run_of_another_setting_has_none(make_record, config):
    assert published_for(make_record(config=config), "none") is None


def test_the_second_papers_figures_are_by_ratio(make_record):
    config = {"dataset": {"name": "cifar10"}, "imbalance": {"name": "exponential", "ratio": 100}, "loss": {"name": "mixup"}}
    found = published_for(make_record(config=config | {"attack": None, "x2x": None}), "none")
    assert found is not None and found.metrics == {"ACC": [74.92]}
