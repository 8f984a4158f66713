"""The colours of the twelve classes of the CMP Facade Database in pix2pix's `facades` archive."""

from __future__ import annotations

# Measured on the label halves of 120 training images of the official archive: the median of the pixels nearest to each
# cluster, over pixels whose 5x5 neighbourhood is flat; 99 % of those lie within 7 units of their centre. The classes
# follow the "jet" colour map in the database's own order. By its documentation, a cornice is above a window, a sill
# below it, and a molding runs across the facade.
FACADE_PALETTE: dict[str, tuple[int, int, int]] = {
    "background": (0, 0, 222),
    "facade": (0, 48, 255),
    "window": (0, 128, 255),
    "door": (1, 207, 255),
    "cornice": (32, 255, 224),
    "sill": (112, 254, 142),
    "balcony": (192, 255, 63),
    "blind": (255, 240, 1),
    "deco": (255, 159, 0),
    "molding": (255, 80, 0),
    "pillar": (254, 0, 0),
    "shop": (174, 0, 1),
}
