"""Data sets, one file each: how an archive is parsed and packed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from src.data.packed import Packed


class DataSet(Protocol):
    """A data set class; the keyword-only parameters of its constructor are its keys in `conf/data/`.

    `sample` names the module whose `draw(archive)` writes the embedded sample; None if there is none. It is a name and
    not an import, so that a change of the parser does not draw the sample again, nor a change of the sample parse it.
    """

    @property
    def archive_name(self) -> str: ...

    @property
    def sample(self) -> str | None: ...

    def pack(self, archive: Path) -> Packed:
        """Parses and checks an archive.

        Raises:
            SourceError: the archive does not hold this data set.
        """
        ...
