"""Compare each method for norms of convolutions' gradients with vmap(grad)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import psclip_optax as psc
from psclip_optax.engine import parts
from psclip_optax.engine.analysis.sites import Site
from psclip_optax.engine.analysis.views import View
from psclip_optax.engine.routes.convolution import patches
from psclip_optax.engine.routes.convolution import route as conv
from psclip_optax.engine.routes.convolution.geometry import window
from psclip_optax.engine.routes.convolution.layouts import Pixels
from psclip_optax.engine.routes.convolution.route import CONVOLUTION
from psclip_optax.engine.routes.convolution.ways import ways, ways_on_tpu
from psclip_optax.engine.routes.route import samples_first
from tests import slow
from tests.numerics import assert_close, clipped_mean, enable_x64

WAYS = [
    *("unfolded inputs", "unfolded cotangents", "multiplied", "gram of pixels", "gram of patches"),
    "shifted",  # a TPU's
]


def normal(seed, *shape):
    """Draw normal numbers in JAX's default dtype by NumPy: compiling XLA's takes long."""
    dtype = jax.dtypes.canonicalize_dtype(float)
    return jax.device_put(np.random.default_rng(seed).normal(size=shape).astype(dtype))


class Case(NamedTuple):
    """A convolution of images in a layout with channels last, or first."""

    image: tuple[int, ...]
    kernel: tuple[int, ...]
    channels: tuple[int, int] = (3, 4)
    stride: tuple[int, ...] | None = None
    padding: str | tuple[tuple[int, int], ...] = "SAME"
    input_dilation: tuple[int, ...] | None = None
    kernel_dilation: tuple[int, ...] | None = None
    groups: int = 1
    images: int = 1
    channels_last: bool = True

    @property
    def layouts(self):
        spatial = "DHW"[-len(self.image) :]
        of_pixels = f"N{spatial}C" if self.channels_last else f"NC{spatial}"
        return of_pixels, f"{spatial}IO" if self.channels_last else f"OI{spatial}", of_pixels

    def shaped(self, layout, outer, inner):
        sizes = dict(zip("DHW"[-len(self.image) :], self.image, strict=True))
        return tuple({**sizes, **outer, **inner}[axis] for axis in layout)

    def shapes(self):
        """Return the shapes of a kernel and of one sample's images."""
        num_in, num_out = self.channels
        of_pixels, of_kernel, _ = self.layouts
        spatial = dict(zip("DHW"[-len(self.image) :], self.kernel, strict=True))
        kernel = {**spatial, "I": num_in, "O": num_out * self.groups}
        shape = self.shaped(of_pixels, {"N": self.images}, {"C": num_in * self.groups})
        return tuple(kernel[axis] for axis in of_kernel), shape

    def arguments(self, n):
        kernel, images = self.shapes()
        return normal(0, *kernel), normal(1, n, *images)

    def __call__(self, x, w):
        ones = (1,) * len(self.image)
        padding = self.padding
        if self.input_dilation and padding == "SAME":
            padding = "VALID"
        return lax.conv_general_dilated(
            x,
            w,
            self.stride or ones,
            padding,
            self.input_dilation,
            self.kernel_dilation,
            self.layouts,
            self.groups,
        )


