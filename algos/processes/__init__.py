"""Training by one process, or by several: what is otherwise then, and nowhere else."""

from vlmenv.algos.processes.base import Processes
from vlmenv.algos.processes.launch import processes_of

__all__ = ["Processes", "processes_of"]
