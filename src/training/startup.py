"""A quick start: Lightning without the half of its imports that nothing here uses."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

# torchmetrics, which Lightning imports, imports these where they are installed: 2.4 of 5.3 seconds where it was measured
# (scipy.signal for audio metrics 1.0, torchvision for picture metrics 0.3 on top of its compiler, matplotlib 0.3).
NOT_NEEDED = ("scipy", "torchvision", "matplotlib")


def import_lightning() -> None:
    """Imports torch and Lightning; torchmetrics is told that its optional helpers are not installed.

    Call it before anything else imports Lightning; later it has no effect.
    """
    from lightning_utilities.core import imports

    check, available = imports.RequirementCache._check_requirement, imports.package_available

    def check_without(self: Any) -> None:
        if self.requirement.partition(">")[0] in NOT_NEEDED:
            self.available, self.message = False, "not needed here (src/training/startup.py)"
        else:
            check(self)

    with (
        patch.object(imports.RequirementCache, "_check_requirement", check_without),
        patch.object(imports, "package_available", lambda name: name not in NOT_NEEDED and available(name)),
    ):
        import pytorch_lightning  # noqa: F401
