"""One process, or several with a whole copy of the model each (DDP); and what those with shares of it have in common.

All methods but `share` are called by all processes together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from vlmenv.agents.base import Agent, Reference
from vlmenv.core.errors import ConfigError
from vlmenv.core.rollout import Rows

T = TypeVar("T")


class Processes:
    """Processes that hold the whole model each.

    Attributes:
        name: What checkpoints are marked with.
    """

    name: ClassVar[str] = "whole copies"

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def announce(self, agent: Agent) -> None:
        """Tells an agent what it must not leave out, before its reference is made."""

    def prepare(
        self, agent: Agent, reference: Reference | None, optimizer: Callable[[], torch.optim.Optimizer]
    ) -> torch.optim.Optimizer:
        """Readies an agent for training, and gives the optimizer that is made of its parameters.

        Args:
            agent: Its policy is wrapped.
            reference: Of the agent, from before this, but after `announce`.
            optimizer: Makes the optimizer.
        """
        self.agent, plain = agent, optimizer()
        agent.policy, self._optimizer = self.accelerator.prepare(agent.policy, plain)
        return plain

    def autocast(self) -> AbstractContextManager[None]:
        """The precision of forward passes."""
        return cast(AbstractContextManager[None], self.accelerator.autocast())

    def whole(self) -> AbstractContextManager[None]:
        """Within, each process holds all weights, and runs the model at its own pace; without gradients."""
        return nullcontext()

    def cut_alike(self, parts: list[Rows]) -> list[Rows]:
        """The micro-batches of a batch, in a number that lets all processes pass through the model together."""
        return parts

    @contextmanager
    def passing(self, last: bool) -> Iterator[None]:
        """A micro-batch's forward and backward pass; copies exchange their gradients in the last one alone."""
        if last:
            yield
        else:
            with self.accelerator.no_sync(self.agent.policy):
                yield

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a loss, of which all processes' add up to the whole."""
        self.accelerator.backward(loss * self.accelerator.num_processes)  # which are averaged over

    def step(self, max_norm: float, *, learn: bool) -> float:
        """An optimiser step, and the gradient's norm; none where that is not finite. Gradients are gone after it.

        Args:
            max_norm: Gradients are scaled down to this norm.
            learn: Whether the step may be taken at all.
        """
        norm = self._clip(max_norm)
        scaled = self.accelerator.scaler is not None  # it leaves steps out by itself, and lowers its scale
        if (learn and math.isfinite(norm)) or scaled:
            self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def _clip(self, max_norm: float) -> float:
        return float(self.accelerator.clip_grad_norm_(self.agent.parameters(), max_norm))

    def weights(self) -> Mapping[str, Tensor] | None:
        """The policy's whole state for `Agent.save` by the main process; None where the agent has it."""
        return None

    def shared_state(self) -> dict[str, Any]:
        """The state of the optimizer and of the scale of its gradients, where all processes have the same."""
        scaler = self.accelerator.scaler
        return {"optimizer": self._optimizer.state_dict()} | ({} if scaler is None else {"scaler": scaler.state_dict()})

    def own_state(self) -> dict[str, Any]:
        """This process's share of it."""
        return {}

    def load(self, folder: Path, shared: dict[str, Any], own: dict[str, Any]) -> None:
        """Puts weights and the optimizer's state back from a checkpoint."""
        self.agent.load(folder)
        self._optimizer.load_state_dict((shared | own)["optimizer"])
        if self.accelerator.scaler is not None and "scaler" in shared:
            self.accelerator.scaler.load_state_dict(shared["scaler"])

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share of what is divided between them."""
        return items[self.accelerator.process_index :: self.accelerator.num_processes]

    def collect(self, items: list[T]) -> list[T]:
        """The lists of all processes, one after the other."""
        return items if self.accelerator.num_processes == 1 else cast(list[T], gather_object(items))

    def agree(self, value: T) -> T:
        """The main process's value."""
        return self.collect([value])[0]


class Shares(Processes):
    """Processes that hold a share of the model each, and so have to pass through it together.

    Attributes:
        divides_weights: Whether of the weights too.
    """

    divides_weights: bool = True

    def announce(self, agent: Agent) -> None:
        agent.in_step, agent.divided = True, self.divides_weights

    def prepare(
        self, agent: Agent, reference: Reference | None, optimizer: Callable[[], torch.optim.Optimizer]
    ) -> torch.optim.Optimizer:
        self.agent = agent
        return self._divide(agent, reference, optimizer)

    def _divide(
        self, agent: Agent, reference: Reference | None, optimizer: Callable[[], torch.optim.Optimizer]
    ) -> torch.optim.Optimizer:
        raise NotImplementedError

    def cut_alike(self, parts: list[Rows]) -> list[Rows]:
        most = max(self.collect([len(parts)]))
        parts = list(parts)
        while len(parts) < most:
            largest = max(range(len(parts)), key=lambda i: _size(parts[i]))
            if _size(parts[largest]) == 1:
                raise ConfigError("processes with shares of a model need batches of the same size each")
            parts[largest : largest + 1] = _halves(parts[largest])
        return parts

    @contextmanager
    def passing(self, last: bool) -> Iterator[None]:
        # Each pass adds to the shares of the gradient: to hold it whole until the last would take the memory
        # that sharing saves.
        yield


def _size(rows: Rows) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def _halves(rows: Rows) -> list[Rows]:
    if isinstance(rows, slice):
        middle = (rows.start + rows.stop) // 2
        return [slice(rows.start, middle), slice(middle, rows.stop)]
    return list(np.array_split(rows, 2))
