"""Records of runs, written by hand."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from marginclip.record import RunRecord

CONFIG = {
    "dataset": {"name": "digits"},
    "model": {"name": "small_resnet", "width": 16, "activation": "relu"},
    "attack": {"name": "badnet", "rate": 0.1},
    "x2x": {"name": "all2one"},
    "imbalance": {"name": "none", "_target_": None},
    "loss": {"name": "cross_entropy", "_target_": None},
    "defense": {"name": "mmac", "steps": 60},
}
ROWS = {
    "none": {"label": "no defense"},
    "mmac": {"label": "MMAC", "phases": ["repair"]},
    "mmdf": {"label": "MMDF", "phases": ["repair", "detector"]},
}


@pytest.fixture
def make_record():
    """Makes a valid record of a finished run, at ``runs/one``; its fields and groups of its configuration can be changed."""

    def make(*, config=None, seed=0, **fields):
        content = {"status": "done", "rows": ROWS, "repaired_row": "mmac", "clean_set_size": 100}
        asked = CONFIG | {"seed": seed} | (config or {})
        identity = {key: value for key, value in asked.items() if key != "runs_dir"}
        return RunRecord(config=asked, identity=identity, seed=seed, **(content | fields)).at("runs/one")

    return make


@pytest.fixture
def save_run():
    """Writes a record and arrays into a folder, which it returns."""

    def save(folder, record, arrays=None):
        record.at(folder).write()
        if arrays is not None:
            tensors = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in arrays.items()}
            save_file(tensors, folder / "arrays.safetensors")
        return folder

    return save
