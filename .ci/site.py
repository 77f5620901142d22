"""Hooks of the documentation site: pages from outside `docs/`, reference pages from docstrings, notebooks of tutorials.

Pages link to files of the repository, as GitHub shows them. The site has no such files. So the Markdown files become
pages, other linked files become copies under `source/`, and links to folders become plain text.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
import nbformat
from mkdocs.structure.files import File, Files
from notebooks import LINK, TUTORIALS, notebook, notebook_path, parts

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
PAGES |= {"SECURITY.md": "security.md", ".github/CODE_OF_CONDUCT.md": "code_of_conduct.md"}
PAGES |= {str(file.relative_to(ROOT)): str(file.relative_to(ROOT)) for file in (ROOT / "benchmarks").rglob("*.md")}
"""Paths in the site by path in the repository, of pages from outside `docs/`."""

PACKAGES = ("vlmenv", "vlmenv.envs.public", "vlmenv.agents", "vlmenv.algos", "vlmenv.adapters")
OPTIONS = {
    "train": ("options.train.TrainConfig", "algos.TrainerConfig"),
    "train: parts of training": tuple(
        f"options.train.{name}Options" for name in ("Adaptation", "Batch", "Measuring", "Logging")
    ),
    "train, eval, sample, doctor: data, prompts, engine": (
        *(f"options.task.{name}" for name in ("TaskConfig", "ReadingOptions", "DataOptions", "PromptOptions")),
        *("options.task.EngineOptions", "options.task.VLLMOptions", "options.scorers.ScorerConfig"),
    ),
    "train: algorithms": tuple(f"algos.{name}Config" for name in ("GRPO", "RLOO", "ReinforcePlusPlus", "PPO", "SFT")),
    "eval": ("options.evaluate.EvalConfig", "options.evaluate.AnswerConfig"),
    "sample": ("options.evaluate.SampleConfig",),
    "answer": ("options.answer.AskConfig",),
    "report": ("options.report.ReportConfig",),
    "export": ("options.export.ExportConfig",),
    "pipeline": ("options.pipeline.PipelineConfig",),
    "doctor": ("options.doctor.DoctorConfig",),
    "score": ("options.score.ScoreConfig",),
    "data check, convert, show, export": tuple(
        f"options.data.Data{name}Config" for name in ("Check", "Convert", "Show", "Export")
    ),
    "serve, serve-env": ("options.serve.ServeConfig", "options.serve.ServeEnvConfig"),
}
"""Dataclasses of options by command."""


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages from outside `docs/`, the reference pages, the notebooks, and the files that pages link to."""
    for path, name in PAGES.items():
        if (ROOT / path).exists():
            files.append(File.generated(config, name, content=(ROOT / path).read_text(encoding="utf-8")))
    files.append(File.generated(config, "reference/python.md", content=_python()))
    files.append(File.generated(config, "reference/all_options.md", content=_options()))
    for page in TUTORIALS:
        files.append(File.generated(config, notebook_path(page), content=nbformat.writes(notebook(page))))
    for path in sorted({path for file in files.documentation_pages() for path in _linked(file)}):
        files.append(File.generated(config, _site_path(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrites links to files of the repository into links within the site, and offers the notebook of a tutorial."""
    here = _repository_path(page.file.src_uri)

    def link(found: re.Match[str]) -> str:
        bang, text, target, anchor = found.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        if (ROOT / path).is_dir():
            return text
        place = posixpath.relpath(_site_path(path), posixpath.dirname(page.file.src_uri) or ".")
        return f"{bang}[{text}]({place}{anchor or ''})"

    text = "".join(part if part.startswith("```") else LINK.sub(link, part) for part in parts(markdown))
    return _offered(page.file.src_uri, text) if page.file.src_uri in TUTORIALS else text


def _offered(page: str, markdown: str) -> str:
    """Puts a link to the notebook under the heading of a tutorial."""
    heading, _, rest = markdown.partition("\n")
    name = posixpath.basename(notebook_path(page))
    return f"{heading}\n\n[This page as a notebook]({name}){{: download={name} }}\n{rest}"


def _linked(file: File) -> Iterator[str]:
    """Paths of the files that a page links to, if they are no pages and lie outside `docs/`."""
    here = posixpath.dirname(_repository_path(file.src_uri))
    for part in parts(file.content_string):
        for found in [] if part.startswith("```") else LINK.finditer(part):
            path = posixpath.normpath(posixpath.join(here, found[3]))
            if (ROOT / path).is_file() and path not in PAGES and not path.startswith("docs/"):
                yield path


def _repository_path(page: str) -> str:
    """The path in the repository of a page of the site."""
    return next((path for path, name in PAGES.items() if name == page), f"docs/{page}")


def _site_path(path: str) -> str:
    """The path in the site of a file of the repository. Code becomes text, which browsers show."""
    if path in PAGES or path.startswith("docs/"):
        return PAGES.get(path, path.removeprefix("docs/"))
    return path if path.endswith(".png") else f"source/{path}.txt"


def _python() -> str:
    intro = "# Python reference\n\nAll public names, from their docstrings. [What is public](../api.md) lists them.\n"
    return "\n".join([intro, *(f"## {name.removesuffix('.public')}\n\n::: {name}\n" for name in PACKAGES)])


def _options() -> str:
    intro = "# All options\n\nBy command. [Options](../options.md) tells where values come from.\n"
    package = griffe.load("vlmenv", search_paths=[str(ROOT)])
    parts = [intro]
    for title, names in OPTIONS.items():
        parts += [f"## {title}\n", *(_fields(package[name], f"vlmenv.{name}") for name in names)]
    return "\n".join(parts)


def _fields(config: Any, name: str) -> str:
    """Shows the options of a dataclass, without its methods and its groups, whose dataclasses are shown themselves."""
    groups = ("Options", "Config", "AlgorithmT")
    fields = {field: str(member.annotation) for field, member in config.members.items() if member.is_attribute}
    members = "".join(f"\n        - {field}" for field, kind in fields.items() if not kind.endswith(groups))
    return f"::: {name}\n    options:\n      show_labels: false\n      members:{members or ' false'}\n"
