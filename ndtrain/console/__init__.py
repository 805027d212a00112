"""What people see. The only importer of rich.

`inspect` is not imported here: `run` does without what it needs.
"""

from ndtrain.console.progress import ByteProgress, Reporter

__all__ = ["ByteProgress", "Reporter"]
