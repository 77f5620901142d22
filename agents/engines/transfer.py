"""Weights into vLLM's model, by vLLM's interface for reinforcement learning. vLLM alone imports this module.

What is not part of that interface here, and why. vLLM 0.32

- does not renew the packed weight of a tied output head on CPUs (`_pack_tied_heads`);
- keeps what a load that failed has given to a layer, and mixes it into the next load (`_give_up`);
- loses step with several workers if one but the last tells of a fault (`_together`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, distributed, nn
from vllm.distributed import get_tp_group
from vllm.distributed.weight_transfer import WeightTransferEngine
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from vlmenv.agents.engines.worker import REFUSED, Receiver, fault_of


class InProcessTransfer(WeightTransferEngine):  # type: ignore[misc]
    """Loads weights from an iterator, which another part of this process gives.

    An update is a single call of `update_weights`: vLLM has no call that gives up an update that was begun.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._tied = _tied_heads(self.model)  # now: a load that fails leaves them apart

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
            self._give_up()
            raise
        finalize_layerwise_reload(self.model, self.model_config)
        _pack_tied_heads(self._tied)
        if left := sorted({name for name, _ in self.model.named_parameters()} - taken):
            raise ValueError(f"weights were not updated: {left[:5]}")

    def _give_up(self) -> None:
        """Puts the former weights back into layers that a load has begun and not completed."""
        for layer in self.model.modules():
            info = get_layerwise_info(layer)
            info.loaded_weights, info.load_numel = [], 0
        finalize_layerwise_reload(self.model, self.model_config)


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
    group = get_tp_group()
    faults: list[str | None] = [fault] * group.world_size
    if group.world_size > 1:
        distributed.all_gather_object(faults, fault, group=group.cpu_group)
    first = next((one for one in faults if one is not None), None)
    if first is not None and group.is_last_rank:
        raise RuntimeError(REFUSED + first)


def _tied_heads(model: nn.Module) -> list[tuple[Any, Any]]:
    """Pairs of an output head and the embedding that it is tied to."""
    found = [module for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
    heads = [module for module in found if isinstance(module, ParallelLMHead)]
    return [(head, one) for head in heads for one in found if one is not head and one.weight is head.weight]


def _pack_tied_heads(tied: Iterable[tuple[Any, Any]]) -> None:
    """Renews what heads multiply by: on CPUs a packed copy, which vLLM itself renews for untied heads only."""
    for head, embedding in tied:
        head.weight = embedding.weight
        head.quant_method.process_weights_after_loading(head)
