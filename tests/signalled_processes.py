"""Run by `accelerate launch`: the last of two processes is signalled while both agree on whether to stop."""

from __future__ import annotations

import os
import signal

from accelerate import Accelerator
from torch import Tensor

from vlmenv.processes import leave
from vlmenv.processes.stopping import Stopping


class Signalled(Accelerator):
    """Signals the last process once, when it has told the others that it has no signal."""

    def gather(self, tensor: Tensor) -> Tensor:
        gathered: Tensor = super().gather(tensor)
        if self.is_last_process and not tensor.any():
            signal.raise_signal(signal.SIGTERM)
        return gathered


with Stopping(accelerator := Signalled(cpu=True)) as stopping:
    agreed = [stopping.requested() for _ in range(3)]
os.write(1, f"rank {accelerator.process_index}: {agreed}\n".encode())  # whole: `print` may write a line in two parts
leave()
