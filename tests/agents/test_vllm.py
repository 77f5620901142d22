"""The real vLLM, in this process and as a server, against the trainer's own model.

One engine serves all tests of a family; `sync` hands it weights.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import logprobs_of, loss_of, observations, ragged
from conversations import TURNS, after, episodes, first, image
from servers import serve

from vlmenv.agents.engines.base import Engine
from vlmenv.agents.engines.server import VLLMServerEngine
from vlmenv.agents.engines.vllm import VLLMEngine
from vlmenv.agents.lazy_weights import LazyWeights
from vlmenv.agents.quantization import quantized_layers
from vlmenv.agents.sampling import Sampling, _without_tail
from vlmenv.agents.vlm import VLMAgent, find_model
from vlmenv.core.errors import ConfigError, EngineError, PromptError
from vlmenv.core.rollout import Observation, Observations, Rollout, Turn

pytestmark = pytest.mark.vllm
UPDATES = 6
TOLERANCE = 1e-4
"""of log-probabilities"""
NAMES = ("token_ids", "logprobs")


def batch() -> list[Observation]:
    """Prompts with one image, two and none, between texts and in turns; one fills a block of the prefix cache.

    On CPUs that has 128 tokens.
    """
    image, two = ragged()[0]["images"], max((one["images"] for one in ragged()), key=len)
    turns: tuple[Turn, ...] = (
        {"role": "system", "text": "Be brief."},
        {"role": "user", "text": "What is <image>?"},
        {"role": "assistant", "text": "A circle."},
    )
    placed: list[Observation] = [
        {"images": two, "prompt": "Is <image> larger than <image>?"},
        {"images": two, "prompt": "And this? <image>", "turns": turns},
    ]
    return [*ragged(), *placed, *[{"images": image, "prompt": "Locate the red circle, " * 30}] * 2]


def start(agent: VLMAgent, max_length: int = 1024, **options: Any) -> VLLMEngine:
    device = torch.device("cpu")
    return VLLMEngine(agent.folder, agent.family, device=device, dtype=torch.float32, max_length=max_length, **options)


@pytest.fixture(scope="module", params=["builtin", "qwen2_5_vl"])
def folder(request: pytest.FixtureRequest, qwen2_5_vl_folder: Path) -> Path:
    return qwen2_5_vl_folder if request.param == "qwen2_5_vl" else find_model("builtin")


@pytest.fixture(scope="module", params=["in process", "server"])
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[Engine]:
    agent = VLMAgent.from_pretrained(folder)
    with ExitStack() as opened:
        if request.param == "server":
            url = opened.enter_context(serve(folder, "--engine-length", "1024")).url
            engine: Engine = VLLMServerEngine([url], folder, agent.family)
        else:
            engine = start(agent)
        opened.callback(engine.close)
        yield engine


@pytest.fixture
def agent(folder: Path, engine: Engine) -> VLMAgent:
    agent = VLMAgent.from_pretrained(folder, sampling=Sampling(max_new_tokens=12))
    agent.seed(0)
    agent.engine = engine
    agent.sync()
    return agent


def by_model(agent: VLMAgent, asked: Observations, sampling: Sampling) -> Rollout:
    """What the trainer's own model generates."""
    engine, agent.engine = agent.engine, None
    agent.sampling, former = sampling, agent.sampling
    try:
        return agent.rollout(asked)
    finally:
        agent.engine, agent.sampling = engine, former


def by_engine(agent: VLMAgent, asked: Observations, sampling: Sampling) -> Rollout:
    agent.sampling, former = sampling, agent.sampling
    try:
        return agent.rollout(asked)
    finally:
        agent.sampling = former


def assert_alike(one: Rollout, other: Rollout) -> None:
    """The same tokens, texts, finish reasons and log-probabilities."""
    for a, b in zip(one.completions, other.completions, strict=True):
        assert (a.text, a.token_ids.tolist(), a.finish_reason) == (b.text, b.token_ids.tolist(), b.finish_reason)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=TOLERANCE)


