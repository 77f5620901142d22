from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from batches import observations, ragged
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from vlmenv.agents.checkpoints import public_name
from vlmenv.agents.families import coordinate_space
from vlmenv.agents.vlm import Sampling, VLMAgent, find_model
from vlmenv.core.coordinates import CoordinateSpace
from vlmenv.core.errors import ConfigError, ModelError, PromptError
from vlmenv.core.names import SHIPPED
from vlmenv.core.rollout import Observation, Rollout
from vlmenv.options.task import located_model


def plain_logprobs(agent: VLMAgent, rollout: Rollout, row: int) -> torch.Tensor:
    """A completion's log-probabilities by the model's own forward pass on the whole sequence, nothing shared."""
    prompt, completion = rollout.prompts[rollout.prompt_index[row]], rollout.completions[row]
    ids = torch.from_numpy(np.concatenate([prompt.input_ids, completion.token_ids]))[None]
    image_token = agent.family.model.config.image_token_id
    logits = agent.family.model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == image_token).int(),
        **prompt.images,
    ).logits[0, len(prompt.input_ids) - 1 : -1]
    logits[:, agent.family.banned_tokens] = -torch.inf
    logprobs = torch.log_softmax(logits / (rollout.temperature or 1), dim=-1)
    return logprobs.gather(-1, torch.from_numpy(completion.token_ids)[:, None])[:, 0]


@pytest.fixture(params=["builtin", "qwen2_5_vl", "published qwen2_5_vl", "published qwen3_vl"])
def agent(request: pytest.FixtureRequest, qwen2_5_vl_folder: Path, published: Callable[[str], Path]) -> VLMAgent:
    """One of each family, with an invented tokenizer and with the published one."""
    if request.param.startswith("published"):
        folder = published(request.param.removeprefix("published "))
    else:
        folder = qwen2_5_vl_folder if request.param == "qwen2_5_vl" else find_model("builtin")
    agent = VLMAgent.from_pretrained(folder, sampling=Sampling(0.8, max_new_tokens=6))
    agent.seed(0)
    return agent


def test_sampled_logprobs_equal_a_fresh_plain_forward_pass(agent: VLMAgent) -> None:
    rollout = agent.rollout(ragged())
    assert len(rollout) == 8
    assert len(rollout.prompts) == 4
    again = agent.logprobs(rollout)
    for row, completion in enumerate(rollout.completions):
        length = len(completion.token_ids)
        expected = plain_logprobs(agent, rollout, row).detach().numpy()
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-5)
        np.testing.assert_allclose(again.values[row, :length].detach().numpy(), expected, atol=1e-5)
        assert not again.values[row, length:].any()
        assert again.mask[row].sum() == length


def test_gradients_equal_those_of_the_plain_forward_pass(agent: VLMAgent) -> None:
    rollout = agent.rollout(ragged())
    weights = torch.linspace(-1, 1, len(rollout))
    (agent.logprobs(rollout).values * weights[:, None]).sum().backward()
    shared = {name: parameter.grad for name, parameter in agent.policy.named_parameters()}
    agent.policy.zero_grad()
    sum(weights[row] * plain_logprobs(agent, rollout, row).sum() for row in range(len(rollout))).backward()
    largest = max(float(p.grad.abs().max()) for p in agent.policy.parameters() if p.grad is not None)
    for name, parameter in agent.policy.named_parameters():
        assert (parameter.grad is None) == (shared[name] is None), name
        if parameter.grad is not None:
            assert (parameter.grad - shared[name]).abs().max() <= 1e-5 * largest, name


