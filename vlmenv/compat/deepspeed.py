"""Private parts of DeepSpeed: hooks that gather weights, and the flat shards that ZeRO's optimizer updates.

Engines exist only in training, so `missing_parts` looks at them there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from torch import Tensor

from vlmenv.compat import Use

_FLAT: Final = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups"}
_FLAT_OF_WEIGHTS: Final = "fp32_partitioned_groups_flat"


def flat_shards(engine: Any, stage: int) -> list[Tensor]:
    """Flat float32 shards of the weights that this rank's optimizer updates."""
    found: list[Tensor] = getattr(engine.optimizer, _FLAT.get(stage, _FLAT_OF_WEIGHTS))
    return found


def read_shards(engine: Any) -> None:
    """Makes the float32 shards anew from the weights."""
    engine.optimizer.refresh_fp32_params()


def step(engine: Any, max_norm: float) -> float:
    """Takes an optimizer step with clipped gradients. Returns their norm before, infinite where no step was taken."""
    engine.optimizer.clip_grad = max_norm
    engine.step()
    return math.inf if engine.optimizer.overflow else float(engine.get_global_grad_norm())


@contextmanager
def without_hooks(engine: Any) -> Iterator[None]:
    """Stops modules from gathering and freeing their weights within the context; for stage 3."""
    gatherer = engine.optimizer.parameter_offload
    for handle in (*gatherer.forward_hooks, *gatherer.backward_hooks):
        handle.remove()
    gatherer.forward_hooks, gatherer.backward_hooks = [], []
    try:
        yield
    finally:
        gatherer._register_deepspeed_module(gatherer.module)


def whole_size(parameter: Tensor) -> int:
    """Number of elements of a weight, also where this rank holds a shard of it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def is_gathered_by_call(parameter: Tensor) -> bool:
    """True if ZeRO of stage 3 gathers a weight when its layer is called, and not before."""
    return hasattr(parameter, "ds_numel")


def missing_parts(engine: Any, stage: int) -> list[str]:
    """Names of what these functions need and an engine does not have."""
    zero = engine.optimizer
    missing = [
        name
        for name in (_FLAT.get(stage, _FLAT_OF_WEIGHTS), "refresh_fp32_params", "clip_grad", "overflow")
        if not hasattr(zero, name)
    ]
    if stage == 3:
        gatherer = getattr(zero, "parameter_offload", None)
        names = ("forward_hooks", "backward_hooks", "module", "_register_deepspeed_module")
        missing += [f"parameter_offload.{name}" for name in names if not hasattr(gatherer, name)]
    return missing


def _check_classes() -> str | None:
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    kinds = (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3)
    missing = [f"{kind.__name__}.refresh_fp32_params" for kind in kinds if not hasattr(kind, "refresh_fp32_params")]
    name = "_register_deepspeed_module"
    missing += [] if hasattr(DeepSpeedZeRoOffload, name) else [f"{DeepSpeedZeRoOffload.__name__}.{name}"]
    return f"DeepSpeed has no {', '.join(missing)}" if missing else None


USES: Final = (Use("ZeRO", _check_classes, "training with ZeRO is refused"),)
