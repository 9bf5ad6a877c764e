"""A whole checkpoint of random weights, small enough to be made in a test: every file and key of the real one.

It says nothing sensible, but says something different at every step. Its shapes are written down from the published
checkpoint's, independently of the networks that load them.
"""

import gzip
import io
import json
import math
import string
import tarfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor

from app.engine.personaplex.model.config import CODEBOOKS, COLUMN_ROWS, PAD, LmConfig, MimiConfig
from app.engine.personaplex.model.weights import (
    CONFIG_NAME,
    MIMI_NAME,
    MODEL_NAME,
    TOKENIZER_NAME,
    VOICES_ARCHIVE_NAME,
)

VOICES = {"NATF2": 13, "NATM1": 10}
"""The voices in the archive, and how many frames each is long."""
Shapes = dict[str, tuple[int, ...]]

_CARD = 96
_SENTENCES = """\
Good morning, you have reached the harbour office. My name is Ada. How can I help you today?
The ferry leaves at seven in the morning and again at noon. A ticket is four pounds for one way, seven for both.
We close at six, but you can leave a message for the captain, and somebody will call you back before nine.
Please hold the line while I look that up for you. This call may be recorded.
I am sorry, I did not hear that. Could you say it again? Thank you for calling, have a good day.
""".splitlines()


def make_tiny_checkpoint(folder: Path, seed: int = 0, *, context: int = 3000) -> Path:
    """Write the checkpoint's files into a folder, which is made, and return it. The same seed gives the same weights.

    `context` is the language model's; a short one lets a test see its ring go round.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lm, mimi = tiny_configs(context)
    random = torch.Generator().manual_seed(seed)
    model = {key: value.to(torch.bfloat16) for key, value in _lm_weights(lm, random).items()}
    save_file(model, folder / MODEL_NAME)
    save_file(dict(_mimi_weights(mimi, random)), folder / MIMI_NAME)
    (folder / TOKENIZER_NAME).write_bytes(tiny_tokenizer(lm.text_card))
    voices = {name: packed_voice(lm, model, frames, random) for name, frames in VOICES.items()}
    (folder / VOICES_ARCHIVE_NAME).write_bytes(_archive(voices))
    (folder / CONFIG_NAME).write_text(json.dumps(published(lm, mimi), indent=2), encoding="utf-8")
    return folder


def tiny_configs(context: int = 3000) -> tuple[LmConfig, MimiConfig]:
    real = LmConfig()
    lm = LmConfig(
        dim=64, num_heads=4, num_layers=2, context=context, text_card=400, card=_CARD,
        depformer_dim=32, depformer_num_heads=2, depformer_num_layers=2, depformer_dim_feedforward=132,
        silence_tokens=tuple(token % _CARD for token in real.silence_tokens),
        sine_tokens=tuple(token % _CARD for token in real.sine_tokens),
    )  # fmt: skip
    mimi = MimiConfig(
        n_filters=4, dimension=64, d_model=64, num_heads=4, num_layers=2, dim_feedforward=128,
        codebook_dim=32, codebooks_in_file=16, bins=_CARD,
    )  # fmt: skip
    return lm, mimi


def lm_shapes(c: LmConfig) -> Shapes:
    """Every key of the model file, all depformer steps included."""
    shapes: Shapes = {f"emb.{k}.weight": (c.card + 1, c.dim) for k in range(2 * CODEBOOKS)}
    shapes |= {"text_emb.weight": (c.text_card + 1, c.dim), "text_linear.weight": (c.text_card, c.dim)}
    for layer in range(c.num_layers):
        place = f"transformer.layers.{layer}."
        shapes |= _attention(place, c.dim, 1) | _gating(f"{place}gating.", c.dim, c.hidden)
    shapes["out_norm.alpha"] = (1, 1, c.dim)
    shapes |= {f"depformer_in.{step}.weight": (c.depformer_dim, c.dim) for step in range(c.dep_q)}
    shapes |= {f"depformer_emb.{step}.weight": (c.card + 1, c.depformer_dim) for step in range(c.dep_q - 1)}
    shapes["depformer_text_emb.weight"] = (c.text_card + 1, c.depformer_dim)
    for layer in range(c.depformer_num_layers):
        place = f"depformer.layers.{layer}."
        shapes |= _attention(place, c.depformer_dim, c.dep_q)
        for step in range(c.dep_q):
            shapes |= _gating(f"{place}gating.{step}.", c.depformer_dim, c.depformer_hidden)
    return shapes | {f"linears.{step}.weight": (c.card, c.depformer_dim) for step in range(c.dep_q)}


def _attention(place: str, dim: int, steps: int) -> Shapes:
    return {
        f"{place}self_attn.in_proj_weight": (steps * 3 * dim, dim),
        f"{place}self_attn.out_proj.weight": (steps * dim, dim),
        f"{place}norm1.alpha": (1, 1, dim),
        f"{place}norm2.alpha": (1, 1, dim),
    }


def _gating(place: str, dim: int, hidden: int) -> Shapes:
    return {f"{place}linear_in.weight": (2 * hidden, dim), f"{place}linear_out.weight": (dim, hidden)}


def mimi_shapes(c: MimiConfig) -> Shapes:
    """Every key of the codec's file, all its codebooks included."""
    shapes: Shapes = {}
    widths = [c.n_filters * 2**stage for stage in range(len(c.ratios) + 1)]
    shapes |= _conv("encoder.model.0", (widths[0], 1, c.kernel_size))
    for stage, stride in enumerate(reversed(c.ratios)):
        narrow, wide = widths[stage : stage + 2]
        shapes |= _residual(f"encoder.model.{1 + 3 * stage}", narrow, c)
        shapes |= _conv(f"encoder.model.{3 + 3 * stage}", (wide, narrow, 2 * stride))
    last = 2 + 3 * len(c.ratios)
    shapes |= _conv(f"encoder.model.{last}", (c.dimension, widths[-1], c.last_kernel_size))
    shapes |= _conv("decoder.model.0", (widths[-1], c.dimension, c.kernel_size))
    for stage, stride in enumerate(c.ratios):
        wide, narrow = widths[-1 - stage], widths[-2 - stage]
        name = f"decoder.model.{2 + 3 * stage}.convtr.convtr"
        shapes |= {f"{name}.weight": (wide, narrow, 2 * stride), f"{name}.bias": (narrow,)}
        shapes |= _residual(f"decoder.model.{3 + 3 * stage}", narrow, c)
    shapes |= _conv(f"decoder.model.{last}", (1, widths[0], c.last_kernel_size))
    for side in ("encoder", "decoder"):
        for layer in range(c.num_layers):
            shapes |= _codec_layer(f"{side}_transformer.transformer.layers.{layer}.", c)
    shapes["downsample.conv.conv.conv.weight"] = (c.dimension, c.dimension, 2 * c.downsample)
    shapes["upsample.convtr.convtr.convtr.weight"] = (c.dimension, 1, 2 * c.downsample)
    return shapes | _quantizer(c)


def _conv(place: str, weight: tuple[int, int, int]) -> Shapes:
    return {f"{place}.conv.conv.weight": weight, f"{place}.conv.conv.bias": weight[:1]}


def _residual(place: str, width: int, c: MimiConfig) -> Shapes:
    between = width // c.compress
    inner = _conv(f"{place}.block.1", (between, width, c.residual_kernel_size))
    return inner | _conv(f"{place}.block.3", (width, between, 1))


def _codec_layer(place: str, c: MimiConfig) -> Shapes:
    width, hidden = c.d_model, c.dim_feedforward
    shapes: Shapes = {
        f"{place}self_attn.in_proj_weight": (3 * width, width),
        f"{place}self_attn.out_proj.weight": (width, width),
        f"{place}linear1.weight": (hidden, width),
        f"{place}linear2.weight": (width, hidden),
    }
    vectors = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "layer_scale_1.scale", "layer_scale_2.scale")
    return shapes | {place + name: (width,) for name in vectors}


def _quantizer(c: MimiConfig) -> Shapes:
    shapes: Shapes = {}
    for book in range(c.codebooks_in_file):
        branch, layer = ("first", 0) if book == 0 else ("rest", book - 1)
        place = f"quantizer.rvq_{branch}.vq.layers.{layer}._codebook."
        shapes |= {f"{place}_initialized": (1,), f"{place}cluster_usage": (c.bins,)}
        shapes[f"{place}embedding_sum"] = (c.bins, c.codebook_dim)
    for branch in ("first", "rest"):
        shapes[f"quantizer.rvq_{branch}.input_proj.weight"] = (c.codebook_dim, c.dimension, 1)
        shapes[f"quantizer.rvq_{branch}.output_proj.weight"] = (c.dimension, c.codebook_dim, 1)
    return shapes


def _lm_weights(c: LmConfig, random: torch.Generator) -> dict[str, Tensor]:
    return {key: _drawn(key, shape, random) for key, shape in lm_shapes(c).items()}


