"""What a forecast draws under one posterior draw: states at further times, and the laws of data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from numpyro import handlers as numpyro_handlers

from numpyro_sde.diagnostics.compare.sites import hold_values, unwrap
from numpyro_sde.diagnostics.prediction.reading import Reading, SeenPath
from numpyro_sde.distributions.clocks import identity_of_path
from numpyro_sde.distributions.marginal import draw_smoothed
from numpyro_sde.distributions.observation import EmissionPath, Opening, Openings
from numpyro_sde.distributions.path_law import AbstractPathLaw
from numpyro_sde.handlers import extend
from numpyro_sde.models.reading import view_of
from numpyro_sde.models.survey import survey
from numpyro_sde.models.timewise import MixesTimesError
from numpyro_sde.schemes.memory import MemoryScheme, num_states
from numpyro_sde.schemes.switching import SwitchingSteps
from numpyro_sde.states.smoothing import take_times


class ForecastPlan:
    """How to draw a forecast under one posterior draw."""

    def __init__(
        self,
        reading: Reading,
        wide: extend,
        times: np.ndarray,
        order: np.ndarray,
        observe_inputs: dict[str, Any],
    ) -> None:
        self.reading, self.wide, self.times = reading, wide, times
        self.back = np.argsort(order, axis=-1)  # from increasing times to those given
        self.observe_inputs = observe_inputs
        self.observations: dict[str, tuple[str, int]] = {}
        self.state_dims: dict[str, int] = {}
        self.structures: dict[str, Any] = {}
        self.survey = survey(reading.model, reading.args, reading.kwargs)

    def draw(self, values: dict[str, Array], key: PRNGKeyArray) -> Any:
        """States and data at the further times, and the laws of the data."""
        reading, wide = self.reading, self.wide
        model_key, path_key, data_key = jax.random.split(key, 3)
        parameters = {n: v for n, v in values.items() if n not in reading.paths}
        model = hold_values(
            numpyro_handlers.seed(wide, model_key), {**reading.params, **parameters}
        )
        trace = numpyro_handlers.trace(model).get_trace(*reading.args, **reading.kwargs)
        laws = dict(wide.laws)  # of this run: others may follow
        self._check_laws()
        places = {name: self._place(name) for name in laws}
        keys = dict(zip(laws, jax.random.split(path_key, len(laws)), strict=True))
        states: dict[str, Array] = {}
        if reading.integrated:
            states |= self._smoothed(parameters, model_key, keys)
        for name, law in laws.items():
            if name not in states:
                known = trace[name]["value"] if trace[name]["is_observed"] else values[name]
                states[name] = self._gone_on(name, law, known, keys[name])
        ahead = {
            name: take_times(states[name], places[name], len(law.state_shape))
            for name, law in laws.items()
        }
        self.state_dims = {name: len(law.state_shape) for name, law in laws.items()}
        emissions = self._emissions(trace, laws, ahead)
        draws = dict(ahead)
        own_keys = jax.random.split(data_key, max(len(emissions), 1))
        for own, (name, emission) in zip(own_keys, emissions.items(), strict=False):
            draws[name] = emission.sample(own)
        # Every trace makes functions of its own, so that laws are told apart: their leaves go out.
        flat = {name: jax.tree_util.tree_flatten(law) for name, law in emissions.items()}
        self.structures = {name: treedef for name, (_, treedef) in flat.items()}
        return draws, {name: leaves for name, (leaves, _) in flat.items()}

    def _check_laws(self) -> None:
        """Raise where the law of a path is made of another path, whose draws are not at hand."""
        for path, sites in self.survey.densities.items():
            made = [name for name in sites if name in self.wide.laws]
            if made:
                raise ValueError(
                    f"forecast: the law of path {made[0]!r} depends on path {path!r}: write them "
                    "as one path with a vector state"
                )

    def _emissions(
        self,
        trace: Mapping[str, Any],
        laws: Mapping[str, AbstractPathLaw],
        ahead: Mapping[str, Array],
    ) -> dict[str, EmissionPath]:
        """The laws of the data at the further times."""
        owners = {id(site["value"]): name for name, site in trace.items() if name in laws}
        known = {
            name: site["value"]
            for name, site in trace.items()
            if site["type"] in ("sample", "param") and name not in laws
        }
        emissions: dict[str, EmissionPath] = {}
        self.observations = {}
        for name, site in trace.items():
            seen = unwrap(site["fn"]) if site["type"] == "sample" else None
            if not isinstance(seen, EmissionPath):
                continue
            owner = owners.get(identity_of_path(seen.observed_path))
            if owner is not None:
                states = ahead[owner]
            else:
                owner, states = self._transformed(name, laws, ahead, known)
            emissions[name] = self._emission(name, seen, laws[owner], states, owner)
            self.observations[name] = owner, len(emissions[name].event_shape) - 1
        return emissions

    def _transformed(
        self,
        name: str,
        laws: Mapping[str, AbstractPathLaw],
        ahead: Mapping[str, Array],
        known: Mapping[str, Any],
    ) -> tuple[str, Array]:
        """The path that a statement sees through something made of it, and that at further times.

        Raises:
            ValueError: what is made of it is not known at other times than its own.
        """
        reading, owner = self.reading, self.survey.observed.get(name)
        if owner is None:
            raise ValueError(
                f"forecast: what observe({name!r}) sees is made of no latent path: put the "
                "transformation inside the emission"
            )
        view = view_of(reading.model, reading.args, reading.kwargs, name, owner, known)
        try:
            return owner, view.at_other_times(ahead[owner], len(laws[owner].state_shape))
        except MixesTimesError as error:
            raise ValueError(
                f"forecast: observe({name!r}) sees what is made of path {owner!r}, and {error}, "
                "which has no entry for the further ones: hand observe the path itself, the array "
                f"as inputs=, and the forecast observe_inputs={{{name!r}: ...}}"
            ) from None

    def _place(self, name: str) -> np.ndarray:
        """Grid indices of the times in the order given."""
        place, back = self.wide.place(name), self.back
        lead = np.broadcast_shapes(place.shape[:-1], back.shape[:-1])
        return np.take_along_axis(
            np.broadcast_to(place, (*lead, place.shape[-1])),
            np.broadcast_to(back, (*lead, back.shape[-1])),
            axis=-1,
        )

    def _smoothed(
        self, parameters: dict[str, Array], model_key: PRNGKeyArray, keys: dict[str, PRNGKeyArray]
    ) -> dict[str, Array]:
        """Whole long paths of those that are integrated out, given all data."""
        found = {}
        for seen in self.reading._replace(model=self.wide).run(parameters, model_key):
            if isinstance(seen, SeenPath):
                assert self.reading.method is not None
                found[seen.name] = draw_smoothed(
                    seen.observed, self.reading.method, keys[seen.name]
                )
        return found

    def _gone_on(self, name: str, law: AbstractPathLaw, known: Array, key: PRNGKeyArray) -> Array:
        """The known path up to its last datum, and a simulation from there, on the long grid."""
        clock = self.wide.clocks[name]
        known = jnp.asarray(known, float)
        lead = jnp.broadcast_shapes(law.batch_shape, known.shape[: known.ndim - law.event_dim])
        last = np.broadcast_to(self.reading.last_rows[name], lead)
        self._check_later(name, law, clock.old[last])
        long = jnp.zeros((*lead, *law.event_shape), known.dtype)
        axis = len(lead)
        known = jnp.broadcast_to(known, (*lead, len(clock.old), *law.state_shape))
        long = long.at[(*(slice(None),) * axis, clock.old)].set(known)
        is_old = np.zeros(law.num_times, bool)
        is_old[clock.old] = True
        kept = is_old & (np.arange(law.num_times) <= clock.old[last][..., None])

        if isinstance(law.scheme, SwitchingSteps):
            raise ValueError(
                f"forecast: the regime of path {name!r} is hidden, which its last state does not "
                "hold: give method= to integrate it out"
            )
        if law.scheme.has_memory:
            self._check_whole(name, clock.old, last)

        def simulate(
            sde: Any, scheme: Any, times: Any, dt: Any, cache: Any, x: Array, kept: Array, key: Any
        ) -> Array:
            def step(state: Array, inputs: Any) -> tuple[Array, Array]:
                t, h, k, c, own, keep = inputs
                drawn = scheme.draw(sde, k, t, h, state, c)
                new = jnp.where(keep, _known_state(sde, scheme, t, h, state, own, c), drawn)
                return new, new

            keys = jax.random.split(key, dt.shape[0])
            inputs = (times[:-1], dt, keys, cache, x[1:], kept[1:])
            return scheme.visible(law._scan(step, scheme.carry(sde, x[0]), inputs))

        keys = jax.random.split(key, lead)
        dims = (law.event_dim, 1, keys.ndim - axis)
        return law.of_states(law._map(simulate, lead, (long, jnp.asarray(kept), keys), dims))

    def _check_whole(self, name: str, old: np.ndarray, last: np.ndarray) -> None:
        """Raise where the grid has times between known states: noise with a memory needs them."""
        between = np.setdiff1d(np.arange(int(old[last].max(initial=0))), old)
        if between.size:
            raise ValueError(
                f"forecast: the noise of path {name!r} has a memory, and other series are asked "
                "for at times between its known states: give method= to integrate it out, or "
                "forecast the series one by one"
            )

    def _check_later(self, name: str, law: AbstractPathLaw, start: np.ndarray) -> None:
        """Raise where a latent path is asked for at a time that its data have fixed already."""
        grid = np.broadcast_to(np.asarray(law.times), (*start.shape, law.num_times))
        begins = np.take_along_axis(grid, start[..., None], axis=-1)
        wanted = np.broadcast_to(self.times, (*start.shape, self.times.shape[-1]))
        early = wanted < begins - 1e-9 * max(float(np.ptp(grid)), 1.0)
        if early.any():
            at = tuple(int(i) for i in np.argwhere(early)[0])
            raise ValueError(
                f"forecast: path {name!r} was kept latent and goes on from its last datum at "
                f"{float(begins[at[:-1]].ravel()[0]):g}; it cannot be drawn at {wanted[at]:g}. "
                "Give method= to integrate it out, or take the path's own draws"
            )

    def _emission(
        self, name: str, law: EmissionPath, path: AbstractPathLaw, states: Array, owner: str
    ) -> EmissionPath:
        """The law of a statement's data at the further times."""
        emission, openings = law.emission, None
        inputs = self.observe_inputs.get(name)
        if emission.has_inputs and inputs is None:
            raise ValueError(
                f"forecast: the emission of {name!r} takes inputs; give those at the further times "
                f"by observe_inputs={{{name!r}: ...}}"
            )
        if inputs is not None and not emission.has_inputs:
            raise ValueError(f"observe_inputs names {name!r}, whose emission takes no inputs")
        inputs = None if inputs is None else jax.tree.map(jnp.asarray, inputs)
        if emission.opening is not None:
            openings = Openings(Opening((), path.sde.parameters), (), ())
            if path.forcing is not None and path.events:
                opening = Opening(path.forcing.rules, path.sde.parameters)
                openings = Openings(opening, *path.forcing.openings(self._place(owner)))
        emission = emission.at_other_times(inputs, openings)
        return EmissionPath(emission, jnp.asarray(self.times), states, law.state_shape)


def _known_state(
    sde: Any, scheme: Any, t: Array, dt: Array, state: Array, known: Array, cache: Any
) -> Array:
    """A known next state, with the memory of the noise where it has one."""
    if not isinstance(scheme, MemoryScheme):
        return known
    memory = jnp.zeros((scheme.num_noises(sde), num_states(sde)), known.dtype)
    z = scheme.invert(sde, t, dt, state, scheme.join(known, memory), cache)
    moved = scheme.step(sde, t, dt, state, z, cache)
    return scheme.join(known, scheme.split(sde, moved)[1])
