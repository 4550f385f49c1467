"""Plots: pictures of a fitted posterior, by matplotlib from ArviZ's data, tail fit and densities.

:func:`plot_elbo`, :func:`plot_weights` and :func:`plot_pareto_k` show the fit,
:func:`plot_marginals` and :func:`plot_pairs` the posterior beside a reference,
:func:`plot_predictive` the data; :func:`fit_pictures` puts words to all of them, for the page that
:func:`write_page` writes. ArviZ's own pictures of marginals and pairs have other names and
arguments in each of its major versions, and none has a reference beside a fit; these are the same
under both. :func:`plot_flow` draws a flow of two coordinates, layer by layer.
"""

from pyro_nfvi.plots.elbo import plot_elbo
from pyro_nfvi.plots.flow import plot_flow
from pyro_nfvi.plots.marginals import plot_marginals
from pyro_nfvi.plots.page import versions, write_page
from pyro_nfvi.plots.pairs import plot_pairs
from pyro_nfvi.plots.pareto_k import plot_pareto_k
from pyro_nfvi.plots.pictures import Picture, fit_pictures
from pyro_nfvi.plots.predictive import plot_predictive
from pyro_nfvi.plots.weights import plot_weights

__all__ = ["Picture", "fit_pictures", "plot_elbo", "plot_flow", "plot_marginals",
           "plot_pairs", "plot_pareto_k", "plot_predictive", "plot_weights", "versions",
           "write_page"]
