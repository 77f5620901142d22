"""The strategy that `accelerate launch` asks for, and checks of its configuration."""

from __future__ import annotations

import ctypes
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any, Final

from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, DynamoBackend, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import CPUOffloadPolicy

from vlmenv.compat.accelerate import launched_precision, launched_with
from vlmenv.core.errors import require
from vlmenv.processes.base import Processes
from vlmenv.processes.fsdp import FSDP
from vlmenv.processes.zero import ZeRO

_GIVEN_BACK: Final = 0.5
"""Seconds after which gloo's threads have given back their tensors: many times a busy system's turn."""


def processes_of(accelerator: Accelerator, shard_within: int | None = None) -> Processes:
    """Chooses the strategy of an accelerator's configuration.

    On CPUs accelerate ignores FSDP and DeepSpeed silently. Here they are used on CPUs too.

    Args:
        accelerator: Device, precision and ranks.
        shard_within: Number of neighbouring ranks that hold a copy of the model between them, with FSDP2. Default: all.

    Raises:
        ConfigError: The configuration asks for something that is not supported, or that would have no effect.
    """
    _check(accelerator)
    if accelerator.distributed_type != DistributedType.NO and launched_with("FSDP"):
        plugin = getattr(accelerator.state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin()
        check_fsdp(accelerator, plugin)
        require(
            accelerator.num_processes % (shard_within or 1) == 0,
            f"shard_within={shard_within} does not divide the {accelerator.num_processes} ranks",
        )
        return FSDP(accelerator, plugin.reshard_after_forward, shard_within)
    require(shard_within is None, "shard_within goes with several ranks under FSDP2: see docs/distributed.md")
    if accelerator.distributed_type != DistributedType.NO and launched_with("DEEPSPEED"):
        plugin = DeepSpeedPlugin()  # as launched; accelerate has filled in its own copy
        check_deepspeed(accelerator, plugin)
        return ZeRO(accelerator, _without_auto(plugin.deepspeed_config["zero_optimization"]))
    return Processes(accelerator)


def end_with_parent() -> None:
    """Has the system send SIGTERM to this process when its parent ends, however that ends. Linux only.

    Ranks would otherwise go on without their launcher, and hold the run's folder.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def leave() -> None:
    """Parts this process from the others, as the last thing before it ends.

    Gloo's threads give back tensors after their work is done. If Python ends at that moment, they abort the process
    (pytorch issue 190489), and a finished run is told as failed. So this waits for them.
    """
    state = PartialState()
    state.destroy_process_group()
    if state.num_processes > 1:
        time.sleep(_GIVEN_BACK)


def _check(accelerator: Accelerator) -> None:
    require(
        accelerator.gradient_accumulation_steps == 1,
        "gradient_accumulation_steps of accelerate must be 1: use --micro-batch-size to save memory",
    )
    asked = launched_precision()
    require(
        asked in ("no", accelerator.mixed_precision),
        f"mixed_precision {asked} of accelerate has no effect: give --precision {asked}, or remove it there",
    )
    compiles = accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
    require(not compiles, "dynamo_backend of accelerate is not supported: set it to no")
    for name in ("MEGATRON_LM", "PARALLELISM_CONFIG"):
        require(not launched_with(name), f"{name.lower()} of accelerate is not supported: see docs/distributed.md")


def check_fsdp(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Raises ConfigError if a configuration of FSDP asks for something that is not supported."""
    require(plugin.fsdp_version == 2, f"FSDP {plugin.fsdp_version} is not supported: set fsdp_version to 2")
    require(
        not plugin.cpu_ram_efficient_loading,
        "fsdp_cpu_ram_efficient_loading must be false: the main rank alone loads weights in any case",
    )
    require(not isinstance(plugin.cpu_offload, CPUOffloadPolicy), "fsdp_offload_params must be false")
    require(
        not plugin.activation_checkpointing,
        "fsdp_activation_checkpointing does not work with shared prompts: use --gradient-checkpointing",
    )
    require(plugin.ignored_modules is None, "fsdp_ignored_modules is not supported: the whole model is sharded")
    require(accelerator.mixed_precision != "fp16", "FSDP does not support precision fp16: use bf16")


_DEEPSPEED = {
    "zero_optimization",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "steps_per_print",
}
"""Supported keys of DeepSpeed's configuration."""


def check_deepspeed(accelerator: Accelerator, plugin: DeepSpeedPlugin) -> None:
    """Raises ConfigError if a configuration of DeepSpeed asks for something that is not supported."""
    require(accelerator.mixed_precision != "fp16", "DeepSpeed does not support precision fp16 here: use bf16")
    config = plugin.deepspeed_config
    require(not (other := sorted(set(config) - _DEEPSPEED)), f"DeepSpeed's {', '.join(other)} is not supported here")
    zero = config["zero_optimization"]
    require(zero["stage"] in (1, 2, 3), f"DeepSpeed's ZeRO stage must be 1, 2 or 3, not {zero['stage']}")
    for name in ("offload_optimizer", "offload_param"):
        require(zero.get(name, {}).get("device", "none") == "none", f"DeepSpeed's {name} is not supported")
    require(not plugin.zero3_init_flag, "zero3_init_flag must be false: every rank reads the model's weights itself")
    require(
        config.get("gradient_clipping", "auto") == "auto",
        "remove DeepSpeed's gradient_clipping: use --max-grad-norm",
    )
    require(
        config.get("gradient_accumulation_steps", 1) in ("auto", 1),
        "gradient_accumulation_steps of DeepSpeed must be 1: use --micro-batch-size to save memory",
    )


def _without_auto(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options without those at "auto", for which DeepSpeed has defaults."""
    return {name: value for name, value in options.items() if value != "auto"}
