"""torchvision beside a torch that its C++ part was not built for.

The package index has torchvision for CUDA alone, also where torch has been installed for the CPU, as vLLM does there.
What prepares images is its Python part, which runs all the same once the operators that it builds on are declared.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

import torch

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[Any] = []
"""keeps them from being withdrawn"""


def mend_torchvision() -> None:
    """Lets torchvision be imported where torch has no CUDA; does nothing where it can be, or is not installed.

    What its C++ part would compute, such as non-maximum suppression, still fails.
    """
    if torch.version.cuda is not None or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        _declare()
        importlib.import_module("torchvision")


def is_mended() -> bool:
    """Whether `mend_torchvision` had something to do, as it will in other processes."""
    return bool(_declared)


def _declare() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # the half of it that was imported
    library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for schema in _OPERATORS:
        library.define(schema)
    _declared.append(library)
