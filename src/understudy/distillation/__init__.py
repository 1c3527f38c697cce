"""The heart: a teacher, a student and terms make losses. Torch only; no trainer, no files.

`Distiller` serves our loop and any hand-written one.
"""

from understudy.distillation.distiller import Distiller, Losses
from understudy.distillation.methods import METHODS, Method
from understudy.distillation.schedules import Schedule
from understudy.distillation.teacher import Teacher
from understudy.distillation.terms import Term

__all__ = ["METHODS", "Distiller", "Losses", "Method", "Schedule", "Teacher", "Term"]
