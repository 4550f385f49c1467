"""Sphinx extension: links into the documentation of others, known without a network.

Intersphinx reads lists of names, ``objects.inv``. Those of whole projects are downloads; these are
the few names that our pages mention, written here.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

from sphinx import addnodes

ALGORITHMS, GUIDES = "inference_algos.html", "infer.autoguide.html"
PROJECTS: dict[str, tuple[str, dict[str, str]]] = {
    "python": ("https://docs.python.org/3", {
        "abc.ABC": "library/abc.html",
        "os.PathLike": "library/os.html",
        **{f"collections.abc.{name}": "library/collections.abc.html"
           for name in ("Callable", "Collection", "Iterable", "Iterator", "Mapping", "Sequence")}}),
    "torch": ("https://docs.pytorch.org/docs/stable", {
        "torch.Tensor": "tensors.html",
        "torch.Size": "size.html",
        "torch.device": "tensor_attributes.html",
        "torch.dtype": "tensor_attributes.html",
        "torch.distributions.distribution.Distribution": "distributions.html",
        "torch.distributions.transformed_distribution.TransformedDistribution":
            "distributions.html",
        "torch.distributions.transforms.Transform": "distributions.html",
        "torch.fx.GraphModule": "fx.html",
        "torch.nn.Module": "generated/torch.nn.Module.html",
        "torch.nn.parameter.Parameter": "generated/torch.nn.parameter.Parameter.html",
        "torch.nn.utils.rnn.PackedSequence": "generated/torch.nn.utils.rnn.PackedSequence.html",
        "torch.utils.data.DataLoader": "data.html"}),
    "pyro": ("https://docs.pyro.ai/en/stable", {
        "pyro.distributions.torch_distribution.TorchDistribution": "distributions.html",
        "pyro.distributions.torch_distribution.TorchDistributionMixin": "distributions.html",
        "pyro.infer.autoguide.AutoContinuous": GUIDES,
        "pyro.infer.autoguide.AutoGuide": GUIDES,
        "pyro.infer.autoguide.AutoGuideList": GUIDES,
        "pyro.infer.autoguide.AutoNormal": GUIDES,
        "pyro.infer.mcmc.NUTS": "mcmc.html",
        "pyro.infer.predictive.Predictive": ALGORITHMS,
        "pyro.infer.svi.SVI": ALGORITHMS,
        "pyro.infer.trace_elbo.Trace_ELBO": ALGORITHMS,
        "pyro.infer.traceenum_elbo.TraceEnum_ELBO": ALGORITHMS,
        "pyro.infer.trace_mean_field_elbo.TraceMeanField_ELBO": ALGORITHMS,
        "pyro.poutine.Trace": "poutine.html",
        "pyro.poutine.handlers.do": "poutine.html"}),
    "numpy": ("https://numpy.org/doc/stable", {
        "numpy.ndarray": "reference/generated/numpy.ndarray.html"}),
    "arviz": ("https://python.arviz.org/en/v0.22.0", {
        f"arviz.{name}": f"api/generated/arviz.{name}.html"
        for name in ("InferenceData", "compare", "ess", "loo", "plot_pair", "plot_ppc", "rhat",
                     "summary")}),
}
SPELLINGS = {  # how our code names what their pages describe under another name
    "Tensor": "torch.Tensor",
    "collections.abc.Callable[[]": "collections.abc.Callable",
    "torch.fx.graph_module.GraphModule": "torch.fx.GraphModule",
    "torch.nn.modules.module.Module": "torch.nn.Module",
    "pyro.do": "pyro.poutine.handlers.do",
    "pyro.infer.Trace_ELBO": "pyro.infer.trace_elbo.Trace_ELBO",
    "pyro.infer.TraceMeanField_ELBO": "pyro.infer.trace_mean_field_elbo.TraceMeanField_ELBO",
    "pyro.infer.TraceEnum_ELBO": "pyro.infer.traceenum_elbo.TraceEnum_ELBO",
    "pyro.infer.SVI": "pyro.infer.svi.SVI",
    "pyro.infer.NUTS": "pyro.infer.mcmc.NUTS",
    "pyro.infer.Predictive": "pyro.infer.predictive.Predictive",
    "pyro.infer.autoguide.guides.AutoContinuous": "pyro.infer.autoguide.AutoContinuous",
    "pyro.infer.autoguide.guides.AutoGuide": "pyro.infer.autoguide.AutoGuide",
    "pyro.poutine.trace_struct.Trace": "pyro.poutine.Trace",
}


def write(app: Any, config: Any) -> None:
    """Write the inventories and point intersphinx to them."""
    folder = Path(app.outdir).parent / "inventories"
    folder.mkdir(parents=True, exist_ok=True)
    config.intersphinx_mapping = {}
    for project, (address, names) in PROJECTS.items():
        (folder / f"{project}.inv").write_bytes(inventory(project, names))
        config.intersphinx_mapping[project] = (address, str(folder / f"{project}.inv"))


def inventory(project: str, names: dict[str, str]) -> bytes:
    """An inventory of version 2: a header, then compressed lines of name, kind and page."""
    head = f"# Sphinx inventory version 2\n# Project: {project}\n# Version: \n"
    head += "# The remainder of this file is compressed using zlib.\n"
    lines = [f"{name} py:{_kind(name)} 1 {page}#$ -" for name, page in names.items()]
    return head.encode() + zlib.compress("\n".join(lines).encode())


def _kind(name: str) -> str:
    return "class" if name.split(".")[-1][:1].isupper() else "function"


def respell(app: Any, doctree: Any) -> None:
    """Rename references before intersphinx looks for them."""
    for node in doctree.findall(addnodes.pending_xref):
        node["reftarget"] = SPELLINGS.get(node.get("reftarget", ""), node.get("reftarget", ""))


def setup(app: Any) -> dict[str, Any]:
    """Tell Sphinx."""
    app.connect("config-inited", write, priority=100)
    app.connect("doctree-read", respell)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
