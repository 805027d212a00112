"""What people see: the plan and the dry step of `inspect`, the progress of `run`. The only importer of rich."""

from ndtrain.console.inspect import inspect_text, suggest_text
from ndtrain.console.progress import ByteProgress, Reporter

__all__ = ["ByteProgress", "Reporter", "inspect_text", "suggest_text"]
