"""The detection reward of VLM-R1's public code, with the doors that it leaves open.

Facts about that code are in docs/rewards_of_the_papers.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlmenv.core.answers import Detection, fold_label
from vlmenv.envs.rewards.detection import average_precision


def published_map(text: str, target: Sequence[Detection], prediction: Sequence[Detection] | None) -> float:
    """AP at IoU .50:.05:.95 over the labels of the true boxes alone, all scores equal, in [0, 1].

    Boxes with other labels cost nothing. As in every AP, boxes after the last true one cost nothing either. Where there
    is no true box, an answer without boxes scores 1, also an unreadable one.

    Args:
        text: A completion.
        target: The true boxes.
        prediction: The answered boxes; None if the answer is unreadable.
    """
    answered = prediction or ()
    if not target:
        return float(not answered)
    labels = sorted({fold_label(one.label) for one in target})
    return float(np.mean([average_precision(_boxes(answered, label), _boxes(target, label)) for label in labels]))


def _boxes(detections: Sequence[Detection], label: str) -> NDArray[np.float64]:
    """The boxes [D, 4] with a label."""
    chosen = [one.box for one in detections if fold_label(one.label) == label]
    return np.array(chosen, dtype=np.float64).reshape(-1, 4)
