"""The automatic choice: the statistics against slow versions, the rule in every branch, and whole runs on models of known fault."""

from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import ModelCheckpoint
from scipy.stats import binomtest
from torch import nn

from marginclip.clipping import BoundedNetwork
from marginclip.defenses import MMAC, MMOM, Auto, BoundLearning, BoundStart
from marginclip.defenses.choosing.evidence import Evidence, Paired, Rule, compare, sign_test
from marginclip.errors import UserError
from marginclip.experiment.command import plain
from marginclip.experiment.spec import run_spec
from marginclip.experiment.stages import make_methods
from marginclip.maxmargin import LambdaController, MaximumMargins, MaximumMarginTest
from marginclip.silence import silent_trainer


def make_defense(config):
    """The defense of a composed configuration."""
    return make_methods(run_spec(plain(config))).defense


CONF = Path(__file__).parents[2] / "conf"
QUICK = partial(MaximumMarginTest, starts=10, steps=60)


# -- the statistics -----------------------------------------------------------------------------------------------------------


def test_sign_test_by_enumeration():
    for tosses in range(9):
        results = [sum(sides) for sides in product((0, 1), repeat=tosses)]
        for more in range(tosses + 1):
            expected = sum(heads >= more for heads in results) / len(results)
            assert sign_test(more, tosses - more) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("more", "fewer"), [(0, 0), (37, 0), (12, 31), (900, 800)])
def test_sign_test_is_scipys(more, fewer):
    expected = binomtest(more, more + fewer, alternative="greater").pvalue if more + fewer else 1.0
    assert sign_test(more, fewer) == pytest.approx(expected, rel=1e-9)


def test_compare_equals_a_loop():
    generator = torch.Generator().manual_seed(0)
    before, after = torch.rand(2, 50, generator=generator) < 0.5
    pairs = list(zip(before.tolist(), after.tolist(), strict=True))
    found = compare(before, after)
    assert (found.more, found.fewer, found.total) == (pairs.count((False, True)), pairs.count((True, False)), 50)
    assert found.change == pytest.approx(float(after.float().mean() - before.float().mean()))
    assert found.rise_p_value == sign_test(found.more, found.fewer)
    assert found.fall_p_value == compare(after, before).rise_p_value


@pytest.mark.parametrize(
    ("wrong", "missed", "errors", "over_predicted", "by_even_spread"), [(23, 21, 96, False, True), (27, 1, 201, True, False)]
)
def test_over_prediction_is_told_from_confusable_classes(wrong, missed, errors, over_predicted, by_even_spread):
    """The counts of docs/methods/auto.md on 500 images: "cat" of a balanced model and "car" of an imbalanced one.

    That errors spread evenly over the other nine classes, as a plain binomial test has it, would take each for the other.
    """
    assert Paired(wrong, missed, 500).rises(0.05) is over_predicted
    assert bool(binomtest(wrong, errors - missed, 1 / 9, alternative="greater").pvalue <= 0.05) is by_even_spread


# -- the rule -----------------------------------------------------------------------------------------------------------------

GAIN, NO_GAIN, SMALL_GAIN = Paired(40, 10, 500), Paired(12, 11, 500), Paired(9, 5, 500)
COST, NO_COST = Paired(5, 40, 500), Paired(5, 12, 500)
OVER, NOT_OVER = Paired(31, 5, 500), Paired(4, 8, 500)


def margins(detected):
    """A verdict of MM-BD that suspects class 3."""
    return MaximumMargins(torch.arange(4.0), 0.004 if detected else 0.4, 3, detected, 0.1, 1.0, 1.0)


