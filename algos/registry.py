"""The algorithms by name: the published ones, and those that users register."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, Final, NamedTuple, get_type_hints

from vlmenv.algos.base import Algorithm, AlgorithmConfig
from vlmenv.algos.grpo import GRPO, PRESETS
from vlmenv.algos.opd import OPD, OPDConfig
from vlmenv.algos.papo import PAPO, PAPOConfig
from vlmenv.algos.ppo import PPO, PPOConfig
from vlmenv.algos.reinforce_plus_plus import ReinforcePlusPlus, ReinforcePlusPlusConfig
from vlmenv.algos.rloo import RLOO, RLOOConfig
from vlmenv.algos.sft import SFT, SFTConfig
from vlmenv.algos.vppo import VPPO, VPPOConfig
from vlmenv.core.errors import ConfigError, unknown_name
from vlmenv.core.loading import load_name


class Registered(NamedTuple):
    """An algorithm, or a variant of one."""

    make: Callable[[Any], Algorithm]
    """makes the algorithm from its options"""
    preset: AlgorithmConfig
    """the defaults of its options"""


ALGORITHMS: Final[dict[str, Registered]] = {
    **{name: Registered(GRPO, config) for name, config in PRESETS.items()},
    # The authors' clip ranges and weights with a KL penalty and without: only the latter needs the entropy losses. Left
    # out is what their codes inherit from EasyR1, as a dual_clip of 3, and VPPO's share of masked patches, .5.
    "papo_g": Registered(PAPO, PAPOConfig(epsilon_high=0.3, beta=0.01)),
    "papo_d": Registered(
        PAPO, PAPOConfig(epsilon_high=0.28, most_rounds=4, entropy_loss=0.03, masked_entropy_loss=0.03)
    ),
    "vppo": Registered(VPPO, VPPOConfig(epsilon_high=0.28, most_rounds=4)),
    "rloo": Registered(RLOO, RLOOConfig()),
    "reinforce++": Registered(ReinforcePlusPlus, ReinforcePlusPlusConfig()),
    "ppo": Registered(PPO, PPOConfig()),
    "opd": Registered(OPD, OPDConfig()),
    "sft": Registered(SFT, SFTConfig()),
}
"""By the name that `--algo` takes."""

SHARED: Final = (*(field.name for field in fields(AlgorithmConfig)), "beta")
"""Options with one meaning over all algorithms; see `AlgorithmConfig.shared`."""


def register_algorithm(name: str, algorithm: type[Algorithm], preset: AlgorithmConfig | None = None) -> None:
    """Makes an algorithm known to `--algo` and to `vlmenv.train`.

    Args:
        name: Its name.
        algorithm: Its class, made from a dataclass of options: `__init__(self, config: MyConfig)`.
        preset: Defaults of the options. Default: `MyConfig()`.

    Raises:
        ConfigError: The name is taken, or the class does not say which dataclass its options are.
    """
    if name in ALGORITHMS:
        raise ConfigError(f"an algorithm '{name}' is registered already: choose another name")
    ALGORITHMS[name] = Registered(algorithm, preset if preset is not None else _config_type(algorithm)())


def find_algorithm(name: str) -> Registered:
    """The algorithm of a name; `module:Class` imports the module and takes its class.

    Raises:
        ConfigError: There is none, or the class is no algorithm.
    """
    if name not in ALGORITHMS and ":" in name:
        found = load_name(name, "option algo")
        if not (isinstance(found, type) and issubclass(found, Algorithm)):
            raise ConfigError(f"{name} is no algorithm: derive the class from vlmenv.algos.Algorithm")
        register_algorithm(name, found)
    if name not in ALGORITHMS:
        known = unknown_name("algorithm", name, ALGORITHMS)
        raise ConfigError(f"{known} One of your own is named with its module, as in my_algorithm:MyAlgorithm")
    return ALGORITHMS[name]


def name_of(algorithm: Algorithm) -> str:
    """The name by which `find_algorithm` finds an algorithm's class."""
    kind = type(algorithm)
    known = [name for name, one in ALGORITHMS.items() if one.make is kind]
    return next(iter(known), f"{kind.__module__}:{kind.__qualname__}")


def _config_type(algorithm: type[Algorithm]) -> type[AlgorithmConfig]:
    """The dataclass that an algorithm is made from, by the annotation of its `__init__`."""
    kind = get_type_hints(algorithm.__init__).get("config")
    if not (isinstance(kind, type) and issubclass(kind, AlgorithmConfig)):
        raise ConfigError(
            f"{algorithm.__name__} does not say what its options are: annotate them, as in "
            "`def __init__(self, config: MyConfig)` with a dataclass MyConfig(AlgorithmConfig)"
        )
    return kind
