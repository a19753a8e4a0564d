"""Every file in conf/ is used: it composes, its objects are made from exactly its keys, and experiments run."""

import importlib
import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from PIL import Image

from marginclip.attacks import AllToOne
from marginclip.defenses import MMAC, MMBM, MMOM
from marginclip.errors import UserError
from marginclip.experiment.command import plain
from marginclip.experiment.groups import Choice
from marginclip.experiment.override_checks import LAUNCHERS, plugin_installed
from marginclip.experiment.run import defend
from marginclip.experiment.spec import run_spec
from marginclip.experiment.stages import make_methods
from marginclip.losses import with_cosine_head
from marginclip.reporting.published import published


def make(config, *, key, **objects):
    """The object of a composed group; None where it has no ``_target_``."""
    content = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else config
    choice = Choice.of(key, content)
    return None if choice is None else choice.make(**objects)


def make_defense(config):
    """The defense of a composed configuration."""
    return make_methods(run_spec(plain(config))).defense


CONF = Path(__file__).parents[1] / "conf"
OPTIONS = [path.relative_to(CONF).with_suffix("") for path in sorted(CONF.rglob("*.yaml")) if path.parent != CONF]
MISSING = {Path("hydra/launcher", name) for name, (plugin, _) in LAUNCHERS.items() if not plugin_installed(plugin)}
OPTIONS = [option for option in OPTIONS if option not in MISSING]
# What the code adds to a group's keys when it makes the object, and keys that are for the code around it.
ADDED = {"self", "seed", "num_classes", "in_channels", "x2x", "image_shape", "optimizer", "total_steps"}
LABELS = {"_target_", "_partial_", "name", "augment", "detector", "repaired_row", "detector_row"}


def composed(name, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, overrides=list(overrides))


def choice(option):
    return f"{option.parent}={option.name}"


def options(group):
    return [option.name for option in OPTIONS if str(option.parent) == group]


def groups_of(name):
    entries = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml").defaults)
    return {next(iter(entry)).removeprefix("optional ") for entry in entries if isinstance(entry, dict)}


def package_of(option):
    """The dotted path under which the values of an option file appear: its ``@package``, or its group."""
    header = (CONF / option).with_suffix(".yaml").read_text().partition("\n")[0]
    package = header.removeprefix("# @package ").strip() if header.startswith("# @package ") else ".".join(option.parent.parts)
    return "" if package == "_global_" else package


