"""Several students of one architecture trained as one, on the same batches: many small steps become one larger one.

On a GPU a small student leaves most of the device idle, and K of them together take hardly longer than one; on a CPU
they do not. So `choice.py` measures, and nothing is stacked where that does not pay. Imported by the sweep.
"""

from understudy.stacked.choice import Choice, choose
from understudy.stacked.objectives import stackable
from understudy.stacked.stepper import Student
from understudy.stacked.training import StackedTraining

__all__ = ["Choice", "StackedTraining", "Student", "choose", "stackable"]
