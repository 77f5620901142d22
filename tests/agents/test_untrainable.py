"""What cannot be trained is refused by config.json alone: these folders have no weights."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmenv.agents.families import weightless_family
from vlmenv.agents.vlm import VLMAgent, find_model
from vlmenv.cli import main
from vlmenv.core.errors import ModelError


def folder_with(folder: Path, *, weights: bool = False, **changes: Any) -> Path:
    """The built-in model's folder with other keys in its config.json, and maybe without weights."""
    shutil.copytree(find_model("builtin"), folder, dirs_exist_ok=True)
    if not weights:
        (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        config[name] = config[name] | value if isinstance(config.get(name), dict) else value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


KINDS = {
    "bitsandbytes, 4 bits": {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False},
    "bitsandbytes, 8 bits": {"load_in_8bit": True},
    "AWQ": {"quant_method": "awq", "bits": 4},
    "GPTQ": {"quant_method": "gptq", "bits": 4},
    "FP8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "mxfp4": {"quant_method": "mxfp4"},
    "of no kind": {"bits": 4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_weights_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, quantization_config=KINDS[kind])
    with pytest.raises(ModelError, match=rf"quantised \({kind}\).* give the unquantised weights of the same model"):
        VLMAgent.from_pretrained(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"text_config": {"quantization_config": {"quant_method": "awq"}}},
        {"compression_config": {"quant_method": "AWQ"}},
    ],
)
def test_quantisation_of_a_part_is_found(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"quantised \(AWQ\)"):
        find_model(folder_with(tmp_path, **changes))


def test_a_file_beside_the_configuration_may_say_it(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    with pytest.raises(ModelError, match=r"quantised \(NVFP4\)"):
        find_model(folder)


def test_null_is_no_quantisation(tmp_path: Path) -> None:
    assert find_model(folder_with(tmp_path, quantization_config=None)) == tmp_path


@pytest.mark.parametrize("command", ["train", "eval", "doctor"])
def test_commands_say_so_before_data_are_read(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_with(tmp_path, quantization_config={"quant_method": "gptq"})
    with pytest.raises(SystemExit):
        main([command, "--model", str(folder), "--device", "cpu"])
    told = capsys.readouterr()
    assert "(GPTQ)" in told.out + told.err  # in a table, lines are cut between words
    assert "Traceback" not in told.err


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize("part", ["whole", "text_config"])
def test_another_attention_is_replaced_with_a_line(
    key: str, part: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, builtin: VLMAgent
) -> None:
    asked = {key: "flash_attention_2"}
    folder = folder_with(tmp_path, weights=True, **(asked if part == "whole" else {part: asked}))
    with caplog.at_level(logging.WARNING, "vlmenv"):
        agent = VLMAgent.from_pretrained(folder)
    (line,) = [one.getMessage() for one in caplog.records if one.name.startswith("vlmenv")]
    assert "asks for attention by flash_attention_2; sdpa is used instead" in line
    ids = torch.arange(7, 20)[None]
    assert torch.equal(agent.family.model(ids).logits, builtin.family.model(ids).logits)
    weightless_family(folder)
    agent.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_attention_that_is_there_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = folder_with(tmp_path, weights=True, _attn_implementation="eager")
    with caplog.at_level(logging.WARNING, "vlmenv"):
        VLMAgent.from_pretrained(folder)
    assert not [one for one in caplog.records if one.name.startswith("vlmenv")]
