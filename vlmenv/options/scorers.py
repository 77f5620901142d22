"""Options of the reward terms that run a model: a CLIP-like one on descriptions, a judge on answers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from vlmenv.core.errors import ConfigError
from vlmenv.core.urls import hidden
from vlmenv.envs.rewards.clip import ClipScore, ScoreName
from vlmenv.envs.rewards.judge import PROMPT, Judge
from vlmenv.envs.rewards.terms import RewardTerm


@dataclass(frozen=True)
class ScorerConfig:
    """Models that score answers."""

    clip_model: str | None = None
    """Model of the reward term clip: a folder, or a name on the Hugging Face hub, of CLIP, SigLIP, FG-CLIP and
    others. None: the small model that comes with the package."""
    clip_score: ScoreName = "cosine"
    """Score of the term clip: "cosine" is min(1, cosine / 0.4), "sigmoid" is SigLIP's probability."""
    clip_remote_code: bool = False
    """Run the checkpoint's own code, which may do anything. FG-CLIP does not need it."""
    judge_url: str | None = None
    """URL of the server of the reward term judge (`--rewards accuracy 1 judge 0.5`), as http://localhost:8000/v1,
    with OpenAI's protocol. The environment variable VLMENV_JUDGE_KEY has its key, if it needs one. Records have ***
    in place of credentials in the URL; a resumed run reads the whole URL from VLMENV_JUDGE_URL."""
    judge_model: str | None = None
    """Name of the judge's model at the server."""
    judge_prompt: str = PROMPT
    """Prompt of the judge, with {question}, {truth} and {answer}. It must ask for yes, no, or a number from 0 to 1."""
    judge_time_limit: float = 60.0
    """Time limit for one reply of the judge, in seconds."""
    judge_retries: int = 3
    """Number of repeated requests after a failure, before training or evaluation ends with an error."""
    judge_concurrency: int = 16
    """Number of concurrent requests to the judge."""
    judge_images: bool = False
    """Show the sample's images to the judge too."""

    def __post_init__(self) -> None:
        if self.judge_url is not None:
            object.__setattr__(self, "judge_url", hidden(self.judge_url))
        if self.judge_url is not None and self.judge_model is None:
            raise ConfigError("judge_url needs judge_model, the judge's name at the server")
        for first in ("clip_model", "judge_url"):
            group = first.partition("_")[0] + "_"
            own = (field for field in dataclasses.fields(self) if field.name.startswith(group))
            given = [field.name for field in own if getattr(self, field.name) != field.default]
            if given and getattr(self, first) is None:
                raise ConfigError(f"{given[0]} goes with {first}")

    def terms(self) -> dict[str, RewardTerm]:
        """The reward terms that are asked for, by name.

        Raises:
            ConfigError: An option is out of range.
        """
        terms: dict[str, RewardTerm] = {}
        if self.clip_model is not None:
            terms["clip"] = ClipScore(self.clip_model, self.clip_score, self.clip_remote_code)
        if self.judge_url is not None:
            terms["judge"] = Judge(
                self.judge_url,
                self.judge_model or "",
                self.judge_prompt,
                self.judge_time_limit,
                self.judge_retries,
                self.judge_concurrency,
                self.judge_images,
            )
        return terms
