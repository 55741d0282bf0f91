"""What the machine can do at best: how fast memory is read, how fast matrices are multiplied.

    python benchmarks/probe.py

The best of NumPy, PyTorch and JAX counts, so that no side is measured by a limit of its own.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from harness import Report, Row, Side, Spread, arguments_of, clock, parser, serve

READ_BYTES = 2**30
"""Far more than any processor's caches hold."""
SIDE = 4096
TRIES = 5


def probe(**_: Any) -> dict[str, Any]:
    """Bytes/s and float32 operations/s of each library."""
    return {"bandwidth": _bandwidth(), "matrix": _matrix()}


def _bandwidth() -> dict[str, float]:
    import jax
    import torch

    columns = 1024
    rows = READ_BYTES // 4 // columns
    values = np.ones((rows, columns), np.float32)
    vector = np.ones(columns, np.float32)
    tensor, torch_vector = torch.from_numpy(values), torch.from_numpy(vector)
    array, jax_vector = jax.numpy.asarray(values), jax.numpy.asarray(vector)
    product, total = jax.jit(lambda a, v: a @ v), jax.jit(lambda a: a.sum(1))
    seconds = {
        "numpy product": _best(lambda: values @ vector),
        "torch product": _best(lambda: tensor @ torch_vector),
        "torch sum": _best(lambda: tensor.sum()),
        "jax product": _best(lambda: product(array, jax_vector).block_until_ready()),
        "jax sum": _best(lambda: total(array).block_until_ready()),
    }
    return {name: values.nbytes / time for name, time in seconds.items()}


def _matrix() -> dict[str, float]:
    import jax
    import torch

    values = np.random.default_rng(0).standard_normal((SIDE, SIDE), np.float32)
    tensor, array = torch.from_numpy(values), jax.numpy.asarray(values)
    product = jax.jit(lambda a: a @ a)
    seconds = {
        "torch": _best(lambda: tensor @ tensor),
        "jax": _best(lambda: product(array).block_until_ready()),
    }
    return {name: 2 * SIDE**3 / time for name, time in seconds.items()}


def _best(run: Callable[[], Any]) -> float:
    """Seconds of the fastest of some runs: a limit is what is reached undisturbed."""
    run()
    found = []
    for _ in range(TRIES):
        started = clock()
        run()
        found.append(clock() - started)
    return min(found)


def main() -> None:
    options = arguments_of(parser(__doc__.splitlines()[0], "probe"))
    if options.serve:
        serve({"probe": probe}, options.cores)
        return
    side = Side(__file__, "probe", cores=options.cores)
    found = [side.ask("probe").values for _ in range(options.repeats)]
    side.close()
    report = Report("Limits of the machine")
    for kind, unit in (("bandwidth", "GB/s"), ("matrix", "GFLOP/s")):
        for name in found[0][kind]:
            rates = [values[kind][name] / 1e9 for values in found]
            report.rows.append(Row(f"{kind}, {name}", unit, Spread.of(rates)))
    report.write(options.output, options.cores)


if __name__ == "__main__":
    main()
