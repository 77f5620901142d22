"""A mend for torchvision whose C++ part was built for another torch.

The package index has torchvision for CUDA only, but vLLM for CPUs installs torch for the CPU. Image processors need
only torchvision's Python part. It works after its operators are declared.
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
"""keeps the declarations alive"""


def mend_torchvision() -> None:
    """Makes torchvision importable with a torch without CUDA. Does nothing if it is importable or not installed.

    Operators of its C++ part, such as non-maximum suppression, still fail.
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
    """True if `mend_torchvision` declared operators, as it will in other processes."""
    return bool(_declared)


def _declare() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # partly imported
    library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for schema in _OPERATORS:
        library.define(schema)
    _declared.append(library)
