"""Every mistake that a user can make ends in one clear sentence and exit code 1, without a traceback."""

import errno
import json
from pathlib import Path

import pytest
import torch
from hydra import compose
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from marginclip import files
from marginclip.errors import UserError
from marginclip.experiment import override_checks, run, setup
from marginclip.experiment.override_checks import check_overrides
from marginclip.experiment.recipe import run_folder
from marginclip.models import ResNet

CONF = Path(__file__).parents[2] / "conf"


def complain(overrides, name="defend"):
    with pytest.raises(UserError) as caught:
        check_overrides(overrides, name, CONF)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["attack=badnett"], ["unknown option attack=badnett", "did you mean 'badnet'?", "chessboard"]),
        (["dataset=mnist"], ["unknown option dataset=mnist", "mnist_subset"]),
        (["attack=zzz"], ["unknown option attack=zzz", "badnet, blend, blend_full, chessboard"]),
        (["defense/detector=papr"], ["defense/detector=papr", "did you mean 'paper'?"]),
        (["attack.rat=0.1"], ["unknown key 'attack.rat'", "did you mean 'rate'?", "valid under 'attack'"]),
        (["trainning.epochs=1"], ["unknown key 'trainning.epochs'"]),
        (["defense.stepz=3"], ["unknown key 'defense.stepz'", "did you mean 'steps'?"]),
        (["defense.ascent.step_sise=3"], ["did you mean 'step_size'?", "valid under 'defense.ascent'"]),
        (["sed=3"], ["unknown key 'sed'", "did you mean 'seed'?", "at the top"]),
        (["rate=0.1"], ["unknown key 'rate'", "did you mean 'attack.rate'?"]),
        (["attak=blend"], ["attak", "did you mean 'attack'?"]),
        (["~attack.nothing"], ["unknown key 'attack.nothing'"]),
        (["~x2x.target"], ["'x2x.target' is null already, which is as good as deleted: leave '~x2x.target' away"]),
        (["~attack.rate=0.9"], ["'attack.rate' is 0.1, not 0.9: '~attack.rate' deletes it whatever it is"]),
        (["mmdf"], ["'mmdf' is not an option", "key=value"]),
        (["--attack=badnet"], ["cannot be read"]),
        (["attack.rate=[1"], ["cannot be read"]),
        (["seed=${nowhere}"], ["nowhere"]),
        (["attack=badnet,blendd"], ["unknown option attack=blendd", "did you mean 'blend'?"]),
        (["attack=badnet,blend", "x2x=all2one,one2on"], ["unknown option x2x=one2on", "did you mean 'one2one'?"]),
        (["seed=interval(0,3)"], ["seed=interval(0,3)", "seed=range(0,3)"]),
        (
            ["experiment=longtail_table2_small,longtail_table3_small"],
            [
                "'experiment=longtail_table2_small,longtail_table3_small'",
                "is a sweep of its own; run one experiment after the other",
            ],
        ),
        (
            ["victim=checkpoint", "victim.path=a.pt", "training.epochs=10,200"],
            ["'training.epochs=10' has no effect: victim=checkpoint trains nothing"],
        ),
        (["experiment=cifar10_smal"], ["unknown option experiment=cifar10_smal", "did you mean 'cifar10_small'?"]),
        (
            ["attack=none", "attack.rate=0.2"],
            ["unknown key 'attack.rate'; attack=badnet, blend,", "wanet have it (valid under 'attack': name, _target_)"],
        ),
        (
            ["defense=auto", "defense/schedule=warm"],
            ["'defense/schedule' cannot be chosen here: write defense/schedule@defense.mmac=..."],
        ),
        (["defense=nad", "defense/schedule=warm"], ["'defense/schedule' cannot be chosen here"]),
        (["victim.path=model.safetensors"], ["unknown key 'victim.path'; victim=checkpoint has it"]),
        (
            ["defense=mmac", "defense.detector.folds=2"],
            ["unknown key 'defense.detector.folds'; defense=mmac_finetune, mmdf, static_clip have it"],
        ),
        (["+attack.rate=0.2"], ["'attack.rate' is there already"]),
        (["defense.detector=paper"], ["'defense.detector' is a group of settings", "defense/detector=..."]),
        (["defense.start=3"], ["'defense.start' is a group of settings", "defense.start.constant=..."]),
        (["attack=adaptive", "attack.base=blend"], ["'attack.base' is a group of settings", "attack@attack.base=..."]),
        (["defense=null"], ["'defense=null' leaves the run without defense; use defense=none"]),
        (["defense=mmdf,null"], ["'defense=null' leaves the run without defense; use defense=none"]),
        (["model=null"], ["leaves the run without model; there are exported, huggingface, import, "]),
        (["~detect"], ["'~detect' leaves the run without detect; use detect=none"]),
    ],
)
def test_unknown_options_and_keys_name_the_nearest(overrides, parts):
    message = complain(overrides)
    assert not [part for part in parts if part not in message], message


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["attack=badnet,blend,chessboard", "x2x=all2one,one2one,all2all", "seed=0,1"],
        ["seed=range(0,3)"],
        ["attack=none", "victim=checkpoint", "victim.path=model.safetensors"],
        ["hydra.sweep.dir=somewhere"],
        ["+trainer.max_steps=3"],
        ["dataset.root='a,b'", "dataset=image_folder"],
        ["runs_dir=/tmp/a b"],
        ["defense/detector=paper", "defense.detector.theta=0.01", "defense.start=null"],
        ["experiment=cifar10_small", "model.width=8"],
        ["experiment=cifar10_small,cifar10_folder_small"],
    ],
)
def test_good_command_lines_pass(overrides):
    check_overrides(overrides, "defend", CONF)


