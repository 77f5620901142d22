"""An agent on a transformers vision-language model."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from vlmenv.agents.base import Agent, LogProbs, Reference
from vlmenv.agents.checkpoints import (
    ADAPTER_CONFIG,
    find_adapter,
    find_model,
    load_model,
    public_name,
    put_back,
    read_tensors,
)
from vlmenv.agents.engines.base import Engine, Request
from vlmenv.agents.engines.fingerprints import fingerprint
from vlmenv.agents.families import Family, Processor, family_of, weightless_family
from vlmenv.agents.lora import LoRA
from vlmenv.agents.pixels import prepared_folder
from vlmenv.agents.policy import Policy, ValueHead, joined, later_positions
from vlmenv.agents.quantization import Quantization, quantize, quantized_layers
from vlmenv.agents.recomputation import recompute_activations
from vlmenv.agents.references import FrozenPolicy, UnadaptedPolicy
from vlmenv.agents.sampling import PassLimits, Sampled, sample, token_bytes
from vlmenv.agents.saving import check_conversion, is_of, published_weights, write_settings, write_weights
from vlmenv.agents.untrainable import read_config, tell_attention
from vlmenv.agents.weights import hold_all, hold_frozen
from vlmenv.compat.peft import is_adapter, plain_name
from vlmenv.core.errors import ConfigError, ModelError, PromptError, require
from vlmenv.core.files import atomic_folder
from vlmenv.core.names import BUILTIN
from vlmenv.core.pixels import PixelLimits
from vlmenv.core.rollout import (
    Completion,
    Observation,
    Observations,
    Pictured,
    Prompt,
    Rollout,
    Turns,
    group_neighbours,
    marked_ids,
    unbatch,
)
from vlmenv.core.sampling import Sampling
from vlmenv.core.spaces import image_fault

__all__ = ["BUILTIN", "Policy", "Sampling", "VLMAgent", "find_model"]

_FORMER_ADAPTER: Final = "adapter"
"""Folder of the adapters in checkpoints of earlier versions."""
_CACHED = 0.6
"""Share of a GPU's free memory for keys and values; a block of them is held twice while it grows."""
_VALUE_HEAD = "value_head/value_head.safetensors"


