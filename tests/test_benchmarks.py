"""The benchmarks do what they say, on toys."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from marginclip.clipping import BoundedNetwork
from marginclip.data import ImageData, ImageSet, Splits
from marginclip.experiment.setup import VictimSetup
from marginclip.maxmargin import margin
from marginclip.record import Row, RunRecord

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Imports a script of the benchmarks folder."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name):
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def toy():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    with torch.no_grad():
        model[1].weight *= 4  # activations beyond the bounds' start
    images = torch.rand(30, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    return model, images, model(images).argmax(1)


def test_published_schedule_takes_one_adam_step_a_batch(load, toy):
    model, images, labels = toy
    before = {name: value.clone() for name, value in model.state_dict().items()}
    repaired = load("published").published_mmac(model, images, labels, passes=1, ascent_steps=1, per_class=2)
    assert isinstance(repaired, BoundedNetwork)
    bounds = torch.cat([value.detach() for value in repaired.bound_parameters()])
    assert bounds.shape == (6,)
    assert ((bounds - 1).abs() > 1e-6).any()
    steps = (bounds - 1).abs()  # Adam's first step is its learning rate wherever there is a gradient
    assert ((steps < 1e-6) | ((steps - 0.1).abs() < 1e-3)).all()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_reserve_is_neither_learned_from_nor_evaluated_on(load):
    labels = torch.arange(60) % 3
    images = torch.randint(0, 256, (60, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    held_out = ImageSet(images, labels, ("a", "b", "c"))
    data = ImageData(Splits(held_out, held_out), clean_per_class=4, reserve_per_class=10)
    script = load("accuracy_cost")
    found, answers = script.reserve(VictimSetup(data.splits, None, data, nn.Identity()))
    assert len(found) == len(answers) == 60 - len(data.clean_index) - len(data.eval_index) == 18
    used = torch.cat([data.clean_index, data.eval_index])
    rows = [row for row in range(60) if row not in used.tolist()]
    torch.testing.assert_close(found, images[rows].float() / 255)
    assert torch.equal(answers, labels[rows])
    data = ImageData(Splits(held_out, held_out), clean_per_class=4, reserve_per_class=4)
    with pytest.raises(SystemExit, match="set reserve_per_class"):
        script.reserve(VictimSetup(data.splits, None, data, nn.Identity()))


def test_the_largest_margin_is_that_of_images_that_climbed(load, toy):
    model, images, labels = toy
    found = load("accuracy_cost").largest_margin(model, images, labels, 3)
    with torch.no_grad():
        resting = [float(margin(model(images), torch.full((30,), c))[labels != c].max()) for c in range(3)]
    assert found > max(resting)


def test_published_ascent_climbs_inside_the_feasible_space(load, toy):
    published = load("published")
    torch.manual_seed(3)
    start = published.ascend_class(toy[0], 1, 8, (1, 4, 4), 0)
    torch.manual_seed(3)
    found = published.ascend_class(toy[0], 1, 8, (1, 4, 4), 30)
    classes = torch.full((8,), 1)
    assert 0 <= float(found.min()) and float(found.max()) <= 1
    assert (margin(toy[0](found), classes) > margin(toy[0](start), classes)).all()


def test_one_side_of_the_repair_benchmark(load, tmp_path):
    overrides = [
        "dataset=digits", "trainer=exact", "training.epochs=1", "model.width=4", "clean_per_class=4", f"runs_dir={tmp_path}",
        "defense.steps=2", "defense.extra_steps=0", "defense.check_every=1", "defense.ascent.first_steps=1",
        "defense.ascent.starts_per_class=1", "trainer.enable_progress_bar=false",
    ]  # fmt: skip
    row = load("repair").one_side("ours", overrides)
    assert row["seconds"] > 0
    assert row["peak_mib"] > 50
    assert set(row["none"]) == set(row["repaired"]) == {"acc", "asr", "pacc"}


@pytest.mark.parametrize("side", ["run_lightning", "run_bare"])
def test_sides_of_the_training_benchmark(load, side):
    assert min(getattr(load("training"), side)(130, 2)) > 0


def test_sides_train_on_the_same_batches(load):
    training = load("training")
    data, _, _ = training.ours(300, 2)
    data.setup("fit")
    loader = data.train_dataloader()
    batches = [data.on_after_batch_transfer(dict(batch), 0) for batch in loader]
    assert [len(batch["images"]) for batch in batches] == [128, 128, 44]
    assert batches[0]["images"].shape[1:] == (3, 32, 32)
    pil = training.PilImages(*training.make_data(5))
    image, label = pil[4]
    assert (len(pil), label, tuple(image.shape)) == (5, 4, (3, 32, 32))
    assert 0 <= float(image.min()) and float(image.max()) <= 1


def test_calibration_prints_both_shares_for_every_distribution(load, monkeypatch, capsys):
    calibration = load("mmbd_calibration")
    monkeypatch.setattr(sys, "argv", ["mmbd_calibration.py", "--sets", "40", "--simulations", "200", "--classes", "10"])
    calibration.main()
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["gamma,"] * 3 + ["normal,", "log-normal,"]
    shares = [[float(number) for number in line.split()[-2:]] for line in lines]
    assert all(0 <= share <= 100 for pair in shares for share in pair)
    assert all(published > calibrated for published, calibrated in shares[:3])


def test_unit_costs_are_medians_over_runs(load, tmp_path, monkeypatch, capsys):
    from marginclip.record import RunRecord

    config = {"dataset": {"name": "digits"}, "model": {"name": "small_resnet"}}
    for number, seconds in enumerate((1.0, 4.0, 2.0)):
        RunRecord(config=config, seed=number, status="done", seconds={"repair": seconds}).at(tmp_path / str(number)).write()
    (tmp_path / "victims" / "a").mkdir(parents=True)
    (tmp_path / "victims" / "a" / "victim.json").write_text("x" * 30_000)
    monkeypatch.setattr(sys, "argv", ["unit_costs.py", str(tmp_path)])
    load("unit_costs").main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split("|")[1:6] == [" digits ", " small_resnet ", " 3 ", " 0.00 ", " - "]
    assert lines[2].split("|")[6] == " 2.0 "
    assert lines[4] == "1 victims: 0.03 to 0.03 MB each"


def test_passes_are_counted_by_kind(load, toy):
    limit = load("arithmetic_limit")
    model, images, _ = toy
    bounded = BoundedNetwork(model, images[:1])
    with limit.counting(BoundedNetwork) as counts:
        bounded(images)
        model(images)
        with torch.no_grad():
            bounded(images[:7])
    bounded(images)
    assert (counts.backward, counts.forward) == (30, 7)


def test_an_architecture_that_was_asleep_is_checked_awake(load):
    architectures = load("architectures")
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    nn.init.zeros_(norm.weight)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    asleep = architectures.check(model.eval(), torch.rand(2, 3, 8, 8))
    assert asleep == "torch.fx | 1 | yes | yes | 0 of 1 | **no**"
    awake = architectures.check(architectures.awake(model, torch.rand(8, 3, 8, 8)), torch.rand(2, 3, 8, 8))
    assert awake == "torch.fx | 1 | yes | yes | 1 of 1 | yes"


def test_a_verdict_is_a_row(load):
    verdicts = load("verdicts")
    found = {
        "true_target": 9, "verdict": {"kind": "poisoned"}, "reach": {"suspect": 9, "p_value": 0.0001},
        "reach_by_warping": {"suspect": 3, "p_value": 0.5},
        "maximum_margins": {"suspect": 8, "p_value": 0.39, "published_p_value": 0.11}, "seconds": {"mmac": 20.0, "reach": 3.0},
    }  # fmt: skip
    assert verdicts.row("attack=badnet", found) == "| attack=badnet | poisoned | 9, 9 | 0.0001 | 3: 0.5 | 8: 0.39, 0.11 | 23 |"


def test_the_faults_of_training_are_what_they_say(load):
    faults = load("training_faults")
    labels = torch.arange(10).repeat_interleave(200)
    images = torch.full((2000, 3, 8, 8), 90, dtype=torch.uint8)
    classes = tuple("abcdefghij")
    splits = Splits(ImageSet(images, labels, classes), ImageSet(images, labels, classes))

    moved = faults.mislabelled(splits, 0).train.labels
    assert float((moved != labels).float().mean()) == pytest.approx(faults.NOISE_SHARE, abs=0.03)

    marked = faults.with_patches(splits, 0).train.images
    carries = (marked[:, :, -1, -1] != 90).any(1)
    assert float(carries.float().mean()) == pytest.approx(faults.PATCH_SHARE, abs=0.02)
    assert marked[carries & (labels == 1)][:, :, -4:, -4:].unique(dim=0).shape[0] == 1  # one colour a class
    assert bool((marked[:, :, :4] == 90).all())
    bytes_, floats = (faults.patched(part, labels[:3]) for part in (images[:3], images[:3] / 255))
    assert torch.allclose(bytes_ / 255, floats)
    assert images.eq(90).all()  # the given images stay as they are

    halves = faults.with_rare_halves(splits, 0)
    assert halves.train.classes == ("a or f", "b or g", "c or h", "d or i", "e or j")
    assert halves.held_out.labels.bincount().tolist() == [400] * 5
    assert len(halves.train) == pytest.approx(1000 + 1000 / faults.RARITY, abs=40)

    assert torch.allclose(faults.blurred(torch.full((1, 3, 8, 8), 0.4)), torch.full((1, 3, 8, 8), 0.4), atol=1e-6)


def test_peers_are_compared_on_the_victims_that_both_have(load):
    """Six victims: a method that is two points worse on each differs at p = 1/32; one that has five of them is not judged."""
    peers = load("peers")
    records = []
    for attack, seed in [(attack, seed) for attack in ("badnet", "chessboard") for seed in range(3)]:
        for defense, row, lost in (("mmdf", "mmac", 0.01), ("nad", "nad", 0.03), ("anp", "anp", 0.05)):
            if (defense, attack, seed) == ("anp", "badnet", 0):
                continue
            values = {"acc": 0.95 - lost, "asr": lost, "pacc": 0.9 + 0.001 * seed}
            records.append(
                RunRecord(
                    status="done",
                    config={"dataset": {"name": "mnist_m"}, "defense": {"name": defense}, "x2x": {"name": "all2one"}},
                    identity={"attack": {"name": attack}},
                    seed=seed,
                    metrics={"none": dict.fromkeys(values, 0.5), row: values},
                    rows={"none": Row(label="no defense"), row: Row(label=row, phases=["repair"])},
                    seconds={"repair": 3.0},
                )
            )
            records[-1].config |= {"attack": {"name": attack}}
            records[-1].config["defense"] |= {"detector": {"folds": 2}, "start": {"share": None}, "repeats": 1}
    points = peers.measured(records)
    assert points["nad"]["badnet"]["1"] == pytest.approx({"acc": 92, "asr": 3, "pacc": 90.1, "seconds": 3})
    assert peers.against(points, "nad", "acc") == "-2.0 (p = 0.031)"
    assert peers.against(points, "anp", "acc") == peers.against(points, "mmac", "acc") == ""
    assert "| NAD | 92.0 ± 0.0 / 3.0 ± 0.0 / 90.1 ± 0.1 |" in peers.table(points)
    assert peers.measured([*records, records[0]]) == points  # the same victim again, with the same results
    other = records[0].model_copy(update={"metrics": records[0].metrics | {"mmac": records[1].metrics["nad"]}})
    with pytest.raises(SystemExit, match="two runs have MMAC on badnet, seed 0"):
        peers.measured([*records, other])
    assert peers.measured([*records, other.model_copy(update={"clean_set_size": 100})]) == points  # ten images a class


@pytest.mark.parametrize(("weight", "taken"), [(0.0, False), (1.0, True)])
def test_the_row_of_fine_tuning_is_that_of_the_default(load, weight, taken):
    """A run without mixtures of clean images does not replace the row that was measured with them."""
    values = {"acc": 0.9, "asr": 0.1, "pacc": 0.8}
    defense = {"name": "mmac_finetune", "mixture_weight": weight}
    record = RunRecord(
        status="done",
        config={
            "dataset": {"name": "mnist_m"},
            "defense": defense,
            "x2x": {"name": "all2one"},
            "attack": {"name": "badnet"},
        },
        seed=0,
        metrics={"mmac_finetune": values},
        rows={"mmac_finetune": Row(label="fine-tuned", phases=["repair"])},
        seconds={"repair": 3.0},
    )
    assert ("mmac_finetune" in load("peers").measured([record])) == taken
