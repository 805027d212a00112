"""Estimate a run's memory, FLOPs, communication and time before it starts."""

from ndtrain.estimate.record import KINDS
from ndtrain.estimate.roofline import RESERVED, assumptions
from ndtrain.estimate.search import TRIES, Change, Failure, Search, Suggestion, fixes, suggest
from ndtrain.estimate.step import StepEstimate, estimate_plan, estimate_step

__all__ = [
    "KINDS",
    "RESERVED",
    "TRIES",
    "Change",
    "Failure",
    "Search",
    "StepEstimate",
    "Suggestion",
    "assumptions",
    "estimate_plan",
    "estimate_step",
    "fixes",
    "suggest",
]
