from __future__ import annotations

import pytest

from vlmenv.core.errors import ConfigError, require_at_least, require_weight


def test_options_below_their_least_value_are_named() -> None:
    require_at_least(1, steps=1, limit=None)
    with pytest.raises(ConfigError, match=r"^limit must be at least 2, not 1$"):
        require_at_least(2, steps=2, limit=1)


@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf")])
def test_weights_are_finite_and_not_negative(value: float) -> None:
    require_weight("beta", 0.0)
    with pytest.raises(ConfigError, match=r"^beta must be finite and at least 0, not"):
        require_weight("beta", value)
