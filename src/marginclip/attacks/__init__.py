"""Triggers and poisoning. A trigger maps images to new images; an X2X setting says whom it flips, and to what."""

from marginclip.attacks.adaptive import Adaptive
from marginclip.attacks.base import Attack, round_to_8_bits
from marginclip.attacks.chessboard import Chessboard
from marginclip.attacks.clean_label import CleanLabel, Surrogate
from marginclip.attacks.full_image import BlendFull, LowFrequency, Sinusoid
from marginclip.attacks.input_aware import InputAware
from marginclip.attacks.patch import BadNet, Blend, OnePixel
from marginclip.attacks.wanet import WaNet
from marginclip.attacks.x2x import X2X, AllToAll, AllToOne, OneToOne

__all__ = [
    "X2X",
    "Adaptive",
    "AllToAll",
    "AllToOne",
    "Attack",
    "BadNet",
    "Blend",
    "BlendFull",
    "Chessboard",
    "CleanLabel",
    "InputAware",
    "LowFrequency",
    "OnePixel",
    "OneToOne",
    "Sinusoid",
    "Surrogate",
    "WaNet",
    "round_to_8_bits",
]
