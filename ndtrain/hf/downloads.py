"""Have files of the hub in the cache of every node, asked for once a node, at one commit."""

from __future__ import annotations

from collections.abc import Callable

from ndtrain.hf import hub
from ndtrain.runs.messages import of_rank0

# Runs work on some ranks, rank 0 first: on one of each node, or on rank 0 alone.
OnNodes = Callable[[Callable[[], None]], None]


def on_every_node(
    name: str, revision: str, on_nodes: OnNodes, *, key: str = "model.name", weights: bool = False
) -> hub.Snapshot | None:
    """Return the snapshot of a model on the hub, None for a local one, once every node has its files. Collective.

    Those are the files beside the weights, or with `weights` the weights. Rank 0 alone asks which commit it is.
    """

    def ask() -> list[object] | None:
        return [*hub.resolve(name, revision, key=key)] if hub.on_hub(name, revision, key=key) else None

    answer = of_rank0(ask)
    if answer is None:
        return None
    found = hub.Snapshot(*answer)

    def download() -> None:
        wanted = hub.weights_of(name, found, key=key) if weights else found.beside
        hub.fetch(name, found.commit, wanted, key=key)

    on_nodes(download)
    return found
