"""Options of `vlmenv report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from vlmenv.core.errors import ConfigError, require


@dataclass(frozen=True)
class ReportConfig:
    """Write the report of one or several runs: one HTML file, which needs no network."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs. Several runs have their curves over each other, those that differ in their seed alone as a
    band, and a table of what differs."""
    output: Path | None = None
    """File to write (.html). None: report.html in the run's folder, or in the current folder for several runs."""
    serve: bool = False
    """Follow runs that go on: serve the report on this machine (127.0.0.1), made anew when a run has new results."""
    port: int = 0
    """Port to listen on, with `serve`. 0: a free one."""

    def __post_init__(self) -> None:
        require(0 <= self.port < 65536, f"port is a number from 0 to 65535, not {self.port}")
        if self.serve and self.output is not None:
            raise ConfigError("output is not written while the report is served: leave out --serve or --output")
        if self.port and not self.serve:
            raise ConfigError("port goes with --serve")
        if self.output is not None and self.output.suffix.lower() not in (".html", ".htm"):
            raise ConfigError(f"{self.output}: the report is an .html file")
