"""The language model: seventeen token streams in, the agent's text and codes out, all rows one position a step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from app.engine.personaplex.model.config import CODEBOOKS, COLUMN_ROWS, PAD, LmConfig
from app.engine.personaplex.model.depformer import Depformer
from app.engine.personaplex.model.entries import Entry
from app.engine.personaplex.model.guide import Guide, steer
from app.engine.personaplex.model.linear import Linear
from app.engine.personaplex.model.quantize import Weights
from app.engine.personaplex.model.ring import Kv, Ring, kv_dtype
from app.engine.personaplex.model.sampling import Choice, Luck, draw, gumbel
from app.engine.personaplex.model.transformer import Transformer


@dataclass
class LmState:
    """Where every row is in its call. A cleared row is one that no call has.

    `next_agent` int64 [S, 9] are text and agent codes of the position to come, the codes after the first one frame
    behind; `user_acoustics` [S, 7] is what the last user frame still owes it. `history` int32 [S, ring, 17] holds the
    columns that made the ring's keys and values.
    """

    kv: Ring
    history: Tensor
    position: Tensor
    next_agent: Tensor
    user_acoustics: Tensor
    choice: Choice
    guide: Guide

    @classmethod
    def of(cls, config: LmConfig, rows: int, device: torch.device, dtype: torch.dtype, kv: Kv = "bf16") -> "LmState":
        """New rows. `dtype` is the model's."""

        def whole(*shape: int) -> Tensor:
            return torch.zeros(rows, *shape, dtype=torch.int64, device=device)

        return cls(
            kv=Ring.of(config, rows, config.ring, device, kv_dtype(kv, dtype)),
            history=torch.zeros(rows, config.ring, COLUMN_ROWS, dtype=torch.int32, device=device),
            position=whole(),
            next_agent=whole(1 + CODEBOOKS),
            user_acoustics=whole(CODEBOOKS - 1),
            choice=Choice.of(rows, device),
            guide=Guide.of(rows, device),
        )


@dataclass(frozen=True, slots=True)
class Reach:
    """What the host knows of the rows that step, so that nothing has to be asked of the device.

    `longest`: the most positions a row holds, the one to come included. The ranks: the largest top-k of any row.
    """

    longest: int
    text_ranks: int
    audio_ranks: int


class Lm:
    """Weights of the temporal transformer, the depformer and all embeddings. Engine thread only."""

    def __init__(self, config: LmConfig, device: torch.device, dtype: torch.dtype, weights: Weights = "bf16") -> None:
        """`weights`: how large matrices are kept; embeddings, norms and heads are in `dtype`. Raises EngineFault."""

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, device=device, dtype=dtype)

        if device.type == "cuda":
            # On Hopper torch would prefer cuDNN's attention, which makes a plan for each new shape: every part of a
            # prompt is one, and calls would wait for it.
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.config, self.device, self.dtype = config, device, dtype
        self._audio_tables = empty(2 * CODEBOOKS, config.card + 1, config.dim)
        self._text_table = empty(config.text_card + 1, config.dim)
        self._text_weight = empty(config.text_card, config.dim)
        self._text_head = Linear(self._text_weight)
        self.transformer = Transformer(config, device, dtype, weights)
        self.depformer = Depformer(config, device, dtype, weights)
        self._table_start = torch.arange(2 * CODEBOOKS, device=device) * (config.card + 1)

    def entries(self) -> dict[str, Entry]:
        """Every tensor of the checkpoint's model file and where it goes."""
        c = self.config
        named = {
            "text_emb.weight": Entry((c.text_card + 1, c.dim), self._text_table),
            "text_linear.weight": Entry((c.text_card, c.dim), self._text_weight),
        }
        for k, table in enumerate(self._audio_tables):
            named[f"emb.{k}.weight"] = Entry((c.card + 1, c.dim), table)
        return named | self.transformer.entries() | self.depformer.entries()

    def pack(self, rows: int = 1) -> None:
        """Once, when the weights are there; `rows` is how many will step together."""
        self._text_head.pack(rows)
        self._text_weight = self._text_weight.new_empty(0)
        self.transformer.pack(rows)
        self.depformer.pack(rows)

    def embed(self, columns: Tensor) -> Tensor:
        """The inputs [T, D] of columns int64 [T, 17]: audio first and text last, the order that bfloat16 rounds in."""
        audio = self._audio_tables.flatten(0, 1)[columns[:, 1:] + self._table_start]
        total = audio[:, 0]
        for k in range(1, 2 * CODEBOOKS):
            total = total + audio[:, k]
        return total + self._text_table[columns[:, 0]]

    def initial_embedding(self) -> Tensor:
        """[D], the input of a call's very first position: nothing but initial tokens."""
        c = self.config
        column = torch.full((1, COLUMN_ROWS), c.audio_initial, device=self.device)
        column[:, 0] = c.text_initial
        return self.embed(column)[0]

    def text_logits(self, hidden: Tensor) -> Tensor:
        return self._text_head(hidden)

    def step(self, state: LmState, user: Tensor, active: Tensor, reach: Reach) -> Tensor:
        """Take the user's frame of every active row and make the agent's.

        Args:
            state: moved on in place for active rows; of the others only ring slots change that they will write again.
            user: int64 [S, 8], the codes of the frame just heard. It is consumed in this very step; NVIDIA's server
                does so one frame later, with the same tokens.
            active: bool [S].
            reach: what the host knows of the rows.

        Returns:
            int64 [S, 9]: text and codes of the frame that is complete now. Rows that are not active: meaningless.
        """
        column = torch.cat((state.next_agent, user[:, :1], state.user_acoustics), 1)
        row = torch.arange(len(column), device=column.device)
        state.history[row, state.position % self.config.ring] = column.to(torch.int32)
        hidden = self.transformer.step(self.embed(column), state.kv, state.position, active, reach.longest)
        choice = state.choice
        sampled = self._sampled_text(choice, hidden, reach)
        text = steer(state.guide, sampled, state.next_agent[:, 0], active)
        codes = self._codes(choice, hidden, text, reach.audio_ranks)
        frame = torch.cat((state.next_agent[:, :2], codes[:, 1:]), 1)
        state.next_agent.copy_(torch.where(active[:, None], torch.cat((text[:, None], codes), 1), state.next_agent))
        state.user_acoustics.copy_(torch.where(active[:, None], user[:, 1:], state.user_acoustics))
        state.position += active
        choice.drawn += active
        return frame

    def _codes(self, choice: Choice, hidden: Tensor, text: Tensor, ranks: int, steps: int = CODEBOOKS) -> Tensor:
        noise = gumbel(choice.seed, choice.drawn, 1, steps, ranks)
        luck = Luck.of(noise, choice.audio_temperature, choice.audio_top_k)
        return self.depformer.run(hidden, text, lambda codebook, logits: draw(logits, luck, codebook), steps)

    def _sampled_text(self, choice: Choice, hidden: Tensor, reach: Reach) -> Tensor:
        noise = gumbel(choice.seed, choice.drawn, 0, 1, reach.text_ranks)
        return draw(self.text_logits(hidden), Luck.of(noise, choice.text_temperature, choice.text_top_k), 0)

    def open(self, choice: Choice, guide: Guide, hidden: Tensor, reach: Reach) -> Tensor:
        """The first text token and semantic code after a prompt, int64 [1, 2], from its last hidden state [1, D].

        The acoustic codes of that position are not the model's to choose: the prompt's silence still owes them.
        """
        sampled = self._sampled_text(choice, hidden, reach)
        text = steer(guide, sampled, torch.full_like(sampled, PAD), torch.ones_like(sampled, dtype=torch.bool))
        return torch.stack((text, self._codes(choice, hidden, text, reach.audio_ranks, 1)[:, 0]), 1)
