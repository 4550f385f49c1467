"""Engine: pure functions of tensors become compiled loops. It knows no flows and no Pyro.

:func:`record` writes a function down as one graph, :mod:`pyro_nfvi.engine.c` turns the graph into
C code, :class:`Compiled` takes the fastest tier that works, and :class:`Stepper` optimises.
"""

from pyro_nfvi.engine.compiled import TIERS, Compiled, Engine, check_tier, try_record
from pyro_nfvi.engine.record import NotRecordable, Recording, record
from pyro_nfvi.engine.stepper import Stepper

__all__ = ["TIERS", "Compiled", "Engine", "NotRecordable", "Recording", "Stepper", "check_tier",
           "record", "try_record"]
