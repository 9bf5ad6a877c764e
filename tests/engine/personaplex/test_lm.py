"""The language model at its real sizes, on the meta device: shapes without memory, and any read-back an error."""

import torch

from app.engine.personaplex.model.config import CODEBOOKS, LmConfig
from app.engine.personaplex.model.lm import Lm, LmState, Reach
from app.engine.personaplex.model.ring import Ring
from app.engine.personaplex.model.rows import leaves

META = torch.device("meta")
ROWS = 4


def real() -> tuple[Lm, LmState]:
    config = LmConfig()
    return Lm(config, META, torch.bfloat16), LmState.of(config, ROWS, META, torch.bfloat16)


def test_a_step_of_the_real_model_asks_nothing_of_the_device_and_moves_its_state_in_place() -> None:
    """What a CUDA graph needs."""
    lm, state = real()
    before = [id(tensor) for tensor in leaves(state)]
    user = torch.zeros(ROWS, CODEBOOKS, dtype=torch.int64, device=META)
    active = torch.ones(ROWS, dtype=torch.bool, device=META)

    frame = lm.step(state, user, active, Reach(longest=1_000, text_ranks=25, audio_ranks=250))

    assert frame.shape == (ROWS, 1 + CODEBOOKS)
    assert [id(tensor) for tensor in leaves(state)] == before
    assert all(len(tensor) == ROWS for tensor in leaves(state))


def test_a_prompt_of_the_real_model_is_read_in_one_pass() -> None:
    lm, _ = real()
    c = lm.config
    kv = Ring.of(c, 1, 112, META, torch.bfloat16)
    columns = torch.zeros(112, 17, dtype=torch.int64, device=META)

    hidden = lm.transformer.extend(lm.embed(columns), kv, 0)

    assert hidden.shape == (112, c.dim)
    assert hidden.dtype == torch.bfloat16


def test_the_window_is_the_2999_positions_that_the_model_was_published_with() -> None:
    _, state = real()

    assert state.kv.values.shape == (ROWS, 32, 2, 32, 2_999, 128)
