"""Private parts of other libraries: that they are there, and what is said and done where one is gone."""

from __future__ import annotations

import importlib
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from batches import observations
from small_models import invent
from transformers import core_model_loading
from transformers.models.auto import processing_auto

from vlmenv import compat
from vlmenv.agents import kernels, lora, saved_activations
from vlmenv.agents.families import idefics3
from vlmenv.agents.fast_paths import fast_paths, written
from vlmenv.agents.kernels import kernel_for
from vlmenv.agents.vlm import Sampling, VLMAgent
from vlmenv.compat import accelerate as compat_accelerate
from vlmenv.compat import pillow as compat_pillow
from vlmenv.compat import torch as compat_torch
from vlmenv.compat import transformers as compat_transformers
from vlmenv.core.errors import CheckpointError, ConfigError
from vlmenv.core.rollout import Rollout
from vlmenv.doctor.prediction import Place, predict
from vlmenv.options.train import default_config

Break = Callable[[pytest.MonkeyPatch], object]


class Without:
    """Another object without some attributes."""

    def __init__(self, other: Any, *gone: str) -> None:
        self._other, self._gone = other, gone

    def __getattr__(self, name: str) -> Any:
        if name in self._gone:
            raise AttributeError(f"no attribute '{name}'")
        return getattr(self._other, name)


def _gone(_: object) -> Any:
    raise AttributeError("gone")


BROKEN: dict[tuple[str, str], Break] = {
    ("torch", "attention operators"): lambda patch: patch.setattr(
        torch.ops, "aten", Without(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
    ),
    ("torch", "versions of tensors"): lambda patch: patch.setattr(
        torch.Tensor, "_version", property(_gone), raising=False
    ),
    ("torch", "switched modes"): lambda patch: patch.delattr("torch.utils._python_dispatch._disable_current_modes"),
    ("torch", "fake tensors"): lambda patch: patch.setattr(compat_torch, "FakeTensorMode", nullcontext),
    ("torch", "process groups"): lambda patch: patch.delattr(torch.distributed.ProcessGroupGloo, "_Options"),
    ("transformers", "weight conversion"): lambda patch: patch.delattr(core_model_loading, "revert_weight_conversion"),
    ("transformers", "names of attention"): lambda patch: patch.setattr(
        compat_transformers, "attention_of", lambda _: None
    ),
    ("transformers", "processors without videos"): lambda patch: patch.delattr(processing_auto, "PROCESSOR_MAPPING"),
    ("transformers", "places of patches"): lambda patch: patch.delattr(
        "transformers.vision_utils.get_vision_cu_seqlens"
    ),
    ("transformers", "types of models"): lambda patch: patch.delattr(
        "transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"
    ),
    ("accelerate", "shared state"): lambda patch: patch.delattr(AcceleratorState, "_reset_state"),
    ("accelerate", "variables of accelerate launch"): lambda patch: patch.delattr(
        "accelerate.utils.launch.prepare_multi_gpu_env"
    ),
    ("peft", "adapted layers"): lambda patch: patch.delattr("peft.tuners.lora.Linear"),
    ("PIL", "open files"): lambda patch: patch.setattr(compat_pillow, "open_file", lambda _: None),
}


@pytest.fixture(autouse=True)
def kernels_are_tried_anew() -> Iterator[None]:
    kernels._kernel_for.cache_clear()
    yield
    kernels._kernel_for.cache_clear()


@pytest.mark.parametrize("library", compat.MODULES)
def test_all_parts_are_there(library: str) -> None:
    """With the versions that the tests run with; so does CI with the newest ones."""
    pytest.importorskip(library)
    if library == "vllm":
        pytest.skip("tests marked vllm use its parts")
    found = compat.report(library)
    assert not found.problems
    assert found.on == found.of > 0


@pytest.mark.parametrize(("library", "part"), BROKEN, ids=lambda name: str(name).replace(" ", "_"))
def test_a_part_that_is_gone_is_told(
    library: str, part: str, monkeypatch: pytest.MonkeyPatch, builtin: VLMAgent
) -> None:
    """In the line of fast paths, with what happens instead."""
    pytest.importorskip(library)
    whole = compat.report(library)
    BROKEN[library, part](monkeypatch)
    line = written(fast_paths(builtin.family_policy, torch.float32))
    (use,) = (one for one in importlib.import_module(f"vlmenv.compat.{compat.MODULES[library]}").USES if one[0] == part)
    assert f"parts of {library} {whole.on - 1} of {whole.of} ({part}: " in line
    assert f"; {use.instead})" in line


def test_each_part_is_broken_once() -> None:
    """But those of vLLM, DeepSpeed and Math-Verify, which have tests of their own, and sizes of Idefics3 below."""
    every = {
        (library, use.name)
        for library in ("torch", "transformers", "accelerate", "peft", "PIL")
        for use in importlib.import_module(f"vlmenv.compat.{compat.MODULES[library]}").USES
    }
    assert every - set(BROKEN) == {("transformers", "sizes of images")}


def step(agent: VLMAgent) -> tuple[Rollout, torch.Tensor, list[torch.Tensor]]:
    """A rollout, its log-probabilities, and their gradient."""
    agent.seed(0)
    agent.sampling = Sampling(max_new_tokens=8)
    rollout = agent.rollout(observations())
    agent.policy.zero_grad()
    values = agent.logprobs(rollout).values
    values.sum().backward()
    return rollout, values.detach(), [one.grad.clone() for one in agent.parameters() if one.grad is not None]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["attention operators", "versions of tensors", "switched modes"])
