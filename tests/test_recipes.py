"""Recipes: every shipped one builds, what is wrong in one is named, and what a run saves runs again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_fedsparse import FederatedDataModule, FederatedLoop
from lightning_fedsparse.evaluation import Evaluation
from lightning_fedsparse.recipe import Recipe, RecipeError, describe, find_recipe, recipe_files, shipped_recipes
from lightning_fedsparse.recipe_errors import explain

SHIPPED = shipped_recipes()
DOCS = Path(__file__).parents[1] / "docs" / "recipes.md"


def read(name: str, *overrides: str) -> Recipe:
    return Recipe.read(find_recipe(name), overrides)


def changed(tmp_path: Path, old: str, new: str, name: str = "quickstart") -> Path:
    text = SHIPPED[name].read_text(encoding="utf-8")
    assert text.count(old) == 1
    path = tmp_path / "changed.yaml"
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


# -- what ships --------------------------------------------------------------------------------------------------------


def test_the_recipes_that_ship() -> None:
    assert list(SHIPPED) == [
        "drift-feddip",
        "drift-labels",
        "drift-new-classes",
        "drift-redensified",
        "drift-sparsyfed",
        "fedavg-cifar10-cnn",
        "fedavg-fashion-mnist",
        "fedavg-fashion-mnist-dirichlet",
        "fedavg-mnist-writers",
        "fedavg-shakespeare",
        "fedavg-turbofan",
        "feddip-cifar10-cnn",
        "feddip-cifar10-resnet18",
        "feddip-fashion-mnist",
        "feddip-fashion-mnist-dirichlet",
        "feddip-mnist-writers",
        "feddip-shakespeare",
        "feddip-turbofan",
        "fiarse-cifar10-cnn",
        "fiarse-cifar10-resnet18",
        "fiarse-fashion-mnist",
        "fiarse-mnist-writers",
        "fiarse-shakespeare",
        "fiarse-turbofan",
        "heterofl-fashion-mnist",
        "pruning-only",
        "quickstart",
        "sparsyfed-cifar10-cnn",
        "sparsyfed-cifar10-resnet18",
        "sparsyfed-fashion-mnist",
        "sparsyfed-mnist-writers",
        "sparsyfed-shakespeare",
        "sparsyfed-turbofan",
    ]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_builds_without_data(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSPARSE_DATA", str(tmp_path))
    recipe = read(name)
    built = recipe.build()
    assert isinstance(built["model"], pl.LightningModule)
    if recipe.section == "loop":
        assert isinstance(built["data"], FederatedDataModule)
        FederatedLoop(**built["loop"])
    else:
        assert isinstance(built["data"], pl.LightningDataModule)
        assert all(isinstance(callback, pl.Callback) for callback in built["trainer"]["callbacks"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_says_in_its_first_line_what_it_is(name: str) -> None:
    assert 20 < len(describe(SHIPPED[name])) <= 118


def test_docs_have_one_card_per_recipe() -> None:
    cards = [
        line.removeprefix("## ") for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("## ")
    ]
    assert sorted(cards) == sorted(SHIPPED)


def test_the_feddip_recipe_has_the_published_setting() -> None:
    config = read("feddip-fashion-mnist").config
    assert config["data.init_args.partition.init_args.num_clients"] == 50
    assert (config["loop.rounds"], config["loop.clients_per_round"], config["loop.trainer.max_epochs"]) == (200, 5, 5)
    assert config["data.init_args.data.init_args.batch_size"] == 128
    optimizer = config["model.init_args.optimizer.init_args"]
    assert (optimizer["lr"], optimizer["momentum"], optimizer["weight_decay"]) == (0.1, 0.0, 5e-4)
    method = config["loop.callbacks.init_args"]
    assert (method["initial_sparsity"], method["sparsity"], method["reconfigure_every"]) == (0.5, 0.95, 5)
    assert method["learning_rate_decay"] == 0.998


@pytest.mark.parametrize(
    ("method", "clients", "rounds", "cohort", "batch_size", "rate", "decay"),
    [
        ("feddip", 50, 1000, 5, 128, 0.1, 5e-4),
        ("sparsyfed", 100, 700, 10, 16, 0.5, 1e-3),
        ("fiarse", 100, 800, 10, 20, 0.1, 0.0),
    ],
)
def test_the_recipes_for_a_gpu_have_the_published_settings(
    method: str, clients: int, rounds: int, cohort: int, batch_size: int, rate: float, decay: float
) -> None:
    config = read(f"{method}-cifar10-resnet18").config
    assert config["data.init_args.partition.init_args.num_clients"] == clients
    assert (config["loop.rounds"], config["loop.clients_per_round"]) == (rounds, cohort)
    assert config["data.init_args.data.init_args.batch_size"] == batch_size
    optimizer = config["model.init_args.optimizer.init_args"]
    assert (optimizer["lr"], optimizer["momentum"], optimizer["weight_decay"]) == (rate, 0.0, decay)


@pytest.mark.parametrize("data", ["cifar10-cnn", "mnist-writers", "shakespeare", "turbofan"])
@pytest.mark.parametrize("method", ["feddip", "fiarse", "sparsyfed"])
def test_the_methods_of_one_data_set_share_its_federation(method: str, data: str) -> None:
    dense, sparse = read(f"fedavg-{data}").config, read(f"{method}-{data}").config
    assert sparse["loop.callbacks.class_path"] == f"lightning_fedsparse.callbacks.{method}"
    assert bool(sparse["data.init_args.capacities"]) == (method == "fiarse")
    for config in (dense, sparse):
        config["data.init_args.capacities"] = config["data.init_args.seed"] = None
    assert sparse["data"] == dense["data"]
    for key in ("loop.rounds", "loop.clients_per_round", "loop.trainer.max_epochs", "model.init_args.network"):
        assert sparse[key] == dense[key]


@pytest.mark.parametrize("suffix", ["", "-dirichlet"])
def test_a_dense_twin_differs_by_the_method_alone(suffix: str) -> None:
    sparse = read(f"feddip-fashion-mnist{suffix}").config
    dense = read(f"fedavg-fashion-mnist{suffix}").config
    (decay,) = dense["loop.callbacks"]
    assert decay["init_args.schedule.init_args.decay"] == sparse["loop.callbacks.init_args.learning_rate_decay"]
    for config in (sparse, dense):
        config["loop.callbacks"] = None
    assert sparse == dense


def test_the_dirichlet_recipes_differ_by_the_partition_alone() -> None:
    equal, unequal = read("feddip-fashion-mnist").config, read("feddip-fashion-mnist-dirichlet").config
    assert unequal["data.init_args.partition.init_args.alpha"] == 0.5
    for config in (equal, unequal):
        config["data.init_args.partition"] = None
    assert equal == unequal


def test_heterofl_and_fiarse_share_a_federation() -> None:
    sparse, narrow = read("fiarse-fashion-mnist").config, read("heterofl-fashion-mnist").config
    assert narrow["model.init_args.image_shape"] == [1, 28, 28]
    for config in (sparse, narrow):
        config["loop.callbacks"] = config["model.init_args.image_shape"] = None
    assert sparse == narrow


# -- what a recipe becomes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["loop.callbacks.sparsity", "loop.callbacks.init_args.sparsity"])
def test_an_override_reaches_the_method(key: str) -> None:
    callbacks = read("quickstart", f"--{key}=0.7").build()["loop"]["callbacks"]
    assert callbacks[0].schedule.final == 0.7


def test_a_list_of_callbacks_is_a_method_too(tmp_path: Path) -> None:
    path = tmp_path / "list.yaml"
    path.write_text(
        """
