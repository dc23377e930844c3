"""Bounds of speed against closed forms, and concessions against the plan that each of them makes."""

import re
from dataclasses import replace

import pytest

from quant.recipes import weights_by_place
from runtime.concessions import Room, nearest
from runtime.forecast import Rates, prompt_operations, prompt_seconds, tokens_per_second
from runtime.levels import LEVELS, Shape
from runtime.placement import Weights, Wish, kv_bytes, largest_context, place
from tests.checkpoints import MISTRAL_LARGE_2

GIB = 2**30
TWO_CARDS = (80 * GIB, 80 * GIB)
LONG = 131_072
RATES = Rates(bandwidth=2 * 10**12, host_bandwidth=10**11, flops=10**14)


def test_a_token_reads_all_weights_but_the_embeddings_and_the_cache_so_far() -> None:
    weights = weights_by_place(MISTRAL_LARGE_2, "Q4_K_M")
    placement = place(weights, MISTRAL_LARGE_2, Wish(LONG), TWO_CARDS)
    read = weights.total - weights.host
    assert tokens_per_second(placement, 0, RATES) == pytest.approx(2e12 / read)
    half = read + kv_bytes(MISTRAL_LARGE_2, Wish(LONG // 2))
    assert tokens_per_second(placement, LONG // 2, RATES) == pytest.approx(2e12 / half)


def test_parts_of_tensors_are_read_at_the_same_time() -> None:
    weights = weights_by_place(MISTRAL_LARGE_2, "Q4_K_M")
    one, both = (place(weights, MISTRAL_LARGE_2, Wish(LONG, split=split), TWO_CARDS) for split in ("layer", "tensor"))
    for n_tokens in (0, LONG):
        ratio = tokens_per_second(both, n_tokens, RATES) / tokens_per_second(one, n_tokens, RATES)
        assert ratio == pytest.approx(2)


def test_layers_on_the_host_are_read_at_its_speed() -> None:
    weights = Weights(host=5, layers=(10**9,) * 4, output=10**9)
    placement = place(weights, Shape(4, 64, 128, 4, 2, 16, 1000), Wish(256), (80 * GIB,), n_host_layers=1)
    assert tokens_per_second(placement, 0, RATES) == pytest.approx(1 / (1e9 / 1e11 + 4e9 / 2e12))


def test_a_prompt_takes_two_operations_a_weight_and_token_and_its_attention() -> None:
    shape = Shape(n_layers=1, n_embd=4, n_ff=8, n_heads=2, n_heads_kv=1, head_dim=2, n_vocab=10)
    # q 4×4, k and v 4×2, o 4×4, gate, up and down 4×8; logits of one token; 2 products for each of 1 + 2 + 3 pairs
    by_hand = 2 * 3 * (16 + 8 + 8 + 16 + 3 * 32) + 2 * 40 + 2 * 2 * 4 * (1 + 2 + 3)
    assert prompt_operations(shape, 3) == by_hand
    assert prompt_seconds(shape, 3, TWO_CARDS, RATES) == pytest.approx(by_hand / 2e14)


def test_a_prompt_takes_about_two_operations_a_parameter() -> None:
    per_token = prompt_operations(MISTRAL_LARGE_2, 1000) / 1000
    assert 2 * 122e9 < per_token < 2 * 124e9


@pytest.fixture(scope="module")
def levels() -> dict[str, Weights]:
    """The ten, the largest first."""
    return {level: weights_by_place(MISTRAL_LARGE_2, level) for level in reversed(LEVELS)}


def test_the_three_nearest_fit_and_their_prices_are_right(levels: dict[str, Weights]) -> None:
    weights, wish = levels["Q8_0"], Wish(LONG)
    smaller = {name: less for name, less in levels.items() if name != "Q8_0"}
    found = nearest(weights, MISTRAL_LARGE_2, wish, Room(TWO_CARDS, rates=RATES), smaller, n=4)
    assert [each.steps for each in found] == sorted(each.steps for each in found)
    context, host, kv, level = sorted(found, key=lambda each: each.change)
    assert len(nearest(weights, MISTRAL_LARGE_2, wish, Room(TWO_CARDS), smaller)) == 3

    longest = largest_context(weights, MISTRAL_LARGE_2, wish, TWO_CARDS, LONG)
    assert context.change == f"--context {longest}"
    assert context.price == f"{LONG - longest:,} tokens less ({1 - longest / LONG:.0%})"

    n_gpu_layers = int(host.change.removeprefix("--gpu-layers "))
    n_host = MISTRAL_LARGE_2.n_layers + 1 - n_gpu_layers
    for layers, fits in ((n_host, True), (n_host - 1, False)):
        assert place(weights, MISTRAL_LARGE_2, wish, TWO_CARDS, n_host_layers=layers).fits is fits
    prices = re.fullmatch(
        r"(\d+) layers and ([\d.]+) GiB in the host's memory, at most ([\d.]+) tokens/s, not ([\d.]+)", host.price
    )
    assert prices is not None, host.price
    placed = place(weights, MISTRAL_LARGE_2, wish, TWO_CARDS, n_host_layers=n_host)
    assert int(prices[1]) == n_host
    assert float(prices[2]) == pytest.approx(placed.host.total / GIB, abs=0.05)
    assert float(prices[3]) == pytest.approx(tokens_per_second(placed, 0, RATES), abs=0.05)
    assert float(prices[4]) == pytest.approx(2e12 / (weights.total - weights.host), abs=0.05)

    assert (kv.change, kv.price) == ("--kv q8_0", "8.5 bits for each number of the KV cache, not 16")
    assert (level.change, level.price) == ("Q6_K", "93.7 GiB of weights, not 121.3 GiB (23% less)")


def test_what_does_not_help_is_not_offered(levels: dict[str, Weights]) -> None:
    wish = Wish(8192)
    assert nearest(levels["Q4_K_M"], MISTRAL_LARGE_2, wish, Room(TWO_CARDS)) == (), "it fits"
    small = Room((24 * GIB,), host=20 * GIB)
    assert nearest(levels["Q4_K_M"], MISTRAL_LARGE_2, wish, small, {"Q2_K": levels["Q2_K"]}) == ()
    (host,) = nearest(levels["Q4_K_M"], MISTRAL_LARGE_2, wish, replace(small, host=64 * GIB))
    assert host.change.startswith("--gpu-layers ")
