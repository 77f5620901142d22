"""Options that all commands with a model share: task, data, prompts, sampling and engine."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tyro
import yaml

from vlmenv.core.errors import ConfigError, require, require_at_least
from vlmenv.core.files import located_name
from vlmenv.core.names import BUILTIN, SHIPPED
from vlmenv.core.pixels import PixelLimits
from vlmenv.core.sampling import Sampling
from vlmenv.options.scorers import ScorerConfig

Device = Literal["auto", "cpu", "cuda"]
BoxNumbers = Literal["xyxy", "xywh", "fractions", "norm1000"]


@dataclass(frozen=True)
class ReadingOptions:
    """How rows of a data set are read."""

    image_root: tuple[Path, ...] | None = None
    """Folder that image paths are relative to, or one folder per file. None: the file's own folder."""
    split: str | None = None
    """Split of the built-in samples ("train", "eval") or of a Hugging Face data set."""
    columns: dict[str, str] | None = None
    """Columns that hold the parts of a row, as in `--columns question query answer label`."""
    min_image_side: int | None = None
    """Width and height in pixels below which an image's row is left out."""
    without_text: tuple[str, ...] = ()
    """Texts that leave a row out if its answer, reasoning included, contains one."""
    boxes_in: BoxNumbers | None = None
    """Numbers of the data set's true boxes: edges in pixels, x, y, width and height in pixels, or edges in fractions or
    thousandths of the image. None: xyxy; COCO's are xywh by definition."""
    box_orientation: Literal["shown", "stored"] = "shown"
    """Orientation of the image that the data set's boxes refer to, if EXIF turns it. A COCO file's width and height
    decide, where they can."""
    confine_images: bool = False
    """Refusal of images outside `image_root`: absolute paths, `..` and links that lead out of it."""
    video_fps: float | None = None
    """Frames per second that are taken of a video; 4 frames at least. None: 2."""
    video_frames: int | None = None
    """Maximum number of frames of a video. None: 64."""
    video_pixels: int | None = None
    """Maximum number of pixels of a frame. Larger frames are scaled down as they are read. None: 100352."""

    def reading_arguments(self) -> dict[str, Any]:
        """Arguments of the environment about the reading of rows."""
        roots = self.image_root
        return {
            "image_root": roots if roots is None or len(roots) > 1 else roots[0],
            "split": self.split,
            "columns": self.columns,
            "min_image_side": self.min_image_side,
            "without_text": self.without_text,
            "boxes_in": self.boxes_in,
            "box_orientation": self.box_orientation,
            "confine_images": self.confine_images,
            "video_fps": self.video_fps,
            "video_frames": self.video_frames,
            "video_pixels": self.video_pixels,
        }


@dataclass(frozen=True)
class DataOptions(ReadingOptions):
    """Source of samples."""

    dataset: tuple[str, ...] | None = None
    """Files (.jsonl, .json, .parquet), folders saved by `datasets`, or ids on the Hugging Face hub. None: the built-in
    samples."""
    skip_broken: bool = False
    """Leave broken rows out instead of refusing the data set. Rows whose prompts are too long for the model count as
    broken."""
    max_prompt_tokens: int | None = None
    """Length of prompts, image tokens included, above which a row is left out, in tokens. None: no row is left out for
    its length, and prompts without room for the answer are refused."""

    def __post_init__(self) -> None:
        most = self.max_prompt_tokens
        require(most is None or most >= 1, f"max_prompt_tokens must be at least 1, not {most}")

    def located(self) -> Self:
        """The options with absolute paths for data sets that are files, so that they hold from any folder."""
        return replace(self, dataset=located_names(self.dataset))

    def arguments(self) -> dict[str, Any]:
        """Arguments of the environment."""
        dataset = None if self.dataset is None else list(self.dataset)
        return {"dataset": dataset, "skip_broken": self.skip_broken, **self.reading_arguments()}


