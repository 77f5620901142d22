"""One rank, or several with a replica of the model each (DDP); and the base class of ranks with shards.

All methods but `share` are collectives: all ranks must call them together.
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
    """Ranks that hold a replica of the model each.

    Args:
        accelerator: Device, precision and ranks.

    Attributes:
        name: Name of the strategy, which checkpoints record.
        takes_any_dtype: True if weights may have other data types than float32.
        gives_shards: True if `prepare` gives weights to ranks whose agents have shapes alone.
        samples_ahead: True if another thread may collect a batch during the update.
    """

    name: ClassVar[str] = "whole copies"
    takes_any_dtype: ClassVar[bool] = True
    gives_shards: ClassVar[bool] = False
    samples_ahead: ClassVar[bool] = True

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    @property
    def shards(self) -> int:
        """Number of shards that the optimizer's state is divided into."""
        return 1

    def configure(self, agent: Agent) -> None:
        """Configures an agent for these ranks, before its reference is made."""

    def prepare(
        self, agent: Agent, reference: Reference | None, optimizer: Callable[[], torch.optim.Optimizer]
    ) -> torch.optim.Optimizer:
        """Prepares an agent for training.

        Args:
            agent: The agent. Its policy gets wrapped.
            reference: The agent's reference, made after `configure` and before this call.
            optimizer: Makes the optimizer from the agent's parameters.

        Returns:
            The optimizer.
        """
        self.agent, plain = agent, optimizer()
        agent.policy, self._optimizer = self.accelerator.prepare(agent.policy, plain)
        return plain

    def autocast(self) -> AbstractContextManager[None]:
        """The precision of forward passes, as a context."""
        return cast(AbstractContextManager[None], self.accelerator.autocast())

    def gathered(self) -> AbstractContextManager[None]:
        """Gathers all weights for the block. Within it, ranks run the model independently, without gradients."""
        return nullcontext()

    def split_evenly(self, parts: list[Rows]) -> list[Rows]:
        """Splits micro-batches so that every rank has the same number."""
        return parts

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """The forward and backward pass of a micro-batch. Gradients are reduced over ranks in the last one only."""
        if last:
            yield
        else:
            with self.accelerator.no_sync(self.agent.policy):
                yield

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradient of a loss. The losses of all ranks sum to the loss of the minibatch."""
        self.accelerator.backward(loss * self.accelerator.num_processes)  # DDP averages over ranks

    def step(self, max_norm: float, *, learn: bool) -> float:
        """Takes an optimizer step, unless the gradient's norm is not finite, and sets gradients to zero.

        Args:
            max_norm: Maximum gradient norm.
            learn: If false, no step is taken.

        Returns:
            The gradient norm before clipping.
        """
        norm = self._clip(max_norm)
        scaled = self.accelerator.scaler is not None  # the scaler skips steps itself, and then lowers its scale
        if (learn and math.isfinite(norm)) or scaled:
            self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def _clip(self, max_norm: float) -> float:
        return float(self.accelerator.clip_grad_norm_(self.agent.parameters(), max_norm))

    def weights(self) -> Mapping[str, Tensor] | None:
        """The policy's gathered state on the main rank, for `Agent.save`. None: the agent's own state is complete."""
        return None

    def shared_state(self) -> dict[str, Any]:
        """State of the optimizer and the gradient scaler, if it is the same on all ranks."""
        scaler = self.accelerator.scaler
        return {"optimizer": self._optimizer.state_dict()} | ({} if scaler is None else {"scaler": scaler.state_dict()})

    def rank_state(self) -> dict[str, Any]:
        """This rank's shard of the optimizer's state, if it is sharded."""
        return {}

    def load(self, folder: Path, shared: dict[str, Any], own: dict[str, Any]) -> None:
        """Restores weights and optimizer state from a checkpoint.

        Args:
            folder: Folder with the weights.
            shared: Result of `shared_state`. If ranks divide the optimizer's state otherwise than those that saved it,
                `undivided` lists it shard by shard.
            own: Result of this rank's `rank_state`.
        """
        self.agent.load(folder)
        state = joined(shared["undivided"]) if "undivided" in shared else (shared | own)["optimizer"]
        self._optimizer.load_state_dict(state)
        if self.accelerator.scaler is not None and "scaler" in shared:
            self.accelerator.scaler.load_state_dict(shared["scaler"])

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's share of the items."""
        return items[self.accelerator.process_index :: self.accelerator.num_processes]

    def collect(self, items: list[T]) -> list[T]:
        """Gathers and concatenates the lists of all ranks."""
        return items if self.accelerator.num_processes == 1 else cast(list[T], gather_object(items))

    def broadcast(self, value: T) -> T:
        """Broadcasts the main rank's value."""
        return self.collect([value])[0]


def joined(
    shards: Sequence[dict[str, Any]], keep: Callable[[int, Tensor], Tensor] = lambda index, value: value
) -> dict[str, Any]:
    """Joins shards of an optimizer's state, which divide the first dimension of each tensor.

    Args:
        shards: The state of each shard, as `Optimizer.state_dict` gives it.
        keep: Gives what to keep of a whole tensor, by the index of its parameter. Default: all.
    """

    def join(index: int, name: str) -> Any:
        parts = [shard["state"][index][name] for shard in shards]
        if not isinstance(parts[0], Tensor) or parts[0].ndim == 0:  # the number of steps
            return parts[0]
        return keep(index, torch.cat(parts))

    state = {index: {name: join(index, name) for name in kept} for index, kept in shards[0]["state"].items()}
    return shards[0] | {"state": state}


class Sharded(Processes):
    """Ranks that hold a shard of the model each. Their forward and backward passes are collectives.

    Attributes:
        shards_weights: True if the weights are sharded, and not only gradients and optimizer state.
    """

    shards_weights: bool = True

    @property
    def shards(self) -> int:
        return int(self.accelerator.num_processes)

    def configure(self, agent: Agent) -> None:
        agent.runs_every_module, agent.sharded = True, self.shards_weights

    def prepare(
        self, agent: Agent, reference: Reference | None, optimizer: Callable[[], torch.optim.Optimizer]
    ) -> torch.optim.Optimizer:
        self.agent = agent
        return self._prepare_shards(agent, reference, optimizer)

    def _prepare_shards(
        self, agent: Agent, reference: Reference | None, optimizer: Callable[[], torch.optim.Optimizer]
    ) -> torch.optim.Optimizer:
        raise NotImplementedError

    def split_evenly(self, parts: list[Rows]) -> list[Rows]:
        most = max(self.collect([len(parts)]))
        parts = list(parts)
        while len(parts) < most:
            largest = max(range(len(parts)), key=lambda i: _size(parts[i]))
            if _size(parts[largest]) == 1:
                raise ConfigError("ranks with shards of a model need batches of the same size")
            parts[largest : largest + 1] = _halves(parts[largest])
        return parts

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        # Each pass reduces its gradient. To keep whole gradients until the last pass would take the memory that shards
        # save.
        yield


def _size(rows: Rows) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def _halves(rows: Rows) -> list[Rows]:
    if isinstance(rows, slice):
        middle = (rows.start + rows.stop) // 2
        return [slice(rows.start, middle), slice(middle, rows.stop)]
    return list(np.array_split(rows, 2))
