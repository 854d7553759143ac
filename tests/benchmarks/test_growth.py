"""Operations and memory of the head and of a step grow as docs/scaling.md says; times are measured by hand."""

from typing import Any

import pytest

from benchmarks.studies import growth
from benchmarks.studies.growth import OURS, PLAIN

N, V, D = (1100, 2200, 4400), (2100, 4200, 8400), 12
WORKSPACE = 5 * 2**20


def test_a_power_law_is_found_with_its_error() -> None:
    assert growth.fit([1, 2, 4, 8], [3.0, 6.0, 12.0, 24.0]) == pytest.approx((1.0, 0.0), abs=1e-12)
    slope, error = growth.fit([1, 10, 100], [1.0, 20.0, 100.0])
    assert slope == pytest.approx(1.0)
    assert error == pytest.approx(0.1738, abs=1e-4)  # residuals of -0.1003, 0.2007 and -0.1003 decades, over sqrt(2)


@pytest.mark.parametrize(
    "options", [{"frozen": True}, {"frozen": False, "workspace": WORKSPACE}], ids=["frozen", "trained"]
)
@pytest.mark.parametrize("letter", ["N", "V"])
def test_the_head_grows_in_operations_but_not_in_memory(letter: str, options: dict[str, Any]) -> None:
    sizes = N if letter == "N" else V
    found: dict[str, dict[str, list[float]]] = {name: {"flops": [], "peak": []} for name in (OURS, PLAIN)}
    for size in sizes:
        runs = growth.head(size if letter == "N" else N[0], size if letter == "V" else V[0], D, **options)
        for name, run in runs.items():
            run.call()
            found[name]["flops"].append(growth.flops_of(run.call))
            found[name]["peak"].append(growth.peak_of(run))
    products = 2 * sizes[0] * (V[0] if letter == "N" else N[0]) * D
    assert found[PLAIN]["flops"][0] == (2 if options["frozen"] else 3) * products
    assert found[OURS]["flops"][0] == pytest.approx((2 if options["frozen"] else 4) * products, rel=0.1)
    for name in (OURS, PLAIN):
        assert growth.fit(list(sizes), found[name]["flops"])[0] == pytest.approx(1, abs=0.05)
    assert growth.fit(list(sizes), found[PLAIN]["peak"])[0] == pytest.approx(1, abs=0.05)
    assert max(found[OURS]["peak"]) < min(1.3 * min(found[OURS]["peak"]), 1.2 * WORKSPACE)


def test_a_step_grows_with_its_pairs_and_their_tokens() -> None:
    def slope(letter: str, sizes: list[int]) -> float:
        made = [growth.step(*((size, 1) if letter == "T" else (48, size)), layers=1, D=64, V=300) for size in sizes]
        return growth.fit(sizes, [growth.flops_of(each[OURS].call) for each in made])[0]

    # of fewer tokens, attention is computed by matrix products, which are counted
    assert slope("pairs", [4, 8, 16]) == pytest.approx(1, abs=1e-3)
    assert slope("T", [192, 384, 768]) == pytest.approx(1, abs=1e-3)