def assert_in_step(agent: VLMAgent, asked: Observations) -> None:
    """Greedy answers are those of the trainer's model, and what is sampled has its log-probabilities."""
    greedy = replace(agent.sampling, temperature=0.0)
    assert_alike(by_engine(agent, asked, greedy), by_model(agent, asked, greedy))
    assert_sampled_by_the_model(agent, agent.rollout(asked))


def assert_sampled_by_the_model(agent: VLMAgent, rollout: Rollout) -> None:
    expected = logprobs_of(agent, rollout).numpy()
    for row, completion in enumerate(rollout.completions):
        np.testing.assert_allclose(completion.logprobs, expected[row, : len(completion.token_ids)], atol=TOLERANCE)


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "adapters"])
def test_the_engine_is_in_step_before_and_after_each_update(agent: VLMAgent, lora: bool) -> None:
    """The same prompts are asked again after each; an engine that had missed any one of them would be far off."""
    torch.manual_seed(0)
    if lora:
        pytest.importorskip("peft")
        agent.add_lora(rank=4, alpha=32, vision=True)
    optimizer = torch.optim.AdamW(agent.parameters(), lr=1e-2 if lora else 1e-3)
    start = {name: parameter.detach().clone() for name, parameter in agent.policy.named_parameters()}
    judged = agent.rollout(batch())
    now = logprobs_of(agent, judged)
    assert_in_step(agent, batch())
    for _ in range(UPDATES):
        optimizer.zero_grad()
        loss_of(agent, agent.rollout(batch())).backward()
        optimizer.step()
        agent.sync()
        former, now = now, logprobs_of(agent, judged)
        assert (now - former).abs().max() > 100 * TOLERANCE
        assert_in_step(agent, batch())
    changed = {name for name, parameter in agent.policy.named_parameters() if not torch.equal(parameter, start[name])}
    assert any("visual" in name for name in changed)
    assert any("language_model" in name for name in changed)


def narrow(kind: str, folder: Path) -> VLMAgent:
    """An agent whose frozen base, or all of which, is in few bits. None of its adapters is 0."""
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    options: dict[str, Any] = {"dtype": torch.bfloat16} if kind == "bf16" else {"quantization": kind}
    agent = VLMAgent.from_pretrained(folder, sampling=Sampling(max_new_tokens=12), quantize_vision=True, **options)
    if kind != "bf16":
        pytest.importorskip("peft")
        agent.add_lora(rank=4, alpha=32, vision=True)
        torch.manual_seed(0)
        for parameter in agent.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    return agent


def dense(agent: VLMAgent, folder: Path) -> VLMAgent:
    """An agent of float32 weights, with adapters beside them, that has the values of one in few bits."""
    other = VLMAgent.from_pretrained(folder, sampling=agent.sampling)
    if agent.lora is not None:
        other.add_lora(rank=4, alpha=32, vision=True)
    layers = quantized_layers(agent.family.model)
    values = dict(agent.family.model.named_parameters()) | {
        name: one.dense(torch.float32) for name, one in layers.items()
    }
    with torch.no_grad():
        for name, weight in other.family.model.named_parameters():
            weight.copy_(values[name])
    return other


@pytest.mark.parametrize("kind", ["nf4", "int8", "bf16"])
@pytest.mark.parametrize("folder", ["builtin"], indirect=True)
def test_an_engine_has_the_weights_that_a_base_of_few_bits_stands_for(kind: str, folder: Path, engine: Engine) -> None:
    """Before and after an update, each of which an engine with the weights before would be far off."""
    agent = narrow(kind, folder)
    agent.seed(0)
    agent.engine = engine
    right = VLMAgent.from_pretrained(folder)
    for _ in range(2):
        agent.sync()
        former, right = right, dense(agent, folder)
        greedy = replace(agent.sampling, temperature=0.0)
        assert_alike(by_engine(agent, batch(), greedy), by_model(right, batch(), greedy))
        sampled = agent.rollout(batch())
        assert_sampled_by_the_model(right, sampled)
        assert (logprobs_of(right, sampled) - logprobs_of(former, sampled)).abs().max() > 10 * TOLERANCE
        agent.policy.zero_grad()
        loss_of(agent, sampled).backward()
        with torch.no_grad():
            for parameter in agent.parameters():
                parameter.sub_(0.01 * parameter.grad.sign())