class VLMAgent(Agent):
    """An agent on a transformers vision-language model.

    Args:
        family: The model with its processor.
        folder: Folder of the processor's files, which checkpoints copy, with the configuration and the licence.
        base: Folder of the model as it is published. Default: `folder`.
        sampling: Sampling of `rollout`. Default: `Sampling()`.
        share_prefixes: See `Policy`.

    Attributes:
        lora: The adapters; None without.
        adapter: Folder of the adapters that the agent was loaded with; None without.
        save_dtype: Data type of the weights in checkpoints. None: that of the base model's files.
        target_device: Device of the weights, which they may not have reached yet: see `empty` of `from_pretrained`.
    """

    def __init__(
        self,
        family: Family,
        folder: Path,
        *,
        base: Path | None = None,
        sampling: Sampling | None = None,
        share_prefixes: bool = True,
    ) -> None:
        self.family = family
        self.folder = folder
        self.base = base or folder
        self.pixels = PixelLimits()
        self.sampling = sampling or Sampling()
        policy = Policy(family)
        policy.share_prefixes = share_prefixes
        self.policy: nn.Module = policy
        kept = policy.state_dict(keep_vars=True).keys()  # now: under FSDP2 it would free gathered weights
        self._fixed = {name for name, _ in policy.named_buffers() if name in kept}
        self.lora: LoRA | None = None
        self.adapter: Path | None = None
        self.target_device = self.device
        self.save_dtype: torch.dtype | None = None
        self.limits = PassLimits()
        """limits of a pass when the policy itself generates; default: none"""
        self.engine: Engine | None = None
        """the engine that generates completions; None: the policy itself"""
        self._is_closed = self._narrow_reference = False

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        sampling: Sampling | None = None,
        share_prefixes: bool = True,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        pixels: PixelLimits | None = None,
        quantization: Quantization | None = None,
        quantize_vision: bool = False,
        empty: bool = False,
    ) -> VLMAgent:
        """Loads a checkpoint in the published layout, or adapters in peft's format onto their base model.

        Args:
            name_or_path: `"builtin"`, a folder, or a name on the Hugging Face hub.
            sampling: See the class.
            share_prefixes: See `Policy`.
            device: Device of the model.
            dtype: Type of the weights.
            chat_template_kwargs: Values of the chat template's own variables, as `{"enable_thinking": False}`.
                Default: none.
            pixels: Limits of images' pixels. Default: the image processor's.
            quantization: Quantisation of the language model's linear layers, for adapters on them. See
                `vlmenv.agents.quantization`. Default: none.
            quantize_vision: If true, quantises the vision tower and its projectors too.
            empty: If true, the model has shapes alone, for a rank that gets its shards of the weights from the main
                rank (`vlmenv.processes.fsdp`). Quantisation does not go with it.

        Raises:
            ConfigError: The chat template never reads one of `chat_template_kwargs`, the family has no such limits, or
                bitsandbytes is missing for nf4.
            ModelError: The model does not exist or is quantised, its family is unknown, its processor is missing, or
                adapters are not plain LoRA.
        """
        base, adapter, pixels = find_model(name_or_path), find_adapter(name_or_path), pixels or PixelLimits()
        folder = prepared_folder(name_or_path, pixels)
        tell_attention(base)
        ours = _family(folder, dtype, chat_template_kwargs, empty=empty)
        if quantization is not None:
            quantize(ours, quantization, torch.device(device), vision=quantize_vision)
        if not empty:
            cast(Any, ours.model).to(device)
        agent = cls(ours, folder, base=base, sampling=sampling, share_prefixes=share_prefixes)
        agent.pixels, agent.target_device = pixels, torch.device(device)
        if adapter is not None:
            agent.adapter, agent.lora = adapter, LoRA.from_folder(ours.model, adapter)
        return agent

    @classmethod
    def weightless(cls, name_or_path: str | Path) -> VLMAgent:
        """An agent of the model's shapes alone, which computes nothing: for what is estimated before it is loaded.

        Args:
            name_or_path: As in `from_pretrained`.

        Raises:
            ModelError: As in `from_pretrained`.
        """
        folder, adapter = prepared_folder(name_or_path, PixelLimits()), find_adapter(name_or_path)
        agent = cls(weightless_family(folder), folder, base=find_model(name_or_path))
        if adapter is not None:
            agent.adapter, agent.lora = adapter, LoRA.from_folder(agent.family.model, adapter)
        return agent

    @property
    def max_new_tokens(self) -> int:  # type: ignore[override]
        return self.sampling.max_new_tokens

    def act(self, observations: Observations) -> list[str]:
        return self.rollout(observations, greedy=True).texts

    def rollout(self, observations: Observations, *, greedy: bool = False) -> Rollout:
        return self._generate(observations, self._sampling(greedy))

    def proceed(
        self, rollout: Rollout, observations: Turns, *, greedy: bool = False, texts: Sequence[str] | None = None
    ) -> Rollout:
        turns = self._next_turns(rollout, observations)
        completions = [
            self._without_room(one) if observation is not None and row not in turns else one
            for row, (one, observation) in enumerate(zip(rollout.completions, observations, strict=True))
        ]
        if texts is None:
            answers = self._sampled(rollout, observations, turns, greedy)
        else:
            answers = {row: self._given(row, texts[row]) for row in turns}
        for row, answer in answers.items():
            completions[row] = _answered(turns[row], answer)
        return replace(rollout, completions=completions)

    def _sampled(
        self, rollout: Rollout, observations: Turns, turns: Mapping[int, Completion], greedy: bool
    ) -> dict[int, Completion]:
        """An answer to each of the environment's turns, by row."""
        if not turns:
            return {}
        whole = [joined(self.family, rollout.prompts[rollout.prompt_index[row]], turn) for row, turn in turns.items()]
        shown = [one["images"] for row, one in enumerate(observations) if one is not None and row in turns]
        requests = [Request(*one) for one in zip(whole, shown, strict=True)]
        answers = self._answers(requests, np.arange(len(whole)), self._sampling(greedy))
        return dict(zip(turns, answers, strict=True))

    def _answers(self, requests: Sequence[Request], index: NDArray[np.int64], sampling: Sampling) -> list[Completion]:
        """A completion of request `index[i]` for each i, by the engine or by the policy itself."""
        if self._is_closed:  # the policy would answer in the place of the engine
            raise ConfigError("the agent is closed with its engine: load it anew to generate")
        if self.engine is None:
            prompts = [request.prompt for request in requests]
            sampled = sample(self.family_policy, prompts, index, sampling, self._generator, self._limits())
        else:
            draws = sampling.temperature > 0  # greedy completions do not change the random state
            seed = int(torch.randint(2**62, (), generator=self._generator, device=self.device)) if draws else 0
            sampled = self.engine.generate(requests, index, sampling, np.random.default_rng(seed))
        return [self._completion(one) for one in sampled]

    def _completion(self, sampled: Sampled) -> Completion:
        return Completion(self._text(sampled), sampled.token_ids, sampled.logprobs, sampled.finish_reason)

    def _sampling(self, greedy: bool) -> Sampling:
        return replace(self.sampling, temperature=0.0, top_k=None, top_p=1.0) if greedy else self.sampling

    def _next_turns(self, rollout: Rollout, observations: Turns) -> dict[int, Completion]:
        """The completions of the rows that go on, by row, with the environment's next turn. Full rows are left out."""
        turns: dict[int, Completion] = {}
        for row, observation in enumerate(observations):
            if observation is None:
                continue
            prompt, completion = rollout.prompts[rollout.prompt_index[row]], rollout.completions[row]
            try:
                check_observation(observation, self.max_images, self.max_videos)
                turn = with_turn(self.family, prompt, completion, observation)
            except ValueError as error:
                raise PromptError(row, str(error)) from error
            used = len(prompt.input_ids) + len(turn.token_ids)
            if used + self.max_new_tokens <= self._room[0]:
                turns[row] = turn
        return turns

    @staticmethod
    def _without_room(completion: Completion) -> Completion:
        """A completion whose next turn has no room in the model: it ends where it is, with an empty answer."""
        return replace(completion, text="", finish_reason="length")

    def imitate(self, observations: Observations, texts: Sequence[str]) -> Rollout:
        prompts, index = self.encode(observations)
        completions = [self._given(i, text) for i, text in enumerate(texts)]
        return Rollout(
            prompts, index, completions, temperature=1.0
        )  # log-probabilities are the model's, whatever the sampling temperature

    def reprompted(self, rollout: Rollout, observations: Observations) -> Rollout:
        prompts, index = self.encode(observations)
        return replace(rollout, prompts=prompts, prompt_index=index)

    def sync(self) -> None:
        if self.engine is not None:
            with torch.autocast(self.device.type, enabled=False):
                self.engine.sync(self._published_weights(), vision=self._fingerprint_of_vision())

    @property
    def generates_itself(self) -> bool:
        return self.engine is None

    def generating(self, times: int) -> AbstractContextManager[None]:
        return nullcontext() if self.engine is None else self.engine.generating(times)

    def sleep(self) -> None:
        if self.engine is not None:
            self.engine.sleep()

    def wake(self) -> None:
        if self.engine is not None:
            self.engine.wake()

    def forget_images(self) -> None:
        if self.engine is not None:
            self.engine.forget_images()

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()
            self.engine, self._is_closed = None, True

    def _fingerprint_of_vision(self) -> tuple[int, ...] | None:
        parts = [self.family.vision_tower(), *self.family.projectors()]
        trained = self.family.sees_by_trained_weights()
        return None if trained else fingerprint(weight for part in parts for weight in part.parameters())

    def _published_weights(self) -> Mapping[str, Tensor]:
        """The model's weights as `save` writes them, adapters merged one by one as they are asked for.

        Sharded weights must be gathered before.
        """
        weights = dict(self.family_policy.named_parameters(remove_duplicate=False)) | self.fixed_weights()
        model = _under("model.", weights)
        return published_weights(self.family, model if self.lora is None else self.lora.merged(model))

    @property
    def routes(self) -> bool:
        return bool(self.family_policy.routers) and self.family_policy.share_prefixes

    def fixed_weights(self) -> dict[str, Tensor]:
        """What checkpoints hold of the model beside its parameters, as biases of routers, by names in the policy."""
        return {name: one for name, one in self.family_policy.named_buffers() if name in self._fixed}

    def logprobs(self, rollout: Rollout) -> LogProbs:
        return super().logprobs(self._with_image(rollout))

    def _with_image(self, rollout: Rollout) -> Rollout:
        """Adds a blank prompt without completions to a rollout without images, if `runs_every_module`.

        Its gradient is 0, but it runs the vision tower, so that the collectives of all ranks match.
        """
        holders: list[Pictured] = [*rollout.prompts, *rollout.completions]
        if not self.runs_every_module or any(one.images for one in holders):
            return rollout
        return replace(rollout, prompts=[*rollout.prompts, self._blank])

    @functools.cached_property
    def _generator(self) -> torch.Generator:
        """The random generator of sampling, on the device that the weights have when it is first used."""
        return torch.Generator("cpu" if self.device.type == "meta" else self.device)

    @property
    def sharded(self) -> bool:
        return self.family_policy.sharded

    @sharded.setter
    def sharded(self, sharded: bool) -> None:
        self.family_policy.sharded = sharded

    @functools.cached_property
    def _blank(self) -> Prompt:
        return self.family.encode({"images": (np.zeros((64, 64, 3), np.uint8),), "prompt": ""})

    def seed(self, seed: int) -> None:
        require(0 <= seed < 2**64, f"seed must be from 0 to 2**64 - 1, not {seed}")
        self._generator.manual_seed(seed)

    def rng_state(self) -> Tensor:
        return self._generator.get_state()

    def set_rng_state(self, state: Tensor) -> None:
        self._generator.set_state(state.cpu())

    def freeze(self, *, vision: bool, projector: bool) -> None:
        """Freezes parts of the model: they get no gradient, and are not in `parameters()`.

        Args:
            vision: If true, freezes the vision tower without its projectors.
            projector: If true, freezes the projectors into the language model.

        Raises:
            ConfigError: There are adapters, which freeze the model already.
        """
        if self.lora is not None:
            raise ConfigError("LoRA freezes the whole model already: leave out freeze_vision and freeze_projector")
        projectors = _parameters(self.family.projectors())
        tower = _parameters([self.family.vision_tower()]) - projectors
        for parameter in (tower if vision else set()) | (projectors if projector else set()):
            parameter.requires_grad_(False)

    def add_lora(self, *, rank: int, alpha: int, dropout: float = 0.0, vision: bool = False) -> None:
        """Freezes the model and adds adapters to the linear layers of the language model.

        Fused weights of a mixture of experts get no adapters.

        Args:
            rank: Rank of the adapters, at least 1.
            alpha: Scale of the adapters, at least 1: their output is multiplied by alpha / rank.
            dropout: See `LoRA`.
            vision: If true, also adds adapters to the vision tower and its projectors.

        Raises:
            ConfigError: A number is out of range, parts are frozen, there are adapters already, or peft is missing.
        """
        model = self.family.model
        whole = quantized_layers(model).values()
        kept = _parameters([*whole, *self.family.unused()])
        if not all(parameter.requires_grad or parameter in kept for parameter in model.parameters()):
            raise ConfigError(
                "LoRA freezes the whole model: it works neither with frozen parts nor with other adapters"
            )
        parts = [self.family.language_model(), *[self.family.vision_tower(), *self.family.projectors()] * vision]
        inside = {module for part in parts for module in part.modules() if isinstance(module, nn.Linear)}
        targets = [name for name, module in model.named_modules() if module in inside]
        self.lora = LoRA.new(model, targets, rank, alpha, dropout)

    def hold(self, weights: Literal["frozen", "all"]) -> int:
        """Holds weights in bfloat16, for passes under autocast to it. Call it after `add_lora` and `freeze`.

        Args:
            weights: "frozen": frozen weights where this changes nothing, and those of `reference`. "all": all weights
                but adapters and value head, which rounds them.

        Returns:
            The number of frozen parameters that stay float32 because bfloat16 would round them.
        """
        self._narrow_reference = True
        if weights == "frozen":
            return hold_frozen(self.family.model)
        hold_all(self.family.model)
        return 0

    @property
    def sees_by_adapters(self) -> bool:
        """True if the vision tower or its projectors have adapters."""
        parts = [self.family.vision_tower(), *self.family.projectors()]
        return any(is_adapter(f".{name}") for part in parts for name, _ in part.named_parameters())

    def add_value_head(self, *, detach: bool = False) -> None:
        """Adds a value head on the final hidden states, for `LogProbs.state_values`.

        Args:
            detach: If true, the critic's loss trains only the head. Default: it trains the model too, as in PPO's paper
                (1707.06347, equation 9), where policy and critic share parameters.

        Raises:
            ConfigError: The agent has a value head already.
        """
        policy = self.family_policy
        if policy.value_head is not None:
            raise ConfigError("the agent has a value head already")
        size = int(self.family.model.config.get_text_config().hidden_size)
        policy.value_head = ValueHead(size, detach=detach, device=self.device)

    def enable_gradient_checkpointing(self, blocks: int | None = None) -> None:
        """Saves memory: the backward pass recomputes activations. Gradients stay the same.

        Args:
            blocks: Number of blocks of the language model whose activations are recomputed, besides those of the vision
                tower. Each further block takes about the same time and saves the same memory. Default: all.
        """
        recompute_activations(self.family, blocks)

    def blocks(self) -> list[nn.Module]:
        """The blocks of vision tower and language model."""
        layers = self.family.language_model().get_submodule("layers")
        return [*self.family.vision_blocks().children(), *layers.children()]

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The trained parameters as "language", with the value head, and "vision", with projectors; none is empty."""
        vision = _parameters([self.family.vision_tower(), *self.family.projectors()])
        groups: dict[str, list[nn.Parameter]] = {}
        for parameter in self.parameters():
            groups.setdefault("vision" if parameter in vision else "language", []).append(parameter)
        return groups

    def reference(self) -> Reference:
        """A frozen copy of the policy; with LoRA, the model with the adapters as they are now, which needs no copy.

        Raises:
            ConfigError: The agent was loaded with adapters, and ranks hold shards of the weights.
        """
        if self.lora is None:
            return FrozenPolicy(
                self.family_policy, self._with_image, narrow=self._narrow_reference, empty=self.empty_reference
            )
        if self.lora.begins_elsewhere:
            if self.sharded:
                raise ConfigError(
                    "a reference that has adapters does not work with shards of the weights: merge the adapters by "
                    "`vlmenv export --merged`, or leave the KL penalty out"
                )
            self.lora.keep_start()
        return UnadaptedPolicy(self, self.lora)

    def save(self, folder: Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Writes weights and processor in the published layout, atomically; with LoRA the adapters, in peft's format.

        Weights are written in `save_dtype`. What that rounds away is beside them, in the subfolder `float32/`, and a
        value head in `value_head/`, for `load`. (They are subfolders because programs that serve a model read every
        safetensors file of its folder.)

        Args:
            folder: Folder to write.
            state_dict: The policy's gathered state. Default: the policy's own state.

        Raises:
            OSError: The folder cannot be written.
        """
        state = self.family_policy.state_dict() if state_dict is None else state_dict
        model, head = _under("model.", state), _under("value_head.", state)
        with atomic_folder(folder) as partial:
            write_settings(partial, self.folder, self.family, self.sampling, self.save_dtype)
            if self.lora is None:
                write_weights(partial, published_weights(self.family, model), self._stored, self.save_dtype, exact=True)
            else:
                self.lora.save(partial, model, str(self.base))
            if head:
                (partial / "value_head").mkdir()
                save_file(head, partial / _VALUE_HEAD)

    def publish(self, folder: Path, *, dtype: torch.dtype | None = None, merged: bool = True) -> None:
        """Writes what others load, atomically: `save` without what only training needs.

        Args:
            folder: Folder to write.
            dtype: Data type of the weights. Default: that of the base model's files; for adapters float32.
            merged: If true, merges adapters into the model's weights. If false, writes them alone.

        Raises:
            ConfigError: There are no adapters to write alone.
            OSError: The folder cannot be written.
        """
        if not merged and self.lora is None:
            raise ConfigError("there are no adapters to write alone: all weights were trained")
        with atomic_folder(folder) as partial:
            write_settings(partial, self.folder, self.family, self.sampling, dtype if merged else None)
            if merged or self.lora is None:
                write_weights(partial, self._published_weights(), self._stored, dtype, exact=False)
            else:
                model = self.family.model.state_dict()
                self.lora.save(partial, model, public_name(self.base), dtype or torch.float32)

    @property
    def _stored(self) -> Path | None:
        """The folder with the weights that the model was loaded from; None for a model that was made in memory."""
        return self.folder if is_of(self.family, self.folder) else None

    def check_saving(self) -> None:
        """Tries the conversion of the weights to the published layout, without the numbers.

        Raises:
            CheckpointError: The model could not be saved in the layout that it came in.
        """
        state, quantized = self.family.model.state_dict(), quantized_layers(self.family.model)
        for name, layer in quantized.items():
            state[name] = layer.outline
            del state[f"{name.removesuffix('weight')}scales"]
        plain = {plain_name(name): state[name] for name in state if not is_adapter(name)}
        check_conversion(self.folder, self.family, plain)

    def load(self, folder: Path) -> None:
        """Restores a checkpoint's weights bit for bit. With LoRA it restores the adapters, onto the unmerged model.

        With sharded weights the main rank alone reads them, and sends each to the others.

        Args:
            folder: Checkpoint of an agent with the same base model, adapters and value head.

        Raises:
            ModelError: The checkpoint does not fit this agent. The weights stay unchanged.
        """
        if (folder / _FORMER_ADAPTER / ADAPTER_CONFIG).is_file() and not (folder / ADAPTER_CONFIG).is_file():
            raise ModelError(
                f"{folder} is of an earlier version, which wrote the merged model and put the adapters into "
                f"{_FORMER_ADAPTER}: it cannot be resumed. Start a new run with --model {folder / _FORMER_ADAPTER} "
                f"(trains these adapters further), or with --model {folder} (the merged model)"
            )
        policy = self.family_policy
        parts = (("adapter", ADAPTER_CONFIG, self.lora), ("value head", "value_head", policy.value_head))
        for name, place, part in parts:
            if (folder / place).exists() != (part is not None):
                has, lacks = ("agent", "checkpoint") if part is not None else ("checkpoint", "agent")
                raise ModelError(f"{folder}: the {has} has {name} weights, which the {lacks} lacks")
        state = policy.state_dict()
        if self.lora is not None:
            state = {name: state[name] for name in state if is_adapter(name) or name.startswith("value_head.")}
        put_back(folder, lambda: self._read(folder), state)

    def _read(self, folder: Path) -> dict[str, Tensor]:
        """The weights that `load` restores, by their names in the policy's state."""
        weights = self.lora.read(folder) if self.lora else load_model(folder, torch.float32).state_dict()
        weights = {f"model.{name}": tensor for name, tensor in weights.items()}
        if self.family_policy.value_head is not None:
            head, _ = read_tensors(folder / _VALUE_HEAD)
            weights |= {f"value_head.{name}": tensor for name, tensor in head.items()}
        return weights

    @functools.cached_property
    def max_length(self) -> int:
        """Length limit of prompt and completion together, in tokens."""
        return int(self.family.model.config.get_text_config().max_position_embeddings)

    @property
    def _room(self) -> tuple[int, str]:
        """The most tokens of prompt and completion together, and what has this limit."""
        if self.engine is None or self.engine.max_length >= self.max_length:
            return self.max_length, "model"
        return self.engine.max_length, "engine"

    @property
    def max_images(self) -> int | None:
        return None if self.engine is None else self.engine.max_images

    @property
    def max_videos(self) -> int | None:
        return None if self.engine is None else self.engine.max_videos

    def encode(self, observations: Observations) -> tuple[list[Prompt], np.ndarray]:
        """Encodes observations. Neighbouring copies of an observation share one prompt.

        Returns:
            P prompts; and int64 [N], the prompt of each observation.

        Raises:
            PromptError: A prompt leaves no room for the completion, or cannot be encoded.
        """
        listed = unbatch(observations)
        firsts, index = group_neighbours(listed)
        prompts = []
        for i in firsts:
            try:
                check_observation(listed[i], self.max_images, self.max_videos)
                prompts.append(self.family.encode(listed[i]))
                check_length(len(prompts[-1].input_ids), self.max_new_tokens, *self._room)
            except ValueError as error:
                raise PromptError(i, str(error)) from error
        return prompts, index

    def _generate(self, observations: Observations, sampling: Sampling) -> Rollout:
        observations = unbatch(observations)
        prompts, index = self.encode(observations)
        shown = [observations[i] for i in np.unique(index, return_index=True)[1]]
        requests = [
            Request(prompt, one["images"], one.get("videos", ())) for prompt, one in zip(prompts, shown, strict=True)
        ]
        completions = self._answers(requests, index, sampling)
        full, from_trainer = not sampling.cuts_tail, self.engine is None
        return Rollout(prompts, index, completions, sampling.temperature, full, from_trainer)

    def _limits(self) -> PassLimits:
        """The limits of sampling; on a GPU without a limit of the caches, that of its free memory."""
        if self.limits.cache is not None or self.device.type != "cuda":
            return self.limits
        free = torch.cuda.mem_get_info(self.device)[0]
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        autocast = torch.is_autocast_enabled("cuda")
        dtype = torch.get_autocast_dtype("cuda") if autocast else self.family.model.dtype
        room = int(_CACHED * free / token_bytes(self.family.model.config, dtype))
        return replace(self.limits, cache=max(1, room))

    def _text(self, sampled: Sampled) -> str:
        """A completion's text, up to the end of its first stop text."""
        text, start = self.family.decode(sampled.token_ids), len(self.family.opening)
        ends = [place + len(stop) for stop in self.sampling.stop if (place := text.find(stop, start)) >= 0]
        return text[: min(ends, default=len(text))]

    @property
    def family_policy(self) -> Policy:
        """The policy without the wrappers of distributed training."""
        module = self.policy
        while not isinstance(module, Policy):
            inner = module.module
            assert isinstance(inner, nn.Module)
            module = inner
        return module

    def _given(self, i: int, text: str) -> Completion:
        """An answer as tokens, with the family's end token."""
        ids = answer_ids(self.family, text)
        if fault := answer_fault(self.family, ids, self.max_new_tokens):
            raise PromptError(i, fault)
        return Completion(text, ids, np.zeros(len(ids), np.float32), "stop")


