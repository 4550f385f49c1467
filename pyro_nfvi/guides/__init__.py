"""Guides: flows over the latents of a Pyro model.

:class:`AutoFlow` draws all latents of a model from one flow and goes wherever Pyro takes an
``AutoContinuous`` guide; :class:`AutoAmortizedFlow` draws the latents of a plate from a flow
that reads each element's data; :class:`GuideDraws` reads any other guide of Pyro's;
:class:`LatentLayout` is the map between named sites and the flow's vector.
"""

from pyro_nfvi.guides.auto_amortized import AutoAmortizedFlow
from pyro_nfvi.guides.auto_flow import (
    AutoFlow,
    AutoGaussian,
    AutoIAF,
    AutoPlanar,
    AutoRadial,
    AutoSpline,
)
from pyro_nfvi.guides.guide_draws import GuideDraws
from pyro_nfvi.guides.layout import LatentLayout, LatentSite

__all__ = ["AutoAmortizedFlow", "AutoFlow", "AutoGaussian", "AutoIAF", "AutoPlanar", "AutoRadial",
           "AutoSpline", "GuideDraws", "LatentLayout", "LatentSite"]
