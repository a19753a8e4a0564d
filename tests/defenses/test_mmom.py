"""MMOM: the same bound learning with the cross entropy of all clean images, checked against closed forms."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from marginclip.clipping import BoundedNetwork
from marginclip.defenses import AscentPlan, BoundLearning
from marginclip.defenses.clipping.settings import BoundStart
from marginclip.defenses.posthoc.affine_logits import fit_affine
from marginclip.errors import UserError
from marginclip.experiment.command import plain
from marginclip.experiment.spec import run_spec
from marginclip.experiment.stages import make_methods
from marginclip.maxmargin import Measured, MMOMObjective, ascend_margins, margin, mmom
from marginclip.maxmargin.lambda_control import LambdaController
from marginclip.models import ResNet
from marginclip.silence import silent_trainer


def make_defense(config):
    """The defense of a composed configuration."""
    return make_methods(run_spec(plain(config))).defense


CONF = Path(__file__).parents[2] / "conf"


def learning(**settings):
    """Bound learning with MMOM's objective on the whole clean set, all activations."""
    lambda_ = LambdaController(
        **({"initial": 1e-5, "control": "fixed", "min_agreement": 0.0, "first_check": 1} | settings.pop("lambda_", {}))
    )
    ascent = AscentPlan(**({"starts_per_class": 2, "first_steps": 2, "steps": 1} | settings.pop("ascent", {})))
    stated = {"sites": "all", "start": BoundStart(share=0.6, quantile=1.0), "steps": 6, "check_every": 2, "batch_size": 500}
    stated |= {"keep": "last", "learning_rate": 0.02, "lr_scale": "absolute"}
    objective = MMOMObjective(**settings.pop("objective", {}))
    return BoundLearning(objective=objective, lambda_=lambda_, ascent=ascent, **(stated | settings))


