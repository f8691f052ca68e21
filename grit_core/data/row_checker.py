"""What becomes of a row in training, found without decoding its images where possible."""

from dataclasses import dataclass
from enum import StrEnum

from grit_core.data.encoder import ChatEncoder, EncodedRow
from grit_core.data.image_decoding import read_size
from grit_core.data.image_tokens import ImageTokens, Sizes
from grit_core.data.rows import RowEncoder, faults_at
from grit_core.errors import InvalidDataset
from grit_core.records import ChatRecord
from grit_core.row_file import RowPlace, RowReader


class RowFate(StrEnum):
    """What becomes of a row that is not used as it is."""

    UNUSABLE = "unusable"
    LEFT_OUT = "left_out"
    CUT = "cut"


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """One row that is not used as it is."""

    line: int
    fate: RowFate
    words: str = ""
    """What is wrong with an unusable row; the file's name and the line come first."""


@dataclass(frozen=True, slots=True)
class PlainSequence:
    """One sequence of a row before its images are expanded."""

    num_tokens: int
    images: tuple[int, ...]
    """Which of the row's images it shows."""


def plain_sequences(encoder: ChatEncoder, record: ChatRecord) -> tuple[PlainSequence, ...]:
    """Render a row, place its labels on the text, and count its tokens without its images.

    A row that cannot be written with this model's template, or in which no token is the
    assistant's, raises `InvalidDataset`.
    """
    return tuple(
        PlainSequence(encoder.count_plain_tokens(chat), tuple(range(chat.num_images)))
        for chat in encoder.render(record)
    )


class RowChecker:
    """Checks rows one by one, and learns from each how long rows with images are."""

    def __init__(self, row_encoder: RowEncoder) -> None:
        """Check rows for the job that `row_encoder` encodes for."""
        self._row_encoder = row_encoder
        self._image_tokens = ImageTokens(row_encoder.encoder.renderer.processor)

    def finding(self, reader: RowReader, place: RowPlace) -> Finding | None:
        """Return what becomes of a row; `None` when it is used as it is."""
        try:
            return self._finding(reader.record_at(place), reader.words(place))
        except InvalidDataset as error:
            return Finding(place.line, RowFate.UNUSABLE, str(error))

    def _finding(self, record: ChatRecord, place: str) -> Finding | None:
        """As `finding`, but an unusable row is an `InvalidDataset`."""
        if not record.images:  # then an encoding costs no more than a check
            return self._encoded(self._row_encoder.whole(record, place=place), record, place)
        with faults_at(place):
            plain = plain_sequences(self._row_encoder.encoder, record)
            sizes = tuple(read_size(data, index=i) for i, data in enumerate(record.images))
        shown: list[Sizes] = [tuple(sizes[i] for i in each.images) for each in plain]
        bounds = [
            self._image_tokens.bounds(each.num_tokens, own)
            for each, own in zip(plain, shown, strict=True)
        ]
        known = [each for each in bounds if each is not None]
        limit = self._row_encoder.max_length
        if len(known) == len(bounds) and all(most <= limit for _, most in known):
            return None
        surely_too_long = any(least > limit for least, _ in known)
        if surely_too_long and self._row_encoder.on_long_rows == "skip":
            return Finding(record.line, RowFate.LEFT_OUT)
        whole = self._row_encoder.whole(record, place=place)
        if len(whole) == len(plain):
            for each, own, row in zip(plain, shown, whole, strict=True):
                self._image_tokens.learn(each.num_tokens, own, num_tokens=len(row.input_ids))
        return self._encoded(whole, record, place)

    def _encoded(
        self, whole: tuple[EncodedRow, ...], record: ChatRecord, place: str
    ) -> Finding | None:
        """Return what becomes of a row that was encoded in full."""
        sequences = self._row_encoder.within(whole, place=place)
        if not sequences:
            return Finding(record.line, RowFate.LEFT_OUT)
        if any(each.num_cut_tokens for each in sequences):
            return Finding(record.line, RowFate.CUT)
        return None
