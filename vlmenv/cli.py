"""The command `vlmenv`: the names of its commands, each of which is imported when it is called."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gymnasium

import vlmenv
from vlmenv.core.errors import ConfigError, VLMEnvError, unknown_name

PROGRAM: Final = "vlmenv"


@dataclass(frozen=True, slots=True)
class Command:
    """A command, which its module parses and runs by `parse(args, program)` and `run(asked)`."""

    module: str
    summary: str


COMMANDS: Final = {
    "train": Command("train", "train a model by reinforcement learning"),
    "eval": Command("evaluate", "measure how well a model answers, on one data set or on a paper's"),
    "sample": Command("sample", "divide a data set into easy, medium and hard rows by a model's pass rates"),
    "answer": Command("answer", "ask a model about your own pictures, and draw what it answers"),
    "pipeline": Command("pipeline", "run stages of training and sampling, one after the other"),
    "export": Command("export", "write a trained model with a model card, to keep or to upload"),
    "report": Command("report", "write a run's report for the browser, or serve it while the run goes on"),
    "serve": Command("serve", "serve a model with vLLM, to generate for training"),
    "serve-env": Command("serve_env", "serve an environment over HTTP, in OpenEnv's form"),
    "doctor": Command("doctor", "check that model, processor, engine and data fit together"),
    "score": Command("score", "score answers that exist already, with every reward term"),
    "data check": Command("data", "find everything that is wrong with a data set"),
    "data convert": Command("convert", "write a data set of another layout as rows that the tasks read"),
    "data export": Command("data_export", "write a task's samples and rewards as files for another trainer"),
    "data show": Command("show", "show what a model is shown of one sample"),
    "envs": Command("envs", "list the registered environments"),
    "recipes": Command("recipes", "list the published recipes"),
}
"""By the words that call them."""


def main(args: Sequence[str] | None = None) -> None:
    """Runs a command. Wrong input ends the process with status 1 and one message."""
    args = list(sys.argv[1:] if args is None else args)
    _open_closed_streams()
    debug = "--debug" in args
    try:
        _run([arg for arg in args if arg != "--debug"])
    except BrokenPipeError:  # the reader of the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (VLMEnvError, gymnasium.error.Error, OSError, MemoryError, RuntimeError) as error:
        if debug or (message := _told(error)) is None:
            raise
        _print_error(message)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _open_closed_streams() -> None:
    """Opens standard streams that were closed at the start, lest another file be opened under their number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115


def _run(args: list[str]) -> None:
    if not args or args[0] in ("--help", "-h"):
        print(_overview())
    elif args[0] == "--version":
        print(f"{PROGRAM} {vlmenv.__version__}")
    else:
        command, rest = find_command(args)
        command.run(command.parse(rest, f"{PROGRAM} {' '.join(args[: len(args) - len(rest)])}"))


def find_command(args: Sequence[str]) -> tuple[Any, list[str]]:
    """The module of the command that arguments begin with, and the arguments after its name.

    Raises:
        ConfigError: There is no such command.
    """
    for words in (2, 1):
        if (name := " ".join(args[:words])) in COMMANDS:
            return importlib.import_module(f"vlmenv.commands.{COMMANDS[name].module}"), list(args[words:])
    inner = [name for name in COMMANDS if name.startswith(f"{args[0]} ")]
    if inner:
        raise ConfigError(f"say what to do: {', '.join(f'{PROGRAM} {name}' for name in inner)}")
    raise ConfigError(unknown_name("command", args[0], COMMANDS))


def _overview() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items())
    return (
        f"usage: {PROGRAM} COMMAND [OPTIONS]\n\nReinforcement learning for vision-language models.\n\n"
        f"commands:\n{commands}\n\n"
        f"{PROGRAM} COMMAND --help explains the options of a command. --version prints the version. "
        "With --debug, errors show a traceback."
    )


def _told(error: BaseException) -> str | None:
    """The message about an error that users can act on; None for any other."""
    if isinstance(error, VLMEnvError | gymnasium.error.Error):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which need not have been imported
        less = "--micro-batch-size, --prompts-per-step, --batch-size or --max-new-tokens"
        return f"the GPU's memory is full: lower {less}. {error}"
    if isinstance(error, OSError | MemoryError):
        return f"{type(error).__name__}: {error}"
    if re.search("Connection (closed|reset) by peer", str(error)):
        return "another process has ended; its own message says why"
    if unreached := re.search(r"connectFullMesh failed with (?:\[/\S+\] )?(.+)", str(error)):
        return (
            f"the processes of this run do not reach each other ({unreached[1]}). On several machines, set "
            "GLOO_SOCKET_IFNAME to the network interface that the others reach, and let them through its firewall"
        )
    if waited := re.search(r"(?:imed out waiting|wait timeout after|Timed out after) (\d+) ?(ms|seconds)", str(error)):
        seconds = int(waited[1]) / (1000 if waited[2] == "ms" else 1)
        return (
            f"another process has not answered for {seconds:.0f} seconds: it hangs, its machine is cut "
            "off, or its work takes longer. Then raise --rank-timeout"
        )
    return None


def _print_error(message: str) -> None:
    from vlmenv.core.console import open_console, styled  # here, as `--version` need not wait for rich

    where = f" in process {os.environ.get('RANK')}" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    told = styled((f"error{where}:", "bold red"), f" {message}")
    open_console(stderr=True).print(told, soft_wrap=True)
