"""What an engine has to have in common with the trainer's own model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from vlmenv.agents.engines.base import Request
from vlmenv.agents.families import Family
from vlmenv.core.errors import EngineError, ReadingError


def check_prompt(request: Request, token_ids: Sequence[int]) -> None:
    """Raises ReadingError unless the engine reads a prompt as the trainer does, image tokens included."""
    ours = request.prompt.input_ids.tolist()
    if list(token_ids) == ours:
        return
    place = next((i for i, pair in enumerate(zip(ours, token_ids, strict=False)) if pair[0] != pair[1]), len(ours))
    raise ReadingError(
        f"the engine reads a prompt otherwise than the trainer: {len(token_ids)} tokens against {len(ours)}, and from "
        f"token {place} on {list(token_ids)[place : place + 8]} against {ours[place : place + 8]}. "
        "Their processors or chat templates differ",
        ours,
        token_ids,
    )


def check_names(weights: Mapping[str, Tensor], names: set[str]) -> None:
    """Raises EngineError unless the weights are those that a model folder holds."""
    missing, unknown = sorted(names - weights.keys()), sorted(weights.keys() - names)
    if missing or unknown:
        raise EngineError(
            f"the trainer's weights are not those of the engine's model: {len(missing)} are missing {missing[:3]}, "
            f"{len(unknown)} are unknown {unknown[:3]}"
        )


def untied(shapes: Mapping[str, list[int]], family: Family) -> dict[str, list[int]]:
    """A folder's weights, those of two names once: some publishers write a head out that is an embedding's."""
    tied = getattr(family.model, "all_tied_weights_keys", {})
    return {name: shape for name, shape in shapes.items() if name not in tied}
