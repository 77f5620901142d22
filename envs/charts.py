"""Questions about charts, compared with ChartQA's tolerance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final

from vlmenv.envs.data.charts import ChartQuestions
from vlmenv.envs.data.layouts import RowLayout
from vlmenv.envs.data.scenes import Split
from vlmenv.envs.data.source import Source
from vlmenv.envs.vqa import VQAEnv


def _only(label: Any) -> Any:
    """The only item of a list."""
    return label[0] if isinstance(label, (list, tuple)) and len(label) == 1 else label


CHART_QA: Final = RowLayout(("query",), ("label",), str, _only)
"""The rows of HuggingFaceM4/ChartQA and of ChartQA's own files."""


class ChartEnv(VQAEnv):
    """`VLM-Chart-v0`: as `VLM-VQA-v0`, but a number within 5 % of the true one is right (arXiv 2203.10244)."""

    default_rewards: ClassVar[Mapping[str, float]] = {"relaxed": 1.0, "format": 0.1}
    right: ClassVar[tuple[str, float]] = ("relaxed", 1.0)
    needs_image: ClassVar[bool] = True
    layouts: ClassVar[tuple[RowLayout, ...]] = (CHART_QA,)

    def builtin_source(self, split: Split) -> Source:
        return ChartQuestions(split)
