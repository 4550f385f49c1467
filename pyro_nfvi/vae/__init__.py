"""Variational autoencoders: a model and a guide for data with one latent each.

:class:`VAE` puts an encoder, a posterior, a prior, a decoder and a likelihood together; each is a
module to choose or to write. Any ``nn.Module`` of the right shapes serves as encoder or decoder.
"""

from pyro_nfvi.inference.amortization import AmortizationGap
from pyro_nfvi.vae.decoders import ConvDecoder, Decoder, MLPDecoder, RecurrentDecoder
from pyro_nfvi.vae.encoders import (
    ConvEncoder,
    Encoder,
    MLPEncoder,
    RecurrentEncoder,
    SetEncoder,
)
from pyro_nfvi.vae.evaluate import LogLikelihood, bits_per_dim
from pyro_nfvi.vae.likelihoods import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    DiscretizedLogistic,
    Gaussian,
    HeteroscedasticGaussian,
    LearnedGaussian,
    Likelihood,
    NegativeBinomial,
    Poisson,
)
from pyro_nfvi.vae.posteriors import (
    AmortizedPosterior,
    DiagonalGaussian,
    FlowPosterior,
    FullGaussian,
)
from pyro_nfvi.vae.priors import FlowPrior, Prior, StandardGaussian, VampPrior
from pyro_nfvi.vae.training import TrainingHistory
from pyro_nfvi.vae.vae import VAE

__all__ = [
    "VAE",
    "AmortizationGap",
    "AmortizedPosterior",
    "Bernoulli",
    "Categorical",
    "ContinuousBernoulli",
    "ConvDecoder",
    "ConvEncoder",
    "Decoder",
    "DiagonalGaussian",
    "DiscretizedLogistic",
    "Encoder",
    "FlowPosterior",
    "FlowPrior",
    "FullGaussian",
    "Gaussian",
    "HeteroscedasticGaussian",
    "LearnedGaussian",
    "Likelihood",
    "LogLikelihood",
    "MLPDecoder",
    "MLPEncoder",
    "NegativeBinomial",
    "Poisson",
    "Prior",
    "RecurrentDecoder",
    "RecurrentEncoder",
    "SetEncoder",
    "StandardGaussian",
    "TrainingHistory",
    "VampPrior",
    "bits_per_dim",
]