loop:
  callbacks:
    - class_path: lightning_fedsparse.callbacks.MagnitudePruning
      init_args:
        schedule: {class_path: lightning_fedsparse.schedules.ConstantSchedule, init_args: {value: 0.8}}
""",
        encoding="utf-8",
    )
    callbacks = read("quickstart", f"--config={path}").build()["loop"]["callbacks"]
    assert [type(callback).__name__ for callback in callbacks] == ["MagnitudePruning"]


PARTNERS = {
    "TopKAfterTraining": "{schedule: {class_path: lightning_fedsparse.schedules.ConstantSchedule, init_args: {value: 0.9}}}",
    "FixedMask": "{sparsity: 0.9}",
    "ForwardPruning": "{sparsity: 0.9, first_layer: false, exclude: ['*layers.8*']}",
}


@pytest.mark.parametrize("name", PARTNERS)
def test_a_partner_to_compare_with_is_a_list_with_monitors(name: str, tmp_path: Path) -> None:
    path = tmp_path / "partner.yaml"
    path.write_text(
        f"""
loop:
  rounds: 1
  clients_per_round: 1
  evaluation: {{split: none}}
  callbacks:
    - class_path: lightning_fedsparse.callbacks.{name}
      init_args: {PARTNERS[name]}
    - class_path: lightning_fedsparse.callbacks.MaskMonitor
    - class_path: lightning_fedsparse.callbacks.SparsityMonitor
  trainer:
    callbacks: [{{class_path: lightning_fedsparse.callbacks.ProximalTerm, init_args: {{mu: 0.01}}}}]
