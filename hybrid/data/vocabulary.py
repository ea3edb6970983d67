"""Tokenizers: text to ids and back, saved as one small JSON file that needs no corpus to be read again."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from hybrid.data.files import DataError, reason
from hybrid.files import write_atomically

FORMAT = 1  # of the JSON file
KINDS = ("char", "bpe")
BYTES = 256  # the base alphabet of byte-level BPE


class Tokenizer(ABC):
    """What every tokenizer has. Ids are 0 .. vocab_size - 1."""

    kind: ClassVar[str]
    vocab_size: int

    @abstractmethod
    def encode_blocks(self, text: str) -> Iterator[np.ndarray]:
        """The ids of ``text`` in order, int64, a block at a time: a large text costs little more than its ids."""

    @abstractmethod
    def first_token_bytes(self, text: str, first_id: int) -> int:
        """How many UTF-8 bytes of ``text`` its first token stands for, given that token's id."""

    @abstractmethod
    def _decode(self, ids: np.ndarray) -> str: ...

    @abstractmethod
    def _content(self) -> dict[str, Any]:
        """Everything needed to build this tokenizer again, as plain data."""

    def encode(self, text: str) -> np.ndarray:
        """Ids of ``text``, int64 ``[tokens]``. Raises ``DataError`` for what the vocabulary cannot express."""
        return np.concatenate([np.empty(0, np.int64), *self.encode_blocks(text)])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids ``[tokens]``. Raises ``DataError`` for an id outside of the vocabulary."""
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise DataError(f"token ids must be 0 to {self.vocab_size - 1}, got {ids.min()} to {ids.max()}")
        return self._decode(ids)

    @cached_property
    def _json(self) -> bytes:
        content = {"format": FORMAT, "kind": self.kind, **self._content()}
        return json.dumps(content, sort_keys=True, separators=(",", ":")).encode() + b"\n"

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the file that ``save`` writes."""
        return hashlib.sha256(self._json).hexdigest()

    def save(self, path: Path | str) -> None:
        """Write the JSON file that ``load_tokenizer`` reads, in one step. Raises ``OSError``."""
        write_atomically(Path(path), lambda file: file.write(self._json))


class CharTokenizer(Tokenizer):
    """One id a character, in the order of ``characters``; with ``unknown``, one more id for every other character."""

    kind = "char"
    BLOCK = 1 << 22  # characters

    def __init__(self, characters: str, unknown: bool = False) -> None:
        if not characters or len(set(characters)) != len(characters):
            raise DataError("a character vocabulary must be distinct characters, at least one; rebuild the tokenizer")
        self.characters = characters
        self.unknown_id = len(characters) if unknown else None
        self.vocab_size = len(characters) + unknown

    @classmethod
    def train(cls, train_text: str, val_text: str) -> CharTokenizer:
        """The sorted characters of the training split, and an unknown id only if the validation split needs one."""
        known = set(train_text)
        return cls("".join(sorted(known)), unknown=not known.issuperset(val_text))

    @cached_property
    def _id_of_point(self) -> np.ndarray:
        """Ids by Unicode code point; one more entry at the end stands for all higher ones."""
        points = np.array([ord(character) for character in self.characters])
        table = np.full(points.max() + 2, -1 if self.unknown_id is None else self.unknown_id, dtype=np.int64)
        table[points] = np.arange(len(points))
        return table

    def encode_blocks(self, text: str) -> Iterator[np.ndarray]:
        table = self._id_of_point
        for start in range(0, len(text), self.BLOCK):
            block = text[start : start + self.BLOCK]
            points = np.frombuffer(block.encode("utf-32-le", "surrogatepass"), dtype="<u4")
            ids = table[np.minimum(points, len(table) - 1)]
            if self.unknown_id is None and ids.min() < 0:
                missing = sorted(set(block) - set(self.characters))
                more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
                raise DataError(
                    f"the character vocabulary lacks {' '.join(ascii(character) for character in missing[:10])}{more}; "
                    "leave them out, or train with data.tokenizer=bpe, which knows every character"
                )
            yield ids

    def first_token_bytes(self, text: str, first_id: int) -> int:
        return len(text[0].encode())

    def _decode(self, ids: np.ndarray) -> str:
        points = np.array([ord(character) for character in self.characters + "\ufffd"], dtype="<u4")
        return points[ids].tobytes().decode("utf-32-le")

    def _content(self) -> dict[str, Any]:
        return {"characters": self.characters, "unknown": self.unknown_id is not None}


