"""What a run will hold, compute and send, known before it is started."""

from ndtrain.estimate.devices import DEVICES, Device, find_device
from ndtrain.estimate.record import KINDS
from ndtrain.estimate.roofline import ASSUMPTIONS, RESERVED
from ndtrain.estimate.search import Change, Suggestion, cheapest_fix, suggest
from ndtrain.estimate.step import StepEstimate, estimate_step

__all__ = [
    "ASSUMPTIONS",
    "DEVICES",
    "KINDS",
    "RESERVED",
    "Change",
    "Device",
    "StepEstimate",
    "Suggestion",
    "cheapest_fix",
    "estimate_step",
    "find_device",
    "suggest",
]
