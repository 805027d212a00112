"""The output on the terminal and the plan's page. Only this package imports rich.

`inspect` is not imported here, because `run` does not need its imports.
"""

from ndtrain.console.progress import ByteProgress, Reporter
from ndtrain.console.units import size

__all__ = ["ByteProgress", "Reporter", "size"]
