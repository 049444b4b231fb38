"""The command line: `cbs-opt`. Data on stdout, progress on stderr; see `errors` for exit codes."""

from cbs_opt.cli.app import app, main

__all__ = ["app", "main"]
