"""What is compared is one answer to the same past: the same call, frame by frame, for every kind."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from app.engine.contract import Role
from app.engine.personaplex.bench.quality import (
    HEADS,
    Kinds,
    Listening,
    Verdict,
    _Comparison,
    as_json,
    as_lines,
    compare,
    kinds_to_compare,
    likeness,
)
from app.engine.personaplex.model.weights import find_checkpoint
from app.engine.personaplex.voices import unpack_voices, voice_file
from tests.engine.tiny import make_tiny_checkpoint

CPU = torch.device("cpu")
ROLE = Role("harbour", "You work for the harbour office and your name is Ada.")
FRAMES = 60


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A window of 63 positions, which the call goes beyond."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("quality") / "tiny", context=64)


def listening(checkpoint: Path, role: Role = ROLE, frames: int = FRAMES) -> Listening:
    found = find_checkpoint(checkpoint)
    folder = unpack_voices(checkpoint / "voices.tgz", checkpoint / "voices")
    return Listening(found, role, lambda name: voice_file(folder, name), frames)


def quiet(what: str, done: int, of: int) -> None:
    assert 0 <= done < of


def verdicts(checkpoint: Path, kinds: list[Kinds], frames: int = FRAMES) -> dict[Kinds, Verdict]:
    found = compare(listening(checkpoint, frames=frames), kinds, CPU, torch.float32, quiet)
    return {verdict.kinds: verdict for verdict in found.verdicts}


def test_the_unquantised_model_agrees_with_itself_in_everything(small: Path) -> None:
    same = Kinds("bf16", "bf16")
    found = verdicts(small, [same])[same].likeness

    assert found is not None
    assert found.cosine == pytest.approx([1] * len(HEADS))
    assert found.agreement == (1,) * len(HEADS)
    assert found.divergence == pytest.approx([0] * len(HEADS), abs=1e-9)


def test_what_is_heard_again_is_what_was_drawn_from(small: Path) -> None:
    """A caller of the greedy model is told the likeliest token: the one of the logits that are compared."""
    greedy = replace(ROLE, text_temperature=0.0, audio_temperature=0.0)
    comparison = _Comparison(listening(small, greedy), CPU, torch.float32)
    text, *audio = (head.argmax(-1) for head in comparison._exact.heads())

    assert comparison._script.agent[:, 0].equal(text)
    assert comparison._script.agent[:, 1:].equal(torch.stack(audio, 1))
    assert len(set(text.tolist())) > FRAMES // 4


def test_each_head_is_asked_after_what_the_call_said_before_it_and_not_after_its_own_answer(small: Path) -> None:
    comparison = _Comparison(listening(small), CPU, torch.float32)
    agent = comparison._script.agent.clone()
    agent[7, 3] = (agent[7, 3] + 1) % 96
    other = comparison._model("bf16").hear(replace(comparison._script, agent=agent), "bf16")
    changed = [
        (one != two).any(-1).nonzero()[:, 0].tolist()
        for one, two in zip(comparison._exact.heads(), other.heads(), strict=True)
    ]

    assert changed == [[], [], [], [], *[[7]] * 5]


def test_fewer_bits_are_less_alike_and_each_kind_is_judged_by_itself(small: Path) -> None:
    kinds = [Kinds("int8", "bf16"), Kinds("int4", "bf16"), Kinds("bf16", "int8"), Kinds("int8", "int8")]
    found = verdicts(small, kinds)

    assert set(found) == set(kinds)
    whole = {one: found[one].likeness for one in kinds}
    cosines = {one: np.mean(likeness.cosine) for one, likeness in whole.items() if likeness is not None}
    assert len(cosines) == len(kinds)
    assert cosines[Kinds("int4", "bf16")] < cosines[Kinds("int8", "bf16")] < 1
    assert 0.99 < cosines[Kinds("bf16", "int8")] < 1
    assert cosines[Kinds("int8", "int8")] not in (cosines[Kinds("int8", "bf16")], cosines[Kinds("bf16", "int8")])
    int4, int8 = whole[Kinds("int4", "bf16")], whole[Kinds("int8", "bf16")]
    assert int4 is not None
    assert int8 is not None
    assert sum(int4.agreement) < sum(int8.agreement)
    assert sum(int4.divergence) > sum(int8.divergence) > 0


def test_the_same_call_is_made_each_time_and_depends_on_what_the_caller_says(small: Path) -> None:
    one, again = (_Comparison(listening(small), CPU, torch.float32)._script for _ in range(2))
    pcm = (0.1 * np.random.default_rng(5).standard_normal(24_000)).astype(np.float32)
    other = _Comparison(replace(listening(small), pcm=pcm), CPU, torch.float32)._script

    assert one.columns.equal(again.columns)
    assert one.agent.equal(again.agent)
    assert not one.columns[:, 9:].equal(other.columns[:, 9:])
    assert one.columns.shape == other.columns.shape == (FRAMES, 17)


def test_likeness_is_that_of_its_definitions() -> None:
    random = torch.Generator().manual_seed(4)
    exact, other = (3 * torch.randn(7, 50, generator=random) for _ in range(2))
    other[:4] = exact[:4] + 0.01 * other[:4]
    found = likeness([exact], [other])
    one, two = exact.double().numpy(), other.double().numpy()
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (one, two))

    cosine = (one * two).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(two, axis=-1)
    assert found.cosine == pytest.approx([cosine.mean()])
    assert found.agreement == pytest.approx([np.mean(one.argmax(-1) == two.argmax(-1))])
    assert found.divergence == pytest.approx([(p * np.log(p / q)).sum(-1).mean()])


def test_each_kind_is_compared_alone_and_weights_with_the_usual_keys_too() -> None:
    found = kinds_to_compare(["int8", "fp8"], ["int8", "fp8"])

    assert found == [
        Kinds("bf16", "int8"), Kinds("bf16", "fp8"), Kinds("int8", "bf16"), Kinds("fp8", "bf16"),
        Kinds("int8", "int8"), Kinds("fp8", "int8"),
    ]  # fmt: skip
    assert kinds_to_compare([], ["bf16", "fp8"]) == [Kinds("bf16", "fp8")]


def test_the_table_and_the_json_name_every_head_and_what_could_not_be_had(small: Path) -> None:
    kinds = [Kinds("bf16", "int8")]
    found = compare(listening(small, frames=5), kinds, CPU, torch.float32, quiet)
    found = replace(found, verdicts=(*found.verdicts, Verdict(Kinds("fp8", "bf16"), None, "this GPU has none")))
    lines = as_lines(found)

    assert lines[0].startswith("| weights | kv | | text | codebook 1 |")
    assert [line.split("|")[3].strip() for line in lines[2:5]] == ["cosine", "same likeliest", "KL, nats"]
    assert "| fp8 | bf16 | this GPU has none |" in lines[5]
    assert {line.count("|") for line in lines[:6]} == {len(HEADS) + 4}
    kept = json.loads(as_json(found))
    assert kept["heads"] == list(HEADS)
    assert kept["verdicts"][0]["likeness"]["cosine"][0] <= 1
    assert kept["verdicts"][1]["fault"] == "this GPU has none"
