"""The errors that end a run, each with the exit code that the user sees."""

from collections.abc import Iterator
from errno import EACCES, EEXIST, ENAMETOOLONG, ENOENT, ENOTDIR, EPERM, EROFS

# Errors of the file system that the user can fix, unlike those of a failing machine.
MENDABLE = (EACCES, EEXIST, ENAMETOOLONG, ENOENT, ENOTDIR, EPERM, EROFS)


class NdtrainError(Exception):
    """An error with one clear line for the user and an exit code; printed without a traceback."""

    exit_code = 1
    # The rank that met it, on every rank that raises it with the same words; None on a rank that speaks for itself.
    rank: int | None = None


class RecipeError(NdtrainError):
    """The recipe or the command line is wrong."""

    exit_code = 2


class PlanError(NdtrainError):
    """The recipe is valid, but this model cannot be trained correctly on this mesh."""

    exit_code = 3


class DamagedError(NdtrainError):
    """A checkpoint or an input file is missing, truncated or altered."""

    exit_code = 4


class Stopped(NdtrainError):
    """The run was stopped on request, after saving; started again, it resumes from there."""

    exit_code = 75


class Reported(NdtrainError):
    """An error that this or another rank has printed already; every rank exits with its code."""

    def __init__(self, exit_code: int):
        super().__init__(f"exit code {exit_code}")
        self.exit_code = exit_code


# Parts of messages, in lower case: torch raises most of these as plain `RuntimeError`s.
_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "out of memory",
    "not enough memory",
    "std::bad_alloc",
    "_alloc_failed",
)
_LINKS = ("gloo", "nccl", "connection closed", "connection reset", "connection refused", "broken pipe")
_DEVICE = ("cuda error", "hip error", "cuda driver error")


def out_of_memory(error: BaseException) -> bool:
    """Return whether the host's or a device's memory was too small."""
    return any(
        isinstance(part, MemoryError) or _is_a(part, "OutOfMemoryError") or _says(part, _MEMORY)
        for part in _chain(error)
    )


def lost_peer(error: BaseException) -> bool:
    """Return whether `error` is a failed collective or link, which is what a rank sees when another one is gone."""
    return any(_is_a(part, "DistError") or _says(part, _LINKS) for part in _chain(error))


def of_the_machine(error: BaseException) -> bool:
    """Return whether `error` is of memory, a link, a device, a file or a request, so that it says nothing of a model.

    A model's own code raises nearly anything; what this returns False for may be taken for the model's.
    """
    if isinstance(error, NdtrainError):
        return not isinstance(error, PlanError)
    if not isinstance(error, Exception) or out_of_memory(error) or lost_peer(error):
        return True
    return any(
        isinstance(part, OSError) or _is_a(part, "AcceleratorError") or _says(part, _DEVICE) for part in _chain(error)
    )


def keeps_its_name(error: BaseException) -> bool:
    """Return whether `error` stays what it is where code takes every exception for a fault of the input it reads."""
    return isinstance(error, NdtrainError) or out_of_memory(error)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and the causes that it was raised from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__


def _is_a(error: BaseException, name: str) -> bool:
    """Return whether torch's class `name` is one of the error's; torch itself is slow to import."""
    return any(base.__name__ == name and base.__module__.partition(".")[0] == "torch" for base in type(error).__mro__)


def _says(error: BaseException, parts: tuple[str, ...]) -> bool:
    """Return whether a `RuntimeError` has one of these in its message."""
    return isinstance(error, RuntimeError) and any(part in str(error).lower() for part in parts)


def counted(number: int, noun: str) -> str:
    """Return "1 rank" or "2 ranks", for a message."""
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith('tch') else 's'}"


def one_line(error: BaseException, most: int = 200) -> str:
    """Return the error's text on one line, at most so many characters of it; its class where it has no text."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def first_line(error: BaseException) -> str:
    """Return the first line of the error's text (two, if it ends with a colon), for use in another message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) if lines and lines[0].endswith(":") else (lines or [""])[0]
    # Without its type, the text of a KeyError says nothing.
    return text if text and type(error).__module__ != "builtins" else f"{type(error).__name__}: {text or 'no message'}"
