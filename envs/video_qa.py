"""Questions about videos, with images beside them or not."""

from __future__ import annotations

from typing import ClassVar

from vlmenv.envs.data.clips import ClipQuestions
from vlmenv.envs.data.scenes import Split
from vlmenv.envs.data.source import Source
from vlmenv.envs.vqa import VQAEnv


class VideoQAEnv(VQAEnv):
    """`VLM-VideoQA-v0`: as `VLM-VQA-v0`, about videos."""

    takes_videos: ClassVar[bool] = True
    needs_video: ClassVar[bool] = True

    def builtin_source(self, split: Split) -> Source:
        return ClipQuestions(split, self.frame_rule)
