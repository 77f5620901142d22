"""Functions that are compiled on GPUs: what they compute there, tried on CPUs, and what happens where they are not."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import INVENTED, invent
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling

import vlmenv.agents.policy  # noqa: F401 (whose modules define the functions)
from vlmenv.agents import attention, fusing, lean_layers, linear_logprobs, rotary, wide_gradients
from vlmenv.agents.fusing import Fused, fuses, numbers
from vlmenv.agents.vlm import VLMAgent
from vlmenv.core.rollout import Completion, Rollout

CPU = torch.device("cpu")


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs take the ways of GPUs, with functions as they are written."""
    monkeypatch.setattr(Fused, "__call__", lambda self, *arguments: self.function(*arguments))
    for module in (lean_layers, linear_logprobs, rotary, wide_gradients):
        monkeypatch.setattr(module, "fuses", lambda device: True)
    monkeypatch.setattr(wide_gradients, "fault_of", lambda device, dtype: "")
    monkeypatch.setattr(wide_gradients, "_wide_product", lambda left, right: left.float() @ right.float())


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Tensor], Callable[..., Tensor]], str]:
    """Makes a trial of one function on a device, which compiles to another one."""
    monkeypatch.setattr(Fused, "every", [])

    def attempt(function: Callable[..., Tensor], compiled: Callable[..., Tensor]) -> str:
        one = Fused(function, lambda: (numbers(fusing.ROWS, 4),), 1, 1)
        one.compiled = compiled  # type: ignore[misc]
        return fusing.fault_of.__wrapped__("cpu")

    return attempt


class TestChoice:
    def test_cpus_compile_nothing(self) -> None:
        assert not fuses(CPU)

    def test_rounding_is_no_fault(self, trials: Callable[..., str]) -> None:
        assert not trials(torch.square, lambda x: x * x * (1 + 1e-7))

    def test_other_results_are_told_once(self, trials: Callable[..., str], caplog: pytest.LogCaptureFixture) -> None:
        assert "something else" in trials(torch.square, lambda x: x * x * 1.01)
        assert caplog.text.count("are not compiled on cpu") == 1

    def test_other_types_are_a_fault(self, trials: Callable[..., str]) -> None:
        assert "something else" in trials(torch.square, lambda x: (x * x).double())

    def test_what_does_not_compile_is_told(self, trials: Callable[..., str], caplog: pytest.LogCaptureFixture) -> None:
        def broken(x: Tensor) -> Tensor:
            raise ImportError("no triton")

        assert trials(torch.square, broken) == "ImportError: no triton"
        assert "ImportError: no triton" in caplog.text

    def test_a_full_device_is_no_fault_of_the_compiler(self, trials: Callable[..., str]) -> None:
        def full(x: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("full")

        with pytest.raises(torch.OutOfMemoryError):
            trials(torch.square, full)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["_norm_backward", "_errors_at_once", "_rotated", "_join_packed"])
def test_compiled_functions_compute_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By PyTorch's compiler for CPUs, one function of each module."""
    if shutil.which("g++") is None:
        pytest.skip("PyTorch's compiler for CPUs needs g++")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    (one,) = (one for one in Fused.every if one.function.__name__ == name)
    assert one.attempt(CPU).fault == ""


def test_the_gradient_of_a_norm_is_that_of_its_parts() -> None:
    hidden, inverse = numbers(9, 64, dtype=torch.float64), numbers(9, 1, dtype=torch.float64).abs()
    weight, grad = numbers(64, dtype=torch.float64), numbers(9, 64, dtype=torch.float64, seed=1)
    found = lean_layers._norm_backward.function(hidden, inverse, weight, grad)
    first, second = lean_layers._through_norm(hidden, inverse, grad * weight)
    torch.testing.assert_close(found, first + second)


