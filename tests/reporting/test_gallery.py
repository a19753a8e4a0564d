"""The gallery: which runs it shows, in which order, and the numbers in its pictures."""

import numpy as np
import pytest
import torch

from marginclip.reporting.__main__ import main
from marginclip.reporting.gallery import gallery_figure


@pytest.fixture
def save(make_record, save_run):
    """Writes the run of an attack; returns its record and arrays."""

    def save(folder, attack, *, seed=0, status="done", examples=True):
        metrics = {"none": {"acc": 0.9, "asr": 0.97, "pacc": 0.0}}
        record = make_record(config={"attack": {"name": attack}}, seed=seed, status=status, metrics=metrics)
        clean = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(seed)).numpy() / 2
        arrays = {"examples/clean": clean, "examples/triggered": clean + np.float32(0.1)} if examples else {"scores/x": clean}
        save_run(folder, record, arrays)
        return record, arrays

    return save


def blocks(figure):
    return [part.get_suptitle().splitlines()[0] for part in figure.subfigs]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are made."""
    figures = []

    def noted(runs):
        figures.append((gallery_figure(runs), runs))
        return figures[-1][0]

    monkeypatch.setattr("marginclip.reporting.gallery.gallery_figure", noted)
    return figures


def test_attacks_stand_in_a_fixed_order_each_by_its_first_seed(save, tmp_path, drawn, capsys):
    for attack in ("zebra", "adaptive", "wanet", "badnet", "input_aware", "another"):
        save(tmp_path / "runs" / f"1-{attack}", attack, seed=1)
    first, _ = save(tmp_path / "runs" / "2-wanet", "wanet", seed=0)
    save(tmp_path / "runs" / "3-blend", "blend", examples=False)
    save(tmp_path / "runs" / "4-badnet", "badnet", seed=0, status="attack_failed")
    assert main([str(tmp_path / "runs"), "--gallery", str(tmp_path / "gallery.png")]) == 0
    ((figure, runs),) = drawn
    assert blocks(figure) == ["badnet", "wanet", "input_aware", "adaptive", "another", "zebra"]
    assert runs[1][0] == first
    assert runs[0][0].seed == 1  # seed 0's attack failed
    assert (tmp_path / "gallery.png").read_bytes()[:4] == b"\x89PNG"
    assert "gallery.png" in capsys.readouterr().err


def test_a_block_holds_clean_and_triggered_images_and_the_amplified_difference(save, tmp_path):
    record, arrays = save(tmp_path / "run", "wanet")
    (part,) = gallery_figure([(record, arrays)]).subfigs
    assert part.get_suptitle() == "wanet\nASR 97.0 %"
    shown = [np.asarray(axes.images[0].get_array()).squeeze() for axes in part.axes]
    clean, triggered = arrays["examples/clean"][:2, 0], arrays["examples/triggered"][:2, 0]
    factor = float(part.axes[4].get_ylabel().rpartition(" ")[2])
    assert factor == pytest.approx(10, rel=0.02)
    expected = [*clean, *triggered, *(factor * np.abs(triggered - clean))]
    for found, wanted in zip(shown, expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert [part.axes[place].get_ylabel() for place in (0, 2)] == ["clean", "triggered"]


@pytest.mark.parametrize("folder", [False, True])
def test_what_cannot_be_drawn_is_one_sentence(folder, save, tmp_path, capsys):
    save(tmp_path / "runs" / "run", "none" if not folder else "wanet", examples=folder)
    path = tmp_path if folder else tmp_path / "gallery.png"
    assert main([str(tmp_path / "runs"), "--gallery", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --gallery must be a file, but" if folder else "error: there is no run with example images")
    assert error.count("\n") == 1
    assert not (tmp_path / "gallery.png").exists()
