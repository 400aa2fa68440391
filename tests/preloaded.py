"""What every training process imports, once for all that tests fork from one another (processes.py)."""

import matplotlib.backends.backend_agg  # noqa: F401

import qatscale.tracking.curves
import qatscale.train.run  # noqa: F401
from qatscale.engine.runtime import _import_deepspeed_quietly

_import_deepspeed_quietly()
