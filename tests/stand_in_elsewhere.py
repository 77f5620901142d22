"""Run as a script: the stand-in server at an address of this machine, until it is ended."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "agents"))
from stand_in_server import Answering, answering, described

from vlmenv.agents.vlm import VLMAgent

if __name__ == "__main__":
    agent = VLMAgent.from_pretrained("builtin")
    served = Answering(described(agent))
    with answering(served, host=sys.argv[1]):
        print(served.url, flush=True)
        threading.Event().wait()
