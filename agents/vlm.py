"""A vision-language model as an agent: prompts are computed once per group, answers token by token."""

from __future__ import annotations

import copy
import functools
import re
import shutil
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache, GenerationConfig, PreTrainedModel

from vlmenv.agents.base import Agent, LogProbs
from vlmenv.agents.families import Family, Processor, family_of
from vlmenv.agents.families.base import join_images
from vlmenv.core.errors import ConfigError, ModelError, PromptError
from vlmenv.core.rollout import Completion, Observations, Prompt, Rollout, group_neighbours, unbatch

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)

BUILTIN = "builtin"
"""The name of the small model that is shipped with the package."""


class VLMAgent(Agent):
    """An agent on a transformers vision-language model.

    Args:
        family: The model with its processor.
        folder: Where the processor's files are, to be copied into checkpoints.
        temperature: Of the sampling distribution; 0 samples greedily.
        max_new_tokens: The longest completion, its end token included.

    Raises:
        ConfigError: `temperature` or `max_new_tokens` is out of range.
    """

    def __init__(self, family: Family, folder: Path, *, temperature: float = 1.0, max_new_tokens: int = 64) -> None:
        if temperature < 0:
            raise ConfigError(f"temperature must not be negative, not {temperature}")
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        self.family = family
        self.folder = folder
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens
        self.policy: nn.Module = Policy(family.model, family.banned_tokens)
        self._generator = torch.Generator(self.device)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        temperature: float = 1.0,
        max_new_tokens: int = 64,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> VLMAgent:
        """Loads a checkpoint in the published layout.

        Args:
            name_or_path: `"builtin"`, a folder, or a name on the Hugging Face hub.
            temperature: See the class.
            max_new_tokens: See the class.
            device: Where the model goes.
            dtype: Of the weights.

        Raises:
            ModelError: There is no such model, its family is not known, or its processor is missing.
        """
        folder = find_model(name_or_path)
        try:
            config = AutoConfig.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ModelError(f"{folder}: the model's configuration cannot be read: {error}") from error
        family = family_of(config.model_type)
        processor = Processor.from_pretrained(folder)
        model = _load_weights(folder, dtype).to(device).eval()  # type: ignore[arg-type]
        return cls(family(model, processor), folder, temperature=temperature, max_new_tokens=max_new_tokens)

    def act(self, observations: Observations) -> list[str]:
        return self._generate(observations, temperature=0.0).texts

    def rollout(self, observations: Observations) -> Rollout:
        return self._generate(observations, self.temperature)

    def seed(self, seed: int) -> None:
        self._generator.manual_seed(seed)

    def frozen_copy(self) -> VLMAgent:
        model = copy.deepcopy(self.family.model).requires_grad_(False)
        family = type(self.family)(model, self.family.processor)
        return VLMAgent(family, self.folder, temperature=self.temperature, max_new_tokens=self.max_new_tokens)

    def save(self, folder: Path) -> None:
        """Writes weights and processor; the folder appears only when it is whole.

        Raises:
            OSError: It cannot be written.
        """
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        model, generation = self.family.model, self.family.model.generation_config
        # Published generation settings may be ones that transformers loads but refuses to save.
        model.generation_config = GenerationConfig(eos_token_id=list(self.family.end_tokens))
        try:
            model.save_pretrained(partial)
        finally:
            model.generation_config = generation
        for file in self.folder.iterdir():
            kept = file.suffix in {".json", ".jinja", ".txt"} and not file.name.endswith(".index.json")
            if kept and file.name != "config.json":
                shutil.copyfile(file, partial / file.name)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)

    @functools.cached_property
    def max_length(self) -> int:
        """Tokens of prompt and completion together that the model can take."""
        return int(self.family.model.config.get_text_config().max_position_embeddings)

    def encode(self, observations: Observations) -> tuple[list[Prompt], np.ndarray]:
        """Encodes observations, each run of neighbouring copies once.

        Returns:
            P prompts, and for each of the N observations the index of its prompt.

        Raises:
            PromptError: A prompt leaves no room for the answer, or cannot be encoded.
        """
        listed = unbatch(observations)
        firsts, index = group_neighbours(listed)
        prompts = []
        for i in firsts:
            try:
                prompts.append(self.family.encode(listed[i]))
            except ValueError as error:
                raise PromptError(i, str(error)) from error
            length = len(prompts[-1].input_ids)
            if length + self.max_new_tokens > self.max_length:
                raise PromptError(
                    i,
                    f"the prompt has {length} tokens, which leaves no room for max_new_tokens={self.max_new_tokens} "
                    f"in the model's {self.max_length}; use smaller images or a shorter prompt",
                )
        return prompts, index

    @torch.no_grad()
    def _generate(self, observations: Observations, temperature: float) -> Rollout:
        prompts, index = self.encode(observations)
        policy = self.family_policy
        tokens, logprobs = policy.sample(
            prompts, index, temperature, self.max_new_tokens, self.family.end_tokens, self._generator
        )
        completions = [self._completion(row, values) for row, values in zip(tokens, logprobs, strict=True)]
        return Rollout(prompts, index, completions, temperature)

    @property
    def family_policy(self) -> Policy:
        """The policy without what may be wrapped around it for distributed training."""
        module = self.policy
        while not isinstance(module, Policy):
            inner = module.module
            assert isinstance(inner, nn.Module)
            module = inner
        return module

    def _completion(self, tokens: np.ndarray, logprobs: np.ndarray) -> Completion:
        """Cuts a row of sampled tokens after its first end token."""
        ends = np.flatnonzero(np.isin(tokens, self.family.end_tokens))
        length = ends[0] + 1 if len(ends) else len(tokens)
        ids = tokens[:length].copy()
        return Completion(self.family.decode(ids), ids, logprobs[:length].copy(), "stop" if len(ends) else "length")


