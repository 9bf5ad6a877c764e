"""A second witness: the public package of Moshi's authors, on a small codec of random weights from one file."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from app.engine.personaplex.model.config import CODEBOOKS, MimiConfig
from app.engine.personaplex.model.mimi import Mimi
from app.engine.personaplex.model.weights import load
from tests.engine.personaplex.test_mimi import SMALL, random_weights, sound

FRAMES = 20
"""More than fill the ring of `SMALL`."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(random_weights(SMALL), tmp_path / "mimi.safetensors")
    return tmp_path / "mimi.safetensors"


def witness(file: Path, config: MimiConfig, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("NO_TORCH_COMPILE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from moshi.models.loaders import get_mimi

        return get_mimi(file, published(config), num_codebooks=CODEBOOKS)


def published(config: MimiConfig) -> dict[str, Any]:
    """The same sizes under the package's names."""
    return {
        "sample_rate": 24_000,
        "frame_rate": 12.5,
        "channels": 1,
        "seanet": {
            "channels": 1, "dimension": config.dimension, "causal": True, "n_filters": config.n_filters,
            "n_residual_layers": 1, "activation": "ELU", "compress": config.compress, "dilation_base": 2,
            "disable_norm_outer_blocks": 0, "kernel_size": config.kernel_size,
            "residual_kernel_size": config.residual_kernel_size, "last_kernel_size": config.last_kernel_size,
            "norm": "none", "pad_mode": "constant", "ratios": list(config.ratios), "true_skip": True,
        },
        "transformer": {
            "d_model": config.d_model, "num_heads": config.num_heads, "num_layers": config.num_layers, "causal": True,
            "layer_scale": 0.01, "context": config.context, "conv_layout": True, "max_period": config.max_period,
            "gating": "none", "norm": "layer_norm", "positional_embedding": "rope",
            "dim_feedforward": config.dim_feedforward, "input_dimension": config.dimension,
            "output_dimensions": [config.dimension],
        },
        "quantizer": {
            "dimension": config.codebook_dim, "n_q": config.codebooks_in_file, "bins": config.bins,
            "input_dimension": config.dimension, "output_dimension": config.dimension,
        },
    }  # fmt: skip


def test_codes_and_sound_are_those_of_the_public_package(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ring attends to all of its context; the one that PersonaPlex was trained with, to one step less."""
    theirs = witness(file, replace(SMALL, context=SMALL.context - 1), monkeypatch)
    ours = Mimi(SMALL, torch.device("cpu"))
    load(file, ours.entries())
    ours.pack()
    state, active = ours.state(2), torch.tensor([True, True])

    with torch.no_grad(), theirs.streaming(2):
        for frame in sound(FRAMES, 2):
            codes = ours.encode(state, frame, active)
            assert torch.equal(codes, theirs.encode(frame[:, None])[:, :, 0])
            expected = theirs.decode(codes[:, :, None])[:, 0]
            torch.testing.assert_close(ours.decode(state, codes, active), expected, rtol=0, atol=1e-5)
