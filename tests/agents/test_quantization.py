"""Frozen bases in few bits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from batches import logprobs_of, loss_of, ragged, rollout_of, train, weights_of
from torch import nn

from vlmenv.agents.quantization import QuantizedLinear, quantized_layers
from vlmenv.agents.vlm import Sampling, VLMAgent
from vlmenv.core.errors import ConfigError, ModelError

KINDS = ["nf4", "int8"]
CPU = torch.device("cpu")


def layer(rows: int = 24, columns: int = 64, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, rows, bias=bias).requires_grad_(False)


def build(kind: str | None, base: str | Path = "builtin", *, vision: bool = False) -> VLMAgent:
    torch.manual_seed(0)
    agent = VLMAgent.from_pretrained(base, sampling=Sampling(0.8), quantization=kind, quantize_vision=vision)
    agent.add_lora(rank=4, alpha=8, vision=vision)
    for parameter in agent.parameters():
        nn.init.normal_(parameter, std=0.05)
    return agent


def test_nf4_is_the_codebook_of_the_paper() -> None:
    """Appendix E of arXiv 2305.14314: 16 levels, times the largest of each 64 weights, each rounded to the nearest."""
    pytest.importorskip("bitsandbytes")
    levels = torch.tensor(
        [
            *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
            *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534),
            *(0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434),
            *(0.5626170039176941, 0.7229568362236023, 1.0),
        ]
    )
    plain = layer()
    blocks = plain.weight.view(-1, 64)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    nearest = (blocks / largest)[..., None].sub(levels).abs().argmin(dim=-1)
    found = QuantizedLinear(plain, "nf4", CPU)
    torch.testing.assert_close(found.dense(torch.float32), (levels[nearest] * largest).view(24, 64), rtol=1e-6, atol=0)
    assert found.weight.numel() * found.weight.element_size() * 2 == plain.weight.numel()


def test_int8_is_off_by_half_a_step_at_most() -> None:
    plain = layer()
    found = QuantizedLinear(plain, "int8", CPU)
    step = plain.weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((found.dense(torch.float32) - plain.weight).abs() <= 0.5001 * step).all()
    assert found.weight.dtype == torch.int8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("autocast", [True, False])
def test_outputs_and_gradients_are_those_of_the_dense_weight(kind: str, autocast: bool) -> None:
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    found, plain = QuantizedLinear(layer(), kind, CPU), layer()
    with torch.no_grad():
        plain.weight.copy_(found.dense(torch.bfloat16 if autocast else torch.float32))
    grads = []
    for one in (found, plain):
        input = torch.linspace(-1, 1, 3 * 64).view(3, 64).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = one(input)
        output.float().square().sum().backward()
        grads.append((output.float(), input.grad))
    tolerance = 2e-2 if autocast else 1e-6
    torch.testing.assert_close(grads[0], grads[1], atol=tolerance, rtol=tolerance)
    assert found(torch.ones(64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_nf4_takes_whole_blocks() -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ConfigError, match=r"a layer of \(5, 3\) is no multiple"):
        QuantizedLinear(layer(5, 3), "nf4", CPU)


def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r'pip install "vlmenv\[quantize\]"'):
        QuantizedLinear(layer(), "nf4", CPU)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vision", [True, False])
def test_a_quantised_agent_is_one_of_the_dense_weights(kind: str, vision: bool, tmp_path: Path) -> None:
    """Values, sampling, gradients and merging; checkpoints hold adapters alone, and resume bit for bit."""
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    agent = build(kind, vision=vision)
    layers = quantized_layers(agent.family.model)
    assert any("visual" in name for name in layers) == vision
    assert any("language_model" in name for name in layers)
    agent.check_saving()
    dense = build(None, vision=vision)
    with torch.no_grad():
        for name, one in layers.items():
            dense.family.model.get_parameter(name).copy_(one.dense(torch.float32))
    rollout = rollout_of(agent)
    sampled = nn.utils.rnn.pad_sequence([torch.from_numpy(one.logprobs) for one in rollout.completions], True)
    torch.testing.assert_close(sampled, logprobs_of(dense, rollout), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logprobs_of(agent, rollout), logprobs_of(dense, rollout), atol=1e-5, rtol=1e-5)
    for one in (agent, dense):
        loss_of(one, rollout).backward()
    for ours, theirs in zip(agent.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)
    merged, right = agent._published_weights(), dense._published_weights()
    assert merged.keys() == right.keys()
    for name in merged:
        torch.testing.assert_close(merged[name], right[name], atol=1e-6, rtol=1e-6)
    train(agent, rollout)
    agent.save(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("model*"))
    again = build(kind, vision=vision)
    again.load(tmp_path / "adapter")
    assert torch.equal(logprobs_of(again, rollout), logprobs_of(agent, rollout))
    for name, tensor in weights_of(agent).items():
        assert torch.equal(weights_of(again)[name], tensor), name


@pytest.mark.slow
def test_adapters_go_onto_their_base_quantised_or_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Adapters beneath which another base would lie are refused, as ever."""
    agent = build("int8")
    agent.save(tmp_path / "adapter")
    build(None).load(tmp_path / "adapter")
    loaded = VLMAgent.from_pretrained(tmp_path / "adapter", quantization="int8", sampling=Sampling(0.8))
    assert not caplog.messages
    VLMAgent.from_pretrained(tmp_path / "adapter")
    assert "trained over a base with quantisation int8; it is none here" in caplog.text
    rollout = agent.imitate(ragged(), ["a b c"] * len(ragged()))
    assert torch.equal(logprobs_of(loaded, rollout), logprobs_of(agent, rollout))
    other = VLMAgent.from_pretrained("builtin")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    other.publish(tmp_path / "other", dtype=torch.float32)
    with pytest.raises(ModelError, match="trained on other weights"):
        build("int8", tmp_path / "other").load(tmp_path / "adapter")
