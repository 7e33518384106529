"""The positional encoding has the published values, columns before rows."""

from __future__ import annotations

import math

import pytest
import torch

from cflow_fast.positional import encoding_factors, positional_encoding

SIN_1, COS_1, SIN_2, COS_2 = 0.8414709848078965, 0.5403023058681398, 0.9092974268256817, -0.4161468365471424
SIN_01, COS_01, SIN_02, COS_02 = 0.009999833334166664, 0.9999500004166653, 0.01999866669333308, 0.9998000066665778


def test_encoding_has_the_literal_values_at_a_size_that_is_not_square() -> None:
    by_column = [[0, SIN_1, SIN_2], [1, COS_1, COS_2], [0, SIN_01, SIN_02], [1, COS_01, COS_02]]
    by_row = [[0, SIN_1], [1, COS_1], [0, SIN_01], [1, COS_01]]
    expected = torch.tensor(
        [[columns, columns] for columns in by_column] + [[[top] * 3, [bottom] * 3] for top, bottom in by_row],
        dtype=torch.float64,
    )
    encoding = positional_encoding(8, 2, 3)
    assert encoding.shape == (8, 2, 3)
    assert encoding.dtype == torch.float64
    torch.testing.assert_close(encoding, expected, rtol=0, atol=1e-15)


def test_every_channel_follows_the_formula() -> None:
    channels, height, width = 128, 5, 9
    encoding = positional_encoding(channels, height, width)
    for i in range(channels // 4):
        frequency = 10000 ** (-4 * i / channels)
        for row in range(height):
            for column in range(width):
                values = encoding[:, row, column].tolist()
                assert values[2 * i] == pytest.approx(math.sin(column * frequency), abs=1e-12)
                assert values[2 * i + 1] == pytest.approx(math.cos(column * frequency), abs=1e-12)
                assert values[64 + 2 * i] == pytest.approx(math.sin(row * frequency), abs=1e-12)
                assert values[64 + 2 * i + 1] == pytest.approx(math.cos(row * frequency), abs=1e-12)


def test_factors_are_the_encoding_split_by_axis() -> None:
    rows, columns = encoding_factors(12, 4, 7)
    encoding = positional_encoding(12, 4, 7)
    assert (rows.shape, columns.shape) == ((4, 6), (7, 6))
    for row in range(4):
        for column in range(7):
            torch.testing.assert_close(
                encoding[:, row, column], torch.cat([columns[column], rows[row]]), rtol=0, atol=0
            )


def test_map_without_positions_has_an_empty_encoding() -> None:
    assert positional_encoding(8, 0, 3).shape == (8, 0, 3)


@pytest.mark.parametrize("channels", [0, -4, 2, 6, 127])
def test_channels_that_do_not_split_in_four_are_refused(channels: int) -> None:
    with pytest.raises(ValueError, match=rf"multiple of 4 channels, got {channels}$"):
        positional_encoding(channels, 2, 2)
