"""Private parts of sympy and Math-Verify, in the processes that compare formulas."""

from __future__ import annotations

from typing import Any, Final

from vlmenv.compat import Use


def is_noise(number: Any) -> bool:
    """True if `evalf` could not tell any digit of a number."""
    return getattr(number, "_prec", 100) <= 4


def as_mpf(number: Any, bits: int) -> Any:
    """A real number of sympy's as mpmath's."""
    return number._to_mpmath(bits)


def is_complex(latex: str) -> bool:
    """True if Math-Verify takes the letters of a formula for complex numbers."""
    from math_verify.grader import should_treat_as_complex  # type: ignore[import-untyped]

    return bool(should_treat_as_complex(latex))


def _check_letters() -> str | None:
    told = is_complex("i^2") and not is_complex("x^2")
    return None if told else "complex numbers are recognised in another way"


def _check_numbers() -> str | None:
    from mpmath import mpf  # type: ignore[import-untyped]
    from sympy import Float, Rational, cos, pi, sin, sqrt  # type: ignore[import-untyped]

    nothing = (sin(pi / 7) ** 2 + cos(pi / 7) ** 2 - 1).evalf(30)  # cancels to noise
    told = is_noise(nothing) or nothing == 0
    exact = as_mpf(Rational(1, 4), 140) == mpf("0.25") and not is_noise(Float("0.25", 30))
    near = abs(as_mpf(sqrt(2).evalf(40), 140) ** 2 - 2) < 1e-15
    return None if told and exact and near else "numbers of sympy are told in another way"


USES: Final = (
    Use("numbers", _check_numbers, "answers with formulas are not compared"),
    Use("letters", _check_letters, "answers with formulas are not compared"),
)


def require_private_parts() -> None:
    """Raises RuntimeError if something of `USES` does not work, as answers would be judged wrongly."""
    for use in USES:
        if problem := use.problem():
            raise RuntimeError(f"this release of sympy or math-verify cannot be used: {problem}")
