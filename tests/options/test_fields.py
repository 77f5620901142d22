from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import pytest

from vlmenv.algos import ALGORITHMS
from vlmenv.commands.doctor import default as doctor_default
from vlmenv.core.errors import ConfigError
from vlmenv.options.data import DataCheckConfig
from vlmenv.options.evaluate import EvalConfig, SampleConfig
from vlmenv.options.fields import convert, flatten, options_of, replaced
from vlmenv.options.serve import ServeConfig
from vlmenv.options.train import TrainConfig, default_config

CONFIGS = [
    *(default_config(name) for name in ALGORITHMS),
    *(EvalConfig(), SampleConfig(), ServeConfig(), DataCheckConfig(("a",)), doctor_default("grpo")),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_no_two_options_of_a_command_have_one_name(config: Any) -> None:
    def count(one: Any) -> int:
        inner = [getattr(one, name) for name in one.__dataclass_fields__]
        return sum(count(value) if hasattr(value, "__dataclass_fields__") else 1 for value in inner)

    assert len(options_of(config)) == count(config)


def test_groups_are_written_flat_and_an_import_by_its_name() -> None:
    written = flatten(TrainConfig(imports=("a.b",)))
    assert (written["import"], written["temperature"], written["lr"], written["epsilon"]) == (["a.b"], 1.0, 3e-4, 0.2)


def test_values_of_groups_are_replaced_by_name() -> None:
    config = replaced(TrainConfig(), {"seed": 3, "steps": 5, "top_p": 0.5, "dataset": ["a", "b"], "output": "x"})
    assert (config.seed, config.trainer.steps, config.sampling.top_p) == (3, 5, 0.5)
    assert (config.data.dataset, config.logging.output) == (("a", "b"), Path("x"))


def test_options_that_go_together_are_checked_after_all_are_replaced() -> None:
    config = replaced(TrainConfig(), {"lora_alpha": 8, "lora_rank": 4, "engine": "vllm", "engine_memory": 0.5})
    assert (config.adaptation.lora_alpha, config.generation.engine_memory) == (8, 0.5)


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        ("1e-6", float, 1e-6),
        (1, float, 1.0),
        (2.0, int, 2),
        ("a", tuple[str, ...], ("a",)),
        (["a", "b"], tuple[Path, ...] | None, (Path("a"), Path("b"))),
        (None, int | None, None),
        ({"iou": 1}, dict[str, float] | None, {"iou": 1.0}),
        ("b", Literal["a", "b"], "b"),
        (True, bool, True),
        (3, int | str, 3),
        ("3", int | str, "3"),
    ],
)
def test_values_of_yaml_get_the_options_type(value: Any, kind: Any, expected: Any) -> None:
    found = convert(value, kind, "x")
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "kind", "wanted"),
    [
        ("many", int, "a whole number"),
        (2.5, int, "a whole number"),
        (True, int, "a whole number"),
        (True, float, "a number"),
        ("yes", bool, "true or false"),
        (1, bool, "true or false"),
        (3, str, "a text"),
        ("c", Literal["a", "b"], "one of a, b"),
        (3, tuple[str, ...], "a list of which each is a text"),
        (["a"], dict[str, float], "a mapping from a text to a number"),
        ({"a": "b"}, dict[str, float] | None, "a mapping from a text to a number or null"),
    ],
)
def test_another_type_is_named_with_place_and_option(value: Any, kind: Any, wanted: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"c.yaml: steps must be {wanted}, not {value!r}")):
        convert(value, kind, "steps", "c.yaml")


def test_an_unknown_name_is_answered_with_its_place() -> None:
    with pytest.raises(ConfigError, match=r"c\.yaml: unknown option 'stepz'\. Did you mean 'steps'\?"):
        replaced(TrainConfig(), {"stepz": 3}, "c.yaml")