def test_entropy_is_that_of_the_sampling_distribution(builtin: VLMAgent) -> None:
    rollout = builtin.rollout(observations())
    result = builtin.logprobs(rollout)
    hidden, packing = builtin.family_policy.hidden_states(rollout)
    allowed = np.setdiff1d(np.arange(builtin.family.model.config.text_config.vocab_size), builtin.family.banned_tokens)
    logits = builtin.family_policy.model.lm_head(hidden)[..., allowed]
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(packing.unpad(result.entropy), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_sampling_follows_the_distribution(builtin: VLMAgent) -> None:
    """The frequencies of the first token at a high temperature, against the model's own probabilities."""
    builtin.sampling, count = Sampling(temperature=4.0, max_new_tokens=1), 8192
    rollout = builtin.rollout(observations(count, count))
    hidden, _ = builtin.family_policy.hidden_states(rollout[:1])
    expected = torch.softmax(builtin.family_policy.logits(hidden[0]) / 4.0, dim=-1).detach().numpy()
    sampled = np.bincount([completion.token_ids[0] for completion in rollout.completions], minlength=len(expected))
    assert (sampled > 0).sum() > 20
    assert np.abs(sampled / count - expected).max() < 5 * np.sqrt(0.25 / count)
    common = expected > 0.005
    np.testing.assert_allclose(sampled[common] / count, expected[common], rtol=0.6)
    assert np.exp(rollout.completions[0].logprobs[0]) == pytest.approx(
        expected[rollout.completions[0].token_ids[0]], rel=1e-4
    )


def test_modality_and_control_tokens_are_never_sampled(agent: VLMAgent) -> None:
    """Even by a policy that wants nothing else."""
    tokenizer = agent.family.processor.tokenizer
    model = agent.family.model
    for token in ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>"):
        assert tokenizer.convert_tokens_to_ids(token) in agent.family.banned_tokens
    assert not set(agent.family.end_tokens) & set(agent.family.banned_tokens.tolist())
    assert not set(range(len(tokenizer), model.lm_head.weight.shape[0])) - set(agent.family.banned_tokens.tolist())
    for tag in ("think", "answer"):
        assert not set(tokenizer.encode(f"<{tag}>a</{tag}>")) & set(agent.family.banned_tokens.tolist())
    pads = [model.config.image_token_id, model.config.video_token_id]
    hidden, _ = agent.family_policy.hidden_states(agent.rollout(ragged()))
    direction = hidden.detach().mean(dim=0)
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.lm_head.weight[pads] = 100 * direction / direction.norm()
    wanted = model.lm_head(hidden).argmax(dim=-1)
    assert np.isin(wanted.numpy(), pads).mean() > 0.5
    rollout = agent.rollout(ragged())
    sampled = np.concatenate([completion.token_ids for completion in rollout.completions])
    assert not np.isin(sampled, agent.family.banned_tokens).any()
    assert torch.isfinite(agent.logprobs(rollout).values).all()


def test_finish_reasons(builtin: VLMAgent) -> None:
    batch = observations(4, 1)
    whole = builtin.rollout(batch)
    assert {completion.finish_reason for completion in whole.completions} == {"stop"}
    assert all(completion.token_ids[-1] in builtin.family.end_tokens for completion in whole.completions)
    builtin.sampling = Sampling(max_new_tokens=5)
    cut = builtin.rollout(batch)
    assert {completion.finish_reason for completion in cut.completions} == {"length"}
    assert all(len(completion.token_ids) == 5 for completion in cut.completions)


@pytest.mark.slow
def test_a_seed_fixes_the_samples(builtin: VLMAgent) -> None:
    def texts(seed: int) -> list[str]:
        builtin.seed(seed)
        return builtin.rollout(observations()).texts

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)


@pytest.mark.slow
def test_act_is_greedy_and_the_same_alone_or_in_a_batch(builtin: VLMAgent) -> None:
    batch = observations(6, 1)
    together = builtin.act(batch)
    assert together == builtin.act(batch)
    alone = [
        builtin.act([{"images": images, "prompt": prompt}])[0]
        for images, prompt in zip(batch["images"], batch["prompt"], strict=True)
    ]
    assert together == alone


def test_greedy_answers_equal_transformers_generate(builtin: VLMAgent) -> None:
    batch = observations(3, 1)
    ours = builtin.act(batch)
    prompts, _ = builtin.encode(batch)
    for text, prompt in zip(ours, prompts, strict=True):
        ids = torch.from_numpy(prompt.input_ids)[None]
        output = builtin.family.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == builtin.family.model.config.image_token_id).int(),
            max_new_tokens=24,
            do_sample=False,
            **prompt.images,
        )
        assert builtin.family.decode(output[0, ids.shape[1] :].numpy()) == text


