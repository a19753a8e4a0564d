"""Shared settings and tiny inputs: one thread, generated images, a small network with every batch-norm statistic drawn."""

import os

if "MARGINCLIP_TEST_THREADS" not in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch: one thread here and in programs that tests start

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def _seed():
    """What a test draws without a generator is the same in every order of tests."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def program():
    """``program(["-m", "marginclip", ...], cwd=...)``: ``subprocess.run`` of a Python that has imported everything (``programs.py``)."""
    spec = importlib.util.spec_from_file_location("programs", Path(__file__).with_name("programs.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    programs = module.Programs()
    yield programs.run
    programs.close()


@pytest.fixture
def images():
    """Twelve generated images (12, 3, 8, 8) in [0, 1]."""
    return torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def settle():
    """Makes a network a trained-like one: drawn weights by a fixed seed, drawn batch-norm statistics, evaluation mode."""

    def settle(model: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(1, parameter[0].numel()) ** 0.5)
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.running_mean.copy_(torch.randn(module.num_features, generator=generator) / 5)
                    module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
        return model.eval()

    return settle


@pytest.fixture
def net(settle):
    """A small convolutional network: 3 x 8 x 8 images, 4 classes, batch norm, 5 + 6 feature maps behind in-place ReLUs."""
    return settle(
        nn.Sequential(
            nn.Conv2d(3, 5, 3, padding=1, bias=False),
            nn.BatchNorm2d(5),
            nn.ReLU(inplace=True),
            nn.Conv2d(5, 6, 3, stride=2),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(24, 4),
        )
    )