""",
        encoding="utf-8",
    )
    built = read("quickstart", f"--config={path}", "--loop.trainer.max_epochs=1").build()
    loop = FederatedLoop(**{**built["loop"], "console": False})
    loop.fit(built["model"], built["data"])
    assert [type(callback).__name__ for callback in loop.callbacks] == [
        name,
        "MaskMonitor",
        "SparsityMonitor",
        "ProximalTerm",
    ]
    assert (loop.history[-1].sparsity > 0.8) == (name != "ForwardPruning")


def test_a_composition_is_trainer_callbacks_too(tmp_path: Path) -> None:
    path = tmp_path / "composition.yaml"
    path.write_text("trainer: {callbacks: {class_path: lightning_fedsparse.callbacks.feddip}}", encoding="utf-8")
    callbacks = read("pruning-only", f"--config={path}").build()["trainer"]["callbacks"]
    assert "DynamicPruning" in [type(callback).__name__ for callback in callbacks]


def test_the_trainer_gets_only_what_the_recipe_says() -> None:
    built = read("quickstart", "--loop.trainer.gradient_clip_val=0.5").build()
    assert built["loop"]["trainer"] == {"max_epochs": 2, "gradient_clip_val": 0.5}
    assert built["loop"]["evaluation"] == Evaluation("test")


def test_plain_lightning_callbacks_go_into_the_trainer(tmp_path: Path) -> None:
    path = tmp_path / "callback.yaml"
    text = "loop: {trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.LambdaCallback}]}}"
    path.write_text(text, encoding="utf-8")
    (callback,) = read("quickstart", f"--config={path}").build()["loop"]["trainer"]["callbacks"]
    assert isinstance(callback, pl.callbacks.LambdaCallback)


def test_one_seed_gives_the_weights_and_the_federation() -> None:
    def weights(seed: int) -> tuple[int, torch.Tensor]:
        built: dict[str, Any] = read("quickstart", f"--seed_everything={seed}").build()
        return built["loop"]["seed"], torch.cat([p.detach().flatten() for p in built["model"].parameters()])

    (seed, first), (_, again), (other_seed, other) = weights(1), weights(1), weights(2)
    assert (seed, other_seed) == (1, 2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_resolved_recipe_runs_again(name: str, tmp_path: Path) -> None:
    recipe = read(name, "--seed_everything=3", f"--{read(name).section}.default_root_dir={tmp_path}")
    folder = tmp_path / "some-run"
    folder.mkdir()
    path = folder / "recipe.yaml"
    path.write_text(recipe.resolved, encoding="utf-8")
    again = Recipe.read(path)
    assert again.name == "some-run"
    assert again.folder is None
    assert str(tmp_path) not in recipe.resolved
    assert again.config["seed_everything"] == 3
    assert again.resolved.splitlines()[1:] == recipe.resolved.splitlines()[1:]


def test_the_resolved_recipe_spells_defaults_out_but_not_the_trainers() -> None:
    resolved = read("quickstart").resolved
    assert "regrow: candidates" in resolved
    assert "clients_per_round: 5" in resolved
    assert resolved.splitlines()[-2:] == ["  trainer:", "    max_epochs: 2"]


# -- a recipe and its base ---------------------------------------------------------------------------------------------


def based(tmp_path: Path, text: str, base: str = "quickstart") -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(f"base: {base}\n{text}", encoding="utf-8")
    return path


def test_a_recipe_overrides_single_keys_of_its_base(tmp_path: Path) -> None:
    path = based(tmp_path, "loop: {rounds: 7, callbacks: {init_args: {sparsity: 0.8}}}")
    recipe, base = Recipe.read(path, ["--loop.trainer.max_epochs=3"]), read("quickstart")
    changed = {"loop.rounds": 7, "loop.callbacks.init_args.sparsity": 0.8, "loop.trainer.max_epochs": 3}
    assert {key: recipe.config[key] for key in changed} == changed
    for key in changed:
        recipe.config[key] = base.config[key]
    assert recipe.config == base.config
    assert recipe.name == "mine"


def test_a_base_may_lie_beside_its_recipe(tmp_path: Path) -> None:
    changed(tmp_path, "rounds: 20", "rounds: 4")
    assert Recipe.read(based(tmp_path, "seed_everything: 5", "changed.yaml")).config["loop.rounds"] == 4


def test_the_resolved_recipe_has_no_base(tmp_path: Path) -> None:
    resolved = Recipe.read(based(tmp_path, "loop: {rounds: 7}")).resolved
    assert "base" not in resolved
    path = tmp_path / "resolved.yaml"
    path.write_text(resolved, encoding="utf-8")
    assert Recipe.read(path).config["loop.rounds"] == 7


def test_a_recipe_consists_of_its_base_and_itself(tmp_path: Path) -> None:
    path = based(tmp_path, "")
    assert recipe_files(path) == [SHIPPED["quickstart"], path]
    assert recipe_files(SHIPPED["quickstart"]) == [SHIPPED["quickstart"]]


def test_a_wrong_base_is_one_sentence(tmp_path: Path) -> None:
    message = (
        r"^expected the base of .*mine.yaml to be a recipe: unknown recipe 'quikstart': did you mean quickstart\?$"
    )
    with pytest.raises(RecipeError, match=message):
        Recipe.read(based(tmp_path, "", "quikstart"))
    based(tmp_path, "")
    second = tmp_path / "second.yaml"
    second.write_text("base: mine.yaml", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"^expected a base without a base of its own in .*, got 'mine.yaml'$"):
        Recipe.read(second)
    with pytest.raises(
        RecipeError, match="^expected the base of a recipe in its file, got 'other' on the command line$"
    ):
        read("quickstart", "--base=other")


# -- what is wrong -----------------------------------------------------------------------------------------------------


def test_an_unknown_recipe_names_near_matches() -> None:
    with pytest.raises(RecipeError, match=r"^unknown recipe 'quikstart': did you mean quickstart\?$"):
        find_recipe("quikstart")


def test_an_unknown_recipe_without_near_matches_names_the_list() -> None:
    with pytest.raises(
        RecipeError,
        match=r"^unknown recipe file 'x/zzz.yaml': fedsparse list shows the shipped recipes$",
    ):
        find_recipe("x/zzz.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--loop.roundz=3", "unknown key loop.roundz: did you mean rounds?"),
        ("--rounds=3", "unknown key rounds: did you mean loop.rounds?"),
        ("--loop.seed=3", "unknown key loop.seed: loop has "),
        ("--loop.rounds=many", "expected loop.rounds to be an int, got 'many'"),
        ("--loop.callbacks.sparsty=0.9", "unknown key loop.callbacks.sparsty: did you mean sparsity"),
        ("--loop.callbacks.sparsity=high", "expected loop.callbacks.sparsity to be a float, got 'high'"),
        ("--loop.callbacks=feddip", "expected loop.callbacks to be a class by its import path, such as"),
        ("--loop.trainer.max_epoch=3", "unknown key loop.trainer.max_epoch: did you mean max_epochs"),
        ("--loop.trainer.max_epochs=few", "expected loop.trainer.max_epochs to be an int or null, got 'few'"),
        ("--loop.buffers=mean", "expected loop.buffers to be one of 'average', 'local', 'recalibrate', got 'mean'"),
        ("--data.partition.alpha=1", "unknown key data.partition.alpha: IidPartition has num_clients"),
        ("--data.data.batch_size=a", "expected data.data.batch_size to be an int, got 'a'"),
        ("--model.optimizer.lrr=0.1", "unknown key model.optimizer.lrr: did you mean lr?"),
        ("--model.network=LeNet", "expected model.network to be a class by its import path, such as"),
        ("--model.network=torch.optim.SGD", "expected model.network to be a Module, got"),
        ("--seed_everything=one", "expected seed_everything to be an int, got 'one'"),
        ("surplus", "unknown key surplus: a recipe has base, data, loop, model, seed_everything"),
    ],
)
def test_a_bad_override_is_one_sentence_that_names_the_key(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read("quickstart", override)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  rounds: ", "  roundz: ", "unknown key loop.roundz: did you mean rounds?"),
        ("  callbacks:", "  callback:", "unknown key loop.callback: did you mean callbacks?"),
        ("clients_per_round: 5", "console: true", "expected a value for loop.clients_per_round, got none"),
        ("sparsity: 0.9", "sparsity: high", "expected loop.callbacks.sparsity to be a float, got 'high'"),
        ("num_clients", "num_client", "unknown key data.partition.num_client: did you mean num_clients?"),
        ("models.DigitsCNN", "models.DigitCNN", "model.network: module 'lightning_fedsparse.models' has no attribute"),
        ("seed_everything", "seed_all", "unknown key seed_all: a recipe has base, data, loop, model, seed_everything"),
        ("feddip", "fedip", "loop.callbacks: module 'lightning_fedsparse.callbacks' has no attribute 'fedip'"),
    ],
)
def test_a_bad_recipe_is_one_sentence_that_names_the_key(old: str, new: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "changed.yaml"
    text = SHIPPED["quickstart"].read_text(encoding="utf-8")
    body = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    path.write_text(body.replace(old, new), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        Recipe.read(path)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loop: [1", r"^expected YAML in .*, got a syntax error in line \d+: "),
        (
            "model: {}",
            r"^expected either a loop \(a federation\) or a trainer \(none\) at the top level of .*, found model$",
        ),
        ("loop: {}\ntrainer: {}", r"found loop, trainer$"),
        ("", r"found no keys$"),
    ],
)
def test_a_file_that_is_no_recipe(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=message):
        Recipe.read(path)


def test_a_boolean_key_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "boolean.yaml"
    path.write_text("loop: {evaluation: {off: 1}}", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"^expected text as the keys of loop.evaluation, got a boolean: YAML takes"):
        read("quickstart", f"--config={path}")


def test_a_message_of_another_form_passes_through() -> None:
    assert explain("something else went wrong.", ["loop"]) == "something else went wrong"
    assert explain("", ["loop"]) == "the recipe can't be read"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--loop.callbacks.sparsity=1.5", "sparsity"),
        ("--loop.callbacks.initial_sparsity=0.95", "decreas"),
        ("--loop.rounds=0", "expected rounds to be at least 1, got 0"),
        ("--loop.evaluation.every=0", "expected evaluation every 1 or more rounds, got every=0"),
        ("--data.data.batch_size=0", "batch_size must be at least 1, got 0"),
    ],
)
def test_a_bad_value_is_found_when_the_recipe_is_built(override: str, message: str) -> None:
    recipe = read("quickstart", override)
    with pytest.raises(ValueError, match=message):
        FederatedLoop(**recipe.build()["loop"])


def test_a_bad_value_in_a_list_of_callbacks_is_found_too(tmp_path: Path) -> None:
    path = tmp_path / "list.yaml"
    path.write_text(
        """
loop:
  callbacks:
    - class_path: lightning_fedsparse.callbacks.MagnitudePruning
      init_args:
        schedule: {class_path: lightning_fedsparse.schedules.ConstantSchedule, init_args: {value: 1.0}}
""",
        encoding="utf-8",
    )
    with pytest.raises(RecipeError, match=r"expected a sparsity schedule with values in \[0, 1\), got 1"):
        read("quickstart", f"--config={path}").build()