def located_names(names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Names of data sets, with absolute paths for those that exist as paths."""
    return None if names is None else tuple(map(located_name, names))


@dataclass(frozen=True)
class PromptOptions:
    """Prompts, and the scoring of answers."""

    rewards: dict[str, float] | None = None
    """Reward terms with weights, as in `--rewards iou 1 format 0.5`. Name your own function as in
    `my_rewards:brevity`. None: the task's own terms."""
    prompt_template: str | None = None
    """Prompt template with {question}, and {answer}, {none} and {coordinates} as needed. None: the task's own."""
    system_prompt: str | None = None
    """Text of the system turn before each prompt, with {answer}, {none} and {coordinates} as needed. A row's own system
    turn replaces it. None: no system turn."""
    chat_template_kwargs: dict[str, str] | None = None
    """Values of the chat template's variables, read as YAML, as in `--chat-template-kwargs enable_thinking false`."""
    answer_format: Literal["tags", "sections"] | None = None
    """Format of a completion: think/answer tags, or PeBR-R1's sections. None: the task's own."""
    coordinates: Literal["auto", "original", "resized", "norm1000"] = "auto"
    """Convention of coordinates in prompts and answers: pixels of the stored image, pixels of the resized image that
    the model sees, or thousandths. "auto": the convention that the model was trained with."""
    max_turns: int | None = None
    """Maximum number of answers per episode, in a task of several turns. 1: a single step. None: the task's own."""
    max_images: int | None = None
    """Maximum number of images per episode, in a task of several turns. None: the task's own, 8 if it has none."""

    def __post_init__(self) -> None:
        require_at_least(1, max_turns=self.max_turns, max_images=self.max_images)
        self.template_switches()

    def task_arguments(self) -> dict[str, Any]:
        """Arguments of the environment, as far as they do not depend on a model."""
        return {
            "rewards": self.rewards,
            "prompt_template": self.prompt_template,
            "system_prompt": self.system_prompt,
            "answer_format": self.answer_format,
            "coordinates": self.coordinates,
            "max_turns": self.max_turns,
            "max_images": self.max_images,
        }

    def template_switches(self) -> dict[str, Any]:
        """The values of the chat template's own variables.

        Raises:
            ConfigError: A value is no YAML scalar.
        """
        return {name: _scalar(name, text) for name, text in (self.chat_template_kwargs or {}).items()}


def given_arguments(data: DataOptions, prompts: PromptOptions) -> dict[str, Any]:
    """Arguments of the environment without a model: "auto" is then the convention of the stored image's pixels."""
    given = data.arguments() | prompts.task_arguments()
    if prompts.coordinates == "auto":
        given["coordinates"] = "original"
    return {name: value for name, value in given.items() if value is not None}


def _scalar(name: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"chat_template_kwargs: the value of '{name}' is no YAML: {text!r}") from error
    if isinstance(value, dict | list):
        raise ConfigError(f"chat_template_kwargs: the value of '{name}' is no single value: {text!r}")
    return value


@dataclass(frozen=True)
class VLLMOptions:
    """Resources of vLLM."""

    engine_length: int = 16384
    """Length limit of prompt and completion together in vLLM, in tokens, at most what the model takes."""
    engine_images: int = 8
    """Most images of a prompt in vLLM, or of all turns of an episode together."""
    engine_videos: int = 1
    """Most videos of a prompt in vLLM, of Qwen3-VL and Qwen3.5. Those of other families do not go through vLLM."""
    engine_memory: float = 0.4
    """Share of the GPU's memory that vLLM may take, its weights included."""
    tensor_parallel: int = 1
    """Ranks that share one vLLM engine, each with a part of its weights."""

    def __post_init__(self) -> None:
        require(self.engine_length >= 2, f"engine_length must leave room for a prompt, not be {self.engine_length}")
        require_at_least(1, engine_images=self.engine_images, engine_videos=self.engine_videos)
        require(0 < self.engine_memory < 1, f"engine_memory is a share between 0 and 1, not {self.engine_memory}")
        require(self.tensor_parallel >= 1, f"tensor_parallel must be at least 1, not {self.tensor_parallel}")


@dataclass(frozen=True)
class EngineOptions(VLLMOptions):
    """Engine that generates completions."""

    engine: str = "hf"
    """Engine that generates: hf (the trained model itself), vllm (a copy in the same process), vllm-server (copies on
    servers), or one of your own, as in `my_engine:MyEngine`."""
    cache_tokens: int | None = None
    """Tokens of prompts and completions whose keys and values the model itself holds at once; the others wait. Whatever
    the number, a seed gives the same random numbers. None: with CUDA as many as its free memory takes, on a CPU no
    limit."""
    server: tuple[str, ...] = ()
    """Addresses of servers that `vlmenv serve` started, as http://127.0.0.1:8000, https://HOST:PORT or unix:PATH.
    Prompts are spread over them."""
    server_ca: Path | None = None
    """File of the authorities (PEM) that sign the certificates of https servers, or of a self-signed certificate. None:
    the authorities that the system trusts."""
    server_timeout: float = 300.0
    """Seconds without an answer after which a server is left out."""
    weight_transfer: Literal["file", "direct"] = "file"
    """Transfer of new weights to servers: "file", which each server reads, or "direct", from process to process, by
    NCCL between GPUs and by gloo otherwise."""
    weights_folder: Path | None = None
    """Folder that servers on other machines read new weights from. None: a folder in memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        own = ("engine_length", "engine_images", "engine_videos", "engine_memory", "tensor_parallel")
        if self.engine != "vllm" and (given := self._changed(*own)):
            raise ConfigError(f"{' and '.join(given)} go with engine vllm; servers have their own")
        if self.cache_tokens is not None:
            require(self.cache_tokens >= 1, f"cache_tokens must be at least 1, not {self.cache_tokens}")
            if self.engine != "hf":
                raise ConfigError("cache_tokens goes with engine hf, the model itself; others have limits of their own")
        if self.engine == "vllm-server":
            self._check_servers()
        elif given := self._changed("server", "server_ca", "server_timeout", "weight_transfer", "weights_folder"):
            raise ConfigError(f"{' and '.join(given)} go with engine vllm-server")

    def _changed(self, *names: str) -> list[str]:
        """The names of options that differ from their default."""
        return [name for name in names if getattr(self, name) != type(self).__dataclass_fields__[name].default]

    def _check_servers(self) -> None:
        if not self.server:
            raise ConfigError("engine vllm-server needs servers: start one by `vlmenv serve`, and name it by --server")
        if len(set(self.server)) < len(self.server):
            raise ConfigError(f"a server is named twice: {', '.join(self.server)}")
        if self.server_ca is not None and not any(url.startswith("https:") for url in self.server):
            raise ConfigError("server_ca goes with servers at https://HOST:PORT, and none is named")
        if self.weight_transfer == "direct" and self.weights_folder is not None:
            raise ConfigError("weights_folder goes with weight_transfer file; direct writes none")
        require(self.server_timeout > 0, f"server_timeout must be above 0 seconds, not {self.server_timeout}")


@dataclass(frozen=True)
class TaskConfig:
    """A task, and the model that answers it."""

    env: str = "VLM-REC-v0"
    """Environment; `vlmenv envs` lists them. A task of your own is named with its module, as in my_task:My-Task-v0."""
    model: str = BUILTIN
    """Model: "builtin" or "builtin-tasks", a checkpoint's folder, a run's folder (its best or newest checkpoint), a
    folder of adapters in peft's format, or a name on the Hugging Face hub."""
    imports: Annotated[tuple[str, ...], tyro.conf.arg(name="import")] = ()
    """Modules of your own to import first, which register tasks, rewards, algorithms or model families."""
    device: Device = "auto"
    """Device of the model. "auto": a GPU if there is one."""
    seed: int = 0
    """Seed of the order of samples and of sampling."""
    data: DataOptions = field(default_factory=DataOptions)
    prompts: PromptOptions = field(default_factory=PromptOptions)
    pixels: PixelLimits = field(default_factory=PixelLimits)
    sampling: Sampling = field(default_factory=Sampling)
    generation: EngineOptions = field(default_factory=EngineOptions)
    scorers: ScorerConfig = field(default_factory=ScorerConfig)

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, f"seed must be from 0 to 2**63 - 1, not {self.seed}")
        generation, longest = self.generation, self.sampling.max_new_tokens
        if generation.engine == "vllm" and generation.engine_length <= longest:
            raise ConfigError(f"engine_length must leave room for prompts: more than {longest} tokens")
        if generation.engine in ("vllm", "vllm-server") and self.sampling.temperature > 2:
            raise ConfigError(f"vLLM takes temperatures up to 2, not {self.sampling.temperature}")

    def located(self) -> Self:
        """The options with absolute paths, so that they hold from any folder.

        These names may be paths; options that are always paths are written absolute in any case.
        """
        clip = self.scorers.clip_model
        scorers = replace(self.scorers, clip_model=None if clip is None else located_model(clip))
        return replace(self, model=located_model(self.model), data=self.data.located(), scorers=scorers)


def located_model(name: str) -> str:
    """The name of a model, with an absolute path if it is a folder; shipped models keep their names."""
    return name if name in SHIPPED else located_name(name)
