"""Silencing Lightning's adverts and device lines; what the user should see is logged by us."""

from __future__ import annotations

import logging
import warnings

PATTERNS = (
    r".*does not have many workers.*",
    r".*`?isinstance\(treespec, LeafSpec\).*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*Experiment logs directory .* exists and is not empty.*",  # earlier rows are kept under another name
    r".*The number of training batches .* is smaller than the logging interval.*",
    r".*You are using `LightningModule.*",
    r".*Starting from v1.9.0, `tensorboardX`.*",
    r".*Trying to infer the `batch_size`.*",
    r".*`configure_optimizers` returned `None`.*",
    r".*GPU available but not used.*",
    r".*lr_scheduler.step\(\).*optimizer.step\(\).*",
    r".*`training_step` returned `None`.*",
    r".*The AccumulateGrad node's stream does not match.*",  # what follows from capturing CUDA graphs, harmless
    r".*there was no current CUDA context.*",
    r".*module\(s\) in eval mode at the start of training.*",
    r".*It is recommended to use `self\.log\(.*sync_dist=True.*",  # torchmetrics brings the devices together
    r"Grad strides do not match bucket view strides.*",  # several devices: a copy more
)


def quiet_lightning() -> None:
    """Lower Lightning's own loggers to errors and drop its warnings that nobody here can act on."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for pattern in PATTERNS:
        warnings.filterwarnings("ignore", message=pattern)
