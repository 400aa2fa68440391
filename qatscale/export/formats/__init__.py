"""The export formats. Each is one module of this package; this list is the only other place that names it."""

FORMATS = {
    "hf": "values on the quantizer's grid, for transformers",
    "compressed-tensors": "packed codes and scales, for transformers and vLLM",
    "gguf": "one file, for llama.cpp and transformers",
    "mlx": "a folder for mlx-lm",
}
"""Name -> what it is, for `--help`. `find_export` asks the last one first: `hf` takes any folder with a config.json."""
