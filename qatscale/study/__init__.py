"""Studies: a grid of runs as a tree of shared trunks, trained by any number of workers, collected, fitted, reported."""

from qatscale.study.file import Study, read_study
from qatscale.study.grid import Grid, StudyRun, grid

__all__ = ["Grid", "Study", "StudyRun", "grid", "read_study"]