def test_a_runs_dir_that_cannot_be_used_is_refused_before_hydra_makes_it(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        assert f"runs_dir='{tmp_path / place}' cannot be used: '{tmp_path / 'file'}' is no folder" in complain(
            [f"runs_dir={tmp_path / place}"]
        )
    check_overrides([f"runs_dir={tmp_path / 'new' / 'folders'}"], "defend", CONF)
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr("os.access", lambda folder, mode: False)
    assert f"'{tmp_path}' cannot be written to" in complain([f"runs_dir={tmp_path / 'new'}"])


@pytest.mark.parametrize(
    ("launcher", "extra"), [("slurm", "slurm"), ("submitit_slurm", "slurm"), ("ray_cluster", "ray"), ("processes", "sweeps")]
)
def test_a_launcher_that_is_not_installed_says_what_to_install(monkeypatch, launcher, extra):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert complain([f"hydra/launcher={launcher}"]) == (
        f"hydra/launcher={launcher} is not installed: pip install 'marginclip[{extra}]'"
    )


def test_what_an_experiment_sweeps_is_checked_too():
    check_overrides(["experiment=longtail_table2", "defense=mmom", "seed=0,1"], "defend", CONF)
    assert complain(["experiment=longtail_table2", "imbalance=none"]).startswith("unknown key 'imbalance.ratio'")
    assert complain(["experiment=longtail_table3_small"], "train").startswith("unknown key 'defense'")


@pytest.mark.parametrize("command", ["audit", "repair"])
@pytest.mark.parametrize("option", ["attack=badnet", "training=long_tail", "training.epochs=3", "imbalance=step", "logger=csv"])
def test_audit_and_repair_refuse_what_they_do_not_use(command, option):
    group = option.replace("=", ".").partition(".")[0]
    assert complain([option], command) == f"'{option}' has no effect: marginclip {command} does not use {group}; leave it out"
    check_overrides(["attack=none", "imbalance=none", "logger=none", "defense.detector.theta=0.01"], command, CONF)


def test_repair_does_not_test():
    assert "marginclip repair does not use detect" in complain(["detect=mmbd"], "repair")
    check_overrides(["detect=mmbd", "detect.starts=2"], "audit", CONF)


def test_train_has_its_own_keys():
    check_overrides(["attack=blend", "training.epochs=1"], "train", CONF)
    assert "unknown key 'figures'" in complain(["figures=false"], "train")


# -- values that only the run itself can judge ---------------------------------------------------------------------------------


def image_folder(root, counts, size=16):
    """Random JPEGs, ``counts`` by class name."""
    generator = torch.Generator().manual_seed(0)
    for label, count in counts.items():
        (root / label).mkdir(parents=True)
        for number in range(count):
            pixels = torch.randint(0, 256, (size, size, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / label / f"{number}.jpg")
    return root


def missing(_):
    return ["dataset=image_folder", "dataset.root=nowhere"]


def unset(_):
    return ["dataset=image_folder"]


def empty(path):
    (path / "void").mkdir()
    return ["dataset=image_folder", f"dataset.root={path / 'void'}"]


def one_class(path):
    return ["dataset=image_folder", f"dataset.root={image_folder(path / 'one', {'cat': 2})}"]


def class_without_images(path):
    return ["dataset=image_folder", f"dataset.root={image_folder(path / 'none', {'cat': 2, 'dog': 0})}"]


def not_an_image(path):
    root = image_folder(path / "odd", {"cat": 3, "dog": 3})
    (root / "dog" / "notes.txt").write_text("not an image")
    return ["dataset=image_folder", f"dataset.root={root}"]


def other_sizes(path):
    root = image_folder(path / "sizes", {"cat": 3, "dog": 3})
    Image.new("RGB", (20, 20)).save(root / "dog" / "large.png")
    return ["dataset=image_folder", f"dataset.root={root}"]


def too_small_for_the_model(path):
    root = image_folder(path / "small", {"cat": 20, "dog": 20})
    return ["dataset=image_folder", f"dataset.root={root}", "model=torchvision", "model.network=squeezenet1_1"]


def other_architecture(path):
    save_file(ResNet(10, 1, blocks=(1, 1, 1), width=3).state_dict(), path / "model.safetensors")
    return ["victim=checkpoint", f"victim.path={path / 'model.safetensors'}"]


def truncated(path):
    (path / "model.pt").write_bytes(b"PK\x03\x04 cut")
    return ["victim=checkpoint", f"victim.path={path / 'model.pt'}"]


def nan_logits(path):
    model = ResNet(10, 1, blocks=(1, 1, 1), width=4)
    model.bn1.running_var.fill_(-1)
    save_file(model.state_dict(), path / "model.safetensors")
    return ["victim=checkpoint", f"victim.path={path / 'model.safetensors'}"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["attack.rate=5"], "attack.rate must be in (0, 1], got 5; did you mean 0.05?"),
        (["attack.rate=0"], "attack.rate must be in (0, 1], got 0"),
        (["attack.rate=-0.1"], "attack.rate must be in (0, 1], got -0.1"),
        (["x2x.target=10"], "x2x.target must be a class in 0..9, got 10"),
        (["x2x.target=-1"], "x2x.target must be a class in 0..9, got -1"),
        (["x2x=one2one", "x2x.source=3", "x2x.target=3"], "x2x.source and x2x.target must differ, got 3 for both"),
        (["clean_per_class=5000"], "clean_per_class=5000 is more than class '0' has"),
        (["clean_per_class=0"], "clean_per_class must be at least 1"),
        (["clean_per_class=many"], "clean_per_class must be a number of images, auto or null, got 'many'"),
        (["reserve_per_class=-1"], "reserve_per_class must not be negative, got -1"),
        (["seed=-1"], "seed must be an integer from 0 up, below 2^32, got -1"),
        (["seed=abc"], "seed must be an integer from 0 up"),
        (["seed=4294967296"], "seed must be an integer from 0 up, below 2^32, got 4294967296"),
        (["seed=true"], "seed must be an integer from 0 up, below 2^32, got True"),
        (["~seed"], "the run needs the key 'seed': set it instead of deleting it"),
        (["~trainer.precision"], "trainer needs the key 'precision': set it instead of deleting it"),
        (["model._target_=marginclip.models.TorchvisionModel", "model.blocks=[1]"], "unexpected keyword argument 'blocks'"),
        (["runs_dir=null"], "runs_dir must be the name of a folder, got None"),
        (["victim.kind=chekpoint"], "victim.kind must be trained or checkpoint, got 'chekpoint'"),
        (["victim=checkpoint", "victim.path=x", "imbalance=step"], "imbalance=step thins out training images"),
        (["trainer=gpu"], "trainer: "),
        (["trainer=ddp"], "trainer: "),
        (["trainer.devices=0"], "trainer: "),
        (["+trainer.max_epochs=3"], "trainer.max_epochs is set by the run itself; use training.epochs"),
        (["+trainer.callbacks=[]"], "trainer.callbacks is set by the run itself"),
        (["training.optimizer.lr=-1"], "training.optimizer: Invalid learning rate: -1"),
        (["training.optimizer.lr=null"], "training.optimizer: "),
        (["training.optimizer.lr=fast"], "training.optimizer: "),
        (["training.scheduler.pct_start=2"], "training.scheduler: Expected float between 0 and 1 pct_start, but got 2"),
        (["training.scheduler._target_=torch.optim.lr_scheduler.StepLR"], "training.scheduler: "),
        (["training.label_smoothing=1.5"], "training.label_smoothing must be in [0, 1), got 1.5"),
        (["dataset.held_out_share=1"], "dataset.held_out_share=1 leaves no image to train a victim on"),
        (["dataset.augment.crop_padding=1.5"], "dataset.augment.crop_padding must be a whole number of pixels"),
        (["dataset.augment.flip=maybe"], "dataset.augment.flip must be true or false, got 'maybe'"),
        (["model.blocks=3"], "model.blocks must be a list of one or more counts from 1 up, got 3"),
        (["defense.detector.folds=null"], "defense.detector.folds must be 0 (no cross-fitting) or at least 2, got None"),
        (["defense.detector.theta=low"], "defense.detector.theta must be a number, got 'low'"),
        (["defense.start.share=0"], "defense.start.share must be positive or null, got 0"),
        (["defense.start.quantile=2"], "defense.start.quantile must be in (0, 1], got 2"),
        (["defense.start.kept=0"], "defense.start.kept must be in (0, 1] or null, got 0"),
        (["defense.start.constant=-1"], "defense.start.constant must be positive, got -1"),
        (["defense.start.constant=0"], "defense.start.constant must be positive, got 0"),
        (["defense.ascent.momentum=2"], "defense.ascent.momentum must be in [0, 1), got 2"),
        (["trainer.precision=fp8"], "trainer.precision must be one of"),
        (["trainer.cuda_graphs=off"], "trainer.cuda_graphs must be true or false, got 'off'"),
        (["defense.steps=0"], "defense.steps must be at least 1"),
        (["defense.detector.theta=2"], "detector.theta must be in (0, 1), got 2"),
        (["defense.detector.folds=1"], "defense.detector.folds must be 0 (no cross-fitting) or at least 2"),
        (["defense=mmac", "defense.detector=paper"], "defense.detector must be a group of settings, got 'paper'"),
        (["defense=static_clip", "defense.detector.folds=2", "clean_per_class=1"], "needs at least 2 clean images of a class"),
        (["training.batch_size=0"], "training.batch_size must be at least 1, got 0"),
        (["training.optimizer.lr=1e20"], "training diverged: the loss is nan; try a lower training.optimizer.lr"),
        (["trainer.accelerator=tpuu"], "trainer: You selected an invalid accelerator name"),
        (["model.activation=rely"], "did you mean 'relu'?"),
        (["model=torchvision"], "takes 3-channel images"),
        (["+attack.colour=red"], "attack: "),
        (["attack.patch_size=30"], "does not fit into images of 16 x 16"),
        (["victim=checkpoint"], "victim=checkpoint needs victim.path"),
        (["figures=no"], "figures must be true or false, got 'no'"),
        (["victim=checkpoint", "victim.path=nowhere.pt"], "victim.path='nowhere.pt' is not a file"),
        (other_architecture, "is of another architecture than the model"),
        (truncated, "victim.path="),
        (nan_logits, "NaN or infinite logits"),
        (unset, "dataset=image_folder needs dataset.root"),
        (missing, "dataset.root='nowhere' is not a folder"),
        (empty, "is empty"),
        (one_class, "has one class only ('cat')"),
        (class_without_images, "class 'dog' has no images"),
        (not_an_image, "notes.txt' is not an image"),
        (other_sizes, "large.png' is 20 x 20 pixels, not 16 x 16"),
        (too_small_for_the_model, "the model does not take the data set's images of 3 x 16 x 16"),
    ],
)
def test_bad_input_is_one_sentence(job, tmp_path, overrides, message):
    code, out, err = job(*(overrides(tmp_path) if callable(overrides) else overrides))
    assert code == 1
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in out + err