def shipped(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return make_defense(compose("defend", overrides=["defense=mmom", *overrides]))


def frozen_state(network):
    return {
        name: value.clone() for name, value in network.state_dict().items() if "bound" not in name and "offsets" not in name
    }


# -- the objective -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_objective_equals_loops(reduction):
    generator = torch.Generator().manual_seed(0)
    logits, margins = torch.randn(5, 3, generator=generator), torch.randn(6, generator=generator)
    labels = torch.tensor([0, 2, 1, 1, 0])
    data = 0.0
    for row, label in zip(logits.double(), labels.tolist(), strict=True):
        data -= float(torch.log(row.exp()[label] / row.exp().sum())) / 5
    # the mean over classes of the means over their starts, two of each of three classes
    term = sum(sum(pair) / 2 for pair in margins.double().view(3, 2).tolist()) / 3
    if reduction == "sum":
        term *= 6
    found = mmom(logits, labels, margins, 0.3, reduction=reduction)
    assert float(found.data) == pytest.approx(data, rel=1e-5)
    assert float(found.margin) == pytest.approx(term, rel=1e-5)
    assert float(found.loss) == pytest.approx(data + 0.3 * term, rel=1e-5)


def test_it_needs_labels_and_margins_but_neither_the_models_logits_nor_only_right_images():
    objective = MMOMObjective()
    assert objective.ascends
    assert not objective.correct_only
    labels, margins = torch.tensor([0, 1, 1]), torch.ones(3)
    logits = torch.randn(3, 2)
    one, other = (objective(Measured(logits, values, labels, margins, []), 0.1) for values in (logits, logits + 5))
    assert torch.equal(one.loss, other.loss)


def test_an_unknown_reduction_is_refused():
    with pytest.raises(UserError, match=r"^defense.objective.reduction must be 'mean' or 'sum', got 'max'$"):
        MMOMObjective(reduction="max")


# -- learning ------------------------------------------------------------------------------------------------------------------


def test_images_that_the_model_gets_wrong_are_learned_from(victim, clean, fit):
    images, labels = clean
    wrong = labels.clone()
    wrong[:5] = (wrong[:5] + 1) % 4
    defense = learning(steps=1, check_every=1)
    fit(defense, victim, (images, wrong))
    assert torch.equal(defense.images, images)
    assert torch.equal(defense.labels, wrong)


def test_one_step_is_adams_first_on_the_closed_gradient(plain_victim, clean, fit):
    images, labels = clean
    start = BoundStart(share=0.5, quantile=1.0)
    repaired = fit(
        learning(start=start, steps=1, check_every=1, learning_rate=0.1, lambda_={"initial": 0.0}), plain_victim, clean
    )
    network = BoundedNetwork(plain_victim, images[:1])
    start.apply(network, images, labels)
    F.cross_entropy(network(images), labels).backward()
    expected = [value.detach() - 0.1 * value.grad / (value.grad.abs() + 1e-8) for value in network.bound_parameters()]
    for value, wanted in zip(repaired.bound_parameters(), expected, strict=True):
        torch.testing.assert_close(value.detach(), wanted.clamp(min=0), rtol=1e-4, atol=1e-5)


def test_with_nothing_to_learn_it_stops_at_the_second_step(plain_victim, clean, fit):
    """Lambda 0 and bounds above all activations: no gradient, so two losses in a row are the same."""
    defense = learning(start=BoundStart(constant=1000.0), lambda_={"initial": 0.0}, tolerance=1e-4, steps=300, check_every=10)
    repaired = fit(defense, plain_victim, clean)
    assert defense.findings() == {"bound_steps": 2, "stopped_by": "tolerance", "relaxed": 0.0}
    assert all(torch.equal(value, torch.full_like(value, 1000.0)) for value in repaired.bounds_state().values())


@pytest.mark.parametrize(("tolerance", "steps"), [(None, 6), (1e-12, 6)])
def test_otherwise_it_takes_all_its_steps(victim, clean, fit, tolerance, steps):
    defense = learning(tolerance=tolerance, steps=steps, learning_rate=0.05)
    fit(defense, victim, clean)
    assert defense.findings() == {"bound_steps": steps, "stopped_by": "steps", "relaxed": 0.0}


@pytest.mark.parametrize("tolerance", [0, -1e-4])
def test_a_tolerance_that_is_none_is_refused(tolerance):
    with pytest.raises(UserError, match=r"^defense.tolerance must be positive or null, got"):
        learning(tolerance=tolerance)


def test_lambda_lowers_the_maximum_margin_of_every_class(victim, clean, fit):
    def largest_margins(lambda_):
        ascent = {"start_from": "noise", "starts_per_class": 8, "first_steps": 30, "steps": 10, "step_size": 0.05}
        settings = {"steps": 40, "check_every": 10, "learning_rate": 0.05, "ascent": ascent}
        repaired = fit(learning(lambda_={"initial": lambda_}, **settings), victim, clean)
        classes = torch.arange(4).repeat_interleave(8)
        starts = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(5))
        found = ascend_margins(repaired, classes, starts, steps=30, rule="sign", step_size=0.05)
        return margin(repaired(found.images), classes).view(4, 8).mean(1)

    assert (largest_margins(0.5) < largest_margins(0.0)).all()


def test_weights_and_batch_norm_statistics_stay_and_bounds_are_never_negative(victim, clean, fit):
    defense = learning(steps=30, check_every=10, learning_rate=0.5)
    repaired = fit(defense, victim, clean)
    before = frozen_state(BoundedNetwork(victim, clean[0][:1]))
    assert all(torch.equal(value, before[name]) for name, value in frozen_state(repaired).items())
    assert all((value >= 0).all() for value in repaired.bounds_state().values())
    assert not repaired.training


def test_rare_classes_gain_and_the_mean_rises(imbalanced, fit):
    """On a model of imbalanced data; MMAC, which keeps the model's behaviour, gains less (Table 4)."""
    model, clean, (images, labels) = imbalanced

    @torch.no_grad()
    def recalls(network):
        decisions = network(images).argmax(1)
        return torch.stack([(decisions[labels == label] == label).float().mean() for label in range(4)])

    before, after = recalls(model), recalls(fit(shipped(), model, clean))
    assert after.mean() > before.mean() + 0.05
    assert after[3] > before[3]
    assert before[0] - after[0] < after[3] - before[3]
    kept = recalls(fit(BoundLearning(), model, clean))
    assert kept.mean() < after.mean() - 0.01


def test_a_balanced_model_is_hardly_harmed(victim, fit, draw_quarters):
    """On images that nothing was learned from (paper 2, Table 5: 93.2 and 93.1 %)."""
    clean, (images, labels) = draw_quarters(200, seed=2), draw_quarters(2000, seed=3)
    with torch.no_grad():
        before = (victim(images).argmax(1) == labels).float().mean()
        after = (fit(shipped(), victim, clean)(images).argmax(1) == labels).float().mean()
    assert after >= before - 0.01


