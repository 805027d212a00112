"""The errors that end a run, each with the exit code that the user sees."""

from errno import EACCES, EEXIST, ENAMETOOLONG, ENOENT, ENOTDIR, EPERM, EROFS

# What the file system says of a path that the user can change, as opposed to a machine that fails.
MENDABLE = (EACCES, EEXIST, ENAMETOOLONG, ENOENT, ENOTDIR, EPERM, EROFS)


class NdtrainError(Exception):
    """An error with one clear line for the user and an exit code; printed without a traceback."""

    exit_code = 1


class RecipeError(NdtrainError):
    """The recipe or the command line is wrong."""

    exit_code = 2


class PlanError(NdtrainError):
    """The recipe is well formed, but this model cannot be trained rightly on this mesh."""

    exit_code = 3


class DamagedError(NdtrainError):
    """A checkpoint or an input file is missing, truncated or altered."""

    exit_code = 4


class Stopped(NdtrainError):
    """The run was stopped on request, after saving; resuming goes on from there."""

    exit_code = 75


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[:2]) if lines and lines[0].endswith(":") else (lines or [""])[0]
    # The text of a KeyError or a ZeroDivisionError alone says nothing.
    return said if said and type(error).__module__ != "builtins" else f"{type(error).__name__}: {said}"
