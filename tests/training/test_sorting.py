"""Soft sorting against worked values, hard sorting and a dense matrix product."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from neco_bench.core.errors import UsageError
from neco_bench.training import sorting
from neco_bench.training.sorting import DISTRIBUTIONS, comparators, soft_sort

NETWORKS = ["bitonic", "odd_even"]


def rows(count: int, n: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.rand(count, n, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


def dense(x: Tensor, network: str, steepness: float) -> tuple[Tensor, Tensor]:
    """The definition: one (n, n) matrix per row and layer, Cauchy."""
    permutation = torch.eye(x.shape[1], dtype=x.dtype).repeat(len(x), 1, 1)
    for layer in comparators(network, x.shape[1]):
        a, c = (list(wires) for wires in zip(*layer, strict=True))
        alpha = 0.5 + torch.atan(steepness * (x[:, c] - x[:, a])) / math.pi
        mix = torch.eye(x.shape[1], dtype=x.dtype).repeat(len(x), 1, 1)
        mix[:, a, a] = mix[:, c, c] = alpha
        mix[:, a, c] = mix[:, c, a] = 1 - alpha
        x, permutation = (x[:, None] @ mix)[:, 0], permutation @ mix
    return x, permutation


def test_comparators_of_the_bitonic_network() -> None:
    assert comparators("bitonic", 4) == (((0, 1), (3, 2)), ((0, 2), (1, 3)), ((0, 1), (2, 3)))
    nine = comparators("bitonic", 9)
    assert nine[0] == ((1, 2), (4, 3), (5, 6), (8, 7))
    assert nine[1] == ((1, 3), (2, 4), (7, 5), (8, 6))
    assert nine[2] == ((1, 2), (3, 4), (6, 5), (8, 7))
    assert nine[6] == ((0, 8),)
    layers = comparators("bitonic", 49)
    assert [len(layer) for layer in layers] == [17 if i in (10, 15, 16) else 24 for i in range(21)]
    assert layers[0][:4] == ((1, 2), (4, 3), (5, 6), (8, 7))
    assert layers[0][-3:] == ((44, 43), (45, 46), (48, 47))
    assert layers[15][:3] == ((0, 32), (1, 33), (2, 34))


def test_bitonic_is_the_published_rule_but_where_that_does_not_sort() -> None:
    """Directions of protocols/neco.md 1.10: ascending where floor(a / 2^(k + 1)) is even."""
    differ = []
    for n in range(2, 65):
        blocks = (n - 1).bit_length()
        pad = 2**blocks - n
        published = []
        for k in range(blocks):
            for m in (2**i for i in range(k, -1, -1)):
                low = [a for a in range(pad, 2**blocks) if a // m % 2 == 0]
                ascending = {a: a // 2 ** (k + 1) % 2 == 0 for a in low}
                published.append(tuple((a - pad, a + m - pad) if ascending[a] else (a + m - pad, a - pad) for a in low))
        if comparators("bitonic", n) != tuple(filter(None, published)):
            differ.append(n)
    assert differ == [22, 38, 42, 43, 44, 45, 46, 54]


def test_comparators_of_the_odd_even_network() -> None:
    assert comparators("odd_even", 4) == (((0, 1), (2, 3)), ((1, 2),)) * 2
    layers = comparators("odd_even", 49)
    assert [len(layer) for layer in layers] == [24] * 49


def test_every_size_sorts_by_the_zero_one_principle() -> None:
    """A network sorts everything if it sorts all 2^n rows of zeros and ones.

    They are followed group by group: once comparators have joined two groups of wires, only as many different rows as
    the group has reached so far are carried on (at most 33 * 33 for n = 64).
    """
    for n in range(2, 65):
        groups = {wire: {frozenset(), frozenset([wire])} for wire in range(n)}  # sets of wires that carry a one
        for layer in comparators("bitonic", n):
            for a, c in layer:
                if groups[a] is not groups[c]:
                    old = groups[a], groups[c]
                    joined = {first | second for first in old[0] for second in old[1]}
                    groups = {w: joined if any(g is o for o in old) else g for w, g in groups.items()}
            for group in list({id(g): g for g in groups.values()}.values()):
                mine = [(a, c) for a, c in layer if groups[a] is group]
                if mine:
                    mixed = {after_layer(ones, mine) for ones in group}
                    groups = {w: mixed if g is group else g for w, g in groups.items()}
        assert all(group is groups[0] for group in groups.values())
        assert groups[0] == {frozenset(range(n - ones, n)) for ones in range(n + 1)}, n


def after_layer(ones: frozenset[int], layer: list[tuple[int, int]]) -> frozenset[int]:
    moved = {a for a, c in layer if a in ones and c not in ones}
    return ones - moved | {c for a, c in layer if a in moved}


def test_every_size_of_the_odd_even_network_sorts() -> None:
    """By all zeros and ones up to 12 wires. Above by the theorem on networks of neighbours (Knuth 5.3.4, exercise 36):

    one sorts everything if it sorts the reversed row.
    """
    for n in range(2, 65):
        x = (torch.arange(2**n)[:, None] >> torch.arange(n)) & 1 if n <= 12 else torch.arange(n - 1, -1, -1)[None]
        wires = list(x.T)
        for layer in comparators("odd_even", n):
            for a, c in layer:
                assert c == a + 1
                wires[a], wires[c] = torch.minimum(wires[a], wires[c]), torch.maximum(wires[a], wires[c])
        assert torch.equal(torch.stack(wires, 1), x.sort(1).values), n


# protocols/neco.md 1.10: network, steepness, sorted values, rows of the permutation.
GOLDEN = [
    (
        "bitonic",
        10,
        [-0.006573, 0.215256, 0.285506, 0.605811],
        [
            [0.105051, 0.325576, 0.520235, 0.049137],
            [0.790314, 0.122255, 0.047195, 0.040236],
            [0.040032, 0.038750, 0.095281, 0.825936],
            [0.064602, 0.513419, 0.337289, 0.084690],
        ],
    ),
    (
        "bitonic",
        100,
        [-0.090453, 0.203172, 0.296829, 0.690452],
        [
            [0.008196, 0.033325, 0.950821, 0.007657],
            [0.977588, 0.010747, 0.007657, 0.004008],
            [0.004008, 0.006127, 0.008088, 0.981777],
            [0.010208, 0.949802, 0.033434, 0.006557],
        ],
    ),
    (
        "odd_even",
        10,
        [-0.037988, 0.236514, 0.264124, 0.637350],
        [
            [0.105210, 0.387991, 0.464118, 0.042681],
            [0.834661, 0.095185, 0.066544, 0.003610],
            [0.003778, 0.052541, 0.075351, 0.868330],
            [0.056351, 0.464283, 0.393987, 0.085379],
        ],
    ),
]


@pytest.mark.parametrize(("network", "steepness", "values", "weights"), GOLDEN)
def test_worked_values(network: str, steepness: float, values: list[float], weights: list[list[float]]) -> None:
    x = torch.tensor([[0.3, -0.1, 0.7, 0.2]], dtype=torch.float64)
    got_values, got_weights = soft_sort(x, network, steepness)
    torch.testing.assert_close(got_values, x.new_tensor([values]), atol=6e-7, rtol=0)
    torch.testing.assert_close(got_weights, x.new_tensor([weights]), atol=6e-7, rtol=0)


@pytest.mark.parametrize("network", NETWORKS)
def test_every_size_equals_the_dense_product(network: str) -> None:
    for n in (*range(1, 20), 31, 32, 33, 49, 64, 65):
        x = rows(2, n)
        for got, expected in zip(soft_sort(x, network, 30), dense(x, network, 30), strict=True):
            torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-9)


def test_gradients_equal_those_of_the_dense_product() -> None:
    x, weights = rows(3, 49).requires_grad_(), rows(3 * 49, 50, seed=1)
    gradients: list[torch.Tensor] = []
    for values, permutation in (soft_sort(x), dense(x, "bitonic", 100)):
        loss = (permutation.flatten(0, 1) * weights[:, 1:]).sum() + (values * weights[::49, :49]).sum()
        gradients += torch.autograd.grad(loss, x)
    torch.testing.assert_close(*gradients)


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_gradcheck(network: str, distribution: str) -> None:
    for n in (1, 2, 5, 8):
        x = rows(2, n).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: soft_sort(x, network, 3, distribution), x)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distributions(name: str) -> None:
    """Symmetric, from 1 to 0, with their density as slope, and an upper tail that does not vanish in float32."""
    survival, density = DISTRIBUTIONS[name]
    z = torch.linspace(-9, 9, 1000, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(survival(z) + survival(-z), torch.ones_like(z))
    torch.testing.assert_close(torch.autograd.grad(-survival(z).sum(), z)[0], density(z))
    far = torch.tensor([80.0, 40.0])
    torch.testing.assert_close(survival(far), survival(far.double()).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("steepness", [1, 100, 1e4])
def test_rows_and_columns_sum_to_one_in_float32(network: str, steepness: float) -> None:
    for n in (2, 7, 49, 64):
        _, permutation = soft_sort(rows(200, n, torch.float32), network, steepness)
        assert (permutation >= 0).all()
        assert (permutation.double().sum(1) - 1).abs().max() < 1e-6
        assert (permutation.double().sum(2) - 1).abs().max() < 1e-6


@given(st.lists(st.integers(-1000, 1000), min_size=1, max_size=20, unique=True), st.sampled_from(NETWORKS))
def test_a_steep_sort_is_the_hard_sort(values: list[int], network: str) -> None:
    x = torch.tensor([values], dtype=torch.float64)
    relaxed, permutation = soft_sort(x, network, 1e9)
    torch.testing.assert_close(relaxed, x.sort(1).values, atol=1e-3, rtol=0)
    assert torch.equal(permutation[0].argmax(0), x[0].argsort())


@given(st.integers(1, 20), st.floats(0.1, 100), st.floats(-3, 3), st.sampled_from(NETWORKS))
def test_scale_belongs_to_steepness_and_shifts_only_the_values(
    n: int, scale: float, shift: float, network: str
) -> None:
    x = rows(2, n)
    values, permutation = soft_sort(x, network, 10)
    scaled_values, scaled_permutation = soft_sort(x * scale + shift, network, 10 / scale)
    torch.testing.assert_close(scaled_permutation, permutation, atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(scaled_values, values * scale + shift, atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(values[:, None], x[:, None] @ permutation, atol=1e-10, rtol=1e-8)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks for few rows."""
    monkeypatch.setattr(sorting, "CPU_BYTES", 1 << 20)


