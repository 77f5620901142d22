"""A task of referring expressions whose annotators think in words unlike the base's; `forgetting.py` teaches by it."""

from __future__ import annotations

from typing import Final

from vlmenv.envs import Sample, register_task
from vlmenv.envs.rec import RECEnv

NAME: Final = "VLM-REC-Wordy-v0"


class Wordy(RECEnv):
    """`VLM-REC-v0` with annotators who say the same in more words."""

    def write_answer(self, sample: Sample) -> str:
        assert self.geometry is not None
        thought = f"Looking closely, one finds that {sample.rationale} must be meant, so its corners follow."
        return self.answer_format.write(self.geometry.write(self.target(sample)), thought)


register_task(NAME, "wordy:Wordy")
