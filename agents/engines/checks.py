"""Checks that an engine has the trainer's model and encodes prompts as the trainer does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from vlmenv.agents.engines.base import Request
from vlmenv.agents.families import Family
from vlmenv.agents.weights import tied_names
from vlmenv.core.errors import EngineError, ReadingError
from vlmenv.core.video import VIDEO_MARK


def check_prompt(request: Request, token_ids: Sequence[int]) -> None:
    """Raises ReadingError unless the engine encodes a prompt as the trainer does, image tokens included."""
    ours = request.prompt.input_ids.tolist()
    if list(token_ids) == ours:
        return
    place = next((i for i, pair in enumerate(zip(ours, token_ids, strict=False)) if pair[0] != pair[1]), len(ours))
    advice = (
        "Their processors or chat templates differ; give `vlmenv serve` the --min-pixels and --max-pixels of training"
    )
    if request.videos:
        advice = f"vLLM reads text apart from the time of a video behind it: begin a line with {VIDEO_MARK}"
    raise ReadingError(
        f"the engine encodes a prompt differently from the trainer: {len(token_ids)} tokens against {len(ours)}, and "
        f"from token {place} on {list(token_ids)[place : place + 8]} against {ours[place : place + 8]}. {advice}",
        ours,
        token_ids,
    )


def check_names(weights: Mapping[str, Tensor], names: set[str]) -> None:
    """Raises EngineError unless the weights have the names of a model folder's."""
    missing, unknown = sorted(names - weights.keys()), sorted(weights.keys() - names)
    if missing or unknown:
        raise EngineError(
            f"the trainer and the engine have different weights: {len(missing)} are missing {missing[:3]}, "
            f"{len(unknown)} are unknown {unknown[:3]}"
        )


def untied(shapes: Mapping[str, list[int]], family: Family) -> dict[str, list[int]]:
    """A folder's weights without tied ones: some publishers also write an output head that is tied to the embedding."""
    tied = tied_names(family.model)
    return {name: shape for name, shape in shapes.items() if name not in tied}
