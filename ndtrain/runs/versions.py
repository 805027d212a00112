"""Whether the libraries are of versions that ndtrain was tried with; the bounds are those of pyproject.toml."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

LIBRARIES = ("torch", "transformers")


def outside_bounds() -> list[str]:
    """Return a sentence for each library whose version is outside the bounds; imports none of them."""
    try:
        wanted = [Requirement(text) for text in requires("ndtrain") or ()]
    except PackageNotFoundError:
        return []  # run from its folder, not installed
    found = []
    for library in (one for one in wanted if one.name in LIBRARIES):
        try:
            installed = version(library.name)
        except PackageNotFoundError:
            continue
        if not library.specifier.contains(installed, prereleases=True):
            found.append(
                f"{library.name} {installed} is outside the versions that ndtrain was tried with "
                f"({library.specifier}); install one of them where something fails"
            )
    return found
