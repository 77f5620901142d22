from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from vlmenv.algos import ALGORITHMS, AlgorithmConfig
from vlmenv.core.errors import ConfigError
from vlmenv.options.fields import flatten, options_of, plain, replaced
from vlmenv.options.files import packaged_files
from vlmenv.options.resolve import Layer, grouped, merge
from vlmenv.options.train import TrainConfig, default_config

RECIPES = {name: yaml.safe_load(file.read_text()) for name, file in packaged_files("recipe").items()}
TRAINING = [name for name, options in RECIPES.items() if "algo" in options]
ONE_MEANING = ("group_size", "mu", "minibatches", "beta")


def resolved(*layers: Layer) -> TrainConfig[Any]:
    merged = merge(layers)
    return replaced(merged.config, merged.values)


def as_dict(config: AlgorithmConfig) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("recipe", TRAINING)
def test_every_recipe_with_every_algorithm_is_its_preset_and_what_carries_over(recipe: str, algo: str) -> None:
    options = RECIPES[recipe]
    config = resolved(Layer(recipe, options), Layer("", {"algo": algo}))
    expected = as_dict(ALGORITHMS[algo].preset)
    former = as_dict(ALGORITHMS[options.get("algo", "grpo")].preset)
    asked = [name for name in ONE_MEANING if name in options and options[name] != former[name]]
    carried = {name: options[name] for name in asked if name in expected}
    if algo == "sft":
        carried.pop("group_size", None)  # which imitates the one true answer
    own = options.get(algo, {})
    assert as_dict(config.algorithm) == expected | carried | own
    general = {name: value for name, value in options.items() if name not in (*ONE_MEANING, "algo", *ALGORITHMS)}
    written = flatten(config)
    assert {name: written[name] for name in general if name not in ("image_root", "eval_image_root")} == {
        name: plain(value) for name, value in general.items() if name not in ("image_root", "eval_image_root")
    }
    assert config.algo == algo


KINDS = ("dapo", *{one.make: name for name, one in reversed(ALGORITHMS.items())}.values())
"""An algorithm of each class, and a preset that is no class's own."""


@pytest.mark.parametrize("algo", KINDS)
@pytest.mark.parametrize("former", KINDS)
@pytest.mark.parametrize("form", ["flat", "asked", "resolved"])
def test_every_runs_file_with_every_algorithm_is_its_preset(former: str, algo: str, form: str) -> None:
    """Also of runs of before, whose file holds all options flat, and null for some of their defaults."""
    config = default_config(former)
    file: dict[str, Any] = {
        "flat": flatten(config) | {"engine_length": None, "correction": None, "log_samples": None, "eval_limit": None},
        "asked": grouped(config, ["env", "algo", "model", "seed", "steps"]),
        "resolved": grouped(config, options_of(config)) | {"record": {"versions": {}}},
    }[form]
    file = {name: value for name, value in file.items() if name not in ("recipe", "config", "resume", "dry_run")}
    found = resolved(Layer("config.yaml", file), Layer("", {"algo": algo}))
    expected = as_dict(ALGORITHMS[algo].preset)
    assert as_dict(found.algorithm) == expected
    assert found.generation.engine_length == 16384
    assert found.logging.log_samples == 50


def test_a_file_in_the_flat_form_means_what_it_meant() -> None:
    flat = {"algo": "grpo", "epsilon": 0.1, "group_size": 4, "beta": 0.02, "kl_estimator": "k2", "lr": "1e-5"}
    same = resolved(Layer("c", flat))
    assert as_dict(same.algorithm)["kl_estimator"] == "k2"
    assert (same.algorithm.epsilon, same.algorithm.group_size, same.trainer.lr) == (0.1, 4, 1e-5)  # type: ignore[attr-defined]
    merged = merge([Layer("c", flat), Layer("", {"algo": "rloo"})])
    other = replaced(merged.config, merged.values)
    assert as_dict(other.algorithm) == as_dict(ALGORITHMS["rloo"].preset) | {"group_size": 4, "beta": 0.02}
    assert merged.notes == ["c: options of grpo are not used, as rloo is asked for: epsilon, kl_estimator"]


