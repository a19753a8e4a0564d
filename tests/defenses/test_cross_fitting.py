"""Cross-fitting: every image is judged by bounds that never saw it. And the control that learns nothing."""

import pytest
import torch
from torch import nn

from marginclip.defenses import MMAC, AscentPlan, FineTune, StaticClip, cross_fitted_logits
from marginclip.defenses.clipping.settings import BoundStart
from marginclip.defenses.cross_fitting import stratified_folds, stratified_share
from marginclip.errors import UserError
from marginclip.networks.logits import clean_logits


class Noting(StaticClip):
    """Static clipping that remembers the images that it was given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def fit(self, model, images, labels, **settings):
        self.seen.append(images)
        return super().fit(model, images, labels, **settings)


def test_folds_are_balanced_within_classes_and_seeded():
    labels = torch.arange(50) % 4
    fold = stratified_folds(labels, 3, seed=0)
    for label in range(4):
        counts = torch.bincount(fold[labels == label], minlength=3)
        assert int(counts.max() - counts.min()) <= 1
    assert torch.equal(fold, stratified_folds(labels, 3, seed=0))
    assert not torch.equal(fold, stratified_folds(labels, 3, seed=1))


@pytest.mark.parametrize(("share", "expected"), [(0.2, 10), (0.3, 15), (0.35, 18), (0.4, 20), (1 / 3, 17), (0.001, 1)])
def test_a_share_of_every_class_is_chosen_and_seeded(share, expected):
    labels = torch.arange(200) % 4
    chosen = stratified_share(labels, share, seed=0)
    assert [int(chosen[labels == label].sum()) for label in range(4)] == [expected] * 4
    assert torch.equal(chosen, stratified_share(labels, share, seed=0))
    assert not torch.equal(chosen, stratified_share(labels, share, seed=1))


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_the_share_of_one_fold_is_the_first_fold(folds):
    labels = torch.arange(101) % 3
    assert torch.equal(stratified_share(labels, 1 / folds, seed=4), stratified_folds(labels, folds, seed=4) == 0)


@pytest.mark.parametrize("folds", [2, 3])
def test_logits_come_from_bounds_that_never_saw_the_image(victim, clean, folds):
    images, labels = clean
    noting = Noting()
    logits = cross_fitted_logits(noting, victim, images, labels, folds=folds, seed=4)
    fold = stratified_folds(labels, folds, seed=4)
    assert len(noting.seen) == folds
    for number, seen in enumerate(noting.seen):
        assert torch.equal(seen, images[fold != number])
        alone = StaticClip().fit(victim, images[fold != number], labels[fold != number]).network
        torch.testing.assert_close(logits[fold == number], alone(images[fold == number]).detach(), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits, clean_logits(StaticClip().fit(victim, images, labels).network, images))


def steps_of(victim, images, labels, **settings):
    """The sizes of the batches that a short repair sends through the network with gradients, clean images and margin inputs."""
    sizes = []

    class Watched(MMAC):
        def _bounded_logits(self, rows):
            if torch.is_grad_enabled():
                sizes.append((len(rows), len(self.margin_inputs)))
            return super()._bounded_logits(rows)

    plan = AscentPlan(starts_per_class=4, steps=1, first_steps=1, max_inputs=100)
    defense = Watched(steps=4, extra_steps=0, check_every=4, batch_size=10, ascent=plan)
    cross_fitted_logits(defense, victim, images, labels, **settings)
    assert (defense.batch_size, defense.ascent) == (10, plan)  # as they were
    return sizes


@pytest.mark.parametrize(("folds", "clean_images", "inputs"), [(2, 5, 8), (5, 8, 16)])
def test_a_fold_takes_as_many_steps_on_as_many_fewer_images_as_its_clean_set_is_smaller(
    victim, clean, folds, clean_images, inputs
):
    images, labels = clean
    assert int(labels.max()) == 3
    sizes = steps_of(victim, images, labels, folds=folds)
    assert len(sizes) == 4 * folds
    assert max(size for size, _ in sizes) == clean_images
    assert {margin for _, margin in sizes} == {inputs}


def test_one_fold_is_no_cross_fitting(victim, clean):
    with pytest.raises(UserError, match="at least 2 folds, got 1"):
        cross_fitted_logits(StaticClip(), victim, *clean, folds=1)


def test_static_clip_cuts_at_the_share_of_the_clean_maximum(plain_victim, clean):
    images, labels = clean
    repaired = StaticClip(start=BoundStart(share=0.25, quantile=1.0)).fit(plain_victim, images, labels).network
    with torch.no_grad():
        first = plain_victim[:3](images)
    uppers = [bound.upper for _, bound in repaired.each()]
    torch.testing.assert_close(uppers[0].detach(), 0.25 * first.amax((0, 2, 3)))
    clipped = torch.minimum(first, uppers[0].view(1, -1, 1, 1))
    second = torch.minimum(plain_victim[3:6](clipped), uppers[1].view(1, -1, 1, 1))
    third = torch.minimum(plain_victim[6:9](second), uppers[2])
    torch.testing.assert_close(repaired(images), plain_victim[9](third), atol=1e-5, rtol=1e-5)


class Squeezed(nn.Module):
    """Right for every batch of more than one image."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Conv2d(1, 6, 3), nn.Linear(6, 4)

    def forward(self, images):
        return self.last(nn.functional.adaptive_avg_pool2d(self.first(images).relu(), 1).squeeze())


@pytest.mark.parametrize("defense", [StaticClip(start=BoundStart()), MMAC(steps=2, extra_steps=0), FineTune(epochs=1)])
def test_models_that_squeeze_a_batch_of_one_away(clean, defense):
    images = clean[0]
    model = Squeezed().eval()
    labels = clean_logits(model, images).argmax(1)
    assert cross_fitted_logits(defense, model, images, labels).shape == (len(images), 4)
    torch.testing.assert_close(clean_logits(model, images[:1]), clean_logits(model, images)[:1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images, labels: (images, labels.float()), "labels must be whole numbers"),
        (lambda images, labels: (images, labels[:, None]), r"labels must be whole numbers of shape \(N,\)"),
        (lambda images, labels: (images, labels.bool()), "labels must be whole numbers"),
        (lambda images, labels: ((images * 255).byte(), labels), "divide bytes by 255"),
        (lambda images, labels: (images / 0 * 0, labels), "images must be finite"),
    ],
)
def test_wrong_clean_sets_get_one_sentence(victim, clean, change, message):
    with pytest.raises(UserError, match=message):
        cross_fitted_logits(StaticClip(), victim, *change(*clean))


def test_a_fold_of_warm_starts_keeps_inputs_of_all_classes():
    plan = AscentPlan(warm_start=True, starts_per_class=1).in_proportion(0.5)
    assert torch.equal(plan.classes(60), torch.arange(60))
    assert AscentPlan().in_proportion(0.5).max_inputs == 50
