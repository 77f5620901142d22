"""Counted bytes against those of real passes."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Container
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlmenv.agents.lazy_weights import outlines
from vlmenv.agents.sampling import prefilled, token_bytes
from vlmenv.agents.vlm import VLMAgent
from vlmenv.building import adapt, limits_of, load_for_training
from vlmenv.cli import main
from vlmenv.core.errors import ConfigError
from vlmenv.doctor import prediction
from vlmenv.doctor.counting import counting
from vlmenv.doctor.prediction import Batch, Place, card_bytes, gigabytes, measure, moments
from vlmenv.options.fields import replaced
from vlmenv.options.train import AdaptationOptions, TrainConfig, default_config

OBSERVATION: Any = {
    "images": (np.random.default_rng(0).integers(256, size=(96, 128, 3), dtype=np.uint8),),
    "prompt": "Where is the red circle?",
}


class Real(TorchDispatchMode):
    """The bytes of real tensors, counted by their storages at every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.known[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    def live(self) -> int:
        self.known = {place: one for place, one in self.known.items() if not one[0].expired()}
        return sum(size for _, size in self.known.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, torch.Tensor):
                self.add(one)
        self.peak = max(self.peak, self.live())
        return out


def configured(precision: str, micro: int, **options: Any) -> TrainConfig[Any]:
    config = default_config()
    return replace(
        config,
        adaptation=AdaptationOptions(**options),
        batches=replace(config.batches, precision=precision, prompts_per_step=2),
        trainer=replace(config.trainer, micro_batch_size=micro),
        sampling=replace(config.sampling, max_new_tokens=48),
    )


def really(config: TrainConfig[Any]) -> tuple[float, float, float]:
    """Bytes of weights, of what a forward pass keeps, and of the peak above weights and gradients."""
    agent = VLMAgent.from_pretrained(config.model)
    adapt(agent, config.adaptation, config.batches.precision)
    batch = Batch.of(config, len(agent.family.encode(OBSERVATION).input_ids))
    prompts = [agent.family.encode(OBSERVATION) for _ in range(batch.micro_prompts)]
    rollout = prediction._rollout(prompts, batch)
    precision = config.batches.precision
    for parameter in agent.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gc.collect()
    with Real() as real:
        for one in agent.policy.parameters():
            real.add(one)
        for one in agent.parameters():
            real.add(one.grad)
        held = real.live()
        real.peak = held
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            values = agent.logprobs(rollout).values
        kept = real.live() - held
        values.sum().backward()
    return sum(p.numel() * p.element_size() for p in agent.policy.parameters()), kept, real.peak - held


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True},
        {"lora_rank": 8},
        {"lora_rank": 8, "gradient_checkpointing": True},
        {"freeze_vision": True, "freeze_projector": True},
    ],
    ids=["full", "full recomputed", "lora", "lora recomputed", "frozen tower"],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_counted_bytes_are_those_of_real_passes(options: dict[str, Any], precision: str) -> None:
    config = configured(precision, 8, **options)
    sizes, _ = measure(config, OBSERVATION)
    weights, kept, peak = really(config)
    assert sizes.weights == pytest.approx(weights, rel=0.001)
    assert sizes.activations == pytest.approx(kept, rel=0.1)
    assert sizes.activations + max(sizes.forward_space, sizes.backward_space) == pytest.approx(peak, rel=0.15)