@dataclass(slots=True)
class Prefix:
    """P prompts, all but their last token, run through the model."""

    cache: DynamicCache
    """keys and values, [P, heads, T - 1, head size] per layer"""
    mask: Tensor
    """[P, T - 1], 1 at prompt tokens, 0 where padded"""
    last: Tensor
    """[P], each prompt's last token"""
    position: Tensor
    """[P], the position of that token"""

    def expand(self, index: Tensor) -> None:
        """Gives each of N completions the prefix of its prompt, `index` [N]. Gradients add up."""
        self.cache.batch_select_indices(index)
        self.mask, self.last, self.position = self.mask[index], self.last[index], self.position[index]


class Policy(nn.Module):
    """The distribution over completions: sampling from it, and the log-probabilities under it.

    A group's image and prompt run through the model once; its completions continue from the cached
    keys and values. That is exact, in value and in gradient (compare Prefix Grouper, arXiv 2506.05433).
    """

    def __init__(self, model: PreTrainedModel, banned_tokens: np.ndarray) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("banned", torch.from_numpy(banned_tokens).to(model.device), persistent=False)

    def forward(self, rollout: Rollout) -> LogProbs:
        """Log-probabilities and entropies of the completions of a rollout."""
        temperature = rollout.temperature or 1.0
        hidden, targets, mask = self.hidden_states(rollout)
        logprobs = torch.log_softmax(self.logits(hidden[mask]) / temperature, dim=-1)
        chosen = logprobs.gather(-1, targets[mask][:, None])[:, 0]
        with torch.no_grad():
            entropy = -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)
        blank = torch.zeros(mask.shape, dtype=chosen.dtype, device=mask.device)
        return LogProbs(blank.masked_scatter(mask, chosen), blank.masked_scatter(mask, entropy), mask)

    def hidden_states(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
        """Final hidden states that predict the tokens of the completions.

        Returns:
            Hidden states [N, L, H], the tokens that they predict [N, L], and the mask of real tokens [N, L].
        """
        prefix = self.prefill(rollout.prompts)
        prefix.expand(torch.from_numpy(rollout.prompt_index).to(prefix.mask.device))
        targets = _pad([completion.token_ids for completion in rollout.completions]).to(prefix.mask.device)
        lengths = torch.tensor([len(completion.token_ids) for completion in rollout.completions])
        mask = (torch.arange(targets.shape[1]) < lengths[:, None]).to(targets.device)
        inputs = torch.cat([prefix.last[:, None], targets[:, :-1]], dim=1)
        attention = torch.cat([prefix.mask, mask.long()], dim=1)
        return self._continue(prefix, inputs, attention, start=0), targets, mask

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states [..., H] over the vocabulary, in float32, banned tokens at -inf."""
        head = self.model.get_output_embeddings()
        assert head is not None
        logits: Tensor = head(hidden).float()
        return logits.index_fill(-1, self.get_buffer("banned"), -torch.inf)

    def prefill(self, prompts: list[Prompt]) -> Prefix:
        """Runs prompts through the model, all but their last token, padded on the right."""
        device = self.model.device
        lengths = torch.tensor([len(prompt.input_ids) - 1 for prompt in prompts])
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long().to(device)
        positions = [_pad([prompt.position_ids[axis, :-1] for prompt in prompts]) for axis in range(3)]
        output = self.model.model(
            input_ids=_pad([prompt.input_ids[:-1] for prompt in prompts]).to(device),
            attention_mask=mask,
            position_ids=torch.stack(positions).to(device),
            use_cache=True,
            **join_images(prompts, device),
        )
        last = torch.tensor([int(prompt.input_ids[-1]) for prompt in prompts], device=device)
        position = torch.tensor([int(prompt.position_ids[0, -1]) for prompt in prompts], device=device)
        return Prefix(output.past_key_values, mask, last, position)

    def sample(
        self,
        prompts: list[Prompt],
        index: np.ndarray,
        temperature: float,
        max_new_tokens: int,
        end_tokens: tuple[int, ...],
        generator: torch.Generator,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Samples a completion for each entry of `index` [N], until all have ended or are full.

        Returns:
            Tokens and their log-probabilities, [N, L] each; what follows a row's end token is void.
        """
        prefix = self.prefill(prompts)
        prefix.expand(torch.from_numpy(index).to(prefix.mask.device))
        ends = torch.tensor(end_tokens, device=prefix.mask.device)
        token, attention = prefix.last, prefix.mask
        done = torch.zeros_like(token, dtype=torch.bool)
        tokens, logprobs = [], []
        for step in range(max_new_tokens):
            attention = torch.cat([attention, torch.ones_like(token)[:, None]], dim=1)
            hidden = self._continue(prefix, token[:, None], attention, start=step)
            token, logprob = _draw(self.logits(hidden[:, 0]), temperature, generator)
            tokens.append(token)
            logprobs.append(logprob)
            done |= torch.isin(token, ends)
            if done.all():
                break
        return torch.stack(tokens, dim=1).cpu().numpy(), torch.stack(logprobs, dim=1).cpu().numpy()

    def _continue(self, prefix: Prefix, tokens: Tensor, attention: Tensor, start: int) -> Tensor:
        """Hidden states [N, L, H] of tokens [N, L], the first of which is `start` places after the prefix."""
        offsets = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        positions = prefix.position[:, None] + offsets
        output = self.model.model(
            input_ids=tokens,
            attention_mask=attention,
            position_ids=positions.expand(3, *positions.shape),
            past_key_values=prefix.cache,
            use_cache=True,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws a token from each row of logits [N, V]; also its log-probability [N]."""
    logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
    if temperature == 0:
        token = logprobs.argmax(dim=-1)
    else:
        token = torch.multinomial(logprobs.exp(), 1, generator=generator)[:, 0]
    return token, logprobs.gather(-1, token[:, None])[:, 0]


def _pad(rows: list[np.ndarray]) -> Tensor:
    """Stacks rows of unequal length, with zeros on the right."""
    return nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True)


def _load_weights(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder, with every one of its weights.

    Raises:
        ModelError: Weights cannot be read, or some are missing.
    """
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: the model's weights cannot be read: {error}") from error
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(f"{folder}: {len(missing)} of the model's weights are missing, {missing[0]} among them")
    assert isinstance(model, PreTrainedModel)
    return model


def find_model(name_or_path: str | Path) -> Path:
    """The folder of a model; one on the hub is downloaded.

    Raises:
        ModelError: There is neither such a folder nor such a name on the hub.
    """
    if name_or_path == BUILTIN:
        return Path(str(files("vlmenv.agents") / "builtin"))
    folder = Path(name_or_path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder}: not a model folder, config.json is missing")
        return folder.absolute()
    if not _HUB_NAME.fullmatch(str(name_or_path)):
        raise ModelError(f"{name_or_path}: no such model folder")
    return _download(str(name_or_path))


@functools.cache
def _download(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.jinja", "*.txt", "*.safetensors"]))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{name}: no such model folder, and it cannot be had from the Hugging Face hub "
            f"({type(error).__name__}); check the name and the connection"
        ) from error
