"""Steps of sampling that a GPU replays as one CUDA graph, in place of a thousand kernels that the host starts.

A graph's kernels read and write the same memory each time. So its steps have fixed shapes: the caches' places are
numbers on the device, and attention goes through all of the caches, as far as they are filled. Layers with states hold
those before and after a step, which may be computed again. Where completions leave or caches grow, another graph is
captured.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor

from vlmenv.agents.fusing import GPUS
from vlmenv.agents.packing import Filled
from vlmenv.agents.passes import Steps
from vlmenv.agents.policy import Policy, next_position
from vlmenv.agents.trials import kind_of, largest_difference
from vlmenv.compat.torch import without_modes

_log = logging.getLogger(__name__)
_FEWEST: Final = 8
"""Steps for which a graph is captured, at least; capturing takes about as long as three steps without one."""
_WITHIN: Final = {4: 1e-3, 2: 5e-2}
"""Largest difference of a replayed step, as a share of the largest number, by the bytes of a number."""
_Run = Callable[[], Tensor]


class Stepper:
    """Gives completions one token after the other to a policy.

    Args:
        policy: The policy.
        attention: The completions, and what they go on from.
        positions: int64 [n], positions of the completions' first tokens.
        replays: If true, steps are captured and replayed, unless `Policy.graph_fault` says why not.
    """

    def __init__(self, policy: Policy, attention: Steps, positions: Tensor, *, replays: bool) -> None:
        self._policy, self._attention, self._positions = policy, attention, positions
        self._replays = replays
        self._replay: _Run | None = None
        self._token = self._place = positions  # of steps of fixed shapes, from `begin` on

    def select(self, rows: Tensor, kept: Tensor) -> None:
        """Keeps only some completions: `rows` [m] on the CPU, `kept` [m] the same on the device."""
        self._replay = None
        self._attention.select(rows)
        self._positions = self._positions[kept]

    def extend(self, token: Tensor) -> Tensor:
        """Runs the next token [n] of each completion: final hidden states [n, H], which the next step overwrites."""
        attention = self._attention
        if attention.is_full:
            self._replay = None  # whose caches are too small
        if self._replay is not None:
            self._token.copy_(token)
            self._place.fill_(attention.length)
            hidden = self._replay()
        elif self._is_worth_it():
            hidden = self._captured(token)
        else:
            attention.place = attention.filled = None
            hidden = self._policy.extend(token, self._positions + attention.length, attention)
        attention.length += 1
        return hidden

    def begin(self, token: Tensor) -> None:
        """Makes the memory from which steps of fixed shapes read the next token [n] and its place."""
        self._token = token.clone()
        self._place = torch.full((1,), self._attention.length, device=token.device)

    def run(self) -> Tensor:
        """Computes the step of fixed shapes that graphs have, as often as it is called."""
        attention = self._attention
        attention.place = self._place
        attention.filled = Filled(self._place + 1, len(self._token), attention.next_capacity)
        return self._policy.extend(self._token, self._positions + self._place, attention)

    def _is_worth_it(self) -> bool:
        left = self._attention.next_capacity - self._attention.length
        return self._replays and not self._policy.graph_fault and left >= _FEWEST

    def _captured(self, token: Tensor) -> Tensor:
        """Computes a step, and captures it for those that follow."""
        self.begin(token)
        right = self.run()  # which makes all that is made once, so that the graph only reads it
        try:
            replay = capture(self.run)
            fault = difference_of(replay(), right)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever cannot be captured
            fault = kind_of(error)
        if fault:
            _note(self._policy, fault)
        else:
            self._replay = replay
        return right


def difference_of(found: Tensor, right: Tensor) -> str:
    """How replayed hidden states differ from the right ones; empty if they do not."""
    difference = largest_difference([found], [right])
    within = _WITHIN[max(2, min(4, right.dtype.itemsize))]
    return "" if difference <= within else f"a replayed step differs by {difference:.2g} of its largest number"


def replays(policy: Policy) -> bool:
    """True if steps of a policy are captured and replayed; the first call on a GPU tries it."""
    return policy.device.type == GPUS and not fault_of(policy)


def fault_of(policy: Policy) -> str:
    """Why steps of a policy are not replayed on its GPU, after a trial; empty if they are. A warning tells it once."""
    if policy.graph_fault is None:
        policy.graph_fault = ""
        with without_modes(), torch.no_grad():
            if fault := _trial(policy):
                _note(policy, fault)
    return policy.graph_fault


def _note(policy: Policy, fault: str) -> None:
    policy.graph_fault = fault
    _log.warning(
        "steps of sampling are not replayed as CUDA graphs on %s, and are slower: %s. Results stay right",
        *(policy.device, fault),
    )


def _trial(policy: Policy) -> str:
    """Tries a replayed step against the same one without graph, of a few words; how it fails, or empty."""
    if policy.sharded:
        return "the weights are divided among ranks"
    prompt = policy.family.encode({"images": (), "prompt": "How many?"})
    prefixes, _ = policy.prefill([prompt])
    index = torch.zeros(2, dtype=torch.int64)
    positions = torch.full((2,), next_position(prompt), device=policy.device)
    stepper = Stepper(policy, Steps(prefixes, index, Steps.GROWTH), positions, replays=True)
    tokens = torch.from_numpy(prompt.input_ids).to(policy.device)
    stepper.begin(tokens[:2])
    stepper.run()  # which makes and tries all that is made and tried once
    try:
        with refusing_waits():  # a capture that fails would leave PyTorch's random generator as it is within captures
            stepper.run()
    except RuntimeError as error:
        return kind_of(error)
    stepper.extend(tokens[:2])
    if policy.graph_fault:
        return ""  # it is told
    return difference_of(stepper.extend(tokens[2:4]).clone(), stepper.run())


@contextmanager
def refusing_waits() -> Iterator[None]:
    """Within the context, what makes the host wait for the GPU is a RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def capture(run: _Run) -> _Run:
    """Captures the kernels that a function starts. What is returned starts them again, and gives the same tensor.

    Raises:
        RuntimeError: The function does what a graph cannot hold, as waiting for the GPU.
    """
    graph = torch.cuda.CUDAGraph()
    # A capture that fails does not put the stream back. Other threads may go on meanwhile.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay
