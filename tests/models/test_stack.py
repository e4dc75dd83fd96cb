"""What the package reads of NumPyro's stack and frames: a release that changes it fails here."""

import sys

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer.reparam import Reparam
from numpyro.primitives import Messenger

from numpyro_sde.models import stack


class Asked(Reparam):
    """Notes the run of the model around the statement that it is asked about."""

    run = None

    def __call__(self, name, fn, obs):
        type(self).run = stack.enclosing_run(sys._getframe(1), name, "Asked")
        return fn, obs


def model(y, scale=1.0):
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    x = numpyro.sample("x", dist.Normal(a, scale))
    numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def test_a_reparametrisation_finds_the_model_its_arguments_and_what_is_known():
    asked = handlers.reparam(model, config={"x": Asked()})
    outside = handlers.condition(asked, data={"a": jnp.array(0.3)})
    handlers.trace(handlers.seed(outside, 0)).get_trace(1.5, scale=2.0)
    run = Asked.run
    assert run.fn is model
    assert run.args == (1.5,)
    assert run.kwargs == {"scale": 2.0}
    assert [h.data for h in run.conditions] == [{"a": jnp.array(0.3)}]
    assert float(run.known["a"]) == pytest.approx(0.3)
    assert "x" not in run.known


def test_a_context_manager_has_no_model_to_look_ahead_in():
    with handlers.seed(rng_seed=0), handlers.reparam(config={"x": Asked()}):  # noqa: SIM117
        with pytest.raises(ValueError, match="it must wrap the model"):
            model(1.0)


class Note(Messenger):
    """Notes plates, scale and mask of each site, as handlers inside have left them."""

    def __init__(self, fn=None):
        super().__init__(fn)
        self.found = {}

    def process_message(self, msg):
        if msg["type"] == "sample":
            law, mask = stack.peel(msg["fn"])
            plates = stack.plates_around(msg)
            self.found[msg["name"]] = (
                law,
                mask,
                plates,
                stack.power_of(msg["scale"], plates, plates),
                stack.power_of(msg["scale"], plates, ()),
                stack.explicit_scale(),
                stack.plates_here(),
            )


def test_plates_scales_and_masks_around_a_site():
    keep = np.array([True, False, True])

    def plated():
        with numpyro.plate("i", 12, subsample_size=3), handlers.scale(scale=0.5):  # noqa: SIM117
            with handlers.mask(mask=keep):
                numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("w", dist.Normal(0.0, 1.0))

    note = Note(plated)
    handlers.seed(note, 0)()
    law, mask, plates, own, every, scaled, here = note.found["z"]
    assert isinstance(law, dist.Normal)
    np.testing.assert_array_equal(mask, keep)
    assert plates == {"i": 4.0}
    assert own == 0.5  # but for the subsampling of the plate
    assert every == 2.0
    assert scaled
    assert here == {-1: ("i", 3)}
    law, mask, plates, own, every, scaled, here = note.found["w"]
    assert (mask, plates, own, every, scaled, here) == (True, {}, None, None, False, {})


def test_who_gives_a_site_its_value():
    seen = {}

    class Ask(Messenger):
        def process_message(self, msg):
            if msg["type"] == "sample" and msg["name"] == "x":
                seen["x"] = (
                    stack.conditions_on("x", self),
                    stack.intervenes_on("x", self),
                    stack.substitutes("x", self),
                    stack.value_outside("x", self),
                )

    value = {"x": jnp.array(2.0)}
    for outside, want in (
        (handlers.condition, (True, False, False)),
        (handlers.do, (False, True, False)),
        (handlers.substitute, (False, False, True)),
    ):
        handlers.seed(outside(Ask(model), data=value), 0)(1.0)
        assert seen["x"][:3] == want
        assert (seen["x"][3] is None) == (outside is handlers.do)


def test_handlers_are_set_aside_and_come_back():
    with handlers.seed(rng_seed=0), handlers.trace() as outer:
        with stack.outside_all_handlers(), handlers.trace() as inner, handlers.seed(rng_seed=1):
            numpyro.sample("hidden", dist.Normal(0.0, 1.0))
        numpyro.sample("seen", dist.Normal(0.0, 1.0))
    assert list(inner) == ["hidden"]
    assert list(outer) == ["seen"]
