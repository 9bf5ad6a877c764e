"""Text to the model's tokens and back: roles and guided words in, what the agent says out."""

import codecs
import re
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from app.engine.contract import EngineFault

SYSTEM = "<system>"
"""Stands before and after a role. Source: PersonaPlex's prompts."""

_SPACE = "\u2581"
_TAG = re.compile(r"<[^<>\s]+>")
# A page or a database must not meet them, and no voice says them.
_CONTROLS: dict[int, str | None] = dict.fromkeys([*range(32), *range(127, 160)])
_CONTROLS |= dict.fromkeys(map(ord, "\t\n\r"), " ")


class Tokenizer:
    """A SentencePiece model. No text of a caller or a persona can make one of its marks or tags."""

    def __init__(self, file: Path) -> None:
        """Raises EngineFault: the file is missing or no SentencePiece model."""
        try:
            self._model = SentencePieceProcessor(model_proto=file.read_bytes())
            self.size = len(self._model)
        except FileNotFoundError as error:
            raise EngineFault(f"{file}: no such file; download it") from error
        except (OSError, RuntimeError) as error:
            raise EngineFault(f"{file}: cannot be read as a SentencePiece model; download it again") from error
        if not self.size:
            raise EngineFault(f"{file}: a SentencePiece model without tokens; download it again")
        self._pieces = [self._piece(token) for token in range(self.size)]
        self._marks = {token for token, piece in enumerate(self._pieces) if piece == ""}
        self._system = {token for token in self._marks if self._model.id_to_piece(token) == SYSTEM}

    def encode(self, text: str) -> list[int]:
        """The tokens of plain words. What is no word, a mark or a tag, is left out."""
        return [token for token in self._model.encode(self._untagged(text)) if token not in self._marks]

    def words(self, text: str) -> list[int]:
        """The tokens of guided speech. Each word, the first too, opens with a space, as the model says them."""
        line = " ".join(_utf8(text).split())
        opened = self._model.normalize(line).startswith(_SPACE)
        return self.encode(line if opened else f" {line}") if line else []

    def role(self, prompt: str) -> list[int]:
        """The tokens of a role between two `<system>` tags; none for an empty one.

        Tags that are already around it stay. Any other, as a caller's variable could bring, is left out.
        """
        text = inner = _utf8(prompt).strip()
        if len(text) > len(SYSTEM) and text.startswith(SYSTEM) and text.endswith(SYSTEM):
            inner = text[len(SYSTEM) : -len(SYSTEM)]
        plain = self._untagged(inner)
        if not plain.strip():
            return []
        if inner == text or inner != plain:
            text = f"{SYSTEM} {plain.strip()} {SYSTEM}"
        left_out = self._marks - self._system
        return [token for token in self._model.encode(text) if token not in left_out]

    def piece(self, token: int) -> str | bytes:
        """What a token says: text with its space, or one byte of a character's UTF-8; "" for marks and tags."""
        return self._pieces[token] if 0 <= token < self.size else ""

    def _piece(self, token: int) -> str | bytes:
        text = self._model.id_to_piece(token)
        if self._model.is_byte(token):
            return bytes([int(text[1:-1], 16)])
        is_mark = self._model.is_control(token) or self._model.is_unknown(token) or self._model.is_unused(token)
        return "" if is_mark or _TAG.fullmatch(text) else text.replace(_SPACE, " ").translate(_CONTROLS)

    def _untagged(self, text: str) -> str:
        """Without `<system>`, and without what SentencePiece would turn into it, such as full-width letters."""
        text = _utf8(text)
        while SYSTEM in (seen := self._model.normalize(text).replace(_SPACE, " ")):
            text = seen.replace(SYSTEM, " ")
        return text


def _utf8(text: str) -> str:
    """Half a surrogate pair, as JSON can bring it, becomes a question mark: SentencePiece would refuse it."""
    return text.encode("utf-8", "replace").decode("utf-8")


class TextStream:
    """What one row says, token by token. A character in several byte tokens comes out with its last one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.reset()

    def reset(self) -> None:
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The text that this token completes, spaces included; often ""."""
        piece = self._tokenizer.piece(token)
        if not piece:
            return ""
        if isinstance(piece, bytes):
            return self._bytes.decode(piece).translate(_CONTROLS)
        return self._bytes.decode(b"", final=True) + piece
