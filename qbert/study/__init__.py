"""`qbert study`: what number formats do to a real model.

`plan` says what is tried, `measure` what is measured of one format, `run` does it all and resumes, `report` shows it.
"""

from qbert.study.plan import SITES, Point, plan_points
from qbert.study.report import plot, to_cost_table, to_html, to_table
from qbert.study.result import PointResult, Reference, Study
from qbert.study.run import run_study

__all__ = [
    "SITES",
    "Point",
    "PointResult",
    "Reference",
    "Study",
    "plan_points",
    "plot",
    "run_study",
    "to_cost_table",
    "to_html",
    "to_table",
]
