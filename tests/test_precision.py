"""The precision that is taken by itself on a CPU: bf16 where the processor has it and oneDNN uses it, else fp32."""

import os

import pytest
import torch

from marginclip import precision

PRINT = "from marginclip.precision import precision_for; print(precision_for('auto', accelerator='cpu'))"


@pytest.mark.parametrize("processor", [True, False])
@pytest.mark.parametrize("library", [True, False])
def test_bf16_needs_the_processor_and_the_library(monkeypatch, processor, library):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: processor, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    monkeypatch.setattr(precision, "_onednn_takes_bf16", lambda: library)
    wanted = "bf16-mixed" if processor and library else "32-true"
    assert precision.precision_for("auto", accelerator="cpu") == wanted


@pytest.mark.parametrize(("hardware", "wanted"), [(True, "bf16-mixed"), (False, "16-mixed")])
def test_a_gpu_that_emulates_bf16_computes_in_fp16(monkeypatch, hardware, wanted):
    def supported(including_emulation=True):  # as torch says it of a V100 or T4
        return hardware or including_emulation

    monkeypatch.setattr(precision, "gpu_wanted", lambda accelerator: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert precision.precision_for("auto") == wanted


def test_a_onednn_that_is_held_to_avx2_computes_in_fp32(program, tmp_path):
    """Bf16 in software would be five times as slow."""
    done = program(["-c", PRINT], cwd=tmp_path, env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"})
    assert done.stdout == "32-true\n", done.stderr
