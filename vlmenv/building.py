"""Environments and agents from options: what training and evaluation have in common."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from accelerate import Accelerator
from rich.console import Console

from vlmenv.agents.checkpoints import find_adapter, find_model, stored_weights
from vlmenv.agents.engines.addresses import check_address, tls_context
from vlmenv.agents.engines.base import Engine
from vlmenv.agents.engines.remote import RetryPolicy
from vlmenv.agents.engines.server import VLLMServerEngine
from vlmenv.agents.engines.teacher import ServerTeacher
from vlmenv.agents.engines.vllm import VLLMEngine, check_sharing, require_vllm
from vlmenv.agents.families import coordinate_space, family_of, image_bound, resize_rule
from vlmenv.agents.families.base import read_json
from vlmenv.agents.pixels import prepared_folder
from vlmenv.agents.quantization import Quantization
from vlmenv.agents.remainders import REMAINDERS
from vlmenv.agents.sampling import PassLimits
from vlmenv.agents.untrainable import read_config
from vlmenv.agents.vlm import VLMAgent
from vlmenv.core.console import open_console, say
from vlmenv.core.coordinates import CoordinateSpace
from vlmenv.core.errors import ConfigError, unknown_name
from vlmenv.core.loading import load_name
from vlmenv.core.names import BUILTIN, BUILTIN_TASKS, SHIPPED
from vlmenv.envs.base import VisualTaskEnv
from vlmenv.envs.vector import VisualTaskVectorEnv
from vlmenv.options.task import Device, TaskConfig
from vlmenv.options.train import AdaptationOptions, TrainConfig
from vlmenv.processes import Processes, meet

DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Data types by the names that options have for them."""


def task_arguments(config: TaskConfig) -> dict[str, Any]:
    """Arguments of the environment, its samples apart: prompts, rewards and the model's coordinates.

    Raises:
        ModelError: There is no such model, or its convention of coordinates is unknown.
    """
    folder, prompts = prepared_folder(config.model, config.pixels), config.prompts
    space = coordinate_space(folder) if prompts.coordinates == "auto" else CoordinateSpace(prompts.coordinates)
    return prompts.task_arguments() | {
        "extra_terms": config.scorers.terms(),
        "count_tokens": TokenCount(folder),
        "coordinates": space.value,
        "resize": resize_rule(folder) if space is CoordinateSpace.RESIZED else None,
        "image_bound": image_bound(folder),
    }


@dataclass
class TokenCount:
    """Counts the tokens of a text as a model does. Its tokenizer is loaded at the first call."""

    folder: Path

    def __call__(self, text: str) -> int:
        readable = text[:_COUNTED].encode("utf-8", "replace").decode()  # a lone surrogate is no text to a tokenizer
        return len(self._tokenizer.encode(readable, add_special_tokens=False))

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return transformers.AutoTokenizer.from_pretrained(self.folder)


_COUNTED = 100_000  # characters; a longer answer counts as this long


def report_broken_rows(envs: VisualTaskVectorEnv, console: Console) -> None:
    """Prints how many rows of a data set are left out, and what is not read of the others."""
    source = envs.task.source
    for warning in source.usage.warnings() if source.usage is not None else ():
        say(warning, console)
    total = len(source.faults) + sum(source.unwanted.values()) + (source.size or 0)
    for reason, count in source.unwanted.items():
        say(f"{count} of {total} rows are left out: {reason}", console)
    if source.faults:
        say(f"{len(source.faults)} of {total} rows are broken and left out, the first at {source.faults[0]}", console)


def report_untaught(config: TaskConfig, console: Console) -> None:
    """Tells of a task that the built-in model has not been taught, and its sibling has."""
    own, more = (read_json(find_model(name) / "vlmenv.json")["taught"] for name in SHIPPED)
    if config.model == BUILTIN and config.env in set(more) - set(own):
        say(f"the built-in model has not been taught {config.env}; --model {BUILTIN_TASKS} has", console)


def report_skipped(skipped: Mapping[Any, str], total: int | None, console: Console) -> None:
    """Prints how many samples were left out because they could not be shown, and the first few of them."""
    if not skipped:
        return
    told = list(skipped.values())
    say(f"{len(told)} of {total} samples could not be shown and were left out:", console)
    for reason in told[:_TOLD]:
        say(f"  {reason}", console)
    if len(told) > _TOLD:
        say(f"  … and {len(told) - _TOLD} more; `vlmenv data check --decode --model …` tells of all", console)


_TOLD = 5


