"""The model card of an exported model, from the files of its run."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

import vlmenv
from vlmenv.agents.checkpoints import find_model, public_name
from vlmenv.core.errors import ModelError
from vlmenv.core.files import parse_json
from vlmenv.core.names import hub_name
from vlmenv.core.text import visible, visible_lines
from vlmenv.options.files import read_options
from vlmenv.options.resolve import RECORD
from vlmenv.runs.run_folder import RunFolder

_TASK: Final = "image-text-to-text"
TOWER: Final = "--enable-tower-connector-lora"
"""vLLM's option without which it leaves out adapters of the vision tower and its projectors."""
MERGED: Final = "vLLM takes no adapters of this model's projectors: give it the export with --merged"
UNSERVED: Final = {"internvl"}
"""Families of whose projectors vLLM takes no adapters."""
_RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as `--max-lora-rank`."""
_SHOWN: Final = ("algo", "steps", "prompts_per_step", "group_size", "lr", "beta", "rewards", "lora_rank", "seed")
_LICENCES: Final = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*")


@dataclass(frozen=True)
class Origin:
    """Where a model comes from."""

    base: str
    """name of the published model that training began with"""
    base_folder: Path | None
    """its folder, if it is here"""
    options: Mapping[str, Any] = field(default_factory=dict)
    """the run's resolved options; empty without a run"""
    step: int | None = None
    """the step that the model is of"""
    before: Mapping[str, Any] = field(default_factory=dict)
    """metrics before training, by name"""
    after: Mapping[str, Any] = field(default_factory=dict)
    """metrics at that step"""
    prompt: str | None = None
    """a prompt of the run's"""
    stages: tuple[str, ...] = ()
    """runs that came before it, the first one first"""

    @classmethod
    def of(cls, model: Path, run: RunFolder | None, step: int | None) -> Origin:
        """The origin of a checkpoint, or of a model that no run has made."""
        if run is None:
            return cls(public_name(model), model)
        options = read_options(run.path / "resolved.yaml") | run.changed_options(step)
        options.pop(RECORD, None)
        name, stages = str(options.get("model")), list[str]()
        while (earlier := _run_of(Path(name))) is not None and str(earlier.path) not in stages:
            stages.insert(0, str(earlier.path))
            name = str(read_options(earlier.path / "resolved.yaml").get("model"))
        before, after = _metrics(run, step)
        base, folder = _public(name)
        names = tuple(Path(stage).name for stage in stages)
        return cls(base, folder, options, step, before, after, _first_prompt(run), names)


def _run_of(checkpoint: Path) -> RunFolder | None:
    """The run that a checkpoint's folder belongs to; None for other folders."""
    above = (checkpoint, checkpoint.parent, checkpoint.parent.parent)
    found = next((folder for folder in above if (folder / "resolved.yaml").is_file()), None)
    return None if found is None else RunFolder(found)


def _public(name: str) -> tuple[str, Path | None]:
    """A model's name for others, and its folder if it is here."""
    try:
        folder = find_model(name)
    except ModelError:
        named = hub_name(name)
        return (named[0] if named else name), None
    public = public_name(folder)
    return (name if public == str(folder) and not Path(name).is_absolute() else public), folder


