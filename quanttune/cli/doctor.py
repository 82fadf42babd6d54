"""`quanttune doctor`."""

from .terminal import Json, console, write_numbers

_MENDS = {
    "cpu": "install g++ and run: pip install --force-reinstall --no-deps quanttune",
    "cuda": "pip install triton",
}


def run(json: Json = None) -> None:
    """Print versions, which kernels serve which device and why, and what would mend what is
    missing.

    Example: quanttune doctor
    """
    from ..analysis.environment import environment
    from ..ops import backends

    facts = environment()
    for name, value in facts.items():
        if not isinstance(value, dict):
            console.print(f"{name:10} {value}", highlight=False)
    for package, version in facts["versions"].items():
        console.print(f"{package:12} {version or 'not installed'}", highlight=False)
    for device, backend in backends().items():
        console.print(f"{device:6} [bold]{backend.name}[/bold]: {backend.reason}", highlight=False)
        if backend.name == "reference" and device in _MENDS:
            console.print(f"       to mend it: {_MENDS[device]}", highlight=False)
    write_numbers(json, facts)
