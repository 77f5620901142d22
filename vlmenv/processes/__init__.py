"""Training by one process, or by several: what is otherwise then, and nowhere else."""

from vlmenv.processes.base import Processes
from vlmenv.processes.launch import processes_of

__all__ = ["Processes", "processes_of"]
