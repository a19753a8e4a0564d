"""Several devices train a victim and nothing else; CPU processes stand in for GPUs. What a victim and a run depend on."""

from dataclasses import replace

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from marginclip.errors import UserError
from marginclip.experiment import recipe
from marginclip.experiment.fitting import fit_resumably
from marginclip.experiment.process import prepare_process
from marginclip.experiment.recipe import find_surrogate, find_victim, run_folder
from marginclip.experiment.recording import opened_record
from marginclip.experiment.run import defend
from marginclip.experiment.setup import build_setup
from marginclip.experiment.trainers import build_trainer, first_device, num_devices
from marginclip.experiment.victim import obtain_victim
from marginclip.silence import silent_trainer
from marginclip.training import AdaptiveTraining

TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true")


def test_a_run_on_two_devices(configure):
    """Both processes' images count: the victim has learned, its weights came back, and the repair took one device."""
    spec = configure(*TWO, "attack=badnet", "training.epochs=12", "training.batch_size=32", "attack.timing=after_augmentation")
    record = defend(spec)
    assert record.status == "done"
    victim = find_victim(spec)
    assert victim.record["recipe"]["devices"] == 2
    before = build_setup(spec).model.state_dict()
    after = load_file(victim.weights)
    assert not any(torch.equal(after[name], value) for name, value in before.items() if name.endswith("conv1.weight"))
    steps = victim.record["recipe"]["training"]["epochs"] * -(-len(build_setup(spec).splits.train.labels) // 64)
    assert int(after["bn1.num_batches_tracked"]) == steps
    assert victim.record["metrics"]["acc"] > 0.6
    assert not victim.checkpoint.exists()


SLURM_STEP = {
    "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "marginclip", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "1",
    "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "node7",
}  # fmt: skip


@pytest.fixture
def slurm_step(monkeypatch):
    """The variables of a process that srun started, which Lightning would take for those of its own processes."""
    for name, value in SLURM_STEP.items():
        monkeypatch.setenv(name, value)


def test_two_processes_in_a_slurm_step_train_the_victim_of_one(configure, slurm_step):
    """Batches of 16 images each are the batches of 32 of one process; sums are taken in another order, so rounding differs alone."""
    plain = ["attack=none", "dataset.augment.crop_padding=0", "dataset.augment.flip=false", "+trainer.limit_train_batches=6"]
    weights, start = [], None
    for devices in (["training.batch_size=32"], [*TWO, "training.batch_size=16"]):
        spec = configure(*plain, *devices)
        torch.manual_seed(5)
        setup = build_setup(spec)
        pixels = int(torch.tensor(setup.splits.image_shape).prod())
        network = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 12), nn.Tanh(), nn.Linear(12, 10))  # no statistics of batches
        setup = replace(setup, model=network)
        start = network[1].weight.detach().clone()
        obtain_victim(spec, setup)
        weights.append(load_file(find_victim(spec).weights))
    one, two = weights
    assert (one["1.weight"] - start).abs().max() > 0.05
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)


def test_a_slurm_step_is_not_taken_for_lightnings_own(configure, slurm_step, tmp_path):
    """Neither for a Trainer of a command nor for one inside a repair, whatever number of tasks the step has."""
    quiet = {"logger": False, "enable_checkpointing": False}
    for trainer in (build_trainer(configure(*TWO).trainer, tmp_path, spread="ddp_spawn", **quiet), silent_trainer(2)):
        assert type(trainer._accelerator_connector.cluster_environment) is LightningEnvironment
    assert num_devices(configure(*TWO).trainer) == 2


def test_networks_that_take_turns_on_two_devices(configure):
    """Input-aware: no step has gradients for all three networks, and those of the trigger come back too."""
    spec = configure(*TWO, "attack=input_aware", "attack.mask_epochs=1", "attack.width=4", "training.batch_size=32")
    setup = build_setup(spec)
    before = {name: value.clone() for name, value in setup.attack.state_dict().items()}
    obtain_victim(spec, setup)
    after = setup.attack.state_dict()
    for network in {name.partition(".")[0] for name in before if name.endswith("weight")}:
        assert any(not torch.equal(value, after[name]) for name, value in before.items() if name.startswith(network))


