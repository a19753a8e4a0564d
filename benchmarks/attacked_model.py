"""The victim that the arguments of a benchmark name, which are options of ``marginclip defend``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir

from marginclip.defenses import MMAC
from marginclip.experiment.command import plain
from marginclip.experiment.process import prepare_process
from marginclip.experiment.setup import VictimSetup, build_setup
from marginclip.experiment.spec import RunSpec, run_spec
from marginclip.experiment.stages import load_model

CONF = Path(__file__).parents[1] / "conf"


def attacked_model(arguments: Sequence[str]) -> tuple[RunSpec, VictimSetup]:
    """The settings, and the setup whose model is the victim: found in the store, or trained. The clean set has MMAC's size."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("defend", ["logger=none", "trainer.enable_progress_bar=false", *arguments])
    spec = run_spec(plain(config))
    prepare_process(spec.trainer.threads)
    setup = build_setup(spec, clean_per_class=MMAC.clean_per_class)
    load_model(spec, setup)
    return spec, setup
