"""Check that torch and transformers are versions that ndtrain was tested with; pyproject.toml has the bounds."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

LIBRARIES = ("torch", "transformers")


def outside_bounds() -> list[str]:
    """Return a sentence for each library whose version is outside the bounds; imports none of them."""
    try:
        wanted = [Requirement(text) for text in requires("ndtrain") or ()]
    except PackageNotFoundError:
        return []  # run from its source folder, not installed
    found = []
    for library in (requirement for requirement in wanted if requirement.name in LIBRARIES):
        try:
            installed = version(library.name)
        except PackageNotFoundError:
            continue
        if not library.specifier.contains(installed, prereleases=True):
            found.append(
                f"{library.name} {installed} is outside the versions that ndtrain was tested with "
                f"({library.specifier}); install one of them if something fails"
            )
    return found
