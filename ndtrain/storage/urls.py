"""The text of a path or a URL: `~` and `$VAR` in it, and secrets that must not be."""

from __future__ import annotations

import os
import re

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))")
_SECRET = re.compile(r"(?<=://)[^/@\s]*:[^/@\s]*@")


def without_secrets(text: str) -> str:
    """Return `text` with the user and password of every URL in it replaced by stars."""
    return _SECRET.sub("***@", text)


def secret_in(text: str) -> str | None:
    """Return why `text` must not be used: it is a URL with a password. None if it has none."""
    if not _SECRET.search(text):
        return None
    return (
        "holds a key and a secret, which would be written to files and logs; leave them out and set the environment "
        "variables of the store, for s3:// AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    )


def expanded(text: str) -> str:
    """Return a path with `~` and `$VAR` replaced. Raises `KeyError` with the name of a variable that is not set."""
    if "$" in text:
        text = _VARIABLE.sub(lambda match: os.environ[match[1] or match[2]], text)
    return os.path.expanduser(text) if text.startswith("~") else text