class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding (GPT-2's), on the ``tokenizers`` library, which is imported when first needed.

    ``tokens`` are written in GPT-2's byte alphabet, one letter a byte, in the order of their ids; ``merges`` are
    ``"left right"`` in the order of their priority.
    """

    kind = "bpe"
    BLOCK = 256  # pieces
    LINES = 32  # a piece: the library is fastest on a few hundred to a few thousand characters
    # A cut before a newline with a visible character right after it is where GPT-2's pattern cuts as well, so that
    # encoding piece by piece gives the ids of the whole text, only faster.
    CUT = re.compile(r"(?=\n[!-~\w])")

    def __init__(self, tokens: list[str], merges: list[str]) -> None:
        self.tokens = tokens
        self.merges = merges
        self.vocab_size = len(tokens)

    @classmethod
    def train(cls, train_text: str, vocab_size: int) -> BPETokenizer:
        """Learn at most ``vocab_size`` tokens; a text with too few repetitions gives fewer. Deterministic."""
        if vocab_size <= BYTES:
            raise DataError(f"data.vocab_size must be at least {BYTES + 1} with data.tokenizer=bpe, got {vocab_size}")
        library = _tokenizers()
        learner = _bare(library, library.models.BPE())
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            show_progress=False,
            initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        )
        learner.train_from_iterator(cls._pieces(train_text), trainer)
        vocabulary = learner.get_vocab()
        merges = json.loads(learner.to_str())["model"]["merges"]
        return cls(sorted(vocabulary, key=vocabulary.__getitem__), [" ".join(pair) for pair in merges])

    @cached_property
    def _encoder(self) -> Any:
        library = _tokenizers()
        vocabulary = {token: index for index, token in enumerate(self.tokens)}
        merges = [tuple(merge.split(" ")) for merge in self.merges]
        return _bare(library, library.models.BPE(vocabulary, merges))

    @classmethod
    def _pieces(cls, text: str) -> Iterator[str]:
        lines = cls.CUT.split(text)
        for start in range(0, len(lines), cls.LINES):
            yield "".join(lines[start : start + cls.LINES])

    def encode_blocks(self, text: str) -> Iterator[np.ndarray]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"the text holds half a character at {error.start}; give it as valid UTF-8") from error
        pieces = list(self._pieces(text))
        for start in range(0, len(pieces), self.BLOCK):
            encoded = self._encoder.encode_batch(pieces[start : start + self.BLOCK], add_special_tokens=False)
            yield np.fromiter(chain.from_iterable(piece.ids for piece in encoded), dtype=np.int64)

    def first_token_bytes(self, text: str, first_id: int) -> int:
        return len(self.tokens[first_id])

    def _decode(self, ids: np.ndarray) -> str:
        return self._encoder.decode(ids.tolist(), skip_special_tokens=False)

    def _content(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "merges": self.merges}


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Read what ``Tokenizer.save`` wrote. Raises ``DataError`` for a missing file or one that is not a tokenizer's."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {path} ({reason(error)}); give the run's own file") from error
    try:
        content = json.loads(data)
        if content["format"] != FORMAT:
            raise DataError(
                f"{path} is a tokenizer of format {content['format']}, this version reads {FORMAT}; "
                "use the version that wrote it"
            )
        if content["kind"] == "char":
            return CharTokenizer(content["characters"], content["unknown"])
        if content["kind"] == "bpe":
            return BPETokenizer(content["tokens"], content["merges"])
        problem = f"unknown kind {content['kind']!r}"
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise DataError(f"{path} is no tokenizer ({problem}); give a file that Tokenizer.save wrote")


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise DataError("data.tokenizer=bpe needs a library that is not installed: pip install tokenizers") from error
    return tokenizers


def _bare(library: Any, model: Any) -> Any:
    """A tokenizer that changes nothing about the text: no normaliser, no special tokens, no added space."""
    tokenizer = library.Tokenizer(model)
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    return tokenizer
