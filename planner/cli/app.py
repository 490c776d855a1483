"""The command line: its commands (one file each), and how it ends.

`--json` prints one object on standard output, and without it people get the answer there too; progress, warnings and errors
go to standard error. Exit status: 0, 1 for an error, 2 for usage, 3 for a budget that cannot be met; 130 for Ctrl-C, and 141
where nobody reads standard output any more, as shells have it.
"""

import os
import re
import sys
import warnings
from contextlib import suppress
from typing import Annotated, Any, NoReturn

import typer

from ..ir.errors import MemplanError
from .alloc import alloc
from .cache import cache
from .calibrate import calibrate
from .check import check
from .fit import fit
from .flags import in_flags
from .machines import machines
from .map import map_
from .plan import plan
from .run import run
from .show import show
from .sweep import sweep
from .terminal import INTERRUPTED, end, fail, put, say, warn

ClickException: Any = typer.BadParameter.__mro__[2]  # typer has click inside, or beside it, by its version
EXAMPLE = 'To begin with: memplan run "hf:gpt2?n_layer=2&batch=2&seq=64" --budget 50%'

app = typer.Typer(
    help="Say how many bytes you have; get the fastest training step that provably fits.",
    epilog=EXAMPLE,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (plan, fit, show, check, run, sweep, machines, calibrate, cache, alloc):
    app.command()(command)
app.command(name="map")(map_)


def print_version(wanted: bool) -> None:
    """Print the version, and end."""
    if wanted:
        from ... import __version__

        put(f"memplan {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print memplan's version.", callback=print_version, is_eager=True)
    ] = False,
) -> None:
    """What stands before a command; its help is the app's."""


def main(arguments: list[str] | None = None) -> None:
    """The console entry point."""
    words = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in words
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # closed by the caller: there is nobody to tell
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # not a stream of text, or one that is in use
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: warn(message)
            status = app(words, prog_name="memplan", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        interrupted()
    except ClickException as error:
        usage(error, as_json)
    except (MemplanError, OSError, MemoryError) as error:
        fail(error, as_json)
    else:
        if status == INTERRUPTED:  # typer's own way to say it
            interrupted()
        if status:
            raise SystemExit(status)


def usage(error: Any, as_json: bool) -> NoReturn:
    """End the process with a mistake in how it was called, in one line: click's words, and where the help is."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        raise SystemExit(2)
    message = re.sub(r"^Invalid value: |Value error, ", "", error.format_message()).rstrip(".")
    message = re.sub(r"\(Possible options: (.*)\)$", r"; did you mean \1?", message).replace(" ;", ";")
    message = in_flags(message[:1].lower() + message[1:])
    context = getattr(error, "ctx", None)
    told = f"{message} (memplan{' ' + context.info_name if context is not None and context.parent else ''} -h says more)"
    end({"error": message, "kind": "UsageError"}, told, error.exit_code, as_json)


def interrupted() -> NoReturn:
    """End the process after Ctrl-C."""
    say("interrupted")
    raise SystemExit(INTERRUPTED)


if __name__ == "__main__":
    main()