# -- where ---------------------------------------------------------------------------------------------------------------------


def test_bounds_of_a_resnet_32():
    """The paper's network: 31 activations with 1,136 bounds, of which the last has 64."""
    model = ResNet(10, blocks=(5, 5, 5), width=16, shortcut="pad").eval()
    network = BoundedNetwork(model, torch.rand(3, 32, 32))
    assert len(list(network.each())) == 31
    assert network.num_bounds == 1136
    last = BoundedNetwork(model, torch.rand(3, 32, 32), sites="last")
    assert last.num_bounds == 64
    assert [name for name, _ in last.each()] == [[name for name, _ in network.each()][-1]]


def test_the_last_activation_of_a_dense_network():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3)).eval()
    assert BoundedNetwork(model, torch.rand(3, 4, 4), sites="last").num_bounds == 7


def test_an_activation_of_the_logits_is_not_the_last():
    """As in SqueezeNet: the classifier is a convolution with a ReLU behind it."""
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.ReLU(), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    assert BoundedNetwork(model, torch.rand(3, 8, 8), sites="last").num_bounds == 5


@pytest.mark.parametrize("sites", [5, None, [1, 2]])
def test_sites_of_another_type_are_refused_at_once(sites):
    with pytest.raises(UserError, match=r"^defense.sites must be all, last, first_half or a list of names"):
        learning(sites=sites)


def test_offsets_need_an_image_of_every_class(victim, clean, fit):
    images, labels = clean
    kept = labels != 2
    with pytest.raises(UserError, match=r"^class 2 has no clean image: its offset cannot be learned$"):
        fit(shipped(), victim, (images[kept], labels[kept]))


def test_offsets_and_scale_start_at_the_best_fit_and_are_learned(victim, clean, fit):
    images, labels = clean
    start = BoundStart(share=0.6, quantile=1.0)
    network = BoundedNetwork(victim, images[:1], sites="last")
    start.apply(network, images, labels)
    scale, shift = fit_affine(network(images), labels, scale="shared", shift=True, l2=1e-6)
    settings = {"sites": "last", "start": start, "steps": 1, "check_every": 1, "lambda_": {"initial": 0.0}}
    repaired = fit(learning(offset_rate=1e-7, scale_rate=1e-7, learning_rate=1e-7, **settings), victim, clean)
    torch.testing.assert_close(repaired.offsets.value.double(), shift, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(repaired.offsets.scale.double(), scale, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(repaired(images), (network(images) * scale + shift).float(), rtol=1e-3, atol=1e-3)
    learned = fit(learning(offset_rate=0.05, scale_rate=0.1, learning_rate=0.5, **settings), victim, clean)
    moved = (learned.offsets.scale - repaired.offsets.scale).detach().abs()
    assert float(moved) == pytest.approx(0.1, rel=1e-2)  # Adam's first step


def test_offsets_and_scale_survive_in_the_bounds_state(victim, clean):
    network, twin = (BoundedNetwork(victim, clean[0][:1], offsets=True, scaled=True) for _ in range(2))
    with torch.no_grad():
        network.offsets.value.copy_(torch.arange(4.0))
        network.offsets.scale.fill_(0.5)
    twin.load_bounds(network.bounds_state())
    assert torch.equal(twin(clean[0]), network(clean[0]))
    torch.testing.assert_close(network(clean[0]), 0.5 * victim(clean[0]) + torch.arange(4.0))
    with network.unbounded():
        assert torch.equal(network(clean[0]), victim(clean[0]))
    without = BoundedNetwork(victim, clean[0][:1], offsets=True)
    with pytest.raises(UserError, match=r"^these bounds were learned with a scale of the logits: load them into .*scaled=True"):
        without.load_bounds(network.bounds_state())
    twin.load_bounds(without.bounds_state())  # of before there was a scale
    assert torch.equal(twin.offsets.scale.detach(), torch.ones(1))


def test_labels_that_contradict_the_model_give_no_scale(victim, clean, fit):
    images, _ = clean
    with torch.no_grad():
        unlikely = victim(images).argmin(1)
    unlikely[:4] = torch.arange(4)
    with pytest.raises(
        UserError, match=r"^the best temperature on the clean set is not positive .* set defense.scale_rate=null"
    ):
        fit(shipped(), victim, (images, unlikely))


def test_the_scale_stays_positive(victim, clean):
    network = BoundedNetwork(victim, clean[0][:1], offsets=True, scaled=True)
    with torch.no_grad():
        network.offsets.scale.fill_(-1.0)
    network.project_()
    assert bool((network.offsets.scale > 0).all())


def test_offsets_and_scale_can_be_switched_off(victim, clean, fit):
    repaired = fit(shipped("defense.offset_rate=null", "defense.scale_rate=null", "defense.steps=2"), victim, clean)
    assert repaired.offsets is None
    assert fit(shipped("defense.scale_rate=null", "defense.steps=2"), victim, clean).offsets.scale is None
    with pytest.raises(UserError, match=r"set defense.scale_rate=null too$"):
        shipped("defense.offset_rate=null")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"scale_rate": 0.0, "offset_rate": 0.1}, r"^defense.scale_rate must be positive or null, got 0.0$"),
        ({"scale_rate": 0.1}, r"^defense.scale_rate=0.1 needs defense.offset_rate, which is null"),
    ],
)
def test_a_scale_rate_that_does_not_fit_is_refused(settings, told):
    with pytest.raises(UserError, match=told):
        learning(**settings)


