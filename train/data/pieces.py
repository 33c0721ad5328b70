"""Long documents in pieces, to be tokenized one by one."""

import re
from collections.abc import Iterable, Iterator

# Longer texts are encoded in pieces: in parallel, and with bounded memory.
PIECE_CHARACTERS = 2**17

# A part of a document, and whether it is the last part.
Piece = tuple[str, bool]

_AFTER_NEWLINE = re.compile(r".*\S\n(?=\S)", re.DOTALL)
_BEFORE_SPACE = re.compile(r".*\S(?= \S)", re.DOTALL)


def split_documents(documents: Iterable[str | Iterable[str]]) -> Iterator[Piece]:
    """Cuts long documents into pieces that can be encoded one by one.

    The cuts are where byte-level tokenizers cut anyway, if there is such a place: at
    a single newline or space. (Tokenizers that begin every text with a space, like
    LLaMA's, then have one at a cut.)

    Args:
      documents: each a text, or its blocks one after the other; how it is divided
        into blocks does not matter.

    Yields:
      a piece, and whether a document ends with it.
    """
    for document in documents:
        text = ""
        for block in [document] if isinstance(document, str) else document:
            text, start = text + block, 0
            while (limit := start + PIECE_CHARACTERS) < len(text):
                cut = _AFTER_NEWLINE.match(text, start, limit) or _BEFORE_SPACE.match(
                    text, start, limit
                )
                stop = cut.end() if cut else limit
                yield text[start:stop], False
                start = stop
            text = text[start:]
        yield text, True
