"""The papers' evaluations: several data sets in their published files, one table (`vlmenv eval --suite`)."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table

from vlmenv.agents.vlm import VLMAgent
from vlmenv.building import DTYPES, load_agent, prepared, report_broken_rows, report_skipped, task_arguments
from vlmenv.core.console import PlainTable, say
from vlmenv.core.errors import ConfigError, DataError, RewardError
from vlmenv.core.files import parse_json, write_atomic
from vlmenv.envs.data.benchmarks import hallusion_bench, math_vision, mathverse, mathvista, mmstar
from vlmenv.envs.data.coco import filtered_instances
from vlmenv.envs.data.dataset import Published
from vlmenv.envs.making import make_envs
from vlmenv.envs.metrics.intervals import Interval, metric_interval
from vlmenv.envs.vector import VisualTaskVectorEnv
from vlmenv.evaluation import (
    INTERVALS,
    UNSCORED,
    as_json,
    evaluate,
    read_metrics,
    sample_count,
    write_evaluation,
    written,
)
from vlmenv.options.evaluate import EvalConfig
from vlmenv.options.fields import flatten, options_of
from vlmenv.options.task import ReadingOptions
from vlmenv.processes import Processes, leave
from vlmenv.processes.failures import shared_failure
from vlmenv.runs.claim import alone_in, claim
from vlmenv.runs.fitting import fit_prompts
from vlmenv.runs.models import with_checkpoint

Rewrite = Callable[[Mapping[str, Any]], Mapping[str, Any]]
Answers = Sequence[Mapping[str, Any]]


def make_eval_envs(config: EvalConfig, env: str, **arguments: Any) -> VisualTaskVectorEnv:
    """The environments of an evaluation.

    Raises:
        ConfigError: There is no such environment, or it refuses these arguments.
        DataError: The data set cannot be read.
    """
    group_size = config.samples or 1
    num_envs = max(1, config.batch_size // group_size) * group_size
    return make_envs(env, num_envs, group_size=group_size, **arguments)


@dataclass(frozen=True)
class Entry:
    """A data set of a suite."""

    name: str
    """its name in the table, and its folder in the output"""
    env: str
    """the environment id of its task"""
    files: tuple[str, ...]
    """patterns of its paths in a folder of data; all files of the first pattern with any are used"""
    shows: tuple[str, ...]
    """its metrics in the table"""
    source: str
    """where to get it"""
    rewrite: Rewrite | None = None
    """converter to rows, if its layout needs one"""
    few_boxes: bool = False
    """whether categories with many boxes in an image are left out, as for COCO"""
    all_right: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """metrics that are the share of groups in which every answer is right, with the parts of an id that name a group"""


@dataclass(frozen=True)
class Suite:
    """A paper's data sets."""

    entries: tuple[Entry, ...]
    means: Mapping[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    """rows of the table that are the mean of a metric over data sets, with the metric and the data sets"""
    answer_format: str | None = None
    """answer format; None: the task's own"""


_VLM_R1: Final = "https://huggingface.co/datasets/omlab/VLM-R1: rec_jsons_processed.zip"
_OVDEVAL: Final = ("celebrity", "logo", "landmark", "color", "material", "position", "relationship", "negation")


def _rec(name: str, images: str) -> Entry:
    files = tuple(f"{folder}{name}.{suffix}" for folder in ("", "*/") for suffix in ("jsonl", "json"))
    return Entry(name, "VLM-REC-v0", files, ("accuracy@0.5", "iou/mean"), f"{_VLM_R1}, with the images of {images}")


def _ovdeval(name: str) -> Entry:
    files = tuple(f"{folder}{name}.json" for folder in ("OVDEval/annotations/", "annotations/", "OVDEval/"))
    return Entry(f"ovdeval_{name}", "VLM-OVD-v0", files, ("NMS-AP",), "https://huggingface.co/datasets/omlab/OVDEval")


_JUDGED: Final = ("VLM-Math-v0", "VLM-VQA-v0")
"""Tasks whose answers a judge may also compare."""
_INSTANCES: Final = "annotations/instances_val2017.json"

VLM_R1: Final = Suite(
    (
        _rec("refcoco_val", "train2014.zip"),
        _rec("refcocop_val", "train2014.zip"),
        _rec("refcocog_val", "train2014.zip"),
        _rec("lisa_test", "lisa-test.zip"),
        Entry(
            "coco_filtered",
            "VLM-OVD-v0",
            (_INSTANCES, f"*/{_INSTANCES}", "instances_val2017.json"),
            ("AP", "AP50", "precision@0.5", "recall@0.5"),
            "https://cocodataset.org: annotations_trainval2017.zip and val2017.zip",
            few_boxes=True,
        ),
        *map(_ovdeval, _OVDEVAL),
    ),
    means={"ovdeval": ("NMS-AP", tuple(f"ovdeval_{name}" for name in _OVDEVAL))},
)
"""VLM-R1 (arXiv 2504.07615): RefCOCO/+/g, LISA-Grounding, COCO with few boxes, OVDEval."""


def _benchmark(name: str, env: str, repository: str, files: Sequence[str], rewrite: Rewrite, **more: Any) -> Entry:
    folder = repository.partition("/")[2]
    places = tuple(f"{folder}/{file}" for file in files)
    source = f"https://huggingface.co/datasets/{repository}, into a folder {folder}"
    return Entry(name, env, places, ("accuracy",), source, rewrite, **more)


PEBR_R1: Final = Suite(
    (
        _benchmark(
            "mathvista",
            "VLM-Math-v0",
            "AI4Math/MathVista",
            ("data/testmini-*.parquet", "testmini*.parquet"),
            mathvista,
        ),
        _benchmark("mathverse", "VLM-Math-v0", "AI4Math/MathVerse", ("testmini.parquet", "testmini.json"), mathverse),
        _benchmark(
            "math_vision",
            "VLM-Math-v0",
            "MathLLMs/MathVision",
            ("data/test-*.parquet", "data/test.jsonl", "data/testmini-*.parquet", "data/testmini.jsonl"),
            math_vision,
        ),
        _benchmark("mmstar", "VLM-VQA-v0", "Lin-Chen/MMStar", ("mmstar.parquet", "data/*.parquet"), mmstar),
        _benchmark(
            "hallusion_bench",
            "VLM-VQA-v0",
            "lmms-lab/HallusionBench",
            ("data/image-*.parquet",),
            hallusion_bench,
            all_right={"accuracy/figure": (0, 1, 2, 3), "accuracy/question_pair": (0, 1, 2, 4)},
        ),
    ),
    answer_format="sections",
)
"""PeBR-R1 (arXiv 2509.13031): its benchmarks whose files can be read here."""

SUITES: Final[Mapping[str, Suite]] = {"vlm_r1": VLM_R1, "pebr_r1": PEBR_R1}


@dataclass(frozen=True)
class Found:
    """An existing data set of a suite."""

    entry: Entry
    files: tuple[Path, ...]
    folder: Path
    """its folder of data"""

    @property
    def title(self) -> str:
        """Its name, with the split of its files if it may be measured on several."""
        splits = {_split(pattern) for pattern in self.entry.files}
        return f"{self.entry.name} ({_split(self.files[0].name)})" if len(splits) > 1 else self.entry.name


def _split(file: str) -> str:
    """The split that a file's name begins with: the letters before the first other character."""
    return re.split(r"[^a-z]", file.rpartition("/")[2])[0]


def run_suite(config: EvalConfig, notes: Sequence[str] = ()) -> dict[str, dict[str, Interval]]:
    """`vlmenv eval --suite`: measures the remaining data sets, and shows the paper's table.

    Returns:
        The metrics of each existing data set.

    Raises:
        ConfigError: Options do not fit a suite, or the content of the output folder.
        DataError: None of the data sets exists; or some cannot be measured, raised after the others are measured.
    """
    suite = _checked(config)
    processes, console = prepared(config, notes)
    with alone_in(config.output, processes.accelerator, console):
        return _run(suite, config, processes, console)


def _run(suite: Suite, config: EvalConfig, processes: Processes, console: Console) -> dict[str, dict[str, Interval]]:
    config = with_checkpoint(config, console)
    accelerator = processes.accelerator
    found = find(suite, config, console)
    assert config.output is not None
    todo = [one for one in found if not (config.output / one.entry.name / "metrics.json").is_file()]
    with shared_failure(accelerator):
        if accelerator.is_main_process:
            claim(config.output, config, begun=any(config.output.glob("*/metrics.json")))
    faults: dict[str, str] = {}
    opened = _opened(todo, config, processes, console, faults)
    if opened:
        with closing(load_agent(config, accelerator.device, DTYPES[config.weights])) as agent:
            for one, envs in opened:
                agent.seed(config.seed + accelerator.process_index)
                with closing(envs), _kept_apart(one, faults):
                    _measure(one, envs, config, agent, console, processes)
    processes.accelerator.wait_for_everyone()
    found = [one for one in found if one.entry.name not in faults]
    results = {one.entry.name: read_metrics(config.output / one.entry.name) for one in found}
    means = dict(_means(suite, results))
    if accelerator.is_main_process:
        _write(config.output / "metrics.json", results | means)
    console.print(suite_table(config, suite, found, results | means))
    leave()
    if faults:
        told = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
        raise DataError(f"{len(faults)} data sets could not be measured; the others are in {config.output}. {told}")
    return results


@contextmanager
def _kept_apart(one: Found, faults: dict[str, str]) -> Iterator[None]:
    """Notes the fault of a data set, so that the others are still measured."""
    try:
        yield
    except (DataError, ConfigError, RewardError) as error:
        faults[one.entry.name] = str(error)


def _opened(
    todo: Sequence[Found], config: EvalConfig, processes: Processes, console: Console, faults: dict[str, str]
) -> list[tuple[Found, VisualTaskVectorEnv]]:
    """Opens all data sets before the model is loaded, and prints which files are measured."""
    opened = []
    for one in todo:
        with _kept_apart(one, faults):
            envs = _open(one, config, processes)
            files = ", ".join(str(file.relative_to(one.folder)) for file in one.files)
            say(f"{one.title}: {files}, {sample_count(envs, config.eval_limit)} samples", console)
            fit_prompts(config, envs, processes.accelerator, console, first=config.eval_limit)
            report_broken_rows(envs, console)
            opened.append((one, envs))
    for name, fault in faults.items():
        say(f"{name} cannot be measured: {fault}", console)
    return opened


def _checked(config: EvalConfig) -> Suite:
    assert config.suite is not None
    if config.suite_data is None or config.output is None:
        raise ConfigError(
            "a suite needs --suite-data, the folders of its data sets, and --output, a folder for what comes out"
        )
    given, own = flatten(config), flatten(EvalConfig())
    reading = (*options_of(ReadingOptions()), "dataset", "rewards", "env", "max_prompt_tokens")
    for name in reading:
        if given[name] != own[name]:
            raise ConfigError(f"{name} does not go with a suite, which has its own")
    if config.scorers.clip_model is not None:
        raise ConfigError("clip_model does not go with a suite: there is no description to score")
    if config.scorers.judge_url is not None and not any(entry.env in _JUDGED for entry in SUITES[config.suite].entries):
        raise ConfigError(f"judge_url does not go with {config.suite}, whose answers are boxes")
    for folder in config.suite_data:
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder")
    return SUITES[config.suite]


def find(suite: Suite, config: EvalConfig, console: Console) -> list[Found]:
    """The existing data sets of a suite. Prints the missing ones, and where to get them.

    Raises:
        DataError: None exists.
    """
    found: list[Found] = []
    missing: dict[str, list[str]] = {}
    folders = config.suite_data or ()
    for entry in suite.entries:
        places = ((folder, sorted(folder.glob(pattern))) for pattern in entry.files for folder in folders)
        folder, files = next((place for place in places if place[1]), (Path(), []))
        if files:
            found.append(Found(entry, tuple(files), folder))
        else:
            missing.setdefault(entry.source, []).append(f"{entry.name} ({entry.files[0]})")
    for source, names in missing.items():
        say(f"left out, as not there: {', '.join(names)}; to be had from {source}", console)
    if not found:
        raise DataError(f"{', '.join(map(str, folders))}: holds none of the data sets of {config.suite}")
    return found


def _open(one: Found, config: EvalConfig, processes: Processes) -> VisualTaskVectorEnv:
    """The environments of a data set."""
    assert config.output is not None
    suite, arguments = SUITES[config.suite or ""], task_arguments(config)
    arguments["answer_format"] = config.prompts.answer_format or suite.answer_format
    if config.scorers.judge_url is not None and one.entry.env in _JUDGED:
        arguments["rewards"] = {"accuracy": 1.0, "judge": 1.0}
    else:
        arguments["extra_terms"] = None
    dataset, root = _dataset(one, config.output / one.entry.name, processes)
    data = {"dataset": dataset, "image_root": root, "skip_broken": config.data.skip_broken}
    return make_eval_envs(config, one.entry.env, **data, **arguments)


def _measure(
    one: Found, envs: VisualTaskVectorEnv, config: EvalConfig, agent: VLMAgent, console: Console, processes: Processes
) -> None:
    """Answers a data set and writes metrics and answers into its folder."""
    assert config.output is not None
    count, greedy = sample_count(envs, config.eval_limit), config.samples is None
    title = f"{one.entry.name}, {count} samples"
    evaluation = evaluate(agent, envs, count, greedy=greedy, title=title, console=console, processes=processes)
    report_skipped(evaluation.skipped, count, console)
    for name, parts in one.entry.all_right.items():
        evaluation.metrics[name] = all_right(evaluation.answers, parts)
    if processes.accelerator.is_main_process:
        write_evaluation(evaluation, config.output / one.entry.name)


def _dataset(one: Found, output: Path, processes: Processes) -> tuple[list[Any], Path | None]:
    """Arguments of the environment: the files and the folder of their images."""
    root = image_root(one)
    if one.entry.few_boxes:
        kept = output / "instances.json"
        with shared_failure(processes.accelerator):
            if processes.accelerator.is_main_process:
                output.mkdir(parents=True, exist_ok=True)
                write_atomic(kept, json.dumps(filtered_instances(one.files[0])))
        return [kept], root
    if one.entry.rewrite is None:
        return list(one.files), root
    return [Published(file, one.entry.rewrite) for file in one.files], root


def image_root(one: Found) -> Path | None:
    """The folder that image paths of a data set are relative to; None if it contains its images.

    It is searched for beside the file and two folders down from there, and in the folder of data. A folder with the
    file's own name goes first.

    Raises:
        DataError: There is no such folder, or the file cannot be read.
    """
    file = one.files[0]
    image = _first_image(file)
    if image is None:
        return None
    above = [folder for folder in (file.parent.parent, file.parent) if folder.is_relative_to(one.folder)]
    candidates = [folder for base in (*above, one.folder) for folder in _within(base)]
    for folder in sorted(candidates, key=lambda folder: folder.name != file.stem):  # stable: else in their order
        if (folder / image).is_file():
            return folder
    raise DataError(f"{file}: its first image, {image}, is nowhere under {above[0] if above else one.folder}")


def _within(folder: Path, depth: int = 2) -> Iterator[Path]:
    """A folder and those in it, down to a depth."""
    yield folder
    for inner in sorted(one for one in folder.iterdir() if one.is_dir()) if depth else ():
        yield from _within(inner, depth - 1)


def _first_image(file: Path) -> str | None:
    """The path of the first row's image in a JSON file; None if it has none."""
    if file.suffix == ".parquet":
        return None
    try:
        with file.open(encoding="utf-8") as stream:
            content = parse_json(stream.readline() if file.suffix == ".jsonl" else stream.read())
        row = content["images"][0] if isinstance(content, dict) and "images" in content else content
        row = row[0] if isinstance(row, list) else row
        found = row.get("file_name", row.get("image"))
    except (ValueError, LookupError, AttributeError) as error:
        raise DataError(f"{file}: the first row cannot be read: {type(error).__name__}: {error}") from error
    found = found[0] if isinstance(found, list) and found else found
    return found if isinstance(found, str) else None


def all_right(answers: Answers, parts: Sequence[int]) -> Interval:
    """The share of groups of questions in which all answers are right.

    Args:
        answers: Each with `id`, `index` and `measures`. Of several answers to a question, all first ones
            make up groups, all second ones, and so on.
        parts: The parts of an id, separated by slashes, that name its group.
    """
    seen: Counter[int] = Counter()
    groups: dict[tuple[str, ...], dict[int, bool]] = {}
    for answer in answers:
        pieces = answer["id"].split("/")
        name, turn = tuple(pieces[part] for part in parts), seen[answer["index"]]
        seen[answer["index"]] += 1
        group = groups.setdefault(name, {})
        group[turn] = group.get(turn, True) and answer["measures"]["accuracy"] == 1
    values = [(name, right) for name, group in groups.items() for right in group.values()]
    return metric_interval([float(right) for _, right in values], clusters=[name for name, _ in values])


def _means(suite: Suite, results: Mapping[str, Mapping[str, Interval]]) -> Iterator[tuple[str, dict[str, Interval]]]:
    for name, (metric, entries) in suite.means.items():
        values = [results[entry][metric].value for entry in entries if entry in results]
        if values:
            mean = Interval(float(np.nanmean(values)), math.nan, math.nan)
            yield f"{name}, mean of {len(values)}", {metric: mean}


def suite_table(
    config: EvalConfig, suite: Suite, found: Sequence[Found], results: Mapping[str, Mapping[str, Interval]]
) -> Table:
    """The paper's table: a row for each metric of each data set."""
    how = "greedy" if config.samples is None else f"{config.samples} sampled answers each"
    title = f"{config.suite}: {config.model}, {how}"
    columns = ("data set", "metric", "value", "unparsable")
    table = PlainTable(*columns, title=title, caption=INTERVALS)
    titles = {one.entry.name: one.title for one in found}
    shown = {one.entry.name: (*one.entry.shows, "judge", *one.entry.all_right, UNSCORED) for one in found}
    for name, metrics in results.items():
        wanted = shown.get(name, tuple(metrics))
        subjects = [metric for metric in metrics if metric.startswith("accuracy/") and metric not in wanted]
        unparsable = f"{metrics['unparsable'].value:.1%}" if "unparsable" in metrics else ""
        for metric in (metric for metric in (*wanted, *subjects) if metric in metrics):
            table.add_row(titles.get(name, name), metric, written(metrics[metric]), unparsable)
    return table


def _write(file: Path, results: Mapping[str, Mapping[str, Interval]]) -> None:
    """Writes the metrics of a suite, by data set, as JSON can hold them."""
    write_atomic(file, json.dumps({name: as_json(one) for name, one in results.items()}, indent=2) + "\n")