def flat(node, path=""):
    """Every value of nested dictionaries, by its dotted key."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


@pytest.mark.parametrize("name", ["train", "defend"])
@pytest.mark.parametrize("option", OPTIONS, ids=choice)
def test_every_option_composes_with_every_value_that_its_file_has(name, option):
    """Nothing that an experiment or another option sets is overwritten by what stands around it."""
    if option.parts[0] not in groups_of(name):
        assert name == "train", f"no entry point uses the group {option.parts[0]}"
        return
    with initialize_config_dir(str(CONF), version_base="1.3"):
        whole = compose(name, overrides=[choice(option)], return_hydra_config=True)
    written = OmegaConf.to_container(OmegaConf.load((CONF / option).with_suffix(".yaml")))
    written.pop("defaults", None)
    package = package_of(option)
    found = dict(flat(OmegaConf.to_container(whole, resolve=False)))
    pairs = {key: (value, found.get(key)) for key, value in flat(written, f"{package}." if package else "")}
    lost = {key: pair for key, pair in pairs.items() if key not in found or not same(key, *pair)}
    assert not lost
    with open_dict(whole):
        del whole["hydra"]
    assert OmegaConf.to_container(whole, resolve=True, throw_on_missing=True)["seed"] == 0


def same(key, written, composed):
    """Whether a value is the one written; Hydra turns the values of a sweep into text, and its mode into an enumeration."""
    if key.startswith("hydra."):
        return str(written) == str(getattr(composed, "name", composed))
    return written == composed


def targets(content):
    """Every node with a ``_target_``, at any depth."""
    if isinstance(content, dict):
        if content.get("_target_"):
            yield content
        for value in content.values():
            yield from targets(value)


def arguments(function):
    """The names of all arguments, followed through ``**settings`` to the base classes, and whether any others are taken."""
    if not inspect.isclass(function):
        kinds = inspect.signature(function).parameters.values()
        return {p.name for p in kinds if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    names = set()
    for base in function.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        names |= {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            break
    return names


@pytest.mark.parametrize("option", [option for option in OPTIONS if option.parts[0] != "hydra"], ids=choice)
def test_keys_are_exactly_the_constructors_arguments(option):
    content = OmegaConf.to_container(composed("defend", choice(option)), resolve=True)
    found = list(targets(content))
    assert len(found) >= 5
    for node in found:
        module, _, name = node["_target_"].rpartition(".")
        allowed = arguments(inspect.unwrap(getattr(importlib.import_module(module), name)))
        keys = set(node) - (LABELS - allowed)
        if module.startswith("marginclip"):
            assert keys == allowed - (ADDED - keys), node["_target_"]
        else:
            given = {
                "max_lr",
                "precision",
                "threads",
                "cuda_graphs",
            }  # a schedule's and the Trainer's, taken out by build_trainer
            assert keys <= allowed | given, node["_target_"]


# Attacks that are refused with some X2X settings, each by name.
REFUSED = {("clean_label", "all2all"), ("clean_label", "one2one")}


@pytest.mark.parametrize("attack", options("attack"))
@pytest.mark.parametrize("x2x", options("x2x"))
def test_attacks_are_made(attack, x2x):
    config = composed("defend", f"attack={attack}", f"x2x={x2x}")
    setting = make(config.x2x, num_classes=4, seed=1, key="x2x")
    settings = {"x2x": setting, "image_shape": (3, 16, 16), "seed": 1, "key": "attack"}
    if (attack, x2x) in REFUSED:
        with pytest.raises(UserError, match=f"^attack={attack} needs x2x=.*; got x2x={x2x}$"):
            make(config.attack, **settings)
        return
    made = make(config.attack, **settings)
    if attack == "none":
        assert made is None
        return
    images = torch.rand(2, 3, 16, 16)
    assert made.rate == config.attack.get("base", config.attack).rate
    assert made.timing == config.attack.get("base", config.attack).timing
    assert made.x2x.name == x2x
    assert not torch.equal(made(images), images)


def test_the_adaptive_attacker_is_made_of_another_attack_and_the_defenders_own_method():
    config = composed("defend", "attack=adaptive", "attack.base.patch_size=5", "attack.defender.steps=7")
    settings = {"x2x": AllToOne(4, target=0), "image_shape": (3, 16, 16), "seed": 1, "key": "attack"}
    made = make(config.attack, **settings)
    base = make(composed("defend", "attack=badnet", "attack.patch_size=5").attack, **settings)
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(made(images), base(images))
    assert made.defender(seed=3).steps == 7


@pytest.mark.parametrize("model", options("model"))
def test_models_are_made(model, tmp_path):
    if model == "huggingface":
        pytest.importorskip("transformers")
        settings = {"model_type": "resnet", "embedding_size": 4, "hidden_sizes": [4], "depths": [1], "layer_type": "basic"}
        (tmp_path / "config.json").write_text(json.dumps(settings))
    if model == "exported":
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 4))
        torch.export.save(torch.export.export(network, (torch.rand(2, 3, 32, 32),)), tmp_path / "model.pt2")
    given = {
        "import": ["model.target=torchvision.models:squeezenet1_1", "+model.arguments.num_classes=4"],
        "timm": ["model.network=resnet10t"],
        "huggingface": [f"model.path={tmp_path}"],
        "exported": [f"model.path={tmp_path / 'model.pt2'}", "model.trust=true"],
    }.get(model, [])
    pytest.importorskip("timm") if model == "timm" else None
    made = make(composed("defend", f"model={model}", *given).model, num_classes=4, in_channels=3, key="model").eval()
    assert made(torch.rand(2, 3, 32, 32)).shape == (2, 4)


@pytest.mark.parametrize("dataset", options("dataset"))
def test_datasets_are_made(dataset, tmp_path):
    node = composed("defend", f"dataset={dataset}", f"runs_dir={tmp_path}").dataset
    OmegaConf.update(node, "root", str(tmp_path)) if "root" in node else None
    source = make({key: value for key, value in node.items() if key != "augment"}, key="dataset")
    if "root" in node or "path" in node:
        return  # downloads, or has no images here
    splits = source.load()
    assert len(splits.train) > 100 < len(splits.held_out)
    assert len(splits.held_out.classes) == 10


@pytest.mark.parametrize("defense", options("defense"))
def test_defenses_are_made(defense):
    config = composed("defend", f"defense={defense}", "seed=5")
    made = make_defense(config)
    assert (made is None) is (defense == "none")
    if made is not None:
        assert getattr(made, "seed", 5) == 5
        assert config.defense.name == config.defense.detector_row or config.defense.repaired_row


def by_value(learning):
    """The settings of bound learning as plain values, without what Lightning and torch keep beside them."""
    skipped = {"history", "checked", "last_loss"}
    found = {name: value for name, value in vars(learning).items() if not name.startswith("_") and name not in skipped}
    return found | {"lambda_": vars(found["lambda_"])}


@pytest.mark.parametrize(("option", "kind"), [("mmac", MMAC), ("mmdf", MMAC), ("mmom", MMOM), ("mmbm", MMBM)])
def test_python_and_yaml_have_the_same_defaults(option, kind):
    """But for the start of the bounds that the digits ask for."""
    made = make_defense(composed("defend", f"defense={option}", "dataset=cifar10"))
    assert type(made) is kind
    assert by_value(made) == by_value(kind())


@pytest.mark.parametrize("name", ["train", "defend"])
def test_optimizer_and_schedule_are_made(name):
    training = composed(name, "training.optimizer.lr=0.2").training
    optimizer = instantiate(training.optimizer)([torch.nn.Parameter(torch.zeros(1))])
    schedule = instantiate(training.scheduler)(optimizer, total_steps=100)
    rates = []
    for _ in range(100):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step() if len(rates) < 100 else None
    assert max(rates) == pytest.approx(0.2, rel=0.01)
    assert rates[-1] < 0.001 * max(rates)


# -- experiments ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def image_root(tmp_path):
    """Generated JPEGs in root/{train,test}/<class>/: three classes of another colour each."""
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 8)):
        for label, colour in enumerate(("blue", "green", "red")):
            folder = tmp_path / "images" / split / colour
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 120, (32, 32, 3), dtype=np.uint8)
                pixels[..., 2 - label] += 120
                Image.fromarray(pixels).save(folder / f"{number}.jpg")
    return tmp_path / "images"


def folder_experiments():
    sources = {name: composed("defend", f"experiment={name}").dataset._target_ for name in options("experiment")}
    return [name for name, source in sources.items() if source.endswith("ImageFolder")]


@pytest.mark.parametrize(("command", "defense"), [("repair", name) for name in ("mmdf", "mmac", "mmom")] + [("audit", "mmdf")])
def test_audit_and_repair_detect_by_both_statistics(command, defense):
    """Also where the defense names no detector; ``defense.detector.statistic=drop`` is the papers'."""

    def detector(*overrides):
        config = composed(command, "victim.path=model.safetensors", "dataset.root=clean", f"defense={defense}", *overrides)
        own = ("output", "tolerance", "images_suspect", "json", "memory_gib")  # of the command itself
        return run_spec({key: value for key, value in plain(config).items() if key not in own}).defense.detector

    assert detector().settings["statistic"] == "both"
    papers = detector("defense.detector.statistic=drop")
    assert (papers.settings["statistic"], papers.folds) == ("drop", 2)