def test_what_is_sampled_has_the_log_probabilities_of_the_models_sampler(agent: VLMAgent) -> None:
    sampling = Sampling(temperature=0.7, max_new_tokens=12, top_k=9, top_p=0.8)
    rollout = by_engine(agent, ragged(), sampling)
    tokens, found = (np.concatenate([getattr(one, name) for one in rollout.completions]) for name in NAMES)
    hidden, _ = agent.family_policy.hidden_states(rollout)
    logprobs = torch.log_softmax(agent.family_policy.logits(hidden) / sampling.temperature, dim=-1)
    expected = _without_tail(logprobs, sampling).gather(-1, torch.from_numpy(tokens)[:, None])[:, 0]
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=TOLERANCE)
    assert not rollout.full_distribution


def test_samples_follow_the_distribution(agent: VLMAgent) -> None:
    """The frequencies of the first token, against the probabilities that the model's sampler draws with."""
    sampling, count = Sampling(temperature=1.5, max_new_tokens=1, top_k=20, top_p=0.9), 1024
    rollout = by_engine(agent, ragged()[:1] * count, sampling)
    hidden, _ = agent.family_policy.hidden_states(rollout[:1])
    logits = agent.family_policy.logits(hidden[0])[None].detach()
    expected = _without_tail(torch.log_softmax(logits / sampling.temperature, dim=-1), sampling)[0].exp().numpy()
    sampled = np.bincount([one.token_ids[0] for one in rollout.completions], minlength=len(expected)) / count
    assert (sampled[expected == 0] == 0).all()
    assert np.abs(sampled - expected).max() < 5 * np.sqrt(0.25 / count)


def test_banned_tokens_are_never_sampled(agent: VLMAgent) -> None:
    """Even by a policy that wants nothing else."""
    model = agent.family.model
    pads = [model.config.image_token_id, model.config.video_token_id]
    hidden, _ = agent.family_policy.hidden_states(agent.rollout(ragged()))
    direction = hidden.detach().mean(dim=0)
    with torch.no_grad():
        model.get_input_embeddings().weight[pads] = 100 * direction / direction.norm()
    wanted = model.lm_head(hidden).argmax(dim=-1)
    assert np.isin(wanted.numpy(), pads).mean() > 0.5
    agent.sync()
    for sampling in (agent.sampling, replace(agent.sampling, temperature=0.0)):
        sampled = np.concatenate([one.token_ids for one in by_engine(agent, ragged(), sampling).completions])
        assert not np.isin(sampled, agent.family.banned_tokens).any()


def test_stop_texts_and_truncation_end_answers_as_the_model_does(agent: VLMAgent) -> None:
    whole = by_model(agent, ragged(), Sampling(0.0, max_new_tokens=24))
    texts = [one.text for one in whole.completions]
    stops = tuple(sorted({text[3:6] for text in texts if len(text) > 8}))
    assert stops
    reasons = set()
    for sampling in (
        Sampling(0.0, max_new_tokens=24),
        Sampling(0.0, max_new_tokens=24, stop=stops),
        Sampling(0.0, max_new_tokens=24, stop=stops[:1]),
        Sampling(0.0, max_new_tokens=3),
        Sampling(0.0, max_new_tokens=1),
    ):
        expected = by_model(agent, ragged(), sampling)
        assert_alike(by_engine(agent, ragged(), sampling), expected)
        reasons |= {(one.finish_reason, one.text.endswith(stops)) for one in expected.completions}
    assert {("stop", True), ("length", False)} <= reasons


def test_a_seed_fixes_the_samples(agent: VLMAgent) -> None:
    def texts(seed: int) -> list[str]:
        agent.seed(seed)
        return agent.rollout(observations(8, 4)).texts

    agent.sampling = Sampling(temperature=2.0, max_new_tokens=12)
    first = texts(1)
    assert first == texts(1)
    assert first != texts(2)
    assert len(set(first[:4])) == 4