@pytest.mark.parametrize(
    ("mmom", "detected", "suspect", "mmac", "keep", "said"),
    [
        (NO_GAIN, False, OVER, None, "none", ["+0.2 points", "1 and p <= 0.05", "no backdoor (p = 0.4)"]),
        (SMALL_GAIN, False, OVER, None, "none", ["+0.8 points (p = 0.21)"]),
        (GAIN, False, OVER, None, "mmom", ["+6.0 points (p = 1.2e-05)", "no backdoor (p = 0.4)"]),
        (GAIN, True, OVER, None, "mmom", ["class 3 (p = 0.004)", "31 images wrongly", "5 missed", "explains"]),
        (GAIN, True, NOT_OVER, NO_COST, "mmac", ["class 3 (p = 0.004)", "8 missed", "-1.4 points", "would also have gained"]),
        (NO_GAIN, True, NOT_OVER, NO_COST, "mmac", ["class 3 (p = 0.004)", "does not gain enough", "+0.2 points"]),
        (NO_GAIN, True, OVER, NO_COST, "mmac", ["31 images wrongly", "does not gain enough"]),
        (NO_GAIN, True, NOT_OVER, COST, "none", ["-7.0 points", "costs too much", "may have a backdoor"]),
        (GAIN, True, NOT_OVER, COST, "mmom", ["-7.0 points", "costs too much", "+6.0 points", "does not rule a backdoor out"]),
    ],
)
def test_every_branch_and_its_reason(mmom, detected, suspect, mmac, keep, said):
    evidence = Evidence(mmom, margins(detected), suspect, mmac)
    assert Rule().wants_mmac(evidence) is (mmac is not None)
    decision = Rule().decide(evidence)
    assert decision.keep == keep
    assert [words for words in said if words not in decision.reason] == []
    assert "\n" not in decision.reason and not decision.reason.endswith(".")


def test_thresholds_are_met_from_where_they_are():
    five = Paired(5, 0, 500)  # p = 1 / 32, a gain of 1 %
    assert five.rises(1 / 32, 0.01)
    assert not five.rises(0.031, 0.01)
    assert not five.rises(0.05, 0.0101)
    assert not Paired(0, 0, 500).rises(0.05)
    assert Paired(0, 5, 500).falls(0.05, 0.01) and not five.falls(0.05)


@pytest.mark.parametrize("alpha", [0.01, 0.001])
def test_a_stricter_level_keeps_less(alpha):
    mmom = Paired(20, 7, 500)  # p = 0.0096
    keep = [Rule(alpha=level).decide(Evidence(mmom, margins(False), OVER)).keep for level in (0.05, alpha)]
    assert keep == ["mmom", "mmom" if alpha == 0.01 else "none"]


# -- whole runs ---------------------------------------------------------------------------------------------------------------


def stub_margins(detected, suspect):
    """An MM-BD that reports what it is told to."""

    def make(seed):
        def judge(model, image_shape, num_classes, *, autocast):
            return MaximumMargins(torch.ones(num_classes), 0.01 if detected else 0.5, suspect, detected, 0.01, 1.0, 1.0)

        return judge

    return make


@pytest.fixture
def unfair(imbalanced):
    """A model of imbalanced data, and 100 balanced clean images of each class: with 50 the gain is not always significant."""
    model, _, (images, labels) = imbalanced
    return model, (images[:400], labels[:400])


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def chosen():
    """The whole result of an automatic choice on the CPU in full precision."""

    def chosen(auto, model, clean):
        return auto.fit(model, *clean, make_trainer=lambda epochs: silent_trainer(epochs, accelerator="cpu"))

    return chosen


def test_an_imbalanced_model_gets_mmom(unfair, fit, chosen, caplog):
    model, clean = unfair
    short = partial(MMOM, steps=60)
    before, auto = state(model), Auto(detection=QUICK, mmom=short, seed=1)
    with caplog.at_level("INFO", logger="marginclip"):
        result = chosen(auto, model, clean)
    assert result.findings["decision"] == "mmom"
    assert same(state(model), before)
    assert same(state(result.network), state(fit(short(seed=1), model, clean)))
    assert caplog.messages[-1] == f"defense=auto keeps mmom: {result.findings['reason']}"
    assert result.history and result.findings["repair"]["bound_steps"] > 1


def test_a_balanced_model_is_left_as_it_is(victim, clean, chosen):
    auto = Auto(detection=QUICK)
    result = chosen(auto, victim, clean)
    assert result.findings["decision"] == "none"
    assert same(state(result.network), state(victim))
    assert torch.equal(result.network(clean[0]), victim(clean[0]))
    assert result.history == []


def tenths(count, seed):
    """Noisy images (count, 1, 8, 8) of ten fixed patterns, and the numbers of their patterns."""
    labels, generator = torch.arange(count) % 10, torch.Generator().manual_seed(seed)
    patterns = (torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(99)) > 0.5).float()
    return torch.rand(count, 1, 8, 8, generator=generator) * 0.7 + 0.3 * patterns[labels], labels


