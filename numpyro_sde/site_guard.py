"""Sites in the wrong place."""

from __future__ import annotations

from typing import Any

from numpyro.primitives import Messenger


class refuse_sites(Messenger):  # noqa: N801
    """Raise where a function that is traced many times, such as a drift, makes a site.

    A sample inside would be one and the same draw at every state, or a leaked tracer.
    """

    def process_message(self, msg: dict[str, Any]) -> None:
        """Raise a `ValueError` that names the site."""
        if msg["type"] in ("sample", "param", "deterministic", "plate"):
            raise ValueError(
                f"site {msg['name']!r} is made inside a drift, diffusion or other function of the "
                "state, which is called for every step: make it in the model and hand its value "
                "over in params (an unknown function: field = prior.register(...) in the model)"
            )
