"""Neural Cleanse: the cost schedule by hand, inversion against a loop, the anomaly index, and what is unlearned."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from marginclip.defenses import InversionPlan, NeuralCleanse
from marginclip.defenses.weights.inversion import CostSchedule, InvertedTriggers, anomaly_indices, invert_triggers, paste
from marginclip.errors import UserError
from marginclip.experiment.command import plain
from marginclip.experiment.spec import run_spec
from marginclip.experiment.stages import make_methods


def make_defense(config):
    """The defense of a composed configuration."""
    return make_methods(run_spec(plain(config))).defense


FEW = InversionPlan(passes=3, batches_per_pass=3, batch_size=8)


# -- the schedule -------------------------------------------------------------------------------------------------------------


def values(rates, sizes=None, **settings):
    schedule = CostSchedule(**settings)
    course = []
    for number, rate in enumerate(rates):
        schedule.update(rate, 10.0 if sizes is None else sizes[number])
        course.append(schedule.value)
    return course, schedule


def test_the_cost_starts_after_five_successes_running():
    course, _ = values([1.0] * 4 + [0.98] + [0.99] * 5)
    assert course == [0.0] * 9 + [1e-3]


def test_the_cost_grows_and_is_never_set_back_to_its_start():
    """Known error 18: a schedule that sets the cost again after every success gives 0.001 for ever."""
    course, schedule = values([1.0] * 60)
    assert course[4] == course[8] == 1e-3
    assert course[9] == 2e-3
    assert schedule.value == pytest.approx(1e-3 * 2**11)


def test_the_cost_falls_after_five_failures():
    course, _ = values([1.0] * 10 + [0.5] * 10)
    assert course[13] == 2e-3
    assert course[14] == pytest.approx(2e-3 / 2**1.5)
    assert course[19] == pytest.approx(2e-3 / 2**3)


def test_failures_before_the_cost_is_set_do_nothing():
    course, schedule = values([0.2] * 30)
    assert set(course) == {0.0}
    assert not schedule.done
    assert schedule.best == float("inf")


def test_the_smallest_working_mask_is_the_best_one():
    schedule = CostSchedule()
    assert [schedule.update(*pair) for pair in [(0.98, 1.0), (0.99, 9.0), (1.0, 9.5), (1.0, 4.0), (0.5, 0.1)]] == [
        False, True, False, True, False,
    ]  # fmt: skip
    assert schedule.best == 4.0


def test_it_ends_when_the_cost_went_both_ways_and_nothing_improves():
    course = [1.0] * 10 + [0.5] * 5
    _, one_way = values([1.0] * 60)
    assert not one_way.done
    done = [values(course + [1.0] * more)[1].done for more in range(20)]
    assert done.index(True) == 11  # the first pass is the best; 25 without a better one are passes 2 to 26


# -- the anomaly index --------------------------------------------------------------------------------------------------------


def test_anomaly_index_of_a_known_vector():
    sizes = torch.tensor([10.0, 12.0, 8.0, 2.0, 11.0, 9.0, 10.0, 13.0])
    # median 10, deviations 0 2 2 8 1 1 0 3 -> median 1.5
    expected = (10 - sizes) / (1.4826 * 1.5)
    torch.testing.assert_close(anomaly_indices(sizes), expected.double())
    assert (anomaly_indices(sizes) > 2).nonzero().flatten().tolist() == [3]
    assert anomaly_indices(torch.tensor([5.0, 5.0, 5.0, 1.0])).tolist() == [0.0] * 4


def test_an_odd_and_large_mask_is_no_backdoor():
    assert float(anomaly_indices(torch.tensor([10.0, 11.0, 9.5, 10.5, 60.0])).max()) < 2


# -- inversion ----------------------------------------------------------------------------------------------------------------


def test_mask_zero_changes_nothing_and_mask_one_replaces_everything(victim, clean):
    images, pattern = clean[0], torch.rand(1, 8, 8)
    assert torch.equal(paste(images, torch.zeros(1, 8, 8), pattern), images)
    logits = victim(paste(images, torch.ones(1, 8, 8), pattern))
    assert torch.allclose(logits, logits[:1].expand_as(logits), atol=1e-5)


def test_all_classes_at_once_are_each_class_alone(plain_victim, clean):
    """In float64; the classes draw the same batches but their own starts, so class 0 is searched alone."""
    network = plain_victim.double().requires_grad_(False)
    images = clean[0].double()
    together = invert_triggers(network, images, [2, 0, 3], FEW, seed=1)
    generator = torch.Generator().manual_seed(1 + 6700417)
    masks, patterns = torch.rand(3, 1, 8, 8, generator=generator), torch.rand(3, 1, 8, 8, generator=generator)
    order = torch.Generator().manual_seed(1)
    batches = [images[torch.randperm(24, generator=order)[:8]] for _ in range(9)]
    for row, label in enumerate([2, 0, 3]):
        a, b = (torch.atanh((2 * value[row] - 1) * (1 - 1e-6)).requires_grad_() for value in (masks, patterns))
        optimizer = torch.optim.Adam([a, b], 0.1, (0.5, 0.9))
        for batch in batches:
            m, p = a.tanh() / 2 + 0.5, b.tanh() / 2 + 0.5
            loss = F.cross_entropy(network((1 - m) * batch + m * p), torch.full((8,), label))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if together.rates[row] < 0.99:  # nothing worked in three passes, so the last trigger stands
            torch.testing.assert_close(together.masks[row], (a.tanh() / 2 + 0.5).detach(), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(together.patterns[row], (b.tanh() / 2 + 0.5).detach(), atol=1e-5, rtol=1e-5)


def test_classes_that_do_not_fit_at_once_are_searched_in_parts(plain_victim, clean, monkeypatch):
    network, images = plain_victim.double().requires_grad_(False), clean[0].double()
    at_once = invert_triggers(network, images, [2, 0, 3], FEW, seed=1)
    largest, forward = [], type(network).forward
    monkeypatch.setattr(type(network), "forward", lambda self, batch: largest.append(len(batch)) or forward(self, batch))
    monkeypatch.setattr("marginclip.defenses.weights.inversion.memory_budget", lambda device: 1)
    in_parts = invert_triggers(network, images, [2, 0, 3], FEW, seed=1)
    assert max(largest) == 8
    torch.testing.assert_close(in_parts.masks, at_once.masks)
    torch.testing.assert_close(in_parts.patterns, at_once.patterns)
    assert in_parts.rates == at_once.rates


class WhiteSquare(nn.Module):
    """A strong BadNet: a 2 x 2 white square in the corner sends everything to class 1; the rest of the decision is the victim's."""

    def __init__(self, victim):
        super().__init__()
        self.victim = victim

    def forward(self, images):
        bright = images[:, :, :2, :2].mean((1, 2, 3))
        shift = 40 * (bright - 0.7).unsqueeze(1) * torch.tensor([0.0, 1.0, 0.0, 0.0])
        return self.victim(images) / 4 + shift


