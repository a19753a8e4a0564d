"""One run: the list of its stages, and what is written about it."""

from __future__ import annotations

import logging
import shutil

import torch

from marginclip.clipping import BoundedNetwork
from marginclip.experiment.figure_arrays import figure_arrays
from marginclip.experiment.loggers import opened_loggers
from marginclip.experiment.process import prepare_process
from marginclip.experiment.recipe import run_folder
from marginclip.experiment.recording import failures_recorded, finish, finished_record, opened_record, phase
from marginclip.experiment.setup import build_setup
from marginclip.experiment.spec import RunSpec
from marginclip.experiment.stages import (
    attack_took,
    checkpoint_of,
    evaluate,
    fit_detector,
    load_model,
    make_methods,
    run_repair,
    run_test,
    tell_oracles,
)
from marginclip.experiment.victim import obtain_victim
from marginclip.files import write_tensors
from marginclip.locks import locked
from marginclip.record import RunRecord, Status
from marginclip.reporting import draw_figures

log = logging.getLogger(__name__)


def train(spec: RunSpec) -> str:
    """Train the victim that ``spec`` asks for, or find it trained; returns the path of its record."""
    prepare_process(spec.trainer.threads)
    victim, _ = obtain_victim(spec, build_setup(spec))
    return str(victim.folder / "victim.json")


def prepare_victim(spec: RunSpec) -> str:
    """Train the victim that the run of ``spec`` needs, as that run would; returns the path of its record."""
    prepare_process(spec.trainer.threads)
    defense = make_methods(spec).defense
    setup = build_setup(spec, clean_per_class=None if defense is None else defense.clean_per_class)
    victim, _ = obtain_victim(spec, setup)
    return str(victim.folder / "victim.json")


def defend(spec: RunSpec) -> RunRecord:
    """Do the run that ``spec`` asks for, or find it done; returns its record."""
    prepare_process(spec.trainer.threads)
    folder = run_folder(spec)
    if (found := finished_record(spec)) is None or checkpoint_of(folder).exists():
        with locked(folder):  # the same cell of a sweep can be on another host
            if (found := finished_record(spec)) is None:
                record = opened_record(spec)
                with failures_recorded(record):
                    _do(spec, record)
                return record
            shutil.rmtree(checkpoint_of(folder).parent, ignore_errors=True)
    log.info("already done: %s", folder)
    return found


def _do(spec: RunSpec, record: RunRecord) -> None:
    methods = make_methods(spec)
    defense, result, detector = methods.defense, None, None
    setup = build_setup(spec, clean_per_class=None if defense is None else defense.clean_per_class)
    if defense is not None:
        tell_oracles(spec, setup, defense)
        defense.check_model(setup.model, torch.zeros(1, *setup.splits.image_shape))
    with phase(record, "victim"):
        record.victim = load_model(spec, setup)
    if methods.test is not None:
        with phase(record, "detection"):
            run_test(spec, setup, methods.test, record)
    with opened_loggers(spec, record.folder, job="defend", name=record.folder.name) as loggers:
        if defense is not None:
            with phase(record, "repair"):
                result = run_repair(spec, setup, defense, record, loggers.lightning)
            if isinstance(result.network, BoundedNetwork):
                write_tensors(record.folder / "bounds.safetensors", result.network.bounds_state())
            if spec.defense is not None and spec.defense.detector is not None:
                with phase(record, "detector"):
                    detector = fit_detector(spec, setup, defense, result.network)
        with phase(record, "evaluation"):
            arrays = evaluate(spec, setup, defense, result, detector, record)
        record.classes, record.clean_set_size = list(setup.classes), len(setup.data.clean_index)
        record.evaluated_on = "held_out" if len(setup.data.eval_index) else "clean_set"
        arrays |= figure_arrays(setup, None if result is None else result.network)
        if arrays:
            write_tensors(record.folder / "arrays.safetensors", arrays)
        status: Status = "done" if attack_took(setup, record) else "attack_failed"
        record.write()
        figures = draw_figures(record.folder) if spec.figures else []
        finish(record, status)  # comes last: a run that is done has all its files
        shutil.rmtree(checkpoint_of(record.folder).parent, ignore_errors=True)
        loggers.publish(record, figures)