def triggered(images):
    images = images.clone()
    images[..., -2:, -2:] = torch.eye(2)
    return images


@pytest.fixture(scope="module")
def backdoored():
    """A network that learned ten patterns, and class 3 from a corner of four pixels on a tenth of its images."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Flatten(), nn.Linear(192, 24), nn.ReLU(), nn.Linear(24, 10),
    )  # fmt: skip
    images, labels = tenths(600, seed=1)
    poisoned = torch.rand(600, generator=torch.Generator().manual_seed(5)) < 0.1
    images[poisoned], labels[poisoned] = triggered(images[poisoned]), 3
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(80):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_a_backdoored_model_gets_mmac(backdoored, fit, chosen):
    new, labels = tenths(500, seed=7)
    with torch.no_grad():
        assert (backdoored(new).argmax(1) == labels).float().mean() > 0.9
        assert (backdoored(triggered(new)).argmax(1) == 3).float().mean() > 0.9
    short = {"mmom": partial(MMOM, steps=40), "mmac": partial(MMAC, steps=30, extra_steps=0)}
    clean, auto = tenths(200, seed=2), Auto(detection=QUICK, **short)
    result = chosen(auto, backdoored, clean)
    found = result.findings
    assert found["decision"] == "mmac"
    assert found["detection"]["suspect"] == 3
    assert f"p = {found['detection']['p_value']:.2g}" in found["reason"]
    assert set(found["seconds"]) == {"detection", "mmom_out_of_fold", "mmac_out_of_fold", "repair"}
    assert found["mmac"]["images"] == 200
    assert same(state(result.network), state(fit(short["mmac"](), backdoored, clean)))
    assert result.arrays["auto/maximum_margins"].argmax() == 3


@pytest.mark.parametrize(("suspect", "keep"), [(0, "mmom"), (3, "mmac")])
def test_both_faults_seem_to_be_there(unfair, chosen, suspect, keep):
    """A large margin of the common class, which is over-predicted, is imbalance; that of the rarest class is not."""
    model, clean = unfair
    short = {"mmom": partial(MMOM, steps=40), "mmac": partial(MMAC, steps=20, extra_steps=0)}
    auto = Auto(detection=stub_margins(True, suspect), max_cost=0.5, **short)
    assert isinstance((result := chosen(auto, model, clean)).network, BoundedNetwork)
    assert result.findings["decision"] == keep
    assert ("would also have gained" in result.findings["reason"]) is (keep == "mmac")
    assert (result.findings["mmac"] is None) is (keep == "mmom")


class Ruin(BoundLearning):
    """A repair that decides for class 0, whatever it sees."""

    def repaired(self):
        network = super().repaired()
        with torch.no_grad():
            for value in network.bound_parameters():
                value.zero_()
        return network


def test_a_repair_that_costs_accuracy_is_not_kept(victim, clean, chosen):
    auto = Auto(detection=stub_margins(True, 2), mmac=partial(Ruin, steps=2, check_every=1))
    result = chosen(auto, victim, clean)
    assert result.findings["decision"] == "none"
    assert result.findings["mmac"]["p_cost"] < 0.05
    assert same(state(result.network), state(victim))


def test_repairs_share_no_state(victim, clean, fit):
    """The partial of a configuration holds one controller of lambda; every fold starts from its first value all the same."""
    lambda_ = LambdaController(control="agreement", min_agreement=0.5)
    short = partial(BoundLearning, lambda_=lambda_, steps=4, check_every=2)
    auto = Auto(detection=stub_margins(True, 1), mmac=short, mmom=short, max_cost=1.0)
    fit(auto, victim, clean)
    assert (lambda_.value, lambda_.checks) == (0.3, 0)
    assert auto.repairs["mmac"].lambda_.checks == 2
    assert auto.repairs["mmac"].lambda_ is not auto.repairs["mmom"].lambda_


def test_nested_repairs_run_in_the_precision_of_the_trainer(victim, clean):
    seen = []

    class Watch(BoundLearning):
        def on_fit_start(self):
            super().on_fit_start()
            seen.append(self.trainer.precision)

    def watching(seed):
        def judge(model, image_shape, num_classes, *, autocast):
            seen.append(autocast)
            return margins(False)

        return judge

    auto = Auto(detection=watching, mmom=partial(Watch, steps=2, check_every=1))
    auto.fit(victim, *clean, make_trainer=lambda epochs: silent_trainer(epochs, accelerator="cpu", precision="bf16-mixed"))
    assert seen == [torch.bfloat16, "bf16-mixed", "bf16-mixed"]


# -- settings -----------------------------------------------------------------------------------------------------------------


def shipped(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return make_defense(compose("defend", overrides=[*overrides, "seed=4"]))


def settings(learning):
    """The settings of bound learning as plain values, without what Lightning and torch keep beside them."""
    skipped = {"history", "checked", "last_loss"}
    found = {name: value for name, value in vars(learning).items() if not name.startswith("_") and name not in skipped}
    return found | {name: vars(found[name]) for name in ("lambda_",)} | {"objective": vars(found["objective"])}


@pytest.mark.parametrize("repair", ["mmac", "mmom"])
def test_the_shipped_repairs_are_those_of_their_own_defenses(repair):
    """Also without Hydra, but for the start that a data set asks for."""
    of_auto = shipped("defense=auto", "dataset=cifar10").repairs[repair]
    assert settings(of_auto) == settings(shipped(f"defense={repair}", "dataset=cifar10"))
    assert settings(of_auto) == settings(Auto(seed=4).repairs[repair])


def test_the_runs_seed_reaches_every_part():
    auto = shipped("defense=auto")
    assert (auto.seed, auto.margin_test) == (4, MaximumMarginTest(seed=4))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"folds": 1}, "defense.folds must be at least 2, got 1"),
        ({"alpha": 0}, r"defense.alpha must be in \(0, 1\), got 0"),
        ({"min_gain": -0.1}, r"defense.min_gain must be in \[0, 1\), got -0.1"),
        ({"max_cost": 2}, r"defense.max_cost must be in \[0, 1\], got 2"),
        ({"mmac": partial(BoundLearning, steps=0)}, "defense.mmac: defense.steps must be at least 1, got 0"),
        (
            {"mmom": partial(BoundLearning, keep="all")},
            "defense.mmom: defense.keep must be one of feasible, best, last, got 'all'",
        ),
        ({"detection": partial(MaximumMarginTest, alpha=1.5)}, r"defense.detection: detect.alpha must be in \(0, 1\), got 1.5"),
    ],
)
def test_bad_settings_are_told_before_anything_is_computed(setting, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        Auto(**setting)


def test_too_few_images_or_classes_are_refused(victim, clean):
    images, labels = clean
    with pytest.raises(
        UserError, match=r"^defense.folds=7 needs at least 7 clean images of every class, got 6: raise clean_per_class$"
    ):
        Auto(folds=7).fit(victim, images, labels)
    two = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    with pytest.raises(UserError, match=r"needs at least 3 classes, got 2; choose defense=mmac or defense=mmom$"):
        Auto().fit(two, images, labels % 2)


def test_it_can_be_done_again_from_its_checkpoint(victim, clean, tmp_path):
    """A run that ends after the examination, in the evaluation, examines once more and finds the same."""

    def saving(epochs):
        saver = ModelCheckpoint(dirpath=tmp_path, filename="last", save_on_train_epoch_end=True, enable_version_counter=False)
        return silent_trainer(epochs, accelerator="cpu", enable_checkpointing=True, callbacks=[saver])

    short = partial(BoundLearning, steps=2, check_every=1)
    auto = [Auto(detection=stub_margins(True, 1), mmac=short, mmom=short, max_cost=1.0) for _ in range(2)]
    first = auto[0].fit(victim, *clean, make_trainer=saving)
    again = auto[1].fit(victim, *clean, make_trainer=saving, resume=tmp_path / "last.ckpt")
    assert same(state(first.network), state(again.network))
    assert first.findings["reason"] == again.findings["reason"]


def test_a_fold_of_auto_learns_its_repairs_in_proportion():
    auto = Auto()
    with auto.in_proportion(0.5, 19):
        mmac, mmom = auto.repairs["mmac"], auto.repairs["mmom"]
        assert (mmac.batch_size, mmac.part, mmac.start) == (50, 0.5, BoundStart().decided(19))
        assert mmom.part == 0.5
        with auto.in_proportion(0.5, 50):  # its own folds
            assert (mmac.part, mmac.start) == (0.25, BoundStart().decided(19))
    assert (mmac.batch_size, mmac.part, mmac.start, mmom.part) == (100, 1, BoundStart(), 1)
