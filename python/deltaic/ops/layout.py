"""In which order do the patches of a picture come? One answer for pixels, positions and angles, in all op sets."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def merge_order(grid_h: int, grid_w: int, merge_size: int) -> tuple[Ints, Ints]:
    """Row and column of each patch [P] of a grid: merge blocks row-major, the patches inside each block likewise.

    grid_h and grid_w are multiples of merge_size, so that merge_size^2 consecutive rows become one image token.
    """
    m = merge_size
    index = np.arange(grid_h * grid_w, dtype=np.int64).reshape(grid_h // m, m, grid_w // m, m)
    index = index.transpose(0, 2, 1, 3).ravel()
    return index // grid_w, index % grid_w