def test_the_builtin_model_answers_in_the_format_asked_for(builtin: VLMAgent) -> None:
    envs = gymnasium.make_vec("VLM-REC-v0", num_envs=32, split="eval")
    batch, _ = envs.reset(seed=0)
    _, _, _, _, infos = envs.step(builtin.act(batch))
    assert infos["rewards"]["format"].mean() > 0.95
    assert infos["rewards"]["iou"].mean() > 0.3


@pytest.mark.slow
def test_a_saved_model_is_loaded_by_plain_transformers(agent: VLMAgent, tmp_path: Path) -> None:
    with torch.no_grad():
        agent.family.model.get_input_embeddings().weight.mul_(1.5)
    agent.save(tmp_path / "model")
    agent.save(tmp_path / "model")  # again, over the first
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    for name, tensor in agent.family.model.state_dict().items():
        stored = plain.state_dict()[name]
        assert torch.equal(stored, tensor.to(stored.dtype)), name
    again = VLMAgent.from_pretrained(tmp_path / "model", sampling=Sampling(max_new_tokens=6))
    assert again.act(ragged()) == agent.act(ragged())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_engine_is_given_the_weights_by_the_names_that_are_saved(agent: VLMAgent, tmp_path: Path) -> None:
    agent.save(tmp_path / "model")
    saved, handed = load_file(tmp_path / "model" / "model.safetensors"), agent._published_weights()
    assert handed.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(handed[name].to(tensor.dtype), tensor), name


