"""Lists the lines that use private parts of other libraries: `python tests/private_use.py [FOLDER]`.

Private is a name with a leading underscore, a module that the library does not document, an attribute that it does not
promise, and the text of its source.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("vlmenv", "agents", "algos", "envs")

DOCUMENTED = {
    *("PIL.Image", "gymnasium.envs.registration", "gymnasium.vector", "gymnasium.vector.utils", "gymnasium.spaces"),
    *("gymnasium.utils.seeding", "matplotlib.backends.registry", "matplotlib.ticker"),
    *("huggingface_hub.errors", "huggingface_hub.utils", "numpy.typing", "packaging.requirements", "packaging.utils"),
    *("pycocotools.coco", "pycocotools.cocoeval", "scipy.optimize"),
    *("rich.console", "rich.markup", "rich.measure", "rich.progress", "rich.table", "rich.text"),
    *("matplotlib.axes", "matplotlib.figure", "safetensors.numpy", "safetensors.torch", "sympy.core.function"),
    *("accelerate.state", "accelerate.utils", "deepspeed.zero", "transformers.utils", "transformers.utils.logging"),
    *("torch.autograd.function", "torch.autograd.graph", "torch.optim.adamw", "torch.optim.lr_scheduler"),
    *("torch.distributed.checkpoint.state_dict", "torch.distributed.device_mesh", "torch.distributed.fsdp"),
    *("torch.distributed.tensor", "torch.nn", "torch.nn.functional", "torch.utils.checkpoint"),
    *("vllm.distributed.weight_transfer", "vllm.entrypoints.openai.api_server"),
    "vllm.model_executor.model_loader.reload",
}
"""Submodules of other libraries that their documentation names."""
UNPROMISED = {
    "transformers": {
        *("all_tied_weights_keys", "layer_idx", "deepstack_visual_indexes", "get_resize_output_image_size"),
        *("check_argument_for_proper_class", "from_args_and_dict", "get_attributes", "get_processor_dict"),
    },
    "peft": {"lora_A", "lora_B", "scaling", "base_layer"},
    "deepspeed": {
        *("parameter_offload", "fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "clip_grad"),
        *("refresh_fp32_params", "overflow", "forward_hooks", "backward_hooks", "ds_numel"),
    },
    "accelerate": {"ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_"},
    "vllm": {
        *(
            "model_runner",
            "encoder_cache",
            "encoder_outputs",
            "loaded_weights",
            "load_numel",
            "process_weights_after_loading",
            "engine_core",
            "reset_encoder_cache",
        ),
        "get_tp_group",
    },
    "PIL": {"fp"},
}
"""Attributes and names that libraries do not promise."""
_DOCUMENTED = {"_replace", "_asdict", "_fields", "_make", "_exit"}
"""Hidden names of the standard library that it documents: those of named tuples, and `os._exit`."""
_BY_NAME = {"getattr", "setattr", "hasattr", "delattr"}


def private_lines(source: str, ours: Iterable[str] = ()) -> dict[int, str]:
    """The lines of a module that use private parts of other libraries, each with the reason.

    Args:
        source: The text of the module.
        ours: Names of functions of this package.
    """
    nodes = list(ast.walk(ast.parse(source)))
    own = {*ours, *_functions(nodes), *_DOCUMENTED}
    own |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and _is_own(node.value)}
    foreign = {name for node in nodes for name in _imported(node)}
    found: dict[int, str] = {}
    for node in nodes:
        for reason in _reasons(node, own, foreign):
            found.setdefault(node.lineno, reason)  # type: ignore[attr-defined]
    return dict(sorted(found.items()))


def _functions(nodes: Iterable[ast.AST]) -> set[str]:
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def _imported(node: ast.AST) -> Iterator[str]:
    """The names by which a module knows other libraries, and what it imports of them."""
    if isinstance(node, ast.Import):
        yield from (one.asname or one.name.split(".")[0] for one in node.names if _is_foreign(one.name))
    elif isinstance(node, ast.ImportFrom) and node.module and _is_foreign(node.module):
        yield from (one.asname or one.name for one in node.names)


def _reasons(node: ast.AST, own: set[str], foreign: set[str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (f"module {one.name}" for one in node.names if _is_private_module(one.name))
    elif isinstance(node, ast.ImportFrom) and node.module:
        yield from (f"{node.module}.{one.name}" for one in node.names if _is_private(node.module, one.name))
    elif isinstance(node, ast.Attribute) and not _is_own(node.value):
        if _is_hidden(node.attr) and node.attr not in own:
            yield f"attribute {node.attr}"
        if isinstance(node.ctx, ast.Store) and _root(node) in foreign:
            yield f"{ast.unparse(node)} is replaced"
        yield from _unpromised(node.attr)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield from _unpromised(node.value)
    elif isinstance(node, ast.Call):
        yield from _reasons_of_call(node)


def _reasons_of_call(node: ast.Call) -> Iterator[str]:
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    texts = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
    if called == "getsource":
        yield "the text of a source"
    elif called in ("import_module", "run_module"):
        yield from (f"module {text}" for text in texts if _is_private_module(text))
    elif called in _BY_NAME:
        yield from (f"attribute {text}" for text in texts if _is_hidden(text) and text not in _DOCUMENTED)


def _unpromised(name: str) -> Iterator[str]:
    return (f"{library}'s {name}" for library, names in UNPROMISED.items() if name in names)


def _root(node: ast.AST) -> str:
    """The name at the beginning of `name.attribute.attribute`."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _is_own(value: ast.AST) -> bool:
    """True for `self`, `cls` and `super()`."""
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Name) and value.func.id == "super"
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


def _is_hidden(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name != "_"


def _is_foreign(module: str) -> bool:
    return module.split(".")[0] not in {*sys.stdlib_module_names, "vlmenv"}


def _is_private_module(name: str) -> bool:
    return _is_foreign(name) and "." in name and (name not in DOCUMENTED or any(map(_is_hidden, name.split("."))))


def _is_private(module: str, name: str) -> bool:
    return _is_private_module(module) or (_is_foreign(module) and _is_hidden(name))


def scan(root: Path) -> dict[Path, dict[int, str]]:
    """Private use in all modules of the package, by file. Links are not followed."""
    files = sorted(file for folder in FOLDERS for file in (root / folder).rglob("*.py"))
    sources = {file: file.read_text("utf-8") for file in files if file.resolve() == file.absolute()}
    ours = {name for source in sources.values() for name in _functions(ast.walk(ast.parse(source)))}
    found = {file.relative_to(root): private_lines(source, ours) for file, source in sources.items()}
    return {file: lines for file, lines in found.items() if lines}


def main() -> None:
    """Prints each line with its reason, and the number of lines outside and inside `compat`."""
    root = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT
    found = scan(root)
    for file, lines in found.items():
        for number, reason in lines.items():
            print(f"{file}:{number}: {reason}")
    inside = sum(len(lines) for file, lines in found.items() if "compat" in file.parts)
    print(f"{sum(map(len, found.values())) - inside} lines outside of vlmenv/compat, {inside} in it")


if __name__ == "__main__":
    main()