def check_device(device: Device) -> None:
    """Raises ConfigError if CUDA is asked for and absent."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was asked for, but torch finds no CUDA GPU here; leave out --device")


def prepared(config: TaskConfig, notes: Sequence[str] = ()) -> tuple[Processes, Console]:
    """The ranks that answer, and the console of the main one, before anything slow is done.

    Args:
        config: The options.
        notes: Lines to print about them.

    Raises:
        ConfigError: The device or the engine is not available.
    """
    check_device(config.device)
    meet(cpu=config.device == "cpu")
    accelerator = Accelerator(cpu=config.device == "cpu")
    check_engine(config, accelerator.device, accelerator.num_processes)
    console = open_console(quiet=not accelerator.is_main_process)
    for note in notes:
        say(note, console)
    return Processes(accelerator), console


MakeEngine = Callable[[TaskConfig, VLMAgent, torch.dtype], Engine]
"""Makes an engine from the options, the agent whose model it copies, and the data type of its weights."""


def _vllm(config: TaskConfig, agent: VLMAgent, dtype: torch.dtype) -> Engine:
    options = config.generation
    return VLLMEngine(
        agent.folder,
        agent.family,
        device=agent.target_device,
        dtype=dtype,
        max_length=min(agent.max_length, options.engine_length),
        max_images=options.engine_images,
        max_videos=options.engine_videos,
        memory_share=options.engine_memory,
        tensor_parallel=options.tensor_parallel,
        seed=config.seed,
    )


def _vllm_server(config: TaskConfig, agent: VLMAgent, dtype: torch.dtype) -> Engine:
    options = config.generation
    return VLLMServerEngine(
        options.server,
        agent.folder,
        agent.family,
        transfer=options.weight_transfer,
        weights_folder=options.weights_folder,
        retry_policy=RetryPolicy(answer=options.server_timeout),
        ca=options.server_ca,
    )


ENGINES: Final[dict[str, MakeEngine | None]] = {"hf": None, "vllm": _vllm, "vllm-server": _vllm_server}
"""By the name that `--engine` takes. None: the model itself generates."""
_TAKE_SHAPES: Final = frozenset(ENGINES)
"""Engines that can be made from an agent of shapes alone: they read the model's files, or get all weights later."""


def register_engine(name: str, make: MakeEngine) -> None:
    """Makes an engine known to `--engine`.

    Args:
        name: Its name.
        make: Makes it; called once, when the model is loaded.

    Raises:
        ConfigError: The name is taken.
    """
    if name in ENGINES:
        raise ConfigError(f"an engine '{name}' is registered already: choose another name")
    ENGINES[name] = make


def find_engine(name: str) -> MakeEngine | None:
    """What makes the engine of a name; `module:name` imports the module and takes its function or class.

    Raises:
        ConfigError: There is none.
    """
    if name not in ENGINES and ":" in name:
        register_engine(name, load_name(name, "option engine"))
    if name not in ENGINES:
        raise ConfigError(unknown_name("engine", name, ENGINES))
    return ENGINES[name]


def check_engine(config: TaskConfig, device: torch.device, processes: int = 1) -> None:
    """Raises ConfigError if the engine is not available with these options; called before anything slow."""
    options = config.generation
    find_engine(options.engine)
    for address in options.server:
        check_address(address)
    if options.server_ca is not None:
        tls_context(options.server_ca)
    if options.engine != "vllm":
        return
    require_vllm()
    check_sharing(options.tensor_parallel, processes)
    if options.engine_memory != type(options).engine_memory and device.type == "cpu":
        raise ConfigError("engine_memory is a share of a GPU's memory, but the model runs on the CPU")


def check_videos(config: TaskConfig, task: VisualTaskEnv) -> None:
    """Checks that the model and the engine of the options take a task's videos.

    Raises:
        ConfigError: The engine is vLLM, which would read the family's videos otherwise.
        ModelError: The model's family takes none, or there is no such model.
    """
    if not task.takes_videos:
        return
    folder = prepared_folder(config.model, config.pixels)
    family = family_of(read_config(folder).model_type)
    family.require_videos()
    if config.generation.engine in ("vllm", "vllm-server"):
        family.require_videos_in_vllm()