def test_results_stay_equal_without(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the kernels compute in another order."""
    rollout, values, gradient = step(VLMAgent.from_pretrained("builtin"))
    fast = kernel_for(torch.empty(16))
    BROKEN["torch", part](monkeypatch)
    kernels._kernel_for.cache_clear()
    found = step(VLMAgent.from_pretrained("builtin"))
    assert found[0].texts == rollout.texts
    exact = part != "attention operators"
    tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found[1], values, **tolerance)
    torch.testing.assert_close(found[2], gradient, **tolerance)
    assert (type(kernel_for(torch.empty(16))) is type(fast)) == exact


def test_activations_are_kept_if_changes_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a tensor that was changed in place could be recomputed as it was before."""
    with saved_activations.dropping_recomputable():
        assert saved_activations.drops()
    BROKEN["torch", "versions of tensors"](monkeypatch)
    with saved_activations.dropping_recomputable():
        assert not saved_activations.drops()


def test_training_does_not_begin_without_the_conversion(monkeypatch: pytest.MonkeyPatch, builtin: VLMAgent) -> None:
    BROKEN["transformers", "weight conversion"](monkeypatch)
    with pytest.raises(CheckpointError, match="this model's weights could not be saved: cannot import name"):
        builtin.check_saving()


def test_memory_is_not_predicted_without_fake_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    BROKEN["torch", "fake tensors"](monkeypatch)
    observation: Any = {"images": (), "prompt": "How many?"}
    with pytest.raises(ConfigError, match="does not let bytes be counted without weights"):
        predict(default_config(), observation, Place(1e9))


def test_another_peft_is_refused(monkeypatch: pytest.MonkeyPatch, builtin: VLMAgent) -> None:
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(lora.LoRA, "__init__", _gone)
    monkeypatch.setattr(peft.tuners.lora.Linear, "scale_layer", None)  # a part that is not used
    compat_peft = importlib.import_module("vlmenv.compat.peft")
    monkeypatch.setattr(compat_peft, "scale", lambda layer: 1.0)  # of other adapters than these
    with pytest.raises(ConfigError, match="an adapted layer computes something else"):
        builtin.add_lora(rank=2, alpha=4)


def test_a_launched_run_does_not_warn_of_its_launchers_port(recwarn: pytest.WarningsRecorder) -> None:
    """Which is 29500 where nothing else is asked for."""
    with ExitStack() as opened:
        with suppress(OSError):  # taken already, which is as good
            opened.enter_context(socket.create_server(("127.0.0.1", 29500)))
        (use,) = [one for one in compat_accelerate.USES if "launch" in one.name]
        assert use.check() is None
    assert not recwarn.list


def test_accelerates_state_is_forgotten(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    compat_accelerate.forget()
    assert not compat_accelerate.is_in_use()
    PartialState(cpu=True)
    assert compat_accelerate.is_in_use()
    with monkeypatch.context() as patch:
        BROKEN["accelerate", "shared state"](patch)
        compat_accelerate.forget()
        assert "stay as they are in this process" in caplog.text
        assert compat_accelerate.is_in_use()
    compat_accelerate.forget()
    assert not compat_accelerate.is_in_use()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
def test_tokens_of_crops_are_counted_without_the_sizes(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    invent(family, tmp_path)
    known = VLMAgent.from_pretrained(tmp_path).family
    sizes = [(64, 64), (300, 20), (31, 97), (640, 480)]
    right = [known.expanded(*size) for size in sizes]
    module = sys.modules[type(known.processor.image_processor).__module__]
    with monkeypatch.context() as patch:
        patch.delattr(module, "get_resize_output_image_size")
        assert compat_transformers.resized(known.processor.image_processor, 64, 64) is None
        assert f"{module.__name__} does not tell sizes" in compat.report("transformers").problems["sizes of images"]
    monkeypatch.setattr(idefics3, "resized", lambda *_: None)
    assert [known.expanded(*size) for size in sizes] == right