def with_turn(family: Family, prompt: Prompt, completion: Completion, observation: Observation) -> Completion:
    """A completion with the environment's next turn behind it, up to where the next answer begins.

    Its own tokens stay as they were sampled. If it has no end token, the environment's tokens begin with one.

    Args:
        family: The model's family.
        prompt: The prompt of the episode.
        completion: The episode so far.
        observation: The conversation so far; its prompt is the next turn.

    Raises:
        ValueError: The turn cannot be encoded.
    """
    turn = family.encode_turn(observation)
    if turn.input_ids[0] == completion.token_ids[-1] and turn.input_ids[0] in family.end_tokens:
        turn = _without_first(turn)
    ids, own = turn.input_ids, later_positions(prompt, completion)
    written = np.ones(len(own[0]), np.bool_) if completion.written is None else completion.written
    return replace(
        completion,
        token_ids=np.concatenate([completion.token_ids, ids]),
        logprobs=np.concatenate([completion.logprobs, np.zeros(len(ids), np.float32)]),
        written=np.concatenate([written, np.zeros(len(ids), np.bool_)]),
        position_ids=np.concatenate([own, own[:, -1:] + 1 + turn.position_ids], axis=1),
        images=family.join_images([completion, turn]),
        marked_ids=marked_ids([completion, turn]),
    )