CASES = {
    "3×3": Case((5, 4), (3, 3)),
    "3×3, channels first": Case((5, 4), (3, 3), channels_last=False),
    "stride 2": Case((6, 5), (3, 3), stride=(2, 2)),
    "strides 2 and 3, no padding": Case((7, 8), (3, 2), stride=(2, 3), padding="VALID"),
    "stride beyond the kernel": Case((7, 7), (2, 1), stride=(3, 2), padding="VALID"),
    "patches": Case((6, 6), (3, 3), stride=(3, 3)),
    "1×1": Case((4, 5), (1, 1)),
    "1×1 and stride": Case((5, 5), (1, 1), stride=(2, 2), padding="VALID"),
    "kernel as large as the image": Case((4, 4), (4, 4), padding="VALID"),
    "kernel larger than the image": Case((2, 3), (5, 4)),
    "padding beyond the kernel": Case((3, 4), (2, 2), padding=((3, 4), (0, 5))),
    "negative padding": Case((7, 6), (3, 2), padding=((-2, 1), (1, -1))),
    "dilated kernel": Case((8, 7), (3, 2), kernel_dilation=(2, 3)),
    "dilated beyond the output": Case((9,), (2,), kernel_dilation=(7,), padding="VALID"),
    "transposed": Case((3, 4), (3, 3), padding=((2, 1), (2, 2)), input_dilation=(2, 2)),
    "transposed, by other strides": Case((3, 4), (4, 2), padding=((1, 3), (1, 0)), input_dilation=(3, 2)),
    "dilated input and stride": Case((5, 6), (3, 4), stride=(3, 2), padding=((1, 2), (2, 1)), input_dilation=(2, 4)),
    "common factor": Case((5, 4), (4, 3), stride=(2, 4), padding=((1, 2), (2, 1)), input_dilation=(4, 2)),
    "all dilated": Case((4, 5), (3, 2), stride=(2, 1), padding=((1, 1), (-1, 2)), input_dilation=(2, 3), kernel_dilation=(3, 2)),
    "entries without effect": Case((2,), (3,), padding=((1, 0),), input_dilation=(5,)),
    "no effect at all": Case((3,), (1,), stride=(3,), padding=((1, 1),), input_dilation=(3,), kernel_dilation=(1,)),
    "groups": Case((4, 5), (3, 2), (2, 3), groups=3),
    "groups, channels first": Case((4, 5), (3, 2), (2, 3), groups=3, channels_last=False),
    "depthwise": Case((5, 4), (3, 3), (1, 1), groups=4),
    "depthwise with a multiplier and stride": Case((5, 4), (3, 3), (1, 2), groups=3, stride=(2, 2)),
    "depthwise transposed": Case((3,), (3,), (1, 1), groups=4, padding=((2, 1),), input_dilation=(2,)),
    "one channel": Case((5, 5), (3, 3), (1, 4)),
    "one output": Case((5, 5), (3, 3), (4, 1)),
    "several images": Case((4, 4), (3, 3), images=3),
    "1-D": Case((9,), (3,), kernel_dilation=(2,), padding=((4, 0),)),
    "3-D": Case((3, 4, 3), (2, 3, 2), (2, 3), stride=(1, 2, 1)),
}  # fmt: skip


def site_of(case):
    w, x = case.arguments(1)
    (eqn,) = jax.make_jaxpr(case)(x[0], w).eqns
    return site_at(eqn)


def site_at(eqn, path=(0,)):
    return Site(path, eqn, 1, CONVOLUTION, View(0, (), (), ()), (), ())


def sides_of(site, case, n):
    """Return inputs, and random cotangents of outputs."""
    _, x = case.arguments(n)
    return x, normal(2, n, *site.leaving.aval.shape)


def expected(case, x, dy):
    w, _ = case.arguments(1)

    def of_one(x, dy):
        (gradient,) = jax.vjp(lambda w: case(x, w), w)[1](dy)
        return jnp.sum(jnp.square(gradient))

    return jax.jit(jax.vmap(of_one))(x, dy)


def squared_norms(site, x, dy):
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return CONVOLUTION.squared_norms([site], {site.path: (x,)}, {site.path: dy}, dtype)


def from_patches(site, x, dy):
    sides = (tuple(samples_first(site, side) for side in both) for both in ((x,), (dy,)))
    return patches.squared_norms(Pixels((site,), *sides), jnp.float64)


def by_each_way(site, x, dy):
    """Compute norms by each method, with the costs of the others set too high."""
    norms = {}
    all_ways = ways_on_tpu
    for name in WAYS:
        with pytest.MonkeyPatch.context() as patch:
            chosen = lambda *shapes, name=name: {name: all_ways(*shapes)[name]}
            patch.setattr(conv, "ways", chosen)
            try:
                norms[name] = squared_norms(site, x, dy)
            except KeyError:
                assert name in ("unfolded cotangents", "shifted")
    return norms


@pytest.mark.parametrize("name", slow.but([*CASES][::2], CASES))
def test_each_way_to_the_norms(name):
    case = CASES[name]
    with enable_x64(True):
        site = site_of(case)
        x, dy = sides_of(site, case, 3)

        def each(x, dy):
            return by_each_way(site, x, dy), from_patches(site, x, dy), expected(case, x, dy)

        by_way, of_patches, wanted = jax.jit(each)(x, dy)
    assert len(by_way) >= 4
    for norms in (*by_way.values(), of_patches):
        assert_close(norms, wanted, 1e-10, floor=1e-300)


@pytest.mark.parametrize(
    ("case", "is_patchwise"),
    [
        (Case((8, 8), (4, 4), stride=(4, 4), padding="VALID"), True),
        (Case((8, 8), (4, 4), stride=(2, 2)), False),
        (Case((8, 8), (1, 1)), False),
    ],
)
def test_patches_are_taken_where_they_do_not_overlap(case, is_patchwise):
    assert conv._is_patchwise([site_of(case)]) == is_patchwise


