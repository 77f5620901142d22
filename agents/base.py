"""The base class of agents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vlmenv.core.errors import ConfigError
from vlmenv.core.rollout import Observations, Rollout, Turns


class LogProbs(NamedTuple):
    """Log-probabilities of the tokens of N completions, padded to the longest, L."""

    values: Tensor
    """[N, L], of the sampling distribution; 0 at padding"""
    entropy: Tensor
    """[N, L], in nats; 0 at padding"""
    mask: Tensor
    """bool [N, L], True at the completions' tokens"""
    state_values: Tensor | None = None
    """float32 [N, L], values of the states in which the tokens are chosen; 0 at padding; None without a value head"""
    router_loss: Tensor | None = None
    """the routers' load-balancing loss over prompts and completions; None without experts, or with repeated prompts"""


class Reference(Protocol):
    """The frozen policy that the KL penalty compares with."""

    def logprobs(self, rollout: Rollout) -> LogProbs:
        """Computes log-probabilities of a rollout's completions, without gradient."""


class Agent(ABC):
    """A policy over free-text completions.

    Attributes:
        policy: The module that is trained. Its `forward` maps a `Rollout` to `LogProbs`, so that it can be wrapped for
            distributed training.
        max_new_tokens: Length limit of completions in tokens, end token included.
        runs_every_module: If true, every call of `logprobs` runs every submodule, also the vision tower without images.
            With sharded gradients a rank that skips one would deadlock the collective.
        sharded: If true, moreover every call runs every submodule equally often, also frozen ones. Set for sharded
            weights, before `reference` is called and the policy is sharded.
        empty_reference: If true, `reference` copies no weights, but shapes and data types. Ranks with shards of the
            policy fill it with copies of them.
    """

    policy: nn.Module
    max_new_tokens: int
    runs_every_module: bool = False
    sharded: bool = False
    empty_reference: bool = False

    @abstractmethod
    def act(self, observations: Observations) -> list[str]:
        """Generates a greedy completion for each observation.

        Returns:
            [N], the texts.

        Raises:
            PromptError: As in `rollout`.
        """

    @abstractmethod
    def rollout(self, observations: Observations, *, greedy: bool = False) -> Rollout:
        """Samples a completion for each observation. Neighbouring copies of an observation share one prompt.

        Args:
            observations: [N].
            greedy: If true, takes the likeliest tokens, as `act` does.

        Raises:
            PromptError: A prompt leaves no room for the completion, or cannot be encoded.
        """

    def proceed(
        self, rollout: Rollout, observations: Turns, *, greedy: bool = False, texts: Sequence[str] | None = None
    ) -> Rollout:
        """Answers the environments' next turns, in episodes of several turns.

        The tokens so far stay as they were sampled; those of the environment's turn and of the answer follow them. An
        answer that has no room in the model is empty, with the `finish_reason` `length`.

        Args:
            rollout: The episodes so far, N.
            observations: [N], the conversations so far; None for episodes that have ended, whose rows stay the same.
            greedy: As in `rollout`.
            texts: [N], given answers, with log-probabilities 0, in place of generated ones. Default: none.

        Raises:
            ConfigError: This agent has episodes of one step alone.
            PromptError: A turn cannot be encoded; or, as in `imitate`, a given answer.
        """
        raise ConfigError(f"{type(self).__name__} answers one turn: it has no proceed() for episodes of several turns")

    @abstractmethod
    def imitate(self, observations: Observations, texts: Sequence[str]) -> Rollout:
        """Makes a rollout of given answers, with log-probabilities 0.

        Args:
            observations: [N].
            texts: [N], an answer for each observation.

        Raises:
            PromptError: As in `rollout`; or an answer is too long, or holds a token that is never sampled.
        """

    @abstractmethod
    def reference(self) -> Reference:
        """Freezes the present policy as the reference of the KL penalty."""

    @abstractmethod
    def seed(self, seed: int) -> None:
        """Seeds sampling."""

    @abstractmethod
    def rng_state(self) -> Tensor:
        """State of the sampling generator, uint8 on the CPU, for `set_rng_state`."""

    @abstractmethod
    def set_rng_state(self, state: Tensor) -> None:
        """Restores a state of `rng_state`."""

    @abstractmethod
    def save(self, folder: Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Writes a checkpoint in the published layout, atomically.

        Args:
            folder: Folder to write.
            state_dict: The policy's gathered state. Default: the policy's own state.
        """

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Restores a checkpoint's weights bit for bit. With sharded weights this is a collective.

        Raises:
            ModelError: The checkpoint does not fit this agent. The weights stay unchanged.
        """

    def logprobs(self, rollout: Rollout) -> LogProbs:
        """Computes log-probabilities of a rollout's completions under the present weights, with gradient."""
        result = self.policy(rollout)
        assert isinstance(result, LogProbs)
        return result

    def reprompted(self, rollout: Rollout, observations: Observations) -> Rollout:
        """The same completions after other prompts, for `logprobs`.

        Args:
            rollout: N completions.
            observations: [N], what each completion is to follow.

        Raises:
            PromptError: As in `rollout`.
            ConfigError: The agent cannot do this.
        """
        raise ConfigError(f"{type(self).__name__} cannot show other prompts: it has no method `reprompted`")

    @property
    def routes(self) -> bool:
        """True if `logprobs` gives a `router_loss`: the policy is a mixture of experts."""
        return False

    def sync(self) -> None:  # noqa: B027 (agents without an engine)
        """Sends the present weights to the engine. Call it after each update."""

    def sleep(self) -> None:  # noqa: B027
        """Lets the engine free memory during the update. Call `wake`, then `sync`, before the next rollout."""

    def wake(self) -> None:  # noqa: B027
        """Ends `sleep`."""

    def forget_images(self) -> None:  # noqa: B027
        """Drops what the engine keeps of images at the next `sync`."""

    @property
    def generates_itself(self) -> bool:
        """True if the policy itself generates completions, and no engine does."""
        return True

    @property
    def max_images(self) -> int | None:
        """Most images of a conversation that the engine takes. None: no limit."""
        return None

    @property
    def max_videos(self) -> int | None:
        """Most videos of a prompt that the engine takes. None: no limit."""
        return None

    def check_episodes(self, max_turns: int, max_images: int, *, videos: bool = False) -> None:
        """Checks that episodes with as many answers and images can be answered.

        Args:
            max_turns: Maximum number of answers.
            max_images: Maximum number of images.
            videos: Whether prompts may have videos.

        Raises:
            ConfigError: The engine takes fewer images, or no videos.
        """
        if videos and self.max_videos == 0:
            raise ConfigError("the task takes videos, and the engine none: take engine hf, the model itself")
        if max_turns > 1 and self.max_images is not None and max_images > self.max_images:
            raise ConfigError(
                f"episodes have up to {max_images} images, and the engine takes {self.max_images}: raise "
                "--engine-images, of vlmenv serve with servers, or give the task a smaller max_images"
            )

    def generating(self, times: int) -> AbstractContextManager[None]:
        """Announces at most `times` calls of `rollout`, `proceed` or `act` in the block, the same number on all ranks.

        Ranks that share an engine call it together. At the end of the block, also after an error, this rank takes part
        in the remaining calls of the others.
        """
        return nullcontext()

    def close(self) -> None:  # noqa: B027 (agents without an engine)
        """Closes the engine."""

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The trained parameters by part of the model, each of which can have its own learning rate."""
        return {"language": self.parameters()}

    def blocks(self) -> list[nn.Module]:
        """Submodules that are gathered one at a time if weights are sharded, in the order in which they run."""
        return []

    @property
    def device(self) -> torch.device:
        """Device of the policy's weights."""
        return next(self.policy.parameters()).device