def _without_first(turn: Prompt) -> Prompt:
    """A turn without its first token, which is text."""
    marked = None if turn.marked_ids is None else turn.marked_ids[1:]
    return Prompt(turn.input_ids[1:], turn.position_ids[:, 1:] - 1, turn.images, marked)


def _answered(turn: Completion, answer: Completion) -> Completion:
    """A completion that ends with the environment's turn, with the answer to it behind."""
    count = len(answer.token_ids)
    assert turn.position_ids is not None
    assert turn.written is not None
    after = turn.position_ids[:, -1:] + 1 + np.arange(count)
    return replace(
        turn,
        text=answer.text,
        token_ids=np.concatenate([turn.token_ids, answer.token_ids]),
        logprobs=np.concatenate([turn.logprobs, answer.logprobs]),
        finish_reason=answer.finish_reason,
        written=np.concatenate([turn.written, np.ones(count, np.bool_)]),
        position_ids=np.concatenate([turn.position_ids, after], axis=1),
        marked_ids=marked_ids([turn, answer]),
    )


def answer_ids(family: Family, text: str) -> NDArray[np.int64]:
    """The tokens [length] of an answer as the policy would have written it, with the token that ends it."""
    tokenizer = family.processor.tokenizer
    written = tokenizer.encode(text.removeprefix(family.opening), add_special_tokens=False)
    end = tokenizer.eos_token_id if tokenizer.eos_token_id in family.end_tokens else family.end_tokens[0]
    return np.array([*written, end], dtype=np.int64)


