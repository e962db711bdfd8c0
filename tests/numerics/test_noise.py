"""The random numbers: Philox by its published vectors, blocks, laws, and what they may not depend on."""

import math

import pytest
import torch
from scipy import stats

from sdeflow.numerics.noise import BLOCK, NoiseStream, key_of, words

FLOATS = (torch.float32, torch.float64)
ONES = 2**64 - 1

# Random123's kat_vectors for philox4x64 with 10 rounds: the counter, the key, the four words.
PUBLISHED = (
    ((0, 0, 0, 0), (0, 0),
     (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES),
     (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0)),
    ((0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
     (0x452821E638D01377, 0xBE5466CF34E90C6C),
     (0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6)),
)  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "expected"), PUBLISHED)
def test_the_generator_gives_the_published_words(counter, key, expected):
    before = (sum(word << 64 * i for i, word in enumerate(counter)) - 1) % 2**256
    found = words(key, tuple(before >> 64 * i & ONES for i in range(4)), 4)
    assert tuple(found.tolist()) == expected


def test_no_two_of_many_blocks_and_draws_share_their_numbers():
    key, other = key_of("0/path"), key_of("1/path")
    first = {
        int(words(k, (0, 0, draw, block), 1)[0]) for k in (key, other) for draw in range(500) for block in range(200)
    }
    assert len(first) == 200_000  # of 32 bits some 5 would be equal, of 64 bits one pair in 10^9 such tests


def test_a_seed_of_any_size_counts_with_all_its_bits():
    numbers = [NoiseStream(seed, "path").normal((4, 2)) for seed in (1, 1 + 2**32, 1 + 2**64, 1 + 2**200, -1)]
    assert len({tuple(x.flatten().tolist()) for x in numbers}) == 5


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("draw", ["normal", "uniform", "rademacher"])
def test_the_first_rows_do_not_depend_on_how_many_are_asked_for(draw, dtype):
    for event in ((1,), (3,), (5, 7), (257,)):
        full, later = (getattr(NoiseStream(3, "path", first), draw)((BLOCK + 9, *event), dtype) for first in (0, 700))
        assert torch.equal(full[700:], later[: BLOCK + 9 - 700])
        assert torch.equal(full[BLOCK + 3 :], getattr(NoiseStream(3, "path", BLOCK + 3), draw)((6, *event), dtype))
        for n in (0, 1, 2, 17, 500, BLOCK, BLOCK + 1):
            assert torch.equal(getattr(NoiseStream(3, "path"), draw)((n, *event), dtype), full[:n])


def test_numbers_of_float32_are_those_of_float64_rounded():
    narrow, wide = (NoiseStream(5, "path").normal((BLOCK, 300), dtype) for dtype in FLOATS)
    radius = wide.reshape(-1, 2, 256).square().sum(1, keepdim=True).sqrt()  # of the pairs, cosines before sines
    allowed = 2e-6 + 2.0**-23 / radius  # u is rounded to 2^-24, which matters where the radius vanishes
    assert bool(((narrow - wide).reshape(-1, 2, 256).abs() <= allowed).all())
    narrow, wide = (NoiseStream(5, "path").uniform((BLOCK, 300), dtype) for dtype in FLOATS)
    assert float((narrow - wide).abs().max()) <= 2.0**-24
    assert float(narrow.min()) > 0 and float(narrow.max()) < 1 and float(wide.min()) > 0 and float(wide.max()) < 1
    narrow, wide = (NoiseStream(5, "path").rademacher((BLOCK, 3), dtype) for dtype in FLOATS)
    assert torch.equal(narrow.double(), wide)
    half = NoiseStream(5, "path").normal((BLOCK, 3), torch.bfloat16)
    assert torch.equal(half, NoiseStream(5, "path").normal((BLOCK, 3), torch.float32).to(torch.bfloat16))


@pytest.mark.parametrize("dtype", FLOATS)
def test_normal_numbers_are_normal_up_to_their_tails(dtype):
    z = torch.cat([NoiseStream(seed, "law").normal((1000, 400), dtype).flatten() for seed in range(10)]).double()
    edges = torch.tensor([-math.inf, *(k / 4 for k in range(-18, 19)), math.inf], dtype=torch.float64)
    counts = torch.histogram(z.clamp(-50, 50), torch.nan_to_num(edges, posinf=51.0, neginf=-51.0)).hist
    chances = torch.as_tensor(stats.norm.cdf(edges.numpy())).diff()
    assert stats.chisquare(counts.numpy(), (chances * len(z)).numpy()).pvalue > 1e-3
    assert stats.kstest(z[:400_000].numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("draw", ["normal", "uniform", "rademacher"])
def test_numbers_of_one_draw_of_successive_draws_and_of_blocks_are_independent(draw):
    stream = NoiseStream(0, "law")
    first, second = (getattr(stream, draw)((2 * BLOCK, 64), torch.float64) for _ in range(2))
    centre, scale = (0.5, math.sqrt(1 / 12)) if draw == "uniform" else (0.0, 1.0)
    a, b = (first - centre) / scale, (second - centre) / scale
    for power in (1, 2):  # squares tell of what is uncorrelated and not independent, a shared radius say
        u, v = (x.pow(power) - x.pow(power).mean() for x in (a, b))
        if not float(u.abs().max()):
            continue  # the square of a sign
        pairs = {"draws": (u, v), "blocks": (u[:BLOCK], u[BLOCK:])}
        flat = u.flatten()
        pairs |= {f"lag {lag}": (flat[lag:], flat[:-lag]) for lag in (1, 2, 64, 256, 512)}
        for name, (left, right) in pairs.items():
            z = float((left * right).mean() / (left.std() * right.std())) * math.sqrt(left.numel())
            assert abs(z) < 4.0, (name, power, z)


def test_the_numbers_of_a_seed_stay_as_they_are():
    stream = NoiseStream(0, "path")
    expected = {
        "normal": [0.4704565477209457, 0.6819814880741321, 1.8632801909201457, 0.5489993334691798],
        "uniform": [0.5368720185630763, 0.564981031756686, 0.3619281894520566, 0.3800917957091524],
        "rademacher": [1.0, 1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0],
    }
    for draw, numbers in expected.items():
        found = getattr(stream, draw)((len(numbers),), torch.float64)
        torch.testing.assert_close(found, torch.tensor(numbers, dtype=torch.float64), rtol=0, atol=1e-13)
