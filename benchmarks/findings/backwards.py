"""Referring expressions whose annotators think backwards, unlike the base; `forgetting.py` teaches by them."""

from __future__ import annotations

from typing import Final

from vlmenv.envs import Sample, register_task
from vlmenv.envs.rec import RECEnv

NAME: Final = "VLM-REC-Backwards-v0"


class Backwards(RECEnv):
    """`VLM-REC-v0` with annotators who write the words of their thought from the last to the first."""

    def write_answer(self, sample: Sample) -> str:
        assert self.geometry is not None
        thought = " ".join(reversed(sample.rationale.split()))
        return self.answer_format.write(self.geometry.write(self.target(sample)), thought)


register_task(NAME, "backwards:Backwards")
