"""Run by two processes: what one of them does for both."""

from __future__ import annotations

import sys
from pathlib import Path

from accelerate import PartialState

from vlmenv.agents.engines.ranks import broadcast_from_main, num_processes
from vlmenv.core.errors import EngineError
from vlmenv.processes import leave

folder = Path(sys.argv[1])
state = PartialState(cpu=True)


def work() -> list[int]:
    (folder / f"work-{state.process_index}").touch()
    return [state.process_index, 7]


def fail() -> None:
    raise EngineError(f"failed in {state.process_index}")


assert num_processes() == 2
assert broadcast_from_main(work) == [0, 7]
try:
    broadcast_from_main(fail)
except EngineError as error:
    (folder / f"told-{state.process_index}").write_text(str(error))
assert broadcast_from_main(lambda: "after it") == "after it"
leave()
