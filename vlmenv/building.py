"""Builds environments and agents from options: what training and evaluation have in common."""

from __future__ import annotations

import functools
import importlib
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import gymnasium
import torch
import transformers
import tyro
import yaml
from accelerate import Accelerator
from rich.console import Console

from vlmenv.agents.engines.remote import Patience, check_address
from vlmenv.agents.engines.server import VLLMServerEngine
from vlmenv.agents.engines.vllm import VLLMEngine, check_sharing, require_vllm
from vlmenv.agents.families import coordinate_space, resize_rule
from vlmenv.agents.vlm import BUILTIN, Sampling, VLMAgent, find_model
from vlmenv.core.coordinates import CoordinateSpace
from vlmenv.core.errors import ConfigError, unknown_name
from vlmenv.core.files import write_atomic
from vlmenv.envs.registration import VectorEntryPoint
from vlmenv.envs.vector import VisualTaskVectorEnv
from vlmenv.options.files import to_yaml
from vlmenv.options.scorers import ScorerConfig
from vlmenv.processes import Processes

Device = Literal["auto", "cpu", "cuda"]
EngineName = Literal["hf", "vllm", "vllm-server"]
ENGINE_OPTIONS: Final = (
    *("engine", "engine_length", "engine_memory", "tensor_parallel"),
    *("server", "server_timeout", "weight_transfer", "weights_folder"),
)
"""Options that choose what generates."""
DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By the names that `precision` has."""
_ENGINE_LENGTH, _ENGINE_MEMORY = 16384, 0.4
_FREE: Final = ("recipe", "config", "output", "data", "batch_size", "device", *ENGINE_OPTIONS)
"""Options that may change when work goes on whose results lie in a folder."""


@dataclass(frozen=True)
class TaskConfig:
    """Which environment, and how it shows its samples."""

    env: str = "VLM-REC-v0"
    """Environment; `vlmenv envs` lists them. One of your own is given with its module, as in my_task:My-Task-v0."""
    model: str = BUILTIN
    """"builtin", a folder, or a name on the Hugging Face hub."""
    dataset: tuple[str, ...] | None = None
    """Files (.jsonl, .json, .parquet), folders saved by `datasets`, or ids on the Hugging Face hub; the built-in
    samples where left out."""
    image_root: tuple[Path, ...] | None = None
    """Folder that image paths are relative to, or one for each file; the file's own where left out."""
    split: str | None = None
    """Of the built-in samples, or of a Hugging Face data set."""
    columns: dict[str, str] | None = None
    """Columns that hold the parts of a row, as in `--columns question query answer label`."""
    skip_broken: bool = False
    """Leave broken rows out instead of refusing the data set."""
    min_image_side: int | None = None
    """Leave rows out with an image of fewer pixels than this in width or height."""
    without_text: tuple[str, ...] = ()
    """Leave rows out whose answer, reasoning included, contains one of these texts."""
    rewards: dict[str, float] | None = None
    """Reward terms and weights, as in `--rewards iou 1 format 0.5`; the task's own where left out."""
    prompt_template: str | None = None
    """Prompt with {question}, and {answer}, {none} and {coordinates} where they matter."""
    answer_format: Literal["tags", "sections"] | None = None
    """How the answer is set apart: think/answer tags, or PeBR-R1's sections; the task's own where left out."""
    coordinates: Literal["auto", "original", "resized", "norm1000"] = "auto"
    """How boxes are written: in pixels of the stored image or of the resized one that the model sees, or in
    thousandths; "auto" is the way the model was taught."""
    device: Device = "auto"
    """Where the model runs; "auto" takes a GPU if there is one."""
    seed: int = 0
    """Fixes the order of samples and the sampling of answers."""
    temperature: float = 1.0
    """Of sampled answers."""
    top_k: int | None = None
    """Sample among so many of the likeliest tokens; among all where left out."""
    top_p: float = 1.0
    """Sample among the fewest likeliest tokens that have this share of the probability."""
    stop: tuple[str, ...] = ()
    """Texts after which an answer ends; they are part of it."""
    max_new_tokens: int = 160
    """Longest answer, in tokens."""
    engine: EngineName = "hf"
    """What generates answers: the model itself, by transformers, or vLLM with copies of it, one in the same process or
    others on servers."""
    server: tuple[str, ...] = ()
    """Addresses of servers that `vlmenv serve` started, as http://127.0.0.1:8000; prompts are spread over them."""
    server_timeout: float | None = None
    """Seconds after which a server that has not answered is left out; 300 where left out."""
    weight_transfer: Literal["file", "direct"] = "file"
    """How servers come by the weights of each update: "file", which each of them reads, or "direct", from process to
    process, by NCCL between GPUs and by gloo otherwise."""
    weights_folder: Path | None = None
    """Folder in which servers on other machines find the weights of each update; one in memory where left out."""
    engine_length: int | None = None
    """Tokens of prompt and answer together that vLLM makes room for; 16384 where left out, or what the model takes."""
    engine_memory: float | None = None
    """Share of the GPU's memory that vLLM may take, its weights included; 0.4 where left out."""
    tensor_parallel: int = 1
    """Processes that share an engine of vLLM, each with a part of its weights, for models too large for one GPU."""
    scorers: Annotated[ScorerConfig, tyro.conf.arg(name="")] = field(default_factory=ScorerConfig)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"seed must not be negative, not {self.seed}")
        if self.engine != "vllm" and not (self.engine_length is None and self.engine_memory is None):
            raise ConfigError("engine_length and engine_memory go with engine vllm; servers have their own")
        if self.engine != "vllm" and self.tensor_parallel != 1:
            raise ConfigError("tensor_parallel goes with engine vllm; servers have their own")
        if self.engine != "hf" and self.temperature > 2:
            raise ConfigError(f"vLLM takes temperatures up to 2, not {self.temperature}")
        if self.engine_length is not None and self.engine_length <= self.max_new_tokens:
            raise ConfigError(f"engine_length must leave room for prompts: more than {self.max_new_tokens} tokens")
        if self.engine_memory is not None and not 0 < self.engine_memory < 1:
            raise ConfigError(f"engine_memory is a share between 0 and 1, not {self.engine_memory}")
        self._check_servers()
        self.sampling()

    def _check_servers(self) -> None:
        """Raises ConfigError unless the options of servers go together."""
        if self.engine != "vllm-server":
            given = (self.server, self.server_timeout, self.weights_folder)
            if any(option not in ((), None) for option in given) or self.weight_transfer != "file":
                raise ConfigError(
                    "server, server_timeout, weight_transfer and weights_folder go with engine vllm-server"
                )
            return
        if not self.server:
            raise ConfigError("engine vllm-server needs servers: start one by `vlmenv serve`, and name it by --server")
        for address in self.server:
            check_address(address)
        if len(set(self.server)) < len(self.server):
            raise ConfigError(f"a server is named twice: {', '.join(self.server)}")
        if self.weight_transfer == "direct" and self.weights_folder is not None:
            raise ConfigError("weights_folder goes with weight_transfer file; direct writes none")
        if self.server_timeout is not None and not self.server_timeout > 0:
            raise ConfigError(f"server_timeout must be above 0 seconds, not {self.server_timeout}")

    def sampling(self) -> Sampling:
        """How answers are sampled.

        Raises:
            ConfigError: An option is out of range.
        """
        return Sampling(self.temperature, self.max_new_tokens, self.top_k, self.top_p, self.stop)

    def located(self) -> Self:
        """The options with whole paths in place of those from the working directory, so that they hold from anywhere.

        These are the names that may be paths; what is always a path is written whole by `to_yaml`.
        """
        clip = self.scorers.clip_model
        scorers = replace(self.scorers, clip_model=None if clip is None else _whole_model(clip))
        return replace(self, model=_whole_model(self.model), dataset=whole_names(self.dataset), scorers=scorers)

    def env_arguments(self) -> dict[str, Any]:
        """What the environment is made with, but for the samples.

        Raises:
            ModelError: There is no such model; its convention of coordinates cannot be known.
        """
        folder = find_model(self.model)
        space = coordinate_space(folder) if self.coordinates == "auto" else CoordinateSpace(self.coordinates)
        return {
            "rewards": self.rewards,
            "extra_terms": self.scorers.terms(),
            "prompt_template": self.prompt_template,
            "answer_format": self.answer_format,
            "count_tokens": TokenCount(folder),
            "coordinates": space.value,
            "resize": resize_rule(folder) if space is CoordinateSpace.RESIZED else None,
        }

    def data_arguments(self) -> dict[str, Any]:
        """Which samples the environment is made with."""
        given = None if self.dataset is None else list(self.dataset)
        roots = self.image_root if self.image_root is None or len(self.image_root) > 1 else self.image_root[0]
        return {
            "dataset": given,
            "image_root": roots,
            "split": self.split,
            "columns": self.columns,
            "skip_broken": self.skip_broken,
            "min_image_side": self.min_image_side,
            "without_text": self.without_text,
        }