def test_more_prompts_than_a_step_of_the_engine_takes(agent: VLMAgent) -> None:
    """vLLM computes 4096 tokens of prompts at a time here; on CPUs none of a prompt of which it takes a part."""
    rng = np.random.default_rng(0)
    images = [rng.integers(256, size=(320, 320, 3), dtype=np.uint8) for _ in range(48)]
    asked: list[Observation] = [{"images": (image,), "prompt": "the red circle " * 20} for image in images]
    prompts, _ = agent.encode(asked)
    assert sum(len(prompt.input_ids) for prompt in prompts) > 4096
    agent.sampling = Sampling(max_new_tokens=2)
    assert_sampled_by_the_model(agent, agent.rollout(asked))


def test_a_missing_and_an_unknown_weight_are_refused(agent: VLMAgent) -> None:
    weights = agent._published_weights()
    name = next(iter(weights))
    without = {other: tensor for other, tensor in weights.items() if other != name}
    with pytest.raises(EngineError, match=rf"1 are missing \['{name}'\]"):
        agent.engine.sync(without)
    with pytest.raises(EngineError, match=r"1 are unknown \['model\.extra'\]"):
        agent.engine.sync(weights | {"model.extra": weights[name]})
    with pytest.raises(EngineError, match=r"1 are missing .* 1 are unknown"):
        agent.engine.sync(without | {"model.extra": weights[name]})


