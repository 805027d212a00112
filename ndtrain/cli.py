"""The commands `run`, `inspect` and `convert`. Thin and quick to start: torch, transformers, pydantic and rich are
imported inside the commands, torch only after the recipe has been read.
"""

import contextlib
import errno
import gc
import os
import signal
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import ndtrain
from ndtrain.errors import NdtrainError, PlanError, RecipeError, Reported, Stopped, counted
from ndtrain.runs.environment import speaks_for_all, started_by_run, under_torchrun
from ndtrain.runs.launcher import launch_workers, local_world_size
from ndtrain.runs.output import outlive_output
from ndtrain.runs.reports import print_error
from ndtrain.runs.restarts import Restarts
from ndtrain.runs.stop_signals import INTERRUPTED, STOP_SIGNALS, StopSignals
from ndtrain.runs.versions import outside_bounds
from ndtrain.storage.paths import to_path

if TYPE_CHECKING:
    from ndtrain.recipe import Recipe

# Seconds that ranks other than 0 wait for rank 0 to print an error, for it may still be importing torch.
LEAVE_AFTER_S = 10.0
# Where a run is stopped, all ranks are at the same point; torchrun kills them some time after Ctrl-C.
STOPPED_AFTER_S = 3.0


# Errors of what is printed; those of files that commands write are theirs.
_NOT_WRITTEN = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


app = typer.Typer(
    name="ndtrain",
    help="Train any Hugging Face causal language model with N-D parallelism, from a TOML recipe.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # rich is slow to import; only ndtrain.console uses it
    pretty_exceptions_enable=False,
)


RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", parser=to_path, help="The TOML recipe.")]


SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. --set train.steps=10. Repeatable."),
]


def main() -> None:
    """Run the command line. An `NdtrainError` is printed without a traceback and exits with its own code."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupt)
    prints = speaks_for_all()  # under torchrun every rank meets the same error
    try:
        code = app(prog_name="ndtrain", standalone_mode=False)
    except Reported as error:
        _leave(error.exit_code)
    except NdtrainError as error:
        if prints:
            print_error(error)
        shared = prints or isinstance(error, RecipeError | PlanError | Stopped)  # rank 0 meets those too
        wait_s = STOPPED_AFTER_S if isinstance(error, Stopped) else LEAVE_AFTER_S
        _leave(error.exit_code, first=prints, wait_s=wait_s, untold=None if shared else error)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except OSError as error:
        if error.errno not in _NOT_WRITTEN:
            raise
        if isinstance(error, BrokenPipeError):
            _leave_pipe()
        # The flush at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print_error(NdtrainError(f"the output cannot be written: {error.strerror or error}"))
        sys.exit(NdtrainError.exit_code)
    except Exception as error:
        show = getattr(error, "show", None)  # a usage error of click, whose copy Typer does not export
        if show is None:
            raise
        if prints:
            show()
        sys.exit(getattr(error, "exit_code", 2))
    sys.exit(code if isinstance(code, int) else 0)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Print that Ctrl-C ends the command, now, since Typer catches the exception."""
    if speaks_for_all():
        print("ndtrain: stopped by Ctrl-C", file=sys.stderr, flush=True)
    raise KeyboardInterrupt


