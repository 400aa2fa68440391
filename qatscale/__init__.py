"""qatscale: plan, run and analyse compute-optimal quantization-aware pre-training on DeepSpeed."""

__version__ = "0.2.0"
