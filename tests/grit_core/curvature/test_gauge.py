"""The canonical Fisher gauge against its definition, in float64."""

import math

import pytest
import torch
from torch import nn

from grit_core.curvature.capture import CurvatureCapture
from grit_core.curvature.gauge import canonical_gauge, predicted_kl, transport_squares

RANK = 8


def normal(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def covariance(seed, *, rank=RANK, samples=RANK):
    root = normal(samples, rank, seed=seed)
    return root.mT @ root / samples


def conditioned(condition, *, seed, rank=RANK):
    """A random square matrix with singular values from 1 to 1 / condition."""
    left, right = (torch.linalg.qr(normal(rank, rank, seed=seed + i))[0] for i in (0, 1))
    return left * torch.logspace(0, -math.log10(condition), rank, dtype=torch.float64) @ right


def enter(Z, H, gauge):
    """Both factors in the gauge's coordinates."""
    T, inverse = gauge.T_LRR, gauge.inverse_LRR
    return inverse @ Z @ inverse.mT, T.mT @ H @ T


def assert_identity(product, *, atol):
    identity = torch.eye(product.shape[-1], dtype=product.dtype).expand_as(product)
    torch.testing.assert_close(product, identity, rtol=0, atol=atol)


@pytest.mark.parametrize(("damping", "tolerance"), [(1e-12, 1e-9), (1e-4, 1e-3)])
def test_both_factors_become_the_same_diagonal_up_to_the_damping(damping, tolerance):
    Z, H = covariance(0)[None], covariance(1)[None]
    gauge = canonical_gauge(Z, H, damping=damping)
    diagonal = torch.diag_embed(gauge.singular_LR)
    for moved in enter(Z, H, gauge):
        torch.testing.assert_close(moved, diagonal, rtol=0, atol=tolerance * float(diagonal.max()))


def test_the_squares_of_s_are_the_eigenvalues_of_zh():
    Z, H = covariance(0), covariance(1)
    squares = canonical_gauge(Z[None], H[None], damping=1e-12).singular_LR[0].square()
    expected = torch.linalg.eigvals(Z @ H).real.sort(descending=True).values
    torch.testing.assert_close(squares, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("damping", [1e-12, 1e-4])
@pytest.mark.parametrize("condition", [1, 1e2, 1e3])
def test_every_split_of_ba_has_the_same_s_and_arrives_at_the_same_coordinates(condition, damping):
    """(A, B) -> (R A, B R^-1) makes of Z and H R Z R' and R^-T H R^-1."""
    Z, H = covariance(0), covariance(1)
    R = conditioned(condition, seed=5)
    inverse = torch.linalg.inv(R)
    one = canonical_gauge(Z[None], H[None], damping=damping)
    other = canonical_gauge((R @ Z @ R.mT)[None], (inverse.mT @ H @ inverse)[None], damping=damping)
    assert bool(one.sound_L.all() & other.sound_L.all())
    torch.testing.assert_close(other.singular_LR, one.singular_LR, rtol=1e-5, atol=0)
    # B R^-1 T2 = B T1 and T2^-1 R A = T1^-1 A, up to the signs of the directions.
    relative = one.inverse_LRR[0] @ inverse @ other.T_LRR[0]
    assert_identity(relative.abs(), atol=5e-4)


@pytest.mark.parametrize("damping", [1e-12, 1e-4])
def test_entering_twice_is_the_identity_up_to_signs(damping):
    Z, H = covariance(0)[None], covariance(1)[None]
    moved = enter(Z, H, canonical_gauge(Z, H, damping=damping))
    again = canonical_gauge(*moved, damping=damping)
    assert_identity(again.T_LRR.abs(), atol=1e-6)


def degenerate_factors():
    """Z and H that are singular or far from 1, by what is wrong with them."""
    Z, H, few = covariance(0), covariance(1), covariance(2, samples=3)
    twin = covariance(3)
    twin[1], twin[:, 1] = twin[0], twin[:, 0]
    twin[1, 1] = twin[0, 0]
    return {
        "fewer positions than ranks": (few, H),
        "fewer gradients than ranks": (Z, few),
        "both": (few, covariance(4, samples=2)),
        "duplicated directions": (twin, H),
        "duplicated on both sides": (twin, twin),
        "of rank one": (Z, torch.outer(H[0], H[0])),
        "scaled by 1e-8": (Z * 1e-8, H * 1e-8),
        "scaled by 1e-16": (Z * 1e-16, H * 1e-16),
        "scaled against each other": (Z * 1e4, H * 1e-12),
    }


@pytest.mark.parametrize("kind", degenerate_factors())
def test_degenerate_factors_have_a_gauge_that_leaves_the_product_alone(kind):
    Z, H = (factor.float().double()[None] for factor in degenerate_factors()[kind])
    gauge = canonical_gauge(Z, H, damping=1e-4)
    assert bool(gauge.sound_L.all())
    assert gauge.singular_LR.isfinite().all()
    assert_identity(gauge.T_LRR @ gauge.inverse_LRR, atol=1e-9)


@pytest.mark.parametrize("damping", [1e-300, 1e-12, 1e-8])
@pytest.mark.parametrize("seed", range(5))
def test_a_float32_factor_of_few_positions_never_fails_however_small_the_damping(seed, damping):
    """Rounding makes its zero eigenvalues negative, where a Cholesky factorisation ends."""
    Z, H = covariance(seed, samples=3).float(), covariance(seed + 50).float()
    for factors in ((Z, H), (H, Z), (Z, Z)):
        gauge = canonical_gauge(*(factor.double()[None] for factor in factors), damping=damping)
        assert gauge.singular_LR.isfinite().all()
        assert gauge.T_LRR.isfinite().all()


@pytest.mark.parametrize("scale", [1e-16, 1e-8, 1e8])
def test_s_scales_with_the_factors(scale):
    Z, H = covariance(0)[None], covariance(1)[None]
    one = canonical_gauge(Z, H, damping=1e-4)
    other = canonical_gauge(Z * scale, H, damping=1e-4)
    torch.testing.assert_close(other.singular_LR, one.singular_LR * scale**0.5, rtol=1e-9, atol=0)
    torch.testing.assert_close(other.T_LRR, one.T_LRR * scale**0.25, rtol=1e-9, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("side", [0, 1])
def test_a_factor_that_is_zero_or_not_finite_is_refused_alone(bad, side):
    factors = [torch.stack([covariance(i), covariance(i + 2)]) for i in range(2)]
    sound = canonical_gauge(*factors, damping=1e-4)
    factors[side][1] *= bad
    gauge = canonical_gauge(*factors, damping=1e-4)
    assert gauge.sound_L.tolist() == [True, False]
    assert torch.equal(gauge.T_LRR[1], torch.eye(RANK, dtype=torch.float64))
    assert torch.equal(gauge.inverse_LRR[1], torch.eye(RANK, dtype=torch.float64))
    assert not gauge.singular_LR[1].any()
    torch.testing.assert_close(gauge.T_LRR[0], sound.T_LRR[0])


def test_a_gauge_conditioned_beyond_float32_is_refused():
    """Gradients in 7 directions of 8, and no damping to speak of that would bound T."""
    Z, H = torch.eye(RANK).double()[None], torch.eye(RANK).double()[None]
    H[0, -1, -1] = 0
    refused = canonical_gauge(Z, H, damping=1e-12)
    assert refused.sound_L.tolist() == [False]
    assert torch.equal(refused.T_LRR[0], torch.eye(RANK, dtype=torch.float64))
    assert canonical_gauge(Z, H, damping=1e-4).sound_L.tolist() == [True]


def layer_and_norm():
    """A and B, their factors for inputs of covariance X and output gradients of G, and the norm
    tr(G W X W')^1/2 of a change W of the layer's weight."""
    inputs, outputs = 20, 14
    A, B = normal(RANK, inputs, seed=10), normal(outputs, RANK, seed=11)
    X, G = covariance(12, rank=inputs, samples=60), covariance(13, rank=outputs, samples=40)

    def norm(W):
        return float(torch.trace(G @ W @ X @ W.mT).clamp_min(0).sqrt())

    return A, B, X, G, norm


@pytest.mark.parametrize("kept", range(RANK + 1))
def test_truncation_loses_the_root_of_the_dropped_squares_and_no_cut_to_that_rank_loses_less(kept):
    A, B, X, G, norm = layer_and_norm()
    gauge = canonical_gauge((A @ X @ A.mT)[None], (B.mT @ G @ B)[None], damping=1e-12)
    cut = (B @ gauge.T_LRR[0])[:, :kept] @ (gauge.inverse_LRR[0] @ A)[:kept]
    lost = norm(B @ A - cut)
    dropped = float(gauge.singular_LR[0, kept:].square().sum().sqrt())
    assert lost == pytest.approx(dropped, rel=1e-4, abs=1e-6)
    left, right = torch.linalg.cholesky(G), torch.linalg.cholesky(X)
    best = torch.linalg.svdvals(left.mT @ B @ A @ right)[kept:].square().sum().sqrt()
    assert lost == pytest.approx(float(best), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kept", [2, 4, 6])
def test_truncation_beats_the_frobenius_svd_and_a_thousand_random_subspaces(kept):
    A, B, X, G, norm = layer_and_norm()
    gauge = canonical_gauge((A @ X @ A.mT)[None], (B.mT @ G @ B)[None], damping=1e-12)
    lost = float(gauge.singular_LR[0, kept:].square().sum().sqrt())
    U, S, Vh = torch.linalg.svd(B @ A)
    frobenius = U[:, :kept] * S[:kept] @ Vh[:kept]
    assert norm(B @ A - frobenius) > 1.05 * lost
    B_star, A_star = B @ gauge.T_LRR[0], gauge.inverse_LRR[0] @ A
    draws = normal(1000, RANK, kept, seed=14)
    projectors = torch.linalg.qr(draws)[0] @ torch.linalg.qr(draws)[0].mT
    for left, right in ((B, A), (B_star, A_star)):
        errors = [norm(left @ right - left @ projector @ right) for projector in projectors]
        assert min(errors) > lost


def test_second_moments_are_transported_exactly_by_signed_permutations_and_scales():
    gradients = normal(50, RANK, 7, seed=20)
    order = torch.randperm(RANK, generator=torch.Generator().manual_seed(21))
    signs, scales = normal(RANK, seed=22).sign(), normal(RANK, seed=23).abs() + 0.1
    exact = torch.diag(signs * scales) @ torch.eye(RANK, dtype=torch.float64)[order]
    carried = transport_squares(gradients.square().mean(0)[None], exact[None])[0]
    torch.testing.assert_close(carried, (exact @ gradients).square().mean(0))


class SoftmaxRegression(nn.Module):
    """Logits W x + B A x, the adapter's part small."""

    def __init__(self, *, inputs=16, outputs=12):
        super().__init__()
        self.frozen = normal(outputs, inputs, seed=30) * 0.3
        self.lora_A = nn.Linear(inputs, RANK, bias=False, dtype=torch.float64)
        self.lora_B = nn.Linear(RANK, outputs, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.lora_A.weight.copy_(conditioned(30, seed=31) @ normal(RANK, inputs, seed=33) * 0.3)
            self.lora_B.weight.copy_(normal(outputs, RANK, seed=34) * 0.3)

    def forward(self, x):
        return x @ self.frozen.mT + self.lora_B(self.lora_A(x))


def test_predicted_kl_is_within_a_quarter_of_the_measured_one_for_small_cuts():
    """Labels are the model's own samples, as at the end of a training that has fitted them."""
    num_tokens = 20_000
    model = SoftmaxRegression()
    x = normal(num_tokens, 16, seed=35)
    with torch.no_grad():
        whole = model(x).log_softmax(-1)
    labels = torch.multinomial(whole.exp(), 1, generator=torch.Generator().manual_seed(36))[:, 0]
    capture = CurvatureCapture({"l": model.lora_A}, {"l": model.lora_B})
    with capture.observing(gradient_scale=1.0, num_label_tokens=num_tokens) as sums:
        nn.functional.cross_entropy(model(x), labels, reduction="sum").backward()
    seen = sums["l"]
    Z, H = (factor.double()[None] / num_tokens for factor in (seen.zz_RR, seen.hh_RR))
    gauge = canonical_gauge(Z, H, damping=1e-6)
    ratio = (seen.num_positions / seen.num_label_tokens).double()[None]
    costs = predicted_kl(gauge.singular_LR, ratio)[0]
    A = (gauge.inverse_LRR[0] @ model.lora_A.weight).detach()
    B = (model.lora_B.weight @ gauge.T_LRR[0]).detach()
    compared = 0
    for kept in range(1, RANK):
        with torch.no_grad():
            cut = (x @ model.frozen.mT + x @ A[:kept].mT @ B[:, :kept].mT).log_softmax(-1)
        measured = float((whole.exp() * (whole - cut)).sum(-1).mean())
        predicted = float(costs[kept:].sum())
        if measured < 0.05:
            compared += 1
            assert predicted == pytest.approx(measured, rel=0.25)
    assert compared >= 5


def test_predicted_kl_counts_every_position_that_a_label_depends_on():
    S = torch.tensor([[2.0, 1.0], [3.0, 0.5]], dtype=torch.float64)
    costs = predicted_kl(S, torch.tensor([1.0, 4.0], dtype=torch.float64))
    assert costs.tolist() == [[2.0, 0.5], [18.0, 0.5]]