def test_groups_hold_for_their_algorithm_alone() -> None:
    file = {"algo": "grpo", "group_size": 4, "grpo": {"epsilon": 0.1}, "ppo": {"lam": 0.9, "group_size": 2}}
    assert resolved(Layer("c", file)).algorithm == replaced(
        ALGORITHMS["grpo"].preset, {"epsilon": 0.1, "group_size": 4}
    )
    merged = merge([Layer("c", file), Layer("", {"algo": "dapo"})])
    assert merged.values == {"algo": "dapo", "group_size": 4}
    assert [note.partition(":")[2] for note in merged.notes] == [
        " options of grpo are not used, as dapo is asked for: epsilon",
        " options of ppo are not used, as dapo is asked for: lam, group_size",
    ]


def test_stronger_layers_win_and_rivals_give_way() -> None:
    recipe, file = Layer("r", {"epochs": 2, "lr": 1.0, "seed": 1}), Layer("c", {"steps": 5, "lr": 2.0})
    config = resolved(recipe, file, Layer("", {"lr": 3.0}))
    assert (config.trainer.steps, config.batches.epochs, config.trainer.lr, config.seed) == (5, None, 3.0, 1)


def test_a_single_task_and_a_mix_replace_each_other() -> None:
    """The resolved options of a mixed run hold the default of `env`, which asks for nothing."""
    single, mix = Layer("r", {"env": "VLM-VQA-v0"}), Layer("", {"mix": ("VLM-REC-v0", "VLM-Math-v0")})
    assert resolved(single, mix).task_name == "VLM-REC-v0+VLM-Math-v0"
    assert resolved(Layer("c", mix.values), Layer("", single.values)).task_name == "VLM-VQA-v0"
    record = Layer("resolved.yaml", {"env": "VLM-REC-v0", **mix.values, "record": {}})
    assert resolved(record, Layer("config.yaml", mix.values)).task_name == "VLM-REC-v0+VLM-Math-v0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stepz": 5}, "c: unknown option 'stepz'. Did you mean 'steps'?"),
        ({"learning": 5}, "c: unknown option 'learning'. --help"),
        ({"algo": "rloo", "kl_estimator": "k3"}, "c: rloo has no option 'kl_estimator', which grpo, .*ppo.* have"),
        ({"rloo": {"kl_estimator": "k3"}, "algo": "rloo"}, "c: rloo has no option 'kl_estimator'"),
        ({"resume": "a-run"}, "c: 'resume' has no place in a file of options"),
        ({"config": "b.yaml"}, "c: 'config' has no place in a file"),
        ({"recipe": "a"}, "c: 'recipe' has no place in a file"),
        ({"steps": 1, "epochs": 2}, "c: steps and epochs were both given"),
        ({"env": "VLM-REC-v0", "mix": ["VLM-VQA-v0"]}, "c: env and mix were both given"),
        ({"lr": 1, "learning_rate": 2}, "c: 'learning_rate' and 'lr' are one option"),
        ({"steps": "many"}, "c: steps must be a whole number, not 'many'"),
        ({"epsilon": 0.1, "grpo": {"epsilon": 0.2}}, "c: epsilon stand both in the group grpo and outside of it"),
        ({"algo": "foo"}, "unknown algorithm 'foo'. Known: cispo, .* my_algorithm:MyAlgorithm"),
        ({"per_device_train_batch_size": 4}, "c: unknown option 'per_device_train_batch_size': prompts_per_step"),
    ],
)
def test_a_faulty_layer_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        merge([Layer("c", options)])


@pytest.mark.parametrize(
    ("alias", "own"),
    [
        ("learning_rate", "lr"),
        ("learning-rate", "lr"),
        ("num_generations", "group_size"),
        ("max_completion_length", "max_new_tokens"),
        ("data_file_paths", "dataset"),
        ("actor_rollout_ref.rollout.n", "group_size"),
    ],
)
def test_names_of_other_trainers_are_understood_and_told(alias: str, own: str) -> None:
    value: Any = ["a"] if own == "dataset" else 3
    merged = merge([Layer("c", {alias: value})])
    assert plain(merged.values[own]) == value
    assert merged.notes == [f"c: '{alias}' is '{own}' here"]


def test_null_stands_for_the_default_and_a_runs_record_for_no_option(tmp_path: Path) -> None:
    assert merge([Layer("c", {"server_timeout": None, "record": {"git": "x"}})]).values == {}


def test_grouped_options_resolve_to_the_same(tmp_path: Path) -> None:
    for algo in ALGORITHMS:
        config = default_config(algo)
        names = [name for name in options_of(config) if name not in ("recipe", "config", "resume", "dry_run")]
        assert resolved(Layer("c", grouped(config, names))) == config
