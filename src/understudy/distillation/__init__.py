"""The heart: a teacher, a student and terms make losses. Torch only; no trainer, no files.

`Distiller` serves our loop and any hand-written one.
"""

from understudy.distillation.distiller import Distiller, Losses
from understudy.distillation.methods import METHODS, Method, Term
from understudy.distillation.teacher import Teacher

__all__ = ["METHODS", "Distiller", "Losses", "Method", "Teacher", "Term"]
