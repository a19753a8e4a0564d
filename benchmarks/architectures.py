"""Which public architectures can be bounded: for each, which tracer took it, how many activation calls are bounded, and what was checked.

    python benchmarks/architectures.py [--only vit]

Weights are random, statistics of batch norms those of eight images. Checked for each: infinite bounds leave the logits of two images as
they are, bit for bit; another number of images goes through; with bounds at half of what is reached, a loss has gradients at bounds and
at the images. Needs timm and transformers.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from marginclip.clipping import BoundedNetwork
from marginclip.errors import UserError, first_line
from marginclip.models.imported import NormalizedNetwork

TORCHVISION = (
    "alexnet", "vgg11_bn", "squeezenet1_1", "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121", "googlenet",
    "inception_v3", "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5", "shufflenet_v2_x0_5", "regnet_y_400mf", "efficientnet_b0",
    "efficientnet_v2_s", "convnext_tiny", "vit_b_16", "swin_t", "maxvit_t",
)  # fmt: skip
TIMM = (
    "resnet26", "seresnet50", "resnetv2_50", "efficientnet_b0", "mobilenetv3_small_100", "regnety_002",
    "convnext_atto", "vit_tiny_patch16_224", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s32_224",
    "poolformer_s12", "ghostnet_100", "dla34", "repvgg_a0", "nfnet_l0", "levit_128s", "mobilevit_xxs",
)  # fmt: skip
FIXED = (
    "vit_b_16",
    "maxvit_t",
    "vit_tiny",
    "deit_tiny",
    "swin_tiny",
    "mixer",
    "levit",
    "ViT",
    "Beit",
)  # these take 224 px alone
HUGGINGFACE = ("ResNet", "ViT", "ConvNext", "MobileNetV2", "RegNet", "Swin", "Beit", "PoolFormer")


def networks() -> dict[str, tuple[Callable[[], nn.Module], int]]:
    """How each is made, by name, and the side of its images."""
    models = importlib.import_module("torchvision.models")
    timm = importlib.import_module("timm")
    found: dict[str, tuple[Callable[[], nn.Module], int]] = {}
    for name in TORCHVISION:
        extra: dict[str, Any] = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
        found[f"torchvision {name}"] = (
            partial(models.get_model, name, num_classes=10, **extra),
            299 if "inception" in name else 224,
        )
    for name in TIMM:
        found[f"timm {name}"] = (partial(timm.create_model, name, num_classes=10), side(name))
    for name in HUGGINGFACE:
        found[f"transformers {name}"] = (partial(huggingface, name), side(name))
    return found


def side(name: str) -> int:
    """Of the images: small, where the network takes small ones."""
    return 224 if any(part in name for part in FIXED) else 96 if "inception" in name else 64


def huggingface(name: str) -> nn.Module:
    """An image classifier of transformers with the default settings of its kind."""
    transformers = importlib.import_module("transformers")
    config = getattr(transformers, f"{name}Config")(num_labels=10)
    return NormalizedNetwork(nn.Identity(), transformers.AutoModelForImageClassification.from_config(config), "logits")


@torch.no_grad()
def awake(model: nn.Module, images: Tensor) -> nn.Module:
    """The model as training would leave it in one respect: every part counts. Heads, branches and gains can start at zero."""
    for name, weight in model.named_parameters():
        if not name.endswith("bias") and not weight.any():
            nn.init.normal_(weight, mean=0.0 if weight.dim() > 1 else 1.0, std=0.02)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the average over all that was seen
    if norms:
        model.train()(images)
    return model.eval()


def check(model: nn.Module, images: Tensor) -> str:
    """Columns of the table: tracer, bounded calls, and what holds."""
    with torch.no_grad():
        wanted = model(images)
    bounded = BoundedNetwork(model, images[:1])
    tracer = "torch.fx" if isinstance(bounded.network, fx.GraphModule) and not _exported(bounded.network) else "torch.export"
    with torch.no_grad():
        same = torch.equal(bounded(images), wanted)
    other = bounded(images[:1]).shape == (1, wanted.shape[1]) and bounded(torch.cat([images, images[:1]])).shape[0] == 3
    bounded.set_from_images(images, share=0.5)
    moved = images.clone().requires_grad_()
    bounded(moved).square().sum().backward()
    reached = sum(bool((bound.upper.grad != 0).any()) for _, bound in bounded.each() if bound.upper.grad is not None)
    calls = sum(1 for _ in bounded.each())
    at_images = moved.grad is not None and bool((moved.grad != 0).any())
    return f"{tracer} | {calls} | {_mark(same)} | {_mark(other)} | {reached} of {calls} | {_mark(at_images)}"


def _exported(network: fx.GraphModule) -> bool:
    return any("aten" in str(node.target) for node in network.graph.nodes if node.op == "call_function")


def _mark(holds: bool) -> str:
    return "yes" if holds else "**no**"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only names that contain this")
    given = parser.parse_args()
    print(
        "| network | tracer | bounded calls | bit-identical | any number of images | calls with a gradient | gradient at images |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, (make, pixels) in networks().items():
        if given.only not in name:
            continue
        torch.manual_seed(0)
        try:
            columns = check(awake(make(), torch.rand(8, 3, pixels, pixels)), torch.rand(2, 3, pixels, pixels))
        except (UserError, RuntimeError, ValueError, TypeError) as error:
            columns = f"refused: {first_line(error)} | | | | |"
        print(f"| {name} | {columns} |", flush=True)


if __name__ == "__main__":
    main()
