"""Property tests are not timed example by example: on a busy machine a single one can take seconds."""

import sys
from pathlib import Path

from hypothesis import settings

settings.register_profile("law", deadline=None)
settings.load_profile("law")

sys.path.insert(0, str(Path(__file__).parents[2] / "analysis" / "benchmarks"))  # tests share the records' generators
