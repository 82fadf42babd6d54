"""How the weight alpha of the outlier loss decays over the optimizer steps."""

import math
from collections.abc import Callable

# from the finished fraction of the steps, 0 to 1, to the fraction of alpha that is left
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "constant": lambda done: 1.0,
}


def check(alpha: float, decay: str, total_steps: int | None) -> None:
    """Raise a ValueError that says what is wrong with a schedule."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha}")
    if decay not in DECAYS:
        raise ValueError(f"decay must be one of {', '.join(DECAYS)}, got {decay!r}")
    if decay != "constant" and (total_steps is None or total_steps < 1):
        raise ValueError(f"decay={decay!r} needs total_steps, a positive number, got {total_steps}")


def alpha_at(step: int, alpha: float, decay: str, total_steps: int | None) -> float:
    """Return the weight at optimizer step `step`; from total_steps on it is that of the end."""
    return alpha * DECAYS[decay](min(step / total_steps, 1.0) if total_steps else 0.0)
