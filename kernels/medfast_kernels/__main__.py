"""``python -m medfast_kernels``: which backend runs which operator here, and why another does not."""

from __future__ import annotations

from ._dispatch import BACKENDS, OPERATORS, choose, devices, facts, why_not


def main() -> None:
    for name, value in facts().items():
        print(f"{name:<16} {value}")
    for device in devices():
        print(f"\non {device}")
        for operator in OPERATORS:
            chosen = choose(operator, device)
            for name in BACKENDS:
                reason = why_not(operator, name, device)
                print(f"  {operator:<16} {name:<10} {reason or ('chosen' if name == chosen else 'runs if asked for')}")


if __name__ == "__main__":
    main()
