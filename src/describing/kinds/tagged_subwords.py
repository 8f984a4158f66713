"""Tagged sentences that are also cut into subwords: described by their words."""

from __future__ import annotations

from src.describing.kinds.tagged import Tagged

DESCRIPTION = Tagged()
