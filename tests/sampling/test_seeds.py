import pytest
import torch

from sampling.seeds import SeededNoise, parse_seeds, stream_seed


def test_parse_seeds():
    assert parse_seeds("0-4") == [0, 1, 2, 3, 4]
    assert parse_seeds("1,2, 5-7") == [1, 2, 5, 6, 7]
    assert parse_seeds("7,7") == [7, 7]


def test_total_is_bounded():
    with pytest.raises(ValueError, match="^seeds '0-9999999,5': more than 10,000,000"):
        parse_seeds("0-9999999,5")
    with pytest.raises(ValueError, match="more than 10,000,000"):
        parse_seeds(",".join(["0-4999999"] * 3))


@pytest.mark.parametrize("text", ["", "a", "1,", "3-1", "-3", "1-2-3", "1.5", "0-99999999999", "99999999999999999999"])
def test_parse_seeds_rejects(text):
    with pytest.raises(ValueError, match="^seeds "):
        parse_seeds(text)


def test_no_two_of_many_seeds_share_a_stream():
    assert len({stream_seed(seed) for seed in range(200_000)}) == 200_000
    assert all(0 <= stream_seed(seed) < 1 << 32 for seed in (-1, 0, 1 << 32, 1 << 63, 1 << 70))
    assert stream_seed(5) != stream_seed(5 + (1 << 32))


def test_neighbouring_seeds_are_uncorrelated_standard_normal():
    noise = SeededNoise(range(64)).randn([64, 1, 32, 32]).flatten(1)
    assert abs(noise.mean().item()) < 5 / 65536**0.5
    assert noise.var().item() == pytest.approx(1, abs=5 * (2 / 65536) ** 0.5)
    correlation = torch.corrcoef(noise) - torch.eye(64)
    assert correlation.abs().max() < 5.5 / 32


def draws(seeds):
    source = SeededNoise(seeds)
    first = source.randn([len(seeds), 3, 5, 5])
    classes = source.randint(10)
    second = source.randn_like(first)
    return first, classes, second, source.randint(7)


def test_a_seed_draws_the_same_in_any_batch_and_position():
    together = draws([4, 9, 1, 4])
    for i, seed in enumerate([4, 9, 1, 4]):
        for joint, alone in zip(together, draws([seed]), strict=True):
            assert torch.equal(joint[i], alone[0])
    assert not torch.equal(together[0][0], together[0][1])
    assert not torch.equal(together[0][0], together[2][0])


def test_the_global_generator_plays_no_part():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = SeededNoise([3]).randn([1, 8])
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(1)
    assert torch.equal(first, SeededNoise([3]).randn([1, 8]))


def test_types_and_ranges():
    source = SeededNoise([1, 2])
    like = source.randn_like(torch.zeros(2, 4, dtype=torch.bfloat16))
    assert like.dtype == torch.bfloat16
    classes = SeededNoise(range(2000)).randint(10)
    assert classes.dtype == torch.int64 and classes.shape == (2000,)
    assert torch.bincount(classes, minlength=10).min() > 130


def test_the_first_dimension_is_the_number_of_seeds():
    with pytest.raises(ValueError, match="number of seeds, 2"):
        SeededNoise([1, 2]).randn([3, 1])
