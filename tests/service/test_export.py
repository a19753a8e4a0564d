"""Exported graphs against the artefact: the same decisions, flags and logits at every batch size, p-values never too small."""

import pytest
import torch

from marginclip.clipping.one_batch import OneBatchPair
from marginclip.clipping.serving import PairedNetwork
from marginclip.errors import UserError
from marginclip.maxmargin import MarginDropDetector
from marginclip.service import Artefact, DecisionNetwork, export
from marginclip.service.export import FEW_IMAGES

from .conftest import quarters, triggered

SIZES = (1, 2, 7, 64)


@pytest.fixture(scope="module")
def images():
    clean, _ = quarters(60, seed=9)
    return torch.cat([clean, triggered(clean)])


@pytest.fixture(scope="module")
def run():
    """Runs an exported file of either format on images (N, C, H, W); returns its outputs as tensors."""

    def run(path, images):
        if path.suffix == ".pt2":
            found = torch.export.load(path).module()(images)
            return list(found) if isinstance(found, tuple) else [found]
        runtime = pytest.importorskip("onnxruntime")
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return [torch.from_numpy(value) for value in session.run(None, {"images": images.numpy()})]

    return run


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_the_whole_of_mmdf_is_one_graph(artefact, images, run, tmp_path, format):
    if format == "onnx":
        pytest.importorskip("onnxscript")
    path = export(artefact, tmp_path / f"mmdf.{format}", format=format)
    for size in SIZES:
        wanted = artefact(images[:size])
        decisions, flagged, values = run(path, images[:size])
        assert torch.equal(decisions, wanted.decisions)
        assert torch.equal(flagged, wanted.flagged)
        assert bool((values >= wanted.p_values - 1e-6).all())
        torch.testing.assert_close(values, wanted.p_values, rtol=0.15, atol=2e-3)
    assert 0 < int(artefact(images).flagged.sum()) < len(images)


@pytest.mark.parametrize("format", ["pt2", "onnx"])
@pytest.mark.parametrize("part", ["mmdf", "repaired"])
def test_a_batch_size_can_be_fixed(artefact, images, run, tmp_path, format, part):
    if format == "onnx":
        pytest.importorskip("onnxscript")
    path = export(artefact, tmp_path / f"three.{format}", format=format, part=part, batch_size=3)
    for few in images.split(3)[:4]:
        found = run(path, few)
        if part == "mmdf":
            assert torch.equal(found[0], artefact(few).decisions)
            assert torch.equal(found[1], artefact(few).flagged)
        else:
            torch.testing.assert_close(found[0], artefact.network(few), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_few_images_are_one_batch_for_both_networks(artefact, images):
    few, many = (DecisionNetwork(artefact.detector, images=images[:count]) for count in (FEW_IMAGES, FEW_IMAGES + 1))
    assert isinstance(few.pair, OneBatchPair)
    assert isinstance(many.pair, PairedNetwork)
    for found, wanted in zip(few(images[:FEW_IMAGES]), many(images[:FEW_IMAGES]), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_the_bounded_network_gives_its_logits(artefact, images, run, tmp_path, format):
    if format == "onnx":
        pytest.importorskip("onnxscript")
    path = export(artefact, tmp_path / f"bounded.{format}", format=format, part="repaired")
    for size in SIZES:
        (logits,) = run(path, images[:size])
        torch.testing.assert_close(logits, artefact.network(images[:size]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("statistic", ["drop", "shortfall", "both"])
@pytest.mark.parametrize("rule", ["paper", "repaired", "or_disagree"])
@pytest.mark.parametrize("correction", ["exclude", "insist", "reject"])
def test_every_way_of_deciding_is_the_detectors(artefact, images, statistic, rule, correction):
    given = artefact.detector
    settings = {"theta": 0.1, "statistic": statistic, "rule": rule, "correction": correction}
    detector = MarginDropDetector(given.model, given.repaired, given.clean_drops, given.clean_margins, **settings)
    wanted = detector(images)
    decisions, flagged, _ = DecisionNetwork(detector)(images)
    assert torch.equal(decisions, wanted.decisions)
    assert torch.equal(flagged, wanted.flagged)


@pytest.mark.parametrize("null_distribution", ["tail", "empirical", "gaussian"])
def test_p_values_are_never_too_small(artefact, images, null_distribution):
    given = artefact.detector
    detector = MarginDropDetector(
        given.model, given.repaired, given.clean_drops, given.clean_margins, null_distribution=null_distribution
    )
    wanted = detector(images).p_values
    _, _, values = DecisionNetwork(detector)(images)
    assert bool((values >= wanted - 1e-6).all())


def test_an_image_that_gives_no_number_is_flagged(artefact):
    broken = torch.full((1, *artefact.image_shape), float("nan"))
    _, flagged, values = DecisionNetwork(artefact.detector)(broken)
    assert flagged.tolist() == [True]
    assert values.tolist() == [0]


def test_the_artefact_is_left_as_it_was(artefact, tmp_path):
    before = {name: value.clone() for name, value in artefact.network.state_dict().items()}
    assert isinstance(artefact, Artefact)
    export(artefact, tmp_path / "x.pt2", format="pt2", part="repaired")
    assert all(parameter.requires_grad for parameter in artefact.network.bound_parameters())
    assert all(torch.equal(value, before[name]) for name, value in artefact.network.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "tflite"}, "format must be one of onnx, pt2, got 'tflite'"),
        ({"part": "all"}, "part must be one of mmdf, repaired"),
        ({"batch_size": 0}, "batch_size must be 1 to 1024, or not given, which leaves it free; got 0"),
        ({"batch_size": 10**9}, "batch_size must be 1 to 1024"),
    ],
)
def test_what_cannot_be_written_is_refused(artefact, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        export(artefact, tmp_path / "x", **settings)
