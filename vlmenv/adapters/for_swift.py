"""ms-swift: a reward class for `--reward_funcs`, by the keys that `vlmenv data export` writes as `solution`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmenv.adapters.task import completion_text, imported, judged


def swift() -> type:
    """Registers the reward `vlmenv` with ms-swift, and returns its class.

    `vlmenv data export --to swift` writes a `reward.py` that calls this; hand it over as `--external_plugins`, with
    `--reward_funcs vlmenv`.

    Raises:
        ConfigError: ms-swift is not installed.
    """
    orm = imported("swift.rewards.orm", "ms-swift", "swift")

    class VLMEnvReward(orm.ORM):  # type: ignore[misc, name-defined]
        """The weighted reward of each completion."""

        def __call__(self, completions: Sequence[Any], solution: Sequence[str], **_: Any) -> list[float]:
            return [score.reward for score in judged([completion_text(one) for one in completions], solution)]

    orm.orms["vlmenv"] = VLMEnvReward
    return VLMEnvReward