def test_minibatches_of_other_images_do_not_end_learning(victim, clean, fit):
    defense = learning(start=BoundStart(constant=1000.0), lambda_={"initial": 0.0}, tolerance=1e9, batch_size=7, steps=6)
    fit(defense, victim, clean)
    assert defense.findings() == {"bound_steps": 6, "stopped_by": "steps", "relaxed": 0.0}


def test_bounds_of_zero_make_all_images_alike(victim, clean):
    network = BoundedNetwork(victim, clean[0][:1], sites="last")
    with torch.no_grad():
        for value in network.bound_parameters():
            value.zero_()
    logits = network(clean[0])
    torch.testing.assert_close(logits, logits[:1].expand_as(logits))


@pytest.mark.parametrize("schedule", ["balanced", "balanced_paper"])
def test_shipped_schedules(schedule):
    defense = shipped(f"defense/schedule={schedule}")
    assert isinstance(defense.objective, MMOMObjective)
    assert defense.objective.reduction == "mean"
    assert (defense.steps, defense.lambda_.initial, defense.lambda_.control) == (300, 1e-5, "fixed")
    assert defense.tolerance == (1e-5 if schedule == "balanced" else 1e-4)
    assert defense.batch_size >= 1000  # all of 50 images a class in every step
    assert defense.sites == ("last" if schedule == "balanced" else "all")
    assert defense.ascent.network == "bounded"


def test_sum_of_n_margins_is_n_times_the_mean(victim, clean, fit):
    one = fit(learning(lambda_={"initial": 0.08}), victim, clean)
    other = fit(learning(lambda_={"initial": 0.01}, objective={"reduction": "sum"}), victim, clean)
    for name, value in one.bounds_state().items():
        torch.testing.assert_close(value, other.bounds_state()[name], rtol=1e-4, atol=1e-6)


def test_it_goes_on_from_an_interruption(interrupted_and_resumed, victim, clean, fit):
    def make():
        return learning(steps=8, check_every=2, tolerance=1e-9, learning_rate=0.05)

    straight = fit(make(), victim, clean)
    resumed, again = interrupted_and_resumed(make, victim, clean, at=5)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in straight.state_dict().items())
    assert again.findings() == {"bound_steps": 8, "stopped_by": "steps", "relaxed": 0.0}


def test_resuming_after_the_loss_came_to_rest_learns_nothing_more(victim, clean, fit, tmp_path):
    def make():
        return learning(start=BoundStart(constant=1000.0), lambda_={"initial": 0.0}, tolerance=1e-4, steps=300, check_every=10)

    def saving(epochs):
        saver = ModelCheckpoint(dirpath=tmp_path, filename="last", save_on_train_epoch_end=True, enable_version_counter=False)
        return silent_trainer(epochs, accelerator="cpu", enable_checkpointing=True, callbacks=[saver])

    through, again = make(), make()
    through.fit(victim, *clean, make_trainer=saving)
    again.fit(victim, *clean, make_trainer=saving, resume=tmp_path / "last.ckpt")
    assert again.history == through.history
    assert again.findings() == through.findings() == {"bound_steps": 2, "stopped_by": "tolerance", "relaxed": 0.0}
