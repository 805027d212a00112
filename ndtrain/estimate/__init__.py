"""Estimate a run's memory, FLOPs, communication and time before it starts."""

from ndtrain.estimate.record import KINDS
from ndtrain.estimate.roofline import ASSUMPTIONS, RESERVED
from ndtrain.estimate.search import Change, Suggestion, cheapest_fix, suggest
from ndtrain.estimate.step import StepEstimate, estimate_plan, estimate_step

__all__ = [
    "ASSUMPTIONS",
    "KINDS",
    "RESERVED",
    "Change",
    "StepEstimate",
    "Suggestion",
    "cheapest_fix",
    "estimate_plan",
    "estimate_step",
    "suggest",
]