def _metrics(run: RunFolder, step: int | None) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Metrics before training, and at a step if they were measured there."""
    whole, history = run.read_json("evaluation.json"), run.history()
    before = _values(whole.get("before") or run.read_json("before/metrics.json"))
    if step == len(history) and whole:
        return before, _values(whole["after"])
    row = history[step - 1] if step is not None and 0 < step <= len(history) else {}
    return before, {name.removeprefix("eval/"): value for name, value in row.items() if name.startswith("eval/")}


def _values(metrics: Mapping[str, Any]) -> dict[str, float]:
    found = {
        name: one["value"] if isinstance(one, Mapping) and "value" in one else one for name, one in metrics.items()
    }
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def _first_prompt(run: RunFolder) -> str | None:
    file = run.path / "rollouts.jsonl"
    if not file.is_file():
        return None
    with file.open(encoding="utf-8") as stream:
        line = stream.readline()
    try:
        return str(parse_json(line)["prompt"])
    except (ValueError, KeyError, TypeError):
        return None


def write_card(folder: Path, origin: Origin, *, adapter: bool, tower: bool = False, served: bool = True) -> None:
    """Writes README.md of an exported model, and what the licence of its base model is.

    Args:
        folder: The exported model.
        origin: Where it comes from.
        adapter: True if it holds adapters alone.
        tower: True if the vision tower or its projectors have some of them.
        served: False if vLLM refuses those.
    """
    licence, note = _licence(origin)
    (folder / "LICENSE_NOTE.md").write_text(note, encoding="utf-8")
    parts = [_head(folder, origin, licence, adapter), *_body(folder, origin, adapter)]
    parts += [_serving(folder, origin, tower) if served else f"## With vLLM\n\n{MERGED}."] if adapter else []
    parts.append(f"## Licence\n\n{note.strip()}")
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _licence(origin: Origin) -> tuple[str | None, str]:
    """The base model's licence by its card, and a note about it."""
    found, files = None, list[str]()
    if origin.base_folder is not None:
        files = sorted({file.name for pattern in _LICENCES for file in origin.base_folder.glob(pattern)})
        card = origin.base_folder / "README.md"
        if card.is_file():
            found = _front(card).get("license")
    says = f"Its card names the licence {found}." if found else "Its card, if it has one, was not at hand."
    kept = f" Its own files are beside this: {', '.join(files)}." if files else ""
    return (str(found) if found else None), (
        f"This model is derived from {origin.base}, whose licence applies to it too. {says}{kept} Check it before you "
        "pass the model on; the licences of the training data may matter as well.\n"
    )


def _front(card: Path) -> Mapping[str, Any]:
    """The YAML at the head of a model card; empty if it cannot be read."""
    try:
        content = yaml.safe_load(
            ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_yaml()
        )
    except (ValueError, OSError, yaml.YAMLError, RecursionError):
        return {}
    return content if isinstance(content, Mapping) else {}


def _head(folder: Path, origin: Origin, licence: str | None, adapter: bool) -> str:
    """The YAML at the head of the card."""
    algo, env = origin.options.get("algo"), origin.options.get("env")
    named = hub_name(origin.base) is not None  # the hub refuses a card that names anything else
    data = ModelCardData(
        license=licence,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=_TASK,
        base_model=visible(origin.base) if named else None,
        tags=["vlmenv", "reinforcement-learning", *([algo] if algo else []), *(["lora"] if adapter else [])],
        datasets=[visible(name) for name in _datasets(origin) if not Path(name).exists() and "/" in name] or None,
        model_name=visible(folder.name) if origin.after else None,
        eval_results=[
            EvalResult(_TASK, f"{env}", visible(_measured_on(origin)), visible(name), value)
            for name, value in origin.after.items()
        ]
        or None,
    )
    return f"---\n{data.to_yaml().strip()}\n---"


def _datasets(origin: Origin) -> list[str]:
    return [str(name) for name in origin.options.get("dataset") or ()]


def _measured_on(origin: Origin) -> str:
    """The names of the data that was measured on, without folders."""
    named = origin.options.get("eval_dataset") or origin.options.get("dataset")
    return ", ".join(Path(str(name)).name for name in named) if named else "built-in samples"


def _body(folder: Path, origin: Origin, adapter: bool) -> Iterator[str]:
    yield f"# {visible(folder.name)}"
    kind = "LoRA adapters for" if adapter else "A model trained from"
    how = f" by reinforcement learning with vlmenv {vlmenv.__version__}"
    yield f"{kind} {_code(origin.base)}{how if origin.options else ''}."
    if origin.options:
        yield from _training(origin)
        yield from _table(origin)
    yield from _prompting(origin, adapter)


def _training(origin: Origin) -> Iterator[str]:
    options = origin.options
    lines = [f"- task: {_code(options.get('env'))}"]
    names = ", ".join(_code(Path(name).name if Path(name).exists() else name) for name in _datasets(origin))
    lines.append(f"- data: {names or 'built-in samples'}")
    lines += [f"- stages before: {', '.join(map(_code, origin.stages))}"] if origin.stages else []
    lines.append(f"- step: {origin.step}")
    lines += [f"- {name}: {_code(_short(options[name]))}" for name in _SHOWN if options.get(name) is not None]
    yield "## Training"
    yield "\n".join(lines)