def load_agent(
    config: TaskConfig,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    engine_dtype: torch.dtype | None = None,
    *,
    quantization: Quantization | None = None,
    quantize_vision: bool = False,
    empty: bool = False,
    syncs: bool = True,
) -> VLMAgent:
    """Loads a configuration's model as an agent, without the loader's own progress bars.

    Args:
        config: Model, sampling and engine. `check_engine` is called first.
        device: Device of the model.
        dtype: Data type of its weights.
        engine_dtype: Data type of the copy in an engine. Default: `dtype`.
        quantization: Quantisation of the model. Default: none.
        quantize_vision: If true, quantises the vision tower too.
        empty: See `VLMAgent.from_pretrained`.
        syncs: If true, an engine that does not read the model's weights itself gets them. If false, the caller calls
            `VLMAgent.sync` before it generates.

    Raises:
        ConfigError: The chat template never reads one of `chat_template_kwargs`.
        ModelError: The model cannot be loaded, or its chat template has no place for the `system_prompt`.
    """
    transformers.utils.logging.disable_progress_bar()
    agent = VLMAgent.from_pretrained(
        config.model,
        device=device,
        dtype=dtype,
        sampling=config.sampling,
        chat_template_kwargs=config.prompts.template_switches(),
        pixels=config.pixels,
        quantization=quantization,
        quantize_vision=quantize_vision,
        empty=empty,
    )
    agent.limits = PassLimits(cache=config.generation.cache_tokens)
    if config.prompts.system_prompt is not None:
        agent.family.require_system_turns()
    if (make := find_engine(config.generation.engine)) is not None:
        agent.engine = make(config, agent, engine_dtype or dtype)
    unlike = agent.adapter is not None or (agent.folder / REMAINDERS).is_dir()
    if syncs and (config.generation.engine == "vllm-server" or unlike):
        agent.sync()  # servers may hold weights of another run, and engines read neither adapters nor remainders
    return agent


def meet_teacher(url: str, config: TrainConfig[Any], student: VLMAgent) -> ServerTeacher:
    """Meets a teacher on a server; see `load_teacher`.

    Raises:
        ConfigError: Its tokenizer is not the student's, or sampling has another temperature than 1.
        EngineError: It does not answer.
    """
    temperature = student.sampling.temperature  # an agent that is given samples in its own way
    if temperature != 1:
        raise ConfigError(
            f"the teacher {url} tells log-probabilities of temperature 1, and temperature is "
            f"{temperature}: set it to 1, or name a model as the teacher"
        )
    options = config.generation
    retry_policy = RetryPolicy(answer=options.server_timeout)
    return ServerTeacher(url, student.family, student.encode, retry_policy=retry_policy, ca=options.server_ca)


def load_teacher(name: str, config: TrainConfig[Any], student: VLMAgent, device: torch.device) -> VLMAgent:
    """Loads the teacher of on-policy distillation, frozen.

    Args:
        name: Name of its model.
        config: The options of the training.
        student: The agent that learns.
        device: Device of the teacher.

    Raises:
        ConfigError: Its tokenizer is not the student's.
        ModelError: The model cannot be loaded.
    """
    teacher = VLMAgent.from_pretrained(
        name,
        device=device,
        dtype=DTYPES[config.batches.precision],
        sampling=student.sampling,
        chat_template_kwargs=config.prompts.template_switches(),
        pixels=config.pixels,
    )
    own, others = (one.family.processor.tokenizer.get_vocab() for one in (student, teacher))
    if own != others:
        unlike = len(own.items() ^ others.items())
        raise ConfigError(
            f"the teacher {name} has another tokenizer than the model: {unlike} of their {len(own)} and {len(others)} "
            "tokens differ. Take a teacher of the same family"
        )
    teacher.policy.requires_grad_(False)
    return teacher


def load_for_training(
    config: TrainConfig[Any], device: torch.device, *, gets_shards: bool = False, syncs: bool = True
) -> VLMAgent:
    """Loads a model as `load_agent` does, in the data type in which most of its weights are held in training.

    Call `adapt` next, which holds the others in theirs.

    Args:
        config: The options.
        device: Device of the model.
        gets_shards: If true, the main rank can give this one its shards of the weights. Then it loads shapes alone,
            unless quantisation or a registered engine needs the weights.
        syncs: See `load_agent`. It goes with `gets_shards`, because ranks without weights have none to send.

    Raises:
        ConfigError: As `load_agent`; or `quantize` is given without adapters.
        ModelError: As `load_agent`.
    """
    options, precision, adapted = config.adaptation, config.batches.precision, is_adapted(config)
    if options.quantize is not None and not adapted:
        raise ConfigError("quantize is for the base of adapters: give lora_rank, or a folder of adapters as model")
    empty = gets_shards and options.quantize is None and config.generation.engine in _TAKE_SHAPES
    if options.weights == "auto" and not _is_stored_in_bf16(config):
        options = replace(options, weights="fp32")
    return load_agent(
        config,
        device,
        loading_dtype(options, precision, adapted=adapted),
        DTYPES[precision],
        quantization=options.quantize,
        quantize_vision=options.lora_vision,
        empty=empty,
        syncs=syncs,
    )


def is_adapted(config: TrainConfig[Any]) -> bool:
    """True if adapters are trained, new ones or those that the model consists of."""
    return config.adaptation.lora_rank is not None or find_adapter(config.model) is not None


def loading_dtype(options: AdaptationOptions, precision: str, *, adapted: bool) -> torch.dtype:
    """The data type in which most weights are loaded for training.

    Args:
        options: With `weights` "auto" the model's files hold bfloat16 alone.
        precision: Precision of passes.
        adapted: See `is_adapted`.
    """
    frozen = adapted and options.weights == "auto" and precision == "bf16"
    return torch.bfloat16 if frozen or options.weights == "bf16" else torch.float32


