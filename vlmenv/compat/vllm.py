"""Private parts of vLLM. Functions import it where they need it, as it takes long; `tests` marked vllm try them."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from torch import distributed

from vlmenv.compat import Use

_log = logging.getLogger(__name__)
_REGISTRY: Final = "vllm.model_executor.models.registry"
_RELOAD: Final = "vllm.model_executor.model_loader.reload.layerwise"
_MEDIA: Final = "vllm.multimodal.media"
_EMBEDDINGS: Final = "vllm.model_executor.layers.vocab_parallel_embedding"


def inspect_in_process() -> None:
    """Makes vLLM inspect a model's class in this process, and not in another one that begins without this package.

    A warning tells where this release cannot.
    """
    if problem := _check_registry():
        _log.warning("%s: it starts a process to look at the model's class, which may fail on CPUs", problem)
        return
    importlib.import_module(_REGISTRY)._run_in_subprocess = lambda look: look()  # type: ignore[attr-defined]


def _check_registry() -> str | None:
    found = hasattr(importlib.import_module(_REGISTRY), "_run_in_subprocess")
    return None if found else "vLLM inspects models in another way"


def tensor_parallel_group() -> tuple[Any, int]:
    """The group, on CPUs, of the ranks that share an engine; and this rank's place in it."""
    group = importlib.import_module("vllm.distributed.parallel_state").get_tp_group()
    return group.cpu_group, int(group.rank_in_group)


def _check_group() -> str | None:
    found = hasattr(importlib.import_module("vllm.distributed.parallel_state"), "get_tp_group")
    return None if found else "vLLM has no get_tp_group"


def forget_features(llm: Any) -> None:
    """Empties the cache of features of images."""
    llm.llm_engine.reset_encoder_cache()


def tied_heads(model: Any) -> list[tuple[Any, Any]]:
    """Pairs of an output head and the embedding that it is tied to."""
    kinds: Any = importlib.import_module(_EMBEDDINGS)
    found = [module for module in model.modules() if isinstance(module, kinds.VocabParallelEmbedding)]
    heads = [module for module in found if isinstance(module, kinds.ParallelLMHead)]
    return [(head, one) for head in heads for one in found if one is not head and one.weight is head.weight]


def pack_tied_heads(tied: list[tuple[Any, Any]]) -> None:
    """Makes tied heads multiply by new weights: on CPUs by a packed copy, which vLLM renews for untied heads only."""
    for head, embedding in tied:
        head.weight = embedding.weight
        head.quant_method.process_weights_after_loading(head)


def give_up_load(model: Any, config: Any) -> None:
    """Puts the former weights back into layers that a load has begun: vLLM would mix their parts into the next load."""
    reload: Any = importlib.import_module(_RELOAD)
    for layer in model.modules():
        info = reload.get_layerwise_info(layer)
        info.loaded_weights, info.load_numel = [], 0
    reload.finalize_layerwise_reload(model, config)


def _check_reload() -> str | None:
    found = hasattr(importlib.import_module(_RELOAD), "get_layerwise_info")
    return None if found else "vLLM keeps track of a load in another way"


def _check_embeddings() -> str | None:
    kinds: Any = importlib.import_module(_EMBEDDINGS)
    return None if issubclass(kinds.ParallelLMHead, kinds.VocabParallelEmbedding) else "heads are no embeddings"


def register_video_loader(name: str, loader: type) -> None:
    """Makes a class that reads videos known to vLLM, in the process of a server that reads requests."""
    importlib.import_module(_MEDIA).VIDEO_LOADER_REGISTRY.register(name)(loader)


def _check_loaders() -> str | None:
    registry = getattr(importlib.import_module(_MEDIA), "VIDEO_LOADER_REGISTRY", None)
    return None if hasattr(registry, "register") else "vLLM has no registry of video loaders"


def logits_processors() -> tuple[type, ...]:
    """The base classes of logits processors of vLLM's two kinds of runners. GPUs use the second."""
    first = importlib.import_module("vllm.v1.sample.logits_processor").LogitsProcessor
    second = importlib.import_module("vllm.v1.worker.gpu.sample.logits_processor").LogitsProcessor
    return first, second


def _check_processors() -> str | None:
    return None if all(hasattr(kind, "apply") for kind in logits_processors()) else "processors have no apply"


@contextmanager
def keeping_processes() -> Iterator[None]:
    """Stops vLLM's shutdown from destroying the training process group."""
    destroy = distributed.destroy_process_group

    def destroy_own(group: Any = None) -> None:
        if group is not None:
            destroy(group)

    distributed.destroy_process_group = destroy_own
    try:
        yield
    finally:
        distributed.destroy_process_group = destroy


def shut_down(llm: Any) -> None:
    """Ends an engine in this process."""
    llm.llm_engine.engine_core.shutdown()


USES: Final = (
    Use("inspection of models", _check_registry, "on CPUs vLLM may not start"),
    Use("groups of ranks", _check_group, "ranks cannot share an engine"),
    Use("tied heads", _check_embeddings, "updates of models with tied heads fail"),
    Use("half-loaded layers", _check_reload, "a load of weights that fails spoils the next one"),
    Use("loaders of videos", _check_loaders, "vLLM does not start, as servers could read no videos"),
    Use("logits processors", _check_processors, "vLLM does not start, as tokens could not be banned"),
)
