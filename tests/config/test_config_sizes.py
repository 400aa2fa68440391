"""Parameter counts, FLOPs and peaks against hand counts and published figures."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qatscale.config.schema import ModelConfig, QatConfig
from qatscale.config.sizes import count_parameters, flops_per_token, peak_flops, stored_weights


def shape(layers: int, hidden: int, heads: int, kv: int | None, inner: int, vocabulary: int, tied: bool) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv,
        intermediate_size=inner,
        tied_embedding=tied,
    )


@pytest.mark.parametrize(
    ("model", "published"),
    [
        # totals of the safetensors indices on the Hugging Face hub
        (shape(32, 4096, 32, None, 11008, 32_000, False), 6_738_415_616),  # Llama 2 7B
        (shape(32, 4096, 32, 8, 14336, 128_256, False), 8_030_261_248),  # Llama 3 8B
        (shape(22, 2048, 32, 4, 5632, 32_000, False), 1_100_048_384),  # TinyLlama 1.1B
        (shape(16, 2048, 32, 8, 8192, 128_256, True), 1_235_814_400),  # Llama 3.2 1B
    ],
)
def test_totals_of_published_models(model: ModelConfig, published: int) -> None:
    assert count_parameters(model) == published


SHAPES = st.builds(
    lambda layers, head, kv, repeat, inner, vocabulary, tied: shape(
        layers, 2 * head * kv * repeat, kv * repeat, kv, inner, vocabulary, tied
    ),
    *(st.integers(1, 6) for _ in range(4)),
    st.integers(1, 50),
    st.integers(1, 500),
    st.booleans(),
)


def matrices(model: ModelConfig) -> list[tuple[int, int]]:
    """(rows, columns) of every weight that multiplies activations, written down one by one."""
    channels = model.hidden_size // model.heads
    kv = model.kv_heads or model.heads
    block = [
        (model.heads * channels, model.hidden_size),
        (kv * channels, model.hidden_size),
        (kv * channels, model.hidden_size),
        (model.hidden_size, model.heads * channels),
        (model.intermediate_size, model.hidden_size),
        (model.intermediate_size, model.hidden_size),
        (model.hidden_size, model.intermediate_size),
    ]
    return block * model.layers + [(model.vocab_size, model.hidden_size)]


@given(SHAPES)
def test_counts_are_the_sum_of_the_tensors(model: ModelConfig) -> None:
    weights = stored_weights(model, QatConfig())
    multiplied = sum(rows * columns for rows, columns in matrices(model))
    norms = model.hidden_size * (1 + 2 * model.layers)
    look_up = 0 if model.tied_embedding else model.vocab_size * model.hidden_size
    assert weights.matrices.weights + model.vocab_size * model.hidden_size == multiplied
    assert weights.params == count_parameters(model) == multiplied + norms + look_up
    tables = 1 if model.tied_embedding else 2
    assert weights.embedding.weights == tables * model.vocab_size * model.hidden_size


@given(SHAPES, st.integers(1, 64))
def test_flops_are_three_forward_passes_of_every_product(model: ModelConfig, length: int) -> None:
    """Counted over one sequence: 2 per multiply-add; backward costs twice the forward."""
    channels = model.hidden_size // model.heads
    linear = sum(2 * length * rows * columns for rows, columns in matrices(model))
    scores = model.layers * model.heads * 2 * length * channels * length
    mixing = model.layers * model.heads * 2 * length * length * channels
    assert flops_per_token(model, length) * length == 3 * (linear + scores + mixing)


@pytest.mark.parametrize("tied", [True, False])
def test_tying_the_head_does_not_save_arithmetic(tied: bool) -> None:
    model = shape(2, 64, 4, None, 128, 1000, tied)
    assert flops_per_token(model, 16) == flops_per_token(model.model_copy(update={"tied_embedding": not tied}), 16)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA B200", 2250),
        ("AMD Instinct MI300X", 1307),
    ],
)
def test_a_known_device(name: str, teraflops: float) -> None:
    assert peak_flops(name) == teraflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "",
        "cpu",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",  # a slice
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA A100-SXM-64GB",  # a custom part with more units
        "NVIDIA A10G",  # not an A10
        "NVIDIA H20",  # not an H200
        "NVIDIA H800",
        "NVIDIA L400",
        "Tesla V100-SXM2-32GB",  # no bf16
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A1000",
    ],
)
def test_an_unknown_device_is_not_guessed(name: str) -> None:
    assert peak_flops(name) is None
