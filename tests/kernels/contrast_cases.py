"""Cases of the token-wise contrast that several test files run, and the equation they are held to."""

import torch
from hypothesis import strategies as st

NAMED = {
    "plain": {"shape": (2, 3, 4, 5)},
    "heavier negatives": {"shape": (2, 4, 30, 48), "weight": 5.0, "temperature": 0.1},
    "lighter negatives": {"shape": (2, 3, 33, 17), "weight": 0.5},
    "no such negatives": {"shape": (2, 3, 33, 17), "weight": 0.0},
    "in the exponent": {"shape": (2, 4, 30, 48), "weight": 5.0, "weight_mode": "logit"},
    "in the exponent, neutral": {"shape": (2, 3, 9, 8), "weight": 0.0, "weight_mode": "logit"},
    "two crops of a volume": {"shape": (2, 4, 25, 12), "weight": 3.0, "volume": (7, 7, -2, 10**12)},
    "a share": {"shape": (2, 5, 31, 12), "weight": 3.0, "anchors": (1, 2)},
    "a share, in the exponent": {"shape": (2, 5, 31, 12), "weight": 2.0, "weight_mode": "logit", "anchors": (4, 1)},
    "one position": {"shape": (2, 70, 1, 40), "weight": 2.0},
    "one position, a share": {"shape": (2, 300, 1, 3), "anchors": (280, 3)},
    "one volume": {"shape": (2, 1, 200, 9), "weight": 4.0},
    "cold": {"shape": (2, 3, 50, 24), "weight": 2.0, "temperature": 0.005},
    "cold, in the exponent": {"shape": (2, 3, 50, 24), "weight": 9.0, "temperature": 0.02, "weight_mode": "logit"},
    "cold, no such negatives": {"shape": (2, 3, 50, 24), "weight": 0.0, "temperature": 0.005},
    "two tokens": {"shape": (2, 1, 1, 1)},
    "wide": {"shape": (2, 2, 60, 300)},
}


def arguments(case, dtype=torch.float64, seed=0):
    """(z, options) of a case; z requires a gradient."""
    options = dict(case)
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(options.pop("shape"), generator=generator, dtype=torch.float64)
    z = torch.nn.functional.normalize(z, dim=-1).to(dtype).requires_grad_()
    if options.get("volume") is not None:
        options["volume"] = torch.tensor(options["volume"])
    return z, options


def value_and_gradient(operator, z, options):
    loss = operator(z, **options)
    return loss.detach(), torch.autograd.grad(3.0 * loss, z)[0]


def by_equation(z, *, temperature=0.5, weight=1.0, weight_mode="exp", volume=None, anchors=None):
    """Eq. 3 of SimPROT-W token by token, as the docstring of the operator words it, in the precision of z."""
    _, volumes, positions, _ = z.shape
    ids = list(range(volumes)) if volume is None else volume.tolist()
    first, count = anchors or (0, volumes)
    losses = []
    for view in range(2):
        for i in range(first, first + count):
            same = [j for j in range(volumes) if j != i and ids[j] == ids[i]]
            other = [j for j in range(volumes) if ids[j] != ids[i]]
            for m in range(positions):
                s = z @ z[view, i, m] / temperature
                rest = [p for p in range(positions) if p != m]
                positive = s[1 - view, i, m]
                plain = torch.cat((s[:, :, rest].reshape(-1), s[:, same, m].reshape(-1), positive[None]))
                weighted = s[:, other, m].reshape(-1)
                if weight_mode == "logit":
                    weighted = (1 + weight) * weighted
                elif weight:
                    weighted = weighted + torch.tensor(weight, dtype=z.dtype).log()
                else:
                    weighted = weighted[:0]
                losses.append(torch.cat((plain, weighted)).logsumexp(0) - positive)
    return torch.stack(losses).mean()


@st.composite
def problems(draw):
    """Any volumes, positions, channels, weights, ids and shares that make up to about 250 tokens."""
    volumes, positions = draw(st.integers(1, 7)), draw(st.integers(1, 18))
    first = draw(st.integers(0, volumes - 1))
    return {
        "shape": (2, volumes, positions, draw(st.integers(1, 35))),
        "temperature": draw(st.sampled_from((0.01, 0.07, 0.5, 3.0))),
        "weight": draw(st.sampled_from((0.0, 0.3, 1.0, 5.0))),
        "weight_mode": draw(st.sampled_from(("exp", "logit"))),
        "volume": draw(st.none() | st.lists(st.integers(-2, 2), min_size=volumes, max_size=volumes)),
        "anchors": draw(st.none() | st.integers(1, volumes - first).map(lambda count: (first, count))),
    }
