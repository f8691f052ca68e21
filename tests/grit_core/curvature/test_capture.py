"""What the hooks see, against explicit expectations in float64."""

from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from grit_core.curvature.capture import CurvatureBypassed, CurvatureCapture

ROWS, POSITIONS, WIDTH, OUT, RANK = 6, 5, 12, 9, 4


class Net(nn.Module):
    """Two linear layers; the second reads the first, so that gradients reach all positions."""

    def __init__(self, *, checkpointed: str | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, OUT)
        self.checkpointed = checkpointed

    def forward(self, x):
        def body(value):
            return self.second(torch.tanh(self.first(value)))

        if self.checkpointed is None:
            return body(x)
        return checkpoint(body, x, use_reentrant=self.checkpointed == "reentrant")


def adapted(*, checkpointed=None):
    torch.manual_seed(0)
    model = get_peft_model(
        Net(checkpointed=checkpointed),
        LoraConfig(r=RANK, lora_alpha=8, target_modules=["first", "second"]),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    return model


def layers_of(model):
    base = model.get_base_model()
    return {"first": base.first, "second": base.second}


def capture_of(model):
    layers = layers_of(model)
    return CurvatureCapture(
        {name: layer.lora_A["default"] for name, layer in layers.items()},
        {name: layer.lora_B["default"] for name, layer in layers.items()},
    )


def batch():
    torch.manual_seed(1)
    x = torch.randn(ROWS, POSITIONS, WIDTH)
    labels = torch.randint(0, OUT, (ROWS, POSITIONS))
    labels[:, 3:] = -100  # padding: no label, and no gradient reaches these positions
    return x, labels


def loss_sum(model, x, labels):
    logits = model(x)
    return nn.functional.cross_entropy(
        logits.reshape(-1, OUT).float(), labels.reshape(-1), ignore_index=-100, reduction="sum"
    )


def observe(model, *, splits=1, loss_scale=1.0, dtype=None):
    x, labels = batch()
    num_labels = int((labels != -100).sum())
    capture = capture_of(model)
    model.zero_grad(set_to_none=True)
    with capture.observing(gradient_scale=num_labels / loss_scale) as sums:
        for part_x, part_y in zip(x.chunk(splits), labels.chunk(splits), strict=True):
            inputs = part_x.clone().requires_grad_()
            with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                loss = loss_sum(model, inputs, part_y)
            (loss / num_labels * loss_scale).backward()
    capture.close()
    return {
        name: (s.zz_RR / s.num_positions, s.hh_RR / s.num_positions, int(s.num_positions))
        for name, s in sums.items()
    }


def keep(seen, name, _module, _inputs, z):
    seen[name] = z


def expected(model):
    """Z and H of the labelled positions from explicit per-token gradients in float64."""
    model = model.double()
    layers = layers_of(model)
    x, labels = batch()
    kept = x[:, :3].reshape(-1, WIDTH).double()
    targets = labels[:, :3].reshape(-1)
    found = {name: ([], []) for name in layers}
    for token, target in zip(kept, targets, strict=True):
        seen = {}
        handles = [
            layer.lora_A["default"].register_forward_hook(partial(keep, seen, name))
            for name, layer in layers.items()
        ]
        loss = nn.functional.cross_entropy(model(token[None]), target[None])
        gradients = torch.autograd.grad(loss, list(seen.values()))
        for handle in handles:
            handle.remove()
        for name, gradient in zip(seen, gradients, strict=True):
            found[name][0].append(seen[name][0].detach())
            found[name][1].append(gradient[0])
    model.float()
    means = {}
    for name, (zs, hs) in found.items():
        z_TR, h_TR = torch.stack(zs), torch.stack(hs)
        means[name] = (z_TR.mT @ z_TR / len(zs), h_TR.mT @ h_TR / len(hs))
    return means


def assert_same_factors(found, other, *, rtol=1e-5):
    for name in other:
        for index in (0, 1):
            reference = other[name][index].float()
            torch.testing.assert_close(
                found[name][index].float(),
                reference,
                rtol=rtol,
                atol=float(reference.abs().max()) * rtol,
            )


def test_factors_are_the_second_moments_of_z_and_of_the_per_token_gradient():
    model = adapted()
    assert_same_factors(observe(model), expected(model))


def test_positions_without_a_gradient_are_not_counted():
    assert {count for _, _, count in observe(adapted()).values()} == {ROWS * 3}


@pytest.mark.parametrize("loss_scale", [1 / 1024, 65536.0])
def test_factors_do_not_depend_on_the_loss_scale(loss_scale):
    assert_same_factors(observe(adapted(), loss_scale=loss_scale), observe(adapted()))


@pytest.mark.parametrize("splits", [2, 3, 6])
def test_factors_do_not_depend_on_how_the_batch_is_split(splits):
    assert_same_factors(observe(adapted(), splits=splits), observe(adapted()))


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_gradient_checkpointing_counts_every_position_once(kind):
    checkpointed = observe(adapted(checkpointed=kind))
    assert {count for _, _, count in checkpointed.values()} == {ROWS * 3}
    assert_same_factors(checkpointed, observe(adapted()))


def test_bfloat16_activations_give_the_float32_factors_within_their_rounding():
    assert_same_factors(observe(adapted(), dtype=torch.bfloat16), observe(adapted()), rtol=0.05)


def test_tiny_gradients_are_not_lost():
    """1e-8-scaled gradients underflow in float16 sums; these are kept in float32."""
    found = observe(adapted(), loss_scale=1e-8)
    assert all(torch.linalg.matrix_rank(hh.double()) > 1 for _, hh, _ in found.values())


def test_nothing_is_observed_while_b_is_zero():
    model = adapted()
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.lora_B["default"].weight.zero_()
    assert {count for _, _, count in observe(model).values()} == {0}


def test_nothing_is_kept_outside_an_observation():
    model = adapted()
    capture = capture_of(model)
    x, labels = batch()
    loss_sum(model, x, labels).backward()
    model.zero_grad(set_to_none=True)
    with capture.observing(gradient_scale=1.0) as sums:
        pass
    assert {int(s.num_positions) for s in sums.values()} == {0}


def test_a_kernel_that_bypasses_lora_a_is_an_error():
    model = adapted()
    layer = layers_of(model)["first"]
    x, labels = batch()

    def fused(value):
        low = nn.functional.linear(value, layer.lora_A["default"].weight)
        return layer.base_layer(value) + nn.functional.linear(low, layer.lora_B["default"].weight)

    layer.forward = fused
    with pytest.raises(CurvatureBypassed, match="first"):  # noqa: SIM117
        with capture_of(model).observing(gradient_scale=1.0):
            loss_sum(model, x, labels).backward()