def advice_on_cuda(config: TrainConfig[Any], device: torch.device) -> list[str]:
    """What would make training on a GPU much faster and is not asked for, a line each."""
    if device.type != "cuda":
        return []
    told = []
    if config.batches.precision == "fp32" and torch.cuda.is_bf16_supported(including_emulation=False):
        told.append(
            "warning: precision is fp32, and this GPU has bfloat16: --precision bf16 takes half of the memory of "
            "activations and of frozen weights, and is several times as fast. Published recipes use it"
        )
    if config.generation.engine == "hf" and not config.imitates:
        install = "" if importlib.util.find_spec("vllm") else 'pip install "vlmenv[vllm]", then '
        how = f"{install}add --engine vllm"
        told.append(f"the model itself generates, several times slower than vLLM: {how} (docs/vllm.md)")
    return told


def advice_on_sampling(config: TrainConfig[Any], agent: VLMAgent | None = None) -> list[str]:
    """What is biased where unlikely tokens are left out of sampling.

    Args:
        config: The options.
        agent: An agent that is given, which samples in its own way.
    """
    sampling = config.sampling if agent is None else agent.sampling
    if not sampling.cuts_tail or config.imitates:
        return []
    teaches = ", and so is the divergence from the teacher" if hasattr(config.algorithm, "teacher") else ""
    return [
        "warning: top_k and top_p leave out tokens that the losses count with: the gradient is a biased "
        f"estimate{teaches}. Leave both out to sample from the policy itself"
    ]


def limits_of(config: TrainConfig[Any]) -> PassLimits:
    """The limits of sampling by the model itself in training."""
    trainer = config.trainer
    return PassLimits(trainer.micro_batch_size, trainer.micro_batch_tokens, config.generation.cache_tokens)


def _is_stored_in_bf16(config: TrainConfig[Any]) -> bool:
    """True if a model's files hold all of its weights in bfloat16, and nothing that this rounds away."""
    folder = prepared_folder(config.model, config.pixels)
    kinds = {kind for kind, _ in stored_weights(folder).values()}
    return kinds == {torch.bfloat16} and not (folder / REMAINDERS).is_dir()


def adapt(agent: VLMAgent, options: AdaptationOptions, precision: str = "fp32") -> list[str]:
    """Prepares an agent for training: adapters, frozen parts, checkpointing, data types.

    Args:
        agent: The agent.
        options: What to prepare.
        precision: Precision of passes.

    Returns:
        What is not as the reader may expect, a line each.

    Raises:
        ConfigError: The model is one of adapters, and the options ask for others.
    """
    agent.family_policy.share_prefixes = options.share_prefixes
    if options.save_dtype is not None:
        agent.save_dtype = DTYPES[options.save_dtype]
    if agent.lora is not None:
        _check_adapters(agent, options)
    elif (rank := options.lora_rank) is not None:
        alpha = 2 * rank if options.lora_alpha is None else options.lora_alpha
        agent.add_lora(rank=rank, alpha=alpha, dropout=options.lora_dropout, vision=options.lora_vision)
    if options.freeze_vision or options.freeze_projector:
        agent.freeze(vision=options.freeze_vision, projector=options.freeze_projector)
    if options.gradient_checkpointing:
        agent.enable_gradient_checkpointing(options.checkpointed_blocks)
    if precision != "bf16" or options.weights == "fp32":
        return []
    rounded = agent.hold("frozen" if options.weights == "auto" else "all")
    if not rounded:
        return []
    return [
        f"{rounded:,} frozen weights stay fp32, because bf16 would round them. To halve their memory, train the model "
        "that `vlmenv export --dtype bfloat16` writes"
    ]


def _check_adapters(agent: VLMAgent, options: AdaptationOptions) -> None:
    """Raises ConfigError if options ask for other adapters than those that the agent was loaded with."""
    if (rank := options.lora_rank) is None:
        return
    assert agent.lora is not None
    asked = (rank, options.lora_alpha or 2 * rank, options.lora_dropout, options.lora_vision)
    own = (*agent.lora.numbers, agent.sees_by_adapters)
    names = ("lora_rank", "lora_alpha", "lora_dropout", "lora_vision")
    unlike = [
        f"{name} {theirs}, not {ours}" for name, ours, theirs in zip(names, asked, own, strict=True) if ours != theirs
    ]
    if unlike:
        raise ConfigError(
            f"{agent.adapter} holds adapters, which are trained further as they are: with {', '.join(unlike)}. Leave "
            "lora_rank and what goes with it out, or merge the adapters first by `vlmenv export --merged`"
        )