def test_weights_are_handed_over_without_the_policys_state(builtin: VLMAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under FSDP2 to ask for the state would free the gathered weights."""
    monkeypatch.setattr(builtin.policy, "state_dict", lambda *_, **__: pytest.fail("the state was asked for"))
    assert builtin._published_weights()


def test_generation_settings_that_transformers_would_not_save_are_no_obstacle(
    builtin: VLMAgent, tmp_path: Path
) -> None:
    shutil.copytree(find_model("builtin"), tmp_path / "a")
    settings = tmp_path / "a" / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"temperature": 0.1}))
    agent = VLMAgent.from_pretrained(tmp_path / "a")
    agent.save(tmp_path / "b")
    assert (tmp_path / "b" / "generation_config.base.json").read_bytes() == settings.read_bytes()
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text())["temperature"] == 1.0
    assert agent.family.end_tokens == builtin.family.end_tokens


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    shutil.copytree(find_model("builtin"), tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.language_model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 of the model's weights are missing, .*norm\.weight"):
        VLMAgent.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ModelError, match="weights cannot be read"):
        VLMAgent.from_pretrained(tmp_path)


def test_the_reference_stays_as_it_was(builtin: VLMAgent) -> None:
    rollout = builtin.rollout(observations())
    reference = builtin.reference()
    own, before = builtin.logprobs(rollout).values.detach(), reference.logprobs(rollout).values
    torch.testing.assert_close(before, own, atol=1e-5, rtol=0)  # a pass without gradient differs in the last digits
    with torch.no_grad():
        builtin.family.model.lm_head.weight.mul_(1.5)
    again = reference.logprobs(rollout).values
    assert torch.equal(again, before)
    assert not again.requires_grad
    assert not torch.allclose(builtin.logprobs(rollout).values, own, atol=1e-3)


def test_a_prompt_that_does_not_fit_is_refused(builtin: VLMAgent) -> None:
    batch = [*ragged()[:1], {"images": (), "prompt": "circle " * 3000}]
    with pytest.raises(PromptError, match=r"observation 1: the prompt has .* leaves no room for max_new_tokens=24"):
        builtin.rollout(batch)


@pytest.mark.parametrize("mark", ["<|image_pad|>", "<|video_pad|>", "<|im_end|>\n<|im_start|>assistant\n"])
def test_a_prompt_with_control_tokens_of_its_own_is_refused(builtin: VLMAgent, mark: str) -> None:
    batch: list[Observation] = [{**ragged()[0], "prompt": f"Locate {mark}."}]
    with pytest.raises(PromptError, match=r"must not contain control tokens: <\|"):
        builtin.act(batch)


def test_an_image_that_the_processor_refuses_is_named(builtin: VLMAgent) -> None:
    batch = [{"images": (np.zeros((1, 900, 3), dtype=np.uint8),), "prompt": "Locate it."}]
    with pytest.raises(PromptError, match=r"observation 0: .*aspect ratio"):
        builtin.act(batch)


@pytest.mark.parametrize(
    ("prompt", "images", "told"),
    [
        (None, (), "prompt is a text, not a NoneType"),
        ("?", np.zeros((1, 28, 28, 3)), r"not float64 \[28, 28, 3\]"),  # 0 to 1, which a processor would darken
        ("?", np.zeros((28, 28, 3), np.uint8), r"images is a tuple of images; .* not uint8 \[28, 3\]"),
    ],
)
def test_what_is_no_observation_is_told(builtin: VLMAgent, prompt: Any, images: Any, told: str) -> None:
    with pytest.raises(PromptError, match=f"observation 0: .*{told}"):
        builtin.act({"images": [images], "prompt": [prompt]})


@pytest.mark.parametrize("kept", [("config.json",), ("config.json", "tokenizer.json")])
def test_a_folder_without_processor_is_refused(tmp_path: Path, kept: tuple[str, ...]) -> None:
    for name in (*kept, "model.safetensors"):
        shutil.copyfile(find_model("builtin") / name, tmp_path / name)
    with pytest.raises(ModelError, match="has no processor"):
        VLMAgent.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_is_found_by_its_name(name: str) -> None:
    agent = VLMAgent.from_pretrained(name)
    assert public_name(find_model(name)) == name
    assert located_model(name) == name
    assert coordinate_space(agent.folder) is CoordinateSpace.ORIGINAL
    assert sum(weight.numel() for weight in agent.parameters()) < 2e6


def test_models_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model folder"):
        find_model(tmp_path / "none")
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        find_model(tmp_path)
    with pytest.raises(ModelError, match="the download from the Hugging Face hub failed"):
        find_model("nobody/nothing")


def test_a_family_that_is_not_known_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_audio"}')
    with pytest.raises(ModelError, match="models of type 'qwen2_audio' are of no known family"):
        VLMAgent.from_pretrained(tmp_path)


def test_logits_that_are_not_finite_are_told(builtin: VLMAgent) -> None:
    builtin.family.model.get_output_embeddings().weight.data[7, 0] = torch.inf
    for answer in (builtin.rollout, builtin.act):
        with pytest.raises(ModelError, match="logits are not finite"):
            answer(observations())


def test_extending_what_was_not_begun_is_refused(builtin: VLMAgent) -> None:
    tokens = torch.zeros(1, dtype=torch.long)
    with pytest.raises(RuntimeError, match=r"call prefill\(\) first"):
        builtin.family_policy.extend(tokens, tokens, None)  # type: ignore[arg-type]


def test_an_agent_that_was_closed_with_its_engine_generates_no_more(builtin: VLMAgent) -> None:
    """Its policy would answer instead, and nobody would know."""

    class Closing:
        closed = False

        def close(self) -> None:
            self.closed = True

    builtin.engine = engine = Closing()  # type: ignore[assignment]
    builtin.close()
    builtin.close()
    assert engine.closed
    with pytest.raises(ConfigError, match="closed with its engine: load it anew"):
        builtin.rollout(observations(2, 2))


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_beyond_what_torch_takes_is_named(builtin: VLMAgent, seed: int) -> None:
    builtin.seed(2**64 - 1)
    with pytest.raises(ConfigError, match=rf"seed must be from 0 to 2\*\*64 - 1, not {seed}"):
        builtin.seed(seed)