def test_rotations_and_their_gradients_are_those_of_transformers(at_once: None) -> None:
    for name, shape, angles in (
        ("apply_rotary_pos_emb", (1, 3, 5, 8), (1, 5, 8)),
        ("apply_rotary_pos_emb_vision", (5, 3, 8), (5, 8)),
    ):
        states = [numbers(*shape, seed=seed).requires_grad_() for seed in (0, 1)]
        places = [numbers(*angles, seed=seed) for seed in (2, 3)]
        function = getattr(modeling, name)
        own = getattr(function, "__wrapped__", function)
        at_once_too = rotary._rotating(own, rotary._FORMS[name])
        found, right = ([*one(*states, *places)] for one in (at_once_too, own))
        assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
        push = [numbers(*shape, seed=seed) for seed in (4, 5)]
        for a, b in zip(*(torch.autograd.grad(one, states, push) for one in (found, right)), strict=True):
            torch.testing.assert_close(a, b)


def test_what_rotates_otherwise_keeps_its_function() -> None:
    def interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return q * cos[:, None], k * cos[:, None]

    assert not rotary._is_rotation(interleaved, rotary._FORMS["apply_rotary_pos_emb"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_head_at_once_is_the_head_in_steps(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = numbers(11, 8, dtype=dtype), numbers(30, 8, dtype=dtype, seed=1)
    targets, banned = torch.arange(11) + 3, torch.tensor([0, 29])

    def passes() -> list[Tensor]:
        inputs = [one.clone().requires_grad_() for one in (hidden, weight)]
        logprobs, entropy = linear_logprobs.linear_logprobs(*inputs, None, targets, banned, 0.7)
        return [logprobs, entropy, *torch.autograd.grad(logprobs, inputs, numbers(11, seed=2))]

    right = passes()
    monkeypatch.setattr(Fused, "__call__", lambda self, *arguments: self.function(*arguments))
    monkeypatch.setattr(linear_logprobs, "fuses", lambda device: True)
    monkeypatch.setattr(linear_logprobs, "_FEW_LOGITS", 60)
    for found, expected in zip(passes(), right, strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=0.02, atol=1e-3 if found.dtype == dtype else 1e-5)


def test_parts_of_attention_are_joined_as_padded_ones_are() -> None:
    before, out, other = (numbers(9, 2, 16, seed=seed) for seed in range(3))
    lse, other_lse = numbers(2, 9, seed=3), numbers(2, 9, seed=4)
    found, both = attention._join_packed.function(before, out, lse, other, other_lse)
    rows = [one.transpose(0, 1)[None] for one in (out, other)]
    right, right_lse = attention._join(rows[0], lse[None], rows[1], other_lse[None])
    torch.testing.assert_close(found, torch.cat([before, right[0].transpose(0, 1)]))
    torch.testing.assert_close(both, right_lse[0])


def logprobs_and_gradients(agent: VLMAgent, precision: torch.dtype | None) -> list[Tensor]:
    image = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    prompt = agent.family.encode({"images": (image,), "prompt": "How many?"})
    completions = [Completion("", np.zeros(n, np.int64), np.zeros(n, np.float32), "stop") for n in (6, 3)]
    rollout = Rollout([prompt], np.zeros(2, np.int64), completions, 0.9)
    with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
        values = agent.logprobs(rollout).values
    agent.policy.zero_grad()
    values.sum().backward()
    return [values.detach(), *(one.grad.clone() for one in agent.parameters() if one.grad is not None)]


@pytest.mark.slow
@pytest.mark.parametrize("family", INVENTED)
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_models_compute_the_same_in_the_ways_of_gpus(
    family: str, precision: torch.dtype | None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Norms that round for the layers after them change no log-probability."""
    invent(family, tmp_path)
    agent = VLMAgent.from_pretrained(tmp_path)
    right = logprobs_and_gradients(agent, precision)
    request.getfixturevalue("at_once")
    found = logprobs_and_gradients(agent, precision)
    torch.testing.assert_close(found[0], right[0], rtol=1e-6, atol=1e-6)
    size = functools.reduce(max, (float(one.abs().max()) for one in right[1:]))
    for a, b in zip(found[1:], right[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=(1e-6 if precision is None else 2e-2) * size)


def test_examples_are_of_as_many_tokens() -> None:
    """By which the benchmarks lengthen them."""
    for one in Fused.every:
        tensors = [tensor for tensor in tree_leaves(one.example()) if isinstance(tensor, Tensor)]
        assert any(fusing.ROWS in tensor.shape for tensor in tensors)
