"""Calibration: is a way of fitting right on average, over data simulated from the prior?

:func:`calibrate` simulates, fits and ranks; :class:`Calibration` holds the ranks, tests them, and
draws them.
"""

from pyro_nfvi.calibration.calibrate import Calibration, calibrate

__all__ = ["Calibration", "calibrate"]
