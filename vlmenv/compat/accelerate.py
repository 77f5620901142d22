"""Private parts of accelerate: its state that outlives an `Accelerator`, and the variables of `accelerate launch`."""

from __future__ import annotations

import inspect
import logging
import os
from typing import Final

from accelerate import PartialState
from accelerate.state import AcceleratorState

from vlmenv.compat import Use

_log = logging.getLogger(__name__)


def is_in_use() -> bool:
    """True if this process has made an `Accelerator` or a `PartialState` since `forget`."""
    return bool(getattr(PartialState, "_shared_state", True))


def forget() -> None:
    """Forgets device, precision and ranks, so that the next `Accelerator` chooses them anew. Without effect if it
    cannot be done; a warning says so."""
    if problem := _check_state():
        _log.warning("device, precision and ranks stay as they are in this process: %s", problem)
        return
    AcceleratorState._reset_state(reset_partial_state=True)


def _check_state() -> str | None:
    if not hasattr(PartialState, "_shared_state"):
        return "accelerate has no shared state"
    reset = getattr(AcceleratorState, "_reset_state", None)
    if reset is None or "reset_partial_state" not in inspect.signature(reset).parameters:
        return "accelerate does not reset its state"
    return None


def launched_with(feature: str) -> bool:
    """True if `accelerate launch` was asked for a feature, such as "FSDP"."""
    return os.environ.get(f"ACCELERATE_USE_{feature}", "false").lower() == "true"


def launched_precision() -> str:
    """The mixed precision that `accelerate launch` was asked for; "no" without."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def _check_launch() -> str | None:
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    asked = "--use_fsdp --mixed_precision=bf16 --dynamo_backend=no --num_processes=2 --multi_gpu"
    # As on a second machine: on the first one accelerate warns of a port that is in use, as by the launcher of a run.
    second = "--num_machines=2 --machine_rank=1 --main_process_ip=127.0.0.1 --main_process_port=29500"
    given = launch_command_parser().parse_args([*asked.split(), *second.split(), "script.py"])
    told = prepare_multi_gpu_env(given)
    expected = {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_MIXED_PRECISION": "bf16"}
    missing = [name for name, value in expected.items() if told.get(name) != value]
    return f"accelerate launch does not set {', '.join(missing)}" if missing else None


USES: Final = (
    Use("shared state", _check_state, "a second run in a process keeps the device and the precision of the first"),
    Use("variables of accelerate launch", _check_launch, "FSDP and DeepSpeed are used only as far as accelerate tells"),
)
