"""Reference draws of two SDE posteriors in posteriordb's format, with their diagnostics.

The layout is that of https://github.com/stan-dev/posteriordb: `posteriors/`, `data/`, `models/` and
`reference_posteriors/draws/`. Run: python benchmarks/public/make_reference.py NAME [--quick]
"""

from __future__ import annotations

import argparse
import inspect
import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC

import numpyro_sde as nsde
from numpyro_sde.diagnostics.compare.arviz_compat import effective_sample_size, split_rhat

_DATE = "2026-11-26"


def stochastic_volatility(times, change):
    """Changes of a log yield, per cent a month, of a log variance that returns to its mean."""
    rate = numpyro.sample("rate", dist.LogNormal(0.0, 1.0))
    mean = numpyro.sample("mean", dist.Normal(3.0, 2.0))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.7))
    ou = nsde.processes.OrnsteinUhlenbeck(rate, mean, scale)
    start = dist.Normal(mean, scale / jnp.sqrt(2.0 * rate))
    v = numpyro.sample("v", nsde.SDEPath(ou, times, start, scheme=nsde.schemes.Euler()))
    nsde.observe("change", v, lambda t, v: dist.Normal(0.0, jnp.exp(v / 2.0)), obs=change)


def lotka_volterra_sde(times, pelts):
    """Logs of hares and lynx with noise of their own, pelts with log-normal error."""
    p = {
        "birth": numpyro.sample("birth", dist.LogNormal(-0.6, 0.5)),
        "predation": numpyro.sample("predation", dist.LogNormal(-3.5, 0.5)),
        "growth": numpyro.sample("growth", dist.LogNormal(-3.5, 0.5)),
        "death": numpyro.sample("death", dist.LogNormal(-0.2, 0.5)),
        "scale": numpyro.sample("scale", dist.LogNormal(-1.5, 0.5)),
    }
    noise = numpyro.sample("noise", dist.LogNormal(-1.5, 0.5))

    def drift(t, x, p):
        hares, lynx = jnp.exp(x[0]), jnp.exp(x[1])
        return jnp.stack([p["birth"] - p["predation"] * lynx, p["growth"] * hares - p["death"]])

    grid = nsde.TimeGrid(times, max_step=0.2)
    sde = nsde.SDE(drift, lambda t, x, p: p["scale"], params=p)
    init = dist.Normal(jnp.log(jnp.array([30.0, 5.0])), 0.5).to_event(1)
    x = numpyro.sample("x", nsde.SDEPath(sde, grid, init, scheme=nsde.schemes.Euler()))
    nsde.observe(
        "log_pelts",
        x,
        lambda t, x, s: dist.Normal(x, s).to_event(1),
        params=noise,
        obs=np.log(pelts),
        at=grid.index,
    )


class Posterior(NamedTuple):
    """One posterior: model, data, what to say of both."""

    model: Any
    path: str
    parameters: tuple[str, ...]
    data: dict[str, np.ndarray]
    title: str
    source: str


def posterior(name: str) -> Posterior:
    """A posterior by its name in the database."""
    if name == "us_treasury-stochastic_volatility":
        treasury = nsde.datasets.load_us_treasury()
        change = 100.0 * np.diff(np.log(treasury.yields[:, 0]))
        data = {"times": treasury.times[1:], "change": change - change.mean()}
        parameters = ("rate", "mean", "scale")
        title = "Stochastic volatility of the one-year Treasury yield, in continuous time"
        source = inspect.getdoc(nsde.datasets.load_us_treasury) or ""
        return Posterior(stochastic_volatility, "v", parameters, data, title, source)
    pelts = nsde.datasets.load_hare_lynx()
    data = {"times": pelts.times - 1900.0, "pelts": pelts.pelts}
    parameters = ("birth", "predation", "growth", "death", "scale", "noise")
    title = "Stochastic Lotka-Volterra of hares and lynx"
    source = inspect.getdoc(nsde.datasets.load_hare_lynx) or ""
    return Posterior(lotka_volterra_sde, "x", parameters, data, title, source)


NAMES = ("us_treasury-stochastic_volatility", "hudson_lynx_hare-lotka_volterra_sde")


def sample(chosen: Posterior, sizes: tuple[int, int, int, int]) -> tuple[Any, Any]:
    """Draws of each chain by site, and the sampler's statistics."""
    chains, warmup, draws, thin = sizes
    guided = numpyro.handlers.reparam(
        chosen.model, config={chosen.path: nsde.reparam.GuidedReparam()}
    )
    mcmc = MCMC(
        nsde.infer.SplitNUTS(guided, target_accept_prob=0.95),
        num_warmup=warmup,
        num_samples=draws * thin,
        num_chains=chains,
        thinning=thin,
        chain_method="sequential",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(4711), *chosen.data.values(), extra_fields=("diverging",))
    return mcmc.get_samples(group_by_chain=True), mcmc.get_extra_fields(group_by_chain=True)


