"""Private parts of other libraries are used in `vlmenv/compat` alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from private_use import ROOT, private_lines, scan


def test_nothing_private_is_used_elsewhere() -> None:
    found = {str(file): lines for file, lines in scan(ROOT).items() if not file.is_relative_to("vlmenv/compat")}
    assert not found, "take a public interface, or move it to vlmenv/compat with a self-test"


def test_every_package_is_looked_at(tmp_path: Path) -> None:
    for folder in ("agents/families", "vlmenv/doctor", "vlmenv/compat"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "one.py").write_text("import torch\ntorch._hidden()\n")
    (tmp_path / "vlmenv" / "agents").symlink_to(tmp_path / "agents")
    assert [str(file) for file in scan(tmp_path)] == [
        "agents/families/one.py",
        "vlmenv/compat/one.py",
        "vlmenv/doctor/one.py",
    ]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("from torch._subclasses import FakeTensor", "torch._subclasses.FakeTensor"),
        ("from torch.utils import _pytree", "torch.utils._pytree"),
        ("import transformers.core_model_loading", "module transformers.core_model_loading"),
        ("from peft.tuners.lora import Linear", "peft.tuners.lora.Linear"),
        ("importlib.import_module('vllm.v1.core')", "module vllm.v1.core"),
        ("torch.ops.aten._flash_attention_forward()", "attribute _flash_attention_forward"),
        ("config._attn_implementation = 'sdpa'", "attribute _attn_implementation"),
        ("getattr(part, '_prec', 100)", "attribute _prec"),
        ("model.all_tied_weights_keys", "transformers's all_tied_weights_keys"),
        ("getattr(parameter, 'ds_numel', 1)", "deepspeed's ds_numel"),
        ("os.environ.get('ACCELERATE_MIXED_PRECISION')", "accelerate's ACCELERATE_MIXED_PRECISION"),
        ("inspect.getsource(type(module))", "the text of a source"),
        ("import torch\ntorch.utils.swap_tensors = None", "torch.utils.swap_tensors is replaced"),
    ],
)
def test_private_use_is_found(source: str, reason: str) -> None:
    assert list(private_lines(source).values()) == [reason]


@pytest.mark.parametrize(
    "source",
    [
        "self._known = other._known",
        "def _own(): ...\nmodule._own()",
        "row._replace(text='')",
        "os._exit(1)",
        "from torch.distributed.fsdp import fully_shard",
        "from vlmenv.agents._inner import thing",
        "type(one).__name__",
        "import torch\nmodule.weight = torch.zeros(1)",
    ],
)
def test_public_and_own_use_is_not(source: str) -> None:
    assert private_lines(source) == {}