@pytest.mark.slow
def test_masked_images_and_a_teacher_are_counted() -> None:
    """Completions pass twice at a time, as far as micro-batches let them; a teacher's weights are held besides."""
    plain, masks, taught = (default_config(name) for name in ("grpo", "papo_g", "opd"))
    whole = Batch.of(plain, 100)
    assert Batch.of(masks, 100).micro == 2 * whole.micro
    assert Batch.of(masks, 100).completions == whole.completions
    limited = replace(masks, trainer=replace(masks.trainer, micro_batch_size=8))
    assert Batch.of(limited, 100).micro == 8
    small = replace(taught.batches, prompts_per_step=2)
    sizes = [
        measure(replace(taught, batches=small, algorithm=replace(taught.algorithm, teacher=name)), OBSERVATION)[0]
        for name in (None, "builtin", "http://host:8000")
    ]
    assert sizes[1].teacher == sizes[1].weights
    assert (sizes[0].teacher, sizes[2].teacher) == (0, 0)  # the last is on a server


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_what_is_held_follows_from_the_parameters(optimizer: str) -> None:
    """Weights, gradients, AdamW and the reference of the built-in model, whose parameters are counted."""
    config = default_config()
    config = replace(config, trainer=replace(config.trainer, micro_batch_size=8, optimizer=optimizer))
    config = replace(config, algorithm=replace(config.algorithm, beta=0.1))
    sizes, batch = measure(config, OBSERVATION)
    count = sum(one.numel() for one in VLMAgent.from_pretrained("builtin").policy.parameters())
    each = 8 if optimizer == "adamw" else 2 + 8 / 256
    assert (sizes.weights, sizes.gradients, sizes.reference) == (4 * count, 4 * count, 4 * count)
    assert sizes.optimizer == pytest.approx(each * count)
    assert (batch.prompts, batch.completions, batch.micro, batch.micro_prompts) == (16, 128, 8, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"freeze_vision": True, "freeze_projector": True}, {"lora_rank": 8}, {"lora_rank": 8, "quantize": "int8"}],
    ids=["frozen tower", "lora", "int8"],
)
def test_what_start_and_hand_over_take_is_that_of_real_agents(options: dict[str, Any], tmp_path: Path) -> None:
    """Of a model in bfloat16: as it is loaded, its reference with and without a tower of its own, what engines get."""
    if "lora_rank" in options:
        pytest.importorskip("peft")
    VLMAgent.from_pretrained("builtin").publish(tmp_path / "base", dtype=torch.bfloat16)
    config = replace(configured("bf16", 8, **options), model=str(tmp_path / "base"))
    config = replace(config, algorithm=replace(config.algorithm, beta=0.1))
    sizes, _ = measure(config, OBSERVATION)
    agent = load_for_training(config, torch.device("cpu"))
    assert sizes.loaded == size_of(agent.policy)
    adapt(agent, config.adaptation, "bf16")
    assert sizes.weights == size_of(agent.policy)
    assert sizes.published == sum(2 * one.numel() for one in outlines(agent._published_weights()).values())
    if agent.lora is None:
        shared = set(agent.policy.parameters())
        assert sizes.reference == size_of(agent.reference().policy, but=shared)
        agent.sharded = True
        assert sizes.reference + sizes.own_tower == size_of(agent.reference().policy, but=shared)
        assert sizes.own_tower > 0
        assert sizes.weights < sizes.loaded
    else:
        assert (sizes.reference, sizes.own_tower) == (0, 0)
        assert sizes.weights > sizes.loaded  # with the adapters


def size_of(policy: torch.nn.Module, but: Container[torch.nn.Parameter] = ()) -> int:
    return sum(one.numel() * one.itemsize for one in policy.parameters() if one not in but)


SIZES = prediction.Sizes(
    loaded=110, weights=100, gradients=80, optimizer=160, reference=50, own_tower=6, teacher=3, published=48,
    activations=30, casts=10, forward_space=12, backward_space=7, prefill=1, block=4, sent=40, outside=20,
    outside_gradients=20,
)  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "update"),
    [
        ("ddp", 100 + 160 + 50 + 3 + 80 + 30 + 12),
        ("fsdp2", (100 + 160 + 56 + 80) / 4 + 3 + 20 + 20 + 4 * 4 + (30 - 10) + 7),
        ("zero1", 100 + (160 + 80) / 4 + 50 + 3 + 80 + 2 * 80 + 30 + 12),
        ("zero2", 100 + (160 + 80) / 4 + 50 + 3 + 80 / 4 + 2 * 80 + 30 + 12),
        ("zero3", (100 + 160 + 80) / 4 + 56 + 3 + 80 / 4 + 20 + 20 + 4 * 4 + (30 - 10) + 7),
    ],
)
def test_ranks_share_what_their_strategy_shares(layout: Any, update: float) -> None:
    """By hand, for 4 ranks; DeepSpeed's two buckets hold no more than all gradients."""
    assert sum(foretold(layout)["update"].values()) == update


def foretold(layout: Any, ranks: int = 4, card: float = 1000, **options: Any) -> dict[str, dict[str, float]]:
    config = replaced(default_config(), options)
    return moments(SIZES, Batch.of(config, 100, ranks), config, Place(card, layout, ranks), 8, 1000)