def test_further_settings_act_where_a_training_takes_one_device(configure, monkeypatch):
    spec = configure("attack=adaptive", "+trainer.gradient_clip_val=1")
    setup, made = build_setup(configure("attack=none")), []

    class EnoughError(Exception):
        pass

    def stop(trainer, *_, **__):
        made.append(trainer)
        raise EnoughError

    monkeypatch.setattr("lightning.Trainer.fit", stop)
    with pytest.raises(EnoughError):
        fit_resumably(spec, find_victim(spec), AdaptiveTraining(setup.model, optimizer=torch.optim.SGD), setup.data, {})
    assert made[0].gradient_clip_val == 1


@pytest.mark.parametrize("devices", ["'1'", "1"])
def test_one_device_needs_no_process_of_its_own(configure, tmp_path, devices):
    spec = configure("trainer.accelerator=cpu", f"trainer.devices={devices}")
    trainer = build_trainer(spec.trainer, tmp_path, spread="ddp_spawn", logger=False, enable_checkpointing=False)
    assert trainer.num_devices == 1
    assert type(trainer.strategy).__name__ == "SingleDeviceStrategy"


def test_a_mistake_in_a_process_is_told_in_one_sentence(configure):
    spec = configure(*TWO, "attack=none", "training.optimizer.lr=1e30", "training.scheduler=null", "training.batch_size=8")
    with pytest.raises(UserError, match=r"^training diverged: the loss is \S+; try a lower training.optimizer.lr$"):
        obtain_victim(spec, build_setup(spec))


def test_the_training_with_a_bounded_copy_takes_one_device(configure):
    spec, setup = configure(*TWO, "attack=adaptive"), build_setup(configure("attack=none"))
    training = AdaptiveTraining(setup.model, optimizer=torch.optim.SGD)
    with pytest.raises(UserError, match=r"^attack=adaptive trains on one device, got trainer.devices=2$"):
        fit_resumably(spec, find_victim(spec), training, setup.data, {})


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed"])
def test_strategies_that_start_the_command_again_are_refused(configure, strategy):
    message = f"^trainer.strategy='{strategy}' starts the whole command once more"
    with pytest.raises(UserError, match=message):
        configure(*TWO, f"trainer.strategy={strategy}")


def test_one_device_for_all_but_the_training(configure, tmp_path):
    spec = configure(*TWO)
    quiet = {"logger": False, "enable_checkpointing": False}
    assert build_trainer(spec.trainer, tmp_path, **quiet).num_devices == 1
    assert build_trainer(spec.trainer, tmp_path, spread="ddp_spawn", **quiet).num_devices == 2
    assert num_devices(spec.trainer) == 2
    assert num_devices(configure().trainer) == 1


@pytest.mark.parametrize(
    ("devices", "first"), [(1, 1), (4, 1), (-1, 1), ("auto", 1), ("3", 1), ([2, 3], [2]), ("2,3", [2]), ("0,", [0])]
)
def test_first_device(devices, first):
    assert first_device(devices) == first


def test_what_changes_the_training_changes_the_victim(configure):
    plain = find_victim(configure()).folder
    assert find_victim(configure("trainer.threads=1", "trainer.log_every_n_steps=3")).folder == plain
    others = [
        find_victim(configure(*overrides)).folder
        for overrides in (["+trainer.limit_train_batches=2"], ["+trainer.accumulate_grad_batches=2"], ["trainer.devices=2"])
    ]
    assert len({plain, *others}) == 4


