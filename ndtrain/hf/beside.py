"""What belongs to a model beside its weights and tokenizer: config, generation config, its own code, processor configs.

The files are those that `from_pretrained` followed by `save_pretrained` of plain transformers would leave.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import transformers
from torch.distributed.fsdp import FSDPModule

from ndtrain.errors import first_line
from ndtrain.hf.compat import comes_with_code, custom_object_save, get_relative_import_files
from ndtrain.torch_compat import class_before_fsdp

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

GENERATION = "generation_config.json"
_PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_WITH_CODE = ("config.json", "tokenizer_config.json", *_PROCESSORS)


def take_generation_config(model: PreTrainedModel, base: Path) -> list[str]:
    """Give `model` the generation config that `from_pretrained` reads in the directory `base`; return notes.

    That is its generation_config.json, or what older models keep in config.json. One that cannot be used is a note.
    """
    if not model.can_generate():
        return []
    file = base / GENERATION
    try:
        if file.is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(base)
        elif (base / "config.json").is_file():
            values = json.loads((base / "config.json").read_text(encoding="utf-8"))
            model.generation_config = transformers.GenerationConfig.from_model_config(values)
    except Exception as error:
        return [f"{file} cannot be used ({_reason(error)}); the one that is saved is made from config.json"]
    try:
        cast(Any, model.generation_config).validate(strict=True)
    except ValueError as error:
        if file.is_file():
            return [f"{file} contradicts itself ({_reason(error)}); it is kept as it is"]
    return []


def save_config(model: PreTrainedModel, directory: Path) -> list[str]:
    """Write the config to publish, the generation config and the model's own code; return notes."""
    config = cast("PreTrainedConfig", model.export_config)
    kind = class_before_fsdp(model) if isinstance(model, FSDPModule) else type(model)
    if comes_with_code(kind):
        # transformers asks the object for nothing but its class, and FSDP's class is in another module.
        custom_object_save(kind.__new__(kind), directory, config=config)
    # A copy, because saving removes the key transformers_weights, which says where the weights are.
    copy.deepcopy(config).save_pretrained(directory)
    if model.can_generate():
        try:
            cast(Any, model.generation_config).save_pretrained(directory)
        except ValueError as error:  # the weights must still be saved
            return [f"{GENERATION} is not written: {_reason(error)}"]
    return []


def copied(base: Path, *, processor: bool) -> dict[str, bytes]:
    """Return {name: content} of the code that the configs in `base` name; with `processor` also processor configs."""
    wanted = set(_code_of(base))
    if processor:
        wanted |= {base / name for name in _PROCESSORS if (base / name).is_file()}
    return {file.name: file.read_bytes() for file in sorted(wanted)}


def _code_of(base: Path) -> Iterator[Path]:
    """Yield the Python files in `base` that its configs name, and those that they import."""
    for name in _WITH_CODE:
        try:
            classes = json.loads((base / name).read_text(encoding="utf-8"))["auto_map"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        # A tokenizer's entry has two classes, of which one may be None.
        for given in classes.values() if isinstance(classes, dict) else [classes]:
            for reference in given if isinstance(given, list) else [given]:
                if not isinstance(reference, str) or "--" in reference:
                    continue
                file = base / f"{reference.partition('.')[0]}.py"
                if file.parent == base and file.is_file():
                    yield file
                    with suppress(OSError):  # it imports a file that is not there, which is found where it runs
                        imported = [Path(found) for found in get_relative_import_files(file)]
                        yield from (found for found in imported if found.parent == base and found.is_file())


def _reason(error: Exception) -> str:
    """Return the first line of an error that says what is wrong; transformers' first one may be a heading."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip(" -")]
    return lines[1] if len(lines) > 1 and lines[0].endswith(":") else first_line(error)
