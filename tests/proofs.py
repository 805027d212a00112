"""A proof of one model on one mesh, made once in a session: what it said is remembered and said again.

Most cases that train on ranks ask the same of the same model on the same mesh before their first step. Only what
`remembered` surrounds may have its answer from an earlier case. What tests the proof itself, or trains a model or code
that the test has changed, does not use it.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from ndtrain.engine import Engine

VARIABLE = "NDTRAIN_TEST_PROOFS"  # has the folder of this session; where it is not set nothing is remembered


@cache
def folder() -> str:
    """The folder of this session, which ends with this process."""
    made = tempfile.mkdtemp(prefix="ndtrain-proofs-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


@contextmanager
def remembered() -> Iterator[None]:
    """The proof on noise that a trainer makes inside may have been made in an earlier case of this session."""
    from ndtrain import proof

    prove, calls, names = proof.prove, 0, []
    identity = proof.identity

    def named(engine: Engine) -> str:
        names.append(identity(engine))
        return names[-1]

    def once(engine: Engine, references: Any) -> proof.Proof:
        nonlocal calls
        calls += 1
        root = os.environ.get(VARIABLE)
        # A second proof is one of the weights themselves.
        if root is None or calls > 1 or engine.recipe.model.trust_remote_code:
            return prove(engine, references)
        return _once(engine, Path(root) / names[0], lambda: prove(engine, references))

    with mock.patch.object(proof, "identity", named), mock.patch.object(proof, "prove", once):
        yield


def _once(engine: Engine, path: Path, prove: Any) -> Any:
    import torch
    import torch.distributed as dist

    from ndtrain.proof import Proof

    file = path.with_name(f"{path.name}-{dist.get_rank()}.json")
    # Each rank writes its own once its proof has not raised; all prove where one has none.
    known = torch.tensor(int(file.exists()))
    dist.all_reduce(known, op=dist.ReduceOp.MIN)
    if known:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if engine.sequence is not None:
            engine.sequence.enabled = kept["sequence"]
        return Proof(kept["known"], tuple(kept["notes"]))
    found = prove()
    sequence = engine.sequence.enabled if engine.sequence is not None else None
    text = json.dumps({"known": bool(found.known), "notes": found.notes, "sequence": sequence})
    file.with_suffix(".tmp").write_text(text, encoding="utf-8")
    file.with_suffix(".tmp").replace(file)
    return found