@pytest.mark.parametrize(
    ("layout", "ranks", "expected"),
    [
        ("ddp", 1, {"weights": 100, "reference": 50, "teacher": 3}),
        ("ddp", 4, {"weights": 100, "reference": 50, "teacher": 3, "gradients": 80}),
        ("fsdp2", 4, {"weights": 100, "shards": 25, "teacher": 3}),
        ("zero1", 4, {"weights": 100, "optimizer": 60, "reference": 50, "teacher": 3}),
        ("zero2", 4, {"weights": 100, "optimizer": 60, "reference": 50, "teacher": 3}),
        ("zero3", 4, {"weights": 100, "reference": 56, "teacher": 3}),
    ],
)
@pytest.mark.parametrize(("engine", "share"), [("hf", 0), ("vllm", 400), ("vllm-server", 0)])
def test_reference_and_shards_are_made_where_no_engine_is_awake(
    layout: Any, ranks: int, expected: dict[str, float], engine: str, share: float
) -> None:
    """By hand: an engine starts beside the whole model, and sleeps before the reference and the shards are made."""
    server = {"server": ("http://host:8000",)} if engine == "vllm-server" else {}
    told = foretold(layout, ranks, engine=engine, **server)
    assert told["load"] == {"weights": 110, "engine": share}
    assert {use: size for use, size in told["preparation"].items() if size} == expected


@pytest.mark.parametrize(
    ("layout", "gathered"),
    [("ddp", {}), ("fsdp2", {"gathered weights": 20 + 40}), ("zero2", {}), ("zero3", {"gathered weights": 20 + 80})],
)
def test_an_engine_gets_weights_that_are_gathered(layout: Any, gathered: dict[str, float]) -> None:
    """By hand, for 4 ranks. The engine holds its own weights then, and its whole share only while it samples."""
    itself = foretold(layout)
    assert "hand-over" not in itself
    assert itself["sampling"].items() >= gathered.items()
    told = foretold(layout, engine="vllm", tensor_parallel=2)
    between = {use: size for use, size in told["sampling"].items() if use != "engine"}
    assert told["sampling"]["engine"] == 400
    assert told["hand-over"] == between | {"engine": 24} | gathered
    served = foretold(layout, engine="vllm-server", server=("http://host:8000",))
    assert served["hand-over"] == between | {"engine": 0} | gathered
    assert between.get("gradients", 0) == (80 if layout == "ddp" else 0)  # in buckets


def test_neighbours_hold_a_copy_of_the_model_between_them() -> None:
    assert foretold("fsdp2", shard_within=2)["update"] == foretold("fsdp2", ranks=2)["update"]


def test_sampling_on_a_card_needs_no_more_than_a_few_completions() -> None:
    config = default_config()
    batch = Batch.of(config, 100)
    everything = moments(SIZES, batch, config, Place(1e9, is_card=False), 8, 1000)["sampling"]["keys and values"]
    assert everything == 8 * batch.cached == 8 * (16 * 100 + 128 * batch.answer)
    bounded = replace(config, generation=replace(config.generation, cache_tokens=1000))
    assert moments(SIZES, batch, bounded, Place(1e9), 8, 1000)["sampling"]["keys and values"] == 8000
    assert moments(SIZES, batch, config, Place(1e9), 8, 1000)["sampling"]["keys and values"] < everything


@pytest.mark.parametrize(
    ("name", "size"), [("24GB", 24e9), ("24 GiB", 24 * 2**30), ("RTX-4090", 24e9), ("h100-80", 80e9), ("1.5gb", 1.5e9)]
)
def test_cards_have_sizes(name: str, size: float) -> None:
    assert card_bytes(name) == size


def test_sizes_are_written_for_a_reader() -> None:
    assert (gigabytes(3e6), gigabytes(1.26e9)) == ("3 MB", "1.3 GB")


def test_states_of_answers_count_twice_where_steps_are_replayed() -> None:
    batch = Batch.of(default_config(), longest=100)
    for is_card, times in ((True, 2), (False, 1)):
        held = batch.with_states(7, is_card=is_card)
        assert (held.longest, held.answer) == (107, batch.answer + 7 * times)


def test_an_unknown_card_is_refused() -> None:
    with pytest.raises(ConfigError, match="neither a size, such as 24GB, nor one of"):
        card_bytes("voodoo2")


