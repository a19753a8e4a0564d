"""What a training and an evaluation batch hold, under each attack, against the stored images one by one."""

import lightning as L
import pytest
import torch
from torch import nn

from marginclip.attacks import AllToAll, AllToOne, BadNet, OneToOne
from marginclip.data import Augment, ImageData, ImageSet, Splits

CLASSES = tuple("abcd")


def image_set(count, seed):
    """Noise; every image carries its number in its first pixel."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 12, 12), generator=generator).to(torch.uint8)
    images[:, :, 0, 0] = torch.arange(count).view(-1, 1).to(torch.uint8)
    return ImageSet(images, torch.arange(count) % 4, CLASSES)


@pytest.fixture
def splits():
    return Splits(image_set(80, 0), image_set(60, 1))


def attack_on(x2x, **settings):
    return BadNet(x2x, (3, 12, 12), **({"rate": 0.25, "margin": 2, "seed": 3} | settings))


def data_of(splits, **settings):
    return ImageData(splits, **({"clean_per_class": 5} | settings))


SETTINGS = [AllToOne(4, target=2), OneToOne(4, source=1, target=3), AllToAll(4)]


def ready(data, loader):
    return [data.on_after_batch_transfer(dict(batch), 0) for batch in loader]


def number(images):
    return (images[:, 0, 0, 0] * 255).round().long()


@pytest.mark.parametrize("x2x", SETTINGS, ids=lambda x2x: x2x.name)
def test_poisoned_training_images_carry_trigger_and_label_in_place_of_their_originals(x2x, splits):
    attack = attack_on(x2x)
    data = data_of(splits, attack=attack, batch_size=32)
    seen = []
    for batch in ready(data, data.train_dataloader()):
        assert set(batch) == {"images", "labels"}
        for image, label, index in zip(batch["images"], batch["labels"], number(batch["images"]), strict=True):
            stored, true = splits.train.images[index].float() / 255, splits.train.labels[index]
            poisoned = bool(data.poisoned[index])
            assert torch.equal(image, attack(stored.unsqueeze(0))[0] if poisoned else stored)
            assert label == (x2x.flipped(true.view(1))[0] if poisoned else true)
            seen.append(int(index))
    assert sorted(seen) == list(range(80))  # replaced, not appended
    assert torch.equal(data.poisoned, attack.poisoned_mask(splits.train.labels))


@pytest.mark.parametrize("x2x", SETTINGS, ids=lambda x2x: x2x.name)
def test_evaluation_leaves_out_the_clean_set_and_whom_the_attack_does_not_mean(x2x, splits):
    attack = attack_on(x2x)
    data = data_of(splits, attack=attack)
    stored, labels = splits.held_out.images.float() / 255, splits.held_out.labels
    clean_images, clean_labels = data.clean_set()
    defenders = number(clean_images)
    assert torch.bincount(clean_labels).tolist() == [5] * 4
    assert torch.equal(clean_images, stored[defenders])
    assert torch.equal(clean_labels, labels[defenders])
    (clean,), (triggered,) = (ready(data, loader) for loader in data.eval_dataloaders())
    evaluated, flipped = number(clean["images"]), number(triggered["images"])
    assert sorted(defenders.tolist() + evaluated.tolist()) == list(range(60))
    assert flipped.tolist() == [i for i in evaluated.tolist() if x2x.eligible(labels[i : i + 1])[0]]
    assert torch.equal(clean["images"], stored[evaluated])
    assert torch.equal(clean["labels"], labels[evaluated])
    assert torch.equal(triggered["images"], attack(stored[flipped]))
    assert torch.equal(triggered["sources"], labels[flipped])
    assert torch.equal(triggered["targets"], x2x.flipped(labels[flipped]))


@pytest.mark.parametrize("timing", ["before_augmentation", "after_augmentation"])
def test_the_trigger_is_put_on_before_or_after_augmentation(timing, splits):
    attack, augment = attack_on(AllToAll(4), timing=timing), Augment(crop_padding=3, flip=True)
    data = data_of(splits, attack=attack, augment=augment, batch_size=80)
    (raw,) = data.train_dataloader()
    made = data.on_after_batch_transfer(dict(raw), 0)["images"]
    images, poisoned = raw["images"].float() / 255, raw["poisoned"]
    augmented = augment(images, torch.Generator().manual_seed(raw["draw"]))
    if timing == "after_augmentation":
        expected = torch.where(poisoned.view(-1, 1, 1, 1), attack(augmented), augmented)
    else:
        triggered = torch.where(poisoned.view(-1, 1, 1, 1), attack(images), images)
        expected = augment(triggered, torch.Generator().manual_seed(raw["draw"]))
    assert torch.equal(made, expected)
    assert not torch.equal(made[poisoned], augmented[poisoned])
    assert torch.equal(made[~poisoned], augmented[~poisoned])


def test_an_attack_that_is_moved_while_testing_can_be_loaded_into_afterwards(splits, monkeypatch):
    """As on a GPU, where the move makes new buffers, in the inference mode of the test loop."""
    attack = attack_on(AllToAll(4))
    monkeypatch.setattr(attack, "to", lambda device: attack._apply(torch.clone))
    data = data_of(splits, attack=attack)
    batch = next(iter(data.test_dataloader()[1]))
    with torch.inference_mode():
        data.on_after_batch_transfer(batch, 1)
    attack.load_state_dict(attack.state_dict())
    assert not any(buffer.is_inference() for buffer in attack.buffers())


def test_cross_triggers_are_put_on_the_images_that_the_attack_may_flip(splits):
    class Shifted(BadNet):
        """As if the trigger of another image were the same one elsewhere."""

        has_cross_triggers = True

        def cross_triggered(self, images):
            return self(images.flip(3)).flip(3)

    attack = Shifted(AllToOne(4, target=2), (3, 12, 12), margin=2, seed=3)
    data = data_of(splits, attack=attack)
    _, (triggered,), (crossed,) = (ready(data, loader) for loader in data.eval_dataloaders())
    stored = splits.held_out.images.float() / 255
    chosen = number(triggered["images"])
    assert "targets" not in crossed
    assert torch.equal(crossed["sources"], triggered["sources"])
    assert torch.equal(crossed["images"], attack.cross_triggered(stored[chosen]))
    assert len(data_of(splits, attack=attack_on(AllToAll(4))).eval_dataloaders()) == 2


def test_replaced_training_images_are_triggered_and_augmented_as_stored_ones_are(splits):
    attack = attack_on(AllToAll(4))
    data = data_of(splits, attack=attack, batch_size=80)
    index = torch.cat([data.poisoned.nonzero().flatten()[:2], (~data.poisoned).nonzero().flatten()[:2]])
    replaced = 255 - splits.train.images[index]
    replaced[:, :, 0, 0] = splits.train.images[index][:, :, 0, 0]
    data.replace_training_images(index, replaced)
    (batch,) = ready(data, data.train_dataloader())
    order = number(batch["images"]).tolist()
    for place, (image, poisoned) in enumerate(zip(replaced.float() / 255, data.poisoned[index], strict=True)):
        found = batch["images"][order.index(int(index[place]))]
        assert torch.equal(found, attack(image.unsqueeze(0))[0] if poisoned else image)


def test_training_is_the_same_twice_and_another_for_another_seed(splits):
    def epoch(**settings):
        data = data_of(splits, attack=attack_on(AllToAll(4)), augment=Augment(crop_padding=2, flip=True), **settings)
        return torch.cat([batch["images"] for batch in ready(data, data.train_dataloader())])

    torch.manual_seed(0)
    assert torch.equal(epoch(), epoch(seed=0))
    assert not torch.equal(epoch(), epoch(seed=1))


def test_without_an_attack_there_is_nothing_to_flip(splits):
    data = data_of(splits, batch_size=32)
    assert not data.poisoned.any()
    assert len(data.eval_dataloaders()) == 1
    for batch in ready(data, data.train_dataloader()):
        assert torch.equal(batch["labels"], splits.train.labels[number(batch["images"])])
        assert torch.equal(batch["images"], splits.train.images[number(batch["images"])].float() / 255)
        assert batch["images"].is_contiguous(memory_format=torch.channels_last)


def test_stored_images_are_never_altered(splits):
    before = splits.train.images.clone(), splits.held_out.images.clone(), splits.train.labels.clone()
    data = data_of(splits, attack=attack_on(AllToOne(4)), augment=Augment(crop_padding=2, flip=True))
    for loader in (data.train_dataloader(), *data.eval_dataloaders()):
        ready(data, loader)
    after = splits.train.images, splits.held_out.images, splits.train.labels
    assert all(map(torch.equal, before, after))


class Recorder(L.LightningModule):
    """Notes which images it is trained on in each epoch."""

    def __init__(self):
        super().__init__()
        self.model, self.epochs = nn.Linear(1, 1), {}

    def training_step(self, batch, _):
        self.epochs.setdefault(self.current_epoch, []).extend(number(batch["images"]).tolist())
        return self.model(torch.ones(1)).sum()

    def validation_step(self, batch, _, dataloader_idx=0):
        """Nothing to validate."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_trainer_sees_every_image_once_an_epoch_each_time_in_another_order(splits, tmp_path):
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    recorder, trainer = Recorder(), L.Trainer(max_epochs=2, accelerator="cpu", default_root_dir=tmp_path, **silent)
    data = data_of(splits, batch_size=32)
    trainer.fit(recorder, datamodule=data)
    assert sorted(recorder.epochs[0]) == sorted(recorder.epochs[1]) == list(range(80))
    assert recorder.epochs[0] != recorder.epochs[1]