def _leave(code: int, *, first: bool = True, wait_s: float = LEAVE_AFTER_S, untold: NdtrainError | None = None) -> None:
    """Exit with `code` on every rank, rank 0 first and the others after `wait_s` seconds.

    `untold` is an error that rank 0 may not have met, which this rank prints.

    torchrun kills the other workers as soon as one has failed. If another rank were first, rank 0 might be killed
    before it has printed the error. A worker that torchrun ends while it waits still exits with `code`.
    """
    if under_torchrun():
        sys.stdout.flush()
        sys.stderr.flush()
        signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
        if not first:
            # The first rank of a node to end ends the others of the node.
            time.sleep(wait_s + int(os.environ.get("LOCAL_RANK", 0)) / 2)
        if untold is not None:
            print_error(untold, f"rank {os.environ['RANK']}: ")
        # Python restores the default handlers before it ends: a late signal would replace `code`.
        for number in (signal.SIGINT, *STOP_SIGNALS):
            signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def _version(asked: bool) -> None:
    if asked:
        _print(f"ndtrain {ndtrain.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


@app.command()
def run(
    recipe: RecipeArgument,
    eval_only: Annotated[
        bool,
        typer.Option(
            "--eval-only", help="Print the held-out loss of the newest checkpoint, or of the model; train nothing."
        ),
    ] = False,
    set_: SetOption = None,
) -> None:
    """Train: under torchrun as one of its workers, otherwise by starting a local worker for each rank."""
    resolved = _load(recipe, set_)
    if eval_only and resolved.eval is None:
        raise RecipeError("--eval-only needs held-out data: give its path in [eval]")
    run_dir = to_path(resolved.run.dir)
    stop_signals = StopSignals(run_dir)
    stop_signals.listen()  # before the import of torch, which takes seconds
    outlive_output()
    if not under_torchrun():
        ranks = local_world_size(resolved)
        if ranks > 1:
            _print_notes(resolved)
            _print(f"ndtrain {ndtrain.__version__}: {recipe}: starting {counted(ranks, 'worker')}")
            arguments = [part for value in set_ or () for part in ("--set", value)]
            only = ["--eval-only"] if eval_only else []
            raise typer.Exit(launch_workers(ranks, ["run", *only, *arguments, "--", str(recipe)]))
    Restarts.of_process(run_dir).refuse_stopped()
    if not started_by_run():
        _print_notes(resolved)
    if speaks_for_all():
        _print(f"ndtrain {ndtrain.__version__}: {recipe}: loading torch and transformers")

    with _without_gc(), stop_signals.importing():
        from transformers import PreTrainedModel  # noqa: F401

        from ndtrain import console, train

    if eval_only:
        train.evaluate(resolved, console.Reporter())
    else:
        train.run(resolved, console.Reporter(), stop_signals)


class _OptionalNumber(typer.core.TyperCommand):
    """A command whose `--data` may stand without its number."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for index, (name, value) in reversed(list(enumerate(pairwise([*args, ""])))):
            if name == "--data" and not value.isdecimal():
                args.insert(index + 1, "0")
        return super().parse_args(ctx, args)


def _print_data(recipe: "Recipe", rows: int, *, as_json: bool) -> None:
    _print_notes(recipe)
    _print_waiting()
    with _without_gc():
        from ndtrain.console.data import data_text
    _print(data_text(recipe, rows=rows, as_json=as_json))


@app.command(cls=_OptionalNumber)
def inspect(
    recipe: RecipeArgument,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Ranks to plan for; by default the size of the recipe's mesh.")
    ] = None,
    rank: Annotated[int, typer.Option(min=0, help="The rank to show.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    layer: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="Show only parameters whose names or modules match, e.g. '*.layers.3'."),
    ] = None,
    diff: Annotated[
        Path | None,
        typer.Option(metavar="OTHER", parser=to_path, help="A recipe to compare with; --set applies to both."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Run one step on tensors without data: peak memory, FLOPs, collectives.")
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            help="Estimate the step's time on a100, h100, h200, b200, mi300x, or own figures, e.g. h100,memory=94e9."
        ),
    ] = None,
    ranks_per_node: Annotated[int, typer.Option(min=1, help="Ranks on each node.")] = 8,
    suggest: Annotated[
        bool,
        typer.Option("--suggest", help="Search for the fastest meshes that fit --world-size devices of type --device."),
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", parser=to_path, help="Write the plan and a step as one self-contained HTML page."),
    ] = None,
    svg: Annotated[
        Path | None, typer.Option(metavar="FILE", parser=to_path, help="Write the mesh as an SVG picture.")
    ] = None,
    data: Annotated[
        int | None,
        typer.Option(
            metavar="[ROWS]",
            min=0,
            help="Show so many rows as the model gets them; without a number, what is in the data.",
        ),
    ] = None,
    set_: SetOption = None,
) -> None:
    """Print the mesh, the plan, the memory and the cost of a run, or its data, without starting it."""
    resolved = _load(recipe, set_)
    if data is not None:
        if dry_run or suggest or rank or any(one is not None for one in (world_size, layer, diff, device, html, svg)):
            raise RecipeError("--data shows the data alone; it allows only --json and --set")
        _print_data(resolved, data, as_json=as_json)
        return
    other = _load(diff, set_) if diff is not None else None
    if other is not None and (dry_run or device is not None or html is not None or svg is not None):
        raise RecipeError("--diff compares plans; leave out --dry-run, --device, --html and --svg")
    if suggest and (world_size is None or device is None):
        raise RecipeError("--suggest needs --world-size and --device")
    if suggest and (other is not None or dry_run or layer is not None or rank or html is not None or svg is not None):
        raise RecipeError("--suggest allows only --world-size, --device, --ranks-per-node, --json and --set")
    _check_written([file for file in (html, svg) if file is not None], [recipe, *([diff] if diff is not None else [])])
    if html is not None and layer is not None:
        raise RecipeError("--html shows the whole plan; leave out --layer")
    _print_notes(resolved)
    _print_waiting()

    with _without_gc():
        from transformers import PreTrainedModel  # noqa: F401

        from ndtrain.console.inspect import inspect_text, suggest_text

    if suggest:
        assert world_size is not None and device is not None
        _print(
            suggest_text(resolved, world_size=world_size, device=device, ranks_per_node=ranks_per_node, as_json=as_json)
        )
        return
    _print(
        inspect_text(
            resolved,
            world_size=world_size,
            rank=rank,
            as_json=as_json,
            layer=layer,
            other=other,
            dry_run=dry_run or html is not None,
            device=device,
            ranks_per_node=ranks_per_node,
            html=html,
            svg=svg,
        )
    )
    for written in filter(None, (html, svg)):
        print(f"ndtrain: wrote {written}", file=sys.stderr)


@app.command()
def convert(
    checkpoint: Annotated[
        str,
        typer.Argument(metavar="CHECKPOINT", help="A step-... directory (or URL), or a Hugging Face or DCP directory."),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The local directory to write.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="Dtype of the floating-point tensors; by default the one that the model's config names."),
    ] = None,
    max_shard_size: Annotated[str | None, typer.Option(help="Largest file, e.g. 500MiB; by default 5GB.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read everything back and compare it before OUT appears.")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            parser=to_path,
            help="The model's config.json, for a DCP directory that another tool wrote.",
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
) -> None:
    """Convert a checkpoint to a directory that from_pretrained reads, or such a directory to a checkpoint."""
    _print_notes()
    _print_waiting()
    with _without_gc():
        from ndtrain import console
        from ndtrain import convert as converter

    target = to_path(out)
    with console.ByteProgress() as progress:
        notes = converter.convert(
            to_path(checkpoint),
            target,
            dtype=dtype,
            max_shard_size=max_shard_size,
            verify=verify,
            config=config,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    for note in notes:
        print(f"ndtrain: note: {note}", file=sys.stderr)
    found = converter.written(target)
    parts = [
        ", ".join(found.dtypes),
        f"{console.size(found.nbytes)} in {counted(found.files, 'safetensors file')}",
        *["every bit read back and compared"] * verify,
    ]
    _print(f"wrote {target}: {', '.join(parts)}")


@contextlib.contextmanager
def _without_gc() -> Iterator[None]:
    """Keep the garbage collector from walking the modules imported inside, which live until the process exits."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _load(recipe: Path, overrides: list[str] | None) -> "Recipe":
    from ndtrain.recipe import load_recipe

    return load_recipe(recipe, overrides or ())


def _check_written(files: list[Path], read: list[Path]) -> None:
    """Raise `RecipeError` if a file cannot be written, is named twice, or is one of those in `read`."""
    for number, file in enumerate(files):
        if not file.parent.is_dir():
            raise RecipeError(f"{file} cannot be written: {file.parent} is not a directory")
        if file.resolve() in [other.resolve() for other in (*files[:number], *read)]:
            raise RecipeError(f"{file} is named twice; give each file a name of its own")


def _print_notes(recipe: "Recipe | None" = None) -> None:
    """Print what the user should know before anything else; on rank 0 alone."""
    if speaks_for_all():
        for note in (*outside_bounds(), *(recipe.notes if recipe is not None else ())):
            print(f"ndtrain: note: {note}", file=sys.stderr)


def _print_waiting() -> None:
    """Tell a person at a terminal at once that something is going on: the imports take seconds."""
    if sys.stderr.isatty():
        print("ndtrain: loading torch and transformers", file=sys.stderr, flush=True)


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # its reader has gone; click would exit with 1
        _leave_pipe()


def _leave_pipe() -> NoReturn:
    """Exit as a program that SIGPIPE ends, so that the flush at exit does not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(141)
