"""The numeric precision to compute in."""

from __future__ import annotations

import torch

from marginclip.devices import gpu_wanted
from marginclip.errors import require

PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")


def precision_for(choice: str, *, accelerator: str = "auto") -> str:
    """Lightning's name of the precision; ``auto`` is bf16 where the device has it in hardware, else fp16 on a GPU and fp32 on a CPU.

    ``accelerator`` is the Trainer's: with ``cpu`` a GPU of the machine does not count.
    """
    require(choice in PRECISIONS, f"trainer.precision must be one of {', '.join(PRECISIONS)}, got '{choice}'")
    if choice != "auto":
        return choice
    if gpu_wanted(accelerator):
        hardware = torch.cuda.is_bf16_supported(including_emulation=False)  # older GPUs compute it in software, slowly
        return "bf16-mixed" if hardware else "16-mixed"
    return "bf16-mixed" if _cpu_has_bf16() else "32-true"


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware (AVX512-BF16 or AMX), and oneDNN was not told to do without (``ONEDNN_MAX_CPU_ISA``)."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks) and _onednn_takes_bf16()


def _onednn_takes_bf16() -> bool:
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a torch without oneDNN
        return False
