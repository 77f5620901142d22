"""What the algorithms know of an agent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vlmenv.core.rollout import Observations, Rollout


class LogProbs(NamedTuple):
    """Log-probabilities of the tokens of N completions, padded to the longest, L."""

    values: Tensor
    """[N, L], of the distribution that is sampled from; 0 where padded"""
    entropy: Tensor
    """[N, L], in nats, without gradient; 0 where padded"""
    mask: Tensor
    """[N, L] bool, True at the completions' tokens"""
    state_values: Tensor | None = None
    """[N, L] float32, what the value head expects before each token is chosen; 0 where padded; None without a head"""


class Reference(Protocol):
    """What the KL penalty compares the policy with."""

    def logprobs(self, rollout: Rollout) -> LogProbs:
        """Log-probabilities of a rollout's completions, without gradient."""


class Agent(ABC):
    """A policy over free-text answers.

    Attributes:
        policy: The module that is trained. Its `forward` takes a `Rollout` and gives its `LogProbs`,
            so that it may be wrapped for distributed training and put back.
        max_new_tokens: The longest completion, its end token included.
        in_step: Whether each call of `logprobs` has to run every part of the model, whatever the rollout holds.
            Set where processes hold the gradients in shares: then one that left a part out would be waited for.
        divided: Whether moreover each call has to run every part as often as any other does, frozen parts too.
            Set where processes hold the weights in shares, before `reference` is called and the policy is divided.
    """

    policy: nn.Module
    max_new_tokens: int
    in_step: bool = False
    divided: bool = False

    @abstractmethod
    def act(self, observations: Observations) -> list[str]:
        """Answers each observation greedily."""

    @abstractmethod
    def rollout(self, observations: Observations) -> Rollout:
        """Samples an answer to each observation. Neighbouring copies of one observation share its prompt.

        Raises:
            PromptError: A prompt leaves no room for the answer, or cannot be encoded.
        """

    @abstractmethod
    def imitate(self, observations: Observations, texts: Sequence[str]) -> Rollout:
        """A rollout of given answers, one to each observation, as if they had been sampled with certainty.

        Raises:
            PromptError: As in `rollout`; or an answer is too long, or holds a token that is never sampled.
        """

    @abstractmethod
    def reference(self) -> Reference:
        """The policy as it is before it is trained, which training will not change."""

    @abstractmethod
    def seed(self, seed: int) -> None:
        """Makes sampling repeatable."""

    @abstractmethod
    def rng_state(self) -> Tensor:
        """Where the sampling has got to, as bytes on the CPU, for `set_rng_state`."""

    @abstractmethod
    def set_rng_state(self, state: Tensor) -> None:
        """Lets the sampling go on from where it was."""

    @abstractmethod
    def save(self, folder: Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Writes a checkpoint in the published layout.

        Args:
            folder: Appears only when it is whole.
            state_dict: The policy's, gathered where it is spread over processes; its own where left out.
        """

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Puts a checkpoint's weights back, bit for bit; all processes that hold shares of them call this together.

        Raises:
            ModelError: The checkpoint was written by an agent of another build; nothing has changed then.
        """

    def logprobs(self, rollout: Rollout) -> LogProbs:
        """Log-probabilities of a rollout's completions under the present weights, with gradient."""
        result = self.policy(rollout)
        assert isinstance(result, LogProbs)
        return result

    def sync(self) -> None:  # noqa: B027 (most agents have nobody to tell)
        """Hands the present weights to whatever else generates from them; to be called when they have changed."""

    def sleep(self) -> None:  # noqa: B027
        """Lets what else generates give up memory while the policy is trained; after it `wake`, then `sync`."""

    def wake(self) -> None:  # noqa: B027
        """Ends the `sleep`."""

    @property
    def generates_itself(self) -> bool:
        """Whether answers come of the policy's own weights, and not of a copy that `sync` renews."""
        return True

    def generating(self, times: int) -> AbstractContextManager[None]:
        """Within, this process has answers generated at most so many times, and all others that train as many times.

        Where processes share what generates, all of them have to ask it together: it does so to the end, also when the
        block fails.
        """
        return nullcontext()

    def close(self) -> None:  # noqa: B027 (most agents hold nothing)
        """Lets go of what else generates from the weights."""

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The same by part of the model, so that each part may have a learning rate of its own."""
        return {"language": self.parameters()}

    def blocks(self) -> list[nn.Module]:
        """Parts of the policy, in the order in which they run, that may be gathered by themselves where processes hold
        shares of the weights."""
        return []

    @property
    def device(self) -> torch.device:
        """Where the policy's weights are."""
        return next(self.policy.parameters()).device
