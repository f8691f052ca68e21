"""What the hooks see, against explicit expectations in float64."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from grit_core.curvature.capture import CurvatureBypassed, CurvatureCapture, LayerSums
from grit_core.models.pretrained import known_warnings_ignored

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
    with capture.observing(
        gradient_scale=num_labels / loss_scale, num_label_tokens=num_labels
    ) as sums:
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


def test_a_backward_under_autocast_still_sums_in_float32():
    results = []
    for around in (False, True):
        model = adapted()
        x, labels = batch()
        with capture_of(model).observing(gradient_scale=1.0, num_label_tokens=1) as sums:
            loss = loss_sum(model, x, labels)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around):
                loss.backward()
        results.append({name: (s.zz_RR, s.hh_RR) for name, s in sums.items()})
    assert_same_factors({"first": results[1]["first"]}, {"first": results[0]["first"]}, rtol=2e-2)
    assert torch.equal(results[1]["second"][0], results[0]["second"][0])


def llama(*, checkpointing=None):
    """A small real model with LoRA on every projection, B not zero."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    lora = LoraConfig(r=RANK, target_modules="all-linear")
    with known_warnings_ignored():
        model = get_peft_model(LlamaForCausalLM(config), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    if checkpointing is not None:
        kind = {"use_reentrant": checkpointing}
        model.get_base_model().activation_checkpointing_enable(kind)
        model.get_base_model().enable_input_require_grads()
    return model.train()


def llama_factors(model, *, padding=0):
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    capture = CurvatureCapture(
        {name: layer.lora_A["default"] for name, layer in layers.items()},
        {name: layer.lora_B["default"] for name, layer in layers.items()},
    )
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (3, 9), generator=generator)
    ids[0, 6:] = 0
    ids = nn.functional.pad(ids, (0, padding))
    labels = torch.where(ids == 0, -100, ids)
    labels[:, :3] = -100
    num_labels = float((labels[:, 1:] != -100).sum())
    with capture.observing(gradient_scale=num_labels, num_label_tokens=num_labels) as sums:
        model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss.backward()
    capture.close()
    return {
        name: (s.zz_RR / s.num_positions, s.hh_RR / s.num_positions, int(s.num_positions))
        for name, s in sums.items()
    }


@pytest.mark.parametrize("padding", [1, 7])
def test_factors_of_a_real_model_do_not_depend_on_the_padding(padding):
    tight, loose = llama_factors(llama()), llama_factors(llama(), padding=padding)
    assert {n: f[2] for n, f in loose.items()} == {n: f[2] for n, f in tight.items()}
    assert_same_factors(loose, tight)


@pytest.mark.parametrize("reentrant", [True, False])
def test_factors_of_a_real_model_do_not_depend_on_its_gradient_checkpointing(reentrant):
    plain, checkpointed = llama_factors(llama()), llama_factors(llama(checkpointing=reentrant))
    assert {n: f[2] for n, f in checkpointed.items()} == {n: f[2] for n, f in plain.items()}
    assert_same_factors(checkpointed, plain)


ONE_OF_TWO = """
import sys
import torch
from safetensors.torch import save_file
from tests.grit_core.curvature.test_capture import adapted, batch, capture_of, loss_sum
rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
model, (x, labels) = adapted(), batch()
x, labels = (t[:2] if rank == 0 else t[2:] for t in (x, labels))
num_labels = int((labels != -100).sum())
with capture_of(model).observing(gradient_scale=num_labels, num_label_tokens=num_labels) as sums:
    (loss_sum(model, x, labels) / num_labels).backward()
found = {n: (s.zz_RR / s.num_positions, s.hh_RR / s.num_positions) for n, s in sums.items()}
save_file({f"{n}/{i}": f[i].contiguous() for n, f in found.items() for i in (0, 1)}, out)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_with_uneven_shares_have_the_factors_of_one(tmp_path):
    store = (tmp_path / "store").as_uri()
    root = Path(__file__).parents[3]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_OF_TWO, str(rank), store, str(tmp_path / f"{rank}.bin")],
            cwd=root,
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    one = observe(adapted())
    for rank in range(2):
        tensors = load_file(tmp_path / f"{rank}.bin")
        assert_same_factors({n: (tensors[f"{n}/0"], tensors[f"{n}/1"]) for n in one}, one)


def test_tiny_gradients_are_not_lost():
    """1e-8-scaled gradients underflow in float16 sums; these are kept in float32."""
    found = observe(adapted(), loss_scale=1e-8)
    assert all(torch.linalg.matrix_rank(hh.double()) > 1 for _, hh, _ in found.values())


def test_a_batch_that_is_not_finite_shows_in_the_sums():
    for bad in (float("nan"), float("inf")):
        seen = LayerSums.empty(RANK, torch.device("cpu"))
        h = torch.ones(5, RANK)
        h[2, 1] = bad
        seen.add(torch.ones(5, RANK), h)
        assert not seen.hh_RR.isfinite().all()


def test_a_call_without_positions_changes_nothing():
    seen = LayerSums.empty(RANK, torch.device("cpu"))
    seen.add(torch.ones(0, RANK), torch.ones(0, RANK))
    assert int(seen.num_positions) == 0


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
    with capture.observing(gradient_scale=1.0, num_label_tokens=1) as sums:
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
        with capture_of(model).observing(gradient_scale=1.0, num_label_tokens=1):
            loss_sum(model, x, labels).backward()
