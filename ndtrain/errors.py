"""The errors that end a run, each with the exit code that the user sees."""

from errno import EACCES, EEXIST, ENAMETOOLONG, ENOENT, ENOTDIR, EPERM, EROFS

# Errors of the file system that the user can fix, unlike those of a failing machine.
MENDABLE = (EACCES, EEXIST, ENAMETOOLONG, ENOENT, ENOTDIR, EPERM, EROFS)


class NdtrainError(Exception):
    """An error with one clear line for the user and an exit code; printed without a traceback."""

    exit_code = 1


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


def first_line(error: BaseException) -> str:
    """Return the first line of the error's text (two, if it ends with a colon), for use in another message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) if lines and lines[0].endswith(":") else (lines or [""])[0]
    # Without its type, the text of a KeyError says nothing.
    return text if text and type(error).__module__ != "builtins" else f"{type(error).__name__}: {text}"
