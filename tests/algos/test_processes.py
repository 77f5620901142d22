from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from conftest import ROOT, launch

from vlmenv.agents.vlm import VLMAgent
from vlmenv.core.errors import ConfigError
from vlmenv.processes import meet, processes_of
from vlmenv.processes.base import Sharded
from vlmenv.processes.launch import check_deepspeed, check_fsdp

sys.path.append(str(ROOT / "tests" / "agents"))
from small_models import invent

NAMES = {"ddp": "whole copies", "fsdp2": "FSDP2", "deepspeed_zero2": "ZeRO", "deepspeed_zero3": "ZeRO"}


@pytest.fixture(scope="module")
def internvl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of another make than the built-in one: its tower is laid out and named otherwise."""
    folder = tmp_path_factory.mktemp("internvl")
    invent("internvl", folder)
    return folder


@pytest.mark.parametrize("kind", NAMES)
def test_two_processes_learn_as_one(kind: str, tmp_path: Path, internvl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have the gradient of one, save, go on and evaluate as one, and do not wait for one another in vain.

    The files of a model in bfloat16 have the rounded weights, of shards too, and beside them is what was rounded away.
    """
    base, runs = tmp_path / "base", tmp_path / "runs"
    VLMAgent.from_pretrained("builtin").publish(base, dtype=torch.bfloat16)
    monkeypatch.setenv("BF16_BASE", str(base))
    sorts = ["bf16", "full", *["lora"] * bool(importlib.util.find_spec("peft"))]
    script = Path(__file__).parent / "two_processes.py"
    done = launch(kind, str(script), NAMES[kind], ",".join(sorts), str(runs), str(internvl))
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in runs.iterdir()) == sorts


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_weights_and_states_of_fewer_bits_on_two_processes(kind: str, tmp_path: Path) -> None:
    for library in ("peft", "bitsandbytes"):
        pytest.importorskip(library)
    base, runs = tmp_path / "base", tmp_path / "runs"
    VLMAgent.from_pretrained("builtin").publish(base, dtype=torch.bfloat16)
    cases = ["frozen", "nf4", "int8", "whole eight", *["eight", "whole"] * (kind == "fsdp2")]
    script = Path(__file__).parent / "narrow_processes.py"
    done = launch(kind, str(script), NAMES[kind], str(base), str(runs), ",".join(cases))
    assert done.returncode == 0, done.stderr
    assert {path.name for path in runs.iterdir()} == set(cases)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_several_ranks_roll_out_ahead(kind: str, tmp_path: Path) -> None:
    """Each samples with weights of a step before; they go on bit for bit, and end together."""
    script = Path(__file__).parent / "stale_processes.py"
    done = launch(kind, str(script), NAMES[kind], str(tmp_path))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_mask_images_and_have_a_teacher(kind: str) -> None:
    """The gradient with masked images is that of one process; all keep the same weights."""
    done = launch(kind, str(Path(__file__).parent / "seeing_processes.py"), NAMES[kind])
    assert done.returncode == 0, done.stderr