def test_pixels_that_nothing_reads_do_not_matter():
    # Determined by the shape: every second pixel, and a border that negative padding crops.
    case = Case((5, 6), (1, 2), stride=(2, 1), padding=((0, 0), (-2, -1)))
    site = site_of(case)
    x, dy = sides_of(site, case, 2)
    unread = x.at[:, :, 1::2].set(jnp.nan).at[:, :, :, :2].set(jnp.inf).at[:, :, :, -1].set(jnp.nan)
    by_way = by_each_way(site, unread, dy)
    assert not {"unfolded cotangents", "shifted"}.intersection(by_way)
    for norms in by_way.values():
        assert_close(norms, expected(case, x, dy), 1e-5)


def test_pixels_between_those_that_a_stride_reads_do_not_matter():
    case = CASES["1×1 and stride"]
    site = site_of(case)
    x, dy = sides_of(site, case, 2)
    unread = x.at[:, :, 1::2].set(jnp.nan).at[:, :, :, 1::2].set(jnp.inf)
    by_way = by_each_way(site, unread, dy)
    assert "shifted" in by_way
    for norms in by_way.values():
        assert_close(norms, expected(case, x, dy), 1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_sample_that_is_not_finite_stays_alone(bad):
    case = CASES["3×3"]
    site = site_of(case)
    x, dy = sides_of(site, case, 3)
    bad_x, bad_dy = x.at[1, 0, 2, 1, 0].set(bad), dy.at[1, 0, 0, 0, 0].set(bad)
    both = lambda x, dy: by_each_way(site, x, dy)
    wanted = expected(case, x, dy)[jnp.array([0, 2])]
    for by_way in (jax.jit(both)(bad_x, dy), jax.jit(both)(x, bad_dy)):
        for norms in by_way.values():
            assert not np.isfinite(norms[1])
            assert_close(norms[jnp.array([0, 2])], wanted, 1e-5)


@pytest.mark.parametrize("name", ["3×3", "depthwise", "several images"])
def test_a_few_samples_at_a_time(name, monkeypatch):
    case = CASES[name]
    with enable_x64(True):
        site = site_of(case)
        for n, num_chunks in [(6, 2), (6, 6), (7, 3), (11, 5)]:
            x, dy = sides_of(site, case, n)
            monkeypatch.setattr(parts, "number_of_parts", lambda *_, k=num_chunks: k)
            monkeypatch.setattr(jax, "device_count", lambda: 1)
            norms = jax.jit(lambda x, dy: squared_norms(site, x, dy))
            assert "scan" in str(jax.make_jaxpr(norms)(x, dy))
            assert_close(norms(x, dy), expected(case, x, dy), 1e-10)


@pytest.mark.parametrize("n", [1, 7, 32, 97, 100])
@pytest.mark.parametrize("caches", [0, 1, 5, 1000])
def test_as_few_chunks_as_fit_a_cache(n, caches):
    number = parts.number_of_parts(n, caches, may_overlap=True)
    assert min(max(1, caches), n) <= number <= min(max(1, 2 * caches), n)
    if n in (32, 100):
        assert n % number == 0


def test_samples_are_seen_through_vmap(monkeypatch):
    monkeypatch.setattr(conv, "_BYTES_AT_ONCE_ON_CPU", 1)
    case = CASES["3×3"]
    site = site_of(case)
    x, dy = sides_of(site, case, 6)
    one = lambda x, dy: squared_norms(site, x[None], dy[None])[0]
    assert "length=6" in str(jax.make_jaxpr(jax.vmap(one))(x, dy))
    assert_close(jax.vmap(one)(x, dy), expected(case, x, dy), 1e-5)
    shared = jax.vmap(one, in_axes=(0, None))(x, dy[0])
    assert_close(shared, expected(case, x, jnp.stack([dy[0]] * 6)), 1e-5)
    twice = jax.vmap(jax.vmap(one))(x.reshape(2, 3, *x.shape[1:]), dy.reshape(2, 3, *dy.shape[1:]))
    assert_close(twice.ravel(), expected(case, x, dy), 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_are_accumulated_in_float32(dtype):
    case = Case((16, 16), (3, 3), (8, 8))
    site = site_of(case)
    x, dy = (side.astype(dtype) for side in sides_of(site, case, 2))
    with enable_x64(True):
        wanted = expected(case, x.astype(jnp.float64), dy.astype(jnp.float64))
    for norms in by_each_way(site, x, dy).values():
        assert norms.dtype == jnp.float32
        assert_close(norms, wanted, 1e-5)


def test_gradients_of_sites_that_share_a_kernel_add_up():
    case = CASES["stride 2"]
    with enable_x64(True):
        site = site_of(case)
        x, dy = sides_of(site, case, 6)
        pair = [site_at(site.eqn, (i,)) for i in range(2)]
        entered = {(i,): (x[i::2],) for i in range(2)}
        leaving = {(i,): dy[i::2] for i in range(2)}
        norms = CONVOLUTION.squared_norms(pair, entered, leaving, x.dtype)
        several = case._replace(images=2)
        images = (jnp.concatenate([side[0::2], side[1::2]], axis=1) for side in (x, dy))
        assert_close(norms, expected(several, *images), 1e-10)


def scanned_loss(params, x):
    """Scan over layers, each with its kernel, then over steps that share a kernel."""
    as_before = lambda x, w: lax.conv_general_dilated(
        x, w, (1, 1), "SAME", None, None, ("NHWC", "HWIO", "NHWC")
    )
    x, _ = lax.scan(lambda x, w: (jnp.tanh(as_before(x, w)), None), x[None], params["layers"])
    x, _ = lax.scan(lambda x, _: (jnp.tanh(as_before(x, params["steps"])), None), x, None, length=3)
    return jnp.sin(x).sum()


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize("mode", ["one_pass", "two_pass"])
def test_convolutions_in_scans(mode):
    with enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 3)
        layers, steps = (
            jax.random.normal(k, s)
            for k, s in zip(keys, [(2, 3, 3, 2, 2), (3, 3, 2, 2)], strict=False)
        )
        params, x = {"layers": layers, "steps": steps}, jax.random.normal(keys[2], (4, 4, 5, 2))
        stacked = jax.vmap(jax.grad(scanned_loss), in_axes=(None, 0))(params, x)
        grads = jax.jit(psc.clipped_grad(scanned_loss, 1.0, mode=mode))(params, x)
        assert_close(grads, clipped_mean(stacked, np.full(4, 1.0)), 1e-10)


CHOICES = {
    "AlexNet's second": (Case((8, 8), (3, 3), (64, 192)), "gram of pixels"),
    "ResNet's first stage": (Case((32, 32), (3, 3), (32, 32)), "unfolded inputs"),
    "an image's three channels": (Case((32, 32), (3, 3), (3, 64)), "unfolded inputs"),
    "to three channels": (Case((32, 32), (3, 3), (64, 3)), "unfolded cotangents"),
    "depthwise": (Case((32, 32), (3, 3), (1, 1), groups=64), "multiplied"),
    "transposed": (Case((16, 16), (3, 3), (64, 32), padding=((2, 1), (2, 1)), input_dilation=(2, 2)), "unfolded cotangents"),
    "in place of a dense layer": (Case((7, 7), (7, 7), (512, 4096), padding="VALID"), "gram of patches"),
    "dilated in time": (Case((256,), (2,), (64, 64), kernel_dilation=(8,), padding=((8, 0),)), "unfolded inputs"),
}  # fmt: skip


CHOICES_ON_TPU = {
    "AlexNet's fourth": (Case((4, 4), (3, 3), (384, 256)), "gram of pixels"),
    "ResNet-50's first stage": (Case((56, 56), (3, 3), (64, 64)), "shifted"),
    "ResNet-50's third stage": (Case((14, 14), (3, 3), (256, 256)), "shifted"),
    "an image's three channels": (Case((32, 32), (3, 3), (3, 64)), "shifted"),
    "depthwise": (Case((32, 32), (3, 3), (1, 1), groups=64), "multiplied"),
}


def cheapest(list_of_ways, case):
    kernel, image = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in case.shapes())
    (eqn,) = jax.make_jaxpr(case)(image, kernel).eqns
    costs = list_of_ways(window(site_at(eqn)), *case.channels)
    return min(costs, key=lambda name: costs[name].cost)


@pytest.mark.parametrize("name", CHOICES)
def test_the_way_that_costs_least(name):
    case, wanted = CHOICES[name]
    assert cheapest(ways, case) == wanted


@pytest.mark.parametrize("name", CHOICES_ON_TPU)
def test_the_way_that_costs_least_on_a_tpu(name):
    case, wanted = CHOICES_ON_TPU[name]
    assert cheapest(ways_on_tpu, case) == wanted