def test_a_tokens_keys_and_values_are_those_that_sampling_holds(builtin: VLMAgent) -> None:
    prefixes, _ = builtin.family_policy.prefill([builtin.family.encode(OBSERVATION)])
    parts = [one for past in prefixes.past.values() for one in past.tensors]
    held = sum(one.numel() * one.element_size() for one in parts)
    tokens = int(prefixes.packing.total)
    assert held == tokens * token_bytes(builtin.family.model.config, torch.float32)


@pytest.mark.slow
def test_a_card_that_is_too_small_is_refused_with_what_helps(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--card", "0.8GB", "--group-size", "4", "--prompts-per-step", "16"])
    told = capsys.readouterr().out
    assert ended.value.code == 1
    assert "it does not fit" in told
    assert "--precision bf16" in told
    main(["doctor", "--card", "24GB", "--micro-batch-size", "8"])
    assert "does not fit" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_adapters_as_a_model_take_what_new_ones_take(quantize: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    agent = VLMAgent.from_pretrained("builtin")
    agent.add_lora(rank=8, alpha=16)
    agent.save(tmp_path / "adapters")
    config = configured("fp32", 8, quantize=quantize)
    begun = configured("fp32", 8, quantize=quantize, lora_rank=8)
    old, new = (measure(one, OBSERVATION)[0] for one in (replace(config, model=str(tmp_path / "adapters")), begun))
    adapters = sum(one.numel() * 4 for one in agent.parameters())
    assert old == replace(new, loaded=new.loaded + adapters)  # new ones come after the model is loaded
    assert new.gradients == adapters


@pytest.mark.slow
def test_many_prompts_of_a_micro_batch_are_counted_by_those_of_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured("fp32", 96)
    config = replace(config, batches=replace(config.batches, prompts_per_step=12))
    whole, batch = measure(config, OBSERVATION)
    assert batch.micro_prompts == 12
    monkeypatch.setattr(prediction, "_MOST", 4)
    part, same = measure(config, OBSERVATION)
    assert same == batch
    for name in ("activations", "forward_space", "backward_space"):
        assert getattr(part, name) == pytest.approx(getattr(whole, name), rel=0.1), name
    assert (part.weights, part.block, part.prefill) == (whole.weights, whole.block, whole.prefill)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [None, 32])
def test_prefill_is_foreseen(rows: int | None) -> None:
    """Against the allocator's own count of 256 prompts. The prediction is rough, but never too low by a fifth."""
    agent = VLMAgent.from_pretrained("builtin")
    config = configured("fp32", rows or 512)
    config = replace(config, batches=replace(config.batches, prompts_per_step=256))
    config = replace(config, algorithm=replace(config.algorithm, group_size=2))
    config = replace(config, sampling=replace(config.sampling, max_new_tokens=1))
    sizes, batch = measure(config, OBSERVATION)
    token = token_bytes(agent.family.model.config, torch.float32)
    found = moments(sizes, batch, config, Place(1e9, is_card=False), token, 0)["sampling"]
    prompts = [agent.family.encode(OBSERVATION) for _ in range(256)]
    limits = limits_of(config)
    taken = peak(lambda: prefilled(agent.family_policy, prompts, limits))
    assert 0.8 * taken < found["keys and values"] + found["prefill or logits"] < 2 * taken


def peak(work: Callable[[], object]) -> int:
    """Bytes that work holds at most, as PyTorch counts them."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        held = work()
    del held
    sizes = [event.nbytes() for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(sizes))


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="this PyTorch multiplies no groups")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_experts_take_the_bytes_of_real_ones(dtype: torch.dtype) -> None:
    def shapes() -> list[tuple[Any, ...]]:
        tokens = torch.zeros(6, 16, dtype=dtype, requires_grad=True)
        experts = torch.zeros(3, 16, 32, dtype=dtype, requires_grad=True)
        ends = torch.arange(2, 7, 2, dtype=torch.int32)
        product = torch.nn.functional.grouped_mm(tokens, experts, offs=ends)
        product.backward(torch.ones_like(product))  # type: ignore[no-untyped-call]
        return [(one.shape, one.dtype) for one in (product, tokens.grad, experts.grad) if one is not None]

    real = shapes()
    with FakeTensorMode(), counting():
        assert shapes() == real
    with FakeTensorMode(), counting() as counter:
        torch.nn.functional.grouped_mm(torch.zeros(6, 16), torch.zeros(3, 16, 32), offs=torch.zeros(3).int())
    assert counter.peak == 4 * (6 * 16 + 3 * 16 * 32 + 3 + 6 * 32)
