"""Lists the libraries whose models are tried, with their requirements."""

from __future__ import annotations

from typing import NamedTuple


class Library(NamedTuple):
    """A library, which is installed into a separate environment.

    Attributes:
      models: the module of `benchmarks.third_party.models` that has its models.
      requirements: the packages to install, the library first.
      why: the reason, if the version is not the newest.
    """

    models: str
    requirements: tuple[str, ...]
    why: str = ""

    @property
    def distribution(self) -> str:
        return self.requirements[0].split("=")[0].split("<")[0]


NO_FLAX = "the last with models in Flax"
NIGHTLY = "tfp-nightly"  # TensorFlow Probability as released does not import with JAX >= 0.7
LIBRARIES = (
    Library("transformers", ("transformers==4.55.*", "flax"), NO_FLAX),
    Library(
        "transformers_t5",
        ("transformers==4.55.*", "flax", "jax==0.7.*", "jaxlib==0.7.*"),
        "its T5 calls jnp.clip as JAX < 0.8 had it",
    ),
    Library("diffusers", ("diffusers==0.32.*", "transformers==4.55.*", "flax"), NO_FLAX),
    Library("flax", ("flax",)),
    Library("equinox", ("equinox",)),
    Library("dm_haiku", ("dm-haiku",)),
    Library("keras", ("keras",)),
    Library("equimo", ("equimo",)),
    Library("diffrax", ("diffrax",)),
    Library("optimistix", ("optimistix",)),
    Library("jaxopt", ("jaxopt",)),
    Library("numpyro", ("numpyro",)),
    Library("tinygp", ("tinygp",)),
    Library("gpjax", ("gpjax",)),
    Library("netket", ("netket",)),
    Library("jraph", ("jraph", "dm-haiku")),
    Library("e3nn_jax", ("e3nn-jax", "flax")),
    Library("distrax", ("distrax", NIGHTLY, "dm-haiku")),
    Library("rlax", ("rlax", NIGHTLY, "dm-haiku")),
    Library("kfac_jax", ("kfac-jax", NIGHTLY)),
    Library("dynamax", ("dynamax", NIGHTLY)),
    Library("ott", ("ott-jax", "flax")),
    Library("penzai", ("penzai",)),
    Library("flowjax", ("flowjax",)),
    Library("mamba2_jax", ("mamba2-jax",)),
    Library("jaxkan", ("jaxkan",)),
    Library("spyx", ("spyx",)),
    Library("brax", ("brax",)),
    Library("e3x", ("e3x",)),
    Library("qwix", ("qwix",)),
    Library("jax_md", ("jax-md",)),
    Library("pennylane", ("pennylane",)),
    Library("rax", ("rax",)),
)
# With Python 3.11 and JAX >= 0.7.
NOT_TRIED = {
    "efax": "what Python 3.11 may install needs Python 3.12 to import",
    "recurrentgemma": "it imports what JAX has removed",
    "discretax": "it needs Python 3.12",
}
