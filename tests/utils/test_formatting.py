import pytest

from art_clat.utils.formatting import format_eps


@pytest.mark.parametrize(
    ("eps", "norm", "text"),
    [
        (8 / 255, "Linf", "8/255"),
        (0.0313725490196, "Linf", "8/255"),  # 8/255 as someone may type it
        (0.03, "Linf", "0.03"),
        (1.0, "Linf", "255/255"),
        (0.5, "L2", "0.5"),
        (128 / 255, "L2", "0.501961"),
    ],
)
def test_eps_is_a_fraction_of_255_where_it_is_one(eps, norm, text):
    assert format_eps(eps, norm) == text