def test_the_backdoored_class_has_the_smallest_mask_and_its_place(victim, clean):
    network = WhiteSquare(victim).eval().requires_grad_(False)
    plan = InversionPlan(passes=25, batches_per_pass=8, batch_size=24, patience=2, cost=0.02)
    found = invert_triggers(network, clean[0], range(4), plan)
    assert int(found.sizes.argmin()) == 1
    assert float(found.masks[1, 0, :2, :2].mean()) > 2 * float(found.masks[1].mean())
    assert found.rates[1] >= 0.99
    labels = network(paste(clean[0], found.masks[1], found.patterns[1])).argmax(1)
    assert (labels == 1).float().mean() > 0.95


# -- the defense --------------------------------------------------------------------------------------------------------------


def inverted(sizes):
    masks = torch.zeros(len(sizes), 1, 8, 8)
    masks[:, 0, 0, 0] = torch.tensor(sizes) / 10
    return InvertedTriggers(
        list(range(len(sizes))), masks, torch.ones(len(sizes), 1, 8, 8), [1.0] * len(sizes), [1] * len(sizes)
    )


def test_the_network_that_is_trained_is_returned(victim, clean, fit):
    """Known error 6: the published port returned an untouched network."""
    defense = NeuralCleanse(suspect_class=2, inversion=FEW, epochs=2, learning_rate=0.05)
    repaired = fit(defense, victim, clean)
    assert repaired is defense.network
    assert not torch.equal(repaired[0].weight, victim[0].weight)
    assert defense.findings()["suspects"] == [2]
    assert defense.findings()["suspected_by"] == "given"
    assert defense.arrays()["inverted/masks"].shape == (1, 1, 8, 8)


def test_unlearning_pastes_the_trigger_in_float_under_true_labels(victim, clean):
    """Known errors 7 and 19: no stretched pictures, no target labels, sources of every class."""
    defense = NeuralCleanse(share=0.25)
    defense.prepare(victim, *clean)
    defense.inverted = inverted([3.0, 9.0, 9.5, 10.0, 10.5])  # class 0 stands out
    assert defense.suspects == [0]
    images, labels = clean
    triggered, given = defense.augmented(images, labels, torch.Generator().manual_seed(0))
    assert torch.equal(given, labels)
    changed = (triggered != images).flatten(1).any(1)
    assert int(changed.sum()) == 6
    assert torch.allclose(triggered[changed, 0, 0, 0], 0.7 * images[changed, 0, 0, 0] + 0.3)
    assert torch.equal(triggered[changed, 0, 1:], images[changed, 0, 1:])
    sources = [labels[(defense.augmented(images, labels, torch.Generator().manual_seed(k))[0] != images).flatten(1).any(1)]
               for k in range(8)]  # fmt: skip
    assert set(torch.cat(sources).tolist()) == {0, 1, 2, 3}