def answer_fault(family: Family, ids: NDArray[np.int64], max_new_tokens: int) -> str | None:
    """Why a true answer cannot be imitated; None if it can."""
    if len(ids) > max_new_tokens:
        return f"its true answer has {len(ids)} tokens; max_new_tokens is {max_new_tokens}"
    if np.isin(ids, family.banned_tokens).any():
        return "its true answer holds control tokens, which are never sampled"
    return None


def check_observation(observation: Observation, max_images: int | None, max_videos: int | None) -> None:
    """Raises ValueError where a prompt is no text, or images are no RGB images.

    Also where there are more images or videos than an engine takes; None: it has no limit.
    """
    prompt, images, videos = observation["prompt"], observation["images"], observation.get("videos", ())
    if not isinstance(prompt, str):
        raise ValueError(f"prompt is a text, not a {type(prompt).__name__}")
    if faults := [fault for image in images if (fault := image_fault(image))]:
        raise ValueError(f"images is a tuple of images; {faults[0]}")
    for kind, count, most in (("images", len(images), max_images), ("videos", len(videos), max_videos)):
        if most is not None and count > most:
            raise ValueError(f"it has {count} {kind}, and the engine takes {most}: raise --engine-{kind}")


def check_length(prompt: int, max_new_tokens: int, most: int, holder: str = "model") -> None:
    """Raises ValueError where a prompt of some tokens leaves no room for an answer."""
    if prompt + max_new_tokens > most:
        raise ValueError(
            f"the prompt has {prompt} tokens, which leaves no room for max_new_tokens={max_new_tokens} "
            f"in the {holder}'s {most}; use smaller images or a shorter prompt"
        )


def _family(folder: Path, dtype: torch.dtype, template: Mapping[str, Any] | None, *, empty: bool) -> Family:
    """The model of a folder with its processor, on the CPU; of shapes alone if it is to be empty."""
    if empty:
        ours = weightless_family(folder, template)
        cast(Any, ours.model).eval().to(dtype)
        return ours
    config = read_config(folder)
    family, processor = family_of(config.model_type, config), Processor.from_pretrained(folder, template)
    return family(load_model(folder, dtype).eval(), processor)


def _parameters(modules: Iterable[nn.Module]) -> set[nn.Parameter]:
    return {parameter for module in modules for parameter in module.parameters()}


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