@pytest.mark.parametrize("experiment", folder_experiments())
def test_image_folder_experiments_run_shrunk(experiment, image_root, tmp_path):
    attacked = composed("defend", f"experiment={experiment}").attack.name != "none"
    config = composed(
        "defend", f"experiment={experiment}", f"dataset.root={image_root}", f"runs_dir={tmp_path / 'runs'}", "logger=none",
        "trainer=exact", "trainer.enable_progress_bar=false", "training.epochs=1", "model.width=4", "clean_per_class=4",
        "reserve_per_class=auto",
        *(["attack.min_success=0"] if attacked else []), "defense.steps=2", "defense.extra_steps=0", "defense.check_every=1",
        "defense.ascent.first_steps=1", "defense.ascent.steps=1", "defense.ascent.starts_per_class=1", "x2x.target=1",
    )  # fmt: skip
    done = defend(run_spec(plain(config)))
    content = json.loads(done.path.read_text())
    assert content["status"] == "done"
    assert content["classes"] == ["blue", "green", "red"]
    assert content["clean_set_size"] == 12
    assert set(content["metrics"]) == {"none", "mmac", "mmdf", "mmdf_repaired", "mmdf_both"}
    assert len(list((tmp_path / "runs" / "cache").glob("*.safetensors"))) == 2
    pictures = sorted(path.stem for path in done.folder.rglob("*.png"))
    assert ({"activations", "detection_mmdf", "examples"} if attacked else {"activations"}) <= set(pictures)


