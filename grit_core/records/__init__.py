"""Dataset rows: the one reader of the chat format, used by the upload check and by the trainer.

A row is an object `{"messages": [...]}` in the OpenAI chat shape. Image parts hold their image
(`{"type": "image_url", "image_url": {"url": "data:..." | "relative/path.png"}}` and other
programs' forms), or take it from an `images` or `image` column (Hugging Face). No image library is
needed here: images are bytes, and their first bytes say which format they are.
"""

from grit_core.records.chat import ChatRecord, ImagePart, Message, Role, TextPart
from grit_core.records.columns import READ, may_bear_meaning
from grit_core.records.faults import InvalidRecord, RowFault
from grit_core.records.foreign_formats import foreign_format
from grit_core.records.image_files import (
    ImageNotFound,
    ResolveImage,
    images_beside,
    is_safe_path,
    no_images,
    normalize_path,
)
from grit_core.records.reader import (
    BYTE_ORDER_MARK,
    MAX_LINE_BYTES,
    is_blank_line,
    parse_line,
    parse_prompt,
    parse_record,
    read_records,
)
from grit_core.records.row_reader import MAX_IMAGES, MAX_MESSAGES, MAX_TEXT_CHARACTERS

__all__ = [
    "BYTE_ORDER_MARK",
    "MAX_IMAGES",
    "MAX_LINE_BYTES",
    "MAX_MESSAGES",
    "MAX_TEXT_CHARACTERS",
    "READ",
    "ChatRecord",
    "ImageNotFound",
    "ImagePart",
    "InvalidRecord",
    "Message",
    "ResolveImage",
    "Role",
    "RowFault",
    "TextPart",
    "foreign_format",
    "images_beside",
    "is_blank_line",
    "is_safe_path",
    "may_bear_meaning",
    "no_images",
    "normalize_path",
    "parse_line",
    "parse_prompt",
    "parse_record",
    "read_records",
]
