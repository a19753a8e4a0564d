"""Classifiers: images (N, C, H, W) in [0, 1] in, logits (N, num_classes) out; normalisation is their first layer."""

from marginclip.models.exported import exported_model, from_program
from marginclip.models.huggingface import huggingface_model
from marginclip.models.imported import NormalizedNetwork, imported_model, timm_model
from marginclip.models.preact_resnet import PreActResNet
from marginclip.models.resnet import ResNet
from marginclip.models.torchvision import TorchvisionModel
from marginclip.models.vgg import VGG
from marginclip.models.vit import ViT

__all__ = [
    "VGG", "NormalizedNetwork", "PreActResNet", "ResNet", "TorchvisionModel", "ViT", "exported_model", "from_program",
    "huggingface_model", "imported_model", "timm_model",
]  # fmt: skip
