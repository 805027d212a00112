"""What a checkpoint has beside its tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ndtrain import extra_state
from ndtrain.errors import DamagedError
from ndtrain.model import ByteTokenizer, HubTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def save_extras(
    directory: Path,
    model: PreTrainedModel,
    tokenizer: ByteTokenizer | HubTokenizer,
    extra_states: Mapping[str, Any] | None = None,
) -> None:
    """Write config, generation config, tokenizer and what modules keep of their own beside the tensors."""
    if extra_states:
        (directory / extra_state.FILE).write_text(json.dumps(extra_states))
    cast("PreTrainedConfig", model.export_config).save_pretrained(directory)
    if model.can_generate():
        # A generation config that its own library would refuse to save must not lose the checkpoint.
        with suppress(ValueError):
            cast(Any, model.generation_config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def config_difference(saved: Path, own: PreTrainedConfig) -> str | None:
    """The first key in which the config of a checkpoint differs from `own`, in words; None where all agree."""
    try:
        before = json.loads(saved.read_text())
    except (OSError, ValueError) as error:
        raise DamagedError(f"{saved}: {error}") from error
    now = json.loads(own.to_json_string())
    for key in sorted((before.keys() | now.keys()) - {"transformers_version", "_name_or_path", "architectures"}):
        if before.get(key) != now.get(key):
            return f"{key} was {before.get(key)}, is {now.get(key)}"
    return None
