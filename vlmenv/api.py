"""Training and evaluation from Python, with the options of the command line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers

from vlmenv.agents.vlm import VLMAgent
from vlmenv.algos import Algorithm
from vlmenv.algos.registry import name_of
from vlmenv.commands import evaluate as evaluation_command
from vlmenv.commands import train as training_command
from vlmenv.commands.train import Parts
from vlmenv.compat import accelerate
from vlmenv.core import notebook
from vlmenv.core.errors import ConfigError, require
from vlmenv.core.loading import import_modules
from vlmenv.envs.metrics.intervals import Interval
from vlmenv.envs.vector import VisualTaskVectorEnv
from vlmenv.evaluation import Evaluation, read_metrics, written
from vlmenv.options.command_line import Asked, file_layers, listed
from vlmenv.options.evaluate import EvalConfig
from vlmenv.options.fields import flatten, options_of, plain, replaced
from vlmenv.options.files import read_options
from vlmenv.options.resolve import Layer, merge
from vlmenv.options.train import TrainConfig, default_config
from vlmenv.runs.run_folder import RunFolder

_ENVS: Final = (
    "an id, or environments that gymnasium.make_vec makes of a visual task's id, unwrapped (register one of your own "
    "with gymnasium.register and give its id; several tasks are the option mix)"
)
"""What `train` takes as environments."""


@dataclass(frozen=True)
class Run:
    """A run of training that has ended."""

    path: Path
    """its folder"""

    @property
    def history(self) -> list[dict[str, float]]:
        """The metrics of each step."""
        return RunFolder(self.path).history()

    @property
    def before(self) -> dict[str, Interval] | None:
        """The held-out metrics before training, with 95 % intervals; None if they were not measured."""
        return self._measured("before")

    @property
    def after(self) -> dict[str, Interval] | None:
        """The held-out metrics after training, with 95 % intervals; None if they were not measured."""
        return self._measured("after")

    @property
    def model(self) -> Path:
        """The folder of the newest checkpoint."""
        return RunFolder(self.path).checkpoints()[-1]

    def agent(self, **arguments: Any) -> VLMAgent:
        """Loads the newest checkpoint; takes the keyword arguments of `VLMAgent.from_pretrained`."""
        return VLMAgent.from_pretrained(self.model, **arguments)

    def _repr_html_(self) -> str:
        """The run in a notebook: the held-out metrics before and after, warnings, and its curves."""
        run, before, after = RunFolder(self.path), self.before or {}, self.after or {}
        options, history = read_options(self.path / "resolved.yaml"), self.history
        title = f"{self.path}: {options['env']}, {options['algo']}, model {options['model']}, {len(history)} steps"
        rows: list[tuple[object, ...]] = [
            (name, *(written(found[name]) if name in found else "" for found in (before, after)))
            for name in dict.fromkeys([*before, *after])
        ]
        if steps := run.warned():
            rows.append(("warnings", f"at steps {', '.join(map(str, dict.fromkeys(steps)))}", "warnings.jsonl"))
        curve = self.path / "curve.png"
        shown = notebook.table(title, ("held-out metric", "before", "after"), rows)
        return shown + (notebook.png(curve.read_bytes(), "the curves of the run") if curve.is_file() else "")

    def _measured(self, when: str) -> dict[str, Interval] | None:
        folder = self.path / when
        return read_metrics(folder) if (folder / "metrics.json").is_file() else None


def train(
    env: str | VisualTaskVectorEnv | None = None,
    model: str | Path | VLMAgent | None = None,
    algo: str | Algorithm | None = None,
    *,
    config: TrainConfig[Any] | str | Path | None = None,
    recipe: str | None = None,
    eval_env: VisualTaskVectorEnv | None = None,
    **options: Any,
) -> Run:
    """Trains a model, as `vlmenv train` does.

    Args:
        env: Environment's id, or environments made by `gymnasium.make_vec` with groups of the algorithm's size.
            Default: "VLM-REC-v0".
        model: Model's name or folder, or an agent, which is trained in place. Default: the built-in model.
        algo: Algorithm's name, or an algorithm. Default: "grpo".
        config: Options as an object, or a YAML file of them.
        recipe: Published recipe to take options from.
        eval_env: Environments to measure on. Default: the held-out samples of `env` if that is an id, else none.
        options: Options of `vlmenv train` by name, as in `steps=100, lr=1e-5, epsilon=0.1`.

    Returns:
        The run.

    Raises:
        ConfigError: An option is unknown, or options do not go together.
        VLMEnvError: As for `vlmenv train`.
    """
    _require("env", env, (str, VisualTaskVectorEnv), _ENVS)
    _require("eval_env", eval_env, VisualTaskVectorEnv, _ENVS)
    _require("model", model, (str, Path, VLMAgent), "a name, a folder or a VLMAgent")
    _require("algo", algo, (str, Algorithm), "a name or an Algorithm object")
    given = {"env": env, "model": str(model) if isinstance(model, Path) else model, "algo": algo}
    parts = Parts(
        envs=env if isinstance(env, VisualTaskVectorEnv) else None,
        held_out=eval_env,
        agent=model if isinstance(model, VLMAgent) else None,
        algorithm=algo if isinstance(algo, Algorithm) else None,
    )
    named = {name: value for name, value in given.items() if isinstance(value, str)}
    if isinstance(algo, Algorithm):
        named["algo"] = name_of(algo)  # whose rules the options have to keep
        _check_own_options(algo, options)
    if isinstance(config, TrainConfig):
        if recipe is not None:
            raise ConfigError("give recipe or a config object, not both")
        asked = Asked(replaced(config, named | options), _changed(config, named | options))
    else:
        asked = _asked([*file_layers(recipe, None if config is None else Path(config)), Layer("", named | options)])
    with _alone():
        return Run(training_command.run(asked, parts))


def evaluate(
    env: str | None = None,
    model: str | Path | None = None,
    *,
    config: EvalConfig | str | Path | None = None,
    **options: Any,
) -> Evaluation:
    """Measures how well a model answers, as `vlmenv eval` does on one data set.

    Args:
        env: Environment's id. Default: "VLM-REC-v0".
        model: Model's name, a checkpoint's folder, or a run's. Default: the built-in model.
        config: Options as an object, or a YAML file of them.
        options: Options of `vlmenv eval` by name, as in `dataset="rec.jsonl", samples=8`.

    Returns:
        Metrics with 95 % intervals, and all answers.

    Raises:
        ConfigError: An option is unknown, or options do not go together.
        VLMEnvError: As for `vlmenv eval`.
    """
    _require("env", env, str, "the id of a registered environment")
    _require("model", model, (str, Path), "a name or a folder, which VLMAgent.save writes")
    given = {"env": env, "model": None if model is None else str(model)}
    values = {name: value for name, value in given.items() if value is not None} | options
    if isinstance(config, EvalConfig):
        asked = Asked(replaced(config, values), ())
    else:
        layers = [*file_layers(None, None if config is None else Path(config)), Layer("", values)]
        merged = merge(layers, lambda algo: EvalConfig())
        asked = Asked(replaced(merged.config, merged.values), tuple(merged.values), tuple(merged.notes))
    if asked.config.suite is not None:
        raise ConfigError("a suite is measured by `vlmenv eval --suite`")
    with _alone():
        import_modules(asked.config.imports)
        measured: Evaluation = evaluation_command.run(asked)
        return measured


def _check_own_options(algorithm: Algorithm, options: Mapping[str, Any]) -> None:
    """Raises ConfigError if options of an algorithm that is given as an object are given otherwise."""
    own = flatten(algorithm.config)
    for name in [name for name in options if name in own and plain(options[name]) != own[name]]:
        raise ConfigError(f"{name} is {options[name]}, and the algorithm that is given has {own[name]}: leave it out")


def _require(name: str, value: object, kinds: type | tuple[type, ...], wanted: str) -> None:
    """Raises ConfigError unless an argument is None or of one of the kinds: nothing else would be used."""
    told = f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
    require(value is None or isinstance(value, kinds), f"{name} is {wanted}, not {told}")


def _asked(layers: list[Layer]) -> Asked:
    import_modules(dict.fromkeys(name for one in layers for name in listed(one)))
    merged = merge(layers, default_config)
    return Asked(replaced(merged.config, merged.values), tuple(merged.values), tuple(merged.notes))


def _changed(config: TrainConfig[Any], values: dict[str, Any]) -> tuple[str, ...]:
    """The options of a configuration that do not have their defaults, or are given besides."""
    own, default = flatten(config), flatten(default_config(config.algo))
    return tuple(name for name in options_of(config) if name in values or own[name] != default.get(name))


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Leaves nothing behind in the process: random states, accelerate's state, search path, hooks, progress bars."""
    shared = accelerate.is_in_use()  # a caller's own accelerator, which stays
    path, bars = list(sys.path), transformers.utils.logging.is_progress_bar_enabled()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count()), device_type="cuda"):
            yield
    finally:
        sys.path[:] = path
        if bars:
            transformers.utils.logging.enable_progress_bar()
        if not shared:
            accelerate.forget()