def _drawn(key: str, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Normal numbers of a size that keeps activations, and the differences between logits, about as large as speech."""
    normal = torch.randn(shape, generator=random)
    if "emb" in key or key.startswith("upsample"):
        return normal
    if "norm" in key and not key.endswith("bias"):
        return 1 + 0.15 * normal
    if key.endswith((".bias", ".scale")):
        return 0.1 * normal + (0.5 if key.endswith(".scale") else 0.0)
    inputs = 2 * shape[0] if ".convtr." in key else math.prod(shape[1:])
    gain = 4.0 if "linears" in key or "text_linear" in key else 1.3
    return normal * gain / math.sqrt(inputs)


def _mimi_weights(c: MimiConfig, random: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    last = f"decoder.model.{2 + 3 * len(c.ratios)}."
    for key, shape in mimi_shapes(c).items():
        weight = _drawn(key, shape, random)
        if key.endswith("_initialized"):
            weight = torch.ones(shape)
        elif key.endswith("cluster_usage"):
            usage = weight = 1 + weight.abs()
        elif key.endswith("embedding_sum"):
            weight = 0.5 * weight * usage[:, None]
        elif key.startswith("encoder.model.0."):
            weight = 8 * weight
        elif key.startswith(last):
            weight = 0.02 * weight
        yield key, weight


def tiny_tokenizer(size: int = 400) -> bytes:
    """A SentencePiece model of so many tokens, trained on a few sentences, with the real one's special tokens."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_SENTENCES), model_writer=model, model_type="bpe", vocab_size=size, byte_fallback=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=PAD, user_defined_symbols=["<system>"],
        required_chars=string.ascii_letters + string.digits, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def packed_voice(c: LmConfig, weights: dict[str, Tensor], frames: int, random: torch.Generator) -> dict[str, Tensor]:
    """A voice of random codes as NVIDIA packs it: `embeddings` [V-1, 1, 1, D] bfloat16 and `cache` [1, 17, 4]."""
    columns = _voice_columns(c, torch.randint(c.card, (CODEBOOKS, frames), generator=random))
    embeddings = torch.zeros(frames - 1, c.dim)
    for k in range(2 * CODEBOOKS):
        embeddings += weights[f"emb.{k}.weight"].float()[columns[1 + k, : frames - 1]]
    embeddings += weights["text_emb.weight"].float()[columns[0, : frames - 1]]
    cache = torch.full((1, COLUMN_ROWS, 4), c.audio_initial)
    for position in range(max(0, frames - 3), frames + 1):
        known = columns[:, position] >= 0
        cache[0, known, position % 4] = columns[known, position]
    return {"embeddings": embeddings.to(torch.bfloat16)[:, None, None], "cache": cache}


def _voice_columns(c: LmConfig, agent: Tensor) -> Tensor:
    """Tokens [17, V + 1]: acoustic codes come one position late, so the last column has only those, else -1."""
    frames = agent.shape[1]
    user = torch.tensor(c.sine_tokens)[:, None].expand(-1, frames)
    columns = torch.full((COLUMN_ROWS, frames + 1), -1)
    columns[0, :frames] = PAD
    for first, codes in ((1, agent), (1 + CODEBOOKS, user)):
        columns[first, :frames] = codes[0]
        columns[first + 1 : first + CODEBOOKS, 1:] = codes[1:]
        columns[first + 1 : first + CODEBOOKS, 1] = c.audio_initial
    columns[:, 0] = c.audio_initial
    columns[0, 0] = c.text_initial
    return columns


def _archive(voices: dict[str, dict[str, Tensor]]) -> bytes:
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w") as members:
        for name, voice in voices.items():
            content = io.BytesIO()
            torch.save(voice, content)
            member = tarfile.TarInfo(f"voices/{name}.pt")
            member.size = len(content.getvalue())
            members.addfile(member, io.BytesIO(content.getvalue()))
    return packed.getvalue()


def published(lm: LmConfig, mimi: MimiConfig) -> dict[str, object]:
    """The sizes under the keys of Moshi's and Mimi's published configurations, Mimi's groups under `mimi`."""
    same = asdict(lm) | {
        "n_q": 2 * CODEBOOKS, "causal": True, "gating": "silu", "norm": "rms_norm_f32", "positional_embedding": "rope",
        "layer_scale": None, "existing_text_padding_id": PAD, "delays": 2 * [0, *[1] * (CODEBOOKS - 1)],
        "depformer_gating": "silu", "depformer_pos_emb": "none", "depformer_multi_linear": True,
        "depformer_weights_per_step": True, "depformer_layer_scale": None, "depformer_context": CODEBOOKS,
    }  # fmt: skip
    same["delays"] = [0, *same["delays"]]
    codec = asdict(mimi)
    seanet = ("ratios", "n_filters", "dimension", "kernel_size", "residual_kernel_size", "last_kernel_size", "compress")
    transformer = ("d_model", "num_heads", "num_layers", "context", "max_period", "dim_feedforward")
    groups = {
        "seanet": {key: codec[key] for key in seanet} | {"channels": 1, "causal": True, "pad_mode": "constant"},
        "transformer": {key: codec[key] for key in transformer} | {"causal": True, "norm": "layer_norm"},
        "quantizer": {"dimension": mimi.codebook_dim, "n_q": mimi.codebooks_in_file, "bins": mimi.bins},
    }
    return same | {"mimi": groups}