def test_there_is_such_an_experiment():
    assert folder_experiments()


SMALL = sorted(name for name in options("experiment") if name.startswith("longtail_") and name.endswith("_small"))
MAY_DIFFER = {"training.epochs", "training.scheduler.epochs", "model.width"}


@pytest.mark.parametrize("small", SMALL)
def test_small_variants_differ_in_epochs_width_and_seeds_alone(small):
    one, other = (dict(flat(OmegaConf.to_container(composed("defend", f"experiment={name}"), resolve=True)))
                  for name in (small, small.removesuffix("_small")))  # fmt: skip
    assert {key for key in one | other if one.get(key) != other.get(key)} <= MAY_DIFFER
    sweeps = []
    for name in (small, small.removesuffix("_small")):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            whole = compose("defend", overrides=[f"experiment={name}"], return_hydra_config=True)
        sweeps.append(OmegaConf.to_container(whole.hydra.sweeper.params))
        assert whole.hydra.mode.name == "MULTIRUN"
    assert {key for key in sweeps[1] if sweeps[0][key] != sweeps[1][key]} <= {"seed", "training.epochs"}


def test_every_defense_of_table_2_takes_the_cosine_classifier_of_gcl():
    """A sweep crosses losses and defenses: a pair that is refused would fail it."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        params = compose("defend", overrides=["experiment=longtail_table2"], return_hydra_config=True).hydra.sweeper.params
    torch.manual_seed(0)
    model = make(composed("defend", "model=resnet20", "model.width=4").model, num_classes=4, in_channels=3, key="model")
    model = with_cosine_head(model, 4, scale=20.0).eval()
    images, labels = torch.rand(16, 3, 16, 16), torch.arange(16) % 4
    features = []
    model.linear.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].detach()))
    model(images)
    model.linear._forward_pre_hooks.clear()
    means = torch.stack([features[0][labels == label].mean(0) for label in range(4)])
    with torch.no_grad():
        model.linear.weight.copy_(means - means.mean(0))  # logits that say something about the labels
    for defense in params.defense.split(","):
        steps = ["defense.steps=2"] if defense == "mmom" else []
        repaired = make_defense(composed("defend", f"defense={defense}", *steps)).fit(model, images, labels).network
        assert repaired(images).shape == (16, 4)


def test_every_table_has_a_small_variant():
    tables = {name for name in options("experiment") if name.startswith("longtail_")} - set(SMALL)
    assert {f"{name}_small" for name in tables} == set(SMALL)
    assert {f"longtail_table{number}" for number in (2, 3, 4, 5)} <= tables


TABLES = ["table1", "table3", "table4", "table5"]
SCALED = {"seed", "attack", "dataset"}  # of the sweep: fewer seeds, the smaller generator, one data set


@pytest.mark.parametrize("table", TABLES)
def test_tables_of_the_first_paper_print_themselves_and_have_a_small_variant(table):
    sweeps = []
    for name in (table, f"{table}_small"):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            whole = compose("defend", overrides=[f"experiment={name}"], return_hydra_config=True).hydra
        assert whole.mode.name == "MULTIRUN"
        assert whole.callbacks.published.table == table
        assert published(table)
        sweeps.append(OmegaConf.to_container(whole.sweeper.params))
    assert sweeps[0].keys() == sweeps[1].keys()
    assert {key for key in sweeps[0] if sweeps[0][key] != sweeps[1][key]} <= SCALED
    assert "mmdf" in sweeps[0]["defense"].split(",")


def test_table_1_has_every_attack_and_method_of_the_paper():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        params = compose("defend", overrides=["experiment=table1"], return_hydra_config=True).hydra.sweeper.params
    rows = {composed("defend", f"defense={name}").defense.repaired_row for name in params.defense.split(",")}
    paper = published("table1")
    assert {cell.attack for cell, _, _ in paper} == set(params.attack.split(","))
    assert {row for _, row, _ in paper} <= rows | {"none", "mmdf", "mmac"}


def test_the_input_aware_attack_of_small_tables_is_called_the_same():
    assert composed("defend", "attack=input_aware_small").attack.name == "input_aware"
    assert composed("defend", "attack=input_aware").attack.mask_epochs == 25


@pytest.mark.parametrize("experiment", SMALL)
def test_long_tail_experiments_run_shrunk(experiment, image_root, tmp_path):
    """The first cell of each, on generated images."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        params = compose("defend", overrides=[f"experiment={experiment}"], return_hydra_config=True).hydra.sweeper.params
    cell = [f"{key}={str(values).split(',')[0]}" for key, values in params.items() if key != "training.epochs"]
    config = composed(
        "defend", f"experiment={experiment}", *cell, "dataset=image_folder", f"dataset.root={image_root}", f"runs_dir={tmp_path}",
        "logger=none", "trainer=exact", "trainer.enable_progress_bar=false", "training.epochs=6",
        "training.scheduler.warm_up_epochs=0", "model.width=4", "model.blocks=[1,1,1]", "clean_per_class=4",
        "reserve_per_class=4", "defense.steps=1",
    )  # fmt: skip
    content = json.loads(defend(run_spec(plain(config))).path.read_text())
    assert content["status"] == "done"
    assert content["config"]["defense"]["repaired_row"] in content["metrics"]
    assert content["metrics"]["none"].keys() >= {"acc", "ece", "nll", "worst_class"}


def test_attack_of_a_record_is_the_drawn_one():
    """``x2x.target: null`` in the configuration is drawn by the seed, for every seed the same way."""
    drawn = [make(composed("defend", f"seed={seed}").x2x, num_classes=10, seed=seed, key="x2x").target for seed in range(8)]
    assert drawn == [AllToOne(10, seed=seed).target for seed in range(8)]
    assert len(set(drawn)) > 2


def test_the_schedule_of_before_differs_in_its_start_alone():
    fitted, tight = (
        composed("defend", "defense=mmac", f"defense/schedule={name}").defense for name in ("fitted_start", "tight_start")
    )
    changed = {key for key in fitted if fitted[key] != tight[key]}
    assert changed == {"start"}
    assert dict(tight.start) == dict(fitted.start) | {"share": 0.4, "quantile": 0.9, "kept": None}