@pytest.mark.parametrize("engine", ["in process"], indirect=True)
def test_a_load_that_fails_or_leaves_weights_is_told_and_does_no_harm(
    agent: VLMAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's own check of names is off: it would tell before. vLLM holds parts of joined layers meanwhile."""
    engine, weights = agent.engine, dict(agent._published_weights())
    assert isinstance(engine, VLLMEngine)

    def fail() -> torch.Tensor:
        raise RuntimeError("it cannot be made")

    layer = next(name for name in weights if name.endswith("layers.1.self_attn.q_proj.weight")).removesuffix(".weight")
    norm = next(name for name in weights if name.endswith("layers.1.input_layernorm.weight"))
    breaking = {f"{layer.replace('q_proj', part)}.weight" for part in ("q_proj", "v_proj")}
    wrong: list[tuple[Any, str]] = [(LazyWeights(weights, {name: fail}), "it cannot be made") for name in breaking]
    wrong += [
        (weights | {f"{layer}.weight": weights[f"{layer}.weight"][:1]}, "failed to take over the weights"),
        (weights | {"model.nobody.weight": weights[f"{layer}.weight"]}, "no module or parameter"),
        ({name: one for name, one in weights.items() if name != norm}, "weights were not updated: "),
    ]
    for given, told in wrong:
        with monkeypatch.context() as patched:
            patched.setattr(engine, "_names", given.keys())
            with pytest.raises(EngineError, match=told):
                engine.sync(given)
        with torch.no_grad():
            for parameter in agent.policy.parameters():
                parameter.mul_(1.02)
        agent.sync()
        assert_in_step(agent, batch())


def test_a_prompt_that_is_read_otherwise_is_told_with_both_readings(
    agent: VLMAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = agent.family.encode

    def otherwise(observation: Any) -> Any:
        prompt = encode(observation)
        return replace(prompt, input_ids=np.append(prompt.input_ids[:-1], [7, 8]))

    prompt = encode(ragged()[0]).input_ids
    monkeypatch.setattr(agent.family, "encode", otherwise)
    place = len(prompt) - 1
    told = (
        rf"{len(prompt)} tokens against {len(prompt) + 1}, and from token {place} on \[{prompt[-1]}\] against \[7, 8\]"
    )
    with pytest.raises(EngineError, match=told):
        agent.rollout(ragged()[:1])


# Episodes of several turns.


def model_alone(agent: VLMAgent) -> VLMAgent:
    """The trainer's own model, without the engine."""
    alone = copy(agent)
    alone.engine = None
    return alone


def assert_written_by_the_model(agent: VLMAgent, rollout: Rollout) -> None:
    """What the policy wrote has the log-probabilities of the trainer's model."""
    expected = logprobs_of(agent, rollout).numpy()
    for row, one in enumerate(rollout.completions):
        written = np.ones(len(one.token_ids), bool) if one.written is None else one.written
        np.testing.assert_allclose(one.logprobs[written], expected[row, : len(written)][written], atol=TOLERANCE)
        assert not one.logprobs[~written].any()


def test_episodes_are_in_step_before_and_after_an_update(agent: VLMAgent) -> None:
    """Of one to three turns, with crops as images of later turns."""
    agent.sampling = Sampling(max_new_tokens=6, temperature=0.9)
    for _ in range(2):
        rollout, _ = episodes(agent, greedy=True)
        assert_alike(rollout, episodes(model_alone(agent), greedy=True)[0])
        sampled, history = episodes(agent)
        assert_written_by_the_model(agent, sampled)
        assert not sampled.from_trainer
        for turns, one, before in zip(TURNS, sampled.completions, history[0].completions, strict=True):
            assert (one.written is None) == (turns == 1)
            assert np.array_equal(one.token_ids[: len(before.token_ids)], before.token_ids)
        with torch.no_grad():
            for parameter in agent.policy.parameters():
                parameter.mul_(1.05)
        agent.sync()


def test_a_seed_fixes_the_samples_of_all_turns(agent: VLMAgent) -> None:
    agent.sampling = Sampling(temperature=2.0, max_new_tokens=6)

    def tokens(seed: int) -> list[list[int]]:
        agent.seed(seed)
        rollout = agent.rollout(first())
        going = [after(one, "?", "Go on.", image(7, 64, 64)) for one in first()]
        return [one.token_ids.tolist() for one in agent.proceed(rollout, going).completions]

    one = tokens(1)
    assert one == tokens(1)
    assert one != tokens(2)
    assert len({tuple(row) for row in one[:3]}) == 3


def test_earlier_answers_are_not_encoded_again(agent: VLMAgent) -> None:
    """An answer of single letters, of which its text would make other tokens; and one that was cut off."""
    tokenizer = agent.family.processor.tokenizer
    letters = np.array([tokenizer.convert_tokens_to_ids(letter) for letter in "answer"])
    assert tokenizer.encode("answer", add_special_tokens=False) != letters.tolist()
    agent.sampling = Sampling(0.0, max_new_tokens=6)
    rollout = agent.rollout(first()[:1] * 2)
    cut, ended = letters, np.append(letters, agent.family.end_tokens[0])
    made = [replace(rollout.completions[0], token_ids=ids, logprobs=np.zeros(len(ids))) for ids in (cut, ended)]
    shown = [after(first()[0], "answer", "And here?", image(7, 64, 64))] * 2
    found = agent.proceed(replace(rollout, completions=made), shown)
    assert_alike(found, model_alone(agent).proceed(replace(rollout, completions=made), shown))
    assert np.array_equal(found.completions[0].token_ids[: len(letters)], letters)


@pytest.mark.parametrize("engine", ["in process"], indirect=True)
def test_the_past_of_a_turn_is_not_computed_again(agent: VLMAgent, engine: Engine) -> None:
    """vLLM keeps keys and values in blocks of 128 tokens on CPUs."""
    assert isinstance(engine, VLLMEngine)
    agent.sampling = Sampling(max_new_tokens=6)
    long = {"images": (image(0, 64, 96),), "prompt": "<image>" + "Locate the red circle, " * 60}
    rollout = agent.rollout([long])
    kept, generate = [], engine._llm.generate

    def noted(*given: Any, **options: Any) -> Any:
        outputs = generate(*given, **options)
        kept.append([output.num_cached_tokens for output in outputs])
        return outputs

    engine._llm.generate = noted
    try:
        agent.proceed(rollout, [after(long, "?", "Go on.", image(7, 64, 64))])
    finally:
        engine._llm.generate = generate
    whole = len(rollout.prompts[0].input_ids) + len(rollout.completions[0].token_ids)
    assert kept == [[whole // 128 * 128]]
    assert whole > 128


@pytest.mark.parametrize("folder", ["builtin"], indirect=True)
def test_budgets_of_the_engine_end_episodes_or_are_told(folder: Path) -> None:
    agent = VLMAgent.from_pretrained(folder, sampling=Sampling(max_new_tokens=6))
    asked = first()[0]
    length = len(agent.encode([asked])[0][0].input_ids) + 16
    agent.engine = start(agent, length, max_images=1)
    try:
        rollout = agent.rollout([asked])
        (full,) = agent.proceed(rollout, [after(asked, "?", "Go on, " * 20)]).completions
        assert (full.text, full.finish_reason) == ("", "length")
        assert np.array_equal(full.token_ids, rollout.completions[0].token_ids)
        with pytest.raises(PromptError, match="it has 2 images, and the engine takes 1: raise --engine-images"):
            agent.proceed(rollout, [after(asked, "?", "Go on.", image(7, 64, 64))])
        with pytest.raises(PromptError, match="it has 2 images, and the engine takes 1"):
            agent.rollout([first()[3]])
        with pytest.raises(ConfigError, match="up to 3 images, and the engine takes 1"):
            agent.check_episodes(2, 3)
        agent.check_episodes(1, 3)
    finally:
        agent.close()


def test_a_prompt_beyond_the_engines_length_is_refused(agent: VLMAgent) -> None:
    with pytest.raises(PromptError, match="leaves no room for max_new_tokens=12 in the engine's 1024"):
        agent.act([{"images": (), "prompt": "circle " * 1100}])


@pytest.mark.parametrize("folder", ["builtin"], indirect=True)
def test_other_precisions_around_it_leave_the_engine_as_it_is(agent: VLMAgent) -> None:
    """The trainer's autocast is none of the engine's."""
    greedy = Sampling(0.0, max_new_tokens=12)
    expected = by_engine(agent, ragged(), greedy)
    with torch.autocast("cpu", torch.bfloat16):
        again = by_engine(agent, ragged(), greedy)
    for a, b in zip(expected.completions, again.completions, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


@pytest.mark.parametrize("folder", ["builtin"], indirect=True)
@pytest.mark.parametrize("left_out", ["reset_prefix_cache", "reset_encoder_cache"])
def test_each_cache_has_to_be_reset(left_out: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without either, the check of the other tests fails on prompts that are asked again."""
    agent = VLMAgent.from_pretrained(folder, sampling=Sampling(max_new_tokens=4))
    agent.engine = engine = start(agent)
    block = engine._llm.llm_engine.vllm_config.cache_config.block_size
    assert max(len(prompt.input_ids) for prompt in agent.encode(batch())[0]) > block
    try:
        assert_in_step(agent, batch())
        with torch.no_grad():
            for parameter in agent.policy.parameters():
                parameter.mul_(1.05)
        holder = engine._llm if left_out == "reset_prefix_cache" else engine._llm.llm_engine
        monkeypatch.setattr(holder, left_out, lambda: True)
        agent.sync()
        with pytest.raises((AssertionError, EngineError)):
            assert_in_step(agent, batch())
    finally:
        engine.close()


@pytest.mark.parametrize("engine", ["in process"], indirect=True)
def test_features_are_kept_while_a_frozen_tower_stays_the_same(agent: VLMAgent) -> None:
    """Images are seen again when its weights have been changed by hand, and whenever it is trained."""
    engine = agent.engine
    assert isinstance(engine, VLLMEngine)
    model = engine._llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
    seen: list[int] = []
    hook = model.visual.register_forward_hook(lambda *_: seen.append(1))
    tower, language = agent.family.vision_tower(), agent.family.language_model()

    def looks_after_changing(part: torch.nn.Module) -> bool:
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.mul_(1.02)
        agent.sync()
        seen.clear()
        assert_in_step(agent, batch())
        return bool(seen)

    agent.sync()
    assert_in_step(agent, batch())
    assert looks_after_changing(language)
    agent.freeze(vision=True, projector=True)
    assert looks_after_changing(language)  # what it was before is not known
    assert not looks_after_changing(language)
    assert not looks_after_changing(language)
    assert looks_after_changing(tower)
    assert not looks_after_changing(language)
    hook.remove()


@pytest.fixture
def sleeper(agent: VLMAgent, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> VLLMEngine:
    """An engine that does on the CPU what it would on a GPU; of vLLM, all but the memory itself goes to sleep here."""
    assert isinstance(engine, VLLMEngine)
    monkeypatch.setattr(engine, "_sleeps", True)
    return engine


def worker_of(engine: VLLMEngine) -> Any:
    return engine._llm.llm_engine.model_executor.driver_worker.worker


def asleep(engine: VLLMEngine) -> set[str]:
    """The parts of its memory that vLLM takes to be given up."""
    return set(engine._llm.llm_engine.model_executor.sleeping_tags)


@pytest.mark.parametrize("engine", ["in process"], indirect=True)
@pytest.mark.parametrize("synced", [False, True])
def test_an_engine_that_slept_is_in_step(agent: VLMAgent, sleeper: VLLMEngine, synced: bool) -> None:
    """Room for keys and values is taken back once the weights are there; and where none are handed over as well."""
    assert_in_step(agent, batch())
    for _ in range(2):
        agent.sleep()
        assert asleep(sleeper) == {"weights", "kv_cache"}
        agent.wake()
        assert asleep(sleeper) == {"kv_cache"}
        if synced:
            with torch.no_grad():
                for parameter in agent.parameters():
                    parameter.mul_(1.02)
            agent.sync()
            assert asleep(sleeper) == {"kv_cache"}
        assert_in_step(agent, batch())
        assert not asleep(sleeper)


@pytest.mark.parametrize("engine", ["in process"], indirect=True)
@pytest.mark.parametrize("folder", ["builtin"], indirect=True)
def test_a_gpu_without_room_to_wake_is_told_of(
    agent: VLMAgent, sleeper: VLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tags: list[str]) -> None:
        raise RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp:119")  # the kind that vLLM raises

    agent.sleep()
    with monkeypatch.context() as patched:
        patched.setattr(worker_of(sleeper), "wake_up", full)
        for asked in (agent.wake, agent.sync, lambda: agent.act(ragged())):
            with pytest.raises(EngineError, match=r"failed to wake: .* out of memory .*; lower --engine-memory"):
                asked()
        assert asleep(sleeper) == {"weights", "kv_cache"}
    agent.sync()
    assert_in_step(agent, batch())


@pytest.mark.parametrize("full", [False, True])
def test_an_engine_is_awake_when_it_is_closed(full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless there is no room, of which nobody needs to know any more."""
    agent = VLMAgent.from_pretrained("builtin")
    agent.engine = engine = start(agent, max_length=64)
    monkeypatch.setattr(engine, "_sleeps", True)
    worker, seen = worker_of(engine), []

    def wake_up(tags: list[str]) -> None:
        seen.append(set(tags))
        if full:
            raise RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp:119")

    shutdown = worker.shutdown
    monkeypatch.setattr(worker, "wake_up", wake_up)
    monkeypatch.setattr(worker, "shutdown", lambda: (seen.append("shutdown"), shutdown()))
    agent.sleep()
    agent.close()
    assert seen[:2] == [{"weights", "kv_cache"}, "shutdown"]


@pytest.mark.parametrize("engine", ["in process"], indirect=True)
@pytest.mark.parametrize("folder", ["builtin"], indirect=True)
def test_keys_and_values_that_cannot_be_forgotten_are_an_error(agent: VLMAgent, engine: Engine) -> None:
    """vLLM keeps them as long as a request needs them, here one that another has asked."""
    assert isinstance(engine, VLLMEngine)
    vllm = engine._llm.llm_engine
    vllm.add_request("another's", {"prompt_token_ids": [5, 6, 7]}, engine._vllm.SamplingParams(max_tokens=4))
    vllm.step()
    with pytest.raises(EngineError, match="keeps keys and values of the old weights"):
        agent.sync()
    vllm.abort_request(["another's"])
    agent.sync()
    assert_in_step(agent, batch())


@pytest.mark.parametrize("folder", ["builtin"], indirect=True)
def test_signals_stay_ours(folder: Path) -> None:
    former = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    agent = VLMAgent.from_pretrained(folder, sampling=Sampling(max_new_tokens=4))
    agent.engine = start(agent)
    agent.act(ragged())
    agent.sync()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == former
    agent.close()
    assert agent.engine is None