class Plain(nn.Module):
    """Layers without any activation."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(256, 10)

    def forward(self, images):
        return self.linear(images.flatten(1))


class Branching(Plain):
    """An activation behind a branch on values, which cannot be traced."""

    def forward(self, images):
        logits = super().forward(images)
        return logits.relu() if logits.sum() > 0 else logits


@pytest.mark.parametrize(
    ("model", "message"),
    [(Plain, "has no activation functions that could be bounded"), (Branching, "Branching cannot be traced by torch.fx")],
)
def test_models_that_cannot_be_bounded(job, monkeypatch, model, message):
    monkeypatch.setattr(setup, "build_model", lambda *_: model())
    code, out, err = job("training.epochs=1")
    assert code == 1
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in out + err


@pytest.mark.parametrize("override", ["defense.sites=nosuch", "defense.channel_axis=9"])
def test_defenses_that_do_not_fit_the_model_are_refused_before_it_is_trained(job, monkeypatch, override):
    monkeypatch.setattr(run, "load_model", lambda *_: pytest.fail("a victim was trained"))
    code, out, err = job("defense=mmac", override)
    assert code == 1
    assert err.startswith("error: ")
    assert "Traceback" not in out + err


def test_train_reports_mistakes_too(job):
    code, _, err = job("attack.rate=5", script="train")
    assert (code, err) == (1, "error: attack.rate must be in (0, 1], got 5; did you mean 0.05?\n")


def test_a_good_job_prints_its_record_last(job):
    code, out, err = job("defense=none")
    assert code == 0
    assert "error" not in err
    last = Path(out.splitlines()[-1])
    assert last.name == "run.json"
    assert json.loads(last.read_text())["status"] == "done"


def test_disk_full_while_writing_keeps_what_was_there(job, configure, monkeypatch):
    code, out, _ = job("defense=static_clip")
    assert code == 0
    folder = Path(out.splitlines()[-1]).parent
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "run.json").write_text(json.dumps({"status": "failed"}))

    def full(tensors, path, metadata=None):
        Path(path).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(files, "save_file", full)
    code, out, err = job("defense=static_clip")
    assert code == 1
    assert "No space left on device" in err
    assert "what was written before is intact" in err
    assert "Traceback" not in out + err
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.json"} == {
        name: content for name, content in before.items() if name != "run.json"
    }
    assert json.loads((folder / "run.json").read_text())["status"] == "failed"


def test_disk_full_for_the_record_itself(job, configure, monkeypatch):
    def full(path, text):
        path.write_text(text[:10])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(files, "_write_text", full)
    code, out, err = job("defense=none")
    assert code == 1
    assert "No space left on device" in err
    assert "Traceback" not in out + err
    assert not (run_folder(configure("defense=none")) / "run.json").exists()


def test_a_fault_of_ours_is_told_and_does_not_stop_a_sweep(job, monkeypatch, caplog):
    monkeypatch.setattr(run, "evaluate", lambda *_: 1 / 0)
    with pytest.raises(AssertionError, match="a traceback was logged"):
        job("defense=none")
    assert "ZeroDivisionError" in caplog.text


def test_a_sweep_over_values_composes_its_first_alone(monkeypatch):
    composed = []

    def counted(name, overrides, **settings):
        composed.append(overrides)
        return compose(name, overrides, **settings)

    monkeypatch.setattr(override_checks, "compose", counted)
    check_overrides(["attack=badnet,blend", "seed=0,1,2,3", "attack.rate=0.1,0.2,0.3"], "defend", CONF)
    whole = [overrides for overrides in composed if len(overrides) == 3]
    assert whole == [[attack, "seed=0", "attack.rate=0.1"] for attack in ("attack=badnet", "attack=blend")]
    assert len(composed) <= 4  # with those of the groups alone


@pytest.mark.parametrize(
    ("sweep", "part"), [("seed=0,1,${nowhere}", "nowhere"), ("runs_dir=/tmp,/dev/null/runs", "'/dev/null' is no folder")]
)
def test_later_values_that_may_be_wrong_are_checked(sweep, part):
    assert part in complain(["attack=badnet", sweep])
