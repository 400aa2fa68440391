from __future__ import annotations

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "analysis" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