def test_shards_go_on_as_whole_copies_and_back(tmp_path: Path) -> None:
    """The optimizer's state is the same, and the next step learns the same."""
    done = launch("fsdp2", str(Path(__file__).parent / "divided_anew.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("stage", [2, 3])
def test_other_ranks_go_on_with_shards_of_deepspeed(stage: int, tmp_path: Path) -> None:
    """From two to one to three to two: the optimizer's state of each weight stays the same."""
    pytest.importorskip("deepspeed")
    script, saved = str(Path(__file__).parent / "shards_divided_anew.py"), ["nothing", "two", "one", "three", "again"]
    for source, target, ranks in zip(saved, saved[1:], (2, 1, 3, 2), strict=False):
        done = launch(f"deepspeed_zero{stage}", script, source, target, str(tmp_path), processes=ranks)
        assert done.returncode == 0, done.stderr
    done = launch(f"deepspeed_zero{5 - stage}", script, "again", "never", str(tmp_path))
    assert f"saved with ZeRO's stage {stage}, not {5 - stage}: launch as" in done.stderr


def test_the_main_process_alone_needs_to_load_weights(tmp_path: Path) -> None:
    """Of a model, of adapters as the model, and of a checkpoint."""
    pytest.importorskip("peft")
    base, adapters = tmp_path / "base", tmp_path / "adapters"
    VLMAgent.from_pretrained("builtin").publish(base, dtype=torch.bfloat16)
    agent = VLMAgent.from_pretrained(base)
    agent.add_lora(rank=2, alpha=4, vision=True)
    for parameter in agent.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    agent.save(adapters)
    script = str(Path(__file__).parent / "weights_of_main.py")
    done = launch("fsdp2", script, str(base), str(adapters), str(tmp_path / "runs"))
    assert done.returncode == 0, done.stderr


def test_two_processes_hold_the_bytes_that_are_foretold() -> None:
    """Weights, gradients, optimizer state and reference, with a frozen tower, as copies and as shards."""
    done = launch("fsdp2", str(Path(__file__).parent / "held_by_ranks.py"))
    assert done.returncode == 0, done.stderr


def test_copies_of_shards_learn_as_one_process(tmp_path: Path) -> None:
    done = launch("fsdp2", str(Path(__file__).parent / "copies_of_shards.py"), str(tmp_path), processes=4)
    assert done.returncode == 0, done.stderr


def test_copies_of_shards_go_with_fsdp2() -> None:
    with pytest.raises(ConfigError, match="shard_within goes with several ranks under FSDP2"):
        processes_of(Accelerator(cpu=True), shard_within=2)


def test_an_interface_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9")
    with pytest.raises(ConfigError, match=r"GLOO_SOCKET_IFNAME names 'eth9': network interfaces .* are .*lo"):
        meet(cpu=True)


@pytest.mark.parametrize("as_slices", [True, False])
def test_micro_batches_are_cut_until_all_have_as_many(as_slices: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = Sharded(Accelerator(cpu=True))
    parts: list[Any] = [slice(0, 2), slice(2, 7)] if as_slices else [np.arange(2), np.arange(2, 7)]
    monkeypatch.setattr(shares, "collect", lambda own: [*own, 5])
    cut = [np.arange(7)[part].tolist() for part in shares.split_evenly(parts)]
    assert len(cut) == 5
    assert sorted(row for part in cut for row in part) == list(range(7))
    assert max(map(len, cut)) == 2
    monkeypatch.setattr(shares, "collect", lambda own: [*own, 8])
    with pytest.raises(ConfigError, match="batches of the same size"):
        shares.split_evenly(parts)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "use --micro-batch-size"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "give --precision bf16"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "dynamo_backend"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "megatron_lm"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "parallelism_config"),
    ],
)
def test_what_the_launch_asks_for_in_vain_is_refused(
    variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "MEGATRON" in variable:
        accelerator = Accelerator(cpu=True, mixed_precision="no")  # which would look for it
    monkeypatch.setenv(variable, value)
    if "MEGATRON" not in variable:
        accelerator = Accelerator(cpu=True, mixed_precision="no")
    with pytest.raises(ConfigError, match=message):
        processes_of(accelerator)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fsdp_version": 1}, "set fsdp_version to 2"),
        ({"cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading must be false"),
        ({"cpu_offload": True}, "fsdp_offload_params must be false"),
        ({"activation_checkpointing": True}, "use --gradient-checkpointing"),
        ({"ignored_modules": "visual"}, "fsdp_ignored_modules"),
    ],
)
def test_what_is_not_supported_of_fsdp_is_refused(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # which the plugin changes
    accelerator = Accelerator(cpu=True)
    check_fsdp(accelerator, FullyShardedDataParallelPlugin(fsdp_version=2))
    with pytest.raises(ConfigError, match=message):
        check_fsdp(accelerator, FullyShardedDataParallelPlugin(**({"fsdp_version": 2} | options)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero_stage": 0}, "stage must be 1, 2 or 3"),
        ({"zero_stage": 3, "zero3_init_flag": True}, "zero3_init_flag must be false"),
        ({"offload_optimizer_device": "cpu"}, "offload_optimizer is not supported"),
        ({"offload_param_device": "cpu", "zero_stage": 3, "zero3_init_flag": False}, "offload_param is not supported"),
        ({"gradient_clipping": 0.5}, "use --max-grad-norm"),
        ({"gradient_accumulation_steps": 4}, "use --micro-batch-size"),
        ({"hf_ds_config": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}}, "DeepSpeed's bf16"),
    ],
)
def test_what_is_not_supported_of_deepspeed_is_refused(options: dict[str, Any], message: str) -> None:
    accelerator = Accelerator(cpu=True)
    check_deepspeed(accelerator, DeepSpeedPlugin(zero_stage=2))
    check_deepspeed(accelerator, DeepSpeedPlugin(zero_stage=3, zero3_init_flag=False))
    with pytest.raises(ConfigError, match=message):
        check_deepspeed(accelerator, DeepSpeedPlugin(**options))
