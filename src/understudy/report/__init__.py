"""A run's record as a table on the terminal and as one HTML page; never imports torch.

The command line imports `write`, `render`, `final_table` and `terminal` from here.
"""

from understudy.report.html import render, write
from understudy.report.screen import terminal
from understudy.report.tables import Row, final_table

__all__ = ["Row", "final_table", "render", "terminal", "write"]