def test_threads(configure, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    prepare_process(configure().trainer.threads)
    prepare_process(configure("trainer.threads=1").trainer.threads)
    assert chosen == [1]


@pytest.mark.parametrize(
    ("threads", "allowed"),
    [
        (0, "null or a count from 1 up"),
        (-2, "null or a count from 1 up"),
        ("many", "a whole number or null"),
        (1.5, "a whole number or null"),
        (True, "a whole number or null"),
    ],
)
def test_impossible_threads(configure, threads, allowed):
    with pytest.raises(UserError, match=f"^trainer.threads must be {allowed}, got '?{threads}'?$"):
        configure(f"trainer.threads={threads}")


# -- what a victim and a run depend on --------------------------------------------------------------------------------------------


def test_the_trainers_further_settings_are_for_the_victims_training(configure, tmp_path):
    spec = configure("+trainer.max_steps=1", "+trainer.gradient_clip_val=1")
    quiet = {"logger": False, "enable_checkpointing": False}
    for spread in ("ddp_spawn", "auto"):
        assert build_trainer(spec.trainer, tmp_path, spread=spread, **quiet).max_steps == 1
    other = build_trainer(spec.trainer, tmp_path, **quiet)
    assert (other.max_steps, other.gradient_clip_val) == (-1, None)


def test_surrogates_depend_on_what_victims_depend_on(configure):
    def folder(*overrides):
        return find_surrogate(configure("attack=clean_label", *overrides), {"eps": 0.1}).folder

    others = [
        folder(override)
        for override in ("+trainer.limit_train_batches=1", "trainer.devices=2", "training.optimizer.lr=0.02", "model.width=5")
    ]
    assert len({folder(), *others}) == 5
    assert folder("attack.rate=0.3", "loss=mixup", "x2x.target=2") == folder()
    assert find_surrogate(configure("attack=clean_label"), {"eps": 0.2}).folder != folder()


def test_other_images_are_another_victim_and_another_run(configure, tmp_path):
    root = tmp_path / "images"
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (16, 16), (number, 0, 0)).save(root / name / f"{number}.png")
    spec = configure("dataset=image_folder", f"dataset.root={root}")
    before = find_victim(spec).folder, run_folder(spec)
    assert (find_victim(spec).folder, run_folder(spec)) == before
    (root / "cat" / ".hidden").write_text("not looked at")
    assert (find_victim(spec).folder, run_folder(spec)) == before
    Image.new("RGB", (16, 16), (9, 9, 9)).save(root / "cat" / "3.png")
    after = find_victim(spec).folder, run_folder(spec)
    assert not {*before} & {*after}
    (root / "cat" / "3.png").rename(root / "dog" / "3.png")
    assert not {*before, *after} & {find_victim(spec).folder, run_folder(spec)}


@pytest.mark.parametrize("accelerator", ["cpu", "auto"])
def test_a_gpu_that_is_not_asked_for_is_not_recorded(monkeypatch, configure, accelerator):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Graphics 1")
    monkeypatch.setattr("marginclip.precision._cpu_has_bf16", lambda: False)
    record = opened_record(configure(f"trainer.accelerator={accelerator}", "trainer.precision=auto"))
    on_gpu = accelerator == "auto"
    assert record.device.accelerator == ("gpu" if on_gpu else "cpu")
    assert (record.device.name == "Graphics 1") == on_gpu
    assert record.precision == ("16-mixed" if on_gpu else "32-true")


def test_the_record_tells_the_threads_of_the_run(configure, monkeypatch):
    threads = [7]
    monkeypatch.setattr(torch, "set_num_threads", lambda count: threads.append(count))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    record = defend(configure("trainer.threads=1", "defense=none", "attack=none", "training.epochs=1"))
    assert record.device.threads == 1


def test_runs_of_a_method_that_gives_other_results_now_are_other_runs(configure, monkeypatch):
    """Its victims are not, nor are runs of other methods."""
    specs = [configure(f"defense={name}") for name in ("mmdf", "mmac", "mmac_finetune", "auto", "finetune", "mmom")]
    before = [(find_victim(spec).folder, run_folder(spec)) for spec in specs]
    monkeypatch.setitem(recipe.REVISIONS, "marginclip.defenses.MMAC", 99)
    after = [(find_victim(spec).folder, run_folder(spec)) for spec in specs]
    assert [old == new for (_, old), (_, new) in zip(before, after, strict=True)] == [False] * 4 + [True] * 2
    assert [old for old, _ in before] == [new for new, _ in after]