def whole_names(names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The names of data sets, with whole paths where they are ones from the working directory."""
    return None if names is None else tuple(map(_whole_name, names))


def _whole_name(name: str) -> str:
    return str(Path(name).absolute()) if Path(name).exists() else name


def _whole_model(name: str) -> str:
    """The same of a model; that which is shipped stays that, whatever else is called so."""
    return name if name == BUILTIN else _whole_name(name)


def claim(folder: Path, config: TaskConfig, begun: bool) -> None:
    """Makes a folder the place of what comes of some options, which it holds as config.yaml.

    Args:
        folder: It need not be there.
        config: The options; the same work may go on with another engine, device or batch size.
        begun: Whether the folder holds results already. What it has been claimed for does not matter until then.

    Raises:
        ConfigError: It holds results of other options.
    """
    file, options = folder / "config.yaml", to_yaml(config.located(), without=_FREE)
    if begun and file.is_file():
        old, new = yaml.safe_load(file.read_text(encoding="utf-8")), yaml.safe_load(options)
        if other := [name for name in {**old, **new} if old.get(name) != new.get(name)]:
            raise ConfigError(
                f"{folder} holds results with another {', '.join(other)}, see {file}: give another --output"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(file, options)


@dataclass
class TokenCount:
    """Counts the tokens of a text as a model does; its tokenizer is loaded when first asked."""

    folder: Path

    def __call__(self, text: str) -> int:
        readable = text[:_COUNTED].encode("utf-8", "replace").decode()  # a lone surrogate is no text to a tokenizer
        return len(self._tokenizer.encode(readable, add_special_tokens=False))

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return transformers.AutoTokenizer.from_pretrained(self.folder)


_COUNTED = 100_000  # characters; a longer answer counts as this long


def report_broken_rows(envs: VisualTaskVectorEnv, console: Console) -> None:
    """Says how many rows of a data set were left out."""
    source = envs.task.source
    total = len(source.faults) + sum(source.unwanted.values()) + (source.size or 0)
    for reason, count in source.unwanted.items():
        console.print(f"{count} of {total} rows are left out: {reason}", highlight=False, markup=False)
    if source.faults:
        console.print(f"{len(source.faults)} of {total} rows are broken and left out, the first at {source.faults[0]}")


def check_device(device: Device) -> None:
    """Raises ConfigError where CUDA is asked for and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was asked for, but torch finds no CUDA GPU here; leave out --device")


def make_envs(env: str, num_envs: int, **arguments: Any) -> VisualTaskVectorEnv:
    """The batched environment of a registered task; `module:Id` imports the module that registers it.

    Raises:
        ConfigError: There is no such environment, or it is no visual task.
    """
    module, _, name = env.rpartition(":")
    if module:
        _import(module)
    if name not in gymnasium.registry:
        raise ConfigError(unknown_name("environment", name, visual_tasks()))
    if name not in visual_tasks():
        raise ConfigError(f"{env} is no visual task: register it with vlmenv.register_task")
    envs = gymnasium.make_vec(name, num_envs=num_envs, **arguments)
    assert isinstance(envs, VisualTaskVectorEnv)
    return envs


def visual_tasks() -> list[str]:
    """The ids of the registered visual tasks."""
    return sorted(i for i, spec in gymnasium.registry.items() if isinstance(spec.vector_entry_point, VectorEntryPoint))


def _import(module: str) -> None:
    """Imports a user's module, from the working directory too."""
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        importlib.import_module(module)
    except (ImportError, TypeError) as error:
        raise ConfigError(f"the module '{module}' of the environment cannot be imported: {error}") from error


def check_engine(config: TaskConfig, device: torch.device, processes: int = 1) -> None:
    """Raises ConfigError where the engine cannot be had, or not like this; before anything slow is done."""
    if config.engine != "vllm":
        return
    require_vllm()
    check_sharing(config.tensor_parallel, processes)
    if config.engine_memory is not None and device.type == "cpu":
        raise ConfigError("engine_memory is a share of a GPU's memory, but the model runs on the CPU")


def prepared(config: TaskConfig) -> tuple[Processes, Console]:
    """The processes that answer, and where the main one tells what they do; before anything slow is done.

    Raises:
        ConfigError: The device or the engine cannot be had.
    """
    check_device(config.device)
    accelerator = Accelerator(cpu=config.device == "cpu")
    check_engine(config, accelerator.device, accelerator.num_processes)
    return Processes(accelerator), Console(quiet=not accelerator.is_main_process)


def load_agent(
    config: TaskConfig,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    engine_dtype: torch.dtype | None = None,
) -> VLMAgent:
    """Loads a configuration's model as an agent, without the loader's own progress bars.

    Args:
        config: Which model, how it samples, and with what engine; `check_engine` is called first.
        device: Where it runs.
        dtype: Of its weights.
        engine_dtype: Of the copy in vLLM in this process; the same where left out.
    """
    transformers.utils.logging.disable_progress_bar()
    agent = VLMAgent.from_pretrained(config.model, device=device, dtype=dtype, sampling=config.sampling())
    if config.engine == "vllm":
        agent.engine = VLLMEngine(
            agent.folder,
            agent.family,
            device=device,
            dtype=engine_dtype or dtype,
            max_length=min(agent.max_length, config.engine_length or _ENGINE_LENGTH),
            memory_share=config.engine_memory or _ENGINE_MEMORY,
            tensor_parallel=config.tensor_parallel,
            seed=config.seed,
        )
    if config.engine == "vllm-server":
        agent.engine = VLLMServerEngine(
            config.server,
            agent.folder,
            agent.family,
            transfer=config.weight_transfer,
            weights_folder=config.weights_folder,
            patience=Patience() if config.server_timeout is None else Patience(answer=config.server_timeout),
        )
        agent.sync()  # the servers may hold those of another run
    return agent