def scalars(chosen: Posterior, draws: dict[str, Any]) -> dict[str, np.ndarray]:
    """Each scalar under posteriordb's name, `(chain, draw)`: parameters and path, from 1."""
    found = {}
    for site in (*chosen.parameters, chosen.path):
        values = np.asarray(draws[site], np.float64)
        for element in np.ndindex(values.shape[2:]):
            label = ",".join(str(i + 1) for i in element)
            found[f"{site}[{label}]" if element else site] = values[(..., *element)]
    return found


def information(name: str, found: dict[str, np.ndarray], extra: Any, sizes: Any) -> dict[str, Any]:
    """The reference posterior's own account: how it was made, diagnostics, checks."""
    chains, warmup, draws, thin = sizes
    bulk = [float(effective_sample_size(v)) for v in found.values()]
    tail = [float(effective_sample_size(v, "tail")) for v in found.values()]
    rhat = [float(split_rhat(v)) for v in found.values()]
    diverged = np.asarray(extra["diverging"]).sum(axis=1).astype(int).tolist()
    total = chains * draws
    checks = {
        "ndraws_is_10k": total == 10_000,
        "nchains_is_gte_4": chains >= 4,
        "ess_within_bounds": bool(min(bulk) > 0.8 * total and max(bulk) < 1.2 * total),
        "r_hat_below_1_01": bool(max(rhat) < 1.01),
        "no_divergences": not any(diverged),
    }
    method = {"chains": chains, "iter": warmup + draws * thin, "warmup": warmup, "thin": thin}
    return {
        "name": name,
        "inference": {
            "method": "numpyro_sde.infer.SplitNUTS",
            "method_arguments": {**method, "seed": 4711, "target_accept_prob": 0.95},
        },
        "diagnostics": {
            "diagnostic_information": {"names": list(found)},
            "ndraws": total,
            "nchains": chains,
            "effective_sample_size_bulk": bulk,
            "effective_sample_size_tail": tail,
            "r_hat": rhat,
            "divergent_transitions": diverged,
        },
        "checks_made": checks,
        "comments": "The posterior is that of the discretised model, Euler's step.",
        "added_by": "The numpyro_sde developers",
        "added_date": _DATE,
        "versions": {
            "numpyro_sde_version": nsde.__version__,
            "numpyro_version": numpyro.__version__,
            "jax_version": jax.__version__,
        },
    }


def write(path: Path, content: Any, zipped: bool = False) -> None:
    """JSON to a file, zipped as posteriordb keeps draws."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=None if zipped else 2)
    if not zipped:
        path.write_text(text + "\n", encoding="utf-8")
        return
    with zipfile.ZipFile(path.with_name(path.name + ".zip"), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(path.name, text)


def make(name: str, root: Path, sizes: tuple[int, int, int, int]) -> dict[str, Any]:
    """Sample a posterior and write all that the database asks of it; its account of itself."""
    chosen = posterior(name)
    data_name, model_name = name.split("-")
    draws, extra = sample(chosen, sizes)
    found = scalars(chosen, draws)
    account = information(name, found, extra, sizes)
    lists = {key: value.tolist() for key, value in chosen.data.items()}
    write(root / "data" / "data" / f"{data_name}.json", lists, zipped=True)
    added = {"added_by": "The numpyro_sde developers", "added_date": _DATE}
    about = {"keywords": ["sde"], "title": chosen.title, "description": chosen.source, "urls": []}
    write(
        root / "data" / "info" / f"{data_name}.info.json",
        {**about, "references": [], "data_file": f"data/data/{data_name}.json", **added},
    )
    code = root / "models" / "numpyro" / f"{model_name}.py"
    code.parent.mkdir(parents=True, exist_ok=True)
    code.write_text(inspect.getsource(chosen.model), encoding="utf-8")
    files = {"numpyro": f"models/numpyro/{model_name}.py"}
    write(
        root / "models" / "info" / f"{model_name}.info.json",
        {"name": model_name, **about, "references": [], "model_code": files, **added},
    )
    dimensions = {n: int(np.prod(np.shape(draws[n])[2:], dtype=int)) for n in chosen.parameters}
    dimensions[chosen.path] = int(np.prod(np.shape(draws[chosen.path])[2:]))
    write(
        root / "posteriors" / f"{name}.json",
        {
            "name": name,
            "keywords": ["sde"],
            "model_name": model_name,
            "reference_posterior_name": name,
            "data_name": data_name,
            "dimensions": dimensions,
            **added,
        },
    )
    reference = root / "reference_posteriors" / "draws"
    write(reference / "info" / f"{name}.info.json", account)
    number = next(iter(found.values())).shape[0]
    chains = [{key: value[c].tolist() for key, value in found.items()} for c in range(number)]
    write(reference / "draws" / f"{name}.json", chains, zipped=True)
    return account


def main() -> None:
    """Make the posteriors that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=NAMES, choices=NAMES)
    parser.add_argument("--output", type=Path, default=Path("posterior_database"))
    parser.add_argument("--quick", action="store_true", help="few draws: tests the script")
    options = parser.parse_args()
    numpyro.enable_x64()
    nsde.configure_cpu()
    sizes = (2, 100, 20, 1) if options.quick else (10, 1000, 1000, 10)
    for name in options.names:
        account = make(name, options.output, sizes)
        print(name, account["checks_made"])


if __name__ == "__main__":
    main()