def _short(value: Any) -> str:
    return ", ".join(f"{name} {weight}" for name, weight in value.items()) if isinstance(value, Mapping) else str(value)


def _table(origin: Origin) -> Iterator[str]:
    yield "## Metrics"
    names = list(dict.fromkeys([*origin.before, *origin.after]))
    if not names:
        yield "Nothing was measured."
        return
    rows = [f"| {_code(name)} | {_number(origin.before, name)} | {_number(origin.after, name)} |" for name in names]
    yield f"Greedy answers to {_code(_measured_on(origin))}, as the run measured them."
    yield "\n".join([f"| metric | before | at step {origin.step} |", "|---|---|---|", *rows])


def _number(metrics: Mapping[str, Any], name: str) -> str:
    return f"{metrics[name]:.3f}" if name in metrics else "not measured"


def _prompting(origin: Origin, adapter: bool) -> Iterator[str]:
    """How to ask the model as in training."""
    options = origin.options
    yield "## How to prompt it"
    if options.get("system_prompt"):
        yield f"The system turn:\n\n{_block(options['system_prompt'])}"
    if options.get("prompt_template"):
        yield (
            "The user turn holds the image and this template; in it {answer} is the form of an answer, {none} the one "
            f"without an answer, and {{coordinates}} the unit:\n\n{_block(options['prompt_template'])}"
        )
    if origin.prompt is not None:
        yield f"A prompt of the run:\n\n{_block(origin.prompt)}"
    if options:
        numbers = (
            f"temperature {options.get('temperature')}, top_p {options.get('top_p')}, top_k {options.get('top_k')}"
        )
        yield (
            f"`generation_config.json` holds the sampling of training ({numbers}); metrics are of greedy answers "
            "(`do_sample=False`). Settings of the base model are in `generation_config.base.json`, if it had any."
        )
    yield _block(_snippet(origin, adapter), "python")


def _snippet(origin: Origin, adapter: bool) -> str:
    prompt = origin.prompt or "Describe the image."
    base = origin.base if adapter else "FOLDER"
    put_on = ['model = PeftModel.from_pretrained(model, "FOLDER")'] if adapter else []
    return "\n".join(
        [
            *(["from peft import PeftModel"] if adapter else []),
            "from PIL import Image",
            "from transformers import AutoModelForImageTextToText, AutoProcessor",
            "",
            f'model = AutoModelForImageTextToText.from_pretrained({json.dumps(base)}, dtype="auto")',
            *put_on,
            'processor = AutoProcessor.from_pretrained("FOLDER")',
            'content = [{"type": "image", "image": Image.open("image.png")}, '
            f'{{"type": "text", "text": {visible(json.dumps(prompt, ensure_ascii=False))}}}]',
            "inputs = processor.apply_chat_template(",
            '    [{"role": "user", "content": content}],',
            '    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",',
            ")",
            f"answer = model.generate(**inputs, max_new_tokens={origin.options.get('max_new_tokens', 256)})",
            'print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]
    )


def _serving(folder: Path, origin: Origin, tower: bool) -> str:
    """How vLLM uses adapters without merging them."""
    rank = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    parts = ["vllm serve", shlex.quote(origin.base), "--enable-lora"]
    parts += [TOWER] * tower + ["--max-lora-rank", str(next((one for one in _RANKS if one >= rank), rank))]
    told = f"Without `{TOWER}` vLLM leaves out the adapters of the vision tower." if tower else ""
    return f"## With vLLM\n\n{_block(' '.join([*parts, '--lora-modules trained=FOLDER']), 'bash')}\n\n{told}".rstrip()


def _block(text: Any, language: str = "text") -> str:
    """A block that shows a text as it is, whatever is in it."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{visible_lines(text)}\n{fence}"


def _code(text: Any) -> str:
    """The same within a line or the cell of a table."""
    shown, fence = visible(text).replace("|", "\\|"), "`" * (_longest_run(text) + 1)
    return f"{fence} {shown} {fence}" if "`" in shown else f"`{shown or ' '}`"


def _longest_run(text: Any) -> int:
    """The number of backticks in the longest run of them."""
    return max(map(len, re.findall("`+", str(text))), default=0)