@pytest.mark.usefixtures("small_chunks")
def test_a_row_does_not_depend_on_the_others() -> None:
    """Many chunks, two threads, a last chunk that is not full."""
    x = rows(300, 49)
    _, together = soft_sort(x)
    for row in (0, 63, 64, 257, 299):
        torch.testing.assert_close(together[row], soft_sort(x[row : row + 1])[1][0], atol=1e-14, rtol=1e-12)


@pytest.mark.usefixtures("small_chunks")
def test_threads_are_given_back_and_do_not_change_the_result() -> None:
    x = rows(300, 49, torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = soft_sort(x)[1]
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        assert torch.equal(soft_sort(x)[1], two)
    finally:
        torch.set_num_threads(before)


def test_half_precision_and_autocast_compute_in_float32() -> None:
    x = rows(4, 9, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(soft_sort(x)[1], soft_sort(x)[1].float())
        low = x.bfloat16().requires_grad_()
        values, permutation = soft_sort(low)
        values.sum().backward()
    assert values.dtype == permutation.dtype == torch.float32
    assert low.grad is not None
    assert low.grad.dtype == torch.bfloat16
    torch.testing.assert_close(permutation, soft_sort(low.detach().float())[1])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: type) -> None:
    x = rows(300, 49, torch.float32).requires_grad_()
    expected = soft_sort(x)[1].detach()
    with mode():
        permutation = soft_sort(x)[1]
        assert not permutation.requires_grad
        assert torch.equal(permutation, expected)


def test_nan_stays_in_its_row() -> None:
    x = rows(3, 9)
    x[1, 4] = math.nan
    _, permutation = soft_sort(x)
    assert permutation[1].isnan().any()
    assert permutation[[0, 2]].isfinite().all()


def test_wrong_use_is_told() -> None:
    x = rows(2, 4)
    with pytest.raises(UsageError, match="Did you mean 'bitonic'"):
        soft_sort(x, "bitonik")
    with pytest.raises(UsageError, match="Did you mean 'cauchy'"):
        soft_sort(x, distribution="cauchi")
    with pytest.raises(UsageError, match="steepness must be a positive number, not 0"):
        soft_sort(x, steepness=0)
    with pytest.raises(UsageError, match=r"x must be \(rows, values\)"):
        soft_sort(x[0])
    with pytest.raises(UsageError, match="at least one"):
        soft_sort(x[:, :0])
