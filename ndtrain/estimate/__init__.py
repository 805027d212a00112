"""What a run will hold, compute and send, known before it is started."""

from ndtrain.estimate.devices import DEVICES, Device, find_device
from ndtrain.estimate.record import KINDS
from ndtrain.estimate.roofline import ASSUMPTIONS, RESERVED
from ndtrain.estimate.step import StepEstimate, estimate_step

__all__ = [
    "ASSUMPTIONS",
    "DEVICES",
    "KINDS",
    "RESERVED",
    "Device",
    "StepEstimate",
    "estimate_step",
    "find_device",
]
