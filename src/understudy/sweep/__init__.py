"""Many students instead of one: a grid or a search of objectives, chosen on validation, then judged like any run.

`sweep` runs the stages in order; `api.py` calls it where a configuration has a section `sweep`. Trials run through one
interface (`executors.py`): in this process, in several, or on a Ray cluster.
"""

from understudy.sweep.stages import sweep

__all__ = ["sweep"]
