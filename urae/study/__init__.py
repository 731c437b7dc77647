"""The paper's claims on the miniature: cells to train and score, and what their figures say."""

from urae.study.config import StudyConfig
from urae.study.run import StudyResult, run_study

__all__ = ["StudyConfig", "StudyResult", "run_study"]
