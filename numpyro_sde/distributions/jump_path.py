"""The law of the states of a Markov jump process at given times, as a NumPyro distribution."""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Int, PRNGKeyArray
from numpyro.distributions import constraints

from numpyro_sde.distributions.clocks import remember_value
from numpyro_sde.distributions.path_law import AbstractPathLaw
from numpyro_sde.grid import TimeGrid
from numpyro_sde.jumps.chain import MarkovJumpProcess
from numpyro_sde.jumps.starts import start_law
from numpyro_sde.schemes.markov_jumps import ChainEquation, MarkovJumps
from numpyro_sde.sde import broadcast_batch


class JumpPath(AbstractPathLaw):
    """The law of the states of a Markov jump process at T times.

    Event shape `(T,)`, whole numbers `0..num_states - 1` (int32). An emission sees one state's
    number: `lambda t, s, p: dist.Normal(p["mean"][s], 0.1)` with `event_dims={"mean": 1}`. The path
    is discrete: integrate it out with `filters.Forward()`, which is exact and has derivatives, or
    draw it with `infer.ConditionalForward` in a Gibbs sampler.

    Args:
        chain: the process.
        times: strictly increasing times, shape `(*batch, T)`, or a `TimeGrid`.
        init: law of the first state: "stationary", a state, or a `Categorical`.
        validate_args: as for every NumPyro distribution.

    Raises:
        ValueError: unsorted, repeated or non-finite times; a state that there is not; a
            `Categorical` over another number of states; "stationary" for a process in which some
            state cannot be reached from another.
        TypeError: arguments of the wrong kind.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro_sde as nsde
        >>> chain = nsde.MarkovJumpProcess(jnp.array([[0.0, 1.0], [3.0, 0.0]]), 2)
        >>> path = nsde.JumpPath(chain, [0.0, 0.5, 2.0], init="stationary")
        >>> s = path.sample(jax.random.key(0), (4,))
        >>> s.shape, s.dtype.name, path.log_prob(s).shape
        ((4, 3), 'int32', (4,))
    """

    def __init__(
        self,
        chain: MarkovJumpProcess,
        times: ArrayLike | TimeGrid,
        init: dist.Distribution | ArrayLike | str = "stationary",
        *,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(chain, MarkovJumpProcess):
            raise TypeError(f"chain must be an nsde.MarkovJumpProcess, got {type(chain).__name__}")
        start = start_law(chain, init)
        self._of_equation(ChainEquation(chain, start), times, validate_args)

    def _of_equation(
        self, equation: ChainEquation, times: Any, validate_args: bool | None = None
    ) -> None:
        self._set_clock(times)
        start = dist.Categorical(probs=equation.start, validate_args=False)
        batch_shape = broadcast_batch(
            {
                "params of the chain": equation.chain.batch_shape,
                "times": jnp.shape(self.times)[:-1],
                "init": start.batch_shape,
            }
        )
        self._compose(
            equation,
            start,
            MarkovJumps(),
            scheme_chosen=True,
            batch_shape=batch_shape,
            validate_args=validate_args,
        )

    whole_states: ClassVar[bool] = True

    @classmethod
    def of_equation(cls, equation: ChainEquation, times: Any) -> JumpPath:
        """The law of a chain whose start, and what its states stand for, are known."""
        new = object.__new__(cls)
        new._of_equation(equation, times)
        return new

    @property
    def equation(self) -> ChainEquation:
        """The chain with the law of its start."""
        assert isinstance(self.sde, ChainEquation)
        return self.sde

    @property
    def chain(self) -> MarkovJumpProcess:
        """The process."""
        return self.equation.chain

    def of_states(self, states: Array) -> Array:
        """States as whole numbers; the counts that they stand for, of a network."""
        return states if self.equation.values is not None else states.astype(jnp.int32)

    def instruments(self, statement: Any, times: Any, y: Array) -> list[Any]:
        """Lay a statement's unbatched data out on the grid; it sees what states stand for."""
        values = self.equation.values
        if values is None:
            return super().instruments(statement, times, y)
        table = np.asarray(values, float)
        laid_out = statement.instruments(times, table.shape[1:], y)
        return [_seen_through(one, table) for one in laid_out]

    @property
    def has_rsample(self) -> bool:
        return False

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        return constraints.independent(
            constraints.integer_interval(0, self.chain.num_states - 1), 1
        )

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Int[Array, "*n T"]:
        path = super().sample(key, sample_shape).astype(jnp.int32)
        remember_value(path, self.clock)
        return path

    @staticmethod
    def infer_shapes(
        chain: Any, times: tuple[int, ...], init: Any = ()
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Batch and event shape from the shapes of the arguments.

        Args:
            chain: a process, or the batch shape of its parameters.
            times: shape of the times.
            init: a distribution; anything else adds no batch dimension.
        """
        batch = chain.batch_shape if isinstance(chain, MarkovJumpProcess) else tuple(chain)
        start = init.batch_shape if isinstance(init, dist.Distribution) else ()
        return jnp.broadcast_shapes(batch, times[:-1], start), (times[-1],)

    def replace(self, *, times: Any = None, init: Any = None, **others: Any) -> JumpPath:
        """The same law at other times, or with another start."""
        if any(value is not None for value in others.values()):
            names = ", ".join(name for name, value in others.items() if value is not None)
            raise ValueError(
                f"the law of a Markov jump process has no {names} to replace: its transitions are "
                "exact. Change its rates, or take another start or other times"
            )
        times = self.given_times if times is None else times
        if init is not None:
            return JumpPath(self.chain, times, init)
        return JumpPath.of_equation(self.equation, times)


def _seen_through(instrument: Any, table: np.ndarray) -> Any:
    """An instrument that is given the number of a state and sees what it stands for."""

    def state_of(x: Array) -> Array:
        return jnp.asarray(table, x.dtype)[x[0].astype(jnp.int32)]

    def log_prob(inputs: Any, x: Array, y: Array, present: Array) -> Array:
        value: Array = instrument.log_prob(inputs, state_of(x), y, present)
        return value

    def moments(inputs: Any, x: Array) -> Any:
        return instrument.moments(inputs, state_of(x))

    return instrument._replace(log_prob=log_prob, moments=moments, law=None)