def test_the_trigger_comes_before_the_augmentation(victim, clean):
    seen = []
    defense = NeuralCleanse(
        suspect_class=0, share=1.0, augmentation=lambda images, generator: seen.append(images) or images * 0
    )
    defense.prepare(victim, *clean)
    defense.inverted = InvertedTriggers([0], torch.ones(1, 1, 8, 8), torch.full((1, 1, 8, 8), 0.5), [1.0], [1])
    assert not defense.augmented(*clean, torch.Generator())[0].any()
    assert torch.equal(seen[0], torch.full((24, 1, 8, 8), 0.5))


def test_a_model_in_which_nothing_stands_out_is_left_exactly_as_it_was(victim, clean, fit, monkeypatch):
    monkeypatch.setattr(
        "marginclip.defenses.weights.neural_cleanse.invert_triggers", lambda *_, **__: inverted([9.0, 9.5, 10.0, 10.5])
    )
    defense = NeuralCleanse(epochs=2)
    repaired = fit(defense, victim, clean)
    assert all(torch.equal(value, repaired.state_dict()[name]) for name, value in victim.state_dict().items())
    assert defense.findings()["left_as_it_was"]
    assert defense.findings()["suspects"] == []


def test_interrupted_is_the_uninterrupted_and_inverts_once(victim, clean, fit, interrupted_and_resumed, monkeypatch):
    def make():
        return NeuralCleanse(suspect_class=1, inversion=FEW, epochs=3, batch_size=12)

    straight = fit(make(), victim, clean)
    resumed, again = interrupted_and_resumed(make, victim, clean, at=3)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in straight.state_dict().items())
    assert again.inverted.passes == [3]


def test_known_is_the_attacks_target_or_the_anomaly_index(configure_defense):
    def told(target, *overrides):
        defense = make_defense(configure_defense("defense=neural_cleanse", *overrides))
        defense.tell(suspect_class=target)
        return defense

    assert told(7).suspect_class == 7
    assert told(7).oracle_told is True
    left_alone = told(None)
    assert left_alone.oracle_told is False
    left_alone.inverted = inverted([9.0, 9.5, 10.0, 10.5])
    assert left_alone.findings()["suspected_by"] == "anomaly index"
    assert "no single target class is known" in left_alone.findings()["note"]
    assert told(7, "defense.suspect_class=auto").suspect_class == "auto"
    assert told(7, "defense.suspect_class=3").suspect_class == 3
    assert told(7, "defense.suspect_class=3").oracle_told is None


@pytest.fixture
def configure_defense():
    from pathlib import Path

    from hydra import compose, initialize_config_dir

    def configure(*overrides):
        with initialize_config_dir(str(Path(__file__).parents[2] / "conf"), version_base="1.3"):
            return compose("defend", overrides=list(overrides))

    return configure


def test_settings_that_make_no_sense_are_refused(victim, clean):
    for setting in ({"suspect_class": "cat"}, {"suspect_class": -1}, {"suspect_class": True}, {"share": 0.0}):
        with pytest.raises(UserError, match=f"defense.{next(iter(setting))} must be"):
            NeuralCleanse(**setting)
    with pytest.raises(UserError, match=r"suspect_class must be a class in 0..3, got 9"):
        NeuralCleanse(suspect_class=9).prepare(victim, *clean)
    with pytest.raises(UserError, match=r"defense\.inversion\.passes must be at least 1"):
        InversionPlan(passes=0)


def test_one_object_is_told_anew_of_every_model():
    defense = NeuralCleanse(suspect_class="known")
    for told in (3, 5, None, 2):
        defense.tell(suspect_class=told, class_counts=[1, 2])
        assert defense.suspect_class == ("known" if told is None else told)
        assert defense.oracle_told is (told is not None)
    given = NeuralCleanse(suspect_class=1)
    given.tell(suspect_class=3)
    assert (given.suspect_class, given.oracle_told) == (1, None)


def test_two_classes_have_no_outlier():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 2)).eval()
    images = torch.rand(12, 1, 8, 8)
    labels = model(images).argmax(1)
    with pytest.raises(
        UserError, match=r"suspect_class=auto .* at least 3 classes, got 2: give defense\.suspect_class a class"
    ):
        NeuralCleanse(suspect_class="auto", inversion=FEW, epochs=1).fit(model, images, labels)
