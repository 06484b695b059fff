"""What the package does in one replay, step by step."""

from __future__ import annotations

from typing import Any

import numpy as np
from deltaic.model.mtp import MtpModel
from deltaic.model.state import State
from deltaic.model.text import Batch
from deltaic.ops.layout import row_bounds


def further(mtp: MtpModel, m: Any, token: int, state: State, ahead: int) -> Any:
    """What m [1, H] becomes after `token`, a draft, with `ahead` others before it."""
    first = state.mtp_first + state.mtp_length
    state.reserve_mtp(first, ahead + 1)
    angles = mtp.text.rope.text([(first + ahead + state.rope_delta, 1)])
    batch = Batch([], [], [state.mtp], row_bounds(1), np.array([state.mtp_length + ahead]), *angles)
    return mtp._layer(m, mtp.text.embed(np.array([token])), batch)
