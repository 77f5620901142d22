"""`vlmenv report`: writes the report of runs, or serves it while they go on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlmenv.core.console import open_console, say
from vlmenv.core.errors import ConfigError
from vlmenv.options.parsing import parse_plain
from vlmenv.options.report import ReportConfig
from vlmenv.runs.report import write_report
from vlmenv.runs.report_server import ReportServer


def parse(args: Sequence[str], program: str) -> ReportConfig:
    """The options of a command line."""
    config: ReportConfig = parse_plain(args, ReportConfig(()), program)
    return config


def run(config: ReportConfig) -> Path | None:
    """Writes the report and returns its file; with `serve`, serves it until the process is interrupted."""
    if not config.runs:
        raise ConfigError("name the folder of a run, as in vlmenv report runs/first")
    console = open_console()
    if config.serve:
        with ReportServer(config.runs, config.port) as server:
            say(f"the report is at {server.url} for this machine alone; Ctrl+C ends it", console)
            server.serve_forever()
        return None
    own = config.runs[0] / "report.html" if len(config.runs) == 1 else Path("report.html")
    file = config.output or own
    write_report(config.runs, file)
    say(f"the report is {file}, {file.stat().st_size / 1e6:.1f} MB: open it in a browser", console)
    return file
