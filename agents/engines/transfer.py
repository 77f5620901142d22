"""Weights into vLLM's model, by vLLM's interface for reinforcement learning. vLLM alone imports this module.

What is not part of that interface here, and why. vLLM 0.32

- does not renew the packed weight of a tied output head on CPUs (`compat.pack_tied_heads`);
- keeps what a load that failed has given to a layer, and mixes it into the next load (`compat.give_up_load`);
- loses step with several workers if one but the last tells of a fault (`_together`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, distributed
from vllm.distributed.weight_transfer import WeightTransferEngine
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from vlmenv.agents.engines.worker import REFUSED, Receiver, fault_of
from vlmenv.compat import vllm as compat


class InProcessTransfer(WeightTransferEngine):  # type: ignore[misc]
    """Loads weights from an iterator, which another part of this process gives.

    An update is a single call of `update_weights`: vLLM has no call that gives up an update that was begun.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._tied = compat.tied_heads(self.model)  # now: a load that fails leaves them apart

    def parse_init_info(self, init_dict: dict[str, Any]) -> dict[str, Any]:
        return init_dict

    def parse_update_info(self, update_dict: dict[str, Any]) -> dict[str, Any]:
        return update_dict

    def init_transfer_engine(self, init_info: dict[str, Any]) -> None:
        pass

    def start_weight_update(self) -> None:
        pass

    def receive_weights(self, update_info: dict[str, Any]) -> None:
        self.load(update_info["weights"])

    def finish_weight_update(self) -> None:
        pass

    def shutdown(self) -> None:
        pass

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Loads all weights of the model.

        Args:
            weights: Published names and tensors.

        Raises:
            ValueError: A name is unknown, a shape differs, or parameters of the model were not updated.
        """
        initialize_layerwise_reload(self.model)
        try:
            taken = self.model.load_weights(weights)
        except BaseException:
            compat.give_up_load(self.model, self.model_config)
            raise
        finalize_layerwise_reload(self.model, self.model_config)
        compat.pack_tied_heads(self._tied)
        if left := sorted({name for name, _ in self.model.named_parameters()} - taken):
            raise ValueError(f"weights were not updated: {left[:5]}")


class ServerTransfer(InProcessTransfer):
    """Loads weights that trainers send to a server, by file or by channel."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._receiver = Receiver(self.parallel_config.rank, self.device, self.load)

    def init_transfer_engine(self, init_info: dict[str, Any]) -> None:
        _together(lambda: self._receiver.join(**init_info))

    def receive_weights(self, update_info: dict[str, Any]) -> None:
        take = self._receiver.read if "path" in update_info else self._receiver.receive
        _together(lambda: take(**update_info))

    def shutdown(self) -> None:
        self._receiver.leave()


def _together(work: Callable[[], None]) -> None:
    """Runs a function on all workers. If it fails on any, the last worker raises, with the first fault.

    Only the last may: vLLM's executor of several workers stops reading their answers at the first fault, and would
    take the remaining ones for answers to its next call.

    Raises:
        RuntimeError: It failed on a worker.
    """
    fault = None
    try:
        work()
    except Exception as error:  # any: the other workers wait to be told
        fault = fault_of(error)
    group, rank = compat.tensor_parallel_group()
    faults: list[str | None] = [fault] * distributed.get_world_size(group)
    distributed.all_gather_object(faults, fault, group=group)
    first = next((one for one in faults if one is not None), None)
    if first is not None and rank == len(faults) - 1:
        raise RuntimeError(REFUSED + first)
