"""Single- and multi-process training: all differences between the two live here."""

from vlmenv.processes.base import Processes
from vlmenv.processes.launch import end_with_parent, leave, processes_of
from vlmenv.processes.meeting import meet

__all__ = ["Processes", "end_with_parent", "leave", "meet", "processes_of"]
