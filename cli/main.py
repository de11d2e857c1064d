"""`segfleet`: finds the command's file, runs it, and turns what goes wrong into one message and an
exit code.

Exit codes: 0 done, 1 a fault of segfleet or of the machine, 2 something the user can
correct: wrong input, a disk that is full or can only be read, 75 interrupted and resumable.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from typing import Annotated

import typer
from typer.core import TyperGroup

COMMANDS = {  # name -> (module, one line); the lines stand here so that --help imports no command
    "doctor": (
        "doctor",
        "What this machine can do: packages, cores, memory, GPUs, timed convolutions.",
    ),
    "models": ("models", "Registered networks: parameters, multiply-adds, input rules."),
    "datasets": ("datasets", "Known raw layouts; check a raw folder; write a synthetic set."),
    "preprocess": ("preprocess", "Turn a raw data set into an immutable shard store."),
    "recipe": ("recipe", "List, show and validate recipes; print their schema."),
    "plan": ("plan", "Plan a recipe for a store, a device and a budget, and say why."),
    "train": (
        "train",
        "Train every stage of a recipe on this machine; continues where it stopped.",
    ),
    "sweep": ("sweep", "Compare schedules and networks; every common beginning is trained once."),
    "evaluate": ("evaluate", "Score a run on whole cases at their original resolution."),
    "predict": ("predict", "Segment raw images with a run."),
    "best": ("best", "The best recipe or pair of recipes, by cases not trained on."),
    "export": (
        "export",
        "A model that predicts anywhere; predictions and cases for other tools.",
    ),
    "import": (
        "import_",
        "Bring trained weights along: a PyTorch file, or nnU-Net v2's model folder.",
    ),
    "score": ("score", "Score any folder of predictions, of whatever tool, against the truth."),
    "compare": ("compare", "Compare runs case by case: differences, intervals, tests, tables."),
    "report": ("report", "Write a run's report as one HTML file, or its cases as a table."),
    "submit": (
        "submit",
        "Send a recipe to a SLURM cluster; the job comes back by itself after limits and failures.",
    ),
    "status": ("status", "Every run under a folder: state, progress, loss, speed."),
    "logs": ("logs", "What the ranks of a submitted run print."),
    "cancel": ("cancel", "Cancel a submitted run; it saves first."),
    "resume": (
        "resume",
        "Submit a run again as it was submitted before; it goes on from its latest checkpoint.",
    ),
    "slurm-sandbox": (
        "slurm_sandbox",
        "A real SLURM with pretended GPUs on this machine, to try everything out.",
    ),
}


class LazyGroup(TyperGroup):
    """Imports a command's module only when that command runs or shows its help."""

    def list_commands(self, ctx):
        return list(COMMANDS)

    def resolve_command(self, ctx, args):
        if args[0] not in COMMANDS:
            from segfleet.core.errors import did_you_mean

            ctx.fail(f"No such command '{args[0]}'.{did_you_mean(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def get_command(self, ctx, cmd_name):
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"segfleet.cli.{COMMANDS[cmd_name][0]}")
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        single.command(name=cmd_name, short_help=COMMANDS[cmd_name][1])(module.command)
        return typer.main.get_command(single)

    def format_commands(self, ctx, formatter):
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER",
            help="Networks, losses and raw layouts of your own, of any command: a folder laid out "
            "as segfleet is.",
        ),
    ] = None,
) -> None:
    """Train medical image segmentation networks at scale: shards, exact resume, SLURM, sweeps,
    honest scores."""
    if version:
        from importlib.metadata import version as installed

        typer.echo(installed("segfleet"))
        raise typer.Exit()
    if context.invoked_subcommand:
        from segfleet.core import plugins

        plugins.add_installed()
        for folder in plugin or ():
            plugins.add(folder)


