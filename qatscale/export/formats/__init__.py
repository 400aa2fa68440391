"""The export formats. Each is one module of this package, whose FORMAT is an instance of a subclass of `base.Format`.

CONTRIBUTING.md lists what a new one takes.
"""

from qatscale.errors import UserError, did_you_mean

FORMATS = {
    "hf": "values on the quantizer's grid, for transformers",
    "compressed-tensors": "packed codes and scales, for transformers and vLLM",
    "gguf": "one file, for llama.cpp and transformers",
    "mlx": "a folder for mlx-lm",
}
"""Name -> what it is, for `--help`. `find_export` asks the last one first: `hf` takes any folder with a config.json."""


def check_format(name: str) -> None:
    """UserError for a name that no format has."""
    if name not in FORMATS:
        raise UserError("--format", name, "is not a format of exports.", did_you_mean(name, FORMATS))