def plugins_first(words: list[str]) -> list[str]:
    """--plugin stands before the command for Typer, and anywhere before `--` for people."""
    end = words.index("--") if "--" in words else len(words)
    ahead, rest, given = [], [], iter(words[:end])
    for word in given:
        if word == "--plugin" and (folder := next(given, None)):
            ahead += [word, folder]
        elif word.startswith("--plugin"):
            ahead.append(word if "=" in word else "--plugin=")
        else:
            rest.append(word)
    return [*ahead, *rest, *words[end:]]


def print_error(message: str) -> None:
    sys.stderr.write(f"segfleet: {message}\n")


def document(message: str, code: int, problems: list | None = None) -> None:
    """With --json, what went wrong is a document too, on stdout."""
    if "--json" in sys.argv[1:]:
        import json

        fields = {"error": message, "exit_code": code}
        fields |= {"problems": [problem.as_dict() for problem in problems]} if problems else {}
        try:
            sys.stdout.write(json.dumps(fields, indent=2) + "\n")
        except OSError:
            lost_stdout(quiet=True)  # what went wrong is on stderr


def lost_stdout(quiet: bool = False, probe: str = "") -> int:
    """The exit code if stdout takes no more, on a full disk or where nobody reads; 0 if it does.
    What is left to be written is dropped: Python would try again at its end, and complain.

    `probe`: written first; where Python does not buffer, a failed write leaves no trace.
    """
    try:
        sys.stdout.write(probe)
        sys.stdout.flush()
    except OSError as error:
        from segfleet.core.errors import ExitCode, is_full

        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return ExitCode.FAULT
        if not quiet:
            reason = "no space left on the device" if is_full(error) else error.strerror
            print_error(f"stdout: {reason}. Send the output to another place.")
        return ExitCode.INPUT
    return 0


def exit_code(error: BaseException) -> int:
    """Say what went wrong; the exit code. A fault of ours is re-raised with its traceback, for the
    bug report."""
    from segfleet.core.errors import ExitCode, explain, is_full

    if is_full(error) and not error.filename and (code := lost_stdout(probe="\n")):
        return code
    if explained := explain(error):
        if getattr(error, "problems", None):
            from segfleet.cli.output import problem_table

            problem_table(error)
        else:
            print_error(explained[0])
        document(*explained, getattr(error, "problems", None))
        return explained[1]
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAULT
    document(f"{type(error).__name__}: {error}", ExitCode.FAULT)
    raise error


def interrupted() -> int:
    """After Ctrl-C and other signals."""
    from segfleet.pipeline.launch.local import ignore_stop_signals

    ignore_stop_signals()
    return exit_code(KeyboardInterrupt())


def print_every_name() -> None:
    """Let stdout take paths that are no text, as the bytes that they are: a command must not fail
    at telling what it has done."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        text = sys.stdout.encoding.lower().replace("-", "") == "utf8"
        sys.stdout.reconfigure(errors="surrogateescape" if text else "backslashreplace")


def main() -> None:
    from segfleet.core.process import open_standard_files

    open_standard_files()
    from segfleet.pipeline.launch import local

    local.survive_hangup()
    local.end_as_after_ctrl_c()
    print_every_name()
    try:
        code = app(plugins_first(sys.argv[1:]), prog_name="segfleet", standalone_mode=False)
        if code == 130:  # what Typer makes of Ctrl-C
            code = interrupted()
    except typer.Exit as stop:
        code = stop.exit_code
    except typer.Abort:
        code = interrupted()
    except Exception as error:
        if hasattr(error, "format_message"):  # Typer's own complaint about the command line
            error.show()
            code = 2
            document(error.format_message(), code)
        else:
            code = exit_code(error)
    except KeyboardInterrupt:
        code = interrupted()
    local.ignore_stop_signals()  # it is over: a late Ctrl-C would be a traceback
    code = code if isinstance(code, int) else 0
    lost = lost_stdout(quiet=code != 0)
    sys.exit(code or lost)


if __name__ == "__main__":
    main()
